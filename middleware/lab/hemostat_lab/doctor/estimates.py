"""Means over tokens with standard errors by request and by token. Numpy; nats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with two standard errors; NaN where there are too few requests or tokens.

    by_request: the unit is the request; use this one, because tokens of one request are correlated.
    by_token: tokens are treated as independent, as in llama.cpp.
    """

    value: float
    by_request: float
    by_token: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens of several requests. request: int64 [N], 0 to R − 1, the request of each token."""

    request: Ints
    requests: int

    def select(self, chosen: npt.NDArray[np.bool_]) -> Sample:
        """The chosen tokens (bool [N]) and the requests that have at least one of them."""
        kept, request = np.unique(self.request[chosen], return_inverse=True)
        return Sample(request.astype(np.int64), len(kept))

    def mean(self, values: Floats) -> Estimate:
        """Mean over all tokens, Σx/Σn over requests.

        The variance by request is that of the linearised ratio, R/(R−1) Σ (x − mean·n)² / N² (Cochran, Sampling
        Techniques, 1977, ch. 6), x a request's sum and n its tokens; by token it is s²/N.
        """
        return self.function(lambda means: means[0], [1.0], values)

    def function(self, of: Callable[[Sequence[float]], float], gradient: Sequence[float], *values: Floats) -> Estimate:
        """A function `of` the means of several figures; standard errors by the delta method.

        gradient: the partial derivatives of `of` at the means.
        """
        tokens = len(self.request)
        if not tokens:
            return Estimate(np.nan, np.nan, np.nan)
        means = [float(v.mean()) for v in values]
        deviation = np.zeros(tokens)
        with np.errstate(invalid="ignore"):  # an infinite value gives a standard error of NaN
            for slope, v, mean in zip(gradient, values, means, strict=True):
                deviation += slope * (v - mean)
        by_request = by_token = np.nan
        if self.requests > 1:
            sums = np.bincount(self.request, deviation, self.requests)
            by_request = float(np.sqrt(self.requests / (self.requests - 1) * (sums**2).sum()) / tokens)
        if tokens > 1:
            by_token = float(np.sqrt((deviation**2).sum() / (tokens - 1) / tokens))
        return Estimate(float(of(means)), by_request, by_token)
