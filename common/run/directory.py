"""The directory of a run: its name, who may work in it, what it says of how it was made."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torchvision

from common import config
from common.errors import InputError, say
from common.run import dist
from common.run.card import Card
from common.run.files import (
    FORMAT,
    ROOT,
    lock_folder,
    read_config,
    read_json,
    remove_orphans,
    run_dir_of,
    write_json,
)

# What --resume none removes.
_STATE = ("last.pt", "last.previous.pt", "best.pt", "summary.json", "log.jsonl", "resumes.jsonl")


def run_dir(args, script: str, name: str, identity: dict) -> Path:
    """The run directory: --out, or the one that `--resume PATH` resumes, or runs/SCRIPT/NAME-HASH.

    A trial of --search has a folder in --out.
    """
    if args.out:
        folder = Path(args.out)
        return folder if args.trial is None else folder / f"trial{args.trial}"
    if args.resume not in ("auto", "none"):
        return run_dir_of(args.resume)
    return Path("runs") / script / f"{name}-{config.digest(identity)}"


def output_folder(path: str) -> Path:
    """The folder for the results of using a model: `path`, or the one that a checkpoint lies in.

    It is created where it is missing.

    Raises:
        InputError: it cannot be created or written.
    """
    folder = Path(path).parent if Path(path).suffix == ".pt" else Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise InputError(
            f"{folder}: results cannot be written there ({error.strerror}); choose another --out"
        ) from None
    return folder


def create_run_dir(
    folder: Path, args, identity: dict, resolved: dict, card: dict, world: dist.Dist
) -> bool:
    """Create `folder` and write config.json and env.json.

    If the same run has finished there, print its summary and return False.

    Args:
        identity: the settings that decide the result.
        resolved: the settings of the stages and the model as they came out.
        card: what the script says of itself, see `card_record`.

    Raises:
        InputError: the run there, or the one of --resume PATH, has another identity and
            --force-resume is not given, or another format; or the folder is another program's, or
            cannot be written.
    """
    there = read_json(folder / "config.json")
    if there is not None and "identity" not in there:
        raise InputError(f"{folder}: the config.json there is of no run; choose another --out")
    mode = config.resume_mode(args, (read_json(folder / "env.json") or {}).get("slurm_job"))
    stored = None if mode == "none" else read_config(folder)
    if stored is None and mode not in ("auto", "none"):
        stored = read_config(run_dir_of(mode))
    if stored is not None:
        # To go on for longer is what `--resume PATH --epochs MORE` asks for; any other difference
        # makes another run.
        free = set() if mode == "auto" else {"epochs", "warmup_epochs"}
        differences = _differences(stored["identity"], identity, free)
        if differences and not args.force_resume:
            longer = f", --resume {folder} for more epochs" if mode == "auto" else ""
            raise InputError(
                f"{folder} holds another run: {'; '.join(differences)}. Another --out{longer}, or"
                " --force-resume"
            )
        summary = read_json(folder / "summary.json")
        if mode == "auto" and not differences and summary and summary["status"] == "finished":
            if world.is_main:
                remove_orphans(folder)  # of a process that was killed at its last report
                say(f"{folder} has finished; its summary:")
                print(json.dumps(summary, indent=2))
            return False
    dist.barrier()  # rank 0 writes when every rank has read
    problem = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_folder(folder)
            remove_orphans(folder)
            if mode == "none" and (folder / "config.json").exists():
                _forget(folder)
            record = {"format": FORMAT, "card": card, "resolved": resolved, "identity": identity}
            write_json(folder / "config.json", vars(args) | record)
            write_json(folder / "env.json", environment())
        except BlockingIOError:
            problem = "another process works there; wait for it, or give another --out"
        except OSError as error:
            problem = f"cannot write there: {error.strerror}"
    failed = torch.tensor(int(problem is not None), device=world.device)
    if dist.all_reduce(failed, "max"):
        raise InputError(f"run directory {folder}: {problem or 'rank 0 cannot write there'}")
    return True


def _differences(stored: dict, identity: dict, free: set[str]) -> list[str]:
    names = sorted((stored.keys() | identity.keys()) - free)
    default = "its default"
    pairs = [(name, stored.get(name, default), identity.get(name, default)) for name in names]
    return [f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new]


def card_record(card: Card, chance: dict[str, tuple[str, float]]) -> dict:
    """A card as config.json keeps it: with the label and the loss of a guess of each stage."""
    return asdict(card) | {"chance": chance}


def _forget(folder: Path) -> None:
    # The state of this run alone: its folder and its stages' folders, which have no config.json of
    # their own.
    stages = [f for f in folder.iterdir() if f.is_dir() and not (f / "config.json").exists()]
    for place in (folder, *stages):
        for name in _STATE:
            (place / name).unlink(missing_ok=True)


def environment() -> dict:
    """Versions, hardware, commit and command: what a figure needs beside it to mean something."""

    def git(*command):
        result = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:  # no git on the machine
        commit = changes = None
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
