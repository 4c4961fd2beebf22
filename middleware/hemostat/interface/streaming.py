"""Streaming estimators with river's interface: `update` adds one observation, `get` returns the estimate."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from hemostat.measurement.dependence import Dependence
from hemostat_calibration.statistics.confidence import ConfidenceInterval, MeanSequence


class ConfidenceSequence:
    """A mean per token, with an interval that holds at all times together: one may look as often as one likes.

    The unit is the request, whose tokens are correlated in an unknown way. The interval is asymptotic (Waudby-Smith et
    al., Annals of Statistics 2024): it is for requests from one distribution, and it is the whole range before about 20
    of them.

    low, high: the range that the figure has by its nature. alpha: the probability that the interval ever misses the
    mean.

    >>> sequence = ConfidenceSequence(low=0.0)
    >>> for request in range(200):
    ...     sequence.update(total=2.0 + request % 3, tokens=10)
    >>> interval = sequence.get()
    >>> round(interval.mean, 4), round(interval.low, 4), round(interval.high, 4)
    (0.2995, 0.281, 0.318)
    """

    def __init__(self, low: float = -math.inf, high: float = math.inf, alpha: float = 0.05) -> None:
        self._low, self._high, self._alpha = low, high, alpha
        self._state = MeanSequence()

    def update(self, total: float, tokens: float = 1.0) -> None:
        """Adds one request. total: the sum of the figure over its tokens, finite. tokens: their number. Raises
        InvalidArgumentError otherwise."""
        self._state = self._state.update(float(total), float(tokens))

    def get(self, inflation: float = 1.0) -> ConfidenceInterval:
        """Returns `mean`, `low`, `high`. inflation: how much more sums of the requests vary than sums of independent
        ones, 1 or more: see `DependenceEstimate`."""
        return self._state.get(self._low, self._high, self._alpha, inflation)


class DependenceEstimate:
    """The dependence of requests on each other: by which factor their sums vary more than sums of independent ones.

    It is the larger one of two estimates: by batches in time, and by client.

    >>> estimate = DependenceEstimate()
    >>> estimate.get()
    inf
    >>> for request in range(2_000):  # each client sends ten requests in a row, which are alike
    ...     client = request // 10
    ...     estimate.update(total=(client * 2_654_435_761 % 1_000) / 1_000, client=f"client {client}")
    >>> estimate.get() > 5.0
    True
    """

    def __init__(self) -> None:
        self._state = Dependence()

    def update(self, total: float, tokens: float = 1.0, client: str = "") -> None:
        """Adds one request, in the order of time. total, tokens: as in `ConfidenceSequence.update`. client: who sent
        it; "" if that is not known."""
        digest = hashlib.blake2b(client.encode(), digest_size=8).digest() if client else b""
        self._state.update(np.array([float(total)]), np.array([float(tokens)]), digest)

    def get(self) -> float:
        """Returns the factor, 1 or more; infinite while it is not known, as there are too few requests."""
        return float(self._state.inflations_seen()[0])
