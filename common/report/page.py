"""report.html: what a run looks like, in one self-contained file; and the small files that go
beside it.

python -m common.report RUN                    writes it again from the run directory's files
python -m common.report RUN --text             the same run as text, on a terminal
python -m common.report RUN RUN [RUN ...]      compare.html: curves together, flags that differ, metrics
python -m common.report DIR --rows backbone,bs --cols proj_dim --value pretrain/train/loss     a table of many runs

The file holds no script and loads nothing. It takes at most LIMIT bytes: where a run has more to
show, curves get fewer points, galleries fewer pictures, and these fewer pixels.
"""

import base64
import io
import json
import math
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from PIL import Image

from common.longtail import Phase, Schedule
from common.report import charts
from common.report.charts import escape
from common.report.curves import FIRST, SYSTEM, _points, chart_figure, title_of
from common.report.record import HEADLINES, LIMIT, Record, interval_text
from common.run import log

_EVERY = 30.0  # seconds between two reports of a run that goes on
_COST = 50  # times what writing one takes, at least
_WIDEST = 1000  # pixels of a picture
_ABOUT = {
    "simclr": (
        "SimCLR: a network learns to tell that two distorted views of an image belong together,"
        " without labels"
        " (pretrain). Its features are then judged by a linear layer (linear) and by training on"
        " (finetune)."
    ),
    "tsm": "Is a face video real or manipulated? MobileNetV4 whose blocks exchange channels"
    " between frames (TSM).",
    "raer": (
        "Which academic emotion does a clip show? CLIP on the face and on the scene around it; a"
        " schedule in three"
        " stages helps the classes of few clips."
    ),
    "cluster": (
        "Groups of utterances found without labels: modalities are fused by contrastive learning"
        " (pretrain), then"
        " clustered, and the clusters sharpened (cluster). Labels, where there are any, only"
        " score the result."
    ),
}
_BASELINES = (
    "linear_random, linear_pixels: the linear protocol on a backbone of random weights and on raw"
    " pixels, which learned"
    " features should beat. majority: always the most frequent class."
)
_CAPTIONS = {
    "views": "What enters the network: eight images, view a above view b. You should recognize"
    " each pair."
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
_STYLE = (
    charts.STYLE
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
.status{font-weight:700}.PASS{color:var(--s2)}.FAIL{color:var(--s1)}.WARN{color:var(--s3)}.SKIP{color:var(--faint)}
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


class Live:
    """Rewrites the report of a run that goes on, at most every 30 seconds and for at most a
    fiftieth of its time.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say, self.due = folder, say, 0.0

    def __call__(self) -> None:
        begun = time.monotonic()
        if begun < self.due:
            return
        try:
            write(self.folder, "running")
        except OSError as error:  # a full disk: the run itself may yet go on
            self.say(
                f"{self.folder / 'report.html'} cannot be written: {error.strerror}; the run goes"
                " on without it"
            )
            self.due = math.inf
            return
        now = time.monotonic()
        self.due = now + max(_EVERY, _COST * (now - begun))


def table(rows: list, header=(), form: str = "") -> str:
    """Rows of cells as an HTML table; floats are shown with four decimals, those below 0.001 with
    three digits.
    """

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
    """Counts as a table whose cells are the darker, the larger their share of the row; a row begins
    with its name.
    """
    up = ' class="up"' if len(columns) > 4 else ""
    out = [
        f"<tr><th>{escape(corner)}</th>{''.join(f'<th{up}>{escape(c)}</th>' for c in columns)}</tr>"
    ]
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
    """Rows of pictures with lines of text below; `columns` are then of one width, else pictures
    wrap.
    """
    out = []
    for row in rows:
        most = max((card.get("share", 0) for card in row["cards"]), default=0)
        cards = []
        for card in row["cards"]:
            bar = (
                f'<span class="b"><i style="--v:{card["share"] / most:.2f}"></i></span>'
                if most
                else ""
            )
            said = "<br/>".join(escape(line) for line in card["lines"])
            alt = escape(", ".join(card["lines"]))
            image = f'<img alt="{alt}" src="{escape(card["image"])}"/>'
            tone = escape(card.get("tone", ""))
            cards.append(
                f'<figure class="card {tone}">{image}{bar}<figcaption>{said}</figcaption></figure>'
            )
        named = " named" * any(len(line) > 6 for card in row["cards"] for line in card["lines"])
        form = f' k{named}" style="--k:{columns}' if columns else ""
        out.append(f"<h4>{escape(row['title'])}</h4>" if row["title"] else "")
        out.append(f'<div class="cards{form}">{"".join(cards)}</div>')
    return "".join(out)


def text_cards(header: list[str], rows: list) -> str:
    """Rows of a table as cards: the first cell is the title, of the others each has its name."""
    out = []
    for first, *rest in rows:
        named = [
            (h, escape(v).replace(" | ", "<br/>· "))
            for h, v in zip(header[1:], rest, strict=True)
            if v != ""
        ]
        lines = [f"<span>{escape(h)}:</span> {'<br/>· ' * ('<br/>' in v)}{v}" for h, v in named]
        out.append(
            f"<div><b>{escape(header[0])} {escape(first)}</b><br/>{'<br/>'.join(lines)}</div>"
        )
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
        return gallery(
            [row | {"cards": row["cards"][: math.ceil(detail * len(row["cards"]))]} for row in rows]
        )
    if kind == "matrix":
        return matrix(found["corner"], found["columns"], found["rows"])
    if kind == "table":
        return table(found["rows"], found["header"])
    if kind == "bars":
        return f'<div class="one">{charts.bars(title, found["rows"], label=found["label"], levels=found["levels"])}</div>'
    labels = dict(x_label=found["x_label"], y_label=found["y_label"])
    if kind == "scatter":
        step = math.ceil(1 / max(detail, 0.05))
        points, groups = found["points"][::step], found["groups"][::step]
        drawn = charts.scatter(
            title, points, groups, found["names"], labels=found.get("labels", False), **labels
        )
        return f'<div class="one">{drawn}</div>'
    more = {name: found[name] for name in ("bands", "diagonal", "frame", "values") if name in found}
    return f'<div class="one">{charts.lines(title, found["series"], **labels, **more, most=_points(detail))}</div>'


def embedded(path: Path, detail: float) -> str:
    """A picture's file as a data: address: SVG as it is, others as PNG or JPEG, what is smaller, at
    most 1000 pixels wide at full detail.
    """
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


def write(folder: Path, status: str | None = None) -> Path:
    """Write report.html of a run directory, never seen half written; returns its path.

    `status` is that of a run that goes on; unset: summary.json says how it ended, and the curves
    are written as files to figures/ too. A directory that holds but check.json gets a report of
    that.
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
        for stage, drawings in run.charts(1.0).items():
            for metric, drawn in drawings.items():
                (figures / f"{stage}_{metric}.svg").write_text(charts.standalone(drawn))
    return path


def page_of(run: Record, detail: float) -> bytes:
    """The report as bytes; `detail` is the share of points and pixels that is shown."""
    script = run.settings["resolved"].get("script")
    drawings = run.charts(detail)
    made = (
        results_part(run),
        check_part(run, detail),
        curves_part(drawings),
        findings_part(run, detail),
    )
    parts = {title: body for title, body in (*made, system_part(drawings)) if body}
    everything = [
        (
            "All metrics",
            sorted(
                (name, value)
                for name, value in (run.summary or run.scores).items()
                if value is not None
            ),
        ),
        (
            "Flags",
            sorted((k, v) for k, v in run.settings.items() if k not in ("resolved", "identity")),
        ),
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
    body = "".join(
        f'<h2 id="p{i}">{escape(name)}</h2>{text}' for i, (name, text) in enumerate(parts.items())
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><model_spec charset="utf-8"/>'
        f'<model_spec http-equiv="Content-Security-Policy" content="{policy}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"{''.join(head)}<nav>{links}</nav>{body}</body></html>\n"
    )
    return page.encode("utf-8", "replace")


def tiles(run: Record) -> str:
    """The few figures that matter most, large."""
    names = [name for name in HEADLINES if isinstance(run.scores.get(name), (int, float))][:4]
    out = []
    for name in names:
        value, _, rest = interval_text(run.scores, name).partition(" ")
        more = [rest] if rest else []
        stage, split, metric = name.split("/")
        for other in (f"majority/{split}/{metric}", f"{stage}/{split}/majority_{metric}"):
            if isinstance(run.scores.get(other), (int, float)):
                more.append(f"majority class {run.scores[other]:.4f}")
        out.append(f'<div class="tile"><b>{value}</b><span>{escape(HEADLINES[name])}</span>')
        out.append("".join(f"<span>{escape(text)}</span>" for text in more) + "</div>")
    return f'<div class="tiles">{"".join(out)}</div>' if out else ""


def facts(run: Record) -> str:
    """What was run, on what, and how it stands."""
    env = run.env
    device = (
        env.get("gpu")
        if env.get("gpu") and "cpu" not in env.get("device", "")
        else f"CPU, {env.get('cpus')} cores"
    )
    many = f", {env['processes']} processes" if env.get("processes", 1) > 1 else ""
    commit = (env.get("commit") or "unknown")[:12] + ", with uncommitted changes" * bool(
        env.get("uncommitted_changes")
    )
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
        rows.insert(
            1,
            (
                "selected",
                f"epoch {run.summary['best_epoch']}: {run.summary.get('best_model_path')}",
            ),
        )
    return table(rows, form=' class="f"')


def results_part(run: Record) -> tuple[str, str]:
    """The test metrics: of stages side by side, with intervals, and the last epoch's beside the
    selected one's.
    """
    scores, body = run.scores, []
    columns = ("accuracy", "macro_precision", "macro_recall", "macro_f1")
    tests = list(
        dict.fromkeys(name.split("/")[0] for name in scores if name.endswith("/test/accuracy"))
    )
    if tests:
        rows = [
            (name, *(scores.get(f"{name}/test/{column}", "") for column in columns))
            for name in tests
        ]
        body += [table(rows, ("stage", *columns)), f'<p class="t">{escape(_BASELINES)}</p>']
    names = [n for n in ("uar", "war") if f"train/test/{n}" in scores]
    if names:
        rows = [
            (n.upper(), *(interval_text(scores, f"train/test/{n}{last}") for last in ("", "_last_epoch")),
             interval_text(scores, f"train/test/majority_{n}"))
            for n in names
        ]  # fmt: skip
        body.append(
            table(rows, ("", "selected epoch (95 % interval)", "last epoch", "majority class"))
        )
    body += detection_section(scores) + loss_section(scores, run.settings)
    return "Results", "".join(body + own_tables(run.folder, "results"))


def own_tables(folder: Path, part: str) -> list[str]:
    """A script's own tables for a part of the report: tables.json, title -> {"header", "rows"}, and
    where they differ from a plain one in the last part, "text" above it, "as" `cards` or
    `matrix`, "part" `results`.
    """
    file, out = folder / "tables.json", []
    for title, found in json.loads(file.read_text()).items() if file.exists() else ():
        if found.get("part", "findings") == part:
            draw = {"cards": text_cards, "matrix": lambda h, r: matrix(h[0], h[1:], r)}
            drawn = draw.get(found.get("as"), lambda h, r: table(r, h))(
                found["header"], found["rows"]
            )
            said = f'<p class="t">{escape(found["text"])}</p>' if found.get("text") else ""
            out.append(f"<h3>{escape(title)}</h3>{said}{drawn}")
    return out


def detection_section(scores: dict) -> list[str]:
    """Test metrics of a detector on videos, those of the selected epoch and those of the last one."""
    rows = []
    for last, name in (("", "selected epoch"), ("_last_epoch", "last epoch")):
        if f"train/test/video_auc{last}" in scores:
            found = (
                scores[f"train/test/video_{c}{last}"] for c in ("auc", "ap", "eer", "accuracy")
            )
            rows.append((name, *found, scores[f"train/test/clip_auc{last}"]))
    return (
        [table(rows, ("test videos", "AUC", "AP", "EER", "accuracy", "AUC of clips"))]
        if rows
        else []
    )


def loss_section(scores: dict, settings: dict) -> list[str]:
    """NT-Xent in both conventions, beside its chance level: losses of different batch sizes are not
    comparable.
    """
    loss, chance = scores.get("pretrain/train/loss"), scores.get("pretrain/train/loss_at_chance")
    if loss is None or chance is None:
        return []
    rows = [
        ("averaged over the 2N rows (this project's, lightly's)", loss, chance, loss / chance),
        (
            "the two views' averages summed (google-research/simclr's)",
            2 * loss,
            2 * chance,
            loss / chance,
        ),
    ]
    batch = settings["resolved"]["pretrain"]["bs"]
    return [
        "<h3>Contrastive loss (NT-Xent)</h3>",
        table(rows, ("convention", "last epoch's mean", "chance level", "ratio")),
        f'<p class="t">Batch {batch}: a guess among 2N-1 = {2 * batch - 1} candidates costs'
        f" ln({2 * batch - 1}) ="
        f" {chance:.4f}. Compare the ratio, not the loss, between batch sizes.</p>",
    ]


def check_part(run: Record, detail: float) -> tuple[str, str]:
    """The statuses of --check, with what each one showed."""
    title = "Checks of the training recipe"
    if not run.check:
        return title, ""
    items = run.check["items"]
    counts = [
        f"{sum(i['status'] == v for i in items)} {v}" for v in ("FAIL", "WARN", "PASS", "SKIP")
    ]
    rows, shown = [], []
    for item in items:
        status = item["status"]
        cells = [escape(item[name]) for name in ("item", "value", "threshold", "fix")]
        rows.append(f'<tr><td class="status {escape(status)}">{escape(status)}</td>')
        rows.append(
            "".join(f'<td class="w">{c}</td>' if len(c) > 40 else f"<td>{c}</td>" for c in cells)
            + "</tr>"
        )
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
    said = (
        f"{', '.join(counts)}, in {log.duration(run.check['seconds'])}. Command:"
        f" {run.check['command']}"
    )
    items = f'<div class="wide"><table class="stack"><tr>{head}</tr>{"".join(rows)}</table></div>'
    return title, f'<p class="t">{escape(said)}</p>{items}{more}'


def curves_part(stages: dict[str, dict[str, str]]) -> tuple[str, str]:
    """Curves of every stage, the most telling first; the others are folded away."""
    body = []
    for stage, drawings in stages.items():
        order = sorted(drawings, key=lambda m: FIRST.index(m) if m in FIRST else len(FIRST))
        drawn = {m: chart_figure(title_of(m), m, drawings[m]) for m in order if m not in SYSTEM}
        first = [d for m, d in drawn.items() if m in FIRST]
        rest = [d for m, d in drawn.items() if m not in FIRST]
        body.append(f'<h3>Stage {escape(stage)}</h3><div class="charts">{"".join(first)}</div>')
        if rest:
            body.append(
                f"<details><summary>{len(rest)} more</summary><div"
                f' class="charts">{"".join(rest)}</div></details>'
            )
    said = (
        '<p class="t">The figure in a legend is the last value. batch: the loss of single'
        " steps; train: the mean of an"
    )
    said += (
        " epoch; val (or dev): items held out from training. Dotted vertical lines: the run"
        " was resumed there, or a"
    )
    said += " phase of its schedule begins.</p>"
    return "Curves", said + "".join(body) if body else ""


def schedule_section(run: Record) -> str:
    """The phases of a schedule as a table, over the epochs that the run has."""

    written = run.settings["resolved"].get("schedule")
    if not written:
        return ""
    phases = tuple(Phase(**phase) for phase in written[1:])
    head, *rows = (
        Schedule(written[0], phases).scaled(run.settings["resolved"]["train"]["epochs"]).cells()
    )
    said = (
        "What changes in which epochs (counted from 0): how clips are drawn, the strength tau"
        " of the logit adjustment,"
    )
    said += " the weights of the losses, and the factor of the learning rate."
    return f'<h3>Schedule</h3><p class="t">{said}</p>{table(rows, head)}'


def findings_part(run: Record, detail: float) -> tuple[str, str]:
    """What the script itself has to show: its pictures, matrices, curves and errors."""
    figures, body = run.folder / "figures", []
    used = {
        Path(name).name
        for item in (run.check or {"items": []})["items"]
        for name in item.get("pictures") or []
    }
    for file in sorted(figures.glob("*.png")) if figures.exists() else ():
        if file.name not in used:
            said = escape(_CAPTIONS.get(file.stem, ""))
            picture = f'<img alt="{escape(file.stem)}" src="{embedded(file, detail)}"/>'
            body.append(
                f"<h3>{escape(file.stem.replace('_', ' ').capitalize())}</h3><p"
                f' class="t">{said}</p>{picture}'
            )
    body.append(schedule_section(run))
    first = len(body)

    def place(file: Path):
        return next(
            (i for i, name in enumerate(_ORDER) if file.stem.startswith(name)), len(_ORDER)
        ), file.stem

    for file in sorted(figures.glob("*.json"), key=place) if figures.exists() else ():
        found = json.loads(file.read_text())
        if "kind" in found:  # else it is another tool's
            said = f'<h3>{escape(found["title"])}</h3><p class="t">{escape(found["text"])}</p>'
            form = ' class="half"' * (found["kind"] in ("matrix", "bars", "lines", "scatter"))
            body.append(f"<section{form}>{said}{finding(found, detail)}</section>")
    body = [
        "".join(body[:first]),
        f'<div class="found">{"".join(body[first:])}</div>' if body[first:] else "",
    ]
    return "What the model sees and says", "".join(body + own_tables(run.folder, "findings"))


def system_part(stages: dict[str, dict[str, str]]) -> tuple[str, str]:
    """Throughput, waiting for data, memory."""
    drawn = []
    for stage, drawings in stages.items():
        drawn += [
            chart_figure(f"{stage}: {name}", m, drawings[m])
            for m, name in zip(SYSTEM, ("throughput", "data wait", "memory"), strict=True)
            if m in drawings
        ]
    return "System", f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""
