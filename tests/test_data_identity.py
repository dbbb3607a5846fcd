"""Data that change under a run: other bytes, labels or rows are refused by name; a copy goes on."""

import csv
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common.data import __main__, pack
from common.data.images import Images
from common.data.open import open_images
from common.models import Backbone, clip, mobilenet_v4
from common.run import checkpoint, content
from tests.data import clip_folders, image_folder, numbered_raer, utterances_tsv, zipped
from tests.runs import ended, equal_runs, flags, refused, start_ranks
from tests.test_dist import ranks
from tests.test_faults import Small

NAMES = [f"{name}/{i:02d}.bmp" for name in ("long", "round", "split") for i in range(24)]
SIMCLR = flags(
    "--backbone resnet18 --stem cifar --image-size 8",
    "--device cpu --bs 16 --save-every 0 --workers 1 --epochs 3",
)
STOP = ["--max-steps", "4"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of a few parameters."""
    monkeypatch.setitem(train_simclr.BACKBONES, "resnet18", Backbone(Small, 8, 8))
    monkeypatch.setattr(train_simclr, "build_backbone", lambda name, stem="imagenet": Small())
    conv = mobilenet_v4.Variant(8, mobilenet_v4.VARIANTS["conv_small"].stages, 0.1)
    monkeypatch.setitem(mobilenet_v4.VARIANTS, "conv_small_035", conv)
    tiny = clip.Variant(16, 1, 1, 8, 16, text_width=0, activation="gelu")
    monkeypatch.setitem(clip.VARIANTS, "vit_tiny", tiny)


def cells(root) -> Path:
    """72 images whose sizes in bytes are equal."""
    return image_folder(root, NAMES, width=16, height=16)


def invert(path) -> None:
    """Other pixels in a file of the same size."""
    with Image.open(path) as image:
        pixels = 255 - np.asarray(image)
    Image.fromarray(pixels).save(path)


def swap(a, b) -> None:
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


def packed(root) -> Path:
    target = root.with_suffix(".packed")
    assert __main__.main(["pack", str(root), str(target), "--workers", "1"]) == 0
    return target


FORMS = {"folder": lambda root: root, "zip": zipped, "packed": packed}


def simclr(source, out, *more) -> list[str]:
    return [*SIMCLR, "--data", str(source), "--out", str(out), *more]


@pytest.mark.e2e
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", ["labels", "pixels"])
def test_other_bytes_under_the_same_names_and_sizes_are_refused(change, form, tmp_path, capsys):
    root = cells(tmp_path / "cells")
    source, out = FORMS[form](root), tmp_path / "run"
    assert ended(train_simclr.main, simclr(source, out, *STOP)) == 0
    before = (out / "last.pt").read_bytes()
    if change == "labels":
        swap(root / "long", root / "round")
    else:
        for image in (root / "split").iterdir():
            invert(image)
    FORMS[form](root)
    name = "long/" if change == "labels" else "split/"
    said = refused(train_simclr.main, simclr(source, out), capsys, name, "--force-resume", out)
    assert ".bmp and " in said and " more) have other content than when the run" in said
    assert (out / "last.pt").read_bytes() == before


@pytest.mark.e2e
def test_the_default_directory_is_as_strict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells(tmp_path / "cells")
    argv = [*SIMCLR, "--data", "cells"]
    assert ended(train_simclr.main, [*argv, *STOP]) == 0
    swap(tmp_path / "cells/long", tmp_path / "cells/round")
    refused(train_simclr.main, argv, capsys, "long/", "--force-resume", "runs/simclr/")
    swap(tmp_path / "cells/long", tmp_path / "cells/round")
    assert train_simclr.main(argv) == 0
    # What has finished says so to the data it has read alone.
    assert train_simclr.main(argv) == 0
    invert(tmp_path / "cells/long/00.bmp")
    refused(train_simclr.main, argv, capsys, "long/00.bmp")


@pytest.mark.e2e
def test_the_pixels_of_a_packed_file_cannot_be_replaced(tmp_path, capsys):
    source, out = packed(cells(tmp_path / "cells")), tmp_path / "run"
    assert ended(train_simclr.main, simclr(source, out, *STOP)) == 0
    images = open_images(str(source))
    images.keeps = False
    index = pack._read_index(source)
    pixels = [255 - images.decode(i).numpy() for i in range(len(images))]
    write_packed(source, pixels, index)
    assert open_images(str(source)).fingerprint == images.fingerprint
    refused(train_simclr.main, simclr(source, out), capsys, "72 of 72", "long/00.bmp")


def write_packed(path, pixels, index) -> None:
    """A packed file whose checksums are right, whatever it holds."""
    images = [image.transpose(1, 2, 0).tobytes() for image in pixels]
    index["crc"] = [pack.zlib.crc32(image) for image in images]
    text = json.dumps(index).encode()
    trailer = struct.pack("<Q32s", len(text), pack.hashlib.sha256(text).digest())
    path.write_bytes(pack._MAGIC + b"".join(images) + text + trailer)


@pytest.mark.e2e
def test_copies_and_other_forms_of_the_data_continue_bitwise(tmp_path, capsys):
    root = cells(tmp_path / "cells")
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train_simclr.main(simclr(root, whole)) == 0
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    sources = [root, zipped(root), packed(root), copy]
    for step, source in enumerate(sources, 2):
        argv = simclr(source, out, "--max-steps", str(step))
        assert ended(train_simclr.main, argv) == 0, capsys.readouterr().err
    for image in copy.rglob("*.bmp"):
        os.utime(image, (1, 1))
    assert train_simclr.main(simclr(copy, out)) == 0
    equal_runs(whole, out)
    assert "content" not in capsys.readouterr().out


@pytest.mark.e2e
def test_a_packed_file_without_digests_opens_and_goes_on(tmp_path):
    root, out = cells(tmp_path / "cells"), tmp_path / "run"
    source = packed(root)
    index = pack._read_index(source)
    pixels = [open_images(str(source)).decode(i).numpy() for i in range(72)]
    del index["digests"]
    write_packed(source, pixels, index)
    assert ended(train_simclr.main, simclr(root, out, *STOP)) == 0
    assert train_simclr.main(simclr(source, out)) == 0


@pytest.mark.e2e
def test_what_is_not_tried_at_the_start_is_refused_when_it_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(content, "_TRIED", 0)
    monkeypatch.setattr(Images, "_probe", lambda self: 16)  # which reads the first ones
    root, out = cells(tmp_path / "cells"), tmp_path / "run"
    assert ended(train_simclr.main, simclr(root, out, *STOP)) == 0
    for image in (root / "round").iterdir():
        invert(image)
    before = (out / "last.pt").read_bytes()
    refused(
        train_simclr.main, simclr(root, out), capsys, "rank 0 of 1, pretrain step", "round/",
        ".bmp has other content than when the run in", "--force-resume",
    )  # fmt: skip
    assert (out / "last.pt").read_bytes() == before
    for image in (root / "round").iterdir():
        invert(image)
    assert train_simclr.main(simclr(root, out)) == 0
    assert train_simclr.main(simclr(root, tmp_path / "whole")) == 0
    equal_runs(tmp_path / "whole", out)


@pytest.mark.e2e
@pytest.mark.parametrize("tried", [0, 256])
def test_force_resume_goes_on_says_so_and_records_what_is_there(
    tried, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(content, "_TRIED", tried)
    root, out = cells(tmp_path / "cells"), tmp_path / "run"
    assert ended(train_simclr.main, simclr(root, out, *STOP)) == 0
    swap(root / "long", root / "round")
    capsys.readouterr()
    argv = simclr(root, out, "--max-steps", "7")
    assert ended(train_simclr.main, [*argv, "--force-resume"]) == 0
    said = [line for line in capsys.readouterr().out.split("\n") if "content has changed" in line]
    assert said and "--force-resume" in said[0] and "long/" in said[0]
    assert tried == 0 or len(said) == 1
    assert train_simclr.main(simclr(root, out)) == 0
    assert "content has changed" not in capsys.readouterr().out


@pytest.mark.e2e
def test_features_of_other_bytes_are_not_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(content, "_TRIED", 0)
    root = cells(tmp_path / "cells")
    more = flags("--epochs 1 --stage all")
    more += flags("--finetune-bs 16 --finetune-epochs 1")
    out = tmp_path / "run"
    assert train_simclr.main(simclr(root, out, *more)) == 0
    again = [*out.glob("*/last*.pt"), *out.glob("*/best.pt"), out / "summary.json"]

    def features() -> np.ndarray:
        with np.load(out / "features.npz") as stored:
            return stored["features"]

    first = features()
    written = (out / "features.npz").stat().st_mtime_ns
    for image in (root / "long").iterdir():
        invert(image)
    for file in again:
        if "pretrain" not in file.parts:
            file.unlink()
    assert train_simclr.main(simclr(root, out, *more, "--force-resume")) == 0
    changed = (features() != first).any(1)
    assert changed[:24].all() and not changed[24:].any()
    # Of unchanged bytes they are kept.
    written = (out / "features.npz").stat().st_mtime_ns
    for file in again:
        if "pretrain" not in file.parts:
            file.unlink()
    assert train_simclr.main(simclr(root, out, *more)) == 0
    assert (out / "features.npz").stat().st_mtime_ns == written


@pytest.mark.e2e
@pytest.mark.parametrize("how", ["--out", "--resume"])
def test_another_listing_is_told_in_words(how, tmp_path, capsys):
    root, out = cells(tmp_path / "cells"), tmp_path / "run"
    assert ended(train_simclr.main, simclr(root, out, *STOP)) == 0
    argv = [*SIMCLR, "--data", str(root), how, str(out)]
    (root / "long/99.bmp").write_bytes((root / "long/00.bmp").read_bytes())
    refused(train_simclr.main, argv, capsys, "1 file new (long/99.bmp)", "--force-resume")
    (root / "long/99.bmp").unlink()
    (root / "round/05.bmp").unlink()
    (root / "round/06.bmp").unlink()
    refused(train_simclr.main, argv, capsys, "2 files missing")
    (root / "round/05.bmp").write_bytes((root / "round/07.bmp").read_bytes())
    (root / "round/06.bmp").write_bytes((root / "round/07.bmp").read_bytes() + b"0")
    refused(train_simclr.main, argv, capsys, "1 file with another size (round/06.bmp)")


@pytest.mark.e2e
def test_a_run_on_other_data_beside_a_new_one_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = cells(tmp_path / "cells")
    argv = [*SIMCLR, "--data", "cells", *STOP]
    assert ended(train_simclr.main, argv) == 0
    assert ended(train_simclr.main, [*argv, "--seed", "7"]) == 0
    assert "other data" not in capsys.readouterr().out
    (first,) = [
        file.parent
        for file in Path("runs/simclr").glob("*/config.json")
        if json.loads(file.read_text())["seed"] != 7
    ]
    (root / "long/99.bmp").write_bytes((root / "long/00.bmp").read_bytes())
    assert ended(train_simclr.main, argv) == 0
    said = [line for line in capsys.readouterr().out.split("\n") if "other data" in line]
    assert len(said) == 1 and str(first) in said[0] and "1 file new (long/99.bmp)" in said[0]
    # It is said when the new run begins, not when it goes on.
    assert ended(train_simclr.main, argv[:-1] + ["5"]) == 0
    assert "other data" not in capsys.readouterr().out


@pytest.mark.e2e
def test_a_damaged_record_is_said_and_counts_as_none(tmp_path, capsys):
    root, out = cells(tmp_path / "cells"), tmp_path / "run"
    assert ended(train_simclr.main, simclr(root, out, *STOP)) == 0
    good = (out / content.CONTENT).read_bytes()
    for number, bad in enumerate((good[:-9], good[:99] + b"?" + good[100:], b"", b"{}"), 5):
        (out / content.CONTENT).write_bytes(bad)
        capsys.readouterr()
        argv = simclr(root, out, "--max-steps", str(number))
        assert ended(train_simclr.main, argv) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        assert said.count(f"{out / content.CONTENT}") == 1 and "is not known" in said
        assert checkpoint.is_whole(out / content.CONTENT)
    checkpoint.save(out / content.CONTENT, {"foreign": 1})
    assert train_simclr.main(simclr(root, out)) == 0
    assert "no record of a data set's content" in capsys.readouterr().out


TSM = flags(
    "--backbone conv_small_035 --image-size 32 --n-segment 2 --clips 1",
    "--device cpu --bs 4 --save-every 0 --workers 1 --epochs 3",
)


@pytest.mark.e2e
@pytest.mark.parametrize("change", ["pixels", "label", "split", "frame"])
def test_videos_that_change_are_refused(change, tmp_path, capsys):
    clips = [
        (f"{part}{k}{label}", label, part, [30 * k, 60, 90])
        for part, count in (("train", 4), ("val", 2), ("test", 2))
        for k in range(count)
        for label in ("real", "fake")
    ]
    root, out = clip_folders(tmp_path / "clips", clips), tmp_path / "run"
    argv = [*TSM, "--data", str(root / "videos.csv"), "--out", str(out)]
    assert ended(train_tsm.main, [*argv, *STOP]) == 0
    with open(root / "videos.csv") as file:
        rows = list(csv.reader(file))
    if change == "pixels":
        swap(root / "train1real", root / "train2real")  # fields of another gray, of equal sizes
        refused(train_tsm.main, argv, capsys, "train1real/00", "other content")
        return
    if change == "label":
        rows[1][1], rows[2][1] = rows[2][1], rows[1][1]
        word = "6 files with another label (train0real/0000.png"
    elif change == "split":
        rows[1][3], rows[9][3] = rows[9][3], rows[1][3]
        word = "6 files with another split (train0real/0000.png"
    else:
        (root / "train0real/0002.png").unlink()
        word = "1 file missing"
    with open(root / "videos.csv", "w") as file:
        csv.writer(file).writerows(rows)
    refused(train_tsm.main, argv, capsys, "the data has changed", word)


RAER = flags(
    "--backbone vit_tiny --num-frames 2 --tune full",
    "--device cpu --bs 4 --save-every 0 --workers 1 --epochs 3",
)


@pytest.mark.e2e
@pytest.mark.parametrize("change", ["pixels", "label", "box"])
def test_emotion_clips_that_change_are_refused(change, tmp_path, capsys):
    lists = {
        part: [(f"{part}/{k}{label}", label) for k in range(count) for label in (1, 2)]
        for part, count in (("train", 6), ("val", 2), ("test", 2))
    }
    root, out = tmp_path / "raer", tmp_path / "run"
    numbered_raer(root, lists, classes="calm\nglad\n")
    argv = [*RAER, "--data", str(root), "--out", str(out)]
    assert ended(train_raer.main, [*argv, *STOP]) == 0
    if change == "pixels":
        swap(root / "train/01", root / "train/52")
        refused(train_raer.main, argv, capsys, "train/01/", "other content")
    elif change == "label":
        text = (root / "train.txt").read_text()
        text = text.replace("train/01 3 1", "train/01 3 2").replace("train/02 3 2", "train/02 3 1")
        (root / "train.txt").write_text(text)
        refused(train_raer.main, argv, capsys, "6 files with another label (train/01/8.png")
    else:
        boxes = json.loads((root / "face.json").read_text())
        boxes["train/32"]["9.png"] = [0, 0, 12, 12]
        (root / "face.json").write_text(json.dumps(boxes))
        refused(train_raer.main, argv, capsys, "1 file with another box (train/32/9.png)")


@pytest.mark.e2e
@pytest.mark.parametrize("change", ["text", "label", "row"])
def test_rows_of_a_table_that_change_are_refused(change, tmp_path, capsys):
    table, out = utterances_tsv(tmp_path / "table.tsv"), tmp_path / "run"
    argv = flags(
        "--base-dim 8 --bs 40 --epochs 2 --cluster-bs 40 --cluster-epochs 2 --device cpu --k 4",
        "--save-every 0 --data", table, "--out", out,
    )  # fmt: skip
    assert ended(train_cluster.main, [*argv, *STOP]) == 0
    lines = table.read_text().split("\n")
    if change == "text":
        lines[6] = lines[6].replace("name5", "name6")
        word = "1 utterance with another content (u5)"
    elif change == "label":
        lines[6] = lines[6].replace("tell", "greet")
        word = "1 utterance with another label (u5)"
    else:
        del lines[6]
        word = "1 utterance missing"
    table.write_text("\n".join(lines))
    refused(train_cluster.main, argv, capsys, "the data has changed", word)
    assert train_cluster.main([*argv, "--force-resume"]) == 0
    assert word in capsys.readouterr().out
    assert train_cluster.main(argv) == 0


@pytest.mark.e2e
def test_ranks_with_other_data_end_before_the_first_step(tmp_path):
    names = [f"x/{i:02d}.bmp" for i in range(41)]
    more = image_folder(tmp_path / "more", names, width=8, height=8)
    fewer = image_folder(tmp_path / "fewer", names[:-1], width=8, height=8)
    argv = flags(
        "--backbone resnet18 --stem cifar --image-size 8 --stage pretrain --device cpu --bs 8",
        "--epochs 1 --out", tmp_path / "run", "--data",
    )  # fmt: skip
    processes = start_ranks(train_simclr, [[*argv, str(more)], [*argv, str(fewer)]])
    for process in processes:
        _, error = process.communicate(timeout=120)
        *warnings, error = error.splitlines()
        assert process.returncode == 2 and not any("error: " in line for line in warnings), error
        assert "41 items" in error and "on rank 0; 40 items" in error and "on rank 1" in error
    assert not (tmp_path / "run").exists()


def record_of_two(world, folder):
    """Two ranks read other files of one set; then both read one that differs between them."""
    names = [f"{i}" for i in range(6)]
    files = [b"%d" % i for i in range(6)]
    files[5] = b"of rank %d" % world.rank
    known = content.Content(names, files.__getitem__, keys=range(1, 7), facts={"size": np.ones(6)})
    known.take_over(None, folder, world, force=False, workers=1)
    for index in (0, 1) if world.rank == 0 else (1, 2, 3):
        known.read(index)
    known.save(world, print)
    train_simclr.dist.barrier()  # rank 0 has written
    digests = content.load(folder, print)["digests"]
    known.read(5)
    with pytest.raises(content.InputError, match="other bytes under the same names: 5;|names;"):
        known.save(world, print)
    return digests


def test_a_record_holds_what_all_ranks_have_read(tmp_path):
    expected = [content.digest(b"%d" % i) if i < 4 else 0 for i in range(6)]
    for result in ranks(tmp_path, 2, record_of_two, tmp_path):
        assert result.tolist() == expected


def test_bytes_are_hashed_once_and_trusted_by_key(tmp_path, monkeypatch):
    world = train_simclr.dist.Dist(0, 1, torch.device("cpu"))
    files, keys, hashed = [b"a", b"b", b"c"], [1, 2, 3], []
    digest = content.digest
    monkeypatch.setattr(content, "digest", lambda x: hashed.append(x) or digest(x))

    def start(keys):
        hashed.clear()
        known = content.Content(["x", "y", "z"], files.__getitem__, keys=keys)
        record = content.load(tmp_path, print)
        known.take_over(record, tmp_path, world, force=False, workers=1)
        for index in (0, 0, 1):
            known.read(index)
        found = [name for name in hashed if name in files]
        known.save(world, print)
        (tmp_path / content.CONTENT).rename(tmp_path / "moved")
        known.save(world, print)  # nothing is new: nothing is written
        assert not (tmp_path / content.CONTENT).exists()
        (tmp_path / "moved").rename(tmp_path / content.CONTENT)
        return found

    assert start(keys) == [b"a", b"b"]
    assert start(keys) == []  # trusted
    assert start([9, 2, 3]) == [b"a"]  # touched: hashed again, once
    assert start([9, 2, 3]) == []  # and trusted from then on
