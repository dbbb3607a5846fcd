"""--ensemble A B C: runs as one model, their averaged predictions on the test split beside each.

Every member is evaluated as --eval does it, one after another; what they predict for each test item
is averaged as probabilities, with equal weight.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

from common import config, metrics
from common.errors import InputError, exit_codes, say
from common.live import digits
from common.run import dist
from common.run.files import json_text, write_answer
from common.run.inference import predictions_text

FILE = "eval.csv"  # what --eval leaves of each test item


def judge(main, argv: list[str] | None, args, metric: str) -> None:
    """Evaluate the runs of --ensemble through a script's `main`, and their average.

    Prints the scores and writes ensemble.json and ensemble.csv in --out, or in runs/ensemble-HASH.

    Args:
        metric: of `scores`, by which the ensemble is compared with its members.

    Raises:
        SystemExit: 2, a member cannot be evaluated, or members have other items or classes.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    names = args.ensemble
    with exit_codes():
        if len(names) < 2:
            raise InputError(f"--ensemble {names[0]}: give two runs or more")
    is_main = dist.launched_first()
    folder = Path(args.out or Path("runs") / f"ensemble-{config.digest(names)}")
    others = config.without(argv, {"--ensemble": len(names), "--out": 1})
    for i, name in enumerate(names):
        member = folder / f"member{i}"
        if is_main:  # what another run left there is no answer of this one
            for answer in member.rglob(FILE):
                answer.unlink()
        main([*others, "--eval", name, "--out", str(member)])
    if not is_main:  # the group of processes has ended
        return
    with exit_codes():
        members = [read(folder / f"member{i}", name) for i, name in enumerate(names)]
        ids, labels, classes, _ = members[0]
        for name, (member_ids, _, member_classes, _) in zip(names, members, strict=True):
            if member_classes != classes or member_ids != ids:
                raise InputError(
                    f"--ensemble: {name} and {names[0]} have other test items or classes"
                )
        mean = np.mean([probabilities for *_, probabilities in members], 0)
        of_members = [scores(labels, probabilities) for *_, probabilities in members]
        of_mean = scores(labels, mean)
        for name, values in zip([*names, "ensemble"], [*of_members, of_mean], strict=True):
            say(f"{name}: " + ", ".join(f"{key} {digits(value)}" for key, value in values.items()))
        results = {f"ensemble/test/{key}": value for key, value in of_mean.items()}
        for key in of_mean:
            average = float(np.mean([values[key] for values in of_members]))
            results[f"ensemble/test/member_{key}"] = average
        value = of_mean[metric]
        average = results[f"ensemble/test/member_{metric}"]
        comparison = "no better than"
        if value != average:
            comparison = "worse than" if value < average else "better than"
        best = max(values[metric] for values in of_members)
        print(
            f"the ensemble's {metric} is {comparison} its mean member's"
            f" ({digits(value)}, {digits(average)}; the best {digits(best)})"
        )
        texts = {
            "ensemble.json": json_text(results | {"members": names}),
            "ensemble.csv": predictions_text(ids, classes, torch.from_numpy(mean)),
        }
        write_answer(folder, texts)


def read(folder: Path, source: str) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """The ids, labels (n,), classes and probabilities (n, C) in the eval.csv that --eval left in or
    below `folder`.

    Raises:
        InputError: there is none.
    """
    path = next(folder.rglob(FILE), None)
    if path is None:
        raise InputError(
            f"--ensemble: {source} has no classifier; name runs of stages that classify"
        )
    with open(path, newline="", encoding="utf-8") as file:
        (_, _, _, *classes), *rows = csv.reader(file)
    ids = [row[0] for row in rows]
    labels = np.array([classes.index(row[1]) for row in rows], np.int64)
    probabilities = np.array([row[3:] for row in rows], np.float64)
    return ids, labels, classes, probabilities


def scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1, UAR and negative log-likelihood of probabilities (n, C).

    Of two classes also AUC, average precision and equal error rate.
    """
    count = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    per_class = metrics.classification(labels, predicted, count)
    of_truth = probabilities[np.arange(len(labels)), labels]
    values = {
        "accuracy": per_class["accuracy"],
        "macro_f1": per_class["macro_f1"],
        "uar": metrics.long_tail(labels, predicted, count)["uar"],
        "nll": float(-np.log(np.maximum(of_truth, 1e-12)).mean()),
    }
    if count == 2:
        values |= metrics.detection(labels, probabilities[:, 1])
    return values
