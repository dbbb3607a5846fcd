"""Clustering of feature rows.

Everything runs on the rows' device, depends on its arguments alone (no global random state), and takes no gradient.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import augment, config

_TILE = 1 << 22  # numbers in one block of distances: 16 MB in fp32
_GROUP = 1 << 27  # numbers that the restarts computed together may hold


class KMeans(NamedTuple):
    """A clustering: `labels` (N,) int64, `centroids` (K, D), the `inertia` they have, `iterations` of the run kept."""

    labels: torch.Tensor
    centroids: torch.Tensor
    inertia: float
    iterations: int


def _checked(x, name="x"):
    """Return finite rows (N, D) in fp32 or fp64 on a device that has fp64 to sum in."""
    if not isinstance(x, torch.Tensor) or x.ndim != 2 or 0 in x.shape or x.is_complex():
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a real tensor (N, D) that is not empty, got {got}")
    bad = (~x.isfinite().all(1)).nonzero()[:, 0].tolist()
    if bad:
        rows = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise config.InputError(f"{len(bad)} of {len(x)} rows hold nan or infinity: {rows}; repair or drop them")
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return x.cpu() if x.device.type == "mps" else x


def _checked_weights(weights, x):
    if weights is None:
        return x.new_ones(len(x))
    weights = torch.as_tensor(weights).to(x)
    if weights.shape != x.shape[:1] or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"weights must be {len(x)} finite numbers, none negative, got shape {tuple(weights.shape)}")
    return weights


def _scores(rows, centroids):
    """|c|^2 - 2 x.c of rows (n, D) and every centroid (R, K, D): as (n, R, K), the squared distances less |x|^2."""
    flat = centroids.flatten(0, 1)
    return torch.addmm(flat.square().sum(1), rows, flat.T, alpha=-2).view(-1, *centroids.shape[:2])


def _blocks(x, columns):
    return x.split(max(_TILE // columns, 1))


def _labels(x, centroids):
    """Index (R, N) of the nearest of centroids (R, K, D) for each row, the lowest among equals."""
    columns = centroids[..., 0].numel()
    return torch.cat([_scores(rows, centroids).argmin(2) for rows in _blocks(x, columns)]).T


def _squares(x, centroids, labels):
    """Squared distances (N,) to centroids (K, D) by `labels` (N,)."""
    # From the difference itself: |x|^2 + |c|^2 - 2 x.c has no digits left close to a centroid.
    pairs = zip(_blocks(x, x.shape[1]), _blocks(labels, x.shape[1]), strict=True)
    return torch.cat([(rows - centroids[own]).square().sum(1) for rows, own in pairs])


@torch.no_grad()
def nearest(x, centroids):
    """Find each row's nearest centroid.

    Args:
        x: (N, D) finite real tensor.
        centroids: (K, D), on the same device.

    Returns:
        (N,) int64 labels, the lowest among equals, and (N,) Euclidean distances.

    Raises:
        ValueError: shapes that do not match; `InputError` for rows that are not finite.
    """
    x, centroids = _checked(x), _checked(centroids, "centroids")
    if x.shape[1] != centroids.shape[1]:
        raise ValueError(f"x and centroids must have one width, got {x.shape[1]} and {centroids.shape[1]}")
    mean = x.mean(0)
    x, centroids = x - mean, centroids.to(x) - mean
    labels = _labels(x, centroids[None])[0]
    return labels, _squares(x, centroids, labels).sqrt()


def _seeded(x, weights, k, seed, restarts):
    """Greedy k-means++ centroids (R, K, D), all restarts together (Arthur and Vassilvitskii 2007).

    Each step draws 2 + ln K candidates in proportion to the weighted squared distance, and keeps the best.
    """
    trials = 2 + int(math.log(k))
    draws = augment.uniform(seed, 0, restarts, 0, 1 + (k - 1) * trials)
    draws = torch.from_numpy(draws).to(x.device)  # [R, 1 + (K - 1) T]
    squares, every = x.square().sum(1), torch.arange(len(restarts), device=x.device)

    def sample(mass, u):
        # In integers: their cumulative sum is the same on every run and device; 2**62 leaves room for N terms.
        scale = 2.0**62 / len(x) / mass.amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        cumulative = (mass.double() * scale).long().cumsum(1)
        target = (u * cumulative[:, -1:]).long()
        return torch.searchsorted(cumulative, target, right=True).clamp_(max=len(x) - 1)

    def to_candidates(candidates):  # [R, T] -> [R, T, N]
        flat = candidates.flatten()
        distance = torch.addmm(squares, x[flat], x.T, alpha=-2).add_(squares[flat, None]).clamp_(min=0)
        return distance.view(*candidates.shape, -1)

    chosen = [sample(weights.expand(len(restarts), -1), draws[:, :1])[:, 0]]
    closest = to_candidates(chosen[0][:, None])[:, 0]
    for step in range(k - 1):
        candidates = sample(closest * weights, draws[:, 1 + step * trials : 1 + (step + 1) * trials])
        distance = torch.minimum(to_candidates(candidates), closest[:, None])
        best = (distance @ weights).argmin(1)
        closest = distance[every, best]
        chosen.append(candidates[every, best])
    return x[torch.stack(chosen, 1)]


def _sums(x, weights, labels, k):
    """Weighted sums (R, K, D) and mass (R, K, 1) of the clusters of labels (R, N)."""
    r = len(labels)
    sums, mass = x.new_zeros(r * k, x.shape[1]), x.new_zeros(r * k)
    blocks = (_blocks(t, r * k) for t in (x, weights, labels.T))
    for rows, weight, own in zip(*blocks, strict=True):
        # A product with the memberships adds in a fixed order, unlike atomic additions.
        member = x.new_zeros(len(rows), r, k).scatter_(2, own[..., None], weight[:, None, None].expand(-1, r, 1))
        sums.addmm_(member.flatten(1).T, rows)
        mass += member.flatten(1).sum(0)
    return sums.view(r, k, -1), mass.view(r, k, 1)


def _fill(labels, squares, weights, k):
    """Give each empty cluster the farthest row of a cluster that keeps another one; rows of weight 0 do not count.

    Changes `labels` (N,) in place. Returns the filled clusters and the row each of them took.
    """
    counted = weights > 0
    size = torch.bincount(labels[counted], minlength=k).tolist()
    empty, rows = [c for c in range(k) if size[c] == 0], []
    if empty:
        own = labels.tolist()
        for row in torch.where(counted, squares, -1).argsort(descending=True, stable=True).tolist():
            if size[own[row]] > 1:
                size[own[row]] -= 1
                rows.append(row)
            if len(rows) == len(empty):
                break
        labels[rows] = labels.new_tensor(empty)
    return empty, rows


def _lloyd(x, weights, centroids, spherical, max_iterations, tolerance):
    """Lloyd's iterations from centroids (R, K, D), in place; returns each restart's number of them."""
    k, iterations, active = centroids.shape[1], [0] * len(centroids), list(range(len(centroids)))
    for _ in range(max_iterations):
        old = centroids[active]
        labels = _labels(x, old)
        sums, mass = _sums(x, weights, labels, k)
        empty = (mass == 0).any(1)[:, 0].nonzero()[:, 0].tolist()
        if empty:
            for r in empty:
                _fill(labels[r], _squares(x, old[r], labels[r]), weights, k)
            sums[empty], mass[empty] = _sums(x, weights, labels[empty], k)
        new = F.normalize(sums, dim=2) if spherical else sums / mass
        centroids[active] = new
        for r in active:
            iterations[r] += 1
        shift = (new - old).square().sum((1, 2)).tolist()
        active = [r for r, s in zip(active, shift, strict=True) if s > tolerance]
        if not active:
            break
    return iterations


@torch.no_grad()
def kmeans(x, k, *, seed=0, restarts=10, start=None, weights=None, spherical=False, max_iterations=300, tolerance=1e-4):
    """Cluster rows by k-means: the run of least inertia of `restarts` runs from greedy k-means++ seeds.

    As scikit-learn's `KMeans(n_init=restarts)`, with other random draws. All restarts go through the data together.
    An empty cluster takes the row farthest from its centroid, so that all K have a row in the end, equal rows or not.
    The seeds of a restart depend on (seed, restart) alone: more restarts never give a worse result.

    Args:
        x: (N, D) finite real tensor; below fp32 it is widened to it.
        k: clusters, at most the number of rows whose weight is not 0.
        seed, restarts: of the seeding; without effect where `start` is given.
        start: (K, D) centroids to start from, one run.
        weights: (N,) weight of each row, none negative; 1 by default.
        spherical: cluster by direction: rows and centroids are brought to unit length (Dhillon and Modha 2001).
        max_iterations, tolerance: a run ends at this many, or where the centroids' squared shift is at most
            `tolerance` times the mean variance of the columns.

    Returns:
        KMeans; `inertia` is the weighted sum of squared distances, between unit vectors where `spherical`.

    Raises:
        ValueError: a shape or setting out of range; `InputError` for more clusters than rows or rows not finite.
    """
    x = _checked(x)
    weights = _checked_weights(weights, x)
    usable = int((weights > 0).sum())
    if k < 1 or restarts < 1 or max_iterations < 1 or not tolerance >= 0:
        raise ValueError(
            "k, restarts and max_iterations must be at least 1 and tolerance not negative, "
            f"got {k}, {restarts}, {max_iterations} and {tolerance}"
        )
    if k > usable:
        raise config.InputError(f"{k} clusters need as many rows, got {usable}: lower the number of clusters")
    # Far from the origin |c|^2 - 2 x.c loses its digits; lengths, though, are measured from the origin.
    mean = torch.zeros_like(x[0]) if spherical else x.mean(0)
    x = F.normalize(x) if spherical else x - mean
    tolerance = tolerance * x.var(0, unbiased=False).mean().item()
    if start is None:
        trials = 2 + int(math.log(k))
        together = max(_GROUP // max(trials * len(x), k * x.shape[1]), 1)
        groups = [
            _seeded(x, weights, k, seed, np.arange(first, min(first + together, restarts)))
            for first in range(0, restarts, together)
        ]
    else:
        start = _checked(start, "start").to(x)
        if start.shape != (k, x.shape[1]):
            raise ValueError(f"start must have shape {(k, x.shape[1])}, got {tuple(start.shape)}")
        groups = [(F.normalize(start) if spherical else start - mean)[None]]
    best = None
    for centroids in groups:
        iterations = _lloyd(x, weights, centroids, spherical, max_iterations, tolerance)
        for run, labels, count in zip(centroids, _labels(x, centroids), iterations, strict=True):
            empty, rows = _fill(labels, _squares(x, run, labels), weights, k)
            run[empty] = x[rows]
            inertia = (_squares(x, run, labels).double() @ weights.double()).item()
            if best is None or inertia < best.inertia:
                best = KMeans(labels.contiguous(), run + mean, inertia, count)
    return best
