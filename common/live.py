"""What a program shows while it works: on a terminal one line that is drawn again and again, in a
file a line now and then.
"""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator

_REDRAW = 0.1  # seconds between two drawings
# In a file: seconds after which work that goes on is said, and said again.
_FIRST = 10.0
_NEXT = 30.0
_BAR = 20  # characters
_ECHO = len("^C")  # that a terminal writes behind the line by itself


def duration(seconds: float) -> str:
    """`41s`, `12m`, `3h05m`, `2d04h`: what an ETA needs."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    hours = minutes // 60
    if hours < 48:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"


def digits(value: float) -> str:
    """A measured number as it is printed: to four significant digits; integers as they are."""
    if isinstance(value, int) or 1e3 <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _columns() -> int:
    # Of a line that does not begin another one.
    return shutil.get_terminal_size().columns - 1


class Line:
    """The live line: the last one of a terminal, never longer than the terminal is wide.

    What else is printed clears it first; nothing is drawn where the output is no terminal.

    Attributes:
        silent: this process shows nothing: another rank does.
        owner: the `Progress` that is shown; those inside it are not.
    """

    def __init__(self):
        self.silent = False
        self.owner: Progress | None = None
        self._length = 0
        self._drawn = -_REDRAW

    def due(self) -> bool:
        """Whether `draw` would be seen, ten times a second at most."""
        elapsed = time.monotonic() - self._drawn
        return elapsed >= _REDRAW and not self.silent and sys.stdout.isatty()

    def draw(self, head: str, share: float | None, tail: str) -> None:
        """Show `head [####......] tail`; where there is little room without the bar and
        the last parts of `tail`, which " | " separates, and cut."""
        width = _columns() - _ECHO
        bar = min(_BAR, width - len(f"{head} [] {tail}"))
        if share is not None and bar >= 4:
            filled = int(bar * min(share, 1.0))
            head = f"{head} [{'#' * filled}{'.' * (bar - filled)}]"
        text = f"{head} {tail}"
        while len(text) > width and " | " in text:
            text = text.rpartition(" | ")[0]  # a number without its end would be another one
        text = text[: max(width, 0)]
        # A narrower window has wrapped what stood there: no more is overwritten than it is wide.
        text = text.ljust(min(self._length, width))
        self._length = len(text)
        self._drawn = time.monotonic()
        print(f"\r{text}", end="", flush=True)

    def clear(self) -> None:
        """Leave an empty line to what is printed next."""
        if self._length:
            blanks = " " * min(self._length + _ECHO, _columns())
            self._length = 0
            print(f"\r{blanks}\r", end="", flush=True)


line = Line()


class Progress:
    """How far work has come of which it is not known whether it takes long; a context.

    On a terminal it is the live line; elsewhere a line after ten seconds and every half a minute.

    Args:
        what: is done.
        total: how much there is of it; None: that is not known.
        done: of it before.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0):
        self.what = what
        self.total = total
        self.done = self.before = done
        self.begun = self._next = time.monotonic()
        self._due = self.begun + _FIRST

    def __enter__(self) -> "Progress":
        line.owner = line.owner or self
        self.add(0)
        return self

    def __exit__(self, *_) -> None:
        if line.owner is self:
            line.owner = None
            line.clear()

    def add(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        now = time.monotonic()
        if now < self._next or line.owner is not self:
            return
        self._next = now + _REDRAW
        if line.due():
            line.draw(*self._parts())
        elif now >= self._due and not (line.silent or sys.stdout.isatty()):
            self._due = now + _NEXT
            head, _, tail = self._parts()
            print(f"{head} {tail}".rstrip(), flush=True)

    def _parts(self) -> tuple[str, float | None, str]:
        if not self.total:
            return f"{self.what}: {self.done}", None, ""
        elapsed = time.monotonic() - self.begun
        gained = self.done - self.before
        eta = f"| eta {duration(elapsed / gained * (self.total - self.done))}" if gained else ""
        return f"{self.what}: {self.done} of {self.total}", self.done / self.total, eta


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """The items as they are; how far they have come is shown, see `Progress`."""
    with Progress(what, total) as shown:
        for item in items:
            yield item
            shown.add()
