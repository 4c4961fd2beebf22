"""Decides when the next sequence may be sent to an engine: in moments of low load, and within a budget of tokens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from hemostat_calibration.elapsed import TimeBreak

BUDGET_TOKENS = 10_000
"""The largest number of tokens of replays at an engine in an hour."""
HOUR_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class PaceState:
    """The state that outlasts the control process. Times are Unix times."""

    looked_at: float = 0.0
    average: float | None = None
    """The average number of requests in progress, over about an hour, at that time."""
    spent: tuple[tuple[float, int], ...] = ()
    """The times at which tokens were spent, each with their number."""

    def after_break(self, time_break: TimeBreak) -> PaceState:
        """Returns the same after the clock was set: tokens were spent as long ago as before.

        >>> PaceState(90.0, 1.0, ((95.0, 8000),)).after_break(TimeBreak(now=1000.0, lost=900.0, anew=True))
        PaceState(looked_at=990.0, average=1.0, spent=((995.0, 8000),))
        """
        spent = tuple((time_break.seen(at), tokens) for at, tokens in self.spent)
        return PaceState(time_break.seen(self.looked_at), self.average, spent)


class Pace:
    """The pace at one engine. clock: monotonic seconds. wall: Unix time, for what is stored."""

    def __init__(self, clock: Callable[[], float], wall: Callable[[], float], stored: PaceState) -> None:
        now, ahead = clock(), clock() - wall()
        self._clock, self._wall = clock, wall
        self._average = stored.average
        # Where the wall clock was set back meanwhile, what is stored is in the future: now at the latest.
        self._looked_at = min(stored.looked_at + ahead, now)
        self._spent = [(min(at + ahead, now), tokens) for at, tokens in stored.spent]
        self._low = asyncio.Event()
        """It is set if not more than one request above the average of the last hour is in progress."""

    def update(self, outstanding: int) -> None:
        """Notes the load. outstanding: clients' requests in progress there now."""
        now = self._clock()
        weight = -math.expm1(-(now - self._looked_at) / HOUR_SECONDS)
        before = float(outstanding) if self._average is None else self._average
        self._average, self._looked_at = before + weight * (outstanding - before), now
        (self._low.set if outstanding <= self._average + 1.0 else self._low.clear)()

    def left(self) -> int:
        """Returns the number of tokens that are left of the budget."""
        now = self._clock()
        self._spent = [(at, tokens) for at, tokens in self._spent if now - at < HOUR_SECONDS]
        return BUDGET_TOKENS - sum(tokens for _, tokens in self._spent)

    def spend(self, tokens: int) -> None:
        """Spends tokens of the budget, before they are sent."""
        self._spent.append((self._clock(), tokens))

    def give_back(self, tokens: int) -> None:
        """Gives back tokens that were spent last and were not sent."""
        if self._spent:
            at, last = self._spent.pop()
            self._spent.append((at, last - tokens))

    async def wait(self) -> None:
        """Returns when the load is low."""
        await self._low.wait()

    def state(self) -> PaceState:
        behind = self._wall() - self._clock()
        spent = tuple((at + behind, tokens) for at, tokens in self._spent)
        return PaceState(self._looked_at + behind, self._average, spent)
