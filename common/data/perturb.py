"""What happens to videos on their way through the web, at five levels each.

Of the kind of Hendrycks and Dietterich, arXiv:1903.12261, and of DeeperForensics (Jiang et al.,
arXiv:2001.03024), on frames of uint8 as they are decoded.
"""

import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.v2 import functional as F

# From mild to strong: JPEG's quality; deviation of a Gaussian blur in pixels of a side of 224; that
# of noise, as a share of the pixels' range; the side left when scaled down and up again; the
# saturation left.
LEVELS = {
    "jpeg": (90, 70, 50, 30, 10),
    "blur": (1.0, 2.0, 3.0, 4.0, 6.0),
    "noise": (0.01, 0.02, 0.05, 0.1, 0.2),
    "resize": (0.75, 0.5, 0.33, 0.25, 0.125),
    "saturation": (0.8, 0.6, 0.4, 0.2, 0.0),
}


def perturb(frames: Tensor, name: str, value: float, seed: int) -> Tensor:
    """Frames as `name`, one of LEVELS, leaves them at a level `value`.

    Args:
        frames: (n, 3, h, w) uint8.
        seed: of the noise.
    """
    side = min(frames.shape[-2:])
    if name == "jpeg":
        coded = [decode_jpeg(encode_jpeg(frame, int(value))) for frame in frames.cpu()]
        return torch.stack(coded).to(frames.device)
    if name == "blur":
        sigma = value * side / 224
        return F.gaussian_blur(frames, 2 * max(1, round(3 * sigma)) + 1, sigma)
    if name == "noise":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(frames.shape, generator=generator).to(frames.device)
        return (frames + 255 * value * noise).round_().clamp_(0, 255).to(torch.uint8)
    if name == "resize":
        small = F.resize(frames, [max(1, round(value * side))] * 2, antialias=True)
        return F.resize(small, list(frames.shape[-2:]), antialias=True)
    return F.adjust_saturation(frames, value)
