"""What ends a run early, and the exit code of each ending."""

import contextlib
import difflib
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common import live

# What the system says where the disk is full, a quota is reached or a file may not grow further.
DISK_FULL = errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG
# What it says where a network file system, its server or the way there is gone for a moment.
_TRANSIENT = (
    "EIO EREMOTEIO ENXIO ENODEV ESTALE EAGAIN EINTR ETIMEDOUT ENOTCONN ESHUTDOWN ECONNRESET"
    " ECONNABORTED ECONNREFUSED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET"
)
TRANSIENT = {getattr(errno, name) for name in _TRANSIENT.split() if hasattr(errno, name)}
AGAIN = "Run the same command again: it resumes from the last checkpoint"
THREAD_LIMIT = (
    "the system allows this user no more threads or processes: raise the limit (`ulimit -u`, in a"
    f" container that of its processes) or give fewer --workers. {AGAIN}"
)
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_AUDIT = 4
EXIT_STOPPED = 75
# What moves the cursor, splits a line, reverses text or stands for a byte that is no text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message says what was received, what is allowed and what to do.
    """


class OtherFormat(InputError):
    """A file or folder that another version of this project wrote in another format."""


class Diverged(RuntimeError):
    """The loss or a gradient is not finite: training cannot go on."""


class AuditFailed(RuntimeError):
    """A check of the model found a parameter that does not train or a loss without a gradient."""


class Stopped(RuntimeError):
    """The run was asked to stop and its state is saved; `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Finished(Exception):
    """There is nothing left to do."""


def thread_limit(error: Exception) -> bool:
    """Whether the system refused another thread or process, in Python, in C++ or at a fork.

    A file that is busy has the same number, but a name.
    """
    if isinstance(error, OSError):
        return error.errno == errno.EAGAIN and error.filename is None
    text = str(error)
    return "can't start new thread" in text or os.strerror(errno.EAGAIN) in text


@contextlib.contextmanager
def exit_codes():
    """Turn the expected endings into one line on stderr and the exit code of docs/runs.md.

    From here on whoever reads the output may leave: what is said then is lost, the run is not.
    """
    _keep_console()
    try:
        yield
    except InputError as error:
        say(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except OSError as error:
        if thread_limit(error):
            text = THREAD_LIMIT
        elif error.errno in DISK_FULL:
            text = f"{error.strerror}; make room and run the same command again"
        elif error.errno in TRANSIENT:
            text = f"{error.filename}: {error.strerror}; --io-retry waits longer. {AGAIN}"
        elif error.filename is not None:  # a name that is too long, a folder of another user
            text = f"{error.filename}: {error.strerror}"
        else:
            raise
        say(f"error: {text}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except Diverged as error:
        say(f"diverged: {error}", file=sys.stderr)
        raise SystemExit(EXIT_DIVERGED) from None
    except AuditFailed as error:
        say(f"audit failed: {error}", file=sys.stderr)
        raise SystemExit(EXIT_AUDIT) from None
    except Stopped as stop:
        say(f"{stop}", file=sys.stderr)
        raise SystemExit(stop.code) from None
    except MemoryError:  # of a run `launch` says more
        say(
            "error: out of memory; end other programs, or give this one less to read",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:  # where `Signals` does not listen
        say("stopped by Ctrl-C. Run the same command again", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED) from None
    except RuntimeError as error:
        if not thread_limit(error):
            raise
        say(f"error: {THREAD_LIMIT}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None


class _Console(io.FileIO):
    """A standard stream; once its reader or its terminal has gone, nobody listens."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _keep_console() -> None:
    # A closed descriptor would be the next file's that is opened, and what is printed end there.
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(lowest)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and stream.fileno() == number:
            with contextlib.suppress(OSError):
                stream.flush()
            kept = io.TextIOWrapper(
                io.BufferedWriter(_Console(number, "w", closefd=False)),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, kept)


def printable(text) -> str:
    """A text with its control characters, and bytes that are no text, as escapes: one line."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def say(*lines, file=None) -> None:
    """Print lines, each as one: names of the user's files and classes are not trusted.

    A line of more than 2000 characters, which no one reads, is cut in its middle.
    """
    live.line.clear()
    for line in map(printable, lines):
        if len(line) > 2000:
            line = f"{line[:1000]} ... {line[-800:]}"
        print(line, file=file, flush=True)


@contextlib.contextmanager
def as_input_error(flag: str, value):
    """Turn a ValueError about a flag's value into an `InputError` that names the flag."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{flag} {value}: {error}") from None


@contextlib.contextmanager
def only_warn(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Whatever fails inside is one WARN line: a report or a figure is not worth a run.

    `Stopped` passes, as do KeyboardInterrupt and SystemExit.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        say(f"WARN {what}: {described(error)}; the run goes on without it")


def described(error: Exception) -> str:
    """What an exception says, in one line; with its kind and place where nobody expected it."""
    if isinstance(error, InputError):
        return printable(error)
    if isinstance(error, OSError) and error.strerror:
        return printable(": ".join(str(part) for part in (error.strerror, error.filename) if part))
    frame = traceback.extract_tb(error.__traceback__, -1)[0]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return printable(f"{type(error).__name__} at {place}: {error}")


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 epoch", "2 epochs", "2 batches", "2 modalities"."""
    if count == 1:
        return f"1 {noun}"
    if noun.endswith("y") and noun[-2] not in "aeou":
        return f"{count} {noun[:-1]}ies"
    hisses = noun.endswith(("s", "x", "z", "sh", "tch", "nch"))  # not the ch of epoch
    return f"{count} {noun}{'es' if hisses else 's'}"


def did_you_mean(word: str, words) -> str:
    """A hint for a misspelled name: `; did you mean X?`, or nothing when no name is near."""
    match = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def first_few(names: Sequence, most: int = 3) -> str:
    """`a, b, c and 4 more`: the first of many names, for a message."""
    shown = ", ".join(str(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def aligned(rows: list[list]) -> str:
    """Rows of cells as lines of text, each column as wide as its widest cell."""
    texts = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    )
    return "\n".join(lines)
