"""Images from a folder, a .zip of one, a packed file, or the embedded sample: one list of items, decoded by threads to
uint8. `python -m common.data pack SRC DST` makes a packed file.

Order is a function, not state: the permutation of an epoch depends on `(seed, epoch)` alone, so a resumed run, another
number of threads or of processes sees the same images in the same order.
"""

import functools
import hashlib
import io
import math
import os
import re
import sys
import threading
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.augment import uniform
from common.config import InputError, nearest
from common.sample import cytology

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif")
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
UNLABELLED = -1
# What Pillow and zipfile raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    Image.DecompressionBombError,
    zipfile.BadZipFile,
    zlib.error,
)
TEST_SHARE, FINETUNE_DEV_SHARE = 0.15, 0.15
_CACHE_BYTES = 2 * 2**30
_ORDER_STREAM = 2**31  # no view has this number
_DRAW_STREAM = 2**31 + 3  # beside the streams of clips
_CLASS_STREAMS = 2**32  # the first of one a class


class Images:
    """Images of one data set: ids, labels, splits, and their pixels as uint8 squares of side `store_size`.

    `pixels`, (n, ..., 3, S, S), are images decoded already.

    Attributes:
        name: what was read, for people.
        ids: (n,) names within the folder or archive.
        labels: (n,) int64 into `classes`; UNLABELLED where there is no label.
        splits: (n,) "train", "val", "test", or "" where the data names none.
        native_size: median shorter side of the images in pixels.
        store_size: side of the decoded squares in pixels.
        sizes: (n,) int64, bytes of the items' files; empty where there are none.
        num_bytes: what the items take where they lie.
        keeps: whether `batches` may keep what it has decoded.
        fingerprint: eight digits that stand for the content: names and sizes of all items.
    """

    # JPEG is decoded at a fraction of its size where that is enough for the squares.
    _drafts = True

    def __init__(
        self, name: str, ids: list[str], labels, classes: list[str], splits, *, sizes=(), read=None, pixels=None
    ):
        self.name, self.ids, self.classes = name, ids, classes
        self.labels, self.splits = np.asarray(labels, np.int64), np.asarray(splits, dtype=object)
        self._read_bytes, self._cache, self.keeps = read, pixels, True
        self.sizes = np.asarray(sizes, np.int64)
        self.num_bytes = sum(sizes) if pixels is None else pixels.nbytes
        self._cached = None if pixels is None else np.ones(len(ids), bool)
        content = f"{ids}{list(sizes)}".encode()
        if pixels is not None:
            content += hashlib.sha256(pixels.numpy().tobytes()).digest()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:8]
        self.native_size = pixels.shape[-1] if pixels is not None else self._probe()
        self.store_size = pixels.shape[-1] if pixels is not None else min(256, self.native_size)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def in_memory(self) -> bool:
        """Whether there are no files behind the images, which nothing can have damaged then."""
        return self._read_bytes is None

    @property
    def labelled(self) -> bool:
        return bool((self.labels != UNLABELLED).any())

    def describe(self) -> str:
        """`blood_cells.zip: 4886 images in 3 classes (RBC 4153, ...), ...`"""
        text = f"{self.name}: {len(self)} images{describe_labels(self.labels, self.classes, self.splits)}"
        return text + f"; {self.native_size} px, stored at {self.store_size} px"

    def labels_in(self, classes: list[str], indices: np.ndarray | None = None) -> np.ndarray:
        """The labels (n,) numbered as in `classes` (a model's); UNLABELLED for the images of other classes.

        Raises:
            InputError: one of the images `indices` has a label that is not in `classes`.
        """
        known = {name: number for number, name in enumerate(classes)}
        labels = np.array([known.get(name, UNLABELLED) for name in self.classes] + [UNLABELLED])[self.labels]
        for index in [] if indices is None else indices[labels[indices] != self.labels[indices]]:
            if labels[index] == UNLABELLED:
                unknown = self.classes[self.labels[index]]
                raise InputError(f"{self.name} has the class {unknown!r}, the model has {', '.join(classes)}")
        return labels

    def resize_store(self, size: int) -> None:
        """Decode to squares of another side (pixels)."""
        if self.in_memory and size != self.store_size:
            raise InputError(
                f"--store-size {size}: the embedded images are stored at {self.store_size} px; leave it out"
            )
        self.store_size = size

    def read(self, index: int) -> bytes:
        """The content of an item's file, where the items are not `in_memory`."""
        return self._read_bytes(index)

    def decode(self, index: int) -> Tensor:
        """One image as uint8 (3, store_size, store_size): shorter side to store_size, then the centre square.

        Raises:
            InputError: the file is damaged; the message names it.
        """
        if self.in_memory:
            return self._cache[index]
        try:
            with Image.open(io.BytesIO(self._read_bytes(index))) as image:
                if self._drafts:
                    image.draft("RGB", (self.store_size, self.store_size))
                if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits at 255 instead of scaling
                    image = Image.fromarray((np.asarray(image, np.uint32) // 257).astype(np.uint8))
                elif image.mode in ("I", "F"):
                    raise ValueError("32-bit pixels have no known range; save them with 8 or 16 bits")
                return self._cut(image.convert("RGB"), index)
        except DECODE_ERRORS as error:
            raise self._damaged(f"image {self.ids[index]}", error) from None

    def _cut(self, image: Image.Image, index: int) -> Tensor:
        return central_square(image, self.store_size)

    @property
    def _shape(self) -> tuple[int, ...]:
        # Of what `_cut` gives.
        return (3, self.store_size, self.store_size)

    def _damaged(self, item: str, error: Exception) -> InputError:
        said = reason(error)
        return InputError(f"{item} in {self.name} cannot be read: {said}; mend or remove it, or --bad-images skip")

    def _probe(self) -> int:
        # Headers only: the sizes of up to 64 images spread over the set.
        sides = []
        for index in np.unique(np.linspace(0, len(self) - 1, 64).astype(int)):
            try:
                with Image.open(io.BytesIO(self._read_bytes(index))) as image:
                    sides.append(min(image.size))
            except DECODE_ERRORS:
                continue  # decoding it later names the file, or skips it
        if not sides:
            raise InputError(f"{self.name}: none of the images that were tried can be read (first: {self.ids[0]})")
        return int(np.median(sides))

    def batches(self, index_batches: Iterable[np.ndarray], workers: int) -> Iterator[Tensor]:
        """The pixels of each batch of indices, uint8 (b, 3, store_size, store_size), decoded by threads ahead of use.

        A set that fits in 2 GiB is decoded once and kept. Threads, not processes: Pillow decodes and resizes without
        holding the interpreter lock, and a thread cannot outlive the run.
        """
        small = len(self) * math.prod(self._shape) <= _CACHE_BYTES
        if self.keeps and small and self._cache is None and self._cached is None:
            self._cache = torch.empty((len(self), *self._shape), dtype=torch.uint8)
            self._cached = np.zeros(len(self), bool)
        ahead: deque = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for indices in index_batches:
                    ahead.append((indices, self._submit(pool, indices)))
                    if len(ahead) > 2:
                        yield self._collect(*ahead.popleft())
                while ahead:
                    yield self._collect(*ahead.popleft())
            finally:
                for _, groups in ahead:
                    for _, future in groups:
                        future.cancel()

    def _groups(self, indices: np.ndarray) -> list[np.ndarray]:
        # What one thread decodes in one go.
        return list(indices[:, None])

    def _decode_group(self, indices: np.ndarray) -> list[Tensor]:
        return [self.decode(int(index)) for index in indices]

    def _submit(self, pool: ThreadPoolExecutor, indices: np.ndarray) -> list:
        wanted = np.unique(indices)
        if self._cached is not None:
            wanted = wanted[~self._cached[wanted]]
        return [(group, pool.submit(self._decode_group, group)) for group in self._groups(wanted)]

    def _collect(self, indices: np.ndarray, groups: list) -> Tensor:
        decoded = {int(i): part for group, future in groups for i, part in zip(group, future.result(), strict=True)}
        if self._cache is None:
            return torch.stack([decoded[int(i)] for i in indices])
        for index, pixels in decoded.items():
            self._cache[index] = pixels
            self._cached[index] = True
        return self._cache.index_select(0, torch.from_numpy(np.asarray(indices, np.int64)))

    def drop_damaged(self, workers: int, cap: float = 0.01) -> list[str]:
        """Decode every image once and leave out those that cannot be read; returns their names.

        Raises:
            InputError: more than the share `cap` of the images is damaged.
        """

        def damaged(index: int) -> bool:
            try:
                self.decode(index)
            except InputError:
                return True
            return False

        if self.in_memory:
            return []
        with ThreadPoolExecutor(workers) as pool:
            bad = np.array(list(pool.map(damaged, range(len(self)))), bool)
        names = [self.ids[i] for i in np.flatnonzero(bad)]
        if bad.sum() > cap * len(self):
            raise InputError(
                f"{self.name}: {bad.sum()} of {len(self)} images are damaged (first: {names[0]}), more than"
                f" --bad-images skip allows ({cap:.0%})"
            )
        if names:
            kept, read = np.flatnonzero(~bad), self._read_bytes
            self.ids = [self.ids[i] for i in kept]
            self.labels, self.splits, self.sizes = self.labels[kept], self.splits[kept], self.sizes[kept]
            self._read_bytes = lambda index: read(kept[index])
        return names


def prepare(path: str, *, store_size: int | None, bad: str, workers: int, say=print) -> Images:
    """`open_images`, decoded to `store_size` where that is given; damaged ones are left out where `bad` is "skip"."""
    images = open_images(path)
    if store_size:
        images.resize_store(store_size)
    if bad == "skip":
        dropped = images.drop_damaged(workers)
        say(f"left out {len(dropped)} damaged images" + (f", the first is {dropped[0]}" if dropped else ""))
    say(images.describe())
    return images


def open_images(path: str) -> Images:
    """The images of a folder, of a .zip, of a packed file (`common.pack`), or of the embedded data set (`sample`).

    A folder of folders gives the labels; `train/`, `val/` (or dev) and `test/` above them give the splits; images in no
    folder are unlabelled. One folder that holds everything is looked through.

    Raises:
        InputError: missing, not readable, or without images.
    """
    if path == "sample":
        pixels, labels, classes = cytology()
        ids = [f"{classes[label]}/{i:05d}.png" for i, label in enumerate(labels)]
        return Images(
            "sample (embedded, generated)", ids, labels, classes, [""] * len(ids), pixels=torch.from_numpy(pixels)
        )
    from common import pack  # which packs what this module opens

    place = Path(path)
    if place.suffix == pack.SUFFIX and place.is_file():
        return pack.PackedImages(place)
    files, sizes, read = list_files(path, is_image)
    if not files:
        raise InputError(f"{path}: no images there; allowed are {', '.join(SUFFIXES)}")
    ids, splits, names = _layout(files, path)
    classes = sorted({name for name in names if name is not None})
    number = {name: i for i, name in enumerate(classes)}
    labels = [UNLABELLED if name is None else number[name] for name in names]
    return Images(place.name, ids, labels, classes, splits, sizes=sizes, read=read)


def central_square(image: Image.Image, side: int) -> Tensor:
    """An RGB image with its shorter side resized to `side` pixels, cut to the square: uint8 (3, side, side)."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != (side, side):
        image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def is_image(name: str) -> bool:
    """Whether a name has an image's suffix and neither it nor a folder above is hidden."""
    return name.lower().endswith(SUFFIXES) and not hidden(name)


def reason(error: Exception) -> str:
    """The first line of an error's message without addresses of objects, which no two runs share; or else its type."""
    return re.sub(r" <\S+ object at 0x\w+>", "", str(error).split("\n")[0]) or type(error).__name__


def hidden(name: str) -> bool:
    """Whether a path has a part that starts with a dot, or is macOS's shadow of an archive's file."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def list_files(path: str, keep) -> tuple[list[str], list[int], Callable[[int], bytes]]:
    """The files of a folder or of a .zip whose relative name passes `keep`: sorted names, sizes in bytes, and a
    function from a position in these lists to the file's content.

    Raises:
        InputError: missing or not readable.
    """
    place = Path(path)
    if not place.exists():
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise InputError(f"{path}: no such file or folder{nearest(place.name, [*siblings, 'sample'])}")
    return _zip_files(place, keep) if place.is_file() else _folder_files(place, keep)


def _folder_files(folder: Path, keep):
    found, seen = [], set()

    def refuse(error: OSError):
        raise error

    try:
        for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
            base = Path(directory)
            seen.add(base.resolve())
            # A link back up would give every image many times over.
            subfolders[:] = [name for name in subfolders if (base / name).resolve() not in seen]
            found += [(base / name).relative_to(folder).as_posix() for name in names]
        files = sorted(name for name in found if keep(name))
        sizes = [(folder / name).stat().st_size for name in files]
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: {error.filename}") from None
    return files, sizes, lambda index: (folder / files[index]).read_bytes()


def _zip_files(path: Path, keep):
    if path.suffix.lower() != ".zip":
        raise InputError(f"{path}: allowed are a folder, a .zip of one, or `sample`")
    try:
        archive = zipfile.ZipFile(path)  # kept open for the run; closed with the process
        entries = sorted((e for e in archive.infolist() if keep(e.filename)), key=lambda e: e.filename)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable zip archive: {error}") from None
    lock = threading.Lock()

    def read(index: int) -> bytes:
        with lock:  # one file handle; decompression is short beside decoding
            return archive.read(entries[index])

    return [e.filename for e in entries], [e.file_size for e in entries], read


def _layout(files: list[str], path: str) -> tuple[list[str], list[str], list[str | None]]:
    # Name below the folder that holds everything (the same in a folder and in any archive of it), split and class name.
    parts = [PurePosixPath(name).parts for name in files]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1 and parts[0][0].lower() not in SPLITS:
        parts = [p[1:] for p in parts]
    ids = ["/".join(p) for p in parts]
    splits = [SPLITS.get(p[0].lower(), "") if len(p) > 1 else "" for p in parts]
    if any(splits):
        if not all(splits):
            stray = ids[splits.index("")]
            raise InputError(
                f"{path}: {stray} is in none of the splits {', '.join(sorted(set(splits) - {''}))}; move it"
            )
        parts = [p[1:] for p in parts]
    return ids, splits, [p[0] if len(p) > 1 else None for p in parts]


def by_name(ids: list[str], indices: np.ndarray, salt: str) -> list[int]:
    """`indices` in the order of a hash of their items' names: as good as chance, and always the same."""
    return sorted(indices, key=lambda i: hashlib.blake2b(f"{salt}/{ids[i]}".encode(), digest_size=8).digest())


def hold_out(ids: list[str], labels: np.ndarray, indices: np.ndarray, share: float, salt: str) -> np.ndarray:
    """A class-stratified share of `indices`, chosen by a hash of the item's name: sorted int64.

    It depends on nothing else, so every run and every stage holds out the same items; shares are nested, and items
    added later do not move the others from one side to the other at random. Each class gives round(share * its count),
    at least one when it has two or more items and 0 < share < 1.
    """
    chosen: list[int] = []
    for label in np.unique(labels[indices]):
        members = by_name(ids, indices[labels[indices] == label], salt)
        count = round(share * len(members))
        if 0 < share < 1 and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        chosen += members[:count]
    return np.array(sorted(chosen), np.int64)


def split(images: Images, fraction: float = 1.0) -> dict[str, np.ndarray]:
    """The indices of every part of an image set.

    `test` and `finetune_test` (here the same): the data's own test split, or 15 % held out. `rest`: all else. `dev`:
    the data's own validation split, or a part of the labelled rest: 70/15/15 in all for the linear protocol, and
    (`finetune_dev`) 15 % of the training labels for fine-tuning. `train` and `finetune_train`: the labelled rest
    without it. `pretrain`: the share `fraction` of the rest, used without its labels. Everything is stratified by class
    and depends on the items' names alone, so no stage of any run trains on the test part.
    """
    ids, labels = images.ids, images.labels
    test, own_dev = (np.flatnonzero(images.splits == name) for name in ("test", "val"))
    candidates = np.setdiff1d(np.flatnonzero(labels != UNLABELLED), own_dev)
    if not len(test):
        test = hold_out(ids, labels, candidates, TEST_SHARE, "test")
    rest = np.setdiff1d(np.arange(len(images)), test)
    labelled = rest[labels[rest] != UNLABELLED]
    parts = {"rest": rest, "test": test[labels[test] != UNLABELLED]}
    for name, share in (("", TEST_SHARE / (1 - TEST_SHARE)), ("finetune_", FINETUNE_DEV_SHARE)):
        own = np.intersect1d(own_dev, labelled)
        parts[f"{name}dev"] = own if len(own) else hold_out(ids, labels, labelled, share, "dev")
        parts[f"{name}train"] = np.setdiff1d(labelled, parts[f"{name}dev"])
    parts["finetune_test"] = parts["test"]
    parts["pretrain"] = hold_out(ids, labels, rest, fraction, "fraction")
    return parts


def describe_labels(labels: np.ndarray, classes: list[str], splits: np.ndarray) -> str:
    """` in 3 classes (RBC 4153, ...); splits train 10, test 5`, or ` without labels`: what follows a set's size."""
    known = labels[labels != UNLABELLED]
    text = " without labels"
    if len(known):
        counts = np.bincount(known, minlength=len(classes))
        shown = ", ".join(f"{classes[i]} {counts[i]}" for i in np.argsort(-counts, kind="stable")[:10])
        text = f" in {len(classes)} classes ({shown}{', ...' if len(classes) > 10 else ''})"
    named = [f"{name} {int((splits == name).sum())}" for name in ("train", "val", "test") if (splits == name).any()]
    return text + (f"; splits {', '.join(named)}" if named else "")


def permutation(count: int, seed: int, epoch: int, stream: int = _ORDER_STREAM) -> np.ndarray:
    """The order of an epoch: a permutation of range(count) that is a function of (seed, epoch, stream)."""
    keys = uniform(seed, epoch, np.arange(count), stream, 1)[:, 0]
    return np.argsort(keys, kind="stable")


def epoch_batches(indices: np.ndarray, bs: int, seed: int, epoch: int, done: int = 0, facts=None) -> list[np.ndarray]:
    """An epoch's batches but for the first `done`: this process's equal share of each, as items of `indices`.

    The last, incomplete batch is left out; another epoch's order has other items there.
    """
    return cut(indices[permutation(len(indices), seed, epoch)], bs, done, facts)


def cut(order: np.ndarray, bs: int, done: int = 0, facts=None) -> list[np.ndarray]:
    """The batches of an epoch whose items come in `order`, as `epoch_batches` gives them."""
    rank, world_size = (facts.rank, facts.world_size) if facts else (0, 1)
    share = bs // world_size
    starts = [batch * bs + rank * share for batch in range(done, len(order) // bs)]
    return [order[start : start + share] for start in starts]


def balanced_batches(
    indices: np.ndarray, labels: np.ndarray, bs: int, seed: int, epoch: int, done: int = 0, facts=None
) -> list[np.ndarray]:
    """As `epoch_batches`, but every batch holds as many items of each class, to within one; none twice.

    An epoch has as many batches as without balance. Each class is gone through in permutations of its own, from one
    epoch to the next, so that every item is drawn about equally often within its class. A process's share is balanced
    too, and so is every chunk of it.

    Args:
        indices: (n,) items to draw from.
        labels: (n,) their classes, integers.

    Raises:
        InputError: a class has fewer items than a batch needs.
    """
    rank, world_size = (facts.rank, facts.world_size) if facts else (0, 1)
    classes, share, steps = np.unique(labels), bs // world_size, len(indices) // bs
    need = -(-bs // len(classes))
    members = [indices[labels == label] for label in classes]
    order_of = functools.lru_cache(maxsize=len(classes))(permutation)
    for label, own in zip(classes, members, strict=True):
        if len(own) < need:
            raise InputError(f"a balanced batch of {bs} needs {need} items of class {label}, which has {len(own)}")

    def drawn(number: int, batch: int) -> np.ndarray:
        cycle, place = divmod(batch, len(members[number]) // need)
        order = order_of(len(members[number]), seed, cycle, _CLASS_STREAMS + number)
        return members[number][order[place * need :][:need]]

    batches = []
    for batch in range(epoch * steps + done, (epoch + 1) * steps):
        columns = np.stack([drawn(number, batch) for number in range(len(classes))], 1)  # [need, classes]
        # Where the batch does not divide into the classes, another one is short each time.
        items = np.roll(columns, batch, axis=1).ravel()[:bs]
        batches.append(items[rank * share :][:share])
    return batches


def class_weights(counts: np.ndarray, cap: float | None) -> np.ndarray:
    """How much more often than by chance each class is to be drawn: (K,) float64 min(N / (K n_c), cap).

    Without a cap every class is drawn equally often; a cap leaves rare classes rare, but less so.
    """
    weights = counts.sum() / (len(counts) * counts)
    return weights if cap is None else np.minimum(weights, cap)


def weighted_order(indices: np.ndarray, weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """An epoch's items drawn with replacement, each by its weight: (n,) of `indices`.

    Draw i is a function of (seed, epoch, i).

    Args:
        indices: (n,) items to draw from.
        weights: (n,) positive.
    """
    edges = np.cumsum(weights)
    u = uniform(seed, epoch, np.arange(len(indices)), _DRAW_STREAM, 1)[:, 0] * edges[-1]
    # A product with the last edge may round up to it.
    return indices[np.minimum(np.searchsorted(edges, u, side="right"), len(indices) - 1)]


def check_batch(stage: str, bs: int, count: int, parts: int) -> None:
    """Refuse a batch that is larger than the data or does not divide into `parts` (processes x chunks)."""
    if bs > count:
        raise InputError(f"{stage}: a batch of {bs} is larger than the {count} training items; lower --bs")
    if bs % parts:
        raise InputError(f"{stage}: a batch of {bs} is not divisible by {parts} (processes x chunks); change --bs")


if __name__ == "__main__":
    from common.pack import main

    sys.exit(main())
