"""The command line of the reports."""

import sys
from pathlib import Path

import torch

from common import config
from common.errors import InputError, exit_codes
from common.report import compare, tables
from common.report.page import write
from common.report.record import Record


def main(argv: list[str] | None = None) -> int:

    parser = config.Parser(prog="python -m common.report", description=__doc__)
    parser.add_argument(
        "folders", metavar="DIR", nargs="+", help="run directories, or folders of runs"
    )
    parser.add_argument(
        "--text", action="store_true", help="print tables instead of writing a page"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the page that compares runs; unset: compare.html"
    )
    axis = "settings, as `backbone,bs`; `bs=64|128` lists the values to show"
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
    args = parser.parse_args(argv)
    folders = [Path(folder) for folder in args.folders]
    with exit_codes():
        one = len(folders) == 1 and any(
            (folders[0] / name).exists() for name in ("config.json", "check.json")
        )
        if args.rows is None:
            config.reject_unused_flags(
                parser, args, ["cols", "value", "interval", "compact"], "without --rows"
            )
        elif args.value is None:
            parser.error("--rows needs --value, the metric to show")
        table_asked = args.rows is not None or args.select
        if table_asked or args.text or one:
            config.reject_unused_flags(parser, args, ["out"], "without a page that compares runs")
        if table_asked:
            config.reject_unused_flags(
                parser, args, ["text"], "with --rows or --select, which print text"
            )
        if one and not table_asked:
            config.reject_unused_flags(parser, args, ["where"], "for a single run")
            print(compare.text_of(Record(folders[0])) if args.text else write(folders[0]))
            return 0
        found, idle = {}, []
        for folder in folders:
            own = {Path(row["run"]).resolve(): row for row in tables.runs(folder)}
            found |= own  # a run that is given twice, in its folder and by name, counts once
            if not own:
                checked = (folder / "check.json").exists()
                idle.append(f"{folder}: {'checked, not trained' if checked else 'no run there'}")
        if not found:
            raise InputError(f"{'; '.join(idle)}; a run directory holds a config.json")
        for line in idle:
            print(f"{line}; left out", file=sys.stderr)
        found = list(found.values())
        found = tables.where(found, args.where)
        if args.rows is not None:
            rows, cols = tables.parse_axis(args.rows), tables.parse_axis(args.cols)
            values = args.value.split(",")
            print(
                tables.pivot(
                    found, rows, cols, values, interval=args.interval, compact=args.compact
                )
            )
        if args.select:
            print(tables.select(found))
        if not table_asked:
            print(
                compare.text(found)
                if args.text
                else compare.write(found, Path(args.out or "compare.html"))
            )
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
