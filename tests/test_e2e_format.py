"""A run directory or checkpoint of another format is refused, before any of it is misread."""

import json
import shutil

import pytest

import train_simclr
from common.run import checkpoint
from common.run.files import FORMAT
from tests.data import cells_tree
from tests.runs import flags, refused

pytestmark = pytest.mark.e2e

ARGV = flags("--backbone resnet18 --stem cifar --image-size 8 --device cpu --bs 16 --epochs 1")
STUDENT = [*ARGV, "--stage", "finetune", "--from", "none"]
# Every way to read a run: the flags that name it, and those of the run that reads it.
WAYS = {
    "the same command": flags(STUDENT, "--data {data} --out {run}"),
    "--resume": flags(STUDENT, "--data {data} --epochs 2 --resume {run}"),
    "--eval": flags("--data {data} --device cpu --eval {run} --out {out}"),
    "--predict": flags("--predict {data} --resume {run} --device cpu --out {out}"),
    "--from": flags(ARGV, "--data {data} --stage finetune --from {run} --out {out}"),
    "--teacher": flags(STUDENT, "--data {data} --seed 1 --teacher {run} --out {out}"),
}
NUMBERS = "format 1", f"format {FORMAT}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return cells_tree(tmp_path_factory.mktemp("data") / "cells")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_simclr.main(flags(STUDENT, "--data", data, "--out", folder)) == 0
    return folder


def content(folder):
    """Every file of a folder, by its path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_format(run, copy, number):
    """A copy of a run whose config.json names another format, or none."""
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["format"]
    if number is not None:
        config["format"] = number
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("number", [None, 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_run_of_the_format_before_is_refused(way, number, data, run, tmp_path, capsys):
    old = of_format(run, tmp_path / "old", number)
    untouched = content(tmp_path)
    places = {"run": old, "data": data, "out": tmp_path / "out"}
    argv = [word.format(**places) for word in WAYS[way]]
    refused(train_simclr.main, argv, capsys, old, *NUMBERS)
    assert content(tmp_path) == untouched


def test_a_run_of_a_later_format_is_refused(data, run, tmp_path, capsys):
    new = of_format(run, tmp_path / "new", FORMAT + 1)
    argv = flags("--data", data, "--device cpu --eval", new, "--out", tmp_path / "out")
    refused(train_simclr.main, argv, capsys, f"format {FORMAT + 1}", f"format {FORMAT}")


@pytest.mark.parametrize("way", ["--eval", "--from", "--teacher", "--predict", "--resume"])
def test_a_checkpoint_without_a_format_is_refused(way, data, run, tmp_path, capsys):
    name = "last.pt" if way == "--resume" else "best.pt"
    old = shutil.copytree(run, tmp_path / "old") / name
    source = old if old.exists() else old.parent / "finetune" / name
    state = checkpoint.load(source)
    del state["format"]
    checkpoint.save(source, state)
    untouched = content(tmp_path)
    places = {"run": source, "data": data, "out": tmp_path / "out"}
    argv = [word.format(**places) for word in WAYS[way]]
    refused(train_simclr.main, argv, capsys, name, *NUMBERS)
    after = content(tmp_path)
    if way == "--resume":  # the run directory has its new start noted before its state is read
        untouched, after = (
            {p: b for p, b in c.items() if p.suffix == ".pt"} for c in (untouched, after)
        )
    assert after == untouched
