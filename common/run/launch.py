"""The frame of every script's `main`: one run, or the runs of --search and --ensemble."""

import argparse
import contextlib
import os
import random
import shlex
import sys
from collections.abc import Callable

import numpy as np
import torch

from common import amp, config, reading, search
from common.errors import (
    AGAIN,
    EXIT_DIVERGED,
    EXIT_STOPPED,
    Finished,
    InputError,
    Stopped,
    exit_codes,
    plural,
    say,
)
from common.retry import io_retry
from common.run import dist, ending, ensemble
from common.run.files import run_locks
from common.run.inference import is_inference
from common.run.run import Run, watchdog
from common.run.signals import Interrupted, Signals


def run_sweep(main, parser, argv: list[str] | None, args, ranges, metric: str | None) -> bool:
    """Call a script's `main` for every run of --search without --trial, or of --ensemble.

    Args:
        ranges: the script's, as `config.parse` takes them.
        metric: of `ensemble.scores`, by which an ensemble is compared with its members.

    Returns:
        Whether the flags ask for either; if not, nothing is done.
    """
    if args.search and args.trial is None:
        every(main, parser, argv, args, ranges)
    elif args.ensemble:
        ensemble.judge(main, argv, args, metric)
    else:
        return False
    return True


def launch(parser, args, run_inference: Callable, run_training: Callable) -> int:
    """Do what the flags ask for, with the signals caught and the ranks joined.

    Args:
        parser: the script's; it knows which flags have an effect.
        run_inference: takes (args, world); called with --eval, --predict or --stream.
        run_training: takes (parser, args, world, signals); called without them.

    Returns:
        0; the other exit codes leave as SystemExit.
    """
    reading.limit_items(args.max_item_mb)
    is_script = run_training.__module__ == "__main__"
    with (
        exit_codes(),
        Signals(ends_with=is_script) as signals,
        run_locks,
        io_retry(args.io_retry, lambda: signals.asked),
    ):
        device = torch.device("cpu")
        try:
            with signals.at_once():
                # The watchdog, which is to come first, names more than a collective does.
                world = dist.init(args.device, max(1800, 120 * args.timeout), 60 * args.timeout)
                device = world.device
                seed_process(args)
                if args.precision == "bf16" and device.type == "cuda" and not amp.has_bf16(device):
                    world.say(
                        "WARN --precision bf16: this GPU only emulates bf16, which is slow; auto"
                        " takes fp16"
                    )

                def heartbeat():
                    # In a session a step is what is waited for.
                    waiting = None if signals.deferred else reading.oldest_pending()
                    return waiting or object()

                def stalled() -> str:
                    _, name = reading.oldest_pending() or (None, "a file")
                    return (
                        f"{world.where}{name} is not read in {args.timeout:g} minutes (--timeout)"
                    )

                with watchdog(args.timeout, heartbeat, stalled):
                    if is_inference(args):
                        run_inference(args, world)
                    else:
                        with contextlib.suppress(Finished):
                            run_training(parser, args, world, signals)
        except Stopped:
            raise
        except Interrupted as interruption:
            signals.obeyed.set()
            raise Signals.leave_early(signals.asked, str(interruption)) from None
        except (MemoryError, OSError, RuntimeError) as error:
            full = amp.out_of_memory(error, device)
            if full:
                raise InputError(f"{full}; {_memory_savers(parser, args)}. {AGAIN}") from None
            if not (isinstance(error, RuntimeError) and dist.peer_lost(error)):
                raise
            raise Stopped(dist.lost_peer(error), EXIT_STOPPED) from None
        dist.close()
    return 0


def _memory_savers(parser, args) -> str:
    # Of the flags that this command heeds.
    texts = {
        "accum": "a higher --accum",
        "bs": "a lower --bs",
        "checkpoint_blocks": "--checkpoint-blocks",
        "image_size": "a smaller --image-size",
    }
    heeded = vars(args).keys() - parser.without_effect
    helps = [texts[name] for name in texts if name in heeded and getattr(args, name) is not True]
    return f"what helps: {', '.join(helps or ['a device with more memory, --device cpu'])}"


def seed_process(args) -> None:
    """Settings of the process: seeds, and repeatable kernels where --deterministic asks for them.

    Raises:
        InputError: there is nothing at the path that --resume names.
    """
    if args.resume not in ("auto", "none"):
        try:
            os.stat(args.resume)
        except OSError as error:
            raise InputError(
                f"--resume {args.resume}: {error.strerror.lower()}; give a run directory or one of"
                " its checkpoints, or leave --resume out"
            ) from None
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        # cuBLAS is repeatable only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def every(main, parser, argv: list[str] | None, args, ranges: dict) -> None:
    """Run all trials of --search through a script's `main`, then say which is the best.

    Those that have finished are not repeated, those that diverge are left.

    Raises:
        InputError: --max-steps would end the search with its first trial.
        SystemExit: a trial ended otherwise: it was stopped, or cannot run at all.
    """
    if args.max_steps:
        raise InputError(
            "--search: --max-steps would end it with the first trial; give --epochs, or --trial"
        )
    argv = list(sys.argv[1:] if argv is None else argv)
    is_main = dist.launched_first()
    words = config.expanded(parser, argv)
    diverged = []
    trials = []
    for number in range(args.search):
        if is_main:
            print(f"trial {number} of {args.search}", flush=True)
        Run.latest = None
        try:
            main([*argv, "--trial", str(number)])
        except SystemExit as ending_of_trial:
            if ending_of_trial.code != EXIT_DIVERGED:
                raise
            diverged.append(str(number))
        numbered = argparse.Namespace(**vars(args) | {"trial": number})
        trials.append((number, search.flags(parser, numbered, words, ranges), Run.latest))
    if not is_main:
        return
    names = ",".join(["trial", *search.drawn_ranges(ranges, args)])
    left = f"; diverged: {', '.join(diverged)}" if diverged else ""
    # Not search=N: trials that had finished before the search grew keep its earlier number.
    runs = shlex.quote(args.out) if args.out else "runs --where trial=any"
    table = f"python -m common.report {runs} --rows {names} --value best_value --compact"
    say(f"{plural(args.search, 'trial')}{left}. The table again: {table}")
    dropped = dict.fromkeys(("--config", "--out", "--ranges", "--resume", "--search"), 1)
    say(*ending.search_lines(trials, config.without(words, dropped)))
