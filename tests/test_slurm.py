"""Jobs of a real Slurm that run out of time, are requeued, killed or canceled end as one that
nothing interrupted.
"""

import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest

from common.run import dist
from tests import slurm_cluster
from tests.data import image_folder, rows_npz
from tests.runs import equal_runs
from tests.slurm_cluster import until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        bool(slurm_cluster.missing()),
        reason=f"needs a real Slurm, as root: {slurm_cluster.INSTALL}",
    ),
]
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().split("## In Slurm")[1].split("\n## ")[0]
MANUAL = (ROOT / "docs" / "slurm.md").read_text()


@pytest.fixture(scope="module")
def cluster():
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        slurm_cluster.Cluster(Path(folder)) as cluster,
    ):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        cluster.env |= {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
        yield cluster


@pytest.fixture(scope="module")
def folder(cluster):
    runs = cluster.folder / "runs"  # not pytest's folder, which is kept: these are gigabytes
    runs.mkdir()
    return runs


@pytest.fixture(scope="module")
def command(folder):
    """A run of some seconds: 600 steps in two stages, saved often, so that whatever stops it finds
    a checkpoint.
    """
    flags = (
        "--bs 32 --cluster-bs 32 --base-dim 16 --epochs 96 --cluster-epochs 24 --log-every 1"
        " --save-every 0.001"
    )
    return ["train_cluster.py", "--data", str(rows_npz(folder / "tiny.npz")), *flags.split()]


def alone(cluster, out, *command):
    """The run that nothing interrupts, outside of Slurm."""
    subprocess.run(
        [sys.executable, *command, "--out", out],
        cwd=ROOT,
        env=cluster.env,
        check=True,
        capture_output=True,
    )
    return out


@pytest.fixture(scope="module")
def one_process(cluster, folder, command):
    return alone(cluster, folder / "one_process", *command)


def submit(cluster, out, *words, cwd=ROOT):
    """Give sbatch the words: its options, the script, the script's arguments; returns the job's
    number.
    """
    return cluster.run("sbatch", "--parsable", f"--output={out}.txt", *map(str, words), cwd=cwd)


def script(folder, name, *lines):
    """A batch script that a user may write instead of those in slurm/."""
    file = folder / f"{name}.sbatch"
    file.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    return file


def said(out):
    return Path(f"{out}.txt").read_text()


def lines(out):
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


@contextmanager
def frozen(cluster, job, out, count=20):
    """Stop a job's processes when its log has so many lines, and let them go on afterwards."""
    until(lambda: lines(out) >= count, f"{count} lines of job {job}")
    processes = cluster.processes(job)
    for process in processes:
        os.kill(process, SIGSTOP)
    until(
        lambda: all(status(process, "State").startswith("T") for process in processes),
        f"a stop of job {job}",
    )
    assert processes, (cluster.facts(job), said(out))
    try:
        yield processes
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, SIGCONT)


@pytest.fixture(scope="module")
def background(cluster, folder, command):
    """What takes long goes on while the other tests run: two jobs until their time is over, and the
    array.
    """
    by_shell = script(
        folder, "limit", "#SBATCH --signal=USR1@120 --open-mode=append", 'python "$@"'
    )

    def out_of_time(name, minutes, *words):
        out = folder / name
        job = submit(cluster, out, *words, *command, "--out", out)
        with frozen(cluster, job, out):
            passed = cluster.run("squeue", "-h", "-o", "%M", "-j", job).split(
                ":"
            )  # [hours,] minutes, seconds
            cluster.run(
                "scontrol", "update", f"JobId={job}", f"TimeLimit={int(passed[-2]) + minutes}"
            )
            # Slurm lets stopped processes go on when it signals them.
            until(lambda: not cluster.processes(job), f"the end of {name}")
        return job, out

    with ThreadPoolExecutor() as pool:
        yield {
            "signal": pool.submit(out_of_time, "signal", 3, "slurm/train.sbatch"),
            "limit": pool.submit(out_of_time, "limit", 1, by_shell),
            "array": pool.submit(array, cluster, folder),
        }


def array(cluster, folder):
    """The README's array of cells on tiny images, the first one requeued on its way: [(run, the
    same cell alone)].
    """
    names = [f"{'ab'[number % 2]}/{number}.png" for number in range(120)]
    data = image_folder(folder / "images", names, width=32, height=32)
    flags = f"--data {data} --epochs 1 --workers 1"
    here = (
        folder / "here"
    )  # run directories follow from the flags and lie below the folder that the job starts in
    here.mkdir()
    for name in ("train_simclr.py", "slurm"):
        (here / name).symlink_to(ROOT / name)
    line = next(
        line for line in README.splitlines() if line.startswith("sbatch --array")
    ).partition(" #")[0]
    words = line.removeprefix("sbatch ").replace("--data cells.zip", flags).split()
    job = submit(cluster, folder / "cells-%a", *words, cwd=here)

    def runs():
        files = (here / "runs" / "simclr").glob("*/config.json")
        return {json.loads(file.read_text())["grid_index"]: file.parent for file in files}

    until(lambda: 0 in runs(), "the first cell")
    first = cluster.facts(f"{job}_0")["JobId"]
    with frozen(cluster, first, runs()[0], count=1):
        cluster.run("scancel", "--batch", "--signal=USR1", first)
    cells = (
        "for cell in '0123': train_simclr.main([*sys.argv[1:], '--cell', cell, '--out',"
        " f'alone/{cell}'])"
    )
    program = f"import sys, train_simclr\n{cells}"
    subprocess.run(
        [sys.executable, "-c", program, *flags.split()], cwd=here, env=cluster.env, check=True
    )
    cluster.start_again(first)
    for cell in range(4):
        assert cluster.wait(f"{job}_{cell}", "COMPLETED")["Restarts"] == str(int(cell == 0))
    return [(runs()[cell], here / "alone" / str(cell)) for cell in range(4)]


def status(process, name):
    """A field of what Linux knows of a process."""
    return re.search(
        rf"^{name}:\s*(.*)", Path(f"/proc/{process}/status").read_text(), re.MULTILINE
    )[1]


def test_hosts_of_node_lists_are_those_that_scontrol_shows(cluster, background):
    rng = random.Random(0)

    def numbers():
        low, width = rng.randrange(rng.choice([10, 120, 12000])), rng.choice([0, 0, 2, 3, 5])
        high = f"-{low + rng.randrange(6):0{rng.choice([0, width])}d}" if rng.random() < 0.5 else ""
        return f"{low:0{width}d}{high}"

    def name():
        text = rng.choice(["n", "node", "gpu-a100-", "c1001a-s", "rack7n", "x9-", "dgx.", "a_b"])
        for group in range(rng.choice([0, 1, 1, 1, 2, 3])):
            text += rng.choice(["", "r", "-", "n0", "x"]) if group else ""
            text += f"[{','.join(numbers() for _ in range(rng.randint(1, 3)))}]"
        return text if "[" in text else f"{text}{rng.choice(['', '7', '007'])}"

    lists = [",".join(name() for _ in range(rng.randint(1, 4))) for _ in range(2000)]
    for start in range(0, len(lists), 50):
        some = lists[start : start + 50]
        shown = cluster.run("scontrol", "show", "hostnames", ",separator,".join(some))
        assert [dist.hosts(each) for each in some] == [
            part.split() for part in shown.split("separator")
        ]


def test_a_requeued_job_goes_on(cluster, folder, command, one_process):
    """One process, and two on one node; at the same time two on two nodes, without a break, share
    that node.
    """
    options = {
        "train": [],
        "node": ["--ntasks-per-node=2", "--gres=gpu:2"],
        "nodes": ["--ntasks-per-node=1"],
    }
    jobs = {}
    for form, words in options.items():
        out = folder / form
        jobs[form] = submit(cluster, out, *words, f"slurm/{form}.sbatch", *command, "--out", out)
    for form in ("train", "node"):
        with frozen(cluster, jobs[form], folder / form):
            cluster.run(
                "scancel", *(["--batch"] if form == "train" else []), "--signal=USR1", jobs[form]
            )
    for form in ("train", "node"):
        cluster.start_again(jobs[form])
    for form, job in jobs.items():
        assert cluster.wait(job, "COMPLETED")["Restarts"] == str(int(form != "nodes"))
        requeued = f"job {job} is requeued" in said(folder / form) and "resuming from step" in said(
            folder / form
        )
        assert requeued == (form != "nodes")
    equal_runs(folder / "train", one_process)
    equal_runs(folder / "node", folder / "nodes")
    assert "2 processes" in said(folder / "nodes")


def test_slurm_takes_the_commands_of_the_readme(cluster):
    commands = [
        line.partition(" #")[0] for line in README.splitlines() if line.startswith("sbatch ")
    ]
    assert {file.name for file in (ROOT / "slurm").iterdir()} == {
        Path(re.search(r"\S+\.sbatch", c)[0]).name for c in commands
    }
    for command in commands:
        cluster.run(*command.replace("sbatch", "sbatch --test-only", 1).split(), cwd=ROOT)


def test_a_job_that_is_ended_goes_on(cluster, folder, command, one_process):
    """scancel saves and does not come back by itself; KILL leaves the last checkpoint; Slurm itself
    requeues.
    """
    ends = {
        "cancel": "scancel",
        "kill": "scancel --batch --signal=KILL",
        "requeue": "scontrol requeue",
    }
    outs = {name: folder / name for name in ends}
    jobs = {
        name: submit(cluster, out, "slurm/train.sbatch", *command, "--out", out)
        for name, out in outs.items()
    }
    for name, job in jobs.items():
        with frozen(cluster, job, outs[name], 40):
            cluster.run(*ends[name].split(), job)
    cluster.start_again(jobs["requeue"])
    for name in ("cancel", "kill"):
        assert cluster.wait(jobs[name], "CANCELLED", "FAILED")["Restarts"] == "0"
        assert not cluster.processes(jobs[name])
        jobs[name] = submit(
            cluster, outs[name], "slurm/train.sbatch", *command, "--out", outs[name]
        )
    for name, out in outs.items():
        cluster.wait(jobs[name], "COMPLETED")
        assert ("saved at" in said(out)) == (name != "kill") and "resuming from step" in said(out)
        equal_runs(out, one_process)


def test_without_scontrol_a_chain_of_jobs_goes_on(cluster, folder, command, one_process):
    """As in a container, where the signal ends in exit code 75; the manual's line, word for word
    but for the run.
    """
    out, tools = folder / "chain", folder / "tools"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)
    chain = next(line for line in MANUAL.splitlines() if line.startswith("after="))
    run = "train_simclr.py --backbone resnet50 --bs 256"
    assert chain.count(run) == 1
    environment = cluster.env | {
        "SBATCH_EXPORT": f"ALL,PATH={tools}",
        "SBATCH_OUTPUT": f"{out}.txt",
    }
    before = cluster.jobs()
    words = chain.replace(run, shlex.join([*command, "--out", str(out)]))
    subprocess.run(["bash", "-euc", words], cwd=ROOT, env=environment, check=True)
    first, second, third = sorted(cluster.jobs() - before, key=int)
    with frozen(cluster, first, out):
        cluster.run("scancel", "--batch", "--signal=USR1", first)
    assert cluster.wait(first, "FAILED")["ExitCode"] == "75:0"
    cluster.wait(second, "COMPLETED")
    cluster.wait(third, "CANCELLED", "COMPLETED")
    assert "Run the same command again" in said(out)
    equal_runs(out, one_process)


def test_a_signal_that_would_not_reach_python_is_refused(cluster, folder):
    """Shells and torchrun that would die of it; a shell that handles it may start Python as it
    likes.
    """
    program = folder / "start.py"
    program.write_text(
        "from common.errors import exit_codes\n"
        "from common.run import dist\n"
        "with exit_codes():\n"
        "    dist.init('cpu')\n"
    )
    start = f"python {program}"
    torchrun = (
        "python -m torch.distributed.run --nproc-per-node=1 --master-addr=127.0.0.1"
        " --master-port=19998"
    )
    scripts = {
        "shell": ["#SBATCH --signal=B:USR1@120", start],
        "step": ["#SBATCH --signal=USR1@120", f"srun --ntasks=1 bash -c '{start}; exit'"],
        "torchrun": ["#SBATCH --signal=USR1@120", f"srun --ntasks=1 {torchrun} {program}"],
        "trap": ["#SBATCH --signal=B:USR1@120", "trap 'kill -USR1 $!' USR1", f"{start} & wait $!"],
        "late": ["#SBATCH --signal=USR1@120", start],
        "none": [start],
    }
    jobs = {
        name: submit(cluster, folder / name, script(folder, name, *lines))
        for name, lines in scripts.items()
    }
    for name, job in jobs.items():
        refused = name in ("shell", "step", "torchrun")
        cluster.wait(job, "FAILED" if refused else "COMPLETED")
        assert ("error: this job's --signal" in said(folder / name)) == refused, said(folder / name)


def test_python_does_not_outlive_its_shell(cluster, folder, command, one_process):
    out = folder / "orphan"
    job = submit(
        cluster, out, script(folder, "orphan", 'python "$@"; true'), *command, "--out", out
    )
    with frozen(cluster, job, out, 40) as (process, *_):
        os.kill(int(status(process, "PPid")), SIGKILL)
    until(lambda: not cluster.processes(job), "the end of Python")
    job = submit(cluster, out, "slurm/train.sbatch", *command, "--out", out)
    cluster.wait(job, "COMPLETED")
    assert "resuming from step" in said(out)
    equal_runs(out, one_process)


def test_an_array_of_cells_gives_what_the_cells_give_alone(background):
    for run, alone in background["array"].result():
        equal_runs(run, alone)


def test_a_job_out_of_time_goes_on(cluster, command, background, one_process):
    """The signal before the time limit requeues; where a shell is in its way, TERM at the limit
    saves.
    """
    job, out = background["signal"].result()
    cluster.start_again(job)
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    assert f"job {job} is requeued" in said(out)
    equal_runs(out, one_process)
    job, out = background["limit"].result()
    cluster.wait(job, "TIMEOUT", "FAILED")
    assert "saved at" in said(out)
    job = submit(cluster, out, "slurm/train.sbatch", *command, "--out", out)
    cluster.wait(job, "COMPLETED")
    equal_runs(out, one_process)
