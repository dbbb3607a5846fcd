"""A step that must not happen leaves everything as it was; clipping; precision."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from common import amp, config, optim
from common.run import dist
from common.run.launch import launch

CPU = torch.device("cpu")


def setting(name):
    torch.manual_seed(0)
    # No bias before the batch norm: its gradient is rounding alone, which AdamW makes a step of.
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return model, optim.build_optimizer(name, optim.param_groups([model], 1e-2), lr=0.1)


def snapshot(model, optimizer):
    states = [v.clone() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return [p.detach().clone() for p in model.parameters()] + states


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing_and_is_reported(name, poison):
    model, optimizer = setting(name)
    x = torch.randn(8, 4)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        _, bad = amp.guarded_step(optimizer, amp.scaler("fp32", CPU), loss)
        assert not bad
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    loss = model(x).square().mean()
    if poison == "loss":
        loss = loss * float("nan")
    loss.backward()
    if poison == "gradient":
        next(model.parameters()).grad[0, 0] = float("inf")
    _, bad = amp.guarded_step(optimizer, amp.scaler("fp32", CPU), loss)
    assert bad
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_an_fp16_overflow_is_skipped_but_is_no_divergence(name):
    model, optimizer = setting(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 4)
    before = snapshot(model, optimizer)[:5]
    loss = model(x).square().mean()
    scaler.scale(loss).backward()
    next(model.parameters()).grad[0, 0] = float("inf")
    _, bad = amp.guarded_step(optimizer, scaler, loss)
    assert not bad and scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    loss = model(x).square().mean()
    scaler.scale(loss).backward()
    true = optim.grad_norm(list(model.parameters())) / scaler.get_scale()
    norm, bad = amp.guarded_step(optimizer, scaler, loss)
    torch.testing.assert_close(norm, true)
    assert not bad and not torch.equal(before[0], next(model.parameters()))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("limit", [0.01, 1e6])
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_gradient_is_clipped_as_torch_clips_it(name, limit, scaled):
    model, optimizer = setting(name)
    oracle = copy.deepcopy(model)
    steps = optim.build_optimizer(name, optim.param_groups([oracle], 1e-2), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    for _ in range(3):
        x = torch.randn(8, 4)
        for each in (optimizer, steps):
            each.zero_grad()
        scaler.scale(loss := model(x).square().mean()).backward()
        oracle(x).square().mean().backward()
        true = nn.utils.clip_grad_norm_(oracle.parameters(), limit)
        steps.step()
        norm, bad = amp.guarded_step(optimizer, scaler, loss, limit)
        assert not bad and (norm > limit) == (limit == 0.01)
        torch.testing.assert_close(norm, true)  # logged as it was before
        for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_neither_hides_nor_spreads_what_is_not_finite(poison, scaled):
    model, optimizer = setting("sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled)
    before = snapshot(model, optimizer)
    scaler.scale(loss := model(torch.randn(8, 4)).square().mean()).backward()
    model[0].weight.grad[0, 0] = poison
    _, bad = amp.guarded_step(optimizer, scaler, loss, 0.5)
    assert bad != scaled and scaler.get_scale() == 1.0  # an overflow halves the scale
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    finite = [bool(p.grad.isfinite().all()) for p in model.parameters()]
    assert finite == [False] + [True] * (len(finite) - 1)


def test_a_repeated_forward_pass_leaves_the_running_statistics():
    model, _ = setting("sgd")
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    x = torch.randn(8, 4)
    plain = model(x)
    model.load_state_dict({**model.state_dict(), **before})
    with amp.frozen_running_stats(model):
        torch.testing.assert_close(model(x), plain)  # statistics of the batch all the same
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    model(x)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", None), ("fp32", None), ("bf16", torch.bfloat16)]
)
def test_autocast_follows_the_flag(precision, dtype):
    with amp.autocast(precision, CPU):
        out = nn.Linear(4, 4)(torch.randn(2, 4))
    assert out.dtype == (dtype or torch.float32)
    assert not amp.scaler(precision, CPU).is_enabled() and amp.scaler("fp16", CPU).is_enabled()


@pytest.mark.parametrize(
    ("capability", "hip", "dtype"),
    [
        ((7, 0), None, torch.float16),  # V100
        ((7, 5), None, torch.float16),  # T4, RTX 2060 Super
        ((8, 0), None, torch.bfloat16),
        ((12, 0), None, torch.bfloat16),
        (None, "6.4", torch.bfloat16),  # ROCm
    ],
)
def test_auto_takes_no_emulated_bf16(capability, hip, dtype, monkeypatch):
    device = torch.device("cuda", 1)
    asked = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda of: asked.append(of) or capability
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # emulation too
    assert amp.dtype_of("auto", device) == dtype
    assert asked == ([] if hip else [device])  # of this GPU, not of the current one
    for name in ("fp32", "bf16", "fp16"):  # what is asked for is done
        assert amp.dtype_of(name, device) == amp.dtype_of(name, CPU)


@pytest.mark.parametrize(
    ("precision", "capability", "warned"),
    [("bf16", (7, 5), True), ("auto", (7, 5), False), ("bf16", (9, 0), False)],
)
def test_emulated_bf16_is_warned_of(precision, capability, warned, monkeypatch, capsys):
    world = dist.Dist(0, 1, torch.device("cuda", 0))
    monkeypatch.setattr(dist, "init", lambda *_: world)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    parser = config.base_parser("x", "A script.")
    args = parser.parse_args(["--precision", precision])
    ran = []
    assert launch(parser, args, None, lambda *given: ran.append(given[2])) == 0
    assert ran == [world]
    assert capsys.readouterr().out.startswith("WARN --precision bf16: ") == warned


def test_the_learning_rate_is_a_function_of_the_position():
    _, optimizer = setting("sgd")
    stage = config.StageConfig(
        "s", epochs=10, bs=8, lr=0.4, wd=0.0, optimizer="sgd", warmup_epochs=2.0
    )
    rates = [amp.set_lr(optimizer, stage, done, 5, "cosine") for done in range(50)]
    assert (
        rates[0] == pytest.approx(0.04)
        and rates[9] == pytest.approx(0.4)
        and max(rates) == rates[9]
    )
    assert rates[-1] == pytest.approx(0.0, abs=1e-3) and rates[10:] == sorted(
        rates[10:], reverse=True
    )
    assert {group["lr"] for group in optimizer.param_groups} == {rates[-1]}
    assert amp.set_lr(optimizer, stage, 30, 5, "constant") == 0.4
    floored = dataclasses.replace(stage, min_lr=0.04)
    assert amp.set_lr(optimizer, floored, 49, 5, "cosine") == pytest.approx(0.04)
    assert amp.set_lr(optimizer, floored, 9, 5, "cosine") == pytest.approx(0.4)


def test_phases_share_the_time_of_steps_alone(monkeypatch):
    seconds = iter([0, 7, 9, 50, 53, 54])
    monkeypatch.setattr(amp.time, "perf_counter", lambda: next(seconds))
    phases = amp.Phases(CPU, skip=1)
    assert phases.describe_input(["--workers 2"]) == ""
    for name in (
        "input",
        "rest",
        None,
        "input",
        "rest",
    ):  # a step that does not count, an evaluation, a step
        phases.lap(name)
    assert phases.describe() == "4000.0 ms a step: input 75.0%, rest 25.0%"
    told = phases.describe_input(["--workers 2", "less"])
    assert told == "steps wait for data, 75.0% of their time; what helps: --workers 2, less"
    phases.seconds["input"] = 0.01
    assert phases.describe_input(["less"]) == "data are there in time, 1.0% of a step"
