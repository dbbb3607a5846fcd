"""Checkpoints: written whole, verified byte by byte when read; the state of random generators.

A checkpoint is a `torch.save` file whose zip comment holds the SHA-256 of all bytes before it:
`torch.load` itself accepts flipped bits without a word. Plain `torch.load(path, weights_only=True)`
reads the file as usual.
"""

import contextlib
import errno
import hashlib
import io
import math
import os
import pickletools
import random
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from common import amp, reading
from common.errors import DISK_FULL, Diverged, InputError, OtherFormat, Stopped, plural, say
from common.retry import retried
from common.run import dist
from common.run.files import (
    BEST,
    CONTENT,
    LAST,
    atomic_write,
    check_config,
    check_format,
    read_config,
    run_dir_of,
)

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
# What a training state and its position must be, to be continued.
_STATE = {
    "stage": str, "start": str, "place": dict, "kinds": dict, "parts": dict, "sums": dict,
    "rng": dict,
}  # fmt: skip
_COUNTS = ("step", "epoch", "batch", "best_epoch", "evals_without_gain", "planned", "log_lines")
# What torch.load raises on damaged files, found by damaging them.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def save(path: Path, state: dict, previous: Path | None = None) -> None:
    """Write `state` so that `path` holds either the old or the new checkpoint, whatever happens.

    The old checkpoint becomes `previous`, where that is given, and is not touched before the new
    one is on the disk.

    Raises:
        OSError: the disk is full (the message says how many bytes are missing) or not writable.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getbuffer()
    # The last two bytes of a zip file give the length of its comment: make room for ours.
    size = _COMMENT.to_bytes(2, "little")
    hasher = hashlib.sha256(body[:-2])
    hasher.update(size)
    parts = (body[:-2], size, _MARK, hasher.hexdigest().encode())
    needed = sum(len(part) for part in parts)
    free = retried(lambda: shutil.disk_usage(path.parent).free, path, was_there=True)
    if free < needed:
        raise _full(errno.ENOSPC, path, needed, needed - free)
    written = 0

    def write():
        nonlocal written
        with atomic_write(path, "wb", keep=previous, stream=True) as file:
            try:
                file.writelines(parts)
                file.flush()
            except OSError:
                written = os.fstat(file.fileno()).st_size
                raise

    try:
        retried(write, path, was_there=True)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        # What statvfs does not know of: a quota, a limit on the size of files, blocks that another
        # process took.
        raise _full(error.errno, path, needed, max(needed - written, 1)) from None


def _full(number: int, path: Path, needed: int, missing: int) -> OSError:
    text = f"{os.strerror(number)}: it takes {needed} bytes, {missing} are missing"
    return OSError(number, text, str(path))


def is_whole(path: Path) -> bool:
    """Whether a file ends with our mark and every byte before it is as it was written."""
    return retried(lambda: _is_whole(path), path)


def is_marked(path: Path) -> bool:
    """Whether a file ends as those of this project do; nothing more of it is read."""
    try:
        with reading.pending(path), reading.open_file(path) as file:
            file.seek(-_COMMENT, os.SEEK_END)
            return file.read().startswith(_MARK)
    except OSError:  # too short, or not there, which its reader says better
        return False


def _is_whole(path: Path) -> bool:
    with reading.pending(path), reading.open_file(path) as file:
        hasher = hashlib.sha256()
        left = os.fstat(file.fileno()).st_size - _COMMENT
        while left > 0 and (part := file.read(min(left, 2**20))):
            hasher.update(part)
            left -= len(part)
        return file.read() == _MARK + hasher.hexdigest().encode()


class AsksToRun(InputError):
    """A file whose objects are of classes, which `torch.load` would have to import."""


def load(path: Path) -> dict:
    """Read a checkpoint on the CPU after checking every byte of it.

    A file without our mark is read unchecked.

    Raises:
        InputError: missing, damaged, of another run format, or not a file of tensors and plain
            values; where it has others, `AsksToRun`.
    """
    path = Path(path)
    try:
        data = reading.read_bytes(path, large=True)
    except OSError as error:
        raise InputError(f"checkpoint {path}: {error.strerror}") from None
    mark = data[-_COMMENT:]
    if mark.startswith(_MARK):
        digest = hashlib.sha256(data[:-_COMMENT]).hexdigest().encode()
        if mark != _MARK + digest:
            raise InputError(f"checkpoint {path} is damaged: its SHA-256 does not match")
    elif path.name in (*LAST, *BEST, CONTENT):
        raise InputError(f"checkpoint {path} is damaged: it is cut short")
    try:
        _refuse_bombs(data, path)
        with warnings.catch_warnings(action="ignore"):  # what cannot be read is refused
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        _check_sizes(state, len(data), path)
    except InputError:
        raise
    except UNREADABLE as error:
        if isinstance(error, MemoryError) and mark.startswith(_MARK):
            raise  # the file is whole, the memory is full
        # torch's own text advises to run what the file asks for.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise AsksToRun(
                f"checkpoint {path} is not a file of tensors and plain values: it asks to run"
                f" {wanted[1]}; store its state dict alone"
            ) from None
        if isinstance(error, (RuntimeError, OSError)):
            reason = str(error).split("\n")[0].split(" This is an internal")[0][:200].strip()
        else:
            reason = "its pickle is damaged or of another format"
        raise InputError(
            f"checkpoint {path} is not a file of tensors and plain values: {reason}"
        ) from None
    if _is_ours(state):
        check_format(state, path)
    return state


def _refuse_bombs(data: bytes, path: Path) -> None:
    # What is small here and large, or endless, once it is read: torch.save never compresses, and
    # stores no bytes but those of tensors.
    pickled = data
    count = 4  # pickles of a file before PyTorch 1.6
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile:  # a pickle without an archive
        pass
    else:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(data):
            raise InputError(
                f"checkpoint {path} is not a file of torch.save: its entries are compressed"
            )
        names = [e.filename for e in entries if e.filename.endswith("/data.pkl")]
        pickled = b"".join(map(archive.read, names))
        count = len(names)
    stream = io.BytesIO(pickled)
    for _ in range(count):
        for op, name, _ in pickletools.genops(stream):
            if op.name == "GLOBAL" and name.endswith(" bytearray"):
                raise InputError(f"checkpoint {path} holds raw bytes; store its state dict alone")
            if op.name == "GLOBAL" and len(name) > 500:  # torch's message would take hours
                raise ValueError("an absurd name")


def _check_sizes(state, size: int, path: Path) -> None:
    """Refuse tensors that need much more memory than the `size` bytes of their file.

    Raises:
        InputError: by more than --max-item-mb.
    """
    total = 0
    pending = [state]
    seen = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set):
            pending += value
        elif isinstance(value, Tensor) and value.layout is torch.strided:
            storage = value.untyped_storage()
            needed = value.numel() * value.itemsize
            if value.device.type == "cpu":
                reading.within(needed - storage.nbytes(), f"checkpoint {path}: one of its tensors")
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    total += storage.nbytes()
    reading.within(total - size, f"checkpoint {path}: its tensors")


@contextlib.contextmanager
def foreign(source) -> Iterator[None]:
    """Around what reads the facts in somebody's checkpoint: whatever is wrong there is one line.

    Raises:
        InputError: in place of what Python raises where a value is missing or of another type.
    """
    try:
        yield
    except (InputError, Stopped, Diverged):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        if isinstance(e, RuntimeError) and dist.peer_lost(e):
            raise
        if amp.out_of_memory(e, torch.device("cpu")):
            raise
        reason = f"{type(e).__name__} {e}".split("\n")[0][:200]
        raise InputError(f"{source} does not hold what a checkpoint holds: {reason}") from None


class _Spec(dict):
    """A model_spec that was read; what it lacks is the file's fault."""

    def __init__(self, values: dict, path: Path):
        super().__init__(values)
        self._path = path

    def __missing__(self, name):
        raise InputError(f"checkpoint {self._path}: its model_spec has no {name}")


def check_state(state, path: Path) -> dict:
    """A training state.

    Raises:
        InputError: it is none.
    """
    if not isinstance(state, dict) or "place" not in state:
        raise InputError(f"{path} holds no state of training: give a last.pt or a run directory")
    wrong = [name for name, kind in _STATE.items() if not isinstance(state.get(name), kind)]
    if not wrong:
        place = state["place"]
        wrong = [name for name in _COUNTS if type(place.get(name)) is not int or place[name] < 0]
    if wrong:
        raise InputError(f"{path} holds no state of training: it lacks {', '.join(wrong)}")
    return state


def _is_ours(state) -> bool:
    # Of this project's scripts, in any format: `model_spec` was called `meta` in format 1, a name
    # that other projects' files have, too.
    if not isinstance(state, dict):
        return False
    specs = [state.get(name) for name in ("model_spec", "meta")]
    return any(isinstance(spec, dict) and "script" in spec for spec in specs)


def load_newest(folder: Path, say=say) -> dict | None:
    """The state in last.pt, or in the one before it where that is damaged.

    None where there is neither.

    Raises:
        InputError: both are damaged, or of another format.
    """
    damaged = False
    for name in LAST:
        if not retried((folder / name).exists, folder / name):
            continue
        try:
            return load_state(folder / name)
        except OtherFormat:
            raise
        except InputError as error:
            say(f"{error}; trying the one before it")
            damaged = True
    if damaged:
        raise InputError(f"no checkpoint in {folder} can be read; start anew with --resume none")
    return None


def load_state(path: Path) -> dict:
    """The state of training in a last.pt, and as `file` the path of that.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    return check_state(load(path), path) | {"file": str(path)}


def load_training_state(path: Path, stage: str) -> tuple[dict, Path]:
    """The state of a stage that `--resume PATH` names, and the folder that it lies in.

    PATH is a last.pt, or a run directory that holds one.

    Raises:
        InputError: there is none, or the file holds something else.
    """
    if not os.path.isdir(path):
        return load_state(path), path.parent
    folder = path
    if any((path / stage / name).exists() for name in LAST):
        folder = path / stage
    state = load_newest(folder)
    if state is None:
        raise InputError(f"--resume {path}: there is no last.pt to resume from")
    return state, folder


def load_best(folder: Path, **wanted) -> tuple[dict | None, str]:
    """The selected model in best.pt, or in the one before it where that cannot be used.

    Args:
        wanted: entries that it must have, if it has them at all.

    Returns:
        It, or None; and what is wrong with best.pt, in words, empty where nothing is.

    Raises:
        OtherFormat: one of them is of another format.
    """
    problems = []
    for name in BEST:
        path = folder / name
        if problems and not path.exists():
            break
        try:
            best = load(path)
        except OtherFormat:
            raise
        except InputError as error:
            problems.append(str(error))
            continue
        if _is_of(best, wanted):
            return best, f"{problems[0]}; {name} is used, epoch {best['epoch']}" if problems else ""
        problems.append(f"checkpoint {path} is of another state")
    return None, "; ".join(problems)


def load_weights(module: torch.nn.Module, state: dict, source) -> None:
    """`load_state_dict(strict=True)` whose error names the keys and the shapes that do not fit.

    Files older than PyTorch 0.4.1 have no `num_batches_tracked`; the module's stay as they are.

    Raises:
        InputError: some key is missing or unknown, has another shape, or is an integer where the
            module has a float; some value is NaN or infinite.
    """
    expected = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise InputError(f"{source}: {name!r:.100} is no tensor of values")
    missing = [
        name for name in expected if name not in state and not name.endswith("num_batches_tracked")
    ]
    unknown = [name for name in state if name not in expected]
    shapes = []
    dtypes = []
    for name, tensor in expected.items():
        if name not in state:
            continue
        stored = state[name]
        if stored.shape != tensor.shape:
            shapes.append(f"{name} is {tuple(stored.shape)}, the model's is {tuple(tensor.shape)}")
        if stored.is_floating_point() != tensor.is_floating_point():
            dtypes.append(f"{name} is {stored.dtype}, the model's is {tensor.dtype}")
    problems = []
    if missing:
        problems.append(f"{plural(len(missing), 'key')} missing (first: {', '.join(missing[:3])})")
    if unknown:
        count = plural(len(unknown), "unknown key")
        problems.append(f"{count} (first: {', '.join(unknown[:3])})")
    problems += shapes[:2]
    if len(shapes) > 2:
        problems.append(f"and {plural(len(shapes) - 2, 'more shape')}")
    problems += dtypes[:1]
    if problems:
        raise InputError(f"{source} does not fit this model: {'; '.join(problems)}")
    bad = next((name for name in expected if name in state and not _is_finite(state[name])), None)
    if bad is not None:
        raise InputError(
            f"{source} holds values that are NaN or infinite (first: {bad}): no model can start"
            " from it; take an earlier checkpoint, or fetch the file again"
        )
    module.load_state_dict({name: state.get(name, tensor) for name, tensor in expected.items()})


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes are NaN where any value is; no mask of all values is made.
    extremes = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return all(math.isfinite(value) for value in extremes)


def has_best(place: dict) -> bool:
    """Whether a model was selected before a state was saved; epoch 0 is the start."""
    return bool(place["best_epoch"]) or place.get("best") is not None


def _is_of(best, wanted: dict) -> bool:
    if not isinstance(best, dict) or not {"model", "metrics", "epoch"} <= best.keys():
        return False
    return all(best.get(name, value) == value for name, value in wanted.items())


def say_once(text: str) -> None:
    """A line on the console, from one process."""
    if dist.rank() == 0:
        say(text)


def load_selected(source: str, say=say_once) -> dict:
    """The selected model (best.pt) of a run directory's last stage, or a checkpoint file.

    Where a run's best.pt cannot be read, what is used instead is said.

    Returns:
        A dict with `model`, `model_spec`, `epoch` and `metrics`.

    Raises:
        InputError: there is none, or the file does not say what model it holds.
    """
    path = Path(source)
    if not os.path.isdir(path):
        return _with_model(load(path), path)
    stages = (read_config(path) or {}).get("card", {}).get("stages", [])
    for folder in (*(path / stage for stage in reversed(stages)), path):
        state = load_selected_in(folder, say)
        if state is not None:
            return state
    raise InputError(f"{path} holds no selected model (best.pt) yet")


def load_selected_in(folder: Path, say=say_once) -> dict | None:
    """As `load_selected`, of the folder of one stage; None where no model was selected yet."""
    state = None
    if not any((folder / name).exists() for name in BEST):
        state = load_newest(folder, say)
        if state is None or not has_best(state["place"]):
            return None
    best, problem = load_best(folder)
    if problem and best is not None:
        say(problem)
    if best is not None:
        return _with_model(best, folder / BEST[0])
    state = state or load_newest(folder, say)
    if state is None:
        raise InputError(problem)
    state = _with_model(state, folder / LAST[0])
    say(f"{problem}; the model of {LAST[0]} is used, epoch {state['epoch']}")
    return state


def _with_model(state, path: Path) -> dict:
    # The model of a state of training is that of its last step.
    if _is_ours(state) and "place" in state:
        place = check_state(state, path)["place"]
        state |= {
            "model": state["parts"].get("model"),
            "epoch": place["epoch"],
            "metrics": place.get("results"),
        }
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("model"), dict)
        or not isinstance(state.get("model_spec"), dict)
        or not isinstance(state["model_spec"].get("script"), str)
        or not isinstance(state.setdefault("metrics", {}), dict)
    ):
        raise InputError(
            f"{path} does not say what model it holds: give a run directory, its best.pt or"
            " its last.pt"
        )
    return state | {"model_spec": _Spec(state["model_spec"], path)}


def config_of(source: str | Path) -> dict:
    """What the config.json of a run says, and of a checkpoint file what it says itself.

    A checkpoint works as well alone: it holds the part of config.json that its use needs.

    Raises:
        InputError: the run or the file cannot be read.
    """
    path = Path(source)
    state = load(path) if os.path.isfile(path) else {}
    if not _is_ours(state) or "config" not in state:
        held = read_config(run_dir_of(source))
        if held is not None or not os.path.isdir(path):
            return held or {}
        state = load_selected(source, lambda _: None)
    return check_config(state.get("config", {}), source)


def weights_digest(weights: dict[str, Tensor]) -> str:
    """Sixteen hexadecimal digits that stand for a state dict's names and values."""
    hasher = hashlib.sha256()
    for name in sorted(weights):
        hasher.update(name.encode())
        hasher.update(weights[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


def rng_state() -> dict:
    """The state of every global random-number generator, as tensors and plain values."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    return {
        "python": random.getstate(),
        "numpy": {
            "key": torch.from_numpy(numpy_state["key"].astype(np.int64)),
            "pos": int(numpy_state["pos"]),
        },
        "torch": torch.get_rng_state(),
        # Of this rank's device alone. The other ranks draw equally often, so theirs are the same.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    """Put every generator back to where `rng_state` found it."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy_key = state["numpy"]["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", numpy_key, state["numpy"]["pos"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
