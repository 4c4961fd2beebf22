"""When an engine gets no requests, and when again. Pure: the time is passed in (event-loop seconds).

           FAILURES failures in a row, FAILED_CHECKS checks, or it
           fails more requests than the others (`comparison`)
    UP ───────────────────────────────────────────────────────────► EJECTED
     ▲                                                                 │
     └──── the hold is over and the last check passed; from then ──────┘
           until a request succeeds, one failure ejects again

This is the engine's circuit breaker: EJECTED is its open state, and the time after the return its half-open one. An
engine that is not checked is RETURNING then: it gets requests, and is not called UP before one succeeds. The hold
doubles with every ejection that follows soon after a return, so that an engine that answers checks and fails requests
gets fewer and fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

from hemostat_calibration.backoff import Backoff

FAILURES: Final = 3
"""The number of failures in a row that are certainly the engine's (see `Health.request_failed`), after which it is
ejected."""
FAILED_CHECKS: Final = 2
HOLD_SECONDS: Final[Sequence[float]] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""The time of an ejection, by the number of ejections in a row."""
STABLE_SECONDS: Final = 60.0
"""After an engine was up for this long, its next ejection is the first in a row again."""


class HealthState(Enum):
    """The state of an engine; the values are the names in status and metrics."""

    UP = "up"
    EJECTED = "ejected"
    RETURNING = "returning"
    """The hold is over, so that it gets requests; nothing has shown yet that it answers them."""


class Health:
    """The health of one engine. checked: its /health is asked for; otherwise it returns when its hold is over."""

    __slots__ = (
        "_checked",
        "_failed_checks",
        "_hold",
        "_proven",
        "_returned",
        "ejections",
        "failures",
        "reachable",
        "up",
    )

    def __init__(self, *, checked: bool) -> None:
        self._checked = checked
        self.up = True
        """It is True if the engine gets requests."""
        self.failures = 0
        """The number of failures in a row; 0 needs no `request_succeeded`."""
        self.reachable = True
        """It is True if the last check, or the last attempt to connect, did not fail."""
        self.ejections = 0
        """The number of ejections since the start."""
        self._hold = Backoff(HOLD_SECONDS)
        self._failed_checks = 0
        self._proven = True
        """It is True if, while the engine is up, a check or a request has succeeded since the last ejection."""
        self._returned = float("-inf")

    @property
    def state(self) -> HealthState:
        if not self.up:
            return HealthState.EJECTED
        return HealthState.UP if self._proven else HealthState.RETURNING

    @property
    def on_probation(self) -> bool:
        """It is True if one more failure ejects the engine."""
        return self.up and self.failures >= FAILURES - 1

    def connection_failed(self, now: float) -> None:
        """Notes that the engine could not be reached."""
        self.reachable = False
        self.request_failed(now)

    def request_failed(self, now: float) -> None:
        """Notes that it had no usable answer to a request, and that is not the request's fault."""
        self.failures += 1
        if self.up and self.failures >= FAILURES:
            self.eject(now)

    def request_succeeded(self) -> None:
        self.failures = 0
        self.reachable = True
        self._proven = True

    def check_failed(self, now: float) -> None:
        self.reachable = False
        self._failed_checks += 1
        if self.up and self._failed_checks >= FAILED_CHECKS:
            self.eject(now)

    def check_passed(self, now: float) -> None:
        self.reachable = True
        self._failed_checks = 0
        self.advance(now)
        self._proven = True

    def advance(self, now: float) -> None:
        """Lets the engine return if the hold is over. It is called about once a second."""
        if not self.up and self._hold.may_try(now) and not self._failed_checks:
            self.up = True
            self._proven = self._checked  # the last check has passed
            self.failures = FAILURES - 1
            self._returned = now

    def eject(self, now: float) -> None:
        """Ejects an engine that is up: it gets no requests from now on."""
        if now - self._returned > STABLE_SECONDS:
            self._hold.reset()
        self._hold.failed(now)
        self.ejections += 1
        self.up = False
        if self._checked and not self._failed_checks:
            self._failed_checks = 1  # the last check is older than what has just failed
