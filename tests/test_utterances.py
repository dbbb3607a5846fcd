"""Utterances from .npz, .tsv and UMC's layouts; refused inputs; hostile pickles; splits; what the
doctor finds.
"""

import collections
import csv
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from common.data import utterances
from common.data.utterances import (
    Utterances,
    data_problems,
    open_utterances,
    split,
    unpickle_arrays,
)
from common.errors import InputError

RNG = np.random.default_rng(0)


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return str(tmp_path / "data.npz")


def tsv(tmp_path, text, name="data.tsv"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return str(path)


def test_several_paths_are_one_set_with_the_rows_of_each(tmp_path):
    paths = []
    for name, count, steps in (("a", 3, 2), ("b", 2, 4)):
        lengths = np.arange(count) % steps + steps - 1
        np.savez(
            tmp_path / f"{name}.npz",
            x=RNG.random((count, 3)),
            v=RNG.random((count, steps, 2)),
            v_len=lengths.clip(1, steps),
            label=np.arange(count),
            split=["train"] * count,
        )
        paths.append(str(tmp_path / f"{name}.npz"))
    joined = open_utterances(tuple(paths))
    parts = [open_utterances(path) for path in paths]
    assert joined.ids == [f"{paths[0]}/{i}" for i in range(3)] + [f"{paths[1]}/{i}" for i in "01"]
    assert not joined.labeled and not joined.splits.any() and joined.texts is None
    assert joined.modalities["v"].shape == (5, 4, 2)
    rows = [(part, i) for part in parts for i in range(len(part))]
    for row, (part, i) in enumerate(rows):
        np.testing.assert_array_equal(joined.modalities["x"][row], part.modalities["x"][i])
        length = part.lengths["v"][i]
        assert joined.lengths["v"][row] == length
        sequence = joined.modalities["v"][row]
        np.testing.assert_array_equal(sequence[:length], part.modalities["v"][i, :length])
        assert not sequence[length:].any()
    texts = [tsv(tmp_path, f"text\n{word}\n", f"{word}.tsv") for word in ("one", "two")]
    assert open_utterances(tuple(texts)).texts == ["one", "two"]
    assert open_utterances(tuple(paths), max_length=1).modalities["v"].shape == (5, 1, 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.npz", "no such file or folder"),
        ("notes.txt", "allowed are an .npz"),
        ("text.tsv", "text.tsv has raw text, .*first.npz has v steps x 2, x 3"),
        ("wide.npz", "wide.npz has v steps x 2, x 4"),
        ("more.npz", "more.npz has v steps x 2, x 3, y 1"),
        ("flat.npz", "flat.npz has v 2, x 3"),
        ("long.npz", "padding to 200000 rows.* --max-item-mb"),
    ],
)
def test_one_of_several_paths_of_other_kinds_is_refused_by_name(tmp_path, name, said):
    own = {"x": np.ones((2, 3)), "v": np.ones((2, 2, 2)), "v_len": [1, 2]}
    changed = {
        "wide.npz": own | {"x": np.ones((2, 4))},
        "more.npz": own | {"y": np.ones(2)},
        "flat.npz": {"x": np.ones((2, 3)), "v": np.ones((2, 2))},
        "long.npz": {"x": np.ones((1, 3)), "v": np.ones((1, 200_000, 2)), "v_len": [200_000]},
    }
    first = {array: np.repeat(values, 500, axis=0) for array, values in own.items()}
    np.savez(tmp_path / "first.npz", **(first if name == "long.npz" else own))
    if name in changed:
        np.savez(tmp_path / name, **changed[name])
    (tmp_path / "notes.txt").write_text("x")
    tsv(tmp_path, "text\nx\n", "text.tsv")
    with pytest.raises(InputError, match=said):
        open_utterances((str(tmp_path / "first.npz"), str(tmp_path / name)))


def test_npz_gives_every_float_array_as_a_modality(tmp_path):
    audio = RNG.random((4, 3, 2))
    path = npz(
        tmp_path,
        words=RNG.random((4, 5)).astype(np.float16),
        pause=np.arange(4.0),
        audio=audio,
        audio_len=[3, 1, 2, 3],
        label=[1, 0, -1, 1],
        classes=["yes", "no"],
        id=["a", "b", "c", "d"],
        split=["train", "dev", "test", "train"],
        text=["Hi.", "Hm?", "", "No!"],
        speaker=["x", "y", "x", "y"],
    )
    data = open_utterances(path)
    assert {name: (x.shape, x.dtype) for name, x in data.modalities.items()} == {
        "words": ((4, 5), np.float32),
        "pause": ((4, 1), np.float32),
        "audio": ((4, 3, 2), np.float32),
    }
    assert data.lengths["audio"].tolist() == [3, 1, 2, 3]
    assert not data.modalities["audio"][1, 1:].any() and not data.modalities["audio"][2, 2:].any()
    np.testing.assert_array_equal(data.modalities["audio"][0], audio[0].astype(np.float32))
    assert (
        data.labels.tolist() == [1, 0, -1, 1]
        and data.classes == ["yes", "no"]
        and data.ids == list("abcd")
    )
    assert data.splits.tolist() == ["train", "val", "test", "train"]
    assert data.texts == ["Hi.", "Hm?", "", "No!"] and data.speakers == ["x", "y", "x", "y"]
    assert data.describe() == (
        "data.npz: 4 utterances in 2 classes (no 2, yes 1); splits train 2, val 1, test 1; raw"
        " text, words 5, pause 1,"
        " audio 3 x 2"
    )


def test_npz_labels_may_be_names_or_numbers_or_missing(tmp_path):
    x = RNG.random((3, 2))
    named = open_utterances(npz(tmp_path, x=x, label=["q", "", "a"]))
    assert named.labels.tolist() == [1, -1, 0] and named.classes == ["a", "q"]
    numbered = open_utterances(npz(tmp_path, x=x, label=[12, -1, 5]))
    assert numbered.labels.tolist() == [1, -1, 0] and numbered.classes == ["5", "12"]
    bare = open_utterances(npz(tmp_path, x=x))
    assert not bare.labeled and bare.ids == ["0", "1", "2"] and bare.splits.tolist() == [""] * 3


def test_long_sequences_are_cut_and_padding_is_not(tmp_path):
    path = npz(tmp_path, v=np.ones((2, 9, 2)), v_len=[7, 3])
    assert open_utterances(path).modalities["v"].shape == (2, 7, 2)
    data = open_utterances(path, max_length=5)
    assert data.modalities["v"].shape == (2, 5, 2) and data.lengths["v"].tolist() == [5, 3]
    assert data.modalities["v"].sum() == (5 + 3) * 2


def test_the_padding_may_hold_anything(tmp_path):
    values = np.full((2, 3, 1), np.nan)
    values[0, :2], values[1, :3] = 1, 2
    assert open_utterances(npz(tmp_path, v=values, v_len=[2, 3])).modalities["v"].sum() == 8


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.ones((3, 2)), "b": np.ones((4, 2))}, "the lengths are: a 3, b 4"),
        ({"a": np.ones((3, 2)), "label": [0, 1]}, "the lengths are: a 3, label 2"),
        (
            {"a": [[1, np.nan], [1, 1], [np.inf, 0], [0, 0]]},
            r"a is NaN or infinite in 2 of 4 rows: 0, 2 \(counted",
        ),
        ({"a": np.full((2, 2), 1e300)}, "a is NaN or infinite in 2 of 2 rows"),
        ({"a": np.array([{}, {}], object)}, "object arrays are refused"),
        ({"a": np.ones((3, 2), int)}, "a is int64 of shape"),
        ({"a": np.ones((3, 2)), "note": ["x", "y", "z"]}, "note is <U1 of shape"),
        ({"a": np.ones((3, 4, 2))}, "a_len, its sequences' lengths, is missing"),
        ({"a": np.ones((3, 2)), "a_len": [1, 1, 1]}, "a_len has no use"),
        ({"a": np.ones((3, 4, 2)), "a_len": [1, -1, 5]}, r"in \[0, 4\], 0 .*; rows 1, 2 are not"),
        ({"a": np.ones((3, 4, 2)), "a_len": [1, 0, 4]}, r"no features of 1 of 3 .* \(1\)"),
        ({"a": np.ones((3, 4, 2)), "a_len": [0, 0, 0]}, "missing for all utterances"),
        ({"a": np.ones((3, 0))}, "has the shape"),
        ({"a": np.ones((2, 1, 1, 1))}, "has the shape"),
        (
            {"a": np.ones((3, 2)), "label": [0, 1, 2], "classes": ["x", "y"]},
            r"\[0, 1\].* rows 2 do not",
        ),
        ({"a": np.ones((3, 2)), "label": [0.0, 1.0, 2.0]}, "label is float64"),
        ({"a": np.ones((3, 2)), "split": ["train", "tset", "test"]}, "utterance 1 .* split 'tset'"),
        ({"a": np.ones((3, 2)), "split": ["one", "two", "one"]}, "unknown split 'one'"),
        ({"a": np.ones((3, 2)), "text": ["", " ", "\t"]}, "the text of all 3 utterances is empty"),
        ({"label": [0, 1, 2]}, "neither text nor features"),
        ({"a": np.float32(3)}, "the lengths are: a 0"),
        ({}, "the lengths are: none"),
    ],
)
def test_an_npz_that_cannot_be_used_is_refused(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message) as error:
        open_utterances(npz(tmp_path, **arrays))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 1, 30, 200, -30])
def test_a_damaged_npz_is_refused(tmp_path, cut):
    path = npz(tmp_path, a=RNG.random((30, 4)))
    with open(path, "r+b") as file:
        content = file.read()
        file.seek(0)
        file.truncate()
        file.write(content[:cut])
    with pytest.raises(InputError, match="not a readable .npz"):
        open_utterances(path)


def test_tsv_columns_go_by_name(tmp_path):
    path = tsv(
        tmp_path,
        "\ufeffSpeaker\tText\tmood\tlabel\tid\tsplit\r\n"
        'Ross\tHe said "no".\tx\tq\tu1\ttrain\r\n'
        '\t"A ""quoted"" cell"\tx\t\tu2\ttest\r\n'
        'Rachel\t"Whole."\tx\ta\tu3\tvalid\n'
        "Joey\tline\u2028separator\x85\tx\ta\tu4\ttest\n\n",
    )
    data = open_utterances(path)
    assert data.texts == ['He said "no".', 'A "quoted" cell', '"Whole."', "line\u2028separator\x85"]
    assert data.ids == ["u1", "u2", "u3", "u4"] and data.speakers == ["Ross", "", "Rachel", "Joey"]
    assert data.labels.tolist() == [1, -1, 0, 0] and data.classes == ["a", "q"]
    assert data.splits.tolist() == ["train", "test", "val", "test"] and data.modalities == {}


def test_a_tsv_of_text_alone_is_enough(tmp_path):
    data = open_utterances(tsv(tmp_path, "text\nHello.\n\nYes?\n"))
    assert data.texts == ["Hello.", "", "Yes?"] and data.ids == ["0", "1", "2"] and not data.labeled


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\nHi\tq\ntext\tlabel\nHo\ta\n", "line 3: a second header row"),
        ("text\tlabel\nHi\tq\nUtterance\tLabel\nHo\ta\n", "line 3: its label is 'Label'"),
        ("id\ttext\n1\tHi\n2\n", "line 3: 1 cells, the header has 2"),
        ("id\ttext\n1\tHi\t \n", "line 2: 3 cells, the header has 2"),
        ("id\tutterance\n1\tHi\n", "no column `text` in the header; its columns are id, utterance"),
        ("id\ttxt\n1\tHi\n", "did you mean txt"),
        ("text\tid\tText\nHi\t1\tHo\n", "the column text stands 2 times"),
        ("text\n", "no utterances below the header"),
        ("", "no utterances below the header"),
        ("text\tid\n\t1\n \t2\n", "the text of all 2 utterances is empty"),
        ("text\tsplit\nHi\ttrain\nHo\t\n", "utterance 1 .* of the split ''"),
    ],
)
def test_a_tsv_that_cannot_be_used_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        open_utterances(tsv(tmp_path, content))
    assert "\n" not in str(error.value)


def test_a_csv_reads_as_the_csv_module_wrote_it(tmp_path):
    rows = [
        ["id", "Text", "label"],
        ["u1", 'Well, he said "no".\nTwice.', "q"],
        ["u2", '""', ""],
        ["u3", "\ttab\u2028", "a, b"],
    ]
    with open(tmp_path / "data.CSV", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    data = open_utterances(str(tmp_path / "data.CSV"))
    assert data.ids == ["u1", "u2", "u3"] and data.texts == [row[1] for row in rows[1:]]
    assert data.classes == ["a, b", "q"] and data.labels.tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nHi, you,q\n", "line 2: 3 cells, the header has 2; .* stands in quotes"),
        ('text,label\n"a\nb",q\nHi "you,q"r\nHo\n', "line 5: 1 cells"),
        ('text,label\nHi,"q\n', "line 2: unexpected end of data; .* stands in quotes"),
        ('text,label\n"Hi"!,q\n', "line 2: .* expected after"),
        ("text,label\nHi,q\nHo,label\n", "line 3: its label is 'label'"),
        ("", "no utterances below the header"),
        ("utterance,label\nHi,q\n", "its columns are utterance, label"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(tmp_path, content, message):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        open_utterances(str(tmp_path / "data.csv"))
    assert "\n" not in str(error.value)


def test_an_id_that_stands_again_gets_a_number_and_is_counted(tmp_path):
    path = tsv(tmp_path, "text\tid\n" + "".join(f"Hi\t{i}\n" for i in ("x", "y", "x", "x#2", "x")))
    data = open_utterances(path)
    assert data.ids == ["x", "y", "x#3", "x#2", "x#4"]
    assert utterances.data_problems(data)["repeated ids"].startswith("2, ")
    arrays = {"a": np.ones((3, 2)), "id": ["x", "y", "x"]}
    assert open_utterances(npz(tmp_path, **arrays)).ids == ["x", "y", "x#2"]
    many = tsv(tmp_path, "text\tid\n" + "Hi\tx\n" * 20_000)
    assert len(set(open_utterances(many).ids)) == 20_000
    umc(tmp_path / "set", "IEMOCAP-DA")
    file = tmp_path / "set" / "dev.tsv"
    file.write_text(file.read_text() + "Ses01_1\tagain\tjoke\n")
    data = open_utterances(str(tmp_path / "set"))
    twice = data.ids.index("Ses01_1#2")
    for values in data.modalities.values():
        np.testing.assert_array_equal(values[twice], values[data.ids.index("Ses01_1")])


def test_columns_and_encodings_have_names(tmp_path):
    text = 'Utterance,DA,label\n"Hé, ""you""\nthere",q,9\nOui,nan,8\n'
    path = tmp_path / "MELD.csv"
    path.write_bytes(text.encode("latin-1"))
    options = {"text_column": "utterance", "label_column": "DA", "encoding": "latin-1"}
    data = open_utterances(str(path), **options)
    assert data.texts == ['Hé, "you"\nthere', "Oui"] and data.classes == ["q"]
    assert data.labels.tolist() == [0, -1]
    assert data_problems(data)["not read"] == "column label"
    path.write_bytes(text.encode("utf-16"))
    assert open_utterances(str(path), **options | {"encoding": "utf-16"}).texts == data.texts
    with pytest.raises(InputError, match="MELD.csv, line 1: not UTF-8; .* --encoding latin-1"):
        open_utterances(str(path))
    path.write_text(text)
    with pytest.raises(InputError, match="no column `text` .* Utterance, DA.*--text-column"):
        open_utterances(str(path))
    with pytest.raises(InputError, match="no column `act` .*--label-column"):
        open_utterances(str(path), text_column="Utterance", label_column="act")
    with pytest.raises(InputError, match="--encoding is for a .tsv or .csv"):
        open_utterances(npz(tmp_path, x=np.ones((2, 3))), encoding="latin-1")


def test_scripts_without_blanks_have_a_token_a_sign():
    for text, expected in (
        ("你好吗？OK", ["你", "好", "吗", "？", "ok"]),
        ("こんにちは", ["こ", "ん", "に", "ち", "は"]),
        ("ไปไหน", ["ไ", "ป", "ไ", "ห", "น"]),
        ("어디 가요?", ["어디", "가요", "?"]),
        ("it's two words", ["it's", "two", "words"]),
    ):
        assert utterances.tokens(text) == expected


def test_a_label_that_is_not_a_number_is_none(tmp_path):
    data = open_utterances(tsv(tmp_path, "text\tlabel\nHi\tnan\nHo\tq\nHa\tNaN\n"))
    assert data.classes == ["q"] and data.labels.tolist() == [-1, 0, -1]
    data = open_utterances(npz(tmp_path, a=np.ones((2, 2)), label=["nan", "q"]))
    assert data.classes == ["q"] and data.labels.tolist() == [-1, 0]


def test_a_tsv_in_another_encoding_is_refused_with_its_line(tmp_path):
    (tmp_path / "data.tsv").write_bytes("text\nHi\nH\u00f6\n".encode("latin1"))
    with pytest.raises(InputError, match="line 3: not UTF-8"):
        open_utterances(str(tmp_path / "data.tsv"))


LAYOUTS = {
    "MIntRec": (
        "season\tepisode\tclip\ttext\tlabel",
        [["S04", "E01", str(i), f"text {i}", "joke" if i % 2 else "thank"] for i in range(9)],
        [f"S04_E01_{i}" for i in range(9)],
    ),
    "MELD-DA": (
        "Dialogue_ID\tUtterance_ID\tUtterance\tDA",
        [["3", str(i), f"text {i}", "joke" if i % 2 else "thank"] for i in range(9)],
        [f"3_{i}" for i in range(9)],
    ),
    "IEMOCAP-DA": (
        "index\tutterance\tDA",
        [[f"Ses01_{i}", f"text {i}", "joke" if i % 2 else "thank"] for i in range(9)],
        [f"Ses01_{i}" for i in range(9)],
    ),
    "by name": (
        "Text\tID\tLabel",
        [[f"text {i}", f"a{i}", "joke" if i % 2 else "thank"] for i in range(9)],
        [f"a{i}" for i in range(9)],
    ),
    "by name, two numbers": (
        "text\tdialogue\tutterance\tlabel",
        [[f"text {i}", "3", str(i), "joke" if i % 2 else "thank"] for i in range(9)],
        [f"3_{i}" for i in range(9)],
    ),
}


def umc(root, layout, features=True, protocol=4):
    header, rows, ids = LAYOUTS[layout]
    for name, part in (("train", rows[:5]), ("dev", rows[5:7]), ("test", rows[7:])):
        tsv(root, "\n".join([header, *("\t".join(row) for row in part)]) + "\n", f"{name}.tsv")
    frames = {
        "video_data/swin_feats.pkl": {
            name: RNG.random((i + 1, 1, 6)).astype(np.float32) for i, name in enumerate(ids)
        },
        "audio_data/wavlm_feats.pkl": {name: RNG.random((9 - i, 4)) for i, name in enumerate(ids)},
    }
    if features:
        for file, table in frames.items():
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).write_bytes(pickle.dumps(table, protocol))
    return list(frames.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_umc(tmp_path, layout):
    root = tmp_path / layout
    video, audio = umc(root, layout)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in root.rglob("*"):
            archive.write(path, f"some/{path.relative_to(root)}")
    folder, packed = open_utterances(str(root)), open_utterances(str(tmp_path / "set.zip"))
    assert folder.fingerprint == packed.fingerprint
    assert folder.ids == LAYOUTS[layout][2] and folder.texts == [f"text {i}" for i in range(9)]
    assert folder.classes == ["joke", "thank"] and folder.labels.tolist() == [1, 0] * 4 + [1]
    assert folder.splits.tolist() == ["train"] * 5 + ["val"] * 2 + ["test"] * 2
    assert (
        folder.lengths["video"].tolist() == list(range(1, 10)) and folder.lengths["audio"][0] == 9
    )
    for i, name in enumerate(folder.ids):
        np.testing.assert_array_equal(folder.modalities["video"][i, : i + 1], video[name][:, 0])
        np.testing.assert_array_equal(
            folder.modalities["audio"][i, : 9 - i], audio[name].astype(np.float32)
        )
        assert not folder.modalities["video"][i, i + 1 :].any()
    assert {k: v.tolist() for k, v in split(folder).items()} == {
        "train": list(range(7)),
        "test": [7, 8],
    }


def test_a_layout_without_features_is_its_text(tmp_path):
    umc(tmp_path / "set", "MELD-DA", features=False)
    assert open_utterances(str(tmp_path / "set")).modalities == {}


def test_what_lacks_features_is_masked_up_to_a_share_and_counted(tmp_path):
    _, audio = umc(tmp_path / "set", "MELD-DA")
    file = tmp_path / "set" / "audio_data" / "wavlm_feats.pkl"
    del audio["3_2"]
    file.write_bytes(pickle.dumps(audio))
    data = open_utterances(str(tmp_path / "set"), allow_missing=0.112)
    assert data.lengths["audio"].tolist() == [9, 8, 0, 6, 5, 4, 3, 2, 1]
    assert not data.modalities["audio"][2].any()
    found = data_problems(data)
    assert found["audio is missing"] == "1 utterances, masked there (3_2)"
    assert "video is missing" not in found
    arrays = {"a": np.ones((4, 3, 2)), "a_len": [1, 0, 3, 2]}
    data = open_utterances(npz(tmp_path, **arrays), allow_missing=0.25)
    assert data.lengths["a"].tolist() == [1, 0, 3, 2] and not data.modalities["a"][1].any()
    with pytest.raises(InputError, match="share of 0.2; --allow-missing 0.25 masks"):
        open_utterances(npz(tmp_path, **arrays), allow_missing=0.2)


def test_a_modality_s_file_of_another_name_is_read_or_named(tmp_path):
    root = tmp_path / "set"
    umc(root, "MELD-DA")
    expected = open_utterances(str(root))
    known = root / "video_data" / "swin_feats.pkl"
    other = known.with_name("video_feats.pkl")
    known.rename(other)
    data = open_utterances(str(root))
    assert data.fingerprint == expected.fingerprint and data.unread == []
    known.write_bytes(other.read_bytes())
    (root / "faces.npy").write_bytes(b"")
    data = open_utterances(str(root))
    assert data.fingerprint == expected.fingerprint
    assert data_problems(data)["not read"] == "faces.npy, video_data/video_feats.pkl"
    known.rename(known.with_name("more.pkl"))
    with pytest.raises(InputError, match=r"more.pkl, video_data/video_feats.pkl may all"):
        open_utterances(str(root))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", ["header", "another"])
def test_a_header_row_inside_a_layout_is_refused_with_its_line(tmp_path, layout, row):
    umc(tmp_path / "set", layout, features=False)
    header = LAYOUTS[layout][0]
    if row == "another":
        header = "\t".join(["x"] * (header.count("\t")) + [header.split("\t")[-1]])
    file = tmp_path / "set" / "dev.tsv"
    file.write_text(file.read_text() + header + "\n")
    with pytest.raises(InputError, match=r"dev\.tsv, line 4: .*header"):
        open_utterances(str(tmp_path / "set"))


def test_a_layout_whose_first_line_is_data_is_refused(tmp_path):
    umc(tmp_path / "set", "IEMOCAP-DA", features=False)
    file = tmp_path / "set" / "train.tsv"
    file.write_text("\n".join(file.read_text().split("\n")[1:]))
    with pytest.raises(InputError, match="first line that is no header"):
        open_utterances(str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("3_2"), r"no features of 1 of 9 .* \(3_2\).*--allow-missing 0.112"),
        (lambda t: t.clear(), "no features of any of 9 utterances"),
        (
            lambda t: t.update({"3_2": np.ones((2, 9))}),
            r"3_2 has the shape \(2, 9\); allowed is \(frames, 4\)",
        ),
        (lambda t: t.update({"3_2": np.ones((0, 4))}), "at least one"),
        (lambda t: t.update({"3_2": np.ones((2, 4), int)}), "3_2 is no float array"),
        (lambda t: t.update({"3_2": "none"}), "3_2 is no float array"),
        (lambda t: t.update({"3_2": np.full((2, 4), np.nan)}), r"audio is NaN .*ids 3_2"),
        (lambda t: t.update({"3_2": [1.0]}), "it holds list"),
        (lambda t: t.update({"3_2": np.array(["a"])}), "an array of type 'U1'"),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path, change, message):
    _, audio = umc(tmp_path / "set", "MELD-DA")
    change(audio)
    (tmp_path / "set" / "audio_data" / "wavlm_feats.pkl").write_bytes(pickle.dumps(audio))
    with pytest.raises(InputError, match=message):
        open_utterances(str(tmp_path / "set"))


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "bad.zip").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("data.txt", "allowed are an .npz"),
        ("bad.zip", "not a readable zip"),
        ("empty", "it holds no train.tsv"),
        ("dat.txt", "no such file or folder; did you mean data.txt"),
    ):
        with pytest.raises(InputError, match=message):
            open_utterances(str(tmp_path / name))
    umc(tmp_path / "two" / "a", "MELD-DA", features=False)
    umc(tmp_path / "two" / "b", "MELD-DA", features=False)
    with pytest.raises(InputError, match="it holds a/train.tsv, b/train.tsv; name one"):
        open_utterances(str(tmp_path / "two"))


ARRAYS = {
    "f4": RNG.random((3, 2)).astype(np.float32),
    "f8 fortran": np.asfortranarray(RNG.random((3, 2))),
    "f2 big-endian": RNG.random(4).astype(">f2"),
    "big-endian f8": RNG.random((2, 2)).astype(">f8"),
    "strided": RNG.random((6, 4))[::2, 1:3],
    "i8": np.arange(5),
    "bool": np.array([True, False]),
    "empty": np.ones((0, 7), np.float32),
    "no axes": np.array(3.0),
    "scalar": np.float32(1.5),
    "nested": {"x": np.arange(3), 4: 5.5, "y": "text"},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("modules", ["numpy._core", "numpy.core"])
def test_arrays_are_unpickled_as_pickle_does(protocol, modules):
    data = pickle.dumps(ARRAYS, protocol)
    # NumPy 1 and 2 call the same functions by two names; a name's length stands before it from
    # protocol 4 on.
    own = "numpy._core" if b"numpy._core" in data else "numpy.core"
    for module in ("multiarray", "numeric"):
        old, new = (f"{package}.{module}".encode() for package in (own, modules))
        data = data.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
        data = data.replace(b"c" + old + b"\n", b"c" + new + b"\n")
    if protocol >= 4:  # frames count bytes: without them every opcode is read on its own
        data = data[:2] + data[11:]
    read = unpickle_arrays("file", data)
    assert read.keys() == ARRAYS.keys() and read["nested"].keys() == ARRAYS["nested"].keys()
    for name in ARRAYS:
        if name != "nested":
            np.testing.assert_array_equal(
                read[name], ARRAYS[name], strict=name not in ("scalar", "no axes")
            )
    assert read["nested"][4] == 5.5 and read["nested"]["x"].tolist() == [0, 1, 2]


class _Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _opcodes(module, name, argument=b"X\x02\x00\x00\x00id"):
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + argument + b"tR."


def hostile(flag):
    """Pickles that leave a file `flag` behind, or break something, where they are believed."""
    touch = f"open({flag!r}, 'w')"
    command = f"X{struct.pack('<I', len(touch)).decode('latin1')}{touch}".encode("latin1")
    array = pickle.dumps(np.arange(4.0), 2)
    yield pickle.dumps(_Calls(os.system, f"touch {flag}"))
    yield pickle.dumps(_Calls(os.system, f"touch {flag}"), 0)
    yield pickle.dumps({"a": np.ones(2), "b": _Calls(open, flag, "w")})
    yield pickle.dumps(_Calls(eval, touch))
    yield pickle.dumps(_Calls(exec, touch), 2)
    yield pickle.dumps(_Calls(__import__, "antigravity"))
    yield pickle.dumps(np.array([_Calls(eval, touch)], object))
    yield pickle.dumps(collections.OrderedDict(a=_Calls(eval, touch)))
    yield pickle.dumps(collections.defaultdict(list))
    yield pickle.dumps(io.StringIO)
    yield pickle.dumps(np.memmap)
    yield pickle.dumps(_Calls(np.save, flag, np.ones(1)))
    yield pickle.dumps(_Calls(np.fromfile, "/etc/passwd"))
    yield _opcodes("builtins", "eval", command)
    yield _opcodes("numpy", "load")
    yield _opcodes("numpy.core.multiarray", "fromfile")
    yield _opcodes("numpy._core.multiarray", "_reconstruct.__globals__")
    yield b"\x80\x04\x8c\x16numpy.core.multiarray\x8c\x1e_reconstruct.__init__.__globals__\x93."
    yield b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__class__\x93."
    yield b"(S'" + touch.replace("'", '"').encode() + b"'\nibuiltins\neval\n."
    yield _opcodes("_codecs", "encode", b"X\x01\x00\x00\x00aX\x05\x00\x00\x00punyc")
    yield b"\x80\x02cnumpy\ndtype\n}X\x0c\x00\x00\x00__setstate__cbuiltins\neval\nsb."
    yield b"\x80\x02\x82\x01."  # the extension registry
    yield b"\x80\x02Pmine\n."  # a persistent object
    yield b"\x80\x05\x97."  # an out-of-band buffer
    yield (
        b"\x80\x02cnumpy\ndtype\n" + b"N}X\x04\x00\x00\x00argsNs\x86b."
    )  # attributes of a stand-in's class
    yield array.replace(b"K\x04\x85", b"K\x08\x85")  # an array beyond its buffer
    yield array.replace(b"K\x04\x85", b"J\xff\xff\xff\xff\x85")
    yield array.replace(b"f8", b"O8")
    yield array[:-20]
    yield b"\x80\x02]" + b"]" * 5000 + b"a" * 5000 + b"."
    yield b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."
    yield b""


def test_hostile_pickles_run_nothing(tmp_path, monkeypatch):
    flag = tmp_path / "flag"
    pickles = list(hostile(str(flag)))
    assert len(pickles) >= 25
    calls = []
    for name in ("system", "popen", "remove"):
        monkeypatch.setattr(os, name, lambda *args: calls.append(args))
    for number, data in enumerate(pickles):
        with pytest.raises(InputError, match="file: ") as error:
            unpickle_arrays("file", data)
        assert "\n" not in str(error.value), number
    assert not flag.exists() and not calls
    np.testing.assert_array_equal(
        unpickle_arrays("file", pickle.dumps({"a": np.arange(3)}))["a"], [0, 1, 2]
    )


def test_a_pickle_of_one_array_is_not_a_table():
    with pytest.raises(InputError, match="holds ndarray; allowed is a dict"):
        unpickle_arrays("file", pickle.dumps(np.ones(3)))


def test_the_held_out_part_depends_on_the_ids_alone(tmp_path):
    ids = [f"u{i}" for i in range(200)]
    features = RNG.random((200, 2))
    first = open_utterances(npz(tmp_path, x=features, id=ids, label=RNG.integers(0, 5, 200)))
    other = open_utterances(npz(tmp_path, x=features, id=ids, label=RNG.integers(0, 5, 200)))
    parts = split(first)
    assert len(parts["test"]) == 30 and sorted([*parts["train"], *parts["test"]]) == list(
        range(200)
    )
    assert (
        np.array_equal(parts["test"], split(other)["test"])
        and first.fingerprint != other.fingerprint
    )
    order = RNG.permutation(200)
    mixed = open_utterances(npz(tmp_path, x=features[order], id=np.array(ids)[order]))
    assert {mixed.ids[i] for i in split(mixed)["test"]} == {first.ids[i] for i in parts["test"]}


def test_the_fingerprint_stands_for_the_content(tmp_path):
    arrays = {
        "x": RNG.random((4, 2)),
        "v": RNG.random((4, 2, 1)),
        "v_len": [1, 2, 2, 2],
        "text": list("abcd"),
    }
    first = open_utterances(npz(tmp_path, **arrays)).fingerprint
    assert open_utterances(npz(tmp_path, **arrays)).fingerprint == first
    for name, value in (
        ("x", arrays["x"] + 1),
        ("v_len", [2, 2, 2, 2]),
        ("text", list("abce")),
        ("label", [0, 1, 0, 1]),
    ):
        assert open_utterances(npz(tmp_path, **{**arrays, name: value})).fingerprint != first


def test_the_doctor_finds_the_imbalance_of_iemocap():
    counts = [2172, 900, 300, 56]
    labels = np.repeat(np.arange(4), counts)
    texts = [f"Text number {i}!" for i in range(len(labels))]
    data = Utterances(
        "set",
        map(str, range(len(labels))),
        labels,
        list("dcba"),
        ["train"] * len(labels),
        texts=texts,
    )
    found = data_problems(data)
    assert found["imbalance"] == "38.8 (d over a)"
    assert found["classes"] == "4: d 2172, c 900, b 300, a 56" and found["splits"] == "train 3428"
    assert found["repeated texts"] == "0 repeat an earlier one" and found[
        "tokens per text"
    ].startswith("mean 4.0, longest 4")

    many = Utterances(
        "set",
        list(map(str, range(99))),
        np.arange(99),
        list(map(str, range(99))),
        [""] * 99,
        texts=texts[:99],
    )
    assert data_problems(many)["classes"].endswith("8 1, 9 1 and 89 more")


def test_the_doctor_tells_of_texts_and_features():
    video = np.zeros((4, 3, 2), np.float32)
    video[0, :1], video[1, :3], video[2, :2] = [[1, 5]], [[1, 2], [1, 3], [1, 4]], [[1, 7], [1, 8]]
    audio = np.array([[0, 2], [0, 4], [0, np.nan], [0, 0]], np.float32)
    data = Utterances(
        "set",
        list("abcd"),
        [-1, 0, 0, 1],
        ["x", "y", "never"],
        [""] * 4,
        texts=["Oh, no... really?", "Hm.", " ", "Hm."],
        modalities={"video": video, "audio": audio},
        lengths={"video": np.array([1, 3, 2, 1])},
    )
    found = data_problems(data)
    assert found["tokens per text"] == "mean 2.5, longest 6 (a)" and found["empty texts"] == "1 (c)"
    assert found["repeated texts"] == "1 repeat an earlier one; 'Hm.' stands 2 times"
    assert (
        found["without label"] == "1"
        and found["imbalance"] == "2.0 (x over y)"
        and found["splits"] == "none named"
    )
    frames = np.array([[1, 5], [1, 2], [1, 3], [1, 4], [1, 7], [1, 8], [0, 0]])
    low, high = frames.std(0)
    assert found["modality video"] == (
        f"3 x 2, lengths 1 to 3 (mean 1.8); means {frames.mean(0)[0]:.3g} to"
        f" {frames.mean(0)[1]:.3g}, deviations"
        f" {low:.3g} to {high:.3g}; 1 utterances all zero, 0 constant columns"
    )
    assert found["modality audio"].endswith(
        "1 utterances all zero, 1 constant columns, 12.50% not finite"
    )


def test_scales_do_not_depend_on_the_chunks(monkeypatch):
    values = RNG.normal(3, 2, (1000, 3)).astype(np.float32)
    low, high = values.std(0).min(), values.std(0).max()
    assert f"deviations {low:.3g} to {high:.3g}" in utterances._scale(values, None)


def test_groups_come_from_a_column_or_an_array_and_stay_on_one_side(tmp_path):
    rows = [f"u{i}\thi {i}\td{i // 6}" for i in range(120)]
    data = open_utterances(tsv(tmp_path, "\n".join(["id\ttext\tGroup", *rows]) + "\n"))
    numbers = open_utterances(npz(tmp_path, words=RNG.random((120, 2)), group=np.arange(120) // 6))
    for table, names in ((data, [f"d{i // 6}" for i in range(120)]), (numbers, None)):
        parts = split(table)
        assert not set(table.groups[parts["train"]]) & set(table.groups[parts["test"]])
        assert len(parts["test"]) == 18 and (names is None or table.groups.tolist() == names)
    assert set(numbers.modalities) == {"words"} and numbers.groups.tolist()[-1] == "19"


def test_groups_that_span_train_and_test_or_are_not_whole_are_refused(tmp_path):
    header = "text\tsplit\tgroup\n"
    bad = header + "a\ttrain\tx\nb\tdev\ty\nc\ttest\ty\n"
    with pytest.raises(InputError, match=r"1 group is in two splits: y \(1 in train, 2 in test\)"):
        split(open_utterances(tsv(tmp_path, bad)))
    fine = header + "a\ttrain\tx\nb\tdev\tx\nc\ttest\ty\n"  # dev is trained on
    assert split(open_utterances(tsv(tmp_path, fine)))["test"].tolist() == [2]
    with pytest.raises(InputError, match=r"1 of 3 rows without a group: utterance 1 \(from 0\)"):
        open_utterances(tsv(tmp_path, bad.replace("dev\ty", "dev\t")))
    with pytest.raises(InputError, match=r"group is float64 of shape \(3,\); allowed is a text or"):
        open_utterances(npz(tmp_path, words=RNG.random((3, 2)), group=np.arange(3.0)))


def test_groups_are_in_the_fingerprint(tmp_path):
    prints = {
        open_utterances(tsv(tmp_path, text)).fingerprint
        for text in ("text\na\nb\n", "text\tgroup\na\tx\nb\ty\n", "text\tgroup\na\tx\nb\tx\n")
    }
    assert len(prints) == 3
