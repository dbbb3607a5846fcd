"""report.html: what a run looks like, in one self-contained file; and the small files that go beside it.

python -m common.report RUN                                        writes it again from the run directory's files
python -m common.report DIR --rows backbone,bs --cols proj_dim --value pretrain/train/loss     a table of many runs
"""

import base64
import csv
import html
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from common import log, metrics

_COLORS = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#0891b2")
_BASELINES = (
    "<code>linear_random</code>, <code>linear_pixels</code>: the linear protocol on a random-weight backbone and on raw"
    " pixels. <code>majority</code>: always the most frequent class."
)
_CAPTIONS = {
    "views": "What enters the network: eight images, view a above view b.",
    "watched": "Test clips, one a row, first real, then fake: the paler a frame, the smaller its share in the score.",
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2937;max-width:1080px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #e5e7eb}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
th:not(:first-child),td.n{text-align:right}
td.n{font-variant-numeric:tabular-nums}code{background:#f3f4f6;padding:.1rem .3rem}
.charts{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}figcaption{font-size:.85rem;color:#4b5563}
img,svg{max-width:100%}.wide{overflow-x:auto}
"""


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images (n, 3, h, w) in [0, 1] as a PNG grid of so many columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = make_grid(images.detach().float().cpu().clamp(0, 1), nrow=columns, padding=2, pad_value=1.0)
    scale = max(1, 96 // images.shape[-1])  # small images are enlarged in whole pixels
    save_image(grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2), path)


def save_watched(path: Path, frames: Tensor, shares: Tensor) -> None:
    """Write clips (n, T, 3, h, w) in [0, 1], one a row, as a PNG; the less a frame's share (n, T), the paler it is."""
    weight = 0.1 + 0.9 * (shares / shares.amax(1, keepdim=True)).view(*shares.shape, 1, 1, 1)
    save_grid(path, (1 - (1 - frames) * weight).flatten(0, 1), frames.shape[1])


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


def write_confusion(path: Path, classes: list[str], labels, predicted) -> None:
    """Write confusion.csv: a row for each true class, a column for each answer; labels and answers are (n,) numbers."""
    counts = metrics.confusion_matrix(labels, predicted, len(classes))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["true", *classes], *([n, *row] for n, row in zip(classes, counts, strict=True))])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str, series: dict[str, list[tuple[float, float]]], *, x_label: str, marks: dict[str, float] | None = None
):
    """A line chart as SVG text: `series` are (x, y) points by name, `marks` horizontal lines by name."""
    marks = marks or {}
    points = [p for line in series.values() for p in line]
    xs, ys = [p[0] for p in points], [p[1] for p in points] + list(marks.values())
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
    pad = (y_high - y_low) * 0.05 or max(abs(y_high) * 0.05, 0.01)
    y_low, y_high = y_low - pad, y_high + pad
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    left, right, top, bottom, width, height = 56, 8, 36, 40, 500, 276

    def px(x):
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y):
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' font-family="system-ui,sans-serif" font-size="11" role="img"><rect width="{width}" height="{height}"'
        f' fill="#fff"/><text x="{left}" y="14" font-size="13" font-weight="600">{html.escape(title)}</text>'
    ]
    for y in ticks(y_low, y_high):
        out.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="#e5e7eb"/>'
            f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end" fill="#4b5563">{y:g}</text>'
        )
    for x in ticks(x_low, x_high):
        out.append(f'<text x="{px(x):.1f}" y="{height - bottom + 16}" text-anchor="middle" fill="#4b5563">{x:g}</text>')
    out.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle" fill="#4b5563">{x_label}</text>'
    )
    for name, y in marks.items():
        out.append(
            f'<line x1="{left}" x2="{width - right}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="#6b7280"'
            f' stroke-dasharray="5 4"/><text x="{width - right - 2}" y="{py(y) - 4:.1f}" text-anchor="end"'
            f' fill="#6b7280">{html.escape(name)}</text>'
        )
    for i, (name, line) in enumerate(series.items()):
        color = _COLORS[i % len(_COLORS)]
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        shape = (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>'
            if len(line) > 1
            else f'<circle cx="{px(line[0][0]):.1f}" cy="{py(line[0][1]):.1f}" r="3" fill="{color}"/>'
        )
        out.append(shape)
        if len(series) > 1:
            x = left + 440 / len(series) * i
            out.append(
                f'<rect x="{x}" y="22" width="12" height="3" fill="{color}"/>'
                f'<text x="{x + 16}" y="28" fill="#374151">{html.escape(name)}</text>'
            )
    return "".join(out) + "</svg>"


def table(rows: list[tuple], header: tuple = ()) -> str:
    """Rows of cells as an HTML table; floats are shown with four decimals, those below 0.001 with three digits."""

    def cell(value, tag="td"):
        if isinstance(value, float):
            small = 0 < abs(value) < 1e-3  # a learning rate
            return f'<td class="n">{value:{".3g" if small else ".4f"}}</td>'
        number = ' class="n"' if isinstance(value, int) else ""
        return f"<{tag}{number}>{html.escape(str(value))}</{tag}>"

    head = "<tr>" + "".join(cell(h, "th") for h in header) + "</tr>" if header else ""
    return "<table>" + head + "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows) + "</table>"


def charts_of(lines: list[dict]) -> dict[str, str]:
    """The curves of a log: per stage the values of its steps, and each metric of its epochs, all splits in one chart.

    Stages that differ in what stands after an underscore (`linear`, `linear_random`) are drawn together.
    """
    groups: dict[tuple[str, str], dict[str, list]] = {}
    for line in lines:
        stage, _, variant = line["stage"].partition("_")
        for name, value in line.items():
            if name in ("stage", "step", "epoch", *log.TIMING) or not isinstance(value, (int, float)):
                continue
            _, _, metric = name.rpartition("/")
            if name.count("/") < 2:
                if name != "loss/chance":
                    groups.setdefault((stage, name), {}).setdefault(name, []).append((line["step"], value))
                continue
            split = name.split("/")[1]
            if split != "test" and metric not in ("macro_precision", "macro_recall", "loss_over_chance"):
                bound = next((end for end in ("_low", "_high") if metric.endswith(end)), "")
                metric = metric.removesuffix(bound)  # an interval is drawn with what it is about
                series = " ".join(filter(None, [split, bound[1:], f"({variant})" if variant else ""]))
                points = groups.setdefault((stage, f"{metric} by epoch"), {}).setdefault(series, [])
                points.append((line["epoch"], value))
    charts = {}
    for (stage, title), series in groups.items():
        chance = chance_level(lines) if stage == "pretrain" and title in ("loss", "loss by epoch") else None
        x_label = "epoch" if title.endswith("by epoch") else "step"
        name = f"{stage}: {title}"
        charts[name] = chart(name, series, x_label=x_label, marks={"chance": chance} if chance else {})
    return charts


def chance_level(lines: list[dict]) -> float | None:
    """The loss at chance level, ln(2N-1), which the ratio in the log gives."""
    for line in lines:
        if line.get("loss/chance"):
            return line["loss"] / line["loss/chance"]
    return None


def write(folder: Path) -> Path:
    """Write report.html and the curves in figures/ of a run directory; returns the report's path."""
    folder = Path(folder)
    lines = log.read(folder)
    files = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "config", "env")}
    summary = files["summary"]
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    body = [
        f"<h1>{html.escape(folder.name)}</h1>",
        f"<p>Status <b>{summary['status']}</b> after {log.duration(summary['seconds'])}."
        f" Command: <code>{html.escape(files['env']['command'])}</code></p>",
    ]
    scores = {name: value for name, value in summary.items() if "/" in name}
    tests = list(dict.fromkeys(name.split("/")[0] for name in scores if "/test/accuracy" in name))
    columns = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
    if tests:
        rows = [(name, *(scores.get(f"{name}/test/{column}", "") for column in columns)) for name in tests]
        body += ["<h2>Test results</h2>", table(rows, ("stage", *columns)), f"<p>{_BASELINES}</p>"]
    body += detection_section(scores) + loss_section(scores, files["config"])
    tables = folder / "tables.json"  # of a script's own: title -> {"header": [...], "rows": [...]}
    for title, own in json.loads(tables.read_text()).items() if tables.exists() else ():
        body += [f"<h2>{html.escape(title)}</h2>", f'<div class="wide">{table(own["rows"], own["header"])}</div>']
    charts, curves = charts_of(lines), set()
    for title, svg in charts.items():
        name = title.replace(": ", "_").replace(" ", "_").replace("/", "_")
        (figures / f"{name}.svg").write_text(svg)
        curves.add(name)
    if charts:
        body += [
            "<h2>Curves</h2>",
            '<div class="charts">',
            *(f"<figure>{svg}</figure>" for svg in charts.values()),
            "</div>",
        ]
    for drawing in sorted(figures.glob("*.svg")):
        if drawing.stem not in curves:
            body += [f"<h2>{html.escape(drawing.stem.capitalize())}</h2>", f"<figure>{drawing.read_text()}</figure>"]
    for picture in sorted(figures.glob("*.png")):
        encoded = base64.b64encode(picture.read_bytes()).decode()
        caption = _CAPTIONS.get(picture.stem, picture.stem)
        body += [
            f"<h2>{html.escape(picture.stem.capitalize())}</h2>",
            f'<figure><img src="data:image/png;base64,{encoded}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>",
        ]
    body += ["<h2>All metrics</h2>", table(sorted(summary.items()))]
    settings = {k: v for k, v in files["config"].items() if k not in ("resolved", "identity")}
    body += [
        "<h2>Flags</h2>",
        table(sorted(settings.items())),
        "<h2>Resolved settings</h2>",
        table(list(files["config"]["resolved"].items())),
        "<h2>Environment</h2>",
        table(list(files["env"].items())),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(folder.name)}</title><style>{_STYLE}</style>{''.join(body)}</html>"
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def detection_section(scores: dict) -> list[str]:
    """Test metrics of a detector on videos: all of them, and each kind of positive beside all negatives."""
    stem = "/test/video_auc"
    names = sorted((name for name in scores if stem in name), key=lambda name: (name.endswith("_last_epoch"), name))
    columns = ("auc", "ap", "eer", "accuracy")
    rows = [
        (
            name.partition(stem)[2].strip("_") or "all",
            *(scores[name.replace("video_auc", f"video_{c}")] for c in columns),
        )
        for name in names
    ]
    return ["<h2>Test videos</h2>", table(rows, ("of", *columns))] if rows else []


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
        "<h2>NT-Xent loss</h2>",
        table(rows, ("convention", "last epoch's mean", "chance level", "ratio")),
        f"<p>Batch {batch}: a guess among 2N-1 = {2 * batch - 1} candidates costs ln({2 * batch - 1}) = {chance:.4f}."
        " Compare the ratio, not the loss, between batch sizes.</p>",
    ]


def main(argv: list[str] | None = None) -> int:
    from common import config, run, tables  # they import this module

    parser = config.Parser(prog="python -m common.report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="a run directory, or with the flags below a folder of runs")
    axis = "settings, as `backbone,bs`; `bs=64|128` lists the values to show"
    parser.add_argument("--rows", help=f"a table of the runs below DIR: {axis}")
    parser.add_argument("--cols", default="", help=f"its columns: {axis}")
    parser.add_argument("--value", help="the metrics in its cells, as `linear/test/accuracy,linear/test/macro_f1`")
    parser.add_argument("--where", default="", help="only runs with these settings, as `stage=linear`")
    parser.add_argument("--interval", action="store_true", help="95 %% intervals of means instead of deviations")
    parser.add_argument("--compact", action="store_true", help="leave out rows without any run")
    parser.add_argument("--select", action="store_true", help="per backbone the SimCLR run to go on with")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    with config.exit_codes():
        if args.rows is None and not args.select:
            config.refuse_without_effect(
                parser, args, ["cols", "value", "where", "interval", "compact"], "without --rows"
            )
            for name in ("summary.json", "config.json", "env.json"):
                if run.read_json(folder / name) is None:
                    raise config.InputError(f"{folder} holds no {name}: give a run directory, or --rows for a table")
            print(write(folder))
            return 0
        if args.rows is not None and args.value is None:
            parser.error("--rows needs --value, the metric to show")
        found = tables.runs(folder)
        if not found:
            raise config.InputError(f"{folder} holds no run")
        found = tables.where(found, args.where)
        if args.rows is not None:
            rows, cols = tables.parse_axis(args.rows), tables.parse_axis(args.cols)
            values = args.value.split(",")
            print(tables.pivot(found, rows, cols, values, interval=args.interval, compact=args.compact))
        if args.select:
            print(tables.select(found))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
