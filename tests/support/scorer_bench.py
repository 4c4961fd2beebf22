"""A scorer whose surroundings a test sets."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tests.support.captures import INFO, V, capture
from tests.support.served_models import pair, served_models
from tests.support.taps import sent
from tests.support.waiting import until

from hemostat.engines.messages import TapMessage, TapRun
from hemostat.engines.reports import PluginReports
from hemostat.ipc.messages import Capture
from hemostat.measurement.coverage import Coverage
from hemostat.reference.pair import ServedModels
from hemostat.reference.protocol import CompressedLogits, ReferenceInfo, ReferenceScores, ScoreRequest
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.endings import EndingCounts
from hemostat.scoring.intake import CaptureIntake
from hemostat.scoring.limits import Breakers, ShadowQueue, TokenBudget
from hemostat.scoring.reference_call import ReferenceCall
from hemostat.scoring.routing import Router
from hemostat.scoring.scorer import Scorer
from hemostat.scoring.stages import CandidateCompletion, EngineFeatures, ScoringStages
from hemostat_calibration.arrays import Ids
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest
from hemostat_calibration.reasoning import Markers
from hemostat_calibration.records import Candidates, Features, RecoveredDivergence, TokenRecord

D = 6
VERSION = "a" * 32


@dataclass
class FakeReference:
    """Says that every id is equally likely; does first what `before` says."""

    before: Callable[[], object] = lambda: None
    hang: bool = False
    asked: list[int] = field(default_factory=list)
    adapters_asked: list[str] = field(default_factory=list)
    codes: list[Mapping[str, Any]] = field(default_factory=list)
    compressed: list[CompressedLogits | None] = field(default_factory=list)
    recovered: RecoveredDivergence | None = None
    going_on: int = 0
    most: int = 0

    async def start(self) -> ReferenceInfo:
        return INFO

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        output, ids = request.output, request.ids
        self.asked.append(request.tokens)
        self.adapters_asked.append(request.adapter)
        self.codes.append(request.codes)
        self.compressed.append(request.compressed)
        self.going_on += 1
        self.most = max(self.most, self.going_on)
        try:
            self.before()
            await asyncio.sleep(3600 if self.hang else 0)
        finally:
            self.going_on -= 1
        tokens = len(output)
        flat = -np.log(V)
        top = Candidates(np.tile(np.arange(3, dtype=np.int32), (tokens, 1)), np.full((tokens, 3), flat))
        return ReferenceScores(
            at=np.where(ids >= 0, flat, np.nan),
            top=top,
            emitted=np.full(tokens, flat),
            entropy=np.full(tokens, -flat),
            expected_shift={p.version: np.full(tokens, 0.125) for p in request.profiles},
            hidden=np.ones((tokens, D), np.float32) if request.hidden else None,
            recovered=None if request.compressed is None else self.recovered,
        )

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        return []

    async def tokenize(self, text: str) -> list[int]:
        return []

    async def close(self) -> None:
        return


class Bench:
    """A scorer whose surroundings a test sets: it implements `ScoringNeeds` and `ServedModelsSource`."""

    def __init__(
        self,
        *,
        max_queue: int = 100,
        rate: float = 0.0,
        burst: float | None = None,
        max_scored: int | None = None,
    ) -> None:
        self.now = 0.0
        self.coverage = Coverage(kinds=4, clock=lambda: 0.0)
        self.endings = EndingCounts(self.coverage.update)
        self.markers: Markers | None = None
        self.records: list[TokenRecord] = []
        self.reference = FakeReference()
        self.engines = PluginReports()
        self.breakers = Breakers()
        self.breaker = self.breakers.of("m")
        self.breaker.threshold, self.breaker.cooldown = 2, 10.0
        self.info: ReferenceInfo | None = INFO
        self.sinks_fail = False
        self.profiles: tuple[CalibrationProfile, ...] = ()
        self.learning = b""
        self.known_adapters: frozenset[str] = frozenset()
        self.answer_losses = AnswerLosses()
        self.template_of: Callable[[Ids, bytes], bytes] = lambda prompt, conversation: b""
        self.queue = ShadowQueue(max_queue)

        def clock() -> float:
            return self.now

        budget = TokenBudget(rate, max(rate, 1.0) if burst is None else burst)
        stages = ScoringStages(
            Router(self, self, self.breakers, clock),
            CandidateCompletion(None, budget, clock),
            budget,
            EngineFeatures(self),
            ReferenceCall(self, clock),
            self._template_of,
            clock,
            max_scored=max_scored,
        )
        intake = CaptureIntake(self.queue, self.engines, self.endings, self.answer_losses, max_tokens=40, clock=clock)
        self.scorer = Scorer(intake, stages, self.endings, emit=self._sink, clock=clock)

    def _template_of(self, prompt: Ids, conversation: bytes) -> bytes:
        return self.template_of(prompt, conversation)

    @property
    def served(self) -> ServedModels:
        return served_models(replace(pair("m", self.reference, self.info, {"sql"}, {"sql"}), markers=self.markers))

    def evaluated_profiles(self) -> tuple[CalibrationProfile, ...]:
        return self.profiles

    def adapters(self) -> frozenset[str]:
        return self.known_adapters

    def anchor_sets(self) -> dict[str, Ids]:
        return {anchors_digest(i): i for p in self.profiles if (i := anchors(p)) is not None}

    def needs_hidden_states(self, unit: bytes) -> bool:
        return unit == self.learning

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        return Counter({s.labels: int(s.value) for s in self.endings.samples()})  # type: ignore[misc]

    def _sink(self, record: TokenRecord, _: Capture) -> None:
        if self.sinks_fail:
            raise RuntimeError("a bug")
        self.records.append(record)

    def handed(self, nonce: str, features: Features) -> None:
        """As though the engine had handed out these features, and all else of the 3 positions."""
        self.tap(nonce, 0, 3, None)
        take = self.engines.taps.take
        self.engines.taps.take = lambda *n: replace(take(*n), features=features)  # type: ignore[method-assign, type-var]

    def tap(self, nonce: str, start: int, tokens: int, applied: str | None, value: float | None = 0.25) -> None:
        run = TapRun(nonce, start, tokens, {VERSION: sent([value] * tokens)}, applied)
        self.engines.taps.update(TapMessage("boot", [run]), self.now)

    async def ends(self, *captures: Capture) -> Counter[tuple[str, str]]:
        """What these captures came to; every one comes to something."""
        before = self.counts
        for item in captures:
            self.scorer.offer(item)
        await until(lambda: self.counts.total() - before.total() >= len(captures) and self.scorer.pending == 0)
        return self.counts - before


class running:
    def __init__(self, bench: Bench, workers: int = 2) -> None:
        self.bench, self.workers = bench, workers

    async def __aenter__(self) -> Bench:
        self.task = asyncio.create_task(self.bench.scorer.run(self.workers))
        return self.bench

    async def __aexit__(self, *_: object) -> None:
        assert not self.task.done(), "the loops are alive to the end"
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


SCORED = Counter({("scored", ""): 1})


async def alive(bench: Bench) -> None:
    bench.reference.before, bench.reference.hang, bench.sinks_fail, bench.info = lambda: None, False, False, INFO
    assert await bench.ends(capture()) == SCORED
