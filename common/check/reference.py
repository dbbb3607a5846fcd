"""The scripts' losses a second time, by their papers' formulas and in float64.

What a step says its loss is must be what these say of the same outputs. They share nothing with
`common.losses` and `kernels`, not even the constants of a paper: a slip there must not repeat here.
Each takes the rows of a step's outputs, the labels (n,) of its items, and the network; not all need
all of these.
"""

import numpy as np
from torch import nn


def cross_entropy(
    logits: np.ndarray, targets: np.ndarray, network=None, *, weights: np.ndarray | float = 1.0
) -> float:
    """Mean of -sum_k weight_k target_k log p_k over items.

    Args:
        logits: (n, K).
        targets: (n, K) probabilities, or (n,) classes.
        weights: (K,) of the classes.
    """
    if targets.ndim == 1:
        targets = np.eye(logits.shape[1])[targets]
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return float(-(weights * targets * log_p).sum(1).mean())


def focal(
    logits: np.ndarray,
    labels: np.ndarray,
    network=None,
    *,
    gamma: float,
    alpha: float | None,
    pos_weight: float | None,
) -> float:
    """Mean of -weight (1 - p)^gamma log p, p the probability of an item's class (Lin et al. 2017).

    Args:
        logits: (n, 1) of class 1.
        labels: (n,) of 0 and 1.
        gamma, alpha, pos_weight: as `common.losses.focal_bce` takes them.
    """
    log_p = -np.logaddexp(0, np.where(labels == 1, -logits[:, 0], logits[:, 0]))
    weights = np.ones(2) if alpha is None else np.array([1 - alpha, alpha])
    weights[1] *= 1.0 if pos_weight is None else pos_weight
    return float((weights[labels] * (1 - np.exp(log_p)) ** gamma * -log_p).mean())


def contrastive(
    z: np.ndarray, labels=None, network=None, *, views: int, temperature: float
) -> float:
    """Each view of an item against all other rows, its positives the item's other views.

    NT-Xent with two views (Chen et al. 2020), SupCon's L_out with more (Khosla et al. 2020).

    Args:
        z: (views * n, d), view after view.
    """
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    item = np.arange(len(z)) % (len(z) // views)
    costs = []
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        cosines = z[others] @ z[i] / temperature
        positives = item[others] == item[i]
        costs.append(np.logaddexp.reduce(cosines) - cosines[positives].mean())
    return float(np.mean(costs))


def long_tail(
    logits: np.ndarray,
    labels: np.ndarray,
    network: nn.Module,
    *,
    method: str,
    phase,
    which: str,
    spec: dict,
) -> float:
    """The sum of the terms of `common.longtail.loss_terms`, of which see `method` to `which`.

    Args:
        logits: (n, K).
        network: has the classes' features and their texts.
        spec: the run's `model_spec`: `counts`, and the `scale` of cosines.
    """
    counts = np.array(spec["counts"], float)
    size = len(counts)
    drawn = counts
    if phase.sampler == "weighted":
        cap = np.inf if phase.cap is None else phase.cap
        drawn = counts * np.minimum(counts.sum() / (size * counts), cap)
    drawn = drawn / drawn.sum()
    weights = np.ones(size)
    if phase.weights == "effective":  # Cui et al. 2019
        weights = (1 - 0.9999) / (1 - 0.9999**counts)
        weights = weights / (weights * drawn).sum()
    one_hot = np.eye(size)[labels]
    if method == "ldam-drw":  # Cao et al. 2019: margins of 0.5 at most, scale 30
        margins = 0.5 * (counts.min() / counts) ** 0.25
        shifted = 30 * (logits / spec["scale"] - margins * one_hot)
        return cross_entropy(shifted, labels, weights=weights)
    similar = np.full((size, size), 1 / size)
    if network.prompts is not None:
        texts = _directions(network.prompts.fixed)
        similar = np.exp(texts @ texts.T / phase.temperature)
        similar /= similar.sum(1, keepdims=True)
    targets = (1 - phase.smoothing) * one_hot + phase.smoothing * similar[labels]
    shares = drawn if which == "sampled" else counts / counts.sum()
    adjusted = logits + phase.tau * np.log(shares)
    total = cross_entropy(adjusted, targets, weights=weights)
    classes = _directions(network.class_features())
    if phase.mi and network.prompts is not None:  # van den Oord et al. 2018: temperature 0.07
        cosines = classes @ texts.T / 0.07
        both = cross_entropy(cosines, np.arange(size)) + cross_entropy(cosines.T, np.arange(size))
        total += phase.mi * both / 2
    if phase.dc:
        others = ~np.eye(size, dtype=bool)
        total += phase.dc * ((classes @ classes.T)[others] ** 2).mean()
    return total


def _directions(features) -> np.ndarray:
    rows = features.detach().cpu().double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
