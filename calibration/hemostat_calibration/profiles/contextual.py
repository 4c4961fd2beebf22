"""Builds profiles of the contextual family: Δz = up y, y a linear map of the row's logits at a few anchor ids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hemostat_calibration.profiles.families import CONTEXTUAL
from hemostat_calibration.profiles.profile import CalibrationProfile

NO_KL_LIMIT = 1e30
"""A `kl_limit` that never binds."""


def contextual_profile(
    *,
    model: str,
    anchors: npt.NDArray[np.integer],
    linear: npt.NDArray[np.floating],
    offset: npt.NDArray[np.floating],
    up: npt.NDArray[np.floating],
    clamp_nats: float,
    fisher: npt.NDArray[np.floating] | None = None,
    kl_limit: float = NO_KL_LIMIT,
    metadata: Mapping[str, str] | None = None,
) -> CalibrationProfile:
    """Returns the profile with Δz = clip(up y, ±clamp_nats), y = s (offset + linear x).

    x is z[anchors] − mean z[anchors], the first A of it; s = min(1, √(2 kl_limit / yᵀ fisher y)): the KL divergence of
    the row from what it was is at most about `kl_limit` nats, to second order.

    anchors: [N] ids, distinct, N ≥ A. linear: [r, A]. offset: [r]. up: [V, r], stored as float16.
    fisher: [r, r], symmetric; None together with no limit.
    Raises InvalidProfileError on a bad value.

    >>> profile = contextual_profile(
    ...     model="m",
    ...     anchors=np.array([2, 0]),
    ...     linear=np.ones((1, 1)),
    ...     offset=np.zeros(1),
    ...     up=np.ones((3, 1)),
    ...     clamp_nats=1.0,
    ... )
    >>> profile.family, profile.vocab_size
    ('contextual', 3)
    """
    rank = linear.shape[0]
    with np.errstate(over="ignore"):  # an infinity is refused below
        up = np.asarray(up, dtype=np.float16)
    return CalibrationProfile(
        family=CONTEXTUAL,
        model=model,
        vocab_size=up.shape[0],
        parameters={
            "anchors": np.asarray(anchors, dtype=np.int32),
            "linear": np.asarray(linear, dtype=np.float32),
            "offset": np.asarray(offset, dtype=np.float32),
            "fisher": np.asarray(np.zeros((rank, rank)) if fisher is None else fisher, dtype=np.float32),
            "kl_limit": np.asarray(kl_limit, dtype=np.float32),
            "up": up,
        },
        clamp_nats=clamp_nats,
        metadata=metadata or {},
    )


def probe_profile(
    model: str, vocab_size: int, anchors: npt.NDArray[np.integer], clamp_nats: float
) -> CalibrationProfile:
    """Returns a profile that changes nothing: an engine that holds it reports the logits at its anchors, before
    anything has been learned from them. anchors: [N]. Raises InvalidProfileError on a bad value.

    >>> probe_profile("m", 4, np.array([1, 3]), clamp_nats=1.0).parameters["anchors"].tolist()
    [1, 3]
    """
    return contextual_profile(
        model=model,
        anchors=anchors,
        linear=np.zeros((1, 1)),
        offset=np.zeros(1),
        up=np.zeros((vocab_size, 1)),
        clamp_nats=clamp_nats,
    )
