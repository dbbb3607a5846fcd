"""Losses of the supervised scripts, as means over the batch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_bce(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float,
    alpha: float | None = None,
    pos_weight: float | None = None,
) -> Tensor:
    """Focal binary cross-entropy (Lin et al. 2017, arXiv:1708.02002), averaged over the batch.

    With p the probability of the true class an item costs -(1 - p)^gamma log p: the mean of
    torchvision's `sigmoid_focal_loss`, whose gradient here is also finite where p is 1 and gamma
    below 1. `gamma=0` is binary cross-entropy.

    Args:
        logits: (n,) floating point, positive for class 1.
        targets: (n,) of 0 and 1, any dtype.
        gamma: 0 or more; how little the easy items count.
        alpha: weight of class 1, and 1 - alpha of class 0; None: no weights.
        pos_weight: weight of class 1 beside 1 for class 0, as in
            `binary_cross_entropy_with_logits`; None: 1.

    Returns:
        A scalar like `logits`.
    """
    positive = targets > 0
    signed = torch.where(positive, logits, -logits)
    # (1 - p)^gamma by way of its logarithm: no power of zero, whose gradient is not finite.
    loss = -F.logsigmoid(signed) * (gamma * F.logsigmoid(-signed)).exp()
    if alpha is not None:
        loss = torch.where(positive, alpha * loss, (1 - alpha) * loss)
    if pos_weight is not None:
        loss = torch.where(positive, pos_weight * loss, loss)
    return loss.mean()


def smooth_targets(
    labels: Tensor,
    num_classes: int,
    smoothing: float,
    similarity: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Smooth labels to probabilities: (1 - smoothing) one-hot + smoothing prior[label].

    Args:
        labels: (n,) int64.
        smoothing: 0 to 1.
        similarity: (num_classes, num_classes) cosines of the classes' texts: the prior of a class
            is the softmax of its row divided by `temperature`, so that a class shares its mass with
            those that mean nearly the same. None: the prior is uniform.
        temperature: positive; has no effect without `similarity`.

    Returns:
        (n, num_classes) float32, each row of sum 1.
    """
    one_hot = F.one_hot(labels, num_classes).float()
    if similarity is None:
        return (1 - smoothing) * one_hot + smoothing / num_classes
    prior = (similarity.float() / temperature).softmax(1)
    return (1 - smoothing) * one_hot + smoothing * prior[labels]


def logit_adjusted(
    logits: Tensor, targets: Tensor, prior: Tensor, tau: float, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy on logits + tau log(prior), averaged over the batch.

    Menon et al. 2021, arXiv:2007.07314, eq. 10. The prior is ADDED in training and predictions use
    the raw logits, which then estimate the class-balanced posterior at tau 1 (there the same as
    balanced softmax, Ren et al. 2020, arXiv:2007.10740). Subtracting it from the logits of a model
    that was trained without it is the other form; with both, or with the sign turned, a frequent
    class wins.

    Args:
        logits: (n, K) floating point.
        targets: (n, K) probabilities, or (n,) int64 classes.
        prior: (K,) positive shares of the classes among the training items as they are drawn.
        tau: 0 or more; 0 is plain cross-entropy.
        weights: (K,) of the classes, as torch's `cross_entropy` takes them.
    """
    if tau:
        logits = logits + tau * prior.to(logits.dtype).log()
    return F.cross_entropy(logits, targets, weights)


def info_nce(learned: Tensor, fixed: Tensor, temperature: float = 0.07) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) over K pairs of rows.

    log K less this bounds their mutual information from below, so unlike a critic's difference of
    means it has a floor, 0.

    Args:
        learned, fixed: (K, d); row i of one belongs to row i of the other.
        temperature: positive; divides the cosines.
    """
    logits = F.normalize(learned, dim=1) @ F.normalize(fixed, dim=1).T / temperature
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def decorrelation(rows: Tensor) -> Tensor:
    """Mean squared cosine of different rows: 0 where all are orthogonal, 1 where all are parallel.

    Args:
        rows: (K, d), K >= 2.
    """
    rows = F.normalize(rows, dim=1)
    cosines = rows @ rows.T
    count = len(rows)
    return (cosines - torch.diag(cosines.diagonal())).square().sum() / (count * (count - 1))


def ldam(
    cosines: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    scale: float = 30.0,
    max_margin: float = 0.5,
    weights: Tensor | None = None,
) -> Tensor:
    """Label-distribution-aware margin loss (Cao et al. 2019, arXiv:1906.07413).

    Cross-entropy on scale * (cosine - margin of the true class), the margin proportional to
    count^(-1/4).

    Args:
        cosines: (n, K) in [-1, 1]: features and classifier are normalized.
        labels: (n,) int64.
        counts: (K,) positive, items of each class.
        scale: turns cosines into logits.
        max_margin: that of the rarest class.
        weights: (K,) of the classes. The sum is divided by the number of items, not by the sum of
            their weights: chunks and processes then add up to the whole batch.
    """
    margins = counts.to(cosines.dtype) ** -0.25
    margins = margins * (max_margin / margins.max())
    shifted = scale * (cosines - margins * F.one_hot(labels, len(margins)))
    return F.cross_entropy(shifted, labels, weights, reduction="none").mean()


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Class weights (1 - beta) / (1 - beta^count), scaled to sum K (Cui et al. 2019).

    Source: arXiv:1901.05555.

    Args:
        counts: (K,) positive, items of each class.
        beta: in [0, 1).

    Returns:
        (K,) float64.
    """
    # expm1 and log1p: beta^1 of 0.9999 leaves four digits of the difference.
    weights = [
        1.0 if beta == 0 else (beta - 1) / math.expm1(int(n) * math.log(beta)) for n in counts
    ]
    weights = torch.tensor(weights, dtype=torch.float64)
    return weights * len(weights) / weights.sum()
