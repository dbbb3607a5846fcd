"""What a run writes is whole or not there at all."""

import os

import pytest

from common.errors import InputError
from common.run.files import atomic_write, read_config, read_json, remove_orphans, run_dir_of


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
    orphans = [".last.pt.12.tmp", ".best.previous.pt.7.tmp", "figures/.roc.json.12.tmp"]
    # The last five are another program's, an editor's, the user's.
    kept = ["last.pt", "figures/roc.json", ".notes.12.tmp", ".last.pt.tmp", ".last.pt.12.tmp~"]
    kept += [".tmp", "figures/.draft.tmp"]
    orphans, kept = ([tmp_path / name for name in some] for some in (orphans, kept))
    for path in kept + orphans:
        path.write_text("x")
    remove_orphans(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in orphans)


BROKEN = {
    "a list": "[1]",
    "a text": '"x"',
    "null": "null",
    "a number as the identity": '{"identity": 3}',
    "a list as the card": '{"identity": {}, "card": []}',
    "numbers as stages": '{"identity": {}, "card": {"stages": [1, 2]}}',
    "a number as the data": '{"identity": {}, "data": 4}',
    "half of it": '{"identity": {',
    "nothing": "",
    "deep nesting": "[" * 100_000,
    "no text": b"\xff\xfe{}",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_of_other_types_is_one_line_with_its_name(case, tmp_path):
    text = BROKEN[case]
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="config.json cannot be read: ") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 120


def test_a_file_that_only_informs_is_said_and_counts_as_absent(tmp_path):
    said = []
    (tmp_path / "env.json").write_text('{"starts": [1]}')
    assert read_json(tmp_path / "env.json", {"starts": [dict]}, said.append) is None
    assert len(said) == 1 and "an item of its 'starts' is a number, not an object" in said[0]
    assert read_json(tmp_path / "absent.json", say=said.append) is None and len(said) == 1


def test_a_run_is_told_by_its_own_config_alone(tmp_path):
    run = tmp_path / "run"
    (run / "pretrain").mkdir(parents=True)
    (run / "config.json").write_text('{"identity": {}}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "m.pt").write_text("")
    assert run_dir_of(run / "pretrain" / "best.pt") == run
    assert run_dir_of(tmp_path / "m.pt") == tmp_path / "m.pt"
    (run / "config.json").write_text("[")
    assert run_dir_of(run) == run
