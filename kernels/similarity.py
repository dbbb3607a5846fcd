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
side by side, hi + lo, for fp32 (SPLIT).

Here are the kernels and their launches. `tiles` has their sizes and who takes which rows,
`reference` the same in plain PyTorch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dispatch import LOG2_E, Constant, jit, plan, tl
from .reference import NORM_EPS, Gather, own_rows_first
from .tiles import FULL_GRID_ROWS, half_grid, key_ranges, log2_scale, padded

_EPS = Constant(NORM_EPS)
# Of `polynomial_exp2`. Added and subtracted, it leaves the nearest integer; the best coefficients
# are those of tests/test_nt_xent.py.
_ROUND = Constant(1.5 * 2.0**23)
_EXP2_0 = Constant(0.99992807)
_EXP2_1 = Constant(0.69326099)
_EXP2_2 = Constant(0.24261112)
_EXP2_3 = Constant(0.05517167)


@jit
def load_rows(ptr, rows, offs_d, stride_n, stride_d, num_rows, dim):
    """[rows, BLOCK_D] fp32 of a matrix of any strides, zeros beyond it."""
    mask = (rows < num_rows)[:, None] & (offs_d < dim)[None, :]
    ptrs = ptr + rows[:, None] * stride_n + offs_d[None, :] * stride_d
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@jit
def inverse_norm(x, NORMALIZE: tl.constexpr):
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(x * x, 1))
        return tl.where(norm > _EPS, 1.0 / tl.maximum(norm, _EPS), 0.0)
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


@jit
def load_block(ptr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """-> this program's rows: their numbers, the columns', and their planes."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, rows_lo = load_planes(ptr, offs_m, offs_d, SPLIT, BLOCK_D)
    return offs_m, offs_d, rows, rows_lo


@jit
def joined(hi, lo, SPLIT: tl.constexpr):
    """The fp32 that the planes stand for."""
    x = hi.to(tl.float32)
    if SPLIT:
        x += lo.to(tl.float32)
    return x


@jit
def same_group(offs_m, offs_n, PAIR_SHIFT: tl.constexpr):
    return (offs_m >> PAIR_SHIFT)[:, None] == (offs_n >> PAIR_SHIFT)[None, :]


@jit
def add_exponentials(top, total, s):
    """Running maxima and sums of 2^(s - maximum) of rows, with one more tile."""
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # 2^(-inf - -inf) is nan
    return new_top, total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)


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
    u_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    slots_ptr,  # (slots, padded m) fp32, written
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
        masked = same_group(local_m, local_n, PAIR_SHIFT)
        e = tl.where(masked | (local_m >= num_rows - owner * BLOCK_N)[:, None], 0.0, e)
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
    rows_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    keys_ptr,  # (padded k, planes x BLOCK_D)
    tops_ptr,  # (ranges, padded m) fp32, written
    sums_ptr,  # the same
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
    offs_m, offs_d, rows, rows_lo = load_block(rows_ptr, SPLIT, BLOCK_M, BLOCK_D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin = key_range * keys_per_range
    for start in range(begin, tl.minimum(begin + keys_per_range, num_keys), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys, keys_lo = load_planes(keys_ptr, offs_n, offs_d, SPLIT, BLOCK_D)
        s = similarities(rows, rows_lo, keys, keys_lo, SPLIT)  # [BLOCK_M, BLOCK_N]
        diagonal = (start < (pid_m + 1) * BLOCK_M) & (start + BLOCK_N > pid_m * BLOCK_M)
        if diagonal | (start + BLOCK_N > num_keys):
            masked = same_group(offs_m, offs_n, PAIR_SHIFT)
            s = tl.where(masked | (offs_n >= num_keys)[None, :], float("-inf"), s)
        top, total = add_exponentials(top, total, s)
    tl.store(tops_ptr + key_range.to(tl.int64) * stride_slot + offs_m, top)
    tl.store(sums_ptr + key_range.to(tl.int64) * stride_slot + offs_m, total)


@jit
def polynomial_exp2(x):
    """2^x for -126 <= x <= 127 within 7.5e-5 of itself, on the units that multiply and add.

    x is split into its nearest integer, the exponent, and the rest, of which the best polynomial of
    degree 3 is taken. A nan stays one. Similarities minus their shift lie between -124.5 and 115.
    """
    shifted = x + _ROUND
    rest = x - (shifted - _ROUND)
    power = tl.fma(rest, tl.fma(rest, tl.fma(rest, _EXP2_3, _EXP2_2), _EXP2_1), _EXP2_0)
    exponent = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return power * exponent.to(tl.float32, bitcast=True)


@jit
def _exp2(x, POLYNOMIAL: tl.constexpr):
    """2^x; one of every POLYNOMIAL (0: none, 2, 4) neighbors on a thread by `polynomial_exp2`."""
    if POLYNOMIAL == 0:
        return tl.exp2(x)
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, [M, N // 2, 2]))
    if POLYNOMIAL == 2:
        odd = polynomial_exp2(odd)
    else:
        # Rows r and r + 8.
        pairs = tl.permute(tl.reshape(odd, [M // 16, 2, 8, N // 2]), (0, 2, 3, 1))
        upper, lower = tl.split(pairs)
        both = tl.join(tl.exp2(upper), polynomial_exp2(lower))
        odd = tl.reshape(tl.permute(both, (0, 3, 1, 2)), [M, N // 2])
    return tl.reshape(tl.join(tl.exp2(even), odd), [M, N])


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
    POLYNOMIAL: tl.constexpr,
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
        weight = _exp2(s - (shift - LOG2_SCALE), POLYNOMIAL)
        weight *= lse_rows[:, None] + inverse_keys[None, :]
    else:
        weight = tl.exp2(s - (lse_rows - LOG2_SCALE)[:, None])
        weight += tl.exp2(s - (lse_keys - LOG2_SCALE)[None, :])
    if MASKED:
        masked = same_group(offs_m - start, local_n, PAIR_SHIFT)
        weight = tl.where(masked | (inside == 0)[None, :], 0.0, weight)
    return weight


@jit(do_not_specialize=["num_rows", "num_keys"])
def stats_kernel(
    rows_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    keys_ptr,  # (padded k, planes x BLOCK_D)
    of_rows_ptr,  # (m,) bounds fp32, or classes
    of_keys_ptr,  # (k,) classes
    factor_ptr,  # (1,) fp32
    slots_ptr,  # (4, ranges, padded m) fp32, written
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
    key_range = tl.program_id(1)
    offs_m, offs_d, rows, rows_lo = load_block(rows_ptr, SPLIT, BLOCK_M, BLOCK_D)
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
        masked = same_group(offs_m, offs_n, PAIR_SHIFT)
        s = tl.where(masked | (offs_n >= num_keys)[None, :], float("-inf"), s)
        if PAIR_SHIFT:
            first += tl.sum(tl.where(s < of_rows[:, None], 0.0, 1.0), 1)
            second += tl.sum(tl.exp2(s * factor - 4.0 * LOG2_E), 1)
        else:
            classes = tl.load(of_keys_ptr + offs_n, mask=offs_n < num_keys, other=0)
            same = of_rows[:, None] == classes[None, :]
            first = tl.maximum(first, tl.max(tl.where(same, s, float("-inf")), 1))
            second = tl.maximum(second, tl.max(tl.where(same, float("-inf"), s), 1))
        top, total = add_exponentials(top, total, s)
    out = slots_ptr + key_range.to(tl.int64) * stride_slot + offs_m
    tl.store(out, top)
    tl.store(out + stride_kind, total)
    tl.store(out + 2 * stride_kind, first)
    tl.store(out + 3 * stride_kind, second)


@jit(do_not_specialize=["num_rows", "num_keys"])
def bwd_kernel(
    rows_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    keys_ptr,  # (padded k, planes x BLOCK_D)
    lse_rows_ptr,  # (m,) fp32, base 2
    lse_keys_ptr,  # (k,)
    partial_ptr,  # (ranges, padded m, BLOCK_D) fp32, written
    shift,
    num_rows,
    num_keys,
    keys_per_range,
    stride_slot,
    SHIFTED: tl.constexpr,
    PAIR_SHIFT: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    AHEAD: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    SPLIT: tl.constexpr,
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
    local_n = tl.arange(0, BLOCK_N)
    offs_m, offs_d, rows, rows_lo = load_block(rows_ptr, SPLIT, BLOCK_M, BLOCK_D)
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
            MASKED=False,
            SHIFTED=SHIFTED,
            PAIR_SHIFT=PAIR_SHIFT,
            LOG2_SCALE=LOG2_SCALE,
            POLYNOMIAL=POLYNOMIAL,
            BLOCK_N=BLOCK_N,
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
            MASKED=True,
            SHIFTED=SHIFTED,
            PAIR_SHIFT=PAIR_SHIFT,
            LOG2_SCALE=LOG2_SCALE,
            POLYNOMIAL=POLYNOMIAL,
            BLOCK_N=BLOCK_N,
        )
        acc = add_weighted(acc, weight, keys, keys_lo, SPLIT)
    slot_ptr = partial_ptr + key_range.to(tl.int64) * stride_slot
    out = slot_ptr + offs_m.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(out, acc * 2.0 ** (-LOG2_SCALE))


class Operands(NamedTuple):
    """Rows and keys that meet in tiles, padded."""

    u: torch.Tensor  # (padded m, planes x BLOCK_D)
    keys: torch.Tensor  # (padded k, planes x BLOCK_D); u itself where the keys are the rows
    num_rows: int
    num_keys: int
    pair_shift: int
    split: bool
    shift: float | None  # that of `shift_of`

    def described(self) -> tuple:
        """What plans are made from."""
        u, _, *others, shift = self
        return u.shape, u.dtype, u.device, *others, shift is not None


class Slots(NamedTuple):
    """What the forward tiles left of each row, to be merged; fp32, base 2."""

    tops: torch.Tensor | None  # (slots, padded) maxima, or None: every slot is relative to shift
    sums: torch.Tensor  # (slots, padded)
    half_slot: int = -1  # rows below half_row have nothing in this one
    half_row: int = 0

    def pointers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first two arguments of `merge_slots`."""
        return self.sums if self.tops is None else self.tops, self.sums

    def integers(self) -> tuple[int, int, int, int]:
        """Its integers, in its order."""
        return len(self.sums), self.half_slot, self.half_row, self.sums.shape[1]

    def merge(self, shift: float | None) -> torch.Tensor:
        """The same in plain PyTorch: (padded,)."""
        if self.half_slot >= 0:
            self.sums[self.half_slot, : self.half_row] = 0.0
        if self.tops is None:
            return self.sums.sum(0).log2() + shift
        top = self.tops.amax(0)
        base = top.masked_fill(top == -math.inf, 0.0)
        return (self.sums * (self.tops - base).exp2()).sum(0).log2() + base


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


def slot_sums(x: Operands) -> Slots:
    """Launch the forward tiles."""
    size, device = x.u.shape[0], x.u.device
    if x.shift is None or x.keys is not x.u or x.num_rows <= FULL_GRID_ROWS:
        num_ranges, full = _full_plan(*x.described())
        tops = torch.empty(num_ranges, size, dtype=torch.float32, device=device)
        sums = torch.empty_like(tops)
        full((x.u, x.keys, tops, sums))
        return Slots(tops, sums)
    passes, half_slot, half_row = _half_plan(*x.described())
    total = None
    for slots, half in passes:
        sums = torch.empty(slots, size, dtype=torch.float32, device=device)
        half((x.u, sums), x.shift)
        if len(passes) == 1:
            return Slots(None, sums, half_slot, half_row)
        if half_slot >= 0 and half is passes[-1][1]:
            sums[half_slot, :half_row].zero_()
        total = sums.sum(0) if total is None else total.add_(sums.sum(0))
        del sums  # before the next pass takes as much again
    return Slots(None, total[None])


def stats_sums(
    x: Operands, of_rows: torch.Tensor, of_keys: torch.Tensor, factor: torch.Tensor
) -> tuple[Slots, torch.Tensor]:
    """Launch the forward tiles that keep statistics, on the full grid.

    -> the slots; (2, num_rows) fp32, what `stats_kernel` says.
    """
    num_ranges, launch = _stats_plan(*x.described(), of_rows.dtype)
    slots = torch.empty(4, num_ranges, len(x.u), dtype=torch.float32, device=x.u.device)
    launch((x.u, x.keys, of_rows, of_keys, factor, slots))
    more = slots[2:, :, : x.num_rows]
    return Slots(*slots[:2]), more.sum(1) if x.pair_shift else more.amax(1)


def weighted_sums(x: Operands, lse: torch.Tensor, lse_keys: torch.Tensor) -> torch.Tensor:
    """Launch the backward tiles -> (ranges, padded, BLOCK_D) fp32, to be added up."""
    shape, bwd = _weighted_plan(*x.described())
    partial = torch.empty(shape, dtype=torch.float32, device=x.u.device)
    bwd((x.u, x.keys, lse, lse_keys, partial), x.shift or 0.0)
    return partial


@plan
def _stats_plan(shape, dtype, device, num_rows, num_keys, pair_shift, split, shifted, of_rows):
    """-> the number of slots, the launch. of_rows: the dtype of bounds or classes."""
    # The forward's tile of 512 columns would spill on gfx942.
    cut = key_ranges("bwd", shape, split, num_keys, 16, device)
    integers = (num_rows, num_keys, cut.per_range, shape[0], cut.num_ranges * shape[0])
    return cut.num_ranges, cut.launch(stats_kernel, integers, PAIR_SHIFT=pair_shift)


@plan
def _full_plan(shape, dtype, device, num_rows, num_keys, pair_shift, split, shifted):
    """-> the number of slots, the launch."""
    cut = key_ranges("full", shape, split, num_keys, 8, device)
    integers = (num_keys, cut.per_range, shape[0])
    return cut.num_ranges, cut.launch(full_kernel, integers, PAIR_SHIFT=pair_shift)


@plan
def _half_plan(shape, dtype, device, num_rows, num_keys, pair_shift, split, shifted):
    """-> (slots, launch) of each pass; half_slot of the last pass and half_row."""
    size, width = shape[0], shape[1] // (1 + split)
    sizes, blocks, passes = half_grid(shape, split, num_rows, device)
    launches = []
    for one in passes:
        integers = (num_rows, blocks, one.first, one.last, one.first_slot, one.per_range, size)
        grid, constants = (blocks, one.ranges), {"PAIR_SHIFT": pair_shift}
        half = sizes.launch(half_kernel, grid, integers, split, width, constants)
        launches.append((one.slots, half))
    half_slot = passes[-1].last - passes[-1].first_slot - 1 if blocks % 2 == 0 else -1
    return launches, half_slot, blocks // 2 * sizes.block_n


@plan
def _weighted_plan(shape, dtype, device, num_rows, num_keys, pair_shift, split, shifted):
    """-> the shape of the result, the launch."""
    size, width = shape[0], shape[1] // (1 + split)
    cut = key_ranges("bwd", shape, split, num_keys, 4 * width, device)
    launch = cut.launch(
        bwd_kernel,
        (num_rows, num_keys, cut.per_range, size * width),
        SHIFTED=shifted,
        PAIR_SHIFT=pair_shift,
        LOG2_SCALE=log2_scale(dtype),
        AHEAD=cut.tile.ahead,
        POLYNOMIAL=cut.tile.polynomial if shifted and not split else 0,
    )
    return (cut.num_ranges, size, width), launch
