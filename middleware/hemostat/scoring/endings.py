"""How captures end, and why: counts by `hemostat.ipc.reasons`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from hemostat.ipc.messages import Capture
from hemostat.ipc.reasons import Outcome
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import ReferenceFailure
from hemostat_calibration.errors import InvalidRecordError


def invalid_record(error: InvalidRecordError) -> str:
    """Reason of a skip: the record failed a check of its form."""
    return f"invalid_{error.reason}"


def reference_failed(failure: ReferenceFailure) -> str:
    """Reason of a drop."""
    return f"reference_{failure.reason}"


class EndingCounts:
    """Counts by outcome and reason, since the start. on_ending: is told of every capture that ends."""

    def __init__(self, on_ending: Callable[[Capture, str, str, int], None] | None = None) -> None:
        self._counts: Counter[tuple[Outcome, str]] = Counter()
        self._on_ending = on_ending

    def count(self, outcome: Outcome, reason: str = "", capture: Capture | None = None, left_out: int = 0) -> None:
        """left_out: of a scored capture, output tokens that were not scored."""
        self._counts[outcome, str(reason)] += 1
        if capture is not None and self._on_ending is not None:
            self._on_ending(capture, outcome.value, str(reason), left_out)

    @property
    def scored(self) -> int:
        return self._counts[Outcome.SCORED, ""]

    def by_reason(self, outcome: Outcome) -> dict[str, int]:
        return {reason: count for (which, reason), count in self._counts.items() if which == outcome}

    def samples(self) -> Iterator[Sample]:
        for labels, count in self._counts.items():
            yield Sample(names.SHADOW_REQUESTS, labels, count)
