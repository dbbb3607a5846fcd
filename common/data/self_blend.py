"""Fakes made of real clips alone: self-blended images.

Shiohara and Yamasaki, Detecting Deepfakes with Self-Blended Images, arXiv:2204.08376. A frame is
blended with itself, changed in color, sharpness, place and scale, within a soft mask about its
middle, where the face of a crop is: what is left to see is what blending leaves. Here for clips:
the changes are drawn once for all frames, but for a jitter of the place. Unlike theirs the mask
needs no landmarks, and the target keeps its color, which its real counterpart has too.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import amp
from common.rng import uniform

SHARE = 0.5  # of the fakes of a batch that `with_pseudo_fakes` replaces
_STREAM = 2**31 + 5  # beside those of clips, data and search; no view has this number
_RATIOS = (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)  # of the mask, as in the paper
_COLUMNS = 32  # of a clip's uniforms; three for each frame follow


def with_pseudo_fakes(
    clips: Tensor, labels: np.ndarray, seed: int, epoch: int, items: np.ndarray
) -> Tensor:
    """A batch in which about SHARE of the fakes are real clips of the batch, self-blended.

    Args:
        clips: (n, T, 3, s, s) uint8.
        labels: (n,), 1 for fake; a batch without real clips stays as it is.
        seed, epoch, items: keys of the draws, see `uniform`.
    """
    drawn = uniform(seed, epoch, items, _STREAM, 1)[:, 0]
    fakes, real = np.flatnonzero((labels == 1) & (drawn < SHARE)), np.flatnonzero(labels == 0)
    if not len(fakes) or not len(real):
        return clips
    rows, sources = fakes, real[np.arange(len(fakes)) % len(real)]
    rows, sources = (
        amp.to_device(torch.from_numpy(part), clips.device) for part in (rows, sources)
    )
    return clips.index_copy(0, rows, self_blend(clips[sources], seed, epoch, items[fakes]))


def self_blend(clips: Tensor, seed: int, epoch: int, items: np.ndarray) -> Tensor:
    """Clips (n, T, 3, s, s) uint8 with their own faces, changed, blended in; arguments as above."""
    n, length, _, side, _ = clips.shape
    drawn = uniform(seed, epoch, items, _STREAM + 1, _COLUMNS + 3 * length).astype(np.float32)
    drawn = amp.to_device(torch.from_numpy(drawn), clips.device)
    column = iter(drawn[:, :_COLUMNS].unbind(1))
    per_frame = 2 * drawn[:, _COLUMNS:].view(n, length, 3) - 1

    def between(low: float, high: float) -> Tensor:
        return (low + (high - low) * next(column)).view(n, 1, 1, 1, 1)

    def seldom(low: float, high: float, neutral: float) -> Tensor:
        return torch.where(between(0, 1) < 0.3, between(low, high), neutral)

    target = clips.float() / 255
    source = target * seldom(0.8, 1.2, 1.0) + seldom(-0.1, 0.1, 0.0)
    shifts = torch.cat([between(-0.08, 0.08) for _ in range(3)], 2)  # of red, green, blue
    source = source + torch.where(between(0, 1) < 0.3, shifts, 0.0)
    gray = source.mean(2, keepdim=True)
    source = gray + seldom(0.7, 1.3, 1.0) * (source - gray)
    frames = source.flatten(0, 1)
    half = F.interpolate(frames, scale_factor=0.5, mode="bilinear", antialias=True)
    smooth = F.interpolate(half, size=side, mode="bilinear").view_as(source)
    source = (source + between(-1, 1) * (source - smooth)).clamp(0, 1)  # blurred or sharpened

    jitter = 0.03 * next(column).view(n, 1)
    scale = 1 + 0.05 * (2 * next(column).view(n, 1) - 1) + jitter * per_frame[..., 2]
    right = 0.06 * (2 * next(column).view(n, 1) - 1) + 2 * jitter * per_frame[..., 0]
    down = 0.03 * (2 * next(column).view(n, 1) - 1) + 2 * jitter * per_frame[..., 1]
    zero = torch.zeros_like(right)
    maps = torch.stack([scale, zero, right, zero, scale, down], 2).view(-1, 2, 3)
    grid = F.affine_grid(maps, [n * length, 3, side, side], align_corners=False)
    source = F.grid_sample(
        source.flatten(0, 1), grid, padding_mode="border", align_corners=False
    ).view_as(target)

    # An ellipse whose edge is a wave of three harmonics; -1 to 1 across the frame.
    place = (torch.arange(side, device=clips.device) * 2 + 1) / side - 1
    y = (place.view(side, 1) - between(-0.1, 0.15)) / between(0.45, 0.8)
    x = (place.view(1, side) - between(-0.1, 0.1)) / between(0.35, 0.65)
    angle, radius = torch.atan2(y, x), torch.hypot(x, y)
    edge = torch.ones_like(angle)
    for k in (2, 3, 4):
        edge = edge + between(0, 0.12) * torch.cos(k * angle + between(0, 2 * math.pi))
    mask = ((edge - radius) / between(0.03, 0.25) + 0.5).clamp(0, 1)
    mask = mask * mask * (3 - 2 * mask)
    ratios = torch.tensor(_RATIOS, device=clips.device)
    mask = mask * ratios[(next(column) * len(_RATIOS)).long().clamp(max=5)].view(n, 1, 1, 1, 1)
    return (255 * torch.lerp(target, source, mask)).round_().clamp_(0, 255).to(torch.uint8)
