"""Atomic, verified checkpoints; exact resume; signals.

A checkpoint is a `torch.save` file whose zip comment holds the SHA-256 of all bytes before it: `torch.load` itself
accepts flipped bits without a word. Plain `torch.load(path, weights_only=True)` reads the file as usual.
"""

import errno
import hashlib
import io
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from common import dist
from common.config import DISK_FULL, EXIT_STOPPED, Diverged, InputError, Stopped
from common.log import Log

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
# What torch.load raises on damaged files, found by damaging them.
UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, UnpicklingError, struct.error),
)


def save(path: Path, state: dict, previous: Path | None = None) -> None:
    """Write `state` so that `path` holds either the old or the new checkpoint, whatever happens in between.

    The bytes go to a temporary file in the same directory, are forced to the disk and renamed; the old checkpoint
    becomes `previous`, where that is given, and is not touched before the new one is on the disk.

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
    parts = body[:-2], size, _MARK, hasher.hexdigest().encode()
    needed, free = sum(map(len, parts)), shutil.disk_usage(path.parent).free
    if free < needed:
        raise _full(errno.ENOSPC, path, needed, needed - free)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            # What statvfs does not know of: a quota, a limit on the size of files, blocks that another process took.
            written = temporary.stat().st_size if temporary.exists() else 0
            raise _full(error.errno, path, needed, max(needed - written, 1)) from None
        if previous is not None:
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _full(number: int, path: Path, needed: int, missing: int) -> OSError:
    return OSError(number, f"{os.strerror(number)}: it takes {needed} bytes, {missing} are missing", str(path))


def remove_orphans(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for orphan in folder.glob(".*.tmp*"):
        orphan.unlink()


def is_whole(path: Path) -> bool:
    """Whether a file ends with our mark and every byte before it is as it was written."""
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _COMMENT
        hasher = hashlib.sha256()
        while left > 0 and (part := file.read(min(left, 2**20))):
            hasher.update(part)
            left -= len(part)
        return file.read() == _MARK + hasher.hexdigest().encode()


def load(path: Path) -> dict:
    """Read a checkpoint on the CPU after checking every byte of it; a file without our mark is read unchecked.

    Raises:
        InputError: missing, damaged, or not a file of tensors and plain values.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"checkpoint {path}: {error.strerror}") from None
    mark = data[-_COMMENT:]
    marked = mark.startswith(_MARK)
    if marked and hashlib.sha256(data[:-_COMMENT]).hexdigest().encode() != mark[len(_MARK) :]:
        raise InputError(f"checkpoint {path} is damaged: its SHA-256 does not match")
    if not marked and path.name in ("last.pt", "best.pt", "last.previous.pt"):
        raise InputError(f"checkpoint {path} is damaged: it is cut short")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # torch's own text advises to run what the file asks for.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            reason = f"it asks to run {wanted[1]}; store its state dict alone"
        elif isinstance(error, (RuntimeError, OSError)):
            reason = str(error).split("\n")[0].split(" This is an internal")[0][:200].strip()
        else:
            reason = "its pickle is damaged or of another format"
        raise InputError(f"checkpoint {path} is not a file of tensors and plain values: {reason}") from None


def load_newest(folder: Path, say=print) -> dict | None:
    """The state in `last.pt`, or in the one before it where that is damaged; None where there is neither."""
    damaged = None
    for name in ("last.pt", "last.previous.pt"):
        if (folder / name).exists():
            try:
                state = load(folder / name)
            except InputError as error:
                say(f"{error}; trying the one before it")
                damaged = error
                continue
            return state
    if damaged:
        raise InputError(f"no checkpoint in {folder} can be read; start anew with --resume none")
    return None


def load_training_state(path: Path, stage: str) -> tuple[dict, dict | None]:
    """The state of a stage that `--resume PATH` names, a last.pt or the one of a run directory, and its best.pt.

    Raises:
        InputError: there is none, or the file holds weights only.
    """
    if path.is_dir():
        names = "last.pt", "last.previous.pt"
        folder = next((f for f in (path / stage, path) if any((f / name).exists() for name in names)), path)
        state = load_newest(folder)
        if state is None:
            raise InputError(f"--resume {path}: there is no last.pt to go on from")
    else:
        folder, state = path.parent, load(path)
        if "place" not in state:
            raise InputError(f"--resume {path} holds weights only: give a last.pt or a run directory")
    best = folder / "best.pt"
    return state, load(best) if best.exists() else None


def load_weights(module: torch.nn.Module, state: dict, source) -> None:
    """`load_state_dict(strict=True)` whose error names the keys and the shapes that do not fit.

    Files older than PyTorch 0.4.1 have no `num_batches_tracked`; the module's stay as they are.

    Raises:
        InputError: some key is missing or unknown, has another shape, or is an integer where the module has a float.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in own]
    problems = [f"{len(missing)} keys missing (first: {', '.join(missing[:3])})"] if missing else []
    problems += [f"{len(extra)} unknown keys (first: {', '.join(extra[:3])})"] if extra else []
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems += shapes[:2] + ([f"and {len(shapes) - 2} more shapes"] if len(shapes) > 2 else [])
    kinds = [name for name in own if name in state and state[name].is_floating_point() != own[name].is_floating_point()]
    problems += [f"{name} is {state[name].dtype}, the model's is {own[name].dtype}" for name in kinds[:1]]
    if problems:
        raise InputError(f"{source} does not fit this model: {'; '.join(problems)}")
    module.load_state_dict({name: state.get(name, tensor) for name, tensor in own.items()})


def load_selected(source: str) -> dict:
    """The selected model (best.pt) of a run directory's last stage, or a checkpoint file: `model`, `meta`, `epoch`,
    `metrics`.

    Raises:
        InputError: there is none, or the file does not say what model it holds.
    """
    path = Path(source)
    if path.is_dir():
        folders = [path / "finetune", path / "linear", path / "cluster", path, path / "pretrain"]
        path = next((folder for folder in folders if (folder / "best.pt").exists()), path) / "best.pt"
    state = load(path)
    if "place" in state:
        place = state["place"]
        state |= {"model": state["parts"].get("model"), "epoch": place["epoch"], "metrics": place["results"]}
    if not state.get("model") or "meta" not in state:
        raise InputError(f"{path} does not say what model it holds: give a run directory, its best.pt or its last.pt")
    return state


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
        "numpy": {"key": torch.from_numpy(numpy_state["key"].astype(np.int64)), "pos": int(numpy_state["pos"])},
        "torch": torch.get_rng_state(),
        # Of this process's device: the others' are their own processes' matter, and go the same way.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(("MT19937", state["numpy"]["key"].numpy().astype(np.uint32), state["numpy"]["pos"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


class Signals:
    """USR1 and USR2 (time limit, preemption) ask for a save and a requeue; TERM and Ctrl-C for a save and an end.

    The handler only sets a flag: saving inside it could tear the step that it interrupts. A second Ctrl-C leaves at
    once. Until `defer` there is nothing to save: USR1 and USR2 requeue at once, the others end the process as usual.
    A context, after which the handlers are those from before.
    """

    REQUEUE, END = 1, 2

    def __init__(self):
        self.asked = 0
        self._before = {}

    def __enter__(self) -> "Signals":
        self._handle_by(self._leave_now, "SIGUSR1", "SIGUSR2")
        return self

    def __exit__(self, *_) -> None:
        for code, handler in self._before.items():
            signal.signal(code, handler)

    def defer(self) -> None:
        """From now on a signal waits for the next boundary of a step."""
        self._handle_by(self._ask_requeue, "SIGUSR1", "SIGUSR2")
        self._handle_by(self._ask_end, "SIGTERM", "SIGINT")

    def _handle_by(self, handler, *names: str) -> None:
        for name in names:
            code = getattr(signal, name, None)  # Windows has no USR1
            if code is not None:
                before = signal.signal(code, handler)
                self._before.setdefault(code, before)

    def _leave_now(self, number: int, frame) -> None:
        stop = self.leave(self.REQUEUE, "nothing to save yet")
        print(stop, file=sys.stderr)
        # Not Stopped: what reads damaged files catches many an exception.
        raise SystemExit(stop.code)

    def _ask_requeue(self, number: int, frame) -> None:
        self.asked = max(self.asked, self.REQUEUE)

    def _ask_end(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = self.END

    @staticmethod
    def leave(asked: int, saved: str) -> Stopped:
        """Requeue the Slurm job where that was asked, and say how the run ended."""
        job = os.environ.get("SLURM_JOB_ID")
        if asked == Signals.REQUEUE and job and shutil.which("scontrol"):
            if dist.rank() == 0:
                command = ["scontrol", "requeue", job]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
                    problem = done.stderr.strip() if done.returncode else None
                except subprocess.TimeoutExpired:
                    problem = "no answer within 20 s"
                if problem is not None:
                    return Stopped(f"{saved}; {' '.join(command)}: {problem}", EXIT_STOPPED)
            return Stopped(f"{saved}; job {job} is requeued and will go on from there", 0)
        return Stopped(f"{saved}; run the same command again to go on (with --resume auto, the default)", EXIT_STOPPED)


_PLACE = ("step", "epoch", "batch", "best", "best_epoch", "certain", "stale", "results", "finished", "planned")


class Progress:
    """Where one stage of a run stands; what makes resuming exact, and where it may stop.

    `parts` are the objects whose `state_dict` makes up the stage (model, optimiser, scaler); they must be equal on all
    processes, and rank 0 writes them. Position: `step` optimiser steps done, of which `batch` in `epoch`. `sums` are
    device tensors accumulated over the epoch. `best` follows the selection metric. `meta` goes into every file and says
    what is needed to rebuild the model; `start` names what the stage started from: a state with another start is
    not continued. `beat` grows while the stage lives.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        *,
        parts: dict,
        log: Log,
        facts: dist.Facts,
        signals: Signals,
        meta: dict,
        start: str,
        save_every: float,
        max_steps: int | None,
    ):
        self.folder, self.stage, self.parts, self.log, self.facts = folder, stage, parts, log, facts
        self.signals, self.meta, self.start = signals, meta, start
        self.save_seconds, self.max_steps = save_every * 60, max_steps
        self.step = self.epoch = self.batch = self.best_epoch = self.stale = 0
        self.best: float | None = None
        self.certain: float | None = None
        self.sums: dict[str, Tensor] = {}
        self.results: dict[str, float] = {}
        self.finished, self.planned = False, 0
        self._best_state: dict | None = None
        self._stored_best: dict | None = None
        self._flags: Tensor | None = None
        self._flags_ready = None
        self._saved = time.monotonic()
        self._wrote = False
        self.beat = 0
        self._layers: dict[int, str] = {}
        if facts.main:
            folder.mkdir(parents=True, exist_ok=True)
            remove_orphans(folder)

    def restore(self, state: dict | None, best: dict | None = None) -> None:
        """Take the stage to where `state` was saved; None starts it. Cuts the log's lines that came later.

        `best` is the best.pt that belongs to a state of another directory.

        Raises:
            InputError: the state is of another model or optimiser.
            Stopped: --max-steps are done.
        """
        if state is not None and (state["stage"], state["start"]) != (self.stage, self.start):
            self.log.say(f"{self.stage}: the saved state began from other weights; starting anew")
            state = None
        if state is None:
            self.log.cut(self.stage, 0)
            return
        for name, part in self.parts.items():
            stored = state["kinds"].get(name)
            if stored != type(part).__name__:
                raise InputError(f"{self.folder}: its {name} is {stored}, this command's is {type(part).__name__}")
            if isinstance(part, torch.nn.Module):
                load_weights(part, state["parts"][name], f"{self.folder}/last.pt")
            else:
                part.load_state_dict(state["parts"][name])
        place = state["place"]
        for name in _PLACE:
            setattr(self, name, place[name])
        for name, value in state["sums"].items():
            rows = value.to(self.facts.device).reshape(-1)  # one of each process that wrote it
            self.sums[name] = rows[self.facts.rank] if len(rows) == self.facts.world_size else rows.mean()
        self._best_state = best
        self._check_best()
        set_rng_state(state["rng"])
        self.log.go_on_from(place["seconds"])
        self.log.cut(self.stage, place["log_lines"])
        if not self.finished:
            self.log.say(f"{self.stage}: going on from step {self.step}, epoch {self.epoch + 1}")
            self.log.resumed(self.stage, self.step, self.epoch)
            self._check_max_steps()

    def _check_best(self) -> None:
        # Found out now, not after the training that is left.
        file = self.folder / "best.pt"
        if not self.best_epoch or self._best_state is not None:
            return
        if not (file.exists() and is_whole(file)):
            raise InputError(
                f"checkpoint {file} is damaged or missing, so the best model so far is lost: start anew with"
                " --resume none, or go on from a copy of the run"
            )
        stored = load(file)
        if stored["epoch"] != self.best_epoch and "value" in stored:
            # Of a later epoch than the state: a run killed between the two. What the file holds is what is the best.
            self.best, self.best_epoch = stored["value"], stored["epoch"]

    def save(self) -> None:
        """Write best.pt and last.pt, keeping the last.pt before it. Every process must call this.

        Raises:
            Diverged: instead of storing a state that is not finite or whose last update was masked.
            OSError: the disk is full or not writable; what was stored before is whole.
        """
        if self._peek()[0] or not self._finite():
            self._diverge()
        sums = {name: dist.all_gather_rows(value.reshape(1)) for name, value in self.sums.items()}
        self._saved = time.monotonic()
        if not self.facts.main:
            return
        self.log.sync()
        if self._best_state is not self._stored_best:
            save(self.folder / "best.pt", self._best_state)
            self._stored_best = self._best_state
        last = self.folder / "last.pt"
        place = {"log_lines": self.log.count(self.stage), "seconds": self.log.seconds}
        place |= {name: getattr(self, name) for name in _PLACE}
        state = {
            "stage": self.stage,
            "start": self.start,
            "meta": self.meta,
            "place": place,
            "kinds": {name: type(part).__name__ for name, part in self.parts.items()},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "sums": sums,
            "rng": rng_state(),
        }
        # A damaged last.pt, which this run did not start from, must not take the place of the one it did start from.
        keep = last.exists() and (self._wrote or is_whole(last))
        save(last, state, self.folder / "last.previous.pt" if keep else None)
        self._wrote, self._saved = True, time.monotonic()

    def _finite(self) -> bool:
        modules = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        found = [p.detach().isfinite().all() for module in modules for p in module.parameters()]
        return not found or bool(torch.stack(found).all())

    def add(self, **values: Tensor) -> None:
        """Accumulate detached device scalars over the epoch."""
        for name, value in values.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def mean(self, name: str) -> float:
        """Mean over the epoch's batches and over the processes of something added at every step.

        Raises:
            Diverged: the last step was masked; what follows, an evaluation, would be of no use.
        """
        if self._peek()[0]:
            self._diverge()
        return dist.all_reduce(self.sums[name].clone()).item() / (self.batch * self.facts.world_size)

    def name_layers(self) -> None:
        """From now on end the run at the first layer that gives a value which is not finite, by its name."""
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module):
                # By identity in one hook for all modules: a hook of a layer's own would go into its copies.
                self._layers |= {id(layer): name or "the model" for name, layer in part.named_modules()}
        self._hook = torch.nn.modules.module.register_module_forward_hook(self._check_layer)

    def forget_layers(self) -> None:
        """The end of `name_layers`."""
        self._hook.remove()

    def _check_layer(self, layer: torch.nn.Module, inputs, output) -> None:
        if id(layer) not in self._layers:
            return

        def bad(values) -> list[Tensor]:
            values = values if isinstance(values, (tuple, list)) else [values]
            return [x for x in values if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all()]

        if found := bad(output):
            wrong = ~found[0].detach().isfinite()
            rows = wrong.flatten(1).any(1).nonzero().flatten().tolist() if wrong.dim() > 1 else []
            raise Diverged(
                f"{self.stage} step {self.step + 1}: the first value that is not finite is in the output of"
                f" {self._layers[id(layer)]} ({type(layer).__name__}): {int(wrong.sum())} of {wrong.numel()} values,"
                f" rows {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''} of {len(wrong)}; its input is"
                f" {'not ' if bad(inputs) else ''}finite"
            )

    def _name_gradients(self) -> None:
        modules = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        named = [(name, p) for module in modules for name, p in module.named_parameters() if p.grad is not None]
        bad = [name for name, p in named if not p.grad.isfinite().all()]
        raise Diverged(
            f"{self.stage} step {self.step}: every layer's output is finite;"
            + (f" the gradients of {len(bad)} tensors are not, the last is {bad[-1]}" if bad else " the loss is not")
        )

    def end_step(self, bad: Tensor) -> None:
        """Count a step whose update was masked where `bad` (a boolean device scalar); save or stop where it is time.

        The flags are read one step late, so that the host never waits for the step that it has just queued.

        Raises:
            Diverged, Stopped.
        """
        self.beat += 1
        self.step += 1
        self.batch += 1
        if self._layers and bad:
            self._name_gradients()
        bad_before, asked, due = self._peek()
        if bad_before:
            self._diverge()
        late = self.facts.main and time.monotonic() - self._saved > self.save_seconds
        self._send_flags(bad, late and not due)
        if self.facts.world_size == 1:
            asked, due = self.signals.asked, late
        if asked:
            self._stop(asked)
        if self.max_steps and self.step >= self.max_steps:
            self.save()
            self._check_max_steps()
        if due:
            self.save()

    def _check_max_steps(self) -> None:
        if self.max_steps and self.step >= self.max_steps:
            raise Stopped(f"{self.stage}: stopped at --max-steps {self.max_steps}, saved in {self.folder}", 0)

    def check_stop(self) -> None:
        """Stop inside an evaluation: the state is that before it, which a resumed run repeats.

        In several processes every one must call this equally often.
        """
        self.beat += 1
        asked = self.signals.asked
        if self.facts.world_size > 1:
            asked = int(dist.all_reduce(torch.tensor(asked, device=self.facts.device), "max"))
        if asked:
            self._stop(asked)

    def _stop(self, asked: int) -> None:
        self.save()
        dist.barrier()  # the other processes leave when the state is on the disk
        raise Signals.leave(asked, f"saved at {self.stage} step {self.step}")

    def _send_flags(self, bad: Tensor, due: bool) -> None:
        own = [bad.new_full((), value, dtype=torch.int32) for value in (self.signals.asked, due)]
        flags = torch.stack([bad.to(torch.int32), *own])
        dist.all_reduce(flags, "max")
        if flags.device.type == "cuda":
            self._flags = torch.empty(3, dtype=torch.int32, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._flags_ready = torch.cuda.Event()
            self._flags_ready.record()
        else:
            self._flags = flags.cpu()

    def _peek(self) -> list[int]:
        # (a step was masked, a signal asks to stop, rank 0's clock asks to save), agreed among the processes, of the
        # last step that was counted.
        if self._flags is None:
            return [0, 0, 0]
        if self._flags_ready is not None:
            self._flags_ready.synchronize()
        return self._flags.tolist()

    def _diverge(self):
        last = self.folder / "last.pt"
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
        raise Diverged(
            f"{self.stage}: the loss or a gradient was not finite near step {self.step}; {good}."
            " Try a lower --lr, more --warmup-epochs or --precision fp32; --detect-anomaly added to the same command"
            " repeats the step and names the layer"
        )

    def select(
        self, value: float, weights: dict, metrics: dict, *, higher_is_better: bool, certain: float | None = None
    ) -> None:
        """Keep a copy of `weights` as best.pt if `value` is the best so far.

        `stale` counts the evaluations since one that was better beyond doubt: whose `certain`, what can be relied on of
        its value (unset: all of it), was better than the value of the last such evaluation.
        """

        def better(new: float, old: float | None) -> bool:
            return math.isfinite(new) and (old is None or (new > old if higher_is_better else new < old))

        if better(value if certain is None else certain, self.certain):
            self.certain, self.stale = value, 0
        else:
            self.stale += 1
        if not better(value, self.best):
            return
        self.best, self.best_epoch = value, self.epoch + 1
        copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
        place = {"epoch": self.epoch + 1, "value": value}
        self._best_state = {"model": copies, "meta": self.meta, "metrics": metrics} | place

    def best_weights(self) -> dict:
        """Weights of the selected model, from memory or from best.pt of a resumed run."""
        return self._best()["model"]

    def best_metrics(self) -> dict:
        """The `metrics` that were given with the selected model."""
        return self._best()["metrics"]

    def _best(self) -> dict:
        return self._best_state or load(self.folder / "best.pt")

    def end_epoch(self) -> None:
        self.epoch += 1
        self.batch = 0
        self.sums = {}

    def finish(self, results: dict, planned: int) -> None:
        """Store the stage's final metrics: a later start reads them instead of training, unless more than the `planned`
        epochs are asked for."""
        self.results, self.finished, self.planned = results, True, planned
        self.save()
        dist.barrier()
