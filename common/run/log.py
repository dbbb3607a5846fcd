"""One console line and one JSON line per interval; TensorBoard where asked for."""

import contextlib
import json
import math
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

from common import live
from common.amp import peak_bytes
from common.errors import TRANSIENT, InputError, first_few, only_warn, plural, say
from common.live import digits, duration
from common.retry import retried
from common.run.files import atomic_write

# Fields that differ between two runs of the same command: the only ones.
TIMING = ("time", "rate", "eta_s", "wait", "memory_gb")
FIRST_STEPS = 3
RESUMES = "resumes.jsonl"


class Pace:
    """Rate and remaining time of a loop.

    Both come from its recent steps; the first one, a warm-up, is left out.
    """

    def __init__(self, items_per_step: int, total_steps: int, unit: str = "item"):
        self.items_per_step = items_per_step
        self.total_steps = total_steps
        self.unit = unit
        self.steps = 0
        self.recent: deque = deque(maxlen=50)  # seconds of the last steps
        self.waits: deque = deque(maxlen=50)  # of these, the seconds without a batch
        self.last = time.monotonic()

    def tick(self) -> None:
        """The end of a step."""
        now = time.monotonic()
        self.steps += 1
        if self.steps == 2:
            # It replaces the first, which paid for allocation and compilation.
            self.recent[0] = now - self.last
            if len(self.waits) > 1:
                self.waits.popleft()
        else:
            self.recent.append(now - self.last)
        self.last = now

    def pause(self) -> None:
        """Leave the time since the last tick (an evaluation, a save) out of the pace."""
        self.last = time.monotonic()

    def waiting(self, batches: Iterable) -> Iterator:
        """The batches of a loop as they are; how long each is waited for is what `wait` tells."""
        iterator = iter(batches)
        begun = time.monotonic()
        for batch in iterator:
            self.waits.append(time.monotonic() - begun)
            yield batch
            begun = time.monotonic()

    def wait(self) -> float:
        """The share of the recent steps' time that was spent waiting for data."""
        if not self.recent:
            return 0.0
        return min(sum(self.waits) / max(sum(self.recent), 1e-9), 1.0)

    @property
    def seconds_per_step(self) -> float:
        """The median of the recent steps."""
        return median(self.recent) if self.recent else 0.0

    def rate(self) -> float:
        """Items a second, over the recent steps."""
        mean = sum(self.recent) / max(len(self.recent), 1)
        return self.items_per_step / mean if mean else 0.0

    def eta(self, step: int) -> float:
        """Seconds that the steps after `step` will take."""
        return self.seconds_per_step * max(self.total_steps - step, 0)

    def describe(self, step: int) -> str:
        """`3210 img/s | eta 41m` of the steps after `step`."""
        return f"{digits(self.rate())} {self.unit}/s | eta {duration(self.eta(step))}"


class Log:
    """Rank 0's console and `log.jsonl`; silent on the other ranks.

    Every JSON line holds `stage`, `step` and `epoch`, then metrics named `stage/split/metric`.
    `watcher`, where there is one, is called after every line. Where a run was resumed stands in
    `resumes.jsonl`, not here: an interrupted run's log equals that of one that never stopped.
    """

    def __init__(self, folder: Path | None, *, main: bool, tensorboard: bool = False):
        self.main = main
        self.start = time.monotonic()
        self.counts: Counter = Counter()  # lines of each stage
        self.lost: defaultdict[str, list[int]] = defaultdict(list)  # the damaged ones among them
        self.path = folder / "log.jsonl" if main and folder else None
        self.file = None
        if self.path:
            try:
                self._take_over()
            except OSError as error:
                raise InputError(f"{self.path}: {error.strerror}") from None
        self.board = _summary_writer(folder) if main and tensorboard else None
        self.watcher = None

    def _take_over(self) -> None:
        parsed = _parse(self.path, self.say)
        # Where a damaged line stood in its stage, which is taken to be that of the line before.
        stage = next((line["stage"] for line in parsed if line), "")
        for line in parsed:
            if line is None:
                self.lost[stage].append(self.counts[stage] + len(self.lost[stage]))
            else:
                stage = line["stage"]
                self.counts[stage] += 1
        lines = [line for line in parsed if line]
        # A line torn by a killed process must not meet the next one.
        if not lines or self.path.read_bytes() != _text(lines).encode():
            self._rewrite(lines)
        self._open()

    def say(self, *lines: str) -> None:
        """Plain lines on the console; what is not printable in them shows as escapes."""
        if self.main:
            say(*lines)

    def due(self, step: int, every: int) -> bool:
        """Whether a step has its line.

        The first ones do, so that a slow run shows its pace at once.
        """
        return step <= FIRST_STEPS or step % every == 0

    def interval(
        self, stage: str, step: int, epoch: int, values: dict, pace: Pace, *, quiet: bool = False
    ) -> None:
        """One line of the loop: the same fields on the console and in `log.jsonl`.

        `quiet`: in the file alone.
        """
        if not quiet:
            total = pace.total_steps
            shown = " | ".join(f"{name} {digits(value)}" for name, value in values.items())
            at = f"{stage} step {step:0{len(str(total))}d}/{total}"
            self.say(f"{at} | {shown} | {pace.describe(step)}")
        timing = {
            "rate": round(pace.rate(), 2),
            "eta_s": round(pace.eta(step), 1),
            "wait": round(pace.wait(), 4),
            "memory_gb": round((peak_bytes() or 0) / 1e9, 3),
        }
        self._write(stage, step, epoch, values | timing)

    def metrics(
        self, stage: str, step: int, epoch: int, values: dict, *, quiet: bool = False
    ) -> None:
        """Metrics of an epoch or of the end of a stage, named `stage/split/metric`.

        `quiet`: in the file alone.
        """
        if not quiet:
            shown = " | ".join(
                f"{name.removeprefix(stage + '/')} {digits(value)}"
                for name, value in values.items()
            )
            self.say(f"{stage} epoch {epoch} | {shown}")
        self._write(stage, step, epoch, values)

    def _write(self, stage: str, step: int, epoch: int, values: dict) -> None:
        if self.file:
            line = {"stage": stage, "step": step, "epoch": epoch}
            for name, value in values.items():
                line[name] = value if math.isfinite(value) else None  # JSON has no NaN
            line["time"] = round(self.seconds, 2)
            text = json.dumps(line) + "\n"
            retried(lambda: self._append(text), self.path, was_there=True)
            self._length += len(text)
            self.counts[stage] += 1
        board, self.board = self.board, None
        if board:
            with only_warn(self.say, "TensorBoard"):
                for name, value in values.items():
                    board.add_scalar(name if "/" in name else f"{stage}/step/{name}", value, step)
                self.board = board
        if self.watcher:
            self.watcher()

    def resumed(self, stage: str, step: int, epoch: int) -> None:
        """Note that a stage resumes from a checkpoint: a mark in the report's curves."""
        if self.path:
            lines = read(self.path.parent, RESUMES, self.say)
            lines.append({"stage": stage, "step": step, "epoch": epoch})
            with atomic_write(self.path.with_name(RESUMES)) as file:
                file.write(_text(lines))

    @property
    def seconds(self) -> float:
        """Time spent on the run so far, over all of its starts."""
        return time.monotonic() - self.start

    def go_on_from(self, seconds: float) -> None:
        """Count on from the time that an earlier start had spent."""
        self.start = min(self.start, time.monotonic() - seconds)

    def count(self, stage: str) -> int:
        """Lines of a stage in `log.jsonl` so far: a checkpoint stores it."""
        return self.counts[stage]

    def cut(self, stage: str, count: int, step: int | None = None) -> None:
        """Drop a stage's lines after the first `count`, which a resumed run writes again.

        `step` is where it resumes: what is of a later step goes, also where damaged lines leave the
        count in doubt. Lines that are missing without a trace are said.
        """
        if not self.file:
            return
        lost = sum(place < count for place in self.lost.pop(stage, []))
        if self.counts[stage] > count - lost or lost:
            seen = 0
            kept = []
            for line in read(self.path.parent):
                if line["stage"] == stage:
                    if seen == count - lost or (step is not None and line["step"] > step):
                        continue
                    seen += 1
                kept.append(line)
            self.file.close()
            self._rewrite(kept)
            self._open()
            self.counts[stage] = seen
        if self.counts[stage] + lost < count:
            self.say(
                f"{self.path} has {self.counts[stage]} of the {plural(count, 'line')} of {stage}"
                " that the checkpoint counts; the others are lost"
            )

    def _open(self) -> None:
        self.file = open(self.path, "r+", newline="", encoding="utf-8")  # noqa: SIM115
        self._length = self.file.seek(0, os.SEEK_END)

    def _append(self, text: str) -> None:
        if self.file.closed:  # after a failure: what is half written is cut
            self.file = open(self.path, "r+", newline="", encoding="utf-8")  # noqa: SIM115
            self.file.truncate(self._length)
            self.file.seek(0, os.SEEK_END)
        try:
            self.file.write(text)
            self.file.flush()
        except OSError:
            with contextlib.suppress(OSError):
                self.file.close()
            raise

    def _rewrite(self, lines: list[dict]) -> None:
        # In one piece: a process killed here must not lose the lines of hours.
        with atomic_write(self.path) as file:
            file.write(_text(lines))

    def sync(self) -> None:
        """Force the lines so far to the disk: a checkpoint counts on them."""
        if not self.file:
            return
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            # Another call would say that all is well with what this one has lost.
            self.file.close()
            self._rewrite(read(self.path.parent))
            self._open()

    def close(self) -> None:
        """End the live line, and close the files."""
        live.line.clear()
        if self.board:
            with only_warn(self.say, "TensorBoard"):
                self.board.close()
        if self.file:
            self.file.close()


def _summary_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard needs the package tensorboard: pip install tensorboard"
        ) from None
    return SummaryWriter(str(folder))


def _text(lines: list[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def read(
    folder: Path, name: str = "log.jsonl", say: Callable[[str], None] | None = None
) -> list[dict]:
    """The lines of a run's log.jsonl, or of its resumes.jsonl; none where there is no file.

    Damaged ones are left out, and `say` told of them; so is a torn last one, which a killed process
    leaves.
    """
    return [line for line in _parse(Path(folder) / name, say) if line]


def _parse(path: Path, say: Callable[[str], None] | None) -> list[dict | None]:
    # None stands for a damaged line.
    try:
        texts = retried(path.read_bytes, path).split(b"\n")
    except FileNotFoundError:
        return []
    lines = [_line(text) for text in texts]
    if lines[-1] is None:
        del lines[-1]  # torn, or nothing after the last end of a line
    damaged = [str(number) for number, line in enumerate(lines, 1) if line is None]
    if damaged and say:
        word, verb = ("line", "is") if len(damaged) == 1 else ("lines", "are")
        say(f"{path}: {word} {first_few(damaged)} {verb} damaged and left out")
    return lines


def _line(text: bytes) -> dict | None:
    # As `Log` writes it: a stage, a step, an epoch, and more numbers or nulls; else None.
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("stage"), str):
        return None
    values = {name: value for name, value in line.items() if name != "stage"}
    if not all(isinstance(values.get(name), int) for name in ("step", "epoch")):
        return None
    for value in values.values():
        # A NaN is below nothing, and no integer is too large to compare.
        if value is not None and not (isinstance(value, (int, float)) and abs(value) < 1e300):
            return None
    return line
