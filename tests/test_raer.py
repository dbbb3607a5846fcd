"""RAER's layout: lists, labels, frames, boxes, segments, both streams, and a validation part held
out by folder.
"""

import io
import json
import posixpath
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from common.data import raer
from common.data.images import UNLABELED
from common.errors import InputError
from tests.data import BODY_BOX, FACE_BOX, numbered_raer, numbered_raer_frame

LISTS = {
    "train": [
        ("a b/c  1", 1),
        ("a b/c 2", 2),
        ("d/c 3", 3),
        ("d/c 4", 4),
        ("e/c 5", 5),
        ("e/c 6", 1),
    ],
    "val": [("v/1", 2)],
    "test": [("t/1", 3)],
}


def opened(path, **changes):
    path = path if isinstance(path, tuple) else str(path)
    return raer.open_clips(path, **{"workers": 2, "margin": 0.0} | changes)


def without(content, *keys):
    return {key: value for key, value in content.items() if key not in keys}


def zipped(root, prefix=""):
    archive = root.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                file.write(path, prefix + path.relative_to(root).as_posix())
    return archive


def shown(clips, index, positions):
    ((face, context),) = clips.batches([(np.array([index]), np.array([positions]))], 2)
    return face[0], context[0]


def test_several_paths_are_clips_with_the_boxes_of_their_own(tmp_path, monkeypatch):
    left = numbered_raer(tmp_path / "left", LISTS)
    right = numbered_raer(
        tmp_path / "right",
        {"train": [("a b/c  1", 1), ("z", 2)]},
        faces=lambda boxes: {
            clip: dict.fromkeys(files, [0, 0, 9, 9]) for clip, files in boxes.items()
        },
        classes="x\ny\n",
    )
    archive = zipped(left)
    alone = {root: opened(root, labels=False) for root in (left, right)}
    (tmp_path / ".cwd").mkdir()
    monkeypatch.chdir(tmp_path / ".cwd")
    clips = opened(("../left/", str(right), "../left.zip"), labels=False)
    assert clips.ids == [
        *(f"../left/{clip}" for clip in alone[left].ids),
        *(f"{right}/{clip}" for clip in alone[right].ids),
        *(f"../left.zip/{clip}" for clip in alone[left].ids),
    ]
    assert archive.exists() and (clips.labels == UNLABELED).all() and not clips.splits.any()
    sources = [(root, i) for root in (left, right, left) for i in range(len(alone[root]))]
    for index, (root, i) in enumerate(sources):
        for ours, wanted in zip(
            shown(clips, index, [0, 1, 2]), shown(alone[root], i, [0, 1, 2]), strict=True
        ):
            assert torch.equal(ours, wanted)
    # Folders of one clip each are called as they were given; one count says what is missing.
    folders = ("../left/t/1", "../left/v/1")
    with pytest.raises(InputError, match="6 of 6 frames have no face box, 2 of 2 clips no body"):
        opened(folders, labels=False)
    two = opened(folders, labels=False, missing_box="full")
    assert two.ids == list(folders) and len(two.notes) == 1


@pytest.mark.parametrize("name", ["absent", "empty", "a/note.txt"])
def test_one_of_several_paths_without_clips_is_refused_by_name(tmp_path, name):
    numbered_raer_frame(tmp_path / "a" / "0.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "note.txt").write_text("no image")
    with pytest.raises(InputError, match=name):
        opened((str(tmp_path / "a"), str(tmp_path / name)), labels=False, missing_box="full")


@pytest.mark.parametrize("prefix", ["", "RAER/", "some where/RAER/"])
def test_a_folder_and_a_zip_read_alike_and_names_may_have_spaces(tmp_path, prefix):
    root = numbered_raer(tmp_path / "raer", LISTS)
    plain, packed = opened(root), opened(zipped(root, prefix))
    assert plain.ids == packed.ids and plain.fingerprint == packed.fingerprint
    assert plain.ids == [clip for part in ("train", "val", "test") for clip, _ in LISTS[part]]
    assert plain.labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert plain.classes == list(raer.CLASSES) and plain.descriptions == list(raer.CLASSES.values())
    parts = raer.split(plain)
    assert {name: len(own) for name, own in parts.items()} == {"train": 6, "val": 1, "test": 1}
    for clips in (plain, packed):
        face, context = shown(clips, 4, [2, 0])
        for stream in (face, context):
            assert stream.dtype == torch.uint8 and stream.shape == (2, 3, 24, 24)
            assert stream[:, 1, 12, 12].tolist() == [2, 0]  # in order of time
            assert (stream[:, 0, 12, 12] == 4).all()


def test_absolute_and_foreign_folders_in_the_lists_are_found(tmp_path):
    root = numbered_raer(tmp_path / "raer", LISTS)
    for name in ("train.txt", "val.txt", "test.txt"):
        lines = (root / name).read_text().splitlines()
        (root / name).write_text("".join(f"/home/some body/RAER/{line}\n" for line in lines))
    for name in ("face.json", "body.json"):
        content = json.loads((root / name).read_text())
        (root / name).write_text(
            json.dumps({f"D:\\RAER\\{clip}".replace("/", "\\"): b for clip, b in content.items()})
        )
    clips = opened(root)
    assert clips.ids == [clip for part in LISTS.values() for clip, _ in part]
    assert (
        np.array_equal(clips.images.faces, np.tile(FACE_BOX, (24, 1)))
        and not np.isnan(clips.images.bodies).any()
    )


def test_labels_from_zero_are_told_by_a_zero_in_any_list(tmp_path):
    shifted = {part: [(clip, label - 1) for clip, label in lines] for part, lines in LISTS.items()}
    zero, one = (
        opened(numbered_raer(tmp_path / "zero", shifted)),
        opened(numbered_raer(tmp_path / "one", LISTS)),
    )
    assert np.array_equal(zero.labels, one.labels)
    assert zero.notes[0].startswith("labels are counted from 0: 0 neutrality")
    assert one.notes[0].startswith("labels are counted from 1: 1 neutrality")
    # A list that lacks the first class counts as the others do.
    shifted["test"] = [("t/1", 4)]
    assert opened(numbered_raer(tmp_path / "more", shifted)).labels[-1] == 4


@pytest.mark.parametrize(("base", "labels"), [(0, [1, 2]), (1, [0, 1]), (None, [0, 1])])
def test_labels_count_from_what_is_asked_for(tmp_path, base, labels):
    root = numbered_raer(tmp_path / "raer", {"test": [("t/1", 1), ("t/2", 2)]})
    clips = opened(root, label_base=base)
    assert clips.labels.tolist() == labels and clips.label_base == (1 if base is None else base)


@pytest.mark.parametrize(
    ("labels", "base", "hint"),
    [
        ((0, 1), 1, "label 0, allowed are 1 to 5 .*; fix it, or --label-base 0"),
        ((1, 5), 0, "label 5, allowed are 0 to 4 .*; fix it, or --label-base 1"),
        ((0, 5), 1, "label 0, allowed are 1 to 5 .*; fix it, or name every class"),
    ],
)
def test_labels_that_contradict_their_base_are_refused(tmp_path, labels, base, hint):
    root = numbered_raer(tmp_path / "raer", {"test": [(f"t/{i}", i) for i in labels]})
    with pytest.raises(InputError, match=hint):
        opened(root, label_base=base)


def test_a_model_s_classes_are_those_of_data_without_the_file(tmp_path):
    lists = {"test": [("t/1", 3), ("t/2", 1)]}
    known = ["c", "a", "b"]
    assert opened(numbered_raer(tmp_path / "bare", lists), known=known).classes == known
    named = numbered_raer(tmp_path / "named", lists, classes="a\nb\nc\n")
    assert opened(named, known=known).classes == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("labels", "base"), [([1, 2], None), ([2], None), ([0, 1], 0), ([2, 3], 1)]
)
def test_numbers_for_a_model_without_a_base_are_read_if_they_tell_it(tmp_path, labels, base):
    """A model trained on labels that are names, or on the embedded clips, knows no base."""
    root = numbered_raer(tmp_path / "raer", {"test": [(f"t/{i}", i) for i in labels]})
    known = ["calm", "glad", "odd"]
    if base is None:
        with pytest.raises(InputError, match=r"count from 0 or from 1.*--label-base 0 or 1"):
            opened(root, known=known)
    assert opened(root, known=known, label_base=base or 0).labels.tolist() == [
        label - (base or 0) for label in labels
    ]


def test_classes_and_descriptions_come_from_the_file(tmp_path):
    classes = "calm\tsomebody calm\nenjoyment\n\nbored"
    lists = {"train": [("a/1", 1), ("a/2", 2)], "test": [("t/1", 3)]}
    clips = opened(numbered_raer(tmp_path / "raer", lists, classes=classes))
    assert clips.classes == ["calm", "enjoyment", "bored"]
    assert clips.descriptions == [
        "somebody calm",
        raer.CLASSES["enjoyment"],
        "an expression of bored",
    ]
    with pytest.raises(InputError, match=r"classes\.txt names \['calm', 'calm'\]"):
        opened(numbered_raer(tmp_path / "twice", lists, classes="calm\ncalm\n"))


@pytest.mark.parametrize(
    ("classes", "fault"),
    [
        ("1 calm\n2 glad\n", "'1 calm' has a number"),
        ("0. calm\n1. glad\n", r"'0\. calm' has a number"),
        ("1\tcalm\n2\tglad\n", "'1' has a number"),
        ("(1) calm\n(2) glad\n", r"'\(1\) calm' has a number"),
        ("0=calm\n1=glad\n", "'0=calm' has a number"),
        ("glad\t2\ncalm\t1\n", "'glad' has a number for a description"),
        ("calm, a calm face\nglad\n", "'calm, a calm face' has ',' in"),
        ("calm: a calm face\nglad\n", "'calm: a calm face' has ':' in"),
        ("calm - a calm face\nglad\n", "'calm - a calm face' has ' - ' in"),
        ("calm   a calm face\nglad\n", "'calm   a calm face' has '   ' in"),
        ("- calm\n- glad\n", "'- calm' has '-' before"),
        ('"calm"\n"glad"\n', "'\"calm\"' has '\"' before"),
        ("calm\ta face\nglad\ta face\n", "'calm' has the description of another"),
        ("calm\ta face\nglad\tA  face\n", "'calm' has the description of another"),
        ("calm\nglad\nCalm\n", "'calm' has the description of another"),
    ],
)
def test_classes_of_another_form_are_refused_with_the_form(tmp_path, classes, fault):
    root = numbered_raer(tmp_path / "raer", {"test": [("t/1", 1)]}, classes=classes)
    with pytest.raises(InputError, match=rf"classes\.txt: class {fault}.*name, tab, description"):
        opened(root)


def test_names_of_classes_may_have_any_letters_and_words(tmp_path):
    names = ["mild anger/disgust", "Überraschung", "3d-smile", "level 2", "look-away", "don't know"]
    lists = {"test": [("t/1", 1)]}
    assert opened(numbered_raer(tmp_path, lists, classes="\n".join(names))).classes == names


def test_raer_s_classes_are_said_to_be_a_default(tmp_path):
    lists = {"test": [("t/1", 1)]}
    assert "default" in opened(numbered_raer(tmp_path / "bare", lists)).notes[0]
    named = numbered_raer(tmp_path / "named", lists, classes="\n".join(raer.CLASSES))
    assert "default" not in opened(named).notes[0]


def test_labels_beyond_the_classes_are_refused_by_line(tmp_path):
    lists = LISTS | {"test": [("t/1", 6)]}
    with pytest.raises(
        InputError,
        match=r"test\.txt line 1: label 6, allowed are 1 to 5 \(neutrality, .*classes\.txt",
    ):
        opened(numbered_raer(tmp_path / "raer", lists))
    lists = LISTS | {"test": [("t/1", 0)]}
    with pytest.raises(InputError, match=r"train\.txt line 5: label 5, allowed are 0 to 4"):
        opened(numbered_raer(tmp_path / "mixed", lists))


@pytest.mark.parametrize("line", ["a/1 3", "a/1 three 1", "a/1 3 -1", "a/1 3 1.5", "1"])
def test_lines_of_another_form_are_refused_by_number(tmp_path, line):
    root = numbered_raer(tmp_path / "raer", LISTS)
    (root / "val.txt").write_text(f"\nv/1 3 2\n{line}\n")
    with pytest.raises(
        InputError, match=r"val\.txt line 3: .*expected `clip_folder num_frames label`"
    ):
        opened(root)


def test_clips_in_two_splits_or_listed_twice_are_refused(tmp_path):
    leak = LISTS | {"test": [("t/1", 3), ("d/c 3", 3)]}
    with pytest.raises(
        InputError,
        match=r"1 clips are in two splits: d/c 3 \(train\.txt line 3, test\.txt line 2\)",
    ):
        opened(numbered_raer(tmp_path / "leak", leak))
    with pytest.raises(
        InputError, match=r"1 clips are listed twice: v/1 \(val\.txt line 1, val\.txt line 2\)"
    ):
        opened(numbered_raer(tmp_path / "twice", LISTS | {"val": [("v/1", 2), ("v/1", 2)]}))


def test_wrong_frame_counts_are_named_and_taken_as_they_are_on_demand(tmp_path):
    root = numbered_raer(tmp_path / "raer", LISTS)
    numbered_raer_frame(root / "t/1/11.png", 7, 3)
    with pytest.raises(
        InputError,
        match=r"1 of 8 clips have another number .*t/1 has 4 frames, test\.txt line 1 says 3",
    ):
        opened(root)
    clips = opened(root, on_bad_item="skip", missing_box="full")
    assert clips.lengths.tolist() == [3] * 7 + [4] and "t/1 has 4 frames" in clips.notes[1]


def test_clips_without_frames_are_named_and_left_out_on_demand(tmp_path):
    root = numbered_raer(tmp_path / "raer", LISTS)
    with (root / "train.txt").open("a") as file:
        file.write("e/gone 3 2\n")
    with pytest.raises(
        InputError,
        match="1 of 9 clips have no frames: e/gone; complete the data, or --on-bad-item skip",
    ):
        opened(root)
    with pytest.raises(InputError, match=r"1 of 9 clips have .* \(1%\); .*--allow-missing SHARE"):
        opened(root, on_bad_item="skip")
    clips = opened(root, on_bad_item="skip", allow_missing=0.12)
    assert len(clips) == 8 and clips.notes[1] == "left out 1 of 9 clips without frames: e/gone"
    other = numbered_raer(tmp_path / "other", {"test": [("t/1", 1)]})
    (other / "test.txt").write_text("gone/2 3 1\n")
    with pytest.raises(InputError, match="none of the 1 listed .*: gone/2; there are t/1"):
        opened(other, on_bad_item="skip", allow_missing=1.0)
    # Absent and damaged ones share what is allowed.
    (root / "t/1/8.png").write_bytes(b"no image")
    (root / "v/1/8.png").unlink()
    options = dict(workers=1, missing_box="error", margin=0.0, store_size=None)
    options |= dict(on_bad_item="skip", say=[].append)
    with pytest.raises(InputError, match="1 of 8 .* besides 1 clip without .*--allow-missing"):
        raer.prepare(str(root), allow_missing=0.12, **options)
    notes = raer.prepare(str(root), allow_missing=0.23, **options).notes[1:]
    assert ["e/gone" in notes[0], "v/1 has 2 frames" in notes[1]] == [True] * 2
    assert notes[2] == "left out 1 clip with damaged frames: t/1"


def test_a_damaged_frame_is_named_and_takes_its_clip_along(tmp_path):
    lists = {"train": [(f"a/{i}", 1 + i % 5) for i in range(150)], "test": [("t/1", 3)]}
    root = numbered_raer(tmp_path / "raer", lists, length=1)
    (root / "a/77/8.png").write_bytes(b"no image")
    clips = opened(root)
    with pytest.raises(InputError, match=r"image a/77/8\.png in raer cannot be read"):
        shown(clips, clips.ids.index("a/77"), [0])
    said = []
    options = dict(on_bad_item="skip", workers=2, missing_box="error", margin=0.0, store_size=None)
    clips = raer.prepare(str(root), say=said.append, **options)
    assert len(clips) == 150 and "a/77" not in clips.ids
    assert "left out 1 clip with damaged frames: a/77" in said


def lacking(root, **changes):
    """The first clip's second face and the last clip's body are missing."""

    def faces(boxes):
        boxes["a b/c  1"] = without(boxes["a b/c  1"], "9.png")
        return boxes

    return numbered_raer(
        root, LISTS, faces=faces, bodies=lambda boxes: boxes | {"t/1": None}, **changes
    )


def test_missing_boxes_are_counted_and_refused(tmp_path):
    said = (
        r"1 of 24 frames have no face box, 1 of 8 clips no body box \(first: t/1\);"
        r" .*--missing-box full or skip"
    )
    with pytest.raises(InputError, match=said):
        opened(lacking(tmp_path / "raer"))


def test_the_whole_frame_stands_for_a_missing_box(tmp_path):
    clips = opened(lacking(tmp_path / "raer"), missing_box="full")
    assert clips.lengths.tolist() == [3] * 8
    assert clips.notes[1].startswith("1 of 24 frames have no face box, 1 of 8 clips no body box")
    face, context = shown(clips, 0, [0, 1])
    assert face[0, 2].max() < 20 * 5 and face[1, 2].max() > 38 * 5  # the frame's right end
    assert context[:, 2].max() < 34 * 5
    face, context = shown(clips, 7, [0])
    assert face[0, 2].max() < 20 * 5 and context[0, 2].max() > 38 * 5


def test_frames_and_clips_without_boxes_are_left_out(tmp_path):
    clips = opened(lacking(tmp_path / "raer"), missing_box="skip")
    assert "t/1" not in clips.ids and clips.lengths.tolist() == [2] + [3] * 6
    assert clips.notes[1].endswith("left out, and with them 1 whole clips")
    face, _ = shown(clips, 0, [0, 1])
    assert face[:, 1, 12, 12].tolist() == [0, 2]
    with pytest.raises(InputError, match="no clips are left"):
        opened(numbered_raer(tmp_path / "none", LISTS, faces=lambda boxes: {}), missing_box="skip")


def test_without_any_file_of_boxes_they_are_all_missing(tmp_path):
    root = numbered_raer(tmp_path / "raer", LISTS)
    (root / "face.json").unlink()
    with pytest.raises(
        InputError,
        match=r"24 of 24 frames have no face box, 0 of 8 clips no body.*; \S+ has no face\.json;",
    ):
        opened(root)


def test_missing_boxes_are_counted_by_class_and_a_class_that_lacks_them_is_named(tmp_path):
    def faces(boxes):
        return boxes | {"t/1": None, "d/c 3": {"8.png": None}}  # both of confusion

    root = numbered_raer(tmp_path / "raer", LISTS, faces=faces)
    counted = "neutrality 0 of 6, enjoyment 0 of 6, confusion 6 of 6, fatigue 0 of 3"
    with pytest.raises(InputError, match=f"by class: {counted}"):
        opened(root)
    notes = opened(root, missing_box="full").notes
    warned = "WARN 100% of the frames of confusion lack a box and 0% of the others"
    assert counted in notes[1] and notes[2].startswith(warned) and len(notes) == 3
    even = numbered_raer(
        tmp_path / "even",
        LISTS,
        faces=lambda boxes: {clip: without(own, "8.png") for clip, own in boxes.items()},
    )
    assert len(opened(even, missing_box="full").notes) == 2


def renamed_boxes(root, change, name="face"):
    file = root / f"{name}.json"
    boxes = json.loads(file.read_text())
    file.write_text(json.dumps({change(clip): value for clip, value in boxes.items()}))
    return root


@pytest.mark.parametrize(
    "change",
    [
        lambda clip: ("/home/a/RAER/" if clip < "d/d" else "D:/x/y/z/") + clip,  # two roots
        str.upper,
        lambda clip: f"{clip}.mp4",
        lambda clip: posixpath.basename(clip),
        lambda clip: f"some/where/{posixpath.basename(clip)}.MP4",
    ],
)
def test_boxes_are_found_by_keys_of_other_forms(tmp_path, change):
    lists = {"train": [("d/c 3", 1), ("d/c 4", 2), ("e/c 5", 3)], "test": [("t/1", 3)]}

    def faces(boxes):
        return {
            clip: dict.fromkeys(own, [i, 4, 20 + i, 14])
            for i, (clip, own) in enumerate(boxes.items())
        }

    root = numbered_raer(tmp_path / "raer", lists, faces=faces)
    whole = opened(root).images.faces
    assert np.array_equal(opened(renamed_boxes(root, change)).images.faces, whole)
    flat = {
        f"{clip}/{file.replace('png', 'jpg')}": box
        for clip, own in json.loads((root / "face.json").read_text()).items()
        for file, box in own.items()
    }
    (root / "face_detection_result.json").write_text(json.dumps(flat))
    (root / "face.json").unlink()
    if not any(".mp4/" in key.lower() for key in flat):
        assert np.array_equal(opened(root).images.faces, whole)


def test_lists_of_two_roots_are_found_and_an_absent_clip_is_no_other_one(tmp_path):
    root = numbered_raer(tmp_path / "raer", LISTS)
    for name, top in {"train.txt": "/home/a/RAER/", "test.txt": "D:/x/y/z/"}.items():
        lines = (root / name).read_text().splitlines()
        (root / name).write_text("".join(f"{top}{line}\n" for line in lines))
    assert len(opened(root)) == 8
    with (root / "train.txt").open("a") as file:
        file.write("/home/a/RAER/v/1x/1 3 2\n")
    with pytest.raises(InputError, match=r"1 of 9 clips have no frames: /home/a/RAER/v/1x/1"):
        opened(root)


def test_a_clip_that_is_absent_is_not_read_from_another_folder(tmp_path):
    """Not where other names stand as they are, even if more clips of the other folder would fit."""
    lists = {"train": [("a/1", 1), ("b/1", 2), ("b/2", 3)], "test": [("b/7", 1)]}
    root = numbered_raer(tmp_path / "raer", lists)
    for name in ("face", "body"):
        renamed_boxes(root, lambda clip: clip.replace("b/", "c/"), name)
    with pytest.raises(InputError, match=r"9 of 12 frames have no face box, 3 of 4 clips no body"):
        opened(root)
    for part in ("train", "test"):
        text = (root / f"{part}.txt").read_text()
        (root / f"{part}.txt").write_text(text.replace("b/", "c/"))
    with pytest.raises(InputError, match="3 of 4 clips have no frames: c/1, c/2, c/7"):
        opened(root)


def test_a_list_that_is_read_from_a_folder_of_another_name_says_it(tmp_path):
    root = numbered_raer(tmp_path / "raer", {"train": [("a/b/1", 1), ("a/b/2", 2)]})
    text = (root / "train.txt").read_text()
    for top, said in {"a/b/": False, "/x/RAER/a/b/": False, "b/": False, "a/c/": True}.items():
        (root / "train.txt").write_text(text.replace("a/b/", top))
        assert any("a/c/1 is read from a/b/1" in note for note in opened(root).notes) == said


@pytest.mark.parametrize("missing_box", ["error", "full", "skip"])
def test_a_file_of_boxes_of_which_no_key_fits_shows_one(tmp_path, missing_box):
    def strange(clip):
        return f"video_{clip.replace('/', '_')}"

    for name in ("face", "body"):
        root = numbered_raer(tmp_path / name, LISTS)
        with pytest.raises(InputError, match=r"first is video_a b_c  1, expected is one as a b/c"):
            opened(renamed_boxes(root, strange, name), missing_box=missing_box)
    root = numbered_raer(
        tmp_path / "files",
        LISTS,
        faces=lambda boxes: {clip: {"f1": FACE_BOX} for clip in boxes},
    )
    with pytest.raises(InputError, match=r"first of a b/c  1 is f1, expected is one as 8\.png"):
        opened(root, missing_box=missing_box)


def test_boxes_of_widths_and_heights_are_the_same_boxes(tmp_path):
    def sides(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    whole = opened(numbered_raer(tmp_path / "corners", LISTS)).images
    root = numbered_raer(
        tmp_path / "sides",
        LISTS,
        faces=lambda boxes: {c: {f: sides(b) for f, b in own.items()} for c, own in boxes.items()},
        bodies=lambda boxes: {clip: sides(box) for clip, box in boxes.items()},
    )
    images = opened(root, box_format="xywh").images
    assert np.array_equal(images.faces, whole.faces)
    assert np.array_equal(images.bodies, whole.bodies)
    with pytest.raises(InputError, match=r"or --box-format xywh"):
        opened(root)  # FACE_BOX's width is its left edge


@pytest.mark.parametrize(
    "box", [[10, 4, 10, 14], [10, 14, 20, 4], [40, 4, 60, 14], [-9, 4, 0, 14], [10, 24, 20, 30]]
)
def test_degenerate_boxes_are_named(tmp_path, box):
    def faces(boxes):
        boxes["t/1"]["9.png"] = box
        return boxes

    with pytest.raises(
        InputError,
        match=r"face\.json: 1 frames have a degenerate box \(first: t/1/9\.png: .*40 x 24",
    ):
        opened(numbered_raer(tmp_path / "face", LISTS, faces=faces), missing_box="skip")
    with pytest.raises(InputError, match=r"body\.json: 3 frames have a degenerate box"):
        opened(numbered_raer(tmp_path / "body", LISTS, bodies=lambda boxes: boxes | {"t/1": box}))


@pytest.mark.parametrize(
    "box", [[1, 2, 3], "1 2 3 4", [1, 2, 3, "4"], [1, 2, 3, float("nan")], {"l": 1}, 7]
)
def test_what_is_no_box_is_refused(tmp_path, box):
    with pytest.raises(
        InputError, match=r"body\.json: t/1: .*expected \[left, top, right, bottom\] or null"
    ):
        opened(numbered_raer(tmp_path / "raer", LISTS, bodies=lambda boxes: boxes | {"t/1": box}))


def test_boxes_count_pixels_of_the_upright_frame(tmp_path):
    def right(boxes):  # beyond the width of the frame as it is stored
        return {clip: dict.fromkeys(frames, [28, 4, 38, 14]) for clip, frames in boxes.items()}

    root = numbered_raer(tmp_path / "raer", LISTS, faces=right)
    expected = shown(opened(root), 0, [0, 1])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in root.rglob("*.png"):
        with Image.open(path) as frame:
            turned = frame.transpose(Image.Transpose.ROTATE_90)
        assert turned.size == (24, 40)
        turned.save(path, exif=exif)
    for one, other in zip(shown(opened(root), 0, [0, 1]), expected, strict=True):
        assert torch.equal(one, other)


def test_files_of_boxes_of_another_form_are_refused(tmp_path):
    root = numbered_raer(tmp_path / "raer", LISTS, faces=lambda boxes: boxes | {"t/1": FACE_BOX})
    with pytest.raises(InputError, match=r"face\.json: t/1: expected \{frame's file name: box\}"):
        opened(root)
    faults = {
        "{": r"face\.json is not JSON",
        '{"t/1": {}, "t/1": {}}': r"face\.json is not JSON: 't/1' stands twice",
        '{"t/1": {}, "./t\\\\1": {}}': r"face\.json: t/1 stands twice, in two spellings",
    }
    for text, fault in faults.items():
        (root / "face.json").write_text(text)
        with pytest.raises(InputError, match=fault):
            opened(root)


def test_the_face_is_stretched_with_its_margin_as_far_as_the_frame_goes():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (24, 40, 3), np.uint8)
    image = Image.fromarray(pixels)
    # Boxes of whole pixels and the crop's own size: the pixels themselves.
    cut = raer.crop_square(image, np.array([10.0, 4, 20, 14]), 10)
    assert np.array_equal(cut.permute(1, 2, 0), pixels[4:14, 10:20])
    images = raer.TwoStreams(
        "made",
        ["1"],
        [1],
        lambda i: _png(image),
        np.array([[10.0, 0, 20, 10]]),
        np.full((1, 4), np.nan),
        0.2,
    )
    images.resize_store(7)
    left, top, right, bottom = 8, 0, 22, 12  # two pixels on each side, but none above the frame
    expected = image.resize((7, 7), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    assert np.array_equal(images.decode(0)[0].permute(1, 2, 0), np.asarray(expected))


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "size, rows, columns", [((40, 24), (6, 30), (0, 36)), ((24, 40), (0, 36), (7, 29))]
)
def test_the_context_keeps_its_shape_between_black_bars(size, rows, columns):
    pixels = np.random.default_rng(0).integers(100, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    square = raer.letterbox(image, np.full(4, np.nan), 36).permute(1, 2, 0).numpy()
    if size[0] > size[1]:  # 36 x 21.6
        rows = (7, 29)
    inner = square[slice(*rows), slice(*columns)]
    expected = image.resize(inner.shape[1::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(inner, np.asarray(expected))
    assert square.sum() == inner.sum(dtype=np.int64)


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (32, 4, [4, 12, 20, 28]),
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (5, 8, [0, 1, 2, 3, 4, 4, 4, 4]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_evaluation_takes_the_center_of_each_segment(length, count, expected):
    assert raer.segment_frames([length], count).tolist() == [expected]


def test_training_draws_each_frame_of_each_segment_alike(tmp_path):
    for length in (16, 19, 40):
        drawn = np.random.default_rng(length).random((20_000, 16))
        positions = raer.segment_frames(np.full(20_000, length), 16, drawn)
        assert (np.diff(positions) > 0).all()
        edges = np.arange(17) * length // 16
        for t in range(16):
            counts = np.bincount(positions[:, t], minlength=length)
            own = counts[edges[t] : edges[t + 1]]
            assert own.sum() == 20_000 and np.abs(own - own.mean()).max() < 5 * np.sqrt(20_000)


def test_draws_follow_seed_epoch_and_item(tmp_path):
    lists = {"train": [(f"a/{i}", 1 + i % 5) for i in range(5)], "test": [("t/1", 3)]}
    clips = opened(numbered_raer(tmp_path / "raer", lists, length=9))
    items = np.array([0, 1, 2, 3, 4, 6, 12])  # 6 and 12 are clip 0 once and twice more
    whole = clips.train_frames(items, 1, 2, 3)
    assert np.array_equal(clips.train_frames(items[[5, 2]], 1, 2, 3), whole[[5, 2]])
    for seed, epoch in ((2, 2), (1, 3)):
        assert (clips.train_frames(items, seed, epoch, 3) != whole).any()
    assert (whole[0] != whole[5]).any() or (whole[0] != whole[6]).any()
    assert clips.eval_frames(np.array([5, 0]), 3).tolist() == [[1, 4, 7]] * 2
    assert "6 of 6 have fewer frames and repeat the last (first: a/0)" in clips.describe_frames(10)
    assert "fewer" not in clips.describe_frames(9)


def test_a_clip_that_is_drawn_again_becomes_another_item():
    drawn = np.array([3, 1, 3, 0, 3, 1])
    items = raer.number_repeats(drawn, 10)
    assert items.tolist() == [3, 1, 13, 0, 23, 11]
    assert raer.number_repeats(np.array([], np.int64), 10).tolist() == []


def test_frames_are_decoded_once_for_both_streams_and_kept(tmp_path, monkeypatch):
    clips, reads = opened(numbered_raer(tmp_path / "raer", LISTS)), []
    read = clips.images._read_bytes
    clips.images._read_bytes = lambda index: reads.append(index) or read(index)
    everything = [(np.arange(8), clips.eval_frames(np.arange(8), 3))]
    ((face, context),) = clips.batches(everything, 2)
    assert sorted(reads) == list(range(24))
    ((again, _),) = clips.batches(everything, 2)
    assert len(reads) == 24 and torch.equal(face, again)
    # Beyond the cap nothing is kept.
    monkeypatch.setattr("common.data.images._CACHE_BYTES", 24 * 2 * 3 * 24 * 24 - 1)
    fresh = opened(numbered_raer(tmp_path / "again", LISTS))
    ((face, other),) = fresh.batches(everything, 1)
    assert fresh.images._cache is None and torch.equal(face, again) and torch.equal(other, context)


def lectures(root, per_folder=6, folders=20):
    """Clips of `folders` people, all five classes with RAER's kind of imbalance in most of them."""
    labels = [1, 1, 1, 5, 2, 4] * per_folder
    lines = [
        (f"p{p:02d}/c{i}", 3 if p % 4 == 0 and i == 0 else labels[i])
        for p in range(folders)
        for i in range(6)
    ]
    return numbered_raer(root, {"train": lines, "test": [("t/1", 3)]}, length=1)


def test_validation_is_held_out_by_folder_and_stratified(tmp_path):
    said = []
    clips = opened(lectures(tmp_path / "raer"))
    parts = raer.split(clips, say=said.append)
    people = [{clips.ids[i].split("/")[0] for i in parts[name]} for name in ("train", "val")]
    assert not people[0] & people[1] and len(people[1]) == 4
    counts = [np.bincount(clips.labels[parts[name]], minlength=5) for name in ("train", "val")]
    assert (counts[1] > 0).all() and np.allclose(
        counts[1] / (counts[0] + counts[1]), 0.2, atol=0.06
    )
    assert said[0] == (
        "no val.txt: 24 training clips are held out for validation, whole parent folders each"
    )
    assert said[1].startswith("WARN test has no clips of neutrality, enjoyment, fatigue, dis")
    assert said[1].endswith("uar_present is over confusion") and len(said) == 2
    assert np.array_equal(parts["train"], np.setdiff1d(np.arange(120), parts["val"]))
    alone = raer.split(clips, ["val"], say=said.append)
    assert list(alone) == ["val"] and np.array_equal(alone["val"], parts["val"])


def test_the_held_out_clips_depend_on_names_alone(tmp_path):
    clips = opened(lectures(tmp_path / "raer"))
    held = {clips.ids[i] for i in raer.split(clips)["val"]}
    lines = (tmp_path / "raer" / "train.txt").read_text().splitlines()
    (tmp_path / "raer" / "train.txt").write_text("\n".join(reversed(lines)))
    again = opened(tmp_path / "raer")
    assert again.ids != clips.ids and {again.ids[i] for i in raer.split(again)["val"]} == held


@pytest.mark.parametrize("parent", ["clips/train", "class{label}"])
def test_folders_that_hold_whole_classes_are_no_people(tmp_path, parent):
    lines = [(f"{parent.format(label=1 + i % 5)}/c{i}", 1 + i % 5) for i in range(100)]
    clips = opened(
        numbered_raer(tmp_path / "raer", {"train": lines, "test": [("t/1", 3)]}, length=1)
    )
    said = []
    parts = raer.split(clips, say=said.append)
    assert np.bincount(clips.labels[parts["val"]]).tolist() == [4] * 5
    assert said[0].endswith("whole clips each")


def test_parts_that_training_cannot_use_are_refused(tmp_path):
    only = opened(numbered_raer(tmp_path / "test", {"test": [("t/1", 3)]}))
    assert raer.split(only, ["test"])["test"].tolist() == [0]
    with pytest.raises(InputError, match=r"no clips in train; needed is train\.txt"):
        raer.split(only)
    few = {"train": [("a/1", 1), ("a/2", 2)], "test": [("t/1", 3)]}
    with pytest.raises(
        InputError, match=r"train has no clips of confusion, fatigue.*let classes\.txt name"
    ):
        raer.split(opened(numbered_raer(tmp_path / "few", few)))


def test_folders_without_lists_are_clips_without_labels(tmp_path):
    root = numbered_raer(tmp_path / "raer", LISTS)
    for part in LISTS:
        (root / f"{part}.txt").unlink()
    with pytest.raises(InputError, match=r"no train\.txt or test\.txt there"):
        opened(root)
    clips = opened(root, labels=False)
    assert sorted(clips.ids) == sorted(clip for lines in LISTS.values() for clip, _ in lines)
    assert (clips.labels == UNLABELED).all() and not clips.splits.any()
    one = opened(root / "d" / "c 3", labels=False, missing_box="full")
    assert one.ids == ["c 3"] and one.lengths.tolist() == [3]


@pytest.mark.parametrize(
    "form",
    [
        lambda file: {file: [1, 2, 11, 12]},
        lambda file: {f"somewhere/photos/{file.upper()}": [1, 2, 11, 12]},
        lambda file: {"photos": {file: [1, 2, 11, 12]}},
        lambda file: {file: {file: [1, 2, 11, 12]}},
    ],
)
@pytest.mark.parametrize("place", ["folder", "zip", "zip of a folder", "several"])
def test_images_that_lie_loose_are_a_clip_each_unless_told_otherwise(tmp_path, form, place):
    root = tmp_path / "photos"
    for k in range(12):
        numbered_raer_frame(root / f"{k}.png", k)
    merged = {}
    for k in range(12):
        for key, value in form(f"{k}.png").items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    (root / "face.json").write_text(json.dumps(merged))
    (root / "body.json").write_text(json.dumps({f"{k}.png": BODY_BOX for k in range(12)}))
    path = root if place == "folder" else zipped(root, "" if place == "zip" else "photos/")
    if place == "several":
        numbered_raer_frame(tmp_path / "one.png", 12)
        path = (str(path), str(tmp_path / "one.png"))
    clips = opened(path, labels=False, as_clip=False, missing_box="full")
    count = 13 if place == "several" else 12
    assert len(clips) == count and (clips.lengths == 1).all()
    before = f"{path[0]}/" if place == "several" else ""
    assert clips.ids[:12] == [f"{before}{k}.png" for k in range(12)]
    assert "12 images lie in no folder" in clips.notes[0] and "--as-clip" in clips.notes[0]
    if place == "several":
        assert clips.ids[12] == str(tmp_path / "one.png")
        assert "1 of 13 frames have no face box, 1 of 13 clips no body" in clips.notes[1]
    else:
        assert len(clips.notes) == 1
    assert clips.images.faces[:12].tolist() == [[1, 2, 11, 12]] * 12
    assert clips.images.bodies[:12].tolist() == [BODY_BOX] * 12
    assert all((shown(clips, k, [0])[0][0, 0] == k).all() for k in range(12))
    (root / "body.json").unlink(), (root / "face.json").unlink()
    whole = opened(root, labels=False, as_clip=True, missing_box="full")
    assert whole.ids == ["photos"] and whole.lengths.tolist() == [12]
    with pytest.raises(InputError, match=rf"no body box \(first: {re.escape(str(root))}\)"):
        opened(root, labels=False, as_clip=True, missing_box="error")


@pytest.mark.parametrize("name", ["face.json", "face_detection_result.json"])
@pytest.mark.parametrize("several", [False, True])
def test_one_image_takes_its_boxes_from_the_files_beside_it(tmp_path, monkeypatch, name, several):
    (tmp_path / "a{b}").mkdir()
    monkeypatch.chdir(tmp_path / "a{b}")
    for k in range(2):
        numbered_raer_frame(Path(f"{k}.png"), k)
    Path(name).write_text(json.dumps({f"{k}.png": [k, 2, 11, 12] for k in range(2)}))
    Path("body.json").write_text(json.dumps({"1.png": BODY_BOX, "a/clip": BODY_BOX}))
    for path in ("1.png", "./1.png", str(tmp_path / "a{b}" / "1.png")):
        given = (path, "0.png") if several else path
        clips = opened(given, labels=False, as_clip=False, missing_box="full")
        assert clips.ids == ([path, "0.png"] if several else ["1"])
        assert clips.images.faces.tolist() == [[1, 2, 11, 12], [0, 2, 11, 12]][: 1 + several]
        assert clips.images.bodies[0].tolist() == BODY_BOX
        assert len(clips.notes) == several
    numbered_raer_frame(Path("2.png"), 2)
    with pytest.raises(InputError, match=r"1 of 1 frames have no face box.* full or skip$"):
        opened("2.png", labels=False, as_clip=False, missing_box="error")
    (note,) = opened("2.png", labels=False, as_clip=False, missing_box="full").notes
    assert "the whole frame stands for it" in note


@pytest.mark.parametrize("text", ["", "\n \n", "video_name,label\n"])
def test_a_list_of_no_clips_is_refused_by_name(tmp_path, text):
    root = numbered_raer(tmp_path / "raer", LISTS)
    empty = tmp_path / "empty.csv"
    empty.write_text(text)
    for part in ("train", "test"):
        other = {"train": str(root / "train.txt"), "test": str(root / "test.txt")}
        with pytest.raises(InputError, match=r"empty\.csv lists no clips; expected are lines `"):
            opened(root, lists=other | {part: str(empty)})
    (root / "val.txt").write_text(text)
    with pytest.raises(InputError, match=r"val\.txt lists no clips"):
        opened(root)


def test_an_image_beside_clips_is_a_clip_and_theirs_keep_their_boxes(tmp_path):
    root = numbered_raer(tmp_path / "raer", {"test": [("a", 1), ("b", 2)]})
    numbered_raer_frame(root / "8.png", 9)
    clips = opened(root, labels=False, as_clip=False, missing_box="full")
    assert clips.ids == ["a", "b", "8.png"] and clips.lengths.tolist() == [3, 3, 1]
    boxes = dict(zip(clips.ids, clips.images.faces[np.cumsum(clips.lengths) - 1], strict=True))
    assert boxes["a"].tolist() == FACE_BOX and np.isnan(boxes["8.png"]).all()


# How the projects' own files list clips: the folder of a clip, and its lines by label.
PUBLIC = {
    "DFEW": ("Clip/clip_224x224/0000{}", "video_name,label", "{},{}", ("1", "7")),
    "DFER-CLIP's DFEW": ("DFEW_Frame_Face/0000{}", "", "/data/x/DFEW_Frame_Face/0000{} 3 {}", "06"),
    "FERV39k": ("2_ClipsforFaceCrop/Action/Happy/000{}", "", "Action/Happy/000{} {}", None),
    "MAFW": ("data/frames/0000{}", "", "0000{}.mp4 {}", None),
    "MAE-DFER's": ("data/frames/0000{}", "", "/root/data/frames/0000{} {}", "06"),
}


@pytest.mark.parametrize("form", PUBLIC)
def test_lists_of_public_projects_are_read(tmp_path, form):
    folder, header, line, labels = PUBLIC[form]
    names = [f"class {k}" for k in range(7)]
    if labels is None:
        names = ["Angry", "Happy"]
        labels = names
    else:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "classes.txt").write_text("\n".join(names))
    lists = {}
    for part, numbers in {"train": (1, 2), "test": (3, 4)}.items():
        lines = [header] if header else []
        for number, label in zip(numbers, labels, strict=True):
            numbered_raer_frame(tmp_path / "data" / folder.format(number) / "0.png", number)
            for k in (1, 2):
                numbered_raer_frame(tmp_path / "data" / folder.format(number) / f"{k}.png", number)
            lines.append(line.format(number, label))
        lists[part] = str(tmp_path / f"{part}.csv")
        (tmp_path / f"{part}.csv").write_text("\n".join(lines) + "\n")
    clips = opened(tmp_path / "data", lists=lists, streams="face", missing_box="full")
    assert clips.classes == names and clips.splits.tolist() == ["train"] * 2 + ["test"] * 2
    assert clips.labels.tolist() == [0, len(names) - 1] * 2
    for k in range(4):
        ((face,),) = clips.batches([(np.array([k]), np.array([[0]]))], 2)
        assert (face[0, 0, 0] == k + 1).all()
    with pytest.raises(InputError, match="test.csv line .*'odd', expected "):
        (tmp_path / "test.csv").write_text((tmp_path / "test.csv").read_text() + "odd\n")
        opened(tmp_path / "data", lists=lists, missing_box="full")
    with pytest.raises(InputError, match="--train-list .*absent.csv cannot be read"):
        opened(tmp_path / "data", lists={"train": "absent.csv"})


def test_labels_that_are_names_are_all_of_them_known(tmp_path):
    root = numbered_raer(tmp_path / "raer", {"train": [("a/1", 1), ("a/2", 2)]})
    (root / "train.txt").write_text("a/1 glad\na/2 calm\n")
    (root / "test.txt").write_text("a/3 glad\n")
    numbered_raer_frame(root / "a" / "3" / "0.png")
    clips = opened(root, missing_box="full", known=["glad", "calm", "odd"])
    assert clips.labels.tolist() == [0, 1, 0] and clips.label_base is None
    with pytest.raises(
        InputError, match="line 2: label calm; did you mean calms.*allowed are calms"
    ):
        opened(root, known=["calms", "glad"])
    with pytest.raises(InputError, match="--label-base 1: labels of .* are names"):
        opened(root, label_base=1)
    (root / "test.txt").write_text("a/3 1\n")
    with pytest.raises(InputError, match="some labels are numbers and some are names"):
        opened(root)
    for part, line in {"train": "a/1 glad", "test": "a/2 glad"}.items():
        (root / f"{part}.txt").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"the lists name \['glad'\]; needed are two classes"):
        opened(root)
    (root / "train.txt").write_text("a/1 glad\na/2 calm\n")
    (root / "test.txt").write_text("a/3 Glad\n")
    with pytest.raises(InputError, match="labels Glad and glad differ in case alone"):
        opened(root)


def test_folders_of_classes_hold_images_or_folders_of_frames(tmp_path):
    for k, name in enumerate(["train/calm/1.png", "train/glad/2.png", "train/glad/long/1.png"]):
        numbered_raer_frame(tmp_path / name, k)
    numbered_raer_frame(tmp_path / "train/glad/long/2.png", 2)
    numbered_raer_frame(tmp_path / "testing/glad/1.png", 3)
    clips = opened(tmp_path, missing_box="full")
    found = dict(
        zip(clips.ids, zip(clips.splits, clips.labels, clips.lengths, strict=True), strict=True)
    )
    assert clips.classes == ["calm", "glad"] and found == {
        "train/calm/1.png": ("train", 0, 1),
        "train/glad/2.png": ("train", 1, 1),
        "train/glad/long": ("train", 1, 2),
        "testing/glad/1.png": ("test", 1, 1),
    }
    assert "no lists: 4 clips in folders SPLIT/CLASS" in clips.notes
    (tmp_path / "classes.txt").write_text("glad\ncalm\n")
    assert opened(tmp_path, missing_box="full").classes == ["glad", "calm"]
    # With boxes, or another folder, it is RAER's layout, whose lists are missing.
    (tmp_path / "face.json").write_text("{}")
    with pytest.raises(InputError, match="no train.txt .*--train-list .*train/CLASS"):
        opened(tmp_path, missing_box="full")


def test_video_files_are_clips(tmp_path, monkeypatch):
    pytest.importorskip("torchcodec", reason="pip install torchcodec, and FFmpeg")
    from torchcodec.encoders import VideoEncoder

    root = tmp_path / "dfew"
    (root / "Clip" / "original").mkdir(parents=True)
    for number, length in {1: 9, 2: 5, 12: 6}.items():
        frames = torch.zeros(length, 3, 48, 64, dtype=torch.uint8)
        frames[..., :32] = 20 * number
        frames[:, :, :, 32:] = torch.arange(length, dtype=torch.uint8)[:, None, None, None] * 20
        VideoEncoder(frames, frame_rate=25).to_file(str(root / f"Clip/original/{number}.mp4"))
    (root / "train.txt").write_text("00001 1\n00012 2\n")
    (root / "test.txt").write_text("00002 3\n")
    boxes = {"12.mp4": {f"{k}": [0, 0, 32, 48] for k in range(6)}}
    (root / "face.json").write_text(json.dumps(boxes))
    clips = opened(root, streams="face", missing_box="full")
    assert clips.ids == [f"Clip/original/{k}.mp4" for k in (1, 12, 2)]
    assert clips.lengths.tolist() == [9, 6, 5]
    assert "14 of 20 frames have no face box" in clips.notes[1]
    ((face,),) = clips.batches([(np.array([0, 1]), np.array([[8, 0], [5, 0]]))], 2)
    whole, cropped = face.float()
    side = face.shape[-1]
    assert whole[0, 0, side // 2, side // 4].item() == pytest.approx(20, abs=6)
    assert whole[0, 0, side // 2, side * 3 // 4].item() == pytest.approx(160, abs=6)
    assert cropped[:, :, side // 2, side // 2].flatten().tolist() == pytest.approx([240] * 6, abs=6)
    monkeypatch.chdir(root / "Clip" / "original")
    both = opened(("1.mp4", "2.mp4"), labels=False, missing_box="full")
    assert both.ids == ["1.mp4", "2.mp4"] and both.lengths.tolist() == [9, 5]
    assert shown(both, 1, [4])[1].shape == (1, 3, side, side)
    alone = opened("1.mp4", labels=False, as_clip=False, missing_box="full")
    assert len(alone) == 1 and alone.lengths.tolist() == [9]
    (root / "Clip" / "original" / "2.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match=r"1 of 3 video files cannot be read .*2\.mp4.* skip"):
        opened(root, streams="face", missing_box="full")
    numbered_raer_frame(root / "a" / "1.png")
    with pytest.raises(InputError, match="some are video files and some are images"):
        opened(("1.mp4", str(root / "a")), labels=False)
    (root / "face.json").unlink()
    left = opened(root, labels=False, missing_box="full")
    assert len(left) == 1 and "3 video files beside folders of frames left out" in left.notes[0]


def test_nothing_there_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text("a/1 3 1\n")
    with pytest.raises(InputError, match="no folders of frames there"):
        opened(tmp_path)


def test_the_fingerprint_follows_boxes_and_labels(tmp_path):
    moved = opened(
        numbered_raer(tmp_path / "moved", LISTS, bodies=lambda boxes: boxes | {"t/1": [0, 0, 9, 9]})
    )
    other = opened(numbered_raer(tmp_path / "other", LISTS | {"test": [("t/1", 4)]}))
    prints = {
        clips.fingerprint
        for clips in (opened(numbered_raer(tmp_path / "raer", LISTS)), moved, other)
    }
    assert len(prints) == 3


def test_the_embedded_clips_have_raers_classes_and_shares():
    said = []
    options = dict(store_size=None, on_bad_item="error", workers=1, missing_box="error", margin=0.2)
    clips = raer.prepare("sample", say=said.append, **options)
    parts = raer.split(clips)
    assert np.bincount(clips.labels[parts["train"]]).tolist() == [553, 52, 12, 63, 169]
    assert np.bincount(clips.labels[parts["test"]]).min() >= 40
    ((face, context),) = clips.batches(
        [(parts["test"][:2], clips.eval_frames(parts["test"][:2], 8))], 1
    )
    assert face.shape == context.shape == (2, 8, 3, 32, 32) and not torch.equal(face, context)


def test_validation_is_held_out_by_groups_that_are_given(tmp_path):
    clips = opened(lectures(tmp_path / "raer"))
    # Four persons a lecture: a fifth is one of five lectures.
    lecture = [f"l{int(name[1:3]) // 4}" if name[0] == "p" else "t" for name in clips.ids]
    clips.groups = np.array(lecture, dtype=object)
    said = []
    parts = raer.split(clips, say=said.append)
    sides = {name: set(clips.groups[indices]) for name, indices in parts.items()}
    assert len(sides["val"]) == 1 and len(sides["train"]) == 4 and not sides["val"] & sides["train"]
    assert said[0] == "no val.txt: 24 training clips are held out for validation, whole groups each"
    first = clips.classes[0]
    train = clips.splits == "train"
    clips.groups[train & (clips.labels == 0)] = "one"
    assert 0 not in clips.labels[raer.split(clips, say=said.append)["val"]]
    assert any(line.startswith(f"WARN val has nothing of {first}: too few") for line in said)
    clips.groups = np.array(lecture, dtype=object)
    clips.groups[np.flatnonzero(clips.splits == "test")] = "l0"
    with pytest.raises(InputError, match=r"1 group is in two splits: l0 \(p00/c0 in train, t/1 in"):
        raer.split(clips)
