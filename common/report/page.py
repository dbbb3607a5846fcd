"""report.html: what a run looks like, in one self-contained file; and the small files beside it.

The file holds no script and loads nothing. It takes at most LIMIT bytes: where a run has more to
show, curves get fewer points, galleries fewer pictures, and these fewer pixels.
"""

import base64
import io
import json
import math
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from PIL import Image

from common import monitor
from common.data.images import open_image, upright
from common.errors import only_warn
from common.report import charts
from common.report.charts import escape
from common.report.curves import FIRST, SYSTEM, chart_figure, max_points, title_of
from common.report.record import LIMIT, Record, interval_text, naming
from common.run import ending, log
from common.run.files import atomic_write

_EVERY = 30.0  # seconds between two reports of a run that goes on
_COST = 50  # times what writing one takes, at least
_WIDEST = 1000  # pixels of a picture
_TILES = 4
# The stages of a classifier and its baselines in words, the answer first.
_STAGES = {
    "finetune": "fine-tuned",
    "linear": "linear layer on the learned features",
    "linear_random": "linear layer on features of random weights",
    "linear_pixels": "linear layer on raw pixels",
    "majority": "always the most frequent class",
}
_CAPTIONS = {
    "views": (
        "What enters the network: eight images, view a above view b. You should recognize each"
        " pair."
    )
}
# The order of the findings; others follow.
_ORDER = (
    "methods",
    "roc",
    "confusion",
    "recall",
    "features",
    "neighbors",
    "scatter",
    "watched",
    "errors",
)
_HALF = ("matrix", "bars", "lines", "scatter")  # kinds of figures that stand side by side
_STYLE = (
    charts.STYLE
    + """
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
  max-width:1340px;margin:0 auto;padding:.8rem}
h1{font-size:1.4rem;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .4rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
h4{font-size:.9rem;margin:.8rem 0 .2rem;overflow-wrap:anywhere}
p{margin:.3rem 0;max-width:80ch}
.t{color:var(--faint)}
nav{margin:.6rem 0}
nav a{margin-right:1rem;display:inline-block}
a{color:var(--s0)}
table{border-collapse:collapse;margin:.4rem 0;font-size:.9rem}
td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top}
th{color:var(--faint);font-weight:600}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
td{white-space:nowrap}
td.w,table.f td{white-space:normal}
td.w{overflow-wrap:anywhere;min-width:12rem}
code{overflow-wrap:anywhere;font-size:.9em}
.wide{overflow-x:auto;background:
  linear-gradient(90deg,var(--paper) 30%,transparent) 0/2rem 100% no-repeat local,
  linear-gradient(270deg,var(--paper) 30%,transparent) 100%/2rem 100% no-repeat local,
  linear-gradient(90deg,var(--rule),transparent) 0/.8rem 100% no-repeat scroll,
  linear-gradient(270deg,var(--rule),transparent) 100%/.8rem 100% no-repeat scroll}
table.f td{overflow-wrap:anywhere}
table.f td:first-child{overflow-wrap:normal;color:var(--faint)}
.charts{display:grid;gap:1rem;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr))}
.charts figcaption{min-height:2.6em}
.one{max-width:440px}
.one img{width:100%}
figure{margin:0}
figcaption{font-size:.85rem;color:var(--faint);overflow-wrap:anywhere}
.charts figcaption b,.one figcaption b{color:var(--ink)}
svg{width:100%;height:auto;display:block}
img{max-width:100%;height:auto}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;margin:.8rem 0}
.tile{border:1px solid var(--rule);border-radius:6px;padding:.4rem .8rem;max-width:17rem}
.tile b{font-size:1.4rem;display:block}
.tile span{font-size:.82rem;color:var(--faint);display:block}
.cards{display:flex;flex-wrap:wrap;gap:.6rem}
.cards.k{display:grid;gap:.3rem;max-width:calc(var(--k)*104px);
  grid-template-columns:repeat(var(--k),minmax(0,1fr))}
.card{max-width:288px}
.card img{display:block;height:96px;max-width:100%;width:auto;border:2px solid transparent;
  object-fit:contain}
.k .card img{height:auto;width:100%}
.card figcaption{font-size:.78rem;line-height:1.3;max-width:288px}
.k figcaption{font-size:.7rem;text-align:center}
.card.good img{border:2px solid var(--s2)}
.card.bad img{border:2px dashed var(--s1)}
.b{display:block;height:26px;position:relative}
.b i{position:absolute;bottom:0;left:20%;width:60%;background:var(--s0);
  height:calc(var(--v)*100%)}
td.h{background:color-mix(in srgb,var(--s0) calc(var(--v)*60%),transparent);
  text-align:right;padding:.2rem .5rem;font-variant-numeric:tabular-nums}
th.up{writing-mode:vertical-rl;transform:rotate(180deg);padding:.3rem .2rem;
  vertical-align:bottom;max-height:12rem}
.texts{display:grid;gap:.7rem;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.texts div{border:1px solid var(--rule);border-radius:6px;padding:.5rem .7rem;
  overflow-wrap:anywhere;font-size:.88rem}
.texts span{color:var(--faint)}
.status{font-weight:700}
.PASS{color:var(--s2)}
.FAIL{color:var(--s1)}
.WARN{color:var(--s3)}
.SKIP{color:var(--faint)}
.found{display:flex;flex-wrap:wrap;column-gap:2.5rem}
.found section{width:100%}
.found section.half{width:min-content;min-width:min(100%,400px);max-width:100%}
.side{display:flex;flex-wrap:wrap;column-gap:2.5rem;align-items:flex-start}
.side>*{min-width:0;max-width:100%}
.side .lead{flex:1 1 440px}
.side .lead+*{flex:1.3 1 440px}
@media(max-width:600px){
  .card img{height:72px}
  .card,.card figcaption{max-width:172px}
  .cards.named{grid-template-columns:repeat(4,minmax(0,1fr))}
  .stack tr:first-child{display:none}
  .stack tr{display:block;padding:.3rem 0;border-bottom:1px solid var(--rule)}
  .stack td{display:inline;white-space:normal;padding-right:.5rem}
  .stack td:nth-child(4):not(:empty)::before{content:"passes: ";color:var(--faint)}
}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--s0)}
"""
)


class Live:
    """Rewrites the report of a run that goes on, at most every 30 seconds and for at most a
    fiftieth of its time.

    What keeps it from that is said once, and tried again.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder = folder
        self.say = say
        self.due = 0.0
        self.said = ""

    def __call__(self) -> None:
        begun = time.monotonic()
        if begun < self.due:
            return
        with only_warn(self._say_once, str(self.folder / "report.html")):
            write(self.folder, "running")
            self.said = ""
        now = time.monotonic()
        self.due = now + max(_EVERY, _COST * (now - begun))

    def _say_once(self, text: str) -> None:
        if text != self.said:
            self.say(text)
        self.said = text


def _number(value) -> bool:
    return isinstance(value, (int, float))


def paragraph(text: str) -> str:
    """A text as an explanation, in faint letters; nothing where it is empty."""
    return f'<p class="t">{escape(text)}</p>' if text else ""


def table(rows: list, header=(), form: str = "") -> str:
    """Rows of cells as an HTML table.

    Floats are shown with four decimals, those below 0.001 with three digits. `form` are attributes
    of the table.
    """
    numeric = [_number(value) for value in rows[0]] if rows else []
    heads = [
        f'<th class="n">{escape(name)}</th>' if right else f"<th>{escape(name)}</th>"
        for name, right in zip(header, numeric, strict=False)
    ]
    head = f"<tr>{''.join(heads)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table{form}>{head}{body}</table></div>'


def _cell(value) -> str:
    if isinstance(value, bool) or not _number(value):
        long = ' class="w"' if len(str(value)) > 40 else ""
        return f"<td{long}>{escape(value)}</td>"
    if isinstance(value, float):
        small = 0 < abs(value) < 1e-3  # a learning rate
        value = f"{value:.3g}" if small else f"{value:.4f}"
    return f'<td class="n">{value}</td>'


def matrix(corner: str, columns: list[str], rows: list, above: str = "") -> str:
    """Counts as a table whose cells have the fuller a color, the larger their share of the row; a
    row begins with its name. `above` is what the columns are, as `corner` what the rows.
    """
    up = ' class="up"' if len(columns) > 4 else ""
    heads = "".join(f"<th{up}>{escape(name)}</th>" for name in columns)
    out = [f"<tr><th>{escape(corner)}</th>{heads}</tr>"]
    if above:
        out.insert(0, f'<tr><th></th><th colspan="{len(columns)}">{escape(above)}</th></tr>')
    for name, *counts in rows:
        total = max(sum(filter(_number, counts)), 1)
        cells = [
            f'<td class="h" style="--v:{count / total:.2f}">{count}</td>'
            if _number(count)
            else f"<td>{escape(count)}</td>"
            for count in counts
        ]
        out.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(out)}</table></div>'


def gallery(rows: list[dict], columns: int | None = None) -> str:
    """Rows of pictures with lines of text below; `columns` are then of one width, else pictures
    wrap.
    """
    out = []
    for row in rows:
        most = max((card.get("share", 0) for card in row["cards"]), default=0)
        cards = "".join(_picture_card(card, most) for card in row["cards"])
        form = ""
        if columns:
            named = any(len(line) > 6 for card in row["cards"] for line in card["lines"])
            form = f' k{" named" if named else ""}" style="--k:{int(columns)}'
        if row["title"]:
            out.append(f"<h4>{escape(row['title'])}</h4>")
        out.append(f'<div class="cards{form}">{cards}</div>')
    return "".join(out)


def _picture_card(card: dict, most: float) -> str:
    # With a bar for its share where the row has shares, of which `most` is the largest.
    bar = ""
    if most:
        bar = f'<span class="b"><i style="--v:{card["share"] / most:.2f}"></i></span>'
    alt = escape(", ".join(card["lines"]))
    image = f'<img alt="{alt}" src="{escape(card["image"])}"/>'
    caption = "<br/>".join(escape(line) for line in card["lines"])
    tone = escape(card.get("tone", ""))
    return f'<figure class="card {tone}">{image}{bar}<figcaption>{caption}</figcaption></figure>'


def text_cards(header: list[str], rows: list) -> str:
    """Rows of a table as cards: the first cell is the title, of the others each has its name."""
    out = []
    for first, *rest in rows:
        lines = [f"<b>{escape(header[0])} {escape(first)}</b>"]
        for name, value in zip(header[1:], rest, strict=True):
            if value == "":
                continue
            text = escape(value).replace(" | ", "<br/>· ")
            bullet = "<br/>· " if "<br/>" in text else ""
            lines.append(f"<span>{escape(name)}:</span> {bullet}{text}")
        out.append(f"<div>{'<br/>'.join(lines)}</div>")
    return f'<div class="texts">{"".join(out)}</div>'


def draw_figure(figure: dict, detail: float) -> str:
    """What figures/NAME.json holds (`common.report.figures`), drawn."""
    kind = figure["kind"]
    if kind == "gallery":
        return _draw_gallery(figure["rows"], figure.get("columns"), detail)
    if kind == "matrix":
        return matrix(figure["corner"], figure["columns"], figure["rows"], figure.get("above", ""))
    if kind == "table":
        return table(figure["rows"], figure["header"])
    if kind == "bars":
        drawn = charts.bars(
            figure["title"], figure["rows"], label=figure["label"], levels=figure["levels"]
        )
    elif kind == "scatter":
        step = math.ceil(1 / max(detail, 0.05))
        drawn = charts.scatter(
            figure["title"],
            figure["points"][::step],
            figure["groups"][::step],
            figure["names"],
            x_label=figure["x_label"],
            y_label=figure["y_label"],
            labels=figure.get("labels", False),
        )
    else:
        drawn = charts.lines(
            figure["title"],
            figure["series"],
            x_label=figure["x_label"],
            y_label=figure["y_label"],
            bands=figure.get("bands"),
            frame=figure.get("frame"),
            diagonal=figure.get("diagonal"),
            values=figure.get("values", True),
            most=max_points(detail),
        )
    return f'<div class="one">{drawn}</div>'


def _draw_gallery(rows: list[dict], columns: int | None, detail: float) -> str:
    if detail == 0:
        return "<p>Left out: this page would become too large.</p>"
    if columns:
        return gallery(rows[: math.ceil(detail * len(rows))], columns)
    shorter = [
        {**row, "cards": row["cards"][: math.ceil(detail * len(row["cards"]))]} for row in rows
    ]
    return gallery(shorter)


def embedded(path: Path, detail: float) -> str:
    """A picture's file as a data: address.

    SVG as it is, others as PNG or JPEG, what is smaller, at most 1000 pixels wide at full detail.

    Raises:
        InputError: it is damaged.
    """
    if path.suffix == ".svg":
        return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
    with naming(path), open_image(path.read_bytes()) as image:
        image = upright(image).convert("RGB")
        widest = max(int(_WIDEST * min(detail, 1.0)), 100)
        if image.width > widest:
            size = (widest, max(1, round(image.height * widest / image.width)))
            image = image.resize(size, Image.Resampling.BILINEAR)
        encoded = {"png": io.BytesIO(), "jpeg": io.BytesIO()}
        image.save(encoded["png"], "PNG", optimize=True)
        image.save(encoded["jpeg"], "JPEG", quality=82 if detail >= 1 else 60)
    kind = min(encoded, key=lambda name: encoded[name].tell())
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind].getvalue()).decode()}"


def write(folder: Path, status: str | None = None) -> Path:
    """Write report.html of a run directory, never seen half written; returns its path.

    `status` is that of a run that goes on; unset: summary.json says how it ended, and the curves
    are written as files to figures/ too. A directory that holds but check.json gets a report of
    that.

    Raises:
        InputError: a file of the run is not as a run writes it.
        OSError: the disk is full or not writable.
    """
    run = Record(folder, status)
    for detail in (1.0, 0.4, 0.15, 0.05, 0.0):
        content = page_of(run, detail)
        if len(content) <= LIMIT:
            break
    path = run.folder / "report.html"
    with atomic_write(path, "wb") as file:
        file.write(content)
    if status is None:
        figures = run.folder / "figures"
        figures.mkdir(exist_ok=True)
        for stage, drawings in run.charts(1.0).items():
            for metric, drawn in drawings.items():
                name = re.sub(r"[^\w.-]", "_", f"{stage}_{metric}")  # a log may say ../../name
                with atomic_write(figures / f"{name}.svg") as file:
                    file.write(charts.standalone(drawn))
    return path


def page_of(run: Record, detail: float) -> bytes:
    """The report as bytes; `detail` is the share of points and pixels that is shown."""
    drawings = run.charts(detail)
    parts = {
        "Results": results_part(run),
        "Checks of the training recipe": check_part(run, detail),
        "Curves": curves_part(drawings),
        "What the model sees and says": findings_part(run, detail),
        "System": system_part(drawings),
        "Everything else": settings_part(run),
    }
    title = title_of_run(run)
    head = [f"<h1>{escape(title)}</h1>", paragraph(run.card["about"])]
    head += [warnings_of(run), tiles(run)]
    head.append(f'<div class="side">{lead(run, detail)}{facts(run)}</div>')
    return document(title, head, {title: body for title, body in parts.items() if body})


def title_of_run(run: Record) -> str:
    """The script, the run directory and the data, as `simclr: demo, of cells.zip`."""
    data = run.settings.get("data")
    of_data = f", of {Path(data).name}" if data else ""
    script = f"{run.card['name']}: " if run.card.get("name") else ""
    return f"{script}{run.folder.resolve().name}{of_data}"


def lead(run: Record, detail: float) -> str:
    """What the eye falls on first: some views, or the first pictures that the run has to show, or
    its scatter plot.
    """
    folder = run.folder / "figures"
    views = folder / "views.png"
    if views.exists():
        drawn = f'<img alt="views" src="{embedded(views, detail)}"/>'
        return f'<div class="lead">{drawn}{paragraph(_CAPTIONS["views"])}</div>'
    for file in sorted(folder.glob("*.json"), key=_rank):
        with naming(file):
            figure = json.loads(file.read_text(encoding="utf-8"))
            kind = figure.get("kind")
            if kind == "scatter":
                drawn = draw_figure(figure, detail)
            elif kind == "gallery" and detail and figure["rows"]:
                first = figure["rows"][0]
                drawn = gallery([{**first, "cards": first["cards"][:4]}])
            else:
                continue
            head = f"<h3>{escape(figure['title'])}</h3>"
            return f'<div class="lead">{head}{drawn}</div>'
    return ""


def document(title: str, head: list[str], parts: dict[str, str]) -> bytes:
    """A page that is well-formed XML too, and may neither run a script nor load anything."""
    links = "".join(f'<a href="#p{i}">{escape(name)}</a>' for i, name in enumerate(parts))
    body = "".join(
        f'<h2 id="p{i}">{escape(name)}</h2>{text}' for i, (name, text) in enumerate(parts.items())
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    content = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(head)}<nav>{links}</nav>{body}</body></html>\n"
    )
    return content.encode("utf-8", "replace")


def warnings_of(run: Record) -> str:
    """What the log says of what goes wrong (`common.monitor.PROBLEMS`)."""
    out = []
    for line in run.lines:
        for name in line:
            stage, _, kind = name.partition("/warn/")
            if kind in monitor.PROBLEMS:
                wrong, cure = monitor.PROBLEMS[kind]
                when = f"After epoch {line['epoch']} of" if line["epoch"] else "Before"
                text = f"{when} {stage}: {wrong}. What to try, if it is not so yet: {cure}."
                out.append(f'<p><b class="WARN">WARN</b> {escape(text)}</p>')
    return "".join(out)


def tiles(run: Record) -> str:
    """The few figures that matter most, large, each with its baselines: the first of the card's
    headlines that are there.
    """
    names = [name for name in run.card["headlines"] if ending.is_number(run.scores.get(name))]
    out = []
    for name in names[:_TILES]:
        value, _, interval = interval_text(run.scores, name).partition(" ")
        captions = [run.card["headlines"][name]]
        if interval:
            captions.append(interval)
        captions.append(ending.compared(run.scores, name))
        spans = "".join(f"<span>{escape(text)}</span>" for text in captions)
        out.append(f'<div class="tile"><b>{value}</b>{spans}</div>')
    return f'<div class="tiles">{"".join(out)}</div>' if out else ""


def facts(run: Record) -> str:
    """What was run, on what, and how it stands."""
    env = run.env
    rows = [("state", run.state)]
    if run.summary and run.summary.get("best_epoch") and run.status != "running":
        selected = f"epoch {run.summary['best_epoch']}: {run.summary.get('best_model_path')}"
        rows.append(("selected", selected))
    rows.append(("command", f"python {env.get('command', '')}"))
    if "torch" in env:
        rows.append(("data", env.get("data_read", run.settings.get("data"))))
        rows.append(("hardware", hardware(env)))
        software = f"Python {env.get('python')}, torch {env['torch']}; commit {commit_of(env)}"
        rows.append(("software", software))
    rows.append(("folder", str(run.folder.resolve())))
    rows.append(("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    return table(rows, form=' class="f"')


def commit_of(env: dict) -> str:
    """The commit of the code that ran."""
    changed = ", with uncommitted changes" if env.get("uncommitted_changes") else ""
    return (env.get("commit") or "unknown")[:12] + changed


def hardware(env: dict) -> str:
    """The device of a run, how many processes used it, and their threads."""
    on_gpu = env.get("gpu") and "cpu" not in env.get("device", "")
    device = env["gpu"] if on_gpu else f"CPU, {env.get('cpus')} cores"
    if env.get("processes", 1) > 1:
        device += f", {env['processes']} processes"
    threads = env.get("threads")
    return f"{device}, {threads} thread{'' if threads == 1 else 's'}"


def settings_part(run: Record) -> str:
    """All metrics and settings, folded away."""
    metrics = {k: v for k, v in (run.summary or run.scores).items() if v is not None}
    flags = {k: v for k, v in run.settings.items() if k not in ("resolved", "identity", "card")}
    tables = {
        "All metrics": sorted(metrics.items()),
        "Flags": sorted(flags.items()),
        "Resolved settings": list(run.settings["resolved"].items()),
        "Environment": [(name, value) for name, value in run.env.items() if name != "starts"],
        "Starts": starts_of(run.env),
    }
    return "".join(
        f"<details><summary>{title} ({len(rows)})</summary>{table(rows)}</details>"
        for title, rows in tables.items()
        if rows
    )


def starts_of(env: dict) -> list[tuple[str, str]]:
    """Of each start of a run its time; where it took up work, and what differs from the last."""
    starts = env.get("starts")
    rows = []
    for start in starts if isinstance(starts, list) else []:
        if isinstance(start, dict):
            began = f"{start.get('stage') or 'no stage'} step {start.get('step') or 0}"
            others = [name for name in start if name not in ("time", "stage", "step")]
            texts = [f"{name.replace('_', ' ')} {start[name]}" for name in others if start[name]]
            rows.append((str(start.get("time")), "; ".join([began, *texts])))
    return rows


def results_part(run: Record) -> str:
    """The test metrics: of stages side by side, with intervals, and the last epoch's beside the
    selected one's.
    """
    sections = (
        accuracy_section(run.scores),
        recall_section(run.scores),
        detection_section(run.scores),
        loss_section(run.scores, run.settings),
        own_tables(run.folder, "results"),
    )
    shown = "".join(f"<section>{section}</section>" for section in sections if section)
    return f'<div class="side">{shown}</div>' if shown else ""


def accuracy_section(scores: dict) -> str:
    """Test metrics of classifiers, a row for each stage and each baseline."""
    columns = ("macro_precision", "macro_recall", "macro_f1", "knn_accuracy")
    found = [name.split("/")[0] for name in scores if name.endswith("/test/accuracy")]
    if not found:
        return ""
    stages = sorted(found, key=lambda stage: [*_STAGES, stage].index(stage))
    rows = [
        (
            _STAGES.get(stage, stage),
            interval_text(scores, f"{stage}/test/accuracy"),
            *(scores.get(f"{stage}/test/{column}", "") for column in columns),
        )
        for stage in stages
    ]
    gains = [
        (f"{_STAGES['linear']} minus that {of}", interval_text(scores, f"linear/test/{gain}"))
        for gain, of in (("gain_over_pixels", "on pixels"), ("gain_over_random", "on random ones"))
        if f"linear/test/{gain}" in scores
    ]
    names = ("macro precision", "macro recall", "macro F1", "kNN accuracy on these features")
    header = ("test split", "accuracy (95 % interval)", *names)
    gained = ("accuracy of the same images", "difference (95 % interval)")
    return table(rows, header) + (table(gains, gained) if gains else "")


def recall_section(scores: dict) -> str:
    """Test recalls of a classifier, of the selected epoch, the last one and what they have to
    beat.
    """
    columns = {
        "selected epoch (95 % interval)": "{}",
        "last epoch": "{}_last_epoch",
        "CLIP untrained": "zero_shot_{}",
        "CLIP untrained, several texts": "zero_shot_templates_{}",
        "majority class": "majority_{}",
    }
    columns = {
        title: f"train/test/{name}"
        for title, name in columns.items()
        if f"train/test/{name.format('uar')}" in scores
    }
    rows = [
        (metric.upper(), *(interval_text(scores, name.format(metric)) for name in columns.values()))
        for metric in ("uar", "war")
    ]
    return table(rows, ("", *columns)) if columns else ""


def detection_section(scores: dict) -> str:
    """Test metrics of a detector on videos, of the selected epoch and of the last one."""
    metrics = ("video_auc", "video_ap", "video_eer", "video_accuracy", "clip_auc")
    rows = []
    for suffix, name in (("", "selected epoch"), ("_last_epoch", "last epoch")):
        if f"train/test/video_auc{suffix}" in scores:
            values = (scores[f"train/test/{metric}{suffix}"] for metric in metrics)
            rows.append((name, *values))
    header = ("test videos", "AUC", "AP", "EER", "accuracy", "AUC of clips")
    return table(rows, header) if rows else ""


def loss_section(scores: dict, settings: dict) -> str:
    """NT-Xent in both conventions, beside its chance level: losses of different batch sizes are not
    comparable.
    """
    loss = scores.get("pretrain/train/loss")
    chance = scores.get("pretrain/train/loss_at_chance")
    if loss is None or chance is None:
        return ""
    ratio = loss / chance
    rows = [
        ("averaged over the 2N rows (this project's, lightly's)", loss, chance, ratio),
        ("the two views' averages summed (google-research/simclr's)", 2 * loss, 2 * chance, ratio),
    ]
    header = ("convention", "last epoch's mean", "chance level", "ratio")
    batch = settings["resolved"]["pretrain"]["bs"]
    candidates = 2 * batch - 1
    note = (
        f"Batch {batch}: a guess among 2N-1 = {candidates} candidates costs ln({candidates}) ="
        f" {chance:.4f}. Compare the ratio, not the loss, between batch sizes."
    )
    return "<h3>Contrastive loss (NT-Xent)</h3>" + table(rows, header) + paragraph(note)


def own_tables(folder: Path, part: str) -> str:
    """A script's own tables for a part of the report.

    tables.json holds them: title -> {"header", "rows"}, and where they differ from a plain one in
    the last part, "text" above it, "as" `cards` or `matrix`, "part" `results`.
    """
    file = folder / "tables.json"
    if not file.exists():
        return ""
    with naming(file):
        return "".join(
            _own_table(title, content)
            for title, content in json.loads(file.read_text(encoding="utf-8")).items()
            if content.get("part", "findings") == part
        )


def _own_table(title: str, content: dict) -> str:
    header = content["header"]
    rows = content["rows"]
    form = content.get("as")
    if form == "cards":
        drawn = text_cards(header, rows)
    elif form == "matrix":
        drawn = matrix(header[0], header[1:], rows)
    else:
        drawn = table(rows, header)
    return f"<h3>{escape(title)}</h3>{paragraph(content.get('text', ''))}{drawn}"


def check_part(run: Record, detail: float) -> str:
    """The statuses of --check, with what each one showed."""
    if not run.check:
        return ""
    items = run.check["items"]
    names = ("", "item", "value", "threshold", "what to do")
    rows = [f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"]
    shown = []
    for item in items:
        status = escape(item["status"])
        cells = [f'<td class="status {status}">{status}</td>']
        for name in ("item", "value", "threshold", "fix"):
            text = escape(item[name])
            cells.append(f'<td class="w">{text}</td>' if len(text) > 40 else f"<td>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
        evidence = _evidence(run.folder, item, detail)
        if evidence:
            shown.append(f"<h4>{escape(item['item'])}</h4>{evidence}")
    statuses = [item["status"] for item in items]
    counts = ", ".join(
        f"{statuses.count(name)} {name}" for name in ("FAIL", "WARN", "PASS", "SKIP")
    )
    seconds = log.duration(run.check["seconds"])
    note = paragraph(f"{counts}, in {seconds}. Command: {run.check['command']}")
    body = f'<div class="wide"><table class="stack">{"".join(rows)}</table></div>'
    if shown:
        body += f"<details><summary>What they show</summary>{''.join(shown)}</details>"
    return note + body


def _evidence(folder: Path, item: dict, detail: float) -> str:
    # The rows and pictures that an item of --check left.
    out = []
    if item.get("rows"):
        header, *rows = item["rows"]
        out.append(table(rows[:40], header))
    for name in item.get("pictures") or []:
        if (folder / name).exists():
            form = ' class="one"' if name.endswith(".svg") else ""
            image = f'<img alt="{escape(name)}" src="{embedded(folder / name, detail)}"/>'
            out.append(f"<figure{form}>{image}</figure>")
    return "".join(out)


def curves_part(stages: dict[str, dict[str, str]]) -> str:
    """Curves of every stage, the most telling first; the others are folded away."""
    if not stages:
        return ""
    body = [
        paragraph(
            "The figure in a legend is the last value. batch: the loss of single steps; train: the"
            " mean of an epoch; val (or dev): items held out from training. Dotted vertical lines:"
            " the run was resumed there, or a phase of its schedule begins."
        )
    ]
    for stage, drawings in stages.items():
        first = [name for name in FIRST if name in drawings]
        rest = [name for name in drawings if name not in FIRST + SYSTEM]
        body.append(f"<h3>Stage {escape(stage)}</h3>{_charts(first, drawings)}")
        if rest:
            summary = f"<summary>{len(rest)} more</summary>"
            body.append(f"<details>{summary}{_charts(rest, drawings)}</details>")
    return "".join(body)


def _charts(metrics: list[str], drawings: dict[str, str]) -> str:
    figures = [chart_figure(title_of(name), name, drawings[name]) for name in metrics]
    return f'<div class="charts">{"".join(figures)}</div>'


def findings_part(run: Record, detail: float) -> str:
    """What the script itself has to show: its pictures, matrices, curves and errors."""
    folder = run.folder / "figures"
    checks = run.check["items"] if run.check else []
    of_checks = {Path(name).name for item in checks for name in item.get("pictures") or []}
    pictures = []
    for file in sorted(folder.glob("*.png")):
        if file.name not in of_checks and file.name != "views.png":  # that is on top
            title = escape(file.stem.replace("_", " ").capitalize())
            caption = paragraph(_CAPTIONS.get(file.stem, ""))
            image = f'<img alt="{escape(file.stem)}" src="{embedded(file, detail)}"/>'
            pictures.append(f"<h3>{title}</h3>{caption}{image}")
    sections = []
    for file in sorted(folder.glob("*.json"), key=_rank):
        with naming(file):
            figure = json.loads(file.read_text(encoding="utf-8"))
            if "kind" in figure:  # else it is another tool's
                form = ' class="half"' if figure["kind"] in _HALF else ""
                head = f"<h3>{escape(figure['title'])}</h3>{paragraph(figure['text'])}"
                sections.append(f"<section{form}>{head}{draw_figure(figure, detail)}</section>")
    body = "".join(pictures)
    if sections:
        body += f'<div class="found">{"".join(sections)}</div>'
    return body + own_tables(run.folder, "findings")


def _rank(file: Path) -> tuple[int, str]:
    places = [i for i, name in enumerate(_ORDER) if file.stem.startswith(name)]
    return min(places, default=len(_ORDER)), file.stem


def system_part(stages: dict[str, dict[str, str]]) -> str:
    """Throughput, waiting for data, memory."""
    titles = dict(zip(SYSTEM, ("throughput", "data wait", "memory"), strict=True))
    figures = [
        chart_figure(f"{stage}: {title}", metric, drawings[metric])
        for stage, drawings in stages.items()
        for metric, title in titles.items()
        if metric in drawings
    ]
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""
