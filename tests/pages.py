"""What of the documents is made by a command: `python -m tests.pages flags` or `... picture RUN`.

`flags` writes docs/flags.md; tests/test_docs.py holds it to the parsers. `picture` renders the
head of a run's report in Chromium, light and dark, into docs/report-light.png and report-dark.png,
which README shows, and copies the report to docs/example-report.html.
"""

import argparse
import importlib
import io
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

from PIL import Image

from common.report import __main__ as report

DOCS = Path(__file__).parent.parent / "docs"
SCRIPTS = ("train_simclr", "train_tsm", "train_raer", "train_cluster")
SIZE = (1200, 760)  # pixels of the pictures
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def described(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """The flags that --help lists, by the title of their group, as lines of a Markdown list."""
    formatter = parser._get_formatter()
    groups = {}
    for group in parser._action_groups:
        lines = []
        for action in group._group_actions:
            if action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
                value = formatter._format_args(action, action.metavar or action.dest.upper())
                flag = " ".join(filter(None, [action.option_strings[-1], value]))
                lines.append(f"- `{flag}`: {formatter._expand_help(action)}")
        if lines:
            groups[group.title] = lines
    return groups


def flags_page() -> str:
    """docs/flags.md: the flags that all scripts have alike, then those of each."""
    with mock.patch("os.cpu_count", return_value=8):  # a default that is the machine's
        parsers = {name: importlib.import_module(name).parse_args([])[1] for name in SCRIPTS}
    groups = {name: described(parser) for name, parser in parsers.items()}
    lines = {name: [line for g in of.values() for line in g] for name, of in groups.items()}
    shared = set.intersection(*map(set, lines.values()))
    parts = [
        "# Flags\n\nWritten by `python -m tests.pages flags` from the scripts' parsers; `--help`"
        " says the same. First\nwhat all four scripts have alike, then what each has of its own,"
        " or with another default."
    ]
    for name, of in {"All scripts": groups[SCRIPTS[0]], **groups}.items():
        parts.append(f"## {name if name not in groups else f'{name}.py'}")
        for title, listed in of.items():
            kept = [line for line in listed if (line in shared) != (name in groups)]
            if kept:
                parts.append(f"{title[0].upper()}{title[1:]}:\n\n" + "\n".join(kept))
    return "\n\n".join(parts) + "\n"


def picture(run: Path) -> None:
    """Write the pictures of a run's report and the example report."""
    report.main([str(run)])
    shutil.copy(run / "report.html", DOCS / "example-report.html")
    browser = next(filter(None, map(shutil.which, CHROMIUM)))
    for scheme, name in enumerate(("dark", "light")):  # Chromium's own numbers
        with tempfile.TemporaryDirectory() as folder:
            shot = Path(folder, "shot.png")
            flags = [f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={shot}"]
            flags += [f"--blink-settings=preferredColorScheme={scheme}", "--hide-scrollbars"]
            flags += ["--headless", "--no-sandbox", "--disable-gpu"]
            address = (run / "report.html").resolve().as_uri()
            subprocess.run([browser, *flags, address], check=True, capture_output=True)
            stored = io.BytesIO()
            Image.open(shot).convert("RGB").quantize(256).save(stored, "PNG", optimize=True)
        (DOCS / f"report-{name}.png").write_bytes(stored.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pages", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("flags")
    commands.add_parser("picture").add_argument("run", type=Path)
    args = parser.parse_args(argv)
    if args.command == "flags":
        (DOCS / "flags.md").write_text(flags_page(), encoding="utf-8")
    else:
        picture(args.run)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
