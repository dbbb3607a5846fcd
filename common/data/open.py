"""Open a set of images: a folder, a .zip of one, a packed file, or the embedded sample."""

from pathlib import Path, PurePosixPath

import torch

from common.data import pack
from common.data.images import SPLITS, SUFFIXES, UNLABELED, Images, is_image, list_files
from common.data.synthetic import cytology
from common.errors import InputError


def prepare(path: str, *, store_size: int | None, bad: str, workers: int, say=print) -> Images:
    """`open_images`, decoded to `store_size` where that is given.

    Damaged images are left out where `on_bad_item` is "skip".
    """
    images = open_images(path)
    if store_size:
        images.resize_store(store_size)
    if bad == "skip":
        dropped = images.drop_damaged(workers)
        say(
            f"left out {len(dropped)} damaged images"
            + (f", the first is {dropped[0]}" if dropped else "")
        )
    say(images.describe())
    return images


def open_images(path: str) -> Images:
    """The images of a folder, a .zip, a packed file, or of the embedded data set (`sample`).

    A folder of folders gives the labels; `train/`, `val/` (or dev) and `test/` above them give the
    splits; images in no folder are unlabeled. One folder that holds everything is looked through.

    Raises:
        InputError: missing, not readable, or without images.
    """
    if path == "sample":
        pixels, labels, classes = cytology()
        ids = [f"{classes[label]}/{i:05d}.png" for i, label in enumerate(labels)]
        return Images(
            "sample (embedded, generated)",
            ids,
            labels,
            classes,
            [""] * len(ids),
            pixels=torch.from_numpy(pixels),
        )

    place = Path(path)
    if place.suffix == pack.SUFFIX and place.is_file():
        return pack.PackedImages(place)
    files, sizes, read = list_files(path, is_image)
    if not files:
        raise InputError(f"{path}: no images there; allowed are {', '.join(SUFFIXES)}")
    ids, splits, names = _layout(files, path)
    classes = sorted({name for name in names if name is not None})
    number = {name: i for i, name in enumerate(classes)}
    labels = [UNLABELED if name is None else number[name] for name in names]
    return Images(place.name, ids, labels, classes, splits, sizes=sizes, read=read)


def _layout(files: list[str], path: str) -> tuple[list[str], list[str], list[str | None]]:
    # Name below the folder that holds everything (the same in a folder and in any archive of it),
    # split and class name.
    parts = [PurePosixPath(name).parts for name in files]
    while (
        all(len(p) > 1 for p in parts)
        and len({p[0] for p in parts}) == 1
        and parts[0][0].lower() not in SPLITS
    ):
        parts = [p[1:] for p in parts]
    ids = ["/".join(p) for p in parts]
    splits = [SPLITS.get(p[0].lower(), "") if len(p) > 1 else "" for p in parts]
    if any(splits):
        if not all(splits):
            stray = ids[splits.index("")]
            raise InputError(
                f"{path}: {stray} is in none of the splits"
                f" {', '.join(sorted(set(splits) - {''}))}; move it"
            )
        parts = [p[1:] for p in parts]
    return ids, splits, [p[0] if len(p) > 1 else None for p in parts]
