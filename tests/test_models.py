"""Backbones: torchvision's and timm's keys and values, published weights, exact widths, legal
sizes; the projection head and SimCLR's wiring.
"""

import pytest
import torch
import torchvision
from torch import nn

from common.data.augment import normalize
from common.errors import InputError
from common.models import BACKBONES, build_backbone, input_size, load_published, min_image_size
from common.models.heads import SimCLR, projector
from common.models.inception_resnet_v2 import InceptionResNetV2
from common.run import checkpoint


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "inception_resnet_v2"])
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


def timm():
    return pytest.importorskip("timm", reason="pip install -r tests/requirements.txt")


def randomize(model):
    """BatchNorm's statistics and scales and the head's weights are all but zero and one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -0.5),
                (module.running_var, 0.5),
                (module.weight, 0.5),
            ):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return model


def test_inception_resnet_v2_is_timms():
    torch.manual_seed(0)
    theirs, ours = (
        randomize(timm().create_model("inception_resnet_v2")).eval(),
        InceptionResNetV2().eval(),
    )
    assert sum(p.numel() for p in ours.parameters()) == 55_843_464
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for size in (299, 96):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            expected = theirs(x)
            assert expected.std() > 0.5
            torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                ours(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-5
            )
    with torch.no_grad():
        assert ours.maps(x.to(memory_format=torch.channels_last)).is_contiguous(
            memory_format=torch.channels_last
        )


def test_inception_resnet_v2_learns_as_timms():
    torch.manual_seed(0)
    theirs, ours = timm().create_model("inception_resnet_v2").double(), InceptionResNetV2().double()
    ours.load_state_dict(theirs.state_dict())
    x, labels = torch.randn(2, 3, 107, 107, dtype=torch.float64), torch.tensor([3, 141])
    for model in (theirs.train(), ours.train()):
        nn.functional.cross_entropy(model(x), labels).backward()
    for (name, ours_p), theirs_p in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # A bias before BatchNorm has no gradient but rounding.
        torch.testing.assert_close(
            ours_p.grad, theirs_p.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def published(name, library, folder):
    """A file as the library publishes it: its own keys, 1000 classes."""
    torch.manual_seed(1)
    if library == "timm":
        model = timm().create_model(name)
        file = folder / "w.safetensors"
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), file)
    else:
        model = torchvision.models.get_model(name, weights=None)
        file = folder / "w.pth"
        torch.save(model.state_dict(), file)
    return model.eval(), file


@pytest.mark.parametrize(
    ("name", "library"),
    [("resnet18", "torchvision"), ("resnet50", "timm"), ("inception_v3", "torchvision"), ("inception_v3", "timm"),
     ("inception_resnet_v2", "timm")],
)  # fmt: skip
def test_a_backbone_starts_from_published_weights(tmp_path, name, library):
    theirs, file = published(name, library, tmp_path)
    backbone = build_backbone(name).eval()
    said = load_published(backbone, file)
    assert f"started from {file}" in said and "(1000, " in said
    assert ("AuxLogits.*" in said) == any(n.startswith("AuxLogits") for n in theirs.state_dict())
    pixels = torch.rand(1, 3, 96, 96)
    last = theirs.get_submodule("classif" if name == "inception_resnet_v2" else "fc")
    kept = {}
    last.register_forward_hook(lambda module, inputs, out: kept.update(features=inputs[0]))
    with torch.no_grad():
        theirs(2 * pixels - 1 if "inception" in name else normalize(pixels))
        features = backbone(normalize(pixels))
    torch.testing.assert_close(
        features, kept["features"], rtol=1e-4, atol=1e-4 * kept["features"].abs().max().item()
    )


def test_own_backbones_start_unchanged(tmp_path):
    sources = {name: build_backbone(name) for name in ("resnet18", "inception_resnet_v2")}
    torch.save(sources["inception_resnet_v2"].state_dict(), tmp_path / "inception_resnet_v2.pt")
    state = {
        "model": SimCLR(sources["resnet18"], 512, 8).state_dict(),
        "model_spec": {},
        "epoch": 1,
    }
    checkpoint.save(tmp_path / "resnet18.pt", state)
    for name, source in sources.items():
        backbone = build_backbone(name)
        assert "\n" not in load_published(backbone, tmp_path / f"{name}.pt")
        expected = source.state_dict()
        assert all(
            torch.equal(tensor, expected[key]) for key, tensor in backbone.state_dict().items()
        )


def test_weights_of_another_backbone_are_named(tmp_path):
    file = tmp_path / "w.pth"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), file)
    with pytest.raises(InputError, match="holds weights of resnet34; give --backbone resnet34"):
        load_published(build_backbone("resnet50"), file)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), file)
    with pytest.raises(
        InputError, match="first convolution is 7x7, this stem's is 3x3; it needs --stem imagenet"
    ):
        load_published(build_backbone("resnet18", "cifar"), file)
    torch.save(build_backbone("resnet18", "cifar").state_dict(), file)
    with pytest.raises(InputError, match="it needs --stem cifar"):
        load_published(build_backbone("resnet18"), file)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)
    with pytest.raises(
        InputError, match="does not fit this model: .* keys missing .* unknown keys"
    ):
        load_published(build_backbone("resnet18"), file)


@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2"])
def test_inception_cannot_take_less_than_its_smallest_size(name):
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 75, 75)).shape == (1, BACKBONES[name].num_features)
        with pytest.raises(RuntimeError):
            backbone(torch.randn(1, 3, 74, 74))
        backbone.fc = nn.Linear(BACKBONES[name].num_features, 5)
        assert backbone(torch.randn(1, 3, 75, 75)).shape == (1, 5)


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
    with pytest.raises(
        InputError, match="--image-size 64: the smallest that inception_v3 takes .* is 75"
    ):
        input_size("inception_v3", "imagenet", 64, 64)
    with pytest.raises(InputError, match="--stem cifar is for resnet18"):
        input_size("inception_v3", "cifar", None, 64)


def test_simclr_head_is_two_layers_with_batchnorm_and_no_spare_bias():
    head = projector(512, 256, 64)
    count = sum(p.numel() for p in head.parameters())
    assert count == 512 * 256 + 256 * 64 + 2 * (256 + 64)
    assert [type(m).__name__ for m in head] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]
    model = SimCLR(build_backbone("resnet18"), 512, 64)
    assert model(torch.randn(3, 3, 32, 32)).shape == (3, 64)
