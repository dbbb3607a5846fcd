"""train_raer.py as its users run it: whole runs, every method, use of a model, bad input."""

import csv
import hashlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch

import train_raer
from common import longtail
from common.data.synthetic import emotion_clips
from common.models import clip
from common.models import raer as models
from common.run import checkpoint, log
from common.weights import Published
from tests.data import RAER_CLASSES, raer_tree
from tests.runs import ended, flags, next_after, refused, summary

pytestmark = pytest.mark.e2e

NET = ["--backbone", "vit_tiny", "--device", "cpu", "--num-frames", "3", "--bs", "8"]
SMALL = flags(NET, "--epochs 4 --seed 3 --eval-every 2 --tune full --dropout 0.2")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return raer_tree(tmp_path_factory.mktemp("data") / "raer")


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """A finished run whose image tower trains too."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_raer.main([*SMALL, "--data", str(tree), "--out", str(folder)]) == 0
    return folder


def test_a_run_leaves_what_the_readme_promises(whole, tree, capsys):
    result = summary(whole)
    for name in ("uar", "war", "recall_calm", "recall_puzzled", "uar_low", "uar_high"):
        assert 0 <= result[f"train/test/{name}"] <= 1 and f"train/test/{name}_last_epoch" in result
    assert result["train/test/uar_low"] <= result["train/test/uar"] <= result["train/test/uar_high"]
    assert (
        result["train/test/majority_uar"]
        == pytest.approx(1 / 3)
        == result["train/test/majority_war"]
    )
    assert result["status"] == "finished" and result["best_model_path"] == str(whole / "best.pt")
    for name in ("config.json", "env.json", "report.html"):
        assert (whole / name).stat().st_size > 0
    with open(whole / "confusion.csv") as file:
        rows = list(csv.reader(file))
    counts = np.array([row[1:] for row in rows[1:]], int)
    assert [row[0] for row in rows] == ["true", *RAER_CLASSES] and counts.sum(1).tolist() == [
        3,
        3,
        3,
    ]
    assert (counts.diagonal() / 3).mean() == pytest.approx(result["train/test/uar"])
    epochs = [line for line in log.read(whole) if "train/train/loss" in line]
    table = longtail.SCHEDULES["three-stage"].scaled(4)
    assert [line["train/schedule/tau"] for line in epochs] == [
        table.at(epoch).tau for epoch in range(4)
    ]
    assert [line.get("train/schedule/cap") for line in epochs] == [
        table.at(epoch).cap for epoch in range(4)
    ]
    assert ["train/val/uar" in line for line in epochs] == [False, True, False, True]
    before = (whole / "log.jsonl").read_bytes()
    capsys.readouterr()
    assert (
        train_raer.main(flags(SMALL, "--data", tree, "--out", whole)) == 0
    )  # finished: nothing is repeated
    printed = capsys.readouterr().out
    assert "already finished" in printed and (whole / "log.jsonl").read_bytes() == before
    args, _ = train_raer.parse_args(next_after(printed, whole, train_raer.CARD))
    assert args.predict == ["PATH"] and args.resume == str(whole)


def stopped_after(argv, steps):
    with pytest.raises(SystemExit) as ending:
        train_raer.main([*argv, "--max-steps", str(steps)])
    assert ending.value.code == 0


def test_a_run_goes_on_for_longer_and_at_another_rate(tree, tmp_path):
    folder = tmp_path / "run"
    argv = [*NET, "--data", str(tree), "--cache-features"]
    assert train_raer.main([*argv, "--epochs", "1", "--out", str(folder)]) == 0
    assert train_raer.main([*argv, "--epochs", "2", "--resume", str(folder)]) == 0
    assert checkpoint.load(folder / "last.pt")["place"]["step"] == 8
    assert [line["epoch"] for line in log.read(folder) if "train/train/loss" in line] == [1, 2]
    stopped_after([*argv, "--epochs", "2", "--out", str(tmp_path / "other")], 2)
    before = checkpoint.load(tmp_path / "other" / "last.pt")["parts"]["model"]
    stopped_after(flags(argv, "--epochs 2 --out", tmp_path / "other", "--lr 0 --force-resume"), 5)
    after = checkpoint.load(tmp_path / "other" / "last.pt")["parts"]["model"]
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and all("norm_in" in name for name in moved)  # the running statistics alone


def test_features_of_other_crops_are_encoded_again(tree, tmp_path):
    features = []
    for margin in ("0", "0.5"):
        argv = flags(NET, "--data", tree, "--epochs 1 --cache-features --out", tmp_path / "run")
        stopped_after([*argv, "--face-margin", margin, "--resume", "none"], 1)
        with np.load(tmp_path / "run" / "features.npz") as stored:
            features.append(stored["features"].reshape(52, 2, -1))
    assert not np.allclose(features[0][:, 0], features[1][:, 0])
    np.testing.assert_allclose(features[0][:, 1], features[1][:, 1], rtol=1e-5)


def test_an_encoding_goes_on_where_it_stopped(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(train_raer, "EVAL_FRAMES", 24)  # 4 clips at once, of 52
    encode, encoded = models.RaerModel.encode, []

    def interrupted(self, frames):
        encoded.append(len(frames))
        if len(encoded) == 5:
            signal.raise_signal(signal.SIGTERM)
        return encode(self, frames)

    monkeypatch.setattr(models.RaerModel, "encode", interrupted)
    argv = flags(NET, "--data", tree, "--epochs 1 --cache-features --out")
    assert ended(train_raer.main, [*argv, str(tmp_path / "run")]) == 75
    assert not (tmp_path / "run" / "features.npz").exists() and sum(encoded) == 20
    stopped_after([*argv, str(tmp_path / "run")], 1)
    assert sum(encoded[5:]) in (52 - 20, 52 - 16)
    stopped_after([*argv, str(tmp_path / "whole")], 1)
    rows = [np.load(tmp_path / name / "features.npz")["features"] for name in ("run", "whole")]
    np.testing.assert_array_equal(*rows)
    # What is damaged, or of another crop, is made again.
    file, before = tmp_path / "run" / "features.npz", len(encoded)
    file.write_bytes(file.read_bytes()[:-200])
    stopped_after([*argv, str(tmp_path / "run")], 2)
    assert sum(encoded[before:]) == 52
    np.testing.assert_array_equal(np.load(file)["features"], rows[0])


def test_crt_draws_its_classifier_anew_once(tree, tmp_path, monkeypatch):
    drawn, reset = [], models.RaerModel.reset_classes

    def recorded(self, optimizer):
        before = self.classes.weight.detach().clone()
        reset(self, optimizer)
        momentum = {p: state["momentum_buffer"] for p, state in optimizer.state.items()}
        assert not momentum.pop(self.classes.weight).any() and all(
            buffer.any() for buffer in momentum.values()
        )
        drawn.append(not torch.equal(before, self.classes.weight))

    monkeypatch.setattr(models.RaerModel, "reset_classes", recorded)
    argv = [*NET, "--data", str(tree), "--epochs", "5", "--cache-features", "--method", "crt"]
    stopped_after([*argv, "--out", str(tmp_path / "run")], 13)
    assert drawn == [True]  # at step 12 of 20
    assert train_raer.main([*argv, "--out", str(tmp_path / "run")]) == 0 and drawn == [True]


def test_the_demo_caches_no_features_where_images_change():
    assert train_raer.parse_args(["--demo"])[0].cache_features
    for asked in ("--tune full", "--augment clip"):
        assert not train_raer.parse_args(["--demo", *asked.split()])[0].cache_features
        with pytest.raises(SystemExit):
            train_raer.parse_args(["--demo", "--cache-features", *asked.split()])


def test_the_demo_sets_both_methods_beside_the_majority_class(tmp_path, monkeypatch, capsys):
    drawn = emotion_clips()
    few = drawn._replace(**{name: part[::9] for name, part in drawn._asdict().items()})
    monkeypatch.setattr(train_raer.raer, "emotion_clips", lambda: few)
    encode, encoded = models.RaerModel.encode, []
    monkeypatch.setattr(
        models.RaerModel, "encode", lambda self, x: encoded.append(len(x)) or encode(self, x)
    )
    argv = flags("--demo --device cpu --epochs 1 --num-frames 1 --out", tmp_path / "demo")
    assert train_raer.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(encoded) == len(few.labels)  # once for both
    results = [summary(tmp_path / "demo" / method) for method in ("ce", "three-stage")]
    assert lines[-3].split() == ["majority", "class", "ce", "three-stage"]
    for line, name in zip(lines[-2:], ("uar", "war"), strict=True):
        figures = [results[0][f"train/test/majority_{name}"]]
        figures += [result[f"train/test/{name}"] for result in results]
        assert line.startswith(name.upper())
        assert [float(cell) for cell in line.split()[-3:]] == pytest.approx(figures, rel=1e-3)
    # A method that is asked for is one run.
    assert train_raer.main([*argv[:-1], str(tmp_path / "one"), "--method", "ce"]) == 0
    assert summary(tmp_path / "one") and "majority class  ce" not in capsys.readouterr().out


@pytest.mark.parametrize("method", list(longtail.SCHEDULES))
def test_every_method_trains_on_cached_features(tree, tmp_path, method):
    folder = tmp_path / method
    argv = flags(
        NET, "--data", tree, "--epochs 6 --cache-features --method", method, "--out", folder
    )
    # Cosines at CLIP's scale want smaller steps than the default on so few clips, inner products
    # do not.
    inner = method in models.WITHOUT_TEXT
    more = [] if inner else ["--lr", "5e-3"]
    more += [] if method == "linear-probe" else ["--dropout", "0"]
    assert train_raer.main([*argv, *more]) == 0
    result = summary(folder)
    assert result["train/test/uar"] > 0.5  # the classes differ in color
    tau = result["train/val/tau"]
    assert tau in {round(0.1 * i, 1) for i in range(11)} if method == "tau-norm" else tau == 1.0
    state = checkpoint.load(folder / "best.pt")
    assert (
        state["model_spec"]["counts"] == [22, 8, 4]
        and (state["model_spec"]["scale"] is None) == inner
    )
    capped = [
        line.get("train/schedule/cap") for line in log.read(folder) if "train/schedule/lr" in line
    ]
    assert (capped == [None] * 6) == (method != "three-stage")


def test_a_model_with_a_dead_part_ends_with_4_and_its_name(tree, tmp_path, monkeypatch, capsys):
    parts = models.RaerModel.parts
    monkeypatch.setattr(
        models.RaerModel,
        "parts",
        lambda self: parts(self) | {"temporal": parts(self)["temporal"][:1]},
    )
    with pytest.raises(SystemExit) as ending:
        train_raer.main(flags(NET, "--data", tree, "--epochs 1 --out", tmp_path / "run"))
    error = capsys.readouterr().err
    assert ending.value.code == 4 and error.startswith(
        "audit failed: epochs from 0: classes.weight is trainable and in 0"
    )
    assert error.count("\n") == 1


def test_the_face_alone_needs_no_bodies(tree, tmp_path, monkeypatch, capsys):
    alone = lists_of(tree, tmp_path / "alone", lambda _, *line: line)
    (alone / "body.json").unlink()
    argv = flags(NET, "--epochs 2 --data", alone, "--out", tmp_path / "run")
    refused(train_raer.main, argv, capsys, "--streams face", "body.json")
    argv += ["--streams", "face"]
    for more in (["--tune", "full"], ["--cache-features", "--out", str(tmp_path / "cached")]):
        assert train_raer.main([*argv, *more]) == 0
    assert "WARN figures" not in capsys.readouterr().out
    model = checkpoint.load(tmp_path / "run" / "best.pt")["model"]
    assert model["fusion.0.weight"].shape == (192, 192)
    assert not any("context" in name for name in model)
    # The bodies' boxes change nothing, and a model without bodies needs none.
    used = flags("--eval", tmp_path / "run", "--device cpu --out", tmp_path)
    for data in (alone, tree):
        assert train_raer.main([*used, "--data", str(data)]) == 0
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["eval/test/war"] == summary(tmp_path / "run")["train/test/war"]
    refused(train_raer.main, [*used, "--streams", "face"], capsys, "--streams")


def test_lists_elsewhere_are_those_of_the_run(tree, tmp_path, capsys):
    data = lists_of(tree, tmp_path / "data", lambda _, *line: line)
    for part in ("train", "test"):
        names = [line.rsplit(" ", 2) for line in (data / f"{part}.txt").read_text().splitlines()]
        lines = [f"/somewhere/{clip} {RAER_CLASSES[int(label) - 1]}\n" for clip, _, label in names]
        (tmp_path / f"{part}.csv").write_text("".join(lines))
        (data / f"{part}.txt").unlink()
    (data / "val.txt").unlink()
    argv = flags(NET, "--epochs 2 --cache-features --data", data, "--out", tmp_path / "run")
    given = [f"--train-list={tmp_path}/train.csv", f"--test-list={tmp_path}/test.csv"]
    assert train_raer.main([*argv, *given]) == 0
    for more in ([], flags("--data", data, "--test-list", tmp_path / "test.csv")):
        used = flags("--device cpu --eval", tmp_path / "run", "--out", tmp_path, more)
        assert train_raer.main(used) == 0
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["eval/test/uar"] == summary(tmp_path / "run")["train/test/uar"]
    refused(train_raer.main, [*argv, given[0]], capsys, "--test-list")
    refused(train_raer.main, [*NET, *given], capsys, "--train-list")


def test_loose_images_are_predicted_one_by_one(whole, tree, tmp_path, capsys):
    folder = tree / "test" / "clip 2-0"
    argv = flags("--resume", whole, "--device cpu --missing-box full --out", tmp_path)
    assert train_raer.main([*argv, "--predict", str(folder)]) == 0
    assert train_raer.main([*argv, "--predict", str(folder), "--as-clip"]) == 0
    assert train_raer.main([*argv, "--predict", str(folder / "000.png")]) == 0
    names = []
    for name in ("predictions.csv", "predictions-2.csv", "predictions-3.csv"):
        with open(tmp_path / name) as file:
            names.append([row["id"] for row in csv.DictReader(file)])
    assert names == [["000.png", "001.png", "002.png", "003.png"], ["clip 2-0"], ["000"]]
    refused(train_raer.main, flags(NET, "--data", tree, "--as-clip"), capsys, "--as-clip")
    argv = flags("--eval", whole, "--data", tree, "--as-clip")
    refused(train_raer.main, argv, capsys, "--as-clip")


def test_eval_and_predict_repeat_what_the_run_found(whole, tree, tmp_path, capsys):
    assert (
        train_raer.main(flags("--data", tree, "--eval", whole, "--out", tmp_path, "--device cpu"))
        == 0
    )
    found = json.loads((tmp_path / "eval.json").read_text())
    result = summary(whole)
    assert (
        found["eval/test/uar"] == result["train/test/uar"]
        and found["eval/test/war_low"] == result["train/test/war_low"]
    )
    argv = flags(
        "--predict", tree / "test", "--resume", whole, "--out", tmp_path, "--missing-box full"
    )
    assert train_raer.main([*argv, "--device", "cpu"]) == 0
    with open(tmp_path / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert "the classifier of train (" in capsys.readouterr().out
    argv = flags("--predict", tree / "val", tree / "test", argv[2:], "--device cpu")
    assert train_raer.main(argv) == 0
    with open(tmp_path / "predictions-2.csv") as file:
        more = {row["id"]: row for row in csv.DictReader(file)}
    for row in rows:
        # Another batch rounds otherwise.
        same = more[f"{tree}/test/{row['id']}"]
        assert same["class"] == row["class"]
        scores = [[float(of[f"score_{name}"]) for name in RAER_CLASSES] for of in (same, row)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert len(rows) == 9 and set(rows[0]) == {
        "id",
        "class",
        *(f"score_{name}" for name in RAER_CLASSES),
    }
    assert all(
        sum(float(row[f"score_{n}"]) for n in RAER_CLASSES) == pytest.approx(1, abs=1e-5)
        for row in rows
    )


@pytest.mark.parametrize("tune", ["none", "full"])
def test_a_run_from_clips_weights_learns_prompts_and_is_used_without_them(
    tree, tmp_path, monkeypatch, capsys, tune
):
    """A CLIP of the published layout, small and random: both towers, MI loss, smoothing by texts,
    --eval, --predict.
    """
    small = clip.Variant(16, 2, 2, 8, 24, text_width=16, text_layers=2, text_heads=2)
    monkeypatch.setitem(clip.VARIANTS, "vit_b_32", small)
    torch.manual_seed(0)
    state = clip.build_clip("vit_b_32", 16).state_dict()
    weights, vocab, folder = tmp_path / "clip.pt", tmp_path / "merges.txt", tmp_path / "run"
    torch.save({name.removeprefix("text."): tensor for name, tensor in state.items()}, weights)
    vocab.write_text("#version\na c\nf a\nc e</w>\n")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setitem(clip.OPENAI, "vit_b_32", Published(weights.as_uri(), sha256))
    given = "openai" if tune == "none" else weights
    argv = flags("--backbone vit_b_32 --weights", given, "--clip-vocab", vocab, "--image-size 16")
    argv += flags("--activation quick_gelu --device cpu --num-frames 3 --bs 8 --epochs 6")
    argv += ["--data", str(tree), "--out", str(folder), "--tune", tune]
    if tune == "full":
        argv += ["--checkpoint-blocks", "--accum", "2", "--precision", "bf16"]
    assert train_raer.main(argv) == 0
    out = capsys.readouterr().out
    assert (
        "texts with 8 learnable tokens; cosines times 14.29" in out
        and "no pretrained text" not in out
    )
    lines = [line for line in log.read(folder) if "train/train/ce" in line]
    assert [line.get("train/train/mi", 0.0) > 0 for line in lines] == [False] * 2 + [True] * 4
    best = checkpoint.load(folder / "best.pt")
    moved = {name for name, tensor in best["model"].items() if name.startswith("image.")}
    moved = {
        name for name in moved if not torch.equal(best["model"][name], state["visual" + name[5:]])
    }
    assert bool(moved) == (tune == "full")
    again = flags("--weights", folder, "--clip-vocab", vocab, "--backbone vit_b_32 --bs 8")
    again += flags("--data", tree, "--out", tmp_path / "again", "--num-frames 3 --device cpu")
    stopped_after([*again, "--num-context", "8" if tune == "none" else "4"], 1)
    out = capsys.readouterr().out
    parts = {"none": "fusion, prompts.context\n", "full": "fusion; begins anew: prompts.context\n"}
    assert f"taken over: temporal, {parts[tune]}" in out
    # CLIP's own answer stands beside the result, and is the one of the towers as they came.
    untrained = tmp_path / "untrained"
    bare = argv[: argv.index("--epochs")] + ["--data", str(tree), "--out", str(untrained)]
    assert train_raer.main([*bare, "--zero-shot"]) == 0
    following = next_after(capsys.readouterr().out, untrained, train_raer.CARD)
    taken = train_raer.parse_args(flags(following, "--zero-shot"))[0]
    asked = train_raer.parse_args([*bare, "--zero-shot"])[0]
    for name in ("data", "weights", "activation", "image_size", "clip_vocab", "num_frames"):
        assert getattr(taken, name) == getattr(asked, name), name
    result, own = summary(folder), summary(untrained)
    for name in ("uar", "war"):
        several = f"train/test/zero_shot_templates_{name}"
        assert result[f"train/test/zero_shot_{name}"] == own[f"train/test/{name}"]
        assert result[several] == own[several]
    assert (untrained / "confusion.csv").exists() and not (untrained / "best.pt").exists()
    assert "CLIP untrained, several texts" in (folder / "report.html").read_text()
    refused(train_raer.main, [*bare, "--zero-shot", "--tune", "full"], capsys, "--tune")
    again = flags("--weights", folder, "--clip-vocab", vocab, "--zero-shot --backbone vit_b_32")
    refused(train_raer.main, [*again, "--data", str(tree)], capsys, "--zero-shot", "a run")
    weights.unlink(), vocab.unlink()
    capsys.readouterr()
    used = ["--data", str(tree), "--eval", str(folder), "--out", str(tmp_path), "--device", "cpu"]
    assert train_raer.main([*used, "--precision", "bf16" if tune == "full" else "auto"]) == 0
    assert "without CLIP's own answers (zero_shot)" in capsys.readouterr().out
    used = flags("--device cpu --eval", untrained)
    refused(train_raer.main, used, capsys, "untrained is a run of --zero-shot", "summary.json")
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["eval/test/uar"] == summary(folder)["train/test/uar"]


def test_a_bare_run_trains_its_tower_and_says_so(tree, tmp_path, monkeypatch, capsys):
    small = clip.Variant(16, 2, 2, 8, 24, text_width=16, text_layers=2, text_heads=2)
    monkeypatch.setitem(clip.VARIANTS, "vit_b_16", small)
    argv = flags("--device cpu --num-frames 2 --bs 8 --epochs 2 --data", tree, "--out")
    towers = {}
    for name, extra in {"bare": [], "frozen": ["--tune", "none"]}.items():
        folder = tmp_path / name
        assert train_raer.main(flags(argv, folder, extra)) == 0
        said = capsys.readouterr().out
        tune = json.loads((folder / "config.json").read_text())["resolved"]["tune"]
        assert tune == ("none" if extra else "full")
        assert ("WARN no --weights and --tune none: the image tower is random" in said) == bool(
            extra
        )
        assert ("no --weights: all of vit_b_16 trains" in said) != bool(extra)
        stored = checkpoint.load(folder / "best.pt")["model"]
        towers[name] = {n: tensor for n, tensor in stored.items() if n.startswith("image.")}
    assert not any(torch.equal(towers["bare"][n], x) for n, x in towers["frozen"].items())
    used = flags("--device cpu --data", tree, "--eval", tmp_path / "bare", "--out", tmp_path)
    assert train_raer.main(used) == 0


def test_a_run_starts_from_the_model_of_another(whole, tree, tmp_path, capsys):
    def two_classes(part, clip, count, label):
        return (clip, count, label) if label != "3" else None

    fewer = lists_of(tree, tmp_path / "fewer", two_classes)
    (fewer / "classes.txt").write_text("calm\tone\nglad\ttwo\n")
    stored = checkpoint.load(whole / "best.pt")["model"]
    anew = {"same": set(), "fewer": {"classes"}, "frames": {"temporal"}}
    for name, parts in anew.items():
        data = fewer if name == "fewer" else tree
        argv = flags(NET, "--data", data, "--out", tmp_path / name, "--weights", whole / "best.pt")
        argv += flags("--lr 1e-6 --num-frames", 2 if name == "frames" else 3)
        capsys.readouterr()
        stopped_after([*argv], 1)
        out = capsys.readouterr().out
        assert ("its classes are calm, glad, puzzled" in out) == (name == "fewer")
        assert ("; begins anew: " + ", ".join(parts) in out) == bool(parts)
        model = checkpoint.load(tmp_path / name / "last.pt")["parts"]["model"]
        for key, tensor in model.items():
            if "norm_in" not in key:  # running statistics
                same = tensor.shape == stored[key].shape and torch.allclose(
                    tensor, stored[key], rtol=0, atol=1e-4
                )
                assert same or key.partition(".")[0] in parts
        assert all(any(key.startswith(part) for key in model) for part in parts)
    argv = flags(NET, "--data", tree, "--out", tmp_path / "bad", "--weights", whole)
    refused(train_raer.main, [*argv, "--backbone", "vit_b_32"], capsys, "--backbone vit_tiny")
    refused(train_raer.main, [*argv, "--image-size", "16"], capsys, "--image-size 24")
    refused(
        train_raer.main, [*argv, "--num-context", "4"], capsys, "--num-context", "no text tower"
    )


def test_weights_of_dfer_clip_get_the_pixels_that_they_were_tuned_on(tree, tmp_path, monkeypatch):
    small = clip.Variant(16, 2, 2, 8, 24, text_width=16, text_layers=2, text_heads=2)
    monkeypatch.setitem(clip.VARIANTS, "vit_b_32", small)
    state = clip.build_image_tower("vit_b_32", 16).state_dict()
    seen = []
    normalize = train_raer.augment.normalize
    monkeypatch.setattr(
        train_raer.augment, "normalize", lambda *given: seen.append(given[1:]) or normalize(*given)
    )
    for name, more in {"plain": {}, "dfer": {"prompt_learner.ctx": torch.zeros(1)}}.items():
        root = "clip_model_.visual." if more else ""
        torch.save({root + n: t for n, t in state.items()} | more, tmp_path / "w.pt")
        argv = flags("--backbone vit_b_32 --num-frames 3 --bs 8 --device cpu --image-size 16")
        argv += flags("--weights", tmp_path / "w.pt", "--activation quick_gelu --data", tree)
        stopped_after([*argv, "--out", str(tmp_path / name)], 1)
        pixels = ((0.0,) * 3, (1.0,) * 3) if more else (clip.CLIP_MEAN, clip.CLIP_STD)
        assert set(seen) == {pixels}
        seen.clear()


def lists_of(tree, folder, edit):
    """A copy of the data with each line of the lists, its fields, as `edit` returns it, or None."""
    shutil.copytree(tree, folder)
    for part in ("train", "val", "test"):
        file = folder / f"{part}.txt"
        fields = [edit(part, *line.rsplit(" ", 2)) for line in file.read_text().splitlines()]
        file.write_text("".join(" ".join(map(str, line)) + "\n" for line in fields if line))
    return folder


def test_labels_and_classes_count_as_in_training(tree, tmp_path, capsys):
    def from_zero(part, clip, count, label):
        return clip, count, int(label) - 1

    zero = lists_of(tree, tmp_path / "zero", from_zero)
    argv = flags(NET, "--epochs 2 --cache-features --lr 5e-3 --data", zero)
    assert train_raer.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert checkpoint.load(tmp_path / "run" / "best.pt")["model_spec"]["label_base"] == 0

    def evaluated(data, *more):
        argv = flags("--device cpu --eval", tmp_path / "run", "--data", data, more)
        assert train_raer.main([*argv, "--out", str(tmp_path)]) == 0
        return json.loads((tmp_path / "eval.json").read_text())

    # A list of the last classes alone, in data without classes.txt.
    def last(part, clip, count, label):
        return (clip, count, label) if part == "test" and label != "0" else None

    whole, found = evaluated(zero), evaluated(lists_of(zero, tmp_path / "last", last))
    names = [f"eval/test/recall_{name}" for name in RAER_CLASSES[1:]]
    assert [found[name] for name in names] == [whole[name] for name in names]
    assert "eval/test/recall_calm" not in found and "eval/test/uar_present" not in whole
    mean = np.mean([found[name] for name in names])
    assert found["eval/test/uar_present"] == pytest.approx(mean)
    assert found["eval/test/uar"] == pytest.approx(2 / 3 * mean)
    assert "WARN test has no clips of calm: " in capsys.readouterr().out
    # Without --out: the matrix of training stays.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    argv = flags("--device cpu --eval", tmp_path / "copy", "--data", tmp_path / "last")
    assert train_raer.main(argv) == 0
    with open(tmp_path / "copy" / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert row["answer"] == max(RAER_CLASSES, key=lambda name: float(row[name]))
    with open(tmp_path / "copy" / "eval_confusion.csv") as file:
        matrix = {row["true"]: row for row in csv.DictReader(file)}
    pairs = [(row["label"], row["answer"]) for row in rows]
    for true in RAER_CLASSES:
        for answer in RAER_CLASSES:
            assert int(matrix[true][answer]) == pairs.count((true, answer))
    matrices = [(tmp_path / name / "confusion.csv").read_text() for name in ("run", "copy")]
    assert matrices[0] == matrices[1]
    (tmp_path / "last" / "classes.txt").unlink()
    assert evaluated(tmp_path / "last") == found
    assert evaluated(tree, "--label-base", "1") == whole
    argv = flags("--device cpu --eval", tmp_path / "run", "--data", tree)
    refused(train_raer.main, argv, capsys, "--label-base 1")
    argv = flags("--predict", tree / "test", "--resume", tmp_path / "run", "--label-base 1")
    refused(train_raer.main, argv, capsys, "--label-base")


BAD = {  # flags -> the flag, file or value that the refusal names
    "--backbone vit_b": "vit_b_",
    "--method focal": "three-stage",
    "--impl torch": "--impl",
    "--cache-features --tune full": "--cache-features",
    "--cache-features --augment clip": "--augment",
    "--method ce --la-prior train": "--la-prior",
    "--method ce --schedule x.json": "--schedule",
    "--num-context 4": "--num-context",
    "--clip-vocab x": "--clip-vocab",
    "--image-lr 1": "--image-lr",
    "--method tau-norm --logit-scale 3": "--logit-scale",
    "--method ldam-drw --logit-scale 3": "--logit-scale",
    "--zero-shot": "--zero-shot",
    "--method linear-probe --logit-scale 3": "--logit-scale",
    "--method linear-probe --tune adapter": "--tune",
    "--method linear-probe --temporal-layers 2": "--temporal-layers",
    "--num-frames 1 --accum 8": "--accum 8",
    "--schedule none.json": "none.json",
    "--image-size 13": "--image-size 13",
    "--bs 100": "--bs",
    "--bs 8 --accum 3": "--bs",
    "--weights none.pt --backbone resnet18": "none.pt",
    "--weights none.pt": "vit_tiny",
    "--weights openai": "vit_tiny has none",
    "--weights imagenet --backbone vit_l_14": "vit_l_14 has openai",
    "--weights openai --backbone resnet18": "resnet18 has imagenet",
    "--data nowhere": "nowhere",
    "--missing-box zero": "--missing-box",
    "--label-base 2": "--label-base",
    "--streams body": "--streams",
    "--select f1": "--select",
    "--fusion-lr -1": "--fusion-lr",
    "--method ce --streams face --train-list x": "--test-list",
    "--label-base 0": "--label-base 1",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_input_is_one_line_and_exit_2(tree, tmp_path, capsys, text):
    base = flags("--backbone vit_tiny --data", tree, "--out", tmp_path / "run", "--epochs 2 --bs 8")
    refused(train_raer.main, flags(base, text), capsys, BAD[text])
    assert not (tmp_path / "run" / "last.pt").exists()


def test_damaged_trees_and_other_models_are_refused_in_one_line(tree, whole, tmp_path, capsys):
    def changed(name, edit):
        copy = tmp_path / f"tree{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tree, copy)
        (copy / name).write_text(edit((copy / name).read_text()))
        return [*NET, "--epochs", "1", "--data", str(copy), "--out", str(tmp_path / "run")]

    def refuses(argv, name):
        refused(train_raer.main, [*argv, "--device", "cpu"], capsys, name)

    refuses(changed("train.txt", lambda text: text.replace(" 1\n", " 7\n", 1)), "label 7")
    refuses(changed("test.txt", lambda text: text + "train/clip 0-0 2 1\n"), "train/clip 0-0")
    longer = changed("train.txt", lambda text: text.replace("clip 0-0 2 ", "clip 0-0 9 "))
    refuses(longer, "clip 0-0")
    empty = changed("body.json", lambda text: text.replace("[2, 0, 30, 24]", "[9, 0, 9, 24]", 1))
    refuses(empty, "[9")
    refuses(flags("--eval", whole, "--data", tree, "--epochs 3"), "--epochs")
    refuses(["--eval", str(tmp_path)], "best.pt")
    other = flags(SMALL, "--data", tree, "--out", whole, "--temporal-layers 2")
    refuses(other, "temporal_layers is 1 there and 2 here")
    refuses([*other, "--force-resume"], "temporal")


def test_flags_of_rates_and_selection_change_the_run(tree, tmp_path):
    argv = flags(NET, "--data", tree, "--epochs 4 --cache-features --lr 5e-3")
    moved = {}
    rates = {
        "1e-12": "--fusion-lr 1e-12",
        "1e-2": "--fusion-lr 1e-2",
        "1e-3": "--fusion-lr 1e-3",
        "unset": "",
        "adamw 5e-3": "--fusion-lr 5e-3 --optimizer adamw",
        "adamw": "--optimizer adamw",
    }
    for rate, more in rates.items():
        folder = tmp_path / rate
        assert train_raer.main([*argv, *more.split(), "--out", str(folder)]) == 0
        state = checkpoint.load(folder / "last.pt")["parts"]["model"]
        moved[rate] = state["fusion.0.weight"], state["classes.weight"]
    assert torch.equal(moved["unset"][0], moved["1e-3"][0])
    assert torch.allclose(moved["adamw"][0], moved["adamw 5e-3"][0], atol=1e-6)
    torch.manual_seed(0)
    start = models.build_raer(checkpoint.load(folder / "best.pt")["model_spec"], 0.1)
    assert torch.allclose(moved["1e-12"][0], start.fusion[0].weight, atol=1e-6)
    for rate in ("1e-2", "adamw"):
        assert not torch.allclose(moved[rate][0], start.fusion[0].weight, atol=1e-3)
    assert not torch.allclose(moved["1e-12"][1], start.classes.weight, atol=1e-3)
    for name in ("uar", "war"):
        folder = tmp_path / name
        assert train_raer.main([*argv, "--select", name, "--out", str(folder)]) == 0
        values = [line.get(f"train/val/{name}") for line in log.read(folder)]
        best = max(value for value in values if value is not None)
        assert summary(folder)["best_value"] == best


def test_an_inert_cap_warns(tree, tmp_path, capsys):
    table = {
        "epochs": 2,
        "phases": [{"start": 0}, {"start": 1, "sampler": "weighted", "cap": 50.0, "tau": 0.1}],
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    argv = flags(NET, "--data", tree, "--cache-features --schedule", tmp_path / "table.json")
    assert train_raer.main([*argv, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert (
        "warning: from epoch 1 the cap 50 binds no class" in out and "[1, 2)  weighted  50" in out
    )
    assert "2 epochs at most" in out  # the file's, as no --epochs is given
    table["phases"][1] |= {"cap": 0.01, "tau": 0}
    (tmp_path / "table.json").write_text(json.dumps(table))
    argv += ["--out", str(tmp_path / "low")]
    with pytest.raises(SystemExit):
        train_raer.main([*argv, "--max-steps", "1"])
    assert "the cap 0.01 binds all classes" in capsys.readouterr().out
    refused(
        train_raer.main,
        [*argv, "--la-prior", "train"],
        capsys,
        "--schedule",
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_thousand_steps_stay_finite_without_a_clamp(tree, tmp_path, precision):
    argv = flags(NET, "--data", tree, "--epochs 500 --cache-features --precision", precision)
    assert train_raer.main([*argv, "--eval-every", "100", "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in log.read(tmp_path / "run") if "train/train/loss" in line]
    assert len(lines) == 500 and all(np.isfinite(line["train/train/loss"]) for line in lines)
