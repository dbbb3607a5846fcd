"""train_tsm.py as its users run it: whole runs on a miniature FaceForensics++, streams, imbalance,
early stopping, bad input.
"""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train_tsm
from common.data.__main__ import main as pack
from common.models.mobilenet_v4 import build_mobilenet_v4
from common.report import __main__ as report
from common.run import checkpoint, log
from tests.data import clip_folders, ffpp_tree, image_folder, ordered_clips, write_clip
from tests.runs import flags, next_after, refused, same, start_ranks, succeed, summary

pytestmark = pytest.mark.e2e

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


def test_a_run_leaves_what_the_readme_promises(whole, ffpp, tmp_path, capsys):
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
    assert "over 2 groups of videos, each of those that share persons" in page  # of two pairs
    watched = json.loads((whole / "figures" / "watched.json").read_text())["rows"]
    assert [row["title"][:4] for row in watched] == ["real"] * 3 + ["fake"] * 3
    assert all(sum(card["share"] for card in row["cards"]) == pytest.approx(1) for row in watched)
    looked = json.loads((whole / "figures" / "looked.json").read_text())["rows"]
    titles = [row["title"].partition(":")[0] for row in looked]
    assert titles == sorted(titles) and "right" in titles and "the map is one cell" in page
    capsys.readouterr()
    assert train_tsm.main([*SMALL, "--data", str(ffpp), "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "already finished; --resume none starts anew" in printed
    given = {"PATH": str(ffpp)}
    following = [given.get(w, w) for w in next_after(printed, whole, train_tsm.CARD)]
    assert train_tsm.main(flags(following, "--device cpu --out", tmp_path)) == 0
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) > 1


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
        found = json.loads((tmp_path / "eval" / "ffpp" / "eval.json").read_text())
        assert found["data"]["real"] == 4 and found["data"]["fake"] == 8
        assert found["checkpoint"]["source"] == str(source) and found["flags"]["fps"] == 25
        assert found["data"]["methods"] == ["Deepfakes", "FaceSwap", "youtube"]
        assert 0 <= found.pop("eval/test/frame_auc") <= 1
        found = {name: value for name, value in found.items() if "/" in name}
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
    found = json.loads((tmp_path / "eval" / "ffpp" / "eval.json").read_text())
    assert found["eval/test/video_auc"] == pytest.approx(
        summary(whole)["train/test/video_auc"], abs=0.05
    )


def test_two_processes_train_the_same_model_as_one(ffpp, tmp_path):
    # BatchNorm of chunks is that of other clips; over processes alone it is proven in test_dist.py.
    weights = build_mobilenet_v4("conv_small_035").state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    argv = flags(NET, "--data", ffpp, "--bs 8 --accum 2 --dropout 0 --freeze-bn 1 --clip-grad 0.01")
    argv += ["--weights", str(tmp_path / "weights.pt")]
    two = flags(argv, "--max-steps 1 --out", tmp_path / "two")
    succeed(*start_ranks(train_tsm, [two, two]))
    stopped_at([*argv, "--out", str(tmp_path / "one")], 1)
    one, two = (checkpoint.load(tmp_path / name / "last.pt")["parts"] for name in ("one", "two"))
    for k, state in one["optimizer"]["state"].items():  # a tenth of the gradient
        scale = state["exp_avg"].abs().max().item()
        assert (
            two["optimizer"]["state"][k]["exp_avg"] - state["exp_avg"]
        ).abs().max().item() <= 1e-4 * scale + 1e-9


def test_frozen_batchnorm_is_named_and_stays(ffpp, tmp_path, capsys):
    torch.save(build_mobilenet_v4("conv_small_035").state_dict(), tmp_path / "weights.pt")
    argv = flags(NET, "--data", ffpp, "--bs 8 --weights", tmp_path / "weights.pt")
    stopped_at(flags(argv, "--out", tmp_path / "run"), 2)  # as the recipe has it
    assert (
        "--freeze-bn 0.33: 15 BatchNorm layers, backbone.bn1 to backbone.blocks.2."
        in capsys.readouterr().out
    )
    model = checkpoint.load(tmp_path / "run" / "last.pt")["parts"]["model"]
    counts = [int(value) for name, value in model.items() if name.endswith("num_batches_tracked")]
    assert counts == [0] * 15 + [4] * 31  # two steps of two chunks
    refused(
        train_tsm.main,
        flags(argv, "--freeze-bn 0.01 --out", tmp_path / "none"),
        capsys,
        "--freeze-bn 0.01",
    )
    refused(
        train_tsm.main,
        flags(NET, "--data", ffpp, "--bs 8 --freeze-bn 0.33"),
        capsys,
        "--freeze-bn has no effect without --weights",
    )
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
    use = ["--resume", run, "--device", "cpu", "--out", str(tmp_path), "--fps", "2"]
    assert train_tsm.main([*use, "--predict", str(ordered / "test03")]) == 0
    (row,) = csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines())
    assert train_tsm.main([*use, "--stream", str(ordered / "test03")]) == 0
    frames = list(csv.DictReader((tmp_path / "stream.csv").read_text().splitlines()))
    assert [frame["frame"] for frame in frames] == ["0", "1", "2", "3"]
    assert float(frames[-1]["score_fake"]) == pytest.approx(float(row["score_fake"]), abs=1e-5)
    assert len({frame["score_fake"] for frame in frames}) > 1
    assert "the classifier of train (" in capsys.readouterr().out
    both = flags("--predict", ordered / "test04", ordered / "test03")
    assert train_tsm.main([*use, *both]) == 0
    rows = csv.DictReader((tmp_path / "predictions-2.csv").read_text().splitlines())
    assert {r["id"]: r["score_fake"] for r in rows}[str(ordered / "test03")] == row["score_fake"]
    first = (tmp_path / "stream.csv").read_bytes()
    assert train_tsm.main([*use, "--stream", str(ordered / "test04")]) == 0
    assert (tmp_path / "stream.csv").read_bytes() == first
    assert (tmp_path / "stream-2.csv").read_bytes() != first
    capsys.readouterr()
    refused(train_tsm.main, [*use, "--stream", str(ordered)], capsys, ordered)


def test_a_stream_of_a_model_that_reads_later_frames_is_refused(whole, ordered, tmp_path, capsys):
    refused(
        train_tsm.main,
        flags("--stream", ordered / "test03", "--resume", whole, "--out", tmp_path),
        capsys,
        "--direction past",
    )


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
    assert ending.value.code == 2 and "1 key missing" in error and error.count("\n") == 1
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


BAD = {  # flags -> the flag, file or value that the refusal names
    "missing folder": ("--data {tmp}/absent", "absent"),
    "unknown layout": ("--data {pictures}", "pictures"),
    "a listed video that is missing": ("--data {missing}", "016_017"),
    "one class": ("--data {one}/videos.csv", "0 fake videos"),
    "persons in two splits": ("--data {leak}", "leak"),
    "batch larger than the data": ("--bs 64", "--bs"),
    "batch not divisible by chunks": ("--bs 10 --accum 4", "--bs"),
    "too few real videos for a balanced batch": ("--bs 20 --sampler balanced", "class 0"),
    "too small an image": ("--image-size 31", "--image-size 31"),
    "unknown backbone": ("--backbone conv_smal", "conv_small"),
    "a fold that moves too much": ("--bs 8 --fold-div 1", "fold_div=1"),
    "a fold that moves nothing": ("--fold-div 33", "--fold-div"),
    "two corrections": ("--sampler balanced --pos-weight auto", "--pos-weight"),
    "three corrections": ("--sampler balanced --pos-weight 2 --alpha 0.2", "--alpha"),
    "double balance of nothing": ("--allow-double-balance", "--allow-double-balance"),
    "no number": ("--pos-weight much", "much"),
    "a fold without a shift": ("--shift none --fold-div 8", "--fold-div"),
    "gamma of plain loss": ("--loss bce --gamma 1", "--gamma"),
    "a gain beside the interval": ("--stop-on-interval --min-delta 0.1", "--min-delta"),
    "channels without dropout": ("--dropout 0 --dropout2d", "--dropout2d"),
    "a floor above the peak": ("--lr 1e-5", "--min-lr 3e-05"),
    "a compression that is not there": ("--compression c40", "c40"),
    "another script's backbone": ("--weights {simclr}", "train_simclr.py"),
    "weights by name": ("--weights imagenet", "conv_small_035 has none"),
    "weights that are missing": ("--weights {tmp}/w.pt", "w.pt"),
    "use without a run": ("--stream {tmp}", "--resume RUN"),
    "two uses": ("--stream {tmp} --predict {tmp}", "--predict"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, ffpp, tmp_path, capsys):
    wanted, named = BAD[case]
    places = {name: tmp_path / name for name in ("pictures", "missing", "one", "leak", "simclr")}
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
    argv = flags(wanted.format(tmp=tmp_path / "nothing_here", **places))
    base = [] if {"--stream", "--predict"} & set(argv) else flags(NET, "--data", ffpp)
    refused(train_tsm.main, flags(base, "--out", tmp_path / "out", argv), capsys, named)
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


def test_a_report_says_on_top_that_persons_may_be_shared(tmp_path):
    root = ffpp_tree(tmp_path / "ffpp", pairs=(1, 1, 1), count=2)
    argv = [*NET, "--data", str(root), "--bs", "6", "--out", str(tmp_path / "out")]
    stopped_at([*argv, "--allow-shared-persons"], 1)
    head, _, _ = (tmp_path / "out" / "report.html").read_text().partition("<table")
    assert "persons of the test split may have been trained on" in head


def test_other_data_are_scored_whole_each_in_its_folder_and_in_one_table(
    whole, ffpp, tmp_path, capsys
):
    rng = np.random.default_rng(1)
    for name, kinds in (("celeb", ("real", "fake")), ("lab", ("fake",))):
        for kind in kinds:
            for i in range(6):
                write_clip(tmp_path / name / kind / f"v{i}", rng, 0)
    # Some of the run's own videos, by which names are not told.
    for kind, video in (
        ("real", "youtube/c23/frames/001"),
        ("fake", "FaceSwap/c23/frames/000_001"),
    ):
        (source,) = ffpp.glob(f"*/{video}")
        shutil.copytree(source, tmp_path / "own" / kind / "own")
        write_clip(tmp_path / "own" / kind / "new", rng, 0)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    others = [tmp_path / name for name in ("celeb", "lab", "own")]
    argv = flags("--eval", run, "--device cpu --data", *others, ffpp)
    refused(train_tsm.main, [*argv, str(tmp_path / "typo")], capsys, "typo: no such file")
    assert not (run / "eval").exists()
    assert train_tsm.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("WARN") == 1
    for text in (
        f"WARN 2 of 4 videos are in the data of {run}, too, and may have been learned: fake/own, ",
        "scoring 12 of 12 videos (no test split)",
        "scoring 6 of 6 videos (no test split)",
        "scoring 12 of 48 videos (split test)",
    ):
        assert text in out
    assert re.search(r"^data +real +fake +video_auc .*\nceleb +6 +6 +\d", out, re.M)
    found = {n: json.loads((run / "eval" / n / "eval.json").read_text()) for n in ("celeb", "lab")}
    with open(run / "eval" / "celeb" / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    real, fake = ([float(r["fake"]) for r in rows if r["label"] == k] for k in ("real", "fake"))
    wins = [(f > r) + 0.5 * (f == r) for f in fake for r in real]
    assert found["celeb"]["eval/test/video_auc"] == pytest.approx(np.mean(wins))
    assert "eval/test/video_auc" not in found["lab"]
    assert 0 <= found["lab"]["eval/test/video_detection_rate"] <= 1
    with open(run / "eval" / "table.csv") as file:
        table = {row["data"]: row for row in csv.DictReader(file)}
    assert list(table) == ["celeb", "ffpp", "lab", "own"] and table["lab"]["video_auc"] == ""
    assert float(table["celeb"]["video_auc"]) == found["celeb"]["eval/test/video_auc"]
    swap = [float(table["ffpp"][f"video_auc_FaceSwap{end}"]) for end in ("_low", "", "_high")]
    assert swap == sorted(swap) and table["celeb"]["video_auc_FaceSwap_low"] == ""
    assert "Evaluations on other data" in (run / "report.html").read_text()
    argv = [str(run), str(whole), "--text"]
    capsys.readouterr()
    assert report.main(argv) == 0
    assert "eval_celeb/test/video_auc" in capsys.readouterr().out
    argv = flags("--eval", run, "--device cpu --split val --perturb jpeg --data", ffpp)
    assert train_tsm.main(argv) == 0
    with open(run / "eval" / "ffpp" / "perturb.csv") as file:
        levels = [row["level"] for row in csv.DictReader(file)]
    assert levels == ["", "90", "70", "50", "30", "10"]
    held = json.loads((run / "eval" / "ffpp" / "eval.json").read_text())["flags"]
    assert (held["split"], held["clips"], held["store_size"]) == ("val", 2, None)
    assert "(split val)" in capsys.readouterr().out
    # Videos of one class have no AUC, but a share that is found.
    argv = flags("--eval", run, "--device cpu --perturb resize --data", tmp_path / "lab")
    assert train_tsm.main(argv) == 0
    with open(run / "eval" / "lab" / "perturb.csv") as file:
        shares = [float(row["video_detection_rate"]) for row in csv.DictReader(file)]
    assert len(shares) == 6 and shares[0] == found["lab"]["eval/test/video_detection_rate"]
    out = capsys.readouterr().out
    assert re.search(r"^video detection rate +0 +1 .*\nresize +[01]\.\d{4} ", out, re.M)


def test_flags_that_the_data_do_not_heed_are_refused_in_use_too(whole, tmp_path, capsys):
    names = [f"{video}/{k}.png" for video in ("real/a", "fake/b") for k in range(4)]
    root, packed = image_folder(tmp_path / "set", names), tmp_path / "set.packed"
    assert pack(["pack", "--clips", str(root), str(packed)]) == 0
    evaluate = flags("--eval", whole, "--device cpu --out", tmp_path / "out")
    predict = flags("--resume", whole, "--device cpu --out", tmp_path / "out")
    for argv, flag, why in (
        (flags(evaluate, "--data", packed), "--fps 30", "on packed clips"),
        (flags(evaluate, "--data", root, packed), "--face first", "on packed clips"),
        (flags(evaluate, "--data", packed), f"--frames-root {root}", "on packed clips"),
        (flags(predict, "--predict", packed), "--fps 30", "on packed clips"),
        (flags(evaluate, "--data sample-flicker"), "--compression c23", "on the embedded clips"),
        (flags(NET, "--data sample"), "--fps 30", "on the embedded clips"),
    ):
        refused(train_tsm.main, flags(argv, flag), capsys, flag.split()[0], why)
    for argv in (flags(evaluate, "--data", packed), flags(predict, "--predict", packed)):
        assert train_tsm.main(argv) == 0  # what the run was trained with is no flag


def test_frames_elsewhere_are_found_again_in_evaluation(ffpp, tmp_path):
    """--frames-root of the run's own data is the run's."""
    listed = tmp_path / "lists" / "all.csv"
    listed.parent.mkdir()
    rows = ["video_id,label,path,split"]
    for part in ("train", "val", "test"):
        for a, b in json.loads((ffpp / "splits" / f"{part}.json").read_text()):
            real = f"original_sequences/youtube/c23/frames/{a}"
            fake = f"manipulated_sequences/Deepfakes/c23/frames/{a}_{b}"
            rows += [f"{a},real,{real},{part}", f"{a}_{b},fake,{fake},{part}"]
    listed.write_text("\n".join(rows) + "\n")
    argv = flags(NET, "--data", listed, "--frames-root", ffpp, "--bs 4 --epochs 2 --accum 1")
    assert train_tsm.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert train_tsm.main(flags("--eval", tmp_path / "run", "--device cpu")) == 0
    found = json.loads((tmp_path / "run" / "eval" / "all" / "eval.json").read_text())
    assert found["eval/test/video_auc"] == summary(tmp_path / "run")["train/test/video_auc"]


def test_several_data_sets_are_for_evaluation_alone(ffpp, tmp_path, capsys):
    argv = flags(NET, "--data", ffpp, tmp_path)
    refused(train_tsm.main, argv, capsys, "--data takes several values with --eval alone")
    refused(train_tsm.main, flags(NET, "--split all"), capsys, "--split has no effect without")
