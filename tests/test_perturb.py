"""Perturbed frames: stronger levels change more, and each does what its name says."""

import numpy as np
import pytest
import torch

from common.data.perturb import LEVELS, perturb


def photograph(side=112):
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [torch.sin((k * x + y) / 5.0) for k in (1, 2, 3)]
    return (127 + 100 * torch.stack(waves)).to(torch.uint8)[None].repeat(3, 1, 1, 1)


@pytest.mark.parametrize("name", LEVELS)
def test_stronger_levels_change_more(name):
    frames = photograph()
    changes = []
    for value in LEVELS[name]:
        out = perturb(frames, name, value, seed=0)
        assert out.dtype == torch.uint8 and out.shape == frames.shape
        assert torch.equal(out, perturb(frames, name, value, seed=0))
        changes.append((out.float() - frames.float()).abs().mean().item())
    assert len(LEVELS[name]) == 5 and changes[0] > 0 and changes == sorted(changes)


def test_levels_mean_what_they_say():
    frames = photograph()
    assert torch.equal(
        perturb(frames, "saturation", 0.0, 0)[:, :1].expand(-1, 3, -1, -1),
        perturb(frames, "saturation", 0.0, 0),
    )
    flat = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    noise = perturb(flat, "noise", 0.1, 3).float() - 128
    assert noise.std().item() == pytest.approx(25.5, rel=0.03)
    edge = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    edge[..., 112:] = 255
    row = perturb(edge, "blur", 4.0, 0)[0, 0, 112].double().numpy() / 255
    spread = np.diff(row)  # a Gaussian of the deviation asked for
    at = np.arange(1, 224)
    deviation = np.sqrt((spread * (at - (spread * at).sum()) ** 2).sum())
    assert deviation == pytest.approx(4, rel=0.05)
