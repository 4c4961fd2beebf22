"""How far the compressed model c is from the reference r, token by token, when only parts of both are known.

All figures are natural (nats), per position, float64 [T]; KL(r‖c) = Σ r log(r/c). r and c are the models' own
distributions at temperature 1.

Bounds. S are the ids for which both sides gave a value; everything else merged into one bucket gives lower bounds,
exact when S is the whole vocabulary: `kl_rc`, `kl_cr`, `js` and `tv`, made alike before and after a profile, so
that the two can be compared. `bounds` holds the tightest interval that the lists prove. Both are proven in
`hemostat_calibration.divergence.bounds`.

Estimates. With x ~ c the emitted token, S₀ a set of ids that does not depend on x, R and C the mass outside S₀,
ρ = R/C and u = r(x)/c(x):
    KL(r‖c) = [bound over S₀] + E_c[1{x ∉ S₀} (u log(u/ρ) − u + ρ)]
    KL(c‖r) = [bound over S₀] + E_c[1{x ∉ S₀} (u/ρ − 1 − log(u/ρ))]
since E_c[1{x ∉ S₀}] = C and E_c[1{x ∉ S₀} u] = R: the sampled-token estimators, Rao–Blackwellized over S₀ and centred
on the bucket, so that no term is negative (centring about halves the plain estimator's deviation). They have no
truncation bias where x was sampled from c itself, or from a profile's c' whose normalizer is known (then weighted by
c/c'). Greedy decoding, another temperature and a cut support (top-p, top-k, min-p) have no such weight (its normalizer
needs the whole vocabulary): NaN, "not available". The caller must see to penalties, logit_bias and grammars, of which
a record does not speak.

Infinite only where it is true: r(i) > 0 = c(i) makes KL(r‖c) infinite, r(i) = 0 < c(i) KL(c‖r).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hemostat_calibration.divergence.bounds import (
    FLOOR,
    MASS_ROUNDING,
    Bools,
    Bounds,
    Coarse,
    View,
    bounds_of,
    cap,
    coarse,
    jensen_shannon,
    row_counts,
    row_sums,
    total_variation,
    view_of,
    xlogy,
)
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest, code, shift_at, shift_range
from hemostat_calibration.records import LOGPROB_TOLERANCE, Floats, TokenRecord

_CUTS = 4
"""Cutting planes after the first two: what is left open is then far below the bound itself."""


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """One request's figures; arrays [T], nats unless said otherwise."""

    bound: Literal["lower", "exact"]
    """What `kl_rc`, `kl_cr`, `js`, `tv` and `entropy_compressed` are: exact when S is the whole vocabulary."""
    kl_rc: Floats
    """KL(r‖c)"""
    kl_cr: Floats
    """KL(c‖r)"""
    js: Floats
    """Jensen–Shannon divergence, at most log 2."""
    tv: Floats
    """Total variation, 0 to 1."""
    covered_reference: Floats
    """r's mass on S, 0 to 1."""
    covered_compressed: Floats
    """c's mass on S, 0 to 1; the least that it can be where a profile's normalizer is known as an interval only."""
    top1_agreement: Bools
    """The likeliest of c's candidates is r's likeliest id. (After a profile, an id behind the candidates could have
    become likelier than all of them; it is not counted.)"""
    delta_log_likelihood: Floats
    """log c(x) − log r(x) of the emitted token x; NaN after a profile whose normalizer is unknown."""
    delta_p: Floats
    """Δp = c(x) − r(x) of the emitted token x, −1 to 1 (llama.cpp's sign: what c adds); NaN likewise."""
    entropy_reference: Floats
    """H(r): exact when the record holds it, else the entropy of r's own list plus one bucket, a lower bound."""
    entropy_compressed: Floats
    """H(c) over c's candidates plus one bucket: a lower bound, since merging outcomes cannot increase entropy."""
    estimate_rc: Floats
    """KL(r‖c) without truncation bias; NaN where not available. Equal to `kl_rc` when exact."""
    estimate_cr: Floats
    """KL(c‖r) likewise."""
    bounds: Bounds
    """What is certain of the four divergences. After a profile whose normalizer is unknown: NaN."""
    known: Bools
    """False after a profile whose Δz is unknown there (it reads anchors, and the record has no features of them): all
    that depends on Δz is NaN there, and `top1_agreement` False."""


@dataclass(frozen=True, slots=True)
class Gain:
    """KL(r‖c) − KL(r‖c') = E_r[Δz] − log E_c[e^Δz]: what a profile wins, nats [T], as an interval.

    The identity follows from log c' = log c + Δz − log E_c[e^Δz]. Each of its two terms is exact where it is known and
    bounded through the clamp where it is not; no two bounds of divergences are subtracted.
    """

    lower: Floats
    upper: Floats
    exact: Bools
    """True where lower and upper are one value, known."""


def divergence(record: TokenRecord, served: CalibrationProfile | None = None, floor: float = FLOOR) -> TokenDivergence:
    """What a validated record says about c and r.

    served: the profile that `record.applied` names, so that the estimates of a treated request can be weighted; without
    it they are NaN there. floor: see `Bounds.floor`.
    """
    view = view_of(record)
    lower = coarse(view, view.c, view.log_c)
    estimate_rc, estimate_cr = lower.kl_rc, lower.kl_cr
    if not view.exact:
        weight = _weight(record, view, served)
        estimate_rc, estimate_cr = _estimate(record, view, view.log_c, record.compressed_emitted, weight)
    return TokenDivergence(
        bound="exact" if view.exact else "lower",
        kl_rc=lower.kl_rc,
        kl_cr=lower.kl_cr,
        js=lower.js,
        tv=lower.tv,
        covered_reference=np.minimum(row_sums(view.r), 1.0),
        covered_compressed=np.minimum(row_sums(view.c), 1.0),
        top1_agreement=record.compressed.ids[:, 0] == record.reference.ids[:, 0],
        delta_log_likelihood=record.compressed_emitted - record.reference_emitted,
        delta_p=_delta_p(record, record.compressed_emitted),
        entropy_reference=_reference_entropy(record),
        entropy_compressed=_entropy(view.log_candidates),
        estimate_rc=estimate_rc,
        estimate_cr=estimate_cr,
        bounds=bounds_of(record, view, lower, view.log_candidates, cap(record.compressed, record.output_ids), floor),
        known=np.ones(record.tokens, dtype=np.bool_),
    )


def calibrated(
    record: TokenRecord,
    profile: CalibrationProfile,
    served: CalibrationProfile | None = None,
    floor: float = FLOOR,
) -> TokenDivergence:
    """What a validated record says about c' and r, c'_i = c_i e^{Δz_i} / Z being the compressed model after `profile`.

    Z = E_c[e^Δz] is exact where `record.shifts` holds its logarithm or the candidates are the whole vocabulary. Else
    it lies between A + m e^low and A + m e^high: A what the candidates contribute, m the mass behind them, low and high
    the bounds of Δz there; each figure is then at most the least that it can be over that interval. With a = c e^Δz on
    S, A now its sum over S, w = 1/Z, and R the reference's mass outside S:

    - KL(r‖c') as a function of L = log Z is const + r(S) L − R log(1 − A e^{−L}). With u = A e^{−L} its derivative is
      r(S) − R u/(1 − u), the second R u/(1 − u)² ≥ 0: convex, least at u = r(S), clipped to the interval.
    - KL(c'‖r), JS and TV are convex in c', which is affine in w. KL(c'‖r) is
      Σ a w log(a w/r) + (1 − A w) log((1 − A w)/R); with B = Σ a log(a/r) its derivative,
      B + A log w − A log((1 − A w)/R), is zero at w = κ/(1 + A κ), κ = e^{−B/A}/R: least there, clipped. For JS and TV
      the tangents at both ends lie below the curve: where they cross is a lower bound, and the next end.
    - Entropy is concave in w: least at an end.
    """
    view = view_of(record)
    delta = _shift(record, profile, view)
    shifted = _known(delta)
    delta = np.where(shifted[:, None], delta, 0.0)
    low, high = _log_normalizer(record, profile, view, delta)
    known = low == high
    log_a = view.log_c + delta
    a = np.exp(log_a)
    total = row_sums(a)
    r_inside = np.minimum(row_sums(view.r), 1.0)

    def at(log_z: Floats) -> Coarse:
        return coarse(view, a * np.exp(-log_z)[:, None], log_a - log_z[:, None])

    last = at(high)
    kl_rc, kl_cr, js, tv = last.kl_rc, last.kl_cr, last.js, last.tv
    entropy = _entropy(view.log_candidates + delta - high[:, None])
    if not known.all():
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            best_rc = np.log(total) - np.log(r_inside)
            mean_log_ratio = row_sums(np.where(a > 0.0, a * (log_a - view.log_r), 0.0)) / total
            log_kappa = -mean_log_ratio - np.log(np.maximum(1.0 - r_inside, MASS_ROUNDING))
            best_cr = np.logaddexp(-log_kappa, np.log(total))
        # NaN where nothing is known (S empty) or c' meets r(i) = 0: the figure does not depend on Z there.
        kl_rc = at(np.where(np.isnan(best_rc), high, np.clip(best_rc, low, high))).kl_rc
        kl_cr = at(np.where(np.isnan(best_cr), high, np.clip(best_cr, low, high))).kl_cr
        js = _least(jensen_shannon, view, a, np.exp(-high), np.exp(-low))
        tv = _least(total_variation, view, a, np.exp(-high), np.exp(-low))
        entropy = np.minimum(entropy, _entropy(view.log_candidates + delta - low[:, None]))
    emitted_shift = np.where(known, _at_emitted(record, view, delta) - low, np.nan)
    emitted = record.compressed_emitted + emitted_shift
    estimate_rc, estimate_cr = kl_rc, kl_cr
    if not view.exact:
        weight = _weight(record, view, served) * np.exp(emitted_shift)
        estimate_rc, estimate_cr = _estimate(record, view, log_a - low[:, None], emitted, weight)
    most = cap(record.compressed, record.output_ids) + _behind(record, profile, _most(record))[1]
    certain = bounds_of(
        record, view, last, view.log_candidates + (delta - high[:, None]), np.minimum(most - high, 0.0), floor
    )
    likeliest = (view.log_candidates + delta).argmax(axis=1)
    agrees = view.ids[np.arange(record.tokens), likeliest] == record.reference.ids[:, 0]

    def where_shifted(values: Floats) -> Floats:
        return np.where(shifted, values, np.nan)

    return TokenDivergence(
        bound="exact" if view.exact else "lower",
        kl_rc=where_shifted(kl_rc),
        kl_cr=where_shifted(kl_cr),
        js=where_shifted(js),
        tv=where_shifted(tv),
        covered_reference=r_inside,
        covered_compressed=where_shifted(np.minimum(total * np.exp(-high), 1.0)),
        top1_agreement=agrees & shifted,
        delta_log_likelihood=where_shifted(emitted - record.reference_emitted),
        delta_p=where_shifted(_delta_p(record, emitted)),
        entropy_reference=_reference_entropy(record),
        entropy_compressed=where_shifted(entropy),
        estimate_rc=where_shifted(estimate_rc),
        estimate_cr=where_shifted(estimate_cr),
        bounds=certain.where(known & shifted),
        known=shifted,
    )


def gain(record: TokenRecord, profile: CalibrationProfile) -> Gain:
    """What `profile` wins at each position of a validated record: within ± the width of its Δz, at most 2 clamp."""
    view = view_of(record)
    delta = _shift(record, profile, view)
    shifted = _known(delta)
    z_low, z_high = _log_normalizer(record, profile, view, delta)
    low, high = _behind(record, profile, np.where((view.inside == (view.ids >= 0)).all(axis=1), _most(record), 0.0))
    inside = row_sums(view.r * delta)
    tail = np.zeros(record.tokens) if view.exact else np.maximum(1.0 - row_sums(view.r), 0.0)
    least, most = shift_range(profile)
    expected_low = np.where(shifted, inside + tail * low, least)
    expected_high = np.where(shifted, inside + tail * high, most)
    if profile.version in record.shifts:
        expected = record.shifts[profile.version].expected
        expected_low = np.where(np.isnan(expected), expected_low, expected)
        expected_high = np.where(np.isnan(expected), expected_high, expected)
    # The models' rounding may carry a value out of what is possible; whoever bets on the range relies on it.
    width = float(most - least)
    return Gain(
        lower=np.clip(expected_low - z_high, -width, width),
        upper=np.clip(expected_high - z_low, -width, width),
        exact=(expected_low == expected_high) & (z_low == z_high),
    )


def _least(
    function: Callable[[View, Floats], tuple[Floats, Floats]], view: View, a: Floats, left: Floats, right: Floats
) -> Floats:
    """Lower bound of function(a w), convex in w, over left ≤ w ≤ right, all [T]: Kelley's cutting planes."""

    def at(w: Floats) -> tuple[Floats, Floats]:
        value, slope = function(view, a * w[:, None])
        return value, slope / w

    (left_value, left_slope), (right_value, right_slope) = at(left), at(right)
    for _ in range(_CUTS):
        middle = left + _crossing(left_value, right_value, left_slope, right_slope, right - left)[0]
        value, slope = at(middle)
        rising = slope > 0.0
        left, right = np.where(rising, left, middle), np.where(rising, middle, right)
        left_value, right_value = np.where(rising, left_value, value), np.where(rising, value, right_value)
        left_slope, right_slope = np.where(rising, left_slope, slope), np.where(rising, slope, right_slope)
    return np.maximum(_crossing(left_value, right_value, left_slope, right_slope, right - left)[1], 0.0)


def _crossing(
    left: Floats, right: Floats, left_slope: Floats, right_slope: Floats, width: Floats
) -> tuple[Floats, Floats]:
    """Where, from the left end, the larger of two tangents is least over an interval, and that least value."""
    bend = right_slope - left_slope
    offset = (left - right + right_slope * width) / np.where(bend > 0.0, bend, 1.0)
    offset = np.where(left_slope >= 0.0, 0.0, np.where(right_slope <= 0.0, width, np.clip(offset, 0.0, width)))
    inner = left + left_slope * offset
    return offset, np.where((left_slope < 0.0) & (right_slope <= 0.0), right, inner)


def _entropy(logprobs: Floats) -> Floats:
    p = np.exp(logprobs)
    outside = np.maximum(1.0 - row_sums(p), 0.0)
    with np.errstate(invalid="ignore"):
        entropy: Floats = -row_sums(np.where(p > 0.0, p * logprobs, 0.0)) - xlogy(outside, outside)
    return np.maximum(entropy, 0.0)


def _delta_p(record: TokenRecord, emitted: Floats) -> Floats:
    difference: Floats = np.clip(np.exp(emitted) - np.exp(record.reference_emitted), -1.0, 1.0)
    return difference


def _reference_entropy(record: TokenRecord) -> Floats:
    return _entropy(record.reference.logprobs) if record.reference_entropy is None else record.reference_entropy


def _at_emitted(record: TokenRecord, view: View, values: Floats) -> Floats:
    emitted: Floats = row_sums(np.where(view.ids == record.output_ids[:, None], values, 0.0))
    return emitted


def _shift(record: TokenRecord, profile: CalibrationProfile, view: View) -> Floats:
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


def _known(delta: Floats) -> Bools:
    known: Bools = np.logical_not(np.isnan(delta).any(axis=1))
    return known


def _most(record: TokenRecord) -> Floats:
    """The most that z − max z can be behind the candidates, [T].

    The last candidate may be the emitted token, far down: the one before it is among the most likely for sure.
    """
    logprobs = record.compressed.logprobs
    before_last = np.maximum(row_counts(record.compressed.ids >= 0) - 2, 0)
    most: Floats = np.minimum(logprobs[np.arange(record.tokens), before_last] - logprobs[:, 0], 0.0)
    return most


def _behind(record: TokenRecord, profile: CalibrationProfile, most: Floats) -> tuple[Floats, Floats]:
    low, high = shift_range(profile, most)
    return np.broadcast_to(low, record.tokens), np.broadcast_to(high, record.tokens)


def _log_normalizer(
    record: TokenRecord, profile: CalibrationProfile, view: View, delta: Floats
) -> tuple[Floats, Floats]:
    """Ends of the interval that holds log E_c[e^Δz], [T]; equal where it is known.

    What the engine said is taken where it lies in the interval that the candidates leave; elsewhere it was said of
    another distribution (a mask, a bug) and the interval stands.
    """
    low, high = _behind(record, profile, _most(record))
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


def _weight(record: TokenRecord, view: View, served: CalibrationProfile | None) -> Floats:
    """c(x)/q(x) of the emitted token, q what it was sampled from, [T]; NaN where unknown."""
    sampling = record.sampling
    whole = sampling.temperature == 1.0 and sampling.top_p >= 1.0 and sampling.top_k <= 0 and sampling.min_p <= 0.0
    if whole and record.applied is None:
        drawn = record.drawn_emitted
        return np.ones(record.tokens) if drawn is None else np.exp(record.compressed_emitted - drawn)
    if whole and served is not None and served.version == record.applied:
        delta = _shift(record, served, view)
        low, high = _log_normalizer(record, served, view, delta)
        return np.where(low == high, np.exp(low - _at_emitted(record, view, delta)), np.nan)
    return np.full(record.tokens, np.nan)


def _estimate(
    record: TokenRecord, view: View, log_p: Floats, log_p_emitted: Floats, weight: Floats
) -> tuple[Floats, Floats]:
    """Estimates of KL(r‖p) and KL(p‖r), [T], for a p that equals `log_p` on S; `weight` is p(x)/q(x)."""
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
    # Both are sums of divergences: what is below 0 is the models' rounding, by which a row may add up to more than 1.
    return (
        np.where(unavailable, np.nan, np.maximum(rc + np.where(outside, weight * rc_tail, 0.0), 0.0)),
        np.where(unavailable, np.nan, np.maximum(cr + np.where(outside, weight * cr_tail, 0.0), 0.0)),
    )


def _unconditional(record: TokenRecord, view: View) -> Bools:
    """S₀: the ids of S that would be in it whatever had been emitted, [T, N].

    Engines add an emitted token that is not among the top K in one of two ways, and a row has room for both: in place
    of the K-th (vLLM's chat route), or behind it (completions). So whatever is likelier than the (K−1)-th is there
    whatever was emitted; what ties with it may have been moved. And of a reference that gave only a list, what is
    likelier than the last but one of that list.
    """
    listed = record.compressed.logprobs
    kept: Bools = view.inside & (view.log_candidates > listed[:, max(record.top_k - 3, 0), None])
    if record.reference_entropy is None:
        listed = record.reference.logprobs
        kept &= view.log_r > (listed[:, -2, None] if listed.shape[1] > 1 else np.inf)
    return kept
