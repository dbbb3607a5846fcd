"""report.html of small real runs of all four scripts: what a browser makes of it, and whether its
numbers are right.
"""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common.report import __main__, charts, compare, figures, page
from common.report.curves import curves_of
from common.report.record import LIMIT, Record
from common.run import log
from common.run.files import FORMAT
from tests.data import cells_tree, ffpp_tree, raer_tree, utterances_tsv
from tests.runs import flags

pytestmark = pytest.mark.e2e

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EVIL = '<script>alert("x")<b>'  # a class's name
CLASSES = ("round", EVIL, "a class with quite a long name, as labels are")
EMOTIONS = {"train": (14, 6, 4), "val": (2, 2, 2), "test": (4, 4, 4)}
WORDS = {
    "ask": "what are you doing",
    "tell": "i was there last week",
    EVIL: "<img src=x onerror=alert(1)> hello",
}
SVG = "{http://www.w3.org/2000/svg}"
SCRIPTS = ("simclr", "tsm", "raer", "cluster")
CPU = ["--device", "cpu", "--seed", "3"]


def command_line(text, data, out):
    return [*text.split(), "--data", str(data), "--out", str(out), *CPU]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each script by its name, that of SimCLR interrupted and resumed."""
    root = tmp_path_factory.mktemp("runs")
    simclr = command_line(
        "--backbone resnet18 --stem cifar --image-size 8 --stage all --bs 16 --epochs 3"
        " --linear-solver sgd --linear-bs 16 --linear-epochs 4"
        " --finetune-bs 16 --finetune-epochs 2 --log-every 1",
        cells_tree(root / "cells", classes=CLASSES),
        root / "simclr",
    )
    with pytest.raises(SystemExit):
        train_simclr.main([*simclr, "--max-steps", "4"])
    assert train_simclr.main(simclr) == 0
    tsm = command_line(
        "--backbone conv_small_035 --image-size 32 --n-segment 4 --bs 8 --epochs 3"
        " --eval-every 1 --clips 2",
        ffpp_tree(root / "ffpp"),
        root / "tsm",
    )
    assert train_tsm.main(tsm) == 0
    raer = command_line(
        "--backbone vit_tiny --num-frames 2 --bs 8 --epochs 4 --cache-features",
        raer_tree(root / "emotions", EMOTIONS, ("calm", EVIL, "puzzled")),
        root / "raer",
    )
    assert train_raer.main(raer) == 0
    cluster = command_line(
        "--base-dim 16 --bs 32 --epochs 2 --cluster-bs 32 --cluster-epochs 3",
        utterances_tsv(root / "acts.tsv", WORDS),
        root / "cluster",
    )
    assert train_cluster.main(cluster) == 0
    return {name: root / name for name in SCRIPTS}


def parsed(file):
    """The page as strict XML: a browser forgives what this does not."""
    return ET.fromstring(file.read_text().replace("<!DOCTYPE html>", ""))


MEASURE = """
const found = {};
for (const frame of document.querySelectorAll('iframe')) {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll('details').forEach(d => d.open = true);
  const meets = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
                          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const overlaps = [], outside = [];
  for (const svg of page.querySelectorAll('svg')) {
    const box = svg.getBoundingClientRect(), name = svg.getAttribute('aria-label');
    const texts = [...svg.querySelectorAll('text')].map(
      t => [t.textContent, t.getBoundingClientRect()]
    );
    texts.forEach(([text, a], i) => {
      if (a.left < box.left - 1 || a.right > box.right + 1 || a.bottom > box.bottom + 1)
        outside.push([name, text]);
      texts.slice(i + 1).forEach(([other, b]) => {
        if (meets(a, b)) overlaps.push([name, text, other]);
      });
    });
  }
  const boxes = [...page.querySelectorAll('.card,.tile,.texts div,h2,h3,h4,p')];
  const cards = boxes.map(c => [c, c.getBoundingClientRect()]);
  cards.forEach(([one, a], i) => cards.slice(i + 1).forEach(([two, b]) => {
    if (!one.contains(two) && meets(a, b)) overlaps.push([one.textContent, two.textContent]);
  }));
  const heights = [...page.querySelectorAll('svg text')].map(
    t => t.getBoundingClientRect().height
  );
  found[frame.width] = {
    width: page.documentElement.scrollWidth,
    overlaps,
    outside,
    smallest: Math.min(...heights),
    cut: [...page.querySelectorAll('.found .wide')].filter(
      table => table.scrollWidth > table.clientWidth
    ).length,
    charts: heights.length,
    broken: [...page.images].filter(i => !i.naturalWidth).length,
    images: page.images.length,
    requests: view.performance.getEntriesByType('resource').map(e => e.name),
  };
}
document.getElementById('found').textContent = JSON.stringify(found);
"""


def measured(file, folder):
    """What headless Chromium finds in a page 400 and 1400 pixels wide, all of it unfolded."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    content = html.escape(file.read_text())
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{content}"></iframe>'
        for width in (400, 1400)
    )
    harness = folder / "harness.html"
    harness.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><style>iframe{border:0}</style>'
        f'{frames}<pre id="found"></pre>'
        f"<script>addEventListener('load', () => {{{MEASURE}}})</script>"
    )
    command = flags(
        CHROMIUM,
        "--headless --no-sandbox --disable-gpu --enable-logging=stderr --window-size=1900,2000",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        harness.as_uri(),
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    result = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]
    return json.loads(html.unescape(result)), console


def is_sound(file, folder):
    by_width, console = measured(file, folder)
    assert console == []
    for width, facts in by_width.items():
        assert facts["width"] <= int(width), "the page is wider than the screen"
        assert facts["overlaps"] == [] and facts["outside"] == []
        assert facts["requests"] == [] and facts["broken"] == 0
        assert facts["charts"] > 5 and facts["smallest"] > 9  # pixels: texts stay readable
    return by_width


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_browser_shows_it_on_a_phone_and_on_a_screen(runs, script, tmp_path):
    by_width = is_sound(runs[script] / "report.html", tmp_path)
    assert (by_width["400"]["images"] > 0) == (script != "cluster")


def test_a_screen_shows_the_whole_matrix_of_many_classes(runs, tmp_path):
    folder = shutil.copytree(runs["simclr"], tmp_path / "run")
    classes = [f"class number {i}" for i in range(20)]
    counts = [[name, *[i * 7] * len(classes)] for i, name in enumerate(classes)]
    figures.put(
        folder,
        "confusion_linear",
        "matrix",
        "Confusion",
        "",
        corner="true",
        columns=classes,
        rows=counts,
    )
    shares = [(f"{name} (1234)", 0.5, 0.4, 0.6) for name in classes]
    figures.put(
        folder, "recall_linear", "bars", "Recall", "", label="recall", rows=shares, levels={}
    )
    file = page.write(folder)
    by_width = is_sound(file, tmp_path)
    assert by_width["1400"]["cut"] == 0 < by_width["400"]["cut"]
    assert "class number 19 (1234)" in file.read_text()


TITLES = {
    "simclr": {
        "Nearest neighbors",
        "Features on their first two principal axes",
        "Errors on the test split, stage finetune",
        "Confusion matrix of the test split, stage linear",
    },
    "tsm": {
        "Which frames count",
        "ROC curve, test videos",
        "Test videos by method of manipulation",
    },
    "raer": {
        "Confusion matrix of the test split, stage train",
        "Recall of each class of the test split, stage train",
        "Schedule",
    },
    "cluster": {
        "Utterances and their clusters",
        "Clusters",
        "Clusters and labels, test",
        "Monitor",
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_is_well_formed_small_and_escapes_what_the_data_say(runs, script):
    file = runs[script] / "report.html"
    tree = parsed(file)
    assert file.stat().st_size < 400_000 < LIMIT
    assert not {e.tag for e in tree.iter()} & {"script", "b2", "link", "iframe", "object"}
    assert all(e.attrib["src"].startswith("data:image/") for e in tree.iter("img"))
    assert [e.attrib.get("charset") for e in tree.iter("meta")][0] == "utf-8"
    for element in tree.iter():
        assert not [name for name in element.attrib if name.startswith("on")]
        assert "#" in element.attrib.get("href", "#")
    words = "".join(tree.itertext())
    if script != "tsm":
        assert EVIL in words
    sections = {e.text for e in tree.iter("h2")}
    assert {"Results", "Curves", "System", "Everything else"} <= sections
    assert TITLES[script] <= {e.text for e in tree.iter("h3")}
    env = json.loads((runs[script] / "env.json").read_text())
    assert "finished after" in words and env["data_read"] in words and env["command"] in words


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_speaks_with_the_words_of_the_card(runs, script):
    card = json.loads((runs[script] / "config.json").read_text())["card"]
    tree = parsed(runs[script] / "report.html")
    words = "".join(tree.itertext())
    assert card["about"] in words and f"{card['items']} a second" in words
    tiles = [e for e in tree.iter("div") if e.attrib.get("class") == "tile"]
    shown = [tile.find("span").text for tile in tiles]
    scores = json.loads((runs[script] / "summary.json").read_text())
    captions = [caption for name, caption in card["headlines"].items() if name in scores]
    assert shown == captions[:4] and shown
    assert "headlines" not in words  # a setting of no one


def test_a_run_without_a_card_has_a_page(runs, tmp_path):
    folder = shutil.copytree(runs["raer"], tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    del config["card"]
    (folder / "config.json").write_text(json.dumps(config))
    words = "".join(parsed(page.write(folder)).itertext())
    assert "items a second" in words and "a guess, ln" not in words
    assert "train/test/uar" in compare.text_of(Record(folder))


def test_a_schedule_is_shown_as_a_table(tmp_path):
    table = {"header": ["epochs", "sampler"], "rows": [["[0, 2)", "random"]], "text": "What & when"}
    (tmp_path / "tables.json").write_text(json.dumps({"Schedule": table}))
    drawn = page.own_tables(tmp_path, "findings")
    assert drawn.startswith('<h3>Schedule</h3><p class="t">What &amp; when</p>')
    assert "<td>[0, 2)</td><td>random</td>" in drawn
    assert page.own_tables(tmp_path, "results") == ""


def drawn_lines(tree):
    """Title of each chart -> its lines as (x, y) in the data's units, and how far a point may be
    off by rounding.
    """
    by_title = {}
    for svg in tree.iter(f"{SVG}svg"):
        if "data-axes" not in svg.attrib:
            continue
        x0, x1, left, right, y0, y1, bottom, top = map(float, svg.attrib["data-axes"].split())
        x_unit = (x1 - x0) / (right - left)
        y_unit = (y1 - y0) / (bottom - top)
        lines = [
            [tuple(map(float, p.split(","))) for p in e.attrib["points"].split()]
            for e in svg.iter(f"{SVG}polyline")
        ]
        dots = [
            [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in g.iter(f"{SVG}circle")]
            for g in svg.iter(f"{SVG}g")
        ]
        lines += [line for line in dots if len(line) == 1]
        data = [
            [(x0 + (x - left) * x_unit, y0 + (bottom - y) * y_unit) for x, y in line]
            for line in lines
        ]
        drawings = by_title.setdefault(svg.attrib["aria-label"], [])
        drawings.append((data, 0.051 * x_unit, 0.051 * y_unit))
    return by_title


def test_a_baseline_is_no_point_of_a_curve():
    lines = [
        {"stage": "cluster", "step": 1, "epoch": 1, "cluster/train/stability": 0.7},
        {
            "stage": "cluster",
            "step": 2,
            "epoch": 2,
            "cluster/train/stability": 0.8,
            "kmeans_plain/train/stability": 0.1,
        },
    ]
    assert curves_of(lines)["cluster"]["stability"]["series"] == {"train": [(1, 0.7), (2, 0.8)]}


NOT_DRAWN = ("stage", "step", "epoch", "time", "eta_s", "loss_over_chance", "tau")


def is_drawn(name, value):
    parts = name.split("/")
    metric = parts[-1]
    if value is None or metric in NOT_DRAWN or metric.endswith(("_low", "_high")):
        return False
    if len(parts) < 3:
        return True
    if parts[0].startswith("kmeans_"):  # measured once, before training; in a table
        return False
    return parts[1] in ("train", "val") and not metric.startswith(("recall_", "majority_"))


def holds(drawings, points):
    """Whether a line of a chart has these points."""
    return any(
        len(line) == len(points)
        and all(
            abs(x - step) <= dx and abs(y - value) <= dy
            for (x, y), (step, value) in zip(line, points, strict=True)
        )
        for lines, dx, dy in drawings
        for line in lines
    )


def table_rows(tree):
    return [["".join(td.itertext()) for td in row] for row in tree.iter("tr")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_curves_and_tables_hold_the_numbers_of_the_log(runs, script):
    tree = parsed(runs[script] / "report.html")
    expected = {}
    for line in log.read(runs[script]):
        stage = line["stage"].split("_")[0]
        for name, value in line.items():
            own = name.count("/") < 2 or name.startswith(line["stage"] + "/")  # else in a table
            if own and is_drawn(name, value):
                key = (f"{stage}: {name.split('/')[-1]}", line["stage"], name)
                expected.setdefault(key, []).append((line["step"], value))
    assert len(expected) > 8
    by_title = drawn_lines(tree)
    for (title, _, name), points in expected.items():
        assert holds(by_title[title], points), f"{title} does not hold {name}: {points}"
    rows = table_rows(tree)
    for name, value in json.loads((runs[script] / "summary.json").read_text()).items():
        if isinstance(value, float) and abs(value) >= 1e-3:
            assert [name, f"{value:.4f}"] in rows


def test_stages_resumes_and_guesses_are_marked(runs):
    tree = parsed(runs["simclr"] / "report.html")
    svg = next(e for e in tree.iter(f"{SVG}svg") if e.attrib["aria-label"] == "pretrain: loss")
    x0, x1, left, right, y0, y1, bottom, top = map(float, svg.attrib["data-axes"].split())
    mark = next(e for e in svg.iter(f"{SVG}path") if e.attrib["class"] == "m").attrib["d"]
    at = float(re.match(r"M([\d.]+) ", mark)[1])
    step = x0 + (at - left) * (x1 - x0) / (right - left)
    assert step == pytest.approx(4, abs=0.05)  # where --max-steps stopped it
    level = next(e for e in svg.iter(f"{SVG}path") if e.attrib["class"] == "v").attrib["d"]
    height = float(re.match(r"M[\d.]+ ([\d.]+)H", level)[1])
    loss = y0 + (bottom - height) * (y1 - y0) / (bottom - top)
    assert loss == pytest.approx(np.log(31), abs=0.01)  # 2 x 16 - 1
    words = "".join(svg.itertext())
    assert "resumed" in words and "a guess, ln(2N-1) 3.434" in words
    titles = [e.text for e in tree.iter("h3")]
    assert titles[1:4] == ["Stage pretrain", "Stage linear", "Stage finetune"]
    assert (runs["simclr"] / "finetune" / "confusion.csv").exists()


def test_a_run_that_goes_on_says_where_it_is(runs, tmp_path):
    folder = shutil.copytree(runs["tsm"], tmp_path / "run")
    (folder / "summary.json").unlink()
    lines = log.read(folder)
    last = next(i for i, line in enumerate(lines) if "eta_s" in line)
    lines[last] |= {"eta_s": 7260.0, "step": 5, "epoch": 2, "time": 61.0}
    (folder / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines[: last + 1])
    )
    words = "".join(parsed(page.write(folder, "running")).itertext())
    state = "running in train, step 5, epoch 2 of 3, after 1m; this stage takes about 2h01m more"
    assert state in words
    words = "".join(parsed(page.write(folder)).itertext())
    assert "running or killed in train, step 5" in words
    (folder / "log.jsonl").unlink()  # before the first line
    parsed(page.write(folder, "running"))


def test_it_is_written_while_the_run_goes_on_but_seldom(tmp_path, monkeypatch):
    now = [0.0]
    written = []
    monkeypatch.setattr(page.time, "monotonic", lambda: now[0])

    def write(folder, status):
        written.append((now[0], status))
        now[0] += 2

    monkeypatch.setattr(page, "write", write)
    live = page.Live(tmp_path, print)
    for _ in range(300):
        live()
        now[0] += 1
    assert written[0] == (0.0, "running")
    assert len(written) == 3
    assert all(b[0] - a[0] >= 100 for a, b in zip(written, written[1:], strict=False))

    def full(folder, status):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write", full)
    lines = []
    live = page.Live(tmp_path, lines.append)
    live()
    now[0] += 1000
    live()
    assert len(lines) == 1 and "No space left" in lines[0] and "goes on" in lines[0]


def test_a_long_run_with_large_pictures_stays_below_the_limit(runs, tmp_path):
    folder = shutil.copytree(runs["tsm"], tmp_path / "run")
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "a") as file:
        for step in range(2_000):
            values = {f"metric {i}": float(v) for i, v in enumerate(rng.normal(size=12))}
            line = {"stage": "train", "step": step, "epoch": 1, **values, "time": 1.0}
            file.write(json.dumps(line) + "\n")
    for i in range(3):
        pixels = rng.integers(0, 256, (900, 1600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "figures" / f"big{i}.png")
    noisy = torch.from_numpy(rng.integers(0, 256, (3, 96, 288), dtype=np.uint8))
    card = {"image": figures.picture(noisy), "lines": ["x"]}
    for columns in (None, 40):
        rows = [{"title": "a row", "cards": [card] * 40}] * 3
        figures.put(
            folder, f"errors_{columns}", "gallery", "Errors", "", rows=rows, columns=columns
        )
    file = page.write(folder)
    assert 30_000 < file.stat().st_size <= LIMIT
    parsed(file)


def test_charts_say_what_they_leave_out():
    series = {f"class {i}": [(0, i), (1, i)] for i in range(20)}
    assert "and 6 more" in charts.lines("recall", series, x_label="step", y_label="recall")
    points = np.random.default_rng(0).normal(size=(90, 2))
    groups = [i % 45 for i in range(90)]
    names = [f"class {i}" for i in range(45)]
    drawn = charts.scatter("features", points, groups, names, x_label="a", y_label="b")
    assert "and 5 more" in drawn and drawn.count("h0") >= 90


def test_checks_are_shown_with_their_rows_and_pictures(runs, tmp_path):
    folder = shutil.copytree(runs["raer"], tmp_path / "run")
    Image.new("RGB", (30, 20), "red").save(folder / "figures" / "check_inputs.png")
    bad = {
        "item": "loss-at-init",
        "status": "FAIL",
        "value": "1.0986",
        "threshold": "0.6 to 0.7",
        "fix": f"fix {EVIL}",
        "pictures": ["figures/check_inputs.png"],
        "rows": [["truth", "said"], ["x", EVIL]],
    }
    good = {"item": "seed", "status": "PASS", "value": "equal", "threshold": "equal", "fix": ""}
    check = {
        "command": "train_raer.py --check",
        "card": dataclasses.asdict(train_raer.CARD),
        "seconds": 12.0,
        "items": [bad, good],
    }
    (folder / "check.json").write_text(json.dumps(check))
    file = page.write(folder)
    tree = parsed(file)
    words = "".join(tree.itertext())
    assert "1 FAIL, 0 WARN, 1 PASS, 0 SKIP" in words
    assert f"fix {EVIL}" in words and "loss-at-init" in words
    assert [e.attrib["alt"] for e in tree.iter("img")].count("figures/check_inputs.png") == 1
    assert "Check inputs" not in words  # not a second time among the run's own pictures
    if CHROMIUM:
        is_sound(file, tmp_path)
    alone = tmp_path / "alone"  # checked before any run
    alone.mkdir()
    (alone / "check.json").write_text(json.dumps(check))
    words = "".join(parsed(page.write(alone)).itertext())
    assert "checked, not trained" in words and f"fix {EVIL}" in words
    assert train_raer.CARD.about in words


def test_runs_are_compared_on_a_page_and_on_a_terminal(runs, tmp_path, capsys):
    folders = [runs["raer"], shutil.copytree(runs["raer"], tmp_path / "other"), runs["tsm"]]
    config = json.loads((folders[1] / "config.json").read_text())
    config["identity"]["dropout"] = config["dropout"] = 0.625
    (folders[1] / "config.json").write_text(json.dumps(config))
    summary = json.loads((folders[1] / "summary.json").read_text())
    summary |= {"train/test/uar": 0.8125, "train/test/uar_low": 0.75, "train/test/uar_high": 0.875}
    (folders[1] / "summary.json").write_text(json.dumps(summary))
    pair = list(map(str, folders[:2]))
    assert __main__.main([*pair, "--out", str(tmp_path / "both.html")]) == 0
    tree = parsed(tmp_path / "both.html")
    rows = {row[0]: row[1:] for row in table_rows(tree)}
    assert rows["dropout"] == ["0.1", "0.625"] and "seed" not in rows
    assert rows["train/test/uar"][1] == "0.8125 (0.7500 to 0.8750) *"
    assert rows["command"][0].startswith("python ") and "clips" in rows["data"][0]
    assert rows["hardware"][0].startswith("CPU")
    assert len(drawn_lines(tree)["train: uar"][0][0]) == 2  # a line of each run
    titles = ["".join(caption.itertext()).strip() for caption in tree.iter("figcaption")]
    assert titles[:2] == [
        "train: loss, train Lower is better.",
        "train: UAR, val Recall averaged over the classes, each counting the same.",
    ]
    if CHROMIUM:
        is_sound(tmp_path / "both.html", tmp_path)
    capsys.readouterr()
    assert __main__.main([*pair, "--text"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^dropout +0\.1 +0\.625$", text, re.M)
    assert "0.8125 (0.7500 to 0.8750)" in text
    assert __main__.main([str(folders[2]), "--text"]) == 0
    assert re.search(
        r"^train/test/video_auc +0\.\d+ \(.*?\) +0\.\d+( \(.*\))?$", capsys.readouterr().out, re.M
    )
    three = tmp_path / "three.html"  # other scripts side by side
    assert __main__.main([*map(str, folders), "--out", str(three)]) == 0
    names = [row[0] for row in table_rows(parsed(three)) if row[0].startswith("train/test/")]
    headlines = ["train/test/uar", "train/test/war", "train/test/video_auc"]
    assert names[:3] == headlines  # in the order of the runs


def test_runs_that_differ_in_a_setting_get_a_pivot_table(tmp_path, capsys):
    for seed in range(3):
        for rate in (0.1, 0.2):
            folder = tmp_path / f"{rate}-{seed}"
            folder.mkdir()
            identity = {"lr": rate, "seed": seed}
            card = {"headlines": {"train/test/uar": "UAR"}}
            config = {
                **identity,
                "format": FORMAT,
                "identity": identity,
                "resolved": {},
                "card": card,
            }
            (folder / "config.json").write_text(json.dumps(config))
            summary = {"status": "finished", "seconds": 1, "train/test/uar": rate + seed / 10}
            (folder / "summary.json").write_text(json.dumps(summary))
    assert __main__.main([str(tmp_path), "--text"]) == 0
    text = capsys.readouterr().out
    assert "| 0.1 | 0.2000 ± 0.2484 (3) |" in text  # Student: 4.303 x 0.1 / sqrt(3)
    assert compare.names_of([{"run": "a/x"}, {"run": "b/x"}]) == ["a/x", "b/x"]


def test_decimation_keeps_the_extremes_and_both_ends():
    rng = np.random.default_rng(0)
    line = [(i, float(v)) for i, v in enumerate(rng.normal(size=5000))]
    kept = charts.thin(line, 200)
    assert len(kept) <= 201 and kept[0] == line[0] and kept[-1] == line[-1]
    for extreme in (min, max):
        assert extreme(p[1] for p in kept) == extreme(p[1] for p in line)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([0, 500, 1000, 1500], ["0", "500", "1,000", "1,500"]),
        ([0, 20000, 40000], ["0", "20k", "40k"]),
        ([0, 1e-4, 3e-4], ["0", "0.0001", "0.0003"]),
        ([2e-5, 4e-5], ["2e-5", "4e-5"]),
    ],
)
def test_tick_labels_are_short_and_alike(values, expected):
    assert charts.tick_texts(values) == expected


def seen(color, matrix):
    """A color as CIE Lab, as who lacks a kind of cone sees it (Vienot, Brettel and Mollon 1999)."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ (matrix @ linear)
    f = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 1e-9))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


VISION = {
    "all cones": np.eye(3),
    "no red cones": np.array(
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
    ),
    "no green cones": np.array(
        [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
    ),
}


@pytest.mark.parametrize("palette", [charts._LIGHT, charts._DARK])
@pytest.mark.parametrize("kind", VISION)
def test_colors_differ_for_every_color_vision(palette, kind):
    lab = [seen(color, VISION[kind]) for color in palette]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(lab) for b in lab[i + 1 :]]
    assert min(distances) > 9  # 2 is a just noticeable difference
    first = [np.linalg.norm(a - b) for i, a in enumerate(lab[:4]) for b in lab[i + 1 : 4]]
    assert min(first) > 18  # most charts have at most four lines
