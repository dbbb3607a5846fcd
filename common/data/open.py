"""Open a set of images: a folder, a .zip of one, a .csv, a packed file, or the embedded sample."""

import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import PurePosixPath

import numpy as np
import torch

from common.data import pack
from common.data.images import (
    SPLITS,
    SUFFIXES,
    SYSTEM_FOLDERS,
    UNLABELED,
    Images,
    below_common_folder,
    existing,
    hidden,
    is_image,
    list_files,
    near_splits,
)
from common.data.synthetic import cytology
from common.data.table import open_table
from common.errors import InputError, did_you_mean, first_few, plural

# Folders of images without labels, beside splits or classes.
_UNLABELED_NAMES = ("unlabeled", "unlabelled")


def prepare(
    path: str | tuple[str, ...],
    *,
    store_size: int | None,
    on_bad_item: str,
    workers: int,
    labels: bool = True,
    say=print,
) -> Images:
    """`open_images`, decoded to `store_size` where that is given.

    Damaged images are left out where `on_bad_item` is "skip".
    """
    images = open_images(path, labels)
    if store_size:
        images.resize_store(store_size)
    if on_bad_item == "skip":
        dropped = images.drop_damaged(workers)
        first = f", the first is {dropped[0]}" if dropped else ""
        say(f"left out {plural(len(dropped), 'damaged image')}{first}")
    say(images.describe())
    if labels:
        for line in class_warnings(images):
            say(line)
    return images


def class_warnings(images: Images) -> list[str]:
    """Lines on classes that are perhaps one, and on those that no training split has."""
    lines = []
    alike = defaultdict(list)
    for name in images.classes:
        alike[re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold())].append(name)
    for names in alike.values():
        if len(names) > 1:
            lines.append(
                f"WARN {images.name}: the classes {', '.join(map(repr, names))} differ in case,"
                " blanks or dashes alone; give them one name if they are one class"
            )
    trained = np.unique(images.labels[images.splits == "train"])
    for split in ("val", "test"):
        lacking = np.setdiff1d(images.labels[images.splits == split], [*trained, UNLABELED])
        if len(lacking) and (trained != UNLABELED).any():
            names = first_few([images.classes[label] for label in lacking])
            lines.append(
                f"WARN {images.name}: {split} has {plural(len(lacking), 'class')} that train lacks:"
                f" {names}; a model is scored on what it was never trained on: rename or remove"
            )
    return lines


def open_images(path: str | tuple[str, ...], labels: bool = True) -> Images:
    """The images of a folder, a .zip, a .csv, a packed file, or the embedded data set (`sample`).

    A folder of folders gives the labels; `train/`, `val/` (or dev) and `test/` above them give the
    splits, which may be called `train_images` and the like; images in no folder, or in
    `unlabeled/`, are unlabeled. One folder that holds everything is looked through. Class names are
    in Unicode's composed form, as macOS does not give them.

    Args:
        path: it; of images without `labels` also an image, or several folders, .zip and images,
            whose ids have their path before them.
        labels: False: folders are no classes and no splits.

    Raises:
        InputError: missing, not readable, or without images.
    """
    if path == "sample":
        pixels, labels, classes = cytology()
        name = "sample (embedded, generated)"
        ids = [f"{classes[label]}/{i:05d}.png" for i, label in enumerate(labels)]
        splits = [""] * len(ids)
        return Images(name, ids, labels, classes, splits, pixels=torch.from_numpy(pixels))

    if isinstance(path, str):
        place = existing(path)
        if place.suffix == pack.SUFFIX and not place.is_dir():
            return pack.PackedImages(place)
        if place.suffix.lower() == ".csv" and not place.is_dir():
            return open_table(place)
        if not labels and not place.is_dir() and path.lower().endswith(SUFFIXES):
            path = (path,)
    alone = () if labels else SUFFIXES
    if isinstance(path, str):
        alone = (".csv", pack.SUFFIX, *alone)
    others: list[str] = []
    files, sizes, keys, read = list_files(path, is_image, alone, others)
    left_out = _left_out(len(files), others)
    if not files:
        raise InputError(f"{path}: no images there{left_out}; allowed are {', '.join(SUFFIXES)}")
    ids, splits, names = _layout(files, path, labels)
    classes = sorted({name for name in names if name is not None})
    number = {name: i for i, name in enumerate(classes)}
    numbers = [UNLABELED if name is None else number[name] for name in names]
    title = place.name if isinstance(path, str) else first_few(path)
    images = Images(title, ids, numbers, classes, splits, sizes=sizes, keys=keys, read=read)
    unlabeled = numbers.count(UNLABELED)
    if classes and unlabeled:
        images.note += f"; {plural(unlabeled, 'image')} without a label"
    images.note += left_out
    return images


def _left_out(count: int, others: list[str]) -> str:
    # `; 110 files, 10 read; left out: 100 .txt`: what a data set of `count` images has beside them.
    kinds: Counter[str] = Counter()
    for name in others:
        place = PurePosixPath(name)
        folder = next((part for part in place.parts if part in SYSTEM_FOLDERS), None)
        if folder not in (None, "__MACOSX"):
            kinds[f"in {folder}"] += 1
        elif not hidden(name) and place.name.lower() not in ("thumbs.db", "desktop.ini"):
            kinds[place.suffix.lower() or "without a suffix"] += 1
    if not kinds:
        return ""
    largest = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    shown = first_few([f"{number} {kind}" for kind, number in largest], 5)
    return f"; {count + kinds.total()} files, {count} read; left out: {shown}"


def _layout(
    files: list[str], path: str | tuple[str, ...], labels: bool
) -> tuple[list[str], list[str], list[str | None]]:
    # Name below the folder that holds everything, split and class name of each file.
    paths = [(name,) for name in files]
    if isinstance(path, str):
        paths = below_common_folder(files, _is_split)
    if labels:
        paths = _below_wrapper(paths)
    ids = ["/".join(parts) for parts in paths]
    if not labels:
        return ids, [""] * len(ids), [None] * len(ids)
    split_of = _splits_of_folders(paths, path)
    splits = [split_of.get(parts[0], "") if len(parts) > 1 else "" for parts in paths]
    if any(splits):
        if not all(splits):
            stray = ids[splits.index("")]
            there = ", ".join(sorted(set(splits) - {""}))
            raise InputError(f"{path}: {stray} is in none of the splits {there}; move it")
        kept = {top for top in split_of if top.lower() in _UNLABELED_NAMES}
        paths = [parts if parts[0] in kept else parts[1:] for parts in paths]
    classes = [unicodedata.normalize("NFC", parts[0]) for parts in paths]
    return (
        ids,
        splits,
        [
            None if len(parts) == 1 or name.lower() in _UNLABELED_NAMES else name
            for parts, name in zip(paths, classes, strict=True)
        ],
    )


def _below_wrapper(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    # A few pictures beside the one folder that holds the classes do not make it a class.
    while True:
        inside = [parts for parts in paths if len(parts) > 1]
        folders = {parts[0] for parts in inside}
        if (
            len(folders) != 1
            or len(inside) <= len(paths) - len(inside)
            or any(len(parts) == 2 for parts in inside)
            or len({parts[1] for parts in inside}) == 1
            or _is_split(*folders)
        ):
            return paths
        paths = [parts[1:] if len(parts) > 1 else parts for parts in paths]


def _splits_of_folders(paths: list[tuple[str, ...]], path) -> dict[str, str]:
    # The split of each folder at the top; none where the folders are classes.
    folders = sorted({parts[0] for parts in paths if len(parts) > 1})
    deep = {parts[0] for parts in paths if len(parts) > 2}
    exact = {name: SPLITS[name.lower()] for name in folders if _is_split(name)}
    unlabeled = {name: "train" for name in folders if name.lower() in _UNLABELED_NAMES}
    labeled = [name for name in folders if name not in unlabeled]
    near = near_splits(labeled)
    others = [name for name in labeled if name not in exact]
    is_clear = len(set(near.values())) == len(near) > 1 and "train" in near.values()
    if exact and not others:
        return exact | unlabeled
    if is_clear and len(near) == len(labeled):
        return near | unlabeled
    if not exact and not (is_clear and deep.issuperset(near)):
        return {}
    typos = [name for name in others if name in near or did_you_mean(name.lower(), SPLITS)]
    if len(exact) == 1 and not deep.intersection(exact) and not typos:
        return {}  # a class that is called so, beside others
    stray = [name for name in others if name not in near] or others
    hint = did_you_mean(stray[0].lower(), SPLITS) or ";"
    there = ", ".join(exact or near)
    raise InputError(
        f"{path}: the folder {stray[0]} is in none of the splits {there}{hint}"
        " move it into one, or rename it; if all are classes, put them into a folder called train"
    )


def _is_split(folder: str) -> bool:
    return folder.lower() in SPLITS
