"""A run: its directory, its log, its stages, and how it ends."""

import argparse
import contextlib
import copy
import csv
import dataclasses
import errno
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None

from common import checkpoint, config, dist, distil, report, step
from common.config import Diverged, InputError, Stopped
from common.log import Log, Pace

ROOT = Path(__file__).resolve().parent.parent
_locks = contextlib.ExitStack()
AGAIN = "Run the same command again: it goes on from the last checkpoint"


class Finished(Exception):
    """There is nothing left to do."""


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
        phases: the clock of --profile.
        teacher: the model of --teacher, when `teach` has made it of `lesson`, its checkpoint.
        current: the stage at work.
        at_end: what is to be undone when the stages have ended.
        reopened: the epoch at which it had ended before it was asked for more; -1: it had not.
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
    phases: step.Phases | None = None
    teacher: distil.Teacher | None = None
    lesson: dict | None = None
    current: checkpoint.Progress | None = None
    reopened: int = -1
    at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def open(
        cls,
        args,
        facts: dist.Facts,
        signals: checkpoint.Signals,
        data,
        splits: dict[str, np.ndarray],
        meta: dict,
        stages: dict[str, config.Stage],
        *,
        name: str,
        identity: dict,
        size: str,
        same: tuple = ("image_size", "classes"),
    ) -> "Run":
        """The run in its directory, said in one line.

        With --check nothing there is claimed or changed: the check only adds its own files.

        `name` and `identity` name the directory (see `directory`), `size` is what the line says of the model, `same` in
        what a teacher must agree with it (see `distil.read`).

        Raises:
            InputError: see `claim`.
            Finished: the same run has finished; its summary is printed.
        """
        lesson, digest = distil.read(args, meta, same)
        identity = identity | digest
        folder = directory(args, meta["script"], name, identity)
        if args.check:
            # Its batches are too small to split.
            whole = argparse.Namespace(**{**vars(args), "accum": 1})
            run = cls(whole, facts, data, splits, output_folder(folder), Log(None, main=facts.main), None, meta, stages)
            run.lesson = lesson
            run.log.say(f"check for {folder}; device {facts.device}, {size}")
            return run
        if not claim(folder, args, identity, {stage: vars(values) for stage, values in stages.items()} | meta, facts):
            raise Finished
        log = Log(folder, main=facts.main, tensorboard=args.tensorboard)
        log.say(f"run directory {folder}; device {facts.device}, {facts.world_size} process(es), {size}")
        return cls(args, facts, data, splits, folder, log, signals, meta, stages, lesson=lesson)

    def teach(self, build_model: Callable[["Run"], nn.Module], outputs=nn.Module.__call__, evaluate=None) -> None:
        """Make the teacher, where there is one; see `distil.build`."""
        if self.lesson:
            self.teacher = distil.build(self, self.lesson, build_model, outputs, evaluate)

    def taught(self, terms: dict[str, Tensor], student: Tensor, x: Tensor, items: np.ndarray | None = None) -> dict:
        """The terms of a loss with the teacher's among them, where there is one; see `distil.blend`."""
        return distil.blend(self.teacher, terms, student, x, items)

    def like(self, **changed) -> "Run":
        """A run whose model differs in these entries of `meta`."""
        return dataclasses.replace(self, meta=self.meta | changed)

    def lap(self, phase: str | None) -> None:
        """The end of a phase of a training step, or (None) of what is no part of a step, for --profile."""
        if self.phases:
            self.phases.lap(phase)

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
        elsewhere = state is None and name == next(iter(self.stages)) and args.resume not in ("auto", "none")
        if elsewhere:
            state, best = checkpoint.load_training_state(Path(args.resume), name)
            if (state["stage"], state["start"]) != (name, start):
                raise InputError(
                    f"--resume {args.resume} is a {state['stage']} state of another start, not of this {name}"
                )
        # All processes take part, so nobody writes before everybody has read.
        seen = dist.all_gather_rows(torch.tensor([state["place"]["step"] if state else -1], device=self.facts.device))
        if len(set(seen.tolist())) > 1:
            raise InputError(
                f"the processes read different states in {folder} (steps {seen.tolist()}, -1: none): it must lie on"
                " a file system that they share"
            )
        progress.restore(state, best)
        self.current = progress
        if args.detect_anomaly:
            progress.name_layers()
            self.at_end.callback(progress.forget_layers)
        if elsewhere and progress.finished and progress.planned >= self.stages[name].epochs:
            raise InputError(f"--resume {args.resume} has finished its {progress.planned} epochs; give more --epochs")
        return progress

    def settled(self, progress: checkpoint.Progress) -> bool:
        """Whether a stage has nothing left to do: its results are taken over. More epochs than before reopen it."""
        # A stage's baselines (`linear_random`) are as long as the stage itself.
        if progress.finished and progress.planned >= self.stages[progress.stage.split("_")[0]].epochs:
            self._take(progress)
            return True
        self.reopened = progress.epoch if progress.finished else -1
        progress.finished = False
        return False

    def finish(self, progress: checkpoint.Progress, results: dict) -> None:
        """Store a stage's final metrics; the summary names the best model of the last stage."""
        planned, idle = self.stages[progress.stage.split("_")[0]].epochs, progress.epoch == self.reopened
        if progress.epoch < planned:
            more = ". More epochs change nothing, a larger --patience with --fork does" if idle else ""
            self.log.say(
                f"{progress.stage}: stopped early after epoch {progress.epoch} of {planned}, the best is epoch"
                f" {progress.best_epoch}{more}"
            )
        progress.finish(results, progress.planned if idle else planned)
        self._take(progress)

    def _take(self, progress: checkpoint.Progress) -> None:
        self.results |= progress.results
        if progress.stage in self.stages:
            self.selected = progress

    def end_step(
        self,
        progress: checkpoint.Progress,
        pace: Pace,
        losses: dict[str, Tensor],
        lr: float,
        norm: Tensor,
        bad: Tensor,
        *,
        chance: float | None = None,
        more: Callable[[], dict] = dict,
    ) -> None:
        """What follows an update in every loop: the epoch's sums, the pace, a line where one is due, the checkpoint.

        Args:
            losses: device scalars by name.
            lr, norm, bad: of the step; `norm` (the gradient's) and `bad` (masked) are device scalars.
            chance: the loss at chance level, where there is one.
            more: further values of a line; called only where one is due, as it may wait for the device.

        Raises:
            Diverged, Stopped: see `Progress.end_step`.
        """
        progress.add(**losses)
        pace.tick()
        name, done, epochs = progress.stage, progress.step + 1, self.stages[progress.stage].epochs
        if self.log.due(done, self.args.log_every):
            values = {key: dist.mean(value).item() for key, value in losses.items()}
            values |= {} if chance is None else {"loss/chance": values["loss"] / chance}
            values |= {"lr": lr, "grad_norm": norm.item()} | more()
            self.log.interval(name, done, progress.epoch + 1, values, pace)
        self.log.progress(name, done, pace)
        if pace.steps == 2:
            self.log.cost(name, pace.total_steps // epochs, epochs, pace, self.facts.device)
        progress.end_step(bad)

    @contextlib.contextmanager
    def recorded(self):
        """Around the stages: report.html is kept up to date and, however they end, summary.json written.

        Raises:
            InputError: for whatever the data or the disk refuses, with the process and the step that met it.
            Stopped: another process is gone.
        """
        status = "failed"
        self.signals.defer()
        try:
            if self.facts.main:
                self._begin()
            with self.at_end, self._watched():
                yield
            status = "finished"
            self._conclude(status)
        except Stopped:
            status = "stopped"
            raise
        except Diverged:
            status = "diverged"
            raise
        except InputError as error:
            raise InputError(f"{self._where() if self.current else ''}{error}") from None
        except OSError as error:
            what = ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
            raise InputError(f"{self._where()}{what}; make room or mend it. {AGAIN}") from None
        except RuntimeError as error:
            if not dist.peer_lost(error):
                raise
            status = "stopped"
            if self.signals.asked == checkpoint.Signals.REQUEUE:  # the other one obeyed the signal before this one
                raise checkpoint.Signals.leave(self.signals.asked, f"{self._where()}another process left") from None
            raise Stopped(self._where() + _lost(error), config.EXIT_STOPPED) from None
        finally:
            if status != "finished":
                with contextlib.suppress(OSError):  # what ended the run is worth more than its summary
                    self._conclude(status)

    def _begin(self) -> None:
        (self.folder / "summary.json").unlink(missing_ok=True)  # of an earlier start: this one has not ended
        facts = dict(data_read=self.described(), device=str(self.facts.device), processes=self.facts.world_size)
        write_json(self.folder / "env.json", (read_json(self.folder / "env.json") or {}) | facts)
        self.log.watcher = report.Live(self.folder, self.log.say)

    @contextlib.contextmanager
    def _watched(self):
        # A read that hangs, a process that stopped, a dead GPU: nothing raises, so a thread counts the time without a
        # step or a batch of an evaluation. Counts, so that a job which is suspended as a whole has not stalled.
        over, minutes, main = threading.Event(), self.args.timeout, threading.main_thread().ident

        def watch():
            seconds, last, idle = min(6 * minutes, 5.0), None, 0.0
            while not over.wait(seconds):
                beat = self.current and (self.current.stage, self.current.beat)
                idle, last = (idle + seconds if beat == last else 0.0), beat
                if idle >= 60 * minutes:
                    stack = traceback.extract_stack(sys._current_frames()[main])
                    own = [frame for frame in stack if Path(frame.filename).is_relative_to(ROOT)]
                    at = f"{Path(own[-1].filename).relative_to(ROOT)} line {own[-1].lineno}, {own[-1].name}"
                    what = f"no step in {minutes:g} minutes (--timeout), it waits in {at}"
                    why = "the data, another process or the device stalls"
                    print(f"{self._where()}{what}: {why}. {AGAIN}", file=sys.stderr, flush=True)
                    os._exit(config.EXIT_STOPPED)  # a thread that hangs could not be waited for

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join(5)  # a thread that runs when the interpreter ends can abort it

    def _where(self) -> str:
        at = f", {self.current.stage} step {self.current.step}" if self.current else ""
        return f"process {self.facts.rank} of {self.facts.world_size}{at}: "

    def _conclude(self, status: str) -> None:
        facts = {"status": status, "seconds": round(self.log.seconds, 1)}
        if self.selected:
            best = self.selected.folder / "best.pt"
            facts |= {"best_epoch": self.selected.best_epoch, "best_value": self.selected.best}
            facts |= {"best_model_path": str(best)}
        try:
            if self.facts.main:
                write_json(self.folder / "summary.json", self.results | facts)
                self.log.watcher = None
                report.write(self.folder)
                if self.phases:
                    self.log.say(f"profile: {self.phases.describe()}")
                self.log.say(f"{status}: {self.folder / 'report.html'}")
        finally:
            self.log.close()

    def described(self) -> str:
        """The data in one line, for people."""
        return getattr(self.data, "table", self.data).describe()


def several(main, argv: list[str] | None, args, ranges, metric: str | None) -> bool:
    """Do what --search without --trial, or --ensemble, asks a script's `main` for several times; False without them.

    Args:
        ranges: the script's, as `config.parse` takes them.
        metric: of `ensemble.scores`, by which an ensemble is compared with its members.
    """
    from common import ensemble, search  # which import this module

    if args.search and args.trial is None:
        search.every(main, argv, args, ranges)
    elif args.ensemble:
        ensemble.judge(main, argv, args, metric)
    else:
        return False
    return True


def launch(args, use: Callable, begin: Callable) -> int:
    """The frame of every script: `use(args, facts)` with --eval, --predict or --stream, else `begin(args, facts,
    signals)`.

    Returns 0; the other exit codes leave as SystemExit.
    """
    with config.exit_codes(), checkpoint.Signals() as signals, _locks:
        facts = dist.init(args.device, max(1800, 120 * args.timeout))  # the watcher names more than a collective does
        prepare(args)
        try:
            if args.eval or args.predict or getattr(args, "stream", None):
                use(args, facts)
            else:
                with contextlib.suppress(Finished):
                    begin(args, facts, signals)
        except Stopped:
            raise
        except RuntimeError as error:
            if not dist.peer_lost(error):
                raise
            raise Stopped(_lost(error), config.EXIT_STOPPED) from None
        dist.close()
    return 0


def _lost(error: RuntimeError) -> str:
    said = str(error).split("\n")[0][-120:]
    return f"another process is gone or stalls ({said}); its own output says why. {AGAIN}"


def tested(progress: checkpoint.Progress, model: nn.Module, test: Callable[[nn.Module, dict], tuple[dict, object]]):
    """(test metrics, what else `test` gave of the selected model): every script's test at a stage's end.

    `test(network, metrics)` gives the test metrics of a network by name, and something else; it gets the metrics that
    were stored with the network. Those of the last epoch are named `NAME_last_epoch`. `model` keeps the last epoch's
    weights: a stop meanwhile must store them.
    """
    last, _ = test(model, progress.results)
    chosen = copy.deepcopy(model)
    chosen.load_state_dict(progress.best_weights())
    results, rest = test(chosen, progress.best_metrics())
    return results | {f"{name}_last_epoch": value for name, value in last.items()}, rest


def origin(path: str) -> Path:
    """The run directory that a path means: itself, or the one that holds the checkpoint or the stage's folder."""
    folders = [Path(path), *Path(path).parents][:3]
    return next((folder for folder in folders if (folder / "config.json").exists()), folders[0])


def output_folder(path: str) -> Path:
    """The folder that results of using a model go to: `path`, or the one of a checkpoint, created where it is missing.

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


@dataclass(frozen=True)
class Used:
    """What --eval, --predict or --stream works with: the checkpoint's `state` and where it is from (`source`, for
    messages); the `folder` for results; the run directory `home`; and the `path` of the data.
    """

    state: dict
    source: str
    folder: Path
    home: Path
    path: str

    def write(self, results: dict, facts: dist.Facts, answers: tuple | None = None) -> None:
        """Write eval.json: the test metrics, named `eval/test/...`, and print them.

        `answers`, of a classifier, for eval.csv: the data set, the positions (n,) of the test items in it, the classes
        and their probabilities (n, C), or (n,) those of the second of two.
        """
        results = {f"eval/{name.split('/', 1)[1]}": value for name, value in results.items()}
        if facts.main:
            write_json(self.folder / "eval.json", results)
            print("\n".join(f"{name} {value:.4f}" for name, value in results.items()))
        if facts.main and answers:
            items, rows, classes, shares = answers
            shares = np.asarray(shares, np.float64)
            shares = np.stack([1 - shares, shares], 1) if shares.ndim == 1 else shares
            with open(self.folder / "eval.csv", "w", newline="") as file:
                csv.writer(file).writerows(
                    [["id", "label", *classes]]
                    + [
                        [items.ids[i], items.classes[items.labels[i]], *p]
                        for i, p in zip(rows, shares.tolist(), strict=True)
                    ]
                )


def used(args, script: str) -> Used:
    """The selected model that --eval, --predict or --stream names; --eval without --data reads what it was trained on.

    Raises:
        InputError: there is none, it is another script's, or results cannot be written.
    """
    source = args.eval or args.resume
    state = checkpoint.load_selected(source)
    if state["meta"]["script"] != script:
        raise InputError(f"{source} is of train_{state['meta']['script']}.py; use that script")
    home = origin(source)
    trained_on = (read_json(home / "config.json") or {}).get("data", args.data)
    path = args.predict or getattr(args, "stream", None) or (args.data if args.data != "sample" else trained_on)
    return Used(state, source, output_folder(args.out or source), home, path)


def recall(parser: config.Parser, argv: list[str] | None, args, names: list[str]):
    """The flags `args`, but with --eval, --predict or --stream those of `names` (attribute names), which say how data
    are read, are by default what the run was trained with.
    """
    source = args.eval or (args.resume if args.predict or getattr(args, "stream", None) else None)
    if not source:
        return args
    try:
        stored = read_json(origin(source) / "config.json") or {}
    except InputError as error:
        parser.error(str(error))
    parser.set_defaults(**{name: stored[name] for name in names if name in stored})
    return config.parse(parser, argv, {})


def directory(args, script: str, name: str, identity: dict) -> Path:
    """The run directory: --out (of a trial of --search a folder in it), or the one that `--resume PATH` goes on with,
    or runs/SCRIPT/NAME-HASH."""
    if args.out:
        return Path(args.out) if args.trial is None else Path(args.out) / f"trial{args.trial}"
    if args.resume not in ("auto", "none"):
        return origin(args.resume)
    return Path("runs") / script / f"{name}-{config.digest(identity)}"


def claim(folder: Path, args, identity: dict, resolved: dict, facts: dist.Facts) -> bool:
    """Create `folder` and write config.json and env.json; or print the summary of the same run and return False, if it
    has finished.

    Raises:
        InputError: the run there, or the one of --resume PATH, has another identity and --fork is not given; or the
            folder cannot be written.
    """
    mode = config.resume_mode(args, (read_json(folder / "env.json") or {}).get("slurm_job"))
    before = None if mode == "none" else read_json(folder / "config.json")
    if before is None and mode not in ("auto", "none"):
        before = read_json(origin(mode) / "config.json")
    if before is not None:
        # To go on for longer is what `--resume PATH --epochs MORE` asks for; any other difference makes another run.
        free = set() if mode == "auto" else {"epochs", "warmup_epochs"}
        there, default = before["identity"], "its default"
        names = sorted((there.keys() | identity.keys()) - free)
        pairs = [(name, there.get(name, default), identity.get(name, default)) for name in names]
        differences = [f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new]
        if differences and not args.fork:
            longer = f", --resume {folder} for more epochs" if mode == "auto" else ""
            raise InputError(f"{folder} holds another run: {'; '.join(differences)}. Another --out{longer}, or --fork")
        summary = read_json(folder / "summary.json")
        if mode == "auto" and not differences and summary and summary["status"] == "finished":
            if facts.main:
                print(f"{folder} has finished; its summary:\n{json.dumps(summary, indent=2)}")
            return False
    dist.barrier()  # rank 0 writes when every process has read
    problem = None
    if facts.main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder)
            checkpoint.remove_orphans(folder)
            if mode == "none" and (folder / "config.json").exists():
                _forget(folder)
            write_json(folder / "config.json", {**vars(args), "resolved": resolved, "identity": identity})
            write_json(folder / "env.json", environment())
        except BlockingIOError:
            problem = f"run directory {folder}: another process works there; wait for it, or give another --out"
        except OSError as error:
            problem = f"run directory {folder}: cannot write there: {error.strerror}"
    if dist.all_reduce(torch.tensor(int(problem is not None), device=facts.device), "max"):
        raise InputError(problem or f"run directory {folder}: process 0 cannot write there")
    return True


def _lock(folder: Path) -> None:
    # Held until the end of the process or of `launch`. A file system without locks is none the worse.
    if fcntl is None:
        return
    file = _locks.enter_context(open(folder / ".lock", "w"))  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise


def _forget(folder: Path) -> None:
    # The state of this run alone: its folder and its stages' folders, which have no config.json of their own.
    stages = [f for f in folder.iterdir() if f.is_dir() and not (f / "config.json").exists()]
    for place in (folder, *stages):
        for name in ("last.pt", "last.previous.pt", "best.pt", "summary.json", "log.jsonl", "resumes.jsonl"):
            (place / name).unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file that is never seen half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(json.dumps(value, indent=2, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave it empty
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict | None:
    """A JSON file; None where there is none.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


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

    def git(*command):
        result = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
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
