"""Clocks that are set, where a decision has to wait for a cycle of the traffic.

20 scored requests an hour, in one kind of 20 clients. The clock is set forward by three days three times in the first
half day, as where a machine and the time of the network disagree. Half a day is no cycle: what is measured by day alone
says nothing of the night. So a gate that such a clock opens decides wrongly.

- Guard: the gains are 0.3 nats above 0 by day and as much below it by night: their mean is 0. Promotions are counted.
- Alarm: the spreads are twice as large by night, every night. Alarms are counted.

`SteadyTime` and `after_break` are what the control process uses. What would happen if the wall clock were believed, up
to the limits of `has_jumped`, is counted, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from tests.bench.guard import Row, most
from tests.bench.guard.traffic import draw_clients, normal

from hemostat_calibration import alarm
from hemostat_calibration.elapsed import SteadyTime, TimeBreak
from hemostat_calibration.guard.decisions import Action, Admission
from hemostat_calibration.guard.guard import Guard

NAME = "clock_jumps"
TAKES = "one minute on one core (a tenth of the lives)"

HOUR, DAY = 3600.0, 86_400.0
PER_HOUR = 20
JUMPS = (3.0 * HOUR, 6.0 * HOUR, 9.0 * HOUR)
JUMP = 3.0 * DAY
START = 1.7e9
LIFE_DAYS = 1.5


class Clock:
    """The wall clock of a life, and the time that the control process makes of it. believed: it is taken as it is."""

    def __init__(self, *, believed: bool, jumps: tuple[float, ...] = JUMPS) -> None:
        self._believed, self._jumps = believed, jumps
        self._time = SteadyTime(START, 0.0)

    def read(self, passed: float) -> tuple[float, TimeBreak | None]:
        """The time after so many seconds, and a break."""
        wall = START + passed + JUMP * sum(passed >= at for at in self._jumps)
        if self._believed:
            return wall, None
        self._time, time_break = self._time.read(wall, passed)
        return self._time.now, time_break


def is_day(passed: float) -> bool:
    """A life begins in the morning, and a day has twelve hours."""
    return passed % DAY < DAY / 2.0


def promoted(rng: np.random.Generator, clock: Clock, days: float = LIFE_DAYS) -> bool:
    """A profile that gains nothing in the mean is promoted."""
    guard = Guard(cycle=DAY)
    guard.begin_candidate("profile", {"chat": (1.0, 1.0)})
    units = int(24 * PER_HOUR * days)
    clients, noise, figures = draw_clients(rng, units), normal(rng, 0.0, units), rng.normal(0.4, 0.1, units)
    for n in range(units):
        passed = n * HOUR / PER_HOUR
        now, time_break = clock.read(passed)
        if time_break is not None:
            guard.after_break(time_break)
        unit, gain = n.to_bytes(8, "big"), min(max(noise[n] + (0.3 if is_day(passed) else -0.3), -1.0), 1.0)
        guard.update_dependence("chat", clients[n], figures[n], now)
        if guard.admit("profile", "chat", unit, clients[n]) is Admission.ADMITTED:
            guard.update("profile", "chat", unit, clients[n], gain, gain, 60, now=now)
            if n % 5 == 0 and guard.decide("profile", "chat").action is Action.PROMOTE:
                return True
    return False


def alarmed(rng: np.random.Generator, clock: Clock, days: float = LIFE_DAYS) -> bool:
    """The alarm is raised although nothing changes."""
    state = alarm.init(alarm.Settings(cycle=DAY))
    for n in range(int(24 * PER_HOUR * days)):
        passed = n * HOUR / PER_HOUR
        now, time_break = clock.read(passed)
        if time_break is not None:
            state = alarm.after_break(state, time_break)
        effect = (0.0 if is_day(passed) else 0.7) + 0.1 * rng.normal()
        spreads = np.abs(rng.normal(0.0, 0.3 * math.exp(effect), 48))
        state = alarm.update(state, "chat", alarm.Observation(now, spreads, spreads))
        if any(reading.raised is not None for reading in alarm.readings(state)):
            return True
    return False


WORLDS: dict[str, Callable[[np.random.Generator, Clock], bool]] = {
    "a profile that helps by day and harms by night is promoted": promoted,
    "spreads that are larger by night raise the alarm": alarmed,
}


def count(world: str, lives: int, seed: int, *, believed: bool) -> int:
    """Returns in how many lives it happens."""
    return sum(WORLDS[world](np.random.default_rng([seed, life]), Clock(believed=believed)) for life in range(lives))


def rows(lives: int, seed: int) -> Iterator[Row]:
    lives = max(lives // 10, 5)
    for world in WORLDS:
        believed, steady = (count(world, lives, seed, believed=each) for each in (True, False))
        yield Row(
            f"the clock is set forward by 3 days three times: {world}",
            f"{steady} of {lives}; if the wall clock were believed {believed}",
            f"<= {most(lives, 0.05)} of {lives}",
            steady <= most(lives, 0.05),
        )
