"""What ends a run early, and the exit code of each ending."""

import contextlib
import difflib
import errno
import io
import os
import sys
from collections.abc import Sequence

# What the system says where the disk is full, a quota is reached or a file may not grow further.
DISK_FULL = errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_AUDIT = 4
EXIT_STOPPED = 75
AGAIN = "Run the same command again: it resumes from the last checkpoint"


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


@contextlib.contextmanager
def exit_codes():
    """Turn the expected endings into one line on stderr and the exit code of docs/runs.md.

    From here on whoever reads the output may leave: what is said then is lost, the run is not.
    """
    _keep_console()
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(f"error: {error.strerror}; make room and run the same command again", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except Diverged as error:
        print(f"diverged: {error}", file=sys.stderr)
        raise SystemExit(EXIT_DIVERGED) from None
    except AuditFailed as error:
        print(f"audit failed: {error}", file=sys.stderr)
        raise SystemExit(EXIT_AUDIT) from None
    except Stopped as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.code) from None


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
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
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


@contextlib.contextmanager
def as_input_error(flag: str, value):
    """Turn a ValueError about a flag's value into an `InputError` that names the flag."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{flag} {value}: {error}") from None


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
