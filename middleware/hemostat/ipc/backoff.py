"""Pauses between attempts: they grow with the number of failures in a row, and are randomized."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence


class Backoff:
    """The pause after each failure in a row.

    seconds: the longest pause after the first, second, ... failure; the last one repeats.
    uniform: a source of random numbers in [0, 1). Each pause is drawn from the upper half of its range, so that several
        processes that lost the same server at once do not return at once.

    >>> backoff = Backoff((1.0, 2.0), uniform=lambda: 0.5)
    >>> [backoff.pause() for _ in range(3)]
    [0.75, 1.5, 1.5]
    >>> backoff.reset()
    >>> backoff.pause()
    0.75
    """

    def __init__(self, seconds: Sequence[float], uniform: Callable[[], float] = random.random) -> None:
        self._seconds = tuple(seconds)
        self._uniform = uniform
        self.failures = 0
        """The number of failures in a row."""

    def pause(self) -> float:
        """Counts a failure; returns the seconds to wait before the next attempt."""
        longest = self._seconds[min(self.failures, len(self._seconds) - 1)]
        self.failures += 1
        return longest * (0.5 + 0.5 * self._uniform())

    def reset(self) -> None:
        """Begins anew with the shortest pause, since an attempt has succeeded."""
        self.failures = 0
