"""train_simclr.py as its users run it: whole runs, stages, use of a model, bad input."""

import contextlib
import csv
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import train_simclr
from common import recipe, weights
from common.data import cytology
from common.errors import InputError
from common.features.__main__ import main as features_of
from common.run import checkpoint, dist, log
from common.run.files import FORMAT
from common.weights import Published
from tests.data import cells_tree, cytology_tree
from tests.runs import (
    ended,
    flags,
    next_after,
    refused,
    same,
    start,
    start_ranks,
    succeed,
    summary,
)

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parent.parent
NET = ["--backbone", "resnet18", "--stem", "cifar", "--image-size", "8", "--device", "cpu"]
SMALL = flags(
    NET,
    "--stage all --bs 16 --epochs 3",
    "--finetune-bs 16 --finetune-epochs 2 --seed 3",
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return cells_tree(tmp_path_factory.mktemp("data") / "cells")


@pytest.fixture(scope="module")
def whole(cells, tmp_path_factory):
    """A finished run of all three stages."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_simclr.main([*SMALL, "--data", str(cells), "--out", str(folder)]) == 0
    return folder


def test_a_run_leaves_what_the_readme_promises(whole, cells, capsys):
    result = summary(whole)
    for stage in ("linear", "linear_random", "linear_pixels", "finetune"):
        for metric in ("accuracy", "macro_precision", "macro_recall", "macro_f1"):
            assert 0 <= result[f"{stage}/test/{metric}"] <= 1
        low, high = (result[f"{stage}/test/accuracy_{end}"] for end in ("low", "high"))
        assert 0 <= low <= result[f"{stage}/test/accuracy"] <= high <= 1
    for baseline in ("random", "pixels"):
        gain = result["linear/test/accuracy"] - result[f"linear_{baseline}/test/accuracy"]
        assert result[f"linear/test/gain_over_{baseline}"] == pytest.approx(gain)
        assert {"linear/cv/penalty", f"linear_{baseline}/test/knn_accuracy"} <= result.keys()
    solved = json.loads((whole / "config.json").read_text())["resolved"]["linear"]
    assert (solved["optimizer"], solved["epochs"]) == ("lbfgs", 1)
    assert result["majority/test/accuracy"] == pytest.approx(1 / 3)
    assert result["finetune/test/majority_accuracy"] == pytest.approx(1 / 3)
    assert result["pretrain/test/majority_knn_accuracy"] == pytest.approx(1 / 3)
    assert result["best_is"] == "highest"
    assert result["linear_pixels/test/accuracy"] > 0.9  # the classes differ in color
    assert result["pretrain/train/loss_at_chance"] == pytest.approx(math.log(31))
    ratio = result["pretrain/train/loss"] / math.log(31)
    assert result["pretrain/train/loss_over_chance"] == pytest.approx(ratio)
    assert result["status"] == "finished" and result["best_model_path"] == str(
        whole / "finetune" / "best.pt"
    )
    for name in (
        "config.json",
        "env.json",
        "log.jsonl",
        "report.html",
        "figures/views.png",
        "figures/pretrain_loss.svg",
    ):
        assert (whole / name).stat().st_size > 0
    steps = [line for line in log.read(whole) if line["stage"] == "pretrain" and "top1" in line]
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert {
        "loss",
        "loss_over_chance",
        "top1",
        "top5",
        "alignment",
        "uniformity",
        "lr",
        "grad_norm",
    } <= steps[0].keys()
    epochs = [line for line in log.read(whole) if "pretrain/train/loss" in line]
    assert (
        len(epochs) == 3
        and {"pretrain/val/knn_accuracy", "pretrain/val/effective_rank"} <= epochs[0].keys()
    )
    before = (whole / "log.jsonl").read_bytes()
    capsys.readouterr()
    assert (
        train_simclr.main(flags(SMALL, "--data", cells, "--out", whole)) == 0
    )  # finished: nothing is repeated
    printed = capsys.readouterr().out
    assert "already finished" in printed and (whole / "log.jsonl").read_bytes() == before
    args, _ = train_simclr.parse_args(next_after(printed, whole, train_simclr.CARD))
    assert args.predict == ["PATH"] and args.resume == str(whole)


def test_the_command_after_pretraining_runs_the_linear_protocol(tmp_path, capsys):
    data = cells_tree(tmp_path / "my cells")  # fewer than the linear protocol's batch
    out = tmp_path / "a run's"
    read = flags("--data", data, r"--group-by (\d\d)\.png --store-size 12")
    assert train_simclr.main(flags(NET, "--epochs 1 --bs 16", *read, "--out", out)) == 0
    following = next_after(capsys.readouterr().out, out, train_simclr.CARD)
    assert following == flags("--stage linear --from", out, *read)
    assert train_simclr.main(flags(following, "--device cpu --out", tmp_path / "linear")) == 0
    following = next_after(capsys.readouterr().out, tmp_path / "linear", train_simclr.CARD)
    assert following == flags("--predict PATH --resume", tmp_path / "linear")


def test_after_pretraining_on_a_single_class_the_labels_are_to_come(tmp_path, capsys):
    data = tmp_path / "cells"
    for split in ("train", "test"):
        cells_tree(data / split, classes=("images",))
    out = tmp_path / "run"
    assert train_simclr.main(flags(NET, "--epochs 1 --bs 16 --data", data, "--out", out)) == 0
    assert "pretrain/test/knn_accuracy" not in summary(out)
    assert summary(out)["best_is"] == "lowest"
    following = next_after(capsys.readouterr().out, out, train_simclr.CARD)
    assert following == flags("--stage linear --from", out, "--data LABELED")


def test_backbone_loads_into_plain_torchvision_and_gives_the_stored_features(whole, cells):
    plain = torchvision.models.resnet18(weights=None)
    plain.conv1, plain.maxpool = (
        torch.nn.Conv2d(3, 64, 3, padding=1, bias=False),
        torch.nn.Identity(),
    )
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(torch.load(whole / "backbone.pt", weights_only=True), strict=True)
    with np.load(whole / "features.npz") as stored:
        assert stored["features"].shape == (72, 512) and set(stored["split"]) == {
            "train",
            "val",
            "test",
        }
        assert stored["classes"][stored["label"][0]] == str(stored["id"][0]).split("/")[0]
        pixels = np.array(Image.open(cells / str(stored["id"][0]), formats=["PNG"]))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        image = torch.nn.functional.interpolate(image, (8, 8), mode="bilinear", antialias=True)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
        with torch.no_grad():
            features = plain.eval()((image - mean) / std)[0]
        np.testing.assert_allclose(features.numpy(), stored["features"][0], rtol=1e-4, atol=1e-4)


def test_two_processes_train_the_same_model_as_one(cells, tmp_path):
    argv = flags(NET, "--data", cells, "--bs 16 --epochs 1 --max-steps 1 --optimizer sgd")
    succeed(*start_ranks(train_simclr, 2 * [flags(argv, "--out", tmp_path / "two")]))
    assert ended(train_simclr.main, flags(argv, "--out", tmp_path / "one")) == 0
    two, one = (checkpoint.load(tmp_path / name / "last.pt") for name in ("two", "one"))
    assert one["place"]["step"] == two["place"]["step"] == 1
    for name, tensor in one["parts"]["model"].items():
        # A unit of a ReLU so near zero that rounding turns it on or off moves a bias that began at
        # zero by up to a hundredth; in float64 tests/torture.py finds both equal to 1e-12.
        error = (two["parts"]["model"][name] - tensor).double().norm()
        assert error <= 0.02 * tensor.double().norm(), name
    lines = [[line["loss"] for line in log.read(tmp_path / name)] for name in ("two", "one")]
    assert lines[0][0] == pytest.approx(
        lines[1][0], rel=0.2
    )  # rank 0 logs its own half of the batch


def test_training_goes_on_for_more_epochs(whole, cells, tmp_path):
    argv = flags(NET, "--data", cells, "--bs 16 --lr-schedule constant --warmup-epochs 0")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert train_simclr.main([*argv, "--epochs", "2", "--out", str(first)]) == 0
    assert train_simclr.main(flags(argv, "--epochs 3 --resume", first, "--out", second)) == 0
    assert train_simclr.main([*argv, "--epochs", "3", "--out", str(third)]) == 0
    a, b = (checkpoint.load(f / "last.pt") for f in (second, third))
    same(a["parts"], b["parts"], "parts")
    assert train_simclr.main(flags(argv, "--epochs 3 --resume", first)) == 0  # in its own directory
    same(checkpoint.load(first / "last.pt")["parts"], b["parts"], "parts")


def test_a_longer_run_of_all_stages_keeps_every_line_of_its_log(cells, tmp_path):
    base = [*SMALL, "--data", str(cells)]
    run = str(tmp_path / "run")
    assert train_simclr.main([*base, "--epochs", "1", "--out", run]) == 0
    before = summary(tmp_path / "run")
    assert train_simclr.main([*base, "--epochs", "4", "--resume", run]) == 0
    lines = log.read(tmp_path / "run")
    epochs = [line["epoch"] for line in lines if "pretrain/train/loss" in line]
    assert epochs == [1, 2, 3, 4]
    # The later stages start from new weights.
    steps = [line["step"] for line in lines if "finetune/train/loss" in line]
    assert steps and steps == sorted(set(steps))
    for stage in ("linear", "linear_random", "linear_pixels"):
        assert sum(f"{stage}/test/accuracy" in line for line in lines) == 1
    assert summary(tmp_path / "run")["pretrain/train/loss"] != before["pretrain/train/loss"]
    with pytest.raises(SystemExit) as ending:
        train_simclr.main(flags(base, "--epochs 4 --resume", run, "--out", tmp_path / "elsewhere"))
    assert ending.value.code == 2


def test_a_run_of_the_papers_recipe_goes_on_under_it(cells, tmp_path, monkeypatch, capsys):
    """As one of a version without --recipe does, whose directory has the same name."""
    monkeypatch.chdir(tmp_path)
    argv = flags(NET, "--data", cells, "--bs 16 --epochs 1")
    assert ended(train_simclr.main, [*argv, "--recipe", "paper", "--max-steps", "1"]) == 0
    (folder,) = (tmp_path / "runs" / "simclr").iterdir()
    file = folder / "config.json"
    file.write_text(json.dumps({"optimizer": "lars"} | json.loads(file.read_text())))
    assert train_simclr.main(argv) == 0
    assert "resuming from step 1" in capsys.readouterr().out
    assert json.loads(file.read_text())["resolved"]["pretrain"]["optimizer"] == "lars"
    # A new one follows the data; trained on it keeps what it took, whatever the rule says then.
    assert train_simclr.main([*argv, "--resume", "none", "--out", "new"]) == 0
    assert "recipe auto: adamw" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "SHORT", 0)
        longer = flags(NET, "--data", cells, "--bs 16 --epochs 2 --resume new")
        assert train_simclr.main(longer) == 0
    pretrain = json.loads(Path("new", "config.json").read_text())["resolved"]["pretrain"]
    assert (pretrain["optimizer"], pretrain["lr"], pretrain["epochs"]) == ("adamw", 3e-3, 2)
    assert train_simclr.main([*argv, "--resume", "none"]) == 0
    assert len(list(folder.parent.iterdir())) == 2  # another name than the paper's


def test_starting_anew_forgets_this_run_alone(cells, tmp_path, capsys):
    argv = [*NET, "--data", str(cells), "--bs", "16", "--epochs", "1", "--max-steps", "2"]
    for name in ("a", "a/inner", "b"):
        with pytest.raises(SystemExit):
            train_simclr.main([*argv, "--out", str(tmp_path / name)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:  # --max-steps are done: nothing is trained
        train_simclr.main([*argv, "--out", str(tmp_path / "a")])
    assert (
        ending.value.code == 0 and checkpoint.load(tmp_path / "a" / "last.pt")["place"]["step"] == 2
    )
    assert "resuming from step 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_simclr.main([*argv, "--resume", "none", "--out", str(tmp_path / "a")])
    assert "going on" not in capsys.readouterr().out
    assert (tmp_path / "a" / "inner" / "last.pt").exists() and len(log.read(tmp_path / "a")) == 2
    with pytest.raises(SystemExit):
        train_simclr.main(
            flags(argv, "--resume none --out", tmp_path)
        )  # a folder of runs, itself no run
    assert (tmp_path / "b" / "last.pt").exists() and (tmp_path / "a" / "last.pt").exists()


def test_a_state_of_other_settings_is_not_continued(whole, cells, tmp_path, capsys):
    argv = flags(NET, "--data", cells, "--epochs 1 --max-steps 1 --out", tmp_path / "run")
    with pytest.raises(SystemExit):
        train_simclr.main([*argv, "--bs", "16"])
    run = tmp_path / "run"
    other = flags(argv[:-1], tmp_path / "x", "--bs 8 --resume", run)
    refused(train_simclr.main, other, capsys, "bs is 16 there and 8 here")
    other = flags(argv, "--bs 16 --optimizer sgd --force-resume")
    refused(train_simclr.main, other, capsys, "AdamW")
    other = flags(argv[:-1], tmp_path / "y", "--bs 16 --stage finetune --from none")
    said = "--optimizer has no effect with --stage finetune; flags that are not given are those of"
    refused(train_simclr.main, flags(other, "--force-resume --resume", run), capsys, said)


def test_stages_start_from_a_run_and_refuse_another_identity(whole, cells, tmp_path, capsys):
    base = ["--data", str(cells), "--device", "cpu"]
    with pytest.raises(
        SystemExit
    ) as ending:  # whole's backbone.pt has no model_spec: its stem must be said
        train_simclr.main(
            flags(base, "--stage linear --from", whole / "backbone.pt", "--backbone resnet18")
        )
    assert ending.value.code == 2 and "it needs --stem cifar" in capsys.readouterr().err
    argv = flags(base, "--stage linear --from", whole, "--out", tmp_path / "run", "--image-size 8")
    assert train_simclr.main([*argv, "--seed", "3"]) == 0
    assert (
        summary(tmp_path / "run")["linear/test/accuracy"] == summary(whole)["linear/test/accuracy"]
    )
    with pytest.raises(SystemExit) as ending:
        train_simclr.main([*argv, "--seed", "4"])
    assert (
        ending.value.code == 2
        and "seed is 3 there and 4 here" in capsys.readouterr().err.replace("None", "0")
    )
    assert train_simclr.main([*argv, "--seed", "4", "--force-resume"]) == 0


def test_images_that_a_run_may_have_learned_are_told_in_other_data(whole, cells, tmp_path, capsys):
    """A table of the run's images and of new ones, with splits of its own."""
    shutil.copytree(cells, tmp_path / "mixed")
    rows = ["path,label,split"]
    for i, path in enumerate(sorted((tmp_path / "mixed").rglob("*.png"))):
        rows.append(f"{path},{path.parent.name},{'test' if i % 4 == 0 else 'train'}")
    with Image.open(path) as image:
        pixels = 255 - np.array(image)
    Image.fromarray(pixels).save(tmp_path / "other.png")
    rows.append(f"{tmp_path / 'other.png'},{path.parent.name},test")
    (tmp_path / "mixed.csv").write_text("\n".join(rows))
    said = f"WARN 18 of 19 test images are in the data of {whole}, too, and may have been learned"
    use = flags("--device cpu --data", tmp_path / "mixed.csv", "--out")
    assert train_simclr.main(flags(use, tmp_path / "a", "--eval", whole)) == 0
    assert said in capsys.readouterr().out
    source = whole / "finetune"
    argv = flags(use, tmp_path / "b", "--stage linear --from", source)
    assert train_simclr.main(argv) == 0
    assert said.replace(str(whole), str(source)) in capsys.readouterr().out
    assert train_simclr.main(flags("--device cpu --eval", whole, "--out", tmp_path / "c")) == 0
    assert "may have been learned" not in capsys.readouterr().out


def test_eval_repeats_the_test_and_predict_needs_no_labels(whole, cells, tmp_path, capsys):
    argv = ["--data", str(cells), "--device", "cpu"]
    for source, stage in (
        (whole, "finetune"),
        (whole / "linear", "linear"),
        (whole / "linear" / "best.pt", "linear"),
    ):
        assert train_simclr.main([*argv, "--eval", str(source), "--out", str(tmp_path)]) == 0
        result = json.loads((tmp_path / "eval.json").read_text())
        for metric in ("accuracy", "macro_f1"):
            assert result[f"eval/test/{metric}"] == pytest.approx(
                summary(whole)[f"{stage}/test/{metric}"], abs=1e-9
            )
    assert (
        train_simclr.main(flags(argv, "--eval", whole / "pretrain" / "best.pt", "--out", tmp_path))
        == 0
    )
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["eval/test/knn_accuracy"] == summary(whole)["pretrain/test/knn_accuracy"]

    loose = tmp_path / "loose"
    loose.mkdir()
    for i, path in enumerate(sorted(cells.rglob("*.png"))[:5]):
        (loose / f"{i}.png").write_bytes(path.read_bytes())
    linear = flags("--predict", loose, "--resume", whole / "linear", "--device cpu --out", tmp_path)
    assert train_simclr.main(linear) == 0
    rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
    assert [row["id"] for row in rows] == [f"{i}.png" for i in range(5)]
    for row in rows:
        scores = {name: float(row[f"score_{name}"]) for name in ("long", "round", "split")}
        assert row["class"] == max(scores, key=scores.get) and sum(
            scores.values()
        ) == pytest.approx(1, abs=1e-5)
    capsys.readouterr()
    refused(
        train_simclr.main,
        flags("--predict", loose, "--resume", whole / "pretrain", "--device cpu"),
        capsys,
        "pretrain",
    )


def test_the_datas_own_statistics_go_with_the_model(cells, tmp_path, capsys):
    run = tmp_path / "run"
    views = "--vertical-flip --rotation 90 --stain 0.05 --grayscale 0.1"
    argv = flags(NET, "--epochs 1 --bs 32 --normalize data", views, "--data", cells)
    assert train_simclr.main(flags(argv, "--out", run)) == 0
    with np.load(run / "features.npz") as stored:
        parts = (stored["id"], stored["split"])
        names = [name for name, part in zip(*parts, strict=True) if part != "test"]
    pixels = np.stack([np.array(Image.open(cells / name)) for name in names]) / 255
    expected = np.array([pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))])
    spec = checkpoint.load(run / "best.pt")["model_spec"]
    np.testing.assert_allclose(spec["normalization"], expected, atol=1e-6)
    capsys.readouterr()
    assert train_simclr.main(flags(argv, "--out", run)) == 0
    assert "already finished" in capsys.readouterr().out

    base = ["--data", str(cells), "--device", "cpu"]
    later = flags(base, "--stage linear --out", tmp_path / "linear", "--from", run)
    assert train_simclr.main(later) == 0
    tested = {
        run: "pretrain/test/knn_accuracy",
        tmp_path / "linear": "linear/test/accuracy",
    }
    for source, metric in tested.items():
        args, _ = train_simclr.parse_args(flags(base, "--eval", source))
        exported = train_simclr.export_spec(args, dist.Dist(0, 1, torch.device("cpu")))
        assert list(map(list, exported.normalization)) == spec["normalization"]
        assert train_simclr.main(flags(base, "--eval", source, "--out", tmp_path)) == 0
        result = json.loads((tmp_path / "eval.json").read_text())
        name = metric.replace("pretrain", "eval").replace("linear", "eval")
        assert result[name] == summary(source)[metric]
    later = flags(later, "--normalize imagenet --resume none")
    assert train_simclr.main(later) == 0
    stored = checkpoint.load(tmp_path / "linear" / "best.pt")["model_spec"]
    assert "normalization" not in stored
    foreign = {"format": 2, "model": {}, "model_spec": {"script": "simclr", "normalization": "x"}}
    torch.save(foreign, tmp_path / "foreign.pt")
    refused(
        train_simclr.main,
        flags(base, "--stage linear --from", tmp_path / "foreign.pt"),
        capsys,
        "model_spec",
    )


def test_a_share_of_the_labels_is_said_and_used(cells, tmp_path, capsys):
    run = tmp_path / "run"
    argv = flags(SMALL, "--epochs 1 --label-fraction 0.2 --sampler balanced --data", cells)
    assert train_simclr.main(flags(argv, "--finetune-bs 6 --finetune-epochs 1 --out", run)) == 0
    said = capsys.readouterr().out
    result = summary(run)
    labels = [result[f"{stage}/train/labels"] for stage in ("linear", "finetune")]
    assert labels == [13, 13]  # 10 of train and 3 of dev: one of each class
    for stage in ("linear", "finetune"):
        assert f"{stage}: 13 of 60 labels (--label-fraction): long 4, round 4, split 5" in said
    assert "pretrain: 60 images" in said and "cross-validation of 13 items" in said
    assert "finetune: 10 training, 3 dev" in said
    assert result["finetune/test/majority_accuracy"] == pytest.approx(1 / 3)
    for source, stage in ((run, "finetune"), (run / "pretrain" / "best.pt", "pretrain")):
        use = flags("--device cpu --data", cells, "--eval", source, "--out", tmp_path)
        assert train_simclr.main(use) == 0
        metric = "knn_accuracy" if stage == "pretrain" else "accuracy"
        again = json.loads((tmp_path / "eval.json").read_text())[f"eval/test/{metric}"]
        assert again == pytest.approx(result[f"{stage}/test/{metric}"], abs=1e-9)
        (tmp_path / "eval.json").unlink()


def test_predictions_of_files_and_of_their_folder_lie_side_by_side(whole, cells, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    files = sorted((cells / "long").iterdir())
    use = flags("--device cpu --resume", run, "--predict")
    for paths in ([cells / "long"], files, [files[3], cells / "round"], files[3:4]):
        assert train_simclr.main(flags(use, *paths)) == 0
    said = capsys.readouterr().out
    assert said.count("the classifier of finetune (") == said.count(" answers") == 4
    assert f"3 classes: long, round, split) answers\n--resume {run}/linear asks" in said
    folder, each, mixed, one = (
        list(csv.reader((run / f"predictions{n}.csv").read_text().splitlines()))[1:]
        for n in ("", "-2", "-3", "-4")
    )
    assert [row[0] for row in each] == list(map(str, files))
    assert [row[1:] for row in each] == [row[1:] for row in folder]
    assert len(mixed) == 25
    for row in (*one, mixed[0]):  # in a batch of another size, which may round otherwise
        assert row[:2] == each[3][:2]
        assert list(map(float, row[2:])) == pytest.approx(list(map(float, each[3][2:])), abs=1e-5)
    assert {path for path in run.rglob("*") if path.is_file()} - before.keys() == {
        run / f"predictions{n}.csv" for n in ("", "-2", "-3", "-4")
    }
    assert all(path.read_bytes() == content for path, content in before.items())
    refused(train_simclr.main, flags(use, files[0], run / "log.jsonl"), capsys, run / "log.jsonl")


def test_divergence_ends_with_exit_code_3_and_a_finite_checkpoint(
    cells, tmp_path, monkeypatch, capsys
):
    original = train_simclr.train_step

    def poisoned(run, model, optimizer, *rest):
        if run.current.step == 4:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))
        return original(run, model, optimizer, *rest)

    monkeypatch.setattr(train_simclr, "train_step", poisoned)
    argv = flags(NET, "--data", cells, "--bs 16 --epochs 4 --save-every 0 --out", tmp_path)
    with pytest.raises(SystemExit) as ending:
        train_simclr.main(argv)
    error = capsys.readouterr().err
    assert ending.value.code == 3 and error.count("\n") == 1
    assert "not finite" in error and "step 5" in error and str(tmp_path / "last.pt") in error
    stored = checkpoint.load(tmp_path / "last.pt")
    assert stored["place"]["step"] == 4
    assert all(t.isfinite().all() for t in stored["parts"]["model"].values())
    assert summary(tmp_path)["status"] == "diverged"


def test_divergence_in_the_last_step_of_an_epoch_is_divergence(cells, tmp_path, capsys):
    argv = flags(NET, "--data", cells, "--bs 60 --optimizer sgd --lr 1e30 --warmup-epochs 0")
    with pytest.raises(SystemExit) as ending:
        train_simclr.main([*argv, "--epochs", "3", "--out", str(tmp_path / "run")])
    assert ending.value.code == 3 and "not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, {"head": {"weight": torch.zeros(2)}}]
)
def test_a_foreign_checkpoint_is_refused(cells, tmp_path, content, capsys):
    torch.save(content, tmp_path / "foreign.pt")
    argv = flags(NET, "--data", cells, "--bs 16 --stage finetune --from", tmp_path / "foreign.pt")
    refused(train_simclr.main, argv, capsys, "foreign.pt")


def test_from_takes_the_files_of_public_training_code(whole, cells, tmp_path, capsys):
    backbone = checkpoint.load(whole / "backbone.pt")
    moco = {f"module.encoder_q.{name}": tensor for name, tensor in backbone.items()}
    torch.save({"state_dict": moco | {"module.queue": torch.ones(2)}}, tmp_path / "moco.pt")
    start = flags(NET, "--data", cells, "--seed 3 --stage linear --from", tmp_path / "moco.pt")
    assert train_simclr.main([*start, "--out", str(tmp_path / "run")]) == 0
    assert "the query encoder, as MoCo evaluates it" in capsys.readouterr().out
    measured = "linear/test/accuracy"
    assert summary(tmp_path / "run")[measured] == summary(whole)[measured]
    moco["module.encoder_q.conv1.weight"] = backbone["conv1.weight"][:, :1]
    torch.save({"state_dict": moco}, tmp_path / "moco.pt")
    refused(train_simclr.main, [*start, "--out", str(tmp_path / "x")], capsys, "1 channel")
    # A run's model as nn.DataParallel holds it; another script's is still refused.
    spec = {"script": "simclr", "image_size": 8}
    model = {f"module.backbone.{name}": tensor for name, tensor in backbone.items()}
    torch.save({"format": FORMAT, "model": model, "model_spec": spec}, tmp_path / "ddp.pt")
    loaded, read = weights.load_backbone(str(tmp_path / "ddp.pt"), "simclr")
    assert read == spec and loaded.keys() == backbone.keys()
    with pytest.raises(InputError, match="train_simclr.py"):
        weights.load_backbone(str(tmp_path / "ddp.pt"), "tsm")


def test_a_pretraining_that_does_not_learn_warns_once_and_one_that_learns_does_not(
    cells, tmp_path, capsys
):
    colors = tmp_path / "colors"  # easily told apart, without labels
    colors.mkdir()
    for i, color in enumerate(np.random.default_rng(0).integers(0, 256, (64, 3))):
        Image.new("RGB", (8, 8), tuple(color)).save(colors / f"{i}.png")
    argv = flags(NET, "--bs 16 --epochs 4 --eval-every 1 --optimizer adamw --color-strength 0")
    train_simclr.main([*argv, "--data", str(colors), "--out", str(tmp_path / "healthy")])
    assert "WARN" not in capsys.readouterr().out
    assert "What to try" not in (tmp_path / "healthy/report.html").read_text()

    argv = flags(NET, "--bs 16 --epochs 4 --eval-every 1 --augment none --data", cells, "--out")
    stopped = [*argv, str(tmp_path / "stopped")]
    said = []
    for run in ([*argv, str(tmp_path / "broken")], [*stopped, "--max-steps", "11"], stopped):
        with contextlib.suppress(SystemExit):  # of --max-steps
            train_simclr.main(run)
        said.append([x for x in capsys.readouterr().out.split("\n") if x.startswith("WARN")])
    assert [len(lines) for lines in said] == [1, 1, 0]
    assert "same embedding" in said[0][0] and "--augment simclr" in said[0][0]
    assert "1 at the start" in said[0][0]
    lines = log.read(tmp_path / "broken")
    assert [x["epoch"] for x in lines if "pretrain/warn/views_alike" in x] == [2]
    timing = dict.fromkeys(log.TIMING)
    assert [x | timing for x in lines] == [x | timing for x in log.read(tmp_path / "stopped")]
    top = (tmp_path / "broken/report.html").read_text().partition("<h2")[0]
    assert "After epoch 2 of pretrain: both views of an image have the same embedding" in top


def test_features_of_any_images_are_the_runs_own(whole, cells, tmp_path, capsys):
    def computed(*words):
        assert features_of([*map(str, words)]) == 0
        capsys.readouterr()
        with np.load(words[-1]) as stored:
            return dict(stored)

    with np.load(whole / "features.npz") as stored:
        own = dict(stored)
    place = {name: i for i, name in enumerate(own["id"])}
    device = ("--device", "cpu")
    again = computed(*device, whole, cells, tmp_path / "all.npz")
    assert again.keys() == own.keys() | {"data"}
    rows = [place[name] for name in again["id"]]
    assert sorted(rows) == list(range(len(place)))
    np.testing.assert_array_equal(again["features"], own["features"][rows])
    assert (again["label"] == -1).all() and (again["split"] == "").all()
    np.testing.assert_array_equal(again["content"], own["content"][rows])
    # Some of them, as they come; a file of this command is replaced.
    some = [cells / "long" / "03.png", cells / "round"]
    few = computed(*device, whole / "pretrain", *some, tmp_path / "all.npz")
    assert few["data"].tolist() == [*map(str, some)]
    rows = [place[str(Path(name).relative_to(cells))] for name in few["id"]]
    np.testing.assert_allclose(few["features"], own["features"][rows], rtol=1e-5, atol=1e-6)
    assert len(rows) == 1 + len([*(cells / "round").iterdir()])
    # Of another stage, the backbone that this one has trained on.
    tuned = computed(*device, whole / "finetune", cells, tmp_path / "tuned.npz")
    assert tuned["features"].shape == again["features"].shape
    assert not np.allclose(tuned["features"], again["features"], rtol=1e-2)
    # What is not to be written over, and what has no features.
    before = (whole / "features.npz").read_bytes()
    (tmp_path / "mine.npz").write_bytes(b"mine")
    torch.save({"model_spec": {"script": "tsm"}, "model": {}, "format": FORMAT}, tmp_path / "t.pt")
    for words, named in (
        ([whole, cells, whole / "features.npz"], "features.npz is there"),
        ([whole, cells, tmp_path / "mine.npz"], "mine.npz is there"),
        ([whole, cells, tmp_path / "x.npy"], "end in .npz"),
        ([whole, cells, tmp_path / "no" / "x.npz"], "no folder"),
        ([whole, tmp_path / "nothing", tmp_path / "x.npz"], "nothing"),
        ([tmp_path / "t.pt", cells, tmp_path / "x.npz"], "train_tsm.py"),
    ):
        refused(features_of, [*map(str, words)], capsys, named)
    assert (whole / "features.npz").read_bytes() == before


BAD = {  # flags -> the flag, file or value that the refusal names
    "missing folder": ("--data {tmp}/absent", "absent"),
    "empty folder": ("--data {empty}", "empty"),
    "batch larger than the data": ("--bs 64", "--bs"),
    "later stage's batch larger than the data": (
        "--stage all --bs 8 --linear-solver sgd --linear-bs 64",
        "lower --linear-bs",
    ),
    "batch not divisible by chunks": ("--bs 10 --accum 4", "--bs"),
    "unknown backbone": ("--backbone resnet5O", "resnet50"),
    "unknown flag": ("--bachsize 3", "--bachsize"),
    "too small an image": ("--image-size 7", "--image-size 7"),
    "a stem that the backbone has not": ("--backbone inception_v3", "--stem cifar"),
    "missing resume": ("--resume {tmp}/nothing", "nothing"),
    "a stage without its start": ("--stage linear", "--from RUN"),
    "a start that is no run": ("--stage linear --from {empty}", "empty"),
    "a start of a damaged run": ("--stage linear --from {damaged}", "summary.json"),
    "a start of another script": ("--stage linear --from {damaged}/tsm.pt", "train_tsm.py"),
    "a start without effect": ("--from none", "--from"),
    "a folder as weights": ("--weights {empty}", "empty"),
    "weights of another name": ("--weights openai", "resnet18 has imagenet"),
    "missing checkpoint": ("--stage linear --from {tmp}/x.pt", "x.pt"),
    "a flag of another stage": ("--linear-lr 1", "--linear-lr"),
    "a batch of what is solved": ("--stage all --linear-bs 16", "--linear-solver sgd"),
    "epochs of what is solved": ("--stage linear --from none --epochs 3", "--linear-solver sgd"),
    "a search of what is solved": ("--stage linear --from none --search 2", "--search"),
    "a teacher of what is solved": (
        "--stage linear --from none --linear-solver lbfgs --teacher x",
        "--teacher",
    ),
    "a solver without its stage": ("--linear-solver sgd", "--linear-solver"),
    "features of what is trained": (
        "--stage linear --from none --linear-solver sgd --features 2x2",
        "--features",
    ),
    "features without a linear layer": ("--features gap", "--features"),
    "features that a backbone has not": (
        "--stage all --backbone vit_b_16 --stem imagenet --image-size 224 --features 2x2",
        "--features 2x2: vit_b_16",
    ),
    "a recipe without pretraining": ("--stage finetune --from none --recipe paper", "--recipe"),
    "a solver that is not there": ("--stage all --linear-solver adam", "lbfgs, sgd"),
    "patience without early stopping": ("--patience 3", "--patience"),
    "colors without augmentation": ("--augment none --color-strength 2", "--color-strength"),
    "crops without augmentation": ("--augment none --crop-min 0.5", "--crop-min"),
    "blur of more than all": ("--blur 1.5", "--blur"),
    "blur of what has no views": ("--stage linear --from none --blur 0", "--blur"),
    "crops of nothing": ("--crop-min 0", "--crop-min"),
    "blur of what is too small": ("--blur 0.1", "20 px"),
    "a turn by half of that": ("--rotation 45", "none, 90, any"),
    "a turn of what is stored": ("--stage linear --from none --rotation 90", "--rotation"),
    "stains without augmentation": ("--augment none --stain 0.1", "--stain"),
    "grayscale of another stage": (
        "--stage finetune --from none --grayscale 0",
        "--grayscale has no effect",
    ),
    "labels of a stage without": ("--label-fraction 0.5", "--label-fraction"),
    "a share of no labels": ("--stage all --label-fraction 0", "--label-fraction"),
    "weights of what is solved": (
        "--stage linear --from none --class-weights balanced",
        "--class-weights",
    ),
    "one imbalance corrected twice": (
        "--stage all --class-weights balanced --sampler balanced",
        "give one of them",
    ),
    "a prior of even batches": (
        "--stage all --head-bias prior --sampler balanced",
        "--head-bias has no effect",
    ),
    "even batches of few": (
        "--stage all --bs 16 --label-fraction 0.5 --sampler balanced --finetune-bs 9"
        " --data {uneven}",
        "lower --finetune-bs",
    ),
    "statistics of nothing": ("--normalize mean", "imagenet, data"),
    "warm-up longer than training": ("--epochs 2 --warmup-epochs 5", "--warmup-epochs 5"),
    "a device that is not there": ("--device cuda:77", "cuda:77"),
    "a batch without negatives": ("--bs 1", "--bs"),
    "too few images": ("--data {few} --stage linear --from none", "few"),
    "labels of one class": ("--data {one} --stage all --bs 8", "two classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, cells, tmp_path, capsys, monkeypatch):
    one = tmp_path / "one_class"
    if "{one}" in BAD[case][0]:
        one.mkdir()
        for i, path in enumerate(sorted((cells / "long").iterdir())):
            (one / f"{i}.png").write_bytes(path.read_bytes())
    uneven = tmp_path / "uneven"
    if "{uneven}" in BAD[case][0]:
        for name, count in (("long", 24), ("round", 24), ("split", 2)):
            (uneven / name).mkdir(parents=True)
            for path in sorted((cells / name).iterdir())[:count]:
                (uneven / name / path.name).write_bytes(path.read_bytes())
    empty, few = tmp_path / "empty", tmp_path / "few"
    empty.mkdir()
    for name in ("long", "round"):
        (few / name).mkdir(parents=True)
        (few / name / "0.png").write_bytes((cells / name / "00.png").read_bytes())
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    checkpoint.save(damaged / "best.pt", {"model": {}})
    checkpoint.save(
        damaged / "tsm.pt",
        {
            "format": 2,
            "model": {"x": torch.zeros(1)},
            "model_spec": {"script": "tsm", "backbone": "x"},
        },
    )
    (damaged / "summary.json").write_text('{"status": "finis')
    text, name = BAD[case]
    places = {
        "cells": cells,
        "one": one,
        "uneven": uneven,
        "few": few,
        "empty": empty,
        "damaged": damaged,
    }
    text = text.format(tmp=tmp_path / "nothing_here", **places)
    argv = flags(NET, "--data", cells, "--out", tmp_path / "out", text)
    refused(train_simclr.main, argv, capsys, name)
    assert not (tmp_path / "out").exists()


def test_a_prediction_without_a_run_is_refused(cells, capsys):
    refused(train_simclr.main, ["--predict", str(cells)], capsys, "--resume RUN")


def test_triton_without_a_gpu_is_refused_before_training(cells, tmp_path):
    argv = flags(NET, "--data", cells, "--bs 16 --impl triton --out", tmp_path / "out")
    process = start(train_simclr, argv, {"TRITON_INTERPRET": "0"})
    _, err = process.communicate(timeout=120)
    assert (
        process.returncode == 2
        and err.count("\n") == 1
        and err.startswith("error: --impl triton: ")
    )
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_ends_the_run_by_name(cells, tmp_path, capsys):
    root = tmp_path / "cells"
    for path in cells.rglob("*.png"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    (root / "long" / "05.png").write_bytes((root / "long" / "05.png").read_bytes()[:-80])
    refused(
        train_simclr.main,
        flags(NET, "--data", root, "--bs 16 --epochs 1 --out", tmp_path / "out"),
        capsys,
        "long/05.png",
    )


@pytest.fixture(scope="module")
def labels49(tmp_path_factory):
    return cytology_tree(tmp_path_factory.mktemp("data") / "labels49")


def test_a_check_leaves_no_cytology_split(labels49, tmp_path, monkeypatch):
    monkeypatch.setattr(cytology, "TOO_SMALL", 4)
    argv = flags(NET, "--protocol cytology --data", labels49, "--bs 16 --check gradient")
    assert train_simclr.main([*argv, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "check.json").exists() and not (tmp_path / "split.json").exists()


def test_the_cytology_protocol_runs_through_all_stages(labels49, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cytology, "TOO_SMALL", 4)
    run, again = tmp_path / "run", tmp_path / "again"
    argv = [*NET, "--protocol", "cytology", "--data", str(labels49)]
    assert (
        train_simclr.main(
            flags(
                argv,
                "--stage all --bs 16 --epochs 1 --linear-bs 16 --linear-epochs 20",
                "--finetune-bs 16 --finetune-epochs 3 --finetune-lr 3e-3 --out",
                run,
            )
        )
        == 0
    )
    assert "A1 has" in capsys.readouterr().out
    sets = json.loads((run / "split.json").read_text())["sets"]
    targets = set(cytology.TARGETS.split(","))
    assert (
        {name.split("/")[0] for name in sets["B1"]}
        == targets
        == {name.split("/")[0] for name in sets["B2"]}
    )
    for stage, num_classes in (("linear", 30), ("finetune", 5)):
        best = checkpoint.load(run / stage / "best.pt")
        assert (
            len(best["model_spec"]["classes"][stage])
            == num_classes
            == len(best["model"]["head.weight"])
        )
    assert (
        summary(run)["linear_pixels/test/accuracy"] > 0.5 > summary(run)["majority/test/accuracy"]
    )
    # A later stage of another run takes the sets of the run it starts from, although the data has
    # grown.
    Image.new("RGB", (8, 8)).save(labels49 / "HSIL" / "new.png")
    alone = flags(argv, "--stage finetune --from", run, "--bs 16 --epochs 1 --out", again)
    assert train_simclr.main(alone) == 0
    (labels49 / "HSIL" / "new.png").unlink()
    assert json.loads((again / "split.json").read_text())["sets"] == sets
    # Without the protocol the test part would hold images that the run was trained on.
    argv = [*NET, "--data", str(labels49), "--stage", "linear", "--from", str(run)]
    refused(
        train_simclr.main,
        [*argv, "--out", str(tmp_path / "other")],
        capsys,
        "ASC_H",
    )
    # --eval repeats the test on B2, --predict names the target labels.
    assert train_simclr.main(["--eval", str(run), "--device", "cpu"]) == 0
    evaluated = json.loads((run / "eval.json").read_text())
    assert evaluated["eval/test/accuracy"] == summary(run)["finetune/test/accuracy"]
    assert train_simclr.main(flags("--predict", labels49, "--resume", run, "--device cpu")) == 0
    with open(run / "predictions.csv") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= targets


def test_a_cell_is_a_function_of_its_number(cells, tmp_path, monkeypatch, capsys):
    parsed = [train_simclr.parse_args(["--grid-index", str(k)])[0] for k in range(108)]
    settings = [(a.backbone, a.bs, a.fraction, a.proj_dim) for a in parsed]
    assert len(set(settings)) == 108
    assert {s[0] for s in settings} == {
        "resnet50",
        "resnet101",
        "inception_v3",
        "inception_resnet_v2",
    }
    assert settings[0] == ("resnet50", 64, 1.0, 32) and settings[-1] == (
        "inception_resnet_v2",
        256,
        0.4,
        128,
    )
    refused(
        train_simclr.parse_args,
        ["--grid-index", "3", "--bs", "32"],
        capsys,
        "--bs",
        "--grid-index",
    )
    refused(
        train_simclr.parse_args,
        ["--grid-index", "3", "--stage", "linear", "--from", "run"],
        capsys,
        "--grid-index",
        "--stage linear",
    )
    # Run twice, a cell finds its own directory; other flags or another cell have another one.
    monkeypatch.setitem(train_simclr.CELLS[0], "backbone", "resnet18")
    monkeypatch.setitem(train_simclr.CELLS[0], "bs", 16)
    monkeypatch.setitem(train_simclr.CELLS[1], "backbone", "resnet18")
    monkeypatch.setitem(train_simclr.CELLS[1], "bs", 16)
    monkeypatch.chdir(tmp_path)
    small = flags("--image-size 8 --stem cifar --device cpu --data", cells, "--epochs 1")
    for extra in (
        ["--grid-index", "0"],
        ["--grid-index", "0"],
        ["--grid-index", "1"],
        flags("--grid-index 0 --seed 1"),
    ):
        assert train_simclr.main([*small, *extra]) == 0
    assert len(list((tmp_path / "runs" / "simclr").iterdir())) == 3
    assert capsys.readouterr().out.count("already finished") == 1


def test_published_weights_start_every_stage(cells, tmp_path, capsys, monkeypatch):
    torch.manual_seed(1)
    model = torchvision.models.resnet18()
    file = tmp_path / "published.pth"
    torch.save(model.state_dict(), file)
    argv = flags("--backbone resnet18 --image-size 32 --device cpu --data", cells)
    argv += flags("--bs 16 --epochs 1 --lr 0 --weights", file)
    for stage in ("pretrain", "linear", "finetune"):
        out = tmp_path / stage
        sgd = ["--linear-solver", "sgd"] if stage == "linear" else []
        assert train_simclr.main([*argv, *sgd, "--stage", stage, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert f"started from {file}" in said and "the head fc." in said
        stored = checkpoint.load(out / "best.pt")["model"]
        for name, tensor in model.named_parameters():  # nothing moves at a learning rate of 0
            if not name.startswith("fc."):
                assert torch.equal(stored[f"backbone.{name}"], tensor), name
    refused(
        train_simclr.main,
        [*argv, "--backbone", "resnet50", "--out", str(tmp_path / "other")],
        capsys,
        "resnet18",
    )
    refused(
        train_simclr.main,
        [*argv, "--stage", "linear", "--from", str(tmp_path / "pretrain")],
        capsys,
        "--from",
        "--weights",
    )
    copy = tmp_path / "copy.pth"
    copy.write_bytes(file.read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(train_simclr, "published_weights", lambda name: {"imagenet": published})
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    published = Published(copy.as_uri(), sha256)
    given = argv.index(str(file))
    for argv[given] in (str(copy), "imagenet"):  # the same weights elsewhere mean the same run
        again = flags(argv, "--stage linear --linear-solver sgd --out", tmp_path / "linear")
        assert train_simclr.main(again) == 0
        assert "already finished" in capsys.readouterr().out
    copy.unlink()
    assert train_simclr.main(again) == 0  # from the cache
    cached = tmp_path / "hub" / "checkpoints" / copy.name
    cached.unlink()
    refused(train_simclr.main, again, capsys, copy.as_uri(), f"at {cached}", "--weights FILE")


def test_a_baseline_of_the_linear_protocol_can_be_evaluated(cells, tmp_path, capsys):
    run = tmp_path / "random"
    argv = flags(NET, "--data", cells, "--stage linear --from none")
    assert train_simclr.main([*argv, "--out", str(run)]) == 0
    assert train_simclr.main(["--eval", str(run), "--device", "cpu"]) == 0
    evaluated = json.loads((run / "eval.json").read_text())
    assert evaluated["eval/test/accuracy"] == summary(run)["linear/test/accuracy"]
    refused(
        train_simclr.main,
        ["--eval", str(run / "linear_pixels" / "best.pt"), "--device", "cpu"],
        capsys,
        "linear_pixels",
    )


def test_a_run_with_a_torchvision_classifier_is_evaluated_and_predicts(tmp_path, capsys):
    run = tmp_path / "run"
    flags = (
        "--backbone mobilenet_v3_large --image-size 32 --device cpu --stage all --bs 544 --epochs 1"
        " --finetune-bs 400 --finetune-epochs 1 --features stages"
    )
    assert train_simclr.main([*flags.split(), "--out", str(run)]) == 0
    assert "2 steps of 544 an epoch" in capsys.readouterr().out
    plain = torchvision.models.mobilenet_v3_large(weights=None)
    plain.classifier[3] = nn.Identity()
    plain.load_state_dict(torch.load(run / "backbone.pt", weights_only=True), strict=True)
    for stage, width in (("linear", 4 * 112 + 960), ("finetune", 1280)):
        source = run / stage / "best.pt"
        stored = checkpoint.load(source)["model"]
        assert stored["head.weight"].shape == (8, width)
        assert "backbone.classifier.0.weight" in stored
        argv = ["--eval", str(source), "--device", "cpu", "--out", str(tmp_path)]
        assert train_simclr.main(argv) == 0
        repeated = json.loads((tmp_path / "eval.json").read_text())["eval/test/accuracy"]
        # After two steps features vary by a millionth of their size: as the standardization of the
        # linear layer is folded into float32, it rounds some answers.
        rounding = 0.02 if stage == "linear" else 0.0
        assert repeated == pytest.approx(summary(run)[f"{stage}/test/accuracy"], abs=rounding)
    assert train_simclr.main(["--predict", "sample", "--resume", str(run), "--device", "cpu"]) == 0
    with open(run / "predictions.csv") as file:
        assert len(list(csv.DictReader(file))) == 1280
