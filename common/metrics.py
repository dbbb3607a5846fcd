"""Scores of classifications, of binary detectors, of representations and of clusterings.

All functions check their input and return Python floats (`confusion_matrix` an array), so they wait
for the device: call them in evaluation, not in the training step.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Labels = Sequence[int] | np.ndarray | Tensor
Scores = Sequence[float] | np.ndarray | Tensor


def _array(values: Labels | Scores) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _labels(name: str, values: Labels, num_classes: float) -> np.ndarray:
    """Return labels of any array or tensor as a flat int64 array in [0, num_classes)."""
    values = _array(values)
    if values.ndim != 1 or len(values) == 0 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be one-dimensional, not empty, of integers; got {values.dtype}"
            f" {values.shape}"
        )
    if values.min() < 0 or values.max() >= num_classes:
        raise ValueError(
            f"{name} must lie in [0, {num_classes}), got {values.min()} to {values.max()}"
        )
    return values.astype(np.int64)


def _matrix(name: str, values: Tensor) -> Tensor:
    """Return a detached, non-empty (N, D) matrix in fp32 or fp64."""
    is_tensor = isinstance(values, Tensor)
    if not is_tensor or values.ndim != 2 or 0 in values.shape or values.is_complex():
        got = tuple(values.shape) if is_tensor else type(values).__name__
        raise ValueError(f"{name} must be a real tensor (N, D) that is not empty, got {got}")
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def confusion_matrix(target: Labels, predicted: Labels, num_classes: int) -> np.ndarray:
    """Count how often each class was predicted as each class.

    Args:
        target, predicted: (N,) integers in [0, num_classes), arrays, sequences or tensors.
        num_classes: C.

    Returns:
        (C, C) int64 array; rows are the true classes, columns the predicted ones.

    Raises:
        ValueError: empty input, different lengths or a label out of range.
    """
    target = _labels("target", target, num_classes)
    predicted = _labels("predicted", predicted, num_classes)
    if len(target) != len(predicted):
        raise ValueError(
            f"target and predicted must have one length, got {len(target)} and {len(predicted)}"
        )
    counts = np.bincount(target * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def classification(target: Labels, predicted: Labels, num_classes: int) -> dict[str, float]:
    """Score a classification: accuracy and macro-averaged precision, recall and F1.

    Equal to scikit-learn's `average="macro", zero_division=0` with its default labels: the average
    runs over the classes that occur in `target` or in `predicted`; a class absent from both does
    not count as a zero. The F1 is the mean of the classes' F1, not the F1 of the means.

    Args:
        target, predicted, num_classes: as in `confusion_matrix`.

    Returns:
        dict of the floats accuracy, macro_precision, macro_recall and macro_f1.

    Raises:
        ValueError: as in `confusion_matrix`.
    """
    counts = confusion_matrix(target, predicted, num_classes)
    hits = counts.diagonal()
    true = counts.sum(1)
    guessed = counts.sum(0)
    present = true + guessed > 0

    def macro(numerator: np.ndarray, denominator: np.ndarray) -> float:
        return float((numerator[present] / np.maximum(denominator[present], 1)).mean())

    return {
        "accuracy": float(hits.sum() / counts.sum()),
        "macro_precision": macro(hits, guessed),
        "macro_recall": macro(hits, true),
        "macro_f1": macro(2 * hits, true + guessed),
    }


def majority_accuracy(trained: Labels, target: Labels) -> float:
    """Accuracy on `target` (n,) of the most frequent label of `trained` (m,) as the only answer."""
    names, counts = np.unique(trained, return_counts=True)
    return float((np.asarray(target) == names[counts.argmax()]).mean())


def long_tail(
    target: Labels, predicted: Labels, num_classes: int
) -> dict[str, float | list[float]]:
    """Score a classification of unequal classes: uar, war and each class's recall.

    UAR is the mean recall over all `num_classes`, always: a class that `target` lacks counts as 0,
    as in scikit-learn's macro recall over given labels, so that the figure never gets better by
    losing a class; `uar_present` is that over the classes of `target` alone. WAR is the accuracy.

    Args:
        target, predicted, num_classes: as in `confusion_matrix`.

    Returns:
        dict of the floats uar, uar_present and war, and of `recall`, a list of num_classes floats,
        NaN where `target` lacks the class.

    Raises:
        ValueError: as in `confusion_matrix`.
    """
    counts = confusion_matrix(target, predicted, num_classes)
    sizes = counts.sum(1)
    recall = np.where(sizes, counts.diagonal() / np.maximum(sizes, 1), np.nan)
    return {
        "uar": float(np.nansum(recall) / num_classes),
        "uar_present": float(np.nanmean(recall)),
        "war": float(counts.diagonal().sum() / counts.sum()),
        "recall": recall.tolist(),
    }


def recall_intervals(
    target: Labels,
    predicted: Labels,
    num_classes: int,
    seed: int,
    units: Sequence | np.ndarray | None = None,
    rounds: int = 2000,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of UAR and WAR, a function of the arguments alone.

    The units are drawn again with replacement among those that hold the same classes, so no class
    is ever lost. Where each class is all hit or all missed, every draw gives the same; then each
    end is what `_alike` allows for the units of these classes, for UAR with the number in the
    smallest of them for each.

    Args:
        target, predicted, num_classes: as in `confusion_matrix`.
        seed, rounds: of the bootstrap.
        units: (N,) names of what is independent and drawn, such as a person; unset: each item.
        level: share of the bootstrap's values inside the interval.

    Returns:
        {"uar": (low, high), "war": (low, high)}

    Raises:
        ValueError: as in `confusion_matrix`.
    """
    counts = confusion_matrix(target, predicted, num_classes)
    hits = counts.diagonal()
    sizes = counts.sum(1)
    target, of = np.asarray(target), _unit_numbers(units, len(target))
    held = np.zeros((2, of.max() + 1, num_classes), np.int64)  # hits and items of each unit
    np.add.at(held[0], (of, target), target == np.asarray(predicted))
    np.add.at(held[1], (of, target), 1)
    drawn = np.zeros((2, rounds, num_classes))
    rng = np.random.Generator(np.random.PCG64(seed))
    for classes in np.unique(held[1] > 0, axis=0):
        alike = np.concatenate(held[:, ((held[1] > 0) == classes).all(1)], 1)
        kinds, times = np.unique(alike, axis=0, return_counts=True)
        taken = rng.multinomial(times.sum(), times / times.sum(), rounds)
        drawn += (taken @ kinds).reshape(rounds, 2, num_classes).transpose(1, 0, 2)
    found, items = drawn
    scores = {"uar": (found / np.maximum(items, 1)).mean(1), "war": found.sum(1) / items.sum(1)}
    edges = [(1 - level) / 2, (1 + level) / 2]
    ends = {name: tuple(map(float, np.quantile(scores[name], edges))) for name in scores}
    if ((hits == 0) | (hits == sizes)).all():
        hit, missed = hits > 0, (hits == 0) & (sizes > 0)
        uar, war = [hit.sum() / num_classes] * 2, [sizes[hit].sum() / sizes.sum()] * 2
        for end, sign, kind in ((0, -1, hit), (1, 1, missed)):
            if kind.any():
                least = kind.sum() * (held[1] > 0).sum(0)[kind].min()
                everyone = held[1][:, kind].any(1).sum()
                others = [1 - _alike(n, level) for n in (least, everyone)]
                uar[end] += sign * others[0] * kind.sum() / num_classes
                war[end] += sign * others[1] * sizes[kind].sum() / sizes.sum()
        ends = {"uar": tuple(map(float, uar)), "war": tuple(map(float, war))}
    return ends


def _unit_numbers(units: Sequence | np.ndarray | None, count: int) -> np.ndarray:
    """(N,) the number of each item's unit; each of the `count` items is one if `units` is None."""
    if units is None:
        return np.arange(count)
    of = np.unique(np.asarray(units, dtype=object), return_inverse=True)[1]
    if len(of) != count:
        raise ValueError(f"units must be one an item, got {len(of)} for {count} items")
    return of


def _alike(count: int, level: float) -> float:
    """The smallest share of a kind of which `count` independent items, all of it, can still come.

    The low end of Clopper and Pearson's interval (1934) there: a^count = (1 - level) / 2.
    """
    return ((1 - level) / 2) ** (1 / int(count))


def _detections(target: Labels, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Return checked 0/1 labels and fp64 scores as arrays; both classes must be there."""
    target = _labels("target", target, 2)
    scores = _array(scores).astype(np.float64)
    if scores.shape != target.shape or not np.isfinite(scores).all():
        raise ValueError(
            f"scores must be finite, one a label, got {scores.shape} for {len(target)} labels"
        )
    if target.min() == target.max():
        raise ValueError(f"target must hold both classes, got {len(target)} times {target[0]}")
    return target, scores


def _operating_points(
    target: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the thresholds in falling order and the true and false positives at each.

    Equal scores share a point.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(target[order])[ends]
    return scores[order][ends], hits, ends + 1 - hits


def detection(target: Labels, scores: Scores) -> dict[str, float]:
    """Score a detector: area under the ROC curve, average precision and equal error rate.

    Equal scores share one point of the curves. The AUC is the Mann-Whitney statistic, in which a
    tie counts half, and the average precision is a sum without interpolation, both equal to
    scikit-learn's. The equal error rate is where the straight lines between the points of the ROC
    curve have as many false alarms as misses, as shares.

    Args:
        target: (N,) integers 0 and 1, both of them there; 1 is what is to be detected.
        scores: (N,) finite floats, higher for 1.

    Returns:
        dict of the floats auc, ap and eer; they do not depend on the order of the items.

    Raises:
        ValueError: empty input, different lengths, one class alone, or scores that are not finite.
    """
    _, hits, alarms = _operating_points(*_detections(target, scores))
    positives = int(hits[-1])
    negatives = int(alarms[-1])
    new_hits = np.diff(hits, prepend=0)
    new_alarms = np.diff(alarms, prepend=0)
    auc = int((new_alarms * (2 * hits - new_hits)).sum()) / (2 * positives * negatives)
    ap = float((new_hits / positives * (hits / (hits + alarms))).sum())
    crossed = int(np.argmax(alarms * positives >= (positives - hits) * negatives))
    alarm_rates = np.array([alarms[crossed] - new_alarms[crossed], alarms[crossed]]) / negatives
    miss_rates = 1 - np.array([hits[crossed] - new_hits[crossed], hits[crossed]]) / positives
    gap_before, gap_after = miss_rates - alarm_rates  # one on each side of the crossing
    share = gap_before / (gap_before - gap_after)
    eer = alarm_rates[0] + share * (alarm_rates[1] - alarm_rates[0])
    return {"auc": auc, "ap": ap, "eer": float(eer)}


def best_threshold(target: Labels, scores: Scores) -> float:
    """Return the threshold of highest balanced accuracy: `scores >= threshold` is the answer 1.

    It is the mean of the shares of 1 and of 0 that are answered rightly, so that it does not depend
    on how many there are of each. The threshold lies halfway between two neighboring scores; where
    one answer for all is best, just above the highest score. Of equally good ones it is the
    highest. Arguments and errors as for `detection`.
    """
    levels, hits, alarms = _operating_points(*_detections(target, scores))
    gained = np.append(0, hits * alarms[-1] - alarms * hits[-1])  # over answering 0 throughout
    best = int(gained.argmax())
    if best == 0:
        return float(np.nextafter(levels[0], np.inf))
    middle = (levels[best - 1] + levels[best]) / 2  # answering 1 throughout gains nothing, too
    return float(middle if middle > levels[best] else levels[best - 1])


def answers(target: Labels, scores: Scores, threshold: float) -> dict[str, float]:
    """Score the answers of a detector: accuracy and balanced_accuracy at `threshold`.

    Arguments and errors as for `detection`.
    """
    target, scores = _detections(target, scores)
    right = (scores >= threshold) == target
    balanced = (right[target == 1].mean() + right[target == 0].mean()) / 2
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(balanced)}


def hits_at(target: Labels, scores: Scores, alarm_rate: float) -> float:
    """Return the largest share of 1 that is found with at most a share of false alarms.

    Args:
        target, scores: as in `detection`, with its errors.
        alarm_rate: share of the items of class 0.
    """
    _, hits, alarms = _operating_points(*_detections(target, scores))
    allowed = alarms <= alarm_rate * alarms[-1] + 1e-9
    return float(hits[allowed].max(initial=0) / hits[-1])


def _draws(target: np.ndarray, units, seed: int, rounds: int) -> np.ndarray:
    """Return how often each draw of the bootstrap takes each item, (rounds, n) floats.

    What is drawn with replacement are the units, among those that hold the same classes, so that no
    class is ever lost.
    """
    of = _unit_numbers(units, len(target))
    count = of.max() + 1
    holds = np.bincount(of, target == 1, count).astype(bool) * 2
    holds += np.bincount(of, target == 0, count).astype(bool)
    drawn = np.zeros((rounds, count))
    rng = np.random.Generator(np.random.PCG64(seed))
    for kind in (2, 1, 3):
        alike = np.flatnonzero(holds == kind)
        if len(alike):
            share = np.full(len(alike), 1 / len(alike))
            drawn[:, alike] = rng.multinomial(len(alike), share, rounds)
    return drawn[:, of]


def auc_interval(
    target: Labels,
    scores: Scores,
    seed: int,
    units: Sequence | np.ndarray | None = None,
    rounds: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the AUC, a function of the arguments alone.

    Where no pair is ranked wrongly (or rightly), or there is one unit, every draw gives the same;
    then the ends are what `_alike` allows for as many independent pairs. Memory is O(rounds * N +
    positives * negatives).

    Args:
        target, scores: as in `detection`, with its errors.
        seed, rounds: of the bootstrap.
        units: (N,) names of what is independent and drawn, such as the pair of persons whose videos
            these are; unset: each item. Clips of one video are not.
        level: share of the bootstrap's values inside the interval.

    Returns:
        (low, high)
    """
    target, scores = _detections(target, scores)
    drawn = _draws(target, units, seed, rounds)
    positive = scores[target == 1][:, None]
    negative = scores[target == 0]
    wins = (positive > negative) + 0.5 * (positive == negative)  # [positives, negatives]
    found, other = drawn[:, target == 1], drawn[:, target == 0]
    # Sums of halves are exact in any order: the same bits on every machine.
    areas = ((found @ wins) * other).sum(1) / (found.sum(1) * other.sum(1))
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    if areas.min() == areas.max() and (wins != 0.5).any():
        names = np.arange(len(target)) if units is None else np.asarray(units, dtype=object)
        pairs = min(len(set(names[target == kind])) for kind in (0, 1))
        area, others = float(areas[0]), 1 - _alike(pairs, level)
        low, high = area - others * area, area + others * (1 - area)
    return float(low), float(high)


def video_scores(logits: Tensor) -> np.ndarray:
    """Return the mean probability over each video's clips.

    Args:
        logits: (n, clips) on the CPU.

    Returns:
        (n,) float64 array in [0, 1].
    """
    return logits.double().sigmoid().mean(1).numpy()


def videos(
    labels: np.ndarray,
    methods: np.ndarray,
    logits: Tensor,
    seed: int,
    threshold: float | None = None,
    units: np.ndarray | None = None,
    compressions: Sequence[str] | None = None,
) -> dict[str, float]:
    """Score videos from their clips.

    With a threshold, in a test: the answers too, the shares of fakes found with 1 and 10 % false
    alarms, and all scores again for each method of manipulation beside all real videos and for each
    compression, if there are several. Without one, in validation: the threshold of the best
    balanced accuracy. Videos of one class have no AUC: only the share that is called fake.

    Args:
        labels: (n,) integers, 1 is fake.
        methods: (n,) strings, the method of manipulation of each fake.
        logits: (n, clips), positive for fake, on the CPU.
        seed: of the interval's bootstrap.
        threshold: a score from which on a video counts as fake.
        units: (n,) names of what the bootstrap draws, see `auc_interval`.
        compressions: (n,) strings.

    Returns:
        dict of clip_auc, video_auc, its interval video_auc_low and video_auc_high, video_ap,
        video_eer and so on; a method's or a compression's scores end in its name.

    Raises:
        ValueError: as in `detection`.
    """
    scores = video_scores(logits)
    groups = {"": np.full(len(labels), True)}
    kinds = sorted(set(methods[labels == 1]) - {""})
    if threshold is not None and len(kinds) > 1:
        groups |= {f"_{kind}": (labels == 0) | (methods == kind) for kind in kinds}
    levels = sorted({*([] if compressions is None else compressions)} - {""})
    if threshold is not None and len(levels) > 1:
        groups |= {f"_{level}": np.asarray(compressions) == level for level in levels}
    if threshold is not None and len(set(labels)) == 1:
        name = "video_detection_rate" if labels[0] == 1 else "video_false_alarm_rate"
        values = {}
        for suffix, kept in groups.items():
            share = float((scores[kept] >= threshold).mean())
            # As wide as if the videos of a unit were all alike.
            count = int(kept.sum()) if units is None else len(set(units[kept]))
            low, high = share_interval(share * count, count)
            values[f"{name}{suffix}"] = share
            values |= {f"{name}_low{suffix}": low, f"{name}_high{suffix}": high}
        return values
    values = {"clip_auc": detection(np.repeat(labels, logits.shape[1]), logits.flatten())["auc"]}
    for suffix, kept in groups.items():
        target, kept_scores = labels[kept], scores[kept]
        if len(set(target)) < 2:  # a compression of fakes alone
            continue
        of_group = detection(target, kept_scores)
        ends = auc_interval(target, kept_scores, seed, None if units is None else units[kept])
        of_group["auc_low"], of_group["auc_high"] = ends
        if threshold is not None:
            of_group |= answers(target, kept_scores, threshold)
            for percent in (1, 10):
                of_group[f"tpr_at_fpr_{percent}"] = hits_at(target, kept_scores, percent / 100)
        for metric, value in of_group.items():
            values[f"video_{metric}{suffix}"] = value
    if threshold is None:
        values["threshold"] = best_threshold(labels, scores)
    return values


def emotions(
    labels: Labels,
    predicted: Labels,
    counts: Sequence[int],
    classes: Sequence[str],
    seed: int,
    units: Sequence | np.ndarray | None = None,
) -> dict[str, float]:
    """Score a classification of emotions, beside the answer of the most frequent training class.

    Args:
        labels, predicted: (n,) integers in [0, K).
        counts: (K,) training items of each class.
        classes: (K,) names.
        seed: of the intervals' bootstrap.
        units: (n,) names of what it draws, see `recall_intervals`.

    Returns:
        dict of uar and war, the ends of their intervals (uar_low, uar_high, ...), each class's
        recall (recall_<name>), and majority_uar and majority_war. Where `labels` lack classes,
        these have no recall, and uar_present and majority_uar_present are there too.

    Raises:
        ValueError: as in `confusion_matrix`.
    """
    scores = long_tail(labels, predicted, len(classes))
    majority = long_tail(labels, np.full(len(labels), np.argmax(counts)), len(classes))
    values = {"uar": scores["uar"], "war": scores["war"]}
    intervals = recall_intervals(labels, predicted, len(classes), seed, units)
    for name, interval in intervals.items():
        values[f"{name}_low"], values[f"{name}_high"] = interval
    for name, recall in zip(classes, scores["recall"], strict=True):
        if not math.isnan(recall):
            values[f"recall_{name}"] = recall
    values["majority_uar"] = majority["uar"]
    values["majority_war"] = majority["war"]
    if np.isnan(scores["recall"]).any():
        values["uar_present"] = scores["uar_present"]
        values["majority_uar_present"] = majority["uar_present"]
    return values


def roc(
    target: Labels,
    scores: Scores,
    seed: int,
    units: Sequence | np.ndarray | None = None,
    rounds: int = 500,
    level: float = 0.95,
    places: int = 41,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ROC curve and the bootstrap interval around it.

    Args:
        target, scores: as in `detection`, with its errors.
        seed, units, rounds, level: of the percentile bootstrap, see `auc_interval`.
        places: false alarm rates, evenly spaced over [0, 1], at which the interval is given.

    Returns:
        (points, band): (P, 2) float64 shares of false alarms and of hits, a row for each distinct
        score, from (0, 0) to (1, 1); and (places, 3), a false alarm rate and the lowest and the
        highest share of hits there.
    """
    target, scores = _detections(target, scores)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)

    def curve(weights: np.ndarray) -> list[np.ndarray]:
        # The shares of class 0 and of class 1 from each score on.
        shares = []
        for kind in (0, 1):
            sums = np.cumsum((weights * (target == kind))[order])[ends]
            shares.append(np.append(0, sums / sums[-1]))
        return shares

    rates = np.linspace(0, 1, places)
    drawn = np.empty((rounds, places))
    for row, weights in zip(drawn, _draws(target, units, seed, rounds), strict=True):
        alarms, hits = curve(weights)
        most_hits = np.searchsorted(alarms, rates + 1e-12, side="right") - 1  # for these alarms
        row[:] = hits[most_hits]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.stack(curve(np.ones(len(target))), 1), np.stack([rates, low, high], 1)


def share_interval(hits: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share.

    Args:
        hits, count: 0 <= hits <= count.
        level: probability that such an interval covers the true share.

    Returns:
        (low, high), of no item (0, 1).

    Raises:
        ValueError: hits out of range.
    """
    if not 0 <= hits <= count:
        raise ValueError(f"hits must lie in [0, {count}], got {hits}")
    if count == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    spread = z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    least: float = 0.0,
    units: Sequence | np.ndarray | None = None,
    rounds: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over items, a function of the arguments.

    Of an accuracy where the values are 1 for right answers and 0 for wrong ones; of the difference
    of two on the same items where they are the differences of these. Where every draw gives the
    same, the ends are what `_alike` allows: a few others might be the least or 1.

    Args:
        values: (N,) numbers, few of them different, as they are drawn by how often each is there.
        least: that a value can be, 0 of an answer, -1 of a difference; the most is 1.
        units: (N,) names of what is independent and drawn, such as the patient whose images these
            are; unset: each item.
        rounds: of the bootstrap.
        level: share of the bootstrap's means inside the interval.

    Returns:
        (low, high)
    """
    values = np.asarray(values, np.float64)
    of = _unit_numbers(units, len(values))
    held = np.stack([np.bincount(of, values), np.bincount(of)], 1)  # sum and items of each unit
    kinds, counts = np.unique(held, axis=0, return_counts=True)
    rng = np.random.Generator(np.random.PCG64(0))
    sums, items = (rng.multinomial(len(held), counts / len(held), rounds) @ kinds).T
    means = sums / items
    if means.min() == means.max():
        value, others = float(means[0]), 1 - _alike(len(held), level)
        return value - others * (value - least), value + others * (1 - value)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def contrastive(z_a: Tensor, z_b: Tensor, tile: int = 1024) -> dict[str, float]:
    """Score two views' embeddings: how well a row finds its positive, and alignment and uniformity.

    Row i of `z_a` and row i of `z_b` are a positive pair. Each of the 2N rows, normalized here,
    ranks the other 2N - 1 by cosine similarity; top1 and top5 are the shares of rows whose positive
    is among the first 1 and 5. A candidate as near as the positive counts as nearer, so a collapsed
    representation scores 0; so does nan. With no more than five candidates top5 is 1. Alignment is
    the mean of |a_i - b_i|^2, uniformity log mean exp(-2 |z_i - z_j|^2) over the pairs i < j of the
    2N rows (Wang and Isola 2020, arXiv:2005.10242); lower is better for both.

    Args:
        z_a, z_b: (N, D) real tensors on one device.
        tile: rows compared at once; memory is O(tile * 2N).

    Returns:
        dict of the floats top1, top5, alignment and uniformity.

    Raises:
        ValueError: empty input, different shapes, or a tile below 1.
    """
    z_a = _matrix("z_a", z_a)
    z_b = _matrix("z_b", z_b)
    if z_a.shape != z_b.shape:
        raise ValueError(
            f"z_a and z_b must have one shape, got {tuple(z_a.shape)} and {tuple(z_b.shape)}"
        )
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if z_a.device.type == "mps":  # it has no float64 to sum in
        z_a = z_a.cpu()
        z_b = z_b.cpu()
    z_a = F.normalize(z_a, dim=1)
    z_b = F.normalize(z_b, dim=1)
    z = torch.cat([z_a, z_b])
    n = len(z_a)
    m = len(z)
    top1 = top5 = 0
    potential = 0.0
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


def effective_rank(features: Tensor) -> float:
    """Measure how many directions features use: exp of the entropy of a normalized spectrum.

    Roy and Vetterli 2007. The spectrum is that of the centered features' covariance, in fp64: the
    shares are those of the variance. Taken of the features' own singular values, their square
    roots, the same features would rank higher.

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


def knn_hits(
    bank: Tensor,
    bank_labels: Labels,
    queries: Tensor,
    query_labels: Labels,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.07,
    tile: int = 1024,
) -> np.ndarray:
    """Classify by the k nearest neighbors, each weighted by exp(cosine similarity / temperature).

    The protocol of Wu et al. 2018 (arXiv:1805.01978).

    Args:
        bank: (N, D) real tensor, the features that vote.
        bank_labels: (N,) integers in [0, num_classes).
        queries: (Q, D) real tensor on the bank's device.
        query_labels: (Q,) integers in [0, num_classes).
        num_classes: C.
        k: neighbors, at most the bank's size.
        temperature: positive.
        tile: queries compared at once; memory is O(tile * N).

    Returns:
        (Q,) bool, which answers are right; equal votes go to the class of lowest number.

    Raises:
        ValueError: empty input, shapes that do not match, or a setting out of range.
    """
    bank = _matrix("bank", bank)
    queries = _matrix("queries", queries)
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank and queries must have one width, got {bank.shape[1]} and {queries.shape[1]}"
        )
    bank_labels = _labels("bank_labels", bank_labels, num_classes)
    query_labels = _labels("query_labels", query_labels, num_classes)
    if len(bank_labels) != len(bank) or len(query_labels) != len(queries):
        rows = (
            f"{len(bank)} and {len(queries)} rows, {len(bank_labels)} and"
            f" {len(query_labels)} labels"
        )
        raise ValueError(f"bank and queries must have one label a row, got {rows}")
    if k < 1 or tile < 1 or not temperature > 0:
        raise ValueError(
            f"k, tile and temperature must be positive, got {k}, {tile} and {temperature}"
        )
    bank = F.normalize(bank, dim=1)
    queries = F.normalize(queries.to(bank.dtype), dim=1)
    bank_labels = torch.from_numpy(bank_labels).to(bank.device)
    query_labels = torch.from_numpy(query_labels).to(bank.device)
    hits = []
    for chunk, labels in zip(queries.split(tile), query_labels.split(tile), strict=True):
        similarity, neighbors = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # [tile, k]
        # Relative to the nearest: the same vote, and no overflow at a low temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp_()
        votes = weights.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, bank_labels[neighbors], weights)
        hits.append(votes.argmax(1) == labels)
    return torch.cat(hits).cpu().numpy()


def _contingency(target: Labels, clusters: Labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct classes, the distinct clusters and their (C, K) int64 joint counts."""
    target = _labels("target", target, np.inf)
    clusters = _labels("clusters", clusters, np.inf)
    if len(target) != len(clusters):
        raise ValueError(
            f"target and clusters must have one length, got {len(target)} and {len(clusters)}"
        )
    classes, rows = np.unique(target, return_inverse=True)
    names, columns = np.unique(clusters, return_inverse=True)
    counts = np.bincount(rows * len(names) + columns, minlength=len(classes) * len(names))
    return classes, names, counts.reshape(len(classes), len(names))


def _mutual_information(counts: np.ndarray) -> float:
    n = counts.sum()
    rows = counts.sum(1)
    columns = counts.sum(0)
    i, j = counts.nonzero()
    joint = counts[i, j]
    terms = joint / n * (np.log(joint) - np.log(n) + (2 * np.log(n) - np.log(rows[i] * columns[j])))
    return max(float(terms.sum()), 0.0)


def _entropy(sizes: np.ndarray) -> float:
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum())


def _expected_mutual_information(rows: np.ndarray, columns: np.ndarray) -> float:
    """Mean mutual information of all tables with these margins (Vinh et al. 2010, eq. 24a)."""
    n = int(rows.sum())
    log_factorial = np.array([math.lgamma(i + 1.0) for i in range(n + 1)])
    total = 0.0
    # Margins of one size give one term: with all rows distinct there would be N * N of them.
    for a, of_a in zip(*np.unique(rows, return_counts=True), strict=True):
        for b, of_b in zip(*np.unique(columns, return_counts=True), strict=True):
            joint = np.arange(max(1, a + b - n), min(a, b) + 1)
            log_p = (
                log_factorial[[a, b, n - a, n - b]].sum()
                - log_factorial[n]
                - log_factorial[joint]
                - log_factorial[a - joint]
                - log_factorial[b - joint]
                - log_factorial[n - a - b + joint]
            )
            gain = joint / n * (np.log(n) + np.log(joint) - np.log(a) - np.log(b))
            total += float(of_a * of_b * (gain * np.exp(log_p)).sum())
    return total


def _rand(counts: np.ndarray) -> float:
    """Adjusted Rand index from pair counts."""
    # In Python integers: N**4 overflows 64 bits from N = 60,000 on.
    n = int(counts.sum())
    together = int((counts**2).sum()) - n
    in_class = int((counts.sum(1) ** 2).sum()) - n
    in_cluster = int((counts.sum(0) ** 2).sum()) - n
    if together == in_class == in_cluster:
        return 1.0
    pairs = n * (n - 1)
    above_chance = 2 * (together * pairs - in_class * in_cluster)
    return above_chance / ((in_class + in_cluster) * pairs - 2 * in_class * in_cluster)


def linear_assignment(
    cost: Sequence[Sequence[float]] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Match rows and columns one to one at the least total cost.

    The Hungarian method by shortest augmenting paths (Jonker and Volgenant 1987): O(n^2 m) time for
    n rows and m >= n columns.

    Args:
        cost: (n, m) finite numbers.

    Returns:
        (rows, columns), min(n, m) indices each, the rows ascending, as scipy's
        `linear_sum_assignment`.

    Raises:
        ValueError: not a finite matrix.
    """
    cost = np.asarray(cost, np.float64)
    if cost.ndim != 2 or not np.isfinite(cost).all():
        raise ValueError(f"cost must be a finite matrix, got shape {cost.shape}")
    if cost.shape[0] > cost.shape[1]:
        columns, rows = linear_assignment(cost.T)
        order = rows.argsort()
        return rows[order], columns[order]
    n, m = cost.shape
    row_price = np.zeros(n)
    column_price = np.zeros(m)
    row_of = np.full(m, -1)
    for start in range(n):
        distance = np.full(m, np.inf)
        done = np.zeros(m, bool)
        came_from = np.full(m, -1)
        row = start
        column = -1
        length = 0.0
        while row >= 0:
            through = length + cost[row] - row_price[row] - column_price
            shorter = ~done & (through < distance)
            distance[shorter] = through[shorter]
            came_from[shorter] = column
            column = np.where(done, np.inf, distance).argmin()
            length = distance[column]
            done[column] = True
            row = row_of[column]
        passed = done & (row_of >= 0)
        row_price[start] += length
        row_price[row_of[passed]] += length - distance[passed]
        column_price[passed] -= length - distance[passed]
        while column >= 0:
            previous = came_from[column]
            row_of[column] = row_of[previous] if previous >= 0 else start
            column = previous
    columns = np.flatnonzero(row_of >= 0)
    order = row_of[columns].argsort()
    return row_of[columns][order], columns[order]


def match_clusters(target: Labels, clusters: Labels) -> dict[int, int]:
    """Give each cluster the class that makes most rows right, one to one.

    Args:
        target, clusters: (N,) integers that are not negative, arrays, sequences or tensors.

    Returns:
        dict cluster -> class of min(C, K) entries; other clusters have no class.

    Raises:
        ValueError: empty input, different lengths or a negative label.
    """
    classes, names, counts = _contingency(target, clusters)
    rows, columns = linear_assignment(-counts)
    return {int(names[k]): int(classes[c]) for c, k in zip(rows, columns, strict=True)}


def clustering(target: Labels, clusters: Labels) -> dict[str, float]:
    """Score a clustering against true classes, whatever numbers name classes and clusters.

    All but the last equal scikit-learn's functions. acc, balanced_accuracy and minority_recall are
    taken after `match_clusters`: a row of a cluster without a class counts as wrong, a class
    without a cluster has recall 0.

    Args:
        target, clusters: as in `match_clusters`.

    Returns:
        dict of floats: nmi (over the arithmetic mean of the entropies), ami and ari (both adjusted
        for chance), acc, fmi, balanced_accuracy (mean recall of the classes) and minority_recall
        (that of the smallest class; the mean of equally small ones).

    Raises:
        ValueError: as in `match_clusters`.
    """
    _, _, counts = _contingency(target, clusters)
    n = counts.sum()
    rows = counts.sum(1)
    columns = counts.sum(0)
    mutual = _mutual_information(counts)
    entropy = (_entropy(rows) + _entropy(columns)) / 2
    if len(rows) == len(columns) == np.count_nonzero(counts):
        nmi = ami = 1.0  # the same partition; where it has one part or N, the formulas are 0 / 0
    else:
        expected = _expected_mutual_information(rows, columns)
        nmi = mutual / entropy
        ami = (mutual - expected) / (entropy - expected)
    same = int((counts**2).sum() - n)
    fmi = 0.0
    if same:
        fmi = math.sqrt(same / ((rows**2).sum() - n)) * math.sqrt(same / ((columns**2).sum() - n))
    i, j = linear_assignment(-counts)
    recall = np.zeros(len(rows))
    recall[i] = counts[i, j] / rows[i]
    return {
        "nmi": nmi,
        "ami": ami,
        "ari": _rand(counts),
        "acc": float(counts[i, j].sum() / n),
        "fmi": fmi,
        "balanced_accuracy": float(recall.mean()),
        "minority_recall": float(recall[rows == rows.min()].mean()),
    }


def stability(labelings: Sequence[Labels]) -> float:
    """Mean adjusted Rand index over all pairs of labelings of the same rows.

    Args:
        labelings: at least two (N,) integer labelings, as of k-means from different seeds.

    Returns:
        float, 1 where all labelings are one partition, about 0 where they are unrelated.

    Raises:
        ValueError: fewer than two labelings, or labels as in `match_clusters`.
    """
    if len(labelings) < 2:
        raise ValueError(f"stability needs at least 2 labelings, got {len(labelings)}")
    scores = [_rand(_contingency(a, b)[2]) for a, b in itertools.combinations(labelings, 2)]
    return float(np.mean(scores))


def _grouped(x: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Return the centered rows and the (N, K) float matrix of their memberships."""
    x = _matrix("x", x)
    labels = _labels("labels", labels, np.inf)
    if len(x) != len(labels):
        raise ValueError(f"x and labels must have one length, got {len(x)} and {len(labels)}")
    groups = torch.from_numpy(np.unique(labels, return_inverse=True)[1]).to(x.device)
    return x - x.mean(0), F.one_hot(groups).to(x.dtype)


def silhouette(x: Tensor, labels: Labels, tile: int = 1024) -> float:
    """Mean silhouette of a clustering, which needs no true classes (Rousseeuw 1987).

    A row's is (b - a) / max(a, b) with its mean distance a to its cluster and b to the nearest
    other one; 0 for a row alone in its cluster.

    Args:
        x: (N, D) real tensor; distances are Euclidean.
        labels: (N,) integers that are not negative.
        tile: rows compared at once; memory is O(tile * N).

    Returns:
        float in [-1, 1].

    Raises:
        ValueError: fewer than 2 clusters, as many as rows, or shapes that do not match.
    """
    x, member = _grouped(x, labels)
    sizes = member.sum(0)
    if not 1 < len(sizes) < len(x):
        raise ValueError(
            f"silhouette needs between 2 and {len(x) - 1} clusters of {len(x)} rows, got"
            f" {len(sizes)}"
        )
    sum_dtype = x.dtype if x.device.type == "mps" else torch.float64  # which mps does not have
    squares = x.square().sum(1)
    total = 0.0
    for start in range(0, len(x), tile):
        rows = torch.arange(start, min(start + tile, len(x)), device=x.device)
        distance = torch.addmm(squares[rows, None] + squares, x[rows], x.T, alpha=-2)
        distance.clamp_(min=0).sqrt_()
        distance.scatter_(1, rows[:, None], 0)  # rounding leaves a row some way from itself
        sums = distance @ member  # [tile, K]
        is_member = member[rows].bool()  # [tile, K]
        size = (is_member * sizes).sum(1)
        a = (is_member * sums).sum(1) / (size - 1).clamp(min=1)
        b = (sums / sizes).masked_fill(is_member, torch.inf).amin(1)
        # Equal rows in two clusters have a = b = 0 and count 0.
        larger = torch.maximum(a, b).clamp(min=torch.finfo(x.dtype).tiny)
        score = torch.where(size > 1, (b - a) / larger, 0)
        total += score.sum(dtype=sum_dtype).item()
    return total / len(x)


def cluster_distances(x: Tensor, labels: Labels) -> dict[str, float]:
    """Mean Euclidean distance of rows to their cluster's mean, and of the means to each other.

    Args:
        x: (N, D) real tensor.
        labels: (N,) integers that are not negative.

    Returns:
        dict of the floats intra (over rows) and inter (over pairs of clusters; 0 for a single one).

    Raises:
        ValueError: shapes that do not match.
    """
    x, member = _grouped(x, labels)
    means = member.T @ x / member.sum(0)[:, None]
    inter = F.pdist(means)
    return {
        "intra": (x - means[member.argmax(1)]).norm(dim=1).mean().item(),
        "inter": inter.mean().item() if len(inter) else 0.0,
    }
