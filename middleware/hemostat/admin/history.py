"""What the relays count, for people: the proxy's health, and how responses end; and the last hours of a few figures."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from hemostat.ipc.messages import OVERHEAD_BUCKETS, Stats
from hemostat.metrics import names
from hemostat.openai import routes
from hemostat.relay import counters

HISTORY_EVERY = 10.0
"""Seconds between two points."""
HISTORY_POINTS = 2160
"""Six hours."""
RECENT = 6
"""Points that make up what is told as recent: a minute."""


def quantile(stats: Stats, q: float) -> float | None:
    """Upper end, seconds, of the bucket of the overhead that holds the quantile (infinite above the last), or None."""
    total = sum(stats.overhead_buckets)
    if not total:
        return None
    seen = 0
    for edge, count in zip((*OVERHEAD_BUCKETS, math.inf), stats.overhead_buckets, strict=True):
        seen += count
        if seen >= q * total:
            return edge
    return math.inf


def proxy(stats: Stats) -> dict[str, Any]:
    """Requests by outcome and route, and what the relay adds, since it started. JSON-ready."""
    by_outcome: dict[str, int] = {}
    by_route: dict[str, int] = {}
    for (route, outcome), value in stats.counters.get(names.REQUESTS, {}).items():
        by_outcome[outcome] = by_outcome.get(outcome, 0) + int(value)
        by_route[route] = by_route.get(route, 0) + int(value)
    total = sum(by_outcome.values())
    failed = sum(by_outcome.get(outcome, 0) for outcome in (counters.SERVER_ERROR, counters.UPSTREAM_FAILED))
    overhead = {name: quantile(stats, q) for name, q in (("p50", 0.5), ("p99", 0.99))}
    return {
        "requests": total,
        "generations": sum(value for route, value in by_route.items() if route in routes.SCORED),
        "by_outcome": by_outcome,
        "by_route": by_route,
        "failed": failed,
        "failed_ratio": failed / total if total else None,
        # More than the last edge is told as the last edge: JSON knows no infinity.
        "overhead_seconds": {name: v if v is None else min(v, OVERHEAD_BUCKETS[-1]) for name, v in overhead.items()},
    }


def endings(stats: Stats) -> dict[str, Any]:
    """By arm, how all generations ended, sampled or not. JSON-ready."""
    found: dict[str, dict[str, Any]] = {}

    def of(arm: str) -> dict[str, Any]:
        empty: dict[str, Any] = {"finished": {}, "output_tokens": 0, "loops": 0, "structured": {}}
        return found.setdefault(arm, empty)

    for (arm, reason), value in stats.counters.get(names.RESPONSES_FINISHED, {}).items():
        of(arm)["finished"][reason] = int(value)
    for (arm,), value in stats.counters.get(names.OUTPUT_TOKENS, {}).items():
        of(arm)["output_tokens"] = int(value)
    for (arm,), value in stats.counters.get(names.REPETITION_LOOPS, {}).items():
        of(arm)["loops"] = int(value)
    for (arm, kind, outcome), value in stats.counters.get(names.STRUCTURED_OUTPUTS, {}).items():
        of(arm)["structured"].setdefault(kind, {})[outcome] = int(value)
    return found


class History:
    """A few figures, every HISTORY_EVERY seconds; the oldest go."""

    NAMES = (
        "kl_nats",
        "kl_low",
        "kl_high",
        "kl_recent",
        "floor",
        "recovered",
        "recovered_low",
        "recovered_high",
        "requests",
        "failed",
        "scored",
        "reference_tokens",
        "queue",
    )
    """KL is the lower bound, since the start but for `kl_recent`, which is the mean over the tokens of the last RECENT
    points. Of counters: their values."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, ...]] = deque(maxlen=HISTORY_POINTS)
        self._sums: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=RECENT)
        self._last = -math.inf

    def due(self, now: float) -> bool:
        """Whether it is time for a point; now: monotonic seconds."""
        return now - self._last >= HISTORY_EVERY

    def add(self, now: float, wall: float, status: dict[str, Any]) -> None:
        """Take a point. wall: Unix time. status: `Control.status`."""
        self._last = now
        kl, excess, recovered = status["raw"]["kl_nats"], status["excess"].get("kl_nats"), status["recovered"]
        values = (
            kl["estimate"],
            *kl["ci95"],
            self._recent(kl["estimate"], status["raw"]["tokens"]),
            excess["floor"] if excess else None,
            recovered["ratio"],
            *recovered["ci95"],
            status["proxy"]["requests"],
            status["proxy"]["failed"],
            status["requests"]["scored"],
            status["shadow"]["reference_tokens"],
            status["queue"]["depth"],
        )
        self._points.append((wall, *(math.nan if value is None else float(value) for value in values)))

    def _recent(self, mean: float | None, tokens: int) -> float | None:
        """Of the mean since the start, the part of the last points."""
        nats, before = self._sums[0]
        self._sums.append(((mean or 0.0) * tokens, tokens))
        return (self._sums[-1][0] - nats) / (tokens - before) if tokens > before else None

    def report(self, after: float = 0.0) -> dict[str, list[float | None]]:
        """Columns: `time` (Unix), then NAMES, of the points later than `after`; None where there was no figure."""
        points = [point for point in self._points if point[0] > after]
        columns = zip(*points, strict=True) if points else [()] * (1 + len(self.NAMES))
        return {
            name: [value if math.isfinite(value) else None for value in column]
            for name, column in zip(("time", *self.NAMES), columns, strict=True)
        }
