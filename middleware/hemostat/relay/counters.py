"""What a relay process counts, and the samples of what all relays have counted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

from hemostat.ipc.messages import OVERHEAD_BUCKETS, EngineHealth, Stats
from hemostat.metrics import names
from hemostat.metrics.samples import AnySample, HistogramSample, Sample
from hemostat.openai import routes
from hemostat.shadow.endings import Outcome as ShadowOutcome
from hemostat.shadow.endings import ScoringDropReason
from hemostat.shadow.reports import RelayDropReason, RepeatReason
from hemostat_calibration.records import Arm

OK: Final = "ok"
"""Complete, status below 400."""
CLIENT_ERROR: Final = "client_error"
"""Complete, the upstream's status 4xx."""
SERVER_ERROR: Final = "server_error"
"""Complete, the upstream's status 5xx."""
REFUSED: Final = "refused"
"""Answered with an error of our own that is the client's fault, or with the hook's refusal."""
OVERLOADED: Final = "overloaded"
"""Answered with 503, since a limit of the relay was reached."""
UPSTREAM_FAILED: Final = "upstream_failed"
"""The upstream could not be reached, closed the connection early or sent an invalid response."""
CLIENT_GONE: Final = "client_gone"
"""The client closed the connection before its response was complete."""
FAILED: Final = (SERVER_ERROR, UPSTREAM_FAILED)
"""Clients got an error that is the upstream's."""
OUTCOMES: Final = (OK, CLIENT_ERROR, SERVER_ERROR, REFUSED, OVERLOADED, UPSTREAM_FAILED, CLIENT_GONE)


class Counters:
    """Of one process, since it started. The control process is sent all of it once a second, as `Stats`.

    requests: (route, outcome) -> requests.
    other: metric -> label values, in the metric's order -> count.
    overhead: requests in each bucket of OVERHEAD_BUCKETS, and one more for those above; overhead_sum: in seconds.
    """

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str], int] = {}
        self.other: dict[str, dict[tuple[str, ...], float]] = {}
        self.overhead = [0] * (len(OVERHEAD_BUCKETS) + 1)
        self.overhead_sum = 0.0

    def request(self, route: str, outcome: str) -> None:
        key = (route, outcome)
        self.requests[key] = self.requests.get(key, 0) + 1

    def add(self, name: str, labels: tuple[str, ...], by: float = 1.0) -> None:
        """Add to a counter. labels: its label values, in the metric's order."""
        series = self.other.get(name)
        if series is None:
            series = self.other[name] = {}
        series[labels] = series.get(labels, 0.0) + by

    def hook_raised(self) -> None:
        self.add(names.SHADOW_REQUESTS, (ShadowOutcome.DROPPED.value, RelayDropReason.HOOK_ERROR.value))

    def observe_overhead(self, seconds: float) -> None:
        """Time in the relay for one request: from the last byte of the request that was needed to its hand-over to the
        upstream's socket (a wait for a connection included), plus from the first bytes of the response to the first
        hand-over to the client's socket. Relaying the rest of the body and the upstream's own time are not included."""
        self.overhead[bisect_left(OVERHEAD_BUCKETS, seconds)] += 1
        self.overhead_sum += seconds

    def stats(self, *, ready: bool, engines: list[EngineHealth] = []) -> Stats:  # noqa: B006  never changed
        counters = {name: dict(series) for name, series in self.other.items()}
        counters[names.REQUESTS] = {labels: float(count) for labels, count in self.requests.items()}
        return Stats(
            counters=counters,
            overhead_buckets=list(self.overhead),
            overhead_sum=self.overhead_sum,
            ready=ready,
            engines=engines,
        )


_ARMS: Final[list[tuple[str, ...]]] = [(str(arm),) for arm in Arm]
INITIAL_SERIES: Final[dict[str, list[tuple[str, ...]]]] = {
    names.REQUESTS: [(route, outcome) for route in routes.SCORED for outcome in OUTCOMES],
    names.SHADOW_REQUESTS: [
        (ShadowOutcome.SHADOWED.value, ""),
        (ShadowOutcome.SCORED.value, ""),
        (ShadowOutcome.DROPPED.value, ScoringDropReason.QUEUE_FULL.value),
        (ShadowOutcome.DROPPED.value, RelayDropReason.LINK_FULL.value),
    ],
    names.CLIENT_LIMITED_REQUESTS: [("rate",), ("concurrent",)],
    names.ACCESS_LOG_DROPPED_LINES: [()],
    names.REPEATED_REQUESTS: [(reason.value,) for reason in RepeatReason],
    names.OUTCOME_REPORTS: [("sent",), ("dropped",)],
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
"""Series that are exported as 0 before anything is counted: `rate()` ignores the first value of a series, and a panel
without a series does not show whether there was nothing to count."""


def samples(total: Stats) -> Iterator[AnySample]:
    """Of the figures of all relays together."""
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
