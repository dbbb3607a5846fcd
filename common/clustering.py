"""Clustering of feature rows.

Everything runs on the rows' device, depends on its arguments alone (no global random state), and
takes no gradient.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import live, metrics
from common.errors import InputError
from common.rng import uniform

_TILE = 1 << 22  # numbers in one block of distances: 16 MB in fp32
_FILTERS = 8  # rounds of the eigenvectors' search
_DEGREE = 10  # of its polynomials
_PLAIN_STEPS = 10  # of Sinkhorn's iteration, before Newton's method takes over
_GROUP = 1 << 27  # numbers that the restarts computed together may hold
LANDMARKS = 12288  # rows that are all compared with each other; of more, a sample stands for all
_FELLOWS = 512  # the same of each cluster, where there are more than LANDMARKS rows in all


class KMeans(NamedTuple):
    """A clustering by k-means.

    Attributes:
        labels: (N,) int64.
        centroids: (K, D).
        inertia: weighted sum of the rows' squared distances to their centroids.
        iterations: of the run that was kept.
    """

    labels: Tensor
    centroids: Tensor
    inertia: float
    iterations: int


def _checked(x: Tensor, name: str = "x") -> Tensor:
    """Return finite rows (N, D) in fp32 or fp64 on a device that has fp64 to sum in."""
    if not isinstance(x, Tensor) or x.ndim != 2 or 0 in x.shape or x.is_complex():
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a real tensor (N, D) that is not empty, got {got}")
    # The sum of rows that are finite may be infinite; otherwise it tells at a tenth of the cost.
    if not x.sum().isfinite() and (bad := (~x.isfinite().all(1)).nonzero()[:, 0].tolist()):
        rows = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InputError(
            f"{len(bad)} of {len(x)} rows hold nan or infinity: {rows}; repair or drop them"
        )
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return x.cpu() if x.device.type == "mps" else x


def _checked_weights(weights: Tensor | Sequence[float] | None, x: Tensor) -> Tensor:
    if weights is None:
        return x.new_ones(len(x))
    weights = torch.as_tensor(weights).to(x)
    if weights.shape != x.shape[:1] or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(
            f"weights must be {len(x)} finite numbers, none negative, got shape"
            f" {tuple(weights.shape)}"
        )
    return weights


def _scores(rows: Tensor, centroids: Tensor) -> Tensor:
    """|c|^2 - 2 x.c, the squared distances less |x|^2: (n, D), (R, K, D) -> (n, R, K)."""
    flat = centroids.flatten(0, 1)
    return torch.addmm(flat.square().sum(1), rows, flat.T, alpha=-2).view(-1, *centroids.shape[:2])


def _blocks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    return x.split(max(_TILE // columns, 1))


def _labels(x: Tensor, centroids: Tensor) -> Tensor:
    """Index (R, N) of the nearest of centroids (R, K, D) for each row, the lowest among equals."""
    columns = centroids[..., 0].numel()
    return torch.cat([_scores(rows, centroids).argmin(2) for rows in _blocks(x, columns)]).T


def _squares(x: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """Squared distances (N,) to centroids (K, D) by `labels` (N,)."""
    # From the difference itself: |x|^2 + |c|^2 - 2 x.c has no digits left close to a centroid.
    blocks = zip(_blocks(x, x.shape[1]), _blocks(labels, x.shape[1]), strict=True)
    return torch.cat([(rows - centroids[clusters]).square().sum(1) for rows, clusters in blocks])


@torch.no_grad()
def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Find each row's nearest centroid.

    Args:
        x: (N, D) finite real tensor.
        centroids: (K, D), on the same device.

    Returns:
        (N,) int64 labels, the lowest among equals, and (N,) Euclidean distances.

    Raises:
        ValueError: shapes that do not match; `InputError` for rows that are not finite.
    """
    x = _checked(x)
    centroids = _checked(centroids, "centroids")
    if x.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"x and centroids must have one width, got {x.shape[1]} and {centroids.shape[1]}"
        )
    mean = x.mean(0)
    x = x - mean
    centroids = centroids.to(x) - mean
    labels = _labels(x, centroids[None])[0]
    return labels, _squares(x, centroids, labels).sqrt()


def landmarks(x: Tensor, count: int) -> Tensor:
    """Up to `count` of the rows x (n, ...): all, or a fixed random sample in their order."""
    if len(x) <= count:
        return x
    sample = np.sort(uniform(0, 3, np.arange(len(x)), 0, 1)[:, 0].argsort()[:count])
    return x[torch.from_numpy(sample).to(x.device)]


def _trials(k: int) -> int:
    return 2 + int(math.log(k))  # candidates a step, as scikit-learn has it


def _seeded(x: Tensor, weights: Tensor, k: int, seed: int, restarts: np.ndarray) -> Tensor:
    """Greedy k-means++ centroids (R, K, D), all restarts together (Arthur and Vassilvitskii 2007).

    Each step draws candidates in proportion to the weighted squared distance, and keeps the best.
    """
    trials = _trials(k)
    draws = uniform(seed, 0, restarts, 0, 1 + (k - 1) * trials)
    draws = torch.from_numpy(draws).to(x.device)  # [R, 1 + (K - 1) T]
    squares = x.square().sum(1)
    all_restarts = torch.arange(len(restarts), device=x.device)

    def sample(mass: Tensor, u: Tensor) -> Tensor:  # [R, N], [R, T] -> [R, T]
        # In integers: their cumulative sum is the same on every run and device; 2**62 leaves room
        # for N terms.
        scale = 2.0**62 / len(x) / mass.amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        cumulative = (mass.double() * scale).long().cumsum(1)
        target = (u * cumulative[:, -1:]).long()
        return torch.searchsorted(cumulative, target, right=True).clamp_(max=len(x) - 1)

    def to_candidates(candidates: Tensor) -> Tensor:  # [R, T] -> [R, T, N]
        flat = candidates.flatten()
        distance = torch.addmm(squares, x[flat], x.T, alpha=-2)
        distance.add_(squares[flat, None]).clamp_(min=0)
        return distance.view(*candidates.shape, -1)

    chosen = [sample(weights.expand(len(restarts), -1), draws[:, :1])[:, 0]]
    closest = to_candidates(chosen[0][:, None])[:, 0]
    for step in range(k - 1):
        step_draws = draws[:, 1 + step * trials : 1 + (step + 1) * trials]
        candidates = sample(closest * weights, step_draws)
        distance = torch.minimum(to_candidates(candidates), closest[:, None])
        best = (distance @ weights).argmin(1)
        closest = distance[all_restarts, best]
        chosen.append(candidates[all_restarts, best])
    return x[torch.stack(chosen, 1)]


def _sums(x: Tensor, weights: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted sums (R, K, D) and mass (R, K, 1) of the clusters of labels (R, N)."""
    r = len(labels)
    sums = x.new_zeros(r * k, x.shape[1])
    mass = x.new_zeros(r * k)
    blocks = (_blocks(t, r * k) for t in (x, weights, labels.T))
    for rows, weight, clusters in zip(*blocks, strict=True):
        # A product with the memberships adds in a fixed order, unlike atomic additions.
        member = x.new_zeros(len(rows), r, k)
        member.scatter_(2, clusters[..., None], weight[:, None, None].expand(-1, r, 1))
        sums.addmm_(member.flatten(1).T, rows)
        mass += member.flatten(1).sum(0)
    return sums.view(r, k, -1), mass.view(r, k, 1)


def _fill(
    labels: Tensor, squares: Tensor, weights: Tensor, k: int, above: float = -1.0
) -> tuple[list[int], list[int]]:
    """Give each empty cluster the farthest row of a cluster that keeps another one.

    Rows of weight 0 do not count, and none is taken whose squared distance is not `above` that.
    Changes `labels` (N,) in place. Returns the filled clusters and the row each of them took.
    """
    counted = weights > 0
    size = torch.bincount(labels[counted], minlength=k).tolist()
    empty = [cluster for cluster in range(k) if size[cluster] == 0]
    rows = []
    if empty:
        clusters = labels.tolist()
        squares = torch.where(counted, squares, -1)
        farthest = squares.argsort(descending=True, stable=True)
        for row in farthest[: int((squares > above).sum())].tolist():
            if size[clusters[row]] > 1:
                size[clusters[row]] -= 1
                rows.append(row)
            if len(rows) == len(empty):
                break
        empty = empty[: len(rows)]
        labels[rows] = labels.new_tensor(empty)
    return empty, rows


def _lloyd(
    x: Tensor,
    weights: Tensor,
    centroids: Tensor,
    spherical: bool,
    max_iterations: int,
    tolerance: float,
) -> list[int]:
    """Lloyd's iterations from centroids (R, K, D), in place; returns how many each restart took."""
    k = centroids.shape[1]
    iterations = [0] * len(centroids)
    active = list(range(len(centroids)))
    for _ in live.progress(range(max_iterations), "k-means, iterations"):
        old = centroids[active]
        labels = _labels(x, old)
        sums, mass = _sums(x, weights, labels, k)
        empty = (mass == 0).any(1)[:, 0].nonzero()[:, 0].tolist()
        if empty:
            for r in empty:
                # Rows at their centroid fill nothing: among equal rows that would go on for ever.
                _fill(labels[r], _squares(x, old[r], labels[r]), weights, k, tolerance)
            sums[empty], mass[empty] = _sums(x, weights, labels[empty], k)
        new = F.normalize(sums, dim=2) if spherical else sums / mass
        new = torch.where(mass > 0, new, old)
        centroids[active] = new
        for r in active:
            iterations[r] += 1
        shift = (new - old).square().sum((1, 2)).tolist()
        active = [r for r, s in zip(active, shift, strict=True) if s > tolerance]
        if not active:
            break
    return iterations


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    *,
    seed: int = 0,
    restarts: int = 10,
    start: Tensor | None = None,
    weights: Tensor | Sequence[float] | None = None,
    spherical: bool = False,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
) -> KMeans:
    """Cluster rows by k-means: of several runs from greedy k-means++ seeds that of least inertia.

    As scikit-learn's `KMeans(n_init=restarts)`, with other random draws. All restarts go through
    the data together. An empty cluster takes the row farthest from its centroid, so that all K have
    a row in the end, equal rows or not. The seeds of a restart depend on (seed, restart) alone:
    more restarts never give a worse result.

    Args:
        x: (N, D) finite real tensor; below fp32 it is widened to it.
        k: clusters, at most the number of rows whose weight is not 0.
        seed, restarts: of the seeding; without effect where `start` is given.
        start: (K, D) centroids to start from, one run.
        weights: (N,) weight of each row, none negative; 1 by default.
        spherical: cluster by direction: rows and centroids are brought to unit length (Dhillon and
            Modha 2001).
        max_iterations, tolerance: a run ends at this many, or where the centroids' squared shift is
            at most `tolerance` times the mean variance of the columns.

    Returns:
        KMeans; `inertia` is the weighted sum of squared distances, between unit vectors where
        `spherical`.

    Raises:
        ValueError: a shape or setting out of range; `InputError` for more clusters than rows or
            rows not finite.
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
        raise InputError(
            f"{k} clusters need as many rows, got {usable}: lower the number of clusters"
        )
    # Far from the origin |c|^2 - 2 x.c loses its digits; lengths, though, are measured from the
    # origin.
    mean = torch.zeros_like(x[0]) if spherical else x.mean(0)
    x = F.normalize(x) if spherical else x - mean
    tolerance = tolerance * x.var(0, unbiased=False).mean().item()
    if start is None:
        together = max(_GROUP // max(_trials(k) * len(x), k * x.shape[1]), 1)
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


@torch.no_grad()
def neighbors(x: Tensor, count: int) -> Tensor:
    """Find each row's nearest rows.

    Args:
        x: (N, D) finite real tensor.
        count: how many, the row itself among them; above N, all.

    Returns:
        (N, count) int64 indices, the nearest first.

    Raises:
        ValueError: a shape or setting out of range; `InputError` for rows that are not finite.
    """
    x = _checked(x)
    if count < 1:
        raise ValueError(f"count must be at least 1, the row itself, got {count}")
    x = x - x.mean(0)
    n = len(x)
    near = torch.empty(n, min(count, n), dtype=torch.int64, device=x.device)
    for rows, found in zip(_blocks(x, n), near.split(max(_TILE // n, 1)), strict=True):
        # Into what is there: small tensors that stay would pin the blocks of scores.
        found.copy_(_scores(rows, x[None])[:, 0].topk(near.shape[1], 1, largest=False).indices)
    return near


@torch.no_grad()
def smooth(x: Tensor, near: Tensor) -> Tensor:
    """Average each of the rows x (N, D) with its rows `near` (N, C), of `neighbors`.

    Touching clusters part, stray rows move into them: one step of the blurring mean shift (Cheng
    1995) with the nearest rows for a window.
    """
    x = _checked(x)
    mean = x.mean(0)
    # An embedding bag averages rows without gathering them first.
    return F.embedding_bag(near, x - mean, mode="mean").add_(mean)


@torch.no_grad()
def spectral(near: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Cluster rows by cuts of the graph of their nearest neighbors.

    Normalized spectral clustering (Ng, Jordan and Weiss 2001): an edge of weight 2 where two rows
    are each among the other's nearest, of 1 where one is; k-means of the leading eigenvectors'
    rows at unit length. Unlike k-means of the rows it does not split a large cluster to make all
    alike.

    Args:
        near: (N, C) the rows' nearest, themselves among them, of `neighbors`.
        k: clusters, at most N.
        seed: of k-means and of where the eigenvectors are looked for from.

    Returns:
        (N,) int64 labels; each of the k clusters has a row.

    Raises:
        ValueError: less than 2 neighbors; `InputError` for more clusters than rows.
    """
    n, count = near.shape
    if count < min(n, 2):
        raise ValueError(f"near must have 2 columns, the row itself and one, got {count}")
    start = torch.arange(n).repeat_interleave(count)
    end = near.flatten().cpu()
    edges, times = torch.unique(torch.cat([start * n + end, end * n + start]), return_counts=True)
    start, end = edges // n, edges % n
    degree = torch.bincount(start, times.double())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        graph = torch.sparse_csr_tensor(
            torch.searchsorted(start, torch.arange(n + 1)),
            end,
            times / (degree[start] * degree[end]).sqrt(),
            size=(n, n),
            check_invariants=False,
        )
    leading = F.normalize(_leading_eigenvectors(graph, k, seed)).float()
    return kmeans(leading.to(near.device), k, seed=seed, restarts=5).labels


def _leading_eigenvectors(matrix: Tensor, count: int, seed: int) -> Tensor:
    """(N, c) of a symmetric matrix (N, N) with eigenvalues in [-1, 1], the largest first.

    Subspace iteration, filtered by Chebyshev polynomials that grow above what the subspace has
    found (Zhou, Saad, Tiago and Chelikowsky 2006).
    """
    n = len(matrix)
    generator = torch.Generator().manual_seed(seed)
    size = (n, min(count + 10, n))
    block = torch.linalg.qr(torch.randn(size, generator=generator, dtype=torch.float64))[0]
    cut = 0.0  # eigenvalues in [-1, cut] are damped
    for _ in range(_FILTERS):
        center, radius = (cut - 1) / 2, (cut + 1) / 2
        before, now = block, (matrix @ block - center * block) / radius
        for _ in range(_DEGREE - 1):
            before, now = now, 2 * (matrix @ now - center * now) / radius - before
        block = torch.linalg.qr(now)[0]
        values, turn = torch.linalg.eigh(block.T @ (matrix @ block))
        block = block @ turn.flip(1)
        cut = min(max(values[0].item(), 0.0), 0.99)
    return block[:, :count]


class Assignment(NamedTuple):
    """Pseudo-labels by transport.

    Attributes:
        plan: (N, K), the mass that each row sends to each cluster; a whole row is 1/N.
        labels: (N,) int64, the cluster that gets most of the row.
        weights: (N,) in [0, 1], N times the mass it gets.
    """

    plan: Tensor
    labels: Tensor
    weights: Tensor


def relative_costs(x: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances over their mean, so that an `epsilon` means the same for all features.

    Args:
        x: (N, D) finite real tensor.
        centroids: (K, D).

    Returns:
        (N, K) fp64 of mean 1.

    Raises:
        ValueError: a shape out of range; `InputError` for rows that are not finite.
    """
    x = _checked(x).double()
    centroids = _checked(centroids, "centroids").double()
    mean = x.mean(0)
    x = x - mean
    centroids = centroids.to(x.device) - mean
    cost = (_scores(x, centroids[None])[:, 0] + x.square().sum(1, keepdim=True)).clamp(min=0)
    return cost / cost.mean().clamp(min=torch.finfo(cost.dtype).tiny)


def _checked_costs(
    cost: Tensor, sizes: Tensor | Sequence[float] | None, epsilon: float, iterations: int
) -> tuple[Tensor, Tensor]:
    cost = _checked(cost, "cost").double()
    k = cost.shape[1]
    sizes = cost.new_ones(k) if sizes is None else torch.as_tensor(sizes).to(cost)
    if sizes.shape != (k,) or not (sizes.isfinite() & (sizes > 0)).all():
        raise ValueError(f"sizes must be {k} positive numbers, got {sizes.tolist()}")
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon and iterations must be positive, got {epsilon} and {iterations}")
    return cost, sizes / sizes.sum()


def _scaled(
    kernel: Tensor, columns: Tensor, power: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """Scale exp(kernel) (N, M) to rows of 1/N and, damped by `power` (M,), to the columns' mass.

    All in logarithms.
    """
    n = len(kernel)

    def sinkhorn_step(g: Tensor) -> Tensor:
        log_mass = (kernel + g).log_softmax(1).logsumexp(0)
        return power * (columns.log() - log_mass + math.log(n) + g) - g

    g = torch.zeros_like(columns)
    step = sinkhorn_step(g)
    for done in range(iterations):
        if step.abs().max() <= tolerance:
            break
        # Sinkhorn's steps shrink like powers of power * transition, at a small epsilon hardly at
        # all: sum the series.
        if done >= _PLAIN_STEPS:
            plan = (kernel + g).softmax(1)
            mass = plan.sum(0).clamp(min=torch.finfo(plan.dtype).tiny)
            transition = plan.T @ plan / mass[:, None]
            eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
            newton = g + torch.linalg.pinv(eye - power[:, None] * transition, rtol=1e-12) @ step
            newton_step = sinkhorn_step(newton)
            if newton_step.abs().max() < step.abs().max():
                g = newton
                step = newton_step
                continue
        g = g + step
        step = sinkhorn_step(g)
    # The rows last: every row's mass is exact, the columns' to the tolerance.
    return (kernel + g).softmax(1) / n


def _hardened(plan: Tensor) -> Assignment:
    weights, labels = plan.max(1)
    return Assignment(plan, labels, (weights * len(plan)).clamp_(max=1))


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    *,
    sizes: Tensor | Sequence[float] | None = None,
    epsilon: float = 0.05,
    iterations: int = 1000,
    tolerance: float = 1e-7,
) -> Assignment:
    """Assign rows to clusters of given sizes by entropic optimal transport, as SeLa and SwAV do.

    Minimizes <plan, cost> - epsilon * entropy(plan) over plans whose rows sum to 1/N and whose
    columns sum to the sizes (Cuturi 2013; Asano et al. 2020, arXiv:1911.05371; Caron et al. 2020,
    arXiv:2006.09882, with cost = -score and 3 iterations). In logarithms, so no epsilon under- or
    overflows; Newton's method speeds up the last digits.

    Args:
        cost: (N, K) finite real tensor; -log p, or `relative_costs`.
        sizes: (K,) positive, the clusters' shares up to a factor; equal by default.
        epsilon: the smaller, the harder the plan and the slower; in the unit of `cost`.
        iterations, tolerance: stops at this many, or where no column's mass is off by more than
            this relative part.

    Returns:
        Assignment, fp64.

    Raises:
        ValueError: a shape or setting out of range; `InputError` for costs that are not finite.
    """
    cost, sizes = _checked_costs(cost, sizes, epsilon, iterations)
    return _hardened(_scaled(-cost / epsilon, sizes, torch.ones_like(sizes), iterations, tolerance))


@torch.no_grad()
def partial_transport(
    cost: Tensor,
    mass: float,
    *,
    sizes: Tensor | Sequence[float] | None = None,
    relax: float = 1.0,
    epsilon: float = 0.05,
    iterations: int = 1000,
    tolerance: float = 1e-7,
) -> Assignment:
    """Assign a share of the rows' mass, cheapest first, to clusters of about the given sizes.

    The step of progressive partial optimal transport (Zhang et al. 2024, arXiv:2401.09266 and
    2404.03446). Minimizes

        <plan, cost> - epsilon * entropy + relax * KL(columns | mass * sizes)

    over plans whose rows sum to at most 1/N and which transport `mass` in all. What is left goes to
    an extra column of cost 0; it is fixed at 1 - mass, so its cost does not matter. Growing `mass`
    over the epochs takes the sure rows first. The KL term, unlike an equality, lets the data make
    clusters unequal.

    Args:
        cost, sizes, epsilon, iterations, tolerance: as in `sinkhorn`.
        mass: the share, in (0, 1].
        relax: weight of the KL term: 0 leaves the sizes free, inf makes them equalities.

    Returns:
        Assignment, fp64; rows left out have weights near 0.

    Raises:
        ValueError: as in `sinkhorn`.
    """
    cost, sizes = _checked_costs(cost, sizes, epsilon, iterations)
    if not 0 < mass <= 1 or not relax >= 0:
        raise ValueError(f"mass must lie in (0, 1] and relax be at least 0, got {mass} and {relax}")
    kernel = -cost / epsilon
    columns = mass * sizes
    power = torch.full_like(sizes, 1.0 if relax == math.inf else relax / (relax + epsilon))
    if mass < 1:
        kernel = torch.cat([kernel, kernel.new_zeros(len(kernel), 1)], 1)
        columns = torch.cat([columns, columns.new_tensor([1 - mass])])
        power = torch.cat([power, power.new_ones(1)])
    return _hardened(_scaled(kernel, columns, power, iterations, tolerance)[:, : len(sizes)])


class Selection(NamedTuple):
    """Rows of high quality, an entry a cluster.

    Attributes:
        indices: (m,) int64, ascending.
        fractions: the neighborhood's share of the cluster; None where there was nothing to choose:
            an empty cluster, or one that is taken whole.
    """

    indices: list[Tensor]
    fractions: list[float | None]


FRACTIONS = tuple(percent / 100 for percent in range(10, 32, 2))


@torch.no_grad()
def select(
    x: Tensor,
    labels: Tensor | Sequence[int] | np.ndarray,
    k: int,
    share: float,
    *,
    floor: int = 1,
    direction: str = "largest",
    umc: bool = False,
) -> Selection:
    """Select the densest rows of each cluster, as UMC does (Zhang et al. 2024, arXiv:2405.12775).

    Of a cluster's n rows m = max(floor(share * n), floor, 1) are taken, at most n. For each q of
    FRACTIONS a row's density is one over the mean distance to its max(floor(q * n), 1) nearest
    rows, and the candidates are the m densest. The q is kept whose candidates have the largest or
    the smallest mean distance to their nearest fellow candidate; the lowest q, and the lowest
    index, among equals. One distance matrix and one sort serve all q. With more than LANDMARKS rows
    a density is that among at most `_FELLOWS` of the cluster's rows, a fixed sample of it.

    Args:
        x: (N, D) finite real tensor.
        labels: (N,) integers in [0, k).
        share: in (0, 1].
        floor: minimum of rows per cluster.
        direction: "largest" (spread out; UMC's code) or "smallest" (compact).
        umc: take the whole cluster where m is 1, as UMC's code does.

    Returns:
        Selection, k entries each.

    Raises:
        ValueError: a shape or setting out of range; `InputError` for rows that are not finite.
    """
    x = _checked(x)
    labels = torch.as_tensor(labels).to(x.device)
    if labels.shape != x.shape[:1] or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"labels must be {len(x)} integers, got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= k:
        raise ValueError(f"labels must lie in [0, {k}), got {labels.min()} to {labels.max()}")
    if not 0 < share <= 1 or floor < 0 or direction not in ("largest", "smallest"):
        raise ValueError(
            "share must lie in (0, 1], floor be at least 0 and direction be largest or smallest, "
            f"got {share}, {floor} and {direction}"
        )
    fellows = len(x) if len(x) <= LANDMARKS else _FELLOWS
    indices = []
    fractions = []
    for cluster in range(k):
        rows = (labels == cluster).nonzero()[:, 0]
        # A product such as 0.29 * 100 falls short of its whole number by rounding.
        m = min(max(int(share * len(rows) + 1e-9), floor, 1), len(rows))
        if m == len(rows) or (umc and m == 1):
            indices.append(rows)
            fractions.append(None)
            continue
        taken, fraction = _densest(x[rows], m, direction, fellows)
        indices.append(rows[taken])
        fractions.append(fraction)
    return Selection(indices, fractions)


def _densest(x: Tensor, m: int, direction: str, fellows: int) -> tuple[Tensor, float]:
    """Indices of the m densest of rows (n, D), ascending, and which of FRACTIONS gave them.

    Densities, and distances between candidates, are those among at most `fellows` of the rows.
    """
    n = len(x)
    # In fp64: equal rows, frequent among short utterances, must come out at distance 0.
    x = x.double() - x.double().mean(0)
    squares = x.square().sum(1)
    everyone = torch.arange(n, device=x.device)
    others = landmarks(everyone, fellows)
    count = len(others)

    def distances(rows: Tensor) -> Tensor:
        block = torch.addmm(squares[rows, None] + squares[others], x[rows], x[others].T, alpha=-2)
        block.clamp_(min=0).sqrt_()
        # A row is no neighbor of its own.
        return block.masked_fill_(rows[:, None] == others, torch.inf)

    parts = everyone.split(max(_TILE // count, 1))
    # Beyond what fits, blocks are computed twice instead of kept.
    kept = [distances(rows) for rows in parts] if n * n <= _GROUP and count == n else None
    sizes = [max(round(q * 100) * count // 100, 1) for q in FRACTIONS]
    sizes = torch.tensor(sizes, device=x.device)
    reach = []
    for i, rows in enumerate(parts):
        block = distances(rows) if kept is None else kept[i]
        near = block.topk(int(sizes[-1]), largest=False).values
        reach.append(near.cumsum(1)[:, sizes - 1] / sizes)
    order = torch.cat(reach).argsort(dim=0, stable=True)[:m]  # [m, q]
    chosen = torch.zeros(n, len(FRACTIONS), dtype=torch.bool, device=x.device)
    chosen.scatter_(0, order, True)
    scores = x.new_zeros(len(FRACTIONS))
    for i, rows in enumerate(others.split(max(_TILE // count, 1))):
        block = distances(rows) if kept is None else kept[i]
        for q, candidate in enumerate(chosen.T):
            if candidate[others].sum() > 1:
                scores[q] += block[candidate[rows]][:, candidate[others]].amin(1).sum()
    best = int(scores.argmax() if direction == "largest" else scores.argmin())
    return chosen[:, best].nonzero()[:, 0], FRACTIONS[best]


class Estimate(NamedTuple):
    """An estimated number of clusters.

    Attributes:
        k: the number.
        table: what it was read from, one dict of figures a candidate.
    """

    k: int
    table: list[dict[str, float | None]]


@torch.no_grad()
def estimate_k(
    x: Tensor,
    candidates: Iterable[int] = range(2, 31),
    *,
    seed: int = 0,
    references: int = 5,
    max_rows: int = 4000,
    max_columns: int = 64,
) -> Estimate:
    """Estimate the number of clusters without labels, by the gap statistic.

    Tibshirani, Walther and Hastie 2001. The gap is how much smaller the log of inertia over
    variance is than on references without clusters: here Gaussian rows of the data's own
    covariance, so that long axes are not taken for clusters. It finds small clusters beside large
    ones, where the mean silhouette stops at the large ones. The answer is the candidate of the
    largest gap; of the paper's rule, the smallest one within an error of the next, small clusters
    would fall victim. It is the first candidate where the largest gap is within three errors of 0,
    the gap of one cluster.

    Args:
        x: (N, D) finite real tensor.
        candidates: numbers of clusters, at least 1; those above half the rows looked at are left
            out.
        seed: of the rows looked at, the references and the seeding.
        references: data sets without clusters, at least 2.
        max_rows, max_columns: looked at are at most so many rows, on so many principal axes.

    Returns:
        Estimate; the table's columns are k, inertia, gap, error (one standard error) and silhouette
        (None for k = 1). A `k` that is the last candidate says that the rows go on falling apart
        and that the data gives no number.

    Raises:
        ValueError: a setting out of range or no usable candidate; `InputError` for rows that are
            not finite.
    """
    x = _checked(x)
    if min(references, max_rows) < 2 or max_columns < 1:
        raise ValueError(
            "references and max_rows must be at least 2 and max_columns at least 1, "
            f"got {references}, {max_rows} and {max_columns}"
        )
    if len(x) > max_rows:
        x = x[uniform(seed, 1, np.arange(len(x)), 0, 1)[:, 0].argsort()[:max_rows]]
    candidates = sorted({int(k) for k in candidates if k <= len(x) // 2})
    if not candidates or candidates[0] < 1:
        raise ValueError(
            f"candidates must lie between 1 and half of {len(x)} rows, got {candidates}"
        )
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.double().T @ x.double()).eigenvectors.flip(1)[:, :max_columns]
    x = x @ axes.to(x.dtype)
    spread = x.std(0)
    unclustered = []
    for i in range(references):
        u = torch.from_numpy(uniform(seed, 2, np.arange(len(x)), i, x.shape[1]))
        unclustered.append(torch.special.ndtri(u + 2.0**-54).to(x) * spread)

    def log_share(rows: Tensor, inertia: float) -> float:
        share = inertia / rows.var(0, unbiased=False).sum().item() / len(rows)
        return math.log(max(share, torch.finfo(x.dtype).tiny))

    table = []
    for k in live.progress(candidates, "estimating the number of clusters", len(candidates)):
        clusters = kmeans(x, k, seed=seed, restarts=5)
        expected = np.array(
            [
                log_share(rows, kmeans(rows, k, seed=seed, restarts=1).inertia)
                for rows in unclustered
            ]
        )
        labels = clusters.labels[:2000]  # as many as a silhouette is worth
        several = 1 < len(labels.unique()) < len(labels)
        table.append(
            {
                "k": k,
                "inertia": clusters.inertia,
                "gap": float(expected.mean() - log_share(x, clusters.inertia)),
                "error": float(expected.std() * math.sqrt(1 + 1 / references)),
                "silhouette": metrics.silhouette(x[: len(labels)], labels) if several else None,
            }
        )
    best = max(table, key=lambda row: row["gap"])
    # With one cluster the gap is 0: less than three errors above it, a sample of one Gaussian can
    # come by chance.
    if not best["gap"] > 3 * best["error"]:
        best = table[0]
    return Estimate(best["k"], table)
