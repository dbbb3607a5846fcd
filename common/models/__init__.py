"""Backbones by name, without their last layer, and their start from published weights."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.ops import StochasticDepth

from common import weights
from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.errors import InputError, plural, printable
from common.models.heads import FEATURES, Classifier
from common.models.inception_resnet_v2 import InceptionResNetV2
from common.models.narrow import NarrowResNet


@dataclass(frozen=True)
class Backbone:
    """A classifier from which `build_backbone` makes a backbone.

    Attributes:
        build: makes it with random weights; its last nn.Linear gives its outputs.
        min_size: the smallest side of its input in pixels.
        min_size_cifar: the same with `--stem cifar`; None: it has no such stem.
        fixed_size: it takes no other side than `min_size`.
        stages: its last two stages, each the last module whose maps have that resolution; none: it
            has no maps.
    """

    build: Callable[[], nn.Module]
    min_size: int
    min_size_cifar: int | None = None
    fixed_size: bool = False
    stages: tuple[str, ...] = ("layer3", "layer4")  # a ResNet's


BACKBONES = {
    # The stride of these is 32, and of a ResNet with the stem `cifar` 8: of smaller inputs the last
    # maps would have less than one pixel.
    "resnet18": Backbone(models.resnet18, 32, 8),
    "resnet18_narrow": Backbone(partial(NarrowResNet, [2, 2, 2, 2]), 8),
    "resnet34": Backbone(models.resnet34, 32, 8),
    "resnet50": Backbone(models.resnet50, 32, 8),
    "resnet101": Backbone(models.resnet101, 32, 8),
    "convnext_tiny": Backbone(models.convnext_tiny, 32, stages=("features.5", "features.7")),
    "efficientnet_b0": Backbone(models.efficientnet_b0, 32, stages=("features.5", "features.8")),
    "mobilenet_v3_large": Backbone(
        models.mobilenet_v3_large, 32, stages=("features.12", "features.16")
    ),
    "vit_b_16": Backbone(models.vit_b_16, 224, fixed_size=True, stages=()),
    # Unpadded 3x3 convolutions eat the border: at 74 px a map is smaller than the next kernel.
    "inception_v3": Backbone(
        partial(models.inception_v3, aux_logits=False, init_weights=True),
        75,
        stages=("Mixed_6e", "Mixed_7c"),
    ),
    "inception_resnet_v2": Backbone(InceptionResNetV2, 75, stages=("repeat_1", "conv2d_7b")),
}

LARGER = {
    "resnet18_narrow": "resnet18",
    "resnet18": "resnet34",
    "resnet34": "resnet50",
    "resnet50": "resnet101",
}

# What timm and older collections call the last layer. The auxiliary one of inception_v3 serves
# training only.
_HEADS = ("fc.", "classif.", "classifier.", "last_linear.", "head.")
_UNUSED = ("AuxLogits.",)


def published_weights(name: str) -> dict[str, weights.Published]:
    """What can be downloaded for a backbone by name: torchvision's own, if it is torchvision's."""
    if name not in models.list_models():
        return {}
    url = models.get_model_weights(name).DEFAULT.url
    sha256 = torch.hub.HASH_REGEX.search(os.path.basename(url))[1]
    return {"imagenet": weights.Published(url, sha256)}


def min_image_size(name: str, stem: str) -> int:
    """The smallest legal side of a backbone's input, in pixels."""
    spec = BACKBONES[name]
    if stem != "cifar":
        return spec.min_size
    if spec.min_size_cifar is None:
        allowed = ", ".join(n for n, s in BACKBONES.items() if s.min_size_cifar)
        raise InputError(f"--stem cifar is for {allowed}; {name} has its own stem")
    return spec.min_size_cifar


def build_backbone(name: str, stem: str = "imagenet") -> nn.Module:
    """A backbone with random weights that maps (n, 3, s, s) to features (n, num_features).

    It is the registered classifier without its last Linear, whose place, `head_name`, an identity
    takes; the other keys of its state dict stay torchvision's or timm's. Dropout and stochastic
    depth are off: with --accum a batch passes twice, and both passes must give the same.

    Args:
        name: one of BACKBONES.
        stem: `cifar` makes the first convolution 3x3 with stride 1 and drops the max-pooling
            (SimCLR, appendix B.9).

    Returns:
        The network, with the attributes `num_features`, `head_name` and `stages`.
    """
    size = min_image_size(name, stem)
    model = BACKBONES[name].build()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    for module in model.modules():
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears, f"{name} has no Linear layer that could be its last one"
    model.stages = BACKBONES[name].stages
    model.head_name = linears[-1]
    model.num_features = model.get_submodule(model.head_name).in_features
    model.set_submodule(model.head_name, nn.Identity())
    shape = _output_shape(model, size)
    assert shape == (2, model.num_features), (
        f"{name} without {model.head_name} gives {shape} for two images, not"
        f" {(2, model.num_features)}: its last Linear is not its output"
    )
    return model


@torch.no_grad()
def _output_shape(model: nn.Module, size: int) -> tuple[int, ...] | str:
    """The shape that two images give, or the type of an output that has none; without computing."""
    images = torch.empty(2, 3, size, size, device="meta")
    state = {key: tensor.to("meta") for key, tensor in model.state_dict().items()}
    outputs = torch.func.functional_call(model, state, images)
    return tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__


def trains_on_one(name: str, stem: str, size: int) -> bool:
    """Whether a backbone trains on a single image: not where BatchNorm sees maps of 1x1."""
    with torch.device("meta"):
        model = build_backbone(name, stem).train()
        image = torch.empty(1, 3, size, size)
    try:
        model(image)
    except ValueError:  # of BatchNorm
        return False
    return True


def feature_widths(backbone: nn.Module, size: int) -> dict[str, int]:
    """How wide the features of `build_backbone`'s network are that a head can read, by their name.

    `gap` are its outputs, and see `pooled_maps`. Where the last maps have a single place, `2x2` is
    `gap` and left out.
    """
    widths = {"gap": backbone.num_features}
    for features in FEATURES[1:] if backbone.stages else ():
        reader = Classifier(backbone, nn.Identity(), features)
        widths[features] = _output_shape(reader, size)[1]
    if widths.get("2x2") == widths["gap"]:
        del widths["2x2"]
    return widths


def input_size(name: str, stem: str, wanted: int | None, store_size: int) -> int:
    """Side of the input in pixels.

    It is `wanted`, or the stored size, at most 224 and at least what the backbone takes.

    Raises:
        InputError: the backbone does not take `wanted`.
    """
    smallest = min_image_size(name, stem)
    if wanted is None:
        return max(min(224, store_size), smallest)
    if BACKBONES[name].fixed_size and wanted != smallest:
        raise InputError(
            f"--image-size {wanted}: {name} takes {smallest} px only; give --image-size {smallest}"
            " or leave it out"
        )
    if wanted < smallest:
        raise InputError(
            f"--image-size {wanted}: the smallest that {name} takes with --stem {stem} is"
            f" {smallest}"
        )
    return wanted


def load_published(model: nn.Module, path: str | Path) -> str:
    """Start a backbone of `build_backbone` from a file of weights.

    The file has torchvision's or timm's keys, is this project's (`backbone.pt`, `best.pt`), or of
    one of `weights.LAYOUTS`. Heads, and what else lies beside the backbone, are left out. Published
    Inception weights, told by their head of 1,000 classes, expect pixels from -1 to 1: the first
    convolution is changed so that it takes this project's inputs to the same maps.

    Returns:
        What was done, a line each, to be logged.

    Raises:
        InputError: the file cannot be read or is of another architecture, which is named if the
            table has it.
    """
    stored = weights.read(path)
    taken, names = _backbone_in(model, stored) or _refuse_other_architecture(model, stored, path)
    state = {names[name]: tensor for name, tensor in stored.items() if name in names}
    notes = weights.load(model, state, path, head=_head_prefixes(model), ignore=_UNUSED)
    first_conv = getattr(model, "Conv2d_1a_3x3", None) or getattr(model, "conv2d_1a", None)
    heads = ("fc.weight", "classif.weight", "last_linear.weight")
    if first_conv is not None and any(len(state.get(head, ())) == 1000 for head in heads):
        _take_imagenet_inputs(first_conv)
        notes.append(
            f"{path}: the first convolution now takes inputs normalized by ImageNet's mean and"
            " deviation"
        )
    what = "".join(f", {weights.LAYOUTS[part]}" for part in taken if weights.LAYOUTS[part])
    what = f": {''.join(taken)}*{what}" if taken else ""
    beside = Counter(_part_of(name, taken) for name in stored if name not in names)
    counts = "".join(f", {part}* ({count})" for part, count in beside.items())
    said = f"started from {path}{what} ({len(model.state_dict())} tensors)"
    notes.insert(0, said + (f"; left out:{counts[1:]}" if counts else ""))
    return "\n".join(map(printable, notes))


def _backbone_in(
    model: nn.Module, stored: dict[str, Tensor], any_input: bool = False
) -> tuple[list[str], dict[str, str]] | None:
    """Where in a file weights of this architecture are: what `weights.layouts` yields, without what
    the architecture has no place for.

    With `any_input` the first convolution may have another kernel or other channels.
    """
    ours = model.state_dict()
    children = list(dict.fromkeys(name.split(".")[0] for name in ours))
    beside = (*_head_prefixes(model), *_UNUSED)
    first = _first_convolution(model)
    for taken, all_names in weights.layouts(stored, children):
        names = {
            old: new
            for old, new in all_names.items()
            if new.split(".")[0] in children or new.startswith(beside)
        }
        state = {new: stored[old] for old, new in names.items()}
        if any_input and len(state.get(first, torch.empty(0)).shape) == 4:
            state[first] = ours[first]
        if _fits(model, state):
            return taken, names
    return None


def _first_convolution(model: nn.Module) -> str:
    return next(name for name, tensor in model.state_dict().items() if tensor.ndim == 4)


def _part_of(name: str, taken: list[str]) -> str:
    """The part of a name that parts it from the names below `taken`: `teacher.head` of
    `teacher.head.mlp.0.weight`.
    """
    path = ""
    for prefix in taken:
        if not name.startswith(path + prefix):
            break
        path += prefix
    return path + name.removeprefix(path).split(".")[0]


def _refuse_other_architecture(
    model: nn.Module, stored: dict[str, Tensor], path: str | Path
) -> tuple[list[str], dict[str, str]]:
    """Raise an InputError if the weights are of another first convolution or another backbone.

    Otherwise what fits best, whose missing names `weights.load` tells.
    """
    if found := _backbone_in(model, stored, any_input=True):
        first = _first_convolution(model)
        ours = model.state_dict()[first]
        theirs = next(stored[old] for old, new in found[1].items() if new == first)
        _refuse_channels(theirs.shape[1], first, path)
        our_kernel = "x".join(map(str, ours.shape[2:]))
        their_kernel = "x".join(map(str, theirs.shape[2:]))
        stem = "imagenet" if their_kernel == "7x7" else "cifar"
        raise InputError(
            f"{path}: its first convolution is {their_kernel}, this stem's is {our_kernel}; it"
            f" needs --stem {stem}"
        )
    for name in BACKBONES:
        with torch.device("meta"):
            other = build_backbone(name)
        if _backbone_in(other, stored, any_input=True):
            raise InputError(
                f"{path} holds weights of {name}; give --backbone {name} or another file"
            )
    ours = model.state_dict().keys()
    children = list(dict.fromkeys(name.split(".")[0] for name in ours))
    return max(
        weights.layouts(stored, children),
        key=lambda found: len(ours & set(found[1].values())),
    )


def _refuse_channels(channels: int, name: str, path: str | Path) -> None:
    """Raise an InputError if a first convolution takes another number of channels than 3."""
    if channels == 3:
        return
    cure = (
        f"store {name} as w.repeat(1, 3, 1, 1) / 3, which gives the same on gray images"
        if channels == 1
        else f"store {name} with the channels of red, green and blue alone, as w[:, [0, 1, 2]]"
    )
    raise InputError(
        f"{path}: its first convolution takes {plural(channels, 'channel')}, the images here have"
        f" 3 (gray ones are read as RGB): {cure}; or give a file for RGB images"
    )


def _fits(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the state dict is one of this architecture, heads aside."""
    left_out = (*_head_prefixes(model), *_UNUSED)

    def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
        return {
            key: tensor.shape
            for key, tensor in tensors.items()
            if not key.startswith(left_out) and "num_batches" not in key
        }

    return shapes(model.state_dict()) == shapes(state)


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """How the keys of a last layer may begin in a file for this backbone."""
    keys = model.state_dict()
    others = [head for head in _HEADS if not any(key.startswith(head) for key in keys)]
    return (f"{model.head_name}.", *others)


@torch.no_grad()
def _take_imagenet_inputs(first_conv: nn.Module) -> None:
    """Let an unpadded convolution take ImageNet-normalized inputs instead of 2 * pixel - 1.

    What turns one into the other is folded into its weights and its BatchNorm.
    """
    weight = first_conv.conv.weight
    mean = weight.new_tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = weight.new_tensor(IMAGENET_STD).view(1, 3, 1, 1)
    first_conv.bn.running_mean -= (weight * (2 * mean - 1)).sum((1, 2, 3))
    weight *= 2 * std
