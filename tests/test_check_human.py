"""The human baseline: items go out without their labels, and the filled sheet is scored."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from common.check import human as check_human
from common.data import clips, sampling, synthetic, utterances
from common.data.images import Images
from common.errors import InputError

PIXELS, LABELS, CLASSES = synthetic.cytology(num_images=160, size=24)


def images():
    ids = [f"{CLASSES[k]}/{i:03d}.png" for i, k in enumerate(LABELS)]
    return Images("cells", ids, LABELS, CLASSES, [""] * len(ids), pixels=torch.from_numpy(PIXELS))


def task_of(source, folder, check="human-baseline", test=range(40, 160)):
    class Args:
        workers = 1

    class Run:
        pass

    class Task:
        run = Run()

    Args.check, run = check, Task.run
    run.args, run.folder, run.data, run.splits = Args, folder, source, {"test": np.array(test)}
    return Task


def fill(sheet, answer_of):
    with open(sheet, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(sheet, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row | {"answer": answer_of(int(row["item"]) - 1)} for row in rows)


def order(source, test=range(40, 160)):
    return np.array(sampling.hash_order(source.ids, np.array(test), "human")[:100])


def test_a_hundred_items_go_out_without_a_hint_of_their_class(tmp_path):
    source = images()
    found = check_human.item(task_of(source, tmp_path))
    assert found.status == "SKIP" and "100 test items" in found.value and CLASSES[0] in found.fix
    names = sorted(path.name for path in (tmp_path / "human").iterdir())
    assert names == [
        *(f"{i:03d}.png" for i in range(1, 101)),
        "classes.txt",
        "key.json",
        "sheet.csv",
    ]
    key = (tmp_path / "human" / "key.json").read_text() + (
        tmp_path / "human" / "sheet.csv"
    ).read_text()
    assert not any(name in key for name in CLASSES)
    rows = order(source)
    for i in (0, 57):
        shown = np.array(Image.open(tmp_path / "human" / f"{i + 1:03d}.png", formats=["PNG"]))[
            ::5, ::5
        ]
        assert np.array_equal(shown, PIXELS[rows[i]].transpose(1, 2, 0))


def test_the_sheet_is_scored_with_an_interval(tmp_path):
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    source = images()
    check_human.item(task_of(source, tmp_path))
    rows = order(source)
    fill(
        tmp_path / "human" / "sheet.csv",
        lambda i: CLASSES[LABELS[rows[i]]] if i >= 10 else CLASSES[LABELS[rows[i]] - 1],
    )
    (tmp_path / "summary.json").write_text('{"linear/test/accuracy": 0.5}')
    found = check_human.item(task_of(source, tmp_path, check="all"))
    interval = stats.binomtest(90, 100).proportion_ci(method="wilson")
    assert found.status == "PASS"
    assert found.value.startswith(
        f"accuracy 0.900 ({interval.low:.3f} to {interval.high:.3f}), UAR 0."
    )
    assert found.value.endswith("of 100 items; the run's linear/test/accuracy 0.500")
    assert len(found.rows) == 11 and found.rows[1] == [
        "001",
        CLASSES[LABELS[rows[0]]],
        CLASSES[LABELS[rows[0]] - 1],
    ]


def test_a_sheet_that_is_not_filled_or_wrong_is_said(tmp_path):
    source = images()
    assert check_human.item(task_of(source, tmp_path, check="all")).status == "SKIP"
    assert not (tmp_path / "human").exists()  # exported where it is asked for by name
    check_human.item(task_of(source, tmp_path))
    sheet = tmp_path / "human" / "sheet.csv"
    fill(sheet, lambda i: CLASSES[0].upper() if i < 5 else "")
    assert check_human.item(task_of(source, tmp_path)).value == "5 answers of 100 items"
    fill(sheet, lambda i: CLASSES[0][:-1])
    with pytest.raises(InputError, match=f"line 2.*did you mean {CLASSES[0]}"):
        check_human.item(task_of(source, tmp_path))
    with pytest.raises(InputError, match="of other data or splits"):
        check_human.item(task_of(source, tmp_path, test=range(100, 160)))


def test_a_sheet_as_spreadsheets_save_it_is_read_and_a_spoilt_one_refused(tmp_path):
    source = images()
    check_human.item(task_of(source, tmp_path))
    sheet, rows = tmp_path / "human" / "sheet.csv", order(source)
    fill(sheet, lambda i: CLASSES[LABELS[rows[i]]])
    lines = sheet.read_text().splitlines()
    for delimiter in ";\t":
        sheet.write_text("\ufeff" + "\n".join(lines).replace(",", delimiter), encoding="utf-8")
        assert check_human.item(task_of(source, tmp_path)).value.startswith("accuracy 1.000")
    for spoilt, said in (
        (["number,answer", *lines[1:]], "begins with 'number,answer', without the column item"),
        (["item,said", *lines[1:]], "without the column answer"),
        ([], "without the column item and answer"),
        ([*lines, lines[5].removeprefix("00")], "line 102: item 5 is answered twice"),
    ):
        sheet.write_text("\n".join(spoilt))
        with pytest.raises(InputError, match=said):
            check_human.item(task_of(source, tmp_path))
    sheet.write_bytes("item,answer\n001,größe\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"sheet\.csv is not UTF-8 text: .*position 18"):
        check_human.item(task_of(source, tmp_path))


def test_clips_are_strips_and_utterances_are_texts(tmp_path):
    pixels = torch.from_numpy(PIXELS)
    frames = Images("f", [str(i) for i in range(160)], [-1] * 160, [], [""] * 160, pixels=pixels)
    names = [f"v{i}" for i in range(40)]
    own = clips.Videos(
        "v",
        names,
        [0, 1] * 20,
        ["real", "fake"],
        [""] * 40,
        np.arange(160).reshape(40, 4),
        1,
        frames,
    )
    check_human.item(task_of(own, tmp_path / "clips", test=range(40)))
    first = order(own, range(40))[0]
    strip = np.array(Image.open(tmp_path / "clips" / "human" / "001.png", formats=["PNG"]))[
        ::5, ::5
    ]
    assert np.array_equal(
        strip, np.concatenate(list(PIXELS[4 * first : 4 * first + 4]), 2).transpose(1, 2, 0)
    )

    texts = [f"said {i}" for i in range(30)]
    words = utterances.Utterances(
        "u", names[:30], [0, 1] * 15, ["ask", "tell"], [""] * 30, texts=texts
    )

    class Rows:
        table = words

    assert check_human.item(task_of(Rows, tmp_path / "texts", test=range(30))).status == "SKIP"
    with open(tmp_path / "texts" / "human" / "sheet.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == [texts[i] for i in order(words, range(30))]
    words.texts = None
    assert (
        "nothing that a person could read"
        in check_human.item(task_of(Rows, tmp_path / "x", test=range(30))).value
    )
