"""The gain of a profile at each position: KL(r‖c) − KL(r‖c'), as an interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Bools, Floats
from hemostat_calibration.divergence.profile_shift import (
    known_rows,
    log_normalizer_range,
    profile_shift,
)
from hemostat_calibration.divergence.view import row_sums, view_of
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import max_shift
from hemostat_calibration.records import TokenRecord


@dataclass(frozen=True, slots=True)
class Gain:
    """The gain of a profile, KL(r‖c) − KL(r‖c') = E_r[Δz] − log E_c[e^Δz], float64 [T], nats, as an interval.

    The identity follows from log c' = log c + Δz − log E_c[e^Δz]. Each of its two terms is exact where it is known and
    bounded through the clamp where it is not; no two bounds of divergences are subtracted.
    """

    lower: Floats
    upper: Floats
    exact: Bools
    """True where lower and upper are one value, known."""


def gain(record: TokenRecord, profile: CalibrationProfile) -> Gain:
    """Returns what `profile` gains at each position of a validated record, within ± the width of its Δz (at most 2
    clamp).

    >>> from hemostat_calibration.profiles.contextual import contextual_profile
    >>> from hemostat_calibration.profiles.transform import anchor_set
    >>> from hemostat_calibration.records import Candidates, Features
    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> towards_r = contextual_profile(
    ...     model="",
    ...     anchors=np.array([0]),
    ...     linear=np.zeros((1, 1)),
    ...     offset=np.ones(1),
    ...     up=(log_r - log_c).T,
    ...     clamp_nats=1.0,
    ... )
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0],
    ...     features=Features(anchor_set(towards_r), np.zeros((1, 1), np.float32))
    ... )
    >>> result = gain(record, towards_r)
    >>> result.lower.round(4).tolist(), result.exact.tolist()
    ([0.109], [True])
    """
    view = view_of(record)
    delta = profile_shift(record, profile, view)
    shifted = known_rows(delta)
    z_low, z_high = log_normalizer_range(record, profile, view, delta)
    inside = row_sums(view.r * delta)
    tail = np.zeros(record.tokens) if view.exact else np.maximum(1.0 - row_sums(view.r), 0.0)
    most = max_shift(profile)
    expected_low = np.where(shifted, inside - tail * most, -most)
    expected_high = np.where(shifted, inside + tail * most, most)
    if profile.version in record.shifts:
        expected = record.shifts[profile.version].expected
        expected_low = np.where(np.isnan(expected), expected_low, expected)
        expected_high = np.where(np.isnan(expected), expected_high, expected)
    # The models' rounding may carry a value out of the possible range, which betting tests rely on.
    width = 2.0 * most
    return Gain(
        lower=np.clip(expected_low - z_high, -width, width),
        upper=np.clip(expected_high - z_low, -width, width),
        exact=(expected_low == expected_high) & (z_low == z_high),
    )
