"""SupCon, the supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362), in O(M D) memory.

It is the L_out of the paper's equation 2. With M rows z_i of dimension D, labels y_i, s_ij = <z_i,
z_j> / tau, and P_i the other rows of i's class, of which M' rows have any:

    loss = 1/M' sum_{i: P_i not empty} [ log sum_{j != i} exp(s_ij) - 1/|P_i| sum_{p in P_i} s_ip ]

With the class sums C_y = sum_{y_j = y} z_j, and v_i = 1 where P_i is not empty, 0 elsewhere,

    dz_i = 1/(M' tau) [ sum_{j != i} (v_i exp(s_ij - lse_i) + v_j exp(s_ij - lse_j)) z_j
                        - 2 v_i / |P_i| (C_{y_i} - z_i) ]

so v is an infinite log-sum-exp in the tiles' eyes, and the backward needs no labels, only the mean
positive of each row. Up to some ten thousand rows these come from the product of (y_i = y_j) with
the rows: of few rows in the kernel that takes them through all keys (two launches forward, two
backward), above in one beside the tiles of similarity.py (four and two). Beyond, where that product
costs more than sorting, and for many processes, class sums are taken over sorted labels: no
atomics, no number of classes on the host.

M x M similarities and label comparisons are never materialized; kept for the backward are O(M D).
The Triton path takes what `nt_xent` takes. The second derivative raises.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .dispatch import (
    INTERPRETED,
    LN2,
    LOG2_E,
    Launch,
    Operation,
    breaks_graph_to_gather,
    ceil_div,
    check_tensors,
    choose_impl,
    gradients,
    jit,
    no_autocast,
    on_device_of_first,
    plan,
    save,
    target_name,
    tl,
)
from .reference import (
    REDUCTIONS,
    Gather,
    Stats,
    check_temperature,
    normalize_rows,
    own_rows_first,
    reference_lse,
    reference_tiles,
    reference_weighted_sum,
    tie_margin,
    with_row_gradients,
)
from .similarity import (
    Operands,
    comes_last,
    inverse_norm,
    joined,
    load_block,
    load_planes,
    load_rows,
    merge_slots,
    similarities,
    slot_sums,
    stats_sums,
    store_planes,
    sum_of_programs,
    sum_ranges,
    weighted_sums,
)
from .tiles import (
    block_d,
    empty_rows,
    few_rows_tile,
    key_ranges,
    padded,
    planes,
    readable,
    row_buffer,
    shift_of,
    stored,
    why_not_fused,
)

# Up to so many rows tiles compare labels; above, sorting them costs less (README.md).
# Of few rows, and so wide a row of planes, one program takes some through all keys.
COMPARED_ROWS, FEW_ROWS, FEW_ROWS_WIDTH = (100, 40, 64) if INTERPRETED else (16384, 2048, 256)
CLASS_SPAN = 512  # rows of a class that one program adds up
_LABEL_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@breaks_graph_to_gather
def sup_con_reference(
    z: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    normalize: bool = True,
    gather: Gather | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """SupCon in plain PyTorch, in fp32 (fp64 for fp64 inputs).

    Arguments, result and errors as for `sup_con`.
    """
    return _sup_con(z, labels, temperature, normalize, gather, reduction, return_stats, "torch")


def _sup_con(z, labels, temperature, normalize, gather, reduction, return_stats, kind):
    """kind: "torch", or the dtype whose 16-bit planes the Triton kernels multiply."""
    with no_autocast(z.device):
        rows = z.to(torch.promote_types(z.dtype, torch.float32))
        if normalize:
            rows = normalize_rows(rows)
        # <u_i, u_j> = s_ij: the temperature's gradient is autograd's business.
        u = (rows / temperature**0.5).contiguous()
        shift = shift_of(None if isinstance(temperature, torch.Tensor) else temperature, normalize)
        rows = reduction != "mean"
        if gather is None and not rows and not return_stats and torch.compiler.is_compiling():
            return _forward_op(u, labels, kind, normalize, shift)[0]
        options = _Options(kind, normalize, shift, gather, rows, return_stats)
        loss, *_, row_loss, lse, positive, top1 = _SupCon.call(u, labels, options)
    loss = loss.sum() if reduction == "sum" else loss
    return (loss, Stats(row_loss, lse, positive, top1, None, None)) if return_stats else loss


def _reference_positive_sum(rows, keys, labels, labels_keys, starts, ends, order):
    """sum over the other rows of each row's class, by comparing labels tile by tile: (m, D)."""
    out = torch.zeros_like(rows)
    for m, n, s, mirrored in reference_tiles(rows, keys, 0):
        same = ((labels[m, None] == labels_keys[None, n]) & (s != -math.inf)).to(rows.dtype)
        out[m].addmm_(same, keys[n])
        if mirrored:
            out[n].addmm_(same.T, rows[m])
    return out


@jit
def class_sum_kernel(
    keys_ptr,  # (K, D) fp32
    order_ptr,  # (K,), the row at each position, sorted by class
    starts_ptr,  # (K,), of each position's class
    ends_ptr,  # (K,)
    out_ptr,  # (K, D) fp32, written
    dim,
    STEP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the rows order[p], order[p + STEP], ... of SPAN sorted positions of one class.

    p are the class's start and every SPAN positions on; others have nothing to do.
    """
    position = tl.program_id(0)
    start = tl.load(starts_ptr + position).to(tl.int32)
    if (position - start) % SPAN == 0:
        end = tl.minimum(tl.load(ends_ptr + position).to(tl.int32), position + SPAN)
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in range(position, end, BLOCK_K * STEP):
            positions = first + tl.arange(0, BLOCK_K) * STEP
            inside = positions < end
            rows = tl.load(order_ptr + positions, mask=inside, other=0)
            mask = inside[:, None] & (offs_d < dim)[None, :]
            ptrs = keys_ptr + rows[:, None] * dim + offs_d[None, :]
            total += tl.sum(tl.load(ptrs, mask=mask, other=0.0), 0)
        tl.store(out_ptr + position.to(tl.int64) * dim + offs_d, total, mask=offs_d < dim)


def _triton_positive_sum(rows, keys, labels, labels_keys, starts, ends, order):
    m, dim = rows.shape
    # One row per sorted position; what is read in the end are those where a class starts.
    sums = torch.empty_like(keys)
    block = min(32, block_d(dim))
    of_class = starts[order], ends[order], sums, dim
    add = class_sum_kernel[(keys.shape[0], ceil_div(dim, block))]
    # No program adds up a class of any size alone: first its parts, then their sums, in place.
    add(keys, order, *of_class, STEP=1, SPAN=CLASS_SPAN, BLOCK_K=64, BLOCK_D=block)
    positions = torch.arange(len(keys), device=keys.device)
    add(sums, positions, *of_class, STEP=CLASS_SPAN, SPAN=2**30, BLOCK_K=64, BLOCK_D=block)
    return sums[starts[:m]] - rows


def _operands(keys, num_rows, options):
    """fp32 keys, base e, of which the first are the rows, as padded 16-bit planes, base 2."""
    plane, split = planes(getattr(torch, options.kind), options.normalized)
    num_keys, dim = keys.shape
    x = F.pad(keys * LOG2_E**0.5, (0, block_d(dim) - dim, 0, padded(num_keys) - num_keys))
    hi = x.to(plane)
    if split:
        hi = torch.cat((hi, (x - hi.float()).to(plane)), 1)
    hi = hi.to(stored(plane))
    u = hi if num_rows == num_keys else hi[: padded(num_rows)]
    return Operands(u, hi, num_rows, num_keys, pair_shift=0, split=split, shift=options.shift)


def _triton_lse(rows, keys, options, classes=None, classes_keys=None):
    """-> lse (m,); with classes also each row's largest similarity in its own class, in others."""
    operands, nearest = _operands(keys, len(rows), options), ()
    if classes is None:
        slots = slot_sums(operands)
    else:
        slots, nearest = stats_sums(operands, classes, classes_keys, classes)
    return slots.merge(options.shift)[: len(rows)] / LOG2_E, *(x / LOG2_E for x in nearest)


def _triton_weighted_sum(rows, keys, lse_rows, lse_keys, options):
    operands = _operands(keys, len(rows), options)
    partial = weighted_sums(operands, lse_rows * LOG2_E, lse_keys * LOG2_E)
    return partial.sum(0)[: len(rows), : rows.shape[1]] / LOG2_E**0.5


def _nearest(rows, keys, classes, classes_keys):
    """`_triton_lse` with classes, tile by tile."""
    nearest = rows.new_full((2, len(rows)), -math.inf)

    def watch(m, n, s):
        same = classes[m, None] == classes_keys[None, n]
        for best, mask in zip(nearest, (~same, same), strict=True):
            best[m] = torch.maximum(best[m], s.masked_fill(mask, -math.inf).amax(1))

    return reference_lse(rows, keys, 0, watch), *nearest


def _groups(labels_keys):
    """-> begin and end of each key's class among the sorted keys, their order; all (K,)."""
    ordered, order = labels_keys.sort(stable=True)
    starts = torch.searchsorted(ordered, labels_keys)
    return starts, torch.searchsorted(ordered, labels_keys, right=True), order


class _Options(NamedTuple):
    """Of a call, beside its tensors."""

    kind: str  # as of `_sup_con`
    normalized: bool
    shift: float | None
    gather: Gather | None = None
    rows: bool = False  # a loss for each
    stats: bool = False


class _Saved(NamedTuple):
    """Of a forward for its backward."""

    keys: torch.Tensor | None  # (K, D); what is of the keys is None where they are the rows
    lse: torch.Tensor  # (M,)
    lse_keys: torch.Tensor | None  # (K,)
    positives: torch.Tensor  # (M, D), their means
    scale: torch.Tensor  # (), 1/M' times the world's size
    labels_keys: torch.Tensor | None  # (K,), and
    index: torch.Tensor | None  # (K,), of further gathers, for rows=True alone


@on_device_of_first
def _forward(u, labels, options):
    """-> the loss, (), with rows=True (M,); `_Saved`; four members of `Stats`, or None."""
    gather, index = options.gather, None
    if gather is None:
        keys = u
        labels_keys = labels
    else:
        keys, index, labels_keys = own_rows_first(gather, u, labels)
    starts, ends, order = _groups(labels_keys)
    num_positives = ends - starts - 1
    m = u.shape[0]
    scale = (keys.shape[0] // m) / (num_positives > 0).sum().clamp_min(1).to(u.dtype)
    positive_sum = _reference_positive_sum if options.kind == "torch" else _triton_positive_sum
    positives = positive_sum(u, keys, labels, labels_keys, starts, ends, order)
    valid = num_positives[:m] > 0
    positives = torch.where(valid[:, None], positives / num_positives[:m, None].clamp_min(1), 0.0)
    # A class is where it starts, in 32 bits: labels of 64 would take twice the registers.
    classes = (starts[:m].int(), starts.int()) if options.stats else ()
    if options.kind != "torch":
        lse, *nearest = _triton_lse(u, keys, options, *classes)
    elif options.stats:
        lse, *nearest = _nearest(u, keys, *classes)
    else:
        lse = reference_lse(u, keys, 0)
    positive = (u * positives).sum(1)
    row_loss = torch.where(valid, lse - positive, 0.0)
    members = (None,) * 4
    if options.stats:
        same, other = nearest
        members = row_loss.clone(), lse, positive, same > other + tie_margin(u)
    loss = row_loss if options.rows else row_loss.sum() * scale
    lse = lse.masked_fill(~valid, math.inf)
    of_keys = {"keys": None, "lse_keys": None}
    if gather is not None:
        of_keys = {"keys": keys, "lse_keys": gather(lse)[index]}
    of_rows = {"labels_keys": None, "index": None}
    if options.rows:
        of_rows = {"labels_keys": labels_keys.clone(), "index": index}
    saved = _Saved(lse=lse, positives=positives, scale=scale, **of_keys, **of_rows)
    return loss, saved, members


@on_device_of_first
def _backward(dloss, u, *saved, options):
    """-> du (M, D), alone. saved: members of `_Saved`."""
    keys, lse, lse_keys, positives, scale, labels_keys, index = _Saved(*saved)
    own = keys is None
    if own:
        keys, lse_keys = u, lse

    def weighted_sum(lse, lse_keys):
        if options.kind == "torch":
            with no_autocast(u.device):
                return reference_weighted_sum(u, keys, lse, lse_keys, 0)
        return _triton_weighted_sum(u, keys, lse, lse_keys, options)

    if not dloss.dim():
        return ((weighted_sum(lse, lse_keys) - 2 * positives) * (dloss * scale),)
    d_keys = dloss if own else options.gather(dloss.contiguous())[index]
    du = with_row_gradients(weighted_sum, dloss, d_keys, lse, lse_keys)
    # A row is a positive of its positives, and they have as many: their sum is weighted, too.
    starts, ends, order = groups = _groups(labels_keys)
    m = u.shape[0]
    keys = keys * d_keys[:, None]
    rows = keys if own else keys[:m]
    positive_sum = _reference_positive_sum if options.kind == "torch" else _triton_positive_sum
    with no_autocast(u.device):
        sums = positive_sum(rows, keys, labels_keys[:m], labels_keys, *groups)
    count = (ends - starts - 1)[:m, None].clamp_min(1)
    # Alone in its class a row has no positives; where class sums are taken, only nearly.
    sums = sums.masked_fill((ends - starts)[:m, None] == 1, 0.0)
    return (du - positives * dloss[:, None] - sums / count,)


class _SupCon(Operation):
    @staticmethod
    def forward(u, labels, options):
        loss, saved, members = _forward(u, labels, options)
        return loss, *saved, *members

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[2]
        save(ctx, inputs[:1], output, unsaved=4)

    @staticmethod
    def backward(ctx, dloss, *_):
        return gradients(ctx, functools.partial(_backward, options=ctx.options), dloss)


@jit
def _sup_con_prepare_kernel(
    z_ptr,  # (M, D)
    u_ptr,  # (padded m, planes x BLOCK_D), 16 bits, written
    partials_ptr,  # (1 + 2 programs,) fp32, the first written
    temperature,
    stride_zn,
    stride_zd,
    num_rows,
    dim,
    FP16: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalize, scale by sqrt(log2(e) / tau), cast.

    Clears the count of programs that have added their losses.
    """
    if tl.program_id(0) == 0:
        tl.store(partials_ptr, 0.0)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    z = load_rows(z_ptr, rows, offs_d, stride_zn, stride_zd, num_rows, dim)
    u = z * (inverse_norm(z, True) * tl.sqrt(LOG2_E / temperature))[:, None]
    # Zeros beyond the rows: tiles load without a mask.
    store_planes(u_ptr, rows, offs_d, u, FP16, SPLIT, BLOCK_D)


@jit
def _finish_rows(
    u,
    lse,
    positives,
    count,
    rows,
    mask_r,
    lse_ptr,
    positives_ptr,
    partials_ptr,
    loss_ptr,
    scale_ptr,
    BLOCK_D: tl.constexpr,
):
    """Store log-sum-exps and mean positives of some rows; the last program adds up the losses.

    positives: the sum over the `count` other rows of each row's class.
    """
    valid = (count > 0.0) & mask_r
    positives = tl.where(valid[:, None], positives / tl.maximum(count, 1.0)[:, None], 0.0)
    loss = tl.where(valid, (lse - tl.sum(u * positives, 1)) * LN2, 0.0)
    tl.store(lse_ptr + rows, tl.where(valid, lse, float("inf")), mask=mask_r)
    offs = rows.to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(positives_ptr + offs, positives, mask=mask_r[:, None])
    losses_ptr = partials_ptr + 1
    valids_ptr = losses_ptr + tl.num_programs(0)
    tl.store(losses_ptr + tl.program_id(0), tl.sum(loss, 0))
    tl.store(valids_ptr + tl.program_id(0), tl.sum(valid.to(tl.float32), 0))
    if comes_last(partials_ptr):
        scale = 1.0 / tl.maximum(sum_of_programs(valids_ptr), 1.0)
        tl.store(scale_ptr, scale)
        tl.store(loss_ptr, sum_of_programs(losses_ptr) * scale)


@jit
def _same_class(labels_m, labels_ptr, offs_n, num_rows):
    """[BLOCK_M, BLOCK_N]; rows beyond the last one are of class 0."""
    labels_n = tl.load(labels_ptr + offs_n, mask=offs_n < num_rows, other=0)
    return labels_m[:, None] == labels_n[None, :]


@jit
def _add_class(acc, same, keys, keys_lo, SPLIT: tl.constexpr):
    acc = tl.dot(same, keys, acc, input_precision="ieee")
    if SPLIT:
        acc = tl.dot(same, keys_lo, acc, input_precision="ieee")
    return acc


@jit(do_not_specialize=["num_rows"])
def _sup_con_few_rows_fwd_kernel(
    u_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    labels_ptr,  # (M,)
    lse_ptr,  # (M,) fp32, written
    positives_ptr,  # (M, BLOCK_D) fp32, written
    partials_ptr,  # (1 + 2 programs,) fp32
    loss_ptr,  # () fp32, written
    scale_ptr,  # () fp32, written
    shift,
    num_rows,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program takes its rows through all keys: log-sum-exps, mean positives, losses."""
    offs_m, offs_d, rows, rows_lo = load_block(u_ptr, SPLIT, BLOCK_M, BLOCK_D)
    mask_m = offs_m < num_rows
    labels_m = tl.load(labels_ptr + offs_m, mask=mask_m, other=0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed over the warps once, at the end
    # The same number 16 times: a product with ones needs fewer registers.
    count = tl.zeros([BLOCK_M, 16], tl.float32)
    ones = tl.full([BLOCK_N, 16], 1.0, u_ptr.dtype.element_ty)
    positives = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_rows, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys, keys_lo = load_planes(u_ptr, offs_n, offs_d, SPLIT, BLOCK_D)
        same = _same_class(labels_m, labels_ptr, offs_n, num_rows)
        e = tl.exp2(similarities(rows, rows_lo, keys, keys_lo, SPLIT) - shift)  # [BLOCK_M, BLOCK_N]
        other = (offs_m[:, None] != offs_n[None, :]) & (offs_n < num_rows)[None, :]
        total += tl.where(other, e, 0.0)
        same = tl.where(other & same, 1.0, 0.0).to(keys.dtype)
        count = tl.dot(same, ones, count, input_precision="ieee")
        positives = _add_class(positives, same, keys, keys_lo, SPLIT)
    _finish_rows(
        joined(rows, rows_lo, SPLIT),
        shift + tl.log2(tl.sum(total, 1)),
        positives,
        tl.max(count, 1),
        offs_m,
        mask_m,
        lse_ptr,
        positives_ptr,
        partials_ptr,
        loss_ptr,
        scale_ptr,
        BLOCK_D=BLOCK_D,
    )


@jit(do_not_specialize=["num_rows"])
def _sup_con_positives_kernel(
    u_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    labels_ptr,  # (M,)
    partial_ptr,  # (ranges, padded m, BLOCK_D) fp32, written
    num_rows,
    keys_per_range,
    stride_slot,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of the keys of each row's class, itself among them, over one range of keys.

    A product of (y_i = y_j) with the keys, which costs the same whatever the classes' sizes. Keys
    beyond the rows are zeros, so that nothing is masked; counting here would serialize the product.
    """
    key_range = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    labels_m = tl.load(labels_ptr + offs_m, mask=offs_m < num_rows, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = key_range * keys_per_range
    for start in range(begin, tl.minimum(begin + keys_per_range, num_rows), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys, keys_lo = load_planes(u_ptr, offs_n, offs_d, SPLIT, BLOCK_D)
        same = tl.where(_same_class(labels_m, labels_ptr, offs_n, num_rows), 1.0, 0.0)
        acc = _add_class(acc, same.to(keys.dtype), keys, keys_lo, SPLIT)
    slot_ptr = partial_ptr + key_range.to(tl.int64) * stride_slot
    tl.store(slot_ptr + offs_m.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :], acc)


@jit
def _sup_con_finish_kernel(
    u_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    tops_ptr,  # (slots, padded m) fp32
    sums_ptr,  # the same
    labels_ptr,  # (M,)
    partial_ptr,  # (ranges, padded m, BLOCK_D) fp32
    lse_ptr,  # (M,) fp32, written
    positives_ptr,  # (M, BLOCK_D) fp32, written
    partials_ptr,  # (1 + 2 programs,) fp32
    loss_ptr,  # () fp32, written
    scale_ptr,  # () fp32, written
    shift,
    num_rows,
    num_slots,
    half_slot,
    half_row,
    stride_slot,
    num_ranges,
    stride_range,
    SHIFTED: tl.constexpr,
    SPLIT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge what the tiles left of each row, and add up the losses."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = rows < num_rows
    lse = merge_slots(
        tops_ptr,
        sums_ptr,
        rows,
        mask_r,
        shift,
        num_slots,
        half_slot,
        half_row,
        stride_slot,
        SHIFTED=SHIFTED,
        SLOTS=SLOTS,
        BLOCK_R=BLOCK_R,
    )
    u, u_lo = load_planes(u_ptr, rows, offs_d, SPLIT, BLOCK_D)
    u = joined(u, u_lo, SPLIT)
    positives = sum_ranges(partial_ptr, rows, offs_d, num_ranges, stride_range, BLOCK_R, BLOCK_D)
    labels_r = tl.load(labels_ptr + rows, mask=mask_r, other=0)
    count = tl.full([BLOCK_R], -1.0, tl.float32)  # without the row itself
    for start in range(0, num_rows, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        same = _same_class(labels_r, labels_ptr, offs_n, num_rows)
        count += tl.sum(tl.where(same & (offs_n < num_rows)[None, :], 1.0, 0.0), 1)
    _finish_rows(
        u,
        lse,
        positives - u,
        count,
        rows,
        mask_r,
        lse_ptr,
        positives_ptr,
        partials_ptr,
        loss_ptr,
        scale_ptr,
        BLOCK_D=BLOCK_D,
    )


@jit
def _sup_con_epilogue_kernel(
    z_ptr,  # (M, D)
    dloss_ptr,  # ()
    scale_ptr,  # () fp32
    partial_ptr,  # (ranges, padded m, BLOCK_D) fp32
    positives_ptr,  # (M, BLOCK_D) fp32
    dz_ptr,  # (M, D), written
    temperature,
    stride_zn,
    stride_zd,
    num_rows,
    dim,
    num_slots,
    stride_slot,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the ranges, subtract the positives, go back through the normalization, scale and cast."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_r = rows < num_rows
    z = load_rows(z_ptr, rows, offs_d, stride_zn, stride_zd, num_rows, dim)
    inverse = inverse_norm(z, True)
    z = z * inverse[:, None]
    dz = sum_ranges(partial_ptr, rows, offs_d, num_slots, stride_slot, BLOCK_R, BLOCK_D)
    ptrs = positives_ptr + rows[:, None] * BLOCK_D + offs_d[None, :]
    dz -= 2.0 * tl.load(ptrs, mask=mask_r[:, None], other=0.0)
    # Sums of u = z sqrt(log2(e) / tau).
    scale = tl.load(dloss_ptr).to(tl.float32) * tl.load(scale_ptr)
    dz = dz * (scale / tl.sqrt(temperature * LOG2_E))
    dz = (dz - z * tl.sum(z * dz, 1)[:, None]) * inverse[:, None]
    mask = mask_r[:, None] & (offs_d < dim)[None, :]
    ptrs = dz_ptr + rows[:, None] * dim + offs_d[None, :]
    tl.store(ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _block_r(width: int) -> int:
    return max(4, min(32, 4096 // width))


@plan
def _few_plan(shape, dtype, device, strides, label_dtype):
    """-> rows' shape and dtype, number of programs, are rows split; launches.

    They are prepare and, of few rows, all that is left, else None.
    """
    num_rows, dim = shape
    plane, split = planes(dtype, True)
    buffer = row_buffer(num_rows, dim, dtype, True)
    width = block_d(dim)
    block_r = _block_r(width)
    constants = {
        "FP16": plane == torch.float16,
        "SPLIT": split,
        "BLOCK_R": block_r,
        "BLOCK_D": width,
    }
    grid = (buffer[0][0] // block_r,)
    prepare = Launch(_sup_con_prepare_kernel, grid, (*strides, num_rows, dim), constants)
    if num_rows > FEW_ROWS or buffer[0][1] > FEW_ROWS_WIDTH:
        return *buffer, ceil_div(num_rows, block_r), split, prepare, None
    tile = few_rows_tile(target_name(device))
    grid = (ceil_div(num_rows, tile.block_m),)
    forward = tile.launch(_sup_con_few_rows_fwd_kernel, grid, (num_rows,), split, width, {})
    return *buffer, *grid, split, prepare, forward


@plan
def _positives_plan(shape, dtype, device, num_rows, split, label_dtype):
    """-> the shape of the sums, the launch."""
    size, width = shape[0], shape[1] // (1 + split)
    cut = key_ranges("bwd", shape, split, num_rows, 4 * width, device)
    launch = cut.launch(_sup_con_positives_kernel, (num_rows, cut.per_range, size * width))
    return (cut.num_ranges, size, width), launch


@plan
def _finish_plan(num_rows, of_slots, ranges, device, dtype, split, shifted, label_dtype):
    """The launch. of_slots: the integers of `Slots`; ranges: the shape of the positives' sums."""
    block_r = _block_r(ranges[2])
    integers = (num_rows, *of_slots, ranges[0], ranges[1] * ranges[2])
    constants = {
        "SHIFTED": shifted,
        "SPLIT": split,
        "SLOTS": 16,
        "BLOCK_R": block_r,
        "BLOCK_N": 128,
        "BLOCK_D": ranges[2],
    }
    return Launch(_sup_con_finish_kernel, (ceil_div(num_rows, block_r),), integers, constants)


@on_device_of_first
def _few_forward(z, labels, temperature):
    """-> loss (), rows u, their lse (M,), mean positives (M, BLOCK_D), 1/M' ()."""
    num_rows, dtype, device = z.shape[0], z.dtype, z.device
    (z,) = readable(z)
    labels = labels.contiguous()
    shape, plane, programs, split, prepare, forward = _few_plan(
        z.shape, dtype, device, z.stride(), labels.dtype
    )
    u = torch.empty(shape, dtype=plane, device=device)
    partials = torch.empty(1 + 2 * programs, dtype=torch.float32, device=device)
    prepare((z, u, partials), temperature)
    lse = torch.empty(num_rows, dtype=torch.float32, device=device)
    width = block_d(z.shape[1])
    positives = torch.empty(num_rows, width, dtype=torch.float32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    scale = torch.empty_like(loss)
    results = (lse, positives, partials, loss, scale)
    shift = shift_of(temperature, True)
    if forward is not None:
        forward((u, labels, *results), shift)
        return loss, u, lse, positives, scale
    slots = slot_sums(Operands(u, u, num_rows, num_rows, pair_shift=0, split=split, shift=shift))
    ranges, add_positives = _positives_plan(shape, plane, device, num_rows, split, labels.dtype)
    partial = torch.empty(ranges, dtype=torch.float32, device=device)
    add_positives((u, labels, partial))
    finish = _finish_plan(
        num_rows,
        slots.integers(),
        ranges,
        device,
        plane,
        split,
        shifted=slots.tops is None,
        label_dtype=labels.dtype,
    )
    finish((u, *slots.pointers(), labels, partial, *results), shift)
    return loss, u, lse, positives, scale


@plan
def _epilogue_plan(shape, dtype, device, strides, ranges):
    """The launch. ranges: shape of what `weighted_sums` left."""
    num_rows, dim = shape
    block_r = _block_r(ranges[2])
    integers = (*strides, num_rows, dim, ranges[0], ranges[1] * ranges[2])
    constants = {"BLOCK_R": block_r, "BLOCK_D": ranges[2]}
    return Launch(_sup_con_epilogue_kernel, (ceil_div(num_rows, block_r),), integers, constants)


@on_device_of_first
def _few_backward(dloss, z, u, lse, positives, scale, temperature):
    num_rows, dtype = z.shape[0], z.dtype
    split, shift = planes(dtype, True)[1], shift_of(temperature, True)
    operands = Operands(u, u, num_rows, num_rows, pair_shift=0, split=split, shift=shift)
    partial = weighted_sums(operands, lse, lse)
    (z,) = readable(z)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    epilogue = _epilogue_plan(z.shape, dtype, z.device, z.stride(), partial.shape)
    epilogue((z, dloss, scale, partial, positives, dz), temperature)
    return (dz.to(dtype),)


class _FewRows(Operation):
    @staticmethod
    def forward(z, labels, temperature):
        return _few_forward(z, labels, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.temperature = inputs[2]
        save(ctx, inputs[:1], output)

    @staticmethod
    def backward(ctx, dloss, *_):
        return gradients(ctx, _few_backward, dloss, ctx.temperature)


@torch.library.custom_op("kernels::sup_con_few_rows_forward", mutates_args=())
def _few_forward_op(
    z: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _few_forward(z, labels, temperature)


@_few_forward_op.register_fake
def _(z, labels, temperature):
    row = z.new_empty(z.shape[0], dtype=torch.float32)
    u = empty_rows(*z.shape, z.dtype, True, z.device)
    positives = row.new_empty(z.shape[0], block_d(z.shape[1]))
    return row.new_empty(()), u, row, positives, row.new_empty(())


@torch.library.custom_op("kernels::sup_con_few_rows_backward", mutates_args=())
def _few_backward_op(
    dloss: torch.Tensor,
    z: torch.Tensor,
    u: torch.Tensor,
    lse: torch.Tensor,
    positives: torch.Tensor,
    scale: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    return _few_backward(dloss, z, u, lse, positives, scale, temperature)[0]


@_few_backward_op.register_fake
def _(dloss, z, u, lse, positives, scale, temperature):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _save_few(ctx, inputs, output):
    ctx.temperature = inputs[2]
    save(ctx, inputs[:1], output)


def _differentiate_few(ctx, dloss, *_):
    return _few_backward_op(dloss, *ctx.saved_tensors, ctx.temperature), None, None


_few_forward_op.register_autograd(_differentiate_few, setup_context=_save_few)


@torch.library.custom_op("kernels::sup_con_forward", mutates_args=())
def _forward_op(
    u: torch.Tensor, labels: torch.Tensor, kind: str, normalized: bool, shift: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, saved, _ = _forward(u, labels, _Options(kind, normalized, shift))
    return loss, saved.lse, saved.positives, saved.scale


@_forward_op.register_fake
def _(u, labels, kind, normalized, shift):
    return u.new_empty(()), u.new_empty(u.shape[0]), torch.empty_like(u), u.new_empty(())


@torch.library.custom_op("kernels::sup_con_backward", mutates_args=())
def _backward_op(
    dloss: torch.Tensor,
    u: torch.Tensor,
    lse: torch.Tensor,
    positives: torch.Tensor,
    scale: torch.Tensor,
    kind: str,
    normalized: bool,
    shift: float | None,
) -> torch.Tensor:
    saved = _Saved(None, lse, None, positives, scale, labels_keys=None, index=None)
    return _backward(dloss, u, *saved, options=_Options(kind, normalized, shift))[0]


@_backward_op.register_fake
def _(dloss, u, lse, positives, scale, kind, normalized, shift):
    return torch.empty_like(u)


def _save_for_backward(ctx, inputs, output):
    ctx.options = inputs[2:]
    save(ctx, inputs[:1], output)


def _differentiate(ctx, dloss, *_):
    return _backward_op(dloss, *ctx.saved_tensors, *ctx.options), None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


@breaks_graph_to_gather
def sup_con(
    z: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    normalize: bool = True,
    gather: Gather | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """SupCon loss: each row against all others, its positives those of the same label.

    With several processes each computes its own rows' share, scaled so that averaging values and
    gradients over processes, as DistributedDataParallel does, gives exactly what one process would
    have computed on all rows. This needs the same upstream gradient on every process.

    Args:
        z: (M, D) embeddings, fp32, bf16 or fp16 (fp64: reference only), any strides, M >= 1.
            Several views of an image are several rows.
        labels: (M,) integers of any value, on z's device. Rows alone in their class contribute
            nothing and are counted out of the mean; where all are, loss and gradient are zero.
        temperature: positive float, or a tensor of one element, which gets its gradient.
        normalize: divide each row by its length first (in fp32). A row of length below 1e-12 counts
            as zeros and gets no gradient.
        gather: None, or a callable that takes this process's (n, ...) rows and returns all
            processes' rows, concatenated in rank order, the same n from each, without autograd. It
            is called three times per forward (rows, labels, sums) and never in the backward, but
            for reductions other than "mean" once there.
        reduction: "mean" over the rows of all processes that have positives, "sum" of this
            process's rows, or "none": (M,), where a row without positives has 0. The gradient of
            the latter two is that of all processes' rows, each times its own upstream gradient, of
            any sign, and costs two passes over the similarities.
        return_stats: return (loss, `Stats`). The loss and its gradient stay what they are, to
            rounding; the forward pass takes the full grid.
        impl: "auto" (Triton on a GPU, else the reference; said once through
            logging.getLogger("kernels")), "triton" or "torch".

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), a scalar but for reduction="none"; with statistics
        the pair of both.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, a temperature that is not positive (a
            tensor's value is not looked at), an unknown reduction, impl="triton" where it cannot
            run.

    Source: Khosla et al. 2020, arXiv:2004.11362, L_out of equation 2.
    """
    check_tensors("sup_con", z=z, labels=labels)
    if z.dim() != 2 or not z.numel() or not z.is_floating_point():
        raise ValueError(
            f"sup_con: z is {tuple(z.shape)} {z.dtype}; it must be (M, D) floating point, M"
            " and D >= 1"
        )
    if labels.shape != z.shape[:1] or labels.device != z.device or labels.dtype not in _LABEL_TYPES:
        raise ValueError(
            f"sup_con: labels are {tuple(labels.shape)} {labels.dtype} on {labels.device}; "
            f"they must be ({z.shape[0]},) integers (int64, int32, int16, int8 or uint8) on"
            f" {z.device}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"sup_con: reduction={reduction!r}, allowed are 'mean', 'sum' and 'none'")
    check_temperature("sup_con", temperature)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.reshape(())
    options = (normalize, gather, reduction, return_stats)
    if choose_impl("sup_con", impl, z, why_not_fused(z, normalize, temperature)) == "torch":
        return _sup_con(z, labels, temperature, *options, "torch")
    is_tensor = isinstance(temperature, torch.Tensor)
    shifted = shift_of(None if is_tensor else temperature, normalize) is not None
    if z.shape[0] <= COMPARED_ROWS and shifted and options[1:] == (None, "mean", False):
        if torch.compiler.is_compiling():
            return _few_forward_op(z, labels, float(temperature))[0]
        return _FewRows.call(z, labels, float(temperature))[0]
    kind = str(z.dtype).removeprefix("torch.")
    return _sup_con(z, labels, temperature, *options, kind)
