"""Splits and orders are functions of the names, the seed and the epoch."""

import numpy as np
import pytest
import torch

from common.data import sampling
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
    with pytest.raises(InputError, match="needs 6 items of class 1, which has 5"):
        sampling.balanced_batches(indices, labels, 12, 0, 0)


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
