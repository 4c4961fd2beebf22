"""The time of the control process, on which all evidence relies (`hemostat_calibration.elapsed`).

It is Unix time, as people read it, and it goes on by a clock that nobody sets, whatever the wall clock does. It is
compared with the wall clock regularly. If that was set, the time follows, and `Control` tells whoever keeps times.

The clock that nobody sets is CLOCK_BOOTTIME where there is one, and CLOCK_MONOTONIC elsewhere. On Linux CLOCK_MONOTONIC
stands still while the machine is suspended. By that clock, a laptop that is closed every night would have its clock set
every morning, and would never see a cycle of its traffic. But time has passed while a machine was suspended: no request
came, which is a pause like any other. A virtual machine that its host has stopped counts that time in neither clock:
when it goes on, its wall clock is set, and that is a break.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from hemostat.store.protocol import StateKey, StoreWrites
from hemostat_calibration.elapsed import (
    SteadyTime,
    StoredTime,
    TimeBreak,
    after_restart,
)
from hemostat_calibration.state_codec import decode, encode

STATE_KEY = StateKey("time")
"""The key of the time in the store, by which a later process knows how long none has looked."""
SCHEMA = 1
SAVE_SECONDS = 60.0
"""The longest pause between two writes of the time. How old it is does not matter while the clocks go on."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UNITS = (("years", 365.25 * 86_400.0), ("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0))


def boot_time() -> float:
    """Returns the seconds of a clock that nobody sets, and that goes on while the machine is suspended, if it can."""
    try:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):  # another system than Linux, or a kernel that has no such clock
        return time.monotonic()


def boot_id() -> str:
    """Returns what names the run of the machine in which `boot_time` counts; "" if it is not known."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


class SteadyClock:
    """Owns the time. Lives in the control process's event loop.

    wall: Unix time, which may be set. steady: see `boot_time`. boot: see `boot_id`.
    """

    def __init__(self, wall: Callable[[], float], steady: Callable[[], float], boot: str) -> None:
        self._wall, self._steady, self._boot = wall, steady, boot
        self._time = SteadyTime(wall(), steady())
        self._saved_at: float | None = None
        """The time at which the time was stored last, by the clock that nobody sets."""

    def now(self) -> float:
        """Returns the Unix time, seconds. It never goes back between two calls of `look`."""
        return self._time.at(self._steady())

    def look(self) -> TimeBreak | None:
        """Compares with the wall clock. Returns a break if that was set. Call it regularly."""
        self._time, time_break = self._time.read(self._wall(), self._steady())
        return time_break

    def restore(self, stored: str | None) -> TimeBreak | None:
        """Returns what has happened to the time since an earlier process has stored it; None if it has gone on, or if
        nothing was stored. InvalidArgumentError if that is damaged."""
        if stored is None:
            return None
        return after_restart(decode(StoredTime, stored.encode(), SCHEMA), self._current())

    def _current(self) -> StoredTime:
        steady = self._steady()
        return StoredTime(SteadyTime(self._time.at(steady), steady), self._boot)

    def save(self, writes: StoreWrites) -> None:
        """Queues a write of the time."""
        current = self._current()
        self._saved_at = current.time.steady
        writes.set_state(STATE_KEY, encode(current, SCHEMA).decode())

    def save_if_due(self, writes: StoreWrites) -> None:
        """The same once `SAVE_SECONDS` have passed since the last time."""
        if self._saved_at is None or self._steady() - self._saved_at >= SAVE_SECONDS:
            self.save(writes)


def sentence(time_break: TimeBreak, *, restarted: bool = False) -> str:
    """Returns what has happened, for people. restarted: no process has looked meanwhile.

    >>> sentence(TimeBreak(now=0.0, lost=-3600.0, anew=True))
    'the clock was set back by 1.0 hours: cycles of the traffic that had not ended begin again'
    >>> sentence(TimeBreak(now=0.0, lost=9 * 86_400.0, anew=True), restarted=True)
    'the clock was set forward, or no control process has run, for 9.0 days: cycles of the traffic that had not ended \
begin again'
    """
    size = _size(abs(time_break.lost))
    if time_break.lost < 0.0:
        what = f"the clock was set back by {size}"
    elif restarted:
        what = f"the clock was set forward, or no control process has run, for {size}"
    else:
        what = f"the clock was set forward by {size}"
    after = "begin again" if time_break.anew else "go on without that time"
    return f"{what}: cycles of the traffic that had not ended {after}"


def _size(seconds: float) -> str:
    name, length = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    return f"{seconds / length:.1f} {name}"
