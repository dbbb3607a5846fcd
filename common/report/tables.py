"""Tables of many runs: `python -m common.report DIR --rows A,B --cols C --value METRIC` prints one
as Markdown.

The runs are the folders below DIR that hold a config.json. Rows and columns are flags or resolved
settings (`backbone`, `bs`, `seed`, `stage`), values are metrics of summary.json. Runs that agree in
all of them (seeds, say) share a cell: their mean and standard deviation, and how many they are. A
cell that no finished run fills says what there is instead: the status of the run that is there, or
`-` where there is none.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path

from common.errors import InputError, OtherFormat, did_you_mean, first_few, plural, printable, say
from common.report.record import checked, evaluations, naming, read_part
from common.run.files import FORMAT, read_config

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; the normal one beyond.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL95 = 1.96


def read_runs(folder: Path) -> list[dict]:
    """Every run below `folder`: its flags, resolved settings and summary in one dict, with `run`,
    `status`, `identity`, `card`.

    A setting that stages resolve (`bs`, `epochs`, `lr`) is that of the first stage. A run without a
    summary has the status "started". Runs of another format, and those whose files are damaged, are
    named on stderr and left out.

    Raises:
        InputError: the files of every run there are damaged.
    """
    runs = []
    of_other_format = []
    damaged = []
    for file in sorted(folder.rglob("config.json")):
        try:
            with naming(file):
                flags = read_config(file.parent)
            if not isinstance(flags, dict) or flags.get("identity") is None:
                continue  # of something else
            checked(file, "config.json", flags)
            summary = read_part(file.parent, "summary.json") or {"status": "started"}
            summary = evaluations(file.parent) | summary
        except OtherFormat:
            of_other_format.append(str(file.parent))
            continue
        except InputError as error:
            damaged.append(str(error))
            continue
        resolved = flags.pop("resolved")
        stages = [v for v in resolved.values() if isinstance(v, dict) and "epochs" in v]
        first = stages[0] if stages else {}
        runs.append({**flags, **first, **resolved, **summary, "run": str(file.parent)})
    if damaged and not runs:
        raise InputError(first_few(damaged))
    if damaged:
        text = f"left out {plural(len(damaged), 'damaged run')}: {first_few(damaged)}"
        say(text, file=sys.stderr)
    if of_other_format:
        text = f"{plural(len(of_other_format), 'run')} of another run format than {FORMAT}"
        say(f"left out {text}: {first_few(of_other_format)}", file=sys.stderr)
    return runs


def parse_axis(text: str) -> dict[str, list[str] | None]:
    """`backbone,bs=64|128` as {"backbone": None, "bs": ["64", "128"]}: names, and the values to
    list where given.
    """
    axis = {}
    for part in filter(None, text.split(",")):
        name, _, values = part.partition("=")
        listing = [_shown(value) for value in values.split("|")] if values else None
        axis[name.strip().replace("-", "_")] = listing
    return axis


def where(runs: list[dict], text: str) -> list[dict]:
    """The runs that have the listed values of every setting in `text`, as
    `stage=linear,fraction=1|0.7`.

    `trial=any` are the runs in which it is set at all.

    Raises:
        InputError: a setting without values, a setting that no run has, or no run is left.
    """
    axis = parse_axis(text)
    for name, allowed in axis.items():
        if allowed is None:
            raise InputError(
                f"--where {name} lists no values: give {name}=VALUE, or several as {name}=A|B"
            )
        _check_names(runs, [name])
    set_at_all = [name for name, allowed in axis.items() if allowed == ["any"]]
    listing = {name: allowed for name, allowed in axis.items() if name not in set_at_all}
    kept = [
        run
        for run in runs
        if listed(run, listing) and all(run.get(name) is not None for name in set_at_all)
    ]
    if not kept:
        raise InputError(f"no run has {text}")
    return kept


def listed(run: dict, axis: dict) -> bool:
    """Whether a run has one of the listed values of every setting of an axis."""
    return all(
        allowed is None or _shown(run.get(name)) in allowed for name, allowed in axis.items()
    )


def _shown(value) -> str:
    # 1, 1.0 and "1" are one value: flags are typed in either form.
    if isinstance(value, bool) or value is None:
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return str(int(number)) if number.is_integer() else repr(number)


def _check_names(runs: list[dict], names: list[str]) -> None:
    for name in names:
        if not any(name in run for run in runs):
            known = sorted({key for run in runs for key in run})
            raise InputError(
                f"no run has {name!r}{did_you_mean(name, known)}; metrics look like"
                " pretrain/train/loss"
            )


def mean_text(values: list[float], interval: bool) -> str:
    """The mean of a cell's runs; of several also their deviation, or half a 95 % interval, and how
    many they are.
    """
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return f"{mean:.4f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    if interval:
        quantile = _T95[count - 2] if count - 2 < len(_T95) else _NORMAL95
        spread *= quantile / math.sqrt(count)
    return f"{mean:.4f} ± {spread:.4f} ({count})"


def pivot(
    runs: list[dict],
    rows: dict,
    cols: dict,
    values: list[str],
    *,
    interval: bool = False,
    compact: bool = False,
) -> str:
    """A Markdown table of `runs`: a row for every combination of the row settings, a column for one
    of the others.

    `rows` and `cols` are as `parse_axis` gives them: of a setting with listed values all of those
    stand in the table, of another one those that occur in some run. `compact` leaves out the rows
    without any run.

    Raises:
        InputError: a setting or a metric that no run has, or a value that is no number.
    """
    _check_names(runs, [*rows, *cols, *values])
    for value in values:
        if not any(isinstance(run.get(value), (int, float)) for run in runs):
            raise InputError(
                f"--value {value} is no number in any run; metrics look like pretrain/train/loss"
            )
    kept = [run for run in runs if listed(run, rows) and listed(run, cols)]
    groups = defaultdict(list)  # the finished runs of a cell
    states = defaultdict(set)  # of the others
    for run in kept:
        for value in values:
            key = (_key(run, rows), _key(run, cols), value)
            if run["status"] != "finished":
                states[key].add(run["status"])
            elif isinstance(run.get(value), (int, float)):
                groups[key].append(run)
    row_keys = _combinations(rows, kept)
    col_keys = _combinations(cols, kept)
    header = [*rows, *(_title(key, value, values) for key in col_keys for value in values)]
    with_runs = {_key(run, rows) for run in kept}
    lines = [_markdown(header), f"|{' --- |' * len(header)}"]
    for row in row_keys:
        if compact and row not in with_runs:
            continue
        texts = []
        for col in col_keys:
            for value in values:
                numbers = [run[value] for run in groups[row, col, value]]
                status = "/".join(sorted(states[row, col, value])) or "-"
                texts.append(mean_text(numbers, interval) if numbers else status)
        lines.append(_markdown([*row, *texts]))
    shared = {name for group in groups.values() for name in differences(group)} - {"seed"}
    if shared:
        lines += ["", f"Runs that share a cell differ in: {', '.join(sorted(shared))}"]
    return "\n".join(lines)


def _markdown(cells: list[str]) -> str:
    return f"| {' | '.join(map(printable, cells))} |"


def differences(group: list[dict]) -> set[str]:
    """The settings of their identities, what decides the result, that some of the runs do not
    share.
    """
    names = {name for run in group for name in run["identity"]}
    return {name for name in names if len({str(run["identity"].get(name)) for run in group}) > 1}


def _key(run: dict, axis: dict) -> tuple[str, ...]:
    return tuple(_shown(run.get(name)) for name in axis)


def _combinations(axis: dict, runs: list[dict]) -> list[tuple[str, ...]]:
    keys = [()]
    for name, allowed in axis.items():
        levels = allowed or sorted({_shown(run.get(name)) for run in runs}, key=_order)
        keys = [(*key, level) for key in keys for level in levels]
    return keys


def _order(text: str):
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)


def _title(key: tuple[str, ...], value: str, values: list[str]) -> str:
    parts = [" ".join(key)] if key else []
    if len(values) > 1 or not key:
        parts.append(value)
    return " ".join(parts)
