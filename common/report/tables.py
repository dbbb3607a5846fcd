"""Tables of many runs: `python -m common.report DIR --rows A,B --cols C --value METRIC` prints one
as Markdown.

The runs are the folders below DIR that hold a config.json. Rows and columns are flags or resolved
settings (`backbone`, `bs`, `seed`, `stage`), values are metrics of summary.json. Runs that agree in
all of them (seeds, say) share a cell: their mean and standard deviation, and how many they are. A
cell that no finished run fills says what there is instead: the status of the run that is there, or
`-` where there is none.
"""

import math
import shlex
from collections import defaultdict
from pathlib import Path

from common.errors import InputError, did_you_mean
from common.run.files import read_json

# The projection that the SimCLR experiment went on with, by backbone.
RECIPE_CHOICE = {"resnet50": 64, "resnet101": 128, "inception_v3": 128, "inception_resnet_v2": 128}
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; the normal one beyond.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def runs(folder: Path) -> list[dict]:
    """Every run below `folder`: its flags, resolved settings and summary in one dict, with `run`,
    `status`, `identity`.

    A setting that stages resolve (`bs`, `epochs`, `lr`) is that of the first stage. A run without a
    summary has the status "started".
    """
    found = []
    for file in sorted(folder.rglob("config.json")):
        settings = read_json(file)
        if "identity" not in settings:
            continue  # a config.json of something else
        summary = read_json(file.with_name("summary.json")) or {"status": "started"}
        resolved = settings.pop("resolved")
        first = next((v for v in resolved.values() if isinstance(v, dict) and "epochs" in v), {})
        found.append(settings | first | resolved | summary | {"run": str(file.parent)})
    return found


def parse_axis(text: str) -> dict[str, list[str] | None]:
    """`backbone,bs=64|128` as {"backbone": None, "bs": ["64", "128"]}: names, and the values to
    list where given.
    """
    axis = {}
    for part in filter(None, text.split(",")):
        name, _, values = part.partition("=")
        axis[name.strip().replace("-", "_")] = (
            [_shown(value) for value in values.split("|")] if values else None
        )
    return axis


def where(found: list[dict], text: str) -> list[dict]:
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
        _check_names(found, [name])
    there = [name for name, allowed in axis.items() if allowed == ["any"]]
    listing = {name: allowed for name, allowed in axis.items() if name not in there}
    kept = [
        run
        for run in found
        if listed(run, listing) and all(run.get(name) is not None for name in there)
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


def _check_names(found: list[dict], names: list[str]) -> None:
    for name in names:
        if not any(name in run for run in found):
            known = sorted({key for run in found for key in run})
            raise InputError(
                f"no run has {name!r}{did_you_mean(name, known)}; metrics look like"
                " pretrain/train/loss"
            )


def cell(values: list[float], interval: bool) -> str:
    """Mean of a cell's runs; of several also their deviation, or half a 95 % interval, and how many
    they are.
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    if interval:
        spread *= (_T95[len(values) - 2] if len(values) - 2 < len(_T95) else 1.96) / math.sqrt(
            len(values)
        )
    return f"{mean:.4f} ± {spread:.4f} ({len(values)})"


def pivot(
    found: list[dict],
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
    _check_names(found, [*rows, *cols, *values])
    for value in values:
        if not any(isinstance(run.get(value), (int, float)) for run in found):
            raise InputError(
                f"--value {value} is no number in any run; metrics look like pretrain/train/loss"
            )
    cells, states, groups = defaultdict(list), defaultdict(set), defaultdict(list)
    kept = [run for run in found if listed(run, rows) and listed(run, cols)]
    for run in kept:
        key = (_key(run, rows), _key(run, cols))
        for value in values:
            if run["status"] == "finished" and isinstance(run.get(value), (int, float)):
                cells[key, value].append(run[value])
                groups[key, value].append(run)
            elif run["status"] != "finished":
                states[key, value].add(run["status"])
    row_keys, col_keys = (_combinations(axis, kept) for axis in (rows, cols))
    names = [*rows, *(_title(key, value, values) for key in col_keys for value in values)]
    there = {_key(run, rows) for run in kept}
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in row_keys:
        if compact and row not in there:
            continue
        shown = []
        for key in ((row, col) for col in col_keys):
            for value in values:
                states_there = "/".join(sorted(states[key, value]))
                shown.append(
                    cell(cells[key, value], interval) if cells[key, value] else states_there or "-"
                )
        lines.append(f"| {' | '.join([*row, *shown])} |")
    shared = sorted({name for group in groups.values() for name in differences(group)} - {"seed"})
    if shared:
        lines += ["", f"Runs that share a cell differ in: {', '.join(shared)}"]
    return "\n".join(lines)


def differences(group: list[dict]) -> set[str]:
    """The settings of their identities, what decides the result, that some of the runs do not
    share.
    """
    names = {name for run in group for name in run["identity"]}
    return {name for name in names if len({str(run["identity"].get(name)) for run in group}) > 1}


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as lines of text, each column as wide as its widest cell."""
    shown = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    )
    return "\n".join(lines)


def _key(run: dict, axis: dict) -> tuple[str, ...]:
    return tuple(_shown(run.get(name)) for name in axis)


def _combinations(axis: dict, found: list[dict]) -> list[tuple[str, ...]]:
    keys = [()]
    for name, allowed in axis.items():
        levels = allowed or sorted({_shown(run.get(name)) for run in found}, key=_order)
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


def select(found: list[dict], value: str = "pretrain/train/loss") -> str:
    """Per backbone the pretraining run of the largest batch and, among those, of the lowest
    `value`.

    This is the SimCLR experiment's rule. Where its authors went on with another projection, that is
    said.

    Raises:
        InputError: no finished run has `value`.
    """
    done = [
        run
        for run in found
        if run["status"] == "finished" and run.get("script") == "simclr" and value in run
    ]
    if not done:
        raise InputError(
            f"no finished run has {value}: run `python train_simclr.py --cell K` first"
        )
    lines = []
    for backbone in sorted({run["backbone"] for run in done}):
        own = [run for run in done if run["backbone"] == backbone]
        best = min(own, key=lambda run: (-run["bs"], run[value], run["run"]))
        settings = ", ".join(f"{name} {best[name]:g}" for name in ("proj_dim", "bs", "fraction"))
        text = f"{backbone}: {settings}, {value} {best[value]:.4f}"
        chosen = RECIPE_CHOICE.get(backbone, best["proj_dim"])
        if chosen != best["proj_dim"]:
            text += f" (the published experiment went on with projection {chosen})"
        command = ["python", "train_simclr.py", "--stage", "linear", "--data", best["data"]]
        for flag in ("protocol", "target_labels"):
            # It has no effect without the protocol, and is refused there.
            if best["targets"] is not None:
                command += [f"--{flag.replace('_', '-')}", best[flag]]
        lines += [text, "  " + shlex.join([*command, "--from", best["run"]])]
    return "\n".join(lines)
