"""Real and manipulated face videos, in the layouts of `common.data.face_layouts` or embedded.

A video's key is (dataset, method, compression, video), so that the manipulations of one pair, whose
folders share a name, stay videos of their own. `split` refuses parts that share a person.
"""

import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from common import reading
from common.data import face_layouts
from common.data.clips import (
    RATES,
    VIDEO_SUFFIXES,
    VideoFiles,
    Videos,
    frame_images,
    natural_order,
)
from common.data.face_layouts import FAKE, REAL, Record, Tree, identities, is_list, is_video
from common.data.groups import joined, refuse_spanning
from common.data.images import (
    DECODE_ERRORS,
    SUFFIXES,
    UNLABELED,
    Images,
    below_common_folder,
    existing,
    hidden,
    is_image,
    list_files,
    open_image,
    reason,
)
from common.data.pack import SUFFIX, PackedImages, pack
from common.data.sampling import TEST_SHARE, hold_out
from common.data.synthetic import face_clips
from common.errors import InputError, first_few, plural

CLASSES = ["real", "fake"]
SAMPLES = {
    "sample": {"variant": "order"},
    "sample-flicker": {"variant": "flicker", "num_faces": 60, "size": 32},
}
FACES = ("largest", "first")
_SCENE = 1.3  # a picture's sides are 4 : 3 or wider, a face's crop is about square
_MOST_FACES = 10  # of a frame, so that its second number can be a face's


class FaceVideos(Videos):
    """Videos with label 1 for fake.

    Attributes, beside those of `Videos`:
        keys: (dataset, method, compression, video) of each; the method of a real video is its
            source.
        missing: "VIDEO (reason)" for each listed video that was left out.
        persons: the persons in each, with their data set's name; empty where the name tells none.
        unlisted: names of the videos that are there but in no split, though others are, and were
            left out.
        notes: what else is to be said of the reading.
    """

    def __init__(
        self,
        name: str,
        records: list[Record],
        frames,
        rates,
        images: Images,
        missing=(),
        unlisted=(),
        notes=(),
        times=None,
    ):
        ids = [record.name for record in records]
        labels = [record.label for record in records]
        splits = [record.split for record in records]
        groups = [record.group for record in records] if records[0].group else None
        super().__init__(name, ids, labels, CLASSES, splits, frames, rates, images, groups, times)
        self.keys = [record.key for record in records]
        self.persons = [record.persons for record in records]
        self.missing = list(missing)
        self.unlisted = list(unlisted)
        self.notes = list(notes)

    @property
    def methods(self) -> np.ndarray:
        """(n,) object array: the manipulation of a fake video, the source of a real one."""
        return np.array([key[1] for key in self.keys], dtype=object)

    def select(self, kept: np.ndarray) -> None:
        super().select(kept)
        self.keys = [self.keys[i] for i in kept]
        self.persons = [self.persons[i] for i in kept]

    def drop_damaged_frames(self, workers: int, cap: float = 0.01) -> list[str]:
        """Leave out the frames that cannot be decoded, and videos of which none can; clips are cut
        by the time of those that are left. Returns "VIDEO (2 of 10 frames damaged)" of each.

        Raises:
            InputError: more than the share `cap` of the frames is damaged.
        """
        lost = []
        masks = self.damaged_frames(workers)
        for i, bad in enumerate(masks):
            if bad.any():
                lost.append(f"{self.ids[i]} ({bad.sum()} of {len(bad)} frames damaged)")
                times = self.times[i]
                times = np.arange(len(bad)) / self.rates[i] if times is None else times
                times = times[~bad]
                self.frames[i], self.times[i] = self.frames[i][~bad], times - times[:1]
        every = np.concatenate(masks)
        if every.mean() > cap:
            raise InputError(
                f"{self.name}: {every.sum()} of {len(every)} frames are damaged (first: {lost[0]}),"
                f" more than --on-bad-item skip allows ({cap:.0%}); repair them or take them away"
            )
        self.lengths = np.array([len(frames) for frames in self.frames], np.int64)
        self.select(np.flatnonzero(self.lengths))
        return lost

    def units(self, indices: np.ndarray) -> np.ndarray:
        """(n,) names of what is drawn independently: videos `indices` with a name in common show
        the same persons.

        They are joined in the closure of the pairs; where that joins more than half of the videos,
        as in Celeb-DF, only videos of the same persons are: the manipulations of one pair.
        """
        names = [self.known_persons(i) for i in indices]
        closure = joined(names)
        if max(Counter(closure).values()) > len(closure) / 2:
            closure = [" ".join(sorted(who)) for who in names]
        return np.array(closure, dtype=object)

    def known_persons(self, index: int) -> list[str]:
        """The persons in a video; itself where its name tells none."""
        dataset, *_, video = self.keys[index]
        return list(self.persons[index]) or [f"{dataset}/{video}"]

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
    say=print,
    **options,
) -> FaceVideos:
    """`open_videos`, which gets the `options` too, decoded to `store_size` where that is given.

    What was left out and what is there goes to `say`.
    """
    videos = open_videos(path, workers=workers, on_bad_item=on_bad_item, **options)
    if store_size:
        videos.resize_store(store_size)
    if on_bad_item == "skip":
        before = int(videos.lengths.sum())
        names = f": {first_few(videos.missing)}" if videos.missing else ""
        say(f"left out {plural(len(videos.missing), 'missing or damaged video')}{names}")
        lost = videos.drop_damaged_frames(workers)
        names = f": {first_few(lost)}" if lost else ""
        say(f"left out {plural(before - int(videos.lengths.sum()), 'damaged frame')}{names}")
        videos.missing += lost
    if videos.unlisted:
        names = first_few(videos.unlisted)
        say(f"left out {plural(len(videos.unlisted), 'video')} that no split lists: {names}")
    for note in videos.notes:
        say(note)
    say(videos.describe())
    if videos.images.aspect > _SCENE:
        say(
            f"WARN {videos.name}: frames of {videos.images.aspect:.2g} : 1, as whole scenes have:"
            " the central square alone is read, and a face beside it is lost; python -m common.data"
            " crop-faces cuts faces out"
        )
    return videos


def open_videos(
    path: str | tuple[str, ...],
    *,
    workers: int,
    fps: float = 25.0,
    on_bad_item="error",
    compression: str | None = None,
    preferred: str | None = None,
    labels=True,
    frames_root: str | None = None,
    face: str = FACES[0],
) -> FaceVideos:
    """The videos of a folder, a .zip, a .csv or a .json file, or of an embedded data set.

    Args:
        path: see `face_layouts`; `sample` and `sample-flicker` are embedded. Without `labels` also
            several folders, .zip and video files, in which no layout is looked for: their videos'
            names have their path before them.
        workers: threads that open video files.
        fps: frames a second of folders of images, whose numbers count the video's frames; a video
            file has its own, the embedded data 8.
        on_bad_item: "error" or "skip": whether a listed video that is missing or unreadable ends
            the run or is left out.
        compression: read this one alone, such as `c23`; unset or "all": all that are there.
        preferred: the compression that is read where `compression` is unset and it is there.
        labels: False takes any folders of images and any video files too, as videos without labels.
        frames_root: the folder or .zip of the frames that a .json or .csv file lists; unset: where
            it lies.
        face: which of several faces of a frame is taken, one of FACES.

    Raises:
        InputError: missing, not readable, in none of the layouts, without the compression, or with
            missing videos.
    """
    if path in SAMPLES:
        return _sample(path)
    notes = []
    if isinstance(path, str):
        given = existing(path)
        if given.suffix == SUFFIX and not given.is_dir():
            return _packed(path, compression, preferred)
        is_file = not given.is_dir()
        is_table = is_file and given.suffix.lower() in (".csv", ".json")
        only = given.name if is_table or (is_file and is_video(given.name)) else ""
        if frames_root is not None and not is_table:
            raise InputError(f"--frames-root: {path} lists no frames; leave it out")
        place = existing(frames_root) if frames_root is not None else given
        place = given.parent if only and frames_root is None else place
        files, sizes, keys, read = list_files(
            str(place), _is_wanted, (".csv", ".json", SUFFIX, *VIDEO_SUFFIXES)
        )
        names = files
        if not only:
            names = ["/".join(p) for p in below_common_folder(files, face_layouts.stays)]
        number = {name: i for i, name in enumerate(names)}
        if is_table:
            lists = {only: _content(path, only, lambda _: reading.read_bytes(given), 0)}
        else:
            listed = [name for name in names if is_list(name) and not only and not _is_rates(name)]
            lists = {name: _content(path, name, read, number[name]) for name in listed}
        there, behind = _videos(names, labels)
        records, unlisted, notes = face_layouts.find(Tree(path, there, lists, place, only), labels)
        if behind and not only:
            notes.append(
                f"passed over {plural(len(behind), 'video file')} beside folders or files of the"
                f" same name: {first_few(behind)}"
            )
        title = given.name
    else:
        names, sizes, keys, read = list_files(path, _is_shown, VIDEO_SUFFIXES)
        number = {name: i for i, name in enumerate(names)}
        there, _ = _videos(names, labels, whole=True)
        records, unlisted = face_layouts.unlabeled(there, ""), []
        path = title = first_few(path)
    if labels and any(record.split for record in records):
        unlisted += [record.name for record in records if not record.split]
        records = [record for record in records if record.split]
    levels = {record.key[2] for record in records}
    chosen, more = _chosen_levels(path, levels, compression, preferred)
    notes += more
    records = [record for record in records if record.key[2] in chosen]
    _refuse_repeats(path, records)

    kinds = {is_video(record.files[0]) for record in records if not record.missing}
    if len(kinds) == 2:
        firsts = {is_video(r.files[0]): r.files[0] for r in records if not r.missing}
        raise InputError(
            f"{path}: images ({firsts[False]}) and video files ({firsts[True]}) in one data set;"
            " use either"
        )
    used = [record for record in records if not record.missing]
    if not used:
        problems = [record.problem for record in records]
        names = f": {first_few(problems)}" if problems else ""
        raise InputError(f"{path}: no videos there{names}")
    times = None
    if kinds == {False}:
        tables = {n: _content(path, n, read, number[n]) for n in filter(_is_rates, names)}
        own = _own_rates(path, tables)
        used, times, rates, more = _ordered_frames(used, fps, own, face, lambda n: read(number[n]))
        notes += more
    used_files = list(dict.fromkeys(name for record in used for name in record.files))
    order = {name: i for i, name in enumerate(used_files)}
    position = [number[name] for name in used_files]
    used_sizes = [sizes[i] for i in position]
    used_keys = [keys[i] for i in position]

    def content(index: int) -> bytes:
        return read(position[index])

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
    return FaceVideos(title, used, frames, rates, images, missing, unlisted, notes, times)


def _chosen_levels(path: str, levels: set[str], compression: str | None, preferred: str | None):
    """The compressions of `levels` that are read, see `open_videos`, and what is to be said."""
    levels = sorted(levels)
    if compression is None and preferred not in (None, "all"):
        if preferred in levels:
            return [preferred], []
        there = f" ({', '.join(levels)})" if any(levels) else ""
        note = f"no videos with compression {preferred}, as in training: all are read{there}"
        return levels, [note]
    if compression in (None, "all"):
        return levels, []
    if compression not in levels:
        there = ", ".join(filter(None, levels)) or "none; leave it out"
        raise InputError(
            f"{path}: no videos with compression {compression!r}; levels named there: {there}"
        )
    return [compression], []


def pack_videos(videos: FaceVideos, path: Path, *, default_size: int, workers: int) -> None:
    """Write videos to a packed file, from which `open_videos` reads the same ones.

    `default_size` is as of `pack`.

    Raises:
        InputError: a frame is damaged, or the file cannot be written.
    """
    images = videos.images
    rows = np.concatenate(videos.frames)
    files = isinstance(images, VideoFiles)
    entries = []
    for i, frames in enumerate(videos.frames):
        sizes = images.sizes[images.files_of(frames[:1]) if files else frames]
        times = videos.times[i]
        entries.append(
            {
                "key": list(videos.keys[i]),
                "label": int(videos.labels[i]),
                "split": videos.splits[i],
                "group": "" if videos.groups is None else videos.groups[i],
                "persons": list(videos.persons[i]),
                "length": len(frames),
                "sizes": sizes.tolist(),
                "rate": float(videos.rates[i]),
                "times": None if times is None else times.tolist(),
            }
        )
    pack(
        images,
        path,
        default_size=default_size,
        left_out=videos.missing if len(rows) < len(images) else (),  # damaged, not absent
        workers=workers,
        videos=entries,
        rows=rows,
    )


def _packed(path: str, compression: str | None, preferred: str | None) -> FaceVideos:
    images = PackedImages(Path(path))
    if images.videos is None:
        raise InputError(f"{path} holds images, no videos; pack them with --clips")
    levels = {video["key"][2] for video in images.videos}
    chosen, notes = _chosen_levels(path, levels, compression, preferred)
    kept = np.array([video["key"][2] in chosen for video in images.videos])
    videos = [video for video, is_kept in zip(images.videos, kept, strict=True) if is_kept]
    if not kept.all():
        lengths = [video["length"] for video in images.videos]
        sizes = [size for video in videos for size in video["sizes"]]
        images.keep(np.flatnonzero(np.repeat(kept, lengths)), sizes)
    records = [
        Record(
            tuple(video["key"]),
            video["label"],
            video["split"],
            [],
            group=video["group"],
            persons=tuple(video["persons"]),
        )
        for video in videos
    ]
    ends = np.cumsum([video["length"] for video in videos])
    frames = np.split(np.arange(ends[-1]), ends[:-1])
    rates = [video["rate"] for video in videos]
    times = [video["times"] and np.array(video["times"], np.float64) for video in videos]
    return FaceVideos(images.name, records, frames, rates, images, notes=notes, times=times)


def _refuse_repeats(path: str, records: list[Record]) -> None:
    labels = defaultdict(list)
    for record in records:
        labels[record.name, record.split].append(CLASSES[record.label])
    twice = [f"{name} ({', '.join(of)})" for (name, _), of in labels.items() if of[1:]]
    if twice:
        raise InputError(
            f"{path}: {plural(len(twice), 'video')} listed more than once: {first_few(twice)};"
            " list each once, under a name of its own"
        )
    named = defaultdict(list)  # a video's first file -> the names that it goes by
    for record in records:
        if record.files:
            split = f" in {record.split}" if record.split else ""
            named[record.files[0]].append(f"{record.name} ({CLASSES[record.label]}{split})")
    repeated = [f"{file} as {' and '.join(names)}" for file, names in named.items() if names[1:]]
    if repeated:
        raise InputError(
            f"{path}: {plural(len(repeated), 'video')} listed more than once:"
            f" {first_few(repeated)}; list each once"
        )


def _is_rates(name: str) -> bool:
    return PurePosixPath(name).name == RATES


def _own_rates(path: str, lists: dict[str, bytes]) -> dict[str, float]:
    """The frames a second of folders of frames, by their names, as files named RATES say."""
    rates = {}
    for name, data in lists.items():
        what = f"{path}: {name}"
        for line, row in reading.csv_rows(data, what, ("video", "fps")):
            try:
                rate = float(row["fps"])
            except ValueError:
                rate = 0.0
            if not 0 < rate < 1e6:
                raise InputError(f"{what} line {line}: fps {row['fps']!r} is no rate")
            rates[str(PurePosixPath(name).parent / row["video"])] = rate
    return rates


def _ordered_frames(used: list[Record], fps: float, own_rates: dict, face: str, read) -> tuple:
    """The videos with one face a frame, the times of frames that are not evenly apart (None where
    all are), the rates, and what is to be said. The numbers of frames count at `fps`, or where
    `own_rates` has a folder's at that."""
    chosen, times, rates = [], [], []
    faced, gaps, steps, known, unclear = [], [], [], [], []
    for record in used:
        own = own_rates.get(record.files[0].rpartition("/")[0])
        base = own or fps
        known += [record.name] * (own is not None)
        files, (numbers, is_clear) = record.files, _numbers_of(record.files)
        unclear += [record.name] * (not is_clear)
        if numbers is not None and len(set(numbers)) < len(numbers):
            faced.append(record.name)
            files, numbers = _one_face(files, numbers, face, read)
        rate, when = base, None
        if numbers is not None and len(numbers) > 1:
            apart = np.diff(numbers)
            if apart.min() == apart.max():
                rate = base / int(apart[0])
                if apart[0] > 1 and own is None:
                    steps.append(int(apart[0]))
            else:
                gaps.append(record.name)
                when = (np.array(numbers, np.float64) - numbers[0]) / base
                rate = base * len(apart) / float(numbers[-1] - numbers[0])
        chosen.append(record._replace(files=files))
        times.append(when)
        rates.append(rate)
    notes = []
    rate_of = "their rates" if known else f"--fps {fps:g}"
    if faced:
        notes.append(
            f"WARN {plural(len(faced), 'video')} with frames of several faces: {first_few(faced)};"
            f" the {face} one of each is taken (--face {'|'.join(FACES)}), whoever's it is"
        )
    if unclear:
        notes.append(
            f"WARN {plural(len(unclear), 'video')} with frames whose numbers do not rise:"
            f" {first_few(unclear)}; they are taken in the order of their names, evenly apart"
        )
    if steps:
        low, high = min(steps), max(steps)
        every = f"{low}" if low == high else f"{low} to {high}"
        left = f"{fps / high:g}" if low == high else f"{fps / high:g} to {fps / low:g}"
        notes.append(
            f"{plural(len(steps), 'video')} with one of {every} frames, as their numbers say:"
            f" {left} of --fps {fps:g} frames a second are there"
        )
    if known:
        notes.append(f"{RATES} has the rates of {plural(len(known), 'video')}: --fps is not theirs")
    if gaps:
        notes.append(
            f"{plural(len(gaps), 'video')} with gaps in the frames' numbers:"
            f" {first_few(gaps)}; clips are cut by the time that the numbers give at {rate_of}"
        )
    return chosen, times if gaps else None, rates, notes


def _numbers_of(files: list[str]) -> tuple[list[int] | None, bool]:
    """The numbers of a video's frames, and whether there is no doubt of them: the last in each
    file's name or, where that counts faces, the one before. They rise, but where each face has all
    of its frames together. None where there are none, or they tell no order."""
    found = [re.findall(r"\d+", PurePosixPath(name).stem) for name in files]
    if not all(found):
        return None, True
    last = [int(numbers[-1][:18]) for numbers in found]
    if all(a < b for a, b in pairwise(last)):
        return last, True
    if all(len(numbers) > 1 for numbers in found):
        before = [int(numbers[-2][:18]) for numbers in found]
        for faces, frames in ((last, before), (before, last)):
            is_several = max(faces) < _MOST_FACES and len(set(faces)) <= len(set(frames))
            pairs = list(zip(before, last, strict=True))
            if is_several and len(set(frames)) < len(frames) and pairs == sorted(set(pairs)):
                return frames, True
    return None, len(set(last)) == 1


def _one_face(files: list[str], numbers: list[int], face: str, read) -> tuple[list, list]:
    of_frame = defaultdict(list)
    for name, frame in zip(files, numbers, strict=True):
        of_frame[frame].append(name)

    def area(name: str) -> int:
        try:
            with open_image(read(name)) as image:
                return image.width * image.height
        except DECODE_ERRORS:
            return 0  # decoding names it

    of_frame = dict(sorted(of_frame.items()))
    chosen = []
    for names in of_frame.values():
        largest = face == "largest" and len(names) > 1
        chosen.append(max(names, key=area) if largest else names[0])
    return chosen, list(of_frame)


def split(
    videos: FaceVideos,
    names=("train", "val", "test"),
    allow_shared_persons: bool = False,
    say=lambda _: None,
) -> dict[str, np.ndarray]:
    """The indices of the parts `names`.

    They are the data's own, or 15 % each for validation and test where it has none. Parts are held
    out by person, in the closure of the pairs: whoever appears with somebody in one video is on his
    side. They are stratified by what a group holds and depend on the videos' names and splits
    alone, so a part is the same whichever others are asked for. The videos' `groups` join persons,
    too, and then a part's share is one of the videos.

    Args:
        allow_shared_persons: parts may share persons; what is held out is then only held together
            by pairs, the manipulations of the same persons.
        say: takes what is to be known of persons.

    Raises:
        InputError: two of the parts share a person or a group, or a part lacks real or fake videos.
    """
    persons = [videos.known_persons(i) for i in range(len(videos))]
    parts = {name: np.flatnonzero(videos.splits == name) for name in ("train", "val", "test")}
    asked = {name: parts[name] for name in names}
    try:
        refuse_spanning(videos, persons, asked, "person", lambda name: name.rpartition("/")[2])
    except InputError as error:
        if not allow_shared_persons:
            raise InputError(f"{error}, or --allow-shared-persons") from None
        problem = str(error).rpartition(";")[0]
        say(f"WARN --allow-shared-persons: {problem}: scores on them say little about others")
    if videos.groups is not None:
        refuse_spanning(videos, videos.groups[:, None], asked)
        persons = [[*who, f"//{group}"] for who, group in zip(persons, videos.groups, strict=True)]
    unknown = [videos.ids[i] for i, who in enumerate(videos.persons) if not who]
    if unknown and videos.groups is None and len(names) > 1:
        say(
            f"WARN the names of {len(unknown)} of {len(videos)} videos tell no person:"
            f" {first_few(unknown)}; one person may be on both sides of a split unless --group-by"
            " REGEX or a column `group` tells them apart"
        )
    labeled = videos.labels != UNLABELED
    pool = parts["train"] if any(map(len, parts.values())) else np.flatnonzero(labeled)
    if allow_shared_persons:
        persons = [[" ".join(sorted(who))] for who in persons]
    for name, share in (("test", TEST_SHARE), ("val", TEST_SHARE / (1 - TEST_SHARE))):
        if not len(parts[name]):
            parts[name] = _hold_out_persons(videos, persons, pool, share, name)
            pool = np.setdiff1d(pool, parts[name])
    parts["train"] = pool
    parts = {name: parts[name] for name in names}
    for name, indices in parts.items():
        counts = np.bincount(videos.labels[indices][labeled[indices]], minlength=2)
        if not counts.all():
            linked = Counter(joined(persons)).most_common(1)[0][1]
            why = ""
            if linked > len(videos) / 2 and (videos.splits == "").any():
                why = (
                    f": {linked} of {len(videos)} videos are linked by persons who appear in one"
                    " together, so they stay on one side; give splits, or --allow-shared-persons"
                )
            raise InputError(
                f"{videos.name}: {name} has {counts[REAL]} real and {counts[FAKE]} fake videos;"
                f" both are needed{why}"
            )
    return parts


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
        label = FAKE if fake else REAL
        persons = identities(name)
        records.append(Record((path, method, "", name), label, part, [], persons=persons))
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
    suffixes = (*SUFFIXES, *VIDEO_SUFFIXES, *face_layouts.LISTS)
    return name.lower().endswith(suffixes) and not hidden(name)


def _is_shown(name: str) -> bool:
    return is_image(name) or ((is_video(name) or _is_rates(name)) and not hidden(name))


def _videos(
    names: list[str], labels: bool, whole: bool = False
) -> tuple[dict[str, list[str]], list[str]]:
    # As in `Tree`, files by their `whole` names where these were given; and the files that stand
    # back behind others of the same name.
    videos = defaultdict(list)
    behind = []
    for name in names:
        if name.lower().endswith(SUFFIXES):  # none is hidden, but for what was given
            videos[name.rpartition("/")[0]].append(name)
    for files in videos.values():
        files.sort(key=natural_order)
    for name in filter(is_video, names):
        stem = name if whole else str(PurePosixPath(name).with_suffix(""))
        # Lists name a video without its suffix, so with labels the first alone is one.
        if labels and stem in videos:
            behind.append(name)
        videos.setdefault(stem if labels or stem not in videos else name, [name])
    return dict(videos), behind
