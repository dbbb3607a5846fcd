"""Heads that stand on a backbone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projector(num_features: int, hidden: int, dim: int) -> nn.Sequential:
    """SimCLR's projection head g(h): (n, num_features) to (n, dim).

    BatchNorm follows both linear layers; their biases, which it would subtract again, are left out.
    """
    return nn.Sequential(
        nn.Linear(num_features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, dim, bias=False),
        nn.BatchNorm1d(dim),
    )


class SimCLR(nn.Module):
    """Backbone f and projection head g: images (n, 3, s, s) to embeddings z (n, proj_dim)."""

    def __init__(self, backbone: nn.Module, proj_dim: int):
        super().__init__()
        self.backbone = backbone
        self.projector = projector(backbone.num_features, backbone.num_features, proj_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


FEATURES = ("gap", "2x2", "stages")


@torch.compiler.disable  # of hooks that are new at every call a compiled program sees the first
def pooled_maps(backbone: nn.Module, x: Tensor, features: str) -> Tensor:
    """Maps inside a backbone as features (n, width) of images (n, 3, s, s).

    Args:
        backbone: of `build_backbone`, with `stages`.
        features: `2x2` are the maps of its last stage pooled to 2x2 places, `stages` those of its
            last two stages. Of a map of a single place that place is taken.
    """
    maps = []
    names = backbone.stages if features == "stages" else backbone.stages[-1:]
    hooks = [
        backbone.get_submodule(name).register_forward_hook(lambda *io: maps.append(io[-1]))
        for name in names
    ]
    try:
        backbone.forward(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([F.adaptive_avg_pool2d(m, min(2, m.shape[-1])).flatten(1) for m in maps], 1)


class Classifier(nn.Module):
    """Backbone and head: images (n, 3, s, s) to logits (n, num_classes).

    `features` is what the head reads: `gap`, the backbone's outputs, or see `pooled_maps`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, features: str = "gap"):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        if self.features == "gap":
            return self.head(self.backbone(x))
        return self.head(pooled_maps(self.backbone, x, self.features))


HEAD_BIAS = ("random", "prior")


@torch.no_grad()
def init_bias_to_prior(layer: nn.Linear, labels) -> None:
    """Set a last layer's bias so that the network starts by predicting the classes' shares.

    Args:
        layer: one output is the logit of class 1.
        labels: (n,) integers, whose shares are taken. A class without any counts as half an item.
    """
    num_classes = max(layer.out_features, 2)
    counts = torch.bincount(torch.as_tensor(labels), minlength=num_classes)
    counts = counts.double().clamp(min=0.5)
    logs = (counts / counts.sum()).log()
    layer.bias.copy_(logs if layer.out_features > 1 else logs[1:] - logs[:1])


AGGREGATES = ("attention", "mean")


class TemporalHead(nn.Module):
    """Features F of frames (n, T, num_features) to logits (n, num_classes) and alpha (n, T).

    The logits are those of the weighted mean sum_t alpha_t F_t. `attention`: alpha = softmax over t
    of w^T F_t; w starts at zero, so training starts from the mean. `mean`: alpha_t = 1 / T.
    """

    def __init__(self, num_features: int, num_classes: int, aggregate: str):
        super().__init__()
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={aggregate!r}, allowed are {', '.join(AGGREGATES)}")
        # A bias would add the same to every frame: the softmax cancels it.
        attend = aggregate == "attention"
        self.attention = nn.Linear(num_features, 1, bias=False) if attend else None
        self.classifier = nn.Linear(num_features, num_classes)
        if self.attention is not None:
            nn.init.zeros_(self.attention.weight)

    def score(self, features: Tensor) -> Tensor:
        """w^T F (...), 0 for the mean, of features (..., num_features)."""
        if self.attention is None:
            return features.new_zeros(features.shape[:-1])
        return self.attention(features).squeeze(-1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.score(features).softmax(1)
        pooled = torch.einsum("nt,ntd->nd", alpha, features)
        return self.classifier(pooled), alpha
