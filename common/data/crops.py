"""Squares around faces, cut out of videos of whole scenes by the boxes of any detector.

`python -m common.data crop-faces VIDEOS OUT --boxes JSON` writes each video as a folder of PNG
files at its own place below OUT, so that every layout stays what it is. Their numbers are those of
the frames and `frame_rates.csv` has the rates, so that clips are cut as from the video itself.

The boxes are `{video: {frame: [[x1, y1, x2, y2], ...], ...}}`: videos by their path below VIDEOS,
frames counted from 0, or the last number in the name of a frame that is an image; boxes in pixels.
The frames that are listed are written. A face that is not found in a few of them is taken to move
evenly there.
"""

import csv
import math
import re
import shutil
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from common import live, reading
from common.data.clips import RATES, open_video
from common.data.face_layouts import is_list, is_video
from common.data.images import (
    DECODE_ERRORS,
    check_pixels,
    existing,
    hidden,
    is_image,
    list_files,
    open_image,
    reason,
    upright,
)
from common.errors import InputError, first_few, plural

MARGIN = 1.3  # side of the square / larger side of the box, as in FaceForensics++'s own crops
_OVERLAP = 0.3  # least intersection over union of a face's successive boxes
_MISSES = 5  # listed frames in a row in which a face may not be found
_WINDOW = 6  # frames to each side that a square is averaged over, a quarter of a second
_AT_ONCE = 16  # frames of a video in memory

_Boxes = dict[int, np.ndarray]  # frame -> (n, 4) x1, y1, x2, y2


def crop_faces(
    source: str, target: Path, boxes: Path, *, workers: int, on_bad_item: str
) -> list[str]:
    """Write the face of each video of `source` below `target`; what is there already stays.

    Of several faces the one that covers the most is taken.

    Returns:
        Lines that say what was written, what was there, and what was left out and why.

    Raises:
        InputError: no videos, no boxes, no place to write; with `on_bad_item` "error" a video that
            cannot be read.
    """
    known = read_boxes(boxes)
    names, _, _, read = list_files(source, _is_wanted, (".mp4",))
    lists = [i for i, name in enumerate(names) if is_list(name) and not is_video(name)]
    videos = defaultdict(list)  # place below `target` -> positions of its files
    of_video = {}  # place -> the video's own name
    twice = []
    for i, name in enumerate(names):
        if i in lists:
            continue
        own = name if is_video(name) else str(PurePosixPath(name).parent)
        place = str(PurePosixPath(name).with_suffix("")) if is_video(name) else own
        if of_video.setdefault(place, own) == own:
            videos[place].append(i)
        else:
            twice.append(own)
    if not videos:
        raise InputError(f"{source}: no videos there")
    here = set(known) & {name for place, own in of_video.items() for name in (place, own)}
    if not here:
        raise InputError(
            f"{boxes}: none of its {plural(len(known), 'video')} is in {source}; boxes of"
            f" {next(iter(known), 'none')}, videos such as {next(iter(of_video.values()))}"
        )
    if target.resolve() == Path(source).resolve():
        raise InputError(f"{target}: crops lie beside no videos; give another folder")
    lock = threading.Lock()
    others = Counter()  # faces that are left out

    def crop(place: str) -> str:
        # What became of a video: "written", "already there", or why it was left out.
        folder = target / place
        if folder.is_dir():
            return "already there"
        found = known.get(of_video[place]) or known.get(place)
        if not found or not any(map(len, found.values())):
            return "without boxes"
        faces = tracks(found)
        others[place] = len(faces) - 1
        squares = smoothed(max(faces, key=_covered))
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        rate = None  # that of the frames, each of which says it
        try:
            files = {names[i]: partial(read, i) for i in videos[place]}
            for rate, stem, image, square in _frames(files, squares):  # noqa: B007
                _cut(image, square).save(part / f"{stem}.png")
        except _LeftOut as why:
            shutil.rmtree(part)
            if why.error and on_bad_item == "error":
                raise InputError(
                    f"{of_video[place]} in {source} cannot be read: {why.error}; fix or remove it,"
                    " or --on-bad-item skip"
                ) from None
            return str(why)
        with lock:
            if rate:
                _note_rate(target / RATES, place, rate)
            part.rename(folder)
        return "written"

    try:
        target.mkdir(parents=True, exist_ok=True)
        for i in lists:
            copy = target / names[i]
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(read(i))
        with ThreadPoolExecutor(workers) as pool:
            fates = list(live.progress(pool.map(crop, videos), "cropping videos", len(videos)))
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
    by_fate = defaultdict(list)
    for place, fate in zip(videos, fates, strict=True):
        by_fate[fate].append(of_video[place])
    lines = [
        f"{plural(len(by_fate.pop('written', ())), 'video')} written to {target},"
        f" {len(by_fate.pop('already there', ()))} were there already"
    ]
    by_fate["of the same name as another"] = twice
    by_fate["named in the boxes alone"] = sorted(set(known) - here)
    lines += [
        f"left out {plural(len(left), 'video')} {fate}: {first_few(left)}"
        for fate, left in sorted(by_fate.items())
        if left
    ]
    if others.total():
        several = [place for place, count in others.items() if count]
        lines.append(
            f"left out {plural(others.total(), 'face')} beside the one that covers the most, in"
            f" {plural(len(several), 'video')}: {first_few(several)}"
        )
    return lines


class _LeftOut(Exception):
    """Why a video is left out, as `left out 3 videos ...` goes on."""

    def __init__(self, why: str, error: str = ""):
        super().__init__(why)
        self.error = error


def read_boxes(path: Path) -> dict[str, _Boxes]:
    """The boxes of a JSON file by video and frame.

    Raises:
        InputError: it has another form, or a box that is none.
    """
    form = "expected {video: {frame: [[x1, y1, x2, y2], ...], ...}, ...}"
    try:
        content = reading.parse_json(reading.read_bytes(existing(str(path))), path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {reason(error)}; {form}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: {form}")
    found = {}
    for video, frames in content.items():
        if not isinstance(frames, dict):
            raise InputError(f"{path}: {video}: {form}")
        found[video] = {}
        for frame, boxes in frames.items():
            if not (frame.isascii() and frame.isdigit() and len(frame) < 10):
                raise InputError(f"{path}: {video}: {frame!r} is no number of a frame; {form}")
            found[video][int(frame)] = np.array(
                [_box(box, f"{path}: {video}: {frame}") for box in _list(boxes)], np.float64
            ).reshape(-1, 4)
    return found


def _list(value) -> list:
    return value if isinstance(value, list) else [value]


def _box(box, where: str) -> list:
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(type(x) in (int, float) and math.isfinite(x) for x in box)
        and box[0] < box[2]
        and box[1] < box[3]
    ):
        raise InputError(f"{where}: {box} is no box; expected [x1, y1, x2, y2] in pixels, x1 < x2")
    return box


def tracks(boxes: _Boxes) -> list[_Boxes]:
    """One track a face: the boxes (4,) by frame, those between filled in evenly.

    Successive boxes of a track overlap, the ones that do most first.
    """
    frames = sorted(boxes)
    found: list[_Boxes] = []
    seen: list[int] = []  # of each track, where its last box is in `frames`
    for now, frame in enumerate(frames):
        open_tracks = [t for t, last in enumerate(seen) if now - last <= _MISSES + 1]
        pairs = [
            (_overlap(found[t][frames[seen[t]]], box), -t, b)
            for t in open_tracks
            for b, box in enumerate(boxes[frame])
        ]
        left = dict(enumerate(boxes[frame]))
        for overlap, t, b in sorted(pairs, reverse=True):
            if overlap >= _OVERLAP and b in left and seen[-t] < now:
                found[-t][frame] = left.pop(b)
                seen[-t] = now
        for box in left.values():
            found.append({frame: box})
            seen.append(now)
    return [_filled(track, frames) for track in found]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    # Intersection over union.
    common = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common))


def _filled(track: _Boxes, frames: list[int]) -> _Boxes:
    known = sorted(track)
    wanted = [frame for frame in frames if known[0] <= frame <= known[-1]]
    columns = np.array([track[frame] for frame in known]).T
    filled = np.stack([np.interp(wanted, known, column) for column in columns], 1)
    return dict(zip(wanted, filled, strict=True))


def _covered(track: _Boxes) -> float:
    return sum(float((box[2:] - box[:2]).prod()) for box in track.values())


def smoothed(track: _Boxes) -> dict[int, np.ndarray]:
    """Squares (3,) x and y of the center and side by frame, MARGIN larger than the boxes.

    Each is a mean over the frames around it that weighs the near ones more.
    """
    frames = np.array(list(track))
    boxes = np.stack(list(track.values()))
    sides = MARGIN * (boxes[:, 2:] - boxes[:, :2]).max(1)
    raw = np.column_stack([(boxes[:, :2] + boxes[:, 2:]) / 2, sides])
    squares = {}
    for frame in frames:
        near = slice(*np.searchsorted(frames, [frame - _WINDOW, frame + _WINDOW + 1]))
        weights = _WINDOW + 1 - np.abs(frames[near] - frame)
        squares[int(frame)] = np.average(raw[near], 0, weights)
    return squares


def _cut(image: Image.Image, square: np.ndarray) -> Image.Image:
    """A square of an image, moved into it where it reaches beyond, and never larger than it."""
    if not (0 <= square[0] < image.width and 0 <= square[1] < image.height):
        raise _LeftOut("with boxes outside of the picture")
    side = max(1, min(round(square[2]), *image.size))
    left, top = (
        min(max(round(center - side / 2), 0), length - side)
        for center, length in zip(square[:2], image.size, strict=True)
    )
    return image.crop((left, top, left + side, top + side))


def _frames(files: dict, squares: dict) -> Iterator[tuple]:
    """The rate, the name without suffix, the image and the square of each frame.

    `files` are functions that give the content, by name.
    """
    name = next(iter(files))
    decoded = _of_file(files[name], squares) if is_video(name) else _of_images(files, squares)
    try:
        yield from decoded
    except DECODE_ERRORS as error:
        raise _LeftOut("that cannot be read", reason(error)) from None


def _of_file(read, squares: dict) -> Iterator[tuple]:
    decoder = open_video(read())
    rate, count = decoder.metadata.average_fps, len(decoder)
    if max(squares) >= count:
        raise _LeftOut("with boxes beyond the last frame")
    some = [0, count // 2, count - 1]
    shown = decoder.get_frames_at(indices=some).pts_seconds.numpy() - np.divide(some, rate)
    varies = np.ptp(shown) > 0.5 / rate
    for part in np.array_split(sorted(squares), -(-len(squares) // _AT_ONCE)):
        batch = decoder.get_frames_at(indices=part.tolist())
        for k, frame in enumerate(part.tolist()):
            image = Image.fromarray(batch.data[k].permute(1, 2, 0).numpy())
            # Of a variable rate the numbers are milliseconds.
            number = round(1000 * float(batch.pts_seconds[k])) if varies else frame
            yield 1000.0 if varies else rate, f"{number:06d}", image, squares[frame]


def _of_images(files: dict, squares: dict) -> Iterator[tuple]:
    of_number = {}
    for name in files:
        numbers = re.findall(r"\d+", PurePosixPath(name).stem)
        if numbers:
            of_number[int(numbers[-1][:18])] = name
    if not squares.keys() <= of_number.keys():
        raise _LeftOut("with boxes of frames that are not there")
    for frame, square in squares.items():
        name = of_number[frame]
        content = files[name]()
        with open_image(content) as image:
            check_pixels(image, image.size, len(content))
            yield None, PurePosixPath(name).stem, upright(image).convert("RGB"), square


def _note_rate(path: Path, place: str, rate: float) -> None:
    is_new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        if is_new:
            rows.writerow(["video", "fps"])
        rows.writerow([place, f"{rate:.10g}"])


def _is_wanted(name: str) -> bool:
    return not hidden(name) and (is_image(name) or is_video(name) or is_list(name))
