"""A ResNet of half the width for small images."""

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet


class NarrowResNet(ResNet):
    """torchvision's ResNet with half the channels everywhere, and SimCLR's stem for small images.

    The stem (appendix B.9) is a 3x3 convolution of stride 1 without max-pooling: the whole stride
    is 8. The keys are torchvision's.
    """

    def __init__(self, layers: list[int]):
        super().__init__(BasicBlock, layers)
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(256, 1000)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block, planes: int, *args, **kwargs) -> nn.Sequential:
        if planes == 64:  # the first one, on 64 channels of torchvision's stem
            self.inplanes = 32
        return super()._make_layer(block, planes // 2, *args, **kwargs)
