"""A run: its directory, its log, its stages, and how it ends."""

import argparse
import contextlib
import copy
import dataclasses
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from common import amp, config
from common.errors import (
    AGAIN,
    EXIT_STOPPED,
    Diverged,
    Finished,
    InputError,
    Stopped,
    first_few,
    only_warn,
    plural,
    say,
    thread_limit,
)
from common.retry import patience
from common.run import checkpoint, dist, ending
from common.run.card import Card
from common.run.content import codes, content_of
from common.run.directory import (
    card_record,
    create_run_dir,
    kept_config,
    output_folder,
    run_dir,
    starts_in_vain,
)
from common.run.files import FORMAT, ROOT, read_config, write_json
from common.run.log import Log
from common.run.progress import Progress
from common.run.signals import MOST_RESTARTS, Interrupted, Signals


@dataclass
class Run:
    """What every stage of a script needs.

    Attributes:
        args: the flags, unchanged.
        world: which process this is, and its device.
        data: the script's data set.
        splits: indices into it by split name.
        folder: the run directory.
        log: the console and log.jsonl.
        model_spec: what a checkpoint must say so that the model can be rebuilt from it.
        card: what the script says of itself.
        chance: the label and the loss of a guess by stage, where there is one.
        stages: the settings of the stages to run, by name, in their order.
        signals: what asks the run to stop; None: nothing is trained.
        results: flat metrics named `stage/split/metric`, of the stages that have ended.
        selected: the last of those stages, whose best.pt the summary names.
        schedule: settings by epoch, where a script trains by such a table.
        phases: the clock of --profile.
        teacher: the model of --teacher, a `common.distill.Teacher`.
        current: the stage at work.
        at_end: what is to be undone when the stages have ended.
        reopened: the epoch at which it had ended before it was asked for more; -1: it had not.
        env: what env.json holds; the last of its `starts` is this one.
        began: whether it is known where this start took up work.
        kept: what every checkpoint holds beside its state, so that it is of use alone.
        latest: the directory of the run that this process has opened last.
    """

    args: argparse.Namespace
    world: dist.Dist
    data: object
    splits: dict[str, np.ndarray]
    folder: Path
    log: Log
    model_spec: dict
    card: Card | None = None
    chance: dict[str, tuple[str, float]] = field(default_factory=dict)
    stages: dict[str, config.StageConfig] = field(default_factory=dict)
    signals: Signals | None = None
    results: dict = field(default_factory=dict)
    selected: Progress | None = None
    schedule: object = None
    phases: amp.Phases | None = None
    teacher: object = None
    current: Progress | None = None
    reopened: int = -1
    at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    env: dict = field(default_factory=dict)
    began: bool = False
    kept: dict = field(default_factory=dict)
    latest: ClassVar[Path | None] = None

    @classmethod
    def open(
        cls,
        args: argparse.Namespace,
        world: dist.Dist,
        signals: Signals,
        data,
        splits: dict[str, np.ndarray],
        model_spec: dict,
        stages: dict[str, config.StageConfig],
        *,
        card: Card,
        chance: dict[str, tuple[str, float]],
        name: str,
        identity: dict,
        input_text: str,
        kept: dict | None = None,
        notes: Sequence[str] = (),
    ) -> "Run":
        """The run in its directory, said in one line.

        With --check nothing there is created or changed: the check only adds its own files.

        Args:
            name, identity: what names the directory, see `run_dir`.
            input_text: what the line says of the model's input.
            kept: what a checkpoint needs beside the flags and the model to be of use alone.
            notes: lines that follow it.

        Raises:
            InputError: see `create_run_dir`; or the ranks read different data.
            Finished: the same run has finished; its figures are printed.
        """
        _require_same_data(world, data, identity["data"])
        folder = run_dir(args, card.name, name, identity)
        run = cls(args, world, data, splits, folder, None, model_spec, card, chance, stages)
        if args.check:
            # Its batches are too small to split.
            run.args = argparse.Namespace(**{**vars(args), "accum": 1})
            run.folder = output_folder(folder)
            run.log = Log(None, main=world.is_main)
            run.log.say(f"check for {folder}; device {world.device}, {input_text}", *notes)
            return run
        resolved = {stage: vars(values) for stage, values in stages.items()} | model_spec
        about = {"format": FORMAT, "card": card_record(card, chance), "identity": identity}
        record = about | {"resolved": resolved}
        cls.latest = folder
        env = create_run_dir(folder, args, record, world, content_of(data))
        if env is None:
            raise Finished
        run.env = env
        run.kept = {"config": kept_config(args, about), **(kept or {})}
        run.signals = signals
        run.log = Log(folder, main=world.is_main, tensorboard=args.tensorboard)
        processes = plural(world.world_size, "process")
        run.log.say(
            f"run directory {folder}; device {world.device}, {processes}, {input_text}", *notes
        )
        return run

    def with_spec(self, **changed) -> "Run":
        """A run whose model differs in these entries of `model_spec`."""
        return dataclasses.replace(self, model_spec=self.model_spec | changed)

    def settings_of(self, stage: str) -> config.StageConfig:
        """The settings of a stage; a stage's baselines (`linear_random`) have the stage's own."""
        return self.stages[stage.split("_")[0]]

    def lap(self, phase: str) -> None:
        """The end of a phase of a training step, for --profile."""
        if self.phases:
            self.phases.lap(phase)

    def open_stage(self, name: str, parts: dict, *, start: str) -> Progress:
        """The state of a stage, restored from its checkpoints.

        A run of several stages keeps the checkpoints of each in a folder of its own. `--resume
        PATH` means the first stage.

        Args:
            parts: the objects with a `state_dict`, by name.
            start: what the stage starts from.

        Raises:
            InputError: the state there is of another model or start, has finished, or differs
                between processes.
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
            content=content_of(self.data),
            kept=self.kept,
        )
        state = checkpoint.load_newest(folder, self.log.say)
        source = None
        wanted = {}
        is_first = name == next(iter(self.stages))
        elsewhere = state is None and is_first and args.resume not in ("auto", "none")
        if args.resume not in ("auto", "none") and not elsewhere and is_first:
            here = {path.resolve() for path in (self.folder, folder, folder / "last.pt")}
            if Path(args.resume).resolve() not in here:
                self.log.say(
                    f"{folder} holds a state, which goes on; --resume {args.resume} began it"
                )
        if elsewhere:
            state, source = checkpoint.load_training_state(Path(args.resume), name)
            if (state["stage"], state["start"]) != (name, start):
                raise InputError(
                    f"--resume {args.resume} is a {state['stage']} state of another start, not of"
                    f" this {name}"
                )
            if os.path.isfile(args.resume):  # beside which any best.pt may lie
                place = state["place"]
                wanted = {"epoch": place["best_epoch"], "value": place.get("best")}
        # All processes take part, so nobody writes before everybody has read.
        step = torch.tensor([state["place"]["step"] if state else -1], device=self.world.device)
        steps = dist.all_gather_rows(step).tolist()
        if len(set(steps)) > 1:
            raise InputError(
                f"the ranks read different states in {folder} (steps {steps}, -1: none): it"
                " must lie on a file system that they share"
            )
        with checkpoint.foreign(args.resume if elsewhere else folder):
            progress.restore(state, source, **wanted)
        self._note_start(progress)
        self.current = progress
        if args.detect_anomaly:
            progress.watch_for_nonfinite()
            self.at_end.callback(progress.stop_watching)
        if elsewhere and self._has_ended(progress):
            raise InputError(
                f"--resume {args.resume} has finished its {plural(progress.planned, 'epoch')}; give"
                " more --epochs"
            )
        return progress

    def _note_start(self, progress: Progress) -> None:
        # A start takes up work in the first stage that has not ended.
        if self.began or not self.env:
            return
        self.began = not self._has_ended(progress)
        starts = self.env["starts"]
        starts[-1].update(
            stage=progress.stage, step=progress.step, evaluated=progress.batches_found
        )
        if self.world.is_main:
            write_json(self.folder / "env.json", self.env)
        if self.began:
            self._end_in_vain(starts)

    def _end_in_vain(self, starts: list[dict]) -> None:
        # A time limit shorter than what comes before the first step would requeue for ever.
        in_vain = 0
        if self.world.is_main and not (sys.stdin and sys.stdin.isatty()):  # a person sees it
            in_vain = starts_in_vain(starts) - 1
        in_vain = int(dist.all_reduce(torch.tensor(in_vain, device=self.world.device), "max"))
        if in_vain >= MOST_RESTARTS:
            raise InputError(
                f"the last {in_vain} starts ended before they gained a step: the time limit is"
                " shorter than reading the data and what comes before the next step; give more"
                " (sbatch --time), or less to read. The next start tries again"
            )

    def _has_ended(self, progress: Progress) -> bool:
        return progress.finished and progress.planned >= self.settings_of(progress.stage).epochs

    def is_done(self, progress: Progress) -> bool:
        """Whether a stage has nothing left to do: its results are taken over.

        More epochs than before reopen it.
        """
        if self._has_ended(progress):
            if self.began:
                self.log.say(f"{progress.stage}: has ended before, from the same start; it stands")
            self._take(progress)
            return True
        self.reopened = progress.epoch if progress.finished else -1
        progress.finished = False
        return False

    def finish(self, progress: Progress, results: dict) -> None:
        """Store a stage's final metrics; the summary names the best model of the last stage."""
        planned = self.settings_of(progress.stage).epochs
        no_epoch_added = progress.epoch == self.reopened
        if progress.epoch < planned:
            text = (
                f"{progress.stage}: stopped early after epoch {progress.epoch} of {planned}, the"
                f" best is epoch {progress.best_epoch}"
            )
            if no_epoch_added:
                text += ". More epochs change nothing, a larger --patience with --force-resume does"
            self.log.say(text)
        progress.finish(results, progress.planned if no_epoch_added else planned)
        self._take(progress)

    def _take(self, progress: Progress) -> None:
        self.results |= progress.results
        if progress.stage in self.stages:
            self.selected = progress

    @contextlib.contextmanager
    def session(self, report) -> Iterator[None]:
        """Around the stages: the report is kept up to date and, however they end, summary.json
        written.

        Args:
            report: the module `common.report.page`, or what else has its `Live` and `write`.

        Raises:
            InputError: for whatever the data or the disk refuses, with the process and the step
                that met it.
            Stopped: another rank exited or hangs.
        """
        status = "failed"
        self.signals.defer()
        try:
            if self.world.is_main:
                self._begin(report)
            watched = watchdog(self.args.timeout, self._heartbeat, self._stalled)
            with self.at_end, watched, self._full_memory():
                yield
            status = "finished"
            self._conclude(status, report)
        except Stopped:
            status = "stopped"
            raise
        except Interrupted:
            status = "stopped"
            self.signals.obeyed.set()
            raise
        except Diverged:
            status = "diverged"
            raise
        except (InputError, OSError) as error:
            what = str(error)
            if isinstance(error, OSError):
                if thread_limit(error):
                    raise
                parts = (error.strerror or error, error.filename)
                what = ": ".join(str(part) for part in parts if part)
            if self.current or isinstance(error, OSError):
                what = self._where() + what
            if patience.interrupted:
                status = "stopped"
                raise Signals.leave(self.signals.asked, what) from None
            if isinstance(error, OSError):
                what += f"; make room or fix it. {AGAIN}"
            raise InputError(what) from None
        except RuntimeError as error:
            if not dist.peer_lost(error):
                raise
            status = "stopped"
            # Where the other one obeyed the signal before this one.
            if self.signals.asked == Signals.REQUEUE:
                text = f"{self._where()}another rank left"
                raise Signals.leave(self.signals.asked, text) from None
            raise Stopped(self._where() + dist.lost_peer(error), EXIT_STOPPED) from None
        finally:
            if status != "finished":
                # What ended the run is worth more than its summary.
                with contextlib.suppress(OSError):
                    self._conclude(status, report)

    @contextlib.contextmanager
    def _full_memory(self) -> Iterator[None]:
        # `launch` adds what helps.
        try:
            yield
        except (MemoryError, OSError, RuntimeError) as error:
            full = amp.out_of_memory(error, self.world.device)
            if not full:
                raise
            raise amp.OutOfMemory(f"{self._where()}{full}") from None

    def _begin(self, report) -> None:
        # A summary would be of an earlier start: this one has not ended.
        (self.folder / "summary.json").unlink(missing_ok=True)
        self.env["data_read"] = self.describe_data()
        write_json(self.folder / "env.json", self.env)
        self.log.watcher = report.Live(self.folder, self.log.say)

    def _heartbeat(self):
        # Of steps, and of batches of an evaluation.
        return self.current and (self.current.stage, self.current.heartbeat)

    def _stalled(self) -> str:
        return f"{self._where()}no step in {self.args.timeout:g} minutes (--timeout)"

    def _where(self) -> str:
        at = f", {self.current.stage} step {self.current.step}" if self.current else ""
        return f"rank {self.world.rank} of {self.world.world_size}{at}: "

    def _conclude(self, status: str, report) -> None:
        record = {"status": status, "seconds": round(self.log.seconds, 1)}
        if self.selected:
            record["best_epoch"] = self.selected.best_epoch
            record["best_value"] = self.selected.best
            best_is = {True: "highest", False: "lowest"}
            record["best_is"] = best_is.get(self.selected.higher_is_better)
            record["best_model_path"] = str(self.selected.folder / "best.pt")
        try:
            if self.world.is_main:
                write_json(self.folder / "summary.json", self.results | record)
                self.log.watcher = None
                page = self.folder
                with only_warn(self.log.say, str(self.folder / "report.html")):
                    page = report.write(self.folder)
                if self.phases:
                    self.log.say(f"profile: {self.phases.describe()}")
                    told = self.phases.describe_input(self.data.faster(self.args.workers))
                    if told:
                        self.log.say(f"profile: {told}")
                texts = [f"{status}: {page}"]
                if status == "finished":
                    with only_warn(self.log.say, str(self.folder / "config.json")):
                        config = read_config(self.folder)
                        texts = ending.lines(self.folder, config, self.results | record, page)
                self.log.say(*texts)
        finally:
            self.log.close()

    def describe_data(self) -> str:
        """The data in one line."""
        return getattr(self.data, "table", self.data).describe()


def _require_same_data(world: dist.Dist, data, fingerprint: str) -> None:
    # The directory's name would differ too, and a rank with fewer batches would leave the others.
    if world.world_size == 1:
        return
    own = torch.tensor([[int(codes([fingerprint])[0]), len(getattr(data, "table", data))]])
    rows = dist.all_gather_rows(own.to(world.device)).tolist()
    ranks: dict[tuple, list[int]] = {}
    for rank, row in enumerate(rows):
        ranks.setdefault(tuple(row), []).append(rank)
    if len(ranks) > 1:
        texts = [
            f"{plural(count, 'item')} ({digits:08x}) on rank {first_few(of)}"
            for (digits, count), of in ranks.items()
        ]
        raise InputError(
            f"the ranks read different data: {'; '.join(texts)}; give all of them the same --data,"
            " or complete the copies of it"
        )


@contextlib.contextmanager
def watchdog(
    minutes: float, heartbeat: Callable[[], object], stalled: Callable[[], str]
) -> Iterator[None]:
    """End the process with code 75 where `heartbeat()` stays the same for `minutes`.

    A read that hangs, a process that stopped, a dead GPU: nothing raises, so a thread counts.
    Counts, so that a job which is suspended as a whole has not stalled. Whoever waits in `retried`
    has not, either.

    Args:
        stalled: gives the beginning of the line to end with.
    """
    over = threading.Event()
    main_thread = threading.main_thread().ident

    def watch():
        seconds = min(6 * minutes, 5.0)
        last = None
        idle = 0.0
        while not over.wait(seconds):
            now = heartbeat(), patience.heartbeat
            idle = idle + seconds if now == last else 0.0
            last = now
            if idle >= 60 * minutes:
                frames = traceback.extract_stack(sys._current_frames()[main_thread])
                why = "the data, another rank or the device stalls"
                text = f"{stalled()}, it waits in {_deepest_of_ours(frames)}: {why}. {AGAIN}"
                say(text, file=sys.stderr)
                os._exit(EXIT_STOPPED)  # a thread that hangs could not be waited for

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(5)  # a thread that runs when the interpreter ends can abort it


def _deepest_of_ours(frames: traceback.StackSummary) -> str:
    frame = [f for f in frames if Path(f.filename).is_relative_to(ROOT)][-1]
    return f"{Path(frame.filename).relative_to(ROOT)} line {frame.lineno}, {frame.name}"


def test_best_and_last(
    progress: Progress, model: nn.Module, test: Callable[[nn.Module, dict], tuple[dict, object]]
) -> tuple[dict, object]:
    """(test metrics, what else `test` gave of the selected model): every script's test at a stage's
    end.

    Those of the last epoch are named `NAME_last_epoch`.

    Args:
        model: it keeps the last epoch's weights: a stop meanwhile must store them.
        test: (network, the metrics stored with it) -> (its test metrics by name, something else).
    """
    last, _ = test(model, progress.results)
    selected = copy.deepcopy(model)
    selected.load_state_dict(progress.best_weights())
    results, rest = test(selected, progress.best_metrics())
    return results | {f"{name}_last_epoch": value for name, value in last.items()}, rest
