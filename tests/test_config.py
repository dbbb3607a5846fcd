"""Flags, config files, one-line errors, and what makes two commands the same run."""

import io
import json
import os
import shlex
import sys

import pytest

from common import config
from common.errors import InputError, plural


def parser():
    p = config.base_parser("demo", "A script.")
    p.choice("--color", ["red", "green"], "red", "a color")
    p.number("--ratio", float, 0.5, "a share", above=0, high=1)
    return p


def parse(argv, demo=None):
    return config.parse(parser(), argv, demo or {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs?"),
        (["--batchsize", "3"], "unknown flag --batchsize; did you mean --bs?"),
        (["--colr", "red"], "did you mean --color?"),
        (["--color", "gren"], "received 'gren', allowed red, green; did you mean green?"),
        (["--ratio", "0"], "received 0, allowed > 0 <= 1"),
        (["--ratio", "nan"], "received nan"),
        (["--ratio", "half"], "'half' is not a number"),
        (["--bs", "0"], "received 0, allowed >= 1"),
        (["--bs", "1.5"], "'1.5' is not an integer"),
        (["--eval", ""], "--eval: received an empty value"),
        (["--data="], "--data: received an empty value"),
        (["--predict", "a", ""], "--predict: received an empty value"),
        (["--config", "missing.toml"], "missing.toml"),
        (["--config", "flags.yaml"], "allowed are .toml and .json"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as ending:
        parse(argv)
    error = capsys.readouterr().err
    assert ending.value.code == 2
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_config_file_stands_between_the_defaults_and_the_command_line(tmp_path, suffix):
    file = tmp_path / f"flags.{suffix}"
    values = {
        "epochs": 7,
        "log_every": 3,
        "deterministic": True,
        "tensorboard": False,
        "color": "green",
    }
    if suffix == "json":
        file.write_text(json.dumps(values))
    else:
        lines = [
            "epochs = 7",
            "log-every = 3",
            "deterministic = true",
            "tensorboard = false",
            "color = 'green'",
        ]
        file.write_text("\n".join(lines))
    args = parse(["--config", str(file), "--epochs", "9"], demo={"ratio": 0.25})
    assert args.epochs == 9
    assert args.log_every == 3
    assert args.deterministic is True
    assert args.tensorboard is False
    assert args.color == "green"
    assert args.ratio == 0.5


def test_a_list_in_a_config_file_is_several_values_of_a_flag_that_takes_them(tmp_path):
    file = tmp_path / "flags.toml"
    file.write_text("predict = ['a b', 'c,d']\nensemble = ['x', 'y']\ncheck = ['data', 'overfit']")
    args = parse(["--config", str(file), "--epochs", "2"])
    assert args.predict == ["a b", "c,d"] and args.ensemble == ["x", "y"]
    assert args.check == "data,overfit"
    assert parse(["--config", str(file), "--predict", "e"]).predict == ["e"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("predict = []", "--predict: expected at least one argument"),
        ("predict = [['a', 'b']]", "predict has a value that no flag takes"),
        ("epoch = 1", "unknown flag 'epoch'; did you mean --epochs?"),
        ("epochs = 'x'", "'x' is not an integer"),
        ("epochs =", "Invalid value"),
        ("color = false", "color takes a value, received False"),
        ("deterministic = 1", "deterministic takes true or false, received 1"),
    ],
)
def test_config_file_errors_name_the_file_or_the_flag(tmp_path, text, message, capsys):
    file = tmp_path / "flags.toml"
    file.write_text(text)
    with pytest.raises(SystemExit) as ending:
        parse(["--config", str(file)])
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_config_file_is_utf_8_whatever_the_locale(tmp_path, suffix, monkeypatch, capsys):
    monkeypatch.setattr("locale.getencoding", lambda: "cp1252")
    file = tmp_path / f"flags.{suffix}"
    text = 'data = "zellen/größe"' if suffix == "toml" else '{"data": "zellen/größe"}'
    file.write_bytes(text.encode("utf-8-sig"))  # with the mark that Windows' Notepad writes
    assert parse(["--config", str(file)]).data == "zellen/größe"
    file.write_bytes(text.encode("cp1252"))
    with pytest.raises(SystemExit) as ending:
        parse(["--config", str(file)])
    error = capsys.readouterr().err
    assert ending.value.code == 2 and error.count("\n") == 1
    assert str(file) in error and f"position {text.index('ö')}" in error


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_shows_what_it_has_no_sign_for_otherwise(encoding, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    parse([])
    print("± τ \udce9", flush=True)  # the last is what a name holds that is not UTF-8
    text = shown.buffer.getvalue().decode(encoding)
    possible = {"ascii": "\\xb1 \\u03c4", "cp1252": "± \\u03c4", "utf-8": "± τ"}[encoding]
    assert text == f"{possible} \\udce9\n".replace("\n", os.linesep)


def test_a_runs_own_config_repeats_its_flags(tmp_path):
    args = parse(["--epochs", "9", "--deterministic", "--color", "green"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**vars(args), "resolved": {"lr": 3}, "identity": {"x": 1}}))
    again = parse(["--config", str(file)])
    assert {**vars(again), "config": None} == vars(args)


def test_a_requeued_job_keeps_its_work(monkeypatch):
    args = parse(["--resume", "none"])
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert config.resume_mode(args, "7") == "none"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert config.resume_mode(args, "7") == "auto"
    assert config.resume_mode(parse(["--resume", "x"]), "7") == "x"
    # Requeued before it began.
    assert config.resume_mode(args, "6") == "none"
    assert config.resume_mode(args, None) == "none"


def test_demo_changes_defaults_and_the_command_line_wins(tmp_path):
    demo = {"epochs": 2, "ratio": 0.25}
    assert parse([], demo).epochs is None
    assert parse(["--demo"], demo).epochs == 2
    assert parse(["--demo", "--epochs", "5"], demo).epochs == 5
    file = tmp_path / "flags.toml"
    file.write_text("demo = true\nratio = 0.75\n")
    args = parse(["--config", str(file)], demo)
    assert (args.demo, args.epochs, args.ratio) == (True, 2, 0.75)


def test_help_shows_every_default_once(capsys):
    with pytest.raises(SystemExit) as ending:
        parse(["--help"])
    text = capsys.readouterr().out
    assert ending.value.code == 0
    assert "(default: 0.5)" in text
    assert "seed of weights, order and augmentation (default: 0)" in text
    assert "(default: None)" not in text
    assert "(default: False)" not in text
    assert "%%" not in text


def test_a_flag_without_effect_is_refused(capsys):
    p = parser()
    args = config.parse(p, ["--color", "green"], {})
    config.reject_unused_flags(p, args, ["ratio"], "here")
    with pytest.raises(SystemExit):
        config.reject_unused_flags(p, args, ["ratio", "color"], "in black and white")
    assert "--color has no effect in black and white" in capsys.readouterr().err


def test_identity_leaves_out_what_does_not_change_the_result():
    p = parser()
    plain = config.run_id(p, config.parse(p, [], {}), data="abc")
    same = "--workers 3 --device cpu --max-steps 5 --log-every 2 --data elsewhere --compile"
    assert config.run_id(p, config.parse(p, shlex.split(same), {}), data="abc") == plain
    others = ["--epochs 3", "--lr 0.1", "--seed 1", "--color green", "--precision bf16"]
    for other in others:
        assert config.run_id(p, config.parse(p, shlex.split(other), {}), data="abc") != plain
    assert config.run_id(p, config.parse(p, [], {}), data="xyz") != plain
    assert config.digest(plain) == config.digest(dict(reversed(plain.items())))


def test_stage_settings_come_from_the_flags_of_their_stage():
    p = parser()
    p.stage("late", {"epochs": 50, "bs": 64, "lr": 0.2, "wd": 0.0})
    args = config.parse(p, ["--epochs", "20", "--late-lr", "0.3"], {})
    defaults = {"epochs": 100, "bs": 256, "lr": None, "wd": 1e-4, "optimizer": "sgd"}
    first = config.stage_config(args, "first", defaults, first=True, lr_of=lambda bs: bs / 100)
    assert (first.epochs, first.bs, first.lr, first.warmup_epochs) == (20, 256, 2.56, 2.0)
    assert first.describe("9 images", 4) == (
        "first: 9 images, 4 steps of 256 an epoch, 20 epochs at most, sgd, lr 2.56"
    )
    late = config.stage_config(args, "late", defaults | {"lr": 0.2}, first=False, lr_of=None)
    assert (late.epochs, late.bs, late.lr) == (50, 64, 0.3)
    args = config.parse(p, ["--epochs", "2", "--warmup-epochs", "3"], {})
    with pytest.raises(InputError, match="more than the 2 epochs"):
        config.stage_config(args, "first", defaults, first=True, lr_of=lambda bs: 1.0)
    args = config.parse(p, ["--lr", "1e-3"], {})
    falling = defaults | {"min_lr": 1e-4}
    assert config.stage_config(args, "first", falling, first=True, lr_of=None).min_lr == 1e-4
    with pytest.raises(InputError, match="--min-lr 0.01 is more than the learning rate 0.001"):
        config.stage_config(args, "first", defaults | {"min_lr": 1e-2}, first=True, lr_of=None)


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (1, "epoch", "1 epoch"),
        (2, "epoch", "2 epochs"),
        (0, "step", "0 steps"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (3, "batch", "3 batches"),
        (2, "modality", "2 modalities"),
        (2, "day", "2 days"),
    ],
)
def test_a_count_has_its_noun_in_the_right_number(count, noun, text):
    assert plural(count, noun) == text


def test_settings_of_one_step_and_one_epoch_are_described_in_the_singular():
    stage = config.StageConfig("train", 1, 8, 0.1, 0.0, "sgd", 0.0)
    assert stage.describe("9 clips", 1) == (
        "train: 9 clips, 1 step of 8 an epoch, 1 epoch at most, sgd, lr 0.1"
    )
