"""The data protocol of the cytology experiment.

One folder of label folders becomes the sets A1, A2, B1 and B2.

| set | images | of | used for |
| --- | --- | --- | --- |
| A1 | 30,000 | the 20 largest other labels | pretraining, without labels |
| A2 | 3,000 | the 30 largest other labels, 100 each | the linear protocol, 70/15/15 |
| B1 | 15,000 | the target labels | fine-tuning, 15 % of it as dev |
| B2 | 7,000 | the target labels | the test of fine-tuning |

"Other" labels are those that are not targets and hold at least 20 images; equal sizes are ordered
by name. A2 thus has the 20 labels of A1 and the ten next ones: half its question is how well the
representation serves kinds of cells that pretraining never saw. Within a label, images are drawn in
the order of a hash of their names, so the sets do not depend on the file system or on chance, and a
larger set contains every smaller one. A2 draws first, at most half of what a label holds; A1 draws
from what is left, evenly: a label that holds less than its share leaves the rest to the larger
ones. The target labels give B1 and B2 in proportion to their sizes, each label the same share to
each. Where there are fewer images than the protocol asks for, the sets shrink and `notes` says so.
No image is in two sets.

With groups (see `common.data.groups`) the share that B2 has of the target labels is held out of all
labels first, in whole groups. What is held out gives B2 and three tenths of A2, its dev and test;
the rest gives A1, the training part of A2, and B1.
"""

import shlex
from pathlib import Path

import numpy as np

from common.data.images import UNLABELED, Images
from common.data.sampling import (
    FINETUNE_DEV_SHARE,
    TEST_SHARE,
    even_shares,
    hash_order,
    hold_out,
    say_lost,
)
from common.errors import InputError, first_few, plural
from common.live import digits
from common.run import checkpoint
from common.run.files import read_json, run_dir_of, write_json

TARGETS = "ASC_H,ASC_US,HSIL,LSIL,SCC"
SIZES = {"A1": 30_000, "A2": 3_000, "B1": 15_000, "B2": 7_000}
NUM_LABELS = {"A1": 20, "A2": 30}
# Its runs: what pretraining makes of the backbone, the batch, the amount of data and the
# projection.
CELLS = [
    dict(backbone=backbone, bs=bs, fraction=fraction, proj_dim=proj_dim)
    for backbone in ("resnet50", "resnet101", "inception_v3", "inception_resnet_v2")
    for bs in (64, 128, 256)
    for fraction in (1.0, 0.7, 0.4)
    for proj_dim in (32, 64, 128)
]
# The projection that the published experiment went on with, by backbone.
RECIPE_CHOICE = {"resnet50": 64, "resnet101": 128, "inception_v3": 128, "inception_resnet_v2": 128}
TOO_SMALL = 20  # images: such a label can neither be learned from nor judged


def target_labels(text: str) -> list[str]:
    """The label names in `text`, separated by commas.

    Raises:
        InputError: fewer than two, or one of them twice.
    """
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(
            f"--target-labels received {text!r}, allowed two or more different labels as {TARGETS}"
        )
    return names


def draw(
    images: Images, targets: list[str], tested: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The sets A1, A2, B1, B2 as sorted indices, and notes on what is smaller than asked for.

    Args:
        tested: (n,) bool, the images of the groups that are held out; None without groups.

    Raises:
        InputError: a target label is not in the data, or a set would be empty.
    """
    missing = [name for name in targets if name not in images.classes]
    if missing:
        raise InputError(
            f"{images.name} has no label {missing[0]!r}; it has"
            f" {', '.join(images.classes) or 'none'}."
            " Name the labels to fine-tune on with --target-labels"
        )
    members = {
        name: np.array(
            hash_order(images.ids, np.flatnonzero(images.labels == k), "protocol"),
            np.int64,
        )
        for k, name in enumerate(images.classes)
    }
    counts = {name: len(rows) for name, rows in members.items()}
    others = sorted(
        (name for name in counts if name not in targets and counts[name] >= TOO_SMALL),
        key=lambda name: (-counts[name], name),
    )
    splits = sorted({str(name) for name in images.splits if name})
    notes = [f"the data's own splits ({', '.join(splits)}) are not used"] if splits else []
    each = SIZES["A2"] // NUM_LABELS["A2"]
    taken = {name: min(each, counts[name] // 2) for name in others[: NUM_LABELS["A2"]]}
    if tested is not None:
        for name, most in taken.items():
            held, trained = _sides(members[name], tested)
            held = held[: round(2 * TEST_SHARE * most)]
            members[name] = np.concatenate([held, trained])
            taken[name] = len(held) + min(most - len(held), len(trained) // 2)
    pool = {name: members[name][taken[name] :] for name in others[: NUM_LABELS["A1"]]}
    share = even_shares(SIZES["A1"], {name: len(rows) for name, rows in pool.items()})
    total = sum(counts[name] for name in targets)
    wanted = {
        part: min(SIZES[part], total * SIZES[part] // (SIZES["B1"] + SIZES["B2"]))
        for part in ("B1", "B2")
    }
    holds = {name: counts[name] for name in targets}
    if tested is not None:
        holds = {name: int(tested[members[name]].sum()) for name in targets}
    b2 = _proportional(min(wanted["B2"], sum(holds.values())), holds)
    if tested is not None:
        for name in targets:
            held, trained = _sides(members[name], tested)
            members[name] = np.concatenate([held[: b2[name]], trained])
    holds = {name: len(members[name]) - b2[name] for name in targets}
    b1 = _proportional(min(wanted["B1"], sum(holds.values())), holds)
    drawn = {
        "A1": [rows[: share[name]] for name, rows in pool.items()],
        "A2": [members[name][:count] for name, count in taken.items()],
        "B1": [members[name][b2[name] : b2[name] + b1[name]] for name in targets],
        "B2": [members[name][: b2[name]] for name in targets],
    }
    nothing = np.empty(0, np.int64)
    sets = {
        part: np.sort(np.concatenate([*rows, nothing])).astype(np.int64)
        for part, rows in drawn.items()
    }
    for part, rows in sets.items():
        if not len(rows):
            raise InputError(
                f"{images.name}: {part} would be empty; --protocol cytology needs labels besides"
                " the targets" + (", each in several groups" if tested is not None else "")
            )
    for part, most in NUM_LABELS.items():
        if len(others) < most:
            notes.append(
                f"{part} has {plural(len(others), 'label')} instead of {most}:"
                f" no more hold {TOO_SMALL} images"
            )
    if len(others) == 1:
        notes.append(
            "A2 has a single label, so that the linear layer has nothing to tell apart: its"
            " accuracy of 1 says nothing"
        )
    few = [name for name, count in taken.items() if count < each]
    if few:
        notes.append(
            f"A2 takes fewer than {each} images of {len(few)} labels,"
            f" half of what each holds: {first_few(few, 5)}"
        )
    for part, most in SIZES.items():
        if len(sets[part]) < most:
            notes.append(f"{part} has {len(sets[part]):,} images instead of {most:,}")
    return sets, notes


def _sides(rows: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows[tested[rows]], rows[~tested[rows]]


def _proportional(total: int, holds: dict[str, int]) -> dict[str, int]:
    # Largest remainders: the parts add up to `total` and none is larger than what is held.
    exact = {name: total * count / max(sum(holds.values()), 1) for name, count in holds.items()}
    share = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(holds, key=lambda name: (share[name] - exact[name], name))
    for name in by_remainder[: total - sum(share.values())]:
        share[name] += 1
    return share


def protocol(
    images: Images, targets: list[str], fraction: float, stored: list[str | Path], say=print
):
    """The parts of `sampling.split` for this protocol, and the classes of the labeled stages.

    The sets come from the first of the runs and checkpoints `stored` that has any, so that a run
    keeps its sets when images are added to the data, and a later stage never tests on what an
    earlier one was trained on; else they are drawn.

    Returns:
        (parts, classes, sets): index arrays by part name; {"linear": [...], "finetune": [...]};
        what `save` writes.

    Raises:
        InputError: the stored sets are of other target labels or groups, or name images that the
            data no longer has.
    """
    ids = images.ids
    labels = images.labels
    groups = images.groups
    file, record = next(filter(all, map(_stored_sets, stored)), (None, None))
    tested = None
    if file is None:
        drawn_groups = {}
        if groups is not None:
            share = SIZES["B2"] / (SIZES["B1"] + SIZES["B2"])
            labeled = np.flatnonzero(labels != UNLABELED)
            held = hold_out(ids, labels, labeled, share, "protocol", groups)
            drawn_groups["test_groups"] = sorted(set(groups[held]))
            tested = _in_groups(images, drawn_groups)
        rows, notes = draw(images, targets, tested)
        names = {part: [ids[i] for i in indices] for part, indices in rows.items()}
        record = {"target_labels": targets, "notes": notes, "sets": names} | drawn_groups
    else:
        rows = _stored_rows(file, record, images, targets)
        tested = _in_groups(images, record)
        trained = np.concatenate([rows["A1"], rows["B1"]])
        same = ("test_groups" in record) == (groups is not None)
        if tested is not None:
            same = same and tested[rows["B2"]].all() and not tested[trained].any()
        if not same:
            raise InputError(
                f"{file} was drawn with other groups, or with none: give the same --group-by"
            )
    for note in record.get("notes", []):
        say(f"protocol: {note}")
    sizes = ", ".join(f"{part} {len(indices):,}" for part, indices in rows.items())
    say(f"protocol: {sizes} images; " + (f"the sets of {file}" if file else "drawn by their names"))
    if tested is None:
        dev_share = TEST_SHARE / (1 - TEST_SHARE)
        test = hold_out(ids, labels, rows["A2"], TEST_SHARE, "test")
        rest = np.setdiff1d(rows["A2"], test)
        dev = hold_out(ids, labels, rest, dev_share, "dev")
    else:
        held, _ = _sides(rows["A2"], tested)
        test = hold_out(ids, labels, held, 0.5, "test", groups)
        rest = np.setdiff1d(rows["A2"], test)
        dev = np.setdiff1d(held, test)
        say_lost(images, rows["A2"], {"dev": dev, "test": test}, say)
    finetune_dev = hold_out(ids, labels, rows["B1"], FINETUNE_DEV_SHARE, "dev", groups)
    if tested is not None:
        held_out = {"finetune_dev": finetune_dev, "finetune_test": rows["B2"]}
        say_lost(images, rows["B1"], held_out, say)
    parts = {
        "rest": rows["A1"],
        "pretrain": hold_out(ids, labels, rows["A1"], fraction, "fraction"),
        "train": np.setdiff1d(rest, dev),
        "dev": dev,
        "test": test,
        "finetune_train": np.setdiff1d(rows["B1"], finetune_dev),
        "finetune_dev": finetune_dev,
        "finetune_test": rows["B2"],
    }
    classes = {
        stage: sorted({images.classes[k] for k in labels[rows[part]]})
        for stage, part in (("linear", "A2"), ("finetune", "B1"))
    }
    return parts, classes, record


def _in_groups(images: Images, record: dict) -> np.ndarray | None:
    # (n,) bool, the images in the record's groups; None where either has none.
    if images.groups is None or "test_groups" not in record:
        return None
    names = set(record["test_groups"])
    return np.array([group in names for group in images.groups], bool)


def _stored_sets(source: str | Path) -> tuple[Path, dict | None]:
    # What `save` wrote, in a checkpoint or in the run directory; and where that was.
    path = Path(source)
    if path.is_file() and "split" in (held := checkpoint.load(path)):
        return path, held["split"]
    file = run_dir_of(source) / "split.json"
    sets = {name: [str] for name in SIZES}
    groups = {"test_groups": [str]}
    return file, read_json(file, {"target_labels": [str], "notes": [str], "sets": sets, **groups})


def _stored_rows(
    file: Path, record: dict, images: Images, targets: list[str]
) -> dict[str, np.ndarray]:
    if not {"target_labels", "sets"} <= record.keys() or record["sets"].keys() != SIZES.keys():
        raise InputError(f"{file} holds no target labels or not the sets {', '.join(SIZES)}")
    if record["target_labels"] != targets:
        raise InputError(
            f"{file} is of the target labels {_listed(record['target_labels'])}, this command's are"
            f" {_listed(targets)}: give --protocol cytology --target-labels"
            f" {','.join(record['target_labels'])}"
        )
    number = {name: i for i, name in enumerate(images.ids)}
    gone = [name for names in record["sets"].values() for name in names if name not in number]
    if gone:
        raise InputError(
            f"{file} names {gone[0]}, which {images.name} does not have:"
            " use the data it was made from"
        )
    return {
        part: np.sort(np.array([number[name] for name in names], np.int64))
        for part, names in record["sets"].items()
    }


def check_start(
    source: str, model_spec: dict, targets: list[str] | None, group_by: str | None, images: Images
) -> None:
    """Refuse to start from a run that saw other sets of the same images.

    What it was trained on could be what this one is tested on.

    Args:
        source: what --from names.
        model_spec: of that run.
        targets: the target labels of this run; None without the protocol.
        group_by: its --group-by.

    Raises:
        InputError: it did.
    """
    if not model_spec:
        return
    before = checkpoint.config_of(source)
    if before.get("identity", {}).get("data") != images.fingerprint:
        return
    may = "it may have been trained on what this one tests on. Give the same"
    if model_spec.get("targets", targets) != targets:
        raise InputError(
            f"--from {source} has the protocol's target labels {_listed(model_spec['targets'])},"
            f" this command {_listed(targets)}: {may} --protocol and --target-labels"
        )
    if before.get("group_by") != group_by:
        raise InputError(
            f"--from {source} has --group-by {before.get('group_by')}, this command {group_by}:"
            f" {may} --group-by"
        )


def _listed(names: list[str] | None) -> str:
    return "none" if names is None else ", ".join(names)


def save(folder: Path, record: dict) -> None:
    """Write split.json: the target labels, the notes, and the names of the images of every set."""
    write_json(folder / "split.json", record)


def select_run(runs: list[dict], value: str = "pretrain/train/loss") -> str:
    """Per backbone the SimCLR run of the largest batch and, among those, of the lowest `value`.

    This is the experiment's rule. Where its authors went on with another projection, that is said.

    Args:
        runs: what `common.report.tables.read_runs` gives: flags, settings and summary of each.
        value: a metric.

    Raises:
        InputError: no finished run has `value`.
    """
    finished = [
        run
        for run in runs
        if run["status"] == "finished" and run.get("script") == "simclr" and value in run
    ]
    if not finished:
        raise InputError(
            f"no finished run has {value}: run `python train_simclr.py --grid-index K` first"
        )
    lines = []
    for backbone in sorted({run["backbone"] for run in finished}):
        candidates = [run for run in finished if run["backbone"] == backbone]
        best = min(candidates, key=lambda run: (-run["bs"], run[value], run["run"]))
        settings = ", ".join(f"{name} {best[name]:g}" for name in ("proj_dim", "bs", "fraction"))
        text = f"{backbone}: {settings}, {value} {digits(best[value])}"
        published = RECIPE_CHOICE.get(backbone, best["proj_dim"])
        if published != best["proj_dim"]:
            text += f" (the published experiment went on with projection {published})"
        command = ["python", "train_simclr.py", "--stage", "linear", "--data", best["data"]]
        if best["targets"] is not None:  # flags of the protocol are refused without it
            command += ["--protocol", best["protocol"], "--target-labels", best["target_labels"]]
        for name in ("group_by", "store_size", "on_bad_item"):  # whose parts and pixels are its own
            if name in best["identity"]:
                command += [f"--{name.replace('_', '-')}", str(best[name])]
        lines.append(text)
        lines.append("  " + shlex.join([*command, "--from", best["run"]]))
    return "\n".join(lines)
