"""Time the kernels.

    python -m kernels.benchmark --op all --peers     on a GPU
    python -m kernels.benchmark --op nt_xent --cpu   on a laptop

Every implementation is compared with the fp64 reference first, and nothing is timed if one of ours
is wrong. Then each runs alone, forward and forward+backward: median and 20/80 quantiles of the time
of a call, the peak memory beyond the inputs, and the share of the written bound. On a GPU a call is
timed twice: as it is, from an idle GPU, where Python and launches count, and ("graph") as a CUDA
graph behind other work, where only the GPU's own time does. The last line of the output is one JSON
object with everything in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import importlib
import json
import math
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from . import (
    nt_xent,
    nt_xent_reference,
    shift_conv1x1,
    shift_conv1x1_reference,
    sup_con,
    sup_con_reference,
    temporal_shift,
    temporal_shift_reference,
)
from .dispatch import triton

# Dense 16-bit FLOP/s and 2^x per second: H200 at its sustained clock, 132 SMs x 16 ex2 x 1.98 GHz.
RATES = {"NVIDIA H200": (790e12, 4.18e12)}
TEMPERATURE = 0.1
PEERS = ("lightly", "pytorch-metric-learning")
OPS = ("nt_xent", "sup_con", "temporal_shift", "shift_conv1x1")
LOSS_BOUND = (
    "max(FLOP / tensor rate, exp / exp rate); forward M^2 D, M^2 / 2 (half grid);"
    " backward 4 M^2 D, M^2; M rows"
)


def nt_xent_eager(z_a, z_b):
    """The usual form: the whole matrix, a masked diagonal, cross entropy."""
    z = F.normalize(torch.cat((z_a, z_b)), dim=1)
    logits = (z @ z.T).float() / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z_a)))


def sup_con_eager(z, labels):
    z = F.normalize(z, dim=1)
    logits = (z @ z.T).float() / TEMPERATURE
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (labels[:, None] == labels[None, :]) & ~diagonal
    log_prob = logits - logits.masked_fill(diagonal, -math.inf).logsumexp(1, keepdim=True)
    return -((log_prob * positives).sum(1) / positives.sum(1)).mean()


def official_shift(x, n_segment, fold_div=8):
    """The form of the authors' code: zeros and three slice copies."""
    clips = x.view(-1, n_segment, *x.shape[1:])
    fold = x.shape[1] // fold_div
    out = torch.zeros_like(clips)
    out[:, :-1, :fold] = clips[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = clips[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = clips[:, :, 2 * fold :]
    return out.view(x.shape)


def shift_conv1x1_without_bias(x, weight, n_segment):
    return shift_conv1x1_reference(x, weight, None, n_segment)


REFERENCES = {
    "nt_xent": functools.partial(nt_xent_reference, temperature=TEMPERATURE),
    "sup_con": functools.partial(sup_con_reference, temperature=TEMPERATURE),
    "temporal_shift": temporal_shift_reference,
    "shift_conv1x1": shift_conv1x1_without_bias,
}


def peers(op):
    """name -> function of the op's inputs, for what is installed."""
    wanted = {
        "nt_xent": (
            ("lightly", "lightly.loss"),
            ("pytorch-metric-learning", "pytorch_metric_learning.losses"),
        ),
        "sup_con": (("pytorch-metric-learning", "pytorch_metric_learning.losses"),),
    }
    functions = {}
    for name, module in wanted.get(op, ()):
        try:
            losses = importlib.import_module(module)
        except ImportError:
            print(f"{name} is not installed and not compared (pip install {name})")
            continue
        if name == "lightly":
            functions[name] = losses.NTXentLoss(temperature=TEMPERATURE)
        elif op == "nt_xent":
            functions[name] = _of_two_views(losses.NTXentLoss(temperature=TEMPERATURE))
        else:
            functions[name] = losses.SupConLoss(temperature=TEMPERATURE)
    return functions


def _of_two_views(loss):
    def of_two_views(z_a, z_b):
        labels = torch.arange(len(z_a), device=z_a.device).repeat(2)
        return loss(torch.cat((z_a, z_b)), labels)

    return of_two_views


def cases(op, device, dtype, quick):
    """Yield (shape's name, differentiable inputs, other inputs, number of rows, D)."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    on_gpu = device.type == "cuda"
    if op in ("nt_xent", "sup_con"):
        sizes = (256, 1024, 4096, 16384, 65536) if on_gpu else (256, 8192)
        for n in (32,) if quick else sizes:
            z_a, z_b = random(n, 128), random(n, 128)
            if op == "nt_xent":
                yield f"N={n} D=128", (z_a, z_b), (), 2 * n, 128
            else:
                labels = torch.arange(2 * n, device=device) % min(100, n // 4)
                yield f"M={2 * n} D=128", (torch.cat((z_a, z_b)),), (labels,), 2 * n, 128
        return
    if quick:
        shapes = [(16, 16, 4)]
    elif not on_gpu:
        shapes = [(64, 64, 28)]
    elif op == "temporal_shift":
        shapes = [(256, 32, 112), (256, 64, 56), (256, 160, 14)]
    else:
        shapes = [(256, 32, 112), (256, 64, 56), (256, 96, 28), (256, 160, 14)]
    layouts = {"channels_last": torch.channels_last}
    if op == "temporal_shift":
        layouts = {"contiguous": torch.contiguous_format, **layouts}
    for frames, channels, side in shapes:
        for layout, memory_format in layouts.items():
            x = random(frames, channels, side, side).contiguous(memory_format=memory_format)
            name = f"{frames}x{channels}x{side}x{side} {layout}"
            if op == "temporal_shift":
                yield name, (x,), (8,), 0, 0
            else:
                outputs = 4 * channels
                # No bias: BatchNorm follows these convolutions. The weight lies as the other
                # kernels want it, too.
                weight = random(outputs, channels, 1, 1)
                weight = weight.contiguous(memory_format=torch.channels_last)
                yield f"{name} -> {outputs}", (x, weight), (8,), 0, 0


def variants(op, case_rows, on_gpu, with_peers):
    """name -> function; ours, which is checked, comes last.

    Whole-matrix forms are left out where their matrix would not fit.
    """
    impl = "triton" if on_gpu else "torch"
    can_compile = triton is not None if on_gpu else shutil.which("g++") or shutil.which("clang++")
    if op == "nt_xent":
        eager = nt_xent_eager
        ours = functools.partial(nt_xent, temperature=TEMPERATURE, impl=impl)
    elif op == "sup_con":
        eager = sup_con_eager
        ours = functools.partial(sup_con, temperature=TEMPERATURE, impl=impl)
    elif op == "temporal_shift":
        eager = official_shift
        ours = functools.partial(temporal_shift, impl=impl)
    else:

        def eager(x, weight, n_segment):
            return F.conv2d(official_shift(x, n_segment), weight)

        def ours(x, weight, n_segment):
            return shift_conv1x1(x, weight, None, n_segment, impl=impl)

    def fused_without_shift(x, weight, n_segment):
        no_channels = x.shape[1] + 1
        return shift_conv1x1(x, weight, None, n_segment, fold_div=no_channels, impl=impl)

    def convolution_alone(x, weight, n_segment):
        return F.conv2d(x, weight)

    def shift_then_convolution(x, weight, n_segment):
        return F.conv2d(temporal_shift(x, n_segment, impl=impl), weight)

    functions = {}
    if case_rows <= 32768:
        functions["eager"] = eager
        if can_compile:
            functions["torch.compile(eager)"] = torch.compile(eager, dynamic=False)
    if op == "shift_conv1x1":
        functions["fused kernel, no shift"] = fused_without_shift
        functions["1x1 convolution alone"] = convolution_alone
        if on_gpu:
            functions["our shift, then cuDNN"] = shift_then_convolution
    if on_gpu and case_rows <= 32768:
        functions["chunked reference" if case_rows else "reference"] = REFERENCES[op]
    if with_peers:
        for peer, function in peers(op).items():
            most_rows = 8192
            if peer == "lightly":
                most_rows = 32768
            elif op == "nt_xent":
                most_rows = 512
            if case_rows <= most_rows:
                functions[peer] = function
            else:
                print(
                    f"{peer} is left out at {case_rows} rows: its matrices would not fit or"
                    " take minutes"
                )
    if on_gpu:
        functions["ours (Triton)"] = ours
    else:
        functions["ours (chunked)" if case_rows else "ours (reference)"] = ours
    return functions


def gradients(function, inputs, others):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *others)
    # A fixed upstream gradient that costs nothing to make.
    upstream = torch.ones_like(out) if out.dim() == 0 else out.detach()
    return out.detach(), torch.autograd.grad(out, inputs, upstream)


def check(op, function, inputs, others, dtype):
    """The relative error of forward and gradients against fp64, on at most 2,048 rows.

    Above the tolerance it ends the program.
    """
    if op in ("nt_xent", "sup_con"):
        inputs = [x[:1024] for x in inputs]
        others = [x[:1024] for x in others]
    out, grads = gradients(function, inputs, others)
    true_out, true_grads = gradients(REFERENCES[op], [x.double() for x in inputs], others)
    tolerance = 2e-2
    if dtype == torch.float32:
        tolerance = 1e-4 if op == "shift_conv1x1" else 1e-5
    worst = 0.0
    for got, truth in zip((out, *grads), (true_out, *true_grads), strict=True):
        error = (got.double() - truth).norm() / truth.norm().clamp_min(1e-12)
        worst = max(worst, error.item())
    if not worst <= tolerance:
        print(
            f"{op}: relative error {worst:.1e} is above {tolerance:.0e}: a wrong kernel is"
            " not timed",
            file=sys.stderr,
        )
        raise SystemExit(4)
    return worst


@contextlib.contextmanager
def peak_memory(device, result):
    """Peak memory beyond what was held before, into result["peak_mb"]; None if not known."""
    gc.collect()
    result["peak_mb"] = None
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        yield
        torch.cuda.synchronize()
        result["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
        return
    reset = pathlib.Path("/proc/self/clear_refs")
    if not reset.exists():
        yield
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what earlier calls freed must not hide what this one takes
    reset.write_text("5", encoding="utf-8")  # the resident peak starts again from here
    held = _peak_kib()
    yield
    result["peak_mb"] = (_peak_kib() - held) * 1024 / 1e6


def _peak_kib():
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def measure(call, device, calls, idle=True):
    """Milliseconds of one call, sorted.

    idle: by the wall clock, from an idle GPU until it is idle again, Python and launches included;
    else by the GPU's clock, behind other work that hides the launches. (The GPU's clock cannot tell
    the former: drivers may hand over the first event together with what follows.)
    """
    times = []
    begin = time.perf_counter()
    on_gpu = device.type == "cuda"
    flush = torch.empty(2**29, dtype=torch.int8, device=device) if on_gpu else None
    while len(times) < 3 or (time.perf_counter() - begin < 2.0 and len(times) < calls):
        if on_gpu:
            flush.zero_()  # no input is left in the second-level cache
        if on_gpu and not idle:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
            continue
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)


def graphed(call):
    """The call as a CUDA graph: what is left of it without launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def loss_bound(rows, dim, backward, device):
    """Milliseconds that arithmetic alone takes; None where the device's rates are not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name not in RATES:
        return None
    tensor, exp = RATES[name]
    bound = max(rows**2 * dim / tensor, rows**2 / 2 / exp)
    if backward:
        bound += max(4 * rows**2 * dim / tensor, rows**2 / exp)
    return 1e3 * bound


def bench(op, device, dtype, options):
    rows = []
    calls = 3 if options.quick else options.calls
    on_gpu = device.type == "cuda"
    if op == "nt_xent":
        print(f"\nbound of the losses: {LOSS_BOUND}")
    for shape, inputs, others, num_rows, dim in cases(op, device, dtype, options.quick):
        torch._dynamo.reset()
        candidates = variants(op, num_rows, on_gpu, options.peers)
        if options.quick:
            candidates.pop("torch.compile(eager)", None)
        ours = next(name for name in candidates if name.startswith("ours"))
        error = check(op, candidates[ours], inputs, others, dtype)
        print(
            f"\n{op} {shape} {str(dtype).removeprefix('torch.')}: relative error of ours against"
            f" fp64 {error:.1e}"
        )
        copy_ms = None
        if op == "temporal_shift":
            copy = functools.partial(torch.empty_like(inputs[0]).copy_, inputs[0])
            copy_ms = statistics.median(measure(copy, device, calls, idle=False))
            print(
                f"bound: a copy of the tensor, {copy_ms:.4f} ms forward,"
                " twice that forward+backward"
            )
        print(
            f"{'implementation':<34}{'pass':<9}{'median ms':>11}"
            f"{'20 %':>10}{'80 %':>10}{'peak MB':>10}{'of bound':>10}"
        )
        for name, function in candidates.items():
            for backward in (False, True):
                if backward:
                    call = functools.partial(gradients, function, inputs, others)
                else:
                    detached = [x.detach() for x in inputs]
                    call = functools.partial(function, *detached, *others)
                forms = {name: call}
                # Of a whole matrix of 32,768 rows a graph would hold tens of gigabytes; launches
                # cost nothing there.
                small = num_rows <= 8192 and "reference" not in name and name not in PEERS
                if on_gpu and (small or name == ours):
                    with torch.set_grad_enabled(backward):
                        forms[f"{name}, graph"] = graphed(call)
                for label, timed in forms.items():
                    row = {
                        "op": op,
                        "shape": shape,
                        "dtype": str(dtype),
                        "implementation": label,
                        "error": error,
                        "pass": "fwd+bwd" if backward else "fwd",
                    }
                    with torch.set_grad_enabled(backward):
                        if num_rows < 8192 or on_gpu:
                            timed()
                        with peak_memory(device, row):
                            timed()
                        times = measure(timed, device, calls, idle=not label.endswith(", graph"))
                    row["ms"] = statistics.median(times)
                    row["ms_20"] = times[len(times) // 5]
                    row["ms_80"] = times[-1 - len(times) // 5]
                    bound = None
                    if num_rows:
                        bound = loss_bound(num_rows, dim, backward, device)
                    elif copy_ms:
                        bound = copy_ms * (1 + backward)
                    row["share_of_bound"] = bound / row["ms"] if bound else None
                    share = f"{100 * row['share_of_bound']:.0f} %" if bound else "-"
                    memory = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
                    print(
                        f"{label:<34}{row['pass']:<9}{row['ms']:>11.4f}"
                        f"{row['ms_20']:>10.4f}{row['ms_80']:>10.4f}{memory:>10}{share:>10}",
                        flush=True,
                    )
                    rows.append(row)
    return rows


def ptxas_version(device):
    """Of the assembler that comes with Triton, which has another one for Blackwell; or None."""
    if triton is None or not torch.version.cuda:
        return None
    nvidia = triton.knobs.nvidia
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
    return (nvidia.ptxas_blackwell if blackwell else nvidia.ptxas).version


def commit():
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, encoding="utf-8").stdout.strip() or None


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--op", choices=(*OPS, "all"), default="all", help="what to time")
    parser.add_argument(
        "--peers", action="store_true", help="time installed libraries that compute the same, too"
    )
    parser.add_argument("--cpu", action="store_true", help="time what runs on a CPU")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the inputs (bfloat16; float32 on a CPU)",
    )
    parser.add_argument(
        "--calls",
        type=int,
        default=50,
        help="how many calls a median is of, if they fit two seconds",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny shapes, to see that it runs; no figures worth keeping",
    )
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; --cpu times what runs without one")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cpu" if args.cpu else "cuda")
    dtype = getattr(torch, args.dtype or ("float32" if args.cpu else "bfloat16"))
    if args.cpu:
        processor = platform.processor() or platform.machine()
        device_name = f"{processor}, {torch.get_num_threads()} threads"
    else:
        device_name = torch.cuda.get_device_name()
    header = {
        "device": device_name,
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "cuda": torch.version.cuda,
        "ptxas": ptxas_version(device),
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print("  ".join(f"{key} {value}" for key, value in header.items()))
    rows = []
    for op in OPS if args.op == "all" else (args.op,):
        rows += bench(op, device, dtype, args)
    print(json.dumps(header | {"rows": rows}))


if __name__ == "__main__":
    main()
