"""What fails for a moment is tried again: files, archives, the log."""

import errno
import os
import threading
import zipfile

import pytest

from common import reading, retry
from common.data.images import list_files
from common.data.open import open_images
from common.errors import InputError
from common.retry import io_retry, retried
from common.run.files import atomic_write, read_json
from common.run.log import Log, read
from common.run.run import watchdog
from tests.data import image_folder


class Fails:
    """A function that raises the errors of `numbers` one after another, and then works."""

    def __init__(self, work, *numbers):
        self.work, self.numbers, self.calls = work, list(numbers), 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.numbers:
            number = self.numbers.pop(0)
            raise OSError(number, os.strerror(number))
        return self.work(*args, **kwargs)


@pytest.fixture
def pauses(monkeypatch):
    """No pause is waited for; what is done in them, by number, is what a test puts in here."""
    done, counted = {}, []

    def pause(seconds, asked):
        counted.append(seconds)
        done.get(len(counted), lambda: None)()

    monkeypatch.setattr(retry, "_sleep", pause)
    return done


def patiently(asked=lambda: 0):
    return io_retry(60, asked)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_write_that_fails_for_a_moment_starts_anew_and_says_so_once(
    call, tmp_path, monkeypatch, pauses, capsys
):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    path.write_bytes(b"old")
    fails = Fails(getattr(os, call), errno.ESTALE, errno.EIO, errno.ETIMEDOUT)
    monkeypatch.setattr(os, call, fails)
    with patiently(), atomic_write(path, "wb", keep=previous) as file:
        file.write(b"half")
        file.write(b" and half")
    assert fails.calls > 3 and not fails.numbers
    assert (path.read_bytes(), previous.read_bytes()) == (b"half and half", b"old")
    assert names(tmp_path) == ["last.pt", "previous.pt"]
    what = tmp_path if call == "open" else path  # the folder, whose names are synced
    said = capsys.readouterr().out
    assert said == f"{what}: {os.strerror(errno.ESTALE)}; trying again for 60 min (--io-retry)\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT])
def test_what_does_not_pass_is_not_tried_again(number, tmp_path, pauses, capsys):
    fails = Fails(lambda: None, number, number)
    (tmp_path / "x").touch()
    with patiently(), pytest.raises(OSError, match=os.strerror(number)):
        retried(fails, tmp_path / "y", was_there=True)
    assert fails.calls == 1 and capsys.readouterr().out == ""


def test_without_a_run_nothing_is_tried_again(pauses):
    fails = Fails(lambda: None, errno.EIO)
    with pytest.raises(OSError, match=r"Input/output error: 'here'"):
        retried(fails, "here")
    assert fails.calls == 1


@pytest.mark.parametrize("large", [False, True])
def test_what_is_no_regular_file_is_refused_without_a_wait(large, tmp_path, pauses, capsys):
    os.mkfifo(tmp_path / "x")
    with patiently(), pytest.raises(InputError, match="is a FIFO, not a regular file"):
        reading.read_bytes(tmp_path / "x", large=large, was_there=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("waits", [True, False])
def test_a_wait_for_a_file_system_is_no_stall(waits, monkeypatch):
    exits, polls, enough = [], [], threading.Event()
    monkeypatch.setattr(os, "_exit", exits.append)

    def heartbeat():
        retry.patience.heartbeat += waits
        polls.append(1)
        if len(polls) > 30:
            enough.set()

    with watchdog(0.0002, heartbeat, lambda: "no step"):
        assert enough.wait(60)
    assert not exits if waits else set(exits) == {75}


def test_when_the_time_is_over_the_error_has_its_file(monkeypatch, pauses):
    clock = [0.0]
    monkeypatch.setattr(retry.time, "monotonic", lambda: clock[0])
    for minute in range(1, 9):
        pauses[minute] = lambda: clock.__setitem__(0, clock[0] + 60)
    fails = Fails(lambda: None, *[errno.EIO] * 100)
    with io_retry(2, lambda: 0):
        with pytest.raises(OSError, match=r"Input/output error: 'last\.pt'"):
            retried(fails, "last.pt")
        assert fails.calls == 3  # at 0, 1 and 2 minutes
        with pytest.raises(OSError, match="Input/output error"):
            retried(fails, "log.jsonl")
        assert fails.calls == 4  # what was queued behind it does not wait as long again
        fails.numbers = []
        assert retried(fails, "last.pt") is None
        fails.numbers = [errno.EIO]
        assert retried(fails, "last.pt") is None  # another failure, later


def test_a_signal_ends_the_wait(pauses):
    asked = []
    pauses[2] = lambda: asked.append(1)
    fails = Fails(lambda: None, *[errno.EIO] * 100)
    with patiently(lambda: len(asked)):
        with pytest.raises(OSError, match="Input/output"):
            retried(fails, "last.pt")
        assert fails.calls == 3 and retry.patience.interrupted


def test_a_signal_that_came_before_does_not_keep_its_own_save_from_waiting(pauses):
    fails = Fails(lambda: "saved", errno.EIO, errno.EIO)
    with patiently(lambda: 2):
        assert retried(fails, "last.pt") == "saved"


def test_threads_that_wait_for_the_same_say_it_once_and_leave_together(capsys):
    asked, failed = [], []
    all_wait = threading.Barrier(5)

    def read():
        fails = Fails(lambda: None, *[errno.ESTALE] * 10_000)
        try:
            retried(lambda: (fails.calls or all_wait.wait(), fails())[1], "item")
        except OSError:
            failed.append(1)

    with patiently(lambda: len(asked)):
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        all_wait.wait()
        asked.append(1)
        for thread in threads:
            thread.join(60)
    assert len(failed) == 4 and capsys.readouterr().out.count("\n") <= 1


@pytest.mark.parametrize("how", ["gone", "unmounted"])
def test_a_folder_that_comes_back_is_read_on(how, tmp_path, pauses):
    folder, away = tmp_path / "data" / "class", tmp_path / "away"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"pixels")
    files, _, _, content = list_files(str(tmp_path / "data"), lambda name: True)
    assert files == ["class/a.png"]
    folder.rename(away)
    if how == "unmounted":
        folder.mkdir()

    def comes_back():
        if how == "unmounted":
            folder.rmdir()
        away.rename(folder)

    pauses[3] = comes_back
    with patiently():
        assert content(0) == b"pixels"
        (folder / "b.png").touch()
        (folder / "a.png").unlink()
        with pytest.raises(FileNotFoundError):  # its folder is there: it was deleted
            content(0)


@pytest.mark.parametrize("how", ["gone", "stale"])
def test_an_image_whose_file_system_is_gone_is_not_called_damaged(how, tmp_path, monkeypatch):
    images = open_images(str(image_folder(tmp_path / "cells", ["a/0.png", "b/0.png"])))
    if how == "gone":
        (tmp_path / "cells").rename(tmp_path / "away")
    else:
        monkeypatch.setattr(reading, "regular_status", Fails(None, *[errno.ESTALE] * 9))
    with io_retry(0, lambda: 0), pytest.raises(InputError) as error:
        images.decode(0)
    said = str(error.value)
    assert "a/0.png" in said and "--io-retry waits longer" in said and "fix or remove" not in said
    retry.patience.over = False


def test_an_archive_is_opened_again(tmp_path, monkeypatch, pauses):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"pixels")
    _, _, _, content = list_files(str(tmp_path / "x.zip"), lambda name: True)
    opened = []
    init = zipfile.ZipFile.__init__
    monkeypatch.setattr(
        zipfile.ZipFile, "__init__", lambda self, *a, **k: opened.append(1) or init(self, *a, **k)
    )
    fails = Fails(zipfile.ZipFile.open, errno.ESTALE)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda self, entry: fails(self, entry))
    with patiently():
        assert content(0) == b"pixels" and content(0) == b"pixels"
    assert len(opened) == 1 and fails.calls == 3


def test_a_file_of_a_run_that_cannot_be_read_for_a_moment_is_not_taken_for_missing(
    tmp_path, monkeypatch, pauses
):
    (tmp_path / "config.json").write_text('{"epochs": 3}')
    fails = Fails(reading.regular_status, errno.ESTALE)
    monkeypatch.setattr(reading, "regular_status", fails)
    with patiently():
        assert read_json(tmp_path / "config.json") == {"epochs": 3} and fails.calls == 2
        assert read_json(tmp_path / "summary.json") is None


class Half:
    """A file whose first flush writes half of a line and fails."""

    def __init__(self, file, number):
        self.file, self.number, self.text = file, number, ""

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        self.text = text

    def flush(self):
        self.file.write(self.text[:9])
        self.file.flush()
        raise OSError(self.number, os.strerror(self.number))


def test_a_log_line_that_is_written_half_is_written_anew(tmp_path, pauses):
    log = Log(tmp_path, main=True)
    log.metrics("s", 1, 1, {"s/train/loss": 1.0})
    log.file = Half(log.file, errno.ESTALE)
    with patiently():
        log.metrics("s", 2, 2, {"s/train/loss": 2.0})
    log.metrics("s", 3, 3, {"s/train/loss": 3.0})
    log.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3


def test_log_lines_that_the_disk_has_lost_are_written_again(tmp_path, monkeypatch, pauses):
    log = Log(tmp_path, main=True)
    log.metrics("s", 1, 1, {"s/train/loss": 1.0})
    before = (tmp_path / "log.jsonl").stat().st_ino
    monkeypatch.setattr(os, "fsync", Fails(os.fsync, errno.EIO, errno.EIO))
    with patiently():
        log.sync()
    log.metrics("s", 2, 2, {"s/train/loss": 2.0})
    log.close()
    assert (
        tmp_path / "log.jsonl"
    ).stat().st_ino != before  # another fsync of it would prove nothing
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
