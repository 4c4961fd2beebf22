"""Parts of the status that come from the relays' counters: the proxy's health, and how responses end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from hemostat.ipc.ends import FAILED
from hemostat.ipc.messages import OVERHEAD_BUCKETS, Stats
from hemostat.metrics import names
from hemostat.openai import routes


class RecentRequests(msgspec.Struct, frozen=True):
    """The requests of the last minute, or since the end of an outage of vLLM within it."""

    seconds: float
    requests: int
    failed: int
    """The part of them that the upstream answered with a server error, or not at all."""


class ProxyStatus(msgspec.Struct, frozen=True):
    """Requests by outcome and route, and the time that the relay adds: since the start, except `recent`."""

    requests: int
    generations: int
    """The number of requests on the routes that generate text."""
    by_outcome: dict[str, int]
    by_route: dict[str, int]
    failed: int
    """The number of requests that the upstream answered with a server error, or not at all."""
    failed_ratio: float | None
    overhead_seconds: dict[str, float | None]
    """The p50 and p99: each is the upper end of the histogram's bucket, and at most the last finite one (JSON has no
    infinity).
    """
    overhead_counts: list[int]
    """The number of requests in each bucket of the histogram of the overhead: `OVERHEAD_BUCKETS`, and above."""
    recent: RecentRequests


class ArmEndings(msgspec.Struct):
    """The ways in which the generations of one arm ended, sampled or not."""

    finished: dict[str, int] = {}
    """The number of responses by finish_reason."""
    output_tokens: int = 0
    loops: int = 0
    """The number of responses that end in one block of text repeated."""
    structured: dict[str, dict[str, int]] = {}
    """The number of answers for which JSON or tool calls were asked, by kind and outcome."""


def quantile(counts: Sequence[int], q: float) -> float | None:
    """Returns the upper end, seconds, of the bucket of the overhead that holds the quantile (infinite above the last),
    or None.

    counts: requests by bucket of `OVERHEAD_BUCKETS`, and above."""
    total = sum(counts)
    if not total:
        return None
    seen = 0
    for edge, count in zip((*OVERHEAD_BUCKETS, math.inf), counts, strict=True):
        seen += count
        if seen >= q * total:
            return edge
    return math.inf


def requests_by_outcome(stats: Stats) -> dict[str, int]:
    result: dict[str, int] = {}
    for (_, outcome), value in stats.counters.get(names.REQUESTS, {}).items():
        result[outcome] = result.get(outcome, 0) + int(value)
    return result


def proxy_status(stats: Stats, recent: RecentRequests) -> ProxyStatus:
    by_outcome = requests_by_outcome(stats)
    by_route: dict[str, int] = {}
    for (route, _), value in stats.counters.get(names.REQUESTS, {}).items():
        by_route[route] = by_route.get(route, 0) + int(value)
    total = sum(by_outcome.values())
    failed = sum(by_outcome.get(name, 0) for name in FAILED)
    overhead = {name: quantile(stats.overhead_buckets, q) for name, q in (("p50", 0.5), ("p99", 0.99))}
    return ProxyStatus(
        requests=total,
        generations=sum(value for route, value in by_route.items() if route in routes.SCORED),
        by_outcome=by_outcome,
        by_route=by_route,
        failed=failed,
        failed_ratio=failed / total if total else None,
        overhead_seconds={
            name: None if value is None else min(value, OVERHEAD_BUCKETS[-1]) for name, value in overhead.items()
        },
        overhead_counts=list(stats.overhead_buckets),
        recent=recent,
    )


def endings_by_arm(stats: Stats) -> dict[str, ArmEndings]:
    result: dict[str, ArmEndings] = {}

    def of(arm: str) -> ArmEndings:
        return result.setdefault(arm, ArmEndings())

    for (arm, reason), value in stats.counters.get(names.RESPONSES_FINISHED, {}).items():
        of(arm).finished[reason] = int(value)
    for (arm,), value in stats.counters.get(names.OUTPUT_TOKENS, {}).items():
        of(arm).output_tokens = int(value)
    for (arm,), value in stats.counters.get(names.REPETITION_LOOPS, {}).items():
        of(arm).loops = int(value)
    for (arm, kind, outcome), value in stats.counters.get(names.STRUCTURED_OUTPUTS, {}).items():
        of(arm).structured.setdefault(kind, {})[outcome] = int(value)
    return result
