"""Flags that the four scripts share: their help, errors of one line, and config files.

A flag is declared once, here or in the one script that owns it; its default stands there and
nowhere else. `args` is never changed after parsing: derived values get names of their own.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common import reading, search
from common.errors import EXIT_BAD_INPUT, InputError, did_you_mean, plural, say

# What may differ between two commands that mean the same run. The data set enters the identity by
# its listing (`fingerprint`), so that a copy on a node's local disk continues the same run; its
# bytes are watched by `common.run.content`.
NOT_IN_RUN_ID = {
    "check", "compile", "config", "data", "demo", "detect_anomaly", "deterministic", "device",
    "eval", "force_resume", "from_run", "impl", "io_retry", "log_every", "max_item_mb", "max_steps",
    "out", "predict", "profile", "ranges", "recipe", "resume", "save_every", "search", "teacher",
    "tensorboard", "timeout", "trial", "workers",
}  # fmt: skip

# What --eval, --predict and --ensemble heed.
INFERENCE_FLAGS = {
    "on_bad_item", "compile", "config", "data", "deterministic", "device", "eval", "io_retry",
    "max_item_mb", "out", "precision", "predict", "resume", "seed", "store_size", "timeout",
    "workers",
}  # fmt: skip

# Earlier names of shared flags, and what other projects call them: accepted without being shown.
ALIASES = {
    "--bad-images": "--on-bad-item",
    "--batch-size": "--bs",
    "--fork": "--force-resume",
    "--learning-rate": "--lr",
    "--lr-scheduler": "--lr-schedule",
    "--output-dir": "--out",
    "--weight-decay": "--wd",
}

# What timm, lightly, nanoGPT, torchvision's references and PyTorch Lightning call a flag: refused,
# because its values may mean something else there, with the name that it has here.
NAMES_ELSEWHERE = {
    "--accumulate-grad-batches": "--accum",
    "--amp": "--precision",
    "--arch": "--backbone",
    "--checkpoint": "--resume PATH, or --eval CHECKPOINT",
    "--clip-grad-norm": "--clip-grad",
    "--data-dir": "--data",
    "--data-path": "--data",
    "--devices": "--device; torchrun starts one process for each GPU",
    "--dtype": "--precision",
    "--eval-interval": "--eval-every",
    "--fp16": "--precision fp16",
    "--gpus": "--device; torchrun starts one process for each GPU",
    "--grad-clip": "--clip-grad",
    "--gradient-accumulation-steps": "--accum",
    "--gradient-clip-val": "--clip-grad",
    "--img-size": "--image-size",
    "--log-interval": "--log-every",
    "--max-epochs": "--epochs",
    "--max-grad-norm": "--clip-grad",
    "--max-iters": "--max-steps",
    "--model": "--backbone",
    "--num-workers": "--workers",
    "--opt": "--optimizer",
    "--output": "--out",
    "--pretrained": "--weights FILE",
    "--print-freq": "--log-every",
    "--test-only": "--eval CHECKPOINT",
    "--warmup-steps": "--warmup-epochs",
}
NO_FLAG = {
    "--momentum": "momentum is fixed for each optimizer",
    "--num-classes": "the classes are counted in the data",
}

# The settings that each stage has a flag for: kind and least value.
STAGE_FLAGS = {"epochs": (int, 1), "bs": (int, 1), "lr": (float, 0), "wd": (float, 0)}


def number(kind, *, low=None, high=None, above=None):
    """An argparse type: an int or float within bounds, refused with the bounds otherwise."""
    bounds = " ".join(
        f"{sign} {bound}"
        for sign, bound in ((">=", low), (">", above), ("<=", high))
        if bound is not None
    )
    kind_name = "an integer" if kind is int else "a number"

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind_name}") from None
        inside = (
            (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
        )
        if not inside:  # a NaN is inside no bounds
            raise argparse.ArgumentTypeError(f"received {text}, allowed {bounds}")
        return value

    return convert


def group_pattern(text: str) -> str:
    """An argparse type: a regular expression with a group in parentheses."""
    try:
        if re.compile(text).groups:
            return text
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no regular expression: {error}") from None
    raise argparse.ArgumentTypeError(
        f"'{text}' has no group: put what names it in parentheses, as '(patient\\d+)'"
    )


def default_text(values: dict[str, object]) -> str:
    """Help for a default that depends on the stage or the mode.

    It shows the first of `values`, then each other one after its name: ` (default: 100; linear 100;
    finetune 50)`. One value stands for all if they are equal.
    """
    texts = {name: str(value) for name, value in values.items()}
    first, *others = texts
    if set(texts.values()) == {texts[first]}:
        others = []
    parts = [texts[first], *(f"{name} {texts[name]}" for name in others)]
    return f" (default: {'; '.join(parts)})"


class _Flags:
    """What a parser and its groups share: short ways to add a flag."""

    def choice(self, flag: str, names, default, help: str) -> None:
        """Add a flag that takes one of `names`."""
        names = list(names)

        def convert(text: str) -> str:
            if text not in names:
                allowed = ", ".join(names)
                hint = did_you_mean(text, names)
                raise argparse.ArgumentTypeError(f"received {text!r}, allowed {allowed}{hint}")
            return text

        metavar = "{" + ",".join(names) + "}"
        self.add_argument(flag, type=convert, metavar=metavar, default=default, help=help)

    def number(self, flag: str, kind, default, help: str, **bounds) -> None:
        """Add a flag that takes an int or a float within `bounds` (`low`, `high`, `above`)."""
        self.add_argument(
            flag,
            type=number(kind, **bounds),
            metavar="N" if kind is int else "X",
            default=default,
            help=help,
        )

    def switch(self, flag: str, help: str) -> None:
        """Add a flag that takes no value."""
        self.add_argument(flag, action="store_true", help=help)

    def stage(self, name: str, defaults: dict) -> None:
        """Add the flags (`--NAME-epochs`, ...) of a stage that the shared flags do not set."""
        for flag, (kind, low) in STAGE_FLAGS.items():
            text = f"--{flag} of the {name} stage, with --stage all"
            self.number(f"--{name}-{flag}", kind, defaults[flag], text, low=low)


class _Group(_Flags, argparse._ArgumentGroup):
    """A titled group of flags."""


class Parser(_Flags, argparse.ArgumentParser):
    """An argument parser whose errors are one line and whose help shows every default.

    Attributes:
        aliases: other spellings of flags, accepted on the command line and in --config, without a
            place in --help.
        without_effect: flags (attribute names) that the others on the command line leave without
            one.
        note: the end of every error.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        self.aliases: dict[str, str] = {}
        self.without_effect: set[str] = set()
        self.note = ""

    def add_argument_group(self, *args, **kwargs) -> _Group:
        group = _Group(self, *args, **kwargs)
        self._action_groups.append(group)
        return group

    def set_help(self, **texts: str) -> None:
        """Replace the help of flags (attribute names), as `set_defaults` replaces defaults."""
        for action in self._actions:
            action.help = texts.get(action.dest, action.help)

    def evaluate_several(self) -> None:
        """Let --data take several values, with --eval alone."""
        action = next(action for action in self._actions if action.dest == "data")
        action.nargs = "+"

    def hide(self, *names: str) -> None:
        """Leave shared flags (attribute names) that the script refuses out of --help."""
        self.set_help(**dict.fromkeys(names, argparse.SUPPRESS))

    def checked(self, values: dict, source: str) -> dict:
        """Stored values of flags (attribute names), as the flags themselves would take them.

        None stays: the flag was not given.
        """
        actions = {action.dest: action for action in self._actions}
        taken = {}
        for name, value in values.items():
            try:
                taken[name] = value
                if value is not None:
                    taken[name] = self._get_value(actions[name], str(value))
            except argparse.ArgumentError as error:
                self.error(f"{source}: {error}")
        return taken

    def _get_values(self, action, arg_strings: list[str]):
        # Taken as none given it would start from random weights, or train where --eval is meant.
        if "" in arg_strings:
            raise argparse.ArgumentError(
                action,
                "received an empty value, as of an unset variable; give one, or leave it out",
            )
        return super()._get_values(action, arg_strings)

    def parse_known_args(self, args=None, namespace=None):
        # Before a program prints its first line: what the console has no sign for must not end it.
        if isinstance(sys.stdout, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # its reader has gone, or it is a pipe now
                sys.stdout.reconfigure(errors="backslashreplace")
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(self.without_aliases(given), namespace)

    def without_aliases(self, argv: list[str]) -> list[str]:
        """`argv` with every alias replaced by the flag that it means."""
        renamed = []
        for token in argv:
            name, equals, value = token.partition("=")
            renamed.append(self.aliases.get(name, name) + equals + value)
        return renamed

    def flags(self) -> list[str]:
        return [option for option in self._option_string_actions if option.startswith("--")]

    def hint(self, flag: str) -> str:
        """What to write instead of an unknown flag, as the end of an error message."""
        name = flag.replace("_", "-")
        if name in NO_FLAG:
            return f"; {NO_FLAG[name]}"
        elsewhere = {
            other: ours
            for other, ours in (NAMES_ELSEWHERE | self.aliases).items()
            if re.match("[-a-z]+", ours)[0] in self.flags()
        }
        if name in elsewhere:
            return f"; here it is {elsewhere[name]}"
        shown = (a for a in self._actions if a.help != argparse.SUPPRESS)
        options = [option for action in shown for option in action.option_strings]
        names = options + [other for other, ours in elsewhere.items() if ours in options]
        near = difflib.get_close_matches(name, names, n=1)
        return f"; did you mean {elsewhere.get(near[0], near[0])}?" if near else ""

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            first = unknown.split()[0].split("=")[0]
            message = f"unknown flag {first}{self.hint(first)}"
        say(f"error: {message}{self.note} (see --help)", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        # A flag that is unset by default explains in its own words what happens then. A default of
        # 0 is one that must be shown.
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def base_parser(
    script: str,
    doc: str,
    stages: dict[str, dict] | None = None,
    *,
    least_epochs: int = 1,
    **rules: str,
) -> Parser:
    """The shared flags of a script.

    Args:
        script: the short name (`simclr`).
        doc: the script's docstring, which becomes the head of `--help`.
        stages: default settings by the name of the stage, or of the mode, that they hold in, as
            `stage_config` takes them; shown in `--help`.
        least_epochs: the lowest value of --epochs.
        rules: what `--help` says where such a setting is None, by the setting's name.
    """
    rules = {"warmup_epochs": "a tenth of the epochs"} | rules  # as in `stage_config`

    def default_of(setting: str) -> str:
        if stages is None:
            return ""
        values = {}
        for name, settings in stages.items():
            value = settings.get(setting)
            values[name] = rules[setting] if value is None else value
        return default_text(values)

    usage = f"python train_{script}.py [flags]"
    parser = Parser(prog=f"train_{script}.py", usage=usage, description=doc)
    parser.aliases.update(ALIASES)

    data = parser.add_argument_group("data and run directory")
    data.add_argument(
        "--data",
        default="sample",
        help="what to read: a folder, a .zip of one, a file of the task's own kind, or `sample`,"
        " the embedded data",
    )
    data.add_argument(
        "--group-by",
        type=group_pattern,
        metavar="REGEX",
        help="items whose names have the same text in the first group of REGEX stay on one side of"
        " every split, as '(patient\\d+)'; unset: by a column `group`, where a table has one",
    )
    data.add_argument(
        "--out",
        help=f"run directory (default: runs/{script}/NAME-HASH, the hash of the settings)",
    )
    reading_flags(data)
    data.add_argument(
        "--config", metavar="FILE", help="TOML or JSON file of flags; the command line wins"
    )

    optim = parser.add_argument_group("optimization (of the first stage that runs)")
    epochs_help = f"passes over the training data{default_of('epochs')}"
    optim.number("--epochs", int, None, epochs_help, low=least_epochs)
    optim.number(
        "--bs",
        int,
        None,
        f"batch of one optimizer step, over all processes and chunks{default_of('bs')}",
        low=1,
    )
    optim.number("--accum", int, 1, "chunks that a batch is split into, to save memory", low=1)
    optim.number("--lr", float, None, f"peak learning rate, used as given{default_of('lr')}", low=0)
    optim.number(
        "--wd",
        float,
        None,
        f"weight decay of all parameters but biases and normalization{default_of('wd')}",
        low=0,
    )
    optim.number(
        "--clip-grad",
        float,
        None,
        "largest L2 norm of the gradient of all parameters, in every stage; unset: no limit",
        above=0,
    )
    optim.choice(
        "--lr-schedule",
        ["cosine", "constant"],
        "cosine",
        "learning rate after the warm-up: falls along a cosine, or stays the same",
    )
    optim.number(
        "--warmup-epochs",
        float,
        None,
        f"epochs in which the learning rate rises to its peak{default_of('warmup_epochs')}",
        low=0,
    )

    machine = parser.add_argument_group("machine")
    device_flags(machine)
    machine.switch("--compile", "compile the model with torch.compile")
    machine.choice(
        "--impl",
        ["auto", "triton", "torch"],
        "auto",
        "implementation of the kernels; auto: Triton on a GPU, PyTorch elsewhere",
    )
    machine.number(
        "--seed", int, 0, "seed of weights, order and augmentation", low=0, high=2**31 - 1
    )
    machine.switch("--deterministic", "make runs bitwise repeatable on a GPU too, at some cost")

    running = parser.add_argument_group("running")
    running.add_argument(
        "--resume",
        default="auto",
        metavar="{auto,none,PATH}",
        help="continue the run directory, start anew, or continue the run or checkpoint PATH, whose"
        " flags stand where none is given",
    )
    running.switch("--force-resume", "continue a run although its flags differ")
    running.number(
        "--max-steps", int, None, "stop after so many steps; the schedule is unchanged", low=1
    )
    running.number("--log-every", int, 10, "steps between two lines on the console", low=1)
    running.number("--eval-every", int, 1, "epochs between two evaluations", low=1)
    running.number("--save-every", float, 10.0, "minutes between two checkpoints", low=0)
    running.number(
        "--timeout",
        float,
        30.0,
        "minutes without a step, or waiting for one read, after which the run is ended",
        above=0,
    )
    running.number(
        "--io-retry",
        float,
        2.0,
        "minutes in which reading and writing is tried again where a file system is gone",
        low=0,
    )
    running.switch("--detect-anomaly", "stop at the first layer whose output is not finite; slow")
    running.switch("--tensorboard", "write TensorBoard events too")
    running.add_argument(
        "--eval",
        metavar="CHECKPOINT",
        help="evaluate a run or checkpoint on the test split of its data, or of --data, then stop",
    )
    running.add_argument(
        "--predict",
        nargs="+",
        metavar="PATH",
        help="classify the items of these files or folders with the run that --resume names",
    )
    running.add_argument(
        "--check",
        nargs="?",
        const="all",
        metavar="ITEMS",
        help="try the training recipe on a few batches: all checks, or the named ones"
        " (comma-separated); exit code 4 if one fails",
    )
    running.add_argument(
        "--ensemble",
        nargs="+",
        metavar="RUN",
        help="average the predictions of these runs on the test split",
    )
    running.switch("--demo", "a small run on the embedded data: minutes on two CPU cores")

    tuning = parser.add_argument_group("random search and distillation")
    tuning.number("--search", int, None, "run N trials whose settings are drawn at random", low=1)
    tuning.number(
        "--trial",
        int,
        None,
        "run only trial N of --search, counted from 0; unset: all, one after another",
        low=0,
    )
    tuning.add_argument(
        "--ranges",
        metavar="FLAG=LOW:HIGH,..",
        help="what --search draws, on a log scale, as lr=1e-4:1e-2; unset: see docs/check.md",
    )
    tuning.add_argument(
        "--teacher",
        metavar="RUN",
        help="run or checkpoint whose predictions are learned beside the labels",
    )
    tuning.number(
        "--teacher-weight", float, 0.5, "share of the teacher's term in the loss", above=0, high=1
    )
    tuning.number(
        "--teacher-temperature",
        float,
        2.0,
        "temperature that softens the predictions of both models",
        above=0,
    )
    return parser


def device_flags(group: _Group | Parser) -> None:
    """Add the flags of every program that runs a network."""
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N or mps; auto takes a GPU where there is one",
    )
    group.choice(
        "--precision",
        ["auto", "fp32", "bf16", "fp16"],
        "auto",
        "number format of the forward pass; auto: bf16 on a GPU that has it, fp16 on an older"
        " one, fp32 elsewhere",
    )


def reading_flags(group: _Group | Parser) -> None:
    """Add the flags of every program that decodes images."""
    threads = "threads that decode images; unset: as many as there are cores, at most 8"
    group.number("--workers", int, min(8, os.cpu_count() or 1), threads, low=1)
    group.choice(
        "--on-bad-item",
        ["error", "skip"],
        "error",
        "what a damaged image does: end the run, or be left out and counted (at most 1 %% of them)",
    )
    group.number(
        "--max-item-mb",
        float,
        reading.DEFAULT_MB,
        "memory that reading one item may take, MB: a file or an image that declares more is"
        " refused",
        above=0,
        high=2**20,
    )


def parse(
    parser: Parser, argv: list[str] | None, demo: dict, ranges: dict | None = None
) -> argparse.Namespace:
    """Parse flags: built-in defaults, then --demo's, then --config, then the command line.

    `ranges` are those of the script's flags that a trial of --search draws; see
    `search.drawn_ranges`.
    """
    argv = expanded(parser, argv)
    if "--demo" in argv:
        parser.set_defaults(**demo)
    args = parser.parse_args(argv)
    if args.eval:  # without --data the run's own, see `load_run`
        parser.set_defaults(data=None)
        args = parser.parse_args(argv)
    if args.search is None:
        reject_unused_flags(parser, args, ["trial", "ranges"], "without --search")
    elif args.trial is not None:
        args = parser.parse_args(_trial_flags(parser, args, argv, ranges or {}) + argv)
    if isinstance(args.data, list):
        if len(args.data) > 1 and not args.eval:
            parser.error(f"--data takes several values with --eval alone: {' '.join(args.data)}")
        args.data = args.data[0] if len(args.data) == 1 else args.data
    if args.detect_anomaly:
        reject_unused_flags(
            parser, args, ["compile"], "with --detect-anomaly, which looks at each layer"
        )
    if args.teacher is None:
        reject_unused_flags(
            parser, args, ["teacher_weight", "teacher_temperature"], "without --teacher"
        )
    return args


def expanded(parser: Parser, argv: list[str] | None) -> list[str]:
    """The words of a command line without aliases, behind the flags of its --config."""
    argv = parser.without_aliases(sys.argv[1:] if argv is None else argv)
    finder = Parser(add_help=False)
    finder.add_argument("--config")
    first, _ = finder.parse_known_args(argv)
    return (_config_words(parser, first.config) if first.config else []) + argv


def without(argv: list[str], counts: dict[str, int]) -> list[str]:
    """`argv` but for the flags in `counts`, each with so many values."""
    kept = []
    skip = 0
    for token in argv:
        name, equals, _ = token.partition("=")
        if name in counts:
            skip = 1 if equals else 1 + counts[name]
        if skip:
            skip -= 1
        else:
            kept.append(token)
    return kept


def _trial_flags(
    parser: Parser, args: argparse.Namespace, argv: list[str], ranges: dict
) -> list[str]:
    if args.trial >= args.search:
        parser.error(
            f"--trial received {args.trial}, allowed 0 to {args.search - 1}:"
            f" --search {args.search} has {plural(args.search, 'trial')}"
        )
    if args.resume not in ("auto", "none"):
        parser.error("--resume RUN with --search: a trial continues its own run")
    try:
        return search.flags(parser, args, argv, ranges)
    except InputError as error:
        parser.error(str(error))


def _config_words(parser: Parser, file: str) -> list[str]:
    path = Path(file)
    if path.suffix not in (".toml", ".json"):
        parser.error(f"--config {file}: allowed are .toml and .json")
    try:
        values = reading.read_settings(path)
    except ValueError as error:
        parser.error(f"--config {file}: {error}")
    if not isinstance(values, dict):
        parser.error(
            f"--config {file}: expected a table of flags, received {type(values).__name__}"
        )
    return words(parser, values, f"--config {file}")


def words(parser: Parser, values: dict, source: str) -> list[str]:
    """Stored values of flags as words to put in front of a command line: one parser checks both,
    and the later one wins.

    A run's own config.json names flags by their attributes and has further entries.
    """
    actions = {}
    for action in parser._actions:
        for option in action.option_strings:
            actions[action.dest] = action
            actions[_attribute(option)] = action
    for old, flag in parser.aliases.items():
        actions[_attribute(old)] = actions[_attribute(flag)]
    argv = []
    for name, value in values.items():
        if value is None or name in ("config", "format", "card", "resolved", "identity"):
            continue
        action = actions.get(_attribute(name))
        if action is None:
            hint = parser.hint("--" + name.replace("_", "-"))
            parser.error(f"{source}: unknown flag {name!r}{hint}")
        if (action.nargs == 0) != isinstance(value, bool):
            wanted = "true or false" if action.nargs == 0 else "a value"
            parser.error(f"{source}: {name} takes {wanted}, received {value!r}")
        if value is False:
            continue
        argv.append(action.option_strings[0])
        if value is True:
            continue
        several = action.nargs == "+" and isinstance(value, list)
        given = [_word([item]) for item in value] if several else [_word(value)]
        if None in given:
            parser.error(f"{source}: {name} has a value that no flag takes")
        argv += given
    return argv


def _word(value) -> str | None:
    # None for a table, a list of lists and the like, and for what no command line can hold.
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str | int | float) for item in items):
        return None
    try:
        text = ",".join(map(str, items))
    except ValueError:  # a number of thousands of digits
        return None
    return None if "\0" in text else text


def _attribute(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def resume_mode(args: argparse.Namespace, job: str | None) -> str:
    """--resume, but `auto` where Slurm has requeued a job whose command says `none`, and what is
    there is the work of this `job` already: it is not thrown away.
    """
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    same_job = job == os.environ.get("SLURM_JOB_ID")
    return "auto" if args.resume == "none" and requeued and same_job else args.resume


def reject_unused_flags(parser: Parser, args: argparse.Namespace, names, reason: str) -> None:
    """Exit 2 if one of the flags `names` (attribute names) is set but would change nothing."""
    parser.without_effect.update(names)
    flags = {
        action.dest: action.option_strings[0] for action in parser._actions if action.option_strings
    }
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"{flags[name]} has no effect {reason}")


def check_inference_flags(parser: Parser, args: argparse.Namespace, heeded=()) -> None:
    """Exit 2 if --eval, --predict, --ensemble or --stream comes with a flag of training, or
    without the run to use.

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
    unheeded = sorted(vars(args).keys() - INFERENCE_FLAGS - {*heeded, *modes})
    reject_unused_flags(parser, args, unheeded, f"with {mode}")
    if args.eval or args.ensemble:
        reject_unused_flags(parser, args, ["resume"], f"with {mode}, which names its checkpoint")
        return
    if args.resume in ("auto", "none"):
        parser.error(f"{mode} needs the trained run: add --resume RUN")
    reject_unused_flags(parser, args, ["data"], f"with {mode}, which names what it reads")


def run_id(parser: Parser, args: argparse.Namespace, **facts) -> dict:
    """The settings that decide a run's result: flags that differ from their default, and `facts`.

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
            f"{self.name}: {items}, {plural(steps_per_epoch, 'step')} of {self.bs} an epoch,"
            f" {plural(self.epochs, 'epoch')} at most, {self.optimizer}, lr {self.lr:.3g}"
        )


def stage_config(args, name: str, defaults: dict, *, first: bool, lr_of) -> StageConfig:
    """Settings of a stage: from the shared flags if it is the first or only one, else from its own.

    Those are `--NAME-epochs` and so on. What is unset comes from `defaults`; a learning rate of
    None there is `lr_of(bs)`.
    """
    given = {flag: getattr(args, flag if first else f"{name}_{flag}") for flag in STAGE_FLAGS}
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
            f" {plural(values['epochs'], 'epoch')}"
        )
    return StageConfig(name, **values)
