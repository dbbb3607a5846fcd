"""Counter-based random numbers: a function of (seed, epoch, sample, stream), without a state.

SplitMix64: Steele, Lea and Flood, OOPSLA 2014.
"""

from collections.abc import Sequence

import numpy as np

_MASK64 = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer on uint64: a bijection; every input bit reaches every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(
    seed: int, epoch: int, samples: np.ndarray | Sequence[int], view: int, count: int
) -> np.ndarray:
    """Draw uniforms that depend on (seed, epoch, sample, view, column) alone.

    Each key is absorbed by one SplitMix64 round, so the order of the keys matters: swapping two of
    them gives unrelated draws. A row does not depend on the other samples, and the first columns do
    not depend on `count`.

    Args:
        seed, epoch, view: integers, taken modulo 2**64.
        samples: (n,) integers, the samples' indices in the data set.
        count: draws per sample.

    Returns:
        (n, count) float64 array, uniform in [0, 1) on a grid of 2**-53.

    Raises:
        ValueError: `samples` is not a one-dimensional array of integers.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or (samples.size and samples.dtype.kind not in "iu"):
        raise ValueError(
            f"samples must be one-dimensional integers, got {samples.dtype} of shape"
            f" {samples.shape}"
        )
    state = np.zeros(1, np.uint64)
    for key in (seed, epoch, view):
        state = _mix(state + (np.array([int(key) & _MASK64], np.uint64) + np.uint64(1)) * _GOLDEN)
    state = _mix(state + (samples.astype(np.uint64) + np.uint64(1)) * _GOLDEN)  # [n]
    bits = _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)) * 2.0**-53
