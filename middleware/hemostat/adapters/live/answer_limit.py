"""The limit on the length of a record for the judge: it may be as long as its answer is expected in time, given the
speed of earlier answers."""

from __future__ import annotations

TARGET_SECONDS = 40.0
"""An answer that is expected to take longer is not asked for."""
MEASURED_SECONDS = 1.0
"""A quicker answer says little of the speed: it only shows that it is not less."""
SMOOTHING = 0.2
"""Weight of the last answer in the mean speed."""
RECOVERY = 1.01
"""By which the limit grows with every record that is too long, so that a machine that was busy for a while is tried
again."""
BACK_OFF = 4.0
"""By which the speed is below what would have been in time, after an answer that was not."""


class AnswerLimit:
    """Owns the speed, tokens that a model is run on a second; nothing is too long before it is known.

    What is too long is decided by a record's length alone, not by what would be found.

    >>> limit = AnswerLimit()
    >>> limit.allows(10**6), limit.max_tokens
    (True, None)
    >>> limit.answered(1000, 2.0)
    >>> limit.max_tokens, limit.allows(20_000), limit.allows(20_001)
    (20000, True, False)
    """

    def __init__(self) -> None:
        self._speed: float | None = None

    @property
    def max_tokens(self) -> int | None:
        """None: not known yet."""
        return None if self._speed is None else int(self._speed * TARGET_SECONDS)

    def allows(self, tokens: int) -> bool:
        """Returns True if a request of so many tokens, each counted for every pass over it, may be made."""
        limit = self.max_tokens
        if self._speed is None or limit is None or tokens <= limit:
            return True
        self._speed *= RECOVERY
        return False

    def answered(self, tokens: int, seconds: float) -> None:
        speed = tokens / max(seconds, 1e-3)
        if seconds < MEASURED_SECONDS:
            self._speed = None if self._speed is None else max(self._speed, speed)
        else:
            self._speed = speed if self._speed is None else (1.0 - SMOOTHING) * self._speed + SMOOTHING * speed

    def late(self, tokens: int, seconds: float) -> None:
        """No answer came within so many seconds."""
        speed = tokens / max(seconds, 1e-3) / BACK_OFF
        self._speed = speed if self._speed is None else min(speed, self._speed)
