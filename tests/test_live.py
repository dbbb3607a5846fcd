"""The live line on a real terminal, progress in a file, and how numbers are printed."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from common import live
from common.errors import say


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def start(code: str, columns: int, **env) -> tuple[subprocess.Popen, int]:
    """A program of Python whose standard streams are a terminal, and the terminal's other end."""
    ours, theirs = pty.openpty()
    resize(theirs, columns)
    head = "import sys; from common import live; from common.errors import *; live._REDRAW = 0\n"
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"} | env
    streams = dict(stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    program = subprocess.Popen([sys.executable, "-c", head + code], **streams)
    os.close(theirs)
    return program, ours


def read(terminal: int, until: str = "") -> str:
    """What a program prints, to the end or to a text."""
    text = ""
    while not until or until not in text:
        try:
            text += os.read(terminal, 4096).decode()
        except OSError:  # the program has ended
            break
    return text


def screen(printed: str, columns: int) -> list[str]:
    """The lines that a terminal shows in the end; fails where one was longer than it is wide."""
    lines, column = [""], 0
    for sign in printed:
        if sign == "\r":
            column = 0
        elif sign == "\n":
            lines.append("")
        else:
            assert column < columns - 1, f"wraps: {lines[-1]!r}"
            lines[-1] = lines[-1][:column].ljust(column) + sign + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


LOOP = """
with exit_codes():
    for k in range(5):
        live.line.draw("train epoch 3/30", k / 4, f"{k}/4 | loss 0.01234 | 321 img/s | eta 41m")
        if k == 2:
            say("a line")
    ENDING
"""
ENDINGS = {
    "live.line.clear()": "",
    "say('bye', file=sys.stderr)": "bye",
    "raise InputError('--k 0')": "error: --k 0",
    "raise KeyboardInterrupt": "stopped by Ctrl-C. Run the same command again",
}


@pytest.mark.parametrize("columns", [20, 80, 120])
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_live_line_is_as_wide_as_the_terminal_and_leaves_nothing(ending, columns):
    program, terminal = start(LOOP.replace("ENDING", ending), columns)
    printed = read(terminal)
    program.wait()
    assert "train epoch 3/30" in printed
    assert ("[#" in printed) == (columns > 20) and ("loss 0.01234" in printed) == (columns > 20)
    drawn = printed.replace(ENDINGS[ending] or "\0", "")
    for echo in ("", "^C"):  # what a terminal writes where the cursor stands
        shown = screen(drawn.replace("eta 41m\r", f"eta 41m{echo}\r"), columns)
        assert [line for line in shown if line] == ["a line"]
    assert not ENDINGS[ending] or f"\r{ENDINGS[ending]}\r\n" in printed  # at a line's beginning


@pytest.mark.parametrize("columns", range(25, 80, 3))
def test_no_number_of_the_live_line_is_cut(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    tail = "7/15 | loss 0.1569 | 64.2 clip/s | eta 1h05m"
    live.Line().draw("train epoch 3/30", 0.5, tail)
    shown = capsys.readouterr().out.strip()
    assert len(shown) <= columns - 3
    assert shown.endswith(("3/30 7/15", "loss 0.1569", "64.2 clip/s", "eta 1h05m"))


def test_the_live_line_follows_the_window():
    code = "for _ in range(2): live.line.draw('x' * 90, None, ''); input()\nsay('end')"
    program, terminal = start(code, 80)
    assert read(terminal, "x" * 77).count("x") == 77
    resize(terminal, 30)
    os.write(terminal, b"\n")
    assert read(terminal, "x" * 27).count("x") == 27
    os.write(terminal, b"\n")
    assert read(terminal).endswith(f"\r{' ' * 29}\rend\r\n")
    assert program.wait() == 0


def test_columns_of_the_environment_count():
    program, terminal = start("live.line.draw('y' * 90, 0.5, 'z'); say('end')", 80, COLUMNS="20")
    printed = read(terminal)
    assert "y" * 17 in printed and "y" * 18 not in printed and program.wait() == 0


def test_progress_on_a_terminal_is_a_line_that_goes():
    code = "for _ in live.progress(range(8), 'reading', 8): pass\nsay('read')"
    program, terminal = start(code, 80)
    printed = read(terminal)
    assert program.wait() == 0
    assert "reading: 0 of 8 [....................]" in printed
    assert "reading: 7 of 8 [#################...] | eta 0s" in printed
    assert [line for line in screen(printed, 80) if line] == ["read"]


def test_progress_in_a_file_is_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    for _ in live.progress(range(9), "quick", 9):
        now[0] += 1
    assert capsys.readouterr().out == ""
    for _ in live.progress(range(100), "slow", 100):
        now[0] += 1
    assert capsys.readouterr().out.splitlines() == [
        "slow: 10 of 100 | eta 2m",
        "slow: 40 of 100 | eta 1m",
        "slow: 70 of 100 | eta 30s",
        "slow: 100 of 100 | eta 0s",
    ]
    with live.Progress("files") as shown:
        for _ in range(3):
            now[0] += 6
            shown.add(500)
    assert capsys.readouterr().out.splitlines() == ["files: 1000"]


def test_what_was_done_before_does_not_count_as_speed(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    with live.Progress("evaluation", 100, 80) as shown:
        now[0] += 20
        shown.add(10)
    assert capsys.readouterr().out == "evaluation: 90 of 100 | eta 20s\n"


def test_progress_inside_of_progress_and_of_other_ranks_is_not_shown(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def work():
        for _ in live.progress(range(2), "outer", 2):
            for _ in live.progress(range(50), "inner", 50):
                now[0] += 1

    work()
    printed = capsys.readouterr().out
    assert printed == "outer: 1 of 2 | eta 50s\nouter: 2 of 2 | eta 0s\n"
    monkeypatch.setattr(live.line, "silent", True)
    work()
    assert capsys.readouterr().out == "" and live.line.owner is None


def test_a_loop_that_is_left_early_gives_the_line_free(capsys):
    for k in live.progress(range(9), "k-means"):
        if k == 3:
            break
    assert live.line.owner is None
    say("next")
    assert capsys.readouterr().out == "next\n"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.2e-6, "3.2e-06"),
        (0.0123456, "0.01235"),
        (0.5, "0.5"),
        (4.8123456, "4.812"),
        (999.96, "1000"),
        (12345.6, "12346"),
        (3.2e9, "3.2e+09"),
        (-1234.5678, "-1235"),
        (0.0, "0"),
        (7, "7"),
        (123456789, "123456789"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_have_four_significant_digits(value, text):
    assert live.digits(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (41.4, "41s"),
        (59.6, "1m"),
        (720, "12m"),
        (3599, "1h00m"),
        (11100, "3h05m"),
        (187200, "2d04h"),
    ],
)
def test_durations(seconds, text):
    assert live.duration(seconds) == text
