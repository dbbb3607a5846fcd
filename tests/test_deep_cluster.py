"""The choices and scores of deep clustering, against plain loops and scikit-learn."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import clustering, deep_cluster
from common.monitor import Monitor


@pytest.mark.parametrize("spread, expected", [(4, "discriminant"), (1, "euclidean")])
def test_the_metric_is_that_of_the_more_stable_clusters(spread, expected):
    """Four clusters on two axes: four wide ones hide them from the plain metric, which needs no
    learning otherwise.
    """
    rng, n = np.random.default_rng(0), 600
    corners = 4 * np.array([[1, 1], [-1, 1], [1, -1], [-1, -1]])[np.arange(n) % 4]
    z = np.concatenate([corners + rng.normal(size=(n, 2)), spread * rng.normal(size=(n, 4))], 1)
    rows = SimpleNamespace(pooled=lambda name: torch.from_numpy(z).float())
    basis = {"text": (torch.zeros(6), torch.ones(6), torch.eye(6))}
    found = deep_cluster.metric_stability(rows, np.arange(n), basis, 4, 0)
    assert max(found, key=found.get) == expected and set(found) == set(deep_cluster.DISTANCES)
    few = deep_cluster.metric_stability(rows, np.arange(500), basis, 4, 0)
    z[500:] = 1e3  # the test split
    assert deep_cluster.metric_stability(rows, np.arange(500), basis, 4, 0) == few


def test_tracking_is_spearman_s_correlation(tmp_path):
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    rng = np.random.default_rng(0)
    pairs = np.round(rng.random((12, 2)), 1)
    with open(tmp_path / "log.jsonl", "w") as file:
        for stable, nmi in pairs.tolist():
            line = {
                "stage": "cluster",
                "step": 0,
                "epoch": 0,
                "cluster/train/stability": stable,
                "cluster/train/nmi": nmi,
            }
            file.write(json.dumps(line) + "\n")
    run = SimpleNamespace(folder=tmp_path, world=SimpleNamespace(is_main=True))
    assert deep_cluster.tracking(run) == pytest.approx(stats.spearmanr(*pairs.T).statistic)


def test_centers_are_those_of_smooth_rows_and_rows_are_looked_up_as_they_are():
    metrics_of = pytest.importorskip("sklearn.metrics")
    rng, values = np.random.default_rng(0), []
    labels = rng.choice(3, 300, p=[0.7, 0.2, 0.1])
    z = (2 * np.eye(3, 6)[labels] + rng.normal(size=(300, 6))).astype(np.float32)
    for smoothing, neighbors in ((0.0, 1), (0.004, 1), (0.2, 20)):
        near = np.argsort(((z[:, None] - z) ** 2).sum(2), 1, kind="stable")[:, :neighbors]
        runs = [
            clustering.kmeans(torch.from_numpy(z[near].mean(1)), 3, seed=seed).centroids.numpy()
            for seed in (0, 1)
        ]
        clusters = [((z[:, None] - centroids) ** 2).sum(2).argmin(1) for centroids in runs]
        expected = np.mean([metrics_of.normalized_mutual_info_score(labels, c) for c in clusters])
        values.append(
            deep_cluster.score("x", torch.from_numpy(z), labels, 3, smoothing, seeds=2)["x/nmi"]
        )
        assert values[-1] == pytest.approx(expected, abs=1e-6)
    assert values[0] == values[1] and abs(values[2] - values[0]) > 1e-3


def test_monitor_figures_are_numbers():
    monitor = Monitor()
    for value in range(8):
        monitor.add(float(value))
    assert deep_cluster.figures(monitor)["performance_trend"] == 1
    assert all(isinstance(value, (int, float)) for value in deep_cluster.figures(monitor).values())
