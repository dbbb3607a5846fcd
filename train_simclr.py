"""SimCLR on (cytology) images: contrastive pretraining, then the linear protocol, then fine-tuning.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations,
arXiv:2002.05709.

  python train_simclr.py --backbone resnet50 --bs 256            pretraining on the embedded images; best on a GPU
  python train_simclr.py --data cells.zip --stage all            all three stages on your own images
  python train_simclr.py --stage finetune --from RUN             one stage, from a finished pretraining run
  python train_simclr.py --protocol cytology --grid-index 0            one of the 108 runs of the cytology experiment
  python train_simclr.py --demo                                  everything, small: minutes on two CPU cores
"""

import math
import sys
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, config, linear_eval, optim
from common.check.result import CheckSpec
from common.check.runner import check
from common.data import augment, cytology, sampling
from common.data.cytology import CELLS
from common.data.images import Images
from common.data.open import prepare
from common.errors import InputError, as_input_error
from common.features import contrast, representation, stored_features
from common.models import BACKBONES, LARGER, build_backbone, input_size, load_published
from common.models.heads import HEAD_BIAS, SimCLR, init_bias_to_prior
from common.report import figures
from common.run import checkpoint, dist
from common.run.files import run_dir_of
from common.run.inference import load_run, restore_data_flags, write_predictions
from common.run.launch import launch, run_sweep
from common.run.log import Log, Pace
from common.run.run import Run, test_best_and_last
from common.run.signals import Signals
from common.weights import load_backbone
from kernels import nt_xent

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
LR_OF = {
    "lars": lambda bs: 0.075 * math.sqrt(bs),  # SimCLR, appendix B.1
    "sgd": lambda bs: 0.05 * bs / 256,  # SimSiam, arXiv:2011.10566
    "adamw": lambda bs: 1e-3,
}
# Color strength 0.5 is the paper's for small images (appendix B.9).
DEMO = dict(
    backbone="resnet18",
    image_size=32,
    stage="all",
    bs=64,
    epochs=32,
    eval_every=4,
    color_strength=0.5,
)
DEMO |= dict(finetune_epochs=6, finetune_bs=64, finetune_lr=1e-3)
SEARCH = {"lars": {"lr": (0.05, 5.0)}, "sgd": {"lr": (5e-3, 0.5)}, "adamw": {"lr": (1e-4, 1e-2)}}
SEARCH |= {"linear": {"lr": (0.02, 2.0)}, "finetune": {"lr": (1e-5, 1e-2), "wd": (1e-6, 0.1)}}
STEMS = ["imagenet", "cifar"]
DEFAULTS = {
    "backbone": "resnet50",
    "stem": STEMS[0],
}  # where neither a flag nor --from says otherwise


def parse_args(argv: list[str] | None = None):
    parser = config.base_parser("simclr", __doc__)
    parser.alias("--cell", "--grid-index")
    group = parser.add_argument_group("stages")
    parser.choice(group, "--stage", [*STAGES, "all"], "pretrain", "which stage to run")
    group.add_argument(
        "--from",
        dest="from_run",
        metavar="RUN",
        help="run or checkpoint to start from; none: random",
    )
    parser.number(
        group,
        "--patience",
        int,
        10,
        "evaluations on dev without a better macro F1 before stopping",
        low=1,
    )
    for name in ("linear", "finetune"):
        parser.stage(group, name, STAGES[name])
    parser.number(
        group,
        "--grid-index",
        int,
        None,
        "run of the cytology experiment's grid",
        low=0,
        high=len(CELLS) - 1,
    )
    parser.choice(
        group,
        "--protocol",
        ["none", "cytology"],
        "none",
        "which images the stages see; cytology: A1 to B2",
    )
    labels = "labels that --protocol cytology fine-tunes on"
    group.add_argument("--target-labels", default=cytology.TARGETS, help=labels)
    group = parser.add_argument_group("model")
    parser.choice(
        group, "--backbone", BACKBONES, None, f"unset: {DEFAULTS['backbone']}, or the one of --from"
    )
    parser.choice(
        group,
        "--stem",
        STEMS,
        None,
        f"cifar: for small images; unset: {STEMS[0]}, or the one of --from",
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="published weights to start from: .pt, .pth or .safetensors",
    )
    parser.choice(
        group,
        "--head-bias",
        HEAD_BIAS,
        HEAD_BIAS[0],
        "fine-tuning's start; prior: the classes' shares",
    )
    parser.number(
        group,
        "--image-size",
        int,
        None,
        "input side, pixels; unset: the stored one, at most 224",
        low=1,
    )
    parser.number(
        group,
        "--store-size",
        int,
        None,
        "side images are decoded to; unset: their own, at most 256",
        low=8,
    )
    group = parser.add_argument_group("pretraining")
    parser.number(group, "--proj-dim", int, 128, "outputs of the projection head", low=2)
    parser.number(group, "--temperature", float, 0.2, "of NT-Xent", above=0)
    parser.choice(
        group, "--augment", ["simclr", "none"], "simclr", "none: every view is the image itself"
    )
    parser.number(group, "--color-strength", float, 1.0, "of the color distortion", low=0, high=2.5)
    parser.choice(group, "--optimizer", LR_OF, "lars", "optimizer of the pretraining")
    parser.number(
        group,
        "--fraction",
        float,
        1.0,
        "share of the images, stratified, always the same",
        above=0,
        high=1,
    )
    group.add_argument(
        "--profile",
        action="store_true",
        help="time a step's phases; with --accum views are in forward",
    )
    args = restore_data_flags(
        parser, argv, config.parse(parser, argv, DEMO, SEARCH), ["store_size"]
    )
    if args.grid_index is not None:
        parser.set_defaults(**CELLS[args.grid_index])
        args = config.parse(parser, argv, DEMO | CELLS[args.grid_index], SEARCH)
        config.reject_unused_flags(
            parser, args, CELLS[args.grid_index], "with --grid-index, which sets it"
        )

    config.check_inference_flags(parser, args)
    refuse = partial(config.reject_unused_flags, parser, args)
    if args.stage != "all":
        later = [
            f"{stage}_{flag}"
            for stage in ("linear", "finetune")
            for flag in ("epochs", "bs", "lr", "wd")
        ]
        refuse(later, "without --stage all; use --epochs, --bs, --lr, --wd for a single stage")
    if args.stage in ("linear", "finetune"):
        pretraining = (
            "proj_dim temperature color_strength optimizer fraction accum impl profile grid_index"
        )
        refuse(pretraining.split(), f"with --stage {args.stage}")
        if (args.from_run is None) == (args.weights is None):
            parser.error(
                f"--stage {args.stage} starts from either --from RUN, --weights FILE or --from"
                " none (random)"
            )
    else:
        refuse(["from_run"], f"with --stage {args.stage}, which trains its backbone")
    if args.stage == "pretrain":
        refuse(
            ["patience", "teacher", "head_bias"],
            "with --stage pretrain, which neither stops early nor classifies",
        )
    if args.stage == "linear":
        stored = "with --stage linear: features are stored, every epoch is logged"
        refuse(["augment", "eval_every", "log_every", "head_bias"], stored)
    refuse(["color_strength"] if args.augment == "none" else [], "with --augment none")
    refuse(["target_labels"] if args.protocol == "none" else [], "without --protocol cytology")
    return args, parser


def settings(args, name: str) -> config.StageConfig:
    """Resolved settings of a stage."""
    first = args.stage == name or (args.stage == "all" and name == "pretrain")
    defaults = STAGES[name] | ({"optimizer": args.optimizer} if name == "pretrain" else {})
    return config.stage_config(
        args, name, defaults, first=first, lr_of=LR_OF[defaults["optimizer"]]
    )


def build_data(args, path: str, world: dist.Dist, targets: list[str] | None, stored: list):
    """(images, parts, classes, split): the images of `path`, the indices of each part, the class
    names of the labeled stages, and what split.json holds (None without `targets`, the labels of
    the cytology protocol).
    """
    images = prepare(
        path,
        store_size=args.store_size,
        on_bad_item=args.on_bad_item,
        workers=args.workers,
        say=world.say,
    )
    if targets is None:
        return (
            images,
            sampling.split(images, args.fraction),
            dict.fromkeys(("linear", "finetune"), images.classes),
            None,
        )
    return images, *cytology.protocol(images, targets, args.fraction, stored, world.say)


def validate(
    args, world: dist.Dist, images: Images, splits: dict, stages: dict[str, config.StageConfig]
) -> None:
    """Refuse what the stages could not use, before anything is written."""
    needs = {
        "linear": ("train", "dev", "test"),
        "finetune": ("finetune_train", "finetune_dev", "finetune_test"),
    }
    for name, stage in stages.items():
        parts = needs.get(name, ("pretrain",))
        if name != "pretrain" and (
            len(images.classes) < 2 or not all(len(splits[part]) for part in parts)
        ):
            raise InputError(
                f"{name} needs labeled images of two classes in train, dev and test:"
                f" {images.describe()}"
            )
        if name == "pretrain" and stage.bs < 2:
            raise InputError("pretrain: a batch of 1 has no negatives; give --bs 2 or more")
        divisor = {
            "pretrain": world.world_size * args.accum,
            "linear": 1,
            "finetune": world.world_size,
        }[name]
        sampling.check_batch(name, stage.bs, len(splits[parts[0]]), divisor)
    with as_input_error("--impl", args.impl):
        nt_xent(*torch.eye(4, device=world.device).chunk(2), args.temperature, impl=args.impl)


def build_model(run: Run, kind: str, weights: dict | None = None) -> nn.Module:
    """The network of a stage on the device: `pretrain` has a projection head, a labeled stage a
    linear one as `fc`.

    `weights` are a backbone's. The random part is a function of --seed.
    """
    args, model_spec = run.args, run.model_spec
    torch.manual_seed(args.seed)
    model = build_backbone(model_spec["backbone"], model_spec["stem"])
    if weights is not None:
        source = args.from_run or args.weights or "this run"
        checkpoint.load_weights(model, weights, f"{source} ({model_spec['backbone']})")
    width = BACKBONES[model_spec["backbone"]].num_features
    if kind == "pretrain":
        model = SimCLR(model, width, model_spec["proj_dim"])
    elif kind in model_spec["classes"]:
        model.fc = nn.Linear(width, len(model_spec["classes"][kind]))
    if run.stages and kind == "finetune" and args.head_bias == "prior":
        init_bias_to_prior(
            model.fc, run.data.labels_in(model_spec["classes"][kind])[run.splits["finetune_train"]]
        )
    model = dist.sync_batchnorm(model, run.world).to(
        run.world.device, memory_format=torch.channels_last
    )
    if args.compile:
        model.compile()
    return model


def two_views(run: Run, pixels: Tensor, ids: np.ndarray, epoch: int) -> Tensor:
    """Normalized views (2n, 3, s, s) of uint8 pixels: first view a of every image, then view b."""
    args, size, stored = run.args, run.model_spec["image_size"], pixels.shape[-1]
    if args.augment == "none":
        return augment.normalize(augment.resize(pixels, size)).repeat(2, 1, 1, 1)
    drawn = [
        augment.simclr_params(args.seed, epoch, ids, v, stored, size, args.color_strength)
        for v in (0, 1)
    ]
    views = torch.cat(
        [augment.normalize(augment.make_view(pixels, params, size)) for params in drawn]
    )
    return views.contiguous(memory_format=torch.channels_last)


def train_step(
    run: Run, model, optimizer, scaler, make_views, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pretraining update; returns (loss, z (2n, d), gradient norm, bad), all on the device.

    `make_views(slice)` gives the views of a chunk of this process's `count` images. With --accum K
    the batch keeps all its negatives (GradCache, arXiv:2101.06983): embeddings of every chunk
    first, the loss on all of them, then the gradient of each chunk; BatchNorm then sees one chunk
    at a time.
    """
    args, world, size = run.args, run.world, count // run.args.accum
    gather = dist.all_gather_rows if world.world_size > 1 else None
    chunks = [slice(k * size, (k + 1) * size) for k in range(args.accum)]
    optimizer.zero_grad(set_to_none=True)
    if args.accum == 1:
        views = make_views(chunks[0])
        run.lap("augmentation")
        with amp.autocast(args.precision, world.device):
            z_a, z_b = model(views).chunk(2)
    else:
        with (
            torch.no_grad(),
            amp.frozen_running_stats(model),
            amp.autocast(args.precision, world.device),
        ):
            parts = [model(make_views(chunk)).chunk(2) for chunk in chunks]
        z_a, z_b = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    run.lap("forward")
    loss = nt_xent(z_a, z_b, args.temperature, gather=gather, impl=args.impl)
    run.lap("loss")
    scaler.scale(loss).backward()
    if args.accum > 1:
        for chunk in chunks:
            with amp.reduce_gradients(model, last=chunk is chunks[-1]):
                with amp.autocast(args.precision, world.device):
                    z = model(make_views(chunk))
                z.backward(torch.cat([z_a.grad[chunk], z_b.grad[chunk]]))
    run.lap("backward")
    norm, bad = amp.guarded_step(optimizer, scaler, loss)
    run.lap("optimizer")
    return loss.detach(), torch.cat([z_a, z_b]).detach(), norm, bad


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, indices: np.ndarray, progress=None) -> Tensor:
    """Outputs of the model in evaluation mode for the images `indices` (n,): float32 (n, outputs)
    on the CPU.
    """
    model.eval()
    own, rows = dist.shard(indices, run.world), []
    for pixels in run.data.batches(np.array_split(own, -(-len(own) // 256)), run.args.workers):
        if progress:
            progress.check_stop()
        x = augment.normalize(
            augment.resize(amp.to_device(pixels, run.world.device), run.model_spec["image_size"])
        )
        with amp.autocast(run.args.precision, run.world.device):
            rows.append(model(x.contiguous(memory_format=torch.channels_last)).float())
    return dist.unshard(torch.cat(rows), len(indices)).cpu()


def pretrain(run: Run, weights: dict | None) -> None:
    """Stage 1: NT-Xent on two views. Writes backbone.pt and features.npz from the epoch of the
    lowest mean loss.
    """
    args, world, log, indices = run.args, run.world, run.log, run.splits["pretrain"]
    stage = run.stages["pretrain"]
    model = build_model(run, "pretrain", weights)
    optimizer = optim.of_stage(stage, [model])
    scaler = amp.scaler(args.precision, world.device)
    start = checkpoint.weights_digest(weights) if weights else "scratch"
    progress = run.stage(
        "pretrain", {"model": model, "optimizer": optimizer, "scaler": scaler}, start=start
    )
    if run.is_done(progress):
        return
    trained, chance, steps = (
        dist.wrap(model, world),
        math.log(2 * stage.bs - 1),
        len(indices) // stage.bs,
    )
    log.say(
        stage.describe(f"{len(indices)} images", steps)
        + f"; loss at chance ln(2N-1) = {chance:.4f}"
    )
    pace = Pace(stage.bs, stage.epochs * steps, "img")
    while progress.epoch < stage.epochs:
        model.train()
        batches = sampling.epoch_batches(
            indices, stage.bs, args.seed, progress.epoch, progress.batch, world
        )
        for batch, pixels in zip(
            batches, pace.waiting(run.data.batches(batches, args.workers)), strict=True
        ):
            lr = amp.set_lr(optimizer, stage, progress.step, steps, args.lr_schedule)
            pixels = amp.to_device(pixels, world.device)
            run.lap("input")

            def make_views(chunk, pixels=pixels, batch=batch):
                return two_views(run, pixels[chunk], batch[chunk], progress.epoch)

            if progress.step == 0 and world.is_main:
                figures.save_grid(
                    run.folder / "figures" / "views.png",
                    augment.denormalize(make_views(slice(0, 8))),
                    8,
                )
            loss, z, norm, bad = train_step(run, trained, optimizer, scaler, make_views, len(batch))
            run.end_step(
                progress,
                pace,
                {"loss": loss},
                lr,
                norm,
                bad,
                chance=chance,
                more=partial(contrast, z),
            )
            run.lap("rest")
        loss = progress.mean("loss")
        values = {"pretrain/train/loss": loss, "pretrain/train/loss_over_chance": loss / chance}
        if (progress.epoch + 1) % args.eval_every == 0 or progress.epoch + 1 == stage.epochs:
            values |= representation(
                run, partial(evaluate, run, model.backbone, progress=progress), "dev", "val"
            )
        progress.select(loss, model.state_dict(), values, higher_is_better=False)
        progress.results = values
        log.metrics("pretrain", progress.step, progress.epoch + 1, values)
        progress.end_epoch()
        pace.pause()
        run.lap(None)

    def scored(network, _):
        outputs = partial(evaluate, run, network.backbone, progress=progress)
        return representation(run, outputs, "test", "test"), network.backbone

    test, backbone = test_best_and_last(progress, model, scored)
    weights = {name: tensor.detach().cpu() for name, tensor in backbone.state_dict().items()}
    if world.is_main:
        checkpoint.save(run.folder / "backbone.pt", weights)
    everything = partial(evaluate, run, backbone, np.arange(len(run.data)), progress)
    figures.representation(
        run, stored_features(run, checkpoint.weights_digest(weights), everything)
    )
    log.metrics("pretrain", progress.step, progress.epoch, test)
    run.finish(progress, progress.results | test | {"pretrain/train/loss_at_chance": chance})


def linear(run: Run, weights: dict | None) -> None:
    """Stage 2: a linear layer on frozen features; beside it, the same on random-weight features and
    on raw pixels.
    """
    random = build_model(run, "features").state_dict()

    def features(chosen: dict, progress) -> Tensor:
        compute = partial(
            evaluate, run, build_model(run, "features", chosen), np.arange(len(run.data)), progress
        )
        return (
            compute()
            if chosen is random
            else stored_features(run, checkpoint.weights_digest(chosen), compute)
        )

    linear_eval.linear(
        run, weights, random, BACKBONES[run.model_spec["backbone"]].num_features, features
    )


def finetune_step(
    run: Run, model, optimizer, scaler, pixels, batch: np.ndarray, labels: np.ndarray, epoch: int
):
    """One update on crops of the images `batch`; returns (loss, gradient norm, bad), device
    scalars.
    """
    args, device = run.args, run.world.device
    x, size = amp.to_device(pixels, device), run.model_spec["image_size"]
    params = augment.crop_flip_params(args.seed, epoch, batch, 0, pixels.shape[-1])
    x = augment.resize(x, size) if args.augment == "none" else augment.make_view(x, params, size)
    x = augment.normalize(x).contiguous(memory_format=torch.channels_last)
    optimizer.zero_grad(set_to_none=True)
    with amp.autocast(args.precision, device):
        logits = model(x)
    y = amp.to_device(torch.from_numpy(labels[batch]), device)
    loss = sum(
        run.add_distillation(
            {"ce": nn.functional.cross_entropy(logits.float(), y)}, logits, x
        ).values()
    )
    scaler.scale(loss).backward()
    norm, bad = amp.guarded_step(optimizer, scaler, loss)
    return loss.detach(), norm, bad


def finetune(run: Run, weights: dict | None) -> None:
    """Stage 3: train the whole model on labels; test the epoch of the best macro F1 on dev."""
    args, world, log, classes = run.args, run.world, run.log, run.model_spec["classes"]["finetune"]
    train, dev, test = (run.splits[f"finetune_{name}"] for name in ("train", "dev", "test"))
    stage, num_classes, labels = run.stages["finetune"], len(classes), run.data.labels_in(classes)
    model = build_model(run, "finetune", weights)
    optimizer = optim.of_stage(stage, [model])
    scaler = amp.scaler(args.precision, world.device)
    start = checkpoint.weights_digest(weights) if weights else "random"
    progress = run.stage(
        "finetune", {"model": model, "optimizer": optimizer, "scaler": scaler}, start=start
    )
    if run.is_done(progress):
        return
    trained, steps = dist.wrap(model, world), len(train) // stage.bs
    counts = f"{len(train)} training, {len(dev)} dev and {len(test)} test images"
    log.say(stage.describe(counts, steps) + f", patience {args.patience} evaluations")
    pace = Pace(stage.bs, stage.epochs * steps, "img")
    while progress.epoch < stage.epochs and progress.evals_without_gain < args.patience:
        model.train()
        batches = sampling.epoch_batches(
            train, stage.bs, args.seed, progress.epoch, progress.batch, world
        )
        for batch, pixels in zip(
            batches, pace.waiting(run.data.batches(batches, args.workers)), strict=True
        ):
            lr = amp.set_lr(optimizer, stage, progress.step, steps, args.lr_schedule)
            loss, norm, bad = finetune_step(
                run, trained, optimizer, scaler, pixels, batch, labels, progress.epoch
            )
            run.end_step(progress, pace, {"loss": loss}, lr, norm, bad)
        values = {"finetune/train/loss": progress.mean("loss")}
        if (progress.epoch + 1) % args.eval_every == 0 or progress.epoch + 1 == stage.epochs:
            values |= linear_eval.score(
                "finetune/val", evaluate(run, model, dev, progress), labels[dev], num_classes
            )
            progress.select(
                values["finetune/val/macro_f1"], model.state_dict(), values, higher_is_better=True
            )
        log.metrics("finetune", progress.step, progress.epoch + 1, values)
        progress.end_epoch()
        pace.pause()

    def scored(network, _):
        logits = evaluate(run, network, test, progress)
        return linear_eval.score("finetune/test", logits, labels[test], num_classes), logits

    results, logits = test_best_and_last(progress, model, scored)
    figures.classified(run, "finetune", test, logits, labels[test], classes)
    log.metrics("finetune", progress.step, progress.epoch, results)
    run.finish(progress, results)


def check_spec(run: Run, name: str, weights: dict | None) -> CheckSpec:
    """A stage in the terms of --check."""
    args, stage, first, items = run.args, run.stages[name], name == "pretrain", run.data
    classes, part = run.model_spec["classes"].get(name, []), "finetune_" * (name == "finetune")
    labels, size = None if first else items.labels_in(classes), min(16, stage.bs)
    splits = (
        run.splits[split]
        for split in (("pretrain", "test") if first else (f"{part}train", f"{part}dev"))
    )
    guess = math.log(2 * size - 1 if first else len(classes))

    def one_step(model, optimizer, scaler, batch, epoch):
        (pixels,) = run.data.batches([batch], args.workers)
        if not first:
            return finetune_step(run, model, optimizer, scaler, pixels, batch, labels, epoch)
        make_views = lambda chunk: two_views(run, pixels[chunk], batch[chunk], epoch)  # noqa: E731
        return train_step(run, model, optimizer, scaler, make_views, len(batch))[::2]

    inputs = dict(
        seen=lambda calls, n: calls[0][0].unflatten(0, (-1, n)).transpose(0, 1), size=size
    )
    inputs |= dict(pixels=lambda own: next(run.data.batches([own], args.workers)))
    answers = dict(labels=labels, classes=classes, head=None if first else lambda model: model.fc)
    answers |= dict(chance=(0.8 * guess, 1.25 * guess), varies=args.augment != "none")
    larger = LARGER.get(run.model_spec["backbone"])
    answers["larger"] = larger and (lambda: build_model(run.with_spec(backbone=larger), name))
    own_step = None if name == "linear" else one_step
    functions = partial(build_model, run, name, weights), own_step, partial(evaluate, run)
    return CheckSpec(run, stage, *splits, *functions, **inputs, **answers)


def run_inference(args, world: dist.Dist) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv for images without
    labels.
    """
    model_of = load_run(args, "simclr")
    model_spec, folder = model_of.state["model_spec"], model_of.folder
    kind = linear_eval.kind_of(model_spec["stage"], model_of.source)
    classes = model_spec["classes"].get(kind)
    if args.predict and kind == "pretrain":
        raise InputError(
            f"{model_of.source} has no classifier: run --stage linear or --stage finetune --from"
            " it first"
        )
    targets = None if args.predict else model_spec["targets"]
    images, splits, _, _ = build_data(args, model_of.path, world, targets, [model_of.home])
    run = Run(
        args, world, images, splits, folder, Log(None, main=world.is_main), None, model_spec, {}
    )
    model = build_model(run, kind)
    checkpoint.load_weights(model, model_of.state["model"], model_of.source)
    if args.predict:
        scores = evaluate(run, model, np.arange(len(images))).softmax(1)
        if world.is_main:
            write_predictions(folder / "predictions.csv", images.ids, classes, scores)
            print(f"{len(images)} predictions in {folder / 'predictions.csv'}")
        return
    if kind == "pretrain":
        return model_of.write(
            representation(run, partial(evaluate, run, model.backbone), "test", "test"), world
        )
    test = splits["finetune_test" if kind == "finetune" else "test"]
    if not len(test):
        raise InputError(f"{images.describe()}: there is no labeled test image to evaluate on")
    labels, logits = images.labels_in(classes, test), evaluate(run, model, test)
    answers = images, test, classes, logits.softmax(1)
    model_of.write(
        linear_eval.score("eval/test", logits, labels[test], len(classes)), world, answers
    )


def run_training(parser, args, world: dist.Dist, signals: Signals) -> None:
    """Train: read the data, settle what the run is, and run its stages."""
    weights, started, before = None, None, {}
    if args.from_run not in (None, "none"):
        weights, before = load_backbone(args.from_run)
    targets = cytology.target_labels(args.target_labels) if args.protocol == "cytology" else None
    stored = [
        run_dir_of(p)
        for p in (args.out, args.resume, args.from_run)
        if p not in (None, "auto", "none")
    ]
    images, splits, classes, split = build_data(args, args.data, world, targets, stored)
    cytology.check_start(args.from_run, before, targets, images)
    name, stem = (
        getattr(args, flag) or before.get(flag, first) for flag, first in DEFAULTS.items()
    )
    if args.weights:
        published = build_backbone(name, stem)
        started, weights = load_published(published, args.weights), published.state_dict()
    size = input_size(name, stem, args.image_size or before.get("image_size"), images.store_size)
    model_spec = dict(
        script="simclr", backbone=name, stem=stem, image_size=size, classes=classes, targets=targets
    )
    model_spec["proj_dim"] = before.get("proj_dim", args.proj_dim)
    stages = {
        stage: settings(args, stage) for stage in (STAGES if args.stage == "all" else [args.stage])
    }
    validate(args, world, images, splits, stages)
    start = {"weights": checkpoint.weights_digest(weights)} if weights else {}
    identity = config.run_id(
        parser, args, data=images.fingerprint, stage=args.stage, **model_spec, **start
    )
    names = dict(name=f"{name}-{args.stage}-bs{next(iter(stages.values())).bs}", identity=identity)
    said = "\n".join(filter(None, [f"input {size} px", started]))
    run = Run.open(args, world, signals, images, splits, model_spec, stages, **names, size=said)
    if split and world.is_main and not args.check:
        cytology.save(run.folder, split)
    run.phases = amp.Phases(world.device) if args.profile else None
    run.attach_teacher(
        lambda twin: build_model(twin, linear_eval.kind_of(twin.model_spec["stage"], args.teacher)),
        evaluate=evaluate,
    )
    if args.check:
        return check(
            run,
            {
                name: check_spec(run, name, weights)
                for name in stages
                if name != "linear" or len(stages) == 1
            },
        )
    with run.session():
        if "pretrain" in stages:
            pretrain(run, weights)
            weights = checkpoint.load(run.folder / "backbone.pt")
        if "linear" in stages:
            linear(run, weights)
        if "finetune" in stages:
            finetune(run, weights)


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    return (
        0
        if run_sweep(main, argv, args, SEARCH, "macro_f1")
        else launch(args, run_inference, partial(run_training, parser))
    )


if __name__ == "__main__":
    sys.exit(main())
