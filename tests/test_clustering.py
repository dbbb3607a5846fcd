"""k-means, assignment rules, selection and the number of clusters against scikit-learn, scipy and plain loops."""

import math

import numpy as np
import pytest
import torch

from common import clustering, config

ORACLE = "pip install -r tests/requirements.txt"


def mixture(n, k, dim, spread=1.0, seed=0, balance=None):
    """Rows (n, dim) fp32 around k centres whose distance is about `spread` times that of a row, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=balance)
    centres = rng.normal(size=(k, dim)) * spread
    return torch.from_numpy((centres[labels] + rng.normal(size=(n, dim))).astype(np.float32)), labels


SHAPES = {
    "clear": lambda: (mixture(600, 8, 3, 6.0)[0], 8),
    "overlapping": lambda: (mixture(1500, 12, 200, 0.2)[0], 12),
    "no structure": lambda: (mixture(1000, 1, 20)[0], 10),
    "one column": lambda: (mixture(400, 5, 1, 4.0)[0], 5),
    "wide": lambda: (mixture(300, 6, 768, 0.5)[0], 6),
    "unbalanced": lambda: (mixture(1000, 4, 16, 1.0, balance=[0.9, 0.06, 0.03, 0.01])[0], 4),
    "few values": lambda: (torch.from_numpy(np.random.default_rng(0).integers(0, 3, (300, 3))).float(), 9),
    "far off": lambda: (mixture(600, 8, 3, 6.0)[0] + 1e4, 8),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_inertia_is_within_a_percent_of_scikit_learn(shape):
    cluster = pytest.importorskip("sklearn.cluster", reason=ORACLE)
    x, k = SHAPES[shape]()
    oracle = cluster.KMeans(k, n_init=10, random_state=0).fit(x.double().numpy())
    found = clustering.kmeans(x, k, restarts=10)
    assert found.inertia <= 1.01 * oracle.inertia_
    # What is returned fits together, to the rounding of the rows' dtype.
    assert found.labels.dtype == torch.int64 and found.labels.bincount(minlength=k).min() > 0
    own = (x.double() - found.centroids.double()[found.labels]).square().sum(1)
    assert found.inertia == pytest.approx(own.sum().item(), rel=1e-3 if shape == "far off" else 1e-5)
    least = torch.cdist(x.double(), found.centroids.double()).amin(1).square()
    assert own.sum().item() == pytest.approx(least.sum().item(), rel=1e-3 if shape == "far off" else 1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_warm_start_follows_scikit_learn(weighted):
    cluster = pytest.importorskip("sklearn.cluster", reason=ORACLE)
    x = mixture(500, 6, 10)[0].double()
    weights = np.random.default_rng(1).integers(0, 4, 500).astype(float) if weighted else None
    settings = dict(n_init=1, tol=1e-8, max_iter=300)
    oracle = cluster.KMeans(6, init=x[:6].numpy(), **settings).fit(x.numpy(), sample_weight=weights)
    found = clustering.kmeans(x, 6, start=x[:6], weights=weights, tolerance=1e-8)
    np.testing.assert_array_equal(found.labels, oracle.labels_)
    np.testing.assert_allclose(found.centroids, oracle.cluster_centers_, atol=1e-10)
    assert found.inertia == pytest.approx(oracle.inertia_, rel=1e-12)
    again = clustering.kmeans(x, 6, start=found.centroids, weights=weights)
    assert again.iterations == 1 and torch.equal(again.labels, found.labels)


def test_a_whole_weight_counts_as_so_many_rows():
    x, _ = mixture(200, 4, 5, 3.0)
    weights = torch.arange(200) % 3
    found = clustering.kmeans(x, 4, weights=weights)
    repeated = clustering.kmeans(x.repeat_interleave(weights, 0), 4)
    assert found.inertia == pytest.approx(repeated.inertia, rel=1e-5)


def test_result_depends_on_the_arguments_alone():
    x, _ = mixture(400, 5, 8, 0.5)
    torch.manual_seed(0)
    first = clustering.kmeans(x, 5, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    np.random.seed(1)
    again = clustering.kmeans(x, 5, seed=3)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(first, again, strict=True))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    others = [clustering.kmeans(x, 5, seed=seed, restarts=1) for seed in range(8)]
    assert len({run.inertia for run in others}) > 1
    inertia = [clustering.kmeans(x, 5, restarts=restarts).inertia for restarts in range(1, 9)]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(inertia, inertia[1:], strict=False)) and inertia[-1] < inertia[0]


def test_blocks_and_groups_do_not_change_the_result(monkeypatch):
    x, _ = mixture(300, 5, 8, 3.0)
    whole = clustering.kmeans(x, 5)
    monkeypatch.setattr(clustering, "_TILE", 700)
    monkeypatch.setattr(clustering, "_GROUP", 2000)
    parts = clustering.kmeans(x, 5)
    assert torch.equal(parts.labels, whole.labels)
    torch.testing.assert_close(parts.centroids, whole.centroids)


@pytest.mark.parametrize("dim", [1, 3, 200, 768])
def test_as_many_clusters_as_rows(dim):
    x = torch.randn(40, dim, generator=torch.Generator().manual_seed(0))
    found = clustering.kmeans(x, 40)
    assert sorted(found.labels.tolist()) == list(range(40)) and found.inertia < 1e-8


@pytest.mark.parametrize("distinct, k", [(1, 4), (3, 5), (5, 5)])
def test_equal_rows_leave_no_cluster_empty(distinct, k):
    values = torch.randn(distinct, 4, generator=torch.Generator().manual_seed(0)) * 3 + 100
    x = values[torch.arange(60) % distinct]
    found = clustering.kmeans(x, k)
    assert found.labels.bincount(minlength=k).min() > 0 and found.inertia < 1e-6
    for cluster in range(k):
        assert (x[found.labels == cluster] == x[found.labels == cluster][0]).all()


def test_an_empty_cluster_takes_the_farthest_row():
    x, _ = mixture(200, 2, 2, 5.0)
    x[17] = torch.tensor([500.0, 500.0])
    start = torch.cat([x[:2], torch.full((1, 2), -1e6)])  # nothing is nearest to the third
    found = clustering.kmeans(x, 3, start=start)
    assert (found.labels == found.labels[17]).sum() == 1 and found.labels.bincount().tolist()[2] > 0


@pytest.mark.parametrize("seed", range(3))
def test_spherical_clusters_by_direction(seed):
    rng = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(6, 16, generator=rng))
    labels = torch.arange(600) % 6
    x = directions[labels] + 0.05 * torch.randn(600, 16, generator=rng)
    stretched = x * torch.rand(600, 1, generator=rng).add(0.01) * 50
    found = clustering.kmeans(stretched, 6, spherical=True)
    pairs = {(a, b) for a, b in zip(labels.tolist(), found.labels.tolist(), strict=True)}
    assert len(pairs) == 6
    assert found.centroids.norm(dim=1) == pytest.approx(torch.ones(6), abs=1e-6)
    cosine = (torch.nn.functional.normalize(x) * found.centroids[found.labels]).sum(1)
    assert found.inertia == pytest.approx((2 - 2 * cosine).sum().item(), rel=1e-4)
    assert torch.equal(found.labels, clustering.kmeans(x, 6, spherical=True).labels)


def test_nearest_equals_a_loop():
    x, _ = mixture(50, 3, 7)
    centroids = x[:5] + 0.1
    for offset in (0.0, 1e4):
        labels, distance = clustering.nearest((x + offset), centroids + offset)
        every = torch.stack([torch.stack([(row - c).norm() for c in centroids]) for row in x])
        assert torch.equal(labels, every.argmin(1))
        assert torch.allclose(distance, every.amin(1), atol=2e-3 if offset else 1e-5)
    with pytest.raises(ValueError, match="one width, got 7 and 3"):
        clustering.nearest(x, centroids[:, :3])


def test_kmeans_refuses_what_it_cannot_do():
    x = torch.randn(10, 3)
    with pytest.raises(config.InputError, match="11 clusters need as many rows, got 10"):
        clustering.kmeans(x, 11)
    with pytest.raises(config.InputError, match="5 clusters need as many rows, got 4"):
        clustering.kmeans(x, 5, weights=[1.0] * 4 + [0.0] * 6)
    bad = x.clone()
    bad[[2, 7], 1] = torch.tensor([math.nan, math.inf])
    with pytest.raises(config.InputError, match="2 of 10 rows hold nan or infinity: 2, 7"):
        clustering.kmeans(bad, 2)
    for weights in ([1.0] * 9, [-1.0] * 10, [math.nan] * 10):
        with pytest.raises(ValueError, match="weights must be 10 finite numbers"):
            clustering.kmeans(x, 2, weights=weights)
    with pytest.raises(ValueError, match=r"start must have shape \(2, 3\), got \(3, 3\)"):
        clustering.kmeans(x, 2, start=x[:3])
    for setting in ({"k": 0}, {"restarts": 0}, {"max_iterations": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="at least 1"):
            clustering.kmeans(x, **({"k": 2} | setting))
    for shape in ((0, 3), (4,)):
        with pytest.raises(ValueError, match="real tensor"):
            clustering.kmeans(torch.zeros(shape), 1)


@pytest.mark.gpu
def test_kmeans_on_a_gpu():
    x, k = SHAPES["overlapping"]()
    cpu, gpu = (clustering.kmeans(x.to(device), k) for device in ("cpu", "cuda"))
    assert gpu.labels.device.type == "cuda" and gpu.inertia == pytest.approx(cpu.inertia, rel=0.01)
    torch.use_deterministic_algorithms(True)
    try:
        again = clustering.kmeans(x.cuda(), k)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again.labels, gpu.labels) and torch.equal(again.centroids, gpu.centroids)
    clear, k = SHAPES["clear"]()
    assert torch.equal(clustering.kmeans(clear.cuda(), k).labels.cpu(), clustering.kmeans(clear, k).labels)
