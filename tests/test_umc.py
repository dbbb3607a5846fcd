"""The fusion of modalities, the basis it starts from, and its metric."""

import math

import numpy as np
import pytest
import torch

from common.models import umc


def fusion(padded_last, basis=None, seed=0):
    torch.manual_seed(seed)
    model = umc.Fusion(
        {"text": 4, "audio": 3}, ["audio"], 8, 2, dropout=0.5, padded_last=padded_last, basis=basis
    )
    return model.eval()


def test_lengths_hide_the_padding_and_umc_reads_it():
    """At a sequence's own last step the state depends neither on the padding nor on its amount;
    UMC's state does.
    """
    x, audio = torch.randn(2, 4), torch.randn(2, 6, 3)
    lengths = {"audio": torch.tensor([2, 6])}
    noisy = audio.clone()
    noisy[0, 2:] = 9.0
    inputs = [{"text": x, "audio": a} for a in (audio, noisy)]
    ours, theirs = fusion(False), fusion(True)
    assert torch.equal(ours(inputs[0], lengths)[0], ours(inputs[1], lengths)[0])
    alone = ours({"text": x[:1], "audio": audio[:1, :2]}, {"audio": torch.tensor([2])})[0]
    torch.testing.assert_close(ours(inputs[0], lengths)[0][:1], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(theirs(inputs[0], lengths)[0][0], theirs(inputs[1], lengths)[0][0])


def test_fusion_is_the_published_formula():
    model, x, audio = fusion(True), torch.randn(3, 4), torch.randn(3, 5, 3)
    keep = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    z, h = model({"text": x, "audio": audio}, {"audio": torch.tensor([1, 2, 5])}, keep)
    t = x @ model.project["text"].weight.T + model.project["text"].bias
    mask = torch.triu(torch.full((5, 5), -math.inf), 1)
    a = model.temporal["audio"](model.project["audio"](audio), src_mask=mask)[:, -1]
    joined = torch.cat([t * keep[:, :1], a * keep[:, 1:]], 1)
    expected = torch.nn.functional.gelu(joined) @ model.fuse.weight.T + model.fuse.bias
    torch.testing.assert_close(z, expected)
    head = expected.relu() @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(h, head / head.norm(dim=1, keepdim=True))


def test_training_starts_from_the_basis():
    """With a basis z is its coordinates: those of scikit-learn's PCA of the standardized columns,
    up to their signs.
    """
    decomposition = pytest.importorskip("sklearn.decomposition", reason="pip install scikit-learn")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)) * [1, 5, 0.1, 2] + rng.normal(size=(200, 1))
    audio = rng.normal(size=(200, 3))
    rows = {"text": torch.from_numpy(x).float(), "audio": torch.from_numpy(audio).float()}
    basis, weights, anchor = umc.weighted_basis(rows, set(), "text", 3, 2, 0)
    assert anchor == "text" and weights["text"] == 1 and 0 <= weights["audio"] < 0.1
    model = umc.Fusion(
        {"text": 4, "audio": 3}, [], 8, 3, dropout=0.0, padded_last=False, basis=basis
    ).eval()
    z, h = model(rows, {})
    pca = decomposition.PCA(2).fit_transform((x - x.mean(0)) / x.std(0))
    pca /= np.sqrt(pca.var(0).sum())
    np.testing.assert_allclose(z[:, :2].abs().detach().numpy(), np.abs(pca), atol=1e-4)
    assert z[:, 4:].abs().max() == 0 and torch.allclose(h.norm(dim=1), torch.ones(200))
    assert z[:, 2:4].var(0, unbiased=False).sum().item() == pytest.approx(
        weights["audio"] ** 2, abs=1e-4
    )


@pytest.mark.parametrize("rows", [3, 40])
def test_wide_rows_have_the_axes_of_scikit_learn(rows):
    decomposition = pytest.importorskip("sklearn.decomposition", reason="pip install scikit-learn")
    rng = np.random.default_rng(0)
    x = 3 * rng.normal(size=(4, 3000))[np.arange(rows) % 4] + rng.normal(size=(rows, 3000))
    basis, *_ = umc.weighted_basis({"text": torch.from_numpy(x)}, set(), "text", 3, 2, 0)
    found = umc.coordinates(torch.from_numpy(x), *basis["text"]).numpy()
    pca = decomposition.PCA(2).fit_transform((x - x.mean(0)) / x.std(0))
    np.testing.assert_allclose(np.abs(found), np.abs(pca / np.sqrt(pca.var(0).sum())), atol=1e-6)


def test_canonical_axes_solve_the_regularized_problem():
    """As an eigenproblem in the columns themselves, by NumPy."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 3)) * [3, 2, 1]
    x, y = (shared @ rng.normal(size=(3, d)) + rng.normal(size=(400, d)) for d in (7, 5))
    x, y = x - x.mean(0), y - y.mean(0)
    a, b = (axes.numpy() for axes in umc.canonical_axes(*map(torch.from_numpy, (x, y)), 3))
    c = {name: u.T @ v / 400 for name, u, v in (("xx", x, x), ("yy", y, y), ("xy", x, y))}
    for name in ("xx", "yy"):
        c[name] += np.trace(c[name]) / len(c[name]) * np.eye(len(c[name]))
    across = np.linalg.solve(c["xx"], c["xy"]) @ np.linalg.solve(c["yy"], c["xy"].T)
    values, vectors = np.linalg.eig(across)
    order = values.real.argsort()[::-1][:3]
    for i, j in enumerate(order):
        for axis, covariance, expected in (
            (a[:, i], c["xx"], vectors.real[:, j]),
            (b[:, i], c["yy"], np.linalg.solve(c["yy"], c["xy"].T @ vectors.real[:, j])),
        ):
            cosine = axis @ expected / np.linalg.norm(axis) / np.linalg.norm(expected)
            assert abs(cosine) == pytest.approx(1, abs=1e-6)
            # Of unit length in the regularized covariance, but for the weight.
            length = np.sqrt(axis @ covariance @ axis)
            first = np.sqrt(a[:, 0] @ c["xx"] @ a[:, 0])
            assert length / first == pytest.approx(values.real[j] / values.real[order[0]])
    assert ((x @ a).var(0).sum() + (y @ b).var(0).sum()) == pytest.approx(2)
    assert umc.canonical_axes(torch.zeros(9, 3), torch.ones(9, 2), 4)[0].isfinite().all()


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
@pytest.mark.parametrize("names", [["text"], ["text", "audio", "video"]])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_few_clusters_and_columns(names, k, columns, scale):
    """From the basis to the clusters, also where the rows are nearly equal."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % k
    centers = 9 * np.arange(k)[:, None] * np.ones(columns)
    rows = {
        name: torch.from_numpy(7 + scale * (centers[labels] + rng.normal(size=(90, columns))))
        for name in names
    }
    components = max(min(k - 1, 8 // len(names)), 1)
    basis, weights, _ = umc.weighted_basis(rows, set(), names[0], k, components, 0)
    assert min(weights.values()) > 0.9
    z = torch.cat([umc.coordinates(x, *basis[name]) for name, x in rows.items()], 1).float()
    result, metric = umc.discriminant_kmeans(z, k, 0.1, 0, torch.eye(z.shape[1]), None)
    assert metric.shape == 2 * (z.shape[1],) and result.inertia < np.inf
    assert len({*zip(labels.tolist(), result.labels.tolist(), strict=True)}) == k


def test_agreement_weighs_a_modality_and_names_the_anchor():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    near, far = (5 * rng.normal(size=(3, 6))[labels] + rng.normal(size=(300, 6)) for _ in range(2))
    rows = {"noise": rng.normal(size=(300, 6)), "near": near, "far": far}
    rows = {name: torch.from_numpy(x).float() for name, x in rows.items()}
    _, weights, anchor = umc.weighted_basis(rows, set(), None, 3, 6, 0)
    assert (
        anchor in ("near", "far")
        and weights["noise"] < 0.05
        and min(weights["near"], weights["far"]) > 0.9
    )


def test_a_second_encoding_of_the_text_weighs_as_much_as_the_first():
    rng = np.random.default_rng(0)
    rows = {name: torch.from_numpy(rng.normal(size=(90, 4))) for name in ("text", "words", "audio")}
    _, weights, anchor = umc.weighted_basis(rows, {"words"}, "text", 3, 2, 0, peers={"words"})
    assert anchor == "text" and weights["text"] == weights["words"] == 1 and weights["audio"] < 0.2
    alone = umc.weighted_basis(rows, {"words"}, "text", 3, 2, 0)[1]
    assert alone["words"] < 0.2 and alone["audio"] == weights["audio"]


def test_the_metric_undoes_the_scatter_within_clusters():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 500)
    z = rng.normal(size=(4, 6))[labels] + rng.normal(size=(500, 6)) * [3, 2, 1, 1, 0.5, 0.1]
    metric = umc.discriminant(torch.from_numpy(z), torch.from_numpy(labels), 0.5)[0].numpy()
    own = np.concatenate([z[labels == c] - z[labels == c].mean(0) for c in range(4)])
    within = own.T @ own / len(own)
    shrunk = within + 0.5 * np.trace(within @ within) / np.trace(within) * np.eye(6)
    product = metric.T @ shrunk @ metric
    np.testing.assert_allclose(product, product[0, 0] * np.eye(6), atol=1e-8 * product[0, 0])
    assert (z @ metric).var(0).sum() == pytest.approx(z.var(0).sum())


def test_columns_of_any_scale_count_and_constant_ones_do_not():
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [1e8 * rng.normal(size=(90, 1)), rng.normal(size=(90, 2)), np.full((90, 1), 1e6)], 1
    )
    basis, *_ = umc.weighted_basis({"text": torch.from_numpy(x)}, set(), "text", 2, 4, 0)
    assert basis["text"][1].isinf().tolist() == [False, False, False, True]


def test_runs_of_neighboring_seeds_share_no_start(monkeypatch):
    seeds, kmeans = [], umc.clustering.kmeans
    monkeypatch.setattr(
        umc.clustering,
        "kmeans",
        lambda *args, **more: (seeds.append(more.get("seed")), kmeans(*args, **more))[1],
    )
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 4)))
    for seed in range(3):
        umc.discriminant_kmeans(z, 3, 0.1, seed, torch.eye(4, dtype=z.dtype), None)
    found = [seed for seed in seeds if seed is not None]
    assert len(found) == len(set(found)) == 3 * umc.STARTS


def test_what_is_missing_counts_as_masked():
    """Whatever the padding holds, in training and in evaluation, with the axes and without."""
    torch.manual_seed(0)
    rows = {"text": torch.randn(5, 4), "audio": torch.randn(5, 3, 4)}
    lengths = {"audio": torch.tensor([3, 0, 1, 0, 2])}
    pooled = {"text": rows["text"], "audio": torch.randn(5, 4)}
    basis, *_ = umc.weighted_basis(pooled, set(), "text", 2, 1, 0)
    for given in (None, basis):
        model = umc.Fusion(
            {"text": 4, "audio": 4}, ["audio"], 8, 2, dropout=0.0, padded_last=False, basis=given
        )
        torch.nn.init.normal_(model.fuse.weight)
        keep = torch.ones(5, 2)
        keep[[1, 3], 1] = 0
        masked, _ = model(rows, {"audio": torch.tensor([3, 2, 1, 3, 2])}, keep)
        for keep in (None, torch.ones(5, 2)):
            torch.testing.assert_close(model(rows, lengths, keep)[0], masked)
