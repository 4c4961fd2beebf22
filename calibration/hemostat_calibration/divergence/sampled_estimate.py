"""Estimates of KL from the emitted token, without truncation bias."""

from __future__ import annotations

import numpy as np

from hemostat_calibration.arrays import Bools, Floats
from hemostat_calibration.divergence.profile_shift import at_emitted, log_normalizer_range, profile_shift
from hemostat_calibration.divergence.view import MASS_ROUNDING, View, row_sums
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import TokenRecord


def importance_weight(record: TokenRecord, view: View, served: CalibrationProfile | None) -> Floats:
    """Returns c(x)/q(x) of the emitted token, where q is what it was sampled from, float64 [T]; NaN if that is unknown.

    >>> from hemostat_calibration.divergence.view import view_of
    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> importance_weight(record, view_of(record), None).tolist()
    [1.0]
    """
    sampling = record.sampling
    whole = sampling.temperature == 1.0 and sampling.top_p >= 1.0 and sampling.top_k <= 0 and sampling.min_p <= 0.0
    if whole and record.applied is None:
        drawn = record.drawn_emitted
        return np.ones(record.tokens) if drawn is None else np.exp(record.compressed_emitted - drawn)
    if whole and served is not None and served.version == record.applied:
        delta = profile_shift(record, served, view)
        low, high = log_normalizer_range(record, served, view, delta)
        return np.where(low == high, np.exp(low - at_emitted(record, view, delta)), np.nan)
    return np.full(record.tokens, np.nan)


def sampled_estimates(
    record: TokenRecord, view: View, log_p: Floats, log_p_emitted: Floats, weight: Floats
) -> tuple[Floats, Floats]:
    """Estimates of KL(r‖p) and KL(p‖r), each [T], nats, for a p that equals exp(log_p) on S.

    log_p: [T, N]. log_p_emitted: [T]. weight: p(x)/q(x), [T]; NaN there gives NaN.
    Source: Rao–Blackwellized importance sampling, see `per_token`.

    >>> from hemostat_calibration.divergence.view import view_of
    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> rc, cr = sampled_estimates(record, view_of(record), log_c, record.compressed_emitted, np.ones(1))
    >>> rc.round(6).tolist(), cr.round(6).tolist()
    ([0.045377], [0.050758])
    """
    kept = _unconditional(record, view)
    r = np.where(kept, view.r, 0.0)
    p = np.where(kept, np.exp(log_p), 0.0)
    r_out = np.maximum(1.0 - row_sums(r), MASS_ROUNDING)
    p_out = np.maximum(1.0 - row_sums(p), MASS_ROUNDING)
    log_rho = np.log(r_out / p_out)
    outside = ~(kept & (view.ids == record.output_ids[:, None])).any(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = view.log_r - log_p
        rc = row_sums(np.where(r > 0.0, r * log_ratio, 0.0)) + r_out * log_rho
        cr = -row_sums(np.where(p > 0.0, p * log_ratio, 0.0)) - p_out * log_rho
        log_u = record.reference_emitted - log_p_emitted
        u = np.exp(log_u)
        rc_tail = np.where(u > 0.0, u * (log_u - log_rho), 0.0) - u + np.exp(log_rho)
        cr_tail = u * np.exp(-log_rho) - 1.0 - (log_u - log_rho)
    unavailable = np.isnan(weight)
    # Both are sums of divergences: a value below 0 comes from rounding, by which a row may sum to more than 1.
    return (
        np.where(unavailable, np.nan, np.maximum(rc + np.where(outside, weight * rc_tail, 0.0), 0.0)),
        np.where(unavailable, np.nan, np.maximum(cr + np.where(outside, weight * cr_tail, 0.0), 0.0)),
    )


def _unconditional(record: TokenRecord, view: View) -> Bools:
    """Returns S₀: the ids of S that would be in it whatever had been emitted, [T, N].

    Engines add an emitted token that is not among the top K in one of two ways, and a row has room for both: in place
    of the K-th (vLLM's chat route), or behind it (completions). So an id likelier than the (K−1)-th is there
    whatever was emitted; one that ties with it may have been moved. And of a reference that gave only a list, what is
    likelier than the last but one of that list.
    """
    listed = record.compressed.logprobs
    kept: Bools = view.inside & (view.log_candidates > listed[:, max(record.top_k - 3, 0), None])
    if record.reference_entropy is None:
        listed = record.reference.logprobs
        kept &= view.log_r > (listed[:, -2, None] if listed.shape[1] > 1 else np.inf)
    return kept
