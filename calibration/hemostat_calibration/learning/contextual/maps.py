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
    """The linear map as a network without hidden units.

    >>> found = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> linear_network(found).image(x).tolist()
    [[1.5, 4.0]]
    """
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
    """Inputs x [n, A] standardised by s (`regression.standardiser`), float16 [n, A].

    >>> standardised(np.array([[3.0], [5.0]]), np.array([[1.0, -4.0], [0.0, 1.0]])).tolist()
    [[-1.0], [1.0]]
    """
    found = np.empty(x.shape, np.float16)
    scale, shift = np.diagonal(s)[:-1].astype(np.float32), s[:-1, -1].astype(np.float32)
    for start in range(0, len(x), _BLOCK):
        found[start : start + _BLOCK] = x[start : start + _BLOCK] * scale + shift
    return found


def for_standardised_inputs(found: LowRank, s: Floats) -> tuple[Floats, Floats, Floats]:
    """linear, offset and up of the linear map that computes the same from standardised inputs.

    >>> found = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> linear, offset, up = for_standardised_inputs(found, np.diag([0.5, 0.5, 1.0]))
    >>> linear.tolist(), offset.tolist()
    ([[2.0, 0.0], [0.0, 4.0]], [0.5, 0.0])
    """
    read = np.asarray(np.linalg.solve(s.T, found.read.T).T, dtype=np.float64)
    return read[:, :-1], read[:, -1], found.up


def for_raw_inputs(map_: Network, s: Floats) -> Network:
    """The network that computes from raw inputs what `map_` computes from standardised ones.

    >>> found = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> s = np.array([[0.5, 0.0, -1.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    >>> for_raw_inputs(linear_network(found), s).image(x).tolist()
    [[0.0, 2.0]]
    """
    scale, shift = np.diagonal(s)[:-1], s[:-1, -1]
    return replace(
        map_,
        linear=(map_.linear * scale).astype(np.float32),
        offset=(map_.offset + map_.linear @ shift).astype(np.float32),
        hidden=(map_.hidden * scale).astype(np.float32),
        hidden_offset=(map_.hidden_offset + map_.hidden @ shift).astype(np.float32),
    )


def for_features(map_: Network, reads: Floats) -> Network:
    """The network that computes from features x what `map_` computes from the inputs `reads` x̃ (`basis.Basis`).

    >>> found = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> reads = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    >>> for_features(linear_network(found), reads).image(x).tolist()
    [[2.5, 4.0]]
    """
    by, constant = reads[:-1, :-1], reads[:-1, -1]
    return replace(
        map_,
        linear=(map_.linear @ by).astype(np.float32),
        offset=(map_.offset + map_.linear @ constant).astype(np.float32),
        hidden=(map_.hidden @ by).astype(np.float32),
        hidden_offset=(map_.hidden_offset + map_.hidden @ constant).astype(np.float32),
    )


def scaled(map_: Network, scale: float) -> Network:
    """`scale` times the map.

    >>> found = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> scaled(linear_network(found), 0.5).image(x).tolist()
    [[0.75, 2.0]]
    """
    by = np.float32(scale)
    return replace(map_, linear=map_.linear * by, offset=map_.offset * by, out=map_.out * by)


def with_code(map_: Network, transform: Floats) -> Network:
    """The map with the code `transform` y in place of y, [r, r]; its `up` is no longer that of the code.

    >>> found = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> with_code(linear_network(found), np.array([[0.0, 1.0], [1.0, 0.0]])).code(x).tolist()
    [[4.0, 1.5]]
    """
    return replace(
        map_,
        linear=(transform @ map_.linear).astype(np.float32),
        offset=(transform @ map_.offset).astype(np.float32),
        out=(transform @ map_.out).astype(np.float32),
    )


def orthonormal(map_: Network) -> Network:
    """The same map with VᵀV = 1 (V its `up`), so that the length of the code y is that of the image.

    >>> found = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> network = orthonormal(scaled(linear_network(found), 2.0))
    >>> np.abs(network.up.T @ network.up).round(4).tolist(), network.image(x).round(4).tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [[3.0, 8.0]])
    """
    values, vectors = np.linalg.eigh(map_.up.T.astype(np.float64) @ map_.up)
    sizes = np.sqrt(np.maximum(values, 1e-12))
    return replace(with_code(map_, (vectors * sizes).T), up=(map_.up @ vectors / sizes).astype(np.float32))
