"""Where one stage of a run stands: exact resume, the best model, when to save and to stop."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from common.errors import Diverged, InputError, Stopped, plural
from common.run import checkpoint, dist
from common.run.content import Content
from common.run.files import BEST, FORMAT, LAST, make_folder, remove_orphans
from common.run.log import Log
from common.run.signals import Interrupted, Signals

# What a checkpoint keeps of the position.
_PLACE = (
    "step",
    "epoch",
    "batch",
    "best",
    "best_epoch",
    "higher_is_better",
    "confident_best",
    "evals_without_gain",
    "results",
    "finished",
    "planned",
    "best_digest",
)


class Progress:
    """Where one stage of a run stands; what makes resuming exact, and where it may stop.

    `parts` are the objects whose `state_dict` makes up the stage (model, optimizer, scaler); they
    must be equal on all ranks, and rank 0 writes them. Position: `step` optimizer steps done,
    of which `batch` in `epoch`. `sums` are device tensors accumulated over the epoch. `best`
    follows the selection metric. `model_spec` goes into every file and says what is needed to
    rebuild the model, and `kept` what else a file needs to be of use alone; `start` names what the
    stage started from: a state with another start is not continued. `content` is that of the data,
    whose record is kept up with the state. `heartbeat` grows while the stage lives. `evaluated` are
    the rows of the evaluations since the last step, by batches; see `Evaluation`.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        *,
        parts: dict,
        log: Log,
        world: dist.Dist,
        signals: Signals,
        model_spec: dict,
        start: str,
        save_every: float,
        max_steps: int | None,
        content: Content | None = None,
        kept: dict | None = None,
    ):
        self.folder = folder
        self.stage = stage
        self.parts = parts
        self.log = log
        self.world = world
        self.signals = signals
        self.model_spec = model_spec
        self.kept = kept or {}
        self.start = start
        self.save_seconds = save_every * 60
        self.max_steps = max_steps
        self.content = content
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.best: float | None = None
        self.best_epoch = 0
        self.higher_is_better: bool | None = None
        self.confident_best: float | None = None
        self.evals_without_gain = 0
        self.sums: dict[str, Tensor] = {}
        self.evaluated: dict[int, list[Tensor]] = {}
        self._found: dict[int, list[Tensor]] = {}  # `evaluated` of the state, of all its ranks
        self.results: dict[str, float] = {}
        self.finished = False
        self.planned = 0
        self.best_digest: str | None = None
        self.heartbeat = 0
        self._best_state: dict | None = None
        self._stored_best: dict | None = None
        self._flags: Tensor | None = None
        self._flags_ready: torch.cuda.Event | None = None
        self._saved = time.monotonic()
        self._wrote: set[str] = set()
        self._layers: dict[int, str] = {}
        if world.is_main:
            make_folder(folder)
            remove_orphans(folder)

    def restore(self, state: dict | None, source: Path | None = None, **wanted) -> None:
        """Take the stage to where `state` was saved; None starts it.

        The log's lines that came later are cut. Where best.pt is lost, the best model before it or,
        until an evaluation selects another, the state's own stands in: that is said.

        Args:
            source: the folder that the state is from, where that is another.
            wanted: entries that the best.pt there must have to belong to the state.

        Raises:
            InputError: the state is of another model or optimizer.
            Stopped: --max-steps are done.
        """
        if state is not None and (state["stage"], state["start"]) != (self.stage, self.start):
            self.log.say(f"{self.stage}: the saved state began from other weights; starting anew")
            state = None
        has_best = state is not None and checkpoint.has_best(state["place"])
        # Found out now, not after the training that is left.
        if has_best:
            best, problem = checkpoint.load_best(source or self.folder, start=self.start, **wanted)
            if best is None and "model" not in self.parts:
                self.log.say(f"{self.stage}: {problem}; the stage starts anew")
                state = None
            elif best is None:
                self.log.say(
                    f"{self.stage}: {problem}; the best so far is lost, the model of the state"
                    " stands in until the next evaluation selects again"
                )
            elif problem:
                self.log.say(f"{self.stage}: {problem}")
        if state is None:
            self.log.cut(self.stage, 0)
            return
        for name, part in self.parts.items():
            stored = state["kinds"].get(name)
            if stored != type(part).__name__:
                raise InputError(
                    f"{self.folder}: its {name} is {stored}, this command's is"
                    f" {type(part).__name__}"
                )
            if isinstance(part, torch.nn.Module):
                file = state.get("file", self.folder)
                checkpoint.load_weights(part, state["parts"][name], file)
            else:
                part.load_state_dict(state["parts"][name])
        place = state["place"]
        for name in _PLACE:
            setattr(self, name, place.get(name, getattr(self, name)))
        for name, value in state["sums"].items():
            if self.world.device.type == "mps":
                value = value.float()  # as `add` sums there, in whatever another device did
            rows = value.to(self.world.device).reshape(-1)  # one of each rank that wrote it
            same_ranks = len(rows) == self.world.world_size
            self.sums[name] = rows[self.world.rank] if same_ranks else rows.mean()
        self._found = state.get("evaluated", {})
        if has_best:
            self._take_best(best)
            if not problem and source is None:
                self._best_state = None  # best.pt holds it
        checkpoint.set_rng_state(state["rng"])
        self.log.go_on_from(place["seconds"])
        self.log.cut(self.stage, 0 if source else place["log_lines"], self.step)
        if not self.finished:
            self.log.say(f"{self.stage}: resuming from step {self.step}, epoch {self.epoch + 1}")
            self.log.resumed(self.stage, self.step, self.epoch)
            self._check_max_steps()

    def _take_best(self, best: dict | None) -> None:
        if best is None:
            self.best = None
            self.best_epoch = self.epoch
            model = self.parts["model"].state_dict()
            best = self._selected(model, self.results)
        elif best["epoch"] != self.best_epoch and "value" in best:
            # Of a later epoch than the state: the run was killed between the two files. Or of an
            # earlier one that stands in. The best is what is stored.
            self.best = best["value"]
            self.best_epoch = best["epoch"]
        self._best_state = best

    def save(self) -> None:
        """Write best.pt and last.pt, keeping the last.pt before it. Every rank must call this.

        Raises:
            Diverged: instead of storing a state that is not finite or whose last update was masked.
            OSError: the disk is full or not writable; what was stored before is whole.
        """
        if self._peek()[0] or not self._finite():
            self._diverge()
        sums = {name: dist.all_gather_rows(value.reshape(1)) for name, value in self.sums.items()}
        evaluated = self._all_evaluated()
        self._saved = time.monotonic()
        if self.content is not None:
            # First, so that it knows of everything that a stored state has learned from.
            self.content.save(self.world, self.log.say)
        if not self.world.is_main:
            return
        self.log.sync()
        if self._best_state is not self._stored_best:
            self._write(BEST, self._best_state)
            self._stored_best = self._best_state
        place = {
            "log_lines": self.log.count(self.stage),
            "seconds": self.log.seconds,
            **{name: getattr(self, name) for name in _PLACE},
        }
        state = {
            "format": FORMAT,
            "stage": self.stage,
            "start": self.start,
            "model_spec": self.model_spec,
            "place": place,
            "kinds": {name: type(part).__name__ for name, part in self.parts.items()},
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "sums": sums,
            "evaluated": evaluated,
            "rng": checkpoint.rng_state(),
            **self.kept,
        }
        self._write(LAST, state)
        self._saved = time.monotonic()

    def _write(self, names: tuple[str, str], state: dict) -> None:
        file, previous = (self.folder / name for name in names)
        # A damaged file, which this run did not start from, must not take the place of the one it
        # did start from.
        keep = file.exists() and (file.name in self._wrote or checkpoint.is_whole(file))
        checkpoint.save(file, state, previous if keep else None)
        self._wrote.add(file.name)

    @property
    def batches_found(self) -> int:
        """Batches of evaluations that the state had."""
        return sum(map(len, self._found.values()))

    def evaluated_rows(self, key: int) -> list[Tensor]:
        """The rows of the evaluation `key`, batch by batch, to which the next ones are appended.

        Every rank must call this equally often.
        """
        if key not in self.evaluated:
            found = self._found.get(key, [])
            if self._found:  # of another number of ranks: not all have theirs
                missing = torch.tensor(int(not found), device=self.world.device)
                found = [] if dist.all_reduce(missing, "max") else found
            self.evaluated[key] = list(found)
        return self.evaluated[key]

    def _forget_evaluated(self) -> None:
        self.evaluated = {}
        self._found = {}

    def _all_evaluated(self) -> dict[int, list[Tensor]]:
        # Of all ranks. A key stands for the items, so that each rank finds its own again; what all
        # compute alike is there once.
        evaluated = dict(self._found)
        device = self.world.device
        for key, parts in self.evaluated.items():
            keys = dist.all_gather_rows(torch.tensor([key], device=device)).tolist()
            if len(set(keys)) == 1:
                evaluated[key] = [part.cpu() for part in parts]
                continue
            gathered = [dist.all_gather_rows(part.to(device)).cpu() for part in parts]
            for i, key_of_rank in enumerate(keys):
                evaluated[key_of_rank] = [part.chunk(len(keys))[i].clone() for part in gathered]
        return evaluated

    def _modules(self) -> list[torch.nn.Module]:
        return [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]

    def _finite(self) -> bool:
        finite = [p.detach().isfinite().all() for m in self._modules() for p in m.parameters()]
        return not finite or bool(torch.stack(finite).all())

    def add(self, **values: Tensor) -> None:
        """Accumulate device scalars over the epoch, in float64 where the device has it."""
        for name, value in values.items():
            value = value.detach()
            if value.device.type != "mps":
                value = value.double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def mean(self, name: str) -> float:
        """Mean over the epoch's batches and over the ranks of something added at every step.

        Raises:
            Diverged: the last step was masked; what follows, an evaluation, would be of no use.
        """
        if self._peek()[0]:
            self._diverge()
        total = dist.all_reduce(self.sums[name].clone()).item()
        return total / (self.batch * self.world.world_size)

    def watch_for_nonfinite(self) -> None:
        """From now on end the run at the first layer whose output is not finite, naming it."""
        # By identity in one hook for all modules: a hook of a layer's own would go into its copies.
        for module in self._modules():
            for name, layer in module.named_modules():
                self._layers[id(layer)] = name or "the model"
        self._hook = torch.nn.modules.module.register_module_forward_hook(self._check_layer)

    def stop_watching(self) -> None:
        """The end of `watch_for_nonfinite`."""
        self._hook.remove()

    def _check_layer(self, layer: torch.nn.Module, inputs, output) -> None:
        if id(layer) not in self._layers:
            return
        bad_outputs = _not_finite(output)
        if not bad_outputs:
            return
        wrong = ~bad_outputs[0].detach().isfinite()
        where = f"{int(wrong.sum())} of {plural(wrong.numel(), 'value')}"
        if wrong.dim() > 1:
            rows = wrong.flatten(1).any(1).nonzero().flatten().tolist()
            dots = ", ..." if len(rows) > 8 else ""
            where += f", rows {', '.join(map(str, rows[:8]))}{dots} of {len(wrong)}"
        raise Diverged(
            f"{self.stage} step {self.step + 1}: the first value that is not finite is in the"
            f" output of {self._layers[id(layer)]} ({type(layer).__name__}): {where};"
            f" its input is {'not ' if _not_finite(inputs) else ''}finite"
        )

    def _name_gradients(self) -> NoReturn:
        bad = [
            name
            for module in self._modules()
            for name, p in module.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        text = "the loss is not"
        if bad:
            text = f"the gradients of {plural(len(bad), 'tensor')} are not, the last is {bad[-1]}"
        raise Diverged(f"{self.stage} step {self.step}: every layer's output is finite; {text}")

    def end_step(self, bad: Tensor) -> None:
        """Count a step; save or stop where it is time.

        Its update was masked where `bad`, a boolean device scalar, is true. The flags are read one
        step late, so that the host never waits for the step that it has just queued.

        Raises:
            Diverged, Stopped.
        """
        self.heartbeat += 1
        self.step += 1
        self.batch += 1
        self._forget_evaluated()
        if self._layers and bad:
            self._name_gradients()
        bad_before, asked, due = self._peek()
        if bad_before:
            self._diverge()
        late = self.world.is_main and time.monotonic() - self._saved > self.save_seconds
        self._send_flags(bad, late and not due)
        if self.world.world_size == 1:
            asked = self.signals.asked
            due = late
        if asked:
            self._stop(asked)
        if self.max_steps and self.step >= self.max_steps:
            self.save()
            self._check_max_steps()
        if due:
            self.save()

    def _check_max_steps(self) -> None:
        if self.max_steps and self.step >= self.max_steps:
            raise Stopped(
                f"{self.stage}: stopped at --max-steps {self.max_steps}, saved in {self.folder};"
                " the same command without it, or with more, goes on",
                0,
            )

    def check_stop(self) -> None:
        """Save or stop inside an evaluation, where it is time.

        The state is that before the evaluation, with the batches that are done. Every rank must
        call this equally often.

        Raises:
            Stopped.
        """
        self.heartbeat += 1
        asked = self.signals.asked
        due = self.world.is_main and time.monotonic() - self._saved > self.save_seconds
        if self.world.world_size > 1:
            flags = torch.tensor([asked, int(due)], device=self.world.device)
            asked, due = dist.all_reduce(flags, "max").tolist()
        if asked:
            self._stop(asked)
        if due:
            self.save()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Where nothing of the state changes, and a signal need not wait for a boundary.

        With several ranks it does: they must agree.

        Raises:
            Stopped.
        """
        if self.world.world_size > 1:
            yield
            return
        try:
            with self.signals.at_once(Signals.RAISE):
                yield
        except Interrupted:
            self.signals.obeyed.set()
            self._stop(self.signals.asked)

    def waiting(self) -> contextlib.AbstractContextManager:
        """Around the wait for a batch: the data may not come for a long time.

        What a script does at the beginning of an epoch must not be done twice: at its first batch a
        signal waits, or leaves without saving where there is no step to save.
        """
        if self.batch:
            return self.interruptible()
        return contextlib.nullcontext() if self.step else self.signals.at_once()

    def _stop(self, asked: int) -> None:
        self.save()
        dist.barrier()  # the other ranks leave when the state is on the disk
        raise Signals.leave(asked, f"saved at {self.stage} step {self.step}")

    def _send_flags(self, bad: Tensor, due: bool) -> None:
        asked = bad.new_full((), self.signals.asked, dtype=torch.int32)
        is_due = bad.new_full((), due, dtype=torch.int32)
        flags = torch.stack([bad.to(torch.int32), asked, is_due])
        dist.all_reduce(flags, "max")
        if flags.device.type == "cuda":
            self._flags = torch.empty(3, dtype=torch.int32, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._flags_ready = torch.cuda.Event()
            self._flags_ready.record()
        else:
            self._flags = flags.cpu()

    def _peek(self) -> list[int]:
        # (a step was masked, a signal asks to stop, rank 0's clock asks to save), agreed among the
        # ranks, of the last step that was counted.
        if self._flags is None:
            return [0, 0, 0]
        if self._flags_ready is not None:
            self._flags_ready.synchronize()
        return self._flags.tolist()

    def _diverge(self) -> NoReturn:
        last = self.folder / "last.pt"
        good = f"the last good checkpoint is {last}"
        if not last.exists():
            good = "no checkpoint was written yet"
        raise Diverged(
            f"{self.stage}: the loss or a gradient was not finite near step {self.step}; {good}."
            " Try a lower --lr, more --warmup-epochs or --precision fp32; --detect-anomaly added"
            " to the same command repeats the step and names the layer"
        )

    def select(
        self,
        value: float,
        weights: dict,
        metrics: dict,
        *,
        higher_is_better: bool,
        confident_value: float | None = None,
    ) -> None:
        """Keep a copy of `weights` as best.pt if `value` is the best so far.

        `evals_without_gain` counts the evaluations since one that was better beyond doubt: whose
        `confident_value`, what can be relied on of its value (unset: all of it), was better than
        the value of the last such evaluation.

        Args:
            metrics: what is stored with the weights.
        """

        def better(new: float, old: float | None) -> bool:
            if not math.isfinite(new):
                return False
            if old is None:
                return True
            return new > old if higher_is_better else new < old

        self.higher_is_better = higher_is_better
        if confident_value is None:
            confident_value = value
        if better(confident_value, self.confident_best):
            self.confident_best = value
            self.evals_without_gain = 0
        else:
            self.evals_without_gain += 1
        if not better(value, self.best):
            return
        self.best = value
        self.best_epoch = self.epoch + 1
        self._best_state = self._selected(weights, metrics)

    def _selected(self, weights: dict, metrics: dict) -> dict:
        return {
            "format": FORMAT,
            "model": {name: tensor.detach().clone() for name, tensor in weights.items()},
            "model_spec": self.model_spec,
            "start": self.start,
            "metrics": dict(metrics),  # the script may go on with its own
            "epoch": self.best_epoch,
            "value": self.best,
            **self.kept,
        }

    def best_weights(self) -> dict:
        """Weights of the selected model, from memory or from best.pt of a resumed run."""
        return self._best()["model"]

    def best_metrics(self) -> dict:
        """The `metrics` that were given with the selected model."""
        return self._best()["metrics"]

    def digest_of_best(self) -> str:
        """Of the selected weights of a finished stage, also where another model stands in."""
        return self.best_digest or checkpoint.weights_digest(self.best_weights())

    def _best(self) -> dict:
        return self._best_state or checkpoint.load(self.folder / "best.pt")

    def end_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch += 1
        self.batch = 0
        self.sums = {}
        self._forget_evaluated()

    def finish(self, results: dict, planned: int) -> None:
        """Store the stage's final metrics.

        A later start reads them instead of training, unless more than the `planned` epochs are
        asked for.
        """
        self.results = results
        self.finished = True
        self.planned = planned
        self.best_digest = checkpoint.weights_digest(self.best_weights())
        self._forget_evaluated()
        self.save()
        dist.barrier()


def _not_finite(values) -> list[Tensor]:
    if not isinstance(values, (tuple, list)):
        values = [values]
    floats = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    return [x for x in floats if not x.isfinite().all()]
