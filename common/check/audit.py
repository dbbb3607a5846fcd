"""Is everything alive? A few steps on a copy of the model show which parameters move and which
losses they feel.

A frozen layer that was meant to train, a loss of weight 0 and a parameter that no optimizer holds
all train without an error and end in a worse model; the audit ends them before the first step.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import AuditFailed


def check_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What is wrong with an optimizer's groups: a trainable parameter belongs in exactly one, a
    frozen one in none.
    """
    held: dict[int, int] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            held[id(p)] = held.get(id(p), 0) + 1
    problems = []
    for name, p in model.named_parameters():
        count = held.pop(id(p), 0)
        if p.requires_grad and count != 1:
            problems.append(f"{name} is trainable and in {count} optimizer groups")
        if not p.requires_grad and count:
            problems.append(f"{name} is frozen and in an optimizer group")
    return problems + (
        [f"the optimizer holds {len(held)} parameters that the model lacks"] if held else []
    )


def check_setting(
    name: str,
    model: nn.Module,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    terms_of: Callable[[nn.Module, int], dict[str, Tensor]],
    steps: int = 3,
) -> list[str]:
    """What is dead in `steps` steps of a copy of `model`, one line each; the model itself stays as
    it is.

    Every trainable parameter must be in one optimizer group and must have moved; every frozen
    parameter, and every buffer of a module without trainable parameters, must be as it was; every
    loss term must have moved the gradient.

    Args:
        name: of the setting, for the lines.
        build_optimizer: the optimizer of a model; may set the model up first.
        terms_of: the weighted terms of the loss of step k by name; a term of weight 0 is not there.
        steps: how many.

    Returns:
        The problems; empty if all is alive.
    """
    twin = copy.deepcopy(model)
    optimizer = build_optimizer(twin)
    problems = [f"{name}: {text}" for text in check_groups(twin, optimizer)]
    trainable = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    if not trainable or problems:
        return problems or [f"{name}: nothing is trainable"]
    frozen = {n: p for n, p in twin.named_parameters() if not p.requires_grad}
    for prefix, module in twin.named_modules():
        if not any(p.requires_grad for p in module.parameters()):
            frozen |= {f"{prefix}.{n}".lstrip("."): b for n, b in module.named_buffers()}
    # Not on the device: there a copy of a large model may be what a step has no room for.
    before = {n: t.detach().to("cpu", copy=True) for n, t in (trainable | frozen).items()}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    felt: dict[str, bool] = {}
    pushed = dict.fromkeys(trainable, False)
    state = (
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
    )
    for k in range(steps):
        terms = terms_of(twin, k)
        for term, value in terms.items():
            grads = [None] * len(trainable)
            if value.requires_grad:
                grads = torch.autograd.grad(
                    value, list(trainable.values()), retain_graph=True, allow_unused=True
                )
            felt[term] = felt.get(term, False) or any(
                g is not None and bool((g != 0).any()) for g in grads
            )
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        for n, p in trainable.items():
            pushed[n] = pushed[n] or _below_rounding(p, rates[id(p)])
        optimizer.step()
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    problems += [
        f"{name}: the loss term {term} moves no gradient"
        for term, alive in felt.items()
        if not alive
    ]
    for n, p in trainable.items():
        if torch.equal(before[n], p.detach().cpu()) and not pushed[n]:
            problems.append(f"{name}: {n} is trainable and did not move in {steps} steps")
    moved = (n for n, t in frozen.items() if not torch.equal(before[n], t.detach().cpu()))
    return problems + [f"{name}: {n} is frozen and moved" for n in moved]


def _below_rounding(p: Tensor, lr: float) -> bool:
    # A rate of 1e-5 and a small gradient make a step that a weight near 1 rounds away: alive, and
    # yet the same bits.
    if p.grad is None or not lr:
        return False
    step = (lr * p.grad).abs()
    return bool((step > 0).any()) and bool(
        (step <= p.detach().abs() * torch.finfo(p.dtype).eps).all()
    )


def refuse(problems: list[str]) -> None:
    """Raise `AuditFailed` with the problems' names, if there are any."""
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise AuditFailed("; ".join(problems[:10]) + more)
