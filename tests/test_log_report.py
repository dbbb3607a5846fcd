"""The run's log and its report: what a reader of log.jsonl and report.html relies on."""

import csv
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import InputError
from common.report import __main__, charts, figures, page
from common.report.record import Record
from common.run import log
from common.run.files import FORMAT
from common.run.inference import write_predictions


def test_log_lines_hold_the_same_fields_as_the_console(tmp_path, capsys):
    book = log.Log(tmp_path, main=True)
    pace = log.Pace(32, 100, "img")
    for _ in range(3):
        pace.tick()
    book.interval("train", 7, 1, {"loss": 4.8123, "lr": 0.24}, pace)
    book.metrics("train", 7, 1, {"train/val/accuracy": 0.5, "train/val/loss": float("nan")})
    book.close()
    console = capsys.readouterr().out.splitlines()
    line = r"train step 007/100 \| loss 4\.8123 \| lr 2\.4e-01 \| \d+ img/s \| eta \S+"
    assert re.fullmatch(line, console[0])
    assert console[1] == "train epoch 1 | val/accuracy 0.5000 | val/loss nan"
    first, second = log.read(tmp_path)
    assert (first["stage"], first["step"], first["epoch"]) == ("train", 7, 1)
    assert (first["loss"], first["lr"]) == (4.8123, 0.24)
    assert set(log.TIMING) <= first.keys()
    assert second["train/val/accuracy"] == 0.5
    assert second["train/val/loss"] is None  # strict JSON has no NaN


def test_other_ranks_are_silent(tmp_path, capsys):
    book = log.Log(tmp_path, main=False)
    book.say("hello")
    book.metrics("train", 1, 1, {"train/train/loss": 1.0})
    book.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "log.jsonl").exists()


def test_lines_after_a_checkpoint_are_cut_and_a_torn_line_is_dropped(tmp_path):
    book = log.Log(tmp_path, main=True)
    for stage in ("train", "late"):
        book.metrics(stage, 1, 1, {f"{stage}/train/loss": 1.0})
    count = book.count("train")
    book.metrics("train", 2, 1, {"train/train/loss": 0.5})
    book.metrics("late", 2, 1, {"late/train/loss": 2.0})
    book.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"stage": "tr')
    book = log.Log(tmp_path, main=True)
    book.cut("train", count)  # an earlier stage goes on: the later one's lines stay
    book.metrics("train", 2, 1, {"train/train/loss": 0.25})
    book.cut("late", 9)
    book.close()
    lines = log.read(tmp_path)
    assert [line["train/train/loss"] for line in lines if line["stage"] == "train"] == [1.0, 0.25]
    assert [line["late/train/loss"] for line in lines if line["stage"] == "late"] == [1.0, 2.0]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (41.4, "41s"),
        (59.6, "1m"),
        (720, "12m"),
        (3599, "1h00m"),
        (11100, "3h05m"),
        (187200, "2d04h"),
    ],
)
def test_durations(seconds, text):
    assert log.duration(seconds) == text


def test_pace_leaves_out_the_warm_up_step_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    pace = log.Pace(10, 12)
    for seconds in (100, 2, 2):
        now[0] += seconds
        pace.tick()
    now[0] += 1000  # an evaluation
    pace.pause()
    now[0] += 2
    pace.tick()
    assert (pace.seconds_per_step, pace.rate(), pace.eta(4)) == (2, 5, 16)


def test_time_counts_on_after_a_resume(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    book = log.Log(None, main=False)
    book.go_on_from(1000)
    now[0] += 5
    assert book.seconds == 1005


def test_a_missing_tensorboard_is_an_error_with_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        log.Log(tmp_path, main=True, tensorboard=True)


def test_tensorboard_gets_the_same_values(tmp_path):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="pip install -r tests/requirements.txt",
    )
    book = log.Log(tmp_path, main=True, tensorboard=True)
    book.metrics("train", 5, 1, {"train/val/accuracy": 0.25})
    book.metrics("train", 9, 2, {"train/val/accuracy": 0.75})
    book.close()
    board = events.EventAccumulator(str(tmp_path))
    board.Reload()
    values = [(e.step, e.value) for e in board.Scalars("train/val/accuracy")]
    assert values == [(5, 0.25), (9, 0.75)]


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
    pixels = np.array(Image.open(tmp_path / "grid.png"))
    scale = 96 // 8
    assert pixels.shape == ((8 + 4) * scale, (2 * 8 + 6) * scale, 3)
    assert pixels[4 * scale, 6 * scale].tolist() == [0, 0, 0]
    assert pixels[4 * scale, 16 * scale].tolist() == [255] * 3


def test_predictions_hold_id_class_and_scores(tmp_path):
    scores = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    write_predictions(tmp_path / "p.csv", ["x,1", "y"], ["cat", "dog"], scores)
    rows = list(csv.reader((tmp_path / "p.csv").read_text().splitlines()))
    assert rows == [
        ["id", "class", "score_cat", "score_dog"],
        ["x,1", "dog", "0.200000", "0.800000"],
        ["y", "cat", "0.600000", "0.400000"],
    ]


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
