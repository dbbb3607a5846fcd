"""What all kernels share: autograd and its transforms, which implementation runs, launches."""

import functools
import inspect
import logging
import pathlib
import re
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernels
import kernels.dispatch
import kernels.similarity
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


def weighed(function):
    """Of row losses and their statistics, with upstream gradients of both signs."""

    @functools.wraps(function)
    def loss(*args, **options):
        rows, stats = function(*args, **options, reduction="none", return_stats=True)
        return (rows * (torch.arange(len(rows), device=rows.device) % 3 - 0.7)).sum()

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
    "nt_xent, rows": (
        (rows(9, 8), rows(9, 8, seed=1), torch.tensor(0.3)),
        weighed(nt_xent),
    ),
    "nt_xent, rows and gather": (
        (rows(9, 8), rows(9, 8, seed=1)),
        functools.partial(weighed(nt_xent), temperature=0.2, gather=twice),
    ),
    "sup_con, rows": (
        (rows(20, 8),),
        functools.partial(weighed(sup_con), labels=LABELS[:20], temperature=0.2),
    ),
    "sup_con, rows and gather": (
        (rows(20, 8),),
        functools.partial(weighed(sup_con), labels=LABELS[:20], temperature=0.2, gather=twice),
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
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nt_xent, gather", {}),
        ("sup_con, gather", {}),
        ("nt_xent", {"reduction": "none"}),
        ("sup_con", {"reduction": "sum"}),
        ("nt_xent", {"return_stats": True}),
        ("sup_con", {"return_stats": True}),
    ],
)
def test_what_is_no_operator_breaks_a_compiled_graph_once(name, options, impl):
    inputs, function = OPERATIONS[name]

    def step(*inputs):
        out = function(*[2 * x for x in inputs], impl=impl, **options)
        return (out[0] if "return_stats" in options else out).sum() * 3

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


class OnGpu(torch.Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.fixture
def said(caplog):
    """(level, message) of what the kernels log, as if nothing had been said before."""
    kernels.dispatch._say.cache_clear()
    caplog.set_level(logging.INFO, logger="kernels")
    yield lambda: [
        (level, message) for name, level, message in caplog.record_tuples if name == "kernels"
    ]
    kernels.dispatch._say.cache_clear()


def test_a_gpu_without_its_kernel_is_warned_once_with_reason_and_limit(said, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.shift_conv1x1"], "FUSED_BYTES", 0)
    wide = [rows(4, 600).as_subclass(OnGpu), rows(4, 600).as_subclass(OnGpu)]
    narrow = [rows(4, 8).as_subclass(OnGpu), rows(4, 8).as_subclass(OnGpu)]
    frames = rows(4, 24, 2, 2).as_subclass(OnGpu)
    for _ in range(2):
        nt_xent(*wide, 0.1)
        nt_xent(*narrow, 1e-30)
        nt_xent(*narrow, 1e-31)
        sup_con(wide[0], LABELS[:4], 0.1, normalize=False)
        sup_con(narrow[0].double(), LABELS[:4], 0.1)
        shift_conv1x1(frames, rows(8, 24), None, 2)
        nt_xent(*wide, 0.1, impl="torch")
    assert [(level, message) for level, message in said() if "instead" in message] == [
        (logging.WARNING, f"{op}: PyTorch instead of the Triton kernel: {reason}")
        for op, reason in (
            ("nt_xent", "D=600, and of torch.float32 rows it takes D up to 128"),
            ("nt_xent", "it takes temperatures from 0.0001 to 10000"),
            ("sup_con", "D=600, and of rows that are not normalized it takes D up to 128"),
            ("sup_con", "it takes float32, bfloat16 and float16, not torch.float64"),
            (
                "shift_conv1x1",
                "a fold of 3 among 24 channels would be loaded two bytes at a time; both must be"
                " even",
            ),
        )
    ]


def test_on_a_cpu_the_reference_is_no_warning(said):
    for _ in range(2):
        nt_xent(rows(4, 8), rows(4, 8), 0.1)
    assert [level for level, _ in said()] == [logging.INFO]


def test_small_convolutions_are_said_to_run_apart(said):
    shift_conv1x1(FRAMES.as_subclass(OnGpu), rows(8, 16), None, 2, impl="auto")
    assert "shift, then convolution" in said()[0][1]
    assert all(level == logging.INFO for level, _ in said())


def test_a_compiled_fallback_is_said_while_it_is_traced(said):
    compiled = torch.compile(nt_xent, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for n in (4, 5, 6):
        compiled(rows(n, 8), rows(n, 8, seed=1), 0.1)
    ((_, message),) = said()
    assert message.startswith("nt_xent: PyTorch instead")


def test_references_say_that_they_multiply_in_tf32(said):
    z = [rows(4, 8).as_subclass(OnGpu), rows(4, 8).as_subclass(OnGpu)]
    nt_xent(*z, 0.1, impl="torch")
    assert not said()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        nt_xent(*(x.double() for x in z), 0.1, impl="torch")
        assert not said()
        for _ in range(2):
            nt_xent(*z, 0.1, impl="torch")
            sup_con(z[0], LABELS[:4], 0.1, impl="torch")
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    ((level, message),) = said()
    assert level == logging.WARNING and "TF32" in message and "'ieee'" in message


@pytest.fixture
def lookups(monkeypatch, forget_plans):
    """Kernels that Triton was asked for: in the interpreter, which has none, as if compiled."""
    asked = []
    kind = type(kernels.similarity.half_kernel)
    interpret = kind.__getitem__

    class Compiled:
        def __init__(self, kernel, options):
            self.kernel, self.options = kernel, options

        def __getitem__(self, grid):
            return functools.partial(interpret(self.kernel, grid), **self.options)

    def ask(kernel, grid):
        def launch(*args, num_warps, num_stages):
            asked.append(kernel)
            options = {"num_warps": num_warps, "num_stages": num_stages}
            interpret(kernel, grid)(*args, **options)
            return Compiled(kernel, options)

        return launch

    monkeypatch.setattr(kind, "__getitem__", ask)
    return asked


@pytest.mark.parametrize(
    ("name", "launches"), [("nt_xent", 3), ("nt_xent, many rows", 5), ("sup_con", 4)]
)
def test_a_temperature_schedule_asks_for_its_kernels_once(name, launches, lookups):
    inputs, function = OPERATIONS[name]
    inputs = leaves(inputs)
    for step in range(5):
        scheduled = functools.partial(function, temperature=0.1 + step / 100)
        loss, truth = scheduled(*inputs, impl="triton"), scheduled(*inputs, impl="torch")
        torch.testing.assert_close(loss, truth)
        for got, expected in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(truth, inputs), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert len(lookups) == len(set(lookups)) == launches


def test_an_address_off_16_bytes_asks_every_time(lookups):
    """Triton compiles another kernel for it."""
    x = rows(2 * 16 * 4 + 1)
    for first in (0, 1, 1, 0):
        frames = x[first : first + 128].view(2, 16, 2, 2)
        assert torch.equal(
            temporal_shift(frames, 2, impl="triton"), temporal_shift(frames, 2, impl="torch")
        )
    assert len(lookups) == 3


def test_what_differs_in_a_compilation_has_a_plan_of_its_own(lookups):
    frames = rows(4, 16, 2, 2)
    cases = [
        (frames, {}),
        (frames.half(), {}),
        (frames.contiguous(memory_format=torch.channels_last), {}),
        (frames, {"padding": "circulant"}),
        (frames, {"fold_div": 4}),
        (frames[:2], {}),
    ]
    for x, options in cases + cases:
        assert torch.equal(
            temporal_shift(x, 2, **options, impl="triton"),
            temporal_shift(x, 2, **options, impl="torch"),
        )
    assert len(lookups) == len(cases)


README = (pathlib.Path(kernels.__file__).parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_readmes_graph_runs(device, monkeypatch):
    (example,) = re.findall(r"```python\n([^`]*make_graphed_callables[^`]*)```", README)
    if device == "cpu":  # where there is nothing to capture
        monkeypatch.setattr(
            torch.cuda, "make_graphed_callables", lambda function, samples: function
        )
        example = example.replace('"cuda"', '"cpu"')
    names = {}
    exec(example, names)
    z_a, z_b, loss = names["z_a"], names["z_b"], names["loss"]
    assert torch.equal(loss, nt_xent(z_a, z_b, 0.1))
    z = [x.detach().requires_grad_() for x in (z_a, z_b)]
    equal((z_a.grad, z_b.grad), torch.autograd.grad(nt_xent(*z, 0.1), z))


def test_the_readme_opens_with_what_works():
    root = pathlib.Path(__file__).resolve().parents[1]
    named = {}
    exec(re.search(r"```python\n([^`]*)```", README)[1], named)
    assert named["y"].shape == (16, 64, 14, 14)
    signatures = re.findall(r"^\| `(\w+)(\(.*?\))` \|", README, re.MULTILINE)
    public = {name for name in kernels.__all__ if not name.endswith("_reference")}
    assert {name for name, _ in signatures} == public
    for name, signature in signatures:
        given = inspect.signature(getattr(kernels, name))
        bare = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in given.parameters.values()
        ]
        bare = given.replace(parameters=bare, return_annotation=inspect.Signature.empty)
        assert str(bare).replace("'", '"') == signature
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {kernels.__version__}\n" in citation
