"""CLIP against open_clip and transformers: values, parameter counts, published layouts,
activations; checkpointing, autocast, learned context.
"""

import json
import math
import re
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import InputError
from common.models.clip import (
    OPENAI,
    VARIANTS,
    TextTower,
    Variant,
    build_clip,
    build_image_tower,
    cosine_logits,
    from_published,
    read_clip,
)
from common.run import checkpoint
from common.run.checkpoint import load_weights

SMALL = Variant(48, 2, 3, 8, 24, text_width=32, text_layers=2, text_heads=2)
NUM_IDS = 49_408


def open_clip():
    return pytest.importorskip("open_clip", reason="pip install -r tests/requirements.txt")


def randomize(model, seed=0):
    """Biases and normalizations are all but zero and one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "embedding" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_openais_addresses_are_open_clips():
    names = {"vit_b_32": "ViT-B-32", "vit_b_16": "ViT-B-16", "vit_l_14": "ViT-L-14"}
    assert OPENAI.keys() == names.keys()
    manual = (Path(__file__).parents[1] / "docs" / "raer.md").read_text()
    for name, (url, sha256) in OPENAI.items():
        assert url == open_clip().get_pretrained_cfg(names[name], "openai")["url"]
        assert len(sha256) == 64 and f"/{sha256}/" in url
        assert f"- `{name}`: {url}\n" in manual


def texts(n=3, length=77):
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(n, length, dtype=torch.long)
    for i in range(n):
        end = 4 + 3 * i
        ids[i, :end] = torch.randint(0, 40_000, (end,), generator=generator)
        ids[i, 0], ids[i, end] = 49_406, 49_407
    return ids


def outputs(model, images, ids):
    with torch.no_grad():
        return model.visual(images), model.text(ids), model(images, ids)


def assert_open_clips(model, theirs, images, ids):
    with torch.no_grad():
        expected = theirs.encode_image(images), theirs.encode_text(ids)
        units = [nn.functional.normalize(features, dim=-1) for features in expected]
        expected += (theirs.logit_scale.exp() * units[0] @ units[1].T,)
    for ours, wanted in zip(outputs(model, images, ids), expected, strict=True):
        assert wanted.std() > 0.01
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "theirs", "count"),
    [
        ("vit_b_32", "ViT-B-32", 151_277_313),
        ("vit_b_16", "ViT-B-16", 149_620_737),
        pytest.param("vit_l_14", "ViT-L-14", 427_616_513, marks=pytest.mark.slow),
    ],
)
def test_both_towers_are_open_clips(name, theirs, count):
    torch.manual_seed(0)
    oracle = randomize(open_clip().create_model(f"{theirs}-quickgelu", pretrained=None))
    state = from_published(oracle.state_dict())
    for activation in ("quick_gelu", "gelu"):
        with torch.device("meta"):
            model = build_clip(name, activation=activation).eval()
        assert (
            sum(p.numel() for p in model.parameters())
            == sum(p.numel() for p in oracle.parameters())
            == count
        )
        load_weights(model.to_empty(device="cpu"), state, "open_clip")
        assert_open_clips(model, oracle, torch.randn(2, 3, 224, 224), texts(3))
        for block in (*oracle.visual.transformer.resblocks, *oracle.transformer.resblocks):
            assert type(block.mlp.gelu) is open_clip().transformer.QuickGELU or activation == "gelu"
            block.mlp.gelu = nn.GELU()


@pytest.fixture
def small(monkeypatch):
    """A row of the table that takes milliseconds, and open_clip's model of the same shape."""
    monkeypatch.setitem(VARIANTS, "small", SMALL)
    v = SMALL

    def make(quick_gelu=True, image_size=32, custom=False):
        torch.manual_seed(2)
        package = open_clip()
        model = (package.CustomTextCLIP if custom else package.CLIP)(
            v.embed_dim,
            package.CLIPVisionCfg(
                layers=v.layers, width=v.width, head_width=16, patch_size=8, image_size=image_size
            ),
            package.CLIPTextCfg(width=v.text_width, heads=v.text_heads, layers=v.text_layers),
            quick_gelu=quick_gelu,
        )
        return randomize(model)

    return make


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "layout",
    [
        "plain",
        "ddp",
        "container",
        "custom text",
        "scale of one dimension",
        "safetensors",
        "lightning",
        "siglip's bias",
        "beside a head",
    ],
)
def test_open_clips_layouts(tmp_path, small, layout):
    oracle = small(custom=layout == "custom text")
    state = oracle.state_dict()
    file = tmp_path / "ViT-small-quickgelu.pt"
    if layout == "ddp":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if layout == "container":
        state = {"epoch": 3, "name": "run", "state_dict": state}
    if layout == "lightning":
        state = {f"model.clip.{name}": tensor for name, tensor in state.items()}
        state = {"state_dict": state, "hyper_parameters": {"args": Namespace(lr=1)}}
    if layout == "siglip's bias":
        state["logit_bias"] = torch.tensor(-10.0)
    if layout == "beside a head":
        state |= {"head.weight": torch.ones(3, 24), "head.bias": torch.ones(3)}
    if layout == "scale of one dimension":
        state["logit_scale"] = state["logit_scale"].reshape(1)
    if layout == "safetensors":
        file = file.with_suffix(".safetensors")
        package = pytest.importorskip(
            "safetensors.torch", reason="pip install -r tests/requirements.txt"
        )
        package.save_file(state, file)
    else:
        torch.save(state, file)
    model, said = read_clip(file, "small", 32)
    assert said.startswith(f"started from {file} (") and "quick_gelu by its name" in said
    left_out = {"siglip's bias": "1 tensor of .*logit_bias", "beside a head": "2 tensors .*head"}
    assert re.search(left_out[layout], said) if layout in left_out else "\n" not in said
    assert_open_clips(model.eval(), oracle, IMAGES, texts())


@pytest.mark.parametrize("layout", ["visual.", "model.encoder.", "", "Hugging Face's"])
def test_an_image_tower_alone_is_read(tmp_path, small, layout):
    oracle = small()
    state = oracle.visual.state_dict()
    file = tmp_path / "w.pt"
    torch.save({layout + name: tensor for name, tensor in state.items()}, file)
    if layout == "Hugging Face's":
        oracle = hugging_face(tmp_path, "quick_gelu")
        state = oracle.state_dict()
        kept = {name: tensor for name, tensor in state.items() if name.startswith("visi")}
        torch.save(kept | {"visual_projection.weight": state["visual_projection.weight"]}, file)
    model, said = read_clip(file, "small", 32, "quick_gelu")
    assert model.text is None and "the image tower alone" in said
    with torch.no_grad():
        features = model.eval().visual(IMAGES)
        if layout == "Hugging Face's":
            expected = oracle.visual_projection(oracle.vision_model(IMAGES).pooler_output)
        else:
            expected = oracle.encode_image(IMAGES)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


class RecorderMeter:
    """What the two projects keep beside the weights, an object of their own script."""

    def __init__(self):
        self.epoch_losses = np.zeros((3, 2), np.float32)


@pytest.mark.parametrize("parallel", [False, True])
def test_checkpoints_of_dfer_clip_and_clip_caer_are_read(tmp_path, small, parallel):
    oracle = small()
    state = {f"clip_model_.{name}": tensor for name, tensor in oracle.state_dict().items()}
    visual = oracle.visual.state_dict()
    state |= {f"image_encoder.{name}": tensor for name, tensor in visual.items()}
    state |= {
        "prompt_learner.ctx": torch.randn(5, 8, 32),
        "text_encoder.positional_embedding": oracle.positional_embedding.detach(),
        "temporal_net.pos_embedding": torch.randn(1, 17, 24),
        "project_fc.weight": torch.randn(24, 48),
    }
    if parallel:
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    more = {"epoch": 3, "best_acc": np.float64(61.2), "recorder": RecorderMeter()}
    torch.save({"state_dict": state, "optimizer": {"state": {}}} | more, tmp_path / "best.pth")
    model, said = read_clip(tmp_path / "best.pth", "small", 32)
    assert "quick_gelu by the layout of DFER-CLIP" in said and not model.normalized
    assert f"{len(visual) + 4} tensors of other parts not used (image_encoder, " in said
    assert "without CLIP's mean" in said
    assert_open_clips(model.eval(), oracle, IMAGES, texts())


class Published(nn.Module):
    """What OpenAI traced: a model with three more numbers."""

    def __init__(self, inner):
        super().__init__()
        for name, module in inner.named_children():
            setattr(self, name, module)
        for name, parameter in inner.named_parameters(recurse=False):
            setattr(self, name, parameter)
        for name, value in (
            ("input_resolution", 32),
            ("context_length", 77),
            ("vocab_size", NUM_IDS),
        ):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x):
        return self.visual(x) * self.logit_scale


def test_openais_archive_is_read_in_fp32_without_running_it(tmp_path, small):
    oracle = small()
    half = small().half()
    file = tmp_path / "ViT.pt"
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        torch.jit.trace(Published(half), IMAGES.half(), check_trace=False).save(file)
    oracle.load_state_dict(half.float().state_dict())
    model, said = read_clip(file, "small", 32)
    assert "quick_gelu by OpenAI's archive" in said
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_open_clips(model.eval(), oracle, IMAGES, texts())
    # What is left of it in a plain file still tells that it is OpenAI's.
    torch.save(Published(half).state_dict(), tmp_path / "plain.pt")
    assert "OpenAI" in read_clip(tmp_path / "plain.pt", "small", 32)[1]
    with pytest.raises(
        InputError, match="--activation gelu: .*trained with quick_gelu .*leave the flag out"
    ):
        read_clip(file, "small", 32, "gelu")


def hugging_face(folder, activation, **text):
    transformers = pytest.importorskip(
        "transformers", reason="pip install -r tests/requirements.txt"
    )
    v = SMALL
    config = transformers.CLIPConfig(
        text_config=dict(
            hidden_size=v.text_width,
            intermediate_size=4 * v.text_width,
            num_hidden_layers=v.text_layers,
            num_attention_heads=v.text_heads,
            hidden_act=activation,
            bos_token_id=49_406,
            eos_token_id=49_407,
        )
        | text,
        vision_config=dict(
            hidden_size=v.width,
            intermediate_size=4 * v.width,
            num_hidden_layers=v.layers,
            image_size=32,
            num_attention_heads=v.heads,
            patch_size=v.patch,
            hidden_act=activation,
        ),
        projection_dim=v.embed_dim,
    )
    torch.manual_seed(4)
    model = randomize(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_hugging_faces_layout_is_transformers(tmp_path, small, activation):
    oracle = hugging_face(tmp_path, activation)
    model, said = read_clip(tmp_path / "model.safetensors", "small", 32)
    assert f"{activation} by config.json" in said and model.activation == activation
    ids = texts()
    with torch.no_grad():
        expected = oracle(input_ids=ids, pixel_values=IMAGES)
    image, text, logits = outputs(model.eval(), IMAGES, ids)
    for ours, wanted in (
        (nn.functional.normalize(image, dim=-1), expected.image_embeds),
        (nn.functional.normalize(text, dim=-1), expected.text_embeds),
        (logits, expected.logits_per_image),
    ):
        assert wanted.std() > 0.05
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    old = {
        f"{part}.embeddings.position_ids": torch.arange(77)[None]
        for part in ("text_model", "vision_model")
    }
    torch.save(oracle.state_dict() | old, tmp_path / "pytorch_model.bin")
    assert torch.equal(
        read_clip(tmp_path / "pytorch_model.bin", "small", 32)[0].visual.proj, model.visual.proj
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(
        InputError,
        match="GELU or QuickGELU.*config.json is not beside .*give --activation quick_gelu",
    ):
        read_clip(tmp_path / "model.safetensors", "small", 32)
    for change, match in (
        (
            {"text_config": {"hidden_act": "relu"}},
            "hidden_act is .*relu; allowed is one of quick_gelu, gelu",
        ),
        ({"text_config": 3}, "is not a model's configuration"),
        (
            {"vision_config": {"hidden_act": "gelu"}, "text_config": {}},
            "hidden_act is gelu, quick_gelu; allowed is one",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=match):
            read_clip(tmp_path / "model.safetensors", "small", 32)


def test_open_clips_activation_comes_from_its_configuration_or_its_name_or_the_caller(
    tmp_path, small
):
    state = small().state_dict()

    def found(path, request=None):
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)
        return read_clip(path, "small", 32, request)[0].activation

    with pytest.raises(InputError, match="GELU or QuickGELU.*give --activation quick_gelu or gelu"):
        found(tmp_path / "a" / "w.pt")
    assert found(tmp_path / "a" / "w.pt", "gelu") == "gelu"
    assert found(tmp_path / "a" / "w.pt", "quick_gelu") == "quick_gelu"
    assert found(tmp_path / "ViT-B-32-QuickGELU" / "w.pt") == "quick_gelu"
    for config, expected in (
        ({"model_cfg": {"quick_gelu": True}}, "quick_gelu"),
        ({"model_cfg": {}}, "gelu"),
    ):
        (tmp_path / "a" / "open_clip_config.json").write_text(json.dumps(config))
        assert (
            found(tmp_path / "a" / "w.pt") == found(tmp_path / "a" / "w.pt", expected) == expected
        )
    with pytest.raises(InputError, match="was trained with gelu .open_clip_config.json."):
        found(tmp_path / "a" / "w.pt", "quick_gelu")
    (tmp_path / "a" / "open_clip_config.json").write_text("{")
    with pytest.raises(InputError, match="open_clip_config.json cannot be read"):
        found(tmp_path / "a" / "w.pt")


def test_weights_of_another_architecture_are_refused(tmp_path, small, monkeypatch):
    state, file = small().state_dict(), tmp_path / "quickgelu.pt"

    def refused(change, match, name="small", size=32):
        torch.save({k: t for k, t in (state | change).items() if t is not None}, file)
        with pytest.raises(InputError, match=match) as error:
            read_clip(file, name, size)
        assert "\n" not in str(error.value)

    monkeypatch.setitem(VARIANTS, "other", SMALL._replace(patch=16))
    refused({}, "holds no other: its patches are .48, 3, 8, 8.; give --backbone small", "other")
    refused(
        {"visual.conv1.weight": torch.zeros(9, 3, 8, 8)},
        "patches are .9, 3, 8, 8.; allowed are vit_b_32, ",
    )
    refused({"visual.proj": None}, "1 key missing .first: visual.proj")
    refused({"visual.extra": torch.zeros(1)}, "1 unknown key .first: visual.extra")
    ema = {f"ema.{name}": tensor for name, tensor in state.items()}
    refused(ema, "several CLIPs, below , ema.: store the one")
    refused({"visual.class_embedding": None}, "holds no CLIP: no name ends with class_embedding")
    refused(
        {"token_embedding.weight": torch.zeros(99, 32)}, "text.token_embedding.weight is .99, 32."
    )
    refused(
        {"visual.positional_embedding": torch.zeros(16, 48)},
        "visual.positional_embedding is .16, 48.",
    )
    refused({"logit_scale": torch.tensor(3)}, "logit_scale is torch.int64")
    for factor in (100.0, 1 / 0.07, 0.07, -1.0):
        refused({"logit_scale": torch.tensor(factor)}, "logit_scale is .*the factor's logarithm")
    refused({}, "vit_tiny has no text tower; allowed are vit_b_32, vit_b_16", "vit_tiny")
    refused({}, "--backbone vit_g_14: allowed are vit_b_32, vit_b_16, vit_l_14", "vit_g_14")
    refused({}, "--image-size 36: .*multiples of its patch of 8", size=36)


@pytest.mark.parametrize("size", [24, 64])
def test_another_image_size_resizes_the_positions_as_open_clip_does(tmp_path, small, size):
    state, oracle = small().state_dict(), small(image_size=size)
    torch.save(state, tmp_path / "quickgelu.pt")
    from open_clip.model import resize_pos_embed

    resize_pos_embed(state, oracle)
    oracle.load_state_dict(state)
    model, said = read_clip(tmp_path / "quickgelu.pt", "small", size)
    assert said.count("\n") == 1 and f"resized from 4x4 to {size // 8}x{size // 8} patches" in said
    images = torch.randn(2, 3, size, size)
    assert_open_clips(model.eval(), oracle, images, texts())
    with pytest.raises(ValueError, match="expected .n, 3"):
        model.visual(IMAGES)


def text_tower(**options):
    torch.manual_seed(0)
    tower = TextTower(
        **{
            "width": 32,
            "layers": 2,
            "heads": 2,
            "embed_dim": 24,
            "activation": "gelu",
            "vocab": NUM_IDS,
        }
        | options
    )
    return randomize(tower)


def test_learned_vectors_that_are_words_give_the_words_features():
    tower, ids = text_tower(), texts()
    words = torch.tensor([11, 22, 33, 44])
    full = torch.cat([ids[:, :1], words.expand(3, 4), ids[:, 1:-4]], 1)
    with torch.no_grad():
        learned = tower.token_embedding(words)
        expected = tower(full)
        assert not torch.allclose(tower(ids), expected, atol=1e-2)
        torch.testing.assert_close(tower(ids[:, :-4], learned), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            tower(ids[:, :20], learned.expand(3, 4, 32)), expected, rtol=0, atol=1e-6
        )
    learned.requires_grad_()
    tower(ids[:, :20], learned).square().sum().backward()
    assert (learned.grad.abs().sum(1) > 0).all()


def test_what_follows_the_end_does_not_matter():
    tower, ids = text_tower(), texts()
    with torch.no_grad():
        expected = tower(ids)
        noisy = torch.where(
            ids.cumsum(1) >= ids.sum(1, keepdim=True), torch.randint(1, 9_999, ids.shape), ids
        )
        noisy = noisy.scatter(1, ids.argmax(1, keepdim=True), 49_407)
        assert not torch.equal(noisy, ids)
        torch.testing.assert_close(tower(noisy), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            tower(ids[:, : ids.argmax(1).max() + 1]), expected, rtol=0, atol=1e-6
        )
        assert not torch.allclose(
            tower(torch.where(ids == ids[0, 1], ids + 1, ids))[0], expected[0], atol=1e-3
        )


def test_a_text_tower_has_the_tokenizers_vocabulary():
    tower = text_tower(vocab=514)
    assert tower(torch.tensor([[512, 5, 513, 0]])).shape == (1, 24)


def kept_bytes(model, x):
    """Storage that the backward pass keeps, parameters and the input aside."""
    storages, own = {}, {p.untyped_storage().data_ptr() for p in (*model.parameters(), x)}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    return y, sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_gives_the_same_gradients_with_less_memory(precision):
    torch.manual_seed(0)
    model, x = build_image_tower("vit_tiny", 32), IMAGES
    target = torch.randn(4, model.num_features)
    grads, kept = [], []
    for model.checkpoint_blocks in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y, size = kept_bytes(model, x)
        (y.float() * target).sum().backward()
        kept.append(size)
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert kept[1] < kept[0] / 4
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0 and torch.equal(grad, grads[1][name]), name
    ids, tower = texts(), text_tower()
    for tower.checkpoint_blocks in (False, True):
        tower.zero_grad()
        tower(ids).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in tower.named_parameters()})
    assert all(torch.equal(grad, grads[3][name]) for name, grad in grads[2].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_residual_stream_and_normalization_in_fp32(small, dtype):
    torch.manual_seed(0)
    model = randomize(build_clip("small", 32))
    exact, seen = outputs(model, IMAGES, texts()), []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _, x, y: seen.extend([x[0].dtype, y.dtype]))
    with torch.autocast("cpu", dtype):
        near = [model.visual(IMAGES), model.text(texts()), model(IMAGES, texts())]
        assert near[0].dtype == near[1].dtype == dtype and near[2].dtype == torch.float32
        near[2].logsumexp(1).sum().backward()
    assert set(seen) == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    step = torch.finfo(dtype).eps
    for a, b in zip(near, exact, strict=True):
        assert (a.float() - b).norm() < 4 * step * b.norm()


def test_cosine_logits_are_fp32_under_autocast():
    features, classes = torch.randn(5, 16).double(), torch.randn(3, 16).double()
    expected = 100 * nn.functional.cosine_similarity(features[:, None], classes[None], dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        got = cosine_logits(features.float(), classes.float(), torch.tensor(100.0))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


def test_the_first_temperature_and_the_tiny_tower(small):
    assert math.isclose(build_clip("small", 32).logit_scale.exp().item(), 1 / 0.07, rel_tol=1e-6)
    torch.manual_seed(0)
    tower = build_image_tower("vit_tiny", 32)
    assert tower.activation == "gelu" and tower.num_features == 192
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    x[y == 1, 0, :8] += 1
    head = nn.Linear(192, 2)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], 1e-3)
    for _ in range(10):
        loss = nn.functional.cross_entropy(head(tower(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    with pytest.raises(InputError, match="--image-size 4: "):
        build_image_tower("vit_tiny", 4)


def test_a_saved_model_is_read_again(tmp_path, small):
    torch.manual_seed(0)
    model = randomize(build_clip("small", 32, "gelu"))
    checkpoint.save(tmp_path / "w.pt", model.state_dict())
    again, _ = read_clip(tmp_path / "w.pt", "small", 32, "gelu")
    for a, b in zip(outputs(again, IMAGES, texts()), outputs(model, IMAGES, texts()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_full_tuning_of_vit_b_16_with_checkpointing_fits_12_gib():
    model = build_image_tower("vit_b_16", 224).cuda()
    model.checkpoint_blocks = True
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, momentum=0.9)
    x = torch.randn(8 * 16 * 2, 3, 224, 224, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite() and torch.cuda.max_memory_allocated() < 12 * 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_cpus_features(dtype):
    torch.manual_seed(0)
    model = randomize(build_clip("vit_b_32"))
    x, ids = torch.randn(2, 3, 224, 224), texts()
    exact = outputs(model, x, ids)
    model.cuda()
    with torch.autocast("cuda", dtype):
        near = outputs(model, x.cuda(), ids.cuda())
    for a, b in zip(near, exact, strict=True):
        assert (a.float().cpu() - b).norm() < 8 * torch.finfo(dtype).eps * b.norm()
