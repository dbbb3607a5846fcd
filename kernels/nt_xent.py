"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, arXiv:2002.05709), in O(N D) memory.

With N images and two views of each, M = 2N rows z_i of dimension D, s_ij = <z_i, z_j> / tau, and
p(i) the other view of i's image:

    loss = 1/M sum_i [ log sum_{j != i} exp(s_ij) - s_ip(i) ]

The decoupled form (DCL, Yeh et al. 2022, arXiv:2110.06848) leaves j = p(i) out of the sum as well.

Layout. Rows are interleaved, 2k = view a and 2k+1 = view b of image k, so that i and p(i) = i ^ 1
always fall into the same diagonal tile and one comparison, (i >> 1) == (j >> 1), masks both. Tiles
therefore sum negatives only, R_i = sum_{j != i, p} exp(s_ij); the positive is an fp32 dot product
of its own, and loss_i = softplus(log R_i - s_ip) keeps its digits where the loss is tiny.

Gradient. The similarity matrix is symmetric, so row i needs nobody else's gradient:

    dz_i = 1/(M tau) [ sum_{j neg} (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j
                       - (sigma_i + sigma_p) z_p ],   sigma_i = R_i / exp(lse_i)

Only the M row log-sum-exps are kept between forward and backward; the M x M similarities exist one
tile at a time. Row blocks own their gradient and sums run in a fixed order, the same bits in every
run. (The one atomic counts who has come, so that the last program adds up the losses.)

Launches. Up to M = 1,024 rows one program takes some rows through all keys: two launches forward,
one backward. Above, tiles (similarity.py: full grid up to 4,096 rows, half grid beyond) and what
prepares and finishes them: three and two.

Limits: the table of README.md. Anything else takes the reference, whose tiles are cuBLAS products
on a GPU. The second derivative raises.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

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
    NORM_EPS,
    REDUCTIONS,
    Gather,
    Stats,
    check_temperature,
    normalize_rows,
    own_rows_first,
    reference_lse,
    reference_weighted_sum,
    tie_margin,
    with_row_gradients,
)
from .similarity import (
    Operands,
    add_weighted,
    comes_last,
    gather_keys,
    inverse_norm,
    load_block,
    load_planes,
    load_rows,
    log2_sum,
    merge_slots,
    same_group,
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
    log2_scale,
    planes,
    readable,
    row_buffer,
    shift_of,
    why_not_fused,
)

# Up to so many rows, and so wide a row of planes, one program takes some rows through all keys: the
# arithmetic is nothing there, and every launch counts. Above, the tiles are faster; wider rows
# would spill (README.md).
FEW_ROWS, FEW_ROWS_WIDTH = (32, 64) if INTERPRETED else (1024, 128)


@breaks_graph_to_gather
def nt_xent_reference(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    normalize: bool = True,
    gather: Gather | None = None,
    decoupled: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """NT-Xent in plain PyTorch; arguments, result and errors as for `nt_xent`.

    Computes in fp32 (fp64 for fp64 inputs) whatever autocast says, and needs O(M D) memory plus one
    tile: similarities are made tile by tile, once for the log-sum-exps and once more in the
    backward.
    """
    _check(z_a, z_b, temperature, reduction)
    with no_autocast(z_a.device):
        z = torch.stack((z_a, z_b), 1).flatten(0, 1)  # [M, D], interleaved
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if normalize:
            z = normalize_rows(z)
        # <u_i, u_j> = s_ij: the temperature's gradient is autograd's business.
        u = z / temperature**0.5
        pos = (u[0::2] * u[1::2]).sum(1)
        rows = reduction == "none"
        if gather is None and not rows and not return_stats and torch.compiler.is_compiling():
            # One node of the graph, however many tiles.
            out = _reference_forward_op(u, pos, decoupled)
        else:
            scale = temperature.detach() if isinstance(temperature, torch.Tensor) else temperature
            watched = scale if return_stats else None
            out = _Reference.call(u, pos, gather, decoupled, rows, watched)
    return _result(out, 2 * len(z_a), normalize, reduction, return_stats)


def _result(out, num_rows, normalize, reduction, return_stats):
    """-> what the user gets, from the outputs of a forward, of which statistics are the last."""
    loss = out[0]
    if reduction == "sum":
        loss = loss * num_rows
    elif reduction == "none":
        loss = _in_views(loss)
    if not return_stats:
        return loss
    stats = Stats(*map(_in_views, out[-6:]))
    return loss, stats if normalize else stats._replace(potential=None)


def _in_views(x):
    """(M,) of interleaved rows -> (M,), the first view's above the second's."""
    return x.view(-1, 2).T.flatten()


def _row_stats(loss, lse, pos, nearer, potential, cosine, num_keys):
    """-> the members of `Stats`, interleaved; nearer and potential are the tiles' sums (M,)."""
    rank = nearer.long().clamp_max(num_keys - 2)  # where it is nan, masked ones were counted, too
    potential = (potential + (4 * (cosine - 1)).exp()) / (num_keys - 1)
    # An output of an operation is a tensor of its own.
    return loss.clone(), lse.clone(), pos, rank == 0, rank, potential


def _row_loss(negatives, lse, pos, decoupled):
    if decoupled:
        return lse - pos
    return torch.logaddexp(negatives - pos, torch.zeros_like(pos))  # softplus, at every magnitude


def _reference_forward(u, pos, gather, decoupled, rows=False, temperature=None):
    """-> loss, keys (K, D), log-sum-exp (lse) of rows (M,) and keys (K,), negatives, index, stats.

    The loss is (), with rows=True (M,). Negatives are the logs of the rows' sums over their
    negatives (M,). What is of the keys is None where they are the rows; the index (K,), of further
    gathers, is there for rows=True alone; the six statistics where a temperature is given.
    """
    keys, index = (None, None) if gather is None else own_rows_first(gather, u)[:2]
    pos = pos.repeat_interleave(2)
    num_keys = len(u if keys is None else keys)
    watch = None
    if temperature is not None:
        bound = pos - tie_margin(u)
        nearer, potential = torch.zeros_like(pos), torch.zeros_like(pos)

        def watch(m, n, s):
            nearer[m] += (~(s < bound[m, None])).sum(1)
            potential[m] += (4 * temperature * s - 4).exp_().sum(1)

    negatives = reference_lse(u, u if keys is None else keys, 1, watch)
    if decoupled:
        # One image in the world has no negatives: nothing to push away from, only the attraction
        # remains.
        lse = negatives.masked_fill(negatives == -math.inf, 0.0)
    else:
        lse = torch.logaddexp(negatives, pos)
    loss = _row_loss(negatives, lse, pos, decoupled)
    stats = (None,) * 6
    if temperature is not None:
        cosine = pos * temperature
        stats = _row_stats(loss, lse, pos, nearer, potential, cosine, num_keys)
    lse_keys = None if gather is None else gather(lse)[index]
    loss = loss if rows else loss.mean()
    return loss, keys, lse, lse_keys, negatives, index if rows else None, *stats


def _reference_backward(
    dloss, u, pos, keys, lse, lse_keys, negatives, index, *, decoupled, gather=None
):
    """-> du (M, D), dpos (N,)."""
    if keys is None:
        keys, lse_keys = u, lse

    def weighted_sum(lse_rows, lse_keys):
        with no_autocast(u.device):
            return reference_weighted_sum(u, keys, lse_rows, lse_keys, pair_shift=1)

    if decoupled:
        sigma = torch.ones_like(negatives)
    else:
        sigma = torch.sigmoid(negatives - pos.repeat_interleave(2))
    if dloss.dim():
        d_keys = dloss if index is None else gather(dloss.contiguous())[index]
        du = with_row_gradients(weighted_sum, dloss, d_keys, lse, lse_keys)
        return du, -(sigma * dloss).view(-1, 2).sum(1)
    scale = dloss / u.shape[0]
    return weighted_sum(lse, lse_keys) * scale, sigma.view(-1, 2).sum(1) * -scale


class _Reference(Operation):
    @staticmethod
    def forward(u, pos, gather, decoupled, rows, temperature):
        return _reference_forward(u, pos, gather, decoupled, rows, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = {"gather": inputs[2], "decoupled": inputs[3]}
        save(ctx, inputs[:2], output, unsaved=6)

    @staticmethod
    def backward(ctx, dloss, *_):
        return gradients(ctx, functools.partial(_reference_backward, **ctx.options), dloss)


@jit
def _nt_xent_prepare_kernel(
    a_ptr,  # (N, D)
    b_ptr,  # (N, D)
    temperature_ptr,  # (1,), read where it is a tensor
    u_ptr,  # (padded m, planes x BLOCK_D), 16 bits, written
    pos_ptr,  # (N,) fp32, written
    partials_ptr,  # (1 + programs,) fp32, the first written
    temperature,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    num_pairs,
    dim,
    TEMPERATURE_IS_TENSOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FP16: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Interleave, normalize, scale and cast; positives in fp32.

    The scale is sqrt(log2(e) / tau): a dot product is then a power of two's exponent. Clears the
    count of programs that have added their losses.
    """
    if tl.program_id(0) == 0:
        tl.store(partials_ptr, 0.0)
    pairs = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    if TEMPERATURE_IS_TENSOR:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    scale = tl.sqrt(LOG2_E / temperature)
    a = load_rows(a_ptr, pairs, offs_d, stride_an, stride_ad, num_pairs, dim)
    b = load_rows(b_ptr, pairs, offs_d, stride_bn, stride_bd, num_pairs, dim)
    a = a * (inverse_norm(a, NORMALIZE) * scale)[:, None]
    b = b * (inverse_norm(b, NORMALIZE) * scale)[:, None]
    tl.store(pos_ptr + pairs, tl.sum(a * b, 1), mask=pairs < num_pairs)
    # Rows beyond M are stored as zeros, so that tiles load without a mask.
    store_planes(u_ptr, pairs * 2, offs_d, a, FP16, SPLIT, BLOCK_D)
    store_planes(u_ptr, pairs * 2 + 1, offs_d, b, FP16, SPLIT, BLOCK_D)


@jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] with x's own digits, of which log alone keeps none below 6e-8.

    Kahan's correction.
    """
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@jit
def _row_losses(negatives, pos, DECOUPLED: tl.constexpr):
    """-> log-sum-exp of each row, base 2, and its loss, base e."""
    if DECOUPLED:
        # One image in the world has no negatives: only the attraction remains.
        lse = tl.where(negatives == float("-inf"), 0.0, negatives)
        loss = (lse - pos) * LN2
    else:
        delta = negatives - pos
        tail = _log1p(tl.exp2(-tl.abs(delta)))  # softplus(d) = max(d, 0) + log1p(exp(-|d|))
        loss = tl.maximum(delta, 0.0) * LN2 + tail
        lse = tl.maximum(negatives, pos) + tail * LOG2_E
    return lse, loss


@jit
def _finish_rows(
    negatives,
    rows,
    mask,
    num_rows,
    pos_ptr,
    negatives_ptr,
    lse_ptr,
    partials_ptr,
    loss_ptr,
    DECOUPLED: tl.constexpr,
):
    """Store the log-sum-exps of some rows; the program that comes last adds up all losses."""
    pos = tl.load(pos_ptr + (rows >> 1), mask=mask, other=0.0)
    lse, loss = _row_losses(negatives, pos, DECOUPLED)
    tl.store(negatives_ptr + rows, negatives, mask=mask)
    tl.store(lse_ptr + rows, lse, mask=mask)
    loss = tl.sum(tl.where(mask, loss, 0.0), 0) / num_rows
    tl.store(partials_ptr + 1 + tl.program_id(0), loss)
    if comes_last(partials_ptr):
        tl.store(loss_ptr, sum_of_programs(partials_ptr + 1))


@jit
def _nt_xent_finish_kernel(
    tops_ptr,  # (slots, padded m) fp32
    sums_ptr,  # the same
    pos_ptr,  # (N,) fp32
    negatives_ptr,  # (M,) fp32, written
    lse_ptr,  # (M,) fp32, written
    partials_ptr,  # (1 + programs,) fp32
    loss_ptr,  # () fp32, written
    shift,
    num_rows,
    num_slots,
    half_slot,
    half_row,
    stride_slot,
    SHIFTED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Merge the slots of each row into its base-2 log-sum-exps and add up the rows' losses."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_rows
    negatives = merge_slots(
        tops_ptr,
        sums_ptr,
        offs_r,
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
    _finish_rows(
        negatives,
        offs_r,
        mask_r,
        num_rows,
        pos_ptr,
        negatives_ptr,
        lse_ptr,
        partials_ptr,
        loss_ptr,
        DECOUPLED=DECOUPLED,
    )


@jit(do_not_specialize=["num_rows"])
def _nt_xent_few_rows_fwd_kernel(
    u_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    pos_ptr,  # (N,) fp32
    negatives_ptr,  # (M,) fp32, written
    lse_ptr,  # (M,) fp32, written
    partials_ptr,  # (1 + programs,) fp32
    loss_ptr,  # () fp32, written
    shift,
    num_rows,
    DECOUPLED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles and their merging in one: a program takes its rows through all keys."""
    offs_m, offs_d, rows, rows_lo = load_block(u_ptr, SPLIT, BLOCK_M, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed over the warps once, at the end
    for start in range(0, num_rows, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys, keys_lo = load_planes(u_ptr, offs_n, offs_d, SPLIT, BLOCK_D)
        e = tl.exp2(similarities(rows, rows_lo, keys, keys_lo, SPLIT) - shift)
        masked = same_group(offs_m, offs_n, 1)
        total += tl.where(masked | (offs_n >= num_rows)[None, :], 0.0, e)
    _finish_rows(
        log2_sum(tl.sum(total, 1), shift),
        offs_m,
        offs_m < num_rows,
        num_rows,
        pos_ptr,
        negatives_ptr,
        lse_ptr,
        partials_ptr,
        loss_ptr,
        DECOUPLED=DECOUPLED,
    )


@jit
def _load_views(
    a_ptr,
    b_ptr,
    pairs,
    offs_d,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    num_pairs,
    dim,
    NORMALIZE: tl.constexpr,
):
    """-> rows of both views, and what each is to be multiplied with."""
    a = load_rows(a_ptr, pairs, offs_d, stride_an, stride_ad, num_pairs, dim)
    b = load_rows(b_ptr, pairs, offs_d, stride_bn, stride_bd, num_pairs, dim)
    inv_a = inverse_norm(a, NORMALIZE)
    inv_b = inverse_norm(b, NORMALIZE)
    return a, b, inv_a, inv_b


@jit
def _view_gradients(
    sum_a,
    sum_b,
    a,
    b,
    inv_a,
    inv_b,
    dloss_ptr,
    pos_ptr,
    negatives_ptr,
    temperature,
    pairs,
    num_pairs,
    NORMALIZE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """From the tiles' sums of u = z sqrt(log2(e) / tau) to the gradients of a and b.

    Subtract the positive in fp32, scale by dloss, go back through the normalization.

    -> da, db [BLOCK_P, BLOCK_D]; <z, dz> of each pair before the normalization, [BLOCK_P].
    """
    a = a * inv_a[:, None]
    b = b * inv_b[:, None]
    mask_p = pairs < num_pairs
    if DECOUPLED:
        sigma = tl.full([BLOCK_P], 2.0, tl.float32)
    else:
        pos = tl.load(pos_ptr + pairs, mask=mask_p, other=0.0)
        negatives_a = tl.load(negatives_ptr + pairs * 2, mask=mask_p, other=0.0)
        negatives_b = tl.load(negatives_ptr + pairs * 2 + 1, mask=mask_p, other=0.0)
        # 1 - softmax of the positive, from the negatives' side: no cancellation when it is tiny.
        sigma = 1.0 / (1.0 + tl.exp2(pos - negatives_a)) + 1.0 / (1.0 + tl.exp2(pos - negatives_b))
    unscale = tl.sqrt(temperature / LOG2_E)
    scale = tl.load(dloss_ptr).to(tl.float32) / (2.0 * num_pairs * temperature)
    da = (sum_a * unscale - sigma[:, None] * b) * scale
    db = (sum_b * unscale - sigma[:, None] * a) * scale
    radial_a = tl.sum(a * da, 1)
    radial_b = tl.sum(b * db, 1)
    if NORMALIZE:
        da = (da - a * radial_a[:, None]) * inv_a[:, None]
        db = (db - b * radial_b[:, None]) * inv_b[:, None]
    return da, db, radial_a + radial_b


@jit
def _store_views(da_ptr, db_ptr, da, db, pairs, offs_d, num_pairs, dim):
    mask = (pairs < num_pairs)[:, None] & (offs_d < dim)[None, :]
    offs = pairs[:, None] * dim + offs_d[None, :]
    tl.store(da_ptr + offs, da.to(da_ptr.dtype.element_ty), mask=mask)
    tl.store(db_ptr + offs, db.to(db_ptr.dtype.element_ty), mask=mask)


@jit
def _nt_xent_epilogue_kernel(
    a_ptr,  # (N, D)
    b_ptr,  # (N, D)
    temperature_ptr,  # (1,), read where it is a tensor
    dloss_ptr,  # ()
    partial_ptr,  # (ranges, padded m, BLOCK_D) fp32
    pos_ptr,  # (N,) fp32
    negatives_ptr,  # (M,) fp32
    da_ptr,  # (N, D), written
    db_ptr,  # (N, D), written
    dtemperature_ptr,  # (programs,) fp32, written
    temperature,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    num_pairs,
    dim,
    num_slots,
    stride_slot,
    TEMPERATURE_IS_TENSOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the ranges; then from the sums to the views' gradients."""
    pairs = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    if TEMPERATURE_IS_TENSOR:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    a, b, inv_a, inv_b = _load_views(
        a_ptr,
        b_ptr,
        pairs,
        offs_d,
        stride_an,
        stride_ad,
        stride_bn,
        stride_bd,
        num_pairs,
        dim,
        NORMALIZE,
    )
    sum_a = sum_ranges(partial_ptr, pairs * 2, offs_d, num_slots, stride_slot, BLOCK_P, BLOCK_D)
    sum_b = sum_ranges(partial_ptr, pairs * 2 + 1, offs_d, num_slots, stride_slot, BLOCK_P, BLOCK_D)
    da, db, radial = _view_gradients(
        sum_a,
        sum_b,
        a,
        b,
        inv_a,
        inv_b,
        dloss_ptr,
        pos_ptr,
        negatives_ptr,
        temperature,
        pairs,
        num_pairs,
        NORMALIZE=NORMALIZE,
        DECOUPLED=DECOUPLED,
        BLOCK_P=BLOCK_P,
    )
    if TEMPERATURE_IS_TENSOR:
        dtemperature = tl.sum(tl.where(pairs < num_pairs, radial, 0.0), 0) / (-2.0 * temperature)
        tl.store(dtemperature_ptr + tl.program_id(0), dtemperature)
    _store_views(da_ptr, db_ptr, da, db, pairs, offs_d, num_pairs, dim)


@jit
def _nt_xent_few_rows_bwd_kernel(
    a_ptr,  # (N, D)
    b_ptr,  # (N, D)
    dloss_ptr,  # ()
    u_ptr,  # (padded m, planes x BLOCK_D), 16 bits
    pos_ptr,  # (N,) fp32
    negatives_ptr,  # (M,) fp32
    lse_ptr,  # (M,) fp32
    da_ptr,  # (N, D), written
    db_ptr,  # (N, D), written
    temperature,
    shift,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    num_pairs,
    dim,
    NORMALIZE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LOG2_SCALE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles and epilogue in one: a program takes its rows through all keys to their gradients."""
    BLOCK_P: tl.constexpr = BLOCK_M // 2
    offs_m, offs_d, rows, rows_lo = load_block(u_ptr, SPLIT, BLOCK_M, BLOCK_D)
    num_rows = num_pairs * 2
    inverse_rows = tl.exp2(
        shift - tl.load(lse_ptr + offs_m, mask=offs_m < num_rows, other=float("inf"))
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, num_rows, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys, keys_lo = load_planes(u_ptr, offs_n, offs_d, SPLIT, BLOCK_D)
        # `_weights` of similarity.py would take a fifth more registers.
        inverse_keys = tl.exp2(
            shift - tl.load(lse_ptr + offs_n, mask=offs_n < num_rows, other=float("inf"))
        )
        s = similarities(rows, rows_lo, keys, keys_lo, SPLIT)  # [BLOCK_M, BLOCK_N]
        weight = tl.exp2(s - (shift - LOG2_SCALE)) * (inverse_rows[:, None] + inverse_keys[None, :])
        masked = same_group(offs_m, offs_n, 1)
        weight = tl.where(masked | (offs_n >= num_rows)[None, :], 0.0, weight)
        acc = add_weighted(acc, weight, keys, keys_lo, SPLIT)
    acc *= 2.0 ** (-LOG2_SCALE)
    sum_a, sum_b = tl.split(tl.permute(tl.reshape(acc, [BLOCK_P, 2, BLOCK_D]), (0, 2, 1)))
    pairs = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    a, b, inv_a, inv_b = _load_views(
        a_ptr,
        b_ptr,
        pairs,
        offs_d,
        stride_an,
        stride_ad,
        stride_bn,
        stride_bd,
        num_pairs,
        dim,
        NORMALIZE,
    )
    da, db, _ = _view_gradients(
        sum_a,
        sum_b,
        a,
        b,
        inv_a,
        inv_b,
        dloss_ptr,
        pos_ptr,
        negatives_ptr,
        temperature,
        pairs,
        num_pairs,
        NORMALIZE=NORMALIZE,
        DECOUPLED=DECOUPLED,
        BLOCK_P=BLOCK_P,
    )
    _store_views(da_ptr, db_ptr, da, db, pairs, offs_d, num_pairs, dim)


class _Options(NamedTuple):
    """Of a call, beside its tensors."""

    temperature: float  # 1.0 where it is a tensor
    normalize: bool
    decoupled: bool
    gather: Gather | None = None
    rows: bool = False  # a loss for each
    stats: bool = False


class _Saved(NamedTuple):
    """Of a forward for its backward; logs are base 2."""

    u: torch.Tensor
    keys: torch.Tensor | None  # what is of the keys is None where they are the rows
    pos: torch.Tensor  # (N,)
    negatives: torch.Tensor  # (M,) logs of the rows' sums over their negatives
    lse: torch.Tensor  # (M,)
    lse_keys: torch.Tensor | None  # (K,)
    index: torch.Tensor | None  # (K,), of further gathers, for rows=True alone


def _few_rows(num_rows, width, own_keys, shifted):
    """May one program take some rows through all keys?"""
    return own_keys and shifted and num_rows <= FEW_ROWS and width <= FEW_ROWS_WIDTH


@plan
def _forward_plan(shape, dtype, device, strides, learned, normalize, decoupled, own, shifted):
    """-> rows' shape and dtype, are they split, number of partials, launches.

    These are prepare and, of few rows, all that is left, else None.
    """
    num_pairs, dim = shape
    num_rows = 2 * num_pairs
    plane, split = planes(dtype, normalize)
    buffer = row_buffer(num_rows, dim, dtype, normalize)
    width = block_d(dim)
    constants = {
        "TEMPERATURE_IS_TENSOR": learned is not None,
        "NORMALIZE": normalize,
        "FP16": plane == torch.float16,
        "SPLIT": split,
        "BLOCK_P": _block_p(width),
        "BLOCK_D": width,
    }
    grid = (buffer[0][0] // (2 * _block_p(width)),)
    prepare = Launch(_nt_xent_prepare_kernel, grid, (*strides, num_pairs, dim), constants)
    few = None
    if _few_rows(num_rows, buffer[0][1], own, shifted):
        tile = few_rows_tile(target_name(device))
        grid, constants = (ceil_div(num_rows, tile.block_m),), {"DECOUPLED": decoupled}
        kernel = _nt_xent_few_rows_fwd_kernel
        few = tile.launch(kernel, grid, (num_rows,), split, width, constants)
    # One count and one loss a program, of which there are the most where each has 16 rows.
    return *buffer, split, 1 + ceil_div(num_rows, 16), prepare, few


@plan
def _finish_plan(num_rows, of_slots, device, shifted, decoupled):
    """The launch. of_slots: the integers of `Slots`."""
    block_r = 128
    constants = {"SHIFTED": shifted, "DECOUPLED": decoupled, "SLOTS": 16, "BLOCK_R": block_r}
    grid = (ceil_div(num_rows, block_r),)
    return Launch(_nt_xent_finish_kernel, grid, (num_rows, *of_slots), constants)


@on_device_of_first
def _triton_forward(z_a, z_b, temperature_tensor, options):
    """-> the loss, (), with rows=True (M,); `_Saved`; the six members of `Stats`, or None."""
    device = z_a.device
    num_pairs = z_a.shape[0]
    num_rows = 2 * num_pairs
    shift, learned, described, z_a, z_b = _prepared(z_a, z_b, temperature_tensor, options)
    gather = options.gather
    shape, plane, split, num_partials, prepare, few = _forward_plan(
        *described, gather is None, shift is not None
    )
    u = torch.empty(shape, dtype=plane, device=device)
    pos = torch.empty(num_pairs, dtype=torch.float32, device=device)
    partials = torch.empty(num_partials, dtype=torch.float32, device=device)
    temperature_or_any = pos if learned is None else temperature_tensor
    prepare((z_a, z_b, temperature_or_any, u, pos, partials), options.temperature)
    negatives = torch.empty(num_rows, dtype=torch.float32, device=device)
    lse = torch.empty_like(negatives)
    loss = torch.empty((), dtype=torch.float32, device=device)
    results = (pos, negatives, lse, partials, loss)
    keys = index = lse_keys = None
    num_keys = num_rows
    if few is not None and not options.stats:
        few((u, *results), shift)
    else:
        keys, num_keys, index = gather_keys(gather, u, num_rows)
        operands = Operands(u, keys, num_rows, num_keys, pair_shift=1, split=split, shift=shift)
        if options.stats:
            slots, counts = _counts(operands, temperature_tensor, options.temperature)
        else:
            slots = slot_sums(operands)
        finish = _finish_plan(
            num_rows, slots.integers(), device, slots.tops is None, options.decoupled
        )
        finish((*slots.pointers(), *results), shift or 0.0)
        if gather is None:
            keys = None
        else:
            lse_keys = gather(lse)[index]
    members = (None,) * 6
    if options.rows or options.stats:
        logs = [x / LOG2_E for x in (negatives, lse, pos.repeat_interleave(2))]
        row_loss = _row_loss(*logs, options.decoupled)
        loss = row_loss if options.rows else loss
    if options.stats:
        cosine = logs[2] * (options.temperature if learned is None else temperature_tensor)
        members = _row_stats(row_loss, *logs[1:], *counts, cosine, num_keys)
    index = index if options.rows else None
    return loss, _Saved(u, keys, pos, negatives, lse, lse_keys, index), members


def _counts(operands, temperature_tensor, temperature):
    """`stats_sums` of pairs: of the rows as the tiles see them, so that ties are ties."""
    rows = operands.u[: operands.num_rows].float()
    if operands.split:
        rows = sum(rows.chunk(2, 1))
    bound = (rows[0::2] * rows[1::2]).sum(1).repeat_interleave(2) - tie_margin(rows)
    if temperature_tensor is None:
        factor = torch.full((1,), 4 * temperature, device=rows.device)
    else:
        factor = (4 * temperature_tensor).float().view(1)
    return stats_sums(operands, bound, bound, factor)


@plan
def _backward_plan(shape, dtype, device, strides, learned, normalize, decoupled, own, shifted):
    """-> are rows split, the launch for few rows or None."""
    num_pairs, dim = shape
    plane, split = planes(dtype, normalize)
    width = block_d(dim)
    if not _few_rows(2 * num_pairs, width * (1 + split), own, shifted):
        return split, None
    tile = few_rows_tile(target_name(device))
    constants = {"NORMALIZE": normalize, "DECOUPLED": decoupled, "LOG2_SCALE": log2_scale(plane)}
    grid, integers = (ceil_div(2 * num_pairs, tile.block_m),), (*strides, num_pairs, dim)
    kernel = _nt_xent_few_rows_bwd_kernel
    return split, tile.launch(kernel, grid, integers, split, width, constants)


@plan
def _epilogue_plan(shape, dtype, device, strides, learned, normalize, decoupled, ranges):
    """-> the number of programs, the launch. ranges: shape of what `weighted_sums` left."""
    num_pairs, dim = shape
    block_p = _block_p(ranges[2])
    programs = ceil_div(num_pairs, block_p)
    integers = (*strides, num_pairs, dim, ranges[0], ranges[1] * ranges[2])
    constants = {
        "TEMPERATURE_IS_TENSOR": learned is not None,
        "NORMALIZE": normalize,
        "DECOUPLED": decoupled,
        "BLOCK_P": block_p,
        "BLOCK_D": ranges[2],
    }
    return programs, Launch(_nt_xent_epilogue_kernel, (programs,), integers, constants)


@on_device_of_first
def _triton_backward(dloss, z_a, z_b, temperature_tensor, *saved, options):
    """-> dz_a, dz_b (N, D), dtemperature, like the tensor, or None. saved: members of `_Saved`."""
    dtype = z_a.dtype
    saved = _Saved(*saved)
    of_rows = z_a, z_b
    shift, learned, described, z_a, z_b = _prepared(*of_rows, temperature_tensor, options)
    own = saved.keys is None
    split, few = _backward_plan(*described, own, shift is not None)
    if few is not None and not dloss.dim():
        dz_a = torch.empty(z_a.shape, dtype=z_a.dtype, device=z_a.device)
        dz_b = torch.empty_like(dz_a)
        tensors = (z_a, z_b, dloss, saved.u, saved.pos, saved.negatives, saved.lse, dz_a, dz_b)
        few(tensors, options.temperature, shift)
        return dz_a.to(dtype), dz_b.to(dtype), None
    num_rows = 2 * z_a.shape[0]
    keys, lse_keys = (saved.u, saved.lse) if own else (saved.keys, saved.lse_keys)
    operands = Operands(saved.u, keys, num_rows, lse_keys.shape[0], 1, split, shift)
    if dloss.dim():

        def tiles(lse, lse_keys):
            partial = weighted_sums(operands, lse * LOG2_E, lse_keys * LOG2_E)
            return partial.sum(0)[:num_rows]

        index = saved.index
        d_keys = dloss if index is None else options.gather(dloss.contiguous())[index]
        sums = with_row_gradients(tiles, dloss, d_keys, saved.lse / LOG2_E, lse_keys / LOG2_E)
        temperature = options.temperature if learned is None else temperature_tensor
        return _row_epilogue(sums, dloss, *of_rows, saved, temperature, options)
    # First of all, so that the GPU need not wait for the rest.
    partial = weighted_sums(operands, saved.lse, lse_keys)
    dz_a = torch.empty(z_a.shape, dtype=z_a.dtype, device=z_a.device)
    dz_b = torch.empty_like(dz_a)
    programs, epilogue = _epilogue_plan(*described, partial.shape)
    count = 0 if learned is None else programs
    dtemperature = torch.empty(count, dtype=torch.float32, device=z_a.device)
    temperature_or_any = saved.pos if learned is None else temperature_tensor
    inputs = (z_a, z_b, temperature_or_any, dloss, partial, saved.pos, saved.negatives)
    epilogue((*inputs, dz_a, dz_b, dtemperature), options.temperature)
    if learned is None:
        return dz_a.to(dtype), dz_b.to(dtype), None
    dtau = dtemperature.sum().to(learned).view_as(temperature_tensor)
    return dz_a.to(dtype), dz_b.to(dtype), dtau


def _row_epilogue(sums, dloss, z_a, z_b, saved, temperature, options):
    """`_nt_xent_epilogue_kernel` for an upstream gradient of each row, which `sums` has in it."""
    z = torch.stack((z_a, z_b), 1).flatten(0, 1).float()
    inverse = 1.0
    if options.normalize:
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        inverse = torch.where(norm <= NORM_EPS, 0.0, 1 / norm.clamp_min(NORM_EPS))
    z = z * inverse
    sigma = dloss
    if not options.decoupled:
        difference = saved.negatives - saved.pos.repeat_interleave(2)
        sigma = torch.sigmoid(difference / LOG2_E) * dloss
    sigma = sigma.view(-1, 2).sum(1).repeat_interleave(2)
    others = z.view(-1, 2, z.shape[1]).flip(1).flatten(0, 1)
    dz = sums[:, : z.shape[1]] * (temperature / LOG2_E) ** 0.5 - sigma[:, None] * others
    dz = dz / temperature
    radial = (z * dz).sum(1, keepdim=True)
    dtau = None
    if isinstance(temperature, torch.Tensor):
        dtau = (radial.sum() / (-2 * temperature)).to(temperature.dtype).view_as(temperature)
    if options.normalize:
        dz = (dz - z * radial) * inverse
    dz_a, dz_b = dz.to(z_a.dtype).view(-1, 2, z.shape[1]).unbind(1)
    return dz_a, dz_b, dtau


def _prepared(z_a, z_b, temperature_tensor, options):
    """-> the shift, None without one; the dtype of a temperature that is a tensor, else None;
    what plans are made from; the inputs as kernels can read them.
    """
    shift = learned = None
    if temperature_tensor is None:
        shift = shift_of(options.temperature, options.normalize)
    else:
        learned = temperature_tensor.dtype
    dtype = z_a.dtype
    z_a, z_b = readable(z_a, z_b)
    of_rows = z_a.shape, dtype, z_a.device, (*z_a.stride(), *z_b.stride())
    described = (*of_rows, learned, options.normalize, options.decoupled)
    return shift, learned, described, z_a, z_b


def _block_p(block_d: int) -> int:
    """Pairs of rows per program: 2,048 elements of each view, at most 16 pairs.

    It divides the rows' padding.
    """
    return max(4, min(16, 2048 // block_d))


class _NTXent(Operation):
    @staticmethod
    def forward(z_a, z_b, temperature_tensor, options):
        loss, saved, members = _triton_forward(z_a, z_b, temperature_tensor, options)
        return loss, *saved, *members

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options = inputs[3]
        save(ctx, inputs[:3], output, unsaved=6)

    @staticmethod
    def backward(ctx, dloss, *_):
        return gradients(ctx, functools.partial(_triton_backward, options=ctx.options), dloss)


@torch.library.custom_op("kernels::nt_xent_forward", mutates_args=())
def _forward_op(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    temperature_tensor: torch.Tensor | None,
    temperature: float,
    normalize: bool,
    decoupled: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = _Options(temperature, normalize, decoupled)
    loss, saved, _ = _triton_forward(z_a, z_b, temperature_tensor, options)
    return loss, saved.u, saved.pos, saved.negatives, saved.lse


@_forward_op.register_fake
def _(z_a, z_b, temperature_tensor, temperature, normalize, decoupled):
    num_pairs, dim = z_a.shape
    row = z_a.new_empty(2 * num_pairs, dtype=torch.float32)
    u = empty_rows(2 * num_pairs, dim, z_a.dtype, normalize, z_a.device)
    return row.new_empty(()), u, row.new_empty(num_pairs), row, torch.empty_like(row)


@torch.library.custom_op("kernels::nt_xent_backward", mutates_args=())
def _backward_op(
    dloss: torch.Tensor,
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    temperature_tensor: torch.Tensor | None,
    u: torch.Tensor,
    pos: torch.Tensor,
    negatives: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    normalize: bool,
    decoupled: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    saved = _Saved(u, None, pos, negatives, lse, lse_keys=None, index=None)
    options = _Options(temperature, normalize, decoupled)
    dz_a, dz_b, dtau = _triton_backward(
        dloss, z_a, z_b, temperature_tensor, *saved, options=options
    )
    return dz_a, dz_b, dz_a.new_empty(0) if dtau is None else dtau


@_backward_op.register_fake
def _(
    dloss, z_a, z_b, temperature_tensor, u, pos, negatives, lse, temperature, normalize, decoupled
):
    dtau = z_a.new_empty(0) if temperature_tensor is None else torch.empty_like(temperature_tensor)
    dz_a = torch.empty_like(z_a, memory_format=torch.contiguous_format)
    return dz_a, torch.empty_like(dz_a), dtau


def _save_for_backward(ctx, inputs, output):
    ctx.options = inputs[3:]
    save(ctx, inputs[:3], output)


def _differentiate(ctx, dloss, *_):
    saved = ctx.saved_tensors  # once: checkpointing gives them once
    dz_a, dz_b, dtau = _backward_op(dloss, *saved, *ctx.options)
    return dz_a, dz_b, None if saved[2] is None else dtau, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


@torch.library.custom_op("kernels::nt_xent_reference_forward", mutates_args=())
def _reference_forward_op(
    u: torch.Tensor, pos: torch.Tensor, decoupled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, _, lse, _, negatives, *_ = _reference_forward(u, pos, None, decoupled)
    return loss, lse, negatives


@_reference_forward_op.register_fake
def _(u, pos, decoupled):
    return u.new_empty(()), u.new_empty(u.shape[0]), u.new_empty(u.shape[0])


@torch.library.custom_op("kernels::nt_xent_reference_backward", mutates_args=())
def _reference_backward_op(
    dloss: torch.Tensor,
    u: torch.Tensor,
    pos: torch.Tensor,
    lse: torch.Tensor,
    negatives: torch.Tensor,
    decoupled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    of_keys = {"keys": None, "lse_keys": None, "index": None}
    return _reference_backward(
        dloss, u, pos, lse=lse, negatives=negatives, decoupled=decoupled, **of_keys
    )


@_reference_backward_op.register_fake
def _(dloss, u, pos, lse, negatives, decoupled):
    return torch.empty_like(u), torch.empty_like(pos)


def _save_reference(ctx, inputs, output):
    ctx.decoupled = inputs[2]
    save(ctx, inputs[:2], output)


def _differentiate_reference(ctx, dloss, *_):
    return *_reference_backward_op(dloss, *ctx.saved_tensors, ctx.decoupled), None


_reference_forward_op.register_autograd(_differentiate_reference, setup_context=_save_reference)


def _check(z_a, z_b, temperature, reduction):
    if reduction not in REDUCTIONS:
        raise ValueError(f"nt_xent: reduction={reduction!r}, allowed are 'mean', 'sum' and 'none'")
    check_tensors("nt_xent", z_a=z_a, z_b=z_b)
    if z_a.dim() != 2 or z_a.shape != z_b.shape or not z_a.numel():
        raise ValueError(
            f"nt_xent: z_a {tuple(z_a.shape)}, z_b {tuple(z_b.shape)}; both must be the same"
            " (N, D), N and D >= 1"
        )
    if z_a.dtype != z_b.dtype or z_a.device != z_b.device or not z_a.is_floating_point():
        raise ValueError(
            f"nt_xent: z_a is {z_a.dtype} on {z_a.device}, z_b {z_b.dtype} on {z_b.device}; both"
            " must be the same floating type on one device"
        )
    check_temperature("nt_xent", temperature)


@breaks_graph_to_gather
def nt_xent(
    z_a: torch.Tensor,
    z_b: torch.Tensor,
    temperature: float | torch.Tensor,
    *,
    normalize: bool = True,
    gather: Gather | None = None,
    decoupled: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """NT-Xent loss of two views: the mean of log-sum-exp minus positive over 2N rows.

    It is not the loss of CLIP, where a row meets the other tower's rows alone: here the rows of its
    own view are negatives, too (256 pairs of random rows, D = 128, tau = 0.1: 6.67, CLIP's 5.97).

    With several processes each computes the loss of its own 2N rows against everybody's, and the
    gradient of its own rows. Each gradient is that of the loss over all processes times their
    number, so averaging parameter gradients over processes, as DistributedDataParallel does, gives
    exactly what one process would have computed on the whole batch, and averaging the returned
    values gives its loss. This needs the same upstream gradient (loss weight, scaler) on every
    process.

    Args:
        z_a: (N, D) embeddings of the first view, fp32, bf16 or fp16 (fp64: reference only), any
            strides, N >= 1.
        z_b: (N, D) of the second view, same dtype and device; row k is the other view of z_a's row
            k.
        temperature: positive float, or a tensor of one element, which gets its gradient (tau = 0.1
            and 0.5 are usual).
        normalize: divide each row by its length first (in fp32). A row of length below 1e-12 counts
            as zeros and gets no gradient.
        gather: None, or a callable that takes this process's (n, ...) rows and returns all
            processes' rows, concatenated in rank order, the same n from each, without autograd. It
            is called twice per forward and never in the backward; with reduction="none" once there.
        decoupled: leave the positive out of the denominator (DCL). A single pair in the world has
            no denominator at all: its loss is then minus its similarity over the temperature.
        reduction: "mean" and "sum" of this process's 2N rows, or "none": (2N,), z_a's rows above
            z_b's. The gradient of rows is that of all processes' rows, each times its own upstream
            gradient, of any sign, and costs two passes over the similarities.
        return_stats: return (loss, `Stats`). The loss and its gradient stay what they are, to
            rounding; above 1,024 rows on a GPU the forward pass takes the full grid.
        impl: "auto" (Triton on a GPU, else the reference; said once through
            logging.getLogger("kernels")), "triton" or "torch".

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), a scalar but for reduction="none"; with statistics
        the pair of both.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, a temperature that is not positive (a
            tensor's value is not looked at), an unknown reduction, impl="triton" where it cannot
            run.

    Source: Chen et al. 2020, arXiv:2002.05709; decoupled: Yeh et al. 2022, arXiv:2110.06848.
    """
    _check(z_a, z_b, temperature, reduction)
    if choose_impl("nt_xent", impl, z_a, why_not_fused(z_a, normalize, temperature)) == "torch":
        return nt_xent_reference(
            z_a,
            z_b,
            temperature,
            normalize=normalize,
            gather=gather,
            decoupled=decoupled,
            reduction=reduction,
            return_stats=return_stats,
        )
    temperature_tensor = None
    if isinstance(temperature, torch.Tensor):
        temperature_tensor = temperature.to(z_a.device)
        temperature = 1.0
    temperature = float(temperature)  # an integer 1 would be compiled in as a constant
    inputs = (z_a, z_b, temperature_tensor)
    options = (temperature, normalize, decoupled)
    rows = reduction == "none"
    if gather is None and not rows and not return_stats and torch.compiler.is_compiling():
        # Eager goes without: the dispatcher costs more than a launch.
        out = _forward_op(*inputs, *options)
    else:
        out = _NTXent.call(*inputs, _Options(*options, gather, rows, return_stats))
    return _result(out, 2 * len(z_a), normalize, reduction, return_stats)
