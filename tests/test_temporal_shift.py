"""The temporal shift is a copy: every comparison here is bit for bit."""

import random

import pytest
import torch

from kernels import shift_conv1x1, shift_step, temporal_shift, temporal_shift_reference

pytestmark = pytest.mark.kernels


def loops(x, n_segment, fold_div, direction, padding):
    """The definition, frame by frame and channel by channel."""
    y, fold = x.clone(), x.shape[1] // fold_div
    for frame in range(x.shape[0]):
        clip, t = divmod(frame, n_segment)
        for channel in range(x.shape[1]):
            if direction == "both":
                step = 1 if channel < fold else -1 if channel < 2 * fold else 0
            else:
                step = -1 if channel < fold else 0
            source = t + step
            if 0 <= source < n_segment or padding == "circulant":
                y[frame, channel] = x[clip * n_segment + source % n_segment, channel]
            elif padding == "zero":
                y[frame, channel] = 0
            else:
                y[frame, channel] = x[
                    clip * n_segment + min(max(source, 0), n_segment - 1), channel
                ]
    return y


def random_case(draw, dtypes):
    n_segment = draw.randint(1, 5) if draw.random() < 0.97 else draw.randint(6, 64)
    shape = (
        n_segment * draw.choice((1, 1, 1, 2)),
        draw.randint(1, 19),
        draw.randint(1, 3),
        draw.randint(1, 3),
    )
    direction = draw.choice(("both", "past"))
    fold_div = draw.choice((2, 3, 4, 8)) if direction == "both" else draw.choice((1, 2, 4, 8))
    options = {
        "fold_div": fold_div,
        "direction": direction,
        "padding": draw.choice(("zero", "replicate", "circulant")),
    }
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    x = torch.randn(shape, generator=generator).to(draw.choice(dtypes))
    layout = draw.choice(("contiguous", "channels_last", "strided"))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack((x, x), 4)[..., 0]
    dy = torch.randn(shape, generator=generator).to(x.dtype)
    if draw.random() < 0.3:  # the gradient may come in the other layout, or expanded
        dy = dy.contiguous(memory_format=torch.channels_last)
    elif draw.random() < 0.1:
        dy = dy[:1, :1, :1, :1].expand(shape)
    return x, n_segment, options, dy


def forward_and_gradient(fn, x, n_segment, dy, **options):
    x = x.detach().requires_grad_()
    y = fn(x, n_segment, **options)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def same_layout(y, x):
    """Dense in the order of x's own strides, where x is contiguous or channels_last."""
    for layout in (torch.contiguous_format, torch.channels_last):
        if x.is_contiguous(memory_format=layout):
            return y.is_contiguous(memory_format=layout)
    return y.is_contiguous()


def test_reference_is_the_definition():
    draw = random.Random(0)
    for _ in range(60):
        x, n_segment, options, _ = random_case(draw, (torch.float32, torch.int32))
        assert torch.equal(
            temporal_shift_reference(x, n_segment, **options), loops(x, n_segment, **options)
        )


def check_cases(draw, number, dtypes, device="cpu"):
    for case in range(number):
        x, n_segment, options, dy = random_case(draw, dtypes)
        x, dy = x.to(device), dy.to(device)
        expected = forward_and_gradient(temporal_shift_reference, x, n_segment, dy, **options)
        got = forward_and_gradient(temporal_shift, x, n_segment, dy, **options, impl="triton")
        where = f"case {case}: {tuple(x.shape)}, {x.stride()}, {x.dtype}, T={n_segment}, {options}"
        for name, ours, theirs in zip(("forward", "gradient"), got, expected, strict=True):
            assert torch.equal(ours, theirs), f"{name}, {where}"
        assert same_layout(got[0], x) and same_layout(got[1], x), where


def test_kernel_equals_the_reference_in_2000_random_cases():
    check_cases(random.Random(1), 2000, (torch.float32, torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_kernel_equals_the_reference_on_the_gpu(dtype):
    check_cases(random.Random(2), 500, (dtype,), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_two_to_the_31_elements(layout):
    x = torch.empty(
        16, 128, 1040, 1040, dtype=torch.float16, device="cuda", memory_format=layout
    ).random_(-9, 9)
    assert x.numel() > 2**31
    y = temporal_shift(x, 8, impl="triton")
    assert torch.equal(y[8:15, :16], x[9:16, :16]) and torch.equal(y[9:16, 16:32], x[8:15, 16:32])
    assert torch.equal(y[:, 32:], x[:, 32:]) and not y[15, :16].any() and not y[8, 16:32].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("padding", ["zero", "replicate", "circulant"])
@pytest.mark.parametrize("direction", ["both", "past"])
def test_first_and_second_derivatives(impl, padding, direction):
    x = torch.randn(6, 5, 1, 1, dtype=torch.float64, requires_grad=True)

    def shift(x):
        return temporal_shift(x, 3, fold_div=2, direction=direction, padding=padding, impl=impl)

    assert torch.autograd.gradcheck(shift, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(shift, x, fast_mode=True)


def test_a_batch_may_be_empty():
    for impl in ("torch", "triton"):
        x = torch.zeros(0, 8, 2, 2, requires_grad=True)
        temporal_shift(x, 4, impl=impl).sum().backward()
        assert x.grad.shape == x.shape


def test_registered_op_passes_opcheck():
    x = torch.randn(6, 8, 2, 2, requires_grad=True)
    arguments = (x, 3, 1, 2, False, "zero", False, False)
    torch.library.opcheck(torch.ops.kernels.temporal_shift.default, arguments)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_graph_breaks(impl):
    def step(x, n_segment):
        return temporal_shift(x * 2, n_segment, impl=impl).relu()

    x, dy = torch.randn(2, 6, 8, 2, 2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, truth in zip(
        forward_and_gradient(compiled, x, 3, dy), forward_and_gradient(step, x, 3, dy), strict=True
    ):
        assert torch.equal(got, truth)


def test_streaming_equals_offline_over_10000_frames():
    frames, streams = 10_000, 2
    x = torch.randn(streams * frames, 8, 1, 2)
    offline = temporal_shift(x, frames, fold_div=4, direction="past").view(streams, frames, 8, 1, 2)
    state = None
    for t, x_t in enumerate(x.view(streams, frames, 8, 1, 2).unbind(1)):
        y_t, state = shift_step(x_t, state, fold_div=4)
        assert torch.equal(y_t, offline[:, t])
    with pytest.raises(ValueError, match=r"state is \(2, 2, 1, 2\).*expected \(2, 4, 1, 2\)"):
        shift_step(x_t, state, fold_div=2)


def test_shifting_in_place_corrupts_a_residual_block_in_silence():
    """Why there is no in-place form: the shortcut sees the shifted values, and autograd does not
    notice.
    """

    def shift_in_place(x, n_segment):
        x.data.copy_(temporal_shift_reference(x.data, n_segment))
        return x

    convolution = torch.nn.Conv2d(16, 16, 1)
    x = torch.randn(8, 16, 4, 4)
    right = x + convolution(temporal_shift(x, 4))
    aliased = x.clone()
    wrong = aliased + convolution(shift_in_place(aliased, 4))
    wrong.sum().backward()  # no error
    assert (right - wrong).abs().max() > 0.1
    y = temporal_shift(x, 4)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("shape", "n_segment", "options", "message"),
    [
        ((8, 16, 4), 4, {}, "3 dimensions"),
        ((9, 16, 4, 4), 4, {}, "n_segment=4 must divide.*9"),
        ((8, 16, 4, 4), 0, {}, "n_segment=0"),
        ((8, 16, 4, 4), -4, {}, "n_segment=-4 must divide.* 8, and be 1 or more"),
        ((8, 16, 4, 4), 4, {"direction": "future"}, "'future'.*'both' and 'past'"),
        ((8, 16, 4, 4), 4, {"padding": "same"}, "'same'.*circulant"),
        ((8, 16, 4, 4), 4, {"fold_div": 1}, "fold_div=1"),
    ],
)
def test_bad_input_is_named(shape, n_segment, options, message):
    with pytest.raises(ValueError, match=message):
        temporal_shift(torch.zeros(shape), n_segment, **options)
    with pytest.raises(ValueError, match="shift_conv1x1: .*" + message):
        shift_conv1x1(torch.zeros(shape), torch.zeros(2, 16), None, n_segment, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_segment": 4.0}, "n_segment=4.0 must be a Python int"),
        ({"n_segment": True}, "n_segment=True"),
        ({"n_segment": 4, "fold_div": 8.0}, "fold_div=8.0 must be a Python int"),
    ],
)
def test_numbers_that_are_no_integers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        temporal_shift(torch.zeros(8, 16, 4, 4), **options)
    with pytest.raises(ValueError, match=message):
        shift_conv1x1(torch.zeros(8, 16, 4, 4), torch.zeros(2, 16), None, **options)


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        ([0.0], {}, "x_t is a list; it must be a torch.Tensor"),
        (torch.zeros(2, 16, 4), {}, r"3 dimensions.*\(B, C, H, W\)"),
        (torch.zeros(2, 16, 4, 4), {"fold_div": 0}, "fold_div=0 must be 1 or more"),
        (torch.zeros(2, 16, 4, 4), {"fold_div": -8}, "fold_div=-8"),
        (torch.zeros(2, 16, 4, 4), {"fold_div": 2.5}, "fold_div=2.5 must be a Python int"),
        (torch.zeros(3, 16, 4, 4), {}, r"state is \(2, 2, 4, 4\).*expected \(3, 2, 4, 4\)"),
        (torch.zeros(2, 16, 4, 4).half(), {}, "float32 on cpu, expected .*float16 on cpu"),
        (torch.zeros(2, 16, 4, 4, device="meta"), {}, "on cpu, expected .* on meta"),
    ],
)
def test_a_stream_names_bad_input(frame, options, message):
    with pytest.raises(ValueError, match=message):
        shift_step(frame, torch.zeros(2, 2, 4, 4), **options)
