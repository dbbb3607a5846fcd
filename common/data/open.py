"""Open a set of images: a folder, a .zip of one, a .csv, a packed file, or the embedded sample."""

import torch

from common.data import pack
from common.data.images import (
    SPLITS,
    SUFFIXES,
    UNLABELED,
    Images,
    below_common_folder,
    existing,
    is_image,
    list_files,
)
from common.data.synthetic import cytology
from common.data.table import open_table
from common.errors import InputError, first_few, plural


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
    return images


def open_images(path: str | tuple[str, ...], labels: bool = True) -> Images:
    """The images of a folder, a .zip, a .csv, a packed file, or the embedded data set (`sample`).

    A folder of folders gives the labels; `train/`, `val/` (or dev) and `test/` above them give the
    splits; images in no folder are unlabeled. One folder that holds everything is looked through.

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
    files, sizes, keys, read = list_files(path, is_image, alone)
    if not files:
        raise InputError(f"{path}: no images there; allowed are {', '.join(SUFFIXES)}")
    ids, splits, names = _layout(files, path, labels)
    classes = sorted({name for name in names if name is not None})
    number = {name: i for i, name in enumerate(classes)}
    numbers = [UNLABELED if name is None else number[name] for name in names]
    title = place.name if isinstance(path, str) else first_few(path)
    return Images(title, ids, numbers, classes, splits, sizes=sizes, keys=keys, read=read)


def _layout(
    files: list[str], path: str | tuple[str, ...], labels: bool
) -> tuple[list[str], list[str], list[str | None]]:
    # Name below the folder that holds everything, split and class name of each file.
    paths = [(name,) for name in files]
    if isinstance(path, str):
        paths = below_common_folder(files, _is_split)
    ids = ["/".join(parts) for parts in paths]
    if not labels:
        paths = [(name,) for name in ids]
    splits = [SPLITS.get(parts[0].lower(), "") if len(parts) > 1 else "" for parts in paths]
    if any(splits):
        if not all(splits):
            stray = ids[splits.index("")]
            there = ", ".join(sorted(set(splits) - {""}))
            raise InputError(f"{path}: {stray} is in none of the splits {there}; move it")
        paths = [parts[1:] for parts in paths]
    return ids, splits, [parts[0] if len(parts) > 1 else None for parts in paths]


def _is_split(folder: str) -> bool:
    return folder.lower() in SPLITS
