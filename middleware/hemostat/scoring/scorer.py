"""Scores captures on the reference: waits for the engine's tap and for the token budget, asks, and emits the record.

A capture whose tap is not complete yet (the engine reports about once a second) stays in the queue, and those behind it
go first. Whatever goes wrong ends one capture, is counted by reason, and has no other effect; what is wrong with the
engine's features costs the features only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Protocol

import numpy as np

from hemostat.engines.messages import TapAnswer
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics import names
from hemostat.metrics.reasons import Unscored
from hemostat.metrics.samples import Sample
from hemostat.reference.pair import ModelPair, ServedModels
from hemostat.reference.protocol import (
    CompressedLogits,
    FailureReason,
    Reference,
    ReferenceFailure,
    ReferenceInfo,
    ReferenceScores,
    ScoreRequest,
)
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.conditioning import ConditioningFailure, condition
from hemostat.scoring.endings import EndingCounts
from hemostat.scoring.engine_scores import EngineScorer
from hemostat.scoring.limits import Breaker, Breakers, BreakerState, ShadowQueue, TokenBudget
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
from hemostat.scoring.tapped_answers import AwaitedAnswers, UnusableAnswer, captures_from_tap
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Features, TokenRecord
from hemostat_calibration.statistics.split import prompt_key

log = logging.getLogger("hemostat.scorer")

MAX_TAP_SECONDS = 4.0
"""The longest time after the response's end for which the engine's numbers and answers are waited for; without the
numbers the figures are bounds.
"""
TAP_POLL_SECONDS = 0.1
ID_BYTES = 4
MAX_SCORE_SECONDS = 120.0
"""The time that one score may take before the reference counts as failing. A long text is given more seconds."""
MIN_TOKENS_PER_SECOND = 100.0
"""The least speed of a reference that works: a slow one needs minutes for a long prompt, and has not failed then."""

_NEVER_SCORABLE: Mapping[FailureReason, Unscored] = {
    FailureReason.TOO_LONG: Unscored.REFERENCE_TOO_LONG,
    FailureReason.NO_ADAPTER: Unscored.REFERENCE_NO_ADAPTER,
    FailureReason.GRAMMAR_NEEDS_FULL_VOCABULARY: Unscored.GRAMMAR_NEEDS_FULL_VOCABULARY,
}
"""Failures that are a property of the request: they say nothing of the reference's health."""


class ScoringNeeds(Protocol):
    """The needs of the parts that use the records: what is to be computed."""

    def evaluated_profiles(self) -> tuple[CalibrationProfile, ...]:
        """Returns the profiles whose effect on the distributions the reference computes."""

    def adapters(self) -> Collection[str]:
        """Returns the known versions of the family `adapter`."""

    def anchor_sets(self) -> Mapping[str, Ids]:
        """Returns the sets of anchors whose features are of use: digest -> the ids. Empty: no features."""

    def needs_hidden_states(self, unit: bytes) -> bool:
        """Returns True if the reference's hidden states of this prompt's answer are of use."""


class ServedModelsSource(Protocol):
    """The part of `hemostat.reference.monitor.ReferenceMonitor` that is used here."""

    @property
    def served(self) -> ServedModels: ...


class Scorer:
    """Owns the captures between the queue and their ending. Each is scored on the reference of its own model.

    emit: is handed every record with its capture. clock: monotonic seconds. taken: gets the seconds that a worker
        took for a capture.
    template_of: (prompt, conversation) -> `TokenRecord.template`.
    profile_in_request: see `build_record`. max_scored: see `decode_capture`.
    max_tokens: of prompt and output, where only the engine's plugin reports them.
    engine_scorer: of captures that have ids only; None if relays capture none.
    """

    def __init__(
        self,
        models: ServedModelsSource,
        engines: EngineRegistry,
        needs: ScoringNeeds,
        *,
        queue: ShadowQueue,
        budget: TokenBudget,
        breakers: Breakers,
        endings: EndingCounts,
        answer_losses: AnswerLosses,
        emit: Callable[[TokenRecord, Capture], None],
        clock: Callable[[], float],
        taken: Callable[[float], None] = lambda seconds: None,
        template_of: Callable[[Ids, bytes], bytes] = lambda prompt, conversation: b"",
        profile_in_request: bool = False,
        max_scored: int | None = None,
        max_tokens: int = 0,
        engine_scorer: EngineScorer | None = None,
    ) -> None:
        self._engine_scorer = engine_scorer
        self._max_scored = max_scored
        self._models = models
        self._taps = engines.taps
        self._awaited = AwaitedAnswers(engines.answers, queue.limit, MAX_TAP_SECONDS)
        self._answer_losses = answer_losses
        self._max_tokens = max_tokens
        self._needs = needs
        self._queue = queue
        self._budget = budget
        self._breakers = breakers
        self._endings = endings
        self._emit = emit
        self._taken = taken
        self._template_of = template_of
        self._clock = clock
        self._profile_in_request = profile_in_request
        self._wake = asyncio.Event()
        self._answer_awaited = asyncio.Event()
        self._in_progress = 0
        self.reference_tokens = 0
        """Prompt and output tokens that the reference has scored."""
        self.features_dropped: Counter[FeatureReason] = Counter()
        """Requests whose features were needed and could not be used."""

    def offer(self, capture: Capture) -> None:
        """Queue a capture, or count it as dropped."""
        has_room = self._awaited.add(capture) if capture.from_tap else self._queue.offer(capture)
        if not has_room:
            self._endings.unscored(Unscored.QUEUE_FULL, capture)
        (self._answer_awaited if capture.from_tap else self._wake).set()

    @property
    def pending(self) -> int:
        """Captures that have no ending yet."""
        return len(self._awaited) + len(self._queue) + self._in_progress

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.REFERENCE_TOKENS, (), self.reference_tokens)
        for reason in FeatureReason:
            yield Sample(names.FEATURES_DROPPED, (reason,), self.features_dropped[reason])

    async def run(self, workers: int) -> None:
        """Scores `workers` captures at a time, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._run_worker())
            group.create_task(self._collect_answers())

    async def _collect_answers(self) -> None:
        """Queue the captures that wait for their answers as these come."""
        while True:
            await self._answer_awaited.wait()
            for capture, answers in self._awaited.take(self._clock()):
                self._offer_choices(capture, answers)
            if len(self._awaited):
                await asyncio.sleep(TAP_POLL_SECONDS)
            else:
                self._answer_awaited.clear()

    async def _run_worker(self) -> None:
        while True:
            capture = self._queue.take(self._tap_is_complete)
            if capture is None:
                await self._wait_for_work()
                continue
            self._in_progress += 1
            started = self._clock()
            try:
                await self._score(capture)
            except ConditioningFailure as failure:
                self._endings.unscored(failure.reason, capture)
                log.info("what was allowed in %s: %s: %s", capture.request_id, failure.reason, failure)
            except UnreadableLogprobsError as error:
                self._endings.unscored(Unscored.NO_LOGPROBS, capture)
                log.warning("%s", error)
            except InvalidRecordError as error:
                self._endings.unscored(Unscored.INVALID_RECORD, capture, error.reason)
                log.warning("record of %s refused: %s", capture.request_id, error)
            except ReferenceFailure as failure:
                self._endings.unscored(Unscored.REFERENCE_FAILED, capture, failure.reason)
                log.warning("score of %s failed: %s", capture.request_id, failure)
            except Exception:
                self._endings.unscored(Unscored.INTERNAL_ERROR, capture)
                log.exception("score of %s failed", capture.request_id)
            finally:
                self._in_progress -= 1
                self._taken(self._clock() - started)

    async def _wait_for_work(self) -> None:
        """Waits until a capture comes; while others wait for their taps, at most TAP_POLL_SECONDS."""
        self._wake.clear()
        if not len(self._queue):
            await self._wake.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TAP_POLL_SECONDS):
                await self._wake.wait()

    def _tap_is_complete(self, capture: Capture) -> bool:
        """Returns True if the engine has reported every position of the output, or the time to wait for that is up."""
        if not capture.nonce or self._clock() - capture.captured_at > MAX_TAP_SECONDS:
            return True
        return self._taps.covered(capture.nonce, _ids_among_choices(capture)) >= _output_tokens(capture)

    async def _score(self, capture: Capture) -> None:
        """Emits one record and counts it, or counts why there is none."""
        answer = (capture.nonce, _output_tokens(capture), _ids_among_choices(capture))
        tap = self._taps.take(*answer) if capture.nonce else None
        pair = self._models.served.of(capture.model)
        if (unusable := self._unusable(capture, pair, tap)) is not None:
            self._endings.unscored(unusable, capture)
            return
        if pair is None or pair.scorer is None or (info := pair.reference) is None:
            self._endings.unscored(Unscored.REFERENCE_NOT_READY, capture)
            return
        breaker = self._breakers.of(pair.name)
        if breaker.state(self._clock()) is BreakerState.OPEN:
            self._endings.unscored(Unscored.BREAKER_OPEN, capture)
            return
        if capture.ids_only:
            scored_again = await self._scored_again(capture)
            if scored_again is None:
                return
            capture = scored_again
        arrays = decode_capture(capture, self._max_scored)
        check_vocabulary(arrays, info.vocab_size)
        given = (capture, arrays, info, tap)
        arrays, allowed = await asyncio.to_thread(condition, *given) if capture.grammar else condition(*given)
        tokens = len(arrays.context) + len(arrays.output)
        await self._budget.take(tokens, self._clock)
        # Profiles are for one model. Of the others, the distributions alone are of use.
        calibrated = pair.name == self._models.served.calibrated_name
        profiles = self._needs.evaluated_profiles() if calibrated else ()
        features = self._features(tap, arrays) if calibrated else None
        codes: dict[str, Floats] = {}
        if features is not None:
            codes = await asyncio.to_thread(profile_codes, profiles, features)
        if not breaker.allow(self._clock()):
            self._endings.unscored(Unscored.BREAKER_OPEN, capture)
            return
        adapter = capture.model if capture.model in pair.scorable_adapters else ""
        template = self._template_of(arrays.prompt, capture.conversation) if calibrated else b""
        unit = template or capture.conversation or prompt_key(arrays.prompt)
        hidden = calibrated and allowed is None and self._needs.needs_hidden_states(unit)
        # Features of a restricted request are of the allowed ids only.
        compressed = self._compressed_logits(features, arrays, info) if allowed is None else None
        request = ScoreRequest(
            arrays.context,
            arrays.output,
            arrays.candidates.ids,
            profiles,
            {version: values.astype(np.float32) for version, values in codes.items()},
            hidden=hidden,
            adapter=adapter,
            allowed=allowed,
            compressed=compressed,
        )
        scores = await self._ask(pair.scorer, breaker, request, capture)
        if scores is None:
            return
        self.reference_tokens += tokens
        if features is not None:
            unknown = np.isnan(features.values[:, 0])
            for version in codes.keys() & scores.expected_shift.keys():
                scores.expected_shift[version][unknown] = np.nan
        versions = [profile.version for profile in profiles]
        record = build_record(
            capture,
            arrays,
            scores,
            info,
            tap,
            versions,
            features,
            codes,
            allowed=allowed,
            profile_in_request=self._profile_in_request,
            markers=pair.markers,
            template=template,
        )
        self._emit(record, capture)
        self._endings.scored(capture, left_out=record.position)

    async def _scored_again(self, capture: Capture) -> Capture | None:
        """Returns the capture with its candidates; None, and counted, where the engine does not say them."""
        if self._engine_scorer is None:
            self._endings.unscored(Unscored.NO_LOGPROBS, capture)
            return None
        tokens = (len(capture.prompt_token_ids) + len(capture.output_token_ids)) // ID_BYTES
        await self._budget.take(tokens, self._clock)
        try:
            return await self._engine_scorer.with_candidates(capture)
        except ReferenceFailure as failure:
            self._endings.unscored(Unscored.ENGINE_FAILED, capture, failure.reason)
            log.warning("log-probabilities of %s: %s", capture.request_id, failure)
            return None

    def _compressed_logits(
        self, features: Features | None, arrays: CaptureArrays, info: ReferenceInfo
    ) -> CompressedLogits | None:
        """Returns the logits that the engine reported; None if they do not determine the compressed model's
        distribution."""
        ids = None if features is None else self._needs.anchor_sets().get(features.anchors)
        if features is None or ids is None or not 0 < info.hidden_size < len(ids):
            return None
        return CompressedLogits(ids, features.values, arrays.candidates.logprobs)

    def _offer_choices(self, capture: Capture, answers: list[TapAnswer]) -> None:
        """Queue the captures of a request whose response has no token ids, or count why there are none."""
        choices, reason = list[Capture](), None
        try:
            choices = captures_from_tap(capture, answers, self._max_tokens)
        except UnusableAnswer as unusable:
            reason = unusable.reason
            self._endings.unscored(reason, capture)
        except Exception:
            self._endings.unscored(Unscored.INTERNAL_ERROR, capture)
            log.exception("answers of %s cannot be used", capture.request_id)
        if capture.also_in_response:
            lost = reason in (Unscored.NO_ANSWER, Unscored.ANSWER_MISMATCH)
            if self._answer_losses.count(capture.engine, self._clock(), lost=lost):
                log.warning("answers of engine %s get lost: logprobs in responses are asked for", capture.engine)
        for choice in choices:
            self.offer(choice)

    def _unusable(self, capture: Capture, pair: ModelPair | None, tap: TapResult | None) -> Unscored | None:
        """Returns why no reference could score this capture, or why it cannot be known what its tokens were sampled
        from. It is None if neither holds.
        """
        if pair is None:
            # Nothing is known of the server's models before it was first asked.
            return Unscored.UNKNOWN_MODEL if self._models.served.pairs else None
        if pair.compared and capture.model not in pair.scorable:
            known = pair.reference is not None  # then it is an adapter that the reference does not have
            return Unscored.UNKNOWN_MODEL if known else Unscored.NO_REFERENCE
        if tap is not None and tap.mixed:
            return Unscored.MIXED_PROFILE
        if tap is None and self._plugin_applies(capture):
            return Unscored.APPLIED_UNKNOWN
        return None

    def _plugin_applies(self, capture: Capture) -> bool:
        """Returns True if only the engine's plugin knows whether what was requested was applied. For an adapter the
        answer says so.
        """
        by_plugin = capture.requested is not None and not self._profile_in_request
        return by_plugin and capture.requested not in self._needs.adapters()

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

    async def _ask(
        self, reference: Reference, breaker: Breaker, request: ScoreRequest, capture: Capture
    ) -> ReferenceScores | None:
        """Returns the scores; None, and counted, when the reference can never score this. The outcome is reported to
        the breaker."""
        seconds = MAX_SCORE_SECONDS + request.tokens / MIN_TOKENS_PER_SECOND
        try:
            async with asyncio.timeout(seconds):
                scores = await reference.score(request)
        except (ReferenceFailure, TimeoutError) as failure:
            if isinstance(failure, ReferenceFailure) and (skip := _NEVER_SCORABLE.get(failure.reason)) is not None:
                breaker.released()
                self._endings.unscored(skip, capture)
                return None
            breaker.failed(self._clock())
            if isinstance(failure, TimeoutError):
                raise ReferenceFailure(FailureReason.TIMEOUT, f"no answer within {seconds:.0f} s") from failure
            raise
        except BaseException:
            breaker.released()  # else a half-open breaker would wait for ever for this call
            raise
        breaker.succeeded()
        return scores


def _output_tokens(capture: Capture) -> int:
    return len(capture.output_token_ids) // ID_BYTES


def _ids_among_choices(capture: Capture) -> bytes | None:
    """Returns what distinguishes the choice's numbers from the numbers of the request's other choices; None: it is the
    only one.
    """
    return capture.output_token_ids if capture.choices > 1 else None
