"""What a run writes is whole or not there at all."""

import ast
import os
from pathlib import Path

import pytest

from common.run.files import atomic_write, remove_orphans

ROOT = Path(__file__).resolve().parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def in_the_locales_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in an encoding that it does not name."""
    keywords = {keyword.arg for keyword in call.keywords}  # None: **options
    name = ast.unparse(call.func)
    if name == "open" or (name.endswith(".open") and name.startswith(("path", "file", "folder"))):
        binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in call.args)
        return not binary and not keywords & {"encoding", None}
    if name.endswith((".read_text", ".write_text")):
        return "encoding" not in keywords
    return name.startswith("subprocess.") and "text" in keywords


def test_no_text_is_in_the_encoding_of_the_locale():
    found = []
    for path in [
        *ROOT.glob("train_*.py"),
        *ROOT.glob("common/**/*.py"),
        *ROOT.glob("kernels/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and in_the_locales_encoding(node):
                found.append(f"{path.relative_to(ROOT)} line {node.lineno}: {ast.unparse(node)}")
    assert not found


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


def test_a_folder_is_opened_where_the_system_can(tmp_path, monkeypatch):
    opened, path = [], tmp_path / "table.csv"
    monkeypatch.setattr(os, "open", lambda place, _: opened.append(place) or os.dup(1))
    for system in ("posix", "nt"):
        monkeypatch.setattr(os, "name", system)
        with atomic_write(path) as file:
            file.write(system)
        monkeypatch.undo()
        assert opened == [tmp_path] and path.read_text() == system
        monkeypatch.setattr(os, "open", lambda place, _: opened.append(place))


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
