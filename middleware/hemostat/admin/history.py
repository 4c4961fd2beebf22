"""The last hours of a few figures, for the console's charts, and what changed meanwhile."""

from __future__ import annotations

import math
from collections import deque
from itertools import zip_longest
from typing import Any

from hemostat.admin.proxy_status import quantile
from hemostat.admin.status import Status
from hemostat.ipc.messages import OVERHEAD_BUCKETS

POINT_SECONDS = 10.0
"""The time between two points."""
MAX_POINTS = 2160
"""The largest number of points: six hours."""
RECENT_POINTS = 6
"""The number of points over which a recent figure is taken: a minute."""
MAX_EVENTS = 200


class History:
    """A few figures, every POINT_SECONDS; the oldest points are dropped."""

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
        "overhead_p99",
        "scored",
        "reference_tokens",
        "queue",
    )
    """The names of the columns. KL is the lower bound, since the start but for `kl_recent`, which is the mean over the
    tokens of the last RECENT_POINTS; `overhead_p99` (seconds) is of the requests of the same points. Counters are given
    by their values.
    """

    def __init__(self) -> None:
        self._points: deque[tuple[float, ...]] = deque(maxlen=MAX_POINTS)
        self._sums: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=RECENT_POINTS)
        """The sums of nats and of tokens since the start, at each of the last points."""
        self._buckets: deque[list[int]] = deque(maxlen=RECENT_POINTS)
        """The histogram of the relays' overhead since the start, at each of the last points."""
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._seen: Status | None = None
        self._last = -math.inf

    def due(self, now: float) -> bool:
        """Returns True if it is time for a point. now: monotonic seconds."""
        return now - self._last >= POINT_SECONDS

    def update(self, now: float, wall: float, status: Status) -> None:
        """Takes a point. now: monotonic seconds. wall: Unix time."""
        self._last = now
        self._notice(status)
        kl, excess = status.raw["kl_nats"], status.excess.get("kl_nats")
        values = (
            kl["estimate"],
            *kl["ci95"],
            self._recent(kl["estimate"], status.raw["tokens"]),
            excess["floor"] if excess else None,
            status.recovered.ratio,
            *status.recovered.ci95,
            status.proxy.requests,
            status.proxy.failed,
            self._overhead(status.proxy.overhead_counts),
            status.requests.scored,
            status.shadow.reference_tokens,
            status.queue.depth,
        )
        self._points.append((wall, *(math.nan if value is None else float(value) for value in values)))

    def _recent(self, mean: float | None, tokens: int) -> float | None:
        """Returns the mean over the last points, from the mean since the start."""
        nats, before = self._sums[0]
        self._sums.append(((mean or 0.0) * tokens, tokens))
        return (self._sums[-1][0] - nats) / (tokens - before) if tokens > before else None

    def _overhead(self, counts: list[int]) -> float | None:
        """Returns the 99 % quantile of the last points, seconds; at most the largest finite edge of a bucket. counts:
        empty before a relay has reported."""
        before = self._buckets[0] if self._buckets else counts
        self._buckets.append(counts)
        recent = [max(0, now - then) for now, then in zip_longest(counts, before, fillvalue=0)]
        result = quantile(recent, 0.99)
        return None if result is None else min(result, OVERHEAD_BUCKETS[-1])

    def _notice(self, status: Status) -> None:
        """Adds an event for each change since the last point of what is wrong, of the models, and of the settings."""
        before, self._seen = self._seen, status
        if before is None:
            return

        def event(decision: str, why: str) -> None:
            self._events.append({"at": status.at, "decision": decision, "why": why})

        problems, were = ({p.alert: p.text for p in report.state.problems} for report in (status, before))
        for alert in problems.keys() - were.keys():
            event("problem", problems[alert])
        for alert in were.keys() - problems.keys():
            event("solved", were[alert])
        models, earlier = ({name: m for m in report.models for name in m.names} for report in (status, before))
        for name, model in models.items():
            known = earlier.get(name)
            if known is not None and (known.root, known.reference) != (model.root, model.reference):
                event("checkpoint", f"{name} is {model.root or name}, its reference {model.reference or 'none'}")
        if earlier and models.keys() != earlier.keys():
            event("checkpoint", f"served models: {', '.join(sorted(models)) or 'none'}")
        if status.configuration.loaded_at != before.configuration.loaded_at:
            event("reload", "the configuration was reloaded")

    def report(self, after: float = 0.0) -> dict[str, Any]:
        """Returns the history, JSON-ready. `points`: columns, `time` (Unix), then NAMES, of the points later than
        `after`; None if there was no figure. `events`: what changed since the start, oldest first, as events of
        profiles are written."""
        points = [point for point in self._points if point[0] > after]
        columns = zip(*points, strict=True) if points else [()] * (1 + len(self.NAMES))
        return {
            "points": {
                name: [value if math.isfinite(value) else None for value in column]
                for name, column in zip(("time", *self.NAMES), columns, strict=True)
            },
            "events": list(self._events),
        }
