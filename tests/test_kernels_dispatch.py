"""What all kernels share: autograd and its transforms, which implementation runs, launches."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import nt_xent, shift_conv1x1, sup_con, temporal_shift

pytestmark = pytest.mark.kernels


def twice(x):
    """Stands for a second process with other rows."""
    return torch.cat((x, x.flip(0)))


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared(function):
    @functools.wraps(function)
    def loss(*args, **options):
        return function(*args, **options).square().sum()

    return loss


LABELS = torch.arange(60) % 4
FRAMES = rows(4, 16, 2, 2).contiguous(memory_format=torch.channels_last)
# name -> (differentiable inputs, a scalar of them and of impl). Of the losses those that take few
# rows to the end in one program, the half grid, the full grid, and several processes.
OPERATIONS = {
    "nt_xent": ((rows(9, 8), rows(9, 8, seed=1)), functools.partial(nt_xent, temperature=0.2)),
    "nt_xent, many rows": (
        (rows(30, 8), rows(30, 8, seed=1)),
        functools.partial(nt_xent, temperature=0.2, decoupled=True),
    ),
    "nt_xent, temperature": ((rows(9, 8), rows(9, 8, seed=1), torch.tensor(0.3)), nt_xent),
    "nt_xent, gather": (
        (rows(9, 8), rows(9, 8, seed=1)),
        functools.partial(nt_xent, temperature=0.5, normalize=False, gather=twice),
    ),
    "sup_con": ((rows(20, 8),), functools.partial(sup_con, labels=LABELS[:20], temperature=0.2)),
    "sup_con, many rows": (
        (rows(60, 8),),
        functools.partial(sup_con, labels=LABELS, temperature=0.2),
    ),
    "sup_con, gather": (
        (rows(20, 8),),
        functools.partial(sup_con, labels=LABELS[:20], temperature=0.2, gather=twice),
    ),
    "temporal_shift": ((FRAMES,), functools.partial(squared(temporal_shift), n_segment=2)),
    "shift_conv1x1": (
        (FRAMES, rows(8, 16), rows(8)),
        functools.partial(squared(shift_conv1x1), n_segment=2),
    ),
}


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


def leaves(inputs):
    return [x.clone().requires_grad_() for x in inputs]


def equal(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_saved_tensors_are_read_once(operation, impl):
    """Checkpointing computes them again for that one time; hooks may have moved them elsewhere."""
    inputs, function = operation
    inputs = leaves(inputs)
    expected = torch.autograd.grad(function(*inputs, impl=impl), inputs)
    recomputed = checkpoint(function, *inputs, impl=impl, use_reentrant=False)
    equal(torch.autograd.grad(recomputed, inputs), expected)
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (id(unpacked), len(unpacked), x.clone()),
        lambda packed: unpacked.append(packed[1]) or packed[2].clone(),
    ):
        hooked = function(*inputs, impl=impl)
    equal(torch.autograd.grad(hooked, inputs), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_compiled_step_can_be_checkpointed(operation, impl):
    inputs, function = operation
    inputs = leaves(inputs)
    expected = torch.autograd.grad(function(*inputs, impl=impl), inputs)
    compiled = torch.compile(function, backend="aot_eager")
    recomputed = checkpoint(compiled, *inputs, impl=impl, use_reentrant=False)
    for got, truth in zip(torch.autograd.grad(recomputed, inputs), expected, strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_torch_func_differentiates_and_says_where_it_cannot(operation, impl):
    inputs, function = operation
    function = functools.partial(function, impl=impl)
    tracked = leaves(inputs)
    expected = torch.autograd.grad(function(*tracked), tracked)
    every = tuple(range(len(inputs)))
    equal(torch.func.grad(function, argnums=every)(*inputs), expected)
    gradient, loss = torch.func.grad_and_value(function, argnums=every)(*inputs)
    equal(gradient, expected)
    assert torch.equal(loss, function(*inputs))
    stacked = [torch.stack((x, 2 * x)) for x in inputs]
    for transformed in (function, torch.func.grad(function)):
        with pytest.raises(RuntimeError, match="vmap") as raised:
            torch.func.vmap(transformed)(*stacked)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["nt_xent", "sup_con"])
def test_a_second_derivative_by_torch_func_raises(name, impl):
    inputs, function = OPERATIONS[name]

    def slope(*inputs):
        return torch.func.grad(functools.partial(function, impl=impl))(*inputs).sum()

    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(slope)(*inputs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if "gather" in name])
def test_gathering_breaks_a_compiled_graph_once(name, impl):
    inputs, function = OPERATIONS[name]

    def step(*inputs):
        return function(*[2 * x for x in inputs], impl=impl) * 3

    torch._dynamo.reset()
    explained = torch._dynamo.explain(step)(*inputs)
    assert explained.graph_break_count == 1, explained.break_reasons
    inputs = leaves(inputs)
    compiled = torch.compile(step, backend="aot_eager")
    equal(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs), inputs)
    )


def test_meta_tensors_pass(operation):
    inputs, function = operation
    options = dict(getattr(function, "keywords", {}))
    if "labels" in options:
        options["labels"] = options["labels"].to("meta")
    loss = functools.partial(getattr(function, "func", function), **options)
    inputs = leaves(x.to("meta") for x in inputs)
    for dx, x in zip(torch.autograd.grad(loss(*inputs), inputs), inputs, strict=True):
        assert dx.is_meta and dx.shape == x.shape
    with pytest.raises(ValueError, match="tensors are on meta"):
        loss(*inputs, impl="triton")
