"""The embedded data sets: the same bytes everywhere, learnable, and by no short cut."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data import synthetic
from common.data.clips import eval_clips
from common.data.synthetic import cytology, emotion_clips, face_clips

ROOT = Path(__file__).resolve().parents[1]
NUM_CLASSES = 8
PINNED = "35a9fdbee1ddd0e944a868a0aecaffc44091f50b1f57cbd486b3b865959a26b4"  # of cytology(200)
# of face_clips(variant, 18, size=32)
PINNED_ORDER = "3e8a845b608a15692b343d06700deb486ded47b7230a2014b697c1d912e5e3cf"
PINNED_FLICKER = "4d041364602301dc76ef196f0f63de493d07a1c4db69c4b0b040c8241ec54415"
PINNED_EMOTIONS = "e8f763bb80b12bafb5807169963e135e1967eeb5388279eaadf05fe84bbca121"


def digest(images, labels):
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def cells():
    return cytology()


@pytest.fixture(scope="module")
def split(cells):
    """Positions (train, test) of a random four fifths and the rest; the images are shuffled
    already.
    """
    num_train = len(cells[1]) * 4 // 5
    return slice(0, num_train), slice(num_train, None)


def test_cytology_shapes_names_and_shares(cells):
    images, labels, names = cells
    assert (
        images.shape == (1280, 3, 64, 64) and images.dtype == np.uint8 and images.flags.c_contiguous
    )
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
    code = "from tests import test_synthetic as t; print(t.digest(*t.cytology(40, seed=5)[:2]))"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == first
    assert (
        len({first, digest(*cytology(40, seed=6)[:2]), digest(cells[0][:40], cells[1][:40])}) == 3
    )


def test_cytology_bytes_are_pinned():
    """The same with NumPy 1.26 and 2.4, and with AVX2, FMA and AVX-512 turned off. A change of the
    pictures changes it, and every figure measured on them.
    """
    assert digest(*cytology(200)[:2]) == PINNED


def test_cytology_uses_only_exactly_rounded_operations():
    """`exp`, `sin` and their kin, and BLAS, differ in the last bit between machines; so would the
    bytes.
    """
    source = (ROOT / "common" / "data" / "synthetic.py").read_text()
    body = source.split('"""', 2)[2]
    inexact = (
        "exp",
        "log",
        "sin",
        "cos",
        "tan",
        "power",
        "hypot",
        "arctan2",
        "einsum",
        "matmul",
        "dot",
        "normal",
    )
    used = [name for name in inexact if f"np.{name}(" in body or f"rng.{name}(" in body]
    assert not used and " @ " not in body and " ** " not in body


def test_cytology_no_two_images_are_alike(cells):
    images = cells[0].reshape(len(cells[0]), -1)
    assert len({image.tobytes() for image in images}) == len(images)
    pixels = images[:, ::7].astype(np.float32)
    squares = (pixels * pixels).sum(1)
    distance = (squares[:, None] + squares - 2 * pixels @ pixels.T) / pixels.shape[1]
    np.fill_diagonal(distance, np.inf)
    assert (
        distance.min() > 16
    )  # a root mean square of 4 gray levels: not one picture twice with new noise


def test_cytology_mean_color_does_not_tell_the_class(cells, split):
    images, labels, _ = cells
    train, test = split
    color = images.mean((2, 3))
    means = np.stack([color[train][labels[train] == k].mean(0) for k in range(NUM_CLASSES)])
    nearest = ((color[test][:, None] - means) ** 2).sum(2).argmin(1)
    accuracy = (nearest == labels[test]).mean()
    assert accuracy < 0.3, accuracy  # chance: 0.125; the largest class: 0.16


def test_cytology_pixels_are_not_linearly_separable(cells, split):
    """Ridge regression to the classes from 32 x 32 pixels, at the penalty that is best on the test
    images.
    """
    images, labels, _ = cells
    train, test = split
    pixels = (
        images.reshape(-1, 3, 32, 2, 32, 2).mean((3, 5), dtype=np.float32).reshape(len(images), -1)
    )
    pixels = (pixels - pixels[train].mean(0)) / pixels[train].std(0)
    target = np.eye(NUM_CLASSES, dtype=np.float32)[labels]
    gram = pixels[train] @ pixels[train].T
    accuracies = []
    for penalty in (1e2, 1e3, 1e4, 1e5):
        weights = np.linalg.solve(
            gram + penalty * np.eye(len(gram), dtype=np.float32), target[train] - target.mean(0)
        )
        scores = pixels[test] @ (pixels[train].T @ weights) + target.mean(0)
        accuracies.append((scores.argmax(1) == labels[test]).mean())
    assert 0.2 < max(accuracies) < 0.55, accuracies


@pytest.fixture(scope="module")
def order():
    return face_clips("order")


def twins(clips):
    """(real, its fakes) as positions of videos."""
    reals = [i for i, name in enumerate(clips.names) if "_" not in name]
    return [
        (i, [k for k, name in enumerate(clips.names) if name.startswith(clips.names[i] + "_")])
        for i in reals
    ]


@pytest.mark.parametrize("variant", ["order", "flicker"])
def test_face_clips_are_pairs_in_disjoint_splits_five_to_one(variant):
    clips = face_clips(variant, num_faces=36, size=16)
    assert clips.pixels.shape[1:] == (3, 16, 16) and clips.pixels.dtype == np.uint8
    assert (
        len(clips.names)
        == len(set(clips.names))
        == len(clips.splits)
        == len(clips.frames)
        == 36 * 6
    )
    assert {len(frames) for frames in clips.frames} == {16}
    part_of = {}
    for name, part in zip(clips.names, clips.splits, strict=True):
        for face in name.split("_"):
            assert part_of.setdefault(face, part) == part, name
    assert [list(part_of.values()).count(part) for part in ("train", "val", "test")] == [24, 6, 6]
    fakes = {name for name in clips.names if "_" in name}
    assert fakes == {
        "_".join(reversed(name.split("_"))) for name in fakes
    }  # both orders of every pair
    assert all(len(fakes) == 5 for _, fakes in twins(clips))


def test_order_fakes_have_exactly_the_frames_of_their_real_video_backwards(order):
    for real, fakes in twins(order):
        shown = order.pixels[order.frames[real]]
        assert len({frame.tobytes() for frame in shown}) == 16  # no frame twice: an order is seen
        for fake in fakes:
            again = order.pixels[order.frames[fake]]
            assert sorted(map(bytes, again)) == sorted(map(bytes, shown))
            start = next(k for k in range(16) if np.array_equal(again[k], shown[0]))
            assert np.array_equal(np.roll(again, -start, 0), np.roll(shown[::-1], 1, 0))


def test_order_clips_have_the_same_sets_of_frames_whatever_their_start(order):
    """The clips of 8 frames that training draws from a fake video are its real one's, as sets of
    frames.
    """

    positions = eval_clips([16], order.rate, 8, 2.0, 2)[0]  # both starts that training can draw
    for real, fakes in twins(order)[:12]:
        sets = [
            {frozenset(order.frames[video][clip].tolist()) for clip in positions}
            for video in (real, *fakes)
        ]
        assert len(sets[0]) == 2 and all(other == sets[0] for other in sets)


def test_order_shows_in_successive_frames(order):
    """The light fades slowly and returns at once: the third moment of its changes, which no
    order-free score sees.
    """
    light = order.pixels.mean((1, 2, 3))
    score = np.array([(np.diff(light[frames[::2]]) ** 3).mean() for frames in order.frames])
    fake = np.array(["_" in name for name in order.names])
    assert score[~fake].min() > 0 > score[fake].max()


def test_flicker_shows_over_time_and_not_in_a_frame():
    clips = face_clips("flicker", num_faces=36, size=32)
    fake = np.array(["_" in name for name in clips.names])
    inner = clips.pixels[np.stack(clips.frames), :, 14:24, 10:22].mean(
        (3, 4), dtype=np.float64
    )  # [videos, 16, 3]
    outer = clips.pixels[np.stack(clips.frames), :, 26:].mean((3, 4), dtype=np.float64)
    color = inner[..., 0] / inner[..., 2]
    unrest = np.abs(np.diff(color, axis=1)).mean(1)
    # Any real and any fake video of one face differ; between faces the same flicker differs with
    # the skin.
    assert all(unrest[real] < unrest[fakes].min() for real, fakes in twins(clips))
    first = [(color[real, 0], color[fakes, 0].mean()) for real, fakes in twins(clips)]
    below = np.mean([real < mean for real, mean in first])
    assert 0.25 < below < 0.75, below
    assert np.abs(outer[~fake].mean() - outer[fake].mean()) < 1


def test_face_clips_bytes_are_pinned():
    clips = face_clips("order", num_faces=18, size=32)
    assert (
        hashlib.sha256(clips.pixels.tobytes() + np.stack(clips.frames).tobytes()).hexdigest()
        == PINNED_ORDER
    )
    clips = face_clips("flicker", num_faces=18, size=32)
    assert (
        hashlib.sha256(clips.pixels.tobytes() + np.stack(clips.frames).tobytes()).hexdigest()
        == PINNED_FLICKER
    )


@pytest.mark.parametrize(
    "changed",
    [{"variant": "other"}, {"num_faces": 17}, {"num_faces": 20}, {"num_frames": 1}, {"size": 8}],
)
def test_face_clips_refuse_what_they_cannot_draw(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        face_clips(**{"variant": "order"} | changed)


@pytest.fixture(scope="module")
def emotions():
    return emotion_clips(share=0.05, val=[6] * 5, test=[8] * 5, size=20)


def backwards(clips):
    return clips[:, ::-1]


def test_emotion_clips_have_raers_shares(emotions):
    splits = np.array(emotions.splits)
    assert emotions.face.shape == emotions.context.shape == (154, 8, 3, 20, 20)
    assert (
        emotions.face.dtype == emotions.context.dtype == np.uint8
        and emotions.labels.dtype == np.int64
    )
    assert np.bincount(emotions.labels[splits == "train"]).tolist() == [
        55,
        5,
        1,
        6,
        17,
    ]  # 1106, 103, 24, 126, 338 / 20
    assert np.bincount(emotions.labels[splits == "val"]).tolist() == [6] * 5
    assert np.bincount(emotions.labels[splits == "test"]).tolist() == [8] * 5
    assert len({clip.tobytes() for clip in emotions.context}) == 154
    assert (np.diff(emotions.labels[splits == "train"]) < 0).any()  # shuffled


def test_emotion_clips_of_one_draw_differ_by_order_alone_and_each_stream_is_shared():
    """The same draws as every class: the classes but distraction have the same frames in both
    streams, and each stream of a class is another class's too, so one stream, or both without the
    order, cannot tell it.
    """
    made = []
    for label in range(5):
        rng = np.random.Generator(np.random.PCG64(3))
        made.append(synthetic._emotion(np.full(12, label), 8, 20, 0.5, 0.5, rng))
    (neutral, enjoyment, confusion, fatigue), distraction = made[:4], made[4]
    face, context = neutral
    assert (face != backwards(face)).any((1, 2, 3, 4)).all() and (
        context != backwards(context)
    ).any((1, 2, 3, 4)).all()
    for (own_face, own_context), rises in (
        (enjoyment, (1, 1)),
        (confusion, (1, 0)),
        (fatigue, (0, 1)),
    ):
        assert np.array_equal(own_face, backwards(face) if rises[0] else face)
        assert np.array_equal(own_context, backwards(context) if rises[1] else context)
    # Distraction's faces are of either order; its contexts have something in every frame.
    same = (distraction[0] == face).all((1, 2, 3, 4))
    assert 0 < same.sum() < 12 and np.array_equal(distraction[0][~same], backwards(face)[~same])
    assert (np.sort(distraction[1], 1) != np.sort(context, 1)).any((2, 3, 4)).all()


def test_emotion_clips_show_their_class_in_the_order_of_light():
    """The light of a stream falls as its value rises; where the drift is small against the unrest,
    not for sure.
    """
    clips = emotion_clips(share=0.05, val=[40] * 5, test=[40] * 5, size=16)
    time = np.arange(8) - 3.5
    falls = [(-(stream.mean((2, 3, 4)) @ time) < 0) for stream in (clips.face, clips.context)]
    right = []
    for label, rises in enumerate(((0, 0), (1, 1), (1, 0), (0, 1))):
        of_label = clips.labels == label
        right += [(fall[of_label] != rise).mean() for fall, rise in zip(falls, rises, strict=True)]
    assert min(right) > 0.75 and np.mean(right) < 0.999, right
    of_label = clips.labels == 4
    assert all(0.3 < fall[of_label].mean() < 0.7 for fall in falls)


def test_emotion_clips_bytes_are_the_seed_s_alone(emotions):
    again = emotion_clips(share=0.05, val=[6] * 5, test=[8] * 5, size=20)
    assert np.array_equal(again.face, emotions.face) and np.array_equal(
        again.context, emotions.context
    )
    other = emotion_clips(share=0.05, val=[6] * 5, test=[8] * 5, size=20, seed=1)
    assert (other.face != emotions.face).any() and (other.labels != emotions.labels).any()
    content = emotions.face.tobytes() + emotions.context.tobytes() + emotions.labels.tobytes()
    assert hashlib.sha256(content).hexdigest() == PINNED_EMOTIONS


@pytest.mark.parametrize(
    "changed",
    [
        {"share": 0},
        {"share": 1.5},
        {"num_frames": 1},
        {"size": 15},
        {"trend": -0.1},
        {"unrest": 1.1},
    ],
)
def test_emotion_clips_refuse_what_they_cannot_draw(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        emotion_clips(**changed)


def test_the_embedded_data_is_as_imbalanced_as_promised_and_pure():
    modalities, labels, classes = synthetic.utterances()
    counts = np.bincount(labels)
    assert len(classes) == len(counts) == 12 and counts.max() / counts.min() == pytest.approx(
        38.8, abs=1
    )
    again = synthetic.utterances()
    assert np.array_equal(labels, again[1]) and all(
        np.array_equal(x, again[0][n]) for n, x in modalities.items()
    )
    with pytest.raises(ValueError, match="num_utterances=100"):
        synthetic.utterances(100)
