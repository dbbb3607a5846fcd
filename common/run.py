"""A run: its directory, its log, its stages, and how it ends."""

import contextlib
import json
import os
import platform
import random
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchvision

from common import checkpoint, config, dist, report
from common.config import Diverged, InputError, Stopped
from common.log import Log


@dataclass
class Run:
    """What every stage of a script needs.

    Attributes:
        args: the flags, unchanged.
        facts: which process this is, and its device.
        data: the script's data set.
        splits: indices into it by split name.
        folder: the run directory.
        meta: what a checkpoint must say so that the model can be rebuilt from it.
        stages: the settings of the stages to run, by name, in their order.
        results: flat metrics named `stage/split/metric`, of the stages that have ended.
        selected: the last of those stages, whose best.pt the summary names.
    """

    args: object
    facts: dist.Facts
    data: object
    splits: dict[str, np.ndarray]
    folder: Path
    log: Log
    signals: checkpoint.Signals | None
    meta: dict
    stages: dict[str, config.Stage]
    results: dict = field(default_factory=dict)
    selected: checkpoint.Progress | None = None

    def stage(self, name: str, parts: dict, *, start: str) -> checkpoint.Progress:
        """The state of a stage, restored from its checkpoints.

        `parts` are the objects with a `state_dict`, `start` names what the stage starts from. A run of several stages
        keeps the checkpoints of each in a folder of its own. `--resume PATH` means the first stage.
        """
        args = self.args
        folder = self.folder if list(self.stages) == [name] else self.folder / name
        progress = checkpoint.Progress(
            folder,
            name,
            parts=parts,
            log=self.log,
            facts=self.facts,
            signals=self.signals,
            meta=self.meta | {"stage": name},
            start=start,
            save_every=args.save_every,
            max_steps=args.max_steps,
        )
        state, best = checkpoint.load_newest(folder, self.log.say), None
        if state is None and name == next(iter(self.stages)) and args.resume not in ("auto", "none"):
            state, best = checkpoint.load_training_state(Path(args.resume), name)
        dist.barrier()  # nobody writes before everybody has read
        progress.restore(state, best)
        return progress

    def settled(self, progress: checkpoint.Progress) -> bool:
        """Whether a stage has nothing left to do: its results are taken over. More epochs than before reopen it."""
        stage = self.stages.get(progress.stage)
        if progress.finished and (stage is None or progress.planned >= stage.epochs):
            self.results |= progress.results
            self.selected = progress if stage else self.selected
            return True
        progress.finished = False
        return False

    def finish(self, progress: checkpoint.Progress, results: dict) -> None:
        """Store a stage's final metrics; the summary names the best model of the last stage."""
        stage = self.stages.get(progress.stage)
        progress.finish(results, stage.epochs if stage else 0)
        self.results |= results
        self.selected = progress if stage else self.selected

    @contextlib.contextmanager
    def recorded(self):
        """Around the stages: however they end, write summary.json and report.html and close the log."""
        status = "failed"
        try:
            yield
            status = "finished"
        except Stopped:
            status = "stopped"
            raise
        except Diverged:
            status = "diverged"
            raise
        finally:
            facts = {"status": status, "seconds": round(self.log.seconds, 1)}
            if self.selected:
                best = self.selected.folder / "best.pt"
                facts |= {"best_epoch": self.selected.best_epoch, "best_model_path": str(best)}
            if self.facts.main:
                (self.folder / "summary.json").write_text(json.dumps(self.results | facts, indent=2) + "\n")
                report.write(self.folder)
                self.log.say(f"{status}: {self.folder / 'report.html'}")
            self.log.close()
            self.signals.restore()


def directory(args, script: str, name: str, identity: dict) -> Path:
    """The run directory: --out, or the one that `--resume PATH` goes on with, or runs/SCRIPT/NAME-HASH."""
    if args.out:
        return Path(args.out)
    if args.resume not in ("auto", "none"):
        path = Path(args.resume)
        folders = [path, *path.parents][:3]
        return next((folder for folder in folders if (folder / "config.json").exists()), folders[0])
    return Path("runs") / script / f"{name}-{config.digest(identity)}"


def claim(folder: Path, args, identity: dict, resolved: dict, facts: dist.Facts) -> dict | None:
    """Create `folder` and write config.json and env.json; or return the summary of the same run, which has finished.

    Raises:
        InputError: the folder's run has another identity and --fork is not given, or it cannot be written.
    """
    file = folder / "config.json"
    if file.exists() and args.resume != "none":
        before = json.loads(file.read_text())["identity"]
        # To go on for longer is what `--resume PATH --epochs MORE` asks for; any other difference makes another run.
        free = set() if args.resume == "auto" else {"epochs", "warmup_epochs"}
        names = sorted((before.keys() | identity.keys()) - free)
        pairs = [(name, before.get(name, "its default"), identity.get(name, "its default")) for name in names]
        differences = [f"{name} is {there} there and {here} here" for name, there, here in pairs if there != here]
        if differences and not args.fork:
            raise InputError(
                f"{folder} holds another run: {'; '.join(differences)}. Choose another --out, or --fork to go on"
            )
    summary = folder / "summary.json"
    if args.resume == "auto" and summary.exists():
        metrics = json.loads(summary.read_text())
        if metrics["status"] == "finished":
            return metrics
    dist.barrier()  # rank 0 writes when every process has read
    if facts.main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if args.resume == "none":
                for name in ("last.pt", "last.previous.pt", "best.pt", "summary.json"):
                    for old in folder.rglob(name):
                        old.unlink()
            flags = {**vars(args), "resolved": resolved, "identity": identity}
            file.write_text(json.dumps(flags, indent=2, default=str) + "\n")
            (folder / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
        except OSError as error:
            raise InputError(f"run directory {folder}: cannot write there: {error.strerror}") from None
    dist.barrier()
    return None


def prepare(args) -> None:
    """Settings of the process: seeds, and repeatable kernels where --deterministic asks for them.

    Raises:
        InputError: there is nothing at the path that --resume names.
    """
    if args.resume not in ("auto", "none") and not Path(args.resume).exists():
        raise InputError(f"--resume {args.resume}: no such file or directory")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is repeatable only with a fixed workspace
        torch.use_deterministic_algorithms(True)


def environment() -> dict:
    """Versions, hardware, commit and command: what a figure needs beside it to mean something."""
    root = Path(__file__).parent.parent

    def git(*command):
        result = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:  # no git on the machine
        commit, changes = None, None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "commit": commit,
        "uncommitted_changes": None if changes is None else bool(changes),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
