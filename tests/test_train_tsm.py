"""Functions of train_tsm.py: accumulation, Grad-CAM, what is scored."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import train_tsm
from common.data import faceforensics
from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.errors import InputError
from common.run import dist, log
from common.run.loop import Batch
from common.run.run import Run
from tests.data import image_folder
from tests.runs import flags

NET = flags("--backbone conv_small_035 --image-size 32 --n-segment 4 --device cpu --workers 2")


def a_run(*argv, freeze_bn=None):
    """What a step needs, without data or a directory."""
    args, _ = train_tsm.parse_args([*NET, "--dropout", "0", *argv])
    args.freeze_bn = freeze_bn
    world = dist.Dist(0, 1, torch.device("cpu"))
    model_spec = {name: getattr(args, name) for name in train_tsm.MODEL_FLAGS} | {"image_size": 32}
    quiet = log.Log(None, main=False)
    model_spec |= {"pixels": [list(IMAGENET_MEAN), list(IMAGENET_STD)], "pos_weight": 0.2}
    return Run(args, world, None, {}, Path(), quiet, model_spec)


def test_grad_cam_compiles_nothing(monkeypatch):
    run = a_run("--clips", "1")
    run.data = type("Two", (), {"__len__": lambda _: 2})()
    run.data.labels, run.data.ids = np.array([0, 1]), ["a", "b"]
    pixels = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(pixels, np.arange(2), torch.tensor([0, 1]), None)
    monkeypatch.setattr(train_tsm, "fetch", lambda *_: iter([batch]))
    monkeypatch.setattr(run.log, "say", pytest.fail)
    shown = []
    monkeypatch.setattr(train_tsm.figures, "looked_at", lambda run, *rest: shown.append(rest))
    model = train_tsm.build_model(run).eval()
    for k in range(2):
        train_tsm.cam_gallery(run, model, np.arange(2), torch.tensor([[-1.0], [-2.0]]), 0.5)
        if k == 0:
            model.compile(backend="eager")
            before = counters["stats"]["unique_graphs"]
    (_, _, maps, shares), (titles, clips, again, _) = shown
    assert counters["stats"]["unique_graphs"] == before and torch.equal(maps, again)
    assert [title[:8] for title in titles] == ["right: a", "wrong: b"]
    assert maps.shape == (2, 4, 1, 1) and clips.equal(pixels) and shares.shape == (2, 4)


@pytest.mark.parametrize("shift", ["residual", "expand"])
@pytest.mark.parametrize("frozen", ["1", "0"])
def test_accumulation_equals_the_large_batch_where_batchnorm_is_frozen(shift, frozen, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch = Batch(pixels, np.arange(8), torch.tensor([0, 1, 1, 1, 1, 0, 1, 1]), None)
    frames_of, gradients = train_tsm.frames_of, []
    monkeypatch.setattr(train_tsm, "frames_of", lambda *given: frames_of(*given).double())
    for accum in ("1", "4"):
        run = a_run("--shift", shift, "--accum", accum, freeze_bn=float(frozen))
        model = train_tsm.build_model(run).double().train()
        with torch.no_grad():  # from zero a whole clip would weigh its frames alike
            model.head.attention.weight.normal_(generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = train_tsm.amp.scaler("fp32", run.world.device)
        step = train_tsm.train_step(run, model, optimizer, scaler, batch)
        assert not step.bad
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        gradients.append(trained | step.terms)
    gaps = {
        name: float((gradients[1][name] - value).abs().max() / value.abs().max().clamp_min(1e-12))
        for name, value in gradients[0].items()
    }
    # The criterion sees float32 logits: a script's losses are taken in single precision.
    assert (max(gaps.values()) < 1e-5) == (frozen == "1"), max(gaps, key=gaps.get)


def test_the_groups_of_a_run_part_its_own_data_alone(tmp_path):
    names = [f"{kind}/v{i}/0.png" for kind in ("real", "fake") for i in range(8)]
    root = image_folder(tmp_path / "other", names, width=32, height=32)
    videos = faceforensics.open_videos(str(root), workers=1)
    args = SimpleNamespace(eval="RUN", predict=None, split="test", group_by=r"(s\d+)_")
    chosen = train_tsm.scored_videos(args, videos, False, False, len)
    assert videos.labels[chosen].tolist() == [1, 0]
    with pytest.raises(InputError, match="16 of 16 videos without a group"):
        train_tsm.scored_videos(args, videos, True, False, len)
