"""--check: tries ITEMS on exactly the data, the network, the loss and the flags of a run.

After Karpathy, A Recipe for Training Neural Networks (2019): neural networks fail silently, so each
of its steps is tried on a few batches with the script's own functions. Each item prints one line:
PASS, WARN, FAIL or SKIP, what was found, what would pass, what to do. Those that FAIL or WARN are
said once more at the end.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import torch

from common.check import data, human, model, training
from common.check.result import FAIL, PASS, SKIP, WARN, CheckSpec, Result, skip
from common.errors import AuditFailed, InputError, did_you_mean, only_warn, say
from common.report import page
from common.run.directory import card_record, environment
from common.run.files import write_json
from common.run.run import Run


def chosen_items(text: str) -> list[str]:
    """The items that `--check TEXT` names, in the order of ITEMS.

    Raises:
        InputError: there is no item of that name.
    """
    if text == "all":
        return list(ITEMS)
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise InputError(
            f"--check {text}: an item has no name; separate names by single commas, as"
            " overfit,gradient"
        )
    for name in names:
        if name not in ITEMS:
            raise InputError(
                f"--check {name}: allowed are {', '.join(ITEMS)}{did_you_mean(name, ITEMS)}"
            )
    return [name for name in ITEMS if name in names]


def check(run: Run, specs: dict[str, CheckSpec]) -> None:
    """Try the items that --check names on every stage.

    Prints a line for each; writes check.json and the report.

    Args:
        specs: by the stages' names; items about the data alone are tried once, for a stage that
            uses labels where there is one.

    Raises:
        AuditFailed: some item fails.
        InputError: an unknown item, or more than one process.
    """
    if run.world.world_size > 1:
        raise InputError("--check runs in one process: start it without torchrun or srun")
    names = chosen_items(run.args.check)
    start = time.monotonic()
    for picture in (run.folder / "figures").glob("check_*"):  # of an earlier check
        picture.unlink()
    todo = _todo(names, specs)
    width = max(len(shown) for shown, _, _ in todo)
    items = []
    lines = []
    is_damaged = False
    for shown, name, spec in todo:
        with _own_randomness(run.args.seed), _without_teacher(spec.run, name):
            result = _try(name, spec, is_damaged)
        if name == "corrupt":
            is_damaged = result.status == FAIL
        if spec.run.teacher and name in WITHOUT_TEACHER and result.status != SKIP:
            result = dataclasses.replace(result, value=f"{result.value}; without the teacher")
        items.append({"item": shown} | dataclasses.asdict(result))
        lines.append(f"{result.status:4} {shown:{width}}  {_line(result)}")
        say(lines[-1])
    seconds = time.monotonic() - start
    record = {
        "card": card_record(run.card, run.chance),
        "command": environment()["command"],
        "seconds": round(seconds, 1),
        "items": items,
    }
    write_json(run.folder / "check.json", record)
    with only_warn(say, str(run.folder / "report.html")):
        page.write(run.folder)
    again = [line for status in (FAIL, WARN) for line in lines if line.startswith(status)]
    if again != lines[len(lines) - len(again) :]:
        say("to look at:", *again)
    statuses = [item["status"] for item in items]
    counts = [f"{statuses.count(status)} {status}" for status in (PASS, WARN, FAIL, SKIP)]
    say(f"{', '.join(counts)} in {seconds:.0f} s: {run.folder / 'check.json'}")
    failed = [item["item"] for item in items if item["status"] == FAIL]
    if failed:
        raise AuditFailed(f"--check: {', '.join(failed)}")


def _todo(names: list[str], specs: dict[str, CheckSpec]) -> list[tuple[str, str, CheckSpec]]:
    # (the name that is shown, the item, what it is tried on) in their order.
    first = next(iter(specs.values()))
    of_data = next((spec for spec in specs.values() if spec.labels is not None), first)
    todo = []
    for stage, spec in specs.items():
        for name in names:
            if name not in OF_DATA:
                todo.append((name if len(specs) == 1 else f"{stage}/{name}", name, spec))
            elif spec is first:
                todo.append((name, name, of_data))
    return todo


def _try(name: str, spec: CheckSpec, is_damaged: bool) -> Result:
    if name not in OF_DATA:
        if is_damaged:
            return skip("damaged items cannot be trained on")
        if spec.step is None:
            return skip("this stage trains one layer on stored features")
    return ITEMS[name](spec)


def _line(result: Result) -> str:
    passes = f" (passes: {result.threshold})" if result.threshold else ""
    fix = f". {result.fix}" if result.fix else ""
    return f"{result.value}{passes}{fix}"


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    # An item that is tried alone gives the result that it gives among the others.
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextlib.contextmanager
def _without_teacher(run, name: str) -> Iterator[None]:
    # These items know what the labels' loss should do; the teacher's term follows other rules.
    teacher = run.teacher
    if name in WITHOUT_TEACHER:
        run.teacher = None
    try:
        yield
    finally:
        run.teacher = teacher


ITEMS = {
    **data.ITEMS,
    "human-baseline": human.item,
    "seed": model.seed,
    "inputs": model.inputs,
    "views": model.views,
    "eval-invariance": model.eval_invariance,
    "loss-at-init": model.loss_at_init,
    "head-bias": model.head_bias,
    "gradient": model.gradient,
    "trainable": model.trainable,
    "leakage": model.leakage,
    "overfit": training.overfit,
    "zero-input": training.zero_input,
    "loss-decreases": training.loss_decreases,
    "capacity": training.capacity,
    "first-layer": model.first_layer,
}
# Items tried on the labels' loss alone, though a run may have a teacher.
WITHOUT_TEACHER = {"loss-at-init", "overfit", "loss-decreases"}
# Items about the data alone, tried once however many stages a run has.
OF_DATA = {*data.ITEMS, "human-baseline"}
