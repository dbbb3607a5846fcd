"""The ranks of a run: torchrun, a Slurm job step or one process; gathers and BatchNorm over them.

Every function also works in one process, where it does nothing.
"""

import contextlib
import ctypes
import inspect
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import live
from common.errors import (
    AGAIN,
    EXIT_BAD_INPUT,
    InputError,
    as_input_error,
    first_few,
    plural,
    say,
    thread_limit,
)

_MOST_RANKS = 2**20
_GRACE = 5  # seconds after the limit of a meeting in which it can still say what is wrong
_meetings = itertools.count()  # of this process: the trials of --search meet one after another


@dataclass(frozen=True)
class Dist:
    """Which process this is, out of how many, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def where(self) -> str:
        """What the lines of an ending begin with: `rank 0 of 2: `."""
        return f"rank {self.rank} of {self.world_size}: "

    def say(self, *lines: str) -> None:
        """Print lines, from one process."""
        if self.is_main:
            say(*lines)


def init(device: str = "auto", timeout_s: float = 1800, meet_s: float = 1800) -> Dist:
    """Join the processes that the launcher describes.

    That is torchrun by its variables, a Slurm job step, or neither. The shell of an sbatch script
    has Slurm's rank variables too, but only a job step (`srun`) has more than one process.

    Args:
        timeout_s: seconds that a collective waits for the other ranks.
        meet_s: seconds in which all processes must have come.

    Raises:
        InputError: a variable of the launcher is missing or makes no sense, the device is not
            there, the processes do not meet, or a signal of the Slurm job would not arrive.
    """
    env = os.environ
    # In a job step some export WORLD_SIZE for other programs; RANK is what torchrun alone sets.
    torchrun = "RANK" in env or ("WORLD_SIZE" in env and "SLURM_STEP_ID" not in env)
    _check_signal()
    if torchrun or env.get("SLURM_TASK_PID", str(os.getpid())) != str(os.getpid()):
        _end_with_parent()
    number = 0
    world_size = 1
    local_rank = 0
    if torchrun:
        world_size = _variable("WORLD_SIZE", 1, _MOST_RANKS)
        number = _variable("RANK", 0, world_size - 1)
        local_rank = _variable("LOCAL_RANK", 0, world_size - 1) if "LOCAL_RANK" in env else 0
    elif "SLURM_STEP_ID" in env:
        world_size = _variable("SLURM_STEP_NUM_TASKS", 1, _MOST_RANKS)
        number = _variable("SLURM_PROCID", 0, world_size - 1)
        local_rank = _variable("SLURM_LOCALID", 0, world_size - 1)
        if world_size > 1:
            _check_terminal(world_size)
            # On one node nobody has to know its name.
            listed = env.get("SLURM_STEP_NODELIST", "")
            with as_input_error("the environment variable SLURM_STEP_NODELIST received", listed):
                nodes = hosts(listed)
            env.setdefault("MASTER_ADDR", nodes[0] if len(nodes) > 1 else "127.0.0.1")
            if "MASTER_PORT" not in env:
                own_port = port(_variable("SLURM_JOB_ID", 0), _variable("SLURM_STEP_ID", 0))
                env["MASTER_PORT"] = str(own_port)
    place = _device(device, local_rank)
    if world_size > 1 and not td.is_initialized():
        if not env.get("MASTER_ADDR"):
            raise InputError("MASTER_ADDR is not set: give the host of rank 0, or use torchrun")
        _variable("MASTER_PORT", 1, 65535)
        on_gpu = place.type == "cuda"
        with _limit(meet_s + _GRACE, f"rank {number} of {world_size}"):
            store = _meet(number, world_size, timeout_s, meet_s)
            try:
                td.init_process_group(
                    "nccl" if on_gpu else "gloo",
                    store=store,
                    rank=number,
                    world_size=world_size,
                    timeout=timedelta(seconds=timeout_s),
                    device_id=place if on_gpu else None,
                )
            except RuntimeError as error:
                if thread_limit(error):
                    raise
                raise _apart(number, world_size, str(error).split("\n")[0]) from None
    live.line.silent = number > 0
    return Dist(number, world_size, place)


def _variable(name: str, low: int, high: int = 10**9) -> int:
    """A whole number that the launcher has put into the environment.

    Raises:
        InputError: it is missing, no number, or out of bounds.
    """
    received = os.environ.get(name)
    text = (received or "").strip()
    if re.fullmatch("[0-9]{1,18}", text) and low <= int(text) <= high:
        return int(text)
    what = "is not set" if received is None else f"received {received!r}"
    raise InputError(
        f"the environment variable {name} {what}, allowed {low} to {high}: start with torchrun or"
        " srun, which set it, or for one process unset RANK, WORLD_SIZE and SLURM_STEP_ID"
    )


def _check_terminal(world_size: int) -> None:
    # `srun --pty bash`: the shell of the first task alone lives, and what it starts has no peers.
    env = os.environ
    if "SLURM_PTY_PORT" in env and env.get("SLURM_TASK_PID") != str(os.getpid()):
        raise InputError(
            f"this shell is one of {world_size} tasks of `srun --pty`, which gives a terminal to"
            " the first alone: use `srun -n1 --pty` for one process, or srun without --pty"
        )


def _apart(number: int, world_size: int, reason: str) -> InputError:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return InputError(
        f"rank {number} of {world_size} cannot meet the others at {address}: {reason}; check that"
        " all were started, that rank 0 runs on MASTER_ADDR and that MASTER_PORT is free there"
    )


def _meet(number: int, world_size: int, timeout_s: float, meet_s: float) -> td.Store:
    """The store, hosted by rank 0 or by torchrun, in which every process has left its mark.

    torch's own meeting waits in C++, where no signal is heard, and prints a trace when it fails.

    Raises:
        InputError: after `meet_s` seconds, with the ranks that have not come.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = number == 0 and not hosted
    end = time.monotonic() + meet_s
    limit = f"{meet_s / 60:g} minutes (--timeout)"
    while not is_host:
        try:
            socket.create_connection(address, timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                reason = f"no answer within {limit}: {error.strerror or error}"
                raise _apart(number, world_size, reason) from None
            time.sleep(min(0.2, meet_s))
    try:
        with _silence():
            server = td.TCPStore(
                "localhost" if is_host else address[0],
                address[1],
                world_size,
                is_host,
                timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = td.PrefixStore(f"attempt{attempt}/meeting{next(_meetings)}", server)
        marks = [f"rank{rank}" for rank in range(world_size)]
        problem = ""
        if store.add(marks[number], 1) > 1:
            problem = f"two processes are rank {number}"
        pause = 0.02
        while not problem and not store.check(marks):
            if store.check(["problem"]):
                problem = store.get("problem").decode()
            elif time.monotonic() > end:
                absent = [rank for rank, mark in enumerate(marks) if not store.check([mark])]
                came = f"{world_size - len(absent)} of {world_size} came within {limit}"
                problem = f"{came}, missing: rank {first_few(absent, 8)}"
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if problem:
            store.set("problem", problem)
            if is_host:
                time.sleep(2)  # the store ends with this process: the others read why
            raise _apart(number, world_size, problem)
    except td.DistError as error:
        raise _apart(number, world_size, str(error).split("\n")[0]) from None
    return store


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    # torch prints a C++ trace at each try where something else answers at the port.
    console = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(console, 2)
        os.close(console)


@contextlib.contextmanager
def _limit(seconds: float, who: str) -> Iterator[None]:
    # A port on which something else answers, or a peer that dies while it joins, hangs in C++.
    console = os.dup(2)

    def end():
        os.dup2(console, 2)  # in `_silence`
        text = f"error: {who} has not joined the others within {seconds / 60:.2g} minutes"
        print(f"{text} (--timeout); what the other ranks print says why", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_BAD_INPUT)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        os.close(console)


def port(job: int, step: int) -> int:
    """A port of a Slurm job step's own: two jobs or steps on one node do not meet.

    It lies below 32768, from where on systems take the ports of outgoing connections; the count of
    ports, 12763, is prime.
    """
    return 20000 + (job * 101 + step) % 12763


def hosts(nodelist: str) -> list[str]:
    """The hosts of a Slurm node list, as `scontrol show hostnames` gives them.

    `n[08-10,3],g` is n08, n09, n10, n3, g. With more than one bracket in a name the last one
    changes fastest, then the first, the second, and so on.

    Raises:
        ValueError: a bracket holds no numbers, or absurdly many.
    """
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        *texts, tail = re.split(r"\[[^\]]*\]", item)
        groups = [_numbers(ranges) for ranges in re.findall(r"\[([^\]]*)\]", item)]
        for digits in itertools.product(*groups[-2::-1], *groups[-1:]):
            in_place = [*digits[-2::-1], *digits[-1:]]
            pairs = zip(texts, in_place, strict=True)
            names.append("".join(text + digit for text, digit in pairs) + tail)
    return names


def _numbers(ranges: str) -> list[str]:
    # `08-10,3` is 08, 09, 10, 3: a range keeps the width of its first number.
    numbers = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        if int(high or low) - int(low) > _MOST_RANKS:
            raise ValueError(f"{part} are too many hosts")
        numbers += [f"{number:0{len(low)}d}" for number in range(int(low), int(high or low) + 1)]
    return numbers


def _check_signal() -> None:
    """Refuse a Slurm job whose `--signal` would kill what started Python, and not reach Python.

    Slurm sends it to the batch shell (`B:`), or else to the processes that `srun` starts; a shell
    or torchrun there dies of it before the end of the job and leaves Python behind. Options of the
    sbatch command line are not seen.

    Raises:
        InputError: with what to write instead.
    """
    env = os.environ
    in_step = "SLURM_STEP_ID" in env
    task_pid = env.get("SLURM_TASK_PID")
    if task_pid in (None, str(os.getpid())):  # no Slurm job, or nothing stands between
        return
    started = Path("/proc", task_pid)
    if not started.exists() or not shutil.which("scontrol"):
        return
    command = ["scontrol", "write", "batch_script", env.get("SLURM_JOB_ID", ""), "-"]
    text = {"encoding": "utf-8", "errors": "replace"}
    try:
        script = subprocess.run(command, capture_output=True, timeout=20, **text).stdout
    except subprocess.TimeoutExpired:  # the controller is down: nothing is known
        script = ""
    options = re.findall(r"^#SBATCH.*\s--signal[= ](\S+)", script, re.MULTILINE)
    option = env.get("SBATCH_SIGNAL") or (options[-1] if options else "")
    match = re.fullmatch(r"(?:([RB]+):)?(?:SIG)?(\w+)(?:@\d+)?", option)
    if not match or ("B" in (match[1] or "")) == in_step:
        return
    number = int(match[2]) if match[2].isdigit() else getattr(signal, f"SIG{match[2]}", 0)
    status = (started / "status").read_text(encoding="utf-8", errors="replace")
    heeded = 0  # a bit for each signal that does not kill
    for field in ("SigCgt", "SigIgn"):
        heeded |= int(re.search(rf"^{field}:\s*(\w+)", status, re.MULTILINE)[1], 16)
    if number and not heeded >> (number - 1) & 1:
        starter = "the batch shell"
        if in_step:
            starter = (started / "comm").read_text(encoding="utf-8", errors="replace").strip()
        raise InputError(
            f"this job's --signal={option} would kill {starter}, which started Python,"
            " and Python would not get it: write `exec python ...` into the batch script,"
            " or `srun python ...` with --signal=USR1@120"
        )


def _end_with_parent() -> None:
    # torchrun and the shell of a Slurm job may be killed; Linux then asks this process to save and
    # leave.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def peer_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank exited or hangs."""
    # gloo has no exception of its own.
    of_group = isinstance(error, td.DistError) or "gloo" in str(error).lower()
    return of_group and not thread_limit(error)


def lost_peer(error: RuntimeError) -> str:
    """What to tell the user of such a failure."""
    reason = str(error).split("\n")[0].split(". ")[0][-120:]  # gloo goes on with advice
    return f"another rank exited or hangs ({reason}); its own output says why. {AGAIN}"


def close() -> None:
    """Leave the group of processes."""
    if td.is_initialized():
        td.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise InputError(f"--device received {name!r}, allowed auto, cpu, cuda, cuda:N, mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: this machine has no Apple GPU; use --device auto or cpu")
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name[5:]) if ":" in name else local_rank % max(count, 1)
        if index >= count:
            gpus = plural(count, "GPU")
            raise InputError(f"--device {name}: this process sees {gpus}; use --device auto or cpu")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name)


def parallel() -> bool:
    """Whether there is more than one rank."""
    return td.is_available() and td.is_initialized() and td.get_world_size() > 1


def launched_first() -> bool:
    """Whether the launcher calls this process rank 0, also where no group is formed."""
    return not int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def rank() -> int:
    """This process's rank."""
    return td.get_rank() if parallel() else 0


def all_gather_rows(x: Tensor) -> Tensor:
    """Rows (n, ...) of every rank, in their order: (world_size * n, ...). Not differentiable."""
    if not parallel():
        return x
    out = x.new_empty((td.get_world_size() * x.shape[0], *x.shape[1:]))
    # Newer PyTorch warns, on the console of every rank, of the name that older ones have alone.
    gather = getattr(td, "all_gather_single", td.all_gather_into_tensor)
    gather(out, x.contiguous())
    return out


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """Sum or maximum ("max") of a tensor over the ranks, in place."""
    if parallel():
        td.all_reduce(x, td.ReduceOp.MAX if op == "max" else td.ReduceOp.SUM)
    return x


def mean(x: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, a new tensor."""
    return all_reduce(x.detach().clone()) / (td.get_world_size() if parallel() else 1)


def broadcast(value):
    """Rank 0's value, anything that pickles, on every rank."""
    values = [value]
    if parallel():
        td.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for all ranks."""
    if parallel():
        td.barrier()


def shard(indices: np.ndarray, world: Dist) -> np.ndarray:
    """This rank's equal share of `indices` (n,): ceil(n / world_size) of them.

    Where they do not come out even, the first ones are repeated at the end.
    """
    size = -(-len(indices) // world.world_size)
    return np.resize(indices, size * world.world_size)[world.rank * size :][:size]


def unshard(rows: Tensor, count: int) -> Tensor:
    """Rows computed for `shard(indices)` on each rank, in the order of the `count` indices."""
    return all_gather_rows(rows)[:count]


def wrap(model: nn.Module, world: Dist) -> nn.Module:
    """The model whose gradients are averaged over the ranks; in one process the model itself.

    Buffers are not broadcast: `sync_batchnorm` keeps the statistics equal on all ranks.
    """
    if world.world_size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    # torch renamed the option; the old name warns in newer versions.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    option = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **option)


def unwrap(model: nn.Module) -> nn.Module:
    """The model that `wrap` got."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        td.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, dx):
        dx = dx.contiguous().clone()
        td.all_reduce(dx)
        return dx


class RankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose statistics are those of the batch over all ranks, on any device.

    torch.nn.SyncBatchNorm does the same on GPUs and refuses CPU tensors. Mean first, then the
    squared deviations: two small reductions, and no cancellation in E[x^2] - E[x]^2. Every rank
    must hold the same number of rows.
    """

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, received {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * td.get_world_size()
        own_sum = x.float().sum(axes) if x.dtype.itemsize < 4 else x.sum(axes)
        batch_mean = _SumOverRanks.apply(own_sum) / count
        centered = x - batch_mean.view(shape)
        var = _SumOverRanks.apply(centered.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(batch_mean.to(self.running_mean.dtype), self.momentum)
            unbiased = var * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        return (centered * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def sync_batchnorm(module: nn.Module, world: Dist) -> nn.Module:
    """The module with every BatchNorm taken over all ranks; state-dict keys do not change."""
    if world.world_size == 1:
        return module
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            synced = RankBatchNorm(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            synced.to(child.weight.device, child.weight.dtype)
            setattr(module, name, synced)
        else:
            sync_batchnorm(child, world)
    return module
