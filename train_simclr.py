"""SimCLR on (cytology) images: contrastive pretraining, then the linear protocol, then fine-tuning.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations,
arXiv:2002.05709.

Pretraining on the embedded images, best on a GPU:
  python train_simclr.py --backbone resnet50 --bs 256
All three stages on your own images:
  python train_simclr.py --data cells.zip --stage all
One stage, from a finished pretraining run:
  python train_simclr.py --stage finetune --from RUN
One of the 108 runs of the cytology experiment:
  python train_simclr.py --protocol cytology --grid-index 0
Everything, small, in minutes on two CPU cores:
  python train_simclr.py --demo
"""

import common  # noqa: F401  # isort: skip  (it refuses an older Python)
import math
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, config, distill, linear_eval, optim, recipe
from common.check import reference
from common.check.result import CheckSpec, NetworkView
from common.check.runner import check
from common.data import augment, cytology, sampling
from common.data.cytology import CELLS
from common.data.groups import group_items, groups_of
from common.data.images import SQUARE, Images
from common.data.open import prepare
from common.distill import add_distillation
from common.errors import InputError, as_input_error, plural
from common.export import PROBABILITIES, ExportSpec
from common.features import (
    contrast,
    representation,
    say_if_not_learning,
    stored_features,
)
from common.live import digits
from common.models import (
    BACKBONES,
    LARGER,
    build_backbone,
    feature_widths,
    input_size,
    load_published,
    published_weights,
    trains_on_one,
)
from common.models.heads import FEATURES, HEAD_BIAS, Classifier, SimCLR, init_bias_to_prior
from common.report import figures, page
from common.run import checkpoint, dist
from common.run.card import Card
from common.run.directory import earlier_config
from common.run.evaluation import Evaluation
from common.run.inference import load_run, restore_flags, warn_of_known
from common.run.launch import launch, run_sweep
from common.run.loop import Batch, Loop, Step
from common.run.run import Run, test_best_and_last
from common.run.signals import Signals
from common.weights import load_backbone, locate, of_backbone
from kernels import nt_xent

CARD = Card(
    name="simclr",
    about="SimCLR: a network learns to tell that two distorted views of an image belong together,"
    " without labels (pretrain). Its features are then judged by a linear layer (linear) and by"
    " training on (finetune).",
    items="images",
    stages=("pretrain", "linear", "finetune"),
    headlines={
        "finetune/test/accuracy": "accuracy on the test split, fine-tuned",
        "linear/test/accuracy": "accuracy on the test split, linear layer on frozen features",
        "pretrain/test/knn_accuracy": "kNN accuracy on the test split",
        "pretrain/train/loss_over_chance": "contrastive loss over its chance level, last epoch",
    },
    baselines=("linear_random", "linear_pixels"),
    following={
        "pretrain": "--stage linear --from RUN {data} {group_by} {store_size} {on_bad_item}"
        " {protocol} {target_labels}"
    },
)
# The batch and the learning rate of the linear protocol and of fine-tuning are the cytology
# recipe's; their epochs only bound the early stopping. A learning rate of None follows from the
# batch.
STAGES = {
    "pretrain": {"epochs": 100, "bs": 256, "lr": None, "wd": 1e-4},
    "linear": {
        "epochs": 100,
        "bs": 256,
        "lr": 0.2,
        "wd": 0.0,
        "optimizer": "sgd",
        "warmup_epochs": 0.0,
    },
    "finetune": {"epochs": 50, "bs": 256, "lr": 1e-4, "wd": 1e-4, "optimizer": "adamw"},
}


# Of the linear stage where it is solved, which has no batch: that is part of the directory's name.
SOLVED = {"epochs": 1, "lr": 0.0, "optimizer": "lbfgs"}
# Color strength 0.5 is the paper's for small images (appendix B.9).
DEMO = {
    "backbone": "resnet18_narrow",
    "image_size": 32,
    "stage": "all",
    "bs": 64,
    "epochs": 24,
    "eval_every": 4,
    "color_strength": 0.5,
    "finetune_epochs": 6,
    "finetune_bs": 64,
    "finetune_lr": 1e-3,
}
SEARCH = {
    None: {"lr": (0.05, 5.0)},  # --search keeps the paper's recipe
    "lars": {"lr": (0.05, 5.0)},
    "sgd": {"lr": (5e-3, 0.5)},
    "adamw": {"lr": (1e-4, 1e-2)},
    "linear": {"lr": (0.02, 2.0)},
    "finetune": {"lr": (1e-5, 1e-2), "wd": (1e-6, 0.1)},
}
# The parts of the data that a stage uses; it trains on the first.
PARTS = {
    "pretrain": ("pretrain",),
    "linear": ("train", "dev", "test"),
    "finetune": ("finetune_train", "finetune_dev", "finetune_test"),
}
STEMS = ["imagenet", "cifar"]
EVAL_IMAGES = 256  # at once
VIEW_FLAGS = [field.name for field in fields(augment.ViewSettings)]
FINETUNE_VIEW_FLAGS = ["vertical_flip", "rotation", "stain"]
STATISTICS_IMAGES = 2000  # whose mean and deviation --normalize data takes
# Where neither a flag nor --from says otherwise.
DEFAULTS = {"backbone": "resnet50", "stem": STEMS[0]}


def parse_args(argv: list[str] | None = None):
    bs = STAGES["pretrain"]["bs"]
    lars, sgd, adamw = (recipe.LR_OF[name](bs) for name in ("lars", "sgd", "adamw"))
    lr_rule = f"lars {lars:g} * sqrt(bs / {bs}), sgd {sgd:g} * bs / {bs}, adamw {adamw:g}"
    parser = config.base_parser(CARD.name, __doc__, STAGES, lr=lr_rule)
    parser.aliases["--cell"] = "--grid-index"
    parser.set_help(
        data="images: a folder, a .zip of one, a .csv with the column `path`, a .packed file, or"
        " `sample`, the embedded ones",
        precision="number format of the forward pass; auto: bf16 on a GPU that has it, fp16 on an"
        " older one, bf16 on a CPU that trains the backbone faster in it, fp32 elsewhere",
    )
    group = parser.add_argument_group("stages")
    group.choice("--stage", [*STAGES, "all"], "pretrain", "stage to run, or all three in turn")
    group.add_argument(
        "--from",
        dest="from_run",
        metavar="RUN",
        help="run or checkpoint whose backbone a later stage starts from; none: random weights",
    )
    group.number(
        "--patience",
        int,
        10,
        "evaluations without a better macro F1 on dev before a labeled stage stops",
        low=1,
    )
    for name in ("linear", "finetune"):
        group.stage(name, STAGES[name])
    group.choice(
        "--linear-solver",
        ["lbfgs", "sgd"],
        None,
        "how the linear protocol finds its layer: lbfgs solves it and chooses its penalty by"
        " cross-validation, sgd trains it as the cytology recipe does (default: lbfgs; sgd with"
        " --protocol cytology, --grid-index or --teacher)",
    )
    group.choice(
        "--features",
        FEATURES,
        None,
        "what the solved layer reads of the backbone: gap, its outputs; 2x2, the maps of its last"
        " stage pooled to 2x2; stages, those of its last two; unset: chosen by cross-validation,"
        " for random weights too",
    )
    group.number(
        "--grid-index",
        int,
        None,
        "run of the cytology experiment's grid; it sets what the grid varies",
        low=0,
        high=len(CELLS) - 1,
    )
    group.choice(
        "--protocol",
        ["none", "cytology"],
        "none",
        "which images each stage sees: none splits them at random, cytology uses its sets A1 to B2",
    )
    group.add_argument(
        "--target-labels",
        metavar="LABELS",
        default=cytology.TARGETS,
        help="labels that --protocol cytology fine-tunes on, comma-separated",
    )
    views = augment.ViewSettings()
    group = parser.add_argument_group("model")
    group.choice(
        "--backbone",
        BACKBONES,
        None,
        f"network that encodes the images (default: {DEFAULTS['backbone']}, or that of --from)",
    )
    group.choice(
        "--stem",
        STEMS,
        None,
        "first layers of a ResNet; cifar keeps the resolution of small images"
        f" (default: {DEFAULTS['stem']}, or that of --from)",
    )
    group.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="published weights to start from: `imagenet`, torchvision's, downloaded once, or a"
        " file, .pt, .pth or .safetensors",
    )
    group.number(
        "--label-fraction",
        float,
        1.0,
        "share of the labels that the linear protocol and fine-tuning have, evenly by class; the"
        " images stay in the pretraining",
        above=0,
        high=1,
    )
    group.choice(
        "--class-weights",
        ["none", "balanced"],
        "none",
        "weights of the classes in fine-tuning's loss; balanced: a rare class weighs more",
    )
    group.choice(
        "--sampler",
        ["none", "balanced"],
        "none",
        "how fine-tuning's batches are drawn; balanced: as many images of each class",
    )
    group.choice(
        "--head-bias",
        HEAD_BIAS,
        HEAD_BIAS[0],
        "bias that fine-tuning's classifier starts with; prior: the shares of the classes",
    )
    group.number(
        "--image-size",
        int,
        None,
        "side of the input, pixels; unset: that of the stored images, at most 224",
        low=1,
    )
    group.number(
        "--store-size",
        int,
        None,
        "side that images are decoded to, pixels; unset: their own, at most 256",
        low=8,
    )
    group.choice(
        "--normalize",
        ["imagenet", "data"],
        None,
        "mean and deviation of the channels that pixels are normalized by: ImageNet's, or those of"
        " the images to train on (default: imagenet, or those of --from)",
    )
    group = parser.add_argument_group("views, of the pretraining and of fine-tuning")
    group.choice(
        "--augment",
        ["simclr", "none"],
        "simclr",
        "how views are made; none: every view is the image itself",
    )
    group.switch("--vertical-flip", "mirror half of the views top to bottom, too")
    group.choice(
        "--rotation",
        augment.ROTATIONS,
        views.rotation,
        "turn the views: by 90, a multiple of 90 degrees, or any angle",
    )
    group.number(
        "--stain",
        float,
        views.stain,
        "strength of the jitter of stains, hematoxylin, eosin and DAB, in optical density, as 0.05",
        low=0,
        high=1,
    )
    group = parser.add_argument_group("pretraining")
    group.number("--proj-dim", int, 128, "outputs of the projection head", low=2)
    group.number("--temperature", float, 0.2, "temperature of the NT-Xent loss", above=0)
    group.number(
        "--color-strength",
        float,
        views.color_strength,
        "strength of the color distortion",
        low=0,
        high=2.5,
    )
    group.number("--blur", float, views.blur, "share of the views that are blurred", low=0, high=1)
    group.number(
        "--crop-min",
        float,
        views.crop_min,
        "smallest share of an image's area that a view shows",
        above=0,
        high=1,
    )
    group.number(
        "--grayscale", float, views.grayscale, "share of the views without color", low=0, high=1
    )
    group.choice(
        "--recipe",
        ["auto", "paper"],
        "auto",
        "optimizer where neither it nor --lr is given: paper takes lars, auto adamw at"
        f" {recipe.AUTO['lr']:g} in fewer than {recipe.SHORT} steps of a batch below"
        f" {recipe.SMALL}; --protocol cytology, --grid-index and --search imply paper",
    )
    group.choice(
        "--optimizer", recipe.LR_OF, None, "optimizer of the pretraining; unset: as --recipe says"
    )
    group.number(
        "--fraction",
        float,
        1.0,
        "share of the images to pretrain on, stratified by class, the same in every run",
        above=0,
        high=1,
    )
    group.switch(
        "--profile", "time the phases of a step; with --accum, forward includes making the views"
    )
    args = config.parse(parser, argv, DEMO, SEARCH)
    args = restore_flags(parser, argv, args, CARD.name, ["store_size", "precision"], DEMO)
    if args.grid_index is not None:
        cell = CELLS[args.grid_index]
        parser.set_defaults(**cell)
        args = config.parse(parser, argv, DEMO | cell, SEARCH)
        config.reject_unused_flags(parser, args, cell, "with --grid-index, which sets it")

    config.check_inference_flags(parser, args)
    refuse = partial(config.reject_unused_flags, parser, args)
    if args.stage != "all":
        refuse(
            [f"{stage}_{flag}" for stage in ("linear", "finetune") for flag in config.STAGE_FLAGS],
            "without --stage all; use --epochs, --bs, --lr, --wd for a single stage",
        )
    if args.stage in ("linear", "finetune"):
        pretraining_only = [
            "proj_dim",
            "temperature",
            *(flag for flag in VIEW_FLAGS if flag not in FINETUNE_VIEW_FLAGS),
            "optimizer",
            "recipe",
            "fraction",
            "accum",
            "impl",
            "profile",
            "grid_index",
        ]
        refuse(pretraining_only, f"with --stage {args.stage}")
        if (args.from_run is None) == (args.weights is None):
            parser.error(
                f"--stage {args.stage} starts from either --from RUN, --weights FILE or --from"
                " none (random)"
            )
    else:
        refuse(["from_run"], f"with --stage {args.stage}, which trains its backbone")
    if args.stage in ("pretrain", "finetune"):
        refuse(["linear_solver", "features"], f"with --stage {args.stage}")
    elif linear_solver(args) == "lbfgs":
        shared = ["patience", "max_steps", "clip_grad", "lr_schedule", "warmup_epochs", "teacher"]
        flags = ["search", *config.STAGE_FLAGS, *shared] if args.stage == "linear" else []
        refuse(
            [*(f"linear_{flag}" for flag in config.STAGE_FLAGS), *flags],
            "on a linear layer that is solved; add --linear-solver sgd to train it",
        )
    else:
        refuse(["features"], "on a linear layer that is trained, which reads gap")
    if args.stage == "pretrain":
        refuse(
            ["patience", "teacher", "head_bias", "label_fraction", "class_weights", "sampler"],
            "with --stage pretrain, which neither stops early nor classifies",
        )
    if args.stage == "linear":
        refuse(
            ["augment", *FINETUNE_VIEW_FLAGS, "eval_every", "log_every", "head_bias"],
            "with --stage linear: features are stored, every epoch is logged",
        )
        refuse(["class_weights", "sampler"], "with --stage linear, which weighs images alike")
    if args.sampler == "balanced":
        refuse(["head_bias"], "with --sampler balanced, whose batches hold all classes alike")
        if args.class_weights == "balanced":
            parser.error(
                "--class-weights and --sampler correct one imbalance twice; give one of them"
            )
    if args.augment == "none":
        refuse(VIEW_FLAGS, "with --augment none")
    if args.protocol == "none":
        refuse(["target_labels"], "without --protocol cytology")
    return args, parser


def linear_solver(args) -> str:
    """--linear-solver, or what stands for it where it is unset."""
    return args.linear_solver or ("sgd" if recipe.is_paper(args) or args.teacher else "lbfgs")


def settings(args) -> dict[str, config.StageConfig]:
    """Resolved settings of the stages to run, in their order."""
    names = list(STAGES) if args.stage == "all" else [args.stage]
    stages = {}
    for name in names:
        defaults = STAGES[name]
        if name == "pretrain":
            defaults = defaults | {"optimizer": args.optimizer or recipe.PAPER}
        elif name == "linear" and linear_solver(args) == "lbfgs":
            defaults = defaults | SOLVED
        lr_of = recipe.LR_OF.get(defaults["optimizer"])
        is_first = name == names[0]
        stages[name] = config.stage_config(args, name, defaults, first=is_first, lr_of=lr_of)
        if stages[name].optimizer == "lbfgs":  # the defaults of --linear-epochs, ... are sgd's
            stages[name] = replace(stages[name], **SOLVED)
    return stages


class Data(NamedTuple):
    """The images of a run.

    Attributes:
        splits: their indices by the names of the parts.
        classes: the class names of each labeled stage.
        protocol: what split.json holds; None without the cytology protocol.
    """

    images: Images
    splits: dict[str, np.ndarray]
    classes: dict[str, list[str]]
    protocol: dict | None


def build_data(
    args, path: str | tuple, world: dist.Dist, targets: list[str] | None, stored: list
) -> Data:
    """The images of `path` and their parts.

    `targets` are the labels of the cytology protocol, `stored` the runs whose parts it takes over.
    """
    images = prepare(
        path,
        store_size=args.store_size,
        on_bad_item=args.on_bad_item,
        workers=args.workers,
        labels=not args.predict,
        say=world.say,
    )
    group_items(images, args, CARD.items, world.say, own_splits=targets is None)
    if targets is None:
        classes = dict.fromkeys(("linear", "finetune"), images.classes)
        data = Data(images, sampling.split(images, args.fraction, world.say), classes, None)
    else:
        data = Data(images, *cytology.protocol(images, targets, args.fraction, stored, world.say))
    if args.label_fraction == 1:
        return data
    stages = settings(args)
    fewer = sampling.fewer_labels(
        images, data.splits, args.label_fraction, stages, args.seed, world.say
    )
    return data._replace(splits=fewer)


def divisors(args, world: dist.Dist) -> dict[str, int]:
    """What the batches of the stages are divided by; every process does all of the linear one."""
    world_size = world.world_size
    return {"pretrain": world_size * args.accum, "linear": 1, "finetune": world_size}


def validate(
    args,
    world: dist.Dist,
    images: Images,
    splits: dict,
    stages: dict[str, config.StageConfig],
    spec: dict,
) -> None:
    """Refuse what the stages could not use, before anything is written."""
    refused = []
    for name, stage in stages.items():
        parts = [splits[part] for part in PARTS[name]]
        flag = "--bs" if name == next(iter(stages)) else f"--{name}-bs"
        if name == "pretrain" and stage.bs < 2:
            refused.append("pretrain: a batch of 1 has no negatives; give --bs 2 or more")
        if name != "pretrain" and (len(images.classes) < 2 or not all(map(len, parts))):
            raise InputError(
                f"{name} needs labeled images of two classes in train, dev and test:"
                f" {images.describe()}"
            )
        if stage.optimizer != "lbfgs":
            try:
                divisor = divisors(args, world)[name]
                sampling.check_batch(name, stage.bs, len(parts[0]), divisor, flag)
                if name == "finetune" and args.sampler == "balanced":
                    labels = images.labels[parts[0]]
                    sampling.balanced_batches(parts[0], labels, stage.bs, 0, 0, flag=flag)
            except InputError as error:
                refused.append(str(error))
        network = spec["backbone"], spec["stem"], spec["image_size"]
        if name == "finetune" and stage.bs == 1 and not trains_on_one(*network):
            refused.append(
                f"finetune: a batch of 1 leaves the BatchNorm of {spec['backbone']} one value a"
                f" channel at {spec['image_size']} px; give {flag} 2 or more"
            )
    if refused:
        raise InputError(". ".join(refused))
    with as_input_error("--impl", args.impl):
        nt_xent(*torch.eye(4, device=world.device).chunk(2), args.temperature, impl=args.impl)


def build_model(run: Run, kind: str, weights: dict | None = None) -> nn.Module:
    """The network of a stage on the device; its random part is a function of --seed.

    Args:
        kind: `pretrain` gives a `SimCLR`, a labeled stage a `Classifier` with a linear head,
            anything else the backbone alone.
        weights: the backbone's; None: random.
    """
    args, spec = run.args, run.model_spec
    torch.manual_seed(args.seed)
    model = build_backbone(spec["backbone"], spec["stem"])
    if weights is not None:
        source = args.from_run or args.weights or "this run"
        checkpoint.load_weights(model, weights, f"{source} ({spec['backbone']})")
    if kind == "pretrain":
        model = SimCLR(model, spec["proj_dim"])
    elif kind in spec["classes"]:
        num_classes = len(spec["classes"][kind])
        features = spec.get("features", "gap")
        width = feature_widths(model, spec["image_size"])[features]
        model = Classifier(model, nn.Linear(width, num_classes), features)
    if run.stages and kind == "finetune" and args.head_bias == "prior":
        labels = run.data.labels_in(spec["classes"][kind])
        init_bias_to_prior(model.head, labels[run.splits["finetune_train"]])
    model = dist.sync_batchnorm(model, run.world)
    model = model.to(run.world.device, memory_format=torch.channels_last)
    if args.compile and kind != "features":  # which one pass needs
        model.compile()
    return model


def two_views(run: Run, batch: Batch) -> Tensor:
    """Normalized views (2n, 3, s, s) of a batch's pixels: first view a of every image, then b."""
    pixels, size = batch.inputs, run.model_spec["image_size"]
    statistics = normalization(run.model_spec)
    if run.args.augment == "none":
        return augment.normalize(augment.resize(pixels, size), *statistics).repeat(2, 1, 1, 1)
    return augment.make_views(pixels, drawn_views(run, batch), size, statistics, "reflection")


def drawn_views(run: Run, batch: Batch) -> list[augment.ViewParams]:
    """What `two_views` makes its views by."""
    args, side = run.args, batch.inputs.shape[-1]
    size, settings = run.model_spec["image_size"], augment.ViewSettings.of(args)
    return [
        augment.simclr_params(args.seed, batch.epoch, batch.items, view, side, size, settings)
        for view in (0, 1)
    ]


def one_view(run: Run, batch: Batch) -> Tensor:
    """Normalized crops (n, 3, s, s) of a batch's pixels, or the images as they are."""
    pixels, size = batch.inputs, run.model_spec["image_size"]
    if run.args.augment == "none" or batch.epoch is None:
        x = augment.resize(pixels, size)
    else:
        x = augment.make_view(pixels, drawn_crops(run, batch), size, "reflection")
    x = augment.normalize(x, *normalization(run.model_spec))
    return x.contiguous(memory_format=torch.channels_last)


def drawn_crops(run: Run, batch: Batch) -> augment.ViewParams:
    """What `one_view` makes the views of fine-tuning by."""
    args, side = run.args, batch.inputs.shape[-1]
    settings = augment.ViewSettings.of(args)
    return augment.crop_flip_params(args.seed, batch.epoch, batch.items, 0, side, settings=settings)


def normalization(spec: dict) -> tuple:
    """Mean and deviation of the channels of pixels in [0, 1] that a model expects."""
    values = spec.get("normalization", (augment.IMAGENET_MEAN, augment.IMAGENET_STD))
    return tuple(map(tuple, values))


def fetch(
    run: Run,
    batches: list[np.ndarray],
    epoch: int | None = None,
    labels: np.ndarray | None = None,
) -> Iterator[Batch]:
    """The batches of items with their pixels, uint8 (n, 3, S, S), on the device.

    `epoch` is that of the augmentation, None of evaluation; `labels` are those of all images.
    """
    device = run.world.device
    for items, pixels in zip(batches, run.data.batches(batches, run.args.workers), strict=True):
        targets = None
        if labels is not None:
            targets = amp.to_device(torch.from_numpy(labels[items]), device)
        yield Batch(amp.to_device(pixels, device), items, targets, epoch)


def train_step(run: Run, model, optimizer, scaler, batch: Batch) -> Step:
    """One update of the pretraining; `extra` are the embeddings z (2n, d), view a above view b."""
    optimizer.zero_grad(set_to_none=True)
    views = two_views(run, batch)
    run.lap("augmentation")
    with amp.autocast(run.args.precision, run.world.device):
        z = model(views)
    run.lap("forward")
    loss = contrastive_loss(run, *z.chunk(2))
    run.lap("loss")
    scaler.scale(loss).backward()
    run.lap("backward")
    norm, bad = amp.guarded_step(optimizer, scaler, loss, run.args.clip_grad)
    run.lap("optimizer")
    return Step({"loss": loss.detach()}, norm, bad, extra=z.detach())


def gradcache_step(run: Run, model, optimizer, scaler, batch: Batch) -> Step:
    """`train_step` with --accum chunks, which keep all negatives of the batch (GradCache,
    arXiv:2101.06983).

    Embeddings of every chunk come first, without a graph; then the loss on all of them; then every
    chunk again, for the gradient of its embeddings. BatchNorm sees one chunk at a time. The views
    are made twice and count as part of their pass.
    """
    args, device = run.args, run.world.device
    optimizer.zero_grad(set_to_none=True)
    frozen, autocast = amp.frozen_running_stats(model), amp.autocast(args.precision, device)
    with torch.no_grad(), frozen, autocast:
        parts = [model(two_views(run, chunk)).chunk(2) for chunk in batch.chunks(args.accum)]
    z_a, z_b = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    run.lap("forward")
    loss = contrastive_loss(run, z_a, z_b)
    run.lap("loss")
    scaler.scale(loss).backward()
    slices = batch.slices(args.accum)
    for rows, chunk in zip(slices, batch.chunks(args.accum), strict=True):
        with amp.reduce_gradients(model, last=rows is slices[-1]):
            with amp.autocast(args.precision, device):
                z = model(two_views(run, chunk))
            z.backward(torch.cat([z_a.grad[rows], z_b.grad[rows]]))
    run.lap("backward")
    norm, bad = amp.guarded_step(optimizer, scaler, loss, run.args.clip_grad)
    run.lap("optimizer")
    return Step({"loss": loss.detach()}, norm, bad, extra=torch.cat([z_a, z_b]).detach())


def contrastive_loss(run: Run, z_a: Tensor, z_b: Tensor) -> Tensor:
    """NT-Xent of the two views' embeddings (n, d), against the batch of all processes."""
    gather = dist.all_gather_rows if run.world.world_size > 1 else None
    return nt_xent(z_a, z_b, run.args.temperature, gather=gather, impl=run.args.impl)


def finetune_step(run: Run, model, optimizer, scaler, batch: Batch) -> Step:
    """One update of the fine-tuning: cross-entropy, and the teacher's term where there is one."""
    x = one_view(run, batch)
    optimizer.zero_grad(set_to_none=True)
    with amp.autocast(run.args.precision, run.world.device):
        logits = model(x)
    if "class_weights" in run.model_spec:
        weights = amp.to_device(torch.tensor(run.model_spec["class_weights"]), x.device)
        ce = nn.functional.cross_entropy(logits.float(), batch.labels, weights, reduction="sum")
        # Not by the sum of the weights, which differs between processes.
        terms = {"ce": ce / len(x)}
    else:
        terms = {"ce": nn.functional.cross_entropy(logits.float(), batch.labels)}
    loss = sum(add_distillation(run, terms, logits, x).values())
    scaler.scale(loss).backward()
    norm, bad = amp.guarded_step(optimizer, scaler, loss, run.args.clip_grad)
    return Step({"loss": loss.detach()}, norm, bad)


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, indices: np.ndarray, progress=None) -> Tensor:
    """Outputs of the model in evaluation mode for the images `indices` (n,): float32 (n, outputs)
    on the CPU.
    """
    model.eval()
    shard = dist.shard(indices, run.world)
    parts = np.array_split(shard, -(-len(shard) // EVAL_IMAGES))
    with Evaluation(progress, model, parts) as done:
        for batch in fetch(run, done.left):
            x = one_view(run, batch)
            with amp.autocast(run.args.precision, run.world.device):
                outputs = model(x).float()
            done.add(outputs)
    return done.rows(len(indices))


def pretrain(run: Run, weights: dict | None) -> None:
    """Stage 1: NT-Xent on two views. Writes backbone.pt and features.npz from the epoch of the
    lowest mean loss.
    """
    args, world, log = run.args, run.world, run.log
    stage = run.stages["pretrain"]
    indices = run.splits["pretrain"]
    model = build_model(run, "pretrain", weights)
    optimizer = optim.of_stage(stage, [model])
    scaler = amp.scaler(args.precision, world.device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start = checkpoint.weights_digest(weights) if weights else "scratch"
    progress = run.open_stage("pretrain", parts, start=start)
    if run.is_done(progress):
        return
    trained = dist.wrap(model, world)
    steps = len(indices) // stage.bs
    _, chance = run.chance["pretrain"]
    log.say(
        stage.describe(plural(len(indices), "image"), steps)
        + f"; loss at chance ln(2N-1) = {digits(chance)}"
    )
    step_of = train_step if args.accum == 1 else gradcache_step
    loop = Loop(run, progress, steps=steps, unit="img", chance=chance, phases=run.phases)
    loop.foresee(step_of, partial(fetch, run), indices)
    for epoch in loop.epochs():
        model.train()
        batches = sampling.epoch_batches(indices, stage.bs, args.seed, epoch, progress.batch, world)
        for batch in loop.batches(fetch(run, batches, epoch)):
            if progress.step == 0:
                save_views(run, batch)
            lr = loop.set_lr(optimizer)
            step = step_of(run, trained, optimizer, scaler, batch)
            loop.end_step(step, lr, more=partial(contrast, step.extra))
        loss = progress.mean("loss")
        values = {
            "pretrain/train/loss": loss,
            "pretrain/train/loss_over_chance": loss / chance,
        }
        event = {}
        if loop.is_eval_epoch():
            outputs = partial(evaluate, run, model.backbone, progress=progress)
            values |= representation(run, outputs, "dev", "pretrain/val")
            if epoch < args.eval_every and "pretrain/val/knn_accuracy" in values:
                values |= untrained(run, "dev", "pretrain/start", weights, progress)
            event = say_if_not_learning(run, values, epoch + 1)  # by the log: not the state's
        progress.select(loss, model.state_dict(), values, higher_is_better=False)
        progress.results = values
        loop.end_epoch(values | event)

    def test(network, _):
        outputs = partial(evaluate, run, network.backbone, progress=progress)
        return representation(run, outputs, "test", "pretrain/test"), network.backbone

    results, backbone = test_best_and_last(progress, model, test)
    trained_weights = {n: tensor.detach().cpu() for n, tensor in backbone.state_dict().items()}
    if world.is_main:
        checkpoint.save(run.folder / "backbone.pt", trained_weights)
    everything = partial(evaluate, run, backbone, np.arange(len(run.data)), progress)
    features = stored_features(run, checkpoint.weights_digest(trained_weights), everything)
    figures.representation(run, features)
    if "pretrain/test/knn_accuracy" in results:
        labels, splits = run.data.labels, run.splits
        share = linear_eval.majority_accuracy(run, "train", labels, splits["test"])
        results["pretrain/test/majority_knn_accuracy"] = share
        pixels = partial(linear_eval.raw_pixels, run, progress=progress)
        results |= representation(run, pixels, "test", "pretrain_pixels/test")
        results |= untrained(run, "test", "pretrain_random/test", None, progress)
    log.metrics("pretrain", progress.step, progress.epoch, results)
    run.finish(progress, progress.results | results | {"pretrain/train/loss_at_chance": chance})


def untrained(run: Run, queries: str, prefix: str, weights: dict | None, progress) -> dict:
    """`representation` of the backbone that pretraining began with, random without `weights`."""
    random = checkpoint.rng_state()
    backbone = build_model(run, "features", weights)
    checkpoint.set_rng_state(random)
    outputs = partial(evaluate, run, backbone, progress=progress)
    return representation(run, outputs, queries, prefix)


def trained_backbone(run: Run) -> dict:
    """The backbone that pretraining has left in backbone.pt; where that is damaged, it is written
    again from best.pt.
    """
    try:
        return checkpoint.load(run.folder / "backbone.pt")
    except InputError as error:
        run.log.say(f"{error}; pretrain/best.pt is used")
        weights = of_backbone(checkpoint.load(run.folder / "pretrain" / "best.pt")["model"])
        if run.world.is_main:
            checkpoint.save(run.folder / "backbone.pt", weights)
        return weights


@figures.for_report
def save_views(run: Run, batch: Batch) -> None:
    """Write figures/views.png: the first images of the run as the network sees them."""
    first = Batch(batch.inputs[:8], batch.items[:8], None, batch.epoch)
    pictures = augment.denormalize(two_views(run, first), *normalization(run.model_spec))
    figures.save_grid(run.folder / "figures" / "views.png", pictures, 8)


def linear(run: Run, weights: dict | None) -> None:
    """Stage 2: a linear layer on frozen features; beside it, the same on random-weight features and
    on raw pixels.
    """
    network = build_model(run, "features")
    random = network.state_dict()

    def features(backbone: dict, progress, names: list[str]) -> dict[str, Tensor]:
        encoder = build_model(run, "features", backbone)
        rows = {}
        if "gap" in names:
            compute = partial(evaluate, run, encoder, np.arange(len(run.data)), progress)
            digest = checkpoint.weights_digest(backbone)
            rows["gap"] = compute() if backbone is random else stored_features(run, digest, compute)
        if names != ["gap"]:  # the maps of `stages` end with those of `2x2`
            reader = Classifier(encoder, nn.Identity(), names[-1])
            maps = evaluate(run, reader, np.arange(len(run.data)), progress)
            rows |= {name: maps[:, -widths[name] :] for name in names if name != "gap"}
        return rows

    widths = feature_widths(network, run.model_spec["image_size"])
    linear_eval.linear(run, weights, random, widths, features)


def finetune(run: Run, weights: dict | None) -> None:
    """Stage 3: train the whole model on labels; test the epoch of the best macro F1 on dev."""
    args, world, log = run.args, run.world, run.log
    stage = run.stages["finetune"]
    classes = run.model_spec["classes"]["finetune"]
    labels = run.data.labels_in(classes)
    train, dev, test_split = (run.splits[part] for part in PARTS["finetune"])
    model = build_model(run, "finetune", weights)
    optimizer = optim.of_stage(stage, [model])
    scaler = amp.scaler(args.precision, world.device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start = checkpoint.weights_digest(weights) if weights else "random"
    progress = run.open_stage("finetune", parts, start=start)
    if run.is_done(progress):
        return
    trained = dist.wrap(model, world)
    steps = len(train) // stage.bs
    counts = f"{len(train)} training, {len(dev)} dev and {len(test_split)} test images"
    log.say(stage.describe(counts, steps) + f", patience {plural(args.patience, 'evaluation')}")
    loop = Loop(run, progress, steps=steps, unit="img", patience=args.patience)
    loop.foresee(finetune_step, partial(fetch, run, labels=labels), train)
    for epoch in loop.epochs():
        model.train()
        batches = finetune_batches(run, epoch, progress.batch)
        for batch in loop.batches(fetch(run, batches, epoch, labels)):
            lr = loop.set_lr(optimizer)
            step = finetune_step(run, trained, optimizer, scaler, batch)
            loop.end_step(step, lr)
        values = {"finetune/train/loss": progress.mean("loss")}
        if loop.is_eval_epoch():
            logits = evaluate(run, model, dev, progress)
            values |= linear_eval.score("finetune/val", logits, labels[dev], len(classes))
            f1 = values["finetune/val/macro_f1"]
            progress.select(f1, model.state_dict(), values, higher_is_better=True)
        loop.end_epoch(values)

    def test(network, _):
        logits = evaluate(run, network, test_split, progress)
        groups = groups_of(run.data, test_split)
        right = labels[test_split]
        scores = linear_eval.tested("finetune/test", logits, right, len(classes), groups)
        return scores, logits

    results, logits = test_best_and_last(progress, model, test)
    share = linear_eval.majority_accuracy(run, "finetune_train", labels, test_split)
    results["finetune/test/majority_accuracy"] = share
    results["finetune/train/labels"] = len(train) + len(dev)
    figures.classified(run, "finetune", test_split, logits, labels[test_split], classes)
    log.metrics("finetune", progress.step, progress.epoch, results)
    run.finish(progress, results)


def finetune_batches(run: Run, epoch: int, done: int = 0) -> list[np.ndarray]:
    """This process's share of an epoch's batches of fine-tuning, but for the first `done`."""
    train, bs = run.splits["finetune_train"], run.stages["finetune"].bs
    if run.args.sampler == "balanced":
        labels = run.data.labels[train]
        return sampling.balanced_batches(train, labels, bs, run.args.seed, epoch, done, run.world)
    return sampling.epoch_batches(train, bs, run.args.seed, epoch, done, run.world)


def check_spec(run: Run, name: str, weights: dict | None) -> CheckSpec:
    """A stage in the terms of --check."""
    args, stage = run.args, run.stages[name]
    is_pretrain = name == "pretrain"
    classes = run.model_spec["classes"].get(name, [])
    labels = None if is_pretrain else run.data.labels_in(classes)
    class_weights = np.array(run.model_spec.get("class_weights", 1.0))
    loss = partial(reference.cross_entropy, weights=class_weights)
    if is_pretrain:
        loss = partial(reference.contrastive, views=2, temperature=args.temperature)
    steps = {"pretrain": train_step, "linear": None, "finetune": finetune_step}
    larger = LARGER.get(run.model_spec["backbone"])
    is_balanced = name == "finetune" and args.sampler == "balanced"
    return CheckSpec(
        run=run,
        stage=name,
        splits=("pretrain", "test") if is_pretrain else PARTS[name][:2],
        build=partial(build_model, run, name, weights),
        fetch=partial(fetch, run, labels=labels),
        step=steps[name],
        evaluate=partial(evaluate, run),
        loss=loss,
        augmented=args.augment != "none",
        view=NetworkView(
            run,
            size=min(16, stage.bs),
            eval_batch=EVAL_IMAGES,
            normalization=normalization(run.model_spec),
        ),
        labels=labels,
        batches=partial(finetune_batches, run) if is_balanced else None,
        starts_at_prior=name == "finetune" and args.head_bias == "prior",
        larger=larger and partial(build_model, run.with_spec(backbone=larger), name),
        views=lambda batch: drawn_views(run, batch) if is_pretrain else [drawn_crops(run, batch)],
    )


def run_inference(args, world: dist.Dist) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv for images without
    labels.
    """
    loaded = load_run(args, CARD)
    spec = loaded.model_spec
    kind = linear_eval.kind_of(spec["stage"], loaded.source)
    classes = spec["classes"].get(kind)
    if args.predict and kind == "pretrain":
        raise InputError(
            f"{loaded.source} has no classifier: run --stage linear or --stage finetune --from it"
            " first"
        )
    targets = None if args.predict else spec["targets"]
    data = build_data(args, loaded.path, world, targets, [loaded.source])
    images, splits = data.images, data.splits
    run = loaded.as_run(args, world, images, splits)
    model = loaded.with_weights(partial(build_model, run, kind))
    if args.predict:
        loaded.say_who_answers(world, classes, stages=spec["classes"])
        scores = evaluate(run, model, np.arange(len(images))).softmax(1)
        loaded.write_predictions(world, images.ids, classes, scores)
        return
    if kind == "pretrain":
        outputs = partial(evaluate, run, model.backbone)
        loaded.write(representation(run, outputs, "test", "pretrain/test"), world)
        return
    test = splits["finetune_test" if kind == "finetune" else "test"]
    if not len(test):
        raise InputError(f"{images.describe()}: there is no labeled test image to evaluate on")
    labels = images.labels_in(classes, test)
    logits = evaluate(run, model, test)
    groups = groups_of(images, test)
    scores = linear_eval.tested("eval/test", logits, labels[test], len(classes), groups)
    warn_of_known_images(loaded.source, images, test, world)
    loaded.write(scores, world, (images, test, classes, logits.softmax(1)))


def warn_of_known_images(source: str, images: Images, test: np.ndarray, world: dist.Dist) -> None:
    """Say which images of another data set than its own a run may have learned, once they are
    read.
    """
    if checkpoint.config_of(source).get("identity", {}).get("data") != images.fingerprint:
        warn_of_known(source, images, test, "test image", world.say)


def export_spec(args, world: dist.Dist) -> ExportSpec:
    """The model of a checkpoint in the terms of common.export."""
    loaded = load_run(args, CARD)
    spec = loaded.model_spec
    kind = linear_eval.kind_of(spec["stage"], loaded.source)
    run = loaded.as_run(args, world, None, {})
    model = loaded.with_weights(partial(build_model, run, kind))
    is_pretrain = kind == "pretrain"
    return ExportSpec(
        model=model.backbone if is_pretrain else model,
        answer=lambda network, x: network(x) if is_pretrain else network(x).softmax(1),
        inputs={"images": SQUARE},
        size=spec["image_size"],
        normalization=normalization(spec),
        output="features" if is_pretrain else PROBABILITIES,
        classes=spec["classes"].get(kind),
    )


def run_training(parser, args, world: dist.Dist, signals: Signals) -> None:
    """Train: read the data, settle what the run is, and run its stages."""
    weights = None
    source = {}
    if args.from_run not in (None, "none"):
        weights, source = load_backbone(args.from_run, CARD.name)
    targets = None
    if args.protocol == "cytology":
        targets = cytology.target_labels(args.target_labels)
    earlier = [path for path in (args.out, args.resume, args.from_run) if path]
    stored = [path for path in earlier if path not in ("auto", "none")]
    images, splits, classes, protocol = build_data(args, args.data, world, targets, stored)
    cytology.check_start(args.from_run, source, targets, args.group_by, images)
    backbone, stem = (
        getattr(args, flag) or source.get(flag, default) for flag, default in DEFAULTS.items()
    )
    if backbone not in list(BACKBONES) or stem not in STEMS:
        raise InputError(f"--from {args.from_run} has the unknown backbone {backbone}, {stem}")
    if args.features not in (None, "gap") and not BACKBONES[backbone].stages:
        raise InputError(
            f"--features {args.features}: {backbone} has no maps, allowed is gap; leave it out"
        )
    published_notes = []
    if args.weights or (weights and not source):
        file = args.from_run
        if args.weights:
            file = locate(args.weights, backbone, published_weights(backbone))
        published = build_backbone(backbone, stem)
        published_notes = load_published(published, file).split("\n")
        weights = published.state_dict()
    size = args.image_size or source.get("image_size")
    spec = dict(
        script=CARD.name,
        backbone=backbone,
        stem=stem,
        image_size=input_size(backbone, stem, size, images.store_size),
        classes=classes,
        targets=targets,
        proj_dim=source.get("proj_dim", args.proj_dim),
    )
    if augment.blur_kernel_size(spec["image_size"]) == 1:
        config.reject_unused_flags(parser, args, ["blur"], "on views below 20 px")
    if args.normalize == "data":
        first = sampling.hash_order(images.ids, splits["pretrain"], "statistics")
        batches = np.array_split(np.array(first[:STATISTICS_IMAGES]), STATISTICS_IMAGES // 100)
        read = images.batches([items for items in batches if len(items)], args.workers)
        spec["normalization"] = augment.channel_statistics(read)
    elif args.normalize is None and "normalization" in source:
        spec["normalization"] = source["normalization"]
    if args.class_weights == "balanced":
        labels = images.labels_in(classes["finetune"])[splits["finetune_train"]]
        counts = np.bincount(labels, minlength=len(classes["finetune"]))
        spec["class_weights"] = sampling.class_weights(counts.clip(min=1), None).tolist()
    counts = {name: len(splits[parts[0]]) for name, parts in PARTS.items()}
    args, small = recipe.fit_batches(args, settings(args), STAGES, counts, divisors(args, world))
    stages = settings(args)
    validate(args, world, images, splits, stages, spec)
    start = {"weights": checkpoint.weights_digest(weights)} if weights else {}
    teacher, teacher_id = distill.read(args, spec, same=("image_size", "classes", "normalization"))
    first_stage = next(iter(stages.values()))
    name = f"{backbone}-{args.stage}-bs{first_stage.bs}"
    facts = dict(data=images.fingerprint, stage=args.stage, **spec, **start, **teacher_id)
    steps = first_stage.epochs * (len(splits["pretrain"]) // first_stage.bs)
    earlier = earlier_config(args, CARD.name, name, config.run_id(parser, args, **facts))
    steps = steps if "pretrain" in stages else 0
    args, notes = recipe.follow(args, steps, first_stage.bs, earlier)
    identity = config.run_id(parser, args, **facts)
    earlier = earlier_config(args, CARD.name, name, identity)
    args = recipe.with_precision(args, world.device, spec, earlier)
    stages = settings(args)
    run = Run.open(
        args,
        world,
        signals,
        images,
        splits,
        spec,
        stages,
        card=CARD,
        chance=chance_levels(stages, classes),
        name=name,
        identity=identity,
        input_text=f"input {spec['image_size']} px",
        notes=[*published_notes, *small, *notes],
        kept=protocol and {"split": protocol},
    )
    if protocol and world.is_main and not args.check:
        cytology.save(run.folder, protocol)
    run.phases = amp.Phases(world.device) if args.profile else None
    distill.attach_teacher(run, teacher, build_teacher, nn.Module.__call__, evaluate)
    if args.check:
        tried = [name for name in stages if name != "linear" or len(stages) == 1]
        return check(run, {name: check_spec(run, name, weights) for name in tried})
    with run.session(page):
        if "pretrain" in stages:
            pretrain(run, weights)
            weights = trained_backbone(run)
        if "linear" in stages:
            linear(run, weights)
        if "finetune" in stages:
            finetune(run, weights)
        if source:
            part = "finetune_test" if "finetune" in stages else "test"
            warn_of_known_images(args.from_run, images, splits[part], world)


def build_teacher(run: Run) -> nn.Module:
    """The network of --teacher: of the kind that its stage has left."""
    return build_model(run, linear_eval.kind_of(run.model_spec["stage"], run.args.teacher))


def chance_levels(stages: dict, classes: dict) -> dict[str, tuple[str, float]]:
    """The label and the loss of a guess, by stage."""
    levels = {}
    for name, stage in stages.items():
        if name == "pretrain":
            levels[name] = ("a guess, ln(2N-1)", math.log(2 * stage.bs - 1))
        else:
            count = len(classes[name])
            levels[name] = (f"a guess, ln {count}", math.log(count))
    return levels


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    if run_sweep(main, parser, argv, args, SEARCH, "macro_f1"):
        return 0
    return launch(parser, args, run_inference, run_training)


if __name__ == "__main__":
    sys.exit(main())
