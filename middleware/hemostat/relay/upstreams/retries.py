"""How many requests are sent to another engine after one has failed them. Pure."""

from __future__ import annotations

from typing import Final

RATIO: Final = 0.1
"""Of the requests: engines that all fail because they have too much to do get 1.1 times as much, not four times."""
BURST: Final = 10.0
"""Retries that need no requests before them: the first failures of an engine that ends are answered by others."""


class RetryBudget:
    """A token bucket that requests fill.

    >>> budget = RetryBudget()
    >>> sum(budget.take(100) for _ in range(50)), sum(budget.take(130) for _ in range(50))
    (10, 3)
    """

    def __init__(self) -> None:
        self._tokens = BURST
        self._requests = 0

    def take(self, requests: int) -> bool:
        """One more retry is allowed. requests: of clients, so far."""
        self._tokens = min(BURST, self._tokens + RATIO * max(0, requests - self._requests))
        self._requests = requests
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True
