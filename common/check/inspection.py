"""The items of a data set as the checks see them: thumbnails, sizes, digests, features.

Of more than `LOOKED` items a part is looked at, chosen by a hash of their names; files are compared
byte by byte up to `HASHED` of them.
"""

import functools
import hashlib
import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.clips import VideoFiles, Videos
from common.data.images import DECODE_ERRORS, UNLABELED, hidden, open_image, reason, upright_size
from common.data.sampling import hash_order
from common.data.utterances import tokens
from common.errors import InputError, printable
from common.rng import uniform

PARTS = ("train", "val", "test")
LOOKED = 1000  # items
FRAMES = 3000  # of these items, decoded
HASHED = 10_000  # files compared byte by byte
SIDE = 32  # of the thumbnails that are compared, pixels
LONG_TEXT = 8  # words: shorter utterances are said again and again


@dataclass(frozen=True)
class Duplicate:
    """An item that has the content of another one."""

    name: str
    part: str
    label: int


@dataclass
class Inspection:
    """The items that were looked at, and what was found when they were.

    Attributes:
        unit: what an item is, in the plural: images, clips, utterances.
        total: items of the data set that are in some part.
        ids: (n,) names.
        labels: (n,) int64 into `classes`; UNLABELED where there is none.
        parts: (n,) "train", "val" or "test".
        counts: (4, classes) labeled items of the whole data set in each of PARTS, and in none.
        classes: names.
        features: (n, d) float32, what neighbors are sought by.
        facts: (n,) float64 by name: sizes, brightness and so on.
        duplicates: groups of items of the same content.
        compared: how many were compared for that.
        thumbs: (n, V, 3, SIDE, SIDE) uint8, V frames of each item; None where there are no
            pictures.
        damaged: "NAME (reason)" of the items that cannot be read.
        doubtful: names of items that can be read, but hold nothing.
        empty: folders of classes without any file.
        all_read: what of all items was decoded to find `damaged`; "" where not all were.
        near_rows: whether items without pictures are alike where their features are.
        supervised: whether the run trains on the labels.
    """

    unit: str
    total: int
    ids: list[str]
    labels: np.ndarray
    parts: np.ndarray
    counts: np.ndarray
    classes: list[str]
    features: Tensor
    facts: dict[str, np.ndarray]
    duplicates: list[list[Duplicate]]
    compared: int
    thumbs: Tensor | None = None
    damaged: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    all_read: str = ""
    near_rows: bool = False
    supervised: bool = True

    @property
    def of(self) -> str:
        """`1000 images, 4886 in all`, or `576 images` where all were looked at."""
        if self.all_read:
            return f"{self.total} {self.unit}, {self.all_read}"
        looked = len(self.ids) + len(self.damaged)
        if looked >= self.total:
            return f"{looked} {self.unit}"
        return f"{looked} {self.unit}, {self.total} in all"


def parts_of(splits: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Which part each of `count` items belongs to by a script's splits.

    It is "train", "val", "test", or "" for none. An item that some stage tests on belongs to the
    test, whatever else it serves.
    """
    parts = np.full(count, "", dtype=object)
    part_of_split = {
        name: "test" if "test" in name else "val" if name.endswith(("val", "dev")) else "train"
        for name in splits
    }
    for part in PARTS:
        for name, rows in splits.items():
            if part_of_split[name] == part:
                parts[rows] = part
    return parts


def sampled_items(ids: list[str], parts: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the items that are in a part, by a hash of their names: sorted int64.

    A quarter are of the test, as far as it has them.
    """
    rows = np.flatnonzero(parts != "")
    if len(rows) <= most:
        return rows
    test = rows[parts[rows] == "test"]
    rest = rows[parts[rows] != "test"]
    kept = hash_order(ids, test, "check")[: max(most // 4, most - len(rest))]
    kept += hash_order(ids, rest, "check")[: most - len(kept)]
    return np.array(sorted(kept), np.int64)


def inspect(items, splits: dict[str, np.ndarray], workers: int) -> Inspection:
    """Look at the items of a data set.

    Of a clip the first, the middle and the last frame are compared; as many more are decoded as
    `FRAMES` in all allow.

    Args:
        items: `common.data.images.Images`, `common.data.clips.Videos` or
            `common.deep_cluster.Rows`.
    """
    if hasattr(items, "table"):
        return inspect_rows(items, splits)
    clips = isinstance(items, Videos)
    images = items.images if clips else items
    parts = parts_of(splits, len(items))
    rows = sampled_items(items.ids, parts, LOOKED)
    files = _are_files(images)
    frames = max(FRAMES // max(len(rows), 1), 3) if files else 3
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(functools.partial(_look_at, items, frames), rows.tolist()))
        looks = {}
        damaged = {}
        for row, answer in zip(rows.tolist(), answers, strict=True):
            (damaged if isinstance(answer, str) else looks)[row] = answer
        digests = {row: look.digest for row, look in looks.items()}
        if files and not clips:
            compared = _of_equal_size(images, parts).tolist()
            answers = pool.map(functools.partial(_file_digest, images), compared)
            digests = dict(zip(compared, answers, strict=True))
            for row, answer in digests.items():
                if isinstance(answer, str):
                    damaged.setdefault(row, answer)
    thumbs = torch.zeros(0, 1, 3, SIDE, SIDE, dtype=torch.uint8)
    facts = {}
    if looks:
        first = next(iter(looks.values()))
        thumbs = torch.stack([look.thumbs for look in looks.values()])
        for name in first.facts:
            facts[name] = np.array([look.facts[name] for look in looks.values()], float)
    whole = {row: digest for row, digest in digests.items() if row not in damaged}
    return Inspection(
        unit="clips" if clips else "images",
        total=int((parts != "").sum()),
        **_names_and_labels(items, parts, np.array(list(looks), np.int64)),
        features=_resized(thumbs.flatten(0, 1), SIDE // 2).reshape(len(thumbs), -1).float(),
        facts=facts,
        duplicates=_duplicates(items, parts, whole),
        compared=len(digests),
        thumbs=thumbs,
        damaged=[damaged[row] for row in sorted(damaged)],
    )


def read_all(seen: Inspection, items, workers: int) -> Inspection:
    """What was `seen`, with the damaged ones of all items: every image, or frame of a clip, is
    decoded."""
    if hasattr(items, "table"):
        return seen  # opening it has read it
    if not isinstance(items, Videos):
        found = items.damaged(workers)
        damaged = [f"{items.ids[row]} ({_bare(why)})" for row, why in sorted(found.items())]
        return replace(seen, total=len(items), damaged=damaged, all_read="all read")
    found = items.images.damaged(workers, np.unique(np.concatenate(items.frames)))
    damaged = [
        f"{name} ({items.images.ids[frame]}: {_bare(found[frame])})"
        for name, frames in zip(items.ids, items.frames, strict=True)
        for frame in frames.tolist()
        if frame in found
    ]
    every = f"all {items.lengths.sum()} frames read"
    return replace(seen, total=len(items), damaged=damaged, all_read=every)


class _Look(NamedTuple):
    digest: bytes  # of the decoded frames
    thumbs: Tensor  # (V, 3, SIDE, SIDE) uint8
    facts: dict[str, float]


def _look_at(items, most_frames: int, row: int) -> _Look | str:
    # The answer is a text, "NAME (reason)", for an item that cannot be read.
    clips = isinstance(items, Videos)
    images = items.images if clips else items
    frames = np.array([row])
    if clips:
        frames = items.frames[row]
        count = min(most_frames, len(frames))
        frames = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    try:
        decoded = [images.decode(int(index)) for index in frames]
        height, width = decoded[0].shape[-2:]
        if _are_files(images):
            width, height = _size(images.read(int(frames[0])))
    except (InputError, *DECODE_ERRORS) as error:
        return f"{items.ids[row]} ({_bare(reason(error))})"
    shown = [decoded[0], decoded[len(decoded) // 2], decoded[-1]] if clips else decoded
    # Of two streams the first, the face, shows what is asked about.
    pixels = torch.stack([frame[0] if frame.ndim == 4 else frame for frame in shown])
    gray = pixels[len(pixels) // 2].float().mean(0)
    share = torch.bincount(gray.long().flatten(), minlength=256).double() / gray.numel()
    facts = {"shorter side, px": min(width, height), "width / height": width / height}
    if clips:
        facts["frames"] = len(items.frames[row])
    facts["brightness"] = float(gray.mean())
    facts["entropy, bits"] = float(torch.special.entr(share).sum()) / math.log(2)
    digest = hashlib.sha256(b"".join(frame.numpy().tobytes() for frame in decoded)).digest()
    return _Look(digest, _resized(pixels, SIDE), facts)


def _bare(text: str) -> str:
    # Of what decoding says the reason alone.
    return text.split("cannot be read: ")[-1].split(";")[0]


def inspect_rows(rows, splits: dict[str, np.ndarray]) -> Inspection:
    """Look at the utterances of `common.deep_cluster.Rows`: texts, and what the network reads."""
    table = rows.table
    parts = parts_of(splits, len(table))
    # Nothing is decoded: an utterance costs little.
    kept = sampled_items(table.ids, parts, 4 * LOOKED)
    arrays = {name: rows.pooled(name).cpu().float()[torch.from_numpy(kept)] for name in rows.names}
    facts = {}
    for name, lengths in table.lengths.items():
        facts[f"length of {name}"] = lengths[kept].astype(float)
    for name, x in arrays.items():
        if name in rows.as_is:
            continue
        norm = x.norm(dim=1).double().numpy()
        # Zeros stand for what an utterance has not, such as the one before a dialogue's first.
        typical = np.median(norm[norm > 0]) if norm.any() else 0.0
        facts[f"norm of {name}"] = np.where(norm > 0, norm, typical)
    words = None
    if table.texts is not None:
        words = [tuple(t for t in tokens(table.texts[i]) if t[0].isalnum()) for i in kept]
        facts["words"] = np.array([len(words_of_one) for words_of_one in words], float)
    nothing = np.stack([~x.any(1).numpy() for x in arrays.values()]).all(0)
    modalities = list(table.modalities.values())
    digests = {}
    if modalities:
        for i in kept.tolist():
            content = b"".join(x[i].tobytes() for x in modalities)
            digests[i] = hashlib.sha256(content).digest()
    else:
        for i, words_of_one in zip(kept.tolist(), words, strict=True):
            if len(words_of_one) >= LONG_TEXT:
                digests[i] = words_of_one
    features = [
        (x - x.mean(0)) / x.std(0).clamp(min=1e-6) / x.shape[1] ** 0.5 for x in arrays.values()
    ]
    return Inspection(
        unit="utterances",
        total=int((parts != "").sum()),
        **_names_and_labels(table, parts, kept),
        features=torch.cat(features, 1),
        facts=facts,
        duplicates=_duplicates(table, parts, digests),
        compared=len(digests),
        doubtful=[table.ids[kept[i]] for i in np.flatnonzero(nothing)],
        near_rows=bool(modalities),
    )


def empty_folders(root: Path) -> list[str]:
    """Folders without any file that lie where the folders of classes lie.

    They are classes that were meant to have images.
    """
    if not root.is_dir():
        return []
    full = {path.parent for path in root.rglob("*") if path.is_file()}
    beside = {folder.parent for folder in full if folder != root}
    return sorted(
        printable(path.relative_to(root).as_posix())
        for parent in beside
        for path in parent.iterdir()
        if path.is_dir() and not hidden(path.name) and not any(path.iterdir())
    )


def _names_and_labels(items, parts: np.ndarray, rows: np.ndarray) -> dict:
    labeled = items.labels != UNLABELED
    counts = [
        np.bincount(items.labels[labeled & (parts == part)], minlength=len(items.classes))
        for part in (*PARTS, "")
    ]
    return dict(
        ids=[items.ids[i] for i in rows],
        labels=items.labels[rows],
        parts=parts[rows],
        counts=np.stack(counts),
        classes=items.classes,
    )


def _are_files(images) -> bool:
    # Files of images, whose bytes and header can be read without decoding.
    return not images.in_memory and not isinstance(images, VideoFiles)


def _resized(pixels: Tensor, side: int) -> Tensor:
    # uint8 (n, 3, side, side), stretched to a square.
    small = F.interpolate(
        pixels.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    return small.round().clamp(0, 255).byte()


def _size(content: bytes) -> tuple[int, int]:
    with open_image(content) as image:
        return upright_size(image)


def _file_digest(images, row: int) -> bytes | str:
    # Reading it all checks an archive's CRC, opening it the header: what that finds is damaged,
    # decoded or not.
    try:
        content = images.read(row)
        _size(content)
    except DECODE_ERRORS as error:
        return f"{images.ids[row]} ({reason(error)})"
    return hashlib.sha256(content).digest()


def _of_equal_size(images, parts: np.ndarray) -> np.ndarray:
    # Files of equal size stay together: of a pair of duplicates both are compared, or none.
    rows = np.flatnonzero(parts != "")
    if len(rows) <= HASHED:
        return rows
    sizes, which, times = np.unique(images.sizes[rows], return_inverse=True, return_counts=True)
    order = np.argsort(uniform(0, 0, sizes, 0, 1)[:, 0], kind="stable")
    order = order[times[order] > 1]
    kept = order[np.cumsum(times[order]) <= HASHED]
    return rows[np.isin(which, kept)]


def _duplicates(items, parts: np.ndarray, digests: dict) -> list[list[Duplicate]]:
    groups = defaultdict(list)
    for row, digest in digests.items():
        groups[digest].append(row)
    return [
        [Duplicate(items.ids[row], parts[row], int(items.labels[row])) for row in rows]
        for rows in sorted(groups.values())
        if len(rows) > 1
    ]
