"""The gains of a profile, by token and by request, with both intervals; JSON-ready."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat.measurement.dependence import NO_CYCLE, Cycle, Dependence, told_of_mean
from hemostat.measurement.figures import StageFigures, ends_or_none, finite
from hemostat_calibration.divergence.gain import Gain
from hemostat_calibration.divergence.per_token import TokenDivergence
from hemostat_calibration.records import ExactDistances
from hemostat_calibration.statistics import confidence
from hemostat_calibration.statistics.confidence import ConfidenceInterval, MeanSequence
from hemostat_calibration.statistics.running_mean import RunningMean

BY_TOKEN, BY_REQUEST, SHARE, TV_BY_TOKEN, TV_BY_REQUEST = range(5)
"""The numbers of the series in `Dependence`."""


def interval(sequence: MeanSequence, inflation: float, lo: float = -math.inf, hi: float = math.inf) -> dict[str, Any]:
    """Returns the mean and its interval, JSON-ready: None if nothing was measured, or the end is not known.
    inflation: v̂, infinite where it is not known. lo, hi: the figure's range by definition."""
    few = math.isfinite(inflation) and sequence.carried_by_few(inflation)
    result = interval_json(sequence.get(lo, hi, inflation=inflation), math.inf if few else inflation)
    return result | told_of_mean(sequence.moments.requests, inflation, carried_by_few=few)


def interval_json(confidence_interval: ConfidenceInterval, inflation: float) -> dict[str, Any]:
    """Returns an interval for JSON, without ends if v̂ is not known."""
    known = math.isfinite(inflation)
    ends = [finite(confidence_interval.low), finite(confidence_interval.high)] if known else [None, None]
    return {"estimate": finite(confidence_interval.mean), "ci95": ends}


def difference(treated: StageFigures, control: StageFigures, name: str) -> dict[str, Any]:
    """Returns treated minus control of one figure, with the larger v̂ of both; JSON-ready."""
    v = max(treated.inflation(name), control.inflation(name))
    a, b = treated.sequence(name), control.sequence(name)
    requests = a.moments.requests + b.moments.requests
    few = math.isfinite(v) and not (treated.has_interval(name) and control.has_interval(name))
    found = interval_json(confidence.difference(a, b, inflation=v), math.inf if few else v)
    return found | told_of_mean(requests, v, carried_by_few=few)


@dataclass(slots=True)
class GainFigures:
    """KL(r‖c) − KL(r‖c') of one profile over tokens where it is known exactly, and its share of the KL before.

    limit: a token's gain is between −limit and limit: twice the profile's clamp. cycle: of the traffic.
    """

    limit: float
    by_token: MeanSequence = field(default_factory=MeanSequence)
    by_request: MeanSequence = field(default_factory=MeanSequence)
    share: MeanSequence = field(default_factory=MeanSequence)
    """The share of the divergence that is gained, Σ gain / Σ KL."""
    cycle: Cycle = NO_CYCLE
    dependence: Dependence = field(init=False)
    """The dependence of the requests in these three figures."""
    finite_by_request: RunningMean = field(init=False)

    def __post_init__(self) -> None:
        self.dependence = Dependence(3, self.cycle)
        self.finite_by_request = RunningMean(-self.limit, self.limit)

    @property
    def requests(self) -> int:
        return self.by_token.moments.requests

    def update(self, gain: Gain, raw: TokenDivergence, client: bytes = b"") -> None:
        """Adds one request, with its tokens where the gain and the KL before it are known; nothing if there is none.
        client: the digest of whom it is from."""
        both = gain.exact & np.isfinite(raw.estimate_rc)
        tokens = int(both.sum())
        if not tokens:
            return
        won, of = float(gain.lower[both].sum()), float(raw.estimate_rc[both].sum())
        bounded = float(np.clip(gain.lower[both], -self.limit, self.limit).sum())  # rounding only
        self.by_token = self.by_token.update(won, tokens)
        self.by_request = self.by_request.update(won / tokens, 1.0)
        self.share = self.share.update(won, max(of, 0.0))
        sums, numbers = np.array([won, won / tokens, won]), np.array([tokens, 1.0, max(of, 0.0)])
        self.dependence.update(sums, numbers, client)
        self.finite_by_request = self.finite_by_request.update(bounded / tokens)

    def recovered(self) -> dict[str, Any] | None:
        """Returns the share, with its asymptotic interval only: a ratio to a KL has no range. None before the first
        request."""
        if self.share.moments.mean_n == 0.0:
            return None
        return interval(self.share, self.dependence.inflation(SHARE), hi=1.0)

    def gained(self) -> dict[str, Any]:
        """Returns the gain in nats: by token, and under `by_request` the mean of the requests' means."""
        v = self.dependence.inflations()
        return {
            **interval(self.by_token, v[BY_TOKEN]),
            "requests": self.requests,
            "bound": "exact",
            "by_request": {
                **interval(self.by_request, v[BY_REQUEST]),
                "ci95_finite": ends_or_none(self.finite_by_request.get(), -self.limit, self.limit),
            },
        }


@dataclass(slots=True)
class DistanceGains:
    """The gains of an adapter, from exact distances of held-out requests.

    Its gain in KL has no bound, and so no finite-sample interval; its gain in total variation is between −1 and 1.

    cycle: of the traffic.
    """

    by_token: MeanSequence = field(default_factory=MeanSequence)
    by_request: MeanSequence = field(default_factory=MeanSequence)
    share: MeanSequence = field(default_factory=MeanSequence)
    tv_by_token: MeanSequence = field(default_factory=MeanSequence)
    tv_by_request: MeanSequence = field(default_factory=MeanSequence)
    cycle: Cycle = NO_CYCLE
    dependence: Dependence = field(init=False)
    """The dependence of the requests in these five figures."""
    finite_tv_by_request: RunningMean = field(init=False)
    infinite_tokens: int = 0
    """The number of tokens at which a KL, before or after, is infinite: they are in no mean of the KL."""

    def __post_init__(self) -> None:
        self.dependence = Dependence(5, self.cycle)
        self.finite_tv_by_request = RunningMean(-1.0, 1.0)

    @property
    def requests(self) -> int:
        return self.tv_by_token.moments.requests

    def update(self, before: ExactDistances, after: ExactDistances, client: bytes = b"") -> None:
        """Adds one request. client: the digest of whom it is from."""
        tokens, less = len(before.tv), before.tv - after.tv
        sums, numbers = np.zeros(5), np.zeros(5)
        sums[[TV_BY_TOKEN, TV_BY_REQUEST]] = less.sum(), less.mean()
        numbers[[TV_BY_TOKEN, TV_BY_REQUEST]] = tokens, 1.0
        self.tv_by_token = self.tv_by_token.update(float(less.sum()), tokens)
        self.tv_by_request = self.tv_by_request.update(float(less.mean()), 1.0)
        self.finite_tv_by_request = self.finite_tv_by_request.update(float(less.mean()))
        known = np.isfinite(before.kl) & np.isfinite(after.kl)
        self.infinite_tokens += int((~known).sum())
        if known.any():
            won, of = float((before.kl - after.kl)[known].sum()), max(float(before.kl[known].sum()), 0.0)
            mean = won / int(known.sum())
            self.by_token = self.by_token.update(won, int(known.sum()))
            self.by_request = self.by_request.update(mean, 1.0)
            self.share = self.share.update(won, of)
            sums[:TV_BY_TOKEN], numbers[:TV_BY_TOKEN] = (won, mean, won), (known.sum(), 1.0, of)
        self.dependence.update(sums, numbers, client)

    def recovered(self) -> dict[str, Any] | None:
        """Returns the recovered share as `GainFigures.recovered` does."""
        if self.share.moments.mean_n == 0.0:
            return None
        return interval(self.share, self.dependence.inflation(SHARE), hi=1.0)

    def gained(self) -> dict[str, Any]:
        """Returns the gain as `GainFigures.gained` does, and also the gain in total variation."""
        v = self.dependence.inflations()
        return {
            **interval(self.by_token, v[BY_TOKEN]),
            "requests": self.requests,
            "bound": "exact",
            "by_request": {**interval(self.by_request, v[BY_REQUEST]), "ci95_finite": None},
            "infinite_tokens": self.infinite_tokens,
            "total_variation": {
                **interval(self.tv_by_token, v[TV_BY_TOKEN], -1.0, 1.0),
                "by_request": {
                    **interval(self.tv_by_request, v[TV_BY_REQUEST], -1.0, 1.0),
                    "ci95_finite": ends_or_none(self.finite_tv_by_request.get(), -1.0, 1.0),
                },
            },
        }
