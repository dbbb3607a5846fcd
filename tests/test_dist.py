"""Several gloo processes compute what one does; launcher variables; BatchNorm over processes."""

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as td
import torch.multiprocessing as mp
from torch import nn

from common import metrics
from common.errors import InputError, Stopped, exit_codes
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
    warnings.simplefilter("error")  # on the console they bury how a run ends
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


@pytest.fixture
def launcher(monkeypatch):
    """Sets the variables of a launcher, and no others, with a free port for rank 0."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_")) or name.endswith(RANKS):
            monkeypatch.delenv(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own_port = free.getsockname()[1]

    def describe(text):
        for pair in f"MASTER_ADDR=127.0.0.1 MASTER_PORT={own_port} {text}".split():
            name, _, value = pair.partition("=")
            monkeypatch.setenv(name, value)

    return describe


RANKS = ("RANK", "WORLD_SIZE")
STEP = "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_PROCID=0 SLURM_LOCALID=0"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ("RANK=0", "WORLD_SIZE is not set"),
        ("WORLD_SIZE=2", "RANK is not set, allowed 0 to 1"),
        ("RANK=2 WORLD_SIZE=2", "RANK received '2', allowed 0 to 1"),
        ("RANK=-1 WORLD_SIZE=2", "RANK received '-1'"),
        ("RANK=1.5 WORLD_SIZE=2", "RANK received '1.5'"),
        ("RANK= WORLD_SIZE=2", "RANK received ''"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE received '0'"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE received 'two'"),
        ("RANK=0 WORLD_SIZE=" + 30 * "9", "WORLD_SIZE received '999"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=a", "LOCAL_RANK received 'a'"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK received '2'"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=", "MASTER_ADDR is not set"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=", "MASTER_PORT received ''"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=http", "MASTER_PORT received 'http'"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=70000", "MASTER_PORT received '70000'"),
        ("SLURM_STEP_ID=0", "SLURM_STEP_NUM_TASKS is not set"),
        ("SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID is not set"),
        (f"{STEP} SLURM_PROCID=4", "SLURM_PROCID received '4', allowed 0 to 3"),
        (f"{STEP} SLURM_STEP_NUM_TASKS=x", "SLURM_STEP_NUM_TASKS received 'x'"),
        (f"{STEP} SLURM_LOCALID=x", "SLURM_LOCALID received 'x'"),
        (f"{STEP} SLURM_STEP_NODELIST=n[a-b]", "SLURM_STEP_NODELIST received n[a-b]: "),
        (f"{STEP} SLURM_STEP_NODELIST=n[1-999999999999]", "SLURM_STEP_NODELIST received n[1-9"),
        (f"{STEP} SLURM_TASK_PID=1 SLURM_PTY_PORT=4", "one of 4 tasks of `srun --pty`"),
    ],
)
def test_variables_of_a_launcher_that_make_no_sense_are_refused_by_name(variables, said, launcher):
    launcher(variables)
    with pytest.raises(InputError, match=re.escape(said)):
        dist.init("cpu", meet_s=0.1)


@pytest.mark.parametrize("variables", ["RANK=0 WORLD_SIZE=4", STEP])
def test_processes_that_do_not_come_are_waited_for_and_named(variables, launcher):
    launcher(variables)
    with pytest.raises(InputError) as error:
        dist.init("cpu", meet_s=0.1)
    said = str(error.value)
    assert re.search(r"rank 0 of 4 cannot meet the others at 127\.0\.0\.1:\d+: 1 of 4 came", said)
    assert "missing: rank 1, 2, 3;" in said and "--timeout" in said and "\n" not in said


def test_a_rank_that_finds_no_rank_0_says_where_it_looked(launcher, capfd):
    launcher("RANK=1 WORLD_SIZE=2")
    with pytest.raises(InputError, match=r"rank 1 of 2 .* 127\.0\.0\.1:\d+: no answer .*refused"):
        dist.init("cpu", meet_s=0.1)
    assert capfd.readouterr().err == ""  # no trace of C++


def _init(process, numbers, folder):
    os.environ["RANK"] = numbers[process]
    try:
        dist.init("cpu", meet_s=1 if len(set(numbers)) == len(numbers) else 60)
    except InputError as error:
        (folder / f"said{process}").write_text(str(error))


@pytest.mark.parametrize(
    ("numbers", "heard"), [("01", "2 of 3 came"), ("011", "two processes are rank 1")]
)
def test_ranks_that_are_there_hear_what_is_wrong(numbers, heard, launcher, tmp_path, capfd):
    launcher("WORLD_SIZE=3")
    mp.start_processes(_init, (numbers, tmp_path), len(numbers), start_method="fork")
    said = [(tmp_path / f"said{process}").read_text() for process in range(len(numbers))]
    assert all(heard in text and "\n" not in text for text in said), said
    assert capfd.readouterr().err == ""  # no trace of C++


def _greet(server):
    with contextlib.suppress(OSError):  # the test has closed it
        while True:
            server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("speaks", [False, True])
def test_what_answers_at_the_port_and_is_no_rank_0_is_left_in_time(speaks, launcher):
    with socket.create_server(("127.0.0.1", 0)) as other:
        if speaks:
            threading.Thread(target=_greet, args=[other], daemon=True).start()
        launcher(f"RANK=1 WORLD_SIZE=2 MASTER_PORT={other.getsockname()[1]}")
        code = "from common.run import dist; dist._GRACE = 0; dist.init('cpu', meet_s=1)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "error: rank 1 of 2 has not joined the others" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        RuntimeError("gloo: Resource temporarily unavailable"),
        BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
    ],
)
def test_a_limit_of_processes_is_named_as_that(error, launcher, monkeypatch, capsys):
    """As root no such limit holds: what Python and torch raise there is raised in their place."""
    launcher("RANK=0 WORLD_SIZE=2")

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(dist, "_meet", lambda *_: None)
    monkeypatch.setattr(td, "init_process_group", refuse)
    with pytest.raises(SystemExit) as ending, exit_codes():
        dist.init("cpu")
    said = capsys.readouterr().err
    assert ending.value.code == 2 and said.count("\n") == 1
    assert "ulimit -u" in said and "--workers" in said
