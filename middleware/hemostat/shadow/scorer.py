"""From a capture to a record: waits for the engine's word on it and for the budget, asks the reference, hands it on.

A capture whose tap is not complete yet (the engine flushes about once a second) stays in the queue, and those behind it
go first. Whatever goes wrong ends one capture, is counted by reason, and nothing else; what is wrong with the engine's
features costs the features only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hemostat.engines.registry import EngineRegistry, TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import FailureReason, Reference, ReferenceFailure, ReferenceInfo, ReferenceScores
from hemostat.shadow.limits import Breaker, BreakerState, ShadowQueue, TokenBudget
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest, code
from hemostat_calibration.records import Arm, Candidates, Features, Sampling, Shift, TokenRecord, validate
from hemostat_calibration.statistics.split import prompt_key

log = logging.getLogger("hemostat.scorer")

TAP_WITHIN = 4.0
"""Seconds after the response's end that the engine's numbers are waited for; without them the bounds serve."""
TAP_POLL = 0.1
ID_BYTES = 4
SCORE_WITHIN = 120.0
"""Seconds that one score may take before the reference counts as failing."""


@dataclass(frozen=True, slots=True)
class Arrays:
    """A capture's arrays, decoded."""

    prompt: Ids
    output: Ids
    candidates: Candidates
    emitted: np.ndarray[tuple[int], np.dtype[np.float64]]


def decode(capture: Capture) -> Arrays:
    """Bytes to arrays; InvalidRecordError when the lengths do not fit each other."""
    try:
        prompt = np.frombuffer(capture.prompt_token_ids, "<i4").astype(np.int32)
        output = np.frombuffer(capture.output_token_ids, "<i4").astype(np.int32)
        shape = (len(output), capture.top_k + 1)
        ids = np.frombuffer(capture.candidate_ids, "<i4").astype(np.int32).reshape(shape)
        logprobs = np.frombuffer(capture.candidate_logprobs, "<f4").astype(np.float64).reshape(shape)
        emitted = np.frombuffer(capture.emitted_logprobs, "<f4").astype(np.float64).reshape(len(output))
    except ValueError as error:
        raise InvalidRecordError("shape", f"capture {capture.request_id}: {error}") from error
    if not len(prompt) or not len(output):
        raise InvalidRecordError("empty", f"capture {capture.request_id}: no prompt or no output")
    return Arrays(prompt, output, Candidates(ids, logprobs), emitted)


def check_ids(arrays: Arrays, vocab_size: int) -> None:
    """InvalidRecordError where an id is none of the reference's: on some devices asking for it would end the worker."""
    for name, ids, least in (
        ("prompt", arrays.prompt, 0),
        ("output", arrays.output, 0),
        ("", arrays.candidates.ids, -1),
    ):
        if ids.min() < least or ids.max() >= vocab_size:
            raise InvalidRecordError(
                "ids", f"{name or 'candidate'} ids leave the reference's vocabulary of {vocab_size}"
            )


def build_record(
    capture: Capture,
    arrays: Arrays,
    scores: ReferenceScores,
    info: ReferenceInfo,
    tap: TapResult | None,
    versions: Iterable[str],
    features: Features | None = None,
    codes: Mapping[str, Floats] = MappingProxyType({}),
    *,
    by_request: bool = False,
) -> TokenRecord:
    """Join the three views of one request; raises InvalidRecordError when they do not fit.

    features: of the tap, fitted to the output; codes: what they say to profiles.
    by_request: a requested profile was applied through the request's own parameters (`calibration.apply: request`), of
    which the engine's plugin knows nothing.
    """
    unknown = np.full(len(arrays.output), np.nan)
    applied = capture.requested if by_request else tap.applied if tap else None
    names = set(versions) | (set(tap.log_normalizer) if tap else set()) | set(scores.expected_shift)
    shifts = {
        version: Shift(
            expected=scores.expected_shift.get(version, unknown),
            log_normalizer=_fit(tap.log_normalizer.get(version), len(unknown)) if tap else unknown,
            code=codes.get(version),
        )
        for version in names
    }
    return validate(
        TokenRecord(
            vocab_size=info.vocab_size,
            prompt_key=prompt_key(arrays.prompt),
            output_ids=arrays.output,
            compressed=arrays.candidates,
            reference_at=scores.at,
            reference=scores.top,
            compressed_emitted=arrays.emitted,
            reference_emitted=scores.emitted,
            reference_entropy=scores.entropy,
            sampling=Sampling(capture.temperature, capture.top_p, capture.sampling_top_k, capture.min_p),
            # Treated in name only (the engine had just lost the profile): no member of either arm.
            arm=Arm(capture.arm) if applied == capture.requested else Arm.NONE,
            requested=capture.requested,
            applied=applied,
            shifts=shifts,
            features=features,
            reference_hidden=scores.hidden,
            request_id=capture.request_id,
            route=capture.route,
            model=capture.model,
            label=capture.label,
            compressed_model=capture.model,
            reference_model=info.digest,
            reference_dtype=info.dtype,
            engine_boot=tap.boot_id if tap else "",
        )
    )


def _fit(
    values: np.ndarray[tuple[int], np.dtype[np.float64]] | None, tokens: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The engine's numbers by position, NaN where it gave none (it may be a token ahead, or lossy)."""
    fitted = np.full(tokens, np.nan)
    if values is not None:
        n = min(tokens, len(values))
        fitted[:n] = values[:n]
    return fitted


class FeatureProblem(Exception):
    """The engine's features are of no use; `reason` is a short, bounded word for counting."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def fit_features(features: Features | None, tokens: int, read: Mapping[str, int]) -> Features:
    """The engine's features by position, a NaN row where it gave none; raises FeatureProblem.

    read: the anchor sets that anybody reads: digest -> how many.
    """
    if features is None:
        raise FeatureProblem("not_sent")
    if features.anchors not in read:
        raise FeatureProblem("other_anchors")
    given = features.values[:tokens]
    if given.ndim != 2 or given.shape[1] != read[features.anchors]:
        raise FeatureProblem("shape")
    unknown = np.isnan(given)
    if np.isinf(given).any() or (unknown.any(axis=1) != unknown.all(axis=1)).any():
        raise FeatureProblem("not_finite")
    values = np.full((tokens, given.shape[1]), np.nan, np.float32)
    values[: len(given)] = given
    if np.isnan(values).all():
        raise FeatureProblem("masked")
    return Features(features.anchors, values)


def read_codes(profiles: Iterable[CalibrationProfile], features: Features) -> dict[str, Floats]:
    """By version, what these features say to the profiles that read their anchors: float64 [T, r]."""
    found = {}
    for profile in profiles:
        ids = anchors(profile)
        if ids is not None and anchors_digest(ids) == features.anchors:
            found[profile.version] = code(profile, features.values)
    return found


class Scorer:
    """Runs until cancelled. `sink` gets every record with its capture; `count(outcome, reason)` every ending.

    served: names of the compressed model. adapters: its LoRA adapters that the reference can score with. What another
        one said is not the reference's to judge.
    anchors: the anchor sets that anybody reads: digest -> how many.
    hidden: whether the reference's hidden states of a prompt are wanted, by its key.
    by_request: see `build_record`.
    """

    def __init__(
        self,
        *,
        queue: ShadowQueue,
        budget: TokenBudget,
        breaker: Breaker,
        reference: Reference,
        info: Callable[[], ReferenceInfo | None],
        served: Callable[[], frozenset[str]],
        profiles: Callable[[], tuple[CalibrationProfile, ...]],
        engines: EngineRegistry,
        sink: Callable[[TokenRecord, Capture], None],
        count: Callable[[str, str], None],
        clock: Callable[[], float],
        anchors: Callable[[], Mapping[str, int]] = dict,
        hidden: Callable[[bytes], bool] = lambda _: False,
        adapters: Callable[[], frozenset[str]] = frozenset,
        by_request: bool = False,
    ) -> None:
        self._queue = queue
        self._budget = budget
        self._breaker = breaker
        self._reference = reference
        self._info = info
        self._served = served
        self._profiles = profiles
        self._engines = engines
        self._sink = sink
        self._count = count
        self._clock = clock
        self._anchors = anchors
        self._hidden = hidden
        self._adapters = adapters
        self._by_request = by_request
        self._wake = asyncio.Event()
        self._busy = 0
        self.reference_tokens = 0
        self.features_dropped: Counter[str] = Counter()
        """Requests whose features were wanted and came to nothing, by reason."""

    def offer(self, capture: Capture) -> None:
        """A capture from a relay: queued, or dropped and counted."""
        if not self._queue.offer(capture):
            self._count("dropped", "queue_full")
        self._wake.set()

    @property
    def pending(self) -> int:
        """Captures that have no ending yet."""
        return len(self._queue) + self._busy

    def samples(self) -> Iterator[Sample]:
        yield Sample(names.REFERENCE_TOKENS, (), self.reference_tokens)
        for reason, requests in self.features_dropped.items():
            yield Sample(names.FEATURES_DROPPED, (reason,), requests)

    async def run(self, workers: int) -> None:
        """`workers` captures are worked on at a time."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._score_forever())

    async def _score_forever(self) -> None:
        while True:
            capture = self._queue.take(self._ripe)
            if capture is None:
                await self._changes()
                continue
            self._busy += 1
            try:
                await self._score(capture)
            except InvalidRecordError as error:
                self._count("skipped", f"invalid_{error.reason}")
                log.warning("record of %s refused: %s", capture.request_id, error)
            except ReferenceFailure as failure:
                self._count("dropped", f"reference_{failure.reason}")
                log.warning("score of %s failed: %s", capture.request_id, failure)
            except Exception:
                self._count("dropped", "internal_error")
                log.exception("score of %s failed", capture.request_id)
            finally:
                self._busy -= 1

    async def _changes(self) -> None:
        """A capture has come; while others wait for their taps, that or a little time."""
        self._wake.clear()
        if not len(self._queue):
            await self._wake.wait()
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), TAP_POLL)

    def _ripe(self, capture: Capture) -> bool:
        """The engine has said all that it will, or time is up."""
        if not capture.nonce:
            return True
        tokens = len(capture.output_token_ids) // ID_BYTES
        return self._engines.tapped(capture.nonce) >= tokens or self._clock() - capture.captured_at > TAP_WITHIN

    async def _score(self, capture: Capture) -> None:
        tap = self._engines.take(capture.nonce) if capture.nonce else None
        info = self._info()
        if info is None or self._breaker.state(self._clock()) is BreakerState.OPEN:
            self._count("dropped", "breaker_open" if info else "reference_not_ready")
            return
        adapter = capture.model if capture.model in self._adapters() else ""
        if not adapter and capture.model not in self._served():
            self._count("skipped", "unknown_model")
            return
        if tap is not None and tap.mixed:
            self._count("skipped", "mixed_profile")
            return
        if tap is None and capture.requested is not None and not self._by_request:
            # Asked for is not applied: of what the tokens were sampled from, nothing is known.
            self._count("skipped", "applied_unknown")
            return
        arrays = decode(capture)
        check_ids(arrays, info.vocab_size)
        tokens = len(arrays.prompt) + len(arrays.output)
        while delay := self._budget.delay(tokens, self._clock()):  # noqa: ASYNC110  waits for time, not an event
            await asyncio.sleep(delay)
        self._budget.spend(tokens, self._clock())
        profiles = self._profiles()
        features = self._features(tap, len(arrays.output))
        codes: dict[str, Floats] = {}
        if features is not None:
            codes = await asyncio.to_thread(read_codes, profiles, features)
        if not self._breaker.allow(self._clock()):
            self._count("dropped", "breaker_open")
            return
        scores = await self._ask(arrays, profiles, codes, adapter)
        if scores is None:
            return
        self.reference_tokens += tokens
        if features is not None:
            unknown = np.isnan(features.values[:, 0])
            for version in codes.keys() & scores.expected_shift.keys():
                scores.expected_shift[version][unknown] = np.nan
        versions = [profile.version for profile in profiles]
        by_request = self._by_request
        record = build_record(capture, arrays, scores, info, tap, versions, features, codes, by_request=by_request)
        self._sink(record, capture)
        self._count("scored", "")

    def _features(self, tap: TapResult | None, tokens: int) -> Features | None:
        read = self._anchors()
        if not read:
            return None
        try:
            if tap is None:
                raise FeatureProblem("no_tap")
            return fit_features(tap.features, tokens, read)
        except FeatureProblem as problem:
            self.features_dropped[problem.reason] += 1
            return None

    async def _ask(
        self, arrays: Arrays, profiles: tuple[CalibrationProfile, ...], codes: Mapping[str, Floats], adapter: str
    ) -> ReferenceScores | None:
        """None when the reference can never score this; the breaker, which has allowed it, is told how it went."""
        hidden = self._hidden(prompt_key(arrays.prompt))
        asking = self._reference.score(
            arrays.prompt,
            arrays.output,
            arrays.candidates.ids,
            profiles,
            {version: values.astype(np.float32) for version, values in codes.items()},
            hidden=hidden,
            adapter=adapter,
        )
        try:
            scores = await asyncio.wait_for(asking, SCORE_WITHIN)
        except (ReferenceFailure, TimeoutError) as failure:
            # A request that this reference can never score says nothing about its health.
            if isinstance(failure, ReferenceFailure) and failure.reason in {"too_long", "no_adapter"}:
                self._breaker.released()
                self._count("skipped", "reference_too_long" if failure.reason == "too_long" else "reference_no_adapter")
                return None
            self._breaker.failed(self._clock())
            if isinstance(failure, TimeoutError):
                raise ReferenceFailure(FailureReason.TIMEOUT, f"no answer within {SCORE_WITHIN:.0f} s") from failure
            raise
        except BaseException:
            self._breaker.released()  # the half-open trial must not be held for ever
            raise
        self._breaker.succeeded()
        return scores
