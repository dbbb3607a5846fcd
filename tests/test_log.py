"""The run's log: what a reader of log.jsonl and of the console relies on."""

import re

import pytest

from common.errors import InputError
from common.run import log


def test_log_lines_hold_the_same_fields_as_the_console(tmp_path, capsys):
    book = log.Log(tmp_path, main=True)
    pace = log.Pace(32, 100, "img")
    for _ in range(3):
        pace.tick()
    book.interval("train", 7, 1, {"loss": 4.8123, "lr": 0.24}, pace)
    book.metrics("train", 7, 1, {"train/val/accuracy": 0.5, "train/val/loss": float("nan")})
    book.close()
    console = capsys.readouterr().out.splitlines()
    line = r"train step 007/100 \| loss 4\.812 \| lr 0\.24 \| \S+ img/s \| eta \S+"
    assert re.fullmatch(line, console[0])
    assert console[1] == "train epoch 1 | val/accuracy 0.5 | val/loss nan"
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


def filled(folder, stage="train", steps=range(1, 7)):
    """A log with a line a step."""
    book = log.Log(folder, main=True)
    for step in steps:
        book.metrics(stage, step, 1, {f"{stage}/train/loss": float(step)}, quiet=True)
    book.close()
    return folder / "log.jsonl"


DAMAGE = {
    "cut": b'{"stage": "tr',
    "a flipped bit": b'{"stage": "train", "step": 3, "epoch": 1, "loss": 3n0, "time": 0}',
    "no text": b"\xff\xfe\x00",
    "zeros": bytes(80),
    "a list": b"[1, 2]",
    "a stage that is a number": b'{"stage": 3, "step": 3, "epoch": 1, "time": 0}',
    "a step that is a text": b'{"stage": "train", "step": "3", "epoch": 1, "time": 0}',
    "a lost key": b'{"stage": "train", "stop": 3, "epoch": 1, "time": 0}',
    "a value that is a list": b'{"stage": "train", "step": 3, "epoch": 1, "loss": [], "time": 0}',
    "deep nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_line_is_lost_alone_and_said(case, tmp_path, capsys):
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines()
    lines[2] = DAMAGE[case]
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert [line["step"] for line in log.read(tmp_path)] == [1, 2, 4, 5, 6]
    book = log.Log(tmp_path, main=True)
    assert capsys.readouterr().out == f"{path}: line 3 is damaged and left out\n"
    book.cut("train", 5, 5)  # a checkpoint after five lines, of which one is lost
    assert capsys.readouterr().out == ""
    assert book.count("train") == 4
    book.metrics("train", 6, 1, {"train/train/loss": 6.0}, quiet=True)
    book.close()
    assert [line["step"] for line in log.read(tmp_path)] == [1, 2, 4, 5, 6]


def test_a_line_is_missed_in_its_own_stage(tmp_path, capsys):
    filled(tmp_path, "first", range(1, 4))
    path = filled(tmp_path, "second", range(1, 5))
    lines = path.read_text().splitlines()
    lines[1] = lines[4] = "x"
    path.write_text("\n".join(lines) + "\n")
    book = log.Log(tmp_path, main=True)
    assert "lines 2, 5 are damaged" in capsys.readouterr().out
    book.cut("first", 3, 3)
    book.cut("second", 3, 3)
    book.close()
    steps = [(line["stage"], line["step"]) for line in log.read(tmp_path)]
    assert steps == [("first", 1), ("first", 3), ("second", 1), ("second", 3)]


def test_lines_that_are_missing_without_a_trace_are_said(tmp_path, capsys):
    path = filled(tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    book = log.Log(tmp_path, main=True)
    book.cut("train", 6, 6)
    assert f"{path} has 4 of the 6 lines of train" in capsys.readouterr().out
    assert book.count("train") == 4
    book.close()


def test_two_lines_that_became_one_leave_none_of_a_later_step(tmp_path):
    path = filled(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace("\n", "x"), *lines[2:]]))
    book = log.Log(tmp_path, main=True)
    book.cut("train", 5, 5)
    book.close()
    assert [line["step"] for line in log.read(tmp_path)] == [1, 4, 5]


def test_garbage_in_the_resumes_is_left_behind(tmp_path, capsys):
    (tmp_path / log.RESUMES).write_text('{"stage": "train", "step": 1, "epoch": 0}\n[]\n{"sta')
    book = log.Log(tmp_path, main=True)
    book.resumed("train", 2, 0)
    book.close()
    assert "line 2 is damaged" in capsys.readouterr().out
    assert [line["step"] for line in log.read(tmp_path, log.RESUMES)] == [1, 2]


def test_a_log_that_is_a_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(InputError, match="log.jsonl: Is a directory"):
        log.Log(tmp_path, main=True)


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


def test_a_board_that_fails_is_said_once_and_ends_no_run(tmp_path, capsys):
    class Board:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

        close = add_scalar

    book = log.Log(tmp_path, main=True)
    for _ in range(2):
        book.board = Board() if not book.count("train") else book.board
        book.metrics("train", 1, 1, {"train/val/accuracy": 0.5}, quiet=True)
    book.close()
    said = capsys.readouterr().out
    assert said == "WARN TensorBoard: No space left on device; the run goes on without it\n"
    assert len(log.read(tmp_path)) == 2
    book = log.Log(tmp_path, main=True)
    book.board = Board()
    book.close()
    assert "WARN TensorBoard" in capsys.readouterr().out


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
