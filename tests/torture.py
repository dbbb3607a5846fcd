"""Runs that are killed, signaled, damaged and starved, and must end as if nothing had happened.

  python -m tests.torture --script all --kills 200 --signals 60 --flips 1000 --full-disk 100
  --rank-deaths 20

One process imports everything once. Every attempt is a fork of it that calls the script's `main`
with the same flags in the same run directory; its networks are tiny, so that most of a run is what
is tortured: steps, saves, evaluations and the log. After each attempt the same command goes on, and
the finished run's weights, log, metrics and features must equal those of a run that nothing
disturbed, bit by bit. Any failure is an exception and exit code 1.
"""

import argparse
import contextlib
import errno
import fcntl
import itertools
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common import deep_cluster, optim, reading, retry
from common.data import augment, sampling
from common.models import Backbone, clip, mobilenet_v4
from common.report import page
from common.run import checkpoint, content, dist, log, run
from common.run.log import Log
from common.run.progress import Progress
from common.run.signals import Signals
from tests.data import cells_tree, ffpp_tree, raer_tree, utterance_arrays
from tests.runs import equal_runs, same

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads of OpenMP cannot be forked

MODULES = {"simclr": train_simclr, "tsm": train_tsm, "raer": train_raer, "cluster": train_cluster}
COMMON = ["--device", "cpu", "--seed", "3", "--save-every", "0", "--log-every", "1"]
FLAGS = {
    "simclr": "--backbone resnet18 --stem cifar --image-size 8 --stage all --bs 16 --epochs 3"
    " --finetune-bs 16 --finetune-epochs 2 --finetune-lr 0.01",
    "tsm": "--backbone conv_small_035 --image-size 32 --n-segment 2 --bs 4 --epochs 3 --clips 1",
    "raer": "--backbone vit_tiny --num-frames 2 --bs 8 --epochs 3 --tune full --dropout 0.2",
    "cluster": "--base-dim 8 --bs 40 --epochs 2 --cluster-bs 40 --cluster-epochs 2",
}
WORKERS = {
    "simclr": ("1", "2", "4"),
    "tsm": ("1", "2", "4"),
    "raer": ("1", "2", "4"),
    "cluster": (),
}
SAVING, STEPS, SAVES, SAVE_US = 0, 1, 2, 3  # what a child tells its parent, as int32


class Victim:
    """One script with its data, and the run that nothing disturbed."""

    def __init__(self, name: str, root: Path, rng: random.Random):
        self.name, self.root, self.rng = name, root / name, rng
        self.shared = np.frombuffer(mmap.mmap(-1, 64), np.int32)
        self.count = 0
        self.root.mkdir()
        place = self.root / ("data.npz" if name == "cluster" else "data")
        if name == "cluster":
            np.savez(place, **utterance_arrays(count=120))
        else:
            {"simclr": cells_tree, "tsm": small_ffpp, "raer": raer_tree}[name](place)
        self.argv = [*FLAGS[name].split(), *COMMON, "--data", str(place)]
        self.whole, begun = self.root / "whole", time.monotonic()
        assert self.run(self.whole) == 0, self.said(self.whole)
        self.seconds = time.monotonic() - begun
        self.save_seconds = self.shared[SAVE_US] / 1e6 / max(self.shared[SAVES], 1)
        self.saves = int(self.shared[SAVES])

    def fresh(self) -> Path:
        self.count += 1
        return self.root / f"run{self.count}"

    def start(
        self,
        folder: Path,
        *flags: str,
        env: dict | None = None,
        before=None,
        argv=None,
        output=None,
        at=None,
    ) -> int:
        """Fork a process that runs the script in `folder`; its output goes to FOLDER.txt, or to a
        descriptor.

        at: (what it counts, how many, the signal that it then sends itself), where one of its
        parent's may come late.
        """
        self.shared[:] = 0
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            flags_of_file = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            target = output or os.open(f"{folder}{(env or {}).get('RANK', '')}.txt", flags_of_file)
            os.dup2(target, 1)
            os.dup2(target, 2)
            os.environ.update(env or {})
            watch(self.shared, at)
            if before:
                before()
            code = MODULES[self.name].main([*(argv or self.argv), "--out", str(folder), *flags])
        except SystemExit as ending:
            code = ending.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def run(self, folder: Path, *flags: str, **more) -> int:
        return ended(self.start(folder, *flags, **more))

    def said(self, folder: Path, rank: str = "") -> str:
        return Path(f"{folder}{rank}.txt").read_text()

    def wait_until(self, pid: int, what: int, count: int) -> None:
        """Until a counter of the child has reached `count`, or it has ended."""
        while (
            self.shared[what] < count
            and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.0005)

    def finish(self, folder: Path, whole: Path | None = None, **more) -> None:
        """The same command to its end; the run must equal the undisturbed one and leave nothing
        behind.
        """
        code = self.run(folder, **more)
        assert code == 0, f"{self.name}: exit code {code}\n{self.said(folder)}"
        equal_runs(whole or self.whole, folder)
        orphans = [str(path) for path in folder.rglob(".*") if path.name != ".lock"]
        assert not orphans, orphans
        shutil.rmtree(folder)


def watch(shared: np.ndarray, at: tuple[int, int, int] | None = None) -> None:
    """Count this process's steps and saves, say when it is inside a save, and send the signal of
    `at`.
    """
    end_step, save = Progress.end_step, Progress.save
    own = {STEPS: 0, SAVES: 0}  # the shared ones are those of all processes

    def reached(what):
        own[what] += 1
        if at and (what, own[what]) == at[:2]:
            os.kill(os.getpid(), at[2])

    def counted(self, bad):
        reached(STEPS)
        end_step(self, bad)
        shared[STEPS] += 1

    def flagged(self):
        begun = time.monotonic()
        reached(SAVES)
        shared[SAVES] += 1
        shared[SAVING] = 1
        try:
            save(self)
        finally:
            shared[SAVING] = 0
            shared[SAVE_US] += int(1e6 * (time.monotonic() - begun))

    Progress.end_step, Progress.save = counted, flagged


def ended(pid: int) -> int:
    """A child's exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TinyNet(nn.Module):
    """What `build_backbone` gives, in 1,000 parameters."""

    num_features = 16
    stages = ()

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


def shrink() -> None:
    """Make the networks of the smallest flags tiny: what is tested is not in them. No start is one
    too many, however little those before it gained.
    """
    run.MOST_RESTARTS = 10**6
    train_simclr.BACKBONES["resnet18"] = Backbone(TinyNet, 8, 8)
    train_simclr.build_backbone = lambda name, stem="imagenet": TinyNet()
    mobilenet_v4.VARIANTS["conv_small_035"] = mobilenet_v4.Variant(
        8, mobilenet_v4.VARIANTS["conv_small"].stages, 0.1
    )
    clip.VARIANTS["vit_tiny"] = clip.Variant(16, 1, 1, 8, 16, text_width=0, activation="gelu")


def small_ffpp(root: Path) -> None:
    ffpp_tree(root, pairs=(2, 1, 1), count=2)


def kills(victim: Victim, count: int) -> dict:
    """`count` times kill -9 at random moments of runs, a third of them aimed into saves; each run
    then goes on.
    """
    done, inside, runs, rng = 0, 0, 0, victim.rng
    while done < count:
        folder = victim.fresh()
        for _ in range(rng.randint(3, 10)):
            if done == count:
                break
            pid = victim.start(folder)
            if rng.random() < 1 / 3:
                victim.wait_until(pid, SAVES, rng.randint(1, max(victim.saves // 3, 1)))
                time.sleep(rng.random() * victim.save_seconds)
            else:
                time.sleep(rng.random() * victim.seconds)
            os.kill(pid, signal.SIGKILL)
            if ended(pid) == -signal.SIGKILL:
                done += 1
                inside += int(victim.shared[SAVING])
        victim.finish(folder)
        runs += 1
    return {"kills": done, "inside a save": inside, "runs": runs, "lost": 0}


def signals(victim: Victim, count: int) -> dict:
    """`count` times USR1 or TERM at random moments, with another number of workers each time."""
    done, saved, early, slowest, rng = 0, 0, 0, 0.0, victim.rng
    while done < count:
        folder = victim.fresh()
        for _ in range(rng.randint(2, 5)):
            if done == count:
                break
            workers = (
                ["--workers", rng.choice(WORKERS[victim.name])] if WORKERS[victim.name] else []
            )
            pid = victim.start(folder, *workers)
            time.sleep(rng.random() * victim.seconds)
            number, asked = rng.choice([signal.SIGUSR1, signal.SIGTERM]), time.monotonic()
            os.kill(pid, number)
            code = ended(pid)
            if code == 0:
                continue  # it came after the end
            done, slowest = done + 1, max(slowest, time.monotonic() - asked)
            said = victim.said(folder).strip().split("\n")[-1]
            if code == -number or "nothing to save yet" in said:
                early += 1  # before the first step of a stage
            else:
                assert code == 75 and said.startswith("saved at"), (
                    f"{victim.name}: exit code {code}\n{said}"
                )
                saved += 1
        victim.finish(folder)
    return {
        "signals": done,
        "saved": saved,
        "before a stage began": early,
        "slowest exit, s": round(slowest, 2),
    }


def stopped(victim: Victim) -> Path:
    """A run that was ended by TERM after some saves, with a last.pt and one before it."""
    folder = victim.fresh()
    code = victim.run(folder, at=(SAVES, victim.saves // 2, signal.SIGTERM))
    assert code == 75, f"{code}: {victim.said(folder)}"
    return folder


def pairs_of(folder: Path) -> list[Path]:
    """Where a run has a last.pt and the one before it."""
    return [
        file.parent
        for file in folder.rglob("last.previous.pt")
        if (file.parent / "last.pt").exists()
    ]


def flips(victim: Victim, count: int) -> dict:
    """`count` random flips of a bit or truncations of the newest checkpoint; the one before it must
    be read instead.
    """
    folder, rng = stopped(victim), victim.rng
    place = max(pairs_of(folder), key=lambda stage: (stage / "last.pt").stat().st_mtime)
    good, before = (
        (place / "last.pt").read_bytes(),
        checkpoint.load(place / "last.previous.pt")["place"]["step"],
    )
    for i in range(count):
        bad = bytearray(good)
        if i % 2:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else:
            del bad[rng.randrange(len(bad)) :]
        (place / "last.pt").write_bytes(bad)
        said = []
        found = checkpoint.load_newest(place, said.append)
        assert "damaged" in said[0] and found["place"]["step"] == before
        if i < 2:  # and the run goes on from there
            copy = victim.fresh()
            shutil.copytree(folder, copy)
            victim.finish(copy)
    shutil.rmtree(folder)
    return {"flips and truncations": count, "found": count}


def full_disk(victim: Victim, count: int) -> dict:
    """`count` times no byte more than a random number fits; what was stored before must stay, and
    the run go on.
    """
    folder, rng, refused = stopped(victim), victim.rng, 0
    size = max(file.stat().st_size for file in folder.rglob("last.pt"))
    for i in range(count):
        copy, limit = victim.fresh(), rng.randrange(size)
        shutil.copytree(folder, copy)
        kept = {place: stored(place) for place in pairs_of(copy)}

        def from_the_first_save(limit=limit):
            save = Progress.save

            def limited(self):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                save(self)

            Progress.save = limited

        def at_once(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        end, output = os.pipe()  # what is said must not count
        fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 2**20)
        code = victim.run(copy, before=from_the_first_save if i % 2 else at_once, output=output)
        os.close(output)
        with open(end) as pipe:
            text = pipe.read()
        said = text.strip().split("\n")[-1]
        assert code == 2 and said.startswith("error: "), f"{code}: {text}"
        assert "File too large" in said or "No space" in said, said
        refused += bool(re.search(r"takes \d+ bytes, \d+ are missing", said))
        for place, before in kept.items():
            after = stored(place)
            assert max(after.values()) >= before["last.pt"], f"{place}: {before} became {after}"
        victim.finish(copy)
    shutil.rmtree(folder)
    return {"full disks": count, "in a checkpoint": refused, "lost": 0}


def stored(place: Path) -> dict:
    """The steps of a run's readable states by file."""
    files = [place / "last.pt", place / "last.previous.pt"]
    return {
        f.name: checkpoint.load(f)["place"]["step"]
        for f in files
        if f.exists() and checkpoint.is_whole(f)
    }


def rank_env(rank: int, world_size: int, port: int) -> dict:
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(value) for name, value in env.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(
    victim: Victim, folder: Path, world_size: int, *flags: str, at=None, only=None, **more
) -> list[int]:
    """The processes of one run; the counters are those of all of them. `at` is for all, or for the
    rank `only`.
    """
    port, found = free_port(), []
    for rank in range(world_size):
        own = at if only in (None, rank) else None
        found.append(
            victim.start(folder, *flags, env=rank_env(rank, world_size, port), at=own, **more)
        )
    return found


def rank_deaths(victim: Victim, count: int) -> dict:
    """`count` times kill -9 of one of two processes; the other must leave soon, and both go on."""
    rng, slowest = victim.rng, 0.0
    whole = victim.fresh()
    assert [ended(pid) for pid in together(victim, whole, 2)] == [0, 0], victim.said(whole, "0")
    steps = int(victim.shared[STEPS])
    done = 0
    while done < count:
        folder = victim.fresh()
        pids = together(victim, folder, 2)
        victim.wait_until(pids[0], STEPS, rng.randint(1, max(steps - 4, 1)))
        time.sleep(rng.random() * 0.05)
        dead = rng.randrange(2)
        os.kill(pids[dead], signal.SIGKILL)
        begun = time.monotonic()
        codes = [ended(pid) for pid in pids]
        if codes[dead] == -signal.SIGKILL:
            slowest, done = max(slowest, time.monotonic() - begun), done + 1
            said = victim.said(folder, str(1 - dead)).strip().split("\n")[-1]
            assert codes[1 - dead] == 75, f"{codes}: {victim.said(folder, str(1 - dead))}"
            assert (
                f"rank {1 - dead} of 2, " in said and " step " in said and "same command" in said
            ), said
        assert [ended(pid) for pid in together(victim, folder, 2)] == [0, 0], victim.said(
            folder, "0"
        )
        equal_runs(whole, folder)
        shutil.rmtree(folder)
    shutil.rmtree(whole)
    return {"rank deaths": done, "slowest exit of the other, s": round(slowest, 2), "lost": 0}


def stalls(victim: Victim, count: int) -> dict:
    """`count` times one of two processes is stopped (SIGSTOP); the other must leave by itself after
    --timeout.
    """
    rng, slowest, limit = victim.rng, 0.0, 6.0
    for _ in range(count):
        folder = victim.fresh()
        at, still = (STEPS, rng.randint(1, 6), signal.SIGSTOP), rng.randrange(2)
        pids = together(victim, folder, 2, "--timeout", str(limit / 60), at=at, only=still)
        os.waitid(os.P_PID, pids[still], os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        begun = time.monotonic()
        code = ended(pids[1 - still])
        slowest = max(slowest, time.monotonic() - begun)
        os.kill(pids[still], signal.SIGKILL)  # as its launcher does
        ended(pids[still])
        said = victim.said(folder, str(1 - still)).strip().split("\n")[-1]
        assert (
            code == 75
            and f"rank {1 - still} of 2, " in said
            and f"no step in {limit / 60:g} minutes" in said
        ), f"{code}: {said}"
        assert [ended(pid) for pid in together(victim, folder, 2)] == [0, 0], victim.said(
            folder, "0"
        )
        shutil.rmtree(folder)
    return {
        "stalled processes": count,
        f"slowest exit of the other at {limit:g} s": round(slowest, 2),
    }


def hangs(victim: Victim, count: int) -> dict:
    """`count` times a loader thread hangs in the read of an image, as on a dead file system."""
    if victim.name != "simclr":
        return {"hanging reads": 0}
    slowest = 0.0
    read_bytes = reading.read_bytes

    def hang(path, *most, **how):
        if str(path).endswith("long/08.png"):  # not one that is read before training
            time.sleep(1000)
        return read_bytes(path, *most, **how)

    def before():
        reading.read_bytes = hang

    for _ in range(count):
        folder, begun = victim.fresh(), time.monotonic()
        code = victim.run(folder, "--timeout", "0.1", before=before)
        slowest = max(slowest, time.monotonic() - begun)
        said = victim.said(folder).strip().split("\n")[-1]
        assert (
            code == 75
            and "waits in common/data/images.py" in said
            and "Run the same command" in said
        ), f"{code}: {said}"
    return {"hanging reads": count, "slowest exit at 6 s": round(slowest, 2)}


def damages(victim: Victim, count: int) -> dict:
    """`count` times one file of a stopped run has a bit flipped, is cut, or is filled with other
    bytes. It is said, and the same command ends the run; where config.json is lost it does so when
    that is put back.
    """
    folder, rng, refused = stopped(victim), victim.rng, 0
    # Of last.pt see `flips`; features.npz is an export that a later stage does not read again.
    files = [
        path.relative_to(folder)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != ".lock"
        and not path.name.startswith(("last.", "features."))
    ]
    for i in range(count):
        copy = victim.fresh()
        shutil.copytree(folder, copy)
        file = copy / files[i % len(files)]
        good = file.read_bytes()
        file.write_bytes(damaged(good, file.suffix == ".jsonl", rng))
        code = victim.run(copy)
        said = victim.said(copy).strip()
        if file.name == "config.json" and code == 2:
            refused += 1
            assert said.split("\n")[-1].startswith("error: "), said
            file.write_bytes(good)
            code = victim.run(copy)
        assert code == 0, f"{victim.name}: {file.name}: exit code {code}\n{victim.said(copy)}"
        if file.name == "best.pt":
            assert "best.pt" in said and "damaged" in said, said
        if file.name == "best.pt":
            equal_states(victim.whole / file.parent.relative_to(copy), file.parent)
        elif file.name == "log.jsonl":
            for stage in (copy, *filter(Path.is_dir, copy.iterdir())):
                equal_states(victim.whole / stage.relative_to(copy), stage)
            lines, kept = (untimed(run) for run in (victim.whole, copy))
            assert sum(line not in kept for line in lines) <= 1
            assert all(line in lines for line in kept)
        else:
            equal_runs(victim.whole, copy)
        shutil.rmtree(copy)
    shutil.rmtree(folder)
    return {"damaged files": count, "of them config.json, refused": refused, "lost": 0}


def damaged(good: bytes, is_log: bool, rng: random.Random) -> bytes:
    """Content with one thing wrong; of a log one line, for a digit there has no checksum."""
    if is_log:
        lines = good.split(b"\n")
        lines[rng.randrange(max(len(lines) - 1, 1))] = rng.choice([b"", b"{", b"[1]", b"\xff\0"])
        return b"\n".join(lines)
    bad = bytearray(good)
    what = rng.randrange(3)
    if what == 0 and bad:
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    elif what == 1:
        del bad[rng.randrange(len(bad) + 1) :]
    else:
        bad = bytearray(rng.randbytes(min(len(bad), 100)))
    return bytes(bad)


def equal_states(whole: Path, folder: Path) -> None:
    """The last states of two stages are the same, where there are any."""
    if (whole / "last.pt").exists():
        ours, theirs = (checkpoint.load(place / "last.pt")["parts"] for place in (folder, whole))
        same(ours, theirs, str(folder))


def untimed(run: Path) -> list[dict]:
    """The lines of a run's log without what differs between two runs."""
    return [{k: v for k, v in line.items() if k not in log.TIMING} for line in log.read(run)]


def other_data(victim: Victim, count: int) -> dict:
    """`count` times data that a stopped run has read change under their names, or two processes
    have different data: the first names or the counts are said, exit code 2; put back, it ends.
    """
    place, rng = Path(victim.argv[-1]), victim.rng
    folder = stopped(victim)
    record = content.load(folder, print)
    known = set(record["names"][record["digests"] != 0].tolist())
    changed = 0
    for i in range(count):
        kept = victim.root / f"kept{i}{place.suffix}"
        copy_data = shutil.copytree if place.is_dir() else shutil.copy
        copy_data(place, kept)
        if i % 2:
            resize_item(kept, rng)
            codes, texts = [], []
            run = victim.fresh()
            port = free_port()
            pids = [
                victim.start(
                    run,
                    env=rank_env(rank, 2, port),
                    argv=[*victim.argv[:-1], str(kept if rank else place)],
                )
                for rank in range(2)
            ]
            codes = [ended(pid) for pid in pids]
            texts = [victim.said(run, str(rank)).strip().split("\n")[-1] for rank in range(2)]
            assert codes == [2, 2], f"{codes}: {texts}"
            assert all("the ranks read different data" in text for text in texts), texts
        else:
            copy = victim.fresh()
            shutil.copytree(folder, copy)
            change_item(place, known, rng)
            code = victim.run(copy)
            said = victim.said(copy).strip().split("\n")[-1]
            assert code == 2 and said.startswith("error: "), f"{code}: {said}"
            assert "content" in said or "data has changed" in said, said
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            copy_data(kept, place)
            victim.finish(copy)
            changed += 1
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    shutil.rmtree(folder)
    return {"changed data": changed, "ranks with other data": count - changed, "unnoticed": 0}


def change_item(place: Path, known: set[int], rng: random.Random) -> None:
    """Give one file that the run knows, or one row of a table, other content of the same size."""
    if place.is_file():
        arrays = dict(np.load(place))
        arrays["text"][rng.randrange(len(arrays["text"]))] += 1
        np.savez(place, **arrays)
        return
    files = sorted(path for path in place.rglob("*.png"))
    read = [f for f in files if content.digest(f.relative_to(place).as_posix().encode()) in known]
    file = rng.choice(read)
    with Image.open(file, formats=["PNG"]) as image:
        pixels = np.array(image)
    Image.fromarray(255 - pixels).save(file)


def resize_item(place: Path, rng: random.Random) -> None:
    """Make one file, or a table, of a data set another one that can be read as well."""
    if place.is_file():
        arrays = dict(np.load(place))
        count = len(arrays["text"])
        row = rng.randrange(count)
        fewer = {k: np.delete(v, row, 0) if len(v) == count else v for k, v in arrays.items()}
        np.savez(place, **fewer)
    else:
        with open(rng.choice(sorted(place.rglob("*.png"))), "ab") as file:
            file.write(b"\0")


def broken_reports(victim: Victim, count: int) -> dict:
    """`count` runs whose reports fail now and then, in whatever way, and end as they would have."""
    errors = (
        MemoryError(),
        KeyError("x"),
        OSError(28, "No space left on device"),
        SyntaxError("cut"),
    )
    said = 0
    for _ in range(count):
        folder, seed = victim.fresh(), victim.rng.random()

        def fail(seed=seed):
            write, rng = page.write, random.Random(seed)

            def failing(*args, **more):
                if rng.random() < 0.7:
                    raise rng.choice(errors)
                return write(*args, **more)

            page.write = failing

        victim.run(folder, before=fail, at=(SAVES, max(victim.saves // 2, 1), signal.SIGTERM))
        code = victim.run(folder, before=fail)
        assert code == 0, f"{victim.name}: exit code {code}\n{victim.said(folder)}"
        said += "WARN" in victim.said(folder)
        equal_runs(victim.whole, folder)
        shutil.rmtree(folder)
    return {"runs with failing reports": count, "of them with a WARN": said, "lost": 0}


def stale(victim: Victim, count: int) -> dict:
    """`count` runs in which reading, writing, renaming and syncing fail for moments (ESTALE, EIO,
    EAGAIN); each goes on by itself.
    """
    numbers = (errno.ESTALE, errno.EIO, errno.EAGAIN)
    said = 0
    for _ in range(count):
        folder, seed = victim.fresh(), victim.rng.random()

        def fail(seed=seed):
            rng = random.Random(seed)
            failures = itertools.count()

            def unreliable(work):
                def worked(*args, **more):
                    # Not without end: a listing begins anew when one of its files fails.
                    if rng.random() < 0.02 and next(failures) < 30:
                        raise OSError(number := rng.choice(numbers), os.strerror(number), "a file")
                    return work(*args, **more)

                return worked

            for name in ("fsync", "replace", "preadv"):
                setattr(os, name, unreliable(getattr(os, name)))
            reading.regular_status = unreliable(reading.regular_status)
            retry._sleep = lambda seconds, asked: None

        code = victim.run(folder, before=fail)
        assert code == 0, f"{victim.name}: exit code {code}\n{victim.said(folder)}"
        said += "trying again" in victim.said(folder)
        equal_runs(victim.whole, folder)
        shutil.rmtree(folder)
    return {"runs on an unreliable file system": count, "of them that waited": said, "lost": 0}


def full_memory(victim: Victim, count: int) -> dict:
    """`count` times the memory of the host or of a GPU is full in a step; the run ends in one line,
    and goes on.
    """
    errors = (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    )
    for i in range(count):
        folder, left = victim.fresh(), victim.rng.randint(1, 8)

        error = errors[i % len(errors)]

        def fail(error=error, left=left):
            backward = torch.Tensor.backward
            calls = itertools.count(1)

            def limited(self, *args, **more):
                if next(calls) == left:
                    raise error
                backward(self, *args, **more)

            torch.Tensor.backward = limited

        code = victim.run(folder, before=fail)
        said = victim.said(folder).strip().split("\n")[-1]
        assert code == 2 and said.startswith("error: ") and "out of memory" in said, (
            f"{code}: {victim.said(folder)}"
        )
        victim.finish(folder)
    return {"full memories": count, "lost": 0}


ALONE = {
    "simclr": "",
    "tsm": "--dropout 0 --accum 1",
    "raer": "--dropout 0",
    "cluster": "--dropout 0",
}


def in_double(module) -> None:
    """Let this process train in float64, where an unequal gradient cannot hide behind rounding."""
    build_model, to_float = module.build_model, torch.Tensor.float
    normalize, make_views = augment.normalize, augment.make_views
    take = deep_cluster.Rows.take
    module.build_model = lambda *args, **more: build_model(*args, **more).double()
    augment.normalize = lambda *args: normalize(*args).double()
    augment.make_views = lambda *args: make_views(*args).double()
    torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else to_float(x)

    def taken(self, indices):
        inputs, lengths = take(self, indices)
        return {name: x.double() for name, x in inputs.items()}, lengths

    deep_cluster.Rows.take = taken


def equality(victim: Victim, count: int) -> dict:
    """Two and four processes take the step of one; --eval gives the metrics of one on two, three
    and four.
    """
    flags, states = [*ALONE[victim.name].split(), "--max-steps", "1"], {}
    if victim.name == "simclr":
        flags += ["--optimizer", "sgd"]
    evaluated = {}
    double = partial(in_double, MODULES[victim.name])
    for world_size in (1, 2, 4):
        folder = victim.fresh()
        codes = {ended(pid) for pid in together(victim, folder, world_size, *flags, before=double)}
        assert codes == {0}, victim.said(folder, "0")
        states[world_size] = checkpoint.load(next(folder.rglob("last.pt")))["parts"]["optimizer"][
            "state"
        ]
    worst = 0.0
    name = "exp_avg" if any("exp_avg" in own for own in states[1].values()) else "momentum_buffer"
    largest = max(
        own[name].abs().max().item() for own in states[1].values()
    )  # both go with the gradient
    for state in (states[2], states[4]):
        assert state.keys() == states[1].keys() and state
        for key, own in states[1].items():
            # The gradient of what BatchNorm or softmax takes off again is nothing but rounding.
            scale = own[name].abs().max().item() + 1e-3 * largest
            worst = max(worst, (state[key][name] - own[name]).abs().max().item() / scale)
    assert worst <= 1e-6, f"{victim.name}: gradients differ by {worst:.1e} of the largest"
    argv = ["--eval", str(victim.whole), "--data", victim.argv[-1], "--device", "cpu"]
    for world_size in (1, 2, 3, 4):
        folder = victim.fresh()
        assert {ended(p) for p in together(victim, folder, world_size, argv=argv)} == {0}, (
            victim.said(folder, "0")
        )
        (file,) = folder.rglob("eval.json")
        evaluated[world_size] = json.loads(file.read_text())
    off = max(
        abs(evaluated[w][name] - value)
        for name, value in evaluated[1].items()
        for w in (2, 3, 4)
        if "/" in name
    )
    assert off <= 1e-6, evaluated
    return {"gradients differ by at most": f"{worst:.1e}", "metrics by": f"{off:.1e}"}


def worlds(victim: Victim, count: int) -> dict:
    """`count` runs that are stopped and go on with one, two and four processes: every sample once
    an epoch.
    """
    rng, reference = victim.rng, None
    whole = (
        ["--accum", "1"] if victim.name == "tsm" else []
    )  # four processes divide its batch, eight chunks do not
    for _ in range(count + 1):
        folder = victim.fresh()
        (trace := folder.with_suffix(".trace")).mkdir()
        sizes = [1, 2, 4, 1] if reference else [1]
        for i, world_size in enumerate(sizes):
            at = (STEPS, rng.randint(1, 3), signal.SIGTERM) if i + 1 < len(sizes) else None
            pids = together(
                victim, folder, world_size, *whole, before=partial(record, trace, i), at=at
            )
            codes = {ended(pid) for pid in pids}
            assert codes == ({75} if i + 1 < len(sizes) else {0}), (
                f"{codes}: {victim.said(folder, '0')}"
            )
        found = {}
        for file in sorted(trace.iterdir()):
            for line in file.read_text().splitlines():
                stage, epoch, step, ids = json.loads(line)
                found.setdefault((stage, epoch), {}).setdefault(step, []).extend(ids)
        if reference is None:
            reference = found
        assert found.keys() == reference.keys()
        for key, steps in found.items():
            assert steps.keys() == reference[key].keys()
            for step, ids in steps.items():
                assert sorted(ids) == sorted(reference[key][step]), (key, step)
            seen = [i for ids in steps.values() for i in ids]
            assert victim.name == "raer" or len(seen) == len(set(seen)), (
                key
            )  # it draws with replacement
    return {"runs on 1, 2, 4 and 1 processes": count, "samples twice or never": 0}


def record(folder: Path, attempt: int) -> None:
    """Write down the items of every step of the stages that go through a permutation, by (stage,
    epoch, step).
    """
    made, cut, end_step = {}, sampling.batch_slices, Progress.end_step
    file = open(folder / f"{attempt}-{os.environ['RANK']}", "w")  # noqa: SIM115

    def kept(order, bs, done=0, world=None):
        made["batches"], made["done"] = cut(order, bs, done, world), done
        return made["batches"]

    def written(self, bad):
        if self.stage in ("pretrain", "finetune", "train"):
            ids = made["batches"][self.batch - made["done"]].tolist()
            file.write(json.dumps([self.stage, self.epoch, self.step, ids]) + "\n")
            file.flush()
        end_step(self, bad)

    sampling.batch_slices, Progress.end_step = kept, written


def cost() -> None:
    """What safety costs: the time of saves of a ResNet-50 with LARS, and that of the end of a step
    without a save.
    """
    model = train_simclr.SimCLR(train_simclr.build_backbone("resnet50"), 128)
    optimizer = optim.build_optimizer("lars", optim.param_groups([model], 1e-4), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    world = dist.Dist(0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="torture-") as folder, Signals() as asked:
        parts, log = {"model": model, "optimizer": optimizer}, Log(Path(folder), main=True)
        options = dict(
            world=world, signals=asked, model_spec={}, start="", save_every=10.0, max_steps=None
        )
        progress, times = Progress(Path(folder), "pretrain", parts=parts, log=log, **options), []
        for _ in range(5):
            begun, busy = time.perf_counter(), time.process_time()
            progress.save()
            times.append((time.perf_counter() - begun, time.process_time() - busy))
        fine, begun, count = torch.tensor(False), time.perf_counter(), 2000
        for _ in range(count):
            progress.end_step(fine)
        step = (time.perf_counter() - begun) / count
        save, busy = (sorted(column)[len(times) // 2] for column in zip(*times, strict=True))
        size = (Path(folder) / "last.pt").stat().st_size
    print(
        f"a save of {size / 1e6:.0f} MB takes {save:.2f} s ({busy:.2f} s of CPU):"
        f" {save / 600:.2%} at --save-every 10"
    )
    print(f"the end of a step takes {step * 1e6:.0f} us: {step / 0.1:.3%} of a step of 100 ms")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", choices=[*MODULES, "all"], default="all")
    kinds = {
        "kills": kills,
        "signals": signals,
        "flips": flips,
        "full-disk": full_disk,
        "rank-deaths": rank_deaths,
        "damages": damages,
        "other-data": other_data,
        "broken-reports": broken_reports,
        "stale": stale,
        "full-memory": full_memory,
        "stalls": stalls,
        "hangs": hangs,
        "equality": equality,
        "worlds": worlds,
    }
    for name in kinds:
        parser.add_argument(
            f"--{name}", type=int, default=0, metavar="N", help="over all chosen scripts together"
        )
    parser.add_argument("--cost", action="store_true", help="measure what safety costs, and end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.cost:
        cost()
        return 0
    shrink()
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        del os.environ[name]
    chosen = list(MODULES) if args.script == "all" else [args.script]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as root:
        for i, name in enumerate(chosen):
            victim = Victim(name, Path(root), random.Random(args.seed + i))
            print(
                f"{name}: a run of {victim.seconds:.1f} s, {victim.saves} saves of"
                f" {victim.save_seconds * 1e3:.1f} ms"
            )
            for kind, work in kinds.items():
                total = getattr(args, kind.replace("-", "_"))
                share = total // len(chosen) + (i < total % len(chosen))
                if share:
                    found = work(victim, share)
                    print(
                        f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()),
                        flush=True,
                    )
            shutil.rmtree(victim.root)
    print(f"nothing was lost, in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
