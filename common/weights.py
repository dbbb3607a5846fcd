"""Published weights: found by name, files read safely, state dicts mapped strictly onto a model.

`.safetensors` is read here (https://huggingface.co/docs/safetensors): eight bytes with the header's
length, little-endian; a JSON header, name -> dtype, shape and byte range; the tensors' bytes
without a gap. Everything is checked against the file's size before anything is allocated.
TorchScript archives give up their tensors, and none of their code runs. Other files go through
`torch.load(weights_only=True)`.
"""

import hashlib
import http.client
import io
import math
import os
import pickle
import re
import socket
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import reading
from common.errors import InputError, printable, say
from common.retry import retried
from common.run import checkpoint, dist
from common.run.files import read_config, read_json, run_dir_of

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
# What a pickle with objects may name: what is used as it is, functions whose values no weights
# need, and classes of Python's own that only hold settings.
_PLAIN = {"collections.OrderedDict": OrderedDict, "__builtin__.set": set, "torch.Size": tuple}
_VALUES = {
    "collections.defaultdict", "__builtin__.complex", "torch.device", "numpy.dtype",
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core") for name in ("scalar", "_reconstruct")
    ),
}  # fmt: skip
_HARMLESS = {"argparse.Namespace", "typing.Any"}
_MAX_MODULES = 100_000  # of a TorchScript archive, which may name one module in many places
# Where training scripts keep the model's state dict: this project's, timm's and Lightning's, the
# PyTorch tutorials', VISSL's. An average over steps comes first, as timm reads them.
_CONTAINERS = (
    "parts", "state_dict_ema", "model_ema", "state_dict", "model", "model_state",
    "model_state_dict", "net", "classy_state_dict", "base_model",
)  # fmt: skip
# What public training code puts before the names of its backbone, and what is said of it. Of
# several networks in one file the first is taken: the one that the project itself evaluates.
LAYOUTS = {
    "encoder_q.": "the query encoder, as MoCo evaluates it",
    "base_encoder.": "the base encoder, as MoCo v3 evaluates it",
    "online_network.": "the online network, as BYOL evaluates it",
    "online_network_state_dict.": "the online network, as BYOL evaluates it",
    "online_encoder.": "the online network, as BYOL evaluates it",
    "online_net.": "the online network, as BYOL evaluates it",
    "teacher.": "the teacher, as DINO evaluates it",
    "teacher_backbone.": "the teacher, as DINO evaluates it",
    "student.": "the student; there is no teacher",
    "trunk.": "",  # VISSL
    "_feature_blocks.": "",  # VISSL
    "module.": "",  # SupCon, inside of "encoder."
    "model.": "",  # Lightning, lightly
    "backbone.": "",  # this project, lightly, solo-learn, Barlow Twins, VICReg, OpenMMLab
    "encoder.": "",  # SupCon, SimSiam, PyTorch Lightning Bolts
    "base_model.": "",
    "main.": "",
    "net.": "",
    "network.": "",
    "resnet.": "",
    "convnet.": "",
    "feature_extractor.": "",
    "f.": "",
    "0.": "",  # nn.Sequential of a backbone and a head
    "1.": "",  # ... of a normalization and a backbone
}
# What timm, and after it DINO, MoCo v3 and MAE, call the parts of torchvision's ViT.
_VIT_PARTS = {
    r"^patch_embed\.proj\.": "conv_proj.",
    r"^cls_token$": "class_token",
    r"^pos_embed$": "encoder.pos_embedding",
    r"^norm\.": "encoder.ln.",
    r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".self_attention.in_proj_",
    r"\.attn\.proj\.": ".self_attention.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.3.",
}
_NUMBERS = frozenset(map(str, range(100)))  # of the children of an nn.Sequential
_NAMES = ("imagenet", "openai")
_SILENCE = 30  # seconds without a byte after which a server counts as gone


class Published(NamedTuple):
    """A file that can be downloaded; `sha256` is its SHA-256 or how that begins."""

    url: str
    sha256: str


def locate(given: str, backbone: str, published: dict[str, Published]) -> str | Path:
    """The file that --weights means: a path, or the name of published weights, which are fetched.

    A name is a name whatever lies in the folder. All ranks call this together.

    Args:
        published: what the backbone has, by name.

    Raises:
        InputError: the backbone has nothing of that name; or see `fetch`.
    """
    if given in published:
        return fetch(*published[given], "--weights")
    if given in _NAMES or (re.fullmatch(r"[\w-]+", given) and not os.path.lexists(given)):
        raise InputError(
            f"--weights {given}: by name {backbone} has {', '.join(published) or 'none'};"
            " otherwise give the path of a file, docs/ has the addresses of published ones"
        )
    return given


def fetch(url: str, sha256: str, flag: str) -> Path:
    """A published file in torch.hub's cache folder; a file that is there is used without network.

    Rank 0 downloads, the others wait for it; then those of a node with a cache of its own do. All
    ranks call this together.

    Args:
        sha256: of the file, or how that begins.
        flag: by which the user can name a copy.

    Raises:
        InputError: it could not be fetched or is not that file; the line says what to fetch and
            where to put it.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    fault = dist.broadcast(_download(url, sha256, path) if dist.rank() == 0 else None)
    if fault is None and dist.rank():
        fault = _download(url, sha256, path)
    if fault is not None:
        raise InputError(
            f"{url} could not be fetched ({fault}): put that file (SHA-256 {sha256}) at {path},"
            f" or name your copy with {flag} FILE"
        )
    return path


def _download(url: str, sha256: str, path: Path) -> str | None:
    # Does nothing where the file is there; returns what went wrong.
    try:
        if retried(lambda: _sha256(path), path).startswith(sha256):
            return None
    except (OSError, InputError):  # none there, or not that one
        pass
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)
    try:
        if os.path.isdir(path):
            return f"{path} is a folder"
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"downloading {url} to {path}")
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        return printable(f"{getattr(error, 'reason', error)}".strip())
    except RuntimeError:
        return "what came has another SHA-256"
    finally:
        socket.setdefaulttimeout(before)
    return None


def _sha256(path: Path) -> str:
    with reading.pending(path), reading.open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a file of weights: on the CPU, in the file's order and dtypes.

    `.safetensors` is read as such, every other name as a file of `torch.save`, this project's
    checkpoints included, or of `torch.jit.save`. The usual containers (`state_dict`, `model`, ...)
    are opened; what DistributedDataParallel and `torch.compile` put before names (`module.`,
    `_orig_mod.`) is taken off.

    Raises:
        InputError: missing, damaged, of another format, or more than tensors; one line names the
            file and the fault.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise InputError(f"weights {path}: a folder; give a file, of a run its best.pt")
    try:
        os.stat(path)
    except OSError as error:
        raise InputError(f"weights {path}: {error.strerror.lower()}") from None
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    else:
        state = unwrap(_read_torch(path), path)
    return _without_wrappers(state, path)


def _without_wrappers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    names = {
        name: name.removeprefix("module.").replace("_orig_mod.", "").removeprefix("module.")
        for name in state
    }
    if len(set(names.values())) < len(names):
        raise InputError(
            f"weights {path}: the same name stands with and without the prefix module. or"
            " _orig_mod."
        )
    return {names[name]: tensor for name, tensor in state.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file under their own names.

    Raises:
        InputError: the file breaks the format in any way.
    """

    def wrong(what: str) -> InputError:
        return InputError(f"weights {path} is not a valid safetensors file: {what}")

    try:
        with reading.pending(path), reading.open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise wrong(
                    f"a header of {length} bytes in a file of {size} (allowed: 2 to {_MAX_HEADER})"
                )
            try:
                text = file.read(length)
                header = reading.parse_json(text, "its header")
                entries = _entries(header, size - 8 - length)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError among them
                raise wrong(f"{error}"[:300]) from None
            tensors = {}
            for name, dtype, shape, begin in entries:
                tensors[name] = tensor = torch.empty(shape, dtype=dtype)
                if tensor.numel():
                    file.seek(8 + length + begin)
                    if file.readinto(tensor.view(-1).view(torch.uint8).numpy()) < tensor.nbytes:
                        raise wrong("it became shorter while it was read")
            return tensors
    except OSError as error:
        raise InputError(f"weights {path}: {error.strerror}") from None


def _entries(header, size: int) -> list[tuple[str, torch.dtype, list[int], int]]:
    """(name, dtype, shape, first byte) of every tensor, in the header's order.

    Raises:
        ValueError: they do not fill `size` bytes exactly, or the header is malformed.
    """
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    notes = header.pop("__metadata__", None) or {}
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("its __metadata__ is not an object of strings")
    entries = []
    ranges = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"{name!r} lacks dtype, shape or data_offsets")
        kind = entry["dtype"]
        shape = entry["shape"]
        span = entry["data_offsets"]
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {kind!r}, allowed {', '.join(_DTYPES)}")
        # bool is an int to Python, not to JSON. Torch holds 64 dimensions and 63-bit strides.
        plain = all(
            isinstance(part, list) and all(type(n) is int and n >= 0 for n in part)
            for part in (shape, span)
        )
        if not plain or len(shape) > 64 or len(span) != 2:
            raise ValueError(f"{name!r} has shape {shape} and data_offsets {span}")
        dtype = _DTYPES[kind]
        begin, end = span
        if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
            raise ValueError(f"{name!r} has the absurd shape {shape}")
        wanted = math.prod(shape) * dtype.itemsize
        if not begin <= end <= size or end - begin != wanted:
            raise ValueError(
                f"{name!r}, {kind} of shape {shape}, needs {wanted} bytes; it has {span} of {size}"
            )
        entries.append((name, dtype, shape, begin))
        ranges.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(ranges):
        if begin != last:
            fault = "overlaps another tensor" if begin < last else "leaves a gap"
            raise ValueError(f"{name!r} {fault} at byte {begin}")
        last = end
    if last != size:
        raise ValueError(f"its tensors end at byte {last} of {size}")
    return entries


def _read_torch(path: Path):
    """What `torch.load(weights_only=True)` gives, after refusing what it has no good answer to."""
    try:
        with reading.open_file(path) as file:
            is_archive = zipfile.is_zipfile(file)
        entries = reading.open_zip(path).infolist() if is_archive else []
    except (OSError, InputError, zipfile.BadZipFile) as error:
        raise InputError(f"weights {path}: {error}") from None
    code = next((e.filename for e in entries if e.filename.endswith("/constants.pkl")), None)
    if code:
        return read_torchscript(path, code.removesuffix("constants.pkl"))
    try:
        return checkpoint.load(path)
    except checkpoint.AsksToRun:
        root = next((e.filename for e in entries if e.filename.endswith("/data.pkl")), None)
        state = read_objects(path, root and root.removesuffix("data.pkl"))
        if isinstance(state, Unread):
            raise
        return state


class Unread:
    """What stands for an object of a class that is not imported: empty, whatever is said of it."""

    def __init__(self, *_, **__):  # a pickle makes objects without it; who calls it runs something
        raise pickle.UnpicklingError(f"it asks to run {type(self).__name__}")

    def ignore(self, *_):
        """Take what a pickle says of an object."""

    __setstate__ = __setitem__ = append = extend = ignore


def read_objects(path: Path, root: str | None):
    """What a file of `torch.save` holds, with an `Unread` for each object of a class.

    So training scripts keep settings and meters beside the weights. Nothing is imported or run;
    objects of classes of torch and Python's own, and calls, but of NumPy's values, are refused.

    Args:
        root: folder of the archive inside the file, with its slash; None: it is no archive, as
            before PyTorch 1.6.

    Raises:
        InputError: the file is damaged or asks for anything else.
    """
    try:
        if root is None:
            return _OldUnpickler(reading.read_bytes(path, large=True)).load()
        with reading.pending(path), reading.open_zip(path) as archive:
            return _ObjectUnpickler(archive, root).load()
    except checkpoint.UNREADABLE as error:
        reason = f"{error}".split("\n")[0][:200]
        raise InputError(
            f"checkpoint {path} is not a file of tensors and plain values: {reason}; store its"
            " state dict alone"
        ) from None


def read_torchscript(path: Path, root: str) -> dict[str, Tensor]:
    """Read the parameters and buffers in an archive of `torch.jit.save`, and none of its code.

    Args:
        root: folder of the archive inside the file, with its slash.

    Raises:
        InputError: the archive is damaged or asks for anything but modules and plain tensors.
    """
    try:
        with reading.pending(path), reading.open_zip(path) as archive:
            pending = [("", _TorchScriptUnpickler(archive, root).load())]
            state = {}
            for _ in range(_MAX_MODULES):
                if not pending:
                    return state
                prefix, module = pending.pop()
                for name, value in vars(module).items():
                    if isinstance(value, SimpleNamespace):
                        pending.append((f"{prefix}{name}.", value))
                    elif isinstance(value, Tensor):
                        state[prefix + name] = value
                if len(state) > _MAX_MODULES:
                    break
            raise pickle.UnpicklingError(f"more than {_MAX_MODULES} modules or tensors")
    except (
        *checkpoint.UNREADABLE,
        RecursionError,
        NotImplementedError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = f"{error}".split("\n")[0][:200]
        raise InputError(
            f"weights {path} is no TorchScript archive of a plain module: {reason}"
        ) from None


class _TorchScriptUnpickler(pickle.Unpickler):
    """Modules as their attributes alone.

    Nothing that the archive names is imported: each name stands for an inert value or a method
    here, and the rest is refused.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str):
        data = self._stored(archive, f"{root}data.pkl")
        reading.check_memo(data)
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._root = root
        self._storages = {}

    @staticmethod
    def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"{name} is compressed")
        return archive.read(name)

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return SimpleNamespace
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # lists and dicts with their types, which no tensor needs
            return self._untyped
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid) -> Tensor:
        _, dtype, key, _, _ = pid
        if (dtype, key) not in self._storages:
            data = bytearray(self._stored(self._archive, f"{self._root}data/{key}"))
            storage = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self._storages[dtype, key] = storage
        return self._storages[dtype, key]

    def _tensor(self, storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
        if math.prod(size) > storage.numel():
            raise pickle.UnpicklingError(
                f"a tensor of shape {size} in a storage of {storage.numel()} elements"
            )
        return storage.as_strided(size, stride, offset)

    def _untyped(self, value, *_):
        return value


class _ObjectUnpickler(_TorchScriptUnpickler):
    """Tensors and plain values; objects of other classes as `Unread`."""

    def find_class(self, module: str, name: str):
        full = f"{module}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if full in ("torch._utils._rebuild_parameter", "_codecs.encode"):
            return self._untyped
        unread = type(full, (Unread,), {})
        if full in _VALUES:
            return lambda *_: unread.__new__(unread)
        if full in _HARMLESS or isinstance(getattr(torch, name, None), torch.dtype):
            return unread
        if module.split(".")[0] in ("torch", *sys.stdlib_module_names):
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2") or name in _STORAGES:
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"it asks to run {full:.200}")
        return unread


class _OldUnpickler(_ObjectUnpickler):
    """The same of a file from before PyTorch 1.6: five pickles (three constants, the objects, the
    keys of the storages), then each storage's length and values, little-endian.
    """

    def __init__(self, data: bytes):
        reading.check_memo(data, pickles=5)
        self._file = io.BytesIO(data)
        self._left = len(data)
        pickle.Unpickler.__init__(self, self._file)
        self._storages = {}

    def persistent_load(self, pid) -> Tensor:
        _, dtype, key, _, count, view = pid
        if key not in self._storages:
            self._left -= count * dtype.itemsize
            if view is not None or count < 0 or self._left < 0:
                raise pickle.UnpicklingError(f"a storage of {count} elements, view {view}")
            self._storages[key] = torch.empty(count, dtype=dtype)
        return self._storages[key]

    def load(self):
        *_, state, keys = [super(_OldUnpickler, self).load() for _ in range(5)]
        for key in keys:
            values = self._storages[key].view(torch.uint8).numpy()
            count = int.from_bytes(self._file.read(8), "little")
            if count != len(self._storages[key]) or self._file.readinto(values) < len(values):
                raise pickle.UnpicklingError(f"storage {key} is cut short")
        return state


def unwrap(state, path: Path) -> dict[str, Tensor]:
    """The state dict inside what a training script saved.

    Of several side by side (`teacher`, `student`) it is one whose names begin with theirs.

    Raises:
        InputError: there is none.
    """
    for _ in range(4):  # a container may be inside another, in a hostile file inside itself
        inner = next(
            (k for k in _CONTAINERS if isinstance(state, dict) and isinstance(state.get(k), dict)),
            None,
        )
        state = state if inner is None else state[inner]
    if isinstance(state, dict) and not any(isinstance(v, Tensor) for v in state.values()):
        side_by_side = {
            f"{key}.{name}": tensor
            for key, inner in state.items()
            if isinstance(inner, dict) and all(isinstance(v, Tensor) for v in inner.values())
            for name, tensor in inner.items()
        }
        state = side_by_side or state
    if not isinstance(state, dict) or not state:
        what = f"it is a {type(state).__name__}" if not isinstance(state, dict) else "it is empty"
        raise InputError(f"weights {path} holds no state dict of tensors: {what}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"weights {path} holds no state dict of tensors: {name!r} is"
                f" {type(tensor).__name__}, not a tensor; store the state dict alone"
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise InputError(f"weights {path}: {name} is sparse, quantized or without values")
    return {name: tensor.detach() for name, tensor in state.items()}


def layouts(
    names: Iterable[str], children: list[str]
) -> Iterator[tuple[list[str], dict[str, str]]]:
    """What of a state dict may be a backbone: the whole of it, then by what LAYOUTS takes off.

    Each also with the names that torchvision has, where a file numbers the `children` of the
    backbone (nn.Sequential, as lightly's), calls a ResNet's `downsample` `shortcut` (SupCon) or the
    parts of a ViT as timm does.

    Yields:
        What was taken off, part by part, and the rest: names of the file -> those of the backbone.
    """
    taken = []
    left = {name: name for name in names}
    while True:
        yield taken, left
        first_of = {old: new.split(".")[0] for old, new in left.items()}
        numbers = sorted({int(first) for first in first_of.values() if first in _NUMBERS})
        child_of = dict(zip(map(str, numbers), children, strict=False))
        renamed = {}
        for old, new in left.items():
            first = first_of[old]
            rest = new.removeprefix(first).replace(".shortcut.", ".downsample.")
            renamed[old] = child_of.get(first, first) + rest
        if "patch_embed.proj.weight" in renamed.values():
            for theirs, ours in _VIT_PARTS.items():
                renamed = {old: re.sub(theirs, ours, new) for old, new in renamed.items()}
        if renamed != left:
            yield taken, renamed
        prefix = next((p for p in LAYOUTS if any(n.startswith(p) for n in left.values())), None)
        if prefix is None:
            return
        taken = [*taken, prefix]
        left = {o: n.removeprefix(prefix) for o, n in left.items() if n.startswith(prefix)}


def of_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of a model that has more, or the state dict itself.

    That part is `backbone.*`; the prefix is taken off.
    """
    prefix = "backbone."
    backbone = {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    return backbone or state


def load_backbone(source: str, script: str) -> tuple[dict[str, Tensor], dict]:
    """Load a backbone from a finished run directory, a checkpoint or a file of a plain state dict.

    Prefixes and heads (`backbone.`, `projector.`, `fc.`) are taken off.

    Args:
        script: the short name of the script whose runs are allowed.

    Returns:
        Its weights, and the run's model_spec; of a plain state dict that is empty.

    Raises:
        InputError: there is none, the run has not finished, or it is another script's.
    """
    path = Path(source)
    if os.path.isdir(path):
        run = run_dir_of(source)
        read_config(run)  # refuses a run of another format
        summary = read_json(run / "summary.json") or {}
        state = None
        if summary.get("status") == "finished":
            selected = (checkpoint.load_selected_in(folder) for folder in (path / "pretrain", path))
            state = next(filter(None, selected), None)
        if state is None:
            raise InputError(
                f"--from {path} is not a finished run: run it to its end, or name a checkpoint"
                " file in it"
            )
    elif path.suffix == ".safetensors":
        state = {"model": read_safetensors(path)}
    else:
        state = _read_torch(path)
    model_spec = state.get("model_spec", {}) if isinstance(state, dict) else {}
    kinds = {"image_size": int, "proj_dim": int, "normalization": list}
    if not isinstance(model_spec, dict) or not all(
        type(model_spec.get(name, kind())) is kind for name, kind in kinds.items()
    ):
        raise InputError(f"--from {source}: its model_spec is none of train_{script}.py")
    if model_spec.get("script", script) != script:
        raise InputError(
            f"--from {source} is of train_{model_spec['script']}.py, allowed are runs of"
            f" train_{script}.py"
        )
    weights = of_backbone(_without_wrappers(unwrap(state, path), path))
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    return weights, model_spec


def load(
    model: nn.Module,
    state: dict[str, Tensor],
    source,
    *,
    head: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
) -> list[str]:
    """Load `state` strictly, but for its heads.

    Args:
        source: what the messages call the weights, usually the file's path.
        head: prefixes such as "fc.". A head that is missing on one side, or of another shape, is
            left out: the model's keeps its values. One that fits is loaded.
        ignore: prefixes of weights that the model has no use for.

    Returns:
        What was left out, one line each, to be logged.

    Raises:
        InputError: any other key is missing or unknown, or has another shape; see
            `checkpoint.load_weights`.
    """
    model_state = model.state_dict()
    left_out = []
    for prefix in ignore:
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        if len(kept) < len(state):
            count = len(state) - len(kept)
            left_out.append(f"{source}: {prefix}* ({count} tensors) is not used")
        state = kept
    for prefix in head:
        file_shapes = _shapes_of_head(state, prefix)
        model_shapes = _shapes_of_head(model_state, prefix)
        if file_shapes == model_shapes:
            continue
        in_file = max(file_shapes.values(), key=len, default="none")
        in_model = max(model_shapes.values(), key=len, default="none")
        left_out.append(
            f"{source}: the head {prefix}* is left out"
            f" (in the file {in_file}, in this model {in_model})"
        )
        state = {name: tensor for name, tensor in state.items() if name not in file_shapes}
        state |= {name: model_state[name] for name in model_shapes}
    checkpoint.load_weights(model, state, source)
    return left_out


def _shapes_of_head(state: dict[str, Tensor], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(prefix)}
