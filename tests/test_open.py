"""Folders and archives of images, their layouts, and what is refused."""

import os
import unicodedata
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import sampling
from common.data.images import SUFFIXES
from common.data.open import class_warnings, open_images
from common.errors import InputError
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


def test_images_in_no_folder_have_no_label_and_are_all_for_pretraining(tmp_path):
    images = open_images(str(image_folder(tmp_path / "flat", [f"{i}.png" for i in range(6)])))
    assert not images.labeled and images.classes == []
    parts = sampling.split(images)
    assert len(parts["pretrain"]) == 6 and all(
        len(parts[name]) == 0 for name in ("train", "dev", "test")
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p / "absent", "no such file or folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "no images there"),
        (
            lambda p: (p / "text.tar").write_text("x") and p / "text.tar",
            "allowed are a folder, a .zip of one, .csv, .packed, or `sample`",
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


def test_several_paths_are_one_set_whose_names_say_where_the_images_are(tmp_path, monkeypatch):
    inside = tmp_path / ".here" / "inside"
    image_folder(inside / "set", CLASSES)
    image_folder(tmp_path / ".here" / "beside", ["train/x.png", "y.png"])
    archive = zipped(inside / "set")
    monkeypatch.chdir(inside)
    paths = ("set/b/0.png", "./set/b/1.png", "set/a/", "../beside", archive.name, str(archive))
    images = open_images(paths, labels=False)
    in_zip = sorted(CLASSES)
    assert images.ids == [
        *("set/b/0.png", "./set/b/1.png", *(f"set/a/{i}.png" for i in range(4))),
        *("../beside/train/x.png", "../beside/y.png"),
        *(f"set.zip/{name}" for name in in_zip),
        *(f"{archive}/{name}" for name in in_zip),
    ]
    assert not images.labeled and not any(images.splits) and images.classes == []
    files = [*paths[:2], *(f"set/a/{i}.png" for i in range(4)), *images.ids[6:8]]
    files += [f"set/{name}" for name in 2 * in_zip]
    for index, file in enumerate(files):
        with Image.open(file) as image:
            wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(images.decode(index), wanted), file
    assert images.name == "set/b/0.png, ./set/b/1.png, set/a/ and 3 more"


def test_an_image_is_a_set_by_itself_and_unlabeled_folders_are_no_splits(tmp_path):
    root = image_folder(tmp_path / "set", ["train/0.png", "loose.PNG"])
    one = open_images(str(root / "loose.PNG"), labels=False)
    assert one.ids == [str(root / "loose.PNG")] and "1 image without" in one.describe()
    with pytest.raises(InputError, match="allowed are a folder"):
        open_images(str(root / "loose.PNG"))
    with pytest.raises(InputError, match="in none of the splits"):
        open_images(str(root))
    assert open_images(str(root), labels=False).ids == ["loose.PNG", "train/0.png"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.png", "no such file or folder"),
        ("empty", "leave it out"),
        ("notes.txt", "allowed are a folder, a .zip of one, .png.* a .csv stands alone"),
        ("folder.png", "leave it out"),
        ("pipe.png", "not a regular file"),
        ("broken.zip", "not a readable zip"),
    ],
)
def test_one_of_several_paths_that_cannot_be_used_is_refused_by_name(tmp_path, name, said):
    image_folder(tmp_path, ["0.png", "1.png"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for text in ("notes.txt", "broken.zip"):
        (tmp_path / text).write_text("x")
    paths = tuple(str(tmp_path / one) for one in ("0.png", name, "1.png"))
    with pytest.raises(InputError, match=f"{name}.*{said}"):
        open_images(paths, labels=False)


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


def listed(folder, rows, header="path,label,group,split", name="list.csv", newline="\n"):
    """A CSV beside a folder of the images 0.png to 5.png."""
    image_folder(folder, [f"sub/{i}.png" for i in range(6)])
    text = newline.join([header, *rows]) + newline
    (folder / name).write_bytes(text.encode("utf-8-sig"))
    return folder / name


ROWS = [f"sub/{i}.png,{'ab'[i % 2]},p{i // 2},{['train', 'Dev', 'test'][i // 2]}" for i in range(6)]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_table_lists_images_with_labels_groups_and_splits(tmp_path, newline):
    rows = [*ROWS, "", ",,,"]
    images = open_images(str(listed(tmp_path / "set", rows, newline=newline)))
    assert images.ids == [f"sub/{i}.png" for i in range(6)] and images.classes == ["a", "b"]
    assert images.labels.tolist() == [0, 1] * 3
    assert images.groups.tolist() == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert images.splits.tolist() == ["train", "train", "val", "val", "test", "test"]
    first = torch.from_numpy(np.array(picture(3))).permute(2, 0, 1)
    assert torch.equal(read_pixels(images, [3])[0], first)


def test_columns_of_a_table_stand_in_any_order_and_others_are_named(tmp_path):
    rows = [f'{i},"x, {i}",./sub/../sub\\{i}.png' for i in range(6)]
    images = open_images(str(listed(tmp_path / "set", rows, "age, labels ,Path")))
    assert images.ids == [f"sub/{i}.png" for i in range(6)]
    assert not images.labeled and images.groups is None and not images.splits.any()
    said = images.describe()
    assert said.endswith("columns that are not read: age, labels; did you mean label?")
    rows = [f"{tmp_path}/set/sub/0.png,a", f"{tmp_path}/apart/sub/1.png,", "sub/2.png"]
    listed(tmp_path / "apart", [])
    images = open_images(str(listed(tmp_path / "set", rows, "path,label")))
    assert images.ids == ["sub/0.png", f"{tmp_path}/apart/sub/1.png", "sub/2.png"]
    assert images.labels.tolist() == [0, -1, -1] and len(read_pixels(images, [0, 1, 2])) == 3


def changed(number, cell, column):
    cells = [row.split(",") for row in ROWS]
    cells[number][column] = cell
    return [",".join(row) for row in cells]


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        (ROWS, "file,label,group,split", r"has no path; needed are path, its columns are file,"),
        (ROWS, "pth,label,group,split", r"did you mean pth\?"),
        ([], "path,label", "has no rows"),
        (ROWS, "path,label,label,split", "the column label stands twice"),
        ([*ROWS[:2], "sub/2.png,a,p,train,x"], "path,label,group,split", "line 4: 5 cells"),
        (['"sub/0.png,a'], "path,label", "not a readable .csv file in UTF-8"),
        (changed(1, "sub/0.png", 0), None, r"1 file listed twice: sub/0.png \(line 2, line 3"),
        (changed(1, "sub/9.png", 0), None, "1 of 6 files are missing: sub/9.png; relative paths"),
        (changed(1, "notes.txt", 0), None, r"1 of 6 rows name no image: notes.txt \(line 3\)"),
        (changed(1, "", 0), None, r"no image: . \(line 3\)"),
        (changed(1, "tset", 3), None, "line 3: split 'tset', .* did you mean test"),
        (changed(1, "", 3), None, "1 of 6 rows without a split: line 3"),
        (changed(1, "", 2), None, "1 of 6 rows without a group: line 3"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, rows, header, said):
    with pytest.raises(InputError, match=said):
        open_images(str(listed(tmp_path / "set", rows, header or "path,label,group,split")))


def test_what_a_table_says_is_in_the_fingerprint(tmp_path):
    prints = {
        open_images(str(listed(tmp_path / "set", rows))).fingerprint
        for rows in (ROWS, ROWS, *(changed(5, cell, k) for k, cell in ((1, "a"), (2, "x"))))
    }
    assert len(prints) == 3
    assert open_images(str(listed(tmp_path / "set", ROWS, name="b.csv"))).fingerprint in prints


def test_a_listed_file_that_is_no_image_is_named_when_it_is_read(tmp_path):
    table = listed(tmp_path / "set", ROWS)
    (tmp_path / "set" / "sub" / "4.png").write_text("text")
    images = open_images(str(table))
    with pytest.raises(InputError, match="image sub/4.png in list.csv cannot be read"):
        images.decode(4)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_class_is_one_however_its_accents_are_stored(tmp_path, form):
    name = unicodedata.normalize(form, "é/1.png")
    root = image_folder(
        tmp_path / "set", [unicodedata.normalize("NFC", "é/0.png"), name, "a/0.png"]
    )
    for source in (root, zipped(root)):
        assert open_images(str(source)).classes == ["a", unicodedata.normalize("NFC", "é")]
    rows = [f"{name},{name[:-6]}", "é/0.png,é", "a/0.png,a"]
    (root / "list.csv").write_text("path,label\n" + "\n".join(rows[form == "NFC" :]))
    assert open_images(str(root / "list.csv")).classes == ["a", "é"]


def warned(tmp_path, names):
    return "\n".join(class_warnings(open_images(str(image_folder(tmp_path / "set", names)))))


def test_classes_that_are_perhaps_one_or_never_trained_are_warned_of(tmp_path):
    plain = [f"{s}/{c}/0.png" for s in ("train", "val", "test") for c in ("a", "b")]
    assert warned(tmp_path / "plain", plain) == ""
    said = warned(tmp_path / "odd", [*plain, "test/c/0.png", "test/d/0.png", "val/d/0.png"])
    assert "test has 2 classes that train lacks: c, d;" in said
    assert "val has 1 class that train lacks: d;" in said
    said = warned(tmp_path / "case", ["Red cell/0.png", "red_cell/0.png", "b/0.png"])
    assert "classes 'Red cell', 'red_cell' differ in case, blanks or dashes alone" in said
    assert warned(tmp_path / "eval", ["test/a/0.png", "test/b/0.png"]) == ""


def layout(tmp_path, names):
    images = open_images(str(image_folder(tmp_path / "set", names)))
    label = [images.classes[k] if k >= 0 else "" for k in images.labels]
    return dict(zip(images.ids, zip(images.splits, label, strict=True), strict=True)), images


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # STL-10
        (
            ["train/a/0.png", "test/a/0.png", "unlabeled/0.png", "unlabeled/x/1.png"],
            [("train", "a"), ("test", "a"), ("train", ""), ("train", "")],
        ),
        (["a/0.png", "b/0.png", "Unlabeled/0.png"], [("", "a"), ("", "b"), ("", "")]),
        (["training_set/a/0.png", "test_set/a/0.png"], [("train", "a"), ("test", "a")]),
        (["train2017/0.png", "val2017/0.png"], [("train", ""), ("val", "")]),
        (["train/a/0.png", "test-images/a/0.png"], [("train", "a"), ("test", "a")]),
        (["train/0.png", "car/0.png", "bus/0.png"], [("", "train"), ("", "car"), ("", "bus")]),
        (["train/train/0.png", "train/car/0.png"], [("train", "train"), ("train", "car")]),
        (["test_neg/0.png", "test_pos/0.png"], [("", "test_neg"), ("", "test_pos")]),
        (["brain/0.png", "rest/0.png"], [("", "brain"), ("", "rest")]),
        (["preview.png", "w/a/0.png", "w/b/0.png"], [("", ""), ("", "a"), ("", "b")]),
        (["cover.png", "w/v/a/0.png", "w/v/b/0.png"], [("", ""), ("", "w"), ("", "w")]),
    ],
)  # fmt: skip
def test_layouts_of_folders_are_understood(tmp_path, names, expected):
    found, images = layout(tmp_path, names)
    wrapper = "w/" * ("w/a/0.png" in names)
    assert [found[name.removeprefix(wrapper)] for name in names] == expected
    unlabeled = sum(not label for _, label in expected)
    assert (f"{unlabeled} image" in images.note) == (0 < unlabeled < len(names))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/a/0.png", "tset/a/0.png"], "the folder tset is .* train; did you mean test"),
        (
            ["train/0.png", "test/0.png", "car/0.png"],
            "the folder car is in none .* test, train; mo",
        ),
        (["training_set/a/0.png", "test_set/a/0.png", "old/0.png"], "the folder old is in none"),
        (["train/a/0.png", "test/a/0.png", "b/0.png"], "put them into a folder called train"),
        (["train/a/0.png", "preview.png", "test/a/0.png"], "preview.png is in none of the splits"),
    ],
)
def test_folders_that_are_perhaps_splits_are_asked_about(tmp_path, names, said):
    with pytest.raises(InputError, match=said):
        layout(tmp_path, names)


def test_thumbnails_of_file_servers_are_passed_over_and_other_files_counted(tmp_path):
    root = image_folder(tmp_path / "set", ["a/0.png", "b/0.png", "a/@eaDir/0.png/thumb.png"])
    for name in ("a/1.doc", "b/2.DOC", "notes", ".hidden", "a/Thumbs.db"):
        (root / name).write_text("x")
    for source in (root, zipped(root)):
        images = open_images(str(source))
        assert images.ids == ["a/0.png", "b/0.png"] and images.classes == ["a", "b"]
        assert images.describe().endswith(
            "; 6 files, 2 read; left out: 2 .doc, 1 in @eaDir, 1 without a suffix"
        )
    assert (
        "9 files, 3 read; left out: 3 .doc, 2 in @eaDir"
        in open_images((str(root), str(root / "a")), labels=False).note
    )


def coded_zip(path, files, encoding, separator):
    """A .zip whose names are bytes of an encoding, without the flag that says which."""
    stored = {name.replace("/", separator).encode(encoding): name for name in files}
    with zipfile.ZipFile(path, "w") as archive:
        for k, (code, name) in enumerate(stored.items()):
            archive.writestr(f"{k}".rjust(len(code), "~"), files[name])
    data = path.read_bytes()
    for k, code in enumerate(stored):
        placeholder = f"{k}".rjust(len(code), "~").encode()
        assert data.count(placeholder) == 2  # before the member and in the directory
        data = data.replace(placeholder, code)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("classes", "encoding", "separator"),
    [
        (["good", "bad"], "ascii", "\\"),
        (["猫", "小狗", "镕炉"], "gbk", "/"),
        (["Größe", "Übermaß", "niño"], "cp437", "\\"),
        (["é", "Größe", "猫"], "utf-8", "/"),
    ],
)
def test_zips_of_windows_and_macos_have_the_classes_of_the_folder(
    tmp_path, classes, encoding, separator
):
    names = [f"{name}/{i}.png" for name in classes for i in range(2)]
    root = image_folder(tmp_path / "set", names)
    files = {name: (root / name).read_bytes() for name in names}
    if encoding == "utf-8":  # of macOS, decomposed
        files = {unicodedata.normalize("NFD", name): content for name, content in files.items()}
    plain = open_images(str(root))
    packed = open_images(str(coded_zip(tmp_path / "set.zip", files, encoding, separator)))
    assert packed.classes == plain.classes == sorted(classes)
    for name in plain.ids:
        same = packed.ids.index(name if encoding != "utf-8" else unicodedata.normalize("NFD", name))
        assert torch.equal(packed.decode(same), plain.decode(plain.ids.index(name)))


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JFIF", ".pnm", ".pbm", ".avif", ".jp2"])
def test_what_pillow_reads_of_pictures_is_read(tmp_path, suffix):
    if suffix in (".avif", ".jp2") and suffix not in SUFFIXES:
        pytest.skip(f"this Pillow reads no {suffix}")
    picture(0).save(tmp_path / f"0{suffix}")
    with Image.open(tmp_path / f"0{suffix}") as opened:
        expected = np.array(opened.convert("RGB"))
    images = open_images(str(tmp_path))
    assert np.array_equal(images.decode(0).permute(1, 2, 0), expected)
