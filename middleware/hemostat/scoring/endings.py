"""Counts how captures end, and why, by `hemostat.metrics.reasons`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator

from hemostat.ipc.messages import Capture
from hemostat.metrics import names
from hemostat.metrics.reasons import Outcome, Unscored
from hemostat.metrics.samples import Sample


class NotScored(Exception):
    """Ends a capture without a record. A stage raises it, and the scorer counts it.

    message: one line for the log; "" if there is nothing to log. detail: see `Unscored`. level: the log's level.
    """

    def __init__(self, reason: Unscored, message: str = "", *, detail: str = "", level: int = logging.WARNING) -> None:
        super().__init__(message or reason.value)
        self.reason = reason
        self.message = message
        self.detail = detail
        self.level = level


class EndingCounts:
    """Counts by outcome and reason, since the start. on_ending: called for every capture that ends."""

    def __init__(self, on_ending: Callable[[Capture, str, str, int], None] | None = None) -> None:
        self._counts: Counter[tuple[Outcome, str]] = Counter()
        self._on_ending = on_ending

    def scored(self, capture: Capture, left_out: int = 0) -> None:
        """Counts a capture that was scored. left_out: the number of output tokens that were not scored."""
        self._count(Outcome.SCORED, "", capture, left_out)

    def unscored(self, reason: Unscored, capture: Capture, detail: str = "") -> None:
        """Counts a capture that was not scored. detail: see `Unscored`."""
        self._count(reason.outcome, reason.label(detail), capture, 0)

    def _count(self, outcome: Outcome, reason: str, capture: Capture, left_out: int) -> None:
        self._counts[outcome, reason] += 1
        if self._on_ending is not None:
            self._on_ending(capture, outcome.value, reason, left_out)

    @property
    def scored_captures(self) -> int:
        return self._counts[Outcome.SCORED, ""]

    def by_reason(self, outcome: Outcome) -> dict[str, int]:
        return {reason: count for (which, reason), count in self._counts.items() if which == outcome}

    def samples(self) -> Iterator[Sample]:
        for labels, count in self._counts.items():
            yield Sample(names.SHADOW_REQUESTS, labels, count)
