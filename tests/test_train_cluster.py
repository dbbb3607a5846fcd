"""Functions of train_cluster.py: views, an epoch's description, defaults of a mode."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_cluster
from common import deep_cluster
from common.run.loop import Batch
from tests.runs import flags


def fake_run(views="all", names=("text", "audio", "video"), seed=0, weights=(1, 1, 1)):
    world = SimpleNamespace(device=torch.device("cpu"), world_size=1, is_main=True)
    return SimpleNamespace(
        model_spec={"views": views, "k": 2, "weights": dict(zip(names, weights, strict=True))},
        data=SimpleNamespace(names=list(names)),
        args=SimpleNamespace(seed=seed),
        world=world,
    )


def masks(run, items, epoch):
    return train_cluster.masks(run, Batch(None, items, None, epoch))


def test_views_are_umc_s_or_functions_of_seed_epoch_and_utterance():
    fixed = masks(fake_run("anchored"), np.arange(2), 0)
    assert [view[0].tolist() for view in fixed] == [[1, 0, 1], [1, 1, 0], [1, 1, 1]]
    ids = np.arange(500)
    first, second = masks(fake_run(), ids, 3)
    assert (
        (first.sum(1) > 0).all()
        and 0.15 < 1 - first.mean() < 0.25
        and not torch.equal(first, second)
    )
    assert torch.equal(masks(fake_run(), ids[::-1].copy(), 3)[0], first.flip(0))
    assert not torch.equal(masks(fake_run(), ids, 4)[0], first)
    assert not torch.equal(masks(fake_run(seed=1), ids, 3)[0], first)


def test_a_view_lacks_the_anchor_only_as_far_as_another_modality_agrees_with_it():
    ids, masked = np.arange(4000), {}
    for weights in ((1, 0.5, 0.1), (1, 0, 0)):
        views = masks(fake_run(weights=weights), ids, 0)
        masked[weights] = [round(1 - torch.cat(views)[:, i].mean().item(), 2) for i in range(3)]
    assert masked[1, 0.5, 0.1] == pytest.approx([0.1, 0.2, 0.2], abs=0.02)
    assert masked[1, 0, 0] == pytest.approx([0, 0.2, 0.2], abs=0.02)
    assert masks(fake_run(names=["text"], weights=[1]), ids, 0)[0].min() == 1


def test_an_epoch_is_described_by_the_clusters_it_ends_with():
    """The stability that chooses an epoch is of its last weights; the NMI beside it must not be of
    those before.
    """
    z = torch.cat(
        [torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) + 9 * c for c in (0, 1)]
    )
    labels = np.arange(40) // 20
    table = SimpleNamespace(labels=labels)
    run = SimpleNamespace(
        model_spec={"k": 2, "smoothing": 0.2, "neighbors": 0.0},
        splits={"train": np.arange(40)},
        data=SimpleNamespace(table=table),
        args=SimpleNamespace(seed=0),
    )
    targets = deep_cluster.Targets(40)
    targets.labels[::2] = 1  # what it trained on
    model = SimpleNamespace(centroids=torch.zeros(2, 8), metric=torch.eye(8))
    model.centroids[1] = 9
    progress = SimpleNamespace(interruptible=contextlib.nullcontext)
    values = train_cluster.eval_stability(run, "cluster", model, z, progress, targets)[1]
    assert values["cluster/train/nmi"] == 1 and values["cluster/train/silhouette"] > 0.5
    assert values["cluster/train/max_share"] == 0.5


def test_a_mode_is_the_default_of_flags_that_can_be_set_alone():
    for argv, expected in (([], "auto"), (["--mode", "umc"], "euclidean")):
        args, _ = train_cluster.parse_args(argv)
        assert train_cluster.mode_default(args, "distance") == expected
    args, _ = train_cluster.parse_args(
        flags("--mode umc --distance discriminant --min-select-share 0")
    )
    assert (
        train_cluster.mode_default(args, "distance") == "discriminant"
        and train_cluster.mode_default(args, "min_select_share") == 0
    )
    assert train_cluster.mode_default(args, "smoothing") == 0
    stages = train_cluster.settings(args)
    assert (stages["pretrain"].epochs, stages["cluster"].epochs, stages["cluster"].lr) == (
        100,
        18,
        2e-4,
    )
