"""Pseudo-random numbers as a pure function of a seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Singles


def bits(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit numbers, uint64 [count]: splitmix64 from a starting point that the seed gives.

    Source: Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    >>> [hex(x) for x in bits(seed=1, count=2)]
    ['0xa5925a6c62ddc7ef', '0xca42b4d2fa547a3c']
    """
    start = (seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal(seed: int, count: int) -> Singles:
    """Standard normal numbers, float32 [count], by the transform of Box & Muller (1958).

    >>> x = normal(seed=1, count=10_000)
    >>> x.dtype.name, bool(abs(x.mean()) < 0.05), bool(abs(x.std() - 1.0) < 0.05)
    ('float32', True, True)
    """
    half = -(-count // 2)
    uniform = (bits(seed, 2 * half) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    size = np.sqrt(-2.0 * np.log1p(-uniform[:half]))
    angle = np.float32(2.0 * np.pi) * uniform[half:]
    found: Singles = np.concatenate([size * np.cos(angle), size * np.sin(angle)])[:count]
    return found
