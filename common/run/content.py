"""What a run remembers of its data: a digest of the bytes of every file that it has read.

A data set's fingerprint, which names the run, is of names, sizes and labels: a listing gives it.
What a listing cannot show, other bytes under the same name and size, is found by these digests.
They are taken when a file is first read, so that nothing is read for their sake, and kept in the
run directory in a file of their own.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common.errors import InputError, first_few, plural
from common.run import checkpoint, dist
from common.run.files import CONTENT

# Files whose keys have changed are read again before the first step: at most so many, and bytes.
_TRIED = 256
_TRIED_BYTES = 256 * 2**20
_FIELDS = {"order", "names", "facts", "digests", "keys", "crc"}
# What reading a file raises. Decoding it later names the file.
_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def digest(content: bytes) -> int:
    """63 bits of BLAKE2b, never 0."""
    hashed = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(hashed, "little") >> 1 or 1


def file_key(*facts: int) -> int:
    """A key as `Content` takes it, of what tells one state of a file from another."""
    return hash(facts) & (2**63 - 1)  # of integers alone, so it is the same in every process


def codes(texts) -> np.ndarray:
    """A fact as `Content` takes it: (n,) int64 that stand for n texts or byte strings."""
    parts = (t.encode("utf-8", "surrogateescape") if isinstance(t, str) else t for t in texts)
    return np.array([zlib.crc32(part) for part in parts], np.int64)


class OtherContent(InputError):
    """A file has other bytes than when the run first read it: it is not damaged."""


class Content:
    """The content of a data set's n files, or rows of a table, as far as it is known.

    A digest of 0 is not known, a key of 0 is never equal to another.

    Args:
        names: n names, each once.
        read: gives the bytes of a file; None: the digests are known, or cannot be.
        keys: n integers in [0, 2**63) that change when a file is written, copied or replaced.
        facts: what the listing says of each file, by name: n integers each.
        digests: n integers, where they are known.
        crc: n integers, the CRC-32 of the decoded images of a packed file.
        in_memory: `read` costs nothing, and the fingerprint is of all bytes.
        unit: the word for a file.
    """

    def __init__(
        self,
        names: list[str],
        read: Callable[[int], bytes] | None,
        *,
        keys=(),
        facts=None,
        digests=None,
        crc=None,
        in_memory: bool = False,
        unit: str = "file",
    ):
        count = len(names)
        self.names = names
        self.facts = dict(facts or {})
        self.unit = unit
        self._read = read
        self._in_memory = in_memory
        self._keys = np.asarray(keys, np.int64) if len(keys) else np.zeros(count, np.int64)
        self._own = np.zeros(count, np.int64) if digests is None else digests  # of this process
        self._crc = crc
        self._stored = np.zeros(count, np.int64)  # of earlier starts of the run
        self._stored_keys = self._stored
        self._stored_crc = self._stored
        self._trusted = np.zeros(count, bool)  # the key is that of the stored digest
        self._said = np.zeros(count, bool)
        self._hashes: np.ndarray | None = None
        self._allowed = False  # by --force-resume
        self._is_new = True
        self._file: Path | None = None

    def read(self, index: int) -> bytes:
        """The bytes of a file.

        Raises:
            OtherContent: they are others than when the run first read them.
        """
        content = self._read(index)
        if not self._own[index] and not self._trusted[index]:
            value = digest(content)
            if self._stored[index] not in (0, value) and not self._allowed:
                raise self._refusal(f"{self.names[index]} has")
            self._own[index] = value
            self._is_new = True
        return content

    def digests(self) -> np.ndarray:
        """(n,) int64, 0 where a file was not read yet."""
        return np.where(self._own, self._own, self._stored)

    def differences(self, record: dict) -> str:
        """What is not as in a record of `load`, in words; empty where it tells no difference."""
        self._digest_rows()
        rows = self._rows_in(record)
        new = np.flatnonzero(rows < 0)
        same = np.flatnonzero(rows >= 0)
        missing = len(record["names"]) - len(same)
        texts = []
        if len(new):
            texts.append(f"{self._count(new)} new ({self._first(new)})")
        if missing:
            texts.append(f"{plural(missing, self.unit)} missing")
        now = self.facts | {"content": self._own}
        before = record["facts"] | {"content": record["digests"]}
        for name in sorted(now.keys() & before.keys()):
            here, there = now[name][same], before[name].numpy()[rows[same]]
            changed = here != there
            if name == "content":
                changed &= (here != 0) & (there != 0)
            if changed.any():
                which = same[changed]
                texts.append(f"{self._count(which)} with another {name} ({self._first(which)})")
        return ", ".join(texts)

    def take_over(self, record: dict | None, folder: Path, world, *, force: bool, workers: int):
        """Go on from the record of the run in `folder`; None: there is none. All ranks call this.

        Files whose key is another than then are read again, the first ones here and the others when
        they are needed.

        Raises:
            InputError: content has changed, on any rank, and `force` does not allow it.
        """
        self._file = folder / CONTENT
        self._allowed = force
        changed, tried = np.zeros(0, np.int64), 0
        if record is not None:
            changed, tried = self._compare(record, workers)
        others = torch.tensor(len(changed), device=world.device)
        if force or not dist.all_reduce(others, "max"):
            self._say(changed, world.say)
            return
        if not len(changed):
            raise self._refusal("on another rank there is data that has")
        raise self._refusal(
            f"{len(changed)} of {plural(tried, self.unit)} that were compared"
            f" ({self._first(changed)}) have"
        )

    def _compare(self, record: dict, workers: int) -> tuple[np.ndarray, int]:
        # The files whose content has changed, and how many could be compared.
        rows = self._rows_in(record)
        same = np.flatnonzero(rows >= 0)

        def stored(name: str) -> np.ndarray:
            values = np.zeros(len(self.names), np.int64)
            values[same] = record[name].numpy()[rows[same]]
            return values

        self._stored = stored("digests")
        self._stored_keys = stored("keys")
        self._stored_crc = stored("crc")
        if len(same) == len(rows):
            # Some only another form of the data has, such as the sizes behind a packed file.
            facts = {name: values.numpy()[rows] for name, values in record["facts"].items()}
            self.facts = facts | self.facts
        known = self._stored != 0
        if self._in_memory:
            self._trusted = known
            return np.zeros(0, np.int64), 0
        equal_key = (self._keys == self._stored_keys) & (self._keys != 0)
        self._trusted = known & (self._own == 0) & equal_key
        if self._read is not None:
            moved = np.flatnonzero(known & (self._own == 0) & ~self._trusted)[:_TRIED]
            if "size" in self.facts:
                few = np.cumsum(self.facts["size"][moved]) <= _TRIED_BYTES
                moved = moved[: max(int(few.sum()), 1)]
            with ThreadPoolExecutor(workers) as pool:
                self._own[moved] = list(pool.map(self._digest_of, moved.tolist()))
        compared = known & (self._own != 0)
        changed = compared & (self._own != self._stored)
        if self._crc is not None:
            had_crc = self._stored_crc != 0
            compared |= had_crc
            changed |= had_crc & (self._crc != self._stored_crc)
        return np.flatnonzero(changed), int(compared.sum())

    def _digest_of(self, index: int) -> int:
        try:
            return digest(self._read(index))
        except _UNREADABLE:
            return 0

    def _digest_rows(self) -> None:
        if self._in_memory:
            for index in np.flatnonzero(self.digests() == 0):
                self._own[index] = digest(self._read(int(index)))

    def save(self, world, say) -> None:
        """Write what is new of all ranks, and say what --force-resume lets pass. All ranks call
        this.

        Raises:
            InputError: two ranks have read other bytes under one name.
            OSError: the disk is full or not writable.
        """
        if self._file is None:
            return
        is_new = torch.tensor(int(self._is_new), device=world.device)
        if not dist.all_reduce(is_new, "max"):
            return
        self._is_new = False  # before the digests are copied: threads go on reading
        self._digest_rows()
        own, keys = self._merged(world)
        self._say(np.flatnonzero((own != 0) & (self._stored != 0) & (own != self._stored)), say)
        if not world.is_main:
            return
        record = {
            "order": self._order(),
            "names": self._name_hashes(),
            "facts": self.facts,
            "digests": np.where(own, own, self._stored),
            # Of a file that nobody has read again the key of its digest.
            "keys": np.where(own, keys, np.where(self._trusted, self._keys, self._stored_keys)),
            "crc": self._stored_crc if self._crc is None else self._crc,
        }
        checkpoint.save(self._file, _as_tensors(record))

    def verified(self, world) -> np.ndarray:
        """(n,) int64 digests of the bytes that are there now, 0 where they are not known for
        certain. All ranks call this.
        """
        own, _ = self._merged(world)
        return np.where(own, own, np.where(self._trusted, self._stored, 0))

    @property
    def form(self) -> str:
        """Digits that stand for a packed file's images, which its source's digests do not."""
        return "" if self._crc is None else hashlib.blake2b(self._crc, digest_size=8).hexdigest()

    def _merged(self, world) -> tuple[np.ndarray, np.ndarray]:
        # What all ranks have read: digests and the keys of the files then.
        own = self._own.copy()
        keys = np.where(own, self._keys, 0)
        if world.world_size == 1:
            return own, keys
        rows = torch.from_numpy(np.stack([own, keys])).to(world.device)
        merged, keys = dist.all_reduce(rows, "max").cpu().numpy()
        differing = np.flatnonzero((own != 0) & (own != merged))
        others = torch.tensor(len(differing), device=world.device)
        if dist.all_reduce(others, "max"):
            names = f": {self._first(differing)}" if len(differing) else ""
            raise InputError(
                f"the ranks read other bytes under the same names{names}; give all of them the"
                " same data"
            )
        return merged, keys

    def _say(self, changed: np.ndarray, say) -> None:
        new = changed[~self._said[changed]]
        if len(new):
            self._said[new] = True
            say(
                f"--force-resume goes on with data whose content has changed:"
                f" {self._count(new)} ({self._first(new)})"
            )

    def _refusal(self, what: str) -> OtherContent:
        return OtherContent(
            f"{what} other content than when the run in {self._file.parent} read the data: put it"
            " back, give another --out, or --force-resume goes on with what is there"
        )

    def _count(self, indices: np.ndarray) -> str:
        return plural(len(indices), self.unit)

    def _first(self, indices: np.ndarray) -> str:
        return first_few([self.names[i] for i in indices])

    def _order(self) -> str:
        names = "\0".join(self.names).encode("utf-8", "surrogateescape")
        return hashlib.blake2b(names, digest_size=8).hexdigest()

    def _name_hashes(self) -> np.ndarray:
        if self._hashes is None:
            encoded = (name.encode("utf-8", "surrogateescape") for name in self.names)
            self._hashes = np.fromiter(map(digest, encoded), np.int64, len(self.names))
        return self._hashes

    def share_in(self, record: dict) -> float:
        """The share of the names that stand in a record of `load`."""
        return float((self._rows_in(record) >= 0).mean())

    def _rows_in(self, record: dict) -> np.ndarray:
        # (n,) where each name stands in a record; -1: it does not.
        stored = record["names"].numpy()
        if record["order"] == self._order():
            self._hashes = stored
            return np.arange(len(self.names))
        order = np.argsort(stored, kind="stable")
        at = np.searchsorted(stored[order], self._name_hashes())
        rows = order[np.minimum(at, len(order) - 1)]
        return np.where(stored[rows] == self._name_hashes(), rows, -1)


def content_of(data) -> Content | None:
    """What is known of the content of a script's data set; None: there are no files behind it."""
    return getattr(getattr(data, "table", data), "content", None)


def load(folder: Path, say) -> dict | None:
    """The record of the run in `folder`; None where there is none, or where it is damaged."""
    file = folder / CONTENT
    if not file.exists():
        return None
    try:
        record = checkpoint.load(file)
        if not _is_record(record):
            raise InputError(f"{file} is no record of a data set's content")
    except InputError as error:
        say(f"{error}; whether the data has changed is not known")
        return None
    return record


def _is_record(record) -> bool:
    if not isinstance(record, dict) or not record.keys() >= _FIELDS:
        return False
    if not isinstance(record["facts"], dict):
        return False
    columns = [record[name] for name in ("names", "digests", "keys", "crc")]
    columns += record["facts"].values()
    if not all(isinstance(column, torch.Tensor) for column in columns):
        return False
    return len({column.shape for column in columns}) == 1 and columns[0].dim() == 1


def _as_tensors(record: dict) -> dict:
    tensors = {}
    for name, value in record.items():
        if isinstance(value, dict):
            value = _as_tensors(value)
        elif isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        tensors[name] = value
    return tensors
