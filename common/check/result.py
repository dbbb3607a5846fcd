"""What an item of `--check` finds, and what it may ask of a script: the vocabulary of
`common.recipe` and of its items.

An item is a function of a `Task` that returns a `Result`. `common.recipe.ITEMS` names them all, in
their order.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from common import config
from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.run.run import Run

PASS, WARN, FAIL, SKIP = "PASS", "WARN", "FAIL", "SKIP"


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


@dataclass(frozen=True, eq=False)
class CheckSpec:
    """A stage of a script in the terms of the checks: the script's own functions, a batch at a
    time.

    A "call" is the tuple of arguments that the network's `forward` got; the checks record them with
    hooks, so that they see what enters the network, not what should.

    Attributes:
        run: its `folder` takes the pictures. Its `splits` and `data` are what training would use.
        stage: the settings of the stage.
        train, held_out: items to train on and others (n,).
        build: the network as training starts from it; the same at every call.
        step: (network, optimizer, loss scaler, items, epoch) -> (loss, gradient norm, ...): one
            update of the script. None: only the data are tried.
        evaluate: (network, samples) -> outputs (n, ...): the script's evaluation.
        chance: the lowest and the highest loss that an untrained network should have, or a function
            that gives them of the classes (n,) of the items tried.
        seen: (calls of a step, n) -> (n, views, ...): what depends on the augmentation.
        varies: whether there is an augmentation.
        optimizer: the optimizer of a network; unset: that of the stage's settings.
        batches: epoch -> its batches of items; unset: `data.epoch_batches`. Item i is of sample i %
            len(run.data).
        labels: (samples,) int64 class of each sample; None: training uses no labels.
        classes: their names.
        prior: (K,) shares of the classes as training draws them; unset: those of `labels` of
            `train`.
        size: items of a small batch: all steps of the checks together shall end in a minute.
        several: samples that evaluation takes in more than one piece.
        rows: an output of the network -> (n, d), a row for each sample (or view of one).
        images: a call -> what enters the network as normalized images (m, 3, h, w); None: it reads
            none.
        pixels: samples -> what `evaluate` reads of them, uint8 (m, 3, h, w) in the order of
            `images`.
        normalization: (mean, std) of the pixels in [0, 1].
        entry: (network, call) -> the tensors to differentiate by, and the outputs (n, d) as a
            function of them; unset: the call's first argument.
        parts: equal parts of a sample that must all matter to its output, such as frames.
        idle: call -> for each tensor of `entry` a mask of what must not matter, such as padding.
        past: (network, x) -> outputs (n, T, d) where frame t may depend on frames up to t alone.
        head: a network -> its last layer, where that has a bias.
        binary: the head's one output is the logit of class 1.
        frozen: a network -> the names of the parameters that the flags freeze.
        audit: a network -> problems that the script's own audit finds.
        larger: a network of more capacity than `build`'s.
    """

    run: Run
    stage: config.StageConfig
    train: np.ndarray
    held_out: np.ndarray
    build: Callable[[], nn.Module]
    step: Callable[..., tuple] | None
    evaluate: Callable[[nn.Module, np.ndarray], Tensor]
    chance: tuple[float, float] | Callable[[np.ndarray], tuple[float, float]]
    seen: Callable[[list[tuple], int], Tensor]
    varies: bool
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    batches: Callable[[int], list[np.ndarray]] | None = None
    labels: np.ndarray | None = None
    classes: list[str] = field(default_factory=list)
    prior: np.ndarray | None = None
    size: int = 16
    several: int = 300
    rows: Callable[[object], Tensor] = lambda output: output
    images: Callable[[tuple], Tensor] | None = lambda call: call[0]
    pixels: Callable[[np.ndarray], Tensor] | None = None
    normalization: tuple = (IMAGENET_MEAN, IMAGENET_STD)
    entry: Callable[[nn.Module, tuple], tuple[list[Tensor], Callable]] | None = None
    parts: int = 1
    idle: Callable[[tuple], list[Tensor]] | None = None
    past: Callable[[nn.Module, Tensor], Tensor] | None = None
    head: Callable[[nn.Module], nn.Linear] | None = None
    binary: bool = False
    frozen: Callable[[nn.Module], set[str]] = lambda model: set()
    audit: Callable[[nn.Module], list[str]] | None = None
    larger: Callable[[], nn.Module] | None = None
