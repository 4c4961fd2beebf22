"""The consumers of scored records. Each looks at `ScoredRecord.uses` to find out if a record is for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import ByEngine
from hemostat.measurement.by_model import OtherModels
from hemostat.measurement.measurements import Measurements
from hemostat.measurement.thinking import ThinkingFigures
from hemostat.profiles.manager import ProfileManager
from hemostat.scored_record import RecordConsumer, ScoredRecord, Use
from hemostat.scoring.capture_arrays import prompt_ids
from hemostat.scoring.distances import DistanceWaits
from hemostat.scoring.noise_floor import NoiseFloorMeter
from hemostat_calibration.arrays import Ids
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.records import TokenRecord

if TYPE_CHECKING:
    from hemostat.tracing import Tracing  # an extra; imported only where it is used

log = logging.getLogger("hemostat.control")

TRACED_FIGURES = ("kl_rc", "kl_cr", "js", "tv", "top1_agreement", "covered_compressed")
"""The attributes of the shadow span: means over the request's tokens."""


class RecordLearner(Protocol):
    """The part of `hemostat.learner.client.Learner` that a consumer uses."""

    def update(self, record: TokenRecord) -> None: ...


class TextLearner(Protocol):
    """The part of `hemostat.adapters.live.client.AdapterLearner` that a consumer uses."""

    def update(self, unit: bytes, prompt: Ids, output: Ids) -> None: ...


class Each:
    """Hands a record to each of several consumers. One that fails costs the others nothing: RuntimeError at the end."""

    def __init__(self, consumers: Sequence[RecordConsumer]) -> None:
        self._consumers = consumers

    def update(self, scored: ScoredRecord) -> None:
        failed = []
        for consumer in self._consumers:
            try:
                consumer.update(scored)
            except Exception:
                failed.append(type(consumer).__name__)
                log.exception("%s could not use the record of %s", failed[-1], scored.capture.request_id)
        if failed:
            raise RuntimeError(f"consumers that failed: {', '.join(failed)}")


@dataclass(frozen=True, slots=True)
class Figures:
    """Every figure but those from exact distances."""

    measurements: Measurements
    other_models: OtherModels

    def update(self, scored: ScoredRecord) -> None:
        figures, fresh = scored.figures, scored.fresh
        if Use.OTHER_FIGURES in scored.uses and scored.pair is not None:
            self.other_models.update(scored.pair.name, scored.record, figures, fresh=fresh)
        elif Use.PART_FIGURES in scored.uses:
            self.measurements.update_part(scored.record, figures, fresh=fresh)
        elif scored.uses & (Use.FIGURES | Use.CONDITIONAL_FIGURES):
            update = self.measurements.update if Use.FIGURES in scored.uses else self.measurements.conditional.update
            shown = (scored.record, scored.profile, scored.applied)
            update(
                *shown,
                held_out=scored.held_out,
                gain_of=scored.gain,
                figures=figures,
                fresh=fresh,
                weight=scored.weight,
            )


@dataclass(frozen=True, slots=True)
class ThinkingLengths:
    """Counts the lengths of the thinking of a model whose markers are known."""

    figures: ThinkingFigures

    def update(self, scored: ScoredRecord) -> None:
        known = scored.pair is not None and scored.pair.markers is not None
        if known and scored.uses & (Use.FIGURES | Use.PART_FIGURES):
            record, reason = scored.record, scored.capture.finish_reason
            self.figures.update(record.arm, record.thinking, reason, record.client, fresh=scored.fresh)


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """Counts tokens and divergence by engine."""

    by_engine: ByEngine

    def update(self, scored: ScoredRecord) -> None:
        if Use.FIGURES in scored.uses:
            self.by_engine.update_totals(scored.record, scored.figures)


@dataclass(frozen=True, slots=True)
class NoiseFloorOffers:
    """Offers records that both models may score again."""

    meter: NoiseFloorMeter

    def update(self, scored: ScoredRecord) -> None:
        pair, record = scored.pair, scored.record
        if Use.NOISE_FLOOR not in scored.uses or not scored.fresh or pair is None:
            return
        if record.model in pair.names and pair.scorer:
            self.meter.offer(prompt_ids(scored.capture), record, pair.scorer)


@dataclass(frozen=True, slots=True)
class Traces:
    """A span for each record whose client sent a trace context. clock: monotonic seconds."""

    tracing: Tracing
    clock: Callable[[], float]

    def update(self, scored: ScoredRecord) -> None:
        record, capture, figures = scored.record, scored.capture, scored.figures
        if not capture.traceparent:
            return
        try:
            self.tracing.record_score(
                capture.traceparent,
                capture.model,
                seconds=self.clock() - capture.captured_at,
                results={name: float(np.mean(getattr(figures, name))) for name in TRACED_FIGURES},
                attributes={
                    "request.id": capture.request_id,
                    "arm": str(record.arm),
                    "tokens": record.tokens,
                    "reference.model": record.reference_model,
                    "profile": record.applied or IDENTITY,
                    "adapter": record.adapter or IDENTITY,
                    "bound": figures.bound,
                },
            )
        except Exception:
            log.exception("score of %s could not be traced", capture.request_id)


@dataclass(frozen=True, slots=True)
class Texts:
    """Offers the texts that adapters are learned from."""

    learner: TextLearner
    profiles: ProfileManager

    def update(self, scored: ScoredRecord) -> None:
        if Use.FIGURES in scored.uses and self.profiles.serving.uses(scored.record) and not scored.held_out:
            # By conversation: variants of a template are texts of their own.
            record = scored.record
            self.learner.update(record.conversation or record.prompt_key, prompt_ids(scored.capture), record.output_ids)


@dataclass(frozen=True, slots=True)
class WithDistances:
    """Hands a record on, at once or when the exact distances are there that judging it takes."""

    waits: DistanceWaits
    profiles: ProfileManager
    consumer: RecordConsumer

    def update(self, scored: ScoredRecord) -> None:
        versions = self.profiles.distance_versions(scored.record) if Use.FIGURES in scored.uses else ()
        if versions:
            then = self.consumer.update
            self.waits.request(
                scored.record, prompt_ids(scored.capture), versions, lambda back: then(replace(scored, record=back))
            )
        else:
            self.consumer.update(scored)


@dataclass(frozen=True, slots=True)
class ModelTests:
    """The tests of the compressed model: the alarm, and which engine is an outlier."""

    alarms: Alarms
    by_engine: ByEngine

    def update(self, scored: ScoredRecord) -> None:
        if Use.FIGURES in scored.uses and scored.fresh:
            self.alarms.update(scored.record, scored.figures)
            self.by_engine.update(scored.record, scored.figures)


@dataclass(frozen=True, slots=True)
class DistanceFigures:
    """Observes what an adapter that serves, or would, changes: exact distances on held-out records."""

    measurements: Measurements
    profiles: ProfileManager

    def update(self, scored: ScoredRecord) -> None:
        if scored.record.distances:
            would_serve = self.profiles.catalogue.get(self.profiles.serving.would_serve(scored.record))
            self.measurements.update_distances(scored.record, would_serve, fresh=scored.fresh)


@dataclass(slots=True)
class Calibration:
    """Judges profiles, and learns them. errors: records that it could not use: a bug."""

    profiles: ProfileManager
    learner: RecordLearner
    errors: int = 0

    def update(self, scored: ScoredRecord) -> None:
        if Use.PROFILES not in scored.uses:
            return
        try:
            self.profiles.update(scored)
            if scored.fresh and self.profiles.learns_from(scored.record):
                self.learner.update(scored.record)
        except Exception:
            self.errors += 1
            log.exception("calibration could not use the record of %s", scored.capture.request_id)


@dataclass(frozen=True, slots=True)
class Change:
    """Tells that the relays' policy may have changed."""

    notify: Callable[[], None]

    def update(self, scored: ScoredRecord) -> None:
        self.notify()
