"""Splits and orders are functions of the names, the seed and the epoch."""

import numpy as np
import pytest
import torch

from common.data import sampling
from common.data.images import Images
from common.data.open import open_images
from common.errors import InputError
from common.run.dist import Dist


def names(count):
    return [f"c{i % 5}/{i:04d}.png" for i in range(count)], np.arange(count) % 5


def test_hold_out_is_stratified_nested_and_independent_of_the_other_items():
    ids, labels = names(500)
    everything = np.arange(500)
    small, large = (sampling.hold_out(ids, labels, everything, share, "s") for share in (0.4, 0.7))
    assert (
        np.bincount(labels[small]).tolist() == [40] * 5
        and np.bincount(labels[large]).tolist() == [70] * 5
    )
    assert set(small) <= set(large) and (np.diff(small) > 0).all()
    assert set(small) != set(sampling.hold_out(ids, labels, everything, 0.4, "other"))
    shuffled = np.random.default_rng(0).permutation(everything)
    assert np.array_equal(sampling.hold_out(ids, labels, shuffled, 0.4, "s"), small)
    assert np.array_equal(sampling.hold_out(ids, labels, everything, 1.0, "s"), everything)
    tiny = sampling.hold_out(ids, labels, np.arange(10), 0.15, "s")
    assert np.bincount(labels[tiny]).tolist() == [1] * 5


def test_no_image_is_in_two_parts_and_the_shares_are_70_15_15():
    images = open_images("sample")
    parts = sampling.split(images, fraction=0.4)
    whole = len(images)
    for dev, train in (("dev", "train"), ("finetune_dev", "finetune_train")):
        together = np.concatenate([parts["test"], parts[dev], parts[train]])
        assert len(together) == whole == len(set(together))
    assert [round(len(parts[name]) / whole, 2) for name in ("train", "dev", "test")] == [
        0.7,
        0.15,
        0.15,
    ]
    assert len(parts["finetune_dev"]) == pytest.approx(0.15 * 0.85 * whole, abs=8)
    assert not set(parts["pretrain"]) & set(parts["test"])
    assert len(parts["pretrain"]) == pytest.approx(0.4 * 0.85 * whole, abs=8)


def test_an_epoch_is_a_permutation_of_seed_and_epoch():
    a, b, c = (
        sampling.permutation(100, 0, 0),
        sampling.permutation(100, 0, 1),
        sampling.permutation(100, 1, 0),
    )
    assert sorted(a) == sorted(b) == sorted(c) == list(range(100))
    assert not np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.array_equal(a, sampling.permutation(100, 0, 0))


def test_batches_of_an_epoch_resume_and_are_shared_by_processes():

    indices = np.arange(1000, 1050)
    whole = sampling.epoch_batches(indices, 8, 3, 2)
    assert len(whole) == 6 and len(set(np.concatenate(whole))) == 48
    rest = sampling.epoch_batches(indices, 8, 3, 2, done=4)
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    shares = [
        sampling.epoch_batches(indices, 8, 3, 2, 0, Dist(rank, 2, torch.device("cpu")))
        for rank in (0, 1)
    ]
    for batch, left, right in zip(whole, *shares, strict=True):
        assert np.array_equal(batch, np.concatenate([left, right]))


def imbalanced(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = np.random.default_rng(0).permutation(len(labels))
    return 500 + np.arange(len(labels)), labels[order]


@pytest.mark.parametrize(
    ("counts", "bs"), [((50, 10), 12), ((50, 10), 8), ((40, 9), 7), ((11, 30, 9), 8), ((4, 4), 8)]
)
def test_balanced_batches_hold_every_class_alike_and_reach_every_item(counts, bs):
    indices, labels = imbalanced(counts)
    label_of = dict(zip(indices.tolist(), labels.tolist(), strict=True))
    drawn = dict.fromkeys(indices.tolist(), 0)
    epochs = 40 * max(counts) // sum(counts) + 4
    totals = np.zeros(len(counts))
    for epoch in range(epochs):
        batches = sampling.balanced_batches(indices, labels, bs, 5, epoch)
        assert len(batches) == len(sampling.epoch_batches(indices, bs, 5, epoch))
        for batch in batches:
            assert len(batch) == bs and len(set(batch.tolist())) == bs
            found = np.bincount([label_of[i] for i in batch.tolist()], minlength=len(counts))
            assert found.max() - found.min() <= 1
            totals += found
            for i in batch.tolist():
                drawn[i] += 1
    assert min(drawn.values()) > 0
    assert totals.max() - totals.min() <= len(counts)  # who is short takes turns
    for number, count in enumerate(counts):
        own = [drawn[i] for i in drawn if label_of[i] == number]
        assert max(own) - min(own) <= 0.6 * totals[number] / count + 2


def test_balanced_batches_are_functions_of_seed_and_epoch_and_shared_by_processes():

    indices, labels = imbalanced((60, 20))
    whole = sampling.balanced_batches(indices, labels, 12, 3, 2)
    again, rest = (
        sampling.balanced_batches(indices, labels, 12, 3, 2, done=done) for done in (0, 4)
    )
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    for seed, epoch in ((4, 2), (3, 3)):
        assert not np.array_equal(
            whole[0], sampling.balanced_batches(indices, labels, 12, seed, epoch)[0]
        )
    shares = [
        sampling.balanced_batches(indices, labels, 12, 3, 2, 0, Dist(rank, 3, torch.device("cpu")))
        for rank in range(3)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert np.array_equal(batch, np.concatenate(parts))
        for part in parts:
            assert np.bincount(labels[part - 500]).tolist() == [2, 2]


def test_a_class_too_small_for_a_balanced_batch_is_refused():
    indices, labels = imbalanced((50, 5))
    with pytest.raises(InputError, match="needs 6 items of class 1, which has 5; lower --x-bs"):
        sampling.balanced_batches(indices, labels, 12, 0, 0, flag="--x-bs")


def test_batch_sizes_that_do_not_fit_are_refused():
    sampling.check_batch("train", 8, 8, 4)
    with pytest.raises(InputError, match="larger than the 7 training items"):
        sampling.check_batch("train", 8, 7, 1)
    with pytest.raises(InputError, match="not divisible by 3"):
        sampling.check_batch("train", 8, 100, 3)
    for bs, count in ((8, 7), (8, 100)):
        with pytest.raises(InputError, match="(lower|change) --cluster-bs"):
            sampling.check_batch("cluster", bs, count, 3, "--cluster-bs")


RAER_COUNTS = np.array([1106, 103, 24, 126, 338])


@pytest.mark.parametrize(
    "cap, shares",
    [
        (1.5, [32.1, 14.6, 3.4, 17.9, 32.1]),
        (2.0, [28.6, 17.4, 4.1, 21.3, 28.6]),
        (None, [20.0] * 5),
    ],
)
def test_capped_weights_draw_each_class_as_often_as_derived(cap, shares):
    """RAER's counts: min(N / (K n_c), cap) n_c, normalized; draws within three deviations."""
    labels = np.repeat(np.arange(5), RAER_COUNTS)
    weights = sampling.class_weights(RAER_COUNTS, cap)
    exact = weights * RAER_COUNTS / (weights * RAER_COUNTS).sum()
    assert (100 * exact).round(1).tolist() == pytest.approx(shares, abs=0.051)
    counts, draws = np.zeros(5), 0
    for epoch in range(59):
        drawn = sampling.weighted_order(np.arange(1697), weights[labels], 3, epoch)
        counts += np.bincount(labels[drawn], minlength=5)
        draws += len(drawn)
    assert draws >= 100_000
    deviation = np.sqrt(draws * exact * (1 - exact))
    assert (np.abs(counts - draws * exact) <= 3 * deviation).all()


def test_a_weighted_order_is_a_function_of_seed_and_epoch_and_is_shared_out_whole():
    indices, weights = (
        np.array([3, 5, 8, 9, 11, 20, 21]),
        np.array([1.0, 0.5, 4.0, 1.0, 1.0, 0.1, 1.0]),
    )
    orders = [
        sampling.weighted_order(indices, weights, seed, epoch)
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert all(len(order) == 7 and set(order) <= set(indices) for order in orders)
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2]) and not np.array_equal(orders[0], orders[3])
    batches = sampling.batch_slices(orders[0], 2)
    assert np.array_equal(np.concatenate(batches), orders[0][:6])
    assert all(
        np.array_equal(a, b)
        for a, b in zip(batches[1:], sampling.batch_slices(orders[0], 2, done=1), strict=True)
    )
    ranks = [
        sampling.batch_slices(orders[0], 2, 0, Dist(rank, 2, torch.device("cpu")))
        for rank in (0, 1)
    ]
    assert all(
        np.array_equal(a, np.concatenate(b))
        for a, b in zip(batches, zip(*ranks, strict=True), strict=True)
    )


def grouping(seed, num_groups=40, num_classes=3, mixed=True):
    """Groups of very different sizes, each of one class or of all: (ids, labels, groups)."""
    rng = np.random.default_rng(seed)
    sizes = rng.zipf(1.7, num_groups).clip(1, 60)
    groups = np.repeat([f"g{i:03d}" for i in range(num_groups)], sizes).astype(object)
    labels = rng.integers(0, num_classes, len(groups))
    if not mixed:
        labels = np.repeat(rng.integers(0, num_classes, num_groups), sizes)
    return [f"{name}/{i}" for i, name in enumerate(groups)], labels, groups


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_groups_are_held_out_whole_and_no_class_is_lost_that_need_not_be(seed, mixed):
    ids, labels, groups = grouping(seed, mixed=mixed)
    everything = np.arange(len(ids))
    held = sampling.hold_out(ids, labels, everything, 0.2, "s", groups)
    rest = np.setdiff1d(everything, held)
    assert (np.diff(held) > 0).all() and not set(groups[held]) & set(groups[rest])
    assert set(labels[rest]) == set(labels)  # whatever is tested can be trained on
    for label in set(labels) - set(labels[held]):
        for name in set(groups[labels == label]):  # each group of it has the rest of some class
            kept = rest[groups[rest] != name]
            assert set(labels[kept]) < set(labels)
    order = np.random.default_rng(seed).permutation(everything)
    again = sampling.hold_out([], labels[order], everything, 0.2, "s", groups[order])
    assert sorted(order[again]) == held.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_a_share_of_groups_is_one_of_items(seed):
    """Of one class, no group is left that would come nearer to it."""
    ids, labels, groups = grouping(seed, num_classes=1)
    held = sampling.hold_out(ids, labels, np.arange(len(ids)), 0.2, "s", groups)
    left = np.setdiff1d(np.arange(len(ids)), held)
    sizes = np.unique(groups[left], return_counts=True)[1]
    missing = 0.2 * len(ids) - len(held)
    assert -0.5 * 60 <= missing <= 0.5 * sizes.min()
    ids, labels, groups = grouping(seed, num_groups=300)
    held = sampling.hold_out(ids, labels, np.arange(len(ids)), 0.2, "s", groups)
    assert np.allclose(np.bincount(labels[held]) / np.bincount(labels), 0.2, atol=0.03)


def test_a_class_in_one_group_alone_is_trained_on():
    labels = np.array([0, 0, 1, 1, 0, 0, 0, 1])
    groups = np.array(["a", "a", "b", "b", "c", "c", "d", "b"], dtype=object)
    held = sampling.hold_out([], labels, np.arange(8), 0.5, "s", groups)
    assert "b" not in groups[held] and 0 < len(held) < 5
    # Two groups that hold both classes: one on each side, though half is more than was asked for.
    labels, groups = np.array([0, 1, 0, 1]), np.array(["a", "a", "b", "b"], dtype=object)
    assert len(sampling.hold_out([], labels, np.arange(4), 0.1, "s", groups)) == 2


def test_the_share_does_not_hang_on_where_a_large_group_comes():
    groups = np.repeat(["large", *(f"g{i}" for i in range(50))], [200] + [10] * 50).astype(object)
    labels = np.zeros(len(groups), int)
    for salt in range(60):  # the large one comes first in some of the orders
        held = sampling.hold_out([], labels, np.arange(700), 0.15, salt, groups)
        assert len(held) == 100 and "large" not in groups[held]


def test_where_each_group_is_more_than_the_share_the_smallest_is_held_out():
    groups = np.repeat(["a", "b", "c"], [40, 30, 35]).astype(object)
    held = sampling.hold_out([], np.zeros(105, int), np.arange(105), 0.1, "s", groups)
    assert set(groups[held]) == {"b"}


def images_of(labels, groups=None, splits=None):
    ids = [f"{i:04d}.png" for i in range(len(labels))]
    pixels = torch.zeros(len(ids), 3, 1, 1).byte()
    classes = [f"c{i}" for i in range(max(labels) + 1)]
    images = Images("x", ids, labels, classes, splits or [""] * len(ids), pixels=pixels)
    images.groups = None if groups is None else np.array(groups, dtype=object)
    return images


@pytest.mark.parametrize("seed", range(6))
def test_no_group_is_in_test_and_the_rest_or_in_dev_and_train(seed):
    _, labels, groups = grouping(seed, num_groups=60)
    labels = np.where(np.random.default_rng(seed).random(len(labels)) < 0.2, -1, labels)
    said = []
    parts = sampling.split(images_of(labels, groups), 0.7, said.append)
    sides = {name: set(groups[indices]) for name, indices in parts.items()}
    assert not sides["test"] & (sides["rest"] | sides["pretrain"])
    for prefix in ("", "finetune_"):
        assert not sides[f"{prefix}dev"] & sides[f"{prefix}train"]
        used = len(parts["test"]) + len(parts[f"{prefix}dev"]) + len(parts[f"{prefix}train"])
        assert used == (labels >= 0).sum()
    left_out = len(labels) - len(parts["rest"]) - len(parts["test"])
    assert not left_out or said[0].startswith(f"left out {left_out} unlabeled image")


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.5, 1.0])
def test_a_share_of_the_labels_is_even_where_the_classes_have_them(share):
    labels = np.repeat([0, 1, 2, 3, -1], [900, 200, 40, 3, 57])
    images = images_of(labels.tolist())
    parts = sampling.split(images)
    said = []
    fewer = sampling.fewer_labels(images, parts, share, ["finetune"], 0, said.append)
    for name in ("rest", "pretrain", "test", "finetune_test"):
        assert np.array_equal(fewer[name], parts[name])
    for name in ("train", "dev", "finetune_train", "finetune_dev"):
        whole, kept = parts[name], fewer[name]
        assert np.array_equal(fewer[f"all_{name}"], whole)
        assert set(kept) <= set(whole) and (np.diff(kept) > 0).all()
        has = np.bincount(labels[whole], minlength=4)
        counts = np.bincount(labels[kept], minlength=4)
        assert len(kept) == max(round(share * len(whole)), (has > 0).sum())
        assert (counts[has > 0] > 0).all()
        spared = counts < has  # these have as many of each, to within one
        assert not spared.any() or np.ptp(counts[spared]) <= 1
        assert not spared.any() or counts.max() <= counts[spared].min() + 1
    counts = np.bincount(
        labels[np.concatenate([fewer["finetune_train"], fewer["finetune_dev"]])], minlength=4
    )
    of_classes = ", ".join(f"c{k} {count}" for k, count in enumerate(counts))
    assert len(said) == 1 and said[0].startswith(f"finetune: {counts.sum():,} of ")
    assert said[0].endswith(of_classes)


def test_shares_of_the_labels_are_nested_and_follow_the_seed():
    images = images_of(np.repeat([0, 1, 2], [500, 100, 20]).tolist())
    parts = sampling.split(images)

    def train(share, seed=0):
        return set(sampling.fewer_labels(images, parts, share, [], seed, print)["train"])

    assert train(0.01) <= train(0.1) <= train(0.4) <= train(1.0) == set(parts["train"])
    assert train(0.1) == train(0.1) != train(0.1, seed=1)


def test_a_share_of_the_labels_keeps_groups_apart():
    _, labels, groups = grouping(0, num_groups=60)
    images = images_of(labels.tolist(), groups)
    fewer = sampling.fewer_labels(images, sampling.split(images), 0.1, [], 0, print)
    sides = {name: set(groups[fewer[name]]) for name in ("train", "dev", "test")}
    assert all(sides.values()) and not sides["train"] & sides["dev"]
    assert not (sides["train"] | sides["dev"]) & sides["test"]


def test_a_class_that_groups_cost_a_part_is_named():
    said = []
    labels = [0, 0, 0, 0, 0, 0, 1, 1]
    parts = sampling.split(images_of(labels, [*"abcdef", "g", "g"]), say=said.append)
    assert 1 not in np.array(labels)[parts["test"]]
    assert [line.partition(":")[0] for line in said] == [
        f"WARN {name} has nothing of c1" for name in ("test", "dev", "finetune_dev")
    ]
    own = images_of([0, 0, 0, 1], [*"abcd"], ["train", "val", "test", "train"])
    sampling.split(own, say=said.append)  # what the data give themselves is their own affair
    assert len(said) == 3


def test_splits_of_the_data_that_share_a_group_are_refused():
    images = images_of([0, 1, 0, 1], ["a", "b", "b", "c"], ["train", "train", "val", "test"])
    with pytest.raises(InputError, match=r"1 group is in two splits: b \(0001.png in train, 0002"):
        sampling.split(images)
