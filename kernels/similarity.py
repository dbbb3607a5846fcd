"""Row sums over exp of similarities, and their gradient, tile by tile: for `nt_xent` and `sup_con`.

Rows u_i (m, D) meet keys u_j (k, D), of which the first m are the rows themselves. A row's own
group, the 2**pair_shift rows that share i >> pair_shift, is left out: the row alone (pair_shift 0)
or the row and its positive (pair_shift 1). With s_ij = <u_i, u_j>:

    log-sum-exp   lse_i = log sum_j exp(s_ij)
    weighted sum  g_i = sum_j (exp(s_ij - lse_i) + exp(s_ij - lse_j)) u_j

s is symmetric, so where rows and keys are the same each tile serves twice. Half grid: of T column
blocks, block J visits row blocks J, J+1, ..., J + T/2 (mod T), so that every pair of blocks meets
once; one exponential feeds its row and its column. A tile's column sums stay in the registers of
the block that owns the columns; its row sums go to a slot of their own, [offset, row], written
once: no atomics, the same bits in every run. Slots are capped at 64 MB by passes over the offsets.

One exponential can only serve two rows if both use the same shift. Rows of length sqrt(c) give |s|
<= c (base 2, c = log2(e) / tau), and 2^(s - c) does for c <= 62. Above, 2^(s - c + h) with h = 2c -
124 neither overflows nor vanishes, antipodes included, up to c = 112.7, tau = 0.0128. Below that,
for rows of unknown length and for keys from other processes the full grid runs, with a running
maximum; and up to 4,096 rows, where writing and merging the half grid's slots costs more than half
the tiles (forward and backward of NT-Xent at M = 2,048 on an H200: 29.4 us with the full grid, 30.4
with the half one; at M = 8,192, 110 and 106).

Which path when, of M rows of this process:

    forward   M <= 1,024 (SupCon 2,048), own keys, a shift: all in one kernel of the loss's file
              M <= 4,096, no shift, or gathered keys: full_kernel
              else: half_kernel
              statistics: stats_kernel, on the full grid
    backward  few rows of NT-Xent: one kernel of its file
              else: bwd_kernel, whose ranges are then added up
    positives of SupCon: few rows in the forward; up to 16,384 a product with (y_i = y_j); else,
              with gathered keys, statistics or rows, sums over sorted labels

In the Triton path s is in base 2 (rows carry sqrt(log2 e)); rows are 16-bit, or two 16-bit planes
side by side, hi + lo, for fp32.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dispatch import (
    INTERPRETED,
    Launch,
    ceil_div,
    jit,
    lacks_tensor_cores,
    num_sms,
    plan,
    say_once,
    target_name,
)

try:
    import triton.language as tl
except ImportError:
    tl = None

Gather = Callable[[torch.Tensor], torch.Tensor]
REDUCTIONS = ("mean", "sum", "none")

# A row shorter than this has no direction: it is mapped to zeros, and it gets no gradient rather
# than 1e12 times one.
NORM_EPS = 1e-12
MAX_FUSED_D = 512
# Rows carry 1 / sqrt(tau), which leaves fp16's range at 3e-10 and, from 1e4 on, its digits.
FUSED_TEMPERATURES = (1e-4, 1e4)
REFERENCE_TILE = 1024  # rows and keys: 4 MB in fp32; even, so that pairs of rows stay together
LOG2_E = math.log2(math.e)
MAX_SHIFTED = LOG2_E / 0.0128
SLOT_BYTES = 2**26
# Up to so many rows halving the tiles gains less than merging their slots costs.
FULL_GRID_ROWS = 0 if INTERPRETED else 4096
# fp16 ends at 6e-8, and a mean weight at m = 131,072 is 8e-6: scaled by this a weight keeps its
# digits, and 2 * 2^13 fits.
LOG2_FP16_SCALE = 13.0
# Every row buffer is padded to a multiple of it, and so is every grid.
BLOCK = 32 if INTERPRETED else 128

# (BLOCK_M, BLOCK_N, warps, stages) of the half, the full and the backward kernel, by planes and
# BLOCK_D; a fifth number of the backward's, True, is AHEAD. Nothing spills; within that the half
# grid's owner and the backward's key block are as wide as leaves two blocks on a multiprocessor
# (reports in README.md). Targets without a table take the last one.
TILES = {
    "sm_80": {
        (1, 64): ((64, 128, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2)),
        (1, 128): ((64, 128, 4, 2), (64, 128, 4, 2), (64, 128, 4, 2)),
        (1, 256): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (1, 512): ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 2)),
        (2, 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (2, 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    },
    "sm_90": {
        (1, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3)),
        (1, 128): ((64, 128, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2)),
        (1, 256): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (1, 512): ((64, 64, 8, 1), (64, 64, 8, 1), (64, 32, 8, 2)),
        (2, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
        (2, 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    },
    "sm_100": {
        (1, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
        (1, 128): ((64, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2)),
        (1, 256): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (1, 512): ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
        (2, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
        (2, 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    },
    "gfx942": {
        (1, 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (1, 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1)),
        (1, 256): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2)),
        (1, 512): ((64, 64, 8, 1), (64, 64, 8, 1), (32, 32, 4, 2)),
        (2, 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (2, 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1)),
    },
    "other": {
        (1, 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (1, 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (1, 256): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (2, 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        (2, 128): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    },
}
# (BLOCK_M, BLOCK_N, warps, stages) of the kernels that take a few rows through all keys.
FEW_ROWS_TILES = {
    "interpreter": (16, 32, 1, 1),
    "sm_80": (16, 128, 4, 3),
    "sm_90": (16, 128, 4, 3),
    "sm_100": (16, 128, 4, 3),
    "other": (16, 64, 4, 2),  # fits 64 KB of shared memory
}


class Stats(NamedTuple):
    """What the similarities of a loss's M rows say, found while they were made; no gradients.

    Of `nt_xent` M is 2N, z_a's rows above z_b's. K are the rows of all processes. Ties count
    against a row, also those within rounding (32 units in the last place of fp32, of fp64 for fp64
    inputs): a collapsed representation scores 0. So does nan.
    """

    loss: torch.Tensor  # (M,) the rows' losses
    lse: torch.Tensor  # (M,) natural log-sum-exp of similarity / tau, the loss's denominator
    positive: torch.Tensor  # (M,) similarity / tau of the positive, or the mean of several
    top1: torch.Tensor  # (M,) bool: the nearest of all other rows is a positive
    # Of `nt_xent` alone, else None.
    rank: torch.Tensor | None  # (M,) int64: 0 to K - 2 negatives are at least as near
    # (M,) mean exp(-2 |z_i - z_j|^2) over the K - 1 other rows: the log of its mean is the
    # uniformity of Wang and Isola 2020, arXiv:2005.10242. None without normalization, too.
    potential: torch.Tensor | None


def few_rows_tile(target: str) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) where a program takes a few rows through all keys."""
    return FEW_ROWS_TILES.get(target, FEW_ROWS_TILES["other"])


def tile(kernel: str, num_planes: int, width: int, target: str) -> tuple[int, ...] | None:
    """(BLOCK_M, BLOCK_N, warps, stages) of kernel "half", "full" or "bwd"; None if it cannot fit.

    Rows are num_planes planes of `width` columns (BLOCK_D).
    """
    if target == "interpreter":
        return (16, 32, 1, 1)
    sizes = TILES.get(target, TILES["other"]).get((num_planes, max(64, width)))
    return None if sizes is None else sizes[("half", "full", "bwd").index(kernel)]


def why_not_fused(
    z: torch.Tensor, normalized: bool, temperature: float | torch.Tensor
) -> str | None:
    """Why the Triton kernels cannot take rows like z, if they cannot.

    A tensor's temperature is not looked at, which would wait for the GPU.
    """
    low, high = FUSED_TEMPERATURES
    if not isinstance(temperature, torch.Tensor) and not low <= temperature <= high:
        return f"it takes temperatures from {low:g} to {high:g}"
    return _why_not_fused(z.dtype, z.shape[1], z.device, normalized)


@functools.cache
def _why_not_fused(dtype, dim, device, normalized):
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if lacks_tensor_cores(device):
        return "Triton has no tensor-core products before compute capability 8.0"
    num_planes = 1 + planes(dtype, normalized)[1]
    target = target_name(device)
    if dim > MAX_FUSED_D or tile("bwd", num_planes, block_d(dim), target) is None:
        widths = [
            width for count, width in TILES.get(target, TILES["other"]) if count == num_planes
        ]
        rows = f"{dtype} rows" if normalized else "rows that are not normalized"
        return f"D={dim}, and of {rows} it takes D up to {max(widths)}"
    return None


def own_rows_first(
    gather: Gather, rows: torch.Tensor, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """All processes' rows, rotated so that this process's come first.

    The own block is found by equality, on the device and without waiting for it, so no process
    group and no rank is needed here. Two processes with equal blocks (and labels) may take either:
    by symmetry nothing changes.

    Args:
        gather: (n, ...) -> (W n, ...), all processes' rows in rank order; without autograd; n the
            same everywhere.
        rows: (n, F).
        labels: None, or (n,), gathered and rotated like the rows.

    Returns:
        (W n, F) rows, the int64 index (W n,) that rotates further gathers alike, and the labels
        (W n,) or None.

    Raises:
        ValueError: gather returned rows of another number, width or dtype.
    """
    gathered = gather(rows)
    n, width = rows.shape
    fits = gathered.dim() == 2 and gathered.shape[0] % n == 0 and gathered.shape[1] == width
    if not fits or gathered.dtype != rows.dtype:
        raise ValueError(
            f"gather returned {tuple(gathered.shape)} {gathered.dtype} for {tuple(rows.shape)}"
            f" {rows.dtype}; expected all processes' rows concatenated along dimension 0, the same"
            " number from each"
        )
    same = (gathered.reshape(-1, n, width) == rows).flatten(1).all(1)
    if labels is not None:
        labels_gathered = gather(labels)
        same &= (labels_gathered.view(-1, n) == labels).all(1)
    num_gathered = gathered.shape[0]
    first = same.int().argmax() * n
    index = (torch.arange(num_gathered, device=rows.device) + first) % num_gathered
    labels_first = None if labels is None else labels_gathered[index]
    return gathered.index_select(0, index), index, labels_first


def normalize_rows(z: torch.Tensor) -> torch.Tensor:
    """Rows divided by their lengths, differentiably.

    A row shorter than NORM_EPS becomes zeros, with a zero gradient.
    """
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return torch.where(norm <= NORM_EPS, 0.0, z / norm.clamp_min(NORM_EPS))  # a nan stays a nan


def reference_tiles(
    rows: torch.Tensor, keys: torch.Tensor, pair_shift: int
) -> Iterator[tuple[slice, slice, torch.Tensor, bool]]:
    """Yield (row slice, key slice, similarities [rows, keys], mirrored).

    Each row's own group is masked to -inf. Where keys are the rows themselves only tiles on and
    above the diagonal come; a mirrored one stands for its transpose too.
    """
    if (
        rows.is_cuda
        and rows.dtype == torch.float32
        and torch.backends.cuda.matmul.fp32_precision == "tf32"
    ):
        say_once(
            logging.WARNING,
            "the references multiply in TF32, as torch.backends.cuda.matmul allows:"
            " similarities have 11 binary digits (fp32_precision = 'ieee' gives all)",
        )
    step = REFERENCE_TILE
    symmetric = keys is rows
    for m in range(0, rows.shape[0], step):
        for n in range(m if symmetric else 0, keys.shape[0], step):
            s = rows[m : m + step] @ keys[n : n + step].T
            if n == m:
                diagonal = torch.arange(s.shape[0], device=s.device)
                s[diagonal, diagonal] = -math.inf
                if pair_shift:
                    s[diagonal, diagonal ^ 1] = -math.inf
            yield slice(m, m + step), slice(n, n + step), s, symmetric and n != m


def reference_lse(
    rows: torch.Tensor, keys: torch.Tensor, pair_shift: int, watch: Callable | None = None
) -> torch.Tensor:
    """Natural log-sum-exp of each row over the keys outside its group: (m, D), (k, D) -> (m,).

    watch(row slice, key slice, similarities) sees each row with each key once.
    """
    top = rows.new_full((rows.shape[0],), -math.inf)
    total = rows.new_zeros(rows.shape[0])

    def add(where, s, dim):
        new_top = torch.maximum(top[where], s.amax(dim))
        shift = new_top.masked_fill(new_top == -math.inf, 0.0)  # exp(-inf - -inf) is nan
        tile_sum = (s - shift.unsqueeze(dim)).exp_().sum(dim)
        total[where] = total[where] * (top[where] - shift).exp() + tile_sum
        top[where] = new_top

    for m, n, s, mirrored in reference_tiles(rows, keys, pair_shift):
        if watch is not None:
            watch(m, n, s)
            if mirrored:
                watch(n, m, s.T)
        add(m, s, 1)
        if mirrored:
            add(n, s, 0)
    return top + total.log()


def reference_weighted_sum(rows, keys, lse_rows, lse_keys, pair_shift) -> torch.Tensor:
    """The weighted sum g of the module's docstring, natural log-sum-exps: (m, D)."""
    out = torch.zeros_like(rows)
    for m, n, s, mirrored in reference_tiles(rows, keys, pair_shift):
        weight = (s - lse_rows[m, None]).exp_()
        weight += s.sub_(lse_keys[n]).exp_()
        out[m].addmm_(weight, keys[n])
        if mirrored:
            out[n].addmm_(weight.T, rows[m])
    return out


def with_row_gradients(weighted_sum: Callable, d_rows, d_keys, lse_rows, lse_keys) -> torch.Tensor:
    """sum_j (d_i exp(s_ij - lse_i) + d_j exp(s_ij - lse_j)) u_j, for upstream gradients d: (m, D).

    weighted_sum(lse_rows, lse_keys), natural, is that sum with d = 1. A factor above zero is one
    more summand in the exponent, so each sign is a pass.
    """
    top = d_keys.abs().max()
    top = torch.where(top == 0, 1.0, top)
    total = 0.0
    for sign in (1.0, -1.0):
        of_rows, of_keys = ((sign * d / top).clamp_min(0).log() for d in (d_rows, d_keys))
        total = total + sign * weighted_sum(lse_rows - of_rows, lse_keys - of_keys)
    return total * top


def tie_margin(u: torch.Tensor) -> torch.Tensor:
    """(m,): within how much of a similarity of a row another one is as large, to what is known."""
    length = torch.linalg.vector_norm(u, dim=1)
    return 32 * torch.finfo(u.dtype).eps * length * length.max()


@jit
def load_rows(ptr, rows, offs_d, stride_n, stride_d, num_rows, dim):
    """[rows, BLOCK_D] fp32 of a matrix of any strides, zeros beyond it."""
    mask = (rows < num_rows)[:, None] & (offs_d < dim)[None, :]
    ptrs = ptr + rows[:, None] * stride_n + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@jit
def inverse_norm(x, NORMALIZE: tl.constexpr, EPS: tl.constexpr):
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(x * x, 1))
        return tl.where(norm > EPS, 1.0 / tl.maximum(norm, EPS), 0.0)
    return tl.full([x.shape[0]], 1.0, tl.float32)


@jit
def sum_ranges(
    partial_ptr, rows, offs_d, num_slots, stride_slot, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Add up what `weighted_sums` left for some rows: [BLOCK_R, BLOCK_D]."""
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for slot in range(0, num_slots):
        slot_ptr = partial_ptr + slot * stride_slot
        total += tl.load(slot_ptr + rows[:, None] * BLOCK_D + offs_d[None, :])
    return total


@jit
def merge_slots(
    tops_ptr,
    sums_ptr,
    rows,
    mask_r,
    shift,
    num_slots,
    half_slot,
    half_row,
    stride_slot,
    SHIFTED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The log-sum-exps, base 2, of what `slot_sums` left for some rows: [BLOCK_R]."""
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, num_slots, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        offs = slots.to(tl.int64)[:, None] * stride_slot + rows[None, :]
        written = (slots != half_slot)[:, None] | (rows >= half_row)[None, :]
        mask = (slots < num_slots)[:, None] & mask_r[None, :] & written
        sums = tl.load(sums_ptr + offs, mask=mask, other=0.0)  # [SLOTS, BLOCK_R]
        if SHIFTED:
            total += tl.sum(sums, 0)
        else:
            tops = tl.load(tops_ptr + offs, mask=mask, other=float("-inf"))
            new_top = tl.maximum(top, tl.max(tops, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - base) + tl.sum(sums * tl.exp2(tops - base[None, :]), 0)
            top = new_top
    if SHIFTED:
        top = tl.full([BLOCK_R], 0.0, tl.float32) + shift
    return log2_sum(total, top)


@jit
def log2_sum(total, top):
    # Compared with zero alone: a nan is no empty sum.
    empty = total == 0.0
    return tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))


@jit
def comes_last(count_ptr):
    """Is this the last program of the launch to come here?

    What the others stored before is then there to be read. Which program is last differs between
    runs; what it does, adding up in the order of the programs, does not. count_ptr[0] is zero
    before the launch.
    """
    tl.debug_barrier()
    return tl.atomic_add(count_ptr, 1.0, sem="acq_rel") == tl.num_programs(0) - 1


@jit
def sum_of_programs(ptr):
    """One number of each program, added up by the one that comes last."""
    WIDTH: tl.constexpr = 128
    total = tl.zeros([WIDTH], tl.float32)
    programs = tl.num_programs(0)
    for first in range(0, programs, WIDTH):
        offs = first + tl.arange(0, WIDTH)
        # Past the first-level cache, which knows nothing of what other multiprocessors wrote.
        total += tl.load(ptr + offs, mask=offs < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@jit
def round_to_bf16(x):
    """fp32 rounded to bf16's 8 digits, to nearest even, still fp32.

    Also in the interpreter, whose own cast truncates.
    """
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@jit
def store_planes(
    u_ptr, rows, offs_d, x, FP16: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store fp32 rows rounded to 16 bits, or (SPLIT) as two 16-bit planes side by side, hi + lo."""
    ptrs = u_ptr + rows[:, None] * (BLOCK_D * 2 if SPLIT else BLOCK_D) + offs_d[None, :]
    hi = x.to(tl.float16).to(tl.float32) if FP16 else round_to_bf16(x)
    tl.store(ptrs, hi.to(u_ptr.dtype.element_ty))
    if SPLIT:
        lo = x - hi if FP16 else round_to_bf16(x - hi)
        tl.store(ptrs + BLOCK_D, lo.to(u_ptr.dtype.element_ty))


@jit
def similarities(rows, rows_lo, keys, keys_lo, SPLIT: tl.constexpr):
    """[BLOCK_M, BLOCK_N] fp32; with SPLIT three 16-bit products, and only lo x lo is dropped."""
    keys_t = tl.trans(keys)
    s = tl.dot(rows, keys_t, input_precision="ieee")
    if SPLIT:
        s = tl.dot(rows_lo, keys_t, s, input_precision="ieee")
        s = tl.dot(rows, tl.trans(keys_lo), s, input_precision="ieee")
    return s


@jit
def add_weighted(acc, weight, keys, keys_lo, SPLIT: tl.constexpr):
    """acc + weight @ keys; with SPLIT three products again."""
    hi = weight.to(keys.dtype)
    acc = tl.dot(hi, keys, acc, input_precision="ieee")
    if SPLIT:
        lo = (weight - hi.to(tl.float32)).to(keys.dtype)
        acc = tl.dot(hi, keys_lo, acc, input_precision="ieee")
        acc = tl.dot(lo, keys, acc, input_precision="ieee")
    return acc


@jit
def load_planes(ptr, rows, offs_d, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    ptrs = ptr + rows.to(tl.int64)[:, None] * (BLOCK_D * 2 if SPLIT else BLOCK_D) + offs_d[None, :]
    hi = tl.load(ptrs)
    return hi, tl.load(ptrs + BLOCK_D) if SPLIT else hi


@jit(
    do_not_specialize=[
        "num_rows",
        "num_blocks",
        "first_offset",
        "last_offset",
        "first_slot",
        "offsets_per_range",
    ]
)
def half_kernel(
    u_ptr,
    slots_ptr,
    shift,
    num_rows,
    num_blocks,
    first_offset,
    last_offset,
    first_slot,
    offsets_per_range,
    stride_slot,
    PAIR_SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of 2^(s - shift), as the module's docstring has it.

    Those of the rows of tile (J + offset, J) go into slot [offset - first_slot], those of columns J
    into a slot per range.
    """
    owner = tl.program_id(0)
    key_range = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    local_n = tl.arange(0, BLOCK_N)
    offs_n = owner * BLOCK_N + local_n
    cols, cols_lo = load_planes(u_ptr, offs_n, offs_d, SPLIT, BLOCK_D)
    begin = first_offset + key_range * offsets_per_range
    end = tl.minimum(begin + offsets_per_range, last_offset)
    # With an even number of blocks the farthest offset pairs J with J + T/2 twice: the lower half
    # of the owners does it.
    if (num_blocks % 2 == 0) & (owner * 2 >= num_blocks):
        end = tl.minimum(end, num_blocks // 2)
    PARTS: tl.constexpr = BLOCK_N // BLOCK_M
    inside_n = local_n < num_rows - owner * BLOCK_N
    # Rows r and r + 8 of a tile lie in one thread's registers: adding such pairs is free, adding
    # all rows costs shuffles.
    col_sums = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)
    # The diagonal block holds (i, j) and (j, i): its columns are all there is to add. A loop of its
    # own, as one more mask in the other loop would cost it 30 registers; likewise masks compare
    # within the block, with constants.
    for part in range(0, tl.where(begin == 0, PARTS, 0)):
        local_m = part * BLOCK_M + tl.arange(0, BLOCK_M)
        rows, rows_lo = load_planes(u_ptr, owner * BLOCK_N + local_m, offs_d, SPLIT, BLOCK_D)
        e = tl.exp2(similarities(rows, rows_lo, cols, cols_lo, SPLIT) - shift)  # [BLOCK_M, BLOCK_N]
        same_group = (local_m >> PAIR_SHIFT)[:, None] == (local_n >> PAIR_SHIFT)[None, :]
        e = tl.where(same_group | (local_m >= num_rows - owner * BLOCK_N)[:, None], 0.0, e)
        col_sums += tl.sum(tl.reshape(e, [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)
    for step in range(tl.maximum(begin, 1) * PARTS, end * PARTS):
        offset = step // PARTS
        block = (owner + offset) % num_blocks
        local_m = (step % PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_m = block * BLOCK_N + local_m
        rows, rows_lo = load_planes(u_ptr, offs_m, offs_d, SPLIT, BLOCK_D)
        e = tl.exp2(similarities(rows, rows_lo, cols, cols_lo, SPLIT) - shift)
        if owner == num_blocks - 1:
            e = tl.where(inside_n[None, :], e, 0.0)
        if block == num_blocks - 1:
            e = tl.where((local_m < num_rows - block * BLOCK_N)[:, None], e, 0.0)
        col_sums += tl.sum(tl.reshape(e, [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)
        row_slot_ptr = slots_ptr + (offset - first_slot).to(tl.int64) * stride_slot
        tl.store(row_slot_ptr + offs_m, tl.sum(e, 1))
    slot = last_offset - first_slot + key_range
    tl.store(slots_ptr + slot.to(tl.int64) * stride_slot + offs_n, tl.sum(tl.sum(col_sums, 0), 0))


@jit(do_not_specialize=["num_keys"])
def full_kernel(
    rows_ptr,
    keys_ptr,
    tops_ptr,
    sums_ptr,
    num_keys,
    keys_per_range,
    stride_slot,
    PAIR_SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Maximum and sum of 2^(s - maximum) of a block of rows over a range of keys, into its slot."""
    pid_m = tl.program_id(0)
    key_range = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, rows_lo = load_planes(rows_ptr, offs_m, offs_d, SPLIT, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin = key_range * keys_per_range
    for start in range(begin, tl.minimum(begin + keys_per_range, num_keys), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys, keys_lo = load_planes(keys_ptr, offs_n, offs_d, SPLIT, BLOCK_D)
        s = similarities(rows, rows_lo, keys, keys_lo, SPLIT)  # [BLOCK_M, BLOCK_N]
        diagonal = (start < (pid_m + 1) * BLOCK_M) & (start + BLOCK_N > pid_m * BLOCK_M)
        if diagonal | (start + BLOCK_N > num_keys):
            same_group = (offs_m >> PAIR_SHIFT)[:, None] == (offs_n >> PAIR_SHIFT)[None, :]
            s = tl.where(same_group | (offs_n >= num_keys)[None, :], float("-inf"), s)
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # 2^(-inf - -inf) is nan
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new_top
    tl.store(tops_ptr + key_range.to(tl.int64) * stride_slot + offs_m, top)
    tl.store(sums_ptr + key_range.to(tl.int64) * stride_slot + offs_m, total)


@jit
def _weights(
    s,
    lse_rows,
    lse_keys_ptr,
    offs_m,
    start,
    shift,
    num_keys,
    MASKED: tl.constexpr,
    SHIFTED: tl.constexpr,
    PAIR_SHIFT: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weights of the keys from start on; lse_rows: with SHIFTED 2^(shift - lse)."""
    local_n = tl.arange(0, BLOCK_N)
    inside = local_n < num_keys - start  # as in half_kernel
    if MASKED:
        lse_keys = tl.load(lse_keys_ptr + start + local_n, mask=inside, other=float("inf"))
    else:
        lse_keys = tl.load(lse_keys_ptr + start + local_n)
    if SHIFTED:
        inverse_keys = tl.exp2(shift - lse_keys)
        weight = tl.exp2(s - (shift - LOG2_SCALE)) * (lse_rows[:, None] + inverse_keys[None, :])
    else:
        weight = tl.exp2(s - (lse_rows - LOG2_SCALE)[:, None])
        weight += tl.exp2(s - (lse_keys - LOG2_SCALE)[None, :])
    if MASKED:
        same_group = ((offs_m - start) >> PAIR_SHIFT)[:, None] == (local_n >> PAIR_SHIFT)[None, :]
        weight = tl.where(same_group | (inside == 0)[None, :], 0.0, weight)
    return weight


@jit(do_not_specialize=["num_rows", "num_keys"])
def stats_kernel(
    rows_ptr,
    keys_ptr,
    of_rows_ptr,
    of_keys_ptr,
    factor_ptr,
    slots_ptr,
    num_rows,
    num_keys,
    keys_per_range,
    stride_slot,
    stride_kind,
    PAIR_SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`full_kernel`, and two more numbers of each row beside its maximum and its sum.

    For pairs (PAIR_SHIFT 1): how many similarities are not below the row's bound (of_rows), and the
    sum of 2^(factor s - 4 log2(e)). Else, with the classes of rows and keys: the largest similarity
    of a row's own class, and of others.
    """
    pid_m = tl.program_id(0)
    key_range = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, rows_lo = load_planes(rows_ptr, offs_m, offs_d, SPLIT, BLOCK_D)
    of_rows = tl.load(of_rows_ptr + offs_m, mask=offs_m < num_rows, other=0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if PAIR_SHIFT:
        factor = tl.load(factor_ptr)
        first = tl.zeros([BLOCK_M], tl.float32)
        second = tl.zeros([BLOCK_M], tl.float32)
    else:
        first = tl.full([BLOCK_M], float("-inf"), tl.float32)
        second = tl.full([BLOCK_M], float("-inf"), tl.float32)
    begin = key_range * keys_per_range
    for start in range(begin, tl.minimum(begin + keys_per_range, num_keys), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys, keys_lo = load_planes(keys_ptr, offs_n, offs_d, SPLIT, BLOCK_D)
        s = similarities(rows, rows_lo, keys, keys_lo, SPLIT)  # [BLOCK_M, BLOCK_N]
        same_group = (offs_m >> PAIR_SHIFT)[:, None] == (offs_n >> PAIR_SHIFT)[None, :]
        s = tl.where(same_group | (offs_n >= num_keys)[None, :], float("-inf"), s)
        if PAIR_SHIFT:
            first += tl.sum(tl.where(s < of_rows[:, None], 0.0, 1.0), 1)
            second += tl.sum(tl.exp2(s * factor - 5.770780163555854), 1)
        else:
            classes = tl.load(of_keys_ptr + offs_n, mask=offs_n < num_keys, other=0)
            same = of_rows[:, None] == classes[None, :]
            first = tl.maximum(first, tl.max(tl.where(same, s, float("-inf")), 1))
            second = tl.maximum(second, tl.max(tl.where(same, float("-inf"), s), 1))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = new_top
    out = slots_ptr + key_range.to(tl.int64) * stride_slot + offs_m
    tl.store(out, top)
    tl.store(out + stride_kind, total)
    tl.store(out + 2 * stride_kind, first)
    tl.store(out + 3 * stride_kind, second)


@jit(do_not_specialize=["num_rows", "num_keys"])
def bwd_kernel(
    rows_ptr,
    keys_ptr,
    lse_rows_ptr,
    lse_keys_ptr,
    partial_ptr,
    shift,
    num_rows,
    num_keys,
    keys_per_range,
    stride_slot,
    SHIFTED: tl.constexpr,
    PAIR_SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The weighted sum over one range of keys, fp32, into slot [range, row].

    SHIFTED: one exponential serves both terms. AHEAD: the similarities of the next keys are under
    way while the exponentials of these are taken.

    Blocks of keys that need no mask come first, in a loop of their own: with a branch between the
    two products of a tile ptxas lets each of their instructions wait for the one before.
    """
    pid_m = tl.program_id(0)
    key_range = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    rows, rows_lo = load_planes(rows_ptr, offs_m, offs_d, SPLIT, BLOCK_D)
    lse_rows = tl.load(lse_rows_ptr + offs_m, mask=offs_m < num_rows, other=float("inf"))
    if SHIFTED:
        lse_rows = tl.exp2(shift - lse_rows)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = key_range * keys_per_range
    end = tl.minimum(begin + keys_per_range, num_keys)
    whole = tl.minimum(end, num_keys // BLOCK_N * BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_N else BLOCK_N
    diagonal = pid_m * BLOCK_M // WIDTH * WIDTH
    # The part of the diagonal's blocks that lies in this range.
    first = tl.maximum(diagonal, begin)
    masked = tl.maximum(tl.minimum(diagonal + WIDTH, whole) - first, 0)
    if AHEAD:
        start = tl.where(begin < first, begin, begin + masked)
        start = tl.maximum(tl.minimum(start, whole - BLOCK_N), 0)  # where there is none, any
        keys, keys_lo = load_planes(keys_ptr, start + local_n, offs_d, SPLIT, BLOCK_D)
        s = similarities(rows, rows_lo, keys, keys_lo, SPLIT)  # [BLOCK_M, BLOCK_N]
    for step in range(begin, whole - masked, BLOCK_N):
        start = tl.where(step < first, step, step + masked)
        if AHEAD:
            next_step = tl.minimum(step + BLOCK_N, whole - masked - BLOCK_N)  # the last one twice
            next_start = tl.where(next_step < first, next_step, next_step + masked)
            next_keys, next_keys_lo = load_planes(
                keys_ptr, next_start + local_n, offs_d, SPLIT, BLOCK_D
            )
            next_s = similarities(rows, rows_lo, next_keys, next_keys_lo, SPLIT)
        else:
            keys, keys_lo = load_planes(keys_ptr, start + local_n, offs_d, SPLIT, BLOCK_D)
            s = similarities(rows, rows_lo, keys, keys_lo, SPLIT)
        weight = _weights(
            s,
            lse_rows,
            lse_keys_ptr,
            offs_m,
            start,
            shift,
            num_keys,
            False,
            SHIFTED,
            PAIR_SHIFT,
            LOG2_SCALE,
            BLOCK_N,
        )
        acc = add_weighted(acc, weight, keys, keys_lo, SPLIT)
        if AHEAD:
            keys = next_keys
            keys_lo = next_keys_lo
            s = next_s
    for step in range(whole - masked, end, BLOCK_N):
        start = tl.where(step < whole, first + step - (whole - masked), step)
        keys, keys_lo = load_planes(keys_ptr, start + local_n, offs_d, SPLIT, BLOCK_D)
        s = similarities(rows, rows_lo, keys, keys_lo, SPLIT)
        weight = _weights(
            s,
            lse_rows,
            lse_keys_ptr,
            offs_m,
            start,
            shift,
            num_keys,
            True,
            SHIFTED,
            PAIR_SHIFT,
            LOG2_SCALE,
            BLOCK_N,
        )
        acc = add_weighted(acc, weight, keys, keys_lo, SPLIT)
    slot_ptr = partial_ptr + key_range.to(tl.int64) * stride_slot
    out = slot_ptr + offs_m.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(out, acc * 2.0 ** (-LOG2_SCALE))


def block_d(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def padded(num_rows: int) -> int:
    return ceil_div(num_rows, BLOCK) * BLOCK


def planes(dtype: torch.dtype, normalized: bool) -> tuple[torch.dtype, bool]:
    """The 16-bit type in which rows reach the tensor cores, and whether they are split, hi + lo.

    Normalized fp32 rows are two fp16 planes (22 bits; bf16 would hold 16). Rows of unknown length
    may leave fp16's range.
    """
    if not normalized:
        return torch.bfloat16, True
    if dtype == torch.bfloat16:
        return torch.bfloat16, False
    return torch.float16, dtype == torch.float32


def row_buffer(
    num_rows: int, dim: int, dtype: torch.dtype, normalized: bool
) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of a padded row matrix.

    In the interpreter, whose bf16 products are wrong, bf16 values travel as fp32.
    """
    plane, split = planes(dtype, normalized)
    plane = torch.float32 if INTERPRETED and plane == torch.bfloat16 else plane
    return (padded(num_rows), block_d(dim) * (2 if split else 1)), plane


def empty_rows(
    num_rows: int, dim: int, dtype: torch.dtype, normalized: bool, device: torch.device
) -> torch.Tensor:
    shape, plane = row_buffer(num_rows, dim, dtype, normalized)
    return torch.empty(shape, dtype=plane, device=device)


def shift_of(temperature: float | None, normalized: bool) -> float | None:
    """The shift that one exponential may share between row and column, base 2; None: no such."""
    if temperature is None or not normalized or LOG2_E / temperature > MAX_SHIFTED:
        return None
    farthest = LOG2_E / temperature
    # Only as much headroom as antipodes need: an exponent near 100 would cost E its last five bits.
    return farthest - max(0.0, 2 * farthest - 124.0)


@functools.cache
def _num_ranges(blocks: int, steps: int, most: int, slots: int) -> int:
    """Into how many ranges to cut each block's steps.

    The programs are to fill whole waves of the device's slots. The cost of a wave is its steps plus
    two for loading, storing and, later, reading the partial result.
    """

    def cost(num_ranges: int) -> float:
        per_range = ceil_div(steps, num_ranges)
        return ceil_div(blocks * ceil_div(steps, per_range), slots) * (per_range + 2)

    return min(range(1, max(1, min(steps, most, 64)) + 1), key=cost)


def key_ranges(
    blocks: int, num_keys: int, block_n: int, range_bytes: int, device: torch.device
) -> tuple[int, int]:
    """-> into how many ranges to cut the keys of each block of rows; keys of a range.

    range_bytes: what all blocks store of one range.
    """
    steps = ceil_div(num_keys, block_n)
    num_ranges = _num_ranges(blocks, steps, SLOT_BYTES // range_bytes or 1, 2 * num_sms(device))
    per_range = ceil_div(steps, num_ranges)
    return ceil_div(steps, per_range), per_range * block_n


def gather_keys(
    gather: Gather | None, u: torch.Tensor, num_rows: int
) -> tuple[torch.Tensor, int, torch.Tensor | None]:
    """-> keys, padded like u; how many they are; the index for further gathers.

    For one process that is None.
    """
    if gather is None:
        return u, num_rows, None
    keys, index, _ = own_rows_first(gather, u[:num_rows])
    num_keys = keys.shape[0]
    return F.pad(keys, (0, 0, 0, padded(num_keys) - num_keys)), num_keys, index


def slot_sums(u, keys, num_rows, num_keys, pair_shift, split, shift):
    """Launch the forward tiles.

    Returns:
        tops: (slots, padded) maxima of the slots, or None where every slot is relative to shift.
        sums: (slots, padded) fp32, base 2.
        half_slot, half_row: rows below half_row have nothing in slot half_slot (-1: there is no
            such slot).
    """
    size = u.shape[0]
    if shift is None or keys is not u or num_rows <= FULL_GRID_ROWS:
        num_ranges, full = _full_plan(u.shape, u.dtype, u.device, num_keys, pair_shift, split)
        tops = torch.empty(num_ranges, size, dtype=torch.float32, device=u.device)
        sums = torch.empty_like(tops)
        full((u, keys, tops, sums))
        return tops, sums, -1, 0
    passes, half_slot, half_row = _half_plan(
        u.shape, u.dtype, u.device, num_rows, pair_shift, split
    )
    total = None
    for slots, half in passes:
        sums = torch.empty(slots, size, dtype=torch.float32, device=u.device)
        half((u, sums), shift)
        if len(passes) == 1:
            return None, sums, half_slot, half_row
        if half_slot >= 0 and half is passes[-1][1]:
            sums[half_slot, :half_row].zero_()
        total = sums.sum(0) if total is None else total.add_(sums.sum(0))
        del sums  # before the next pass takes as much again
    return None, total[None], -1, 0


def stats_sums(u, keys, num_rows, num_keys, pair_shift, split, of_rows, of_keys, factor):
    """Launch the forward tiles that keep statistics, on the full grid.

    -> tops and sums as of `slot_sums`; (num_rows,) fp32, two of them: see `stats_kernel`.
    """
    options = (num_rows, num_keys, pair_shift, split, of_rows.dtype)
    num_ranges, launch = _stats_plan(u.shape, u.dtype, u.device, *options)
    slots = torch.empty(4, num_ranges, u.shape[0], dtype=torch.float32, device=u.device)
    launch((u, keys, of_rows, of_keys, factor, slots))
    more = slots[2:, :, :num_rows]
    return slots[0], slots[1], *(more.sum(1) if pair_shift else more.amax(1))


@plan
def _stats_plan(shape, dtype, device, num_rows, num_keys, pair_shift, split, of_rows):
    """-> the number of slots, the launch. of_rows: the dtype of bounds or classes."""
    size, dim = shape[0], shape[1] // (2 if split else 1)
    # The forward's tile of 512 columns would spill on gfx942.
    block_m, block_n, warps, stages, *_ = tile("bwd", 1 + split, dim, target_name(device))
    num_ranges, per_range = key_ranges(size // block_m, num_keys, block_n, 16 * size, device)
    constants = {
        "PAIR_SHIFT": pair_shift,
        "SPLIT": split,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": dim,
    }
    integers = (num_rows, num_keys, per_range, size, num_ranges * size)
    grid = (size // block_m, num_ranges)
    return num_ranges, Launch(stats_kernel, grid, integers, constants, warps, stages)


@plan
def _full_plan(shape, dtype, device, num_keys, pair_shift, split):
    """-> the number of slots, the launch."""
    size, dim = shape[0], shape[1] // (2 if split else 1)
    block_m, block_n, warps, stages = tile("full", 1 + split, dim, target_name(device))
    num_ranges, per_range = key_ranges(size // block_m, num_keys, block_n, 8 * size, device)
    constants = {
        "PAIR_SHIFT": pair_shift,
        "SPLIT": split,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": dim,
    }
    integers = (num_keys, per_range, size)
    grid = (size // block_m, num_ranges)
    return num_ranges, Launch(full_kernel, grid, integers, constants, warps, stages)


@plan
def _half_plan(shape, dtype, device, num_rows, pair_shift, split):
    """-> (slots, launch) of each pass; half_slot of the last pass and half_row."""
    size, dim = shape[0], shape[1] // (2 if split else 1)
    block_m, block_n, warps, stages = tile("half", 1 + split, dim, target_name(device))
    constants = {
        "PAIR_SHIFT": pair_shift,
        "SPLIT": split,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": dim,
    }
    # None is empty: only the last is ragged, and the kernel masks no other.
    blocks = ceil_div(num_rows, block_n)
    offsets = blocks // 2 + 1
    num_ranges = _num_ranges(blocks, offsets * (block_n // block_m), offsets, 2 * num_sms(device))
    per_pass = max(1, min(offsets, SLOT_BYTES // (4 * size) - num_ranges))
    passes = []
    for first in range(0, offsets, per_pass):
        last = min(first + per_pass, offsets)
        per_range = ceil_div(last - first, min(num_ranges, last - first))
        ranges = ceil_div(last - first, per_range)
        first_slot = max(first, 1)  # the diagonal has no row sums
        integers = (num_rows, blocks, first, last, first_slot, per_range, size)
        half = Launch(half_kernel, (blocks, ranges), integers, constants, warps, stages)
        passes.append((last - first_slot + ranges, half))
    half_slot = last - first_slot - 1 if blocks % 2 == 0 else -1
    return passes, half_slot, blocks // 2 * block_n


def weighted_sums(u, keys, lse, lse_keys, num_rows, num_keys, pair_shift, split, shift, fp16):
    """Launch the backward tiles -> (ranges, padded, BLOCK_D) fp32, to be added up."""
    shifted = shift is not None
    of_rows = (u.shape, u.dtype, u.device)
    shape, bwd = _weighted_plan(*of_rows, num_rows, num_keys, pair_shift, split, shifted, fp16)
    partial = torch.empty(shape, dtype=torch.float32, device=u.device)
    bwd((u, keys, lse, lse_keys, partial), shift or 0.0)
    return partial


@plan
def _weighted_plan(shape, dtype, device, num_rows, num_keys, pair_shift, split, shifted, fp16):
    """-> the shape of the result, the launch."""
    size, dim = shape[0], shape[1] // (2 if split else 1)
    block_m, block_n, warps, stages, *ahead = tile("bwd", 1 + split, dim, target_name(device))
    num_ranges, per_range = key_ranges(size // block_m, num_keys, block_n, 4 * size * dim, device)
    integers = (num_rows, num_keys, per_range, size * dim)
    constants = {
        "SHIFTED": shifted,
        "PAIR_SHIFT": pair_shift,
        "SPLIT": split,
        "LOG2_SCALE": LOG2_FP16_SCALE if fp16 else 0.0,
        "AHEAD": bool(ahead),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": dim,
    }
    grid = (size // block_m, num_ranges)
    return (num_ranges, size, dim), Launch(bwd_kernel, grid, integers, constants, warps, stages)
