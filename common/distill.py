"""--teacher: a student learns a teacher's answers beside the labels.

That is distillation (Hinton et al. 2015, arXiv:1503.02531).
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import amp
from common.errors import InputError
from common.run import checkpoint


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch: a scalar.

    T^2 keeps the gradient's size when the temperature T changes.

    Args:
        student, teacher: (n, C) logits, or (n,) those of the second of two classes.
        temperature: positive.
    """
    ours = _log_softmax(student, temperature)
    theirs = _log_softmax(teacher, temperature)
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if logits.ndim == 1:
        logits = torch.stack([torch.zeros_like(logits), logits], 1)
    return (logits.float() / temperature).log_softmax(1)


class Teacher:
    """The frozen model of --teacher.

    `outputs(model, x)` gives the logits of a model for a batch of the student's own input: the
    teacher sees the same view of it (Beyer et al. 2022, arXiv:2106.05237). Where the student sees
    features, `evaluate(run, model, items)` gives the teacher's logits of all items, once.
    """

    def __init__(self, run, model: nn.Module, outputs: Callable, evaluate: Callable | None):
        self.run = run
        self.model = model
        self.outputs = outputs
        self.evaluate = evaluate
        self.table: Tensor | None = None

    @torch.no_grad()
    def logits(self, x: Tensor, items: np.ndarray | None, progress=None) -> Tensor:
        """The teacher's logits for a batch x, or for the features x of the items (n,); `progress`
        is that of the student's stage.
        """
        if items is None:
            with amp.autocast(self.run.args.precision, self.run.world.device):
                return self.outputs(self.model, x)
        if self.table is None:
            everything = np.arange(len(self.run.data))
            self.table = self.evaluate(self.run, self.model, everything, progress=progress)
        return amp.to_device(self.table[items % len(self.table)], x.device)


def add_distillation(
    run, terms: dict[str, Tensor], student: Tensor, x: Tensor, items: np.ndarray | None = None
) -> dict[str, Tensor]:
    """The terms of a loss by 1 - weight, and the term `teacher` by --teacher-weight.

    Where the run has no teacher the terms are as they are.

    Args:
        student: the student's logits.
        x, items: what they were computed from, see `Teacher.logits`.
    """
    if run.teacher is None:
        return terms
    weight = run.args.teacher_weight
    answers = run.teacher.logits(x, items, run.current)
    shares = {name: (1 - weight) * value for name, value in terms.items()}
    shares["teacher"] = weight * distillation(student, answers, run.args.teacher_temperature)
    return shares


def read(args, model_spec: dict, same) -> tuple[dict | None, dict]:
    """The state of --teacher, and what it adds to a run's identity: the digest of its weights.

    It is (None, {}) without one.

    Args:
        model_spec: the student's.
        same: in what both must agree, for they see the same input and answer the same question:
            names in `model_spec`, or functions of it.

    Raises:
        InputError: there is none, it is another script's, or reads or answers something else.
    """
    if args.teacher is None:
        return None, {}
    state = checkpoint.load_selected(args.teacher)
    theirs = state["model_spec"]
    for entry in ["script", *same]:
        if callable(entry):
            name = entry.__name__
            ours = entry(model_spec)
            other = entry(theirs)
        else:
            name = entry
            ours = model_spec.get(entry)
            other = theirs.get(entry)
        if ours != other:
            raise InputError(
                f"--teacher {args.teacher} has the {name.replace('_', ' ')} {other}, this run"
                f" {ours}: both must see and name the same"
            )
    return state, {"teacher": checkpoint.weights_digest(state["model"])}


def attach_teacher(
    run,
    state: dict | None,
    build_model: Callable[..., nn.Module],
    outputs: Callable,
    evaluate: Callable | None = None,
) -> None:
    """Make `run.teacher` of a state that `read` gave; None leaves the run without one.

    Args:
        run: the student's `common.run.run.Run`.
        build_model: gives the network of a run, by its `model_spec`; the random numbers that it
            draws are put back.
        outputs, evaluate: as `Teacher` takes them.
    """
    if state is None:
        return
    args = run.args
    teachers_run = replace(run, model_spec=state["model_spec"])
    rng_state = checkpoint.rng_state()
    with checkpoint.foreign(args.teacher):
        model = build_model(teachers_run)
    checkpoint.set_rng_state(rng_state)
    checkpoint.load_weights(model, state["model"], args.teacher)
    run.log.say(
        f"teacher {args.teacher}: weight {args.teacher_weight:g}, T {args.teacher_temperature:g}"
    )
    run.teacher = Teacher(teachers_run, model.eval().requires_grad_(False), outputs, evaluate)
