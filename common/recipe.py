"""What stands for the flags of a pretraining that are unset: the paper's recipe, or the data's."""

import argparse
import math

import torch

from common import amp
from common.errors import plural

PAPER = "lars"
# What --recipe auto takes instead of the paper's optimizer in fewer than SHORT steps of a batch
# smaller than the paper's smallest: LARS learns less in them.
AUTO = {"optimizer": "adamw", "lr": 3e-3}
SHORT = 1000
SMALL = 256
# What a CPU that has bf16 trains faster in it: 1.3 to 2 times, at inputs of 32 px and more. With
# depthwise convolutions it takes twice as long.
_BF16_ON_CPU = ("resnet18", "resnet18_narrow", "resnet34", "resnet50", "resnet101", "convnext_tiny")
_BF16_FROM = 32


def lars_lr(bs: int) -> float:
    """SimCLR's rule, appendix B.1."""
    return 0.075 * math.sqrt(bs)


def sgd_lr(bs: int) -> float:
    """SimSiam's rule, arXiv:2011.10566."""
    return 0.05 * bs / 256


def adamw_lr(bs: int) -> float:
    """The same rate for every batch."""
    return 1e-3


LR_OF = {"lars": lars_lr, "sgd": sgd_lr, "adamw": adamw_lr}


def is_paper(args) -> bool:
    """Whether the flags ask for the cytology experiment, whose recipe is the paper's."""
    return args.protocol == "cytology" or args.grid_index is not None


def follow(args, steps: int, bs: int, earlier: dict) -> tuple[argparse.Namespace, list[str]]:
    """The flags with what --recipe auto sets of them, and a line that says so.

    The paper's optimizer stands there as None, given or not: that is no part of a run's identity.

    Args:
        steps, bs: of the pretraining; 0 steps: there is none.
        earlier: the flags of the run that goes on, which keeps its recipe; empty: a new one.
    """
    if args.optimizer == PAPER:
        return argparse.Namespace(**vars(args) | {"optimizer": None}), []
    is_given = args.optimizer is not None or args.lr is not None
    if args.recipe == "paper" or is_paper(args) or args.search or is_given or not steps:
        return args, []
    if earlier:
        takes = all(earlier.get(name) == value for name, value in AUTO.items())
    else:
        takes = steps < SHORT and bs < SMALL
    if not takes:
        return args, []
    note = (
        f"recipe auto: {AUTO['optimizer']} at {AUTO['lr']:g}, which learns more than {PAPER} in"
        f" {plural(steps, 'step')} of {bs} (--recipe paper takes that)"
    )
    return argparse.Namespace(**vars(args) | AUTO), [note]


def fit_batches(
    args, stages: dict, defaults: dict[str, dict], counts: dict[str, int], divisors: dict[str, int]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags with a batch for each labeled stage of fewer items than its default, and the lines
    that say so.

    Args:
        stages: the settings of those to run; `defaults` what of these no flag sets.
        counts: the items that each trains on.
        divisors: what its batch is divided by.
    """
    fitted = {}
    notes = []
    for name, stage in stages.items():
        is_set = name == "pretrain" or stage.bs != defaults[name]["bs"]
        if is_set or stage.optimizer == "lbfgs" or stage.bs <= counts[name]:
            continue
        flag = "bs" if name == next(iter(stages)) else f"{name}_bs"
        parts = divisors[name]
        fitted[flag] = max(counts[name] // parts, 1) * parts
        notes.append(
            f"{name}: {plural(counts[name], 'training image')}, fewer than a batch of {stage.bs}:"
            f" --{flag.replace('_', '-')} is {fitted[flag]}"
        )
    return argparse.Namespace(**vars(args) | fitted), notes


def with_precision(args, device: torch.device, spec: dict, earlier: dict) -> argparse.Namespace:
    """The flags with bf16 for `--precision auto` on a CPU that is faster with it.

    Args:
        spec: the model's `backbone` and `image_size`.
        earlier: the flags of the run that goes on: it keeps its number format on another CPU.
    """
    if args.precision != "auto" or device.type != "cpu":
        return args
    takes = (
        spec["backbone"] in _BF16_ON_CPU and spec["image_size"] >= _BF16_FROM and amp.cpu_has_bf16()
    )
    if earlier:
        takes = earlier.get("precision") == "bf16"
    return argparse.Namespace(**vars(args) | ({"precision": "bf16"} if takes else {}))
