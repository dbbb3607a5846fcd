"""Where the videos of a data set of manipulated faces lie, and what is known of each.

Layouts, each in a folder or a .zip of one; the first that fits is read:

1. Tables: .csv files with the columns video_id, label (0, real, original, pristine; 1, fake) and
   path (a folder of images or a video file, from the table's folder), and perhaps split, method and
   group. Files, or folders of files, named train, val and test are these splits.
2. DeepfakeBench (Yan et al., arXiv:2307.01426): JSON files
   `{set: {label: {split: {compression: {video: {label, frames}}}}}}`, the compression level missing
   for most sets, beside the frame folders that they name or elsewhere.
3. DFDC (Dolhansky et al., arXiv:2006.07397): a `metadata.json` in each part,
   `{file: {label, split, original}}`, or the public test's `labels.csv` with filename and label.
4. FaceForensics++ (Rössler et al., arXiv:1901.08971):
   `original_sequences/SOURCE/COMPRESSION/KIND/VIDEO` and
   `manipulated_sequences/METHOD/COMPRESSION/KIND/VIDEO`, where KIND is `frames` (VIDEO is a folder
   of images) or `videos` (VIDEO is a file), and `train.json`, `val.json`, `test.json` list pairs of
   videos: each gives two real videos, A and B, and both orders of every manipulation, A_B and B_A.
5. Folders by label: each video lies somewhere below `real/` or `fake/`, or below `original/` or a
   method's name such as `Deepfakes/`, or Celeb-DF's three folders (Li et al., arXiv:1909.12962),
   and these perhaps in `train/`, `val/` and `test/`. Celeb-DF's `List_of_testing_videos.txt` names
   its test videos.
"""

import contextlib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from common import reading
from common.data.clips import VIDEO_SUFFIXES, natural_order, renaming
from common.data.groups import check_column
from common.data.images import SPLITS, SUFFIXES, UNLABELED, near_splits, split_of_cell
from common.errors import InputError, first_few, plural

REAL, FAKE = 0, 1
ROOTS = {"original_sequences": REAL, "manipulated_sequences": FAKE}
LISTS = (".csv", ".json", "list_of_testing_videos.txt")
_KINDS = ("frames", "faces", "images", "videos")  # the first that is there is read
_COLUMNS = ("video_id", "label", "path")
_LABELS = {"0": REAL, "real": REAL, "original": REAL, "pristine": REAL, "1": FAKE, "fake": FAKE}
_METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter")
_METHODS += ("DeepFakeDetection", "Celeb-synthesis")
_SOURCES = ("youtube", "actors", "Celeb-real", "YouTube-real")
# What a folder's name says of the videos below it.
_FOLDERS = (
    _LABELS | {name.lower(): FAKE for name in _METHODS} | {name.lower(): REAL for name in _SOURCES}
)
# DeepfakeBench's labels are words of these between other characters: FF-real, DFDC_Fake, FF-F2F.
_BENCH = {"real": REAL, "fake": FAKE, "fakea": FAKE, "fakeb": FAKE, "synthesis": FAKE}
_BENCH |= dict.fromkeys(("df", "f2f", "fs", "nt", "fh", "fsh"), FAKE)
_COMPRESSIONS = ("raw", "c0", "c23", "c40")
# Whose faces a video shows: FaceForensics++ (003, 003_017), its DeepFakeDetection part (01__...,
# 01_02__...), Celeb-DF (id0_0000, id0_id1_0000).
_PERSONS = [
    re.compile(r"(\d{3})(?:_(\d{3}))?$"),
    re.compile(r"(\d\d)(?:_(\d\d))?__"),
    re.compile(r"(id\d+)_(?:(id\d+)_)?\d+$"),
]
# What stands before such a name where everything lies in one folder: Deepfakes_003_017.
_BEFORE = [*_METHODS, *_SOURCES, "original", "pristine", "real", "fake", *_COMPRESSIONS]
_PREFIX = re.compile(f"(?:(?:{'|'.join(_BEFORE)})[_-])+", re.IGNORECASE)


class Record(NamedTuple):
    """A video.

    Attributes:
        key: (dataset, method, compression, video).
        files: the frames in order of time, or the one video file.
        missing: why the video cannot be used.
        group: of a table's column.
        persons: who is in it, as its name tells; empty: it does not.
    """

    key: tuple[str, str, str, str]
    label: int
    split: str
    files: list[str]
    missing: str = ""
    group: str = ""
    persons: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "/".join(part for part in self.key if part)

    @property
    def problem(self) -> str:
        return f"{self.name} ({self.missing})"


class Tree(NamedTuple):
    """What lies below a path.

    Attributes:
        path: as it was given.
        videos: by folder of frames, or by video file without its suffix: as in `Record.files`.
        lists: the content of files of which `is_list` is true, by name.
        place: the folder.
        only: the file in it that was given, or "".
    """

    path: str
    videos: dict[str, list[str]]
    lists: dict[str, bytes]
    place: Path
    only: str = ""


class Found(NamedTuple):
    """The videos of a tree.

    Attributes:
        unlisted: names of those that are in no split, though others are, and were left out.
        notes: what else is to be said.
    """

    records: list[Record]
    unlisted: list[str]
    notes: list[str]


def identities(video: str) -> tuple[str, ...]:
    """The persons in a video, as its name tells them; () where it does not.

    `003_017` is the face 003 manipulated with 017's. A suffix, folders and a method's name before
    it do not matter.
    """
    name = PurePosixPath(video.replace("\\", "/")).name
    if is_video(name) or name.lower().endswith(SUFFIXES):
        name = name.rpartition(".")[0]
    name = name[match.end() :] if (match := _PREFIX.match(name)) else name
    for pattern in _PERSONS:
        if match := pattern.match(name):
            return tuple(person for person in match.groups() if person)
    return ()


def is_video(name: str) -> bool:
    """Whether a file's name is that of a video file."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def is_list(name: str) -> bool:
    """Whether a file may list the videos: beside them, not in every video's folder."""
    parts = PurePosixPath(name).parts
    near = len(parts) <= 3 and not ROOTS.keys() & set(parts)
    return near and name.lower().endswith(LISTS)


def stays(folder: str) -> bool:
    """Whether a folder that holds everything says something of it."""
    return folder in ROOTS or folder.lower() in (_FOLDERS | SPLITS)


def unlabeled(videos: dict[str, list[str]], top: str) -> list[Record]:
    """Videos of which nothing is known; `top` names the one whose frames lie in no folder."""
    return [
        Record(("", "", "", name or top), UNLABELED, "", videos[name])
        for name in sorted(videos, key=natural_order)
    ]


def find(tree: Tree, labels: bool) -> Found:
    """The videos of a tree by the first layout that fits.

    Args:
        labels: False: where none fits, any videos.

    Raises:
        InputError: none fits, or what the layout says cannot be.
    """
    if tree.only and is_video(tree.only):
        return Found(unlabeled({Path(tree.only).stem: [tree.only]}, ""), [], [])
    jsons = {}
    for name in tree.lists:
        if name.lower().endswith(".json"):
            # Beside videos that are only to be classified anybody's files may lie.
            with contextlib.nullcontext() if labels else contextlib.suppress(InputError):
                jsons[name] = _parsed(tree, name)
    tables = {
        name: _header(data) for name, data in tree.lists.items() if name.lower().endswith(".csv")
    }
    benches = {name: content for name, content in jsons.items() if _is_bench(content)}
    parts = {name: content for name, content in jsons.items() if _is_dfdc(content)}
    answers = [name for name, header in tables.items() if {"filename", "label"} <= set(header)]
    official = _official(tree)
    ours = [name for name, header in tables.items() if {"video_id", "path"} & set(header)]
    if tree.only.lower().endswith(".csv") and tree.only not in answers:
        ours = [tree.only]
    notes = [
        f"passed over {name}: it has not the columns {','.join(_COLUMNS)}"
        for name in tables
        if name not in (*ours, *answers)
    ]
    if ours and (tree.only or not official):
        try:
            return Found(_from_tables(tree, ours), [], notes)
        except InputError:
            if labels or tree.only:
                raise
    if benches:
        records, more = _from_benches(tree, benches)
        return Found(records, [], notes + more)
    if tree.only.lower().endswith(".json") and not parts:
        raise InputError(
            f"{tree.path}: no list of DeepfakeBench ({{set: {{label: {{split: {{video: ...}}}}}}}})"
            " and no metadata.json of DFDC"
        )
    if parts or (answers and not official):
        return Found(_from_dfdc(tree, parts, answers), [], notes)
    if official:
        lists = _pair_lists(tree, jsons)
        others = jsons.keys() - lists.keys()
        if others:
            notes.append(f"passed over {first_few(sorted(others))}: no pairs of train, val or test")
        records, unlisted = _from_official(tree, official, lists)
        return Found(records, unlisted, notes)
    try:
        records, problem = _from_folders(tree)
        own = tree.place.name
        if labels and not records and own.lower() in _FOLDERS and not own.isdigit():
            # The folder that was given says it.
            videos = {f"{own}/{name}": files for name, files in tree.videos.items() if name}
            records, _ = _from_folders(tree._replace(videos=videos))
    except InputError:
        if labels:
            raise
        records = []
    if records:
        return Found(records, [], notes)
    if not labels:
        loose = tree.videos.get("", [])
        stray = [f"{plural(len(loose), 'image')} beside folders of videos: {first_few(loose)}"]
        records = unlabeled(tree.videos, tree.place.stem)
        return Found(records, [], stray if loose and tree.videos.keys() > {""} else [])
    for note in notes:
        problem = problem or note
    raise InputError(
        f"{tree.path}: no known layout there; allowed are FaceForensics++ (original_sequences/ and"
        " manipulated_sequences/), folders real/ and fake/, or original/ and methods' names, in"
        " train/, val/, test/ or not, Celeb-DF, DFDC (metadata.json), DeepfakeBench (its JSON"
        f" beside the frames), a .csv with {','.join(_COLUMNS)}"
        + (f"; {problem}" if problem else "")
    )


# Tables.


def _header(data: bytes) -> list[str]:
    text = data[:4096].decode("utf-8-sig", "replace")
    return [cell.strip().strip('"').lower() for cell in text.partition("\n")[0].split(",")]


def _split_words(names: Iterable[str]) -> dict[str, str]:
    """The splits that some of these names, in small letters, say: SPLITS, and names such as
    `train_list` and `test_list` where train and another one are there.
    """
    near = near_splits(name.lower() for name in names)
    return SPLITS | near if "train" in near.values() and len(set(near.values())) > 1 else SPLITS


def _named_splits(names: list[str]) -> dict[str, str]:
    """The splits of files that their own names or those of folders above them say, by name."""
    parts_of = {name: PurePosixPath(name.lower()).with_suffix("").parts[::-1] for name in names}
    words = _split_words(part for parts in parts_of.values() for part in parts)
    said = {
        name: [*filter(None, map(SPLITS.get, parts)), *filter(None, map(words.get, parts)), ""]
        for name, parts in parts_of.items()
    }
    return {name: splits[0] for name, splits in said.items()}


def _from_tables(tree: Tree, names: list[str]) -> list[Record]:
    # The tables of one data set may speak of the same persons.
    dataset = PurePosixPath(names[0]).stem if len(names) == 1 else ""
    named = _named_splits(names)
    records = [record for name in names for record in _from_csv(tree, name, dataset, named[name])]
    check_column(tree.path, [record.group for record in records], [r.name for r in records])
    return records


def _from_csv(tree: Tree, name: str, dataset: str, named: str) -> list[Record]:
    what = f"{tree.path}: {name}"
    rows = reading.csv_rows(tree.lists[name], what, _COLUMNS)
    records = []
    for line, row in rows:
        where = f"{what} line {line}"
        label = _LABELS.get(row["label"].lower())
        if label is None:
            raise InputError(f"{where}: label {row['label']!r}, allowed are {', '.join(_LABELS)}")
        part = split_of_cell(row.get("split", ""), where)
        # A table of the training videos may hold out some of its own.
        if part and named and part != named and (named, part) != ("train", "val"):
            raise InputError(
                f"{where}: split {part} in a table that is named for {named}; rename the table, or"
                " correct the column"
            )
        files = tree.videos.get(_within(row["path"], name, tree.place), [])
        key = (PurePosixPath(name).stem, row.get("method", ""), "", row["video_id"])
        missing = "" if files else f"nothing at {row['path']}"
        persons = identities(row["video_id"]) or identities(row["path"])
        persons = _of_dataset(dataset, persons)
        group = row.get("group", "")
        records.append(Record(key, label, part or named, files, missing, group, persons))
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
    return str(PurePosixPath(name).with_suffix("")) if is_video(name) else name


# FaceForensics++.


class _OfficialVideo(NamedTuple):
    dataset: str
    root: str  # a key of ROOTS
    method: str
    compression: str
    kind: str  # one of _KINDS
    video: str
    name: str  # a key of `Tree.videos`


def _official(tree: Tree) -> list[_OfficialVideo]:
    """The videos that lie in the official layout."""
    videos = []
    for name in tree.videos:
        parts = PurePosixPath(name).parts
        root = next((i for i, part in enumerate(parts) if part in ROOTS), None)
        if root is not None and len(parts) == root + 5 and parts[root + 2] != "masks":
            dataset = "/".join(parts[:root]) or "FaceForensics++"
            videos.append(_OfficialVideo(dataset, *parts[root:], name))
    return videos


def _pair_lists(tree: Tree, jsons: dict) -> dict[str, tuple[str, list]]:
    """The lists of pairs with their splits, by name; `train.json` and the like have to be some."""
    lists = {}
    for name, content in jsons.items():
        if isinstance(content, list) and all(map(_is_pair, content)):
            lists[name] = content
        elif PurePosixPath(name).stem.lower() in SPLITS:
            raise InputError(
                f'{tree.path}: {name} is not a list of pairs of videos such as ["000", "003"]'
            )
    named = _named_splits(list(lists))
    return {name: (named[name], pairs) for name, pairs in lists.items() if named[name]}


def _from_official(
    tree: Tree, official: list[_OfficialVideo], lists: dict
) -> tuple[list[Record], list[str]]:
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
    of_folder = _named_splits([dataset for dataset, *_ in groups])
    records = []
    unlisted = []
    for (dataset, root, method, compression), videos in sorted(groups.items()):
        # A source that the lists do not speak of at all, such as `actors`, is missing nothing.
        listed = split_of[root] if videos.keys() & split_of[root].keys() else {}
        for video in sorted(videos.keys() | listed.keys(), key=natural_order):
            key = (dataset, method, compression, video)
            files = videos.get(video, [])
            missing = "" if files else f"no {kind}"
            # train/ and test/ are parts of one data set.
            whose = "" if of_folder[dataset] else dataset
            persons = _of_dataset(whose, identities(video))
            label, part = ROOTS[root], listed.get(video, of_folder[dataset])
            record = Record(key, label, part, files, missing, "", persons)
            if lists and video not in listed:
                unlisted.append(record.name)
            else:
                records.append(record)
    return records, unlisted


def _of_dataset(dataset: str, persons: tuple[str, ...]) -> tuple[str, ...]:
    # The numbers of two data sets are those of different persons.
    return tuple(f"{dataset}/{person}" for person in persons)


def _official_splits(tree: Tree, lists: dict) -> dict[str, dict[str, str]]:
    """The splits of the videos below each of ROOTS, by name."""
    split_of: dict[str, dict[str, str]] = {root: {} for root in ROOTS}
    for part, pairs in lists.values():
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


# DeepfakeBench.


def _parsed(tree: Tree, name: str):
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


def _bench_label(text: str, where: str) -> int:
    words = re.split(r"[^0-9a-z]+", text.lower())
    said = {_BENCH[word] for word in words if word in _BENCH}
    if len(said) != 1:
        raise InputError(
            f"{where}: label {text!r}; expected one with the word real or fake, such as FF-real,"
            " DFDC_Fake, or FF- and DF, F2F, FS, NT, FSH"
        )
    return said.pop()


def _from_benches(tree: Tree, contents: dict[str, dict]) -> tuple[list[Record], list[str]]:
    listed = []
    for content in contents.values():
        for dataset, label, part, compression, video, entry in _bench_entries(tree, content):
            where = f"{tree.path}: {dataset}/{label}/{part}/{video}"
            names = entry.get("frames") if isinstance(entry, dict) else None
            listed_well = isinstance(names, list) and all(isinstance(name, str) for name in names)
            if not listed_well or part.lower() not in SPLITS:
                raise InputError(
                    f"{where}: expected a split (train, val, test) and a video with its frames"
                )
            # Some of the published lists have Windows' separators, and frames in no order.
            files = sorted((name.replace("\\", "/") for name in names), key=natural_order)
            name = PurePosixPath(video.replace("\\", "/")).name
            value = _bench_label(str(entry.get("label", label)), where)
            persons = _of_dataset(dataset, identities(name))
            key = (dataset, label, compression, name)
            listed.append(Record(key, value, SPLITS[part.lower()], files, persons=persons))
    there = {name for files in tree.videos.values() for name in files}
    rename = renaming([record.files[0] for record in listed if record.files], there)
    records: dict[tuple, Record] = {}
    repeated = 0
    for record in listed:
        files = [name for name in map(rename, record.files) if name in there]
        complete = files and len(files) == len(record.files)
        missing = "" if complete else f"{len(files)} of {len(record.files)} frames"
        record = record._replace(files=files, missing=missing)
        # FaceForensics++.json and FF-DF.json list the same real videos.
        same = (tuple(record.files), record.label, record.split) if files else (record.key,)
        repeated += same in records
        records.setdefault(same, record)
    notes = []
    if repeated:
        notes.append(f"{plural(repeated, 'video')} that two lists name alike counted once")
    return list(records.values()), notes


def _bench_entries(tree: Tree, content: dict) -> Iterator[tuple]:
    """(dataset, label, split, compression, video, what the list says of it) of every video."""

    def table(value, *where: str) -> dict:
        if not isinstance(value, dict):
            raise InputError(f"{tree.path}: {'/'.join(where)}: expected a table of videos")
        return value

    for dataset, by_label in content.items():
        for label, by_split in table(by_label, dataset).items():
            for part, videos in table(by_split, dataset, label).items():
                videos = table(videos, dataset, label, part)
                if isinstance(videos.get("frames"), list):  # one video, not a table of them
                    first = (*videos["frames"][:1], f"{part}/0")[0]
                    name = PurePosixPath(str(first).replace("\\", "/")).parent.name
                    yield dataset, label, part, "", name, videos
                    continue
                flat = all("frames" in table(v, dataset, label, part) for v in videos.values())
                by_compression = {"": videos} if flat else videos
                for compression, entries in by_compression.items():
                    for video, entry in table(entries, dataset, label, part).items():
                        yield dataset, label, part, compression, video, entry


# DFDC.


def _is_dfdc(content) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(is_video(name) for name in content)
        and all(isinstance(entry, dict) and "label" in entry for entry in content.values())
    )


def _from_dfdc(tree: Tree, parts: dict[str, dict], answers: list[str]) -> list[Record]:
    """The videos of DFDC's parts and of its public test.

    All parts are of its training data: their `split` tells nothing unless it differs. Who is in a
    video is not published; a fake and its original are of one person.
    """
    entries = []  # the list, file, label, split, original
    for name, content in parts.items():
        for file, entry in content.items():
            part = split_of_cell(str(entry.get("split") or ""), f"{tree.path}: {name}: {file}")
            entries.append((name, file, entry["label"], part, entry.get("original") or file))
    for name in answers:
        for _, row in reading.csv_rows(
            tree.lists[name], f"{tree.path}: {name}", ("filename", "label")
        ):
            entries.append((name, row["filename"], row["label"], "", row["filename"]))
    if len({part for *_, part, _ in entries}) == 1:
        entries = [(*entry[:3], "", entry[4]) for entry in entries]
    below = defaultdict(dict)  # a list's folder -> a video's own name -> its name in the tree
    for video in tree.videos:
        *folders, own = PurePosixPath(video).parts
        for depth in range(len(folders) + 1):
            below["/".join(folders[:depth])].setdefault(own, video)
    records = []
    for name, file, word, part, original in entries:
        where = f"{tree.path}: {name}: {file}"
        label = _LABELS.get(str(word).lower())
        if label is None:
            raise InputError(f"{where}: label {word!r}, allowed are {', '.join(_LABELS)}")
        folder = name.rpartition("/")[0]
        video = below[folder].get(_stem(file))
        files = tree.videos[video] if video is not None else []
        missing = "" if files else "it is not there"
        key = (folder, "", "", _stem(file))
        records.append(Record(key, label, part, files, missing, "", (_stem(str(original)),)))
    return records


def _stem(file: str) -> str:
    name = PurePosixPath(file).name
    return name.rpartition(".")[0] if is_video(name) else name


# Folders by label.


def _from_folders(tree: Tree) -> tuple[list[Record], str]:
    """The videos of folders that say a label; none, and perhaps what is wrong, where they do not.

    Raises:
        InputError: only some folders say one, or they say two.
    """
    tests = _testing_list(tree)
    records = []
    without = Counter()
    loose = []
    near = _split_words({part for name in tree.videos for part in _above_label(name)})
    for name in sorted(tree.videos, key=natural_order):
        *folders, video = PurePosixPath(name).parts or ("",)
        words = [folder.lower() for folder in folders]
        if "masks" in words:
            continue
        labels = {_FOLDERS[word] for word in words if word in _FOLDERS}
        # Images side by side in real/ or fake/Deepfakes/ are no frames of a video of that name.
        file = tree.videos[name][0]
        if video.lower() in _FOLDERS and not (video.isdigit() or is_video(file)):
            loose.append(file)
            continue
        if not labels:
            without[folders[0] if folders else name] += 1
            continue
        if len(labels) == 2:
            raise InputError(f"{tree.path}: {name}: its folders say both real and fake")
        splits = {SPLITS[word] for word in words if word in SPLITS}
        splits = splits or {near[word] for word in _above_label(name) if word in near}
        if len(splits) > 1:
            raise InputError(f"{tree.path}: {name}: its folders name two splits")
        (label,) = labels
        first = next(i for i, word in enumerate(words) if word in _FOLDERS)
        skipped = (*_LABELS, *SPLITS, *_KINDS, *_COMPRESSIONS)
        method = [folder for folder in folders[first:] if folder.lower() not in skipped]
        method = method or folders[first : first + 1]
        compression = next((word for word in words if word in _COMPRESSIONS), "")
        dataset = "/".join(
            folder for folder in folders[:first] if folder.lower() not in (*near, *_KINDS)
        )
        part = "".join(splits)
        if tests:
            part = "test" if f"{folders[-1]}/{video}".lower() in tests else "train"
        key = (dataset, "/".join(method), compression, video)
        persons = _of_dataset(dataset, identities(video))
        records.append(Record(key, label, part, tree.videos[name], "", "", persons))
    if not without and not loose:
        return records, ""
    problem = (
        f"{first_few(sorted(without))} {'say' if len(without) > 1 else 'says'} neither"
        f" {', '.join(name for name in _FOLDERS if name not in '01')}; each video has a folder of"
        " its own or is a file, and methods of other names lie in fake/"
    )
    if loose:
        problem = (
            f"images beside videos or in place of them: {first_few(loose)}; each video has a folder"
            " of its own or is a file"
        )
    if records:
        raise InputError(f"{tree.path}: {problem}, or list the videos in a .csv")
    return [], problem


def _above_label(name: str) -> Iterator[str]:
    """The folders of a video above the first that says a label, in small letters."""
    return itertools.takewhile(lambda part: part not in _FOLDERS, name.lower().split("/")[:-1])


def _testing_list(tree: Tree) -> set[str]:
    """The videos of Celeb-DF's list, such as `youtube-real/00170`, in small letters."""
    named = set()
    for name, data in tree.lists.items():
        if name.lower().endswith(".txt"):
            for line in data.decode("utf-8", "replace").split("\n"):
                file = line.strip().partition(" ")[2].strip().replace("\\", "/")
                if file:
                    named.add(str(PurePosixPath(file.lower()).with_suffix("")))
    return named
