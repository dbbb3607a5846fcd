"""report.html of small real runs of all four scripts: what a browser makes of it, and whether its
numbers are right.
"""

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
from common.report.record import LIMIT
from common.run import log
from tests.test_train_tsm import ffpp_tree

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EVIL = '<script>alert("x")<b>'  # a class's name
SVG = "{http://www.w3.org/2000/svg}"
SCRIPTS = ("simclr", "tsm", "raer", "cluster")
CPU = ["--device", "cpu", "--seed", "3"]


def noise(rng, side, channel):
    pixels = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
    pixels[..., channel] += 100
    return Image.fromarray(pixels)


def cells(root):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("round", EVIL, "a class with quite a long name, as labels are")):
        (root / name).mkdir(parents=True)
        for i in range(24):
            noise(rng, 16, k).save(root / name / f"{i:02d}.png")
    return root


def emotions(root):
    rng, boxes, bodies = np.random.default_rng(0), {}, {}
    for part, counts in (("train", (14, 6, 4)), ("val", (2, 2, 2)), ("test", (4, 4, 4))):
        lines = []
        for label, count in enumerate(counts):
            for i in range(count):
                clip = f"{part}/{label}-{i}"
                (root / clip).mkdir(parents=True)
                for t in range(3):
                    noise(rng, 24, label).save(root / clip / f"{t}.png")
                boxes[clip] = {f"{t}.png": [4, 2, 20, 18] for t in range(3)}
                bodies[clip] = [0, 0, 24, 24]
                lines.append(f"{clip} 3 {label + 1}\n")
        (root / f"{part}.txt").write_text("".join(lines))
    (root / "face.json").write_text(json.dumps(boxes))
    (root / "body.json").write_text(json.dumps(bodies))
    (root / "classes.txt").write_text(
        f"calm\ta calm face\n{EVIL}\ta face\npuzzled\ta puzzled face\n"
    )
    return root


def acts(path):
    words = {
        "ask": "what are you doing",
        "tell": "i was there last week",
        EVIL: "<img src=x onerror=alert(1)> hello",
    }
    rows = ["id\ttext\tlabel"]
    rows += [
        f"u{i}\t{words[label]} name{i % 7}\t{label}" for i, label in enumerate(list(words) * 40)
    ]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each script by its name, that of SimCLR interrupted and resumed."""
    root = tmp_path_factory.mktemp("runs")
    simclr = [
        "--backbone",
        "resnet18",
        "--stem",
        "cifar",
        "--image-size",
        "8",
        "--stage",
        "all",
        "--bs",
        "16",
    ]
    simclr += ["--epochs", "3", "--linear-bs", "16", "--linear-epochs", "4", "--finetune-bs", "16"]
    simclr += [
        "--finetune-epochs",
        "2",
        "--log-every",
        "1",
        "--data",
        str(cells(root / "cells")),
        *CPU,
    ]
    simclr += ["--out", str(root / "simclr")]
    with pytest.raises(SystemExit):
        train_simclr.main([*simclr, "--max-steps", "4"])
    assert train_simclr.main(simclr) == 0
    tsm = [
        "--backbone",
        "conv_small_035",
        "--image-size",
        "32",
        "--n-segment",
        "4",
        "--bs",
        "8",
        "--epochs",
        "3",
    ]
    tsm += ["--eval-every", "1", "--clips", "2", "--data", str(ffpp_tree(root / "ffpp")), *CPU]
    assert train_tsm.main([*tsm, "--out", str(root / "tsm")]) == 0
    raer = [
        "--backbone",
        "vit_tiny",
        "--num-frames",
        "2",
        "--bs",
        "8",
        "--epochs",
        "4",
        "--cache-features",
    ]
    assert (
        train_raer.main(
            [*raer, "--data", str(emotions(root / "emotions")), *CPU, "--out", str(root / "raer")]
        )
        == 0
    )
    cluster = [
        "--base-dim",
        "16",
        "--bs",
        "32",
        "--epochs",
        "2",
        "--cluster-bs",
        "32",
        "--cluster-epochs",
        "3",
    ]
    cluster += ["--data", str(acts(root / "acts.tsv")), *CPU]
    assert train_cluster.main([*cluster, "--out", str(root / "cluster")]) == 0
    return {name: root / name for name in SCRIPTS}


def parsed(page):
    """The page as strict XML: a browser forgives what this does not."""
    return ET.fromstring(page.read_text().replace("<!DOCTYPE html>", ""))


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
    const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    texts.forEach(([text, a], i) => {
      if (a.left < box.left - 1 || a.right > box.right + 1 || a.bottom > box.bottom + 1) outside.push([name, text]);
      texts.slice(i + 1).forEach(([other, b]) => { if (meets(a, b)) overlaps.push([name, text, other]); });
    });
  }
  const boxes = [...page.querySelectorAll('.card,.tile,.texts div,h2,h3,h4,p')];
  const cards = boxes.map(c => [c, c.getBoundingClientRect()]);
  cards.forEach(([one, a], i) => cards.slice(i + 1).forEach(([two, b]) => {
    if (!one.contains(two) && meets(a, b)) overlaps.push([one.textContent, two.textContent]);
  }));
  const small = [...page.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height);
  found[frame.width] = {
    width: page.documentElement.scrollWidth, overlaps, outside, smallest: Math.min(...small), charts: small.length,
    broken: [...page.images].filter(i => !i.naturalWidth).length, images: page.images.length,
    requests: view.performance.getEntriesByType('resource').map(e => e.name),
  };
}
document.getElementById('found').textContent = JSON.stringify(found);
"""


def measured(page, folder):
    """What headless Chromium finds in a page 400 and 1400 pixels wide, all of it unfolded."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    frames = (
        f'<iframe width="{w}" height="900" srcdoc="{html.escape(page.read_text())}"></iframe>'
        for w in (400, 1400)
    )
    harness = folder / "harness.html"
    harness.write_text(
        "<!DOCTYPE html><model_spec"
        f' charset="utf-8"><style>iframe{{border:0}}</style>{"".join(frames)}<pre id="found"></pre>'
        f"<script>addEventListener('load', () => {{{MEASURE}}})</script>"
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1900,2000",
    ]
    command = [
        CHROMIUM,
        *flags,
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
        harness.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(
        html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1])
    ), console


def is_sound(page, folder):
    found, console = measured(page, folder)
    assert console == []
    for width, facts in found.items():
        assert facts["width"] <= int(width), "the page is wider than the screen"
        assert facts["overlaps"] == [] and facts["outside"] == []
        assert facts["requests"] == [] and facts["broken"] == 0
        assert facts["charts"] > 5 and facts["smallest"] > 9  # pixels: texts stay readable
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_browser_shows_it_on_a_phone_and_on_a_screen(runs, script, tmp_path):
    found = is_sound(runs[script] / "report.html", tmp_path)
    assert (found["400"]["images"] > 0) == (script != "cluster")


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_is_well_formed_small_and_escapes_what_the_data_say(runs, script):
    page = runs[script] / "report.html"
    tree = parsed(page)
    assert page.stat().st_size < 400_000 < LIMIT
    assert not {e.tag for e in tree.iter()} & {"script", "b2", "link", "iframe", "object"}
    assert all(e.attrib["src"].startswith("data:image/") for e in tree.iter("img"))
    assert not [
        name
        for e in tree.iter()
        for name in e.attrib
        if name.startswith("on") or name == "href" and "#" not in e.attrib[name]
    ]
    words = "".join(tree.itertext())
    if script != "tsm":
        assert EVIL in words
    sections = {e.text for e in tree.iter("h2")}
    assert {"Results", "Curves", "System", "Everything else"} <= sections
    titles = {e.text for e in tree.iter("h3")}
    own = {
        "simclr": {"Views", "Nearest neighbors", "Features on their first two principal axes",
                   "Errors on" " the test" " split, stage" " finetune", "Confusion matrix of the test" " split, stage linear"},
        "tsm": {"Which frames count", "ROC curve," " test videos", "Test videos by" " method of" " manipulation"},
        "raer": {"Schedule", "Confusion matrix of the test split, stage train",
                 "Recall of each class of the test split, stage train"},
        "cluster": {"Utterances" " and their" " clusters", "Clusters", "Clusters and" " labels, test", "Monitor"},
    }  # fmt: skip
    assert own[script] <= titles
    env = json.loads((runs[script] / "env.json").read_text())
    assert "finished after" in words and env["data_read"] in words and env["command"] in words


def drawn_lines(tree):
    """Title of each chart -> its lines as (x, y) in the data's units, and how far a point may be
    off by rounding.
    """
    found = {}
    for svg in tree.iter(f"{SVG}svg"):
        if "data-axes" not in svg.attrib:
            continue
        x0, x1, left, right, y0, y1, bottom, top = map(float, svg.attrib["data-axes"].split())
        fx, fy = (x1 - x0) / (right - left), (y1 - y0) / (bottom - top)
        lines = [
            [tuple(map(float, p.split(","))) for p in e.attrib["points"].split()]
            for e in svg.iter(f"{SVG}polyline")
        ]
        single = [
            [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in g.iter(f"{SVG}circle")]
            for g in svg.iter(f"{SVG}g")
        ]
        lines += [line for line in single if len(line) == 1]
        data = [[(x0 + (x - left) * fx, y0 + (bottom - y) * fy) for x, y in line] for line in lines]
        found.setdefault(svg.attrib["aria-label"], []).append((data, 0.051 * fx, 0.051 * fy))
    return found


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_curves_and_tables_hold_the_numbers_of_the_log(runs, script):
    tree = parsed(runs[script] / "report.html")
    charts, expected = drawn_lines(tree), {}
    for line in log.read(runs[script]):
        for name, value in line.items():
            parts = name.split("/")
            stage, metric = line["stage"].split("_")[0], parts[-1]
            if len(parts) == 3 and (
                parts[1] not in ("train", "val") or metric.startswith(("recall_", "majority_"))
            ):
                continue
            if (
                metric
                in ("stage", "step", "epoch", "time", "eta_s", "chance", "loss_over_chance", "tau")
                or parts[0].startswith("kmeans_")  # measured once, before training; in a table
                or value is None
            ):
                continue
            if not metric.endswith(("_low", "_high")):
                expected.setdefault((f"{stage}: {metric}", line["stage"], name), []).append(
                    (line["step"], value)
                )
    assert len(expected) > 8
    for (title, _, name), points in expected.items():
        candidates = [
            (line, dx, dy)
            for lines, dx, dy in charts[title]
            for line in lines
            if len(line) == len(points)
        ]
        assert any(
            all(
                abs(a[0] - b[0]) <= dx and abs(a[1] - b[1]) <= dy
                for a, b in zip(line, points, strict=True)
            )
            for line, dx, dy in candidates
        ), f"{title} does not hold {name}: {points}"
    cells = {tuple("".join(td.itertext()) for td in row) for row in tree.iter("tr")}
    for name, value in json.loads((runs[script] / "summary.json").read_text()).items():
        if isinstance(value, float) and abs(value) >= 1e-3:
            assert (name, f"{value:.4f}") in cells


def test_stages_resumes_and_guesses_are_marked(runs):
    tree = parsed(runs["simclr"] / "report.html")
    svg = next(e for e in tree.iter(f"{SVG}svg") if e.attrib["aria-label"] == "pretrain: loss")
    x0, x1, left, right, y0, y1, bottom, top = map(float, svg.attrib["data-axes"].split())
    mark = next(e for e in svg.iter(f"{SVG}path") if e.attrib["class"] == "m").attrib["d"]
    at = float(re.match(r"M([\d.]+) ", mark)[1])
    assert x0 + (at - left) * (x1 - x0) / (right - left) == pytest.approx(
        4, abs=0.05
    )  # where --max-steps stopped it
    level = next(e for e in svg.iter(f"{SVG}path") if e.attrib["class"] == "v").attrib["d"]
    height = float(re.match(r"M[\d.]+ ([\d.]+)H", level)[1])
    assert y0 + (bottom - height) * (y1 - y0) / (bottom - top) == pytest.approx(
        np.log(31), abs=0.01
    )  # 2 x 16 - 1
    assert "resumed" in "".join(svg.itertext())
    assert [e.text for e in tree.iter("h3")][1:4] == [
        "Stage pretrain",
        "Stage linear",
        "Stage finetune",
    ]
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
    assert (
        "running in train, step 5, epoch 2 of 3, after 1m; this stage takes about 2h01m more"
        in words
    )
    words = "".join(parsed(page.write(folder)).itertext())
    assert "running or killed in train, step 5" in words
    (folder / "log.jsonl").unlink()  # before the first line
    parsed(page.write(folder, "running"))


def test_it_is_written_while_the_run_goes_on_but_seldom(tmp_path, monkeypatch):
    now, written = [0.0], []
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
    assert (
        all(b[0] - a[0] >= 100 for a, b in zip(written, written[1:], strict=False))
        and len(written) == 3
    )

    def full(folder, status):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write", full)
    said = []
    live = page.Live(tmp_path, said.append)
    live()
    now[0] += 1000
    live()
    assert len(said) == 1 and "No space left" in said[0] and "goes on" in said[0]


def test_a_long_run_with_large_pictures_stays_below_the_limit(runs, tmp_path):
    folder = shutil.copytree(runs["tsm"], tmp_path / "run")
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "a") as file:
        for step in range(2_000):
            values = {f"metric {i}": float(v) for i, v in enumerate(rng.normal(size=12))}
            file.write(
                json.dumps({"stage": "train", "step": step, "epoch": 1, **values, "time": 1.0})
                + "\n"
            )
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (900, 1600, 3), dtype=np.uint8)).save(
            folder / "figures" / f"big{i}.png"
        )
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
    points, names = np.random.default_rng(0).normal(size=(90, 2)), [f"class {i}" for i in range(45)]
    drawn = charts.scatter(
        "features", points, [i % 45 for i in range(90)], names, x_label="a", y_label="b"
    )
    assert "and 5 more" in drawn and drawn.count("h0") >= 90


def test_checks_are_shown_with_their_rows_and_pictures(runs, tmp_path):
    folder = shutil.copytree(runs["raer"], tmp_path / "run")
    Image.new("RGB", (30, 20), "red").save(folder / "figures" / "check_inputs.png")
    item = {"item": "loss-at-init", "status": "FAIL", "value": "1.0986", "threshold": "0.6 to 0.7"}
    item |= {
        "fix": f"fix {EVIL}",
        "pictures": ["figures/check_inputs.png"],
        "rows": [["truth", "said"], ["x", EVIL]],
    }
    good = {"item": "seed", "status": "PASS", "value": "equal", "threshold": "equal", "fix": ""}
    check = {
        "command": "train_raer.py --check",
        "script": "raer",
        "seconds": 12.0,
        "items": [item, good],
    }
    (folder / "check.json").write_text(json.dumps(check))
    file = page.write(folder)
    tree = parsed(file)
    words = "".join(tree.itertext())
    assert (
        "1 FAIL, 0 WARN, 1 PASS, 0 SKIP" in words
        and f"fix {EVIL}" in words
        and "loss-at-init" in words
    )
    assert [e.attrib["alt"] for e in tree.iter("img")].count("figures/check_inputs.png") == 1
    assert "Check inputs" not in words  # not a second time among the run's own pictures
    if CHROMIUM:
        is_sound(file, tmp_path)
    alone = tmp_path / "alone"  # checked before any run
    alone.mkdir()
    (alone / "check.json").write_text(json.dumps(check))
    words = "".join(parsed(page.write(alone)).itertext())
    assert "checked, not trained" in words and f"fix {EVIL}" in words


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
    rows = {
        cells[0]: cells[1:]
        for row in tree.iter("tr")
        if (cells := ["".join(td.itertext()) for td in row])
    }
    assert rows["dropout"] == ["0.1", "0.625"] and "seed" not in rows
    assert rows["train/test/uar"][1] == "0.8125 (0.7500 to 0.8750)"
    charts = drawn_lines(tree)
    assert len(charts["train: uar"][0][0]) == 2  # a line of each run
    if CHROMIUM:
        is_sound(tmp_path / "both.html", tmp_path)
    capsys.readouterr()
    assert __main__.main([*pair, "--text"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^dropout +0\.1 +0\.625$", said, re.M) and "0.8125 (0.7500 to 0.8750)" in said
    assert __main__.main([str(folders[2]), "--text"]) == 0
    assert re.search(r"^train/test/video_auc +0\.\d+ +0\.\d+$", capsys.readouterr().out, re.M)
    assert (
        __main__.main([*map(str, folders), "--out", str(tmp_path / "three.html")]) == 0
    )  # other scripts side by side
    parsed(tmp_path / "three.html")


def test_runs_that_differ_in_a_setting_get_a_pivot_table(tmp_path, capsys):
    for seed in range(3):
        for rate in (0.1, 0.2):
            folder = tmp_path / f"{rate}-{seed}"
            folder.mkdir()
            flags = {"lr": rate, "seed": seed}
            config = flags | {"identity": flags, "resolved": {"script": "raer"}}
            (folder / "config.json").write_text(json.dumps(config))
            summary = {"status": "finished", "seconds": 1, "train/test/uar": rate + seed / 10}
            (folder / "summary.json").write_text(json.dumps(summary))
    assert __main__.main([str(tmp_path), "--text"]) == 0
    said = capsys.readouterr().out
    assert "| 0.1 | 0.2000 ± 0.2484 (3) |" in said  # Student: 4.303 x 0.1 / sqrt(3)
    assert compare.names_of([{"run": "a/x"}, {"run": "b/x"}]) == ["a/x", "b/x"]


def test_decimation_keeps_the_extremes_and_both_ends():
    rng = np.random.default_rng(0)
    line = [(i, float(v)) for i, v in enumerate(rng.normal(size=5000))]
    kept = charts.thin(line, 200)
    assert len(kept) <= 201 and kept[0] == line[0] and kept[-1] == line[-1]
    assert max(p[1] for p in kept) == max(p[1] for p in line) and min(p[1] for p in kept) == min(
        p[1] for p in line
    )


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
