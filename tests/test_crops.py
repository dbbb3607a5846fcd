"""Crops of faces: one face a video, square, smooth, where the boxes say, at its own times."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import __main__, clips, crops, faceforensics
from tests.data import METHODS, numbered_ffpp


def scene(folder, boxes, size=(160, 96), first=0):
    """Frames in which every box shows its frame's number, in red."""
    folder.mkdir(parents=True)
    for frame, found in boxes.items():
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        for x1, y1, x2, y2 in found:
            pixels[y1:y2, x1:x2, 0] = 100 + frame
        Image.fromarray(pixels).save(folder / f"{first + frame:03d}.png")


def crop(tmp_path, known, *flags):
    (tmp_path / "boxes.json").write_text(json.dumps(known))
    command = ["crop-faces", str(tmp_path / "in"), str(tmp_path / "out")]
    return __main__.main([*command, "--boxes", str(tmp_path / "boxes.json"), *flags])


def test_a_face_at_rest_is_cut_as_its_box_says(tmp_path, capsys):
    boxes = {frame: [[100, 20, 120, 50]] for frame in range(4)}
    scene(tmp_path / "in/real/a", boxes)
    assert crop(tmp_path, {"real/a": boxes}) == 0
    for frame in range(4):
        image = np.array(Image.open(tmp_path / f"out/real/a/{frame:03d}.png"))
        source = np.array(Image.open(tmp_path / f"in/real/a/{frame:03d}.png"))
        # 39 = 1.3 * 30, around (110, 35).
        assert (image == source[16:55, 90:129]).all() and image.shape == (39, 39, 3)
    assert "1 video written" in capsys.readouterr().out


def test_a_square_that_reaches_beyond_the_picture_is_moved_into_it(tmp_path):
    scene(tmp_path / "in/real/a", {0: [[0, 60, 30, 96]]})
    scene(tmp_path / "in/real/b", {0: [[0, 0, 160, 96]]})
    crop(tmp_path, {"real/a": {0: [[0, 60, 30, 96]]}, "real/b": {0: [[0, 0, 160, 96]]}})
    source = np.array(Image.open(tmp_path / "in/real/a/000.png"))
    assert (np.array(Image.open(tmp_path / "out/real/a/000.png")) == source[-47:, :47]).all()
    assert Image.open(tmp_path / "out/real/b/000.png").size == (96, 96)


def test_the_larger_of_two_faces_is_followed_through_misses(tmp_path, capsys):
    large = {t: [40 + 2 * t, 10, 90 + 2 * t, 60] for t in range(12)}
    small = [2, 2, 20, 20]
    boxes = {t: ([small, box] if t % 2 else [box, small]) for t, box in large.items()}
    boxes[5] = [small]
    scene(tmp_path / "in/real/a", boxes)
    crop(tmp_path, {"real/a": boxes})
    (track,) = (t for t in crops.tracks(as_arrays(boxes)) if t[0][2] > 50)
    assert track[5].tolist() == large[5] and sorted(track) == list(range(12))
    assert len(list((tmp_path / "out/real/a").iterdir())) == 12
    said = capsys.readouterr().out
    assert "left out 1 face beside the one that covers the most, in 1 video: real/a" in said


def as_arrays(boxes):
    return {t: np.array(found, float).reshape(-1, 4) for t, found in boxes.items()}


def test_faces_that_cross_keep_their_tracks_and_a_jump_begins_another():
    boxes = {t: [[10 * t, 0, 10 * t + 40, 40], [90, 0, 130, 40]] for t in range(4)}
    boxes |= {t: [[300, 300, 340, 340]] for t in range(4, 6)}
    found = crops.tracks(as_arrays(boxes))
    assert [sorted(track) for track in found] == [[0, 1, 2, 3]] * 2 + [[4, 5]]
    assert [found[0][t][0] for t in range(4)] == [0, 10, 20, 30]


def test_smoothing_takes_the_jitter_and_leaves_the_motion():
    rng = np.random.default_rng(0)
    frames = np.arange(60)
    true = np.stack([100.0 + 2 * frames, 0 * frames + 50, 150 + 2 * frames, 0 * frames + 100], 1)
    noisy = true + rng.normal(0, 2, true.shape)
    squares = crops.smoothed(dict(zip(frames.tolist(), noisy, strict=True)))
    x = np.array([squares[t][0] for t in frames])
    inner = slice(8, -8)
    error, before = x - (125 + 2 * frames), noisy[:, [0, 2]].mean(1) - (125 + 2 * frames)
    assert error[inner].std() < before[inner].std() / 2 and abs(error[inner].mean()) < 0.5
    # Frames a second apart say nothing of each other.
    far = crops.smoothed({0: true[0], 25: true[25]})
    assert far[25].tolist() == [175, 75, 65]


def test_a_cropped_data_set_has_the_layout_and_the_names_of_its_source(tmp_path):
    root = numbered_ffpp(tmp_path / "in")
    known = {
        str(folder.relative_to(root)): {int(p.stem): [[1, 1, 6, 6]] for p in folder.iterdir()}
        for folder in {path.parent for path in root.rglob("*.png")}
    }
    crop(tmp_path, known)
    plain, cut = (
        faceforensics.open_videos(str(path), workers=1) for path in (root, tmp_path / "out")
    )
    assert plain.ids == cut.ids and plain.splits.tolist() == cut.splits.tolist()
    assert plain.lengths.tolist() == cut.lengths.tolist() and len(cut) == 8 + len(METHODS) * 8


def test_it_goes_on_where_it_was_stopped_and_counts_what_is_left_out(tmp_path, capsys):
    box = {0: [[1, 1, 9, 9]]}
    for name in "abcdef":
        scene(tmp_path / f"in/real/{name}", box)
    (tmp_path / "in/real/e/000.png").write_bytes(b"no image")
    known = {
        **{"real/a": box, "real/b": {0: []}, "real/c": {7: [[1, 1, 9, 9]]}},
        **{"real/d": {0: [[500, 500, 510, 510]]}, "real/e": box, "real/z": box},
    }
    with pytest.raises(SystemExit) as ending:
        crop(tmp_path, known)
    error = capsys.readouterr().err
    assert ending.value.code == 2 and "real/e in" in error and "--on-bad-item skip" in error
    assert sorted(path.name for path in (tmp_path / "out/real").iterdir()) in ([], ["a"])
    crop(tmp_path, known, "--on-bad-item", "skip")
    said = capsys.readouterr().out
    for line in (
        "2 videos without boxes: real/b, real/f",
        "1 video with boxes of frames that are not there: real/c",
        "1 video with boxes outside of the picture: real/d",
        "1 video that cannot be read: real/e",
        "1 video named in the boxes alone: real/z",
    ):
        assert line in said
    before = (tmp_path / "out/real/a/000.png").stat().st_mtime_ns
    (tmp_path / "out/real/.f.part").mkdir()  # what a killed process leaves
    crop(tmp_path, known | {"real/f": box}, "--on-bad-item", "skip")
    assert "1 video written" in capsys.readouterr().out
    assert (tmp_path / "out/real/a/000.png").stat().st_mtime_ns == before
    assert sorted(path.name for path in (tmp_path / "out/real").iterdir()) == ["a", "f"]


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([], "expected {video: {frame:"),
        ({"real/a": [1]}, "real/a: expected {video"),
        ({"real/a": {"x": []}}, "'x' is no number of a frame"),
        ({"real/a": {"0": [[5, 5, 2, 9]]}}, "real/a: 0: [5, 5, 2, 9] is no box"),
        ({"real/a": {"0": [5, 5, 9, 9]}}, "real/a: 0: 5 is no box"),
        ({"real/a": {"0": [[0, 0, 1e999, 9]]}}, "is no box"),
        ({"b": {"0": []}}, "none of its 1 video is in"),
    ],
)
def test_boxes_of_another_form_are_one_line(tmp_path, known, said, capsys):
    scene(tmp_path / "in/real/a", {0: [[1, 1, 9, 9]]})
    with pytest.raises(SystemExit) as ending:
        crop(tmp_path, known)
    error = capsys.readouterr().err
    assert ending.value.code == 2 and said in error and error.count("\n") == 1


def test_crops_do_not_lie_beside_their_videos(tmp_path, capsys):
    scene(tmp_path / "in/real/a", {0: [[1, 1, 9, 9]]})
    (tmp_path / "out").symlink_to(tmp_path / "in")
    with pytest.raises(SystemExit):
        crop(tmp_path, {"real/a": {0: [[1, 1, 9, 9]]}})
    assert "give another folder" in capsys.readouterr().err


def test_the_rates_of_a_table_are_those_of_its_folders(tmp_path, capsys):
    for label in ("real", "fake"):
        scene(tmp_path / label / "a", {t: [] for t in range(0, 8, 2)})
        scene(tmp_path / label / "b", {t: [] for t in (0, 1, 4)})
    (tmp_path / clips.RATES).write_text("video,fps\nreal/a,50\nreal/b,50\n")
    for path in (str(tmp_path), (str(tmp_path),)):
        labels = isinstance(path, str)
        videos = faceforensics.open_videos(path, workers=1, fps=20.0, labels=labels)
        rate = {
            name.rpartition("out")[2][-6:]: r
            for name, r in zip(videos.ids, videos.rates, strict=True)
        }
        assert rate == {"real/a": 25, "fake/a": 10, "real/b": 25, "fake/b": 10}
        when = [times for times in videos.times if times is not None]
        assert sorted(times[-1] for times in when) == [4 / 50, 4 / 20]
    (tmp_path / clips.RATES).write_text("video,fps\nreal/a,fast\n")
    with pytest.raises(ValueError, match="frame_rates.csv line 2: fps 'fast' is no rate"):
        faceforensics.open_videos(str(tmp_path), workers=1)


def test_wide_scenes_are_said_once_and_squares_are_not(tmp_path):
    for name, size in (("wide", (160, 96)), ("square", (96, 110))):
        for label in ("real", "fake"):
            scene(tmp_path / name / label / "a", {0: []}, size)
        said = []
        faceforensics.prepare(
            str(tmp_path / name), store_size=None, on_bad_item="error", workers=1, say=said.append
        )
        warned = [line for line in said if "crop-faces" in line]
        assert len(warned) == (name == "wide") and all("1.7 : 1" in line for line in warned)


def test_a_video_file_keeps_its_rate_and_the_numbers_of_its_frames(tmp_path):
    pytest.importorskip("torchcodec", reason="pip install torchcodec, and FFmpeg")
    from torchcodec.encoders import VideoEncoder

    (tmp_path / "in/real").mkdir(parents=True)
    ramp = torch.arange(0, 240, 8, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 64, 96)
    VideoEncoder(ramp, frame_rate=30).to_file(str(tmp_path / "in/real/000.mp4"))
    crop(tmp_path, {"real/000.mp4": {t: [[60, 20, 80, 40]] for t in (3, 9, 20)}})
    folder = tmp_path / "out/real/000"
    assert [path.name for path in sorted(folder.iterdir())] == [f"{t:06d}.png" for t in (3, 9, 20)]
    shown = [np.array(Image.open(path)).mean() for path in sorted(folder.iterdir())]
    assert np.allclose(shown, [24, 72, 160], atol=3)
    with open(tmp_path / "out" / clips.RATES) as file:
        assert list(csv.reader(file)) == [["video", "fps"], ["real/000", "30"]]
    (videos,) = [faceforensics.open_videos((str(tmp_path / "out"),), workers=1, labels=False)]
    assert np.allclose(videos.times[0], [0, 6 / 30, 17 / 30])


def test_of_a_variable_rate_the_numbers_are_milliseconds(tmp_path, monkeypatch):
    class Decoder:
        """A stand-in for torchcodec's: frames at 0, 0.1, 0.2 and 0.9 s."""

        seconds = torch.tensor([0, 0.1, 0.2, 0.9], dtype=torch.float64)

        def __init__(self, content):
            header = {"average_fps": 4.0, "height": 64, "width": 96}
            self.metadata = type("Header", (), header)

        def __len__(self):
            return 4

        def get_frames_at(self, indices):
            pixels = torch.zeros(len(indices), 3, 64, 96, dtype=torch.uint8)
            return type("Batch", (), {"data": pixels, "pts_seconds": self.seconds[indices]})

    module = type(sys)("torchcodec.decoders")
    module.VideoDecoder = Decoder
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    (tmp_path / "in/real").mkdir(parents=True)
    (tmp_path / "in/real/a.mp4").write_bytes(b"x")
    crop(tmp_path, {"real/a": {t: [[60, 20, 80, 40]] for t in range(4)}})
    names = sorted(path.name for path in (tmp_path / "out/real/a").iterdir())
    assert names == ["000000.png", "000100.png", "000200.png", "000900.png"]
    assert (tmp_path / "out" / clips.RATES).read_text().split() == ["video,fps", "real/a,1000"]


def test_the_manuals_lines_for_boxes_run_on_opencv_and_give_what_is_read(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless")
    manual = (Path(__main__.__file__).parents[2] / "docs" / "tsm.md").read_text()
    lines = manual.partition("```python\n")[2].partition("```")[0]
    folder = tmp_path / "in" / "real"
    folder.mkdir(parents=True)
    writer = cv2.VideoWriter(str(folder / "a.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (160, 96))
    for frame in range(12):
        pixels = np.zeros((96, 160, 3), np.uint8)
        pixels[20:60, 30 + frame : 70 + frame] = 200 if frame < 10 else 0
        writer.write(pixels)
    writer.release()
    real = cv2.FaceDetectorYN

    class Detector:  # its weights are not here: OpenCV's own calls, one bright box
        def create(*given):
            with pytest.raises(cv2.error, match="yunet"):  # not: of another signature
                real.create(*given)
            return Detector()

        def setInputSize(self, size):  # noqa: N802
            assert real.setInputSize
            self.size = size

        def detect(self, image):
            assert image.shape == (*self.size[::-1], 3) and real.detect
            rows, columns = (image[..., 0] > 100).any(1), (image[..., 0] > 100).any(0)
            if not rows.any():
                return 1, None
            corner = [columns.argmax(), rows.argmax(), columns.sum(), rows.sum()]
            return 1, np.array([[*corner, *[0] * 10, 0.9]], np.float32)

    monkeypatch.setattr(cv2, "FaceDetectorYN", Detector)
    monkeypatch.setattr(sys, "argv", ["boxes.py", str(tmp_path / "in"), str(tmp_path / "b.json")])
    exec(compile(lines, "boxes.py", "exec"), {})
    found = json.loads((tmp_path / "b.json").read_text())
    assert list(found) == ["real/a.mp4"] and list(found["real/a.mp4"]) == ["0", "5", "10"]
    near = pytest.approx([35, 20, 75, 60], abs=2)
    assert found["real/a.mp4"]["5"] == [near] and found["real/a.mp4"]["10"] == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["crop-faces", "in", "out"], "crop-faces needs --boxes"),
        (["crop-faces", "in", "out", "--boxes", "b", "--store-size", "9"], "--store-size has no"),
        (["pack", "in", "out.packed", "--boxes", "b"], "--boxes has no effect with pack"),
    ],
)
def test_flags_of_the_other_command_are_refused(command, said, capsys):
    with pytest.raises(SystemExit):
        __main__.main(command)
    assert said in capsys.readouterr().err
