"""The last hours of a few figures, for the console's charts."""

from __future__ import annotations

import math
from collections import deque

from hemostat.admin.status import Status

POINT_SECONDS = 10.0
"""Time between two points."""
MAX_POINTS = 2160
"""Six hours."""
RECENT_POINTS = 6
"""Points over which a recent figure is taken: a minute."""


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
        "scored",
        "reference_tokens",
        "queue",
    )
    """KL is the lower bound, since the start but for `kl_recent`, which is the mean over the tokens of the last
    RECENT_POINTS. Of counters: their values."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, ...]] = deque(maxlen=MAX_POINTS)
        self._sums: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=RECENT_POINTS)
        """Nats and tokens since the start, at the last points."""
        self._last = -math.inf

    def due(self, now: float) -> bool:
        """Whether it is time for a point; now: monotonic seconds."""
        return now - self._last >= POINT_SECONDS

    def add(self, now: float, wall: float, status: Status) -> None:
        """Take a point. now: monotonic seconds. wall: Unix time."""
        self._last = now
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
            status.requests.scored,
            status.shadow.reference_tokens,
            status.queue.depth,
        )
        self._points.append((wall, *(math.nan if value is None else float(value) for value in values)))

    def _recent(self, mean: float | None, tokens: int) -> float | None:
        """The mean over the last points, from the mean since the start."""
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
