"""Clips to logits: a frame network whose blocks exchange channels in time.

TSM, Lin et al. 2019, arXiv:1811.08383.

The shift is a function that the script hands in; no module is wrapped, so the backbone keeps the
keys of its published weights. Sites are the blocks with a shortcut (`shift_sites`), attention
blocks excepted:

    residual    the branch reads the shifted map, the shortcut the map itself; shifting both would
                lose channels of the frame for good
    expand      the branch's expansion convolution reads the shifted map, so that one kernel does
                both. Where no depthwise convolution comes before it, this is `residual`; elsewhere
                it differs at a clip's first and last frame only, whose zeros come after instead of
                before that convolution's normalization
    none        no shift: a frame network and an average over frames

With `fold_div` 8 an eighth of the channels comes from the next frame and an eighth from the
previous one: 2/8 move. With 4 it is half of them. Under direction `past` only the eighth, or
quarter, from the previous frame moves. None of this adds FLOPs; it adds memory traffic.

Sequences longer than a clip. Windows of `n_segment` frames, scored one by one, are what training
saw: every window starts, and with direction `both` ends, with zeros for its missing neighbors. A
stream, or a forward pass over all T frames, has these zeros at the sequence's ends only, and a
frame then depends on as many earlier frames as there are sites. The two scores differ; the averaged
windows are the ones to trust for a model trained on windows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import weights
from common.errors import InputError
from common.models.heads import TemporalHead
from common.models.mobilenet_v4 import NUM_FEATURES, MobileNetV4, normalization, shift_sites
from common.run import checkpoint

PLACEMENTS = ("residual", "expand", "none")


@dataclass(frozen=True)
class Shift:
    """Where and how frames exchange channels.

    Args:
        placement: one of PLACEMENTS.
        kernel: `kernels.temporal_shift` for `residual`, `kernels.shift_conv1x1` for `expand`,
            anything for `none`; functools.partial binds its `impl`.
        n_segment: frames of a clip.
        fold_div, direction, padding: the kernel's.
    """

    placement: str
    kernel: Callable | None
    n_segment: int
    fold_div: int
    direction: str
    padding: str

    def hooks(self, n_segment: int) -> tuple[Callable | None, Callable | None]:
        """`shift` and `shift_conv` of `MobileNetV4.feature_map`, for clips of `n_segment`."""
        options = {"fold_div": self.fold_div, "direction": self.direction, "padding": self.padding}

        def shift(x: Tensor) -> Tensor:
            return self.kernel(x, n_segment, **options)

        def shift_conv(x: Tensor, weight: Tensor) -> Tensor:
            return self.kernel(x, weight, None, n_segment, **options)

        if self.placement == "residual":
            return shift, None
        if self.placement == "expand":
            return None, shift_conv
        return None, None


class ClipModel(nn.Module):
    """Clips to logits (n, num_classes) and the share of each frame in them (n, T).

    Clips are (n, T, 3, s, s), or their frames (n * n_segment, 3, s, s); the shares sum to 1. Pixels
    are normalized floats. T of five-dimensional clips may differ from `n_segment`. The head works
    in its weights' precision, fp32, under autocast too: scores of 8 bits would tie.

    Args:
        backbone: without a classifier.
        shift: see `Shift`.
        aggregate, num_classes: see `TemporalHead`.
        dropout: probability, of a feature of a frame, or with `dropout2d` of a channel of its last
            map (Tompson et al. 2015, arXiv:1411.4280).
    """

    def __init__(
        self,
        backbone: MobileNetV4,
        shift: Shift,
        *,
        aggregate: str,
        dropout: float,
        dropout2d: bool,
        num_classes: int,
    ):
        super().__init__()
        if shift.placement not in PLACEMENTS:
            raise ValueError(f"placement={shift.placement!r}, allowed are {', '.join(PLACEMENTS)}")
        self.backbone = backbone
        self.shift = shift
        self.dropout = dropout
        self.dropout2d = dropout2d
        self.head = TemporalHead(NUM_FEATURES, num_classes, aggregate)
        self.frozen_bn: list[str] = []

    def train(self, mode: bool = True) -> "ClipModel":
        super().train(mode)
        for name in self.frozen_bn:
            self.get_submodule(name).eval()
        return self

    def frame_features(self, frames: Tensor, shift=None, shift_conv=None) -> Tensor:
        """Frames (m, 3, s, s) to features (m, 1280), dropout included."""
        maps = self.backbone.feature_map(frames, shift, shift_conv)
        if self.dropout2d:
            return self.backbone.pool(F.dropout2d(maps, self.dropout, self.training))
        return F.dropout(self.backbone.pool(maps), self.dropout, self.training)

    def is_frozen(self, name: str) -> bool:
        """Whether `freeze_bn` has frozen the parameter of that name."""
        return name.rpartition(".")[0] in self.frozen_bn

    def features(self, frames: Tensor) -> Tensor:
        """Features (n, n_segment, 1280) of the frames (n * n_segment, 3, s, s) of clips."""
        length = self.shift.n_segment
        return self.frame_features(frames, *self.shift.hooks(length)).unflatten(0, (-1, length))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        features = self.head_input(clips)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)

    def with_frames(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of clips, and those of their frames (n, T, num_classes), whose weighted mean
        they are.
        """
        features = self.head_input(clips)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)[0], self.head.classifier(features)

    def head_input(self, clips: Tensor) -> Tensor:
        """Features (n, T, 1280) of clips, in the precision of the head."""
        n_segment = clips.shape[1] if clips.dim() == 5 else self.shift.n_segment
        frames = clips.flatten(0, 1) if clips.dim() == 5 else clips
        features = self.frame_features(frames, *self.shift.hooks(n_segment))
        return features.to(self.head.classifier.weight.dtype).unflatten(0, (-1, n_segment))

    def describe(self) -> str:
        """One line: where the shift sits and how much it moves."""
        shift = self.shift
        if shift.placement == "none":
            return "shift none"
        widths = [block.pw_proj.conv.out_channels for block in shift_sites(self.backbone).values()]
        folds = 2 if shift.direction == "both" else 1
        moved = folds * sum(width // shift.fold_div for width in widths) / sum(widths)
        return (
            f"shift {shift.placement} at {len(widths)} blocks, {shift.n_segment} frames,"
            f" fold_div {shift.fold_div}, direction {shift.direction}, padding {shift.padding}:"
            f" {moved:.0%} of their channels move"
        )


def grad_cam(layer: nn.Module, logits: Callable[[], Tensor]) -> Tensor:
    """Where the map of a layer speaks for an answer: (n, h, w), not below 0.

    Selvaraju et al., Grad-CAM, arXiv:1610.02391: its channels, weighted by the mean of their
    gradient.

    Args:
        layer: its output is (n, channels, h, w).
        logits: runs the network once, and gives the logits that are looked for; they are summed.
    """
    maps = []

    def keep(_, inputs, output: Tensor) -> Tensor:
        maps.append(output.detach().float().requires_grad_())
        return maps[0]

    hook = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            (slopes,) = torch.autograd.grad(logits().sum(), maps)
    finally:
        hook.remove()
    return (slopes.mean((2, 3), keepdim=True) * maps[0].detach()).sum(1).clamp(min=0)


def start_weights(args) -> tuple[dict[str, Tensor] | None, tuple]:
    """The backbone's weights in --weights, and the (mean, std) of pixels that they expect.

    Those of a run come with the run's own.

    Raises:
        InputError: the file cannot be read, or is another script's.
    """
    if args.weights is None:
        return None, normalization(args.backbone)
    weights.locate(args.weights, args.backbone, {})  # nothing is published by name
    state = weights.read(args.weights)
    backbone = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }
    if backbone:
        model_spec = checkpoint.load_selected(args.weights)["model_spec"]
        if model_spec["script"] != "tsm":
            raise InputError(
                f"{args.weights} is of train_{model_spec['script']}.py; give a run of this script"
            )
        return backbone, model_spec["pixels"]
    return state, normalization(args.backbone, args.weights)


def freeze_bn(model: ClipModel, share: float) -> list[str]:
    """Freeze the first round(share * n) of the backbone's n BatchNorm layers, as they run.

    Their running statistics normalize and stay, and their scales and shifts are not trained,
    whatever `train()` says. Call it after `dist.sync_batchnorm`, which makes new layers, and before
    the optimizer is built.

    Returns:
        Their names.
    """
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    model.frozen_bn = layers[: round(share * len(layers))]
    for name in model.frozen_bn:
        model.get_submodule(name).requires_grad_(False)
    model.train(model.training)
    return model.frozen_bn


class Stream:
    """A model that was trained with direction `past`, run frame by frame.

    Per site the previous frame's fold is kept, and of the aggregation a running softmax: the memory
    does not grow with the sequence. After t frames the logits are those of the model for one clip
    of these t frames.

    Args:
        model: in evaluation mode.
        step: `kernels.shift_step`.

    Raises:
        InputError: a model that reads later frames.
    """

    def __init__(self, model: ClipModel, step: Callable):
        shift = model.shift
        causal = (shift.direction, shift.padding) == ("past", "zero")
        if shift.placement != "none" and not causal:
            raise InputError(
                "a stream needs a model trained with --direction past --padding zero:"
                f" this one has {shift.direction} and {shift.padding}"
            )
        assert not model.training, "BatchNorm would use the statistics of one frame"
        self.model = model
        self.step = step
        self.folds: list[Tensor | None] = [None] * len(shift_sites(model.backbone))
        self.peak = self.total = self.features = None

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the next frame of n streams (n, 3, s, s).

        Returns logits (n, num_classes) of all frames so far and this frame's score (n,); a softmax
        over the scores of a sequence gives the frames' shares.
        """
        folds = iter(self.folds)
        self.folds = []

        def shift(x: Tensor) -> Tensor:
            shifted, fold = self.step(x, next(folds), fold_div=self.model.shift.fold_div)
            self.folds.append(fold)
            return shifted

        def shift_conv(x: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(shift(x), weight)

        hooks = {"residual": (shift, None), "expand": (None, shift_conv), "none": (None, None)}
        features = self.model.frame_features(frames, *hooks[self.model.shift.placement])
        head = self.model.head
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(head.classifier.weight.dtype)
            score = head.score(features)
            if self.total is None:
                self.peak = score
                self.total = torch.ones_like(score)
                self.features = features
            else:
                peak = torch.maximum(self.peak, score)
                old, new = (self.peak - peak).exp(), (score - peak).exp()
                self.peak = peak
                self.total = self.total * old + new
                self.features = self.features * old.unsqueeze(1) + features * new.unsqueeze(1)
            return head.classifier(self.features / self.total.unsqueeze(1)), score


class Memory(NamedTuple):
    """Bytes of a training step; the sum is a floor, to which the device adds its workspaces."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    def describe(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self._asdict().items())
        return f"{sum(self) / 1e9:.2f} GB ({parts})"


def training_memory(
    model: ClipModel, frames: int, size: int, dtype: torch.dtype, *, states: int = 2
) -> Memory:
    """What a training step of the model will hold at its peak, between forward and backward.

    The backbone runs once without data (device `meta`), and what autograd would keep is
    counted. With checkpointed blocks that is every block's input, and everything within the largest
    block.

    Args:
        frames: of one chunk on one device: clips times their frames.
        size: side of a frame, pixels.
        dtype: of autocast, or fp32.
        states: tensors that the optimizer keeps per parameter: 2 for AdamW.
    """
    with torch.device("meta"):
        backbone = MobileNetV4(model.backbone.variant).to(dtype)
        x = torch.empty(frames, 3, size, size, dtype=dtype)
    weights_and_buffers = [*backbone.parameters(), *backbone.buffers()]
    own_storages = {tensor.untyped_storage()._cdata for tensor in weights_and_buffers}
    kept: dict[int, int] = {}  # bytes by storage

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own_storages:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def give_back(tensor: Tensor) -> Tensor:
        return tensor

    inputs = {}
    inside = []  # bytes that each block keeps
    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        x = backbone.stem(x)
        of_stem = dict(kept)
        for block in (block for stage in backbone.blocks for block in stage):
            storage = x.untyped_storage()
            bytes_before = sum(kept.values())
            inputs[storage._cdata] = storage.nbytes()
            x = block(x)
            inside.append(sum(kept.values()) - bytes_before)
        if model.backbone.checkpoint_blocks:
            kept = of_stem | inputs
        features = backbone.pool(x)
    # The graph, and so every storage that was counted, lives until here.
    assert features.requires_grad
    activations = sum(kept.values()) + (max(inside) if model.backbone.checkpoint_blocks else 0)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if dtype != torch.float32:
        # Autocast keeps a copy of the weights and the frames as they came.
        activations += sum(p.numel() for p in backbone.parameters()) * dtype.itemsize
        activations += frames * 3 * size**2 * 4
    return Memory(parameters, trained, states * trained, activations)
