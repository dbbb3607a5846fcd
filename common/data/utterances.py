"""Utterances of dialogues: texts and feature arrays with ids, labels and splits.

They come from three kinds of source.

- `.npz`: every float array of one row per utterance is a modality, (N, D) or (N, L, D) with lengths
  in `<name>_len`.
- `.tsv`: one utterance a line under a header that names the columns; `text` is required, `id`,
  `label`, `split`, `speaker` and `group` are optional. `.csv`: the same with commas; a cell in
  quotes may hold commas, quotes and line breaks.
- a folder, or a .zip of one, in the layout of UMC (github.com/thuiar/UMC): `train.tsv`, `dev.tsv`,
  `test.tsv` with the columns `text`, `label` and `id` or MIntRec's `season`, `episode`, `clip`, or
  with those of MELD-DA or IEMOCAP-DA by their places, and where they exist
  `video_data/swin_feats.pkl` and `audio_data/wavlm_feats.pkl`, or the one pickle of another name in
  such a folder: a dict of id -> (frames[, 1], d) float array.

A sequence of length 0 is missing: an utterance without features of a modality.

Nothing that a file holds is executed: `.npz` is read without pickles, and the two pickles by an
unpickler that knows NumPy arrays, dicts, text and numbers.
"""

import csv
import hashlib
import io
import math
import operator
import pickle
import re
import tokenize
import zipfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from common import reading
from common.data.groups import check_column, refuse_spanning
from common.data.images import (
    SPLITS,
    UNLABELED,
    ReopenedZip,
    count_splits,
    describe_labels,
    existing,
    reason,
)
from common.data.sampling import TEST_SHARE, hold_out
from common.errors import InputError, did_you_mean, first_few
from common.retry import retried
from common.run.content import Content, codes

FEATURES = {"video": "video_data/swin_feats.pkl", "audio": "audio_data/wavlm_feats.pkl"}
_FEATURE_FILES = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".h5")
# What NumPy, zipfile and pickle raise on damaged or hostile files.
_READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    AttributeError,
    ImportError,
    SyntaxError,
    MemoryError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    tokenize.TokenError,
)
_ROLES = ("id", "label", "split", "speaker", "group")
_SHOWN = 5  # names or rows that a message lists
_MODULE = re.compile(r"numpy\._?core\.(multiarray|numeric)")
# Of scripts without blanks between words (Thai to Burmese, Khmer, kana, ideographs) each sign is a
# token: runs of tokens are then n-grams of characters.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = rf"[^\W_{_UNSPACED}]+"
_TOKEN = re.compile(rf"[{_UNSPACED}]|{_WORD}(?:['\u2019]{_WORD})*|([^\w\s]|_)\1*")


class Utterances:
    """Utterances of one data set.

    Attributes:
        name: what was read, for messages.
        ids: (n,) names, each once: one that stands again gets `#2`, `#3`, ... behind it.
        repeated_ids: the names that got one.
        labels: (n,) int64 into `classes`; UNLABELED where there is no label.
        splits: (n,) "train", "val", "test", or "" where the data names none.
        groups: (n,) names of what stays together, see `common.data.groups`; None: nothing does.
        texts: n strings, or None where the data has features alone.
        speakers: n strings, or None.
        modalities: name -> float32, (n, d), or (n, l, d) with zeros behind each sequence's end.
        lengths: name -> (n,) int64 in [0, l], for the modalities of three dimensions; 0: missing.
        unread: what is left out: files of features outside the layout, columns of a table.
        fingerprint: eight digits that stand for the content.
        content: the utterances as `Content` knows them, for the words of what has changed.
    """

    def __init__(
        self,
        name,
        ids,
        labels,
        classes,
        splits,
        *,
        texts=None,
        speakers=None,
        groups=None,
        modalities=None,
        lengths=None,
        unread=(),
    ):
        self.name = name
        self.unread = list(unread)
        ids = list(ids)
        self.ids = _unique(ids)
        self.repeated_ids = [new for new, old in zip(self.ids, ids, strict=True) if new != old]
        self.classes = list(classes)
        self.texts = texts
        self.speakers = speakers
        self.labels = np.asarray(labels, np.int64)
        self.splits = np.asarray(splits, dtype=object)
        self.groups = groups if groups is None else np.asarray(groups, dtype=object)
        self.modalities = dict(modalities or {})
        self.lengths = dict(lengths or {})
        content = repr((self.ids, self.classes, list(self.splits), texts, speakers))
        digest = hashlib.sha256(content.encode())
        digest.update(self.labels.tobytes())
        if groups is not None:
            digest.update(f"{list(groups)}".encode())
        arrays = [*self.modalities.items(), *self.lengths.items()]
        for name, values in sorted(arrays, key=operator.itemgetter(0)):
            digest.update(f"{name}{values.shape}".encode())
            digest.update(np.ascontiguousarray(values))
        self.fingerprint = digest.hexdigest()[:8]
        names = [*self.classes, ""]  # the last is that of UNLABELED, which is -1
        facts = {"label": codes(names)[self.labels], "split": codes(self.splits)}
        if groups is not None:
            facts["group"] = codes(groups)
        self.content = Content(self.ids, self._row, facts=facts, in_memory=True, unit="utterance")

    def _row(self, index: int) -> bytes:
        texts = [column and column[index] for column in (self.texts, self.speakers)]
        parts = [repr(texts).encode()]
        for name, values in sorted(self.modalities.items()):
            row = values[index]
            if name in self.lengths:
                row = row[: self.lengths[name][index]]
            parts.append(name.encode() + row.tobytes())
        return b"".join(parts)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labeled(self) -> bool:
        return bool((self.labels != UNLABELED).any())

    def counts(self) -> np.ndarray:
        """(classes,) how many utterances have each label."""
        return np.bincount(self.labels[self.labels >= 0], minlength=len(self.classes))

    def describe(self) -> str:
        """One line, such as `meld_da.tsv: 9989 utterances in 12 classes (s 2994, ...); text`."""
        labels = describe_labels(self.labels, self.classes, self.splits)
        parts = [] if self.texts is None else ["raw text"]
        parts += [f"{name} {_row_shape(values)}" for name, values in self.modalities.items()]
        return f"{self.name}: {len(self)} utterances{labels}; {', '.join(parts)}"


def _row_shape(values: np.ndarray) -> str:
    return " x ".join(map(str, values.shape[1:]))


def open_utterances(
    path: str | tuple[str, ...],
    max_length: int | None = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    encoding: str | None = None,
    allow_missing: float = 0.0,
) -> Utterances:
    """The utterances of an `.npz`, a `.tsv` or `.csv`, or a folder or .zip in UMC's layout.

    Args:
        path: the file or folder; or several, see `_joined`.
        max_length: sequences keep their first so many rows; None keeps all of them. Padding makes a
            modality as long as its longest sequence, which for video frames is memory.
        text_column, label_column, encoding: of a .tsv or .csv; None: `text`, `label` and UTF-8.
        allow_missing: share of utterances that may lack a modality.

    Raises:
        InputError: the source cannot be read or is not what the module's docstring says: arrays of
            different length, values that are not finite, a header row inside the data, no text at
            all, a pickle that holds anything but arrays.
    """
    if not isinstance(path, str):
        for one in path:
            existing(one)
        given = dict(text_column=text_column, label_column=label_column, encoding=encoding)
        given["allow_missing"] = allow_missing
        return _joined(path, [open_utterances(one, max_length, **given) for one in path])
    place = existing(path)
    is_table = not place.is_dir() and place.suffix.lower() in (".tsv", ".csv")
    given = {"text-column": text_column, "label-column": label_column, "encoding": encoding}
    for flag in [flag for flag, value in given.items() if value is not None and not is_table]:
        raise InputError(f"--{flag} is for a .tsv or .csv, {path} is none; leave it out")
    if not place.is_dir() and place.suffix.lower() == ".npz":
        fields = _read_npz(place)
    elif is_table:
        fields = _read_tsv(place, text_column, label_column, encoding or "utf-8-sig")
    elif place.is_dir() or place.suffix.lower() == ".zip":
        fields = _read_umc(place, max_length)
    else:
        raise InputError(
            f"{path}: allowed are an .npz, a .tsv or .csv, a folder or .zip with train.tsv, or"
            " `sample`"
        )
    _check_texts(path, fields.get("texts"))
    modalities = fields.pop("modalities", {})
    lengths = fields.pop("lengths", {})
    for name, values in lengths.items():
        _check_missing(path, name, values, fields["ids"], allow_missing)
    for name in modalities:
        modalities[name] = _clean(path, name, modalities[name], lengths, max_length, fields["ids"])
    if not modalities and fields.get("texts") is None:
        raise InputError(
            f"{path}: neither text nor features: add float arrays of one row per utterance"
        )
    return Utterances(place.name, **fields, modalities=modalities, lengths=lengths)


def _joined(paths: tuple[str, ...], parts: list[Utterances]) -> Utterances:
    """The utterances of several paths, unlabeled, each id with its path before it.

    Raises:
        InputError: one has other modalities, or text where the first has none, or none.
    """
    kinds = [_kinds(part) for part in parts]
    for path, kind in zip(paths, kinds, strict=True):
        if kind != kinds[0]:
            here, there = (", ".join(sorted(names)) for names in (kind, kinds[0]))
            raise InputError(
                f"{path} has {here}, {paths[0]} has {there}: give paths of the same modalities"
            )
    texts = [text for part in parts for text in part.texts or ()]
    modalities = {}
    lengths = {}
    for name in parts[0].modalities:
        arrays = [part.modalities[name] for part in parts]
        if name in parts[0].lengths:
            lengths[name] = np.concatenate([part.lengths[name] for part in parts])
            arrays = _of_one_length(f"{first_few(paths)}: {name}", arrays)
        modalities[name] = np.concatenate(arrays)
    ids = [f"{path}/{i}" for path, part in zip(paths, parts, strict=True) for i in part.ids]
    return Utterances(
        first_few(paths),
        ids,
        [UNLABELED] * len(ids),
        [],
        [""] * len(ids),
        texts=texts or None,
        modalities=modalities,
        lengths=lengths,
    )


def _kinds(utterances: Utterances) -> set[str]:
    # What a row holds, in words.
    sequences = utterances.lengths
    kinds = {
        f"{name} {'steps x ' * (name in sequences)}{values.shape[-1]}"
        for name, values in utterances.modalities.items()
    }
    return kinds | ({"raw text"} if utterances.texts is not None else set())


def _of_one_length(where: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
    longest = max(values.shape[1] for values in arrays)
    padded = sum(values.nbytes // values.shape[1] * longest for values in arrays)
    # As in `_padded`.
    reading.within(
        padded - 16 * sum(values.nbytes for values in arrays), f"{where}: padding to {longest} rows"
    )
    return [np.pad(x, ((0, 0), (0, longest - x.shape[1]), (0, 0))) for x in arrays]


def split(utterances: Utterances) -> dict[str, np.ndarray]:
    """Sorted int64 indices of `train` and `test`.

    The data's validation split belongs to `train`, as in UMC. Where the data names no test split,
    15 % are held out by a hash of their ids, or of their groups. Labels have no say in that: which
    utterances are trained on must not tell anything of them.

    Raises:
        InputError: a group is in both.
    """
    everything = np.arange(len(utterances))
    groups = utterances.groups
    test = np.flatnonzero(utterances.splits == "test")
    if not len(test):
        one_class = np.zeros(len(utterances), np.int64)
        test = hold_out(utterances.ids, one_class, everything, TEST_SHARE, "test", groups)
    parts = {"train": np.setdiff1d(everything, test), "test": test}
    if groups is not None:
        refuse_spanning(utterances, groups[:, None], parts)
    return parts


def data_problems(utterances: Utterances) -> dict[str, str]:
    """What to know of the data before training: finding by name, as printed and reported.

    Rows, classes, imbalance (largest class over smallest), texts (tokens, empty, repeated), and of
    every modality its scale, rows of zeros, constant columns and values that are not finite. Labels
    are counted here and nowhere used.
    """
    findings = {
        "utterances": str(len(utterances)),
        "splits": count_splits(utterances.splits) or "none named",
    }
    renamed = utterances.repeated_ids
    if renamed:
        names = first_few(renamed, _SHOWN)
        findings["repeated ids"] = f"{len(renamed)}, told apart by a number ({names})"
    if utterances.labeled:
        classes = utterances.classes
        counts = utterances.counts()
        order = np.argsort(-counts, kind="stable")
        shown = first_few([f"{classes[i]} {counts[i]}" for i in order], 10)
        rarest = order[counts[order] > 0][-1]
        ratio = counts.max() / counts[rarest]
        findings["classes"] = f"{len(counts)}: {shown}"
        findings["imbalance"] = f"{ratio:.1f} ({classes[order[0]]} over {classes[rarest]})"
    findings["without label"] = str(int((utterances.labels == UNLABELED).sum()))
    if utterances.texts is not None:
        findings.update(_text_findings(utterances))
    if utterances.unread:
        findings["not read"] = first_few(utterances.unread, _SHOWN)
    for name, values in utterances.lengths.items():
        if not values.all():
            missing = [utterances.ids[i] for i in np.flatnonzero(values == 0)]
            shown = f"{len(missing)} utterances, masked there ({first_few(missing, _SHOWN)})"
            findings[f"{name} is missing"] = shown
    for name, values in utterances.modalities.items():
        findings[f"modality {name}"] = _scale(values, utterances.lengths.get(name))
    return findings


def _text_findings(utterances: Utterances) -> dict[str, str]:
    texts = utterances.texts
    sizes = np.array([len(tokens(text)) for text in texts])
    empty = [utterances.ids[i] for i in np.flatnonzero(sizes == 0)]
    most, times = Counter(texts).most_common(1)[0]
    repeated = len(texts) - len(set(texts))
    longest = f"{sizes.max()} ({utterances.ids[sizes.argmax()]})"
    names = f" ({first_few(empty, _SHOWN)})" if empty else ""
    most_common = f"; {most!r} stands {times} times" if repeated else ""
    return {
        "tokens per text": f"mean {sizes.mean():.1f}, longest {longest}",
        "empty texts": f"{len(empty)}{names}",
        "repeated texts": f"{repeated} repeat an earlier one{most_common}",
    }


def _scale(values: np.ndarray, lengths: np.ndarray | None) -> str:
    # In chunks: a copy of all frames of a video data set would double its memory.
    width = values.shape[-1]
    count = 0
    not_finite = 0
    zeros = 0
    total = np.zeros(width)
    squares = np.zeros(width)
    low = np.full(width, np.inf)
    high = np.full(width, -np.inf)
    for start in range(0, len(values), 256):
        chunk = values[start : start + 256]
        zeros += int((chunk.reshape(len(chunk), -1) == 0).all(1).sum())
        if lengths is not None:
            chunk = chunk[np.arange(chunk.shape[1]) < lengths[start : start + 256, None]]
        finite = np.isfinite(chunk)
        not_finite += int((~finite).sum())
        chunk = np.where(finite, chunk, 0).astype(np.float64)
        count += len(chunk)
        total = total + chunk.sum(0)
        squares = squares + (chunk**2).sum(0)
        low = np.minimum(low, chunk.min(0))
        high = np.maximum(high, chunk.max(0))
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    text = _row_shape(values)
    if lengths is not None:
        text += f", lengths {lengths.min()} to {lengths.max()} (mean {lengths.mean():.1f})"
    text += (
        f"; means {mean.min():.3g} to {mean.max():.3g},"
        f" deviations {deviation.min():.3g} to {deviation.max():.3g}"
        f"; {zeros} utterances all zero, {int((low == high).sum())} constant columns"
    )
    return text + (f", {not_finite / (count * width):.2%} not finite" if not_finite else "")


def _check_texts(path: str, texts: list[str] | None) -> None:
    if texts is not None and not any(text.strip() for text in texts):
        raise InputError(
            f"{path}: the text of all {len(texts)} utterances is empty; check the column"
        )
    longest = max(map(len, texts or [""]))
    # Its n-grams, each a string of its own.
    reading.within(256 * longest, f"{path}: a text of {longest} characters")


def _check_missing(path, name: str, lengths: np.ndarray, ids, allowed: float) -> None:
    missing = np.flatnonzero(lengths == 0)
    if len(missing) == len(ids):
        raise InputError(f"{path}: modality {name} is missing for all utterances; leave it out")
    if len(missing) > allowed * len(ids):
        names = first_few([ids[i] for i in missing], _SHOWN)
        least = math.ceil(1000 * len(missing) / len(ids)) / 1000
        raise InputError(
            f"{path}: modality {name} has no features of {len(missing)} of {len(ids)} utterances"
            f" ({names}), allowed is a share of {allowed:g}; --allow-missing {least:g} masks it"
        )


def _clean(path, name, values, lengths, max_length, ids) -> np.ndarray:
    # float32, finite, and zero behind the end of each sequence; cuts `lengths` along.
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise InputError(
            f"{path}: modality {name} has the shape {values.shape};"
            " allowed are (N, D) and (N, L, D), none of them 0"
        )
    if values.ndim == 3:
        if max_length is not None:
            values = values[:, :max_length]
            lengths[name] = np.minimum(lengths[name], max_length)
        values = values[:, : lengths[name].max()]
    with np.errstate(over="ignore"):  # what float32 cannot hold is reported as not finite
        values = np.ascontiguousarray(values, np.float32)
    if values.ndim == 3:
        values[np.arange(values.shape[1]) >= lengths[name][:, None]] = 0
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
    if len(bad):
        rows = first_few(bad, _SHOWN)
        names = first_few([ids[i] for i in bad], _SHOWN)
        raise InputError(
            f"{path}: modality {name} is NaN or infinite in {len(bad)} of {len(values)} rows:"
            f" {rows} (counted from 0; ids {names}); fix or remove them"
        )
    return values


def _unique(ids: list[str]) -> list[str]:
    taken = set(ids)
    times = Counter()
    names = []
    for name in ids:
        times[name] += 1
        unique = name
        if times[name] > 1:
            while (unique := f"{name}#{times[name]}") in taken:
                times[name] += 1
            taken.add(unique)
        names.append(unique)
    return names


def _number_labels(names: list[str]) -> tuple[np.ndarray, list[str]]:
    # Sorted names are the classes; an empty name is no label, nor is what a number that is missing
    # becomes as text.
    classes = sorted({name for name in names if name and name.lower() != "nan"})
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number.get(name, UNLABELED) for name in names], np.int64), classes


def _split_names(path: str, names: list[str]) -> list[str]:
    known = [SPLITS.get(name.strip().lower(), "") for name in names]
    if any(known) and not all(known):
        row = known.index("")
        raise InputError(
            f"{path}: utterance {row} (from 0) is of the split {names[row]!r};"
            f" allowed are {', '.join(SPLITS)}"
        )
    if any(names) and not any(known):
        raise InputError(f"{path}: unknown split {names[0]!r}; allowed are {', '.join(SPLITS)}")
    return known


def _groups(place: Path, cells: list | None) -> list[str] | None:
    groups = [str(cell).strip() for cell in cells or []]
    places = [f"utterance {row} (from 0)" for row in range(len(groups))]
    return groups if check_column(place, groups, places) and groups else None


def _read_npz(place: Path) -> dict:
    def read() -> dict:
        with reading.open_zip(place) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            reading.check_unpacked(entries, f"{place}, which is compressed")
            return {
                entry.filename.removesuffix(".npy"): _read_npy(archive, entry) for entry in entries
            }

    try:
        arrays = retried(read, place)
    except _READ_ERRORS as error:
        raise InputError(
            f"{place}: not a readable .npz: {reason(error)};"
            " object arrays are refused, save numbers and plain text"
        ) from None
    classes = arrays.pop("classes", None)
    sizes = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "none"
        raise InputError(
            f"{place}: every array needs one row per utterance, the lengths are: {shown}"
        )
    count = next(iter(sizes.values()))
    columns = _pop_columns(place, arrays)
    lengths = _pop_lengths(arrays)
    for name, array in arrays.items():
        _check_modality(place, name, array, lengths.get(name))
    label = columns.get("label")
    if label is None:
        labels = np.full(count, UNLABELED)
        names = []
    elif label.dtype.kind == "U":
        labels, names = _number_labels(label.tolist())
    else:
        labels, names = _integer_labels(place, label, classes)
    lists = {name: column.tolist() for name, column in columns.items()}
    return {
        "ids": [str(name) for name in lists.get("id", range(count))],
        "labels": labels,
        "classes": names,
        "splits": _split_names(str(place), lists.get("split", [""] * count)),
        "texts": lists.get("text"),
        "speakers": lists.get("speaker"),
        "groups": _groups(place, lists.get("group")),
        "modalities": {
            name: array[:, None] if array.ndim == 1 else array for name, array in arrays.items()
        },
        "lengths": {name: values.astype(np.int64) for name, values in lengths.items()},
    }


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    # What np.load gives, after comparing the shape in its header with the bytes that are there.
    header = np.lib.format
    readers = {(1, 0): header.read_array_header_1_0, (2, 0): header.read_array_header_2_0}
    with reading.pending(archive.filename), archive.open(entry) as file:
        version = header.read_magic(file)
        if version not in readers:
            raise ValueError(f"{entry.filename} is of the .npy version {version}")
        shape, _, dtype = readers[version](file)
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds objects")
        if math.prod(shape) * dtype.itemsize > entry.file_size:
            raise ValueError(
                f"{entry.filename} declares {dtype} of shape {shape}, more than it holds"
            )
    with reading.pending(archive.filename), archive.open(entry) as file:
        return header.read_array(file, allow_pickle=False)


def _pop_columns(place: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # What describes an utterance and is no modality; float arrays called `text` are one.
    columns = {}
    for name in (*_ROLES, "text"):
        if name in arrays and (name in _ROLES or arrays[name].dtype.kind == "U"):
            allowed = "Uiu" if name in ("id", "label", "group") else "U"
            if arrays[name].ndim != 1 or arrays[name].dtype.kind not in allowed:
                wanted = "a text or an integer" if "i" in allowed else "a text"
                raise InputError(
                    f"{place}: {name} is {_type_and_shape(arrays[name])};"
                    f" allowed is {wanted} per utterance"
                )
            columns[name] = arrays.pop(name)
    return columns


def _pop_lengths(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # By the modality that they belong to.
    lengths = {}
    for name in list(arrays):
        if f"{name}_len" in arrays and arrays[f"{name}_len"].dtype.kind in "iu":
            lengths[name] = arrays.pop(f"{name}_len")
    return lengths


def _check_modality(place: Path, name: str, array: np.ndarray, lengths: np.ndarray | None) -> None:
    if array.dtype.kind != "f":
        allowed = ", ".join([*_ROLES, "classes", "text", "<modality>_len"])
        raise InputError(
            f"{place}: {name} is {_type_and_shape(array)};"
            f" modalities are float arrays, and the others are called {allowed}"
        )
    if array.ndim == 3 and lengths is None:
        fault = f"{name}_len, its sequences' lengths, is missing"
        raise InputError(f"{place}: modality {name} is {_type_and_shape(array)}: {fault}")
    if array.ndim != 3 and lengths is not None:
        fault = f"{name}_len has no use"
        raise InputError(f"{place}: modality {name} is {_type_and_shape(array)}: {fault}")
    if lengths is not None:
        _check_lengths(place, name, lengths, array.shape[1])


def _type_and_shape(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {array.shape}"


def _check_lengths(place: Path, name: str, lengths: np.ndarray, longest: int) -> None:
    bad = np.flatnonzero((lengths < 0) | (lengths > longest)) if lengths.ndim == 1 else [0]
    if len(bad):
        raise InputError(
            f"{place}: {name}_len must be integers of shape (N,) in [0, {longest}], 0 where the"
            f" modality is missing; rows {first_few(bad, _SHOWN)} are not"
        )


def _integer_labels(
    place, label: np.ndarray, classes: np.ndarray | None
) -> tuple[np.ndarray, list[str]]:
    label = label.astype(np.int64)
    if classes is None:
        values = np.unique(label[label >= 0])
        labels = np.where(label >= 0, np.searchsorted(values, label), UNLABELED)
        return labels, [str(value) for value in values]
    if classes.ndim != 1 or classes.dtype.kind != "U":
        raise InputError(
            f"{place}: classes is {_type_and_shape(classes)}; allowed is one name per class"
        )
    bad = np.flatnonzero((label < UNLABELED) | (label >= len(classes)))
    if len(bad):
        raise InputError(
            f"{place}: label must lie in [0, {len(classes) - 1}], the numbers of classes, or be"
            f" {UNLABELED} for none; rows {first_few(bad, _SHOWN)} do not"
        )
    return label, classes.tolist()


def _table(
    name: str, data: bytes, encoding: str = "utf-8-sig"
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header's cells, and (line number, cells) of every further row of a .tsv or .csv."""
    try:
        text = reading.decode_table(data, name, encoding)
    except UnicodeError as error:
        line = data.count(b"\n", 0, getattr(error, "start", 0)) + 1
        named = "UTF-8" if encoding == "utf-8-sig" else encoding
        fix = "save the file as UTF-8, or name its encoding, as --encoding latin-1"
        raise InputError(f"{name}, line {line}: not {named}; {fix}") from None
    if name.lower().endswith(".csv"):
        rule = "a cell with a comma, a quote or a line break stands in quotes"
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            rows = [(reader.line_num, cells) for cells in reader if cells] or [(1, [""])]
        except csv.Error as error:
            raise InputError(f"{name}, line {reader.line_num}: {error}; {rule}") from None
    else:
        rule = "a cell cannot hold a tab or a line break"
        # Not splitlines(): an utterance may hold U+2028 or U+0085.
        lines = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
        cells_of = ([_unquote(cell) for cell in line.split("\t")] for line in lines)
        rows = list(enumerate(cells_of, 1))
    header = rows.pop(0)[1]
    for line, cells in rows:
        if len(cells) != len(header):
            raise InputError(
                f"{name}, line {line}: {len(cells)} cells, the header has {len(header)}; {rule}"
            )
        if cells == header:
            raise InputError(f"{name}, line {line}: a second header row inside the data; remove it")
    if not rows:
        raise InputError(f"{name}: no utterances below the header")
    return header, rows


def _unquote(cell: str) -> str:
    # Spreadsheets and pandas put a cell with quotes in quotes and double those within; other quotes
    # are text.
    inner = cell[1:-1]
    in_quotes = len(cell) > 3 and cell[0] == cell[-1] == '"'
    doubled = '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if in_quotes and doubled else cell


def _check_labels(name: str, word: str, rows, column: int) -> None:
    # EMOTyDA's files joined without care have header rows whose other cells differ from ours; such
    # a row read as data makes a class of its own.
    for line, cells in rows:
        if cells[column].strip().lower() == word.strip().lower():
            raise InputError(
                f"{name}, line {line}: its label is {cells[column]!r}, the header's word:"
                " a header row inside the data, or a first line that is no header;"
                " remove the one or add the other"
            )


def _read_tsv(
    place: Path, text_column: str | None, label_column: str | None, encoding: str
) -> dict:
    try:
        data = reading.read_bytes(place)
    except OSError as error:
        raise InputError(f"{place}: {error.strerror}") from None
    header, rows = _table(str(place), data, encoding)
    columns = [name.strip().lower() for name in header]
    given = {"text": text_column, "label": label_column}
    cells_of = {}
    for role in ("text", *_ROLES):
        name = (given.get(role) or role).strip().lower()
        if name not in columns and (role == "text" or given.get(role)):
            raise InputError(
                f"{place}: no column `{name}` in the header; its columns are {', '.join(header)}"
                f"{did_you_mean(name, columns)}; --{role}-column names another"
            )
        if columns.count(name) > 1:
            raise InputError(
                f"{place}: the column {name} stands {columns.count(name)} times in the header"
            )
        if name in columns:
            cells_of[role] = [cells[columns.index(name)] for _, cells in rows]
            if role == "label":
                _check_labels(str(place), name, rows, columns.index(name))
    known = {(given.get(role) or role).strip().lower() for role in ("text", *_ROLES)}
    empty = [""] * len(rows)
    labels, classes = _number_labels([name.strip() for name in cells_of.get("label", empty)])
    ids = cells_of.get("id", [str(row) for row in range(len(rows))])
    return {
        "ids": [name.strip() for name in ids],
        "labels": labels,
        "classes": classes,
        "splits": _split_names(str(place), cells_of.get("split", empty)),
        "texts": cells_of["text"],
        "speakers": cells_of.get("speaker"),
        "groups": _groups(place, cells_of.get("group")),
        "unread": [
            f"column {shown.strip()}"
            for shown, name in zip(header, columns, strict=True)
            if name and name not in known
        ],
    }


def _read_umc(place: Path, max_length: int | None) -> dict:
    files, read = _members(place)
    tables = [name for name in files if PurePosixPath(name).name == "train.tsv"]
    if len(tables) != 1:
        fault = "it holds no train.tsv"
        if tables:
            fault = f"it holds {first_few(tables, _SHOWN)}; name one of these folders"
        raise InputError(
            f"{place}: allowed is a folder or .zip with one train.tsv (and dev.tsv, test.tsv);"
            f" {fault}"
        )
    base = PurePosixPath(tables[0]).parent
    ids = []
    texts = []
    names = []
    splits = []
    for part in ("train", "dev", "test"):
        file = (base / f"{part}.tsv").as_posix()
        if file not in files:
            continue
        where = f"{place}: {file}"
        header, rows = _table(where, read(file))
        key, text, label = _umc_columns(where, header, rows[0][1])
        _check_labels(where, header[label], rows, label)
        ids += ["_".join(cells[i].strip() for i in key) for _, cells in rows]
        texts += [cells[text] for _, cells in rows]
        names += [cells[label].strip() for _, cells in rows]
        splits += [SPLITS[part]] * len(rows)
    labels, classes = _number_labels(names)
    modalities = {}
    lengths = {}
    left = [f for f in files if PurePosixPath(f).suffix.lower() in _FEATURE_FILES]
    for name, file in FEATURES.items():
        file = _feature_file(place, base / file, left)
        if file is not None:
            where = f"{place}: {file}"
            data = read(file, features=True)
            modalities[name], lengths[name] = _padded(where, data, ids, max_length)
            left.remove(file)
    return {
        "unread": left,
        "ids": ids,
        "labels": labels,
        "classes": classes,
        "splits": splits,
        "texts": texts,
        "modalities": modalities,
        "lengths": lengths,
    }


def _feature_file(place: Path, known: PurePosixPath, files: list[str]) -> str | None:
    # The known name, or the one pickle of another name in its folder.
    pickles = [
        f
        for f in files
        if PurePosixPath(f).parent == known.parent
        and PurePosixPath(f).suffix.lower() in (".pkl", ".pickle")
    ]
    if known.as_posix() in pickles or not pickles:
        return known.as_posix() if pickles else None
    if len(pickles) > 1:
        raise InputError(
            f"{place}: {first_few(pickles, _SHOWN)} may all be the features of one modality; keep"
            f" one there, or call it {known.name}"
        )
    return pickles[0]


def _members(place: Path):
    # Names below the folder or archive, and how to read one. Features are as large as they are.
    if place.is_dir():
        files = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file())

        def read_file(name: str, features: bool = False) -> bytes:
            return reading.read_bytes(place / name, large=features, was_there=True)

        return files, _refusing(place, read_file)
    try:
        archive = ReopenedZip(place)
    except OSError as error:
        raise InputError(f"{place}: {error.strerror}") from None
    entries = {e.filename: e for e in archive.infolist() if "__MACOSX" not in e.filename}

    def read_entry(name: str, features: bool = False) -> bytes:
        return archive.read(entries[name], features)

    return list(entries), _refusing(place, read_entry)


def _refusing(place: Path, read):
    def refusing(name: str, **options) -> bytes:
        try:
            return read(name, **options)
        except _READ_ERRORS as error:
            raise InputError(f"{place}: {name} cannot be read: {reason(error)}") from None

    return refusing


def _umc_columns(where: str, header: list[str], first: list[str]) -> tuple[list[int], int, int]:
    # Columns of the key's parts, the text and the label: by their names, else by their places, as
    # UMC's data/base.py and data/text_pre.py have them.
    names = [name.strip().lower() for name in header]
    numbers = [cell.strip().isdigit() for cell in first]
    if {"text", "label"} < set(names):
        text, label = names.index("text"), names.index("label")
        key = [names.index(name) for name in ("season", "episode", "clip") if name in names]
        others = [i for i in range(len(names)) if i not in (text, label)]
        if len(key) == 3:
            return key, text, label
        if "id" in names:
            return [names.index("id")], text, label
        pair = len(others) > 1 and numbers[others[0]] and numbers[others[1]]
        return others[: 2 if pair else 1], text, label
    if len(header) >= 4 and numbers[0] and numbers[1]:
        return [0, 1], 2, 3
    if len(header) >= 3 and not numbers[0]:
        return [0], 1, 2
    raise InputError(
        f"{where}: columns {', '.join(header)}; allowed are text, label and id (of MIntRec"
        " season, episode, clip) by their names, MELD-DA's (dialogue, utterance, text, label) and"
        " IEMOCAP-DA's (key, text, label) by their places"
    )


def _padded(
    where: str, data: bytes, ids: list[str], max_length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Padded sequences and their lengths, of a pickled dict id -> (frames[, 1], d).

    Of each the first `max_length` frames; None: all. Returns (n, l, d) float32 with zeros behind
    each end, and (n,) lengths.
    """
    table = unpickle_arrays(where, data)
    arrays = []
    here = [row for row, name in enumerate(ids) if name in table]
    if not here:
        raise InputError(
            f"{where}: no features of any of {len(ids)} utterances, as {ids[0]}; it has those of"
            f" {first_few(list(table), _SHOWN) or 'nothing'}"
        )
    for name in [ids[row] for row in here]:
        array = table[name]
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise InputError(
                f"{where}: {name} is no float array; allowed is (frames, d) or (frames, 1, d)"
            )
        if array.ndim == 3 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 2 or 0 in array.shape or (arrays and array.shape[1] != arrays[0].shape[1]):
            width = arrays[0].shape[1] if arrays else "d"
            raise InputError(
                f"{where}: {name} has the shape {array.shape};"
                f" allowed is (frames, {width}), at least one"
            )
        arrays.append(array[:max_length])
    lengths = np.zeros(len(ids), np.int64)
    lengths[here] = [len(array) for array in arrays]
    # Zeros for what a few long sequences alone have: sixteen times the data is no data set's share.
    padded = 4 * len(ids) * int(lengths.max()) * arrays[0].shape[1]
    reading.within(padded - 16 * len(data), f"{where}: padding to {lengths.max()} frames")
    values = np.zeros((len(ids), lengths.max(), arrays[0].shape[1]), np.float32)
    for row, array in zip(here, arrays, strict=True):
        values[row, : len(array)] = array
    return values, lengths


class _Unpickler(pickle.Unpickler):
    """Knows the few names that a pickled NumPy array refers to, and stands in for each of them.

    Not even NumPy's own code runs on the pickle's bytes: a stand-in records what it is given, and
    `_rebuild` makes the array from a checked type, shape and buffer. The stand-ins are made anew
    for each file, so a pickle that sets attributes on one changes nothing that outlives it.
    """

    def __init__(self, file):
        super().__init__(file)

        class Recorded:
            state = None

            def __init__(self, *args):
                self.args = args

            def __setstate__(self, state):
                self.state = state

        class Array(Recorded):
            pass

        class Buffer(Recorded):
            pass

        class Scalar(Recorded):
            pass

        class Type(Recorded):
            pass

        def latin1(text, encoding="latin1"):
            if not isinstance(text, str) or encoding != "latin1":
                raise pickle.UnpicklingError("bytes in another encoding than latin1")
            return text.encode("latin1")

        def no_bytes():
            return b""

        self.array = Array
        self.buffer = Buffer
        self.scalar = Scalar
        self.type = Type
        self.known = {
            ("multiarray", "_reconstruct"): Array,
            ("multiarray", "scalar"): Scalar,
            ("numeric", "_frombuffer"): Buffer,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): Type,
            ("_codecs", "encode"): latin1,
            ("__builtin__", "bytes"): no_bytes,  # the buffer of an empty array, before protocol 3
        }

    def find_class(self, module, name):
        short = _MODULE.fullmatch(module)
        stand_in = self.known.get((short[1] if short else module, name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stand_in

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to objects outside the file")

    def rebuild(self, value, depth: int = 0):
        """The value with real arrays in place of the stand-ins.

        Refuses what is no array, dict, text or number.
        """
        kind = type(value)
        if kind in (str, int, float):
            return value
        if kind is dict and depth < 4:
            return {self.rebuild(k, 9): self.rebuild(v, depth + 1) for k, v in value.items()}
        if kind is self.array and isinstance(value.state, tuple) and len(value.state) == 5:
            _, shape, dtype, fortran, data = value.state
            return self._view(data, dtype, shape, "F" if fortran is True else "C")
        if kind is self.buffer and len(value.args) == 4:
            data, dtype, shape, order = value.args
            return self._view(data, dtype, shape, order)
        if kind is self.scalar and len(value.args) == 2:
            return self._view(value.args[1], value.args[0], (), "C")[()]
        held = kind.__name__ if kind.__module__ == "builtins" else "an object"
        raise pickle.UnpicklingError(f"it holds {held}")

    def _view(self, data, dtype, shape, order) -> np.ndarray:
        code = dtype.args[0] if type(dtype) is self.type and dtype.args else None
        if not isinstance(code, str):
            code = "object"
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}")
        plain = type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape)
        if not plain or order not in ("C", "F") or type(data) not in (bytes, bytearray):
            raise pickle.UnpicklingError("it holds an array without a plain shape and buffer")
        big_endian = isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",)
        values = np.frombuffer(data, np.dtype(code).newbyteorder(">" if big_endian else "<"))
        return values.reshape(shape, order=order)


def unpickle_arrays(where: str, data: bytes) -> dict:
    """A pickled dict of NumPy arrays, read without running anything that the pickle names.

    Accepts NumPy arrays and scalars of numbers (as NumPy 1 and 2 write them), dicts, str, int and
    float.

    Args:
        where: the file's name, for the error.
        data: the pickle.

    Raises:
        InputError: damaged, or it holds anything else.
    """
    try:
        reading.check_memo(data)
        reader = _Unpickler(io.BytesIO(data))
        value = reader.rebuild(reader.load())
    except _READ_ERRORS as error:
        raise InputError(
            f"{where}: not a pickle of NumPy arrays: {reason(error)};"
            " allowed are a dict of NumPy arrays, text and numbers, or an .npz"
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: holds {type(value).__name__}; allowed is a dict of NumPy arrays"
        )
    return value


def tokens(text: str) -> list[str]:
    """Lower-case words, and punctuation.

    Each run of one sign is a token, for `?` and `...` tell much of an act.
    """
    return [match[0] for match in _TOKEN.finditer(text.lower())]
