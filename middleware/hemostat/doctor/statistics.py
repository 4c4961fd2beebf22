"""Figures of many tokens with standard errors whose unit is the request. Numpy; nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with two standard errors; NaN where there are too few of either.

    by_request: tokens of one request are correlated, requests are not: the one to go by.
    by_token: as llama.cpp states it, as if every token stood for itself.
    """

    value: float
    by_request: float
    by_token: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens of several requests. request: int64 [N], 0 to R − 1, for each token the request that it belongs to."""

    request: Ints
    requests: int

    def select(self, chosen: npt.NDArray[np.bool_]) -> Sample:
        """The requests that have a chosen token, with those tokens."""
        kept, request = np.unique(self.request[chosen], return_inverse=True)
        return Sample(request.astype(np.int64), len(kept))

    def mean(self, values: Floats) -> Estimate:
        """Mean over all tokens, Σx/Σn over requests.

        The variance by request is that of the linearised ratio, R/(R−1) Σ (x − mean·n)² / N² (Cochran, Sampling
        Techniques, 1977, ch. 6), x a request's sum and n its tokens; by token it is s²/N.
        """
        return self.function(lambda means: means[0], [1.0], values)

    def function(self, of: Callable[[Sequence[float]], float], gradient: Sequence[float], *values: Floats) -> Estimate:
        """`of` the means of several figures, with its `gradient` there: errors by the delta method."""
        tokens = len(self.request)
        if not tokens:
            return Estimate(np.nan, np.nan, np.nan)
        means = [float(v.mean()) for v in values]
        deviation = np.zeros(tokens)
        with np.errstate(invalid="ignore"):  # an infinite figure has no spread: NaN
            for slope, v, mean in zip(gradient, values, means, strict=True):
                deviation += slope * (v - mean)
        by_request = by_token = np.nan
        if self.requests > 1:
            sums = np.bincount(self.request, deviation, self.requests)
            by_request = float(np.sqrt(self.requests / (self.requests - 1) * (sums**2).sum()) / tokens)
        if tokens > 1:
            by_token = float(np.sqrt((deviation**2).sum() / (tokens - 1) / tokens))
        return Estimate(float(of(means)), by_request, by_token)
