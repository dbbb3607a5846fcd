"""Temporal shift folded into the 1x1 convolution that follows it.

The shift then takes no memory and no memory traffic.

    y = conv1x1(temporal_shift(x), weight) + bias

In channels_last a 1x1 convolution is a matrix product of x as rows (B*T*H*W, C) and weight as (O,
C). The shift moves whole channels by one frame, H*W rows:

    y        x[r + HW] W_next + x[r - HW] W_previous + x[r] W_rest: the weight's columns of each
             source frame, which stay in shared memory while rows pass; rows beyond the clip are
             zeros
    dx       the product dy @ weight, column k of row r stored to the row that it had been read
             from; what the shift dropped becomes the zeros of the clip's other end
    dweight  dy^T times the shifted rows; rows are split into ranges, added up in a fixed order

The forward's loads are as wide as rows are aligned. Those of dweight and the stores of dx are
VECTOR = gcd(fold, C, 8) channels wide: odd folds would move two bytes at a time. There, and for
other paddings and dtypes, the shift runs alone and cuDNN or cuBLAS follows.

Limits: the table of README.md. Where a fold ends within a load, an infinity or a nan in a channel
beside its end reaches the frames before and after, too (as inf * 0). The second derivative raises.
"""

from __future__ import annotations

import logging
import math

import torch
import torch.nn.functional as F

from .dispatch import (
    INTERPRETED,
    Launch,
    Operation,
    ceil_div,
    check_tensors,
    choose_impl,
    gradients,
    jit,
    lacks_tensor_cores,
    num_sms,
    on_device_of_first,
    plan,
    say_once,
    target_name,
    tl,
)
from .temporal_shift import _folds, temporal_shift, temporal_shift_reference

# Up to so many columns in all products the forward keeps the weight in shared memory while rows
# pass: what is left is reading and writing. Above, and in the backward, tiles of BLOCK_K columns.
RESIDENT = {"interpreter": 64, "sm_80": 128, "sm_90": 256, "sm_100": 128, "gfx942": 128}
# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) by what is computed; chosen on an H200 and by the
# reports in README.md.
TILE = {"fwd": (64, 128, 32, 4, 3), "dx": (64, 64, 64, 4, 3), "dw": (128, 64, 32, 4, 4)}
TILES = {
    "interpreter": dict.fromkeys(TILE, (32, 32, 16, 1, 1)),
    "sm_90": TILE | {"dx": (128, 64, 64, 4, 3)},
    "sm_100": TILE | {"dx": (128, 64, 64, 4, 3)},
}
# Below, input and output largely pass through the second-level cache, where the shift costs little
# and cuDNN's product is faster: on an H200 the forward of 80 MB took 54 us fused and 44 apart, that
# of 193 MB 69 fused and 86 apart.
FUSED_BYTES = 2**27
# One compilation serves every layer of a network: what the compiler must know of sizes, the VECTORs
# tell it.
_SIZES = (
    "num_rows",
    "channels",
    "outputs",
    "split",
    "num_shifted",
    "area",
    "num_frames",
    "rows_per_range",
)


def shift_conv1x1_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n_segment: int,
    *,
    fold_div: int = 8,
    direction: str = "both",
    padding: str = "zero",
) -> torch.Tensor:
    """The shift, then the convolution, in plain PyTorch.

    Arguments, result and errors as for `shift_conv1x1`.
    """
    _check(x, weight, bias)
    shifted = temporal_shift_reference(
        x, n_segment, fold_div=fold_div, direction=direction, padding=padding
    )
    return F.conv2d(shifted, weight.reshape(*weight.shape[:2], 1, 1), bias)


@jit
def _row_times(start, local, num_rows, area, num_frames, SMALL_AREA: tl.constexpr):
    """Has row start + local a next, and a previous, frame in its clip? And is it a row at all?

    One division a tile: a division a row would take longer than the product.
    """
    frame = start // area
    rest = start - frame * area + local
    t = frame % num_frames
    if SMALL_AREA:  # several frames in a tile; exact in fp32, as rest and t stay far below 2^20
        later = ((rest.to(tl.float32) + 0.5) / area).to(tl.int32)
        t = t + later
        t = t - ((t.to(tl.float32) + 0.5) / num_frames).to(tl.int32) * num_frames
    else:
        t = tl.where(rest >= area, t + 1, t)
        t = tl.where(t == num_frames, 0, t)
    inside = local < num_rows - start
    return (t + 1 < num_frames) & inside, (t > 0) & inside, inside


@jit
def _load_shifted(ptr, local, cols, times, channels, split, num_shifted, area):
    """[rows, cols], each column from the row that the shift reads.

    ptr is that of the tile's first row.
    """
    has_next, has_previous, inside = times
    reads_next = (cols < split)[None, :]
    reads_previous = (cols < num_shifted)[None, :]  # after reads_next
    delta = tl.where(cols < split, area, tl.where(cols < num_shifted, -area, 0)) * channels + cols
    exists = tl.where(reads_previous, has_previous[:, None], inside[:, None])
    exists = tl.where(reads_next, has_next[:, None], exists)
    offsets = (local * channels)[:, None] + delta[None, :]
    return tl.load(ptr + offsets, mask=exists & (cols < channels)[None, :], other=0.0)


@jit
def _load(ptr, local, cols, mask_r, width, end):
    """Columns below `end` of rows of `width` numbers, [rows, cols].

    ptr is that of the tile's first row.
    """
    mask = mask_r[:, None] & (cols < end)[None, :]
    return tl.load(ptr + (local * width)[:, None] + cols[None, :], mask=mask, other=0.0)


@jit
def _store_unshifted(
    ptr,
    start,
    local,
    cols,
    dx,
    num_rows,
    channels,
    split,
    num_shifted,
    area,
    num_frames,
    SMALL_AREA,
):
    """Store each column to the row that the shift reads it from.

    A row whose neighbor lies beyond its clip has nowhere to store; it clears the clip's other end,
    which nobody reads.
    """
    has_next, has_previous, inside = _row_times(
        start, local, num_rows, area, num_frames, SMALL_AREA
    )
    reads_next = (cols < split)[None, :]
    reads_previous = ((cols >= split) & (cols < num_shifted))[None, :]
    around = (num_frames - 1) * area
    to_next = tl.where(has_next, area, -around)[:, None]
    to_previous = tl.where(has_previous, -area, around)[:, None]
    delta = tl.where(reads_next, to_next, tl.where(reads_previous, to_previous, 0))
    lost = (reads_next & (has_next == 0)[:, None]) | (reads_previous & (has_previous == 0)[:, None])
    offsets = (local[:, None] + delta).to(tl.int64) * channels + cols[None, :]
    mask = inside[:, None] & (cols < channels)[None, :]
    # Two stores: with a choice between dx and zero, of folds of 2 channels, ptxas lets each
    # instruction of the product wait for the one before.
    tl.store(ptr + offsets, dx.to(ptr.dtype.element_ty), mask=mask & (lost == 0))
    tl.store(ptr + offsets, tl.zeros_like(dx).to(ptr.dtype.element_ty), mask=mask & lost)


@jit
def _weight(weight_ptr, rows, cols, outputs, channels, begin, end):
    mask = (rows < outputs)[:, None] & ((cols >= begin) & (cols < end))[None, :]
    return tl.load(weight_ptr + rows[:, None] * channels + cols[None, :], mask=mask, other=0.0)


@jit(do_not_specialize=_SIZES)
def shift_conv1x1_fwd_kernel(
    x_ptr,  # (rows, C): N, H, W in this order
    weight_ptr,  # (O, C)
    bias_ptr,  # (O,)
    y_ptr,  # (rows, O), written
    num_rows,
    channels,
    outputs,
    split,
    num_shifted,
    area,
    num_frames,
    HAS_BIAS: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    SMALL_AREA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEXT_K: tl.constexpr,
    PREVIOUS_K: tl.constexpr,
    K_1: tl.constexpr,
    K_2: tl.constexpr,
):
    """The weight stays in shared memory while rows pass.

    One product for the columns of the next frame's rows, one for the previous frame's, two for the
    frame's own. Loads are as wide as the alignment of the rows allows, whatever the fold; columns
    that are loaded and belong to another product meet a zero in this one's part of the weight.
    """
    # Changes nothing; tells the compiler that rows are aligned.
    channels = (channels // IN_VECTOR) * IN_VECTOR
    outputs = (outputs // OUT_VECTOR) * OUT_VECTOR
    # Neighboring programs share rows, which then come from memory once however many blocks of
    # outputs there are.
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    offs_n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    end_next = tl.cdiv(split, IN_VECTOR) * IN_VECTOR
    end_previous = tl.cdiv(num_shifted, IN_VECTOR) * IN_VECTOR
    if NEXT_K > 0:
        cols_next = tl.arange(0, NEXT_K)
        weight_next = _weight(weight_ptr, offs_n, cols_next, outputs, channels, 0, split)
    if PREVIOUS_K > 0:
        cols_previous = (split // IN_VECTOR) * IN_VECTOR + tl.arange(0, PREVIOUS_K)
        weight_previous = _weight(
            weight_ptr, offs_n, cols_previous, outputs, channels, split, num_shifted
        )
    if K_1 > 0:
        cols_1 = (num_shifted // IN_VECTOR) * IN_VECTOR + tl.arange(0, K_1)
        weight_1 = _weight(weight_ptr, offs_n, cols_1, outputs, channels, num_shifted, channels)
    if K_2 > 0:
        cols_2 = (num_shifted // IN_VECTOR) * IN_VECTOR + K_1 + tl.arange(0, K_2)
        weight_2 = _weight(weight_ptr, offs_n, cols_2, outputs, channels, num_shifted, channels)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < outputs, other=0.0).to(tl.float32)
    step = tl.num_programs(0) // blocks_n
    for tile in range(tl.program_id(0) // blocks_n, tl.cdiv(num_rows, BLOCK_M), step):
        start = tile * BLOCK_M
        rows_ptr = x_ptr + start.to(tl.int64) * channels
        inside = local < num_rows - start
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if NEXT_K + PREVIOUS_K > 0:
            has_next, has_previous, _ = _row_times(
                start, local, num_rows, area, num_frames, SMALL_AREA
            )
        if NEXT_K > 0:
            rows_next = _load(
                rows_ptr + area * channels, local, cols_next, has_next, channels, end_next
            )
            acc = tl.dot(rows_next, tl.trans(weight_next), acc, input_precision=PRECISION)
        if PREVIOUS_K > 0:
            rows_previous = _load(
                rows_ptr - area * channels,
                local,
                cols_previous,
                has_previous,
                channels,
                end_previous,
            )
            acc = tl.dot(rows_previous, tl.trans(weight_previous), acc, input_precision=PRECISION)
        if K_1 > 0:
            rows_1 = _load(rows_ptr, local, cols_1, inside, channels, channels)
            acc = tl.dot(rows_1, tl.trans(weight_1), acc, input_precision=PRECISION)
        if K_2 > 0:
            rows_2 = _load(rows_ptr, local, cols_2, inside, channels, channels)
            acc = tl.dot(rows_2, tl.trans(weight_2), acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += bias[None, :]
        mask = inside[:, None] & (offs_n < outputs)[None, :]
        tile_ptr = y_ptr + start.to(tl.int64) * outputs
        tl.store(
            tile_ptr + (local * outputs)[:, None] + offs_n[None, :],
            acc.to(y_ptr.dtype.element_ty),
            mask=mask,
        )


@jit(do_not_specialize=_SIZES)
def shift_conv1x1_fwd_loop_kernel(
    x_ptr,  # as above
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
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    SMALL_AREA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same for more channels than fit: one tile of y, BLOCK_K channels at a time."""
    channels = (channels // IN_VECTOR) * IN_VECTOR
    split = (split // VECTOR) * VECTOR
    num_shifted = (num_shifted // VECTOR) * VECTOR
    outputs = (outputs // OUT_VECTOR) * OUT_VECTOR
    blocks_n = tl.cdiv(outputs, BLOCK_N)
    offs_n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    local = tl.arange(0, BLOCK_M)
    start = (tl.program_id(0) // blocks_n) * BLOCK_M
    rows_ptr = x_ptr + start.to(tl.int64) * channels
    times = _row_times(start, local, num_rows, area, num_frames, SMALL_AREA)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, channels, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        rows = _load_shifted(rows_ptr, local, cols, times, channels, split, num_shifted, area)
        weight = _weight(weight_ptr, offs_n, cols, outputs, channels, 0, channels)
        acc = tl.dot(rows, tl.trans(weight), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < outputs, other=0.0).to(tl.float32)[None, :]
    mask = (local < num_rows - start)[:, None] & (offs_n < outputs)[None, :]
    tile_ptr = y_ptr + start.to(tl.int64) * outputs
    tl.store(
        tile_ptr + (local * outputs)[:, None] + offs_n[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask,
    )


@jit(do_not_specialize=_SIZES)
def shift_conv1x1_dx_kernel(
    dy_ptr,  # (rows, O)
    weight_ptr,  # (O, C)
    dx_ptr,  # (rows, C), written
    num_rows,
    channels,
    outputs,
    split,
    num_shifted,
    area,
    num_frames,
    VECTOR: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    SMALL_AREA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of dy times the weight; each column is stored to the row that it had been read from."""
    channels = (channels // IN_VECTOR) * IN_VECTOR
    split = (split // VECTOR) * VECTOR
    num_shifted = (num_shifted // VECTOR) * VECTOR
    outputs = (outputs // OUT_VECTOR) * OUT_VECTOR
    blocks_n = tl.cdiv(channels, BLOCK_N)
    offs_n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)  # channels
    local = tl.arange(0, BLOCK_M)
    start = (tl.program_id(0) // blocks_n) * BLOCK_M
    rows_ptr = dy_ptr + start.to(tl.int64) * outputs
    inside = local < num_rows - start
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, outputs, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        weight = _weight(weight_ptr, cols, offs_n, outputs, channels, 0, channels)
        rows = _load(rows_ptr, local, cols, inside, outputs, outputs)
        acc = tl.dot(rows, weight, acc, input_precision=PRECISION)
    tile_ptr = dx_ptr + start.to(tl.int64) * channels
    _store_unshifted(
        tile_ptr,
        start,
        local,
        offs_n,
        acc,
        num_rows,
        channels,
        split,
        num_shifted,
        area,
        num_frames,
        SMALL_AREA,
    )


@jit(do_not_specialize=_SIZES)
def shift_conv1x1_dw_kernel(
    x_ptr,  # (rows, C)
    dy_ptr,  # (rows, O)
    partial_ptr,  # (ranges, O, C) fp32, written
    num_rows,
    channels,
    outputs,
    split,
    num_shifted,
    area,
    num_frames,
    rows_per_range,
    VECTOR: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    SMALL_AREA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dy^T times the shifted rows over one range of rows, fp32, into partial [range, O, C]."""
    channels = (channels // IN_VECTOR) * IN_VECTOR
    split = (split // VECTOR) * VECTOR
    num_shifted = (num_shifted // VECTOR) * VECTOR
    outputs = (outputs // OUT_VECTOR) * OUT_VECTOR
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # outputs
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # channels
    local = tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * rows_per_range
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, tl.minimum(begin + rows_per_range, num_rows), BLOCK_K):
        start_wide = tl.cast(start, tl.int64)  # a plain number in the interpreter
        times = _row_times(start, local, num_rows, area, num_frames, SMALL_AREA)
        dy_rows_ptr = dy_ptr + start_wide * outputs
        dy = _load(dy_rows_ptr, local, offs_m, times[2], outputs, outputs)  # [BLOCK_K, BLOCK_M]
        x_rows_ptr = x_ptr + start_wide * channels
        rows = _load_shifted(
            x_rows_ptr, local, offs_n, times, channels, split, num_shifted, area
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(tl.trans(dy), rows, acc, input_precision=PRECISION)
    mask = (offs_m < outputs)[:, None] & (offs_n < channels)[None, :]
    range_start = tl.program_id(2).to(tl.int64) * outputs * channels
    offs = range_start + offs_m[:, None] * channels + offs_n[None, :]
    tl.store(partial_ptr + offs, acc, mask=mask)


def _power(width):
    return max(16, 1 << (width - 1).bit_length())


def segments(channels: int, split: int, num_shifted: int) -> dict[str, int]:
    """Columns of the forward's four products, powers of two from 16 on; 0: nothing to multiply."""
    vector = math.gcd(channels, 8)
    first_previous = split // vector * vector
    first_unshifted = num_shifted // vector * vector
    unshifted = channels - first_unshifted
    k_1 = 0 if num_shifted == channels else max(16, 1 << (unshifted.bit_length() - 1))
    return {
        "NEXT_K": _power(split) if split else 0,
        "PREVIOUS_K": _power(num_shifted - first_previous) if num_shifted > split else 0,
        "K_1": k_1,
        "K_2": _power(unshifted - k_1) if 0 < k_1 < unshifted else 0,
    }


def _hints(channels, outputs, area, dtype, split, num_shifted, rows_in_tile):
    return {
        "VECTOR": math.gcd(math.gcd(split, num_shifted), math.gcd(channels, 8)),
        "IN_VECTOR": math.gcd(channels, 8),
        "OUT_VECTOR": math.gcd(outputs, 8),
        "SMALL_AREA": area < rows_in_tile,
        "PRECISION": "tf32" if dtype == torch.float32 and not INTERPRETED else "ieee",
    }


def _tile(what, device, columns):
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages), no more columns wide than there are."""
    block_m, block_n, *rest = TILES.get(target_name(device), TILE)[what]
    return block_m, max(16, min(block_n, 1 << (columns - 1).bit_length())), *rest


@plan
def _forward_plan(shape, outputs, dtype, device, has_bias, n_segment, split, num_shifted, resident):
    num, channels, height, width = shape
    area = height * width
    num_rows = num * area
    block_m, block_n, block_k, warps, stages = _tile("fwd", device, outputs)
    integers = (num_rows, channels, outputs, split, num_shifted, area, n_segment)
    constants = {
        "HAS_BIAS": has_bias,
        **_hints(channels, outputs, area, dtype, split, num_shifted, block_m),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    row_blocks = ceil_div(num_rows, block_m)
    column_blocks = ceil_div(outputs, block_n)
    products = segments(channels, split, num_shifted)
    if dtype.itemsize == 2 and sum(products.values()) <= resident:
        kernel = shift_conv1x1_fwd_kernel
        # Two programs a multiprocessor walk over the rows, all blocks of columns side by side.
        walkers = max(1, min(2 * num_sms(device) // column_blocks, row_blocks))
        grid = (walkers * column_blocks,)
        del constants["VECTOR"]
        constants.update(products)
    else:
        kernel = shift_conv1x1_fwd_loop_kernel
        grid = (row_blocks * column_blocks,)
        constants["BLOCK_K"] = block_k
    return Launch(kernel, grid, integers, constants, warps, stages)


@on_device_of_first
def _forward(x, weight, bias, n_segment, split, num_shifted):
    num, _, height, width = x.shape
    outputs = weight.shape[0]
    y = torch.empty(
        (num, outputs, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    has_bias = bias is not None
    resident = RESIDENT.get(target_name(x.device), 128)
    options = (has_bias, n_segment, split, num_shifted, resident)
    forward = _forward_plan(x.shape, outputs, x.dtype, x.device, *options)
    forward((x, weight, bias if has_bias else y, y))
    return y


@plan
def _backward_plan(shape, outputs, dtype, device, n_segment, split, num_shifted):
    """-> the launch for dx; the shape of the ranges of dweight and the launch for them."""
    num, channels, height, width = shape
    area = height * width
    num_rows = num * area
    integers = (num_rows, channels, outputs, split, num_shifted, area, n_segment)
    block_m, block_n, block_k, warps, stages = _tile("dx", device, channels)
    constants = {
        **_hints(channels, outputs, area, dtype, split, num_shifted, block_m),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }
    grid = (ceil_div(num_rows, block_m) * ceil_div(channels, block_n),)
    dx = Launch(shift_conv1x1_dx_kernel, grid, integers, constants, warps, stages)
    block_m, block_n, block_k, warps, stages = _tile("dw", device, channels)
    tiles = ceil_div(outputs, block_m) * ceil_div(channels, block_n)
    ranges = max(1, min(2 * num_sms(device) // tiles, ceil_div(num_rows, 8 * block_k), 256))
    per_range = max(1, ceil_div(ceil_div(num_rows, ranges), block_k)) * block_k
    ranges = max(1, ceil_div(num_rows, per_range))  # of an empty batch one writes the zeros
    constants = {
        **_hints(channels, outputs, area, dtype, split, num_shifted, block_k),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
    }
    grid = (ceil_div(outputs, block_m), ceil_div(channels, block_n), ranges)
    integers = (*integers, per_range)
    dweight = Launch(shift_conv1x1_dw_kernel, grid, integers, constants, warps, stages)
    return dx, (ranges, outputs, channels), dweight


@on_device_of_first
def _backward(dy, x, weight, n_segment, split, num_shifted, needs):
    """-> dx, dweight (O, C), dbias, each where needed."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    into_dx, ranges, into_ranges = _backward_plan(
        x.shape, weight.shape[0], x.dtype, x.device, n_segment, split, num_shifted
    )
    dx = dweight = dbias = None
    if needs[0]:
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        into_dx((dy, weight, dx))
    if needs[1]:
        partial = torch.empty(ranges, dtype=torch.float32, device=x.device)
        into_ranges((x, dy, partial))
        dweight = partial.sum(0).to(weight.dtype)
    if needs[2]:
        dbias = dy.sum((0, 2, 3), dtype=torch.float32).to(dy.dtype)
    return dx, dweight, dbias


class _ShiftConv(Operation):
    @staticmethod
    def forward(x, weight, bias, *options):
        return _forward(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, *ctx.options = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        return gradients(ctx, _backward, dy, *ctx.options, ctx.needs_input_grad[:3])


@torch.library.custom_op("kernels::shift_conv1x1", mutates_args=())
def _forward_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n_segment: int,
    split: int,
    num_shifted: int,
) -> torch.Tensor:
    return _forward(x, weight, bias, n_segment, split, num_shifted)


@_forward_op.register_fake
def _(x, weight, bias, n_segment, split, num_shifted):
    y = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty_like(y, memory_format=torch.channels_last)


@torch.library.custom_op("kernels::shift_conv1x1_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    n_segment: int,
    split: int,
    num_shifted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(dy, x, weight, n_segment, split, num_shifted, (True, True, True))


@_backward_op.register_fake
def _(dy, x, weight, n_segment, split, num_shifted):
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(weight),
        dy.new_empty(dy.shape[1]),
    )


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _differentiate(ctx, dy):
    dx, dweight, dbias = _backward_op(dy, *ctx.saved_tensors, *ctx.options)
    return dx, dweight, dbias if ctx.has_bias else None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


def _check(x, weight, bias):
    check_tensors("shift_conv1x1", weight=weight)
    if bias is not None:
        check_tensors("shift_conv1x1", bias=bias)
    if weight.shape[1:] not in ((x.shape[1],), (x.shape[1], 1, 1)):
        raise ValueError(
            f"shift_conv1x1: weight is {tuple(weight.shape)}; for {x.shape[1]} channels it must be "
            f"(O, {x.shape[1]}) or (O, {x.shape[1]}, 1, 1)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"shift_conv1x1: bias is {tuple(bias.shape)}, expected ({weight.shape[0]},)"
        )


def _tf32_allowed():
    # The old flag's getter raises once the newer setting was used.
    conv = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(conv, "fp32_precision"):
        return conv.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def _why_not_fused(x, weight, split, num_shifted, padding):
    if padding != "zero":
        return f"padding={padding!r} is not folded into the convolution, 'zero' alone is"
    if (num_shifted - split) % 2 or x.shape[1] % 2:
        return (
            f"a fold of {num_shifted - split} among {x.shape[1]} channels would be loaded two"
            " bytes at a time; both must be even"
        )
    if lacks_tensor_cores(x.device):
        return "Triton has no tensor-core products before compute capability 8.0"
    if x.dtype == torch.float32 and x.is_cuda:
        if torch.version.hip and target_name(x.device) != "gfx942":
            return "this GPU has no TF32"
        if not _tf32_allowed():
            return "fp32 convolutions may not use TF32 (torch.backends.cudnn.conv.fp32_precision)"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    # Offsets within a frame and a tile, and numbers of rows, have 32 bits.
    largest_offset = x[:1].numel() + 128 * max(x.shape[1], weight.shape[0])
    if largest_offset >= 2**31 or x[:, :1].numel() >= 2**31 - 128:
        return "a frame has 2^31 elements or more, or all have as many pixels"
    return None


def shift_conv1x1(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    n_segment: int,
    *,
    fold_div: int = 8,
    direction: str = "both",
    padding: str = "zero",
    impl: str = "auto",
) -> torch.Tensor:
    """1x1 convolution of the temporally shifted input, without a shifted copy of it.

    Args:
        x: (B*T, C, H, W), fp16, bf16 or fp32; best channels_last.
        weight: (O, C, 1, 1) or (O, C), x's dtype (under autocast both are cast to autocast's).
        bias: (O,) or None.
        n_segment: T, frames per clip; divides the first dimension.
        fold_div, direction, padding: as for `temporal_shift`.
        impl: "auto" (the fused Triton kernels on a GPU; elsewhere, where they do not apply, and
            below 128 MiB of input and output, where they are slower, the shift and then the
            convolution; said once through logging.getLogger("kernels")), "triton" (always fused) or
            "torch".

    Returns:
        (B*T, O, H, W); channels_last from the fused kernels.

    Raises:
        ValueError: shapes that disagree, an argument outside what is allowed, impl="triton" where
            it cannot run.
    """
    split, num_shifted = _folds(x, n_segment, fold_div, direction, padding, "shift_conv1x1")
    _check(x, weight, bias)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weight = weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    bias_dtype = None if bias is None else bias.dtype
    if weight.dtype != x.dtype or bias_dtype not in (None, x.dtype):
        raise ValueError(
            f"shift_conv1x1: x is {x.dtype}, weight {weight.dtype}, bias {bias_dtype};"
            " they must agree"
        )
    options = {"fold_div": fold_div, "direction": direction, "padding": padding}
    size = x.numel() * (x.shape[1] + weight.shape[0]) // max(1, x.shape[1]) * x.element_size()
    apart = impl == "auto" and x.is_cuda and size < FUSED_BYTES
    if apart:
        say_once(
            logging.INFO,
            "shift_conv1x1: shift, then convolution: below"
            f" {FUSED_BYTES >> 20} MiB of input and output they are the faster",
        )
    unsupported = _why_not_fused(x, weight, split, num_shifted, padding)
    if apart or choose_impl("shift_conv1x1", impl, x, unsupported) == "torch":
        if impl == "torch":
            return shift_conv1x1_reference(x, weight, bias, n_segment, **options)
        shifted = temporal_shift(x, n_segment, **options)
        return F.conv2d(shifted, weight.reshape(*weight.shape[:2], 1, 1), bias)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.reshape(weight.shape[:2]).contiguous()
    convolve = _forward_op if torch.compiler.is_compiling() else _ShiftConv.call
    return convolve(x, weight, bias, n_segment, split, num_shifted)
