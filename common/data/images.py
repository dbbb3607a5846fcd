"""Images from a folder, a .zip of one, a packed file, or the embedded sample.

They are one list of items, decoded by threads to uint8. `python -m common.data pack SRC DST` makes
a packed file.
"""

import contextlib
import ctypes
import hashlib
import io
import itertools
import math
import operator
import os
import re
import threading
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image, features
from torch import Tensor

from common import amp, live, reading
from common.errors import AGAIN, TRANSIENT, InputError, did_you_mean, plural, printable
from common.retry import patience, retried
from common.run.content import Content, OtherContent, file_key

# What Pillow may take a file for, whatever its name: other formats start programs of their own.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".apng"),
)
if features.check("avif"):
    FORMATS += ("AVIF",)
    SUFFIXES += (".avif",)
if features.check("jpg_2000"):
    FORMATS += ("JPEG2000",)
    SUFFIXES += (".jp2", ".j2k", ".jpf", ".jpx")
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_NEARLY_SPLIT = re.compile(
    f"(?:^|[^a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})"
    "(?:set|data|images|videos|list)?(?![a-z])"
)
UNLABELED = -1
# What systems and file servers put beside files: shadows, thumbnails, bins.
SYSTEM_FOLDERS = (
    *("__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot"),
    *("$RECYCLE.BIN", "System Volume Information", "lost+found"),
)
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
# What `Images.decode` does, for who uses a model without it.
SQUARE = (
    "turned by its EXIF orientation, to RGB, the shorter side to store_size or at most 256"
    " (antialiased bilinear), the center square"
)
_CACHE_BYTES = 2 * 2**30
_TRIED = 64  # frames of a video that `Images.damaged` holds at once
# What turns an image of each EXIF orientation upright; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What is odd in a file and can still be read fills no console; what cannot is said by `decode`.
warnings.filterwarnings("ignore", module="PIL")
with contextlib.suppress(OSError, AttributeError):  # not in every build of Pillow
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # libtiff prints by itself
Image.MAX_IMAGE_PIXELS = None  # `check_pixels` bounds what is decoded, by --max-item-mb


class Images:
    """Images of one data set: ids, labels, splits, and pixels as uint8 squares.

    `pixels`, (n, ..., 3, S, S), are images decoded already.

    Attributes:
        name: what was read, for messages.
        ids: (n,) names within the folder or archive.
        labels: (n,) int64 into `classes`; UNLABELED where there is no label.
        splits: (n,) "train", "val", "test", or "" where the data names none.
        groups: (n,) names of what stays together, see `common.data.groups`; None: nothing does.
        note: what `describe` adds.
        native_size: median shorter side of the images in pixels.
        aspect: median of longer side / shorter side of those that were looked at.
        store_size: side of the decoded squares in pixels.
        sizes: (n,) int64, bytes of the items' files; empty where there are none.
        num_bytes: what the items take where they lie.
        keeps: whether `batches` may keep what it has decoded.
        fingerprint: eight digits that stand for the listing: names and sizes of all items.
        content: what is known of the bytes of the items' files; None where there are none.
    """

    # JPEG is decoded at a fraction of its size where that is enough for the squares.
    _drafts = True
    groups: np.ndarray | None = None
    aspect = 1.0
    note = ""
    _white = 65535  # the level of 16-bit pixels that becomes 255, where a file names none

    def __init__(
        self,
        name: str,
        ids: list[str],
        labels,
        classes: list[str],
        splits,
        *,
        sizes=(),
        keys=(),
        read=None,
        pixels=None,
    ):
        self.name = name
        self.ids = ids
        self.classes = classes
        self.labels = np.asarray(labels, np.int64)
        self.splits = np.asarray(splits, dtype=object)
        self.sizes = np.asarray(sizes, np.int64)
        self.content = None
        if pixels is None:
            self.content = Content(ids, read, keys=keys, facts={"size": self.sizes})
        self._read_bytes = self.content and self.content.read
        self._cache = pixels
        self.keeps = True
        self.num_bytes = sum(sizes) if pixels is None else pixels.nbytes
        self._cached = None if pixels is None else np.ones(len(ids), bool)
        content = b"" if pixels is None else hashlib.sha256(pixels.numpy().tobytes()).digest()
        self.fingerprint = listing_fingerprint(ids, sizes, content)
        self.native_size = pixels.shape[-1] if pixels is not None else self._probe()
        self.store_size = pixels.shape[-1] if pixels is not None else min(256, self.native_size)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def in_memory(self) -> bool:
        """Whether there are no files behind the images, which nothing can have damaged then."""
        return self._read_bytes is None

    @property
    def labeled(self) -> bool:
        return bool((self.labels != UNLABELED).any())

    def describe(self) -> str:
        """`blood_cells.zip: 4886 images in 3 classes (RBC 4153, ...), ...`"""
        labels = describe_labels(self.labels, self.classes, self.splits)
        sizes = f"{self.native_size} px, stored at {self.store_size} px"
        return f"{self.name}: {plural(len(self), 'image')}{labels}; {sizes}{self.note}"

    def labels_in(self, classes: list[str], indices: np.ndarray | None = None) -> np.ndarray:
        """The labels (n,) numbered as in `classes` (a model's).

        UNLABELED for the images of other classes.

        Raises:
            InputError: one of the images `indices` has a label that is not in `classes`.
        """
        number = {name: i for i, name in enumerate(classes)}
        # The last entry is that of UNLABELED, which is -1.
        numbers = np.array([number.get(name, UNLABELED) for name in self.classes] + [UNLABELED])
        labels = numbers[self.labels]
        if indices is not None:
            lost = indices[(labels[indices] == UNLABELED) & (self.labels[indices] != UNLABELED)]
            if len(lost):
                unknown = self.classes[self.labels[lost[0]]]
                raise InputError(
                    f"{self.name} has the class {unknown!r}, the model has {', '.join(classes)}"
                )
        return labels

    def faster(self, workers: int) -> list[str]:
        """What would speed `batches` up, in the words of the command line."""
        cores = os.cpu_count() or 1
        ways = [f"--workers {cores}"] if workers < cores else []
        if self.in_memory:  # or packed
            return ways
        return ["python -m common.data pack", *ways, f"--store-size below {self.store_size}"]

    def resize_store(self, size: int) -> None:
        """Decode to squares of another side (pixels)."""
        if self.in_memory and size != self.store_size:
            raise InputError(
                f"--store-size {size}: the embedded images are stored at {self.store_size} px;"
                " leave it out"
            )
        self.store_size = size

    def read(self, index: int) -> bytes:
        """The content of an item's file, where the items are not `in_memory`."""
        return self._read_bytes(index)

    def decode(self, index: int) -> Tensor:
        """One image as uint8 (3, store_size, store_size).

        The image is turned as its EXIF orientation says, the shorter side is resized to store_size,
        then the center square is cut.

        Raises:
            InputError: the file is damaged; the message names it.
        """
        if self.in_memory:
            return self._cache[index]
        try:
            content = self._read_bytes(index)
            with open_image(content) as image:
                size = image.size
                if self._drafts:
                    image.draft("RGB", (self.store_size, self.store_size))
                check_pixels(image, size, len(content))
                pixels = _decoded_jpeg(image, size, content)
                if pixels is not None:
                    return self._cut(pixels, index)
                has_16_bits, white = _has_16_bits(image), _named_white(image) or self._white
                image = upright(image)
                if has_16_bits:
                    # Pillow's own conversion clips 16 bits at 255 instead of scaling.
                    levels = np.asarray(image, np.uint32)
                    if levels.max() > white:
                        white = 65535
                    image = Image.fromarray((levels * 255 // white).astype(np.uint8))
                elif image.mode in ("I", "F"):
                    raise ValueError(
                        "32-bit pixels have no known range; save them with 8 or 16 bits"
                    )
                if image.mode != "RGB":
                    image = image.convert("RGB")
                return self._cut(torch.from_numpy(np.array(image)).permute(2, 0, 1), index)
        except OtherContent:
            raise
        except DECODE_ERRORS as error:
            raise self._damaged(f"image {self.ids[index]}", error) from None

    def _cut(self, image: Tensor, index: int) -> Tensor:
        return central_square(image, self.store_size)

    @property
    def _shape(self) -> tuple[int, ...]:
        # Of what `_cut` gives.
        return (3, self.store_size, self.store_size)

    def files_of(self, indices: np.ndarray) -> np.ndarray:
        """Where in `content` items are."""
        return indices

    def shared_with(self, record: dict | None, indices: np.ndarray) -> np.ndarray:
        """(n,) whether items `indices`, of those read so far, have files whose bytes are in a
        `record` of `common.run.content.load`.
        """
        if record is None or self.content is None:
            return np.zeros(len(indices), bool)
        stored = np.setdiff1d(record["digests"].numpy(), [0])  # 0: not read
        return np.isin(self.content.digests()[self.files_of(indices)], stored)

    def _damaged(self, item: str, error: Exception) -> InputError:
        full = amp.out_of_memory(error, torch.device("cpu"))
        if full:  # nothing is wrong with the item
            raise amp.OutOfMemory(f"{item}: {full}") from None
        advice = "fix or remove it, or --on-bad-item skip"
        if isinstance(error, OSError) and (patience.over or error.errno in TRANSIENT):
            advice = f"--io-retry waits longer. {AGAIN}"
        return InputError(f"{item} in {self.name} cannot be read: {reason(error)}; {advice}")

    def _probe(self) -> int:
        # The sizes of up to 64 images spread over the set, by their headers.
        sides = []
        why = ""
        named = 0
        dark = False
        for index in np.unique(np.linspace(0, len(self) - 1, 64).astype(int)):
            try:
                with open_image(self._read_bytes(index)) as image:
                    sides.append(image.size)
                    if _has_16_bits(image):
                        named = named or _named_white(image) or 0
                        dark = dark or not _named_white(image)
            except DECODE_ERRORS as error:  # decoding it later names the file, or skips it
                why = why or f"{self.ids[index]}: {reason(error)}"
        if not sides:
            raise InputError(
                f"{self.name}: none of the images that were tried can be read (first: {why})"
            )
        if 0 < named < 65535:
            self.note += f"; 16-bit pixels scaled by the {named} that their files name"
        if dark:
            self._white = self._darkest_white()
        if self._white < 65535:
            self.note += f"; 16-bit pixels scaled by {self._white}: none is above"
        return self._shorter_side(sides)

    def _shorter_side(self, sides: list[tuple[int, int]]) -> int:
        # Of some images' widths and heights.
        self.aspect = float(np.median([max(pair) / max(min(pair), 1) for pair in sides]))
        return int(np.median([min(pair) for pair in sides]))

    def _darkest_white(self) -> int:
        # Cameras of 12 bits store 16, of which the upper ones are empty then; masks store 8.
        top = 0
        looked_at = live.progress(range(len(self)), "looking for 16-bit levels", len(self))
        for index in looked_at:  # ends at the first image, where all bits are used
            with contextlib.suppress(*DECODE_ERRORS):
                content = self._read_bytes(index)
                with open_image(content) as image:
                    if _has_16_bits(image) and not _named_white(image):
                        check_pixels(image, image.size, len(content))
                        top = max(top, int(np.asarray(image).max()))
            if top > 4095:
                return 65535
        return 255 if top <= 255 else 4095

    def batches(self, index_batches: Iterable[np.ndarray], workers: int) -> Iterator[Tensor]:
        """The pixels of each batch of indices, uint8 (b, 3, store_size, store_size).

        They are channels-last in memory, as files are decoded and as `make_view` takes them best.
        Threads decode them ahead of use. A set that fits in 2 GiB is decoded once and kept.
        Threads, not processes: Pillow decodes and resizes without holding the interpreter lock, and
        a thread cannot outlive the run.
        """
        small = len(self) * math.prod(self._shape) <= _CACHE_BYTES
        if self.keeps and small and self._cache is None and self._cached is None:
            self._cache = self._empty(len(self))
            self._cached = np.zeros(len(self), bool)
        ahead: deque = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for indices in index_batches:
                    ahead.append((indices, *self._submit(pool, indices)))
                    if len(ahead) > 2:
                        yield self._collect(*ahead.popleft())
                while ahead:
                    yield self._collect(*ahead.popleft())
            finally:
                for *_, tasks in ahead:
                    for task in tasks:
                        task.cancel()

    def _groups(self, indices: np.ndarray) -> list[np.ndarray]:
        # What one thread decodes in one go: a small image is too short a task.
        return np.array_split(indices, -(-len(indices) // 4)) if len(indices) else []

    def _decode_group(self, indices: np.ndarray) -> list[Tensor]:
        return [self.decode(int(index)) for index in indices]

    def _empty(self, count: int) -> Tensor:
        *more, channels, height, width = self._shape
        pixels = torch.empty((count, *more, height, width, channels), dtype=torch.uint8)
        return pixels.movedim(-1, -3)

    def _submit(self, pool: ThreadPoolExecutor, indices: np.ndarray) -> tuple[Tensor, list]:
        # What the threads write to, the batch itself or the cache, and their tasks.
        wanted, places = np.unique(indices, return_index=True)
        target = self._empty(len(indices)) if self._cached is None else self._cache
        if self._cached is not None:
            places = wanted = wanted[~self._cached[wanted]]
        place_of = dict(zip(wanted.tolist(), places.tolist(), strict=True))

        def decode(group: np.ndarray) -> None:
            for index, pixels in zip(group.tolist(), self._decode_group(group), strict=True):
                target[place_of[index]] = pixels

        return target, [pool.submit(decode, group) for group in self._groups(wanted)]

    def _collect(self, indices: np.ndarray, target: Tensor, tasks: list) -> Tensor:
        for task in tasks:
            task.result()
        rows = np.asarray(indices, np.int64)
        if target is self._cache:
            self._cached[rows] = True
        else:
            _, first, row_of = np.unique(rows, return_index=True, return_inverse=True)
            if len(first) == len(rows):
                return target
            rows = first[row_of]  # what is there twice was decoded once
        rows = torch.from_numpy(rows)
        return target.movedim(-3, -1).index_select(0, rows).movedim(-1, -3)

    def damaged(self, workers: int, indices: np.ndarray | None = None) -> dict[int, str]:
        """Decode the images at `indices` once, unset all: why which of them cannot be read."""
        indices = np.arange(len(self)) if indices is None else indices
        groups = []
        for group in self._groups(indices):
            groups += np.array_split(group, -(-len(group) // _TRIED))
        found = {}
        with (
            ThreadPoolExecutor(workers) as pool,
            live.Progress("decoding images", len(indices)) as shown,
        ):
            for group, reasons in zip(groups, pool.map(self._tried, groups), strict=True):
                found |= reasons
                shown.add(len(group))
        return found

    def _tried(self, indices: np.ndarray) -> dict[int, str]:
        try:
            self._decode_group(indices)
        except InputError as error:
            if len(indices) == 1:
                return {int(indices[0]): str(error)}
            half = len(indices) // 2
            return self._tried(indices[:half]) | self._tried(indices[half:])
        return {}

    def drop_damaged(self, workers: int, cap: float = 0.01) -> list[str]:
        """Decode every image once and leave out those that cannot be read; returns their names.

        Raises:
            InputError: more than the share `cap` of the images is damaged.
        """

        if self.in_memory:
            return []
        bad = np.isin(np.arange(len(self)), list(self.damaged(workers)))
        names = check_damaged(self.name, self.ids, bad, cap, "images")
        if names:
            self._select(np.flatnonzero(~bad))
        return names

    def _select(self, kept: np.ndarray) -> None:
        read_before = self._read_bytes

        def read(index: int) -> bytes:
            return read_before(kept[index])

        self.ids = [self.ids[i] for i in kept]
        self.labels = self.labels[kept]
        self.splits = self.splits[kept]
        if self.groups is not None:
            self.groups = self.groups[kept]
        self.sizes = self.sizes[kept]
        self._read_bytes = read


def listing_fingerprint(ids: list[str], sizes, content: bytes = b"") -> str:
    """Eight digits that stand for names, the sizes of their files, and `content`."""
    return hashlib.sha256(f"{ids}{list(sizes)}".encode() + content).hexdigest()[:8]


def check_damaged(name: str, ids: list[str], bad: np.ndarray, cap: float, unit: str) -> list[str]:
    """The names of the damaged items, `bad` (n,) bool of `ids`.

    Raises:
        InputError: they are more than the share `cap` of all.
    """
    damaged = [ids[i] for i in np.flatnonzero(bad)]
    if len(damaged) > cap * len(ids):
        raise InputError(
            f"{name}: {len(damaged)} of {len(ids)} {unit} are damaged (first: {damaged[0]}), more"
            f" than --on-bad-item skip allows ({cap:.0%}); repair them or take them away"
        )
    return damaged


def open_image(content: bytes) -> Image.Image:
    """An image whose header is read, in one of FORMATS.

    Raises:
        One of DECODE_ERRORS: it is none.
    """
    return Image.open(io.BytesIO(content), formats=FORMATS)


def _decoded_jpeg(image: Image.Image, size: tuple[int, int], content: bytes) -> Tensor | None:
    """The pixels (3, H, W) of a plain JPEG by torchvision, which takes four fifths of the time.

    The same library decodes for both, to the same pixels. None: Pillow shall do it, at a fraction
    of the size, with a turn or from other colors, or say what is wrong with the file. It does all
    where torchvision has no decoder: 0.29 announces that it will go.

    Args:
        image: the opened file, perhaps drafted.
        size: its own width and height.
    """
    decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)
    plain = image.format == "JPEG" and image.mode in ("L", "RGB") and image.size == size
    if not plain or _orientation(image) in _TURNS or decode_jpeg is None:
        return None
    try:
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return decode_jpeg(data, mode="RGB")
    except RuntimeError:
        return None


def _has_16_bits(image: Image.Image) -> bool:
    # Pillow scales a PGM of any depth above 8 bits to 16 and calls it I.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _named_white(image: Image.Image) -> int | None:
    # The highest level that the bits of a TIFF's samples, as its tags tell them, can hold.
    if image.format == "PPM":
        return 65535
    tags = getattr(image, "tag_v2", {})

    def most(tag: int) -> int:  # whatever a file has there
        values = np.ravel(np.array(tags.get(tag, ()), dtype=object))
        return max((value for value in values if type(value) is int and value > 0), default=0)

    bits = min(most(258) or 16, 16)  # BitsPerSample
    highest = most(281)  # MaxSampleValue, often that of the image alone
    bits = min(bits, max(highest.bit_length(), 8) if highest else 16)
    return 2**bits - 1 if bits < 16 or highest else None


def check_pixels(image: Image.Image, size: tuple[int, int], held: int = 0) -> None:
    """Refuse an image, before it is decoded, that would take more than --max-item-mb.

    Args:
        image: as it will be decoded, perhaps at a fraction of its size.
        size: its own width and height.
        held: bytes of its file that are in memory.

    Raises:
        InputError: it would.
    """
    if not all(image.size):
        raise InputError("it has no pixels")
    # Pillow stores four bytes a pixel, and a copy of another mode beside; some decoders store
    # canvases. A progressive JPEG is held whole, as coefficients of two bytes. Turning copies.
    each = 4 if image.mode == "RGB" else 8
    if image.format in ("WEBP", "AVIF", "JPEG2000") or image.mode.startswith("I;16"):
        each = 16
    if _orientation(image) in _TURNS:
        each += 4
    needed = held + each * math.prod(image.size)
    if image.info.get("progressive"):
        needed += 6 * math.prod(size)
    reading.within(needed, f"{size[0]} x {size[1]} pixels")


def central_square(image: Tensor, side: int) -> Tensor:
    """An image's center square, uint8 (3, side, side).

    The shorter side is resized to `side` pixels before, antialiased bilinear.

    Args:
        image: (3, H, W) uint8, fastest where it is channels-last in memory.
        side: in pixels.
    """
    shorter = min(image.shape[1:])
    for axis in (1, 2):  # of a strip, which would take gigabytes if resized as a whole, the middle
        length = image.shape[axis]
        kept = min(length, 32 * shorter)
        kept -= (length - kept) % 2
        image = image.narrow(axis, (length - kept) // 2, kept)
    height, width = (max(side, round(length * side / shorter)) for length in image.shape[1:])
    reading.within(4 * width * height, f"{image.shape[2]} x {image.shape[1]} pixels")
    if image.shape[1:] != (height, width):
        # One more axis behind rows, columns, channels: before, it would hide how they lie.
        image = image.movedim(0, 2)[None].movedim(3, 1)
        image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says; itself where it says nothing."""
    image.load()  # then Pillow has turned a TIFF itself, and has read an EXIF behind a PNG's pixels
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """The width and height of `upright`, from what an opened file's header says."""
    on_its_side = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return image.size[::-1] if on_its_side else image.size


def _orientation(image: Image.Image):
    try:
        # The base class's method does not decode a PNG whose header has no EXIF.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # Pillow has many for a damaged EXIF block; the pixels may be whole
        return None


def is_image(name: str) -> bool:
    """Whether a name has an image's suffix and neither it nor a folder above is hidden."""
    return name.lower().endswith(SUFFIXES) and not hidden(name)


def reason(error: Exception) -> str:
    """Why something could not be read: the first line of an error's message, or else its type.

    Addresses of objects, which no two runs share, and places in torchcodec's source are left out.
    """
    text = getattr(error, "strerror", None) or str(error)
    text = re.sub(r"^\w+, \S+\.\w+:\d+, ", "", text)
    return re.sub(r" <\S+ object at 0x\w+>", "", text.split("\n")[0]) or type(error).__name__


def hidden(name: str) -> bool:
    """Whether a path has a part that starts with a dot, or is one of SYSTEM_FOLDERS."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts)


def list_files(
    path: str | tuple[str, ...], keep, alone: tuple[str, ...] = (), others: list | None = None
) -> tuple[list[str], list[int], list[int], Callable[[int], bytes]]:
    """The files of a folder or of a .zip whose relative name passes `keep`.

    Args:
        path: it; or several, which may also be files themselves.
        alone: the suffixes that these may have; of one path those that are read elsewhere, for the
            message.
        others: takes the names of the files that do not pass.

    Returns:
        Sorted names, `printable`, of several paths each with its path before it; sizes in bytes;
        keys as `Content` takes them; and a function from a position in these lists to the file's
        content.

    Raises:
        InputError: missing, not readable, or no regular file; one of several without files.
    """
    others = [] if others is None else others
    if isinstance(path, str):
        files, sizes, keys, read = _listed(existing(path), keep, alone, others)
        return [printable(name) for name in files], sizes, keys, read
    listed = [_files_at(one, keep, alone, others) for one in path]
    names, sizes, keys, reads = zip(*listed, strict=True)
    ends = np.cumsum([len(part) for part in names])

    def read_at(index: int) -> bytes:
        part = int(np.searchsorted(ends, index, side="right"))
        return reads[part](index - int(ends[part]) + len(names[part]))

    flat = itertools.chain.from_iterable
    return [printable(name) for name in flat(names)], [*flat(sizes)], [*flat(keys)], read_at


def _files_at(path: str, keep, alone: tuple[str, ...], others: list):
    # Of one of several paths, with names that say so.
    place = existing(path)
    if path.lower().endswith(alone) and not place.is_dir():
        size = reading.regular_status(place).st_size
        return [path], [size], [0], lambda _: reading.read_bytes(place, was_there=True)
    if not place.is_dir() and place.suffix.lower() != ".zip":
        raise InputError(
            f"{path}: allowed are a folder, a .zip of one, {', '.join(alone)}; a .csv stands alone"
        )
    files, sizes, keys, read = _listed(place, keep, alone, others)
    if not files:
        raise InputError(f"{path}: nothing there is of the kind that is read; leave it out")
    return [os.path.join(path, name) for name in files], sizes, keys, read


def _listed(place: Path, keep, alone: tuple[str, ...], others: list):
    if place.is_dir():
        return _folder_files(place, keep, others)
    if place.suffix.lower() == ".zip":
        return _zip_files(place, keep, others)
    allowed = ", ".join(["a folder", "a .zip of one", *alone])
    raise InputError(f"{place}: allowed are {allowed}, or `sample`")


def existing(path: str) -> Path:
    """`path`, a file or folder that --data names.

    Raises:
        InputError: there is none.
    """
    place = Path(path)
    try:
        os.stat(place)
    except FileNotFoundError:
        siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
        raise InputError(
            f"{path}: no such file or folder{did_you_mean(place.name, [*siblings, 'sample'])}"
        ) from None
    except (OSError, ValueError) as error:  # a folder of another user; a name that none can have
        raise InputError(f"{path}: {reason(error)}") from None
    return place


def _folder_files(folder: Path, keep, others: list):
    def refuse(error: OSError):
        raise error

    def listed(shown: live.Progress) -> list[tuple[str, os.stat_result]]:
        found = []
        passed = []
        seen = set()
        walk = os.walk(folder, followlinks=True, onerror=refuse)
        while True:
            with reading.pending(folder):
                directory, subfolders, names = next(walk, (None, [], []))
                if directory is None:
                    others.extend(passed)
                    return sorted(found)
                base = Path(directory)
                seen.add(base.resolve())
                # A link back up would give every image many times over.
                subfolders[:] = [name for name in subfolders if (base / name).resolve() not in seen]
                names = [(base / name).relative_to(folder).as_posix() for name in names]
                kept = [name for name in names if keep(name)]
                if len(kept) < len(names):
                    passed += set(names).difference(kept)
                for name in kept:
                    found.append((name, reading.regular_status(folder / name)))
                    shown.add()

    try:
        with live.Progress("listing files") as shown:
            found = retried(lambda: listed(shown), folder)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: {error.filename}") from None

    def read(index: int) -> bytes:
        return reading.read_bytes(folder / found[index][0], was_there=True)

    files, stats = zip(*found, strict=True) if found else ((), ())
    keys = [file_key(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in stats]
    return files, [s.st_size for s in stats], keys, read


def _zip_files(path: Path, keep, others: list):
    try:
        archive = ReopenedZip(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    entries = []
    _mend_names(archive.infolist())
    for entry in archive.infolist():
        if keep(entry.filename):
            entries.append(entry)
        elif not entry.filename.endswith("/"):  # is_dir() fails on an empty name
            others.append(entry.filename)
    entries.sort(key=operator.attrgetter("filename"))

    def read(index: int) -> bytes:
        return archive.read(entries[index])

    names = [entry.filename for entry in entries]
    sizes = [entry.file_size for entry in entries]
    # Its own checksum, which reading verifies, goes with every copy of the archive.
    return names, sizes, [file_key(entry.file_size, entry.CRC) for entry in entries], read


def _mend_names(entries: list[zipfile.ZipInfo]) -> None:
    # Without its flag for UTF-8 zipfile takes every name for CP437. macOS writes UTF-8 so, a
    # Chinese Windows GBK: then most of its characters are among the common ones of GB2312. Some
    # Windows programs part folders by backslashes.
    odd = [entry for entry in entries if not (entry.flag_bits & 0x800 or entry.filename.isascii())]
    odd = [entry for entry in odd if entry.filename == entry.orig_filename]
    names = "/".join(entry.filename for entry in odd).encode("cp437")
    encoding = "cp437"
    try:
        names.decode()
        encoding = "utf-8"
    except UnicodeDecodeError:
        text = names.decode("gbk", "replace")
        common = [char for char in text if char >= "\u4e00" and char.encode("gb2312", "ignore")]
        if 2 * len(common) > sum(not char.isascii() for char in text):
            encoding = "gbk"
    for entry in odd:
        entry.filename = entry.filename.encode("cp437").decode(encoding, "replace")
    if not any("/" in entry.filename for entry in entries):
        for entry in entries:
            entry.filename = entry.filename.replace("\\", "/")


class ReopenedZip:
    """A .zip that is kept open for the run and opened again after a failure.

    It is closed with the process.
    """

    def __init__(self, path: Path):
        self.path = path
        self._archive = retried(lambda: reading.open_zip(path), path)
        self._lock = threading.Lock()
        self.infolist = self._archive.infolist

    def read(self, entry: zipfile.ZipInfo, large: bool = False) -> bytes:
        """The content of a member; arguments as `read_member` takes them."""
        return retried(lambda: self._read(entry, large), self.path, was_there=True)

    def _read(self, entry: zipfile.ZipInfo, large: bool) -> bytes:
        with self._lock:  # one file handle; decompression is short beside decoding
            if self._archive is None:
                self._archive = reading.open_zip(self.path)
            try:
                return reading.read_member(self._archive, entry, large)
            except OSError:
                self._archive = None  # a stale handle stays stale
                raise


def below_common_folder(files: list[str], is_content) -> list[tuple[str, ...]]:
    """The parts of the names, without the folder that holds everything.

    So names are the same in a folder and in any archive of it. A folder of which `is_content` is
    true stays.
    """
    paths = [PurePosixPath(name).parts for name in files]
    while (
        all(len(parts) > 1 for parts in paths)
        and len({parts[0] for parts in paths}) == 1
        and not is_content(paths[0][0])
    ):
        paths = [parts[1:] for parts in paths]
    return paths


def near_splits(names: Iterable[str]) -> dict[str, str]:
    """The splits of names such as `train_images`, `test-set` or `train2017`, of those that say one.

    Whether they are meant so is to be judged from all of them.
    """
    found = {name: _NEARLY_SPLIT.search(name.lower()) for name in names}
    return {name: SPLITS[match[1]] for name, match in found.items() if match}


def split_of_cell(cell: str, where: str) -> str:
    """The split that a cell of a table names: "train", "val", "test", or "" for an empty one.

    Raises:
        InputError: it is no split.
    """
    name = cell.lower()
    if name and name not in SPLITS:
        hint = did_you_mean(name, SPLITS)
        raise InputError(f"{where}: split {cell!r}, allowed are train, val, test{hint}")
    return SPLITS.get(name, "")


def describe_labels(labels: np.ndarray, classes: list[str], splits: np.ndarray) -> str:
    """What follows a set's size: ` in 3 classes (RBC 4153, ...); splits train 10, test 5`.

    ` without labels` where there are none.
    """
    known = labels[labels != UNLABELED]
    text = " without labels"
    if len(known):
        counts = np.bincount(known, minlength=len(classes))
        largest = np.argsort(-counts, kind="stable")[:10]
        shown = ", ".join(f"{classes[i]} {counts[i]}" for i in largest)
        text = f" in {len(classes)} classes ({shown}{', ...' if len(classes) > 10 else ''})"
    parts = count_splits(splits)
    return text + (f"; splits {parts}" if parts else "")


def count_splits(splits: np.ndarray) -> str:
    """`train 10, test 5`: how many items each split has that is there."""
    counts = {name: int((splits == name).sum()) for name in ("train", "val", "test")}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)
