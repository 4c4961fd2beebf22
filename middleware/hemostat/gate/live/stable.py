"""The other side of a gate's comparisons: the engine that has answered, and the reference, score the same tokens."""

from __future__ import annotations

from collections.abc import Callable

from hemostat.reference.protocol import FailureReason, ReferenceFailure, ReferenceScores, ScoreRequest
from hemostat.reference.server import VllmServer
from hemostat.scored_record import ScoredRecord
from hemostat.scoring.engine_scores import EngineScorer
from hemostat.scoring.limits import TokenBudget


class StableSide:
    """Scores records on the engine that has answered them, and on the reference, within its budget of tokens.

    reference_budget: the reference's tokens, which it shares with the scoring of records. clock: monotonic seconds.
    """

    def __init__(self, engines: EngineScorer, reference_budget: TokenBudget, clock: Callable[[], float]) -> None:
        self._engines = engines
        self._reference_budget = reference_budget
        self._clock = clock

    async def server(self, engine: str) -> VllmServer:
        """Returns an engine's server. Raises ReferenceFailure."""
        return await self._engines.server(engine)

    async def of_engine(self, scored: ScoredRecord, request: ScoreRequest) -> ReferenceScores:
        """Returns the scores of the engine that has answered. Raises ReferenceFailure."""
        capture = scored.capture
        return await self._engines.score(capture.engine, capture.model, request)

    async def of_reference(self, scored: ScoredRecord, request: ScoreRequest) -> ReferenceScores:
        """Returns the scores of the reference of the record's model. Raises ReferenceFailure."""
        pair = scored.pair
        if pair is None or pair.scorer is None:
            raise ReferenceFailure(FailureReason.DOWN, "the reference is not known any more")
        await self._reference_budget.take(request.tokens, self._clock)
        return await pair.scorer.score(request)

    async def close(self) -> None:
        """Closes the connections to the engines."""
        await self._engines.close()
