"""RAER: which of five academic emotions does a clip show? CLIP on the face and on the scene around
it, long-tailed.

After CLIP-CAER (arXiv:2508.04148); logit adjustment: Menon et al., arXiv:2007.07314; deferred
sampling and LDAM: Cao et al., arXiv:1906.07413.

  python train_raer.py --data raer/ --backbone vit_b_16 --weights ViT-B-16.pt --tune full --bs 8     best on a GPU
  python train_raer.py --data raer.zip --backbone vit_b_32 --weights ViT-B-32.pt --cache-features    seconds an epoch
  python train_raer.py --data raer.zip --backbone resnet18 --weights simclr/backbone.pt              from SimCLR
  python train_raer.py --data raer.zip --method ldam-drw                                             a comparison
  python train_raer.py --demo                              small, on embedded clips: minutes on two CPU cores

The schedule has three stages: learn from the clips as they come; draw rare classes more often and
adjust the logits; cool down. It is one table, in common/longtail.py, and printed at the start;
--schedule FILE replaces it.
"""

import math
import sys
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from torch import Tensor

from common import amp, config, longtail, metrics, optim
from common.check import audit
from common.check.result import CheckSpec
from common.check.runner import check
from common.data import augment, raer, sampling
from common.errors import Diverged, InputError
from common.features import stored_features
from common.longtail import Phase, Schedule, read_schedule
from common.models.clip import ACTIVATIONS, VARIANTS
from common.models.raer import TUNES, RaerModel, build_raer, normalization, start
from common.report.figures import classified
from common.run import checkpoint, dist
from common.run.inference import load_run, restore_data_flags, write_predictions
from common.run.launch import launch, run_sweep
from common.run.log import Log, Pace
from common.run.run import Run, test_best_and_last
from common.run.signals import Signals

STAGE = {"bs": 32, "lr": 1e-2, "wd": 1e-4, "optimizer": "sgd", "warmup_epochs": 0.0}
PRETRAINED_IMAGE_LR = 1e-5  # CLIP-CAER's; a tower that does not start from CLIP trains at --lr
JITTER, DEGREES, CROP = (0.3, 0.3, 0.3, 0.1), 15, (0.5, 1.0)
DEMO = dict(
    backbone="vit_tiny",
    num_frames=8,
    cache_features=True,
    bs=16,
    epochs=8,
    optimizer="adamw",
    lr=3e-4,
)
EVAL_FRAMES = 256  # at once
SEARCH = {
    "sgd": {"lr": (1e-3, 0.1), "wd": (1e-6, 1e-2)},
    "adamw": {"lr": (1e-5, 1e-2), "wd": (1e-4, 0.3)},
}
MODEL_FLAGS = ["backbone", "num_frames", "tune", "num_context", "temporal_layers", "method"]


def parse_args(argv: list[str] | None = None):
    parser = config.base_parser("raer", __doc__)
    group = parser.add_argument_group("clips")
    parser.number(
        group, "--num-frames", int, 16, "frames of a clip, one of each of as many segments", low=1
    )
    parser.choice(
        group,
        "--missing-box",
        raer.MISSING_BOX,
        "error",
        "full: the whole frame; skip: leave it out",
    )
    parser.number(
        group,
        "--face-margin",
        float,
        0.1,
        "by which a face's box grows on each side, share",
        low=0,
        high=1,
    )
    parser.choice(
        group,
        "--augment",
        ["clip", "none"],
        None,
        "one draw a clip; unset: clip, none with cached features",
    )
    parser.number(
        group,
        "--image-size",
        int,
        None,
        "input side, pixels; unset: 224, or less if stored smaller",
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
    parser.choice(
        group, "--backbone", [*VARIANTS, "resnet18"], "vit_b_16", "image tower of both streams"
    )
    group.add_argument(
        "--weights", metavar="FILE", help="CLIP's weights; for resnet18 SimCLR's backbone.pt"
    )
    parser.choice(
        group,
        "--activation",
        ACTIVATIONS,
        None,
        "of CLIP's weights where their file does not say it",
    )
    group.add_argument(
        "--clip-vocab", metavar="FILE", help="CLIP's merges; unset: the official file, fetched once"
    )
    parser.choice(
        group,
        "--tune",
        TUNES,
        "none",
        "what trains of the image tower; adapter: a residual behind it",
    )
    group.add_argument(
        "--cache-features",
        action="store_true",
        help="encode each clip once: a frozen tower, no views",
    )
    parser.number(
        group, "--num-context", int, 8, "learnable tokens before a class's descriptor", low=1
    )
    parser.number(
        group, "--temporal-layers", int, 1, "of each stream's temporal transformer", low=1
    )
    parser.number(
        group,
        "--dropout",
        float,
        0.1,
        "of the temporal transformers and the fusion",
        low=0,
        high=0.9,
    )
    parser.number(
        group,
        "--logit-scale",
        float,
        None,
        "of the cosines; unset: CLIP's, of --weights or new",
        above=0,
    )
    group.add_argument(
        "--checkpoint-blocks", action="store_true", help="recompute blocks in backward: less memory"
    )
    group = parser.add_argument_group("schedule and imbalance")
    parser.choice(group, "--method", longtail.SCHEDULES, "three-stage", "long-tail method")
    group.add_argument(
        "--schedule",
        metavar="FILE",
        help="TOML or JSON table of phases instead of the three stages",
    )
    parser.choice(group, "--la-prior", ["sampled", "train"], "sampled", "of the logit adjustment")
    parser.choice(group, "--optimizer", ["sgd", "adamw"], STAGE["optimizer"], "of all parts")
    parser.number(
        group,
        "--image-lr",
        float,
        None,
        f"unset: {PRETRAINED_IMAGE_LR} with CLIP's weights, or --lr",
        low=0,
    )
    parser.number(group, "--prompt-lr", float, 1e-3, "of the prompts' context", low=0)
    parser.number(
        group,
        "--patience",
        int,
        None,
        "validations without a better UAR before stopping; unset: all",
        low=1,
    )
    reading = ["missing_box", "face_margin"]
    args = restore_data_flags(
        parser, argv, config.parse(parser, argv, DEMO, SEARCH), [*reading, "store_size"]
    )

    config.check_inference_flags(parser, args, reading)
    refuse = partial(config.reject_unused_flags, parser, args)
    refuse(["impl"], "here: no kernel is used")
    if args.data == "sample" and not (args.eval or args.predict):
        refuse(reading, "on the embedded clips")
    text = args.weights and args.backbone != "resnet18" and args.method != "tau-norm"
    if not text:
        refuse(
            ["clip_vocab", "num_context", "prompt_lr"], "without the text tower of CLIP's weights"
        )
    if args.backbone == "resnet18" or not args.weights:
        refuse(["activation"], "without CLIP's weights")
    if args.method in ("tau-norm", "ldam-drw"):
        refuse(
            ["logit_scale"],
            f"with --method {args.method}, whose logits have no scale, or its loss's own",
        )
    if args.backbone == "resnet18" or args.tune != "full":
        refuse(["checkpoint_blocks"], "without a vit_* backbone and --tune full")
    if args.tune != "full":
        refuse(["image_lr"], f"with --tune {args.tune}, which freezes the image tower")
    if args.method != "three-stage":
        refuse(["schedule", "la_prior"], f"with --method {args.method}")
    if args.cache_features and args.tune == "full":
        parser.error("--cache-features needs a frozen image tower: --tune none or adapter")
    if args.cache_features and args.augment == "clip":
        parser.error(
            "--augment clip has no effect with --cache-features, which encodes each clip once"
        )
    return args, parser


def build_data(args, path: str, world: dist.Dist, labels: bool = True) -> raer.EmotionClips:
    """The clips of `path`, said in one line."""
    reading = dict(store_size=args.store_size, on_bad_item=args.on_bad_item, workers=args.workers)
    boxes = dict(missing_box=args.missing_box, margin=args.face_margin)
    return raer.prepare(path, **reading, **boxes, labels=labels, say=world.say)


def epoch_batches(run: Run, phase: Phase, epoch: int, done: int = 0) -> list[np.ndarray]:
    """This process's share of an epoch's batches of items, but for the first `done`: item i is clip
    i % len(clips).
    """
    clips, train, seed, bs = run.data, run.splits["train"], run.args.seed, run.stages["train"].bs
    if phase.sampler == "random":
        return sampling.epoch_batches(train, bs, seed, epoch, done, run.world)
    weights = sampling.class_weights(np.array(run.model_spec["counts"]), phase.cap)[
        clips.labels[train]
    ]
    order = sampling.weighted_order(train, weights, seed, epoch)
    return sampling.batch_slices(raer.number_repeats(order, len(clips)), bs, done, run.world)


def validate(
    args, world: dist.Dist, clips, splits: dict, stage: config.StageConfig, table: Schedule
) -> np.ndarray:
    """Refuse what training could not use, before anything is written, and say what evaluation will
    miss; returns the training clips of each class.
    """
    if stage.bs * args.num_frames == args.accum:
        raise InputError(
            f"--accum {args.accum}: BatchNorm needs two frames a chunk; lower it, or raise --bs"
        )
    counts = np.bincount(clips.labels[splits["train"]], minlength=len(clips.classes))
    sampling.check_batch("train", stage.bs, len(splits["train"]), world.world_size * args.accum)
    for name in ("val", "test"):
        for i in np.setdiff1d(np.arange(len(counts)), clips.labels[splits[name]]):
            world.say(
                f"{name} has no clip of {clips.classes[i]}: its recall counts as 0 in the UAR there"
            )
    longtail.check(table, counts, args.la_prior, world.say)
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
    stage, groups = run.stages["train"], []
    for part, modules in model.parts().items():
        if any(p.requires_grad for module in modules for p in module.parameters()):
            rate = {
                "temporal": stage.lr,
                "image": run.model_spec["image_lr"],
                "prompts": run.args.prompt_lr,
            }[part]
            groups += [g | {"lr": rate} for g in optim.param_groups(modules, stage.wd)]
    return optim.build_optimizer(stage.optimizer, groups, lr=stage.lr)


def load_inputs(
    run: Run, cached: Tensor | None, batches: list[np.ndarray], epoch: int | None = None
):
    """What the model's input is made of, a batch of items at a time: cached features, or (faces,
    contexts), uint8.
    """
    if cached is not None:
        return (cached[batch % len(run.data)] for batch in batches)
    length, seed = run.model_spec["num_frames"], run.args.seed
    if epoch is None:
        clips = [(batch, run.data.eval_frames(batch, length)) for batch in batches]
    else:
        clips = [
            (batch % len(run.data), run.data.train_frames(batch, seed, epoch, length))
            for batch in batches
        ]
    return run.data.batches(clips, run.args.workers)


def frames_of(run: Run, pixels, items: np.ndarray | None = None, epoch: int = 0) -> Tensor:
    """The model's input on the device: normalized frames (b, 2, T, 3, s, s) of the two streams of
    clips, augmented if they are `items` of an epoch, by one draw for all frames of both streams; or
    cached features as they are.
    """
    if isinstance(pixels, Tensor):
        return amp.to_device(pixels, run.world.device)
    args, size, (count, length, _, stored, _) = (
        run.args,
        run.model_spec["image_size"],
        pixels[0].shape,
    )
    views = []
    for stream in (amp.to_device(part, run.world.device).flatten(0, 1) for part in pixels):
        if items is None or args.augment == "none":
            x = augment.resize(stream, size)
        else:
            drawn = augment.clip_params(args.seed, epoch, items, 0, stored, JITTER, CROP, DEGREES)
            x = augment.make_view(stream, drawn.repeat(length), size)
        views.append(
            augment.normalize(x, *normalization(run.model_spec["backbone"])).unflatten(
                0, (count, length)
            )
        )
    return torch.stack(views, 1)


def loss_terms(
    run: Run, model: RaerModel, phase: Phase, output, targets: Tensor
) -> dict[str, Tensor]:
    """The weighted terms of the loss by name."""
    args, counts = run.args, np.array(run.model_spec["counts"])
    return longtail.loss_terms(args.method, phase, counts, args.la_prior, model, output, targets)


def train_step(
    run: Run, model, optimizer, scaler, terms_of, make_inputs, targets: Tensor, items=None
):
    """One update; returns (the loss and its terms by name, gradient norm, bad), device scalars.

    `make_inputs(slice)` gives the input of a chunk of this process's clips, `targets` (b,) their
    labels, `items` (b,) their numbers, where features are cached. With --accum K the gradient is
    the whole batch's, but for BatchNorm.
    """
    accum, device = run.args.accum, run.world.device
    size, total = len(targets) // accum, {}
    optimizer.zero_grad(set_to_none=True)
    for k in range(accum):
        chunk = slice(k * size, (k + 1) * size)
        with amp.reduce_gradients(model, last=k + 1 == accum):
            with amp.autocast(run.args.precision, device):
                output = model(x := make_inputs(chunk))
            terms = run.add_distillation(
                terms_of(output, targets[chunk]),
                output[0],
                x,
                None if items is None else items[chunk],
            )
            terms = {name: value / accum for name, value in terms.items()}
            loss = sum(terms.values())
            scaler.scale(loss).backward()
        for name, value in (terms | {"loss": loss}).items():
            total[name] = total.get(name, 0) + value.detach()
    norm, bad = amp.guarded_step(optimizer, scaler, total["loss"])
    return total, norm, bad


@torch.no_grad()
def evaluate(
    run: Run, model: RaerModel, indices: np.ndarray, cached=None, progress=None, outputs=None
) -> Tensor:
    """Raw logits (n, K) of clips `indices` (n,), float32 on the CPU, by the model in evaluation
    mode; or what another function than its `forward` gives, `outputs`.
    """
    model.eval()
    outputs = outputs or (lambda x: model(x)[0])
    own = dist.shard(indices, run.world)
    parts = np.array_split(own, -(-len(own) * 2 * run.model_spec["num_frames"] // EVAL_FRAMES))
    parts, rows = [part for part in parts if len(part)], []
    for pixels in load_inputs(run, cached, parts):
        if progress:
            progress.check_stop()
        with amp.autocast(run.args.precision, run.world.device):
            rows.append(outputs(frames_of(run, pixels)).float())
    rows = dist.unshard(torch.cat(rows), len(indices)).cpu()
    if not rows.isfinite().all():
        raise Diverged(
            "the outputs are not finite: the weights have grown too large. Try a lower --lr"
        )
    return rows


def score(run: Run, prefix: str, indices: np.ndarray, scores: Tensor, say=None) -> dict:
    """`metrics.emotions` named `PREFIX/uar` and so on; `say` gets the alarm of a model that gives
    one answer.
    """
    classes, labels, predicted = (
        run.model_spec["classes"],
        run.data.labels[indices],
        scores.argmax(1).numpy(),
    )
    values = metrics.emotions(labels, predicted, run.model_spec["counts"], classes, run.args.seed)
    if say and len(set(predicted)) == 1:
        say(
            f"alarm: {prefix}: all {len(labels)} clips are called {classes[predicted[0]]}: the"
            " model predicts one class,"
            f" UAR {values['uar']:.1%}, WAR {values['war']:.1%}: nothing is learned"
            " about the other classes"
        )
    return {f"{prefix}/{name}": value for name, value in values.items()}


def audit_phases(run: Run, model: RaerModel, table: Schedule, cached: Tensor | None) -> list[str]:
    """What the audit of every phase's settings finds, three steps each on a copy; its batches are
    chunks of the phase's first.
    """
    labels, problems = torch.from_numpy(run.data.labels), []
    for phase in table.phases:
        batches = [
            batch[: len(batch) // run.args.accum]
            for batch in epoch_batches(run, phase, phase.start)[:3]
        ]
        rows = list(zip(batches, load_inputs(run, cached, batches, phase.start), strict=True))

        def make(network, phase=phase):
            network.train()
            network.choose_trained(phase.trains == "classes")
            return build_optimizer(run, network)

        def terms_of(network, k, phase=phase, rows=rows):
            items, pixels = rows[k % len(rows)]
            with amp.autocast(run.args.precision, run.world.device):
                output = network(frames_of(run, pixels, items, phase.start))
            return loss_terms(
                run, network, phase, output, labels[items % len(run.data)].to(run.world.device)
            )

        problems += audit.check_setting(f"epochs from {phase.start}", model, make, terms_of)
    return problems


def train(run: Run, published, table: Schedule) -> None:
    """Train by the table, validate every --eval-every epochs, and test the epoch of the best UAR on
    the validation split.
    """
    args, world, log, clips, stage = run.args, run.world, run.log, run.data, run.stages["train"]
    val, test, labels = run.splits["val"], run.splits["test"], torch.from_numpy(clips.labels)
    model = build_model(run, published)
    optimizer, scaler = build_optimizer(run, model), amp.scaler(args.precision, world.device)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    peaks = [
        group["lr"] for group in optimizer.param_groups
    ]  # this command's: a restored state brings its own
    progress = run.stage("train", parts, start=run.model_spec["weights"] or "random")
    if run.is_done(progress):
        return
    steps, method = (
        len(run.splits["train"]) // stage.bs,
        (args.method, np.array(run.model_spec["counts"])),
    )
    log.say(
        stage.describe(f"{len(run.splits['train'])} clips", steps)
        + f"; {args.method}:\n{table.describe()}"
    )
    log.say(model.describe())
    if model.prompts is None and any(phase.mi or phase.smoothing for phase in table.phases):
        log.say(
            "no pretrained text: smoothed targets are uniform; the MI loss, of prompts and"
            " texts, is off"
        )
    cached = encode(run, model, progress) if args.cache_features else None
    if progress.step == 0:
        audit.refuse(audit_phases(run, model, table, cached))
        log.say(
            f"audit of {len(table.phases)} phases, 3 steps each: what is to train moves, every"
            " loss term has a gradient"
        )

    pace, trained, trains = Pace(stage.bs, stage.epochs * steps, "clip"), None, None
    while progress.epoch < stage.epochs and progress.evals_without_gain < (
        args.patience or stage.epochs
    ):
        phase = table.at(progress.epoch)
        if phase.trains != trains:
            model.choose_trained(phase.trains == "classes")
            before = table.at(max(progress.epoch - 1, 0)).trains
            if progress.batch == 0 and (before, phase.trains) == ("all", "classes"):
                model.reset_classes(optimizer)
            trained, trains = dist.wrap(model, world), phase.trains
        model.train()
        terms_of = partial(loss_terms, run, model, phase)
        batches = epoch_batches(run, phase, progress.epoch, progress.batch)
        for batch, pixels in zip(
            batches, pace.waiting(load_inputs(run, cached, batches, progress.epoch)), strict=True
        ):
            lr = optim.set_rates(optimizer, peaks, stage, progress.step, steps, phase.lr)
            targets = amp.to_device(labels[batch % len(clips)], world.device)

            def make_inputs(chunk, pixels=pixels, batch=batch):
                part = pixels[chunk] if cached is not None else [stream[chunk] for stream in pixels]
                return frames_of(run, part, batch[chunk], progress.epoch)

            own = batch if args.cache_features else None
            terms, norm, bad = train_step(
                run, trained, optimizer, scaler, terms_of, make_inputs, targets, own
            )
            run.end_step(progress, pace, terms, lr, norm, bad)
        values = {f"train/train/{name}": progress.mean(name) for name in sorted(progress.sums)}
        if (progress.epoch + 1) % args.eval_every == 0 or progress.epoch + 1 == stage.epochs:
            logits = evaluate(run, model, val, cached, progress)
            tau = longtail.best_tau(*method, model, logits, clips.labels[val])
            scores = longtail.decide(*method, model, logits, tau)
            values |= score(run, "train/val", val, scores, log.say) | {"train/val/tau": tau}
            progress.select(
                values["train/val/uar"], model.state_dict(), values, higher_is_better=True
            )
            progress.results = values
        settings = {n: v for n, v in asdict(phase).items() if isinstance(v, (int, float))}
        values = values | {f"train/schedule/{name}": value for name, value in settings.items()}
        log.metrics("train", progress.step, progress.epoch + 1, values)
        progress.end_epoch()
        pace.pause()

    def scored(network, found):
        logits = evaluate(run, network, test, cached, progress)
        scores = longtail.decide(*method, network, logits, found["train/val/tau"])
        return score(run, "train/test", test, scores, log.say), scores

    results, scores = test_best_and_last(progress, model, scored)
    classified(run, "train", test, scores, clips.labels[test], clips.classes)
    log.metrics("train", progress.step, progress.epoch, results)
    run.finish(progress, progress.results | results)


def encode(run: Run, model: RaerModel, progress) -> Tensor:
    """Features (n, 2, T, d) of the center frames of all clips by the frozen tower, kept in
    features.npz.
    """
    args, everything, length = run.args, np.arange(len(run.data)), run.model_spec["num_frames"]
    digest = checkpoint.weights_digest(model.image.state_dict())
    compute = partial(
        evaluate, run, model, everything, None, progress, lambda x: model.encode(x).flatten(1)
    )
    made_with = f"{digest} {length} {args.face_margin} {args.precision} {len(everything)}"
    rows = stored_features(run, made_with, compute)
    return rows.view(len(rows), 2, length, -1)


def check_spec(run: Run, published, table: Schedule) -> CheckSpec:
    """The first phase in the terms of --check. Cached features are made here a batch at a time."""
    args, stage, clips, length = (
        run.args,
        run.stages["train"],
        run.data,
        run.model_spec["num_frames"],
    )
    labels, counts, cached = (
        torch.from_numpy(clips.labels),
        np.array(run.model_spec["counts"]),
        args.cache_features,
    )
    guess, phase = math.log(len(counts)), table.phases[0]

    def one_step(model, optimizer, scaler, batch, epoch):
        own = batch % len(clips)
        drawn = (
            clips.eval_frames(own, length)
            if cached
            else clips.train_frames(batch, args.seed, epoch, length)
        )
        (pixels,) = run.data.batches([(own, drawn)], args.workers)
        make = lambda k: frames_of(
            run, [part[k] for part in pixels], None if cached else batch[k], epoch
        )  # noqa: E731
        terms_of = partial(loss_terms, run, model, phase)
        terms, *rest = train_step(
            run, model, optimizer, scaler, terms_of, make, labels[own].to(run.world.device)
        )
        return terms["loss"], *rest

    def pixels(own):
        return torch.stack(
            next(clips.batches([(own, clips.eval_frames(own, length))], args.workers)), 1
        ).flatten(0, 2)

    def entry(model, call):
        return [
            call[0] if run.model_spec["tune"] == "full" else model.encode(call[0])
        ], lambda xs: model(xs[0])[0]

    # LDAM's scaled margins cost up to 15; cosines times a scale are no equal logits.
    room = 17.0 if args.method == "ldam-drw" else max(2.0, (run.model_spec["scale"] or 0.0) / 10)
    inputs = dict(
        several=EVAL_FRAMES // length // 2 + 2, pixels=pixels, size=min(8, stage.bs), entry=entry
    )
    inputs |= dict(
        images=lambda call: call[0].flatten(0, 2),
        normalization=normalization(run.model_spec["backbone"]),
    )
    inputs |= dict(
        seen=lambda calls, n: calls[0][0].unsqueeze(1), varies=not cached and args.augment != "none"
    )
    answers = dict(
        labels=clips.labels,
        classes=clips.classes,
        prior=longtail.prior(counts, phase, "sampled").numpy(),
    )
    answers |= dict(
        rows=lambda output: output[0], parts=2 * length, chance=(0.7 * guess, 1.5 * guess + room)
    )
    answers |= dict(audit=lambda model: audit_phases(run, model, table, None))
    answers |= dict(
        frozen=lambda model: {
            name for name in dict(model.named_parameters()) if model.is_frozen(name)
        }
    )
    layers = 1 + run.model_spec["temporal_layers"]
    answers |= dict(larger=lambda: build_model(run.with_spec(temporal_layers=layers), published))
    functions = partial(build_model, run, published), one_step, partial(evaluate, run)
    own = dict(optimizer=partial(build_optimizer, run), batches=partial(epoch_batches, run, phase))
    return CheckSpec(
        run, stage, run.splits["train"], run.splits["val"], *functions, **own, **inputs, **answers
    )


def run_inference(args, world: dist.Dist) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv of clips without labels."""
    source = load_run(args, "raer")
    state, model_spec = source.state, source.state["model_spec"]
    tau = state["metrics"].get("train/val/tau")
    if tau is None:
        raise InputError(
            f"{source.source} was saved before its first validation; train on, or name best.pt"
        )
    clips = build_data(args, source.path, world, labels=bool(args.eval))
    method = model_spec["method"], np.array(model_spec["counts"])
    if args.eval and clips.classes != model_spec["classes"]:
        there, known = (", ".join(names) for names in (clips.classes, model_spec["classes"]))
        raise InputError(f"{clips.name} has the classes {there}, the model {known}")
    run = Run(
        args, world, clips, {}, source.folder, Log(None, main=world.is_main), None, model_spec, {}
    )
    model = build_model(run)
    checkpoint.load_weights(model, state["model"], source.source)
    if args.eval:
        test = raer.split(clips, ["test"])["test"]
        scores = longtail.decide(*method, model, evaluate(run, model, test), tau)
        answers = clips, test, model_spec["classes"], scores.softmax(1)
        source.write(score(run, "eval/test", test, scores, run.log.say), world, answers)
        return
    scores = longtail.decide(
        *method, model, evaluate(run, model, np.arange(len(clips))), tau
    ).softmax(1)
    if world.is_main:
        write_predictions(
            source.folder / "predictions.csv", clips.ids, model_spec["classes"], scores
        )
        print(f"{len(clips)} predictions in {source.folder / 'predictions.csv'}")


def run_training(parser, args, world: dist.Dist, signals: Signals) -> None:
    """Train: read the data, settle what the run is, and run its one stage."""
    written = read_schedule(args.schedule) if args.schedule else longtail.SCHEDULES[args.method]
    given = {"epochs": written.epochs, "optimizer": args.optimizer}
    stage = config.stage_config(args, "train", STAGE | given, first=True, lr_of=None)
    table = written.scaled(stage.epochs, constant=args.lr_schedule == "constant")
    clips = build_data(args, args.data, world)
    splits = raer.split(clips, say=world.say)
    model_spec = dict(
        script="raer",
        classes=clips.classes,
        schedule=[written.epochs, *map(asdict, written.phases)],
    )
    model_spec |= {name: getattr(args, name) for name in MODEL_FLAGS}
    model_spec["counts"] = validate(args, world, clips, splits, stage, table).tolist()
    published, model_facts, said = start(args, clips.store_size, clips.descriptions)
    model_spec |= model_facts
    own = PRETRAINED_IMAGE_LR if args.weights and args.backbone != "resnet18" else stage.lr
    model_spec["image_lr"] = own if args.image_lr is None else args.image_lr
    identity = config.run_id(parser, args, data=clips.fingerprint, stage="train", **model_spec)
    names = dict(name=f"{args.backbone}-{args.method}-bs{stage.bs}", identity=identity)
    names |= dict(
        same=(
            "image_size",
            "classes",
            "num_frames",
            lambda model_spec: normalization(model_spec["backbone"]),
        )
    )
    size = f"input {model_spec['image_size']} px"
    run = Run.open(
        args, world, signals, clips, splits, model_spec, {"train": stage}, **names, size=size
    )
    run.attach_teacher(build_model, lambda model, x: model(x)[0], evaluate)
    run.log.say("\n".join(filter(None, [said, clips.describe_frames(args.num_frames)])))
    if args.check:
        return check(run, {"train": check_spec(run, published, table)})
    with run.session():
        train(run, published, table)


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    return (
        0
        if run_sweep(main, argv, args, SEARCH, "uar")
        else launch(args, run_inference, partial(run_training, parser))
    )


if __name__ == "__main__":
    sys.exit(main())
