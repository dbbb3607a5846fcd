"""Which frames form a clip, their pixels in a batch, and the augmentation that all frames of a clip
share.
"""

import sys
import types

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from common.data import augment, clips
from common.data.images import Images
from common.errors import InputError
from common.run import content, dist


def videos(lengths, size=8, rates=25.0, labels=None):
    """Videos whose k-th frame of all is filled with the number k."""
    count = sum(lengths)
    pixels = (
        torch.arange(count, dtype=torch.uint8)[:, None, None, None]
        .expand(count, 3, size, size)
        .contiguous()
    )
    images = Images(
        "made", [str(i) for i in range(count)], [-1] * count, [], [""] * count, pixels=pixels
    )
    ends = np.cumsum(lengths)
    frames = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    names = [f"v{i}" for i in range(len(lengths))]
    labels = [0] * len(lengths) if labels is None else labels
    return clips.Videos(
        "made", names, labels, ["a", "b"], [""] * len(lengths), frames, rates, images
    )


@pytest.mark.parametrize(
    ("length", "rate", "n_segment", "seconds", "expected"),
    [
        (300, 25, 8, 2.0, [0, 6, 12, 18, 25, 31, 37, 43]),  # an interval of 50 / 8 frames
        (16, 8, 8, 2.0, [0, 2, 4, 6, 8, 10, 12, 14]),
        (
            10,
            25,
            8,
            2.0,
            [0, 1, 2, 3, 5, 6, 7, 9],
        ),  # shrunk to 9 / 7: the whole video, every frame at most once
        (8, 25, 8, 2.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (5, 25, 8, 2.0, [0, 1, 2, 3, 4, 4, 4, 4]),  # too few: the last is repeated
        (1, 25, 4, 2.0, [0, 0, 0, 0]),
        (300, 2, 8, 2.0, [0, 1, 2, 3, 4, 5, 6, 7]),  # never the same frame twice for want of rate
        (300, 25, 1, 2.0, [0]),
    ],
)
def test_offsets_of_a_clip(length, rate, n_segment, seconds, expected):
    assert clips.clip_offsets([length], [rate], n_segment, seconds).tolist() == [expected]


def test_shrunk_clips_span_the_whole_video_with_distinct_frames():
    for length in range(2, 60):
        for n_segment in range(2, 17):
            offsets = clips.clip_offsets([length], [25.0], n_segment, 2.0)[0]
            if n_segment <= length <= 50 // n_segment * (n_segment - 1):
                assert offsets[-1] == length - 1, (length, n_segment)
            assert (np.diff(offsets) > 0).all() == (length >= n_segment)
            assert offsets.min() == 0 and offsets.max() < length


def test_training_starts_are_uniform_over_all_that_fit():
    made = videos([60] * 200)
    starts = np.concatenate(
        [made.train_clips(np.arange(200), 0, epoch, 8, 2.0)[:, 0] for epoch in range(40)]
    )
    counts = np.bincount(starts, minlength=17)
    assert len(counts) == 60 - 43  # the last start leaves 44 frames
    expected = len(starts) / len(counts)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 39.3  # 16 degrees of freedom, exceeded once in a thousand draws


def test_a_training_clip_is_a_function_of_seed_epoch_and_video():
    made = videos([100] * 50)
    everything = np.arange(50)
    whole = made.train_clips(everything, 1, 2, 8, 2.0)
    assert np.array_equal(made.train_clips(everything[[7, 3]], 1, 2, 8, 2.0), whole[[7, 3]])
    for seed, epoch in ((2, 2), (1, 3)):
        assert (made.train_clips(everything, seed, epoch, 8, 2.0) != whole).any()


@pytest.mark.parametrize(
    ("length", "count", "starts"),
    [(60, 1, [8]), (60, 2, [0, 16]), (60, 3, [0, 8, 16]), (10, 3, [0, 0, 0]), (3, 2, [0, 0])],
)
def test_evaluation_clips_are_evenly_spaced(length, count, starts):
    cut = clips.eval_clips([length], [25.0], 8, 2.0, count)[0]
    assert cut[:, 0].tolist() == starts
    offsets = clips.clip_offsets([length], [25.0], 8, 2.0)[0]
    assert np.array_equal(cut - cut[:, :1], np.tile(offsets, (count, 1)))


def test_batches_give_each_clip_its_videos_frames():
    made = videos([10, 3, 20])
    cut = [
        (np.array([2, 0]), np.array([[0, 19, 5], [9, 9, 1]])),
        (np.array([1]), np.array([[2, 0]])),
    ]
    for workers in (1, 3):
        first, second = made.batches(cut, workers)
        assert (
            first.dtype == torch.uint8
            and first.shape == (2, 3, 3, 8, 8)
            and second.shape == (1, 2, 3, 8, 8)
        )
        assert first[..., 0, 0, 0].tolist() == [[13, 32, 18], [9, 9, 1]]
        assert second[..., 0, 0, 0].tolist() == [[12, 10]]


def test_a_selection_keeps_frames_with_their_videos():
    made = videos([10, 3, 20], rates=[1, 2, 3], labels=[0, 1, 0])
    made.select(np.array([2, 1]))
    assert (
        made.ids == ["v2", "v1"]
        and made.labels.tolist() == [0, 1]
        and made.rates.tolist() == [3, 2]
    )
    (pixels,) = made.batches([(np.array([0, 1]), np.array([[0], [2]]))], 1)
    assert pixels[:, 0, 0, 0, 0].tolist() == [13, 12]


def test_the_lines_for_people_count_and_name_short_videos():
    made = videos([100, 20, 5, 45], labels=[0, 1, 1, 1])
    assert (
        made.describe()
        == "made: 4 videos of 5 to 100 frames in 2 classes (b 3, a 1); 8 px, stored at 8 px"
    )
    said = made.describe_clips(8, 2.0)
    assert "1 of 4 videos are shorter and shrink the interval (first: v1)" in said
    assert (
        "1 of 4 videos are shorter and have fewer than 8 frames and repeat the last (first: v2)"
        in said
    )
    assert videos([100]).describe_clips(8, 2.0) == "clips of 8 frames over 2 s"
    sparse = videos([100, 100], rates=8.0).describe_clips(8, 0.5)
    assert "2 of 2 videos have fewer than 16 frames a second and stretch it (first: v0)" in sparse


def test_the_fingerprint_follows_frames_labels_rates_and_splits():
    prints = [
        made.fingerprint
        for made in (
            videos([4, 4]),
            videos([5, 3]),
            videos([4, 4], labels=[0, 1]),
            videos([4, 4], rates=30.0),
        )
    ]
    assert len(set(prints)) == 4 and prints[0] == videos([4, 4]).fingerprint


def test_numbers_in_names_are_sorted_by_value():
    names = ["a/10.png", "a/9.png", "a/0001.png", "b/2.png", "a/frame2.png", "a/frame11.png"]
    ordered = sorted(names, key=clips.natural_order)
    assert ordered == [
        "a/0001.png",
        "a/9.png",
        "a/10.png",
        "a/frame2.png",
        "a/frame11.png",
        "b/2.png",
    ]


def test_a_clips_frames_share_one_draw_and_equal_torchvision():
    size, length, generator = 12, 4, torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (6, length, 3, size, size), generator=generator, dtype=torch.uint8
    )
    params = augment.clip_params(3, 1, np.arange(6), 0, size)
    views = augment.make_view(pixels.flatten(0, 1), params.repeat(length), size).unflatten(
        0, (6, length)
    )
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    assert 0 < params.flip.sum() < 6
    for row, clip in enumerate(pixels):
        video = clip.float() / 255  # [T, 3, H, W], as torchvision takes a video
        if params.flip[row]:
            video = F.horizontal_flip(video)
        for op in params.order[row]:
            video = adjust[op](video, float(params.factors[row, op]))
        torch.testing.assert_close(views[row], video, atol=1e-5, rtol=0)


def test_clip_draws_have_the_recipes_ranges():
    params = augment.clip_params(0, 0, np.arange(20_000), 0, 32)
    jitter = v2.ColorJitter(0.2, 0.2, 0.2, 0.1)
    ranges = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
    assert (params.factors >= ranges[:, 0]).all() and (params.factors <= ranges[:, 1]).all()
    width = ranges[:, 1] - ranges[:, 0]
    assert np.allclose(
        params.factors.mean(0), ranges.mean(1), atol=4 * width.max() / np.sqrt(12 * 20_000)
    )
    assert np.allclose(params.factors.std(0), width / np.sqrt(12), rtol=0.02)
    assert (
        abs(params.flip.mean() - 0.5) < 0.015
        and params.jittered.all()
        and not params.grayscale.any()
    )
    counts = np.unique(params.order @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(counts) == 24 and np.abs(counts / 20_000 * 24 - 1).max() < 0.15
    assert not augment.clip_params(0, 0, np.arange(3), 0, 32, spread=(0, 0, 0, 0)).jittered.any()
    with pytest.raises(ValueError, match="spread"):
        augment.clip_params(0, 0, np.arange(3), 0, 32, spread=(0.2, 0.2, 0.2, 0.6))


class Decoder:
    """A stand-in for torchcodec's VideoDecoder: a file is its number of frames and its rate in
    words.
    """

    opened = []

    def __init__(self, content):
        count, rate = content.decode().split()
        self.count = int(count)
        self.metadata = types.SimpleNamespace(average_fps=float(rate) or None, height=12, width=16)
        Decoder.opened.append(content)

    def __len__(self):
        return self.count

    def get_frames_at(self, indices):
        frames = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(
            len(indices), 3, 12, 16
        )
        return types.SimpleNamespace(data=frames)


@pytest.fixture
def torchcodec(monkeypatch):
    module = types.SimpleNamespace(VideoDecoder=Decoder)
    monkeypatch.setitem(sys.modules, "torchcodec", types.SimpleNamespace(decoders=module))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    Decoder.opened.clear()


FILES = [b"30 25", b"no video", b"12 30"]


def video_files(workers=2):
    names = ["a.mp4", "b.mp4", "c.mp4"]
    return clips.VideoFiles("made", names, [5, 8, 5], lambda index: FILES[index], workers)


def test_video_files_are_opened_once_a_batch(torchcodec, monkeypatch):
    monkeypatch.setattr("common.data.images._CACHE_BYTES", 0)
    images = video_files()
    assert images.counts.tolist() == [30, 0, 12] and images.rates[[0, 2]].tolist() == [25, 30]
    assert list(images.errors) == [1] and images.native_size == 12
    Decoder.opened.clear()
    (pixels,) = images.batches([np.array([29, 0, 30, 41, 0])], 2)
    assert pixels.shape == (5, 3, 12, 12) and pixels[:, 0, 0, 0].tolist() == [29, 0, 0, 11, 0]
    assert sorted(Decoder.opened) == [FILES[2], FILES[0]]
    assert torch.equal(images.decode(41), pixels[3])


def test_a_video_that_breaks_off_is_named(torchcodec, monkeypatch):
    def fail(self, indices):
        raise RuntimeError("could not seek\nlong story")

    images = video_files()
    monkeypatch.setattr(Decoder, "get_frames_at", fail)
    with pytest.raises(
        InputError, match=r"video c\.mp4#3 in made cannot be read: could not seek; fix"
    ):
        list(images.batches([np.array([33])], 1))


def test_a_video_file_of_other_bytes_is_refused_when_it_is_decoded(
    torchcodec, monkeypatch, tmp_path
):
    monkeypatch.setattr(content, "_TRIED", 0)
    world = dist.Dist(0, 1, torch.device("cpu"))

    def start():
        images = video_files()
        record = content.load(tmp_path, print)
        images.content.take_over(record, tmp_path, world, force=False, workers=1)
        return images

    images = start()
    list(images.batches([np.array([3, 33])], 1))
    images.content.save(world, print)
    monkeypatch.setattr(sys.modules[__name__], "FILES", [b"30 24", *FILES[1:]])
    images = start()
    images.decode(33)
    with pytest.raises(InputError, match=r"^a\.mp4 has other content than when the run in"):
        images.decode(3)


@pytest.mark.parametrize("content", [b"0 25", b"12 0"])
def test_a_video_file_without_frames_or_rate_cannot_be_used(torchcodec, monkeypatch, content):
    monkeypatch.setattr(sys.modules[__name__], "FILES", [FILES[0], content, FILES[2]])
    images = video_files()
    assert images.errors == {
        1: "it says no number of frames, rate or size"
    } and images.counts.tolist() == [30, 0, 12]


def test_no_readable_video_file_is_refused(torchcodec):
    with pytest.raises(InputError, match=r"no video file can be read; the first, b\.mp4: "):
        clips.VideoFiles("made", ["b.mp4"], [8], lambda index: FILES[1], 1)


def test_without_torchcodec_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(InputError, match="pip install torchcodec"):
        video_files()


def test_real_video_files_decode_as_torchcodec_does(tmp_path):
    pytest.importorskip("torchcodec", reason="pip install torchcodec, and FFmpeg")
    from torchcodec.decoders import VideoDecoder
    from torchcodec.encoders import VideoEncoder

    ramp = (
        torch.arange(0, 240, 8, dtype=torch.uint8)[:, None, None, None]
        .expand(30, 3, 64, 64)
        .contiguous()
    )
    VideoEncoder(ramp, frame_rate=25).to_file(str(tmp_path / "a.mp4"))
    content = (tmp_path / "a.mp4").read_bytes()
    images = clips.VideoFiles("made", ["a.mp4"], [len(content)], lambda index: content, 1)
    assert images.counts.tolist() == [30] and images.rates.tolist() == [25]
    (pixels,) = images.batches([np.array([3, 20, 7])], 1)
    assert torch.equal(pixels, VideoDecoder(content).get_frames_at([3, 20, 7]).data)
