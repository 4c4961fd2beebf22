"""What a relay process counts: plain integers, read when the control process is told."""

from __future__ import annotations

from bisect import bisect_left

from hemostat.ipc.messages import OVERHEAD_BUCKETS, Stats

REQUESTS = "hemostat_requests_total"
SHADOW_REQUESTS = "hemostat_shadow_requests_total"

# Outcomes.
OK = "ok"
"""Complete, status below 400."""
CLIENT_ERROR = "client_error"
"""Complete, the upstream's status 4xx."""
SERVER_ERROR = "server_error"
"""Complete, the upstream's status 5xx."""
REFUSED = "refused"
"""Answered with an error of our own that is the client's fault, or with the hook's refusal."""
UPSTREAM_FAILED = "upstream_failed"
"""The upstream could not be reached, broke off or spoke nonsense."""
CLIENT_GONE = "client_gone"
OUTCOMES = (OK, CLIENT_ERROR, SERVER_ERROR, REFUSED, UPSTREAM_FAILED, CLIENT_GONE)


class Counters:
    """Of one process, since it started."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str], int] = {}
        self.other: dict[str, dict[str, float]] = {}
        self.overhead = [0] * (len(OVERHEAD_BUCKETS) + 1)
        self.overhead_sum = 0.0

    def request(self, route: str, outcome: str) -> None:
        key = (route, outcome)
        self.requests[key] = self.requests.get(key, 0) + 1

    def add(self, name: str, labels: tuple[str, ...], by: float = 1.0) -> None:
        """Add to a counter, `labels` being its label values in the metric's order."""
        series = self.other.setdefault(name, {})
        joined = "\x1f".join(labels)
        series[joined] = series.get(joined, 0.0) + by

    def hook_raised(self) -> None:
        self.add(SHADOW_REQUESTS, ("dropped", "hook_error"))

    def observe_overhead(self, seconds: float) -> None:
        """Time in the relay for one request: from the last byte of the request that was needed to its hand-over to the
        upstream's socket (a wait for a connection included), plus from the first bytes of the response to the first
        hand-over to the client's socket. The body's way after that and the upstream's own time are not in it."""
        self.overhead[bisect_left(OVERHEAD_BUCKETS, seconds)] += 1
        self.overhead_sum += seconds

    def stats(self, *, ready: bool) -> Stats:
        counters = {name: dict(series) for name, series in self.other.items()}
        counters[REQUESTS] = {f"{route}\x1f{outcome}": float(n) for (route, outcome), n in self.requests.items()}
        return Stats(
            counters=counters, overhead_buckets=list(self.overhead), overhead_sum=self.overhead_sum, ready=ready
        )
