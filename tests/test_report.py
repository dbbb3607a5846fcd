"""Charts, tables and pages of the report from small records."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from common.report import __main__, charts, figures, page
from common.report.record import Record
from common.run import log
from common.run.files import FORMAT


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
        "majority: always the most frequent class.",
    ):
        assert text in content
    assert "linear_random:" not in content  # a baseline that this run has not
    assert "&lt;cells&gt;" in content and "data:image/png;base64," in content
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert {"pretrain_loss", "pretrain_knn_accuracy"} <= drawn
    assert not [name for name in drawn if "chance" in name]
    with pytest.raises(SystemExit) as stop:
        __main__.main([str(tmp_path / "absent")])
    assert stop.value.code == 2


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
