"""The linear protocol and the measures of frozen features, on features whose answer is known."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common import config, linear_eval, metrics, optim
from common.data import sampling
from common.errors import Diverged
from common.features import representation, stored_features
from common.run import checkpoint, dist, log
from common.run.run import Run
from common.run.signals import Signals


class Items:
    def __init__(self, count, classes):
        self.ids = [f"{i}.png" for i in range(count)]
        self.labels = np.arange(count) % classes
        self.classes = [f"c{k}" for k in range(classes)]
        self.fingerprint, self.store_size = "abc", 8
        self.groups = None

    def __len__(self):
        return len(self.ids)

    def labels_in(self, classes):
        return self.labels

    def batches(self, parts, workers):
        return (torch.zeros(len(part), 3, 8, 8, dtype=torch.uint8) for part in parts)


def setting(folder, count=600, classes=3, solved=False):
    items = Items(count, classes)
    everything = np.arange(count)
    test = sampling.hold_out(items.ids, items.labels, everything, 0.15, "test")
    rest = np.setdiff1d(everything, test)
    dev = sampling.hold_out(items.ids, items.labels, rest, 0.15, "dev")
    splits = {
        "test": test,
        "finetune_test": test,
        "rest": rest,
        "dev": dev,
        "train": np.setdiff1d(rest, dev),
    }
    args = SimpleNamespace(
        clip_grad=None,
        log_every=10,
        seed=0,
        lr_schedule="cosine",
        patience=5,
        save_every=10,
        max_steps=None,
        resume="auto",
    )
    args.workers, args.detect_anomaly, args.features = 1, False, None
    epochs, optimizer = (1, "lbfgs") if solved else (30, "sgd")
    stage = config.StageConfig(
        "linear", epochs=epochs, bs=64, lr=0.2, wd=0.0, optimizer=optimizer, warmup_epochs=0.0
    )
    world = dist.Dist(0, 1, torch.device("cpu"))
    model_spec = {"classes": {"linear": items.classes}, "image_size": 8, "backbone": "resnet18"}
    signals = Signals()
    return Run(
        args,
        world,
        items,
        splits,
        folder,
        log.Log(folder, main=True),
        model_spec,
        stages={"linear": stage},
        signals=signals,
    )


def protocol(run, rows):
    torch.manual_seed(0)
    head = nn.Linear(rows.shape[1], len(run.data.classes))
    optimizer = optim.build_optimizer("sgd", optim.param_groups([head], 0.0), lr=0.2)
    progress = run.open_stage("linear", {"head": head, "optimizer": optimizer}, start="x")
    return linear_eval.linear_protocol(run, progress, {"gap": rows}, {}), progress


def solved(run, rows):
    progress = run.open_stage("linear", {}, start="x")
    rows = rows if isinstance(rows, dict) else {"gap": rows}
    return linear_eval.solved_protocol(run, progress, rows, {}), progress


def blobs(labels, noise, seed=0):
    centers = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    rows = centers[torch.from_numpy(labels)] + noise * torch.randn(
        len(labels), 20, generator=torch.Generator().manual_seed(seed)
    )
    return rows * torch.logspace(-3, 3, 20) + 5  # features of very different scale, off the origin


def test_protocol_reaches_what_scikit_learn_reaches(tmp_path):
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="pip install -r tests/requirements.txt"
    )
    run = setting(tmp_path)
    labels, train, test = run.data.labels, run.splits["train"], run.splits["test"]
    rows = blobs(labels, noise=1.8)
    results, progress = protocol(run, rows)
    scale = rows[train].std(0)
    oracle = linear_model.LogisticRegression(C=np.inf, max_iter=2000).fit(
        (rows[train] / scale).numpy(), labels[train]
    )
    reached = oracle.score((rows[test] / scale).numpy(), labels[test])
    assert 0.6 < reached < 1
    assert results["linear/test/accuracy"] == pytest.approx(reached, abs=0.06)
    # The stored layer takes the features as they are.
    layer = progress.best_weights()
    logits = rows[test] @ layer["head.weight"].T + layer["head.bias"]
    assert (
        metrics.classification(labels[test], logits.argmax(1).numpy(), 3)["accuracy"]
        == results["linear/test/accuracy"]
    )


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_the_solved_protocol_is_that_of_scikit_learn(share, tmp_path):
    linear_model = pytest.importorskip(
        "sklearn.linear_model", reason="pip install -r tests/requirements.txt"
    )
    run = setting(tmp_path, solved=True)
    labels, rest, test = run.data.labels, run.splits["rest"], run.splits["test"]
    if share < 1:
        parts = run.splits | {f"finetune_{name}": run.splits[name] for name in ("train", "dev")}
        run.splits = sampling.fewer_labels(run.data, parts, share, [], 0, print)
        rest = np.union1d(run.splits["train"], run.splits["dev"])
        assert len(rest) == pytest.approx(share * len(run.splits["rest"]), abs=1)
    rows = blobs(labels, noise=1.8)
    results, progress = solved(run, rows)
    x = rows.double().numpy()
    mean, deviation = x[rest].mean(0), x[rest].std(0)
    c = 1 / (results["linear/cv/penalty"] * len(rest))
    oracle = linear_model.LogisticRegression(C=c, tol=1e-9, max_iter=50_000)
    oracle.fit((x[rest] - mean) / deviation, labels[rest])
    expected = oracle.predict_proba((x[test] - mean) / deviation)
    layer = progress.best_weights()  # it takes the features as they are
    logits = rows[test] @ layer["head.weight"].T + layer["head.bias"]
    np.testing.assert_allclose(logits.softmax(1).numpy(), expected, atol=1e-3)
    reached = (expected.argmax(1) == labels[test]).mean()
    assert 0.6 < reached < 1
    assert results["linear/test/accuracy"] == pytest.approx(reached)


def test_one_label_of_each_class_is_enough_and_said(tmp_path, capsys):
    run = setting(tmp_path, solved=True)
    labels = run.data.labels
    rows = blobs(labels, noise=0.8)
    for name in ("train", "dev"):
        run.splits[f"all_{name}"] = run.splits[name]
    run.splits["train"] = np.array([np.flatnonzero(labels == k)[0] for k in range(3)])
    run.splits["dev"] = run.splits["train"][:0]
    results, _ = solved(run, rows)
    assert results["linear/cv/accuracy"] == 0 and results["linear/test/accuracy"] > 0.8
    assert "one labeled image of c0, c1, c2" in capsys.readouterr().out
    # Neighbors are those that have labels here, all of them where the features alone are judged.
    fewer = representation(run, rows.__getitem__, "test", "linear/test", bank="train")
    whole = representation(run, rows.__getitem__, "test", "linear/test")
    assert fewer.items() <= results.items() and fewer != whole


def test_features_are_chosen_by_cross_validation_and_stored_with_the_layer(tmp_path, capsys):
    run = setting(tmp_path, solved=True)
    labels = run.data.labels
    good = blobs(labels, noise=1.8)
    rows = {"gap": blobs(labels, noise=4.0), "2x2": good[:, :10], "stages": good}
    # The worse ones are the best on the test part, which has no say.
    test = run.splits["test"]
    rows["gap"][test] = nn.functional.one_hot(torch.from_numpy(labels[test]), 20).float() * 1e4
    results, progress = solved(run, rows)
    (tmp_path / "alone").mkdir()
    alone = setting(tmp_path / "alone", solved=True)
    expected, alone_progress = solved(alone, good)
    assert results == expected
    layer, alone_layer = progress.best_weights(), alone_progress.best_weights()
    assert all(torch.equal(layer[name], alone_layer[name]) for name in alone_layer)
    assert progress.model_spec["features"] == "stages" and "features" not in run.model_spec
    assert "features stages" in capsys.readouterr().out
    progress.save()
    assert checkpoint.load(tmp_path / "best.pt")["model_spec"]["features"] == "stages"
    (tmp_path / "equal").mkdir()
    run = setting(tmp_path / "equal", solved=True)
    assert solved(run, {"gap": good, "stages": good})[1].model_spec["features"] == "gap"


def test_features_that_cost_too_much_are_not_tried_and_that_is_said(tmp_path, monkeypatch, capsys):
    run = setting(tmp_path, solved=True)
    widths = {"gap": 20, "2x2": 80, "stages": 120}
    assert linear_eval.tried(run, widths) == ["gap", "2x2", "stages"]
    monkeypatch.setattr(linear_eval, "MOST_NUMBERS", 600 * 80)
    assert linear_eval.tried(run, widths) == ["gap", "2x2"]
    monkeypatch.setattr(linear_eval, "MOST_PRODUCTS", 600 * 20 * 20)
    capsys.readouterr()
    assert linear_eval.tried(run, widths) == ["gap"]
    said = capsys.readouterr().out
    assert "features 2x2 are not tried" in said and "--features stages" in said
    run.args.features = "stages"
    assert linear_eval.tried(run, widths) == ["stages"]
    run.args.features = None
    assert linear_eval.tried(run, {"gap": 20}) == ["gap"]
    assert "resnet18 has no maps" in capsys.readouterr().out
    assert linear_eval.tried(setting(tmp_path), widths) == ["gap"]  # a layer that is trained


def test_the_test_part_does_not_move_the_solution(tmp_path):
    layers = []
    for shift in (0.0, 100.0):
        folder = tmp_path / str(shift)
        folder.mkdir()
        run = setting(folder, solved=True)
        rows = blobs(run.data.labels, noise=1.8)
        rows[run.splits["test"]] += shift
        run.data.labels[run.splits["test"]] = 0
        layers.append(solved(run, rows)[1].best_weights())
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])


def test_folds_have_their_share_of_every_class_and_follow_names():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 203, p=[0.7, 0.2, 0.08, 0.02])
    ids = [f"{i}.png" for i in range(203)]
    items = np.arange(3, 200)
    folds = linear_eval.stratified_folds(ids, labels, items, 5)
    counts = metrics.confusion_matrix(labels[items], folds, 5)[:4]
    assert (np.ptp(counts, axis=1) <= 1).all() and np.ptp(counts.sum(0)) <= 1
    order = rng.permutation(203)
    moved = linear_eval.stratified_folds(
        [ids[i] for i in order], labels[order], np.flatnonzero((order >= 3) & (order < 200)), 5
    )
    kept = order[(order >= 3) & (order < 200)]
    assert (moved == folds[kept - 3]).all()
    assert linear_eval.stratified_folds(ids, labels, items[:3], 5).tolist() != [0, 0, 0]


@pytest.mark.parametrize("number", [2, 3, 12, 60])
def test_no_group_is_in_two_folds(number):
    rng = np.random.default_rng(number)
    ids, labels = [f"{i}.png" for i in range(203)], rng.integers(0, 3, 203)
    groups = np.array([f"patient{i}" for i in rng.integers(0, number, 203)])
    items = np.arange(3, 200)
    folds = linear_eval.stratified_folds(ids, labels, items, 5, groups)
    assert sorted(set(folds)) == list(range(folds.max() + 1)) and folds.max() >= min(number, 5) - 2
    assert folds.max() > 0
    for group in np.unique(groups[items]):
        assert len(set(folds[groups[items] == group])) == 1
    apart = linear_eval.stratified_folds(ids, labels, items, 5, labels.astype(str))
    assert (apart == linear_eval.stratified_folds(ids, labels, items, 5)).all()
    if number == 60:
        counts = metrics.confusion_matrix(labels[items], folds, 5)[:3]
        assert np.ptp(counts.sum(0)) <= 12


@pytest.mark.parametrize("is_solved", [True, False], ids=["lbfgs", "sgd"])
def test_gains_are_over_the_same_images_and_outlast_a_resume(is_solved, tmp_path):
    def features(weights, _, names):
        asked.append(weights)
        return {"gap": blobs(run.data.labels, noise=1.0 if "learned" in weights else 3.0)}

    asked = []
    results = []
    for _ in range(2):
        run = setting(tmp_path, solved=is_solved)
        weights, random = {"learned": torch.ones(1)}, {"random": torch.ones(1)}
        linear_eval.linear(run, weights, random, {"gap": 20}, features)
        results.append(run.results)
    assert len(asked) == 2  # a stage that has ended computes none again
    assert results[0] == results[1] and not any("hits" in name for name in results[0])
    test = run.splits["test"]
    right = {}
    for name, noise in (("linear", 1.0), ("linear_random", 3.0)):
        layer = checkpoint.load(tmp_path / (name if name != "linear" else "") / "best.pt")["model"]
        rows = blobs(run.data.labels, noise)[test]
        answers = (rows @ layer["head.weight"].T + layer["head.bias"]).argmax(1).numpy()
        right[name] = (answers == run.data.labels[test]).astype(float)
    gains = right["linear"] - right["linear_random"]
    key = "linear/test/gain_over_random"
    found = [results[0][key + end] for end in ("", "_low", "_high")]
    assert found == pytest.approx([gains.mean(), *metrics.mean_interval(gains)])
    assert found[1] > 0 and results[0]["linear/test/gain_over_pixels_low"] > 0
    for name in ("linear", "linear_random", "linear_pixels"):
        assert {f"{name}/test/accuracy_low", f"{name}/test/knn_accuracy_low"} <= results[0].keys()


@pytest.mark.parametrize("is_solved", [True, False], ids=["lbfgs", "sgd"])
def test_the_raw_pixels_of_very_many_images_are_fewer(is_solved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linear_eval, "MOST_NUMBERS", 600 * 3 * 5**2 + 7)
    run = setting(tmp_path, solved=is_solved)
    features = partial(lambda rows, *_, names: {"gap": rows}, blobs(run.data.labels, noise=1.0))
    linear_eval.linear(run, None, {"random": torch.ones(1)}, {"gap": 20}, features)
    layer = checkpoint.load(tmp_path / "linear_pixels" / "best.pt")["model"]
    assert layer["head.weight"].shape == (3, 75)
    assert "raw pixels (5 px)" in capsys.readouterr().out
    monkeypatch.undo()
    sides = [linear_eval.pixel_side(n) for n in (1, 87_381, 87_382, 10**6, 10**9)]
    assert sides == [32, 32, 31, 9, 1]


def test_features_that_are_not_finite_end_the_stage(tmp_path):
    run = setting(tmp_path, solved=True)
    rows = blobs(run.data.labels, noise=1.0)
    bad = rows.clone()
    bad[5, 2] = torch.nan
    features = {"gap": rows, "stages": bad}
    with pytest.raises(Diverged, match="features"):
        linear_eval.linear(
            run, None, {"random": torch.ones(1)}, {"gap": 20}, lambda *_, names: features
        )


def test_it_stops_when_dev_no_longer_improves(tmp_path):
    run = setting(tmp_path)
    _, progress = protocol(run, blobs(run.data.labels, noise=0.01))
    assert progress.best == 1.0 and progress.epoch == progress.best_epoch + run.args.patience < 30


@pytest.mark.parametrize("protocol", [protocol, solved])
def test_a_constant_feature_does_no_harm(protocol, tmp_path):
    run = setting(tmp_path, solved=protocol is solved)
    rows = blobs(run.data.labels, noise=0.5)
    rows[:, 3] = 7.0
    results, _ = protocol(run, rows)
    assert results["linear/test/accuracy"] > 0.9


def test_features_are_stored_once_and_not_taken_for_others(tmp_path):
    run = setting(tmp_path)
    calls = []

    def compute():
        calls.append(1)
        return torch.full((600, 4), float(len(calls)))

    first = stored_features(run, "weights-a", compute)
    assert torch.equal(stored_features(run, "weights-a", compute), first) and len(calls) == 1
    with np.load(tmp_path / "features.npz") as stored:
        assert stored["features"].shape == (600, 4)
        assert [int((stored["split"] == s).sum()) for s in ("train", "val", "test")] == [
            len(run.splits[s]) for s in ("train", "dev", "test")
        ]
    assert torch.equal(stored_features(run, "weights-b", compute), torch.full((600, 4), 2.0))
    run.data.fingerprint = "other images"
    assert torch.equal(stored_features(run, "weights-b", compute), torch.full((600, 4), 3.0))
    # Of embedded data, which cannot have other bytes, they serve the runs beside this one, too.
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run.folder = tmp_path / name
        assert torch.equal(stored_features(run, "w", compute), torch.full((600, 4), 4.0))
        assert (run.folder / "features.npz").exists()
    assert torch.equal(stored_features(run, "x", compute), torch.full((600, 4), 5.0))


def test_representation_tells_good_features_from_noise(tmp_path):
    run = setting(tmp_path)
    rows = blobs(run.data.labels, noise=0.1)
    rows = (rows - rows.mean(0)) / rows.std(0)
    good = representation(run, lambda indices: rows[indices], "dev", "pretrain/val")
    noise = representation(
        run, lambda indices: torch.randn(len(indices), 20), "dev", "pretrain/val"
    )
    assert good["pretrain/val/knn_accuracy"] == 1.0 and noise["pretrain/val/knn_accuracy"] < 0.6
    assert good["pretrain/val/effective_rank"] < 5 < noise["pretrain/val/effective_rank"] <= 20
    run.splits["dev"] = np.array([], np.int64)
    assert list(representation(run, lambda indices: rows[indices], "dev", "pretrain/val")) == [
        "pretrain/val/effective_rank"
    ]


def test_stored_features_name_the_part_of_every_item(tmp_path):
    """The parts of a protocol share no item and leave some out."""
    run = setting(tmp_path, 24)
    names = ("rest", "train", "finetune_train", "dev", "finetune_dev", "test", "finetune_test")
    run.splits = {part: np.arange(3 * k, 3 * k + 3) for k, part in enumerate(names)}
    stored_features(run, "x", lambda: torch.zeros(24, 1))
    with np.load(tmp_path / "features.npz") as stored:
        assert stored["split"].tolist() == ["train"] * 9 + ["val"] * 6 + ["test"] * 6 + [""] * 3
