"""Scores of classifications and of representations.

All functions check their input and return Python floats (`confusion_matrix` an array), so they wait for the device:
call them in evaluation, not in the training step.
"""

import numpy as np
import torch
import torch.nn.functional as F


def _labels(name, values, num_classes):
    """Return labels as a flat int64 array in [0, num_classes), whatever array or tensor they came in."""
    values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if values.ndim != 1 or len(values) == 0 or values.dtype.kind not in "iu":
        raise ValueError(f"{name} must be one-dimensional, not empty, of integers; got {values.dtype} {values.shape}")
    if values.min() < 0 or values.max() >= num_classes:
        raise ValueError(f"{name} must lie in [0, {num_classes}), got {values.min()} to {values.max()}")
    return values.astype(np.int64)


def _matrix(name, values):
    """Return a detached, non-empty (N, D) matrix in fp32 or fp64."""
    if not isinstance(values, torch.Tensor) or values.ndim != 2 or 0 in values.shape or values.is_complex():
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"{name} must be a real tensor (N, D) that is not empty, got {got}")
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def confusion_matrix(target, predicted, num_classes):
    """Count how often each class was predicted as each class.

    Args:
        target, predicted: (N,) integers in [0, num_classes), arrays, sequences or tensors.
        num_classes: C.

    Returns:
        (C, C) int64 array; rows are the true classes, columns the predicted ones.

    Raises:
        ValueError: empty input, different lengths or a label out of range.
    """
    target, predicted = _labels("target", target, num_classes), _labels("predicted", predicted, num_classes)
    if len(target) != len(predicted):
        raise ValueError(f"target and predicted must have one length, got {len(target)} and {len(predicted)}")
    return np.bincount(target * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification(target, predicted, num_classes):
    """Score a classification: accuracy, and precision, recall and F1 averaged over the classes with equal weight.

    Equal to scikit-learn's `average="macro", zero_division=0` with its default labels: the average runs over the
    classes that occur in `target` or in `predicted`; a class absent from both does not count as a zero. The F1 is the
    mean of the classes' F1, not the F1 of the means.

    Args:
        target, predicted, num_classes: as in `confusion_matrix`.

    Returns:
        dict of the floats accuracy, macro_precision, macro_recall and macro_f1.

    Raises:
        ValueError: as in `confusion_matrix`.
    """
    counts = confusion_matrix(target, predicted, num_classes)
    hits, true, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
    present = true + guessed > 0

    def macro(numerator, denominator):
        return float((numerator[present] / np.maximum(denominator[present], 1)).mean())

    return {
        "accuracy": float(hits.sum() / counts.sum()),
        "macro_precision": macro(hits, guessed),
        "macro_recall": macro(hits, true),
        "macro_f1": macro(2 * hits, true + guessed),
    }


def contrastive(z_a, z_b, tile=1024):
    """Score two views' embeddings: how well a row finds its positive, and alignment and uniformity.

    Row i of `z_a` and row i of `z_b` are a positive pair. Each of the 2N rows, normalised here, ranks the other 2N -
    1 by cosine similarity; top1 and top5 are the shares of rows whose positive is among the first 1 and 5. A
    candidate as near as the positive counts as nearer, so a collapsed representation scores 0; so does nan. With no
    more than five candidates top5 is 1. Alignment is the mean of |a_i - b_i|^2, uniformity log mean exp(-2 |z_i -
    z_j|^2) over the pairs i < j of the 2N rows (Wang and Isola 2020, arXiv:2005.10242); lower is better for both.

    Args:
        z_a, z_b: (N, D) real tensors on one device.
        tile: rows compared at once; memory is O(tile * 2N).

    Returns:
        dict of the floats top1, top5, alignment and uniformity.

    Raises:
        ValueError: empty input, different shapes, or a tile below 1.
    """
    z_a, z_b = _matrix("z_a", z_a), _matrix("z_b", z_b)
    if z_a.shape != z_b.shape:
        raise ValueError(f"z_a and z_b must have one shape, got {tuple(z_a.shape)} and {tuple(z_b.shape)}")
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if z_a.device.type == "mps":  # it has no float64 to sum in
        z_a, z_b = z_a.cpu(), z_b.cpu()
    z_a, z_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    z = torch.cat([z_a, z_b])
    n, m = len(z_a), len(z)
    top1, top5, potential = 0, 0, 0.0
    for start in range(0, m, tile):
        rows = torch.arange(start, min(start + tile, m), device=z.device)
        similarity = z[rows] @ z.T  # [tile, M]
        positive = similarity.gather(1, ((rows + n) % m)[:, None])
        similarity.scatter_(1, rows[:, None], torch.inf)  # a row is no candidate of its own
        # Counting the farther ones leaves ties, and nan, to the nearer.
        nearer = m - 2 - (similarity < positive).sum(1)
        top1 += (nearer < 1).sum().item()
        top5 += (nearer < 5).sum().item()
        kernel = (4 * (similarity - 1)).exp_()  # |a - b|^2 = 2 - 2 a.b between unit vectors
        kernel.scatter_(1, rows[:, None], 0)
        potential += kernel.sum(dtype=torch.float64).item()
    return {
        "top1": top1 / m,
        "top5": top5 / m,
        "alignment": (z_a - z_b).square().sum(1).mean(dtype=torch.float64).item(),
        "uniformity": float(np.log(potential / (m * (m - 1)))),
    }


def effective_rank(features):
    """Measure how many directions features use: exp of the entropy of a normalised spectrum (Roy and Vetterli 2007).

    The spectrum is that of the centred features' covariance, in fp64: the shares are those of the variance. Taken of
    the features' own singular values, their square roots, the same features would rank higher.

    Args:
        features: (N, D) real tensor, N >= 2.

    Returns:
        float between 1 and min(N - 1, D); 0 if all rows are equal.

    Raises:
        ValueError: fewer than two rows, or values that are not finite.
    """
    features = _matrix("features", features)
    if len(features) < 2 or not features.isfinite().all():
        raise ValueError(f"features must be at least 2 finite rows, got {tuple(features.shape)}")
    if (features == features[0]).all():
        return 0.0
    # To the CPU: not every device has fp64, and the spectrum is small.
    x = features.cpu().to(torch.float64)
    x = x - x.mean(0)
    # The Gram matrix of the shorter side has the same spectrum but for zeros.
    spectrum = torch.linalg.eigvalsh(x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T).clamp_(min=0)
    share = spectrum / spectrum.sum()
    return torch.special.entr(share).sum().exp().item()


def knn_accuracy(bank, bank_labels, queries, query_labels, num_classes, k=200, temperature=0.07, tile=1024):
    """Classify by the k nearest neighbours, each weighted by exp(cosine similarity / temperature).

    The protocol of Wu et al. 2018 (arXiv:1805.01978).

    Args:
        bank: (N, D) real tensor, the features that vote.
        bank_labels: (N,) integers in [0, num_classes).
        queries: (Q, D) real tensor on the bank's device.
        query_labels: (Q,) integers in [0, num_classes).
        num_classes: C.
        k: neighbours, at most the bank's size.
        temperature: positive.
        tile: queries compared at once; memory is O(tile * N).

    Returns:
        float, the share of right answers; equal votes go to the class of lowest number.

    Raises:
        ValueError: empty input, shapes that do not match, or a setting out of range.
    """
    bank, queries = _matrix("bank", bank), _matrix("queries", queries)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"bank and queries must have one width, got {bank.shape[1]} and {queries.shape[1]}")
    bank_labels = _labels("bank_labels", bank_labels, num_classes)
    query_labels = _labels("query_labels", query_labels, num_classes)
    if len(bank_labels) != len(bank) or len(query_labels) != len(queries):
        rows = f"{len(bank)} and {len(queries)} rows, {len(bank_labels)} and {len(query_labels)} labels"
        raise ValueError(f"bank and queries must have one label a row, got {rows}")
    if k < 1 or tile < 1 or not temperature > 0:
        raise ValueError(f"k, tile and temperature must be positive, got {k}, {tile} and {temperature}")
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries.to(bank.dtype), dim=1)
    bank_labels = torch.from_numpy(bank_labels).to(bank.device)
    query_labels = torch.from_numpy(query_labels).to(bank.device)
    right = 0
    for chunk, labels in zip(queries.split(tile), query_labels.split(tile), strict=True):
        similarity, neighbours = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # [tile, k]
        # Relative to the nearest: the same vote, and no overflow at a low temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp_()
        votes = weights.new_zeros(len(chunk), num_classes).scatter_add_(1, bank_labels[neighbours], weights)
        right += (votes.argmax(1) == labels).sum().item()
    return right / len(queries)
