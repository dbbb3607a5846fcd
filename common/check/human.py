"""The human baseline: how well does a person do on the test items that the model is judged by?

`--check human-baseline` exports 100 of them without their labels to human/ in the run directory,
pictures, or texts in the sheet, and sheet.csv to fill; the same command again scores the sheet.
Which items they are follows from their names, so nothing in the folder gives an answer away.
"""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import metrics, reading
from common.check.result import PASS, SKIP, CheckSpec, Result, skip
from common.data.clips import Videos
from common.data.images import UNLABELED
from common.data.sampling import hash_order
from common.errors import InputError, did_you_mean, plural
from common.run.files import atomic_write, read_json, write_json

ITEMS = 100  # exported
FRAMES = 8  # of a clip's strip
LEAST = 20  # answers that are scored
SIDE = 128  # pixels; smaller pictures are enlarged in whole pixels
# Of the run, beside the person's.
_OF_THE_RUN = (
    "finetune/test/accuracy",
    "linear/test/accuracy",
    "train/test/video_accuracy",
    "train/test/war",
)


def item(spec: CheckSpec) -> Result:
    """Export the items, or score the sheet that is filled."""
    run = spec.run
    folder = run.folder / "human"
    source = getattr(run.data, "table", run.data)
    test = run.splits.get("finetune_test", run.splits["test"])
    test = test[source.labels[test] != UNLABELED]
    if not len(test) or len(source.classes) < 2:
        return skip("no labeled test items")
    if source is not run.data and source.texts is None:
        return skip("features without text: nothing that a person could read")
    rows = np.array(hash_order(source.ids, test, "human")[:ITEMS])
    sheet = folder / "sheet.csv"
    if sheet.exists():
        return score(sheet, source, rows, run.folder)
    if "human-baseline" not in run.args.check:
        return skip("--check human-baseline exports test items with a sheet to fill")
    export(folder, source, rows)
    value = f"{len(rows)} test items in {folder}"
    fix = f"write one of {', '.join(source.classes)} in each row of {sheet} and run this again"
    return Result(SKIP, value, f"{LEAST} answers", fix)


def export(folder: Path, source, rows: np.ndarray) -> None:
    """Write the items at `rows` of a data set for a person to name.

    These are 001.png and so on, or their texts in sheet.csv; classes.txt; key.json. The sheet comes
    last: once it is there, it is what will be scored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = getattr(source, "texts", None)
    if texts is None:
        for number, row in enumerate(rows, 1):
            _picture(source, int(row)).save(folder / f"{number:03d}.png")
    (folder / "classes.txt").write_text("\n".join(source.classes) + "\n", encoding="utf-8")
    write_json(folder / "key.json", {"data": source.fingerprint, "items": len(rows)})
    with atomic_write(folder / "sheet.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["item", *(["text"] if texts else []), "answer"])
        for number, row in enumerate(rows, 1):
            writer.writerow([f"{number:03d}", *([texts[row]] if texts else []), ""])


def _picture(source, row: int) -> Image.Image:
    if isinstance(source, Videos):
        indices = source.frames[row]
        count = min(FRAMES, len(indices))
        indices = indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]
        frames = [source.images.decode(int(index)) for index in indices]
    else:
        frames = [source.decode(row)]
    if frames[0].ndim == 4:  # two streams, one above the other
        frames = [torch.cat(list(frame), 1) for frame in frames]
    strip: Tensor = torch.cat(frames, 2)
    scale = max(1, SIDE // strip.shape[1])
    enlarged = strip.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return Image.fromarray(enlarged.permute(1, 2, 0).numpy())


def score(sheet: Path, source, rows: np.ndarray, run_folder: Path) -> Result:
    """Accuracy of a filled sheet with its 95 % interval, UAR, and the items answered wrongly.

    Raises:
        InputError: the sheet is of other data, or cannot be read, see `read_sheet`.
    """
    key = read_json(sheet.parent / "key.json")
    if key != {"data": source.fingerprint, "items": len(rows)}:
        raise InputError(f"{sheet} is of other data or splits; move it away, and export again")
    answers = read_sheet(sheet, source.classes, len(rows))
    count = len(answers)
    if count < LEAST:
        value = f"{plural(count, 'answer')} of {len(rows)} items"
        return Result(SKIP, value, f"{LEAST} answers", f"fill {sheet}")
    truth = [int(source.labels[rows[number - 1]]) for number, _, _ in answers]
    named = [label for _, _, label in answers]
    wrong = [
        [text, source.classes[label], source.classes[answer]]
        for label, (_, text, answer) in zip(truth, answers, strict=True)
        if label != answer
    ]
    hits = count - len(wrong)
    low, high = metrics.share_interval(hits, count)
    uar = metrics.long_tail(np.array(truth), np.array(named), len(source.classes))["uar"]
    value = (
        f"accuracy {hits / count:.3f} ({low:.3f} to {high:.3f}), UAR {uar:.3f}, of {count} items"
    )
    summary = read_json(run_folder / "summary.json") or {}
    for name in _OF_THE_RUN:
        if name in summary:
            value += f"; the run's {name} {summary[name]:.3f}"
    return Result(PASS, value, rows=[["item", "class", "answer"], *wrong] if wrong else [])


def read_sheet(sheet: Path, classes: list[str], num_items: int) -> list[tuple[int, str, int]]:
    """(an item's number, as it is written, the class answered) of each row that has an answer.

    Raises:
        InputError: the sheet is not UTF-8, lacks a column, or answers an item twice or with no
            class.
    """
    known = {name.lower(): number for number, name in enumerate(classes)}
    answers = []
    answered = set()
    try:
        text = reading.decode_table(reading.read_bytes(sheet), sheet)
    except UnicodeDecodeError as error:
        raise InputError(f"{sheet} is not UTF-8 text: {error}; save it as UTF-8") from None
    file = io.StringIO(text, newline="")
    first = file.readline()
    file.seek(0)
    # A spreadsheet program may have saved it with another delimiter.
    reader = csv.DictReader(file, delimiter=max(",;\t", key=first.count))
    lacking = [name for name in ("item", "answer") if name not in (reader.fieldnames or ())]
    if lacking:
        raise InputError(
            f"{sheet} begins with {first.strip()!r}, without the column"
            f" {' and '.join(lacking)}; name it there"
        )
    for line, row in enumerate(reader, 2):
        answer = (row.get("answer") or "").strip().lower()
        if not answer:
            continue
        text = (row["item"] or "").strip()
        if answer not in known or not text.isdecimal() or not 1 <= int(text) <= num_items:
            hint = did_you_mean(answer, known)
            raise InputError(
                f"{sheet}, line {line}: {row['answer']!r} for item {text!r}, allowed are 1 to"
                f" {num_items} and {', '.join(classes)}{hint}"
            )
        number = int(text)
        if number in answered:
            raise InputError(
                f"{sheet}, line {line}: item {text} is answered twice; keep one of the answers"
            )
        answered.add(number)
        answers.append((number, text, known[answer]))
    return answers
