"""The distributions that tokens were drawn from: a request's decoding as a label, and both models after that decoding.

A record's log-probabilities are the models' own, at temperature 1. The engine draws from something else: it divides the
logits by the temperature, drops what is less likely than min_p times the likeliest, keeps the top_k likeliest (and what
ties with the last of them), of these the fewest that hold top_p of what is left, and draws from the rest (vLLM's order:
`Sampler.sample`, `MinPLogitsProcessor`, `apply_top_k_top_p`). `decoded_divergence` measures how far apart the two
models are *after* that, the reference decoded with the same parameters: q_c is what the request was drawn from, q_r
what the reference would have been drawn from. Penalties, logit_bias and grammars are not in a record and are not taken
into account.

What top-K lists determine, with w = p^(1/τ):

Greedy (τ < 1e-5). Both are one id: 0 or everything, exact.

Cut (min_p, top_k or top_p). q is known exactly where the cut falls inside the model's own list: then what was not
listed has no probability at all, and the normalizer is the sum of what was kept. For top_p the sum of w over the whole
vocabulary decides where the cut falls; it is known at τ = 1, else it is an interval (below), and the cut must be the
same at both ends. Where the cut is outside either list there is no figure ("not available"): the caller counts it.
Where it falls between ids that tie (logits of 8 bits' precision often do), how many of them are kept is known but not
which: then each of them is taken both ways, and the figure is an interval. KL is infinite where one model keeps an id
that the other drops, which two nuclei mostly do: total variation and Jensen–Shannon are the figures to look at.

Temperature alone. Every id keeps some probability, and Z = Σ w needs what was not listed: mass m on n ids, each at
most λ. Since Σ xᵃ (a = 1/τ) is convex in x for a ≥ 1, concave for a ≤ 1, it lies between its values where the mass is
spread evenly, mᵃ n^(1−a), and where it is on as few ids as λ allows, m λ^(a−1). So each q on the lists is an interval,
and with S the ids known on both sides
    TV ≥ Σ_{S, bucket} (least q_r − most q_c)⁺, likewise exchanged;  TV ≤ 1 − Σ_S min(least q_r, least q_c).
Jensen–Shannon follows from TV: log 2 − h((1 + TV)/2) ≤ JS ≤ TV log 2, h the entropy of a coin (the left: data
processing to the event that attains TV, and of two coins with that difference the symmetric pair is the nearest; Lin,
1991). KL is not given. At temperature 1 all is as in `hemostat_calibration.divergence.bounds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Bools, Floats, Ids
from hemostat_calibration.divergence.bounds import Bounds, Interval, bounds, cap, named
from hemostat_calibration.divergence.view import MASS_ROUNDING, view_of, xlogy
from hemostat_calibration.records import Candidates, Sampling, TokenRecord

GREEDY_BELOW = 1e-5
"""The temperature below which vLLM decodes greedily."""

DECODING_LABELS = (
    "greedy",
    *(f"{band}{cut}" for band in ("t<0.5", "t0.5-1", "t1", "t>1") for cut in ("", " cut")),
)
"""Every label that `decoding_label` gives."""


def decoding_label(sampling: Sampling) -> str:
    """Returns one of `DECODING_LABELS`: the temperature's range, and " cut" where top_p, top_k or min_p cut the
    support.

    >>> decoding_label(Sampling(temperature=0.7, top_p=0.9))
    't0.5-1 cut'
    """
    temperature = sampling.temperature
    if temperature < GREEDY_BELOW:
        return "greedy"
    band = "t<0.5" if temperature < 0.5 else "t0.5-1" if temperature < 1.0 else "t1" if temperature == 1.0 else "t>1"
    return band + (" cut" if _cuts(sampling) else "")


def _cuts(sampling: Sampling) -> bool:
    return sampling.top_p < 1.0 or sampling.top_k > 0 or sampling.min_p > 0.0


@dataclass(frozen=True, slots=True)
class DecodedDivergence:
    """The divergences of q_r and q_c, [T], JS in nats. Both are NaN where not available."""

    tv: Interval
    js: Interval
    available: Bools
    """It is False if the lists do not determine the cut, or if a profile changed what was drawn from."""


def decoded_divergence(record: TokenRecord, certain: Bounds | None = None) -> DecodedDivergence:
    """Returns the divergence of the two models after the request's decoding, for a validated record.

    certain: `bounds(record)`, which are the answer at temperature 1 without a cut; None: they are computed if needed.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0],
    ...     sampling=Sampling(temperature=0.0),
    ... )
    >>> decoded_divergence(record).tv.upper.tolist()
    [0.0]
    """
    sampling = record.sampling
    if record.applied is not None:
        return _nothing(record.tokens)
    if sampling.temperature < GREEDY_BELOW:
        differ = (record.compressed.ids[:, 0] != record.reference.ids[:, 0]).astype(np.float64)
        return DecodedDivergence(
            _exactly(differ), _exactly(math.log(2.0) * differ), np.ones(record.tokens, dtype=np.bool_)
        )
    if _cuts(sampling):
        return _cut(record)
    if sampling.temperature == 1.0:
        result = bounds(record) if certain is None else certain
        return DecodedDivergence(result.tv, result.js, np.ones(record.tokens, dtype=np.bool_))
    return _tempered(record)


def _nothing(tokens: int) -> DecodedDivergence:
    unknown = _exactly(np.full(tokens, np.nan))
    return DecodedDivergence(unknown, unknown, np.zeros(tokens, dtype=np.bool_))


def _exactly(values: Floats) -> Interval:
    return Interval(values, values)


def _unlisted(power: float, log_top: Floats, mass: Floats, ids: Ids, log_cap: Floats) -> tuple[Floats, Floats]:
    """Returns the least and the most of Σ (x/top)ᵃ over `ids` ids that share `mass`, none above the cap, [T]."""
    with np.errstate(over="ignore"):
        top = np.exp(log_top)
        low, high = np.maximum(mass - MASS_ROUNDING, 0.0) / top, (mass + MASS_ROUNDING) / top
        evenly = np.power(np.maximum(ids, 1).astype(np.float64), 1.0 - power)
        on_few = np.exp((power - 1.0) * (log_cap - log_top))
        if power >= 1.0:
            least, most = np.power(low, power) * evenly, high * on_few
        else:
            least, most = low * on_few, np.power(high, power) * evenly
    return np.where(ids > 0, np.minimum(least, most), 0.0), np.where(ids > 0, most, 0.0)


def _cut(record: TokenRecord) -> DecodedDivergence:
    c, r = _kept(record.compressed, record), _kept(record.reference, record)
    available = c.known & r.known
    # Every id is on c's list, or on r's alone.
    only_r = ~named(r.ids, c.ids)
    ids_log_r = np.concatenate([_at(c.ids, r.ids, r.log_q), np.where(only_r, r.log_q, -np.inf)], axis=1)
    ids_log_c = np.concatenate([c.log_q, np.full(r.ids.shape, -np.inf)], axis=1)
    tied_r = np.concatenate([_at(c.ids, r.ids, r.tied.astype(np.float64)) > 0.0, only_r & r.tied], axis=1)
    tied_c = np.concatenate([c.tied, np.zeros(r.ids.shape, dtype=np.bool_)], axis=1)
    low = high = _terms(ids_log_r, ids_log_c)
    for without_r, without_c in ((True, False), (False, True), (True, True)):
        possible = (tied_r | (not without_r)) & (tied_c | (not without_c))
        if possible.any():
            other = _terms(
                np.where(possible & without_r, -np.inf, ids_log_r), np.where(possible & without_c, -np.inf, ids_log_c)
            )
            low, high = np.minimum(low, other), np.maximum(high, other)
    limits = np.array([1.0, math.log(2.0)])[:, None]
    lower, upper = (np.where(available, np.clip(terms.sum(axis=2), 0.0, limits), np.nan) for terms in (low, high))
    tv, js = (Interval(*ends) for ends in zip(lower, upper, strict=True))
    return DecodedDivergence(tv, js, available)


def _terms(log_r: Floats, log_c: Floats) -> Floats:
    """Returns each id's part in TV and in JS: [2, T, N]."""
    r, c = np.exp(log_r), np.exp(log_c)
    with np.errstate(divide="ignore", invalid="ignore"):
        both = r + c
        return np.stack(
            [
                0.5 * np.abs(r - c),
                0.5 * (xlogy(r, 2.0 * r / both) + xlogy(c, 2.0 * c / both)),
            ]
        )


def _at(ids: Ids, others: Ids, values: Floats) -> Floats:
    """Returns the `values` [T, J] of `others` [T, J], at `ids` [T, N] of the same row; -inf where there is none."""
    offset = np.arange(len(ids), dtype=np.int64)[:, None] << 32
    wanted, given = (ids + offset).ravel(), (others + offset).ravel()
    order = np.argsort(given)
    place = order[np.minimum(np.searchsorted(given, wanted, sorter=order), len(given) - 1)]
    result: Floats = np.where(given[place] == wanted, values.ravel()[place], -np.inf).reshape(ids.shape)
    return np.where(ids >= 0, result, -np.inf)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The distribution that one model's tokens would be drawn from: log q of its listed ids, [T, J], -inf where cut.

    tied: the engine may have kept another id of the same probability instead, so that q is this or 0. known: [T],
    nothing else is drawn from.
    """

    ids: Ids
    log_q: Floats
    tied: Bools
    known: Bools


def _kept(candidates: Candidates, record: TokenRecord) -> _Kept:
    sampling, vocabulary = record.sampling, record.domain
    ids, logprobs = candidates.ids, candidates.logprobs
    rows = np.arange(record.tokens)
    # Only ids listed for their rank count: an emitted token behind the others gives no bound for the ids between.
    count = (ids >= 0).sum(axis=1)
    by_rank = count - ((ids[rows, count - 1] == record.output_ids) & (count < vocabulary))
    listed = np.arange(ids.shape[1]) < by_rank[:, None]
    ids = np.where(listed, ids, -1).astype(np.int32)
    power = 1.0 / sampling.temperature
    top = logprobs[:, :1]
    with np.errstate(invalid="ignore", over="ignore"):
        log_w = np.where(listed, power * (logprobs - top), -np.inf)
    w = np.exp(log_w)
    log_cap = cap(candidates, record.output_ids)
    log_w_cap = np.where(by_rank < vocabulary, np.minimum(power * (log_cap - top[:, 0]), 0.0), -np.inf)
    w_cap = np.exp(log_w_cap)
    mass = np.maximum(1.0 - np.where(listed, np.exp(logprobs), 0.0).sum(axis=1), 0.0)
    least, most = _unlisted(power, top[:, 0], mass, vocabulary - by_rank, log_cap)
    known = by_rank > 0

    keep, tied = listed.copy(), np.zeros_like(listed)
    # Whether ids that are not listed may be kept, and the least and most that those have.
    outside = by_rank < vocabulary
    if sampling.min_p > 0.0:
        keep &= w >= sampling.min_p
        outside &= w_cap >= sampling.min_p
        least, most = np.zeros_like(least), np.where(outside, most, 0.0)
    if sampling.top_k > 0:
        cuts = sampling.top_k < vocabulary
        kth = np.minimum(sampling.top_k, by_rank) - 1
        # By their logarithms: at a low temperature several w are 0 and would seem to tie.
        log_w_k = log_w[rows, np.maximum(kth, 0)]
        inside = cuts & (sampling.top_k <= by_rank) & ((log_w_cap < log_w_k) | ~outside)
        keep &= np.where(inside[:, None], log_w >= log_w_k[:, None], True)
        outside &= ~inside
        least, most = np.where(cuts, 0.0, least), np.where(inside, 0.0, most)
    if sampling.top_p < 1.0:
        w = np.where(keep, w, 0.0)
        total = w.sum(axis=1)
        before = np.cumsum(w, axis=1) - w
        first = np.arange(w.shape[1]) == 0
        low, high = total + least, total + most
        kept = keep & ((before < sampling.top_p * low[:, None]) | first)
        kept_high = keep & ((before < sampling.top_p * high[:, None]) | first)
        inside = (kept == kept_high).all(axis=1) & (~outside | (total >= sampling.top_p * high))
        # Among equals the engine chooses: how many of them it keeps is known, not which.
        last = keep & (w == np.where(kept, w, np.inf).min(axis=1, keepdims=True))
        tied = last & (last & ~kept).any(axis=1, keepdims=True)
        known &= inside & ~(outside & (w_cap >= np.where(kept, w, np.inf).min(axis=1)))
        keep, outside = kept, np.zeros_like(outside)
    known &= ~outside
    total = np.where(keep & known[:, None], w, 0.0).sum(axis=1, keepdims=True)
    log_q = log_w - np.log(np.where(known[:, None], total, 1.0))
    return _Kept(ids, np.where((keep | tied) & known[:, None], log_q, -np.inf), tied, known)


def _tempered(record: TokenRecord) -> DecodedDivergence:
    view = view_of(record)
    power = 1.0 / record.sampling.temperature
    reference = record.reference
    on_p = (reference.ids >= 0) & ~named(reference.ids, view.ids)
    log_p = np.where(on_p, reference.logprobs, -np.inf)
    given = view.ids >= 0
    r_least, r_most = _ends(
        power,
        view.log_r,
        np.concatenate([view.log_r, log_p], axis=1),
        record.domain - view.inside.sum(axis=1) - on_p.sum(axis=1),
        cap(reference, record.output_ids),
    )
    c_least, c_most = _ends(
        power,
        view.log_c,
        np.where(given, view.log_candidates, -np.inf),
        record.domain - given.sum(axis=1),
        cap(record.compressed, record.output_ids),
    )
    lower = np.maximum(_excess(r_least, c_most, r_most, c_least), _excess(c_least, r_most, c_most, r_least))
    upper = 1.0 - np.minimum(r_least, c_least).sum(axis=1)
    lower, upper = np.clip(lower, 0.0, 1.0), np.clip(upper, 0.0, 1.0)
    upper = np.maximum(lower, upper)
    up, down = 0.5 * (1.0 + lower), 0.5 * (1.0 - lower)
    js = Interval(np.maximum(math.log(2.0) + xlogy(up, up) + xlogy(down, down), 0.0), math.log(2.0) * upper)
    return DecodedDivergence(Interval(lower, upper), js, np.ones(record.tokens, dtype=np.bool_))


def _ends(power: float, log_s: Floats, log_known: Floats, ids: Ids, log_cap: Floats) -> tuple[Floats, Floats]:
    """Returns the least and the most of p^a/Z on S, [T, N]. log_known: all that is known, [T, M]; ids: how many are
    not, [T]."""
    top = log_known.max(axis=1, keepdims=True)
    inside = np.exp(power * (log_known - top)).sum(axis=1)
    mass = np.maximum(1.0 - np.exp(log_known).sum(axis=1), 0.0)
    least, most = _unlisted(power, top[:, 0], mass, ids, log_cap)
    w = np.exp(power * (log_s - top))
    return w / (inside + most)[:, None], w / (inside + least)[:, None]


def _excess(x_least: Floats, y_most: Floats, x_most: Floats, y_least: Floats) -> Floats:
    """Returns a lower bound of Σ (x − y)⁺ over S and the bucket, [T]."""
    on_s = np.maximum(x_least - y_most, 0.0).sum(axis=1)
    bucket_x = 1.0 - np.minimum(x_most.sum(axis=1), 1.0)
    bucket_y = 1.0 - np.minimum(y_least.sum(axis=1), 1.0)
    excess: Floats = on_s + np.maximum(bucket_x - bucket_y, 0.0)
    return excess
