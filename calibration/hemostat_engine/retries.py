"""When a failed operation may be tried again, and the log of its failures."""

from __future__ import annotations

import logging

log = logging.getLogger("hemostat.engine")

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 1.0, 60.0
"""The pause after a failure doubles from the first to the longest. Without jitter: engines do not start together."""
MAX_OPERATIONS = 256
"""Operations whose failures are remembered; the oldest are forgotten."""


class Retries:
    """Failures by the operation's name. Each is logged once until its text changes. `now` is in monotonic seconds."""

    def __init__(self) -> None:
        self._paused: dict[str, tuple[float, float]] = {}
        """Operation: (end of the pause, its length)."""
        self._logged: dict[str, str] = {}

    def may_try(self, operation: str, now: float) -> bool:
        return self._paused.get(operation, (0.0, 0.0))[0] <= now

    def failed(self, operation: str, error: Exception, now: float) -> None:
        """Start or double the pause, and log the error if it is new."""
        last = self._paused.pop(operation, None)
        pause = FIRST_PAUSE_SECONDS if last is None else min(2 * last[1], MAX_PAUSE_SECONDS)
        self._paused[operation] = (now + pause, pause)
        if len(self._paused) > MAX_OPERATIONS:
            del self._paused[next(iter(self._paused))]
        text = str(error)
        if self._logged.get(operation) != text:
            self._logged[operation] = text
            if len(self._logged) > MAX_OPERATIONS:
                del self._logged[next(iter(self._logged))]
            log.warning("%s", text)

    def succeeded(self, operation: str) -> None:
        self._paused.pop(operation, None)
        if self._logged.pop(operation, None) is not None:
            log.info("%s works again", operation)
