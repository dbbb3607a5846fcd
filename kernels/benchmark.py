"""Time the kernels.

    python -m kernels.benchmark --op all --peers     on a GPU
    python -m kernels.benchmark --op nt_xent --cpu   on a laptop
    python -m kernels.benchmark --sweep --minutes 5  every tile of the losses' kernels, on a GPU

Every implementation is compared with the fp64 reference first, and nothing is timed if one of ours
is wrong. Then each runs alone, forward and forward+backward: median, minimum and 20/80 quantiles of
the time of a call, the peak memory beyond the inputs, and the share of the written bounds. On a GPU
a call is timed twice: as it is, from an idle GPU, where Python and launches count, and ("graph") as
a CUDA graph behind other work, where only the GPU's own time does. The last line of the output is
one JSON object with everything in the table; --json keeps it, and what there is of it if the
program is ended early.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import datetime
import functools
import gc
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import unittest.mock

import torch
import torch.nn.functional as F

from . import (
    nt_xent,
    nt_xent_reference,
    shift_conv1x1,
    shift_conv1x1_reference,
    similarity,
    sup_con,
    sup_con_reference,
    temporal_shift,
    temporal_shift_reference,
    tiles,
)
from .dispatch import INTERPRETED, LOG2_E, target_name, triton
from .shift_conv1x1 import RESIDENT

# Dense 16-bit FLOP/s and 2^x per second: H200 at its sustained clock, 132 SMs x 16 ex2 x 1.98 GHz.
RATES = {"NVIDIA H200": (790e12, 4.18e12)}
PEERS = ("lightly", "pytorch-metric-learning")
OPS = ("nt_xent", "sup_con", "temporal_shift", "shift_conv1x1")
LOSSES = OPS[:2]
LOSS_BOUND = (
    "max(FLOP / tensor rate, exp / exp rate); forward M^2 D, M^2 / 2 (half grid);"
    " backward 4 M^2 D, M^2 (of a half grid, not built: 3 M^2 D, M^2 / 2); M rows"
)
# What is timed for its speed alone: it computes something else.
OTHERS = ("fused form, no shift", "1x1 convolution alone")


def nt_xent_eager(z_a, z_b, temperature):
    """The usual form: the whole matrix, a masked diagonal, cross entropy."""
    z = F.normalize(torch.cat((z_a, z_b)), dim=1)
    logits = (z @ z.T).float() / temperature
    logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z_a)))


def sup_con_eager(z, labels, temperature):
    z = F.normalize(z, dim=1)
    logits = (z @ z.T).float() / temperature
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (labels[:, None] == labels[None, :]) & ~diagonal
    log_prob = logits - logits.masked_fill(diagonal, -math.inf).logsumexp(1, keepdim=True)
    count = positives.sum(1)
    row_losses = -(log_prob * positives).sum(1) / count.clamp_min(1)
    return row_losses.sum() / (count > 0).sum()


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
    "nt_xent": nt_xent_reference,
    "sup_con": sup_con_reference,
    "temporal_shift": temporal_shift_reference,
    "shift_conv1x1": shift_conv1x1_without_bias,
}


def reference(op, temperature):
    if op in LOSSES:
        return functools.partial(REFERENCES[op], temperature=temperature)
    return REFERENCES[op]


def peers(op, temperature):
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
            functions[name] = losses.NTXentLoss(temperature=temperature)
        elif op == "nt_xent":
            functions[name] = _of_two_views(losses.NTXentLoss(temperature=temperature))
        else:
            functions[name] = losses.SupConLoss(temperature=temperature)
    return functions


def _of_two_views(loss):
    def of_two_views(z_a, z_b):
        labels = torch.arange(len(z_a), device=z_a.device).repeat(2)
        return loss(torch.cat((z_a, z_b)), labels)

    return of_two_views


def labels_of(kind, rows, generator):
    """(rows,) labels: "even" in up to 100 classes, "long-tailed" (35 % in the first) or "two"."""
    if kind == "long-tailed":
        shares = 0.65 ** torch.arange(20.0)
        return torch.multinomial(shares, rows, replacement=True, generator=generator)
    return torch.arange(rows) % (2 if kind == "two" else max(1, min(100, rows // 8)))


def cases(op, device, dtype, options):
    """Yield (shape's name, differentiable inputs, other inputs, number of rows, D)."""
    generator = torch.Generator().manual_seed(options.seed)
    quick = options.quick

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    on_gpu = device.type == "cuda"
    if op in ("nt_xent", "sup_con"):
        sizes = (256, 1024, 4096, 16384, 65536) if on_gpu else (256, 8192)
        sizes, dim = [options.n] if options.n else [32] if quick else sizes, options.dim
        for n in sizes:
            z_a, z_b = random(n, dim), random(n, dim)
            if op == "nt_xent":
                yield f"N={n} D={dim}", (z_a, z_b), (), 2 * n, dim
            else:
                labels = labels_of(options.labels, 2 * n, generator).to(device)
                shape = f"M={2 * n} D={dim}"
                shape += "" if options.labels == "even" else f" {options.labels} labels"
                yield shape, (torch.cat((z_a, z_b)),), (labels,), 2 * n, dim
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


def variants(op, case_rows, on_gpu, with_peers, temperature):
    """name -> function; ours, which is checked, comes last.

    Whole-matrix forms are left out where their matrix would not fit.
    """
    impl = "triton" if on_gpu else "torch"
    can_compile = triton is not None if on_gpu else shutil.which("g++") or shutil.which("clang++")
    if op == "nt_xent":
        eager = functools.partial(nt_xent_eager, temperature=temperature)
        ours = functools.partial(nt_xent, temperature=temperature, impl=impl)
    elif op == "sup_con":
        eager = functools.partial(sup_con_eager, temperature=temperature)
        ours = functools.partial(sup_con, temperature=temperature, impl=impl)
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

    def looped(x, weight, n_segment):
        # Few channels, too, BLOCK_K at a time: nothing is padded to a power of two.
        with unittest.mock.patch.dict(RESIDENT, {target_name(x.device): 0}):
            return ours(x, weight, n_segment)

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
        functions[OTHERS[0]] = fused_without_shift
        functions[OTHERS[1]] = convolution_alone
        if on_gpu:
            functions["our shift, then cuDNN"] = shift_then_convolution
            functions["fused, forward looped"] = looped
    if on_gpu and case_rows <= 32768:
        functions["chunked reference" if case_rows else "reference"] = reference(op, temperature)
    if with_peers:
        for peer, function in peers(op, temperature).items():
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


def check(op, function, inputs, others, dtype, temperature, ours):
    """The relative error of forward and gradients against fp64, on at most 2,048 rows.

    Of ours it ends the program above the tolerance.
    """
    if op in ("nt_xent", "sup_con"):
        inputs = [x[:1024] for x in inputs]
        others = [x[:1024] for x in others]
    out, grads = gradients(function, inputs, others)
    truth = reference(op, temperature)
    true_out, true_grads = gradients(truth, [x.double() for x in inputs], others)
    tolerance = 2e-2
    if dtype == torch.float32:
        tolerance = 1e-4 if op == "shift_conv1x1" else 1e-5
    worst = 0.0
    for got, truth in zip((out, *grads), (true_out, *true_grads), strict=True):
        error = (got.double() - truth).norm() / truth.norm().clamp_min(1e-12)
        worst = max(worst, error.item())
    if ours and not worst <= tolerance:
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


def loss_bound(rows, dim, backward, device, half_backward=False):
    """Milliseconds that arithmetic alone takes; None where the device's rates are not known.

    half_backward: of the algorithm that has the fewest operations, whose backward takes each
    similarity once, too.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name not in RATES:
        return None
    tensor, exp = RATES[name]
    bound = max(rows**2 * dim / tensor, rows**2 / 2 / exp)
    if backward:
        products, exps = (3, 0.5) if half_backward else (4, 1)
        bound += max(products * rows**2 * dim / tensor, exps * rows**2 / exp)
    return 1e3 * bound


def bench(op, device, dtype, options, rows, keep):
    """Append an operation's rows; keep() is called after each shape."""
    calls = 3 if options.quick else options.calls
    on_gpu = device.type == "cuda"
    if op == "nt_xent":
        print(f"\nbound of the losses: {LOSS_BOUND}")
    for shape, inputs, others, num_rows, dim in cases(op, device, dtype, options):
        torch._dynamo.reset()
        candidates = variants(op, num_rows, on_gpu, options.peers, options.temperature)
        if options.quick:
            candidates.pop("torch.compile(eager)", None)
        ours = next(name for name in candidates if name.startswith("ours"))
        arguments = (inputs, others, dtype, options.temperature)
        errors = {ours: check(op, candidates[ours], *arguments, ours=True)}
        for name in candidates.keys() - {ours, *OTHERS}:
            errors[name] = check(op, candidates[name], *arguments, ours=False)
        print(f"\n{op} {shape} {str(dtype).removeprefix('torch.')}; error: relative, against fp64")
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
            f"{'min':>10}{'20 %':>10}{'80 %':>10}{'peak MB':>10}{'of bound':>10}{'error':>9}"
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
                        "error": errors.get(name),
                        "pass": "fwd+bwd" if backward else "fwd",
                    }
                    with torch.set_grad_enabled(backward):
                        if num_rows < 8192 or on_gpu:
                            timed()
                        with peak_memory(device, row):
                            timed()
                        times = measure(timed, device, calls, idle=not label.endswith(", graph"))
                    row["ms"] = statistics.median(times)
                    row["ms_min"] = times[0]
                    row["ms_20"] = times[len(times) // 5]
                    row["ms_80"] = times[-1 - len(times) // 5]
                    bound = least = None
                    if num_rows:
                        bound = loss_bound(num_rows, dim, backward, device)
                        least = loss_bound(num_rows, dim, backward, device, half_backward=True)
                    elif copy_ms:
                        bound = least = copy_ms * (1 + backward)
                    row["share_of_bound"] = bound / row["ms"] if bound else None
                    row["share_of_least"] = least / row["ms"] if least else None
                    share = f"{100 * row['share_of_bound']:.0f} %" if bound else "-"
                    memory = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
                    error = "-" if row["error"] is None else f"{row['error']:.1e}"
                    print(
                        f"{label:<34}{row['pass']:<9}{row['ms']:>11.4f}{row['ms_min']:>10.4f}"
                        f"{row['ms_20']:>10.4f}{row['ms_80']:>10.4f}{memory:>10}{share:>10}"
                        f"{error:>9}",
                        flush=True,
                    )
                    rows.append(row)
        keep()


class Problem:
    """Launches of the losses' tiles for random rows, with any tile in place of the table's.

    kernel: "half", "full" or "bwd".
    """

    def __init__(self, device, dtype, rows, dim, temperature, seed=0):
        self.device = device
        _, split = tiles.planes(dtype, True)
        shape, buffer = tiles.row_buffer(rows, dim, dtype, True)
        shift = tiles.shift_of(temperature, True)
        if shift is None:
            raise ValueError(f"temperature {temperature} is too low for one shift for all rows")
        z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
        z = F.normalize(z) * (LOG2_E / temperature) ** 0.5
        u = torch.zeros(shape, dtype=buffer, device=device)
        u[:rows, :dim] = z.to(device, buffer)
        self.operands = similarity.Operands(
            u, u, rows, rows, pair_shift=1, split=split, shift=shift
        )
        self.width = shape[1] // (1 + split)

    @functools.cached_property
    def lse(self):
        return self.result("full")

    def table(self, kernel):
        return tiles.tile(kernel, self.operands.split, self.width, target_name(self.device))

    @contextlib.contextmanager
    def using(self, tile):
        """Plans are made with this tile; those of others are forgotten before and after."""
        table, rows = tiles.tile, similarity.FULL_GRID_ROWS
        plans = (similarity._half_plan, similarity._full_plan, similarity._weighted_plan)
        try:
            tiles.tile, similarity.FULL_GRID_ROWS = lambda *_: tile, 0
            for plan in plans:
                plan.cache_clear()
            yield
        finally:
            tiles.tile, similarity.FULL_GRID_ROWS = table, rows
            for plan in plans:
                plan.cache_clear()

    def call(self, kernel):
        """One launch -> what it made of each row."""
        if kernel == "bwd":
            return similarity.weighted_sums(self.operands, self.lse, self.lse)
        shift = self.operands.shift if kernel == "half" else None
        return similarity.slot_sums(self.operands._replace(shift=shift))

    def result(self, kernel):
        """(rows, ...) of any tile alike."""
        out = self.call(kernel)
        out = out.sum(0) if kernel == "bwd" else out.merge(self.operands.shift)
        return out[: self.operands.num_rows]

    def compile(self, kernel, tile):
        """Into Triton's cache on the disk, for a launch of another process."""
        described = self.operands.described()
        with self.using(tile):
            if kernel == "bwd":
                tensors, floats = 3, (self.operands.shift,)
                launch = similarity._weighted_plan(*described)[1]
            elif kernel == "full":
                tensors, floats = 2, ()
                launch = similarity._full_plan(*described)[1]
            else:
                tensors, floats = 1, (self.operands.shift,)
                launch = similarity._half_plan(*described)[0][0][1]
        types = [self.operands.u.dtype] * (1 if kernel == "half" else 2)
        types += [torch.float32] * tensors
        if not INTERPRETED:  # which compiles nothing
            arguments = (*types, *floats, *launch.known)
            launch.kernel.warmup(*arguments, grid=launch.grid, **launch.options)


def tiles_of(kernel, problem, quick):
    """Tiles to try, as in `tiles.TILES`, that of the table first."""
    sizes = ((16, 32), (1,), (1,)) if INTERPRETED else ((32, 64, 128), (4, 8), (1, 2, 3, 4))
    blocks, warps, stages = sizes
    tried = [problem.table(kernel)]
    for m in blocks:
        for n in blocks:
            if tiles.BLOCK % m or tiles.BLOCK % n or (kernel == "half" and n % m):
                continue
            tried += [tiles.Tile(m, n, w, s) for w in warps for s in stages]
    return list(dict.fromkeys(tried))[: 2 if quick else None]


def variants_of(plain, problem):
    """The backward's tiles with `AHEAD` and `POLYNOMIAL`."""
    found = []
    for tile in plain:
        # Two tiles of more than 32 similarities a thread leave the registers.
        ahead = (False, True) if tile.block_m * tile.block_n <= 1024 * tile.warps else (False,)
        polynomial = (0, 2, 4) if not problem.operands.split else (0,)
        found += [tile._replace(ahead=a, polynomial=p) for a in ahead for p in polynomial]
    return [tile for tile in dict.fromkeys(found) if tile not in plain]


def compile_ahead(problem, jobs):
    """In a process of its own. A tile that does not fit says so when it is launched."""
    problem = Problem(*problem)
    for kernel, tile in jobs:
        with contextlib.suppress(Exception):
            problem.compile(kernel, tile)


def sweep(device, dtype, options):
    """Time the tiles -> the JSON's members: rows, the table's new rows, how many were timed."""
    end = time.monotonic() + 60 * options.minutes
    rows = 2 * (options.n or (32 if options.quick else 4096))
    described = (device, dtype, rows, options.dim, options.temperature, options.seed)
    problem = Problem(*described)
    tried = [(name, tiles_of(name, problem, options.quick)) for name in ("bwd", "half", "full")]
    if not options.quick:
        tried.append(("bwd", variants_of(tried[0][1], problem)))
    jobs = [(kernel, tile) for kernel, choice in tried for tile in choice]
    workers = 1 if options.quick else max(1, min(8, (os.cpu_count() or 2) - 1))
    timed, best = [], {}
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn")
    ) as pool:
        # One by one and in order, so that what is compiled first is timed first.
        ahead = {job: pool.submit(compile_ahead, described, [job]) for job in jobs}
        for kernel, choice in tried:
            with problem.using(problem.table(kernel)):
                truth = problem.result(kernel)
            for tile in choice:
                row = {"kernel": kernel, "tile": tile}
                if time.monotonic() > end:
                    break
                try:
                    ahead[kernel, tile].result(max(0.0, end - time.monotonic()))
                    with problem.using(tile):
                        got = problem.result(kernel)
                        call = functools.partial(problem.call, kernel)
                        calls = 3 if options.quick else 15
                        row["ms"] = statistics.median(measure(call, device, calls, idle=False))
                    row["error"] = ((got - truth).norm() / truth.norm()).item()
                except TimeoutError:
                    break
                except Exception as error:  # too large for the GPU, or for the compiler
                    row["failed"] = str(error).splitlines()[0] if str(error) else repr(error)
                timed.append(row)
                if row.get("error", 1.0) < 1e-2 and row["ms"] < best.get(kernel, row)["ms"] + 1e-9:
                    best[kernel] = row
                value = f"{row['ms']:.4f} ms" if "ms" in row else row["failed"][:60]
                print(f"{kernel:<6}{tile.row()!s:<28}{value}")
        for future in ahead.values():
            future.cancel()
    paste = [f"# {target_name(device)}"]
    for kernel in ("half", "full", "bwd"):
        key = (kernel, tiles.type_name(problem.operands.split), max(64, problem.width))
        tile = best[kernel]["tile"] if kernel in best else problem.table(kernel)
        paste.append(f"{key}: {tile.row()},")
    print(f"{len(timed)} of {len(jobs)} tiles; for TILES of kernels/tiles.py:", *paste, sep="\n")
    return {"rows": timed, "paste": paste, "timed": len(timed), "tiles": len(jobs)}


def ptxas_version(device):
    """Of the assembler that comes with Triton, which has another one for Blackwell; or None."""
    if triton is None or not torch.version.cuda:
        return None
    nvidia = triton.knobs.nvidia
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
    return (nvidia.ptxas_blackwell if blackwell else nvidia.ptxas).version


def processor():
    """The CPU's name."""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"model name\s*: (.+)", text)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def clocks():
    """Driver and clocks of the GPU, as nvidia-smi has them; None without one."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    printed = subprocess.run(command, capture_output=True, encoding="utf-8").stdout.splitlines()
    return dict(zip(fields.split(","), printed[0].split(", "), strict=False)) if printed else None


def header(device):
    """Where and with what it is timed."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "cpu": f"{processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "cuda": torch.version.cuda,
        "ptxas": ptxas_version(device),
        "python": platform.python_version(),
        "clocks": clocks() if on_gpu else None,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


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
    losses = parser.add_argument_group("the losses")
    losses.add_argument(
        "--n",
        type=int,
        help="pairs of rows (256 to 65536; --sweep: 4096); SupCon has twice as many",
    )
    losses.add_argument("--dim", type=int, default=128, help="columns of the rows")
    losses.add_argument("--temperature", type=float, default=0.1, help="of the similarities")
    losses.add_argument(
        "--labels",
        choices=("even", "long-tailed", "two"),
        default="even",
        help="SupCon's: up to 100 classes of one size, one of 35 %% and ever smaller ones, or two",
    )
    losses.add_argument(
        "--sweep",
        action="store_true",
        help="time every tile of the losses' kernels instead, and print the rows of the table",
    )
    losses.add_argument("--minutes", type=float, default=5.0, help="in which --sweep ends")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="keep the last line here")
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU; --cpu times what runs without one")
    for name in ("n", "dim", "calls", "temperature", "minutes"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name)}: it must be above 0")
    if args.sweep and args.cpu and not INTERPRETED:
        parser.error("--sweep times Triton kernels; with --cpu it needs TRITON_INTERPRET=1")
    if args.sweep and tiles.shift_of(args.temperature, True) is None:
        parser.error(f"--sweep with --temperature {args.temperature}: it must be 0.0128 or more")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = torch.device("cpu" if args.cpu else "cuda")
    dtype = getattr(torch, args.dtype or ("float32" if args.cpu else "bfloat16"))
    report = header(device) | {"quick": args.quick, "seed": args.seed, "rows": []}
    print("  ".join(f"{key} {value}" for key, value in report.items() if key != "rows"))

    def keep():
        if args.json:
            args.json.write_text(json.dumps(report) + "\n", encoding="utf-8")

    if args.sweep:
        report |= sweep(device, dtype, args)
        keep()
    else:
        for op in OPS if args.op == "all" else (args.op,):
            bench(op, device, dtype, args, report["rows"], keep)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
