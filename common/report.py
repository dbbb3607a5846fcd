"""report.html: what a run looks like, in one self-contained file; and the small files that go beside it.

python -m common.report RUN                    writes it again from the run directory's files
python -m common.report RUN --text             the same run as text, on a terminal
python -m common.report RUN RUN [RUN ...]      compare.html: curves together, flags that differ, metrics
python -m common.report DIR --rows backbone,bs --cols proj_dim --value pretrain/train/loss     a table of many runs

The file holds no script and loads nothing. It takes at most LIMIT bytes: where a run has more to show, curves get fewer
points, galleries fewer pictures, and these fewer pixels.
"""

import base64
import csv
import functools
import io
import json
import math
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid, save_image

from common import log, plot
from common.plot import escape

LIMIT = 1_000_000  # bytes of a report
_EVERY = 30.0  # seconds between two reports of a run that goes on
_COST = 50  # times what writing one takes, at least
_WIDEST = 1000  # pixels of a picture
_ABOUT = {
    "simclr": (
        "SimCLR: a network learns to tell that two distorted views of an image belong together, without labels"
        " (pretrain). Its features are then judged by a linear layer (linear) and by training on (finetune)."
    ),
    "tsm": "Is a face video real or manipulated? MobileNetV4 whose blocks exchange channels between frames (TSM).",
    "raer": (
        "Which academic emotion does a clip show? CLIP on the face and on the scene around it; a schedule in three"
        " stages helps the classes of few clips."
    ),
    "cluster": (
        "Groups of utterances found without labels: modalities are fused by contrastive learning (pretrain), then"
        " clustered, and the clusters sharpened (cluster). Labels, where there are any, only score the result."
    ),
}
_ITEMS = {"simclr": "images", "tsm": "clips", "raer": "clips", "cluster": "utterances"}
_BASELINES = (
    "linear_random, linear_pixels: the linear protocol on a backbone of random weights and on raw pixels, which learned"
    " features should beat. majority: always the most frequent class."
)
_CAPTIONS = {"views": "What enters the network: eight images, view a above view b. You should recognise each pair."}
# Of a metric: the label of its axis, and what it means.
_METRICS = {
    "loss": ("loss, nats", "Lower is better; below the dashed line it is better than a guess."),
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", "A sudden rise warns of divergence."),
    "top1": ("contrastive top-1, share", "Views whose partner is the nearest of the whole batch."),
    "top5": ("contrastive top-5, share", "Views whose partner is among the five nearest of the batch."),
    "alignment": ("alignment, squared distance", "Of the two views of an image; lower is closer."),
    "uniformity": ("uniformity, nats", "Lower: the images spread more evenly."),
    "knn_accuracy": ("kNN accuracy, share", "Images whose nearest neighbours by the features have their label."),
    "effective_rank": ("effective rank, directions", "How many directions the features use; near 1 is collapse."),
    "accuracy": ("accuracy, share", "Right answers."),
    "macro_f1": ("macro F1, share", "F1 averaged over the classes, each counting the same."),
    "video_auc": ("AUC of videos", "Chance that a fake scores above a real video; 0.5 is guessing."),
    "clip_auc": ("AUC of clips", "As that of videos, for single clips."),
    "threshold": ("threshold", ""),
    "uar": ("UAR, share", "Recall averaged over the classes, each counting the same; it chooses the epoch."),
    "war": ("WAR, share", "Right answers among all clips."),
    "recall": ("recall, share", "Of each class: the share of its clips that is found."),
    "stability": ("stability", "How well clusterings from different seeds agree, 1 at most; it chooses the epoch."),
    "nmi": ("NMI", "Agreement of clusters and labels, 1 at most. It is only watched: no label enters the training."),
    "silhouette": ("silhouette", "How much nearer rows are to their own cluster than to the next one, 1 at most."),
    "selected": ("utterances selected", "How many of them an epoch trains on with their cluster as the label."),
    "rate": ("", "Training items processed in a second."),
    "wait": ("share of a step's time", "Spent waiting for data: near 0 is good; above 0.1 more --workers may help."),
    "memory_gb": ("GB", "The most memory held so far: of the GPU by tensors, without one by the process."),
}
_FIRST = ("loss", "top1", "knn_accuracy", "accuracy", "macro_f1", "video_auc", "uar", "war", "recall", "stability")
_FIRST += ("nmi", "effective_rank", "silhouette", "selected", "lr")
_SYSTEM = ("rate", "wait", "memory_gb")
_ALONE = (*_SYSTEM, "lr", "grad_norm")  # not also measured over epochs
_HEADLINES = {
    "finetune/test/accuracy": "accuracy on the test split, fine-tuned",
    "linear/test/accuracy": "accuracy on the test split, linear layer on frozen features",
    "pretrain/test/knn_accuracy": "kNN accuracy on the test split",
    "train/test/video_auc": "AUC of the test videos",
    "train/test/video_accuracy": "accuracy on the test videos",
    "train/test/uar": "UAR on the test clips",
    "train/test/war": "WAR on the test clips",
    "cluster/test/nmi": "NMI with the test labels",
    "cluster/test/acc": "accuracy of the clusters, matched to labels",
    "cluster/train/stability": "stability of the clusters, last epoch",
    "pretrain/train/loss_over_chance": "contrastive loss over its chance level",
}
# The order of the findings; others follow.
_ORDER = ("methods", "roc", "confusion", "recall", "features", "neighbours", "scatter", "watched", "errors")
_STYLE = (
    plot.STYLE
    + """
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:1340px;margin:0 auto;padding:.8rem}h1{font-size:1.4rem;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .4rem;border-bottom:1px solid var(--rule)}h3{font-size:1rem;margin:1.2rem 0 .3rem}
h4{font-size:.9rem;margin:.8rem 0 .2rem;overflow-wrap:anywhere}p{margin:.3rem 0;max-width:80ch}.t{color:var(--faint)}
nav{margin:.6rem 0}nav a{margin-right:1rem;display:inline-block}a{color:var(--s0)}
table{border-collapse:collapse;margin:.4rem 0;font-size:.9rem}
td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top}
th{color:var(--faint);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td{white-space:nowrap}td.w,table.f td{white-space:normal}
td.w{overflow-wrap:anywhere;min-width:12rem}code{overflow-wrap:anywhere;font-size:.9em}.wide{overflow-x:auto}
table.f td{overflow-wrap:anywhere}table.f td:first-child{overflow-wrap:normal;color:var(--faint)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:1rem}
.charts figcaption{min-height:2.6em}.one{max-width:440px}.one img{width:100%}
figure{margin:0}figcaption{font-size:.85rem;color:var(--faint);overflow-wrap:anywhere}
.charts figcaption b,.one figcaption b{color:var(--ink)}svg{width:100%;height:auto;display:block}
img{max-width:100%;height:auto}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;margin:.8rem 0}
.tile{border:1px solid var(--rule);border-radius:6px;padding:.4rem .8rem;max-width:17rem}
.tile b{font-size:1.4rem;display:block}.tile span{font-size:.82rem;color:var(--faint);display:block}
.cards{display:flex;flex-wrap:wrap;gap:.6rem}.cards.k{display:grid;gap:.3rem;max-width:calc(var(--k)*104px);
grid-template-columns:repeat(var(--k),minmax(0,1fr))}.card{max-width:288px}
.card img{display:block;height:96px;max-width:100%;width:auto;border:2px solid transparent;object-fit:contain}
.k .card img{height:auto;width:100%}
.card figcaption{font-size:.78rem;line-height:1.3;max-width:288px}.k figcaption{font-size:.7rem;text-align:center}
.card.good img{border:2px solid var(--s2)}.card.bad img{border:2px dashed var(--s1)}
.b{display:block;height:26px;position:relative}.b i{position:absolute;bottom:0;left:20%;width:60%;background:var(--s0);
height:calc(var(--v)*100%)}
td.h{background:color-mix(in srgb,var(--s0) calc(var(--v)*60%),transparent);text-align:right;padding:.2rem .5rem;
font-variant-numeric:tabular-nums}th.up{writing-mode:vertical-rl;transform:rotate(180deg);padding:.3rem .2rem;
vertical-align:bottom;max-height:12rem}
.texts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:.7rem}
.texts div{border:1px solid var(--rule);border-radius:6px;padding:.5rem .7rem;overflow-wrap:anywhere;font-size:.88rem}
.texts span{color:var(--faint)}
.verdict{font-weight:700}.PASS{color:var(--s2)}.FAIL{color:var(--s1)}.WARN{color:var(--s3)}.SKIP{color:var(--faint)}
.found{display:flex;flex-wrap:wrap;column-gap:2.5rem}.found section{flex:1 1 100%;min-width:0}
.found section.half{flex:0 1 440px}
@media(max-width:600px){.card img{height:72px}.card,.card figcaption{max-width:172px}
.cards.named{grid-template-columns:repeat(4,minmax(0,1fr))}
.stack tr:first-child{display:none}.stack tr{display:block;padding:.3rem 0;border-bottom:1px solid var(--rule)}
.stack td{display:inline;white-space:normal;padding-right:.5rem}
.stack td:nth-child(4):not(:empty)::before{content:"passes: ";color:var(--faint)}}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--s0)}
"""
)


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images (n, 3, h, w) in [0, 1] as a PNG grid of so many columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(images.detach().float().cpu().clamp(0, 1), nrow=columns, padding=2, pad_value=1.0)
    scale = max(1, 96 // images.shape[-1])  # small images are enlarged in whole pixels
    save_image(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2), path)


def write_predictions(path: Path, ids: list[str], classes: list[str], scores: Tensor, chosen=None) -> None:
    """Write predictions.csv: id, the class, and the score (a probability) of every class.

    `chosen` are the classes' numbers; unset: the classes of the highest scores.
    """
    best = scores.argmax(1).tolist() if chosen is None else chosen
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "class", *(f"score_{name}" for name in classes)])
        for name, index, row in zip(ids, best, scores.tolist(), strict=True):
            writer.writerow([name, classes[index], *(f"{value:.6f}" for value in row)])


class Live:
    """Rewrites the report of a run that goes on, at most every 30 seconds and for at most a fiftieth of its time."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say, self.due = folder, say, 0.0

    def __call__(self) -> None:
        begun = time.monotonic()
        if begun < self.due:
            return
        try:
            write(self.folder, "running")
        except OSError as error:  # a full disk: the run itself may yet go on
            self.say(f"{self.folder / 'report.html'} cannot be written: {error.strerror}; the run goes on without it")
            self.due = math.inf
            return
        now = time.monotonic()
        self.due = now + max(_EVERY, _COST * (now - begun))


def table(rows: list, header=(), form: str = "") -> str:
    """Rows of cells as an HTML table; floats are shown with four decimals, those below 0.001 with three digits."""

    def cell(value, tag="td"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            long = ' class="w"' if tag == "td" and len(str(value)) > 40 else ""
            return f"<{tag}{long}>{escape(value)}</{tag}>"
        small = isinstance(value, float) and 0 < abs(value) < 1e-3  # a learning rate
        shown = f"{value:.3g}" if small else f"{value:.4f}" if isinstance(value, float) else value
        return f'<td class="n">{shown}</td>'

    numeric = [isinstance(value, (int, float)) for value in rows[0]] if rows else []
    heads = [
        f'<th class="n">{escape(h)}</th>' if n else f"<th>{escape(h)}</th>"
        for h, n in zip(header, numeric, strict=False)
    ]
    head = f"<tr>{''.join(heads)}</tr>" if header else ""
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table{form}>{head}{body}</table></div>'


def matrix(corner: str, columns: list[str], rows: list) -> str:
    """Counts as a table whose cells are the darker, the larger their share of the row; a row begins with its name."""
    up = ' class="up"' if len(columns) > 4 else ""
    out = [f"<tr><th>{escape(corner)}</th>{''.join(f'<th{up}>{escape(c)}</th>' for c in columns)}</tr>"]
    for name, *counts in rows:
        total = max(sum(c for c in counts if isinstance(c, (int, float))), 1)
        cells = [
            f'<td class="h" style="--v:{c / total:.2f}">{c}</td>'
            if isinstance(c, (int, float))
            else f"<td>{escape(c)}</td>"
            for c in counts
        ]
        out.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(out)}</table></div>'


def gallery(rows: list[dict], columns: int | None = None) -> str:
    """Rows of pictures with lines of text below; `columns` are then of one width, else pictures wrap."""
    out = []
    for row in rows:
        most = max((card.get("share", 0) for card in row["cards"]), default=0)
        cards = []
        for card in row["cards"]:
            bar = f'<span class="b"><i style="--v:{card["share"] / most:.2f}"></i></span>' if most else ""
            said = "<br/>".join(escape(line) for line in card["lines"])
            alt = escape(", ".join(card["lines"]))
            image = f'<img alt="{alt}" src="{escape(card["image"])}"/>'
            tone = escape(card.get("tone", ""))
            cards.append(f'<figure class="card {tone}">{image}{bar}<figcaption>{said}</figcaption></figure>')
        named = " named" * any(len(line) > 6 for card in row["cards"] for line in card["lines"])
        form = f' k{named}" style="--k:{columns}' if columns else ""
        out.append(f"<h4>{escape(row['title'])}</h4>" if row["title"] else "")
        out.append(f'<div class="cards{form}">{"".join(cards)}</div>')
    return "".join(out)


def text_cards(header: list[str], rows: list) -> str:
    """Rows of a table as cards: the first cell is the title, of the others each has its name."""
    out = []
    for first, *rest in rows:
        named = [(h, escape(v).replace(" | ", "<br/>· ")) for h, v in zip(header[1:], rest, strict=True) if v != ""]
        lines = [f"<span>{escape(h)}:</span> {'<br/>· ' * ('<br/>' in v)}{v}" for h, v in named]
        out.append(f"<div><b>{escape(header[0])} {escape(first)}</b><br/>{'<br/>'.join(lines)}</div>")
    return f'<div class="texts">{"".join(out)}</div>'


def finding(found: dict, detail: float) -> str:
    """What figures/NAME.json holds (`common.findings`), drawn."""
    kind, title = found["kind"], found["title"]
    if kind == "gallery":
        rows, columns = found["rows"], found.get("columns")
        if detail == 0:
            return "<p>Left out: this page would become too large.</p>"
        if columns:
            return gallery(rows[: math.ceil(detail * len(rows))], columns)
        return gallery([row | {"cards": row["cards"][: math.ceil(detail * len(row["cards"]))]} for row in rows])
    if kind == "matrix":
        return matrix(found["corner"], found["columns"], found["rows"])
    if kind == "table":
        return table(found["rows"], found["header"])
    if kind == "bars":
        return f'<div class="one">{plot.bars(title, found["rows"], label=found["label"], levels=found["levels"])}</div>'
    labels = dict(x_label=found["x_label"], y_label=found["y_label"])
    if kind == "scatter":
        step = math.ceil(1 / max(detail, 0.05))
        points, groups = found["points"][::step], found["groups"][::step]
        drawn = plot.scatter(title, points, groups, found["names"], labels=found.get("labels", False), **labels)
        return f'<div class="one">{drawn}</div>'
    more = {name: found[name] for name in ("bands", "diagonal", "frame", "values") if name in found}
    return f'<div class="one">{plot.lines(title, found["series"], **labels, **more, most=_points(detail))}</div>'


def _points(detail: float) -> int:
    return max(int(300 * detail), 20)


def chance_levels(settings: dict) -> dict[str, tuple[str, float]]:
    """The loss that a guess costs in each stage, by name, with its formula: from a run's config.json."""
    resolved, script = settings["resolved"], settings["resolved"].get("script")
    stages = {name: value for name, value in resolved.items() if isinstance(value, dict) and "bs" in value}
    found = {}
    if script == "simclr":
        for name, stage in stages.items():
            count = 2 * stage["bs"] - 1 if name == "pretrain" else len(resolved["classes"][name])
            found[name] = ("a guess, ln(2N-1)" if name == "pretrain" else f"a guess, ln {count}", math.log(count))
    elif script == "tsm" and settings["alpha"] is None and not resolved["pos_weight"]:
        gamma = settings["gamma"] if settings["loss"] == "focal_bce" else 0.0
        found["train"] = ("a guess, p = 1/2", 0.5**gamma * math.log(2))
    elif script == "raer" and settings["method"] != "ldam-drw":
        found["train"] = (f"a guess, ln {len(resolved['classes'])}", math.log(len(resolved["classes"])))
    elif script == "cluster":
        views = 2 if resolved["views"] == "all" else max(len(resolved["widths"]), 2)
        for name, stage in stages.items():
            found[name] = (f"a guess, ln({views} x {stage['bs']} - 1)", math.log(views * stage["bs"] - 1))
    return found


def curves_of(lines: list[dict]) -> dict[str, dict[str, dict]]:
    """The curves of a log: stage -> metric -> {"series", "bands", "levels"} with steps as x.

    Values of single steps are the series "batch", those of epochs are named by their split. Stages that differ in what
    stands after an underscore (`linear`, `linear_random`) are drawn together. An interval belongs to its metric,
    recalls of classes to one chart, a majority class's figure is a level of the metric.
    """
    found: dict[str, dict[str, dict]] = {}
    for line in lines:
        stage, _, variant = line["stage"].partition("_")
        at = line["step"]
        for name, value in line.items():
            parts = name.split("/")
            if name in ("stage", "step", "epoch", "time", "eta_s", "loss/chance") or isinstance(value, str):
                continue
            split, metric = (parts[1], parts[2]) if len(parts) == 3 else ("last" if name in _ALONE else "batch", name)
            if split in ("test", "schedule") or metric in ("loss_over_chance", "tau"):
                continue
            if len(parts) == 3 and parts[0] != line["stage"]:  # a baseline's, which stands in a table
                continue
            if split == "monitor":
                split, metric = ("best so far", "stability") if metric == "best_performance" else ("monitor", metric)
            kind, named = "series", split + f", {variant}" * bool(variant)
            if metric.startswith("recall_"):
                named, metric = metric.removeprefix("recall_"), "recall"
            elif metric.startswith("majority_"):
                kind, named, metric = "levels", "majority class", metric.removeprefix("majority_")
            elif metric.endswith(("_low", "_high")):
                metric, _, kind = metric.rpartition("_")
            chart = found.setdefault(stage, {}).setdefault(metric, {"series": {}, "bands": {}, "levels": {}})
            if kind == "levels":
                chart["levels"][named] = value
            elif kind == "series":
                chart["series"].setdefault(named, []).append((at, value))
            else:
                band = chart["bands"].setdefault(named, {}).setdefault(at, [at, None, None])
                band[1 if kind == "low" else 2] = value
    for charts in found.values():
        for chart in charts.values():
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
    meaning = _METRICS.get(metric, ("", ""))[1]
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(meaning)}</figcaption>{drawn}</figure>"


def title_of(metric: str) -> str:
    """A metric's name for people: that of its axis, without the unit."""
    return _METRICS.get(metric, (metric.replace("_", " "),))[0].split(",")[0]


def charts_of(
    lines: list[dict], settings: dict, resumes=(), detail: float = 1.0, curves: dict | None = None
) -> dict[str, dict[str, str]]:
    """stage -> metric -> SVG of a log's curves, which `curves_of` gives where they are not given."""
    levels, found = chance_levels(settings) if lines else {}, {}
    unit = _ITEMS.get(settings["resolved"].get("script"), "items")
    for stage, charts in (curves or curves_of(lines)).items():
        marks = marks_of(stage, lines, list(resumes))
        for metric, chart in charts.items():
            guess = dict([levels[stage]]) if metric == "loss" and stage in levels else {}
            label = f"{unit} a second" if metric == "rate" else _METRICS.get(metric, (metric.replace("_", " "),))[0]
            drawn = plot.lines(
                f"{stage}: {metric}",
                chart["series"],
                x_label="optimiser step",
                y_label=label,
                levels=chart["levels"] | guess,
                marks=marks,
                bands=chart["bands"],
                most=_points(detail),
            )
            if drawn:
                found.setdefault(stage, {})[metric] = drawn
    return found


def embedded(path: Path, detail: float) -> str:
    """A picture's file as a data: address: SVG as it is, others as PNG or JPEG, what is smaller, at most 1000 pixels
    wide at full detail."""
    if path.suffix == ".svg":
        return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
    with Image.open(path) as image:
        image = image.convert("RGB")
        widest = max(int(_WIDEST * min(detail, 1.0)), 100)
        size = (widest, max(1, round(image.height * widest / image.width)))
        whole = image if image.width <= widest else image.resize(size, Image.Resampling.BILINEAR)
        forms = {"png": io.BytesIO(), "jpeg": io.BytesIO()}
        whole.save(forms["png"], "PNG", optimize=True)
        whole.save(forms["jpeg"], "JPEG", quality=82 if detail >= 1 else 60)
    kind, best = min(forms.items(), key=lambda form: form[1].tell())
    return f"data:image/{kind};base64,{base64.b64encode(best.getvalue()).decode()}"


def interval_text(scores: dict, name: str) -> str:
    """A metric with its interval or deviation where the run has one: `0.59 (0.54 to 0.63)`, `0.25 ± 0.01`."""
    value = scores.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "-" if value is None else str(value)
    stem, last = (name.removesuffix("_last_epoch"), "_last_epoch") if name.endswith("_last_epoch") else (name, "")
    low, high, spread = (scores.get(f"{stem}_{end}{last}") for end in ("low", "high", "sd"))
    if low is not None and high is not None:
        return f"{value:.4f} ({low:.4f} to {high:.4f})"
    return (
        f"{value:.4f} ± {spread:.4f}"
        if spread is not None
        else f"{value:.4f}"
        if isinstance(value, float)
        else str(value)
    )


def state_text(status: str, lines: list[dict], settings: dict, seconds: float | None) -> str:
    """How a run stands, in one sentence: finished, or where it is and how long its stage still takes."""
    if status == "finished":
        return f"finished after {log.duration(seconds)}"
    where = ""
    if lines:
        last = lines[-1]
        stage = settings["resolved"].get(last["stage"].split("_")[0])
        planned = f" of {stage['epochs']}" if isinstance(stage, dict) else ""
        where = f" in {last['stage']}, step {last['step']}, epoch {last['epoch']}{planned}"
        where += f", after {log.duration(last['time'])}"
        eta = next((line["eta_s"] for line in reversed(lines) if "eta_s" in line), None)
        if status in ("running", "not ended") and eta is not None:
            where += f"; this stage takes about {log.duration(eta)} more"
    if status == "not ended":
        return f"running or killed{where}"
    return f"{status}{where}"


class Record:
    """The files of a run directory, as far as they are there.

    Attributes:
        settings: config.json; env: env.json; summary: summary.json, None before the run has ended.
        lines, resumes: of log.jsonl and resumes.jsonl; check: check.json.
        scores: the summary's metrics, or of a run that goes on the last value of each in the log.
        status: `finished`, `stopped`, ..., `running`, or `not ended` where nobody says.
    """

    def __init__(self, folder: Path, status: str | None = None):
        from common.run import read_json  # which imports this module

        self.folder = Path(folder)
        self.settings, self.env, self.summary, self.check = (
            read_json(self.folder / f"{name}.json") for name in ("config", "env", "summary", "check")
        )
        if self.settings is None:  # --check was there before any run
            self.settings = {"resolved": {"script": self.check["script"]}}
            self.env, status = {"command": self.check["command"]}, "checked, not trained"
        self.env = self.env or {}
        self.lines, self.resumes = (
            log.read(self.folder, name) if (self.folder / name).exists() else [] for name in ("log.jsonl", log.RESUMES)
        )
        ended = self.summary if status is None else None
        self.status = status or (ended["status"] if ended else "not ended")
        self.scores = {name: value for line in self.lines for name, value in line.items() if name.count("/") == 2}
        if ended:
            self.scores = {name: value for name, value in ended.items() if "/" in name}
        self.seconds = ended["seconds"] if ended else None

    @functools.cached_property
    def curves(self) -> dict[str, dict[str, dict]]:
        return curves_of(self.lines)

    def charts(self, detail: float) -> dict[str, dict[str, str]]:
        return charts_of(self.lines, self.settings, self.resumes, detail, self.curves)

    @property
    def state(self) -> str:
        return state_text(self.status, self.lines, self.settings, self.seconds)


def write(folder: Path, status: str | None = None) -> Path:
    """Write report.html of a run directory, never seen half written; returns its path.

    `status` is that of a run that goes on; unset: summary.json says how it ended, and the curves are written as files
    to figures/ too. A directory that holds but check.json gets a report of that.
    """
    run = Record(folder, status)
    for detail in (1.0, 0.4, 0.15, 0.05, 0.0):
        page = page_of(run, detail)
        if len(page) <= LIMIT:
            break
    path = run.folder / "report.html"
    temporary = path.with_name(".report.html.tmp")
    temporary.write_bytes(page)
    temporary.replace(path)
    if status is None:
        figures = run.folder / "figures"
        figures.mkdir(exist_ok=True)
        for stage, charts in run.charts(1.0).items():
            for metric, drawn in charts.items():
                (figures / f"{stage}_{metric}.svg").write_text(plot.standalone(drawn))
    return path


def page_of(run: Record, detail: float) -> bytes:
    """The report as bytes; `detail` is the share of points and pixels that is shown."""
    script = run.settings["resolved"].get("script")
    charts = run.charts(detail)
    made = (results_part(run), check_part(run, detail), curves_part(charts), findings_part(run, detail))
    parts = {title: body for title, body in (*made, system_part(charts)) if body}
    everything = [
        (
            "All metrics",
            sorted((name, value) for name, value in (run.summary or run.scores).items() if value is not None),
        ),
        ("Flags", sorted((k, v) for k, v in run.settings.items() if k not in ("resolved", "identity"))),
        ("Resolved settings", list(run.settings["resolved"].items())),
        ("Environment", list(run.env.items())),
    ]
    parts["Everything else"] = "".join(
        f"<details><summary>{title} ({len(rows)})</summary>{table(rows)}</details>"
        for title, rows in everything
        if rows
    )
    body = [
        f"<h1>{escape(run.folder.resolve().name)}</h1>",
        f'<p class="t">{escape(_ABOUT.get(script, ""))}</p>' if script in _ABOUT else "",
        tiles(run),
        facts(run),
    ]
    return document(run.folder.resolve().name, body, parts)


def document(title: str, head: list[str], parts: dict[str, str]) -> bytes:
    """A page that is well-formed XML too, and may neither run a script nor load anything."""
    links = "".join(f'<a href="#p{i}">{escape(name)}</a>' for i, name in enumerate(parts))
    body = "".join(f'<h2 id="p{i}">{escape(name)}</h2>{text}' for i, (name, text) in enumerate(parts.items()))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(head)}<nav>{links}</nav>{body}</body></html>\n"
    )
    return page.encode("utf-8", "replace")


def tiles(run: Record) -> str:
    """The few figures that matter most, large."""
    names = [name for name in _HEADLINES if isinstance(run.scores.get(name), (int, float))][:4]
    out = []
    for name in names:
        value, _, rest = interval_text(run.scores, name).partition(" ")
        more = [rest] if rest else []
        stage, split, metric = name.split("/")
        for other in (f"majority/{split}/{metric}", f"{stage}/{split}/majority_{metric}"):
            if isinstance(run.scores.get(other), (int, float)):
                more.append(f"majority class {run.scores[other]:.4f}")
        out.append(f'<div class="tile"><b>{value}</b><span>{escape(_HEADLINES[name])}</span>')
        out.append("".join(f"<span>{escape(text)}</span>" for text in more) + "</div>")
    return f'<div class="tiles">{"".join(out)}</div>' if out else ""


def facts(run: Record) -> str:
    """What was run, on what, and how it stands."""
    env = run.env
    device = (
        env.get("gpu") if env.get("gpu") and "cpu" not in env.get("device", "") else f"CPU, {env.get('cpus')} cores"
    )
    many = f", {env['processes']} processes" if env.get("processes", 1) > 1 else ""
    commit = (env.get("commit") or "unknown")[:12] + ", with uncommitted changes" * bool(env.get("uncommitted_changes"))
    threads = f"{env.get('threads')} thread{'s' * (env.get('threads') != 1)}"
    rows = [("state", run.state), ("command", f"python {env.get('command', '')}")]
    if "torch" in env:
        rows += [
            ("data", env.get("data_read", run.settings.get("data"))),
            ("hardware", f"{device}{many}, {threads}"),
            ("software", f"Python {env.get('python')}, torch {env['torch']}; commit {commit}"),
        ]
    rows += [
        ("folder", str(run.folder.resolve())),
        ("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
    ]
    if run.summary and run.summary.get("best_epoch") and run.status != "running":
        rows.insert(1, ("selected", f"epoch {run.summary['best_epoch']}: {run.summary.get('best_model_path')}"))
    return table(rows, form=' class="f"')


def results_part(run: Record) -> tuple[str, str]:
    """The test metrics: of stages side by side, with intervals, and the last epoch's beside the selected one's."""
    scores, body = run.scores, []
    columns = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
    tests = list(dict.fromkeys(name.split("/")[0] for name in scores if name.endswith("/test/accuracy")))
    if tests:
        rows = [(name, *(scores.get(f"{name}/test/{column}", "") for column in columns)) for name in tests]
        body += [table(rows, ("stage", *columns)), f'<p class="t">{escape(_BASELINES)}</p>']
    names = [n for n in ("uar", "war") if f"train/test/{n}" in scores]
    if names:
        rows = [
            (n.upper(), *(interval_text(scores, f"train/test/{n}{last}") for last in ("", "_last_epoch")),
             interval_text(scores, f"train/test/majority_{n}"))
            for n in names
        ]  # fmt: skip
        body.append(table(rows, ("", "selected epoch (95 % interval)", "last epoch", "majority class")))
    body += detection_section(scores) + loss_section(scores, run.settings)
    return "Results", "".join(body + own_tables(run.folder, "results"))


def own_tables(folder: Path, part: str) -> list[str]:
    """A script's own tables for a part of the report: tables.json, title -> {"header", "rows"}, and where they differ
    from a plain one in the last part, "text" for people, "as" `cards` or `matrix`, "part" `results`.
    """
    file, out = folder / "tables.json", []
    for title, found in json.loads(file.read_text()).items() if file.exists() else ():
        if found.get("part", "findings") == part:
            draw = {"cards": text_cards, "matrix": lambda h, r: matrix(h[0], h[1:], r)}
            drawn = draw.get(found.get("as"), lambda h, r: table(r, h))(found["header"], found["rows"])
            said = f'<p class="t">{escape(found["text"])}</p>' if found.get("text") else ""
            out.append(f"<h3>{escape(title)}</h3>{said}{drawn}")
    return out


def detection_section(scores: dict) -> list[str]:
    """Test metrics of a detector on videos, those of the selected epoch and those of the last one."""
    rows = []
    for last, name in (("", "selected epoch"), ("_last_epoch", "last epoch")):
        if f"train/test/video_auc{last}" in scores:
            found = (scores[f"train/test/video_{c}{last}"] for c in ("auc", "ap", "eer", "accuracy"))
            rows.append((name, *found, scores[f"train/test/clip_auc{last}"]))
    return [table(rows, ("test videos", "AUC", "AP", "EER", "accuracy", "AUC of clips"))] if rows else []


def loss_section(scores: dict, settings: dict) -> list[str]:
    """NT-Xent in both conventions, beside its chance level: losses of different batch sizes are not comparable."""
    loss, chance = scores.get("pretrain/train/loss"), scores.get("pretrain/train/loss_at_chance")
    if loss is None or chance is None:
        return []
    rows = [
        ("averaged over the 2N rows (this project's, lightly's)", loss, chance, loss / chance),
        ("the two views' averages summed (google-research/simclr's)", 2 * loss, 2 * chance, loss / chance),
    ]
    batch = settings["resolved"]["pretrain"]["bs"]
    return [
        "<h3>Contrastive loss (NT-Xent)</h3>",
        table(rows, ("convention", "last epoch's mean", "chance level", "ratio")),
        f'<p class="t">Batch {batch}: a guess among 2N-1 = {2 * batch - 1} candidates costs ln({2 * batch - 1}) ='
        f" {chance:.4f}. Compare the ratio, not the loss, between batch sizes.</p>",
    ]


def check_part(run: Record, detail: float) -> tuple[str, str]:
    """The verdicts of --check, with what each one showed."""
    title = "Checks of the training recipe"
    if not run.check:
        return title, ""
    items = run.check["items"]
    counts = [f"{sum(i['verdict'] == v for i in items)} {v}" for v in ("FAIL", "WARN", "PASS", "SKIP")]
    rows, shown = [], []
    for item in items:
        verdict = item["verdict"]
        cells = [escape(item[name]) for name in ("item", "value", "threshold", "fix")]
        rows.append(f'<tr><td class="verdict {escape(verdict)}">{escape(verdict)}</td>')
        rows.append("".join(f'<td class="w">{c}</td>' if len(c) > 40 else f"<td>{c}</td>" for c in cells) + "</tr>")
        body = [table(item["rows"][1:41], item["rows"][0])] if item.get("rows") else []
        for name in item.get("pictures") or []:
            if (run.folder / name).exists():
                form = ' class="one"' * name.endswith(".svg")
                image = f'<img alt="{escape(name)}" src="{embedded(run.folder / name, detail)}"/>'
                body.append(f"<figure{form}>{image}</figure>")
        if body:
            shown.append(f"<h4>{escape(item['item'])}</h4>{''.join(body)}")
    head = "".join(f"<th>{name}</th>" for name in ("", "item", "value", "threshold", "what to do"))
    more = f"<details><summary>What they show</summary>{''.join(shown)}</details>" if shown else ""
    said = f"{', '.join(counts)}, in {log.duration(run.check['seconds'])}. Command: {run.check['command']}"
    items = f'<div class="wide"><table class="stack"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return title, f'<p class="t">{escape(said)}</p>{items}{more}'


def curves_part(stages: dict[str, dict[str, str]]) -> tuple[str, str]:
    """Curves of every stage, the most telling first; the others are folded away."""
    body = []
    for stage, charts in stages.items():
        order = sorted(charts, key=lambda m: _FIRST.index(m) if m in _FIRST else len(_FIRST))
        drawn = {m: chart_figure(title_of(m), m, charts[m]) for m in order if m not in _SYSTEM}
        first = [d for m, d in drawn.items() if m in _FIRST]
        rest = [d for m, d in drawn.items() if m not in _FIRST]
        body.append(f'<h3>Stage {escape(stage)}</h3><div class="charts">{"".join(first)}</div>')
        if rest:
            body.append(
                f'<details><summary>{len(rest)} more</summary><div class="charts">{"".join(rest)}</div></details>'
            )
    said = (
        '<p class="t">The figure in a legend is the last value. batch: the loss of single steps; train: the mean of an'
    )
    said += " epoch; val (or dev): items held out from training. Dotted vertical lines: the run was resumed there, or a"
    said += " phase of its schedule begins.</p>"
    return "Curves", said + "".join(body) if body else ""


def schedule_section(run: Record) -> str:
    """The phases of a schedule as a table, over the epochs that the run has."""
    from common.schedule import Phase, Schedule

    written = run.settings["resolved"].get("schedule")
    if not written:
        return ""
    phases = tuple(Phase(**phase) for phase in written[1:])
    head, *rows = Schedule(written[0], phases).scaled(run.settings["resolved"]["train"]["epochs"]).cells()
    said = (
        "What changes in which epochs (counted from 0): how clips are drawn, the strength tau of the logit adjustment,"
    )
    said += " the weights of the losses, and the factor of the learning rate."
    return f'<h3>Schedule</h3><p class="t">{said}</p>{table(rows, head)}'


def findings_part(run: Record, detail: float) -> tuple[str, str]:
    """What the script itself has to show: its pictures, matrices, curves and errors."""
    figures, body = run.folder / "figures", []
    used = {Path(name).name for item in (run.check or {"items": []})["items"] for name in item.get("pictures") or []}
    for file in sorted(figures.glob("*.png")) if figures.exists() else ():
        if file.name not in used:
            said = escape(_CAPTIONS.get(file.stem, ""))
            picture = f'<img alt="{escape(file.stem)}" src="{embedded(file, detail)}"/>'
            body.append(f'<h3>{escape(file.stem.replace("_", " ").capitalize())}</h3><p class="t">{said}</p>{picture}')
    body.append(schedule_section(run))
    first = len(body)

    def place(file: Path):
        return next((i for i, name in enumerate(_ORDER) if file.stem.startswith(name)), len(_ORDER)), file.stem

    for file in sorted(figures.glob("*.json"), key=place) if figures.exists() else ():
        found = json.loads(file.read_text())
        if "kind" in found:  # else it is another tool's
            said = f'<h3>{escape(found["title"])}</h3><p class="t">{escape(found["text"])}</p>'
            form = ' class="half"' * (found["kind"] in ("matrix", "bars", "lines", "scatter"))
            body.append(f"<section{form}>{said}{finding(found, detail)}</section>")
    body = ["".join(body[:first]), f'<div class="found">{"".join(body[first:])}</div>' if body[first:] else ""]
    return "What the model sees and says", "".join(body + own_tables(run.folder, "findings"))


def system_part(stages: dict[str, dict[str, str]]) -> tuple[str, str]:
    """Throughput, waiting for data, memory."""
    drawn = []
    for stage, charts in stages.items():
        drawn += [
            chart_figure(f"{stage}: {name}", m, charts[m])
            for m, name in zip(_SYSTEM, ("throughput", "data wait", "memory"), strict=True)
            if m in charts
        ]
    return "System", f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def main(argv: list[str] | None = None) -> int:
    from common import compare, config, tables  # they import this module

    parser = config.Parser(prog="python -m common.report", description=__doc__)
    parser.add_argument("folders", metavar="DIR", nargs="+", help="run directories, or folders of runs")
    parser.add_argument("--text", action="store_true", help="print tables instead of writing a page")
    parser.add_argument("--out", metavar="FILE", help="the page that compares runs; unset: compare.html")
    axis = "settings, as `backbone,bs`; `bs=64|128` lists the values to show"
    parser.add_argument("--rows", help=f"print a table of the runs: {axis}")
    parser.add_argument("--cols", default="", help=f"its columns: {axis}")
    parser.add_argument("--value", help="the metrics in its cells, as `linear/test/accuracy,linear/test/macro_f1`")
    parser.add_argument("--where", default="", help="only runs with these settings, as `stage=linear`, `trial=any`")
    parser.add_argument("--interval", action="store_true", help="95 %% intervals of means instead of deviations")
    parser.add_argument("--compact", action="store_true", help="leave out rows without any run")
    parser.add_argument("--select", action="store_true", help="per backbone the SimCLR run to go on with")
    args = parser.parse_args(argv)
    folders = [Path(folder) for folder in args.folders]
    with config.exit_codes():
        one = len(folders) == 1 and any((folders[0] / name).exists() for name in ("config.json", "check.json"))
        if args.rows is None:
            config.refuse_without_effect(parser, args, ["cols", "value", "interval", "compact"], "without --rows")
        elif args.value is None:
            parser.error("--rows needs --value, the metric to show")
        table_asked = args.rows is not None or args.select
        if table_asked or args.text or one:
            config.refuse_without_effect(parser, args, ["out"], "without a page that compares runs")
        if table_asked:
            config.refuse_without_effect(parser, args, ["text"], "with --rows or --select, which print text")
        if one and not table_asked:
            config.refuse_without_effect(parser, args, ["where"], "for a single run")
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
            raise config.InputError(f"{'; '.join(idle)}; a run directory holds a config.json")
        for line in idle:
            print(f"{line}; left out", file=sys.stderr)
        found = list(found.values())
        found = tables.where(found, args.where)
        if args.rows is not None:
            rows, cols = tables.parse_axis(args.rows), tables.parse_axis(args.cols)
            values = args.value.split(",")
            print(tables.pivot(found, rows, cols, values, interval=args.interval, compact=args.compact))
        if args.select:
            print(tables.select(found))
        if not table_asked:
            print(compare.text(found) if args.text else compare.write(found, Path(args.out or "compare.html")))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
