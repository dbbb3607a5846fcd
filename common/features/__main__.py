"""`python -m common.features RUN DATA OUT.npz`: a run's features of any images, without labels.

RUN is a run directory of train_simclr.py, whose pretrained backbone is taken, the folder of one of
its stages, or a checkpoint. DATA is what --predict takes: a folder, a .zip, a CSV, a packed file,
images, or several of these. They are read and resized as the run's own. OUT.npz has the keys of the
run's features.npz, without labels and splits, and `data`: DATA as it was given.
"""

import importlib
from functools import partial
from pathlib import Path

import numpy as np

from common import config, linear_eval
from common.errors import InputError, exit_codes, plural
from common.features import write_features
from common.run import checkpoint, dist
from common.run.files import BEST, check_target
from common.run.inference import load_run
from common.run.launch import launch

SUFFIX = ".npz"
SCRIPT = "simclr"  # whose models are a backbone and a head


def source_of(given: str) -> str:
    """The checkpoints that make the features of a run: those of its pretraining, if it has one.

    Raises:
        InputError: there are none, or they are of another script.
    """
    pretrained = Path(given, "pretrain")
    source = str(pretrained) if any((pretrained / name).exists() for name in BEST) else given
    script = checkpoint.load_selected(source)["model_spec"]["script"]
    if script != SCRIPT:
        raise InputError(
            f"{given} is of train_{script}.py; features are those of train_{SCRIPT}.py"
        )
    return source


def compute(script, target: Path, args, world: dist.Dist) -> None:
    """Write the features of the images that `args` name, by the functions of the run's script."""
    loaded = load_run(args, script.CARD)
    kind = linear_eval.kind_of(loaded.model_spec["stage"], loaded.source)
    images = script.build_data(args, loaded.path, world, None, []).images
    run = loaded.as_run(args, world, images, {})
    backbone = loaded.with_weights(partial(script.build_model, run, kind)).backbone
    count = len(images)
    rows = script.evaluate(run, backbone, np.arange(count))
    content = images.content.digests() if images.content else np.zeros(0, np.int64)
    if not world.is_main:
        return
    columns = {
        "split": np.full(count, "", dtype="<U5"),
        "key": f"{checkpoint.weights_digest(backbone.state_dict())} {images.fingerprint}",
        "content": content,
        "data": np.array(args.predict),
    }
    write_features(target, rows, images, **columns)
    world.say(f"{plural(count, 'image')}, {rows.shape[1]} features each, in {target}")


def main(argv: list[str] | None = None) -> int:
    parser = config.Parser(prog="python -m common.features", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, stage's folder or checkpoint")
    parser.add_argument(
        "data", metavar="DATA", nargs="+", help="the images, as --predict takes them"
    )
    parser.add_argument(
        "out", metavar="OUT", help=f"the file to write, *{SUFFIX}; one of this command is replaced"
    )
    config.device_flags(parser)
    config.reading_flags(parser)
    args = parser.parse_args(argv)
    target = Path(args.out)
    with exit_codes():
        check_target(target, SUFFIX, "data.npy", "features")
        source = source_of(args.run)
    script = importlib.import_module(f"train_{SCRIPT}")
    flags = {
        name: value
        for name, value in vars(args).items()
        if name not in ("run", "data") and value != parser.get_default(name)  # else the run's own
    }
    flags |= {"resume": source, "out": target.parent}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    script_args, script_parser = script.parse_args([*words, "--predict", *args.data])
    return launch(script_parser, script_args, partial(compute, script, target), compute)


if __name__ == "__main__":
    raise SystemExit(main())
