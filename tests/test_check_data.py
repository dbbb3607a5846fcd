"""--check names what is wrong with the data, and finds nothing in data that is right."""

import json
import math
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import train_simclr
from common import deep_cluster
from common.check import data as check_data
from common.check import inspection
from common.data import clips, faceforensics, sampling, utterances
from common.data.__main__ import main as pack_main
from common.data.images import UNLABELED, Images
from common.data.open import open_images
from tests.data import image_folder, sample_cells, split_cells
from tests.runs import flags

PIXELS, LABELS, CLASSES = sample_cells()


def picture(index):
    return Image.fromarray(PIXELS[index].transpose(1, 2, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return split_cells(tmp_path_factory.mktemp("data") / "cells")


def examine(path, out, splits=None, supervised=True):
    items = open_images(str(path)) if not hasattr(path, "ids") else path
    return check_data.examine(items, splits or sampling.split(items), out, 2, supervised)


@pytest.fixture(scope="module")
def healthy(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return examine(folder, out), out


def test_healthy_images_pass(healthy):
    found, out = healthy
    assert {name: item.status for name, item in found.items()} == dict.fromkeys(
        check_data.CHECKS, "PASS"
    )
    for item in found.values():
        assert item.value and item.threshold and not item.fix
        assert all((out / picture).stat().st_size for picture in item.pictures)
    assert "figures/check_classes.svg" in found["imbalance"].pictures


def test_the_same_file_in_train_and_test_fails_by_name(folder, tmp_path):
    copy = split_cells(tmp_path / "cells", count=200)
    train = next((copy / "train" / CLASSES[0]).iterdir())
    (copy / "test" / CLASSES[0] / "again.png").write_bytes(train.read_bytes())
    found = examine(copy, tmp_path)["duplicates"]
    assert found.status == "FAIL" and "1 exact" in found.value
    assert (
        f"test/{CLASSES[0]}/again.png (test)" in found.fix
        and f"{CLASSES[0]}/{train.name} (" in found.fix
    )
    assert found.rows[1][0] == "exact"


def test_a_copy_beyond_the_items_that_are_decoded_is_found_too(folder, tmp_path, monkeypatch):
    copy = split_cells(tmp_path / "cells")
    train = next((copy / "train" / CLASSES[1]).iterdir())
    (copy / "test" / CLASSES[1] / "again.png").write_bytes(train.read_bytes())
    monkeypatch.setattr(inspection, "LOOKED", 8)
    monkeypatch.setattr(inspection, "HASHED", 200)
    seen = inspection.inspect(images := open_images(str(copy)), sampling.split(images), 2)
    assert seen.of == "8 images, 401 in all" and seen.compared <= 200
    assert any(
        {twin.name for twin in group} >= {f"test/{CLASSES[1]}/again.png"}
        for group in seen.duplicates
    )


@pytest.mark.parametrize("change", ["jpeg", "larger", "brighter"])
def test_a_changed_copy_in_the_test_is_near(change, tmp_path):
    copy = split_cells(tmp_path / "cells", count=160)
    for path in sorted((copy / "train").rglob("*.png"))[:4]:
        image = Image.open(path, formats=["PNG"])
        if change == "larger":
            image = image.resize((48, 48), Image.Resampling.BICUBIC)
        if change == "brighter":
            image = image.point(lambda value: min(255, int(value * 0.9 + 20)))
        target = copy / "test" / path.parent.name / f"near_{path.stem}.jpg"
        image.save(target, quality=85 if change == "jpeg" else 95)
    found = examine(copy, tmp_path)["duplicates"]
    assert found.status == "FAIL" and found.value.startswith("0 exact and 4 near across splits")
    assert all(sum("near_" in cell for cell in row) == 1 for row in found.rows[1:])
    assert found.pictures == ["figures/check_duplicates.png"]


def test_one_near_pair_in_a_large_test_warns(folder, tmp_path):
    copy = split_cells(tmp_path / "cells")
    path = next((copy / "train").rglob("*.png"))
    Image.open(path, formats=["PNG"]).save(
        copy / "test" / path.parent.name / "near.jpg", quality=80
    )
    found = examine(copy, tmp_path)["duplicates"]
    assert (
        found.status == "WARN" and "1 near across splits" in found.value and "near.jpg" in found.fix
    )


def test_equal_images_of_two_labels_are_named(folder, tmp_path):
    copy = split_cells(tmp_path / "cells")
    one, other = sorted(path for path in (copy / "train").iterdir() if path.is_dir())[:2]
    path = min(one.glob("*.png"))
    shutil.copy(path, other / "twin.png")
    found = examine(copy, tmp_path)["duplicates"]
    assert "1 group of equal images, such as" in found.fix
    assert f"{path.name} ({one.name})" in found.fix and f"twin.png ({other.name})" in found.fix


def test_perceptual_hash_is_the_sign_of_low_frequencies():
    fft = pytest.importorskip("scipy.fft", reason="pip install scipy")
    frames = torch.from_numpy(PIXELS[:20])
    low = fft.dctn(frames.double().mean(1).numpy(), axes=(1, 2))[:, :8, :8].reshape(20, -1)[:, 1:]
    expected = low > np.median(low, axis=1, keepdims=True)
    assert (check_data.perceptual_hash(frames).numpy() == expected).mean() > 0.999


def test_shuffled_labels_fail_where_a_run_trains_on_them(tmp_path):
    rng = np.random.default_rng(0)
    copy = split_cells(tmp_path / "cells", rng.permutation(LABELS))
    found = examine(copy, tmp_path)["label-noise"]
    assert found.status == "FAIL" and "shuffled" in found.fix
    assert examine(copy, tmp_path, supervised=False)["label-noise"].status == "WARN"


def test_a_wrong_label_among_sure_neighbors_is_shown(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (300, 3, 16, 16)).astype(np.uint8)
    labels = np.arange(300) % 3
    # Each class has a pattern of its own.
    patterns = rng.integers(0, 190, (3, 3, 16, 16))
    pixels += patterns[labels].astype(np.uint8)
    labels[7] = (labels[7] + 1) % 3
    ids = [f"{i:03d}" for i in range(300)]
    images = Images("x", ids, labels, list("abc"), [""] * 300, pixels=torch.from_numpy(pixels))
    splits = {"train": np.arange(250), "test": np.arange(250, 300)}
    found = examine(images, tmp_path, splits)["label-noise"]
    assert found.status == "PASS" and [row[0] for row in found.rows[1:]] == ["007"]
    assert found.value.endswith("; look at 007 (c, neighbors say b)")
    assert found.rows[1][1:] == ["c", "b", "100%"] and found.pictures == [
        "figures/check_labels.png"
    ]


def test_neighbors_that_know_no_better_than_chance_doubt_no_label(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 3, 16, 16)).astype(np.uint8)
    labels = np.arange(300) % 10 // 9  # one in ten: most neighbors of these are of the others
    ids = [f"{i:03d}" for i in range(300)]
    images = Images("x", ids, labels, list("ab"), [""] * 300, pixels=torch.from_numpy(pixels))
    splits = {"train": np.arange(250), "test": np.arange(250, 300)}
    found = examine(images, tmp_path, splits)["label-noise"]
    assert len(found.rows) > 10 and "look at" not in found.value


def test_agreement_is_that_of_scikit_learns_neighbors():
    neighbors = pytest.importorskip("sklearn.neighbors", reason="pip install scikit-learn")
    rng = np.random.default_rng(1)
    x, truth = rng.normal(size=(300, 5)), rng.integers(0, 3, 300)
    x[:, 0] += truth
    near = (
        neighbors.NearestNeighbors(n_neighbors=11).fit(x).kneighbors(return_distance=True)[1][:, 1:]
    )
    share, z = check_data.label_agreement(truth, near)
    assert share == pytest.approx(np.mean([truth[row] == truth[i] for i, row in enumerate(near)]))
    assert z > 5 and abs(check_data.label_agreement(rng.permutation(truth), near)[1]) < 4


def test_damaged_images_are_named_decoded_or_not(tmp_path, monkeypatch):
    copy = split_cells(tmp_path / "cells", count=80)
    victim = sorted((copy / "train").rglob("*.png"))[3]
    victim.write_bytes(victim.read_bytes()[:300])
    name = victim.relative_to(copy).as_posix()
    found = examine(copy, tmp_path)["corrupt"]
    assert found.status == "FAIL" and found.value == "1 damaged of 80 images" and name in found.fix
    shapeless = copy / "train" / victim.parent.name / "shapeless.png"
    shapeless.write_bytes(b"no picture")
    for looked in (inspection.LOOKED, 1):  # decoded, or its header read alone
        monkeypatch.setattr(inspection, "LOOKED", looked)
        shown = str(examine(copy, tmp_path)["corrupt"].rows)
        assert "shapeless.png (cannot identify image file)" in shown
    shapeless.unlink()
    monkeypatch.undo()

    archive = tmp_path / "cells.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in sorted(copy.rglob("*.png")):
            if path != victim:
                target.write(path, path.relative_to(copy).as_posix())
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as source:
        entry = source.infolist()[40]
    content[entry.header_offset + 30 + len(entry.filename) + entry.file_size // 2] ^= 1  # one bit
    archive.write_bytes(content)
    monkeypatch.setattr(inspection, "LOOKED", 1)
    found = examine(archive, tmp_path)["corrupt"]
    assert found.status == "FAIL" and entry.filename in found.fix


def test_classes_have_their_prior_and_an_empty_one_fails(tmp_path):
    labels = np.repeat([0, 1, 2], [80, 10, 5])
    pixels = torch.from_numpy(PIXELS[: len(labels)])
    ids = [f"{i:03d}" for i in range(len(labels))]
    images = Images("x", ids, labels, ["a", "b", "c"], [""] * len(labels), pixels=pixels)
    splits = {"train": np.arange(90), "test": np.arange(90, 95)}
    found = examine(images, tmp_path, splits)["imbalance"]
    assert found.status == "FAIL" and "no training images of c" in found.value
    assert found.rows[0] == ["class", "train", "val", "test", "prior", "bias"]
    assert found.rows[2][:5] == ["b", "10", "0", "0", f"{10 / 90:.4f}"]
    assert float(found.rows[2][5]) == pytest.approx(math.log(10 / 90), abs=1e-3)
    assert examine(images, tmp_path, splits, supervised=False)["imbalance"].status == "WARN"
    unused = {"train": np.arange(85), "test": np.arange(85, 90)}  # c serves no part
    assert "no training" not in examine(images, tmp_path, unused)["imbalance"].value

    binary = Images(
        "x", ids, np.minimum(labels, 1), ["real", "fake"], [""] * len(labels), pixels=pixels
    )
    found = examine(binary, tmp_path, {"train": np.arange(84), "test": np.arange(84, 95)})[
        "imbalance"
    ]
    assert found.status == "WARN"
    assert found.value == "20.0 in the training part: real 80 over fake 4; none of real in test"
    assert found.fix.endswith("the prior: real 0.952, fake 0.0476")
    assert float(found.rows[2][5]) == pytest.approx(math.log(4 / 80), abs=1e-3)  # of one logit

    names = [f"c{i}" for i in range(59)]
    own = np.r_[np.zeros(36, int), np.arange(59)]
    many = Images("x", ids, own, names, [""] * len(ids), pixels=pixels)
    found = examine(many, tmp_path, {"train": np.arange(95)})["imbalance"]
    assert found.value == "37.0 in the training part: c0 37 over c1 1"
    shares = "the prior: c0 0.389, c1 0.0105, c2 0.0105, c3 0.0105, c4 0.0105 and 54 more"
    assert found.fix.endswith(shares)


def test_what_differs_from_all_others_is_an_outlier(tmp_path):
    copy = split_cells(tmp_path / "cells", count=120)
    Image.new("RGB", (32, 32)).save(copy / "train" / CLASSES[0] / "black.png")
    picture(0).resize((200, 32)).save(copy / "train" / CLASSES[0] / "wide.png")
    found = examine(copy, tmp_path)["outliers"]
    assert found.status == "WARN" and found.value.startswith("2 of 122 images")
    named = {row[0].split("/")[-1]: row[1] for row in found.rows[1:]}
    assert named == {"black.png": "entropy, bits", "wide.png": "width / height"}
    assert (
        "figures/check_outliers.png" in found.pictures
        and "figures/check_brightness.svg" in found.pictures
    )


def test_robust_z_is_scipys_median_deviation():
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    values = np.random.default_rng(0).normal(120, 30, 500)
    expected = (values - np.median(values)) / stats.median_abs_deviation(values, scale="normal")
    np.testing.assert_allclose(check_data.robust_z("brightness", values), expected, rtol=1e-3)


def test_the_choice_is_a_function_of_names_with_a_quarter_of_the_test():
    ids = [f"item{i}" for i in range(5000)]
    parts = np.full(5000, "train", dtype=object)
    parts[:500], parts[500:600] = "test", ""
    kept = inspection.sampled_items(ids, parts, 1000)
    assert len(kept) == 1000 and (parts[kept] == "test").sum() == 250 and (parts[kept] != "").all()
    order = np.random.default_rng(0).permutation(5000)
    again = inspection.sampled_items([ids[i] for i in order], parts[order], 1000)
    assert {ids[order[i]] for i in again} == {ids[i] for i in kept}
    assert len(inspection.sampled_items(ids, parts, 10_000)) == 4900


def test_parts_are_those_of_the_strictest_use():
    splits = {
        "pretrain": np.arange(8),
        "finetune_dev": np.array([6]),
        "finetune_test": np.array([7]),
    }
    assert inspection.parts_of(splits, 9).tolist() == ["train"] * 6 + ["val", "test", ""]


def videos(sequences, splits, labels=None):
    pixels = torch.from_numpy(np.concatenate([PIXELS[own] for own in sequences]))
    ids = [f"{i:03d}" for i in range(len(pixels))]
    images = Images("clips", ids, [UNLABELED] * len(ids), [], [""] * len(ids), pixels=pixels)
    ends = np.cumsum([len(own) for own in sequences])
    frames = np.split(np.arange(ends[-1]), ends[:-1])
    names = [f"v{i}" for i in range(len(sequences))]
    labels = [0, 1] * (len(names) // 2) if labels is None else labels
    return clips.Videos("clips", names, labels, ["real", "fake"], splits, frames, 25.0, images)


def test_clips_are_alike_where_all_their_frames_are(tmp_path):
    sequences = [list(range(8 * i, 8 * i + 8)) for i in range(12)]
    sequences[3] = sequences[2][:4] + sequences[3][4:]  # a manipulation that begins in the middle
    own = videos(sequences, ["train"] * 8 + ["test"] * 4)
    splits = {"train": np.arange(8), "test": np.arange(8, 12)}
    found = examine(own, tmp_path, splits)
    assert found["duplicates"].status == "PASS" and found["label-noise"].status == "SKIP"
    assert "0.0" not in found["outliers"].value and found["outliers"].status == "PASS"

    sequences[9] = sequences[1]
    found = examine(videos(sequences, own.splits), tmp_path, splits)["duplicates"]
    assert found.status == "FAIL" and "v1 (train)" in found.fix and "v9 (test)" in found.fix


def test_a_damaged_frame_names_its_clip(tmp_path):
    folder = tmp_path / "frames"
    files = []
    for clip in range(3):
        for k in range(6):
            files.append(f"c{clip}/{k}.png")
            (folder / f"c{clip}").mkdir(parents=True, exist_ok=True)
            picture(6 * clip + k).save(folder / files[-1])
    (folder / "c1/4.png").write_bytes(b"no picture")
    images = clips.frame_images(
        "frames", files, [1] * 18, lambda i: (folder / files[i]).read_bytes()
    )
    own = clips.Videos(
        "frames",
        ["c0", "c1", "c2"],
        [0, 1, 0],
        ["a", "b"],
        [""] * 3,
        np.arange(18).reshape(3, 6),
        1,
        images,
    )
    found = examine(own, tmp_path, {"train": np.arange(3)})["corrupt"]
    assert found.status == "FAIL" and found.value == "1 damaged of 3 clips" and "c1 (" in found.fix


def test_corrupt_by_name_reads_every_frame_and_says_how_many(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "LOOKED", 2)
    monkeypatch.setattr(inspection, "FRAMES", 6)
    names = [f"{video}/{k}.png" for video in ("real/a", "fake/b") for k in range(5)]
    root, packed = image_folder(tmp_path / "set", names), tmp_path / "set.packed"
    pack_main(["pack", "--clips", str(root), str(packed)])
    (root / "fake/b/3.png").write_bytes(b"no picture")
    damaged = bytearray(packed.read_bytes())
    damaged[-packed.stat().st_size // 2] ^= 1
    packed.write_bytes(damaged)
    for path, name in ((root, "fake/b/3.png: cannot identify"), (packed, "is damaged at image")):
        videos = faceforensics.open_videos(str(path), workers=1)
        seen = inspection.inspect(videos, {"train": np.arange(2)}, 1)
        found = check_data.corrupt(inspection.read_all(seen, videos, 1), tmp_path)
        assert found.status == "FAIL" and name in found.fix
        assert found.value == "1 damaged of 2 clips, all 10 frames read"
    images = open_images(str(split_cells(tmp_path / "cells", count=20)))
    seen = inspection.inspect(images, sampling.split(images), 1)
    assert seen.of == "2 images, 20 in all"
    assert inspection.read_all(seen, images, 1).of == "20 images, all read"


def rows_of(texts=None, modalities=None, labels=None):
    count = len(texts) if texts else len(next(iter(modalities.values())))
    labels = np.arange(count) % 3 if labels is None else labels
    ids = [f"u{i}" for i in range(count)]
    table = utterances.Utterances(
        "x", ids, labels, list("abc"), [""] * count, texts=texts, modalities=modalities
    )
    given = dict(
        modalities or {"text": np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)}
    )

    class Rows(deep_cluster.Rows):
        def __init__(self):
            self.table, self.names, self.lengths = table, list(given), {}
            self.as_is = set() if modalities else {"text"}
            self.inputs = {name: torch.from_numpy(x) for name, x in given.items()}

    return Rows()


SPLITS = {"train": np.arange(200), "test": np.arange(200, 300)}


def test_short_texts_recur_and_long_ones_do_not(tmp_path):
    words = ["you", "are", "the", "one", "who", "ended", "it", "last", "year"]
    texts = [f"number {i} says that {' '.join(words[i % 4 :])} and {i * i}" for i in range(300)]
    texts[3] = texts[210] = "No way!"
    found = check_data.examine(rows_of(texts), SPLITS, tmp_path, 1, False)
    assert found["duplicates"].status == "PASS"
    for i in range(5):
        texts[205 + i] = texts[5 + i].upper() + "!"  # said again, written otherwise
    found = check_data.examine(rows_of(texts), SPLITS, tmp_path, 1, False)
    assert found["duplicates"].status == "FAIL" and "5 exact" in found["duplicates"].value
    assert "u5 (train)" in found["duplicates"].fix


def test_rows_of_features_have_their_own_findings(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    x = rng.normal(size=(300, 16)).astype(np.float32) + 3 * np.eye(3, 16, dtype=np.float32)[labels]
    found = check_data.examine(rows_of(modalities={"text": x}), SPLITS, tmp_path, 1, False)
    assert [item.status for item in found.values()] == ["PASS"] * 5
    x[250:254] = x[10:14]
    x[260:262] = x[20:22] * 1.0001
    x[100] = 0
    x[50] *= 1000
    found = check_data.examine(rows_of(modalities={"text": x}), SPLITS, tmp_path, 1, False)
    assert found["duplicates"].status == "FAIL"
    assert found["duplicates"].value.startswith("4 exact and 2 near across splits")
    assert found["corrupt"].status == "WARN" and "u100" in found["corrupt"].fix
    assert found["outliers"].status == "WARN" and found["outliers"].rows[1][:2] == [
        "u50",
        "norm of text",
    ]
    assert found["label-noise"].status == "PASS"
    shuffled = rows_of(modalities={"text": x}, labels=rng.permutation(labels))
    found = check_data.examine(shuffled, SPLITS, tmp_path, 1, False)
    assert found["label-noise"].status == "WARN"  # clustering never reads a label


def test_a_folder_without_images_is_an_empty_class(tmp_path):
    copy = split_cells(tmp_path / "cells", count=40)
    images = open_images(str(copy))
    assert inspection.empty_folders(copy) == []
    (copy / "train" / "unseen").mkdir()
    (copy / "train" / ".cache").mkdir()
    assert inspection.empty_folders(copy) == ["train/unseen"]
    seen = inspection.inspect(images, sampling.split(images), 2)
    seen.empty = ["train/unseen"]
    found = check_data.result_of("imbalance", seen, tmp_path)
    assert found.status == "FAIL" and "train/unseen" in found.fix


@pytest.mark.e2e
def test_a_check_ends_with_the_damaged_file_and_trains_on_nothing(tmp_path, capsys):
    copy = split_cells(tmp_path / "cells", count=60)
    victim = sorted((copy / "train").rglob("*.png"))[3]
    victim.write_bytes(victim.read_bytes()[:300])
    argv = flags("--data", copy, "--backbone resnet18 --stem cifar --image-size 8 --bs 8")
    with pytest.raises(SystemExit) as ending:
        train_simclr.main(
            flags(argv, "--check corrupt,outliers,gradient --device cpu --out", tmp_path / "r")
        )
    assert ending.value.code == 4 and "--check: corrupt" in capsys.readouterr().err
    items = json.loads((tmp_path / "r" / "check.json").read_text())["items"]
    assert items[0]["value"] == "1 damaged of 60 images, all read"
    assert [item["status"] for item in items] == ["FAIL", "PASS", "SKIP"]
    assert (
        victim.name in items[0]["fix"]
        and victim.name in (tmp_path / "r" / "report.html").read_text()
    )
