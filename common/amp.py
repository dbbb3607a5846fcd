"""What stands around an optimizer step in every script: precision, the guarded update, its time."""

import contextlib
import errno
import re
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common import optim
from common.errors import Diverged

try:
    import resource
except ImportError:  # Windows
    resource = None

# What torch, cuBLAS and cuDNN say of full memory in a RuntimeError, and how much they wanted.
_FULL = re.compile(
    r"out of memory|can(no|')t allocate memory|not enough memory|ALLOC(ATION)?_FAILED|bad_alloc",
    re.I,
)
_ASKED = re.compile(r"(?:tried to|unable to) allocate ([\d.]+ \w+)", re.I)


class OutOfMemory(MemoryError):
    """Memory is full; the message says where and what was asked for."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor without waiting for it."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def has_bf16(device: torch.device) -> bool:
    """Whether a GPU computes in bf16 itself; older ones emulate it, slower than fp32.

    `torch.cuda.is_bf16_supported` counts the emulation, and asks the current GPU alone.
    """
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 itself (AVX512_BF16; those with AMX have it)."""
    return (
        torch.cpu._is_avx512_bf16_supported()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that `--precision` means on a device.

    `auto` is bf16 on a GPU that has it, fp16 on an older one, fp32 elsewhere.
    """
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            precision = "bf16" if has_bf16(device) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(precision: str, device: torch.device):
    """The autocast context of `--precision`."""
    dtype = dtype_of(precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """A loss scaler, which does nothing but for fp16."""
    return torch.amp.GradScaler(device.type, enabled=dtype_of(precision, device) == torch.float16)


def guarded_step(
    optimizer: torch.optim.Optimizer,
    grad_scaler: torch.amp.GradScaler,
    loss: Tensor,
    clip_grad: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Step the optimizer unless a gradient is not finite.

    The decision stays on the device: the optimizers of `common.optim` skip the whole update where
    their `found_inf` is 1, so no host synchronization is needed and a bad step never reaches the
    weights.

    Args:
        clip_grad: the longest that the gradient of all parameters together may be, without the
            loss scale; a longer one is scaled down to it. None: no limit.

    Returns:
        The gradient norm before it is clipped, and whether the step was bad: device scalars, the
        second a boolean. With a loss scaler an overflow of the scaled gradients is not bad, only a
        loss that is not finite is.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = optim.grad_norm(parameters)
    if grad_scaler.is_enabled():
        norm = norm / grad_scaler.scale(torch.ones_like(norm))
    if clip_grad is not None:
        # A gradient that is NaN leaves the others as they are: --detect-anomaly names it.
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm.nan_to_num())
    if grad_scaler.is_enabled():
        grad_scaler.step(optimizer)
        grad_scaler.update()
        return norm, ~loss.detach().isfinite()
    finite = norm.isfinite()
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if finite:  # a device without fused optimizers (mps): the host has to wait and see
            optimizer.step()
        return norm, ~(finite & loss.detach().isfinite())
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    del optimizer.found_inf
    return norm, ~(finite & loss.detach().isfinite())


def require_finite(rows: Tensor, what: str) -> None:
    """Refuse outputs with a value that is not finite.

    Raises:
        Diverged: of what.
    """
    if not rows.isfinite().all():
        raise Diverged(
            f"the {what} are not finite: the weights have grown too large. Try a lower --lr"
        )


# The share of a step from which waiting for data is worth a change.
WAITING = 0.1


class Phases:
    """The time that steps spend in each phase, for --profile.

    A lap waits for the device, so the sum is more than an unwatched step takes. The first `skip`
    steps, each ended by `lap("rest")`, do not count: they allocate, compile and choose algorithms.
    """

    def __init__(self, device: torch.device, skip: int = 3):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.left = skip
        self.steps = 0
        self.last = time.perf_counter()

    def lap(self, name: str | None) -> None:
        """Count the time since the lap before for a phase; None: for none, as an evaluation's."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        now = time.perf_counter()
        if self.left == 0 and name:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        if name == "rest":
            if self.left == 0:
                self.steps += 1
            else:
                self.left -= 1
        self.last = now

    def describe(self) -> str:
        """`512.0 ms a step: backward 61.0 %, ...`, the largest share first."""
        total = sum(self.seconds.values())
        if not self.steps:
            return "no step was timed: the first ones do not count"
        phases = sorted(self.seconds.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in phases)
        return f"{total / self.steps * 1e3:.1f} ms a step: {shares}"

    def describe_input(self, faster: list[str]) -> str:
        """Whether steps wait for their data, and what would help; empty where none was timed."""
        if not self.steps:
            return ""
        share = self.seconds.get("input", 0.0) / sum(self.seconds.values())
        if share < WAITING:
            return f"data are there in time, {share:.1%} of a step"
        ways = f"; what helps: {', '.join(faster)}" if faster else ""
        return f"steps wait for data, {share:.1%} of their time{ways}"


@contextlib.contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """BatchNorm in training mode whose running statistics stay as they are.

    For a forward pass that is repeated.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in layers]
    counts = [m.num_batches_tracked.clone() for m in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum, count in zip(layers, momenta, counts, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)


def peak_bytes(device: torch.device | None = None) -> int | None:
    """The most memory held so far: of the GPU by tensors, elsewhere by the process.

    None where nobody counts it. Without a `device`: of the current GPU, where one is in use.
    """
    on_gpu = device.type == "cuda" if device else torch.cuda.is_initialized()
    if on_gpu:
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def out_of_memory(error: Exception, device: torch.device) -> str | None:
    """What was asked for in vain and the peak, where an error is that of full memory; else None.

    The errors are those of Python and NumPy, of torch's allocators, of cuBLAS and cuDNN, and of the
    system.
    """
    if isinstance(error, OutOfMemory):
        return str(error)
    full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not full and not (isinstance(error, RuntimeError) and _FULL.search(str(error))):
        return None
    asked = _ASKED.search(str(error))
    size = f" at {asked[1]} more" if asked else ""
    if asked and asked[1].endswith("bytes"):
        size = f" at {int(asked[1].split()[0]) / 1e9:.2f} GB more"
    on_gpu = isinstance(error, torch.OutOfMemoryError) or "CU" in str(error)
    peak = peak_memory(device if on_gpu else torch.device("cpu"))
    return f"out of memory{size}, the peak is {peak}"


def peak_memory(device: torch.device) -> str:
    """`peak_bytes` as text."""
    held = peak_bytes(device)
    if held is None:
        return "not counted on this system"
    return f"{held / 1e9:.2f} GB of the {'GPU' if device.type == 'cuda' else 'process'}"


def reduce_gradients(model: nn.Module, *, last: bool):
    """Average the gradients over the ranks with the last chunk of a batch only."""
    if last or not hasattr(model, "no_sync"):
        return contextlib.nullcontext()
    return model.no_sync()


def set_lr(
    optimizer: torch.optim.Optimizer,
    stage,
    done: int,
    steps_per_epoch: int,
    schedule: str,
    factor: float = 1.0,
) -> float:
    """Set and return the learning rate of the step that follows `done` steps.

    It is a function of the position alone, times `factor`.

    Args:
        stage: a `common.config.StageConfig`.
    """
    lr = optim.lr_at(
        done,
        lr=stage.lr,
        warmup_steps=round(stage.warmup_epochs * steps_per_epoch),
        total_steps=stage.epochs * steps_per_epoch,
        schedule=schedule,
        min_lr=stage.min_lr,
    )
    lr *= factor
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
