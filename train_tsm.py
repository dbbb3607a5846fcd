"""TSM on face clips: is a video real or manipulated? MobileNetV4 whose blocks exchange channels
between frames.

Lin et al., TSM: Temporal Shift Module for Efficient Video Understanding, arXiv:1811.08383.
Qin et al., MobileNetV4: Universal Models for the Mobile Ecosystem, arXiv:2404.10518.

  python train_tsm.py --data ffpp/ --compression c23 --weights mobilenetv4_conv_medium.safetensors    best on a GPU
  python train_tsm.py --data ffpp.zip --backbone conv_small --image-size 112 --shift none             without the shift
  python train_tsm.py --data ffpp/ --eval RUN                                                         the test again
  python train_tsm.py --stream frames/ --resume RUN       frame by frame, where RUN was trained with --direction past
  python train_tsm.py --demo                              small, on embedded clips: minutes on two CPU cores

A block's input exchanges channels with the neighboring frames before its convolutions: with
--fold-div 8 an eighth comes from the next frame and an eighth from the previous one, 2/8 in all;
with 4, the recipe's choice, it is half of the channels. It costs no arithmetic, only memory
traffic.
"""

import sys
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from common import amp, config, metrics, optim
from common.check.result import CheckSpec
from common.check.runner import check
from common.data import augment, faceforensics, sampling
from common.errors import Diverged, InputError, as_input_error
from common.losses import focal_bce, focal_guess
from common.models.heads import AGGREGATES, HEAD_BIAS, init_bias_to_prior
from common.models.mobilenet_v4 import VARIANTS, build_mobilenet_v4, load_published
from common.models.tsm import (
    PLACEMENTS,
    ClipModel,
    Shift,
    Stream,
    freeze_bn,
    start_weights,
    training_memory,
)
from common.report import figures
from common.run import checkpoint, dist
from common.run.inference import load_run, restore_data_flags, write_predictions
from common.run.launch import launch, run_sweep
from common.run.log import Log, Pace
from common.run.run import Run, test_best_and_last
from common.run.signals import Signals
from kernels import shift_conv1x1, shift_step, temporal_shift

STAGE = {"epochs": 30, "bs": 64, "lr": 3e-4, "wd": 0.01, "optimizer": "adamw"}
KERNELS = {"residual": temporal_shift, "expand": shift_conv1x1, "none": None}
DEMO = dict(
    backbone="conv_small_035",
    image_size=32,
    bs=24,
    accum=1,
    epochs=24,
    lr=3e-3,
    eval_every=3,
    clips=2,
)
DEMO |= dict(sampler="balanced")
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
MIN_SIZE = 32  # the stride of MobileNetV4: a smaller frame leaves less than one pixel
EVAL_FRAMES = 256  # at once


def parse_args(argv: list[str] | None = None):
    parser = config.base_parser("tsm", __doc__)
    parser.set_defaults(accum=2, eval_every=2)  # the recipe's
    group = parser.add_argument_group("clips")
    group.add_argument(
        "--compression", help="read this level alone, such as c23; unset: all that are there"
    )
    parser.number(
        group, "--fps", float, 25.0, "rate of folders of frames, frames a second", above=0
    )
    parser.number(group, "--n-segment", int, 8, "frames of a clip", low=1)
    parser.number(group, "--clip-seconds", float, 2.0, "time that a clip covers, seconds", above=0)
    parser.number(
        group, "--train-clips", int, 1, "clips drawn from each training video in an epoch", low=1
    )
    parser.number(
        group,
        "--clips",
        int,
        3,
        "clips of each video in evaluation; their mean is its score",
        low=1,
    )
    parser.choice(
        group,
        "--augment",
        ["clip", "none"],
        "clip",
        "clip: mirror image and color jitter, one draw a clip",
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
        "side frames are decoded to; unset: their own, at most 256",
        low=8,
    )
    group = parser.add_argument_group("model")
    parser.choice(group, "--backbone", VARIANTS, "conv_medium", "MobileNetV4 variant")
    group.add_argument(
        "--weights", metavar="FILE", help="published weights (.safetensors, .pt) or a run's best.pt"
    )
    parser.choice(
        group,
        "--shift",
        PLACEMENTS,
        "residual",
        "what reads the shifted map: the branch, its expansion",
    )
    fold = "1/N of the channels comes from each neighbor: 4 moves half"
    parser.number(
        group, "--fold-div", int, 4, fold, low=1, high=32
    )  # no block that shifts has fewer channels
    parser.choice(
        group,
        "--direction",
        ["both", "past"],
        "both",
        "past: from the previous frame alone, for --stream",
    )
    parser.choice(
        group, "--padding", ["zero", "replicate", "circulant"], "zero", "what lies beyond a clip"
    )
    parser.choice(group, "--aggregate", AGGREGATES, "attention", "how a clip's frames become one")
    parser.choice(
        group,
        "--head-bias",
        HEAD_BIAS,
        HEAD_BIAS[0],
        "last layer's, at the start; prior: classes' shares",
    )
    parser.number(group, "--dropout", float, 0.3, "of the frames' features", low=0, high=1)
    group.add_argument(
        "--dropout2d", action="store_true", help="drop whole channels of the last map instead"
    )
    parser.number(
        group,
        "--freeze-bn",
        float,
        0.0,
        "share of BatchNorm layers to freeze, from the first",
        low=0,
        high=1,
    )
    group.add_argument(
        "--checkpoint-blocks", action="store_true", help="recompute blocks in backward: less memory"
    )
    group = parser.add_argument_group("loss and imbalance")
    parser.choice(group, "--loss", ["focal_bce", "bce"], "focal_bce", "of a clip")
    parser.number(group, "--gamma", float, 2.0, "of focal_bce: how little easy clips count", low=0)
    parser.number(
        group,
        "--alpha",
        float,
        None,
        "weight of fake in focal_bce, 1 - X of real; unset: 1, 1",
        low=0,
        high=1,
    )
    group.add_argument(
        "--pos-weight",
        type=pos_weight,
        default="none",
        help="of fake: none, auto (real / fake) or X",
    )
    parser.choice(
        group,
        "--sampler",
        ["none", "balanced"],
        "none",
        "balanced: as many real as fake in every batch",
    )
    group.add_argument(
        "--allow-double-balance", action="store_true", help="two of the three corrections at once"
    )
    group = parser.add_argument_group("schedule and stopping")
    parser.number(group, "--min-lr", float, 3e-5, "last learning rate of the cosine", low=0)
    parser.number(
        group,
        "--patience",
        int,
        10,
        "validations without a better video AUC before stopping",
        low=1,
    )
    parser.number(
        group, "--min-delta", float, 0.002, "gain in video AUC that counts as better", low=0
    )
    group.add_argument(
        "--stop-on-interval",
        action="store_true",
        help="better: the AUC's interval lies above the best",
    )
    group.add_argument(
        "--stream",
        metavar="FOLDER",
        help="score one sequence frame by frame with the run of --resume",
    )
    reading = ["clips", "compression", "fps"]
    args = config.parse(parser, argv, DEMO, SEARCH)
    args = restore_data_flags(
        parser, argv, args, [*(reading if args.eval else ["clips", "fps"]), "store_size"]
    )

    config.check_inference_flags(parser, args, [*reading, "impl"])
    used = partial(config.reject_unused_flags, parser, args)
    if args.stream:
        used(reading, "with --stream")
    elif args.data in faceforensics.SAMPLES and not (args.eval or args.predict):
        used(reading[1:], "on the embedded clips")
    if args.shift == "none":
        used(["fold_div", "direction", "padding", "impl"], "with --shift none")
    if args.loss == "bce":
        used(["gamma", "alpha"], "with --loss bce")
    if args.lr_schedule == "constant":
        used(["min_lr"], "with --lr-schedule constant")
    if args.dropout == 0:
        used(["dropout2d"], "with --dropout 0")
    if args.stop_on_interval:
        used(["min_delta"], "with --stop-on-interval, which decides by the interval")
    balance = {
        "alpha": args.alpha is not None,
        "pos-weight": args.pos_weight != "none",
        "sampler": args.sampler != "none",
    }
    twice = " and ".join(f"--{name}" for name, given in balance.items() if given)
    if " and " not in twice:
        used(["allow_double_balance"], "without two of --alpha, --pos-weight and --sampler")
    elif not args.allow_double_balance:
        parser.error(
            f"{twice} correct one imbalance twice; give one of them, or --allow-double-balance"
        )
    return args, parser


def pos_weight(text: str):
    """--pos-weight: `none`, `auto` or a positive number."""
    return text if text in ("none", "auto") else config.number(float, above=0)(text)


def build_data(args, path: str, world: dist.Dist, labels: bool = True) -> faceforensics.FaceVideos:
    """The videos of `path`, said in one line."""
    reading = dict(
        store_size=args.store_size, on_bad_item=args.on_bad_item, workers=args.workers, fps=args.fps
    )
    return faceforensics.prepare(
        path, compression=args.compression, labels=labels, say=world.say, **reading
    )


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
    with as_input_error("--shift", args.shift):
        for hook, inputs in zip(
            shift_of(args, model_spec).hooks(2), ([x], [x, x.new_zeros(8, 8, 1, 1)]), strict=True
        ):
            if hook:
                hook(*inputs)


def shift_of(args, model_spec: dict) -> Shift:
    """The shift that a model was made with; --impl chooses the kernel's implementation."""
    kernel = KERNELS[model_spec["shift"]]
    options = {name: model_spec[name] for name in ("n_segment", "fold_div", "direction", "padding")}
    return Shift(model_spec["shift"], kernel=kernel and partial(kernel, impl=args.impl), **options)


def build_model(run: Run, published: dict | None = None) -> ClipModel:
    """The network on the device, its backbone with published weights; the random part is a function
    of --seed.
    """
    args, model_spec, world = run.args, run.model_spec, run.world
    torch.manual_seed(args.seed)
    backbone = build_mobilenet_v4(model_spec["backbone"])
    if published:
        load_published(backbone, published, args.weights)
    drop = dict(dropout=args.dropout, dropout2d=args.dropout2d)
    model = ClipModel(
        backbone,
        shift_of(args, model_spec),
        aggregate=model_spec["aggregate"],
        num_classes=1,
        **drop,
    )
    if run.stages and args.head_bias == "prior":
        drawn = epoch_batches(
            args, run.data, train_items(args, run.data, run.splits), run.stages["train"].bs, 0
        )
        init_bias_to_prior(
            model.head.classifier, run.data.labels[np.concatenate(drawn) % len(run.data)]
        )
    model = dist.sync_batchnorm(model, world).to(world.device, memory_format=torch.channels_last)
    frozen = freeze_bn(model, args.freeze_bn)
    if args.freeze_bn and not frozen:
        raise InputError(
            f"--freeze-bn {args.freeze_bn:g} freezes no BatchNorm layer; raise it, or leave it out"
        )
    if frozen:
        run.log.say(
            f"--freeze-bn {args.freeze_bn:g}: {len(frozen)} BatchNorm layers, {frozen[0]} to"
            f" {frozen[-1]}"
        )
    backbone.checkpoint_blocks = args.checkpoint_blocks
    if args.compile:
        model.compile()
    return model


def frames_of(run: Run, pixels: Tensor, items: np.ndarray | None = None, epoch: int = 0) -> Tensor:
    """Normalized frames (b * T, 3, s, s) of uint8 clips (b, T, 3, h, h), augmented if they are
    `items` of an epoch: one draw for all frames of a clip.
    """
    frames, size = pixels.flatten(0, 1), run.model_spec["image_size"]
    if items is None or run.args.augment == "none":
        x = augment.resize(frames, size)
    else:
        params = augment.clip_params(run.args.seed, epoch, items, 0, pixels.shape[-1])
        x = augment.make_view(frames, params.repeat(pixels.shape[1]), size)
    return augment.normalize(x, *map(tuple, run.model_spec["pixels"])).contiguous(
        memory_format=torch.channels_last
    )


def clips_of(run: Run, items: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The videos of training items and the frames (n, T) that an epoch draws from them."""
    starts = dict(n_segment=run.args.n_segment, seconds=run.args.clip_seconds)
    return items % len(run.data), run.data.train_clips(items, run.args.seed, epoch, **starts)


def criterion(run: Run):
    """The loss of logits and labels that the flags choose."""
    gamma = run.args.gamma if run.args.loss == "focal_bce" else 0.0
    return partial(
        focal_bce, gamma=gamma, alpha=run.args.alpha, pos_weight=run.model_spec["pos_weight"]
    )


def train_step(
    run: Run, model, optimizer, scaler, criterion, make_clips, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One update; returns (loss, gradient norm, bad), device scalars.

    `make_clips(slice)` gives the frames of a chunk of this process's clips, `targets` (b,) their
    labels. With --accum K the gradient is that of the whole batch, but BatchNorm sees one chunk at
    a time: it is exact for frozen layers only.
    """
    accum, device = run.args.accum, run.world.device
    size, total = len(targets) // accum, torch.zeros((), device=device)
    optimizer.zero_grad(set_to_none=True)
    for k in range(accum):
        chunk = slice(k * size, (k + 1) * size)
        x = make_clips(chunk)
        with amp.reduce_gradients(model, last=k + 1 == accum):
            with amp.autocast(run.args.precision, device):
                logits = model(x)[0].squeeze(1)
            terms = run.add_distillation(
                {"loss": criterion(logits.float(), targets[chunk])}, logits, x
            )
            loss = sum(terms.values()) / accum
            scaler.scale(loss).backward()
        total += loss.detach()
    norm, bad = amp.guarded_step(optimizer, scaler, total)
    return total, norm, bad


@torch.no_grad()
def evaluate(
    run: Run, model: nn.Module, indices: np.ndarray, progress=None
) -> tuple[Tensor, Tensor]:
    """Logits (n, clips) of --clips clips of each video of `indices` (n,), and the shares of their
    frames (n, clips, T), float32 on the CPU, by the model in evaluation mode.
    """
    model.eval()
    args, count, length = run.args, run.args.clips, run.model_spec["n_segment"]
    positions = run.data.eval_clips(indices, length, run.model_spec["clip_seconds"], count).reshape(
        -1, length
    )
    own = dist.shard(np.arange(len(positions)), run.world)
    parts = np.array_split(own, min(len(own), -(-len(own) * length // EVAL_FRAMES)))
    rows = []
    for pixels in run.data.batches(
        [(indices[part // count], positions[part]) for part in parts], args.workers
    ):
        if progress:
            progress.check_stop()
        x = frames_of(run, amp.to_device(pixels, run.world.device))
        with amp.autocast(args.precision, run.world.device):
            logits, shares = model(x)
        rows.append(torch.cat([logits, shares], 1).float())
    rows = dist.unshard(torch.cat(rows), len(positions)).cpu().unflatten(0, (-1, count))
    if not rows.isfinite().all():
        raise Diverged(
            "the scores are not finite: the weights have grown too large. Try a lower --lr"
        )
    return rows[..., 0], rows[..., 1:]


def score(
    run: Run, prefix: str, indices: np.ndarray, logits: Tensor, threshold: float | None = None
) -> dict:
    """Metrics of videos and clips (n, clips) named `PREFIX/video_auc` and so on; see
    `metrics.videos`.
    """
    videos = run.data
    found = metrics.videos(
        videos.labels[indices], videos.methods[indices], logits, run.args.seed, threshold
    )
    return {f"{prefix}/{name}": value for name, value in found.items()}


def train(run: Run, published: dict | None) -> None:
    """Train, validate every --eval-every epochs, and test the model of the best video AUC on the
    validation split.
    """
    args, world, log, videos, stage = run.args, run.world, run.log, run.data, run.stages["train"]
    val, test, items = run.splits["val"], run.splits["test"], train_items(args, videos, run.splits)
    labels = torch.from_numpy(videos.labels)
    model = build_model(run, published)
    optimizer = optim.of_stage(stage, [model])
    scaler = amp.scaler(args.precision, world.device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    progress = run.stage("train", parts, start=run.model_spec["weights"] or "random")
    if run.is_done(progress):
        return
    trained, steps = dist.wrap(model, world), len(items) // stage.bs
    frames = stage.bs // world.world_size // args.accum * args.n_segment
    memory = training_memory(
        model, frames, run.model_spec["image_size"], amp.dtype_of(args.precision, world.device)
    )
    several = f"{len(items)} clips of {len(run.splits['train'])} videos"
    log.say(stage.describe(several, steps) + f", patience {args.patience} validations")
    log.say(f"{model.describe()}; predicted memory of {frames} frames at once: {memory.describe()}")

    pace = Pace(stage.bs, stage.epochs * steps, "clip")
    while progress.epoch < stage.epochs and progress.evals_without_gain < args.patience:
        model.train()
        batches = epoch_batches(
            args, videos, items, stage.bs, progress.epoch, progress.batch, world
        )
        clips = pace.waiting(
            videos.batches(map(partial(clips_of, run, epoch=progress.epoch), batches), args.workers)
        )
        for batch, pixels in zip(batches, clips, strict=True):
            lr = amp.set_lr(optimizer, stage, progress.step, steps, args.lr_schedule)
            pixels, targets = (
                amp.to_device(t, world.device) for t in (pixels, labels[batch % len(videos)])
            )

            def make_clips(chunk, pixels=pixels, batch=batch):
                return frames_of(run, pixels[chunk], batch[chunk], progress.epoch)

            loss, norm, bad = train_step(
                run, trained, optimizer, scaler, criterion(run), make_clips, targets
            )
            run.end_step(progress, pace, {"loss": loss}, lr, norm, bad)
        values = {"train/train/loss": progress.mean("loss")}
        if (progress.epoch + 1) % args.eval_every == 0 or progress.epoch + 1 == stage.epochs:
            values |= score(run, "train/val", val, evaluate(run, model, val, progress)[0])
            auc, low = values["train/val/video_auc"], values["train/val/video_auc_low"]
            certain = low if args.stop_on_interval else auc - args.min_delta
            progress.select(auc, model.state_dict(), values, higher_is_better=True, certain=certain)
            progress.results = values
        log.metrics("train", progress.step, progress.epoch + 1, values)
        progress.end_epoch()
        pace.pause()

    def scored(network, found):
        logits, shares = evaluate(run, network, test, progress)
        threshold = found["train/val/threshold"]
        return score(run, "train/test", test, logits, threshold), (logits, shares, threshold)

    results, (logits, shares, threshold) = test_best_and_last(progress, model, scored)
    figures.detected(run, test, metrics.video_scores(logits), threshold)
    if world.is_main and args.aggregate == "attention":
        attention_gallery(run, test, logits, shares)
    log.metrics("train", progress.step, progress.epoch, results)
    run.finish(progress, progress.results | results)


def attention_gallery(run: Run, indices: np.ndarray, logits: Tensor, shares: Tensor) -> None:
    """Leave the middle clips of three real and three fake videos for the report, and how much each
    frame counts.
    """
    model_spec, count = run.model_spec, run.args.clips
    classes = [np.flatnonzero(run.data.labels[indices] == label) for label in (0, 1)]
    rows = np.concatenate(
        [own[np.linspace(0, len(own) - 1, min(3, len(own))).astype(int)] for own in classes]
    )
    positions = run.data.eval_clips(
        indices[rows], model_spec["n_segment"], model_spec["clip_seconds"], count
    )[:, count // 2]
    (pixels,) = run.data.batches([(indices[rows], positions)], run.args.workers)
    figures.attention_frames(
        run, indices[rows], pixels, shares[rows, count // 2], logits[rows, count // 2].sigmoid()
    )


def check_spec(run: Run, published: dict | None) -> CheckSpec:
    """The training in the terms of --check."""
    args, stage, videos, length = (
        run.args,
        run.stages["train"],
        run.data,
        run.model_spec["n_segment"],
    )
    items, labels = train_items(args, videos, run.splits), torch.from_numpy(videos.labels)
    fake = 0.5 if args.sampler == "balanced" else float(videos.labels[run.splits["train"]].mean())
    guess = partial(
        focal_guess, guess=fake if args.head_bias == "prior" else 0.5, **criterion(run).keywords
    )

    def one_step(model, optimizer, scaler, batch, epoch):
        (pixels,) = run.data.batches([clips_of(run, batch, epoch)], args.workers)
        targets = labels[batch % len(videos)].to(run.world.device)
        make_clips = lambda k: frames_of(run, pixels[k].to(run.world.device), batch[k], epoch)  # noqa: E731
        return train_step(run, model, optimizer, scaler, criterion(run), make_clips, targets)

    def pixels(own):
        positions = videos.eval_clips(
            own, length, run.model_spec["clip_seconds"], args.clips
        ).reshape(-1, length)
        return next(videos.batches([(own.repeat(args.clips), positions)], args.workers)).flatten(
            0, 1
        )

    inputs = dict(
        batches=lambda epoch: epoch_batches(args, videos, items, stage.bs, epoch),
        size=min(8, stage.bs),
    )
    inputs |= dict(
        several=EVAL_FRAMES // length // args.clips + 2,
        pixels=pixels,
        normalization=run.model_spec["pixels"],
    )
    inputs |= dict(
        seen=lambda calls, n: calls[0][0].unflatten(0, (n, 1, -1)), varies=args.augment != "none"
    )
    answers = dict(
        labels=videos.labels, classes=videos.classes, prior=np.array([1 - fake, fake]), binary=True
    )
    past = ClipModel.features if args.direction == "past" else None
    answers |= dict(rows=lambda output: output[0], parts=length, past=past)
    answers |= dict(chance=lambda own: (0.6 * guess(own.mean()), 1.8 * guess(own.mean())))
    answers |= dict(head=lambda model: model.head.classifier)
    answers |= dict(
        frozen=lambda model: {
            f"{name}.{kind}" for name in model.frozen_bn for kind in ("weight", "bias")
        }
    )
    larger = dict(pairwise(VARIANTS)).get(run.model_spec["backbone"])
    answers["larger"] = larger and (lambda: build_model(run.with_spec(backbone=larger)))
    functions = (
        partial(build_model, run, published),
        one_step,
        lambda *given: evaluate(run, *given)[0],
    )
    return CheckSpec(
        run, stage, run.splits["train"], run.splits["val"], *functions, **inputs, **answers
    )


def run_inference(args, world: dist.Dist) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv of videos without
    labels. --stream: one sequence frame by frame.
    """
    found = load_run(args, "tsm")
    model_spec, threshold = (
        found.state["model_spec"],
        found.state["metrics"].get("train/val/threshold"),
    )
    if threshold is None and not args.stream:
        raise InputError(
            f"{found.source} was saved before its first validation: there is no threshold yet"
        )
    videos = build_data(args, found.path, world, labels=bool(args.eval))
    run = Run(
        args, world, videos, {}, found.folder, Log(None, main=world.is_main), None, model_spec, {}
    )
    model = build_model(run)
    checkpoint.load_weights(model, found.state["model"], found.source)
    if args.eval:
        test = faceforensics.split(videos, ["test"])["test"]
        logits, _ = evaluate(run, model, test)
        answers = videos, test, model_spec["classes"], metrics.video_scores(logits)
        found.write(score(run, "eval/test", test, logits, threshold), world, answers)
    elif args.predict:
        scores = metrics.video_scores(evaluate(run, model, np.arange(len(videos)))[0])
        if world.is_main:
            both = torch.from_numpy(np.stack([1 - scores, scores], 1))
            file, chosen = run.folder / "predictions.csv", (scores >= threshold).astype(int)
            write_predictions(file, videos.ids, model_spec["classes"], both, chosen)
            print(f"{len(videos)} predictions in {file}; fake from a score of {threshold:.4f} on")
    else:
        stream(run, model)


def stream(run: Run, model: ClipModel) -> None:
    """Score the frames of one sequence as they come: stream.csv, and the last score printed."""
    if len(run.data) != 1:
        raise InputError(
            f"--stream {run.args.stream}: expected one sequence of frames, found"
            f" {len(run.data)} videos"
        )
    one, flow, lines = np.zeros(1, np.int64), Stream(model.eval(), shift_step), ["frame,score_fake"]
    frames = [(one, np.array([[t]])) for t in range(int(run.data.lengths[0]))]
    for t, pixels in enumerate(run.data.batches(frames, run.args.workers)):
        x = frames_of(run, amp.to_device(pixels, run.world.device))
        with amp.autocast(run.args.precision, run.world.device):
            logits, _ = flow(x)
        lines.append(f"{t},{logits.double().sigmoid().item():.6f}")
    (run.folder / "stream.csv").write_text("\n".join(lines) + "\n")
    print(
        f"{run.folder / 'stream.csv'}: {len(frames)} frames, the last score is"
        f" {lines[-1].split(',')[1]}"
    )


def run_training(parser, args, world: dist.Dist, signals: Signals) -> None:
    """Train: read the data, settle what the run is, and run its one stage."""
    stage = config.stage_config(
        args, "train", STAGE | {"min_lr": args.min_lr}, first=True, lr_of=None
    )
    videos = build_data(args, args.data, world)
    splits = faceforensics.split(videos)
    size = args.image_size or max(min(224, videos.store_size), MIN_SIZE)
    if size < MIN_SIZE:
        raise InputError(f"--image-size {size}: the smallest that MobileNetV4 takes is {MIN_SIZE}")
    if size > videos.store_size and world.is_main:
        print(
            f"frames are stored at {videos.store_size} px and enlarged to --image-size {size}: no"
            " detail is gained"
        )
    published, pixels = start_weights(args)
    model_spec = dict(script="tsm", image_size=size, classes=videos.classes)
    model_spec |= {name: getattr(args, name) for name in MODEL_FLAGS}
    model_spec["pixels"] = [list(part) for part in pixels]
    model_spec["weights"] = checkpoint.weights_digest(published) if published else None
    real, fake = np.bincount(videos.labels[splits["train"]], minlength=2)
    weight = real / max(fake, 1) if args.pos_weight == "auto" else args.pos_weight
    model_spec["pos_weight"] = None if weight == "none" else float(weight)
    validate(args, world, videos, splits, stage, model_spec, published)
    identity = config.run_id(parser, args, data=videos.fingerprint, stage="train", **model_spec)
    names = dict(name=f"{args.backbone}-{args.shift}-bs{stage.bs}", identity=identity)
    names |= dict(same=("image_size", "classes", "n_segment", "clip_seconds", "pixels"))
    run = Run.open(
        args,
        world,
        signals,
        videos,
        splits,
        model_spec,
        {"train": stage},
        **names,
        size=f"input {size} px",
    )
    run.attach_teacher(build_model, lambda model, x: model(x)[0].squeeze(1))
    run.log.say(videos.describe_clips(args.n_segment, args.clip_seconds))
    if args.check:
        return check(run, {"train": check_spec(run, published)})
    with run.session():
        train(run, published)


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    return (
        0
        if run_sweep(main, argv, args, SEARCH, "auc")
        else launch(args, run_inference, partial(run_training, parser))
    )


if __name__ == "__main__":
    sys.exit(main())
