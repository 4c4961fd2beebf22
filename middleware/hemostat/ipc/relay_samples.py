"""The samples of what all relays have counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from hemostat.ipc.ends import OUTCOMES
from hemostat.ipc.messages import OVERHEAD_BUCKETS, Stats
from hemostat.metrics import names
from hemostat.metrics.reasons import FailedPart, Outcome, RepeatReason, Unscored
from hemostat.metrics.samples import AnySample, HistogramSample, Sample
from hemostat.openai import routes
from hemostat_calibration.records import Arm

_ARMS: Final[list[tuple[str, ...]]] = [(str(arm),) for arm in Arm]
INITIAL_SERIES: Final[dict[str, list[tuple[str, ...]]]] = {
    names.REQUESTS: [(route, outcome) for route in routes.SCORED for outcome in OUTCOMES],
    names.SHADOW_REQUESTS: [
        (Outcome.SHADOWED.value, ""),
        (Outcome.SCORED.value, ""),
        Unscored.QUEUE_FULL.labels,
        Unscored.LINK_FULL.labels,
    ],
    names.CLIENT_LIMITED_REQUESTS: [("rate",), ("concurrent",)],
    names.ACCESS_LOG_DROPPED_LINES: [()],
    names.REPEATED_REQUESTS: [(reason.value,) for reason in RepeatReason],
    names.INTERNAL_ERRORS: [(FailedPart.OUTCOME.value,), (FailedPart.TRACING.value,)],
    names.CLOSED_CONNECTIONS: [("connections",), ("connections_per_client",)],
    names.RESPONSES_FINISHED: [(*arm, reason) for arm in _ARMS for reason in ("stop", "length")],
    names.OUTPUT_TOKENS: _ARMS,
    names.REPETITION_LOOPS: _ARMS,
    names.STRUCTURED_OUTPUTS: [
        (*arm, kind, outcome)
        for arm in _ARMS
        for kind in ("json", "tool_call")
        for outcome in ("valid", "invalid", "cut")
    ],
}
"""The series that are exported as 0 before anything is counted: `rate()` ignores the first value of a series, and a
panel without a series does not show whether there was nothing to count."""


def samples(total: Stats) -> Iterator[AnySample]:
    """Yields the samples of the figures of all relays together."""
    for name, series in total.counters.items():
        for labels, value in series.items():
            yield Sample(name, labels, value)
    # Not before the first relay has reported: a 0 would look like a counter that was reset.
    if not total.overhead_buckets:
        return
    for name, initial in INITIAL_SERIES.items():
        for labels in initial:
            yield Sample(name, labels, 0.0)
    yield HistogramSample(
        names.PROXY_OVERHEAD_SECONDS, (), OVERHEAD_BUCKETS, total.overhead_buckets, total.overhead_sum
    )
