"""A run that is interrupted anywhere and started again equals the run that nothing interrupted."""

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common import live
from common.run import checkpoint, loop
from common.run.evaluation import Evaluation
from common.run.files import WRITTEN
from common.run.loop import Loop
from common.run.progress import Progress
from tests.data import cells_tree, ffpp_tree, raer_tree, utterances_npz, utterances_tsv
from tests.runs import ended, equal_runs, flags, start, succeed, summary

pytestmark = pytest.mark.e2e

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SIMCLR = flags("--backbone resnet18 --stem cifar --image-size 8 --device cpu --bs 16")
STAGES = flags("--stage all --epochs 3 --finetune-bs 16 --finetune-epochs 2 --seed 3")
SGD = flags("--stage linear --from none --linear-solver sgd --epochs 4")
FINETUNE = flags(
    "--stage finetune --from none --epochs 2 --sampler balanced --normalize data",
    "--vertical-flip --rotation any --stain 0.1",
)
TSM = flags(
    "--backbone conv_small_035 --image-size 32 --n-segment 4 --device cpu --bs 4 --accum 2",
    "--epochs 4 --eval-every 1 --clips 2 --seed 3 --sampler balanced --patience 2",
)
RAER = flags(
    "--backbone vit_tiny --device cpu --num-frames 3 --bs 8 --epochs 4 --eval-every 2 --seed 3"
)
CLUSTER = flags(
    "--device cpu --base-dim 16 --bs 32 --epochs 2 --cluster-bs 32",
    "--cluster-epochs 3 --seed 3 --log-every 1",
)


class Case(NamedTuple):
    """A way to run a script, and where it is cut: `many` places in a range of steps and stops."""

    script: Any
    argv: list[str]
    cuts: list[tuple[int, int, int]]  # first, past the last, many
    workers: bool = True  # another number of workers after each cut


CASES = {
    "simclr": Case(
        train_simclr, [*SIMCLR, *STAGES], [(1, 9, 2), (10, 20, 2), (20, 45, 2), (93, 98, 1)]
    ),
    "simclr linear sgd": Case(train_simclr, [*SIMCLR, *SGD], [(1, 9, 2), (14, 24, 2)]),
    "simclr student": Case(train_simclr, [*SIMCLR, *FINETUNE], [(1, 9, 3)]),
    "tsm accumulation, growing loss scale": Case(train_tsm, TSM, [(1, 24, 5)]),
    "raer": Case(train_raer, [*RAER, "--tune", "full", "--dropout", "0.2"], [(1, 20, 5)]),
    "raer cached features": Case(
        train_raer, [*RAER, "--cache-features", "--method", "crt"], [(1, 20, 5)]
    ),
    "cluster": Case(train_cluster, CLUSTER, [(2, 34, 6)], False),
    "cluster umc": Case(train_cluster, [*CLUSTER, "--mode", "umc"], [(2, 34, 6)], False),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data of each script, by its name."""
    root = tmp_path_factory.mktemp("data")
    return {
        "simclr": cells_tree(root / "cells"),
        "tsm": ffpp_tree(root / "ffpp"),
        "raer": raer_tree(root / "raer"),
        "cluster": utterances_npz(root / "acts.npz"),
    }


def answer_of(file):
    """What a file of results says, but for the checkpoint that it is of."""
    if file.name != "eval.json":
        return file.read_bytes()
    return {k: v for k, v in json.loads(file.read_text()).items() if k != "checkpoint"}


def interrupt(monkeypatch, rng, cuts):
    """At each of `cuts`, counted in steps and in looks for a stop, the process gets a signal."""
    calls = 0

    def counted(original):
        def call(self, *args):
            nonlocal calls
            calls += 1
            if cuts and calls >= cuts[0]:
                cuts.pop(0)
                os.kill(os.getpid(), rng.choice(SIGNALS))
            return original(self, *args)

        return call

    for name in ("end_step", "check_stop"):
        monkeypatch.setattr(Progress, name, counted(getattr(Progress, name)))


@pytest.mark.parametrize("name", CASES)
def test_a_run_interrupted_anywhere_equals_a_whole_one(name, data, tmp_path, monkeypatch, capsys):
    """Steps and evaluations are cut short at random places by a real signal, and the same command
    goes on. Each of its starts foresees how long it takes, the whole run does not.
    """
    case = CASES[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = flags(case.argv, "--data", data[name.split()[0]])
    if name == "simclr student":
        assert case.script.main(flags(argv, "--seed 1 --out", tmp_path / "teacher")) == 0
        argv += flags("--teacher", tmp_path / "teacher")
    if case.script is train_tsm:
        # fp16 itself takes minutes on a CPU; its scaler is what has a state.
        grows = partial(torch.amp.GradScaler, "cpu", init_scale=8.0, growth_interval=3)
        monkeypatch.setattr(train_tsm.amp, "scaler", lambda *_: grows())
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "foresee", lambda *_: None)
        assert case.script.main(flags(argv, "--out", whole)) == 0
    assert "on this CPU" not in capsys.readouterr().out
    monkeypatch.setattr(loop, "LONG", 0.0)
    monkeypatch.setattr(loop, "_FEW", 1)

    rng = random.Random(7 if name == "simclr" else 5)
    cuts = sorted(sum((rng.sample(range(a, b), many) for a, b, many in case.cuts), []))
    wanted = len(cuts)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    interrupt(monkeypatch, rng, cuts)
    stopped, stages, foreseen = 0, set(), 0
    while True:
        workers = flags("--workers", stopped + 1) if case.workers else []
        code = ended(case.script.main, flags(argv, workers, "--out", cut))
        printed = capsys.readouterr()
        foreseen += "on this CPU" in printed.out
        if code == 0:
            break
        assert code == 75 and summary(cut)["status"] == "stopped"
        stages.add(printed.err.split()[2])
        stopped += 1
    assert stopped == wanted
    assert foreseen > wanted // 2 or name == "simclr linear sgd"  # of stored features
    equal_runs(whole, cut)
    written = {path.name for path in whole.rglob("*.*") if path.parent.name != "figures"}
    assert written <= {*WRITTEN, ".lock"}  # or --resume none and a killed run would leave some
    if name == "simclr":
        assert {"pretrain", "finetune"} <= stages
        assert any(stage.startswith("linear") for stage in stages)
    if case.script is train_tsm:
        assert checkpoint.load(cut / "last.pt")["parts"]["scaler"]["scale"] > 8
        assert {"best_epoch", "train/test/video_auc"} <= summary(cut).keys()
    if case.script is train_cluster:
        assert (cut / "clusters.csv").read_bytes() == (whole / "clusters.csv").read_bytes()


@pytest.mark.parametrize(
    "name", ["simclr", "tsm accumulation, growing loss scale", "raer cached features", "cluster"]
)
def test_a_run_named_by_resume_keeps_its_flags_and_data(name, data, tmp_path, capsys):
    case = CASES[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = flags(case.argv, "--data", data[name.split()[0]])
    assert case.script.main(flags(argv, "--out", whole)) == 0
    assert ended(case.script.main, flags(argv, "--max-steps 2 --out", cut)) == 0
    here = flags("--device cpu --log-every 1 --resume", cut)
    assert case.script.main(here) == 0
    equal_runs(whole, cut)
    assert ended(case.script.main, flags(here, "--seed 4")) == 2
    assert "seed is 3 there and 4 here" in capsys.readouterr().err
    other = train_raer if case.script is train_tsm else train_tsm
    before = {path: path.read_bytes() for path in cut.rglob("*.*") if path.is_file()}
    for more in (flags("--resume", cut), flags("--out", cut), flags("--force-resume --out", cut)):
        assert ended(other.main, flags("--device cpu", more)) == 2
        assert f"is of train_{name.split()[0]}.py; use that script" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in cut.rglob("*.*") if path.is_file()}


def test_what_a_stage_starts_from_is_selected_once(data, tmp_path, monkeypatch):
    """A signal between the evaluation of a stage's start and its first step."""
    argv = flags(CLUSTER, "--data", data["cluster"])
    assert train_cluster.main(flags(argv, "--out", tmp_path / "whole")) == 0
    calls = 0

    def foresee(*_):
        nonlocal calls
        calls += 1
        if calls in (1, 3):  # in each of the stages
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "foresee", foresee)
    argv += flags("--out", tmp_path / "cut")
    assert [ended(train_cluster.main, argv) for _ in range(3)] == [75, 75, 0]
    assert live.line.owner is None
    equal_runs(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "name", ["simclr", "tsm accumulation, growing loss scale", "raer cached features", "cluster"]
)
def test_a_run_stopped_in_evaluations_computes_none_of_their_batches_twice(
    name, data, tmp_path, monkeypatch
):
    """A signal comes at the end of many a batch of evaluations, of all stages."""
    case, add, done = CASES[name], Evaluation.add, []
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = flags(case.argv, "--data", data[name.split()[0]])
    monkeypatch.setattr(train_simclr, "EVAL_IMAGES", 16)
    for script in (train_tsm, train_raer):
        monkeypatch.setattr(script, "EVAL_FRAMES", 24)
    monkeypatch.setattr(train_cluster, "eval_batch_of", lambda _: 50)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def counted(self, rows):
        done.append(len(rows))
        add(self, rows)

    def signaled(self):
        if len(done) in stops:
            stops.remove(len(done))  # the solved stage looks for a stop without a batch
            os.kill(os.getpid(), signal.SIGTERM)
        check_stop(self)

    stops, check_stop = set(), Progress.check_stop
    monkeypatch.setattr(Progress, "check_stop", signaled)
    monkeypatch.setattr(Evaluation, "add", counted)
    assert case.script.main(flags(argv, "--out", whole)) == 0
    wanted, batches = len(done), done.copy()
    assert wanted > 8
    done.clear()
    stops = {*range(2, wanted, max(wanted // 5, 1)), wanted}
    expected = [*[75] * len(stops), 0]
    codes = []
    while not codes or codes[-1] == 75:
        codes.append(ended(case.script.main, flags(argv, "--out", cut)))
    assert codes == expected
    assert done == batches
    equal_runs(whole, cut)


def test_a_killed_process_goes_on_from_its_last_checkpoint(data, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    argv = flags(SIMCLR, "--data", data["simclr"], "--epochs 3 --save-every 0 --out")
    process = start(train_simclr, flags(argv, killed))
    for _ in range(600):
        if (killed / "last.previous.pt").exists():
            break
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert not (killed / "summary.json").exists()
    (printed,) = succeed(start(train_simclr, flags(argv, killed)))
    assert "pretrain: resuming from step" in printed
    succeed(start(train_simclr, flags(argv, whole)))
    equal_runs(whole, killed)


ALONE = {  # the flags of a short run, and what is used of it
    "simclr": (
        train_simclr,
        flags(SIMCLR, "--stage all --epochs 1 --store-size 12"),
        ["--eval", "--predict", "--from", "--weights", "--teacher"],
    ),
    "tsm": (
        train_tsm,
        flags(TSM, "--epochs 2 --fps 6 --store-size 48 --direction past"),
        ["--eval", "--predict", "--stream", "--weights", "--teacher"],
    ),
    "raer": (
        train_raer,
        flags(RAER, "--epochs 2 --face-margin 0.5 --store-size 24"),
        ["--eval", "--predict", "--teacher"],
    ),
    "cluster": (train_cluster, CLUSTER, ["--eval", "--predict"]),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_checkpoint_alone_answers_as_in_its_run(name, data, tmp_path, capsys):
    script, argv, ways = ALONE[name]
    source, run, alone = data[name], tmp_path / "run", tmp_path / "alone"
    if name == "cluster":  # whose text features are fitted in the run
        source = utterances_tsv(tmp_path / "texts.tsv")
    train = flags(argv, "--data", source, "--device cpu")
    if name == "simclr":
        train += flags("--finetune-bs 16 --finetune-epochs 1")
    assert script.main(flags(train, "--out", run)) == 0
    alone.mkdir()
    last = {"simclr": "finetune", "cluster": "cluster"}.get(name, "")
    for kind in ("best", "last"):
        shutil.copy(run / last / f"{kind}.pt", alone / f"{kind}_of_it.pt")
    (alone / "config.json").write_text('{"architectures": ["BertModel"]}')
    short = flags(train, "--epochs 1 --seed 5")
    if name == "simclr":
        short = flags(SIMCLR, "--data", source, "--stage finetune --epochs 1 --seed 5")
    use = {
        "--eval": flags("--device cpu --eval"),
        "--predict": flags("--device cpu --predict", source, "--resume"),
        "--from": [*short, "--from"],
        "--weights": [*short, "--weights"],
        "--teacher": [*short, *flags("--from none")[: 2 * (name == "simclr")], "--teacher"],
    }
    if name == "tsm":
        frames = next(path.parent for path in sorted(source.rglob("*.png")))
        use["--stream"] = flags("--device cpu --stream", frames, "--resume")
    for way in ways:
        for kind in ("best", "last") if way in ("--eval", "--predict", "--stream") else ("best",):
            answers = []
            for file in (run / last / f"{kind}.pt", alone / f"{kind}_of_it.pt"):
                out = tmp_path / f"{way}-{kind}-{file.stem}"
                assert script.main(flags(use[way], file, "--out", out)) == 0, way
                names = ("eval.json", "eval.csv", "predictions.csv", "stream.csv")
                found = {f.name: answer_of(f) for f in out.rglob("*") if f.name in names}
                if (out / "last.pt").exists():
                    weights = checkpoint.load(out / "last.pt")["parts"]["model"]
                    found = checkpoint.weights_digest(weights)
                answers.append(found)
            assert answers[0] and answers[0] == answers[1], (way, kind)
    # Without --out results lie beside the file, and nothing else does.
    before = set(os.listdir(alone))
    assert script.main(flags(use["--eval"], alone / "best_of_it.pt")) == 0
    left = set(os.listdir(alone)) - before
    assert left <= {"eval.json", "eval.csv", "eval_confusion.csv", "eval"}
    assert list(alone.rglob("eval.json"))
