"""Backbones: torchvision's and timm's keys and values, published weights, widths, legal sizes.

The heads that stand on them, and a run with one of them.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import resnet

from common.data.augment import normalize
from common.errors import InputError
from common.models import (
    BACKBONES,
    Backbone,
    build_backbone,
    feature_widths,
    input_size,
    load_published,
    min_image_size,
    published_weights,
)
from common.models.heads import Classifier, SimCLR, projector
from common.models.inception_resnet_v2 import InceptionResNetV2
from common.run import checkpoint
from common.run.files import FORMAT

OWN = ("inception_resnet_v2", "resnet18_narrow")


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in OWN])
def test_a_backbone_is_torchvisions_of_the_same_seed_without_its_head(name):
    torch.manual_seed(3)
    backbone = build_backbone(name)
    drawn_after = torch.rand(1)
    torch.manual_seed(3)
    options = {"aux_logits": False, "init_weights": True} if name == "inception_v3" else {}
    plain = torchvision.models.get_model(name, weights=None, **options)
    assert torch.equal(drawn_after, torch.rand(1))
    plain.set_submodule(backbone.head_name, nn.Identity())
    expected = plain.state_dict()
    state = backbone.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    size = min_image_size(name, "imagenet")
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(x), plain.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", BACKBONES)
def test_features_have_their_width_and_reach_the_first_layer(name):
    torch.manual_seed(0)
    backbone = build_backbone(name)
    size = min_image_size(name, "imagenet")
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = backbone(x)
        assert features.shape == (2, backbone.num_features)
        assert torch.equal(features, backbone(x)), "training mode draws numbers of its own"
    # In training mode BatchNorm on maps of one pixel would leave two images no gradient.
    (backbone.eval()(x[:1]) * torch.randn(backbone.num_features)).sum().backward()
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    assert first.weight.grad.isfinite().all() and first.weight.grad.abs().max() > 0


def test_the_narrow_resnet_is_half_of_torchvisions_with_the_stem_for_small_images():
    """Its weights as a part of a ResNet-18 whose other channels are zero give the same features."""
    torch.manual_seed(0)
    narrow = randomize(build_backbone("resnet18_narrow")).eval()
    wide = build_backbone("resnet18", "cifar").eval()
    state = {key: torch.zeros_like(tensor) for key, tensor in wide.state_dict().items()}
    state |= {key: torch.ones_like(state[key]) for key in state if key.endswith("running_var")}
    assert list(state) == list(narrow.state_dict())
    for key, tensor in narrow.state_dict().items():
        assert [2 * n for n in tensor.shape[:1]] == list(state[key].shape[:1]), key
        state[key][tuple(slice(n) for n in tensor.shape)] = tensor
    wide.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(wide(x)[:, :256], narrow(x))
        assert narrow(x).std(0).median() > 0


# Of two images at 64 px (Inception at 128): the channels of the last two stages, and their sides.
MAPS = {
    "resnet18": (256, 512, 4, 2),
    "resnet18_narrow": (128, 256, 16, 8),
    "resnet50": (1024, 2048, 4, 2),
    "convnext_tiny": (384, 768, 4, 2),
    "efficientnet_b0": (112, 1280, 4, 2),
    "mobilenet_v3_large": (112, 960, 4, 2),
    "inception_v3": (768, 2048, 6, 2),
    "inception_resnet_v2": (1088, 1536, 6, 2),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_head_reads_the_maps_of_the_last_two_stages(name):
    torch.manual_seed(0)
    backbone = build_backbone(name).eval()
    size = 128 if "inception" in name else 64
    x = torch.randn(2, 3, size, size)
    before, last, side, last_side = MAPS[name]
    maps = []
    for stage in backbone.stages:
        backbone.get_submodule(stage).register_forward_hook(lambda *io: maps.append(io[-1]))
    with torch.no_grad():
        outputs = backbone(x)
        both = Classifier(backbone, nn.Identity(), "stages")(x)
        of_last = Classifier(backbone, nn.Identity(), "2x2")(x)
    shapes = [tuple(m.shape) for m in maps[:2]]
    assert shapes == [(2, before, side, side), (2, last, last_side, last_side)]
    half, last_half = side // 2, last_side // 2
    corner = maps[0][:, :, half:, :half].mean((2, 3))  # of 2x2 places the third
    assert feature_widths(backbone, size) == {
        "gap": outputs.shape[1],
        "2x2": 4 * last,
        "stages": 4 * (before + last),
    }
    assert of_last.shape == (2, 4 * last) and both.shape == (2, 4 * (before + last))
    torch.testing.assert_close(both[:, : 4 * before].view(2, before, 4)[:, :, 2], corner)
    last_corner = maps[1][:, :, :last_half, last_half:].mean((2, 3))
    torch.testing.assert_close(of_last.view(2, last, 4)[:, :, 1], last_corner)
    torch.testing.assert_close(both[:, 4 * before :], of_last, rtol=0, atol=0)


def test_of_maps_of_one_place_that_place_is_read():
    backbone = build_backbone("resnet18").eval()
    assert feature_widths(backbone, 32) == {"gap": 512, "stages": 4 * 256 + 512}
    assert feature_widths(build_backbone("vit_b_16"), 224) == {"gap": 768}


class GatedLate(nn.Module):
    """A classifier whose last registered Linear is not its output."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)
        self.gate = nn.Linear(3, 3)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.head(x * self.gate(x).sigmoid())


WRONG = {
    "gated": (GatedLate, r"without gate gives \(2, 5\) for two images, not \(2, 3\)"),
    "squeezenet": (torchvision.models.squeezenet1_1, "has no Linear layer"),
    "inception with its auxiliary head": (
        partial(torchvision.models.inception_v3, init_weights=False),
        "without fc gives InceptionOutputs",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_registration_is_refused(monkeypatch, case):
    build, problem = WRONG[case]
    monkeypatch.setitem(BACKBONES, "wrong", Backbone(build, 299))
    with pytest.raises(AssertionError, match=f"^wrong {problem}"):
        build_backbone("wrong")


def timm():
    return pytest.importorskip("timm", reason="pip install -r tests/requirements.txt")


def randomize(model):
    """BatchNorm's statistics and scales and the head's weights are all but zero and one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return model


def test_the_manual_names_every_backbone():
    manual = (Path(__file__).parents[1] / "docs" / "simclr.md").read_text()
    assert [name for name in BACKBONES if f"`{name}`" not in manual] == []


def test_inception_resnet_v2_is_timms():
    torch.manual_seed(0)
    theirs = randomize(timm().create_model("inception_resnet_v2")).eval()
    ours = InceptionResNetV2().eval()
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
    theirs = timm().create_model("inception_resnet_v2").double()
    ours = InceptionResNetV2().double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 107, 107, dtype=torch.float64)
    labels = torch.tensor([3, 141])
    for model in (theirs.train(), ours.train()):
        nn.functional.cross_entropy(model(x), labels).backward()
    for (name, ours_p), theirs_p in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # A bias before BatchNorm has no gradient but rounding.
        torch.testing.assert_close(
            ours_p.grad, theirs_p.grad, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def published(name, library, folder, **options):
    """A file as the library publishes it: its own keys, 1000 classes if `options` say nothing."""
    torch.manual_seed(1)
    if library == "timm":
        model = timm().create_model(name)
        file = folder / "w.safetensors"
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), file)
    else:
        model = torchvision.models.get_model(name, weights=None, **options)
        file = folder / "w.pth"
        torch.save(model.state_dict(), file)
    return model.eval(), file


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("resnet18", "torchvision"),
        ("resnet50", "timm"),
        ("inception_v3", "torchvision"),
        ("inception_v3", "timm"),
        ("inception_resnet_v2", "timm"),
        ("convnext_tiny", "torchvision"),
        ("efficientnet_b0", "torchvision"),
        ("mobilenet_v3_large", "torchvision"),
        ("vit_b_16", "torchvision"),
    ],
)
def test_a_backbone_starts_from_published_weights(tmp_path, name, library):
    theirs, file = published(name, library, tmp_path)
    backbone = build_backbone(name).eval()
    notes = load_published(backbone, file)
    assert f"started from {file}" in notes
    assert f"the head {backbone.head_name}.* is left out (in the file (1000, " in notes
    assert ("AuxLogits.*" in notes) == any(n.startswith("AuxLogits") for n in theirs.state_dict())
    side = input_size(name, "imagenet", None, 96)
    pixels = torch.rand(1, 3, side, side)
    kept = {}
    theirs.get_submodule(backbone.head_name).register_forward_hook(
        lambda module, inputs, out: kept.update(features=inputs[0])
    )
    with torch.no_grad():
        theirs(2 * pixels - 1 if "inception" in name else normalize(pixels))
        features = backbone(normalize(pixels))
    torch.testing.assert_close(
        features, kept["features"], rtol=1e-4, atol=1e-4 * kept["features"].abs().max().item()
    )


def test_a_head_of_another_size_is_left_out_and_the_layer_before_it_kept(tmp_path):
    theirs, file = published("mobilenet_v3_large", "torchvision", tmp_path, num_classes=7)
    backbone = build_backbone("mobilenet_v3_large")
    assert "the head classifier.3.* is left out (in the file (7, 1280)" in load_published(
        backbone, file
    )
    assert torch.equal(backbone.classifier[0].weight, theirs.classifier[0].weight)


def test_own_backbones_start_unchanged(tmp_path):
    sources = {name: build_backbone(name) for name in ("resnet18", "inception_resnet_v2")}
    torch.save(sources["inception_resnet_v2"].state_dict(), tmp_path / "inception_resnet_v2.pt")
    state = {
        "format": FORMAT,
        "model": SimCLR(sources["resnet18"], 8).state_dict(),
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
    torch.save(torchvision.models.convnext_tiny(weights=None).state_dict(), file)
    with pytest.raises(InputError, match="weights of convnext_tiny; give --backbone convnext_tiny"):
        load_published(build_backbone("mobilenet_v3_large"), file)
    torch.save(build_backbone("resnet18", "cifar").state_dict(), file)
    with pytest.raises(InputError, match="it needs --stem cifar"):
        load_published(build_backbone("resnet18"), file)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), file)
    with pytest.raises(
        InputError, match="does not fit this model: .* keys missing .* unknown keys"
    ):
        load_published(build_backbone("resnet18"), file)


def tiny_resnet(bottleneck=False):
    """torchvision's ResNet with few channels, as `build_backbone` leaves one."""
    block = resnet.Bottleneck if bottleneck else resnet.BasicBlock
    model = resnet.ResNet(block, [1, 1, 1, 1])
    model.inplanes = 4
    model.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(4)
    for stage in range(4):
        layer = model._make_layer(block, 4 + stage, 1, stride=1 + (stage > 0))
        setattr(model, f"layer{stage + 1}", layer)
    for tensor in model.state_dict().values():  # no two models of this process are alike
        tensor.copy_(torch.randn(tensor.shape).abs() + 1)
    model.head_name = "fc"
    model.fc = nn.Identity()
    return model


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def numbered(state, order):
    """Names as nn.Sequential gives them to the children of a ResNet."""
    numbers = {name: str(number) for number, name in enumerate(order)}
    return {
        ".".join([numbers[first], *rest]): tensor
        for (first, *rest), tensor in ((name.split("."), t) for name, t in state.items())
    }


TORCHVISION = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
LIGHTLY = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]  # its own ResNet
HEAD = {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3)}
# How public training code stores a backbone b beside another one o (momentum, target, student),
# and what the line that reports the loading has to say.
STORED = {
    "MoCo v1": (
        lambda b, o: {
            "arch": "resnet50",
            "state_dict": under("module.encoder_q.", b | {"fc.weight": torch.ones(2, 4)})
            | under("module.encoder_k.", o)
            | {"module.queue": torch.ones(2, 5), "module.queue_ptr": torch.zeros(1).long()},
        },
        "encoder_q.*, the query encoder.*left out: encoder_k.* (N), queue* (1), queue_ptr* (1)",
    ),
    "MoCo v2": (
        lambda b, o: {"state_dict": under("module.encoder_q.", b | under("fc.", HEAD))},
        "encoder_q.*",
    ),
    "MoCo v3": (
        lambda b, o: {
            "state_dict": under("module.momentum_encoder.", o)
            | under("module.base_encoder.", b | under("fc.", HEAD))
            | under("module.predictor.", HEAD)
        },
        "base_encoder.*, the base encoder.*left out: momentum_encoder* (N), predictor* (2)",
    ),
    "SupCon": (
        lambda b, o: {
            "opt": argparse.Namespace(model="resnet50", learning_rate=0.05),
            "model": under("encoder.module.", shortcuts(b)) | under("head.", HEAD),
            "epoch": 1000,
        },
        "encoder.module.*left out: head* (2)",
    ),
    "lightly, torchvision's children": (
        lambda b, o: {
            "state_dict": under("backbone.", numbered(b, TORCHVISION))
            | under("backbone_momentum.", numbered(o, TORCHVISION))
            | under("projection_head.layers.", HEAD)
        },
        "backbone.*left out: backbone_momentum* (N), projection_head* (2)",
    ),
    "lightly, its own ResNet": (
        lambda b, o: {"state_dict": under("model.backbone.", numbered(shortcuts(b), LIGHTLY))},
        "model.backbone.*",
    ),
    "VISSL": (
        lambda b, o: {
            "iteration": 3,
            "classy_state_dict": {
                "train": True,
                "base_model": {
                    "model": {"trunk": under("_feature_blocks.", b), "heads": under("0.", HEAD)},
                    "meters": {"name": "accuracy"},
                },
            },
        },
        "trunk._feature_blocks.*left out: heads* (2)",
    ),
    "DINO": (
        lambda b, o: {
            "student": under("module.backbone.", o) | under("module.head.mlp.", HEAD),
            "teacher": under("module.backbone.", b) | under("module.head.mlp.", HEAD),
            "args": argparse.Namespace(arch="resnet50"),
            "dino_loss": {"center": torch.ones(1, 5)},
            "epoch": 3,
        },
        "teacher.module.backbone.*, the teacher.*"
        "left out: student* (M), teacher.module.head* (2), dino_loss* (1)",
    ),
    "SwAV": (
        lambda b, o: (
            under("module.", b)
            | under("module.projection_head.", HEAD)
            | {"module.prototypes.weight": torch.ones(9, 3)}
        ),
        "left out: projection_head* (2), prototypes* (1)",
    ),
    "BYOL, Lightning Bolts": (
        lambda b, o: {
            "pytorch-lightning_version": "1.9",
            "callbacks": {pytest.Item: {"best": 1.0}},  # a class, as a key
            "state_dict": under("online_network.encoder.", b)
            | under("online_network.projector.", HEAD)
            | under("target_network.encoder.", o),
        },
        "online_network.encoder.*, the online network.*left out: online_network.projector* (2),"
        " target_network* (N)",
    ),
    "BYOL, two state dicts": (
        lambda b, o: {
            "online_network_state_dict": under("encoder.", numbered(b, TORCHVISION)),
            "target_network_state_dict": under("encoder.", numbered(o, TORCHVISION)),
            "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.03}]},
        },
        "online_network_state_dict.encoder.*left out: target_network_state_dict* (N)",
    ),
    "BYOL, of a wrapped network": (
        lambda b, o: (
            under("net.", b)
            | under("online_encoder.net.", b)
            | under("online_encoder.projector.", HEAD)
            | under("target_encoder.net.", o)
        ),
        "online_encoder.net.*left out: net* (N), online_encoder.projector* (2), target_encoder*",
    ),
    "BYOL, OpenMMLab": (
        lambda b, o: {
            "state_dict": under("online_net.0.", b)
            | under("online_net.1.", HEAD)
            | under("target_net.0.", o)
        },
        "online_net.0.*, the online network.*left out: online_net.1* (2), target_net* (N)",
    ),
    "OpenSelfSup": (
        lambda b, o: {
            "meta": {"epoch": 3},
            "state_dict": under("encoder_q.0.", b) | under("encoder_q.1.mlp.", HEAD),
        },
        "encoder_q.0.*left out: encoder_q.1* (2)",
    ),
    "Lightning of a plain model": (
        lambda b, o: {"state_dict": under("model.", b | {"fc.weight": torch.ones(7, 4)})},
        "model.*",
    ),
    "a wrapper": (
        lambda b, o: {"state_dict": under("base_model.", b) | under("head.", HEAD)},
        "base_model.*left out: head* (2)",
    ),
}


def shortcuts(state):
    return {name.replace("downsample", "shortcut"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("layout", STORED)
@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_backbone_is_found_in_the_files_of_public_training_code(tmp_path, layout, bottleneck):
    theirs, other, ours = (tiny_resnet(bottleneck) for _ in range(3))
    store, said = STORED[layout]
    torch.save(store(theirs.state_dict(), other.state_dict()), tmp_path / "w.pth")
    notes = load_published(ours, tmp_path / "w.pth")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    count = len(theirs.state_dict())
    said = said.replace("N", str(count)).replace("M", str(count + 2))
    pattern = ".*".join(re.escape(part) for part in said.split(".*"))
    assert re.search(f"^started from .*{pattern}", notes), notes


@pytest.mark.parametrize("prefix", ["", "module.base_encoder.", "teacher.backbone."])
def test_a_vision_transformer_with_timms_names_gives_timms_outputs(tmp_path, prefix):
    timm = pytest.importorskip("timm", reason="tests/requirements.txt")
    size = {"patch_size": 4, "num_classes": 0}
    theirs = timm.models.VisionTransformer(
        8, embed_dim=12, depth=2, num_heads=3, mlp_ratio=2, **size
    ).eval()
    ours = torchvision.models.VisionTransformer(8, 4, 2, 3, 12, 24).eval()
    ours.head_name, ours.heads.head = "heads.head", nn.Identity()
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))
    beside = {"head.mlp.0.weight": torch.ones(2, 2), "decoder_pos_embed": torch.ones(1, 5, 4)}
    torch.save(under(prefix, theirs.state_dict() | beside), tmp_path / "w.pth")
    load_published(ours, tmp_path / "w.pth")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
    # Of another width it is refused by the names that torchvision has.
    state = timm.models.VisionTransformer(8, embed_dim=6, depth=2, num_heads=3, **size).state_dict()
    torch.save(under(prefix, state), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"token is \(1, 1, 6\), the model's is \(1, 1, 12\)"):
        load_published(ours, tmp_path / "w.pth")


def test_another_network_is_taken_only_where_nothing_better_is_there(tmp_path):
    theirs, ours = tiny_resnet(), tiny_resnet()
    torch.save({"student": under("backbone.", theirs.state_dict())}, tmp_path / "w.pth")
    assert "student.backbone.*, the student; there is no teacher" in load_published(
        ours, tmp_path / "w.pth"
    )
    # A momentum encoder alone is not taken for the network that was trained.
    torch.save({"state_dict": under("module.encoder_k.", theirs.state_dict())}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"keys missing \(first: conv1\.weight"):
        load_published(ours, tmp_path / "w.pth")


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_a_file_of_which_a_part_fits_is_refused_by_the_missing_names(tmp_path, prefix):
    state = tiny_resnet().state_dict()
    part = {name: tensor for name, tensor in state.items() if not name.startswith("layer3")}
    torch.save({"state_dict": under(prefix, part)}, tmp_path / "w.pth")
    ours = tiny_resnet()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(InputError, match=r"keys missing \(first: layer3\.0\.conv1\.weight"):
        load_published(ours, tmp_path / "w.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
@pytest.mark.parametrize(
    ("channels", "cure"),
    [(1, r"repeat\(1, 3, 1, 1\) / 3"), (4, r"w\[:, "), (13, r"w\[:, ")],
)
def test_a_first_convolution_of_other_channels_is_told(tmp_path, channels, cure, prefix):
    state = tiny_resnet().state_dict() | {"conv1.weight": torch.ones(4, channels, 7, 7)}
    torch.save({"state_dict": under(prefix, state)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=f"its first convolution takes {channels} channel.*{cure}"):
        load_published(tiny_resnet(), tmp_path / "w.pth")
    # What the line advises: the same maps of gray images.
    if channels == 1:
        state["conv1.weight"] = state["conv1.weight"].repeat(1, 3, 1, 1) / 3
        torch.save(under(prefix, state), tmp_path / "w.pth")
        ours = tiny_resnet()
        load_published(ours, tmp_path / "w.pth")
        gray = torch.rand(1, 1, 16, 16)
        expected = nn.functional.conv2d(gray, torch.ones(4, 1, 7, 7), stride=2, padding=3)
        torch.testing.assert_close(ours.conv1(gray.expand(1, 3, 16, 16)), expected)


@pytest.mark.parametrize("name", ["inception_v3", "inception_resnet_v2", "convnext_tiny"])
def test_a_smaller_input_than_the_smallest_cannot_be_taken(name):
    backbone = build_backbone(name).eval()
    size = min_image_size(name, "imagenet")
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, size, size)).shape == (1, backbone.num_features)
        with pytest.raises(RuntimeError):
            backbone(torch.randn(1, 3, size - 1, size - 1))


@pytest.mark.parametrize(
    ("name", "stem", "layer", "stride"),
    [
        ("resnet18", "imagenet", "layer4", 32),
        ("resnet18", "cifar", "layer4", 8),
        ("convnext_tiny", "imagenet", "features", 32),
        ("efficientnet_b0", "imagenet", "features", 32),
        ("mobilenet_v3_large", "imagenet", "features", 32),
    ],
)
def test_the_smallest_input_leaves_one_pixel(name, stem, layer, stride):
    backbone = build_backbone(name, stem).eval()
    sizes = {}
    backbone.get_submodule(layer).register_forward_hook(
        lambda module, inputs, out: sizes.update(side=out.shape[-1])
    )
    assert min_image_size(name, stem) == stride
    with torch.no_grad():
        for factor in (1, 2):
            backbone(torch.randn(1, 3, stride * factor, stride * factor))
            assert sizes["side"] == factor


def test_a_backbone_of_one_size_takes_no_other():
    assert input_size("vit_b_16", "imagenet", None, 64) == 224
    assert input_size("vit_b_16", "imagenet", None, 512) == 224
    assert input_size("vit_b_16", "imagenet", 224, 64) == 224
    for side in (96, 208, 240):
        with pytest.raises(
            InputError,
            match=f"--image-size {side}: vit_b_16 takes 224 px only; give --image-size 224",
        ):
            input_size("vit_b_16", "imagenet", side, 512)
        with pytest.raises(AssertionError):
            build_backbone("vit_b_16")(torch.randn(1, 3, side, side))


def test_input_sizes_are_chosen_and_refused():
    assert input_size("resnet50", "imagenet", None, 64) == 64
    assert input_size("resnet50", "imagenet", None, 512) == 224
    assert input_size("inception_v3", "imagenet", None, 64) == 75
    assert input_size("resnet18", "cifar", None, 32) == 32
    with pytest.raises(
        InputError, match="--image-size 64: the smallest that inception_v3 takes .* is 75"
    ):
        input_size("inception_v3", "imagenet", 64, 64)
    allowed = "resnet18, resnet34, resnet50, resnet101"
    for name in ("inception_v3", "convnext_tiny", "vit_b_16"):
        with pytest.raises(InputError, match=f"--stem cifar is for {allowed}; {name} has"):
            input_size(name, "cifar", None, 64)


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
    model = SimCLR(build_backbone("resnet18"), 64)
    assert model(torch.randn(3, 3, 32, 32)).shape == (3, 64)


def test_a_classifier_is_its_head_on_its_backbone():
    backbone = build_backbone("mobilenet_v3_large").eval()
    head = nn.Linear(backbone.num_features, 5)
    model = Classifier(backbone, head)
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "head"}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), head(backbone(x)))


def test_torchvisions_weights_have_an_address_and_a_digest():
    manual = (Path(__file__).parents[1] / "docs" / "simclr.md").read_text()
    for name in BACKBONES:
        found = published_weights(name)
        if name in OWN:
            assert found == {}
            continue
        url, sha256 = found["imagenet"]
        assert url == torchvision.models.get_model_weights(name).DEFAULT.url
        assert len(sha256) == 8 and url.endswith(f"-{sha256}.pth")
        assert f"| `{name}` | {url} |" in manual
