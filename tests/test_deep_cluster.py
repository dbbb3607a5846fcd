"""The choices and scores of deep clustering, against plain loops and scikit-learn."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import clustering, deep_cluster, metrics
from common.models import umc
from common.monitor import Monitor
from common.report import cluster_analysis, clusters


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
            deep_cluster.score("x/", torch.from_numpy(z), labels, 3, smoothing, seeds=2)["x/nmi"]
        )
        assert values[-1] == pytest.approx(expected, abs=1e-6)
    assert values[0] == values[1] and abs(values[2] - values[0]) > 1e-3


@pytest.mark.parametrize("count", [5, 12, 40])
def test_a_trajectory_is_a_line_with_student_s_interval(count):
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    rng = np.random.default_rng(0)
    points = [(e, 0.2 + 0.003 * e + 0.01 * rng.normal()) for e in range(count)]
    rows = cluster_analysis.trajectory("nmi", points)
    x, y = np.array(points[-20:]).T
    line = stats.linregress(x, y)
    noise = np.sqrt(((y - line.intercept - line.slope * x) ** 2).sum() / (len(x) - 2))
    assert [row[1] for row in rows] == [round(1.5 * x[-1]), round(2 * x[-1])]
    for _, epoch, middle, ends in rows:
        expected = line.intercept + line.slope * epoch
        off = 1 + 1 / len(x) + (epoch - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
        reach = stats.t.ppf(0.975, len(x) - 2) * noise * np.sqrt(off)
        low, high = map(float, ends.split(" to "))
        assert float(middle) == pytest.approx(expected, abs=6e-4)
        assert (low, high) == pytest.approx((expected - reach, expected + reach), abs=0.005)
    assert "fewer than 5" in cluster_analysis.trajectory("nmi", points[:4])[0][2]


def test_centers_begin_where_the_graph_is_cut_or_where_they_were():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(300, 4), 0.1 * torch.randn(30, 4) + 6, 0.1 * torch.randn(30, 4) + 9])
    labels = torch.tensor([0] * 300 + [1] * 30 + [2] * 30)
    spec = {"k": 3, "smoothing": 0.1, "neighbors": 0.1}
    poor = torch.stack([x[0], x[1], x[300:].mean(0)])  # two centers in the large one
    found = deep_cluster.centers(x, spec, 0, poor)
    assert metrics.clustering(labels, clustering.nearest(x, found)[0])["ari"] == 1
    assert torch.equal(found, deep_cluster.centers(x, spec, 0, 9 * poor))
    smooth = deep_cluster.smooth(x, 3, 0.1)
    plain = deep_cluster.centers(x, spec | {"neighbors": 0.0}, 0, poor)
    expected = clustering.kmeans(smooth, 3, start=poor).centroids
    torch.testing.assert_close(plain, expected, atol=1e-3, rtol=0)
    assert metrics.clustering(labels, clustering.nearest(x, plain)[0])["ari"] < 0.7


def act_like(n):
    """Rows (n, 6) of five uneven clusters that overlap, and their labels."""
    rng = np.random.default_rng(0)
    labels = rng.choice(5, n, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    z = 3.5 * np.eye(5, 6)[labels] + rng.normal(size=(n, 6))
    return torch.from_numpy(z).float(), labels


def clustered(z, k):
    """Clusters of the rows z as an evaluation leaves them, and the rows that an epoch selects."""
    found, metric = umc.discriminant_kmeans(z, k, 0.1, 0, torch.eye(z.shape[1]), None)
    z = z @ metric
    centroids = clustering.kmeans(deep_cluster.smooth(z, k, 0.1), k).centroids
    selected = clustering.select(z, found.labels, k, 0.3).indices
    return clustering.nearest(z, centroids)[0].numpy(), torch.cat(selected)


def test_landmarks_find_the_clusters_of_all_rows(monkeypatch):
    metrics_of = pytest.importorskip("sklearn.metrics")
    z, labels = act_like(5000)
    exact, selected = clustered(z, 5)
    monkeypatch.setattr(clustering, "LANDMARKS", 1500)
    monkeypatch.setattr(clustering, "_FELLOWS", 300)
    ours, sampled = clustered(z, 5)
    assert len(ours) == 5000 and len(sampled) == len(selected)
    nmi = [metrics_of.normalized_mutual_info_score(labels, found) for found in (exact, ours)]
    assert abs(nmi[0] - nmi[1]) < 0.02 and nmi[0] > 0.6
    assert not np.array_equal(exact, ours)


class Work(TorchDispatchMode):
    """Counts the numbers that operations give, and the most that one of them gives."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if not func.is_view:
            self.total += sum(sizes)
            self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("balance", ["even", "one cluster"])
def test_twice_the_rows_are_twice_the_work(balance, monkeypatch):
    monkeypatch.setattr(clustering, "LANDMARKS", 256)
    monkeypatch.setattr(clustering, "_FELLOWS", 64)
    monkeypatch.setattr(clustering, "_TILE", 1 << 14)
    monkeypatch.setattr(deep_cluster, "METRIC_RUNS", 1)
    basis = {"text": (torch.zeros(6), torch.ones(6), torch.eye(6))}
    spec = {"k": 5, "smoothing": 0.1, "neighbors": 0.1}
    work = {}
    for n in (2000, 4000):
        z, _ = act_like(n)
        labels = torch.arange(n) % 5 if balance == "even" else torch.zeros(n, dtype=torch.int64)
        rows = SimpleNamespace(pooled=lambda name, z=z: z)
        with Work() as counted:
            deep_cluster.metric_stability(rows, np.arange(n), basis, 5, 0)
            clustering.select(z, labels, 5, 0.3)
            deep_cluster.smooth(z, 2, 1.0)
            deep_cluster.centers(z, spec, 0, z[:5])
            deep_cluster.stability(z, 5, 0)
        work[n] = counted
    assert work[4000].total < 2.1 * work[2000].total
    assert work[4000].largest < 40 * 4000


def test_principal_axes_are_those_that_rows_differ_along():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    flat = torch.cat([x, x[:, :1], torch.ones(50, 1)], 1)
    assert deep_cluster.principal(flat).shape == (50, 3)
    distances = torch.pdist(flat)
    torch.testing.assert_close(torch.pdist(deep_cluster.principal(flat)), distances)
    assert deep_cluster.principal(torch.ones(9, 4)).shape == (9, 1)
    assert deep_cluster.principal(x[:, :1]).shape == (50, 1)
    wide = torch.ones(2, umc.WIDE + 1)
    assert deep_cluster.principal(wide) is wide


def test_the_report_shows_utterances_of_one_text_once():
    texts = ["Hey!", "hey!", "No.", "Hey!", "Yes."]
    labels, found = np.array([0, 0, 1, 0, 1]), np.array([1, 1, 0, 1, 1])
    table = SimpleNamespace(texts=texts, ids=list("abcde"), labels=labels, classes=["g", "s"])
    sure = np.array([0.7, 0.8, 0.9, 0.6, 0.5])
    rows = clusters.mistakes(table, np.arange(5), found, sure, {0: 0, 1: 1})["rows"]
    wrong = [row[1] for row in rows if row[0] == "confident and wrong"]
    assert wrong == ["No. (c)", "hey! (b)"]
    assert [row[1] for row in rows[2:]] == ["Yes. (e)", "Hey! (d)", "No. (c)"]
    table.texts = None
    assert len(clusters.mistakes(table, np.arange(5), found, sure, {0: 0, 1: 1})["rows"]) == 4 + 5


def test_monitor_figures_are_numbers():
    monitor = Monitor()
    for value in range(8):
        monitor.add(float(value))
    assert deep_cluster.figures(monitor)["performance_trend"] == 1
    assert all(isinstance(value, (int, float)) for value in deep_cluster.figures(monitor).values())
