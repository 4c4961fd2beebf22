"""From a capture to a scored record, and from there to everything that uses records.

    relays -> ScoringPipeline.receive -> queue -> Scorer -> use_record -> measurements, alarms, noise floor, tracing
                                                                  |
                                                                  +-> distances (held-out records that need them)
                                                                         -> measurements, records file, profiles,
                                                                            learner

A record of an adapter (`TokenRecord.adapter`) is of another model than the compressed one. It counts as what was
served, and in nothing that is about the compressed model itself: raw figures, alarm, noise floor, learning (but for the
map on top of that adapter).

A record that a grammar restricts (`TokenRecord.constraint`) is conditional: it is measured apart from all others, and
judged in its own kind.

Fail open: whatever a user of records does wrong is counted or logged, and the capture before and the one after it are
scored all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hemostat.config.schema import Settings
from hemostat.engines.registry import EngineRegistry
from hemostat.ipc.messages import Capture
from hemostat.ipc.reasons import Outcome, ScoringDropReason
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import ByEngine
from hemostat.measurement.by_model import OtherModels
from hemostat.measurement.coverage import Coverage
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ModelPair
from hemostat.reference.protocol import Reference
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.distances import DistanceSource, DistanceWaits
from hemostat.scoring.endings import EndingCounts
from hemostat.scoring.limits import Breakers, CaptureSampling, ShadowQueue, TokenBudget
from hemostat.scoring.noise_floor import NoiseFloorMeter
from hemostat.scoring.records_file import RecordsFile
from hemostat.scoring.scorer import Scorer, ScoringNeeds
from hemostat.scoring.seen_units import SeenUnits
from hemostat_calibration.arrays import Ids
from hemostat_calibration.divergence.per_token import TokenDivergence, divergence
from hemostat_calibration.divergence.record_gains import RecordGains
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.records import TokenRecord

if TYPE_CHECKING:
    from hemostat.tracing import Tracing  # an extra; imported only where it is used

log = logging.getLogger("hemostat.control")

BUDGET_BURST_SECONDS = 10.0
"""The reference's token budget may be saved up for this long."""
WORKERS = {"transformers": 2, "vllm": 4}
"""Captures that are scored at a time, by `reference.backend`. Two where the reference scores one at a time: the codes
of the next one are computed meanwhile."""
TRACED_FIGURES = ("kl_rc", "kl_cr", "js", "tv", "top1_agreement", "covered_compressed")
"""Attributes of the shadow span: means over the request's tokens."""


class RecordLearner(Protocol):
    """Of `hemostat.learner.client.Learner`."""

    def offer(self, record: TokenRecord, scope: str) -> None: ...


class TextLearner(Protocol):
    """Of `hemostat.adapters.live.client.AdapterLearner`."""

    def offer(self, unit: bytes, prompt: Ids, output: Ids) -> None: ...


@dataclass(frozen=True, slots=True)
class RecordConsumers:
    """Who is handed every scored record. records: None without `records.path`. tracing: None without an endpoint.
    texts: None where no adapter is learned.
    """

    measurements: Measurements
    alarms: Alarms
    engines: ByEngine
    profiles: ProfileManager
    learner: RecordLearner
    records: RecordsFile | None
    tracing: Tracing | None
    texts: TextLearner | None = None


class ScoringPipeline:
    """Owns the shadow queue, the token budget, the scorer, the noise floor's meter, what is known of lost answers, and
    the counts of how captures end and of how much of what was sampled is scored.

    scores: False with `reference.backend: none`; then every capture is dropped.
    compressed_scorer: the upstream, asked to score its own tokens; None without `shadow.floor_fraction`.
    distances: who computes exact distances; None: nobody, and no adapter is judged.
    decides: False while what records say is to change nothing.
    clock: monotonic seconds. draw: uniform numbers in [0, 1), for the noise floor's own sampling.
    on_change: called after every record, which may have changed what the relays' policy depends on.
    """

    def __init__(
        self,
        settings: Settings,
        monitor: ReferenceMonitor,
        engines: EngineRegistry,
        needs: ScoringNeeds,
        consumers: RecordConsumers,
        *,
        scores: bool,
        compressed_scorer: Reference | None,
        breakers: Breakers,
        clock: Callable[[], float],
        draw: Callable[[], float],
        on_change: Callable[[], None],
        distances: DistanceSource | None = None,
        decides: Callable[[], bool] = lambda: True,
    ) -> None:
        self._monitor = monitor
        self._decides = decides
        self.distances = DistanceWaits(distances)
        self._consumers = consumers
        self._clock = clock
        self._on_change = on_change
        self.rate = settings.shadow.rate if scores else None
        """Fraction that is sampled at most; None without a reference."""
        self._workers = WORKERS.get(settings.reference.backend, 1)
        self.coverage = Coverage(settings.evidence.kinds)
        self.endings = EndingCounts(self.coverage.ended)
        self.received = 0
        """Captures from relays."""
        self.calibration_errors = 0
        """Records that calibration could neither learn from nor judge by: a bug."""
        self._seen = SeenUnits()
        self.other_models = OtherModels(settings.shadow.max_tokens)
        self.queue = ShadowQueue(settings.shadow.max_queue)
        self.sampling = CaptureSampling(self._workers, self.queue.limit)
        self.answer_losses = AnswerLosses()
        self.scorer: Scorer | None = None
        self.noise_floor: NoiseFloorMeter | None = None
        if not scores:
            return
        shadow = settings.shadow
        rate = shadow.reference_tokens_per_second
        budget = TokenBudget(rate, max(rate * BUDGET_BURST_SECONDS, 1.0))
        if compressed_scorer is not None:
            self.noise_floor = NoiseFloorMeter(
                fraction=shadow.floor_fraction,
                draw=draw,
                budget=budget,
                compressed=compressed_scorer,
                emit=self.use_self_record,
                clock=clock,
            )
        self.scorer = Scorer(
            monitor,
            engines,
            needs,
            queue=self.queue,
            budget=budget,
            breakers=breakers,
            endings=self.endings,
            answer_losses=self.answer_losses,
            emit=self.use_record,
            taken=self.sampling.taken,
            clock=clock,
            profile_in_request=settings.calibration.apply == "request",
            max_scored=shadow.max_scored_tokens,
            max_tokens=settings.shadow.max_tokens,
        )

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """What has to run, until cancelled; nothing without a reference."""
        found = []
        if self.scorer is not None:
            found.append(self.scorer.run(self._workers))
        if self.noise_floor is not None:
            found.append(self.noise_floor.run())
        return found

    @property
    def pending(self) -> int:
        """Captures that have no ending yet."""
        return self.scorer.pending if self.scorer is not None else 0

    @property
    def reference_tokens(self) -> int:
        """Prompt and output tokens that the reference has scored."""
        return self.scorer.reference_tokens if self.scorer is not None else 0

    def samples(self) -> Iterator[Sample]:
        yield from self.endings.samples()
        yield from self.coverage.samples()
        yield from self.queue.samples(self._clock())
        yield from self.answer_losses.samples(self._clock())
        if self.rate is not None:
            yield Sample(names.SHADOW_RATE_RATIO, (), self.rate * self.sampling.fraction)
        if self.scorer is not None:
            yield from self.scorer.samples()
        else:
            yield Sample(names.REFERENCE_TOKENS, (), 0.0)
        if self.noise_floor is not None:
            yield from self.noise_floor.samples()
        yield Sample(names.CALIBRATION_ERRORS, (), self.calibration_errors)
        recovered = self._consumers.measurements.recovered(self._consumers.profiles.serving.reported) or {}
        if recovered.get("estimate") is not None:
            yield Sample(names.RECOVERED_DIVERGENCE_RATIO, (), recovered["estimate"])

    def sample(self, requests_per_second: float) -> None:
        """Adapt the part of the requests that relays sample to what can be scored. Call it regularly."""
        if self.rate is not None:
            expected = requests_per_second * self.rate
            self.sampling.update(expected, self.queue.fill, self._clock(), scoring=self._monitor.ready)

    def receive(self, capture: Capture) -> None:
        """A capture from a relay."""
        self.received += 1
        self.sampling.received()
        if self.scorer is None or not self._monitor.ready:
            self.endings.count(Outcome.DROPPED, ScoringDropReason.REFERENCE_NOT_READY, capture)
        else:
            self.scorer.offer(capture)

    def use_record(self, record: TokenRecord, capture: Capture) -> None:
        """A scored record, from the scorer. Its consumers know only the kinds that are followed, and `REST_KIND`."""
        if not self._decides():
            return
        consumers, profiles = self._consumers, self._consumers.profiles
        pair, calibrated = self._monitor.served.of(record.model), self._monitor.served.calibrated
        if pair is not None and pair is not calibrated:
            self._use_of_other_model(pair, record, capture)
            return
        if record.constraint:
            self._use_constrained(record, capture)
            return
        record = replace(record, kind=profiles.kinds.see(record.kind))
        fresh = self._seen.add(record)
        if calibrated is not None and calibrated.markers is not None:
            consumers.measurements.thinking.add(record.arm, record.thinking, capture.finish_reason, fresh=fresh)
        if record.partial:
            self._use_part(record, capture, fresh=fresh)
            return
        gains = RecordGains(record)
        figures = consumers.measurements.observe(
            record,
            profiles.calibrated_profile(record),
            profiles.catalogue.get(record.applied),
            held_out=profiles.is_held_out(record),
            gains=gains,
            fresh=fresh,
        )
        consumers.engines.count(record, figures)
        self._offer_for_noise_floor(pair, record, capture, fresh=fresh)
        if consumers.tracing is not None and capture.traceparent:
            self._trace(consumers.tracing, record, capture, figures)

        def judge(back: TokenRecord) -> None:
            if fresh:
                consumers.alarms.observe(back, figures)
                consumers.engines.observe(back, figures)
            self._judge(back, capture, figures, gains, fresh=fresh)

        versions = profiles.distance_versions(record)
        prompt = np.frombuffer(capture.prompt_token_ids, "<i4").astype(np.int32)
        if consumers.texts is not None and profiles.serving.uses(record) and not profiles.is_held_out(record):
            consumers.texts.offer(record.unit, prompt, record.output_ids)
        if versions:
            self.distances.use(record, prompt, versions, judge)
        else:
            judge(record)

    def _judge(
        self, record: TokenRecord, capture: Capture, figures: TokenDivergence, gains: RecordGains, *, fresh: bool
    ) -> None:
        """A record that is complete: its distances are there, or will not be."""
        consumers, profiles = self._consumers, self._consumers.profiles
        if record.distances:
            would_serve = profiles.catalogue.get(profiles.serving.would_serve(record))
            consumers.measurements.observe_distances(record, would_serve, fresh=fresh)
        if consumers.records is not None:
            consumers.records.write(capture, record, figures)
        try:
            own = figures.kl_rc if record.adapter is None else None
            profiles.observe(record, gains, fresh=fresh, divergences=own)
            if fresh and (scope := profiles.learning_scope(record)) is not None:
                consumers.learner.offer(record, scope)
        except Exception:
            # The record is already measured: a bug in calibration must not prevent the rest.
            self.calibration_errors += 1
            log.exception("calibration could not use the record of %s", capture.request_id)
        self._on_change()

    def _use_constrained(self, record: TokenRecord, capture: Capture) -> None:
        """A record that is conditional on what a grammar allows: it is measured apart, and judged in its own kind.

        The alarm, the noise floor and learning are about whole distributions. A part of an output counts in the
        counters of tokens, and in no conditional mean.
        """
        consumers, profiles = self._consumers, self._consumers.profiles
        record = replace(record, kind=profiles.kinds.see(record.kind))
        gains, fresh = RecordGains(record), not record.partial and self._seen.add(record)
        figures = consumers.measurements.conditional.observe(
            record,
            profiles.calibrated_profile(record),
            profiles.catalogue.get(record.applied),
            held_out=profiles.is_held_out(record),
            gains=gains,
            fresh=fresh,
        )
        if record.partial:
            self._write(record, capture, figures)
            return
        if consumers.tracing is not None and capture.traceparent:
            self._trace(consumers.tracing, record, capture, figures)
        self._judge(record, capture, figures, gains, fresh=fresh)

    def _use_of_other_model(self, pair: ModelPair, record: TokenRecord, capture: Capture) -> None:
        """A record of a model that profiles are not for: it is measured by itself, and nothing else.

        A part of an output is in no figure: the tables by place are of the calibrated model.
        """
        if record.partial:
            self._write(record, capture, divergence(record))
            return
        fresh = self._seen.add(record)
        figures = self.other_models.observe(pair.name, record, fresh=fresh)
        if not record.constraint:
            self._offer_for_noise_floor(pair, record, capture, fresh=fresh)
        self._write(record, capture, figures)

    def _use_part(self, record: TokenRecord, capture: Capture, *, fresh: bool) -> None:
        """The last tokens of an output: no sample of its tokens, so nothing is judged by or learned from them."""
        consumers = self._consumers
        served = consumers.profiles.catalogue.get(record.applied)
        self._write(record, capture, consumers.measurements.observe_part(record, served, fresh=fresh))

    def _write(self, record: TokenRecord, capture: Capture, figures: TokenDivergence) -> None:
        """A record that is only measured."""
        consumers = self._consumers
        if consumers.records is not None:
            consumers.records.write(capture, record, figures)
        if consumers.tracing is not None and capture.traceparent:
            self._trace(consumers.tracing, record, capture, figures)
        self._on_change()

    def _offer_for_noise_floor(
        self, pair: ModelPair | None, record: TokenRecord, capture: Capture, *, fresh: bool
    ) -> None:
        """The noise floor is of the model itself, without its adapters and without ours, and of whole outputs."""
        if self.noise_floor is None or record.adapter is not None or record.partial:
            return
        if fresh and pair is not None and record.model in pair.names and pair.scorer:
            self.noise_floor.offer(np.frombuffer(capture.prompt_token_ids, "<i4"), record, pair.scorer)

    def use_self_record(self, model: str, record: TokenRecord) -> None:
        pair = self._monitor.served.of(record.model)
        if pair is not None and pair is not self._monitor.served.calibrated:
            self.other_models.observe_noise_floor(pair.name, model, record)
            return
        figures = self._consumers.measurements.observe_noise_floor(model, record)
        self._consumers.alarms.observe_noise_floor(model, figures.kl_rc)

    def _trace(self, tracing: Tracing, record: TokenRecord, capture: Capture, figures: TokenDivergence) -> None:
        try:
            tracing.record_score(
                capture.traceparent,
                capture.model,
                seconds=self._clock() - capture.captured_at,
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
