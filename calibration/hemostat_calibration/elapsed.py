"""Elapsed time that evidence may rely on.

Clocks are set: a machine that starts without the time of the network is in 1970 until it has it. So time that has
passed counts up to a limit only, and what has to span a cycle of the traffic begins anew where the clock has jumped.
Within a process `SteadyTime` goes on evenly, by the monotonic clock. Over restarts there is only the wall clock.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_PAUSE_SECONDS = 7 * 86_400.0
"""The longest time between two requests that is believed; a span of requests begins anew after a longer one."""
MAX_BACK_SECONDS = 60.0
"""A clock that goes back by more has been set; by less, it is adjusted, or two requests were noted out of order."""


def elapsed(before: float, now: float, most: float) -> float:
    """Returns the seconds from `before` to `now`, from 0 to `most`.

    >>> elapsed(0.0, 1.7e9, 86_400.0), elapsed(1.7e9, 0.0, 86_400.0)
    (86400.0, 0.0)
    """
    return min(max(now - before, 0.0), most)


def has_jumped(last: float, now: float) -> bool:
    """The clock was set between two requests, or there was none for longer than `MAX_PAUSE_SECONDS`.

    >>> has_jumped(0.0, 1.7e9), has_jumped(1.7e9, 0.0), has_jumped(0.0, 3600.0), has_jumped(10.0, 9.0)
    (True, True, False, False)
    """
    return not -MAX_BACK_SECONDS <= now - last <= MAX_PAUSE_SECONDS


def span_begins(first: float, last: float, now: float) -> float:
    """Returns when a span of requests began: `first`, or `now` if the clock has jumped since its last one.

    >>> span_begins(0.0, 50.0, 60.0), span_begins(0.0, 50.0, 1.7e9)
    (0.0, 1700000000.0)
    """
    return now if has_jumped(last, now) else first


@dataclass(frozen=True, slots=True)
class SteadyTime:
    """Unix time that goes on evenly where the wall clock is set.

    now: seconds. wall, monotonic: the last readings of both clocks. jumped: by how much the wall clock was set between
    the last two of them, seconds; 0 where it was not.

    >>> time = SteadyTime(100.0, 100.0, 7.0).read(110.0, 17.0).read(1.7e9, 20.0)
    >>> time.now, time.jumped > 1e9, time.read(1.7e9 + 5.0, 25.0).now
    (113.0, True, 118.0)
    """

    now: float
    wall: float
    monotonic: float
    jumped: float = 0.0

    def read(self, wall: float, monotonic: float) -> SteadyTime:
        """Returns the time after both clocks were read again."""
        passed, by_wall = max(monotonic - self.monotonic, 0.0), wall - self.wall
        is_set = abs(by_wall - passed) > MAX_BACK_SECONDS
        step = passed if is_set else max(by_wall, 0.0)
        return SteadyTime(self.now + step, wall, monotonic, by_wall - passed if is_set else 0.0)
