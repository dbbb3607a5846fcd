"""The fused shift and 1x1 convolution against the two of them, one after the other, in fp64."""

import logging

import pytest
import torch
import torch.nn.functional as F

from kernels import shift_conv1x1, shift_conv1x1_reference, temporal_shift_reference

pytestmark = pytest.mark.kernels


def run(fn, x, weight, bias, *args, dy, **kwargs):
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = fn(inputs[0], inputs[1], inputs[2] if bias is not None else None, *args, **kwargs)
    return [
        y.detach().double(),
        *(g.double() for g in torch.autograd.grad(y, inputs, dy.to(y.dtype))),
    ]


def case(frames, channels, outputs, height, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (frames, channels, height, width),
        (outputs, channels),
        (outputs,),
        (frames, outputs, height, width),
    )
    x, weight, bias, dy = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x.contiguous(memory_format=torch.channels_last), weight / channels**0.5, bias, dy


# (frames, T, C, O, H, W, fold_div): tiles are 32 x 32 x 16 in the interpreter; folds of 10, 2, 8,
# 16, 0, 6 and 20 channels.
CASES = [
    (4, 2, 80, 40, 2, 3, 8),
    (6, 3, 10, 7, 3, 3, 4),
    (8, 8, 64, 32, 2, 2, 8),
    (3, 1, 64, 33, 3, 1, 4),
    (4, 4, 6, 16, 5, 5, 8),
    (10, 5, 24, 24, 1, 1, 4),
    (2, 2, 80, 96, 4, 5, 4),
]


@pytest.mark.parametrize("direction", ["both", "past"])
@pytest.mark.parametrize("shape", CASES)
def test_kernels_equal_shift_then_convolution(shape, direction):
    frames, n_segment, channels, outputs, height, width, fold_div = shape
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        for with_bias in (True, False):
            x, weight, bias, dy = case(frames, channels, outputs, height, width, dtype)
            bias = bias if with_bias else None
            options = {"fold_div": fold_div, "direction": direction, "dy": dy}
            doubles = [t if t is None else t.double() for t in (x, weight, bias)]
            expected = run(shift_conv1x1_reference, *doubles, n_segment, **options)
            got = run(shift_conv1x1, x, weight, bias, n_segment, **options, impl="triton")
            for name, ours, theirs in zip(
                ("y", "dx", "dweight", "dbias"), got, expected, strict=False
            ):
                assert (ours - theirs).norm() <= tolerance * theirs.norm(), (name, dtype)


def test_layouts_and_weights_of_both_forms():
    x, weight, bias, dy = case(4, 16, 8, 3, 3)
    expected = run(shift_conv1x1, x, weight, bias, 2, dy=dy, impl="triton")
    convolution_weight = weight.view(8, 16, 1, 1)
    for got, truth in zip(
        run(
            shift_conv1x1,
            x.contiguous(),
            convolution_weight,
            bias,
            2,
            dy=dy.contiguous(),
            impl="triton",
        ),
        expected,
        strict=True,
    ):
        assert torch.equal(got.reshape(truth.shape), truth)
    y = shift_conv1x1(x, weight, bias, 2, impl="triton")
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_what_is_not_fused_runs_unfused_and_says_so(caplog):
    with caplog.at_level(logging.INFO, logger="kernels"):
        for channels, padding in ((12, "replicate"), (40, "circulant"), (24, "zero")):
            x, weight, bias, _ = case(4, channels, 8, 2, 2)
            y = shift_conv1x1(x, weight, bias, 2, padding=padding)
            shifted = temporal_shift_reference(x, 2, padding=padding)
            torch.testing.assert_close(y, F.conv2d(shifted, weight[..., None, None], bias))
    x, weight, bias, _ = case(4, 24, 8, 2, 2)
    with pytest.raises(ValueError, match="fold of 3 .* two bytes"):
        shift_conv1x1(x, weight, bias, 2, impl="triton")
    with pytest.raises(ValueError, match="padding='replicate'"):
        shift_conv1x1(x, weight, bias, 2, padding="replicate", impl="triton")


def test_autocast_is_followed():
    x, weight, bias, _ = case(4, 16, 8, 2, 2)
    with torch.autocast("cpu", torch.float16):
        fused = shift_conv1x1(x, weight, bias, 2, impl="triton")
        plain = F.conv2d(temporal_shift_reference(x, 2), weight[..., None, None], bias)
    assert fused.dtype == plain.dtype == torch.float16
    torch.testing.assert_close(fused, plain, rtol=2e-3, atol=2e-3)


def test_second_derivative_raises():
    x, weight, bias, dy = case(4, 16, 8, 2, 2)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(
        shift_conv1x1(x, weight, bias, 2, impl="triton"), x, dy, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_registered_op_passes_opcheck():
    x, weight, bias, _ = (t.requires_grad_() for t in case(4, 16, 8, 2, 2))
    for b in (bias, None):
        torch.library.opcheck(torch.ops.kernels.shift_conv1x1.default, (x, weight, b, 2, 2, 4))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_graph_breaks(impl):
    def step(x, weight, bias, n_segment):
        return shift_conv1x1(x * 2, weight, bias, n_segment, impl=impl).relu()

    x, weight, bias, dy = case(4, 16, 8, 2, 2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, truth in zip(
        run(compiled, x, weight, bias, 2, dy=dy), run(step, x, weight, bias, 2, dy=dy), strict=True
    ):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(8, 15), None, r"weight is \(8, 15\).*16 channels"),
        (torch.zeros(8, 16, 3, 3), None, "must be"),
        (torch.zeros(8, 16), torch.zeros(7), r"bias is \(7,\)"),
        (torch.zeros(8, 16).half(), None, "float32, weight torch.float16"),
        (torch.nn.Conv2d(16, 8, 1), None, "weight is a Conv2d; it must be a torch.Tensor"),
        (torch.zeros(8, 16), 0.0, "bias is a float"),
    ],
)
def test_bad_input_is_named(weight, bias, message):
    with pytest.raises(ValueError, match=message):
        shift_conv1x1(torch.zeros(4, 16, 2, 2), weight, bias, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("direction", ["both", "past"])
@pytest.mark.parametrize(
    "shape",  # the last has too many channels for its weight to stay
    [
        (64, 8, 160, 640, 14, 14, 8),
        (32, 8, 96, 192, 28, 28, 4),
        (16, 8, 80, 40, 7, 7, 8),
        (16, 8, 512, 64, 7, 7, 8),
    ],
)
def test_kernels_equal_shift_then_convolution_on_the_gpu(shape, direction, dtype):
    frames, n_segment, channels, outputs, height, width, fold_div = shape
    x, weight, bias, dy = (t.cuda() for t in case(frames, channels, outputs, height, width, dtype))
    options = {"fold_div": fold_div, "direction": direction, "dy": dy}
    expected = run(
        shift_conv1x1_reference, x.double(), weight.double(), bias.double(), n_segment, **options
    )
    eager = run(shift_conv1x1_reference, x, weight, bias, n_segment, **options)
    got = run(shift_conv1x1, x, weight, bias, n_segment, **options, impl="triton")
    for ours, eagers, truth in zip(got, eager, expected, strict=True):
        assert (ours - truth).norm() <= (eagers - truth).norm() + torch.finfo(
            dtype
        ).eps * truth.norm()
