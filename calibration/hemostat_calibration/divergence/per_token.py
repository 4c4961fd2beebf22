"""Divergences of the compressed model c from the reference r, token by token, when only parts of both are known.

All figures are in nats, per position, float64 [T]; KL(r‖c) = Σ r log(r/c). r and c are the models' own
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
needs the whole vocabulary): NaN, "not available". The caller must handle penalties, logit_bias and grammars, which are
not in a record. Where the compressed model's distribution was recovered well enough (`record.recovered`), the
divergence from it is the estimate instead, however the token was drawn.

Figures are infinite only where that is true: r(i) > 0 = c(i) makes KL(r‖c) infinite, r(i) = 0 < c(i) KL(c‖r).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hemostat_calibration.arrays import Bools, Floats
from hemostat_calibration.divergence.bounds import MIN_RATIO, Bounds, Interval, bounds_of, cap
from hemostat_calibration.divergence.convex import convex_lower_bound
from hemostat_calibration.divergence.gain import gain
from hemostat_calibration.divergence.profile_shift import (
    at_emitted,
    known_rows,
    log_normalizer_range,
    profile_shift,
)
from hemostat_calibration.divergence.sampled_estimate import importance_weight, sampled_estimates
from hemostat_calibration.divergence.view import (
    MASS_ROUNDING,
    Coarse,
    View,
    coarse,
    jensen_shannon,
    row_sums,
    total_variation,
    view_of,
    xlogy,
)
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import max_shift
from hemostat_calibration.records import ExactDistances, TokenRecord


@dataclass(frozen=True, slots=True)
class TokenDivergence:
    """One request's figures; arrays [T], nats unless stated otherwise."""

    bound: Literal["lower", "exact"]
    """It says if `kl_rc`, `kl_cr`, `js`, `tv` and `entropy_compressed` are exact, which they are when S is the whole
    vocabulary, or lower bounds.
    """
    kl_rc: Floats
    """The divergence KL(r‖c)."""
    kl_cr: Floats
    """The divergence KL(c‖r)."""
    js: Floats
    """The Jensen–Shannon divergence, at most log 2."""
    tv: Floats
    """The total variation, 0 to 1."""
    covered_reference: Floats
    """The mass of r on S, 0 to 1."""
    covered_compressed: Floats
    """The mass of c on S, 0 to 1; the least that it can be if a profile's normalizer is known as an interval only."""
    top1_agreement: Bools
    """The likeliest of c's candidates is r's likeliest id; see `top1_known`."""
    delta_log_likelihood: Floats
    """The difference log c(x) − log r(x) for the emitted token x; NaN after a profile whose normalizer is unknown."""
    delta_p: Floats
    """Δp = c(x) − r(x) of the emitted token x, −1 to 1 (llama.cpp's sign: what c adds); NaN likewise."""
    entropy_reference: Floats
    """H(r): exact when the record holds it, else the entropy of r's own list plus one bucket, a lower bound."""
    entropy_compressed: Floats
    """H(c) over c's candidates plus one bucket: a lower bound, since merging outcomes cannot increase entropy."""
    estimate_rc: Floats
    """An estimate of KL(r‖c) without truncation bias; NaN where it is not available. Equal to `kl_rc` when exact. From
    the recovered distribution where `recovered`."""
    estimate_cr: Floats
    """An estimate of KL(c‖r) of the same kind; after a profile, never from a recovered distribution."""
    estimate_js: Floats
    """The Jensen–Shannon divergence from the compressed model's recovered distribution; NaN where that is not used, and
    after a profile. It is equal to `js` when exact.
    """
    estimate_tv: Floats
    """The total variation from the same distribution; NaN in the same cases. It is equal to `tv` when exact."""
    recovered: Bools
    """It is True if `estimate_rc` is from the compressed model's recovered distribution."""
    bounds: Bounds
    """The proven intervals of the four divergences. After a profile whose normalizer is unknown: NaN."""
    known: Bools
    """It is False after a profile whose Δz is unknown there (it reads anchors, and the record has no features of them):
    all that depends on Δz is NaN there, and `top1_known` False."""
    top1_known: Bools
    """True if `top1_agreement` is proven. After a profile it is not where Δz is unknown, and where an id behind the
    candidates could have become likelier than all of them. It says nothing of the agreement itself: which positions are
    proven follows from the compressed model alone, but likely ids are proven more often, and agree more often."""


def divergence(
    record: TokenRecord, served: CalibrationProfile | None = None, min_ratio: float = MIN_RATIO
) -> TokenDivergence:
    """Returns all figures of r and c from a validated record.

    served: the profile that `record.applied` names, so that the estimates of a treated request can be weighted; without
    it they are NaN there. min_ratio: see `Bounds.min_ratio`.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> figures = divergence(record)
    >>> figures.bound, figures.kl_rc.round(6).tolist(), figures.tv.round(6).tolist()
    ('exact', [0.109023], [0.2])
    """
    view = view_of(record)
    lower = coarse(view, view.c, view.log_c)
    estimate_rc, estimate_cr = lower.kl_rc, lower.kl_cr
    if not view.exact:
        weight = importance_weight(record, view, served)
        estimate_rc, estimate_cr = sampled_estimates(record, view, view.log_c, record.compressed_emitted, weight)
    recovered = _recovered(record, view)
    unknown = np.full(record.tokens, np.nan)
    estimate_js, estimate_tv = (lower.js, lower.tv) if view.exact else (unknown, unknown)
    if record.recovered is not None:
        estimate_js = np.where(recovered, record.recovered.js, estimate_js)
        estimate_tv = np.where(recovered, record.recovered.tv, estimate_tv)
        estimate_rc = np.where(recovered, np.maximum(record.recovered.kl_rc, 0.0), estimate_rc)
        estimate_cr = np.where(recovered, np.maximum(record.recovered.kl_cr, 0.0), estimate_cr)
    log_cap = cap(record.compressed, record.output_ids)
    return TokenDivergence(
        bound="exact" if view.exact else "lower",
        kl_rc=lower.kl_rc,
        kl_cr=lower.kl_cr,
        js=lower.js,
        tv=lower.tv,
        covered_reference=np.minimum(lower.sums.r, 1.0),
        covered_compressed=np.minimum(lower.sums.p, 1.0),
        top1_agreement=record.compressed.ids[:, 0] == record.reference.ids[:, 0],
        delta_log_likelihood=record.compressed_emitted - record.reference_emitted,
        delta_p=_delta_p(record, record.compressed_emitted),
        entropy_reference=_reference_entropy(record),
        entropy_compressed=_entropy(view.log_candidates),
        estimate_rc=estimate_rc,
        estimate_cr=estimate_cr,
        estimate_js=estimate_js,
        estimate_tv=estimate_tv,
        recovered=recovered,
        bounds=bounds_of(record, view, lower, view.log_candidates, log_cap, min_ratio),
        known=np.ones(record.tokens, dtype=np.bool_),
        top1_known=np.ones(record.tokens, dtype=np.bool_),
    )


def calibrated(
    record: TokenRecord,
    profile: CalibrationProfile,
    served: CalibrationProfile | None = None,
    min_ratio: float = MIN_RATIO,
) -> TokenDivergence:
    """Returns all figures of c' and r from a validated record, c'_i = c_i e^{Δz_i} / Z the compressed model after
    `profile`.

    Z = E_c[e^Δz] is exact where `record.shifts` holds its logarithm or the candidates are the whole vocabulary. Else it
    lies between A + m e^low and A + m e^high: A what the candidates contribute, m the mass behind them, low and high
    the bounds of Δz there; each figure is then the least that it can be over that interval. With a = c e^Δz on S, A now
    its sum over S, w = 1/Z, and R the reference's mass outside S:

    - KL(r‖c') as a function of L = log Z is const + r(S) L − R log(1 − A e^{−L}). With u = A e^{−L} its derivative is
      r(S) − R u/(1 − u), the second R u/(1 − u)² ≥ 0: convex, least at u = r(S), clipped to the interval.
    - KL(c'‖r), JS and TV are convex in c', which is affine in w. KL(c'‖r) is
      Σ a w log(a w/r) + (1 − A w) log((1 − A w)/R); with B = Σ a log(a/r) its derivative,
      B + A log w − A log((1 − A w)/R), is zero at w = κ/(1 + A κ), κ = e^{−B/A}/R: least there, clipped. For JS and TV
      see `convex`.
    - Entropy is concave in w: least at an end.

    From a recovered distribution, KL(r‖c') is estimated as KL(r‖ĉ) less what the profile gains, where that is exact
    (`gain`).

    >>> from hemostat_calibration.profiles.contextual import contextual_profile
    >>> from hemostat_calibration.profiles.transform import anchor_set
    >>> from hemostat_calibration.records import Candidates, Features
    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> halfway = contextual_profile(
    ...     model="",
    ...     anchors=np.array([0]),
    ...     linear=np.zeros((1, 1)),
    ...     offset=np.ones(1),
    ...     up=0.5 * (log_r - log_c).T,
    ...     clamp_nats=1.0,
    ... )
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0],
    ...     features=Features(anchor_set(halfway), np.zeros((1, 1), np.float32))
    ... )
    >>> calibrated(record, halfway).kl_rc.round(4).tolist(), divergence(record).kl_rc.round(4).tolist()
    ([0.0286], [0.109])
    """
    view = view_of(record)
    delta = profile_shift(record, profile, view)
    shifted = known_rows(delta)
    delta = np.where(shifted[:, None], delta, 0.0)
    low, high = log_normalizer_range(record, profile, view, delta)
    known = low == high
    log_a = view.log_c + delta
    a = np.exp(log_a)
    total = row_sums(a)
    r_inside = np.minimum(row_sums(view.r), 1.0)

    def at(log_z: Floats) -> Coarse:
        return coarse(view, a * np.exp(-log_z)[:, None], log_a - log_z[:, None])

    def along(figure: Callable[[View, Floats], tuple[Floats, Floats]]) -> Callable[[Floats], tuple[Floats, Floats]]:
        """Returns the figure of c' = a w and its derivative, as functions of w [T]."""

        def at_weight(w: Floats) -> tuple[Floats, Floats]:
            value, slope_by_log = figure(view, a * w[:, None])
            return value, slope_by_log / w

        return at_weight

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
        js = convex_lower_bound(along(jensen_shannon), np.exp(-high), np.exp(-low))
        tv = convex_lower_bound(along(total_variation), np.exp(-high), np.exp(-low))
        entropy = np.minimum(entropy, _entropy(view.log_candidates + delta - low[:, None]))
    emitted_shift = np.where(known, at_emitted(record, view, delta) - low, np.nan)
    emitted = record.compressed_emitted + emitted_shift
    estimate_rc, estimate_cr = kl_rc, kl_cr
    if not view.exact:
        weight = importance_weight(record, view, served) * np.exp(emitted_shift)
        estimate_rc, estimate_cr = sampled_estimates(record, view, log_a - low[:, None], emitted, weight)
    recovered = _recovered(record, view)
    if record.recovered is not None and recovered.any():
        gained = gain(record, profile)
        recovered &= gained.exact
        estimate_rc = np.where(recovered, np.maximum(record.recovered.kl_rc - gained.lower, 0.0), estimate_rc)
    most = cap(record.compressed, record.output_ids) + max_shift(profile)
    certain = bounds_of(
        record, view, last, view.log_candidates + (delta - high[:, None]), np.minimum(most - high, 0.0), min_ratio
    )
    after = view.log_candidates + delta
    likeliest, rows = after.argmax(axis=1), np.arange(record.tokens)
    agrees = view.ids[rows, likeliest] == record.reference.ids[:, 0]
    complete = (record.compressed.ids >= 0).sum(axis=1) >= record.domain
    top1_known = shifted & (complete | (after[rows, likeliest] >= most))

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
        estimate_js=where_shifted(js) if view.exact else np.full(record.tokens, np.nan),
        estimate_tv=where_shifted(tv) if view.exact else np.full(record.tokens, np.nan),
        recovered=recovered & shifted,
        bounds=certain.where(known & shifted),
        known=shifted,
        top1_known=top1_known,
    )


def _recovered(record: TokenRecord, view: View) -> Bools:
    """Returns the positions at which the record's recovered distribution is used, bool [T]. It is never used if the
    whole vocabulary is known.
    """
    if record.recovered is None or record.support is not None or view.exact:
        return np.zeros(record.tokens, dtype=np.bool_)
    return record.recovered.usable


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


def of_distances(distances: ExactDistances) -> TokenDivergence:
    """Returns the distances in the form of a record's figures; NaN is what was not computed. A KL a little below 0,
    from rounding, is 0.

    >>> distances = ExactDistances(kl=np.array([0.3, np.inf]), tv=np.array([0.2, 1.0]), top1=np.array([True, False]))
    >>> figures = of_distances(distances)
    >>> figures.bound, figures.kl_rc.tolist(), figures.js.tolist()
    ('exact', [0.3, inf], [nan, nan])
    """
    kl = np.maximum(distances.kl, 0.0)
    unknown = np.full(len(kl), np.nan)
    nothing = Interval(unknown, unknown)
    return TokenDivergence(
        bound="exact",
        kl_rc=kl,
        kl_cr=unknown,
        js=unknown,
        tv=distances.tv,
        covered_reference=unknown,
        covered_compressed=unknown,
        top1_agreement=distances.top1,
        delta_log_likelihood=unknown,
        delta_p=unknown,
        entropy_reference=unknown,
        entropy_compressed=unknown,
        estimate_rc=kl,
        estimate_cr=unknown,
        estimate_js=unknown,
        estimate_tv=distances.tv,
        recovered=np.zeros(len(kl), dtype=np.bool_),
        bounds=Bounds(Interval(kl, kl), nothing, nothing, Interval(distances.tv, distances.tv), 0.0),
        known=np.ones(len(kl), dtype=np.bool_),
        top1_known=np.ones(len(kl), dtype=np.bool_),
    )
