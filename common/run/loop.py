"""The parts of a training loop that all scripts share: what a step takes, what it gives, and what
follows it.

The loop itself stays in the script. `Loop` iterates, counts, sets rates, logs and saves; it never
calls the model, the loss or backward, and never steps the optimizer, but on a copy in `foresee`.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import amp, live
from common.run import checkpoint, dist
from common.run.log import Pace
from common.run.progress import Progress

LONG = 3600.0  # seconds of a run on a CPU that are said before it starts
_TRIED = 32  # items, at most, of the steps that tell how long it takes
_FEW = 100  # items of a run that is not worth them
_POINTS = 100  # of a stage's curves, beside the first and the last step of every epoch


class Batch(NamedTuple):
    """This process's share of a batch, on its device.

    Attributes:
        inputs: uint8 pixels, rows or features (n, ...); or a tuple or dict of such tensors.
        items: (n,) which items of the data set these are.
        labels: (n,) int64; None where a step uses no labels.
        epoch: which their augmentation is drawn for; None: they are not augmented.
    """

    inputs: object
    items: np.ndarray
    labels: Tensor | None
    epoch: int | None

    def chunks(self, count: int) -> Iterator["Batch"]:
        """The batch in `count` equal parts, in order."""
        for part in self.slices(count):
            labels = None if self.labels is None else self.labels[part]
            yield Batch(_rows(self.inputs, part), self.items[part], labels, self.epoch)

    def slices(self, count: int) -> list[slice]:
        """Where the rows of each of the `chunks` lie."""
        assert len(self.items) % count == 0  # `sampling.check_batch` sees to it
        size = len(self.items) // count
        return [slice(k * size, (k + 1) * size) for k in range(count)]


def _rows(inputs, part: slice):
    if isinstance(inputs, dict):
        return {name: _rows(x, part) for name, x in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_rows(x, part) for x in inputs)
    return inputs[part]


class Step(NamedTuple):
    """What one optimizer step gives; nothing of it has been read from the device.

    Attributes:
        terms: the loss by the name `loss` and, where a script logs them, the terms that it is the
            sum of; detached device scalars.
        norm: the gradient's norm, a device scalar.
        bad: whether the loss or, without a loss scaler, the gradient is not finite, a boolean
            device scalar. A run ends at it; a gradient that is not finite moves no weight.
        extra: what else a script's line or figure is made of.
    """

    terms: dict[str, Tensor]
    norm: Tensor
    bad: Tensor
    extra: object = None


class Loop:
    """The loop of one stage as its script iterates it.

    Args:
        run: the `common.run.run.Run`.
        progress: the stage's position, which a resumed run has restored.
        steps: optimizer steps of an epoch; what is left over after the last whole batch is dropped.
        unit: the word for the items of a step in a rate: "img".
        patience: evaluations without a gain after which the stage ends; None: it runs to its end.
        chance: the loss of a guess; lines then show `loss_over_chance`.
        phases: the clock of --profile, for the stage that it times.
        quiet: the console gets no lines of steps and epochs, `log.jsonl` those of epochs alone.
    """

    def __init__(
        self,
        run,
        progress: Progress,
        *,
        steps: int,
        unit: str,
        patience: int | None = None,
        chance: float | None = None,
        phases: amp.Phases | None = None,
        quiet: bool = False,
    ):
        self.run = run
        self.progress = progress
        self.settings = run.settings_of(progress.stage)
        self.steps = steps
        self.patience = patience
        self.chance = chance
        self.phases = phases
        self.quiet = quiet
        self.pace = Pace(self.settings.bs, self.settings.epochs * steps, unit)
        self.loss: Tensor | float | None = None  # the last one that can be read without waiting

    def foresee(
        self,
        train_step: Callable[..., Step],
        fetch: Callable[[list[np.ndarray], int], Iterator[Batch]],
        items: np.ndarray,
    ) -> None:
        """Say before the first step that a CPU will take hours.

        Small steps on a copy tell what an item costs, in seconds or in one step of two items;
        nothing of the run's state changes.

        Args:
            train_step, fetch: the script's; `fetch` without the run.
            items: of the training data; few of them are fetched, and none for a GPU.
        """
        run, stage = self.run, self.progress.stage
        total = self.pace.total_steps
        steps = min(total, run.args.max_steps or total) - self.progress.step
        if run.world.device.type != "cpu" or steps * self.settings.bs < _FEW:
            return
        rng_state = checkpoint.rng_state()
        with run.signals.at_once(), live.Progress(f"{stage}: timing a small step", 1):
            seconds = self._seconds_of_step(train_step, fetch, items[:_TRIED], steps)
        checkpoint.set_rng_state(rng_state)
        self.pace.pause()
        if seconds * steps < LONG:
            return
        each = f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
        epochs = "--epochs" if stage == next(iter(run.stages)) else f"--{stage}-epochs"
        flags = {"backbone": "--backbone", "image_size": "--image-size"}
        sizes = " or ".join(flag for name, flag in flags.items() if name in vars(run.args))
        run.log.say(
            f"WARN {stage}: about {live.duration(seconds * steps)} on this CPU, at {each} for each"
            f" of {steps} steps of {self.settings.bs}; audits and evaluations come on top. What"
            f" helps: a GPU, fewer {epochs}{f', a smaller {sizes}' if sizes else ''}; --max-steps"
            " stops early, --demo is small"
        )

    def _seconds_of_step(self, train_step, fetch, items: np.ndarray, steps: int) -> float:
        # Of the whole batch; where `steps` of them are short anyway, more than that.
        run, parts = self.run, self.progress.parts
        model, optimizer = copy.deepcopy((parts["model"], parts["optimizer"]))
        model.train()
        scaler = amp.scaler(run.args.precision, run.world.device)
        args = argparse.Namespace(**{**vars(run.args), "accum": 1})  # so few cannot be split
        trial = replace(run, args=args, phases=None)
        batch = self.settings.bs // run.world.world_size

        def taken(count: int) -> float:
            (small,) = fetch([items[:count]], 0)
            begun = time.perf_counter()
            train_step(trial, model, optimizer, scaler, small)
            seconds = torch.tensor(time.perf_counter() - begun)
            return dist.all_reduce(seconds, "max").item()  # so that all ranks decide alike

        few = min(2, batch)
        of_few = taken(few)
        if of_few < 1:
            of_few = taken(few)  # the first one has paid for allocation
        seconds = of_few / few * batch
        more = min(int(few / of_few), len(items), batch)
        if seconds * steps < LONG or more <= few:
            return seconds
        of_more = min(taken(more), taken(more))
        return of_more + max(of_more - of_few, 0.0) / (more - few) * (batch - more)

    def epochs(self) -> Iterator[int]:
        """Epochs from the one that a resumed run stands in to the last, or until patience ends.

        The body must call `end_epoch`: it is what moves on.
        """
        progress = self.progress
        while progress.epoch < self.settings.epochs and not self._out_of_patience():
            yield progress.epoch

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.progress.evals_without_gain >= self.patience

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an epoch as they are; how long each is waited for is counted."""
        self._show()
        for batch in self.pace.waiting(self._fetched(batches)):
            self._lap("input")
            yield batch

    def _fetched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            with self.progress.waiting():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def _lap(self, phase: str | None) -> None:
        if self.phases:
            self.phases.lap(phase)

    def set_lr(
        self, optimizer: torch.optim.Optimizer, place: int | None = None, factor: float = 1.0
    ) -> float:
        """Set and return the learning rate of the next step, or of the one after `place` steps."""
        done = self.progress.step if place is None else place
        schedule = self.run.args.lr_schedule
        return amp.set_lr(optimizer, self.settings, done, self.steps, schedule, factor)

    def end_step(self, step: Step, lr: float, more: Callable[[], dict] = dict) -> None:
        """What follows an update: the epoch's sums, a line where one is due, the checkpoint.

        A line is on the console where --log-every says so, and in log.jsonl also where curves need
        a point. `more` gives further values of it; it is called only then, as it may wait for the
        device.

        Raises:
            Diverged, Stopped: see `Progress.end_step`.
        """
        run, progress, device = self.run, self.progress, self.run.world.device
        stage = progress.stage
        progress.add(**step.terms)
        self.pace.tick()
        done = progress.step + 1
        if device.type == "cpu":
            self.loss = step.terms["loss"]
        due = run.log.due(done, run.args.log_every)
        if not self.quiet and (due or self._is_point()):
            values = {name: dist.mean(value).item() for name, value in step.terms.items()}
            if self.chance is not None:
                values["loss_over_chance"] = values["loss"] / self.chance
            values["lr"] = lr
            values["grad_norm"] = step.norm.item()
            values.update(more())
            self.loss = values["loss"]
            run.log.interval(stage, done, progress.epoch + 1, values, self.pace, quiet=not due)
        if not self.quiet and self.pace.steps == 2:
            run.log.say(f"{stage}: peak memory {amp.peak_memory(device)}")
        self._show(1)
        progress.end_step(step.bad)
        self._lap("rest")

    def _is_point(self) -> bool:
        # Of the curves: a step, not counted yet. Reading its values waits for a GPU: one of ten.
        least = 1 if self.run.world.device.type == "cpu" else 10
        step, batch = self.progress.step + 1, self.progress.batch + 1
        return batch in (1, self.steps) or step % max(self.pace.total_steps // _POINTS, least) == 0

    def _show(self, more: int = 0) -> None:
        # The live line; `more` steps are done that are not counted yet.
        if not (self.run.log.main and live.line.due()):
            return
        progress = self.progress
        batch = progress.batch + more
        tail = [f"{batch}/{self.steps}"]
        if self.loss is not None:
            tail += [f"loss {live.digits(float(self.loss))}"]
            tail += [self.pace.describe(progress.step + more)]
        live.line.draw(
            f"{progress.stage} epoch {progress.epoch + 1}/{self.settings.epochs}",
            batch / self.steps,
            " | ".join(tail),
        )

    def is_eval_epoch(self) -> bool:
        """Whether an evaluation follows this epoch: by --eval-every, and after the last one."""
        done = self.progress.epoch + 1
        return done % self.run.args.eval_every == 0 or done == self.settings.epochs

    def end_epoch(self, values: dict, *, quiet: bool = False) -> None:
        """Log the metrics of an epoch, `quiet` in the file alone, and go on to the next one."""
        run, progress = self.run, self.progress
        quiet = quiet or self.quiet
        run.log.metrics(progress.stage, progress.step, progress.epoch + 1, values, quiet=quiet)
        progress.end_epoch()
        self.pace.pause()
        self._lap(None)
