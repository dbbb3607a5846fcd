"""What waits for a GPU, without one: the command's parts, its limits and what it keeps."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests import on_gpu


@pytest.mark.e2e
def test_a_dry_run_does_every_part_and_the_next_one_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.on_gpu", "--dry", "--minutes", "60", "--out", tmp_path]
    first, second = (
        subprocess.run(command, cwd=on_gpu.ROOT, capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stdout + first.stderr
    result = json.loads((tmp_path / "on_gpu.json").read_text())
    assert list(result["parts"]) == list(on_gpu.PARTS)
    for name, part in result["parts"].items():
        assert part["status"] == "ok" and part["rows"] and not part["tail"], name
        assert f"| {name} | {part['rows'][0][0]} |" in (tmp_path / "on_gpu.md").read_text()
        assert f"{name}: done before" in second.stdout
    assert result["header"]["dry"] and result["header"]["ptxas"]
    # Runs are gone, outputs are kept.
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".txt"}


def works(argv):
    print("fine")


def breaks(argv):
    print("first")
    raise ValueError("no such kernel")


def hangs(argv):
    print("begun", flush=True)
    time.sleep(60)


def job(function):
    def part(lab):
        lab.found("before", "kept")
        printed = lab.run(function.__name__, function, [])
        lab.found("printed", printed.strip())

    return part


@pytest.fixture
def lab(monkeypatch, tmp_path):
    """main(flags...) with parts -> exit code and what is kept."""
    monkeypatch.setattr(on_gpu, "age", lambda: 0.0)

    def run(parts, *flags):
        monkeypatch.setattr(on_gpu, "PARTS", parts)
        code = on_gpu.main(["--dry", "--out", str(tmp_path), *flags])
        file = tmp_path / "on_gpu.json"
        return code, json.loads(file.read_text())["parts"] if file.exists() else {}

    return run


def test_what_fails_or_hangs_is_kept_and_the_next_part_begins(lab, tmp_path):
    parts = {"a": (job(breaks), 60), "b": (job(hangs), 0.3), "c": (job(works), 60)}
    code, kept = lab(parts)
    assert code == 4
    assert [part["status"] for part in kept.values()] == ["failed", "killed", "ok"]
    assert "breaks ended with 1" in kept["a"]["tail"][0]
    assert "ValueError: no such kernel" in kept["a"]["tail"][-1]
    assert kept["b"]["tail"] == ["no end after 3.0 s", "begun"] and kept["b"]["seconds"] < 60
    assert all(part["rows"][0] == ["before", "kept"] for part in kept.values())
    assert kept["c"]["rows"][1] == ["printed", "fine"]
    table = (tmp_path / "on_gpu.md").read_text()
    assert "| a | **failed** | breaks ended with 1 /" in table and "| c | printed | fine |" in table
    # Mended, only these are run.
    done = []
    mended = {name: (lambda lab, name=name: done.append(name), 60) for name in "abc"}
    assert lab(mended)[0] == 0 and done == ["a", "b"]
    assert lab(mended, "--only", "c")[0] == 0 and done == ["a", "b", "c"]


def test_it_ends_in_its_minutes_and_goes_on_later(lab, monkeypatch):
    parts = {"a": (job(works), 60), "b": (job(hangs), 600), "c": (job(works), 60)}
    begin = time.monotonic()
    monkeypatch.setattr(on_gpu, "RESERVE", 0)
    code, kept = lab(parts, "--minutes", "0.2")
    assert code == 75 and time.monotonic() - begin < 60
    assert kept["a"]["status"] == "ok" and kept["b"]["status"] == "no time" and "c" not in kept
    code, kept = lab(parts | {"b": parts["c"]})
    assert code == 0 and [part["status"] for part in kept.values()] == ["ok"] * 3
    # What Python imported before counts.
    monkeypatch.setattr(on_gpu, "age", lambda: 60.0)
    assert lab(parts | {"d": parts["a"]}, "--minutes", "1")[0] == 75


def test_results_of_another_machine_are_not_mixed(lab, tmp_path, capsys):
    assert lab({"a": (job(works), 60)})[0] == 0
    file = tmp_path / "on_gpu.json"
    result = json.loads(file.read_text())
    result["header"]["device"] = "NVIDIA H200"
    file.write_text(json.dumps(result))
    assert lab({"a": (job(works), 60)})[0] == 2
    error = capsys.readouterr().err
    assert "device NVIDIA H200, now CPU" in error and "--out" in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--only", "what"], ["--limit", "3"]])
def test_bad_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as ending:
        on_gpu.main(flags)
    assert ending.value.code == 2 and flags[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_gpu, "age", lambda: 0.0)
    assert on_gpu.main(["--out", str(tmp_path)]) == 2
    assert "there is no GPU; --dry" in capsys.readouterr().err
    assert not list(tmp_path.glob("on_gpu.*"))


def test_processes_end_with_their_part(tmp_path):
    """Also those that a process has started, and with SIGTERM held off."""
    read, write = os.pipe()

    def parent(argv):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "60"], pass_fds=[write])
        print("started", flush=True)
        time.sleep(60)

    lab = on_gpu.Lab(tmp_path, True, time.monotonic() + 60)
    pid = lab.start("parent", parent, [])
    os.close(write)
    log = tmp_path / "parent.txt"
    while not (log.exists() and log.read_text().startswith("started")):
        time.sleep(0.02)
    begin = time.monotonic()
    lab.kill(pid)
    assert os.read(read, 1) == b""  # nobody holds the other end
    os.close(read)
    assert time.monotonic() - begin < 50 and not lab.running
