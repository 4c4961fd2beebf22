"""The figures of one group of scored requests: which there are, what each of them is, and their intervals.

Every figure has a name, a kind (a bound from one side, an estimate, exact), the range within which its values are
averaged, and an interval that is valid at every look, however often it is looked at. The unit of the interval is the
request: tokens of one request are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.statistics.confidence import ClippedMean, ConfidenceInterval, MeanSequence

Floats = npt.NDArray[np.float64]
Kind = Literal["lower", "upper", "estimate", "exact"]

COMPRESSED, REFERENCE = "compressed", "reference"
MODELS = (COMPRESSED, REFERENCE)
"""The two models, as the label `model` of metrics names them."""
KL_CAP = 20.0
"""Nats at which a token's KL, and ± at which its log-likelihood ratio, is clipped for the mean: one token in a million
must not move it. The clipped share stands beside."""
ENTROPY_CAP = math.log(1 << 24)
"""Of the largest vocabulary that there is."""


@dataclass(frozen=True, slots=True)
class Figure:
    """values: of a request's tokens, [T], NaN where not available. lo, cap: its range; what lies outside is clipped.
    kind: what the figure is where the lists do not hold the whole vocabulary. plain: the report has it as a number,
    with its interval under `ci95`.
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
    "top1_agreement": Figure(lambda d: d.top1_agreement.astype(np.float64), 0.0, 1.0, plain=True),
    "covered_mass": Figure(lambda d: d.covered_compressed, 0.0, 1.0, plain=True),
    "covered_mass_reference": Figure(lambda d: d.covered_reference, 0.0, 1.0),
    "delta_log_likelihood_nats": Figure(lambda d: d.delta_log_likelihood, -KL_CAP, KL_CAP),
    "delta_p": Figure(lambda d: d.delta_p, -1.0, 1.0),
    "delta_p_squared": Figure(lambda d: d.delta_p**2, 0.0, 1.0),
    "entropy_compressed_nats": Figure(lambda d: d.entropy_compressed, 0.0, ENTROPY_CAP, "lower"),
    "entropy_reference_nats": Figure(lambda d: d.entropy_reference, 0.0, ENTROPY_CAP, "lower"),
    "entropy_shift_nats": Figure(_entropy_shift, -ENTROPY_CAP, ENTROPY_CAP, "estimate"),
}
"""By the name in the report. KL is KL(reference‖compressed), `reverse_kl` the other way."""

INFINITE = ("kl_nats", "reverse_kl_nats")
"""Figures that may be infinite at a token; such tokens are also counted."""


class StageFigures:
    """Every figure, over the requests of one group."""

    def __init__(self) -> None:
        self._means = {name: ClippedMean(figure.lo, figure.cap) for name, figure in FIGURES.items()}
        self._below = dict.fromkeys(FIGURES, 0)
        self._infinite = dict.fromkeys(INFINITE, 0)
        self._exact = True
        self._told: dict[str, Any] = {}
        self.requests = 0
        self.tokens = 0

    def add(self, figures: TokenDivergence) -> None:
        """One request."""
        self.requests += 1
        self.tokens += len(figures.kl_rc)
        self._exact = self._exact and figures.bound == "exact"
        for name, figure in FIGURES.items():
            values = np.asarray(figure.values(figures), dtype=np.float64)
            if figure.lo < 0.0:
                self._below[name] += int((values < figure.lo).sum())
                values = np.maximum(values, figure.lo)
            self._means[name] = self._means[name].update(values)
        for name in INFINITE:
            self._infinite[name] += int(np.isinf(FIGURES[name].values(figures)).sum())

    def mean(self, name: str) -> float | None:
        """One figure without the rest."""
        return finite(self._means[name].get().mean)

    def interval(self, name: str, alpha: float) -> ConfidenceInterval:
        """One figure's mean with its interval of 1 − alpha."""
        return self._means[name].get(alpha)

    def sequence(self, name: str) -> MeanSequence:
        """What a difference from another group is made of."""
        return self._means[name].sequence

    def figure(self, name: str) -> dict[str, Any]:
        """One figure, JSON-ready: `estimate` (the mean), `ci95`, `bound` (its kind), `cap`, `clipped_share`."""
        mean, interval = self._means[name], self._means[name].get()
        clipped = (mean.clipped + self._below[name]) / mean.tokens if mean.tokens else 0.0
        return {
            "estimate": finite(interval.mean),
            "ci95": [finite(interval.low), finite(interval.high)] if mean.requests else [None, None],
            "bound": "exact" if self._exact else FIGURES[name].kind,
            "cap": FIGURES[name].cap,
            "clipped_share": clipped,
        }

    def summary(self) -> dict[str, Any]:
        """All of them, or None where nothing was measured. Computed anew only when a request was added: the page asks
        for it every other second, of every group."""
        if self._told.get("requests") != self.requests:
            self._told = self._tell()
        return dict(self._told)

    def _tell(self) -> dict[str, Any]:
        found: dict[str, Any] = {"requests": self.requests, "tokens": self.tokens, "ci95": {}}
        for name, figure in FIGURES.items():
            told = self.figure(name)
            if figure.plain:
                found[name], found["ci95"][name] = told["estimate"], told["ci95"]
            else:
                found[name] = told
        for name, tokens in self._infinite.items():
            found[name]["infinite_tokens"] = tokens
        # The text is the compressed model's own, so that a ratio below 1 does not say that it is the better one.
        shift = found["delta_log_likelihood_nats"]
        found["perplexity_ratio"] = {
            "estimate": None if shift["estimate"] is None else math.exp(-shift["estimate"]),
            "ci95": [None if end is None else math.exp(-end) for end in reversed(shift["ci95"])],
            "bound": "exact",
        }
        squared = found["delta_p_squared"]["estimate"]
        found["delta_p_rms"] = None if squared is None else math.sqrt(max(squared, 0.0))
        return found


def finite(value: float) -> float | None:
    """For JSON: what is no number is None."""
    return value if math.isfinite(value) else None
