"""From log.jsonl to the curves of a report."""

import math

from common.report.charts import escape
from common.report.charts import lines as lines_chart

ITEMS = {"simclr": "images", "tsm": "clips", "raer": "clips", "cluster": "utterances"}
# Of a metric: the label of its axis, and what it means.
METRICS = {
    "loss": ("loss, nats", "Lower is better; below the dashed line it is better than a guess."),
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", "A sudden rise warns of divergence."),
    "top1": ("contrastive top-1, share", "Views whose partner is the nearest of the whole batch."),
    "top5": (
        "contrastive top-5, share",
        "Views whose partner is among the five nearest of the batch.",
    ),
    "alignment": ("alignment, squared distance", "Of the two views of an image; lower is closer."),
    "uniformity": ("uniformity, nats", "Lower: the images spread more evenly."),
    "knn_accuracy": (
        "kNN accuracy, share",
        "Images whose nearest neighbors by the features have their label.",
    ),
    "effective_rank": (
        "effective rank, directions",
        "How many directions the features use; near 1 is collapse.",
    ),
    "accuracy": ("accuracy, share", "Right answers."),
    "macro_f1": ("macro F1, share", "F1 averaged over the classes, each counting the same."),
    "video_auc": (
        "AUC of videos",
        "Chance that a fake scores above a real video; 0.5 is guessing.",
    ),
    "clip_auc": ("AUC of clips", "As that of videos, for single clips."),
    "threshold": ("threshold", ""),
    "uar": (
        "UAR, share",
        "Recall averaged over the classes, each counting the same; it chooses the epoch.",
    ),
    "war": ("WAR, share", "Right answers among all clips."),
    "recall": ("recall, share", "Of each class: the share of its clips that is found."),
    "stability": (
        "stability",
        "How well clusterings from different seeds agree, 1 at most; it chooses the epoch.",
    ),
    "nmi": (
        "NMI",
        "Agreement of clusters and labels, 1 at most. It is only watched: no label enters the"
        " training.",
    ),
    "silhouette": (
        "silhouette",
        "How much nearer rows are to their own cluster than to the next one, 1 at most.",
    ),
    "selected": (
        "utterances selected",
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
)
FIRST += ("nmi", "effective_rank", "silhouette", "selected", "lr")
SYSTEM = ("rate", "wait", "memory_gb")
ALONE = (*SYSTEM, "lr", "grad_norm")  # not also measured over epochs


def _points(detail: float) -> int:
    return max(int(300 * detail), 20)


def chance_levels(settings: dict) -> dict[str, tuple[str, float]]:
    """The loss that a guess costs in each stage, by name, with its formula: from a run's
    config.json.
    """
    resolved, script = settings["resolved"], settings["resolved"].get("script")
    stages = {
        name: value for name, value in resolved.items() if isinstance(value, dict) and "bs" in value
    }
    found = {}
    if script == "simclr":
        for name, stage in stages.items():
            count = 2 * stage["bs"] - 1 if name == "pretrain" else len(resolved["classes"][name])
            found[name] = (
                "a guess, ln(2N-1)" if name == "pretrain" else f"a guess, ln {count}",
                math.log(count),
            )
    elif script == "tsm" and settings["alpha"] is None and not resolved["pos_weight"]:
        gamma = settings["gamma"] if settings["loss"] == "focal_bce" else 0.0
        found["train"] = ("a guess, p = 1/2", 0.5**gamma * math.log(2))
    elif script == "raer" and settings["method"] != "ldam-drw":
        found["train"] = (
            f"a guess, ln {len(resolved['classes'])}",
            math.log(len(resolved["classes"])),
        )
    elif script == "cluster":
        views = 2 if resolved["views"] == "all" else max(len(resolved["widths"]), 2)
        for name, stage in stages.items():
            found[name] = (
                f"a guess, ln({views} x {stage['bs']} - 1)",
                math.log(views * stage["bs"] - 1),
            )
    return found


def curves_of(lines: list[dict]) -> dict[str, dict[str, dict]]:
    """The curves of a log: stage -> metric -> {"series", "bands", "levels"} with steps as x.

    Values of single steps are the series "batch", those of epochs are named by their split. Stages
    that differ in what stands after an underscore (`linear`, `linear_random`) are drawn together.
    An interval belongs to its metric, recalls of classes to one chart, a majority class's figure is
    a level of the metric.
    """
    found: dict[str, dict[str, dict]] = {}
    for line in lines:
        stage, _, variant = line["stage"].partition("_")
        at = line["step"]
        for name, value in line.items():
            parts = name.split("/")
            if name in (
                "stage",
                "step",
                "epoch",
                "time",
                "eta_s",
                "loss_over_chance",
            ) or isinstance(value, str):
                continue
            split, metric = (
                (parts[1], parts[2])
                if len(parts) == 3
                else ("last" if name in ALONE else "batch", name)
            )
            if split in ("test", "schedule") or metric in ("loss_over_chance", "tau"):
                continue
            if (
                len(parts) == 3 and parts[0] != line["stage"]
            ):  # a baseline's, which stands in a table
                continue
            if split == "monitor":
                split, metric = (
                    ("best so far", "stability")
                    if metric == "best_performance"
                    else ("monitor", metric)
                )
            kind, named = "series", split + f", {variant}" * bool(variant)
            if metric.startswith("recall_"):
                named, metric = metric.removeprefix("recall_"), "recall"
            elif metric.startswith("majority_"):
                kind, named, metric = "levels", "majority class", metric.removeprefix("majority_")
            elif metric.endswith(("_low", "_high")):
                metric, _, kind = metric.rpartition("_")
            chart = found.setdefault(stage, {}).setdefault(
                metric, {"series": {}, "bands": {}, "levels": {}}
            )
            if kind == "levels":
                chart["levels"][named] = value
            elif kind == "series":
                chart["series"].setdefault(named, []).append((at, value))
            else:
                band = chart["bands"].setdefault(named, {}).setdefault(at, [at, None, None])
                band[1 if kind == "low" else 2] = value
    for own in found.values():
        for chart in own.values():
            chart["bands"] = {name: list(band.values()) for name, band in chart["bands"].items()}
    return found


def marks_of(stage: str, lines: list[dict], resumes: list[dict]) -> dict[str, list[float]]:
    """Steps of a stage at which the run was resumed, and at which a phase of its schedule begins."""
    marks = {"resumed": [row["step"] for row in resumes if row["stage"] == stage]}
    marks["a phase begins"] = [
        line["train/schedule/start"] * line["step"] / line["epoch"]
        for line in lines
        if line["stage"] == stage and line.get("train/schedule/start")
    ]
    return {name: steps for name, steps in marks.items() if steps}


def chart_figure(title: str, metric: str, drawn: str) -> str:
    """A chart of a metric under its title and what it means."""
    meaning = METRICS.get(metric, ("", ""))[1]
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {escape(meaning)}</figcaption>{drawn}</figure>"
    )


def title_of(metric: str) -> str:
    """A metric's name in a title: that of its axis, without the unit."""
    return METRICS.get(metric, (metric.replace("_", " "),))[0].split(",")[0]


def charts_of(
    lines: list[dict], settings: dict, resumes=(), detail: float = 1.0, curves: dict | None = None
) -> dict[str, dict[str, str]]:
    """stage -> metric -> SVG of a log's curves, which `curves_of` gives where they are not given."""
    levels, found = chance_levels(settings) if lines else {}, {}
    unit = ITEMS.get(settings["resolved"].get("script"), "items")
    for stage, own in (curves or curves_of(lines)).items():
        marks = marks_of(stage, lines, list(resumes))
        for metric, chart in own.items():
            guess = dict([levels[stage]]) if metric == "loss" and stage in levels else {}
            label = (
                f"{unit} a second"
                if metric == "rate"
                else METRICS.get(metric, (metric.replace("_", " "),))[0]
            )
            drawn = lines_chart(
                f"{stage}: {metric}",
                chart["series"],
                x_label="optimizer step",
                y_label=label,
                levels=chart["levels"] | guess,
                marks=marks,
                bands=chart["bands"],
                most=_points(detail),
            )
            if drawn:
                found.setdefault(stage, {})[metric] = drawn
    return found
