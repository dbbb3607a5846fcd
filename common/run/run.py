"""A run: its directory, its log, its stages, and how it ends."""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import platform
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

from common import amp, config, distill
from common.errors import AGAIN, EXIT_STOPPED, Diverged, Finished, InputError, Stopped
from common.report import page
from common.run import checkpoint, dist
from common.run.dist import _lost
from common.run.files import ROOT, lock_folder, read_json, run_dir_of, write_json
from common.run.inference import output_folder
from common.run.log import Log, Pace
from common.run.progress import Progress
from common.run.signals import Signals


@dataclass
class Run:
    """What every stage of a script needs.

    Attributes:
        args: the flags, unchanged.
        world: which process this is, and its device.
        data: the script's data set.
        splits: indices into it by split name.
        folder: the run directory.
        model_spec: what a checkpoint must say so that the model can be rebuilt from it.
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
    world: dist.Dist
    data: object
    splits: dict[str, np.ndarray]
    folder: Path
    log: Log
    signals: Signals | None
    model_spec: dict
    stages: dict[str, config.StageConfig]
    results: dict = field(default_factory=dict)
    selected: Progress | None = None
    phases: amp.Phases | None = None
    teacher: distill.Teacher | None = None
    lesson: dict | None = None
    current: Progress | None = None
    reopened: int = -1
    at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @classmethod
    def open(
        cls,
        args,
        world: dist.Dist,
        signals: Signals,
        data,
        splits: dict[str, np.ndarray],
        model_spec: dict,
        stages: dict[str, config.StageConfig],
        *,
        name: str,
        identity: dict,
        size: str,
        same: tuple = ("image_size", "classes"),
    ) -> "Run":
        """The run in its directory, said in one line.

        With --check nothing there is claimed or changed: the check only adds its own files.

        `name` and `identity` name the directory (see `directory`), `size` is what the line says of
        the model, `same` in what a teacher must agree with it (see `distil.read`).

        Raises:
            InputError: see `claim`.
            Finished: the same run has finished; its summary is printed.
        """
        lesson, digest = distill.read(args, model_spec, same)
        identity = identity | digest
        folder = run_dir(args, model_spec["script"], name, identity)
        if args.check:
            # Its batches are too small to split.
            whole = argparse.Namespace(**{**vars(args), "accum": 1})
            run = cls(
                whole,
                world,
                data,
                splits,
                output_folder(folder),
                Log(None, main=world.is_main),
                None,
                model_spec,
                stages,
            )
            run.lesson = lesson
            run.log.say(f"check for {folder}; device {world.device}, {size}")
            return run
        if not create_run_dir(
            folder,
            args,
            identity,
            {stage: vars(values) for stage, values in stages.items()} | model_spec,
            world,
        ):
            raise Finished
        log = Log(folder, main=world.is_main, tensorboard=args.tensorboard)
        log.say(
            f"run directory {folder}; device {world.device}, {world.world_size} process(es), {size}"
        )
        return cls(
            args, world, data, splits, folder, log, signals, model_spec, stages, lesson=lesson
        )

    def attach_teacher(
        self, build_model: Callable[["Run"], nn.Module], outputs=nn.Module.__call__, evaluate=None
    ) -> None:
        """Make the teacher, where there is one; see `distil.build`."""
        if self.lesson:
            self.teacher = distill.build(self, self.lesson, build_model, outputs, evaluate)

    def add_distillation(
        self, terms: dict[str, Tensor], student: Tensor, x: Tensor, items: np.ndarray | None = None
    ) -> dict:
        """The terms of a loss with the teacher's among them, where there is one; see
        `distil.blend`.
        """
        return distill.blend(self.teacher, terms, student, x, items)

    def with_spec(self, **changed) -> "Run":
        """A run whose model differs in these entries of `model_spec`."""
        return dataclasses.replace(self, model_spec=self.model_spec | changed)

    def lap(self, phase: str | None) -> None:
        """The end of a phase of a training step, or (None) of what is no part of a step, for
        --profile.
        """
        if self.phases:
            self.phases.lap(phase)

    def stage(self, name: str, parts: dict, *, start: str) -> Progress:
        """The state of a stage, restored from its checkpoints.

        `parts` are the objects with a `state_dict`, `start` names what the stage starts from. A run
        of several stages keeps the checkpoints of each in a folder of its own. `--resume PATH`
        means the first stage.
        """
        args = self.args
        folder = self.folder if list(self.stages) == [name] else self.folder / name
        progress = Progress(
            folder,
            name,
            parts=parts,
            log=self.log,
            world=self.world,
            signals=self.signals,
            model_spec=self.model_spec | {"stage": name},
            start=start,
            save_every=args.save_every,
            max_steps=args.max_steps,
        )
        state, best = checkpoint.load_newest(folder, self.log.say), None
        elsewhere = (
            state is None
            and name == next(iter(self.stages))
            and args.resume not in ("auto", "none")
        )
        if elsewhere:
            state, best = checkpoint.load_training_state(Path(args.resume), name)
            if (state["stage"], state["start"]) != (name, start):
                raise InputError(
                    f"--resume {args.resume} is a {state['stage']} state of another start, not of"
                    f" this {name}"
                )
        # All processes take part, so nobody writes before everybody has read.
        seen = dist.all_gather_rows(
            torch.tensor([state["place"]["step"] if state else -1], device=self.world.device)
        )
        if len(set(seen.tolist())) > 1:
            raise InputError(
                f"the processes read different states in {folder} (steps {seen.tolist()}, -1:"
                " none): it must lie on"
                " a file system that they share"
            )
        progress.restore(state, best)
        self.current = progress
        if args.detect_anomaly:
            progress.watch_for_nonfinite()
            self.at_end.callback(progress.stop_watching)
        if elsewhere and progress.finished and progress.planned >= self.stages[name].epochs:
            raise InputError(
                f"--resume {args.resume} has finished its {progress.planned} epochs; give more"
                " --epochs"
            )
        return progress

    def is_done(self, progress: Progress) -> bool:
        """Whether a stage has nothing left to do: its results are taken over. More epochs than
        before reopen it.
        """
        # A stage's baselines (`linear_random`) are as long as the stage itself.
        if (
            progress.finished
            and progress.planned >= self.stages[progress.stage.split("_")[0]].epochs
        ):
            self._take(progress)
            return True
        self.reopened = progress.epoch if progress.finished else -1
        progress.finished = False
        return False

    def finish(self, progress: Progress, results: dict) -> None:
        """Store a stage's final metrics; the summary names the best model of the last stage."""
        planned, idle = (
            self.stages[progress.stage.split("_")[0]].epochs,
            progress.epoch == self.reopened,
        )
        if progress.epoch < planned:
            more = (
                ". More epochs change nothing, a larger --patience with --force-resume does"
                if idle
                else ""
            )
            self.log.say(
                f"{progress.stage}: stopped early after epoch {progress.epoch} of {planned}, the"
                " best is epoch"
                f" {progress.best_epoch}{more}"
            )
        progress.finish(results, progress.planned if idle else planned)
        self._take(progress)

    def _take(self, progress: Progress) -> None:
        self.results |= progress.results
        if progress.stage in self.stages:
            self.selected = progress

    def end_step(
        self,
        progress: Progress,
        pace: Pace,
        losses: dict[str, Tensor],
        lr: float,
        norm: Tensor,
        bad: Tensor,
        *,
        chance: float | None = None,
        more: Callable[[], dict] = dict,
    ) -> None:
        """What follows an update in every loop: the epoch's sums, the pace, a line where one is
        due, the checkpoint.

        Args:
            losses: device scalars by name.
            lr, norm, bad: of the step; `norm` (the gradient's) and `bad` (masked) are device
                scalars.
            chance: the loss at chance level, where there is one.
            more: further values of a line; called only where one is due, as it may wait for the
                device.

        Raises:
            Diverged, Stopped: see `Progress.end_step`.
        """
        progress.add(**losses)
        pace.tick()
        name, done, epochs = progress.stage, progress.step + 1, self.stages[progress.stage].epochs
        if self.log.due(done, self.args.log_every):
            values = {key: dist.mean(value).item() for key, value in losses.items()}
            values |= {} if chance is None else {"loss_over_chance": values["loss"] / chance}
            values |= {"lr": lr, "grad_norm": norm.item()} | more()
            self.log.interval(name, done, progress.epoch + 1, values, pace)
        self.log.progress(name, done, pace)
        if pace.steps == 2:
            self.log.cost(name, pace.total_steps // epochs, epochs, pace, self.world.device)
        progress.end_step(bad)

    @contextlib.contextmanager
    def session(self):
        """Around the stages: report.html is kept up to date and, however they end, summary.json
        written.

        Raises:
            InputError: for whatever the data or the disk refuses, with the process and the step
                that met it.
            Stopped: another process is gone.
        """
        status = "failed"
        self.signals.defer()
        try:
            if self.world.is_main:
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
            what = ": ".join(
                str(part) for part in (error.strerror or error, error.filename) if part
            )
            raise InputError(f"{self._where()}{what}; make room or fix it. {AGAIN}") from None
        except RuntimeError as error:
            if not dist.peer_lost(error):
                raise
            status = "stopped"
            if (
                self.signals.asked == Signals.REQUEUE
            ):  # the other one obeyed the signal before this one
                raise Signals.leave(
                    self.signals.asked, f"{self._where()}another process left"
                ) from None
            raise Stopped(self._where() + _lost(error), EXIT_STOPPED) from None
        finally:
            if status != "finished":
                with contextlib.suppress(
                    OSError
                ):  # what ended the run is worth more than its summary
                    self._conclude(status)

    def _begin(self) -> None:
        (self.folder / "summary.json").unlink(
            missing_ok=True
        )  # of an earlier start: this one has not ended
        record = dict(
            data_read=self.describe_data(),
            device=str(self.world.device),
            processes=self.world.world_size,
        )
        write_json(self.folder / "env.json", (read_json(self.folder / "env.json") or {}) | record)
        self.log.watcher = page.Live(self.folder, self.log.say)

    @contextlib.contextmanager
    def _watched(self):
        # A read that hangs, a process that stopped, a dead GPU: nothing raises, so a thread counts
        # the time without a step or a batch of an evaluation. Counts, so that a job which is
        # suspended as a whole has not stalled.
        over, minutes, main = threading.Event(), self.args.timeout, threading.main_thread().ident

        def watch():
            seconds, last, idle = min(6 * minutes, 5.0), None, 0.0
            while not over.wait(seconds):
                beat = self.current and (self.current.stage, self.current.heartbeat)
                idle, last = (idle + seconds if beat == last else 0.0), beat
                if idle >= 60 * minutes:
                    stack = traceback.extract_stack(sys._current_frames()[main])
                    own = [frame for frame in stack if Path(frame.filename).is_relative_to(ROOT)]
                    at = (
                        f"{Path(own[-1].filename).relative_to(ROOT)} line {own[-1].lineno},"
                        f" {own[-1].name}"
                    )
                    what = f"no step in {minutes:g} minutes (--timeout), it waits in {at}"
                    why = "the data, another process or the device stalls"
                    print(f"{self._where()}{what}: {why}. {AGAIN}", file=sys.stderr, flush=True)
                    os._exit(EXIT_STOPPED)  # a thread that hangs could not be waited for

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join(5)  # a thread that runs when the interpreter ends can abort it

    def _where(self) -> str:
        at = f", {self.current.stage} step {self.current.step}" if self.current else ""
        return f"process {self.world.rank} of {self.world.world_size}{at}: "

    def _conclude(self, status: str) -> None:
        record = {"status": status, "seconds": round(self.log.seconds, 1)}
        if self.selected:
            best = self.selected.folder / "best.pt"
            record |= {"best_epoch": self.selected.best_epoch, "best_value": self.selected.best}
            record |= {"best_model_path": str(best)}
        try:
            if self.world.is_main:
                write_json(self.folder / "summary.json", self.results | record)
                self.log.watcher = None
                page.write(self.folder)
                if self.phases:
                    self.log.say(f"profile: {self.phases.describe()}")
                self.log.say(f"{status}: {self.folder / 'report.html'}")
        finally:
            self.log.close()

    def describe_data(self) -> str:
        """The data in one line."""
        return getattr(self.data, "table", self.data).describe()


def test_best_and_last(
    progress: Progress, model: nn.Module, test: Callable[[nn.Module, dict], tuple[dict, object]]
):
    """(test metrics, what else `test` gave of the selected model): every script's test at a stage's
    end.

    `test(network, metrics)` gives the test metrics of a network by name, and something else; it
    gets the metrics that were stored with the network. Those of the last epoch are named
    `NAME_last_epoch`. `model` keeps the last epoch's weights: a stop meanwhile must store them.
    """
    last, _ = test(model, progress.results)
    chosen = copy.deepcopy(model)
    chosen.load_state_dict(progress.best_weights())
    results, rest = test(chosen, progress.best_metrics())
    return results | {f"{name}_last_epoch": value for name, value in last.items()}, rest


def run_dir(args, script: str, name: str, identity: dict) -> Path:
    """The run directory: --out (of a trial of --search a folder in it), or the one that `--resume
    PATH` goes on with, or runs/SCRIPT/NAME-HASH.
    """
    if args.out:
        return Path(args.out) if args.trial is None else Path(args.out) / f"trial{args.trial}"
    if args.resume not in ("auto", "none"):
        return run_dir_of(args.resume)
    return Path("runs") / script / f"{name}-{config.digest(identity)}"


def create_run_dir(folder: Path, args, identity: dict, resolved: dict, world: dist.Dist) -> bool:
    """Create `folder` and write config.json and env.json; or print the summary of the same run and
    return False, if it has finished.

    Raises:
        InputError: the run there, or the one of --resume PATH, has another identity and
            --force-resume is not given; or the folder cannot be written.
    """
    mode = config.resume_mode(args, (read_json(folder / "env.json") or {}).get("slurm_job"))
    before = None if mode == "none" else read_json(folder / "config.json")
    if before is None and mode not in ("auto", "none"):
        before = read_json(run_dir_of(mode) / "config.json")
    if before is not None:
        # To go on for longer is what `--resume PATH --epochs MORE` asks for; any other difference
        # makes another run.
        free = set() if mode == "auto" else {"epochs", "warmup_epochs"}
        there, default = before["identity"], "its default"
        names = sorted((there.keys() | identity.keys()) - free)
        pairs = [(name, there.get(name, default), identity.get(name, default)) for name in names]
        differences = [
            f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new
        ]
        if differences and not args.force_resume:
            longer = f", --resume {folder} for more epochs" if mode == "auto" else ""
            raise InputError(
                f"{folder} holds another run: {'; '.join(differences)}. Another --out{longer}, or"
                " --force-resume"
            )
        summary = read_json(folder / "summary.json")
        if mode == "auto" and not differences and summary and summary["status"] == "finished":
            if world.is_main:
                print(f"{folder} has finished; its summary:\n{json.dumps(summary, indent=2)}")
            return False
    dist.barrier()  # rank 0 writes when every process has read
    problem = None
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock_folder(folder)
            checkpoint.remove_orphans(folder)
            if mode == "none" and (folder / "config.json").exists():
                _forget(folder)
            write_json(
                folder / "config.json", {**vars(args), "resolved": resolved, "identity": identity}
            )
            write_json(folder / "env.json", environment())
        except BlockingIOError:
            problem = (
                f"run directory {folder}: another process works there; wait for it, or give"
                " another --out"
            )
        except OSError as error:
            problem = f"run directory {folder}: cannot write there: {error.strerror}"
    if dist.all_reduce(torch.tensor(int(problem is not None), device=world.device), "max"):
        raise InputError(problem or f"run directory {folder}: process 0 cannot write there")
    return True


def _forget(folder: Path) -> None:
    # The state of this run alone: its folder and its stages' folders, which have no config.json of
    # their own.
    stages = [f for f in folder.iterdir() if f.is_dir() and not (f / "config.json").exists()]
    for place in (folder, *stages):
        for name in (
            "last.pt",
            "last.previous.pt",
            "best.pt",
            "summary.json",
            "log.jsonl",
            "resumes.jsonl",
        ):
            (place / name).unlink(missing_ok=True)


def environment() -> dict:
    """Versions, hardware, commit and command: what a figure needs beside it to mean something."""

    def git(*command):
        result = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        commit, changes = (
            git("rev-parse", "HEAD"),
            git("status", "--porcelain", "--untracked-files=no"),
        )
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
