"""Files that a run leaves: written whole or not at all, JSON, the format's number, the lock."""

import contextlib
import csv
import errno
import io
import itertools
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from common import reading
from common.errors import InputError, OtherFormat, say
from common.retry import retried

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]
# Of config.json and of checkpoints. CHANGELOG.md says what each number means.
FORMAT = 2
LAST = ("last.pt", "last.previous.pt")
BEST = ("best.pt", "best.previous.pt")
CONTENT = "content.pt"
# What training writes into a run directory: first its state, which --resume none removes, there and
# in the folders of stages. Beside these stand its figures, whose names are the script's.
STATE = (*LAST, *BEST, CONTENT, "summary.json", "log.jsonl", "resumes.jsonl")
WRITTEN = (
    *STATE,
    *("config.json", "env.json", "report.html", "backbone.pt", "features.npz", "split.json"),
    *("tables.json", "clusters.csv", "embeddings.npz", "confusion.csv"),
)
# A temporary file of `atomic_write`.
_ANSWERS = r"(?:eval|eval_confusion|predictions|stream)(?:-\d+)?\.(?:csv|json)"
_ORPHAN = re.compile(rf"\.({'|'.join(map(re.escape, WRITTEN))}|{_ANSWERS})\.\d+\.tmp")
_ORPHAN_FIGURE = re.compile(r"\.[^.].*\.(csv|json|png|svg)\.\d+\.tmp")
# The entries that are read of a config.json, with their types, see `read_json`.
_CONFIG = {
    "identity": dict,
    "resolved": dict,
    "card": {"stages": [str], "baselines": [str]},
    "data": str,
}
_JSON = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
# What `flock` answers where the file system knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
# What `link` answers where the file system knows no second name of a file.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
run_locks = contextlib.ExitStack()


def run_dir_of(path: str) -> Path:
    """The run directory that a path means: itself, or that of a checkpoint or a stage's folder."""
    folders = [Path(path), *Path(path).parents][:3]
    return next((folder for folder in folders if is_run(folder)), folders[0])


def is_run(folder: Path) -> bool:
    """Whether a folder holds the config.json of a run, in any format."""
    try:
        return "identity" in (read_json(folder / "config.json") or {})
    except InputError:
        return False


def lock_folder(folder: Path) -> None:
    """Lock a run directory until the end of `launch` or of the process.

    A file system without locks is taken as it is.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if fcntl is None:
        return
    file = run_locks.enter_context(open(folder / ".lock", "wb"))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


@contextlib.contextmanager
def atomic_write(
    path: Path,
    mode: str = "w",
    *,
    keep: Path | None = None,
    stream: bool = False,
    new: bool = False,
) -> Iterator[IO]:
    """A file whose content takes the place of `path` in one piece, or never appears.

    The bytes go to a temporary file in the same directory, are forced to the disk and renamed: a
    process or a machine that dies leaves the old content. What fails for a moment is done again.

    Args:
        mode: "w" for UTF-8 text with the line ends as they are (csv needs that), or "wb".
        keep: what the old file is renamed to, once the new one is on the disk; `path` must exist.
        stream: write the bytes as they come, for what is large: they are not gathered in memory,
            so the writing itself is done once.
        new: nothing is replaced.

    Raises:
        FileExistsError: there is something at the `path` of a `new` file.
        OSError: the disk is full or not writable.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    # Names of files need not be text in UTF-8.
    utf8 = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    text = {} if "b" in mode else utf8
    try:
        if stream:
            with open(temporary, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        else:
            gathered = io.BytesIO()
            file = io.TextIOWrapper(gathered, **text) if text else gathered
            yield file
            file.flush()

            def write():
                with open(temporary, "wb") as target:
                    target.write(gathered.getbuffer())
                    target.flush()
                    os.fsync(target.fileno())

            retried(write, path, was_there=True)
        if keep is not None:
            retried(lambda: os.replace(path, keep), path, was_there=True)
        place = _place_new if new else os.replace
        retried(lambda: place(temporary, path), path, was_there=True)
    finally:
        with contextlib.suppress(OSError):  # the next start removes it
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _place_new(temporary: Path, path: Path) -> None:
    # A renaming would take the place of what is there.
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(temporary, path)


def _numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number}")


def check_target(target: Path, suffix: str, member: str, what: str) -> None:
    """Refuse to write an archive over anything but an older one of the same kind.

    Args:
        suffix: what its name ends in.
        member: how the name of an entry ends that no other archive has.
        what: what is written, for messages.

    Raises:
        InputError: with what is there.
    """
    if target.suffix != suffix:
        raise InputError(f"{target}: the name of {what} must end in {suffix}")
    if not target.parent.is_dir():
        raise InputError(f"{target}: there is no folder {target.parent}")
    if not target.exists():
        return
    if target.is_file() and zipfile.is_zipfile(target):
        with zipfile.ZipFile(target) as archive:
            if any(name.endswith(member) for name in archive.namelist()):
                return
    raise InputError(f"{target} is there and is not {what} of this command; give another name")


def write_new(path: Path, text: str) -> Path:
    """Write a text to `path`, or where that is taken to the first of NAME-2, NAME-3, ... that is
    free, and return which.

    Nothing is replaced: two processes at once write two files.
    """
    for number in itertools.count(1):
        file = path if number == 1 else _numbered(path, number)
        if not os.path.lexists(file):
            with contextlib.suppress(FileExistsError):
                with atomic_write(file, new=True) as out:
                    out.write(text)
                return file


def write_answer(folder: Path, texts: dict[str, str | None]) -> None:
    """Write the files of an answer in the place of an earlier one's.

    Those are kept as NAME-1 and so on if they say something else, which is said.

    Args:
        texts: by the names of the files; None: this answer has no such file.
    """
    there = {folder / name: text for name, text in texts.items() if (folder / name).exists()}
    if any(text is None or file.read_bytes() != _bytes(text) for file, text in there.items()):
        files = [folder / name for name in texts]
        number = next(
            n
            for n in itertools.count(1)
            if not any(os.path.lexists(_numbered(file, n)) for file in files)
        )
        kept = [file.rename(_numbered(file, number)) for file in there]
        say(f"the earlier answer is kept in {', '.join(map(str, kept))}")
    for name, text in texts.items():
        if text is not None:
            with atomic_write(folder / name) as file:
                file.write(text)


def _bytes(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # as `atomic_write` does


def csv_text(rows: Iterable[Iterable]) -> str:
    """Rows as the text of a .csv file."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk: a power failure could undo what is new there.

    A folder that may not be read, and a file system that cannot do it, are taken as they are.

    Raises:
        OSError: the disk fails.
    """

    def sync():
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    if os.name != "posix":
        return
    try:
        retried(sync, folder, was_there=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, where they are missing, to survive a power failure.

    Raises:
        OSError: it cannot be created.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync_folder(place.parent)


def remove_orphans(folder: Path) -> None:
    """Delete the temporary files of a run, or of its use, that was killed while it wrote, and no
    others.
    """
    for place, ours in ((folder, _ORPHAN), (folder / "figures", _ORPHAN_FIGURE)):
        for file in place.glob(".*.tmp"):
            if ours.fullmatch(file.name):
                file.unlink()


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file that is never seen half written."""
    with atomic_write(path) as file:
        file.write(json_text(value))


def json_text(value: dict) -> str:
    """A value as the text of a .json file."""
    return json.dumps(value, indent=2, default=str) + "\n"


def read_json(
    path: Path, types: dict | None = None, say: Callable[[str], None] | None = None
) -> dict | None:
    """The object in a JSON file; None where there is no file.

    Args:
        types: of the entries that are used, any of which may be absent: `str`, `[str]` for a list
            of them, or a dict of the entries of an entry.
        say: of a file that only informs: takes the line that says what is wrong with it, and the
            file counts as absent.

    Raises:
        InputError: the file cannot be read, holds no object, or an entry is of another type.
    """
    try:
        value = reading.parse_json(reading.read_bytes(path), "it")
        _check_types(value, types or {}, "it")
        return value
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        problem = f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
    if say is None:
        raise InputError(problem)
    say(f"{problem}; going on without it")
    return None


def _check_types(value, wanted, name: str) -> None:
    kind = wanted if isinstance(wanted, type) else type(wanted)
    if not isinstance(value, kind):
        found = _JSON.get(type(value), type(value).__name__)
        raise ValueError(f"{name} is {found}, not {_JSON[kind]}")
    if isinstance(wanted, dict):
        for entry in wanted.keys() & value.keys():
            _check_types(value[entry], wanted[entry], f"its {entry!r}")
    elif isinstance(wanted, list):
        for item in value:
            _check_types(item, wanted[0], f"an item of {name}")


def check_config(config, source) -> dict:
    """What a checkpoint holds of a config.json, after a look at the types of its entries.

    Raises:
        InputError: some are others than a run's.
    """
    try:
        _check_types(config, _CONFIG, "it")
    except ValueError as error:
        raise InputError(f"the config in {source} cannot be read: {error}") from None
    return config


def read_config(folder: Path) -> dict | None:
    """A run directory's config.json; None where there is none.

    Raises:
        InputError: it cannot be read, holds entries of other types than a run's, or is of another
            format.
    """
    config = read_json(folder / "config.json", _CONFIG)
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
