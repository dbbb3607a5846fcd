"""The losses' references, tile by tile, and what both implementations do in plain PyTorch.

Natural logarithms; rows and keys as `similarity` has them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .dispatch import say_once

Gather = Callable[[torch.Tensor], torch.Tensor]
REDUCTIONS = ("mean", "sum", "none")

# A row shorter than this has no direction: it is mapped to zeros, and it gets no gradient rather
# than 1e12 times one.
NORM_EPS = 1e-12
REFERENCE_TILE = 1024  # rows and keys: 4 MB in fp32; even, so that pairs of rows stay together


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


def check_temperature(op: str, temperature: float | torch.Tensor) -> None:
    """Refuse what is neither a positive number nor a tensor of one element, whose value waits on
    its device and is not looked at.
    """
    if isinstance(temperature, torch.Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                f"{op}: temperature has {temperature.numel()} elements; one number is needed"
            )
        return
    is_no_number = temperature is None or isinstance(temperature, str | bool | list | tuple)
    if is_no_number or not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature={temperature!r} must be a positive number")


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
            f"nt_xent, sup_con: gather returned {tuple(gathered.shape)} {gathered.dtype} for"
            f" {tuple(rows.shape)} {rows.dtype}; expected all processes' rows concatenated"
            " along dimension 0, the same number from each"
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
