"""Asks the reference about a capture: a stage of `hemostat.scoring.stages`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import numpy as np

from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Unscored
from hemostat.reference.protocol import (
    CompressedLogits,
    FailureReason,
    Reference,
    ReferenceFailure,
    ReferenceInfo,
    ReferenceScores,
    ScoreRequest,
)
from hemostat.scoring.capture_arrays import output_ids, prompt_ids
from hemostat.scoring.endings import NotScored
from hemostat.scoring.record_builder import profile_codes
from hemostat.scoring.routing import Route, ScoringNeeds
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.records import Candidates, Features
from hemostat_calibration.statistics.split import prompt_key

MAX_SCORE_SECONDS = 120.0
"""The time that one score may take before the reference counts as failing. A long text is given more seconds."""
MIN_TOKENS_PER_SECOND = 100.0
"""The least speed of a reference that works: a slow one needs minutes for a long prompt, and has not failed then."""

_NEVER_SCORABLE: Mapping[FailureReason, Unscored] = {
    FailureReason.TOO_LONG: Unscored.REFERENCE_TOO_LONG,
    FailureReason.NO_ADAPTER: Unscored.REFERENCE_NO_ADAPTER,
    FailureReason.GRAMMAR_NEEDS_FULL_VOCABULARY: Unscored.GRAMMAR_NEEDS_FULL_VOCABULARY,
}
"""The failures that are a property of the request: they say nothing of the reference's health."""


class ReferenceCall:
    """Owns the count of tokens that the reference has scored. It makes a `ScoreRequest` of what was read of a capture,
    and asks the reference.

    clock: monotonic seconds.
    """

    def __init__(self, needs: ScoringNeeds, clock: Callable[[], float]) -> None:
        self._needs = needs
        self._clock = clock
        self.tokens = 0
        """The number of prompt and output tokens that the reference has scored."""

    async def request(
        self,
        capture: Capture,
        route: Route,
        candidates: Candidates,
        allowed: AllowedSets | None,
        features: Features | None,
        template: bytes,
    ) -> ScoreRequest:
        """Returns the request for the scores of the output's last T tokens: those before them are context.

        candidates: of these, [T, K]. allowed: the ids that the request's grammar allows; None if nothing restricts it.
        features: see `align_features`. template: see `TokenRecord.template`.
        """
        prompt, output = prompt_ids(capture), output_ids(capture)
        position = len(output) - len(candidates.ids)
        profiles = self._needs.evaluated_profiles() if route.calibrated else ()
        codes = {} if features is None else await asyncio.to_thread(profile_codes, profiles, features)
        unit = template or capture.conversation or prompt_key(prompt)
        return ScoreRequest(
            np.concatenate([prompt, output[:position]]),
            output[position:],
            candidates.ids,
            profiles,
            codes,
            hidden=route.calibrated and allowed is None and self._needs.needs_hidden_states(unit),
            adapter=capture.model if capture.model in route.pair.scorable_adapters else "",
            allowed=allowed,
            # Features of a restricted request are of the allowed ids only.
            compressed=None if allowed is not None else self._compressed_logits(features, candidates, route.info),
        )

    def _compressed_logits(
        self, features: Features | None, candidates: Candidates, info: ReferenceInfo
    ) -> CompressedLogits | None:
        """Returns the logits that the engine reported; None if they do not determine the compressed model's
        distribution."""
        ids = None if features is None else self._needs.anchor_sets().get(features.anchors)
        if features is None or ids is None or not 0 < info.hidden_size < len(ids):
            return None
        return CompressedLogits(ids, features.values.astype(np.float32, copy=False), candidates.logprobs)

    async def ask(self, route: Route, request: ScoreRequest, request_id: str) -> ReferenceScores:
        """Returns the scores. Raises NotScored. The outcome is reported to the breaker."""
        breaker = route.breaker
        if not breaker.allow(self._clock()):
            raise NotScored(Unscored.BREAKER_OPEN)
        try:
            scores = await self._scores(route.reference, request)
        except ReferenceFailure as failure:
            if (skip := _NEVER_SCORABLE.get(failure.reason)) is not None:
                breaker.released()
                raise NotScored(skip) from failure
            breaker.failed(self._clock())
            message = f"score of {request_id} failed: {failure}"
            raise NotScored(Unscored.REFERENCE_FAILED, message, detail=failure.reason) from failure
        except BaseException:
            breaker.released()  # else a half-open breaker would wait for ever for this call
            raise
        breaker.succeeded()
        self.tokens += request.tokens
        return scores

    async def _scores(self, reference: Reference, request: ScoreRequest) -> ReferenceScores:
        """Returns the reference's scores. Raises ReferenceFailure, also if the reference does not answer in time."""
        seconds = MAX_SCORE_SECONDS + request.tokens / MIN_TOKENS_PER_SECOND
        try:
            async with asyncio.timeout(seconds):
                return await reference.score(request)
        except TimeoutError as failure:
            raise ReferenceFailure(FailureReason.TIMEOUT, f"no answer within {seconds:.0f} s") from failure
