"""torchrun, Slurm or one process: the same facts; gathers and BatchNorm over the processes.

Every function also works in one process, where it does nothing.
"""

import inspect
import os
import re
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.config import InputError


@dataclass(frozen=True)
class Facts:
    """Which process this is, out of how many, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def init(device: str = "auto", timeout_s: float = 1800) -> Facts:
    """Join the group of processes that the launcher describes: torchrun's variables, a Slurm job step, or neither.

    The shell of an sbatch script has Slurm's rank variables too, but only a job step (`srun`) has several processes.

    Raises:
        InputError: the device is not there.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    elif "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        rank, world_size, local_rank = (int(env[f"SLURM_{n}"]) for n in ("PROCID", "NTASKS", "LOCALID"))
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        # A port of the job's own, so that two jobs on one node do not meet.
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 40000))
    else:
        rank, world_size, local_rank = 0, 1, 0
    place = _device(device, local_rank)
    if world_size > 1 and not td.is_initialized():
        backend = "nccl" if place.type == "cuda" else "gloo"
        td.init_process_group(
            backend,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=place if place.type == "cuda" else None,
        )
    return Facts(rank, world_size, local_rank, place)


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
            raise InputError(f"--device {name}: this process sees {count} GPUs; use --device auto or cpu")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `node[03-05,9],gpu1` gives `node03`."""
    head = re.match(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", nodelist).group()
    return re.sub(r"\[([^\]]*)\]", lambda m: re.split(r"[,-]", m.group(1))[0], head)


def parallel() -> bool:
    return td.is_available() and td.is_initialized() and td.get_world_size() > 1


def all_gather_rows(x: Tensor) -> Tensor:
    """Rows (n, ...) of every process, in rank order: (world_size * n, ...). Not differentiable."""
    if not parallel():
        return x
    out = x.new_empty((td.get_world_size() * x.shape[0], *x.shape[1:]))
    td.all_gather_into_tensor(out, x.contiguous())
    return out


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    """Sum or maximum of a tensor over the processes, in place."""
    if parallel():
        td.all_reduce(x, td.ReduceOp.MAX if op == "max" else td.ReduceOp.SUM)
    return x


def mean(x: Tensor) -> Tensor:
    """Mean of a tensor over the processes, a new tensor."""
    return all_reduce(x.detach().clone()) / (td.get_world_size() if parallel() else 1)


def barrier() -> None:
    if parallel():
        td.barrier()


def shard(indices: np.ndarray, facts: Facts) -> np.ndarray:
    """This process's equal share of `indices` (n,): ceil(n / world_size) of them, the last ones repeated."""
    size = -(-len(indices) // facts.world_size)
    return np.resize(indices, size * facts.world_size)[facts.rank * size :][:size]


def unshard(rows: Tensor, count: int) -> Tensor:
    """Rows computed for `shard(indices)` on each process, back in the order of the `count` indices."""
    return all_gather_rows(rows)[:count]


def wrap(model: nn.Module, facts: Facts) -> nn.Module:
    """The model whose gradients are averaged over the processes; in one process the model itself.

    Buffers are not broadcast: `sync_batchnorm` keeps the statistics equal on all processes.
    """
    if facts.world_size == 1:
        return model
    ids = [facts.device.index] if facts.device.type == "cuda" else None
    # torch renamed the option; the old name warns in newer versions.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    option = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **option)


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
    """BatchNorm whose statistics are those of the batch over all processes, on any device.

    torch.nn.SyncBatchNorm does the same on GPUs and refuses CPU tensors. Mean first, then the squared deviations:
    two small reductions, and no cancellation in E[x^2] - E[x]^2. Every process must hold the same number of rows.
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
        mean = _SumOverRanks.apply(x.float().sum(axes) if x.dtype.itemsize < 4 else x.sum(axes)) / count
        centred = x - mean.view(shape)
        var = _SumOverRanks.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def sync_batchnorm(module: nn.Module, facts: Facts) -> nn.Module:
    """The module with every BatchNorm taken over all processes; state-dict keys do not change."""
    if facts.world_size == 1:
        return module
    if facts.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            synced = RankBatchNorm(child.num_features, child.eps, child.momentum)
            synced.load_state_dict(child.state_dict())
            synced.to(child.weight.device, child.weight.dtype)
            setattr(module, name, synced)
        else:
            sync_batchnorm(child, facts)
    return module
