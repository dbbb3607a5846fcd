"""Losses against torchvision and torch."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

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
        logits, targets.double(), alpha=-1 if alpha is None else alpha, gamma=gamma, reduction="mean"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(value, logits, torch.tensor(1.7).double())[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda z: focal_bce(z, targets[:8], gamma=gamma, alpha=alpha), logits[:8].detach().requires_grad_()
    )


def test_without_focus_it_is_binary_cross_entropy():
    logits, targets = batch()
    for weight in (None, 0.2):
        expected = F.binary_cross_entropy_with_logits(
            logits, targets.double(), pos_weight=None if weight is None else torch.tensor(weight).double()
        )
        torch.testing.assert_close(focal_bce(logits, targets, gamma=0.0, pos_weight=weight), expected)


def test_the_positive_weight_scales_the_positive_items_alone():
    logits, targets = batch(8)
    one_by_one = [focal_bce(z[None], t[None], gamma=2.0, pos_weight=0.2) for z, t in zip(logits, targets, strict=True)]
    plain = [focal_bce(z[None], t[None], gamma=2.0) for z, t in zip(logits, targets, strict=True)]
    for weighted, loss, target in zip(one_by_one, plain, targets.tolist(), strict=True):
        torch.testing.assert_close(weighted, loss * (0.2 if target else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_answers_have_finite_gradients(dtype):
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype, requires_grad=True)
    loss = focal_bce(logits, torch.tensor([1, 0, 0, 1]), gamma=0.5)
    assert loss.item() == pytest.approx(5e3, rel=1e-2)
    loss.backward()
    torch.testing.assert_close(logits.grad.float(), torch.tensor([0.0, 0.0, 0.25, -0.25]), rtol=1e-2, atol=1e-6)
