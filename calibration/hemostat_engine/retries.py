"""When a failed operation may be tried again, and the log of its failures."""

from __future__ import annotations

import logging
import threading

from hemostat_calibration.backoff import Backoff

log = logging.getLogger("hemostat.engine")

PAUSE_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""The pause after the first, second, ... failure in a row. Without jitter: engines do not start together."""
MAX_OPERATIONS = 256
"""The largest number of operations whose failures are remembered; the oldest are forgotten."""


def first_line(text: str) -> str:
    """Returns the first line of what another library raises, at most 300 characters."""
    return text.partition("\n")[0][:300]


class Retries:
    """Failures by the operation's name. Each is logged once until its text changes. `now` is in monotonic seconds.

    Several threads may use it. level: of the log.
    """

    def __init__(self, level: int = logging.WARNING) -> None:
        self._level = level
        self._lock = threading.Lock()
        self._paused: dict[str, Backoff] = {}
        """The pauses of the operations that have failed, the last failure last."""
        self._logged: dict[str, str] = {}

    def may_try(self, operation: str, now: float) -> bool:
        with self._lock:
            return operation not in self._paused or self._paused[operation].may_try(now)

    def failed(self, operation: str, error: Exception, now: float) -> None:
        """Starts a pause, which is longer after each failure in a row, and logs the error if it is new."""
        text = str(error)
        with self._lock:
            backoff = self._paused.pop(operation, None) or Backoff(PAUSE_SECONDS)
            backoff.failed(now)
            self._paused[operation] = backoff
            if len(self._paused) > MAX_OPERATIONS:
                del self._paused[next(iter(self._paused))]
            if self._logged.get(operation) == text:
                return
            self._logged[operation] = text
            if len(self._logged) > MAX_OPERATIONS:
                del self._logged[next(iter(self._logged))]
        log.log(self._level, "%s", text)

    def succeeded(self, operation: str) -> None:
        with self._lock:
            self._paused.pop(operation, None)
            logged = self._logged.pop(operation, None)
        if logged is not None:
            log.log(min(self._level, logging.INFO), "%s works again", operation)


class Allowance:
    """At most `most` at once, and on average `per_second`: of what clients can cause. Not thread-safe."""

    def __init__(self, per_second: float, most: float, now: float) -> None:
        self._per_second, self._most = per_second, most
        self._left, self._counted_at = most, now

    def take(self, now: float) -> bool:
        self._left = min(self._most, self._left + (now - self._counted_at) * self._per_second)
        self._counted_at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
