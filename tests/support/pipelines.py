"""A `ScoringPipeline` that only hands records to its consumers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hemostat.measurement.by_model import OtherModels
from hemostat.scored_record import RecordConsumer
from hemostat.scoring.consumers import Calibration, Texts, Traces
from hemostat.scoring.distances import DistanceSource, DistanceWaits
from hemostat.scoring.pipeline import ScoringPipeline
from hemostat.scoring.record_reader import RecordReader
from hemostat.scoring.record_users import RecordUsers

from .control import settings


def record_pipeline(
    consumers: Any,
    served: Any,
    *,
    distances: DistanceSource | None = None,
    on_change: Callable[[], None] = lambda: None,
    monitor: Any = None,
) -> ScoringPipeline:
    """Nothing is scored or measured anew by it. consumers: what they hand records to. served: the served models.
    monitor: what knows them; a test may have it know others."""
    monitor = monitor or SimpleNamespace(served=served)
    measured: Any = SimpleNamespace(
        measurements=consumers.measurements, alarms=consumers.alarms, by_engine=consumers.engines
    )
    others: list[RecordConsumer] = []
    if consumers.tracing is not None:
        others.append(Traces(consumers.tracing, lambda: 0.0))
    if consumers.texts is not None:
        others.append(Texts(consumers.texts, consumers.profiles))
    users = RecordUsers(
        RecordReader(monitor, consumers.profiles),
        measured,
        Calibration(consumers.profiles, consumers.learner),
        OtherModels(),
        DistanceWaits(distances),
        on_change,
        others=others,
        records=consumers.records,
    )
    nothing: Any = None
    return ScoringPipeline(settings(), monitor, nothing, None, users, lambda: 0.0)
