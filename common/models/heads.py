"""Heads that stand on a backbone."""

import torch
from torch import Tensor, nn


def projector(num_features: int, hidden: int, dim: int) -> nn.Sequential:
    """SimCLR's two-layer projection head g(h): (n, num_features) to (n, dim), BatchNorm after both
    linear layers.

    The biases are left out where BatchNorm would subtract them again.
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

    def __init__(self, backbone: nn.Module, num_features: int, proj_dim: int):
        super().__init__()
        self.backbone, self.projector = backbone, projector(num_features, num_features, proj_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


HEAD_BIAS = ("random", "prior")


@torch.no_grad()
def init_bias_to_prior(layer: nn.Linear, labels) -> None:
    """Set a last layer's bias so that the network starts by predicting the classes' shares among
    `labels` (n,).

    One output is the logit of class 1. A class without labels counts as half an item.
    """
    counts = (
        torch.bincount(torch.as_tensor(labels), minlength=max(layer.out_features, 2))
        .double()
        .clamp(min=0.5)
    )
    logs = (counts / counts.sum()).log()
    layer.bias.copy_(logs if layer.out_features > 1 else logs[1:] - logs[:1])


AGGREGATES = ("attention", "mean")


class TemporalHead(nn.Module):
    """Features F of frames (n, T, num_features) to logits (n, num_classes) of their weighted mean
    sum_t alpha_t F_t, and alpha (n, T).

    `attention`: alpha = softmax over t of w^T F_t; w starts at zero, so training starts from the
    mean. `mean`: alpha_t = 1 / T.
    """

    def __init__(self, num_features: int, num_classes: int, aggregate: str):
        super().__init__()
        if aggregate not in AGGREGATES:
            raise ValueError(f"aggregate={aggregate!r}, allowed are {', '.join(AGGREGATES)}")
        # A bias would add the same to every frame: the softmax cancels it.
        self.attention = (
            nn.Linear(num_features, 1, bias=False) if aggregate == "attention" else None
        )
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
