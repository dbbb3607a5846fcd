"""MobileNetV4 with timm's state-dict keys, built from one table.

Qin et al. 2024, arXiv:2404.10518.

A stage of the table is its width and its blocks, `*n` repeats a block:

    c3s2        convolution 3x3, stride 2 (`o96`: 96 channels instead of the stage's)
    f3e4s2      fused inverted bottleneck: convolution 3x3 to 4 times the width, stride 2, then 1x1
                to the stage's width
    a3k5e4s2    universal inverted bottleneck: depthwise 3x3 before the expansion by 4, depthwise
                5x5 with stride 2 after it; a0 and k0 stand for no convolution
    h4d64v2     multi-query attention: 4 heads of 64 channels, keys and values at stride 2

Where nothing says otherwise the stride is 1. All modules are registered in the order in which they
run.

Pixels. The published weights expect ImageNet's mean and standard deviation, but for conv_small_035,
conv_small_050 and the checkpoint e3600_r256 of conv_small, which expect 0.5 for both: see
`normalization`.
"""

import contextlib
import math
import re
from collections import OrderedDict
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.amp import frozen_running_stats
from common.data.augment import IMAGENET_MEAN, IMAGENET_STD
from common.errors import InputError
from common.run.checkpoint import load_weights

NUM_FEATURES = 1280
LAYER_SCALE = 1e-5

_SMALL = (
    (32, "c3s2 c1"),
    (64, "c3s2o96 c1"),
    (96, "a5k5e3s2 a0k3e2*4 a3k0e4"),
    (128, "a3k3e6s2 a5k5e4 a0k5e4 a0k5e3 a0k3e4*2"),
    (960, "c1"),
)
_MEDIUM_STEM = ((48, "f3e4s2"), (80, "a3k5e4s2 a3k3e2"))
_LARGE_STEM = ((48, "f3e4s2"), (96, "a3k5e4s2 a3k3e4"))


class Variant(NamedTuple):
    """One row of the table; `widths` multiplies the stages' widths, not the stem's."""

    stem: int
    stages: tuple
    widths: float = 1.0
    layer_scale: bool = False
    act: type[nn.Module] = nn.ReLU


VARIANTS = {
    "conv_small_035": Variant(32, _SMALL, 0.35),
    "conv_small_050": Variant(32, _SMALL, 0.5),
    "conv_small": Variant(32, _SMALL),
    "conv_medium": Variant(
        32,
        (
            *_MEDIUM_STEM,
            (160, "a3k5e6s2 a3k3e4*2 a3k5e4 a3k3e4 a3k0e4 a0k0e2 a3k0e4"),
            (256, "a5k5e6s2 a5k5e4 a3k5e4*2 a0k0e4 a3k0e4 a3k5e2 a5k5e4 a0k0e4*2 a5k0e2"),
            (960, "c1"),
        ),
    ),
    "conv_large": Variant(
        24,
        (
            *_LARGE_STEM,
            (192, "a3k5e4s2 a3k3e4*3 a3k5e4 a5k3e4*5 a3k0e4"),
            (512, "a5k5e4s2 a5k5e4*3 a5k0e4 a5k3e4 a5k0e4*2 a5k3e4 a5k5e4 a5k0e4*3"),
            (960, "c1"),
        ),
    ),
    "hybrid_medium": Variant(
        32,
        (
            *_MEDIUM_STEM,
            (
                160,
                "a3k5e6s2 a0k0e2 a3k3e4 a3k5e4 h4d64v2 a3k3e4 h4d64v2 a3k0e4 h4d64v2 a3k3e4"
                " h4d64v2 a3k0e4",
            ),
            (
                256,
                "a5k5e6s2 a5k5e4 a3k5e4*2 a0k0e2 a3k5e2 a0k0e2 a0k0e4 "
                "h4d64 a3k0e4 h4d64 a5k5e4 h4d64 a5k0e4 h4d64 a5k0e4",
            ),
            (960, "c1"),
        ),
        layer_scale=True,
    ),
    "hybrid_large": Variant(
        24,
        (
            *_LARGE_STEM,
            (
                192,
                "a3k5e4s2 a3k3e4*3 a3k5e4 a5k3e4*2 h8d48v2 a5k3e4 h8d48v2 a5k3e4 h8d48v2 a5k3e4"
                " h8d48v2 a3k0e4",
            ),
            (
                512,
                "a5k5e4s2 a5k5e4*3 a5k0e4 a5k3e4 a5k0e4*2 a5k3e4 a5k5e4 "
                "h8d64 a5k0e4 h8d64 a5k0e4 h8d64 a5k0e4 h8d64 a5k0e4",
            ),
            (960, "c1"),
        ),
        layer_scale=True,
        act=nn.GELU,
    ),
}


def _round(width: float) -> int:
    """The nearest multiple of 8, or the next one where that takes more than a tenth away."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _conv(
    width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        width_in, width_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def _activation(act: type[nn.Module]) -> nn.Module:
    # In place where backward reads the result: the normalized map before it is then never kept.
    return act(inplace=True) if act is nn.ReLU else act()


class LayerScale(nn.Module):
    """One factor a channel, fp32 also under autocast: 1e-5 has few digits left in fp16."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gamma.view(-1, 1, 1)).to(x.dtype)


class Conv(nn.Module):
    """Convolution, normalization, activation; keys `conv`, `bn1`."""

    def __init__(
        self, width_in: int, width_out: int, kernel: int, stride: int, act: type[nn.Module]
    ):
        super().__init__()
        self.conv = _conv(width_in, width_out, kernel, stride)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.act = _activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn1(self.conv(x)))


class Fused(nn.Module):
    """Fused inverted bottleneck without a shortcut; keys `conv_exp`, `bn1`, `conv_pwl`, `bn2`."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: int,
        expansion: int,
        stride: int,
        act: type[nn.Module],
    ):
        super().__init__()
        inner = _round(width_in * expansion)
        self.conv_exp = _conv(width_in, inner, kernel, stride)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act = _activation(act)
        self.conv_pwl = _conv(inner, width_out, 1)
        self.bn2 = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pwl(self.act(self.bn1(self.conv_exp(x)))))


class ConvNorm(nn.Module):
    """Part of a universal inverted bottleneck; keys `conv`, `bn`."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: int,
        stride: int,
        groups: int,
        act: nn.Module | None,
    ):
        super().__init__()
        self.conv = _conv(width_in, width_out, kernel, stride, groups)
        self.bn = nn.BatchNorm2d(width_out)
        self.act = act

    def forward(self, x: Tensor, convolve=None) -> Tensor:
        x = self.bn(self.conv(x) if convolve is None else convolve(x, self.conv.weight))
        return x if self.act is None else self.act(x)


class UIB(nn.Module):
    """Universal inverted bottleneck; keys `dw_start`, `pw_exp`, `dw_mid`, `pw_proj`, `layer_scale`.

    `shift(x)` replaces the input of the branch, not of the shortcut; `shift_conv(x, weight)`
    replaces the expansion convolution. Every block has one, with or without a depthwise convolution
    before it.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        start: int,
        mid: int,
        expansion: int,
        stride: int,
        act: type[nn.Module],
        layer_scale: bool,
    ):
        super().__init__()
        inner = _round(width_in * expansion)
        self.skip = stride == 1 and width_in == width_out
        self.dw_start = None
        if start:
            # The stride sits on the middle convolution where there is one.
            self.dw_start = ConvNorm(
                width_in, width_in, start, 1 if mid else stride, width_in, None
            )
        self.pw_exp = ConvNorm(width_in, inner, 1, 1, 1, _activation(act))
        self.dw_mid = ConvNorm(inner, inner, mid, stride, inner, _activation(act)) if mid else None
        self.pw_proj = ConvNorm(inner, width_out, 1, 1, 1, None)
        self.layer_scale = LayerScale(width_out) if layer_scale else None

    def forward(self, x: Tensor, shift=None, shift_conv=None) -> Tensor:
        y = x if shift is None else shift(x)
        if self.dw_start is not None:
            y = self.dw_start(y)
        y = self.pw_exp(y, shift_conv)
        if self.dw_mid is not None:
            y = self.dw_mid(y)
        y = self.pw_proj(y)
        if self.layer_scale is not None:
            y = self.layer_scale(y)
        return y + x if self.skip else y


class MultiQueryAttention(nn.Module):
    """Attention over the pixels of a map whose heads share one key and one value each.

    Keys `query.proj`, `key.*`, `value.*`, `output.proj`.
    """

    def __init__(self, width: int, heads: int, head_width: int, stride: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Sequential(OrderedDict(proj=_conv(width, heads * head_width, 1)))
        self.key = self._reduced(width, head_width, stride)
        self.value = self._reduced(width, head_width, stride)
        self.output = nn.Sequential(OrderedDict(proj=_conv(heads * head_width, width, 1)))

    @staticmethod
    def _reduced(width: int, head_width: int, stride: int) -> nn.Sequential:
        layers = OrderedDict()
        if stride > 1:
            layers["down_conv"] = _conv(width, width, 3, stride, groups=width)
            layers["norm"] = nn.BatchNorm2d(width)
        layers["proj"] = _conv(width, head_width, 1)
        return nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        # With one key and value for all heads, a head's queries are just more queries: no copy of
        # keys and values.
        q = self.query(x).reshape(n, self.heads, -1, h * w).transpose(2, 3)
        q = q.reshape(n, 1, self.heads * h * w, -1)
        k = self.key(x).flatten(2).transpose(1, 2).unsqueeze(1)
        v = self.value(x).flatten(2).transpose(1, 2).unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v)  # [n, 1, heads * h * w, head width]
        y = y.reshape(n, self.heads, h * w, -1).transpose(2, 3).reshape(n, -1, h, w)
        return self.output(y)


class Attention(nn.Module):
    """Mobile multi-query attention with its shortcut; keys `norm`, `attn`, `layer_scale`."""

    def __init__(self, width: int, heads: int, head_width: int, stride: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.attn = MultiQueryAttention(width, heads, head_width, stride)
        self.layer_scale = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale(self.attn(self.norm(x)))


def _block(token: str, width_in: int, width_out: int, variant: Variant) -> nn.Module:
    parts = {letter: int(number) for letter, number in re.findall(r"([a-z])(\d+)", token)}
    stride = parts.get("s", 1)
    if "c" in parts:
        return Conv(width_in, width_out, parts["c"], stride, variant.act)
    if "f" in parts:
        return Fused(width_in, width_out, parts["f"], parts["e"], stride, variant.act)
    if "h" in parts:
        return Attention(width_in, parts["h"], parts["d"], parts.get("v", 1))
    sizes = parts["a"], parts["k"], parts["e"]
    return UIB(width_in, width_out, *sizes, stride, variant.act, variant.layer_scale)


class MobileNetV4(nn.Module):
    """Maps images (n, 3, s, s) to features (n, 1280), or to logits (n, num_classes).

    Args:
        variant: a row of VARIANTS.
        num_classes: 0 leaves `classifier` out.

    `checkpoint_blocks = True` keeps the blocks' inputs only and computes the rest a second time in
    the backward pass.
    """

    def __init__(self, variant: Variant, num_classes: int = 0):
        super().__init__()
        self.variant = variant
        self.checkpoint_blocks = False
        self.conv_stem = _conv(3, variant.stem, 3, 2)
        self.bn1 = nn.BatchNorm2d(variant.stem)
        self.act = _activation(variant.act)
        stages = []
        width = variant.stem
        for stage_width, tokens in variant.stages:
            blocks = []
            for token, count in re.findall(r"([a-z\d]+)(?:\*(\d+))?", tokens):
                other_width = re.search(r"o(\d+)", token)
                block_width = int(other_width[1]) if other_width else stage_width
                width_out = _round(block_width * variant.widths)
                for _ in range(int(count or 1)):
                    blocks.append(_block(token, width, width_out, variant))
                    width = width_out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _conv(width, NUM_FEATURES, 1)
        self.norm_head = nn.BatchNorm2d(NUM_FEATURES)
        self.classifier = nn.Linear(NUM_FEATURES, num_classes) if num_classes else None
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels * module.kernel_size[0] ** 2 // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        for module in self.modules():
            if isinstance(module, MultiQueryAttention):
                for conv in module.modules():
                    if isinstance(conv, nn.Conv2d):
                        nn.init.xavier_uniform_(conv.weight)
        if self.classifier is not None:
            bound = self.classifier.out_features**-0.5
            nn.init.uniform_(self.classifier.weight, -bound, bound)
            nn.init.zeros_(self.classifier.bias)

    def stem(self, x: Tensor) -> Tensor:
        """Images (n, 3, s, s) to the first block's input."""
        return self.act(self.bn1(self.conv_stem(x)))

    def feature_map(self, x: Tensor, shift=None, shift_conv=None) -> Tensor:
        """Images (n, 3, s, s) to maps (n, channels, s / 32, s / 32), rounded up.

        `shift(x)` and `shift_conv(x, weight)` are given to the blocks of `shift_sites`, in that
        order.
        """
        x = self.stem(x)
        for stage in self.blocks:
            for block in stage:
                hooks = (shift, shift_conv) if isinstance(block, UIB) and block.skip else ()
                if self.checkpoint_blocks:
                    x = self._recomputed(block, x, *hooks)
                else:
                    x = block(x, *hooks)
        return x

    def _recomputed(self, block: nn.Module, *inputs) -> Tensor:
        # Blocks draw no random numbers: no generator's state to keep. The compiler recomputes
        # without running the statistics' update a second time.
        options = {}
        if not torch.compiler.is_compiling():
            options["context_fn"] = partial(_recomputation, block)
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    def pool(self, x: Tensor) -> Tensor:
        """Maps of `feature_map` to features (n, 1280)."""
        x = self.conv_head(x.mean((2, 3), keepdim=True))
        return self.act(self.norm_head(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.feature_map(x))
        return x if self.classifier is None else self.classifier(x)


def _recomputation(block: nn.Module):
    """Contexts of a checkpointed block's two passes: BatchNorm counts a batch once."""
    return contextlib.nullcontext(), frozen_running_stats(block)


def build_mobilenet_v4(name: str, num_classes: int = 0) -> MobileNetV4:
    """A MobileNetV4 with random weights, initialized as timm's; `name` is one of VARIANTS.

    Raises:
        InputError: an unknown name.
    """
    if name not in VARIANTS:
        raise InputError(f"--backbone {name}: allowed are {', '.join(VARIANTS)}")
    return MobileNetV4(VARIANTS[name], num_classes)


def shift_sites(model: MobileNetV4) -> dict[str, UIB]:
    """The blocks whose branch may read a shifted map, by name, in the order in which they run."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, UIB) and module.skip
    }


def load_published(model: MobileNetV4, state: dict[str, Tensor], source) -> None:
    """Load a state dict with timm's keys; its `classifier` is dropped where the model has none.

    Raises:
        InputError: it does not fit the model; `source` names it in the message.
    """
    if model.classifier is None:
        state = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    load_weights(model, state, source)


def normalization(
    name: str, weights: str | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the pixels in [0, 1] that a variant's published weights expect.

    Of conv_small one published checkpoint, e3600_r256, wants 0.5 and the others ImageNet's values.
    The files do not say which they are, so their path must: in the file's name or a folder's.

    Args:
        name: one of VARIANTS.
        weights: path of the checkpoint; None for random weights.

    Raises:
        InputError: conv_small's weights, and a path that names none of its published checkpoints.
    """
    half = name in ("conv_small_035", "conv_small_050")
    if name == "conv_small" and weights is not None:
        half = "e3600_r256" in str(weights)
        if not half and not any(tag in str(weights) for tag in ("e2400_r224", "e1200_r224")):
            raise InputError(
                f"{weights}: conv_small's published weights differ in the pixels they expect;"
                " let the path name the checkpoint they come from: e1200_r224, e2400_r224"
                " (ImageNet's mean and std) or e3600_r256 (0.5)"
            )
    return ((0.5,) * 3, (0.5,) * 3) if half else (IMAGENET_MEAN, IMAGENET_STD)
