"""Pauses between attempts: they grow with the number of failures in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Backoff:
    """The pause after each failure in a row.

    seconds: the longest pause after the first, second, ... failure; the last one repeats.
    uniform: a source of random numbers in [0, 1). Each pause is drawn from the upper half of its range, so that several
        processes that lost the same server at once do not return at once. Without it, each pause is the longest one.

    >>> backoff = Backoff((1.0, 2.0), uniform=lambda: 0.5)
    >>> [backoff.pause() for _ in range(3)]
    [0.75, 1.5, 1.5]
    >>> backoff.reset()
    >>> backoff.failed(now=100.0)
    >>> backoff.may_try(now=100.5), backoff.may_try(now=100.75)
    (False, True)
    """

    def __init__(self, seconds: Sequence[float], uniform: Callable[[], float] | None = None) -> None:
        self._seconds = tuple(seconds)
        self._uniform = uniform
        self.failures = 0
        """The number of failures in a row."""
        self._not_before = float("-inf")

    def pause(self) -> float:
        """Counts a failure; returns the seconds to wait before the next attempt."""
        longest = self._seconds[min(self.failures, len(self._seconds) - 1)]
        self.failures += 1
        return longest if self._uniform is None else longest * (0.5 + 0.5 * self._uniform())

    def failed(self, now: float) -> None:
        """Counts a failure; the next attempt may begin after its pause. now: seconds of any clock."""
        self._not_before = now + self.pause()

    def may_try(self, now: float) -> bool:
        """Returns True if the pause after the last failure is over. now: seconds of the same clock."""
        return now >= self._not_before

    def reset(self) -> None:
        """Begins anew with the shortest pause, since an attempt has succeeded."""
        self.failures = 0
        self._not_before = float("-inf")
