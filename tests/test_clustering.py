"""k-means, assignment rules, selection and the number of clusters against scikit-learn, scipy and
plain loops.
"""

import math

import numpy as np
import pytest
import torch

from common import clustering, metrics
from common.errors import InputError

ORACLE = "pip install -r tests/requirements.txt"


def mixture(n, k, dim, spread=1.0, seed=0, balance=None):
    """Rows (n, dim) fp32 around k centers whose distance is about `spread` times that of a row, and
    their labels.
    """
    rng = np.random.default_rng(seed)
    labels = rng.choice(k, n, p=balance)
    centers = rng.normal(size=(k, dim)) * spread
    return torch.from_numpy(
        (centers[labels] + rng.normal(size=(n, dim))).astype(np.float32)
    ), labels


SHAPES = {
    "clear": lambda: (mixture(600, 8, 3, 6.0)[0], 8),
    "overlapping": lambda: (mixture(1500, 12, 200, 0.2)[0], 12),
    "no structure": lambda: (mixture(1000, 1, 20)[0], 10),
    "one column": lambda: (mixture(400, 5, 1, 4.0)[0], 5),
    "wide": lambda: (mixture(300, 6, 768, 0.5)[0], 6),
    "unbalanced": lambda: (mixture(1000, 4, 16, 1.0, balance=[0.9, 0.06, 0.03, 0.01])[0], 4),
    "few values": lambda: (
        torch.from_numpy(np.random.default_rng(0).integers(0, 3, (300, 3))).float(),
        9,
    ),
    "far off": lambda: (mixture(600, 8, 3, 6.0)[0] + 1e4, 8),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_inertia_is_within_a_percent_of_scikit_learn(shape):
    cluster = pytest.importorskip("sklearn.cluster", reason=ORACLE)
    x, k = SHAPES[shape]()
    oracle = cluster.KMeans(k, n_init=10, random_state=0).fit(x.double().numpy())
    result = clustering.kmeans(x, k, restarts=10)
    assert result.inertia <= 1.01 * oracle.inertia_
    # What is returned fits together, to the rounding of the rows' dtype.
    assert result.labels.dtype == torch.int64 and result.labels.bincount(minlength=k).min() > 0
    squares = (x.double() - result.centroids.double()[result.labels]).square().sum(1)
    assert result.inertia == pytest.approx(
        squares.sum().item(), rel=1e-3 if shape == "far off" else 1e-5
    )
    least = torch.cdist(x.double(), result.centroids.double()).amin(1).square()
    assert squares.sum().item() == pytest.approx(
        least.sum().item(), rel=1e-3 if shape == "far off" else 1e-6
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_warm_start_follows_scikit_learn(weighted):
    cluster = pytest.importorskip("sklearn.cluster", reason=ORACLE)
    x = mixture(500, 6, 10)[0].double()
    weights = np.random.default_rng(1).integers(0, 4, 500).astype(float) if weighted else None
    settings = dict(n_init=1, tol=1e-8, max_iter=300)
    oracle = cluster.KMeans(6, init=x[:6].numpy(), **settings).fit(x.numpy(), sample_weight=weights)
    result = clustering.kmeans(x, 6, start=x[:6], weights=weights, tolerance=1e-8)
    np.testing.assert_array_equal(result.labels, oracle.labels_)
    np.testing.assert_allclose(result.centroids, oracle.cluster_centers_, atol=1e-10)
    assert result.inertia == pytest.approx(oracle.inertia_, rel=1e-12)
    again = clustering.kmeans(x, 6, start=result.centroids, weights=weights)
    assert again.iterations == 1 and torch.equal(again.labels, result.labels)


def test_a_whole_weight_counts_as_so_many_rows():
    x, _ = mixture(200, 4, 5, 3.0)
    weights = torch.arange(200) % 3
    result = clustering.kmeans(x, 4, weights=weights)
    repeated = clustering.kmeans(x.repeat_interleave(weights, 0), 4)
    assert result.inertia == pytest.approx(repeated.inertia, rel=1e-5)


def test_result_depends_on_the_arguments_alone():
    x, _ = mixture(400, 5, 8, 0.5)
    torch.manual_seed(0)
    first = clustering.kmeans(x, 5, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    np.random.seed(1)
    again = clustering.kmeans(x, 5, seed=3)
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(first, again, strict=True)
    )
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    others = [clustering.kmeans(x, 5, seed=seed, restarts=1) for seed in range(8)]
    assert len({run.inertia for run in others}) > 1
    inertia = [clustering.kmeans(x, 5, restarts=restarts).inertia for restarts in range(1, 9)]
    assert (
        all(b <= a * (1 + 1e-6) for a, b in zip(inertia, inertia[1:], strict=False))
        and inertia[-1] < inertia[0]
    )


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
    result = clustering.kmeans(x, 40)
    assert sorted(result.labels.tolist()) == list(range(40)) and result.inertia < 1e-8


@pytest.mark.parametrize("distinct, k", [(1, 4), (3, 5), (5, 5)])
def test_equal_rows_leave_no_cluster_empty(distinct, k):
    values = torch.randn(distinct, 4, generator=torch.Generator().manual_seed(0)) * 3 + 100
    x = values[torch.arange(60) % distinct]
    result = clustering.kmeans(x, k)
    assert result.labels.bincount(minlength=k).min() > 0 and result.inertia < 1e-6
    for cluster in range(k):
        assert (x[result.labels == cluster] == x[result.labels == cluster][0]).all()


@pytest.mark.parametrize("rows", [60, 300, 3000])
def test_among_equal_rows_a_run_ends_at_once(rows):
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        result = clustering.kmeans(values[torch.arange(rows) % 3], 5, seed=seed)
        assert result.iterations <= 3 and result.labels.bincount(minlength=5).min() > 0


def test_an_empty_cluster_takes_the_farthest_row():
    x, _ = mixture(200, 2, 2, 5.0)
    x[17] = torch.tensor([500.0, 500.0])
    start = torch.cat([x[:2], torch.full((1, 2), -1e6)])  # nothing is nearest to the third
    result = clustering.kmeans(x, 3, start=start)
    assert (result.labels == result.labels[17]).sum() == 1 and result.labels.bincount().tolist()[
        2
    ] > 0


@pytest.mark.parametrize("seed", range(3))
def test_spherical_clusters_by_direction(seed):
    rng = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(6, 16, generator=rng))
    labels = torch.arange(600) % 6
    x = directions[labels] + 0.05 * torch.randn(600, 16, generator=rng)
    stretched = x * torch.rand(600, 1, generator=rng).add(0.01) * 50
    result = clustering.kmeans(stretched, 6, spherical=True)
    pairs = {(a, b) for a, b in zip(labels.tolist(), result.labels.tolist(), strict=True)}
    assert len(pairs) == 6
    assert result.centroids.norm(dim=1) == pytest.approx(torch.ones(6), abs=1e-6)
    cosine = (torch.nn.functional.normalize(x) * result.centroids[result.labels]).sum(1)
    assert result.inertia == pytest.approx((2 - 2 * cosine).sum().item(), rel=1e-4)
    assert torch.equal(result.labels, clustering.kmeans(x, 6, spherical=True).labels)


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


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("count", [1, 2, 7, 60, 99])
def test_smoothing_equals_scipy(count, offset, monkeypatch):
    spatial = pytest.importorskip("scipy.spatial", reason=ORACLE)
    monkeypatch.setattr(clustering, "_TILE", 60 * 13)  # blocks of 13 rows
    x, _ = mixture(60, 3, 7)
    _, near = spatial.KDTree(x.numpy()).query(x.numpy(), k=min(count, 60))
    expected = x.double()[torch.from_numpy(near).view(60, -1)].mean(1)
    got = clustering.smooth(x + offset, clustering.neighbors(x + offset, count))
    assert torch.allclose(got.double() - offset, expected, atol=1e-2 if offset else 1e-5)


def test_smoothing_leaves_a_row_among_its_equals():
    x = mixture(4, 1, 7)[0].repeat(6, 1)
    assert torch.allclose(clustering.smooth(x, clustering.neighbors(x, 6)), x, atol=1e-6)


def test_smoothing_parts_clusters_that_touch():
    plain, smoothed = [], []
    for seed in range(3):
        x, labels = mixture(2000, 4, 5, 0.0, seed=seed, balance=[0.7, 0.15, 0.1, 0.05])
        x += 3 * torch.eye(4, 5)[torch.from_numpy(labels)]
        near = clustering.neighbors(x, 50)
        centroids = clustering.kmeans(clustering.smooth(x, near), 4).centroids
        smoothed.append(metrics.clustering(labels, clustering.nearest(x, centroids)[0])["ari"])
        plain.append(metrics.clustering(labels, clustering.kmeans(x, 4).labels)["ari"])
    assert np.mean(smoothed) > np.mean(plain) + 0.05


def test_a_row_has_at_least_itself_as_a_neighbor():
    with pytest.raises(ValueError, match="count must be at least 1, the row itself, got 0"):
        clustering.neighbors(torch.ones(3, 2), 0)


def rings(counts=(100, 200), seed=0):
    """Rows (n, 2) on circles around each other, which no two centers tell apart; and their ring."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    angle = rng.uniform(0, 2 * np.pi, len(labels))
    x = (1 + 2 * labels[:, None]) * np.stack([np.cos(angle), np.sin(angle)], 1)
    return torch.from_numpy(x + 0.1 * rng.normal(size=x.shape)).float(), labels


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_cuts_are_those_of_scikit_learn(offset, monkeypatch):
    cluster = pytest.importorskip("sklearn.cluster", reason=ORACLE)
    monkeypatch.setattr(clustering, "_TILE", 300 * 17)  # blocks of 17 rows
    x, rings_of = rings()
    ours = clustering.spectral(clustering.neighbors(x + offset, 12), 2)
    oracle = cluster.SpectralClustering(
        2, affinity="nearest_neighbors", n_neighbors=12, random_state=0
    )
    for labels in (rings_of, oracle.fit(x.numpy()).labels_):
        assert metrics.clustering(labels, ours)["ari"] == 1
    assert metrics.clustering(rings_of, clustering.kmeans(x, 2).labels)["ari"] < 0.2


@pytest.mark.parametrize("count, size", [(3, 200), (11, 200), (30, 30)])
def test_leading_eigenvectors_are_numpy_s(count, size):
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = np.concatenate([np.linspace(1, 0.97, count), np.linspace(0.9, -1, size - count)])
    matrix = axes * values @ axes.T
    ours = clustering._leading_eigenvectors(torch.from_numpy(matrix), count, 0).numpy()
    assert ours.shape == (size, count)
    expected = np.linalg.eigh(matrix)[1][:, ::-1][:, :count]
    assert np.abs(ours @ ours.T - expected @ expected.T).max() < 1e-6


def test_cuts_leave_a_large_cluster_whole():
    """Where one class holds most rows k-means splits it and joins small ones."""
    cut, split = [], []
    for seed in range(3):
        x, labels = mixture(1500, 5, 8, 0.0, seed=seed, balance=[0.8, 0.05, 0.05, 0.05, 0.05])
        x += 4 * torch.eye(5, 8)[torch.from_numpy(labels)]
        x[torch.from_numpy(labels == 0), 5] *= 4  # the large one is wide, too
        near = clustering.neighbors(x, 20)
        found = (clustering.spectral(near, 5, seed=seed), clustering.kmeans(x, 5).labels)
        for scores, clusters in zip((cut, split), found, strict=True):
            scores.append(metrics.clustering(labels, clusters)["ari"])
    assert min(cut) > max(split) + 0.1


@pytest.mark.parametrize(
    "x, k, count",
    [
        (torch.zeros(6, 2), 5, 3),
        (torch.eye(3).repeat(20, 1), 5, 10),
        (torch.randn(5, 3), 5, 99),
        (torch.randn(7, 1), 1, 2),
    ],
)
def test_few_and_equal_rows_are_cut_into_so_many_clusters(x, k, count):
    near = clustering.neighbors(x, count)
    labels = clustering.spectral(near, k)
    assert labels.unique().tolist() == list(range(k)) and len(labels) == len(x)
    assert torch.equal(labels, clustering.spectral(near, k))


def test_a_row_needs_a_neighbor_to_be_cut_from():
    with pytest.raises(ValueError, match="near must have 2 columns, the row itself and one"):
        clustering.spectral(torch.arange(3)[:, None], 2)
    with pytest.raises(InputError, match="4 clusters need as many rows, got 3"):
        clustering.spectral(torch.tensor([[0, 1], [1, 0], [2, 0]]), 4)


def test_kmeans_refuses_what_it_cannot_do():
    x = torch.randn(10, 3)
    with pytest.raises(InputError, match="11 clusters need as many rows, got 10"):
        clustering.kmeans(x, 11)
    with pytest.raises(InputError, match="5 clusters need as many rows, got 4"):
        clustering.kmeans(x, 5, weights=[1.0] * 4 + [0.0] * 6)
    bad = x.clone()
    bad[[2, 7], 1] = torch.tensor([math.nan, math.inf])
    with pytest.raises(InputError, match="2 of 10 rows hold nan or infinity: 2, 7"):
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
    assert torch.equal(
        clustering.kmeans(clear.cuda(), k).labels.cpu(), clustering.kmeans(clear, k).labels
    )


def brute_force_selection(x, share, floor, direction):
    """Rows of one cluster: neighbor lists, densities and scores by loops."""
    x = x.double().numpy()
    n = len(x)
    m = min(max(math.floor(share * n + 1e-9), floor, 1), n)
    best = None
    for percent in range(10, 32, 2):
        neighbors = max(percent * n // 100, 1)
        reach = []
        for i in range(n):
            distances = sorted(np.linalg.norm(x[i] - x[j]) for j in range(n) if j != i)
            reach.append(np.mean(distances[:neighbors]))
        densest = sorted(range(n), key=lambda i: (reach[i], i))[:m]
        score = np.mean(
            [
                min([np.linalg.norm(x[i] - x[j]) for j in densest if j != i], default=0)
                for i in densest
            ]
        )
        if best is None or (
            score > best[0] + 1e-12 if direction == "largest" else score < best[0] - 1e-12
        ):
            best = score, sorted(densest), percent / 100
    return best[1:]


@pytest.mark.parametrize("direction", ["largest", "smallest"])
@pytest.mark.parametrize(
    "share, floor", [(0.1, 1), (0.29, 1), (0.02, 9), (0.5, 30), (0.9, 1), (0.02, 1)]
)
def test_selection_equals_brute_force(direction, share, floor, monkeypatch):
    x, labels = mixture(170, 4, 4, 2.0, balance=[0.6, 0.25, 0.13, 0.02])
    x[::9] *= 3  # outliers
    labels[labels == 2] = 5  # 2 is empty
    result = clustering.select(x, labels, 6, share, floor=floor, direction=direction)
    assert len(result.indices) == len(result.fractions) == 6
    for cluster in (0, 1, 3, 5):
        rows = np.flatnonzero(labels == cluster)
        expected, fraction = brute_force_selection(x[rows], share, floor, direction)
        assert result.indices[cluster].tolist() == rows[expected].tolist()
        assert result.fractions[cluster] == (None if len(expected) == len(rows) else fraction)
    assert result.indices[2].tolist() == [] and result.fractions[2] is None
    for limit in ("_TILE", "_GROUP"):  # blocks; blocks that are computed twice
        monkeypatch.setattr(clustering, limit, 500)
        again = clustering.select(x, labels, 6, share, floor=floor, direction=direction)
        assert again.fractions == result.fractions
        assert all(torch.equal(a, b) for a, b in zip(again.indices, result.indices, strict=True))


def test_landmarks_are_a_fixed_sample_in_order():
    x = torch.arange(3000)
    assert clustering.landmarks(x, 3000) is x
    sample = clustering.landmarks(x, 1000)
    assert len(sample) == 1000 and torch.equal(sample, sample.unique())
    assert torch.equal(clustering.landmarks(x[:, None].expand(-1, 2), 1000)[:, 1], sample)
    # Speakers take turns: a sample of every second utterance would be one of them.
    assert (
        abs((sample % 2).double().mean() - 0.5) < 0.05 and abs(sample.double().mean() - 1500) < 80
    )


@pytest.mark.parametrize("direction", ["largest", "smallest"])
def test_selection_among_a_sample_takes_dense_rows(direction, monkeypatch):
    """scikit-learn's neighbors say how dense the rows are that are taken."""
    neighbors = pytest.importorskip("sklearn.neighbors", reason=ORACLE)
    x, labels = mixture(3000, 3, 6, 2.0, balance=[0.6, 0.3, 0.1])
    exact = clustering.select(x, labels, 3, 0.3, direction=direction)
    monkeypatch.setattr(clustering, "LANDMARKS", 1000)
    monkeypatch.setattr(clustering, "_FELLOWS", 400)
    sampled = clustering.select(x, labels, 3, 0.3, direction=direction)
    assert torch.equal(exact.indices[2], sampled.indices[2])  # of 300 rows all are compared
    for cluster in (0, 1):
        rows = np.flatnonzero(labels == cluster)
        near = neighbors.NearestNeighbors(n_neighbors=len(rows) // 5).fit(x[rows].numpy())
        reach = near.kneighbors()[0].mean(1)
        ours, densest = (np.isin(rows, s.indices[cluster].numpy()) for s in (sampled, exact))
        assert ours.sum() == densest.sum() == int(0.3 * len(rows))
        excess = reach[ours].mean() - reach[densest].mean()
        assert abs(excess) < 0.05 * (reach.mean() - reach[densest].mean())


def test_the_directions_differ_and_more_share_takes_more():
    x, labels = mixture(400, 2, 6, 1.0)
    picked = {d: clustering.select(x, labels, 2, 0.2, direction=d) for d in ("largest", "smallest")}
    assert picked["largest"].fractions != picked["smallest"].fractions
    for share in (0.1, 0.35, 1.0):
        sizes = [len(i) for i in clustering.select(x, labels, 2, share).indices]
        assert sizes == [int(share * n + 1e-9) for n in np.bincount(labels)]


def test_umc_takes_small_clusters_whole():
    x, labels = mixture(160, 2, 3, 1.0, balance=[0.7, 0.3])
    small, large = np.bincount(labels)[::-1]
    assert small < 100 < large
    for umc, sizes in ((True, [large, small]), (False, [1, 1])):
        result = clustering.select(x, labels, 2, 0.01, umc=umc)
        assert [len(i) for i in result.indices] == (sizes if umc else [1, 1])
    assert [len(i) for i in clustering.select(x, labels, 2, 0.02, umc=True).indices] == [2, small]


def test_selection_of_equal_rows():
    x = torch.full((40, 3), 0.1)
    assert clustering.select(x, [0] * 40, 1, 0.2).indices[0].tolist() == list(range(8))
    for bad in ({"share": 0.0}, {"share": 1.5}, {"direction": "up"}, {"floor": -1}):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
            clustering.select(x, [0] * 40, 1, **({"share": 0.5} | bad))
    with pytest.raises(ValueError, match=r"\[0, 1\), got 0 to 1"):
        clustering.select(x, [0] * 39 + [1], 1, 0.5)
    with pytest.raises(ValueError, match="40 integers"):
        clustering.select(x, [0] * 3, 1, 0.5)


def costs(n, k, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((n, k)))


def transport_program(cost, columns, mass):
    """The optimum of the linear program: columns sum to `columns`, rows to at most 1/N, exactly
    where mass is 1.
    """
    optimize = pytest.importorskip("scipy.optimize", reason=ORACLE)
    n, k = cost.shape
    by_row, by_column = np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))
    limits = dict(A_eq=by_column, b_eq=columns, A_ub=by_row, b_ub=np.full(n, 1 / n))
    if mass == 1:
        limits = dict(
            A_eq=np.vstack([by_column, by_row]), b_eq=np.concatenate([columns, np.full(n, 1 / n)])
        )
    solved = optimize.linprog(cost.numpy().ravel(), bounds=(0, None), **limits)
    assert solved.status == 0
    return solved.fun, solved.x.reshape(n, k)


@pytest.mark.parametrize("sizes", [None, [5, 1, 2, 4]])
@pytest.mark.parametrize("mass", [1.0, 0.5])
def test_transport_at_small_epsilon_is_the_linear_program(sizes, mass):
    cost = costs(24, 4)
    shares = np.full(4, 0.25) if sizes is None else np.array(sizes) / 12
    value, plan = transport_program(cost, mass * shares, mass)
    epsilon = 5e-3
    settings = dict(sizes=sizes, epsilon=epsilon, iterations=20_000)
    runs = [clustering.partial_transport(cost, mass, relax=math.inf, **settings)]
    if mass == 1:
        runs.append(clustering.sinkhorn(cost, **settings))
    for run in runs:
        assert (run.plan.sum(0).numpy() - mass * shares) == pytest.approx(np.zeros(4), abs=1e-6)
        assert run.plan.sum(1).max() <= 1 / 24 + 1e-9
        # No plan costs less; the entropy can be worth no more than epsilon ln K of a unit of mass.
        assert value - 1e-6 <= (run.plan * cost).sum().item() <= value + epsilon * math.log(5)
        whole = plan.max(1) > 0.99 / 24
        assert whole.sum() > 5
        assert (run.labels.numpy() == plan.argmax(1))[whole].mean() > 0.9
        if mass < 1:
            assert run.weights[plan.max(1) < 1e-9].mean() < 0.1 < 0.9 < run.weights[whole].mean()


@pytest.mark.parametrize("epsilon, scale", [(0.05, 1), (1.0, 1), (1e-3, 1), (0.05, 1e4)])
def test_sinkhorn_meets_its_margins(epsilon, scale):
    cost = costs(300, 7) * scale
    run = clustering.sinkhorn(cost, epsilon=epsilon * scale, iterations=20_000)
    assert run.plan.isfinite().all()
    torch.testing.assert_close(
        run.plan.sum(1), torch.full((300,), 1 / 300, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        run.plan.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64), atol=1e-6, rtol=0
    )
    # The plan is exp(-cost / epsilon) with its rows and columns scaled: the rest is additive in
    # logarithms.
    rest = run.plan.log() + cost / (epsilon * scale)
    if run.plan.min() > 1e-290:  # smaller ones have lost digits
        rest = rest - rest[:, :1]
        assert (rest - rest[0]).abs().max() < 1e-6
    assert torch.equal(run.labels, run.plan.argmax(1)) and (run.weights <= 1).all()


def test_sinkhorn_with_three_iterations_is_swavs():
    scores = -costs(50, 5)
    q = torch.exp(scores / 0.05).T  # the paper's listing: K x B, columns of samples
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / 5
        q = q / q.sum(0, keepdim=True) / 50
    run = clustering.sinkhorn(-scores, iterations=3, tolerance=0.0)
    torch.testing.assert_close(run.plan, q.T, atol=2e-3, rtol=0)


@pytest.mark.parametrize("mass, relax", [(0.3, 0.5), (0.8, 5.0), (1.0, 0.2), (0.5, 0.0)])
def test_partial_transport_is_optimal(mass, relax):
    optimize = pytest.importorskip("scipy.optimize", reason=ORACLE)
    n, k, epsilon = 6, 3, 0.2
    cost, sizes = costs(n, k), np.array([0.5, 0.3, 0.2])
    run = clustering.partial_transport(
        cost, mass, sizes=sizes, relax=relax, epsilon=epsilon, iterations=20_000, tolerance=1e-12
    )
    assert run.plan.sum().item() == pytest.approx(mass, abs=1e-9)
    assert run.plan.sum(1).max() <= 1 / n + 1e-12

    def objective(flat):  # with the slack's entropy, as the extra column has it
        plan = np.maximum(flat.reshape(n, k), 1e-15)
        columns, slack = plan.sum(0), np.maximum(1 / n - plan.sum(1), 1e-15)
        negative_entropy = (plan * np.log(plan) - plan).sum()
        if mass < 1:
            negative_entropy += (slack * np.log(slack) - slack).sum()
        divergence = (columns * np.log(columns / (mass * sizes)) - columns).sum()
        return (plan * cost.numpy()).sum() + epsilon * negative_entropy + relax * divergence

    limits = [{"type": "eq", "fun": lambda flat: flat.sum() - mass}]
    limits.append({"type": "ineq", "fun": lambda flat: 1 / n - flat.reshape(n, k).sum(1)})
    start = np.outer(np.full(n, mass / n), sizes).ravel()
    solved = optimize.minimize(
        objective,
        start,
        method="SLSQP",
        constraints=limits,
        bounds=[(0, 1)] * (n * k),
        options=dict(ftol=1e-14),
    )
    assert objective(run.plan.numpy().ravel()) <= solved.fun + 1e-8
    np.testing.assert_allclose(run.plan.numpy().ravel(), solved.x, atol=1e-4)


def test_partial_transport_takes_the_sure_rows_first():
    x, labels = mixture(300, 3, 5, 4.0, balance=[0.8, 0.15, 0.05])
    result = clustering.kmeans(x, 3)
    cost = clustering.relative_costs(x, result.centroids)
    exact = torch.cdist(x.double(), result.centroids.double()).square()
    torch.testing.assert_close(cost, exact / exact.mean(), atol=1e-9, rtol=1e-9)
    weights = [
        clustering.partial_transport(cost, mass, relax=0.01).weights for mass in (0.2, 0.6, 1.0)
    ]
    assert weights[0].sum() < weights[1].sum() < weights[2].sum() <= 300 + 1e-6
    near = cost.amin(1).argsort()
    assert weights[0][near[:30]].mean() > 3 * weights[0][near[-30:]].mean()
    # Equality of sizes tears the large cluster apart, the relaxed form does not.
    free, equal = (
        clustering.partial_transport(cost, 1.0, relax=relax).labels for relax in (0.01, math.inf)
    )
    assert (
        (free == result.labels).float().mean()
        > 0.98
        > 0.7
        > (equal == result.labels).float().mean()
    )


def test_assignment_refuses_bad_settings():
    cost = costs(4, 2)
    with pytest.raises(InputError, match="1 of 4 rows hold nan"):
        clustering.sinkhorn(torch.tensor([[0.0], [1.0], [2.0], [math.nan]]))
    for sizes in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="sizes must be 2 positive"):
            clustering.sinkhorn(cost, sizes=sizes)
    for setting in ({"epsilon": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            clustering.sinkhorn(cost, **setting)
    for setting in ({"mass": 0.0}, {"mass": 1.1}, {"mass": 0.5, "relax": -1.0}):
        with pytest.raises(ValueError, match="mass must lie"):
            clustering.partial_transport(cost, **setting)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "k, balance",
    [(3, None), (8, None), (6, [0.5, 0.25, 0.12, 0.06, 0.04, 0.03])],
    ids=["3", "8", "6 unequal"],
)
def test_the_number_of_clusters_of_a_mixture_is_found(k, balance, seed):
    x, _ = mixture(600, k, 8, 3.0, seed=seed, balance=balance)
    result = clustering.estimate_k(x * 40 + 1000, range(1, 13), references=3)
    assert result.k == k
    assert [row["k"] for row in result.table] == list(range(1, 13))
    assert (
        result.table[0]["gap"] == pytest.approx(0, abs=1e-5)
        and result.table[0]["silhouette"] is None
    )


@pytest.mark.parametrize("seed", range(3))
def test_rows_without_clusters_are_one_cluster(seed):
    x = mixture(500, 1, 6, seed=seed)[0] * torch.tensor([9.0, 4, 2, 1, 1, 1])  # one long axis
    assert clustering.estimate_k(x, range(1, 9)).k == 1


def test_estimate_is_deterministic_and_bounded():
    x, _ = mixture(300, 3, 90, 1.0)
    first = clustering.estimate_k(x, [2, 3, 4, 500], max_rows=100, max_columns=10)
    torch.manual_seed(5)
    assert (
        clustering.estimate_k(x, [4, 3, 2], max_rows=100, max_columns=10) == first and first.k == 3
    )
    with pytest.raises(ValueError, match="candidates must lie between 1 and half of 300 rows"):
        clustering.estimate_k(x, [200])
    with pytest.raises(ValueError, match="references"):
        clustering.estimate_k(x, references=1)
