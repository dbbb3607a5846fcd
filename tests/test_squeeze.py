"""Ensembles and distillation: against what they mean, and through the scripts."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common import distill
from common.run import checkpoint, ensemble, log
from tests.data import cells_tree
from tests.runs import flags, refused, summary

TSM = flags(
    "--backbone conv_small_035 --image-size 32 --bs 24 --accum 2 --epochs 1",
    "--eval-every 1 --clips 1 --n-segment 2 --data sample-flicker",
)
RAER = flags(
    "--backbone vit_tiny --num-frames 2 --bs 32 --epochs 1 --cache-features",
    "--optimizer adamw --lr 1e-3 --device cpu",
)
SIMCLR = flags(
    "--backbone resnet18 --stem cifar --image-size 8 --device cpu",
    "--stage finetune --from none --bs 16 --epochs 2",
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return cells_tree(tmp_path_factory.mktemp("data") / "cells")


@pytest.fixture(scope="module")
def images(cells, tmp_path_factory):
    """Two runs of fine-tuning."""
    folder = tmp_path_factory.mktemp("simclr")
    for seed in (0, 1):
        argv = flags(SIMCLR, "--data", cells, "--seed", seed, "--out", folder / f"run{seed}")
        assert train_simclr.main(argv) == 0
    return folder


def test_distillation_is_hintons_loss():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 7, 5))
    for temperature in (0.5, 1.0, 4.0):
        p, q = (np.exp(x / temperature) for x in (teacher, student))
        p, q = (x / x.sum(1, keepdims=True) for x in (p, q))
        expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
        given = (torch.from_numpy(x) for x in (student, teacher))
        assert distill.distillation(*given, temperature).item() == pytest.approx(expected, rel=1e-5)
    binary = distill.distillation(torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.5]), 1.0)
    p, q = torch.tensor([1.0, 0.5]).sigmoid(), torch.tensor([0.3, -2.0])
    expected = F.binary_cross_entropy_with_logits(q, p) - F.binary_cross_entropy(p, p)
    assert binary.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_infinite_temperature_matches_logits():
    # Hinton et al., section 2.1: the gradient becomes that of half the squared distance of centered
    # logits, over C.
    student, teacher = torch.randn(
        2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    student.requires_grad_()
    (grad,) = torch.autograd.grad(distill.distillation(student, teacher, 300.0), student)
    difference = student - student.mean(1, keepdim=True) - teacher + teacher.mean(1, keepdim=True)
    torch.testing.assert_close(grad, (difference / 6 / 4).detach(), rtol=0.02, atol=1e-4)


def test_scores_are_those_of_the_named_metrics():
    metrics = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn")
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, 2, 200), rng.random(200)
    found = ensemble.scores(labels, np.stack([1 - p, p], 1))
    assert found["nll"] == pytest.approx(metrics.log_loss(labels, p))
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(labels, p))
    assert found["uar"] == pytest.approx(metrics.balanced_accuracy_score(labels, p > 0.5))


@pytest.mark.e2e
def test_an_ensemble_averages_probabilities(images, tmp_path, capsys):
    runs = [str(images / f"run{seed}") for seed in (0, 1)]
    capsys.readouterr()
    assert train_simclr.main(["--ensemble", *runs, "--out", str(tmp_path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    members = [ensemble.read(tmp_path / f"member{i}", "x") for i in (0, 1)]
    assert members[0][2] == ["long", "round", "split"] and len(members[0][0]) == 12
    np.testing.assert_allclose(members[0][3].sum(1), 1, atol=1e-6)
    with open(tmp_path / "ensemble.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    mean = (members[0][3] + members[1][3]) / 2
    np.testing.assert_allclose([[float(x) for x in row[2:]] for row in rows], mean, atol=1e-6)
    stored = json.loads((tmp_path / "ensemble.json").read_text())
    truth = np.array(
        [sorted(["long", "round", "split"]).index(name.split("/")[0]) for name in members[0][0]]
    )
    assert stored["ensemble/test/accuracy"] == pytest.approx((mean.argmax(1) == truth).mean())
    each = [(member[3].argmax(1) == truth).mean() for member in members]
    assert stored["ensemble/test/member_accuracy"] == pytest.approx(np.mean(each))
    assert summary(images / "run0")["finetune/test/accuracy"] == pytest.approx(
        each[0]
    )  # --eval's own predictions
    assert "its mean member's" in said


def test_it_says_when_the_ensemble_is_worse(tmp_path, capsys):
    # Two members that are right by a little and one that is wrong by far: their mean is wrong.
    names, labels = [f"{i}" for i in range(8)], ["a", "b"] * 4

    def main(argv):
        own = tmp_path / argv[argv.index("--out") + 1].split("/")[-1]
        own.mkdir()
        sure = 0.99 if argv[argv.index("--eval") + 1] == "wrong" else 0.4
        with open(own / "eval.csv", "w", newline="") as file:
            rows = [[name, label, "", *((1 - sure, sure) if label == "a" else (sure, 1 - sure))]
                    for name, label in zip(names, labels, strict=True)]  # fmt: skip
            csv.writer(file).writerows([["id", "label", "answer", "a", "b"], *rows])

    class Args:
        out, ensemble = str(tmp_path), ["fair", "good", "wrong"]

    ensemble.judge(main, ["--ensemble", *Args.ensemble, "--out", str(tmp_path)], Args, "macro_f1")
    assert (
        "the ensemble's macro_f1 is worse than its mean member's (0, 0.6667"
        in capsys.readouterr().out
    )


def test_what_an_earlier_run_left_is_no_answer_and_one_run_is_not_evaluated(tmp_path, capsys):
    for i in range(2):
        (tmp_path / f"member{i}").mkdir()
        (tmp_path / f"member{i}" / "eval.csv").write_text("id,label,answer,a,b\n0,a,a,0.9,0.1\n")

    class Args:
        out, ensemble = str(tmp_path), ["pretrained", "other"]

    evaluated = []
    for names in (["pretrained", "other"], ["alone"]):  # neither leaves an eval.csv
        Args.ensemble = names
        with pytest.raises(SystemExit) as ending:
            ensemble.judge(
                evaluated.append, flags("--ensemble", names, "--out", tmp_path), Args, "uar"
            )
        assert ending.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert "pretrained has no classifier" in said[0] and "give two runs or more" in said[1]
    assert len(evaluated) == 2 and not list(tmp_path.rglob("eval.csv"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ensemble", "A"], "give two runs or more"),
        (["--ensemble", "A", "B", "--lr", "1"], "--lr has no effect with --ensemble"),
        (["--ensemble", "A", "B", "--eval", "A"], "--eval and --ensemble exclude each other"),
    ],
)
def test_bad_ensembles_are_refused(argv, said, images, tmp_path, capsys):
    argv = [str(images / "run0") if token == "A" else token for token in argv]
    refused(train_simclr.main, [*argv, "--out", str(tmp_path)], capsys, said)


@pytest.mark.e2e
def test_clusters_have_neither(capsys):
    for argv in (["--ensemble", "A", "B"], ["--teacher", "A"]):
        refused(train_cluster.main, argv, capsys, argv[0])


@pytest.mark.e2e
def test_a_student_of_full_weight_learns_the_teacher_not_the_labels(cells, images, tmp_path):
    teacher = checkpoint.load(images / "run1" / "best.pt")
    argv = [*SIMCLR, "--data", str(cells), "--seed", "2", "--teacher", str(images / "run1")]
    assert train_simclr.main([*argv, "--teacher-weight", "1", "--out", str(tmp_path / "a")]) == 0
    assert train_simclr.main([*argv, "--teacher-weight", "0.5", "--out", str(tmp_path / "b")]) == 0
    assert train_simclr.main([*argv[:-2], "--out", str(tmp_path / "c")]) == 0
    first = [log.read(tmp_path / name)[0]["loss"] for name in "abc"]
    assert first[1] == pytest.approx((first[0] + first[2]) / 2, rel=1e-4)  # half of both
    identity = json.loads((tmp_path / "a" / "config.json").read_text())["identity"]
    assert identity["teacher"] == checkpoint.weights_digest(teacher["model"])
    copied = tmp_path / "copy.pt"
    copied.write_bytes((images / "run1" / "best.pt").read_bytes())
    again = [*argv[:-1], str(copied), "--teacher-weight", "1", "--out", str(tmp_path / "a")]
    assert train_simclr.main(again) == 0  # the same run: the teacher's content counts
    with pytest.raises(SystemExit) as ending:
        train_simclr.main(
            flags(argv[:-1], images / "run0", "--teacher-weight 1 --out", tmp_path / "a")
        )
    assert ending.value.code == 2  # another teacher is another run


@pytest.mark.e2e
def test_the_linear_protocol_learns_from_a_teacher_but_its_baselines_do_not(
    cells, images, tmp_path
):
    common = flags(SIMCLR[:8], "--stage linear --from", images / "run0", "--bs 16 --epochs 2")
    common += flags("--linear-solver sgd")
    losses = []
    for extra in ([], ["--teacher", str(images / "run1")]):
        out = tmp_path / f"run{len(extra)}"
        assert train_simclr.main([*common, "--data", str(cells), *extra, "--out", str(out)]) == 0
        lines = log.read(out)
        first = {}
        for stage in ("linear", "linear_random", "linear_pixels"):
            key = f"{stage}/train/loss"
            first[stage] = next(line[key] for line in lines if key in line)
        losses.append(first)
    assert losses[0]["linear"] != losses[1]["linear"]
    assert all(losses[0][name] == losses[1][name] for name in ("linear_random", "linear_pixels"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("script", "argv"), [(train_tsm, TSM), (train_raer, RAER)], ids=["tsm", "raer"]
)
def test_the_video_scripts_have_both(script, argv, tmp_path, capsys):
    runs = [str(tmp_path / name) for name in "ab"]
    for seed, run in enumerate(runs):
        assert script.main([*argv, "--seed", str(seed), "--out", run]) == 0
    student = [*argv, "--seed", "2", "--out", str(tmp_path / "s"), "--teacher", runs[0]]
    assert script.main([*student, "--teacher-weight", "1", "--teacher-temperature", "1"]) == 0
    line = log.read(tmp_path / "s")[0]
    assert line["loss"] > 0
    if script is train_raer:
        assert line["loss"] == pytest.approx(
            line["teacher"], rel=1e-5
        )  # the other terms have no weight
    capsys.readouterr()
    assert script.main(["--ensemble", *runs, "--out", str(tmp_path / "e"), "--device", "cpu"]) == 0
    stored = json.loads((tmp_path / "e" / "ensemble.json").read_text())
    assert (
        stored["members"] == runs
        and f"ensemble/test/{'auc' if script is train_tsm else 'uar'}" in stored
    )
    with pytest.raises(SystemExit) as ending:
        other = ["--n-segment", "4"] if script is train_tsm else ["--num-frames", "3"]
        script.main([*student[:-4], *other, "--out", str(tmp_path / "x"), "--teacher", runs[0]])
    said = capsys.readouterr().err
    assert (
        ending.value.code == 2
        and "both must see and name the same" in said
        and not (tmp_path / "x").exists()
    )
