"""Asks the reference about a capture: a stage of `hemostat.scoring.stages`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
from hemostat.scoring.endings import NotScored
from hemostat.scoring.record_builder import CaptureArrays
from hemostat.scoring.routing import Route, ScoringNeeds
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Features
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


@dataclass(frozen=True, slots=True)
class EvaluatedProfiles:
    """The profiles that a record is to evaluate. `ProfileInputs` makes it; `ReferenceCall` and `build_record` read it.

    features: the tap's, aligned to the output; None if there are none of use.
    codes: each position's code by version, float64 [T, r], for the profiles that read features.
    """

    profiles: tuple[CalibrationProfile, ...]
    features: Features | None
    codes: Mapping[str, Floats]


class ReferenceCall:
    """Owns the count of tokens that the reference has scored. It takes what was read and what profiles need, and gives
    the scores with the capture's cluster of alike prompts.

    template_of: (prompt, conversation) -> `TokenRecord.template`. clock: monotonic seconds.
    """

    def __init__(
        self, needs: ScoringNeeds, template_of: Callable[[Ids, bytes], bytes], clock: Callable[[], float]
    ) -> None:
        self._needs = needs
        self._template_of = template_of
        self._clock = clock
        self.tokens = 0
        """The number of prompt and output tokens that the reference has scored."""

    async def ask(
        self,
        capture: Capture,
        route: Route,
        arrays: CaptureArrays,
        allowed: AllowedSets | None,
        evaluated: EvaluatedProfiles,
    ) -> tuple[ReferenceScores, bytes]:
        """Returns the scores and `TokenRecord.template`. Raises NotScored. The outcome is reported to the breaker."""
        breaker = route.breaker
        if not breaker.allow(self._clock()):
            raise NotScored(Unscored.BREAKER_OPEN)
        try:
            template = self._template_of(arrays.prompt, capture.conversation) if route.calibrated else b""
            unit = template or capture.conversation or prompt_key(arrays.prompt)
            request = self._request(capture, route, arrays, allowed, evaluated, unit)
            scores = await self._scores(route.reference, request)
        except ReferenceFailure as failure:
            if (skip := _NEVER_SCORABLE.get(failure.reason)) is not None:
                breaker.released()
                raise NotScored(skip) from failure
            breaker.failed(self._clock())
            message = f"score of {capture.request_id} failed: {failure}"
            raise NotScored(Unscored.REFERENCE_FAILED, message, detail=failure.reason) from failure
        except BaseException:
            breaker.released()  # else a half-open breaker would wait for ever for this call
            raise
        breaker.succeeded()
        self.tokens += request.tokens
        if evaluated.features is not None:
            unknown = np.isnan(evaluated.features.values[:, 0])
            for version in evaluated.codes.keys() & scores.expected_shift.keys():
                scores.expected_shift[version][unknown] = np.nan
        return scores, template

    def _request(
        self,
        capture: Capture,
        route: Route,
        arrays: CaptureArrays,
        allowed: AllowedSets | None,
        evaluated: EvaluatedProfiles,
        unit: bytes,
    ) -> ScoreRequest:
        return ScoreRequest(
            arrays.context,
            arrays.output,
            arrays.candidates.ids,
            evaluated.profiles,
            {version: values.astype(np.float32) for version, values in evaluated.codes.items()},
            hidden=route.calibrated and allowed is None and self._needs.needs_hidden_states(unit),
            adapter=capture.model if capture.model in route.pair.scorable_adapters else "",
            allowed=allowed,
            # Features of a restricted request are of the allowed ids only.
            compressed=None if allowed is not None else self._compressed_logits(evaluated.features, arrays, route.info),
        )

    def _compressed_logits(
        self, features: Features | None, arrays: CaptureArrays, info: ReferenceInfo
    ) -> CompressedLogits | None:
        """Returns the logits that the engine reported; None if they do not determine the compressed model's
        distribution."""
        ids = None if features is None else self._needs.anchor_sets().get(features.anchors)
        if features is None or ids is None or not 0 < info.hidden_size < len(ids):
            return None
        return CompressedLogits(ids, features.values, arrays.candidates.logprobs)

    async def _scores(self, reference: Reference, request: ScoreRequest) -> ReferenceScores:
        """Returns the reference's scores. Raises ReferenceFailure, also if the reference does not answer in time."""
        seconds = MAX_SCORE_SECONDS + request.tokens / MIN_TOKENS_PER_SECOND
        try:
            async with asyncio.timeout(seconds):
                return await reference.score(request)
        except TimeoutError as failure:
            raise ReferenceFailure(FailureReason.TIMEOUT, f"no answer within {seconds:.0f} s") from failure
