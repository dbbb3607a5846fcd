"""The audit: does every parameter train, and has every loss term a gradient?

A few steps on a copy of the model show it. A frozen layer that was meant to train, a loss of weight
0 and a parameter that no optimizer holds all train without an error and end in a worse model; the
audit ends them before the first step.
"""

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common import live
from common.errors import AuditFailed, plural


def check_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What is wrong with an optimizer's groups.

    A trainable parameter belongs in exactly one, a frozen one in none.
    """
    groups_of = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    problems = []
    for name, p in model.named_parameters():
        count = groups_of.pop(id(p), 0)
        if p.requires_grad and count != 1:
            problems.append(f"{name} is trainable and in {count} optimizer groups")
        if not p.requires_grad and count:
            problems.append(f"{name} is frozen and in an optimizer group")
    if groups_of:
        foreign = plural(len(groups_of), "parameter")
        problems.append(f"the optimizer holds {foreign} that the model lacks")
    return problems


def check_setting(
    name: str,
    model: nn.Module,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    terms_of: Callable[[nn.Module, int], dict[str, Tensor]],
    steps: int = 3,
) -> list[str]:
    """What is dead in `steps` steps of a copy of `model`; the model itself stays as it is.

    Every trainable parameter must be in one optimizer group and must have moved; every frozen
    parameter, and every buffer of a module without trainable parameters, must be as it was; every
    loss term must have moved the gradient.

    Args:
        name: of the setting, for the lines.
        build_optimizer: the optimizer of a model; may set the model up first.
        terms_of: the weighted terms of the loss of step k by name; a term of weight 0 is not there.
        steps: how many.

    Returns:
        The problems, one line each; empty if all is alive.
    """
    model = copy.deepcopy(model)
    optimizer = build_optimizer(model)
    problems = [f"{name}: {text}" for text in check_groups(model, optimizer)]
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable or problems:
        return problems or [f"{name}: nothing is trainable"]
    frozen = _frozen_tensors(model)
    # Not on the device: there a copy of a large model may be what a step has no room for.
    initial = {n: t.detach().to("cpu", copy=True) for n, t in (trainable | frozen).items()}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    has_gradient: dict[str, bool] = {}
    pushed = dict.fromkeys(trainable, False)
    rng_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    for k in live.progress(range(steps), f"audit, {name}", steps):
        terms = terms_of(model, k)
        for term, value in terms.items():
            moves = _has_gradient(value, list(trainable.values()))
            has_gradient[term] = has_gradient.get(term, False) or moves
        optimizer.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        for n, p in trainable.items():
            pushed[n] = pushed[n] or _below_rounding(p, rates[id(p)])
        optimizer.step()
    torch.set_rng_state(rng_state)
    if cuda_states:
        torch.cuda.set_rng_state_all(cuda_states)
    for term, moves in has_gradient.items():
        if not moves:
            problems.append(f"{name}: the loss term {term} moves no gradient")
    for n, p in trainable.items():
        if not p.isfinite().all():
            problems.append(f"{name}: {n} is not finite after {plural(steps, 'step')}")
        elif torch.equal(initial[n], p.detach().cpu()) and not pushed[n]:
            taken = plural(steps, "step")
            problems.append(f"{name}: {n} is trainable and did not move in {taken}")
    for n, tensor in frozen.items():
        if not torch.equal(initial[n], tensor.detach().cpu()):
            problems.append(f"{name}: {n} is frozen and moved")
    return problems


def _frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    # Parameters that do not train, and the buffers of modules in which nothing trains.
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    for prefix, module in model.named_modules():
        if not any(p.requires_grad for p in module.parameters()):
            frozen |= {f"{prefix}.{n}".lstrip("."): b for n, b in module.named_buffers()}
    return frozen


def _has_gradient(term: Tensor, parameters: list[nn.Parameter]) -> bool:
    if not term.requires_grad:
        return False
    grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return any(g is not None and bool((g.isfinite() & (g != 0)).any()) for g in grads)


def _below_rounding(p: Tensor, lr: float) -> bool:
    # A rate of 1e-5 and a small gradient make a step that a weight near 1 rounds away: alive, and
    # yet the same bits.
    if p.grad is None or not lr:
        return False
    step = (lr * p.grad).abs()
    rounding = p.detach().abs() * torch.finfo(p.dtype).eps
    return bool((step > 0).any()) and bool((step <= rounding).all())


def refuse(problems: list[str]) -> None:
    """Raise `AuditFailed` with the problems' names, if there are any."""
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise AuditFailed("; ".join(problems[:10]) + more)
