"""Ways to train on classes of very unequal size: each a schedule, a loss and a rule for the answer.

    three-stage        the schedule below: deferred sampling, logit adjustment and semantic smoothing
    ce                 cross-entropy, nothing else
    post-hoc           ce; the answer is the highest logit - log(prior) (Menon et al. 2021, arXiv:2007.07314)
    balanced-softmax   cross-entropy on logits + log(prior) from the start (Ren et al. 2020, arXiv:2007.10740)
    ldam-drw           margins, and class weights late (Cao et al. 2019, arXiv:1906.07413)
    tau-norm           ce on inner products; rows of the classifier divided by |w|^tau (Kang et al., arXiv:1910.09217)
    crt                ce; then the classifier alone, from random weights, classes drawn equally often (the same paper)

The learning rate falls at the same epochs in all of them, but for crt, whose classifier starts anew at the full rate.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import data, losses, metrics, step
from common.config import InputError
from common.models.raer import RaerModel
from common.schedule import Phase, Schedule

_SECOND = Phase(16, "weighted", cap=2.0, tau=0.4, temperature=0.15, smoothing=0.05, mi=0.1, dc=0.1, ramp=10)
_THIRD = replace(_SECOND, start=41, cap=1.5, tau=0.2, temperature=0.12, ramp=0, lr=0.1)
_PLAIN = (Phase(0), Phase(41, lr=0.1), Phase(51, lr=0.01))
_PHASES = {
    "three-stage": (Phase(0, temperature=0.15, smoothing=0.05), _SECOND, _THIRD, replace(_THIRD, start=51, lr=0.01)),
    "ce": _PLAIN,
    "post-hoc": _PLAIN,
    "balanced-softmax": tuple(replace(phase, tau=1.0) for phase in _PLAIN),
    # Re-weighted from 80 % of the epochs on, as in the paper: 160 of 200.
    "ldam-drw": (*_PLAIN[:2], *(Phase(e, lr=lr, weights="effective") for e, lr in ((48, 0.1), (51, 0.01)))),
    "tau-norm": _PLAIN,
    "crt": (Phase(0), Phase(41, "weighted", trains="classes"), Phase(51, "weighted", lr=0.1, trains="classes")),
}
SCHEDULES = {name: Schedule(60, phases) for name, phases in _PHASES.items()}
_DRW_BETA = 0.9999
_TAUS = np.linspace(0, 1, 11)  # that tau-norm chooses from


def prior(counts: np.ndarray, phase: Phase, which: str) -> Tensor:
    """The classes' shares (K,) of the training items as they are ("train"), or as a phase draws them ("sampled")."""
    weighted = which == "sampled" and phase.sampler == "weighted"
    shares = counts * data.class_weights(counts, phase.cap) if weighted else counts
    return torch.from_numpy(shares / shares.sum()).float()


def check(table: Schedule, counts: np.ndarray, which: str, say) -> None:
    """Say which caps of a table leave the drawing as it is, for classes of `counts` (K,) items.

    Raises:
        InputError: the prior `which` is the training items', and no phase adds it to the logits.
    """
    weights = data.class_weights(counts, None)
    for phase in table.phases:
        if phase.cap is not None and phase.cap >= weights.max():
            say(f"warning: from epoch {phase.start} the cap {phase.cap:g} binds no class: all are drawn equally often")
        if phase.cap is not None and phase.cap <= weights.min():
            say(f"warning: from epoch {phase.start} the cap {phase.cap:g} binds all classes: none is drawn more often")
    if which == "train" and not any(phase.tau and phase.sampler == "weighted" for phase in table.phases):
        raise InputError("--la-prior train: no phase of --schedule has tau with the weighted sampler; leave it out")


def loss_terms(
    method: str, phase: Phase, counts: np.ndarray, which: str, model: RaerModel, output, targets: Tensor
) -> dict[str, Tensor]:
    """The weighted terms of a method's loss by name, scalars; a term of weight 0 is not there.

    Args:
        counts: (K,) training items of each class.
        which: the prior of the logit adjustment, "sampled" or "train". With a weighted sampler the clips that training
            sees have the sampled one; with the other rare classes are corrected twice.
        output: what `model` gave, (logits (n, K), class features (K, d)).
        targets: (n,) int64.
    """
    (logits, classes), device = output, targets.device
    logits, weights = logits.float(), None
    if phase.weights == "effective":
        weights = losses.effective_number_weights(torch.from_numpy(counts), _DRW_BETA).float()
        weights = step.to_device(weights / (weights @ prior(counts, phase, "sampled")), device)  # 1 on average
    if method == "ldam-drw":
        sizes = torch.from_numpy(counts)
        return {"ce": losses.ldam(logits / model.scale, targets, step.to_device(sizes, device), weights=weights)}
    texts = model.prompts.fixed if model.prompts else None
    directions = None if texts is None else F.normalize(texts, dim=1)
    similarity = None if texts is None else directions @ directions.T
    wanted = losses.smooth_targets(targets, len(counts), phase.smoothing, similarity, phase.temperature)
    shares = step.to_device(prior(counts, phase, which), device)
    terms = {"ce": losses.logit_adjusted(logits, wanted, shares, phase.tau, weights)}
    if phase.mi and texts is not None:
        terms["mi"] = phase.mi * losses.info_nce(classes, texts)
    if phase.dc:
        terms["dc"] = phase.dc * losses.decorrelation(classes)
    return terms


def decide(method: str, counts: np.ndarray, model: RaerModel, logits: Tensor, tau: float) -> Tensor:
    """The scores (n, K) whose highest is the answer: the raw logits (n, K) but for post-hoc and tau-norm."""
    if method == "post-hoc":
        return logits - tau * torch.from_numpy(counts / counts.sum()).log().to(logits)
    if method == "tau-norm":
        return logits / model.class_features().detach().to(logits).norm(dim=1) ** tau
    return logits


def best_tau(method: str, counts: np.ndarray, model: RaerModel, logits: Tensor, labels: np.ndarray) -> float:
    """The strength of what `decide` does: 1 post hoc; for tau-norm that of the best UAR on these validation items."""
    if method != "tau-norm":
        return 1.0
    found = [decide(method, counts, model, logits, float(tau)).argmax(1) for tau in _TAUS]
    return float(_TAUS[int(np.argmax([metrics.long_tail(labels, row, len(counts))["uar"] for row in found]))])
