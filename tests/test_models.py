"""Backbones: torchvision's keys, exact widths, legal sizes; the projection head and SimCLR's wiring."""

import pytest
import torch
import torchvision

from common.config import InputError
from common.models import BACKBONES, build_backbone, input_size, min_image_size
from common.models.heads import SimCLR, projector


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_load_into_plain_torchvision(name):
    backbone = build_backbone(name)
    options = {"aux_logits": False, "init_weights": False} if name == "inception_v3" else {}
    plain = torchvision.models.get_model(name, weights=None, **options)
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(backbone.state_dict(), strict=True)
    size = min_image_size(name, "imagenet")
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = backbone.eval()(x)
        assert features.shape == (2, BACKBONES[name].num_features)
        torch.testing.assert_close(features, plain.eval()(x))


def test_inception_cannot_take_less_than_its_smallest_size():
    backbone = build_backbone("inception_v3").eval()
    with torch.no_grad(), pytest.raises(RuntimeError):
        backbone(torch.randn(1, 3, 74, 74))


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 32), ("cifar", 8)])
def test_the_smallest_resnet_input_leaves_one_pixel(stem, stride):
    backbone = build_backbone("resnet18", stem).eval()
    sizes = {}
    backbone.layer4.register_forward_hook(lambda m, i, out: sizes.update(side=out.shape[-1]))
    assert min_image_size("resnet18", stem) == stride
    with torch.no_grad():
        for factor in (1, 2):
            backbone(torch.randn(1, 3, stride * factor, stride * factor))
            assert sizes["side"] == factor


def test_input_sizes_are_chosen_and_refused():
    assert input_size("resnet50", "imagenet", None, 64) == 64
    assert input_size("resnet50", "imagenet", None, 512) == 224
    assert input_size("inception_v3", "imagenet", None, 64) == 75
    assert input_size("resnet18", "cifar", None, 32) == 32
    with pytest.raises(InputError, match="--image-size 64: the smallest that inception_v3 takes .* is 75"):
        input_size("inception_v3", "imagenet", 64, 64)
    with pytest.raises(InputError, match="--stem cifar is for resnet18"):
        input_size("inception_v3", "cifar", None, 64)


def test_simclr_head_is_two_layers_with_batchnorm_and_no_spare_bias():
    head = projector(512, 256, 64)
    count = sum(p.numel() for p in head.parameters())
    assert count == 512 * 256 + 256 * 64 + 2 * (256 + 64)
    assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    model = SimCLR(build_backbone("resnet18"), 512, 64)
    assert model(torch.randn(3, 3, 32, 32)).shape == (3, 64)
