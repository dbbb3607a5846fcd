"""Emotion clips of two streams, a person's face and the scene around.

They come in RAER's layout, or are the embedded sample.

A folder, or a .zip of one, as CLIP-CAER reads RAER (DFER-CLIP's lists are alike, but count labels
from 0):

- `train.txt`, `test.txt` and perhaps `val.txt`, a line a clip: `CLIP_FOLDER NUM_FRAMES LABEL`. The
  folder may have spaces in its name, and may be absolute: what lies above the data is dropped.
  Labels count from 1, or from 0 where a 0 occurs, where nothing else is asked for.
  Also read are the forms of DFEW's, FERV39k's and MAFW's lists, see `_lines`.
- the folders of frames that these name.
- `face.json`: `{clip folder: {frame's file name: [left, top, right, bottom]}}` and `body.json`:
  `{clip folder: [left, top, right, bottom]}`, in pixels of the frame, turned by its EXIF
  orientation where it has one, as OpenCV's `imread` gives it. null stands for a box that is
  missing. Names as `face_detection_result.json` and keys `clip folder/frame's file name` do too;
  keys may have another root, case or extension.
- `classes.txt`, a line a class in the order of the labels: the name, and after a tab a description
  for the text encoder. Without this file they are RAER's five.

Without lists and boxes, `SPLIT/CLASS/` has images, a clip each, or folders of frames.

For answers alone, folders of frames are clips without labels; images that lie in the folder itself
are an item each, whose box has its file's name for a key. Of one file the boxes lie beside it.

The face stream shows the face's box with a margin, stretched to a square; the context stream the
body's box, letterboxed in black. One decoding of a frame gives both.
"""

import hashlib
import math
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import live, reading
from common.data.clips import VIDEO_SUFFIXES, VideoFiles, Videos, natural_order, renaming
from common.data.groups import refuse_spanning
from common.data.images import (
    DECODE_ERRORS,
    SPLITS,
    SUFFIXES,
    UNLABELED,
    Images,
    hidden,
    is_image,
    list_files,
    open_image,
    reason,
    upright_size,
)
from common.data.sampling import hold_out, hold_out_groups, say_lost
from common.data.synthetic import emotion_clips
from common.errors import InputError, did_you_mean, first_few, plural
from common.rng import uniform
from common.run.content import codes

CLASSES = {
    "neutrality": (
        "a student with a calm and relaxed face who follows the lesson without showing a feeling"
    ),
    "enjoyment": (
        "a student who smiles, with raised cheeks and bright eyes, and leans towards the lesson"
        " with pleasure"
    ),
    "confusion": (
        "a student with knitted brows and a tilted head who looks puzzled and stares at the task"
    ),
    "fatigue": (
        "a student with drooping eyelids who yawns, rubs the eyes or rests the head on a hand"
    ),
    "distraction": (
        "a student who looks away from the lesson, at a phone, at somebody else or out of the"
        " window"
    ),
}
MISSING_BOX = ("error", "full", "skip")
BOX_FORMATS = ("xyxy", "xywh")
MOST_MISSING = 0.01  # of the clips that --on-bad-item skip leaves out, unless told otherwise
# What `TwoStreams` does with a frame, for who uses a model without it.
SQUARES = {
    "faces": "the face's box, grown on each side by face_margin of its size, stretched to a square"
    " of store_size or at most 256 (Pillow, BILINEAR)",
    "contexts": "the body's box, its longer side to that size (Pillow, BILINEAR), in the middle of"
    " a black square",
}
VAL_SHARE = 0.2  # of the training clips, as RAER's own val_20
_FRAME_STREAM = 2**31 + 2  # beside data's and clips' streams; no view has this number


class _Line(NamedTuple):
    clip: str  # as it is listed
    count: int | None  # of its frames, where the list says it
    label: int | str
    split: str
    place: str  # file and line number


class _Streams:
    """What `Images` decodes as the two streams.

    Frames as uint8 (2, 3, store_size, store_size): the face's square, and the context's.

    Where `bodies` is None it is the face's alone, (1, 3, store_size, store_size).

    Attributes:
        faces, bodies: (n, 4) float64 boxes left, top, right, bottom in pixels of each frame as it
            is seen, turned by its EXIF orientation; NaN where there is none, which stands for the
            whole frame.
        margin: by how much of its width and height a face's box grows on each side.
    """

    _drafts = False  # the boxes count pixels of the frame as it is

    def _set_boxes(self, faces: np.ndarray, bodies: np.ndarray | None, margin: float) -> None:
        self.faces = faces
        self.bodies = bodies
        self.margin = margin
        boxes = [faces] if bodies is None else [faces, bodies]
        told = self.fingerprint.encode() + b"".join(rows.tobytes() for rows in boxes)
        self.fingerprint = hashlib.sha256(told).hexdigest()[:8]

    @property
    def _shape(self) -> tuple[int, ...]:
        return (1 + (self.bodies is not None), 3, self.store_size, self.store_size)

    def _cut(self, image: Tensor, index: int) -> Tensor:
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        face = crop_square(image, _grown(self.faces[index], self.margin), self.store_size)
        if self.bodies is None:
            return face[None]
        context = letterbox(image, self.bodies[index], self.store_size)
        return torch.stack([face, context])


class TwoStreams(_Streams, Images):
    """Two streams of the frames in files of images; arguments as `Images` takes them, and boxes."""

    def __init__(
        self, name: str, files: list[str], sizes, read, faces, bodies, margin: float, keys=()
    ):
        labels = [UNLABELED] * len(files)
        splits = [""] * len(files)
        super().__init__(name, files, labels, [], splits, sizes=sizes, keys=keys, read=read)
        boxes = [faces] if bodies is None else [faces, bodies]
        self.content.facts["box"] = codes(np.concatenate(boxes, 1))
        self._set_boxes(faces, bodies, margin)


class VideoStreams(_Streams, VideoFiles):
    """Two streams of the frames of video files; the boxes follow when the frames are counted."""

    def take_boxes(self, frames: np.ndarray, faces, bodies, margin: float) -> None:
        """Set the boxes (n, 4) of `frames` (n,); no other frame is decoded then."""
        every = np.full((2, len(self), 4), np.nan)
        every[0, frames] = faces
        if bodies is not None:
            every[1, frames] = bodies
        self._set_boxes(every[0], None if bodies is None else every[1], margin)


class EmotionClips(Videos):
    """Clips of two streams.

    Attributes, beside those of `Videos`, whose `rates` mean nothing here:
        descriptions: a sentence for each of `classes`.
        notes: what opening found, in lines: the label base, missing boxes, clips that were left
            out.
        label_base: what the lists call the first class, 0 or 1; None: there are no lists.
        num_absent: clips that lists name and that have no frames.
    """

    _unit = "clip"
    label_base: int | None = None
    num_absent = 0

    def __init__(
        self, name, ids, labels, classes, splits, frames, images: Images, descriptions=(), notes=()
    ):
        super().__init__(name, ids, labels, classes, splits, frames, 1.0, images)
        self.descriptions = list(descriptions)
        self.notes = list(notes)

    def train_frames(self, items: np.ndarray, seed: int, epoch: int, num_frames: int) -> np.ndarray:
        """A random frame of each of `num_frames` equal segments: (b, num_frames) positions.

        They are drawn from (seed, epoch, item). Items below n are the clips, those above more draws
        of them: item i is one of clip i % n. A sampler that takes a clip several times in an epoch
        gives each time another item, and so other frames and augmentation (`number_repeats`).
        """
        drawn = uniform(seed, epoch, items, _FRAME_STREAM, num_frames)
        return segment_frames(self.lengths[items % len(self)], num_frames, drawn)

    def eval_frames(self, indices: np.ndarray, num_frames: int) -> np.ndarray:
        """The center frame of each of `num_frames` equal segments: (b, num_frames) positions."""
        return segment_frames(self.lengths[indices], num_frames)

    def batches(
        self, clips: Iterable[tuple[np.ndarray, np.ndarray]], workers: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """The faces and the contexts of each batch of clips, or the faces alone.

        Each is uint8 (b, T, 3, store_size, store_size). Threads decode them ahead of use. A batch
        is (clips (b,), positions (b, T)), as `Videos.batches` takes it. A frame is decoded once for
        both streams; all are kept where they fit in 2 GiB together.
        """
        for pixels in super().batches(clips, workers):
            yield pixels.unbind(2)

    def describe_frames(self, num_frames: int) -> str:
        """How clips are read, in one line: how many have too few frames, by name."""
        text = f"clips of {plural(num_frames, 'frame')}, one of each of as many equal segments"
        few = self.lengths < num_frames
        if few.any():
            first = self.ids[int(few.argmax())]
            text += (
                f"; {int(few.sum())} of {len(self)} have fewer frames and repeat the last"
                f" (first: {first})"
            )
        return text


def segment_frames(lengths, num_frames: int, drawn: np.ndarray | None = None) -> np.ndarray:
    """One frame of each of `num_frames` equal segments (TSN, arXiv:1608.00859).

    Returns (n, num_frames) int64 positions. Segment t begins at floor(t * length / num_frames). A
    clip of fewer frames gives each once and repeats the last.

    Args:
        lengths: (n,) frames of the clips.
        drawn: (n, num_frames) in [0, 1), where in its segment each frame lies; None: in the center.
    """
    lengths = np.asarray(lengths, np.int64)[:, None]
    bounds = np.arange(num_frames + 1) * lengths // num_frames
    starts = bounds[:, :-1]
    sizes = np.diff(bounds)
    within = sizes // 2 if drawn is None else np.floor(drawn * sizes).astype(np.int64)
    return np.where(
        lengths < num_frames, np.minimum(np.arange(num_frames), lengths - 1), starts + within
    )


def number_repeats(clips: np.ndarray, count: int) -> np.ndarray:
    """Clips drawn with replacement as items of a data set of `count` clips.

    The k-th time that clip i occurs gives i + (k - 1) * count.
    """
    order = np.argsort(clips, kind="stable")
    same = clips[order]
    run_start = np.searchsorted(same, same)
    items = np.empty(len(clips), np.int64)
    items[order] = same + (np.arange(len(clips)) - run_start) * count
    return items


def prepare(
    path: str | tuple[str, ...],
    *,
    store_size: int | None,
    on_bad_item: str,
    workers: int,
    allow_missing: float = MOST_MISSING,
    say=print,
    **options,
) -> EmotionClips:
    """`open_clips`, which gets the `options` too, decoded to `store_size` where that is given.

    What was left out and what is there goes to `say`.
    """
    clips = open_clips(
        path, on_bad_item=on_bad_item, workers=workers, allow_missing=allow_missing, **options
    )
    if store_size:
        clips.resize_store(store_size)
    if on_bad_item == "skip":
        absent = clips.num_absent
        allowed = max(0.0, allow_missing * (absent + len(clips)) - absent)
        try:
            damaged = clips.drop_damaged(workers, allowed / len(clips))
        except InputError as error:
            besides = f" besides {plural(absent, 'clip')} without frames" if absent else ""
            raise InputError(f"{error}{besides}; --allow-missing SHARE allows more") from None
        names = f": {first_few(damaged)}" if damaged else ""
        clips.notes.append(f"left out {plural(len(damaged), 'clip')} with damaged frames{names}")
    for note in clips.notes:
        say(note)
    say(clips.describe())
    return clips


def open_clips(
    path: str | tuple[str, ...],
    *,
    workers: int,
    on_bad_item="error",
    missing_box="error",
    margin: float,
    box_format="xyxy",
    allow_missing: float = MOST_MISSING,
    labels=True,
    label_base: int | None = None,
    known: list[str] | None = None,
    as_clip=True,
    streams="both",
    lists: dict[str, str] | None = None,
) -> EmotionClips:
    """The clips of a folder or of a .zip, or the embedded data set (`sample`).

    Args:
        path: see the layout at the top; without `labels` also several, each with its own boxes,
            whose clips' names have their path before them.
        workers: threads that read the frames' sizes.
        on_bad_item: "error" or "skip": whether a listed clip without frames ends the run or is left
            out, and whether one with another number of frames than listed ends it or is taken as it
            is.
        missing_box: "error", "full" (the whole frame stands for the box) or "skip" (a frame without
            a face's box, and a clip without a body's or without a frame left, is left out).
        margin: share of its sides by which a face's box grows on each side, as far as the frame
            goes.
        box_format: what a box's four numbers are, "xyxy" (left, top, right, bottom) or "xywh"
            (left, top, width, height).
        allow_missing: share of the listed clips that "skip" leaves out at most.
        labels: False takes any folders of frames, as clips without labels or splits.
        label_base: what the lists call the first class; None: 0 where a 0 occurs in them, else 1.
        known: a model's classes in its order, those of data without classes.txt.
        lists: the files that list the clips of "train" and "test", in the place of those in `path`.
        streams: "both", or "face": no body is read or cut.
        as_clip: images that lie in the folder itself are the frames of one clip; False: each is a
            clip.

    Raises:
        InputError: missing or not readable; a line, class or box that is not as above; a label
            beyond the classes; a clip that is listed twice or in two splits; clips without frames,
            with others than listed, or without boxes.
    """
    with_body = streams == "both"
    if path == "sample":
        return _sample(with_body)
    if isinstance(path, str):
        tree = _tree(path, as_clip)
        title = Path(path).name
    else:
        tree = _joined(path, as_clip)
        path = title = tree.path
    names, descriptions = list(CLASSES), list(CLASSES.values())
    notes = list(tree.notes)
    videos = None
    if tree.videos:
        tree, videos = _with_videos(tree, title, workers, on_bad_item, notes)
    if tree.num_loose > 1:
        notes.append(
            f"{tree.num_loose} images lie in no folder of a clip: each is an item; --as-clip takes"
            " those of a folder as the frames of one clip"
        )
    if labels:
        by_folder = None if lists else _class_folders(tree)
        if by_folder:
            tree, lines = by_folder
            notes.append(f"no lists: {plural(len(lines), 'clip')} in folders SPLIT/CLASS")
        else:
            texts = _list_texts(tree, lists or {}, notes)
            lines = [
                line
                for part, (place, text) in texts.items()
                for line in _lines(tree.path, place, text, part, known is None or part == "test")
            ]
        base, named = label_base, sorted({x.label for x in lines if isinstance(x.label, str)})
        if named and len(named) < len({line.label for line in lines}):
            raise InputError(f"{path}: some labels are numbers and some are names; give one kind")
        names, descriptions = _classes(tree, known, named)
        spelled = {name.lower(): name for name in named}
        if other := [name for name in named if spelled[name.lower()] != name]:
            raise InputError(
                f"{path}: labels {other[0]} and {spelled[other[0].lower()]} differ in case alone;"
                " write them alike"
            )
        if named and base is not None and known is None:
            raise InputError(f"--label-base {base}: labels of {path} are names; leave it out")
        if named:
            base, lines = 0, _numbered(tree.path, lines, names)
        if base is None:
            numbers = {line.label for line in lines}
            base = 0 if 0 in numbers else 1
            if known and base and numbers and max(numbers) < len(names):
                raise InputError(
                    f"{path}: labels {min(numbers)} to {max(numbers)} count from 0 or from 1, and"
                    " the model's own were no numbers; --label-base 0 or 1 says it"
                )
        note = _check_labels(tree, lines, base, names)
        notes.append(f"labels are names: {', '.join(names)}" if named else note)
        if names == list(CLASSES) and _position(tree, "classes.txt") is None:
            notes[-1] += " (RAER's classes, the default without classes.txt)"
        found = _found_loosely([line.clip for line in lines], tree.folders, (_stem,))
        for name, folder in found.items():
            own, other = (f"/{_stem(x)}" for x in (name, folder))
            if not own.endswith(other) and not other.endswith(own):
                notes.append(
                    f"WARN lists name other folders than there are: {name} is read from {folder}"
                )
                break
        lines = [line._replace(clip=found.get(line.clip, line.clip)) for line in lines]
        _refuse_repeats(path, lines)
    else:
        lines = [
            _Line(folder, len(files), UNLABELED, "", folder)
            for folder, files in tree.folders.items()
        ]
        base = 0
    listed = lines
    lines = _with_frames(tree, listed, on_bad_item, allow_missing, notes)

    faces_of = _face_boxes(tree, lines, box_format)
    body_of = _body_boxes(tree, lines, box_format) if with_body else {}
    name_of = dict(enumerate(names, base)) if labels else {}
    kept = _decide_missing(tree, lines, faces_of, body_of, missing_box, name_of, notes)
    used = [(line, rows) for line, rows in zip(lines, kept, strict=True) if len(rows)]
    if not used:
        raise InputError(f"{path}: no clips are left; give boxes, or --missing-box full")
    position = [tree.folders[line.clip][row] for line, rows in used for row in rows]
    counts = [len(rows) for _, rows in used]
    ends = np.cumsum(counts)
    frames = np.split(np.arange(ends[-1]), ends[:-1])
    faces = np.concatenate([faces_of[line.clip][rows] for line, rows in used])
    bodies = None
    if with_body:
        bodies = np.repeat([body_of[line.clip] for line, _ in used], counts, axis=0)

    def content(index: int) -> bytes:
        return tree.read(position[index])

    if videos is not None:
        of_frames = np.array(position) - len(tree.sizes)
        images, frames = videos, np.split(of_frames, ends[:-1])
        images.take_boxes(of_frames, faces, bodies, margin)
    else:
        images = TwoStreams(
            title,
            [tree.names[i] for i in position],
            [tree.sizes[i] for i in position],
            content,
            faces=faces,
            bodies=bodies,
            margin=margin,
            keys=[tree.keys[i] for i in position],
        )
        firsts = [indices[0] for indices in frames]
        _refuse_degenerate(path, images, content, firsts, workers, box_format)
    clips = EmotionClips(
        title,
        ids=[line.clip if line.clip and not tree.alone else Path(path).stem for line, _ in used],
        labels=[line.label - base if line.split else UNLABELED for line, _ in used],
        classes=names,
        splits=[line.split for line, _ in used],
        frames=frames,
        images=images,
        descriptions=descriptions,
        notes=notes,
    )
    clips.label_base = base if labels and not named else None
    clips.num_absent = len(listed) - len(lines)
    return clips


def split(clips: EmotionClips, names=("train", "val", "test"), say=print) -> dict[str, np.ndarray]:
    """The indices of the parts `names`: the data's own.

    Where it has no validation part, that is a fifth of the training part. That is held out by the
    clips' `groups`, or their parent folders, a lecture's or a person's, where this leaves every
    class on both sides, and else by clip; stratified by class, a function of the names alone, and
    said.

    Raises:
        InputError: a part has no clips, or the training part none of some class; two parts share a
            group.
    """
    parts = {name: np.flatnonzero(clips.splits == name) for name in ("train", "val", "test")}
    if clips.groups is not None:
        refuse_spanning(clips, clips.groups[:, None], {name: parts[name] for name in names})
    if not len(parts["val"]) and len(parts["train"]) and ("train" in names or "val" in names):
        parts["val"], groups = _hold_out(clips, parts["train"])
        parts["train"] = np.setdiff1d(parts["train"], parts["val"])
        say(
            f"no val.txt: {len(parts['val'])} training clips are held out for validation, whole"
            f" {groups} each"
        )
        if clips.groups is not None:
            say_lost(clips, parts["train"], {"val": parts["val"]}, say)
    for name in names:
        counts = np.bincount(clips.labels[parts[name]], minlength=len(clips.classes))
        if not counts.any():
            raise InputError(f"{clips.name}: there are no clips in {name}; needed is {name}.txt")
        if not counts.all():
            lost, there = (
                ", ".join(np.array(clips.classes)[mask]) for mask in (counts == 0, counts > 0)
            )
            if name == "train":
                raise InputError(
                    f"{clips.name}: train has no clips of {lost}; add some, or let classes.txt name"
                    f" those alone that there are: {there}"
                )
            say(
                f"WARN {name} has no clips of {lost}: they count as 0 in its uar; uar_present is"
                f" over {there}"
            )
    return {name: parts[name] for name in names}


def _hold_out(clips: EmotionClips, pool: np.ndarray) -> tuple[np.ndarray, str]:
    ids, labels = clips.ids, clips.labels
    if clips.groups is not None:
        return hold_out(ids, labels, pool, VAL_SHARE, "val", clips.groups), "groups"
    counts = np.bincount(labels[pool], minlength=len(clips.classes))
    for kind, name_of in (("parent folders", posixpath.dirname), ("clips", str)):
        groups = np.array([name_of(name) for name in ids], dtype=object)
        chosen = hold_out_groups(groups, labels, pool, VAL_SHARE, "val", keep_classes=False)
        held = np.bincount(labels[chosen], minlength=len(counts))
        # By clip every class with two clips or more has one on either side.
        if kind == "clips" or ((held > 0) & (held < counts))[counts > 1].all():
            return chosen, kind


def crop_square(image: Image.Image, box: np.ndarray, side: int) -> Tensor:
    """The part of an RGB image in `box`, stretched to a square: uint8 (3, side, side).

    A box of NaN is the whole image.
    """
    image = image.resize((side, side), Image.Resampling.BILINEAR, box=_inside(image, box))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def letterbox(image: Image.Image, box: np.ndarray, side: int) -> Tensor:
    """As `crop_square`, with the part's shape kept.

    Its longer side fills the square, the rest is black on both sides, as beyond a rotated image.
    """
    box = _inside(image, box)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = side / max(width, height)
    width, height = (max(1, round(length * scale)) for length in (width, height))
    square = Image.new("RGB", (side, side))
    part = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    square.paste(part, ((side - width) // 2, (side - height) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _inside(image: Image.Image, box: np.ndarray) -> tuple[float, ...]:
    if np.isnan(box[0]):
        return (0.0, 0.0, *map(float, image.size))
    left, top, right, bottom = (float(x) for x in box)
    box = (max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height))
    if box[2] - box[0] < 1 or box[3] - box[1] < 1:
        raise ValueError(
            f"the box {[left, top, right, bottom]} is outside of its {image.width} x"
            f" {image.height} pixels"
        )
    return box


def _grown(box: np.ndarray, margin: float) -> np.ndarray:
    left, top, right, bottom = box
    x = margin * (right - left)
    y = margin * (bottom - top)
    return np.array([left - x, top - y, right + x, bottom + y])


def _sample(with_body: bool) -> EmotionClips:
    drawn = emotion_clips()
    count, length = drawn.face.shape[:2]
    streams = [drawn.face, drawn.context] if with_body else [drawn.face]
    pixels = torch.from_numpy(np.stack(streams, 2)).flatten(0, 1)  # [count * length, 2, 3, S, S]
    files = [f"{i:06d}" for i in range(len(pixels))]
    images = Images("sample", files, [UNLABELED] * len(files), [], [""] * len(files), pixels=pixels)
    return EmotionClips(
        "sample (embedded, generated)",
        ids=[f"{part}/{i:04d}" for i, part in enumerate(drawn.splits)],
        labels=drawn.labels,
        classes=list(CLASSES),
        splits=drawn.splits,
        frames=np.arange(count * length).reshape(count, length),
        images=images,
        descriptions=CLASSES.values(),
    )


def _is_wanted(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, *VIDEO_SUFFIXES, ".txt", ".json")) and not hidden(name)


class _Tree(NamedTuple):
    path: str  # as it was given
    names: list[str]  # of all files, below the folder that holds everything
    folders: dict[str, list[int]]  # positions of the frames in order of time, by folder
    read: Callable[[int], bytes]
    sizes: list[int]
    keys: list[int]
    num_loose: int = 0  # images that are a clip each
    videos: dict[str, int] = {}  # positions of video files, by clip; their folders are empty
    notes: tuple[str, ...] = ()
    parts: dict[str, "_Tree"] = {}  # of several paths, by path
    alone: bool = False  # one file, of which only the boxes beside it are read too

    def full_name(self, clip: str) -> str:
        """The name of a clip among those of several paths."""
        return self.path if self.alone or not clip else posixpath.join(self.path, clip)


def _tree(path: str, as_clip: bool) -> _Tree:
    suffixes = (*SUFFIXES, *VIDEO_SUFFIXES)
    alone = path.lower().endswith(suffixes) and not Path(path).is_dir()
    if alone:
        boxes = [f"{name}.json" for part in ("face", "body") for name in (part, _upstream(part))]
        beside = [posixpath.join(posixpath.dirname(path), name) for name in boxes]
        given = (path, *filter(os.path.isfile, beside))
        files, sizes, keys, read = list_files(given, _is_wanted, (*suffixes, ".json"))
    else:
        files, sizes, keys, read = list_files(path, _is_wanted, suffixes)
    top = posixpath.commonpath([posixpath.dirname(name) for name in files]) if files else ""
    names = [posixpath.basename(name) if alone else name[len(top) :].lstrip("/") for name in files]
    folders = defaultdict(list)
    for i, name in enumerate(names):
        if is_image(name):
            folders[posixpath.dirname(name)].append(i)
    videos = {name: i for i, name in enumerate(names) if name.lower().endswith(VIDEO_SUFFIXES)}
    notes = ()
    if folders and videos:
        notes = (f"{path}: {plural(len(videos), 'video file')} beside folders of frames left out",)
        videos = {}
    folders |= {name: [] for name in videos}
    if not folders:
        raise InputError(f"{path}: no folders of frames there; allowed are {', '.join(suffixes)}")
    for frames in folders.values():
        frames.sort(key=lambda i: natural_order(names[i]))
    # In an archive the images of its only folder lie loose, too.
    one_clip = as_clip or (top and Path(path).is_dir())
    loose = folders.pop("", []) if alone or not one_clip else []
    folders |= {names[i]: [i] for i in loose}
    num_loose = 0 if alone else len(loose)
    folders = dict(folders)
    return _Tree(path, names, folders, read, sizes, keys, num_loose, videos, notes, alone=alone)


def _joined(paths: tuple[str, ...], as_clip: bool) -> _Tree:
    # The trees of several paths as one, each name with its path before it.
    parts = {path: _tree(path, as_clip) for path in paths}
    names: list[str] = []
    folders: dict[str, list[int]] = {}
    videos: dict[str, int] = {}
    where: list[tuple[_Tree, int]] = []
    for path, tree in parts.items():
        for folder, rows in tree.folders.items():
            folders[tree.full_name(folder)] = [len(names) + row for row in rows]
        videos |= {tree.full_name(clip): len(names) + i for clip, i in tree.videos.items()}
        names += [posixpath.join(path, name) for name in tree.names]
        where += [(tree, i) for i in range(len(tree.names))]

    def read(index: int) -> bytes:
        tree, row = where[index]
        return tree.read(row)

    sizes = [size for tree in parts.values() for size in tree.sizes]
    keys = [key for tree in parts.values() for key in tree.keys]
    num_loose = sum(tree.num_loose for tree in parts.values())
    notes = tuple(note for tree in parts.values() for note in tree.notes)
    if videos and len(videos) < len(folders):
        raise InputError(
            f"{first_few(paths)}: some are video files and some are images; give one kind at a time"
        )
    return _Tree(
        first_few(paths), names, folders, read, sizes, keys, num_loose, videos, notes, parts
    )


def _with_videos(
    tree: _Tree, title: str, workers: int, on_bad_item: str, notes: list[str]
) -> tuple[_Tree, VideoStreams]:
    """The tree with the frames of its video files, which are numbered behind its files."""
    rows = list(tree.videos.values())
    opened = VideoStreams(
        title,
        [tree.names[i] for i in rows],
        [tree.sizes[i] for i in rows],
        lambda index: tree.read(rows[index]),
        workers,
        keys=[tree.keys[i] for i in rows],
    )
    if opened.errors:
        first = min(opened.errors)
        fault = (
            f"{len(opened.errors)} of {plural(len(rows), 'video file')} cannot be read"
            f" (first: {tree.names[rows[first]]}: {opened.errors[first]})"
        )
        if on_bad_item == "error":
            raise InputError(f"{tree.path}: {fault}; --on-bad-item skip leaves them out")
        notes.append(fault)
    folders = {
        clip: list(len(tree.sizes) + opened.file_frames(k))
        for k, clip in enumerate(tree.videos)
        if k not in opened.errors
    }
    return tree._replace(names=tree.names + opened.ids, folders=folders), opened


def _beside(tree: _Tree, key_of) -> dict[str, int]:
    """Positions of the files that are no clip's, by the key that `key_of` gives their base names.

    Files without a key are left out.
    """
    positions: dict[str, int] = {}
    for i, name in enumerate(tree.names):
        key = key_of(posixpath.basename(name).lower())
        if key and posixpath.dirname(name) not in (tree.folders.keys() - {""}):
            if key in positions:
                raise InputError(
                    f"{tree.path}: {tree.names[positions[key]]} and {name} say the same; remove one"
                )
            positions[key] = i
    return positions


def _upstream(name: str) -> str:
    return f"{name}_detection_result"


def _position(tree: _Tree, wanted: str) -> int | None:
    """The position of the file of that base name, or of upstream's, that is no clip's."""

    def key_of(base: str) -> str | None:
        name, extension = posixpath.splitext(wanted)
        return wanted if base in (wanted, _upstream(name) + extension) else None

    return _beside(tree, key_of).get(wanted)


def _lists(tree: _Tree) -> dict[str, int]:
    """The lists' positions by split."""

    def split_of(base: str) -> str | None:
        return SPLITS.get(base.removesuffix(".txt")) if base.endswith(".txt") else None

    positions = _beside(tree, split_of)
    if not positions:
        raise InputError(
            f"{tree.path}: no train.txt or test.txt there,"
            " with lines `clip_folder num_frames label`; --train-list and --test-list name them"
            " elsewhere, or give folders train/CLASS and test/CLASS"
        )
    return {part: positions[part] for part in ("train", "val", "test") if part in positions}


def _text(tree: _Tree, position: int) -> str:
    try:
        return reading.decode_table(_content(tree, position), tree.names[position])
    except UnicodeDecodeError as error:
        name = tree.names[position]
        raise InputError(f"{tree.path}: {name} is not UTF-8 text: {error}") from None


def _content(tree: _Tree, position: int) -> bytes:
    try:
        return tree.read(position)
    except DECODE_ERRORS as error:
        name = tree.names[position]
        raise InputError(f"{tree.path}: {name} cannot be read: {reason(error)}") from None


def _classes(tree: _Tree, known: list[str] | None, named: list[str]) -> tuple[list[str], list[str]]:
    """Names and descriptions; of a model's `known` classes the names alone.

    Without classes.txt they are those that the lists name (`named`), or RAER's.
    """
    position = _position(tree, "classes.txt")
    if position is None and known:
        return known, []
    rows, source = list(named or CLASSES), "the lists name"
    if position is not None:
        rows, source = _text(tree, position).splitlines(), "classes.txt names"
    pairs = [row.partition("\t")[::2] for row in rows if row.strip()]
    names = [name.strip() for name, _ in pairs]
    descriptions = [
        text.strip() or CLASSES.get(name, f"an expression of {name}")
        for name, (_, text) in zip(names, pairs, strict=True)
    ]
    if len(set(names)) < max(len(names), 2) or not all(names):
        raise InputError(
            f"{tree.path}: {source} {names}; needed are two classes or more, all different, in"
            " classes.txt a line each"
        )
    if position is None:
        return names, descriptions
    plain = [" ".join(text.lower().split()) for text in descriptions]  # all that CLIP reads
    for name, text, same in zip(names, descriptions, plain, strict=True):
        fault = None
        if re.match(r"[\W_]*\d+([\W_]|$)", name):
            fault = "a number before its name"
        elif text.isdecimal():
            fault = "a number for a description"
        elif re.match(r"[-*+#•–'\"`“‘«]", name):
            fault = f"{name[0]!r} before its name"
        elif separator := re.search(r"[,;:|=]|\s-\s|\s\s+", name):
            fault = f"{separator[0]!r} in its name"
        elif plain.count(same) > 1:
            fault = f"the description of another class, {text!r:.60}"
        if fault:
            raise InputError(
                f"{tree.path}: classes.txt: class {name!r} has {fault}; expected are lines `name`,"
                " or name, tab, description, in the order of the labels"
            )
    return names, descriptions


def _class_folders(tree: _Tree) -> tuple[_Tree, list[_Line]] | None:
    """The clips of folders SPLIT/CLASS without lists and boxes, or None.

    Images that lie there are a clip of one frame each, folders below it one clip each.
    """
    files = ("train.txt", "val.txt", "test.txt", "face.json", "body.json")
    parts = {folder: folder.split("/") for folder in tree.folders}
    fits = all(len(names) > 1 and names[0].lower() in SPLITS for names in parts.values())
    if not fits or any(_position(tree, name) is not None for name in files):
        return None
    folders, lines = {}, []
    for folder, (part, label, *deeper) in parts.items():
        rows = tree.folders[folder]
        clips = {folder: rows} if deeper else {tree.names[i]: [i] for i in rows}
        folders |= clips
        lines += [_Line(clip, None, label, SPLITS[part.lower()], clip) for clip in clips]
    return tree._replace(folders=folders), lines


def _list_texts(tree: _Tree, lists: dict[str, str], notes: list[str]) -> dict[str, tuple[str, str]]:
    """The place, for messages, and the text of the list of each split."""
    if not lists:
        return {
            part: (tree.names[position], _text(tree, position))
            for part, position in _lists(tree).items()
        }
    texts = {}
    for part, file in lists.items():
        try:
            texts[part] = file, reading.decode_table(reading.read_bytes(file), file)
        except DECODE_ERRORS as error:  # UnicodeDecodeError among them
            raise InputError(f"--{part}-list {file} cannot be read: {reason(error)}") from None
    notes.append("clips are listed by " + ", ".join(f"{file} ({p})" for p, file in lists.items()))
    return texts


def _lines(path: str, name: str, text: str, part: str, needed: bool) -> list[_Line]:
    """The clips of a list.

    All lines have one form: `clip_folder num_frames label` (RAER's, DFER-CLIP's), `clip label`
    (FERV39k's and MAFW's official lists, whose labels are names), or the columns `video_name,label`
    (DFEW's official ones, whose names are numbers of five digits).

    Raises:
        InputError: a line has another form, or there is none in a list that is needed.
    """
    rows = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    header = [cell.strip().lower() for cell in rows[0][1].split(",")] if rows else []
    table = {"video_name", "label"} <= set(header)
    width = 2
    if table:
        form = "`video_name,label`"
        rows = rows[1:]
    elif rows and len(fields := rows[0][1].rsplit(maxsplit=2)) == 3 and fields[1].isdecimal():
        form, width = "`clip_folder num_frames label`", 3
    else:
        form = "`clip_folder num_frames label`, `clip label` or columns `video_name,label`"
    if needed and not rows:
        raise InputError(f"{path}: {name} lists no clips; expected are lines {form}")
    lines = []
    for number, line in rows:
        place = f"{name} line {number}"
        if table:
            cells = dict(zip(header, [cell.strip() for cell in line.split(",")], strict=False))
            fields = [cells.get("video_name", "").zfill(5), cells.get("label", "")]
        else:
            fields = line.rsplit(maxsplit=width - 1)
        numbers = fields[1:] if width == 3 or table else []
        if len(fields) < width or not all(x.isdecimal() and len(x) < 18 for x in numbers):
            raise InputError(f"{path}: {place}: {line!r:.100}, expected {form}")
        clip = str(PurePosixPath(fields[0].strip().replace("\\", "/")))
        label = int(fields[-1]) if fields[-1].isdecimal() else fields[-1]
        count = int(fields[1]) if width == 3 else None
        lines.append(_Line(clip, count, label, part, place))
    return lines


def _numbered(path: str, lines: list[_Line], names: list[str]) -> list[_Line]:
    """Lines whose labels are names, with these names' numbers, counted from 0."""
    number = {name: i for i, name in enumerate(names)}
    for line in lines:
        if line.label not in number:
            hint = did_you_mean(line.label, names)
            raise InputError(
                f"{path}: {line.place}: label {line.label}{hint}, allowed are {', '.join(names)};"
                " fix it, or name every class in classes.txt"
            )
    return [line._replace(label=number[line.label]) for line in lines]


def _check_labels(tree: _Tree, lines: list[_Line], base: int, names: list[str]) -> str:
    last = base + len(names) - 1
    other = 1 - base
    fits = all(other <= line.label < other + len(names) for line in lines)
    for line in lines:
        if not base <= line.label <= last:
            help_ = f"--label-base {other}" if fits else "name every class in classes.txt"
            raise InputError(
                f"{tree.path}: {line.place}: label {line.label}, allowed are {base} to {last}"
                f" ({', '.join(names)}); fix it, or {help_}"
            )
    numbered = ", ".join(f"{number} {name}" for number, name in enumerate(names, base))
    return f"labels are counted from {base}: {numbered}"


def _refuse_repeats(path: str, lines: list[_Line]) -> None:
    seen: dict[str, _Line] = {}
    twice = [
        (seen[line.clip], line) for line in lines if seen.setdefault(line.clip, line) is not line
    ]
    across = [pair for pair in twice if pair[0].split != pair[1].split]
    for pairs, fault in ((across, "in two splits"), (twice, "listed twice")):
        if pairs:
            examples = first_few([f"{a.clip} ({a.place}, {b.place})" for a, b in pairs])
            raise InputError(f"{path}: {len(pairs)} clips are {fault}: {examples}; fix the lists")


def _with_frames(
    tree: _Tree, lines: list[_Line], on_bad_item: str, allow_missing: float, notes: list[str]
) -> list[_Line]:
    """The lines whose clip has frames; what the lists say wrongly is refused, or noted."""
    absent = [line.clip for line in lines if line.clip not in tree.folders]
    there = [line for line in lines if line.clip in tree.folders]
    if not there:
        raise InputError(
            f"{tree.path}: none of the {len(lines)} listed clips is there: {first_few(absent)};"
            f" there are {first_few(list(tree.folders)) or 'none'}"
        )
    wrong = [
        f"{line.clip} has {len(tree.folders[line.clip])} frames, {line.place} says {line.count}"
        for line in there
        if line.count not in (None, len(tree.folders[line.clip]))
    ]
    gone = f"{len(absent)} of {len(lines)} clips have no frames: {first_few(absent)}"
    other = (
        f"{len(wrong)} of {len(lines)} clips have another number of frames than listed:"
        f" {first_few(wrong)}"
    )
    if on_bad_item == "error" and absent:
        raise InputError(
            f"{tree.path}: {gone}; complete the data, or --on-bad-item skip leaves them out"
        )
    if on_bad_item == "error" and wrong:
        raise InputError(
            f"{tree.path}: {other}; fix the lists, or --on-bad-item skip takes what is there"
        )
    if len(absent) > allow_missing * len(lines):
        raise InputError(
            f"{tree.path}: {gone}, more than --on-bad-item skip leaves out"
            f" ({100 * allow_missing:g}%); complete the data, or --allow-missing SHARE"
        )
    if absent:
        notes.append(
            f"left out {len(absent)} of {len(lines)} clips without frames: {first_few(absent)}"
        )
    if wrong:
        notes.append(other)
    return there


def _boxes(tree: _Tree, name: str) -> dict:
    """The content of a file of boxes by the clips' folders."""
    if tree.parts:
        return {
            part.full_name(clip): value
            for part in tree.parts.values()
            for clip, value in _boxes(part, name).items()
        }
    position = _position(tree, name)
    if position is None:
        return {}
    try:
        content = reading.parse_json(_content(tree, position), name)
    except InputError as error:
        raise InputError(f"{tree.path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{tree.path}: {name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{tree.path}: {name} is not an object of clip folders")
    folders = [str(PurePosixPath(clip.replace("\\", "/"))) for clip in content]
    if twice := next((clip for clip, count in Counter(folders).items() if count > 1), None):
        raise InputError(f"{tree.path}: {name}: {twice} stands twice, in two spellings; remove one")
    content = dict(zip(folders, content.values(), strict=True))
    images = _flat(content)
    if name == "face.json":
        content = _nested(content)
    has_loose = tree.num_loose or tree.alone
    loose = {folder for folder in tree.folders if is_image(folder)} if has_loose else ()
    found = _found_loosely(list(content), tree.folders.keys() - loose)
    if loose:
        rest = [key for key in images if posixpath.dirname(key) not in found]
        content = images | content
        found |= _found_loosely(rest, loose)
    if content and not found and not tree.alone:
        raise InputError(
            f"{tree.path}: {tree.names[position]}: no key is a clip's folder: the first is"
            f" {next(iter(content))}, expected is one as {next(iter(tree.folders))}"
        )
    return {found[key]: value for key, value in content.items() if key in found}


def _flat(content: dict) -> dict:
    # {"folder": {"frame.png": box}} as {"folder/frame.png": box}, beside those that are so already
    flat: dict = {}
    for key, value in content.items():
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {posixpath.join(key, file).rstrip("/"): box for file, box in nested.items()}
    return flat


def _nested(content: dict) -> dict:
    # {"clip/frame.png": box} as {"clip": {"frame.png": box}}
    nested: dict = {}
    for key, value in content.items():
        if is_image(key) and not isinstance(value, dict):
            clip, file = posixpath.split(key)
            nested.setdefault(clip, {})[file] = value
        else:
            nested[key] = value
    return nested


def _found(listed: list[str], there: Collection[str]) -> dict[str, str]:
    """The tree's folders by the names that lists call them, which may start at several roots.

    A name is never sought below another folder than its neighbors, those that begin as it does.
    """
    found: dict[str, str] = {}
    left, least = listed, 1
    while left:
        rename = renaming(left, there, least)
        used = set(found.values())
        begins = {PurePosixPath(name).parts for name in found}
        new = {}
        for name in left:
            parts, place = PurePosixPath(name).parts, rename(name)
            own = parts[: rename.skipped]
            apart = not found or not own or all(other[: rename.skipped] != own for other in begins)
            if place in there and place not in used and apart:
                new[name] = place
        if not new:
            break
        found |= new
        left, least = [name for name in left if name not in found], 2
    return found


def _found_loosely(keys: list[str], there: Collection[str], forms=()) -> dict[str, str]:
    """As `_found`, also by other forms of the names, where these are unique.

    Unset: in another case, with an extension, and by base names, but for a file of which some keys
    are as the tree has them: another folder's clip is another clip there.
    """
    found = _found(keys, there)
    for form in forms or (_plain, _base):
        if form is _base and any(_plain(key) == _plain(place) for key, place in found.items()):
            break
        of_form = defaultdict(list)
        for folder in there:
            of_form[form(folder)].append(folder)
        counts = Counter(map(form, keys))
        forms = {name: folders[0] for name, folders in of_form.items() if len(folders) == 1}
        # Of all keys: those that are found tell where the others are not to be sought.
        matched = _found([form(key) for key in keys if counts[form(key)] == 1], forms)
        taken = set(found.values())
        for key in keys:
            folder = forms.get(matched.get(form(key)))
            if key not in found and folder is not None and folder not in taken:
                found[key] = folder
    return found


def _stem(name: str) -> str:
    # A list may name a video's folder or its file, and number it with or without zeros.
    stem, extension = posixpath.splitext(name)
    folder, base = posixpath.split(stem if extension.lower() in VIDEO_SUFFIXES else name)
    return posixpath.join(folder, base.zfill(5) if base.isdecimal() else base)


def _plain(name: str) -> str:
    stem, extension = posixpath.splitext(name.lower())
    return stem if extension in (*SUFFIXES, *VIDEO_SUFFIXES) else name.lower()


def _base(name: str) -> str:
    return posixpath.basename(_plain(name))


def _box(tree: _Tree, name: str, where: str, value, box_format: str) -> list[float]:
    if value is None:
        return [math.nan] * 4
    numbers = isinstance(value, list) and len(value) == 4
    if not numbers or not all(type(x) in (int, float) and abs(x) < 1e9 for x in value):
        raise InputError(
            f"{tree.path}: {name}: {where}: {value!r:.60},"
            " expected [left, top, right, bottom] or null"
        )
    if box_format == "xywh":
        left, top, width, height = value
        return [left, top, left + width, top + height]
    return value


def _face_boxes(tree: _Tree, lines: list[_Line], box_format: str) -> dict[str, np.ndarray]:
    """(frames, 4) boxes of each clip, NaN where there is none."""
    name = "face.json"
    content = _boxes(tree, name)
    boxes = {}
    strange = None
    for line in lines:
        by_file = content.get(line.clip) or {}
        if isinstance(by_file, list) and is_image(line.clip):  # a clip of one image
            by_file = {posixpath.basename(line.clip): by_file}
        if not isinstance(by_file, dict):
            raise InputError(
                f"{tree.path}: {name}: {line.clip}: expected {{frame's file name: box}},"
                f" got {by_file!r:.60}"
            )
        files = [posixpath.basename(tree.names[i]) for i in tree.folders[line.clip]]
        if tree.videos:
            files = [file.rpartition("#")[2] for file in files]
        if by_file and not by_file.keys() & set(files):
            plain = {_plain(posixpath.basename(file)): box for file, box in by_file.items()}
            by_file = {file: plain[_plain(file)] for file in files if _plain(file) in plain}
            if not by_file:
                strange = strange or (line.clip, next(iter(content[line.clip])), files[0])
        rows = [
            _box(tree, name, f"{line.clip}/{file}", by_file.get(file), box_format) for file in files
        ]
        boxes[line.clip] = np.array(rows, np.float64)
    if strange and all(np.isnan(rows).all() for rows in boxes.values()):
        clip, file, expected = strange
        raise InputError(
            f"{tree.path}: {name}: no key is a frame's file name: the first of {clip} is {file},"
            f" expected is one as {expected}"
        )
    return boxes


def _body_boxes(tree: _Tree, lines: list[_Line], box_format: str) -> dict[str, np.ndarray]:
    """(4,) box of each clip, NaN where there is none."""
    name = "body.json"
    content = _boxes(tree, name)
    return {
        line.clip: np.array(
            _box(tree, name, line.clip, content.get(line.clip), box_format), np.float64
        )
        for line in lines
    }


def _decide_missing(
    tree: _Tree, lines, faces, bodies, missing_box: str, name_of: dict[int, str], notes: list[str]
) -> list[np.ndarray]:
    """The frames of each clip that are used, by --missing-box; counted by the class names.

    `bodies` is empty where no body is read.
    """
    without_face = {line.clip: np.isnan(faces[line.clip][:, 0]) for line in lines}
    without_body = [line.clip for line in lines if bodies and np.isnan(bodies[line.clip][0])]
    num_frames = sum(len(mask) for mask in without_face.values())
    num_missing = sum(int(mask.sum()) for mask in without_face.values())
    everything = [np.arange(len(faces[line.clip])) for line in lines]
    if not num_missing and not without_body:
        return everything
    clips = without_body or [clip for clip, mask in without_face.items() if mask.any()]
    missing = f"{num_missing} of {num_frames} frames have no face box"
    if bodies:
        missing += f", {len(without_body)} of {len(lines)} clips no body box"
    missing += f" (first: {clips[0] or tree.path})"
    gone_body = set(without_body)
    by_class = _missing_by_class(lines, without_face, gone_body, name_of)
    if by_class:
        counts = ", ".join(f"{name} {lost} of {all_}" for name, lost, all_ in by_class)
        missing += f"; frames without one of them by class: {counts}"
    files = ("face.json", "body.json") if bodies else ("face.json",)
    for part in tree.parts.values() or [tree]:
        gone = [name for name in files if _position(part, name) is None]
        missing += f"; {part.path} has no {' and no '.join(gone)}" if gone else ""
    if missing_box == "error":
        # For answers alone, without class names, a run has decided on its streams.
        alone = "; --streams face needs no body.json" if without_body and name_of else ""
        raise InputError(
            f"{tree.path}: {missing}; complete {' and '.join(files)}, or --missing-box full or"
            f" skip{alone}"
        )
    if missing_box == "full":
        notes.append(f"{missing}: the whole frame stands for it")
        for name, lost, all_ in by_class:
            others = num_frames - all_
            rest = sum(row[1] for row in by_class) - lost
            if others and lost / all_ > 0.05 and lost / all_ > 2 * rest / others:
                notes.append(
                    f"WARN {lost / all_:.0%} of the frames of {name} lack a box and"
                    f" {rest / others:.0%} of the others: that nothing is cropped becomes its label"
                )
        return everything
    kept = [
        rows[~(without_face[line.clip] | (line.clip in gone_body))]
        for line, rows in zip(lines, everything, strict=True)
    ]
    lost = sum(not len(rows) for rows in kept)
    notes.append(f"{missing}: left out, and with them {lost} whole clips")
    return kept


def _missing_by_class(lines, without_face, without_body, name_of) -> list[tuple[str, int, int]]:
    """(class, frames without a face's or a body's box, all frames) of the labeled classes."""
    lost, everything = Counter(), Counter()
    for line in lines:
        mask = without_face[line.clip] | (line.clip in without_body)
        lost[line.label] += int(mask.sum())
        everything[line.label] += len(mask)
    return [(name, lost[i], everything[i]) for i, name in name_of.items() if everything[i]]


def _refuse_degenerate(
    path: str, images: TwoStreams, read, firsts: list[int], workers: int, box_format: str
) -> None:
    """Refuse boxes that lie outside of their frame or have no area.

    Frames of a clip are taken to have the size of its first; one that differs is found when it is
    decoded.
    """

    def size(index: int) -> tuple[int, int]:
        try:
            with open_image(read(index)) as image:
                return upright_size(image)
        except DECODE_ERRORS:
            return (10**6, 10**6)  # decoding it later names the file, or skips it

    with ThreadPoolExecutor(workers) as pool:
        read_sizes = live.progress(pool.map(size, firsts), "reading frame sizes", len(firsts))
        sizes = np.array(list(read_sizes), np.float64)
    sizes = np.repeat(sizes, np.diff([*firsts, len(images)]), axis=0)
    for name, boxes in (("face.json", images.faces), ("body.json", images.bodies)):
        if boxes is None:
            continue
        inside = np.minimum(boxes[:, 2:], sizes) - np.maximum(boxes[:, :2], 0)
        bad = np.flatnonzero((inside < 1).any(1))
        other = BOX_FORMATS[box_format == "xyxy"]
        if len(bad):
            i = bad[0]
            raise InputError(
                f"{path}: {name}: {len(bad)} frames have a degenerate box (first: {images.ids[i]}:"
                f" {boxes[i].tolist()} in {sizes[i, 0]:.0f} x {sizes[i, 1]:.0f} pixels);"
                f" fix it, set it to null and let --missing-box decide, or --box-format {other}"
            )
