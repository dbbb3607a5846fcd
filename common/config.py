"""Flags that the four scripts share, config files, one-line errors and exit codes.

A flag is declared once, here or in the one script that owns it; its default stands there and
nowhere else. `args` is never changed after parsing: derived values get names of their own.
"""

import argparse
import hashlib
import json
import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from common import search
from common.errors import EXIT_BAD_INPUT, InputError, did_you_mean

# What may differ between two commands that mean the same run. The data set enters the identity by
# its content (`fingerprint`), so that a copy on a node's local disk continues the same run.
NOT_IN_RUN_ID = {
    "check", "compile", "config", "data", "demo", "detect_anomaly", "deterministic", "device", "eval", "force_resume",
    "from_run", "impl", "log_every", "max_steps", "out", "predict", "profile", "ranges", "resume", "save_every",
    "search", "teacher", "tensorboard", "timeout", "trial", "workers",
}  # fmt: skip

# What --eval, --predict and --ensemble heed.
INFERENCE_FLAGS = {
    "on_bad_item", "compile", "config", "data", "deterministic", "device", "eval", "out", "precision", "predict",
    "resume", "seed", "store_size", "workers",
}  # fmt: skip


def number(kind, *, low=None, high=None, above=None):
    """An argparse type: an int or float within bounds, refused with the bounds otherwise."""
    bounds = " ".join(
        f"{sign} {bound}"
        for sign, bound in ((">=", low), (">", above), ("<=", high))
        if bound is not None
    )

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'an integer' if kind is int else 'a number'}"
            ) from None
        inside = (
            (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
        )
        if not inside:  # a NaN is inside no bounds
            raise argparse.ArgumentTypeError(f"received {text}, allowed {bounds}")
        return value

    return convert


# Earlier names of shared flags, and what other projects call them.
ALIASES = {
    "--bad-images": "--on-bad-item",
    "--batch-size": "--bs",
    "--fork": "--force-resume",
    "--learning-rate": "--lr",
    "--lr-scheduler": "--lr-schedule",
    "--output-dir": "--out",
    "--weight-decay": "--wd",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest name, and whose help shows
    every default.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.aliases: dict[str, str] = {}

    def choice(self, group, flag: str, names, default, help: str):
        """Add a flag that takes one of `names`."""
        names = list(names)

        def convert(text: str) -> str:
            if text not in names:
                allowed = ", ".join(names)
                raise argparse.ArgumentTypeError(
                    f"received {text!r}, allowed {allowed}{did_you_mean(text, names)}"
                )
            return text

        group.add_argument(
            flag, type=convert, metavar="{" + ",".join(names) + "}", default=default, help=help
        )

    def number(self, group, flag: str, kind, default, help: str, **bounds):
        """Add a flag that takes an int or a float within `bounds` (low, high: included; above:
        not).
        """
        metavar = "N" if kind is int else "X"
        group.add_argument(
            flag, type=number(kind, **bounds), metavar=metavar, default=default, help=help
        )

    def stage(self, group, name: str, defaults: dict):
        """Add `--NAME-epochs`, `-bs`, `-lr` and `-wd` of a stage that the shared flags do not set."""
        for flag, kind, low in (
            ("epochs", int, 1),
            ("bs", int, 1),
            ("lr", float, 0),
            ("wd", float, 0),
        ):
            self.number(
                group,
                f"--{name}-{flag}",
                kind,
                defaults[flag],
                f"with --stage all: its --{flag}",
                low=low,
            )

    def alias(self, old: str, flag: str) -> None:
        """Let `old` mean `flag` without a place in --help: an earlier name of it, or another
        project's.
        """
        self.aliases[old] = flag

    def parse_known_args(self, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._renamed(token) for token in given], namespace)

    def _renamed(self, token: str) -> str:
        name, equals, value = token.partition("=")
        return self.aliases[name] + equals + value if name in self.aliases else token

    def flags(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            first = unknown.split()[0].split("=")[0]
            message = f"unknown flag {first}{did_you_mean(first, self.flags())}"
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # A flag that is unset by default explains in its own words what happens then.
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def base_parser(script: str, doc: str) -> Parser:
    """The shared flags of a script.

    `script` is the short name (`simclr`), `doc` the script's docstring, which becomes the head of
    `--help`.
    """
    parser = Parser(prog=f"train_{script}.py", description=doc)
    for old, flag in ALIASES.items():
        parser.alias(old, flag)
    data = parser.add_argument_group("data and run directory")
    data.add_argument(
        "--data",
        default="sample",
        help="folder, .zip of one, a file of the task (.packed, .npz, ...), or sample: embedded",
    )
    data.add_argument(
        "--out", help="run directory; unset: runs/SCRIPT/NAME-HASH, a function of the other flags"
    )
    parser.number(data, "--workers", int, min(8, os.cpu_count() or 1), "decoding threads", low=1)
    parser.choice(
        data,
        "--on-bad-item",
        ["error", "skip"],
        "error",
        "a damaged image ends the run, or is left out (at most 1 %% of them) and counted",
    )
    data.add_argument(
        "--config", metavar="FILE", help="TOML or JSON file of flags; the command line wins"
    )

    optim = parser.add_argument_group(
        "optimization (of the first stage, or of the one stage that is named)"
    )
    parser.number(optim, "--epochs", int, None, "passes over the training data", low=1)
    parser.number(
        optim,
        "--bs",
        int,
        None,
        "batch of one optimizer step, over all processes and chunks",
        low=1,
    )
    parser.number(optim, "--accum", int, 1, "chunks that the batch is split into", low=1)
    parser.number(optim, "--lr", float, None, "peak learning rate, used as given", low=0)
    parser.number(
        optim, "--wd", float, None, "weight decay of all but biases and normalization", low=0
    )
    falls = "after the warm-up: falling (in train_raer.py by its table), or not"
    parser.choice(optim, "--lr-schedule", ["cosine", "constant"], "cosine", falls)
    parser.number(
        optim,
        "--warmup-epochs",
        float,
        None,
        "unset: a tenth of the epochs; in train_raer.py none",
        low=0,
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.choice(
        machine,
        "--precision",
        ["auto", "fp32", "bf16", "fp16"],
        "auto",
        "auto: bf16 on a GPU that has it, fp32 elsewhere",
    )
    machine.add_argument(
        "--compile", action="store_true", help="compile the model with torch.compile"
    )
    parser.choice(
        machine, "--impl", ["auto", "triton", "torch"], "auto", "implementation of the kernels"
    )
    parser.number(
        machine, "--seed", int, 0, "of weights, order and augmentation", low=0, high=2**31 - 1
    )
    machine.add_argument(
        "--deterministic", action="store_true", help="bitwise repeatable on a GPU too, at some cost"
    )

    running = parser.add_argument_group("running")
    running.add_argument(
        "--resume",
        default="auto",
        metavar="{auto,none,PATH}",
        help="continue the run directory, start anew, or continue from PATH",
    )
    running.add_argument(
        "--force-resume", action="store_true", help="continue a run although its flags differ"
    )
    parser.number(
        running,
        "--max-steps",
        int,
        None,
        "stop after so many steps; the schedule is unchanged",
        low=1,
    )
    parser.number(running, "--log-every", int, 10, "steps between two lines", low=1)
    parser.number(running, "--eval-every", int, 1, "epochs between two evaluations", low=1)
    parser.number(running, "--save-every", float, 10.0, "minutes between two checkpoints", low=0)
    parser.number(
        running, "--timeout", float, 30.0, "minutes without a step that end the run", above=0
    )
    running.add_argument(
        "--detect-anomaly",
        action="store_true",
        help="end at the first layer that gives a value not finite; slow",
    )
    running.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events")
    running.add_argument(
        "--eval",
        metavar="CHECKPOINT",
        help="evaluate a checkpoint or run on the test split and end",
    )
    running.add_argument(
        "--predict",
        metavar="PATH",
        help="classify the items of PATH with the run named by --resume",
    )
    items = (
        "try the training recipe on a few batches: all of it, or these items (names,"
        " comma-separated); exit code 4"
    )
    running.add_argument(
        "--check", nargs="?", const="all", metavar="ITEMS", help=f"{items} if one fails"
    )
    average = "average what these runs say of the test split"
    running.add_argument("--ensemble", nargs="+", metavar="RUN", help=average)
    running.add_argument(
        "--demo", action="store_true", help="a small run on the embedded data, minutes on two cores"
    )

    tuning = parser.add_argument_group("random search and distillation")
    parser.number(tuning, "--search", int, None, "trials whose settings are drawn at random", low=1)
    parser.number(
        tuning,
        "--trial",
        int,
        None,
        "run this one of them alone, from 0; unset: one after another",
        low=0,
    )
    tuning.add_argument(
        "--ranges", metavar="F=LOW:HIGH,..", help="what is drawn, on log scales; unset: see README"
    )
    tuning.add_argument(
        "--teacher",
        metavar="RUN",
        help="run or checkpoint whose answers are learned beside the labels",
    )
    parser.number(
        tuning, "--teacher-weight", float, 0.5, "share of the teacher in the loss", above=0, high=1
    )
    parser.number(
        tuning, "--teacher-temperature", float, 2.0, "that softens both models' answers", above=0
    )
    return parser


def parse(
    parser: Parser, argv: list[str] | None, demo: dict, ranges: dict | None = None
) -> argparse.Namespace:
    """Parse flags: built-in defaults, then the demo's (with --demo), then --config, then the
    command line.

    `ranges` are those of the script's flags that a trial of --search draws; see `search.declared`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = Parser(add_help=False)
    finder.add_argument("--config")
    finder.add_argument("--demo", action="store_true")
    first, _ = finder.parse_known_args(argv)
    argv = (_config_flags(parser, first.config) if first.config else []) + argv
    if first.demo or "--demo" in argv:
        parser.set_defaults(**demo)
    args = parser.parse_args(argv)
    if args.search is None:
        reject_unused_flags(parser, args, ["trial", "ranges"], "without --search")
    elif args.trial is not None:
        args = parser.parse_args(_trial_flags(parser, args, argv, ranges or {}) + argv)
    if args.detect_anomaly:
        reject_unused_flags(
            parser, args, ["compile"], "with --detect-anomaly, which looks at each layer"
        )
    if args.teacher is None:
        reject_unused_flags(
            parser, args, ["teacher_weight", "teacher_temperature"], "without --teacher"
        )
    return args


def _trial_flags(
    parser: Parser, args: argparse.Namespace, argv: list[str], ranges: dict
) -> list[str]:

    if args.trial >= args.search:
        parser.error(
            f"--trial {args.trial}: the trials of --search {args.search} are 0 to {args.search - 1}"
        )
    if args.resume not in ("auto", "none"):
        parser.error("--resume RUN with --search: a trial continues its own run")
    try:
        return search.flags(parser, args, argv, ranges)
    except InputError as error:
        parser.error(str(error))


def _config_flags(parser: Parser, file: str) -> list[str]:
    # A config file becomes flags in front of the command line: one parser checks both, and the
    # later one wins.
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
        parser.error(
            f"--config {file}: expected a table of flags, received {type(values).__name__}"
        )
    # A run's own config.json names flags by their attributes and has two derived entries.
    flags = {action.dest: action for action in parser._actions if action.option_strings}
    flags |= {
        option.removeprefix("--").replace("-", "_"): action
        for action in flags.values()
        for option in action.option_strings
    }
    argv = []
    for name, value in values.items():
        action = flags.get(name.replace("-", "_"))
        if value is None or name in ("config", "resolved", "identity"):
            continue
        if action is None:
            parser.error(
                f"--config {file}: unknown flag {name!r}{did_you_mean('--' + name, parser.flags())}"
            )
        if (action.nargs == 0) != isinstance(value, bool):
            wanted = "true or false" if action.nargs == 0 else "a value"
            parser.error(f"--config {file}: {name} takes {wanted}, received {value!r}")
        if value is not False:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            argv += (
                [action.option_strings[0]] if value is True else [action.option_strings[0], text]
            )
    return argv


def resume_mode(args: argparse.Namespace, job: str | None) -> str:
    """--resume, but `auto` where Slurm has requeued a job whose command says `none`, and what is
    there is the work of this `job` already: it is not thrown away.
    """
    own = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 and job == os.environ.get(
        "SLURM_JOB_ID"
    )
    return "auto" if args.resume == "none" and own else args.resume


def reject_unused_flags(parser: Parser, args: argparse.Namespace, names, reason: str) -> None:
    """Exit 2 if one of the flags `names` (attribute names) was set although it would change
    nothing.
    """
    flags = {
        action.dest: action.option_strings[0] for action in parser._actions if action.option_strings
    }
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"{flags[name]} has no effect {reason}")


def check_inference_flags(parser: Parser, args: argparse.Namespace, heeded=()) -> None:
    """Exit 2 if --eval, --predict, --ensemble or --stream comes with a flag of training, or without
    the run to use.

    `heeded` are flags of the script (attribute names) that they heed.
    """
    modes = [
        name for name in ("eval", "predict", "stream", "ensemble") if getattr(args, name, None)
    ]
    if not modes:
        return
    mode = f"--{modes[0]}"
    if len(modes) > 1:
        parser.error(f"{mode} and --{modes[1]} exclude each other")
    reject_unused_flags(
        parser,
        args,
        sorted(vars(args).keys() - INFERENCE_FLAGS - {*heeded, *modes}),
        f"with {mode}",
    )
    if args.eval or args.ensemble:
        reject_unused_flags(parser, args, ["resume"], f"with {mode}, which names its checkpoint")
        return
    if args.resume in ("auto", "none"):
        parser.error(f"{mode} needs the trained run: add --resume RUN")
    reject_unused_flags(parser, args, ["data"], f"with {mode}, which names what it reads")


def run_id(parser: Parser, args: argparse.Namespace, **facts) -> dict:
    """The settings that decide a run's result: flags that differ from their built-in default, and
    given `facts`.

    Flags at their default stay out, so that a flag added later does not give old runs another name.
    """
    changed = {
        name: value
        for name, value in vars(args).items()
        if name not in NOT_IN_RUN_ID and value != parser.get_default(name)
    }
    return {"demo": args.demo, **changed, **facts}


def digest(value) -> str:
    """Eight hexadecimal digits that name a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class StageConfig:
    """The resolved settings of one stage; `bs` counts items over all processes and chunks."""

    name: str
    epochs: int
    bs: int
    lr: float
    wd: float
    optimizer: str
    warmup_epochs: float
    min_lr: float = 0.0

    def describe(self, items: str, steps_per_epoch: int) -> str:
        """One line: how much data in how many steps, and how they are taken."""
        return (
            f"{self.name}: {items}, {steps_per_epoch} steps of {self.bs} an epoch, {self.epochs}"
            " epochs at most,"
            f" {self.optimizer}, lr {self.lr:.3g}"
        )


def stage_config(args, name: str, defaults: dict, *, first: bool, lr_of) -> StageConfig:
    """Settings of a stage: from the shared flags if it is the first or only one, else from
    `--NAME-epochs` and so on.

    What is unset comes from `defaults`; a learning rate of None there is `lr_of(bs)`.
    """
    given = {
        flag: getattr(args, flag if first else f"{name}_{flag}")
        for flag in ("epochs", "bs", "lr", "wd")
    }
    values = defaults | {flag: value for flag, value in given.items() if value is not None}
    if values["lr"] is None:
        values["lr"] = lr_of(values["bs"])
    if first and args.warmup_epochs is not None:
        values["warmup_epochs"] = args.warmup_epochs
    else:
        values["warmup_epochs"] = defaults.get("warmup_epochs", values["epochs"] / 10)
    if values.get("min_lr", 0.0) > values["lr"]:
        raise InputError(
            f"--min-lr {values['min_lr']:g} is more than the learning rate {values['lr']:g}"
        )
    if values["warmup_epochs"] > values["epochs"]:
        raise InputError(
            f"--warmup-epochs {values['warmup_epochs']:g} is more than the"
            f" {values['epochs']} epochs"
        )
    return StageConfig(name, **values)
