"""`python -m common.export RUN OUT.pt2`: a trained model as one program of plain PyTorch.

RUN is a run directory, the folder of one of its stages, or a checkpoint. The program takes uint8
pixels as the script's reader gives them, of any size, in batches of any number; resizing and
normalization are inside.
"""

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import config
from common.errors import InputError, exit_codes, say
from common.run import checkpoint, dist
from common.run.directory import environment
from common.run.files import atomic_write, check_target

SUFFIX = ".pt2"
PROBABILITIES = "probabilities of the classes, float32 (n, classes)"
FACTS = "run.json"  # among the program's extra files


@dataclass(frozen=True)
class ExportSpec:
    """A trained model in the terms of `common.export`: what a script's `export_spec` returns.

    Attributes:
        model: with its weights.
        answer: takes the model and normalized pixels, float (n, ..., 3, s, s); gives the output.
        inputs: the uint8 inputs by name, each with what the reader does. Several are stacked:
            (n, inputs, ..., 3, s, s).
        size: s.
        normalization: mean and deviation of the channels of pixels in [0, 1].
        output: what the output is.
        frames: of a clip: inputs are (n, frames, 3, height, width); None: images.
        classes: those of the output's columns; None: it is no classifier.
        facts: what else is needed to use the output.
    """

    model: nn.Module
    answer: Callable[[nn.Module, Tensor], Tensor]
    inputs: dict[str, str]
    size: int
    normalization: tuple
    output: str
    frames: int | None = None
    classes: list[str] | None = None
    facts: dict = field(default_factory=dict)


class Program(nn.Module):
    """What is exported: uint8 inputs to the output of an `ExportSpec`."""

    def __init__(self, spec: ExportSpec):
        super().__init__()
        self.model = spec.model
        self.answer = spec.answer
        self.size = spec.size
        for name, values in zip(("mean", "std"), spec.normalization, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0] if len(inputs) == 1 else torch.stack(inputs, 1)
        # What `augment.resize` computes; a program can hold this form of it.
        pixels = F.interpolate(
            x.flatten(0, -4).float() / 255,
            size=(self.size, self.size),
            mode="bilinear",
            antialias=True,
        )
        pixels = (pixels - self.mean) / self.std
        return self.answer(self.model, pixels.unflatten(0, x.shape[:-3]))


def load_spec(source: str, folder: Path) -> tuple[ExportSpec, dict]:
    """The model that `source` names, by the script of its card; and what is said of its origin.

    Raises:
        InputError: it cannot be read; its script is not here, or exports nothing.
    """
    state = checkpoint.load_selected(source)
    name = f"train_{state['model_spec']['script']}"
    if not name.isidentifier() or importlib.util.find_spec(name) is None:
        raise InputError(f"{source} is of {name!r:.60}.py, which is not here: go to its folder")
    script = importlib.import_module(name)
    if not hasattr(script, "export_spec"):
        raise InputError(f"{source} is of {name}.py, whose models are not exported")
    flags = [f"--eval={source}", f"--out={folder}", "--device=cpu", "--precision=fp32"]
    flags.append("--data=sample")  # none is read: the run's own need not be here
    args, _ = script.parse_args(flags)
    args.impl = "torch"  # the kernels' references, which run anywhere
    spec = script.export_spec(args, dist.Dist(0, 1, torch.device("cpu")))
    origin = {
        "script": f"{name}.py",
        "stage": state["model_spec"]["stage"],
        "epoch": state["epoch"],
        "weights": checkpoint.weights_digest(state["model"]),
        "store_size": getattr(args, "store_size", None),
    }
    return spec, origin


def export(spec: ExportSpec) -> torch.export.ExportedProgram:
    """The program on the CPU. The numbers of items and of pixels stay free."""
    program = Program(spec).eval().requires_grad_(False)
    program.to(memory_format=torch.contiguous_format)
    clip = () if spec.frames is None else (spec.frames,)
    # One side larger and one smaller than the input's: neither is taken for the only one.
    example = torch.zeros(2, *clip, 3, spec.size + 3, spec.size + 1, dtype=torch.uint8)
    free = dict.fromkeys((0, example.ndim - 2, example.ndim - 1), torch.export.Dim.DYNAMIC)
    examples = tuple(example.clone() for _ in spec.inputs)  # one tensor twice were one input
    # Traced with gradients, a frozen tower that does without is in a program that no one can load.
    with torch.no_grad():
        return torch.export.export(program, examples, dynamic_shapes=((free,) * len(examples),))


def describe(spec: ExportSpec, origin: dict) -> dict:
    """What the program's extra file says."""
    shape = ["n", *([] if spec.frames is None else [spec.frames]), 3, "height", "width"]
    env = environment()
    return origin | {
        "inputs": [
            {"name": name, "dtype": "uint8", "shape": shape, "layout": "RGB", "reader": reader}
            for name, reader in spec.inputs.items()
        ],
        "image_size": spec.size,
        "normalization": spec.normalization,
        "output": spec.output,
        "classes": spec.classes,
        **spec.facts,
        "commit": env["commit"],
        "torch": env["torch"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = config.Parser(prog="python -m common.export", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, stage's folder or checkpoint")
    parser.add_argument(
        "out", metavar="OUT", help=f"the file to write, *{SUFFIX}; an old program is replaced"
    )
    args = parser.parse_args(argv)
    with exit_codes():
        target = Path(args.out)
        check_target(target, SUFFIX, f"extra/{FACTS}", "a program")
        spec, origin = load_spec(args.run, target.parent)
        program = export(spec)
        facts = json.dumps(describe(spec, origin))
        with atomic_write(target, "wb", stream=True) as file:
            torch.export.save(program, file, extra_files={FACTS: facts})
        say(
            f"{target}: {facts}",
            f'facts = {{"{FACTS}": ""}}  # JSON, filled by load',
            f"program = torch.export.load({str(target)!r}, extra_files=facts).module()",
            f"output = program({', '.join(spec.inputs)})  # uint8",
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
