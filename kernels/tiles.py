"""Tile sizes of the losses' kernels by GPU, type and width; how rows are stored and keys are cut.

Nothing here launches or computes: it is what the plans of `similarity`, `nt_xent` and `sup_con` are
made from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .dispatch import (
    INTERPRETED,
    LOG2_E,
    Launch,
    ceil_div,
    lacks_tensor_cores,
    num_sms,
    target_name,
)

MAX_FUSED_D = 512
# Rows carry 1 / sqrt(tau), which leaves fp16's range at 3e-10 and, from 1e4 on, its digits.
FUSED_TEMPERATURES = (1e-4, 1e4)
_LOG2_E = float(LOG2_E)  # torch.compile of torch 2.10 traces plain numbers alone
MAX_SHIFTED = _LOG2_E / 0.0128
SLOT_BYTES = 2**26
# Every row buffer is padded to a multiple of BLOCK, and so is every grid. Up to FULL_GRID_ROWS
# halving the tiles gains less than merging their slots costs. (The interpreter's are small, so that
# tests come along every path.)
BLOCK, FULL_GRID_ROWS = (32, 0) if INTERPRETED else (128, 4096)


class Tile(NamedTuple):
    """BLOCK_M rows by BLOCK_N keys, and how a kernel is compiled for them."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    ahead: bool = False  # AHEAD and POLYNOMIAL of `bwd_kernel`
    polynomial: int = 0

    def row(self) -> tuple:
        """As in TILES, without the variants that are off."""
        return tuple(self) if self.ahead or self.polynomial else self[:4]

    def launch(
        self, kernel, grid: tuple, integers: tuple, split: bool, width: int, constants: dict
    ) -> Launch:
        """Of rows of `width` columns; constants: those of the kernel that come first."""
        constants = constants | {"SPLIT": split, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        constants["BLOCK_D"] = width
        return Launch(kernel, grid, integers, constants, self.warps, self.stages)


# By kernel ("half", "full", "bwd"), type and width of the rows; "bf16" stands for all rows of one
# 16-bit plane, "fp32" for all of two. Nothing spills; within that the half grid's owner and the
# backward's key block are as wide as leaves two blocks on a multiprocessor (docs/kernels.md).
_ANYWHERE = {
    (kernel, *rows): (64, 64, 4, 2)
    for rows in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128))
    for kernel in ("half", "full", "bwd")
}
_ANYWHERE["bwd", "fp32", 128] = (64, 32, 4, 2)
TILES = {
    "sm_80": _ANYWHERE
    | {
        ("half", "bf16", 64): (64, 128, 4, 2),
        ("full", "bf16", 64): (64, 128, 4, 2),
        ("half", "bf16", 128): (64, 128, 4, 2),
        ("full", "bf16", 128): (64, 128, 4, 2),
        ("bwd", "bf16", 128): (64, 128, 4, 2),
        ("half", "bf16", 512): (64, 64, 8, 1),
        ("full", "bf16", 512): (64, 64, 8, 1),
        ("bwd", "bf16", 512): (64, 64, 8, 2),
    },
    "sm_90": _ANYWHERE
    | {
        ("half", "bf16", 64): (64, 64, 4, 3),
        ("full", "bf16", 64): (64, 64, 4, 3),
        ("bwd", "bf16", 64): (64, 128, 4, 3),
        ("half", "bf16", 128): (64, 128, 4, 3),
        ("full", "bf16", 128): (128, 128, 8, 2),
        ("bwd", "bf16", 128): (64, 128, 4, 2),
        ("half", "bf16", 512): (64, 64, 8, 1),
        ("full", "bf16", 512): (64, 64, 8, 1),
        ("bwd", "bf16", 512): (64, 32, 8, 2),
        ("half", "fp32", 64): (64, 64, 4, 3),
        ("full", "fp32", 64): (64, 64, 4, 3),
        ("bwd", "fp32", 64): (64, 64, 4, 3),
        ("bwd", "fp32", 128): (64, 64, 4, 2),
    },
    "sm_100": _ANYWHERE
    | {
        ("half", "bf16", 64): (64, 64, 4, 3),
        ("full", "bf16", 64): (64, 64, 4, 3),
        ("bwd", "bf16", 64): (64, 64, 4, 3),
        ("full", "bf16", 128): (64, 128, 4, 2),
        ("half", "bf16", 512): (64, 64, 8, 1),
        ("full", "bf16", 512): (64, 64, 8, 1),
        ("bwd", "bf16", 512): (64, 64, 8, 1),
        ("half", "fp32", 64): (64, 64, 4, 3),
        ("full", "fp32", 64): (64, 64, 4, 3),
        ("bwd", "fp32", 64): (64, 64, 4, 3),
        ("bwd", "fp32", 128): (64, 64, 4, 2),
    },
    "gfx942": _ANYWHERE
    | {
        ("bwd", "bf16", 128): (64, 64, 4, 1),
        ("bwd", "bf16", 256): (32, 32, 4, 2),
        ("half", "bf16", 512): (64, 64, 8, 1),
        ("full", "bf16", 512): (64, 64, 8, 1),
        ("bwd", "bf16", 512): (32, 32, 4, 2),
        ("bwd", "fp32", 128): (64, 64, 4, 1),
    },
    "other": _ANYWHERE,
}
# Of the kernels that take a few rows through all keys.
FEW_ROWS_TILES = {
    "interpreter": (16, 32, 1, 1),
    "sm_80": (16, 128, 4, 3),
    "sm_90": (16, 128, 4, 3),
    "sm_100": (16, 128, 4, 3),
    "other": (16, 64, 4, 2),  # fits 64 KB of shared memory
}


def few_rows_tile(target: str) -> Tile:
    return Tile(*FEW_ROWS_TILES.get(target, FEW_ROWS_TILES["other"]))


def type_name(split: bool) -> str:
    """How TILES calls rows of one plane, or of two."""
    return "fp32" if split else "bf16"


def tile(kernel: str, split: bool, width: int, target: str) -> Tile | None:
    """Of kernel "half", "full" or "bwd" for planes of `width` columns; None if none fits."""
    if target == "interpreter":
        return Tile(16, 32, 1, 1)
    row = TILES.get(target, TILES["other"]).get((kernel, type_name(split), max(64, width)))
    return None if row is None else Tile(*row)


def why_not_fused(
    z: torch.Tensor, normalized: bool, temperature: float | torch.Tensor
) -> str | None:
    """Why the Triton kernels cannot take rows like z, if they cannot.

    A tensor's temperature is not looked at, which would wait for the GPU.
    """
    low, high = FUSED_TEMPERATURES
    if not isinstance(temperature, torch.Tensor) and not low <= temperature <= high:
        return f"it takes temperatures from {low:g} to {high:g}"
    return _why_not_fused(z.dtype, z.shape[1], z.device, normalized)


@functools.cache
def _why_not_fused(dtype, dim, device, normalized):
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if lacks_tensor_cores(device):
        return "Triton has no tensor-core products before compute capability 8.0"
    _, split = planes(dtype, normalized)
    target = target_name(device)
    if dim > MAX_FUSED_D or tile("bwd", split, block_d(dim), target) is None:
        table = TILES.get(target, TILES["other"])
        widest = max(width for _, kind, width in table if kind == type_name(split))
        rows = f"{dtype} rows" if normalized else "rows that are not normalized"
        return f"D={dim}, and of {rows} it takes D up to {widest}"
    return None


def block_d(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def padded(num_rows: int) -> int:
    return ceil_div(num_rows, BLOCK) * BLOCK


def planes(dtype: torch.dtype, normalized: bool) -> tuple[torch.dtype, bool]:
    """The 16-bit type in which rows reach the tensor cores, and whether they are split, hi + lo.

    Normalized fp32 rows are two fp16 planes (22 bits; bf16 would hold 16). Rows of unknown length
    may leave fp16's range.
    """
    if not normalized:
        return torch.bfloat16, True
    if dtype == torch.bfloat16:
        return torch.bfloat16, False
    return torch.float16, dtype == torch.float32


def log2_scale(dtype: torch.dtype) -> float:
    """By how much the weights of such rows are scaled, base 2.

    fp16 ends at 6e-8, and a mean weight at m = 131,072 is 8e-6: scaled by this a weight keeps its
    digits, and 2 * 2^13 fits.
    """
    return 13.0 if dtype == torch.float16 else 0.0


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, but in the interpreter, whose bf16 products are wrong, fp32 for bf16."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


def readable(*inputs: torch.Tensor) -> Iterable[torch.Tensor]:
    """Inputs as kernels read them."""
    return [x.to(stored(x.dtype)) for x in inputs] if INTERPRETED else inputs


def row_buffer(
    num_rows: int, dim: int, dtype: torch.dtype, normalized: bool
) -> tuple[tuple[int, int], torch.dtype]:
    """Shape and dtype of a padded row matrix."""
    plane, split = planes(dtype, normalized)
    return (padded(num_rows), block_d(dim) * (2 if split else 1)), stored(plane)


def empty_rows(
    num_rows: int, dim: int, dtype: torch.dtype, normalized: bool, device: torch.device
) -> torch.Tensor:
    shape, plane = row_buffer(num_rows, dim, dtype, normalized)
    return torch.empty(shape, dtype=plane, device=device)


def shift_of(temperature: float | None, normalized: bool) -> float | None:
    """The shift that one exponential may share between row and column, base 2; None: no such."""
    if temperature is None or not normalized or _LOG2_E / temperature > MAX_SHIFTED:
        return None
    farthest = _LOG2_E / temperature
    # Only as much headroom as antipodes need: an exponent near 100 would cost E its last five bits.
    return farthest - max(0.0, 2 * farthest - 124.0)


@functools.cache
def _num_ranges(blocks: int, steps: int, most: int, slots: int) -> int:
    """Into how many ranges to cut each block's steps.

    The programs are to fill whole waves of the device's slots. The cost of a wave is its steps plus
    two for loading, storing and, later, reading the partial result.
    """

    def cost(num_ranges: int) -> float:
        per_range = ceil_div(steps, num_ranges)
        return ceil_div(blocks * ceil_div(steps, per_range), slots) * (per_range + 2)

    return min(range(1, max(1, min(steps, most, 64)) + 1), key=cost)


class Ranges(NamedTuple):
    """Blocks of rows by ranges of keys."""

    tile: Tile
    split: bool
    width: int  # of a plane
    grid: tuple[int, int]
    per_range: int  # keys

    @property
    def num_ranges(self) -> int:
        return self.grid[1]

    def launch(self, kernel, integers: tuple, **constants) -> Launch:
        return self.tile.launch(kernel, self.grid, integers, self.split, self.width, constants)


def key_ranges(
    kernel: str,
    shape: tuple[int, int],
    split: bool,
    num_keys: int,
    row_bytes: int,
    device: torch.device,
) -> Ranges:
    """Cut the keys that each block of padded rows meets, for the tiles of a kernel.

    row_bytes: what a row stores of one range.
    """
    size, width = shape[0], shape[1] // (1 + split)
    sizes = tile(kernel, split, width, target_name(device))
    blocks, steps = size // sizes.block_m, ceil_div(num_keys, sizes.block_n)
    most = SLOT_BYTES // (row_bytes * size) or 1
    per_range = ceil_div(steps, _num_ranges(blocks, steps, most, 2 * num_sms(device)))
    grid = (blocks, ceil_div(steps, per_range))
    return Ranges(sizes, split, width, grid, per_range * sizes.block_n)


class HalfPass(NamedTuple):
    """One pass over the half grid's offsets, cut into ranges."""

    first: int
    last: int
    first_slot: int
    per_range: int
    ranges: int

    @property
    def slots(self) -> int:
        return self.last - self.first_slot + self.ranges


def half_grid(
    shape: tuple[int, int], split: bool, num_rows: int, device: torch.device
) -> tuple[Tile, int, list[HalfPass]]:
    """-> the tile; the number of column blocks; as many passes as keep the slots in SLOT_BYTES."""
    size, width = shape[0], shape[1] // (1 + split)
    sizes = tile("half", split, width, target_name(device))
    # None is empty: only the last is ragged, and the kernel masks no other.
    blocks = ceil_div(num_rows, sizes.block_n)
    offsets = blocks // 2 + 1
    steps = offsets * (sizes.block_n // sizes.block_m)
    num_ranges = _num_ranges(blocks, steps, offsets, 2 * num_sms(device))
    per_pass = max(1, min(offsets, SLOT_BYTES // (4 * size) - num_ranges))
    passes = []
    for first in range(0, offsets, per_pass):
        last = min(first + per_pass, offsets)
        per_range = ceil_div(last - first, min(num_ranges, last - first))
        ranges = ceil_div(last - first, per_range)
        # The diagonal has no row sums.
        passes.append(HalfPass(first, last, max(first, 1), per_range, ranges))
    return sizes, blocks, passes
