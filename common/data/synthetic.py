"""Embedded data sets: generated from a seed, learnable, not trivial, and free of downloads.

Pixels are made with `Generator.random` and the operations that IEEE 754 rounds exactly (+ - * /
sqrt floor), so a seed gives the same bytes on every machine: `exp`, `sin` and `cos` differ in the
last bit between instruction sets.
"""

from functools import partial
from typing import NamedTuple

import numpy as np


class _Cell(NamedTuple):
    """Recipe of one class.

    Lengths are shares of the cell's radius, pairs are ranges drawn from per image.
    """

    share: float  # of the images
    nuclei: int
    nucleus: tuple[float, float]  # radius of one nucleus
    apart: tuple[float, float]  # distance of a nucleus from the cell's center
    clumps: float  # chromatin: 0 fine grain, 1 coarse clumps
    ruffle: tuple[float, float]  # amplitude of the membrane's waves
    stretch: tuple[float, float]  # length over width
    vacuoles: tuple[float, float]
    granules: tuple[float, float]
    halo: float  # clearing of the cytoplasm around the nucleus


_CELLS = {
    "squamous": _Cell(
        1.3, 1, (0.22, 0.28), (0.0, 0.2), 0.1, (0.12, 0.18), (1.0, 1.3), (0, 1), (0, 3), 0.0
    ),
    "parabasal": _Cell(
        1.0, 1, (0.50, 0.60), (0.0, 0.1), 0.1, (0.01, 0.04), (1.0, 1.2), (0, 1), (0, 3), 0.0
    ),
    "dyskaryotic": _Cell(
        0.8, 1, (0.52, 0.64), (0.0, 0.1), 1.0, (0.12, 0.18), (1.0, 1.2), (0, 1), (0, 3), 0.0
    ),
    "binucleate": _Cell(
        0.9, 2, (0.26, 0.32), (0.3, 0.4), 0.1, (0.02, 0.06), (1.0, 1.3), (0, 1), (0, 3), 0.0
    ),
    "koilocyte": _Cell(
        0.9, 1, (0.26, 0.32), (0.0, 0.2), 1.0, (0.05, 0.10), (1.0, 1.3), (0, 1), (0, 3), 1.0
    ),
    "macrophage": _Cell(
        1.0, 1, (0.26, 0.34), (0.3, 0.5), 0.1, (0.04, 0.08), (1.0, 1.2), (6, 10), (0, 3), 0.0
    ),
    "granulocyte": _Cell(
        1.1, 3, (0.22, 0.28), (0.25, 0.3), 1.0, (0.02, 0.06), (1.0, 1.1), (0, 1), (10, 16), 0.0
    ),
    "columnar": _Cell(
        1.0, 1, (0.30, 0.36), (0.3, 0.5), 0.1, (0.02, 0.06), (1.8, 2.2), (0, 1), (0, 3), 0.0
    ),
}
# Where the k-th nucleus lies around the center; unused ones repeat the first.
_PLACES = {
    1: ((1, 0),) * 3,
    2: ((1, 0), (-1, 0), (1, 0)),
    3: ((1, 0), (-0.5, 0.8660254), (-0.5, -0.8660254)),
}
# Optical densities in R, G, B.
_PINK = (0.12, 0.55, 0.3)
_GREEN = (0.6, 0.18, 0.22)
_BLUE = (1.3, 1.35, 0.65)
_CHUNK = 16  # images made at once: a plane of them fits in a core's cache


def cytology(
    num_images: int = 1280, size: int = 64, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Make images of stained cells, one in the middle of each, in eight mildly imbalanced classes.

    The class decides the number, size and place of the nuclei, the chromatin's texture, the
    membrane's waves and elongation, vacuoles, granules and a perinuclear halo (`_CELLS`): what
    crops, flips, color jitter and blur leave. Position, rotation, scale, both stains, light,
    focus, noise, neighboring cells and debris are nuisance: drawn alike for all classes. Pure in
    its arguments.

    Returns:
        images: uint8 [num_images, 3, size, size], RGB, shuffled.
        labels: int64 [num_images], index into the names; counts follow the recipes' shares to
            within one image.
        class_names: the names, in the labels' order.

    Raises:
        ValueError: fewer images than classes, or a size below 16.
    """
    if num_images < len(_CELLS) or size < 16:
        raise ValueError(
            f"num_images={num_images}, size={size}: at least {len(_CELLS)} images of 16 pixels"
            " are needed"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    recipes = list(_CELLS.values())
    edges = np.cumsum([cell.share for cell in recipes])
    edges = np.floor(edges / edges[-1] * num_images + 0.5)
    labels = np.searchsorted(edges, np.arange(num_images), side="right").astype(np.int64)
    labels = labels[np.argsort(rng.random(num_images), kind="stable")]
    images = np.empty((num_images, 3, size, size), np.uint8)
    for i in range(0, num_images, _CHUNK):
        images[i : i + _CHUNK] = _render([recipes[k] for k in labels[i : i + _CHUNK]], size, rng)
    return images, labels, list(_CELLS)


def _render(cells: list[_Cell], size: int, rng: np.random.Generator) -> np.ndarray:
    n = len(cells)

    def pairs(values):  # of two numbers a cell -> two arrays [n, 1, 1]
        return np.array(values, np.float32).T.reshape(2, n, 1, 1)

    def drawn(field):
        low, high = pairs([getattr(cell, field) for cell in cells])
        return low + (high - low) * rng.random((n, 1, 1), np.float32)

    def uniform(low, high, *shape):
        return np.float32(low) + np.float32(high - low) * rng.random((n, *shape, 1, 1), np.float32)

    # The cell's own frame: shifted, rotated, scaled, stretched. Its membrane lies at distance 1.
    grid = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
    scale = uniform(0.75, 1.05)
    cos, sin = _directions(rng, n)
    stretch = np.sqrt(drawn("stretch"))
    # A cell fills its image: most small crops then show some of it, and not the empty slide.
    dx = grid - uniform(-0.2, 0.2)
    dy = grid[:, None] - uniform(-0.2, 0.2)
    x = (dx * cos + dy * sin) / (scale * stretch)
    y = (dy * cos - dx * sin) * stretch / scale
    soft = np.float32(3 / size) / scale  # a pixel and a half
    outline = _waves(rng, x, y, drawn("ruffle"), 3, 7)
    body = _inside(outline, soft)
    rim = body * (1 - _inside(outline, soft, -3 * soft))

    fine, coarse, mottle = (_noise(rng, n, size, size // step) for step in (2, 5, 10))
    vacuole = _discs(rng, x, y, drawn("vacuoles"), 10, 0.14, 0.28, 0.75, soft)
    granule = _discs(rng, x, y, drawn("granules"), 16, 0.05, 0.09, 0.85, soft)
    near = np.float32(9)
    clumps, clear = pairs([(cell.clumps, cell.halo) for cell in cells])
    radius = drawn("nucleus")
    apart = drawn("apart")
    ux, uy = _directions(rng, n)
    for k in range(3):
        px, py = pairs([_PLACES[cell.nuclei][k] for cell in cells])
        vx = apart * (ux * px - uy * py) * stretch
        vy = apart * (ux * py + uy * px) / stretch
        # The stretch is undone here: a long cell has a round nucleus.
        distance = _waves(rng, (x - vx) * stretch, (y - vy) / stretch, 0.03 + 0.06 * clumps, 2, 4)
        near = np.minimum(near, distance / radius)
    nucleus = _inside(near, soft / radius)
    nuclear_rim = nucleus * (1 - _inside(near, soft / radius, -1.5 * soft / radius))
    halo = clear * _inside(near, np.float32(0.3), np.float32(0.8)) * (1 - nucleus)

    chromatin = (1 - clumps) * (fine - 0.5) + clumps * 2 * (_smooth((coarse - 0.3) * 2.5) - 0.5)
    cytoplasm = body * (0.75 + 0.5 * mottle)
    cytoplasm = cytoplasm * (1 - 0.8 * vacuole * (1 - nucleus)) * (1 - 0.75 * halo) + 0.5 * rim
    nuclear = nucleus * (0.85 + uniform(0.5, 0.8) * chromatin) + 0.35 * nuclear_rim

    # Neighbors and debris, in the slide's frame.
    opacity = uniform(0.15, 0.6)
    neighbors = _discs(rng, dx, dy, uniform(0, 3), 3, 0.3, 0.6, 1.5, soft)
    cytoplasm += (1 - body) * opacity * neighbors
    debris = _discs(rng, dx, dy, uniform(0, 9), 8, 0.02, 0.09, 1.4, soft)
    dark = granule * body * (1 - nucleus) + (1 - body) * debris

    # Optical densities per stain and channel; 1 / (1 + d + d^2 / 2) stands for exp(-d).
    pink, green, blue = np.array([_PINK, _GREEN, _BLUE], np.float32).reshape(3, 3, 1, 1)
    tint = uniform(0, 0.7, 1)
    counter = ((1 - tint) * pink + tint * green) * uniform(0.85, 1.15, 3) * uniform(0.4, 1.3, 1)
    blue = blue * uniform(0.9, 1.1, 3) * uniform(0.5, 1.4, 1)
    density = (cytoplasm + 0.5 * dark)[:, None] * counter + (nuclear + 0.5 * dark)[:, None] * blue
    image = 1 / (1 + density + density * density / 2)
    lx, ly = _directions(rng, n)
    tilt = uniform(0.0, 0.14)
    light = (1 + tilt * (lx * grid + ly * grid[:, None])) * (0.96 + 0.08 * _noise(rng, n, size, 4))
    image *= light[:, None] * uniform(0.65, 1, 1) * uniform(0.94, 1, 3)
    blur = uniform(0.1, 0.6, 1)
    for axis in (2, 3):
        image += blur * ((np.roll(image, 1, axis) + np.roll(image, -1, axis)) / 2 - image) * 0.5
    grain = _grain(rng, image.shape)
    image += uniform(0.01, 0.03, 1) * grain
    return _to_uint8(image)


class FaceClips(NamedTuple):
    """Videos of generated faces.

    Attributes:
        pixels: uint8 [frames, 3, size, size], the frames of all videos.
        names: the videos' names: `003` is real, `003_001` the face 003 manipulated with 001 as its
            source.
        splits: "train", "val" or "test" of each video; no face is in two of them.
        frames: int64 arrays, each video's frames in order of time, as positions in `pixels`.
        rate: frames a second.
    """

    pixels: np.ndarray
    names: list[str]
    splits: list[str]
    frames: list[np.ndarray]
    rate: float


# Faces that are swapped with one another: 6 real videos and 30 manipulated ones, five to one.
_CAST = 6
_RATE = 8.0  # two seconds are 16 frames: a clip of 8 takes every second one, from either start


def face_clips(
    variant: str, num_faces: int = 96, num_frames: int = 16, size: int = 40, seed: int = 0
) -> FaceClips:
    """Make videos of talking faces, a real one to five manipulated ones.

    As in FaceForensics++, faces are swapped within a split, in both orders. A video is one cycle
    from a phase of its own: the mouth opens slowly and shuts at once, so do the eyes at another
    phase, and a shadow sinks over the face. Everything else (features, colors, brightness, place,
    and in each frame grain and a little shake) is nuisance.

    Variant `order`: a manipulated video has exactly the frames of its real one, backwards and from
    another frame of the cycle. So every frame, set of frames and spacing is as frequent in real
    videos as in manipulated ones, whatever the clip's start, and mirror images and color jitter
    change nothing: only the order of the frames tells. To be learned in minutes it shows best in
    the light, which twice in a video fades slowly and comes back at once.

    Variant `flicker`: the inner face is a patch, lighter or darker than the rest and a little
    beside it: once drawn for a real video, redrawn in every frame of a manipulated one. One frame
    shows nothing; the patch flickers.

    Pure in its arguments. Faces are swapped within casts of six; a fifth of the casts, at least
    one, is for validation and another for test.

    Raises:
        ValueError: another variant, fewer than 18 faces or not a multiple of 6, fewer than 2
            frames, or a size below 16.
    """
    if variant not in ("order", "flicker"):
        raise ValueError(f"variant={variant!r}: allowed are order, flicker")
    if num_faces < 3 * _CAST or num_faces % _CAST or num_frames < 2 or size < 16:
        raise ValueError(
            f"num_faces={num_faces}, num_frames={num_frames}, size={size}: at least 18 faces, a"
            " multiple of 6, of 2 frames and 16 pixels are needed"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    held = max(round(num_faces / _CAST * 0.2), 1) * _CAST  # in validation, and again in test
    names = []
    splits = []
    frames = []
    pixels = []
    for face in range(num_faces):
        first_of_cast = face - face % _CAST
        names.append(f"{face:03d}")
        for source in range(first_of_cast, first_of_cast + _CAST):
            if source != face:
                names.append(f"{face:03d}_{source:03d}")
        if face < num_faces - 2 * held:
            splits += ["train"] * _CAST
        elif face < num_faces - held:
            splits += ["val"] * _CAST
        else:
            splits += ["test"] * _CAST
        real = np.arange(num_frames) + sum(map(len, pixels))
        flickers = np.arange(_CAST) > 0 if variant == "flicker" else np.zeros(1, bool)
        drawn = _face(size, num_frames, flickers, rng)  # [videos, num_frames, 3, size, size]
        pixels.append(drawn.reshape(-1, 3, size, size))
        starts = np.floor(rng.random(_CAST - 1) * num_frames).astype(np.int64)
        if variant == "order":
            frames.append(real)
            frames += [np.roll(real[::-1], start) for start in starts]
        else:
            frames += [real + k * num_frames for k in range(_CAST)]
    return FaceClips(np.concatenate(pixels), names, splits, frames, _RATE)


def _face(size: int, num_frames: int, flickers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One face in videos of a whole cycle each, uint8 [videos, num_frames, 3, size, size].

    `flickers` says of each video whether its patch does.
    """

    def uniform(low, high, *shape):
        return np.float32(low) + np.float32(high - low) * rng.random(shape, np.float32)

    def color(low, high):
        return uniform(low, high, 3).reshape(3, 1, 1)

    def each(low, high):  # one number a frame
        return uniform(low, high, len(flickers) * num_frames, 1, 1)

    def blend(image, mask, color):
        return image + mask[:, None] * (color - image)

    grid = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
    soft = np.float32(4 / size)
    scale = uniform(0.85, 1.05)
    x = (grid - uniform(-0.08, 0.08) - each(-0.02, 0.02)) / scale
    y = (grid[:, None] - uniform(-0.08, 0.08) - each(-0.02, 0.02)) / scale
    phase = rng.random(dtype=np.float32) + np.arange(num_frames, dtype=np.float32) / num_frames
    phase = np.tile(phase, len(flickers))[:, None, None]
    cycles = (phase, phase + np.float32(0.4), phase + np.float32(0.7), 2 * phase)
    mouth, eyes, shadow, light = (at - np.floor(at) for at in cycles)

    def ellipse(cx, cy, rx, ry, soft=soft):
        rx, ry = np.float32(rx), np.float32(ry)
        u = (x - cx) / rx
        v = (y - cy) / ry
        return _inside(np.sqrt(u * u + v * v), soft / np.minimum(rx, ry))

    skin = np.array([0.85, 0.62, 0.5], np.float32) * uniform(0.6, 1.1)
    skin = skin.reshape(3, 1, 1) * color(0.92, 1.08)
    hair = color(0.05, 0.5)
    backdrop = color(0.2, 0.8)
    texture = np.float32(0.9) + np.float32(0.2) * _noise(rng, 1, size, max(size // 8, 2))
    image = backdrop * np.ones_like(x + y)[:, None] * texture[:, None]
    width = uniform(0.58, 0.7)
    height = uniform(0.78, 0.9)
    image = blend(image, ellipse(0, -0.12, width * 1.1, height * 1.05), hair)
    face = ellipse(0, 0.05, width, height)
    hairline = _smooth((y + uniform(0.45, 0.6)) / soft / 2 + 0.5)
    image = blend(image, face * hairline, skin * texture[:, None])
    apart = uniform(0.24, 0.32)
    level = uniform(-0.2, -0.08)
    iris = color(0.05, 0.45)
    for side in (-1, 1):
        eye = ellipse(side * apart, level, 0.16, 0.03 + 0.1 * eyes)
        image = blend(image, eye, np.float32(0.95))
        image = blend(image, eye * ellipse(side * apart, level, 0.07, 0.09), iris)
        brow = ellipse(side * apart, level - 0.22, 0.18, 0.035)
        image = blend(image, brow, hair * 0.6)
    image = blend(image, ellipse(0, 0.2, 0.06, 0.12), skin * 0.8)
    lips = ellipse(0, uniform(0.45, 0.52), uniform(0.24, 0.32), 0.04 + 0.16 * mouth)
    image = blend(image, lips, skin * 0.35)
    away = np.abs(y - (shadow * 2 - 1) * np.float32(1.2)) / np.float32(0.3)
    image *= 1 - np.float32(0.3) * _smooth(1 - away)[:, None]
    if flickers.any():
        redrawn = uniform(0, 1, 3, len(flickers), num_frames)
        once = uniform(0, 1, 3, len(flickers), 1)
        patch = np.where(flickers[:, None], redrawn, once).reshape(3, -1, 1, 1)
        side = np.where(patch[0] < 0.5, np.float32(-1), np.float32(1))
        dx, dy = (patch[1:] - np.float32(0.5)) * np.float32(0.06)
        inner = ellipse(dx, 0.12 + dy, 0.45, 0.55, np.float32(0.14))
        tint = np.array([0.3, 0.25, 0.1], np.float32).reshape(3, 1, 1)
        image *= 1 + (inner * side)[:, None] * tint
    else:
        image *= 1 - np.float32(0.5) * light[:, None]
    image *= uniform(0.75, 1.1)
    strength = each(0.01, 0.03)[:, None]
    image += strength * _grain(rng, image.shape)
    return _to_uint8(image).reshape(len(flickers), num_frames, 3, size, size)


_ACTS = (
    "acknowledge", "agreement", "answer", "apology", "backchannel", "command",
    "disagreement", "greeting", "opinion", "other", "question", "statement",
)  # fmt: skip
# from one class to the next: 38.8 from the first to the last, as in the real IEMOCAP-DA
_GROWTH = 1.39456
_ROOMS = 8


def utterances(
    num_utterances: int = 2700, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Make features of utterances: three modalities, none of which tells the twelve acts alone.

    The acts are the pairs of four kinds of wording and three of tone. `text` (64) shows the wording
    well and the tone a little, `audio` (32) the tone well and the wording a little. `video` (96)
    shows above all which of eight rooms it is, which has nothing to do with the act, and has the
    largest scale: side by side with it, k-means finds the rooms. Pure in its arguments.

    Returns:
        modalities: float32 [num_utterances, D] by name.
        labels: int64 [num_utterances], shuffled; the largest class is 38.8 times the smallest, to
            within rounding.
        class_names: the names, in the labels' order.

    Raises:
        ValueError: too few utterances for that imbalance.
    """
    sizes = np.cumprod([1.0] + [_GROWTH] * 11)
    edges = np.floor(np.cumsum(sizes) / sizes.sum() * num_utterances + 0.5)
    if num_utterances < 4 * sizes.sum():
        raise ValueError(
            f"num_utterances={num_utterances}: at least {int(4 * sizes.sum()) + 1} are needed"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = np.searchsorted(edges, np.arange(num_utterances), side="right").astype(np.int64)
    labels = labels[np.argsort(rng.random(num_utterances), kind="stable")]

    def around(groups, width, strength):
        centers = _bell(rng, int(groups.max()) + 1, width)
        return strength * centers[groups]

    def noise(width):
        return _bell(rng, num_utterances, width)

    # Every pair once, in no order of frequency.
    wording = labels % 4
    tone = labels % 3
    room = np.floor(rng.random(num_utterances) * _ROOMS).astype(np.int64)
    modalities = {
        "text": around(wording, 64, 1.0) + around(tone, 64, 0.25) + noise(64),
        "audio": around(tone, 32, 1.0) + around(wording, 32, 0.35) + noise(32),
        "video": 3 * (around(room, 96, 1.0) + around(labels, 96, 0.12) + noise(96)),
    }
    return {name: x.astype(np.float32) for name, x in modalities.items()}, labels, list(_ACTS)


def _bell(rng, *shape):
    """Close to normal numbers of variance 1: sums of twelve uniform ones."""
    return rng.random((12, *shape), np.float32).sum(0) - 6


class TwoStreamClips(NamedTuple):
    """Generated clips of a face and of the scene around it.

    Attributes:
        face, context: uint8 [clips, frames, 3, size, size], RGB.
        labels: int64 [clips], 0 neutrality, 1 enjoyment, 2 confusion, 3 fatigue, 4 distraction.
        splits: "train", "val" or "test" of each clip, in this order; shuffled within.
    """

    face: np.ndarray
    context: np.ndarray
    labels: np.ndarray
    splits: list[str]


_RAER_COUNTS = (1106, 103, 24, 126, 338)
# Whether the face's and the context's value rise in a class; distraction leaves both to chance.
_FACE_RISES = (0, 1, 1, 0, -1)
_CONTEXT_RISES = (0, 1, 0, 1, -1)
_DISTRACTION = 4


def emotion_clips(
    share: float = 0.5,
    val: tuple[int, ...] = (120, 40, 40, 40, 60),
    test: tuple[int, ...] = (120, 40, 40, 40, 60),
    num_frames: int = 8,
    size: int = 32,
    trend: float = 0.4,
    unrest: float = 0.5,
    seed: int = 0,
) -> TwoStreamClips:
    """Make clips of two streams in five classes with RAER's imbalance.

    The rare classes need both streams and time. Each stream shows one value a frame, from 0 to 1:
    the face's is how far the mouth is open and how dark the picture, the context's the height of a
    hand and the room's darkness. Within a clip a value drifts by 0.3 to 1 times `trend`, among
    independent changes of up to `unrest`. Neutrality: both fall. Enjoyment: both rise. Confusion:
    the face's alone rises. Fatigue: the context's alone rises. A stream that falls is one that
    rises, backwards: so each of these four has its faces in common with another and its contexts
    with a third, and all four their frames and sets of frames; only the order of the frames in both
    streams tells them apart, and less surely where the drift is small. Distraction: a window in the
    context, in every frame; the values drift either way. So the two frequent classes are easy, and
    who weighs errors by their frequency takes rare ones for neutrality. Everything else (places,
    colors, light, sides, grain) is nuisance, drawn alike for all classes. Pure in its arguments.

    Args:
        share: of RAER's 1106, 103, 24, 126 and 338 training clips, rounded, at least one each.
        val, test: clips of each class; more even than in training, so that a recall means
            something.
        num_frames, size: of a clip; side in pixels.
        trend, unrest: difficulty; a lower `trend` and a higher `unrest` are harder.

    Raises:
        ValueError: an argument is out of range.
    """
    shares_fit = 0 < share <= 1 and 0 <= trend <= 1 and 0 <= unrest <= 1
    if not shares_fit or num_frames < 2 or size < 16:
        raise ValueError(
            f"share={share}, num_frames={num_frames}, size={size}, trend={trend},"
            f" unrest={unrest}: share must lie in (0, 1], trend and unrest in [0, 1], and at least"
            " 2 frames of 16 pixels are needed"
        )
    train = [max(1, int(share * count + 0.5)) for count in _RAER_COUNTS]
    rng = np.random.Generator(np.random.PCG64(seed))
    split_labels = []
    splits = []
    for name, counts in (("train", train), ("val", val), ("test", test)):
        ordered = np.repeat(np.arange(len(_RAER_COUNTS)), counts)
        split_labels.append(ordered[np.argsort(rng.random(len(ordered)), kind="stable")])
        splits += [name] * len(ordered)
    labels = np.concatenate(split_labels)
    chunks = [labels[i : i + _CHUNK] for i in range(0, len(labels), _CHUNK)]
    streams = [_emotion(chunk, num_frames, size, trend, unrest, rng) for chunk in chunks]
    face, context = (np.concatenate(parts) for parts in zip(*streams, strict=True))
    return TwoStreamClips(face, context, labels, splits)


def _emotion(
    labels: np.ndarray,
    num_frames: int,
    size: int,
    trend: float,
    unrest: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The streams of clips of these classes; what is drawn does not depend on them."""
    n = len(labels)
    time = np.arange(num_frames, dtype=np.float32) / (num_frames - 1) - np.float32(0.5)
    streams = []
    draw_context = partial(_emotion_context, away=labels == _DISTRACTION)
    for draw, rises in ((_emotion_face, _FACE_RISES), (draw_context, _CONTEXT_RISES)):
        share = np.float32(0.3) + np.float32(0.7) * rng.random((n, 1), np.float32)
        drift = np.float32(trend) * share
        change = _grain(rng, (n, num_frames))
        value = np.clip(np.float32(0.5) + drift * time + np.float32(unrest) * change, 0, 1)
        stream = draw(value, size, rng)
        by_chance = rng.random(n) < 0.5
        rise = np.array(rises)[labels]
        falls = np.where(rise < 0, by_chance, rise == 0)
        stream[falls] = stream[falls, ::-1].copy()
        streams.append(stream)
    return tuple(streams)


class _Canvas:
    """Pictures of n clips of T frames, float32 [n, T, 3, size, size].

    It also holds the nuisance that all frames of a clip share.
    """

    def __init__(self, n: int, size: int, rng: np.random.Generator):
        self.n = n
        self.rng = rng
        grid = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
        self.soft = np.float32(4 / size)
        self.x = grid - self.drawn(-0.1, 0.1)
        self.y = grid[:, None] - self.drawn(-0.1, 0.1)

    def drawn(self, low, high, channels=1):
        """One number a clip, or one a channel: [n, 1, channels, 1, 1]."""
        u = self.rng.random((self.n, 1, channels, 1, 1), np.float32)
        return np.float32(low) + np.float32(high - low) * u

    def ellipse(self, cx, cy, rx, ry):
        u = (self.x - cx) / rx
        v = (self.y - cy) / ry
        return _inside(np.sqrt(u * u + v * v), self.soft / np.minimum(rx, ry))

    def finish(self, image, value):
        """The light, and grain in every frame, as uint8."""
        image = image * (1 - np.float32(0.45) * value) * self.drawn(0.75, 1.1)
        grain = _grain(self.rng, image.shape)
        image += self.drawn(0.02, 0.06) * grain
        return _to_uint8(image)


def _blend(image, mask, color):
    return image + mask * (color - image)


def _emotion_face(value, size, rng):
    canvas = _Canvas(len(value), size, rng)
    value = value[:, :, None, None, None]
    skin = np.array([0.9, 0.68, 0.55], np.float32).reshape(3, 1, 1) * canvas.drawn(0.6, 1.1)
    backdrop = canvas.drawn(0.2, 0.8, 3)
    image = _blend(backdrop, canvas.ellipse(0, -0.1, 0.78, 0.95), canvas.drawn(0.05, 0.5, 3))
    image = _blend(image, canvas.ellipse(0, 0.08, canvas.drawn(0.58, 0.68), 0.82), skin)
    apart = canvas.drawn(0.24, 0.32)
    level = canvas.drawn(-0.2, -0.08)
    iris = canvas.drawn(0.05, 0.45, 3)
    for side in (-1, 1):
        eye = canvas.ellipse(side * apart, level, np.float32(0.16), np.float32(0.1))
        image = _blend(image, eye, np.float32(0.95))
        pupil = canvas.ellipse(side * apart, level, np.float32(0.07), np.float32(0.09))
        image = _blend(image, pupil, iris)
    mouth = canvas.ellipse(0, 0.48, canvas.drawn(0.24, 0.32), 0.04 + 0.24 * value)
    return canvas.finish(_blend(image, mouth, skin * np.float32(0.3)), value)


def _emotion_context(value, size, rng, away):
    canvas = _Canvas(len(value), size, rng)
    value = value[:, :, None, None, None]
    skin = canvas.drawn(0.5, 0.9, 3)
    cloth = canvas.drawn(0.1, 0.8, 3)
    side = np.where(canvas.drawn(0, 1) < 0.5, np.float32(-1), np.float32(1))
    window = canvas.ellipse(side * 0.6, -0.6, np.float32(0.35), np.float32(0.35))
    window = away[:, None, None, None, None] * window
    daylight = np.array([0.6, 0.85, 1], np.float32).reshape(3, 1, 1)
    image = _blend(canvas.drawn(0.3, 0.7, 3), window, daylight)
    body = canvas.ellipse(0, 0.75, canvas.drawn(0.5, 0.65), np.float32(0.6))
    image = _blend(image, body, cloth)
    head = canvas.ellipse(0, -0.1, np.float32(0.26), np.float32(0.32))
    image = _blend(image, head, skin)
    place = -side * np.float32(0.7)
    hand = canvas.ellipse(place, 0.7 - 1.2 * value, np.float32(0.18), np.float32(0.18))
    return canvas.finish(_blend(image, hand, skin), value)


def _grain(rng, shape):
    """Noise in (-1, 1), densest at 0."""
    return rng.random(shape, np.float32) + rng.random(shape, np.float32) - 1


def _to_uint8(image):
    return np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _smooth(t):
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _inside(distance, soft, grow=0.0):
    """1 where distance < 1 + grow, 0 outside, with an edge of width `soft`."""
    return _smooth((1 + grow - distance) / soft + 0.5)


def _directions(rng, n):
    """Unit vectors (cos, sin), each [n, 1, 1]; sums of four uniforms are close to isotropic."""
    u = rng.random((4, 2, n, 1, 1), np.float32) - 0.5
    u = u[0] + u[1] + u[2] + u[3] + np.float32(1e-6)
    return u / np.sqrt(u[0] * u[0] + u[1] * u[1])


def _noise(rng, n, size, cells):
    """Value noise in [0, 1], [n, size, size], with `cells` lattice cells along a side."""
    lattice = rng.random((n, cells + 2, cells + 2), np.float32)
    place = np.arange(size, dtype=np.float32) * np.float32(cells / size)
    place = place + rng.random(dtype=np.float32)
    low = np.floor(place).astype(np.int64)
    t = _smooth(place - low)
    rows = lattice[:, low] * (1 - t[:, None]) + lattice[:, low + 1] * t[:, None]
    return rows[:, :, low] * (1 - t) + rows[:, :, low + 1] * t


def _waves(rng, x, y, amplitude, low, high):
    """Distance from the origin over a radius that waves around 1.

    The waves' angular frequencies are low to high.
    """
    r = np.sqrt(x * x + y * y) + np.float32(1e-6)
    c = ck = x / r
    s = sk = y / r
    wave = 1
    for k in range(2, high + 1):
        ck, sk = ck * c - sk * s, sk * c + ck * s  # cosine and sine of k times the angle
        if k >= low:
            u, v = _directions(rng, len(x))
            wave = wave + amplitude / np.float32(k - low + 1) * (u * ck + v * sk)
    return r / wave


def _discs(rng, x, y, count, most, small, large, spread, soft):
    """Soft mask of `count` discs, radii in [small, large], centers within `spread`.

    `count` is an array of numbers, none above `most`.
    """
    outside = np.float32(9)
    for k in range(most):
        reach, radius = rng.random((2, len(x), 1, 1), np.float32)
        u, v = _directions(rng, len(x))
        reach = np.sqrt(reach) * np.float32(spread)
        radius = np.float32(small) + np.float32(large - small) * radius
        radius = np.where(k + 0.5 < count, radius, np.float32(-9))
        dx = x - u * reach
        dy = y - v * reach
        outside = np.minimum(outside, np.sqrt(dx * dx + dy * dy) - radius)
    return _smooth(0.5 - outside / soft)
