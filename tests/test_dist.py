"""Several gloo processes compute what one does; launcher variables; BatchNorm over processes."""

import shutil
import socket

import numpy as np
import pytest
import torch
import torch.distributed as td
import torch.multiprocessing as mp
from torch import nn

from common import metrics
from common.errors import InputError, Stopped
from common.run import checkpoint, dist
from common.run.evaluation import Evaluation
from common.run.log import Log
from common.run.progress import Progress
from common.run.signals import Signals
from kernels import nt_xent


def ranks(tmp_path, world_size, work, *args):
    """Run `work(world, *args)` in so many forked gloo processes; returns what each returned."""
    rendezvous = f"file://{tmp_path}/rendezvous{world_size}"
    mp.start_processes(
        _rank, (world_size, rendezvous, tmp_path, work, args), world_size, start_method="fork"
    )
    return [torch.load(tmp_path / f"out{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(rank, world_size, rendezvous, folder, work, args):
    torch.set_num_threads(1)
    td.init_process_group("gloo", rendezvous, rank=rank, world_size=world_size)
    world = dist.Dist(rank, world_size, torch.device("cpu"))
    torch.save(work(world, *args), folder / f"out{rank}.pt")
    td.destroy_process_group()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc, self.bn1 = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.bn1(self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


def contrastive_gradients(world, views, dtype):
    """Gradients, BatchNorm buffers and mean loss of a SimCLR step on this process's share of the
    views (2, n, ...).
    """
    torch.manual_seed(0)
    model = dist.sync_batchnorm(Net().to(dtype), world)
    share = views.shape[1] // world.world_size
    mine = views[:, world.rank * share : (world.rank + 1) * share].to(dtype)
    trained = dist.wrap(model, world)  # must live until the backward pass, which it averages
    z_a, z_b = trained(mine.flatten(0, 1)).chunk(2)
    gather = dist.all_gather_rows if world.world_size > 1 else None
    loss = nt_xent(z_a, z_b, 0.2, gather=gather)
    loss.backward()
    out = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return out | {"loss": dist.all_reduce(loss.detach().clone()) / world.world_size}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_give_the_gradients_of_one(tmp_path, world_size, dtype, tolerance):
    views = torch.randn(
        2, 8, 3, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    alone = contrastive_gradients(dist.Dist(0, 1, torch.device("cpu")), views, dtype)
    for result in ranks(tmp_path, world_size, contrastive_gradients, views, dtype):
        assert result.keys() == alone.keys()
        for name, value in alone.items():
            assert float((result[name] - value).abs().max()) <= tolerance * float(
                value.abs().max()
            ), name


def gathers(world, _):
    rows = torch.arange(3, dtype=torch.float32)[:, None] + 10 * world.rank
    indices = np.arange(100, 107)
    own = dist.shard(indices, world)
    back = dist.unshard(torch.from_numpy(own).float(), len(indices))
    most = dist.all_reduce(torch.tensor(world.rank), "max")
    return {
        "rows": dist.all_gather_rows(rows),
        "back": back,
        "most": most,
        "own": torch.tensor(len(own)),
    }


def test_gathers_keep_the_order_and_uneven_shares_are_padded(tmp_path):
    for result in ranks(tmp_path, 3, gathers, None):
        assert result["rows"].flatten().tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
        assert result["back"].tolist() == list(range(100, 107))
        assert (result["most"].item(), result["own"].item()) == (2, 3)


def video_metrics(world, target, scores):
    clips = scores.reshape(-1)
    own = dist.shard(np.arange(len(clips)), world)
    gathered = dist.unshard(torch.from_numpy(clips[own]), len(clips)).numpy().reshape(scores.shape)
    means = gathered.mean(1)
    low, high = metrics.auc_interval(target, means, seed=0)
    values = metrics.detection(target, means) | {"low": low, "high": high}
    values |= {
        f"clip_{name}": value
        for name, value in metrics.detection(target.repeat(5), gathered.ravel()).items()
    }
    values |= {"threshold": metrics.best_threshold(target, means)}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def test_metrics_of_uneven_data_are_bitwise_those_of_one_process(tmp_path):
    target = np.arange(7) % 2
    scores = np.round(np.random.default_rng(0).random((7, 5)), 1)  # 35 clips, with ties
    alone = video_metrics(dist.Dist(0, 1, torch.device("cpu")), target, scores)
    for world_size in (2, 3):
        for result in ranks(tmp_path, world_size, video_metrics, target, scores):
            assert result == alone


def evaluates(world, folder, stop_at):
    """Rows of 11 items by this start, and how many batches each of two evaluations was left with.

    Both are the same on all ranks, where rank 1 alone is signaled at its batch `stop_at`; the first
    is of shares, the second every rank does in whole.
    """
    torch.manual_seed(0)
    model, log, asked = nn.Linear(1, 2), Log(folder, main=world.is_main), Signals()
    asked.defer()
    parts = {"model": model}
    options = dict(model_spec={}, start="", save_every=10, max_steps=None)
    progress = Progress(folder, "s", parts=parts, log=log, world=world, signals=asked, **options)
    progress.restore(checkpoint.load_newest(folder))
    indices, left, rows, done = np.arange(11), [], [], 0
    dist.barrier()
    try:
        for share, count in ((dist.shard(indices, world), len(indices)), (indices, None)):
            with Evaluation(progress, model, np.array_split(share, 3)) as evaluation:
                left.append(len(evaluation.left))
                for items in evaluation.left:
                    done += 1
                    if world.rank == world.world_size - 1 and done == stop_at:
                        asked.asked = Signals.END
                    evaluation.add(model(torch.from_numpy(items).float()[:, None]).detach())
            rows.append(evaluation.rows(count))
    except Stopped as stop:
        assert stop.code == 75
    return {"left": torch.tensor(left), "rows": torch.stack(rows) if len(rows) == 2 else None}


@pytest.mark.parametrize(("stop_at", "left"), [(2, [1, 3]), (3, [0, 3]), (5, [0, 1]), (6, [0, 0])])
def test_an_evaluation_of_several_ranks_goes_on_on_all_of_them(tmp_path, stop_at, left):
    def run(world_size, folder, stop_at=0):
        (tmp_path / f"rendezvous{world_size}").unlink(missing_ok=True)
        (tmp_path / folder).mkdir(exist_ok=True)
        results = ranks(tmp_path, world_size, evaluates, tmp_path / folder, stop_at)
        assert all(torch.equal(results[0]["left"], result["left"]) for result in results)
        return results

    whole = run(2, "whole")[0]
    assert whole["left"].tolist() == [3, 3] and whole["rows"].shape == (2, 11, 2)
    assert run(2, "cut", stop_at)[1]["rows"] is None
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    for result in run(2, "cut"):
        assert result["left"].tolist() == left and torch.equal(result["rows"], whole["rows"])
    for result in run(3, "other"):  # its shares are others; what all do in whole goes on
        assert result["left"].tolist() == [3, left[1]]
        assert torch.equal(result["rows"], whole["rows"])


def test_rank_batchnorm_keeps_the_keys_and_evaluates_as_torch_does():
    world = dist.Dist(0, 2, torch.device("cpu"))
    plain = Net()
    synced = dist.sync_batchnorm(Net(), world)
    assert list(synced.state_dict()) == list(plain.state_dict())
    assert isinstance(synced.bn, dist.RankBatchNorm) and isinstance(synced.bn1, dist.RankBatchNorm)
    synced.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(synced.eval()(x), plain.eval()(x))


def test_one_process_needs_no_group():
    world = dist.Dist(0, 1, torch.device("cpu"))
    x = torch.randn(3, 2)
    model = Net()
    assert (
        dist.all_gather_rows(x) is x
        and dist.wrap(model, world) is model
        and dist.sync_batchnorm(model, world) is model
    )
    assert dist.shard(np.arange(5), world).tolist() == [0, 1, 2, 3, 4]


def test_the_shell_of_an_sbatch_script_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("SLURM_JOB_ID", "7"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_PROCID", "0"),
        ("SLURM_LOCALID", "0"),
    ):
        monkeypatch.setenv(name, value)
    assert dist.init("cpu") == dist.Dist(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("node7", "node7"),
        ("node[03-05,9],gpu1", "node03 node04 node05 node9 gpu1"),
        ("a[1,4]b[007-9],c", "a1b007 a1b008 a1b009 a4b007 a4b008 a4b009 c"),
        ("c1001a-s[11,17],x-1", "c1001a-s11 c1001a-s17 x-1"),
        ("n[1-2]x[1-2]y[3]", "n1x1y3 n2x1y3 n1x2y3 n2x2y3"),
    ],
)
def test_hosts_of_a_node_list(nodelist, hosts):
    assert dist.hosts(nodelist) == hosts.split()


def test_jobs_and_steps_that_share_a_node_have_ports_of_their_own():
    ports = [dist.port(job, step) for job in range(70_000, 70_100) for step in range(100)]
    assert len(set(ports)) == len(ports) and min(ports) >= 20000 and max(ports) < 32768
    assert len({dist.port(job, 0) for job in range(12_763)}) == 12_763


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match=device):
        dist.init(device)


def test_processes_that_do_not_come_are_waited_for_and_named(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in (where | {"RANK": "0", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"rank 0 cannot meet the others at 127\.0\.0\.1"):
        dist.init("cpu", timeout_s=1)
