"""Images that a .csv file lists: `path`, and perhaps `label`, `group` and `split`.

Paths are absolute or count from the file's folder. An empty label is none.
"""

import hashlib
import os
import posixpath
import unicodedata
from pathlib import Path

import numpy as np

from common import reading
from common.data.groups import check_column
from common.data.images import SUFFIXES, UNLABELED, Images, reason, split_of_cell
from common.errors import InputError, did_you_mean, first_few, plural, printable
from common.retry import retried
from common.run.content import codes, file_key

COLUMNS = ("path", "label", "group", "split")


def open_table(place: Path) -> Images:
    """The images that the .csv file `place` lists, in its order; ids are their paths.

    Raises:
        InputError: the file cannot be read or has no column `path`; a file is missing, listed
            twice or no image; a split is unknown, or some rows have none or no group.
    """
    try:
        rows = reading.csv_rows(reading.read_bytes(place), place, ["path"])
    except OSError as error:
        raise InputError(f"{place}: {error.strerror}") from None
    lines = [f"line {line}" for line, _ in rows]
    cells = {name: [row.get(name, "") for _, row in rows] for name in COLUMNS}
    cells["label"] = [unicodedata.normalize("NFC", printable(cell)) for cell in cells["label"]]
    bases = [f"{base.as_posix()}/" for base in (place.parent.absolute(), place.parent.resolve())]
    paths = [_normalized(path, bases) for path in cells["path"]]
    first: dict[str, str] = {}
    twice = [
        f"{path} ({first[path]}, {line})"
        for path, line in zip(paths, lines, strict=True)
        if first.setdefault(path, line) != line
    ]
    if twice:
        raise InputError(f"{place}: {plural(len(twice), 'file')} listed twice: {first_few(twice)}")
    ids = [printable(path) for path in paths]
    odd = [
        f"{name} ({line})"
        for name, line in zip(ids, lines, strict=True)
        if not name.lower().endswith(SUFFIXES)
    ]
    if odd:
        raise InputError(
            f"{place}: {len(odd)} of {len(ids)} rows name no image: {first_few(odd)}; allowed are"
            f" {', '.join(SUFFIXES)}"
        )
    files = [place.parent / path for path in paths]
    stats = [_status(file) for file in files]
    missing = [name for name, status in zip(ids, stats, strict=True) if status is None]
    if missing:
        raise InputError(
            f"{place}: {len(missing)} of {len(ids)} files are missing: {first_few(missing)};"
            f" relative paths count from {place.parent}"
        )
    sizes = [status.st_size for status in stats]
    keys = [file_key(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in stats]
    splits = [
        split_of_cell(cell, f"{place} {line}")
        for cell, line in zip(cells["split"], lines, strict=True)
    ]
    without = [line for line, split in zip(lines, splits, strict=True) if not split]
    if without and any(splits):
        raise InputError(
            f"{place}: {len(without)} of {len(ids)} rows without a split: {first_few(without)};"
            " give each one, or leave the column empty"
        )
    groups = cells["group"] if check_column(place, cells["group"], lines) else None
    classes = sorted(set(cells["label"]) - {""})
    number = {name: i for i, name in enumerate(classes)} | {"": UNLABELED}
    labels = [number[name] for name in cells["label"]]

    def read(index: int) -> bytes:
        return reading.read_bytes(files[index], was_there=True)

    images = Images(place.name, ids, labels, classes, splits, sizes=sizes, keys=keys, read=read)
    if groups:
        images.groups = np.array(groups, dtype=object)
    # Of a folder the names tell the labels and splits.
    told = f"{images.fingerprint}{cells['label']}{splits}{groups}"
    images.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:8]
    facts = {"label": cells["label"], "group": cells["group"], "split": splits}
    images.content.facts |= {name: codes(texts) for name, texts in facts.items()}
    unread = [name for name in rows[0][1] if name and name not in COLUMNS]
    absent = [name for name in COLUMNS if name not in rows[0][1]]
    if unread:
        named = [name + did_you_mean(name, absent) for name in unread]
        images.note += f"; columns that are not read: {first_few(named, len(named))}"
    return images


def _normalized(path: str, bases: list[str]) -> str:
    # One name for a file, however its path is written; below the table's folder from there on.
    path = posixpath.normpath(path.replace("\\", "/"))
    base = next(filter(path.startswith, bases), "")
    return path[len(base) :]


def _status(file: Path) -> os.stat_result | None:
    try:
        return retried(lambda: reading.regular_status(file), file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InputError:
        raise
    except (OSError, ValueError) as error:  # another user's folder; a name that none can have
        raise InputError(f"{file}: {reason(error)}") from None
