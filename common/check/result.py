"""What an item of `--check` gives, and what it may ask of a script.

An item is a function of a `CheckSpec` that returns a `Result`; `common.check.runner.ITEMS` names
them all, in their order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from common.config import StageConfig
from common.data.augment import IMAGENET_MEAN, IMAGENET_STD, ViewParams
from common.run.loop import Batch, Step
from common.run.run import Run

PASS = "PASS"
WARN = "WARN"
FAIL = "FAIL"
SKIP = "SKIP"


@dataclass(frozen=True)
class Result:
    """The outcome of an item.

    Attributes:
        status: PASS, WARN (worth a look), FAIL (a bug, or data that spoils the result) or SKIP
            (does not apply).
        value: what was found, as text; of SKIP why it does not apply.
        threshold: what would pass, as text.
        fix: one sentence on what to do; empty where all is well.
        pictures: paths below the run directory, as `figures/check_inputs.png`.
        rows: a table, the header first.
    """

    status: str
    value: str
    threshold: str = ""
    fix: str = ""
    pictures: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


def skip(why: str) -> Result:
    """The result of an item that does not apply."""
    return Result(SKIP, why)


class NetworkView:
    """How the checks look into a network. A script overrides what differs from an image classifier.

    A "call" is the tuple of arguments that the network's `forward` got; the checks record them with
    hooks, so that they see what enters the network, not what should.

    Args:
        run: the run that is checked.
        size: items of a small batch: all steps of the checks together shall end in a minute.
        eval_batch: samples that evaluation takes at once.
        parts: equal parts of a sample that must all matter to its output, such as frames.
        normalization: (mean, std) of the pixels in [0, 1].
    """

    def __init__(
        self,
        run: Run,
        *,
        size: int = 16,
        eval_batch: int = 256,
        parts: int = 1,
        normalization: tuple = (IMAGENET_MEAN, IMAGENET_STD),
    ):
        self.run = run
        self.size = size
        self.eval_batch = eval_batch
        self.parts = parts
        self.normalization = normalization

    def rows(self, output) -> Tensor:
        """An output of the network as (n, d), a row for each sample or view of one."""
        return output

    def head(self, model: nn.Module) -> nn.Linear | None:
        """The last layer, where it is a linear one."""
        layer = getattr(model, "head", None)
        return layer if isinstance(layer, nn.Linear) else None

    def largest_logits(self, model: nn.Module) -> float:
        """How far untrained logits may lie from a guess, as a root mean square."""
        return 2.0  # torch's own start of a last layer gives 0.6 on features of unit size

    def augmented_part(self, calls: list[tuple], count: int) -> Tensor:
        """What of the calls of a step depends on the augmentation: (count, views, ...).

        `count` is the number of the step's items.
        """
        return calls[0][0].unflatten(0, (-1, count)).transpose(0, 1)

    def stored_pixels(self, samples: np.ndarray) -> Tensor:
        """What evaluation reads of samples: uint8 (m, 3, h, w) in the order of its calls."""
        return next(self.run.data.batches([samples], self.run.args.workers))

    def entry(self, model: nn.Module, call: tuple) -> list[Tensor]:
        """The inputs of a call to differentiate by."""
        return [call[0]]

    def outputs(self, model: nn.Module, call: tuple, inputs: list[Tensor]) -> Tensor:
        """The outputs (n, d) of a call as a function of its `entry`."""
        return self.rows(model(inputs[0]))

    def padding(self, call: tuple) -> list[Tensor] | None:
        """For each tensor of `entry` a mask of what must not matter; None: all of it may."""
        return None

    def causal(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Outputs (n, T, d) of which that of frame t may depend on frames up to t alone.

        None where there is no such promise.
        """
        return None


@dataclass(frozen=True, eq=False)
class CheckSpec:
    """A stage of a script in the terms of the checks: the script's own functions.

    Attributes:
        run: its `folder` takes the pictures; its `data` and `splits` are what training would use.
        stage: the stage's name.
        splits: the names of the splits to train on and to evaluate on.
        build: gives the network as training starts from it, the same at every call.
        fetch: (batches of items, epoch) -> batches as `step` takes them.
        step: the script's own training step. None: only the data are tried.
        evaluate: (network, samples) -> outputs (n, ...): the script's evaluation.
        loss: (rows of a step's outputs, float64 (n, d), the labels (n,) of its items, the network)
            -> what the step's loss must be, see `common.check.reference`.
        augmented: whether training sees augmented samples.
        view: how to look into the network.
        labels: (samples,) int64 class of each sample; None: training uses no labels.
        starts_at_prior: whether the last layer's bias starts at the classes' shares.
        batches: epoch -> its batches of items, item i being of sample i % len(run.data), where
            classes are drawn by weight; unset: every item of the split once.
        optimizer: the optimizer of a network; unset: that of the stage's settings.
        audit: a network -> problems that the script's own audit finds.
        larger: gives a network of more capacity than `build`'s.
        views: a batch -> what was drawn for each of its items' views, in their order; unset: the
            script does not say.
    """

    run: Run
    stage: str
    splits: tuple[str, str]
    build: Callable[[], nn.Module]
    fetch: Callable[[list[np.ndarray], int], Iterator[Batch]]
    step: Callable[..., Step] | None
    evaluate: Callable[[nn.Module, np.ndarray], Tensor]
    loss: Callable[[np.ndarray, np.ndarray | None, nn.Module], float]
    augmented: bool
    view: NetworkView
    labels: np.ndarray | None = None
    starts_at_prior: bool = False
    batches: Callable[[int], list[np.ndarray]] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    audit: Callable[[nn.Module], list[str]] | None = None
    larger: Callable[[], nn.Module] | None = None
    views: Callable[[Batch], list[ViewParams]] | None = None

    @property
    def settings(self) -> StageConfig:
        """The settings of the stage."""
        return self.run.stages[self.stage]

    @property
    def train(self) -> np.ndarray:
        """The samples to train on (n,)."""
        return self.run.splits[self.splits[0]]

    @property
    def held_out(self) -> np.ndarray:
        """Other samples, to evaluate on (n,)."""
        return self.run.splits[self.splits[1]]

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        names = self.run.model_spec["classes"]
        return names[self.stage] if isinstance(names, dict) else names
