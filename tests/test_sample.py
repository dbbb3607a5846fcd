"""The embedded data sets: the same bytes everywhere, learnable, and by no short cut."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.sample import cytology

ROOT = Path(__file__).resolve().parents[1]
NUM_CLASSES = 8
PINNED = "35a9fdbee1ddd0e944a868a0aecaffc44091f50b1f57cbd486b3b865959a26b4"  # of cytology(200)


def digest(images, labels):
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def cells():
    return cytology()


@pytest.fixture(scope="module")
def split(cells):
    """Positions (train, test) of a random four fifths and the rest; the images are shuffled already."""
    num_train = len(cells[1]) * 4 // 5
    return slice(0, num_train), slice(num_train, None)


def test_cytology_shapes_names_and_shares(cells):
    images, labels, names = cells
    assert images.shape == (1280, 3, 64, 64) and images.dtype == np.uint8 and images.flags.c_contiguous
    assert labels.shape == (1280,) and labels.dtype == np.int64
    assert len(names) == len(set(names)) == NUM_CLASSES
    counts = np.bincount(labels)
    assert len(counts) == NUM_CLASSES and 1.3 < counts.max() / counts.min() < 2, counts


@pytest.mark.parametrize("num_images", [8, 50, 203])
def test_cytology_every_class_at_any_count_and_size(num_images):
    images, labels, _ = cytology(num_images, size=40, seed=3)
    assert images.shape == (num_images, 3, 40, 40)
    assert set(labels.tolist()) == set(range(NUM_CLASSES))


@pytest.mark.parametrize("num_images, size", [(7, 64), (100, 15)])
def test_cytology_refuses_what_it_cannot_draw(num_images, size):
    with pytest.raises(ValueError, match=f"num_images={num_images}, size={size}"):
        cytology(num_images, size)


def test_cytology_bytes_are_the_seed_s_alone(cells):
    first = digest(*cytology(40, seed=5)[:2])
    np.random.seed(0)  # the global generator has no say
    assert first == digest(*cytology(40, seed=5)[:2])
    code = "from tests.test_sample import digest, cytology; print(digest(*cytology(40, seed=5)[:2]))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == first
    assert len({first, digest(*cytology(40, seed=6)[:2]), digest(cells[0][:40], cells[1][:40])}) == 3


def test_cytology_bytes_are_pinned():
    """The same with NumPy 1.26 and 2.4, and with AVX2, FMA and AVX-512 turned off. A change of the pictures changes it,
    and every figure measured on them."""
    assert digest(*cytology(200)[:2]) == PINNED


def test_cytology_uses_only_exactly_rounded_operations():
    """`exp`, `sin` and their kin, and BLAS, differ in the last bit between machines; so would the bytes."""
    source = (ROOT / "common" / "sample.py").read_text()
    body = source.split('"""', 2)[2]
    inexact = ("exp", "log", "sin", "cos", "tan", "power", "hypot", "arctan2", "einsum", "matmul", "dot", "normal")
    used = [name for name in inexact if f"np.{name}(" in body or f"rng.{name}(" in body]
    assert not used and " @ " not in body and " ** " not in body


def test_cytology_no_two_images_are_alike(cells):
    images = cells[0].reshape(len(cells[0]), -1)
    assert len({image.tobytes() for image in images}) == len(images)
    some = images[:, ::7].astype(np.float32)
    squares = (some * some).sum(1)
    distance = (squares[:, None] + squares - 2 * some @ some.T) / some.shape[1]
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 16  # a root mean square of 4 grey levels: not one picture twice with new noise


def test_cytology_mean_colour_does_not_tell_the_class(cells, split):
    images, labels, _ = cells
    train, test = split
    colour = images.mean((2, 3))
    means = np.stack([colour[train][labels[train] == k].mean(0) for k in range(NUM_CLASSES)])
    nearest = ((colour[test][:, None] - means) ** 2).sum(2).argmin(1)
    accuracy = (nearest == labels[test]).mean()
    assert accuracy < 0.3, accuracy  # chance: 0.125; the largest class: 0.16


def test_cytology_pixels_are_not_linearly_separable(cells, split):
    """Ridge regression to the classes from 32 x 32 pixels, at the penalty that is best on the test images."""
    images, labels, _ = cells
    train, test = split
    pixels = images.reshape(-1, 3, 32, 2, 32, 2).mean((3, 5), dtype=np.float32).reshape(len(images), -1)
    pixels = (pixels - pixels[train].mean(0)) / pixels[train].std(0)
    target = np.eye(NUM_CLASSES, dtype=np.float32)[labels]
    gram = pixels[train] @ pixels[train].T
    accuracies = []
    for penalty in (1e2, 1e3, 1e4, 1e5):
        weights = np.linalg.solve(gram + penalty * np.eye(len(gram), dtype=np.float32), target[train] - target.mean(0))
        scores = pixels[test] @ (pixels[train].T @ weights) + target.mean(0)
        accuracies.append((scores.argmax(1) == labels[test]).mean())
    assert 0.2 < max(accuracies) < 0.55, accuracies
