"""Frozen features: computed once and kept in features.npz, and the linear protocol on them."""

import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common import augment, checkpoint, config, data, dist, findings, metrics, optim, step
from common.checkpoint import Progress
from common.log import Pace
from common.run import Run

KNN_BANK, KNN_QUERIES = 4096, 1024
# What features.npz calls the parts of the data, a later one over an earlier one.
_SPLITS = {"rest": "train", "train": "train", "finetune_train": "train", "dev": "val", "finetune_dev": "val"}
_SPLITS |= {"val": "val", "test": "test", "finetune_test": "test"}
PIXELS = 32  # side of the raw-pixel baseline's images


def stored_features(run: Run, weights: str, compute: Callable[[], Tensor]) -> Tensor:
    """Features (n, d) float32 of all items in their order: from the run directory's features.npz, or computed and kept.

    `weights` is the digest of the weights that make them: features of other weights, items or sizes are not reused.
    The file holds `features`, `id`, `label` (-1: none), `split` ("": in no part), `classes`.
    """
    file, items = run.folder / "features.npz", run.data
    key = f"{weights} {items.fingerprint} {items.store_size} {run.meta['image_size']}"
    rows = _read_features(file, key, run.log.say)
    # One process that reads while another computes would wait for it without end.
    missing = torch.tensor(int(rows is None), device=run.facts.device)
    if not dist.all_reduce(missing, "max"):
        return rows
    rows = compute()
    if run.facts.main:
        splits = np.full(len(items), "", dtype="<U5")
        for part, name in _SPLITS.items():
            splits[run.splits.get(part, [])] = name
        temporary = file.with_name(".features.tmp.npz")
        try:
            np.savez(
                temporary,
                features=rows.numpy(),
                id=np.array(items.ids),
                label=items.labels,
                split=splits,
                classes=np.array(items.classes, dtype=str),
                key=key,
            )
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    return rows


def _read_features(file: Path, key: str, say) -> Tensor | None:
    if not file.exists():
        return None
    try:
        with np.load(file) as stored:
            return torch.from_numpy(stored["features"]) if str(stored["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        say(f"{file} is damaged ({str(error) or type(error).__name__}): computing it again")
        return None


def representation(run: Run, outputs: Callable[[np.ndarray], Tensor], queries: str, split: str) -> dict:
    """kNN accuracy of the part `queries`, where there are labels, and the effective rank of its features, as metrics
    `pretrain/SPLIT/...`.

    `outputs` gives the features (n, d) of items. Neighbours are sought among at most KNN_BANK training items, for at
    most KNN_QUERIES queries, the same ones every time.
    """
    items, labels = run.data, run.data.labels

    def some(split: str, most: int) -> np.ndarray:
        indices = run.splits[split]
        return data.hold_out(items.ids, labels, indices, min(1.0, most / max(len(indices), 1)), "knn")

    labelled = len(run.splits[queries]) > 1 and len(run.splits["train"])
    bank, asked = (some("train", KNN_BANK), some(queries, KNN_QUERIES)) if labelled else ([], some("rest", KNN_QUERIES))
    rows = outputs(np.concatenate([bank, asked]).astype(np.int64))
    if not rows.isfinite().all():
        raise config.Diverged("the features are not finite: the weights have grown too large. Try a lower --lr")
    if not labelled:
        return {f"pretrain/{split}/effective_rank": metrics.effective_rank(rows)}
    near, far = rows[: len(bank)], rows[len(bank) :]
    accuracy = metrics.knn_accuracy(near, labels[bank], far, labels[asked], len(items.classes))
    values = {"knn_accuracy": accuracy, "effective_rank": metrics.effective_rank(far)}
    return {f"pretrain/{split}/{name}": value for name, value in values.items()}


def linear(
    run: Run,
    weights: dict[str, Tensor] | None,
    random: dict[str, Tensor],
    width: int,
    features: Callable[[dict[str, Tensor], Progress], Tensor],
) -> None:
    """The linear protocol on a backbone's features and, beside it, on a random-weight backbone's and on raw pixels.

    Args:
        weights: the backbone's; None: it is the random-weight one.
        random: the weights of the random-weight backbone.
        width: the features' dimension.
        features: gives the features (n, width) of all images for a backbone's weights.
    """
    args, images, stage, classes = run.args, run.data, run.stages["linear"], run.meta["classes"]["linear"]
    sources = {
        "linear": ("learned features" if weights else "random-weight backbone", weights or random, width, features),
        "linear_random": ("random-weight backbone", random, width, features),
        "linear_pixels": (f"raw pixels ({PIXELS} px)", {}, 3 * PIXELS**2, lambda _, prog: raw_pixels(run, prog)),
    }
    if not weights:
        del sources["linear_random"]
    for name, (title, source, dim, make) in sources.items():
        torch.manual_seed(args.seed)
        head = nn.Linear(dim, len(classes)).to(run.facts.device)
        optimizer = optim.build_optimizer(stage.optimizer, optim.param_groups([head], stage.wd), lr=stage.lr)
        start = checkpoint.weights_digest(source) if source else name
        progress = run.stage(name, {"head": head, "optimizer": optimizer}, start=start)
        if not run.settled(progress):
            results = linear_protocol(run, progress, head, optimizer, stage, make(source, progress), source)
            run.finish(progress, results)
        accuracy, f1 = (run.results[f"{name}/test/{metric}"] for metric in ("accuracy", "macro_f1"))
        run.log.say(f"linear protocol, {title + ':':24}test accuracy {accuracy:.4f}, macro F1 {f1:.4f}")
    labels = images.labels_in(classes)
    majority = np.bincount(labels[run.splits["train"]]).argmax()
    run.results["majority/test/accuracy"] = share = float((labels[run.splits["test"]] == majority).mean())
    run.log.say(f"linear protocol, {'majority class:':24}test accuracy {share:.4f}")


def contrast(z: Tensor) -> dict:
    """Figures of the embeddings z (2n, d) of a batch on all processes, view a above view b."""
    return metrics.contrastive(*(dist.all_gather_rows(view) for view in z.float().chunk(2)))


def kind_of(stage: str, source: str) -> str:
    """The kind of model that a checkpoint of a stage holds: `linear_random` is a linear one.

    Raises:
        InputError: it is the baseline on raw pixels, which has no network.
    """
    if stage == "linear_pixels":
        raise config.InputError(f"{source} is the baseline on raw pixels, no network: name linear/best.pt or the run")
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
    """`PREFIX/accuracy`, `/macro_precision`, `/macro_recall`, `/macro_f1` of logits (n, num_classes)."""
    values = metrics.classification(labels, logits.argmax(1).numpy(), num_classes)
    return {f"{prefix}/{name}": value for name, value in values.items()}


def linear_protocol(
    run: Run,
    progress: Progress,
    head: nn.Linear,
    optimizer,
    stage: config.Stage,
    rows: Tensor,
    backbone: dict[str, Tensor],
) -> dict:
    """Train a linear layer on frozen features and test the one of the best macro F1 on dev; returns its test metrics.

    Args:
        progress: the stage's state, with `head` and `optimizer` as its parts.
        rows: features (n, d) float32 of all items; standardised with the training part's mean and deviation. The stored
            layer, `fc.*` in best.pt beside the weights `backbone`, takes them as they are.

    Training ends after `--patience` epochs without a better macro F1 on dev. Every process does the same small work.
    """
    args, name, device = run.args, progress.stage, run.facts.device
    train, dev, test = (run.splits[split] for split in ("train", "dev", "test"))
    classes = run.meta["classes"]["linear"]
    labels, num_classes = run.data.labels_in(classes), len(classes)
    targets = torch.from_numpy(labels)
    mean, std = rows[train].mean(0), rows[train].std(0)
    std = torch.where(std > 1e-6, std, 1.0)  # a constant feature stays zero instead of becoming noise
    scaler, steps = step.scaler("fp32", device), len(train) // stage.bs
    pace = Pace(stage.bs, stage.epochs * steps)
    while progress.epoch < stage.epochs and progress.stale < args.patience:
        for batch in data.epoch_batches(train, stage.bs, args.seed, progress.epoch, progress.batch):
            step.set_lr(optimizer, stage, progress.step, steps, args.lr_schedule)
            x, y = (step.to_device(t, device) for t in ((rows[batch] - mean) / std, targets[batch]))
            optimizer.zero_grad(set_to_none=True)
            logits = head(x)
            loss = nn.functional.cross_entropy(logits, y)
            if name == "linear":  # beside it are baselines
                loss = sum(run.taught({"ce": loss}, logits, x, batch).values())
            loss.backward()
            _, bad = step.masked_step(optimizer, scaler, loss)
            progress.add(loss=loss)
            pace.tick()
            run.log.progress(name, progress.step + 1, pace)
            progress.end_step(bad)
        values = {f"{name}/train/loss": progress.mean("loss")}
        layer = unstandardised(head, mean, std)
        values |= score(f"{name}/val", apply(layer, rows[dev]), labels[dev], num_classes)
        # Rounding may differ between processes; they must agree on when to stop.
        f1 = dist.mean(torch.tensor(values[f"{name}/val/macro_f1"], device=device)).item()
        progress.select(f1, backbone | layer, values, higher_is_better=True)
        run.log.metrics(name, progress.step, progress.epoch + 1, values, quiet=True)
        progress.end_epoch()
    chosen = apply(progress.best_weights(), rows[test])
    results = score(f"{name}/test", chosen, labels[test], num_classes)
    if name == "linear":
        findings.classified(run, name, test, chosen, labels[test], classes)
    last = score(f"{name}/test", apply(unstandardised(head, mean, std), rows[test]), labels[test], num_classes)
    results |= {f"{metric}_last_epoch": value for metric, value in last.items()}
    run.log.metrics(name, progress.step, progress.epoch, results, quiet=True)
    return results


def unstandardised(head: nn.Linear, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """The layer that gives for raw features what `head` gives for (features - mean) / std."""
    weight = head.weight.detach().cpu() / std
    return {"fc.weight": weight, "fc.bias": head.bias.detach().cpu() - weight @ mean}


def apply(layer: dict[str, Tensor], rows: Tensor) -> Tensor:
    """Logits of features (n, d) on the CPU."""
    return rows @ layer["fc.weight"].cpu().T + layer["fc.bias"].cpu()
