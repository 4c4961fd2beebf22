"""The step from a map to the profile that an engine applies.

An engine reads every id's row of `up` at every step, though most of a vocabulary is seldom likely. So ids that are
seldom likely get a change of lower rank (`narrow`). What a change of logits is worth to KL is, to second order,
½ Σ p_v Δz_v² over the mean distribution p. So the code y is transformed such that its first components hold what
matters to the ids of the vocabulary's tail, and the tail's rows of `up` are 0 behind those. That is the truncated
singular value decomposition in the tail's own metric: of all maps of that rank it loses the least (at the mean
distribution, up to a ridge of a millionth).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.learning.contextual.basis import Basis
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.maps import LinearMap, for_features, orthonormal, with_code
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile

WIDE_IDS = 8192
NARROW_RANK = 64
"""All but the `WIDE_IDS` likeliest ids get a change of logits of rank `NARROW_RANK` (`narrow`), where that halves the
rank or more."""
MAX_LOST_PART = 0.05
"""The largest part of the change, as KL, that may be lost in the tail by that."""


def to_profile(
    map_: LinearMap,
    basis: Basis,
    code_moment: Callable[[LinearMap], Floats],
    *,
    model: str,
    anchors: Ids,
    limits: ProfileLimits,
    metadata: Mapping[str, str],
) -> CalibrationProfile:
    """Returns the profile of a map from inputs in the basis; its rank is the map's rank.

    code_moment: returns E[y yᵀ] of the code y of a map with an orthonormal `up`, [r, r]. It decides what may be left
    out of the tail.
    """
    map_ = orthonormal(map_)
    rank = len(map_.linear)
    up, fisher = basis.embedding @ map_.up, np.eye(rank)
    tail = np.ones(len(up), np.bool_)
    tail[basis.likeliest[:WIDE_IDS]] = False
    if rank >= 2 * NARROW_RANK and tail.any():
        moment = code_moment(map_)
        narrowed, transform, lost = narrow(up, moment, basis.mean, tail, NARROW_RANK)
        # ½ |y|² is the KL of the whole change.
        if lost <= MAX_LOST_PART * 0.5 * np.trace(moment):
            map_, back = with_code(map_, transform), np.linalg.inv(transform)
            up, fisher = narrowed, back.T @ back
    map_ = for_features(map_, basis.reads)
    return contextual_profile(
        model=model,
        anchors=anchors,
        linear=map_.linear,
        offset=map_.offset,
        up=up,
        clamp_nats=limits.clamp_nats,
        fisher=fisher,
        kl_limit=limits.kl_limit,
        metadata=metadata,
    )


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
