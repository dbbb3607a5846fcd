"""How the user's files are read: regular ones alone, and within a bound of memory.

Whatever a file declares of itself, reading one item takes at most `--max-item-mb` beyond what it
holds: sizes are compared with it before anything is allocated. A read that does not come back is
seen by whoever asks `oldest_pending`. `read_bytes` and `read_settings` try again what fails for a
moment; whoever reads from what `open_file` and `open_zip` give puts `retried` around all of it.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import pickle
import pickletools
import stat
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import InputError, did_you_mean
from common.retry import retried

DEFAULT_MB = 256
CONFIG_BYTES = 2**24  # of a file of settings; a run's own config.json lists its classes
_TOML_BYTES = 2**16  # its parser takes quadratic time
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_most = DEFAULT_MB * 2**20
_numbers = itertools.count()
_pending: dict[int, str] = {}


def limit_items(megabytes: float) -> None:
    """Set --max-item-mb for this process."""
    global _most
    _most = int(megabytes * 2**20)


def within(needed: int, what) -> None:
    """Refuse to allocate `needed` bytes where that is more than --max-item-mb.

    Raises:
        InputError: with both, and the value that would do.
    """
    if needed > _most:
        mb = -(-needed // 2**20)
        raise InputError(
            f"{what}: reading it takes {mb} MB, allowed are {_most // 2**20};"
            f" if that is meant, --max-item-mb {mb}"
        )


@contextlib.contextmanager
def pending(what) -> Iterator[None]:
    """Around what a dead file system would not come back from."""
    number = next(_numbers)
    _pending[number] = what
    try:
        yield
    finally:
        del _pending[number]


def oldest_pending() -> tuple[int, str] | None:
    """The read that has been waited for longest: a number of its own, and what is read."""
    return next(iter(list(_pending.items())), None)


def regular_status(path: str | Path) -> os.stat_result:
    """What the system says of a regular file, or of what a link leads to; nothing is opened.

    Raises:
        InputError: a folder, FIFO, socket or device.
        OSError: there is none, or it cannot be reached.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise InputError(f"{path} is {kind}, not a regular file")
    return status


def read_bytes(
    path: str | Path, most: int | None = None, *, large: bool = False, was_there: bool = False
) -> bytes:
    """A regular file of at most `most` bytes, or else --max-item-mb, or where it is `large` of any.

    Args:
        was_there: see `retried`.

    Raises:
        InputError: larger, not a regular file, or a placeholder for one.
        OSError: it cannot be read.
    """
    read = _read_large if large else _read_item
    return retried(lambda: read(path, most), path, was_there=was_there)


def _read_item(path: str | Path, most: int | None) -> bytes:
    with pending(path):
        size = regular_status(path).st_size
        if most is not None and size > most:
            raise InputError(f"{path} has {size} bytes, allowed are {most}")
        within(size, path)
        with open(path, "rb") as file:
            data = file.read(size)
    _refuse_placeholder(path, data[:200])
    return data


def _read_large(path: str | Path, _) -> bytes:
    with pending(path), open_file(path) as file:
        return file.read()


def open_file(path: str | Path, kind: type = io.BufferedReader) -> io.BufferedReader:
    """A regular file of any size, open for reading as `kind`, whose bytes are there.

    Raises:
        InputError: not a regular file, a placeholder for one, or one with holes: bytes that no disk
            holds, more than --max-item-mb.
        OSError: it cannot be read.
    """
    with pending(path):
        size = regular_status(path).st_size
        raw = io.FileIO(os.fspath(path))
        try:
            within(_holes(raw.fileno(), size), f"{path} is a sparse file of {size} bytes")
            raw.seek(0)
            file = kind(raw)
            _refuse_placeholder(path, file.peek(200)[:200])
        except BaseException:
            raw.close()
            raise
    return file


def _holes(descriptor: int, size: int) -> int:
    # Not by the blocks that stat counts: some file systems count late, or not at all.
    holes = 0
    position = 0
    with contextlib.suppress(OSError, AttributeError):  # a system or a device without them
        while position < size:
            begin = os.lseek(descriptor, position, os.SEEK_HOLE)
            try:
                position = os.lseek(descriptor, begin, os.SEEK_DATA)
            except OSError:  # nothing but the hole is left
                position = size
            holes += position - begin
    return holes


def _refuse_placeholder(path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-LFS pointer, not the file itself: run git lfs pull")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{path} is an HTML page, not the file itself: download it again")


class _Bounded(io.BufferedReader):
    """A file of which no single read takes more than --max-item-mb: zipfile reads the directory of
    an archive in one, as long as it says.
    """

    def read(self, size=-1):
        if size is None or not 0 <= size <= _most:
            left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
            within(left if size is None or size < 0 else min(size, left), self.name)
        return super().read(size)


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """A zip archive, whose members `read_member` reads.

    Raises:
        InputError: it is none, or not a regular file.
        OSError: it cannot be read.
    """
    with pending(path):
        try:
            return zipfile.ZipFile(open_file(path, _Bounded))
        except InputError:
            raise
        # Not only BadZipFile: names that are no text, versions and sizes that nothing has.
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
            raise InputError(f"{path}: not a readable zip archive: {error}") from None


def read_member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, large: bool = False) -> bytes:
    """The content of a member: an item, or where it is `large` all that the archive holds of it.

    Raises:
        InputError: see `check_unpacked`; an item is larger than --max-item-mb.
        Others: what zipfile raises on damaged archives.
    """
    check_unpacked([entry], entry.filename)
    if not large:
        packed = entry.compress_size if entry.compress_type == zipfile.ZIP_DEFLATED else 0
        within(entry.file_size + packed, entry.filename)
    with pending(entry.filename), archive.open(entry) as file:
        data = file.read(entry.file_size)  # not all that comes: no more than it declares
    if len(data) < entry.file_size:
        raise zipfile.BadZipFile(f"{entry.filename} is cut short")
    _refuse_placeholder(entry.filename, data[:200])
    return data


def check_unpacked(entries: list[zipfile.ZipInfo], what) -> None:
    """Refuse members that are together much larger than what the archive holds of them.

    Raises:
        InputError: by more than --max-item-mb; or by a method whose output zipfile does not bound.
    """
    within(sum(max(entry.file_size - entry.compress_size, 0) for entry in entries), what)
    for entry in entries:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{entry.filename}: zip it with the method deflate, or uncompressed")


def parse_json(data: bytes, what):
    """The value of a JSON text in UTF-8, -16 or -32.

    Raises:
        InputError: it would take more than --max-item-mb, or is nested too deeply.
        ValueError: it is no JSON, or an object of it has a name twice, of which one would be lost.
    """
    count = sum(data.count(sign) for sign in (b",", b":", b"[", b"{"))
    within(_text_bytes(data) + 48 * count, what)
    try:
        return json.loads(data, object_pairs_hook=_object)
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None


def _object(pairs: list[tuple]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        for name, _ in pairs:
            if name not in made:
                raise ValueError(f"{name!r} stands twice")
            del made[name]
    return made


def decode_table(data: bytes, what, encoding: str = "utf-8-sig") -> str:
    """The text of a table, a row a line.

    Raises:
        InputError: its rows would take more than --max-item-mb.
        UnicodeError: it is not of this encoding.
    """
    cells = data.count(b"\t") + data.count(b",")
    within(_text_bytes(data) + 400 * data.count(b"\n") + 64 * cells, what)
    return data.decode(encoding)


def csv_rows(data: bytes, what, needed: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line, cells by column) of every row of a .csv file; names of columns are in small letters.

    Cells are without the blanks around them, empty where a row is short.

    Raises:
        InputError: no such file; none of a `needed` column; two columns of one name; a row with
            more cells than the header.
    """
    try:
        text = io.StringIO(decode_table(data, what), newline="")
        table = csv.reader(text, strict=True)
        rows = [(table.line_num, [cell.strip() for cell in row]) for row in table]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{what} is not a readable .csv file in UTF-8: {error}") from None
    (_, header), *rows = [row for row in rows if any(row[1])] or [(1, [])]
    header = [name.lower() for name in header]
    lacking = [column for column in needed if column not in header]
    if lacking or not rows:
        hint = did_you_mean(lacking[0], header) if lacking else ""
        raise InputError(
            f"{what} has no {' or '.join(lacking) or 'rows'}; needed are {','.join(needed)},"
            f" its columns are {','.join(header)}{hint}"
        )
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise InputError(f"{what}: the column {twice[0]} stands twice in the header")
    for line, row in rows:
        if any(row[len(header) :]):
            raise InputError(
                f"{what} line {line}: {len(row)} cells, the header has {len(header)}; put a cell"
                " with a comma in quotes"
            )
    blanks = [""] * len(header)
    return [(line, dict(zip(header, row + blanks, strict=False))) for line, row in rows]


def _text_bytes(data: bytes) -> int:
    # One character beyond U+FFFF makes four bytes of each.
    return 2 * len(data) if data.isascii() else 5 * len(data)


def read_settings(path: Path):
    """The value of a .toml or .json file of settings.

    Raises:
        InputError: it cannot be read, or is nested too deeply.
        ValueError: it is neither.
    """
    try:
        if path.suffix == ".json":
            return parse_json(read_bytes(path, CONFIG_BYTES), path)
        return tomllib.loads(read_bytes(path, _TOML_BYTES).decode("utf-8-sig"))
    except RecursionError:
        raise InputError(f"{path} is nested too deeply") from None
    except OSError as error:
        raise InputError(error.strerror) from None


def check_memo(data: bytes, pickles: int = 1) -> None:
    """Refuse pickles, one after another, with an absurd index of an object: all up to the highest
    are allocated.

    Raises:
        UnpicklingError: it does.
    """
    stream = io.BytesIO(data)
    for _ in range(pickles):
        for op, arg, _ in pickletools.genops(stream):
            if op.name.endswith("PUT") and int(arg) > len(data):
                raise pickle.UnpicklingError("an absurd memo index")
