"""Multinomial logistic regression, solved to convergence; cross-validation chooses its penalty.

The objective is the mean cross-entropy plus penalty / 2 * |W|^2 on standardized features, the bias
free: that of scikit-learn's `LogisticRegression(C=1 / (penalty * n))`.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WORSE = 3  # standard errors below the best accuracy: still weaker penalties only overfit more
TOLERANCE = 1e-5  # largest entry of the gradient, in the solver's coordinates
MOST_STEPS = 2000
CONSTANT = 1e-4  # of the mean: what varies less is mostly float32's rounding
_BLOCK = 2**22  # float64 numbers of a block of rows, or of its logits


def path(count: int) -> list[float]:
    """Ten penalties for `count` rows, from 10 down to 1 / (10 count), scikit-learn's C = 10: more
    rows need less.
    """
    return [10 ** (1 - k * (2 + math.log10(count)) / 9) for k in range(10)]


class Solution(NamedTuple):
    """A linear layer for features as they are, and how it was found.

    Attributes:
        weight, bias: (C, d) and (C,) float64 on the CPU.
        penalty: the chosen one.
        accuracy: the share of the held-out rows that are right at this penalty.
        unsolved: the penalties at which MOST_STEPS left the gradient above TOLERANCE.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    accuracy: float
    unsolved: list[float]


def solve(
    rows: Tensor,
    items: Tensor,
    labels: Tensor,
    folds: Tensor,
    num_classes: int,
    device: torch.device,
    evaluated: Callable[[], None] = lambda: None,
    agreed: Callable[[float], float] = lambda accuracy: accuracy,
) -> Solution:
    """Fit `items` at the penalty whose fits without a fold are right most often on that fold.

    It is the strongest of equally good ones; none is tried after one that is WORSE. Features are
    standardized once, for all fits. These, to all items and to all but a fold, are one convex
    problem, so that L-BFGS (`torch.optim.LBFGS`, strong Wolfe) reads the rows once for all of them;
    it begins with the solution of the penalty before. Its coordinates are the principal axes of the
    features, each in the scale of its curvature: tens of steps are enough where raw ones need a
    thousand. Memory beside the rows: min(n, d) + 1 float32 numbers an item, d x d float64 ones, and
    blocks of 32 MB.

    Args:
        rows: (N, d) float32 on the CPU, finite.
        items: (n,) int64, which of them are fitted, two at least; the others are not looked at.
        labels: (n,) int64 in [0, num_classes).
        folds: (n,) int64, which fold holds a row out: numbers from 0, none of them without a row.
        num_classes: C.
        device: that of the arithmetic, which is in float64.
        evaluated: called whenever the rows have been read.
        agreed: called with the accuracy at each penalty; gives the one to go by.
    """
    count, width = len(items), rows.shape[1]
    fits = int(folds.max()) + 2  # the last one to all rows
    size = max(1, _BLOCK // max(width, fits * num_classes))
    mean, deviation = 0.0, 1.0

    def blocks() -> Iterator[Tensor]:
        for part in items.split(size):
            yield (rows[part].to(device, torch.float64) - mean) / deviation

    mean = sum(block.sum(0) for block in blocks()) / count
    deviation = (sum(block.square().sum(0) for block in blocks()) / count).sqrt()
    deviation[deviation <= CONSTANT * mean.abs()] = torch.inf  # such a feature is zero
    if count <= width:
        axes = torch.linalg.svd(torch.cat([*blocks()]), full_matrices=False).Vh.T
    else:
        axes = torch.linalg.eigh(sum(block.T @ block for block in blocks())).eigenvectors
    # A last column of ones for the bias.
    turned = torch.cat([F.pad(block @ axes, (0, 1), value=1.0).float().cpu() for block in blocks()])
    variance = sum(z.to(device, torch.float64).square().sum(0) for z in turned.split(size)) / count
    shares = (folds[:, None] != torch.arange(fits)).double()
    shares /= shares.sum(0)  # [n, fits]: of a row in the mean of a fit

    def logits_of(weights: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for z, *of_rows in zip(
            *(values.split(size) for values in (turned, labels, folds, shares)), strict=True
        ):
            z = z.to(device, torch.float64)
            logits = (z @ weights).view(len(z), fits, num_classes)
            yield logits, z, *(values.to(device) for values in of_rows)
        evaluated()

    def loss_and_gradient(scaled: Tensor, scale: Tensor, penalties: Tensor) -> Tensor:
        weights = scaled * scale
        loss = (penalties * weights.square()).sum() / 2
        gradient = penalties * weights
        for logits, z, targets, _, share in logits_of(weights):
            log_p = logits.log_softmax(2)
            truth = F.one_hot(targets, num_classes)[:, None]
            loss -= (log_p * truth * share[..., None]).sum()
            gradient += z.T @ ((log_p.exp() - truth) * share[..., None]).flatten(1)
        scaled.grad = gradient * scale
        return loss

    weights = torch.zeros(len(variance), fits * num_classes, dtype=torch.float64, device=device)
    best = (-1.0, 0.0, weights)
    unsolved = []
    for penalty in path(count):
        penalties = torch.full_like(variance, penalty)[:, None]
        penalties[-1] = 0.0
        scale = (variance[:, None] / num_classes + penalties).rsqrt()
        scaled = weights / scale
        solver = torch.optim.LBFGS(
            [scaled],
            max_iter=MOST_STEPS,
            tolerance_grad=TOLERANCE,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        loss_of_scaled = partial(loss_and_gradient, scaled, scale, penalties)
        solver.step(loss_of_scaled)
        loss_of_scaled()
        if scaled.grad.abs().max() > TOLERANCE:
            unsolved.append(penalty)
        weights = scaled * scale
        right = 0
        for logits, _, targets, fold, _ in logits_of(weights):
            held_out = logits[torch.arange(len(fold), device=device), fold]
            right += (held_out.argmax(1) == targets).sum().item()
        accuracy = agreed(right / count)
        if accuracy > best[0]:
            best = accuracy, penalty, weights[:, -num_classes:]
        elif accuracy < best[0] - WORSE * math.sqrt(best[0] * (1 - best[0]) / count):
            break
    accuracy, penalty, weights = best
    weight = (axes @ weights[:-1]) / deviation[:, None]  # [d, C]
    bias = weights[-1] - mean @ weight
    return Solution(weight.T.cpu(), bias.cpu(), penalty, accuracy, unsolved)
