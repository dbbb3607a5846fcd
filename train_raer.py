"""RAER: which of five academic emotions does a clip show?

CLIP on the face and on the scene around it, long-tailed, after CLIP-CAER (arXiv:2507.00586).
Logit adjustment: Menon et al., arXiv:2007.07314. Deferred sampling and LDAM: Cao et al.,
arXiv:1906.07413.

Everything trained, best on a GPU:
  python train_raer.py --data raer/ --backbone vit_b_16 --weights openai --tune full --bs 8
Frozen CLIP, each clip encoded once: seconds an epoch:
  python train_raer.py --data raer.zip --backbone vit_b_32 --weights openai --cache-features
From a backbone that SimCLR trained:
  python train_raer.py --data raer.zip --backbone resnet18 --weights simclr/backbone.pt
Another long-tail method, to compare with:
  python train_raer.py --data raer.zip --weights openai --method ldam-drw
Small, on embedded clips, in minutes on two CPU cores:
  python train_raer.py --demo

The schedule has three stages: learn from the clips as they come; draw rare classes more often and
adjust the logits; cool down. It is one table, in common/longtail.py, and printed at the start;
--schedule FILE replaces it.
"""

import common  # noqa: F401  # isort: skip  (it refuses an older Python)
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import amp, config, distill, longtail, metrics, optim
from common.check import audit, reference
from common.check.result import CheckSpec, NetworkView
from common.check.runner import check
from common.data import augment, raer, sampling
from common.data.groups import group_items, groups_of
from common.distill import add_distillation
from common.errors import InputError, aligned, plural, say
from common.export import PROBABILITIES, ExportSpec
from common.features import stored_features
from common.live import digits
from common.longtail import Augmentation, Phase, Schedule, read_schedule
from common.models.clip import ACTIVATIONS, VARIANTS, cosine_logits
from common.models.raer import (
    STREAMS,
    TUNES,
    WITHOUT_TEXT,
    FixedPrompts,
    RaerModel,
    build_raer,
    describe_random_tower,
    normalization,
    own_classes,
    start,
    streams_of,
    tuned_part,
)
from common.report import figures, page
from common.run import checkpoint, dist
from common.run.card import Card
from common.run.evaluation import Evaluation
from common.run.files import read_json
from common.run.inference import LoadedRun, load_run, restore_flags
from common.run.launch import launch, run_sweep
from common.run.loop import Batch, Loop, Step
from common.run.run import Run, test_best_and_last
from common.run.signals import Signals

CARD = Card(
    name="raer",
    about="Which academic emotion does a clip show? CLIP on the face and on the scene around it; a"
    " schedule in three stages helps the classes of few clips.",
    items="clips",
    stages=("train",),
    headlines={
        "train/test/uar": "UAR on the test clips",
        "train/test/war": "WAR on the test clips",
    },
)
TRAINING = {
    "train": "{data} {train_list} {test_list} {streams} {missing_box} {box_format} {label_base}"
    " {num_frames} {image_size} {backbone} {weights} {activation} {clip_vocab}"
}
STAGE = {"bs": 32, "lr": 1e-2, "wd": 1e-4, "optimizer": "sgd", "warmup_epochs": 0.0}
PRETRAINED_IMAGE_LR = 1e-5  # CLIP-CAER's; a tower that does not start from CLIP trains at --lr
# With SGD, under cosines times CLIP's scale: --lr's 1e-2 costs 8 to 16 points of validation UAR.
FUSION_LR = 1e-3
DEMO = {
    "backbone": "vit_tiny",
    "num_frames": 8,
    "cache_features": True,
    "bs": 16,
    "epochs": 8,
    "optimizer": "adamw",
    "lr": 3e-4,
}
EVAL_FRAMES = 256  # at once
SEARCH = {
    "sgd": {"lr": (1e-3, 0.1), "wd": (1e-6, 1e-2)},
    "adamw": {"lr": (1e-5, 1e-2), "wd": (1e-4, 0.3)},
}
OF_TEXT = ["clip_vocab", "num_context", "prompt_lr", "zero_shot"]
OF_TRAINING = [
    "epochs", "lr", "wd", "warmup_epochs", "optimizer", "image_lr", "prompt_lr", "fusion_lr",
    "method", "schedule", "la_prior", "select", "patience", "tune", "num_context",
    "temporal_layers", "dropout", "augment", "cache_features", "check", "teacher", "search",
]  # fmt: skip
MODEL_FLAGS = ["backbone", "num_frames", "num_context", "temporal_layers", "method"]


def parse_args(argv: list[str] | None = None):
    method = "three-stage"
    table = STAGE | {"epochs": longtail.SCHEDULES[method].epochs}
    parser = config.base_parser(CARD.name, __doc__, {"train": table})
    parser.hide("impl")
    parser.set_help(
        data="clips in a layout of docs/raer.md: a folder, a .zip of one, or `sample`, the embedded"
        " ones",
        lr_schedule="learning rate after the warm-up: falls by the table of --method, or stays the"
        " same",
    )
    group = parser.add_argument_group("clips")
    group.number(
        "--num-frames", int, 16, "frames of a clip, one from each of N equal segments", low=1
    )
    group.choice(
        "--streams",
        STREAMS,
        "both",
        "what is seen of a clip: both the face and the scene, or the face alone, at half the work"
        " and without boxes of bodies",
    )
    for part in ("train", "test"):
        group.add_argument(
            f"--{part}-list",
            metavar="FILE",
            help=f"list of the {part} clips in the place of {part}.txt: lines as there, or"
            " `clip label` (FERV39k, MAFW), or the columns `video_name,label` (DFEW)",
        )
    group.choice(
        "--missing-box",
        raer.MISSING_BOX,
        "error",
        "what a clip without a face box does: end the run, take the whole frame as the face (full),"
        " or be left out (skip)",
    )
    group.number(
        "--label-base",
        int,
        None,
        "what the lists call the first class; unset: as in training, and there 0 where a 0 occurs,"
        " else 1",
        low=0,
        high=1,
    )
    group.choice(
        "--box-format",
        raer.BOX_FORMATS,
        "xyxy",
        "a box's numbers: left, top, and right, bottom (xyxy) or width, height (xywh)",
    )
    group.number(
        "--allow-missing",
        float,
        raer.MOST_MISSING,
        "share of the clips, without frames or damaged, that --on-bad-item skip leaves out at most",
        low=0,
        high=1,
    )
    group.switch(
        "--as-clip",
        "with --predict: images that lie in a folder that is given are the frames of one clip;"
        " unset: each is an item",
    )
    group.number(
        "--face-margin",
        float,
        0.1,
        "how far the face box grows on each side, as a share of its size",
        low=0,
        high=1,
    )
    group.choice(
        "--augment",
        ["clip", "none"],
        None,
        "how training clips vary; clip: all frames alike; unset: clip, but none with"
        " --cache-features",
    )
    group.number(
        "--image-size",
        int,
        None,
        "side of the input, pixels; unset: that of the stored frames, at most 224",
        low=1,
    )
    group.number(
        "--store-size",
        int,
        None,
        "side that frames are decoded to, pixels; unset: their own, at most 256",
        low=8,
    )
    group = parser.add_argument_group("model")
    group.choice(
        "--backbone",
        [*VARIANTS, "resnet18"],
        "vit_b_16",
        "image tower that encodes both the face and the scene",
    )
    group.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="weights to start from: `openai`, CLIP's own (for resnet18 `imagenet`, torchvision's),"
        " downloaded once, or a file: CLIP's or that of a model that has it, for resnet18 the"
        " backbone.pt of a SimCLR run; or a run of this script",
    )
    group.choice(
        "--activation",
        ACTIVATIONS,
        None,
        "activation function of CLIP's weights, where their file does not say it",
    )
    group.switch(
        "--zero-shot",
        "train nothing: what CLIP of --weights answers on the test clips as it is (where it has"
        " text, every run ends with this beside its own figures)",
    )
    group.add_argument(
        "--clip-vocab",
        metavar="FILE",
        help="merges of CLIP's tokenizer; unset: the official file, downloaded once",
    )
    group.choice(
        "--tune",
        TUNES,
        None,
        "what is trained of the image tower; adapter: a residual layer behind it; unset: none, but"
        " full for one of CLIP's towers without --weights, which is random and would stay so",
    )
    group.switch(
        "--cache-features",
        "encode each clip only once; needs a frozen image tower and no augmentation",
    )
    group.number("--num-context", int, 8, "learned tokens in front of a class's description", low=1)
    group.number(
        "--temporal-layers", int, 1, "layers of the temporal transformer of each stream", low=1
    )
    group.number(
        "--dropout",
        float,
        0.1,
        "dropout of the temporal transformers and of the fusion",
        low=0,
        high=0.9,
    )
    group.number(
        "--logit-scale",
        float,
        None,
        "factor of the cosine similarities; unset: that of --weights, or CLIP's initial one",
        above=0,
    )
    group.switch("--checkpoint-blocks", "recompute blocks in backward: slower, with less memory")
    group = parser.add_argument_group("schedule and imbalance")
    group.choice(
        "--method",
        longtail.SCHEDULES,
        method,
        "long-tail method; its table of phases is stretched over --epochs",
    )
    group.add_argument(
        "--schedule",
        metavar="FILE",
        help="TOML or JSON table of phases, and their epochs, that replaces the three stages",
    )
    group.choice(
        "--la-prior",
        ["sampled", "train"],
        "sampled",
        "class shares that adjust the logits: as batches draw them, or as the training set has"
        " them",
    )
    group.choice("--optimizer", ["sgd", "adamw"], STAGE["optimizer"], "optimizer of all parts")
    group.number(
        "--image-lr",
        float,
        None,
        "learning rate of the image tower"
        f" (default: {PRETRAINED_IMAGE_LR} with CLIP's weights, --lr without)",
        low=0,
    )
    group.number(
        "--prompt-lr", float, 1e-3, "learning rate of the learned tokens of --num-context", low=0
    )
    group.number(
        "--fusion-lr",
        float,
        None,
        f"learning rate of the fusion of the streams; unset: {FUSION_LR:g}, at most --lr, with sgd"
        " where the logits are cosines, else --lr",
        low=0,
    )
    group.choice(
        "--select",
        ["uar", "war"],
        "uar",
        "figure on the validation clips by which the best epoch is chosen",
    )
    group.number(
        "--patience",
        int,
        None,
        "validations without a better --select before training stops; unset: it never stops early",
        low=1,
    )
    reading = ["missing_box", "face_margin", "box_format", "allow_missing"]
    args = config.parse(parser, argv, DEMO, SEARCH)
    # A list is that of the data that the run was trained on.
    listed = ["test_list"] if args.eval and args.data is None else []
    args = restore_flags(parser, argv, args, CARD.name, [*reading, "store_size", *listed], DEMO)

    config.check_inference_flags(
        parser, args, [*reading, *(["as_clip"] if args.predict else ["label_base", "test_list"])]
    )
    refuse = partial(config.reject_unused_flags, parser, args)
    if not args.predict:
        refuse(["as_clip"], "without --predict")
    refuse(["impl"], "here: no kernel is used")
    if args.data == "sample" and not (args.eval or args.predict):
        refuse([*reading, "label_base", "train_list", "test_list"], "on the embedded clips")
    if not (args.eval or args.predict) and bool(args.train_list) != bool(args.test_list):
        parser.error("--train-list and --test-list belong together: give both")
    if not args.weights or args.backbone == "resnet18" or args.method in WITHOUT_TEXT:
        refuse(OF_TEXT, "without the text tower of CLIP's weights")
    if args.zero_shot:
        refuse(OF_TRAINING, "with --zero-shot, which trains nothing")
    if args.backbone == "resnet18" or not args.weights:
        refuse(["activation"], "without CLIP's weights")
    if args.method in (*WITHOUT_TEXT, "ldam-drw"):
        refuse(
            ["logit_scale"],
            f"with --method {args.method}, whose logits have no scale, or its loss's own",
        )
    if args.method == "linear-probe":
        refuse(
            ["tune", "temporal_layers", "dropout", "fusion_lr"],
            "with --method linear-probe, a linear layer on frozen features",
        )
    tune = tuned_part(args)
    if args.backbone == "resnet18" or tune != "full":
        refuse(["checkpoint_blocks"], "without a vit_* backbone and --tune full")
    if tune != "full":
        refuse(["image_lr"], f"with --tune {tune}, which freezes the image tower")
    if args.method != "three-stage":
        refuse(["schedule", "la_prior"], f"with --method {args.method}")
    asked = "--cache-features" in config.expanded(parser, argv)
    if args.demo and not asked and (tune == "full" or args.augment == "clip"):
        args.cache_features = False  # what is asked for wins over the demo's own flags
    if args.cache_features and tune == "full":
        parser.error("--cache-features needs a frozen image tower: --tune none or adapter")
    if args.cache_features and args.augment == "clip":
        parser.error(
            "--augment clip has no effect with --cache-features, which encodes each clip once"
        )
    return args, parser


def written_schedule(args) -> Schedule:
    """The table of phases of --schedule or --method, over the epochs that it was written for."""
    return read_schedule(args.schedule) if args.schedule else longtail.SCHEDULES[args.method]


def settings(args) -> dict[str, config.StageConfig]:
    """Resolved settings of the one stage."""
    defaults = STAGE | {"epochs": written_schedule(args).epochs, "optimizer": args.optimizer}
    return {"train": config.stage_config(args, "train", defaults, first=True, lr_of=None)}


def build_data(
    args, path: str | tuple, world: dist.Dist, labels: bool = True, spec: dict | None = None
) -> raer.EmotionClips:
    """The clips of `path`, said in one line; a model's `spec` tells classes and label base."""
    spec = spec or {}
    base = spec.get("label_base") if args.label_base is None else args.label_base
    lists = {"test": args.test_list} if spec else {"train": args.train_list, "test": args.test_list}
    clips = raer.prepare(
        path,
        store_size=args.store_size,
        on_bad_item=args.on_bad_item,
        workers=args.workers,
        missing_box=args.missing_box,
        margin=args.face_margin,
        box_format=args.box_format,
        allow_missing=args.allow_missing,
        labels=labels,
        streams=spec.get("streams", args.streams),
        lists={part: file for part, file in lists.items() if file},
        as_clip=labels or args.as_clip,
        label_base=base,
        known=spec.get("classes"),
        say=world.say,
    )
    group_items(clips, args, CARD.items, world.say)
    return clips


def epoch_batches(run: Run, phase: Phase, epoch: int, done: int = 0) -> list[np.ndarray]:
    """This process's share of an epoch's batches of items, but for the first `done`.

    Item i is clip i % len(clips): a clip that is drawn again has another number.
    """
    clips, seed = run.data, run.args.seed
    train_split = run.splits["train"]
    bs = run.stages["train"].bs
    if phase.sampler == "random":
        return sampling.epoch_batches(train_split, bs, seed, epoch, done, run.world)
    of_class = sampling.class_weights(np.array(run.model_spec["counts"]), phase.cap)
    order = sampling.weighted_order(train_split, of_class[clips.labels[train_split]], seed, epoch)
    return sampling.batch_slices(raer.number_repeats(order, len(clips)), bs, done, run.world)


def validate(
    args, world: dist.Dist, clips, splits: dict, stage: config.StageConfig, table: Schedule
) -> np.ndarray:
    """Refuse what training could not use, before anything is written; returns the training clips of
    each class.
    """
    if stage.bs * args.num_frames == args.accum:
        raise InputError(
            f"--accum {args.accum}: BatchNorm needs two frames a chunk; lower it, or raise --bs"
        )
    counts = np.bincount(clips.labels[splits["train"]], minlength=len(clips.classes))
    sampling.check_batch("train", stage.bs, len(splits["train"]), world.world_size * args.accum)
    longtail.check(table, counts, args.la_prior, world.say)
    if (args.cache_features or args.augment == "none") and table.augmentation != Augmentation():
        raise InputError(
            f"--schedule {args.schedule}: its augmentation has no effect with --cache-features or"
            " --augment none; leave one out"
        )
    return counts


def build_model(run: Run, published=None) -> RaerModel:
    """The network on the device, with the weights `published`; the random part is a function of
    --seed.
    """
    torch.manual_seed(run.args.seed)
    model = build_raer(run.model_spec, run.args.dropout, published)
    model = dist.sync_batchnorm(model, run.world).to(run.world.device)
    if run.args.checkpoint_blocks:
        model.image.checkpoint_blocks = True
    if run.args.compile:
        model.compile()
    return model


def build_optimizer(run: Run, model: RaerModel) -> torch.optim.Optimizer:
    """One or two groups a part, each with the part's own peak rate."""
    stage, groups, parts = run.stages["train"], [], model.parts()
    fusion_lr = run.model_spec.get("fusion_lr", run.args.fusion_lr)
    if fusion_lr is not None:
        parts["temporal"] = [part for part in parts["temporal"] if part is not model.fusion]
        parts["fusion"] = [model.fusion]
    for part, modules in parts.items():
        if any(p.requires_grad for module in modules for p in module.parameters()):
            rate = {
                "temporal": stage.lr,
                "image": run.model_spec["image_lr"],
                "prompts": run.args.prompt_lr,
                "fusion": fusion_lr,
            }[part]
            groups += [g | {"lr": rate} for g in optim.param_groups(modules, stage.wd)]
    return optim.build_optimizer(stage.optimizer, groups, lr=stage.lr)


def fetch(
    run: Run,
    batches: list[np.ndarray],
    epoch: int | None = None,
    cached: Tensor | None = None,
) -> Iterator[Batch]:
    """The batches of items, item i is clip i % len(clips), and their labels, on the device.

    Inputs are the faces and contexts, each uint8 (n, T, 3, h, h), of the frames that `epoch` draws
    or, in evaluation (None) and with --cache-features, of those in the middle of their segments; or
    else rows of `cached`, the features of all clips.
    """
    clips, device = run.data, run.world.device
    labels = torch.from_numpy(clips.labels)
    if cached is None:
        wanted = [frame_numbers(run, items, epoch) for items in batches]
        inputs = clips.batches(wanted, run.args.workers)
    else:
        inputs = (cached[items % len(clips)] for items in batches)
    for items, x in zip(batches, inputs, strict=True):
        parts = [amp.to_device(part, device) for part in ([x] if cached is not None else x)]
        targets = amp.to_device(labels[items % len(clips)], device)
        yield Batch(parts[0] if cached is not None else tuple(parts), items, targets, epoch)


def frame_numbers(run: Run, items: np.ndarray, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The clips (n,) of items and the numbers (n, T) of their frames."""
    clips, length = items % len(run.data), run.model_spec["num_frames"]
    if epoch is None or run.args.cache_features:
        return clips, run.data.eval_frames(clips, length)
    return clips, run.data.train_frames(items, run.args.seed, epoch, length)


def frames_of(run: Run, batch: Batch) -> Tensor:
    """The model's input: normalized frames (n, 2, T, 3, s, s) of the streams, augmented in
    training by one draw for all frames of both; or cached features as they are.
    """
    if isinstance(batch.inputs, Tensor):
        return batch.inputs
    args, size = run.args, run.model_spec["image_size"]
    as_stored = batch.epoch is None or args.augment == "none" or args.cache_features
    mean, std = normalization(run.model_spec)
    views = []
    for stream in batch.inputs:
        count, length, _, side, _ = stream.shape
        frames = stream.flatten(0, 1)
        if as_stored:
            x = augment.resize(frames, size)
        else:
            vary = run.schedule.augmentation
            params = vary.params(args.seed, batch.epoch, batch.items, side)
            x = augment.make_view(frames, params.repeat(length), size)
        views.append(augment.normalize(x, mean, std).unflatten(0, (count, length)))
    return torch.stack(views, 1)


def loss_terms(
    run: Run, model: RaerModel, phase: Phase, output, targets: Tensor
) -> dict[str, Tensor]:
    """The weighted terms of the loss by name."""
    args, counts = run.args, np.array(run.model_spec["counts"])
    return longtail.loss_terms(args.method, phase, counts, args.la_prior, model, output, targets)


def train_step(run: Run, model, optimizer, scaler, batch: Batch) -> Step:
    """One update by the phase of the batch's epoch.

    With --accum K the gradient is the whole batch's, but for BatchNorm.
    """
    accum, device = run.args.accum, run.world.device
    phase = run.schedule.at(batch.epoch)
    totals: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    for k, chunk in enumerate(batch.chunks(accum)):
        x = frames_of(run, chunk)
        # A teacher of features has its answers by item.
        items = chunk.items if isinstance(chunk.inputs, Tensor) else None
        with amp.reduce_gradients(model, last=k + 1 == accum):
            with amp.autocast(run.args.precision, device):
                output = model(x)
            terms = loss_terms(run, dist.unwrap(model), phase, output, chunk.labels)
            terms = add_distillation(run, terms, output[0], x, items)
            terms = {name: value / accum for name, value in terms.items()}
            loss = sum(terms.values())
            scaler.scale(loss).backward()
        for name, value in (terms | {"loss": loss}).items():
            totals[name] = totals.get(name, 0) + value.detach()
    norm, bad = amp.guarded_step(optimizer, scaler, totals["loss"], run.args.clip_grad)
    return Step(totals, norm, bad)


@torch.no_grad()
def evaluate(
    run: Run,
    model: RaerModel,
    indices: np.ndarray,
    cached: Tensor | None = None,
    progress=None,
    outputs: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Raw logits (n, K) of clips `indices` (n,), float32 on the CPU, by the model in evaluation
    mode; or what another function than its `forward` gives, `outputs`.
    """
    model.eval()
    shard = dist.shard(indices, run.world)
    frames = run.model_spec["num_frames"] * len(streams_of(run.model_spec))
    parts = np.array_split(shard, -(-len(shard) * frames // EVAL_FRAMES))
    parts = [part for part in parts if len(part)]
    with Evaluation(progress, model, parts, "encoding" if outputs else "") as done:
        for batch in fetch(run, done.left, None, cached):
            x = frames_of(run, batch)
            with amp.autocast(run.args.precision, run.world.device):
                y = (outputs(x) if outputs else model(x)[0]).float()
            done.add(y)
    rows = done.rows(len(indices))
    amp.require_finite(rows, "outputs")
    return rows


def score(run: Run, prefix: str, indices: np.ndarray, scores: Tensor, say=None) -> dict:
    """`metrics.emotions` named `PREFIX/uar` and so on; `say` gets the alarm of a model that gives
    one answer.
    """
    classes, counts = run.model_spec["classes"], run.model_spec["counts"]
    labels = run.data.labels[indices]
    predicted = scores.argmax(1).numpy()
    groups = groups_of(run.data, indices)
    values = metrics.emotions(labels, predicted, counts, classes, run.args.seed, groups)
    if say and len(set(predicted)) == 1:
        say(
            f"alarm: {prefix}: all {len(labels)} clips are called {classes[predicted[0]]}: the"
            f" model predicts one class, UAR {values['uar']:.1%}, WAR {values['war']:.1%}: nothing"
            " is learned about the other classes"
        )
    return {f"{prefix}/{name}": value for name, value in values.items()}


def audit_phases(run: Run, model: RaerModel, cached: Tensor | None = None) -> list[str]:
    """What the audit of every phase's settings finds, three steps each on a copy."""
    phases = run.schedule.phases
    return [problem for phase in phases for problem in audit_phase(run, model, phase, cached)]


def audit_phase(run: Run, model: RaerModel, phase: Phase, cached: Tensor | None) -> list[str]:
    """What the audit of a phase finds; its batches are chunks of the phase's first."""
    first = epoch_batches(run, phase, phase.start)[:3]
    chunks = [items[: len(items) // run.args.accum] for items in first]
    batches = list(fetch(run, chunks, phase.start, cached))

    def optimizer_of(network):
        network.train()
        network.choose_trained(phase.trains == "classes")
        return build_optimizer(run, network)

    def terms_of(network, k):
        batch = batches[k % len(batches)]
        x = frames_of(run, batch)
        with amp.autocast(run.args.precision, run.world.device):
            output = network(x)
        return loss_terms(run, network, phase, output, batch.labels)

    return audit.check_setting(f"epochs from {phase.start}", model, optimizer_of, terms_of)


def train(run: Run, published) -> None:
    """Train by the schedule, validate every --eval-every epochs, and test the epoch of the best
    --select on the validation split.
    """
    args, world, log, clips = run.args, run.world, run.log, run.data
    stage = run.stages["train"]
    val, test_split = run.splits["val"], run.splits["test"]
    counts = np.array(run.model_spec["counts"])
    model = build_model(run, published)
    optimizer = build_optimizer(run, model)
    scaler = amp.scaler(args.precision, world.device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    # This command's rates: a restored state brings its own.
    peaks = [group["lr"] for group in optimizer.param_groups]
    progress = run.open_stage("train", parts, start=run.model_spec["weights"] or "random")
    if run.is_done(progress):
        return
    steps = len(run.splits["train"]) // stage.bs
    log.say(
        stage.describe(plural(len(run.splits["train"]), "clip"), steps) + f"; {args.method}:",
        *run.schedule.describe().split("\n"),
    )
    log.say(model.describe())
    if model.prompts is None and any(p.mi or p.smoothing for p in run.schedule.phases):
        log.say(
            "no pretrained text: smoothed targets are uniform; the MI loss, of prompts and texts,"
            " is off"
        )
    cached = encode(run, model, progress) if args.cache_features else None
    loop = Loop(run, progress, steps=steps, unit="clip", patience=args.patience)
    loop.foresee(train_step, partial(fetch, run, cached=cached), run.splits["train"])
    if progress.step == 0:
        with run.signals.at_once():
            audit.refuse(audit_phases(run, model, cached))
        log.say(
            f"audit of {plural(len(run.schedule.phases), 'phase')}, 3 steps each: what is to train"
            " moves, every loss term has a gradient"
        )

    trained = trains = None
    for epoch in loop.epochs():
        phase = run.schedule.at(epoch)
        if phase.trains != trains:
            model.choose_trained(phase.trains == "classes")
            trained_before = run.schedule.at(max(epoch - 1, 0)).trains
            if progress.batch == 0 and (trained_before, phase.trains) == ("all", "classes"):
                model.reset_classes(optimizer)
            trained = dist.wrap(model, world)
            trains = phase.trains
        model.train()
        batches = epoch_batches(run, phase, epoch, progress.batch)
        for batch in loop.batches(fetch(run, batches, epoch, cached)):
            lr = optim.set_rates(optimizer, peaks, stage, progress.step, steps, phase.lr)
            step = train_step(run, trained, optimizer, scaler, batch)
            loop.end_step(step, lr)
        values = {f"train/train/{name}": progress.mean(name) for name in sorted(progress.sums)}
        if loop.is_eval_epoch():
            logits = evaluate(run, model, val, cached, progress)
            tau = longtail.best_tau(args.method, counts, model, logits, clips.labels[val])
            scores = longtail.decide(args.method, counts, model, logits, tau)
            values |= score(run, "train/val", val, scores, log.say) | {"train/val/tau": tau}
            value = values[f"train/val/{args.select}"]
            progress.select(value, model.state_dict(), values, higher_is_better=True)
            progress.results = values
        loop.end_epoch(values | phase.values("train/schedule/"))

    def test(network, selected):
        logits = evaluate(run, network, test_split, cached, progress)
        tau = selected["train/val/tau"]
        scores = longtail.decide(args.method, counts, network, logits, tau)
        return score(run, "train/test", test_split, scores, log.say), scores

    results, scores = test_best_and_last(progress, model, test)
    results |= zero_shot(run, model, published, cached, progress)[0]
    figures.classified(run, "train", test_split, scores, clips.labels[test_split], clips.classes)
    log.metrics("train", progress.step, progress.epoch, results)
    run.finish(progress, progress.results | results)


def zero_shot(
    run: Run, model: RaerModel, published, cached: Tensor | None = None, progress=None
) -> tuple[dict, dict[str, Tensor]]:
    """What CLIP answers on the test clips as --weights has it: UAR and WAR by one text a class and
    by several, and the cosines (n, K) of both; nothing where it has no text.
    """
    classes, test_split = own_classes(published), run.splits["test"]
    if not classes:
        return {}, {}
    if run.model_spec["tune"] == "full":
        model = build_model(run, published)
    features = evaluate(run, model, test_split, cached, progress, model.mean_features)
    cosines = {name: cosine_logits(features, texts, 1.0) for name, texts in classes.items()}
    results = {}
    for name, scores in cosines.items():
        labels, answers = run.data.labels[test_split], scores.argmax(1).numpy()
        found = metrics.long_tail(labels, answers, len(run.data.classes))
        results |= {f"train/test/{name}_{metric}": found[metric] for metric in ("uar", "war")}
    return results, cosines


def test_untrained(run: Run, published) -> None:
    """--zero-shot: the figures of CLIP as it is, by one text a class, by several beside them."""
    results, cosines = zero_shot(run, build_model(run, published), published)
    test_split, labels = run.splits["test"], run.data.labels
    scores = cosines["zero_shot"]
    results = {name: value for name, value in results.items() if "templates" in name}
    results |= score(run, "train/test", test_split, scores, run.log.say)
    figures.classified(run, "train", test_split, scores, labels[test_split], run.data.classes)
    run.log.metrics("train", 0, 0, results)
    run.results |= results


def encode(run: Run, model: RaerModel, progress) -> Tensor:
    """Features (n, 2, T, d) of the middle frames of all clips by the frozen tower, kept in
    features.npz.
    """
    args, length = run.args, run.model_spec["num_frames"]
    everything = np.arange(len(run.data))

    def flat_features(x: Tensor) -> Tensor:
        return model.encode(x).flatten(1)

    compute = partial(evaluate, run, model, everything, None, progress, flat_features)
    streams = len(streams_of(run.model_spec))
    digest = checkpoint.weights_digest(model.image.state_dict())
    made_with = (
        f"{digest} {length} {args.face_margin} {args.precision} {len(everything)}"
        f" {run.model_spec['activation']} {normalization(run.model_spec)}"
        f" {run.world.device.type} {streams}"
    )
    rows = stored_features(run, made_with, compute)
    return rows.view(len(rows), streams, length, -1)


class StreamView(NetworkView):
    """How --check looks into the network: an item is a clip of two streams, and all of its frames
    must matter in both.
    """

    def __init__(self, run: Run, size: int):
        frames = run.model_spec["num_frames"] * len(streams_of(run.model_spec))
        super().__init__(
            run,
            size=size,
            eval_batch=EVAL_FRAMES // frames,
            parts=frames,
            normalization=normalization(run.model_spec),
        )

    def rows(self, output) -> Tensor:
        return output[0]

    def augmented_part(self, calls: list[tuple], count: int) -> Tensor:
        return calls[0][0].unsqueeze(1)

    def stored_pixels(self, samples: np.ndarray) -> Tensor:
        (batch,) = fetch(self.run, [samples])
        return torch.stack(batch.inputs, 1).flatten(0, 2)

    def largest_logits(self, model: RaerModel) -> float:
        scale = self.run.model_spec["scale"]
        if scale is None:
            return 0.75  # inner products start at 0.1
        return 3 * scale / math.sqrt(model.class_features().shape[1])  # random directions, times 3

    def entry(self, model: RaerModel, call: tuple) -> list[Tensor]:
        # A frozen tower lets no gradient through: what it gives is where the trained part begins.
        return [call[0] if self.run.model_spec["tune"] == "full" else model.encode(call[0])]


def check_spec(run: Run, published) -> CheckSpec:
    """The first phase in the terms of --check. Cached features are made there a batch at a time."""
    args, stage, spec = run.args, run.stages["train"], run.model_spec
    audit_run = run
    phase = run.schedule.phases[0]
    run = replace(run, schedule=replace(run.schedule, epochs=stage.epochs, phases=(phase,)))
    larger = run.with_spec(temporal_layers=1 + spec["temporal_layers"])
    return CheckSpec(
        run=run,
        stage="train",
        splits=("train", "val"),
        build=partial(build_model, run, published),
        fetch=partial(fetch, run),
        step=train_step,
        evaluate=partial(evaluate, run),
        loss=partial(
            reference.long_tail,
            method=args.method,
            phase=run.schedule.at(0),
            which=args.la_prior,
            spec=spec,
        ),
        augmented=not args.cache_features and args.augment != "none",
        view=StreamView(run, size=min(8, stage.bs)),
        labels=run.data.labels,
        batches=partial(epoch_batches, run, phase),
        optimizer=partial(build_optimizer, run),
        audit=partial(audit_phases, audit_run),
        larger=None if args.method == "linear-probe" else partial(build_model, larger, published),
    )


def run_inference(args, world: dist.Dist) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv of clips without
    labels.
    """
    source = args.eval or args.resume
    if checkpoint.config_of(source).get("zero_shot"):
        raise InputError(
            f"{source} is a run of --zero-shot, which trains no model; its figures stand in"
            " summary.json, and --zero-shot --weights with other --data gives more"
        )
    loaded = load_run(args, CARD)
    spec = loaded.model_spec
    tau = tau_of(loaded)
    clips = build_data(args, loaded.path, world, labels=bool(args.eval), spec=spec)
    if args.eval and clips.classes != spec["classes"]:
        there, known = (", ".join(names) for names in (clips.classes, spec["classes"]))
        raise InputError(
            f"{clips.name} has the classes {there}, the model {known}; count them in classes.txt"
            " and the lists as the model does"
        )
    run = loaded.as_run(args, world, clips, {})
    model = loaded.with_weights(partial(build_model, run))
    if args.predict:
        loaded.say_who_answers(world, spec["classes"])
    indices = np.arange(len(clips))
    if args.eval:
        indices = raer.split(clips, ["test"], world.say)["test"]
    logits = evaluate(run, model, indices)
    scores = longtail.decide(spec["method"], np.array(spec["counts"]), model, logits, tau)
    if args.eval:
        values = score(run, "eval/test", indices, scores, run.log.say)
        loaded.write(values, world, (clips, indices, spec["classes"], scores.softmax(1)))
        if spec["tokens"] is not None:
            world.say(
                "without CLIP's own answers (zero_shot), for which a run keeps no towers:"
                " --zero-shot --weights gives them"
            )
        return
    loaded.write_predictions(world, clips.ids, spec["classes"], scores.softmax(1))


def tau_of(loaded: LoadedRun) -> float:
    """The strength of what `longtail.decide` does, which validation has chosen."""
    tau = loaded.state["metrics"].get("train/val/tau")
    if tau is None:
        raise InputError(
            f"{loaded.source} was saved before its first validation; train on, or name best.pt"
        )
    return tau


def export_spec(args, world: dist.Dist) -> ExportSpec:
    """The model of a checkpoint in the terms of common.export."""
    loaded = load_run(args, CARD)
    spec = loaded.model_spec
    tau, counts = tau_of(loaded), np.array(spec["counts"])
    run = loaded.as_run(args, world, None, {})
    model = loaded.with_weights(partial(build_model, run))
    if model.prompts is not None:
        model.prompts = FixedPrompts(model.eval().class_features().detach())

    def answer(network: RaerModel, x: Tensor) -> Tensor:
        return longtail.decide(spec["method"], counts, network, network(x)[0], tau).softmax(1)

    squares = list(raer.SQUARES.items())[: len(streams_of(spec))]
    clip = f"the middle frame of each of {spec['num_frames']} equal parts of a clip; of each:"
    return ExportSpec(
        model=model,
        answer=answer,
        inputs={name: f"{clip} {text}" for name, text in squares},
        frames=spec["num_frames"],
        size=spec["image_size"],
        normalization=normalization(spec),
        output=PROBABILITIES,
        classes=spec["classes"],
        facts={"method": spec["method"], "tau": tau, "face_margin": args.face_margin},
    )


def run_training(parser, args, world: dist.Dist, signals: Signals) -> None:
    """Train: read the data, settle what the run is, and run its one stage."""
    written = written_schedule(args)
    stages = settings(args)
    stage = stages["train"]
    schedule = written.scaled(stage.epochs, constant=args.lr_schedule == "constant")
    clips = build_data(args, args.data, world)
    splits = raer.split(clips, say=world.say)
    counts = validate(args, world, clips, splits, stage, schedule)
    published, model_facts, weights_text = start(
        args, clips.store_size, clips.classes, clips.descriptions
    )
    if args.weights and model_facts["tokens"] is None:
        without = f"with --weights {args.weights}, which has no text tower"
        config.reject_unused_flags(parser, args, OF_TEXT, without)
    if args.zero_shot and not own_classes(published):
        raise InputError(
            f"--zero-shot: --weights {args.weights} is a run, not CLIP as it came; give CLIP's"
        )
    image_lr = args.image_lr
    if image_lr is None:
        from_clip = args.weights and args.backbone != "resnet18"
        image_lr = PRETRAINED_IMAGE_LR if from_clip else stage.lr
    spec = dict(
        script=CARD.name,
        classes=clips.classes,
        schedule=written.as_list(),
        **{name: getattr(args, name) for name in MODEL_FLAGS},
        tune=tuned_part(args),
        counts=counts.tolist(),
        **model_facts,
        image_lr=image_lr,
    )
    if args.streams != "both":
        spec["streams"] = args.streams
    # A key of its own: runs from before, with another default, are others.
    cosines = args.method not in WITHOUT_TEXT and not args.zero_shot
    if cosines and args.fusion_lr is None and stage.optimizer == "sgd":
        spec["fusion_lr"] = min(FUSION_LR, stage.lr)
    same = ("image_size", "classes", "num_frames", "streams", normalization)
    teacher, teacher_id = distill.read(args, spec, same)
    run = Run.open(
        args,
        world,
        signals,
        clips,
        splits,
        # What the lists call classes is no other run's: it names none.
        spec | {"label_base": clips.label_base},
        stages,
        card=replace(CARD, following=TRAINING) if args.zero_shot else CARD,
        chance=chance_levels(args, clips.classes),
        name=f"{args.backbone}-{args.method}-bs{stage.bs}",
        identity=config.run_id(
            parser, args, data=clips.fingerprint, stage="train", **spec, **teacher_id
        ),
        input_text=f"input {spec['image_size']} px",
    )
    run.schedule = schedule
    distill.attach_teacher(run, teacher, build_model, teacher_logits, evaluate)
    weights_text = weights_text or describe_random_tower(args, stage.bs)
    run.log.say(*weights_text.split("\n"), clips.describe_frames(args.num_frames))
    if args.check:
        return check(run, {"train": check_spec(run, published)})
    figures.put_tables(run, {"Schedule": longtail.schedule_table(schedule)})
    with run.session(page):
        test_untrained(run, published) if args.zero_shot else train(run, published)


def teacher_logits(model: RaerModel, x: Tensor) -> Tensor:
    """Logits (n, K) of a teacher on the student's own input."""
    return model(x)[0]


def chance_levels(args, classes: list[str]) -> dict[str, tuple[str, float]]:
    """The label and the loss of a guess, where the loss has no margins."""
    if args.method == "ldam-drw":
        return {}
    return {"train": (f"a guess, ln {len(classes)}", math.log(len(classes)))}


def run_demo(parser, argv: list[str] | None, args) -> bool:
    """--demo alone: cross-entropy and the three stages on the same features, and both figures.

    Returns whether that was asked for; with --method and in other modes --demo is one run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    words = [word.partition("=")[0] for word in config.expanded(parser, argv)]
    others = ("method", "schedule", "eval", "predict", "check", "search", "max_steps")
    here = args.resume in ("auto", "none")
    if not (args.demo and here) or any(f"--{name.replace('_', '-')}" in words for name in others):
        return False
    columns = {"majority class": []}
    for method in ("ce", "three-stage"):
        out = ["--out", str(Path(args.out, method))] if args.out else []
        main([*argv, *out, "--method", method])
        summary = read_json(Run.latest / "summary.json") or {}
        columns[method] = [summary.get(name) for name in CARD.headlines]
    columns["majority class"] = [summary.get(f"train/test/majority_{x}") for x in ("uar", "war")]
    shown = [["-" if x is None else digits(x) for x in column] for column in columns.values()]
    rows = zip(CARD.headlines.values(), *shown, strict=True)
    if dist.launched_first():
        say(*aligned([["", *columns], *map(list, rows)]).split("\n"))
    return True


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    if run_sweep(main, parser, argv, args, SEARCH, "uar") or run_demo(parser, argv, args):
        return 0
    return launch(parser, args, run_inference, run_training)


if __name__ == "__main__":
    sys.exit(main())
