"""The parts of a training loop that all scripts share: what a step takes, what it gives, and what
follows it.

The loop itself stays in the script. `Loop` iterates, counts, sets rates, logs and saves; it never
calls the model, the loss or backward, and never steps the optimizer.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import amp
from common.run import dist
from common.run.log import Pace
from common.run.progress import Progress


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

        `more` gives further values of a line; it is called only where one is due, as it may wait
        for the device.

        Raises:
            Diverged, Stopped: see `Progress.end_step`.
        """
        run, progress = self.run, self.progress
        stage = progress.stage
        progress.add(**step.terms)
        self.pace.tick()
        done = progress.step + 1
        if not self.quiet and run.log.due(done, run.args.log_every):
            values = {name: dist.mean(value).item() for name, value in step.terms.items()}
            if self.chance is not None:
                values["loss_over_chance"] = values["loss"] / self.chance
            values["lr"] = lr
            values["grad_norm"] = step.norm.item()
            values.update(more())
            run.log.interval(stage, done, progress.epoch + 1, values, self.pace)
        run.log.progress(stage, done, self.pace)
        if not self.quiet and self.pace.steps == 2:
            run.log.cost(stage, self.steps, self.settings.epochs, self.pace, run.world.device)
        progress.end_step(step.bad)
        self._lap("rest")

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
