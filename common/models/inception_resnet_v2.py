"""Inception-ResNet-v2 with the names of timm's `inception_resnet_v2`.

Szegedy et al. 2016, arXiv:1602.07261.

The state dict has timm's keys, whose classifier is called `classif`; published weights load
strictly. It is the network that its authors released: 10, 20 and 10 residual blocks whose branches
are scaled by 0.17, 0.1 and 0.2 before they are added. The last block neither scales nor applies a
ReLU. Convolutions keep the channels_last layout of their input.
"""

import torch
from torch import Tensor, nn


class Conv(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.ReLU(inplace=True)


class Branches(nn.Module):
    """Branches `branch0`, `branch1`, ... on the same input, their channels put together."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.num_branches = len(branches)
        for index, branch in enumerate(branches):
            self.add_module(f"branch{index}", branch)

    def forward(self, x: Tensor) -> Tensor:
        branches = [getattr(self, f"branch{index}") for index in range(self.num_branches)]
        return torch.cat([branch(x) for branch in branches], 1)


class Residual(Branches):
    """x + scale * conv2d(branches(x)), followed by a ReLU or not."""

    def __init__(
        self, channels: int, joined: int, *branches: nn.Module, scale: float, relu: bool = True
    ):
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(joined, channels, 1)
        self.scale = scale
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.conv2d(super().forward(x)), alpha=self.scale)
        return x.relu_() if self.relu else x


def mixed_5b() -> Branches:
    """192 to 320 channels."""
    return Branches(
        Conv(192, 96, 1),
        nn.Sequential(Conv(192, 48, 1), Conv(48, 64, 5, padding=2)),
        nn.Sequential(Conv(192, 64, 1), Conv(64, 96, 3, padding=1), Conv(96, 96, 3, padding=1)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), Conv(192, 64, 1)),
    )


def block35() -> Residual:
    return Residual(
        320,
        128,
        Conv(320, 32, 1),
        nn.Sequential(Conv(320, 32, 1), Conv(32, 32, 3, padding=1)),
        nn.Sequential(Conv(320, 32, 1), Conv(32, 48, 3, padding=1), Conv(48, 64, 3, padding=1)),
        scale=0.17,
    )


def mixed_6a() -> Branches:
    """320 to 1088 channels at half the resolution."""
    return Branches(
        Conv(320, 384, 3, 2),
        nn.Sequential(Conv(320, 256, 1), Conv(256, 256, 3, padding=1), Conv(256, 384, 3, 2)),
        nn.MaxPool2d(3, 2),
    )


def block17() -> Residual:
    return Residual(
        1088,
        384,
        Conv(1088, 192, 1),
        nn.Sequential(
            Conv(1088, 128, 1),
            Conv(128, 160, (1, 7), padding=(0, 3)),
            Conv(160, 192, (7, 1), padding=(3, 0)),
        ),
        scale=0.1,
    )


def mixed_7a() -> Branches:
    """1088 to 2080 channels at half the resolution."""
    return Branches(
        nn.Sequential(Conv(1088, 256, 1), Conv(256, 384, 3, 2)),
        nn.Sequential(Conv(1088, 256, 1), Conv(256, 288, 3, 2)),
        nn.Sequential(Conv(1088, 256, 1), Conv(256, 288, 3, padding=1), Conv(288, 320, 3, 2)),
        nn.MaxPool2d(3, 2),
    )


def block8(scale: float = 0.2, relu: bool = True) -> Residual:
    return Residual(
        2080,
        448,
        Conv(2080, 192, 1),
        nn.Sequential(
            Conv(2080, 192, 1),
            Conv(192, 224, (1, 3), padding=(0, 1)),
            Conv(224, 256, (3, 1), padding=(1, 0)),
        ),
        scale=scale,
        relu=relu,
    )


class InceptionResNetV2(nn.Module):
    """Images (n, 3, s, s) to logits (n, num_classes).

    With `num_classes=0` they go to features (n, 1536). `fc`, an identity at first, stands on what
    comes out: there the scripts put their layer, as on torchvision's models.
    """

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.conv2d_1a = Conv(3, 32, 3, 2)
        self.conv2d_2a = Conv(32, 32, 3)
        self.conv2d_2b = Conv(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = Conv(64, 80, 1)
        self.conv2d_4a = Conv(80, 192, 3)
        self.maxpool_5a = nn.MaxPool2d(3, 2)
        self.mixed_5b = mixed_5b()
        self.repeat = nn.Sequential(*(block35() for _ in range(10)))
        self.mixed_6a = mixed_6a()
        self.repeat_1 = nn.Sequential(*(block17() for _ in range(20)))
        self.mixed_7a = mixed_7a()
        self.repeat_2 = nn.Sequential(*(block8() for _ in range(9)))
        self.block8 = block8(scale=1.0, relu=False)
        self.conv2d_7b = Conv(2080, 1536, 1)
        self.classif = nn.Linear(1536, num_classes) if num_classes else nn.Identity()
        self.fc = nn.Identity()

    def maps(self, x: Tensor) -> Tensor:
        """The last feature maps (n, 1536, h, w)."""
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x)))
        x = self.repeat(self.mixed_5b(self.maxpool_5a(x)))
        x = self.repeat_1(self.mixed_6a(x))
        return self.conv2d_7b(self.block8(self.repeat_2(self.mixed_7a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.classif(self.maps(x).mean((2, 3))))
