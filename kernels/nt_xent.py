"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, arXiv:2002.05709), in O(N D) memory.

With N images and two views of each, M = 2N rows z_i of dimension D, s_ij = <z_i, z_j> / tau, and p(i) the other view
of i's image:

    loss = 1/M sum_i [ log sum_{j != i} exp(s_ij) - s_ip(i) ]

The decoupled form (DCL, Yeh et al. 2022, arXiv:2110.06848) leaves j = p(i) out of the sum as well.

Layout. Rows are interleaved, 2k = view a and 2k+1 = view b of image k, so that i and p(i) = i ^ 1 always fall into the
same diagonal tile and one comparison, (i >> 1) == (j >> 1), masks both. Tiles therefore sum negatives only, R_i =
sum_{j != i, p} exp(s_ij); the positive is an fp32 dot product of its own, and loss_i = softplus(log R_i - s_ip) keeps
its digits where the loss is tiny.

Gradient. The similarity matrix is symmetric, so row i needs nobody else's gradient:

    dz_i = 1/(M tau) [ sum_{j neg} (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j - (sigma_i + sigma_p) z_p ],  sigma_i =
    R_i / exp(lse_i)

Only the M row log-sum-exps are kept between forward and backward; the M x M similarities exist one tile at a time. Row
blocks own their gradient and sums run in a fixed order: no atomics, the same bits in every run.

Limits. The Triton path takes fp32, bf16 and fp16 with D <= 512; anything else takes the reference. The second
derivative raises.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # there are no wheels for macOS: the reference is all there is
    triton = None

Gather = Callable[[torch.Tensor], torch.Tensor]

# A row shorter than this has no direction: it is mapped to zeros, and it gets no gradient rather than 1e12 times one.
NORM_EPS = 1e-12
REFERENCE_TILE = (512, 2048)  # rows, keys: 4 MB in fp32, about a last-level cache's share of one core
MAX_FUSED_D = 512
# fp16 holds nothing below 6e-8, and a mean softmax weight at M = 131,072 is 8e-6: scaled weights keep their digits,
# and 2 * 2^13 fits.
FP16_WEIGHT_SCALE = 2.0**13


def _jit(fn):
    return fn if triton is None else triton.jit(fn)


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter, on CPU tensors."""
    return triton is not None and triton.knobs.runtime.interpret


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger("kernels").info(message)


def choose_impl(op: str, impl: str, x: torch.Tensor, unsupported: str | None) -> str:
    """Resolve impl="auto" to "triton" or "torch", saying once which way it went, or raise where "triton" cannot run.

    Args:
        op: the operation's name, for the messages.
        impl: "auto", "triton" or "torch".
        x: an input; its device decides.
        unsupported: why the Triton kernel cannot take this input, or None.

    Raises:
        ValueError: unknown impl, or impl="triton" where it cannot run.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"{op}: impl={impl!r}, allowed are 'auto', 'triton' and 'torch'")
    if impl == "torch":
        return impl
    if triton is None:
        unsupported = "triton is not installed"
    elif not x.is_cuda and not interpreted():
        unsupported = (
            f"its tensors are on {x.device.type} (Triton needs a GPU, or TRITON_INTERPRET=1 set before the import)"
        )
    elif impl == "auto" and not x.is_cuda:
        unsupported = "the interpreter is for tests"
    if impl == "triton" and unsupported:
        raise ValueError(f"{op}: impl='triton' cannot run: {unsupported}; use impl='auto' or 'torch'")
    choice = "torch" if unsupported else "triton"
    _say_once(f"{op}: {'PyTorch reference, ' + unsupported if unsupported else 'Triton kernel'}")
    return choice


def own_rows_first(gather: Gather, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All processes' rows, rotated so that this process's come first, and the index that rotates further gathers alike.

    The own block is found by equality, on the device and without waiting for it, so no process group and no rank is
    needed here. Two processes with equal blocks may take either: loss and gradient are the same by symmetry.

    Args:
        gather: (n, ...) -> (W n, ...), all processes' rows in rank order; without autograd; n the same everywhere.
        rows: (n, F).

    Returns:
        (W n, F) rows and an int64 index (W n,).

    Raises:
        ValueError: gather returned rows of another number, width or dtype.
    """
    gathered = gather(rows)
    n, width = rows.shape
    if gathered.dim() != 2 or gathered.shape[0] % n or gathered.shape[1] != width or gathered.dtype != rows.dtype:
        raise ValueError(
            f"gather returned {tuple(gathered.shape)} {gathered.dtype} for {tuple(rows.shape)} {rows.dtype}; "
            "expected all processes' rows concatenated along dimension 0, the same number from each"
        )
    blocks = gathered.reshape(-1, n, width)
    own = (blocks == rows).flatten(1).all(1).int().argmax()
    index = (torch.arange(gathered.shape[0], device=rows.device) + own * n) % gathered.shape[0]
    return gathered.index_select(0, index), index


class _NoSecondDerivative(torch.autograd.Function):
    """Identity whose backward raises. (`once_differentiable` is silent where the upstream gradient is constant.)"""

    @staticmethod
    def forward(ctx, grad, *inputs):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("this loss has no second derivative: its gradient was differentiated again")


def first_derivative_only(grads, *inputs):
    """The gradients, which raise when they are differentiated again with respect to inputs."""
    if not torch.is_grad_enabled():
        return grads
    return tuple(g if g is None else _NoSecondDerivative.apply(g, *inputs) for g in grads)


def nt_xent_reference(z_a, z_b, temperature, *, normalize=True, gather=None, decoupled=False):
    """NT-Xent in plain PyTorch; arguments, result and errors as for `nt_xent`.

    Computes in fp32 (fp64 for fp64 inputs) whatever autocast says, and needs O(M D) memory plus one tile: similarities
    are made tile by tile, once for the log-sum-exps and once more in the backward.
    """
    _check(z_a, z_b, temperature)
    with torch.autocast(z_a.device.type, enabled=False):
        z = torch.stack((z_a, z_b), 1).flatten(0, 1)  # [M, D], interleaved
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if normalize:
            z = _normalize(z)
        u = z / temperature**0.5  # <u_i, u_j> = s_ij: the temperature's gradient is autograd's business
        pos = (u[0::2] * u[1::2]).sum(1)
        return _Reference.apply(u, pos, gather, decoupled)


def _normalize(z: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return torch.where(norm > NORM_EPS, z / norm.clamp_min(NORM_EPS), 0.0)


def _tiles(rows: torch.Tensor, keys: torch.Tensor, pair_shift: int):
    """Yield (row slice, key slice, similarities [rows, keys]) with a row's own group of 2**pair_shift rows masked to
    -inf."""
    step_m, step_n = REFERENCE_TILE
    for m in range(0, rows.shape[0], step_m):
        rows_m = rows[m : m + step_m]
        for n in range(0, keys.shape[0], step_n):
            s = rows_m @ keys[n : n + step_n].T
            if n <= m < n + step_n:
                own = torch.arange(rows_m.shape[0], device=s.device)
                s[own, own + (m - n)] = -math.inf
                if pair_shift:
                    s[own, (own ^ 1) + (m - n)] = -math.inf
            yield slice(m, m + step_m), slice(n, n + step_n), s


def reference_lse(rows: torch.Tensor, keys: torch.Tensor, pair_shift: int) -> torch.Tensor:
    """log sum_j exp(<row_i, key_j>) over the keys outside row i's own group; keys start with the rows. Shapes (m, D),
    (k, D) -> (m,)."""
    top = rows.new_full((rows.shape[0],), -math.inf)
    total = rows.new_zeros(rows.shape[0])
    for m, _, s in _tiles(rows, keys, pair_shift):
        new_top = torch.maximum(top[m], s.amax(1))
        shift = new_top.masked_fill(new_top == -math.inf, 0.0)  # exp(-inf - -inf) is nan
        total[m] = total[m] * (top[m] - shift).exp() + s.sub_(shift[:, None]).exp_().sum(1)
        top[m] = new_top
    return top + total.log()


def reference_weighted_sum(rows, keys, lse_rows, lse_keys, pair_shift):
    """sum_j (exp(s_ij - lse_i) + exp(s_ij - lse_j)) key_j over the keys outside row i's own group: (m, D)."""
    out = torch.zeros_like(rows)
    for m, n, s in _tiles(rows, keys, pair_shift):
        weight = (s - lse_rows[m, None]).exp_()
        weight += s.sub_(lse_keys[n]).exp_()
        out[m].addmm_(weight, keys[n])
    return out


def _reference_forward(u, pos, gather, decoupled):
    """-> loss (), keys (K, D), lse of the rows (M,), lse of the keys (K,), log of the negatives' sum (M,)."""
    keys, index = (u, None) if gather is None else own_rows_first(gather, u)
    pos = pos.repeat_interleave(2)
    negatives = reference_lse(u, keys, pair_shift=1)
    if decoupled:
        # One image in the world has no negatives: nothing to push away from, only the attraction remains.
        lse = negatives.masked_fill(negatives == -math.inf, 0.0)
        loss = lse - pos
    else:
        lse = torch.logaddexp(negatives, pos)
        loss = torch.logaddexp(negatives - pos, torch.zeros_like(pos))  # softplus, at every magnitude
    return loss.mean(), keys, lse, lse if gather is None else gather(lse)[index], negatives


def _reference_backward(dloss, u, pos, keys, lse, lse_keys, negatives, decoupled):
    """-> du (M, D), dpos (N,)."""
    scale = dloss / u.shape[0]
    du = reference_weighted_sum(u, keys, lse, lse_keys, pair_shift=1) * scale
    sigma = torch.ones_like(negatives) if decoupled else torch.sigmoid(negatives - pos.repeat_interleave(2))
    return du, sigma.view(-1, 2).sum(1) * -scale


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, pos, gather, decoupled):
        loss, keys, lse, lse_keys, negatives = _reference_forward(u, pos, gather, decoupled)
        ctx.save_for_backward(u, pos, keys, lse, lse_keys, negatives)
        ctx.decoupled = decoupled
        return loss

    @staticmethod
    def backward(ctx, dloss):
        with torch.no_grad(), torch.autocast(dloss.device.type, enabled=False):
            grads = _reference_backward(dloss, *ctx.saved_tensors, ctx.decoupled)
        return *first_derivative_only(grads, dloss, *ctx.saved_tensors[:2]), None, None


@_jit
def _round_to_bf16(x):
    """fp32 rounded to bf16's 8 digits, to nearest even, still in fp32: one rule for the GPU and for the interpreter,
    whose cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@_jit
def _load_view(ptr, pairs, offs_d, stride_n, stride_d, num_pairs, dim):
    mask = (pairs < num_pairs)[:, None] & (offs_d < dim)[None, :]
    return tl.load(ptr + pairs[:, None] * stride_n + offs_d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)


@_jit
def _inverse_norm(x, NORMALIZE: tl.constexpr, EPS: tl.constexpr):
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(x * x, 1))
        return tl.where(norm > EPS, 1.0 / tl.maximum(norm, EPS), 0.0)
    return tl.sum(x, 1) * 0.0 + 1.0


@_jit
def _store_rows(u_ptr, rows, offs_d, x, FP16: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store fp32 rows rounded to 16 bits, or (SPLIT) as two 16-bit planes side by side, x = hi + lo."""
    ptrs = u_ptr + rows[:, None] * (BLOCK_D * 2 if SPLIT else BLOCK_D) + offs_d[None, :]
    hi = x.to(tl.float16).to(tl.float32) if FP16 else _round_to_bf16(x)
    tl.store(ptrs, hi.to(u_ptr.dtype.element_ty))
    if SPLIT:
        lo = x - hi if FP16 else _round_to_bf16(x - hi)
        tl.store(ptrs + BLOCK_D, lo.to(u_ptr.dtype.element_ty))


@_jit
def _nt_xent_prepare_kernel(
    a_ptr,
    b_ptr,
    temperature_ptr,
    u_ptr,
    pos_ptr,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    num_pairs,
    dim,
    temperature,
    TEMPERATURE_IS_TENSOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    FP16: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Interleave, normalise, scale by sqrt(log2(e) / tau) (so that a dot product is a power of two's exponent), cast;
    positives in fp32."""
    pairs = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    if TEMPERATURE_IS_TENSOR:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    scale = tl.sqrt(1.4426950408889634 / temperature)
    a = _load_view(a_ptr, pairs, offs_d, stride_an, stride_ad, num_pairs, dim)
    b = _load_view(b_ptr, pairs, offs_d, stride_bn, stride_bd, num_pairs, dim)
    a = a * (_inverse_norm(a, NORMALIZE, EPS) * scale)[:, None]
    b = b * (_inverse_norm(b, NORMALIZE, EPS) * scale)[:, None]
    tl.store(pos_ptr + pairs, tl.sum(a * b, 1), mask=pairs < num_pairs)
    # Rows beyond M are stored as zeros, so that tiles load without a mask.
    _store_rows(u_ptr, pairs * 2, offs_d, a, FP16, SPLIT, BLOCK_D)
    _store_rows(u_ptr, pairs * 2 + 1, offs_d, b, FP16, SPLIT, BLOCK_D)


@_jit
def _similarities(rows, rows_lo, keys, keys_lo, SPLIT: tl.constexpr):
    """[BLOCK_M, BLOCK_N] fp32; with SPLIT three 16-bit products, and only lo x lo is dropped."""
    keys_t = tl.trans(keys)
    s = tl.dot(rows, keys_t, input_precision="ieee")
    if SPLIT:
        s = tl.dot(rows_lo, keys_t, s, input_precision="ieee")
        s = tl.dot(rows, tl.trans(keys_lo), s, input_precision="ieee")
    return s


@_jit
def _nt_xent_fwd_kernel(
    rows_ptr,
    keys_ptr,
    max_ptr,
    sum_ptr,
    num_keys,
    keys_per_split,
    stride_slot,
    PAIR_SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Running maximum and sum of 2^s over one block of rows and one range of keys; slot [range, row] of both is
    written once."""
    pid_m = tl.program_id(0)
    split = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    stride_u: tl.constexpr = BLOCK_D * 2 if SPLIT else BLOCK_D
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptrs = rows_ptr + offs_m.to(tl.int64)[:, None] * stride_u + offs_d[None, :]
    rows = tl.load(row_ptrs)
    rows_lo = tl.load(row_ptrs + BLOCK_D) if SPLIT else rows
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin = split * keys_per_split
    for start in range(begin, tl.minimum(begin + keys_per_split, num_keys), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        key_ptrs = keys_ptr + offs_n.to(tl.int64)[:, None] * stride_u + offs_d[None, :]
        keys = tl.load(key_ptrs)
        keys_lo = tl.load(key_ptrs + BLOCK_D) if SPLIT else keys
        s = _similarities(rows, rows_lo, keys, keys_lo, SPLIT)  # [BLOCK_M, BLOCK_N]
        diagonal = (start < (pid_m + 1) * BLOCK_M) & (start + BLOCK_N > pid_m * BLOCK_M)
        if diagonal | (start + BLOCK_N > num_keys):
            own = (offs_m >> PAIR_SHIFT)[:, None] == (offs_n >> PAIR_SHIFT)[None, :]
            s = tl.where(own | (offs_n >= num_keys)[None, :], float("-inf"), s)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # 2^(-inf - -inf) is nan
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
        top = new_top
    tl.store(max_ptr + split.to(tl.int64) * stride_slot + offs_m, top)
    tl.store(sum_ptr + split.to(tl.int64) * stride_slot + offs_m, total)


@_jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] with x's own digits (Kahan's correction; log alone keeps none below 6e-8)."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@_jit
def _nt_xent_finish_kernel(
    max_ptr,
    sum_ptr,
    pos_ptr,
    negatives_ptr,
    lse_ptr,
    loss_ptr,
    num_rows,
    num_slots,
    stride_slot,
    rows_per_program,
    DECOUPLED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Merge the slots of each row into its base-2 log-sum-exps and add up the rows' losses."""
    begin = tl.program_id(0) * rows_per_program
    loss = tl.zeros([BLOCK_R], tl.float32)
    for start in range(begin, tl.minimum(begin + rows_per_program, num_rows), BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < num_rows
        top = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        for first in range(0, num_slots, SLOTS):
            slots = first + tl.arange(0, SLOTS)
            offs = slots.to(tl.int64)[:, None] * stride_slot + offs_r[None, :]
            mask = (slots < num_slots)[:, None] & mask_r[None, :]
            tops = tl.load(max_ptr + offs, mask=mask, other=float("-inf"))  # [SLOTS, BLOCK_R]
            sums = tl.load(sum_ptr + offs, mask=mask, other=0.0)
            new_top = tl.maximum(top, tl.max(tops, 0))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - shift) + tl.sum(sums * tl.exp2(tops - shift[None, :]), 0)
            top = new_top
        negatives = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
        pos = tl.load(pos_ptr + (offs_r >> 1), mask=mask_r, other=0.0)
        if DECOUPLED:
            # One image in the world has no negatives: only the attraction remains.
            lse = tl.where(total > 0.0, negatives, 0.0)
            row_loss = (lse - pos) * 0.6931471805599453
        else:
            delta = negatives - pos
            log2_e: tl.constexpr = 1.4426950408889634
            tail = _log1p(tl.exp2(-tl.abs(delta)))  # softplus(d) = max(d, 0) + log1p(exp(-|d|))
            row_loss = tl.maximum(delta, 0.0) * 0.6931471805599453 + tail
            lse = tl.maximum(negatives, pos) + tail * log2_e
        tl.store(negatives_ptr + offs_r, negatives, mask=mask_r)
        tl.store(lse_ptr + offs_r, lse, mask=mask_r)
        loss += tl.where(mask_r, row_loss, 0.0)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, 0) / num_rows)


@_jit
def _nt_xent_bwd_kernel(
    rows_ptr,
    keys_ptr,
    lse_rows_ptr,
    lse_keys_ptr,
    partial_ptr,
    num_rows,
    num_keys,
    keys_per_split,
    stride_slot,
    PAIR_SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_j (2^(s - lse_i) + 2^(s - lse_j)) u_j over one range of keys, fp32, into slot [range, row]."""
    pid_m = tl.program_id(0)
    split = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    stride_u: tl.constexpr = BLOCK_D * 2 if SPLIT else BLOCK_D
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptrs = rows_ptr + offs_m.to(tl.int64)[:, None] * stride_u + offs_d[None, :]
    rows = tl.load(row_ptrs)
    rows_lo = tl.load(row_ptrs + BLOCK_D) if SPLIT else rows
    lse_rows = tl.load(lse_rows_ptr + offs_m, mask=offs_m < num_rows, other=float("inf"))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = split * keys_per_split
    for start in range(begin, tl.minimum(begin + keys_per_split, num_keys), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        key_ptrs = keys_ptr + offs_n.to(tl.int64)[:, None] * stride_u + offs_d[None, :]
        keys = tl.load(key_ptrs)
        keys_lo = tl.load(key_ptrs + BLOCK_D) if SPLIT else keys
        lse_keys = tl.load(lse_keys_ptr + offs_n, mask=offs_n < num_keys, other=float("inf"))
        s = _similarities(rows, rows_lo, keys, keys_lo, SPLIT)
        weight = tl.exp2(s - lse_rows[:, None]) + tl.exp2(s - lse_keys[None, :])
        diagonal = (start < (pid_m + 1) * BLOCK_M) & (start + BLOCK_N > pid_m * BLOCK_M)
        if diagonal | (start + BLOCK_N > num_keys):
            own = (offs_m >> PAIR_SHIFT)[:, None] == (offs_n >> PAIR_SHIFT)[None, :]
            weight = tl.where(own | (offs_n >= num_keys)[None, :], 0.0, weight)
        weight *= WEIGHT_SCALE
        hi = weight.to(keys.dtype)
        acc = tl.dot(hi, keys, acc, input_precision="ieee")
        if SPLIT:
            lo = (weight - hi.to(tl.float32)).to(keys.dtype)
            acc = tl.dot(hi, keys_lo, acc, input_precision="ieee")
            acc = tl.dot(lo, keys, acc, input_precision="ieee")
    out_ptrs = partial_ptr + split.to(tl.int64) * stride_slot + offs_m.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(out_ptrs, acc * (1.0 / WEIGHT_SCALE))


@_jit
def _gradient_rows(partial_ptr, rows, offs_d, num_slots, stride_slot, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for slot in range(0, num_slots):
        total += tl.load(partial_ptr + slot * stride_slot + rows[:, None] * BLOCK_D + offs_d[None, :])
    return total


@_jit
def _nt_xent_epilogue_kernel(
    a_ptr,
    b_ptr,
    temperature_ptr,
    dloss_ptr,
    partial_ptr,
    pos_ptr,
    negatives_ptr,
    da_ptr,
    db_ptr,
    dtemperature_ptr,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    num_pairs,
    dim,
    num_slots,
    stride_slot,
    temperature,
    TEMPERATURE_IS_TENSOR: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the ranges, subtract the positive in fp32, go back through the normalisation, scale by dloss, cast, split
    the views."""
    pairs = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    mask_p = pairs < num_pairs
    if TEMPERATURE_IS_TENSOR:
        temperature = tl.load(temperature_ptr).to(tl.float32)
    a = _load_view(a_ptr, pairs, offs_d, stride_an, stride_ad, num_pairs, dim)
    b = _load_view(b_ptr, pairs, offs_d, stride_bn, stride_bd, num_pairs, dim)
    inv_a = _inverse_norm(a, NORMALIZE, EPS)
    inv_b = _inverse_norm(b, NORMALIZE, EPS)
    a = a * inv_a[:, None]
    b = b * inv_b[:, None]
    if DECOUPLED:
        sigma = tl.full([BLOCK_P], 2.0, tl.float32)
    else:
        pos = tl.load(pos_ptr + pairs, mask=mask_p, other=0.0)
        negatives_a = tl.load(negatives_ptr + pairs * 2, mask=mask_p, other=0.0)
        negatives_b = tl.load(negatives_ptr + pairs * 2 + 1, mask=mask_p, other=0.0)
        # 1 - softmax of the positive, from the negatives' side: no cancellation when it is tiny.
        sigma = 1.0 / (1.0 + tl.exp2(pos - negatives_a)) + 1.0 / (1.0 + tl.exp2(pos - negatives_b))
    unscale = tl.sqrt(temperature / 1.4426950408889634)  # the tiles summed u = z / unscale
    da = _gradient_rows(partial_ptr, pairs * 2, offs_d, num_slots, stride_slot, BLOCK_P, BLOCK_D) * unscale
    db = _gradient_rows(partial_ptr, pairs * 2 + 1, offs_d, num_slots, stride_slot, BLOCK_P, BLOCK_D) * unscale
    scale = tl.load(dloss_ptr).to(tl.float32) / (2.0 * num_pairs * temperature)
    da = (da - sigma[:, None] * b) * scale
    db = (db - sigma[:, None] * a) * scale
    radial_a = tl.sum(a * da, 1)
    radial_b = tl.sum(b * db, 1)
    if TEMPERATURE_IS_TENSOR:
        dtemperature = tl.sum(tl.where(mask_p, radial_a + radial_b, 0.0), 0) / (-2.0 * temperature)
        tl.store(dtemperature_ptr + tl.program_id(0), dtemperature)
    if NORMALIZE:
        da = (da - a * radial_a[:, None]) * inv_a[:, None]
        db = (db - b * radial_b[:, None]) * inv_b[:, None]
    mask = mask_p[:, None] & (offs_d < dim)[None, :]
    offs = pairs[:, None] * dim + offs_d[None, :]
    tl.store(da_ptr + offs, da.to(da_ptr.dtype.element_ty), mask=mask)
    tl.store(db_ptr + offs, db.to(db_ptr.dtype.element_ty), mask=mask)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _num_splits(row_blocks: int, key_blocks: int, slot_bytes: int, device: torch.device) -> int:
    """Ranges of keys: enough programs for two waves of the device, but never more than 64 MB of partial sums."""
    wanted = _ceil_div(2 * _num_sms(device), row_blocks)
    return max(1, min(wanted, key_blocks, 2**26 // slot_bytes))


def _block_d(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _block(num_rows: int) -> int:
    """Rows and keys of a tile; every buffer is padded to a multiple of it, and so is every grid."""
    return 32 if interpreted() else 64


def _planes(dtype: torch.dtype, normalize: bool) -> tuple[torch.dtype, bool]:
    """The 16-bit type in which rows reach the tensor cores, and whether each takes two of them, hi + lo.

    Normalised fp32 rows are two fp16 planes (22 bits, where two of bf16 would hold 16). Rows of unknown length may
    leave fp16's range.
    """
    if not normalize:
        return torch.bfloat16, True
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16, dtype == torch.float32


def _interpretable(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The interpreter's bf16 arithmetic is wrong: there bf16 values travel in fp32 buffers."""
    return [x.float() if interpreted() and x.dtype == torch.bfloat16 else x for x in tensors]


def _triton_forward(z_a, z_b, temperature_tensor, temperature, normalize, decoupled, gather):
    """-> loss (), u (M', planes * BLOCK_D), keys, pos (N,), negatives (M,), lse of the keys (K,)."""
    num_pairs, dim = z_a.shape
    num_rows = 2 * num_pairs
    device = z_a.device
    block, block_d = _block(num_rows), _block_d(dim)
    padded = _ceil_div(num_rows, block) * block
    plane_dtype, split = _planes(z_a.dtype, normalize)
    (u,) = _interpretable(torch.empty(padded, block_d * (2 if split else 1), dtype=plane_dtype, device=device))
    z_a, z_b = _interpretable(z_a, z_b)
    pos = torch.empty(num_pairs, dtype=torch.float32, device=device)
    block_p = 16
    _nt_xent_prepare_kernel[(padded // (2 * block_p),)](
        z_a,
        z_b,
        temperature_tensor if temperature_tensor is not None else pos,
        u,
        pos,
        *z_a.stride(),
        *z_b.stride(),
        num_pairs,
        dim,
        temperature,
        TEMPERATURE_IS_TENSOR=temperature_tensor is not None,
        NORMALIZE=normalize,
        EPS=NORM_EPS,
        FP16=plane_dtype == torch.float16,
        SPLIT=split,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
    )
    keys, num_keys, index = u, num_rows, None
    if gather is not None:
        keys, index = own_rows_first(gather, u[:num_rows])
        num_keys = keys.shape[0]
        keys = F.pad(keys, (0, 0, 0, -num_keys % block))
    key_blocks = _ceil_div(num_keys, block)
    splits = _num_splits(padded // block, key_blocks, 8 * padded, device)
    per_split = _ceil_div(key_blocks, splits) * block
    splits = _ceil_div(num_keys, per_split)
    tops = torch.empty(splits, padded, dtype=torch.float32, device=device)
    sums = torch.empty_like(tops)
    _nt_xent_fwd_kernel[(padded // block, splits)](
        u,
        keys,
        tops,
        sums,
        num_keys,
        per_split,
        padded,
        PAIR_SHIFT=1,
        SPLIT=split,
        BLOCK_M=block,
        BLOCK_N=block,
        BLOCK_D=block_d,
    )
    negatives = torch.empty(num_rows, dtype=torch.float32, device=device)
    lse = torch.empty_like(negatives)
    block_r = 128
    # Up to M = 4096 one program adds the rows' losses; above, a fourth launch costs nothing that shows.
    rows_per_program = _ceil_div(num_rows, block_r) * block_r if num_rows <= 4096 else block_r
    programs = _ceil_div(num_rows, rows_per_program)
    loss = torch.empty(programs, dtype=torch.float32, device=device)
    _nt_xent_finish_kernel[(programs,)](
        tops,
        sums,
        pos,
        negatives,
        lse,
        loss,
        num_rows,
        splits,
        padded,
        rows_per_program,
        DECOUPLED=decoupled,
        SLOTS=16,
        BLOCK_R=block_r,
    )
    lse_keys = lse if gather is None else gather(lse)[index]
    return (loss.view(()) if programs == 1 else loss.sum()), u, keys, pos, negatives, lse, lse_keys


def _triton_backward(
    dloss, z_a, z_b, temperature_tensor, u, keys, pos, negatives, lse, lse_keys, temperature, normalize, decoupled
):
    """-> dz_a, dz_b (N, D), dtemperature () or None."""
    num_pairs, dim = z_a.shape
    num_rows, num_keys = 2 * num_pairs, lse_keys.shape[0]
    device, dtype = z_a.device, z_a.dtype
    block, block_d = _block(num_rows), _block_d(dim)
    plane_dtype, split = _planes(dtype, normalize)
    padded = u.shape[0]
    key_blocks = _ceil_div(num_keys, block)
    splits = _num_splits(padded // block, key_blocks, 4 * padded * block_d, device)
    per_split = _ceil_div(key_blocks, splits) * block
    splits = _ceil_div(num_keys, per_split)
    partial = torch.empty(splits, padded, block_d, dtype=torch.float32, device=device)
    _nt_xent_bwd_kernel[(padded // block, splits)](
        u,
        keys,
        lse,
        lse_keys,
        partial,
        num_rows,
        num_keys,
        per_split,
        padded * block_d,
        PAIR_SHIFT=1,
        SPLIT=split,
        WEIGHT_SCALE=FP16_WEIGHT_SCALE if plane_dtype == torch.float16 else 1.0,
        BLOCK_M=block,
        BLOCK_N=block,
        BLOCK_D=block_d,
    )
    z_a, z_b = _interpretable(z_a, z_b)
    dz_a = torch.empty(num_pairs, dim, dtype=z_a.dtype, device=device)
    dz_b = torch.empty_like(dz_a)
    block_p = max(1, min(16, 4096 // block_d))
    programs = _ceil_div(num_pairs, block_p)
    dtemperature = torch.empty(programs, dtype=torch.float32, device=device)
    _nt_xent_epilogue_kernel[(programs,)](
        z_a,
        z_b,
        temperature_tensor if temperature_tensor is not None else pos,
        dloss,
        partial,
        pos,
        negatives,
        dz_a,
        dz_b,
        dtemperature,
        *z_a.stride(),
        *z_b.stride(),
        num_pairs,
        dim,
        splits,
        padded * block_d,
        temperature,
        TEMPERATURE_IS_TENSOR=temperature_tensor is not None,
        NORMALIZE=normalize,
        EPS=NORM_EPS,
        DECOUPLED=decoupled,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
    )
    dtau = None
    if temperature_tensor is not None:
        dtau = dtemperature.sum().to(temperature_tensor.dtype).view_as(temperature_tensor)
    return dz_a.to(dtype), dz_b.to(dtype), dtau


class _NTXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_a, z_b, temperature_tensor, temperature, normalize, decoupled, gather):
        loss, *saved = _triton_forward(z_a, z_b, temperature_tensor, temperature, normalize, decoupled, gather)
        ctx.save_for_backward(z_a, z_b, temperature_tensor, *saved)
        ctx.options = (temperature, normalize, decoupled)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        grads = _triton_backward(dloss, *ctx.saved_tensors, *ctx.options)
        return *first_derivative_only(grads, dloss, *ctx.saved_tensors[:3]), None, None, None, None


def _check(z_a, z_b, temperature):
    if z_a.dim() != 2 or z_a.shape != z_b.shape or not z_a.numel():
        raise ValueError(f"nt_xent: z_a {tuple(z_a.shape)}, z_b {tuple(z_b.shape)}; both must be (N, D), N and D >= 1")
    if z_a.dtype != z_b.dtype or z_a.device != z_b.device or not z_a.is_floating_point():
        raise ValueError(
            f"nt_xent: z_a is {z_a.dtype} on {z_a.device}, z_b {z_b.dtype} on {z_b.device}; they must agree"
        )
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"nt_xent: temperature has {temperature.numel()} elements; one number is needed")
    elif not 0 < temperature < math.inf:
        raise ValueError(f"nt_xent: temperature={temperature} must be a positive number")


def nt_xent(z_a, z_b, temperature, *, normalize=True, gather=None, decoupled=False, impl="auto"):
    """NT-Xent loss of two views: the mean over this process's 2N rows of log-sum-exp minus positive.

    With several processes each computes the loss of its own rows against everybody's, and the gradient of its own
    rows. Each gradient is that of the loss over all processes times their number, so averaging parameter gradients
    over processes, as DistributedDataParallel does, gives exactly what one process would have computed on the whole
    batch, and averaging the returned values gives its loss. This needs the same upstream gradient (loss weight,
    scaler) on every process.

    Args:
        z_a: (N, D) embeddings of the first view, fp32, bf16 or fp16 (fp64: reference only), any strides, N >= 1.
        z_b: (N, D) of the second view, same dtype and device; row k is the other view of z_a's row k.
        temperature: positive float, or a tensor of one element, which gets its gradient (tau = 0.1 and 0.5 are usual).
        normalize: divide each row by its length first (in fp32). A row of length below 1e-12 counts as zeros and gets
            no gradient.
        gather: None, or a callable that takes this process's (n, ...) rows and returns all processes' rows,
            concatenated in rank order, the same n from each, without autograd. It is called twice per forward and
            never in the backward.
        decoupled: leave the positive out of the denominator (DCL). A single pair in the world has no denominator at
            all: its loss is then minus its similarity over the temperature.
        impl: "auto" (Triton on a GPU, else the reference; said once through logging.getLogger("kernels")), "triton" or
            "torch".

    Returns:
        Scalar loss, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that disagree, a temperature that is not positive, impl="triton" where it
            cannot run.

    Source: Chen et al. 2020, arXiv:2002.05709; decoupled: Yeh et al. 2022, arXiv:2110.06848.
    """
    _check(z_a, z_b, temperature)
    unsupported = None
    if z_a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        unsupported = f"it does not take {z_a.dtype}"
    elif z_a.shape[1] > MAX_FUSED_D:
        unsupported = f"D={z_a.shape[1]} is above {MAX_FUSED_D}"
    if choose_impl("nt_xent", impl, z_a, unsupported) == "torch":
        return nt_xent_reference(z_a, z_b, temperature, normalize=normalize, gather=gather, decoupled=decoupled)
    temperature_tensor = None
    if isinstance(temperature, torch.Tensor):
        temperature_tensor, temperature = temperature.to(z_a.device), 1.0
    return _NTXent.apply(z_a, z_b, temperature_tensor, temperature, normalize, decoupled, gather)
