"""Runs side by side: `python -m common.report RUN RUN ...` writes one page, with `--text` one text."""

from pathlib import Path

from common.errors import InputError
from common.report import charts, page, tables
from common.report.curves import FIRST, METRICS, SYSTEM, chart_figure, curves_of, title_of
from common.report.record import HEADLINES, LIMIT, Record, interval_text
from common.run import log

DRAWN = 10  # runs whose curves are drawn together; tables hold all of them


def names_of(found: list[dict]) -> list[str]:
    """A short name for each run: its folder's, with as many of those above as tell them apart."""
    paths = [Path(run["run"]).resolve().parts for run in found]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths) and depth < max(map(len, paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def differing(found: list[dict]) -> list[str]:
    """The flags and settings that some of the runs do not share, of those that decide the result.

    Lists and tables, as a schedule, follow from a flag as a rule: they are named where nothing else
    differs.
    """
    names = sorted(tables.differences(found))
    plain = [
        n
        for n in names
        if not any(isinstance(run["identity"].get(n), (list, dict)) for run in found)
    ]
    return plain if set(plain) - {"seed"} else names


def setting(run: dict, name: str) -> str:
    """A setting of a run as text: resolved where the flag was not given."""
    value = run["identity"].get(name)
    if value is None or isinstance(value, dict):
        value = run.get(name) if run.get(name) is not None else "its default"
    return charts.cut(str(value), 480)


def metric_names(found: list[dict]) -> list[str]:
    """The metrics that any run has, test ones first; intervals, deviations and last epochs are
    parts of others.
    """
    names = {
        name
        for run in found
        for name, value in run.items()
        if name.count("/") == 2 and isinstance(value, (int, float))
    }
    parts = ("_low", "_high", "_sd", "_last_epoch")
    names = [
        name
        for name in names
        if not name.endswith(parts) and not any(f"{p}_" in name for p in parts[:3])
    ]
    skipped = ("monitor", "schedule")
    names = [name for name in names if name.split("/")[1] not in skipped]
    order = list(HEADLINES)
    return sorted(
        names,
        key=lambda n: (
            n not in order,
            order.index(n) if n in order else 0,
            n.split("/")[1] != "test",
            n,
        ),
    )


def cells(found: list[dict]) -> tuple[list, list, list, list]:
    """(states, flags, metrics, header): the tables of a comparison, a row for each thing and a
    column for each run.
    """
    header = ["", *names_of(found)]
    records = [Record(Path(run["run"])) for run in found]
    scores = [record.scores for record in records]
    states = [["state", *(record.state for record in records)]]
    flags = [[name, *(setting(run, name) for run in found)] for name in differing(found)]
    metrics = [
        [name, *(interval_text(own, name) for own in scores)] for name in metric_names(scores)
    ]
    return states, flags, metrics, header


def groups(found: list[dict]) -> str | None:
    """The pivot table of the runs by the settings in which they differ, seeds aside; None where
    that says no more than the table of metrics.
    """
    names = [
        name for name in differing(found) if name != "seed" and any(name in run for run in found)
    ]
    finished = [run for run in found if run["status"] == "finished"]
    values = [name for name in metric_names(finished) if name in HEADLINES][:3]
    if not values or not 1 <= len(names) <= 4 or len(finished) < 3:
        return None
    return tables.pivot(found, dict.fromkeys(names), {}, values, interval=True, compact=True)


def text(found: list[dict]) -> str:
    """The comparison for a terminal."""
    states, flags, metrics, header = cells(found)
    parts = [tables.aligned([header, *states])]
    parts.append(
        "Settings that differ\n" + tables.aligned([header, *flags])
        if flags
        else "No setting differs."
    )
    if metrics:
        parts.append(
            "Metrics of the selected epoch (95 % interval or ± deviation where there is one)\n"
        )
        parts[-1] += tables.aligned([header, *metrics])
    pivot = groups(found)
    if pivot:
        parts.append(
            f"Runs that share settings: mean ± half a 95 % interval (number of runs)\n{pivot}"
        )
    return "\n\n".join(parts)


def text_of(run: Record) -> str:
    """One run for a terminal: how it stands, its metrics, its checks."""
    names = metric_names([run.scores])
    rows = [
        [name, interval_text(run.scores, name), interval_text(run.scores, f"{name}_last_epoch")]
        for name in names
    ]
    parts = [f"{run.folder}: {run.state}\npython {run.env.get('command', '')}"]
    if rows:
        parts.append(tables.aligned([["metric", "value", "last epoch"], *rows]))
    if run.check:
        order = ("status", "item", "value", "threshold", "fix")
        parts.append(
            tables.aligned(
                [["", *order[1:]], *([item[name] for name in order] for item in run.check["items"])]
            )
        )
    return "\n\n".join(parts)


def write(found: list[dict], path: Path) -> Path:
    """Write the page that compares runs; returns its path.

    Raises:
        InputError: it cannot be written.
    """

    states, flags, metrics, header = cells(found)
    parts = {"Runs": page.table(states, header)}
    said = '<p class="t">Of the settings that decide the result.</p>'
    parts["Settings that differ"] = said + page.table(flags, header) if flags else "<p>None.</p>"
    if metrics:
        said = (
            "Of the selected epoch, on the split that the name says; with the 95 % interval,"
            " or ± the deviation, where"
        )
        said += " the run has one."
        parts["Metrics"] = f'<p class="t">{said}</p>{page.table(metrics, header)}'
    pivot = groups(found)
    if pivot:
        rows = [
            [c.strip() for c in line.strip("|").split("|")]
            for line in pivot.splitlines()
            if line.startswith("|")
        ]
        said = (
            "Mean of the runs in a row, half the 95 % interval of that mean over the runs, and"
            " how many they are."
        )
        parts["Runs that share settings"] = (
            f'<p class="t">{said}</p>{page.table(rows[2:], rows[0])}'
        )
    for detail in (300, 150, 75, 30):
        parts["Curves"] = curves(found, header[1:], detail)
        html = page.document("Comparison of runs", [f"<h1>{len(found)} runs compared</h1>"], parts)
        if len(html) <= LIMIT:
            break
    try:
        path.write_bytes(html)
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None
    return path


def curves(found: list[dict], names: list[str], most: int) -> str:
    """The curves of up to DRAWN runs, each metric of each stage in one chart."""
    metrics_drawn: dict[tuple[str, str], dict[str, list]] = {}
    for run, name in list(zip(found, names, strict=True))[:DRAWN]:
        file = Path(run["run"])
        lines = log.read(file) if (file / "log.jsonl").exists() else []
        for stage, own in curves_of(lines).items():
            for metric, chart in own.items():
                series = chart["series"]
                best = next((s for s in ("val", "train", *series) if s in series), None)
                if best and metric not in SYSTEM[1:]:
                    metrics_drawn.setdefault((stage, metric), {})[name] = series[best]
    drawn = []
    order = {metric: i for i, metric in enumerate(FIRST)}
    for (stage, metric), series in sorted(
        metrics_drawn.items(), key=lambda c: order.get(c[0][1], len(order))
    ):
        if metric in order:
            label = METRICS.get(metric, (metric.replace("_", " "),))[0]
            svg = charts.lines(
                f"{stage}: {metric}", series, x_label="optimizer step", y_label=label, most=most
            )
            drawn.append(chart_figure(f"{stage}: {title_of(metric)}", metric, svg))
    left = len(found) - DRAWN
    said = (
        f'<p class="t">Of the first {DRAWN} runs; {left} more stand in the tables.</p>'
        if left > 0
        else ""
    )
    return said + f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""
