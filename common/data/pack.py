"""A data set decoded once, as one file of uint8 pixels.

`python -m common.data pack SRC DST` writes it; with `--clips` the images are the frames of videos.

Layout of the file: `_MAGIC`, the pixels (n, S, S, 3), then JSON (names, labels, splits, groups
where there are any, sizes, one CRC-32 an image, one digest of the file that each comes from, and
of frames a list of their videos), and a trailer with the JSON's length and its SHA-256. Pixels come
first, so that packing streams; what is known only at the end is at the end.

A packed set is the set that it was made of: the same ids, labels, splits, groups and, at the side
it was packed at, the same batches. So a run is the same run on either: the fingerprint is the
source's. It is another one where the pixels of the same command differ from the source's: packed at
another side than the source's default and not asked for by `--store-size`, resized from the packed
side, or packed without damaged images.
"""

import hashlib
import json
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import live, reading
from common.data.clips import VideoFiles
from common.data.images import UNLABELED, Images, central_square, listing_fingerprint
from common.errors import InputError
from common.retry import retried
from common.run.content import Content
from common.run.files import atomic_write

SUFFIX = ".packed"
_MAGIC = b"packed uint8 images, version 2\n\0"
_PLANES = b"packed uint8 images, version 1\n\0"  # with pixels (n, 3, S, S)
# Of a video: its key (dataset, method, compression, name), frames, bytes of its files, frames a
# second, and the seconds of its frames or None where they are evenly apart.
VIDEO_FIELDS = {"key", "label", "split", "group", "persons", "length", "sizes", "rate", "times"}
_TRAILER = struct.Struct("<Q32s")  # length and SHA-256 of the JSON in front of it
# Of pixels decoded together: bounds the memory, which holds three such batches.
_BATCH_BYTES = 16 * 2**20
_MAX_LISTS = 100  # of an index; it has six
_FIELDS = {
    "ids",
    "labels",
    "classes",
    "splits",
    "native_size",
    "default_size",
    "store_size",
    "fingerprint",
    "crc",
}


class PackedImages(Images):
    """A packed file as `Images`.

    Nothing is read into memory but what a batch needs. Each image's CRC-32 is checked the first
    time that it is read.

    Raises:
        InputError: the file is not a packed set, or it is cut short or damaged.
    """

    def __init__(self, path: Path):
        index = _read_index(path)
        self.name = path.name
        self.ids = index["ids"]
        self.classes = index["classes"]
        self.labels = np.array(index["labels"], np.int64)
        self.splits = np.array(index["splits"], dtype=object)
        if "groups" in index:
            self.groups = np.array(index["groups"], dtype=object)
        self.native_size = index["native_size"]
        self._source = index["fingerprint"]
        self.num_bytes = path.stat().st_size
        side = self._packed_size = index["store_size"]
        self._planes = index["planes"]
        self._path = path
        self._lock = threading.Lock()
        self._file = None
        self._crc = np.array(index["crc"], np.int64)
        # Files of an earlier version have no digests.
        digests = np.frombuffer(bytes.fromhex(index.get("digests", "")), "<i8")
        self.content = Content(
            self.ids, None, digests=digests if len(digests) else None, crc=self._crc
        )
        self.videos = index.get("videos")  # what `pack` was given
        self.left_out = index.get("left_out", [])
        self._rows = np.arange(len(self.ids))  # where in the file they are
        self._checked = np.zeros(len(self.ids), bool)
        self._read_bytes = self._cache = self._cached = None
        self.keeps = False
        self.store_size = side
        self._set_fingerprint(index["default_size"])

    def _set_fingerprint(self, asked: int) -> None:
        # The command asks for `asked` pixels, of the source too; only where that is the packed side
        # they are the same.
        self._asked = asked
        self.fingerprint = self._source
        if asked != self._packed_size:
            packed = f"{self._source} packed at {self._packed_size}"
            self.fingerprint = hashlib.sha256(packed.encode()).hexdigest()[:8]

    def keep(self, rows: np.ndarray, sizes: list[int]) -> None:
        """Keep only these images, as if no others had been packed; `sizes` are their files'."""
        self.ids = [self.ids[row] for row in rows]
        self.labels, self.splits = self.labels[rows], self.splits[rows]
        self._rows, self._crc, self._checked = rows, self._crc[rows], self._checked[rows]
        digests = self.content.digests()[rows]
        self.content = Content(
            self.ids, None, digests=digests if digests.any() else None, crc=self._crc
        )
        self._source = _without(listing_fingerprint(self.ids, sizes), self.left_out)
        self._set_fingerprint(self._asked)

    def resize_store(self, size: int) -> None:
        """Read squares of another side, at most the packed one (pixels)."""
        if size > self._packed_size:
            raise InputError(
                f"--store-size {size}: {self.name} is packed at {self._packed_size} px;"
                f" give at most that, or pack it again with --store-size {size}"
            )
        self.store_size = size
        self.keeps = size != self._packed_size
        self._set_fingerprint(size)

    def decode(self, index: int) -> Tensor:
        """One image as uint8 (3, store_size, store_size).

        Raises:
            InputError: its bytes are damaged.
        """
        side = self._packed_size
        pixels = np.empty((3, side, side) if self._planes else (side, side, 3), np.uint8)
        try:
            with reading.pending(self._path):
                whole = retried(lambda: self._read(pixels, index), self._path, was_there=True)
        except OSError as error:
            raise self._damaged(f"image {self.ids[index]}", error) from None
        if not whole:
            raise InputError(f"{self._path} is cut short; pack it again")
        if not self._checked[index]:
            if zlib.crc32(pixels) != self._crc[index]:
                raise InputError(
                    f"{self.name} is damaged at image {self.ids[index]}; pack it again"
                )
            self._checked[index] = True
        image = torch.from_numpy(pixels)
        if not self._planes:
            image = image.permute(2, 0, 1)
        return image if self.store_size == side else central_square(image, self.store_size)

    def _read(self, pixels: np.ndarray, index: int) -> bool:
        # Fills `pixels`; False where the file ends before. A memory map would be no faster, and
        # where it cannot read it ends the process.
        with self._lock:
            if self._file is None:
                self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115
                self._checked[:] = False  # it may be another file now
            file = self._file
        left = memoryview(pixels).cast("B")
        offset = len(_MAGIC) + int(self._rows[index]) * len(left)
        try:
            while len(left):
                if hasattr(os, "preadv"):
                    count = os.preadv(file.fileno(), [left], offset)
                else:  # Windows
                    with self._lock:
                        file.seek(offset)
                        count = file.readinto(left)
                if not count:
                    return False
                left = left[count:]
                offset += count
        except OSError:
            self._file = None  # a stale handle stays stale; another thread may still read from it
            raise
        return True

    def _groups(self, indices: np.ndarray) -> list[np.ndarray]:
        # A copy is too short a task for a thread.
        return np.array_split(indices, -(-len(indices) // 16)) if len(indices) else []


def _digests(images: Images) -> np.ndarray:
    # (n,) int64 of the files that the images were read from; empty where there are none.
    if images.content is None:
        return np.zeros(0, np.int64)
    digests = images.content.digests()
    if isinstance(images, VideoFiles):
        return digests[images.files_of(np.arange(len(images)))]
    rows = {name: row for row, name in enumerate(images.content.names)}
    return digests[[rows[name] for name in images.ids]]


def _without(fingerprint: str, left_out) -> str:
    # That of a set of which damaged items were left out.
    if not left_out:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} without {sorted(left_out)}".encode()).hexdigest()[:8]


def _read_index(path: Path) -> dict:
    foreign = InputError(
        f"{path}: not a packed data set; make one with python -m common.data pack SRC {path.name}"
    )
    damaged = InputError(f"{path} is cut short or damaged; pack it again")
    try:
        size = reading.regular_status(path).st_size
        with reading.pending(path), reading.open_file(path) as file:
            magic = file.read(len(_MAGIC))
            if magic not in (_MAGIC, _PLANES):
                raise foreign
            if size < len(_MAGIC) + _TRAILER.size:
                raise damaged
            file.seek(size - _TRAILER.size)
            length, digest = _TRAILER.unpack(file.read())
            if length > size - _TRAILER.size - len(_MAGIC):
                raise damaged
            reading.within(length, f"{path}: the list of its images")
            file.seek(size - _TRAILER.size - length)
            text = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if hashlib.sha256(text).digest() != digest:
        raise damaged
    # Its hash is right: what is wrong with it now was written so.
    pixels = size - _TRAILER.size - length - len(_MAGIC)
    if text.count(b"[") + text.count(b"{") > _MAX_LISTS + text.count(b'"'):
        raise foreign
    try:
        index = json.loads(text)
    except (ValueError, RecursionError):
        raise foreign from None
    if not _is_index(index) or pixels != len(index["ids"]) * 3 * index["store_size"] ** 2:
        raise foreign
    return index | {"planes": magic == _PLANES}


def _is_index(index) -> bool:
    """Whether an index has what `pack` writes, and numbers that stand for something."""
    if not isinstance(index, dict) or not index.keys() >= _FIELDS:
        return False
    lists = [index[name] for name in ("ids", "splits", "classes", "labels", "crc")]
    if not all(isinstance(values, list) for values in lists):
        return False
    ids, splits, classes, labels, crc = lists
    sizes = [index[name] for name in ("native_size", "default_size", "store_size")]
    digests = index.get("digests", "")
    groups = index.get("groups", ids)
    return (
        isinstance(groups, list)
        and all(type(name) is str for name in groups)
        and len(groups) == len(ids)
        and len(ids) == len(splits) == len(labels) == len(crc) > 0
        and all(type(name) is str for name in (*ids, *classes, *splits, index["fingerprint"]))
        and index["fingerprint"].isascii()
        and len(set(classes)) == len(classes)
        and set(splits) <= {"", "train", "val", "test"}
        and all(type(label) is int and UNLABELED <= label < len(classes) for label in labels)
        and all(type(value) is int and 0 <= value < 2**32 for value in crc)
        and all(type(side) is int and 1 <= side < 2**16 for side in sizes)
        and type(digests) is str
        and len(digests) in (0, 16 * len(ids))
        and not digests.strip("0123456789abcdef")
        and ("videos" not in index or _are_videos(index["videos"], len(ids)))
        and _are_texts(index.get("left_out", []))
    )


def _are_texts(values, count: int | None = None) -> bool:
    return (
        isinstance(values, list)
        and all(type(value) is str for value in values)
        and count in (None, len(values))
    )


def _are_videos(videos, frames: int) -> bool:
    """Whether a packed set's videos are what `faceforensics.pack_videos` writes."""
    return (
        isinstance(videos, list)
        and all(isinstance(video, dict) and video.keys() == VIDEO_FIELDS for video in videos)
        and all(
            _are_texts(video["key"], 4)
            and video["label"] in (UNLABELED, 0, 1)
            and video["split"] in ("", "train", "val", "test")
            and type(video["group"]) is str
            and _are_texts(video["persons"])
            and type(video["length"]) is int
            and video["length"] > 0
            and isinstance(video["sizes"], list)
            and all(type(size) is int for size in video["sizes"])
            and type(video["rate"]) in (int, float)
            and 0 < video["rate"] < float("inf")
            and (
                video["times"] is None
                or (
                    isinstance(video["times"], list)
                    and len(video["times"]) == video["length"]
                    and all(type(second) in (int, float) for second in video["times"])
                )
            )
            for video in videos
        )
        and sum(video["length"] for video in videos) == frames
    )


def pack(
    images: Images,
    path: Path,
    *,
    default_size: int,
    left_out=(),
    workers: int,
    videos: list[dict] | None = None,
    rows: np.ndarray | None = None,
) -> None:
    """Write `images` as they are decoded: `path` holds either the old or the whole new file.

    Memory does not grow with the data set.

    Args:
        default_size: the side that the source is decoded to where no --store-size is given.
        left_out: the names of damaged images, or of videos with one.
        videos: those that the images are the frames of, in their order, with VIDEO_FIELDS.
        rows: the images that are packed; unset: all.

    Raises:
        InputError: an image is damaged, or the file cannot be written.
    """
    side = images.store_size
    crc = []
    source = _without(images.fingerprint, left_out)
    images.keeps = False
    rows = np.arange(len(images)) if rows is None else rows
    batches = np.array_split(rows, -(-len(rows) * 3 * side**2 // _BATCH_BYTES))
    try:
        with atomic_write(path, "wb", stream=True) as file:
            file.write(_MAGIC)
            decoded = images.batches(batches, workers)
            for batch in live.progress(decoded, "packing batches", len(batches)):
                for pixels in batch.permute(0, 2, 3, 1).contiguous().numpy():
                    crc.append(zlib.crc32(pixels))
                    file.write(pixels)
            digests = _digests(images)
            index = {
                "ids": [images.ids[row] for row in rows],
                "labels": images.labels[rows].tolist(),
                "classes": images.classes,
                "splits": images.splits[rows].tolist(),
                "native_size": images.native_size,
                "default_size": default_size,
                "store_size": side,
                "fingerprint": source,
                "crc": crc,
                "digests": digests[rows].tobytes().hex() if len(digests) else "",
            }
            if images.groups is not None:
                index["groups"] = images.groups[rows].tolist()
            if videos is not None:
                index |= {"videos": videos, "left_out": sorted(left_out)}
            text = json.dumps(index).encode()
            file.write(text + _TRAILER.pack(len(text), hashlib.sha256(text).digest()))
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
