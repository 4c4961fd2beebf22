"""The smoothed number of events per second."""

from __future__ import annotations

import math

SMOOTHED_SECONDS = 30.0
"""The weight of what happened falls by a factor e in this time."""


class SmoothedRate:
    """The number of events per second of a growing total, smoothed exponentially.

    >>> rate = SmoothedRate()
    >>> for second in range(301):
    ...     rate.update(total=20.0 * second, now=float(second))
    >>> round(rate.per_second, 2)
    20.0
    """

    def __init__(self, per_second: float = 0.0) -> None:
        self.per_second = per_second
        self._last: tuple[float, float] | None = None
        """The total, and when it was reached."""

    def update(self, total: float, now: float) -> None:
        """Updates the rate. total: of all events so far. now: monotonic seconds."""
        last, self._last = self._last, (total, now)
        if last is None or now <= last[1]:
            return
        seconds = now - last[1]
        weight = -math.expm1(-seconds / SMOOTHED_SECONDS)
        self.per_second += weight * ((total - last[0]) / seconds - self.per_second)
