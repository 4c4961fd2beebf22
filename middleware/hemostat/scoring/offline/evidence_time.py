"""The time of the requests that figures and alarms are of, where they are scored later than they were served."""

from __future__ import annotations

from collections.abc import Callable


class EvidenceTime:
    """A clock that stands at the time of the newest row. wall: Unix time, which it shows before the first row."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self.began: float | None = None
        """The time of the first row; None before it."""
        self._until = 0.0

    def update(self, at: float) -> None:
        """Goes on to the time of a row, in Unix seconds. It never goes back."""
        if self.began is None:
            self.began = at
        self._until = max(self._until, at)

    def now(self) -> float:
        """Returns the Unix time, in seconds."""
        return self._wall() if self.began is None else self._until
