"""The linear protocol on frozen features, beside the same on baselines."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, logistic, metrics, optim
from common.data import augment, sampling
from common.data.groups import groups_of
from common.distill import add_distillation
from common.errors import InputError, first_few, plural
from common.features import representation
from common.live import digits
from common.report import figures
from common.report.record import interval_text
from common.run import checkpoint, dist
from common.run.evaluation import Evaluation
from common.run.loop import Batch, Loop, Step
from common.run.progress import Progress
from common.run.run import Run

PIXELS = 32  # side of the raw-pixel baseline's images
FOLDS = 5  # of the cross-validation
# What is tried where --features is unset: so many float32 numbers of all items, 1 GB, and so many
# products of the solver's first turn. Raw pixels of 13,000 items take as many.
MOST_NUMBERS = 2**28
MOST_PRODUCTS = 1.2e11


class Source(NamedTuple):
    """Features that the protocol judges.

    Attributes:
        title: how they are called.
        weights: those that make them.
        width: the dimension of the only ones that a trained layer reads.
        features: computes them, (n, d) of all items by their name: the solved protocol chooses.
    """

    title: str
    weights: dict[str, Tensor]
    width: int
    features: Callable[[dict[str, Tensor], Progress], dict[str, Tensor]]


def linear(
    run: Run,
    weights: dict[str, Tensor] | None,
    random: dict[str, Tensor],
    widths: dict[str, int],
    features: Callable[[dict[str, Tensor], Progress, list[str]], dict[str, Tensor]],
) -> None:
    """The linear protocol on a backbone's features and, beside it, on two baselines.

    These are a random-weight backbone's features and raw pixels. The gain over each of them is that
    of the same test images.

    Args:
        weights: the backbone's; None: it is the random-weight one.
        random: the weights of the random-weight backbone.
        widths: the features' dimensions by their names, `gap` first.
        features: gives for a backbone's weights the features (n, width) of all images that have
            these names.
    """
    stage = run.stages["linear"]
    classes = run.model_spec["classes"]["linear"]
    features = partial(features, names=tried(run, widths))
    width = widths["gap"]
    random_source = Source("random-weight backbone", random, width, features)
    sources = {"linear": random_source}
    if weights:
        sources["linear"] = Source("learned features", weights, width, features)
        sources["linear_random"] = random_source
    everything = np.arange(len(run.data))

    def pixels(_, progress: Progress) -> dict[str, Tensor]:
        return {"pixels": raw_pixels(run, everything, progress)}

    side = pixel_side(len(everything))
    sources["linear_pixels"] = Source(f"raw pixels ({side} px)", {}, 3 * side**2, pixels)
    labels = run.data.labels_in(classes)
    test = run.splits["test"]
    hits = {}
    for name, source in sources.items():
        torch.manual_seed(run.args.seed)
        start = checkpoint.weights_digest(source.weights) if source.weights else name
        if stage.optimizer == "lbfgs":
            progress = run.open_stage(name, {}, start=f"{start} lbfgs")
            protocol = solved_protocol
        else:
            head = nn.Linear(source.width, len(classes)).to(run.world.device)
            groups = optim.param_groups([head], stage.wd)
            optimizer = optim.build_optimizer(stage.optimizer, groups, lr=stage.lr)
            progress = run.open_stage(name, {"head": head, "optimizer": optimizer}, start=start)
            protocol = linear_protocol
        if not run.is_done(progress):
            rows = source.features(source.weights, progress)
            for candidate in rows.values():
                amp.require_finite(candidate, "features")
            results = protocol(run, progress, rows, source.weights)
            read = rows[progress.model_spec.get("features", next(iter(rows)))]
            answers = apply(progress.best_weights(), read[test]).argmax(1).numpy()
            is_right = torch.from_numpy(answers == labels[test])
            run.finish(progress, results | {f"{name}/test/hits": is_right})
        hits[name] = run.results.pop(f"{name}/test/hits", None)  # no metric of the summary
        accuracy, f1, knn = (
            interval_text(run.results, f"{name}/test/{metric}")
            for metric in ("accuracy", "macro_f1", "knn_accuracy")
        )
        run.log.say(
            f"linear protocol, {source.title + ':':24}test accuracy {accuracy}, macro F1 {f1},"
            f" kNN {knn}"
        )
    share = majority_accuracy(run, "train", labels, test)
    run.results["majority/test/accuracy"] = share
    run.results["linear/train/labels"] = len(run.splits["train"]) + len(run.splits["dev"])
    run.log.say(f"linear protocol, {'majority class:':24}test accuracy {digits(share)}")
    for name, source in list(sources.items())[1:]:
        if hits["linear"] is None or hits[name] is None:
            run.log.say(f"linear protocol, {source.title}: tested by an earlier version, no pairs")
            continue
        gains = hits["linear"].double() - hits[name].double()  # by test image
        key = f"linear/test/gain_over_{name.removeprefix('linear_')}"
        groups = groups_of(run.data, test)
        low, high = metrics.mean_interval(gains, least=-1.0, units=groups)
        run.results |= {key: gains.mean().item(), f"{key}_low": low, f"{key}_high": high}
        run.log.say(
            f"linear protocol, {sources['linear'].title} minus {source.title}:"
            f" accuracy {interval_text(run.results, key)}"
        )


def majority_accuracy(run: Run, part: str, labels: np.ndarray, test: np.ndarray) -> float:
    """Accuracy of the most frequent class of a part, also of the labels that a stage leaves out."""
    whole = run.splits.get(f"all_{part}", run.splits[part])
    return metrics.majority_accuracy(labels[whole], labels[test])


def tried(run: Run, widths: dict[str, int]) -> list[str]:
    """Which features the linear layer may read: those of --features, or all that are affordable.

    What is left out is said. A layer that is trained reads `gap`.

    Args:
        widths: of those that the backbone has, `gap` first.
    """
    if run.stages["linear"].optimizer != "lbfgs":
        return ["gap"]
    backbone, asked = run.model_spec["backbone"], run.args.features
    if asked:
        return [asked if asked in widths else "gap"]  # 2x2 of maps with a single place
    if len(widths) == 1:
        run.log.say(f"linear: {backbone} has no maps to choose features from: gap")
    fitted = len(run.splits["train"]) + len(run.splits["dev"])
    large = [
        name
        for name, width in widths.items()
        if name != "gap"
        and (
            len(run.data) * width > MOST_NUMBERS
            or fitted * width * min(fitted, width) > MOST_PRODUCTS
        )
    ]
    for name in large:
        run.log.say(
            f"linear: features {name} are not tried, {widths[name]:,} for each of"
            f" {plural(fitted, 'item')} take long; --features {name} reads them alone"
        )
    return [name for name in widths if name not in large]


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


def pixel_side(count: int) -> int:
    """PIXELS; of more images than MOST_NUMBERS holds at that side, 87,381, as many as it holds."""
    return max(1, min(PIXELS, math.isqrt(MOST_NUMBERS // (3 * count))))


def raw_pixels(run: Run, items: np.ndarray, progress: Progress) -> Tensor:
    """The pixels of n images as features (n, 3 s * s) where s is their `pixel_side`."""
    side = pixel_side(len(items))
    batches = np.array_split(items, -(-len(items) // 256))
    with Evaluation(progress, None, batches) as done:
        for pixels in run.data.batches(done.left, run.args.workers):
            done.add(augment.resize(pixels, side).flatten(1))
    return done.rows()


def score(prefix: str, logits: Tensor, labels: np.ndarray, num_classes: int) -> dict:
    """Accuracy and macro precision, recall and F1 of logits (n, num_classes).

    They are named `PREFIX/accuracy`, `PREFIX/macro_f1` and so on.
    """
    values = metrics.classification(labels, logits.argmax(1).numpy(), num_classes)
    return {f"{prefix}/{name}": value for name, value in values.items()}


def tested(
    prefix: str,
    logits: Tensor,
    labels: np.ndarray,
    num_classes: int,
    groups: np.ndarray | None = None,
) -> dict:
    """`score` of a test, and the interval of its accuracy by bootstrap over the items' `groups`
    (n,), None: over the items.
    """
    low, high = metrics.mean_interval(logits.argmax(1).numpy() == labels, units=groups)
    interval = {f"{prefix}/accuracy_low": low, f"{prefix}/accuracy_high": high}
    return score(prefix, logits, labels, num_classes) | interval


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


def test_selected(run: Run, progress: Progress, rows: Tensor) -> dict:
    """Test metrics of the selected layer on features `rows` (n, d), and of their nearest neighbors.

    For the stage itself also its figures.
    """
    name = progress.stage
    classes = run.model_spec["classes"]["linear"]
    test = run.splits["test"]
    labels = run.data.labels_in(classes)[test]
    logits = apply(progress.best_weights(), rows[test])
    if name == "linear":
        figures.classified(run, name, test, logits, labels, classes)
    neighbors = representation(run, rows.__getitem__, "test", f"{name}/test", bank="train")
    groups = groups_of(run.data, test)
    return tested(f"{name}/test", logits, labels, len(classes), groups) | neighbors


def stratified_folds(
    ids: list[str],
    labels: np.ndarray,
    items: np.ndarray,
    count: int,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Which of `count` folds holds each of `items` out: (n,) int64, every fold has an item.

    Every fold has its share of every class, to within one; with `groups` as near as these allow
    that are whole, and where one fold would hold everything, without them. It depends on the items'
    names alone.
    """
    folds = np.full(len(ids), count - 1)
    if groups is not None:
        rest = items
        for fold in range(count - 1):
            share = 1 / (count - fold)
            held = sampling.hold_out_groups(groups, labels, rest, share, f"fold {fold}", False)
            folds[held] = fold
            rest = np.setdiff1d(rest, held)
        held_out, of_items = np.unique(folds[items], return_inverse=True)
        if len(held_out) > 1:
            return of_items
    order = [
        sampling.hash_order(ids, items[labels[items] == label], "fold")
        for label in np.unique(labels[items])
    ]
    folds[np.concatenate(order)] = np.arange(len(items)) % count
    return folds[items]


def solved_protocol(
    run: Run, progress: Progress, rows: dict[str, Tensor], backbone: dict[str, Tensor]
) -> dict:
    """Solve the linear layer on frozen features and test it, see `common.logistic`.

    It is fitted to train and dev; its penalty and, of several, its features are chosen by
    cross-validation on them. Every rank does all of it. A stop leaves the stage at its beginning.

    Args:
        progress: the stage's state; the name of the chosen features joins its `model_spec`.
        rows: features (n, d) float32 of all items by their name, of equally good ones the first is
            chosen. The stored layer, `head.*` in best.pt beside `backbone.*`, takes them as they
            are.
        backbone: the weights that made the rows.

    Returns:
        The test metrics, and of the cross-validation the accuracy and the penalty.
    """
    name = progress.stage
    world = run.world
    classes = run.model_spec["classes"]["linear"]
    labels = run.data.labels_in(classes)
    items = np.union1d(run.splits["train"], run.splits["dev"])

    def evaluated() -> None:
        progress.heartbeat += 1

    def agreed(accuracy: float) -> float:
        # Rounding may differ between ranks; they must agree on when to stop.
        progress.check_stop()
        return dist.mean(torch.tensor(accuracy, device=world.device)).item()

    counts = np.bincount(labels[items], minlength=len(classes))
    single = [name for name, count in zip(classes, counts, strict=True) if count == 1]
    if single and name == "linear":
        run.log.say(
            f"WARN linear: one labeled image of {first_few(single)}: cross-validation never gets it"
            " right; a larger --label-fraction, or more images"
        )
    device = world.device
    if device.type != "cuda":
        device = torch.device("cpu")  # others, as mps, have no float64
    folds = stratified_folds(run.data.ids, labels, items, FOLDS, run.data.groups)
    of_items = torch.from_numpy(items), torch.from_numpy(labels[items]), torch.from_numpy(folds)
    accuracies = {}
    for candidate, values in rows.items():
        with progress.interruptible():
            solved = logistic.solve(values, *of_items, len(classes), device, evaluated, agreed)
        if solved.accuracy > max(accuracies.values(), default=-1.0):
            chosen, solution = candidate, solved
        accuracies[candidate] = solved.accuracy
    progress.model_spec["features"] = chosen
    others = [f"{k} {digits(v)}" for k, v in accuracies.items() if k != chosen]
    run.log.say(
        f"{name}: features {chosen}, penalty {solution.penalty:.2g}, accuracy"
        f" {solution.accuracy:.4f} in {FOLDS}-fold cross-validation of {plural(len(items), 'item')}"
        + (f" ({', '.join(others)})" if others else "")
    )
    if solution.unsolved:
        at = ", ".join(f"{penalty:.2g}" for penalty in solution.unsolved)
        run.log.say(f"WARN {name}: no convergence in {logistic.MOST_STEPS} steps at penalty {at}")
    results = {f"{name}/cv/accuracy": solution.accuracy, f"{name}/cv/penalty": solution.penalty}
    layer = {"head.weight": solution.weight.float(), "head.bias": solution.bias.float()}
    weights = {f"backbone.{key}": tensor for key, tensor in backbone.items()} | layer
    progress.select(solution.accuracy, weights, results, higher_is_better=True)
    progress.end_epoch()
    results |= test_selected(run, progress, rows[chosen])
    run.log.metrics(name, progress.step, progress.epoch, results, quiet=True)
    return results


def linear_protocol(
    run: Run, progress: Progress, rows: dict[str, Tensor], backbone: dict[str, Tensor]
) -> dict:
    """Train a linear layer on frozen features and test the one of the best macro F1 on dev.

    Training ends after `--patience` epochs without a better macro F1 on dev. Every rank does the
    same small work.

    Args:
        progress: the stage's state, whose parts are `head` and `optimizer`.
        rows: features (n, d) float32 of all items, by their one name; standardized with the
            training part's mean and deviation. The stored layer, `head.*` in best.pt beside
            `backbone.*`, takes them as they are.
        backbone: the weights that made the rows.

    Returns:
        The test metrics.
    """
    args = run.args
    device = run.world.device
    name = progress.stage
    (rows,) = rows.values()
    head, optimizer = (progress.parts[part] for part in ("head", "optimizer"))
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
    results = test_selected(run, progress, rows)
    last_logits = apply(unstandardized(head, mean, std), rows[test])
    groups = groups_of(run.data, test)
    last = tested(f"{name}/test", last_logits, labels[test], len(classes), groups)
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
