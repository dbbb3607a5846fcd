"""Fusion of modalities into one embedding, with a linear path of its own.

UMC: Zhang et al. 2024, arXiv:2405.12775.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import clustering, metrics
from common.errors import InputError

HEADS = 8
STARTS, ROUNDS = 3, 10  # of k-means in a metric that follows it


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
        self.temporal = nn.ModuleDict(
            {
                name: nn.TransformerEncoderLayer(
                    base_dim, HEADS, 4 * base_dim, dropout=0.0, batch_first=True
                )
                for name in self.names
                if name in self.sequences
            }
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
            wide = torch.zeros(len(axes), base_dim)
            wide[:, start : start + axes.shape[1]] = axes
            start += axes.shape[1]
            for kind, value in (("mean", mean), ("scale", scale), ("axes", wide)):
                self.register_buffer(f"{kind}_{name}", value.float())

    def forward(
        self, inputs: dict[str, Tensor], lengths: dict[str, Tensor], keep: Tensor | None = None
    ):
        """z and h of `inputs`, name -> (n, D) or (n, L, D) with `lengths` (n,).

        Where `keep` (n, modalities) is 0, a modality's part is zero.
        """
        parts = []
        path = 0.0
        for i, name in enumerate(self.names):
            x = inputs[name]
            kept = 1.0 if keep is None else keep[:, i, None]
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
                last = (
                    torch.full_like(lengths[name], x.shape[1])
                    if self.padded_last
                    else lengths[name]
                )
                state = state[torch.arange(len(x), device=x.device), last - 1]
            parts.append(kept * state)
        z = path + self.fuse(self.dropout(F.gelu(torch.cat(parts, 1))))
        h = z if self.linear_path else self.head(self.dropout(F.relu(z)))
        return z, F.normalize(h.float(), dim=1)


def pool(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean (n, D) of the first `lengths` (n,) steps of sequences (n, L, D)."""
    mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return (x * mask[..., None]).sum(1) / lengths[:, None]


def weighted_basis(
    rows: dict[str, Tensor],
    as_is,
    anchor: str | None,
    k: int,
    components: int,
    seed: int,
    *,
    peers=frozenset(),
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

    Returns:
        The basis, name -> (mean (D,), scale (D,), axes (D, C)); the weights by name; the anchor's
        name.

    Raises:
        InputError: all rows of a modality are equal.
    """
    basis = {}
    found = {}
    for name, x in rows.items():
        x = x.double()
        mean = x.mean(0)
        spread = x.std(0, unbiased=False)
        scale = torch.where(
            spread > 1e-7 * x.abs().amax(0), spread, torch.inf
        )  # a constant column stays zero
        if scale.isinf().all():
            raise InputError(
                f"modality {name} is the same for all training utterances: leave it out with"
                " --modalities"
            )
        if name in as_is:
            scale = torch.full_like(spread, spread.square().sum().sqrt().item())
        x = (x - mean) / scale
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        values = values.flip(0)[:components]
        vectors = vectors.flip(1)[:, :components]
        axes = vectors[:, values > 1e-9 * values[0]] / values.clamp(min=0).sum().sqrt()
        basis[name] = mean, scale, axes
        found[name] = clustering.kmeans((x @ axes).float(), k, seed=seed).labels
    agreement = {
        a: {
            b: max(metrics.clustering(found[a].cpu(), found[b].cpu())["ami"], 0.0)
            for b in found
            if b != a
        }
        for a in found
    }
    anchor = anchor or max(agreement, key=lambda name: sum(agreement[name].values()))
    weights = {
        name: 1.0 if name == anchor or name in peers else agreement[anchor][name] for name in rows
    }
    return (
        {n: (mean, scale, weights[n] * axes) for n, (mean, scale, axes) in basis.items()},
        weights,
        anchor,
    )


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
    likelihood = (
        share @ share.log() - values.log().sum() / 2 - (within @ metric).square().sum(1).mean() / 2
    ).item()
    return (metric * (x.var(0).sum() / (x @ metric).var(0).sum().clamp(min=1e-30)).sqrt()).to(
        z.dtype
    ), likelihood


def discriminant_kmeans(
    z: Tensor, k: int, shrinkage: float, seed: int, metric: Tensor, centroids: Tensor | None
):
    """K-means and `discriminant` in turn on rows z (n, D).

    Two rounds from `centroids` (k, D) in `metric` (D, D). Without centroids, the best of STARTS
    starts by the likelihood, each of ROUNDS rounds or until no label changes. Returns the KMeans
    and its metric.
    """
    # On the principal axes: an untrained network leaves most of the columns empty.
    values, axes = torch.linalg.eigh(torch.cov(z.double().T))
    axes = axes[:, values > 1e-6 * values[-1]].to(z.dtype)
    x = z @ axes
    best = None
    for start in range(STARTS if centroids is None else 1):
        # Seeds of their own: runs of neighboring --seed must not share their starts.
        own_seed = STARTS * seed + start
        found = clustering.kmeans(
            z @ metric, k, seed=own_seed, restarts=1, start=centroids, max_iterations=20
        )
        for _ in range(ROUNDS if centroids is None else 2):
            labels, (own, likelihood) = found.labels, discriminant(x, found.labels, shrinkage)
            y = x @ own
            means = torch.stack([y[labels == c].mean(0) for c in range(k)])
            found = clustering.kmeans(y, k, start=means, max_iterations=5)
            if torch.equal(found.labels, labels):
                break
        if best is None or likelihood > best[0]:
            best = likelihood, found.labels, own
    metric = axes @ best[2] @ axes.T
    y = z @ metric
    return clustering.kmeans(
        y, k, start=torch.stack([y[best[1] == c].mean(0) for c in range(k)])
    ), metric


def empty_basis(widths: dict[str, int]) -> dict:
    """A basis of the right shapes, for a model whose weights are loaded."""
    return {
        name: (torch.zeros(width), torch.ones(width), torch.zeros(width, 1))
        for name, width in widths.items()
    }
