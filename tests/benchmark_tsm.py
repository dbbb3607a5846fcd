"""What the temporal shift costs in a training step: python -m tests.benchmark_tsm [FLAGS OF
train_tsm.py]

The same step of train_tsm.py is timed without the shift, with it at both places, and with the
authors' eager form in its place: by turns, so that a busy machine slows all of them alike. Medians,
and the median of each turn's ratio to no shift.
"""

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train_tsm
from common import optim
from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.run import dist
from common.run.log import Log
from common.run.loop import Batch
from common.run.run import Run
from kernels.benchmark import official_shift

TURNS = 15


def official(x, n_segment, *, fold_div, direction, padding, impl):
    """The authors' form behind our signature."""
    assert (direction, padding) == ("both", "zero")
    return official_shift(x, n_segment, fold_div)


def a_step(world, argv, kernel=None):
    """A function that makes one training step of the model that the flags describe."""
    args, _ = train_tsm.parse_args(argv)
    stage = train_tsm.config.stage_config(args, "train", train_tsm.STAGE, first=True, lr_of=None)
    model_spec = {name: getattr(args, name) for name in train_tsm.MODEL_FLAGS} | {
        "image_size": args.image_size
    }
    model_spec |= {"pixels": [list(IMAGENET_MEAN), list(IMAGENET_STD)], "pos_weight": None}
    run = Run(args, world, None, {}, Path(), Log(None, main=False), model_spec)
    before = train_tsm.KERNELS["residual"]
    train_tsm.KERNELS["residual"] = kernel or before
    model = train_tsm.build_model(run).train()
    train_tsm.KERNELS["residual"] = before
    optimizer = optim.build_optimizer("adamw", optim.param_groups([model], stage.wd), lr=stage.lr)
    scaler = train_tsm.amp.scaler(args.precision, world.device)
    shape = (stage.bs, args.n_segment, 3, args.image_size, args.image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=world.device)
    targets = torch.arange(stage.bs, device=world.device) % 2
    batch = Batch(pixels, np.arange(stage.bs), targets, None)
    return partial(train_tsm.train_step, run, model, optimizer, scaler, batch)


def main(argv):
    """Time the four steps and print them, a JSON line last."""
    world = dist.init(train_tsm.parse_args(argv)[0].device)
    steps = {
        "no shift": a_step(world, [*argv, "--shift", "none"]),
        "residual": a_step(world, [*argv, "--shift", "residual"]),
        "expand": a_step(world, [*argv, "--shift", "expand"]),
        "residual, official eager form": a_step(world, [*argv, "--shift", "residual"], official),
    }
    times = {name: [] for name in steps}
    for turn in range(TURNS + 2):
        for name, make in steps.items():
            begin = time.perf_counter()
            make()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 1:  # the first ones allocate
                times[name].append(time.perf_counter() - begin)
    rows = {}
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["no shift"], strict=True)]
        rows[name] = {"ms": 1e3 * statistics.median(seconds), "ratio": statistics.median(ratios)}
        print(f"{name:<32}{rows[name]['ms']:>10.1f} ms{rows[name]['ratio']:>9.3f} x no shift")
    header = {
        "device": str(world.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flags": argv,
    }
    print(json.dumps(header | {"rows": rows}))


if __name__ == "__main__":
    main(sys.argv[1:])
