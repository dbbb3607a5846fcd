"""Folders, archives and their layouts; decoding; damaged files; splits and orders that are
functions of the names.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from common.data import sampling
from common.data.open import open_images, prepare
from common.errors import InputError
from common.run.dist import Dist
from tests.data import image_folder, picture, read_pixels, zipped

CLASSES = [f"{name}/{i}.png" for name in ("b", "a", "c") for i in range(4)]


@pytest.mark.parametrize("prefix", ["", "cells/", "some/where/"])
def test_folder_and_zip_are_the_same_data(tmp_path, prefix):
    root = image_folder(tmp_path / "set", CLASSES)
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_text("not an image")
    plain, packed = open_images(str(root)), open_images(str(zipped(root, prefix)))
    assert plain.classes == packed.classes == ["a", "b", "c"]
    assert plain.labels.tolist() == packed.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(read_pixels(plain, range(12)), read_pixels(packed, range(12)))
    first = np.array(picture(4))  # a/0.png was written fifth
    assert torch.equal(read_pixels(plain, [0])[0], torch.from_numpy(first).permute(2, 0, 1))


def test_splits_are_recognized_and_may_hold_a_prefix(tmp_path):
    names = [
        f"{s}/{c}/{i}.png"
        for s, n in (("Train", 5), ("dev", 2), ("test", 3))
        for c in "xy"
        for i in range(n)
    ]
    root = image_folder(tmp_path / "set", names)
    for source in (str(root), str(zipped(root, "top/"))):
        images = open_images(source)
        assert images.classes == ["x", "y"]
        assert [int((images.splits == s).sum()) for s in ("train", "val", "test")] == [10, 4, 6]
        parts = sampling.split(images)
        assert set(parts["test"]) == set(np.flatnonzero(images.splits == "test"))
        assert (
            set(parts["dev"])
            == set(parts["finetune_dev"])
            == set(np.flatnonzero(images.splits == "val"))
        )
        assert set(parts["train"]) == set(np.flatnonzero(images.splits == "train"))


def test_a_file_beside_the_splits_is_refused(tmp_path):
    root = image_folder(
        tmp_path / "set", ["train/a/0.png", "train/b/0.png", "test/a/0.png", "preview.png"]
    )
    with pytest.raises(InputError, match="preview.png is in none of the splits test, train"):
        open_images(str(root))


def test_the_held_out_part_does_not_depend_on_the_packaging(tmp_path):
    root = image_folder(tmp_path / "set", [f"{c}/{i}.png" for c in "ab" for i in range(30)])
    sources = [open_images(str(source)) for source in (root, zipped(root, "top/"))]
    assert sources[0].ids == sources[1].ids and sources[0].fingerprint == sources[1].fingerprint
    assert np.array_equal(*(sampling.split(images)["test"] for images in sources))


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    root = image_folder(tmp_path / "set", CLASSES)
    (root / "a" / "loop").symlink_to(root)
    assert len(open_images(str(root))) == 12


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path, suffix):
    root = tmp_path / "set"
    root.mkdir()
    levels = (np.arange(400, dtype=np.uint16).reshape(20, 20) * 164).astype(np.uint16)
    Image.fromarray(levels).save(root / f"0.{suffix}")
    image = read_pixels(open_images(str(root)), [0])[0, 0].numpy()
    assert np.abs(image.astype(int) - levels / 257).max() <= 1 and len(np.unique(image)) > 200
    Image.fromarray(levels.astype(np.float32)).save(root / "0.tiff")
    (root / f"0.{suffix}").unlink(missing_ok=suffix == "png")
    if suffix == "tiff":
        Image.fromarray(levels.astype(np.float32)).save(root / "0.tiff")
    with pytest.raises(InputError, match="32-bit"):
        read_pixels(open_images(str(root)), [0])


def test_images_in_no_folder_have_no_label_and_are_all_for_pretraining(tmp_path):
    images = open_images(str(image_folder(tmp_path / "flat", [f"{i}.png" for i in range(6)])))
    assert not images.labeled and images.classes == []
    parts = sampling.split(images)
    assert len(parts["pretrain"]) == 6 and all(
        len(parts[name]) == 0 for name in ("train", "dev", "test")
    )


@pytest.mark.parametrize(("width", "height"), [(40, 25), (25, 40), (16, 16), (300, 17)])
def test_decoding_resizes_the_shorter_side_and_cuts_the_center(tmp_path, width, height):
    root = image_folder(tmp_path / "set", ["a/0.png", "b/0.png"], width=width, height=height)
    images = open_images(str(root))
    images.resize_store(16)
    image = read_pixels(images, [0])[0]
    scale = 16 / min(width, height)
    size = [max(16, round(height * scale)), max(16, round(width * scale))]
    expected = F.center_crop(
        F.resize(F.pil_to_tensor(picture(0, width, height)), size, antialias=True), [16, 16]
    )
    assert image.dtype == torch.uint8 and image.shape == (3, 16, 16)
    # Pillow and torchvision round differently at ties, and odd margins may be cut on either side by
    # one pixel.
    if (size[0] - 16) % 2 == 0 and (size[1] - 16) % 2 == 0:
        assert (image.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    root = tmp_path / "set"
    root.mkdir()
    for i in range(2):
        picture(i).convert("L" if mode == "LA" else mode).convert(mode).save(root / f"{i}.{suffix}")
    assert read_pixels(open_images(str(root)), [0, 1]).shape == (2, 3, 20, 20)


def test_batches_do_not_depend_on_threads_or_on_the_cache(tmp_path, monkeypatch):
    root = image_folder(tmp_path / "set", CLASSES)
    order = [np.array([3, 1, 4]), np.array([1, 5, 9]), np.array([2, 6, 5]), np.array([3, 5, 8])]
    cached = list(open_images(str(root)).batches(order, 3))
    monkeypatch.setattr("common.data.images._CACHE_BYTES", 0)
    single = open_images(str(root))
    decoded = list(single.batches(order, 1))
    assert all(torch.equal(a, b) for a, b in zip(cached, decoded, strict=True))
    assert single._cache is None


def damaged(root):
    image_folder(root, [f"{c}/{i:03d}.png" for c in "xy" for i in range(100)])
    whole = io.BytesIO()
    picture(0, 60, 60).save(whole, "JPEG")
    (root / "x" / "cut.jpg").write_bytes(whole.getvalue()[:-200])
    return root


@pytest.mark.parametrize("pack", [False, True])
def test_a_damaged_image_is_named(tmp_path, pack):
    root = damaged(tmp_path / "set")
    images = open_images(str(zipped(root) if pack else root))
    with pytest.raises(InputError, match=r"x/cut\.jpg in set"):
        read_pixels(images, range(len(images)))


def test_damaged_images_are_left_out_and_counted_up_to_one_percent(tmp_path):
    root = damaged(tmp_path / "set")
    said = []
    images = prepare(str(root), store_size=8, on_bad_item="skip", workers=2, say=said.append)
    assert len(images) == 200 and not any("cut" in name for name in images.ids)
    assert "left out 1 damaged image, the first is x/cut.jpg" in said[0]
    assert read_pixels(images, range(200)).shape == (200, 3, 8, 8)
    for i in range(2):
        (root / "y" / f"bad{i}.png").write_bytes(b"no image")
    with pytest.raises(
        InputError,
        match=r"3 of 203 images are damaged .* more than --on-bad-item skip allows \(1%\)",
    ):
        prepare(str(root), store_size=None, on_bad_item="skip", workers=2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p / "absent", "no such file or folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "no images there"),
        (
            lambda p: (p / "text.tar").write_text("x") and p / "text.tar",
            "allowed are a folder, a .zip",
        ),
        (lambda p: (p / "broken.zip").write_text("x") and p / "broken.zip", "not a readable zip"),
    ],
)
def test_data_that_cannot_be_used_is_refused(tmp_path, make, said):
    with pytest.raises(InputError, match=said):
        open_images(str(make(tmp_path)))


def test_a_misspelled_path_gets_the_nearest_name(tmp_path):
    image_folder(tmp_path / "cells", ["a/0.png"])
    with pytest.raises(InputError, match="did you mean cells?"):
        open_images(str(tmp_path / "cels"))


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
        sampling.epoch_batches(indices, 8, 3, 2, 0, Dist(rank, 2, rank, torch.device("cpu")))
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
        sampling.balanced_batches(
            indices, labels, 12, 3, 2, 0, Dist(rank, 3, rank, torch.device("cpu"))
        )
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


def test_the_sample_is_as_large_as_promised():
    images = open_images("sample")
    assert len(images) >= 1024 and images.store_size == 64 and images.labeled
    with pytest.raises(InputError, match="stored at 64 px"):
        images.resize_store(32)


def test_fingerprint_follows_the_content(tmp_path):
    root = image_folder(tmp_path / "set", CLASSES)
    before = open_images(str(root)).fingerprint
    assert open_images(str(root)).fingerprint == before
    picture(99, 30, 30).save(root / "a" / "0.png")
    assert open_images(str(root)).fingerprint != before


def test_labels_are_renumbered_to_the_models_classes(tmp_path):
    images = open_images(str(image_folder(tmp_path / "set", ["b/0.png", "b/1.png", "a/0.png"])))
    assert images.labels_in(["z", "b", "a"]).tolist() == [2, 1, 1]
    assert images.labels_in(["b"]).tolist() == [-1, 0, 0]
    every = np.arange(3)
    assert images.labels_in(["z", "b", "a"], every).tolist() == [2, 1, 1]
    assert images.labels_in(["b"], every[1:]).tolist() == [-1, 0, 0]
    with pytest.raises(InputError, match="has the class 'a', the model has b"):
        images.labels_in(["b"], every)


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
    """RAER's counts: min(N / (K n_c), cap) n_c, normalized; 100,000 draws within three deviations."""
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
        sampling.batch_slices(orders[0], 2, 0, Dist(rank, 2, rank, torch.device("cpu")))
        for rank in (0, 1)
    ]
    assert all(
        np.array_equal(a, np.concatenate(b))
        for a, b in zip(batches, zip(*ranks, strict=True), strict=True)
    )
