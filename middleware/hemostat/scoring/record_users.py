"""Hands scored records, and records of a model against itself, to all that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from hemostat.ipc.messages import Capture
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import ByEngine
from hemostat.measurement.by_model import OtherModels
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat.metrics.reasons import FailedPart
from hemostat.metrics.samples import Sample
from hemostat.reference.pair import ServedModelsSource
from hemostat.scored_record import RecordConsumer
from hemostat.scoring.consumers import (
    Calibration,
    Change,
    DistanceFigures,
    Each,
    EngineTotals,
    Figures,
    ModelTests,
    ThinkingLengths,
    WithDistances,
)
from hemostat.scoring.distances import DistanceWaits
from hemostat.scoring.record_reader import RecordReader
from hemostat.scoring.records_file import RecordsFile
from hemostat_calibration.records import TokenRecord


class MeasuredParts(Protocol):
    """The parts of `hemostat.measurement.measured.Measured` that take records."""

    @property
    def measurements(self) -> Measurements: ...

    @property
    def alarms(self) -> Alarms: ...

    @property
    def by_engine(self) -> ByEngine: ...


class RecordUsers:
    """Owns the consumers of scored records, in their order.

    reader: makes a scored record of each record. on_change: called after every record, which may have changed what the
        relays' policy depends on.
    others: consumers that a deployment has or has not, such as traces: they get every record.
    records: `records.path`; None without it.
    """

    def __init__(
        self,
        reader: RecordReader,
        measured: MeasuredParts,
        calibration: Calibration,
        other_models: OtherModels,
        distances: DistanceWaits,
        on_change: Callable[[], None],
        *,
        others: Sequence[RecordConsumer] = (),
        records: RecordsFile | None = None,
    ) -> None:
        profiles, measurements = calibration.profiles, measured.measurements
        self._reader = reader
        self._measurements = measurements
        self.calibration = calibration
        self.other_models = other_models
        self.distances = distances
        with_distances: list[RecordConsumer] = [
            ModelTests(measured.alarms, measured.by_engine),
            DistanceFigures(measurements, profiles),
            *([] if records is None else [records]),
            calibration,
            Change(on_change),
        ]
        self.consumers: list[RecordConsumer] = [
            ThinkingLengths(measurements.thinking),
            Figures(measurements, other_models),
            EngineTotals(measured.by_engine),
            *others,
            WithDistances(distances, profiles, Each(with_distances)),
        ]

    def update(self, record: TokenRecord, capture: Capture, probability: float = 1.0) -> None:
        """Makes a `ScoredRecord` of the record, and hands it to each consumer. probability: see `RecordReader.read`."""
        Each(self.consumers).update(self._reader.read(record, capture, probability))

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.INTERNAL_ERRORS, (FailedPart.CALIBRATION.value,), self.calibration.errors)
        recovered = self._measurements.recovered(self.calibration.profiles.serving.reported) or {}
        if recovered.get("estimate") is not None:
            yield Sample(names.RECOVERED_DIVERGENCE_RATIO, ("all",), recovered["estimate"])


class NoiseFloorUsers:
    """Hands the records of the noise floor, with one model on both sides, to the figures of the pair that it belongs
    to.
    """

    def __init__(self, models: ServedModelsSource, measured: MeasuredParts, other_models: OtherModels) -> None:
        self._models = models
        self._measured = measured
        self._other_models = other_models

    def update(self, model: str, record: TokenRecord) -> None:
        """model: the one of `measurement.figures.MODELS` that is on both sides."""
        served = self._models.served
        pair = served.of(record.model)
        if pair is not None and pair is not served.calibrated:
            self._other_models.update_noise_floor(pair.name, model, record)
            return
        figures = self._measured.measurements.update_noise_floor(model, record)
        self._measured.alarms.update_noise_floor(model, figures.kl_rc, record.client)
