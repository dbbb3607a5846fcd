"""Files that a run leaves: written whole or not at all, JSON, the format's number, the lock."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common import reading
from common.errors import InputError, OtherFormat

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]
# Of config.json and of checkpoints. CHANGELOG.md says what each number means.
FORMAT = 2
# What `flock` answers where the file system knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
run_locks = contextlib.ExitStack()


def run_dir_of(path: str) -> Path:
    """The run directory that a path means: itself, or that of a checkpoint or a stage's folder."""
    folders = [Path(path), *Path(path).parents][:3]
    return next((f for f in folders if os.path.exists(f / "config.json")), folders[0])


def lock_folder(folder: Path) -> None:
    """Lock a run directory until the end of `launch` or of the process.

    A file system without locks is taken as it is.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if fcntl is None:
        return
    file = run_locks.enter_context(open(folder / ".lock", "w"))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", *, keep: Path | None = None) -> Iterator[IO]:
    """A file whose content takes the place of `path` in one piece, or never appears.

    The bytes go to a temporary file in the same directory, are forced to the disk and renamed: a
    process or a machine that dies leaves the old content.

    Args:
        mode: "w" for UTF-8 text with the line ends as they are (csv needs that), or "wb".
        keep: what the old file is renamed to, once the new one is on the disk; `path` must exist.

    Raises:
        OSError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Names of files need not be text in UTF-8.
        utf8 = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        text = {} if "b" in mode else utf8
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None:
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power failure could undo the renaming
        finally:
            os.close(folder)


def remove_orphans(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for place in (folder, folder / "figures"):
        for orphan in place.glob(".*.tmp*"):
            orphan.unlink()


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file that is never seen half written."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> dict | None:
    """A JSON file; None where there is none.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return reading.parse_json(reading.read_bytes(path), path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def read_config(folder: Path) -> dict | None:
    """A run directory's config.json; None where there is none.

    Raises:
        InputError: it cannot be read, or is of another format.
    """
    config = read_json(folder / "config.json")
    if config is not None and "identity" in config:
        check_format(config, folder)
    return config


def check_format(record: dict, source) -> None:
    """Refuse what another version wrote in another format, before any of it is misread.

    Raises:
        OtherFormat: with both formats.
    """
    written = record.get("format", 1)
    if written != FORMAT:
        raise OtherFormat(
            f"{source} is of run format {written}, this version reads and writes format {FORMAT}:"
            " use the version that wrote it (CHANGELOG.md), or start anew with another --out"
        )
