"""Charts, tables and pages of the report from small records."""

import json
import os
import re
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import Stopped
from common.report import __main__, charts, compare, figures, page
from common.report.curves import charts_of
from common.report.record import Record, naming
from common.run import log
from common.run.files import FORMAT
from tests.runs import ended, refused


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (3.1, 5.6, [3.5, 4, 4.5, 5, 5.5]), (2, 2, [2])],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_a_chart_draws_its_points_where_they_belong():
    labels = dict(x_label="step", y_label="loss")
    series = {"train": [(0, 0.0), (10, 1.0)]}
    svg = ET.fromstring(charts.lines("loss", series, **labels, levels={"chance": 2.0}))
    line = next(e for e in svg.iter() if e.tag.endswith("polyline")).attrib["points"]
    (x0, y0), (x1, y1) = [tuple(map(float, p.split(","))) for p in line.split()]
    assert x0 < x1 and y0 > y1  # SVG's y grows downwards
    level = next(e for e in svg.iter() if e.attrib.get("class") == "v").attrib["d"]
    assert float(re.match(r"M[\d.]+ ([\d.]+)H", level)[1]) < y1
    one = charts.lines("<loss>", {"a": [(3, 1.0)]}, **labels)
    assert "&lt;loss&gt;" in one and "circle" in one


def run_directory(folder):
    config = {"bs": 8, "format": FORMAT, "resolved": {"pretrain": {"bs": 8}}, "identity": {}}
    summary = {
        "pretrain/train/loss": 1.5,
        "pretrain/train/loss_at_chance": 2.5,
        "linear/test/accuracy": 0.75,
        "linear/test/macro_f1": 0.7,
        "majority/test/accuracy": 0.5,
        "status": "finished",
        "seconds": 61,
    }
    env = {"command": "train_x.py --data <cells>", "torch": "2"}
    for name, content in (("config", config), ("env", env), ("summary", summary)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    book = log.Log(folder, main=True)
    pace = log.Pace(8, 20, "img")
    for step in (1, 2, 3):
        pace.tick()
        values = {"loss": 3.0 - step / 2, "loss_over_chance": 1.2 - step / 5}
        book.interval("pretrain", step, 1, values, pace)
        metrics = {"pretrain/train/loss": 2.0, "pretrain/val/knn_accuracy": 0.1 * step}
        book.metrics("pretrain", step, step, metrics)
    book.close()


def test_report_is_self_contained_and_names_both_conventions(tmp_path):
    run_directory(tmp_path)
    figures.save_grid(tmp_path / "figures" / "views.png", torch.rand(4, 3, 10, 10), 2)
    assert __main__.main([str(tmp_path)]) == 0
    content = (tmp_path / "report.html").read_text()
    # Nothing is loaded from elsewhere.
    assert "://" not in content.replace("http://www.w3.org/2000/svg", "")
    for text in (
        "1.5000",
        "3.0000",
        "2.5000",
        "0.6000",
        "averaged over the 2N rows",
        "summed",
        "0.7500",
        "always the most frequent class",
    ):
        assert text in content
    assert "random weights" not in content  # a baseline that this run has not
    # The views stand on top, once.
    assert content.index("data:image/png") < content.index("<nav>")
    assert content.count("data:image/png") == 1
    assert "&lt;cells&gt;" in content and "data:image/png;base64," in content
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert {"pretrain_loss", "pretrain_knn_accuracy"} <= drawn
    assert not [name for name in drawn if "chance" in name]
    with pytest.raises(SystemExit) as stop:
        __main__.main([str(tmp_path / "absent")])
    assert stop.value.code == 2


def test_a_stage_stands_beside_its_best_baseline(tmp_path):
    run_directory(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["card"] = {"headlines": {"linear/test/accuracy": "linear"}, "chance": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    summary = json.loads((tmp_path / "summary.json").read_text()) | {
        "linear/test/accuracy_low": 0.7,
        "linear/test/accuracy_high": 0.8,
        "linear_random/test/accuracy": 0.71,
        "linear_pixels/test/accuracy": 0.77,
        "linear/test/gain_over_pixels": -0.02,
        "linear/test/gain_over_pixels_low": -0.06,
        "linear/test/gain_over_pixels_high": 0.03,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    tile = page.tiles(Record(tmp_path))
    spans = re.findall(r"<span>(.*?)</span>", tile)
    assert spans == [
        "linear",
        "(0.7000 to 0.8000)",
        "worse than raw pixels 0.77; random weights 0.71, majority class 0.5",
    ]
    table = page.accuracy_section(summary)
    rows = re.findall(r"<tr><td[^>]*>(.*?)</td>", table)
    assert rows == [
        "linear layer on the learned features",
        "linear layer on features of random weights",
        "linear layer on raw pixels",
        "always the most frequent class",
        "linear layer on the learned features minus that on pixels",
    ]
    assert "0.7500 (0.7000 to 0.8000)" in table and "-0.0200 (-0.0600 to 0.0300)" in table


def test_a_page_is_titled_by_its_script_and_data(tmp_path):
    run_directory(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert page.title_of_run(Record(tmp_path)) == tmp_path.name
    config |= {"card": {"name": "simclr", "headlines": {}, "chance": {}}, "data": "a/cells.zip"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert page.title_of_run(Record(tmp_path)) == f"simclr: {tmp_path.name}, of cells.zip"


def test_without_views_the_first_pictures_or_the_scatter_plot_stand_on_top(tmp_path):
    run_directory(tmp_path)
    record = Record(tmp_path)
    assert page.lead(record, 1.0) == ""
    axes = dict(x_label="x", y_label="y")
    groups = dict(points=[[0, 1], [1, 2]], groups=[0, 1], names=["a", "b"])
    figures.put(tmp_path, "scatter", "scatter", "Features", "", **groups, **axes)
    assert "Features" in page.lead(record, 1.0)
    card = {"image": figures.picture(torch.zeros(3, 4, 4, dtype=torch.uint8)), "lines": ["cell"]}
    rows = [{"title": "Worst", "cards": [card] * 6}, {"title": "Other", "cards": [card]}]
    figures.put(tmp_path, "neighbors", "gallery", "Errors", "", rows=rows)
    shown = page.lead(record, 1.0)
    assert shown.count("<img") == 4 and "Worst" in shown and "Other" not in shown
    assert "Features" in page.lead(record, 0.0)  # a page that would become too large


def test_a_line_far_above_the_level_does_not_flatten_the_others():
    labels = dict(x_label="step", y_label="loss", levels={"a guess": 2.0}, ceiling=6.0)
    series = {"features": [(0, 2.0), (10, 1.0)], "pixels": [(0, 31.0), (10, 12.0)]}
    axes = ET.fromstring(charts.lines("loss", series, **labels)).attrib["data-axes"].split()
    assert float(axes[5]) == pytest.approx(2 + 0.05 * 1)  # the highest near the level, a margin
    # An accuracy far above the majority class stays in its chart.
    curves = {
        "a": {
            "accuracy": {
                "series": {"val": [(0, 0.9)], "val, pixels": [(0, 0.4)]},
                "bands": {},
                "levels": {"majority class": 0.1},
            }
        }
    }
    drawn = charts_of(curves, [], [], {"chance": {}, "items": "images"})["a"]["accuracy"]
    assert float(ET.fromstring(drawn).attrib["data-axes"].split()[5]) > 0.9
    # Of a single line nothing leaves the chart.
    alone = ET.fromstring(charts.lines("loss", {"pixels": series["pixels"]}, **labels))
    assert float(alone.attrib["data-axes"].split()[5]) > 31


def test_the_best_run_is_marked_by_the_metrics_direction():
    marked = partial(compare.marked, same_data=True)
    runs = [{"a/test/uar": 0.2, "a/test/loss": 0.5}, {"a/test/uar": 0.4, "a/test/loss": 0.7}, {}]
    assert marked("a/test/uar", runs) == ["0.2000", "0.4000 *", "-"]
    assert marked("a/test/loss", runs) == ["0.5000 *", "0.7000", "-"]
    assert marked("a/test/uar", [runs[0], runs[0]]) == ["0.2000", "0.2000"]
    assert compare.marked("a/test/uar", runs, same_data=False) == ["0.2000", "0.4000", "-"]
    # Of others nothing is better, and a baseline is no run's merit.
    for name in (
        "a/test/threshold", "majority/test/accuracy", "a/test/majority_uar", "kmeans_text/test/nmi",
        "linear_pixels/test/accuracy", "linear_random/test/accuracy", "a/test/zero_shot_uar",
    ):  # fmt: skip
        assert marked(name, [{name: 0.1}, {name: 0.2}]) == ["0.1000", "0.2000"]


def test_small_numbers_do_not_become_zero_in_a_table():
    shown = page.table([(0.5, 3e-5, 0.0, -1e-4, 0.001)])
    assert re.findall(r">([-.\de]+)<", shown) == ["0.5000", "3e-05", "0.0000", "-0.0001", "0.0010"]


def test_a_grid_enlarges_small_images_in_whole_pixels(tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    images[1] = 1
    figures.save_grid(tmp_path / "grid.png", images, 2)
    pixels = np.array(Image.open(tmp_path / "grid.png", formats=["PNG"]))
    scale = 96 // 8
    assert pixels.shape == ((8 + 4) * scale, (2 * 8 + 6) * scale, 3)
    assert pixels[4 * scale, 6 * scale].tolist() == [0, 0, 0]
    assert pixels[4 * scale, 16 * scale].tolist() == [255] * 3


def test_an_interval_is_drawn_in_the_chart_of_its_metric(tmp_path):
    line = {
        "stage": "train",
        "step": 3,
        "epoch": 1,
        "train/val/video_auc": 0.7,
        "train/val/video_auc_low": 0.6,
        "train/val/video_auc_high": 0.8,
    }
    (tmp_path / "config.json").write_text('{"resolved": {}}')
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    drawings = Record(tmp_path).charts(1.0)["train"]
    assert list(drawings) == ["video_auc"]
    assert ">val 0.7 (0.6 to 0.8)<" in drawings["video_auc"]


def damaged_run(folder, name, content):
    """A run with a check and figures, one of whose files holds `content`."""
    folder.mkdir(exist_ok=True)
    run_directory(folder)
    figures.save_grid(folder / "figures" / "views.png", torch.rand(4, 3, 10, 10), 2)
    config = json.loads((folder / "config.json").read_text()) | {"identity": {"bs": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


DEEP = "[" * 100_000
DAMAGED = {
    "config.json": ("7", '{"identity": {}}', '{"resolved": [], "identity": {}}', DEEP),
    "env.json": ("[1]", '{"command": {"a": 1}}', '{"torch": "2", "commit": 5}', DEEP),
    "summary.json": ('"finished"', '{"seconds": 1}', '{"status": "finished", "seconds": "x"}'),
    "check.json": ("{}", '{"command": "x", "seconds": 1, "items": [1]}', DEEP),
    "tables.json": ("[1]", '{"a": {"rows": []}}', '{"a": {"rows": [1], "header": 2}}', DEEP),
    "figures/roc.json": ('{"kind": "lines", "title": "t", "text": ""}', "[", DEEP),
    "figures/views.png": (b"\x89PNG\r\n\x1a\n", b""),
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, one) for name, contents in DAMAGED.items() for one in contents]
)
def test_a_file_that_is_not_as_a_run_writes_it_is_named(name, content, tmp_path, capsys):
    run = damaged_run(tmp_path / "run", name, content)
    refused(__main__.main, [str(run)], capsys, run.name)
    said = []
    page.Live(run, said.append)()
    (line,) = said
    assert line.startswith("WARN ") and "the run goes on" in line and "\n" not in line


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("log.jsonl", "[1]"),
        ("log.jsonl", '{"stage": 5, "step": 1, "epoch": 1}'),
        ("log.jsonl", '{"step": 1, "epoch": 1}'),
        ("log.jsonl", '{"stage": "pretrain", "step": 1, "epoch": 0, "loss": {"a": 1}}'),
        ("log.jsonl", DEEP),
        ("resumes.jsonl", '{"stage": "pretrain"}'),
        ("resumes.jsonl", "null"),
    ],
)
def test_a_line_that_no_run_writes_ends_a_report_in_one_line_or_is_left_out(
    name, line, tmp_path, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    run_directory(run)
    with open(run / name, "a") as file:
        file.write(line + "\n")
    capsys.readouterr()
    code = ended(__main__.main, [str(run)])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) in ((0, 0), (2, 1)), error
    assert code == 0 or name in error
    assert (code == 0) == (run / "report.html").exists()


def test_a_damaged_run_among_others_is_named_and_left_out(tmp_path, capsys):
    for name in ("a", "b"):
        damaged_run(tmp_path / name, "notes.txt", "")
    damaged_run(tmp_path / "bad", "summary.json", "[1]")
    table = ["--rows", "bs", "--value", "linear/test/accuracy"]
    assert __main__.main([str(tmp_path), *table]) == 0
    said = capsys.readouterr()
    assert "0.7500 ± 0.0000 (2)" in said.out
    assert said.err.count("\n") == 1 and "left out 1 damaged run: " in said.err
    assert str(tmp_path / "bad" / "summary.json") in said.err
    # What a table does not read, a comparison does.
    damaged_run(tmp_path / "bad", "env.json", "[1]")
    assert __main__.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and str(tmp_path / "bad" / "env.json") in said.err
    assert "2 runs compared" in (tmp_path / "page.html").read_text()
    refused(__main__.main, [str(tmp_path / "bad"), "--rows", "x", "--value", "y"], capsys, "no run")


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path, capsys):
    name = "a\n\x1b[31m"
    run = damaged_run(tmp_path / name, "summary.json", json.dumps({"status": f"{name}\r"}))
    page_of_all = ["--out", tmp_path / "page.html"]
    for argv in (
        [run, "--text"],
        [run],
        [run, run, "--text"],
        [run, tmp_path / "no\nrun", *page_of_all],
    ):
        assert __main__.main(list(map(str, argv))) == 0
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err and "\r" not in said.out
    refused(__main__.main, [str(tmp_path / "no\nrun")], capsys, r"no\nrun: no run there")
    (run / "summary.json").write_text("[1]")
    refused(__main__.main, [str(run)], capsys, r"a\n\x1b[31m")


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    run = damaged_run(tmp_path / "run", "notes.txt", "")
    replace = os.replace

    def refuse(source, target):
        if Path(target).suffix == ".html":
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    refused(__main__.main, [str(run)], capsys, "Permission denied", "report.html")
    flags = [str(run), str(run), "--out", str(tmp_path / "page.html")]
    refused(__main__.main, flags, capsys, "Permission denied", "--out")
    monkeypatch.undo()
    for target in (tmp_path, tmp_path / "absent" / "page.html", ".", "/"):
        refused(__main__.main, [*flags[:3], str(target)], capsys, "--out")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_pages_and_figures_are_whole_or_not_there(tmp_path, monkeypatch):
    run = damaged_run(tmp_path / "run", "notes.txt", "")
    other = damaged_run(tmp_path / "other", "notes.txt", "")
    writers = {
        run / "report.html": lambda: __main__.main([str(run)]),
        run / "figures" / "pretrain_loss.svg": lambda: __main__.main([str(run)]),
        run / "figures" / "views.png": lambda: figures.save_grid(
            run / "figures" / "views.png", torch.rand(4, 3, 10, 10), 2
        ),
        tmp_path / "page.html": lambda: __main__.main(
            [str(run), str(other), "--out", str(tmp_path / "page.html")]
        ),
    }
    replace = os.replace
    renamed = []

    def watched(source, target):
        if Path(target) in writers:
            assert Path(target).read_text() == "old"
            renamed.append(Path(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    for file, write in writers.items():
        for one in writers:
            one.write_text("old")
        if file.suffix != ".png":  # a report would read it
            (run / "figures" / "views.png").unlink()
            figures.save_grid(run / "figures" / "again.png", torch.rand(4, 3, 10, 10), 2)
        renamed.clear()
        write()
        assert file in renamed and file.read_bytes() != b"old"


def test_points_that_are_not_finite_are_left_out_of_a_scatter_plot():
    labels = dict(x_label="x", y_label="y")
    points = [[0, 1], [float("nan"), 1], [1, 2], [1, float("inf")], [1e300, 0]]
    svg = charts.scatter("t", points, [0, 0, 1, 1, 1], ["a", "b"], **labels)
    assert svg == charts.scatter("t", [points[0], points[2]], [0, 1], ["a", "b"], **labels)
    assert charts.scatter("t", [[float("nan"), 0]], [0], ["a"], **labels) == ""


def test_a_log_does_not_say_where_a_chart_is_written(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    run_directory(run)
    line = {"stage": "../../evil", "step": 1, "epoch": 1, "time": 1, "loss": 1.0}
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    before = {path for path in tmp_path.rglob("*") if run not in path.parents}
    page.write(run)
    assert before == {path for path in tmp_path.rglob("*") if run not in path.parents}
    assert list((run / "figures").glob("*evil*.svg"))


@pytest.mark.parametrize(
    "failure", [MemoryError(), KeyError("x"), RecursionError("deep\nline"), OSError(28, "No space")]
)
def test_a_report_that_fails_is_one_warning_and_the_next_one_is_tried(
    failure, tmp_path, monkeypatch
):
    run = damaged_run(tmp_path / "run", "notes.txt", "")
    now = [0.0]
    monkeypatch.setattr(page.time, "monotonic", lambda: now[0])

    def fails(*_):
        raise failure

    said = []
    live = page.Live(run, said.append)
    monkeypatch.setattr(page, "page_of", fails)
    for _ in range(3):  # at the third it is still the same failure
        live()
        now[0] += 1000
    assert len(said) == 1 and said[0].startswith("WARN ") and "\n" not in said[0]
    assert str(run / "report.html") in said[0] and "the run goes on" in said[0]
    assert not (run / "report.html").exists()
    monkeypatch.undo()
    live.due = 0.0
    live()
    assert (run / "report.html").exists() and len(said) == 1, said
    monkeypatch.setattr(page, "page_of", fails)
    live.due = 0.0
    live()
    assert len(said) == 2  # it fails anew


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(75), Stopped("saved", 75)])
def test_an_end_that_was_asked_for_passes_a_report(ending, tmp_path, monkeypatch):
    def ends(*_):
        raise ending

    monkeypatch.setattr(page, "write", ends)
    monkeypatch.setattr(page, "page_of", ends)
    with pytest.raises(type(ending)):
        page.Live(tmp_path, print)()
    with pytest.raises(type(ending)), naming(tmp_path):
        ends()
