"""When the next sequence may be sent to an engine: in moments of low load, and within a budget of tokens."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

BUDGET_TOKENS = 10_000
"""Of replays, an engine and hour."""
HOUR_SECONDS = 3600.0


class Pace:
    """Of one engine. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._average: float | None = None
        """Of requests in progress, over about an hour."""
        self._looked_at = clock()
        self._spent: deque[tuple[float, int]] = deque()
        self._low = asyncio.Event()
        """Not more than one request above the average of the last hour is in progress."""

    def look(self, outstanding: int) -> None:
        """outstanding: clients' requests in progress there now."""
        now = self._clock()
        weight = -math.expm1(-(now - self._looked_at) / HOUR_SECONDS)
        before = float(outstanding) if self._average is None else self._average
        self._average, self._looked_at = before + weight * (outstanding - before), now
        (self._low.set if outstanding <= self._average + 1.0 else self._low.clear)()

    def left(self) -> int:
        """Tokens of the budget."""
        now = self._clock()
        while self._spent and now - self._spent[0][0] >= HOUR_SECONDS:
            self._spent.popleft()
        return BUDGET_TOKENS - sum(tokens for _, tokens in self._spent)

    async def wait(self, _: int) -> None:
        """Returns when the load is low. Of a set that is taken, once."""
        await self._low.wait()

    async def spend(self, tokens: int) -> None:
        """The same, of a replay, whose tokens are of the budget."""
        await self._low.wait()
        self._spent.append((self._clock(), tokens))
