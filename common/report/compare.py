"""Runs side by side, on a page or as text."""

import sys
from pathlib import Path

from common.errors import InputError, aligned, first_few, printable, say
from common.report import charts, page, tables
from common.report.curves import FIRST, chart_figure, label_of, title_of
from common.report.record import LIMIT, Record, interval_text
from common.run import ending
from common.run.files import atomic_write

DRAWN = 10  # runs whose curves are drawn together; tables hold all of them
_PIVOT_VALUES = 3  # headline metrics in the pivot table
_PARTS = ("_low", "_high", "_sd", "_last_epoch")  # of another metric
# How the names of metrics end of which more, or less, is better; of others nobody is the best.
_MORE = (
    "accuracy", "precision", "recall", "f1", "auc", "ap", "uar", "war", "nmi", "ami", "ari", "acc",
    "fmi",
)  # fmt: skip
_LESS = ("loss", "loss_over_chance", "eer")


def names_of(runs: list[dict]) -> list[str]:
    """A short name for each run: its folder's, with as many of those above as tell them apart."""
    paths = [Path(run["run"]).resolve().parts for run in runs]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths) and depth < max(map(len, paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def differing(runs: list[dict]) -> list[str]:
    """The flags and settings that some of the runs do not share, of those that decide the result.

    Lists and tables, as a schedule, follow from a flag as a rule: they are named where nothing else
    differs.
    """
    names = sorted(tables.differences(runs))
    plain = [
        name
        for name in names
        if not any(isinstance(run["identity"].get(name), (list, dict)) for run in runs)
    ]
    return plain if set(plain) - {"seed"} else names


def setting(run: dict, name: str) -> str:
    """A setting of a run as text: resolved where the flag was not given."""
    value = run["identity"].get(name)
    if value is None or isinstance(value, dict):
        value = run.get(name) if run.get(name) is not None else "its default"
    return charts.cut(str(value), 480)


def headlines_of(records: list[Record]) -> list[str]:
    """The metrics that matter by the cards of the runs' scripts, the most telling first."""
    return list(dict.fromkeys(name for record in records for name in record.card["headlines"]))


def metric_names(scores: list[dict], headlines: list[str]) -> list[str]:
    """The metrics that any run has: the headlines, then test ones, then the others.

    Intervals, deviations and last epochs are parts of others.
    """
    names = {
        name
        for values in scores
        for name, value in values.items()
        if name.count("/") == 2
        and isinstance(value, (int, float))
        and name.split("/")[1] not in ("monitor", "schedule")
        and not name.endswith(_PARTS)
        and not any(f"{part}_" in name for part in _PARTS[:3])
    }
    first = [name for name in headlines if name in names]
    rest = sorted(names.difference(first))
    tests = [name for name in rest if name.split("/")[1] == "test"]
    return first + tests + [name for name in rest if name not in tests]


def with_records(runs: list[dict]) -> tuple[list[dict], list[Record]]:
    """The runs with all of their files; those with a damaged one are named on stderr and left out.

    Raises:
        InputError: every run has one.
    """
    kept = []
    records = []
    damaged = []
    for run in runs:
        try:
            records.append(Record(Path(run["run"])))
            kept.append(run)
        except InputError as error:
            damaged.append(str(error))
    if not kept:
        raise InputError(first_few(damaged))
    for text in damaged:
        say(f"{text}; left out", file=sys.stderr)
    return kept, records


def cells(runs: list[dict], records: list[Record]) -> tuple[list, list, list, list]:
    """(states, flags, metrics, header): the tables of a comparison, a row for each thing and a
    column for each run.
    """
    header = ["", *names_of(runs)]
    facts = {
        "state": [record.state for record in records],
        "command": [f"python {record.env.get('command', '')}" for record in records],
        "data": [record.env.get("data_read", "-") for record in records],
        "hardware": [page.hardware(record.env) for record in records],
        "commit": [page.commit_of(record.env) for record in records],
    }
    states = [[name, *values] for name, values in facts.items()]
    flags = [[name, *(setting(run, name) for run in runs)] for name in differing(runs)]
    names = metric_names([record.scores for record in records], headlines_of(records))
    scores = [record.scores for record in records]
    alike = len({run["identity"].get("data") for run in runs}) == 1
    metrics = [[name, *marked(name, scores, alike)] for name in names]
    return states, flags, metrics, header


def marked(name: str, scores: list[dict], same_data: bool) -> list[str]:
    """A metric of each run as text, the best with an asterisk, where one is better than another.

    Nothing is the best of runs on different data, nor is a baseline.
    """
    texts = [interval_text(values, name) for values in scores]
    values = [value for value in (s.get(name) for s in scores) if ending.is_number(value)]
    metric = name.rpartition("/")[2]
    is_ranked = same_data and metric.endswith(_MORE + _LESS) and not ending.is_baseline(name)
    if is_ranked and len(set(values)) > 1:
        best = min(values) if metric.endswith(_LESS) else max(values)
        texts = [
            f"{text} *" if values.get(name) == best else text
            for text, values in zip(texts, scores, strict=True)
        ]
    return texts


def groups(runs: list[dict], headlines: list[str]) -> str | None:
    """The pivot table of the runs by the settings in which they differ, seeds aside; None where
    that says no more than the table of metrics.
    """
    names = [
        name for name in differing(runs) if name != "seed" and any(name in run for run in runs)
    ]
    finished = [run for run in runs if run["status"] == "finished"]
    values = [name for name in metric_names(finished, headlines) if name in headlines]
    if not values or not 1 <= len(names) <= 4 or len(finished) < 3:
        return None
    rows = dict.fromkeys(names)
    return tables.pivot(runs, rows, {}, values[:_PIVOT_VALUES], interval=True, compact=True)


def text(runs: list[dict]) -> str:
    """The comparison for a terminal."""
    runs, records = with_records(runs)
    states, flags, metrics, header = cells(runs, records)
    parts = [aligned([header, *states])]
    if flags:
        parts.append("Settings that differ\n" + aligned([header, *flags]))
    else:
        parts.append("No setting differs.")
    if metrics:
        title = "Metrics of the selected epoch (95 % interval or ± deviation; * best on this data)"
        parts.append(f"{title}\n{aligned([header, *metrics])}")
    pivot = groups(runs, headlines_of(records))
    if pivot:
        title = "Runs that share settings: mean ± half a 95 % interval (number of runs)"
        parts.append(f"{title}\n{pivot}")
    return "\n\n".join(parts)


def text_of(run: Record) -> str:
    """One run for a terminal: how it stands, its metrics, its checks."""
    command = f"python {run.env.get('command', '')}"
    parts = [f"{printable(f'{run.folder}: {run.state}')}\n{printable(command)}"]
    rows = [
        [name, interval_text(run.scores, name), interval_text(run.scores, f"{name}_last_epoch")]
        for name in metric_names([run.scores], list(run.card["headlines"]))
    ]
    if rows:
        parts.append(aligned([["metric", "value", "last epoch"], *rows]))
    if run.check:
        columns = ("status", "item", "value", "threshold", "fix")
        items = [[item[name] for name in columns] for item in run.check["items"]]
        parts.append(aligned([["", *columns[1:]], *items]))
    return "\n\n".join(parts)


def write(runs: list[dict], path: Path) -> Path:
    """Write the page that compares runs; returns its path.

    Raises:
        InputError: it cannot be written.
    """
    runs, records = with_records(runs)
    states, flags, metrics, header = cells(runs, records)
    parts = {"Runs": page.table(states, header)}
    if flags:
        note = page.paragraph("Of the settings that decide the result.")
        parts["Settings that differ"] = note + page.table(flags, header)
    else:
        parts["Settings that differ"] = "<p>None.</p>"
    if metrics:
        note = page.paragraph(
            "Of the selected epoch, on the split that the name says; with the 95 % interval, or ±"
            " the deviation, where the run has one. An asterisk marks the best of runs on the same"
            " data."
        )
        parts["Metrics"] = note + page.table(metrics, header)
    pivot = groups(runs, headlines_of(records))
    if pivot:
        note = page.paragraph(
            "Mean of the runs in a row, half the 95 % interval of that mean over the runs, and how"
            " many they are."
        )
        names, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in pivot.splitlines()
            if line.startswith("|")
        ]
        parts["Runs that share settings"] = note + page.table(rows, names)
    for max_points in (300, 150, 75, 30):
        parts["Curves"] = curves(records, header[1:], max_points)
        head = [f"<h1>{len(runs)} runs compared</h1>"]
        content = page.document("Comparison of runs", head, parts)
        if len(content) <= LIMIT:
            break
    try:
        with atomic_write(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None
    return path


def curves(records: list[Record], names: list[str], max_points: int) -> str:
    """The curves of up to DRAWN runs, a chart for each metric of each stage: measured on held-out
    items where a run has them, else on those of training, as the title says.
    """
    # (metric, stage, split) -> run -> points
    drawn: dict[tuple[str, str, str], dict[str, list]] = {}
    for record, name in zip(records[:DRAWN], names, strict=False):
        for stage, charts_of_stage in record.curves.items():
            for metric, chart in charts_of_stage.items():
                splits = [s for s in ("val", "train", *chart["series"]) if s in chart["series"]]
                if splits and metric in FIRST and metric != "recall":  # whose lines are classes
                    points = chart["series"][splits[0]]
                    drawn.setdefault((metric, stage, splits[0]), {})[name] = points
    figures = []
    for metric, stage, split in sorted(drawn, key=lambda key: FIRST.index(key[0])):
        svg = charts.lines(
            f"{stage}: {metric}",
            drawn[metric, stage, split],
            x_label="optimizer step",
            y_label=label_of(metric),
            most=max_points,
        )
        of_split = "" if split == "last" else f", {split}"
        figures.append(chart_figure(f"{stage}: {title_of(metric)}{of_split}", metric, svg))
    if not figures:
        return ""
    left_out = len(records) - DRAWN
    note = ""
    if left_out > 0:
        note = page.paragraph(f"Of the first {DRAWN} runs; {left_out} more stand in the tables.")
    return f'{note}<div class="charts">{"".join(figures)}</div>'
