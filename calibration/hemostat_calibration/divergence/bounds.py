"""Bounds that top-K lists prove: lower and upper ones of the divergences of the reference r and the compressed model c.

All figures are in nats, per position, float64 [T]; KL(r‖c) = Σ r log(r/c). A `View` holds both models' values from a
record: S the ids for which both values are known (the compressed side's candidates, the emitted token, as far as the
reference gave them), R and C the two masses outside S. Outside S an id may still be known on one side: P the ids of the
reference's own list that the compressed side did not name, Q candidates for which the reference gave no value (never
with a reference in process), N the rest, named by neither. An id that a model's list does not name is at most as likely
as the least of the list: c ≤ λ_c on P and N, r ≤ λ_r on Q and N (`cap`), and shares what mass the list leaves.

From below, coarse (`coarse`). Merging everything outside S into one bucket is a map applied to both distributions, and
a map cannot increase an f-divergence (data processing inequality; Cover & Thomas, 2006, ch. 2.8). So KL both ways,
Jensen–Shannon and total variation over "S plus one bucket" are lower bounds whatever S is, and exact when S is the
whole vocabulary.

From below, sharper (`bounds`). An f-divergence is Σ r f(c/r) with f convex, so what c must do outside S to be as near
to r as the caps allow is a convex problem whose optimality condition is the same for every f: c/r is one constant μ
wherever c < λ_c. Hence c = min(λ_c, μ r) on P: the capped ids are the likeliest of P, everything else merges into the
bucket. So adding to S the ids of P with r μ > λ_c, as if c were λ_c there, gives the least value that any c within the
caps has; the true c is one of those. (The caps of Q are not used: leaving out a constraint can only lower the least
value.) This shows where the reference prefers ids that the compressed side does not list.

From above. TV = 1 − Σ min(r, c) ≤ 1 − Σ_S min(r, c) − m, m the overlap outside S that the caps force: with R' and C'
the masses that the lists leave and m_c the number of ids that c's does not name, c ≥ C' − (m_c − 1) λ_c at each of
those, and r likewise; m counts the lesser of the two. It is 0 but for vocabularies hardly larger than the lists.
Jensen–Shannon's term j(r, c) is convex and homogeneous, so subadditive, 0 where r = c, (log 2 / 2) r where c = 0:
j(r, c) ≤ (log 2 / 2)|r − c|, which summed outside S is (log 2 / 2)(R + C − 2m). Both are attained by disjoint tails.

KL has no finite upper bound without an assumption: c could be 0 on an id that it did not list. `min_ratio` is that
assumption, stated with the figure: *at an id that is not in both lists, neither model's probability is less than
`min_ratio` times the other's*. Then log(r/c) ≤ M = −log min_ratio there, and with the least values as above
    KL(r‖c) ≤ Σ_S r log(r/c) + Σ_P r min(M, log(r/least c)) + R' min(M, log(λ_r/least c)),
"least c" on Q being c itself. min_ratio = 0 is no assumption, and gives infinity unless S is (almost) everything.

What more of r would add: next to nothing. Where the reference is known whole, let the record hold all of r, not its
list alone. (1) c = min(λ_c, μ r) is the nearest c over all ids; the lower ends are its figures, unless an id behind
the reference's list is at its cap, that is unless λ_r μ > λ_c. (2) Let min_ratio r ≤ λ_c outside S, else the list
contradicts the assumption, and let A be ids outside S with room for the mass C: Σ_A min(λ_c, r/min_ratio) ≥ C. The c
that fills A and is as little as allowed elsewhere has log(r/c) = M outside A and ≥ −M on it, so that the largest
KL(r‖c) is at least the upper end less 2 M r(A). With min_ratio = 0 its overlap with r outside S is at most r(A), so
that the largest TV is at least the upper end less r(A); and the largest JS at least the upper end less ½ r(A) (1 +
log(1 + C/r(A))), since (log 2 / 2)(r + c) − j(r, c) is half the entropy of a coin times r + c, which is concave and
homogeneous. The ids that r finds least likely are such an A, and r(A) is tiny. At K = 20 the ends are within 0.1 % of
these (`make bench-bounds`). What is open is c, and only more of c closes it: longer lists, or `state_recovery`.

Sums of float32 probabilities are off by up to `MASS_ROUNDING`: a mass in a denominator is floored there, which can only
lower a lower bound, and masses are that much larger in an upper one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Bools, Floats, Ids
from hemostat_calibration.divergence.view import (
    MASS_ROUNDING,
    Coarse,
    SumsOverS,
    View,
    coarse,
    outside,
    row_counts,
    row_sums,
    view_of,
    with_bucket,
    xlogy,
)
from hemostat_calibration.records import Candidates, TokenRecord

MIN_RATIO = math.exp(-16.0)
"""The least ratio of two probabilities outside S that the upper bounds of KL rest on; see `Bounds.min_ratio`."""

_COMPARED = 8192
"""The largest number of pairs of ids in a row that are compared directly."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Two ends, float64 [T], with lower ≤ the figure over the whole vocabulary ≤ upper. They are equal if all is
    known.
    """

    lower: Floats
    upper: Floats

    def where(self, available: Bools) -> Interval:
        """Returns the same interval where `available` [T] is True, and NaN elsewhere."""
        return Interval(np.where(available, self.lower, np.nan), np.where(available, self.upper, np.nan))


@dataclass(frozen=True, slots=True)
class Bounds:
    """The intervals for one request, [T], in nats except for `tv`."""

    kl_rc: Interval
    """The interval of KL(r‖c); its upper end holds given `min_ratio`."""
    kl_cr: Interval
    """The interval of KL(c‖r); its upper end holds given `min_ratio`, too."""
    js: Interval
    """The interval of the Jensen–Shannon divergence, without any assumption."""
    tv: Interval
    """The interval of the total variation, without any assumption."""
    min_ratio: float
    """The assumption of KL's upper ends: at an id that is not in both lists, neither probability is less than this
    times the other. At 99.6 % of 3,517 positions of SmolLM2 against its W4A16 checkpoint the assumption held for e^−16
    at every id (`make bench-bounds`); at half of 854 positions it held for e^−7."""

    def where(self, available: Bools) -> Bounds:
        """Returns the same bounds where `available` [T], NaN elsewhere."""
        if available.all():
            return self
        return Bounds(
            self.kl_rc.where(available),
            self.kl_cr.where(available),
            self.js.where(available),
            self.tv.where(available),
            self.min_ratio,
        )


def bounds(record: TokenRecord, min_ratio: float = MIN_RATIO) -> Bounds:
    """Returns what a validated record proves about r and c. min_ratio: 0 to 1, see `Bounds.min_ratio`; 0 is no
    assumption.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> ends = bounds(record).tv
    >>> ends.lower.round(6).tolist(), ends.upper.round(3).tolist()
    ([0.2], [0.3])
    """
    view = view_of(record)
    known = coarse(view, view.c, view.log_c)
    return bounds_of(record, view, known, view.log_candidates, cap(record.compressed, record.output_ids), min_ratio)


def cap(candidates: Candidates, emitted: Ids) -> Floats:
    """Returns the largest log-probability that an id can have which a list of the likeliest does not name, float64 [T],
    nats.

    The last place may hold the emitted token, however unlikely: then the id before it is the least likely that is named
    for its rank.

    >>> listed = Candidates(np.array([[4, 7]], np.int32), np.log([[0.6, 0.3]]))
    >>> [np.exp(cap(listed, np.array([emitted], np.int32))).round(6).tolist() for emitted in (4, 7)]
    [[0.3], [0.6]]
    """
    rows = np.arange(len(emitted))
    last = row_counts(candidates.ids >= 0) - 1
    last -= candidates.ids[rows, last] == emitted
    least: Floats = np.where(last >= 0, np.minimum(candidates.logprobs[rows, np.maximum(last, 0)], 0.0), 0.0)
    return least


def named(ids: Ids, others: Ids) -> Bools:
    """Returns which of `ids` [T, J] are among `others` [T, N] of the same row, bool [T, J].

    >>> named(np.array([[1, 2]], np.int32), np.array([[2, 3, 4]], np.int32)).tolist()
    [[False, True]]
    """
    if ids.shape[1] * others.shape[1] <= _COMPARED:
        # Column by column, positions side by side in memory.
        columns, among = np.ascontiguousarray(ids.T), np.zeros(ids.shape[::-1], dtype=np.bool_)
        for other in np.ascontiguousarray(others.T):
            among |= columns == other
        return among.T
    # Long lists: an offset makes ids of different rows different, so that one sorted search serves all rows.
    offset = np.arange(len(ids), dtype=np.int64)[:, None] << 32
    return np.isin(ids + offset, others + offset)


def bounds_of(
    record: TokenRecord, view: View, known: Coarse, log_p: Floats, log_cap: Floats, min_ratio: float = MIN_RATIO
) -> Bounds:
    """Returns what a record proves about r and any p: the compressed model, or what a profile makes of it.

    known: the one-bucket figures of r and p. log_p: log p of every candidate, [T, N]. log_cap: the largest that log p
    can be elsewhere, [T]. min_ratio: see `Bounds.min_ratio`.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> view = view_of(record)
    >>> known = coarse(view, view.c, view.log_c)
    >>> ends = bounds_of(record, view, known, view.log_candidates, cap(record.compressed, record.output_ids))
    >>> bool((ends.js.lower <= ends.js.upper).all())
    True
    """
    if view.exact:
        kl_rc, kl_cr, js, tv = (Interval(x, x) for x in (known.kl_rc, known.kl_cr, known.js, known.tv))
        return Bounds(kl_rc, kl_cr, js, tv, min_ratio)
    reference = record.reference
    on_p = (reference.ids >= 0) & ~named(reference.ids, view.ids)
    on_q = (view.ids >= 0) & ~view.inside
    log_r_p = np.where(on_p, reference.logprobs, -np.inf)
    p = np.exp(log_p)
    r_p, p_q = np.exp(log_r_p), np.where(on_q, p, 0.0)
    r_out, p_out = outside(known.sums.r, exact=False), outside(known.sums.p, exact=False)
    cap_r, cap_p = np.exp(cap(reference, record.output_ids)), np.exp(log_cap)
    lower = _capped(known, on_p, log_r_p, r_p, r_out, p_out, log_cap)

    q_ids = row_counts(on_q)
    p_ids = row_counts(on_p)
    unnamed = record.domain - row_counts(view.inside) - p_ids - q_ids
    r_rest = _Rest.of(np.maximum(r_out - row_sums(r_p), 0.0), unnamed + q_ids, cap_r)
    p_rest = _Rest.of(np.maximum(p_out - row_sums(p_q), 0.0), unnamed + p_ids, cap_p)
    most = math.inf if min_ratio == 0.0 else -math.log(min_ratio)
    with np.errstate(divide="ignore", invalid="ignore"):
        least_p = np.where(unnamed > 0, p_rest.least, np.inf)
        least_r = np.where(unnamed > 0, r_rest.least, np.inf)
        if on_q.any():
            least_p = np.minimum(least_p, np.where(on_q, p_q, np.inf).min(axis=1))
        if on_p.any():
            least_r = np.minimum(least_r, np.where(on_p, r_p, np.inf).min(axis=1))
        most_rc = known.kl_rc - _bucket_term(r_out, p_out) + r_rest.most_kl(least_p, most)
        most_rc += _one_sided(r_p, log_r_p, p_rest.least, most)
        most_cr = known.kl_cr - _bucket_term(p_out, r_out) + p_rest.most_kl(least_r, most)
        most_cr += _one_sided(p_q, np.where(on_q, log_p, -np.inf), r_rest.least, most)
        both = r_out + p_out
        most_js = known.js - 0.5 * (xlogy(r_out, 2.0 * r_out / both) + xlogy(p_out, 2.0 * p_out / both))
    overlap = unnamed * np.minimum(r_rest.least, p_rest.least)
    overlap += row_sums(np.minimum(r_p, p_rest.least[:, None])) + row_sums(np.minimum(p_q, r_rest.least[:, None]))
    apart = np.maximum(r_out + p_out + 2.0 * MASS_ROUNDING - 2.0 * overlap, 0.0)
    most_tv = known.tv - 0.5 * np.abs(r_out - p_out) + 0.5 * apart
    complete = unnamed + p_ids + q_ids <= 0
    return Bounds(
        kl_rc=_interval(lower.kl_rc, most_rc, complete, np.inf),
        kl_cr=_interval(lower.kl_cr, most_cr, complete, np.inf),
        js=_interval(lower.js, most_js + 0.5 * math.log(2.0) * apart, complete, math.log(2.0)),
        tv=_interval(lower.tv, most_tv, complete, 1.0),
        min_ratio=min_ratio,
    )


def _capped(
    known: Coarse, on_p: Bools, log_r_p: Floats, r_p: Floats, r_out: Floats, p_out: Floats, log_cap: Floats
) -> Coarse:
    """Returns the sharper lower bounds. The reference's list is ordered from its likeliest id, so the capped ids of P
    come first in it: an id is capped if it is capped when all before it are."""
    capped_p = np.exp(log_cap)[:, None]
    left_r = np.maximum(r_out[:, None] - _before(r_p), r_p)
    left_p = p_out[:, None] - capped_p * _before(on_p.astype(np.float64))
    at_cap = on_p & (r_p * left_p > capped_p * left_r)
    rows, columns = at_cap.any(axis=1), at_cap.any(axis=0)
    if not rows.any():
        return known
    # To the sums over S come those of the capped ids, as if they were in it.
    chosen, there = at_cap[np.ix_(rows, columns)], np.ix_(rows, columns)
    log_p = np.where(chosen, log_cap[rows, None], -np.inf)
    added = SumsOverS.of(
        np.where(chosen, r_p[there], 0.0), np.where(chosen, log_r_p[there], -np.inf), np.exp(log_p), log_p
    )
    sharp = with_bucket(known.sums.at(rows).plus(added), exact=False)

    def put(values: Floats, sharper: Floats) -> Floats:
        put_in = values.copy()
        put_in[rows] = np.maximum(values[rows], sharper)
        return put_in

    return Coarse(
        kl_rc=put(known.kl_rc, sharp.kl_rc),
        kl_cr=put(known.kl_cr, sharp.kl_cr),
        js=put(known.js, sharp.js),
        tv=put(known.tv, sharp.tv),
        sums=known.sums,
    )


def _before(x: Floats) -> Floats:
    """Returns the sums of what is before each value in its row, [T, N]."""
    if x.shape[1] > len(x):
        return np.cumsum(x, axis=1) - x
    # Column by column: numpy's sums along a row take one value at a time.
    result, total = np.empty_like(x), np.zeros(len(x))
    for n in range(x.shape[1]):
        result[:, n] = total
        total += x[:, n]
    return result


@dataclass(frozen=True, slots=True)
class _Rest:
    """A model outside its list, [T]: the mass in all, and the least and the most that one id can have."""

    mass: Floats
    least: Floats
    most: Floats

    @classmethod
    def of(cls, mass: Floats, ids: npt.NDArray[np.int64], capped: Floats) -> _Rest:
        least = np.maximum(mass - MASS_ROUNDING - np.maximum(ids - 1, 0) * capped, 0.0)
        return cls(
            np.where(ids > 0, mass, 0.0), np.where(ids > 0, least, 0.0), np.minimum(capped, mass + MASS_ROUNDING)
        )

    def most_kl(self, least_other: Floats, most: float) -> Floats:
        """Returns the upper bound of Σ x log(x/y) over those ids, y at least `least_other`, infinite where there is no
        such id."""
        log_ratio = np.minimum(most, np.log(self.most) - np.log(least_other))
        mass = np.where(log_ratio > 0.0, self.mass + MASS_ROUNDING, np.maximum(self.mass - MASS_ROUNDING, 0.0))
        return np.where((self.most == 0.0) | np.isinf(least_other), 0.0, mass * log_ratio)


def _bucket_term(x: Floats, y: Floats) -> Floats:
    return xlogy(x, x / np.maximum(y, MASS_ROUNDING))


def _one_sided(x: Floats, log_x: Floats, least: Floats, most: float) -> Floats:
    """Returns the upper bound of Σ x log(x/y) over ids where x is known and y at least `least`."""
    log_ratio = np.minimum(most, log_x - np.log(least)[:, None])
    return row_sums(np.where(x > 0.0, x * log_ratio, 0.0))


def _interval(lower: Floats, upper: Floats, complete: Bools, largest: float) -> Interval:
    return Interval(lower, np.where(complete, lower, np.clip(upper, lower, largest)))
