"""Fusion of modalities into one embedding, with a linear path of its own.

UMC: Zhang et al. 2024, arXiv:2405.12775.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import clustering, metrics
from common.errors import InputError
from common.models.text import krylov_svd

HEADS = 8
CANONICAL = 100  # principal axes of an encoding that are compared with another one's
WIDE = 2048  # columns from which on only the axes that are asked for are looked for
# Of k-means in a metric that follows it.
STARTS = 3
ROUNDS = 10


class Fusion(nn.Module):
    """Modalities of an utterance to z (n, base_dim) and h (n, base_dim).

    z is clustered, h is what losses compare. Each modality is projected to base_dim; a sequence
    also goes through one causal transformer layer, and the state at its last step stands for it.
    With t, v, ... these vectors: z = W_f dropout(gelu([t; v; ...])) and h = W_h dropout(relu(z)) of
    unit length. Given a `basis`, the modalities are scaled by it, its coordinates are added to z,
    W_f starts at zero, and h is z of unit length: training starts from the coordinates, not from a
    random map.

    Args:
        widths: name -> D of each modality, in their order.
        sequences: names of those that come as (n, L, D) with lengths.
        base_dim: width of z, a multiple of HEADS.
        k: clusters.
        dropout: before both linear maps.
        padded_last: take a sequence's state at the last step of the data, padding or not, as UMC's
            code does, instead of at its own last step.
        basis: None, or name -> (mean (D,), scale (D,), axes (D, C)) as `weighted_basis` gives it.

    Two buffers are there to be set: `metric` (base_dim, base_dim), by which z is multiplied before
    it is clustered, at first the identity, and the `centroids` (k, base_dim) found there.
    """

    def __init__(
        self,
        widths,
        sequences,
        base_dim: int,
        k: int,
        *,
        dropout: float,
        padded_last: bool,
        basis=None,
    ):
        super().__init__()
        self.names = list(widths)
        self.sequences = set(sequences)
        self.padded_last = padded_last
        self.project = nn.ModuleDict(
            {name: nn.Linear(width, base_dim) for name, width in widths.items()}
        )
        self.temporal = nn.ModuleDict()
        for name in self.names:
            if name in self.sequences:
                self.temporal[name] = nn.TransformerEncoderLayer(
                    base_dim, HEADS, 4 * base_dim, dropout=0.0, batch_first=True
                )
        self.dropout = nn.Dropout(dropout)
        self.fuse = nn.Linear(base_dim * len(widths), base_dim)
        self.register_buffer("metric", torch.eye(base_dim))
        self.register_buffer("centroids", torch.zeros(k, base_dim))
        self.linear_path = basis is not None
        if not self.linear_path:
            self.head = nn.Linear(base_dim, base_dim)
            return
        nn.init.zeros_(self.fuse.weight)
        nn.init.zeros_(self.fuse.bias)
        start = 0
        for name in self.names:
            mean, scale, axes = basis[name]
            padded = torch.zeros(len(axes), base_dim)
            padded[:, start : start + axes.shape[1]] = axes
            start += axes.shape[1]
            self.register_buffer(f"mean_{name}", mean.float())
            self.register_buffer(f"scale_{name}", scale.float())
            self.register_buffer(f"axes_{name}", padded.float())

    def forward(
        self, inputs: dict[str, Tensor], lengths: dict[str, Tensor], keep: Tensor | None = None
    ):
        """z and h of `inputs`, name -> (n, D) or (n, L, D) with `lengths` (n,).

        Where `keep` (n, modalities) is 0, or a sequence's length, a modality's part is zero.
        """
        parts = []
        path = 0.0
        for i, name in enumerate(self.names):
            x = inputs[name]
            kept = 1.0 if keep is None else keep[:, i, None]
            if name in self.sequences:
                kept = kept * (lengths[name] > 0)[:, None]
            if self.linear_path:
                x = (x - self.get_buffer(f"mean_{name}")) / self.get_buffer(f"scale_{name}")
                pooled = pool(x, lengths[name]) if name in self.sequences else x
                path = path + kept * (pooled @ self.get_buffer(f"axes_{name}"))
            state = self.project[name](x)
            if name in self.sequences:
                causal = nn.Transformer.generate_square_subsequent_mask(
                    x.shape[1], device=x.device, dtype=state.dtype
                )
                state = self.temporal[name](state, src_mask=causal, is_causal=True)
                ends = lengths[name]
                if self.padded_last:
                    ends = torch.full_like(ends, x.shape[1])
                state = state[torch.arange(len(x), device=x.device), ends - 1]
            parts.append(kept * state)
        z = path + self.fuse(self.dropout(F.gelu(torch.cat(parts, 1))))
        h = z if self.linear_path else self.head(self.dropout(F.relu(z)))
        return z, F.normalize(h.float(), dim=1)


def pool(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean (n, D) of the first `lengths` (n,) steps of sequences (n, L, D)."""
    mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return (x * mask[..., None]).sum(1) / lengths.clamp(min=1)[:, None]


def coordinates(x: Tensor, mean: Tensor, scale: Tensor, axes: Tensor) -> Tensor:
    """(n, C): rows x (n, D) on the axes of one modality of a basis."""
    return (x - mean) / scale @ axes


def weighted_basis(
    rows: dict[str, Tensor],
    as_is,
    anchor: str | None,
    k: int,
    components: int,
    seed: int,
    *,
    peers=frozenset(),
    pair: tuple[str, str] | None = None,
):
    """Principal axes of each modality, with a weight that no label decides.

    Columns are centered and brought to unit variance, but for the modalities `as_is`, whose scales
    mean something. The coordinates along the `components` largest axes have a total variance of 1,
    times the square of the weight: 1 for the anchor, and for another modality the agreement of
    k-means on it with k-means on the anchor (adjusted mutual information): what shares nothing with
    the anchor's clusters cannot drown them.

    Args:
        rows: name -> (n, D).
        anchor: its name; None: the modality whose agreement with the others is largest in all.
        peers: names of further encodings of what the anchor encodes; their weight is 1, too.
        pair: two of them that get the `canonical_axes` of each other instead of principal axes.

    Returns:
        The basis, name -> (mean (D,), scale (D,), axes (D, C)); the weights by name; the anchor's
        name.

    Raises:
        InputError: all rows of a modality are equal.
    """
    basis = {}
    clusters = {}
    scaled = {}
    for name, x in rows.items():
        x = x.double()
        mean = x.mean(0)
        spread = x.std(0, unbiased=False)
        # A constant column stays zero.
        largest = torch.maximum(x.amax(0), -x.amin(0))
        scale = torch.where(spread > 1e-7 * largest, spread, torch.inf)
        if scale.isinf().all():
            raise InputError(
                f"modality {name} is the same for all training utterances:"
                " leave it out with --modalities"
            )
        if name in as_is:
            scale = torch.full_like(spread, spread.square().sum().sqrt().item())
        x = x - mean
        x /= scale
        if pair and name in pair:
            scaled[name] = x
        values, vectors = _largest_axes(x, components)
        axes = vectors[:, values > 1e-9 * values[0]] / values.clamp(min=0).sum().sqrt()
        basis[name] = mean, scale, axes
        if len(rows) > 1:
            clusters[name] = clustering.kmeans((x @ axes).float(), k, seed=seed).labels.cpu()
    if pair:
        both = canonical_axes(*(scaled[name] for name in pair), components)
        for name, axes in zip(pair, both, strict=True):
            basis[name] = *basis[name][:2], axes
    agreement = {name: {} for name in rows}
    for a in rows:
        for b in rows:
            if a != b:
                agreement[a][b] = max(metrics.clustering(clusters[a], clusters[b])["ami"], 0.0)
    anchor = anchor or max(agreement, key=lambda name: sum(agreement[name].values()))
    weights = {
        name: 1.0 if name == anchor or name in peers else agreement[anchor][name] for name in rows
    }
    weighted = {
        name: (mean, scale, weights[name] * axes) for name, (mean, scale, axes) in basis.items()
    }
    return weighted, weights, anchor


def _largest_axes(x: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Variances (c,) and principal axes (D, c) of centered rows x (n, D), the largest first."""
    if x.shape[1] <= WIDE:
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        return values.flip(0)[:components], vectors.flip(1)[:, :components]
    axes, singular = krylov_svd(x.T, x, components)
    return singular.square() / len(x), axes


def canonical_axes(x: Tensor, y: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """The axes (D, c) and (E, c) along which two encodings x (n, D) and y (n, E) of centered rows
    tell the same, at most CANONICAL of each looked at.

    Regularized canonical correlation analysis (Vinod 1976): the variance of each principal axis is
    raised by their mean, so that small axes, where two encodings agree by chance, count less.
    Coordinates have the square of the correlation as their weight, and together a variance of 2,
    that of two modalities.
    """
    whitened = []
    for rows in (x, y):
        values, vectors = _largest_axes(rows, CANONICAL)
        whitened.append(vectors / (values + values.mean()).clamp(min=1e-30).sqrt())
    a, b = whitened
    u, correlation, vt = torch.linalg.svd((x @ a).T @ (y @ b) / len(x), full_matrices=False)
    weights = correlation[:components].square()
    a = a @ u[:, : len(weights)] * weights
    b = b @ vt[: len(weights)].T * weights
    spread = sum((rows @ axes).square().sum() for rows, axes in ((x, a), (y, b))) / len(x)
    scale = (2 / spread.clamp(min=1e-30)).sqrt()
    return a * scale, b * scale


def leading_axes(z: Tensor) -> Tensor:
    """The principal axes (d, c) of rows z (n, d), without those of next to no variance."""
    z = clustering.landmarks(z, clustering.LANDMARKS)
    values, axes = torch.linalg.eigh(torch.cov(z.double().T).reshape(z.shape[1], -1))
    kept = values > 1e-6 * values[-1]
    kept[-1] = True  # also where all rows are equal
    return axes[:, kept].to(z.dtype)


def discriminant(z: Tensor, labels: Tensor, shrinkage: float) -> tuple[Tensor, float]:
    """A metric (D, D) for rows z (n, D), and the likelihood of their clusters.

    Directions in which rows scatter within clusters count less. It is the inverse root of S +
    shrinkage * tr(S^2) / tr(S), S the covariance within clusters (as in adaptive dimension
    reduction by discriminants and k-means, Ding and Li 2007), and keeps the total variance of z.
    With it comes the mean log-likelihood of the clusters as normal distributions of that one
    covariance, up to a constant.
    """
    x = z.double()
    member = F.one_hot(labels).double()
    sizes = member.sum(0).clamp(min=1)
    within = x - (member.T @ x / sizes[:, None])[labels]
    values, vectors = torch.linalg.eigh(within.T @ within / len(x))
    values = values.clamp(min=0)
    values = values + shrinkage * values.square().sum() / values.sum().clamp(min=1e-30) + 1e-30
    metric = (vectors / values.sqrt()) @ vectors.T
    share = sizes / len(x)
    distance = (within @ metric).square().sum(1).mean()
    likelihood = share @ share.log() - values.log().sum() / 2 - distance / 2
    scale = (x.var(0).sum() / (x @ metric).var(0).sum().clamp(min=1e-30)).sqrt()
    return (metric * scale).to(z.dtype), likelihood.item()


def discriminant_kmeans(
    z: Tensor, k: int, shrinkage: float, seed: int, metric: Tensor, centroids: Tensor | None
):
    """K-means and `discriminant` in turn on rows z (n, D).

    Two rounds from `centroids` (k, D) in `metric` (D, D). Without centroids, the best of STARTS
    starts by the likelihood, each of ROUNDS rounds or until no label changes. Returns the KMeans
    and its metric.
    """
    # On the principal axes: where training moves little most of the columns are empty.
    axes = leading_axes(z)
    x = z @ axes
    y = z @ metric
    axes_before = leading_axes(y)
    y = y @ axes_before
    if centroids is not None:
        centroids = centroids.to(y) @ axes_before
    best_likelihood = -torch.inf
    best_labels = best_metric = None
    for start in range(STARTS if centroids is None else 1):
        # Seeds of their own: runs of neighboring --seed must not share their starts.
        result = clustering.kmeans(
            y,
            k,
            seed=STARTS * seed + start,
            restarts=5,  # a single one too often leaves two clusters in one
            start=centroids,
            max_iterations=20,
        )
        for _ in range(ROUNDS if centroids is None else 2):
            labels = result.labels
            round_metric, likelihood = discriminant(x, labels, shrinkage)
            turned = x @ round_metric
            result = clustering.kmeans(turned, k, start=_means(turned, labels, k), max_iterations=5)
            if torch.equal(result.labels, labels):
                break
        if best_labels is None or likelihood > best_likelihood:
            best_likelihood = likelihood
            best_labels = result.labels
            best_metric = round_metric
    turned = x @ best_metric
    result = clustering.kmeans(turned, k, start=_means(turned, best_labels, k))
    result = result._replace(centroids=result.centroids @ axes.T)
    return result, axes @ best_metric @ axes.T


def _means(x: Tensor, labels: Tensor, k: int) -> Tensor:
    return torch.stack([x[labels == cluster].mean(0) for cluster in range(k)])


def empty_basis(widths: dict[str, int]) -> dict:
    """A basis of the right shapes, for a model whose weights are loaded."""
    return {
        name: (torch.zeros(width), torch.ones(width), torch.zeros(width, 1))
        for name, width in widths.items()
    }
