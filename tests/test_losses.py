"""Losses against torchvision, torch and the papers' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from common import losses, metrics
from common.losses import focal_bce


def batch(n=64, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, generator=generator, dtype=dtype)
    return logits.requires_grad_(), torch.randint(0, 2, (n,), generator=generator)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.9])
def test_focal_bce_equals_torchvision(gamma, alpha):
    logits, targets = batch()
    loss = focal_bce(logits, targets, gamma=gamma, alpha=alpha)
    expected = sigmoid_focal_loss(
        logits,
        targets.double(),
        alpha=-1 if alpha is None else alpha,
        gamma=gamma,
        reduction="mean",
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(value, logits, torch.tensor(1.7).double())[0]
        for value in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda z: focal_bce(z, targets[:8], gamma=gamma, alpha=alpha),
        logits[:8].detach().requires_grad_(),
    )


def test_without_focus_it_is_binary_cross_entropy():
    logits, targets = batch()
    for weight in (None, 0.2):
        expected = F.binary_cross_entropy_with_logits(
            logits,
            targets.double(),
            pos_weight=None if weight is None else torch.tensor(weight).double(),
        )
        torch.testing.assert_close(
            focal_bce(logits, targets, gamma=0.0, pos_weight=weight), expected
        )


def test_the_positive_weight_scales_the_positive_items_alone():
    logits, targets = batch(8)
    one_by_one = [
        focal_bce(z[None], t[None], gamma=2.0, pos_weight=0.2)
        for z, t in zip(logits, targets, strict=True)
    ]
    plain = [focal_bce(z[None], t[None], gamma=2.0) for z, t in zip(logits, targets, strict=True)]
    for weighted, loss, target in zip(one_by_one, plain, targets.tolist(), strict=True):
        torch.testing.assert_close(weighted, loss * (0.2 if target else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_answers_have_finite_gradients(dtype):
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = focal_bce(logits, torch.tensor([1, 0, 0, 1]), gamma=0.5)
    assert loss.item() == pytest.approx(5e3, rel=1e-2)
    loss.backward()
    torch.testing.assert_close(
        logits.grad.float(), torch.tensor([0.0, 0.0, 0.25, -0.25]), rtol=1e-2, atol=1e-6
    )


def classes(n=32, k=5, d=7):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, k, (n,), generator=generator)
    return (
        logits.requires_grad_(),
        labels,
        torch.randn(k, d, generator=generator, dtype=torch.float64),
    )


def test_smooth_targets_are_torchs_label_smoothing_without_texts():
    logits, labels, _ = classes()
    targets = losses.smooth_targets(labels, 5, 0.3)
    ours = F.cross_entropy(logits, targets.double())
    torch.testing.assert_close(
        ours, F.cross_entropy(logits, labels, label_smoothing=0.3), rtol=1e-6, atol=0
    )


def test_smooth_targets_follow_the_texts_and_the_temperature():
    _, labels, texts = classes()
    texts = F.normalize(texts, dim=1)
    similarity = texts @ texts.T
    for temperature in (0.15, 0.12):
        targets = losses.smooth_targets(labels, 5, 0.05, similarity, temperature)
        for row, label in zip(targets, labels.tolist(), strict=True):
            weights = [math.exp(float(texts[label] @ texts[j]) / temperature) for j in range(5)]
            expected = [
                0.05 * w / sum(weights) + 0.95 * (j == label) for j, w in enumerate(weights)
            ]
            assert row.tolist() == pytest.approx(expected, rel=1e-5)
    warm, cool = (losses.smooth_targets(labels, 5, 0.05, similarity, t) for t in (0.15, 0.12))
    assert (
        cool.amax(1) > warm.amax(1)
    ).all()  # a lower temperature takes effect at once and sharpens


def test_logit_adjustment_is_the_papers_pairwise_form_and_balanced_softmax():
    """Eq. 10 of Menon et al.: log(1 + sum over the others of (pi_j / pi_y)^tau exp(z_j - z_y))."""
    logits, labels, _ = classes()
    counts = torch.tensor([1106, 103, 24, 126, 338], dtype=torch.float64)
    prior = counts / counts.sum()
    for tau in (0.0, 0.4, 1.0):
        loss = losses.logit_adjusted(logits, labels, prior, tau)
        rows = []
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            others = [
                (prior[j] / prior[y]) ** tau * math.exp(z[j] - z[y]) for j in range(5) if j != y
            ]
            rows.append(math.log1p(sum(others)))
        assert loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-9)
    balanced = (counts * logits.exp()).gather(1, labels[:, None])[:, 0] / (
        counts * logits.exp()
    ).sum(1)
    torch.testing.assert_close(
        losses.logit_adjusted(logits, labels, prior, 1.0), -balanced.log().mean()
    )


def test_info_nce_equals_the_double_loop_and_is_bounded():
    _, _, a = classes()
    b = a.roll(1, 1) + 0.1
    a.requires_grad_()
    cosines = [[F.cosine_similarity(x, y, dim=0).item() / 0.07 for y in b] for x in a]
    rows = [math.log(sum(math.exp(c - cosines[i][i]) for c in cosines[i])) for i in range(5)]
    columns = [
        math.log(sum(math.exp(cosines[j][i] - cosines[i][i]) for j in range(5))) for i in range(5)
    ]
    loss = losses.info_nce(a, b)
    assert loss.item() == pytest.approx((sum(rows) + sum(columns)) / 10, rel=1e-9)
    assert 0 <= losses.info_nce(a, 3 * a) < loss and (torch.autograd.grad(loss, a)[0] != 0).any()
    assert torch.autograd.gradcheck(lambda x: losses.info_nce(x, b), a)


def test_decorrelation_is_the_mean_squared_cosine_of_different_rows():
    _, _, a = classes()
    a.requires_grad_()
    pairs = [
        F.cosine_similarity(a[i], a[j], dim=0) ** 2 for i in range(5) for j in range(5) if i != j
    ]
    torch.testing.assert_close(losses.decorrelation(a), torch.stack(pairs).mean())
    assert losses.decorrelation(torch.eye(4)).item() == 0
    assert losses.decorrelation(torch.ones(3, 2)).item() == pytest.approx(1)
    assert torch.autograd.gradcheck(losses.decorrelation, a)


def test_ldam_takes_the_margin_from_the_true_class():
    """Cao et al., eq. 13: margins C / n^(1/4), the rarest class's is 0.5; halves of a batch add up
    to it.
    """
    logits, labels, _ = classes()
    cosines = logits.tanh()
    counts = torch.tensor([1106, 103, 24, 126, 338])
    margins = torch.tensor([0.5 * (24 / n) ** 0.25 for n in counts.tolist()], dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    shifted = cosines.clone()
    for i, label in enumerate(labels.tolist()):
        shifted[i, label] -= margins[label]
    each = F.cross_entropy(30 * shifted, labels, reduction="none")
    for given, factor in ((None, 1), (weights, weights[labels])):
        ours = losses.ldam(cosines, labels, counts, weights=given)
        torch.testing.assert_close(ours, (factor * each).mean())
        halves = [
            losses.ldam(cosines[rows::2], labels[rows::2], counts, weights=given) for rows in (0, 1)
        ]
        torch.testing.assert_close(ours, sum(halves) / 2)


def test_effective_number_weights_equal_the_formula():
    counts = torch.tensor([1106, 103, 24, 126, 338])
    raw = [(1 - 0.9999) / (1 - 0.9999**n) for n in counts.tolist()]
    expected = [5 * w / sum(raw) for w in raw]
    assert losses.effective_number_weights(counts, 0.9999).tolist() == pytest.approx(
        expected, rel=1e-9
    )
    assert losses.effective_number_weights(counts, 0.0).tolist() == [1.0] * 5


@pytest.mark.parametrize("sign, reaches", [(1.0, True), (-1.0, False)])
def test_the_sign_of_logit_adjustment(sign, reaches):
    """Two classes 46:1, Gaussians two deviations apart: the rule of the best balanced recall cuts
    in the middle, with UAR Phi(1). With tau 1 the loss finds it within a point; with the sign
    turned the rare class is lost.
    """
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([46_000, 1_000])
    labels = torch.repeat_interleave(torch.arange(2), counts)
    x = torch.randn(len(labels), generator=generator) + 2.0 * labels
    layer, prior = torch.nn.Linear(1, 2), counts / counts.sum()
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.5, max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = losses.logit_adjusted(layer(x[:, None]), labels, prior, sign)
        loss.backward()
        return loss

    optimizer.step(closure)
    fresh = torch.randn(40_000, generator=generator) + 2.0 * (torch.arange(40_000) % 2)
    with torch.no_grad():
        uar = metrics.long_tail(torch.arange(40_000) % 2, layer(fresh[:, None]).argmax(1), 2)["uar"]
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert (abs(uar - best) < 0.01) == reaches
    assert reaches or uar < 0.55
