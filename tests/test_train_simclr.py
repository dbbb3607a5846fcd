"""Functions of train_simclr.py: views and accumulation."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train_simclr
from common.errors import InputError
from common.models import build_backbone
from common.run import dist
from common.run.loop import Batch

NET = ["--backbone", "resnet18", "--stem", "cifar", "--image-size", "8", "--device", "cpu"]


def test_accumulation_keeps_the_negatives_and_the_gradient():
    """With BatchNorm in evaluation mode a batch in four chunks gives the gradient of the batch in
    one (GradCache).
    """
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    batch = Batch(pixels, np.arange(8), None, 0)
    gradients = []
    for accum in (1, 4):
        args, _ = train_simclr.parse_args([*NET, "--accum", str(accum)])
        world = dist.Dist(0, 1, torch.device("cpu"))
        model_spec = {
            "backbone": "resnet18",
            "stem": "cifar",
            "image_size": 8,
            "proj_dim": 16,
            "classes": [],
        }
        run = train_simclr.Run(args, world, None, {}, Path(), None, model_spec)
        model = train_simclr.build_model(run, "pretrain").eval()

        class Optimizer(torch.optim.SGD):
            def step(self):
                pass

        optimizer = Optimizer(model.parameters(), lr=0.1)
        scaler = train_simclr.amp.scaler("fp32", world.device)
        step_of = train_simclr.train_step if accum == 1 else train_simclr.gradcache_step
        step = step_of(run, model, optimizer, scaler, batch)
        assert step.extra.shape == (16, 16) and not step.bad
        gradients.append(step.terms | {name: p.grad for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        scale = max(value.abs().max().item(), 1e-6)
        assert (gradients[1][name] - value).abs().max().item() <= 1e-4 * scale, name


def test_views_are_functions_of_seed_epoch_and_image():
    args, _ = train_simclr.parse_args([*NET, "--seed", "5"])
    run = train_simclr.Run(args, None, None, {}, Path(), None, {"image_size": 8})
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    ids = np.array([3, 1, 4, 5])
    views = train_simclr.two_views(run, Batch(pixels, ids, None, 2))
    alone = train_simclr.two_views(run, Batch(pixels[2:3], ids[2:3], None, 2))
    torch.testing.assert_close(views[[2, 6]], alone)
    assert not torch.allclose(views[:4], views[4:])
    assert not torch.allclose(views, train_simclr.two_views(run, Batch(pixels, ids, None, 3)))
    args, _ = train_simclr.parse_args([*NET, "--augment", "none"])
    run = train_simclr.Run(args, None, None, {}, Path(), None, {"image_size": 8})
    plain = train_simclr.two_views(run, Batch(pixels, ids, None, 2))
    assert torch.equal(plain[:4], plain[4:])


SPEC = {"backbone": "resnet18", "stem": "cifar", "image_size": 8}


def test_all_batches_that_do_not_fit_are_refused_at_once_with_their_flags():
    flags = "--stage all --bs 64 --linear-solver sgd --linear-bs 48 --finetune-bs 32"
    args, _ = train_simclr.parse_args([*NET, *flags.split()])
    world = dist.Dist(0, 1, torch.device("cpu"))
    data = train_simclr.build_data(args, "sample", world, None, [])
    few = {name: items[:20] for name, items in data.splits.items()}
    with pytest.raises(InputError) as refused:
        train_simclr.validate(args, world, data.images, few, train_simclr.settings(args), SPEC)
    for flag in ("--bs", "--linear-bs", "--finetune-bs"):
        assert f"20 training items; lower {flag}" in str(refused.value)


@pytest.mark.parametrize(
    ("spec", "trains"),
    [
        (SPEC, False),
        (SPEC | {"image_size": 16}, True),
        ({"backbone": "resnet18", "stem": "imagenet", "image_size": 32}, False),
        ({"backbone": "resnet50", "stem": "imagenet", "image_size": 64}, True),
        ({"backbone": "convnext_tiny", "stem": "imagenet", "image_size": 32}, True),  # LayerNorm
        ({"backbone": "mobilenet_v3_large", "stem": "imagenet", "image_size": 32}, False),
    ],
)
def test_a_batch_of_one_is_refused_where_batchnorm_cannot_train_on_it(spec, trains):
    args, _ = train_simclr.parse_args([*NET, "--stage", "all", "--bs", "1", "--finetune-bs", "1"])
    world = dist.Dist(0, 1, torch.device("cpu"))
    data = train_simclr.build_data(args, "sample", world, None, [])
    model = build_backbone(spec["backbone"], spec["stem"]).train()
    try:
        model(torch.rand(1, 3, spec["image_size"], spec["image_size"]))
        assert trains
    except ValueError:
        assert not trains
    with pytest.raises(InputError) as refused:
        stages = train_simclr.settings(args)
        train_simclr.validate(args, world, data.images, data.splits, stages, spec)
    assert ("give --finetune-bs 2" in str(refused.value)) != trains
    assert "give --bs 2 or more" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("world_size", [1, 4])
def test_an_unset_batch_of_a_labeled_stage_shrinks_to_its_data(world_size, capsys):
    world = dist.Dist(0, world_size, torch.device("cpu"))
    splits = {"pretrain": range(500), "train": range(250), "finetune_train": range(35)}

    def batches(flags):
        args, _ = train_simclr.parse_args([*NET, *flags.split()])
        stages = train_simclr.fit_batches(args, world, splits, train_simclr.settings(args))
        said = capsys.readouterr().out
        assert said.count("fewer than a batch of 256") == said.count("\n")
        return {name: stage.bs for name, stage in stages.items()}, said

    fit = 35 // world_size * world_size
    assert batches("--stage all --linear-solver sgd") == (
        {"pretrain": 256, "linear": 250, "finetune": fit},
        "linear: 250 training images, fewer than a batch of 256: --linear-bs is 250\n"
        f"finetune: 35 training images, fewer than a batch of 256: --finetune-bs is {fit}\n",
    )
    assert "--bs is 250\n" in batches("--stage linear --linear-solver sgd --from none")[1]
    # What is set, solved or enough stays, to be refused where it does not fit.
    assert batches("--stage finetune --from none --bs 64") == ({"finetune": 64}, "")
    assert batches("--stage linear --from none") == ({"linear": 256}, "")
    assert batches("--stage pretrain --bs 512") == ({"pretrain": 512}, "")
