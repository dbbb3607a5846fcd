"""Flags that the four scripts share, config files, one-line errors and exit codes.

A flag is declared once, here or in the one script that owns it; its default stands there and nowhere else. `args` is
never changed after parsing: derived values get names of their own.
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_STOPPED = 2, 3, 75

# What may differ between two commands that mean the same run. The data set enters the identity by its content
# (`fingerprint`), so that a copy on a node's local disk continues the same run.
NOT_IDENTITY = {
    "bad_images", "compile", "config", "data", "demo", "deterministic", "device", "eval", "eval_every", "fork", "from_run",
    "impl", "log_every", "max_steps", "out", "predict", "resume", "save_every", "tensorboard", "workers",
}  # fmt: skip


class InputError(ValueError):
    """Something the user gave cannot be used: the message says what was received, what is allowed, what to do."""


class Diverged(RuntimeError):
    """The loss or a gradient is not finite: training cannot go on."""


class Stopped(RuntimeError):
    """The run was asked to stop and its state is saved; `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def exit_codes():
    """Turn the three expected endings into one line on stderr and the exit code that README.md lists."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except Diverged as error:
        print(f"diverged: {error}", file=sys.stderr)
        raise SystemExit(EXIT_DIVERGED) from None
    except Stopped as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.code) from None


def nearest(word: str, words) -> str:
    """A hint for a misspelt name: `; did you mean X?`, or nothing when no name is near."""
    match = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {match[0]}?" if match else ""


def number(kind, *, low=None, high=None, above=None):
    """An argparse type: an int or float within bounds, refused with the bounds otherwise."""
    bounds = " ".join(
        f"{sign} {bound}" for sign, bound in ((">=", low), (">", above), ("<=", high)) if bound is not None
    )

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        inside = (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
        if not inside:  # a NaN is inside no bounds
            raise argparse.ArgumentTypeError(f"received {text}, allowed {bounds}")
        return value

    return convert


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest name, and whose help shows every default."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def choice(self, group, flag: str, names, **kwargs):
        """Add a flag that takes one of `names`."""
        names = list(names)

        def convert(text: str) -> str:
            if text not in names:
                allowed = ", ".join(names)
                raise argparse.ArgumentTypeError(f"received {text!r}, allowed {allowed}{nearest(text, names)}")
            return text

        group.add_argument(flag, type=convert, metavar="{" + ",".join(names) + "}", **kwargs)

    def flags(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            first = unknown.split()[0].split("=")[0]
            message = f"unknown flag {first}{nearest(first, self.flags())}"
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # A flag that is unset by default explains in its own words what happens then.
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def base_parser(script: str, doc: str) -> Parser:
    """The shared flags of a script.

    `script` is the short name (`simclr`), `doc` the script's docstring, which becomes the head of `--help`.
    """
    parser = Parser(prog=f"train_{script}.py", description=doc)
    data = parser.add_argument_group("data and run directory")
    data.add_argument("--data", default="sample", help="folder, .zip of one, or `sample`, the embedded data set")
    data.add_argument("--out", help="run directory; unset: runs/SCRIPT/NAME-HASH, a function of the other flags")
    data.add_argument("--workers", type=number(int, low=1), default=min(8, os.cpu_count() or 1), help="decoding threads")
    parser.choice(data, "--bad-images", ["error", "skip"], default="error",
                  help="a damaged image ends the run, or is left out (at most 1 %% of them) and counted")  # fmt: skip
    data.add_argument("--config", metavar="FILE", help="TOML or JSON file of flags; the command line wins")

    optim = parser.add_argument_group("optimisation (of the first stage, or of the one stage that was named)")
    optim.add_argument("--epochs", type=number(int, low=1), help="passes over the training data")
    optim.add_argument("--bs", type=number(int, low=1), help="batch of one optimiser step, over all processes and chunks")
    optim.add_argument("--accum", type=number(int, low=1), default=1, help="chunks that the batch is split into")
    optim.add_argument("--lr", type=number(float, low=0), help="peak learning rate, used as given")
    optim.add_argument("--wd", type=number(float, low=0), help="weight decay of all but biases and normalisation")
    optim.add_argument("--warmup-epochs", type=number(float, low=0), help="unset: a tenth of the epochs")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.choice(machine, "--precision", ["auto", "fp32", "bf16", "fp16"], default="auto",
                  help="auto: bf16 on a GPU that has it, fp32 elsewhere")  # fmt: skip
    machine.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    parser.choice(machine, "--impl", ["auto", "triton", "torch"], default="auto", help="implementation of the kernels")
    machine.add_argument("--seed", type=number(int, low=0, high=2**31 - 1), default=0, help="weights, order, augmentation")
    machine.add_argument("--deterministic", action="store_true", help="bitwise repeatable on a GPU too, at some cost")

    running = parser.add_argument_group("running")
    running.add_argument("--resume", default="auto", metavar="{auto,none,PATH}",
                         help="continue the run directory, start anew, or continue from PATH")  # fmt: skip
    running.add_argument("--fork", action="store_true", help="continue a run although its flags differ")
    running.add_argument("--max-steps", type=number(int, low=1), help="stop after so many steps; the schedule is unchanged")
    running.add_argument("--log-every", type=number(int, low=1), default=10, help="steps")
    running.add_argument("--eval-every", type=number(int, low=1), default=1, help="epochs")
    running.add_argument("--save-every", type=number(float, low=0), default=10.0, help="minutes")
    running.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    running.add_argument("--eval", metavar="CHECKPOINT", help="evaluate a checkpoint or run on the test split and end")
    running.add_argument("--predict", metavar="PATH", help="classify the items of PATH with the run named by --resume")
    running.add_argument("--demo", action="store_true", help="a small run on the embedded data set, minutes on two cores")
    return parser


def parse(parser: Parser, argv: list[str] | None, demo: dict) -> argparse.Namespace:
    """Parse flags: built-in defaults, then the demo's (with --demo), then --config, then the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = Parser(add_help=False)
    finder.add_argument("--config")
    finder.add_argument("--demo", action="store_true")
    first, _ = finder.parse_known_args(argv)
    argv = (_config_flags(parser, first.config) if first.config else []) + argv
    if first.demo or "--demo" in argv:
        parser.set_defaults(**demo)
    return parser.parse_args(argv)


def _config_flags(parser: Parser, file: str) -> list[str]:
    # A config file becomes flags in front of the command line: one parser checks both, and the later one wins.
    path = Path(file)
    if path.suffix not in (".toml", ".json"):
        parser.error(f"--config {file}: allowed are .toml and .json")
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        parser.error(f"--config {file}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--config {file}: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {file}: expected a table of flags, received {type(values).__name__}")
    argv = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if flag not in parser.flags() or flag == "--config":
            parser.error(f"--config {file}: unknown flag {name!r}{nearest(flag, parser.flags())}")
        if value is True:
            argv.append(flag)
        elif value is not False:
            argv += [flag, str(value)]
    return argv


def refuse_without_effect(parser: Parser, args: argparse.Namespace, names, reason: str) -> None:
    """Exit 2 if one of the flags `names` (attribute names) was set although it would change nothing."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect {reason}")


def identity(parser: Parser, args: argparse.Namespace, **facts) -> dict:
    """The settings that decide a run's result: flags that differ from their built-in default, and given `facts`.

    Flags at their default stay out, so that a flag added later does not give old runs another name.
    """
    changed = {
        name: value
        for name, value in vars(args).items()
        if name not in NOT_IDENTITY and value != parser.get_default(name)
    }
    return {"demo": args.demo, **changed, **facts}


def digest(value) -> str:
    """Eight hexadecimal digits that name a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Stage:
    """The resolved settings of one stage; `bs` counts items over all processes and chunks."""

    name: str
    epochs: int
    bs: int
    lr: float
    wd: float
    optimizer: str
    warmup_epochs: float


def stage(args, name: str, defaults: dict, *, first: bool, lr_of) -> Stage:
    """Settings of a stage: from the shared flags if it is the first or only one, else from `--NAME-epochs` and so on.

    What is unset comes from `defaults`; a learning rate of None there is `lr_of(bs)`.
    """
    given = {flag: getattr(args, flag if first else f"{name}_{flag}") for flag in ("epochs", "bs", "lr", "wd")}
    values = defaults | {flag: value for flag, value in given.items() if value is not None}
    if values["lr"] is None:
        values["lr"] = lr_of(values["bs"])
    if first and args.warmup_epochs is not None:
        values["warmup_epochs"] = args.warmup_epochs
    else:
        values["warmup_epochs"] = defaults.get("warmup_epochs", values["epochs"] / 10)
    if values["warmup_epochs"] > values["epochs"]:
        raise InputError(f"--warmup-epochs {values['warmup_epochs']:g} is more than the {values['epochs']} epochs")
    return Stage(name, **values)
