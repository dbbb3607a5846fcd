"""Use a trained run: --eval, --predict, --stream."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from common import config
from common.errors import InputError
from common.run import checkpoint, dist
from common.run.files import read_json, run_dir_of, write_json


def write_predictions(
    path: Path, ids: list[str], classes: list[str], scores: Tensor, chosen=None
) -> None:
    """Write predictions.csv: id, the class, and the score (a probability) of every class.

    `chosen` are the classes' numbers; unset: the classes of the highest scores.
    """
    best = scores.argmax(1).tolist() if chosen is None else chosen
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "class", *(f"score_{name}" for name in classes)])
        for name, index, row in zip(ids, best, scores.tolist(), strict=True):
            writer.writerow([name, classes[index], *(f"{value:.6f}" for value in row)])


def output_folder(path: str) -> Path:
    """The folder that results of using a model go to: `path`, or the one of a checkpoint, created
    where it is missing.

    Raises:
        InputError: it cannot be created or written.
    """
    folder = Path(path).parent if Path(path).suffix == ".pt" else Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise InputError(
            f"{folder}: results cannot be written there ({error.strerror}); choose another --out"
        ) from None
    return folder


@dataclass(frozen=True)
class LoadedRun:
    """What --eval, --predict or --stream works with: the checkpoint's `state` and where it is from
    (`source`, for messages); the `folder` for results; the run directory `home`; and the `path` of
    the data.
    """

    state: dict
    source: str
    folder: Path
    home: Path
    path: str

    def write(self, results: dict, world: dist.Dist, answers: tuple | None = None) -> None:
        """Write eval.json: the test metrics, named `eval/test/...`, and print them.

        `answers`, of a classifier, for eval.csv: the data set, the positions (n,) of the test items
        in it, the classes and their probabilities (n, C), or (n,) those of the second of two.
        """
        results = {f"eval/{name.split('/', 1)[1]}": value for name, value in results.items()}
        if world.is_main:
            write_json(self.folder / "eval.json", results)
            print("\n".join(f"{name} {value:.4f}" for name, value in results.items()))
        if world.is_main and answers:
            items, rows, classes, shares = answers
            shares = np.asarray(shares, np.float64)
            shares = np.stack([1 - shares, shares], 1) if shares.ndim == 1 else shares
            with open(self.folder / "eval.csv", "w", newline="") as file:
                csv.writer(file).writerows(
                    [["id", "label", *classes]]
                    + [
                        [items.ids[i], items.classes[items.labels[i]], *p]
                        for i, p in zip(rows, shares.tolist(), strict=True)
                    ]
                )


def load_run(args, script: str) -> LoadedRun:
    """The selected model that --eval, --predict or --stream names; --eval without --data reads what
    it was trained on.

    Raises:
        InputError: there is none, it is another script's, or results cannot be written.
    """
    source = args.eval or args.resume
    state = checkpoint.load_selected(source)
    if state["model_spec"]["script"] != script:
        raise InputError(
            f"{source} is of train_{state['model_spec']['script']}.py; use that script"
        )
    home = run_dir_of(source)
    trained_on = (read_json(home / "config.json") or {}).get("data", args.data)
    path = (
        args.predict
        or getattr(args, "stream", None)
        or (args.data if args.data != "sample" else trained_on)
    )
    return LoadedRun(state, source, output_folder(args.out or source), home, path)


def restore_data_flags(parser: config.Parser, argv: list[str] | None, args, names: list[str]):
    """The flags `args`, but with --eval, --predict or --stream those of `names` (attribute names),
    which say how data are read, are by default what the run was trained with.
    """
    source = args.eval or (args.resume if args.predict or getattr(args, "stream", None) else None)
    if not source:
        return args
    try:
        stored = read_json(run_dir_of(source) / "config.json") or {}
    except InputError as error:
        parser.error(str(error))
    parser.set_defaults(**{name: stored[name] for name in names if name in stored})
    return config.parse(parser, argv, {})
