"""Functions of train_simclr.py: views and accumulation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_simclr
from common import metrics
from common.errors import InputError
from common.run import dist
from common.run.loop import Batch
from kernels import nt_xent

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
        assert not step.bad
        values = {"top1": step.extra.top1.float(), "potential": step.extra.potential}
        grads = {name: p.grad for name, p in model.named_parameters()}
        gradients.append(step.terms | values | grads)
    for name, value in gradients[0].items():
        scale = max(value.abs().max().item(), 1e-6)
        assert (gradients[1][name] - value).abs().max().item() <= 1e-4 * scale, name


def test_the_console_costs_no_second_pass_over_the_similarities():
    """A step's values are those of the embeddings, without one more product."""
    args, _ = train_simclr.parse_args(NET)
    run = train_simclr.Run(args, dist.Dist(0, 1, torch.device("cpu")), None, {}, Path(), None, {})
    z_a, z_b = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))
    z_b = z_a + z_b
    with FlopCounterMode(display=False) as plain:
        nt_xent(z_a, z_b, args.temperature)
    with FlopCounterMode(display=False) as counter:
        _, stats = train_simclr.contrastive_loss(run, z_a, z_b)
        values = train_simclr.contrast(stats, args.temperature)
    assert counter.get_total_flops() == plain.get_total_flops() == 2 * 48 * 48 * 8
    assert values == pytest.approx(metrics.contrastive(z_a, z_b), abs=1e-5)
    assert 0 < values["top1"] < 1


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


def test_all_batches_that_do_not_fit_are_refused_at_once_with_their_flags():
    flags = "--stage all --bs 64 --linear-solver sgd --linear-bs 48 --finetune-bs 32"
    args, _ = train_simclr.parse_args([*NET, *flags.split()])
    world = dist.Dist(0, 1, torch.device("cpu"))
    data = train_simclr.build_data(args, "sample", world, None, [])
    few = {name: items[:20] for name, items in data.splits.items()}
    with pytest.raises(InputError) as refused:
        train_simclr.validate(args, world, data.images, few, train_simclr.settings(args))
    for flag in ("--bs", "--linear-bs", "--finetune-bs"):
        assert f"20 training items; lower {flag}" in str(refused.value)
