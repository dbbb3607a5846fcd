"""How a clustering run went, as its recipe asks: state, trajectory, advice as commands, checklist.

Everything is of this run's own epochs. NMI is shown where there are labels; nothing heeds it.
"""

import math
import shlex

import numpy as np

from common.data import utterances
from common.monitor import LEAST_STABILITY, PATIENCE, WINDOW, Monitor
from common.run import log
from common.run.ending import script_of
from common.run.files import read_config
from common.run.run import Run

LEAST_EPOCHS = 5  # that a line is fitted to
_SCORES = {"stability": "stability of the clusters", "nmi": "NMI, training utterances"}


def analysis(run: Run, monitor: Monitor) -> dict[str, dict]:
    """The tables of the report by title."""
    lines = [line for line in log.read(run.folder) if "cluster/train/threshold" in line]
    series = {
        name: [(line["epoch"], line[f"cluster/train/{name}"]) for line in lines]
        for name in _SCORES
        if lines and all(f"cluster/train/{name}" in line for line in lines)
    }
    findings = utterances.data_problems(run.data.table)
    tables = {"Data": {"header": ["finding", "value"], "rows": list(findings.items())}}
    if run.data.table.labeled:
        tables["Classes"] = _classes(run.data.table)
    tables["State"] = {
        "header": ["figure", "value"],
        "rows": _state(series, monitor),
    }
    tables["Trajectory"] = {
        "header": ["score", "epoch", "expected", "95 % of such epochs lie in"],
        "rows": [row for name, points in series.items() for row in trajectory(name, points)],
        "text": f"A line through the last epochs of this run, at most {WINDOW}, gone on with. It"
        " knows nothing but these epochs: it is no promise, and scores level off.",
    }
    tables["What to try"] = {
        "header": ["", "what", "when", "now", "command"],
        "rows": advice(run, monitor),
    }
    tables["Checklist"] = {
        "header": ["", "what", "rule"],
        "rows": [["x" if holds else "", what, rule] for holds, what, rule in _boxes(run, monitor)],
        "text": "An x says that the rule holds after the last epoch; the last three ask for"
        " attention where it does.",
    }
    return tables


def _classes(table: utterances.Utterances) -> dict:
    counts = table.counts()
    order = np.argsort(-counts, kind="stable")
    rows = [[table.classes[i], int(counts[i]), f"{counts[i] / counts.sum():.1%}"] for i in order]
    return {"header": ["class", "utterances", "share"], "rows": rows}


def _state(series: dict, monitor: Monitor) -> list[list]:
    rows = []
    for name, points in series.items():
        epoch, best = max(points, key=lambda point: point[1])
        rows.append([f"best {_SCORES[name]}", f"{best:.4f}, epoch {epoch} of {points[-1][0]}"])
    figures = monitor.report()
    names = ("performance_trend", "stability_score", "total_improvements", "total_degradations")
    return rows + [[name.replace("_", " "), figures[name]] for name in names if monitor.scores]


def trajectory(name: str, points: list[tuple[int, float]]) -> list[list]:
    """Rows for half as many and twice as many epochs: what a least-squares line through the last
    of the `points` (epoch, score) gives, with the 95 % interval of a single epoch's score.
    """
    x, y = np.array(points[-WINDOW:], float).T
    if len(x) < LEAST_EPOCHS:
        return [[_SCORES[name], "", f"no line: fewer than {LEAST_EPOCHS} epochs", ""]]
    free = len(x) - 2
    slope, start = np.polyfit(x, y, 1)
    noise = math.sqrt(np.square(y - start - slope * x).sum() / free)
    z = 1.959964
    # Student's t by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5).
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    rows = []
    for epoch in (round(1.5 * x[-1]), round(2 * x[-1])):
        off = (epoch - x.mean()) ** 2 / np.square(x - x.mean()).sum()
        reach = t * noise * math.sqrt(1 + 1 / len(x) + off)
        middle = start + slope * epoch
        low, high = max(middle - reach, -1.0), min(middle + reach, 1.0)
        rows.append([_SCORES[name], epoch, f"{min(middle, 1.0):.3f}", f"{low:.3f} to {high:.3f}"])
    return rows


def advice(run: Run, monitor: Monitor) -> list[list]:
    """Rows of what to change where the score stands still, each a command of this run's flags."""
    args = run.args
    lr = run.stages["cluster"].lr
    stalled = monitor.stalled()
    wait = f"no gain for {PATIENCE} epochs"
    kinds = (
        ("A", "lower learning rate", wait, stalled, {"cluster_lr": f"{lr / 2:g}"}),
        (
            "B",
            "fewer rows selected, and more slowly",
            wait,
            stalled,
            {
                "select_share": f"{args.select_share / 2:g}",
                "select_growth": f"{args.select_growth / 2:g}",
            },
        ),
        (
            "C",
            "larger embedding",
            f"{wait}, and halving has not helped",
            stalled and monitor.nothing_helped(),
            {"base_dim": str(2 * args.base_dim)},
        ),
    )
    return [
        [name, what, when, "yes" if due else "no", command(run, flags)]
        for name, what, when, due, flags in kinds
    ]


def command(run: Run, flags: dict[str, str]) -> str:
    """The command of this run with other `flags`, in a directory of its own."""
    config = read_config(run.folder)
    given = vars(run.args)
    changed = {name: given.get(name) for name in config["identity"]}
    words = ["python", script_of(config["card"])]
    for name, value in (changed | {"data": given["data"]} | flags).items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, list) else str(value))
    return shlex.join(words)


def _boxes(run: Run, monitor: Monitor) -> list[tuple[bool, str, str]]:
    values = [line for line in log.read(run.folder) if "cluster/train/threshold" in line][-1]
    figures = monitor.report()
    _, chance = run.chance["cluster"]
    loss = values.get("cluster/train/loss", chance)
    spec = run.model_spec
    band = 2 / min(spec["sup_temperature"], spec["unsup_temperature"])
    trend = figures["performance_trend"]
    gain = monitor.scores[-1] > monitor.scores[0] if monitor.scores else False
    steady = figures["stability_score"]
    waited = figures["epochs_without_gain"]
    return [
        (
            abs(loss - chance) <= band,
            "training goes on normally",
            f"the loss, {loss:.3f}, lies in {chance:.3f} ± {band:.3g}",
        ),
        (
            values["cluster/train/min_samples"] >= values["cluster/train/floor"],
            "every cluster is trained on",
            f"the fewest rows selected of a cluster, {values['cluster/train/min_samples']}, are the"
            f" floor, {values['cluster/train/floor']}, or more",
        ),
        (trend == "improving", "the score improves", f"its trend is {trend}"),
        (gain, "the score has risen", "the last epoch's is above the first one's"),
        (
            steady >= LEAST_STABILITY,
            "the score is steady",
            f"its steadiness, {steady:.3g}, is {LEAST_STABILITY} or more",
        ),
        (waited >= PATIENCE, "no gain", f"{waited} epochs without one, of {PATIENCE}"),
        (
            steady < LEAST_STABILITY,
            "the score jumps",
            f"its steadiness, {steady:.3g}, is below {LEAST_STABILITY}",
        ),
        (trend == "declining", "the score declines", f"its trend is {trend}"),
    ]
