"""What the items of --check try a network with: small batches, the script's own steps, hooks."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, optim
from common.check.result import CheckSpec
from common.data import sampling
from common.errors import only_warn
from common.report import figures

NOTHING_HELD_OUT = "no sample is held out to evaluate on"


@contextlib.contextmanager
def record_calls(model: nn.Module) -> Iterator[tuple[list[tuple], list]]:
    """(calls, outputs): the arguments of every call of a network, and what it gave."""
    calls = []
    outputs = []
    hooks = [
        model.register_forward_pre_hook(lambda _, call: calls.append(call)),
        model.register_forward_hook(lambda _, call, output: outputs.append(output)),
    ]
    try:
        yield calls, outputs
    finally:
        for hook in hooks:
            hook.remove()


class Trial:
    """A fresh network in training: the script's own steps on small batches.

    `rate` None is the stage's optimizer; a number is AdamW at that rate, which fits where the
    stage's own is slow.
    """

    def __init__(self, spec: CheckSpec, rate: float | None = None, model: nn.Module | None = None):
        self.spec = spec
        self.model = (spec.build() if model is None else model).train()
        if rate is not None:
            groups = optim.param_groups([self.model], 0.0)
            self.optimizer = optim.build_optimizer("adamw", groups, lr=rate)
        elif spec.optimizer:
            self.optimizer = spec.optimizer(self.model)
        else:
            self.optimizer = optim.of_stage(spec.settings, [self.model])
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = amp.scaler(spec.run.args.precision, spec.run.world.device)

    def go(
        self, items: np.ndarray, epoch: int = 0, share: float = 1.0, seed: int | None = None
    ) -> tuple[float, float]:
        """(loss, gradient norm) of a step at a share of the peak rates; 0 changes no weight."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        if seed is not None:
            torch.manual_seed(seed)
        spec = self.spec
        (batch,) = spec.fetch([items], epoch)
        step = spec.step(spec.run, self.model, self.optimizer, self.scaler, batch)
        return step.terms["loss"].item(), step.norm.item()


def epoch_batches(spec: CheckSpec, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch, as training takes them."""
    if spec.batches:
        return spec.batches(epoch)
    return sampling.epoch_batches(spec.train, spec.settings.bs, spec.run.args.seed, epoch)


def small_batches(spec: CheckSpec, count: int) -> list[np.ndarray]:
    """The first `count` small batches of the first epoch; they repeat where it has fewer."""
    slices = []
    for batch in epoch_batches(spec, 0):
        size = min(spec.view.size, len(batch))
        slices += [batch[i : i + size] for i in range(0, len(batch) - size + 1, size)]
        if len(slices) >= count:
            break
    return [slices[i % len(slices)] for i in range(count)]


def typical_batches(spec: CheckSpec, count: int) -> list[np.ndarray]:
    """Small batches in which the classes have their shares, as near as so few items can."""
    if spec.labels is None:
        return small_batches(spec, count)
    order = np.concatenate(epoch_batches(spec, 0))
    ranked = order[np.argsort(spec.labels[samples_of(spec, order)], kind="stable")]
    size = min(spec.view.size, len(ranked))
    even = ranked[np.linspace(0, len(ranked) - 1, count * size).round().astype(int)]
    return [even[k::count] for k in range(count)]


def varied_batch(spec: CheckSpec) -> np.ndarray:
    """The first small batch that holds two classes at least, where there is one; without labels,
    one whose items all differ: nothing tells repeated ones apart.
    """
    for items in small_batches(spec, 8):
        if spec.labels is None:
            return _distinct(spec, items)
        if len(set(spec.labels[samples_of(spec, items)])) > 1:
            return items
    return items


def _distinct(spec: CheckSpec, items: np.ndarray) -> np.ndarray:
    (batch,) = spec.fetch([items], 0)
    first = {}
    for k, one in enumerate(batch.chunks(len(items))):
        first.setdefault(_bytes(one.inputs), k)
    accum = spec.run.args.accum
    return items[list(first.values())[: len(first) // accum * accum]]


def _bytes(inputs) -> bytes:
    parts = inputs.values() if isinstance(inputs, dict) else inputs
    if isinstance(inputs, Tensor):
        return inputs.cpu().numpy().tobytes()
    return b"".join(map(_bytes, parts))


def samples_of(spec: CheckSpec, items: np.ndarray) -> np.ndarray:
    """The samples that items are drawn from."""
    return items % len(spec.run.data)


def evaluation_samples(spec: CheckSpec) -> np.ndarray:
    """What a network is shown where nothing depends on its being new to it.

    Without held-out samples that is training's own.
    """
    return spec.held_out if len(spec.held_out) else np.unique(samples_of(spec, spec.train))


def class_shares(spec: CheckSpec) -> np.ndarray:
    """The shares (K,) of the classes as training draws them."""
    drawn = samples_of(spec, np.concatenate(epoch_batches(spec, 0)))
    counts = np.bincount(spec.labels[drawn], minlength=len(spec.classes))
    return counts / counts.sum()


def is_binary(spec: CheckSpec, model: nn.Module) -> bool:
    """Whether the one output is the logit of class 1."""
    head = spec.view.head(model)
    return head is not None and head.out_features == 1


def max_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors; infinite where their shapes differ."""
    return (a - b).abs().max().item() if a.shape == b.shape else math.inf


def save_images(spec: CheckSpec, name: str, images: Tensor, columns: int) -> str:
    """Write images as figures/check_NAME.png; returns its path below the run directory."""
    stage = f"{spec.stage}_" if len(spec.run.stages) > 1 else ""
    path = f"figures/check_{stage}{name}.png"
    with only_warn(print, str(spec.run.folder / path)):
        figures.save_grid(spec.run.folder / path, images, columns)
    return path
