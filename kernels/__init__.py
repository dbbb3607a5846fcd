"""Contrastive losses and temporal shift as Triton kernels, each with a plain PyTorch reference.

Needs torch; triton where there is a GPU.
"""

from .nt_xent import nt_xent, nt_xent_reference
from .sup_con import sup_con, sup_con_reference

__all__ = ["nt_xent", "nt_xent_reference", "sup_con", "sup_con_reference"]
