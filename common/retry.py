"""Reading and writing that fails for a moment, as on a network file system, is tried again.

`launch` says for how long (--io-retry); outside of it nothing is tried twice.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from common.errors import TRANSIENT, say

Result = TypeVar("Result")


class _Patience:
    """What the threads of this process share while something is tried again.

    Attributes:
        minutes: for how long; 0: nothing is tried again.
        asked: gives what signals have asked for so far.
        heartbeat: grows while something is waited for: the run lives.
        waiting: threads that try again at the moment.
        over: an attempt was the last one; what fails after it is not tried again.
        interrupted: it was the last one because a signal came.
    """

    minutes = 0.0
    heartbeat = 0
    waiting = 0
    over = False
    interrupted = False

    @staticmethod
    def asked() -> int:
        return 0


patience = _Patience()
_lock = threading.Lock()


@contextlib.contextmanager
def io_retry(minutes: float, asked: Callable[[], int]) -> Iterator[None]:
    """Inside, `retried` tries again for so many minutes, or until `asked()` changes."""
    patience.minutes = minutes
    patience.asked = asked
    patience.over = patience.interrupted = False
    try:
        yield
    finally:
        patience.minutes = 0.0


def retried(work: Callable[[], Result], path, *, was_there: bool = False) -> Result:
    """What `work()` gives, which is called again after an error that may pass.

    The pauses grow to 10 s. The first failure is said in one line, for all threads together.

    Args:
        work: reads or writes `path`, from the start at each call.
        was_there: the file, or the folder to write to, was seen before: where now the folder is
            gone, its file system is.

    Raises:
        OSError: another error; or one that does not pass, with the file's name.
    """
    asked = patience.asked()
    try:
        result = work()
        patience.over = False
        return result
    except OSError as error:
        if not _may_pass(error, path, was_there):
            raise
        first = error
    end = time.monotonic() + 60 * patience.minutes
    pause = 0.1
    with _lock:
        patience.waiting += 1
        if patience.waiting == 1 and patience.minutes and not patience.over:
            # A console that is gone must not pass for a file that is.
            with contextlib.suppress(OSError, ValueError):
                limit = f"{patience.minutes:g} min (--io-retry)"
                say(f"{path}: {first.strerror}; trying again for {limit}")
    try:
        while True:
            patience.interrupted |= patience.asked() != asked
            patience.over |= patience.interrupted or time.monotonic() >= end
            if patience.over:
                first.filename = first.filename or str(path)
                raise first
            _sleep(min(pause, max(end - time.monotonic(), 0)), asked)
            pause = min(2 * pause, 10)
            try:
                return work()
            except OSError as error:
                if not _may_pass(error, path, was_there):
                    raise
                first = error
    finally:
        with _lock:
            patience.waiting -= 1


def _may_pass(error: OSError, path, was_there: bool) -> bool:
    if error.errno in TRANSIENT:
        return True
    if not was_there or error.errno != errno.ENOENT:
        return False
    try:
        with os.scandir(Path(path).parent) as entries:
            return next(entries, None) is None  # a mount point without its file system
    except OSError:
        return True


def _sleep(seconds: float, asked: int) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not patience.over and patience.asked() == asked:
        patience.heartbeat += 1
        time.sleep(min(left, 0.1))
