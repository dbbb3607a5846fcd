"""train_tsm.py as its users run it: whole runs on a miniature FaceForensics++, interrupted runs
that equal them, streams, imbalance, early stopping, bad input.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train_tsm
from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.models.mobilenet_v4 import build_mobilenet_v4
from common.run import checkpoint, dist, log
from common.run.loop import Batch
from common.run.progress import Progress
from common.run.run import Run
from tests.data import clip_folders, ffpp_tree, ordered_clips, write_clip
from tests.runs import equal_runs, flags, same, summary

ROOT = Path(__file__).parent.parent
ORACLE = "pip install -r tests/requirements.txt"
NET = flags("--backbone conv_small_035 --image-size 32 --n-segment 4 --device cpu --workers 2")
SMALL = flags(NET, "--bs 8 --accum 2 --epochs 4 --eval-every 1 --clips 2 --seed 3")


@pytest.fixture(scope="module")
def ffpp(tmp_path_factory):
    return ffpp_tree(tmp_path_factory.mktemp("data") / "ffpp")


@pytest.fixture(scope="module")
def whole(ffpp, tmp_path_factory):
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_tsm.main([*SMALL, "--data", str(ffpp), "--out", str(folder)]) == 0
    return folder


def stopped_at(argv, steps):
    with pytest.raises(SystemExit) as ending:
        train_tsm.main([*argv, "--max-steps", str(steps)])
    assert ending.value.code == 0


def test_a_run_leaves_what_the_readme_promises(whole, ffpp, capsys):
    result = summary(whole)
    for name in ("", "_Deepfakes", "_FaceSwap"):
        for metric in ("auc", "ap", "eer", "accuracy"):
            for suffix in ("", "_last_epoch"):
                assert 0 <= result[f"train/test/video_{metric}{name}{suffix}"] <= 1
    assert result["status"] == "finished" and result["best_model_path"] == str(whole / "best.pt")
    epochs = [line for line in log.read(whole) if "train/val/video_auc" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4]
    values = [line["train/val/video_auc"] for line in epochs]
    assert result["best_epoch"] == 1 + values.index(max(values))
    for line in epochs:
        assert (
            line["train/val/video_auc_low"]
            <= line["train/val/video_auc"]
            <= line["train/val/video_auc_high"]
        )
    page = (whole / "report.html").read_text()
    assert "FaceSwap" in page and "Test clips, one a row" in page
    watched = json.loads((whole / "figures" / "watched.json").read_text())["rows"]
    assert [row["title"][:4] for row in watched] == ["real"] * 3 + ["fake"] * 3
    assert all(sum(card["share"] for card in row["cards"]) == pytest.approx(1) for row in watched)
    capsys.readouterr()
    assert train_tsm.main([*SMALL, "--data", str(ffpp), "--out", str(whole)]) == 0
    assert "has finished" in capsys.readouterr().out


def test_metrics_are_scikit_learns_of_the_scores_that_predict_writes(whole, ffpp, tmp_path):
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    argv = flags("--predict", ffpp, "--resume", whole, "--clips 2 --out", tmp_path, "--device cpu")
    assert train_tsm.main(argv) == 0
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert (
        len(rows) == 48 and len({row["id"] for row in rows}) == 48
    )  # the fakes of a pair stay apart
    test = {
        name for pair in json.loads((ffpp / "splits" / "test.json").read_text()) for name in pair
    }
    rows = [row for row in rows if Path(row["id"]).name.split("_")[0] in test]
    threshold = checkpoint.load(whole / "best.pt")["metrics"]["train/val/threshold"]
    for method in ("Deepfakes", "FaceSwap", ""):
        kept = [row for row in rows if "_" not in Path(row["id"]).name or method in row["id"]]
        labels = np.array(["_" in Path(row["id"]).name for row in kept])
        scores = np.array([float(row["score_fake"]) for row in kept])
        assert labels.sum() == (4 if method else 8) and len(labels) - labels.sum() == 4
        name = f"_{method}" if method else ""
        result = {
            m: summary(whole)[f"train/test/video_{m}{name}"] for m in ("auc", "ap", "accuracy")
        }
        assert result["auc"] == pytest.approx(oracle.roc_auc_score(labels, scores), abs=1e-12)
        assert result["ap"] == pytest.approx(
            oracle.average_precision_score(labels, scores), abs=1e-12
        )
        assert result["accuracy"] == pytest.approx(((scores >= threshold) == labels).mean())
        assert all(
            (row["class"] == "fake") == (float(row["score_fake"]) >= threshold) for row in kept
        )


def test_eval_repeats_the_test(whole, ffpp, tmp_path):
    for source, suffix in ((whole, ""), (whole / "last.pt", "_last_epoch")):
        argv = ["--data", str(ffpp), "--device", "cpu", "--out", str(tmp_path)]
        assert train_tsm.main([*argv, "--eval", str(source)]) == 0
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found.keys() >= {
            "eval/test/video_auc_Deepfakes",
            "eval/test/clip_auc",
            "eval/test/video_accuracy",
        }
        for name, value in found.items():
            assert value == summary(whole)[f"train/{name.split('/', 1)[1]}{suffix}"], name


def test_data_are_read_as_in_training_unless_the_command_line_says_otherwise(whole):
    assert (
        train_tsm.parse_args(["--eval", str(whole)])[0].clips
        == 2
        != train_tsm.parse_args([])[0].clips
    )
    assert train_tsm.parse_args(flags("--predict x --resume", whole / "best.pt"))[0].clips == 2
    assert train_tsm.parse_args(["--eval", str(whole), "--clips", "4"])[0].clips == 4


def test_clips_that_are_longer_than_a_batch_of_frames_are_evaluated_one_by_one(
    whole, ffpp, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_tsm, "EVAL_FRAMES", 2)
    argv = ["--data", str(ffpp), "--device", "cpu", "--out", str(tmp_path), "--eval", str(whole)]
    assert train_tsm.main(argv) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["eval/test/video_auc"] == pytest.approx(
        summary(whole)["train/test/video_auc"], abs=0.05
    )


def test_an_interrupted_run_equals_a_whole_one(ffpp, tmp_path, monkeypatch):
    """Cut short by real signals within epochs and validations, with a loss scaler that grows, over
    chunks.
    """
    # fp16 itself takes minutes on a CPU; its scaler is what has a state.
    grows = partial(torch.amp.GradScaler, "cpu", init_scale=8.0, growth_interval=3)
    monkeypatch.setattr(train_tsm.amp, "scaler", lambda *_: grows())
    argv = [*SMALL, "--data", str(ffpp), "--sampler", "balanced", "--bs", "4", "--patience", "2"]
    assert train_tsm.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    rng, calls = random.Random(5), 0
    cuts = sorted(rng.sample(range(1, 24), 5))

    def counted(original):
        def call(self, *args):
            nonlocal calls
            calls += 1
            if cuts and calls >= cuts[0]:
                cuts.pop(0)
                os.kill(os.getpid(), rng.choice([signal.SIGTERM, signal.SIGUSR1]))
            return original(self, *args)

        return call

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name in ("end_step", "check_stop"):
        monkeypatch.setattr(Progress, name, counted(getattr(Progress, name)))
    stopped = 0
    while True:
        try:
            assert train_tsm.main([*argv, "--out", str(tmp_path / "cut")]) == 0
            break
        except SystemExit as ending:
            assert ending.code == 75
            stopped += 1
    assert stopped == 5
    equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert checkpoint.load(tmp_path / "cut" / "last.pt")["parts"]["scaler"]["scale"] > 8
    assert {"best_epoch", "train/test/video_auc"} <= summary(tmp_path / "cut").keys()


def a_run(*argv):
    """What a step needs, without data or a directory."""
    args, _ = train_tsm.parse_args([*NET, "--dropout", "0", *argv])
    world = dist.Dist(0, 1, 0, torch.device("cpu"))
    model_spec = {name: getattr(args, name) for name in train_tsm.MODEL_FLAGS} | {"image_size": 32}
    quiet = log.Log(None, main=False)
    model_spec |= {"pixels": [list(IMAGENET_MEAN), list(IMAGENET_STD)], "pos_weight": 0.2}
    return Run(args, world, None, {}, Path(), quiet, model_spec)


@pytest.mark.parametrize("shift", ["residual", "expand"])
@pytest.mark.parametrize("frozen", ["1", "0"])
def test_accumulation_equals_the_large_batch_where_batchnorm_is_frozen(shift, frozen, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch = Batch(pixels, np.arange(8), torch.tensor([0, 1, 1, 1, 1, 0, 1, 1]), None)
    frames_of, gradients = train_tsm.frames_of, []
    monkeypatch.setattr(train_tsm, "frames_of", lambda *given: frames_of(*given).double())
    for accum in ("1", "4"):
        run = a_run("--shift", shift, "--freeze-bn", frozen, "--accum", accum)
        model = train_tsm.build_model(run).double().train()
        with torch.no_grad():  # from zero a whole clip would weigh its frames alike
            model.head.attention.weight.normal_(generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = train_tsm.amp.scaler("fp32", run.world.device)
        step = train_tsm.train_step(run, model, optimizer, scaler, batch)
        assert not step.bad
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        gradients.append(trained | step.terms)
    gaps = {
        name: float((gradients[1][name] - value).abs().max() / value.abs().max().clamp_min(1e-12))
        for name, value in gradients[0].items()
    }
    # The criterion sees float32 logits: a script's losses are taken in single precision.
    assert (max(gaps.values()) < 1e-5) == (frozen == "1"), max(gaps, key=gaps.get)


def test_two_processes_train_the_same_model_as_one(ffpp, tmp_path):
    # BatchNorm of chunks is that of other clips; over processes alone it is proven in test_dist.py.
    argv = flags(NET, "--data", ffpp, "--bs 8 --accum 2 --dropout 0 --freeze-bn 1")
    port = str(random.randrange(20000, 50000))
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    env |= {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [
        sys.executable,
        str(ROOT / "train_tsm.py"),
        *argv,
        "--max-steps",
        "1",
        "--out",
        str(tmp_path / "two"),
    ]
    both = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | {"RANK": rank},
        )
        for rank in "01"
    ]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    stopped_at([*argv, "--out", str(tmp_path / "one")], 1)
    one, two = (checkpoint.load(tmp_path / name / "last.pt")["parts"] for name in ("one", "two"))
    for k, state in one["optimizer"]["state"].items():  # a tenth of the gradient
        scale = state["exp_avg"].abs().max().item()
        assert (
            two["optimizer"]["state"][k]["exp_avg"] - state["exp_avg"]
        ).abs().max().item() <= 1e-4 * scale + 1e-9


def test_frozen_batchnorm_is_named_and_stays(ffpp, tmp_path, capsys):
    stopped_at(
        flags(NET, "--data", ffpp, "--bs 8 --freeze-bn 0.33 --out", tmp_path / "run"),
        2,
    )
    assert (
        "--freeze-bn 0.33: 15 BatchNorm layers, backbone.bn1 to backbone.blocks.2."
        in capsys.readouterr().out
    )
    model = checkpoint.load(tmp_path / "run" / "last.pt")["parts"]["model"]
    counts = [int(value) for name, value in model.items() if name.endswith("num_batches_tracked")]
    assert counts == [0] * 15 + [4] * 31  # two steps of two chunks
    with pytest.raises(SystemExit) as ending:
        train_tsm.main(
            flags(NET, "--data", ffpp, "--bs 8 --freeze-bn 0.01 --out", tmp_path / "none")
        )
    assert ending.value.code == 2 and "freezes no BatchNorm layer" in capsys.readouterr().err
    assert torch.equal(model["backbone.bn1.running_mean"], torch.zeros(32))


LIVE = {
    "no shift": ["--shift", "none"],
    "shift before the expansion": ["--shift", "expand"],
    "fold": ["--fold-div", "8"],
    "past": ["--direction", "past"],
    "padding": ["--padding", "circulant"],
    "mean": ["--aggregate", "mean"],
    "dropout": ["--dropout", "0"],
    "spatial dropout": ["--dropout2d"],
    "frozen": ["--freeze-bn", "0.5"],
    "plain loss": ["--loss", "bce"],
    "gamma": ["--gamma", "1"],
    "alpha": ["--alpha", "0.3"],
    "weight": ["--pos-weight", "auto"],
    "weight by hand": ["--pos-weight", "0.7"],
    "sampler": ["--sampler", "balanced"],
    "no augmentation": ["--augment", "none"],
    "more clips": ["--train-clips", "2"],
    "time": ["--clip-seconds", "0.01"],
    "floor": ["--min-lr", "2e-4"],
    "chunks": ["--accum", "4"],
}


def test_every_flag_of_training_changes_the_run(ffpp, tmp_path):
    argv = [*NET, "--data", str(ffpp), "--bs", "8", "--epochs", "2", "--fps", "4"]
    digests = {}
    for name, extra in {"none": [], **LIVE}.items():
        out = tmp_path / name.replace(" ", "_")
        stopped_at([*argv, *extra, "--out", str(out)], 2)
        digests[name] = checkpoint.weights_digest(
            checkpoint.load(out / "last.pt")["parts"]["model"]
        )
    assert len(set(digests.values())) == len(digests), digests
    assert (
        json.loads((tmp_path / "weight" / "config.json").read_text())["resolved"]["pos_weight"]
        == 0.5
    )


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    return ordered_clips(tmp_path_factory.mktemp("ordered") / "clips")


@pytest.mark.parametrize("shift", ["residual", "expand", "none"])
def test_only_the_shift_learns_the_order_of_frames(ordered, tmp_path, shift):
    argv = flags(NET, "--data", ordered / "videos.csv", "--bs 16 --accum 1 --lr 3e-3 --fps 2")
    argv += flags("--epochs 16 --eval-every 4 --clips 1 --augment none --dropout 0")
    assert train_tsm.main([*argv, "--shift", shift, "--out", str(tmp_path)]) == 0
    auc = summary(tmp_path)["train/test/video_auc"]
    assert auc <= 0.55 if shift == "none" else auc >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("shift", ["residual", "none"])
def test_the_demo_needs_the_shift(tmp_path, shift):
    assert train_tsm.main(flags("--demo --device cpu --shift", shift, "--out", tmp_path)) == 0
    auc = summary(tmp_path)["train/test/video_auc"]
    assert auc <= 0.55 if shift == "none" else auc >= 0.99


@pytest.mark.parametrize("shift", ["residual", "expand"])
def test_a_stream_gives_the_scores_of_the_offline_path(ordered, tmp_path, shift, capsys):
    argv = flags(
        NET, "--data", ordered / "videos.csv", "--bs 16 --epochs 1 --shift", shift, "--lr 3e-3"
    )
    run = str(tmp_path / "run")
    assert train_tsm.main([*argv, "--direction", "past", "--out", run]) == 0
    use = ["--resume", run, "--device", "cpu", "--out", str(tmp_path)]
    assert train_tsm.main([*use, "--predict", str(ordered / "test03")]) == 0
    (row,) = csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines())
    assert train_tsm.main([*use, "--stream", str(ordered / "test03")]) == 0
    frames = list(csv.DictReader((tmp_path / "stream.csv").read_text().splitlines()))
    assert [frame["frame"] for frame in frames] == ["0", "1", "2", "3"]
    assert float(frames[-1]["score_fake"]) == pytest.approx(float(row["score_fake"]), abs=1e-5)
    assert len({frame["score_fake"] for frame in frames}) > 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        train_tsm.main([*use, "--stream", str(ordered)])
    assert ending.value.code == 2 and "expected one sequence" in capsys.readouterr().err


def test_a_stream_of_a_model_that_reads_later_frames_is_refused(whole, ordered, tmp_path, capsys):
    with pytest.raises(SystemExit) as ending:
        train_tsm.main(flags("--stream", ordered / "test03", "--resume", whole, "--out", tmp_path))
    assert ending.value.code == 2 and "--direction past" in capsys.readouterr().err


SERIES = {  # flags -> validations until 3 of them in a row brought nothing
    "any gain counts": (["--min-delta", "0"], [0.80, 0.79, 0.801, 0.802, 0.80, 0.79, 0.78], 7, 4),
    "small gains do not": (["--min-delta", "0.01"], [0.80, 0.801, 0.805, 0.809], 4, 4),
    "but add up": (["--min-delta", "0.01"], [0.80, 0.805, 0.811, 0.812, 0.813, 0.81], 6, 5),
    "the interval decides": (
        ["--stop-on-interval"],
        [0.80, 0.82, 0.84, 0.87, 0.88, 0.88, 0.88],
        7,
        5,
    ),
}


@pytest.mark.parametrize("case", SERIES)
def test_training_stops_early_and_keeps_the_best(ffpp, tmp_path, monkeypatch, case):
    extra, series, validations, best = SERIES[case]
    given, original = iter(series), train_tsm.score

    def scripted(run, prefix, *rest):
        values = original(run, prefix, *rest)
        if prefix == "train/val":
            auc = next(given)
            values |= {"train/val/video_auc": auc, "train/val/video_auc_low": auc - 0.05}
        return values

    monkeypatch.setattr(train_tsm, "score", scripted)
    argv = flags(NET, "--data", ffpp, "--bs 24 --accum 1 --epochs 30 --eval-every 2")
    assert train_tsm.main(flags(argv, "--patience 3 --clips 1", extra, "--out", tmp_path)) == 0
    assert next(given, None) is None
    assert checkpoint.load(tmp_path / "last.pt")["place"]["epoch"] == 2 * validations
    assert summary(tmp_path)["best_epoch"] == 2 * best


def test_published_weights_are_loaded_strictly(ffpp, tmp_path, capsys):
    torch.manual_seed(9)
    published = build_mobilenet_v4("conv_small_035", num_classes=1000).state_dict()
    torch.save(published, tmp_path / "weights.pt")
    argv = [*NET, "--data", str(ffpp), "--bs", "8", "--lr", "0", "--min-lr", "0", "--weights"]
    stopped_at(flags(argv, tmp_path / "weights.pt", "--freeze-bn 1 --out", tmp_path / "run"), 1)
    model = checkpoint.load(tmp_path / "run" / "last.pt")["parts"]["model"]
    for name, value in published.items():
        if not name.startswith("classifier."):
            assert torch.equal(model[f"backbone.{name}"], value), name
    del published["blocks.0.0.conv.weight"]
    torch.save(published, tmp_path / "less.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        train_tsm.main([*argv, str(tmp_path / "less.pt"), "--out", str(tmp_path / "other")])
    error = capsys.readouterr().err
    assert ending.value.code == 2 and "1 keys missing" in error and error.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_a_run_gives_its_backbone_to_another(whole, ffpp, tmp_path):
    argv = flags(NET, "--data", ffpp, "--bs 8 --lr 0 --min-lr 0 --freeze-bn 1")
    stopped_at([*argv, "--weights", str(whole / "best.pt"), "--out", str(tmp_path / "run")], 1)
    model, first = (
        checkpoint.load(tmp_path / "run" / "last.pt")["parts"]["model"],
        checkpoint.load(whole / "best.pt"),
    )
    same(
        *(
            {n: t for n, t in state.items() if n.startswith("backbone.")}
            for state in (model, first["model"])
        ),
        "",
    )
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert resolved["pixels"] == first["model_spec"]["pixels"]


BAD = {
    "missing folder": (["--data", "{tmp}/absent"], "no such file or folder"),
    "unknown layout": (["--data", "{pictures}"], "no known layout"),
    "a listed video that is missing": (["--data", "{missing}"], "016_017"),
    "one class": (["--data", "{one}/videos.csv"], "both are needed"),
    "persons in two splits": (["--data", "{leak}"], "in two splits"),
    "batch larger than the data": (["--bs", "64"], "larger than the 24 training items"),
    "batch not divisible by chunks": (["--bs", "10", "--accum", "4"], "not divisible by 4"),
    "too few real videos for a balanced batch": (
        ["--bs", "20", "--sampler", "balanced"],
        "which has 8",
    ),
    "too small an image": (["--image-size", "31"], "the smallest that MobileNetV4 takes is 32"),
    "unknown backbone": (["--backbone", "conv_smal"], "did you mean conv_small?"),
    "a fold that moves too much": (["--bs", "8", "--fold-div", "1"], "fold_div=1"),
    "a fold that moves nothing": (["--fold-div", "33"], "received 33, allowed >= 1 <= 32"),
    "two corrections": (
        ["--sampler", "balanced", "--pos-weight", "auto"],
        "correct one imbalance twice",
    ),
    "three corrections": (
        ["--sampler", "balanced", "--pos-weight", "2", "--alpha", "0.2"],
        "--alpha and --pos-weight",
    ),
    "double balance of nothing": (
        ["--allow-double-balance"],
        "--allow-double-balance has no effect",
    ),
    "no number": (["--pos-weight", "much"], "'much' is not a number"),
    "a fold without a shift": (
        ["--shift", "none", "--fold-div", "8"],
        "no effect with --shift none",
    ),
    "gamma of plain loss": (["--loss", "bce", "--gamma", "1"], "no effect with --loss bce"),
    "a gain beside the interval": (
        ["--stop-on-interval", "--min-delta", "0.1"],
        "--min-delta has no effect",
    ),
    "channels without dropout": (["--dropout", "0", "--dropout2d"], "--dropout2d has no effect"),
    "a floor above the peak": (
        ["--lr", "1e-5"],
        "--min-lr 3e-05 is more than the learning rate 1e-05",
    ),
    "a compression that is not there": (["--compression", "c40"], "c40"),
    "another script's backbone": (["--weights", "{simclr}"], "is of train_simclr.py"),
    "weights that are missing": (["--weights", "{tmp}/w.pt"], "there is no such file"),
    "use without a run": (["--stream", "{tmp}"], "add --resume RUN"),
    "two uses": (["--stream", "{tmp}", "--predict", "{tmp}"], "exclude each other"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, ffpp, tmp_path, capsys):
    argv, said = BAD[case]
    places = {name: tmp_path / name for name in ("pictures", "missing", "one", "leak", "simclr")}
    wanted = " ".join(argv)
    if "{pictures}" in wanted:
        write_clip(places["pictures"] / "some", np.random.default_rng(0), 0)
    if "{missing}" in wanted or "{leak}" in wanted:
        root = places["missing" if "{missing}" in wanted else "leak"]
        (root / "splits").mkdir(parents=True)
        for name in ("original_sequences", "manipulated_sequences"):
            (root / name).symlink_to(ffpp / name)
        for split in ("train", "val", "test"):
            pairs = json.loads((ffpp / "splits" / f"{split}.json").read_text())
            extra = (
                {"missing": [["016", "017"]], "leak": [["000", "001"]]}[root.name]
                if split == "test"
                else []
            )
            (root / "splits" / f"{split}.json").write_text(json.dumps(pairs + extra))
    if "{one}" in wanted:
        clip_folders(
            places["one"],
            [(f"v{k}", "real", split, [9, 8]) for k, split in enumerate(("train", "val", "test"))],
        )
    if "{simclr}" in wanted:
        torch.save(
            {
                "model": {"backbone.conv1.weight": torch.zeros(1)},
                "format": 2,
                "model_spec": {"script": "simclr"},
            },
            places["simclr"],
        )
    argv = [a.format(tmp=tmp_path / "nothing_here", **places) for a in argv]
    base = [*NET, "--data", str(ffpp)] if not {"--stream", "--predict"} & set(argv) else []
    with pytest.raises(SystemExit) as ending:
        train_tsm.main([*base, "--out", str(tmp_path / "out"), *argv])
    error = capsys.readouterr().err
    assert ending.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "out").exists()


def test_a_damaged_frame_ends_the_run_by_name(tmp_path, capsys):
    root = ffpp_tree(tmp_path / "ffpp", pairs=(1, 1, 1), count=2)
    file = root / "manipulated_sequences/FaceSwap/c23/frames/001_000/0001.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(SystemExit) as ending:
        train_tsm.main(flags(NET, "--data", root, "--bs 6 --epochs 1 --out", tmp_path / "out"))
    error = capsys.readouterr().err
    assert (
        ending.value.code == 2
        and "FaceSwap/c23/frames/001_000/0001.png" in error
        and error.count("\n") == 1
    )


def test_videos_shorter_than_a_clip_repeat_their_last_frame_and_it_is_said(tmp_path, capsys):
    root = ffpp_tree(tmp_path / "ffpp", pairs=(1, 1, 1), count=2)
    stopped_at([*NET, "--data", str(root), "--bs", "6", "--out", str(tmp_path / "out")], 1)
    out = capsys.readouterr().out
    assert (
        out.count("have fewer than 4 frames and repeat the last") == 1 and "18 of 18 videos" in out
    )


def test_importing_the_script_does_no_work():
    code = "import sys; import train_tsm; import torch; assert not torch.cuda.is_initialized()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
