"""TSM on face clips: is a video real or manipulated?

A MobileNetV4 whose blocks exchange channels between frames.

Lin et al., TSM: Temporal Shift Module for Efficient Video Understanding, arXiv:1811.08383.
Qin et al., MobileNetV4: Universal Models for the Mobile Ecosystem, arXiv:2404.10518.

From published weights, best on a GPU:
  python train_tsm.py --data ffpp/ --compression c23 --weights mobilenetv4_conv_medium.safetensors
Without the shift:
  python train_tsm.py --data ffpp.zip --backbone conv_small --image-size 112 --shift none
The test again:
  python train_tsm.py --data ffpp/ --eval RUN
Frame by frame, with a RUN that was trained with --direction past:
  python train_tsm.py --stream frames/ --resume RUN
Small, on embedded clips, in minutes on two CPU cores:
  python train_tsm.py --demo

A block's input exchanges channels with the neighboring frames before its convolutions: with
--fold-div 8 an eighth comes from the next frame and an eighth from the previous one, 2/8 in all;
with 4, the recipe's choice, it is half of the channels. It costs no arithmetic, only memory
traffic.
"""

import common  # noqa: F401  # isort: skip  (it refuses an older Python)
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, config, distill, metrics, optim
from common.check import reference
from common.check.result import CheckSpec, NetworkView
from common.check.runner import check
from common.data import augment, faceforensics, sampling
from common.data.clips import VideoFiles
from common.data.groups import group_items
from common.data.images import SQUARE, existing
from common.data.pack import PackedImages
from common.data.perturb import LEVELS, perturb
from common.distill import add_distillation
from common.errors import InputError, as_input_error, only_warn, plural, say
from common.export import PROBABILITIES, ExportSpec
from common.live import digits
from common.losses import focal_bce
from common.models.heads import AGGREGATES, HEAD_BIAS, init_bias_to_prior
from common.models.mobilenet_v4 import VARIANTS, build_mobilenet_v4, load_published
from common.models.tsm import (
    PLACEMENTS,
    ClipModel,
    Shift,
    Stream,
    freeze_bn,
    grad_cam,
    start_weights,
    training_memory,
)
from common.report import figures, page
from common.run import checkpoint, dist
from common.run.card import Card
from common.run.directory import output_folder
from common.run.evaluation import Evaluation
from common.run.files import write_new
from common.run.inference import (
    LoadedRun,
    load_run,
    names_of_data,
    restore_flags,
    warn_of_known,
)
from common.run.launch import launch, run_sweep
from common.run.loop import Batch, Loop, Step
from common.run.run import Run, test_best_and_last
from common.run.signals import Signals
from kernels import shift_conv1x1, shift_step, temporal_shift

CARD = Card(
    name="tsm",
    about="Is a face video real or manipulated? MobileNetV4 whose blocks exchange channels between"
    " frames (TSM).",
    items="clips",
    stages=("train",),
    headlines={
        "train/test/video_auc": "AUC of the test videos",
        "train/test/video_accuracy": "accuracy on the test videos",
    },
)
# What the head of the report says, too, with --allow-shared-persons.
SHARED = (
    " Trained with --allow-shared-persons: persons of the test split may have been trained on, and"
    " the scores say little about others."
)
STAGE = {"epochs": 30, "bs": 64, "lr": 3e-4, "wd": 0.01, "optimizer": "adamw"}
KERNELS = {"residual": temporal_shift, "expand": shift_conv1x1, "none": None}
DEMO = {
    "backbone": "conv_small_035",
    "image_size": 32,
    "bs": 24,
    "accum": 1,
    "epochs": 24,
    "lr": 3e-3,
    "eval_every": 3,
    "clips": 2,
    "sampler": "balanced",
}
SEARCH = {"lr": (3e-5, 3e-3), "wd": (1e-4, 0.3)}
MODEL_FLAGS = [
    "backbone",
    "shift",
    "n_segment",
    "fold_div",
    "direction",
    "padding",
    "aggregate",
    "clip_seconds",
]
READING = ["compression", "fps", "frames_root", "face"]  # flags of how data are read
SCORING = ["split", "clips", "store_size", "on_bad_item"]  # and of what is scored
FREEZE_BN = 0.33  # of the recipe, with --weights
MIN_SIZE = 32  # the stride of MobileNetV4: a smaller frame leaves less than one pixel
EVAL_FRAMES = 256  # at once


def parse_args(argv: list[str] | None = None):
    parser = config.base_parser(CARD.name, __doc__, {"train": STAGE})
    parser.set_defaults(accum=2, eval_every=2)  # the recipe's
    parser.evaluate_several()
    parser.set_help(
        data="videos in a layout of docs/tsm.md: a folder, a .zip of one, a .csv or .json list, a"
        f" .packed file, or embedded ones: {', '.join(faceforensics.SAMPLES)}; with --eval several"
    )
    group = parser.add_argument_group("clips")
    group.add_argument(
        "--compression",
        metavar="LEVEL",
        help="read this level of compression alone, such as c23; unset or `all`: all that are"
        " there, and in evaluation that of training where it is there",
    )
    group.add_argument(
        "--frames-root",
        metavar="DIR",
        help="folder or .zip of the frames that a .json or .csv of --data lists; unset: where it"
        " lies",
    )
    group.choice(
        "--face", faceforensics.FACES, "largest", "which of several faces of a frame is taken"
    )
    group.switch(
        "--allow-shared-persons",
        "train although the data's own splits share persons, and hold out pairs, not persons",
    )
    group.choice(
        "--split",
        ["val", "test", "all"],
        None,
        "videos that --eval scores; unset: the test split, and all where the data name none",
    )
    group.choice(
        "--perturb",
        [*LEVELS, "all"],
        None,
        "with --eval: score the videos again at five levels of this change of their frames",
    )
    group.number(
        "--fps",
        float,
        25.0,
        "frames a second of the videos whose frames are in folders, numbered as in the video",
        above=0,
    )
    group.number("--n-segment", int, 8, "frames of a clip", low=1)
    group.number("--clip-seconds", float, 2.0, "time that a clip covers, seconds", above=0)
    group.number("--train-clips", int, 1, "clips drawn from each training video in an epoch", low=1)
    group.number(
        "--clips", int, 3, "clips of each video in evaluation; their mean is its score", low=1
    )
    group.choice(
        "--augment",
        ["clip", "none"],
        "clip",
        "how training clips vary; clip: mirrored and color-jittered, all frames alike",
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
    group.choice("--backbone", VARIANTS, "conv_medium", "variant of MobileNetV4")
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="weights to start from: published ones (.safetensors, .pt) or a run's best.pt",
    )
    group.choice(
        "--shift",
        PLACEMENTS,
        "residual",
        "what reads the shifted channels: the residual branch as a whole, its expansion only, or"
        " nothing",
    )
    group.number(
        "--fold-div",
        int,
        4,
        "1/N of the channels comes from each neighboring frame: with 4, half of them move",
        low=1,
        high=32,  # no block that shifts has fewer channels
    )
    group.choice(
        "--direction",
        ["both", "past"],
        "both",
        "frames that channels come from; past: the previous one only, as --stream needs",
    )
    group.choice(
        "--padding",
        ["zero", "replicate", "circulant"],
        "zero",
        "what stands for the frames before and after a clip",
    )
    group.choice(
        "--aggregate", AGGREGATES, "attention", "how the features of a clip's frames become one"
    )
    group.choice(
        "--head-bias",
        HEAD_BIAS,
        HEAD_BIAS[0],
        "bias that the last layer starts with; prior: the shares of the classes",
    )
    group.number("--dropout", float, 0.3, "dropout of the frames' features", low=0, high=1)
    group.switch("--dropout2d", "drop whole channels of the last feature map instead")
    group.number(
        "--freeze-bn",
        float,
        None,
        "share of the BatchNorm layers, from the first on, that stay as they are; unset:"
        f" {FREEZE_BN} with --weights, else none",
        low=0,
        high=1,
    )
    group.switch("--checkpoint-blocks", "recompute blocks in backward: slower, with less memory")
    group = parser.add_argument_group("loss and imbalance")
    group.choice("--loss", ["focal_bce", "bce"], "focal_bce", "loss of a clip")
    group.number(
        "--gamma", float, 2.0, "focusing exponent of focal_bce: easy clips count less", low=0
    )
    group.number(
        "--alpha",
        float,
        None,
        "weight of fake in focal_bce, and 1 - X of real; unset: both weigh 1",
        low=0,
        high=1,
    )
    group.add_argument(
        "--pos-weight",
        type=parse_pos_weight,
        metavar="{none,auto,X}",
        default="none",
        help="weight of fake in the loss; auto: real videos / fake videos",
    )
    group.choice(
        "--sampler",
        ["none", "balanced"],
        "none",
        "how batches are drawn; balanced: as many real as fake clips in each",
    )
    group.switch(
        "--allow-double-balance", "let two of --alpha, --pos-weight and --sampler act at once"
    )
    group = parser.add_argument_group("schedule and stopping")
    group.number("--min-lr", float, 3e-5, "learning rate at the end of the cosine", low=0)
    group.number(
        "--patience",
        int,
        10,
        "validations without a better video AUC before training stops",
        low=1,
    )
    group.number(
        "--min-delta", float, 0.002, "least gain in video AUC that counts as better", low=0
    )
    group.switch(
        "--stop-on-interval",
        "count a validation as better if the AUC's confidence interval lies above the best AUC",
    )
    group.add_argument(
        "--stream",
        metavar="FOLDER",
        help="score one sequence of frames, frame by frame, with the run that --resume names",
    )
    args = config.parse(parser, argv, DEMO, SEARCH)
    args = restore_flags(
        parser, argv, args, CARD.name, ["clips", "fps", "face", "store_size"], DEMO
    )

    config.check_inference_flags(parser, args, [*READING, *SCORING, "perturb", "impl"])
    refuse = partial(config.reject_unused_flags, parser, args)
    if not args.eval:
        refuse(["split", "perturb"], "without --eval")
    if args.stream:
        refuse(["clips", "compression", "frames_root"], "with --stream")
    elif args.predict:
        refuse(["frames_root"], "with --predict")
    if args.weights and args.freeze_bn is None:
        args.freeze_bn = FREEZE_BN
    elif not args.weights:
        refuse(["freeze_bn"], "without --weights: random layers have to learn their statistics")
    if args.shift == "none":
        refuse(["fold_div", "direction", "padding", "impl"], "with --shift none")
    if args.loss == "bce":
        refuse(["gamma", "alpha"], "with --loss bce")
    if args.lr_schedule == "constant":
        refuse(["min_lr"], "with --lr-schedule constant")
    if args.dropout == 0:
        refuse(["dropout2d"], "with --dropout 0")
    if args.stop_on_interval:
        refuse(["min_delta"], "with --stop-on-interval, which decides by the interval")
    corrections = {
        "--alpha": args.alpha is not None,
        "--pos-weight": args.pos_weight != "none",
        "--sampler": args.sampler != "none",
    }
    given = [flag for flag, is_given in corrections.items() if is_given]
    if len(given) < 2:
        refuse(["allow_double_balance"], "without two of --alpha, --pos-weight and --sampler")
    elif not args.allow_double_balance:
        parser.error(
            f"{' and '.join(given)} correct one imbalance twice; give one of them, or"
            " --allow-double-balance"
        )
    return args, parser


def parse_pos_weight(text: str):
    """--pos-weight: `none`, `auto` or a positive number."""
    return text if text in ("none", "auto") else config.number(float, above=0)(text)


def settings(args) -> dict[str, config.StageConfig]:
    """Resolved settings of the one stage."""
    defaults = STAGE | {"min_lr": args.min_lr}
    return {"train": config.stage_config(args, "train", defaults, first=True, lr_of=None)}


def build_data(
    args, path: str | tuple, world: dist.Dist, labels: bool = True, of_run: dict | None = None
) -> faceforensics.FaceVideos:
    """The videos of `path`, said in one line.

    Args:
        of_run: the flags of a run that is evaluated: its compression is read where that is there
            and --compression is not given, and of its own data its --frames-root.
    """
    of_run = of_run or {}
    own_root = of_run.get("frames_root") if is_same_path(path, of_run.get("data")) else None
    return faceforensics.prepare(
        path,
        store_size=args.store_size,
        on_bad_item=args.on_bad_item,
        workers=args.workers,
        fps=args.fps,
        compression=args.compression,
        preferred=of_run.get("compression"),
        frames_root=args.frames_root or own_root,
        face=args.face,
        labels=labels,
        say=world.say,
    )


def refuse_unread(parser, args, videos: faceforensics.FaceVideos) -> None:
    """Refuse flags of how data are read that these data have no use for."""
    if isinstance(videos.images, VideoFiles):
        flags, on = ["fps", "face"], "video files, which have their own rate"
    elif isinstance(videos.images, PackedImages):
        flags, on = ["fps", "face", "frames_root"], "packed clips: give it to common.data pack"
    elif videos.images.in_memory:
        flags, on = [*READING, "allow_shared_persons"], "the embedded clips"
    else:
        return
    config.reject_unused_flags(parser, args, flags, f"on {on}")


def is_same_path(path: str | tuple, other: str | None) -> bool:
    """Whether both name one place."""
    known = isinstance(path, str) and other is not None
    return known and os.path.abspath(path) == os.path.abspath(other)


def train_items(args, videos, splits: dict) -> np.ndarray:
    """The items of an epoch: item i is a clip of video i % len(videos), every training video has
    --train-clips.
    """
    return np.concatenate(
        [splits["train"] + draw * len(videos) for draw in range(args.train_clips)]
    )


def epoch_batches(
    args, videos, items: np.ndarray, bs: int, epoch: int, done: int = 0, world=None
) -> list[np.ndarray]:
    """This process's share of an epoch's batches of items, but for the first `done`."""
    if args.sampler == "balanced":
        labels = videos.labels[items % len(videos)]
        return sampling.balanced_batches(items, labels, bs, args.seed, epoch, done, world)
    return sampling.epoch_batches(items, bs, args.seed, epoch, done, world)


def validate(
    args,
    world: dist.Dist,
    videos,
    splits: dict,
    stage: config.StageConfig,
    model_spec: dict,
    published,
) -> None:
    """Refuse what training could not use, before anything is written."""
    if published:
        load_published(build_mobilenet_v4(args.backbone), published, args.weights)
    items = train_items(args, videos, splits)
    sampling.check_batch("train", stage.bs, len(items), world.world_size * args.accum)
    epoch_batches(args, videos, items, stage.bs, 0)
    x = torch.zeros(2, 8, 1, 1, device=world.device)
    weight = x.new_zeros(8, 8, 1, 1)
    with as_input_error("--shift", args.shift):
        branch, expansion = shift_of(args, model_spec).hooks(2)
        if branch:
            branch(x)
        if expansion:
            expansion(x, weight)


def shift_of(args, model_spec: dict) -> Shift:
    """The shift that a model was made with; --impl chooses the kernel's implementation."""
    kernel = KERNELS[model_spec["shift"]]
    options = {name: model_spec[name] for name in ("n_segment", "fold_div", "direction", "padding")}
    return Shift(model_spec["shift"], kernel=kernel and partial(kernel, impl=args.impl), **options)


def build_model(run: Run, published: dict | None = None) -> ClipModel:
    """The network on the device, its backbone with published weights; the random part is a function
    of --seed.
    """
    args, spec, world = run.args, run.model_spec, run.world
    torch.manual_seed(args.seed)
    backbone = build_mobilenet_v4(spec["backbone"])
    if published:
        load_published(backbone, published, args.weights)
    model = ClipModel(
        backbone,
        shift_of(args, spec),
        aggregate=spec["aggregate"],
        num_classes=1,
        dropout=args.dropout,
        dropout2d=args.dropout2d,
    )
    if run.stages and args.head_bias == "prior":
        items = train_items(args, run.data, run.splits)
        drawn = np.concatenate(epoch_batches(args, run.data, items, run.stages["train"].bs, 0))
        init_bias_to_prior(model.head.classifier, run.data.labels[drawn % len(run.data)])
    model = dist.sync_batchnorm(model, world).to(world.device, memory_format=torch.channels_last)
    share = args.freeze_bn or 0
    frozen = freeze_bn(model, share)
    if share and not frozen:
        raise InputError(
            f"--freeze-bn {share:g} freezes no BatchNorm layer; raise it, or give --freeze-bn 0"
        )
    if frozen:
        run.log.say(
            f"--freeze-bn {share:g}: {len(frozen)} BatchNorm layers, {frozen[0]} to {frozen[-1]}"
        )
    backbone.checkpoint_blocks = args.checkpoint_blocks
    if args.compile:
        model.compile()
    return model


def frames_of(run: Run, batch: Batch, change: Callable | None = None) -> Tensor:
    """Normalized frames (n * T, 3, s, s) of clips (n, T, 3, h, h), augmented in training: one draw
    for all frames of a clip. `change` is done to the decoded frames.
    """
    frames = batch.inputs.flatten(0, 1)
    if change is not None:
        frames = change(frames, seed=int(batch.items[0]))
    size = run.model_spec["image_size"]
    if batch.epoch is None or run.args.augment == "none":
        x = augment.resize(frames, size)
    else:
        side, length = frames.shape[-1], batch.inputs.shape[1]
        params = augment.clip_params(run.args.seed, batch.epoch, batch.items, 0, side)
        x = augment.make_view(frames, params.repeat(length), size)
    mean, std = map(tuple, run.model_spec["pixels"])
    return augment.normalize(x, mean, std).contiguous(memory_format=torch.channels_last)


def fetch(run: Run, batches: list[np.ndarray], epoch: int | None = None) -> Iterator[Batch]:
    """The clips of batches of items, uint8 (n, T, 3, h, h), and their labels, on the device.

    Item i is a clip of video i % len(videos): in training one that `epoch` draws, in evaluation
    (None) clip i // len(videos) of --clips that are spread over the video.
    """
    videos, device = run.data, run.world.device
    labels = torch.from_numpy(videos.labels)
    wanted = map(partial(frame_numbers, run, epoch=epoch), batches)
    clips = videos.batches(wanted, run.args.workers)
    for items, pixels in zip(batches, clips, strict=True):
        targets = amp.to_device(labels[items % len(videos)], device)
        yield Batch(amp.to_device(pixels, device), items, targets, epoch)


def frame_numbers(run: Run, items: np.ndarray, epoch: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The videos (n,) of items and the numbers (n, T) of their frames."""
    spec, count = run.model_spec, len(run.data)
    length, seconds = spec["n_segment"], spec["clip_seconds"]
    videos = items % count
    if epoch is not None:
        drawn = run.data.train_clips(items, run.args.seed, epoch, n_segment=length, seconds=seconds)
        return videos, drawn
    spread = run.data.eval_clips(videos, length, seconds, run.args.clips)
    return videos, spread[np.arange(len(items)), items // count]


def describe_clips(run: Run) -> str:
    """How clips are cut, in one line."""
    return run.data.describe_clips(run.model_spec["n_segment"], run.model_spec["clip_seconds"])


def criterion(run: Run) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of logits and labels that the flags choose."""
    return partial(focal_bce, **weights_of(run.args, run.model_spec))


def weights_of(args, spec: dict) -> dict:
    """What the loss of a clip and its reference in --check are weighed by."""
    gamma = args.gamma if args.loss == "focal_bce" else 0.0
    return {"gamma": gamma, "alpha": args.alpha, "pos_weight": spec["pos_weight"]}


def train_step(run: Run, model, optimizer, scaler, batch: Batch) -> Step:
    """One update.

    With --accum K the gradient is that of the whole batch, but BatchNorm sees one chunk at a time:
    it is exact for frozen layers only.
    """
    accum, device = run.args.accum, run.world.device
    loss_of = criterion(run)
    total = torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    for k, chunk in enumerate(batch.chunks(accum)):
        x = frames_of(run, chunk)
        with amp.reduce_gradients(model, last=k + 1 == accum):
            with amp.autocast(run.args.precision, device):
                logits = model(x)[0].squeeze(1)
            terms = {"loss": loss_of(logits.float(), chunk.labels)}
            loss = sum(add_distillation(run, terms, logits, x).values()) / accum
            scaler.scale(loss).backward()
        total += loss.detach()
    norm, bad = amp.guarded_step(optimizer, scaler, total, run.args.clip_grad)
    return Step({"loss": total}, norm, bad)


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    indices: np.ndarray,
    progress=None,
    each_frame: bool = False,
    change: Callable | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits (n, clips) of --clips clips of each video of `indices` (n,), and the shares of their
    frames (n, clips, T) or with `each_frame` the frames' logits, float32 on the CPU, by the model
    in evaluation mode. `change` is done to the decoded frames.
    """
    model.eval()
    args, clips, length = run.args, run.args.clips, run.model_spec["n_segment"]
    items = (indices[:, None] + np.arange(clips) * len(run.data)).reshape(-1)
    shard = dist.shard(items, run.world)
    pieces = min(len(shard), -(-len(shard) * length // EVAL_FRAMES))
    with Evaluation(progress, model, np.array_split(shard, pieces)) as done:
        for batch in fetch(run, done.left):
            with amp.autocast(args.precision, run.world.device):
                x = frames_of(run, batch, change)
                logits, of_frames = (model.with_frames if each_frame else model)(x)
            done.add(torch.cat([logits, of_frames.flatten(1)], 1).float())
    rows = done.rows(len(items)).unflatten(0, (-1, clips))
    amp.require_finite(rows, "scores")
    return rows[..., 0], rows[..., 1:]


def evaluate_logits(run: Run, model: nn.Module, indices: np.ndarray) -> Tensor:
    """The logits alone of `evaluate`."""
    logits, _ = evaluate(run, model, indices)
    return logits


def score(
    run: Run, prefix: str, indices: np.ndarray, logits: Tensor, threshold: float | None = None
) -> dict:
    """Metrics of videos and clips (n, clips) named `PREFIX/video_auc` and so on; see
    `metrics.videos`.
    """
    data = run.data
    values = metrics.videos(
        data.labels[indices],
        data.methods[indices],
        logits,
        run.args.seed,
        threshold,
        units=data.units(indices),
        compressions=[data.keys[i][2] for i in indices],
    )
    return {f"{prefix}/{name}": value for name, value in values.items()}


def train(run: Run, published: dict | None) -> None:
    """Train, validate every --eval-every epochs, and test the model of the best video AUC on the
    validation split.
    """
    args, world, log, videos = run.args, run.world, run.log, run.data
    stage = run.stages["train"]
    val, test_split = run.splits["val"], run.splits["test"]
    items = train_items(args, videos, run.splits)
    model = build_model(run, published)
    optimizer = optim.of_stage(stage, [model])
    scaler = amp.scaler(args.precision, world.device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    progress = run.open_stage("train", parts, start=run.model_spec["weights"] or "random")
    if run.is_done(progress):
        return
    trained = dist.wrap(model, world)
    steps = len(items) // stage.bs
    frames = stage.bs // world.world_size // args.accum * args.n_segment
    dtype = amp.dtype_of(args.precision, world.device)
    memory = training_memory(model, frames, run.model_spec["image_size"], dtype)
    clips = f"{plural(len(items), 'clip')} of {plural(len(run.splits['train']), 'video')}"
    log.say(stage.describe(clips, steps) + f", patience {plural(args.patience, 'validation')}")
    log.say(f"{model.describe()}; predicted memory of {frames} frames at once: {memory.describe()}")

    loop = Loop(run, progress, steps=steps, unit="clip", patience=args.patience)
    loop.foresee(train_step, partial(fetch, run), items)
    for epoch in loop.epochs():
        model.train()
        batches = epoch_batches(args, videos, items, stage.bs, epoch, progress.batch, world)
        for batch in loop.batches(fetch(run, batches, epoch)):
            lr = loop.set_lr(optimizer)
            step = train_step(run, trained, optimizer, scaler, batch)
            loop.end_step(step, lr)
        values = {"train/train/loss": progress.mean("loss")}
        if loop.is_eval_epoch():
            logits, _ = evaluate(run, model, val, progress)
            values |= score(run, "train/val", val, logits)
            auc = values["train/val/video_auc"]
            confident = auc - args.min_delta
            if args.stop_on_interval:
                confident = values["train/val/video_auc_low"]
            progress.select(
                auc,
                model.state_dict(),
                values,
                higher_is_better=True,
                confident_value=confident,
            )
            progress.results = values
        loop.end_epoch(values)

    def test(network, selected):
        logits, shares = evaluate(run, network, test_split, progress)
        threshold = selected["train/val/threshold"]
        scores = score(run, "train/test", test_split, logits, threshold)
        return scores, (network, logits, shares, threshold)

    results, (best, logits, shares, threshold) = test_best_and_last(progress, model, test)
    share = metrics.majority_accuracy(videos.labels[run.splits["train"]], videos.labels[test_split])
    results["train/test/majority_video_accuracy"] = share
    units = videos.units(test_split)
    log.say(
        f"intervals draw the {plural(len(units), 'test video')} in"
        f" {plural(len(set(units)), 'group')}, each of those that share persons"
    )
    figures.detected(run, test_split, metrics.video_scores(logits), threshold, units)
    if args.aggregate == "attention":
        attention_gallery(run, test_split, logits, shares)
    cam_gallery(run, best, test_split, logits, threshold)
    log.metrics("train", progress.step, progress.epoch, results)
    run.finish(progress, progress.results | results)


@figures.for_report
def attention_gallery(run: Run, indices: np.ndarray, logits: Tensor, shares: Tensor) -> None:
    """Leave the middle clips of three real and three fake videos for the report, and how much each
    frame counts.
    """
    rows = []
    for label in (0, 1):
        of_label = np.flatnonzero(run.data.labels[indices] == label)
        rows.append(of_label[np.linspace(0, len(of_label) - 1, min(3, len(of_label))).astype(int)])
    rows = np.concatenate(rows)
    middle = run.args.clips // 2
    (batch,) = fetch(run, [indices[rows] + middle * len(run.data)])
    scores = logits[rows, middle].sigmoid()
    figures.attention_frames(run, indices[rows], batch.inputs.cpu(), shares[rows, middle], scores)


@figures.for_report
def cam_gallery(
    run: Run, model: ClipModel, indices: np.ndarray, logits: Tensor, threshold: float
) -> None:
    """Leave the middle clips of the videos that are most confidently right and wrong for the
    report, and where the model looks in them.
    """
    middle = run.args.clips // 2
    scores = logits[:, middle].sigmoid().numpy()
    right = (scores >= threshold) == (run.data.labels[indices] == 1)
    order = np.argsort(-np.abs(scores - threshold), kind="stable")
    rows = np.concatenate([order[right[order]][:3], order[~right[order]][:3]])
    (batch,) = fetch(run, [indices[rows] + middle * len(run.data)])
    x = frames_of(run, batch)
    said_fake = torch.from_numpy(scores[rows] >= threshold).to(x.device)
    shares = []

    def answers() -> Tensor:
        with amp.autocast(run.args.precision, run.world.device):
            # Not by its compiled form, which the hook would have compiled again.
            fake, weights = model.forward(x)
        shares.append(weights.detach().float().cpu())
        return torch.where(said_fake, fake[:, 0], -fake[:, 0])

    model.eval()
    maps = grad_cam(model.backbone.blocks[-1][-1], answers).cpu()
    titles = [
        f"{'right' if right[row] else 'wrong'}: {run.data.ids[indices[row]]}, score of fake"
        f" {scores[row]:.3f}"
        for row in rows
    ]
    maps = maps.unflatten(0, batch.inputs.shape[:2])
    figures.looked_at(run, titles, batch.inputs.cpu(), maps, *shares)


class ClipView(NetworkView):
    """How --check looks into the network: an item is a clip, and all of its frames must matter."""

    def __init__(self, run: Run, size: int):
        length = run.model_spec["n_segment"]
        at_once = EVAL_FRAMES // length // run.args.clips
        pixels = run.model_spec["pixels"]
        super().__init__(run, size=size, eval_batch=at_once, parts=length, normalization=pixels)

    def rows(self, output) -> Tensor:
        return output[0]

    def augmented_part(self, calls: list[tuple], count: int) -> Tensor:
        return calls[0][0].unflatten(0, (count, 1, -1))

    def stored_pixels(self, samples: np.ndarray) -> Tensor:
        clips = np.arange(self.run.args.clips) * len(self.run.data)
        (batch,) = fetch(self.run, [(samples[:, None] + clips).reshape(-1)])
        return batch.inputs.flatten(0, 1)

    def head(self, model: ClipModel) -> nn.Linear:
        return model.head.classifier

    def causal(self, model: ClipModel, x: Tensor) -> Tensor | None:
        return model.features(x) if self.run.args.direction == "past" else None


def check_spec(run: Run, published: dict | None) -> CheckSpec:
    """The training in the terms of --check."""
    args, videos = run.args, run.data
    stage = run.stages["train"]
    items = train_items(args, videos, run.splits)
    larger = dict(pairwise(VARIANTS)).get(run.model_spec["backbone"])
    return CheckSpec(
        run=run,
        stage="train",
        splits=("train", "val"),
        build=partial(build_model, run, published),
        fetch=partial(fetch, run),
        step=train_step,
        evaluate=partial(evaluate_logits, run),
        loss=partial(reference.focal, **weights_of(args, run.model_spec)),
        augmented=args.augment != "none",
        view=ClipView(run, size=min(8, stage.bs)),
        labels=videos.labels,
        starts_at_prior=args.head_bias == "prior",
        batches=partial(epoch_batches, args, videos, items, stage.bs),
        larger=larger and partial(build_model, run.with_spec(backbone=larger)),
    )


def run_inference(parser, args, world: dist.Dist) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv of videos without
    labels. --stream: one sequence frame by frame.
    """
    loaded = load_run(args, CARD)
    classes = loaded.model_spec["classes"]
    threshold = loaded.state["metrics"].get("train/val/threshold")
    if threshold is None and not args.stream:
        raise InputError(
            f"{loaded.source} was saved before its first validation: there is no threshold yet"
        )
    if args.eval:
        evaluate_on(parser, args, world, loaded, threshold)
        return
    videos = build_data(args, loaded.path, world, labels=False)
    refuse_unread(parser, args, videos)
    run = loaded.as_run(args, world, videos, {})
    model = loaded.with_weights(partial(build_model, run))
    if args.stream:
        stream(run, model)
        return
    world.say(describe_clips(run))
    loaded.say_who_answers(world, classes)
    logits, _ = evaluate(run, model, np.arange(len(videos)))
    scores = metrics.video_scores(logits)
    shares = torch.from_numpy(np.stack([1 - scores, scores], 1))
    chosen = (scores >= threshold).astype(int)
    note = f"; fake from a score of {digits(threshold)} on"
    loaded.write_predictions(world, videos.ids, classes, shares, chosen, note)


def evaluate_on(parser, args, world: dist.Dist, loaded: LoadedRun, threshold: float) -> None:
    """The test metrics on each data set of --data, in eval/NAME/ of the run, and their table."""
    stored = checkpoint.config_of(args.eval)
    paths = loaded.path if isinstance(loaded.path, tuple) else (loaded.path,)
    for path in set(paths) - faceforensics.SAMPLES.keys():
        existing(path)  # before the first is scored
    model = loaded.with_weights(partial(build_model, loaded.as_run(args, world, None, {})))
    for path, name in zip(paths, names_of_data(paths), strict=True):
        videos = build_data(args, path, world, of_run=stored)
        refuse_unread(parser, args, videos)
        # What the run held out itself of its data, wherever they lie now.
        own = videos.fingerprint == (stored.get("identity") or {}).get("data")
        own |= is_same_path(path, stored.get("data"))
        test = scored_videos(args, videos, own, bool(stored.get("allow_shared_persons")), world.say)
        labels = videos.labels[test]
        has_auc = len(set(labels)) == 2
        run = loaded.as_run(args, world, videos, {})
        world.say(describe_clips(run))
        logits, frames = evaluate(run, model, test, each_frame=True)
        scores = metrics.video_scores(logits)
        if not own:
            warn_of_known(args.eval, videos, test, "video", world.say)
        values = score(run, "eval/test", test, logits, threshold)
        if has_auc:
            of_frame = np.repeat(labels, frames[0].numel())
            values["eval/test/frame_auc"] = metrics.detection(of_frame, frames.flatten())["auc"]
        facts = {
            "data": {
                "path": str(path),
                "fingerprint": videos.fingerprint,
                "real": int((labels == 0).sum()),
                "fake": int((labels == 1).sum()),
                "videos": len(videos),
                "compressions": sorted({videos.keys[i][2] for i in test}),
                "methods": sorted(set(videos.methods[test])),
            },
            "checkpoint": {"source": loaded.source, "epoch": loaded.state.get("epoch")},
            "threshold": threshold,
            "flags": {flag: getattr(args, flag) for flag in [*READING, *SCORING]},
        }
        place = replace(loaded, folder=output_folder(str(loaded.folder / "eval" / name)))
        answers = videos, test, loaded.model_spec["classes"], scores
        place.write(values, world, answers, (scores >= threshold).astype(int), facts)
        if args.perturb:
            kinds = list(LEVELS) if args.perturb == "all" else [args.perturb]
            # The first metric of videos: their AUC, or of one class the share that is called fake.
            metric = "eval/test/video_auc" if has_auc else next(iter(values))
            found = perturbed(run, model, test, kinds, threshold, metric)
            if world.is_main:
                figures.perturbed(place.folder, name, found, metric, values[metric])
    if world.is_main:
        figures.evaluated(loaded.folder)
        if (loaded.folder / "log.jsonl").exists():
            with only_warn(say, "report"):
                page.write(loaded.folder)


def perturbed(
    run: Run, model: nn.Module, test: np.ndarray, kinds: list[str], threshold: float, metric: str
) -> dict:
    """A metric of videos `test` by kind and level of change: kind -> ((level, value), ...)."""
    found = {}
    for kind in kinds:
        points = []
        for level in LEVELS[kind]:
            logits, _ = evaluate(run, model, test, change=partial(perturb, name=kind, value=level))
            points.append((level, score(run, "eval/test", test, logits, threshold)[metric]))
        found[kind] = tuple(points)
    return found


def scored_videos(
    args, videos: faceforensics.FaceVideos, own: bool, allow_shared_persons: bool, say
) -> np.ndarray:
    """The positions of the videos that --eval scores: of --split; unset, those of the test split
    that the data name or that the run has held out of its `own`, and else all.
    """
    everything = np.arange(len(videos))
    wanted = args.split or ("test" if own or (videos.splits == "test").any() else "all")
    if wanted == "all":
        chosen = everything
    elif (videos.splits == wanted).any():
        chosen = np.flatnonzero(videos.splits == wanted)
    else:
        if own:
            group_items(videos, args, "videos", say)
        parts = faceforensics.split(videos, [wanted], allow_shared_persons)
        chosen = parts[wanted]
    why = f"split {wanted}" if wanted != "all" else "--split all" if args.split else "no test split"
    if own and wanted == "all":
        why += ": those that the run was trained on, too"
    say(f"scoring {len(chosen)} of {plural(len(videos), 'video')} ({why})")
    return chosen


def export_spec(args, world: dist.Dist) -> ExportSpec:
    """The model of a checkpoint, of whole clips, in the terms of common.export."""
    loaded = load_run(args, CARD)
    spec = loaded.model_spec
    run = loaded.as_run(args, world, None, {})

    def answer(network: ClipModel, x: Tensor) -> Tensor:
        fake = network(x)[0].sigmoid()
        return torch.cat([1 - fake, fake], 1)

    clip = f"{spec['n_segment']} frames over {spec['clip_seconds']:g} s; of each: {SQUARE}"
    return ExportSpec(
        model=loaded.with_weights(partial(build_model, run)),
        answer=answer,
        inputs={"clips": clip},
        frames=spec["n_segment"],
        size=spec["image_size"],
        normalization=spec["pixels"],
        output=f"{PROBABILITIES}; a video's are the mean of its clips'",
        classes=spec["classes"],
        facts={"threshold": loaded.state["metrics"].get("train/val/threshold")},
    )


def stream(run: Run, model: ClipModel) -> None:
    """Score the frames of one sequence as they come: stream.csv, and the last score printed."""
    if len(run.data) != 1:
        raise InputError(
            f"--stream {run.args.stream}: expected one sequence of frames, found"
            f" {plural(len(run.data), 'video')}"
        )
    flow = Stream(model.eval(), shift_step)
    lines = ["frame,score_fake"]
    video = np.zeros(1, np.int64)
    spec, length = run.model_spec, int(run.data.lengths[0])
    rate, trained = run.data.rates[0], spec["clip_seconds"] / spec["n_segment"]
    apart = max(1.0, trained * rate)
    taken = np.unique(np.floor(np.arange(0, length, apart) + 1e-6).astype(int))
    run.world.say(
        f"{len(taken)} of {plural(length, 'frame')}, {apart / rate:.3g} s apart;"
        f" clips of training have one every {trained:.3g} s"
    )
    frames = [(video, np.array([[t]])) for t in taken]
    for t, pixels in zip(taken, run.data.batches(frames, run.args.workers), strict=True):
        x = frames_of(run, Batch(amp.to_device(pixels, run.world.device), video, None, None))
        with amp.autocast(run.args.precision, run.world.device):
            logits, _ = flow(x)
        score_fake = logits.cpu().double().sigmoid().item()
        lines.append(f"{t},{score_fake:.6f}")
    if run.world.is_main:
        file = write_new(run.folder / "stream.csv", "\n".join(lines) + "\n")
        say(f"{file}: {plural(len(frames), 'frame')}, the last score is {score_fake:.6f}")


def run_training(parser, args, world: dist.Dist, signals: Signals) -> None:
    """Train: read the data, settle what the run is, and run its one stage."""
    stages = settings(args)
    stage = stages["train"]
    videos = build_data(args, args.data, world)
    refuse_unread(parser, args, videos)
    group_items(videos, args, "videos", world.say)
    splits = faceforensics.split(
        videos, allow_shared_persons=args.allow_shared_persons, say=world.say
    )
    size = args.image_size or max(min(224, videos.store_size), MIN_SIZE)
    if size < MIN_SIZE:
        raise InputError(f"--image-size {size}: the smallest that MobileNetV4 takes is {MIN_SIZE}")
    if size > videos.store_size:
        world.say(
            f"frames are stored at {videos.store_size} px and enlarged to --image-size {size}: no"
            " detail is gained"
        )
    published, pixels = start_weights(args)
    spec = dict(
        script=CARD.name,
        image_size=size,
        classes=videos.classes,
        **{name: getattr(args, name) for name in MODEL_FLAGS},
        pixels=[list(part) for part in pixels],
        weights=checkpoint.weights_digest(published) if published else None,
        pos_weight=pos_weight_of(args, videos.labels[splits["train"]]),
    )
    validate(args, world, videos, splits, stage, spec, published)
    same = ("image_size", "classes", "n_segment", "clip_seconds", "pixels")
    teacher, teacher_id = distill.read(args, spec, same)
    run = Run.open(
        args,
        world,
        signals,
        videos,
        splits,
        spec,
        stages,
        card=replace(CARD, about=CARD.about + SHARED) if args.allow_shared_persons else CARD,
        chance=chance_levels(args, spec),
        name=f"{args.backbone}-{args.shift}-bs{stage.bs}",
        identity=config.run_id(
            parser, args, data=videos.fingerprint, stage="train", **spec, **teacher_id
        ),
        input_text=f"input {size} px",
    )
    distill.attach_teacher(run, teacher, build_model, teacher_logits)
    run.log.say(describe_clips(run))
    if args.check:
        return check(run, {"train": check_spec(run, published)})
    with run.session(page):
        train(run, published)


def teacher_logits(model: ClipModel, x: Tensor) -> Tensor:
    """Logits (n,) of a teacher on the student's own input."""
    return model(x)[0].squeeze(1)


def pos_weight_of(args, labels: np.ndarray) -> float | None:
    """The weight of fakes among training labels, by --pos-weight."""
    if args.pos_weight == "none":
        return None
    real, fake = np.bincount(labels, minlength=2)
    return float(real / max(fake, 1) if args.pos_weight == "auto" else args.pos_weight)


def chance_levels(args, spec: dict) -> dict[str, tuple[str, float]]:
    """The label and the loss of a guess, where the loss weighs no class."""
    if args.alpha is not None or spec["pos_weight"]:
        return {}
    gamma = weights_of(args, spec)["gamma"]
    return {"train": ("a guess, p = 1/2", 0.5**gamma * math.log(2))}


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    if run_sweep(main, parser, argv, args, SEARCH, "auc"):
        return 0
    return launch(parser, args, partial(run_inference, parser), run_training)


if __name__ == "__main__":
    sys.exit(main())
