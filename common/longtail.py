"""Ways to train on classes of very unequal size: each a schedule, a loss and a rule for the answer.

    three-stage        deferred sampling, logit adjustment and semantic smoothing
    ce                 cross-entropy, nothing else
    post-hoc           ce; the answer is the highest logit - log(prior)
                       (Menon et al. 2021, arXiv:2007.07314)
    balanced-softmax   cross-entropy on logits + log(prior) from the start
                       (Ren et al. 2020, arXiv:2007.10740)
    ldam-drw           margins, and class weights late (Cao et al. 2019, arXiv:1906.07413)
    tau-norm           ce on inner products; rows of the classifier divided by |w|^tau
                       (Kang et al. 2020, arXiv:1910.09217)
    crt                ce; then the classifier alone, from random weights, classes drawn equally
                       often (the same paper)
    linear-probe       ce of one linear layer on the mean of the frames' frozen features: what the
                       features give by themselves

First the schedules: a `Schedule` is a table of `Phase`s, one row of settings for some epochs.
SCHEDULES holds each method's, `read_schedule` takes one from a file. The learning rate falls at the
same epochs in all of them, but for crt, whose classifier starts anew at the full rate.

Then the methods: `check` refuses what has no effect, `loss_terms` is the loss of a batch, `decide`
the rule for the answer.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import amp, losses, metrics, reading
from common.data import augment, sampling
from common.errors import InputError, did_you_mean
from common.models.raer import RaerModel

DRW_BETA = 0.9999  # of the class weights of ldam-drw
TAUS = np.linspace(0, 1, 11)  # that tau-norm chooses from


@dataclass(frozen=True)
class Phase:
    """The settings from epoch `start` (counted from 0) to the next phase's start.

    Attributes:
        sampler: "random", every item once, or "weighted", drawn with the class weight min(N / (K
            n_c), cap).
        cap: of "weighted"; None: no cap, all classes equally often.
        tau: of the logit adjustment.
        temperature, smoothing: of the smoothed targets.
        mi, dc: weights of the two losses on the classes' features.
        ramp: epochs over which mi and dc rise from 0 in their first to their value in their last;
            0: at once.
        lr: factor of the learning rates.
        weights: "none", or "effective", the class weights of deferred re-weighting.
        trains: "all", or "classes", the classifier alone, drawn anew after a phase of "all", on
            frozen features.
    """

    start: int
    sampler: str = "random"
    cap: float | None = None
    tau: float = 0.0
    temperature: float = 0.15
    smoothing: float = 0.0
    mi: float = 0.0
    dc: float = 0.0
    ramp: int = 0
    lr: float = 1.0
    weights: str = "none"
    trains: str = "all"

    def values(self, prefix: str) -> dict[str, float]:
        """The numbers, for the lines of their epochs in log.jsonl."""
        settings = asdict(self).items()
        return {prefix + name: x for name, x in settings if isinstance(x, (int, float))}


@dataclass(frozen=True)
class Augmentation:
    """How training clips vary, all frames of a clip alike.

    Attributes:
        jitter: brightness, contrast and saturation vary by factors in 1 +- jitter.
        hue: varies by +- hue turns.
        degrees: the rotation is uniform in +- degrees.
        crop: smallest share of the area that a random resized crop keeps; 1: all.
        mirror: whether half of the clips are mirrored.
    """

    jitter: float = 0.3
    hue: float = 0.1
    degrees: float = 15.0
    crop: float = 0.5
    mirror: bool = True

    def params(self, seed: int, epoch: int, clips: np.ndarray, side: int) -> augment.ViewParams:
        """The draws of `clips` (n,), n rows, for frames of `side` pixels."""
        spread, scale = (*(self.jitter,) * 3, self.hue), (self.crop, 1.0)
        params = augment.clip_params(seed, epoch, clips, 0, side, spread, scale, self.degrees)
        params.flip &= self.mirror
        return params


_MOST = {"jitter": 1, "hue": 0.5, "degrees": 180, "crop": 1}


@dataclass(frozen=True)
class Schedule:
    """Phases in the order of their starts, the first at 0, over `epochs` epochs."""

    epochs: int
    phases: tuple[Phase, ...]
    augmentation: Augmentation = Augmentation()

    def as_list(self) -> list:
        """All that tells one schedule from another, as plain values."""
        changed = [] if self.augmentation == Augmentation() else [asdict(self.augmentation)]
        return [self.epochs, *map(asdict, self.phases), *changed]

    def index(self, epoch: int) -> int:
        """Which phase an epoch belongs to; one beyond the end to the last."""
        return max(i for i, phase in enumerate(self.phases) if phase.start <= epoch)

    def at(self, epoch: int) -> Phase:
        """The settings of an epoch: its phase's, with mi and dc as far as they have risen."""
        phase = self.phases[self.index(epoch)]
        risen = 1.0 if phase.ramp < 2 else min(1.0, (epoch - phase.start) / (phase.ramp - 1))
        return replace(phase, mi=phase.mi * risen, dc=phase.dc * risen)

    def scaled(self, epochs: int, constant: bool = False) -> "Schedule":
        """The same table over another number of epochs; a phase without an epoch is dropped.

        With `constant` the rate is the same in all phases.
        """

        def scale(boundary: int) -> int:
            return round(boundary * epochs / self.epochs)

        phases = [
            replace(
                phase,
                start=scale(phase.start),
                ramp=scale(phase.ramp),
                lr=1.0 if constant else phase.lr,
            )
            for phase in self.phases
        ]
        ends = [phase.start for phase in phases[1:]] + [epochs]
        lasting = [phase for phase, end in zip(phases, ends, strict=True) if phase.start < end]
        return replace(self, epochs=epochs, phases=tuple(lasting))

    def cells(self) -> list[list[str]]:
        """The table as text: a header, then a row a phase; constant columns left out."""
        rows = [asdict(phase) for phase in self.phases]
        # A column that no phase uses says nothing; the sampler always does.
        default = asdict(Phase(0))
        names = [
            field.name
            for field in fields(Phase)[1:]
            if field.name == "sampler"
            or any(row[field.name] != default[field.name] for row in rows)
        ]
        ends = [phase.start for phase in self.phases[1:]] + [self.epochs]
        table = [["epochs", *names]]
        for row, end in zip(rows, ends, strict=True):
            table.append([f"[{row['start']}, {end})", *(_cell(row[name]) for name in names)])
        return table

    def describe(self) -> str:
        """`cells` as lines of text."""
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
        ]
        return "\n".join("  ".join(line).rstrip() for line in padded)


def _cell(value) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value or "none")


_SECOND = Phase(
    16, "weighted", cap=2.0, tau=0.4, temperature=0.15, smoothing=0.05, mi=0.1, dc=0.1, ramp=10
)
_THIRD = replace(_SECOND, start=41, cap=1.5, tau=0.2, temperature=0.12, ramp=0, lr=0.1)
_CROSS_ENTROPY = (Phase(0), Phase(41, lr=0.1), Phase(51, lr=0.01))
_PHASES = {
    "three-stage": (
        Phase(0, temperature=0.15, smoothing=0.05),
        _SECOND,
        _THIRD,
        replace(_THIRD, start=51, lr=0.01),
    ),
    "ce": _CROSS_ENTROPY,
    "post-hoc": _CROSS_ENTROPY,
    "balanced-softmax": tuple(replace(phase, tau=1.0) for phase in _CROSS_ENTROPY),
    # Re-weighted from 80 % of the epochs on, as in the paper: 160 of 200.
    "ldam-drw": (
        *_CROSS_ENTROPY[:2],
        Phase(48, lr=0.1, weights="effective"),
        Phase(51, lr=0.01, weights="effective"),
    ),
    "tau-norm": _CROSS_ENTROPY,
    "crt": (
        Phase(0),
        Phase(41, "weighted", trains="classes"),
        Phase(51, "weighted", lr=0.1, trains="classes"),
    ),
    "linear-probe": _CROSS_ENTROPY,
}
SCHEDULES = {name: Schedule(60, phases) for name, phases in _PHASES.items()}


_CHOICES = {
    "sampler": ("random", "weighted"),
    "weights": ("none", "effective"),
    "trains": ("all", "classes"),
}
_INTEGERS = ("start", "ramp")


def schedule_table(schedule: Schedule) -> dict:
    """The phases as a table of the report; see `common.report.page.own_tables`."""
    header, *rows = schedule.cells()
    text = (
        "What changes in which epochs (counted from 0): how clips are drawn, the strength tau of"
        " the logit adjustment, the weights of the losses, and the factor of the learning rate."
    )
    return {"header": header, "rows": rows, "text": text}


def read_schedule(path: str) -> Schedule:
    """A schedule from a TOML or JSON file.

    It has `epochs`, `phases`, a list of tables with the attributes of `Phase`, and perhaps
    `augmentation`, a table with those of `Augmentation`, and `allow_double_balance`: whether a
    phase may have a weighted sampler and class weights at once.

    Raises:
        InputError: it cannot be read, or says something that no schedule has.
    """
    place = Path(path)
    if place.suffix not in (".toml", ".json"):
        raise InputError(f"--schedule {path}: allowed are .toml and .json")
    try:
        table = reading.read_settings(place)
    except ValueError as error:
        raise InputError(f"--schedule {path}: {error}") from None
    double = isinstance(table, dict) and table.pop("allow_double_balance", False)
    if not isinstance(double, bool):
        raise InputError(
            f"--schedule {path}: allow_double_balance is {double!r}, allowed true, false"
        )
    varied = table.pop("augmentation", {}) if isinstance(table, dict) else {}
    wanted = ["epochs", "phases"]
    for key in table if isinstance(table, dict) else []:
        if key not in wanted:
            known = [*wanted, "augmentation", "allow_double_balance"]
            raise InputError(
                f"--schedule {path}: unknown key {key!r}{did_you_mean(key, known)}; allowed are"
                f" {', '.join(known)}"
            )
    complete = isinstance(table, dict) and table.keys() == set(wanted)
    if not complete or not isinstance(table["phases"], list):
        raise InputError(
            f"--schedule {path}: expected epochs, a number, and phases, a list of tables"
        )
    if type(table["epochs"]) is not int or table["epochs"] < 1 or not table["phases"]:
        raise InputError(
            f"--schedule {path}: epochs must be an integer >= 1, and phases must not be empty"
        )
    phases = tuple(
        _phase(row, f"--schedule {path}, phase {i}") for i, row in enumerate(table["phases"])
    )
    for i, phase in enumerate(phases):
        if phase.sampler == "weighted" and phase.weights != "none" and not double:
            raise InputError(
                f"--schedule {path}, phase {i}: weighted sampler and weights {phase.weights}"
                " balance the classes twice; leave one out, or set allow_double_balance = true"
            )
    starts = [phase.start for phase in phases]
    if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= table["epochs"]:
        raise InputError(
            f"--schedule {path}: starts must rise from 0 and stay below epochs, received {starts}"
        )
    return Schedule(table["epochs"], phases, _augmentation(varied, f"--schedule {path}"))


def _augmentation(row, where: str) -> Augmentation:
    known = [field.name for field in fields(Augmentation)]
    if not isinstance(row, dict):
        raise InputError(f"{where}: augmentation is no table; expected any of {', '.join(known)}")
    for name, value in row.items():
        if name not in known:
            raise InputError(
                f"{where}: unknown key augmentation.{name}{did_you_mean(name, known)}; allowed are"
                f" {', '.join(known)}"
            )
        fits = isinstance(value, bool)
        allowed = "true, false"
        if name in _MOST:
            least = 0.01 if name == "crop" else 0
            allowed = f"{least} to {_MOST[name]}"
            fits = not fits and isinstance(value, (int, float)) and least <= value <= _MOST[name]
        if not fits:
            raise InputError(f"{where}: augmentation.{name} is {value!r}, allowed {allowed}")
    return Augmentation(**row)


def _phase(row, where: str) -> Phase:
    known = [field.name for field in fields(Phase)]
    if not isinstance(row, dict) or "start" not in row:
        raise InputError(f"{where}: expected a table with start and any of {', '.join(known[1:])}")
    for name, value in row.items():
        if name not in known:
            raise InputError(f"{where}: unknown setting {name!r}{did_you_mean(name, known)}")
        if name in _CHOICES:
            if value not in _CHOICES[name]:
                raise InputError(
                    f"{where}: {name} is {value!r}, allowed {', '.join(_CHOICES[name])}"
                )
        elif name != "cap" or value is not None:
            _check_number(name, value, where)
    phase = Phase(**row)
    if phase.smoothing > 1:
        raise InputError(f"{where}: smoothing is {phase.smoothing}, allowed 0 to 1")
    if phase.sampler == "random" and phase.cap is not None:
        raise InputError(f"{where}: cap has no effect with sampler random; give sampler weighted")
    return phase


def _check_number(name: str, value, where: str) -> None:
    integer = name in _INTEGERS
    positive = name in ("cap", "temperature")
    number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1e6 or (positive and value == 0):
        wanted = "an integer" if integer else "a number"
        raise InputError(
            f"{where}: {name} is {value!r}, allowed {wanted} {'> 0' if positive else '>= 0'}"
        )


def prior(counts: np.ndarray, phase: Phase, which: str) -> Tensor:
    """The classes' shares (K,) of the training items.

    As they are (`which` "train"), or as a phase draws them ("sampled").
    """
    weighted = which == "sampled" and phase.sampler == "weighted"
    shares = counts * sampling.class_weights(counts, phase.cap) if weighted else counts
    return torch.from_numpy(shares / shares.sum()).float()


def check(table: Schedule, counts: np.ndarray, which: str, say) -> None:
    """Say which caps of a table leave the drawing as it is, for classes of `counts` (K,) items.

    Raises:
        InputError: the prior `which` is the training items', and no phase adds it to the logits.
    """
    weights = sampling.class_weights(counts, None)
    for phase in table.phases:
        if phase.cap is not None and phase.cap >= weights.max():
            say(
                f"warning: from epoch {phase.start} the cap {phase.cap:g} binds no class:"
                " all are drawn equally often"
            )
        if phase.cap is not None and phase.cap <= weights.min():
            say(
                f"warning: from epoch {phase.start} the cap {phase.cap:g} binds all classes:"
                " none is drawn more often"
            )
    adjusted = any(phase.tau and phase.sampler == "weighted" for phase in table.phases)
    if which == "train" and not adjusted:
        raise InputError(
            "--la-prior train: no phase of --schedule has tau with the weighted sampler;"
            " leave it out"
        )


def loss_terms(
    method: str,
    phase: Phase,
    counts: np.ndarray,
    which: str,
    model: RaerModel,
    output,
    targets: Tensor,
) -> dict[str, Tensor]:
    """The weighted terms of a method's loss by name, scalars; a term of weight 0 is not there.

    Args:
        counts: (K,) training items of each class.
        which: the prior of the logit adjustment, "sampled" or "train". With a weighted sampler the
            clips that training sees have the sampled one; with the other rare classes are corrected
            twice.
        output: what `model` gave, (logits (n, K), class features (K, d)).
        targets: (n,) int64.
    """
    logits, classes = output
    logits = logits.float()
    device = targets.device
    weights = None
    if phase.weights == "effective":
        weights = losses.effective_number_weights(torch.from_numpy(counts), DRW_BETA).float()
        weights = weights / (weights @ prior(counts, phase, "sampled"))  # 1 on average
        weights = amp.to_device(weights, device)
    if method == "ldam-drw":
        sizes = amp.to_device(torch.from_numpy(counts), device)
        return {"ce": losses.ldam(logits / model.scale, targets, sizes, weights=weights)}
    texts = None
    similarity = None
    if model.prompts:
        texts = model.prompts.fixed
        directions = F.normalize(texts, dim=1)
        similarity = directions @ directions.T
    wanted = losses.smooth_targets(
        targets, len(counts), phase.smoothing, similarity, phase.temperature
    )
    shares = amp.to_device(prior(counts, phase, which), device)
    terms = {"ce": losses.logit_adjusted(logits, wanted, shares, phase.tau, weights)}
    if phase.mi and texts is not None:
        terms["mi"] = phase.mi * losses.info_nce(classes, texts)
    if phase.dc:
        terms["dc"] = phase.dc * losses.decorrelation(classes)
    return terms


def decide(method: str, counts: np.ndarray, model: RaerModel, logits: Tensor, tau: float) -> Tensor:
    """The scores (n, K) whose highest is the answer.

    They are the raw logits (n, K) but for post-hoc and tau-norm.
    """
    if method == "post-hoc":
        return logits - tau * torch.from_numpy(counts / counts.sum()).log().to(logits)
    if method == "tau-norm":
        return logits / model.class_features().detach().to(logits).norm(dim=1) ** tau
    return logits


def best_tau(
    method: str, counts: np.ndarray, model: RaerModel, logits: Tensor, labels: np.ndarray
) -> float:
    """The strength of what `decide` does.

    It is 1 for post-hoc; for tau-norm that of the best UAR on these validation items.
    """
    if method != "tau-norm":
        return 1.0
    recalls = []
    for tau in TAUS:
        answers = decide(method, counts, model, logits, float(tau)).argmax(1)
        recalls.append(metrics.long_tail(labels, answers, len(counts))["uar"])
    return float(TAUS[int(np.argmax(recalls))])
