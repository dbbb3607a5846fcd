"""`python -m common.export`: the program gives what --predict gives, without this repository."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common import export
from common.data import faceforensics, raer
from common.data.open import open_images
from common.models import clip
from common.models.raer import build_raer
from common.run import checkpoint
from tests.data import cells_tree, ffpp_tree, raer_tree, read_pixels
from tests.runs import flags, refused

pytestmark = pytest.mark.e2e

# What a user has: torch, the program, pixels. A batch of 1, then one of 3.
USE = """
import json, sys
import numpy as np, torch
facts = {"run.json": ""}
program = torch.export.load("p.pt2", extra_files=facts).module()
with np.load("in.npz") as stored:
    names = [one["name"] for one in json.loads(facts["run.json"])["inputs"]]
    pixels = [torch.from_numpy(stored[name]) for name in names]
rows = [program(*(part[cut] for part in pixels)) for cut in (slice(0, 1), slice(1, 4))]
np.save("out.npy", torch.cat(rows).numpy())
open("facts.json", "w").write(facts["run.json"])
assert not {"common", "kernels", "train_simclr", "train_tsm", "train_raer"} & set(sys.modules)
"""


def exported(run, folder, **pixels) -> tuple[np.ndarray, dict]:
    """The outputs of the program for four items, computed in a process of its own; its facts."""
    assert export.main([str(run), str(folder / "p.pt2")]) == 0
    np.savez(folder / "in.npz", **{name: part.numpy() for name, part in pixels.items()})
    done = subprocess.run([sys.executable, "-I", "-c", USE], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "out.npy"), json.loads((folder / "facts.json").read_text())


def predicted(main, data, run, folder, *more) -> tuple[list[str], list[str], np.ndarray]:
    """The classes, ids and scores in predictions.csv."""
    use = flags("--predict", data, "--resume", run, "--out", folder, "--device cpu", *more)
    assert main(use) == 0
    head, *rows = csv.reader((folder / "predictions.csv").read_text().splitlines())
    classes = [name.removeprefix("score_") for name in head[2:]]
    return classes, [row[0] for row in rows], np.array([row[2:] for row in rows], float)


def equal(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert np.ptp(wanted, axis=0).max() > 1e-4  # the items differ, so that their order shows


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return cells_tree(tmp_path_factory.mktemp("data") / "cells", per_class=12)


@pytest.fixture(scope="module")
def simclr(cells, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simclr") / "run"
    argv = flags(
        "--backbone resnet18 --stem cifar --image-size 8 --device cpu",
        "--stage all --bs 8 --epochs 1 --features stages",
        "--finetune-bs 8 --finetune-epochs 2",
        *("--data", cells, "--out", folder),
    )
    assert train_simclr.main(argv) == 0
    return folder


@pytest.mark.parametrize("stage", ["linear", "finetune"])
def test_a_classifier_of_images_gives_the_scores_of_predict(simclr, cells, tmp_path, stage):
    images = open_images(str(cells))
    pixels = read_pixels(images, [0, 13, 14, 30])  # 16 px, which the program makes 8
    classes, ids, scores = predicted(train_simclr.main, cells, simclr / stage, tmp_path)
    rows, facts = exported(simclr / stage, tmp_path, images=pixels)
    equal(rows, scores[[0, 13, 14, 30]])
    assert (facts["classes"], facts["stage"], facts["image_size"]) == (classes, stage, 8)
    assert facts["inputs"][0]["shape"] == ["n", 3, "height", "width"]


def test_a_backbone_gives_the_stored_features(simclr, cells, tmp_path):
    pixels = read_pixels(open_images(str(cells)), [5, 0, 20, 35])
    rows, facts = exported(simclr / "pretrain" / "best.pt", tmp_path, images=pixels)
    with np.load(simclr / "features.npz") as stored:
        wanted = stored["features"][[5, 0, 20, 35]]
    scale = np.abs(wanted).max()
    equal(rows / scale, wanted / scale)
    assert facts["classes"] is None and facts["output"].startswith("features")


@pytest.mark.parametrize("shift", ["residual", "expand"])
def test_a_model_of_clips_gives_the_scores_of_predict(tmp_path, shift):
    data, run = ffpp_tree(tmp_path / "ffpp"), tmp_path / "run"
    argv = flags(
        "--backbone conv_small_035 --image-size 32 --n-segment 4 --device cpu --bs 8 --epochs 1",
        *("--eval-every 1 --shift", shift, "--data", data, "--out", run),
    )
    assert train_tsm.main(argv) == 0
    classes, ids, scores = predicted(train_tsm.main, data, run, tmp_path, "--clips 1")
    videos = faceforensics.prepare(
        str(data), compression=None, labels=False, say=len, store_size=None, on_bad_item="error",
        workers=1, fps=25.0,
    )  # fmt: skip
    four = np.array([0, 9, 20, 40])
    frames = videos.eval_clips(four, 4, 2.0, 1)[:, 0]
    (pixels,) = videos.batches([(four, frames)], 1)
    data.rename(tmp_path / "elsewhere")  # a program is made without them
    rows, facts = exported(run, tmp_path, clips=pixels)
    equal(rows, scores[[ids.index(videos.ids[i]) for i in four]])
    state = checkpoint.load(run / "best.pt")
    assert facts["threshold"] == state["metrics"]["train/val/threshold"]
    assert facts["classes"] == classes == ["real", "fake"] and facts["inputs"][0]["shape"][1] == 4


@pytest.fixture(scope="module")
def emotions(tmp_path_factory):
    """A tree of clips and a run on them."""
    folder = tmp_path_factory.mktemp("raer")
    tree = raer_tree(folder / "raer")
    argv = flags("--backbone vit_tiny --device cpu --num-frames 3 --bs 8 --epochs 1 --tune full")
    assert train_raer.main(flags(argv, "--data", tree, "--out", folder / "run")) == 0
    return tree, folder / "run"


# Models whose answers come another way: what differs in the model_spec.
WAYS = {
    "as trained": {},
    "frozen tower": {"tune": "none"},
    "post-hoc": {"method": "post-hoc"},
    "tau-norm": {"method": "tau-norm", "scale": None},
    "prompts": {
        "backbone": "vit_b_32", "image_size": 16, "activation": "quick_gelu", "num_context": 2,
        "tokens": [[5, 7, 8, 11], [5, 9, 11, 0], [5, 6, 11, 0]],
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_model_of_two_streams_gives_the_scores_of_predict(emotions, tmp_path, monkeypatch, way):
    tree, run = emotions
    small = clip.Variant(16, 2, 2, 8, 24, text_width=16, text_layers=2, text_heads=2)
    monkeypatch.setitem(clip.VARIANTS, "vit_b_32", small)
    state = checkpoint.load(run / "best.pt")
    state["model_spec"] |= WAYS[way]
    state["metrics"]["train/val/tau"] = 0.7
    torch.manual_seed(0)  # fresh weights: after one epoch all clips look alike
    state["model"] = build_raer(state["model_spec"], 0.0).state_dict()
    source = tmp_path / "m.pt"
    checkpoint.save(source, state)
    classes, ids, scores = predicted(train_raer.main, tree, source, tmp_path)
    clips = raer.prepare(
        str(tree), store_size=None, on_bad_item="error", workers=1, missing_box="error", margin=0.1,
        labels=False, say=len,
    )  # fmt: skip
    four = np.array([0, 11, 20, 30])
    (pixels,) = clips.batches([(four, clips.eval_frames(four, 3))], 1)
    rows, facts = exported(source, tmp_path, faces=pixels[0], contexts=pixels[1])
    equal(rows, scores[[ids.index(clips.ids[i]) for i in four]])
    assert facts["classes"] == classes and facts["tau"] == 0.7
    if way == "prompts":  # the text tower has done its work
        program = torch.export.load(tmp_path / "p.pt2")
        assert not [name for name in program.state_dict if "tower" in name]


def test_what_cannot_be_exported_is_refused(simclr, emotions, tmp_path, capsys):
    out = tmp_path / "p.pt2"
    best = simclr / "finetune" / "best.pt"
    refused(export.main, [str(best), str(tmp_path / "p.pt")], capsys, "p.pt", ".pt2")
    refused(export.main, [str(best), str(tmp_path / "no" / "p.pt2")], capsys, tmp_path / "no")
    refused(export.main, [str(tmp_path / "nowhere"), str(out)], capsys, "nowhere")
    refused(export.main, [str(simclr / "backbone.pt"), str(out)], capsys, "backbone.pt")
    pixels = simclr / "linear_pixels" / "best.pt"
    refused(export.main, [str(pixels), str(out)], capsys, "raw pixels")
    state = checkpoint.load(emotions[1] / "best.pt")
    early = tmp_path / "early.pt"
    checkpoint.save(early, state | {"metrics": {}})
    refused(export.main, [str(early), str(out)], capsys, "validation")
    for script, words in (("cluster", "train_cluster.py"), ("none", "train_none"), ("a.b", "a.b")):
        state["model_spec"]["script"] = script
        checkpoint.save(tmp_path / "other.pt", state)
        refused(export.main, [str(tmp_path / "other.pt"), str(out)], capsys, words)
    assert not out.exists() and not hasattr(train_cluster, "export_spec")


def test_only_a_program_is_written_over(simclr, tmp_path, capsys):
    out = tmp_path / "p.pt2"
    torch.save({"w": torch.zeros(2)}, out)
    before = out.read_bytes()
    refused(export.main, [str(simclr), str(out)], capsys, out)
    assert out.read_bytes() == before
    out.unlink()
    for _ in range(2):
        assert export.main([str(simclr), str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 8 and json.loads(said[0].removeprefix(f"{out}: "))["stage"] == "finetune"
    images = torch.zeros(2, 3, 20, 30, dtype=torch.uint8)
    names = {"torch": torch, "images": images}
    exec("\n".join(said[1:4]), names)  # the three lines work as they are printed
    assert names["output"].shape == (2, 3) and json.loads(names["facts"]["run.json"])["classes"]
    assert [file.name for file in tmp_path.iterdir()] == ["p.pt2"]
