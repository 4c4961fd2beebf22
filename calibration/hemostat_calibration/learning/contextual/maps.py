"""Maps, and changes of a map that leave what it computes as it is, or scale it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hemostat_calibration.arrays import Floats, Singles
from hemostat_calibration.learning.contextual.regression import LowRank


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """A map from features x to images (`objective`): V y, y = linear x + offset.

    float32: linear [r, A], offset [r], up V [d, r].
    """

    linear: Singles
    offset: Singles
    up: Singles

    def code(self, x: Singles) -> Singles:
        """Returns the code y, [T, r], of x [T, A]."""
        code: Singles = x @ self.linear.T + self.offset
        return code

    def image(self, x: Singles) -> Singles:
        """Returns V y, [T, d], of x [T, A]."""
        image: Singles = self.code(x) @ self.up.T
        return image


def linear_map(low_rank: LowRank) -> LinearMap:
    """Returns the map that was found.

    >>> low_rank = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> linear_map(low_rank).image(np.array([[1.0, 2.0]], np.float32)).tolist()
    [[1.5, 4.0]]
    """
    read = low_rank.read.astype(np.float32)
    return LinearMap(linear=read[:, :-1], offset=read[:, -1], up=low_rank.up.astype(np.float32))


def for_features(map_: LinearMap, reads: Floats) -> LinearMap:
    """Returns the map that computes from features x what `map_` computes from the inputs `reads` x̃ (`basis.Basis`).

    >>> low_rank = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> reads = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    >>> for_features(linear_map(low_rank), reads).image(x).tolist()
    [[2.5, 4.0]]
    """
    by, constant = reads[:-1, :-1], reads[:-1, -1]
    return replace(
        map_,
        linear=(map_.linear @ by).astype(np.float32),
        offset=(map_.offset + map_.linear @ constant).astype(np.float32),
    )


def scaled(map_: LinearMap, scale: float) -> LinearMap:
    """Returns `scale` times the map.

    >>> low_rank = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> scaled(linear_map(low_rank), 0.5).image(x).tolist()
    [[0.75, 2.0]]
    """
    by = np.float32(scale)
    return replace(map_, linear=map_.linear * by, offset=map_.offset * by)


def with_code(map_: LinearMap, transform: Floats) -> LinearMap:
    """Returns the map with the code `transform` y in place of y, [r, r]; its `up` no longer belongs to the code.

    >>> low_rank = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> with_code(linear_map(low_rank), np.array([[0.0, 1.0], [1.0, 0.0]])).code(x).tolist()
    [[4.0, 1.5]]
    """
    return replace(
        map_,
        linear=(transform @ map_.linear).astype(np.float32),
        offset=(transform @ map_.offset).astype(np.float32),
    )


def orthonormal(map_: LinearMap) -> LinearMap:
    """Returns the same map with VᵀV = 1 (V its `up`), so that the code y is as long as the image.

    >>> low_rank = LowRank(np.eye(2), np.array([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]]), penalty=0.0, gain=0.0, error=0.0)
    >>> x = np.array([[1.0, 2.0]], np.float32)
    >>> map_ = orthonormal(scaled(linear_map(low_rank), 2.0))
    >>> np.abs(map_.up.T @ map_.up).round(4).tolist(), map_.image(x).round(4).tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [[3.0, 8.0]])
    """
    values, vectors = np.linalg.eigh(map_.up.T.astype(np.float64) @ map_.up)
    sizes = np.sqrt(np.maximum(values, 1e-12))
    return replace(with_code(map_, (vectors * sizes).T), up=(map_.up @ vectors / sizes).astype(np.float32))
