"""--search: random search. Each trial is an ordinary run, its settings a function of its number.

Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, JMLR 2012.

20 trials, one after another; one of them, as a task of a Slurm array from 0 to 19; their table:

  python train_X.py --search 20
  python train_X.py --search 20 --trial $SLURM_ARRAY_TASK_ID
  python -m common.report runs/X --where trial=any --rows trial,lr,wd --value best_value --compact

A flag that is given, or stands in --config, is not drawn. More trials leave the earlier ones as
they are.
"""

import math
import zlib

import numpy as np

from common.errors import InputError, did_you_mean
from common.rng import uniform

_STREAM = 2**31 + 4  # beside those of data and clips


def parse_ranges(text: str) -> dict[str, tuple[float, float]]:
    """`lr=1e-4:1e-2,wd=1e-6:1e-2` as {"lr": (1e-4, 1e-2), ...}.

    Raises:
        InputError: not of that form, or a range that is not positive and rising.
    """
    ranges = {}
    for part in text.split(","):
        name, _, bounds = part.partition("=")
        try:
            low, high = (float(bound) for bound in bounds.split(":"))
        except ValueError:
            low = high = 0.0
        if not 0 < low < high < float("inf"):
            raise InputError(
                f"--ranges {part!r}: allowed is FLAG=LOW:HIGH with 0 < LOW < HIGH, as lr=1e-4:1e-2"
            )
        ranges[name.strip().replace("-", "_")] = low, high
    return ranges


def draw(ranges: dict[str, tuple[float, float]], seed: int, trial: int, whole=()) -> dict[str, str]:
    """The values of a trial by flag, as text: uniform on a log scale, with three digits.

    Those of the flags `whole` are integers. A value depends on (seed, trial, flag) alone: leaving
    one flag out leaves the others' values as they are.
    """
    values = {}
    for name, (low, high) in ranges.items():
        u = uniform(seed, zlib.crc32(name.encode()), np.array([trial]), _STREAM, 1)[0, 0]
        value = low * (high / low) ** u
        if name in whole:
            values[name] = str(min(max(round(value), math.ceil(low)), math.floor(high)))
        else:
            values[name] = f"{value:.3g}"
    return values


def flags(parser, args, argv: list[str], ranges: dict) -> list[str]:
    """The flags of the trial that `args` names: those of `ranges` that `argv` does not give.

    --ranges changes `ranges`, or adds to them.

    Raises:
        InputError: a range of a flag that is not there or takes no number, or holds no integer that
            it takes; one whose learning rates begin below the last one of the cosine, where a trial
            could not run.
    """
    numbers = {
        action.dest: action.option_strings[0]
        for action in parser._actions
        if action.option_strings and action.metavar in ("X", "N")
    }
    whole = {action.dest for action in parser._actions if action.metavar == "N"}
    ranges = drawn_ranges(ranges, args)
    unknown = next((name for name in ranges if name not in numbers or name == "seed"), None)
    if unknown is not None:
        raise InputError(f"--ranges: no number is called {unknown}{did_you_mean(unknown, numbers)}")
    for name, (low, high) in ranges.items():
        if name in whole and math.ceil(low) > math.floor(high):
            raise InputError(
                f"--ranges {name}={low:g}:{high:g} holds no integer, which {numbers[name]} takes:"
                " widen it"
            )
    given = {token.split("=")[0] for token in argv}
    ranges = {name: bounds for name, bounds in ranges.items() if numbers[name] not in given}
    min_lr = ranges["min_lr"][1] if "min_lr" in ranges else getattr(args, "min_lr", 0.0)
    if "lr" in ranges:
        low, high = ranges["lr"]
        if low < min_lr:
            raise InputError(
                f"--ranges lr={low:g}:{high:g} begins below --min-lr {min_lr:g}; raise its low end"
            )
    drawn = draw(ranges, args.seed, args.trial, whole)
    argv_of_trial = []
    for name, value in drawn.items():
        argv_of_trial += [numbers[name], value]
    return argv_of_trial


def drawn_ranges(ranges: dict, args) -> dict[str, tuple[float, float]]:
    """What a trial draws: a script's ranges, changed or added to by --ranges.

    The script's are those of the named stage, or else of the optimizer, where it has them by those.
    """
    for name in (getattr(args, "stage", None), getattr(args, "optimizer", None)):
        if isinstance(ranges.get(name), dict):
            ranges = ranges[name]
            break
    return ranges | (parse_ranges(args.ranges) if args.ranges else {})
