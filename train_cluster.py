"""Dialogue acts without labels: utterances fused by contrastive learning, then clustered.

Zhang et al., Unsupervised Multimodal Clustering for Semantics Discovery in Multimodal Utterances,
arXiv:2405.12775.

Float arrays of one row per utterance:
  python train_cluster.py --data utterances.npz
Text, encoded by a model of the BERT family:
  python train_cluster.py --data acts.tsv --text-model minilm/
The published procedure, uncorrected:
  python train_cluster.py --data acts.tsv --mode umc
Clusters of new utterances:
  python train_cluster.py --predict new.npz --resume RUN
Small, on embedded data, in minutes on two CPU cores:
  python train_cluster.py --demo

Labels, where there are any, are counted and scored against. They enter no loss, no selection and no
schedule.
"""

import common  # noqa: F401  # isort: skip  (it refuses an older Python)
import argparse
import copy
import math
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from common import amp, clustering, config, deep_cluster, optim
from common.check import reference
from common.check.result import CheckSpec, NetworkView
from common.check.runner import check
from common.data import sampling, utterances
from common.data.groups import group_items
from common.deep_cluster import DISTANCES, Rows, Targets
from common.errors import InputError, as_input_error, plural
from common.live import digits
from common.models import umc
from common.models.text import Lsa, middle_and_last
from common.monitor import Monitor
from common.report import page
from common.report.clusters import (
    log_choices,
    log_scores,
    number_not_found,
    write_cluster_report,
    write_clusters,
)
from common.rng import uniform
from common.run import dist
from common.run.card import Card
from common.run.evaluation import Evaluation
from common.run.inference import LoadedRun, load_run, restore_flags
from common.run.launch import launch, run_sweep
from common.run.loop import Batch, Loop, Step
from common.run.run import Run, test_best_and_last
from common.run.signals import Signals
from kernels import nt_xent, sup_con

CARD = Card(
    name="cluster",
    about="Groups of utterances found without labels: modalities are fused by contrastive learning"
    " (pretrain), then clustered, and the clusters sharpened (cluster). Labels, where there are"
    " any, only score the result.",
    items="utterances",
    stages=("pretrain", "cluster"),
    headlines={
        "cluster/test/nmi": "NMI with the test labels",
        "cluster/test/acc": "accuracy of the clusters, matched to labels",
        "cluster/train/stability": "stability of the clusters, epoch kept",
    },
)
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
        "input of a modality: its principal axes, weighted by agreement with the anchor, or as it"
        " is read",
    ),
    "last_step": (
        "valid",
        "padded",
        ["valid", "padded"],
        "step that stands for a sequence: its own last one, or the last of the longest sequence",
    ),
    "views": (
        "all",
        "anchored",
        ["all", "anchored"],
        "views of the pretraining; all: the anchor is masked too; anchored: UMC's three views",
    ),
    "distance": (
        "auto",
        "euclidean",
        ["auto", *DISTANCES],
        "distance of k-means; discriminant: directions that scatter within clusters count less;"
        " auto: the one whose clusters are more stable",
    ),
    "density": (
        "smallest",
        "largest",
        ["smallest", "largest"],
        "which dense rows of a cluster are selected; smallest: those close together; largest:"
        " those spread out",
    ),
    "select_epoch": (
        "stability",
        "last",
        ["stability", "last"],
        "epoch to keep: that of the most stable clusters, or the last",
    ),
    "min_select_share": (
        0.1,
        0.0,
        {"low": 0, "high": 1},
        "least number of rows selected from a cluster, as a share of the mean cluster",
    ),
    "smoothing": (
        0.1,
        0.0,
        {"low": 0, "high": 1},
        "number of nearest rows averaged before k-means, as a share of the mean cluster",
    ),
    "neighbors": (
        0.04,
        0.0,
        {"low": 0, "high": 1},
        "number of nearest rows that a row is joined with in the graph whose cuts k-means of the"
        " centers begins with, as a share of the mean cluster; 0: it begins with the last centers",
    ),
    "temperature": (0.5, 0.2, {"above": 0}, "temperature of the contrastive pretraining"),
    "sup_temperature": (0.5, 20.0, {"above": 0}, "temperature of the loss on selected rows"),
    "unsup_temperature": (1.0, 20.0, {"above": 0}, "temperature of the loss on the other rows"),
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
TABLE = ["text_column", "label_column", "encoding", "allow_missing"]  # flags of reading a file
READING = ["modalities", "text_model", "text_layer", "max_length"]
SEARCH = {
    "lr": (3e-6, 3e-4),
    "cluster_lr": (3e-6, 3e-4),
    "temperature": (0.1, 2.0),
    "sup_temperature": (0.1, 5.0),
}
DEMO = {"bs": 256, "cluster_bs": 256}
MASK = 0.2  # chance that a view lacks a modality for which another one stands in


def parse_args(argv: list[str] | None = None):
    first_stage = {mode: stages["pretrain"] for mode, stages in STAGES.items()}
    parser = config.base_parser(CARD.name, __doc__, first_stage, least_epochs=0)
    parser.aliases.update(ALIASES)
    parser.set_defaults(log_every=50)
    parser.hide("accum", "ensemble", "eval_every", "on_bad_item", "teacher", "workers")
    parser.hide("teacher_weight", "teacher_temperature")
    parser.set_help(
        data="utterances: an .npz, a .tsv or .csv, a folder or .zip in the layout of UMC, or"
        " `sample`, the embedded ones",
        predict="assign the utterances of these files or folders to the clusters of the run that"
        " --resume names",
    )
    group = parser.add_argument_group("files")
    group.add_argument(
        "--text-column", metavar="NAME", help="column of the text in a .tsv or .csv; unset: text"
    )
    group.add_argument(
        "--label-column", metavar="NAME", help="column of the label in a .tsv or .csv; unset: label"
    )
    group.add_argument(
        "--encoding",
        type=text_encoding,
        metavar="NAME",
        help="encoding of a .tsv or .csv, as latin-1; unset: UTF-8",
    )
    group.number(
        "--allow-missing",
        float,
        0.05,
        "share of the utterances that may lack the features of a modality, which is masked there",
        low=0,
        high=1,
    )
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text-model",
        metavar="DIR",
        help="encoder of the BERT family that reads the text; unset: TF-IDF and SVD",
    )
    group.add_argument(
        "--text-layer",
        type=layer_numbers,
        metavar="N",
        help="layer of --text-model whose states are averaged, or several, comma-separated, as 3,6;"
        " unset: the middle and the last (umc the last)",
    )
    group.number(
        "--max-length",
        int,
        None,
        "tokens of a text and steps of a sequence that are read; unset: all",
        low=1,
    )
    group = parser.add_argument_group("method")
    group.choice(
        "--mode",
        STAGES,
        "default",
        "which defaults the flags have; umc: those of the published procedure",
    )
    group.number("--base-dim", int, 256, "width of the embedding, a multiple of 8", low=8)
    group.number("--dropout", float, 0.1, "dropout of the fusion", low=0, high=0.9)
    group.add_argument(
        "--modalities",
        type=modality_names,
        metavar="NAMES",
        help="use these modalities alone, comma-separated, as text,timing",
    )
    umc_epochs = "(1 - select-share) / select-growth"
    for flag, kind, low in (("epochs", int, 0), ("bs", int, 2), ("lr", float, 0), ("wd", float, 0)):
        by_mode = {
            mode: umc_epochs if stages["cluster"][flag] is None else stages["cluster"][flag]
            for mode, stages in STAGES.items()
        }
        text = f"--{flag} of the clustering stage{config.default_text(by_mode)}"
        group.number(f"--cluster-{flag}", kind, None, text, low=low)
    for name, (value, umc_value, allowed, text) in MODE_DEFAULTS.items():
        flag = f"--{name.replace('_', '-')}"
        text += config.default_text({"default": value, "umc": umc_value})
        if isinstance(allowed, list):
            group.choice(flag, allowed, None, text)
        else:
            group.number(flag, float, None, text, **allowed)
    group = parser.add_argument_group("clusters")
    group.add_argument(
        "--k",
        type=cluster_count,
        metavar="{auto,N}",
        help="number of clusters; auto estimates it; unset: that of the labels, or auto without"
        " labels",
    )
    group.choice(
        "--assign",
        ["kmeans", "sinkhorn", "partial-ot"],
        "kmeans",
        "how rows get pseudo-labels: k-means, or balanced or partial optimal transport",
    )
    group.number(
        "--select-share",
        float,
        0.1,
        "share of a cluster's rows that the first epoch selects (--thres of UMC)",
        above=0,
        high=1,
    )
    group.number(
        "--select-growth",
        float,
        0.05,
        "by how much that share grows each epoch (--delta of UMC)",
        low=0,
        high=1,
    )
    group.choice(
        "--on-plateau",
        ["lr", "share", "none"],
        "lr",
        "what is halved when the stability of the clusters stalls",
    )
    group.number(
        "--min-epochs", int, 20, "epochs of the clustering stage before it may stop early", low=1
    )
    args = config.parse(parser, argv, DEMO, SEARCH)
    args = restore_flags(parser, argv, args, CARD.name, TABLE, DEMO)

    config.check_inference_flags(parser, args, TABLE)
    refuse = partial(config.reject_unused_flags, parser, args)
    refuse(
        ["ensemble", "teacher"],
        "here: runs number their clusters as they like, there are no classes to share",
    )
    refuse(
        ["accum", "on_bad_item", "eval_every", "workers"],
        "on utterances: they are in memory, batches are whole, every epoch is evaluated",
    )
    if args.data == "sample" and not (args.eval or args.predict):
        refuse(["text_column", "label_column", "encoding"], "on the embedded data")
    if args.text_model is None:
        refuse(["text_layer"], "without --text-model")
    keeps_last = mode_default(args, "select_epoch") == "last"
    if keeps_last:
        refuse(["on_plateau", "min_epochs"], "with --select-epoch last, which follows no score")
    if args.assign == "partial-ot":
        refuse(["density"], "with --assign partial-ot, which takes the rows of least cost")
    if args.mode == "umc" and args.select_growth == 0 and args.cluster_epochs is None:
        parser.error(
            f"--select-growth 0: the clustering stage of --mode umc has {umc_epochs} epochs; give"
            " --cluster-epochs"
        )
    if not keeps_last and args.min_epochs >= settings(args)["cluster"].epochs:
        refuse(["min_epochs"], "with fewer epochs of stage 2; give more --cluster-epochs")
    if args.base_dim % umc.HEADS:
        parser.error(f"--base-dim {args.base_dim}: not a multiple of {umc.HEADS}")
    return args, parser


def modality_names(text: str) -> list[str]:
    """--modalities: names with commas between them."""
    return text.split(",")


def text_encoding(text: str) -> str:
    """--encoding: one that Python knows and that is of text."""
    try:
        "".encode(text)
    except LookupError:
        raise argparse.ArgumentTypeError(
            f"received {text!r}, allowed are utf-16, gb18030, latin-1, and what else Python decodes"
        ) from None
    return text


def layer_numbers(text: str) -> int | list[int]:
    """--text-layer: a number, or several with commas between them."""
    numbers = [config.number(int, low=0)(part) for part in text.split(",")]
    if len({*numbers}) < len(numbers):
        raise argparse.ArgumentTypeError(f"received {text}: each layer once")
    return numbers if len(numbers) > 1 else numbers[0]


def mode_default(args, name: str):
    """A setting that --mode decides where its own flag does not."""
    value = getattr(args, name)
    return MODE_DEFAULTS[name][args.mode == "umc"] if value is None else value


def cluster_count(text: str):
    """--k: `auto` or a number."""
    return text if text == "auto" else config.number(int, low=2)(text)


def settings(args) -> dict[str, config.StageConfig]:
    """Resolved settings of both stages."""
    table = copy.deepcopy(STAGES[args.mode])
    if table["cluster"]["epochs"] is None and args.cluster_epochs is None:
        table["cluster"]["epochs"] = max(round((1 - args.select_share) / args.select_growth), 1)
    return {
        name: config.stage_config(args, name, table[name], first=name == "pretrain", lr_of=None)
        for name in table
    }


def build_data(
    args, path: str | tuple, reading: dict, world: dist.Dist, fitted: dict | None = None
) -> tuple[Rows, Lsa | None]:
    """The rows of `path`, said in a few lines, and its text features where there are any.

    `reading` are the flags READING by name, and gets the layers that are not given; `fitted` is the
    checkpoint whose text features are used.
    """
    options = {name: getattr(args, name) for name in TABLE}
    if args.predict:
        options["label_column"] = None  # that the run had, and new utterances need not have
    table = deep_cluster.read_table(path, reading["max_length"], **options)
    world.say(table.describe())
    group_items(table, args, CARD.items, world.say)
    layers_unset = args.text_model and args.text_layer is None and args.mode != "umc"
    if layers_unset and fitted is None and table.texts is not None:
        reading["text_layer"] = middle_and_last(args.text_model)
    rows, lsa = deep_cluster.read_rows(table, reading, world.device, fitted)
    for problem, examples in utterances.data_problems(table).items():
        world.say(f"  {problem}: {examples}")
    return rows, lsa


def validate(args, world: dist.Dist, rows: Rows, splits: dict, stages: dict, k) -> None:
    """Refuse what the stages could not use, before anything is written."""
    clustered = {"training": splits["train"]}
    if (rows.table.labels[splits["test"]] >= 0).any():
        clustered["test"] = splits["test"]
    for name, part in clustered.items():
        if k != "auto" and k > len(part):
            raise InputError(
                f"{len(part)} {name} utterances cannot be in {k} clusters; give a --k of at most"
                f" {len(part)}"
            )
    for name, stage in stages.items():
        flag = "--bs" if name == "pretrain" else f"--{name}-bs"
        sampling.check_batch(name, stage.bs, len(splits["train"]), world.world_size, flag)
    if args.base_dim < len(rows.names):
        raise InputError(
            f"--base-dim {args.base_dim}: each of {len(rows.names)} modalities needs an axis;"
            " raise it"
        )
    with as_input_error("--impl", args.impl):
        nt_xent(*torch.eye(4, device=world.device).chunk(2), 1.0, impl=args.impl)


def build_model(run: Run, basis: dict | None) -> umc.Fusion:
    """The fusion network on the device; its random part is a function of --seed."""
    args, spec = run.args, run.model_spec
    torch.manual_seed(args.seed)
    model = umc.Fusion(
        spec["widths"],
        spec["sequences"],
        spec["base_dim"],
        spec["k"],
        dropout=args.dropout,
        padded_last=spec["last_step"] == "padded",
        basis=basis,
    ).to(run.world.device)
    if args.compile:
        model.compile()
    return model


def masks(run: Run, batch: Batch) -> list[Tensor]:
    """What each view keeps, (n, modalities) of 0 and 1: two random views, or UMC's with the anchor
    in all of them.

    A random view may lack a modality as far as another one agrees with the anchor: what is left
    must tell of the same.
    """
    names, weights = run.data.names, run.model_spec["weights"]
    rows, columns = len(batch.items), len(names)
    kept = []
    if run.model_spec["views"] == "anchored":
        for left_out in range(1, max(columns, 2) + 1):
            keep = torch.ones(rows, columns)
            keep[:, left_out : left_out + 1] = 0  # of the last view nothing
            kept.append(keep)
    else:
        chance = []
        for name in names:
            others = [weights[other] for other in names if other != name]
            chance.append(MASK * max(others, default=0.0))
        for view in (0, 1):
            drawn = uniform(run.args.seed, batch.epoch, batch.items, view, columns)
            keep = torch.from_numpy(drawn >= chance)
            keep[~keep.any(1), 0] = True
            kept.append(keep.float())
    return [keep.to(run.world.device) for keep in kept]


def fetch(
    run: Run,
    batches: list[np.ndarray],
    epoch: int | None = None,
    labels: list[Tensor | None] | None = None,
) -> Iterator[Batch]:
    """The batches of utterances on the device; `labels` are their pseudo-labels, batch by batch."""
    for k, items in enumerate(batches):
        targets = labels[k] if labels else None
        if targets is not None:
            targets = targets.to(run.world.device)
        yield Batch(run.data.take(items), items, targets, epoch)


def temperature_of(run: Run, batch: Batch) -> float:
    """The temperature of the stage; stage 2 has one for selected rows and one for the others."""
    if run.current is None or run.current.stage == "pretrain":
        return run.model_spec["temperature"]
    return run.model_spec["unsup_temperature" if batch.labels is None else "sup_temperature"]


def train_step(run: Run, model, optimizer, scaler, batch: Batch) -> Step:
    """One update on the views of a batch.

    Positives are the views of an utterance, or with labels all views of utterances of one label.
    """
    world, impl = run.world, run.args.impl
    gather = dist.all_gather_rows if world.world_size > 1 else None
    temperature = temperature_of(run, batch)
    inputs, lengths = batch.inputs
    optimizer.zero_grad(set_to_none=True)
    with amp.autocast(run.args.precision, world.device):
        h = [model(inputs, lengths, keep)[1] for keep in masks(run, batch)]
    if batch.labels is None and len(h) == 2:
        loss = nt_xent(*h, temperature, gather=gather, impl=impl)
    else:
        labels = batch.labels
        if labels is None:
            labels = torch.from_numpy(batch.items).to(world.device)
        loss = sup_con(torch.cat(h), labels.repeat(len(h)), temperature, gather=gather, impl=impl)
    scaler.scale(loss).backward()
    norm, bad = amp.guarded_step(optimizer, scaler, loss, run.args.clip_grad)
    return Step({"loss": loss.detach()}, norm, bad)


@torch.no_grad()
def evaluate(run: Run, model: umc.Fusion, indices: np.ndarray, progress=None) -> Tensor:
    """z of the utterances `indices` (n,), float32 (n, base_dim), on the CPU; what is clustered is z
    in the model's metric.
    """
    model.eval()
    parts = np.array_split(indices, -(-len(indices) // eval_batch_of(run.data)))
    with Evaluation(progress, model, parts) as done:
        for batch in fetch(run, done.left):
            with amp.autocast(run.args.precision, run.world.device):
                z, _ = model(*batch.inputs)
            done.add(z.float())
    z = done.rows()
    amp.require_finite(z, "embeddings")
    return z


def eval_batch_of(rows: Rows) -> int:
    """How many utterances evaluation takes at once."""
    # The attention within a sequence of L steps takes L * L numbers.
    cost = max(x.shape[1] ** 2 if x.ndim == 3 else 1024 for x in rows.inputs.values())
    return 2**20 // cost or 1


def eval_stability(
    run: Run, name: str, model, z: Tensor, progress, targets: Targets | None = None
) -> tuple[float, dict]:
    """The stability of the clusters of the training rows z (n, base_dim), and with the rest of an
    epoch's figures as metrics.
    """
    with progress.interruptible():
        z = z @ model.metric.cpu()
        stable = deep_cluster.stability(z, run.model_spec["k"], run.args.seed)
        values = {"stability": stable}
        if targets:  # what the run leaves behind are the clusters of the epoch's end
            start = model.centroids.cpu()
            centroids = deep_cluster.centers(z, run.model_spec, run.args.seed, start)
            centroids = centroids.to(model.centroids.dtype)
            clusters, distances = clustering.nearest(z, centroids)
            values |= deep_cluster.describe(run, z, clusters, distances, targets)
    if targets:
        model.centroids.copy_(centroids)
    return stable, {f"{name}/train/{key}": value for key, value in values.items()}


def epoch_passes(
    run: Run, stage: config.StageConfig, epoch: int, targets: Targets | None
) -> tuple[list[np.ndarray], list[Tensor | None]]:
    """The batches of an epoch and their pseudo-labels; in stage 2 the selected rows come first,
    then the others without labels.
    """
    train_split = run.splits["train"]
    world, seed = run.world, run.args.seed
    if targets is None:
        batches = sampling.epoch_batches(train_split, stage.bs, seed, epoch, 0, world)
        return batches, [None] * len(batches)
    batches, labels = [], []
    for selected in (True, False):
        rows_of_part = np.flatnonzero(targets.selected.numpy() == selected)
        # Fewer rows than a batch make one smaller batch, not none.
        bs = min(stage.bs, len(rows_of_part) // world.world_size * world.world_size)
        if bs < 2 * world.world_size:
            continue
        order = 2 * epoch + selected
        for rows in sampling.epoch_batches(rows_of_part, bs, seed, order, 0, world):
            batches.append(train_split[rows])
            labels.append(targets.labels[rows] if selected else None)
    return batches, labels


def train(
    run: Run, name: str, model: umc.Fusion, start: str, before: dict[str, umc.Fusion] | None = None
) -> str:
    """A stage: epochs of `epoch_passes`, each evaluated; keeps the epoch of the most stable
    clusters, or the last one. Returns the digest of its weights.

    What a stage starts from counts as its epoch 0: where training blurs the clusters, that is what
    is kept. Stage 2 is compared with the models `before` it, by name.
    """
    args, world, log, spec = run.args, run.world, run.log, run.model_spec
    stage = run.stages[name]
    is_second = name == "cluster"
    keeps_last = spec["select_epoch"] == "last"
    optimizer = optim.of_stage(stage, [model])
    scaler = amp.scaler(args.precision, world.device)
    monitor = Monitor(args.min_epochs)
    targets = Targets(len(run.splits["train"])) if is_second else None
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "monitor": monitor}
    if targets:
        parts["targets"] = targets
    progress = run.open_stage(name, parts, start=start)
    if run.is_done(progress):
        model.load_state_dict(progress.best_weights())
        return progress.digest_of_best()
    trained = dist.wrap(model, world)
    steps = len(run.splits["train"]) // stage.bs
    log.say(stage.describe(plural(len(run.splits["train"]), "utterance"), steps))
    log.say(loss_band(run, name))

    def select(stable: float, values: dict) -> None:
        value = progress.epoch if keeps_last else stable
        progress.select(value, model.state_dict(), values, higher_is_better=True)

    z = None  # of the training rows by the weights as they are
    if progress.step == 0 and not progress.results:  # else a save before the first step has them
        z = evaluate(run, model, run.splits["train"], progress)
        if is_second:
            find_clusters(run, model, z, targets)
        stable, values = eval_stability(run, name, model, z, progress, targets)
        unknown = not is_second and number_not_found(spec)
        log.metrics(name, 0, 0, values | ({f"{name}/warn/no_number": 1.0} if unknown else {}))
        progress.results = values
        progress.epoch = -1  # select() counts from 1: the start is epoch 0
        select(stable, values)
        progress.epoch = 0
    loop = Loop(run, progress, steps=steps, unit="utterance")
    loop.foresee(train_step, partial(fetch, run), run.splits["train"])
    for epoch in loop.epochs():
        if is_second and not keeps_last and monitor.should_stop(args.on_plateau):
            break
        halved = [action for _, action in monitor.actions]
        if is_second and progress.batch == 0:
            share = args.select_share + args.select_growth * epoch
            share = min(share * 0.5 ** halved.count("share"), 1.0)
            if z is None:
                z = evaluate(run, model, run.splits["train"], progress)
            deep_cluster.assign(run, model, targets, z, share)
        model.train()
        batches, labels = epoch_passes(run, stage, epoch, targets)
        done = progress.batch
        for batch in loop.batches(fetch(run, batches[done:], epoch, labels[done:])):
            # An epoch of stage 2 has about as many steps as one of stage 1; its rate is by epoch.
            place = epoch * steps + min(progress.batch, steps - 1)
            lr = loop.set_lr(optimizer, place, factor=0.5 ** halved.count("lr"))
            step = train_step(run, trained, optimizer, scaler, batch)
            loop.end_step(step, lr)
        z = evaluate(run, model, run.splits["train"], progress)
        stable, values = eval_stability(run, name, model, z, progress, targets)
        values = {f"{name}/train/loss": progress.mean("loss")} | values
        monitor.add(stable)
        select(stable, values)
        if is_second:
            report = deep_cluster.figures(monitor)
            values |= {f"{name}/monitor/{key}": value for key, value in report.items()}
            for alarm in monitor.alarms():
                log.say(f"{name}: {alarm}")
            advice = None if keeps_last else monitor.advice(args.on_plateau)
            if advice:
                monitor.act(advice)
                what = "the learning rate" if advice == "lr" else "--select-share"
                log.say(f"{name}: the stability stalls; halving {what}")
        progress.results = values
        shown = [
            f"{key.split('/')[-1]} {digits(value)}"
            for key, value in values.items()
            if "/train/" in key
        ]
        log.say(f"{name} epoch {epoch + 1} | {' | '.join(shown)}")
        loop.end_epoch(values, quiet=True)
    results = progress.results
    if is_second:
        results |= finish_clustering(run, model, before, progress, monitor, targets)
    run.finish(progress, results)
    model.load_state_dict(progress.best_weights())
    return progress.digest_of_best()


def loss_band(run: Run, name: str) -> str:
    """In which range the loss of a stage lies, as a line."""
    spec, bs = run.model_spec, run.stages[name].bs
    views = view_count(spec)
    _, chance = run.chance[name]
    if name == "pretrain":
        band = digits(2 / spec["temperature"])
    else:
        band = (
            f"{digits(2 / spec['sup_temperature'])} on selected utterances, ±"
            f" {digits(2 / spec['unsup_temperature'])} on the others"
        )
    return (
        f"{name}: n = {views} views x {bs} - 1, the loss lies in ln n ± 2/tau = {digits(chance)} ±"
        f" {band}"
    )


def view_count(spec: dict) -> int:
    """How many views of an utterance a step compares."""
    return 2 if spec["views"] == "all" else max(len(spec["widths"]), 2)


def find_clusters(run: Run, model: umc.Fusion, z: Tensor, targets: Targets) -> None:
    """Metric, centroids and targets as the first epoch of stage 2 finds them among the training
    rows z (n, base_dim), whatever the model had.
    """
    model.metric.copy_(torch.eye(len(model.metric)))
    model.centroids.zero_()
    deep_cluster.assign(run, model, targets, z, run.args.select_share)


def finish_clustering(
    run: Run, model: umc.Fusion, before: dict, progress, monitor: Monitor, targets: Targets
) -> dict:
    """The test metrics of the chosen model, of the last epoch, of the models `before` and of
    k-means without training; writes the tables of the report.
    """
    everything, train_split = np.arange(len(run.data)), run.splits["train"]
    start = []  # where the training rows were, and in which clusters

    def tested(network, name, z):
        raw = z[train_split]
        centroids = network.centroids.cpu()
        with progress.interruptible():
            z = z @ network.metric.cpu()
            clusters, _ = clustering.nearest(z[train_split], centroids)
            scores = deep_cluster.test_scores(run, name, z, centroids)
        start[:] = start or [raw, clusters]
        return scores | deep_cluster.changes(name, *start, raw, clusters), (z, centroids)

    def test(network, _):
        return tested(network, "cluster", evaluate(run, network, everything, progress))

    results = {}
    for name, network in before.items():
        fresh = Targets(len(train_split))
        z = evaluate(run, network, everything, progress)
        find_clusters(run, network, z[train_split], fresh)
        _, values = eval_stability(run, name, network, z[train_split], progress, fresh)
        results |= deep_cluster.compared(values | tested(network, name, z)[0])
    scores, (z, centroids) = test_best_and_last(progress, model, test)
    with progress.interruptible():
        results = deep_cluster.baselines(run) | results | scores
    correlation = deep_cluster.tracking(run)
    if correlation is not None:
        results["cluster/train/stability_tracks_nmi"] = correlation
    run.log.metrics("cluster", progress.step, progress.epoch, results, quiet=True)
    results |= progress.best_metrics()  # logged with their epoch
    log_scores(run, results)
    write_clusters(run, z, centroids, results["cluster/train/far_distance"])
    write_cluster_report(run, z, centroids, monitor, targets, results)
    return results


class RowView(NetworkView):
    """How --check looks into the network: what augmentation changes are the masks of the views."""

    def rows(self, output) -> Tensor:
        return output[1]

    def augmented_part(self, calls: list[tuple], count: int) -> Tensor:
        return torch.stack([call[2] for call in calls], 1)

    def entry(self, model: umc.Fusion, call: tuple) -> list[Tensor]:
        return list(call[0].values())

    def outputs(self, model: umc.Fusion, call: tuple, inputs: list[Tensor]) -> Tensor:
        return model(dict(zip(call[0], inputs, strict=True)), call[1])[0]

    def padding(self, call: tuple) -> list[Tensor] | None:
        if self.run.model_spec["last_step"] != "valid":
            return None
        return self.run.data.padding(call)


def check_spec(run: Run, basis: dict | None) -> CheckSpec:
    """Stage 1 in the terms of --check: stage 2 takes the same steps on labels of its own making."""
    spec, stage = run.model_spec, run.stages["pretrain"]
    view = RowView(run, size=min(64, stage.bs), eval_batch=eval_batch_of(run.data))
    larger = run.with_spec(base_dim=2 * spec["base_dim"])
    return CheckSpec(
        run=run,
        stage="pretrain",
        splits=("train", "test"),
        build=partial(build_model, run, basis),
        fetch=partial(fetch, run),
        step=train_step,
        evaluate=partial(evaluate, run),
        loss=partial(
            reference.contrastive, views=view_count(spec), temperature=spec["temperature"]
        ),
        augmented=spec["views"] == "all" and len(run.data.names) > 1,  # else nothing is masked
        view=view,
        larger=partial(build_model, larger, basis),
    )


def run_inference(args, world: dist.Dist) -> None:
    """--eval: the test metrics of a checkpoint. --predict: predictions.csv, the clusters of other
    utterances.
    """
    loaded = load_run(args, CARD)
    spec = loaded.model_spec
    rows, _ = build_data(args, loaded.path, spec["reading"], world, loaded.state)
    widths = {name: rows.inputs[name].shape[-1] for name in rows.names}
    if widths != spec["widths"] or sorted(rows.lengths) != spec["sequences"]:
        raise InputError(
            f"{loaded.path} has the modalities {widths}, the model reads {spec['widths']}"
        )
    run = loaded.as_run(args, world, rows, utterances.split(rows.table))
    weighted = spec["input_weighting"] == "weighted"
    basis = umc.empty_basis(widths) if weighted else None
    model = loaded.with_weights(partial(build_model, run, basis))
    if args.predict:
        predict(loaded, run, model)
        return
    z = evaluate(run, model, np.arange(len(rows))) @ model.metric.cpu()
    results = deep_cluster.test_scores(run, "cluster", z, model.centroids.cpu())
    if not results:
        raise InputError(f"{rows.table.name}: there is no labeled test utterance to evaluate on")
    loaded.write(results, world)


def predict(loaded: LoadedRun, run: Run, model: umc.Fusion) -> None:
    """Write predictions.csv: the cluster of each utterance, and whether it is far from all."""
    spec, table = run.model_spec, run.data.table
    if spec["stage"] != "cluster":
        raise InputError(
            f"{loaded.source} has no clusters yet: name the run, or its cluster/best.pt"
        )
    classes = [str(c) for c in range(spec["k"])]
    loaded.say_who_answers(run.world, classes, "cluster")
    z = evaluate(run, model, np.arange(len(table))) @ model.metric.cpu()
    clusters, distances, _, scores = deep_cluster.membership(z, model.centroids.cpu())
    far, note = deep_cluster.far_rows(distances, loaded.state.get("metrics") or {})
    chosen = clusters.tolist()
    loaded.write_predictions(run.world, table.ids, classes, scores, chosen, note, {"far": far})


def run_training(parser, args, world: dist.Dist, signals: Signals) -> None:
    """Train: read the data, settle what the run is, and run its two stages."""
    stages = settings(args)
    reading = {name: getattr(args, name) for name in READING}
    rows, lsa = build_data(args, args.data, reading, world)
    table = rows.table
    splits = utterances.split(table)
    k = args.k or (len(table.classes) if table.labeled and len(table.classes) > 1 else "auto")
    validate(args, world, rows, splits, stages, k)
    basis, weights, anchor, k, estimate = deep_cluster.fused_basis(
        args, rows, splits["train"], None if k == "auto" else k
    )
    validate(args, world, rows, splits, stages, k)  # again: the number may be an estimate
    modes = {name: mode_default(args, name) for name in MODE_DEFAULTS}
    stability = None
    if modes["distance"] == "auto":
        stability = deep_cluster.metric_stability(rows, splits["train"], basis, k, args.seed)
        modes["distance"] = max(stability, key=stability.get)
    spec = dict(
        script=CARD.name,
        k=k,
        base_dim=args.base_dim,
        reading=reading,
        sequences=sorted(rows.lengths),
        widths={name: rows.inputs[name].shape[-1] for name in rows.names},
        **modes,
        weights=weights,
        anchor=anchor,
        stability=stability,
        estimate=estimate and estimate.table,
    )
    run = Run.open(
        args,
        world,
        signals,
        rows,
        splits,
        spec,
        stages,
        card=CARD,
        chance=chance_levels(stages, spec),
        name=f"{args.mode}-k{k}-dim{args.base_dim}",
        identity=config.run_id(parser, args, data=table.fingerprint, k=k, modalities=rows.names),
        input_text=plural(k, "cluster"),
        kept={"text": lsa.state} if lsa else None,
    )
    log_choices(run)
    basis = basis if spec["input_weighting"] == "weighted" else None
    if args.check:
        return check(run, {"pretrain": check_spec(run, basis)})
    with run.session(page):
        model = build_model(run, basis)
        before = {"start": copy.deepcopy(model)}
        start = train(run, "pretrain", model, "scratch")
        before["pretrain"] = copy.deepcopy(model)
        train(run, "cluster", model, start, before)


def chance_levels(stages: dict, spec: dict) -> dict[str, tuple[str, float]]:
    """The label and the loss of a guess, by stage."""
    views = view_count(spec)
    levels = {}
    for name, stage in stages.items():
        label = f"a guess, ln({views} x {stage.bs} - 1)"
        levels[name] = (label, math.log(views * stage.bs - 1))
    return levels


def main(argv: list[str] | None = None) -> int:
    args, parser = parse_args(argv)
    if run_sweep(main, parser, argv, args, SEARCH, None):
        return 0
    return launch(parser, args, run_inference, run_training)


if __name__ == "__main__":
    sys.exit(main())
