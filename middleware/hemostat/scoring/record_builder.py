"""From a capture's bytes, the engine's tap and the reference's scores to one validated `TokenRecord`. No IO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.openai.json_splice import MALFORMED
from hemostat.openai.logprobs.rows import read_rows
from hemostat.openai.routes import FORMS
from hemostat.reference.protocol import ReferenceInfo, ReferenceScores
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest, code
from hemostat_calibration.reasoning import Markers, find_thinking
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import GRAMMAR, Arm, Candidates, Features, Sampling, Shift, TokenRecord
from hemostat_calibration.statistics.split import prompt_key


@dataclass(frozen=True, slots=True)
class CaptureArrays:
    """A capture's bytes as arrays. Of a long output only the last T tokens are scored: those before them are context.

    prompt: int32 [P]. context: int32 [P + position], the prompt and the output tokens that are not scored.
    output: int32 [T], those that are. candidates: [T, top_k + 1], log-probabilities in nats.
    emitted: float64 [T], log-probability of each of these tokens, nats.
    """

    prompt: Ids
    context: Ids
    output: Ids
    candidates: Candidates
    emitted: Floats

    @property
    def position(self) -> int:
        """The position of the first scored token in the output."""
        return len(self.context) - len(self.prompt)

    @property
    def whole_output(self) -> Ids:
        """The ids of the whole output, int32 [position + T]."""
        return np.concatenate([self.context[len(self.prompt) :], self.output])


class UnreadableLogprobsError(Exception):
    """The JSON of the response's `logprobs` is malformed, or is not of the response's token ids."""


def decode_capture(capture: Capture, max_scored: int | None = None) -> CaptureArrays:
    """Returns the arrays of a capture. Raises InvalidRecordError ("shape", "empty") if the lengths do not fit each
    other, or there is no token. Raises UnreadableLogprobsError.

    max_scored: the largest T; None: the whole output.
    """
    try:
        prompt = np.frombuffer(capture.prompt_token_ids, "<i4").astype(np.int32)
        output = np.frombuffer(capture.output_token_ids, "<i4").astype(np.int32)
        if capture.logprobs:
            candidates, emitted = _parse(capture, output)
            ids, logprobs = candidates.ids, candidates.logprobs
        else:
            shape = (len(output), capture.top_k + 1)
            ids = np.frombuffer(capture.candidate_ids, "<i4").astype(np.int32).reshape(shape)
            logprobs = np.frombuffer(capture.candidate_logprobs, "<f4").astype(np.float64).reshape(shape)
            emitted = np.frombuffer(capture.emitted_logprobs, "<f4").astype(np.float64).reshape(len(output))
    except ValueError as error:
        raise InvalidRecordError("shape", f"capture {capture.request_id}: {error}") from error
    if not len(prompt) or not len(output):
        raise InvalidRecordError("empty", f"capture {capture.request_id}: no prompt or no output")
    first = 0 if max_scored is None else max(0, len(output) - max_scored)
    context = np.concatenate([prompt, output[:first]]) if first else prompt
    return CaptureArrays(prompt, context, output[first:], Candidates(ids[first:], logprobs[first:]), emitted[first:])


def _parse(capture: Capture, output: Ids) -> tuple[Candidates, Floats]:
    """Returns the candidates, and the emitted tokens' log-probabilities."""
    try:
        rows = read_rows(FORMS[capture.route], capture.logprobs, output.tolist(), capture.top_k)
    except MALFORMED as error:
        raise UnreadableLogprobsError(f"logprobs of {capture.request_id}: {error}") from error
    return Candidates(rows.ids, rows.logprobs.astype(np.float64)), rows.emitted.astype(np.float64)


def check_vocabulary(arrays: CaptureArrays, vocab_size: int) -> None:
    """Raises InvalidRecordError ("ids") for an id outside the reference's vocabulary: on some devices looking it up
    would end the reference's process."""
    for name, ids, smallest in (
        ("prompt", arrays.context, 0),
        ("output", arrays.output, 0),
        ("candidate", arrays.candidates.ids, -1),  # -1 pads
    ):
        if ids.min() < smallest or ids.max() >= vocab_size:
            raise InvalidRecordError("ids", f"{name} ids are outside the reference's vocabulary of {vocab_size}")


def build_record(
    capture: Capture,
    arrays: CaptureArrays,
    scores: ReferenceScores,
    info: ReferenceInfo,
    tap: TapResult | None,
    versions: Iterable[str],
    features: Features | None = None,
    codes: Mapping[str, Floats] = MappingProxyType({}),
    *,
    allowed: AllowedSets | None = None,
    markers: Markers | None = None,
    template: bytes = b"",
) -> TokenRecord:
    """Returns the record that joins what the relay captured, the engine tapped and the reference scored. Raises
    InvalidRecordError if they do not fit each other.

    versions: of the profiles whose effect the reference was asked for.
    features: the tap's, aligned to the output (`align_features`). codes: by version, float64 [T, r], `profile_codes`.
    allowed: the ids that the request's grammar allows, which both models' log-probabilities are conditional on.
    markers: of the model's thinking; None if it has none, or they are not known.
    template: see `TokenRecord.template`.
    """
    tokens = len(arrays.output)
    unknown = np.full(tokens, np.nan)
    applied = applied_version(capture, tap)
    names = set(versions) | (set(tap.log_normalizer) if tap else set()) | set(scores.expected_shift)
    if capture.adapter is not None:
        # Numbers of profiles, computed from the adapted model's logits, say nothing of the compressed model.
        names.clear()
    shifts = {
        version: Shift(
            expected=scores.expected_shift.get(version, unknown),
            log_normalizer=_align(tap.log_normalizer.get(version), arrays.position, tokens) if tap else unknown,
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
            # A request whose profile the engine did not apply (it may just have lost it) belongs to neither arm.
            arm=Arm(capture.arm) if applied == capture.requested else Arm.NONE,
            support=None if allowed is None else allowed.support,
            constraint="" if allowed is None else GRAMMAR,
            requested=capture.requested,
            applied=applied,
            shifts=shifts,
            features=features,
            reference_hidden=scores.hidden,
            position=arrays.position,
            context_tokens=len(arrays.context),
            thinking=None if markers is None else find_thinking(arrays.prompt, arrays.whole_output, markers),
            recovered=scores.recovered,
            adapter=capture.adapter,
            request_id=capture.request_id,
            route=capture.route,
            model=capture.model,
            label=capture.label,
            kind=capture.kind,
            conversation=capture.conversation,
            template=template,
            client=capture.client,
            compressed_model=capture.model,
            reference_model=info.digest,
            reference_dtype=info.dtype,
            engine_boot=tap.boot_id if tap else "",
            engine=capture.engine,
            engine_drawn=capture.engine_drawn,
        )
    )


def applied_version(capture: Capture, tap: TapResult | None) -> str | None:
    """Returns the profile that the answer was generated with; None is identity.

    An adapter is applied where the answer names it; for another profile the engine's plugin reports it.
    """
    by_plugin = tap.applied if tap else None
    return by_plugin if capture.adapter is None or by_plugin is not None else capture.adapter


def _align(values: Floats | None, first: int, tokens: int) -> Floats:
    """Returns the engine's numbers of the output's positions from `first` on, NaN where it gave none: it may be a token
    ahead, or have lost some."""
    aligned = np.full(tokens, np.nan)
    if values is not None:
        given = values[first : first + tokens]
        aligned[: len(given)] = given
    return aligned


class FeatureReason(StrEnum):
    """The reason why the engine's features of a request cannot be used."""

    NO_TAP = "no_tap"
    """The engine reported nothing about the request."""
    NOT_SENT = "not_sent"
    OTHER_ANCHORS = "other_anchors"
    """The features belong to a set of anchors that no profile and no learner reads."""
    SHAPE = "shape"
    NOT_FINITE = "not_finite"
    MASKED = "masked"
    """An anchor was masked, or a row is missing, at every position."""


class FeatureError(Exception):
    """The engine's features of a request cannot be used; all else of the request can."""

    def __init__(self, reason: FeatureReason) -> None:
        super().__init__(reason)
        self.reason = reason


def align_features(features: Features | None, first: int, tokens: int, anchor_sets: Mapping[str, Ids]) -> Features:
    """Returns the engine's features of the output's positions from `first` on, float32 [T, N]; a row of NaN where it
    gave none. Raises FeatureError.

    anchor_sets: the sets of anchors that are of use: digest -> the N ids.
    """
    if features is None:
        raise FeatureError(FeatureReason.NOT_SENT)
    if features.anchors not in anchor_sets:
        raise FeatureError(FeatureReason.OTHER_ANCHORS)
    given = features.values[first : first + tokens]
    if given.ndim != 2 or given.shape[1] != len(anchor_sets[features.anchors]):
        raise FeatureError(FeatureReason.SHAPE)
    unknown = np.isnan(given)
    if np.isinf(given).any() or (unknown.any(axis=1) != unknown.all(axis=1)).any():
        raise FeatureError(FeatureReason.NOT_FINITE)
    values = np.full((tokens, given.shape[1]), np.nan, np.float32)
    values[: len(given)] = given
    if np.isnan(values).all():
        raise FeatureError(FeatureReason.MASKED)
    return Features(features.anchors, values)


def profile_codes(profiles: Iterable[CalibrationProfile], features: Features) -> dict[str, Floats]:
    """Returns each position's code by version, float64 [T, r], for those profiles whose anchors are the tokens of these
    features.
    """
    result = {}
    for profile in profiles:
        ids = anchors(profile)
        if ids is not None and anchors_digest(ids) == features.anchors:
            result[profile.version] = code(profile, features.values)
    return result
