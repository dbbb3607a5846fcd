"""Scores of clusterings against scikit-learn and scipy."""

import math

import numpy as np
import pytest
import torch

from common import metrics

ORACLE = "pip install -r tests/requirements.txt"


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
        matches = metrics.match_clusters(target, clusters)
        assert len(matches) == len(set(matches.values())) == min(counts.shape)
        predicted = np.array([matches.get(k, 999) for k in clusters])
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
    distances = metrics.cluster_distances(x, labels)
    assert distances == pytest.approx({"intra": np.mean(intra), "inter": np.mean(inter)}, abs=1e-12)
    assert metrics.cluster_distances(x, [0] * 20)["inter"] == 0
    with pytest.raises(ValueError, match="one length, got 20 and 2"):
        metrics.cluster_distances(x, [0, 1])
