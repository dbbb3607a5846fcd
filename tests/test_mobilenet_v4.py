"""MobileNetV4: timm's keys, order, parameters and logits; the pixels of its checkpoints; the order
of its layers.
"""

import pytest
import torch
from torch import nn

from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.errors import InputError
from common.models.mobilenet_v4 import (
    VARIANTS,
    build_mobilenet_v4,
    load_published,
    normalization,
    shift_sites,
)

ORACLE = "pip install -r tests/requirements.txt"
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
# Parameters with 1000 classes, BatchNorm layers, blocks with a shortcut that are no attention.
FACTS = {
    "conv_small_035": (1_905_384, 46, 10),
    "conv_small_050": (2_238_952, 46, 10),
    "conv_small": (3_774_024, 46, 10),
    "conv_medium": (9_715_512, 77, 18),
    "conv_large": (32_590_864, 102, 23),
    "hybrid_medium": (11_074_648, 96, 19),
    "hybrid_large": (37_764_624, 121, 24),
}


def oracle(name):
    """timm's model, in evaluation mode, whose statistics and layer scales are not those of a new
    one.
    """
    timm = pytest.importorskip("timm", reason=ORACLE)
    torch.manual_seed(0)
    model = timm.create_model(f"mobilenetv4_{name}").eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, std=0.1)
        if hasattr(module, "gamma"):
            nn.init.uniform_(module.gamma, 0.5, 1.0)
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_keys_and_logits_are_timms(name):
    theirs, ours = oracle(name), build_mobilenet_v4(name, 1000).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    load_published(ours, theirs.state_dict(), "timm")
    theirs.load_state_dict(ours.state_dict(), strict=True)
    # Odd sides too, where only the right padding gives the right size.
    for size in (64, 75) if name == "conv_medium" else (64,):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected, logits = theirs(x), ours(x)
        spread = expected.std()
        assert (expected[0] - expected[1]).std() > 0.03 * spread
        torch.testing.assert_close(logits / spread, expected / spread, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("conv_small", ["1.0"]),
        ("conv_medium", ["0.0"]),
        ("hybrid_medium", ["2.0", "2.1", "2.2", "2.4", "3.8"]),
    ],
)
def test_statistics_and_gradients_of_every_kind_of_block_are_timms(name, places):
    models = oracle(name), build_mobilenet_v4(name)
    for place in places:
        theirs, ours = (model.get_submodule(f"blocks.{place}").train().double() for model in models)
        ours.load_state_dict(theirs.state_dict())
        width = next(p.shape[1] for p in theirs.parameters() if p.dim() == 4 and p.shape[1] > 1)
        x = torch.randn(2, width, 7, 7, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in models]
        for block, leaf in zip((theirs, ours), inputs, strict=True):
            block(leaf).pow(3).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        for (key, p), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, expected.grad, msg=f"{place}.{key}")
        for (key, value), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(value, expected, msg=f"{place}.{key}")


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_layers_and_sites_are_counted(name):
    with torch.device("meta"):
        full, bare = build_mobilenet_v4(name, 1000), build_mobilenet_v4(name)
    parameters, norms, sites = FACTS[name]
    assert sum(p.numel() for p in full.parameters()) == parameters
    assert sum(p.numel() for p in bare.parameters()) == parameters - 1281 * 1000
    assert sum(isinstance(m, nn.BatchNorm2d) for m in full.modules()) == norms
    assert len(shift_sites(full)) == sites
    assert bare(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1280)
    settings = {(m.eps, m.momentum) for m in full.modules() if isinstance(m, nn.BatchNorm2d)}
    assert settings == {(1e-5, 0.1)}


@pytest.mark.parametrize("name", ["conv_small", "conv_medium", "hybrid_medium", "hybrid_large"])
def test_layers_are_registered_in_the_order_in_which_they_run(name):
    with torch.device("meta"):
        model = build_mobilenet_v4(name)
        ran = []
        layers = {
            n: m for n, m in model.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.Conv2d))
        }
        for key, layer in layers.items():
            layer.register_forward_hook(lambda *_, key=key: ran.append(key))
        model(torch.empty(2, 3, 64, 64))
    assert ran == list(layers)


def test_new_weights_are_spread_like_timms():
    timm = pytest.importorskip("timm", reason=ORACLE)
    torch.manual_seed(0)
    theirs, ours = (
        timm.create_model("mobilenetv4_hybrid_medium"),
        build_mobilenet_v4("hybrid_medium", 1000),
    )
    for (key, expected), p in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if p.numel() > 2000:
            assert p.std().item() == pytest.approx(expected.std().item(), rel=0.1), key
        elif p.dim() == 1:
            assert torch.equal(p, expected), key


def test_published_weights_lose_their_classifier_and_nothing_else():
    state = build_mobilenet_v4("conv_small_035", 11821).state_dict()
    model = build_mobilenet_v4("conv_small_035")
    load_published(model, state, "published")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    del state["blocks.2.0.pw_exp.bn.weight"]
    with pytest.raises(
        InputError, match=r"w\.pt does not fit .*1 key missing \(first: blocks\.2\.0\.pw_exp"
    ):
        load_published(model, state, "w.pt")
    with pytest.raises(InputError, match="classifier.weight is"):
        load_published(
            build_mobilenet_v4("conv_small_035", 10),
            build_mobilenet_v4("conv_small_035", 7).state_dict(),
            "w",
        )


def test_pixels_are_normalized_as_each_published_checkpoint_expects():
    timm = pytest.importorskip("timm", reason=ORACLE)
    names = [
        n
        for n in timm.list_models("mobilenetv4_*", pretrained=True)
        if "_aa_" not in n and "_blur_" not in n
    ]
    assert len(names) > 10
    for full in names:
        name = full.split(".")[0].removeprefix("mobilenetv4_")
        config = timm.get_pretrained_cfg(full)
        for path in (
            f"/w/{full}.safetensors",
            f"/hub/models--timm--{full}/snapshots/0f/model.safetensors",
        ):
            assert normalization(name, path) == (config.mean, config.std), full


def test_pixels_of_weights_that_do_not_say_what_they_are():
    assert (
        normalization("conv_small_050", "w.pt") == HALF
        and normalization("conv_medium", "w.pt") == IMAGENET
    )
    assert normalization("conv_small") == IMAGENET
    with pytest.raises(InputError, match=r"model\.safetensors: conv_small.*e2400_r224.*e3600_r256"):
        normalization("conv_small", "model.safetensors")


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="--backbone conv_tiny: allowed are conv_small_035"):
        build_mobilenet_v4("conv_tiny")


def test_channels_last_and_autocast_reach_every_block():
    model = build_mobilenet_v4("hybrid_medium").to(memory_format=torch.channels_last)
    seen = []
    for stage in model.blocks:
        for block in stage:
            block.register_forward_hook(lambda m, i, y: seen.append((y.dtype, y)))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 96, 96))
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert all(y.is_contiguous(memory_format=torch.channels_last) for _, y in seen)
