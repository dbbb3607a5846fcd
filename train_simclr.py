"""SimCLR on (cytology) images: contrastive pretraining, then the linear protocol, then fine-tuning.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, arXiv:2002.05709.

  python train_simclr.py --backbone resnet50 --bs 256            pretraining on the embedded images; best on a GPU
  python train_simclr.py --data cells.zip --stage all            all three stages on your own images
  python train_simclr.py --stage finetune --from RUN             one stage, from a finished pretraining run
  python train_simclr.py --demo                                  everything, small: minutes on two CPU cores
"""

import copy
import math
import sys
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from common import augment, checkpoint, config, data, dist, metrics, optim, probe, report, step
from common.config import InputError
from common.log import Log, Pace
from common.models import BACKBONES, build_backbone, input_size
from common.models.heads import SimCLR
from common.run import Run, claim, directory, origin, output_folder, prepare, read_json, write_json
from kernels import nt_xent

# The batch and the learning rate of the linear protocol and of fine-tuning are the cytology recipe's; their epochs only
# bound the early stopping. A learning rate of None follows from the batch.
STAGES = {
    "pretrain": {"epochs": 100, "bs": 256, "lr": None, "wd": 1e-4},
    "linear": {"epochs": 100, "bs": 256, "lr": 0.2, "wd": 0.0, "optimizer": "sgd", "warmup_epochs": 0.0},
    "finetune": {"epochs": 50, "bs": 256, "lr": 1e-4, "wd": 1e-4, "optimizer": "adamw"},
}
LR_OF = {
    "lars": lambda bs: 0.075 * math.sqrt(bs),  # SimCLR, appendix B.1
    "sgd": lambda bs: 0.05 * bs / 256,  # SimSiam, arXiv:2011.10566
    "adamw": lambda bs: 1e-3,
}
# Colour strength 0.5 is the paper's for small images (appendix B.9).
DEMO = dict(backbone="resnet18", image_size=32, stage="all", bs=64, epochs=32, eval_every=4, color_strength=0.5)
DEMO |= dict(finetune_epochs=6, finetune_bs=64, finetune_lr=1e-3)
STEMS = ["imagenet", "cifar"]
DEFAULTS = {"backbone": "resnet50", "stem": STEMS[0]}  # where neither a flag nor --from says otherwise
PIXELS = 32  # side of the raw-pixel baseline's images


def parse_args(argv: list[str] | None = None):
    parser = config.base_parser("simclr", __doc__)
    group = parser.add_argument_group("stages")
    parser.choice(group, "--stage", [*STAGES, "all"], "pretrain", "which stage to run")
    group.add_argument(
        "--from", dest="from_run", metavar="RUN", help="run or checkpoint to start from; none: no training"
    )
    parser.number(group, "--patience", int, 10, "evaluations on dev without a better macro F1 before stopping", low=1)
    for name in ("linear", "finetune"):
        parser.stage(group, name, STAGES[name])
    group = parser.add_argument_group("model")
    parser.choice(group, "--backbone", BACKBONES, None, f"unset: {DEFAULTS['backbone']}, or the one of --from")
    parser.choice(group, "--stem", STEMS, None, f"cifar: for small images; unset: {STEMS[0]}, or the one of --from")
    parser.number(group, "--image-size", int, None, "input side, pixels; unset: the stored one, at most 224", low=1)
    parser.number(group, "--store-size", int, None, "side images are decoded to; unset: their own, at most 256", low=8)
    group = parser.add_argument_group("pretraining")
    parser.number(group, "--proj-dim", int, 128, "outputs of the projection head", low=2)
    parser.number(group, "--temperature", float, 0.2, "of NT-Xent", above=0)
    parser.choice(group, "--augment", ["simclr", "none"], "simclr", "none: both views are the image itself")
    parser.number(group, "--color-strength", float, 1.0, "of the colour distortion", low=0, high=2.5)
    parser.choice(group, "--optimizer", LR_OF, "lars", "optimiser of the pretraining")
    parser.choice(group, "--lr-schedule", ["cosine", "constant"], "cosine", "after the warm-up, in every stage")
    parser.number(group, "--fraction", float, 1.0, "share of the images, stratified, always the same", above=0, high=1)
    args = config.parse(parser, argv, DEMO)

    config.check_use(parser, args)
    used = partial(config.refuse_without_effect, parser, args)
    if args.stage != "all":
        later = [f"{stage}_{flag}" for stage in ("linear", "finetune") for flag in ("epochs", "bs", "lr", "wd")]
        used(later, "without --stage all; use --epochs, --bs, --lr, --wd for a single stage")
    if args.stage in ("linear", "finetune"):
        pretraining = ["proj_dim", "temperature", "augment", "color_strength", "optimizer", "fraction", "accum", "impl"]
        used(pretraining, f"with --stage {args.stage}")
        if args.from_run is None:
            parser.error(f"--stage {args.stage} starts from a backbone: --from RUN (or --from none, random weights)")
    else:
        used(["from_run"], f"with --stage {args.stage}, which trains its backbone")
    if args.stage == "pretrain":
        used(["patience"], "with --stage pretrain, which does not stop early")
    if args.stage == "linear":
        used(["eval_every", "log_every"], "with --stage linear, which evaluates and logs every epoch")
    if args.augment == "none":
        used(["color_strength"], "with --augment none")
    return args, parser


def settings(args, name: str) -> config.Stage:
    """Resolved settings of a stage."""
    first = args.stage == name or (args.stage == "all" and name == "pretrain")
    defaults = STAGES[name] | ({"optimizer": args.optimizer} if name == "pretrain" else {})
    return config.stage(args, name, defaults, first=first, lr_of=LR_OF[defaults["optimizer"]])


def build_data(args, path: str, facts: dist.Facts) -> data.Images:
    """The images of `path`, said in one line."""
    say = print if facts.main else lambda text: None
    return data.prepare(path, store_size=args.store_size, bad=args.bad_images, workers=args.workers, say=say)


def check(args, facts: dist.Facts, images: data.Images, splits: dict, stages: dict[str, config.Stage]) -> None:
    """Refuse what the stages could not use, before anything is written."""
    needs = {"linear": ("train", "dev", "test"), "finetune": ("finetune_train", "finetune_dev", "test")}
    for name, stage in stages.items():
        parts = needs.get(name, ("pretrain",))
        if name != "pretrain" and (len(images.classes) < 2 or not all(len(splits[part]) for part in parts)):
            raise InputError(f"{name} needs labelled images of two classes in train, dev and test: {images.describe()}")
        if name == "pretrain" and stage.bs < 2:
            raise InputError("pretrain: a batch of 1 has no negatives; give --bs 2 or more")
        divisor = {"pretrain": facts.world_size * args.accum, "linear": 1, "finetune": facts.world_size}[name]
        data.check_batch(name, stage.bs, len(splits[parts[0]]), divisor)
    try:
        nt_xent(*torch.eye(4, device=facts.device).chunk(2), args.temperature, impl=args.impl)
    except ValueError as error:
        raise InputError(f"--impl {args.impl}: {error}") from None


def build_model(run: Run, kind: str, weights: dict | None = None) -> nn.Module:
    """The network of a stage on the device: `pretrain` has a projection head, `finetune` a linear one as `fc`.

    `weights` are a backbone's. The random part is a function of --seed.
    """
    args, meta = run.args, run.meta
    torch.manual_seed(args.seed)
    model = build_backbone(meta["backbone"], meta["stem"])
    if weights is not None:
        checkpoint.load_weights(model, weights, f"--from {args.from_run or 'this run'} ({meta['backbone']})")
    width = BACKBONES[meta["backbone"]].num_features
    if kind == "pretrain":
        model = SimCLR(model, width, meta["proj_dim"])
    elif kind == "finetune":
        model.fc = nn.Linear(width, len(meta["classes"]))
    model = dist.sync_batchnorm(model, run.facts).to(run.facts.device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    return model


def two_views(run: Run, pixels: Tensor, ids: np.ndarray, epoch: int) -> Tensor:
    """Normalised views (2n, 3, s, s) of uint8 pixels: first view a of every image, then view b."""
    args, size, stored = run.args, run.meta["image_size"], pixels.shape[-1]
    if args.augment == "none":
        return augment.normalize(augment.resize(pixels, size)).repeat(2, 1, 1, 1)
    drawn = [augment.simclr_params(args.seed, epoch, ids, v, stored, size, args.color_strength) for v in (0, 1)]
    views = torch.cat([augment.make_view(pixels, params, size) for params in drawn])
    return augment.normalize(views).contiguous(memory_format=torch.channels_last)


def train_step(run: Run, model, optimizer, scaler, make_views, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One pretraining update; returns (loss, z (2n, d), gradient norm, bad), all on the device.

    `make_views(slice)` gives the views of a chunk of this process's `count` images. With --accum K the batch keeps all
    its negatives (GradCache, arXiv:2101.06983): embeddings of every chunk first, the loss on all of them, then the
    gradient of each chunk; BatchNorm then sees one chunk at a time.
    """
    args, facts, size = run.args, run.facts, count // run.args.accum
    gather = dist.all_gather_rows if facts.world_size > 1 else None
    chunks = [slice(k * size, (k + 1) * size) for k in range(args.accum)]
    optimizer.zero_grad(set_to_none=True)
    if args.accum == 1:
        with step.autocast(args.precision, facts.device):
            z_a, z_b = model(make_views(chunks[0])).chunk(2)
    else:
        with torch.no_grad(), step.frozen_running_stats(model), step.autocast(args.precision, facts.device):
            parts = [model(make_views(chunk)).chunk(2) for chunk in chunks]
        z_a, z_b = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    loss = nt_xent(z_a, z_b, args.temperature, gather=gather, impl=args.impl)
    scaler.scale(loss).backward()
    if args.accum > 1:
        for chunk in chunks:
            with step.reduce_gradients(model, last=chunk is chunks[-1]):
                with step.autocast(args.precision, facts.device):
                    z = model(make_views(chunk))
                z.backward(torch.cat([z_a.grad[chunk], z_b.grad[chunk]]))
    norm, bad = step.masked_step(optimizer, scaler, loss)
    return loss.detach(), torch.cat([z_a, z_b]).detach(), norm, bad


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, indices: np.ndarray, progress=None) -> Tensor:
    """Outputs of the model in evaluation mode for the images `indices` (n,): float32 (n, outputs) on the CPU."""
    model.eval()
    own = dist.shard(indices, run.facts)
    rows = []
    for pixels in run.data.batches(np.array_split(own, -(-len(own) // 256)), run.args.workers):
        if progress:
            progress.check_stop()
        x = augment.normalize(augment.resize(step.to_device(pixels, run.facts.device), run.meta["image_size"]))
        with step.autocast(run.args.precision, run.facts.device):
            rows.append(model(x.contiguous(memory_format=torch.channels_last)).float())
    return dist.unshard(torch.cat(rows), len(indices)).cpu()


def pretrain(run: Run) -> None:
    """Stage 1: NT-Xent on two views. Writes backbone.pt and features.npz from the epoch of the lowest mean loss."""
    args, facts, log, indices = run.args, run.facts, run.log, run.splits["pretrain"]
    stage = run.stages["pretrain"]
    model = build_model(run, "pretrain")
    optimizer = optim.build_optimizer(stage.optimizer, optim.param_groups([model], stage.wd), lr=stage.lr)
    scaler = step.scaler(args.precision, facts.device)
    progress = run.stage("pretrain", {"model": model, "optimizer": optimizer, "scaler": scaler}, start="scratch")
    if run.settled(progress):
        return
    trained, chance, steps = dist.wrap(model, facts), math.log(2 * stage.bs - 1), len(indices) // stage.bs
    log.say(stage.describe(f"{len(indices)} images", steps) + f"; loss at chance ln(2N-1) = {chance:.4f}")
    pace, begun = Pace(stage.bs, stage.epochs * steps), progress.step
    while progress.epoch < stage.epochs:
        model.train()
        batches = data.epoch_batches(indices, stage.bs, args.seed, progress.epoch, progress.batch, facts)
        for batch, pixels in zip(batches, run.data.batches(batches, args.workers), strict=True):
            lr = step.set_lr(optimizer, stage, progress.step, steps, args.lr_schedule)
            pixels = step.to_device(pixels, facts.device)

            def make_views(chunk, pixels=pixels, batch=batch):
                return two_views(run, pixels[chunk], batch[chunk], progress.epoch)

            if progress.step == 0 and facts.main:
                report.save_grid(run.folder / "figures" / "views.png", augment.denormalize(make_views(slice(0, 8))), 8)
            loss, z, norm, bad = train_step(run, trained, optimizer, scaler, make_views, len(batch))
            progress.add(loss=loss)
            pace.tick()
            done = progress.step + 1
            if log.due(done, args.log_every):
                shown = dist.mean(loss).item()
                values = {"loss": shown, "loss/chance": shown / chance, "lr": lr, "grad_norm": norm.item()}
                values |= metrics.contrastive(*(dist.all_gather_rows(view) for view in z.float().chunk(2)))
                log.interval("pretrain", done, progress.epoch + 1, values, pace, "img")
            log.progress("pretrain", done, pace, "img")
            if done == begun + 2 and facts.device.type == "cpu":
                log.cost("pretrain", steps, stage.epochs, pace)
            progress.end_step(bad)
        loss = progress.mean("loss")
        values = {"pretrain/train/loss": loss, "pretrain/train/loss_over_chance": loss / chance}
        if (progress.epoch + 1) % args.eval_every == 0 or progress.epoch + 1 == stage.epochs:
            values |= representation(run, model.backbone, "dev", "val", progress)
        progress.select(loss, model.state_dict(), values, higher_is_better=False)
        progress.results = values
        log.metrics("pretrain", progress.step, progress.epoch + 1, values)
        progress.end_epoch()
        pace.pause()

    chosen = copy.deepcopy(model)
    chosen.load_state_dict(progress.best_weights())
    test = representation(run, chosen.backbone, "test", "test", progress)
    last = representation(run, model.backbone, "test", "test", progress)
    test |= {f"{name}_last_epoch": value for name, value in last.items()}
    weights = {name: tensor.detach().cpu() for name, tensor in chosen.backbone.state_dict().items()}
    if facts.main:
        checkpoint.save(run.folder / "backbone.pt", weights)
    everything = partial(evaluate, run, chosen.backbone, np.arange(len(run.data)), progress)
    probe.stored_features(run, checkpoint.weights_digest(weights), everything)
    log.metrics("pretrain", progress.step, progress.epoch, test)
    run.finish(progress, progress.results | test | {"pretrain/train/loss_at_chance": chance})


def representation(run: Run, backbone: nn.Module, queries: str, split: str, progress=None) -> dict:
    """kNN accuracy of a split's images, where there are labels, and the effective rank of their features."""
    outputs = partial(evaluate, run, backbone, progress=progress)
    return {f"pretrain/{split}/{name}": value for name, value in probe.representation(run, outputs, queries).items()}


def linear(run: Run, weights: dict | None) -> None:
    """Stage 2: a linear layer on frozen features; beside it, the same on random-weight features and on raw pixels."""
    args, images, everything = run.args, run.data, np.arange(len(run.data))
    stage, labels = run.stages["linear"], run.data.labels

    def backbone_features(weights: dict | None, progress) -> Tensor:
        compute = partial(evaluate, run, build_model(run, "features", weights), everything, progress)
        return probe.stored_features(run, checkpoint.weights_digest(weights), compute) if weights else compute()

    def raw_pixels(_, progress) -> Tensor:
        rows = []
        for pixels in images.batches(np.array_split(everything, -(-len(images) // 256)), args.workers):
            progress.check_stop()
            rows.append(augment.resize(pixels, PIXELS).flatten(1))
        return torch.cat(rows)

    width = BACKBONES[run.meta["backbone"]].num_features
    sources = {
        "linear": ("learned features" if weights else "random-weight backbone", weights, width, backbone_features),
        "linear_random": ("random-weight backbone", None, width, backbone_features),
        "linear_pixels": (f"raw pixels ({PIXELS} px)", None, 3 * PIXELS**2, raw_pixels),
    }
    if not weights:
        del sources["linear_random"]
    for name, (title, source, dim, make) in sources.items():
        torch.manual_seed(args.seed)
        head = nn.Linear(dim, len(run.meta["classes"])).to(run.facts.device)
        optimizer = optim.build_optimizer(stage.optimizer, optim.param_groups([head], stage.wd), lr=stage.lr)
        start = checkpoint.weights_digest(source) if source else name
        progress = run.stage(name, {"head": head, "optimizer": optimizer}, start=start)
        if not run.settled(progress):
            results = probe.linear_protocol(run, progress, head, optimizer, stage, make(source, progress), source or {})
            run.finish(progress, results)
        accuracy, f1 = (run.results[f"{name}/test/{metric}"] for metric in ("accuracy", "macro_f1"))
        run.log.say(f"linear protocol, {title + ':':24}test accuracy {accuracy:.4f}, macro F1 {f1:.4f}")
    majority = np.bincount(labels[run.splits["train"]]).argmax()
    run.results["majority/test/accuracy"] = share = float((labels[run.splits["test"]] == majority).mean())
    run.log.say(f"linear protocol, {'majority class:':24}test accuracy {share:.4f}")


def finetune(run: Run, weights: dict | None) -> None:
    """Stage 3: train the whole model on labels; test the epoch of the best macro F1 on dev."""
    args, facts, log, labels = run.args, run.facts, run.log, run.data.labels
    train, dev, test = (run.splits[name] for name in ("finetune_train", "finetune_dev", "test"))
    stage, num_classes, targets = run.stages["finetune"], len(run.meta["classes"]), torch.from_numpy(labels)
    model = build_model(run, "finetune", weights)
    optimizer = optim.build_optimizer(stage.optimizer, optim.param_groups([model], stage.wd), lr=stage.lr)
    scaler = step.scaler(args.precision, facts.device)
    start = checkpoint.weights_digest(weights) if weights else "random"
    progress = run.stage("finetune", {"model": model, "optimizer": optimizer, "scaler": scaler}, start=start)
    if run.settled(progress):
        return
    trained, steps = dist.wrap(model, facts), len(train) // stage.bs
    log.say(
        stage.describe(f"{len(train)} training, {len(dev)} dev and {len(test)} test images", steps)
        + f", patience {args.patience} evaluations"
    )
    pace = Pace(stage.bs, stage.epochs * steps)
    while progress.epoch < stage.epochs and progress.stale < args.patience:
        model.train()
        batches = data.epoch_batches(train, stage.bs, args.seed, progress.epoch, progress.batch, facts)
        for batch, pixels in zip(batches, run.data.batches(batches, args.workers), strict=True):
            lr = step.set_lr(optimizer, stage, progress.step, steps, args.lr_schedule)
            params = augment.crop_flip_params(args.seed, progress.epoch, batch, 0, pixels.shape[-1])
            x = augment.make_view(step.to_device(pixels, facts.device), params, run.meta["image_size"])
            x = augment.normalize(x).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            with step.autocast(args.precision, facts.device):
                logits = trained(x)
            loss = nn.functional.cross_entropy(logits.float(), step.to_device(targets[batch], facts.device))
            scaler.scale(loss).backward()
            norm, bad = step.masked_step(optimizer, scaler, loss)
            progress.add(loss=loss)
            pace.tick()
            done = progress.step + 1
            if log.due(done, args.log_every):
                values = {"loss": dist.mean(loss).item(), "lr": lr, "grad_norm": norm.item()}
                log.interval("finetune", done, progress.epoch + 1, values, pace, "img")
            log.progress("finetune", done, pace, "img")
            progress.end_step(bad)
        values = {"finetune/train/loss": progress.mean("loss")}
        if (progress.epoch + 1) % args.eval_every == 0 or progress.epoch + 1 == stage.epochs:
            values |= probe.score("finetune/val", evaluate(run, model, dev, progress), labels[dev], num_classes)
            progress.select(values["finetune/val/macro_f1"], model.state_dict(), values, higher_is_better=True)
        log.metrics("finetune", progress.step, progress.epoch + 1, values)
        progress.end_epoch()
        pace.pause()

    chosen = copy.deepcopy(model)
    chosen.load_state_dict(progress.best_weights())
    results = probe.score("finetune/test", evaluate(run, chosen, test, progress), labels[test], num_classes)
    last = probe.score("finetune/test", evaluate(run, model, test, progress), labels[test], num_classes)
    results |= {f"{name}_last_epoch": value for name, value in last.items()}
    log.metrics("finetune", progress.step, progress.epoch, results)
    run.finish(progress, results)


def use(args, facts: dist.Facts) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv for images without labels."""
    source = args.eval or args.resume
    state = checkpoint.load_selected(source)
    meta, kind = state["meta"], state["meta"]["stage"]
    if meta["script"] != "simclr":
        raise InputError(f"{source} is of train_{meta['script']}.py; use that script")
    if args.predict and kind == "pretrain":
        raise InputError(f"{source} has no classifier: run --stage linear or --stage finetune --from it first")
    folder = output_folder(args.out or source)
    trained_on = (read_json(origin(source) / "config.json") or {}).get("data", args.data)
    images = build_data(args, args.predict or (args.data if args.data != "sample" else trained_on), facts)
    run = Run(args, facts, images, data.split(images), folder, Log(None, main=facts.main), None, meta, {})
    model = build_model(run, "pretrain" if kind == "pretrain" else "finetune")
    checkpoint.load_weights(model, state["model"], source)
    if args.predict:
        scores = evaluate(run, model, np.arange(len(images))).softmax(1)
        if facts.main:
            report.write_predictions(folder / "predictions.csv", images.ids, meta["classes"], scores)
            print(f"{len(images)} predictions in {folder / 'predictions.csv'}")
        return
    if kind == "pretrain":
        results = representation(run, model.backbone, "test", "test")
    else:
        images.number_classes(meta["classes"])
        test = run.splits["test"]
        if not len(test):
            raise InputError(f"{images.describe()}: there is no labelled test image to evaluate on")
        results = probe.score("eval/test", evaluate(run, model, test), images.labels[test], len(meta["classes"]))
    results = {f"eval/{name.split('/', 1)[1]}": value for name, value in results.items()}
    if facts.main:
        write_json(folder / "eval.json", results)
        print("\n".join(f"{name} {value:.4f}" for name, value in results.items()))


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    with config.exit_codes():
        facts = dist.init(args.device)
        prepare(args)
        if args.eval or args.predict:
            use(args, facts)
            dist.close()
            return 0
        images = build_data(args, args.data, facts)
        weights, before = None, {}
        if args.from_run not in (None, "none"):
            weights, before = checkpoint.load_backbone(args.from_run)
        name, stem = (getattr(args, flag) or before.get(flag, first) for flag, first in DEFAULTS.items())
        size = input_size(name, stem, args.image_size or before.get("image_size"), images.store_size)
        meta = dict(script="simclr", backbone=name, stem=stem, image_size=size, proj_dim=args.proj_dim)
        meta["classes"] = images.classes
        stages = {stage: settings(args, stage) for stage in (STAGES if args.stage == "all" else [args.stage])}
        splits = data.split(images, args.fraction)
        check(args, facts, images, splits, stages)
        start = {"from_run": checkpoint.weights_digest(weights)} if weights else {}
        identity = config.identity(parser, args, data=images.fingerprint, stage=args.stage, **meta, **start)
        folder = directory(args, "simclr", f"{name}-{args.stage}-bs{next(iter(stages.values())).bs}", identity)
        resolved = {stage: vars(values) for stage, values in stages.items()} | meta
        if not claim(folder, args, identity, resolved, facts):
            dist.close()
            return 0
        log = Log(folder, main=facts.main, tensorboard=args.tensorboard)
        run = Run(args, facts, images, splits, folder, log, checkpoint.Signals(), meta, stages)
        log.say(f"run directory {folder}; device {facts.device}, {facts.world_size} process(es), input {size} px")
        with run.recorded():
            if "pretrain" in stages:
                pretrain(run)
                weights = checkpoint.load(folder / "backbone.pt")
            if "linear" in stages:
                linear(run, weights)
            if "finetune" in stages:
                finetune(run, weights)
        dist.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
