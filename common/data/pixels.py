"""Operations on the pixels of views: crop, resize and mirror, rotate, color, blur.

Each equals torchvision's functional form. They work on float32 [n, 3, S, S] in [0, 1] for n samples
of S x S pixels. `OPERATIONS` work in place, with one amount a sample, [n, 1, 1, 1].
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ITU-R 601 luma as torchvision rounds it; the sum is 0.9999, so white turns to 0.9999.
LUMA = (0.2989, 0.587, 0.114)
# Optical densities of red, green and blue of hematoxylin, eosin and DAB, as `rgb_from_hed` of
# scikit-image.
RGB_OF_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_OF_RGB = np.linalg.inv(RGB_OF_HED)
BEYOND = ("zeros", "reflection")  # what a rotation shows beyond the border, grid_sample's words


def blur_kernel_size(size: int) -> int:
    """Return the odd number of taps nearest above a tenth of the view's side, 23 for 224 pixels.

    A single tap blurs nothing.
    """
    return 2 * (size // 20) + 1


def _resize_bands(
    start: Tensor, length: Tensor, flip: Tensor, size: int, taps: int
) -> tuple[Tensor, Tensor]:
    """Antialiased bilinear weights of one axis: the few source pixels of each output pixel.

    A triangle filter that reaches one output pixel to each side, never less than one source pixel,
    cut at the box's ends and normalized.

    Args:
        start, length: (n, 1) float tensors, the box in source pixels.
        flip: (n, 1) bool tensor, mirror the axis.
        size: number of output pixels.
        taps: source pixels an output pixel, enough for the largest box.

    Returns:
        Source pixels (n, size, taps) int64, and their weights, float32 with sums of 1.
    """
    scale = length / size
    reach = scale.clamp(min=1)
    place = torch.arange(size, device=start.device) + 0.5  # [size]
    center = torch.where(flip, size - place, place) * scale  # [n, size], from the box's start
    first = (center - reach + 0.5).floor_()
    pixel = first.unsqueeze(2) + torch.arange(taps, device=start.device)  # [n, size, taps]
    distance = (pixel + 0.5 - center.unsqueeze(2)).abs_()
    weights = distance.div_(-reach.unsqueeze(2)).add_(1).clamp_(min=0)
    last = length.unsqueeze(2) - 1
    weights.mul_((pixel >= 0) & (pixel <= last))
    pixel = torch.minimum(pixel.clamp_(min=0), last).add_(start.unsqueeze(2))
    return pixel.long(), weights.div_(weights.sum(dim=2, keepdim=True))


def box_bands(
    box: Tensor, flip: Tensor, flip_rows: Tensor, boxes: np.ndarray, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Antialiased bilinear weights of the rows and of the columns of n boxes.

    Args:
        box: (n, 4) float tensor: top, left, height, width in source pixels.
        flip, flip_rows: (n, 1) bool tensors, mirror left to right, and top to bottom.
        boxes: the (n, 4) array of `box` on the host.
        size: side of the views in pixels.

    Returns:
        pixel_y, weights_y, pixel_x, weights_x, (n, size, taps) each: the source pixels that an
        output pixel takes, int64, and their weights, float32 with sums of 1.
    """
    top, left, height, width = box.split(1, dim=1)
    largest_height, largest_width = boxes[:, 2:].max(0, initial=1)
    taps_y = max(2, math.ceil(2 * largest_height / size))
    taps_x = max(2, math.ceil(2 * largest_width / size))
    rows = _resize_bands(top, height, flip_rows, size, taps_y)
    columns = _resize_bands(left, width, flip, size, taps_x)
    return (*rows, *columns)


def _combine_rows(x: Tensor, pixel: Tensor, weights: Tensor, first: int = 0) -> Tensor:
    """Weighted sums of rows.

    x [n, R, 3, L], pixel - first and weights [n, S, taps] -> [n, S, 3, L]. An embedding bag
    gathers, weights and adds in one pass and reads whole rows, several times as fast as a product
    with a matrix that is mostly zero.
    """
    n, rows, channels, length = x.shape
    start = torch.arange(-first, n * rows - first, rows, device=x.device).view(n, 1, 1)
    index = (pixel + start).flatten(0, 1)
    weights = weights.flatten(0, 1).contiguous()
    x = F.embedding_bag(index, x.reshape(n * rows, -1), per_sample_weights=weights, mode="sum")
    return x.view(n, -1, channels, length)


def crop_resize_flip(
    images: Tensor,
    boxes: np.ndarray,
    pixel_y: Tensor,
    weights_y: Tensor,
    pixel_x: Tensor,
    weights_x: Tensor,
) -> Tensor:
    """Cut, resize and mirror images.

    Args:
        images: (n, 3, H, W) uint8.
        boxes: (n, 4) on the host: top, left, height, width in source pixels.
        pixel_y, weights_y, pixel_x, weights_x: from `box_bands`.

    Returns:
        [n, 3, y, x] float32 in [0, 1].
    """
    # Only what some box covers is read. Not cut to the columns: the rows' length is compiled into
    # the bag's code.
    top, left = boxes[:, :2].min(0).astype(int)
    bottom, right = (boxes[:, :2] + boxes[:, 2:]).max(0).astype(int)
    rows = images[:, :, top:bottom].transpose(1, 2)
    rows = rows.to(torch.float32, memory_format=torch.contiguous_format)
    columns = _combine_rows(rows, pixel_y, weights_y, top)[..., left:right].transpose(1, 3)
    # Weights sum to 1 only up to rounding.
    x = _combine_rows(columns, pixel_x, weights_x, left).div_(255).clamp_(0, 1)  # [n, x, 3, y]
    return x.permute(0, 2, 3, 1).contiguous()


def crop_resize_flip_bytes(
    images: Tensor,
    rows: np.ndarray,
    boxes: np.ndarray,
    flip: np.ndarray,
    flip_rows: np.ndarray,
    size: int,
) -> Tensor:
    """`crop_resize_flip` for a CPU, by torch's own kernel for bytes, a sample at a time.

    It takes a fifth of the time, least where the images are channels-last in memory, and rounds to
    whole levels along each axis: at most one level, 1 / 255, from the other form. Equal to
    torchvision's `resized_crop` of the uint8 image.

    Args:
        images: (N, 3, H, W) uint8.
        rows: (n,) which of them.
        boxes: (n, 4): top, left, height, width in source pixels.
        flip, flip_rows: (n,) bool, mirror left to right, and top to bottom.
        size: side of the views in pixels.

    Returns:
        [n, 3, y, x] float32 in [0, 1].
    """
    out = torch.empty(len(rows), 3, size, size)
    boxes = boxes.astype(int).tolist()
    for x, image, (top, left, height, width), *axes in zip(
        out, rows.tolist(), boxes, flip_rows.tolist(), flip.tolist(), strict=True
    ):
        crop = images.narrow(0, image, 1).narrow(2, top, height).narrow(3, left, width)
        crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]
        mirrored = [axis for axis, on in zip((1, 2), axes, strict=True) if on]
        x.copy_(crop.flip(mirrored) if mirrored else crop)
    return out.div_(255)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, beyond: str = BEYOND[0]) -> Tensor:
    """Rotate images counter-clockwise about their centers.

    Bilinear between pixel centers, black beyond the border: torchvision's `rotate` with its default
    fill. The same black given as fill=0 fades twice at the border there.

    Args:
        x: [n, 3, y, x] float32.
        cos, sin: (n,) of the angles.
        beyond: `zeros`, black beyond the border, or `reflection`, the image mirrored there.

    Returns:
        Like x.
    """
    # Not by `affine_grid`: its matrix product rounds to TF32 where that is allowed, a tenth of a
    # pixel. From -1 to 1, as grid_sample counts.
    size = x.shape[-1]
    across = (torch.arange(size, device=x.device) * 2 + 1) / size - 1
    down = across.view(-1, 1)
    cos = cos.view(-1, 1, 1)
    sin = sin.view(-1, 1, 1)
    place = [cos * across - sin * down, cos * down + sin * across]
    grid = torch.stack(place, dim=3)  # [n, y, x, 2]
    return F.grid_sample(x, grid, padding_mode=beyond, align_corners=False)


def stain_maps(amounts: np.ndarray) -> np.ndarray:
    """What `stain` needs of factors and shifts (n, 6) of the stains' densities: (12, n) float64.

    A matrix from the logarithms of red, green and blue to those of each, and what is added.
    """
    factors, shifts = amounts[:, None, :3], amounts[:, 3:]
    matrix = (HED_OF_RGB * factors) @ RGB_OF_HED  # [n, 3, 3]
    return np.concatenate([matrix.reshape(-1, 9), -math.log(10) * shifts @ RGB_OF_HED], 1).T


def stain(x: Tensor, maps: Tensor) -> None:
    """Change the densities of the stains hematoxylin, eosin and DAB, in place.

    Optical density, -log10 of a channel, is a sum of the stains' shares (Ruifrok and Johnston 2001;
    the shares are scikit-image's), each of which is multiplied and moved: one affine map of the
    channels' logarithms. A channel below 1 / 255 counts as that: eight bits know nothing darker,
    and a logarithm without end would color black.

    Args:
        x: [n, 3, y, x] float32 in [0, 1].
        maps: (n, 12), `stain_maps` of the samples.
    """
    logs = x.clamp(min=1 / 255).log_().unbind(1)
    for channel in range(3):
        # Not a matrix product, which may round to TF32.
        out = maps[:, 9 + channel].view(-1, 1, 1)
        for source, values in enumerate(logs):
            out = torch.addcmul(out, values, maps[:, 3 * source + channel].view(-1, 1, 1))
        x[:, channel] = out.exp_().clamp_(max=1)


def _luma(r: Tensor, g: Tensor, b: Tensor) -> Tensor:
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = _luma(*x.mean(dim=(2, 3)).unbind(1)).view(-1, 1, 1, 1)
    x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    gray = _luma(*x.unbind(1)).unsqueeze(1)  # [n, 1, S, S]
    x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> None:
    """Turn the hue, keep HSV's value and chroma.

    A channel fades with its distance from the hue on the color wheel. The hue in sixths of a turn
    is 2 + (g + b - r - value) / chroma up to half a turn, and its mirror image beyond; that needs
    no choice between cases. Every intermediate is one plane.
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(r, g)
    torch.maximum(value, b, out=value)
    least = torch.minimum(r, g)
    torch.minimum(least, b, out=least)
    chroma = torch.sub(value, least, out=least)
    hue = (g + b).sub_(r).sub_(value).div_(chroma.clamp_min(1e-12)).add_(2)
    hue.copysign_(g - b).add_(6 * turns.squeeze(1))
    hue.sub_((hue / 6).floor_(), alpha=6)  # [n, S, S] in [0, 6]
    # Green and blue fade with the distance from 2 and 4 sixths; red, at 0 and 6, with the nearness
    # to 3.
    falling = torch.add(value, chroma)
    rising = value.sub_(chroma, alpha=2)
    for channel, sixths, start, sign in (
        (r, 3, rising, 1),
        (g, 2, falling, -1),
        (b, 4, falling, -1),
    ):
        torch.sub(hue, sixths, out=channel).abs_().clamp_(1, 2)
        torch.addcmul(start, channel, chroma, value=sign, out=channel)
    x.clamp_(0, 1)


def _blur(x: Tensor, sigma: Tensor) -> None:
    """Gaussian blur with one sigma a sample, reflected at the border."""
    n, size = len(x), x.shape[-1]
    radius = blur_kernel_size(size) // 2
    offset = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.softmax(-0.5 * (offset / sigma.view(n, 1)).square(), dim=1)  # [n, taps]
    pixel = (torch.arange(size, device=x.device).unsqueeze(1) + offset).abs_()
    pixel = (size - 1) - ((size - 1) - pixel).abs_()  # [size, taps]
    pixel = pixel.expand(3 * n, -1, -1)
    weights = weights.repeat_interleave(3, 0).unsqueeze(1).expand(-1, size, -1)
    planes = _combine_rows(x.view(3 * n, size, 1, size), pixel, weights)
    planes = _combine_rows(planes.transpose(1, 3), pixel, weights)
    x.copy_(planes.view(n, 3, size, size).transpose(2, 3))


OPERATIONS = (_brightness, _contrast, _saturation, _hue, _saturation, _blur)
# The order in which a view takes them: the jitter's four, each in any of four places, then
# grayscale and blur.
STEPS = (*range(4), *range(4), *range(4), *range(4), 4, 5)
