"""The figures of one group of scored requests, with their intervals.

Every figure has a name, a kind (a one-sided bound, an estimate, exact), the range to which its values are clipped for
the mean, and two intervals that may be looked at as often as one likes. The unit is the request: tokens of one request
are correlated.

`ci95`         of the mean per token, asymptotic: its coverage is right for many effective requests that have one
               distribution, with a tail that the requests so far show; see
               `hemostat_calibration.statistics.confidence`. Without ends while there are not enough effective requests,
               or too few of them carry the tokens (`no_interval` says so):
               `inflation` is v̂, how much more their sums vary than sums of independent ones, and
               `effective_requests` requests / v̂.
`ci95_finite`  of headline figures by request (`by_request`, the mean of the requests' means): holds for any number of
               requests, whatever their distribution and drift; wide. None is "not enough requests": wider than half
               of the figure's range. By token its width would be room for requests of `shadow.max_tokens` at the end
               of the range: of no use before many thousands of requests. See
               `hemostat_calibration.statistics.running_mean`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hemostat.measurement.dependence import NO_CYCLE, Cycle, Dependence, told_of_mean
from hemostat_calibration.arrays import Bools, Floats
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.confidence import ClippedMean, ConfidenceInterval, MeanSequence
from hemostat_calibration.statistics.mean_table import MeanTable, RunningMeanTable
from hemostat_calibration.statistics.running_mean import enough

Kind = Literal["lower", "upper", "estimate", "exact"]

COMPRESSED, REFERENCE = "compressed", "reference"
MODELS = (COMPRESSED, REFERENCE)
"""The two models, as the label `model` of metrics names them."""
KL_CAP = 20.0
"""The limit in nats at which a token's KL is clipped for the mean, and ± at which its log-likelihood ratio is, so that
one token in a million does not change the mean. The clipped share is reported too.
"""
ENTROPY_CAP = math.log(1 << 24)
"""The entropy of the uniform distribution over a vocabulary larger than any."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a request.

    values: the values of its tokens, [T], NaN where not available. lo, cap: its range; what lies outside is clipped.
    kind: what the figure is if the lists do not hold the whole vocabulary. plain: the report has it as a number, with
    its interval under `ci95`.
    """

    values: Callable[[TokenDivergence], npt.NDArray[Any]]
    lo: float
    cap: float
    kind: Kind = "exact"
    plain: bool = False


def _entropy_shift(d: TokenDivergence) -> Floats:
    return d.entropy_compressed - d.entropy_reference


FIGURES: Mapping[str, Figure] = {
    "kl_nats": Figure(lambda d: d.kl_rc, 0.0, KL_CAP, "lower"),
    "kl_nats_upper": Figure(lambda d: d.bounds.kl_rc.upper, 0.0, KL_CAP, "upper"),
    "kl_nats_estimate": Figure(lambda d: d.estimate_rc, 0.0, KL_CAP, "estimate"),
    "reverse_kl_nats": Figure(lambda d: d.kl_cr, 0.0, KL_CAP, "lower"),
    "reverse_kl_nats_upper": Figure(lambda d: d.bounds.kl_cr.upper, 0.0, KL_CAP, "upper"),
    "reverse_kl_nats_estimate": Figure(lambda d: d.estimate_cr, 0.0, KL_CAP, "estimate"),
    "js_nats": Figure(lambda d: d.js, 0.0, math.log(2.0), "lower"),
    "js_nats_upper": Figure(lambda d: d.bounds.js.upper, 0.0, math.log(2.0), "upper"),
    "total_variation": Figure(lambda d: d.tv, 0.0, 1.0, "lower", plain=True),
    "total_variation_upper": Figure(lambda d: d.bounds.tv.upper, 0.0, 1.0, "upper"),
    "js_nats_estimate": Figure(lambda d: d.estimate_js, 0.0, math.log(2.0), "estimate"),
    "total_variation_estimate": Figure(lambda d: d.estimate_tv, 0.0, 1.0, "estimate"),
    "recovered_share": Figure(lambda d: d.recovered.astype(np.float64), 0.0, 1.0, plain=True),
    "top1_agreement": Figure(lambda d: np.where(d.known, d.top1_agreement, np.nan), 0.0, 1.0, plain=True),
    "covered_mass": Figure(lambda d: d.covered_compressed, 0.0, 1.0, plain=True),
    "covered_mass_reference": Figure(lambda d: d.covered_reference, 0.0, 1.0),
    "delta_log_likelihood_nats": Figure(lambda d: d.delta_log_likelihood, -KL_CAP, KL_CAP),
    "delta_p": Figure(lambda d: d.delta_p, -1.0, 1.0),
    "delta_p_squared": Figure(lambda d: d.delta_p**2, 0.0, 1.0),
    "entropy_compressed_nats": Figure(lambda d: d.entropy_compressed, 0.0, ENTROPY_CAP, "lower"),
    "entropy_reference_nats": Figure(lambda d: d.entropy_reference, 0.0, ENTROPY_CAP, "lower"),
    "entropy_shift_nats": Figure(_entropy_shift, -ENTROPY_CAP, ENTROPY_CAP, "estimate"),
}
"""All figures by the name in the report. KL is KL(reference‖compressed), `reverse_kl` the other way."""

HEADLINE = (
    *("kl_nats", "reverse_kl_nats", "js_nats", "total_variation", "kl_nats_upper"),
    *("kl_nats_estimate", "reverse_kl_nats_estimate", "top1_agreement"),
)
"""The figures that have a finite-sample interval, too, and are exported as metrics with their asymptotic ones."""
MAX_TOKENS = 4096
"""The default of `shadow.max_tokens`, which bounds the tokens of a scored request."""

DRAFT_ACCEPTANCE_OF = {"total_variation", "total_variation_upper"}
"""The figures that `draft_acceptance` is made of."""
INFINITE = ("kl_nats", "reverse_kl_nats")
"""The figures that may be infinite at a token; such tokens are also counted."""

_AT = {name: at for at, name in enumerate(FIGURES)}
_LO = np.array([[figure.lo] for figure in FIGURES.values()])
_CAP = np.array([[figure.cap] for figure in FIGURES.values()])
_MAY_BE_BELOW = _LO[:, 0] < 0.0
"""The figures whose values are clipped below, too. No value of the others is below their range but for rounding."""
_LEAST = np.where(_LO < 0.0, -np.inf, _LO - 1e-9 * (_CAP - _LO))


@dataclass(frozen=True, slots=True, eq=False)
class TokenSums:
    """Sums over tokens of one request, of all `FIGURES` in their order.

    tokens: their number. exact: the lists hold the whole vocabulary. total: float64 [F], Σ of the clipped values.
    count: float64 [F], the number of tokens that have a value. below, above: int [F], the tokens that were clipped
    there. infinite: int [F], the tokens with an infinite value.
    """

    tokens: int
    exact: bool
    total: Floats
    count: Floats
    below: npt.NDArray[np.int64]
    above: npt.NDArray[np.int64]
    infinite: npt.NDArray[np.int64]


class RequestFigures:
    """One request's figures, with their sums, which are computed once for all groups that the request belongs to."""

    __slots__ = ("_clipped", "_sums", "_values", "tokens")

    def __init__(self, figures: TokenDivergence) -> None:
        self.tokens = figures
        """The figures by token."""
        self._values: Floats | None = None
        """All figures, [F, T]."""
        self._clipped: Floats | None = None
        """The same within their ranges, 0 where there is no value."""
        self._sums: TokenSums | None = None

    @property
    def sums(self) -> TokenSums:
        """The sums over all tokens. Raises InvalidArgumentError if a value is below its range, by more than rounding,
        where none can be."""
        if self._sums is None:
            self._sums = self._sums_of(*self._arrays())
        return self._sums

    def sums_at(self, at: Bools) -> TokenSums:
        """Returns the sums over the chosen tokens. at: bool [T]. Raises InvalidArgumentError as `sums`."""
        if at.all():
            return self.sums
        values, clipped = self._arrays()
        return self._sums_of(values[:, at], clipped[:, at])

    def _arrays(self) -> tuple[Floats, Floats]:
        if self._values is None or self._clipped is None:
            values = np.empty((len(FIGURES), len(self.tokens.kl_rc)))
            for at, figure in enumerate(FIGURES.values()):
                values[at] = figure.values(self.tokens)
            wrong = (values < _LEAST).any(axis=1)
            if wrong.any():
                raise InvalidArgumentError(f"a value of {list(FIGURES)[int(wrong.argmax())]} is below its range")
            self._values = values
            self._clipped = np.where(np.isnan(values), 0.0, np.minimum(np.maximum(values, _LO), _CAP))
        return self._values, self._clipped

    def _sums_of(self, values: Floats, clipped: Floats) -> TokenSums:
        return TokenSums(
            tokens=values.shape[1],
            exact=self.tokens.bound == "exact",
            total=clipped.sum(axis=1),
            count=(values == values).sum(axis=1).astype(np.float64),  # noqa: PLR0124  NaN is not equal to itself
            below=np.where(_MAY_BE_BELOW, (values < _LO).sum(axis=1), 0),
            above=(values > _CAP).sum(axis=1),
            infinite=np.isinf(values).sum(axis=1),
        )


def _ends(interval: ConfidenceInterval, *, known: bool) -> list[float | None]:
    """Returns the ends of an interval, JSON-ready; None each if the interval is not known."""
    return [finite(interval.low), finite(interval.high)] if known else [None, None]


class StageFigures:
    """The figures over the requests of one group. names: which of `FIGURES`. cycle: of the traffic."""

    def __init__(self, names: Collection[str] = tuple(FIGURES), cycle: Cycle = NO_CYCLE) -> None:
        self._figures = {name: FIGURES[name] for name in names}
        self._rows = {name: row for row, name in enumerate(self._figures)}
        """The row of each figure in what is kept for all of them."""
        self._at = np.array([_AT[name] for name in self._figures])
        """The place of each row in `TokenSums`."""
        self._means = MeanTable.of(len(self._at))
        self._clipped: npt.NDArray[np.int64] = np.zeros(len(self._at), np.int64)
        """The tokens below and above the range, times the weights of their requests, rounded for each request."""
        by_request = [name for name in self._figures if name in HEADLINE]
        self._by_request_rows = {name: row for row, name in enumerate(by_request)}
        self._by_request_at = np.array([_AT[name] for name in by_request], np.int64)
        self._by_request = RunningMeanTable.of(_LO[self._by_request_at, 0], _CAP[self._by_request_at, 0])
        self._dependence = Dependence(len(self._figures), cycle)
        self._inflations: dict[str, float] = dict.fromkeys(self._figures, math.inf)
        """The v̂ by figure after as many requests as `_inflations_of` says."""
        self._inflations_of = 0
        self._infinite = {name: 0 for name in INFINITE if name in self._figures}
        self._exact = True
        self._cached: dict[str, Any] = {}
        """The summary after `requests` of its own."""
        self.requests = 0
        self.tokens = 0

    def update(self, figures: TokenDivergence | TokenSums, client: bytes = b"", weight: float = 1.0) -> None:
        """Adds one request. figures: its figures, or their sums (`RequestFigures`). client: the digest of whom it is
        from. weight: the number of requests that it stands for in means per token; it counts once in `by_request`."""
        sums = figures if isinstance(figures, TokenSums) else RequestFigures(figures).sums
        total, count, at = sums.total, sums.count, self._by_request_at
        with np.errstate(invalid="ignore"):
            means = total[at] / count[at]  # NaN where no token has a value
        by_request = self._by_request.update(means)
        x, n = weight * total[self._at], weight * count[self._at]
        self._means, self._by_request = self._means.update(x, n), by_request
        self._dependence.update(x, n, client)
        self._clipped += np.rint(weight * sums.below[self._at]).astype(np.int64)
        self._clipped += np.rint(weight * sums.above[self._at]).astype(np.int64)
        for name in self._infinite:
            self._infinite[name] += int(sums.infinite[_AT[name]])
        self.requests += 1
        self.tokens += sums.tokens
        self._exact = self._exact and sums.exact

    def _mean(self, name: str) -> ClippedMean:
        row = self._rows[name]
        return ClippedMean(FIGURES[name].lo, FIGURES[name].cap, self.sequence(name), int(self._clipped[row]))

    def mean(self, name: str) -> float | None:
        """Returns one figure's mean; None if nothing was measured."""
        return finite(self._mean(name).get().mean)

    def inflation(self, name: str) -> float:
        """Returns v̂ of one figure; infinite if it is not known."""
        return self._inflation_seen(name) if self._dependence.whole else math.inf

    def _inflation_seen(self, name: str) -> float:
        """Returns v̂ of one figure in traffic like in the hours seen, also before they are a whole cycle."""
        if self._inflations_of != self.requests:
            result = self._dependence.inflations_seen().tolist()
            self._inflations, self._inflations_of = dict(zip(self._figures, result, strict=True)), self.requests
        return self._inflations[name]

    def has_interval(self, name: str) -> bool:
        """Returns if v̂ of one figure is known, and enough effective requests carry its tokens."""
        v = self.inflation(name)
        return math.isfinite(v) and not self.sequence(name).carried_by_few(v)

    def interval(self, name: str, alpha: float) -> ConfidenceInterval:
        """Returns one figure's mean with its asymptotic interval of 1 − alpha; its whole range unless
        `has_interval`."""
        return self._mean(name).get(alpha, self.inflation(name))

    def sequence(self, name: str) -> MeanSequence:
        """Returns one figure's mean, for the difference from another group."""
        return self._means.row(self._rows[name])

    def figure(self, name: str) -> dict[str, Any]:
        """Returns one figure, JSON-ready: `estimate` (the mean), `ci95`, `inflation`, `effective_requests`, `bound`
        (its kind), `cap`, `clipped_share`, `no_interval` (why there is none although v̂ is known). Headline figures
        also have `ci95_seen` (as `ci95`, but for traffic like in the hours seen, if these are no whole cycle) and
        `by_request`: the mean of the requests' means with its `ci95_finite`.
        """
        mean, seen, v = self._mean(name), self._inflation_seen(name), self.inflation(name)
        interval = mean.get(inflation=seen)  # v is the same, or not known
        few = math.isfinite(seen) and mean.sequence.carried_by_few(seen)
        clipped = mean.clipped / mean.tokens if mean.tokens else 0.0
        result: dict[str, Any] = {
            "estimate": finite(interval.mean),
            "ci95": _ends(interval, known=math.isfinite(v) and not few),
            **told_of_mean(mean.requests, v, carried_by_few=few),
        }
        if name in self._by_request_rows:
            result["ci95_seen"] = _ends(interval, known=math.isfinite(seen) and not few)
            by_request = self._by_request.row(self._by_request_rows[name])
            result["by_request"] = {
                "estimate": finite(by_request.mean),
                "ci95_finite": ends_or_none(by_request.get(), by_request.lo, by_request.hi),
            }
        return {
            **result,
            "bound": "exact" if self._exact else FIGURES[name].kind,
            "cap": FIGURES[name].cap,
            "clipped_share": clipped,
        }

    def draft_acceptance(self) -> dict[str, Any]:
        """Returns 1 − TV: the expected share of the compressed model's tokens that the reference would accept if the
        compressed model were its draft: speculative sampling accepts x ~ c with probability min(1, r(x)/c(x)), so Σ
        min(r, c). `lower`, `upper`: from the bounds of TV, equal where it is exact. `ci95`: around both. JSON-ready."""
        least, most = self.figure("total_variation"), self.figure("total_variation_upper")
        if self._exact:
            most = least

        def accepted(tv: float | None) -> float | None:
            return None if tv is None else 1.0 - tv

        return {
            "lower": accepted(most["estimate"]),
            "upper": accepted(least["estimate"]),
            "ci95": [accepted(most["ci95"][1]), accepted(least["ci95"][0])],
            "bound": "exact" if self._exact else "interval",
        }

    def summary(self) -> dict[str, Any]:
        """Returns all figures, None if nothing was measured; JSON-ready. Cached until a request is added: the
        console asks for every group every other second."""
        if self._cached.get("requests") != self.requests:
            self._cached = self._to_json()
        return dict(self._cached)

    def _to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {"requests": self.requests, "tokens": self.tokens}
        by_figure = ("ci95", "inflation", "effective_requests", "no_interval")
        result |= {key: {} for key in (*by_figure, "by_request")}
        for name, figure in self._figures.items():
            row = self.figure(name)
            if figure.plain:
                result[name] = row["estimate"]
                for key in by_figure:
                    result[key][name] = row[key]
                if "by_request" in row:
                    result["by_request"][name] = row["by_request"]
            else:
                result[name] = row
        for name, tokens in self._infinite.items():
            result[name]["infinite_tokens"] = tokens
        if self._figures.keys() >= DRAFT_ACCEPTANCE_OF:
            result["draft_acceptance"] = self.draft_acceptance()
        if "delta_log_likelihood_nats" not in result:
            return result
        # The compressed model generated the text itself: a ratio below 1 does not mean that it is the better model.
        shift = result["delta_log_likelihood_nats"]
        result["perplexity_ratio"] = {
            "estimate": None if shift["estimate"] is None else math.exp(-shift["estimate"]),
            "ci95": [None if end is None else math.exp(-end) for end in reversed(shift["ci95"])],
            "bound": "exact",
        }
        squared = result["delta_p_squared"]["estimate"]
        result["delta_p_rms"] = None if squared is None else math.sqrt(max(squared, 0.0))
        return result


def ends_or_none(interval: ConfidenceInterval, lo: float, hi: float) -> list[float] | None:
    """Returns for JSON the ends of a finite-sample interval of a figure between lo and hi; None: not enough
    requests.
    """
    return [interval.low, interval.high] if enough(interval, lo, hi) else None


def finite(value: float) -> float | None:
    """Returns the value for JSON: NaN and infinity become None."""
    return value if math.isfinite(value) else None
