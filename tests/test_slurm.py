"""Jobs of a real Slurm that run out of time, are requeued, killed or cancelled end as one that nothing interrupted."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from common import dist
from tests import slurm_cluster
from tests.runs import equal_runs
from tests.slurm_cluster import until

pytestmark = pytest.mark.skipif(
    bool(slurm_cluster.missing()), reason=f"needs a real Slurm, as root: {slurm_cluster.INSTALL}"
)
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().split("## In Slurm")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    with slurm_cluster.Cluster(folder) as cluster:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        cluster.env |= {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def command(folder):
    """A run of a few seconds: 240 steps in two stages."""
    rng = np.random.default_rng(0)
    label = np.arange(200) % 4
    centres = rng.normal(size=(4, 16))
    np.savez(
        folder / "tiny.npz",
        text=(centres[label] + rng.normal(size=(200, 16))).astype("f4"),
        timing=(centres[label, :8] + 2 * rng.normal(size=(200, 8))).astype("f4"),
        label=label,
    )
    flags = "--bs 32 --cluster-bs 32 --base-dim 16 --epochs 24 --cluster-epochs 24 --log-every 1 --save-every 0.005"
    return ["train_cluster.py", "--data", str(folder / "tiny.npz"), *flags.split()]


def alone(cluster, out, *command):
    """The run that nothing interrupts, outside of Slurm."""
    subprocess.run([sys.executable, *command, "--out", out], cwd=ROOT, env=cluster.env, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def one_process(cluster, folder, command):
    return alone(cluster, folder / "one_process", *command)


@pytest.fixture(scope="module")
def two_processes(cluster, folder, command):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=19999"]
    return alone(cluster, folder / "two_processes", *launch, *command)


def submit(cluster, out, *words):
    """Give sbatch the words: its options, the script, the script's arguments; returns the job's number."""
    return cluster.run("sbatch", "--parsable", f"--output={out}.txt", *map(str, words), cwd=ROOT)


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
        os.kill(process, signal.SIGSTOP)
    assert processes, (cluster.facts(job), said(out))
    try:
        yield processes
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


def test_hosts_of_node_lists_are_those_that_scontrol_shows(cluster):
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
        assert [dist.hosts(each) for each in some] == [part.split() for part in shown.split("separator")]


def test_a_requeued_job_goes_on(cluster, folder, command, one_process, two_processes):
    """The three forms of a job at once, so that two steps share a node."""
    forms = {
        "train": ([], one_process),
        "node": (["--ntasks-per-node=2", "--gres=gpu:2"], two_processes),
        "nodes": (["--ntasks-per-node=1", "--gres=gpu:1"], two_processes),
    }
    jobs = {}
    for form, (options, _) in forms.items():
        out = folder / form
        jobs[form] = submit(cluster, out, *options, f"slurm/{form}.sbatch", *command, "--out", out)
    for form, job in jobs.items():
        with frozen(cluster, job, folder / form):
            cluster.run("scancel", *(["--batch"] if form == "train" else []), "--signal=USR1", job)
    for job in jobs.values():
        cluster.start_again(job)
    for form, job in jobs.items():
        assert cluster.wait(job, "COMPLETED")["Restarts"] == "1"
        assert f"job {job} is requeued" in said(folder / form) and "going on from step" in said(folder / form)
        equal_runs(folder / form, forms[form][1])


def script(folder, name, *lines):
    """A batch script that a user may write instead of those in slurm/."""
    file = folder / f"{name}.sbatch"
    file.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    return file


def test_slurm_takes_the_commands_of_the_readme(cluster):
    commands = [line.partition(" #")[0] for line in README.splitlines() if line.startswith("sbatch ")]
    assert {file.name for file in (ROOT / "slurm").iterdir()} == {
        Path(re.search(r"\S+\.sbatch", c)[0]).name for c in commands
    }
    for command in commands:
        cluster.run(*command.replace("sbatch", "sbatch --test-only", 1).split(), cwd=ROOT)


@pytest.mark.parametrize("end", [["scancel"], ["scancel", "--batch", "--signal=KILL"], ["scontrol", "requeue"]])
def test_a_job_that_is_ended_goes_on(cluster, folder, command, one_process, end):
    """scancel saves and does not come back by itself; KILL leaves the last checkpoint; Slurm itself requeues."""
    out = folder / "-".join(end)
    job = submit(cluster, out, "slurm/train.sbatch", *command, "--out", out)
    with frozen(cluster, job, out, 40):
        cluster.run(*end, job)
    if end[0] == "scontrol":
        cluster.start_again(job)
    else:
        assert cluster.wait(job, "CANCELLED", "FAILED")["Restarts"] == "0"
        assert not cluster.processes(job)
        job = submit(cluster, out, "slurm/train.sbatch", *command, "--out", out)
    cluster.wait(job, "COMPLETED")
    assert ("saved at" in said(out)) == ("--signal=KILL" not in end) and "going on from step" in said(out)
    equal_runs(out, one_process)


def test_without_scontrol_a_chain_of_jobs_goes_on(cluster, folder, command, one_process):
    """As in a container, where the signal ends in exit code 75; the README's line, word for word but for the run."""
    out, tools = folder / "chain", folder / "tools"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)
    chain = next(line for line in README.splitlines() if line.startswith("after="))
    run = "train_simclr.py --backbone resnet50 --bs 256"
    assert chain.count(run) == 1
    environment = cluster.env | {"SBATCH_EXPORT": f"ALL,PATH={tools}", "SBATCH_OUTPUT": f"{out}.txt"}
    before = cluster.jobs()
    words = chain.replace(run, shlex.join([*command, "--out", str(out)]))
    subprocess.run(["bash", "-euc", words], cwd=ROOT, env=environment, check=True)
    first, second, third = sorted(cluster.jobs() - before, key=int)
    with frozen(cluster, first, out):
        cluster.run("scancel", "--batch", "--signal=USR1", first)
    assert cluster.wait(first, "FAILED")["ExitCode"] == "75:0"
    cluster.wait(second, "COMPLETED")
    cluster.wait(third, "CANCELLED", "COMPLETED")
    assert "run the same command again" in said(out)
    equal_runs(out, one_process)


def test_a_signal_that_would_not_reach_python_is_refused(cluster, folder):
    """Shells and torchrun that would die of it; a shell that handles it may start Python as it likes."""
    program = folder / "start.py"
    program.write_text("from common import config, dist\nwith config.exit_codes():\n    dist.init('cpu')\n")
    start = f"python {program}"
    torchrun = "python -m torch.distributed.run --nproc-per-node=1 --master-addr=127.0.0.1 --master-port=19998"
    scripts = {
        "shell": ["#SBATCH --signal=B:USR1@120", start],
        "step": ["#SBATCH --signal=USR1@120", f"srun --ntasks=1 bash -c '{start}; exit'"],
        "torchrun": ["#SBATCH --signal=USR1@120", f"srun --ntasks=1 {torchrun} {program}"],
        "trap": ["#SBATCH --signal=B:USR1@120", "trap 'kill -USR1 $!' USR1", f"{start} & wait $!"],
        "limit": ["#SBATCH --signal=USR1@120", start],
        "none": [start],
    }
    jobs = {name: submit(cluster, folder / name, script(folder, name, *lines)) for name, lines in scripts.items()}
    for name, job in jobs.items():
        refused = name in ("shell", "step", "torchrun")
        cluster.wait(job, "FAILED" if refused else "COMPLETED")
        assert ("error: this job's --signal" in said(folder / name)) == refused, said(folder / name)
