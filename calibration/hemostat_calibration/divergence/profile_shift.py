"""The change that a profile makes to a record: Δz at the candidates, and the normalizer E_c[e^Δz]."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.arrays import Bools, Floats
from hemostat_calibration.divergence.view import View, row_counts, row_sums
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest, code, max_shift, shift_at
from hemostat_calibration.record_checks import LOGPROB_TOLERANCE
from hemostat_calibration.records import TokenRecord


def profile_shift(record: TokenRecord, profile: CalibrationProfile, view: View) -> Floats:
    """Returns Δz at every candidate, float64 [T, N] nats; a row is NaN where it depends on anchors whose logits are not
    in the record.

    >>> from hemostat_calibration.divergence.view import view_of
    >>> from hemostat_calibration.profiles.contextual import contextual_profile
    >>> from hemostat_calibration.profiles.transform import anchor_set
    >>> from hemostat_calibration.records import Candidates, Features
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> profile = contextual_profile(
    ...     model="",
    ...     anchors=np.array([0]),
    ...     linear=np.zeros((1, 1)),
    ...     offset=np.ones(1),
    ...     up=np.arange(9)[:, None] / 8.0,
    ...     clamp_nats=1.0,
    ... )
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0],
    ...     features=Features(anchor_set(profile), np.zeros((1, 1), np.float32))
    ... )
    >>> profile_shift(record, profile, view_of(record)).round(6).tolist()
    [[0.0, 0.125]]
    """
    ids = anchors(profile)
    if ids is None:
        return shift_at(profile, view.ids, view.log_candidates)
    if record.features is None or record.features.anchors != anchors_digest(ids):
        return np.full(view.ids.shape, np.nan)
    values = record.features.values
    known = record.shifts.get(profile.version)
    row_codes = code(profile, values) if known is None or known.code is None else known.code
    result = shift_at(profile, view.ids, view.log_candidates, row_codes)
    return np.where(np.isnan(values).any(axis=1, keepdims=True), np.nan, result)


def known_rows(delta: Floats) -> Bools:
    """Returns the rows [T] of Δz [T, N] without NaN.

    >>> known_rows(np.array([[0.0, 1.0], [0.0, np.nan]])).tolist()
    [True, False]
    """
    known: Bools = np.logical_not(np.isnan(delta).any(axis=1))
    return known


def log_normalizer_range(
    record: TokenRecord, profile: CalibrationProfile, view: View, delta: Floats
) -> tuple[Floats, Floats]:
    """Returns (low, high), each [T]: range of log E_c[e^Δz], nats; equal where it is known.

    delta: Δz at the candidates, [T, N]. What the engine reported is used where it lies in the range that the candidates
    leave; elsewhere it belongs to another distribution (a mask, an error) and the range stays.

    >>> from hemostat_calibration.divergence.view import view_of
    >>> from hemostat_calibration.profiles.contextual import contextual_profile
    >>> from hemostat_calibration.profiles.transform import anchor_set
    >>> from hemostat_calibration.records import Candidates, Features
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> profile = contextual_profile(
    ...     model="",
    ...     anchors=np.array([0]),
    ...     linear=np.zeros((1, 1)),
    ...     offset=np.ones(1),
    ...     up=np.arange(9)[:, None] / 8.0,
    ...     clamp_nats=1.0,
    ... )
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0],
    ...     features=Features(anchor_set(profile), np.zeros((1, 1), np.float32))
    ... )
    >>> view = view_of(record)
    >>> low, high = log_normalizer_range(record, profile, view, profile_shift(record, profile, view))
    >>> low.round(6).tolist(), high.round(6).tolist()
    ([-0.037268], [0.181036])
    """
    most = max_shift(profile)
    candidates = np.exp(view.log_candidates)
    complete = row_counts(view.ids >= 0) == record.domain
    behind = np.where(complete, 0.0, np.maximum(1.0 - row_sums(candidates), 0.0))
    total = row_sums(candidates * np.exp(delta))
    z_low, z_high = np.log(total + behind * np.exp(-most)), np.log(total + behind * np.exp(most))
    unknown = np.isnan(total)
    z_low, z_high = np.where(unknown, -most, z_low), np.where(unknown, most, z_high)
    if profile.version in record.shifts:
        reported = record.shifts[profile.version].log_normalizer
        known = (reported >= z_low - LOGPROB_TOLERANCE) & (reported <= z_high + LOGPROB_TOLERANCE)
        z_low, z_high = np.where(known, reported, z_low), np.where(known, reported, z_high)
    return z_low, z_high


def at_emitted(record: TokenRecord, view: View, values: Floats) -> Floats:
    """Returns the `values` of the candidates, [T, N], at the emitted token, [T].

    >>> from hemostat_calibration.divergence.view import view_of
    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> at_emitted(record, view_of(record), np.array([[3.0, 4.0]])).tolist()
    [3.0]
    """
    emitted: Floats = row_sums(np.where(view.ids == record.output_ids[:, None], values, 0.0))
    return emitted
