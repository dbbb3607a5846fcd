"""The items of --check about the network and its training; each is tried on a few batches."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, metrics, optim
from common.check import audit
from common.check.result import FAIL, PASS, WARN, CheckSpec, Result, skip
from common.data import augment, sampling
from common.report import figures

OVERFIT_STEPS, LEARNED = 100, 0.3  # at most; the share of the first loss that counts as learned
BASELINE_STEPS, MARGIN = (
    24,
    0.97,
)  # the loss with inputs is to be lower than this share of that without
DESCENT_STEPS, FASTEST = 16, 0.05  # 0.001 of a weight a step is usual
NOTHING_HELD_OUT = "no sample is held out to evaluate on"
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish)


@contextlib.contextmanager
def record_calls(model: nn.Module) -> Iterator[tuple[list[tuple], list]]:
    """(calls, outputs): the arguments of every call of a network, and what it gave."""
    calls, outputs = [], []
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


def small(spec: CheckSpec, count: int, epoch: int = 0) -> list[np.ndarray]:
    """The first `count` small batches of an epoch; they repeat where the epoch has fewer."""
    cut = []
    for batch in epoch_batches(spec, epoch):
        size = min(spec.view.size, len(batch))
        cut += [batch[i : i + size] for i in range(0, len(batch) - size + 1, size)]
        if len(cut) >= count:
            break
    return [cut[i % len(cut)] for i in range(count)]


def _typical(spec: CheckSpec, count: int) -> list[np.ndarray]:
    # Small batches in which the classes have their shares, as near as so few items can.
    if spec.labels is None:
        return small(spec, count)
    order = np.concatenate(epoch_batches(spec, 0))
    ranked = order[np.argsort(spec.labels[samples_of(spec, order)], kind="stable")]
    size = min(spec.view.size, len(ranked))
    even = ranked[np.linspace(0, len(ranked) - 1, count * size).round().astype(int)]
    return [even[k::count] for k in range(count)]


def samples_of(spec: CheckSpec, items: np.ndarray) -> np.ndarray:
    """The samples that items are drawn from."""
    return items % len(spec.run.data)


def seed(spec: CheckSpec) -> Result:
    """Three steps twice are equal to the last bit, and epochs, samples and views draw augmentations
    of their own.
    """
    runs = []
    for _ in range(2):
        trial = Trial(spec)
        losses = [trial.go(items)[0] for items in small(spec, 3)]
        runs.append(
            (losses, {name: tensor.clone() for name, tensor in trial.model.state_dict().items()})
        )
    (first, a), (second, b) = runs
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    if first != second or differ:
        return Result(
            FAIL,
            f"3 steps twice gave losses {_numbers(first)} and {_numbers(second)}, {len(differ)}"
            " tensors differ",
            "equal bits",
            "something draws from a generator that --seed does not set, such as numpy's or the"
            " augmentation's own",
        )
    order = [np.concatenate(epoch_batches(spec, epoch)) for epoch in (0, 0, 1)]
    if not np.array_equal(order[0], order[1]):
        return Result(
            FAIL,
            "epoch 1 twice has two orders",
            "one order",
            "make the order a function of (seed, epoch)",
        )
    if len(order[0]) > 2 and np.array_equal(order[0], order[2]):
        return Result(
            FAIL,
            "epochs 1 and 2 have one order",
            "two orders",
            "make the order a function of (seed, epoch)",
        )
    if not spec.augmented:
        return Result(PASS, "3 steps twice are equal; no augmentation", "equal bits")
    trial, items = Trial(spec), np.unique(small(spec, 1)[0])
    rows = spec.run.data
    spec.run.data = _Twins(rows)
    try:
        seen = []
        for epoch in (0, 1, 0):
            with record_calls(trial.model) as (calls, _):
                trial.go(items, epoch, share=0.0)
            seen.append(spec.view.augmented_part(calls, len(items)).float())
    finally:
        spec.run.data = rows
    x, views = seen[0], seen[0].shape[1]
    flat = x.flatten(1).cpu()
    alike = {
        "two times of one epoch differ": not torch.equal(x, seen[2]),
        "two epochs are alike": torch.equal(x, seen[1]),
        "samples are alike": len(flat) > 3 and bool((flat == flat[0]).all()),
        "views are alike": views > 1 and torch.equal(x[:, 0], x[:, 1]),
    }
    wrong = [name for name, found in alike.items() if found]
    if wrong:
        fix = "draw augmentations from (seed, epoch, sample, view)"
        return Result(FAIL, f"augmentation: {', '.join(wrong)}", "all differ, repeatably", fix)
    return Result(PASS, "3 steps twice are equal; epochs, samples and views differ", "equal bits")


class _Twins:
    # A data set all of whose samples in a batch look like the first: what then differs is the
    # augmentation.
    def __init__(self, data):
        self._data = data

    def __getattr__(self, name):
        return getattr(self._data, name)

    def __len__(self):
        return len(self._data)

    def batches(self, *args):
        for pixels in self._data.batches(*args):
            parts = (pixels,) if isinstance(pixels, Tensor) else pixels
            same = [part[:1].expand_as(part).contiguous() for part in parts]
            yield same[0] if isinstance(pixels, Tensor) else tuple(same)


def _numbers(values) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def gradient(spec: CheckSpec) -> Result:
    """A step's gradient is that of its batch alone: at rate 0 the same step again has the same one."""
    trial, items, own = Trial(spec), small(spec, 1)[0], spec.run.args.seed
    (_, first), (_, again) = (trial.go(items, share=0.0, seed=own) for _ in range(2))
    value = f"gradient norm {first:.6g}, of the same step again {again:.6g}"
    if not math.isfinite(first) or not first > 0:
        return Result(
            FAIL,
            value,
            "finite and positive",
            "nothing trains: look for a detached loss or a frozen network",
        )
    if abs(again - first) > 1e-3 * first:
        return Result(
            FAIL,
            value,
            "equal",
            "gradients add up from step to step: call zero_grad before backward",
        )
    return Result(PASS, value, "equal")


def loss_at_init(spec: CheckSpec) -> Result:
    """The untrained network's loss is what a guess costs."""
    trial, batches = Trial(spec), _typical(spec, 3)
    loss = float(np.mean([trial.go(items, share=0.0)[0] for items in batches]))
    drawn = None if spec.labels is None else spec.labels[samples_of(spec, np.concatenate(batches))]
    low, high = spec.chance(drawn) if callable(spec.chance) else spec.chance
    if drawn is not None and not _is_binary(spec, trial.model):
        # The classes' shares are a guess too.
        cost = -np.log(class_shares(spec).clip(1e-9))[drawn].mean()
        low *= min(1.0, float(cost) / math.log(len(spec.classes)))
    value, threshold = f"{loss:.4f}", f"{low:.4f} to {high:.4f}"
    if low <= loss <= high:
        return Result(PASS, value, threshold)
    why = (
        "more than a guess costs: look at the reduction, the scale of the logits and the last"
        " layer's start"
    )
    if loss < low:
        why = "less than a guess costs: look at the reduction, and for the answer among the inputs"
    return Result(FAIL, value, threshold, why)


def inputs(spec: CheckSpec) -> Result:
    """What enters the network, seen just before it: evaluation's input is the stored pixels,
    training's is like it.
    """
    model, trial, own = spec.build(), Trial(spec), _others(spec)[: 2 * spec.view.size]
    items = small(spec, 1)[0]
    with record_calls(trial.model) as (calls, _):
        trial.go(items, share=0.0)
    with record_calls(model) as (tested, _):
        spec.evaluate(model, own)
    if isinstance(calls[0][0], dict) or calls[0][0].ndim < 4:
        return _features_in(calls[0])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in spec.view.normalization)
    both = [torch.cat([_images(call) for call in part]) for part in (calls, tested)]
    train, test = (x * std + mean for x in both)
    pictures = [_picture(spec, "inputs", train[:32], 8)]
    rows = [["channel", "training mean", "deviation", "evaluation mean", "deviation"]]
    for c, name in enumerate(("red", "green", "blue")):
        rows.append(
            [name, *(f"{f(x[:, c]).item():.3f}" for x in both for f in (torch.mean, torch.std))]
        )
    value = ", ".join(f"{row[0]} {float(row[1]):.2f} ± {float(row[2]):.2f}" for row in rows[1:])
    problems = []
    if not all(x.isfinite().all() for x in both):
        problems.append("values are not finite")
    elif train.flatten(1).std(1).max() < 0.01 or (
        len(train) > 1 and (train - train[:1]).abs().max() < 0.01
    ):
        problems.append("all images are alike or empty")
    elif train.min() < -0.05 or train.max() > 1.05:
        problems.append(
            f"de-normalized pixels lie in {train.min():.2f} to {train.max():.2f}, not in 0 to 1"
        )
    stored = spec.view.stored_pixels(own).to(torch.uint8)
    raw = augment.resize(stored, test.shape[-1]).float().cpu()
    away = (raw - test).abs().mean().item() if raw.shape == test.shape else math.inf
    if not away < 0.02:
        problems.append(f"evaluation reads images that are {away:.3f} away from the stored ones")
    spread = (train.std() / raw.std().clamp(min=1e-6)).item()
    if not problems and not 0.4 < spread < 2.5:
        problems.append(f"training's deviation is {spread:.2f} times the stored images'")
    if problems:
        fix = (
            "look at the picture: check the division by 255, the mean and deviation, and what"
            " augments evaluation"
        )
        return Result(
            FAIL, "; ".join(problems), "0 to 1; evaluation as stored", fix, pictures, rows
        )
    return Result(PASS, value, "evaluation as stored, training in 0 to 1", "", pictures, rows)


def _images(call: tuple) -> Tensor:
    # What entered the network as (m, 3, h, w), whatever stands before the channels.
    x = call[0].float().cpu()
    return x.flatten(0, x.ndim - 4)


def _features_in(call: tuple) -> Result:
    parts = call[0] if isinstance(call[0], dict) else {"features": call[0]}
    rows, problems = [["input", "mean", "deviation", "constant columns"]], []
    for name, x in parts.items():
        x = x.detach().float().cpu().flatten(0, -2)
        still = (x.std(0) < 1e-6).float().mean().item()
        rows.append([name, f"{x.mean().item():.3f}", f"{x.std().item():.3f}", f"{still:.0%}"])
        if not x.isfinite().all():
            problems.append(f"{name}: values are not finite")
        elif still > 0.5:
            problems.append(f"{name}: {still:.0%} of the columns are the same for all samples")
        elif x.std() > 1e3 or x.std() < 1e-4:
            problems.append(f"{name}: deviation {x.std().item():.2g}")
    value = "; ".join(f"{row[0]} {row[1]} ± {row[2]}" for row in rows[1:])
    if problems:
        return Result(
            FAIL, "; ".join(problems), "finite, varied", "fix the data or their reading", rows=rows
        )
    return Result(PASS, value, "finite, varied", rows=rows)


def _picture(spec: CheckSpec, name: str, images: Tensor, columns: int) -> str:
    stage = f"{spec.stage}_" if len(spec.run.stages) > 1 else ""
    path = f"figures/check_{stage}{name}.png"
    figures.save_grid(spec.run.folder / path, images, columns)
    return path


def eval_invariance(spec: CheckSpec) -> Result:
    """Evaluation gives a row for each sample, whatever the order and the company, and leaves the
    network as it is.
    """
    if not len(spec.held_out):
        return skip(NOTHING_HELD_OUT)
    model, some = spec.build(), spec.held_out[:8]
    trial = Trial(spec, model=model)
    trial.go(
        small(spec, 1)[0]
    )  # fresh running statistics would hide a network that is left in training mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    problems, many = [], spec.held_out[: spec.view.eval_batch + 2]
    counted = spec.evaluate(model, many)
    if len(counted) != len(many):
        problems.append(f"{len(counted)} rows for {len(many)} samples")
    model.train()
    rows = spec.evaluate(model, some)
    scale = rows.abs().max().item() + 1e-6
    if not rows.isfinite().all():
        problems.append("rows are not finite")
    elif not torch.equal(rows, spec.evaluate(model, some)):
        problems.append("twice the same samples give other rows")
    elif _away(rows, spec.evaluate(model, some[::-1].copy()).flip(0)) > 1e-3 * scale:
        problems.append("another order gives other rows")
    elif len(some) > 2 and _away(rows[:2], spec.evaluate(model, some[:2])) > 1e-3 * scale:
        problems.append("a row depends on the other samples of its batch")
    elif len(counted) == len(many) and _away(rows, counted[: len(some)]) > 1e-3 * scale:
        problems.append("a row depends on how many samples there are")
    moved = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    if moved:
        problems.append(f"evaluation changes {moved[0]}")
    problems += _splits(spec)
    value = f"{len(many)} of {len(spec.held_out)} samples, a row each"
    if problems:
        fix = (
            "evaluate whole splits, in evaluation mode, without augmentation; keep the splits apart"
        )
        return Result(FAIL, "; ".join(problems), "one row a sample, the same in any order", fix)
    return Result(PASS, value, "one row a sample, the same in any order")


def _others(spec: CheckSpec) -> np.ndarray:
    # What a network is shown where nothing depends on its being new to it: without a test split,
    # training's own.
    return spec.held_out if len(spec.held_out) else np.unique(samples_of(spec, spec.train))


def _away(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.shape == b.shape else math.inf


def _splits(spec: CheckSpec) -> list[str]:
    # An epoch goes through the training split, once each unless classes are drawn by weight, and
    # through nothing else.
    n, problems = len(spec.run.data), []
    train, drawn = (
        samples_of(spec, spec.train),
        samples_of(spec, np.concatenate(epoch_batches(spec, 0))),
    )
    shared = np.intersect1d(train, spec.held_out)
    if len(shared):
        problems.append(f"{len(shared)} samples are in training and in evaluation")
    strange = np.setdiff1d(drawn, train)
    if len(strange):
        problems.append(f"an epoch trains on {len(strange)} samples of other splits")
    missed, repeated = len(train) - len(np.unique(drawn)), len(drawn) - len(np.unique(drawn))
    if repeated and not spec.batches:
        problems.append(f"an epoch draws {repeated} samples again")
    elif not repeated and missed > len(train) % spec.settings.bs:
        problems.append(f"an epoch leaves out {missed} of {len(train)} samples")
    if max(np.max(train), np.max(drawn), spec.held_out[0]) >= n:
        problems.append("indices beyond the data")
    return problems


def head_bias(spec: CheckSpec) -> Result:
    """The untrained network predicts the classes' shares: its last bias holds them."""
    if spec.labels is None:
        return skip("no classes")
    model = spec.build()
    head = spec.view.head(model)
    if head is None or head.bias is None:
        return skip("the last layer has no bias")
    logits = spec.evaluate(model, samples_of(spec, spec.train)[:64]).float().flatten(1)
    if _is_binary(spec, model):
        fake = logits.sigmoid().mean().item()
        mean = torch.tensor([1 - fake, fake])
    else:
        mean = logits.softmax(1).mean(0)
    prior = torch.from_numpy(class_shares(spec)).float().clamp(min=1e-6)
    kl = (prior * (prior / mean.clamp(min=1e-9)).log()).sum().item()
    rows = [["class", "share", "predicted"]]
    rows += [
        [n, f"{p:.3f}", f"{q:.3f}"]
        for n, p, q in zip(spec.classes, prior.tolist(), mean.tolist(), strict=True)
    ]
    value, threshold = f"KL {kl:.4f} from the classes' shares", "at most 0.1, fails above 1"
    if kl <= 0.1:
        return Result(PASS, value, threshold, rows=rows)
    fix = "--head-bias prior starts the last layer at the classes' shares"
    return Result(
        FAIL if kl > 1 or not math.isfinite(kl) else WARN, value, threshold, fix, rows=rows
    )


def _is_binary(spec: CheckSpec, model: nn.Module) -> bool:
    # Whether the one output is the logit of class 1.
    head = spec.view.head(model)
    return head is not None and head.out_features == 1


def class_shares(spec: CheckSpec) -> np.ndarray:
    """The shares (K,) of the classes as training draws them."""
    drawn = samples_of(spec, np.concatenate(epoch_batches(spec, 0)))
    counts = np.bincount(spec.labels[drawn], minlength=len(spec.classes))
    return counts / counts.sum()


def trainable(spec: CheckSpec) -> Result:
    """Every parameter that should train is in one group of the optimizer, gets a gradient and
    moves; nothing else does.

    Three steps at the peak rates.
    """
    trial = Trial(spec)
    model = trial.model
    is_frozen = getattr(model, "is_frozen", None)  # what the flags freeze, where they can
    problems = audit.check_groups(model, trial.optimizer)
    parameters = dict(model.named_parameters())
    problems += [
        f"{n} is frozen by no flag"
        for n, p in parameters.items()
        if not (p.requires_grad or (is_frozen and is_frozen(n)))
    ]
    before = {name: p.detach().clone() for name, p in parameters.items()}
    felt = dict.fromkeys(parameters, False)
    for items in small(spec, 3):
        trial.go(items)
        for name, p in parameters.items():
            felt[name] = felt[name] or (p.grad is not None and bool((p.grad != 0).any()))
    for name, p in parameters.items():
        moved = not torch.equal(before[name], p.detach())
        if p.requires_grad and not felt[name]:
            problems.append(f"{name} gets no gradient")
        elif not p.requires_grad and moved:
            problems.append(f"{name} is frozen and moved")
    trained = [name for name, p in parameters.items() if p.requires_grad]
    still = [name for name in trained if torch.equal(before[name], parameters[name].detach())]
    if len(still) == len(trained):
        problems.append("no parameter moves: the learning rate is 0 or far too small")
    problems += spec.audit(spec.build()) if spec.audit else []
    value, threshold = f"{len(trained)} of {len(parameters)} tensors train", "all that should"
    if not problems:
        return Result(PASS, value, threshold)
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    fix = (
        "look for a detach, a no_grad, a loss of weight 0, or parameters that the optimizer was"
        " not given"
    )
    return Result(FAIL, "; ".join(problems[:4]) + more, threshold, fix)


def leakage(spec: CheckSpec) -> Result:
    """By backprop: the output of a sample depends on that sample alone, and on all of its parts."""
    model, some = spec.build(), _others(spec)[:3]
    with record_calls(model) as (calls, _):
        spec.evaluate(model, some)
    model.eval()
    view, call = spec.view, calls[0]
    xs = [x.detach().clone().requires_grad_() for x in view.entry(model, call)]
    rows = view.outputs(model, call, xs).float().flatten(1)
    padding = view.padding(call) or [None] * len(xs)
    problems = []
    for i in range(min(len(rows), 3)):
        grads = torch.autograd.grad(rows[i].sum(), xs, retain_graph=True, allow_unused=True)
        for name, (grad, mask) in enumerate(zip(grads, padding, strict=True)):
            where = f"of input {name + 1}" if len(xs) > 1 else ""
            if grad is None:
                problems.append(f"outputs do not depend on input {name + 1}")
                continue
            if mask is not None and grad[mask].abs().sum() > 0:
                problems.append(f"output {i + 1} depends on padding {where}")
            reach = grad.reshape(len(rows), spec.view.parts, -1).abs().sum(2) > 0
            if reach[[j for j in range(len(rows)) if j != i]].any():
                problems.append(f"output {i + 1} depends on other samples {where}")
            if not reach[i].all():
                blind = (~reach[i]).nonzero()[:, 0].tolist()
                part = (
                    f"parts {blind} of {spec.view.parts}" if spec.view.parts > 1 else "its sample"
                )
                problems.append(f"output {i + 1} does not depend on {part} {where}")
    x = call[0].detach().clone().requires_grad_() if isinstance(call[0], Tensor) else None
    frames = None if x is None else view.causal(model, x)
    for t in range(0 if frames is None else frames.shape[1] - 1):
        (grad,) = torch.autograd.grad(frames[0, t].sum(), x, retain_graph=True)
        if grad.reshape(len(frames), view.parts, -1)[0, t + 1 :].abs().sum() > 0:
            problems.append(f"frame {t + 1} depends on later frames")
            break
    passes = (
        f"its own sample, all {spec.view.parts} parts"
        if spec.view.parts > 1
        else "its own sample alone"
    )
    if problems:
        fix = (
            "look for a view or reshape where permute or transpose is meant, and for what mixes"
            " a batch in evaluation"
        )
        found = [text.strip() for text in dict.fromkeys(problems)]
        return Result(FAIL, "; ".join(found[:4]), passes, fix)
    past = "" if frames is None else "; frames depend on the past alone"
    return Result(PASS, f"outputs of {len(rows)} rows reach their own samples{past}", passes)


def overfit(spec: CheckSpec) -> Result:
    """A small batch, its augmentation fixed, overfits."""
    trial, items = Trial(spec, 1e-3), _varied(spec)
    first = last = right = None
    for k in range(OVERFIT_STEPS):
        with record_calls(trial.model) as (_, outputs):
            last, _ = trial.go(items, seed=spec.run.args.seed + k)
        first = last if first is None else first
        right, answers = _answers(spec, [spec.view.rows(output) for output in outputs], items)
        floor = 0.0 if spec.labels is None else LEARNED * first
        if not math.isfinite(last) or (right == 1 and (spec.labels is None or last <= floor)):
            break
    value = (
        f"{right:.0%} right, loss {first:.4f} to {last:.4f} in {k + 1} steps on {len(items)} items"
    )
    threshold = "100 %" + (
        "" if spec.labels is None else f", loss below {LEARNED:.0%} of the first"
    )
    rows = [["truth", "prediction"], *answers] if answers else []
    if right == 1 and (spec.labels is None or last <= LEARNED * first):
        return Result(PASS, value, threshold, rows=rows)
    fix = (
        "what cannot overfit a few items has a bug in its loss, its labels or its"
        " gradient, or no capacity"
    )
    return Result(FAIL, value, threshold, fix, rows=rows)


def _varied(spec: CheckSpec) -> np.ndarray:
    # The items of a batch, of two classes at least.
    for items in small(spec, 8):
        if spec.labels is None or len(set(spec.labels[samples_of(spec, items)])) > 1:
            return items
    return items


def _answers(
    spec: CheckSpec, rows: list[Tensor], items: np.ndarray
) -> tuple[float, list[list[str]]]:
    # The share of right answers of a training step, and (truth, prediction) of each item.
    x = torch.cat(rows).detach().float()
    if not x.isfinite().all():
        return 0.0, []
    if spec.labels is None:
        a, b = x[: 2 * len(items)].chunk(2)
        return metrics.contrastive(a, b)["top1"], []
    truth = spec.labels[samples_of(spec, items)]
    predicted = (x[:, 0] > 0).long() if x.shape[1] == 1 else x.argmax(1)
    named = [
        [spec.classes[t], spec.classes[p]] for t, p in zip(truth, predicted.tolist(), strict=True)
    ]
    return float(np.mean([t == p for t, p in named])), named


def zero_input(spec: CheckSpec) -> Result:
    """Zeroed inputs must do worse than real ones after equally many steps."""
    if not len(spec.held_out):
        return skip(NOTHING_HELD_OUT)

    def zeroed(_, call):
        x = call[0]
        x = (
            {n: torch.zeros_like(v) for n, v in x.items()}
            if isinstance(x, dict)
            else torch.zeros_like(x)
        )
        return (x, *call[1:])

    losses = {}
    batches = small(spec, BASELINE_STEPS)
    others = spec.held_out[: 4 * spec.view.size]
    held = [
        others[i : i + spec.view.size]
        for i in range(0, len(others) - spec.view.size + 1, spec.view.size)
    ] or [others]
    for name in ("real", "zero"):
        trial = Trial(spec, 1e-3)
        if name == "zero":
            trial.model.register_forward_pre_hook(zeroed)
        seen = [trial.go(items, epoch=k, seed=k)[0] for k, items in enumerate(batches)]
        unseen = [trial.go(items, epoch=0, share=0.0, seed=0)[0] for items in held]
        losses[name] = float(np.mean(seen[-len(seen) // 3 :])), float(np.mean(unseen))
    (real, fresh), (zero, blind) = losses["real"], losses["zero"]
    value = (
        f"training loss {real:.4f}, zeroed {zero:.4f}; on other samples {fresh:.4f}, zeroed"
        f" {blind:.4f}"
    )
    threshold = "lower with the inputs, on other samples too"
    if not math.isfinite(real + fresh) or abs(real - zero) <= 1e-4 * abs(zero):
        return Result(
            FAIL,
            value,
            threshold,
            "the network does not see its inputs: look for a constant or lost input",
        )
    if real < MARGIN * zero and fresh < MARGIN * blind:
        return Result(PASS, value, threshold)
    fix = (
        f"nothing that carries over in {len(batches)} small steps: see that labels belong to"
        " their inputs"
    )
    return Result(WARN, value, threshold, fix)


def _descent(
    spec: CheckSpec, model: nn.Module | None = None
) -> tuple[list[float], list[Tensor], float]:
    # Losses and outputs of steps with the stage's own optimizer on one batch whose randomness is
    # fixed, and by how much a step at the peak rate changes a weight matrix, in units of its norm:
    # the median of the matrices.
    trial, items = Trial(spec, model=model), _varied(spec)
    weights = [
        p for p in trial.model.parameters() if p.requires_grad and p.ndim > 1 and p.norm() > 0
    ]
    losses, shown, change = [], [], 0.0
    for k in range(DESCENT_STEPS):
        before = [p.detach().clone() for p in weights] if k == 4 else None
        with record_calls(trial.model) as (_, outputs):
            losses.append(trial.go(items, share=min(1.0, (k + 1) / 4), seed=spec.run.args.seed)[0])
        shown.append(
            torch.cat([spec.view.rows(output).detach().float().cpu() for output in outputs])
        )
        if before:
            moved = [
                ((p - q).norm() / q.norm()).item() for p, q in zip(weights, before, strict=True)
            ]
            change = float(np.median(moved))
        if not math.isfinite(losses[-1]):
            break
    return losses, shown, change


def loss_decreases(spec: CheckSpec) -> Result:
    """The stage's own optimizer at its peak rate lowers the loss of a batch that stays the same."""
    losses, shown, change = _descent(spec)
    picture, problem = _dynamics(spec, shown)
    first, last = losses[0], float(np.mean(losses[-3:]))
    value = f"loss {first:.4f} to {last:.4f} in {len(losses)} steps at lr {spec.settings.lr:.3g}"
    value += f", {change:.2g} of a weight a step"
    threshold = f"lower, at most {FASTEST:g} of a weight a step"
    if not math.isfinite(last):
        return Result(FAIL, value, threshold, "the loss is not finite: lower --lr", [picture])
    if not change <= FASTEST:
        return Result(
            FAIL,
            value,
            threshold,
            "a step replaces weights, it should change them: lower --lr",
            [picture],
        )
    if last > 1.02 * first or max(losses) > 3 * first:
        return Result(
            FAIL,
            value,
            threshold,
            "the loss rises: lower --lr, or give more --warmup-epochs",
            [picture],
        )
    if last > (1 - 1e-4) * first:
        return Result(
            FAIL,
            value,
            threshold,
            "the loss stays: raise --lr; look for a detached loss",
            [picture],
        )
    if problem:
        return Result(
            WARN, f"{value}; {problem}", threshold, "look at the strip of predictions", [picture]
        )
    return Result(PASS, value, threshold, pictures=[picture])


def _dynamics(spec: CheckSpec, shown: list[Tensor]) -> tuple[str, str]:
    # A strip, an item a row and a step a column: how the answers to one batch change; and what is
    # wrong with them.
    x = torch.stack([torch.nan_to_num(rows) for rows in shown])  # [steps, rows, d]
    items = _varied(spec)
    if spec.labels is None:
        a, b = nn.functional.normalize(x, dim=2)[:, : 2 * len(items)].chunk(2, 1)
        right = (1 + (a * b).sum(2)) / 2
    else:
        truth = torch.from_numpy(spec.labels[samples_of(spec, items)])
        p = (
            torch.stack([1 - x.sigmoid()[..., 0], x.sigmoid()[..., 0]], 2)
            if x.shape[2] == 1
            else x.softmax(2)
        )
        right = p.gather(2, truth.view(1, -1, 1).expand(len(x), -1, 1))[..., 0]
    strip = torch.stack([1 - right, 0.35 + 0.4 * right, right]).transpose(1, 2)
    picture = _picture(
        spec, "dynamics", strip[None].repeat_interleave(8, 2).repeat_interleave(8, 3), 1
    )
    if x.std(1).max() < 1e-5:
        return picture, "all items get the same answer"
    return picture, "the answers do not change" if torch.equal(x[0], x[-1]) else ""


def capacity(spec: CheckSpec) -> Result:
    """A larger network lowers the loss of the same batch further."""
    if not spec.larger:
        return skip("no larger network")
    (small_, *_), (large, *_) = _descent(spec), _descent(spec, spec.larger())
    a, b = float(np.mean(small_[-3:])), float(np.mean(large[-3:]))
    value = f"loss {b:.4f} after {len(large)} steps, the run's network {a:.4f}"
    if b < a:
        return Result(PASS, value, "lower")
    return Result(WARN, value, "lower", "capacity is not what limits the training loss")


def first_layer(spec: CheckSpec) -> Result:
    """The first layer's filters differ, and no layer's activations are mostly dead."""
    trial, live = Trial(spec), {}
    layers = [
        m
        for m in trial.model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.requires_grad
    ]
    filters = next(
        (m for m in trial.model.modules() if isinstance(m, nn.Conv2d)),
        layers[0] if layers else None,
    )
    hooks = []
    for name, module in trial.model.named_modules():
        if isinstance(module, ACTIVATIONS):

            def keep(_, __, out, name=name):
                spread = (
                    out.detach().float().transpose(0, 1).flatten(1).std(1)
                    if out.ndim == 4
                    else out.float().std(0)
                )
                live.setdefault(
                    f"{name} {sum(k.startswith(name + ' ') for k in live)}", (spread > 1e-6).float()
                )

            hooks.append(module.register_forward_hook(keep))
    trial.go(small(spec, 1)[0], share=0.0)
    for hook in hooks:
        hook.remove()
    weight = filters.weight.detach().float().cpu().flatten(1)
    dead = (weight.norm(dim=1) < 1e-6 * weight.norm(dim=1).max()).float().mean().item()
    alike = 1 - len(torch.unique(weight, dim=0)) / len(weight)
    pictures = []
    if isinstance(filters, nn.Conv2d) and filters.in_channels == 3:
        w = filters.weight.detach().float().cpu()[:64]
        low, high = w.amin((1, 2, 3), keepdim=True), w.amax((1, 2, 3), keepdim=True)
        pictures = [_picture(spec, "filters", (w - low) / (high - low).clamp(min=1e-9), 8)]
    shares = {name: 1 - x.mean().item() for name, x in live.items()}
    worst = max(shares, key=shares.get, default=None)
    value = f"{dead:.0%} of {len(weight)} filters dead, {alike:.0%} alike"
    value += f"; most dead activations: {shares[worst]:.0%} in {worst.split()[0]}" if worst else ""
    threshold, fix = (
        "below 50 %",
        "look at the start of the weights, the learning rate and the scale of the inputs",
    )
    share = max(dead, alike, shares[worst] if worst else 0.0)
    if share >= 0.5:
        return Result(
            FAIL if share > 0.9 or dead > 0.5 or alike > 0.5 else WARN,
            value,
            threshold,
            fix,
            pictures,
        )
    return Result(PASS, value, threshold, pictures=pictures)
