"""Temporal shift folded into the 1x1 convolution that follows it: no memory traffic, and no memory, for the shift.

    y = conv1x1(temporal_shift(x), weight) + bias

In channels_last a 1x1 convolution is a matrix product of x as rows (B*T*H*W, C) and weight as (O, C). The shift moves
whole channels by one frame, H*W rows: column k of row r is loaded from row r + delta(k), delta = +HW, -HW or 0, zeros
beyond the clip.

    dx      the product dy @ weight, column k of row r stored to row r + delta(k), and zeros where no frame wrote
    dweight dy^T times the shifted rows, loaded as in the forward; rows are split into ranges, added up in a fixed order

Loads stay wide because delta is constant over runs of `VECTOR` channels, VECTOR = gcd(fold, C, 8), and the compiler is
told so. Odd folds would be loaded two bytes at a time: there, and for other paddings, layouts and dtypes, the shift
runs alone and cuDNN or cuBLAS follows.

Limits. Triton path: channels_last (contiguous input is converted), fp16 and bf16, fp32 where cuDNN may use TF32;
direction both and past, padding zero. The second derivative raises.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .impl import (
    INTERPRETED,
    ceil_div,
    choose_impl,
    first_derivative_only,
    jit,
    lacks_tensor_cores,
    num_sms,
    on_device_of_first,
    target_name,
)
from .temporal_shift import _folds, temporal_shift, temporal_shift_reference

try:
    import triton.language as tl
except ImportError:
    tl = None

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), chosen by the ahead-of-time reports in README.md.
GPU_TILE = (128, 128, 32, 8, 3)
TILE = (32, 32, 16, 1, 1) if INTERPRETED else GPU_TILE


def shift_conv1x1_reference(x, weight, bias, n_segment, *, fold_div=8, direction="both", padding="zero"):
    """The shift, then the convolution, in plain PyTorch; arguments, result and errors as for `shift_conv1x1`."""
    _check(x, weight, bias)
    shifted = temporal_shift_reference(x, n_segment, fold_div=fold_div, direction=direction, padding=padding)
    return F.conv2d(shifted, weight.reshape(*weight.shape[:2], 1, 1), bias)


@jit
def _row_times(rows, num_rows, area, num_frames):
    """Has row r a next, and a previous, frame in its clip?"""
    t = (rows // area) % num_frames
    return (t + 1 < num_frames) & (rows < num_rows), (t > 0) & (rows < num_rows)


@jit
def _offsets(rows, cols, num_rows, channels, split, num_shifted, area, num_frames):
    """Offsets [rows, cols] of the shifted elements and which of them exist; constant delta over aligned runs of
    columns."""
    has_next, has_previous = _row_times(rows, num_rows, area, num_frames)
    reads_next = (cols < split)[None, :]
    reads_previous = (cols < num_shifted)[None, :]  # after reads_next
    delta = tl.where(reads_next, area, tl.where(reads_previous, -area, 0))
    exists = tl.where(
        reads_next, has_next[:, None], tl.where(reads_previous, has_previous[:, None], (rows < num_rows)[:, None])
    )
    offsets = (rows.to(tl.int64)[:, None] + delta) * channels + cols[None, :]
    return offsets, exists & (cols < channels)[None, :]


@jit
def shift_conv1x1_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    channels,
    outputs,
    split,
    num_shifted,
    area,
    num_frames,
    HAS_BIAS: tl.constexpr,
    VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # True by the caller's choice of VECTOR; it tells the compiler that runs of VECTOR channels move together.
    channels = (channels // VECTOR) * VECTOR
    split = (split // VECTOR) * VECTOR
    num_shifted = (num_shifted // VECTOR) * VECTOR
    outputs = (outputs // OUT_VECTOR) * OUT_VECTOR
    # Neighbouring programs share rows, which then come from memory once however many blocks of outputs there are.
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    offs_m = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, channels, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        offsets, exists = _offsets(offs_m, offs_k, num_rows, channels, split, num_shifted, area, num_frames)
        rows = tl.load(x_ptr + offsets, mask=exists, other=0.0)  # [BLOCK_M, BLOCK_K]
        mask_w = (offs_n < outputs)[:, None] & (offs_k < channels)[None, :]
        weight = tl.load(weight_ptr + offs_n[:, None] * channels + offs_k[None, :], mask=mask_w, other=0.0)
        acc = tl.dot(rows, tl.trans(weight), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < outputs, other=0.0).to(tl.float32)[None, :]
    mask = (offs_m < num_rows)[:, None] & (offs_n < outputs)[None, :]
    offs_y = offs_m.to(tl.int64)[:, None] * outputs + offs_n[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def shift_conv1x1_dx_kernel(
    dy_ptr,
    weight_ptr,
    dx_ptr,
    num_rows,
    channels,
    outputs,
    split,
    num_shifted,
    area,
    num_frames,
    VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of dy times weight, each column stored to the row that it had been read from."""
    channels = (channels // VECTOR) * VECTOR
    split = (split // VECTOR) * VECTOR
    num_shifted = (num_shifted // VECTOR) * VECTOR
    outputs = (outputs // OUT_VECTOR) * OUT_VECTOR
    blocks_n = tl.cdiv(channels, BLOCK_N)
    offs_m = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # channels
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, outputs, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_dy = (offs_m < num_rows)[:, None] & (offs_k < outputs)[None, :]
        offs_dy = offs_m.to(tl.int64)[:, None] * outputs + offs_k[None, :]
        dy = tl.load(dy_ptr + offs_dy, mask=mask_dy, other=0.0)
        mask_w = (offs_k < outputs)[:, None] & (offs_n < channels)[None, :]
        weight = tl.load(weight_ptr + offs_k[:, None] * channels + offs_n[None, :], mask=mask_w, other=0.0)
        acc = tl.dot(dy, weight, acc, input_precision=PRECISION)
    dx = acc.to(dx_ptr.dtype.element_ty)
    offsets, exists = _offsets(offs_m, offs_n, num_rows, channels, split, num_shifted, area, num_frames)
    tl.store(dx_ptr + offsets, dx, mask=exists)
    # Nobody read the first frame's channels that come from the next one, nor the last frame's that come from the
    # previous.
    has_next, has_previous = _row_times(offs_m, num_rows, area, num_frames)
    read = tl.where(
        (offs_n < split)[None, :],
        has_previous[:, None],
        tl.where((offs_n < num_shifted)[None, :], has_next[:, None], True),
    )
    unread = (read == 0) & (offs_m < num_rows)[:, None] & (offs_n < channels)[None, :]
    tl.store(dx_ptr + offs_m.to(tl.int64)[:, None] * channels + offs_n[None, :], tl.zeros_like(dx), mask=unread)


@jit
def shift_conv1x1_dw_kernel(
    x_ptr,
    dy_ptr,
    partial_ptr,
    num_rows,
    channels,
    outputs,
    split,
    num_shifted,
    area,
    num_frames,
    rows_per_range,
    VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dy^T times the shifted rows over one range of rows, fp32, into partial [range, O, C]."""
    channels = (channels // VECTOR) * VECTOR
    split = (split // VECTOR) * VECTOR
    num_shifted = (num_shifted // VECTOR) * VECTOR
    outputs = (outputs // OUT_VECTOR) * OUT_VECTOR
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # outputs
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # channels
    begin = tl.program_id(2) * rows_per_range
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(begin, tl.minimum(begin + rows_per_range, num_rows), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_dy = (offs_k < num_rows)[:, None] & (offs_m < outputs)[None, :]
        offs_dy = offs_k.to(tl.int64)[:, None] * outputs + offs_m[None, :]
        dy = tl.load(dy_ptr + offs_dy, mask=mask_dy, other=0.0)  # [BLOCK_K, BLOCK_M]
        offsets, exists = _offsets(offs_k, offs_n, num_rows, channels, split, num_shifted, area, num_frames)
        rows = tl.load(x_ptr + offsets, mask=exists, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(tl.trans(dy), rows, acc, input_precision=PRECISION)
    mask = (offs_m < outputs)[:, None] & (offs_n < channels)[None, :]
    offs = tl.program_id(2).to(tl.int64) * outputs * channels + offs_m[:, None] * channels + offs_n[None, :]
    tl.store(partial_ptr + offs, acc, mask=mask)


def _hints(x, weight, split, num_shifted):
    vector = math.gcd(math.gcd(split, num_shifted), math.gcd(x.shape[1], 8))
    precision = "tf32" if x.dtype == torch.float32 and not INTERPRETED else "ieee"
    return {"VECTOR": vector, "OUT_VECTOR": math.gcd(weight.shape[0], 8), "PRECISION": precision}


@on_device_of_first
def _forward(x, weight, bias, n_segment, split, num_shifted):
    num, channels, height, width = x.shape
    outputs, num_rows = weight.shape[0], num * height * width
    y = torch.empty((num, outputs, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    block_m, block_n, block_k, warps, stages = TILE
    shift_conv1x1_fwd_kernel[(ceil_div(num_rows, block_m) * ceil_div(outputs, block_n),)](
        x, weight, y if bias is None else bias, y,
        num_rows, channels, outputs, split, num_shifted, height * width, n_segment,
        HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages, **_hints(x, weight, split, num_shifted),
    )  # fmt: skip
    return y


@on_device_of_first
def _backward(dy, x, weight, n_segment, split, num_shifted, needs):
    """-> dx, dweight (O, C), dbias, each where needed."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    num, channels, height, width = x.shape
    outputs, num_rows = weight.shape[0], num * height * width
    block_m, block_n, block_k, warps, stages = TILE
    sizes = (num_rows, channels, outputs, split, num_shifted, height * width, n_segment)
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
    options |= _hints(x, weight, split, num_shifted)
    dx = dweight = dbias = None
    if needs[0]:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        shift_conv1x1_dx_kernel[(ceil_div(num_rows, block_m) * ceil_div(channels, block_n),)](
            dy, weight, dx, *sizes, **options
        )
    if needs[1]:
        tiles = ceil_div(outputs, block_m) * ceil_div(channels, block_n)
        ranges = max(1, min(2 * num_sms(x.device) // tiles, ceil_div(num_rows, 8 * block_k), 256))
        per_range = max(1, ceil_div(ceil_div(num_rows, ranges), block_k)) * block_k
        ranges = max(1, ceil_div(num_rows, per_range))  # of an empty batch one range writes the zeros
        partial = torch.empty(ranges, outputs, channels, dtype=torch.float32, device=x.device)
        shift_conv1x1_dw_kernel[(ceil_div(outputs, block_m), ceil_div(channels, block_n), ranges)](
            x, dy, partial, *sizes, per_range, **options
        )
        dweight = partial.sum(0).to(weight.dtype)
    if needs[2]:
        dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype)
    return dx, dweight, dbias


class _ShiftConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *options):
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return _forward(x, weight, bias, *options)

    @staticmethod
    def backward(ctx, dy):
        with torch.no_grad():
            grads = _backward(dy, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:3])
        return *first_derivative_only(grads, dy, *ctx.saved_tensors), None, None, None


@torch.library.custom_op("kernels::shift_conv1x1", mutates_args=())
def _forward_op(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_segment: int, split: int, num_shifted: int
) -> torch.Tensor:
    return _forward(x, weight, bias, n_segment, split, num_shifted)


@_forward_op.register_fake
def _(x, weight, bias, n_segment, split, num_shifted):
    y = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty_like(y, memory_format=torch.channels_last)


@torch.library.custom_op("kernels::shift_conv1x1_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, n_segment: int, split: int, num_shifted: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(dy, x, weight, n_segment, split, num_shifted, (True, True, True))


@_backward_op.register_fake
def _(dy, x, weight, n_segment, split, num_shifted):
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), dy.new_empty(dy.shape[1])


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _differentiate(ctx, dy):
    dx, dweight, dbias = _backward_op(dy, *ctx.saved_tensors, *ctx.options)
    return dx, dweight, dbias if ctx.has_bias else None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


def _check(x, weight, bias):
    if weight.shape[1:] not in ((x.shape[1],), (x.shape[1], 1, 1)):
        raise ValueError(
            f"shift_conv1x1: weight is {tuple(weight.shape)}; for {x.shape[1]} channels it must be "
            f"(O, {x.shape[1]}) or (O, {x.shape[1]}, 1, 1)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"shift_conv1x1: bias is {tuple(bias.shape)}, expected ({weight.shape[0]},)")


def _tf32_allowed():
    # The old flag's getter raises once the newer setting was used.
    conv = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(conv, "fp32_precision"):
        return conv.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def _why_not_fused(x, split, num_shifted, padding):
    if padding != "zero":
        return f"padding={padding!r} is not folded into the convolution"
    if (num_shifted - split) % 2 or x.shape[1] % 2:
        return f"a fold of {num_shifted - split} among {x.shape[1]} channels would be loaded two bytes at a time"
    if lacks_tensor_cores(x):
        return "Triton has no tensor-core products before compute capability 8.0"
    if x.dtype == torch.float32 and x.is_cuda:
        if torch.version.hip and target_name(x.device) != "gfx942":
            return "this GPU has no TF32"
        if not _tf32_allowed():
            return "fp32 convolutions may not use TF32"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it does not take {x.dtype}"
    return None


def shift_conv1x1(x, weight, bias, n_segment, *, fold_div=8, direction="both", padding="zero", impl="auto"):
    """1x1 convolution of the temporally shifted input, without a shifted copy of it.

    Args:
        x: (B*T, C, H, W), fp16, bf16 or fp32; best channels_last.
        weight: (O, C, 1, 1) or (O, C), x's dtype (under autocast both are cast to autocast's).
        bias: (O,) or None.
        n_segment: T, frames per clip; divides the first dimension.
        fold_div, direction, padding: as for `temporal_shift`.
        impl: "auto" (the fused Triton kernels on a GPU, elsewhere, and where they do not apply, the shift and then the
            convolution; said once through logging.getLogger("kernels")), "triton" or "torch".

    Returns:
        (B*T, O, H, W); channels_last from the fused kernels.

    Raises:
        ValueError: shapes that disagree, an argument outside what is allowed, impl="triton" where it cannot run.
    """
    split, num_shifted = _folds(x, n_segment, fold_div, direction, padding)
    _check(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"shift_conv1x1: x is {x.dtype}, weight {weight.dtype}, bias {bias if bias is None else bias.dtype}"
        )
    options = {"fold_div": fold_div, "direction": direction, "padding": padding}
    if choose_impl("shift_conv1x1", impl, x, _why_not_fused(x, split, num_shifted, padding)) == "torch":
        if impl == "torch":
            return shift_conv1x1_reference(x, weight, bias, n_segment, **options)
        shifted = temporal_shift(x, n_segment, **options)
        return F.conv2d(shifted, weight.reshape(*weight.shape[:2], 1, 1), bias)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.reshape(weight.shape[:2]).contiguous()
    convolve = _forward_op if torch.compiler.is_compiling() else _ShiftConv.apply
    return convolve(x, weight, bias, n_segment, split, num_shifted)
