"""The cytology protocol: every rule of its sets, on trees of 49 labels."""

import json

import numpy as np
import pytest
import torch

from common.data import cytology
from common.data.images import Images
from common.errors import InputError
from common.run import checkpoint

TARGETS = cytology.TARGETS.split(",")


def tree(counts: dict[str, int]) -> Images:
    """Images with labels of these sizes; their pixels do not matter here."""
    ids = [f"{name}/{i:05d}.png" for name, count in counts.items() for i in range(count)]
    classes = sorted(counts)
    labels = [classes.index(name.split("/")[0]) for name in ids]
    return Images(
        "tree", ids, labels, classes, [""] * len(ids), pixels=torch.zeros(len(ids), 3, 1, 1).byte()
    )


def sizes(images, rows):
    return {name: int((images.labels[rows] == k).sum()) for k, name in enumerate(images.classes)}


@pytest.fixture(scope="module")
def full():
    """5 targets with 25,000 images and 44 other labels from 3,000 images down to 420."""
    counts = {name: 3000 + 1000 * k for k, name in enumerate(TARGETS)}
    counts |= {f"label{k:02d}": 3000 - 60 * k for k in range(44)}
    return tree(counts)


def test_the_sets_have_the_protocols_sizes_and_labels(full):
    sets, notes = cytology.draw(full, TARGETS)
    assert {part: len(rows) for part, rows in sets.items()} == {
        "A1": 30_000,
        "A2": 3_000,
        "B1": 15_000,
        "B2": 7_000,
    }
    assert notes == []
    largest = [f"label{k:02d}" for k in range(44)]
    a1, a2, b1, b2 = (sizes(full, sets[part]) for part in ("A1", "A2", "B1", "B2"))
    assert {n for n, c in a1.items() if c} == set(largest[:20]) and {
        a1[n] for n in largest[:20]
    } == {1500}
    assert {n for n, c in a2.items() if c} == set(largest[:30]) and {
        a2[n] for n in largest[:30]
    } == {100}
    total = {name: 3000 + 1000 * k for k, name in enumerate(TARGETS)}
    for part, size in ((b1, 15_000), (b2, 7_000)):
        assert {n for n, c in part.items() if c} == set(TARGETS)
        assert all(abs(part[n] - size * total[n] / 25_000) <= 1 for n in TARGETS)


def test_no_image_is_in_two_sets_or_in_two_parts(full):
    sets, _ = cytology.draw(full, TARGETS)
    everything = np.concatenate(list(sets.values()))
    assert len(np.unique(everything)) == len(everything)
    parts, classes, record = cytology.protocol(full, TARGETS, 0.7, [], lambda text: None)
    leaves = ("pretrain", "train", "dev", "test", "finetune_train", "finetune_dev", "finetune_test")
    joined = np.concatenate([parts[name] for name in leaves])
    assert len(np.unique(joined)) == len(joined)
    assert [len(parts[name]) for name in leaves] == [21_000, 2_100, 450, 450, 12_750, 2_250, 7_000]
    assert classes["finetune"] == sorted(TARGETS) and len(classes["linear"]) == 30
    assert set(np.bincount(full.labels[parts["test"]])) == {0, 15}  # stratified


def test_shares_of_a1_are_nested_and_stratified(full):
    shares = [
        cytology.protocol(full, TARGETS, f, [], lambda text: None)[0]["pretrain"]
        for f in (0.4, 0.7, 1.0)
    ]
    assert [len(rows) for rows in shares] == [12_000, 21_000, 30_000]
    assert set(shares[0]) < set(shares[1]) < set(shares[2])
    assert set(sizes(full, shares[0]).values()) == {0, 600}


def test_the_draw_depends_on_names_alone():
    counts = dict.fromkeys(TARGETS, 40) | {f"label{k:02d}": 60 + k for k in range(44)}
    images = tree(counts)
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = Images(
        "other",
        [images.ids[i] for i in order],
        images.labels[order],
        images.classes,
        [""] * len(order),
        pixels=torch.zeros(len(order), 3, 1, 1).byte(),
    )
    ours, theirs = (cytology.draw(x, TARGETS)[0] for x in (images, shuffled))
    for part in ours:
        assert {images.ids[i] for i in ours[part]} == {shuffled.ids[i] for i in theirs[part]}


def test_sets_shrink_and_say_so():
    counts = (
        dict.fromkeys(TARGETS, 44) | {f"label{k:02d}": 30 + 5 * k for k in range(12)} | {"rare": 19}
    )
    images = tree(counts)
    sets, notes = cytology.draw(images, TARGETS)
    a1, a2 = (sizes(images, sets[part]) for part in ("A1", "A2"))
    assert a2["label00"] == 15 and a1["label00"] == 15  # half of 30 each
    assert a2["rare"] == a1["rare"] == 0  # too small
    assert all(
        a1[f"label{k:02d}"] + a2[f"label{k:02d}"] == 30 + 5 * k for k in range(12)
    )  # all are used
    assert len(sets["B1"]) == 150 and len(sets["B2"]) == 70
    text = " ".join(notes)
    assert "A1 has 12 labels instead of 20" in text and "A2 has 12 labels instead of 30" in text
    assert (
        "A1 has 348 images instead of 30,000" in text
        and "B2 has 70 images instead of 7,000" in text
    )
    assert "half of what each holds: label" in text and "single label" not in text
    _, notes = cytology.draw(tree(dict.fromkeys(TARGETS, 44) | {"one": 60}), TARGETS)
    assert "A2 has 1 label instead of 30" in " ".join(notes)
    assert any(note.startswith("A2 has a single label, so that the linear") for note in notes)


def test_what_a_small_label_cannot_give_comes_from_the_larger_ones(monkeypatch):
    monkeypatch.setattr(cytology, "SIZES", cytology.SIZES | {"A1": 300, "A2": 30})
    counts = dict.fromkeys(TARGETS, 50) | {"small": 21, "middle": 120, "large": 400}
    images = tree(counts)
    a1 = sizes(images, cytology.draw(images, TARGETS)[0]["A1"])
    assert [a1[name] for name in ("small", "middle", "large")] == [20, 119, 161]


def test_a_stored_split_is_reused_and_checked(tmp_path):
    counts = dict.fromkeys(TARGETS, 40) | {f"label{k:02d}": 60 + k for k in range(44)}
    images, lines = tree(counts), []
    parts, _, record = cytology.protocol(images, TARGETS, 1.0, [tmp_path], lines.append)
    assert "drawn by their names" in lines[-1]
    cytology.save(tmp_path, record)
    assert set(json.loads((tmp_path / "split.json").read_text())["sets"]) == {
        "A1",
        "A2",
        "B1",
        "B2",
    }
    # More images would make another draw; the stored one stands.
    grown = tree({name: count + 30 for name, count in counts.items()})
    checkpoint.save(tmp_path / "m.pt", {"split": record})  # a checkpoint alone holds it, too
    alone, _, _ = cytology.protocol(images, TARGETS, 1.0, [tmp_path / "m.pt"], lines.append)
    assert f"the sets of {tmp_path / 'm.pt'}" in lines[-1]
    assert all(np.array_equal(alone[part], parts[part]) for part in parts)
    again, _, _ = cytology.protocol(
        grown, TARGETS, 1.0, [tmp_path / "absent", tmp_path], lines.append
    )
    for name in parts:
        assert {images.ids[i] for i in parts[name]} == {grown.ids[i] for i in again[name]}
    assert str(tmp_path / "split.json") in lines[-1]
    with pytest.raises(InputError, match="is of the target labels ASC_H"):
        cytology.protocol(images, ["label00"], 1.0, [tmp_path], lines.append)
    with pytest.raises(InputError, match="which tree does not have"):
        fewer = tree({name: count - 1 for name, count in counts.items()})
        cytology.protocol(fewer, TARGETS, 1.0, [tmp_path], lines.append)


def test_wrong_targets_and_missing_sets_are_refused():
    images = tree({"ASC_H": 40, "other": 40})
    with pytest.raises(InputError, match="has no label 'ASC_US'; it has ASC_H, other"):
        cytology.draw(images, TARGETS)
    with pytest.raises(InputError, match="A1 would be empty"):
        cytology.draw(images, ["ASC_H", "other"])


def test_target_labels_are_two_or_more_different_ones():
    assert cytology.target_labels("HSIL, SCC") == ["HSIL", "SCC"]
    for text in ("HSIL", "HSIL,HSIL", "", "HSIL,,HSIL"):
        with pytest.raises(InputError, match="two or more different labels"):
            cytology.target_labels(text)


def grouped_tree(seed=0, persons=150):
    """Targets of 40 and 44 other labels of 60 images or more, of persons with many kinds each."""
    images = tree(dict.fromkeys(TARGETS, 400) | {f"label{k:02d}": 120 + k for k in range(44)})
    person = np.random.default_rng(seed).zipf(1.5, len(images)).clip(1, persons)
    images.groups = np.array([f"p{number}" for number in person], dtype=object)
    return images


def no_group_is_tested_and_trained_on(images, parts):
    sides = {name: set(images.groups[rows]) for name, rows in parts.items()}
    tested = sides["finetune_test"] | sides["test"] | sides["dev"]
    trained = sides["pretrain"] | sides["train"] | sides["finetune_train"] | sides["finetune_dev"]
    assert not tested & trained and not sides["dev"] & sides["test"]
    assert not sides["finetune_dev"] & sides["finetune_train"]


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_what_is_tested_are_not_trained_on(seed):
    images = grouped_tree(seed)
    parts, classes, record = cytology.protocol(images, TARGETS, 1.0, [], lambda text: None)
    no_group_is_tested_and_trained_on(images, parts)
    names = [name for names in record["sets"].values() for name in names]
    assert len(names) == len(set(names))
    sizes_of = {part: len(rows) for part, rows in record["sets"].items()}
    assert sizes_of["B2"] == pytest.approx(2000 * 7 / 22, rel=0.25)
    assert sizes_of["B1"] == pytest.approx(2000 * 15 / 22, rel=0.15)
    assert sizes_of["A1"] > 800 and sizes_of["A2"] > 1400 and len(classes["linear"]) == 30
    assert len(parts["test"]) + len(parts["dev"]) == pytest.approx(0.3 * sizes_of["A2"], rel=0.2)


def test_stored_sets_keep_their_groups_and_take_no_others(tmp_path):
    images, lines = grouped_tree(), []
    parts, _, record = cytology.protocol(images, TARGETS, 1.0, [], lines.append)
    cytology.save(tmp_path, record)
    again, _, _ = cytology.protocol(images, TARGETS, 1.0, [tmp_path], lines.append)
    assert all(np.array_equal(again[part], parts[part]) for part in parts)
    for groups in (None, grouped_tree(1).groups):
        images.groups = groups
        with pytest.raises(
            InputError, match=r"split\.json was drawn with other groups, or with no"
        ):
            cytology.protocol(images, TARGETS, 1.0, [tmp_path], lines.append)
    _, _, record = cytology.protocol(
        tree(dict.fromkeys(TARGETS, 400) | {"other": 60}), TARGETS, 1.0, [], lines.append
    )
    assert "test_groups" not in record


def test_a_target_label_that_groups_cost_a_part_is_named():
    counts = {"HSIL": 30, "SCC": 30, "x": 60, "y": 60}
    images, said = tree(counts), []
    number = [int(name[-9:-4]) for name in images.ids]
    alone = [name.startswith("SCC") for name in images.ids]
    images.groups = np.array([0 if k else i for k, i in zip(alone, number, strict=True)], object)
    parts, _, _ = cytology.protocol(images, ["HSIL", "SCC"], 1.0, [], said.append)
    lacking = {part for part in parts if not sizes(images, parts[part])["SCC"]}
    assert "finetune_train" not in lacking and {"finetune_dev", "finetune_test"} <= lacking
    warned = [line for line in said if line.startswith("WARN")]
    assert [line.split()[1] for line in warned] == ["finetune_dev", "finetune_test"]
    assert all("nothing of SCC: too few groups" in line for line in warned)


def test_groups_of_one_label_each_leave_nothing_to_test():
    images = tree(dict.fromkeys(TARGETS, 40) | {"other": 60})
    images.groups = np.array([name.split("/")[0] for name in images.ids], dtype=object)
    with pytest.raises(InputError, match="B2 would be empty; .* each in several groups"):
        cytology.protocol(images, TARGETS, 1.0, [], lambda text: None)
