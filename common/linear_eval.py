"""Frozen features: computed once and kept in features.npz, and the linear protocol on them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, config, metrics, optim
from common.data import augment, sampling
from common.errors import InputError
from common.report import figures
from common.run import checkpoint, dist
from common.run.log import Pace
from common.run.progress import Progress
from common.run.run import Run

PIXELS = 32  # side of the raw-pixel baseline's images


def linear(
    run: Run,
    weights: dict[str, Tensor] | None,
    random: dict[str, Tensor],
    width: int,
    features: Callable[[dict[str, Tensor], Progress], Tensor],
) -> None:
    """The linear protocol on a backbone's features and, beside it, on a random-weight backbone's
    and on raw pixels.

    Args:
        weights: the backbone's; None: it is the random-weight one.
        random: the weights of the random-weight backbone.
        width: the features' dimension.
        features: gives the features (n, width) of all images for a backbone's weights.
    """
    args, images, stage, classes = (
        run.args,
        run.data,
        run.stages["linear"],
        run.model_spec["classes"]["linear"],
    )
    sources = {
        "linear": (
            "learned features" if weights else "random-weight backbone",
            weights or random,
            width,
            features,
        ),
        "linear_random": ("random-weight backbone", random, width, features),
        "linear_pixels": (
            f"raw pixels ({PIXELS} px)",
            {},
            3 * PIXELS**2,
            lambda _, prog: raw_pixels(run, prog),
        ),
    }
    if not weights:
        del sources["linear_random"]
    for name, (title, source, dim, make) in sources.items():
        torch.manual_seed(args.seed)
        head = nn.Linear(dim, len(classes)).to(run.world.device)
        optimizer = optim.build_optimizer(
            stage.optimizer, optim.param_groups([head], stage.wd), lr=stage.lr
        )
        start = checkpoint.weights_digest(source) if source else name
        progress = run.stage(name, {"head": head, "optimizer": optimizer}, start=start)
        if not run.is_done(progress):
            results = linear_protocol(
                run, progress, head, optimizer, stage, make(source, progress), source
            )
            run.finish(progress, results)
        accuracy, f1 = (run.results[f"{name}/test/{metric}"] for metric in ("accuracy", "macro_f1"))
        run.log.say(
            f"linear protocol, {title + ':':24}test accuracy {accuracy:.4f}, macro F1 {f1:.4f}"
        )
    labels = images.labels_in(classes)
    majority = np.bincount(labels[run.splits["train"]]).argmax()
    run.results["majority/test/accuracy"] = share = float(
        (labels[run.splits["test"]] == majority).mean()
    )
    run.log.say(f"linear protocol, {'majority class:':24}test accuracy {share:.4f}")


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


def raw_pixels(run: Run, progress: Progress) -> Tensor:
    """The pixels of all images at PIXELS x PIXELS as features (n, 3 PIXELS**2)."""
    rows = []
    for pixels in run.data.batches(
        np.array_split(np.arange(len(run.data)), -(-len(run.data) // 256)), run.args.workers
    ):
        progress.check_stop()
        rows.append(augment.resize(pixels, PIXELS).flatten(1))
    return torch.cat(rows)


def score(prefix: str, logits: Tensor, labels: np.ndarray, num_classes: int) -> dict:
    """`PREFIX/accuracy`, `/macro_precision`, `/macro_recall`, `/macro_f1` of logits (n,
    num_classes).
    """
    values = metrics.classification(labels, logits.argmax(1).numpy(), num_classes)
    return {f"{prefix}/{name}": value for name, value in values.items()}


def linear_protocol(
    run: Run,
    progress: Progress,
    head: nn.Linear,
    optimizer,
    stage: config.StageConfig,
    rows: Tensor,
    backbone: dict[str, Tensor],
) -> dict:
    """Train a linear layer on frozen features and test the one of the best macro F1 on dev; returns
    its test metrics.

    Args:
        progress: the stage's state, with `head` and `optimizer` as its parts.
        rows: features (n, d) float32 of all items; standardized with the training part's mean and
            deviation. The stored layer, `head.*` in best.pt beside `backbone.*`, takes them
            as they are.
        backbone: the weights that made the rows.

    Training ends after `--patience` epochs without a better macro F1 on dev. Every process does the
    same small work.
    """
    args, name, device = run.args, progress.stage, run.world.device
    train, dev, test = (run.splits[split] for split in ("train", "dev", "test"))
    classes = run.model_spec["classes"]["linear"]
    labels, num_classes = run.data.labels_in(classes), len(classes)
    targets = torch.from_numpy(labels)
    mean, std = rows[train].mean(0), rows[train].std(0)
    std = torch.where(
        std > 1e-6, std, 1.0
    )  # a constant feature stays zero instead of becoming noise
    scaler, steps = amp.scaler("fp32", device), len(train) // stage.bs
    stored_backbone = {f"backbone.{key}": tensor for key, tensor in backbone.items()}
    pace = Pace(stage.bs, stage.epochs * steps)
    while progress.epoch < stage.epochs and progress.evals_without_gain < args.patience:
        for batch in sampling.epoch_batches(
            train, stage.bs, args.seed, progress.epoch, progress.batch
        ):
            amp.set_lr(optimizer, stage, progress.step, steps, args.lr_schedule)
            x, y = (amp.to_device(t, device) for t in ((rows[batch] - mean) / std, targets[batch]))
            optimizer.zero_grad(set_to_none=True)
            logits = head(x)
            loss = nn.functional.cross_entropy(logits, y)
            if name == "linear":  # beside it are baselines
                loss = sum(run.add_distillation({"ce": loss}, logits, x, batch).values())
            loss.backward()
            _, bad = amp.guarded_step(optimizer, scaler, loss)
            progress.add(loss=loss)
            pace.tick()
            run.log.progress(name, progress.step + 1, pace)
            progress.end_step(bad)
        values = {f"{name}/train/loss": progress.mean("loss")}
        layer = unstandardized(head, mean, std)
        values |= score(f"{name}/val", apply(layer, rows[dev]), labels[dev], num_classes)
        # Rounding may differ between processes; they must agree on when to stop.
        f1 = dist.mean(torch.tensor(values[f"{name}/val/macro_f1"], device=device)).item()
        progress.select(f1, stored_backbone | layer, values, higher_is_better=True)
        run.log.metrics(name, progress.step, progress.epoch + 1, values, quiet=True)
        progress.end_epoch()
    chosen = apply(progress.best_weights(), rows[test])
    results = score(f"{name}/test", chosen, labels[test], num_classes)
    if name == "linear":
        figures.classified(run, name, test, chosen, labels[test], classes)
    last = score(
        f"{name}/test",
        apply(unstandardized(head, mean, std), rows[test]),
        labels[test],
        num_classes,
    )
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
