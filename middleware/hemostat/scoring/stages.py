"""The stages of a capture on its way to a `TokenRecord`. `ScoringStages.score` has them in their order:

| stage | takes | gives |
|---|---|---|
| `Router` | a capture and its tap | the `Route`: the reference that scores it |
| `CandidateCompletion` | the capture | the capture with candidates at each position |
| `read` | the capture and its route | `CaptureArrays`, and the sets of ids that were allowed |
| `TokenBudget` | their number of tokens | nothing; it waits |
| `ProfileInputs` | the arrays and the route | `EvaluatedProfiles`: what the reference is to compute for profiles |
| `ReferenceCall` | all of these | `ReferenceScores`, and the cluster of alike prompts |
| `build_record` | all of these | the `TokenRecord` |

Each stage passes on, or ends the capture: it raises `NotScored` with the reason. What is wrong with the engine's
features costs the features only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics import names
from hemostat.metrics.reasons import Unscored
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import ReferenceFailure
from hemostat.scoring.conditioning import ConditioningFailure, condition
from hemostat.scoring.endings import NotScored
from hemostat.scoring.engine_scores import EngineScorer
from hemostat.scoring.intake import ID_BYTES
from hemostat.scoring.limits import TokenBudget
from hemostat.scoring.record_builder import (
    CaptureArrays,
    FeatureError,
    FeatureReason,
    UnreadableLogprobsError,
    align_features,
    build_record,
    check_vocabulary,
    decode_capture,
    profile_codes,
)
from hemostat.scoring.reference_call import EvaluatedProfiles, ReferenceCall
from hemostat.scoring.routing import Route, Router, ScoringNeeds
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.records import Features, TokenRecord


class CandidateCompletion:
    """Has the engine compute the candidates of a capture that names only the ids of its tokens. It takes the capture
    that was routed, and gives the one that is read.

    engine_scorer: None if relays capture none of these. clock: monotonic seconds.
    """

    def __init__(self, engine_scorer: EngineScorer | None, budget: TokenBudget, clock: Callable[[], float]) -> None:
        self._engine_scorer = engine_scorer
        self._budget = budget
        self._clock = clock

    async def complete(self, capture: Capture) -> Capture:
        """Returns the capture with candidates. Raises NotScored if the engine does not say them."""
        if not capture.ids_only:
            return capture
        if self._engine_scorer is None:
            raise NotScored(Unscored.NO_LOGPROBS)
        tokens = (len(capture.prompt_token_ids) + len(capture.output_token_ids)) // ID_BYTES
        await self._budget.take(tokens, self._clock)
        try:
            return await self._engine_scorer.with_candidates(capture)
        except ReferenceFailure as failure:
            message = f"log-probabilities of {capture.request_id}: {failure}"
            raise NotScored(Unscored.ENGINE_FAILED, message, detail=failure.reason) from failure


async def read(
    capture: Capture, route: Route, max_scored: int | None = None
) -> tuple[CaptureArrays, AllowedSets | None]:
    """Returns the arrays of a complete capture, and the sets of ids that its grammar allowed; None if nothing restricts
    its tokens. Raises NotScored if the capture cannot be read, or the sets are not known.

    max_scored: see `decode_capture`.
    """
    try:
        arrays = decode_capture(capture, max_scored)
        check_vocabulary(arrays, route.info.vocab_size)
        given = (capture, arrays, route.info, route.tap)
        return await asyncio.to_thread(condition, *given) if capture.grammar else condition(*given)
    except UnreadableLogprobsError as error:
        raise NotScored(Unscored.NO_LOGPROBS, str(error)) from error
    except ConditioningFailure as failure:
        message = f"what was allowed in {capture.request_id}: {failure.reason}: {failure}"
        raise NotScored(failure.reason, message, level=logging.INFO) from failure
    except InvalidRecordError as error:
        raise _invalid(capture, error) from error


def _invalid(capture: Capture, error: InvalidRecordError) -> NotScored:
    message = f"record of {capture.request_id} refused: {error}"
    return NotScored(Unscored.INVALID_RECORD, message, detail=error.reason)


class ProfileInputs:
    """Owns the count of features that could not be used. It takes the arrays that were read, and gives what the
    reference needs to evaluate profiles.
    """

    def __init__(self, needs: ScoringNeeds) -> None:
        self._needs = needs
        self.features_dropped: Counter[FeatureReason] = Counter()
        """The number of requests whose features were needed and could not be used, by reason."""

    async def collect(self, route: Route, arrays: CaptureArrays) -> EvaluatedProfiles:
        if not route.calibrated:
            return EvaluatedProfiles((), None, {})
        profiles = self._needs.evaluated_profiles()
        features = self._features(route.tap, arrays)
        if features is None:
            return EvaluatedProfiles(profiles, None, {})
        return EvaluatedProfiles(profiles, features, await asyncio.to_thread(profile_codes, profiles, features))

    def _features(self, tap: TapResult | None, arrays: CaptureArrays) -> Features | None:
        anchor_sets = self._needs.anchor_sets()
        if not anchor_sets:
            return None
        try:
            if tap is None:
                raise FeatureError(FeatureReason.NO_TAP)
            return align_features(tap.features, arrays.position, len(arrays.output), anchor_sets)
        except FeatureError as error:
            self.features_dropped[error.reason] += 1
            return None


class ScoringStages:
    """The stages in their order. `Scorer` gives it a capture with its tap, and hands on the record that it gets.

    max_scored: see `decode_capture`. clock: monotonic seconds.
    """

    def __init__(
        self,
        router: Router,
        completion: CandidateCompletion,
        budget: TokenBudget,
        inputs: ProfileInputs,
        call: ReferenceCall,
        clock: Callable[[], float],
        *,
        max_scored: int | None = None,
    ) -> None:
        self._router = router
        self._completion = completion
        self._budget = budget
        self.inputs = inputs
        self.call = call
        self._clock = clock
        self._max_scored = max_scored

    async def score(self, capture: Capture, tap: TapResult | None) -> tuple[TokenRecord, Capture]:
        """Returns the record, and the capture that it was made of. Raises NotScored."""
        route = self._router.route(capture, tap)
        capture = await self._completion.complete(capture)
        arrays, allowed = await read(capture, route, self._max_scored)
        await self._budget.take(len(arrays.context) + len(arrays.output), self._clock)
        evaluated = await self.inputs.collect(route, arrays)
        scores, template = await self.call.ask(capture, route, arrays, allowed, evaluated)
        try:
            record = build_record(
                capture,
                arrays,
                scores,
                route.info,
                route.tap,
                [profile.version for profile in evaluated.profiles],
                evaluated.features,
                evaluated.codes,
                allowed=allowed,
                markers=route.pair.markers,
                template=template,
            )
        except InvalidRecordError as error:
            raise _invalid(capture, error) from error
        return record, capture

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.REFERENCE_TOKENS, (), self.call.tokens)
        for reason in FeatureReason:
            yield Sample(names.FEATURES_DROPPED, (reason,), self.inputs.features_dropped[reason])
