"""What --eval, --predict and --stream do with a trained run: load it, write what it answers."""

import argparse
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from common import config, metrics
from common.errors import InputError, first_few, plural, say
from common.live import digits
from common.run import checkpoint, dist
from common.run import content as contents
from common.run.card import Card
from common.run.directory import output_folder
from common.run.files import BEST, csv_text, json_text, run_dir_of, write_answer, write_new
from common.run.log import Log
from common.run.run import Run

# What decides a run's result and is no part of its identity: that has it in another form.
_OF_THE_RUN = {"data", "from_run", "teacher", "recipe"}


def predictions_text(
    ids: list[str],
    classes: list[str],
    scores: Tensor,
    chosen: Iterable[int] | None = None,
    more: dict[str, list] | None = None,
) -> str:
    """The text of predictions.csv: id, the class, and the score (a probability) of every class.

    `chosen` are the classes' numbers; unset: the classes of the highest scores. `more` are columns
    behind them, by their names.
    """
    more = more or {}
    if chosen is None:
        chosen = scores.argmax(1).tolist()
    rows = [["id", "class", *(f"score_{name}" for name in classes), *more]]
    for name, index, row, *cells in zip(ids, chosen, scores.tolist(), *more.values(), strict=True):
        rows.append([name, classes[index], *(f"{value:.6f}" for value in row), *cells])
    return csv_text(rows)


@dataclass(frozen=True)
class LoadedRun:
    """What --eval, --predict or --stream works with.

    Attributes:
        state: the checkpoint.
        source: where it is from, for messages.
        folder: where results go.
        path: the data to read; the paths, where --predict or --eval has several.
    """

    state: dict
    source: str
    folder: Path
    path: str | tuple[str, ...]

    @property
    def model_spec(self) -> dict:
        return self.state["model_spec"]

    def as_run(self, args, world: dist.Dist, data, splits: dict[str, np.ndarray]) -> Run:
        """A run that trains nothing, with the settings of the loaded model."""
        log = Log(None, main=world.is_main)
        return Run(args, world, data, splits, self.folder, log, self.model_spec)

    def with_weights(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The model that `build` makes, with the loaded weights.

        Raises:
            InputError: the checkpoint does not say what it takes to build it, or does not fit.
        """
        with checkpoint.foreign(self.source):
            model = build()
        checkpoint.load_weights(model, self.state["model"], self.source)
        return model

    def write(
        self,
        results: dict,
        world: dist.Dist,
        answers: tuple | None = None,
        chosen: np.ndarray | None = None,
        facts: dict | None = None,
    ) -> None:
        """Write eval.json: the test metrics, named `eval/test/...`, and print them.

        An earlier one that says something else is kept, see `write_answer`.

        Args:
            answers: of a classifier, for eval.csv and eval_confusion.csv: the data set, the
                positions (n,) of the test items in it, the classes and their probabilities (n, C),
                or (n,) those of the second of two.
            chosen: (n,) the classes' numbers; unset: the classes of the highest probabilities.
            facts: what else eval.json tells.
        """
        results = {f"eval/{name.split('/', 1)[1]}": value for name, value in results.items()}
        if not world.is_main:
            return
        say(*(f"{name} {digits(value)}" for name, value in results.items()))
        table = confusion = None
        if answers is not None:
            data, rows, classes, scores = answers
            scores = np.asarray(scores, np.float64)
            if scores.ndim == 1:
                scores = np.stack([1 - scores, scores], 1)
            chosen = scores.argmax(1) if chosen is None else chosen
            labels = [data.classes[data.labels[i]] for i in rows]
            lines = [["id", "label", "answer", *classes]]
            for i, label, k, shares in zip(rows, labels, chosen, scores.tolist(), strict=True):
                lines.append([data.ids[i], label, classes[k], *shares])
            table = csv_text(lines)
            target = [classes.index(label) for label in labels]
            counts = metrics.confusion_matrix(target, chosen, len(classes)).tolist()
            rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
            confusion = csv_text([["true", *classes], *rows])
        texts = {"eval.json": json_text(results | (facts or {})), "eval.csv": table}
        write_answer(self.folder, texts | {"eval_confusion.csv": confusion})

    def say_who_answers(
        self, world: dist.Dist, classes: list[str], unit: str = "class", stages: Iterable[str] = ()
    ) -> None:
        """Say before --predict whose classifier answers, with how many classes.

        Args:
            unit: the word for a class.
            stages: those of the script that have a classifier. Where a whole run is named, it is
                said how to ask the others.
        """
        stage = self.model_spec["stage"]
        world.say(
            f"the classifier of {stage} ({self.source}, epoch {self.state.get('epoch')},"
            f" {plural(len(classes), unit)}: {first_few(classes)}) answers"
        )
        for other in stages:
            folder = Path(self.source) / other
            if other != stage and any((folder / name).exists() for name in BEST):
                world.say(f"--resume {folder} asks that of {other}")

    def write_predictions(
        self,
        world: dist.Dist,
        ids: list[str],
        classes: list[str],
        scores: Tensor,
        chosen: Iterable[int] | None = None,
        note: str = "",
        more: dict[str, list] | None = None,
    ) -> None:
        """Write predictions.csv, see `predictions_text`, and say where it is; `note` follows.

        Earlier ones stay: the next is predictions-2.csv.
        """
        if world.is_main:
            text = predictions_text(ids, classes, scores, chosen, more)
            file = write_new(self.folder / "predictions.csv", text)
            say(f"{plural(len(ids), 'prediction')} in {file}{note}")


def is_inference(args) -> bool:
    """Whether the flags ask to use a trained run: --eval, --predict or --stream."""
    return bool(args.eval or args.predict or getattr(args, "stream", None))


def load_run(args, card: Card) -> LoadedRun:
    """The selected model that --eval, --predict or --stream names.

    --eval without --data reads what it was trained on.

    Raises:
        InputError: there is none, it is another script's, or results cannot be written.
    """
    source = args.eval or args.resume
    state = checkpoint.load_selected(source)
    script = state["model_spec"]["script"]
    if script != card.name:
        raise InputError(f"{source} is of train_{script}.py; use that script")
    path = getattr(args, "stream", None) or args.data
    path = tuple(path) if isinstance(path, list) else path
    if args.predict:
        _check_paths(args.predict)
        path = args.predict[0] if len(args.predict) == 1 else tuple(args.predict)
    if args.eval and args.data is None:
        path = checkpoint.config_of(source).get("data", "sample")
        if not path.startswith("sample") and not os.path.exists(path):
            raise InputError(f"{source} was trained on {path}, which is not here: give --data")
    if args.out and os.path.isfile(args.out):
        raise InputError(f"--out {args.out} is a file; give the folder for the results")
    return LoadedRun(state, source, output_folder(args.out or source), path)


def _check_paths(paths: list[str]) -> None:
    # Each item is answered once, under one name. A folder is read with all that is below it, but
    # for archives.
    given: dict[str, str] = {}
    for path in paths:
        if len(paths) > 1 and path.startswith("sample") and not os.path.exists(path):
            raise InputError(f"--predict {path}: there is no such file; embedded data stand alone")
        place = os.path.abspath(path)
        if place in given:
            raise InputError(f"--predict {path} is the same as {given[place]}: give it once")
        given[place] = path
    for place, path in given.items():
        folder = place
        while folder != os.path.dirname(folder) and not path.lower().endswith(".zip"):
            folder = os.path.dirname(folder)
            if folder in given:
                raise InputError(
                    f"--predict {path} lies in {given[folder]}, which is given too: give either"
                )


def restore_flags(
    parser: config.Parser, argv: list[str] | None, args, script: str, names: list[str], demo: dict
) -> argparse.Namespace:
    """The flags of a run that is used or trained on: those that are not given are its own.

    Args:
        script: the name of the script's card.
        names: with --eval, --predict or --stream, which only say how data are read, the attributes
            of the flags that are the run's; with --eval --group-by is one, so that the test split
            is. With --resume PATH in training all that decide the result are.
        demo: as `config.parse` takes it.

    Returns:
        `args` as they are, or parsed again.
    """
    used = is_inference(args)
    trained_on = args.resume not in ("auto", "none") and os.path.exists(args.resume)
    if args.search or args.ensemble or not (used or trained_on):
        return args
    source = args.eval or args.resume
    try:
        stored = checkpoint.config_of(source)
    except InputError as error:
        if not used:
            return args  # `create_run_dir` refuses it, with what helps
        parser.error(str(error))
    there = stored.get("card", {}).get("name", script)
    if there != script:
        parser.error(f"{source} is of train_{there}.py; use that script")
    if used:
        names = [*names, "group_by"] if args.eval else names
        values = {name: stored[name] for name in names if name in stored}
        parser.set_defaults(**parser.checked(values, f"config.json of {source}"))
        return config.parse(parser, argv, {})
    flags = {action.dest for action in parser._actions}
    names = flags & (_OF_THE_RUN | stored.get("identity", {}).keys())
    values = {name: stored.get(name) for name in sorted(names)}
    given = config.words(parser, values, f"config.json of {source}")
    parser.note = f"; flags that are not given are those of {source}"
    return config.parse(parser, [*given, *config.expanded(parser, argv)], demo)


def warn_of_known(source: str, data, indices: np.ndarray, unit: str, say) -> None:
    """Say which of the items `indices` are in the data of the run `source`, too, by their bytes.

    Args:
        data: what `indices` are of, another data set; it has `shared_with`. Items that have not
            been read are not known.
    """
    shared = data.shared_with(contents.load(run_dir_of(source), say), indices)
    if shared.any():
        names = first_few(np.array(data.ids)[indices[shared]])
        say(
            f"WARN {shared.sum()} of {plural(len(indices), unit)} are in the data of {source}, too,"
            f" and may have been learned: {names}; that data itself, as --data, keeps apart what"
            " was held out"
        )


def names_of_data(paths: tuple[str, ...]) -> list[str]:
    """A short name for each data set: its own, with those of the folders above that tell it from
    the others.
    """
    places = [os.path.abspath(path) for path in paths]
    if len(set(places)) < len(places):
        raise InputError(f"--data {' '.join(paths)}: one data set is there twice; give it once")
    bare = [re.sub(r"\.(zip|csv|json|packed)$", "", place, flags=re.I) for place in places]
    if len(set(bare)) < len(bare):  # a folder beside its archive
        bare = places
    parts = [Path(path).parts for path in bare]
    depth = 1
    while len({path[-depth:] for path in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["-".join(path[-depth:]) for path in parts]
