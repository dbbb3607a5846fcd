"""What a run writes is whole or not there at all."""

import os

import pytest

from common.run.files import atomic_write, remove_orphans


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_writer_that_fails_half_way_leaves_the_old_content(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old\n")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write("ne")
        file.flush()
        file.write(str(1 / 0))
    assert path.read_text() == "old\n"
    assert names(tmp_path) == ["table.csv"]


def test_nothing_stands_at_the_path_before_all_is_written(tmp_path):
    path = tmp_path / "table.csv"
    with atomic_write(path) as file:
        file.write("a,b\r\n")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"a,b\r\n"  # line ends as they were written
    assert names(tmp_path) == ["table.csv"]


def test_the_old_file_is_kept_under_another_name(tmp_path):
    path = tmp_path / "last.pt"
    previous = tmp_path / "last.previous.pt"
    path.write_bytes(b"one")
    with atomic_write(path, "wb", keep=previous) as file:
        file.write(b"two")
    assert (path.read_bytes(), previous.read_bytes()) == (b"two", b"one")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "wb", keep=previous) as file:
        file.write(bytes(1 // 0))
    assert (path.read_bytes(), previous.read_bytes()) == (b"two", b"one")
    assert names(tmp_path) == ["last.previous.pt", "last.pt"]


def test_a_disk_that_does_not_take_the_bytes_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    previous = tmp_path / "last.previous.pt"
    path.write_bytes(b"old")

    def fails(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    failure = pytest.raises(OSError, match="Input/output")
    with failure, atomic_write(path, "wb", keep=previous) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["last.pt"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "figures").mkdir()
    kept = [tmp_path / "last.pt", tmp_path / "figures" / "roc.json"]
    orphans = [tmp_path / ".last.pt.12.tmp", tmp_path / "figures" / ".roc.json.12.tmp"]
    for path in kept + orphans:
        path.write_text("x")
    remove_orphans(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in orphans)
