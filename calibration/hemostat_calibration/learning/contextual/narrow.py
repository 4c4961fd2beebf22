"""A cheaper product up y: ids that are seldom likely get a change of lower rank.

Most of a vocabulary is seldom likely, yet every id's row of `up` is read at every step. What a change of logits is
worth to KL is, to second order, ½ Σ p_v Δz_v² over the mean distribution p. So the code y is transformed such that its
first components hold what matters to the ids of the vocabulary's tail, and the tail's rows of `up` are 0 behind those.
That is the truncated singular value decomposition in the tail's own metric: of all maps of that rank it loses the least
(at the mean distribution, up to a ridge of a millionth).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats


def narrow(
    up: npt.NDArray[np.floating],
    moment: Floats,
    mean: Floats,
    tail: npt.NDArray[np.bool_],
    columns: int,
) -> tuple[Floats, Floats, float]:
    """Returns (up' [V, r], transform [r, r], lost): up' (transform y) is up y, but for the tail's ids only the part of
    the first `columns` components.

    Columns of up', before the cut, have a mean square of 1. transform is invertible, but no rotation: a metric of y
    must be transformed, too. lost: ½ Σ p_v E[(Δz_v − Δz'_v)²] over the tail, nats.

    up: [V, r]. moment: E[y yᵀ], [r, r]. mean: p, [V]. tail: bool [V], which ids are cut short; their rows of up' are 0
    behind `columns`.

    >>> up = np.array([[1.0, 2.0], [0.5, 0.0], [1.0, 0.0]])
    >>> tail = np.array([False, True, True])
    >>> narrowed, transform, lost = narrow(up, np.eye(2), np.full(3, 1 / 3), tail, columns=1)
    >>> np.abs(narrowed @ transform - up).max().round(3).item(), round(lost, 3)
    (0.0, 0.0)
    """
    rows = up[tail].astype(np.float64)
    metric = (rows * mean[tail, None]).T @ rows
    # Directions in which the tail does not vary would be divided by 0.
    metric += 1e-6 * max(float(np.trace(metric)), 1e-30) / len(metric) * np.eye(len(metric))
    values, vectors = np.linalg.eigh(metric)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    sizes, directions = np.linalg.eigh(moment)
    left, lengths, _ = np.linalg.svd(root @ (directions * np.sqrt(np.maximum(sizes, 0.0))))
    result = up.astype(np.float64) @ (inverse @ left)
    # Of one size, so that they fit into float16.
    scale = np.sqrt(np.square(result).mean(axis=0))
    scale = np.where(scale > 1e-30, scale, 1.0)
    result /= scale
    result[tail, columns:] = 0.0
    return result, scale[:, None] * (left.T @ root), 0.5 * float(np.square(lengths[columns:]).sum())
