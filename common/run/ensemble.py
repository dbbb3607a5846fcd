"""--ensemble A B C: the averaged predictions of runs on the test split, beside each of them.

Every member is evaluated as --eval does it, one after another; what they say of each test item is
averaged as probabilities, with equal weight.
"""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import torch

from common import config, metrics
from common.errors import InputError, exit_codes
from common.run.files import write_json
from common.run.inference import write_predictions

FILE = "eval.csv"  # what --eval leaves of each test item


def judge(main, argv: list[str] | None, args, metric: str) -> None:
    """Evaluate the runs of --ensemble through a script's `main` and their average; prints and
    writes ensemble.json and ensemble.csv in --out, or in runs/ensemble-HASH.

    Args:
        metric: of `scores`, by which the ensemble is compared with its members.

    Raises:
        SystemExit: 2, a member cannot be evaluated, or members answer different questions.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    names = args.ensemble
    with exit_codes():
        if len(names) < 2:
            raise InputError(f"--ensemble {names[0]}: give two runs or more")
    first = not int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    folder = Path(args.out or Path("runs") / f"ensemble-{config.digest(names)}")
    for i, name in enumerate(names):
        if first:  # what another run left there is no answer of this one
            (folder / f"member{i}" / FILE).unlink(missing_ok=True)
        main([*_without(argv, names), "--eval", name, "--out", str(folder / f"member{i}")])
    if not first:  # the group of processes has ended
        return
    with exit_codes():
        members = [read(folder / f"member{i}" / FILE, name) for i, name in enumerate(names)]
        ids, labels, classes, _ = members[0]
        for name, other in zip(names, members, strict=True):
            if other[2] != classes or other[0] != ids:
                raise InputError(
                    f"--ensemble: {name} and {names[0]} have other test items or classes"
                )
        mean = np.mean([probabilities for *_, probabilities in members], 0)
        found = [scores(labels, p) for *_, p in members] + [scores(labels, mean)]
        shown = list(found[0])
        for name, own in zip([*names, "ensemble"], found, strict=True):
            print(f"{name}: " + ", ".join(f"{key} {own[key]:.4f}" for key in shown))
        member = float(np.mean([own[metric] for own in found[:-1]]))
        best, own = max(one[metric] for one in found[:-1]), found[-1][metric]
        verdict = (
            "worse than" if own < member else "no better than" if own == member else "better than"
        )
        print(
            f"the ensemble's {metric} is {verdict} its mean member's ({own:.4f}, {member:.4f};"
            f" the best {best:.4f})"
        )
        results = {f"ensemble/test/{key}": value for key, value in found[-1].items()}
        results |= {
            f"ensemble/test/member_{key}": float(np.mean([one[key] for one in found[:-1]]))
            for key in shown
        }
        write_json(folder / "ensemble.json", results | {"members": names})
        write_predictions(folder / "ensemble.csv", ids, classes, torch.from_numpy(mean))


def _without(argv: list[str], names: list[str]) -> list[str]:
    # The flags but for --ensemble with its runs and --out with its folder.
    kept, skip = [], 0
    for i, token in enumerate(argv):
        if token == "--ensemble":
            skip = len(names) + 1
        elif token == "--out":
            skip = 2
        if skip:
            skip -= 1
        elif not token.startswith("--out="):
            kept.append(argv[i])
    return kept


def read(path: Path, source: str) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """The ids, labels (n,), classes and probabilities (n, C) in the eval.csv of --eval.

    Raises:
        InputError: --eval left no such file.
    """
    if not path.exists():
        raise InputError(
            f"--ensemble: {source} has no classifier; name runs of stages that classify"
        )
    with open(path, newline="") as file:
        (_, _, *classes), *rows = csv.reader(file)
    labels = np.array([classes.index(row[1]) for row in rows], np.int64)
    return (
        [row[0] for row in rows],
        labels,
        classes,
        np.array([row[2:] for row in rows], np.float64),
    )


def scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1, UAR and negative log-likelihood of probabilities (n, C); of two classes
    also AUC, average precision and equal error rate.
    """
    count = probabilities.shape[1]
    found = metrics.classification(labels, probabilities.argmax(1), count)
    values = {name: found[name] for name in ("accuracy", "macro_f1")}
    values["uar"] = metrics.long_tail(labels, probabilities.argmax(1), count)["uar"]
    own = probabilities[np.arange(len(labels)), labels]
    values["nll"] = float(-np.log(np.maximum(own, 1e-12)).mean())
    return values | (metrics.detection(labels, probabilities[:, 1]) if count == 2 else {})
