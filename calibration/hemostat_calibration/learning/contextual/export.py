"""The step from a map to the profile that an engine applies."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.learning.contextual.basis import Basis
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.maps import LinearMap, for_features, orthonormal, with_code
from hemostat_calibration.learning.contextual.narrow import narrow
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
