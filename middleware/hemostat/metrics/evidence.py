"""The metrics of what replicas send to the one that leads."""

from __future__ import annotations

from hemostat.metrics import names
from hemostat.metrics.metric import Metric

METRICS = (
    Metric(
        names.EVIDENCE_UNITS,
        "counter",
        "units",
        "Evidence that replicas send to the one that leads, by what became of it: a unit for each scored request, "
        "outcome, and batch of requests that were learned from.",
        ("stream", "outcome"),
    ),
    Metric(names.EVIDENCE_BYTES, "counter", "bytes", "Of the units that were sent.", ("stream",)),
    Metric(
        names.EVIDENCE_WAITING_UNITS,
        "gauge",
        "units",
        "Evidence of this replica that the store does not have yet: lost if this replica dies now.",
        ("stream",),
    ),
    Metric(
        names.EVIDENCE_LAG_SECONDS,
        "gauge",
        "seconds",
        "At the replica that leads: age of the oldest evidence of other replicas when it was last taken.",
        ("stream",),
    ),
)
