"""Losses of the supervised scripts, as means over the batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_bce(
    logits: Tensor, targets: Tensor, *, gamma: float, alpha: float | None = None, pos_weight: float | None = None
) -> Tensor:
    """Focal binary cross-entropy (Lin et al. 2017, arXiv:1708.02002), averaged over the batch.

    With p the probability of the true class an item costs -(1 - p)^gamma log p: the mean of torchvision's
    `sigmoid_focal_loss`, whose gradient here is also finite where p is 1 and gamma below 1. `gamma=0` is binary
    cross-entropy.

    Args:
        logits: (n,) floating point, positive for class 1.
        targets: (n,) of 0 and 1, any dtype.
        gamma: 0 or more; how little the easy items count.
        alpha: weight of class 1, and 1 - alpha of class 0; None: no weights.
        pos_weight: weight of class 1 beside 1 for class 0, as in `binary_cross_entropy_with_logits`; None: 1.

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
