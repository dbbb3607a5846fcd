"""USR1, USR2, TERM and Ctrl-C: set a flag, save at the next step boundary, leave."""

import os
import shutil
import signal
import subprocess
import sys

from common.errors import AGAIN, EXIT_STOPPED, Stopped
from common.run import dist


class Signals:
    """What the signals ask of a run.

    USR1 and USR2 (time limit, preemption) ask for a save and a requeue; TERM and Ctrl-C for a save
    and an end. A second Ctrl-C leaves at once.

    The handler only sets a flag: saving inside it could tear the step that it interrupts. Until
    `defer` there is nothing to save: USR1 and USR2 requeue at once, the others end the process as
    usual. A context, after which the handlers are those from before.
    """

    REQUEUE = 1
    END = 2

    def __init__(self):
        self.asked = 0
        self.deferred = False
        self._earlier_handlers = {}

    def __enter__(self) -> "Signals":
        self._handle_by(self._leave_now, "SIGUSR1", "SIGUSR2")
        return self

    def __exit__(self, *_) -> None:
        for code, handler in self._earlier_handlers.items():
            signal.signal(code, handler)

    def defer(self) -> None:
        """From now on a signal waits for the next boundary of a step."""
        self.deferred = True
        self._handle_by(self._ask_requeue, "SIGUSR1", "SIGUSR2")
        self._handle_by(self._ask_end, "SIGTERM", "SIGINT")

    def _handle_by(self, handler, *names: str) -> None:
        for name in names:
            code = getattr(signal, name, None)  # Windows has no USR1
            if code is not None:
                earlier = signal.signal(code, handler)
                self._earlier_handlers.setdefault(code, earlier)

    def _leave_now(self, number: int, frame) -> None:
        stop = self.leave(self.REQUEUE, "nothing to save yet")
        print(stop, file=sys.stderr)
        # Not Stopped: what reads damaged files catches many an exception.
        raise SystemExit(stop.code)

    def _ask_requeue(self, number: int, frame) -> None:
        self.asked = max(self.asked, self.REQUEUE)

    def _ask_end(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = self.END

    @staticmethod
    def leave(asked: int, saved: str) -> Stopped:
        """Requeue the Slurm job where that was asked, and say how the run ended."""
        job = os.environ.get("SLURM_JOB_ID")
        if asked != Signals.REQUEUE or not job or not shutil.which("scontrol"):
            return Stopped(f"{saved}. {AGAIN} (--resume auto, the default)", EXIT_STOPPED)
        problem = None
        if dist.rank() == 0:
            problem = _requeue(job)
        if problem is not None:
            return Stopped(f"{saved}; scontrol requeue {job}: {problem}", EXIT_STOPPED)
        return Stopped(f"{saved}; job {job} is requeued and resumes there", 0)


def _requeue(job: str) -> str | None:
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "no answer within 20 s"
    return done.stderr.strip() if done.returncode else None
