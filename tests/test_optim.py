"""Schedule, parameter groups, LARS against a NumPy oracle, and steps that are skipped on the
device's word.
"""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import optim

SHAPES = ((4, 3, 3, 3), (7,), (5, 4), (7,), (1, 1))


def bits(tensor):
    """The tensor's bit pattern, which tells -0.0 from 0.0 and one nan from another."""
    return tensor.detach().clone().flatten().view(torch.uint8)


def snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [
        {k: bits(v) if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for p in params
    ]
    return [bits(p) for p in params], state


def assert_same_bits(before, after):
    for old, new in zip(before[0], after[0], strict=True):
        assert torch.equal(old, new)
    for old, new in zip(before[1], after[1], strict=True):
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert (
                torch.equal(value, new[key])
                if isinstance(value, torch.Tensor)
                else value == new[key]
            )


def make_params(dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [nn.Parameter(torch.tensor(rng.standard_normal(shape), dtype=dtype)) for shape in SHAPES]


def make_groups(params, weight_decay=0.01):
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def set_grads(params, rng, factor=1.0):
    for p in params:
        p.grad = torch.tensor(rng.standard_normal(p.shape) * factor, dtype=p.dtype)


def lars_oracle(p, g, v, *, lr, momentum, weight_decay, trust_coefficient, adapt):
    g = g + weight_decay * p
    p_norm, g_norm = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
    trust = trust_coefficient * p_norm / g_norm if adapt and p_norm > 0 and g_norm > 0 else 1.0
    v = momentum * v + lr * trust * g
    return p - v, v


def test_cosine_schedule_corners():
    def at(step, **changes):
        return optim.lr_at(
            step, **{"lr": 2.0, "warmup_steps": 10, "total_steps": 100, "min_lr": 0.5, **changes}
        )

    assert at(0) == pytest.approx(0.2)
    assert at(9) == 2.0
    assert at(10) < 2.0
    assert at(54) == pytest.approx(1.25)  # half-way from step 9 to step 99
    assert at(99) == 0.5 and at(100) == 0.5 and at(10**6) == 0.5
    assert at(0, warmup_steps=0) == 2.0 and at(99, warmup_steps=0) == 0.5
    assert at(99, warmup_steps=100) == 2.0 and at(500, warmup_steps=100) == 2.0
    assert at(99, warmup_steps=99) == 0.5 and at(98, warmup_steps=99) == 2.0
    assert at(0, warmup_steps=0, total_steps=1) == 2.0
    rates = [at(step) for step in range(100)]
    assert all(a < b for a, b in zip(rates[:9], rates[1:10], strict=True))
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_cosine_equals_torchs_annealing():
    p = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([p], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=49, eta_min=0.01)
    for step in range(50):
        ours = optim.lr_at(step, lr=0.3, warmup_steps=0, total_steps=50, min_lr=0.01)
        assert ours == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        scheduler.step()


def test_constant_schedule_keeps_the_warmup():
    rates = [
        optim.lr_at(s, lr=1.0, warmup_steps=4, total_steps=8, schedule="constant")
        for s in range(10)
    ]
    assert rates == [0.25, 0.5, 0.75, 1.0] + [1.0] * 6


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule": "step"}, "schedule.*'step'"),
        ({"step": -1}, "step"),
        ({"warmup_steps": 11}, "warmup_steps"),
        ({"total_steps": 0, "warmup_steps": 0}, "total_steps"),
    ],
)
def test_schedule_refuses_bad_input(changes, message):
    settings = {"step": 0, "lr": 1.0, "warmup_steps": 2, "total_steps": 10, **changes}
    with pytest.raises(ValueError, match=message):
        optim.lr_at(settings.pop("step"), **settings)


def test_param_groups_hold_every_trainable_parameter_once():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    head = nn.Linear(4, 4, bias=False)
    head.weight = nn.Parameter(torch.randn(4, 4))
    tied = nn.Linear(4, 4)
    tied.weight = head.weight
    backbone[2].bias.requires_grad_(False)
    decayed, plain = optim.param_groups([backbone, head, tied], 0.1)
    assert (decayed["weight_decay"], decayed["adapt"], plain["weight_decay"], plain["adapt"]) == (
        0.1,
        True,
        0.0,
        False,
    )
    assert [id(p) for p in decayed["params"]] == [
        id(p) for p in (backbone[0].weight, backbone[2].weight, head.weight)
    ]
    expected = (backbone[0].bias, backbone[1].weight, backbone[1].bias, tied.bias)
    assert [id(p) for p in plain["params"]] == [id(p) for p in expected]
    assert len(optim.param_groups([head], 0.1)) == 1


def test_param_groups_refuse_what_would_be_missed_or_doubled():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="twice"):
        optim.param_groups([layer, layer], 0.1)
    with pytest.raises(ValueError, match="Parameter"):
        optim.param_groups([layer, nn.Parameter(torch.zeros(1))], 0.1)
    with pytest.raises(ValueError, match="lazy"):
        optim.param_groups([nn.LazyLinear(2)], 0.1)
    with pytest.raises(ValueError, match="trainable"):
        optim.param_groups([nn.ReLU()], 0.1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("masked", [False, True])
def test_lars_equals_the_oracle_for_200_steps(dtype, tolerance, masked):
    settings = {"momentum": 0.9, "trust_coefficient": 0.02}
    params = make_params(dtype)
    with torch.no_grad():
        params[2].zero_()  # no norm: trust 1
    optimizer = optim.LARS(make_groups(params), lr=0.5, **settings)
    if masked:
        optimizer.found_inf = torch.zeros(1)
        optimizer.grad_scale = torch.tensor(8.0)
    values = [p.detach().double().numpy() for p in params]
    velocities = [np.zeros(shape) for shape in SHAPES]
    rng = np.random.default_rng(1)
    for step in range(200):
        lr = optim.lr_at(step, lr=0.5, warmup_steps=20, total_steps=200)
        for group in optimizer.param_groups:
            group["lr"] = lr
        set_grads(params, rng)
        if step == 50:
            params[0].grad.zero_()
        for i, p in enumerate(params):
            adapt = p.ndim > 1
            decay = 0.01 if adapt else 0.0
            gradient = p.grad.double().numpy()
            values[i], velocities[i] = lars_oracle(
                values[i],
                gradient,
                velocities[i],
                lr=lr,
                weight_decay=decay,
                adapt=adapt,
                **settings,
            )
        if masked:
            for p in params:
                p.grad.mul_(8)
        optimizer.step()
    for p, value, velocity in zip(params, values, velocities, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=tolerance * 10, atol=tolerance)
        buffer = optimizer.state[p]["momentum_buffer"].numpy()
        np.testing.assert_allclose(buffer, velocity, rtol=tolerance * 10, atol=tolerance)


def test_lars_without_adaptation_is_sgd_at_a_constant_rate():
    params, others = make_params(torch.float64), make_params(torch.float64)
    lars = optim.LARS(params, lr=0.1, momentum=0.9, weight_decay=0.03, adapt=False)
    sgd = torch.optim.SGD(others, lr=0.1, momentum=0.9, weight_decay=0.03)
    rng = np.random.default_rng(0)
    for _ in range(5):
        set_grads(params, rng)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        lars.step()
        sgd.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_lars_skips_parameters_without_gradient_and_takes_a_tensor_rate():
    params, others = make_params(torch.float32), make_params(torch.float32)
    set_grads(params, np.random.default_rng(0))
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.clone()
    params[3].grad = others[3].grad = None
    before = params[3].detach().clone()
    a, b = (
        optim.LARS(make_groups(params), lr=0.3),
        optim.LARS(make_groups(others), lr=torch.tensor(0.3)),
    )
    a.step()
    b.step()
    assert torch.equal(params[3], before) and not a.state[params[3]]
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
    a.zero_grad()
    a.step()
    with torch.enable_grad():
        assert a.step(lambda: (params[0] ** 2).sum()).item() > 0


def test_lars_keeps_the_memory_layout():
    plain = nn.Conv2d(3, 8, 3).double()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for model in (plain, last):
        optimizer = optim.LARS(optim.param_groups([model], 0.1), lr=0.2)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert optimizer.state[model.weight]["momentum_buffer"].stride() == model.weight.stride()
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain.weight, last.weight, rtol=1e-12, atol=1e-12)


def test_lars_takes_several_dtypes_in_one_group():
    params = [
        nn.Parameter(torch.randn(3, 3, dtype=dtype))
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]
    before = [p.detach().clone() for p in params]
    optimizer = optim.LARS(params, lr=1.0, trust_coefficient=0.1)
    optimizer.found_inf = torch.zeros(())
    set_grads(params, np.random.default_rng(0))
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        rate = 0.1 * old.double().norm() / p.grad.double().norm()
        torch.testing.assert_close(
            p.double(), old.double() - rate * p.grad.double(), rtol=2e-2, atol=2e-2
        )
        assert optimizer.state[p]["momentum_buffer"].dtype == p.dtype


def test_lars_state_loads_without_trusting_the_file():
    params, others = make_params(torch.float32), make_params(torch.float32)
    optimizer = optim.LARS(make_groups(params), lr=0.1)
    rng = np.random.default_rng(0)
    set_grads(params, rng)
    optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = optim.LARS(make_groups(others), lr=0.7)
    resumed.load_state_dict(loaded["optimizer"])
    set_grads(params, rng)
    for p, q, saved in zip(params, others, loaded["params"], strict=True):
        q.data.copy_(saved.data)
        q.grad = p.grad.clone()
    optimizer.step()
    resumed.step()
    assert_same_bits(snapshot(optimizer), snapshot(resumed))


@pytest.mark.parametrize("masked", [False, True])
def test_lars_never_reads_the_device_and_launches_as_much_for_any_number_of_parameters(masked):
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    no_kernel = {"as_strided", "expand", "view", "unbind", "detach", "empty_like", "new_empty"}
    counts = []
    for num in (3, 60):
        params = [nn.Parameter(torch.randn(4, 4)) for _ in range(num)]
        optimizer = optim.LARS(params, lr=0.1, weight_decay=0.1)
        set_grads(params, np.random.default_rng(0))
        if masked:
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
        optimizer.step()
        calls = []
        with Record():
            optimizer.step()
        assert "_local_scalar_dense" not in calls
        counts.append(sum(call not in no_kernel for call in calls))
    assert counts[0] == counts[1] < 40


def test_lars_refuses_bad_settings():
    with pytest.raises(ValueError, match="lr"):
        optim.LARS(make_params(torch.float32), lr=-1.0)
    with pytest.raises(ValueError, match="momentum"):
        optim.LARS(make_params(torch.float32), lr=1.0, momentum=math.nan)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_found_inf_leaves_everything_bitwise_unchanged(name, first):
    params, others = make_params(torch.float32), make_params(torch.float32)
    for p in (*params, *others):
        p.data.view(-1)[0] = -0.0
    optimizer = optim.build_optimizer(name, make_groups(params), lr=0.1)
    undisturbed = optim.build_optimizer(name, make_groups(others), lr=0.1)
    assert optimizer._step_supports_amp_scaling
    rng = np.random.default_rng(0)

    def step_both():
        set_grads(params, rng)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
        undisturbed.step()

    if not first:
        step_both()
        for p in params[:2]:
            optimizer.state[p][next(k for k in optimizer.state[p] if k != "step")].view(-1)[
                0
            ] = -0.0
            p.data.view(-1)[0] = -0.0
        for q in others[:2]:
            undisturbed.state[q][next(k for k in undisturbed.state[q] if k != "step")].view(-1)[
                0
            ] = -0.0
            q.data.view(-1)[0] = -0.0
    before = snapshot(optimizer)
    set_grads(params, rng)
    for p, value in zip(params, (math.nan, math.inf, -math.inf, math.nan, 1e38), strict=True):
        p.grad.fill_(value)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = snapshot(optimizer)
    if first and name != "sgd":  # made by this very step, and as good as none
        assert all(not value.any() for state in after[1] for value in state.values())
        after = (after[0], [{} for _ in after[1]])
    assert_same_bits(before, after)
    for _ in range(3):
        step_both()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        for key, value in undisturbed.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_grad_scale_divides_the_gradients(name):
    results = []
    for scale in (None, 1024.0):
        params = make_params(torch.float32)
        optimizer = optim.build_optimizer(name, make_groups(params), lr=0.1)
        set_grads(params, np.random.default_rng(0), factor=scale or 1.0)
        if scale:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
        optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_on_cpu(name, unscale):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    plain = copy.deepcopy(model)
    optimizer = optim.build_optimizer(name, optim.param_groups([model], 0.01), lr=0.1)
    reference = optim.build_optimizer(name, optim.param_groups([plain], 0.01), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(6):
        x = torch.randn(5, 4)
        overflow = step in (0, 3)
        before = snapshot(optimizer)
        optimizer.zero_grad()
        loss = model(x).square().mean() * (math.inf if overflow else 1.0)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < scale) == overflow
        if overflow and step:
            assert_same_bits(before, snapshot(optimizer))
        if not overflow:
            reference.zero_grad()
            plain(x).square().mean().backward()
            reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_build_optimizer_falls_back_where_fused_is_not_known_to_skip():
    layer = nn.Linear(2, 2, device="meta")
    with pytest.warns(UserWarning, match="foreach instead of fused"):
        optimizer = optim.build_optimizer("sgd", optim.param_groups([layer], 0.1), lr=0.1)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_build_optimizer_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="'adam'"):
        optim.build_optimizer("adam", [], lr=0.1)


def test_grad_norm_is_the_norm_of_all_gradients():
    params = make_params(torch.float64)
    set_grads(params, np.random.default_rng(0))
    params[1].grad = None
    expected = math.sqrt(sum((p.grad**2).sum().item() for p in params if p.grad is not None))
    norm = optim.grad_norm(iter(params))
    assert norm.ndim == 0 and norm.item() == pytest.approx(expected, rel=1e-12)
    assert optim.grad_norm([nn.Parameter(torch.zeros(2))]).item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_gpu_steps_without_synchronizing(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")
    params = [nn.Parameter(p.detach().cuda()) for p in make_params(torch.float32)]
    optimizer = optim.build_optimizer(name, make_groups(params), lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.found_inf, optimizer.grad_scale = (
        torch.zeros((), device="cuda"),
        torch.ones((), device="cuda"),
    )
    optimizer.step()
    before = snapshot(optimizer)
    for p in params:
        p.grad.fill_(math.nan)
    optimizer.found_inf.fill_(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optim.grad_norm(params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(before, snapshot(optimizer))
