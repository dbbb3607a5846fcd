"""From log.jsonl to the curves of a report."""

import math

from common.report import charts

# Of a metric: the label of its axis, and what it means.
METRICS = {
    "loss": ("loss, nats", "Lower is better."),
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", "A sudden rise warns of divergence."),
    "top1": ("contrastive top-1, share", "Views whose partner is the nearest of the whole batch."),
    "top5": (
        "contrastive top-5, share",
        "Views whose partner is among the five nearest of the batch.",
    ),
    "alignment": ("alignment, squared distance", "Of the two views of an item; lower is closer."),
    "uniformity": ("uniformity, nats", "Lower: the items spread more evenly."),
    "knn_accuracy": (
        "kNN accuracy, share",
        "Items whose nearest neighbors by the features have their label.",
    ),
    "effective_rank": (
        "effective rank, directions",
        "How many directions the features use; near 1 is collapse.",
    ),
    "accuracy": ("accuracy, share", "Right answers."),
    "macro_f1": ("macro F1, share", "F1 averaged over the classes, each counting the same."),
    "video_auc": (
        "AUC of videos",
        "Chance that a positive video scores above a negative one; 0.5 is guessing.",
    ),
    "clip_auc": ("AUC of clips", "As that of videos, for single clips."),
    "threshold": ("threshold", ""),
    "uar": ("UAR, share", "Recall averaged over the classes, each counting the same."),
    "war": ("WAR, share", "Right answers among all items."),
    "recall": ("recall, share", "Of each class: the share of its items that is found."),
    "stability": ("stability", "How well clusterings from different seeds agree, 1 at most."),
    "nmi": ("NMI", "Agreement of clusters and labels, 1 at most."),
    "silhouette": (
        "silhouette",
        "How much nearer rows are to their own cluster than to the next one, 1 at most.",
    ),
    "selected": (
        "items selected",
        "How many of them an epoch trains on with their cluster as the label.",
    ),
    "rate": ("", "Training items processed in a second."),
    "wait": (
        "share of a step's time",
        "Spent waiting for data: near 0 is good; above 0.1 more --workers may help.",
    ),
    "memory_gb": (
        "GB",
        "The most memory held so far: of the GPU by tensors, without one by the process.",
    ),
}
# Shown unfolded, in this order.
FIRST = (
    "loss",
    "top1",
    "knn_accuracy",
    "accuracy",
    "macro_f1",
    "video_auc",
    "uar",
    "war",
    "recall",
    "stability",
    "nmi",
    "effective_rank",
    "silhouette",
    "selected",
    "lr",
)
SYSTEM = ("rate", "wait", "memory_gb")
_STEPS_ONLY = (*SYSTEM, "lr", "grad_norm")  # not also measured over epochs
_ABOVE = 3  # times the loss of a guess: a line up there, as that of raw pixels, may leave the chart
_NO_CURVE = ("loss_over_chance", "tau")
_POSITION = ("stage", "step", "epoch", "time", "eta_s")  # of a line, no metrics


def max_points(detail: float) -> int:
    """How many points of a line are drawn at a share of the full detail."""
    return max(int(300 * detail), 20)


def curves_of(lines: list[dict]) -> dict[str, dict[str, dict]]:
    """The curves of a log: stage -> metric -> {"series", "bands", "levels"} with steps as x.

    Values of single steps are the series "batch", those of epochs are named by their split. Stages
    that differ in what stands after an underscore (`linear`, `linear_random`) are drawn together.
    An interval belongs to its metric, recalls of classes to one chart, a majority class's figure is
    a level of the metric.
    """
    stages: dict[str, dict[str, dict]] = {}
    for line in lines:
        stage = line["stage"].partition("_")[0]
        step = line["step"]
        for key, value in line.items():
            place = _place(key, line["stage"])
            if place is None or not isinstance(value, (int, float, type(None))):
                continue
            metric, kind, name = place
            charts_of_stage = stages.setdefault(stage, {})
            chart = charts_of_stage.setdefault(metric, {"series": {}, "bands": {}, "levels": {}})
            if kind == "series":
                chart["series"].setdefault(name, []).append((step, value))
            elif kind == "level":
                chart["levels"][name] = value
            else:
                band = chart["bands"].setdefault(name, {}).setdefault(step, [step, None, None])
                band[1 if kind == "low" else 2] = value
    for charts_of_stage in stages.values():
        for chart in charts_of_stage.values():
            chart["bands"] = {name: list(band.values()) for name, band in chart["bands"].items()}
    return stages


def _place(key: str, stage: str) -> tuple[str, str, str] | None:
    """Where a value of a log line is drawn: the chart's metric; whether it is a point of a series,
    a level, or the low or high end of an interval; and of which line. None: nowhere.
    """
    if key in _POSITION:
        return None
    parts = key.split("/")
    if len(parts) != 3:
        metric = key
        split = "last" if key in _STEPS_ONLY else "batch"
    elif parts[0] == stage:
        _, split, metric = parts
    else:
        return None  # a baseline's, which stands in a table
    if split in ("test", "cv", "schedule", "start", "warn") or metric in _NO_CURVE:
        return None
    if metric.startswith("recall_"):
        return "recall", "series", metric.removeprefix("recall_")
    if metric.startswith("majority_"):
        return metric.removeprefix("majority_"), "level", "majority class"
    if split == "monitor" and metric == "best_performance":
        split, metric = "best so far", "stability"
    variant = stage.partition("_")[2]
    name = f"{split}, {variant}" if variant else split
    if metric.endswith(("_low", "_high")):
        metric, _, end = metric.rpartition("_")
        return metric, end, name
    return metric, "series", name


def marks_of(stage: str, lines: list[dict], resumes: list[dict]) -> dict[str, list[float]]:
    """Steps of a stage at which the run was resumed or a phase of its schedule begins."""
    resumed = [row["step"] for row in resumes if row["stage"] == stage]
    phases = [
        line["train/schedule/start"] * line["step"] / line["epoch"]
        for line in lines
        if line["stage"] == stage and line.get("train/schedule/start")
    ]
    marks = {"resumed": resumed, "a phase begins": phases}
    return {name: steps for name, steps in marks.items() if steps}


def chart_figure(title: str, metric: str, drawn: str) -> str:
    """A chart of a metric under its title and what it means."""
    meaning = METRICS.get(metric, ("", ""))[1]
    caption = f"<b>{charts.escape(title)}</b> {charts.escape(meaning)}"
    return f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def label_of(metric: str) -> str:
    """A metric's name at its axis, with the unit."""
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ")


def title_of(metric: str) -> str:
    """A metric's name in a title: that of its axis, without the unit."""
    return label_of(metric).split(",")[0]


def charts_of(
    curves: dict[str, dict[str, dict]],
    lines: list[dict],
    resumes: list[dict],
    card: dict,
    detail: float = 1.0,
) -> dict[str, dict[str, str]]:
    """stage -> metric -> SVG of `curves_of` a log's lines, with the words of the script's card."""
    drawings: dict[str, dict[str, str]] = {}
    for stage, charts_of_stage in curves.items():
        marks = marks_of(stage, lines, resumes)
        for metric, chart in charts_of_stage.items():
            levels = chart["levels"]
            ceiling = math.inf
            if metric == "loss" and stage in card["chance"]:
                name, loss = card["chance"][stage]
                levels = {**levels, name: loss}
                ceiling = _ABOVE * loss
            drawn = charts.lines(
                f"{stage}: {metric}",
                chart["series"],
                x_label="optimizer step",
                y_label=f"{card['items']} a second" if metric == "rate" else label_of(metric),
                levels=levels,
                marks=marks,
                bands=chart["bands"],
                most=max_points(detail),
                ceiling=ceiling,
            )
            if drawn:
                drawings.setdefault(stage, {})[metric] = drawn
    return drawings
