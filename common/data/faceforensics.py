"""Real and manipulated face videos in the layouts that the field publishes them in.

Layouts, each in a folder or a .zip of one:

1. FaceForensics++ (Rössler et al., arXiv:1901.08971):
   `original_sequences/SOURCE/COMPRESSION/KIND/VIDEO` and
   `manipulated_sequences/METHOD/COMPRESSION/KIND/VIDEO`, where KIND is `frames` (VIDEO is a folder
   of images) or `videos` (VIDEO is a file), and `train.json`, `val.json`, `test.json` list pairs of
   videos: each gives two real videos, A and B, and both orders of every manipulation, A_B and B_A.
2. DeepfakeBench (Yan et al., arXiv:2307.01426): its JSON
   `{set: {label: {split: {compression: {video: {label, frames}}}}}}`, the compression level missing
   for most sets, beside the frame folders that it names.
3. A CSV with the columns video_id, label (0 or real, 1 or fake) and path (a folder of images or a
   video file, from the CSV's folder), and perhaps split and method.

A video's key is (dataset, method, compression, video), so that the manipulations of one pair, whose
folders share a name, stay videos of their own. `split` refuses parts that share a person.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch

from common import reading
from common.data.clips import (
    VIDEO_SUFFIXES,
    VideoFiles,
    Videos,
    frame_images,
    natural_order,
    renaming,
)
from common.data.groups import check_column, joined, refuse_spanning
from common.data.images import (
    DECODE_ERRORS,
    SPLITS,
    SUFFIXES,
    UNLABELED,
    Images,
    below_common_folder,
    existing,
    hidden,
    is_image,
    list_files,
    reason,
    split_of_cell,
)
from common.data.sampling import TEST_SHARE, hold_out
from common.data.synthetic import face_clips
from common.errors import InputError, first_few, plural

REAL, FAKE = 0, 1
CLASSES = ["real", "fake"]
SAMPLES = {
    "sample": {"variant": "order"},
    "sample-flicker": {"variant": "flicker", "num_faces": 60, "size": 32},
}
_ROOTS = {"original_sequences": REAL, "manipulated_sequences": FAKE}
_KINDS = ("frames", "faces", "images", "videos")  # the first that is there is read
_LABELS = {"0": REAL, "real": REAL, "1": FAKE, "fake": FAKE}
_LISTS = (".csv", ".json")
_COLUMNS = ("video_id", "label", "path")
# Whose faces a video shows: FaceForensics++ (003, 003_017), its DeepFakeDetection part (01__...,
# 01_02__...), Celeb-DF (id0_0000, id0_id1_0000). Any other name stands for itself.
_PERSONS = [
    re.compile(r"(\d{3})(?:_(\d{3}))?$"),
    re.compile(r"(\d\d)(?:_(\d\d))?__"),
    re.compile(r"(id\d+)_(?:(id\d+)_)?"),
]


class _Record(NamedTuple):
    key: tuple[str, str, str, str]  # (dataset, method, compression, video)
    label: int
    split: str
    files: list[str]  # the frames in order of time, or the one video file
    missing: str = ""  # why the video cannot be used
    group: str = ""  # of a CSV's column

    @property
    def name(self) -> str:
        return "/".join(part for part in self.key if part)

    @property
    def problem(self) -> str:
        return f"{self.name} ({self.missing})"


class _Tree(NamedTuple):
    path: str  # as it was given
    # By folder of frames, or by video file without its suffix: as in `_Record.files`.
    videos: dict[str, list[str]]
    lists: dict[str, bytes]  # .csv and .json files by name


class FaceVideos(Videos):
    """Videos with label 1 for fake.

    Attributes, beside those of `Videos`:
        keys: (dataset, method, compression, video) of each; the method of a real video is its
            source.
        missing: "VIDEO (reason)" for each listed video that was left out.
        unlisted: names of the videos that are there but in no split, though others are, and were
            left out.
    """

    def __init__(
        self,
        name: str,
        records: list[_Record],
        frames,
        rates,
        images: Images,
        missing=(),
        unlisted=(),
    ):
        ids = [record.name for record in records]
        labels = [record.label for record in records]
        splits = [record.split for record in records]
        groups = [record.group for record in records] if records[0].group else None
        super().__init__(name, ids, labels, CLASSES, splits, frames, rates, images, groups)
        self.keys = [record.key for record in records]
        self.missing = list(missing)
        self.unlisted = list(unlisted)

    @property
    def methods(self) -> np.ndarray:
        """(n,) object array: the manipulation of a fake video, the source of a real one."""
        return np.array([key[1] for key in self.keys], dtype=object)

    def select(self, kept: np.ndarray) -> None:
        super().select(kept)
        self.keys = [self.keys[i] for i in kept]

    def describe(self) -> str:
        counts = sorted(Counter(self.methods[self.labels == FAKE]).items())
        fakes = ", ".join(f"{method} {count}" for method, count in counts if method)
        return super().describe() + (f"; fakes: {fakes}" if fakes else "")


def prepare(
    path: str | tuple[str, ...],
    *,
    store_size: int | None,
    on_bad_item: str,
    workers: int,
    fps: float,
    compression=None,
    labels=True,
    say=print,
) -> FaceVideos:
    """`open_videos`, decoded to `store_size` where that is given.

    What was left out and what is there goes to `say`.
    """
    videos = open_videos(
        path,
        fps=fps,
        workers=workers,
        on_bad_item=on_bad_item,
        compression=compression,
        labels=labels,
    )
    if store_size:
        videos.resize_store(store_size)
    if on_bad_item == "skip":
        videos.missing += [f"{name} (damaged)" for name in videos.drop_damaged(workers)]
        names = f": {first_few(videos.missing)}" if videos.missing else ""
        say(f"left out {plural(len(videos.missing), 'missing or damaged video')}{names}")
    if videos.unlisted:
        names = first_few(videos.unlisted)
        say(f"left out {plural(len(videos.unlisted), 'video')} that no split lists: {names}")
    say(videos.describe())
    return videos


def open_videos(
    path: str | tuple[str, ...],
    *,
    fps: float,
    workers: int,
    on_bad_item="error",
    compression=None,
    labels=True,
) -> FaceVideos:
    """The videos of a folder, a .zip or a .csv file, or of an embedded data set.

    Args:
        path: see the layouts at the top; `sample` and `sample-flicker` are embedded. Without
            `labels` also several folders, .zip and video files, in which no layout is looked for:
            their videos' names have their path before them.
        fps: frames a second of folders of images; a video file has its own, the embedded data 8.
        workers: threads that open video files.
        on_bad_item: "error" or "skip": whether a listed video that is missing or unreadable ends
            the run or is left out.
        compression: read this one alone, such as `c23`; unset: all that are there.
        labels: False takes any folders of images and any video files too, as videos without labels.

    Raises:
        InputError: missing, not readable, in none of the layouts, without the compression, or with
            missing videos.
    """
    if path in SAMPLES:
        return _sample(path)
    only = ""
    if isinstance(path, str):
        place = existing(path)
        if not place.is_dir() and place.suffix.lower() in (".csv", *VIDEO_SUFFIXES):
            only = place.name
            place = place.parent
        files, sizes, keys, read = list_files(str(place), _is_wanted, (".csv", *VIDEO_SUFFIXES))
        names = files
        if not only:
            names = ["/".join(parts) for parts in below_common_folder(files, _ROOTS.__contains__)]
        number = {name: i for i, name in enumerate(names)}
        listed = [name for name in names if _may_be_list(name) and only in ("", name)]
        lists = {name: _content(path, name, read, number[name]) for name in listed}
        records, unlisted = _records(
            _Tree(path, _videos(names, labels), lists), only, place, labels
        )
        title = place.name
    else:
        names, sizes, keys, read = list_files(path, _is_shown, VIDEO_SUFFIXES)
        number = {name: i for i, name in enumerate(names)}
        records, unlisted = _unlabeled(_videos(names, labels, whole=True), ""), []
        path = title = first_few(path)
    if labels and any(record.split for record in records):
        unlisted += [record.name for record in records if not record.split]
        records = [record for record in records if record.split]
    if compression is not None:
        there = sorted({record.key[2] for record in records})
        records = [record for record in records if record.key[2] == compression]
        if not records:
            raise InputError(
                f"{path}: no videos with compression {compression!r}, there are {there}"
            )
    listed = Counter((record.name, record.split) for record in records)
    twice = [name for (name, _), count in listed.items() if count > 1]
    if twice:
        raise InputError(
            f"{path}: {len(twice)} videos are listed twice: {first_few(twice)};"
            " give each a name of its own"
        )

    kinds = {_is_video(record.files[0]) for record in records if not record.missing}
    if len(kinds) == 2:
        raise InputError(f"{path}: folders of frames and video files in one data set; use either")
    used = [record for record in records if not record.missing]
    if not used:
        problems = [record.problem for record in records]
        names = f": {first_few(problems)}" if problems else ""
        raise InputError(f"{path}: no videos there{names}")
    used_files = list(dict.fromkeys(name for record in used for name in record.files))
    order = {name: i for i, name in enumerate(used_files)}
    position = [number[name] for name in used_files]
    used_sizes = [sizes[i] for i in position]
    used_keys = [keys[i] for i in position]

    def content(index: int) -> bytes:
        return read(position[index])

    rates = fps
    if kinds == {True}:
        images = VideoFiles(title, used_files, used_sizes, content, workers, used_keys)
        errors = {used_files[i]: error for i, error in images.errors.items()}
        records = [
            record if record.missing else record._replace(missing=errors.get(record.files[0], ""))
            for record in records
        ]
        used = [record for record in records if not record.missing]
        frames = [images.file_frames(order[record.files[0]]) for record in used]
        rates = [images.rates[order[record.files[0]]] for record in used]
    else:
        images = frame_images(title, used_files, used_sizes, content, used_keys)
        frames = [[order[name] for name in record.files] for record in used]
    missing = [record.problem for record in records if record.missing]
    if missing and on_bad_item == "error":
        raise InputError(
            f"{path}: {len(missing)} of {len(records)} listed videos cannot be used:"
            f" {first_few(missing)}; complete the data, or --on-bad-item skip"
        )
    return FaceVideos(title, used, frames, rates, images, missing, unlisted)


def split(videos: FaceVideos, names=("train", "val", "test")) -> dict[str, np.ndarray]:
    """The indices of the parts `names`.

    They are the data's own, or 15 % each for validation and test where it has none. Parts are held
    out by person, in the closure of the pairs: whoever appears with somebody in one video is on his
    side. They are stratified by what a group holds and depend on the videos' names and splits
    alone, so a part is the same whichever others are asked for. The videos' `groups` join persons,
    too, and then a part's share is one of the videos.

    Raises:
        InputError: two of the parts share a person or a group, or a part lacks real or fake videos.
    """
    persons = [[f"{key[0]}/{person}" for person in identities(key[3])] for key in videos.keys]
    parts = {name: np.flatnonzero(videos.splits == name) for name in ("train", "val", "test")}
    asked = {name: parts[name] for name in names}
    refuse_spanning(videos, persons, asked, "person", lambda name: name.split("/", 1)[1])
    if videos.groups is not None:
        refuse_spanning(videos, videos.groups[:, None], asked)
        persons = [[*who, f"//{group}"] for who, group in zip(persons, videos.groups, strict=True)]
    labeled = videos.labels != UNLABELED
    pool = parts["train"] if any(map(len, parts.values())) else np.flatnonzero(labeled)
    for name, share in (("test", TEST_SHARE), ("val", TEST_SHARE / (1 - TEST_SHARE))):
        if not len(parts[name]):
            parts[name] = _hold_out_persons(videos, persons, pool, share, name)
            pool = np.setdiff1d(pool, parts[name])
    parts["train"] = pool
    parts = {name: parts[name] for name in names}
    for name, indices in parts.items():
        counts = np.bincount(videos.labels[indices][labeled[indices]], minlength=2)
        if not counts.all():
            raise InputError(
                f"{videos.name}: {name} has {counts[REAL]} real and {counts[FAKE]} fake videos;"
                " both are needed"
            )
    return parts


def identities(video: str) -> tuple[str, ...]:
    """The persons in a video, as its name tells them.

    `003_017` is the face 003 manipulated with 017's.
    """
    for pattern in _PERSONS:
        if match := pattern.match(video):
            return tuple(person for person in match.groups() if person)
    return (video,)


def _hold_out_persons(
    videos: FaceVideos, persons, pool: np.ndarray, share: float, salt: str
) -> np.ndarray:
    # A group is known by its first person, whatever the order of the videos.
    group_of = np.array(joined([persons[index] for index in pool]), dtype=object)
    kinds = [(int(videos.labels[i]), videos.keys[i][1]) for i in pool]  # label and method
    if videos.groups is not None:
        labels = _numbers(kinds)
        return pool[hold_out([], labels, np.arange(len(pool)), share, salt, group_of)]
    kinds_of = defaultdict(set)
    for group, kind in zip(group_of, kinds, strict=True):
        kinds_of[group].add(kind)
    names = list(kinds_of)
    # What a group holds is its stratum.
    labels = _numbers([tuple(sorted(kinds_of[name])) for name in names])
    chosen = {names[i] for i in hold_out(names, labels, np.arange(len(names)), share, salt)}
    return pool[[group in chosen for group in group_of]]


def _numbers(values: list) -> np.ndarray:
    number = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([number[value] for value in values], np.int64)


def _sample(path: str) -> FaceVideos:
    clips = face_clips(**SAMPLES[path])
    records = []
    for name, part in zip(clips.names, clips.splits, strict=True):
        fake = "_" in name
        method = SAMPLES[path]["variant"] if fake else "generated"
        records.append(_Record((path, method, "", name), FAKE if fake else REAL, part, []))
    ids = [f"{i:06d}" for i in range(len(clips.pixels))]
    pixels = torch.from_numpy(clips.pixels)
    images = Images(path, ids, [UNLABELED] * len(ids), [], [""] * len(ids), pixels=pixels)
    return FaceVideos(f"{path} (embedded, generated)", records, clips.frames, clips.rate, images)


def _content(path: str, name: str, read, position: int) -> bytes:
    try:
        return read(position)
    except DECODE_ERRORS as error:
        raise InputError(f"{path}: {name} cannot be read: {reason(error)}") from None


def _is_wanted(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, *VIDEO_SUFFIXES, *_LISTS)) and not hidden(name)


def _is_shown(name: str) -> bool:
    return is_image(name) or (_is_video(name) and not hidden(name))


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


def _may_be_list(name: str) -> bool:
    # Beside the videos, not one of the files that tools leave in every video's folder.
    parts = PurePosixPath(name).parts
    near = len(parts) <= 3 and not _ROOTS.keys() & set(parts)
    return near and name.lower().endswith(_LISTS)


def _videos(names: list[str], labels: bool, whole: bool = False) -> dict[str, list[str]]:
    # As in `_Tree`; files by their `whole` names where these were given.
    videos = defaultdict(list)
    for name in names:
        if name.lower().endswith(SUFFIXES):  # none is hidden, but for what was given
            videos[name.rpartition("/")[0]].append(name)
    for files in videos.values():
        files.sort(key=natural_order)
    for name in filter(_is_video, names):
        stem = name if whole else str(PurePosixPath(name).with_suffix(""))
        # Lists name a video without its suffix, so with labels the first alone is one.
        videos.setdefault(stem if labels or stem not in videos else name, [name])
    return dict(videos)


def _records(tree: _Tree, only: str, place: Path, labels: bool) -> tuple[list[_Record], list[str]]:
    """The videos by the first layout that fits, and the names of those that no split lists."""
    if only and _is_video(only):
        return [_Record(("", "", "", Path(only).stem), UNLABELED, "", [only])], []
    tables = [name for name in tree.lists if name.lower().endswith(".csv") and only in ("", name)]
    if only or (tables and not _official(tree)):
        records = [record for name in tables for record in _from_csv(tree, name, place)]
        check_column(tree.path, [record.group for record in records], [r.name for r in records])
        return records, []
    jsons = {name: _parsed(tree, name) for name in tree.lists if name.lower().endswith(".json")}
    benches = {name: content for name, content in jsons.items() if _is_bench(content)}
    if benches:
        return [record for content in benches.values() for record in _from_bench(tree, content)], []
    if _official(tree):
        return _from_official(tree, {name: jsons[name] for name in jsons if _split_of(name)})
    if not labels:
        return _unlabeled(tree.videos, place.stem), []
    raise InputError(
        f"{tree.path}: no known layout there; allowed are FaceForensics++ (original_sequences/ and"
        " manipulated_sequences/), DeepfakeBench (its JSON beside the frames), a .csv with"
        f" {','.join(_COLUMNS)}"
    )


def _unlabeled(videos: dict[str, list[str]], top: str) -> list[_Record]:
    # `top` is the name of the one whose frames lie in no folder.
    return [
        _Record(("", "", "", name or top), UNLABELED, "", videos[name])
        for name in sorted(videos, key=natural_order)
    ]


class _OfficialVideo(NamedTuple):
    dataset: str
    root: str  # a key of _ROOTS
    method: str
    compression: str
    kind: str  # one of _KINDS
    video: str
    name: str  # a key of `_Tree.videos`


def _official(tree: _Tree) -> list[_OfficialVideo]:
    """The videos that lie in the official layout."""
    videos = []
    for name in tree.videos:
        parts = PurePosixPath(name).parts
        root = next((i for i, part in enumerate(parts) if part in _ROOTS), None)
        if root is not None and len(parts) == root + 5 and parts[root + 2] != "masks":
            dataset = "/".join(parts[:root]) or "FaceForensics++"
            videos.append(_OfficialVideo(dataset, *parts[root:], name))
    return videos


def _split_of(name: str) -> str:
    return SPLITS.get(PurePosixPath(name).stem.lower(), "")


def _from_official(tree: _Tree, lists: dict) -> tuple[list[_Record], list[str]]:
    official = _official(tree)
    there = {entry.kind for entry in official}
    kind = next((kind for kind in _KINDS if kind in there), None)
    if kind is None:
        raise InputError(
            f"{tree.path}: below a compression are {', '.join(sorted(there))};"
            f" allowed are {', '.join(_KINDS)}"
        )
    groups = defaultdict(dict)
    for entry in official:
        if entry.kind == kind:
            group = entry.dataset, entry.root, entry.method, entry.compression
            groups[group][entry.video] = tree.videos[entry.name]
    split_of = _official_splits(tree, lists)
    records = []
    unlisted = []
    for (dataset, root, method, compression), videos in sorted(groups.items()):
        # A source that the lists do not speak of at all, such as `actors`, is missing nothing.
        listed = split_of[root] if videos.keys() & split_of[root].keys() else {}
        for video in sorted(videos.keys() | listed.keys(), key=natural_order):
            key = (dataset, method, compression, video)
            files = videos.get(video, [])
            missing = "" if files else f"no {kind}"
            record = _Record(key, _ROOTS[root], listed.get(video, ""), files, missing)
            if lists and video not in listed:
                unlisted.append(record.name)
            else:
                records.append(record)
    return records, unlisted


def _official_splits(tree: _Tree, lists: dict) -> dict[str, dict[str, str]]:
    """The splits of the videos below each of _ROOTS, by name."""
    split_of: dict[str, dict[str, str]] = {root: {} for root in _ROOTS}
    for name, pairs in lists.items():
        if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
            raise InputError(
                f'{tree.path}: {name} is not a list of pairs of videos such as ["000", "003"]'
            )
        part = _split_of(name)
        for a, b in pairs:
            for root, video in (
                ("original_sequences", a),
                ("original_sequences", b),
                ("manipulated_sequences", f"{a}_{b}"),
                ("manipulated_sequences", f"{b}_{a}"),
            ):
                first = split_of[root].setdefault(video, part)
                if first != part:
                    raise InputError(
                        f"{tree.path}: {video} is in two splits, {first} and {part}; fix them"
                    )
    return split_of


def _is_pair(pair) -> bool:
    return (
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(video, str) for video in pair)
    )


def _parsed(tree: _Tree, name: str):
    try:
        return reading.parse_json(tree.lists[name], name)
    except InputError as error:
        raise InputError(f"{tree.path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{tree.path}: {name} is not JSON: {error}") from None


def _is_bench(content) -> bool:
    def inner(value):
        return next(iter(value.values()), None) if isinstance(value, dict) else None

    by_split = inner(inner(content))
    if not isinstance(by_split, dict) or not by_split:
        return False
    return all(name.lower() in SPLITS for name in by_split)


def _from_bench(tree: _Tree, content: dict) -> list[_Record]:
    listed = []
    for dataset, label, part, compression, video, entry in _bench_entries(tree, content):
        names = entry.get("frames") if isinstance(entry, dict) else None
        listed_well = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not listed_well or part.lower() not in SPLITS:
            raise InputError(
                f"{tree.path}: {dataset}/{label}/{part}/{video}: expected a split (train, val,"
                " test) and a video with its frames"
            )
        # Some of the published lists have Windows' separators, and frames in no order.
        files = sorted((name.replace("\\", "/") for name in names), key=natural_order)
        key = (dataset, label, compression, PurePosixPath(video.replace("\\", "/")).name)
        real = "real" in str(entry.get("label", label)).lower()
        listed.append(_Record(key, REAL if real else FAKE, SPLITS[part.lower()], files))
    there = {name for files in tree.videos.values() for name in files}
    rename = renaming([record.files[0] for record in listed if record.files], there)
    records = []
    for record in listed:
        files = [name for name in map(rename, record.files) if name in there]
        complete = files and len(files) == len(record.files)
        missing = "" if complete else f"{len(files)} of {len(record.files)} frames"
        records.append(record._replace(files=files, missing=missing))
    return records


def _bench_entries(tree: _Tree, content: dict) -> Iterator[tuple]:
    """(dataset, label, split, compression, video, what the list says of it) of every video."""

    def table(value, *where: str) -> dict:
        if not isinstance(value, dict):
            raise InputError(f"{tree.path}: {'/'.join(where)}: expected a table of videos")
        return value

    for dataset, by_label in content.items():
        for label, by_split in table(by_label, dataset).items():
            for part, videos in table(by_split, dataset, label).items():
                videos = table(videos, dataset, label, part)
                flat = all("frames" in table(v, dataset, label, part) for v in videos.values())
                by_compression = {"": videos} if flat else videos
                for compression, entries in by_compression.items():
                    for video, entry in table(entries, dataset, label, part).items():
                        yield dataset, label, part, compression, video, entry


def _from_csv(tree: _Tree, name: str, place: Path) -> list[_Record]:
    what = f"{tree.path}: {name}"
    rows = reading.csv_rows(tree.lists[name], what, _COLUMNS)
    records = []
    for line, row in rows:
        label = _LABELS.get(row["label"].lower())
        if label is None:
            raise InputError(
                f"{what} line {line}: label {row['label']!r}, allowed are {', '.join(_LABELS)}"
            )
        part = split_of_cell(row.get("split", ""), f"{what} line {line}")
        files = tree.videos.get(_within(row["path"], name, place), [])
        key = (PurePosixPath(name).stem, row.get("method", ""), "", row["video_id"])
        missing = "" if files else f"nothing at {row['path']}"
        records.append(_Record(key, label, part, files, missing, row.get("group", "")))
    return records


def _within(path: str, table: str, place: Path) -> str:
    """A CSV's path as the name of a video in the tree.

    The path is relative to the CSV's folder, or absolute below the data's.
    """
    given = PurePosixPath(path.replace("\\", "/"))
    if given.is_absolute():
        root = PurePosixPath(place.resolve())
        given = given.relative_to(root) if given.is_relative_to(root) else given
    else:
        given = PurePosixPath(table).parent / given
    parts: list[str] = []
    for part in given.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    name = "/".join(parts)
    return str(PurePosixPath(name).with_suffix("")) if _is_video(name) else name
