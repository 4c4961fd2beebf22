"""From a capture to a scored record, and from there to everything that uses records.

    relays -> ScoringPipeline.offer -> queue -> Scorer -> update -> RecordUsers -> consumers
                                                                        |
                                                                        +-> distances (held-out records that need
                                                                            them) -> more consumers

A record is read once into a `ScoredRecord`, which says what it may be used for; each consumer (`consumers`) has the one
method `update`.

Fail open: whatever a consumer does wrong is counted or logged, and the other consumers, the capture before and the one
after it are served all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from hemostat.config.schema import Settings, Shadow
from hemostat.engines.reports import PluginReports
from hemostat.ipc.messages import Capture
from hemostat.measurement.coverage import Coverage
from hemostat.metrics import names
from hemostat.metrics.reasons import Unscored
from hemostat.metrics.samples import Sample
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.endings import EndingCounts
from hemostat.scoring.intake import CaptureIntake
from hemostat.scoring.limits import CaptureSampling, ShadowQueue, TokenBudget
from hemostat.scoring.record_users import RecordUsers
from hemostat.scoring.scorer import CaptureSpool, Scorer
from hemostat.scoring.stages import ScoringStages
from hemostat_calibration.records import TokenRecord

BUDGET_BURST_SECONDS = 10.0
"""The reference's token budget may be saved up for this long."""
WORKERS = {"transformers": 2, "vllm": 4}
"""The number of captures that are scored at a time, by `reference.backend`. There are two even if the reference scores
one at a time: the codes of the next one are computed meanwhile.
"""


def reference_budget(shadow: Shadow) -> TokenBudget:
    """Returns the reference's token budget."""
    rate = shadow.reference_tokens_per_second
    return TokenBudget(rate, max(rate * BUDGET_BURST_SECONDS, 1.0))


class ScoringPipeline:
    """Owns the shadow queue, the scorer, what is known of lost answers, and the counts of how captures end and of how
    much of what was sampled is scored.

    stages: None with `reference.backend: none`; then every capture is dropped that no spool takes. spool:
        `spool.path`; None without it. With another `spool.score` than now, captures only go there.
    users: gets every record that was scored. decides: False while what records say is to change nothing.
    is_awaited: of a capture that a test waits for, and which is scored before others.
    clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: Settings,
        monitor: ReferenceMonitor,
        engines: PluginReports,
        stages: ScoringStages | None,
        users: RecordUsers,
        clock: Callable[[], float],
        *,
        spool: CaptureSpool | None = None,
        decides: Callable[[], bool] = lambda: True,
        is_awaited: Callable[[Capture], bool] = lambda _: False,
    ) -> None:
        shadow = settings.shadow
        self._monitor = monitor
        self._decides = decides
        self._clock = clock
        self.users = users
        self._spools = spool is not None
        self.rate = None if stages is None and spool is None else shadow.rate
        """The fraction that is sampled at most; None if nothing takes captures."""
        self._workers = WORKERS.get(settings.reference.backend, 1)
        self.coverage = Coverage(settings.evidence.kinds, clock)
        self.endings = EndingCounts(self.coverage.update)
        self.received = 0
        """The number of captures that came from relays."""
        self.queue = ShadowQueue(shadow.max_queue)
        self.sampling = CaptureSampling(self._workers, self.queue.limit)
        self.answer_losses = AnswerLosses()
        self._stages = stages
        self.scorer: Scorer | None = None
        if stages is not None or spool is not None:
            losses, most = self.answer_losses, shadow.max_tokens
            intake = CaptureIntake(
                self.queue, engines, self.endings, losses, max_tokens=most, clock=clock, may_pass=is_awaited
            )
            emit, taken = self.update, self.sampling.taken
            at_once = stages if settings.spool.score == "now" else None
            self.scorer = Scorer(intake, at_once, self.endings, spool=spool, emit=emit, clock=clock, taken=taken)

    def loops(self) -> list[Coroutine[Any, Any, None]]:
        """Returns the coroutines that have to run until they are cancelled; there are none without a reference."""
        coroutines = []
        if self.scorer is not None:
            coroutines.append(self.scorer.run(self._workers))
        return coroutines

    @property
    def pending(self) -> int:
        """Captures that have no ending yet."""
        return self.scorer.pending if self.scorer is not None else 0

    @property
    def reference_tokens(self) -> int:
        """The number of prompt and output tokens that the reference has scored."""
        return 0 if self._stages is None else self._stages.call.tokens

    def samples(self) -> Iterator[Sample]:
        yield from self.endings.samples()
        yield from self.coverage.samples()
        yield from self.queue.samples(self._clock())
        yield from self.answer_losses.samples(self._clock())
        if self.rate is not None:
            yield Sample(names.SHADOW_RATE_RATIO, (), self.rate * self.sampling.fraction)
        if self._stages is not None:
            yield from self._stages.samples()
        else:
            yield Sample(names.REFERENCE_TOKENS, (), 0.0)
        yield from self.users.samples()

    def sample(self, requests_per_second: float) -> None:
        """Adapts the part of the requests that relays sample to what can be scored. Call it regularly."""
        if self.rate is not None:
            expected = requests_per_second * self.rate
            self.sampling.update(expected, self.queue.fill, self._clock(), scoring=self._monitor.ready or self._spools)

    def offer(self, capture: Capture) -> None:
        """Receives a capture from a relay."""
        self.received += 1
        self.sampling.received()
        if self.scorer is None or not (self._monitor.ready or self._spools):
            self.endings.unscored(Unscored.REFERENCE_NOT_READY, capture)
        else:
            self.scorer.offer(capture)

    def update(self, record: TokenRecord, capture: Capture, probability: float = 1.0) -> None:
        """Uses a scored record, which comes from the scorer, or later from the spool. probability: with which the spool
        has admitted its capture."""
        if self._decides():
            self.users.update(record, capture, probability)
