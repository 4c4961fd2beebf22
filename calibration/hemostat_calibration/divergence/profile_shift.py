"""What a profile does to a record: Δz at the candidates, its range behind them, and the normalizer E_c[e^Δz]."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.arrays import Bools, Floats
from hemostat_calibration.divergence.view import View, row_counts, row_sums
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest, code, shift_at, shift_range
from hemostat_calibration.records import LOGPROB_TOLERANCE, TokenRecord


def profile_shift(record: TokenRecord, profile: CalibrationProfile, view: View) -> Floats:
    """Δz at every candidate, [T, N]; a row is NaN where it depends on anchors whose logits the record does not have."""
    ids = anchors(profile)
    if ids is None:
        return shift_at(profile, view.ids, view.log_candidates)
    if record.features is None or record.features.anchors != anchors_digest(ids):
        return np.full(view.ids.shape, np.nan)
    values = record.features.values
    known = record.shifts.get(profile.version)
    said = code(profile, values) if known is None or known.code is None else known.code
    found = shift_at(profile, view.ids, view.log_candidates, said)
    return np.where(np.isnan(values).any(axis=1, keepdims=True), np.nan, found)


def known_rows(delta: Floats) -> Bools:
    known: Bools = np.logical_not(np.isnan(delta).any(axis=1))
    return known


def max_unlisted_relative(record: TokenRecord) -> Floats:
    """The most that z − max z can be behind the candidates, [T].

    The last candidate may be the emitted token, far down: the one before it is among the most likely for sure.
    """
    logprobs = record.compressed.logprobs
    before_last = np.maximum(row_counts(record.compressed.ids >= 0) - 2, 0)
    most: Floats = np.minimum(logprobs[np.arange(record.tokens), before_last] - logprobs[:, 0], 0.0)
    return most


def unlisted_shift_range(record: TokenRecord, profile: CalibrationProfile, most: Floats) -> tuple[Floats, Floats]:
    low, high = shift_range(profile, most)
    return np.broadcast_to(low, record.tokens), np.broadcast_to(high, record.tokens)


def log_normalizer_range(
    record: TokenRecord, profile: CalibrationProfile, view: View, delta: Floats
) -> tuple[Floats, Floats]:
    """Ends of the interval that holds log E_c[e^Δz], [T]; equal where it is known.

    What the engine said is taken where it lies in the interval that the candidates leave; elsewhere it was said of
    another distribution (a mask, a bug) and the interval stands.
    """
    low, high = unlisted_shift_range(record, profile, max_unlisted_relative(record))
    candidates = np.exp(view.log_candidates)
    complete = row_counts(view.ids >= 0) == record.vocab_size
    behind = np.where(complete, 0.0, np.maximum(1.0 - row_sums(candidates), 0.0))
    total = row_sums(candidates * np.exp(delta))
    z_low, z_high = np.log(total + behind * np.exp(low)), np.log(total + behind * np.exp(high))
    unknown = np.isnan(total)
    least, most = shift_range(profile)
    z_low, z_high = np.where(unknown, least, z_low), np.where(unknown, most, z_high)
    if profile.version in record.shifts:
        said = record.shifts[profile.version].log_normalizer
        known = (said >= z_low - LOGPROB_TOLERANCE) & (said <= z_high + LOGPROB_TOLERANCE)
        z_low, z_high = np.where(known, said, z_low), np.where(known, said, z_high)
    return z_low, z_high


def at_emitted(record: TokenRecord, view: View, values: Floats) -> Floats:
    emitted: Floats = row_sums(np.where(view.ids == record.output_ids[:, None], values, 0.0))
    return emitted
