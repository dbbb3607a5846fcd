"""The items of --check about the network: what enters it, what leaves it, what its steps move."""

import contextlib
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from common.check import audit
from common.check.result import FAIL, PASS, WARN, CheckSpec, Result, skip
from common.check.trial import (
    NOTHING_HELD_OUT,
    Trial,
    class_shares,
    epoch_batches,
    evaluation_samples,
    is_binary,
    max_difference,
    record_calls,
    samples_of,
    save_images,
    small_batches,
    typical_batches,
)
from common.data import augment
from common.errors import plural

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish)


def seed(spec: CheckSpec) -> Result:
    """Three steps twice are equal to the last bit, and augmentations are drawn as they should be.

    That is: epochs, samples and views have their own, the same ones every time.
    """
    failure = _steps_repeat(spec) or _orders_repeat(spec)
    if failure:
        return failure
    if not spec.augmented:
        return Result(PASS, "3 steps twice are equal; no augmentation", "equal bits")
    wrong = _augmentation_faults(spec)
    if wrong:
        fix = "draw augmentations from (seed, epoch, sample, view)"
        return Result(FAIL, f"augmentation: {', '.join(wrong)}", "all differ, repeatably", fix)
    return Result(PASS, "3 steps twice are equal; epochs, samples and views differ", "equal bits")


def _steps_repeat(spec: CheckSpec) -> Result | None:
    runs = []
    for _ in range(2):
        trial = Trial(spec)
        losses = [trial.go(items)[0] for items in small_batches(spec, 3)]
        weights = {name: tensor.clone() for name, tensor in trial.model.state_dict().items()}
        runs.append((losses, weights))
    (first, a), (second, b) = runs
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    if first == second and not differ:
        return None
    value = (
        f"3 steps twice gave losses {_numbers(first)} and {_numbers(second)}, {len(differ)} tensors"
        " differ"
    )
    fix = (
        "something draws from a generator that --seed does not set, such as numpy's or the"
        " augmentation's own"
    )
    return Result(FAIL, value, "equal bits", fix)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _orders_repeat(spec: CheckSpec) -> Result | None:
    first, again, second = (np.concatenate(epoch_batches(spec, epoch)) for epoch in (0, 0, 1))
    fix = "make the order a function of (seed, epoch)"
    if not np.array_equal(first, again):
        return Result(FAIL, "epoch 1 twice has two orders", "one order", fix)
    if len(first) > 2 and np.array_equal(first, second):
        return Result(FAIL, "epochs 1 and 2 have one order", "two orders", fix)
    return None


def _augmentation_faults(spec: CheckSpec) -> list[str]:
    trial = Trial(spec)
    items = np.unique(small_batches(spec, 1)[0])
    data = spec.run.data
    spec.run.data = _OneLook(data)
    try:
        seen = []
        for epoch in (0, 1, 0):
            with record_calls(trial.model) as (calls, _):
                trial.go(items, epoch, share=0.0)
            seen.append(spec.view.augmented_part(calls, len(items)).float())
    finally:
        spec.run.data = data
    x, other_epoch, again = seen
    flat = x.flatten(1).cpu()
    faults = {
        "two times of one epoch differ": not torch.equal(x, again),
        "two epochs are alike": torch.equal(x, other_epoch),
        "samples are alike": len(flat) > 3 and bool((flat == flat[0]).all()),
        "views are alike": x.shape[1] > 1 and torch.equal(x[:, 0], x[:, 1]),
    }
    return [fault for fault, is_there in faults.items() if is_there]


class _OneLook:
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


def inputs(spec: CheckSpec) -> Result:
    """What enters the network, recorded just before it.

    Evaluation's input must be the stored pixels, training's be like it.
    """
    model = spec.build()
    trial = Trial(spec)
    samples = evaluation_samples(spec)[: 2 * spec.view.size]
    with record_calls(trial.model) as (calls, _):
        trial.go(small_batches(spec, 1)[0], share=0.0)
    with record_calls(model) as (eval_calls, _):
        spec.evaluate(model, samples)
    if isinstance(calls[0][0], dict) or calls[0][0].ndim < 4:
        return _features_in(calls[0])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in spec.view.normalization)
    entered = torch.cat([_images(call) for call in calls])
    eval_entered = torch.cat([_images(call) for call in eval_calls])
    train = entered * std + mean
    test = eval_entered * std + mean
    pictures = [save_images(spec, "inputs", train[:32], 8)]
    rows = [["channel", "training mean", "deviation", "evaluation mean", "deviation"]]
    for c, name in enumerate(("red", "green", "blue")):
        row = [name]
        for x in (entered, eval_entered):
            row += [f"{x[:, c].mean().item():.3f}", f"{x[:, c].std().item():.3f}"]
        rows.append(row)
    value = ", ".join(f"{row[0]} {float(row[1]):.2f} ± {float(row[2]):.2f}" for row in rows[1:])
    problems = []
    if not entered.isfinite().all() or not eval_entered.isfinite().all():
        problems.append("values are not finite")
    elif _are_alike(train):
        problems.append("all images are alike or empty")
    elif train.min() < -0.05 or train.max() > 1.05:
        problems.append(
            f"de-normalized pixels lie in {train.min():.2f} to {train.max():.2f}, not in 0 to 1"
        )
    stored = spec.view.stored_pixels(samples).to(torch.uint8)
    raw = augment.resize(stored, test.shape[-1]).float().cpu()
    away = (raw - test).abs().mean().item() if raw.shape == test.shape else math.inf
    if not away < 0.02:
        problems.append(f"evaluation reads images that are {away:.3f} away from the stored ones")
    # Strong color distortion of images with little contrast alone can do that: no proof.
    spread = (train.std() / raw.std().clamp(min=1e-6)).item()
    status = FAIL if problems else WARN
    if not 0.4 < spread < 2.5:
        problems.append(f"training's deviation is {spread:.2f} times the stored images'")
    if problems:
        fix = (
            "look at the picture: check the division by 255, the mean and deviation, how strong the"
            " augmentation is for images of little contrast, and what augments evaluation"
        )
        threshold = "0 to 1; evaluation as stored"
        return Result(status, "; ".join(problems), threshold, fix, pictures, rows)
    return Result(PASS, value, "evaluation as stored, training in 0 to 1", "", pictures, rows)


def views(spec: CheckSpec) -> Result:
    """A few items as they are stored, below each its views, and what was drawn for these."""
    if spec.views is None or not spec.augmented:
        return skip("there is no augmentation whose draws could be shown")
    items = small_batches(spec, 1)[0][:8]
    (batch,) = spec.fetch([items], 0)
    trial = Trial(spec)
    with record_calls(trial.model) as (calls, _):
        trial.go(items, share=0.0)
    mean, std = spec.view.normalization
    seen = torch.cat([augment.denormalize(_images(call), mean, std) for call in calls])
    stored = augment.resize(batch.inputs, seen.shape[-1]).cpu()
    drawn = spec.views(batch)
    height, width = batch.inputs.shape[-2:]
    crops = [params.boxes[:, 2:].prod(1) / (height * width) for params in drawn]
    rows = [["view", "image", "crop", "mirrored, turned", "color", "blur", "stains"]]
    for number, (params, shares) in enumerate(zip(drawn, crops, strict=True), 1):
        for image, (words, share) in enumerate(zip(params.in_words(), shares, strict=True), 1):
            rows.append([str(number), str(image), f"{share:.0%}", *words])
    value = (
        f"{plural(len(items), 'image')}, {plural(len(drawn), 'view')} of each, crops of"
        f" {np.min(crops):.0%} to {np.max(crops):.0%}"
    )
    picture = save_images(spec, "views", torch.cat([stored, seen]), len(items))
    return Result(PASS, value, "", "", [picture], rows)


def _images(call: tuple) -> Tensor:
    # What entered the network as (m, 3, h, w), whatever stands before the channels.
    x = call[0].float().cpu()
    return x.flatten(0, x.ndim - 4)


def _are_alike(images: Tensor) -> bool:
    if images.flatten(1).std(1).max() < 0.01:
        return True
    return len(images) > 1 and bool((images - images[:1]).abs().max() < 0.01)


def _features_in(call: tuple) -> Result:
    parts = call[0] if isinstance(call[0], dict) else {"features": call[0]}
    rows = [["input", "mean", "deviation", "constant columns"]]
    problems = []
    for name, x in parts.items():
        x = x.detach().float().cpu().flatten(0, -2)
        constant = (x.std(0) < 1e-6).float().mean().item()
        rows.append([name, f"{x.mean().item():.3f}", f"{x.std().item():.3f}", f"{constant:.0%}"])
        if not x.isfinite().all():
            problems.append(f"{name}: values are not finite")
        elif constant > 0.5:
            problems.append(f"{name}: {constant:.0%} of the columns are the same for all samples")
        elif x.std() > 1e3 or x.std() < 1e-4:
            problems.append(f"{name}: deviation {x.std().item():.2g}")
    if problems:
        fix = "fix the data or their reading"
        return Result(FAIL, "; ".join(problems), "finite, varied", fix, rows=rows)
    value = "; ".join(f"{row[0]} {row[1]} ± {row[2]}" for row in rows[1:])
    return Result(PASS, value, "finite, varied", rows=rows)


def eval_invariance(spec: CheckSpec) -> Result:
    """Evaluation gives a row for each sample, whatever the order and the company.

    And it leaves the network as it is.
    """
    if not len(spec.held_out):
        return skip(NOTHING_HELD_OUT)
    model = spec.build()
    few = spec.held_out[:8]
    many = spec.held_out[: max(len(few), spec.view.eval_batch) + 2]  # in more than one piece
    trial = Trial(spec, model=model)
    # Fresh running statistics would hide a network that is left in training mode.
    trial.go(small_batches(spec, 1)[0])
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    problems = []
    rows_of_many = spec.evaluate(model, many)
    if len(rows_of_many) != len(many):
        problems.append(f"{len(rows_of_many)} rows for {len(many)} samples")
    model.train()
    rows = spec.evaluate(model, few)
    tolerance = 1e-3 * (rows.abs().max().item() + 1e-6)

    def differs(a: Tensor, b: Tensor) -> bool:
        return max_difference(a, b) > tolerance

    if not rows.isfinite().all():
        problems.append("rows are not finite")
    elif not torch.equal(rows, spec.evaluate(model, few)):
        problems.append("twice the same samples give other rows")
    elif differs(rows, spec.evaluate(model, few[::-1].copy()).flip(0)):
        problems.append("another order gives other rows")
    elif len(few) > 2 and differs(rows[:2], spec.evaluate(model, few[:2])):
        problems.append("a row depends on the other samples of its batch")
    elif len(rows_of_many) == len(many) and differs(rows, rows_of_many[: len(few)]):
        problems.append("a row depends on how many samples there are")
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, stored[name]):
            problems.append(f"evaluation changes {name}")
            break
    problems += _split_faults(spec)
    threshold = "one row a sample, the same in any order"
    if problems:
        fix = (
            "evaluate whole splits, in evaluation mode, without augmentation; keep the splits apart"
        )
        return Result(FAIL, "; ".join(problems), threshold, fix)
    value = f"{len(many)} of {len(spec.held_out)} samples, a row each"
    return Result(PASS, value, threshold)


def _split_faults(spec: CheckSpec) -> list[str]:
    # An epoch goes through the training split, once each unless classes are drawn by weight, and
    # through nothing else.
    problems = []
    train = samples_of(spec, spec.train)
    drawn = samples_of(spec, np.concatenate(epoch_batches(spec, 0)))
    shared = np.intersect1d(train, spec.held_out)
    if len(shared):
        problems.append(f"{len(shared)} samples are in training and in evaluation")
    strange = np.setdiff1d(drawn, train)
    if len(strange):
        problems.append(f"an epoch trains on {len(strange)} samples of other splits")
    num_distinct = len(np.unique(drawn))
    missed = len(train) - num_distinct
    repeated = len(drawn) - num_distinct
    if repeated and not spec.batches:
        problems.append(f"an epoch draws {repeated} samples again")
    elif not repeated and missed > len(train) % spec.settings.bs:
        problems.append(f"an epoch leaves out {missed} of {len(train)} samples")
    if max(np.max(train), np.max(drawn), spec.held_out[0]) >= len(spec.run.data):
        problems.append("indices beyond the data")
    return problems


def loss_at_init(spec: CheckSpec) -> Result:
    """The untrained network's loss is what its outputs cost, and these are near to a guess.

    The cost is computed a second time, see `CheckSpec.loss`.
    """
    trial = Trial(spec)
    head = None if spec.labels is None else spec.view.head(trial.model)
    costs = []
    sizes = []
    follows = 0.0
    for items in typical_batches(spec, 3):
        of_head = record_calls(head) if head else contextlib.nullcontext(([], []))
        with record_calls(trial.model) as (_, outputs), of_head as (features, logits):
            loss, _ = trial.go(items, share=0.0)
        rows = _float64(spec.view.rows(output) for output in outputs)
        labels = None if spec.labels is None else spec.labels[samples_of(spec, items)]
        guess = _guess(spec, rows)
        costs.append([loss, *(spec.loss(x, labels, trial.model) for x in (rows, guess))])
        if logits:
            follows = max(follows, np.abs(rows - _float64(logits)).max())
            # What such weights give on such features: one draw of few classes says less.
            features = np.square(_float64(x for (x,) in features)).sum(1).mean()
            sizes.append(features * head.weight.detach().float().square().mean().item())
        else:
            off = rows - guess
            sizes.append(np.square(off - off.mean(1, keepdims=True)).mean())
    loss, exact, guess = np.mean(costs, 0)
    value = f"{loss:.4f}; a guess costs {guess:.4f}"
    threshold = f"{exact:.4f}, the cost of the same outputs by the formula"
    size = 0.0
    largest = math.inf
    if spec.labels is None:
        value = f"{loss:.4f}; equal embeddings cost {guess:.4f}"
    else:
        size = math.sqrt(np.mean(sizes))
        largest = spec.view.largest_logits(trial.model)
        value += f"; logits ±{size:.2g}"
        threshold += f"; logits up to ±{largest:.2g}"
    if not all(abs(x - y) <= 1e-3 * abs(y) for x, y, _ in costs):
        fix = (
            "look at the reduction, the temperature or scale, the weights, a softmax too many, and"
            " whether labels and outputs are in one order"
        )
    elif follows:
        value += f"; outputs are up to {follows:.2g} away from the last layer's"
        fix = "take the last layer's output as it is: the loss expects logits"
    elif not size <= largest:
        fix = "it starts sure of its answers: look at the scale of features and last layer"
    else:
        return Result(PASS, value, threshold)
    return Result(FAIL, value, threshold, fix)


def _float64(parts: Iterable[Tensor]) -> np.ndarray:
    return torch.cat([part.detach().cpu().double() for part in parts]).numpy()


def _guess(spec: CheckSpec, rows: np.ndarray) -> np.ndarray:
    # The outputs of a network that does not look at its inputs.
    if spec.labels is None:
        return np.ones_like(rows)
    if not spec.starts_at_prior:
        return np.zeros_like(rows)
    logs = np.log(class_shares(spec).clip(1e-9))
    return np.broadcast_to(logs if rows.shape[1] > 1 else logs[1:] - logs[:1], rows.shape)


def head_bias(spec: CheckSpec) -> Result:
    """The untrained network predicts the classes' shares: its last bias holds them."""
    if spec.labels is None:
        return skip("this stage trains without classes")
    model = spec.build()
    head = spec.view.head(model)
    if head is None or head.bias is None:
        return skip("the last layer has no bias")
    logits = spec.evaluate(model, samples_of(spec, spec.train)[:64]).float().flatten(1)
    if is_binary(spec, model):
        share = logits.sigmoid().mean().item()
        mean = torch.tensor([1 - share, share])
    else:
        mean = logits.softmax(1).mean(0)
    prior = torch.from_numpy(class_shares(spec)).float().clamp(min=1e-6)
    kl = (prior * (prior / mean.clamp(min=1e-9)).log()).sum().item()
    rows = [["class", "share", "predicted"]]
    for name, p, q in zip(spec.classes, prior.tolist(), mean.tolist(), strict=True):
        rows.append([name, f"{p:.3f}", f"{q:.3f}"])
    farthest = int((prior - mean).abs().argmax())
    value = (
        f"KL {kl:.4f} from the classes' shares as drawn, most in {spec.classes[farthest]}: share"
        f" {prior[farthest]:.3f}, predicted {mean[farthest]:.3f}"
    )
    threshold = "at most 0.1, fails above 1"
    if kl <= 0.1:
        return Result(PASS, value, threshold, rows=rows)
    status = FAIL if kl > 1 or not math.isfinite(kl) else WARN
    fix = "--head-bias prior starts the last layer at the classes' shares"
    return Result(status, value, threshold, fix, rows=rows)


def gradient(spec: CheckSpec) -> Result:
    """A step's gradient is that of its batch alone: at rate 0 the same step has the same one."""
    trial = Trial(spec)
    items = small_batches(spec, 1)[0]
    _, first = trial.go(items, share=0.0, seed=spec.run.args.seed)
    _, again = trial.go(items, share=0.0, seed=spec.run.args.seed)
    value = f"gradient norm {first:.6g}, of the same step again {again:.6g}"
    if not math.isfinite(first) or not first > 0:
        fix = "nothing trains: look for a detached loss or a frozen network"
        return Result(FAIL, value, "finite and positive", fix)
    if abs(again - first) > 1e-3 * first:
        fix = "gradients add up from step to step: call zero_grad before backward"
        return Result(FAIL, value, "equal", fix)
    return Result(PASS, value, "equal")


def trainable(spec: CheckSpec) -> Result:
    """Every parameter that should train is in one optimizer group, gets a gradient and moves.

    Nothing else does. Three steps at the peak rates.
    """
    trial = Trial(spec)
    model = trial.model
    is_frozen = getattr(model, "is_frozen", None)  # what the flags freeze, where they can
    parameters = dict(model.named_parameters())
    problems = audit.check_groups(model, trial.optimizer)
    for name, p in parameters.items():
        if not p.requires_grad and not (is_frozen and is_frozen(name)):
            problems.append(f"{name} is frozen by no flag")
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    has_gradient = dict.fromkeys(parameters, False)
    for items in small_batches(spec, 3):
        trial.go(items)
        for name, p in parameters.items():
            has_gradient[name] |= p.grad is not None and bool((p.grad != 0).any())
    moved = {name: not torch.equal(initial[name], p.detach()) for name, p in parameters.items()}
    for name, p in parameters.items():
        if p.requires_grad and not has_gradient[name]:
            problems.append(f"{name} gets no gradient")
        elif not p.requires_grad and moved[name]:
            problems.append(f"{name} is frozen and moved")
    trained = [name for name, p in parameters.items() if p.requires_grad]
    if not any(moved[name] for name in trained):
        problems.append("no parameter moves: the learning rate is 0 or far too small")
    if spec.audit:
        problems += spec.audit(spec.build())
    threshold = "all that should"
    if not problems:
        value = f"{len(trained)} of {len(parameters)} tensors train"
        if len(trained) < len(parameters):
            value += "; flags freeze the others"
        return Result(PASS, value, threshold)
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    fix = (
        "look for a detach, a no_grad, a loss of weight 0, or parameters that the optimizer was"
        " not given"
    )
    return Result(FAIL, "; ".join(problems[:4]) + more, threshold, fix)


def leakage(spec: CheckSpec) -> Result:
    """By backprop: the output of a sample depends on that sample alone, and on all of its parts."""
    model = spec.build()
    with record_calls(model) as (calls, _):
        spec.evaluate(model, evaluation_samples(spec)[:3])
    model.eval()
    view = spec.view
    call = calls[0]
    xs = [x.detach().clone().requires_grad_() for x in view.entry(model, call)]
    rows = view.outputs(model, call, xs).float().flatten(1)
    padding = view.padding(call) or [None] * len(xs)
    problems = []
    for i in range(min(len(rows), 3)):
        grads = torch.autograd.grad(rows[i].sum(), xs, retain_graph=True, allow_unused=True)
        for k, (grad, mask) in enumerate(zip(grads, padding, strict=True)):
            if grad is None:
                problems.append(f"outputs do not depend on input {k + 1}")
                continue
            of_input = f" of input {k + 1}" if len(xs) > 1 else ""
            if mask is not None and grad[mask].abs().sum() > 0:
                problems.append(f"output {i + 1} depends on padding{of_input}")
            reach = grad.reshape(len(rows), view.parts, -1).abs().sum(2) > 0
            if reach[[j for j in range(len(rows)) if j != i]].any():
                problems.append(f"output {i + 1} depends on other samples{of_input}")
            if not reach[i].all():
                part = "its sample"
                if view.parts > 1:
                    part = f"parts {(~reach[i]).nonzero()[:, 0].tolist()} of {view.parts}"
                problems.append(f"output {i + 1} does not depend on {part}{of_input}")
    frames = None
    if isinstance(call[0], Tensor):
        x = call[0].detach().clone().requires_grad_()
        frames = view.causal(model, x)
    if frames is not None:
        for t in range(frames.shape[1] - 1):
            (grad,) = torch.autograd.grad(frames[0, t].sum(), x, retain_graph=True)
            if grad.reshape(len(frames), view.parts, -1)[0, t + 1 :].abs().sum() > 0:
                problems.append(f"frame {t + 1} depends on later frames")
                break
    threshold = "its own sample alone"
    if view.parts > 1:
        threshold = f"its own sample, all {view.parts} parts"
    if problems:
        fix = (
            "look for a view or reshape where permute or transpose is meant, and for what mixes"
            " a batch in evaluation"
        )
        distinct = list(dict.fromkeys(problems))
        return Result(FAIL, "; ".join(distinct[:4]), threshold, fix)
    past = "" if frames is None else "; frames depend on the past alone"
    value = f"outputs of {len(rows)} rows reach their own samples{past}"
    return Result(PASS, value, threshold)


def first_layer(spec: CheckSpec) -> Result:
    """The first layer's filters differ, and no layer's activations are mostly dead."""
    trial = Trial(spec)
    modules = list(trial.model.modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    linear = [m for m in modules if isinstance(m, nn.Linear) and m.weight.requires_grad]
    first = (convolutions or linear)[0]
    dead_activations = _dead_activations(trial, small_batches(spec, 1)[0])
    weight = first.weight.detach().float().cpu()
    filters = weight.flatten(1)
    norms = filters.norm(dim=1)
    dead = (norms < 1e-6 * norms.max()).float().mean().item()
    alike = 1 - len(torch.unique(filters, dim=0)) / len(filters)
    pictures = []
    if isinstance(first, nn.Conv2d) and first.in_channels == 3:
        shown = weight[:64]
        low = shown.amin((1, 2, 3), keepdim=True)
        high = shown.amax((1, 2, 3), keepdim=True)
        scaled = (shown - low) / (high - low).clamp(min=1e-9)
        pictures = [save_images(spec, "filters", scaled, 8)]
    value = f"{dead:.0%} of {len(filters)} filters dead, {alike:.0%} alike"
    share = max(dead, alike)
    if dead_activations:
        layer, most = max(dead_activations, key=lambda entry: entry[1])
        value += f"; dead activations: {most:.0%} in {layer}" if most else "; no dead activation"
        share = max(share, most)
    threshold = "below 50 %"
    if share < 0.5:
        return Result(PASS, value, threshold, pictures=pictures)
    status = FAIL if share > 0.9 or dead > 0.5 or alike > 0.5 else WARN
    fix = "look at the start of the weights, the learning rate and the scale of the inputs"
    return Result(status, value, threshold, fix, pictures)


def _dead_activations(trial: Trial, items: np.ndarray) -> list[tuple[str, float]]:
    # (layer, the share of its channels that do not vary) of every call of an activation in a step.
    shares = []

    def hook_of(name: str):
        def hook(module, args, out):
            if out.ndim == 4:
                spread = out.detach().float().transpose(0, 1).flatten(1).std(1)
            else:
                spread = out.float().std(0)
            shares.append((name, 1 - (spread > 1e-6).float().mean().item()))

        return hook

    hooks = [
        module.register_forward_hook(hook_of(name))
        for name, module in trial.model.named_modules()
        if isinstance(module, ACTIVATIONS)
    ]
    trial.go(items, share=0.0)
    for hook in hooks:
        hook.remove()
    return shares
