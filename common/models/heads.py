"""Heads that stand on a backbone."""

from torch import Tensor, nn


def projector(num_features: int, hidden: int, dim: int) -> nn.Sequential:
    """SimCLR's two-layer projection head g(h): (n, num_features) to (n, dim), BatchNorm after both linear layers.

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
