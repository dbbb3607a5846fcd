"""Signals: save at the next step boundary and leave; leave at once where nothing is to be saved."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

from common.errors import AGAIN, EXIT_BAD_INPUT, EXIT_STOPPED, Stopped, say
from common.run import dist

# Of a time limit or a preemption; the others mean stop.
_WARNINGS = ("SIGUSR1", "SIGUSR2")
_ENDS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU")
# Seconds that the main thread has to obey, where nothing would be lost: it may stand in a backward
# pass of minutes or in a read that hangs, where Python runs no handler.
_PATIENCE = 5.0
# Starts in a row without a step gained, after which there is none of the kind.
MOST_RESTARTS = 3


class Interrupted(BaseException):
    """A signal came where it need not wait; the message says what is lost.

    No `Exception`: what reads damaged files catches many of those.
    """


class Signals:
    """What the signals ask of a run.

    USR1 and USR2 (time limit, preemption) ask for a save and a requeue; TERM, HUP, XCPU and Ctrl-C
    for a save and an end. The first one decides: TERM after USR1 is Slurm's time limit after its
    warning, USR1 after TERM changes nothing. A second Ctrl-C leaves at once, in one line.

    The handler sets a flag: saving inside it could tear the step that it interrupts. It raises
    `Interrupted` only where `urgency` says so: in `at_once`, and there until `defer`. A context,
    after which the handlers are those from before; where the process `ends_with` it and was asked
    to, what comes late is not heard any more.
    """

    REQUEUE = 1
    END = 2
    # Values of `urgency`. A signal waits for a boundary; it is raised; it is raised, and a process
    # that does not come to that within seconds is ended.
    WAIT, RAISE, LEAVE = range(3)

    def __init__(self, *, ends_with: bool = False):
        self.ends_with = ends_with
        self.asked = 0
        self.urgency = self.WAIT
        self.deferred = False
        self.obeyed = threading.Event()
        self._raised = False
        self._earlier_handlers = {}

    def __enter__(self) -> "Signals":
        for name in (*_WARNINGS, *_ENDS):
            code = getattr(signal, name, None)  # Windows has no USR1
            # nohup ignores HUP, and means it.
            if code and not (name == "SIGHUP" and signal.getsignal(code) == signal.SIG_IGN):
                self._earlier_handlers[code] = signal.signal(code, self._handle)
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._earlier_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self.obeyed.set()
        for code, handler in self._earlier_handlers.items():
            signal.signal(code, self._too_late if self.asked and self.ends_with else handler)
        signal.set_wakeup_fd(self._earlier_fd)
        self._writer.close()
        self._watcher.join()
        self._reader.close()

    def defer(self) -> None:
        """From now on a signal waits for the next boundary of a step."""
        self.urgency = self.WAIT
        self.deferred = True

    @contextlib.contextmanager
    def at_once(self, urgency: int = LEAVE) -> Iterator[None]:
        """Inside, a signal raises `Interrupted`: what is done here needs no saving."""
        before, self.urgency = self.urgency, urgency
        try:
            if self.asked and not self._raised:
                self._raise("nothing to save yet")
            yield
        finally:
            self.urgency = before

    def _handle(self, number: int, frame) -> None:
        again = number == signal.SIGINT and self.asked
        self.asked = self.END if again else self.asked or self._meaning(number)
        if self.urgency and not self._raised:
            self._raise("nothing to save yet")
        if again:
            self._raise("left at the second Ctrl-C, without saving")

    @staticmethod
    def _too_late(number: int, frame) -> None:
        if number == signal.SIGINT:
            os._exit(EXIT_STOPPED)  # it waits for a thread that hangs

    def _raise(self, text: str) -> None:
        self._raised = True
        raise Interrupted(text)

    @staticmethod
    def _meaning(number: int) -> int:
        return Signals.REQUEUE if signal.Signals(number).name in _WARNINGS else Signals.END

    def _watch(self) -> None:
        # The numbers of signals, as they arrive and whatever the main thread does.
        asked = 0
        while number := self._reader.recv(1):
            code = number[0]
            if code not in self._earlier_handlers:
                continue
            leaves = self.urgency == self.LEAVE or (asked and code == signal.SIGINT)
            asked = asked or self._meaning(code)
            if leaves and not self.obeyed.wait(_PATIENCE):
                ending = self.leave_early(asked, "nothing was saved")
                say(ending, file=sys.stderr)
                os._exit(ending.code)

    @staticmethod
    def leave_early(asked: int, why: str) -> Stopped:
        """`leave` of a process that has saved nothing.

        A job that was requeued MOST_RESTARTS times and is still not training would be for ever.
        """
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if asked != Signals.REQUEUE or restarts < MOST_RESTARTS:
            return Signals.leave(asked, why, "Run the same command again")
        return Stopped(
            f"error: {why}, at restart {restarts} of the job, which is not requeued again: its time"
            " limit is shorter than what comes before the first step; give more, sbatch --time",
            EXIT_BAD_INPUT,
        )

    @staticmethod
    def leave(
        asked: int, saved: str, again: str = f"{AGAIN} (--resume auto, the default)"
    ) -> Stopped:
        """Requeue the Slurm job where that was asked, and say how the run ended."""
        job = os.environ.get("SLURM_JOB_ID")
        if asked != Signals.REQUEUE or not job or not shutil.which("scontrol"):
            return Stopped(f"{saved}. {again}", EXIT_STOPPED)
        problem = None
        if dist.rank() == 0:
            problem = _requeue(job)
        if problem is not None:
            return Stopped(f"{saved}; scontrol requeue {job}: {problem}", EXIT_STOPPED)
        return Stopped(f"{saved}; job {job} is requeued and resumes there", 0)


def _requeue(job: str) -> str | None:
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20
        )
    except subprocess.TimeoutExpired:
        return "no answer within 20 s"
    except OSError as error:  # no process to be had
        return error.strerror
    return done.stderr.strip() if done.returncode else None
