"""The counters of a relay process. `hemostat.ipc.relay_samples` turns them into samples."""

from __future__ import annotations

from bisect import bisect_left

from hemostat.ipc.messages import OVERHEAD_BUCKETS, EngineHealth, Stats
from hemostat.metrics import names
from hemostat.metrics.reasons import Unscored


class Counters:
    """The counts of one process since it started. The control process is sent all of them once a second, as `Stats`.

    requests: (route, outcome) -> requests. other: metric -> label values, in the metric's order -> count. overhead: the
    number of requests in each bucket of OVERHEAD_BUCKETS, and above the last one; overhead_sum: in seconds.
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
        """Adds to a counter. labels: its label values, in the metric's order."""
        series = self.other.get(name)
        if series is None:
            series = self.other[name] = {}
        series[labels] = series.get(labels, 0.0) + by

    def hook_raised(self) -> None:
        self.add(names.SHADOW_REQUESTS, Unscored.HOOK_ERROR.labels)

    def update_overhead(self, seconds: float) -> None:
        """Counts the time in the relay for one request: from the last byte of the request that was needed to its
        hand-over to the upstream's socket (a wait for a connection included), plus from the first bytes of the response
        to the first hand-over to the client's socket. Relaying the rest of the body and the upstream's own time are not
        included."""
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
