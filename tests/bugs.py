"""Seeded bugs: each is put into a script or into common, and the item of --check that should catch
it is named.

`python -m tests.bugs [NAME ...]` tries them, or those whose names hold a word, and prints the table
of bugs.md.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import train_cluster
import train_raer
import train_simclr
import train_tsm
from common import amp, losses, optim
from common.data import augment, sampling
from common.data.images import Images
from common.models import heads, raer, tsm, umc
from tests.data import cells_tree, sequences_npz
from tests.runs import flags

SCRIPTS = {"simclr": train_simclr, "tsm": train_tsm, "raer": train_raer, "cluster": train_cluster}
IMAGES = flags("--data {images} --backbone resnet18 --stem cifar --image-size 8 --bs 16")
CLIPS = ["--backbone", "conv_small_035", "--image-size", "32", "--bs", "16"]
FACES = ["--backbone", "vit_tiny", "--num-frames", "4", "--bs", "16"]
# Ten ways to run the scripts in which nothing is wrong.
HEALTHY = {
    "pretrain": ("simclr", IMAGES),
    "finetune": ("simclr", [*IMAGES, "--stage", "finetune", "--from", "none", "--lr", "1e-3"]),
    "all": (
        "simclr",
        ["--backbone", "resnet18", "--image-size", "32", "--stage", "all", "--optimizer", "adamw"],
    ),
    "clips": ("tsm", CLIPS),
    "past": (
        "tsm",
        flags(CLIPS, "--shift expand --direction past --sampler balanced --loss bce"),
    ),
    "flicker": (
        "tsm",
        flags(CLIPS, "--data sample-flicker --shift none --aggregate mean --alpha 0.2"),
    ),
    "features": ("raer", [*FACES, "--cache-features"]),
    "tower": ("raer", [*FACES, "--tune", "full", "--method", "ldam-drw"]),
    "rows": ("cluster", []),
    "sequences": (
        "cluster",
        ["--data", "{sequences}", "--bs", "32", "--cluster-bs", "32", "--mode", "umc"],
    ),
}


class Bug(NamedTuple):
    """What is wrong, in which of HEALTHY, the item that should say so, and how it gets in."""

    name: str
    base: str
    item: str
    inject: Callable[[pytest.MonkeyPatch], None]
    argv: tuple = ()
    status: str = "FAIL"


def wrap(owner, name: str, make: Callable):
    """An injection that replaces `owner.name` by `make(the original)`."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def in_script(script, module: str, **changed):
    """An injection that changes a module's functions for one script alone."""
    own = getattr(script, module)
    return lambda patch: patch.setattr(script, module, SimpleNamespace(**vars(own) | changed))


def nothing(_) -> None:
    """No injection: the flags alone are wrong."""


def _shuffled(original):
    return lambda *args: np.random.default_rng(0).permutation(original(*args))


def _overlap(original):
    def split(*args):
        parts = original(*args)
        return parts | {
            "finetune_train": np.union1d(parts["finetune_train"], parts["finetune_dev"])
        }

    return split


def _zero_images(original):
    return lambda self, *args: (torch.zeros_like(pixels) for pixels in original(self, *args))


def _cropped(images, size):
    params = augment.crop_flip_params(0, 0, np.arange(len(images)), 0, images.shape[-1])
    return augment.make_view(images, params, size)


def _with_itself(z_a, z_b, temperature, **_):
    z = nn.functional.normalize(torch.cat([z_a, z_b]).float(), dim=1)
    n = len(z_a)
    return nn.functional.cross_entropy(z @ z.T / temperature, (torch.arange(2 * n) + n) % (2 * n))


def _ascending(original):
    def build(*args, **options):
        optimizer = original(*args, **options)
        for group in optimizer.param_groups:
            group["maximize"] = True
        return optimizer

    return build


def _no_update(original):
    return lambda optimizer, scaler, loss, clip_grad: (
        optim.grad_norm(optimizer.param_groups[0]["params"]),
        ~loss.isfinite(),
    )


def _built(change: Callable[[nn.Module], None]):
    def make(original):
        def build(*args, **options):
            model = original(*args, **options)
            with torch.no_grad():
                change(model)
            return model

        return build

    return make


def _freeze(model):
    model.requires_grad_(False)
    model.head.requires_grad_(True)


def _first_frames_of_all(original):
    def forward(self, clips):
        features = self.frame_features(clips, *self.shift.hooks(self.shift.n_segment))
        return self.head(features.view(self.shift.n_segment, -1, features.shape[1]).transpose(0, 1))

    return forward


def _over_the_batch(original):
    def hooks(self, n_segment):
        kernel = self.kernel
        return (lambda x: kernel(x, len(x), fold_div=4, direction="both", padding="zero")), None

    return hooks


def _both_directions(original):
    def hooks(self, n_segment):
        object.__setattr__(self, "direction", "both")
        return original(self, n_segment)

    return hooks


def _last_frame(original):
    return lambda self, x: original(self, x[:, -1:].expand_as(x))


def _face_twice(original):
    return lambda self, x: original(
        self, torch.stack([self.encode(x)[:, 0] if x.ndim == 6 else x[:, 0]] * 2, 1)
    )


def _half(original):
    return lambda indices, *args, **options: original(
        indices[: len(indices) // 2], *args, **options
    )


def _without_last(original):
    def evaluate(run, model, indices, *args, **options):
        return original(run, model, indices[: max(len(indices) // 7 * 7, 1)], *args, **options)

    return evaluate


def _one_draw(original):
    return lambda seed, epoch, ids, *args, **options: original(
        seed, epoch, ids * 0, *args, **options
    )


def of_loss(name: str, base: str, inject: Callable, argv: str = "") -> Bug:
    """A bug that the loss at the start should show."""
    return Bug(name, base, "loss-at-init", inject, tuple(argv.split()))


def _with(**changed):
    return lambda f: lambda *args, **options: f(*args, **options | changed)


def _summed(f):
    return lambda x, y, *args, **options: len(x) * f(x, y, *args, **options)


def _one_off(f):
    return lambda x, y, *args, **options: f(x, y.roll(1), *args, **options)


def _at_temperature_1(f):
    return lambda x, y, temperature, **options: f(x, y, 1.0, **options)


def _outputs(change):
    return lambda f: lambda self, x: change(f(self, x))


def _first_of(change):
    return _outputs(lambda output: (change(output[0]), *output[1:]))


BUGS = [
    # What is trained and evaluated on.
    Bug(
        "labels shuffled",
        "finetune",
        "zero-input",
        wrap(Images, "labels_in", _shuffled),
        status="WARN",
    ),
    Bug(
        "validation images in training",
        "finetune",
        "eval-invariance",
        wrap(sampling, "split", _overlap),
    ),
    Bug(
        "half of the training split left out",
        "pretrain",
        "eval-invariance",
        wrap(sampling, "epoch_batches", _half),
    ),
    Bug(
        "training on items of all splits",
        "features",
        "eval-invariance",
        wrap(
            train_raer,
            "epoch_batches",
            lambda _: lambda run, *_: np.array_split(np.arange(len(run.data)), 40),
        ),
    ),
    Bug(
        "the same order in every epoch",
        "pretrain",
        "seed",
        wrap(sampling, "permutation", lambda f: lambda n, seed, epoch, *a: f(n, seed, 0, *a)),
    ),
    # What enters the network.
    Bug(
        "pixels from 0 to 255",
        "pretrain",
        "inputs",
        wrap(augment, "normalize", lambda f: lambda x, *a: f(255 * x, *a)),
    ),
    Bug(
        "normalization forgotten",
        "finetune",
        "inputs",
        wrap(augment, "normalize", lambda _: lambda x, *a: x),
    ),
    Bug(
        "normalized twice",
        "clips",
        "inputs",
        wrap(augment, "normalize", lambda f: lambda x, *a: f(f(x, *a), *a)),
    ),
    Bug(
        "red and blue swapped",
        "finetune",
        "inputs",
        wrap(augment, "normalize", lambda f: lambda x, *a: f(x, *a).flip(1)),
    ),
    Bug("images all zero", "pretrain", "inputs", wrap(Images, "batches", _zero_images)),
    Bug(
        "augmentation in evaluation",
        "finetune",
        "inputs",
        in_script(train_simclr, "augment", resize=_cropped),
    ),
    Bug(
        "frames of a clip in reverse in evaluation",
        "clips",
        "inputs",
        in_script(
            train_tsm,
            "augment",
            resize=lambda x, size: (
                augment.resize(x, size).unflatten(0, (-1, 8)).flip(1).flatten(0, 1)
            ),
        ),
    ),
    # Evaluation.
    Bug(
        "evaluation in training mode",
        "finetune",
        "eval-invariance",
        wrap(nn.Module, "eval", lambda _: lambda self: self),
    ),
    Bug(
        "dropout in evaluation",
        "clips",
        "eval-invariance",
        in_script(tsm, "F", dropout=lambda x, p, training: nn.functional.dropout(x, p, True)),
    ),
    Bug(
        "the last batch left out of evaluation",
        "finetune",
        "eval-invariance",
        wrap(train_simclr, "evaluate", _without_last),
    ),
    Bug(
        "evaluation's rows in another order",
        "rows",
        "eval-invariance",
        wrap(
            train_cluster,
            "evaluate",
            lambda f: lambda *args, **options: f(*args, **options).flip(0),
        ),
    ),
    # Randomness.
    Bug(
        "augmentation from numpy's global generator",
        "pretrain",
        "seed",
        wrap(
            augment,
            "uniform",
            lambda _: lambda seed, epoch, ids, view, n: np.random.rand(len(ids), n),
        ),
    ),
    Bug(
        "the same augmentation in every epoch",
        "pretrain",
        "seed",
        wrap(augment, "simclr_params", lambda f: lambda seed, epoch, *a, **o: f(seed, 0, *a, **o)),
    ),
    Bug(
        "one draw for a whole batch",
        "finetune",
        "seed",
        wrap(augment, "crop_flip_params", _one_draw),
    ),
    Bug(
        "both views are one draw",
        "pretrain",
        "seed",
        wrap(
            augment,
            "simclr_params",
            lambda f: lambda seed, epoch, ids, view, *a, **o: f(seed, epoch, ids, 0, *a, **o),
        ),
    ),
    Bug(
        "both views lack the same modalities",
        "rows",
        "seed",
        wrap(
            train_cluster,
            "uniform",
            lambda f: lambda seed, epoch, ids, view, n: f(seed, epoch, ids, 0, n),
        ),
    ),
    # Losses.
    Bug(
        "softmax before cross-entropy",
        "finetune",
        "overfit",
        wrap(
            nn.functional,
            "cross_entropy",
            lambda f: lambda x, y, *a, **o: f(x.softmax(1), y, *a, **o),
        ),
    ),
    Bug(
        "sum instead of mean",
        "pretrain",
        "loss-at-init",
        wrap(
            train_simclr, "nt_xent", lambda f: lambda a, b, *x, **o: 2 * len(a) * f(a, b, *x, **o)
        ),
    ),
    Bug(
        "each view among its own candidates",
        "pretrain",
        "loss-at-init",
        wrap(train_simclr, "nt_xent", lambda _: _with_itself),
    ),
    Bug(
        "positives one row off",
        "pretrain",
        "overfit",
        wrap(train_simclr, "nt_xent", lambda f: lambda a, b, *x, **o: f(a, b.roll(1, 0), *x, **o)),
    ),
    Bug(
        "positives one row off, utterances",
        "rows",
        "overfit",
        wrap(train_cluster, "nt_xent", lambda f: lambda a, b, *x, **o: f(a, b.roll(1, 0), *x, **o)),
    ),
    Bug(
        "sigmoid before the loss that has one",
        "clips",
        "overfit",
        wrap(train_tsm, "focal_bce", lambda f: lambda x, y, **o: f(x.sigmoid(), y, **o)),
    ),
    Bug(
        "the loss of wrong labels",
        "clips",
        "overfit",
        wrap(train_tsm, "focal_bce", lambda f: lambda x, y, **o: f(x, 1 - y, **o)),
    ),
    Bug(
        "ReLU behind the last layer",
        "clips",
        "overfit",
        wrap(
            tsm.ClipModel,
            "forward",
            lambda f: lambda self, x: (f(self, x)[0].relu(), f(self, x)[1]),
        ),
    ),
    Bug(
        "logits ten times too large",
        "features",
        "loss-at-init",
        wrap(raer, "cosine_logits", lambda f: lambda z, classes, scale: f(z, classes, 10 * scale)),
    ),
    Bug(
        "a loss term that nothing feels",
        "features",
        "trainable",
        wrap(losses, "decorrelation", lambda f: lambda x: f(x).detach()),
    ),
    # Steps.
    Bug(
        "forgotten zero_grad",
        "finetune",
        "gradient",
        wrap(torch.optim.Optimizer, "zero_grad", lambda _: lambda *a, **o: None),
    ),
    Bug("learning rate 100 times too high", "finetune", "loss-decreases", nothing, ("--lr", "0.1")),
    Bug(
        "learning rate 100 times too high, clips",
        "clips",
        "loss-decreases",
        nothing,
        ("--lr", "0.03"),
    ),
    Bug(
        "learning rate 1000 times too high, utterances",
        "rows",
        "loss-decreases",
        nothing,
        ("--lr", "0.03"),
    ),
    Bug("gradient ascent", "clips", "loss-decreases", wrap(optim, "build_optimizer", _ascending)),
    Bug("no update", "clips", "trainable", wrap(amp, "guarded_step", _no_update)),
    Bug(
        "frozen backbone",
        "finetune",
        "trainable",
        wrap(train_simclr, "build_model", _built(_freeze)),
    ),
    Bug(
        "detached features",
        "clips",
        "trainable",
        wrap(tsm.ClipModel, "frame_features", lambda f: lambda *a: f(*a).detach()),
    ),
    Bug(
        "a part that the optimizer does not get",
        "features",
        "trainable",
        wrap(
            raer.RaerModel,
            "parts",
            lambda f: lambda self: f(self) | {"temporal": f(self)["temporal"][:1]},
        ),
    ),
    # What depends on what.
    Bug(
        "view instead of transpose",
        "clips",
        "leakage",
        wrap(tsm.ClipModel, "forward", _first_frames_of_all),
    ),
    Bug(
        "shift over the batch instead of time",
        "clips",
        "leakage",
        wrap(tsm.Shift, "hooks", _over_the_batch),
    ),
    Bug(
        "future frames with --direction past",
        "past",
        "leakage",
        wrap(tsm.Shift, "hooks", _both_directions),
    ),
    Bug(
        "only the last frame counts",
        "features",
        "leakage",
        wrap(raer.Temporal, "forward", _last_frame),
    ),
    Bug(
        "the face in place of the context",
        "features",
        "leakage",
        wrap(raer.RaerModel, "clip_features", _face_twice),
    ),
    Bug(
        "centered over the batch",
        "rows",
        "leakage",
        wrap(umc.Fusion, "forward", lambda f: lambda *a: (lambda z, h: (z - z.mean(0), h))(*f(*a))),
    ),
    Bug(
        "padding is averaged",
        "sequences",
        "leakage",
        wrap(umc, "pool", lambda _: lambda x, lengths: x.mean(1)),
        ("--input-weighting", "weighted", "--last-step", "valid"),
    ),
    # How it starts.
    Bug(
        "first layer's filters all equal",
        "pretrain",
        "first-layer",
        wrap(train_simclr, "build_model", _built(lambda m: m.backbone.conv1.weight.fill_(0.01))),
    ),
    Bug(
        "a layer that is dead from the start",
        "finetune",
        "first-layer",
        wrap(train_simclr, "build_model", _built(lambda m: m.backbone.bn1.bias.fill_(-9.0))),
    ),
    Bug(
        "last bias far from the classes' shares",
        "clips",
        "head-bias",
        wrap(
            heads.TemporalHead,
            "__init__",
            lambda f: lambda self, *a: (f(self, *a), self.classifier.bias.data.fill_(-9))[0],
        ),
    ),
    # What the first step's loss says.
    of_loss(
        "softmax at the end of the network",
        "finetune",
        wrap(heads.Classifier, "forward", _outputs(lambda x: x.softmax(1))),
    ),
    of_loss(
        "logits ten times too large, images",
        "finetune",
        wrap(heads.Classifier, "forward", _outputs(lambda x: 10 * x)),
    ),
    of_loss(
        "logits ten times too large, clips",
        "clips",
        wrap(tsm.ClipModel, "forward", _first_of(lambda x: 10 * x)),
    ),
    of_loss(
        "logits ten times too large, inner products",
        "features",
        wrap(raer.RaerModel, "forward", _first_of(lambda x: 10 * x)),
        "--method tau-norm",
    ),
    of_loss(
        "last layer ten times too large",
        "finetune",
        wrap(train_simclr, "build_model", _built(lambda m: m.head.weight.mul_(10))),
    ),
    of_loss(
        "last layer ten times too large, clips",
        "clips",
        wrap(train_tsm, "build_model", _built(lambda m: m.head.classifier.weight.mul_(10))),
    ),
    of_loss(
        "sum instead of mean, images", "finetune", wrap(nn.functional, "cross_entropy", _summed)
    ),
    of_loss("labels one item off", "finetune", wrap(nn.functional, "cross_entropy", _one_off)),
    of_loss("sum instead of mean, clips", "clips", wrap(train_tsm, "focal_bce", _summed)),
    of_loss(
        "alpha forgotten", "clips", wrap(train_tsm, "focal_bce", _with(alpha=None)), "--alpha 0.2"
    ),
    of_loss(
        "pos_weight forgotten",
        "clips",
        wrap(train_tsm, "focal_bce", _with(pos_weight=None)),
        "--pos-weight auto",
    ),
    of_loss("gamma forgotten", "clips", wrap(train_tsm, "focal_bce", _with(gamma=0.0))),
    of_loss(
        "margins forgotten",
        "features",
        wrap(losses, "ldam", _with(max_margin=1e-9)),
        "--method ldam-drw",
    ),
    of_loss(
        "scale forgotten",
        "features",
        wrap(losses, "ldam", _with(scale=1.0)),
        "--method ldam-drw",
    ),
    of_loss(
        "prior not added",
        "features",
        wrap(losses, "logit_adjusted", lambda f: lambda x, y, p, tau, w: f(x, y, p, 0.0, w)),
        "--method balanced-softmax",
    ),
    of_loss(
        "prior subtracted",
        "features",
        wrap(losses, "logit_adjusted", lambda f: lambda x, y, p, tau, w: f(x, y, p, -tau, w)),
        "--method balanced-softmax",
    ),
    of_loss(
        "targets not smoothed",
        "features",
        wrap(losses, "smooth_targets", lambda f: lambda y, k, _, *a: f(y, k, 0.0, *a)),
    ),
    of_loss("temperature ignored", "pretrain", wrap(train_simclr, "nt_xent", _at_temperature_1)),
    of_loss(
        "temperature ignored, utterances", "rows", wrap(train_cluster, "nt_xent", _at_temperature_1)
    ),
    of_loss(
        "temperature ignored, anchored views",
        "rows",
        wrap(train_cluster, "sup_con", _at_temperature_1),
        "--mode umc",
    ),
    of_loss("sum instead of mean, utterances", "rows", wrap(train_cluster, "nt_xent", _summed)),
    of_loss(
        "sum instead of mean, anchored views",
        "rows",
        wrap(train_cluster, "sup_con", _summed),
        "--mode umc",
    ),
]


def statuses(base: str, folder: Path, items: str, argv=()) -> tuple[int, dict[str, dict]]:
    """(exit code, items by name) of `--check` on one of HEALTHY, in a new folder."""
    script, extra = HEALTHY[base]
    places = {
        "{images}": lambda: cells_tree(folder / "images"),
        "{sequences}": lambda: sequences_npz(folder / "rows.npz"),
    }
    extra = [str(places[flag]()) if flag in places else flag for flag in extra]
    code = 0
    try:
        SCRIPTS[script].main(
            flags(extra, argv, "--device cpu --check", items, "--out", folder / "run")
        )
    except SystemExit as ending:
        code = ending.code
    found = json.loads((folder / "run" / "check.json").read_text())
    return code, {item["item"]: item for item in found["items"]}


def try_bug(bug: Bug, folder: Path) -> dict:
    """What the item says of a bug."""
    with pytest.MonkeyPatch.context() as patch:
        bug.inject(patch)
        _, found = statuses(bug.base, folder, bug.item, bug.argv)
    return next(item for name, item in found.items() if name.endswith(bug.item))


def main(words: list[str]) -> None:
    print(
        "| bug | run | item | status | what it says | seconds |\n| --- | --- | --- | --- |"
        " --- | --- |"
    )
    caught, chosen = (
        0,
        [bug for bug in BUGS if not words or any(word in bug.name for word in words)],
    )
    for bug in chosen:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            said = sys.stdout
            sys.stdout = open("/dev/null", "w")  # noqa: SIM115
            try:
                item = try_bug(bug, Path(folder))
            finally:
                sys.stdout = said
        caught += item["status"] == bug.status
        seconds = time.process_time() - start
        cells = [
            bug.name,
            bug.base,
            bug.item,
            item["status"],
            item["value"].replace("|", "/"),
            f"{seconds:.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{caught} of {len(chosen)} caught")


if __name__ == "__main__":
    main(sys.argv[1:])
