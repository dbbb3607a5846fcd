"""Temporal shift (Lin et al. 2019, arXiv:1811.08383).

Part of the channels of each frame comes from its neighbors in time. x is (B*T, C, H, W), B clips of
T = n_segment frames; with fold = C // fold_div:

    both   channels [0, fold) read frame t+1, channels [fold, 2 fold) read frame t-1, the rest stay
    past   channels [0, fold) read frame t-1, the rest stay: what a stream can do, see `shift_step`

What lies beyond the clip is zeros ("zero"), the clip's own first or last frame ("replicate"), or
its other end ("circulant").

One pass: a program owns some elements of a frame for all T frames of a clip and keeps the previous,
the current and the next frame in registers, so each element is read once and written once,
contiguous or channels_last. The gradient is the transposed shift: for zeros and circulant the
opposite one; it saves nothing and can itself be differentiated.

There is no in-place form. A residual block adds its input to a function of its shifted input:
shifting in place changes both, no error is raised, and training goes wrong
(mit-han-lab/temporal-shift-module#105).
"""

from __future__ import annotations

import math

import torch

from .dispatch import (
    INTERPRETED,
    Launch,
    Operation,
    ceil_div,
    check_tensors,
    choose_impl,
    jit,
    on_device_of_first,
    plan,
    tl,
)

PADDINGS = ("zero", "replicate", "circulant")
# Elements of a program: 16-byte accesses for 16-bit types, 32 registers.
BLOCK_SIZE, NUM_WARPS = (128, 1) if INTERPRETED else (1024, 4)


def temporal_shift_reference(
    x: torch.Tensor,
    n_segment: int,
    *,
    fold_div: int = 8,
    direction: str = "both",
    padding: str = "zero",
) -> torch.Tensor:
    """Temporal shift in plain PyTorch; arguments, result and errors as for `temporal_shift`."""
    num_next, num_shifted = _folds(x, n_segment, fold_div, direction, padding)
    clips = x.unflatten(0, (-1, n_segment))  # [B, T, C, H, W]
    read_next = clips[:, :, :num_next]
    read_next = torch.cat((read_next[:, 1:], _beyond(read_next, -1, padding)), 1)
    read_previous = clips[:, :, num_next:num_shifted]
    read_previous = torch.cat((_beyond(read_previous, 0, padding), read_previous[:, :-1]), 1)
    shifted = torch.cat((read_next, read_previous, clips[:, :, num_shifted:]), 2)
    return shifted.flatten(0, 1).contiguous(memory_format=_memory_format(x))


def _beyond(clips, end, padding):
    """The frame beyond a clip's first (end 0) or last (end -1): [B, 1, channels, H, W]."""
    frame = clips[:, [end if padding != "circulant" else -1 - end]]
    return torch.zeros_like(frame) if padding == "zero" else frame


def _memory_format(x):
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


@jit(do_not_specialize=["num_frames", "frame_size", "channels", "area", "split", "num_shifted"])
def temporal_shift_kernel(
    x_ptr,  # (N, C, H, W) or (N, H, W, C) in memory
    y_ptr,  # the same, written
    num_frames,
    frame_size,
    channels,
    area,
    split,
    num_shifted,
    CHANNELS_LAST: tl.constexpr,
    SWAP: tl.constexpr,
    PADDING: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels [0, split) read the next frame and [split, num_shifted) the previous one.

    With SWAP the other way round.
    """
    # True by the caller's choice of VECTOR; it tells the compiler that frames start at multiples of
    # an access's width.
    frame_size = (frame_size // VECTOR) * VECTOR
    blocks = tl.cdiv(frame_size, BLOCK)
    clip = (tl.program_id(0) // blocks).to(tl.int64) * num_frames * frame_size
    offs = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < frame_size
    channel = offs % channels if CHANNELS_LAST else offs // area
    first_group = channel < split
    second_group = (channel >= split) & (channel < num_shifted)
    reads_next = second_group if SWAP else first_group
    reads_previous = first_group if SWAP else second_group
    first = tl.load(x_ptr + clip + offs, mask=mask)
    previous = tl.zeros_like(first)
    if PADDING == "circulant":
        last_frame = clip + (num_frames - 1) * frame_size.to(tl.int64)
        previous = tl.load(x_ptr + last_frame + offs, mask=mask)
    elif PADDING == "replicate" and not TRANSPOSED:
        # Not `first` itself: some versions of Triton take two values that enter a loop as one for
        # one value.
        previous = tl.where(mask, first, previous)
    current = first
    for t in range(0, num_frames):
        base = clip + t * frame_size.to(tl.int64)
        following_size = tl.where(t + 1 < num_frames, frame_size, 0)
        following = tl.load(x_ptr + base + frame_size + offs, mask=offs < following_size, other=0.0)
        if t + 1 == num_frames:
            if PADDING == "circulant":
                following = first
            elif PADDING == "replicate" and not TRANSPOSED:
                following = current
        y = tl.where(reads_next, following, tl.where(reads_previous, previous, current))
        if PADDING == "replicate" and TRANSPOSED:
            # The first and last frames were read twice, once as themselves and once for the frame
            # beyond them.
            twice = (reads_next & (t == 0)) | (reads_previous & (t + 1 == num_frames))
            y = tl.where(twice, y + current, y)
        tl.store(y_ptr + base + offs, y, mask=mask)
        previous = current
        current = following


@plan
def _shift_plan(
    shape, dtype, device, n_segment, split, num_shifted, swap, padding, transposed, channels_last
):
    num, channels, height, width = shape
    frame_size = channels * height * width
    constants = {
        "CHANNELS_LAST": channels_last,
        "SWAP": swap,
        "PADDING": padding,
        "TRANSPOSED": transposed,
        "VECTOR": math.gcd(frame_size, 8),
        "BLOCK": BLOCK_SIZE,
    }
    integers = (n_segment, frame_size, channels, height * width, split, num_shifted)
    grid = (ceil_div(frame_size, BLOCK_SIZE) * (num // n_segment),)
    return Launch(temporal_shift_kernel, grid, integers, constants, NUM_WARPS)


@on_device_of_first
def _launch(x, *options):
    """options: those of `_shift_plan`, channels_last at the end."""
    layout = torch.channels_last if options[-1] else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout)
    if x.numel():
        _shift_plan(x.shape, x.dtype, x.device, *options)((x, y))
    return y


class _TemporalShift(Operation):
    @staticmethod
    def forward(x, *options):
        return _launch(x, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx, dy):
        return _TemporalShift.call(dy, *_transpose(*ctx.options)), *(None,) * 7


def _transpose(n_segment, split, num_shifted, swap, padding, transposed, channels_last):
    return n_segment, split, num_shifted, not swap, padding, not transposed, channels_last


@torch.library.custom_op("kernels::temporal_shift", mutates_args=())
def _temporal_shift_op(
    x: torch.Tensor,
    n_segment: int,
    split: int,
    num_shifted: int,
    swap: bool,
    padding: str,
    transposed: bool,
    channels_last: bool,
) -> torch.Tensor:
    return _launch(x, n_segment, split, num_shifted, swap, padding, transposed, channels_last)


@_temporal_shift_op.register_fake
def _(x, n_segment, split, num_shifted, swap, padding, transposed, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


def _differentiate(ctx, dy):
    return _temporal_shift_op(dy, *_transpose(*ctx.options)), *(None,) * 7


_temporal_shift_op.register_autograd(_differentiate, setup_context=_TemporalShift.setup_context)


def _check_integer(op, name, value):
    # A bool is an int to Python; a torch.SymInt, of a traced shape, is none.
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ValueError(f"{op}: {name}={value!r} must be a Python int")


def _folds(x, n_segment, fold_div, direction, padding, op="temporal_shift"):
    """-> the ends of the channels that read the next frame and of those that read the previous."""
    check_tensors(op, x=x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has {x.dim()} dimensions; it must be (B*T, C, H, W)")
    _check_integer(op, "n_segment", n_segment)
    _check_integer(op, "fold_div", fold_div)
    if n_segment < 1 or x.shape[0] % n_segment:
        raise ValueError(
            f"{op}: n_segment={n_segment} must divide the number of frames, {x.shape[0]}, and be 1"
            " or more"
        )
    if direction not in ("both", "past"):
        raise ValueError(f"{op}: direction={direction!r}, allowed are 'both' and 'past'")
    if padding not in PADDINGS:
        raise ValueError(f"{op}: padding={padding!r}, allowed are {', '.join(PADDINGS)}")
    least = 2 if direction == "both" else 1
    if fold_div < least:
        raise ValueError(
            f"{op}: fold_div={fold_div} with direction={direction!r} must be {least} or more"
        )
    fold = x.shape[1] // fold_div
    return (fold, 2 * fold) if direction == "both" else (0, fold)


def temporal_shift(
    x: torch.Tensor,
    n_segment: int,
    *,
    fold_div: int = 8,
    direction: str = "both",
    padding: str = "zero",
    impl: str = "auto",
) -> torch.Tensor:
    """Shift part of the channels by one frame in time.

    Args:
        x: (B*T, C, H, W), any dtype (complex: reference only); contiguous or channels_last, which
            the result and the gradient keep (other strides are copied).
        n_segment: T, frames per clip; divides the first dimension.
        fold_div: C // fold_div channels are shifted in each direction (none where C < fold_div).
        direction: "both" or "past".
        padding: "zero", "replicate" or "circulant".
        impl: "auto" (Triton on a GPU, else the reference; said once through
            logging.getLogger("kernels")), "triton" or "torch".

    Returns:
        Tensor like x, never sharing its memory.

    Raises:
        ValueError: an argument outside what is allowed, impl="triton" where it cannot run.

    Source: Lin et al. 2019, arXiv:1811.08383.
    """
    split, num_shifted = _folds(x, n_segment, fold_div, direction, padding)
    unsupported = None
    if x[:1].numel() >= 2**31 - BLOCK_SIZE:
        unsupported = "a frame has 2^31 elements or more"
    elif x.is_complex():
        unsupported = "complex numbers"
    if choose_impl("temporal_shift", impl, x, unsupported) == "torch":
        return temporal_shift_reference(
            x, n_segment, fold_div=fold_div, direction=direction, padding=padding
        )
    channels_last = _memory_format(x) == torch.channels_last
    shift = _temporal_shift_op if torch.compiler.is_compiling() else _TemporalShift.call
    return shift(x, n_segment, split, num_shifted, False, padding, False, channels_last)


def shift_step(
    x_t: torch.Tensor, state: torch.Tensor | None, *, fold_div: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """One frame of `temporal_shift(direction="past", padding="zero")`, for streams.

    Args:
        x_t: (B, C, H, W), the current frame of each stream.
        state: what the previous call returned, (B, C // fold_div, H, W), or None at a stream's
            first frame.
        fold_div: as in training.

    Returns:
        The shifted frame, like x_t, and the state for the next call; neither shares x_t's memory.

    Raises:
        ValueError: a frame that is not (B, C, H, W), a fold_div that is no integer from 1 on, a
            state of another shape, dtype or device.
    """
    check_tensors("shift_step", x_t=x_t)
    if state is not None:
        check_tensors("shift_step", state=state)
    if x_t.dim() != 4:
        raise ValueError(f"shift_step: x_t has {x_t.dim()} dimensions; it must be (B, C, H, W)")
    _check_integer("shift_step", "fold_div", fold_div)
    if fold_div < 1:
        raise ValueError(f"shift_step: fold_div={fold_div} must be 1 or more")
    fold = x_t.shape[1] // fold_div
    expected = (x_t.shape[0], fold, *x_t.shape[2:])
    if state is None:
        state = x_t.new_zeros(expected)
    elif (state.shape, state.dtype, state.device) != (expected, x_t.dtype, x_t.device):
        raise ValueError(
            f"shift_step: state is {tuple(state.shape)} {state.dtype} on {state.device}, expected"
            f" {expected} {x_t.dtype} on {x_t.device}"
        )
    return torch.cat((state, x_t[:, fold:]), 1), x_t[:, :fold].clone()
