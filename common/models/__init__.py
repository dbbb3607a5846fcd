"""Backbones by name, whose last layer is replaced by an identity, and their start from published
weights.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision.models
from torch import Tensor, nn

from common import weights
from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.errors import InputError
from common.models.inception_resnet_v2 import InceptionResNetV2


@dataclass(frozen=True)
class Backbone:
    """What the scripts must know of a backbone: the features' width and the smallest side of its
    input in pixels.
    """

    num_features: int
    min_size: int
    min_size_cifar: int | None = None


BACKBONES = {
    # The stride of a ResNet is 32 with its standard stem and 8 with `cifar`: smaller inputs leave
    # less than one pixel.
    "resnet18": Backbone(512, 32, 8),
    "resnet34": Backbone(512, 32, 8),
    "resnet50": Backbone(2048, 32, 8),
    "resnet101": Backbone(2048, 32, 8),
    # Its unpadded 3x3 convolutions eat the border: at 74 px a map is smaller than the next kernel.
    "inception_v3": Backbone(2048, 75),
    "inception_resnet_v2": Backbone(1536, 75),
}

LARGER = {"resnet18": "resnet34", "resnet34": "resnet50", "resnet50": "resnet101"}

# What torchvision, timm and older collections call the last layer; inception_v3's second one serves
# training only.
_HEADS, _UNUSED = ("fc.", "classif.", "classifier.", "last_linear.", "head."), ("AuxLogits.",)


def min_image_size(name: str, stem: str) -> int:
    """The smallest legal side of a backbone's input, in pixels."""
    spec = BACKBONES[name]
    if stem == "cifar" and spec.min_size_cifar is None:
        allowed = ", ".join(n for n, s in BACKBONES.items() if s.min_size_cifar)
        raise InputError(f"--stem cifar is for {allowed}; {name} has its own stem")
    return spec.min_size_cifar if stem == "cifar" else spec.min_size


def build_backbone(name: str, stem: str = "imagenet") -> nn.Module:
    """A backbone with random weights that maps (n, 3, s, s) to features (n, num_features).

    Its state dict has torchvision's keys without `fc.*`, or timm's without `classif.*`; a script's
    own last layer goes to `fc`. `stem="cifar"` makes the first convolution 3x3 with stride 1 and
    drops the max-pooling (SimCLR, appendix B.9).
    """
    min_image_size(name, stem)
    if name == "inception_v3":
        # No auxiliary head, no dropout: the features go to a projector or to a linear layer.
        model = torchvision.models.inception_v3(
            weights=None, aux_logits=False, transform_input=False, init_weights=True
        )
        model.dropout = nn.Identity()
    elif name == "inception_resnet_v2":
        model = InceptionResNetV2(num_classes=0)
    else:
        model = torchvision.models.get_model(name, weights=None)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    return model


def input_size(name: str, stem: str, wanted: int | None, store_size: int) -> int:
    """Side of the input in pixels: `wanted`, or the stored size, at most 224 and at least what the
    backbone takes.

    Raises:
        InputError: `wanted` is smaller than the backbone takes.
    """
    smallest = min_image_size(name, stem)
    if wanted is None:
        return max(min(224, store_size), smallest)
    if wanted < smallest:
        raise InputError(
            f"--image-size {wanted}: the smallest that {name} takes with --stem {stem} is"
            f" {smallest}"
        )
    return wanted


def load_published(model: nn.Module, path: str | Path) -> str:
    """Start a backbone of `build_backbone` from a file of weights; returns what was done, to be
    logged.

    The file has torchvision's or timm's keys, or is this project's (`backbone.pt`, `best.pt`). Its
    head and auxiliary head are left out. Published Inception weights, told by their head of 1,000
    classes, expect pixels from -1 to 1: the first convolution is changed so that it takes this
    project's inputs to the same maps.

    Raises:
        InputError: the file cannot be read or is of another architecture, which is named if the
            table has it.
    """
    state = weights.of_backbone(weights.read(path))
    if not _fits(model, state):
        stem = state.get("conv1.weight")
        if stem is not None and _fits(
            model, state | {"conv1.weight": model.state_dict().get("conv1.weight", stem)}
        ):
            own = "x".join(map(str, model.conv1.weight.shape[2:]))
            theirs = "x".join(map(str, stem.shape[2:]))
            hint = "--stem imagenet" if theirs == "7x7" else "--stem cifar"
            raise InputError(
                f"{path}: its first convolution is {theirs}, this stem's is {own}; it needs {hint}"
            )
        names = [name for name in BACKBONES if _fits(_skeleton(name), state)]
        if names:
            raise InputError(
                f"{path} holds weights of {names[0]}; give --backbone {names[0]} or another file"
            )
    published = any(
        n in state and len(state[n]) == 1000
        for n in ("fc.weight", "classif.weight", "last_linear.weight")
    )
    said = weights.load(model, state, path, head=_HEADS, ignore=_UNUSED)
    stem = next(
        (getattr(model, n) for n in ("Conv2d_1a_3x3", "conv2d_1a") if hasattr(model, n)), None
    )
    if published and stem is not None:
        _take_imagenet_inputs(stem)
        said.append(
            f"{path}: the first convolution now takes inputs normalized by ImageNet's mean and"
            " deviation"
        )
    return "\n".join([f"started from {path} ({len(model.state_dict())} tensors)", *said])


def _fits(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the state dict is one of this architecture, heads aside."""
    own, theirs = (
        {
            n: t.shape
            for n, t in d.items()
            if not n.startswith((*_HEADS, *_UNUSED)) and "num_batches" not in n
        }
        for d in (model.state_dict(), state)
    )
    return own == theirs


def _skeleton(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(name)


@torch.no_grad()
def _take_imagenet_inputs(stem: nn.Module) -> None:
    """Fold into an unpadded convolution and its BatchNorm what turns ImageNet-normalized inputs
    into 2 * pixel - 1.
    """
    weight = stem.conv.weight
    mean, std = (
        weight.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    stem.bn.running_mean -= (weight * (2 * mean - 1)).sum((1, 2, 3))
    weight *= 2 * std
