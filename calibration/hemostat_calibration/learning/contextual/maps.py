"""Changes of a map that leave what it computes as it is, or scale it: `mlp.Network` in, `mlp.Network` out.

A low-rank linear map is a network without hidden units.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Halves, Singles
from hemostat_calibration.learning.contextual.mlp import Network
from hemostat_calibration.learning.contextual.regression import LowRank

_BLOCK = 4096
"""Rows converted at a time."""


def linear_network(found: LowRank) -> Network:
    """The linear map as a network without hidden units."""
    read = found.read.astype(np.float32)

    def none(*shape: int) -> Singles:
        return np.zeros(shape, np.float32)

    return Network(
        linear=read[:, :-1],
        offset=read[:, -1],
        hidden=none(0, read.shape[1] - 1),
        hidden_offset=none(0),
        middle=none(0, 0),
        middle_offset=none(0),
        out=none(len(read), 0),
        up=found.up.astype(np.float32),
    )


def standardised(x: npt.NDArray[np.floating], s: Floats) -> Halves:
    """Inputs x [n, A] standardised by s (`regression.standardiser`), float16 [n, A]."""
    found = np.empty(x.shape, np.float16)
    scale, shift = np.diagonal(s)[:-1].astype(np.float32), s[:-1, -1].astype(np.float32)
    for start in range(0, len(x), _BLOCK):
        found[start : start + _BLOCK] = x[start : start + _BLOCK] * scale + shift
    return found


def for_standardised_inputs(found: LowRank, s: Floats) -> tuple[Floats, Floats, Floats]:
    """linear, offset and up of the linear map that, of standardised inputs, computes the same."""
    read = np.asarray(np.linalg.solve(s.T, found.read.T).T, dtype=np.float64)
    return read[:, :-1], read[:, -1], found.up


def for_raw_inputs(map_: Network, s: Floats) -> Network:
    """The network that computes from raw inputs what `map_` computes from standardised ones."""
    scale, shift = np.diagonal(s)[:-1], s[:-1, -1]
    return replace(
        map_,
        linear=(map_.linear * scale).astype(np.float32),
        offset=(map_.offset + map_.linear @ shift).astype(np.float32),
        hidden=(map_.hidden * scale).astype(np.float32),
        hidden_offset=(map_.hidden_offset + map_.hidden @ shift).astype(np.float32),
    )


def for_features(map_: Network, reads: Floats) -> Network:
    """The network that computes from features x what `map_` computes from the inputs `reads` x̃ (`basis.Basis`)."""
    by, constant = reads[:-1, :-1], reads[:-1, -1]
    return replace(
        map_,
        linear=(map_.linear @ by).astype(np.float32),
        offset=(map_.offset + map_.linear @ constant).astype(np.float32),
        hidden=(map_.hidden @ by).astype(np.float32),
        hidden_offset=(map_.hidden_offset + map_.hidden @ constant).astype(np.float32),
    )


def scaled(map_: Network, scale: float) -> Network:
    """`scale` times the map."""
    by = np.float32(scale)
    return replace(map_, linear=map_.linear * by, offset=map_.offset * by, out=map_.out * by)


def with_code(map_: Network, transform: Floats) -> Network:
    """With the code `transform` y in place of y, [r, r]; its `up` is no longer that of the code."""
    return replace(
        map_,
        linear=(transform @ map_.linear).astype(np.float32),
        offset=(transform @ map_.offset).astype(np.float32),
        out=(transform @ map_.out).astype(np.float32),
    )


def orthonormal(map_: Network) -> Network:
    """The same map with VᵀV = 1 (V its `up`), so that the length of the code y is that of the image."""
    values, vectors = np.linalg.eigh(map_.up.T.astype(np.float64) @ map_.up)
    sizes = np.sqrt(np.maximum(values, 1e-12))
    return replace(with_code(map_, (vectors * sizes).T), up=(map_.up @ vectors / sizes).astype(np.float32))
