"""A private Slurm on this machine for the tests: munge, one controller, one daemon a node; started
and stopped as root.

Nodes are called by addresses of the loopback network, so that processes find each other's host
without a name service. Nothing outside its folder is touched; the ports are free ones.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
MinJobAge=3600
ReturnToService=2
KillWait={kill_wait}
GresTypes=gpu
{nodes}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of Slurm that this machine lacks, or `root` where the user is another one."""
    lacking = [tool for tool in TOOLS if not shutil.which(tool)]
    return lacking or ([] if os.geteuid() == 0 else ["root"])


class Cluster:
    """Nodes with 64 make-believe processors and 4 GPUs each; `env` is what Slurm's commands need.

    `folder` is opened to everyone, and those above it must be: munge refuses a socket that others
    could not reach.
    """

    def __init__(self, folder: Path, num_nodes: int = 2, kill_wait: int = 20):
        self.folder, self.daemons = folder, []
        folder.chmod(0o755)
        self.nodes = [f"127.0.0.{i + 1}" for i in range(num_nodes)]
        ports = _free_ports(1 + num_nodes)
        lines = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr={node} Port={port}"
            " CPUs=64 Gres=gpu:4"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        self.conf = folder / "slurm.conf"
        self.conf.write_text(
            _CONF.format(
                host=socket.gethostname(),
                folder=folder,
                ports=ports,
                kill_wait=kill_wait,
                nodes="\n".join(lines),
            )
        )
        for number in range(4):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        # No variable of a Slurm job or of torchrun that this process may run in reaches the jobs.
        outside = ("SLURM", "SBATCH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(outside)} | {
            "SLURM_CONF": str(self.conf)
        }

    def __enter__(self):
        files = [
            f"--{name}={self.folder}/munge.{name}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        ]
        self.daemons.append(
            self._daemon("munged", "-F", "--force", f"--key-file={self.folder}/munge.key", *files)
        )
        until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.daemons.append(self._daemon("slurmctld", "-D"))
        self.daemons += [self._daemon("slurmd", "-D", "-N", node) for node in self.nodes]
        until(lambda: self.run("sinfo", "-h", "-o", "%T") == "idle", "slurmd")
        return self

    def __exit__(self, *_):
        self.run("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(30)

    def _daemon(self, *command: str) -> subprocess.Popen:
        with open(self.folder / f"{command[0]}.out", "a") as out:
            return subprocess.Popen(command, env=self.env, stdout=out, stderr=out)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def jobs(self) -> set[str]:
        """The numbers of all jobs that have not ended."""
        return set(self.run("squeue", "-h", "-o", "%A").split())

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: `JobState`, `ExitCode`, `Restarts` and more."""
        pairs = (
            word.partition("=") for word in self.run("scontrol", "show", "job", "-o", job).split()
        )
        return {name: value for name, _, value in pairs}

    def wait(self, job: str, *states: str) -> dict[str, str]:
        """Wait until a job is in one of the states; returns its facts."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        until(lambda: self.facts(job)["JobState"] in ended | set(states), f"job {job}")
        facts = self.facts(job)
        assert facts["JobState"] in states, facts
        return facts

    def start_again(self, job: str) -> None:
        """Start a requeued job now: Slurm itself waits two minutes."""
        until(
            lambda: self.facts(job)["JobState"] == "PENDING" or self.facts(job)["Restarts"] == "1",
            f"requeue of {job}",
        )
        if self.facts(job)["JobState"] == "PENDING":
            time.sleep(2)  # earlier the node still refuses it
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def processes(self, job: str) -> list[int]:
        """The processes of a job's Python, wherever they hang now."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                mine = f"SLURM_JOB_ID={job}".encode() in (folder / "environ").read_bytes().split(
                    b"\0"
                )
            except OSError:  # it has ended
                continue
            if mine and b"python" in words[0]:
                found.append(int(folder.name))
        return found


def until(condition, what: str, seconds: float = 300) -> None:
    """Wait for a condition; fails after some minutes."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
