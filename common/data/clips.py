"""Videos as lists of frames, and the clips that are cut out of them.

Frames lie in folders of images, in a .zip, in video files, or in memory: `Videos` decodes them by
threads to uint8, as `Images` does. Which frames form a clip is a pure function: of the
video's length in evaluation, and of (seed, epoch, video) in training.

Interval sampling (TSN, arXiv:1608.00859, and TSM's dense sampling, arXiv:1811.08383): a clip is T
frames at equal intervals, `seconds` long. A shorter video shrinks the interval, down to successive
frames; a video of fewer than T frames repeats its last.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common import live, reading
from common.data.images import (
    DECODE_ERRORS,
    UNLABELED,
    Images,
    check_damaged,
    describe_labels,
    reason,
)
from common.errors import InputError, plural
from common.rng import uniform
from common.run.content import Content, OtherContent, codes

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
VIDEO_SUFFIXES += (".ts", ".mts", ".m2ts", ".3gp", ".ogv")
# Beside folders of frames: a table of `video`, a folder below its own, and `fps`, the rate that the
# numbers of its frames count at.
RATES = "frame_rates.csv"
_START_STREAM = 2**31 + 1  # beside sampling's _ORDER_STREAM; no view has this number


class Videos:
    """Videos of one data set: ids, labels, splits, and where their frames are.

    Attributes:
        name: what was read, for messages.
        ids: (n,) names, unique within a split.
        labels: (n,) int64 into `classes`; UNLABELED where there is no label.
        splits: (n,) "train", "val", "test", or "" where the data names none.
        groups: (n,) names of what stays together, see `common.data.groups`; None: nothing does.
        frames: n int64 arrays, the positions of each video's frames in `images`, in order of time.
        lengths: (n,) int64, frames of each video.
        rates: (n,) float64, frames a second.
        times: of each video None or, where its frames are not evenly apart, float64 seconds of
            each from the first.
        images: `Images` of all frames.
        fingerprint: eight digits that stand for the listing: names, labels, splits, rates and sizes
            of all frames.
    """

    _unit = "video"

    def __init__(
        self,
        name: str,
        ids: list[str],
        labels,
        classes: list[str],
        splits,
        frames,
        rates,
        images: Images,
        groups=None,
        times=None,
    ):
        self.name = name
        self.ids = list(ids)
        self.classes = list(classes)
        self.labels = np.asarray(labels, np.int64)
        self.splits = np.asarray(splits, dtype=object)
        self.frames = [np.asarray(f, np.int64) for f in frames]
        self.images = images
        self.lengths = np.array([len(f) for f in self.frames], np.int64)
        self.rates = np.broadcast_to(np.asarray(rates, np.float64), len(self.ids)).copy()
        digest = hashlib.sha256(f"{images.fingerprint}{self.ids}{list(self.splits)}".encode())
        for part in (self.labels, self.rates, self.lengths, *self.frames):
            digest.update(part.tobytes())
        self.times = [None] * len(self.ids) if times is None else list(times)
        for when in self.times:
            if when is not None:
                digest.update(when.tobytes())
        self.groups = groups if groups is None else np.asarray(groups, dtype=object)
        if groups is not None:
            digest.update(f"{list(groups)}".encode())
        self.fingerprint = digest.hexdigest()[:8]
        if images.content:
            files = images.files_of(np.concatenate(self.frames))
            names = [*self.classes, ""]  # the last is that of UNLABELED, which is -1
            facts = {"label": codes(names)[self.labels], "split": codes(self.splits)}
            if groups is not None:
                facts["group"] = codes(groups)
            for fact, values in facts.items():
                of_files = np.zeros(len(images.content.names), np.int64)
                of_files[files] = np.repeat(values, self.lengths)
                images.content.facts[fact] = of_files

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def content(self) -> Content | None:
        """What is known of the bytes of the frames' files."""
        return self.images.content

    def shared_with(self, record: dict | None, indices: np.ndarray) -> np.ndarray:
        """(n,) whether videos `indices` have frames, of those read so far, whose bytes are in a
        `record` of `common.run.content.load`.
        """
        is_stored = self.images.shared_with(record, np.arange(len(self.images)))
        return np.array([is_stored[self.frames[i]].any() for i in indices])

    @property
    def native_size(self) -> int:
        """Median shorter side of the frames in pixels."""
        return self.images.native_size

    @property
    def store_size(self) -> int:
        """Side of the decoded squares in pixels."""
        return self.images.store_size

    def resize_store(self, size: int) -> None:
        """Decode to squares of another side (pixels)."""
        self.images.resize_store(size)

    def describe(self) -> str:
        """One line, such as `ffpp.zip: 840 videos of 10 frames in 2 classes (fake 560, ...)`."""
        low, high = self.lengths.min(), self.lengths.max()
        length = f"{low} to {high} frames"
        if low == high:
            length = f"{low} frame{'s' if low > 1 else ''}"
        labels = describe_labels(self.labels, self.classes, self.splits)
        sizes = f"{self.native_size} px, stored at {self.store_size} px"
        return f"{self.name}: {plural(len(self), self._unit)} of {length}{labels}; {sizes}"

    def describe_clips(self, n_segment: int, seconds: float) -> str:
        """How clips are cut, in one line.

        It says how many videos are shorter than a clip, or have too few frames in all or a second,
        with the first name.
        """
        text = f"clips of {n_segment} frames over {seconds:g} s"
        needed = (n_segment - 1) * _interval(self.rates, n_segment, seconds) + 1
        few = self.lengths < n_segment
        shorter = (self.lengths < needed) & ~few
        sparse = self.rates * seconds < n_segment * 0.99
        for mask, what in (
            (shorter, "are shorter and shrink the interval"),
            (few, f"are shorter and have fewer than {n_segment} frames and repeat the last"),
            (sparse, f"have fewer than {n_segment / seconds:g} frames a second and stretch it"),
        ):
            if mask.any():
                first = self.ids[int(mask.argmax())]
                text += f"; {int(mask.sum())} of {len(self)} videos {what} (first: {first})"
        return text

    def train_clips(
        self, items: np.ndarray, seed: int, epoch: int, n_segment: int, seconds: float
    ) -> np.ndarray:
        """One clip of each item: (b, n_segment) positions.

        The start is drawn from (seed, epoch, item). Items below n are the videos, those above more
        clips of them: item i is one of video i % n.
        """
        drawn = uniform(seed, epoch, items, _START_STREAM, 1)[:, 0]
        videos = items % len(self)
        clips = train_clips(drawn, self.lengths[videos], self.rates[videos], n_segment, seconds)
        for row, video in enumerate(videos):
            if self.times[video] is not None:
                share = drawn[row : row + 1]
                (clips[row],) = timed_clips(self.times[video], share, n_segment, seconds)
        return clips

    def eval_clips(
        self, indices: np.ndarray, n_segment: int, seconds: float, count: int
    ) -> np.ndarray:
        """`count` evenly spaced clips of each video: (b, count, n_segment) positions."""
        clips = eval_clips(self.lengths[indices], self.rates[indices], n_segment, seconds, count)
        for row, video in enumerate(indices):
            if self.times[video] is not None:
                clips[row] = timed_clips(self.times[video], _spread(count), n_segment, seconds)
        return clips

    def batches(
        self, clips: Iterable[tuple[np.ndarray, np.ndarray]], workers: int
    ) -> Iterator[Tensor]:
        """The pixels of each batch of clips, uint8 (b, T, 3, store_size, store_size).

        Threads decode them ahead of use. A batch is (videos (b,), positions (b, T)): positions
        count a video's frames from 0. Frames that fit in 2 GiB together are decoded once and kept.
        """
        shapes = []  # of the batches that are decoded ahead, the oldest first

        def frame_batches():
            for videos, positions in clips:
                shapes.append(positions.shape)
                rows = zip(videos, positions, strict=True)
                yield np.concatenate([self.frames[video][row] for video, row in rows])

        for pixels in self.images.batches(frame_batches(), workers):
            yield pixels.unflatten(0, shapes.pop(0))

    def select(self, kept: np.ndarray) -> None:
        """Keep only the videos at these positions."""
        self.ids = [self.ids[i] for i in kept]
        self.frames = [self.frames[i] for i in kept]
        self.labels = self.labels[kept]
        self.splits = self.splits[kept]
        if self.groups is not None:
            self.groups = self.groups[kept]
        self.lengths = self.lengths[kept]
        self.rates = self.rates[kept]
        self.times = [self.times[i] for i in kept]

    def damaged_frames(self, workers: int) -> list[np.ndarray]:
        """Whether each frame of each video cannot be decoded; all are tried, but for what lies in
        memory or in a packed file.
        """
        bad: dict[int, str] = {}
        if not self.images.in_memory:
            bad = self.images.damaged(workers, np.unique(np.concatenate(self.frames)))
        return [np.isin(frames, list(bad)) for frames in self.frames]

    def drop_damaged(self, workers: int, cap: float = 0.01) -> list[str]:
        """Leave out the videos with a frame that cannot be decoded; returns their names.

        Raises:
            InputError: more than the share `cap` of the videos is damaged.
        """
        bad = np.array([frames.any() for frames in self.damaged_frames(workers)], bool)
        names = check_damaged(self.name, self.ids, bad, cap, f"{self._unit}s")
        self.select(np.flatnonzero(~bad))
        return names


def _interval(rates: np.ndarray, n_segment: int, seconds: float) -> np.ndarray:
    return np.maximum(np.asarray(rates, np.float64) * seconds / n_segment, 1)


def clip_offsets(lengths, rates, n_segment: int, seconds: float) -> np.ndarray:
    """Frames of a clip counted from its first one: (n, n_segment) int64.

    They increase where the video is long enough. Frame t lies floor(t * interval) behind the first,
    where the interval is seconds * rate / n_segment frames, at least 1 and at most what the video's
    length allows.

    Args:
        lengths: (n,) frames of the videos.
        rates: (n,) their frames a second, or one number.
        n_segment: frames of a clip.
        seconds: the time that a clip covers.
    """
    lengths = np.asarray(lengths, np.int64)[:, None]
    interval = np.reshape(_interval(rates, n_segment, seconds), (-1, 1))
    interval = np.minimum(interval, np.maximum((lengths - 1) / max(n_segment - 1, 1), 1))
    # A product such as 7 * (9 / 7) must not fall below 9.
    offsets = np.floor(np.arange(n_segment) * interval + 1e-6).astype(np.int64)
    return np.minimum(offsets, lengths - 1)


def train_clips(drawn: np.ndarray, lengths, rates, n_segment: int, seconds: float) -> np.ndarray:
    """One clip of each video, started where `drawn` says: (n, n_segment) int64 positions."""
    offsets = clip_offsets(lengths, rates, n_segment, seconds)
    starts = np.floor(drawn * (np.asarray(lengths) - offsets[:, -1])).astype(np.int64)
    return starts[:, None] + offsets


def eval_clips(lengths, rates, n_segment: int, seconds: float, count: int) -> np.ndarray:
    """`count` evenly spaced clips of each video.

    The first lies at the video's start, the last at its end, one alone in its middle.

    Returns:
        (n, count, n_segment) int64 positions; clips of a short video may be the same.
    """
    offsets = clip_offsets(lengths, rates, n_segment, seconds)
    spare = (np.asarray(lengths) - 1 - offsets[:, -1])[:, None]  # [n, 1]
    return np.floor(spare * _spread(count) + 0.5).astype(np.int64)[:, :, None] + offsets[:, None]


def _spread(count: int) -> np.ndarray:
    return np.linspace(0, 1, count) if count > 1 else np.array([0.5])


def timed_clips(times: np.ndarray, shares: np.ndarray, n_segment: int, seconds: float):
    """Clips of a video whose frames are not evenly apart: (c, n_segment) int64 positions.

    They cover the time that the clips of `clip_offsets` do. A position is the last frame at its
    time, and the next frame where that is taken already.

    Args:
        times: (n,) seconds of the frames, rising from 0.
        shares: (c,) where each clip begins, from the earliest to the latest possible time.
    """
    last = len(times) - 1
    if last < n_segment:
        return np.tile(np.minimum(np.arange(n_segment), last), (len(shares), 1))
    span = min(seconds * (n_segment - 1) / n_segment, times[last])
    starts = shares * (times[last] - span)
    wanted = starts[:, None] + np.linspace(0, span, n_segment)
    positions = np.searchsorted(times, wanted + 1e-9, side="right") - 1
    steps = np.arange(n_segment)
    positions = np.maximum.accumulate(positions - steps, 1) + steps  # each frame once
    # Back from the end where that went beyond it.
    return np.clip(np.minimum(positions, last - steps[::-1]), 0, last)


def natural_order(name: str) -> list:
    """A sort key with numbers by value: 2.png comes before 10.png."""
    # Python converts no more digits than 4300 at once.
    return [int(part[:4000]) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


class Renaming(NamedTuple):
    """Names with `skipped` of their first folders left out, below the folder `top`."""

    top: tuple[str, ...] = ()
    skipped: int = 0

    def __call__(self, name: str) -> str:
        if not (self.top or self.skipped):
            return name
        return "/".join((*self.top, *PurePosixPath(name).parts[self.skipped :]))


def renaming(listed: list[str], there: Iterable[str], least: int = 2) -> Renaming:
    """How the names of a list, which start at some folder, become names in the tree.

    As few of their first folders as possible are left out, so that at least `least` parts remain,
    for a folder of the tree, at most two deep, below which the most are found; the name itself
    where none is.
    """
    names = [PurePosixPath(name).parts for name in listed]
    paths = [PurePosixPath(name).parts for name in there]
    for skipped in range(max(map(len, names), default=0) - least + 1):
        wanted = {parts[skipped:] for parts in names if len(parts) - skipped >= least}
        for depth in range(3):
            tops = Counter(parts[:depth] for parts in paths if parts[depth:] in wanted)
            if tops:
                return Renaming(max(sorted(tops), key=tops.get), skipped)
    return Renaming()


def frame_images(name: str, files: list[str], sizes, read, keys=()) -> Images:
    """The frames of folders of images; arguments as `Images` takes them."""
    labels = [UNLABELED] * len(files)
    splits = [""] * len(files)
    return Images(name, files, labels, [], splits, sizes=sizes, keys=keys, read=read)


class VideoFiles(Images):
    """Frames of video files, numbered through; of one with a variable frame rate moments that are
    evenly apart stand for them.

    The frames of one file that a batch needs are decoded in one pass.

    Attributes:
        counts: (n,) int64, frames of each file; 0 where it cannot be read, with the reason in
            `errors`.
        rates: (n,) float64, frames a second.
        errors: reasons by position.
    """

    def __init__(self, name: str, files: list[str], sizes, read, workers: int, keys=()):
        self.name = name
        self._read_file = read
        self.counts = np.zeros(len(files), np.int64)
        self.rates = np.ones(len(files))
        self.errors: dict[int, str] = {}
        self._sides: list[tuple[int, int]] = []
        with ThreadPoolExecutor(workers) as pool:
            headers = pool.map(self._read_header, range(len(files)))
            opened = live.progress(headers, "opening videos", len(files))
            for i, header in enumerate(opened):
                if isinstance(header, Exception):
                    self.errors[i] = reason(header)
                else:
                    self.counts[i], self.rates[i], side = header
                    self._sides.append(side)
        if not self._sides:
            raise InputError(
                f"{name}: no video file can be read; the first, {files[0]}: {self.errors[0]}"
            )
        self._firsts = np.cumsum(self.counts) - self.counts
        counted = zip(files, self.counts, strict=True)
        ids = [f"{file}#{frame}" for file, count in counted for frame in range(count)]
        labels = [UNLABELED] * len(ids)
        splits = [""] * len(ids)
        super().__init__(name, ids, labels, [], splits, sizes=sizes, read=read)
        self.content = Content(files, read, keys=keys, facts={"size": self.sizes})
        self._read_file = self.content.read

    def file_frames(self, file: int) -> np.ndarray:
        """The positions of a file's frames."""
        return self._firsts[file] + np.arange(self.counts[file])

    def _read_header(self, file: int) -> tuple[int, float, tuple[int, int]] | Exception:
        # Frames, frames a second, and the sides in pixels.
        _video_decoder()  # its InputError ends the run
        try:
            decoder = open_video(self._read_file(file))
        except DECODE_ERRORS as error:
            return error
        header = decoder.metadata
        return len(decoder), header.average_fps, (header.height, header.width)

    def _probe(self) -> int:
        return self._shorter_side(self._sides)

    def files_of(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._firsts + self.counts, indices, side="right")

    def _groups(self, indices: np.ndarray) -> list[np.ndarray]:
        if not len(indices):
            return []
        return np.split(indices, np.flatnonzero(np.diff(self.files_of(indices))) + 1)

    def _decode_group(self, indices: np.ndarray) -> list[Tensor]:
        file = int(self.files_of(indices[:1])[0])
        video_decoder = _video_decoder()
        try:
            decoder = video_decoder(self._read_file(file))
            within = indices - self._firsts[file]
            frames = _frames_at(decoder, within, int(self.counts[file]))
        except OtherContent:
            raise
        except DECODE_ERRORS as error:
            raise self._damaged(f"video {self.ids[self._first_bad(indices)]}", error) from None
        return [self._cut(frame, int(index)) for frame, index in zip(frames, indices, strict=True)]

    def _first_bad(self, indices: np.ndarray) -> int:
        # The first of some frames of a file that cannot be decoded alone.
        file = int(self.files_of(indices[:1])[0])
        for index in indices:
            try:
                decoder = _video_decoder()(self._read_file(file))
                _frames_at(decoder, np.array([index - self._firsts[file]]), int(self.counts[file]))
            except DECODE_ERRORS:
                return int(index)
        return int(indices[0])

    def decode(self, index: int) -> Tensor:
        """One frame as uint8 (3, store_size, store_size).

        Raises:
            InputError: the file is damaged; the message names it.
        """
        return self._decode_group(np.array([index]))[0]


def _frames_at(decoder, within: np.ndarray, count: int) -> Tensor:
    """The pixels (n, 3, H, W) shown at these of `count` moments that are evenly apart.

    They are the frames of these numbers, but in a file of variable frame rate.
    """
    begin = getattr(decoder.metadata, "begin_stream_seconds", None)
    end = getattr(decoder.metadata, "end_stream_seconds", None)
    if begin is None or end is None or not end > begin:
        return decoder.get_frames_at(indices=within.tolist()).data
    seconds = begin + (within + 0.5) * (end - begin) / count
    return decoder.get_frames_played_at(seconds=seconds.tolist()).data


def open_video(content: bytes):
    """torchcodec's decoder of a video file, whose header says how many frames, what rate and size.

    Raises:
        InputError: torchcodec or FFmpeg is missing.
        One of DECODE_ERRORS: it is no such file.
    """
    decoder = _video_decoder()(content)
    header = decoder.metadata
    if not (len(decoder) and header.average_fps and header.height and header.width):
        raise ValueError("it says no number of frames, rate or size")
    reading.within(4 * header.height * header.width, f"{header.width} x {header.height} pixels")
    return decoder


def _video_decoder():
    try:
        from torchcodec.decoders import VideoDecoder
    # Without FFmpeg's libraries some versions raise the last two.
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"video files need torchcodec and FFmpeg ({reason(error)}): pip install torchcodec,"
            " apt-get install ffmpeg; or give folders of frames"
        ) from None
    return VideoDecoder
