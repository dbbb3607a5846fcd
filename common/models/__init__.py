"""Backbones by name: torchvision's, whose last layer is replaced by an identity."""

from dataclasses import dataclass

import torchvision.models
from torch import nn

from common.config import InputError


@dataclass(frozen=True)
class Backbone:
    """What the scripts must know of a backbone: the features' width and the smallest side of its input in pixels."""

    num_features: int
    min_size: int
    min_size_cifar: int | None = None


BACKBONES = {
    # The stride of a ResNet is 32 with its standard stem and 8 with `cifar`: smaller inputs leave less than one pixel.
    "resnet18": Backbone(512, 32, 8),
    "resnet34": Backbone(512, 32, 8),
    "resnet50": Backbone(2048, 32, 8),
    "resnet101": Backbone(2048, 32, 8),
    # Its unpadded 3x3 convolutions eat the border: at 74 px a map is smaller than the next kernel.
    "inception_v3": Backbone(2048, 75),
}


def min_image_size(name: str, stem: str) -> int:
    """The smallest legal side of a backbone's input, in pixels."""
    spec = BACKBONES[name]
    if stem == "cifar" and spec.min_size_cifar is None:
        allowed = ", ".join(n for n, s in BACKBONES.items() if s.min_size_cifar)
        raise InputError(f"--stem cifar is for {allowed}; {name} has its own stem")
    return spec.min_size_cifar if stem == "cifar" else spec.min_size


def build_backbone(name: str, stem: str = "imagenet") -> nn.Module:
    """A backbone with random weights that maps (n, 3, s, s) to features (n, num_features).

    Its state dict has torchvision's keys without `fc.*`. `stem="cifar"` makes the first convolution 3x3 with stride 1
    and drops the max-pooling (SimCLR, appendix B.9).
    """
    min_image_size(name, stem)
    if name == "inception_v3":
        # No auxiliary head, no dropout: the features go to a projector or to a linear layer.
        model = torchvision.models.inception_v3(
            weights=None, aux_logits=False, transform_input=False, init_weights=True
        )
        model.dropout = nn.Identity()
    else:
        model = torchvision.models.get_model(name, weights=None)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    return model


def input_size(name: str, stem: str, wanted: int | None, store_size: int) -> int:
    """Side of the input in pixels: `wanted`, or the stored size, at most 224 and at least what the backbone takes.

    Raises:
        InputError: `wanted` is smaller than the backbone takes.
    """
    smallest = min_image_size(name, stem)
    if wanted is None:
        return max(min(224, store_size), smallest)
    if wanted < smallest:
        raise InputError(f"--image-size {wanted}: the smallest that {name} takes with --stem {stem} is {smallest}")
    return wanted
