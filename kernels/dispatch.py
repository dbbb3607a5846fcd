"""Which implementation of an operation runs, and launching it.

Triton on a GPU, plain PyTorch elsewhere, and never one for the other in silence.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # there are no wheels for macOS: the references are all there is
    triton = tl = None

# Fixed when a kernel is decorated, hence at import: kernels then run on CPU tensors, in NumPy.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def jit(fn=None, **options):
    """triton.jit, or nothing where triton is not installed and no kernel can be called."""
    if fn is None:
        return functools.partial(jit, **options)
    return fn if triton is None else triton.jit(fn, **options)


class Constant(float, *(() if tl is None else (tl.constexpr,))):
    """A number that kernels may name, too: of globals they take tl.constexpr alone."""


LN2 = Constant(math.log(2.0))
LOG2_E = Constant(math.log2(math.e))


@functools.cache
def _say(level, message):
    logging.getLogger("kernels").log(level, message)


def say_once(level: int, message: str) -> None:
    """Log to "kernels" what was not yet said in this process."""
    _say(level, message)


# torch.compiler.assume_constant_result, which would import the compiler (a second): the compiler
# calls the function while it traces.
say_once._dynamo_marked_constant = True


def choose_impl(op: str, impl: str, x: torch.Tensor, unsupported: str | None = None) -> str:
    """Resolve impl="auto" to "triton" or "torch", saying once which way it went.

    That a GPU does without its kernel is a warning, with the reason.

    Args:
        op: the operation's name, for the messages.
        impl: "auto", "triton" or "torch".
        x: an input; its device decides.
        unsupported: why the Triton kernel cannot take this input, or None.

    Raises:
        ValueError: unknown impl, or impl="triton" where it cannot run.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"{op}: impl={impl!r}, allowed are 'auto', 'triton' and 'torch'")
    if impl == "torch":
        return impl
    if triton is None:
        unsupported = "triton is not installed"
    elif not x.is_cuda and not (INTERPRETED and x.device.type == "cpu"):
        unsupported = (
            f"tensors are on {x.device.type}; Triton needs a GPU, or TRITON_INTERPRET=1"
            " before the import"
        )
    elif not x.is_cuda and impl == "auto":
        unsupported = "the interpreter is for tests"
    if impl == "triton" and unsupported:
        raise ValueError(
            f"{op}: impl='triton' cannot run: {unsupported}; impl='auto' or 'torch' can"
        )
    if unsupported:
        level = logging.WARNING if x.is_cuda else logging.INFO
        say_once(level, f"{op}: PyTorch instead of the Triton kernel: {unsupported}")
        return "torch"
    say_once(logging.INFO, f"{op}: Triton kernel")
    return "triton"


def check_tensors(op: str, **tensors) -> None:
    """Refuse what is no tensor, by the name of its argument."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{op}: {name} is a {type(x).__name__}; it must be a torch.Tensor")


def on_device_of_first(function):
    """Run a function that launches kernels on the GPU of its first argument.

    Triton launches on the current one.
    """

    @functools.wraps(function)
    def guarded(first, *rest, **options):
        with torch.cuda.device_of(first):  # does nothing for a CPU tensor
            return function(first, *rest, **options)

    return guarded


# Remembers plans: what a call needs beyond allocations and launches, by shapes, strides, dtypes,
# device and options. Batches of ever other sizes drop the oldest rather than grow.
plan = functools.lru_cache(maxsize=4096)


class Launch:
    """A kernel with its grid, integers and constants: a launch but for its tensors and floats.

    Triton's own launch looks at every argument to find the compiled kernel, which takes longer than
    the launch itself. What it looks at are dtypes, integers, whether addresses are multiples of 16
    and, on AMD, whether a tensor has more than 2^31 bytes. In a plan only addresses can change, and
    floats, whose values no compiler sees.

    Args:
        kernel: what `jit` returned; its arguments are tensors, floats, integers, constants.
        grid: one to three numbers of programs.
        integers: the integers known only at run time.
        constants: name -> value of the tl.constexpr arguments, in the kernel's order.
    """

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        integers: tuple[int, ...],
        constants: dict,
        num_warps: int = 4,
        num_stages: int = 3,
    ):
        assert kernel.arg_names[-len(constants) :] == list(constants), kernel.arg_names
        self.kernel, self.grid = kernel, grid
        self.known = (*integers, *constants.values())
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.compiled = None

    def __call__(self, tensors: tuple[torch.Tensor, ...], *floats: float) -> None:
        addresses = 0
        for x in tensors:
            addresses |= x.data_ptr()
        if addresses % 16:
            self.kernel[self.grid](*tensors, *floats, *self.known, **self.options)
        elif self.compiled is not None:
            self.compiled(*tensors, *floats, *self.known)
        else:
            compiled = self.kernel[self.grid](*tensors, *floats, *self.known, **self.options)
            if compiled is not None:  # the interpreter compiles nothing
                self.compiled = compiled[(*self.grid, 1, 1)[:3]]


@functools.cache
def lacks_tensor_cores(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU older than Ampere."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return nvidia and torch.cuda.get_device_capability(device) < (8, 0)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 stand for them in the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def target_name(device: torch.device) -> str:
    """ "sm_80", "sm_90", "gfx942", ... or "interpreter": the key of the tables of tile sizes."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


class Operation(torch.autograd.Function):
    """What torch.func can differentiate, too: forward has no ctx, setup_context follows it.

    `call` is `apply` without what that form costs, 13 us of binding arguments, where torch.func is
    not at work.
    """

    @classmethod
    def call(cls, *inputs):
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*inputs)
        return _with_context(cls).apply(*inputs)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        raise RuntimeError("kernels: vmap is not supported; call the operation once per sample")


@functools.cache
def _with_context(operation: type[Operation]) -> type[torch.autograd.Function]:
    def forward(ctx, *inputs):
        output = operation.forward(*inputs)
        operation.setup_context(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(operation.backward)}
    return type(operation.__name__, (torch.autograd.Function,), members)


def save(ctx, inputs: tuple, outputs: tuple, unsaved: int = 0) -> None:
    """Save inputs and all outputs but the first, the loss, which alone is differentiable.

    unsaved: how many of the last outputs the backward does not need.
    """
    ctx.save_for_backward(*inputs, *outputs[1 : len(outputs) - unsaved])
    ctx.mark_non_differentiable(*[x for x in outputs[1:] if x is not None])
    ctx.set_materialize_grads(False)


class _FirstDerivative(Operation):
    """function(*inputs), the backward of an operation, whose own backward raises.

    `once_differentiable` is silent where the upstream gradient is constant.
    """

    @staticmethod
    def forward(function, *inputs):
        return function(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "this operation has no second derivative: its gradient was differentiated again"
        )


def gradients(ctx, function, upstream: torch.Tensor | None, *options) -> tuple:
    """function(upstream, *saved tensors, *options), and None for the inputs that remain.

    The saved tensors are read once, which is all that checkpointing allows.
    """
    inputs = len(ctx.needs_input_grad)
    if upstream is None:  # nothing came from above
        return (None,) * inputs
    arguments = (upstream, *ctx.saved_tensors, *options)
    if torch.is_grad_enabled():
        grads = _FirstDerivative.apply(function, *arguments)
    else:
        grads = function(*arguments)
    return *grads, *(None,) * (inputs - len(grads))


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turn autocast off; meta tensors have none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def breaks_graph_to_gather(function):
    """Have torch.compile leave a call with gather= as it is, between two graphs.

    What the caller's function does is not for the compiler to trace. Other reductions and
    statistics are no registered operators: calls for them are left, too.
    """

    @functools.wraps(function)
    def whole(*args, gather=None, **options):
        apart = gather is not None or options.get("return_stats")
        apart = apart or options.get("reduction", "mean") != "mean"
        if apart and torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, gather=gather, **options)
        return function(*args, gather=gather, **options)

    return whole
