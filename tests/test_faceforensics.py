"""Layouts of face-manipulation data, missing and damaged videos, and splits that share nobody."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import faceforensics
from common.errors import InputError
from tests.data import METHODS, PAIRS, numbered_ffpp, numbered_frames, zipped


def opened(path, **changes):
    path = path if isinstance(path, tuple) else str(path)
    return faceforensics.open_videos(path, **{"fps": 25.0, "workers": 2} | changes)


def pixels(videos, index):
    positions = np.arange(videos.lengths[index])[None]
    (clip,) = videos.batches([(np.array([index]), positions)], 2)
    return clip[0, :, :2, 5, 5].tolist()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return numbered_ffpp(tmp_path_factory.mktemp("data") / "ffpp")


@pytest.mark.parametrize("prefix", ["", "ffpp/", "some/where/"])
def test_the_official_layout_reads_alike_from_a_folder_and_a_zip(tree, prefix):
    plain, packed = opened(tree), opened(zipped(tree, prefix))
    assert plain.ids == packed.ids and plain.fingerprint == packed.fingerprint
    assert len(plain) == 8 + 4 * 8 and plain.labels.sum() == 32
    parts = faceforensics.split(plain)
    # Each pair gives two real videos and both orders of every manipulation.
    assert {name: len(indices) for name, indices in parts.items()} == {
        "train": 20,
        "val": 10,
        "test": 10,
    }
    for videos in (plain, packed):
        index = videos.ids.index("FaceForensics++/FaceSwap/c23/002_003")
        assert videos.keys[index] == ("FaceForensics++", "FaceSwap", "c23", "002_003")
        shown = pixels(videos, index)
        assert [k for _, k in shown] == list(range(11))  # 10.png comes after 9.png
        assert len({number for number, _ in shown}) == 1


def test_the_manipulations_of_one_pair_stay_videos_of_their_own(tree):
    """Grouping by the folder's name alone merges the four fakes of `000_001` into one video with
    one score.
    """
    videos = opened(tree)
    same = [i for i, key in enumerate(videos.keys) if key[3] == "000_001"]
    assert len(same) == len({videos.ids[i] for i in same}) == len(METHODS)
    assert sorted(videos.methods[same]) == sorted(METHODS)
    shown = [pixels(videos, i)[0][0] for i in same]
    assert len(set(shown)) == len(METHODS)


def test_compressions_are_kept_apart_and_chosen(tmp_path):
    root = numbered_ffpp(
        tmp_path / "two", {"train": [["000", "001"]]}, ("Deepfakes",), ("c23", "c40")
    )
    assert len(opened(root)) == 8 == len(set(opened(root).ids))
    chosen = opened(root, compression="c40")
    assert len(chosen) == 4 and {key[2] for key in chosen.keys} == {"c40"}
    with pytest.raises(InputError, match=r"compression 'raw'; .*there: c23, c40$"):
        opened(root, compression="raw")


def test_masks_and_other_sources_do_not_disturb(tmp_path):
    root = numbered_ffpp(tmp_path / "more", methods=("Deepfakes",))
    numbered_frames(root / "manipulated_sequences" / "Deepfakes" / "masks" / "frames" / "000_001")
    numbered_frames(root / "original_sequences" / "actors" / "c23" / "frames" / "01__hugging_happy")
    videos = opened(root)
    assert len(videos) == 16
    assert videos.unlisted == ["FaceForensics++/actors/c23/01__hugging_happy"]
    said = []
    faceforensics.prepare(
        str(root), store_size=None, on_bad_item="error", workers=1, fps=25.0, say=said.append
    )
    assert "left out 1 video" in said[0]
    assert "FaceForensics++/actors/c23/01__hugging_happy" in said[0]


def test_a_missing_video_is_named_and_left_out_only_on_demand(tmp_path):
    root = numbered_ffpp(tmp_path / "gap", methods=("Deepfakes",))
    gone = root / "manipulated_sequences" / "Deepfakes" / "c23" / "frames" / "001_000"
    for file in gone.iterdir():
        file.unlink()
    with pytest.raises(
        InputError,
        match=r"1 of 16 listed videos cannot be used: .*Deepfakes/c23/001_000 \(no frames",
    ):
        opened(root)
    said = []
    videos = faceforensics.prepare(
        str(root), store_size=None, on_bad_item="skip", workers=1, fps=25.0, say=said.append
    )
    assert len(videos) == 15 and videos.missing == [
        "FaceForensics++/Deepfakes/c23/001_000 (no frames)"
    ]
    assert said[0].startswith(
        "left out 1 missing or damaged video: FaceForensics++/Deepfakes/c23/001_000"
    )


def test_damaged_frames_are_named_and_left_out_alone(tmp_path):
    pairs = {"train": [[f"{2 * i:03d}", f"{2 * i + 1:03d}"] for i in range(30)]}
    root = numbered_ffpp(tmp_path / "bad", pairs, ("Deepfakes",))
    (root / "original_sequences/youtube/c23/frames/004/2.png").write_bytes(b"no image")
    videos = opened(root)
    with pytest.raises(InputError, match=r"youtube/c23/frames/004/2\.png in bad cannot be read"):
        pixels(videos, videos.ids.index("FaceForensics++/youtube/c23/004"))
    said = []
    videos = faceforensics.prepare(
        str(root), store_size=None, on_bad_item="skip", workers=2, fps=25.0, say=said.append
    )
    row = videos.ids.index("FaceForensics++/youtube/c23/004")
    whole = pixels(opened(root), videos.ids.index("FaceForensics++/youtube/c23/005"))
    assert len(videos) == 120 and len(whole) - 1 == videos.lengths[row] == len(videos.times[row])
    assert said[1] == (
        "left out 1 damaged frame: FaceForensics++/youtube/c23/004"
        f" (1 of {len(whole)} frames damaged)"
    )
    assert videos.missing == [said[1].partition(": ")[2]] and pixels(videos, row)
    # A video without a whole frame is left out.
    for file in (root / "original_sequences/youtube/c23/frames/004").iterdir():
        file.write_bytes(b"no image")
    options = dict(store_size=None, on_bad_item="skip", workers=2, say=[].append)
    videos = faceforensics.prepare(str(root), **options)
    assert len(videos) == 119 and "FaceForensics++/youtube/c23/004" not in videos.ids
    for file in (root / "original_sequences/youtube/c23/frames/006").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"frames are damaged .*004 \((\d+) of \1 frames damaged"):
        faceforensics.prepare(str(root), **options)


def test_splits_that_share_a_person_are_refused_by_name(tmp_path):
    leaking = PAIRS | {"test": [["006", "000"]]}
    with pytest.raises(InputError, match="000 is in two splits"):
        opened(numbered_ffpp(tmp_path / "leak", leaking))


def bench(root, change=None):
    """DeepfakeBench: frame folders and a JSON with Windows' separators and frames out of order."""
    sets: dict = {"FaceForensics++": {}}
    for label, folder, videos in (
        ("FF-real", "original_sequences/youtube", ("000", "001", "002", "003", "004", "005")),
        ("FF-DF", "manipulated_sequences/Deepfakes", ("000_001", "002_003", "004_005")),
        ("FF-FS", "manipulated_sequences/FaceSwap", ("000_001", "002_003", "004_005")),
    ):
        by_split = sets["FaceForensics++"].setdefault(label, {})
        for video in videos:
            part = {"0": "train", "2": "val", "4": "test", "1": "train", "3": "val", "5": "test"}[
                video[2]
            ]
            path = f"FaceForensics++/{folder}/c23/frames/{video}"
            numbered_frames(root / path, 12)
            names = [f"{path}/{k}.png".replace("/", "\\") for k in sorted(range(12), key=str)]
            by_split.setdefault(part, {}).setdefault("c23", {})[video] = {
                "label": label,
                "frames": names,
            }
    if change:
        change(sets)
    (root / "FaceForensics++.json").write_text(json.dumps(sets))
    return root


@pytest.mark.parametrize("prefix", ["", "rgb/"])
def test_deepfakebench_lists_give_labels_splits_and_the_order_of_frames(tmp_path, prefix):
    root = bench(tmp_path / "bench")
    for source in (root, zipped(root, prefix)):
        videos = opened(source)
        parts = faceforensics.split(videos)
        assert {name: len(indices) for name, indices in parts.items()} == {
            "train": 4,
            "val": 4,
            "test": 4,
        }
        assert videos.labels.sum() == 6 and set(videos.methods) == {"FF-real", "FF-DF", "FF-FS"}
        assert [k for _, k in pixels(videos, 7)] == list(range(12))


def test_deepfakebench_lists_without_compression_and_with_missing_frames(tmp_path):
    def flatten(sets):
        for by_split in sets["FaceForensics++"].values():
            for part in by_split:
                by_split[part] = by_split[part]["c23"]

    videos = opened(bench(tmp_path / "flat", flatten))
    assert {key[2] for key in videos.keys} == {""} and len(videos) == 12
    root = bench(tmp_path / "gap")
    (root / "FaceForensics++/manipulated_sequences/Deepfakes/c23/frames/002_003/7.png").unlink()
    with pytest.raises(InputError, match=r"FF-DF/c23/002_003 \(11 of 12 frames\)"):
        opened(root)


def test_a_bench_list_that_shares_a_person_is_refused_where_both_parts_are_used(tmp_path):
    def leak(sets):  # the fake of 002 and 003, whose real videos are in val
        by_split = sets["FaceForensics++"]["FF-DF"]
        by_split["train"]["c23"] |= by_split["val"]["c23"]
        del by_split["val"]

    videos = opened(bench(tmp_path / "leak", leak))
    with pytest.raises(
        InputError, match=r"2 persons are in two splits: 002 \(.*FF-DF/c23/002_003 in train.*003"
    ):
        faceforensics.split(videos)
    assert len(faceforensics.split(videos, ("test",))["test"]) == 4


def test_a_bench_list_without_frames_is_named(tmp_path):
    def lose(sets):
        del sets["FaceForensics++"]["FF-DF"]["val"]["c23"]["002_003"]["frames"]

    with pytest.raises(InputError, match=r"FF-DF/val/002_003: expected a split .* with its frames"):
        opened(bench(tmp_path / "bare", lose))


def table(root, rows, header="video_id,label,path", name="list.csv"):
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join([header, *rows]) + "\n")
    return root


@pytest.fixture
def people(tmp_path):
    """Forty persons, each with one real and one fake video, in no split."""
    root, rows = tmp_path / "people", []
    for i in range(40):
        for kind in ("real", "fake"):
            numbered_frames(root / kind / f"p{i}", 2)
            rows.append(f"p{i},{kind},{kind}/p{i}," + ("swap" if kind == "fake" else "web"))
    return table(root, rows, "video_id,label,path,method")


def test_a_csv_reads_alike_by_itself_in_its_folder_and_in_a_zip(people):
    videos = [opened(source) for source in (people, people / "list.csv", zipped(people, "top/"))]
    assert videos[0].ids == videos[1].ids == videos[2].ids and len(videos[0]) == 80
    assert videos[0].fingerprint == videos[1].fingerprint == videos[2].fingerprint
    assert videos[0].labels.tolist() == [0, 1] * 40


def test_without_splits_persons_are_held_out_whole_and_always_the_same(people):
    videos = opened(people)
    parts = faceforensics.split(videos)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [56, 12, 12]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(80))
    names = {part: {videos.keys[i][3] for i in indices} for part, indices in parts.items()}
    assert (
        not names["train"] & names["val"]
        and not names["train"] & names["test"]
        and not names["val"] & names["test"]
    )
    assert all(videos.labels[indices].mean() == 0.5 for indices in parts.values())
    rows = (people / "list.csv").read_text().splitlines()
    table(people, rows[:0:-1], rows[0])  # the other way round
    again = opened(people)
    assert {again.ids[i] for i in faceforensics.split(again)["test"]} == {
        videos.ids[i] for i in parts["test"]
    }


def test_a_split_of_its_own_lacks_only_validation(people):
    rows = [
        row + (",test" if i < 20 else ",train")
        for i, row in enumerate((people / "list.csv").read_text().split()[1:])
    ]
    videos = opened(table(people, rows, "video_id,label,path,method,split"))
    parts = faceforensics.split(videos)
    assert (
        set(parts["test"]) == set(range(20))
        and len(parts["val"]) == 10
        and len(parts["train"]) == 50
    )


@pytest.mark.parametrize("group", ["", ",group"])
def test_videos_that_are_all_for_testing_leave_none_to_train(people, group):
    rows = [
        f"{row},test" + (f",g{i // 2}" if group else "")
        for i, row in enumerate((people / "list.csv").read_text().split()[1:])
    ]
    videos = opened(table(people, rows, "video_id,label,path,method,split" + group))
    with pytest.raises(InputError, match="train has 0 real and 0 fake videos; both are needed"):
        faceforensics.split(videos)


def test_a_part_alone_is_the_one_beside_the_others(people):
    """A test part that is held out must not hold what a model was trained on, when it is used
    alone.
    """
    rows = (people / "list.csv").read_text().split()[1:]
    for parts in (["train"], ["train", "val"], ["val", "train", "train"], [""]):
        named = [f"{row},{parts[i // 2 % len(parts)]}" for i, row in enumerate(rows)]
        videos = opened(table(people, named, "video_id,label,path,method,split"))
        assert np.array_equal(
            faceforensics.split(videos, ["test"])["test"], faceforensics.split(videos)["test"]
        )


def test_videos_in_no_split_are_left_out_by_name_where_others_are_in_one(people):
    rows = [
        f"{row},{'' if i < 6 else 'train'}"
        for i, row in enumerate((people / "list.csv").read_text().split()[1:])
    ]
    table(people, rows, "video_id,label,path,method,split")
    said = []
    videos = faceforensics.prepare(
        str(people), store_size=None, on_bad_item="error", workers=1, fps=25.0, say=said.append
    )
    assert len(videos) == 74 and said[0].startswith(
        "left out 6 videos that no split lists: list/web/p0, list/swap/p0"
    )
    assert len(opened(people, labels=False)) == 80


def test_pairs_are_held_out_in_their_closure(tmp_path):
    """001 is a target in one fake and a source in another: all three persons stay together."""
    root = numbered_ffpp(
        tmp_path / "chain",
        {"train": [[f"{i:03d}", f"{i + 1:03d}"] for i in range(0, 40, 2)]},
        ("Deepfakes",),
    )
    (root / "splits" / "train.json").unlink()
    numbered_frames(root / "manipulated_sequences/Deepfakes/c23/frames/001_002", 2)
    videos = opened(root)
    parts = faceforensics.split(videos)
    side = {}
    for name, indices in parts.items():
        for i in indices:
            for person in faceforensics.identities(videos.keys[i][3]):
                assert side.setdefault(person, name) == name
    assert side["000"] == side["003"] and {len(parts[name]) for name in ("val", "test")} == {12}


@pytest.mark.parametrize(
    ("video", "persons"),
    [
        ("003", ("003",)),
        ("003_017", ("003", "017")),
        ("01_02__outside_talking__YVGY8LOK", ("01", "02")),
        ("01__outside_talking", ("01",)),
        ("id3_0001", ("id3",)),
        ("id3_id16_0001", ("id3", "id16")),
        ("anna_2", ()),
        ("00231", ()),
        ("003.mp4", ("003",)),
        ("c23/videos/003_017.avi", ("003", "017")),
        ("Deepfakes_003_017", ("003", "017")),
        ("c23_FaceSwap_003_017.mp4", ("003", "017")),
        ("manipulated\\01_02__walk.mp4", ("01", "02")),
        ("id0_id1_0007.mp4", ("id0", "id1")),
        ("clip_003", ()),
        ("id0_smile", ()),
    ],
)
def test_names_tell_the_persons(video, persons):
    assert faceforensics.identities(video) == persons


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        (
            ["a,real,a", "b,2,b"],
            "video_id,label,path",
            r"line 3: label '2', allowed are 0, real, original, pristine, 1, fake",
        ),
        (
            ["a,real,a,tain"],
            "video_id,label,path,split",
            r"line 2: split 'tain', allowed .*; did you mean train\?",
        ),
        (["a,real"], "video_id,label", r"has no path; needed are video_id,label,path"),
        ([], "video_id,label,path", r"has no rows"),
        (
            ["a,real,a", "a,fake,b"],
            "video_id,label,path",
            r"1 video listed more than once: list/a \(real, fake\);",
        ),
        (
            ["a,real,a", "c,fake,absent"],
            "video_id,label,path",
            r"1 of 2 listed .*: list/c \(nothing at absent\)",
        ),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(tmp_path, rows, header, said):
    for name in "ab":
        numbered_frames(tmp_path / "set" / name)
    with pytest.raises(InputError, match=said):
        opened(table(tmp_path / "set", rows, header))


def test_one_class_alone_is_refused(tmp_path):
    root = tmp_path / "set"
    rows = []
    for i in range(10):
        numbered_frames(root / f"v{i}", 1)
        rows.append(f"v{i},fake,v{i}")
    with pytest.raises(InputError, match=r"has 0 real and \d fake videos; both are needed"):
        faceforensics.split(opened(table(root, rows)))


def test_an_unknown_layout_is_refused_but_can_be_predicted(tmp_path):
    root = tmp_path / "plain"
    for name in ("b", "a"):
        numbered_frames(root / "clips" / name, 3)
    with pytest.raises(InputError, match="no known layout there; allowed are FaceForensics"):
        opened(root)
    videos = opened(root, labels=False)
    assert videos.ids == ["a", "b"] and videos.labels.tolist() == [-1, -1]
    assert "without labels" in videos.describe()
    numbered_frames(tmp_path / "part/real", 1)  # a stray picture
    numbered_frames(tmp_path / "part/real/c", 2)
    assert opened(tmp_path / "part", labels=False).ids == ["real", "real/c"]
    one = opened(root / "clips" / "a", labels=False)
    assert one.ids == ["a"] and [k for _, k in pixels(one, 0)] == [0, 1, 2]


def test_several_paths_are_videos_whose_names_say_where_they_are(tree, tmp_path, monkeypatch):
    numbered_frames(tmp_path / ".x" / "a", 3, value=200)
    (tmp_path / ".x" / "videos.csv").write_text("not,a,list of videos\n")
    archive = zipped(tree)
    monkeypatch.chdir(tmp_path)
    frames = f"{tree}/original_sequences/youtube/c23/frames"
    videos = opened((".x", f"{frames}/000", f"{frames}/003/", str(archive)), labels=False)
    known = opened(tree, labels=False)
    assert len(videos) == 3 + len(known) and not videos.splits.any()
    assert (videos.labels == -1).all()
    index = videos.ids.index(".x/a")
    assert pixels(videos, index) == [[200, 0], [200, 1], [200, 2]]
    for video in ("000", "003"):
        wanted = pixels(known, known.ids.index(f"FaceForensics++/youtube/c23/{video}"))
        for name in (f"{frames}/{video}", f"{archive}/{frames[len(str(tree)) + 1 :]}/{video}"):
            assert pixels(videos, videos.ids.index(name)) == wanted


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent", "no such file or folder"),
        ("empty", "leave it out"),
        ("a/0.png", "allowed are a folder, a .zip of one, .mp4"),
        ("list.csv", "allowed are a folder, a .zip of one, .mp4.* a .csv stands alone"),
        ("v.mp4", "images .* and video files .* in one data set"),
    ],
)
def test_one_of_several_paths_that_is_no_video_is_refused_by_name(tmp_path, name, said):
    numbered_frames(tmp_path / "a", 3)
    numbered_frames(tmp_path / "b", 3)
    (tmp_path / "empty").mkdir()
    for file in ("list.csv", "v.mp4"):
        (tmp_path / file).write_text("20")
    with pytest.raises(InputError, match=f"{name}.*{said}"):
        opened((str(tmp_path / "b"), str(tmp_path / name)), labels=False)


class Decoder:
    """A stand-in for torchcodec's VideoDecoder: a file is its number of frames in words."""

    def __init__(self, content):
        self.count = int(content)
        self.metadata = types.SimpleNamespace(average_fps=30.0, height=12, width=12)

    def __len__(self):
        return self.count

    def get_frames_at(self, indices):
        return types.SimpleNamespace(
            data=torch.full((len(indices), 3, 12, 12), self.count, dtype=torch.uint8)
        )


def decode_by(monkeypatch, decoder):
    """Let `decoder` stand in for torchcodec's."""
    monkeypatch.setitem(sys.modules, "torchcodec", types.SimpleNamespace())
    decoders = types.SimpleNamespace(VideoDecoder=decoder)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


def test_video_files_have_their_own_rate_and_bad_ones_are_named(tmp_path, monkeypatch):
    decode_by(monkeypatch, Decoder)
    root = tmp_path / "files"
    for number, video in enumerate(
        (
            "original_sequences/youtube/c23/videos/000",
            "original_sequences/youtube/c23/videos/001",
            "manipulated_sequences/Deepfakes/c23/videos/000_001",
            "manipulated_sequences/Deepfakes/c23/videos/001_000",
        )
    ):
        path = root / f"{video}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(20 + number))
    (root / "train.json").write_text('[["000", "001"]]')
    videos = opened(root)
    assert videos.rates.tolist() == [30.0] * 4 and sorted(videos.lengths) == [20, 21, 22, 23]
    for index, length in enumerate(videos.lengths):
        assert pixels(videos, index) == [[length, length]] * length
    (root / "original_sequences/youtube/c23/videos/001.mp4").write_text("no video")
    with pytest.raises(
        InputError, match=r"1 of 4 .*: FaceForensics\+\+/youtube/c23/001 \(invalid literal"
    ):
        opened(root)
    kept = opened(root, on_bad_item="skip")
    assert len(kept) == 3 and sorted(kept.lengths) == [20, 22, 23]
    assert all(pixels(kept, i) == [[n, n]] * n for i, n in enumerate(kept.lengths))
    numbered_frames(root / "other" / "a", 2)
    table(root, ["a,real,other/a", "b,fake,original_sequences/youtube/c23/videos/000.mp4"])
    with pytest.raises(
        InputError, match=r"images \(other/a/0.png\) and video files \(.*000.mp4\) in one data set"
    ):
        opened(root / "list.csv")


def test_files_of_variable_frame_rate_are_cut_by_their_time_stamps(tmp_path, monkeypatch):
    """Ten frames in the first second, then ten in nine: half of them are not half of the time."""
    times = np.append(np.arange(10) / 10, 1 + 0.9 * np.arange(10))

    class Timed(Decoder):
        def __init__(self, content):
            super().__init__(content)
            more = {"average_fps": 2.0, "begin_stream_seconds": 0.0, "end_stream_seconds": 10.0}
            self.metadata = types.SimpleNamespace(**vars(self.metadata) | more)

        def get_frames_played_at(self, seconds):
            shown = np.searchsorted(times, seconds, side="right") - 1
            pixels = torch.from_numpy(shown.astype(np.uint8))[:, None, None, None]
            return types.SimpleNamespace(data=pixels.expand(-1, 3, 12, 12))

    decode_by(monkeypatch, Timed)
    for kind in ("real", "fake"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.mp4").write_text("20")
    videos = opened(tmp_path)
    clips = videos.eval_clips(np.array([0]), 8, 8.0, 1)  # a second from frame to frame
    (frames,) = videos.batches([(np.array([0]), clips[0])], 1)
    shown = times[frames[0, :, 0, 5, 5].numpy()]
    assert (np.abs(np.diff(shown) - 1) <= 0.9).all() and shown[-1] - shown[0] > 6


def test_no_video_file_is_left_out_for_its_name(tmp_path, monkeypatch):
    decode_by(monkeypatch, Decoder)
    for count, name in enumerate(("a/x.mp4", "a/x.avi", "b/x.mp4"), 20):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(str(count))
    (tmp_path / "b" / "huge.csv").write_text("version https://git-lfs.github.com/spec/v1")
    files = tuple(str(tmp_path / name) for name in ("a/x.mp4", "a/x.avi", "b/x.mp4"))
    for path, names in (
        (files, sorted(files)),
        (tmp_path / "a", ["x", "x.mp4"]),
        (files[2], ["x"]),  # whatever lies beside it
    ):
        videos = opened(path, labels=False)
        assert sorted(videos.ids) == names and len(set(videos.lengths)) == len(names)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "train.json is not JSON"),
        ('["000"]', "train.json is not a list of pairs"),
        ("{}", "is not a list of pairs"),
    ],
)
def test_split_lists_that_cannot_be_read_are_named(tmp_path, content, said):
    root = numbered_ffpp(tmp_path / "set", methods=("Deepfakes",))
    (root / "splits" / "train.json").write_text(content)
    with pytest.raises(InputError, match=said):
        opened(root)


def test_the_embedded_videos_are_official_in_shape_and_disjoint():
    videos = opened("sample")
    parts = faceforensics.split(videos)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [360, 108, 108]
    for indices in parts.values():
        assert videos.labels[indices].mean() == pytest.approx(5 / 6)
    assert set(videos.methods) == {"generated", "order"}
    (clip,) = videos.batches(
        [(np.array([1]), videos.eval_clips(np.array([1]), 8, 2.0, 1)[:, 0])], 1
    )
    assert clip.shape == (1, 8, 3, 40, 40) and clip.dtype == torch.uint8
    with pytest.raises(InputError, match="stored at 40 px"):
        videos.resize_store(32)
    assert videos.drop_damaged_frames(1) == [] and len(videos) == 576


def grouped_people(people, group_of, header="video_id,label,path,method"):
    rows = [
        f"{row},{group_of(i // 2)}"
        for i, row in enumerate((people / "list.csv").read_text().split()[1:])
    ]
    return opened(table(people, rows, f"{header},group"))


def test_a_column_of_groups_joins_persons_and_counts_in_videos(people):
    """Three groups of ten persons and ten of one; both videos of a person stay together, too."""
    videos = grouped_people(people, lambda i: f"big{i // 10}" if i < 30 else f"small{i}")
    parts = faceforensics.split(videos)
    sides = {name: set(videos.groups[indices]) for name, indices in parts.items()}
    people_of = {name: {videos.keys[i][3] for i in rows} for name, rows in parts.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not sides[a] & sides[b] and not people_of[a] & people_of[b]
    assert [len(parts[name]) for name in ("train", "val", "test")] == [60, 8, 12]
    assert {name[:3] for name in sides["test"] | sides["val"]} == {"sma"}
    alone = faceforensics.split(videos, ["test"])["test"]
    assert np.array_equal(alone, parts["test"])


def test_groups_of_videos_are_in_the_fingerprint_and_follow_the_videos(people):
    plain = opened(people)
    videos = grouped_people(people, lambda i: f"g{i // 2}")
    other = grouped_people(people, lambda i: f"g{i // 4}", "video_id,label,path,method,group2")
    assert plain.groups is None and len({x.fingerprint for x in (plain, videos)}) == 2
    assert other.groups is not None and other.fingerprint != videos.fingerprint
    videos.select(np.array([5, 3]))
    assert videos.groups.tolist() == ["g1", "g0"]


def test_some_videos_without_a_group_are_refused(people):
    with pytest.raises(InputError, match="2 of 80 rows without a group: list/web/p3, list/swap/p3"):
        grouped_people(people, lambda i: "" if i == 3 else "g")


def test_a_group_in_two_splits_is_refused_where_both_are_used(people):
    rows = [
        f"{row},{'train' if i < 60 else 'test'},{'x' if i in (0, 79) else f'g{i // 2}'}"
        for i, row in enumerate((people / "list.csv").read_text().split()[1:])
    ]
    videos = opened(table(people, rows, "video_id,label,path,method,split,group"))
    with pytest.raises(InputError, match=r"1 group is in two splits: x \(list/web/p0 in train, l"):
        faceforensics.split(videos)
    assert len(faceforensics.split(videos, ["test"])["test"]) == 20


def files(root, names, size=4):
    for k, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (k, k, k)).save(path)
    return root


def said(root, **changes):
    lines = []
    options = dict(store_size=None, on_bad_item="error", workers=1, fps=25.0, say=lines.append)
    videos = faceforensics.prepare(str(root), **options | changes)
    return videos, "\n".join(lines)


def three_tables(root, column=None):
    """Thirty pairs in train.csv, val.csv and test.csv; `column` is what a column split says."""
    for part, numbers in (("train", range(30)), ("val", range(30, 36)), ("test", range(36, 42))):
        rows = []
        for i in numbers:
            for label in ("pristine", "fake"):
                video = f"{2 * i:03d}" + ("" if label == "pristine" else f"_{2 * i + 1:03d}")
                numbered_frames(root / "v" / video, 2)
                rows.append(f"{video},{label},v/{video}" + (f",{column}" if column else ""))
        header = "video_id,label,path" + (",split" if column else "")
        table(root, rows, header, f"{part}.csv")
    return root


def test_tables_named_for_splits_are_these_splits(tmp_path):
    videos = opened(three_tables(tmp_path / "three"))
    parts = faceforensics.split(videos)
    assert {name: len(indices) for name, indices in parts.items()} == {
        "train": 60,
        "val": 12,
        "test": 12,
    }
    assert {videos.keys[i][0] for i in parts["test"]} == {"test"}
    alone = opened(tmp_path / "three" / "test.csv")
    assert len(alone) == 12 and set(alone.splits) == {"test"}
    with pytest.raises(InputError, match=r"test.csv line 2: split train in a table .* for test"):
        opened(three_tables(tmp_path / "wrong", "train"))


@pytest.mark.parametrize(
    "words",
    [
        ("train_list", "val_list", "test_list"),
        ("ff_training", "ff-dev", "ff-testset"),
        ("train_all", "val", "test_all"),
    ],
)
def test_names_that_hold_a_split_are_it_where_train_and_another_are_there(tmp_path, words):
    named = list(zip(words, ("train", "val", "test"), strict=True))
    tables = three_tables(tmp_path / "tables")
    for word, part in named:
        (tables / f"{part}.csv").rename(tables / f"{word}.csv")
    kinds = ("real/a", "fake/b", "fake/train_fast/c")  # the last says no split
    folders = labeled(
        tmp_path / "folders", [f"{word}/{kind}" for word, _ in named for kind in kinds]
    )
    pairs = numbered_ffpp(tmp_path / "pairs", methods=("Deepfakes",))
    for word, part in named:
        (pairs / "splits" / f"{part}.json").rename(pairs / "splits" / f"{word}.json")
    (pairs / "splits" / "more.json").write_text("[]")
    counts = {"tables": [60, 12, 12], "folders": [3, 3, 3], "pairs": [8, 4, 4]}
    for root in (tables, folders, pairs):
        found = opened(root).splits
        assert [(found == part).sum() for _, part in named] == counts[root.name]
    assert opened(pairs).notes == ["passed over splits/more.json: no pairs of train, val or test"]
    one = opened(labeled(tmp_path / "one", ["test_runs/real/a", "test_runs/fake/b"]))
    assert set(one.splits) == {""} and set(one.methods) == {"real", "fake"}


def test_the_official_layout_below_splits_is_in_these_splits(tmp_path):
    root = tmp_path / "parts"
    parts = ("train", "val", "test")
    for k, part in enumerate(parts):
        pairs = {part: [[f"{2 * k:03d}", f"{2 * k + 1:03d}"]]}
        numbered_ffpp(root / part, pairs, methods=("Deepfakes",), splits=False)
    videos = opened(root)
    assert [(videos.splits == part).sum() for part in parts] == [4, 4, 4]
    faceforensics.split(videos)
    again = root / "test/original_sequences/youtube/c23/frames/000"
    numbered_frames(again)
    with pytest.raises(InputError, match="1 person is in two splits: 000 "):
        faceforensics.split(opened(root))


def test_tables_that_share_a_person_or_a_folder_are_refused(tmp_path):
    root = three_tables(tmp_path / "shared")
    numbered_frames(root / "v" / "000_099", 2)
    row = (root / "test.csv").read_text()
    (root / "test.csv").write_text(row + "000_099,fake,v/000_099\n")
    with pytest.raises(InputError, match=r"000 \(train/000 in train, test/000_099 in test\)"):
        faceforensics.split(opened(root))
    (root / "test.csv").write_text(row + "again,fake,v/000\n")
    with pytest.raises(InputError, match=r"v/000/0.png as .*again \(fake in test\).* train/000"):
        opened(root)


def labeled(root, names, frames=2):
    for name in names:
        numbered_frames(root / name, frames)
    return root


def test_folders_by_label_and_method_are_read(tmp_path):
    pairs = [("000", "000_001"), ("001", "001_000")]
    names = [f"original/{real}" for real, _ in pairs]
    names += [f"{method}/{fake}" for method in ("Deepfakes", "FaceShifter") for _, fake in pairs]
    videos = opened(labeled(tmp_path / "kaggle", names))
    assert videos.labels.sum() == 4 and len(videos) == 6
    assert set(videos.methods) == {"original", "Deepfakes", "FaceShifter"}
    assert videos.persons[videos.ids.index("Deepfakes/001_000")] == ("/001", "/000")
    names = [
        f"{part}/{kind}/{part}{i}"
        for part in ("train", "val", "test")
        for kind in ("real", "fake/SimSwap", "fake/Blend")
        for i in range(2)
    ]
    for top in ("", "some/top/"):
        videos = opened(labeled(tmp_path / f"splits{len(top)}", [top + name for name in names]))
        assert [(videos.splits == part).sum() for part in ("train", "val", "test")] == [6, 6, 6]
        assert set(videos.methods) == {"real", "SimSwap", "Blend"}
        assert (videos.labels == (videos.methods != "real")).all()


def test_a_folder_that_says_a_label_may_be_given_itself(tmp_path):
    root = labeled(tmp_path, ["Celeb-synthesis/id0_id1_0000", "Celeb-synthesis/id1_id0_0000"])
    whole, part = opened(root), opened(root / "Celeb-synthesis")
    assert part.ids == whole.ids and part.persons == whole.persons and part.labels.all()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["real/a", "fake/b", "authentic/c"], "authentic says neither real, original"),
        (["real/0", "real/1", "fake/Deepfakes"], r"images .*: fake/Deepfakes/0.png; .* of its own"),
        (["real/a", "real", "fake/b"], "images beside videos .*: real/0.png; "),
        (["real/Deepfakes/a", "fake/b"], "real/Deepfakes/a: its folders say both"),
        (["train/test/real/a", "train/fake/b"], "its folders name two splits"),
        (
            ["train/real", "train/fake"],
            r"images .*: train/fake/0.png, train/real/0.png; .* a folder of its own",
        ),
    ],
)
def test_folders_that_do_not_say_a_label_are_refused(tmp_path, names, said):
    with pytest.raises(InputError, match=said):
        opened(labeled(tmp_path / "set", names))


def celeb(root):
    """Celeb-DF: persons 0 to 3, fakes of every two, and two videos of strangers."""
    names = [f"Celeb-real/id{i}_000{k}" for i in range(4) for k in range(2)]
    names += [f"Celeb-synthesis/id{i}_id{j}_0000" for i in range(4) for j in range(4) if i != j]
    names += ["YouTube-real/00170", "YouTube-real/00171"]
    return labeled(root, names)


def test_celeb_df_is_tested_by_its_list_and_trained_on_with_consent(tmp_path):
    root = celeb(tmp_path / "Celeb-DF-v2")
    listed = ["1 YouTube-real/00170.mp4", "1 Celeb-real/id0_0000.mp4"]
    listed += ["0 Celeb-synthesis/id0_id1_0000.mp4"]
    (root / "List_of_testing_videos.txt").write_text("\n".join(listed))
    videos = opened(root)
    assert len(videos) == 22 and videos.labels.sum() == 12
    test = faceforensics.split(videos, ["test"])["test"]
    assert sorted(videos.keys[i][3] for i in test) == ["00170", "id0_0000", "id0_id1_0000"]
    with pytest.raises(InputError, match="persons are in two splits.*--allow-shared-persons"):
        faceforensics.split(videos)
    lines = []
    parts = faceforensics.split(videos, allow_shared_persons=True, say=lines.append)
    assert len(parts["test"]) == 3 and lines[0].startswith("WARN --allow-shared-persons: ")
    (root / "List_of_testing_videos.txt").unlink()
    with pytest.raises(InputError, match="20 of 22 videos are linked by persons"):
        faceforensics.split(opened(root))


def dfdc(root):
    """Two parts of DFDC: fakes beside their originals, all of them `train`."""
    for part in range(2):
        content = {}
        for i in range(10):
            for kind in ("real", "fake"):
                name = f"p{part}{kind}{i}"
                numbered_frames(root / f"dfdc_train_part_{part}" / name, 2)
                content[f"{name}.mp4"] = {"label": kind.upper(), "split": "train"}
                if kind == "fake":
                    content[f"{name}.mp4"]["original"] = f"p{part}real{i}.mp4"
        (root / f"dfdc_train_part_{part}" / "metadata.json").write_text(json.dumps(content))
    return root


def test_dfdc_keeps_a_fake_with_its_original(tmp_path):
    videos = opened(dfdc(tmp_path / "dfdc"))
    assert len(videos) == 40 and videos.labels.sum() == 20 and set(videos.splits) == {""}
    side = {}
    for part, indices in faceforensics.split(videos).items():
        assert len(indices) >= 6
        for i in indices:
            assert side.setdefault(videos.keys[i][3].replace("fake", "real"), part) == part
    one = opened(tmp_path / "dfdc" / "dfdc_train_part_0")
    assert len(one) == 20
    public = labeled(tmp_path / "public", ["videos/aa", "videos/bb"])
    (public / "labels.csv").write_text("filename,label\naa.mp4,1\nbb.mp4,0\n")
    videos = opened(public)
    assert dict(zip([key[3] for key in videos.keys], videos.labels, strict=True)) == {
        "aa": 1,
        "bb": 0,
    }
    (public / "labels.csv").write_text("filename,label\naa.mp4,1\ncc.mp4,0\n")
    with pytest.raises(InputError, match=r"1 of 2 listed videos cannot be used: cc \(it is not"):
        opened(public)


@pytest.mark.parametrize(
    ("label", "is_fake"),
    [("RealismSwap_Fake", 1), ("Celeb-real", 0), ("DFDCP_FakeA", 1), ("FF-F2F", 1), ("Real", 0)],
)
def test_labels_of_deepfakebench_are_words(tmp_path, label, is_fake):
    def rename(sets):
        for by_split in sets["FaceForensics++"]["FF-DF"].values():
            for entry in by_split["c23"].values():
                entry["label"] = label

    assert opened(bench(tmp_path / "set", rename)).labels.sum() == 3 + 3 * is_fake


@pytest.mark.parametrize("label", ["Unrealistic", "Real_vs_Fake", "", "7"])
def test_other_labels_of_deepfakebench_are_refused(tmp_path, label):
    def rename(sets):
        sets["FaceForensics++"][label] = sets["FaceForensics++"].pop("FF-DF")
        for by_split in sets["FaceForensics++"][label].values():
            for entry in by_split["c23"].values():
                entry["label"] = label

    with pytest.raises(InputError, match=f"label '{label}'; expected one with the word real or"):
        opened(bench(tmp_path / "set", rename))


def test_deepfakebench_lists_lie_anywhere_and_repeat_each_other(tmp_path):
    root = bench(tmp_path / "frames")
    lists = tmp_path / "lists"
    lists.mkdir()
    (root / "FaceForensics++.json").rename(lists / "FaceForensics++.json")
    whole = opened(lists / "FaceForensics++.json", frames_root=str(root))
    assert len(whole) == 12
    sets = json.loads((lists / "FaceForensics++.json").read_text())
    (root / "FaceForensics++.json").write_text(json.dumps(sets))
    small = {"FF-DF": {k: v for k, v in sets["FaceForensics++"].items() if k != "FF-FS"}}
    (root / "FF-DF.json").write_text(json.dumps(small))
    videos, text = said(root)
    assert len(videos) == 12 and "9 videos that two lists name alike counted once" in text
    with pytest.raises(InputError, match="--frames-root: .* lists no frames"):
        opened(root, frames_root=str(root))


@pytest.mark.parametrize("value", [None, [], 3, "x"])
def test_wrong_types_in_a_bench_list_are_named(tmp_path, value):
    def spoil(sets):
        sets["FaceForensics++"]["FF-DF"]["val"] = value

    with pytest.raises(
        InputError, match=r"FaceForensics\+\+/FF-DF/val: expected a table of videos"
    ):
        opened(bench(tmp_path / "set", spoil))


def test_a_part_of_a_bench_list_that_is_one_video_is_that_video(tmp_path):
    def flatten(sets):
        by_split = sets["FaceForensics++"]["FF-DF"]
        by_split["val"] = by_split["val"]["c23"]["002_003"]

    videos = opened(bench(tmp_path / "set", flatten))
    assert len(videos) == 12
    (index,) = [i for i, key in enumerate(videos.keys) if key[1:] == ("FF-DF", "", "002_003")]
    assert videos.splits[index] == "val" and videos.lengths[index] == 12


def test_numbers_of_frames_give_the_time_between_them(tmp_path):
    root = tmp_path / "set"
    files(root, [f"real/a/{k}.png" for k in range(40)])
    files(root, [f"fake/b/frame_{10 * k:04d}.png" for k in range(40)])
    files(root, [f"fake/c/{k}.png" for k in (*range(10), *range(30, 60))])
    videos, text = said(root)
    assert videos.rates.tolist() == [2.5, pytest.approx(25 * 39 / 59), 25]
    assert "1 video with one of 10 frames, as their numbers say: 2.5 of --fps 25" in text
    assert "1 video with gaps in the frames' numbers: fake/c; clips are cut by the time" in text
    first = videos.ids.index("fake/c")
    clips = videos.eval_clips(np.array([first]), 8, 2.0, 2)[0]
    numbers = np.array([*range(10), *range(30, 60)])[clips]
    assert numbers[0].tolist() == [0, 6, 9, 30, 31, 32, 37, 43]  # 6.25 frames apart, or the next
    assert numbers[1].tolist() == [9, 30, 31, 34, 40, 46, 52, 59]


def test_several_faces_of_a_frame_are_said_and_one_is_taken(tmp_path):
    root = tmp_path / "set"
    files(root, [f"real/a/frame_{k}_{face}.png" for k in range(12) for face in range(2)], 4)
    files(root, [f"real/a/frame_{k}_1.png" for k in range(12)], 9)
    files(root, [f"fake/b/000_{k:03d}.png" for k in range(12)])
    for face, number in (("largest", 1), ("first", 0)):
        videos, text = said(root, face=face)
        assert videos.lengths.tolist() == [12, 12] and "1 video with frames of several" in text
        names = [videos.images.ids[i] for i in videos.frames[videos.ids.index("real/a")]]
        assert names == [f"real/a/frame_{k}_{number}.png" for k in range(12)]


def test_faces_whose_frames_lie_together_are_no_longer_video(tmp_path):
    root = tmp_path / "set"
    files(root, [f"real/a/id0_{k:03d}.png" for k in (0, 1, 3)], 4)
    files(root, [f"real/a/id1_{k:03d}.png" for k in (1, 2, 3)], 9)
    files(root, [f"fake/b/{k:03d}{tail}.png" for k in range(3) for tail in ("", "_1")])
    videos, text = said(root)
    assert "1 video with frames of several faces: real/a;" in text
    assert "1 video with frames whose numbers do not rise: fake/b;" in text
    names = [videos.images.ids[i] for i in videos.frames[videos.ids.index("real/a")]]
    assert names == [f"real/a/id{face}_{k:03d}.png" for k, face in enumerate((0, 1, 1, 1))]
    assert videos.rates.tolist() == [25.0, 25.0] and videos.lengths.tolist() == [6, 4]


def test_files_that_stand_behind_a_folder_are_said(tmp_path):
    root = labeled(tmp_path / "set", ["real/a", "fake/b"])
    (root / "real" / "a.mp4").write_text("20")
    _, text = said(root)
    assert "passed over 1 video file beside folders or files of the same name: real/a.mp4" in text


def test_names_that_tell_no_person_are_said_once(tmp_path, people):
    lines = []
    faceforensics.split(opened(people), say=lines.append)
    assert len(lines) == 1 and "80 of 80 videos tell no person: list/web/p0" in lines[0]
    lines.clear()
    faceforensics.split(opened(numbered_ffpp(tmp_path / "ffpp")), say=lines.append)
    assert not lines


def test_anybodys_tables_beside_videos_to_classify_do_not_matter(tmp_path):
    root = labeled(tmp_path / "set", ["a", "b"])
    (root / "notes.json").write_text("{broken")
    (root / "files.csv").write_text("path,label\na,maybe\n")
    videos = opened(root, labels=False)
    assert videos.ids == ["a", "b"] and not videos.notes
    (root / "a" / "0.png").rename(root / "stray.png")
    videos = opened(root, labels=False)
    assert videos.ids == ["set", "a", "b"]
    assert videos.notes == ["1 image beside folders of videos: stray.png"]
    with pytest.raises(InputError, match=r"compression 'c23'; .*there: none; leave it out"):
        opened(root, labels=False, compression="c23")


def test_a_damaged_frame_of_a_file_is_named_by_its_number(tmp_path, monkeypatch):
    class Damaged(Decoder):
        def get_frames_at(self, indices):
            if 7 in indices:
                raise RuntimeError("no such frame")
            return super().get_frames_at(indices)

    decode_by(monkeypatch, Damaged)
    for kind in ("real", "fake"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.mp4").write_text("20")
    videos = opened(tmp_path)
    with pytest.raises(InputError, match=r"video real/a.mp4#7 .*no such frame"):
        pixels(videos, videos.ids.index("real/a"))
    assert videos.drop_damaged_frames(1, cap=0.1) == [
        f"{kind}/a (1 of 20 frames damaged)" for kind in ("fake", "real")
    ]
    assert len(pixels(videos, 0)) == 19
    assert videos.times[0].tolist() == [k / videos.rates[0] for k in range(20) if k != 7]
