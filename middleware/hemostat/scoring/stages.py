"""The stages of a capture on its way to a `TokenRecord`. `ScoringStages.score` has them in their order:

| stage | takes | gives |
|---|---|---|
| `Router` | a capture and its tap | the `Route`: the reference that scores it |
| `CandidateCompletion` | the capture | the capture with candidates at each position, as arrays |
| `read` | the capture and its route | the candidates of the tokens to score, and the sets of ids that were allowed |
| `TokenBudget` | the number of tokens | nothing; it waits |
| `EngineFeatures` | the route | the features that profiles read |
| `ReferenceCall.request` | all of these | the `ScoreRequest` |
| `ReferenceCall.ask` | the request and its route | the `ReferenceScores` |
| `build_record` | all of these | the `TokenRecord` |

Each stage passes on, or ends the capture: it raises `NotScored` with the reason. What is wrong with the engine's
features costs the features only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import ID_BYTES, Capture
from hemostat.metrics import names
from hemostat.metrics.reasons import Unscored
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import ReferenceFailure, ReferenceInfo, ReferenceScores
from hemostat.scoring.capture_arrays import UnreadableLogprobsError, candidates, decode_capture, output_ids, prompt_ids
from hemostat.scoring.conditioning import ConditioningFailure, condition
from hemostat.scoring.endings import NotScored
from hemostat.scoring.engine_scores import EngineScorer
from hemostat.scoring.limits import TokenBudget
from hemostat.scoring.record_builder import (
    FeatureError,
    FeatureReason,
    align_features,
    build_record,
    check_vocabulary,
)
from hemostat.scoring.reference_call import ReferenceCall
from hemostat.scoring.routing import Route, Router, ScoringNeeds
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.records import Candidates, Features, TokenRecord


class CandidateCompletion:
    """Gives a capture its candidates as arrays, whichever way they came. For a capture that names only the ids of its
    tokens, the engine computes them. It takes the capture that was routed, and gives the one that is read.

    engine_scorer: None if relays capture none of these. clock: monotonic seconds.
    """

    def __init__(self, engine_scorer: EngineScorer | None, budget: TokenBudget, clock: Callable[[], float]) -> None:
        self._engine_scorer = engine_scorer
        self._budget = budget
        self._clock = clock

    async def complete(self, capture: Capture) -> Capture:
        """Returns the capture with candidates. Raises NotScored if they cannot be read, or the engine does not say
        them.
        """
        if capture.ids_only:
            capture = await self._scored_again(capture)
        try:
            return decode_capture(capture)
        except UnreadableLogprobsError as error:
            raise NotScored(Unscored.NO_LOGPROBS, str(error)) from error
        except InvalidRecordError as error:
            raise _invalid(capture, error) from error

    async def _scored_again(self, capture: Capture) -> Capture:
        if self._engine_scorer is None:
            raise NotScored(Unscored.NO_LOGPROBS)
        tokens = (len(capture.prompt_token_ids) + len(capture.output_token_ids)) // ID_BYTES
        await self._budget.take(tokens, self._clock)
        try:
            return await self._engine_scorer.with_candidates(capture)
        except ReferenceFailure as failure:
            message = f"log-probabilities of {capture.request_id}: {failure}"
            raise NotScored(Unscored.ENGINE_FAILED, message, detail=failure.reason) from failure


async def read(capture: Capture, route: Route, max_scored: int | None = None) -> tuple[Candidates, AllowedSets | None]:
    """Returns the candidates [T, K] of the output's last T tokens, and the sets of ids that the grammar allowed; None
    if nothing restricts its tokens. Raises NotScored if an id is in no vocabulary, or the sets are not known.

    max_scored: the largest T; None: the whole output.
    """
    try:
        given = candidates(capture)
        first = 0 if max_scored is None else max(0, len(given.ids) - max_scored)
        given = Candidates(given.ids[first:], given.logprobs[first:])
        check_vocabulary(capture, given, route.info.vocab_size)
        arguments = (capture, given, route.info, route.tap)
        return await asyncio.to_thread(condition, *arguments) if capture.grammar else condition(*arguments)
    except ConditioningFailure as failure:
        message = f"what was allowed in {capture.request_id}: {failure.reason}: {failure}"
        raise NotScored(failure.reason, message, level=logging.INFO) from failure
    except InvalidRecordError as error:
        raise _invalid(capture, error) from error


def _invalid(capture: Capture, error: InvalidRecordError) -> NotScored:
    message = f"record of {capture.request_id} refused: {error}"
    return NotScored(Unscored.INVALID_RECORD, message, detail=error.reason)


@dataclass(frozen=True, slots=True)
class Answered:
    """A capture that was scored. capture: with its candidates as arrays. info: of the reference that scored it."""

    capture: Capture
    info: ReferenceInfo
    scores: ReferenceScores
    record: TokenRecord


class EngineFeatures:
    """Owns the count of features that could not be used. It takes the route of a capture, and gives the features that
    profiles read.
    """

    def __init__(self, needs: ScoringNeeds) -> None:
        self._needs = needs
        self.dropped: Counter[FeatureReason] = Counter()
        """The number of requests whose features were needed and could not be used, by reason."""

    def usable(self, route: Route, position: int, tokens: int) -> Features | None:
        """Returns the features at `tokens` positions of the output, from `position` on; None if there are none of
        use."""
        anchor_sets = self._needs.anchor_sets() if route.calibrated else {}
        if not anchor_sets:
            return None
        try:
            if route.tap is None:
                raise FeatureError(FeatureReason.NO_TAP)
            return align_features(route.tap.features, position, tokens, anchor_sets)
        except FeatureError as error:
            self.dropped[error.reason] += 1
            return None


class ScoringStages:
    """The stages in their order. `Scorer` gives it a capture with its tap, and hands on the record that it gets.

    max_scored: see `read`. template_of: (prompt, conversation) -> `TokenRecord.template`. clock: monotonic seconds.
    """

    def __init__(
        self,
        router: Router,
        completion: CandidateCompletion,
        budget: TokenBudget,
        features: EngineFeatures,
        call: ReferenceCall,
        template_of: Callable[[Ids, bytes], bytes],
        clock: Callable[[], float],
        *,
        max_scored: int | None = None,
    ) -> None:
        self._router = router
        self._completion = completion
        self._budget = budget
        self.features = features
        self.call = call
        self._template_of = template_of
        self._clock = clock
        self.max_scored = max_scored

    async def score(self, capture: Capture, tap: TapResult | None) -> tuple[TokenRecord, Capture]:
        """Returns the record, and the capture that it was made of. Raises NotScored."""
        answered = await self.ask(capture, tap)
        return answered.record, answered.capture

    async def ask(self, capture: Capture, tap: TapResult | None) -> Answered:
        """Returns the record with what it was made of. Raises NotScored."""
        route = self._router.route(capture, tap)
        capture = await self._completion.complete(capture)
        compressed, allowed = await read(capture, route, self.max_scored)
        prompt, output, tokens = prompt_ids(capture), output_ids(capture), len(compressed.ids)
        await self._budget.take(len(prompt) + len(output), self._clock)
        features = self.features.usable(route, len(output) - tokens, tokens)
        template = self._template_of(prompt, capture.conversation) if route.calibrated else b""
        request = await self.call.request(capture, route, compressed, allowed, features, template)
        scores = await self.call.ask(route, request, capture.request_id)
        try:
            record = build_record(
                capture,
                compressed,
                request,
                scores,
                route.info,
                route.tap,
                features,
                markers=route.pair.markers,
                template=template,
            )
        except InvalidRecordError as error:
            raise _invalid(capture, error) from error
        return Answered(capture, route.info, scores, record)

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.REFERENCE_TOKENS, (), self.call.tokens)
        for reason in FeatureReason:
            yield Sample(names.FEATURES_DROPPED, (reason,), self.features.dropped[reason])
