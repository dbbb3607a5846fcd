import contextlib
import dataclasses
import time
from collections.abc import Iterator

import torch

from common.check.data import ITEMS
from common.check.human import item
from common.check.model import (
    capacity,
    eval_invariance,
    first_layer,
    gradient,
    head_bias,
    inputs,
    leakage,
    loss_at_init,
    loss_decreases,
    overfit,
    seed,
    trainable,
    zero_input,
)
from common.check.result import FAIL, PASS, SKIP, WARN, CheckSpec, Result, skip
from common.errors import AuditFailed, InputError, did_you_mean
from common.report import page
from common.run.files import write_json
from common.run.run import environment


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


def check(run, tasks: dict[str, CheckSpec]) -> None:
    """Try the items that --check names on every stage, print a line for each; write check.json and
    the report.

    Args:
        tasks: by the stages' names; items about the data alone are tried once.

    Raises:
        AuditFailed: some item fails.
        InputError: an unknown item, or several processes.
    """
    if run.world.world_size > 1:
        raise InputError("--check runs in one process: start it without torchrun or srun")
    names, found, start = chosen_items(run.args.check), [], time.monotonic()
    for left in (run.folder / "figures").glob(
        "check_*"
    ):  # the report would show them as the run's own
        left.unlink()
    width = max(map(len, names)) + (0 if len(tasks) == 1 else max(map(len, tasks)) + 1)
    for stage, task in tasks.items():
        for name in names:
            if name in OF_DATA and task is not next(iter(tasks.values())):
                continue
            with _own_randomness(run.args.seed), _untaught(run, name):
                damaged = any(i["item"] == "corrupt" and i["status"] == FAIL for i in found)
                why = "damaged items cannot be trained on" if damaged else ""
                why = why or ("" if task.step else "this stage trains one layer on stored features")
                result = skip(why) if why and name not in OF_DATA else ITEMS[name](task)
            if run.teacher and name in UNTAUGHT and result.status != SKIP:
                result = dataclasses.replace(result, value=f"{result.value}; without the teacher")
            shown = name if len(tasks) == 1 or name in OF_DATA else f"{stage}/{name}"
            found.append({"item": shown} | dataclasses.asdict(result))
            print(f"{result.status:4} {shown:{width}}  {_line(result)}", flush=True)
    seconds = time.monotonic() - start
    command = environment()["command"]
    write_json(
        run.folder / "check.json",
        {
            "command": command,
            "script": run.model_spec["script"],
            "seconds": round(seconds, 1),
            "items": found,
        },
    )
    page.write(run.folder)
    failed = [item["item"] for item in found if item["status"] == FAIL]
    counts = ", ".join(
        f"{sum(i['status'] == v for i in found)} {v}" for v in (PASS, WARN, FAIL, SKIP)
    )
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
def _untaught(run, name: str) -> Iterator[None]:
    # These items know what the labels' loss should do; the teacher's term follows other rules.
    teacher = run.teacher
    if name in UNTAUGHT:
        run.teacher = None
    try:
        yield
    finally:
        run.teacher = teacher


ITEMS = {
    **ITEMS,
    "human-baseline": item,
    "seed": seed,
    "inputs": inputs,
    "eval-invariance": eval_invariance,
    "loss-at-init": loss_at_init,
    "head-bias": head_bias,
    "gradient": gradient,
    "trainable": trainable,
    "leakage": leakage,
    "overfit": overfit,
    "zero-input": zero_input,
    "loss-decreases": loss_decreases,
    "capacity": capacity,
    "first-layer": first_layer,
}
# Items tried on the labels' loss alone, though a run may have a teacher.
UNTAUGHT = {"loss-at-init", "overfit", "loss-decreases"}
# Items about the data alone, tried once however many stages a run has.
OF_DATA = {*ITEMS, "human-baseline"}
