"""Image augmentation in batches on the training device, with parameters drawn on the host.

Parameters and pixels are kept apart. `simclr_params` and `crop_flip_params` draw one row of NumPy
parameters per sample as a pure function of (seed, epoch, sample, view), so a view does not depend
on the batch, the worker or the process that makes it, and a resumed run replays nothing.
`make_view` applies the rows to a batch of uint8 images on any device: one small host-to-device
copy, no synchronization, and no loop over samples but on a CPU, whose caches hold a few of them at
a time. Each operation (`common.data.pixels`) equals torchvision's functional form.

Shape legend: n samples, H x W source pixels, S output pixels (square), all images channels first
and RGB.

Source: SimCLR, appendix A (Chen et al. 2020, arXiv:2002.05709).
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.pixels import (
    BEYOND,
    OPERATIONS,
    STEPS,
    blur_kernel_size,
    box_bands,
    crop_resize_flip,
    crop_resize_flip_bytes,
    rotate,
    stain,
    stain_maps,
)
from common.rng import uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Samples = np.ndarray | Sequence[int]
Side = int | tuple[int, int]  # of a square, or (height, width), in pixels

# torchvision gives a random crop this many tries before it takes the central one.
CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)
ROTATIONS = ("none", "90", "any")
NO_STAIN = np.repeat([1.0, 0.0], 3)

# Columns of one sample's row of uniforms. New ones come last: what is drawn from the others stays.
_AREA = slice(0, CROP_TRIES)
_RATIO = slice(CROP_TRIES, 2 * CROP_TRIES)
_TOP, _LEFT, _FLIP = range(2 * CROP_TRIES, 2 * CROP_TRIES + 3)
_NUM_CROP_FLIP = _FLIP + 1
_JITTERED, _GRAYSCALE, _BLURRED, _SIGMA = range(_NUM_CROP_FLIP, _NUM_CROP_FLIP + 4)
_FACTORS = slice(_SIGMA + 1, _SIGMA + 5)
_ORDER = slice(_SIGMA + 5, _SIGMA + 9)
_ANGLE = _ORDER.stop  # of clips; of the others it is the turn
_FLIP_ROWS = _ANGLE + 1
_STAIN = slice(_FLIP_ROWS + 1, _FLIP_ROWS + 7)
_NUM_SIMCLR = _STAIN.stop

# float32 values of views that a CPU thread works on at once, 2 MiB: more leave its caches, fewer
# take more calls.
_CPU_VALUES = 2**19
# A run of samples of so many values takes an operation in the time of its calls.
_CPU_RUN = 2**14


@dataclass(frozen=True)
class ViewSettings:
    """What SimCLR's views are drawn from; the defaults are those of the paper, appendix A.

    Attributes:
        color_strength: of the color jitter, 0 to 2.5 (hue then spans the whole circle).
        blur: probability of the blur.
        crop_min: smallest share of the image's area that a crop takes.
        grayscale: probability of grayscale.
        vertical_flip: whether half of the views are mirrored top to bottom.
        rotation: `90`, a multiple of 90 degrees; `any`, any angle; `none`.
        stain: of the jitter of hematoxylin, eosin and DAB, 0 to 1: a stain's density is multiplied
            by a factor uniform in 1 +- stain, and moved by a shift uniform in +- stain (Tellez et
            al. 2019, arXiv:1902.06543, whose light jitter has 0.05 and strong one 0.2).

    Raises:
        ValueError: a setting is out of range.
    """

    color_strength: float = 1.0
    blur: float = 0.5
    crop_min: float = 0.08
    grayscale: float = 0.2
    vertical_flip: bool = False
    rotation: str = ROTATIONS[0]
    stain: float = 0.0

    def __post_init__(self):
        if not 0 <= self.color_strength <= 2.5:
            raise ValueError(f"color_strength must be in [0, 2.5], got {self.color_strength}")
        for name in ("blur", "grayscale", "stain"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 < self.crop_min <= 1:
            raise ValueError(f"crop_min must be in (0, 1], got {self.crop_min}")
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation must be one of {ROTATIONS}, got {self.rotation!r}")

    @classmethod
    def of(cls, args) -> "ViewSettings":
        """The settings that the flags of the same names give."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


@dataclass
class ViewParams:
    """One row of augmentation parameters per sample, on the host.

    Attributes:
        boxes: (n, 4) float64: top, left, height, width in source pixels, whole numbers.
        flip: (n,) bool, mirror left to right.
        jittered: (n,) bool, whether the color jitter applies.
        factors: (n, 4) float64: brightness, contrast, saturation (1 keeps), hue (turns of the
            color circle, 0 keeps).
        order: (n, 4) int64 permutations: column s holds the factor that is applied s-th.
        grayscale: (n,) bool.
        sigma: (n,) float64, blur's standard deviation in output pixels, 0 for none.
        angle: (n,) float64, rotation in degrees, counter-clockwise, 0 for none.
        flip_rows: (n,) bool, mirror top to bottom.
        transposed: (n,) bool, rows become columns, behind both mirrors: with them every turn by
            multiples of 90 degrees.
        stain: (n, 6) float64: factors (1 keeps) and shifts (0 keeps) of the stains' densities.
    """

    boxes: np.ndarray
    flip: np.ndarray
    jittered: np.ndarray
    factors: np.ndarray
    order: np.ndarray
    grayscale: np.ndarray
    sigma: np.ndarray
    angle: np.ndarray
    flip_rows: np.ndarray
    transposed: np.ndarray
    stain: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    def repeat(self, k: int) -> "ViewParams":
        """Return each row k times in succession, as the k frames of a clip need it."""
        return self.take(np.repeat(np.arange(len(self)), k))

    def take(self, rows: np.ndarray) -> "ViewParams":
        """Return the rows that an index array names, in its order."""
        return ViewParams(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def in_words(self) -> list[list[str]]:
        """Of each row but for its crop: mirrors and turn, color, blur, stains; "" for none."""
        lines = []
        for row in range(len(self)):
            turns = {
                "left to right": self.flip[row],
                "top to bottom": self.flip_rows[row],
                "transposed": self.transposed[row],
                f"{self.angle[row]:.0f} degrees": self.angle[row] != 0,
            }
            colors = []
            if self.jittered[row]:
                factors = [f"{name} {{:.2f}}" for name in ("brightness", "contrast", "saturation")]
                factors.append("hue {:+.2f}")
                colors = [factors[op].format(self.factors[row, op]) for op in self.order[row]]
            if self.grayscale[row]:
                colors.append("gray")
            stains = []
            if (self.stain[row] != NO_STAIN).any():
                names = ("hematoxylin", "eosin", "DAB")
                by_stain = zip(names, *self.stain[row].reshape(2, 3), strict=True)
                stains = [f"{name} x {by:.2f} {shift:+.2f}" for name, by, shift in by_stain]
            blur = f"{self.sigma[row]:.1f} px" if self.sigma[row] else ""
            words = [text for text, applies in turns.items() if applies]
            lines.append([", ".join(words), ", ".join(colors), blur, ", ".join(stains)])
        return lines


def _height_width(size_in: Side) -> tuple[int, int]:
    height, width = (size_in, size_in) if np.ndim(size_in) == 0 else size_in
    if height < 1 or width < 1:
        raise ValueError(f"size_in must be positive, got {size_in}")
    return int(height), int(width)


def _crop_boxes(u: np.ndarray, size_in: Side, scale: tuple[float, float]) -> np.ndarray:
    """Random-resized-crop boxes from rows of uniforms, with torchvision's tries and fallback."""
    height, width = _height_width(size_in)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must satisfy 0 < low <= high <= 1, got {scale}")
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:, _AREA])  # [n, tries]
    low, high = np.log(CROP_RATIO)
    ratio = np.exp(low + (high - low) * u[:, _RATIO])
    w = np.rint(np.sqrt(area * ratio))
    h = np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(axis=1)[:, None]
    h = np.take_along_axis(h, first, axis=1)[:, 0]
    w = np.take_along_axis(w, first, axis=1)[:, 0]
    top = np.floor(u[:, _TOP] * (height - h + 1))
    left = np.floor(u[:, _LEFT] * (width - w + 1))

    # round(), as torchvision; at least one pixel, which torchvision does not guarantee for an image
    # one pixel thin.
    central_w = max(min(width, round(height * CROP_RATIO[1])), 1)
    central_h = max(min(height, round(width / CROP_RATIO[0])), 1)
    central_top = (height - central_h) // 2
    central_left = (width - central_w) // 2
    central = np.array([central_top, central_left, central_h, central_w], np.float64)
    random = np.stack([top, left, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], random, central)


def identity_params(n: int, size_in: Side) -> ViewParams:
    """Return the parameters of n views that only resize the whole image.

    Args:
        n: rows.
        size_in: source side in pixels, or (H, W).

    Returns:
        ViewParams of n rows.

    Raises:
        ValueError: `size_in` is not positive.
    """
    height, width = _height_width(size_in)
    return ViewParams(
        boxes=np.tile(np.array([0.0, 0.0, height, width]), (n, 1)),
        flip=np.zeros(n, bool),
        jittered=np.zeros(n, bool),
        factors=np.tile(np.array([1.0, 1.0, 1.0, 0.0]), (n, 1)),
        order=np.tile(np.arange(4), (n, 1)),
        grayscale=np.zeros(n, bool),
        sigma=np.zeros(n),
        angle=np.zeros(n),
        flip_rows=np.zeros(n, bool),
        transposed=np.zeros(n, bool),
        stain=np.tile(NO_STAIN, (n, 1)),
    )


def crop_flip_params(
    seed: int,
    epoch: int,
    samples: Samples,
    view: int,
    size_in: Side,
    scale: tuple[float, float] = (0.5, 1.0),
    settings: ViewSettings = ViewSettings(),
) -> ViewParams:
    """Draw the parameters of supervised training: a random resized crop, half of them mirrored.

    Of the settings it takes `vertical_flip`, `rotation` and `stain`.

    Args:
        seed, epoch, samples, view: keys of the draw, see `uniform`.
        size_in: source side in pixels, or (H, W).
        scale: range of the crop's share of the image's area.
        settings: what the flags set.

    Returns:
        ViewParams of n rows.

    Raises:
        ValueError: `samples`, `size_in` or `scale` is out of range.
    """
    u = uniform(seed, epoch, samples, view, _NUM_SIMCLR)
    params = identity_params(len(u), size_in)
    params.boxes = _crop_boxes(u, size_in, scale)
    params.flip = u[:, _FLIP] < 0.5
    _turn_and_stain(params, u, settings)
    return params


def _turn_and_stain(params: ViewParams, u: np.ndarray, settings: ViewSettings) -> None:
    if settings.vertical_flip:
        params.flip_rows = u[:, _FLIP_ROWS] < 0.5
    if settings.rotation == "any":
        params.angle = 360 * u[:, _ANGLE] - 180
    elif settings.rotation == "90":
        quarter = np.floor(4 * u[:, _ANGLE])
        params.flip = params.flip ^ np.isin(quarter, (1, 2))
        params.flip_rows = params.flip_rows ^ np.isin(quarter, (2, 3))
        params.transposed = quarter % 2 == 1
    params.stain = params.stain + settings.stain * (2 * u[:, _STAIN] - 1)


def clip_params(
    seed: int,
    epoch: int,
    samples: Samples,
    view: int,
    size_in: Side,
    spread: Sequence[float] = (0.2, 0.2, 0.2, 0.1),
    scale: tuple[float, float] | None = None,
    degrees: float = 0.0,
) -> ViewParams:
    """Draw the parameters of clips.

    Half of the time a mirror image, always color jitter in random order; a random resized crop and
    a rotation where they are asked for.

    One row a clip. `make_view(frames, clip_params(...).repeat(T), size)` gives the T frames of each
    clip the same draw, and a second call with the same rows the frames of another stream; the
    contrast's mean is each frame's own, as torchvision takes it on a video.

    Args:
        seed, epoch, samples, view: keys of the draw, see `uniform`.
        size_in: source side in pixels, or (H, W).
        spread: brightness, contrast and saturation vary by factors in 1 +- spread, 0 to 1; hue by
            +- spread turns, 0 to 0.5, as ColorJitter takes them.
        scale: range of the crop's share of the image's area, as RandomResizedCrop takes it; None:
            the whole image.
        degrees: the rotation is uniform in +- degrees, 0 to 180.

    Returns:
        ViewParams of n rows.

    Raises:
        ValueError: `samples`, `size_in`, `spread`, `scale` or `degrees` is out of range.
    """
    spread = np.asarray(spread, np.float64)
    if spread.shape != (4,) or not ((spread >= 0) & (spread <= (1, 1, 1, 0.5))).all():
        raise ValueError(
            f"spread must be four numbers in [0, 1], hue's in [0, 0.5], got {spread.tolist()}"
        )
    if not 0 <= degrees <= 180:
        raise ValueError(f"degrees must be in [0, 180], got {degrees}")
    u = uniform(seed, epoch, samples, view, _ANGLE + 1)
    params = identity_params(len(u), size_in)
    if scale is not None:
        params.boxes = _crop_boxes(u, size_in, scale)
    params.flip = u[:, _FLIP] < 0.5
    params.jittered = np.full(len(u), spread.any())
    params.factors = params.factors + spread * (2 * u[:, _FACTORS] - 1)
    params.order = u[:, _ORDER].argsort(axis=1)
    params.angle = degrees * (2 * u[:, _ANGLE] - 1)
    return params


def simclr_params(
    seed: int,
    epoch: int,
    samples: Samples,
    view: int,
    size_in: Side,
    size_out: int,
    settings: ViewSettings = ViewSettings(),
) -> ViewParams:
    """Draw the parameters of one SimCLR view (appendix A of the paper).

    A crop of `crop_min` to 100 % of the area; with the probabilities in brackets a mirror image
    (0.5), color jitter of 0.8, 0.8, 0.8 and 0.2 times `color_strength` in random order (0.8),
    grayscale (`grayscale`), and Gaussian blur with sigma uniform in [0.1, 2] output pixels
    (`blur`). The paper's CIFAR-10 setting (B.9) is strength 0.5 and blur 0. The other settings are
    off by default.

    Args:
        seed, epoch, samples, view: keys of the draw, see `uniform`.
        size_in: source side in pixels, or (H, W).
        size_out: side of the view in pixels; below 20 a tenth of it holds no kernel and nothing is
            blurred.
        settings: what the flags set.

    Returns:
        ViewParams of n rows.

    Raises:
        ValueError: `samples` or `size_in` is out of range.
    """
    u = uniform(seed, epoch, samples, view, _NUM_SIMCLR)
    spread = settings.color_strength * np.array([0.8, 0.8, 0.8, 0.2])
    low = np.array([*np.maximum(1 - spread[:3], 0), -spread[3]])
    high = np.array([*(1 + spread[:3]), spread[3]])
    blurred = (u[:, _BLURRED] < settings.blur) & (blur_kernel_size(size_out) > 1)
    params = identity_params(len(u), size_in)
    params.boxes = _crop_boxes(u, size_in, (settings.crop_min, 1.0))
    params.flip = u[:, _FLIP] < 0.5
    params.jittered = u[:, _JITTERED] < 0.8
    params.factors = low + (high - low) * u[:, _FACTORS]
    params.order = u[:, _ORDER].argsort(axis=1)
    params.grayscale = u[:, _GRAYSCALE] < settings.grayscale
    params.sigma = np.where(blurred, 0.1 + 1.9 * u[:, _SIGMA], 0.0)
    _turn_and_stain(params, u, settings)
    return params


def _check(images: Tensor, params: ViewParams, size: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 of shape (n, 3, H, W), got {images.dtype} of"
            f" {tuple(images.shape)}"
        )
    if len(params) != len(images):
        raise ValueError(
            f"params must have one row an image, got {len(params)} rows for {len(images)} images"
        )
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    top, left, height, width = params.boxes.T
    inside = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
    inside &= (top + height <= images.shape[2]) & (left + width <= images.shape[3])
    if not inside.all() or (params.boxes != np.rint(params.boxes)).any():
        raise ValueError(
            f"params.boxes must be whole pixels inside the {images.shape[2]} x"
            f" {images.shape[3]} image"
        )


def make_view(
    images: Tensor,
    params: ViewParams,
    size: int,
    beyond: str = BEYOND[0],
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Augment a batch, each sample by its own parameters.

    Crop, resize, mirror and rotate, then stain, jitter, grayscale and blur. A GPU takes the whole
    batch at once. A CPU takes a few samples at a time, as many as its caches hold (three of 224
    pixels a thread): at that size a pass over the whole batch waits for memory, several times
    longer than it computes.

    The same batch gives the same bits with the same number of threads. In another one a sample's
    view agrees to 1e-6.

    Args:
        images: (n, 3, H, W) uint8 on any device.
        params: ViewParams of n rows.
        size: side of the views in pixels.
        beyond: what a rotation shows beyond the border, see `rotate`.
        statistics: the channels' means and standard deviations that `normalize` takes, which
            prepares the views for a backbone while they are in the caches; None: it is left out.
        out: where to write the views, of any strides; None: a new tensor.

    Returns:
        (n, 3, size, size) float32 on the images' device, in [0, 1] without `statistics`.

    Raises:
        ValueError: images or params of another type or shape, or a box that leaves the image.
    """
    _check(images, params, size)
    kind = images.device.type
    if not torch.amp.is_autocast_available(kind):
        return _make_view(images, params, size, beyond, statistics, out)
    with torch.autocast(kind, enabled=False):  # whose matrix products would round pixels to 16 bits
        return _make_view(images, params, size, beyond, statistics, out)


def make_views(
    images: Tensor,
    drawn: Sequence[ViewParams],
    size: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    beyond: str = BEYOND[0],
) -> Tensor:
    """`make_view` of the same images by several rows of parameters, in one tensor.

    Returns:
        (v * n, 3, size, size) for v in `drawn`, first all of the first, channels-last in memory.
    """
    n = len(images)
    shape = (len(drawn) * n, size, size, 3)
    out = torch.empty(shape, device=images.device).permute(0, 3, 1, 2)
    for params, views in zip(drawn, out.unflatten(0, (len(drawn), n)), strict=True):
        make_view(images, params, size, beyond, statistics, views)
    return out


def _make_view(images, params, size, beyond, statistics, out) -> Tensor:
    n = len(params)
    on_cpu = images.device.type == "cpu"
    at_once = max(1, n)
    if on_cpu:
        at_once = max(1, _CPU_VALUES * torch.get_num_threads() // (3 * size * size))
    taken = _taken(params, size)
    order = np.arange(n)
    if n > at_once:
        # Samples that take the same operations in the same order stand together, and take them
        # where they lie.
        order = np.lexsort(taken[::-1])
        params = params.take(order)
        taken = taken[:, order]
    chunks = [slice(start, start + at_once) for start in range(0, n, at_once)]
    least = _CPU_RUN / (3 * size * size) if on_cpu else n
    plans = [_plan(taken[:, chunk], least) for chunk in chunks]

    # Parameters and index lists in one buffer: one copy to the device, asynchronous from pinned
    # memory. Grayscale is a saturation of 0.
    radians = np.deg2rad(params.angle)
    floats = np.column_stack(
        [
            params.boxes,
            params.flip,
            params.factors,
            ~params.grayscale,
            params.sigma,
            np.cos(radians),
            np.sin(radians),
            params.flip_rows,
            params.transposed,
            *stain_maps(params.stain),
        ]
    ).astype(np.float32)
    lists = [rows for plan in plans for _, rows in plan if not isinstance(rows, slice)]
    packed = torch.from_numpy(np.concatenate([floats.view(np.int32).ravel(), *lists]))
    if images.is_cuda:
        packed = packed.pin_memory()
    packed = packed.to(images.device, non_blocking=True)
    floats_there, *lists_there = packed.split([floats.size, *map(len, lists)])
    floats_there = floats_there.view(torch.float32).view(floats.shape)
    box, flip, amounts, turns, flip_rows, transposed, stains = floats_there.split(
        [4, 1, len(OPERATIONS), 2, 1, 1, 12], dim=1
    )
    if not on_cpu:
        bands = box_bands(box, flip > 0, flip_rows > 0, params.boxes, size)
    next_list = iter(lists_there)

    if out is None and len(chunks) != 1:
        out = torch.empty((n, 3, size, size), device=images.device)
    for chunk, plan in zip(chunks, plans, strict=True):
        plan = [
            (op, rows if isinstance(rows, slice) else next(next_list).long()) for op, rows in plan
        ]
        rows = params.take(np.arange(n)[chunk]) if len(chunks) > 1 else params
        if on_cpu:
            x = crop_resize_flip_bytes(
                images, order[chunk], rows.boxes, rows.flip, rows.flip_rows, size
            )
        else:
            x = crop_resize_flip(images, rows.boxes, *bands)
        if rows.transposed.any():
            x = torch.where(transposed[chunk].view(-1, 1, 1, 1) > 0, x.transpose(2, 3), x)
        if rows.angle.any():
            x = rotate(x, *turns[chunk].unbind(1), beyond)
        if (rows.stain != NO_STAIN).any():
            stain(x, stains[chunk])
        _apply(plan, x, amounts[chunk])
        if statistics:
            mean, std = _mean_std(x.device, x.dtype, *statistics)
            x.sub_(mean).div_(std)
        if out is None:
            return x
        if len(chunks) == 1:
            return out.copy_(x)
        for row, view in zip(order[chunk], x, strict=True):
            out[row] = view
    return out


def _apply(plan: list[tuple[int, slice | Tensor]], x: Tensor, amounts: Tensor) -> None:
    for op, rows in plan:
        if isinstance(rows, slice):
            OPERATIONS[op](x[rows], amounts[rows, op].view(-1, 1, 1, 1))
        else:
            part = x.index_select(0, rows)
            OPERATIONS[op](part, amounts[:, op].index_select(0, rows).view(-1, 1, 1, 1))
            x.index_copy_(0, rows, part)


def _taken(params: ViewParams, size: int) -> np.ndarray:
    """Which samples take which operation, [18, n] bool, in the order of STEPS.

    Each of the jitter's four as the first, second, third and last, then grayscale, then blur.
    """
    slots = [params.jittered & (column == op) for column in params.order.T for op in range(4)]
    blurred = (params.sigma > 0) & (blur_kernel_size(size) > 1)
    return np.stack([*slots, params.grayscale, blurred])


def _plan(taken: np.ndarray, least: float) -> list[tuple[int, slice | np.ndarray]]:
    """The operations of a chunk in their order, each with the samples that take it.

    Those are a slice, or an int32 array that costs a copy to and fro. Samples that stand in several
    runs take the operation run by run where that is no more work: where a run has `least` samples
    on average.
    """
    plan = []
    for op, mask, count in zip(STEPS, taken, taken.sum(axis=1).tolist(), strict=True):
        if count == 0:
            continue
        if count == len(mask):
            plan.append((op, slice(None)))
            continue
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
        if len(edges) == 2 or 2 * count >= least * len(edges):
            plan += [(op, slice(*run)) for run in zip(edges[::2], edges[1::2], strict=True)]
        else:
            plan.append((op, np.flatnonzero(mask).astype(np.int32)))
    return plan


def resize(images: Tensor, size: int) -> Tensor:
    """Resize whole images for evaluation, antialiased bilinear.

    Args:
        images: (n, 3, H, W) uint8 on any device.
        size: side of the result in pixels; H != W is stretched to a square.

    Returns:
        (n, 3, size, size) float32 in [0, 1], without the rounding of a CPU's `make_view`.

    Raises:
        ValueError: images of another type or shape.
    """
    params = identity_params(len(images), images.shape[-2:])
    if images.device.type != "cpu":
        return make_view(images, params, size)
    _check(images, params, size)
    out = torch.empty((len(images), 3, size, size), device=images.device)
    for views, pixels in zip(out.split(16), images.split(16), strict=True):  # few floats at once
        views.copy_(F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True))
    return out.div_(255).clamp_(0, 1)


@functools.cache
def _mean_std(
    device: torch.device, dtype: torch.dtype, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    # Cached, because a new constant would be a synchronous copy at every step. Ordinary tensors
    # even if the first call is made in inference mode: autograd could not use the others later.
    with torch.inference_mode(False):
        return torch.tensor([mean, std], device=device, dtype=dtype).view(2, 3, 1, 1)


def normalize(
    x: Tensor,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """Subtract the channels' means and divide by their standard deviations.

    Args:
        x: (..., 3, H, W), floating point in [0, 1].
        mean, std: three numbers each.

    Returns:
        Like x; x itself is not changed.
    """
    mean, std = _mean_std(x.device, x.dtype, mean, std)
    return (x - mean).div_(std)


def denormalize(
    x: Tensor,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """Undo `normalize`, for pictures."""
    mean, std = _mean_std(x.device, x.dtype, mean, std)
    return x * std + mean


def channel_statistics(batches: Iterable[Tensor]) -> list[list[float]]:
    """The channels' means and standard deviations for `normalize`, to six digits.

    They are counted in integers, so that every machine finds the same. A deviation is at least that
    of one step of eight bits: a constant channel stays finite.

    Args:
        batches: uint8 images (n, 3, H, W).
    """
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for images in batches:
        for channel, count in enumerate(counts):
            count += torch.bincount(images[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True).double()
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return [[round(value, 6) for value in values.tolist()] for values in (mean, std)]
