"""Everything that needs a GPU, in one command: python -m tests.on_gpu --minutes 10

Parts in the order of what matters, each with a limit of its own. on_gpu.json keeps what is done, so
that the same command goes on with what is not; on_gpu.md is its table, for docs/results.md. A part
that fails is kept with its last lines, and the next one begins. Exit codes: 0 all is done; 4 a part
failed or was killed at its limit; 75 the minutes were too few, run the same command again.

    python -m tests.on_gpu --dry      all of it on a CPU with small stand-ins, before a GPU waits

Scripts run in forks of this process, which has imported them once and never touches the GPU.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as td

import kernels.benchmark
import train_cluster
import train_raer
import train_simclr
import train_tsm
from common.data import benchmark as data_benchmark
from common.errors import plural
from common.run import dist
from kernels import nt_xent
from tests import benchmark_tsm, plain_simclr
from tests.data import cells_tree, ffpp_tree, raer_tree, utterances_npz
from tests.runs import equal_runs, flags

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = [
    f"tests/test_{name}.py"
    for name in ("nt_xent", "sup_con", "temporal_shift", "shift_conv1x1", "kernels_dispatch")
]
RESERVE = 3  # seconds that are kept for ending processes and writing
TAIL = 12  # lines that a failure keeps

# Short runs of the four scripts, with the maker of their data.
RUNS = {
    "simclr": (
        train_simclr,
        cells_tree,
        "--backbone resnet18_narrow --image-size 8 --bs 16 --epochs 2",
    ),
    "tsm": (
        train_tsm,
        ffpp_tree,
        "--backbone conv_small_035 --image-size 32 --n-segment 4 --bs 4 --epochs 2 --clips 1",
    ),
    "raer": (
        train_raer,
        raer_tree,
        "--backbone vit_tiny --num-frames 2 --bs 8 --epochs 2 --tune full",
    ),
    "cluster": (
        train_cluster,
        utterances_npz,
        "--base-dim 16 --bs 32 --epochs 1 --cluster-bs 32 --cluster-epochs 2",
    ),
}
SIMCLR = "--backbone resnet50 --bs 256 --image-size 224 --max-steps 50 --profile --eval-every 1000"
PLAIN = "--backbone resnet50 --bs 256 --image-size 224 --steps 50"
TSM = "--backbone conv_medium --image-size 224 --n-segment 8 --bs 16"
VIEWS = "--size 224 --images 16 --repeats 20"
RAER = "--backbone vit_b_16 --tune full --checkpoint-blocks --bs 8 --max-steps 6"
# What stands in for them in a dry run, with the same lines to be read.
SMALL = {
    SIMCLR: "--backbone resnet18_narrow --image-size 8 --bs 4 --max-steps 5 --profile",
    PLAIN: "--backbone resnet18 --image-size 32 --bs 4 --steps 5 --images 32 --workers 1",
    TSM: "--backbone conv_small_035 --image-size 32 --n-segment 2 --bs 2",
    VIEWS: "--size 24 --images 2 --repeats 1 --pairs 2",
    RAER: "--backbone vit_tiny --tune full --checkpoint-blocks --num-frames 1 --bs 2 --max-steps 3",
}


BAD = ("failed", "killed")  # what the exit code tells; "no time" waits for the next run


class Failed(Exception):
    """A part did not do what it is for; the message is what is kept of it."""


class NoTime(Exception):
    """The limit has come, the part's or that of all minutes."""


class Lab:
    """Starts functions as processes and ends them in time.

    Args:
        folder: where runs, outputs and the JSON lie.
        dry: on the CPU, with stand-ins.
        end: time.monotonic() at which everything has ended.
    """

    def __init__(self, folder: Path, dry: bool, end: float):
        self.folder, self.dry, self.end = folder, dry, end
        self.device = "cpu" if dry else "cuda"
        self.until = end
        self.runs = folder / "runs"  # of one part
        self.running: dict[int, Path] = {}
        self.rows: list[list[str]] = []

    def sized(self, argv: str) -> list[str]:
        """The flags, or those of their stand-in."""
        return flags(SMALL[argv] if self.dry else argv, "--device", self.device)

    def shown(self, command: str, argv: str) -> str:
        return f"`{command} {SMALL[argv] if self.dry else argv}`"

    def found(self, what: str, value: str) -> None:
        """A row of the table; kept even if the part then fails."""
        self.rows.append([what, value])

    def start(self, name: str, main, argv: list[str], env: dict | None = None) -> int:
        """main(argv) in a process of its own, its output in the file NAME.txt: its id."""
        log = self.folder / f"{name}.txt"
        log.write_text("")  # that of an earlier try; the process may not come as far as to open it
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            self.running[pid] = log
            return pid
        code = 1
        try:
            os.setsid()
            gc.freeze()  # what was imported is no garbage, however often it is looked for
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.environ |= env or {}
            with open(log, "w", buffering=1, encoding="utf-8") as out:
                for stream in (1, 2):
                    os.dup2(out.fileno(), stream)
                sys.stdout = sys.stderr = out
                try:
                    code = main(argv) or 0
                except SystemExit as ending:
                    code = ending.code if isinstance(ending.code, int) else 1
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)

    def finish(self, pid: int, code: int = 0) -> str:
        """What it printed, when it has ended with `code`.

        Raises:
            Failed: with another one.
            NoTime: it was killed at the limit.
        """
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > self.until:
                raise NoTime
            time.sleep(0.05)
        log = self.running.pop(pid)
        printed = log.read_text(encoding="utf-8", errors="replace")
        ended = os.waitstatus_to_exitcode(status)
        if ended != code:
            lines = [line for line in printed.splitlines() if line.strip()][-TAIL:]
            raise Failed("\n".join([f"{log.stem} ended with {ended}", *lines]))
        return printed

    def run(self, *job, **options) -> str:
        return self.finish(self.start(*job, **options))

    def kill(self, pid: int) -> None:
        """The process and all it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            for _ in range(100):  # it may be held by the driver
                if os.waitpid(pid, os.WNOHANG)[0]:
                    break
                time.sleep(0.02)
        self.running.pop(pid, None)


def module(name: str, argv: list[str]) -> int:
    """`python -m NAME ARGV`, in place of this process."""
    os.chdir(ROOT)
    os.execv(sys.executable, [sys.executable, "-m", name, *argv])


def read(pattern: str, printed: str) -> re.Match:
    found = re.search(pattern, printed)
    if not found:
        lines = printed.splitlines()[-TAIL:]
        raise Failed("\n".join([f"no {pattern!r} in what was printed:", *lines]))
    return found


def gpu_tests(lab: Lab) -> None:
    """`pytest -m gpu` of the kernels; without a GPU they are skipped."""
    argv = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore"]
    printed = lab.run("tests", partial(module, "pytest"), [*argv, *KERNEL_TESTS])
    count = read(rf"(\d+) {'skipped' if lab.dry else 'passed'}", printed)
    lab.found("`pytest -m gpu` of the kernels", count[0])


def resume(lab: Lab, name: str) -> None:
    """A run that is killed, and the same command again, equal a run that nothing interrupts."""
    script, make, argv = RUNS[name]
    work = lab.runs / name
    work.mkdir(parents=True)
    data = make(work / ("data.npz" if make is utterances_npz else "data"))
    argv = flags(argv, "--data", data, "--device", lab.device, "--save-every 0 --deterministic")
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

    def begin(folder, log):
        job = (f"{name}-{log}", script.main, flags(argv, "--out", work / folder))
        return lab.start(*job, env=env)

    whole, killed = begin("whole", "whole"), begin("killed", "killed")
    while not any((work / "killed").rglob("last.previous.pt")):
        if os.waitpid(killed, os.WNOHANG)[0] or time.monotonic() > lab.until:
            break
        time.sleep(0.02)
    lab.kill(killed)
    if (work / "killed" / "summary.json").exists():
        raise Failed("the run had ended before it was killed")
    lab.finish(whole)
    printed = lab.finish(begin("killed", "again"))
    step = read(r"resuming from step (\d+)", printed)[1]
    equal_runs(work / "whole", work / "killed")
    lab.found(f"`train_{name}.py`, killed and run again", f"equal bits, from step {step} on")


def compare(lab: Lab, op: str) -> None:
    """Correctness and times of an operation and its peers; what is done counts if it is killed."""
    out = lab.folder / f"{op}.json"
    out.unlink(missing_ok=True)
    argv = ["--op", op, "--peers", "--json", str(out)]
    try:
        lab.run(
            op,
            kernels.benchmark.main,
            [*argv, *(["--cpu", "--quick", "--calls", "3"] if lab.dry else [])],
        )
    finally:
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        rows = [row for row in rows if row["pass"] == "fwd+bwd"]
        for shape in dict.fromkeys(row["shape"] for row in rows):
            ours, others = [], []
            for row in rows:
                if row["shape"] == shape and row["error"] is not None:
                    text = f"{row['implementation']} {row['ms']:.4g} ({row['error']:.0e})"
                    of_us = row["implementation"].startswith("ours")
                    (ours if of_us else others).append(f"**{text}**" if of_us else text)
            lab.found(f"{op}, {shape}: ms of both passes (error)", ", ".join(ours + others))


def phases(printed: str) -> tuple[float, str]:
    """Seconds of a step and the phases' shares, from the line of --profile."""
    found = read(r"profile: ([\d.]+) ms a step: (.*)", printed)
    return float(found[1]) / 1e3, found[2]


def throughput(lab: Lab) -> None:
    """A step of train_simclr.py beside a SimCLR of plain PyTorch."""
    argv = lab.sized(SIMCLR)
    printed = lab.run("simclr", train_simclr.main, flags(argv, "--out", lab.runs))
    seconds, shares = phases(printed)
    rate = int(argv[argv.index("--bs") + 1]) / seconds
    peak = read(r"peak memory ([\d.]+ \wB)", printed)[1]
    lab.found(lab.shown("train_simclr.py", SIMCLR), f"{rate:.4g} pairs/s, peak {peak}; {shares}")
    line = lab.run("plain", plain_simclr.main, lab.sized(PLAIN)).splitlines()[-1]
    plain = json.loads(line)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in plain["shares"].items())
    value = f"{plain['pairs_s']:.4g} pairs/s, peak {plain['peak_gb']:.2f} GB; {shares}"
    lab.found(lab.shown("python -m tests.plain_simclr", PLAIN), value)


def views(lab: Lab) -> None:
    """The augmentation's share of a ResNet-50 step."""
    printed = lab.run("views", data_benchmark.main, lab.sized(VIEWS))
    step = json.loads(printed.splitlines()[-1])["rows"][-1]
    share = f"{step['share']:.1%} of augmentation, forward and backward"
    value = f"{step['augmentation_ms']:.4g} ms for {step['pairs']} pairs, {share}"
    lab.found(lab.shown("python -m common.data.benchmark", VIEWS), value)


def tsm(lab: Lab) -> None:
    """Peak memory against its prediction; the step with and without the shift."""
    argv = lab.sized(TSM)
    out = flags(argv, "--max-steps 5 --out", lab.runs)
    printed = lab.run("tsm", train_tsm.main, out)
    predicted = read(r"predicted memory of \d+ frames at once: ([\d.]+ \wB)", printed)[1]
    peak = read(r"peak memory ([\d.]+ \wB)", printed)[1]
    lab.found(lab.shown("train_tsm.py", TSM), f"peak {peak}, predicted {predicted}")
    printed = lab.run("tsm-steps", benchmark_tsm.main, argv)
    rows = json.loads(printed.splitlines()[-1])["rows"]
    steps = ", ".join(f"{k} {v['ms']:.4g} ms ({v['ratio']:.3f} x)" for k, v in rows.items())
    lab.found(lab.shown("python -m tests.benchmark_tsm", TSM), steps)


def raer(lab: Lab) -> None:
    """Whether a ViT-B/16 tuned in full fits 12 GiB."""
    printed = lab.run("raer", train_raer.main, flags(lab.sized(RAER), "--out", lab.runs))
    peak, unit = read(r"peak memory ([\d.]+) (\wB)", printed).groups()
    gib = float(peak) * {"MB": 1e6, "GB": 1e9}[unit] / 2**30
    lab.found(lab.shown("train_raer.py", RAER), f"peak {peak} {unit}, {gib / 12:.0%} of 12 GiB")


def one_process(argv: list[str]) -> int:
    """What several processes need of the backend, with one."""
    (backend,) = argv
    with tempfile.TemporaryDirectory() as folder:
        td.init_process_group(backend, f"file://{folder}/meet", rank=0, world_size=1)
        device = torch.device("cuda" if backend == "nccl" else "cpu")
        z = torch.randn(64, 32, device=device).requires_grad_()
        gathered = nt_xent(*z.chunk(2), 0.1, gather=dist.all_gather_rows)
        alone = nt_xent(*z.chunk(2), 0.1)
        torch.testing.assert_close(gathered, alone, rtol=1e-4, atol=1e-4)
        got, expected = (torch.autograd.grad(loss, z)[0] for loss in (gathered, alone))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        model = torch.nn.Linear(32, 8).to(device)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped(z.detach()).square().sum().backward()
        (truth,) = torch.autograd.grad(model(z.detach()).square().sum(), model.weight)
        torch.testing.assert_close(model.weight.grad, truth)
        td.barrier()
        td.destroy_process_group()
    print("equal")
    return 0


def nccl(lab: Lab) -> None:
    """Gathering, averaging and DistributedDataParallel with NCCL, one process."""
    backend = "gloo" if lab.dry else "nccl"
    lab.run("nccl", one_process, [backend])
    lab.found(f"{backend}, one process", "gathered loss and averaged gradients as without")


def sweep(lab: Lab) -> None:
    """Every tile of the losses' kernels, in what is left of the minutes."""
    minutes = (lab.until - time.monotonic() - 10) / 60
    out = lab.folder / "sweep.json"
    argv = ["--sweep", "--json", str(out), "--minutes", f"{max(minutes, 0.01):.2f}"]
    env = {"TRITON_INTERPRET": "1"} if lab.dry else {}
    argv += ["--cpu", "--quick"] if lab.dry else []
    lab.run("sweep", partial(module, "kernels.benchmark"), argv, env=env)
    result = json.loads(out.read_text())
    lab.found("`python -m kernels.benchmark --sweep`", f"{result['timed']} of {result['tiles']}")
    for line in result["paste"]:
        lab.found("tiles", f"`{line}`")


# Name -> function and its limit in seconds, in the order of what matters.
PARTS = {
    "tests of the kernels": (gpu_tests, 180),
    **{f"resume {name}": (partial(resume, name=name), 60) for name in RUNS},
    "benchmark nt_xent": (partial(compare, op="nt_xent"), 120),
    "throughput of SimCLR": (throughput, 120),
    "share of the augmentation": (views, 60),
    "benchmark sup_con": (partial(compare, op="sup_con"), 60),
    "benchmark temporal_shift": (partial(compare, op="temporal_shift"), 60),
    "benchmark shift_conv1x1": (partial(compare, op="shift_conv1x1"), 60),
    "memory and step of TSM": (tsm, 60),
    "memory of RAER": (raer, 60),
    "NCCL": (nccl, 30),
    "sweep of tiles": (sweep, 600),
}


def attempt(lab: Lab, name: str) -> dict:
    """Run a part: what is kept of it."""
    function, limit = PARTS[name]
    begin = time.monotonic()
    limit *= 10 if lab.dry else 1  # on a CPU, which may be busy
    lab.until = min(begin + limit, lab.end)
    shutil.rmtree(lab.runs, ignore_errors=True)
    lab.rows, status, tail = [], "ok", []
    try:
        function(lab)
    except NoTime:
        out_of_minutes = lab.until == lab.end
        status = "no time" if out_of_minutes else "killed"
        last = [log.read_text(errors="replace").splitlines() for log in lab.running.values()]
        tail = [] if out_of_minutes else [f"no end after {limit} s", *sum(last, [])[-TAIL:]]
    except Exception as error:
        status = "failed"
        tail = (str(error) or traceback.format_exc()).splitlines()[: TAIL + 1]
    finally:
        for pid in list(lab.running):
            lab.kill(pid)
        shutil.rmtree(lab.runs, ignore_errors=True)
    seconds = round(time.monotonic() - begin, 1)
    commit = kernels.benchmark.commit()
    return {"status": status, "seconds": seconds, "commit": commit, "rows": lab.rows, "tail": tail}


def table(result: dict) -> str:
    """The Markdown of what on_gpu.json holds."""
    header, parts = result["header"], result["parts"]
    commits = sorted({part["commit"] or "unknown" for part in parts.values()})
    lines = [
        f"`python -m tests.on_gpu`, commit {', '.join(commits)}; "
        + ", ".join(f"{name} {value}" for name, value in header.items() if value is not None),
        "",
        "| part | what | result | s |",
        "| --- | --- | --- | --- |",
    ]
    for name in PARTS:
        part = parts.get(name, {"status": "not started", "seconds": "", "rows": [], "tail": []})
        rows = [list(row) for row in part["rows"]]
        if part["status"] != "ok":
            rows.append([f"**{part['status']}**", " / ".join(part["tail"][:3])])
        for row in rows:
            cells = [str(x).replace("|", "\\|").replace("\n", " ") for x in (name, *row)]
            lines.append(f"| {' | '.join(cells)} | {part['seconds']} |")
    return "\n".join(lines) + "\n"


def describe(argv: list[str]) -> int:
    found = argv == ["cpu"] or torch.cuda.is_available()
    print(json.dumps(kernels.benchmark.header(torch.device(argv[0])) if found else None))
    return 0


def age() -> float:
    """Seconds since this process began, what it imported included."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - int(ticks) / os.sysconf("SC_CLK_TCK")
    return 0.0


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.on_gpu", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10, help="in which all of it ends")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with small stand-ins")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of on_gpu.json, on_gpu.md and the outputs; unset: runs/on_gpu, and for a dry"
        " run one that is removed",
    )
    parser.add_argument(
        "--only", metavar="PART", nargs="+", choices=PARTS, help="these parts, done or not"
    )
    args = parser.parse_args(argv)
    if not 0 < args.minutes < 1e6:
        parser.error(f"--minutes {args.minutes:g}: it must be above 0")
    return args


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    begin = time.monotonic() - age()
    made = tempfile.mkdtemp(prefix="on_gpu-") if args.dry and not args.out else None
    folder = Path(made or args.out or ROOT / "runs" / "on_gpu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lab = Lab(folder, args.dry, begin + 60 * args.minutes - RESERVE)
    try:
        return work(lab, args)
    except (NoTime, Failed) as error:
        print(f"error: {str(error) or 'no time: give more --minutes'}", file=sys.stderr)
        return 75 if isinstance(error, NoTime) else 2
    finally:
        for pid in list(lab.running):
            lab.kill(pid)
        if made:
            shutil.rmtree(made, ignore_errors=True)


def work(lab: Lab, args: argparse.Namespace) -> int:
    printed = lab.run("header", describe, [lab.device])
    header = json.loads(printed.splitlines()[-1])
    if header is None:
        raise Failed("there is no GPU; --dry tries all of it without one")
    # Clocks and dates are of the moment, the commit is kept with each part.
    header = {k: v for k, v in header.items() if k not in ("clocks", "commit", "date")}
    header["dry"] = args.dry
    file = lab.folder / "on_gpu.json"
    result = {"header": header, "parts": {}}
    if file.exists():
        result = json.loads(file.read_text(encoding="utf-8"))
        other = {k: v for k, v in result["header"].items() if v != header.get(k)}
        if other:
            differing = ", ".join(f"{k} {v}, now {header.get(k)}" for k, v in other.items())
            raise Failed(f"{file} is of {differing}; give another --out, or remove it")
    parts = result["parts"]
    for name in PARTS:
        if args.only and name not in args.only:
            continue
        if not args.only and parts.get(name, {}).get("status") == "ok":
            print(f"{name}: done before")
            continue
        if time.monotonic() > lab.end:
            print(f"{name}: no time")
            continue
        part = parts[name] = attempt(lab, name)
        print(f"{name}: {part['status']}, {part['seconds']} s")
        for line in [*(": ".join(row) for row in part["rows"]), *part["tail"]]:
            print(f"  {line}")
        sys.stdout.flush()
        for path, text in (
            (file, json.dumps(result, indent=1)),
            (lab.folder / "on_gpu.md", table(result)),
        ):
            path.with_suffix(".new").write_text(text, encoding="utf-8")
            path.with_suffix(".new").replace(path)
    print(f"\n{table(result)}")
    wanted = args.only or list(PARTS)
    statuses = [parts.get(name, {}).get("status", "no time") for name in wanted]
    bad = [name for name, status in zip(wanted, statuses, strict=True) if status in BAD]
    print(
        f"{plural(statuses.count('ok'), 'part')} of {len(statuses)} done; failed: {bad or 'none'}"
    )
    return 4 if bad else 75 if "no time" in statuses else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    sys.exit(main(sys.argv[1:]))
