"""The directory of a run: its name, who may work in it, what it says of how it was made."""

import glob
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torchvision

from common import config
from common.errors import InputError, OtherFormat, say
from common.run import checkpoint, dist, ending
from common.run import content as contents
from common.run.card import Card
from common.run.content import Content
from common.run.files import (
    LAST,
    ROOT,
    STATE,
    WRITTEN,
    is_run,
    lock_folder,
    make_folder,
    read_config,
    read_json,
    remove_orphans,
    run_dir_of,
    write_json,
)

# What of the environment may change what a run computes: said where it differs at a resume.
_VERSIONS = ("commit", "uncommitted_changes", "torch", "cuda", "gpu")
# What else a start of a run is told by.
_START = ("command", "device", "processes")
# What `--resume PATH` may change, besides the epochs of later stages.
_LENGTH = {"epochs", "warmup_epochs"}
# What env.json holds that is read, see `read_json`.
_ENV = {"starts": [dict]}


def run_dir(args, script: str, name: str, identity: dict) -> Path:
    """The run directory: --out, or the one that `--resume PATH` resumes, or runs/SCRIPT/NAME-HASH:
    that also for a checkpoint that lies in no run.

    A trial of --search has a folder in --out.
    """
    if args.out:
        folder = Path(args.out)
        return folder if args.trial is None else folder / f"trial{args.trial}"
    if args.resume not in ("auto", "none"):
        folder = run_dir_of(args.resume)
        if folder.is_dir():
            return folder
    return Path("runs") / script / f"{name}-{config.digest(identity)}"


def earlier_config(args, script: str, name: str, identity: dict) -> dict:
    """What config.json says of the run that these flags go on with; empty: they begin one.

    Args:
        script, name, identity: as `run_dir` takes them.
    """
    folder = run_dir(args, script, name, identity)
    try:
        env = read_json(folder / "env.json", _ENV, lambda _: None) or {}
        mode = config.resume_mode(args, env.get("slurm_job"))
        there = None if mode == "none" else read_config(folder)
        if there is None and mode not in ("auto", "none"):
            there = checkpoint.config_of(mode)
        return there or {}
    except InputError:
        return {}  # `create_run_dir` refuses it by name


def output_folder(path: str) -> Path:
    """The folder for the results of using a model: `path`, or the one that a checkpoint lies in.

    It is created where it is missing.

    Raises:
        InputError: it cannot be created or written.
    """
    folder = Path(path).parent if Path(path).is_file() else Path(path)
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
    folder: Path, args, record: dict, world: dist.Dist, content: Content | None
) -> dict | None:
    """Create `folder` and write config.json and env.json.

    If the same run has finished there, say what it said at its end. What differs in the versions
    from the start before is said in one line.

    Args:
        record: what config.json holds beside the flags: `format`, `card` (see `card_record`),
            `identity`, the settings that decide the result, and `resolved`, the settings of the
            stages and the model as they came out.
        content: what is known of the bytes of the data's files, where there are any.

    Returns:
        What env.json holds; its list `starts`, newest last, has for each start its time, its Slurm
        job, the `stage` and the `step` that it took up work at (None until that is known), and of
        versions, command, device and processes what differs from the start before. None where the
        run has finished.

    Raises:
        InputError: the run there, or the one of --resume PATH, has another identity or has read
            other data and --force-resume is not given, or another format; or the folder is no run's
            and holds files that a run would take for its own, or cannot be written.
    """
    try:
        there = read_config(folder)
    except OtherFormat:
        raise
    except InputError as error:
        raise InputError(f"{error}; {_elsewhere(folder, record['card'])}") from None
    if there is None or "identity" not in there:
        _refuse_foreign(folder, record["card"])
        there = None
    env = read_json(folder / "env.json", _ENV, world.say) or {}
    mode = config.resume_mode(args, env.get("slurm_job"))
    elsewhere = there is None and mode not in ("auto", "none")
    stored = None if mode == "none" else there
    home = folder
    if elsewhere:
        stored = _config_elsewhere(mode, args, record["card"])
        home = run_dir_of(mode)
        env = read_json(home / "env.json", _ENV, world.say) or {}
    identity = record["identity"]
    if stored is None and mode == "auto" and not args.out and world.is_main:
        _say_beside(folder, args, identity, content, world)
    known = None
    differences = []
    if stored:
        script = stored.get("card", {}).get("name", record["card"]["name"])
        if script != record["card"]["name"]:
            raise InputError(f"{home} is of train_{script}.py; use that script, or another --out")
        known = contents.load(home, world.say) if content else None
        # To go on for longer is what `--resume PATH --epochs MORE` asks for; any other difference
        # makes another run.
        later = {f"{stage}_epochs" for stage in record["card"]["stages"]}
        free = set() if mode == "auto" else _LENGTH | later
        differences = _differences(stored["identity"], identity, free, known, content)
        if differences and not args.force_resume:
            longer = f", --resume {folder} for more epochs" if mode == "auto" else ""
            raise InputError(
                f"{mode if elsewhere else folder} holds another run: {'; '.join(differences)}."
                f" Another --out{longer}, or --force-resume"
            )
        if differences:
            world.say(f"--force-resume goes on although {'; '.join(differences)}")
    if content is not None:
        content.take_over(
            known, folder, world, force=args.force_resume, workers=getattr(args, "workers", 1)
        )
    if stored:
        summary = read_json(folder / "summary.json", say=world.say) or {}
        if mode == "auto" and not differences and summary.get("status") == "finished":
            if world.is_main:
                remove_orphans(folder)  # of a process that was killed at its last report
                say(*ending.lines(folder, vars(args) | record, summary))
                try:
                    checkpoint.load_selected(str(folder))  # says what is damaged
                except InputError as error:
                    say(error)
                more = f", --resume {shlex.quote(str(folder))} --epochs MORE trains on"
                say(f"already finished; --resume none starts anew{'' if args.search else more}")
            return None
    now = environment() | {"device": str(world.device), "processes": world.world_size}
    if mode != "none":
        _say_changes(env, now, world)
    if mode == "none" or elsewhere:
        env = {}  # the history is that of the folder
    dist.barrier()  # rank 0 writes when every rank has read
    problem = None
    now["starts"] = [*_ended_starts(folder, env), _start_entry(env, now)]
    if world.is_main:
        try:
            make_folder(folder)
            lock_folder(folder)
            remove_orphans(folder)
            if mode == "none" and there is not None:
                _forget(folder, there.get("card", {}), record["card"])
            write_json(folder / "config.json", vars(args) | record)
            write_json(folder / "env.json", now)
        except BlockingIOError:
            problem = "another process works there; wait for it, or give another --out"
        except OSError as error:
            problem = f"cannot write there: {error.strerror}"
    failed = torch.tensor(int(problem is not None), device=world.device)
    if dist.all_reduce(failed, "max"):
        raise InputError(f"run directory {folder}: {problem or 'rank 0 cannot write there'}")
    return now


def _config_elsewhere(path: str, args, card: dict) -> dict:
    # Of what --resume PATH names, which is no part of the run directory.
    if Path(path).is_file():
        checkpoint.load_state(Path(path))
    elif not is_run(Path(path)) and not is_run(run_dir_of(path)):
        _refuse_foreign(Path(path), card)
        raise InputError(f"--resume {path}: there is no run")
    stored = checkpoint.config_of(path)
    if "identity" not in stored and not args.force_resume:
        raise InputError(
            f"--resume {path} does not say what run it is of: resume its run directory, or"
            " --force-resume"
        )
    return stored if "identity" in stored else {}


def _refuse_foreign(folder: Path, card: dict) -> None:
    # What a run finds in its directory it goes on from or writes over: it must be its own.
    ours = {name for name in ("report.html", "figures") if (folder / "check.json").exists()}
    files = [place / name for place in _places(folder, card) for name in STATE]
    files += [folder / name for name in (*WRITTEN, "figures") if name not in ours]
    found = next((file for file in files if os.path.lexists(file)), None)
    if found is None:
        return
    what = "is of no run" if found.name == "config.json" else "lies beside no config.json of a run"
    raise InputError(
        f"{folder}: the {found.relative_to(folder)} there {what}, so nothing is continued or"
        f" overwritten; move it away, or {_elsewhere(folder, card)}"
    )


def _elsewhere(folder: Path, card: dict) -> str:
    states = [place / name for place in _places(folder, card) for name in LAST]
    state = next(filter(Path.is_file, states), None)
    return "choose another --out" + (
        f", with --resume {state} to go on from there" if state else ""
    )


def _places(folder: Path, *cards: dict) -> list[Path]:
    # Where a run has checkpoints: its folder and those of its stages. A name that leads out of it,
    # on a card that somebody else wrote, is none of them.
    names = [
        name for card in cards for key in ("stages", "baselines") for name in card.get(key, ())
    ]
    inside = {path.name: path for path in folder.glob("*") if path.is_dir()}
    return [folder, *(inside[name] for name in dict.fromkeys(names) if name in inside)]


def _start_entry(env: dict, now: dict) -> dict:
    entry = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "stage": None,
        "step": None,
        "slurm_job": now["slurm_job"],
    }
    changed = [name for name in (*_VERSIONS, *_START) if name not in env or env[name] != now[name]]
    return entry | {name: now[name] for name in changed}


def _say_changes(env: dict, now: dict, world: dist.Dist) -> None:
    changes = []
    for name in _VERSIONS:
        if name in env and env[name] != now[name]:
            old, new = (str(value or "none")[:40] for value in (env[name], now[name]))
            if name == "commit":
                old, new = old[:12], new[:12]
            changes.append(f"{name.replace('_', ' ')} {old} -> {new}")
    if changes:
        world.say(f"other versions than at the start before: {', '.join(changes)}")


def kept_config(args, about: dict) -> dict:
    """What a checkpoint keeps of config.json: what its use needs, and no more than decides it.

    Args:
        about: `format`, `card` and `identity`.
    """

    def kept(values: dict, without: set[str]) -> dict:
        return {name: value for name, value in values.items() if name not in without}

    record = kept(vars(args), config.NOT_IN_RUN_ID | _LENGTH) | {"data": args.data} | about
    record["identity"] = kept(about["identity"], _LENGTH)
    return json.loads(json.dumps(record, default=str))  # as it is read from config.json


def _ended_starts(folder: Path, env: dict) -> list[dict]:
    # With the status that the last one ended with, which a process that was killed has not left.
    starts = env.get("starts", [])
    status = (read_json(folder / "summary.json", say=str) or {}).get("status")
    if starts and status:
        starts[-1].setdefault("ended", status)
    return starts


def starts_in_vain(starts: list[dict]) -> int:
    """How many of the last starts began where the newest one did, and were stopped or killed."""
    count = 0
    for start in reversed(starts):
        same = all(start.get(key) == starts[-1].get(key) for key in ("stage", "step", "evaluated"))
        if not same or start.get("ended", "stopped") != "stopped":
            break
        count += 1
    return count


def _differences(
    stored: dict, identity: dict, free: set[str], record: dict | None, content: Content | None
) -> list[str]:
    names = sorted((stored.keys() | identity.keys()) - free)
    default = "its default"
    pairs = [(name, stored.get(name, default), identity.get(name, default)) for name in names]
    texts = {
        name: f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new
    }
    if "data" in texts and record:
        words = content.differences(record)
        if words:
            texts["data"] = f"the data has changed: {words}"
    return list(texts.values())


def _say_beside(
    folder: Path, args, identity: dict, content: Content | None, world: dist.Dist
) -> None:
    """Say where the newest run of the same flags on other data lies, if it is beside `folder`."""
    free = config.NOT_IN_RUN_ID - {"from_run", "teacher"}
    flags = json.loads(json.dumps(vars(args), default=str))
    beside = []
    for file in folder.parent.glob(f"{glob.escape(folder.name.rpartition('-')[0])}-*/config.json"):
        try:
            there = read_config(file.parent) or {}
        except InputError:
            continue  # it is not that run that was asked for
        same = all(there.get(name, flags[name]) == flags[name] for name in flags.keys() - free)
        if same and there.get("identity", {}).get("data") not in (None, identity["data"]):
            beside.append((file.stat().st_mtime, str(file.parent)))
    if beside:
        path = max(beside)[1]
        record = contents.load(Path(path), world.say) if content else None
        if record and content.share_in(record) < 0.5:
            return  # it is of other files altogether
        words = f" ({content.differences(record)})" if record else ""
        world.say(
            f"a run of the same flags on other data lies beside it in {path}{words};"
            f" --resume {path} --force-resume goes on with that one"
        )


def card_record(card: Card, chance: dict[str, tuple[str, float]]) -> dict:
    """A card as config.json keeps it: with the label and the loss of a guess of each stage."""
    return asdict(card) | {"chance": chance}


def _forget(folder: Path, *cards: dict) -> None:
    # What the run itself wrote, in its folder and in those of its stages: what else lies there is a
    # copy of the user's.
    for place in _places(folder, *cards):
        if place == folder or not (place / "config.json").exists():
            for name in STATE:
                (place / name).unlink(missing_ok=True)


def environment() -> dict:
    """Versions, hardware, commit and command: what a figure needs beside it to mean something."""

    def git(*command):
        result = subprocess.run(
            ["git", "-C", ROOT, *command], capture_output=True, encoding="utf-8", errors="replace"
        )
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("diff", "--no-ext-diff", "HEAD")
    except OSError:  # no git on the machine, or no process to be had
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
        "uncommitted_changes": changes and config.digest(changes) if changes != "" else False,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
