"""Dialogue acts without labels: modalities of utterances fused by contrastive learning, then
clustered.

Zhang et al., Unsupervised Multimodal Clustering for Semantics Discovery in Multimodal Utterances,
arXiv:2405.12775.

  python train_cluster.py --data utterances.npz                               float arrays of one row per utterance
  python train_cluster.py --data acts.tsv --text-model minilm/ --text-layer 3 text encoded by a BERT-family model
  python train_cluster.py --data acts.tsv --mode umc                          the published procedure, uncorrected
  python train_cluster.py --predict new.npz --resume RUN                      clusters of utterances without labels
  python train_cluster.py --demo                                              small, embedded: minutes on two CPU cores

Labels, where there are any, are counted and scored against. They enter no loss, no selection and no
schedule.
"""

import copy
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import amp, clustering, config, deep_cluster, optim
from common.check.result import CheckSpec
from common.check.runner import check
from common.data import sampling, utterances
from common.deep_cluster import DISTANCES, Rows, Targets, score
from common.errors import Diverged, InputError, as_input_error
from common.models import umc
from common.models.text import Lsa
from common.monitor import Monitor
from common.report.clusters import log_choices, log_scores, write_cluster_report
from common.rng import uniform
from common.run import checkpoint, dist
from common.run.inference import load_run, write_predictions
from common.run.launch import launch, run_sweep
from common.run.log import Log, Pace
from common.run.run import Run, test_best_and_last
from common.run.signals import Signals
from kernels import nt_xent, sup_con

STAGES = {
    "default": {
        "pretrain": {"epochs": 3, "bs": 512, "lr": 3e-5, "wd": 0.01, "optimizer": "adamw"},
        "cluster": {"epochs": 12, "bs": 512, "lr": 3e-5, "wd": 0.01, "optimizer": "adamw"},
    },
    "umc": {
        "pretrain": {"epochs": 100, "bs": 128, "lr": 2e-5, "wd": 0.01, "optimizer": "adamw"},
        "cluster": {
            "epochs": None,
            "bs": 128,
            "lr": 2e-4,
            "wd": 0.01,
            "optimizer": "adamw",
        },  # (1 - select-share) / select-growth
    },
}
# What --mode means: flag -> its value by default and with --mode umc (those of UMC's MELD-DA
# configuration), what is allowed, what it is. Each can be given on its own.
MODE_DEFAULTS = {
    "input_weighting": (
        "weighted",
        "raw",
        ["weighted", "raw"],
        "weighted: principal axes, by agreement with the anchor",
    ),
    "last_step": (
        "valid",
        "padded",
        ["valid", "padded"],
        "where a sequence ends: at its length or the longest's",
    ),
    "views": (
        "all",
        "anchored",
        ["all", "anchored"],
        "all: the anchor is masked too; anchored: UMC's three views",
    ),
    "distance": (
        "auto",
        "euclidean",
        ["auto", *DISTANCES],
        "discriminant: less of scatter in clusters; auto: the stabler",
    ),
    "density": (
        "smallest",
        "largest",
        ["smallest", "largest"],
        "dense rows to take: close together or spread out",
    ),
    "select_epoch": (
        "stability",
        "last",
        ["stability", "last"],
        "epoch to keep: of the most stable clusters, or the last",
    ),
    "min_select_share": (
        0.1,
        0.0,
        dict(low=0, high=1),
        "least rows to select of a cluster, as a share of the mean cluster",
    ),
    "smoothing": (
        0.1,
        0.0,
        dict(low=0, high=1),
        "nearest rows averaged for k-means, as a share of the mean cluster",
    ),
    "temperature": (0.5, 0.2, dict(above=0), "of the contrastive pretraining"),
    "sup_temperature": (0.5, 20.0, dict(above=0), "of the loss on selected rows"),
    "unsup_temperature": (1.0, 20.0, dict(above=0), "of the loss on the other rows"),
}
# Earlier names of flags; --thres and --delta are UMC's.
ALIASES = {
    "--choose": "--select-epoch",
    "--delta": "--select-growth",
    "--direction": "--density",
    "--inputs": "--input-weighting",
    "--lengths": "--last-step",
    "--metric": "--distance",
    "--min-share": "--min-select-share",
    "--only": "--modalities",
    "--thres": "--select-share",
}
READING = ["modalities", "text_model", "text_layer", "max_length"]
SEARCH = {
    "lr": (3e-6, 3e-4),
    "cluster_lr": (3e-6, 3e-4),
    "temperature": (0.1, 2.0),
    "sup_temperature": (0.1, 5.0),
}
DEMO = dict(bs=256, cluster_bs=256)
MASK = 0.2  # chance that a view lacks a modality for which another one stands in


def parse_args(argv: list[str] | None = None):
    parser = config.base_parser("cluster", __doc__)
    parser.set_defaults(log_every=50)
    for old, flag in ALIASES.items():
        parser.alias(old, flag)
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text-model", metavar="DIR", help="BERT-family encoder; unset: TF-IDF and SVD of the text"
    )
    parser.number(
        group,
        "--text-layer",
        int,
        None,
        "its layer whose states are averaged; unset: the last",
        low=0,
    )
    parser.number(
        group,
        "--max-length",
        int,
        None,
        "tokens and steps of a sequence that are read; unset: all",
        low=1,
    )
    group = parser.add_argument_group("method")
    parser.choice(
        group,
        "--mode",
        STAGES,
        "default",
        "umc: the published procedure, the defaults of all flags below",
    )
    parser.number(group, "--base-dim", int, 256, "width of the embedding, a multiple of 8", low=8)
    parser.number(group, "--dropout", float, 0.1, "of the fusion", low=0, high=0.9)
    names = dict(metavar="NAMES", help="use these modalities alone, as `text,timing`")
    group.add_argument("--modalities", type=lambda text: text.split(","), **names)
    epochs = "of stage 2; unset: 12, with --mode umc (1 - select-share) / select-growth"
    parser.number(group, "--cluster-epochs", int, None, epochs, low=1)
    for flag, kind, low in (("bs", int, 2), ("lr", float, 0), ("wd", float, 0)):
        parser.number(
            group,
            f"--cluster-{flag}",
            kind,
            None,
            f"--{flag} of stage 2; unset: by --mode",
            low=low,
        )
    for name, (value, of_umc, allowed, text) in MODE_DEFAULTS.items():
        flag, text = (
            f"--{name.replace('_', '-')}",
            f"{text}; unset: {value}, with --mode umc {of_umc}",
        )
        if isinstance(allowed, list):
            parser.choice(group, flag, allowed, None, text)
        else:
            parser.number(group, flag, float, None, text, **allowed)
    group = parser.add_argument_group("clusters")
    group.add_argument(
        "--k", type=clusters, help="number, or auto; unset: that of the labels, else auto"
    )
    parser.choice(
        group,
        "--assign",
        ["kmeans", "sinkhorn", "partial-ot"],
        "kmeans",
        "how rows get pseudo-labels",
    )
    parser.number(
        group,
        "--select-share",
        float,
        0.1,
        "share of a cluster that the first epoch selects",
        above=0,
        high=1,
    )
    parser.number(
        group,
        "--select-growth",
        float,
        0.05,
        "by how much the share grows each epoch",
        low=0,
        high=1,
    )
    parser.choice(
        group,
        "--on-plateau",
        ["lr", "share", "none"],
        "lr",
        "what to halve when the stability stalls",
    )
    parser.number(
        group, "--min-epochs", int, 20, "epochs of stage 2 before it may stop early", low=1
    )
    args = config.parse(parser, argv, DEMO, SEARCH)

    config.check_inference_flags(parser, args)
    refuse = partial(config.reject_unused_flags, parser, args)
    refuse(
        ["ensemble", "teacher"],
        "here: runs number their clusters as they like, there are no classes to share",
    )
    refuse(
        ["accum", "on_bad_item", "eval_every", "workers"],
        "on utterances: batches are whole, every epoch is watched",
    )
    if args.text_model is None:
        refuse(["text_layer"], "without --text-model")
    if mode_default(args, "select_epoch") == "last":
        refuse(["on_plateau", "min_epochs"], "with --select-epoch last, which watches no score")
    if args.assign == "partial-ot":
        refuse(["density"], "with --assign partial-ot, which takes the rows of least cost")
    if args.mode == "umc" and args.select_growth == 0 and args.cluster_epochs is None:
        parser.error(
            "--select-growth 0: stage 2 of --mode umc has (1 - select-share) / select-growth"
            " epochs; give --cluster-epochs"
        )
    if (
        mode_default(args, "select_epoch") != "last"
        and args.min_epochs >= settings(args)["cluster"].epochs
    ):
        refuse(["min_epochs"], "with fewer epochs of stage 2; give more --cluster-epochs")
    if args.base_dim % umc.HEADS:
        parser.error(f"--base-dim {args.base_dim}: not a multiple of {umc.HEADS}")
    return args, parser


def mode_default(args, name: str):
    """A setting that --mode decides where its own flag does not."""
    value = getattr(args, name)
    return MODE_DEFAULTS[name][args.mode == "umc"] if value is None else value


def clusters(text: str):
    """--k: `auto` or a number."""
    return text if text == "auto" else config.number(int, low=2)(text)


def build_data(
    path: str, reading: dict, world: dist.Dist, home: Path | None = None
) -> tuple[Rows, Lsa | None]:
    """The rows of `path`, said in a few lines, and its text features where there are any.

    `reading` are the flags READING by name, `home` the run whose fitted text features are used.
    """
    rows, lsa = deep_cluster.read_rows(path, reading, world.device, home)
    if world.is_main:
        print(rows.table.describe())
        for finding, words in utterances.data_problems(rows.table).items():
            print(f"  {finding}: {words}")
    return rows, lsa


def validate(args, world: dist.Dist, rows: Rows, splits: dict, stages: dict, k) -> None:
    """Refuse what the stages could not use, before anything is written."""
    train, test = splits["train"], splits["test"]
    scored = [(test, "test")] if (rows.table.labels[test] >= 0).any() else []
    for part, name in [(train, "training"), *scored]:
        if k != "auto" and k > len(part):
            raise InputError(f"--k {k}: there are {len(part)} {name} utterances; lower --k")
    for name, stage in stages.items():
        sampling.check_batch(name, stage.bs, len(train), world.world_size)
    if args.base_dim < len(rows.names):
        raise InputError(
            f"--base-dim {args.base_dim}: each of {len(rows.names)} modalities needs an axis;"
            " raise it"
        )
    with as_input_error("--impl", args.impl):
        nt_xent(*torch.eye(4, device=world.device).chunk(2), 1.0, impl=args.impl)


def settings(args) -> dict[str, config.StageConfig]:
    """Resolved settings of both stages."""
    table = copy.deepcopy(STAGES[args.mode])
    if table["cluster"]["epochs"] is None and args.cluster_epochs is None:
        table["cluster"]["epochs"] = max(round((1 - args.select_share) / args.select_growth), 1)
    return {
        name: config.stage_config(args, name, table[name], first=name == "pretrain", lr_of=None)
        for name in table
    }


def build_model(run: Run, basis: dict | None) -> umc.Fusion:
    """The fusion network on the device; its random part is a function of --seed."""
    args, model_spec = run.args, run.model_spec
    torch.manual_seed(args.seed)
    options = dict(
        dropout=args.dropout, padded_last=model_spec["last_step"] == "padded", basis=basis
    )
    model = umc.Fusion(
        model_spec["widths"],
        model_spec["sequences"],
        model_spec["base_dim"],
        model_spec["k"],
        **options,
    ).to(run.world.device)
    if args.compile:
        model.compile()
    return model


def masks(run: Run, batch: np.ndarray, epoch: int) -> list[Tensor]:
    """What each view keeps, (n, modalities) of 0 and 1: two random views, or UMC's with the anchor
    in all of them.

    A random view may lack a modality as far as another one agrees with the anchor: what is left
    must tell of the same.
    """
    n, count, weights = len(batch), len(run.data.names), run.model_spec["weights"]
    if run.model_spec["views"] == "anchored":
        kept = [torch.ones(n, count) for _ in range(max(count, 2))]
        for i in range(1, count):
            kept[i - 1][:, i] = 0
    else:
        kept, names = [], run.data.names
        chance = [
            MASK * max((weights[other] for other in names if other != name), default=0.0)
            for name in names
        ]
        for view in (0, 1):
            keep = torch.from_numpy(uniform(run.args.seed, epoch, batch, view, count) >= chance)
            keep[~keep.any(1), 0] = True
            kept.append(keep.float())
    return [keep.to(run.world.device) for keep in kept]


def train_step(
    run: Run,
    model,
    optimizer,
    scaler,
    batch: np.ndarray,
    epoch: int,
    labels: Tensor | None,
    temperature: float,
):
    """One update on the views of `batch`; returns (loss, gradient norm, bad), device scalars.

    Positives are the views of an utterance, or with `labels` (n,) all views of utterances of one
    label.
    """
    world, impl = run.world, run.args.impl
    gather = dist.all_gather_rows if world.world_size > 1 else None
    inputs, lengths = run.data.take(batch)
    optimizer.zero_grad(set_to_none=True)
    with amp.autocast(run.args.precision, world.device):
        h = [model(inputs, lengths, keep)[1] for keep in masks(run, batch, epoch)]
    if labels is None and len(h) == 2:
        loss = nt_xent(*h, temperature, gather=gather, impl=impl)
    else:
        own = torch.from_numpy(batch) if labels is None else labels
        loss = sup_con(
            torch.cat(h), own.to(world.device).repeat(len(h)), temperature, gather=gather, impl=impl
        )
    scaler.scale(loss).backward()
    norm, bad = amp.guarded_step(optimizer, scaler, loss)
    return loss.detach(), norm, bad


@torch.no_grad()
def evaluate(
    run: Run, model: umc.Fusion, indices: np.ndarray, progress=None, *, raw: bool = False
) -> Tensor:
    """What is clustered of the utterances `indices` (n,): z in the model's metric (`raw`: as the
    network gives it), float32 (n, base_dim), on the CPU.
    """
    model.eval()
    # The attention within a sequence of L steps takes L * L numbers.
    parts, size = (
        [],
        2**20 // max(x.shape[1] ** 2 if x.ndim == 3 else 1024 for x in run.data.inputs.values())
        or 1,
    )
    for part in np.array_split(indices, -(-len(indices) // size)):
        if progress:
            progress.check_stop()
        with amp.autocast(run.args.precision, run.world.device):
            z, _ = model(*run.data.take(part))
        parts.append(z.float() if raw else z.float() @ model.metric)
    z = torch.cat(parts).cpu()
    if not z.isfinite().all():
        raise Diverged(
            "the embedding is not finite: the weights have grown too large. Try a lower --lr"
        )
    return z


def eval_stability(
    run: Run, name: str, model, progress, targets: Targets | None = None
) -> tuple[float, dict]:
    """The stability of the training rows' clusters, and with the rest of an epoch's figures as
    metrics.
    """
    z = evaluate(run, model, run.splits["train"], progress)
    stable = deep_cluster.stability(z, run.model_spec["k"], run.args.seed)
    values = {"stability": stable}
    if targets:  # what the run leaves behind are the clusters of the epoch's end
        rows = deep_cluster.smooth(z, run.model_spec["k"], run.model_spec["smoothing"])
        model.centroids.copy_(
            clustering.kmeans(rows, run.model_spec["k"], start=model.centroids.cpu()).centroids
        )
        values |= deep_cluster.describe(
            run, z, clustering.nearest(z, model.centroids.cpu())[0], targets
        )
    return stable, {f"{name}/train/{key}": value for key, value in values.items()}


def epoch_passes(
    run: Run, stage: config.StageConfig, epoch: int, targets: Targets | None
) -> list[tuple[np.ndarray, Tensor | None]]:
    """The batches of an epoch with their pseudo-labels; in stage 2 the selected rows, then the
    others without any.
    """
    train, world = run.splits["train"], run.world
    if targets is None:
        return [
            (batch, None)
            for batch in sampling.epoch_batches(train, stage.bs, run.args.seed, epoch, 0, world)
        ]
    found = []
    for chosen in (True, False):
        own = np.flatnonzero(targets.selected.numpy() == chosen)
        # Fewer rows than a batch make one smaller batch, not none.
        bs = min(stage.bs, len(own) // world.world_size * world.world_size)
        if bs < 2 * world.world_size:
            continue
        for rows in sampling.epoch_batches(own, bs, run.args.seed, 2 * epoch + chosen, 0, world):
            found.append((train[rows], targets.labels[rows] if chosen else None))
    return found


def train(run: Run, name: str, model: umc.Fusion, start: str) -> None:
    """A stage: epochs of `passes`, each watched; keeps the epoch of the most stable clusters, or
    the last one.

    The start counts as an epoch of stage 1: where contrastive learning blurs the clusters, it is
    what stage 2 gets.
    """
    args, world, log, model_spec, stage = (
        run.args,
        run.world,
        run.log,
        run.model_spec,
        run.stages[name],
    )
    second, last = name == "cluster", model_spec["select_epoch"] == "last"
    optimizer = optim.of_stage(stage, [model])
    scaler, monitor = amp.scaler(args.precision, world.device), Monitor(args.min_epochs)
    targets = Targets(len(run.splits["train"])) if second else None
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "monitor": monitor}
    progress = run.stage(name, parts | ({"targets": targets} if second else {}), start=start)
    if run.is_done(progress):
        model.load_state_dict(progress.best_weights())
        return
    trained, steps = dist.wrap(model, world), len(run.splits["train"]) // stage.bs
    views = 2 if model_spec["views"] == "all" else max(len(run.data.names), 2)
    tau, tau_rest = (
        (model_spec["sup_temperature"], model_spec["unsup_temperature"])
        if second
        else (model_spec["temperature"],) * 2
    )
    chance = math.log(views * stage.bs - 1)
    log.say(stage.describe(f"{len(run.splits['train'])} utterances", steps))
    bands = f"{2 / tau:.4f}" + (
        f" on selected utterances, ± {2 / tau_rest:.4f} on the others" if second else ""
    )
    log.say(
        f"{name}: n = {views} views x {stage.bs} - 1, the loss lies in ln n ± 2/τ = {chance:.4f}"
        f" ± {bands}"
    )

    def keep(stable: float, values: dict) -> None:
        progress.select(
            progress.epoch if last else stable, model.state_dict(), values, higher_is_better=True
        )

    if not second and progress.step == 0:
        stable, values = eval_stability(run, name, model, progress)
        log.metrics(name, 0, 0, values)
        progress.epoch = -1  # select() counts from 1: the start is epoch 0
        keep(stable, values)
        progress.epoch = 0
    pace = Pace(stage.bs, stage.epochs * steps, "utterance")
    while progress.epoch < stage.epochs and (
        last or not second or not monitor.should_stop(args.on_plateau)
    ):
        halved = [action for _, action in monitor.actions]
        if second and progress.batch == 0:
            share = (args.select_share + args.select_growth * progress.epoch) * 0.5 ** halved.count(
                "share"
            )
            deep_cluster.assign(
                run,
                model,
                targets,
                evaluate(run, model, run.splits["train"], progress, raw=True),
                min(share, 1.0),
            )
        model.train()
        batches = epoch_passes(run, stage, progress.epoch, targets)
        for batch, labels in batches[progress.batch :]:
            place = progress.epoch * steps + min(progress.batch, steps - 1)
            lr = amp.set_lr(optimizer, stage, place, steps, args.lr_schedule) * 0.5 ** halved.count(
                "lr"
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            temperature = tau if labels is not None else tau_rest
            loss, norm, bad = train_step(
                run, trained, optimizer, scaler, batch, progress.epoch, labels, temperature
            )
            run.end_step(progress, pace, {"loss": loss}, lr, norm, bad)
        stable, values = eval_stability(run, name, model, progress, targets)
        values = {f"{name}/train/loss": progress.mean("loss")} | values
        monitor.add(stable)
        keep(stable, values)
        if second:
            values |= {
                f"{name}/monitor/{key}": value
                for key, value in deep_cluster.figures(monitor).items()
            }
            for alarm in monitor.alarms():
                log.say(f"{name}: {alarm}")
            advice = None if last else monitor.advice(args.on_plateau)
            if advice:
                monitor.act(advice)
                log.say(
                    f"{name}: the stability stalls; halving"
                    f" {'the learning rate' if advice == 'lr' else '--select-share'}"
                )
        progress.results = values
        log.metrics(name, progress.step, progress.epoch + 1, values, quiet=True)
        shown = [
            f"{key.split('/')[-1]} {value:.4g}" for key, value in values.items() if "/train/" in key
        ]
        log.say(f"{name} epoch {progress.epoch + 1} | {' | '.join(shown)}")
        progress.end_epoch()
        pace.pause()
    results = progress.results
    if second:
        results |= finish_clustering(run, model, progress, monitor, targets)
    run.finish(progress, results)
    model.load_state_dict(progress.best_weights())


def finish_clustering(
    run: Run, model: umc.Fusion, progress, monitor: Monitor, targets: Targets
) -> dict:
    """The test metrics of the chosen model, of the last epoch and of k-means without training;
    writes the findings.
    """
    test, table, k, smoothing = (
        run.splits["test"],
        run.data.table,
        run.model_spec["k"],
        run.model_spec["smoothing"],
    )

    def scored(network, _):
        z = evaluate(run, network, np.arange(len(table)), progress)
        return score("cluster/test", z[test], table.labels[test], k, smoothing), (
            z,
            network.centroids.cpu(),
        )

    results, (z, centroids) = test_best_and_last(progress, model, scored)
    results = deep_cluster.baselines(run) | results
    tracks = deep_cluster.tracking(run)
    results |= {} if tracks is None else {"cluster/train/stability_tracks_nmi": tracks}
    run.log.metrics("cluster", progress.step, progress.epoch, results, quiet=True)
    log_scores(run, results)
    if run.world.is_main:
        write_cluster_report(run, z, centroids, monitor, targets, results)
    return results


def check_spec(run: Run, basis: dict | None) -> CheckSpec:
    """Stage 1 in the terms of --check: stage 2 takes the same steps on labels of its own making."""
    stage, model_spec, rows = run.stages["pretrain"], run.model_spec, run.data
    size, tau, views = (
        min(64, stage.bs),
        model_spec["temperature"],
        2 if model_spec["views"] == "all" else max(len(rows.names), 2),
    )
    middle = math.log(views * size - 1)

    def one_step(model, optimizer, scaler, batch, epoch):
        return train_step(run, model, optimizer, scaler, batch, epoch, None, tau)

    def entry(model, call):
        inputs, lengths = call[:2]
        return list(inputs.values()), lambda xs: model(dict(zip(inputs, xs, strict=True)), lengths)[
            0
        ]

    options = dict(
        seen=lambda calls, n: torch.stack([call[2] for call in calls], 1), size=size, images=None
    )
    options |= dict(
        chance=(middle - 2 / tau, 1.1 * middle), varies=model_spec["views"] == "all", entry=entry
    )
    options |= dict(
        rows=lambda output: output[1],
        idle=rows.padding if model_spec["last_step"] == "valid" else None,
    )
    options |= dict(
        larger=lambda: build_model(run.with_spec(base_dim=2 * model_spec["base_dim"]), basis)
    )
    functions = partial(build_model, run, basis), one_step, partial(evaluate, run, raw=True)
    return CheckSpec(run, stage, run.splits["train"], run.splits["test"], *functions, **options)


def run_inference(args, world: dist.Dist) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv, the clusters of other
    utterances.
    """
    model_of = load_run(args, "cluster")
    model_spec = model_of.state["model_spec"]
    rows, _ = build_data(model_of.path, model_spec["reading"], world, model_of.home)
    widths = {name: rows.inputs[name].shape[-1] for name in rows.names}
    if widths != model_spec["widths"] or sorted(rows.lengths) != model_spec["sequences"]:
        raise InputError(
            f"{model_of.path} has the modalities {widths}, the model reads {model_spec['widths']}"
        )
    splits = utterances.split(rows.table)
    run = Run(
        args,
        world,
        rows,
        splits,
        model_of.folder,
        Log(None, main=world.is_main),
        None,
        model_spec,
        {},
    )
    model = build_model(
        run, umc.empty_basis(widths) if model_spec["input_weighting"] == "weighted" else None
    )
    checkpoint.load_weights(model, model_of.state["model"], model_of.source)
    if args.predict:
        if model_spec["stage"] != "cluster":
            raise InputError(
                f"{model_of.source} has no clusters yet: name the run, or its cluster/best.pt"
            )
        z, centroids = evaluate(run, model, np.arange(len(rows.table))), model.centroids.cpu()
        chosen, _, _, scores = deep_cluster.membership(z, centroids)
        if world.is_main:
            classes = [str(c) for c in range(model_spec["k"])]
            write_predictions(
                run.folder / "predictions.csv", rows.table.ids, classes, scores, chosen.tolist()
            )
            print(f"{len(rows.table)} predictions in {run.folder / 'predictions.csv'}")
        return
    test = run.splits["test"]
    results = score(
        "cluster/test",
        evaluate(run, model, test),
        rows.table.labels[test],
        model_spec["k"],
        model_spec["smoothing"],
    )
    if not results:
        raise InputError(f"{rows.table.name}: there is no labeled test utterance to evaluate on")
    model_of.write(results, world)


def run_training(parser, args, world: dist.Dist, signals: Signals) -> None:
    """Train: read the data, settle what the run is, and run its two stages."""
    stages, reading = settings(args), {name: getattr(args, name) for name in READING}
    rows, lsa = build_data(args.data, reading, world)
    table, splits = rows.table, utterances.split(rows.table)
    k = args.k or (len(table.classes) if table.labeled and len(table.classes) > 1 else "auto")
    validate(args, world, rows, splits, stages, k)
    basis, weights, anchor, k, estimate = deep_cluster.fused_basis(
        args, rows, splits["train"], None if k == "auto" else k
    )
    validate(args, world, rows, splits, stages, k)  # again: the number may be an estimate
    model_spec = dict(
        script="cluster",
        k=k,
        base_dim=args.base_dim,
        reading=reading,
        sequences=sorted(rows.lengths),
    )
    model_spec["widths"] = {name: rows.inputs[name].shape[-1] for name in rows.names}
    model_spec |= {name: mode_default(args, name) for name in MODE_DEFAULTS} | {
        "weights": weights,
        "anchor": anchor,
        "stability": None,
    }
    model_spec["estimate"] = estimate and estimate.table
    if model_spec["distance"] == "auto":
        model_spec["stability"] = deep_cluster.metric_stability(
            rows, splits["train"], basis, k, args.seed
        )
        model_spec["distance"] = max(model_spec["stability"], key=model_spec["stability"].get)
    identity = config.run_id(parser, args, data=table.fingerprint, k=k, modalities=rows.names)
    names = dict(name=f"{args.mode}-k{k}-dim{args.base_dim}", identity=identity)
    run = Run.open(
        args, world, signals, rows, splits, model_spec, stages, **names, size=f"{k} clusters"
    )
    if lsa and world.is_main:
        checkpoint.save(run.folder / "text.pt", lsa.state)
    log_choices(run)
    basis = basis if model_spec["input_weighting"] == "weighted" else None
    if args.check:
        return check(run, {"pretrain": check_spec(run, basis)})
    with run.session():
        model = build_model(run, basis)
        train(run, "pretrain", model, "scratch")
        train(run, "cluster", model, checkpoint.weights_digest(model.state_dict()))


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    return (
        0
        if run_sweep(main, argv, args, SEARCH, None)
        else launch(args, run_inference, partial(run_training, parser))
    )


if __name__ == "__main__":
    sys.exit(main())
