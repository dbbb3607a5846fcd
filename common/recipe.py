"""--check: the training recipe as a verdict, on exactly the data, the network, the loss and the flags of a run.

After Karpathy, A Recipe for Training Neural Networks (2019): neural networks fail silently, so each step of the recipe
is tried on a few batches with the script's own functions. ITEMS names the steps; each prints one line: PASS, WARN, FAIL
or SKIP, what was found, what would pass, what to do.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from common import data, optim, report, step
from common.config import AuditFailed, InputError, nearest
from common.run import environment, write_json
from common.verdict import FAIL, PASS, SKIP, WARN, Result, Task


def chosen(text: str) -> list[str]:
    """The items that `--check TEXT` names, in the order of ITEMS.

    Raises:
        InputError: there is no item of that name.
    """
    if text == "all":
        return list(ITEMS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ITEMS:
            raise InputError(f"--check {name}: allowed are {', '.join(ITEMS)}{nearest(name, ITEMS)}")
    return [name for name in ITEMS if name in names]


def check(run, tasks: dict[str, Task]) -> None:
    """Try the items that --check names on every stage, print a line for each; write check.json and the report.

    Args:
        tasks: by the stages' names; items about the data alone are tried once.

    Raises:
        AuditFailed: some item fails.
        InputError: an unknown item, or several processes.
    """
    if run.facts.world_size > 1:
        raise InputError("--check runs in one process: start it without torchrun or srun")
    names, found, start = chosen(run.args.check), [], time.monotonic()
    width = max(map(len, names)) + (0 if len(tasks) == 1 else max(map(len, tasks)) + 1)
    for stage, task in tasks.items():
        for name in names:
            if name in OF_DATA and task is not next(iter(tasks.values())):
                continue
            with _own_randomness(run.args.seed):
                result = ITEMS[name](task)
            shown = name if len(tasks) == 1 else f"{stage}/{name}"
            found.append({"item": shown} | dataclasses.asdict(result))
            print(f"{result.verdict:4} {shown:{width}}  {_line(result)}", flush=True)
    seconds = time.monotonic() - start
    command = environment()["command"]
    write_json(
        run.folder / "check.json",
        {"command": command, "script": run.meta["script"], "seconds": round(seconds, 1), "items": found},
    )
    report.write(run.folder)
    failed = [item["item"] for item in found if item["verdict"] == FAIL]
    counts = ", ".join(f"{sum(i['verdict'] == v for i in found)} {v}" for v in (PASS, WARN, FAIL, SKIP))
    print(f"{counts} in {seconds:.0f} s: {run.folder / 'check.json'}")
    if failed:
        raise AuditFailed(f"--check: {', '.join(failed)}")


def _line(result: Result) -> str:
    passes = f" (passes: {result.threshold})" if result.threshold else ""
    return f"{result.value}{passes}" + (f". {result.fix}" if result.fix else "")


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    # An item chosen alone finds what it finds among the others.
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[tuple[list[tuple], list]]:
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

    `rate` None is the stage's optimiser; a number is AdamW at that rate, which fits where the stage's own is slow.
    """

    def __init__(self, task: Task, rate: float | None = None, model: nn.Module | None = None):
        self.task, self.model = task, (task.build() if model is None else model).train()
        parts = [self.model]
        own = task.optimizer or (lambda model: optim.of_stage(task.stage, [model]))
        self.optimizer = own(self.model) if rate is None else _adam(parts, rate)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = step.scaler(task.run.args.precision, task.run.facts.device)

    def go(self, items: np.ndarray, epoch: int = 0, share: float = 1.0, seed: int | None = None) -> tuple[float, float]:
        """(loss, gradient norm) of a step at a share of the peak rates; 0 changes no weight."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        if seed is not None:
            torch.manual_seed(seed)
        loss, norm, *_ = self.task.step(self.model, self.optimizer, self.scaler, items, epoch)
        return loss.item(), norm.item()


def _adam(parts: list[nn.Module], rate: float) -> torch.optim.Optimizer:
    return optim.build_optimizer("adamw", optim.param_groups(parts, 0.0), lr=rate)


def epoch_batches(task: Task, epoch: int) -> list[np.ndarray]:
    """The batches of an epoch, as training takes them."""
    if task.batches:
        return task.batches(epoch)
    return data.epoch_batches(task.train, task.stage.bs, task.run.args.seed, epoch)


def small(task: Task, count: int, epoch: int = 0) -> list[np.ndarray]:
    """The first `count` small batches of an epoch; they repeat where the epoch has fewer."""
    cut = []
    for batch in epoch_batches(task, epoch):
        size = min(task.size, len(batch))
        cut += [batch[i : i + size] for i in range(0, len(batch) - size + 1, size)]
        if len(cut) >= count:
            break
    return [cut[i % len(cut)] for i in range(count)]


def samples_of(task: Task, items: np.ndarray) -> np.ndarray:
    """The samples that items are drawn from."""
    return items % len(task.run.data)


def seed(task: Task) -> Result:
    """Three steps twice are equal to the last bit, and epochs, samples and views draw augmentations of their own."""
    runs = []
    for _ in range(2):
        trial = Trial(task)
        losses = [trial.go(items)[0] for items in small(task, 3)]
        runs.append((losses, {name: tensor.clone() for name, tensor in trial.model.state_dict().items()}))
    (first, a), (second, b) = runs
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    if first != second or differ:
        return Result(
            FAIL,
            f"3 steps twice gave losses {_numbers(first)} and {_numbers(second)}, {len(differ)} tensors differ",
            "equal bits",
            "something draws from a generator that --seed does not set, such as numpy's or the augmentation's own",
        )
    order = [np.concatenate(epoch_batches(task, epoch)) for epoch in (0, 0, 1)]
    if not np.array_equal(order[0], order[1]):
        return Result(FAIL, "epoch 1 twice has two orders", "one order", "make the order a function of (seed, epoch)")
    if len(order[0]) > 2 and np.array_equal(order[0], order[2]):
        return Result(FAIL, "epochs 1 and 2 have one order", "two orders", "make the order a function of (seed, epoch)")
    if not task.varies:
        return Result(PASS, "3 steps twice are equal; no augmentation", "equal bits")
    trial, items = Trial(task), np.unique(small(task, 1)[0])
    rows = task.run.data
    task.run.data = _Twins(rows)
    try:
        seen = []
        for epoch in (0, 1, 0):
            with watched(trial.model) as (calls, _):
                trial.go(items, epoch, share=0.0)
            seen.append(task.seen(calls, len(items)).float())
    finally:
        task.run.data = rows
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
    # A data set all of whose samples in a batch look like the first: what then differs is the augmentation.
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


def gradient(task: Task) -> Result:
    """A step's gradient is that of its batch alone: at rate 0 the same step again has the same one."""
    trial, items, own = Trial(task), small(task, 1)[0], task.run.args.seed
    (_, first), (_, again) = (trial.go(items, share=0.0, seed=own) for _ in range(2))
    value = f"gradient norm {first:.6g}, of the same step again {again:.6g}"
    if not math.isfinite(first) or not first > 0:
        return Result(
            FAIL, value, "finite and positive", "nothing trains: look for a detached loss or a frozen network"
        )
    if abs(again - first) > 1e-3 * first:
        return Result(FAIL, value, "equal", "gradients add up from step to step: call zero_grad before backward")
    return Result(PASS, value, "equal")


def loss_at_init(task: Task) -> Result:
    """The untrained network's loss is what a guess costs."""
    trial = Trial(task)
    loss = float(np.mean([trial.go(items, share=0.0)[0] for items in small(task, 3)]))
    low, high = task.chance
    value, threshold = f"{loss:.4f}", f"{low:.4f} to {high:.4f}"
    if low <= loss <= high:
        return Result(PASS, value, threshold)
    why = "more than a guess costs: look at the reduction, the scale of the logits and the last layer's start"
    if loss < low:
        why = "less than a guess costs: look at the reduction, and for the answer among the inputs"
    return Result(FAIL, value, threshold, why)


ITEMS = {
    "seed": seed,
    "gradient": gradient,
    "loss-at-init": loss_at_init,
}
# Items about the data alone, tried once however many stages a run has.
OF_DATA: set[str] = set()
