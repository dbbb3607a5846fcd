"""Heads that stand on a backbone."""

from torch import nn


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
