"""CLIP's image and text towers, and published weights in the layouts that people store them in.

Radford et al. 2021, arXiv:2103.00020.

A state dict has OpenAI's keys for the image tower (`visual.*`) and the same with the prefix `text.`
for the text tower; `part_of` finds CLIP, or its image tower alone, in a larger model's, and
`from_published` maps OpenAI's, open_clip's and Hugging Face's names to these.

Activation. OpenAI trained with x * sigmoid(1.702 x), most others with GELU. Weights of the one run
with the other give features that look right and are not, so `read_clip` takes the activation from
the source or from its caller, and never guesses.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import reading, weights
from common.errors import InputError, first_few, plural, printable
from common.run.checkpoint import load_weights

# Of the pixels in [0, 1] that published weights expect.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CONTEXT = 77
# CLIP trains from ln 14 = 2.7 up to ln 100 = 4.6; stored otherwise it is 14, 100 or 0.07, 0.01.
_LOG_SCALES = (1.0, 7.0)
VOCAB = 49_408


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        # The same function as a SiLU, which keeps one tensor for the backward pass instead of
        # three.
        return F.silu(1.702 * x) / 1.702


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Variant(NamedTuple):
    """One row of the table; a `text_width` of 0 means no text tower."""

    width: int
    layers: int
    heads: int
    patch: int
    embed_dim: int
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    activation: str = "quick_gelu"


VARIANTS = {
    "vit_b_32": Variant(768, 12, 12, 32, 512),
    "vit_b_16": Variant(768, 12, 12, 16, 512),
    "vit_l_14": Variant(1024, 24, 16, 14, 768, text_width=768, text_heads=12),
    # For training from scratch on small images: no weights of it are published.
    "vit_tiny": Variant(192, 6, 3, 8, 192, text_width=0, activation="gelu"),
}
# Files of https://openaipublic.azureedge.net/clip/models/, as openai/CLIP lists them. The folder of
# each is its SHA-256.
_OPENAI_FILES = {
    "vit_b_32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "vit_b_16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "vit_l_14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
}
OPENAI = {
    name: weights.Published(
        f"https://openaipublic.azureedge.net/clip/models/{file}", file.partition("/")[0]
    )
    for name, file in _OPENAI_FILES.items()
}


class Attention(nn.Module):
    """Multi-head self-attention; keys `in_proj_weight`, `in_proj_bias`, `out_proj.*`."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        # (n, heads, l, width / heads) each
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm layer; keys `ln_1`, `attn`, `ln_2`, `mlp.c_fc`, `mlp.c_proj`."""

    def __init__(self, width: int, heads: int, activation: str):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.act = ACTIVATIONS[activation]()
        self.mlp.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Layers over (n, l, width); keys `resblocks.N.*`.

    With `recompute` only their inputs are kept for the backward pass.
    """

    def __init__(self, width: int, layers: int, heads: int, activation: str):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_proj):
                nn.init.normal_(linear.weight, std=(2 * width * layers) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, causal: bool, recompute: bool) -> Tensor:
        for block in self.resblocks:
            if recompute:  # no layer draws random numbers: no generator's state to keep
                x = checkpoint(block, x, causal, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, causal)
        return x


class ImageTower(nn.Module):
    """Maps normalized images (n, 3, image_size, image_size) to features (n, embed_dim).

    The features are not of unit length. The residual stream and with it every normalization stay
    fp32 under autocast.

    Args:
        image_size: side in pixels, a multiple of the patch.
        embed_dim: width of the features.
        activation: a key of ACTIVATIONS.

    `checkpoint_blocks = True` keeps the layers' inputs only and computes the rest a second time in
    the backward pass.
    """

    def __init__(
        self,
        image_size: int,
        *,
        width: int,
        layers: int,
        heads: int,
        patch: int,
        embed_dim: int,
        activation: str,
    ):
        super().__init__()
        if image_size < patch or image_size % patch:
            raise InputError(
                f"--image-size {image_size}: this tower takes multiples of its patch"
                f" of {patch} pixels"
            )
        self.image_size = image_size
        self.num_features = embed_dim
        self.activation = activation
        self.checkpoint_blocks = False
        scale = width**-0.5
        positions = 1 + (image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (3, self.image_size, self.image_size):
            expected = f"(n, 3, {self.image_size}, {self.image_size})"
            raise ValueError(f"images of shape {tuple(x.shape)}, expected {expected}")
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (n, patches, width)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1)
        x = x + self.positional_embedding
        x = self.transformer(self.ln_pre(x), False, self.checkpoint_blocks)
        return self.ln_post(x[:, 0]) @ self.proj


class TextTower(nn.Module):
    """Maps token ids (n, l), l <= `context`, to features (n, embed_dim), not of unit length.

    The feature is read at the end token, which is the highest id and so found as the first maximum
    of a row. Attention is causal: what follows the end token does not matter, and rows may be cut
    behind the longest text.

    Args:
        vocab: number of ids, the tokenizer's `vocab_size`.
        context: positions.
        activation: a key of ACTIVATIONS.

    `checkpoint_blocks` as in `ImageTower`.
    """

    def __init__(
        self,
        vocab: int = VOCAB,
        context: int = CONTEXT,
        *,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        activation: str,
    ):
        super().__init__()
        self.num_features = embed_dim
        self.activation = activation
        self.checkpoint_blocks = False
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, width))
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids: Tensor, learned: Tensor | None = None) -> Tensor:
        """Features of token ids (n, l), int64.

        Args:
            ids: start token, words, end token, anything.
            learned: (m, width) or (n, m, width) vectors that stand between the start token and the
                words (CoOp, Zhou et al. 2022, arXiv:2109.01134). They take m positions from the
                words: give ids of at most context - m.
        """
        x = self.token_embedding(ids)
        end = ids.argmax(1)
        if learned is not None:
            learned = learned.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], learned, x[:, 1:]], 1)
            end = end + learned.shape[1]
        x = x + self.positional_embedding[: x.shape[1]]
        x = self.ln_final(self.transformer(x, True, self.checkpoint_blocks))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection


class CLIP(nn.Module):
    """Both towers, or the image tower alone (`text` None), and the temperature.

    Keys `visual`, `text` and `logit_scale`, the logarithm of the factor.
    """

    def __init__(self, visual: ImageTower, text: TextTower | None):
        super().__init__()
        self.visual = visual
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def activation(self) -> str:
        return self.visual.activation

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Logits (n, k) of images (n, 3, s, s) over texts (k, l)."""
        return cosine_logits(self.visual(images), self.text(ids), self.logit_scale.exp())


def cosine_logits(features: Tensor, classes: Tensor, scale: Tensor | float) -> Tensor:
    """`scale` times the cosines of features (n, d) with class features (k, d): (n, k) fp32.

    It is fp32 under autocast too, for a scale of 100 would leave bf16 cosines steps of a half.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = F.normalize(features.float(), dim=-1)
        classes = F.normalize(classes.float(), dim=-1)
        return scale * features @ classes.T


def build_image_tower(name: str, image_size: int, activation: str | None = None) -> ImageTower:
    """The image tower of a row of VARIANTS with random weights; `activation` None: the row's.

    Raises:
        InputError: an unknown name, or a size that the patch does not divide.
    """
    variant = _variant(name)
    return ImageTower(
        image_size,
        width=variant.width,
        layers=variant.layers,
        heads=variant.heads,
        patch=variant.patch,
        embed_dim=variant.embed_dim,
        activation=activation or variant.activation,
    )


def build_clip(
    name: str, image_size: int = 224, activation: str | None = None, vocab: int = VOCAB
) -> CLIP:
    """Both towers of a row of VARIANTS with random weights; `activation` None: the row's.

    Raises:
        InputError: an unknown name, one without a text tower, or a size that the patch does not
            divide.
    """
    variant = _variant(name)
    if not variant.text_width:
        allowed = ", ".join(row for row in VARIANTS if VARIANTS[row].text_width)
        raise InputError(f"{name} has no text tower; allowed are {allowed}")
    text = TextTower(
        vocab,
        width=variant.text_width,
        layers=variant.text_layers,
        heads=variant.text_heads,
        embed_dim=variant.embed_dim,
        activation=activation or variant.activation,
    )
    return CLIP(build_image_tower(name, image_size, activation), text)


def _variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise InputError(f"--backbone {name}: allowed are {', '.join(VARIANTS)}")
    return VARIANTS[name]


_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
_OPENAI = "input_resolution"  # one of three numbers that OpenAI's archives hold, and no others
_UNUSED = (_OPENAI, "context_length", "vocab_size", "attn_mask", "position_ids")
# How the names of a layout begin. The layouts are told by what stands before "class_embedding".
_LAYOUTS = {
    "visual.": ("visual.", "text.", *_TEXT, "logit_scale", *_UNUSED),
    "vision_model.embeddings.": (
        "vision_model.", "visual_projection.", "text_model.", "text_projection.", "logit_scale",
    ),
    "": (
        "class_embedding", "conv1.", "positional_embedding", "ln_pre.", "transformer.", "ln_post.",
        "proj",
    ),
}  # fmt: skip
# Of CLIP-CAER and DFER-CLIP, which keep OpenAI's CLIP so, beside their own parts.
_DFER_CLIP = ("clip_model_.", "prompt_learner.")
_HUGGING_FACE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "text.token_embedding.",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.": "text.ln_final.",
    "text_model.encoder.layers.": "text.transformer.resblocks.",
    "text_projection.weight": "text.text_projection",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def part_of(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """CLIP, or its image tower alone, in a model that may have more parts.

    Returns its state dict, without what the model puts before the names (Lightning's `model.` for
    instance) but with `visual.` before those of an image tower, and the names that are not its own.

    Raises:
        InputError: it holds none or several.
    """
    ends = "class_embedding"
    roots = [name.removesuffix(ends) for name in state if f".{name}".endswith(f".{ends}")]
    for layout in _LAYOUTS:
        found = [root.removesuffix(layout) for root in roots if root.endswith(layout)]
        if found:
            break
    else:
        first = next(iter(state), "none")
        raise InputError(f"holds no CLIP: no name ends with {ends}, the first is {first!r:.80}")
    if len(found) > 1:
        raise InputError(
            f"holds several CLIPs, below {', '.join(found)}: store the one to start from alone"
        )
    own = {name: name.removeprefix(found[0]) for name in state if name.startswith(found[0])}
    own = {name: short for name, short in own.items() if short.startswith(_LAYOUTS[layout])}
    tower = "visual." if layout == "" else ""
    part = {tower + short: state[name] for name, short in own.items()}
    return part, [name for name in state if name not in own]


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under this module's keys, floats as fp32.

    It may have OpenAI's, open_clip's or Hugging Face's layout. Names that belong to no layout stay
    as they are, for a strict load to refuse.
    """
    state = {name: tensor for name, tensor in state.items() if name.split(".")[-1] not in _UNUSED}
    if _is_hugging_face(state):
        state = _from_hugging_face(state)
    else:
        state = {
            f"text.{name}" if name.startswith(_TEXT) else name: tensor
            for name, tensor in state.items()
        }
    if state.get("logit_scale", torch.tensor(0)).shape == (1,):
        state["logit_scale"] = state["logit_scale"][0]
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def _is_hugging_face(state: dict[str, Tensor]) -> bool:
    return any(name.startswith("vision_model.") for name in state)


def _from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        parts = [state.get(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        complete = all(part is not None and part.shape == tensor.shape for part in parts)
        if ".self_attn.q_proj." in name and complete:
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            tensor = torch.cat(parts)
        elif ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if name.endswith("_projection.weight") and tensor.ndim == 2:
            tensor = tensor.T
        for theirs, ours in _HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def source_activation(state: dict[str, Tensor], path: str | Path) -> tuple[str | None, str]:
    """The activation that a file of weights was trained with, or None, and how that is known.

    OpenAI's archives are known by numbers in them, Hugging Face's files by the `config.json` beside
    them, open_clip's by `open_clip_config.json` beside them or by `quickgelu` in the name of the
    file or its folder.

    Args:
        state: what `weights.read` gave.

    Raises:
        InputError: a configuration cannot be read or names another activation.
    """
    path = Path(path)
    if _OPENAI in state:
        return "quick_gelu", "OpenAI's archive"
    if _is_hugging_face(state):
        file = path.parent / "config.json"
        if not file.exists():
            return None, f"Hugging Face's config.json is not beside {path.name}"
        config = _read_config(file)
        activations = {
            (config.get(part) or {}).get("hidden_act", "quick_gelu")
            for part in ("vision_config", "text_config")
        }
        if len(activations) > 1 or not activations <= ACTIVATIONS.keys():
            raise InputError(
                f"{file}: hidden_act is {', '.join(sorted(map(str, activations)))};"
                f" allowed is one of {', '.join(ACTIVATIONS)} for both towers"
            )
        return activations.pop(), "config.json"
    if (path.parent / "open_clip_config.json").exists():
        config = _read_config(path.parent / "open_clip_config.json").get("model_cfg") or {}
        return "quick_gelu" if config.get("quick_gelu") else "gelu", "open_clip_config.json"
    if "quickgelu" in f"{path.parent.name}/{path.name}".lower().replace("_", ""):
        return "quick_gelu", "its name"
    return None, "neither the weights, their name nor an open_clip_config.json beside them tells it"


def _read_config(path: Path) -> dict:
    try:
        config = reading.read_settings(path)
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    parts = ("vision_config", "text_config", "model_cfg")
    tables = isinstance(config, dict) and all(
        isinstance(config.get(part), dict | None) for part in parts
    )
    if not tables:
        raise InputError(f"{path} is not a model's configuration: expected a table of tables")
    return config


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embedding (1 + g * g, width) to (1 + grid * grid, width).

    Bicubic and antialiased, the class token's row unchanged.
    """
    old = math.isqrt(len(positions) - 1)
    image = positions[1:].T.reshape(1, -1, old, old)
    image = F.interpolate(image, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:1], image[0].flatten(1).T])


def read_clip(
    path: str | Path, name: str, image_size: int = 224, activation: str | None = None
) -> tuple[CLIP, str]:
    """CLIP with the published weights in a file, in fp32, and what was done, to be logged.

    Its `text` is None where the file holds the image tower alone, and `normalized` is False where
    the weights expect pixels in [0, 1] as they are, those of DFER-CLIP and CLIP-CAER.

    Args:
        path: OpenAI's `.pt`, a plain state dict, or open_clip's or Hugging Face's `.safetensors` or
            `.bin`; or a checkpoint of a model that has CLIP, or its image tower, among its parts.
        name: a row of VARIANTS that has a text tower.
        image_size: side of the images in pixels; another one than the weights' resizes the position
            embedding.
        activation: "quick_gelu" or "gelu" where the source does not say; where it does, it must say
            the same.

    Raises:
        InputError: the file cannot be read or is of another architecture, or its activation is
            unknown or differs.
    """
    whole = weights.read(path)
    try:
        raw, others = part_of(whole)
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    if all(any(name.startswith(part) for name in whole) for part in _DFER_CLIP):
        source, origin = "quick_gelu", "the layout of DFER-CLIP"
    else:
        source, origin = source_activation(raw, path)
    if source is None and activation is None:
        raise InputError(
            f"{path}: GELU or QuickGELU? {origin}; give --activation {' or '.join(ACTIVATIONS)}"
        )
    if None not in (source, activation) and source != activation:
        raise InputError(
            f"--activation {activation}: {path} was trained with {source} ({origin});"
            " leave the flag out"
        )
    state = from_published(raw)
    with torch.device("meta"):
        model = build_clip(name, image_size, source or activation)
    if not any(key.startswith("text.") for key in state):
        model.text = None
        state.setdefault("logit_scale", torch.tensor(math.log(1 / 0.07)))
    model.to_empty(device="cpu")
    model.normalized = origin != "the layout of DFER-CLIP"
    reason = origin if source else "request"
    notes = [f"started from {path} ({len(raw)} tensors, {model.activation} by {reason})"]
    if model.text is None:
        notes.append(f"{path} holds the image tower alone, no text tower")
    if others:
        parts = first_few(list(dict.fromkeys(key.partition(".")[0] for key in others)))
        notes.append(f"{path}: {plural(len(others), 'tensor')} of other parts not used ({parts})")
    if not model.normalized:
        notes.append(f"{path}: its pixels are in [0, 1], without CLIP's mean and deviation")
    _check_patches(state, model, name, path)
    positions = state.get("visual.positional_embedding")
    grid = image_size // model.visual.conv1.kernel_size[0]
    old = 0
    if positions is not None and positions.ndim == 2:
        old = math.isqrt(max(len(positions) - 1, 0))
    if 0 < old != grid and len(positions) == 1 + old * old:
        state["visual.positional_embedding"] = resize_positions(positions, grid)
        notes.append(
            f"{path}: the position embedding is resized from {old}x{old} to {grid}x{grid} patches"
        )
    load_weights(model, state, path)
    low, high = _LOG_SCALES
    if not low <= model.logit_scale.item() <= high:
        raise InputError(
            f"{path}: logit_scale is {model.logit_scale.item():.4g}; allowed is the factor's"
            f" logarithm, {low:g} to {high:g}: store that"
        )
    return model, "\n".join(map(printable, notes))


def _check_patches(state: dict[str, Tensor], model: CLIP, name: str, path: str | Path) -> None:
    stem = state.get("visual.conv1.weight")
    if stem is None or stem.shape == model.visual.conv1.weight.shape:
        return
    fitting = [
        row
        for row, variant in VARIANTS.items()
        if stem.shape == (variant.width, 3, variant.patch, variant.patch) and variant.text_width
    ]
    hint = f"give --backbone {fitting[0]}" if fitting else f"allowed are {', '.join(VARIANTS)}"
    raise InputError(f"{path} holds no {name}: its patches are {tuple(stem.shape)}; {hint}")
