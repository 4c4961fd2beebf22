"""Elapsed time that evidence may rely on.

Clocks are set: a machine that starts without the time of the network is in 1970 until it has it. So time that has
passed counts up to a limit only, and what has to span a cycle of the traffic begins anew where the clock has jumped.

Within a process `SteadyTime` goes on evenly, by a clock that nobody sets. If the wall clock was set, the time becomes
what the wall clock says, and a `TimeBreak` says by how much it was set, so that whoever keeps times can take the
difference out of them. `after_restart` compares the clocks with what an earlier process has stored.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_PAUSE_SECONDS = 7 * 86_400.0
"""The longest time between two requests that is believed; a span of requests begins anew after a longer one."""
MAX_BACK_SECONDS = 60.0
"""A clock that goes back by more has been set; by less, it is adjusted, or two requests were noted out of order."""
JUMP_SECONDS = 300.0
"""A wall clock that differs by more from the time that has passed was set. Clocks are adjusted to the time of the
network by less, and a leap second is less."""
MAX_SLEW = 0.1
"""A smaller difference is made up for by at most this part of the time that passes, so that the time never goes back,
and no span is wrong by more than this part of it."""


def elapsed(before: float, now: float, most: float) -> float:
    """Returns the seconds from `before` to `now`, from 0 to `most`.

    >>> elapsed(0.0, 1.7e9, 86_400.0), elapsed(1.7e9, 0.0, 86_400.0)
    (86400.0, 0.0)
    """
    return min(max(now - before, 0.0), most)


def has_jumped(last: float, now: float) -> bool:
    """Returns True if the clock was set between two requests, or there was none for longer than `MAX_PAUSE_SECONDS`.

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
class TimeBreak:
    """A moment at which the time was set: times that were noted before it are no times of now any more.

    now: the time after it, seconds. lost: by how much the time was set forward without being known to have passed,
    seconds; negative if it was set back. anew: a span of requests that has not ended yet begins again; otherwise the
    time that is lost is left out of it.

    >>> clock_set = TimeBreak(now=1000.0, lost=900.0, anew=True)
    >>> clock_set.seen(95.0), clock_set.begins(20.0), clock_set.begins(20.0, ended=True)
    (995.0, 1000.0, 920.0)
    """

    now: float
    lost: float
    anew: bool

    def seen(self, last: float) -> float:
        """Returns when something happened last, so long before `now` as it was before the break."""
        return min(last + self.lost, self.now)

    def begins(self, first: float, *, ended: bool = False) -> float:
        """Returns when a span of requests began. ended: the span is as long as it has to be, and stays so."""
        return self.now if self.anew and not ended else self.seen(first)


@dataclass(frozen=True, slots=True)
class SteadyTime:
    """Unix time that goes on evenly, whatever the wall clock does.

    now: seconds. steady: what a clock said then that nobody sets, seconds.

    >>> time = SteadyTime(100.0, 7.0)
    >>> time, nothing = time.read(wall=110.0, steady=17.0)
    >>> time.at(27.0), nothing is None
    (120.0, True)
    >>> time, clock_set = time.read(wall=1.7e9, steady=30.0)
    >>> time.now, clock_set.lost
    (1700000000.0, 1699999877.0)
    """

    now: float
    steady: float

    def at(self, steady: float) -> float:
        """Returns the time when the clock that nobody sets says `steady`."""
        return self.now + max(steady - self.steady, 0.0)

    def read(self, wall: float, steady: float) -> tuple[SteadyTime, TimeBreak | None]:
        """Returns the time after both clocks were read again, and a break if the wall clock was set."""
        expected = self.at(steady)
        difference = wall - expected
        if abs(difference) > JUMP_SECONDS:
            return SteadyTime(wall, steady), TimeBreak(wall, difference, anew=True)
        most = MAX_SLEW * (expected - self.now)
        return SteadyTime(expected + min(max(difference, -most), most), max(steady, self.steady)), None


@dataclass(frozen=True, slots=True)
class StoredTime:
    """The time as a process stores it. boot: names the run of the machine in which `steady` was read; "" if unknown."""

    time: SteadyTime
    boot: str


def after_restart(stored: StoredTime, now: StoredTime) -> TimeBreak | None:
    """Returns what has happened to the time between two processes; None if it has gone on.

    In one run of the machine, the clock that nobody sets tells how long nobody has looked. In another one, or on
    another machine, there is only the wall clock: up to `JUMP_SECONDS` of what it says have passed, more is left out
    of every span, and spans begin again if it is back, or more than `MAX_PAUSE_SECONDS` ahead.

    >>> stored = StoredTime(SteadyTime(1000.0, 10.0), "a")
    >>> after_restart(stored, StoredTime(SteadyTime(8200.0, 7210.0), "a")) is None
    True
    >>> after_restart(stored, StoredTime(SteadyTime(8200.0, 10.0), "b"))
    TimeBreak(now=8200.0, lost=7200.0, anew=False)
    """
    if now.boot and now.boot == stored.boot and now.time.steady >= stored.time.steady:
        lost = now.time.now - stored.time.at(now.time.steady)
        return TimeBreak(now.time.now, lost, anew=True) if abs(lost) > JUMP_SECONDS else None
    lost = now.time.now - stored.time.now
    if abs(lost) <= JUMP_SECONDS:
        return None
    return TimeBreak(now.time.now, lost, anew=not 0.0 < lost <= MAX_PAUSE_SECONDS)
