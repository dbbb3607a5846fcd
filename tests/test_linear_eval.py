"""The linear protocol and the measures of frozen features, on features whose answer is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from common import config, linear_eval, metrics, optim
from common.data import sampling
from common.features import representation, stored_features
from common.run import dist, log
from common.run.run import Run
from common.run.signals import Signals


class Items:
    def __init__(self, count, classes):
        self.ids = [f"{i}.png" for i in range(count)]
        self.labels = np.arange(count) % classes
        self.classes = [f"c{k}" for k in range(classes)]
        self.fingerprint, self.store_size = "abc", 8

    def __len__(self):
        return len(self.ids)

    def labels_in(self, classes):
        return self.labels

    def batches(self, parts, workers):
        return (torch.zeros(len(part), 3, 8, 8, dtype=torch.uint8) for part in parts)


def setting(folder, count=600, classes=3):
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
        seed=0,
        lr_schedule="cosine",
        patience=5,
        save_every=10,
        max_steps=None,
        resume="auto",
    )
    args.workers, args.detect_anomaly = 1, False
    stage = config.StageConfig(
        "linear", epochs=30, bs=64, lr=0.2, wd=0.0, optimizer="sgd", warmup_epochs=0.0
    )
    world = dist.Dist(0, 1, torch.device("cpu"))
    model_spec = {"classes": {"linear": items.classes}, "image_size": 8}
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
    return linear_eval.linear_protocol(run, progress, rows, {}), progress


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


def test_it_stops_when_dev_no_longer_improves(tmp_path):
    run = setting(tmp_path)
    _, progress = protocol(run, blobs(run.data.labels, noise=0.01))
    assert progress.best == 1.0 and progress.epoch == progress.best_epoch + run.args.patience < 30


def test_a_constant_feature_does_no_harm(tmp_path):
    run = setting(tmp_path)
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
