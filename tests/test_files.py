"""What a run writes is whole or not there at all, also after a power failure."""

import ast
import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import InputError
from common.run import checkpoint, dist, files, log
from common.run.files import (
    atomic_write,
    make_folder,
    read_config,
    read_json,
    remove_orphans,
    run_dir_of,
    write_answer,
    write_json,
    write_new,
)
from common.run.progress import Progress
from tests import fifth_script
from tests.runs import equal_runs, flags, summary

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
    orphans = [".last.pt.12.tmp", ".best.previous.pt.7.tmp", "figures/.roc.json.12.tmp"]
    orphans += [".predictions.csv.1.tmp", ".predictions-12.csv.1.tmp", ".eval.json.1.tmp"]
    # The last five are another program's, an editor's, the user's.
    kept = ["last.pt", "figures/roc.json", ".notes.12.tmp", ".last.pt.tmp", ".last.pt.12.tmp~"]
    kept += [".tmp", "figures/.draft.tmp"]
    orphans, kept = ([tmp_path / name for name in some] for some in (orphans, kept))
    for path in kept + orphans:
        path.write_text("x")
    remove_orphans(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in orphans)


def test_a_new_file_never_takes_the_place_of_another(tmp_path):
    path = tmp_path / "p.csv"
    assert [write_new(path, text).name for text in "abc"] == ["p.csv", "p-2.csv", "p-3.csv"]
    (tmp_path / "p-2.csv").unlink()
    (tmp_path / "p-4.csv").symlink_to("nowhere")
    assert [write_new(path, text).name for text in "de"] == ["p-2.csv", "p-5.csv"]
    found = {name: (tmp_path / name).read_text() for name in names(tmp_path) if name != "p-4.csv"}
    assert found == {"p.csv": "a", "p-2.csv": "d", "p-3.csv": "c", "p-5.csv": "e"}


@pytest.mark.parametrize("links", [True, False])
def test_processes_at_once_write_a_new_file_each(tmp_path, monkeypatch, links):
    if not links:

        def refuses(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuses)
    monkeypatch.setattr(os.path, "lexists", lambda _: False)  # each comes between look and name
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=write_new, args=(tmp_path / "p.csv", str(i))) for i in range(4)
    ]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert names(tmp_path) == ["p-2.csv", "p-3.csv", "p-4.csv", "p.csv"]
    assert {path.read_text() for path in tmp_path.iterdir()} == set("0123")


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_new_file_whose_writing_ends_early_is_not_there(tmp_path, monkeypatch, call):
    def ends(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, ends)
    with pytest.raises(KeyboardInterrupt):
        write_new(tmp_path / "p.csv", "a,b")
    assert not names(tmp_path)


def test_an_earlier_answer_is_kept_unless_it_says_the_same(tmp_path, capsys):
    first = {"eval.json": "{1}", "eval.csv": "caf\udce9,1\r\n"}
    write_answer(tmp_path, first)
    write_answer(tmp_path, first)
    assert names(tmp_path) == ["eval.csv", "eval.json"] and not capsys.readouterr().out
    write_answer(tmp_path, first | {"eval.csv": "b,2\r\n"})  # the same score, of other items
    assert names(tmp_path) == ["eval-1.csv", "eval-1.json", "eval.csv", "eval.json"]
    assert (tmp_path / "eval-1.csv").read_bytes() == b"caf\\udce9,1\r\n"
    assert "eval-1.json" in capsys.readouterr().out
    write_answer(tmp_path, {"eval.json": "{2}", "eval.csv": None})  # of no classifier
    assert not (tmp_path / "eval.csv").exists()
    assert (tmp_path / "eval-2.csv").read_bytes() == b"b,2\r\n"
    assert [(tmp_path / f"eval{n}.json").read_text() for n in ("-1", "-2", "")] == [
        "{1}",
        "{1}",
        "{2}",
    ]


class Disk:
    """A folder, and what a power failure would leave of it at any moment.

    Of a file that is what was there when it was last synced, and the names in a folder are those of
    when that was synced; a system may also be early with the names, and with the cutting of a file
    that is written anew. `check`, where there is one, is called with a folder of either kind after
    every sync and every renaming.
    """

    def __init__(self, root, monkeypatch):
        self.root = root / "disk"
        self.copies = root / "copies"
        self.root.mkdir()
        self.synced = {}  # inode -> the bytes of a file
        self.names = {self.root.stat().st_ino: {}}  # inode -> a folder's names and their inodes
        self.held = []  # or an inode would be used again
        self.check = None
        fsync, replace = os.fsync, os.replace

        def watched_fsync(descriptor):
            fsync(descriptor)
            inode = os.fstat(descriptor).st_ino
            path = self._inodes().get(inode)
            if path is None:  # elsewhere
                return
            self.held.append(os.dup(descriptor))
            if path.is_dir():
                self.names[inode] = self._listed(path)
            else:
                self.synced[inode] = path.read_bytes()
            self.look()

        def watched_replace(source, target):
            replace(source, target)
            self.look()

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "replace", watched_replace)

    def _inodes(self):
        return {path.stat().st_ino: path for path in (self.root, *self.root.rglob("*"))}

    @staticmethod
    def _listed(folder):
        return {path.name: path.stat().st_ino for path in folder.iterdir()}

    def left(self, early):
        """A folder with what a power failure would leave now."""
        shutil.rmtree(self.copies, ignore_errors=True)
        inodes = self._inodes()

        def copy(inode, place):
            path = inodes.get(inode)
            if path is not None and path.is_dir():
                place.mkdir()
                names = self._listed(path) if early else self.names.get(inode, {})
                for name, child in names.items():
                    copy(child, place / name)
                return
            content = self.synced.get(inode, b"")
            if early and path is not None and not path.read_bytes().startswith(content):
                content = b""
            place.write_bytes(content)

        copy(self.root.stat().st_ino, self.copies)
        return self.copies

    def look(self):
        if self.check is not None:
            for early in (False, True):
                self.check(self.left(early))

    def close(self):
        for descriptor in self.held:
            os.close(descriptor)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    disk = Disk(tmp_path, monkeypatch)
    yield disk
    disk.close()


posix = pytest.mark.skipif(os.name != "posix", reason="folders are synced on POSIX alone")


@posix
def test_a_file_in_a_new_folder_survives_a_power_failure(disk):
    make_folder(disk.root / "runs" / "script" / "run")
    versions = []

    def old_or_new(root):
        file = root / "runs" / "script" / "run" / "config.json"
        found = json.loads(file.read_text()) if file.exists() else None
        assert found in versions[-2:]

    disk.check = old_or_new
    for version in ({"epochs": 1}, {"epochs": 2}):
        versions[:] = [*(versions[-1:] or [None]), version]
        write_json(disk.root / "runs" / "script" / "run" / "config.json", version)
        versions[:] = [version]
        disk.look()


@posix
def test_the_log_survives_a_power_failure_before_its_first_line_and_while_it_is_cut(disk):
    counts = {0}

    def whole(root):
        assert len(log.read(root)) in counts

    book = log.Log(disk.root, main=True)
    disk.check = whole
    disk.look()
    for step in (1, 2, 3):
        book.metrics("train", step, 1, {"train/train/loss": 1.0})
    counts |= {3}
    book.sync()
    counts = {3}
    disk.look()
    counts = {2, 3}
    book.cut("train", 2)
    counts = {2}
    disk.look()
    book.close()


def resumable(folder):
    """The step that a run goes on from, where all that its state needs is there."""
    state = checkpoint.load_newest(folder)
    if state is None:
        return 0
    place = state["place"]
    assert len(log.read(folder)) >= place["log_lines"]
    if place["best_epoch"]:
        best = next(folder / name for name in files.BEST if (folder / name).exists())
        assert checkpoint.load(best)["epoch"] >= place["best_epoch"]
    return place["step"]


@posix
def test_a_power_failure_at_any_moment_of_a_save_leaves_a_state_to_go_on_from(disk):
    model = nn.Linear(2, 2)
    book = log.Log(disk.root, main=True)
    progress = Progress(
        disk.root,
        "train",
        parts={"model": model},
        log=book,
        world=dist.Dist(0, 1, torch.device("cpu")),
        signals=None,
        model_spec={},
        start="",
        save_every=1,
        max_steps=None,
    )
    steps = [0]

    def check(root):
        assert resumable(root) in steps

    disk.check = check
    for step in (1, 2, 3):
        progress.step = step
        book.metrics("train", step, step, {"train/val/accuracy": step / 10})
        progress.select(step / 10, model.state_dict(), {}, higher_is_better=True)
        progress.end_epoch()
        steps.append(step)
        progress.save()
        steps[:] = [step]
        disk.look()
    book.close()


@posix
@pytest.mark.e2e
def test_a_run_goes_on_as_if_nothing_had_happened_after_a_power_failure(disk, tmp_path):
    argv = flags("--device cpu --epochs 2 --bs 256 --save-every 0 --workers 1 --log-every 1 --out")
    folder = disk.root / "new" / "run"
    reached = []  # steps, at every sync and renaming
    kept = []

    def check(root):
        reached.append(resumable(root / "new" / "run"))
        if len(reached) in (20, 61, 101):
            kept.append(shutil.copytree(root, tmp_path / f"kept{len(kept)}"))

    disk.check = check
    assert fifth_script.main([*argv, str(folder)]) == 0
    disk.check = None
    last = resumable(folder)
    assert {0, 1, last} <= set(reached)
    assert summary(disk.left(False) / "new" / "run")["status"] == "finished"
    assert len(kept) == 3
    for root in kept:
        assert fifth_script.main([*argv, str(root / "new" / "run")]) == 0
        equal_runs(folder, root / "new" / "run")


@posix
@pytest.mark.parametrize("number", ["EACCES", "EINVAL"])
def test_a_folder_that_cannot_be_synced_is_taken_as_it_is(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(getattr(files.errno, number), number)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_json(tmp_path / "config.json", {"epochs": 1})
    assert json.loads((tmp_path / "config.json").read_text()) == {"epochs": 1}


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
