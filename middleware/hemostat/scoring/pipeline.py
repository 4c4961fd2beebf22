"""From a capture to a scored record, and from there to everything that uses records.

    relays -> ScoringPipeline.receive -> queue -> Scorer -> use_record -> consumers
                                                                  |
                                                                  +-> distances (held-out records that need them)
                                                                         -> more consumers

A record is read once into a `ScoredRecord`, which says what it may be used for; each consumer (`consumers`) has the one
method `use`.

Fail open: whatever a consumer does wrong is counted or logged, and the other consumers, the capture before and the one
after it are served all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from hemostat.config.schema import Settings
from hemostat.engines.reports import PluginReports
from hemostat.ipc.messages import Capture
from hemostat.measurement.by_model import OtherModels
from hemostat.measurement.coverage import Coverage
from hemostat.measurement.dependence import NO_CYCLE, Cycle
from hemostat.metrics import names
from hemostat.metrics.reasons import FailedPart, Unscored
from hemostat.metrics.samples import Sample
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.protocol import Reference
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.consumers import Calibration, ConsumerParts, Each, record_consumers
from hemostat.scoring.distances import DistanceSource, DistanceWaits
from hemostat.scoring.endings import EndingCounts
from hemostat.scoring.engine_scores import EngineScorer
from hemostat.scoring.intake import CaptureIntake
from hemostat.scoring.limits import Breakers, CaptureSampling, ShadowQueue, TokenBudget
from hemostat.scoring.noise_floor import NoiseFloorMeter
from hemostat.scoring.record_reader import RecordReader
from hemostat.scoring.reference_call import ReferenceCall
from hemostat.scoring.routing import Router, ScoringNeeds
from hemostat.scoring.scorer import Scorer
from hemostat.scoring.stages import CandidateCompletion, EngineFeatures, ScoringStages
from hemostat_calibration.arrays import Ids
from hemostat_calibration.records import TokenRecord

BUDGET_BURST_SECONDS = 10.0
"""The reference's token budget may be saved up for this long."""
WORKERS = {"transformers": 2, "vllm": 4}
"""The number of captures that are scored at a time, by `reference.backend`. There are two even if the reference scores
one at a time: the codes of the next one are computed meanwhile.
"""


class ScoringPipeline:
    """Owns the shadow queue, the token budget, the scorer, the noise floor's meter, what is known of lost answers, and
    the counts of how captures end and of how much of what was sampled is scored.

    scores: False with `reference.backend: none`; then every capture is dropped.
    compressed_scorer: the upstream, asked to score its own tokens; None without `shadow.floor_fraction`.
    engine_scorer: see `CandidateCompletion`.
    distances: who computes exact distances; None: nobody, and no adapter is judged.
    template_of: see `ScoringStages`.
    decides: False while what records say is to change nothing.
    cycle: the cycle of the traffic, of which figures of other models have to see one.
    clock: monotonic seconds. draw: uniform numbers in [0, 1), for the noise floor's own sampling.
    on_change: called after every record, which may have changed what the relays' policy depends on.
    """

    def __init__(
        self,
        settings: Settings,
        monitor: ReferenceMonitor,
        engines: PluginReports,
        needs: ScoringNeeds,
        parts: ConsumerParts,
        *,
        scores: bool,
        compressed_scorer: Reference | None,
        engine_scorer: EngineScorer | None = None,
        breakers: Breakers,
        clock: Callable[[], float],
        draw: Callable[[], float],
        on_change: Callable[[], None],
        distances: DistanceSource | None = None,
        template_of: Callable[[Ids, bytes], bytes] = lambda prompt, conversation: b"",
        decides: Callable[[], bool] = lambda: True,
        cycle: Cycle = NO_CYCLE,
    ) -> None:
        self._monitor = monitor
        self._decides = decides
        self._template_of = template_of
        self.distances = DistanceWaits(distances)
        self._parts = parts
        self._clock = clock
        self.rate = settings.shadow.rate if scores else None
        """The fraction that is sampled at most; None without a reference."""
        self._workers = WORKERS.get(settings.reference.backend, 1)
        self.coverage = Coverage(settings.evidence.kinds, clock)
        self.endings = EndingCounts(self.coverage.update)
        self.received = 0
        """The number of captures that came from relays."""
        self._reader = RecordReader(monitor, parts.profiles)
        self.other_models = OtherModels(settings.shadow.max_tokens, cycle)
        self.queue = ShadowQueue(settings.shadow.max_queue)
        self.sampling = CaptureSampling(self._workers, self.queue.limit)
        self.answer_losses = AnswerLosses()
        self.scorer: Scorer | None = None
        self.noise_floor: NoiseFloorMeter | None = None
        self.calibration = Calibration(parts.profiles, parts.learner)
        if scores:
            self._make_scorer(settings, engines, needs, compressed_scorer, engine_scorer, breakers, draw)
        self.consumers = record_consumers(
            parts, self.calibration, self.other_models, self.distances, self.noise_floor, clock, on_change
        )
        """The parts that use records, in their order."""

    def _make_scorer(
        self,
        settings: Settings,
        engines: PluginReports,
        needs: ScoringNeeds,
        compressed_scorer: Reference | None,
        engine_scorer: EngineScorer | None,
        breakers: Breakers,
        draw: Callable[[], float],
    ) -> None:
        shadow, clock = settings.shadow, self._clock
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
        intake = CaptureIntake(
            self.queue, engines, self.endings, self.answer_losses, max_tokens=shadow.max_tokens, clock=clock
        )
        stages = ScoringStages(
            Router(self._monitor, needs, breakers, clock),
            CandidateCompletion(engine_scorer, budget, clock),
            budget,
            EngineFeatures(needs),
            ReferenceCall(needs, clock),
            self._template_of,
            clock,
            max_scored=shadow.max_scored_tokens,
        )
        self.scorer = Scorer(intake, stages, self.endings, emit=self.use_record, clock=clock, taken=self.sampling.taken)

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Returns the coroutines that have to run until they are cancelled; there are none without a reference."""
        coroutines = []
        if self.scorer is not None:
            coroutines.append(self.scorer.run(self._workers))
        if self.noise_floor is not None:
            coroutines.append(self.noise_floor.run())
        return coroutines

    @property
    def pending(self) -> int:
        """Captures that have no ending yet."""
        return self.scorer.pending if self.scorer is not None else 0

    @property
    def reference_tokens(self) -> int:
        """The number of prompt and output tokens that the reference has scored."""
        return self.scorer.stages.call.tokens if self.scorer is not None else 0

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
        yield Sample(names.INTERNAL_ERRORS, (FailedPart.CALIBRATION.value,), self.calibration.errors)
        recovered = self._parts.measurements.recovered(self._parts.profiles.serving.reported) or {}
        if recovered.get("estimate") is not None:
            yield Sample(names.RECOVERED_DIVERGENCE_RATIO, ("all",), recovered["estimate"])

    def sample(self, requests_per_second: float) -> None:
        """Adapts the part of the requests that relays sample to what can be scored. Call it regularly."""
        if self.rate is not None:
            expected = requests_per_second * self.rate
            self.sampling.update(expected, self.queue.fill, self._clock(), scoring=self._monitor.ready)

    def receive(self, capture: Capture) -> None:
        """Receives a capture from a relay."""
        self.received += 1
        self.sampling.received()
        if self.scorer is None or not self._monitor.ready:
            self.endings.unscored(Unscored.REFERENCE_NOT_READY, capture)
        else:
            self.scorer.offer(capture)

    def use_record(self, record: TokenRecord, capture: Capture) -> None:
        """Uses a scored record, which comes from the scorer."""
        if self._decides():
            Each(self.consumers).use(self._reader.read(record, capture))

    def use_self_record(self, model: str, record: TokenRecord) -> None:
        pair = self._monitor.served.of(record.model)
        if pair is not None and pair is not self._monitor.served.calibrated:
            self.other_models.update_noise_floor(pair.name, model, record)
            return
        figures = self._parts.measurements.update_noise_floor(model, record)
        self._parts.alarms.update_noise_floor(model, figures.kl_rc, record.client)
