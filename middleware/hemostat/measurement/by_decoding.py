"""The figures by the request's own decoding: greedy, bands of temperature, cut (top-p, top-k, min-p) or not.

In addition to the models' own distributions at temperature 1: the divergence of the distributions that tokens are drawn
from, after temperature and cut. The paper finds that decoding amplifies the difference (arXiv 2503.23924).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat.measurement.dependence import NO_CYCLE, Cycle, Dependence, told_of_mean
from hemostat.measurement.figures import StageFigures, TokenSums, finite
from hemostat_calibration.divergence.decoding import DECODING_LABELS, DecodedDivergence, decoding_label
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.records import TokenRecord
from hemostat_calibration.statistics.confidence import ClippedMean

UNKNOWN = "unknown"
"""The request leaves its decoding to the server's defaults."""
STRATEGIES = (*DECODING_LABELS, UNKNOWN)


def strategy(record: TokenRecord) -> str:
    """Returns the strategy of the record's decoding, one of `STRATEGIES`."""
    return UNKNOWN if math.isnan(record.sampling.temperature) else decoding_label(record.sampling)


@dataclass(slots=True)
class _Drawn:
    """Both bounds of the divergences after decoding, of the two that are finite even if only one model keeps a
    token."""

    cycle: Cycle
    tv_lower: ClippedMean = field(default_factory=lambda: ClippedMean(0.0, 1.0))
    tv_upper: ClippedMean = field(default_factory=lambda: ClippedMean(0.0, 1.0))
    js_lower: ClippedMean = field(default_factory=lambda: ClippedMean(0.0, math.log(2.0)))
    js_upper: ClippedMean = field(default_factory=lambda: ClippedMean(0.0, math.log(2.0)))
    dependence: Dependence = field(init=False)
    """The dependence of the requests in these four figures."""
    tokens: int = 0
    unavailable: int = 0

    def __post_init__(self) -> None:
        self.dependence = Dependence(4, self.cycle)

    def update(self, drawn: DecodedDivergence, client: bytes) -> None:
        self.tokens += len(drawn.available)
        self.unavailable += int((~drawn.available).sum())
        self.tv_lower, self.tv_upper = self.tv_lower.update(drawn.tv.lower), self.tv_upper.update(drawn.tv.upper)
        self.js_lower, self.js_upper = self.js_lower.update(drawn.js.lower), self.js_upper.update(drawn.js.upper)
        values = np.array([drawn.tv.lower, drawn.tv.upper, drawn.js.lower, drawn.js.upper])
        tokens = np.count_nonzero(~np.isnan(values), axis=1).astype(np.float64)
        self.dependence.update(np.nansum(values, axis=1), tokens, client)

    def summary(self) -> dict[str, Any]:
        """Returns the figures, JSON-ready. `unavailable_share`: the share of the tokens for which the lists do not
        determine the cut, or a profile was applied."""
        tv_lower, tv_upper, js_lower, js_upper = self.dependence.inflations().tolist()
        return {
            "total_variation": _ends(self.tv_lower, self.tv_upper, max(tv_lower, tv_upper)),
            "js_nats": _ends(self.js_lower, self.js_upper, max(js_lower, js_upper)),
            "unavailable_share": self.unavailable / self.tokens if self.tokens else None,
        }


def _ends(lower: ClippedMean, upper: ClippedMean, inflation: float) -> dict[str, Any]:
    low, high = lower.get(inflation=inflation), upper.get(inflation=inflation)
    known = math.isfinite(inflation)
    few = known and any(mean.sequence.carried_by_few(inflation) for mean in (lower, upper))
    return {
        "lower": finite(low.mean),
        "upper": finite(high.mean),
        "ci95": [finite(low.low), finite(high.high)] if known and not few else [None, None],
        **told_of_mean(lower.requests, inflation, carried_by_few=few),
    }


class ByDecoding:
    """The raw figures, and the figures after decoding, by the request's decoding strategy. cycle: of the traffic."""

    def __init__(self, cycle: Cycle = NO_CYCLE) -> None:
        self._cycle = cycle
        self._figures: dict[str, StageFigures] = {}
        self._drawn: dict[str, _Drawn] = {}

    def update(
        self, name: str, figures: TokenDivergence | TokenSums, drawn: DecodedDivergence | None, client: bytes = b""
    ) -> None:
        """Adds a request. drawn: None if the decoding is not known. client: the digest of whom the request is from."""
        if name not in self._figures:
            self._figures[name] = StageFigures(cycle=self._cycle)
        self._figures[name].update(figures, client)
        if drawn is not None:
            if name not in self._drawn:
                self._drawn[name] = _Drawn(self._cycle)
            self._drawn[name].update(drawn, client)

    def report(self) -> list[dict[str, Any]]:
        """Returns the figures of the strategies with a request, in the order of `STRATEGIES`. JSON-ready."""
        return [
            {
                "strategy": name,
                **self._figures[name].summary(),
                "drawn_from": self._drawn[name].summary() if name in self._drawn else None,
            }
            for name in STRATEGIES
            if name in self._figures
        ]
