"""Metrics against scikit-learn, the papers' formulas and plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import metrics

ORACLE = "pip install -r tests/requirements.txt"


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("num_classes, used", [(2, 2), (5, 5), (7, 4), (1, 1)])
@pytest.mark.parametrize("kind", ["random", "one class predicted", "disjoint", "perfect"])
def test_classification_equals_scikit_learn(num_classes, used, kind):
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    rng = np.random.default_rng(num_classes)
    target = rng.integers(0, used, 40)
    predicted = {
        "random": rng.integers(0, used, 40),
        "one class predicted": np.full(40, used - 1),
        "disjoint": np.full(40, num_classes - 1),
        "perfect": target,
    }[kind]
    matrix = metrics.confusion_matrix(target, predicted, num_classes)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(
        matrix, oracle.confusion_matrix(target, predicted, labels=range(num_classes))
    )
    scores = metrics.classification(torch.from_numpy(target), predicted.tolist(), num_classes)
    expected = {"accuracy": oracle.accuracy_score(target, predicted)}
    for name, score in (
        ("macro_precision", oracle.precision_score),
        ("macro_recall", oracle.recall_score),
        ("macro_f1", oracle.f1_score),
    ):
        expected[name] = score(target, predicted, average="macro", zero_division=0)
    assert scores.keys() == expected.keys() and all(
        type(value) is float for value in scores.values()
    )
    assert scores == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "target, predicted, message",
    [
        ([], [], "target must be one-dimensional, not empty"),
        ([0, 1], [0], "one length, got 2 and 1"),
        ([0, 3], [0, 1], r"\[0, 3\), got 0 to 3"),
        ([0, -1], [0, 1], "got -1 to 0"),
        ([0, 1], [0.0, 1.0], "integers"),
    ],
)
def test_classification_refuses_bad_labels(target, predicted, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification(target, predicted, 3)


def test_the_majority_accuracy_is_that_of_scikit_learn_s_dummy():
    oracle = pytest.importorskip("sklearn.dummy", reason=ORACLE)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        trained, target = rng.integers(-1, 4, 30), rng.integers(0, 3, 20)
        dummy = oracle.DummyClassifier(strategy="most_frequent").fit(trained[:, None], trained)
        expected = dummy.score(target[:, None], target)
        assert metrics.majority_accuracy(trained, target) == pytest.approx(expected)


@pytest.mark.parametrize("used", [5, 3])
def test_long_tail_equals_scikit_learn_over_a_fixed_number_of_classes(used):
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    rng = np.random.default_rng(used)
    target, predicted = rng.integers(0, used, 60), rng.integers(0, 5, 60)
    result = metrics.long_tail(target, torch.from_numpy(predicted), 5)
    recall = oracle.recall_score(
        target, predicted, labels=range(5), average=None, zero_division=np.nan
    )
    assert result["recall"] == pytest.approx(recall.tolist(), abs=1e-12, nan_ok=True)
    assert result["uar"] == pytest.approx(np.nan_to_num(recall).mean(), abs=1e-12)
    of_used = oracle.recall_score(target, predicted, labels=range(used), average="macro")
    assert result["uar_present"] == pytest.approx(of_used, abs=1e-12)
    assert result["war"] == pytest.approx(oracle.accuracy_score(target, predicted), abs=1e-12)


def test_the_constant_classifier_scores_as_the_recipes_good_sign():
    target = np.repeat(np.arange(5), [277, 26, 6, 31, 84])
    result = metrics.long_tail(target, np.zeros(424, int), 5)
    assert round(100 * result["war"], 2) == 65.33 and result["uar"] == pytest.approx(0.2)


def test_a_class_without_clips_has_no_recall():
    target, predicted = [1, 1, 2, 2], [1, 1, 2, 0]
    values = metrics.emotions(target, predicted, [5, 3, 2], "abc", seed=0)
    assert values["uar"] == 0.5 and values["uar_present"] == 0.75
    assert values["majority_uar_present"] == values["majority_uar"] == 0
    assert {name for name in values if "recall" in name} == {"recall_b", "recall_c"}
    assert "uar_present" not in metrics.emotions([0, 1, 2], [0, 1, 2], [5, 3, 2], "abc", seed=0)


def test_recall_intervals_are_those_of_drawing_the_items_of_each_class_again():
    rng = np.random.default_rng(0)
    target = np.repeat(np.arange(3), [200, 40, 7])
    predicted = np.where(rng.random(247) < 0.7, target, rng.integers(0, 3, 247))
    result = metrics.recall_intervals(target, predicted, 3, seed=0)
    assert result == metrics.recall_intervals(target, predicted, 3, seed=0)
    draws = []
    for _ in range(4000):
        rows = np.concatenate(
            [rng.choice(np.flatnonzero(target == c), (target == c).sum()) for c in range(3)]
        )
        scores = metrics.long_tail(target[rows], predicted[rows], 3)
        draws.append((scores["uar"], scores["war"]))
    for name, values in zip(("uar", "war"), np.array(draws).T, strict=True):
        assert result[name] == pytest.approx(
            np.quantile(values, [0.025, 0.975]).tolist(), abs=0.015
        )


def detections(n, levels, seed, share=0.7):
    """Labels with both classes and scores of so many levels (None: no ties) that tell something
    about them.
    """
    rng = np.random.default_rng(seed)
    target = np.arange(n) < max(1, min(n - 1, round(share * n)))
    scores = rng.normal(size=n) + target
    if levels:
        scores = np.round(scores * levels / 6) * 6 / levels
    order = rng.permutation(n)
    return target[order].astype(int), scores[order]


@pytest.mark.parametrize(
    "n, levels", [(2, None), (3, 1), (7, 2), (50, None), (200, 5), (701, 30), (5000, 100)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_detection_equals_scikit_learn_with_ties(n, levels, sign):
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    optimize = pytest.importorskip("scipy.optimize", reason=ORACLE)
    target, scores = detections(n, levels, n)
    scores = sign * scores
    result = metrics.detection(torch.from_numpy(target), torch.from_numpy(scores))
    fpr, tpr, _ = oracle.roc_curve(target, scores, drop_intermediate=False)
    expected = {
        "auc": oracle.roc_auc_score(target, scores),
        "ap": oracle.average_precision_score(target, scores),
        # Along the curve, where fpr may stand still while tpr jumps.
        "eer": eer_along_the_curve(fpr, tpr, optimize),
    }
    assert result == pytest.approx(expected, abs=1e-12) and all(
        type(value) is float for value in result.values()
    )
    shuffled = np.random.default_rng(1).permutation(n)
    assert metrics.detection(target[shuffled], scores[shuffled]) == result


def eer_along_the_curve(fpr, tpr, optimize):
    at = np.arange(len(fpr))
    root = optimize.brentq(
        lambda t: np.interp(t, at, fpr) - 1 + np.interp(t, at, tpr), 0, len(fpr) - 1, xtol=1e-14
    )
    return float(np.interp(root, at, fpr))


def test_detection_of_known_cases():
    target = [0, 0, 1, 1]
    assert metrics.detection(target, [1.0, 2, 3, 4]) == {"auc": 1, "ap": 1, "eer": 0}
    assert metrics.detection(target, [4.0, 3, 2, 1])["auc"] == 0
    assert metrics.detection(target, [5.0] * 4) == {"auc": 0.5, "ap": 0.5, "eer": 0.5}


def test_the_best_threshold_is_the_best_of_all():
    for seed in range(30):
        target, scores = detections(2 + seed * 3, (None, 3, 12)[seed % 3], seed)
        scores *= (-1) ** seed
        threshold = metrics.best_threshold(target, scores)

        def balanced(t, target=target, scores=scores):
            return ((scores >= t)[target == 1].mean() + (scores < t)[target == 0].mean()) / 2

        tried = [balanced(t) for t in [*scores, scores.max() + 1]]
        assert balanced(threshold) == pytest.approx(max(tried), abs=1e-12)
        found = metrics.answers(target, scores, threshold)
        assert found["balanced_accuracy"] == pytest.approx(balanced(threshold), abs=1e-12)
        assert found["accuracy"] == ((scores >= threshold) == target).mean()
    uneven = np.repeat([0, 1], [10, 40]), np.append(np.arange(10.0), 9 - np.arange(40.0) / 5)
    assert metrics.answers(*uneven, metrics.best_threshold(*uneven))["balanced_accuracy"] >= 0.5
    assert metrics.best_threshold([0, 0, 1, 1], [1.0, 2, 4, 5]) == 3
    near = np.array([1.0, np.nextafter(1.0, 2)])  # nothing lies between neighbors
    assert ((near >= metrics.best_threshold([0, 1], near)) == [False, True]).all()


def test_the_interval_has_the_width_of_delongs():
    """DeLong et al. 1988: the variance of the AUC from the placements of each item among the other
    class.
    """
    target, scores = detections(700, 40, 3, share=0.8)
    positive, negative = scores[target == 1], scores[target == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    error = math.sqrt(
        wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    )
    low, high = metrics.auc_interval(target, scores, seed=0, rounds=4000)
    assert low < wins.mean() < high
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)
    assert metrics.auc_interval(target, scores, seed=0, rounds=4000) == (low, high)
    assert metrics.auc_interval(target, scores, seed=1, rounds=4000) != (low, high)


@pytest.mark.parametrize("flipped", [False, True])
def test_the_interval_of_a_perfect_auc_has_the_width_that_its_pairs_allow(flipped):
    """All of m independent pairs are ranked rightly with a probability of AUC^m."""
    target = np.repeat([0, 1], [18, 90])
    scores = (1 - 2 * flipped) * np.arange(108.0)
    low, high = metrics.auc_interval(target, scores, seed=0)
    assert (high - low) == pytest.approx(1 - 0.025 ** (1 / 18))
    assert (low, high)[not flipped] == (0.0 if flipped else 1.0)
    units = np.append(np.arange(18), np.arange(90) // 10)  # nine of them hold fakes
    low, high = metrics.auc_interval(target, scores, 0, units)
    assert (high - low) == pytest.approx(1 - 0.025 ** (1 / 9))


def test_the_interval_of_a_single_unit_is_nearly_everything():
    """Whose draws are all the same: videos that shared persons link all with each other."""
    target, scores = [0, 0, 1, 1], [0.1, 0.6, 0.5, 0.9]
    low, high = metrics.auc_interval(target, scores, 0, ["linked"] * 4)
    assert high - low == pytest.approx(1 - 0.025) and low < 0.75 < high
    assert metrics.auc_interval(target, [0.5] * 4, 0) == (0.5, 0.5)


def test_the_interval_of_repeated_items_is_that_of_their_units():
    """Four copies of each fake tell no more than one: drawn alone they seem to."""
    rng = np.random.default_rng(0)
    truths, widths = [], {"items": [], "units": []}
    held = {"items": 0, "units": 0}
    for seed in range(120):
        own = rng.normal(0, 1, 30)
        target = np.repeat([0, 1], [30, 120])
        scores = np.append(own + rng.normal(0, 0.3, 30), np.repeat(rng.normal(0.8, 1, 30), 4))
        units = np.append(np.arange(30), 100 + np.arange(120) // 4)
        truths.append(metrics.detection(target, scores)["auc"])
        truth = 0.5 * (1 + math.erf(0.8 / math.sqrt(2 + 0.09) / math.sqrt(2)))
        for name, given in (("items", None), ("units", units)):
            low, high = metrics.auc_interval(target, scores, seed, given, rounds=200)
            widths[name].append(high - low)
            held[name] += low <= truth <= high
    spread = 2 * 1.96 * np.std(truths)
    assert np.mean(widths["units"]) / spread == pytest.approx(1, abs=0.15)
    assert np.mean(widths["items"]) < 0.85 * spread and held["units"] > 0.88 * 120 > held["items"]


def test_hits_at_a_rate_of_false_alarms_are_scikit_learns():
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    for seed in range(10):
        target, scores = detections(300, (None, 12)[seed % 2], seed)
        fpr, tpr, _ = oracle.roc_curve(target, scores, drop_intermediate=False)
        for rate in (0.01, 0.1):
            assert metrics.hits_at(target, scores, rate) == pytest.approx(tpr[fpr <= rate].max())


def test_videos_are_scored_by_method_and_compression_and_without_empty_names():
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1, 1, 1], 20)
    methods = np.tile(np.array(["web", "swap", "blend", ""], dtype=object), 20)
    levels = ["c23"] * 40 + ["c40"] * 40
    logits = torch.from_numpy(rng.normal(labels[:, None], 1, (80, 2)))
    found = metrics.videos(labels, methods, logits, 0, 0.5, compressions=levels)
    scores = logits.double().sigmoid().mean(1).numpy()
    for name, kept in (
        ("swap", (labels == 0) | (methods == "swap")),
        ("c40", np.arange(80) >= 40),
    ):
        alone = metrics.detection(labels[kept], scores[kept])["auc"]
        assert found[f"video_auc_{name}"] == alone
    assert not [name for name in found if name.endswith("_") or "web" in name]
    assert found["video_auc_low"] < found["video_auc"] < found["video_auc_high"]
    fakes = labels == 1
    alone = metrics.videos(labels[fakes], methods[fakes], logits[fakes], 0, 0.5)
    assert alone["video_detection_rate"] == (scores[fakes] >= 0.5).mean()
    assert alone["video_detection_rate_low"] < alone["video_detection_rate"]
    swaps = scores[methods == "swap"] >= 0.5
    rate, low = (alone[f"video_detection_rate{end}"] for end in ("_swap", "_low_swap"))
    assert low < rate == swaps.mean()
    pairs = np.arange(60) // 3
    paired = metrics.videos(labels[fakes], methods[fakes], logits[fakes], 0, 0.5, units=pairs)
    rate = alone["video_detection_rate"]
    ends = [paired[f"video_detection_rate_{end}"] for end in ("low", "high")]
    assert paired["video_detection_rate"] == rate
    assert ends == pytest.approx(metrics.share_interval(20 * rate, 20))
    reals = metrics.videos(labels[~fakes], methods[~fakes], logits[~fakes], 0, 0.5)
    assert list(reals) == [f"video_false_alarm_rate{end}" for end in ("", "_low", "_high")]


@pytest.mark.parametrize(
    "target, scores, message",
    [
        ([1, 1], [0.0, 1.0], "both classes, got 2 times 1"),
        ([0, 1], [0.0], "one a label"),
        ([0, 1], [0.0, math.nan], "finite"),
        ([0, 2], [0.0, 1.0], r"\[0, 2\)"),
        ([], [], "not empty"),
    ],
)
def test_detections_of_bad_input_are_refused(target, scores, message):
    seeded = (lambda t, s: metrics.auc_interval(t, s, 0), lambda t, s: metrics.roc(t, s, 0))
    for function in (metrics.detection, metrics.best_threshold, *seeded):
        with pytest.raises(ValueError, match=message):
            function(target, scores)


@pytest.mark.parametrize("ties", [False, True])
def test_the_roc_curve_is_scikit_learns_and_its_band_holds_what_new_draws_give(ties):
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    rng = np.random.default_rng(0)

    def draw(count):
        target = np.repeat([0, 1], count)
        scores = rng.normal(target * 1.2)
        return target, np.round(scores * 2) / 2 if ties else scores

    target, scores = draw(60)
    points, band = metrics.roc(target, scores, seed=0)
    alarms, hits, _ = oracle.roc_curve(target, scores, drop_intermediate=False)
    np.testing.assert_allclose(points, np.stack([alarms, hits], 1), atol=1e-12)
    assert band[0, 0] == 0 and band[-1].tolist() == [1, 1, 1] and (np.diff(band, axis=0) >= 0).all()
    assert ((band[:, 1] <= band[:, 2]) & (band[:, 2] <= 1)).all()
    # 95 % of bands hold the hits of a large sample at 30 % false alarms.
    t, s = draw(20_000)
    alarms, hits, _ = oracle.roc_curve(t, s, drop_intermediate=False)
    true = hits[np.searchsorted(alarms, 0.3, side="right") - 1]
    held = 0
    for seed in range(100):
        _, result = metrics.roc(*draw(60), seed, rounds=100, places=11)
        held += result[3, 1] <= true <= result[3, 2]
    assert 84 <= held <= 100


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 7), (40, 40), (1, 1000), (250, 500)])
def test_the_interval_of_a_share_is_wilsons(hits, count):
    stats = pytest.importorskip("scipy.stats", reason=ORACLE)
    expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert metrics.share_interval(hits, count) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_the_interval_of_no_item_is_everything():
    assert metrics.share_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match=r"\[0, 4\], got 5"):
        metrics.share_interval(5, 4)


def grouped_answers():
    """(n,) answers, right or wrong, that the n items of a group mostly share; groups; labels."""
    rng = np.random.default_rng(0)
    groups = np.repeat([f"patient {i}" for i in range(40)], rng.integers(1, 12, 40))
    skill = dict(zip(dict.fromkeys(groups), rng.random(40), strict=True))
    hits = rng.random(len(groups)) < [skill[name] for name in groups]
    return hits, groups, rng.integers(0, 2, len(groups))


def test_the_interval_of_a_mean_draws_groups_as_a_whole():
    hits, groups, _ = grouped_answers()
    names, rng = np.unique(groups), np.random.default_rng(1)
    means = []
    for _ in range(4000):
        drawn = np.concatenate([hits[groups == name] for name in rng.choice(names, len(names))])
        means.append(drawn.mean())
    found = metrics.mean_interval(hits, units=groups, rounds=20_000)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.01)
    alone = metrics.mean_interval(hits)
    assert found[1] - found[0] > 1.3 * (alone[1] - alone[0])
    items = np.arange(len(hits))
    assert metrics.mean_interval(hits, units=items) == alone
    # Of one group every draw is the same: as much as one item tells.
    low, high = metrics.mean_interval(hits, units=["one"] * len(hits))
    assert low < 0.05 and high > 0.95
    right = metrics.mean_interval([1] * 40, units=np.repeat(np.arange(8), 5))
    assert right == metrics.mean_interval([1] * 8)
    with pytest.raises(ValueError, match="units must be one an item, got 2 for 3 items"):
        metrics.mean_interval([0, 1, 1], units=["a", "b"])


def test_recall_intervals_draw_groups_as_a_whole():
    hits, groups, target = grouped_answers()
    predicted = np.where(hits, target, 1 - target)
    found = metrics.recall_intervals(target, predicted, 3, seed=0, units=groups, rounds=20_000)
    rng, kinds = np.random.default_rng(1), {}
    for name in np.unique(groups):
        kinds.setdefault(frozenset(target[groups == name].tolist()), []).append(name)
    scores = {"uar": [], "war": []}
    for _ in range(4000):
        names = [name for alike in kinds.values() for name in rng.choice(alike, len(alike))]
        rows = np.concatenate([np.flatnonzero(groups == name) for name in names])
        values = metrics.long_tail(target[rows], predicted[rows], 3)
        for name, drawn in scores.items():
            drawn.append(values[name])
    for name, drawn in scores.items():
        assert found[name] == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    alone = metrics.recall_intervals(target, predicted, 3, seed=0)
    assert np.diff(found["uar"]) > 1.2 * np.diff(alone["uar"])
    right = metrics.recall_intervals([0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], 2, 0, list("aabbcc"))
    assert right == metrics.recall_intervals([0, 1, 1], [0, 1, 1], 2, 0)


@pytest.mark.parametrize("levels", [[0, 1], [-1, 0, 1]], ids=["accuracy", "difference"])
def test_the_interval_of_a_mean_is_the_percentile_bootstrap(levels):
    stats = pytest.importorskip("scipy.stats", reason=ORACLE)
    values = np.random.default_rng(1).choice(levels, 150)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = metrics.mean_interval(values, rounds=20_000)
    assert found == pytest.approx(tuple(expected), abs=0.01)
    assert found == metrics.mean_interval(values[::-1], rounds=20_000)


def test_items_that_are_all_alike_leave_an_interval_of_some_width():
    """Where every draw of a bootstrap gives the same."""
    stats = pytest.importorskip("scipy.stats", reason=ORACLE)

    def exact(hits, count):
        return tuple(stats.binomtest(hits, count).proportion_ci(method="exact"))

    assert metrics.mean_interval(np.ones(8)) == pytest.approx(exact(8, 8))
    assert metrics.mean_interval(np.zeros(8)) == pytest.approx(exact(0, 8))
    most = exact(0, 8)[1]
    assert metrics.mean_interval(np.zeros(8), least=-1.0) == pytest.approx((-most, most))
    assert {type(end) for end in metrics.mean_interval(np.ones(8))} == {float}  # for checkpoints
    for sizes, of_uar in (((9, 9, 9), 27), ((200, 40, 7), 21), ((30, 0, 5), 10)):
        target = np.repeat(np.arange(3), sizes)
        classes = np.count_nonzero(sizes) / 3  # one without items is recalled never
        for predicted, hits in ((target, 1), ((target + 1) % 3, 0)):
            found = metrics.recall_intervals(target, predicted, 3, seed=0)
            assert {type(end) for ends in found.values() for end in ends} == {float}
            assert found["war"] == pytest.approx(exact(hits * len(target), len(target)))
            expected = np.multiply(exact(hits * of_uar, of_uar), classes)
            assert found["uar"] == pytest.approx(tuple(expected))
    # A model that answers the first two of three classes alone: the third might have a few hits.
    target = np.repeat(np.arange(3), (9, 12, 7))
    found = metrics.recall_intervals(target, target % 2, 3, seed=0)
    low, high = exact(18, 18)[0], exact(0, 7)[1]
    assert found["uar"] == pytest.approx((low * 2 / 3, 2 / 3 + high / 3))
    low = exact(21, 21)[0]
    assert found["war"] == pytest.approx((low * 21 / 28, (21 + 7 * high) / 28))


def contrastive_loops(z_a, z_b):
    z = F.normalize(torch.cat([z_a, z_b]).double(), dim=1)
    n, m = len(z_a), 2 * len(z_a)
    hits = {1: 0, 5: 0}
    for i in range(m):
        positive = (i + n) % m
        nearer = sum(
            int(z[i] @ z[j] >= z[i] @ z[positive]) for j in range(m) if j not in (i, positive)
        )
        for k in hits:
            hits[k] += nearer < k
    pairs = [(-2 * (z[i] - z[j]).square().sum()).exp().item() for i in range(m) for j in range(i)]
    return {
        "top1": hits[1] / m,
        "top5": hits[5] / m,
        "alignment": (z[:n] - z[n:]).square().sum(1).mean().item(),
        "uniformity": math.log(sum(pairs) / len(pairs)),
    }


@pytest.mark.parametrize("n, tile", [(1, 1024), (2, 1), (3, 4), (13, 5), (40, 80), (40, 7)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_contrastive_equals_the_formulas(n, tile, dtype, tolerance):
    generator = torch.Generator().manual_seed(n)
    z_a = torch.randn(n, 6, generator=generator, dtype=dtype) * 3
    z_b = z_a + 2.5 * torch.randn(n, 6, generator=generator, dtype=dtype)
    scores = metrics.contrastive(z_a.requires_grad_(), z_b, tile=tile)
    assert scores == pytest.approx(contrastive_loops(z_a.detach(), z_b), abs=tolerance)
    assert all(type(value) is float for value in scores.values())
    if 2 * n - 1 <= 5:
        assert scores["top5"] == 1


def test_contrastive_counts_ties_and_nan_against_the_positive():
    basis = torch.eye(8)
    assert metrics.contrastive(basis, basis) == pytest.approx(
        {
            "top1": 1,
            "top5": 1,
            "alignment": 0,
            "uniformity": math.log((8 + 112 * math.exp(-4)) / 120),
        }
    )
    collapsed = torch.zeros(8, 4)
    collapsed[:, 0] = 1
    assert metrics.contrastive(collapsed, collapsed) == {
        "top1": 0,
        "top5": 0,
        "alignment": 0,
        "uniformity": 0,
    }
    broken = torch.full((8, 4), math.nan)
    scores = metrics.contrastive(broken, broken)
    assert scores["top1"] == scores["top5"] == 0 and math.isnan(scores["alignment"])


def test_contrastive_does_not_depend_on_the_length_of_the_rows():
    z_a, z_b = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)).double()
    scaled = metrics.contrastive(z_a * torch.linspace(1, 9, 20)[:, None], z_b / 3)
    assert scaled == pytest.approx(metrics.contrastive(z_a, z_b), abs=1e-12)
    half = metrics.contrastive(z_a.bfloat16(), z_b.bfloat16())
    assert half == pytest.approx(
        metrics.contrastive(z_a.bfloat16().float(), z_b.bfloat16().float()), abs=1e-12
    )


def test_effective_rank_is_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    for shape in ((50, 8), (8, 50), (2, 3), (9, 9)):
        x = torch.randn(shape, generator=generator) * torch.logspace(0, -1, shape[1]) + 5
        centered = x.double().numpy() - x.double().numpy().mean(0)
        variance = np.linalg.svd(np.cov(centered.T), compute_uv=False)
        share = variance[variance > 1e-12 * variance.max()] / variance.sum()
        expected = math.exp(-(share * np.log(share)).sum())
        assert metrics.effective_rank(x) == pytest.approx(expected, rel=1e-6)
        assert metrics.effective_rank(-3 * x + 1) == pytest.approx(expected, rel=1e-4)


def test_effective_rank_of_known_spectra():
    signs = torch.tensor([[a, b, c] for a in (-1.0, 1) for b in (-1.0, 1) for c in (-1.0, 1)])
    assert metrics.effective_rank(signs) == pytest.approx(3)
    assert metrics.effective_rank(signs * torch.tensor([1.0, 1, 0])) == pytest.approx(2)
    assert metrics.effective_rank(
        torch.arange(6.0)[:, None] * torch.tensor([[1.0, 2, 3]])
    ) == pytest.approx(1)
    assert metrics.effective_rank(torch.full((4, 3), 0.1)) == 0


def knn_setup(num_bank=60, num_queries=30, num_classes=4, dim=5):
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(num_classes, dim, generator=generator)
    labels = torch.randint(0, num_classes, (num_bank + num_queries,), generator=generator)
    x = centers[labels] + 0.9 * torch.randn(len(labels), dim, generator=generator)
    return (
        x[:num_bank].double(),
        labels[:num_bank],
        x[num_bank:].double(),
        labels[num_bank:],
        num_classes,
    )


@pytest.mark.parametrize("k", [1, 7, 60, 200])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_equals_a_double_loop(k, temperature):
    bank, bank_labels, queries, query_labels, num_classes = knn_setup()
    right = []
    for query, label in zip(queries, query_labels.tolist(), strict=True):
        similarity = [
            (F.cosine_similarity(query, row, dim=0).item(), i) for i, row in enumerate(bank)
        ]
        votes = [0.0] * num_classes
        for s, i in sorted(similarity, reverse=True)[:k]:
            votes[bank_labels[i]] += math.exp(s / temperature)
        right.append(max(range(num_classes), key=votes.__getitem__) == label)
    for tile in (4, 1024):
        hits = metrics.knn_hits(
            bank,
            bank_labels,
            queries,
            query_labels,
            num_classes,
            k=k,
            temperature=temperature,
            tile=tile,
        )
        assert hits.tolist() == right
    assert 0.3 < np.mean(right) < 1


def test_knn_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors", reason=ORACLE)
    bank, bank_labels, queries, query_labels, num_classes = knn_setup(300, 100)
    oracle = neighbors.KNeighborsClassifier(
        15,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance) / 0.07),
    )
    answers = oracle.fit(bank.numpy(), bank_labels.numpy()).predict(queries.numpy())
    hits = metrics.knn_hits(bank, bank_labels, queries, query_labels, num_classes, k=15)
    np.testing.assert_array_equal(hits, answers == query_labels.numpy())


def test_knn_survives_a_low_temperature():
    bank, bank_labels, queries, query_labels, num_classes = knn_setup()
    hits = metrics.knn_hits(
        bank.float(), bank_labels, queries.float(), query_labels, num_classes, temperature=1e-3
    )
    nearest = metrics.knn_hits(
        bank.float(), bank_labels, queries.float(), query_labels, num_classes, k=1
    )
    assert abs(hits.mean() - nearest.mean()) < 0.1


def test_representations_of_bad_shape_are_refused():
    x, labels = torch.randn(4, 3), [0, 1, 0, 1]
    for bad in (torch.empty(0, 3), torch.randn(4), torch.randn(2, 2, 2), [[1.0]]):
        with pytest.raises(ValueError, match="z_a must be a real tensor"):
            metrics.contrastive(bad, x)
        with pytest.raises(ValueError, match="features must be a real tensor"):
            metrics.effective_rank(bad)
        with pytest.raises(ValueError, match="queries must be a real tensor"):
            metrics.knn_hits(x, labels, bad, labels, 2)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3, 3\)"):
        metrics.contrastive(x, x[:3])
    with pytest.raises(ValueError, match="tile"):
        metrics.contrastive(x, x, tile=0)
    with pytest.raises(ValueError, match="at least 2 finite rows"):
        metrics.effective_rank(x[:1])
    with pytest.raises(ValueError, match="finite"):
        metrics.effective_rank(x * math.nan)
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        metrics.knn_hits(x, labels, x[:, :2], labels, 2)
    with pytest.raises(ValueError, match="one label a row"):
        metrics.knn_hits(x, labels, x, labels[:3], 2)
    with pytest.raises(ValueError, match="query_labels"):
        metrics.knn_hits(x, labels, x, [0, 1, 2, 0], 2)
    with pytest.raises(ValueError, match="temperature"):
        metrics.knn_hits(x, labels, x, labels, 2, temperature=0)


def labelings(count):
    """Pairs of labelings: random, related, single cluster, one row, all distinct, gaps in the
    numbers, C != K.
    """
    rng = np.random.default_rng(0)
    yield np.array([3]), np.array([0])
    for n in (2, 7, 60):
        distinct, one = rng.permutation(n), np.zeros(n, int)
        yield from ((distinct, distinct[::-1]), (one, one + 4), (one, distinct), (distinct, one))
        yield from (
            (rng.integers(0, 3, n), distinct),
            (distinct, rng.integers(0, 3, n)),
            (rng.integers(0, 3, n), one),
        )
    for _ in range(count):
        n, classes, clusters = rng.integers(2, 300), rng.integers(1, 15), rng.integers(1, 15)
        target = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 0.5)))
        noise = rng.choice(clusters, n, p=rng.dirichlet(np.full(clusters, 0.5)))
        yield target, np.where(rng.random(n) < rng.random(), target * 7 % 11 * 5, noise)


@pytest.mark.filterwarnings(
    "ignore:y_pred contains classes", "ignore:A single label", "ignore:The number of unique"
)
def test_scores_equal_scikit_learn():
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    optimize = pytest.importorskip("scipy.optimize", reason=ORACLE)
    for target, clusters in labelings(400):
        scores = metrics.clustering(target, torch.from_numpy(clusters.copy()))
        assert all(type(value) is float for value in scores.values())
        expected = {
            "nmi": oracle.normalized_mutual_info_score(target, clusters),
            "ari": oracle.adjusted_rand_score(target, clusters),
            "fmi": oracle.fowlkes_mallows_score(target, clusters),
        }
        if not len(np.unique(target)) == len(np.unique(clusters)) == len(target) > 1:
            expected["ami"] = oracle.adjusted_mutual_info_score(target, clusters)
        else:  # 0 / 0, where scikit-learn divides two rounding errors
            assert scores["ami"] == 1
        counts = metrics._contingency(target, clusters)[2]
        expected["acc"] = counts[optimize.linear_sum_assignment(-counts)].sum() / len(target)
        # Of several best matchings the scores take one; that one is scored here.
        found = metrics.match_clusters(target, clusters)
        assert len(found) == len(set(found.values())) == min(counts.shape)
        predicted = np.array([found.get(k, 999) for k in clusters])
        assert (predicted == target).mean() == pytest.approx(expected["acc"], abs=1e-12)
        expected["balanced_accuracy"] = oracle.balanced_accuracy_score(target, predicted)
        sizes = np.bincount(target)
        smallest = np.flatnonzero(sizes == sizes[sizes > 0].min())
        expected["minority_recall"] = oracle.recall_score(
            target, predicted, labels=smallest, average="macro"
        )
        for name, value in expected.items():
            assert scores[name] == pytest.approx(value, abs=1e-12), (name, target, clusters)


def test_scores_of_many_rows():
    # At 200,000 rows the pairs' products leave 64 bits, and log factorials lose digits.
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, 200_000)
    clusters = np.where(rng.random(200_000) < 0.6, target, rng.integers(0, 5, 200_000))
    scores = metrics.clustering(target, clusters)
    assert scores["ari"] == pytest.approx(oracle.adjusted_rand_score(target, clusters), abs=1e-12)
    assert scores["ami"] == pytest.approx(
        oracle.adjusted_mutual_info_score(target, clusters), abs=1e-9
    )


def test_linear_assignment_equals_scipy():
    optimize = pytest.importorskip("scipy.optimize", reason=ORACLE)
    rng = np.random.default_rng(0)
    for case in range(300):
        shape = rng.integers(1, 20, 2)
        cost = (
            rng.normal(size=shape) if case % 2 else rng.integers(-4, 4, shape)
        )  # integers: many ties
        rows, columns = metrics.linear_assignment(cost)
        assert len(rows) == min(shape) == len(set(columns)) and (np.diff(rows) > 0).all()
        assert cost[rows, columns].sum() == pytest.approx(
            cost[optimize.linear_sum_assignment(cost)].sum(), abs=1e-12
        )
    with pytest.raises(ValueError, match="finite matrix"):
        metrics.linear_assignment([[1.0, math.nan]])


@pytest.mark.parametrize(
    "target, clusters, message",
    [
        ([], [], "not empty"),
        ([0, 1], [0], "one length, got 2 and 1"),
        ([0, -1], [0, 1], "got -1 to 0"),
    ],
)
def test_bad_labels_are_refused(target, clusters, message):
    for score in (metrics.clustering, metrics.match_clusters):
        with pytest.raises(ValueError, match=message):
            score(target, clusters)


@pytest.mark.parametrize(
    "n, dim, clusters, tile", [(60, 3, 4, 7), (200, 40, 12, 1024), (30, 1, 29, 30), (5, 2, 2, 1)]
)
@pytest.mark.parametrize("offset", [0, 1e4])
def test_silhouette_equals_scikit_learn(n, dim, clusters, tile, offset):
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    rng = np.random.default_rng(n)
    labels = np.concatenate([np.arange(clusters), rng.integers(0, clusters, n - clusters)])
    x = rng.normal(size=(n, dim)) + rng.normal(size=(clusters, dim))[labels] + offset
    expected = oracle.silhouette_score(x, labels)
    assert metrics.silhouette(torch.from_numpy(x), labels * 3, tile=tile) == pytest.approx(
        expected, abs=1e-7
    )
    single = torch.from_numpy(x).float()
    expected = oracle.silhouette_score(single.double().numpy(), labels)
    assert metrics.silhouette(single, torch.from_numpy(labels), tile=tile) == pytest.approx(
        expected, abs=1e-4
    )


def test_silhouette_of_equal_rows_is_no_nan():
    assert metrics.silhouette(torch.zeros(6, 2), [0, 0, 0, 1, 1, 1]) == 0
    for labels in ([0] * 6, range(6)):
        with pytest.raises(ValueError, match="between 2 and 5 clusters"):
            metrics.silhouette(torch.randn(6, 2), labels)


def test_stability_is_the_mean_rand_index_of_pairs():
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    runs = np.random.default_rng(0).integers(0, 3, (4, 50))
    runs[1] = (runs[0] + 1) % 3  # the same partition under other numbers
    pairs = [oracle.adjusted_rand_score(runs[i], runs[j]) for i in range(4) for j in range(i)]
    assert metrics.stability(runs) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert metrics.stability(runs[:2]) == 1
    with pytest.raises(ValueError, match="at least 2"):
        metrics.stability(runs[:1])


def test_cluster_distances_are_those_of_loops():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double() + 50
    labels = [i % 4 for i in range(20)]
    means = [torch.stack([x[i] for i in range(20) if labels[i] == k]).mean(0) for k in range(4)]
    intra = [(x[i] - means[labels[i]]).norm().item() for i in range(20)]
    inter = [(means[i] - means[j]).norm().item() for i in range(4) for j in range(i)]
    found = metrics.cluster_distances(x, labels)
    assert found == pytest.approx({"intra": np.mean(intra), "inter": np.mean(inter)}, abs=1e-12)
    assert metrics.cluster_distances(x, [0] * 20)["inter"] == 0
    with pytest.raises(ValueError, match="one length, got 20 and 2"):
        metrics.cluster_distances(x, [0, 1])
