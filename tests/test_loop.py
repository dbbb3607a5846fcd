"""The loop that scripts iterate: what it logs, and what it foresees."""

import contextlib
from argparse import Namespace
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from common.config import StageConfig
from common.run import dist, log, loop
from common.run.loop import Batch, Loop, Step


@dataclass
class Run:
    """What a loop asks of a run."""

    log: log.Log
    world: dist.Dist
    stages: dict
    args: Namespace = field(
        default_factory=lambda: Namespace(
            log_every=1000, max_steps=None, accum=2, precision="auto", lr_schedule="cosine"
        )
    )
    signals: object = field(default_factory=lambda: Namespace(at_once=contextlib.nullcontext))
    phases: object = None

    def settings_of(self, stage):
        return self.stages[stage]


class Position:
    """Where a stage stands."""

    stage, step, batch, epoch = "train", 0, 0, 0

    def __init__(self, **parts):
        self.parts = parts

    def add(self, **_):
        pass

    def end_step(self, _):
        self.step, self.batch = self.step + 1, self.batch + 1

    def end_epoch(self):
        self.epoch, self.batch = self.epoch + 1, 0

    waiting = contextlib.nullcontext


def run_of(folder, epochs, bs=256, device="cpu", **stages):
    settings = StageConfig("train", epochs, bs, 0.1, 0.0, "sgd", 0.0)
    world = dist.Dist(0, 1, torch.device(device))
    return Run(log.Log(folder, main=True), world, stages | {"train": settings})


@pytest.mark.parametrize(("device", "gap"), [("cpu", 2), ("meta", 10)])
@pytest.mark.parametrize(("epochs", "steps"), [(6, 40), (2, 1300), (30, 4)])
def test_curves_have_their_points_whatever_log_every(epochs, steps, device, gap, tmp_path, capsys):
    """On a GPU (a device that is none of the CPU's) only one step of ten is read besides."""
    run = run_of(tmp_path, epochs, device=device)
    of_run = Loop(run, Position(), steps=steps, unit="img")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for _ in of_run.epochs():
        for k in of_run.batches(range(steps)):
            step = Step({"loss": torch.tensor(float(k))}, torch.tensor(1.0), torch.tensor(False))
            of_run.end_step(step, of_run.set_lr(optimizer))
        of_run.end_epoch({"train/train/loss": 1.0})
    run.log.close()
    lines = [line for line in log.read(tmp_path) if "lr" in line]
    logged = [line["step"] for line in lines]
    total = epochs * steps
    assert {e * steps + k for e in range(epochs) for k in (1, steps)} <= set(logged)
    assert np.diff([0, *logged]).max() <= max(gap, total // 100)
    assert len(logged) <= 2 * epochs + 3 + (total / gap if gap > 2 else 200)
    assert all(line["loss"] == (line["step"] - 1) % steps for line in lines)
    shown = [line for line in capsys.readouterr().out.splitlines() if " step " in line]
    assert len(shown) == 3 + total // 1000


def items(batches, epoch):
    for batch in batches:
        yield Batch(torch.ones(len(batch), 4), batch, None, epoch)


def foresee(run, monkeypatch, seconds_of):
    """What is said before a run whose step of n items takes seconds_of(n)."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tried = []

    def train_step(trial, network, optimizer, scaler, batch):
        tried.append(len(batch.items))
        assert network.training and trial.args.accum == 1
        optimizer.zero_grad()
        network(batch.inputs).square().sum().backward()
        optimizer.step()
        now[0] += seconds_of(len(batch.items))

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng_state = torch.get_rng_state()
    of_run = Loop(run, Position(model=model, optimizer=optimizer), steps=40, unit="img")
    of_run.foresee(train_step, items, np.arange(1000))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(rng_state, torch.get_rng_state())
    assert not optimizer.state and not model.training and run.args.accum == 2
    assert all(p.grad is None for p in model.parameters())
    return tried


@pytest.mark.parametrize(
    ("seconds_of", "said", "steps"),
    [
        (lambda n: 0.05 + 0.37 * n, "about 4d16h on this CPU, at 101 s for", [2, 2]),
        (lambda n: 0.2 + 0.01 * n, "about 3h04m on this CPU, at 2.8 s for", [2, 2, 9, 9]),
        (lambda n: 5.0 * n, "about 59d06h on this CPU, at 1280 s for", [2]),
        (lambda n: 0.2 + 1e-4 * n, "", [2, 2, 9, 9]),  # 256 items do not cost 128 times two
        (lambda n: 1e-4 * n, "", [2, 2]),
    ],
)
def test_hours_on_a_cpu_are_said_before_the_first_step(
    seconds_of, said, steps, monkeypatch, capsys
):
    assert foresee(run_of(None, 100), monkeypatch, seconds_of) == steps
    printed = capsys.readouterr().out
    assert (
        printed.startswith(f"WARN train: {said} each of 4000 steps of 256;")
        if said
        else not printed
    )
    assert not said or "fewer --epochs; --max-steps" in printed


def test_a_terminal_shows_that_a_step_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(loop.live.line, "due", lambda: True)
    foresee(run_of(None, 100), monkeypatch, lambda n: 5.0 * n)
    shown, said = capsys.readouterr().out.split("WARN ")
    assert shown.startswith("\rtrain: timing a small step: 0 of 1 ") and shown.endswith(" \r")
    assert "; audits and evaluations come on top." in said


def test_flags_that_help_are_those_of_the_stage_and_the_script(monkeypatch, capsys):
    run = run_of(None, 100, pretrain=None)
    run.args.backbone = run.args.image_size = None
    foresee(run, monkeypatch, lambda n: 5.0 * n)
    assert "fewer --train-epochs, a smaller --backbone or --image-size;" in capsys.readouterr().out


def test_nothing_is_tried_on_a_gpu_or_without_steps_and_few_steps_are_short(monkeypatch, capsys):
    assert foresee(run_of(None, 100, device="meta"), monkeypatch, lambda n: 5.0 * n) == []
    run = run_of(None, 100)
    run.args.max_steps = 2
    assert foresee(run, monkeypatch, lambda n: 5.0 * n) == [2]
    for run in (run_of(None, 0), run_of(None, 1, bs=2)):
        assert foresee(run, monkeypatch, lambda n: 5.0 * n) == []
    assert capsys.readouterr().out == ""
