"""--check catches seeded bugs, passes what is healthy, and leaves a run directory as it was."""

import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train_cluster
import train_simclr
from common import distill, longtail, losses
from common.check import model as check_model
from common.check import reference, runner
from common.check.result import FAIL, SKIP, NetworkView, Result
from common.check.runner import ITEMS
from common.longtail import Phase
from common.models.heads import init_bias_to_prior
from common.report import figures
from common.run.loop import Step
from kernels import nt_xent, sup_con
from tests import bugs
from tests.data import cells_tree, utterances_tsv
from tests.runs import flags

QUICK = [  # the others take minutes
    bug for k, bug in enumerate(bugs.BUGS) if k % 6 == 1 or bug.item == "loss-at-init"
]
SMALL = ["--device", "cpu", "--epochs", "1", "--cluster-epochs", "1", "--k", "12"]


def name(bug):
    return bug.name.replace(" ", "-")


@pytest.mark.e2e
@pytest.mark.parametrize("bug", QUICK, ids=name)
def test_a_seeded_bug_is_caught_by_its_item(bug, tmp_path):
    item = bugs.try_bug(bug, tmp_path)
    assert item["status"] == bug.status, item
    assert item["fix"] and item["threshold"]


@pytest.mark.e2e
@pytest.mark.slow
def test_at_least_95_percent_of_the_seeded_bugs_are_caught(tmp_path):
    caught = []
    for bug in bugs.BUGS:
        folder = tmp_path / str(len(caught))
        folder.mkdir()
        caught.append(bugs.try_bug(bug, folder)["status"] == bug.status)
    assert len(caught) >= 30 and sum(caught) >= 0.95 * len(caught)


def passes(base, folder, items="all"):
    code, found = bugs.statuses(base, folder, items)
    assert code == 0 and not [item for item in found.values() if item["status"] == "FAIL"], found
    return found


@pytest.mark.e2e
def test_the_items_of_the_quick_bugs_pass_without_them(tmp_path):
    for base in {bug.base for bug in QUICK}:
        items = {bug.item for bug in QUICK if bug.base == base}
        found = passes(base, tmp_path / base, ",".join(items))
        assert {item["status"] for item in found.values()} <= {"PASS", "WARN"} and len(
            found
        ) == len(items)


@pytest.mark.e2e
def test_a_healthy_clustering_passes_every_item(tmp_path):
    found = passes("rows", tmp_path)
    assert list(found) == list(ITEMS)
    assert all(item["fix"] == "" for item in found.values() if item["status"] == "PASS")
    for picture in {picture for item in found.values() for picture in item["pictures"]}:
        assert (tmp_path / "run" / picture).stat().st_size > 0


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("base", bugs.HEALTHY)
def test_nothing_fails_on_a_healthy_run(base, tmp_path):
    found = passes(base, tmp_path)
    if base == "finetune":  # where `labels shuffled` is a warning
        assert found["zero-input"]["status"] == "PASS"


@pytest.mark.e2e
def test_a_check_does_not_stand_in_the_way_of_the_run(tmp_path, capsys):
    argv = [*SMALL, "--out", str(tmp_path / "run")]
    assert train_cluster.main([*argv, "--check", "loss-at-init"]) == 0
    assert not (tmp_path / "run" / "config.json").exists()
    assert train_cluster.main(argv) == 0
    kept = [
        path for path in (tmp_path / "run").rglob("*") if path.suffix in (".pt", ".json", ".jsonl")
    ]
    files = {path: path.read_bytes() for path in kept}
    capsys.readouterr()
    assert (
        train_cluster.main(flags(argv, "--check gradient,loss-at-init")) == 0
    )  # beside a finished run
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("PASS")] == [
        "loss-at-init",
        "gradient",
    ]
    for path, content in files.items():
        assert path.name == "check.json" or path.read_bytes() == content, path
    assert train_cluster.main(argv) == 0 and "already finished" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "check.json").read_text())
    assert found["card"]["name"] == "cluster" and found["command"]
    assert [item["item"] for item in found["items"]] == ["loss-at-init", "gradient"] and found[
        "seconds"
    ] >= 0


@pytest.mark.e2e
def test_a_new_check_removes_the_pictures_of_the_one_before(tmp_path):
    argv = [*SMALL, "--out", str(tmp_path), "--check"]
    figures = tmp_path / "figures"
    assert (
        train_cluster.main([*argv, "loss-decreases"]) == 0
        and (figures / "check_pretrain_dynamics.png").exists()
    )
    (figures / "views.png").write_bytes((figures / "check_pretrain_dynamics.png").read_bytes())
    assert train_cluster.main([*argv, "gradient"]) == 0
    assert [path.name for path in figures.glob("*.png")] == ["views.png"]


@pytest.mark.e2e
def test_what_fails_or_warns_is_said_again_above_the_summary(tmp_path, capsys, monkeypatch):
    argv = [*SMALL, "--out", str(tmp_path), "--check"]
    monkeypatch.setitem(runner.ITEMS, "overfit", lambda spec: Result(FAIL, "x", "y", "z"))
    with pytest.raises(SystemExit) as ending:
        train_cluster.main([*argv, "imbalance,gradient,overfit"])
    *_, warned, passed, failed, header, first, second, last = capsys.readouterr().out.splitlines()
    assert ending.value.code == 4 and header == "to look at:"
    assert (
        passed.startswith("PASS gradient") and first == failed == "FAIL overfit    x (passes: y). z"
    )
    assert warned == second and second.startswith("WARN imbalance  40.8 in the training part: ")
    assert last.startswith("1 PASS, 1 WARN, 1 FAIL, 0 SKIP")
    items = json.loads((tmp_path / "check.json").read_text())["items"]
    assert [item["item"] for item in items] == ["imbalance", "gradient", "overfit"]
    table = (tmp_path / "report.html").read_text()
    places = [table.index(f"<td>{name}</td>") for name in ("overfit", "imbalance", "gradient")]
    assert places == sorted(places)

    assert train_cluster.main([*argv, "imbalance"]) == 0  # nothing stands between
    assert capsys.readouterr().out.count("WARN") == 2  # the line, and the summary


@pytest.mark.e2e
def test_a_larger_network_is_not_asked_for_what_the_own_one_does(tmp_path):
    found = passes("finetune", tmp_path, "head-bias,capacity")
    assert found["capacity"]["status"] == SKIP and "fits the batch" in found["capacity"]["value"]
    farthest = "most in (long|round|split): share 0.333, predicted"
    assert re.search(farthest, found["head-bias"]["value"])


@pytest.mark.e2e
def test_bad_use_is_refused_in_one_line(tmp_path, capsys):
    cases = {
        "did you mean overfit?": [*SMALL, "--check", "overfti"],
        "--check overfit,: an item has no name": [*SMALL, "--check", "overfit,"],
        "--check has no effect with --eval": ["--eval", str(tmp_path / "absent"), "--check"],
    }
    for said, argv in cases.items():
        with pytest.raises(SystemExit) as ending:
            train_cluster.main([*argv, "--out", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert ending.value.code == 2 and said in error and error.count("\n") == 1, error
    assert not (tmp_path / "run" / "check.json").exists()


@pytest.mark.e2e
def test_an_item_alone_finds_what_it_finds_among_the_others(tmp_path):
    alone = passes("rows", tmp_path / "a", "loss-decreases")["loss-decreases"]
    among = passes("rows", tmp_path / "b", "seed,eval-invariance,loss-decreases,overfit")[
        "loss-decreases"
    ]
    assert alone == among


@pytest.mark.e2e
def test_one_modality_and_repeated_texts_are_no_faults(tmp_path):
    """Nothing is masked there, and equal rows cannot be told apart."""
    lines = utterances_tsv(tmp_path / "acts.tsv", num_words=1).read_text().split("\n")
    assert len({line.split("\t")[1] for line in lines if line}) < len(lines) - 20
    argv = flags("--device cpu --bs 32 --cluster-bs 32 --data", tmp_path / "acts.tsv")
    argv += flags("--check seed,overfit --out", tmp_path / "run")
    assert train_cluster.main(argv) == 0


@pytest.mark.e2e
def test_stages_are_checked_one_after_the_other(tmp_path):
    argv = [*bugs.IMAGES, "--stage", "all", "--finetune-bs", "16"]
    argv[1] = str(cells_tree(tmp_path / "images"))
    out = flags("--device cpu --check loss-at-init,head-bias,first-layer --out", tmp_path / "run")
    assert train_simclr.main([*argv, *out]) == 0
    found = {
        i["item"]: i for i in json.loads((tmp_path / "run" / "check.json").read_text())["items"]
    }
    items = ("loss-at-init", "head-bias", "first-layer")
    assert list(found) == [
        f"{stage}/{item}" for stage in ("pretrain", "finetune") for item in items
    ]
    for stage in ("pretrain", "finetune"):
        assert found[f"{stage}/first-layer"]["pictures"] == [f"figures/check_{stage}_filters.png"]
        assert (tmp_path / "run" / "figures" / f"check_{stage}_filters.png").exists()
    assert found["pretrain/head-bias"]["status"] == SKIP
    assert "; a guess costs 1.0986; " in found["finetune/loss-at-init"]["value"]  # ln 3
    assert "; equal embeddings cost 3.4340" in found["pretrain/loss-at-init"]["value"]  # ln 31


def test_a_last_layer_that_starts_at_the_prior_predicts_it():
    torch.manual_seed(0)
    layer, one = nn.Linear(8, 3), nn.Linear(8, 1)
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    init_bias_to_prior(layer, labels)
    torch.testing.assert_close(layer.bias.softmax(0), torch.tensor([0.6, 0.3, 0.1]))
    init_bias_to_prior(one, labels.clamp(max=1))
    torch.testing.assert_close(one.bias.sigmoid(), torch.tensor([0.4]))


@pytest.mark.e2e
def test_images_without_labels_are_checked_on_what_there_is(tmp_path):
    files = sorted(cells_tree(tmp_path / "labeled").rglob("*.png"))
    (tmp_path / "images").mkdir()
    for k, file in enumerate(files):
        file.rename(tmp_path / "images" / f"{k}.png")
    argv = flags(bugs.IMAGES, "--check inputs,eval-invariance,leakage,zero-input --device cpu")
    argv[1] = str(tmp_path / "images")
    assert train_simclr.main([*argv, "--out", str(tmp_path / "run")]) == 0
    found = {
        i["item"]: i["status"]
        for i in json.loads((tmp_path / "run" / "check.json").read_text())["items"]
    }
    assert found == {
        "inputs": "PASS",
        "eval-invariance": "SKIP",
        "leakage": "PASS",
        "zero-input": "SKIP",
    }


@pytest.mark.e2e
@pytest.mark.parametrize("stage, views", [("pretrain", 2), ("finetune --from none", 1)])
def test_the_views_are_shown_with_what_was_drawn_for_them(stage, views, tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(figures, "save_grid", lambda path, images, _: grids.append(images))
    argv = flags("--data", cells_tree(tmp_path / "cells"), "--out", tmp_path / "run")
    argv += flags("--backbone resnet18 --stem cifar --image-size 20 --bs 16 --device cpu")
    argv += flags("--rotation 90 --stain 0.1 --normalize data --check views --stage " + stage)
    assert train_simclr.main(argv) == 0
    (item,) = json.loads((tmp_path / "run" / "check.json").read_text())["items"]
    header, *rows = item["rows"]
    assert item["status"] == "PASS" and len(rows) == 8 * views
    assert [row[:2] for row in rows] == [
        [str(view), str(image)] for view in range(1, views + 1) for image in range(1, 9)
    ]
    assert {"transposed", "hematoxylin"} <= set(re.findall(r"\w+", str(rows)))
    assert ("saturation" in str(rows)) == (views == 2)
    (grid,) = grids
    assert len(grid) == 8 * (1 + views) and grid.min() > -1e-3 and grid.max() < 1 + 1e-3


@pytest.mark.e2e
@pytest.mark.parametrize("balance", ["--class-weights", "--sampler"])
def test_fine_tuning_of_uneven_classes_is_checked_as_it_trains(balance, tmp_path):
    data = cells_tree(tmp_path / "cells", per_class=16)
    for path in sorted((data / "long").iterdir())[6:]:
        path.unlink()
    argv = flags("--data", data, "--out", tmp_path / "run", balance, "balanced")
    argv += flags("--stage finetune --from none --bs 6 --device cpu")
    argv += flags("--backbone resnet18 --stem cifar --image-size 8")
    assert train_simclr.main([*argv, "--check", "loss-at-init,eval-invariance,seed"]) == 0
    items = json.loads((tmp_path / "run" / "check.json").read_text())["items"]
    assert [item["status"] for item in items] == ["PASS"] * 3, items


@pytest.mark.e2e
def test_strong_colors_on_images_of_little_contrast_are_no_failure(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(48):
        (tmp_path / "pale" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(170, 200, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pale" / str(k % 2) / f"{k}.png")
    argv = flags("--data", tmp_path / "pale", bugs.IMAGES[2:], "--check inputs --device cpu")
    assert train_simclr.main([*argv, "--out", str(tmp_path / "run")]) == 0
    (item,) = json.loads((tmp_path / "run" / "check.json").read_text())["items"]
    assert item["status"] == "WARN" and "times the stored images'" in item["value"]


@pytest.mark.e2e
def test_a_teacher_is_not_asked_where_the_labels_are_tried(tmp_path, monkeypatch):
    argv = [*bugs.HEALTHY["finetune"][1], "--device", "cpu", "--epochs", "1"]
    argv[1] = str(cells_tree(tmp_path / "images"))
    assert train_simclr.main([*argv, "--out", str(tmp_path / "teacher")]) == 0
    asked, logits = [], distill.Teacher.logits
    monkeypatch.setattr(
        distill.Teacher,
        "logits",
        lambda self, *given: (asked.append(0), -9 * logits(self, *given))[1],
    )
    student = flags(
        argv, "--teacher", tmp_path / "teacher", "--teacher-weight 1 --out", tmp_path / "run"
    )
    assert (
        train_simclr.main(flags(student, "--check loss-at-init,overfit,loss-decreases")) == 0
        and not asked
    )
    items = json.loads((tmp_path / "run" / "check.json").read_text())["items"]
    assert all(item["value"].endswith("without the teacher") for item in items)
    assert train_simclr.main([*student, "--check", "loss-at-init,gradient"]) == 0 and asked


@pytest.mark.parametrize("rare", [1, 3, 30])
def test_the_loss_at_the_start_is_judged_on_items_with_the_classes_shares(rare):
    labels = np.r_[np.ones(rare, int), np.zeros(60 - rare, int)]
    labels = np.random.default_rng(0).permutation(labels)
    share, seen = rare / 60, []

    def step(run, model, optimizer, scaler, items):
        seen.append(labels[items])
        logits = model(torch.ones(len(items), 1))
        targets = torch.from_numpy(labels[items])[:, None].float()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets)
        return Step({"loss": loss}, torch.ones(()), torch.tensor(False))

    def build():
        model = nn.Linear(1, 1)
        nn.init.zeros_(model.weight)
        init_bias_to_prior(model, labels)
        return model

    args = SimpleNamespace(precision="fp32")
    run = SimpleNamespace(data=labels, args=args, world=SimpleNamespace(device=torch.device("cpu")))
    view = NetworkView(run, size=8)
    view.head = lambda model: model
    spec = SimpleNamespace(
        run=run,
        labels=labels,
        classes=["a", "b"],
        starts_at_prior=True,
        loss=partial(reference.focal, gamma=0.0, alpha=None, pos_weight=None),
        step=step,
        fetch=lambda batches, epoch: iter(batches),
        build=build,
        optimizer=lambda model: torch.optim.SGD(model.parameters()),
        batches=lambda epoch: [np.arange(60)],
        view=view,
    )
    found = check_model.loss_at_init(spec)
    # A network that says the shares costs a guess.
    assert found.status == "PASS" and re.match(r"(.*); a guess costs \1; logits ±0$", found.value)
    seen = np.concatenate(seen)
    assert abs(seen.mean() - share) < 1 / 24 and seen.mean() > 0


RNG = np.random.default_rng(0)


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("pos_weight", [None, 3.0])
def test_the_second_focal_loss_is_the_first(alpha, pos_weight):
    logits, labels = 3 * RNG.normal(size=(40, 1)), RNG.integers(0, 2, 40)
    for gamma in (0.0, 0.5, 2.0):
        options = {"gamma": gamma, "alpha": alpha, "pos_weight": pos_weight}
        first = losses.focal_bce(*map(torch.from_numpy, (logits[:, 0], labels)), **options)
        second = reference.focal(logits, labels, **options)
        assert second == pytest.approx(first.item(), rel=1e-12)


def test_the_second_contrastive_loss_is_the_first():
    z = RNG.normal(size=(12, 5))
    rows = torch.from_numpy(z)
    first = nt_xent(*rows.chunk(2), 0.2, impl="torch").item()
    assert reference.contrastive(z, views=2, temperature=0.2) == pytest.approx(first, rel=1e-12)
    labels = torch.arange(4).repeat(3)
    first = sup_con(rows, labels, 0.2, impl="torch").item()
    assert reference.contrastive(z, views=3, temperature=0.2) == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("which", ["sampled", "train"])
@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize("method", ["three-stage", "ldam-drw"])
def test_the_second_long_tailed_loss_is_the_first(method, texts, which):
    counts = np.array([60, 9, 3])
    rows, classes = RNG.normal(size=(8, 4)), torch.from_numpy(RNG.normal(size=(3, 4)))
    prompts = SimpleNamespace(fixed=torch.from_numpy(RNG.normal(size=(3, 4)))) if texts else None
    network = SimpleNamespace(scale=14.0, prompts=prompts, class_features=lambda: classes)
    logits, labels = 14 * rows @ classes.numpy().T / 9, RNG.integers(0, 3, 8)
    for phase in (
        Phase(0),
        Phase(0, tau=0.7, smoothing=0.2, temperature=0.3, mi=0.5, dc=2.0, weights="effective"),
        Phase(0, "weighted", cap=2.0, tau=0.4, weights="effective"),
        Phase(0, "weighted", tau=1.0, smoothing=1.0),
    ):
        given = torch.from_numpy(logits), classes
        targets = torch.from_numpy(labels)
        terms = longtail.loss_terms(method, phase, counts, which, network, given, targets)
        second = reference.long_tail(
            logits,
            labels,
            network,
            method=method,
            phase=phase,
            which=which,
            spec={"counts": counts.tolist(), "scale": 14.0},
        )
        assert second == pytest.approx(sum(terms.values()).item(), rel=1e-5)  # one is float32
