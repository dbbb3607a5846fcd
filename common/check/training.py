"""The items of --check that train a network for some steps and judge by its loss."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from common import metrics
from common.check.result import FAIL, PASS, WARN, CheckSpec, Result, skip
from common.check.trial import (
    NOTHING_HELD_OUT,
    Trial,
    record_calls,
    samples_of,
    save_images,
    small_batches,
    varied_batch,
)

OVERFIT_STEPS = 100  # at most
LEARNED = 0.3  # the share of the first loss that counts as learned
BASELINE_STEPS = 24
MARGIN = 0.97  # the loss with inputs is to be lower than this share of that without
DESCENT_STEPS = 16
FASTEST = 0.05  # of a weight a step; 0.001 is usual


def overfit(spec: CheckSpec) -> Result:
    """A small batch, its augmentation fixed, overfits."""
    trial = Trial(spec, 1e-3)
    items = varied_batch(spec)
    losses = []
    passed = False
    for k in range(OVERFIT_STEPS):
        with record_calls(trial.model) as (_, outputs):
            loss, _ = trial.go(items, seed=spec.run.args.seed + k)
        losses.append(loss)
        right, answers = _answers(spec, [spec.view.rows(output) for output in outputs], items)
        passed = right == 1 and (spec.labels is None or loss <= LEARNED * losses[0])
        if passed or not math.isfinite(loss):
            break
    value = (
        f"{right:.0%} right, loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"
        f" on {len(items)} items"
    )
    threshold = "100 %"
    if spec.labels is not None:
        threshold += f", loss below {LEARNED:.0%} of the first"
    rows = [["truth", "prediction"], *answers] if answers else []
    if passed:
        return Result(PASS, value, threshold, rows=rows)
    fix = (
        "what cannot overfit a few items has a bug in its loss, its labels or its gradient, or no"
        " capacity"
    )
    return Result(FAIL, value, threshold, fix, rows=rows)


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
    batches = small_batches(spec, BASELINE_STEPS)
    size = spec.view.size
    others = spec.held_out[: 4 * size]
    held_out = [others[i : i + size] for i in range(0, len(others) - size + 1, size)] or [others]

    def final_losses(zeroed: bool) -> tuple[float, float]:
        # The mean loss of the last third of the steps, and that on held-out samples.
        trial = Trial(spec, 1e-3)
        if zeroed:
            trial.model.register_forward_pre_hook(_zero_call)
        seen = [trial.go(items, epoch=k, seed=k)[0] for k, items in enumerate(batches)]
        unseen = [trial.go(items, epoch=0, share=0.0, seed=0)[0] for items in held_out]
        return float(np.mean(seen[-len(seen) // 3 :])), float(np.mean(unseen))

    real, real_held_out = final_losses(zeroed=False)
    zero, zero_held_out = final_losses(zeroed=True)
    value = (
        f"training loss {real:.4f}, zeroed {zero:.4f};"
        f" on other samples {real_held_out:.4f}, zeroed {zero_held_out:.4f}"
    )
    threshold = "lower with the inputs, on other samples too"
    if not math.isfinite(real + real_held_out) or abs(real - zero) <= 1e-4 * abs(zero):
        fix = "the network does not see its inputs: look for a constant or lost input"
        return Result(FAIL, value, threshold, fix)
    if real < MARGIN * zero and real_held_out < MARGIN * zero_held_out:
        return Result(PASS, value, threshold)
    fix = f"{len(batches)} small steps learned nothing that carries over, as on any hard task"
    if spec.labels is not None:
        fix += "; if longer runs do not either, see that labels belong to their inputs"
    return Result(WARN, value, threshold, fix)


def _zero_call(_, call: tuple) -> tuple:
    x = call[0]
    if isinstance(x, dict):
        zeros = {name: torch.zeros_like(part) for name, part in x.items()}
    else:
        zeros = torch.zeros_like(x)
    return (zeros, *call[1:])


def _descent(
    spec: CheckSpec, model: nn.Module | None = None
) -> tuple[list[float], list[Tensor], float]:
    # Losses and outputs of steps with the stage's own optimizer on one batch whose randomness is
    # fixed, and by how much a step at the peak rate changes a weight matrix, in units of its norm:
    # the median of the matrices.
    trial = Trial(spec, model=model)
    items = varied_batch(spec)
    weights = [
        p for p in trial.model.parameters() if p.requires_grad and p.ndim > 1 and p.norm() > 0
    ]
    losses = []
    shown = []
    change = 0.0
    for k in range(DESCENT_STEPS):
        earlier = [p.detach().clone() for p in weights] if k == 4 else None
        with record_calls(trial.model) as (_, outputs):
            loss, _ = trial.go(items, share=min(1.0, (k + 1) / 4), seed=spec.run.args.seed)
        losses.append(loss)
        rows = [spec.view.rows(output).detach().float().cpu() for output in outputs]
        shown.append(torch.cat(rows))
        if earlier:
            pairs = zip(weights, earlier, strict=True)
            change = float(np.median([((p - q).norm() / q.norm()).item() for p, q in pairs]))
        if not math.isfinite(loss):
            break
    return losses, shown, change


def loss_decreases(spec: CheckSpec) -> Result:
    """The stage's own optimizer at its peak rate lowers the loss of a batch that stays the same."""
    losses, shown, change = _descent(spec)
    picture, problem = _dynamics(spec, shown)
    first = losses[0]
    last = float(np.mean(losses[-3:]))
    value = (
        f"loss {first:.4f} to {last:.4f} in {len(losses)} steps at lr {spec.settings.lr:.3g},"
        f" {change:.2g} of a weight a step"
    )
    status = FAIL
    if not math.isfinite(last):
        fix = "the loss is not finite: lower --lr"
    elif not change <= FASTEST:
        fix = "a step replaces weights, it should change them: lower --lr"
    elif last > 1.02 * first or max(losses) > 3 * first:
        fix = "the loss rises: lower --lr, or give more --warmup-epochs"
    elif last > (1 - 1e-4) * first:
        fix = "the loss stays: raise --lr; look for a detached loss"
    elif problem:
        status = WARN
        value = f"{value}; {problem}"
        fix = "look at the strip of predictions"
    else:
        status = PASS
        fix = ""
    threshold = f"lower, at most {FASTEST:g} of a weight a step"
    return Result(status, value, threshold, fix, [picture])


def _dynamics(spec: CheckSpec, shown: list[Tensor]) -> tuple[str, str]:
    # A strip, an item a row and a step a column: how the answers to one batch change; and what is
    # wrong with them.
    x = torch.stack([torch.nan_to_num(rows) for rows in shown])  # [steps, rows, d]
    items = varied_batch(spec)
    if spec.labels is None:
        a, b = nn.functional.normalize(x, dim=2)[:, : 2 * len(items)].chunk(2, 1)
        right = (1 + (a * b).sum(2)) / 2
    else:
        truth = torch.from_numpy(spec.labels[samples_of(spec, items)])
        if x.shape[2] == 1:
            share = x.sigmoid()[..., 0]
            p = torch.stack([1 - share, share], 2)
        else:
            p = x.softmax(2)
        right = p.gather(2, truth.view(1, -1, 1).expand(len(x), -1, 1))[..., 0]
    strip = torch.stack([1 - right, 0.35 + 0.4 * right, right]).transpose(1, 2)
    enlarged = strip[None].repeat_interleave(8, 2).repeat_interleave(8, 3)
    picture = save_images(spec, "dynamics", enlarged, 1)
    if x.std(1).max() < 1e-5:
        return picture, "all items get the same answer"
    return picture, "the answers do not change" if torch.equal(x[0], x[-1]) else ""


def capacity(spec: CheckSpec) -> Result:
    """A larger network lowers the loss of the same batch further."""
    if not spec.larger:
        return skip("no larger network")
    losses, *_ = _descent(spec)
    last = float(np.mean(losses[-3:]))
    if last <= LEARNED * losses[0]:
        return skip(f"the run's own network fits the batch, loss {losses[0]:.3g} to {last:.3g}")
    larger_losses, *_ = _descent(spec, spec.larger())
    larger_last = float(np.mean(larger_losses[-3:]))
    value = f"loss {larger_last:.4f} after {len(larger_losses)} steps, the run's network {last:.4f}"
    if larger_last < last:
        return Result(PASS, value, "lower")
    return Result(WARN, value, "lower", "capacity is not what limits the training loss")
