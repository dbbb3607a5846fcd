"""Learning-rate schedule, parameter groups and optimizers.

Every optimizer made here for CPU or CUDA follows torch's convention for fused optimizers: `step()`
honors the optional attributes `grad_scale` (a device tensor that divides the gradients) and
`found_inf` (a device tensor; where it is not 0 the step changes nothing, bitwise).
`torch.amp.GradScaler` sets both; a script sets `found_inf` itself to mask a non-finite loss without
asking the device.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

# torch has fused kernels for more devices, but only these two were checked to honor `found_inf`
# and `grad_scale`.
FUSED_DEVICES = ("cpu", "cuda")
OPTIMIZERS = ("lars", "sgd", "adamw")
SCHEDULES = ("cosine", "constant")


class Stage(Protocol):
    """What is read here of a stage's settings (`common.config.StageConfig`)."""

    optimizer: str
    lr: float
    wd: float
    epochs: int
    warmup_epochs: float


def lr_at(
    step: int,
    *,
    lr: float,
    warmup_steps: int,
    total_steps: int,
    schedule: str = "cosine",
    min_lr: float = 0.0,
) -> float:
    """Return the learning rate of one step: a linear warm-up, then half a cosine or a constant.

    Step s of the warm-up has lr * (s + 1) / warmup_steps, so the peak is the warm-up's last step,
    or step 0 without one. The cosine falls from the peak to `min_lr`, which the last step has;
    where the last step is the peak itself (a run of one step, or of warm-up alone) it has `lr`.

    Args:
        step: optimizer step, counted from 0; steps beyond the end have the last step's rate.
        lr, min_lr: peak and final rate.
        warmup_steps, total_steps: in optimizer steps; the warm-up is part of the total.
        schedule: one of SCHEDULES.

    Raises:
        ValueError: an unknown schedule, a negative step, or a warm-up that does not fit into the
            total.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"need 0 <= warmup_steps <= total_steps >= 1, got {warmup_steps} and {total_steps}"
        )
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    peak = max(warmup_steps - 1, 0)
    last = total_steps - 1
    if schedule == "constant" or last == peak:
        return float(lr)
    progress = (min(step, last) - peak) / (last - peak)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def param_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Split the trainable parameters of some modules into those that decay and those that do not.

    Biases and normalization's scales and shifts (at most one dimension) get neither weight decay
    nor LARS's adaptation, as in google-research/simclr. A parameter that several modules share
    counts once, where it is met first.

    Args:
        modules: each listed once.
        weight_decay: of the parameters with two dimensions or more.

    Returns:
        One or two groups: dicts of `params`, `weight_decay` and `adapt`, none of them empty.

    Raises:
        ValueError: something else than a module, a module listed twice, nothing to train, or a
            parameter that a lazy module has not created yet.
    """
    modules = list(modules)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"modules must hold nn.Module, got {type(module).__name__}: its parameters would"
                " be missed"
            )
    if len({id(module) for module in modules}) < len(modules):
        raise ValueError("modules must be listed once each, got one of them twice")
    trainable = {}
    for module in modules:
        for name, p in module.named_parameters():
            if p.requires_grad:
                trainable.setdefault(id(p), (name, p))
    decayed = []
    plain = []
    for name, p in trainable.values():
        if nn.parameter.is_lazy(p):
            raise ValueError(
                f"parameter {name} of a lazy module has no shape yet; run the module once before"
            )
        (plain if p.ndim <= 1 else decayed).append(p)
    if not trainable:
        raise ValueError(
            f"modules must have trainable parameters, got {len(modules)} modules without any"
        )
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "adapt": True},
        {"params": plain, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def _flat_like(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return an uninitialized flat tensor and views of it, in memory laid out as `params` are.

    Equal strides keep the foreach kernels on their fast path, for channels-last weights too.
    """
    flat = params[0].new_empty(sum(p.numel() for p in params))
    views = []
    start = 0
    for p in params:
        # Strides of a dense copy: p's own, unless p has gaps or overlaps.
        strides = p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()
        views.append(flat.as_strided(p.shape, strides, start))
        start += p.numel()
    return flat, views


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888).

    As in google-research/simclr, per parameter p with gradient g:

        g += weight_decay * p
        trust = trust_coefficient * |p| / |g|, or 1 where a norm is 0 or the group does not adapt
        v = momentum * v + lr * trust * g
        p -= v

    The learning rate is inside the momentum buffer v, so a change of the rate does not rescale the
    past. A step costs a fixed number of foreach launches per group, device and dtype, one flat
    temporary of the parameters' size, and no host synchronization. `grad_scale` and `found_inf` are
    honored, see the module's docstring.

    Args:
        params: parameters or groups; a group may set `weight_decay` and `adapt`.
        lr: float or 0-d tensor.
        momentum, weight_decay, trust_coefficient: floats.
        adapt: default of groups that do not say it.

    Raises:
        ValueError: a negative setting.
        RuntimeError: a sparse gradient, in `step`.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        adapt: bool = True,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        for name, value in defaults.items():
            if not isinstance(value, Tensor) and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        super().__init__(params, {**defaults, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make one step; `closure` as in torch.optim. Parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("LARS does not support sparse gradients")
                buckets.setdefault((p.device, p.dtype), []).append(p)
            for params in buckets.values():
                self._step_bucket(params, group)
        return loss

    def _step_bucket(self, params: list[Tensor], group: dict) -> None:
        device = params[0].device
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state["momentum_buffer"])

        flat, updates = _flat_like(params)
        torch._foreach_copy_(updates, [p.grad for p in params])
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            flat.div_(grad_scale.to(device, non_blocking=True))
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        if group["adapt"]:
            p_norm = torch.stack(torch._foreach_norm(params))  # [len(params)]
            g_norm = torch.stack(torch._foreach_norm(updates))
            trust = torch.where(
                (p_norm > 0) & (g_norm > 0), group["trust_coefficient"] * p_norm / g_norm, 1.0
            )
            # One factor an element: foreach has no fast product with a list of scalars that live on
            # the device.
            rates = (group["lr"] * trust).unbind()
            factors = [rate.expand(p.numel()) for rate, p in zip(rates, params, strict=True)]
            flat.mul_(torch.cat(factors))
        else:
            flat.mul_(group["lr"])

        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_sub_(params, buffers)
            return
        # Neutral operands instead of a branch, which would wait for the device: v * 1 + (-0.0) and
        # p - 0.0 return every v and p bitwise, -0.0 included, and `where` drops the nan that a
        # product with 0 would keep.
        keep = found_inf.to(device, non_blocking=True).reshape(()) == 0
        torch._foreach_mul_(buffers, torch.where(keep, flat.new_full((), group["momentum"]), 1.0))
        flat.copy_(torch.where(keep, flat, -0.0))
        torch._foreach_add_(buffers, updates)
        torch._foreach_copy_(updates, buffers)
        flat.copy_(torch.where(keep, flat, 0.0))
        torch._foreach_sub_(params, updates)


def build_optimizer(
    name: str, groups: list[dict], *, lr: float | Tensor, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """Make an optimizer that can skip a step on the device's own word (`found_inf`).

    SGD and AdamW are torch's with `fused=True`. For devices outside FUSED_DEVICES they are the
    foreach forms and a warning says so: those have no `_step_supports_amp_scaling` and refuse
    `found_inf`.

    Args:
        name: one of OPTIMIZERS.
        groups: from `param_groups`.
        lr: float or 0-d tensor.
        momentum: of LARS and SGD; AdamW keeps torch's betas.

    Raises:
        ValueError: an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {name!r}")
    if name == "lars":
        return LARS(groups, lr=lr, momentum=momentum)
    params = [p for group in groups for p in group["params"]]
    others = sorted({p.device.type for p in params}.difference(FUSED_DEVICES))
    if others:
        warnings.warn(
            f"{name} on {others}: foreach instead of fused, so found_inf is not supported",
            stacklevel=2,
        )
    form = {"foreach": True} if others else {"fused": True}
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, **form)
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, **form)
    if momentum != 0:
        # torch allocates the buffers uninitialized in the first step and fills them there, but not
        # if found_inf skips that step: the second would read garbage. From zeros the first step is
        # the same.
        for p in params:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def of_stage(stage: Stage, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """Make the optimizer that a stage's settings describe, for some modules."""
    return build_optimizer(stage.optimizer, param_groups(modules, stage.wd), lr=stage.lr)


def set_rates(
    optimizer: torch.optim.Optimizer,
    peaks: Sequence[float],
    stage: Stage,
    done: int,
    steps: int,
    factor: float,
) -> float:
    """Set every group's learning rate for the next step: its peak, by the warm-up and a factor.

    Args:
        peaks: the groups' peak rates.
        stage: whose rate, epochs and warm-up these are.
        done: optimizer steps made in this stage.
        steps: optimizer steps of an epoch.
        factor: of the schedule's phase.

    Returns:
        The rate of a group with the stage's own peak.
    """
    warmup_steps = round(stage.warmup_epochs * steps)
    factor *= lr_at(
        done,
        lr=1.0,
        warmup_steps=warmup_steps,
        total_steps=stage.epochs * steps,
        schedule="constant",
    )
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor
    return stage.lr * factor


def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, a 0-d tensor; 0 where there are none.

    It does not wait for the device.
    """
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
