"""Contrastive losses and temporal shift as Triton kernels, each with a plain PyTorch reference.

Needs torch; triton where there is a GPU.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    found = ".".join(map(str, sys.version_info[:3]))
    print("error: Python 3.11 or newer is needed, this is " + found, file=sys.stderr)
    raise SystemExit(2)

from .nt_xent import nt_xent, nt_xent_reference
from .shift_conv1x1 import shift_conv1x1, shift_conv1x1_reference
from .sup_con import sup_con, sup_con_reference
from .temporal_shift import shift_step, temporal_shift, temporal_shift_reference

__version__ = "0.2.0"

__all__ = [
    "nt_xent",
    "nt_xent_reference",
    "shift_conv1x1",
    "shift_conv1x1_reference",
    "shift_step",
    "sup_con",
    "sup_con_reference",
    "temporal_shift",
    "temporal_shift_reference",
]
