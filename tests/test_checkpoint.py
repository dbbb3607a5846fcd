"""Checkpoints are atomic, verified and harmless; random-number states return; signals only set a
flag.
"""

import os
import pickle
import random
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.run import checkpoint, dist
from common.run.files import FORMAT
from common.run.progress import Progress
from common.run.signals import Interrupted, Signals


def state():
    return {
        "format": FORMAT,
        "weights": torch.arange(1000.0),
        "stage": "train",
        "start": "",
        "place": dict.fromkeys(checkpoint._COUNTS, 3) | {"best": None, "done": False},
        **dict.fromkeys(("kinds", "parts", "sums", "rng"), {}),
        "names": ["a", "b"],
    }


def test_round_trip_and_plain_torch_load(tmp_path):
    checkpoint.save(tmp_path / "last.pt", state())
    for loaded in (
        checkpoint.load(tmp_path / "last.pt"),
        torch.load(tmp_path / "last.pt", weights_only=True),
    ):
        assert torch.equal(loaded["weights"], state()["weights"])
        assert loaded["place"] == state()["place"] and loaded["names"] == ["a", "b"]
    assert os.listdir(tmp_path) == ["last.pt"]


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path):
    file = tmp_path / "last.pt"
    checkpoint.save(file, state())
    good = file.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(InputError, match="damaged"):
            checkpoint.load(file)
    for length in [0, 1, len(good) - 1, *(rng.randrange(len(good)) for _ in range(50))]:
        file.write_bytes(good[:length])
        with pytest.raises(InputError, match="damaged"):
            checkpoint.load(file)


def test_the_one_before_is_used_when_the_newest_is_damaged(tmp_path):
    said = []
    assert checkpoint.load_newest(tmp_path, said.append) is None
    checkpoint.save(tmp_path / "last.previous.pt", state() | {"names": ["old"]})
    checkpoint.save(tmp_path / "last.pt", state())
    assert checkpoint.load_newest(tmp_path, said.append)["names"] == ["a", "b"] and not said
    (tmp_path / "last.pt").write_bytes(b"half a file")
    assert checkpoint.load_newest(tmp_path, said.append)["names"] == ["old"]
    assert "damaged" in said[0]
    (tmp_path / "last.previous.pt").write_bytes(b"")
    with pytest.raises(InputError, match="--resume none"):
        checkpoint.load_newest(tmp_path, said.append)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.pt", state())

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path / "last.pt", state() | {"names": ["new"]})
    assert checkpoint.load(tmp_path / "last.pt")["names"] == ["a", "b"]
    assert os.listdir(tmp_path) == ["last.pt"]


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_hostile_pickle_executes_nothing(tmp_path):
    trap = tmp_path / "executed"
    for name, write in (
        ("zip.pt", torch.save),
        ("raw.pt", lambda o, f: f.write_bytes(pickle.dumps(o))),
    ):
        write({"weights": Hostile(trap)}, tmp_path / name)
        with pytest.raises(InputError, match="not a file of tensors"):
            checkpoint.load(tmp_path / name)
    assert not trap.exists()


def test_weights_that_do_not_fit_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(InputError) as error:
        checkpoint.load_weights(
            model, {"0.weight": torch.zeros(4, 5), "1.bias": torch.zeros(4)}, "x.pt"
        )
    text = str(error.value)
    assert (
        "x.pt" in text
        and "1 key missing (first: 0.bias)" in text
        and "1 unknown key (first: 1.bias)" in text
    )
    assert "0.weight is (4, 5), the model's is (4, 3)" in text


def test_patience_counts_from_the_last_certain_gain_and_selection_does_not(tmp_path):
    world = dist.Dist(0, 1, torch.device("cpu"))
    progress = Progress(
        tmp_path,
        "s",
        parts={},
        log=None,
        world=world,
        signals=None,
        model_spec={},
        start="",
        save_every=1,
        max_steps=None,
    )
    stale, best = [], []
    for epoch, value in enumerate([0.50, 0.505, 0.51, 0.515, 0.53, 0.52, float("nan")]):
        progress.epoch = epoch
        progress.select(value, {}, {}, higher_is_better=True, confident_value=value - 0.01)
        stale.append(progress.evals_without_gain)
        best.append(progress.best_epoch)
    assert stale == [0, 1, 2, 0, 0, 1, 2]  # 0.51 - 0.01 is not above 0.50; 0.515 - 0.01 is
    assert best == [1, 2, 3, 4, 5, 5, 5]


def _stage(folder, model) -> Progress:
    said = types.SimpleNamespace(
        **dict.fromkeys(("sync", "cut", "go_on_from", "say", "resumed"), lambda *_: None),
        count=lambda _: 0,
        seconds=0.0,
    )
    options = dict(
        log=said,
        world=dist.Dist(0, 1, torch.device("cpu")),
        signals=None,
        model_spec={},
        start="",
        save_every=1,
        max_steps=None,
    )
    return Progress(folder, "s", parts={"model": model}, **options)


def test_a_best_model_newer_than_the_state_is_known_as_the_best(tmp_path):
    """A process killed between best.pt and last.pt: what follows must not take the file for an
    older epoch's.
    """
    model = torch.nn.Linear(2, 1)
    progress = _stage(tmp_path, model)
    for epoch, value in enumerate((0.5, 0.6)):
        progress.epoch = epoch
        progress.select(value, model.state_dict(), {"m": value}, higher_is_better=True)
        progress.save()
    again = _stage(tmp_path, model)
    again.restore(checkpoint.load(tmp_path / "last.previous.pt"))
    assert (again.best, again.best_epoch) == (0.6, 2) and again.best_metrics() == {"m": 0.6}


def test_a_best_model_has_the_metrics_it_was_selected_with(tmp_path):
    """Not what the script adds to its own meanwhile: a resumed run would not have that there."""
    model = torch.nn.Linear(2, 1)
    progress, values = _stage(tmp_path, model), {"m": 0.5}
    progress.select(0.5, model.state_dict(), values, higher_is_better=True)
    values["test"] = 0.4
    assert progress.best_metrics() == {"m": 0.5}


@pytest.mark.parametrize("name", ["copy.pt", "last.previous.pt"])
def test_a_state_that_is_not_finite_is_refused_by_the_name_of_its_file(name, tmp_path):
    model = torch.nn.Linear(2, 1)
    _stage(tmp_path, model).save()
    bad = checkpoint.load(tmp_path / "last.pt")
    bad["parts"]["model"]["bias"][0] = float("nan")
    (tmp_path / "last.pt").unlink()
    checkpoint.save(tmp_path / name, bad)
    where = tmp_path / name if name == "copy.pt" else tmp_path
    state, source = checkpoint.load_training_state(where, "s")
    with pytest.raises(InputError, match=f"{name} holds values that are NaN"):
        _stage(tmp_path / "other", model).restore(state, source)


def test_random_number_states_return(tmp_path):
    checkpoint.save(tmp_path / "rng.pt", checkpoint.rng_state())
    drawn = [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(2)]
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "rng.pt"))
    assert [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(2)] == drawn


def test_digest_tells_values_names_and_dtypes_apart():
    base = {"a": torch.ones(3), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": torch.ones(3)}
    others = [
        {"a": torch.ones(3), "b": torch.tensor(2)},
        {"a": torch.ones(3), "c": torch.tensor(1)},
        {"a": torch.ones(3).bfloat16(), "b": torch.tensor(1)},
    ]
    digest = checkpoint.weights_digest
    assert digest(base) == digest(same)
    assert len({digest(base), *map(digest, others)}) == 4


@pytest.mark.parametrize(
    ("number", "asked"),
    [
        (signal.SIGUSR1, 1),
        (signal.SIGUSR2, 1),
        (signal.SIGTERM, 2),
        (signal.SIGINT, 2),
        (signal.SIGHUP, 2),
        (signal.SIGXCPU, 2),
    ],
)
def test_signals_set_a_flag_and_are_given_back(number, asked):
    before = signal.getsignal(number)
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), number)
        assert signals.asked == asked
        if number == signal.SIGINT:
            with pytest.raises(Interrupted, match="second Ctrl-C"):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("numbers", "asked"),
    [
        ((signal.SIGUSR1, signal.SIGTERM), Signals.REQUEUE),  # the time limit after its warning
        ((signal.SIGTERM, signal.SIGUSR1), Signals.END),
        ((signal.SIGTERM, signal.SIGHUP), Signals.END),
    ],
)
def test_the_first_signal_decides(numbers, asked):
    with Signals() as signals:
        signals.defer()
        for number in numbers:
            os.kill(os.getpid(), number)
        assert signals.asked == asked


def test_what_comes_while_a_stopped_process_ends_is_not_heard():
    program = (
        "import os, signal\n"
        "from common.run.signals import Signals\n"
        "with Signals(ends_with=True) as signals:\n"
        "    signals.defer()\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")


def test_nohup_keeps_ignoring_hup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_raised_where_there_is_nothing_to_save(number):
    with Signals() as signals, signals.at_once():
        with pytest.raises(Interrupted, match="nothing to save yet"):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number if number != signal.SIGINT else signal.SIGTERM)  # only once
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted), signals.at_once():
            raise AssertionError("it was asked before")
        assert signals.urgency == Signals.WAIT


def test_a_process_that_does_not_hear_is_ended(tmp_path):
    """A call of minutes in which Python runs no handler: here a mutex that nobody gives back."""
    program = """
import ctypes, os, signal, threading
from common.run import signals

signals._PATIENCE = 0.1
with signals.Signals() as asked:
    asked.urgency = asked.LEAVE
    asked._raised = True  # not even between this line and the mutex
    print("begun", flush=True)
    room = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(room)
    libc.pthread_mutex_lock(room)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert said == "nothing was saved. Run the same command again\n"


def test_a_job_that_never_comes_to_train_is_not_requeued_for_ever(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert Signals.leave_early(Signals.REQUEUE, "x").code == 75
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    ending = Signals.leave_early(Signals.REQUEUE, "x")
    assert ending.code == 2 and "sbatch --time" in str(ending) and "restart 3" in str(ending)
    assert Signals.leave_early(Signals.END, "x").code == 75


def test_an_end_without_requeue_tells_what_to_do(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    stop = Signals.leave(Signals.REQUEUE, "step 5")
    assert stop.code == 75 and "step 5" in str(stop) and "Run the same command again" in str(stop)


def test_usr1_requeues_the_slurm_job(tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert Signals.leave(Signals.END, "step 5").code == 75
    assert not (tmp_path / "called").exists()
    assert Signals.leave(Signals.REQUEUE, "step 5").code == 0
    assert (tmp_path / "called").read_text() == "requeue 42\n"
    tool.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    stop = Signals.leave(Signals.REQUEUE, "step 5")
    assert stop.code == 75 and "no such job" in str(stop)
