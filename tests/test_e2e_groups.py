"""--group-by in all four scripts, as their users run them."""

import json
import re

import numpy as np
import pytest

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common import metrics
from common.run.run import Run
from tests.data import cells_tree, image_folder, numbered_raer, utterances_npz, write_clip
from tests.runs import flags, refused, summary

pytestmark = pytest.mark.e2e


def cells(root):
    """12 images of each of three classes, two of each class a patient."""
    folder = cells_tree(root / "cells", per_class=12)
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_name(f"p{int(path.stem) // 2}_{path.name}"))
    return folder


def split_cells(root):
    """The same in a split of their own, which the cytology protocol does not heed."""
    folder = cells_tree(root / "cells", per_class=24)
    for path in sorted(folder.rglob("*.png")):
        part = "test" if int(path.stem) % 4 == 3 else "train"
        target = folder / part / path.parent.name / f"p{int(path.stem) // 4}_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return folder


def videos(root):
    """Ten sources of a real and two fake videos each, whose names tell no person."""
    rng = np.random.default_rng(0)
    rows = ["video_id,label,path"]
    for source in range(10):
        for k in range(3):
            name = f"s{source}-{k}"
            write_clip(root / name, rng, 90 * (k > 0), count=2)
            rows.append(f"{name},{min(k, 1)},{name}")
    (root / "list.csv").write_text("\n".join(rows))
    return root


def clips(root):
    """Ten persons with a clip of each of the five classes, and one to test."""
    lines = [(f"c{label}/p{p}", label) for p in range(10) for label in range(1, 6)]
    tests = [(f"c{label}/p99", label) for label in range(1, 6)]
    return numbered_raer(root / "raer", {"train": lines, "test": tests}, length=1)


def dialogues(root):
    """160 utterances of 20 dialogues."""
    return utterances_npz(root / "acts.npz", id=np.array([f"d{i // 8}_u{i}" for i in range(160)]))


CASES = {  # script, flags, pattern, data, the held-out part beside test, metric
    "simclr": (
        train_simclr,
        "--backbone resnet18 --stem cifar --image-size 8 --bs 16 --epochs 1 --stage finetune"
        " --from none",
        r"/(p\d+)_",
        cells,
        "finetune_dev",
        "finetune/test/macro_f1",
    ),
    "protocol": (
        train_simclr,
        "--backbone resnet18 --stem cifar --image-size 8 --bs 8 --epochs 1 --stage finetune"
        " --from none --protocol cytology --target-labels round,long",
        r"/(p\d+)_",
        split_cells,
        "finetune_dev",
        "finetune/test/macro_f1",
    ),
    "tsm": (
        train_tsm,
        "--backbone conv_small_035 --image-size 32 --n-segment 2 --bs 8 --accum 1 --epochs 1"
        " --clips 1",
        r"(s\d+)-",
        videos,
        "val",
        "train/test/video_auc",
    ),
    "raer": (
        train_raer,
        "--backbone vit_tiny --num-frames 2 --bs 8 --epochs 1 --cache-features --method ce",
        r"(p\d+)$",
        clips,
        "val",
        "train/test/war",
    ),
    "cluster": (
        train_cluster,
        "--base-dim 16 --bs 32 --epochs 1 --cluster-bs 32 --cluster-epochs 1",
        r"^(d\d+)_",
        dialogues,
        None,
        "cluster/test/nmi",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_group_spans_the_parts_of_a_run_and_eval_finds_its_test_split(
    case, tmp_path, monkeypatch, capsys
):
    script, text, pattern, make, dev, metric = CASES[case]
    data = make(tmp_path)
    opened = []
    original = Run.open.__func__

    def spy(cls, *args, **options):
        opened.append(original(cls, *args, **options))
        return opened[-1]

    monkeypatch.setattr(Run, "open", classmethod(spy))
    drawn = []  # by the bootstrap of each interval
    numbers = metrics._unit_numbers
    monkeypatch.setattr(
        metrics, "_unit_numbers", lambda units, n: drawn.append(units) or numbers(units, n)
    )
    argv = flags(text, "--device cpu --data", data, "--group-by", pattern)
    assert script.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert re.search(r"\d+ groups of .* by --group-by", capsys.readouterr().out)
    (run,) = opened
    ids = getattr(run.data, "table", run.data).ids
    test = run.splits.get("finetune_test", run.splits["test"])
    train = run.splits.get("finetune_train", run.splits["train"])
    parts = [train, test] + ([run.splits[dev]] if dev else [])
    sides = [{re.search(pattern, ids[i])[1] for i in part} for part in parts]
    assert all(map(len, sides)) and len(set.union(*sides)) == sum(map(len, sides))
    assert script.main(flags("--eval", tmp_path / "run", "--device cpu")) == 0
    if case in ("simclr", "protocol", "raer"):  # of videos it is the persons in them
        assert drawn and all(set(units) in sides for units in drawn)
    (file,) = (tmp_path / "run").rglob("eval.json")
    result = json.loads(file.read_text())
    assert result[f"eval/{metric.split('/', 1)[1]}"] == pytest.approx(
        summary(tmp_path / "run")[metric], abs=1e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_a_group_by_that_cannot_be_used_is_one_line(case, tmp_path, capsys):
    script, text, pattern, make, *_ = CASES[case]
    out = flags("--device cpu --out", tmp_path / "run")
    refused(script.main, [*flags(text), *out, "--group-by", "("], capsys, "--group-by")
    argv = flags(text, out, "--data", make(tmp_path), "--group-by", pattern + "nowhere(x)")
    refused(script.main, argv, capsys, "--group-by", "nowhere")
    assert not (tmp_path / "run").exists()


def test_a_stage_from_a_run_needs_its_groups_and_a_table_serves_all_uses(tmp_path, capsys):
    root = image_folder(tmp_path / "set", [f"{i:02d}.png" for i in range(24)], width=16, height=16)
    table = root / "list.csv"
    rows = [f"{i:02d}.png,{'ab'[i % 2]},p{i // 2}" for i in range(24)]
    table.write_text("\n".join(["path,label,group", *rows]))
    net = "--backbone resnet18 --stem cifar --image-size 8 --device cpu --bs 8 --epochs 1"
    run, by_name = tmp_path / "run", tmp_path / "by_name"
    argv = flags(net, "--stage finetune --from none --data", table)
    assert train_simclr.main(flags(argv, "--out", run)) == 0
    assert "12 groups of 2 images by the column `group`" in capsys.readouterr().out
    assert train_simclr.main(flags("--eval", run, "--device cpu")) == 0
    assert train_simclr.main(flags("--predict", table, "--resume", run, "--device cpu")) == 0
    lines = (run / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"{i:02d}.png" for i in range(24)]
    refused(train_simclr.main, flags(argv, "--group-by (.)"), capsys, "--group-by", "list.csv")
    argv = flags(net, "--data", root, "--max-steps 1 --group-by (.)")
    with pytest.raises(SystemExit) as ending:
        train_simclr.main(flags(argv, "--out", by_name))
    assert ending.value.code == 0
    later = flags(net, "--stage finetune --from", by_name / "last.pt", "--data", root)
    refused(train_simclr.main, later, capsys, "--from", "--group-by (.), this command None")
    used = flags("--eval", run, "--device cpu --group-by (..)")
    refused(train_simclr.main, used, capsys, "--group-by has no effect with --eval")
