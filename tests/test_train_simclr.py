"""Functions of train_simclr.py: views and accumulation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

import train_simclr
from common import config, recipe
from common.check import reference
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


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_the_loss_of_fine_tuning_is_the_weighted_cross_entropy(weights):
    args, _ = train_simclr.parse_args([*NET, "--stage", "finetune", "--from", "none"])
    spec = {"backbone": "resnet18", "stem": "cifar", "image_size": 8}
    spec["classes"] = {"finetune": ["a", "b", "c"]}
    world = dist.Dist(0, 1, torch.device("cpu"))
    spec |= {"class_weights": weights} if weights else {}
    run = train_simclr.Run(args, world, None, {}, Path(), None, spec)
    model = train_simclr.build_model(run, "finetune").eval()
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 1, 0, 2, 2, 0])
    batch = Batch(pixels, np.arange(8), labels, 0)
    logits = model(train_simclr.one_view(run, batch)).detach().double().numpy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = train_simclr.amp.scaler("fp32", world.device)
    step = train_simclr.finetune_step(run, model, optimizer, scaler, batch)
    expected = reference.cross_entropy(logits, labels.numpy(), weights=np.array(weights or 1.0))
    assert step.terms["loss"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("augment", ["simclr", "none"])
def test_every_view_is_normalized_by_the_models_statistics(augment):
    args, _ = train_simclr.parse_args([*NET, "--augment", augment])
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    batch = Batch(pixels, np.arange(4), None, 0)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 0.125]

    def made(**more):
        run = train_simclr.Run(args, None, None, {}, Path(), None, {"image_size": 8} | more)
        views = [train_simclr.two_views(run, batch), train_simclr.one_view(run, batch)]
        return torch.cat([*views, train_simclr.one_view(run, batch._replace(epoch=None))])

    expected = TF.normalize(train_simclr.augment.denormalize(made()), mean, std)
    torch.testing.assert_close(made(normalization=[mean, std]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "flag, finetune",
    [
        ("--blur 1", False),
        ("--crop-min 0.9", False),
        ("--color-strength 0.1", False),
        ("--grayscale 1", False),
        ("--vertical-flip", True),
        ("--rotation 90", True),
        ("--rotation any", True),
        ("--stain 0.3", True),
        ("--seed 1", True),
    ],
)
def test_every_flag_of_the_views_changes_them(flag, finetune):
    pixels = torch.randint(0, 256, (8, 3, 24, 24), dtype=torch.uint8)
    batch = Batch(pixels, np.arange(8), None, 0)

    def made(*more):
        args, _ = train_simclr.parse_args([*NET, *more])
        run = train_simclr.Run(args, None, None, {}, Path(), None, {"image_size": 20})
        evaluated = train_simclr.one_view(run, batch._replace(epoch=None))
        return train_simclr.two_views(run, batch), train_simclr.one_view(run, batch), evaluated

    views, crops, evaluated = made()
    other_views, other_crops, other_evaluated = made(*flag.split())
    assert not torch.allclose(views, other_views)
    assert torch.equal(crops, other_crops) != finetune
    assert torch.equal(evaluated, other_evaluated)


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


def followed(more: str, steps: int, earlier: dict | None = None) -> tuple:
    text = more if "--bs" in more or "--grid" in more else f"{more} --bs 64"
    args, _ = train_simclr.parse_args(text.split())
    bs = train_simclr.settings(args)["pretrain"].bs
    args, notes = recipe.follow(args, steps, bs, earlier or {})
    stage = train_simclr.settings(args)["pretrain"]
    return stage.optimizer, stage.lr, len(notes)


PAPERS = ("lars", pytest.approx(0.6), 0)


def test_the_recipe_follows_the_number_of_steps_and_whatever_is_given_wins():
    few = recipe.SHORT - 1
    assert followed("", few) == ("adamw", 3e-3, 1)
    assert followed("", recipe.SHORT) == PAPERS
    assert followed("--bs 256", few) == ("lars", pytest.approx(1.2), 0)
    for text in ("--recipe paper", "--optimizer lars", "--protocol cytology", "--search 2"):
        assert followed(text, few) == PAPERS, text
    assert followed("--grid-index 0", few) == ("lars", pytest.approx(0.6), 0)
    assert followed("--lr 2", few) == ("lars", 2, 0)  # a rate of its own optimizer
    assert followed("--optimizer adamw", few) == ("adamw", 1e-3, 0)
    assert followed("--optimizer sgd", few) == ("sgd", 0.0125, 0)


def test_a_run_that_goes_on_keeps_its_recipe():
    before, auto = {"optimizer": "lars", "lr": None}, {"optimizer": "adamw", "lr": 3e-3}
    assert followed("", 5, before) == PAPERS
    assert followed("", 10**6, auto) == ("adamw", 3e-3, 1)
    assert followed("--recipe paper", 5, auto) == PAPERS


def test_the_recipe_of_before_has_the_name_of_before():
    args, parser = train_simclr.parse_args([])
    before = {"demo": False, "x": 1}
    for text in ("--optimizer lars", "--recipe paper", "--protocol cytology"):
        args, parser = train_simclr.parse_args(text.split())
        found = config.run_id(parser, recipe.follow(args, 5, 64, {})[0], x=1)
        assert found == before | ({"protocol": "cytology"} if "cytology" in text else {})
    args, parser = train_simclr.parse_args([])
    given, _ = train_simclr.parse_args(["--optimizer", "adamw", "--lr", "3e-3"])
    auto = config.run_id(parser, recipe.follow(args, 5, 64, {})[0], x=1)
    assert auto == config.run_id(parser, given, x=1) != before


def test_a_cpu_takes_bf16_where_it_is_faster_and_a_run_keeps_its_format(monkeypatch):
    cpu, spec = torch.device("cpu"), {"backbone": "resnet18_narrow", "image_size": 32}

    def taken(text="", device=cpu, earlier=None, **changed):
        args, _ = train_simclr.parse_args(text.split())
        return recipe.with_precision(args, device, spec | changed, earlier or {}).precision

    monkeypatch.setattr(recipe.amp, "cpu_has_bf16", lambda: True)
    assert taken() == "bf16" and taken("--precision fp32") == "fp32"
    assert taken(device=torch.device("cuda")) == "auto"
    for changed in ({"backbone": "mobilenet_v3_large"}, {"image_size": 8}):
        assert taken(**changed) == "auto"
    assert taken(earlier={"precision": "auto"}) == "auto"  # of a CPU without, or a version before
    monkeypatch.setattr(recipe.amp, "cpu_has_bf16", lambda: False)
    assert taken() == "auto" and taken(earlier={"precision": "bf16"}) == "bf16"
    assert recipe.amp.dtype_of("auto", cpu) == torch.float32


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
def test_an_unset_batch_of_a_labeled_stage_shrinks_to_its_data(world_size):
    world = dist.Dist(0, world_size, torch.device("cpu"))

    counts = {"pretrain": 500, "linear": 250, "finetune": 35}

    def batches(flags):
        args, _ = train_simclr.parse_args([*NET, *flags.split()])
        stages, parts = train_simclr.settings(args), train_simclr.divisors(args, world)
        args, said = recipe.fit_batches(args, stages, train_simclr.STAGES, counts, parts)
        return {name: stage.bs for name, stage in train_simclr.settings(args).items()}, said

    fit = 35 // world_size * world_size
    assert batches("--stage all --linear-solver sgd") == (
        {"pretrain": 256, "linear": 250, "finetune": fit},
        [
            "linear: 250 training images, fewer than a batch of 256: --linear-bs is 250",
            f"finetune: 35 training images, fewer than a batch of 256: --finetune-bs is {fit}",
        ],
    )
    assert "--bs is 250" in batches("--stage linear --linear-solver sgd --from none")[1][0]
    # What is set, solved or enough stays, to be refused where it does not fit.
    assert batches("--stage finetune --from none --bs 64") == ({"finetune": 64}, [])
    assert batches("--stage linear --from none") == ({"linear": 256}, [])
    assert batches("--stage pretrain --bs 512") == ({"pretrain": 512}, [])
