"""The linear protocol on frozen features, beside the same on baselines."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, metrics, optim
from common.data import augment, sampling
from common.distill import add_distillation
from common.errors import InputError
from common.live import digits
from common.report import figures
from common.run import checkpoint, dist
from common.run.evaluation import Evaluation
from common.run.loop import Batch, Loop, Step
from common.run.progress import Progress
from common.run.run import Run

PIXELS = 32  # side of the raw-pixel baseline's images


class Source(NamedTuple):
    """Features that the protocol judges.

    Attributes:
        title: how they are called.
        weights: those that make them.
        width: their dimension.
        features: computes them.
    """

    title: str
    weights: dict[str, Tensor]
    width: int
    features: Callable[[dict[str, Tensor], Progress], Tensor]


def linear(
    run: Run,
    weights: dict[str, Tensor] | None,
    random: dict[str, Tensor],
    width: int,
    features: Callable[[dict[str, Tensor], Progress], Tensor],
) -> None:
    """The linear protocol on a backbone's features and, beside it, on two baselines.

    These are a random-weight backbone's features and raw pixels.

    Args:
        weights: the backbone's; None: it is the random-weight one.
        random: the weights of the random-weight backbone.
        width: the features' dimension.
        features: gives the features (n, width) of all images for a backbone's weights.
    """
    stage = run.stages["linear"]
    classes = run.model_spec["classes"]["linear"]
    random_source = Source("random-weight backbone", random, width, features)
    sources = {"linear": random_source}
    if weights:
        sources["linear"] = Source("learned features", weights, width, features)
        sources["linear_random"] = random_source
    pixels = partial(raw_pixels, run)
    sources["linear_pixels"] = Source(f"raw pixels ({PIXELS} px)", {}, 3 * PIXELS**2, pixels)
    for name, source in sources.items():
        torch.manual_seed(run.args.seed)
        head = nn.Linear(source.width, len(classes)).to(run.world.device)
        groups = optim.param_groups([head], stage.wd)
        optimizer = optim.build_optimizer(stage.optimizer, groups, lr=stage.lr)
        start = checkpoint.weights_digest(source.weights) if source.weights else name
        progress = run.open_stage(name, {"head": head, "optimizer": optimizer}, start=start)
        if not run.is_done(progress):
            rows = source.features(source.weights, progress)
            results = linear_protocol(run, progress, head, optimizer, rows, source.weights)
            run.finish(progress, results)
        accuracy = run.results[f"{name}/test/accuracy"]
        f1 = run.results[f"{name}/test/macro_f1"]
        run.log.say(
            f"linear protocol, {source.title + ':':24}test accuracy"
            f" {digits(accuracy)}, macro F1 {digits(f1)}"
        )
    labels = run.data.labels_in(classes)
    majority = np.bincount(labels[run.splits["train"]]).argmax()
    share = float((labels[run.splits["test"]] == majority).mean())
    run.results["majority/test/accuracy"] = share
    run.log.say(f"linear protocol, {'majority class:':24}test accuracy {digits(share)}")


def kind_of(stage: str, source: str) -> str:
    """The kind of model that a checkpoint of a stage holds: `linear_random` is a linear one.

    Raises:
        InputError: it is the baseline on raw pixels, which has no network.
    """
    if stage == "linear_pixels":
        raise InputError(
            f"{source} is the baseline on raw pixels, no network: name linear/best.pt or the run"
        )
    return stage.split("_")[0]


def raw_pixels(run: Run, _, progress: Progress) -> Tensor:
    """The pixels of all images at PIXELS x PIXELS as features (n, 3 PIXELS**2)."""
    count = len(run.data)
    batches = np.array_split(np.arange(count), -(-count // 256))
    with Evaluation(progress, None, batches) as done:
        for pixels in run.data.batches(done.left, run.args.workers):
            done.add(augment.resize(pixels, PIXELS).flatten(1))
    return done.rows()


def score(prefix: str, logits: Tensor, labels: np.ndarray, num_classes: int) -> dict:
    """Accuracy and macro precision, recall and F1 of logits (n, num_classes).

    They are named `PREFIX/accuracy`, `PREFIX/macro_f1` and so on.
    """
    values = metrics.classification(labels, logits.argmax(1).numpy(), num_classes)
    return {f"{prefix}/{name}": value for name, value in values.items()}


def linear_step(run: Run, head, optimizer, scaler, batch: Batch) -> Step:
    """One update of the linear layer on standardized features.

    The loss has the teacher's term where there is one.
    """
    optimizer.zero_grad(set_to_none=True)
    logits = head(batch.inputs)
    terms = {"ce": nn.functional.cross_entropy(logits, batch.labels)}
    if run.current.stage == "linear":  # beside it are baselines
        terms = add_distillation(run, terms, logits, batch.inputs, batch.items)
    loss = sum(terms.values())
    loss.backward()
    norm, bad = amp.guarded_step(optimizer, scaler, loss, run.args.clip_grad)
    return Step({"loss": loss.detach()}, norm, bad)


def linear_protocol(
    run: Run,
    progress: Progress,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    backbone: dict[str, Tensor],
) -> dict:
    """Train a linear layer on frozen features and test the one of the best macro F1 on dev.

    Training ends after `--patience` epochs without a better macro F1 on dev. Every rank does the
    same small work.

    Args:
        progress: the stage's state, with `head` and `optimizer` as its parts.
        rows: features (n, d) float32 of all items; standardized with the training part's mean and
            deviation. The stored layer, `head.*` in best.pt beside `backbone.*`, takes them as they
            are.
        backbone: the weights that made the rows.

    Returns:
        The test metrics.
    """
    args = run.args
    device = run.world.device
    name = progress.stage
    stage = run.settings_of(name)
    train, dev, test = (run.splits[split] for split in ("train", "dev", "test"))
    classes = run.model_spec["classes"]["linear"]
    labels = run.data.labels_in(classes)
    targets = torch.from_numpy(labels)
    mean = rows[train].mean(0)
    std = rows[train].std(0)
    std = torch.where(std > 1e-6, std, 1.0)  # a constant feature stays zero, not noise
    stored_backbone = {f"backbone.{key}": tensor for key, tensor in backbone.items()}

    def fetch(batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        for items in batches:
            x = amp.to_device((rows[items] - mean) / std, device)
            yield Batch(x, items, amp.to_device(targets[items], device), epoch)

    scaler = amp.scaler("fp32", device)
    steps = len(train) // stage.bs
    loop = Loop(run, progress, steps=steps, unit="item", patience=args.patience, quiet=True)
    for epoch in loop.epochs():
        batches = sampling.epoch_batches(train, stage.bs, args.seed, epoch, progress.batch)
        for batch in loop.batches(fetch(batches, epoch)):
            lr = loop.set_lr(optimizer)
            step = linear_step(run, head, optimizer, scaler, batch)
            loop.end_step(step, lr)
        values = {f"{name}/train/loss": progress.mean("loss")}
        layer = unstandardized(head, mean, std)
        values |= score(f"{name}/val", apply(layer, rows[dev]), labels[dev], len(classes))
        # Rounding may differ between ranks; they must agree on when to stop.
        f1 = dist.mean(torch.tensor(values[f"{name}/val/macro_f1"], device=device)).item()
        progress.select(f1, stored_backbone | layer, values, higher_is_better=True)
        loop.end_epoch(values)
    logits = apply(progress.best_weights(), rows[test])
    results = score(f"{name}/test", logits, labels[test], len(classes))
    if name == "linear":
        figures.classified(run, name, test, logits, labels[test], classes)
    last_logits = apply(unstandardized(head, mean, std), rows[test])
    last = score(f"{name}/test", last_logits, labels[test], len(classes))
    results |= {f"{metric}_last_epoch": value for metric, value in last.items()}
    run.log.metrics(name, progress.step, progress.epoch, results, quiet=True)
    return results


def unstandardized(head: nn.Linear, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The layer that gives for raw features what `head` gives for (features - mean) / std."""
    weight = head.weight.detach().cpu() / std
    return {"head.weight": weight, "head.bias": head.bias.detach().cpu() - weight @ mean}


def apply(layer: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Logits of features (n, d) on the CPU."""
    return rows @ layer["head.weight"].cpu().T + layer["head.bias"].cpu()
