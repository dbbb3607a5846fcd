"""Files of a run directory: atomic writes, JSON, locks."""

import contextlib
import errno
import json
import os
from pathlib import Path

from common.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
run_locks = contextlib.ExitStack()


def run_dir_of(path: str) -> Path:
    """The run directory that a path means: itself, or the one that holds the checkpoint or the
    stage's folder.
    """
    folders = [Path(path), *Path(path).parents][:3]
    return next((folder for folder in folders if (folder / "config.json").exists()), folders[0])


def lock_folder(folder: Path) -> None:
    # Held until the end of the process or of `launch`. A file system without locks is none the
    # worse.
    if fcntl is None:
        return
    file = run_locks.enter_context(open(folder / ".lock", "w"))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file that is never seen half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(json.dumps(value, indent=2, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave it empty
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict | None:
    """A JSON file; None where there is none.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
