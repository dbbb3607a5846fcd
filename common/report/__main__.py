"""Reports of runs, from the files in their run directories.

python -m common.report RUN                 writes its report.html again
python -m common.report RUN --text          the same run as text, on a terminal
python -m common.report RUN RUN [RUN ...]   compare.html: curves together, settings that
                                            differ, metrics
python -m common.report DIR --rows backbone,bs --cols proj_dim --value pretrain/train/loss
                                            a table of many runs
"""

import argparse
import sys
from pathlib import Path

import torch

from common import config
from common.data.cytology import select_run
from common.errors import InputError, exit_codes, printable, say
from common.report import compare, page, tables
from common.report.record import Record, naming


def build_parser() -> config.Parser:
    parser = config.Parser(prog="python -m common.report", description=__doc__)
    axis = "settings, as `backbone,bs`; `bs=64|128` lists the values to show"
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="run directories, or folders of runs"
    )
    parser.add_argument(
        "--text", action="store_true", help="print tables instead of writing a page"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the page that compares runs; unset: compare.html"
    )
    parser.add_argument("--rows", help=f"print a table of the runs: {axis}")
    parser.add_argument("--cols", default="", help=f"its columns: {axis}")
    parser.add_argument(
        "--value", help="the metrics in its cells, as `linear/test/accuracy,linear/test/macro_f1`"
    )
    parser.add_argument(
        "--where", default="", help="only runs with these settings, as `stage=linear`, `trial=any`"
    )
    parser.add_argument(
        "--interval", action="store_true", help="95 %% intervals of means instead of deviations"
    )
    parser.add_argument("--compact", action="store_true", help="leave out rows without any run")
    parser.add_argument(
        "--select", action="store_true", help="per backbone the SimCLR run to go on with"
    )
    return parser


def validate(parser: config.Parser, args: argparse.Namespace, single_run: bool) -> None:
    """Refuse flags that would have no effect."""

    def reject(flags: list[str], why: str) -> None:
        config.reject_unused_flags(parser, args, flags, why)

    prints_table = args.rows is not None or args.select
    if args.rows is None:
        reject(["cols", "value", "interval", "compact"], "without --rows")
    elif args.value is None:
        parser.error("--rows needs --value, the metric to show")
    if prints_table or args.text or single_run:
        reject(["out"], "without a page that compares runs")
    if prints_table:
        reject(["text"], "with --rows or --select, which print text")
    elif single_run:
        reject(["where"], "for a single run")


def find_runs(folders: list[Path]) -> list[dict]:
    """The runs in and below the folders, each once; folders without any are named.

    Raises:
        InputError: there is no run at all.
    """
    by_folder = {}
    without = []
    for folder in folders:
        try:
            runs = {Path(run["run"]).resolve(): run for run in tables.read_runs(folder)}
        except InputError as error:
            without.append(str(error))
            continue
        by_folder |= runs  # a run that is given twice, in its folder and by name, counts once
        if not runs:
            checked = (folder / "check.json").exists()
            without.append(f"{folder}: {'checked, not trained' if checked else 'no run there'}")
    if not by_folder:
        raise InputError(f"{'; '.join(without)}; a run directory holds a config.json")
    for text in without:
        say(f"{text}; left out", file=sys.stderr)
    return list(by_folder.values())


def _show(text: str) -> None:
    # Not `say`, which cuts: a wide table goes into a file.
    print(*map(printable, text.split("\n")), sep="\n")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    folders = [Path(folder) for folder in args.folders]
    single_run = len(folders) == 1 and any(
        (folders[0] / name).exists() for name in ("config.json", "check.json")
    )
    with exit_codes(), naming(", ".join(args.folders)):
        validate(parser, args, single_run)
        prints_table = args.rows is not None or args.select
        if single_run and not prints_table:
            if args.text:
                _show(compare.text_of(Record(folders[0])))
            else:
                say(page.write(folders[0]))
            return 0
        runs = tables.where(find_runs(folders), args.where)
        if args.rows is not None:
            table = tables.pivot(
                runs,
                tables.parse_axis(args.rows),
                tables.parse_axis(args.cols),
                args.value.split(","),
                interval=args.interval,
                compact=args.compact,
            )
            _show(table)
        if args.select:
            _show(select_run(runs))
        if not prints_table:
            if args.text:
                _show(compare.text(runs))
            else:
                say(compare.write(runs, Path(args.out or "compare.html")))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
