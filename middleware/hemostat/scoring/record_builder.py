"""From a capture's bytes, the engine's tap and the reference's scores to one validated `TokenRecord`. No IO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

import numpy as np

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.reference.protocol import ReferenceInfo, ReferenceScores, ScoreRequest
from hemostat.scoring.capture_arrays import emitted_logprobs, output_ids, prompt_ids
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest, code
from hemostat_calibration.reasoning import Markers, find_thinking
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import GRAMMAR, Arm, Candidates, Features, Sampling, Shift, TokenRecord
from hemostat_calibration.statistics.split import prompt_key


def check_vocabulary(capture: Capture, candidates: Candidates, vocab_size: int) -> None:
    """Raises InvalidRecordError ("ids") for an id outside the reference's vocabulary: on some devices looking it up
    would end the reference's process."""
    for name, ids, smallest in (
        ("prompt", prompt_ids(capture), 0),
        ("output", output_ids(capture), 0),
        ("candidate", candidates.ids, -1),  # -1 pads
    ):
        if ids.min() < smallest or ids.max() >= vocab_size:
            raise InvalidRecordError("ids", f"{name} ids are outside the reference's vocabulary of {vocab_size}")


def build_record(
    capture: Capture,
    candidates: Candidates,
    request: ScoreRequest,
    scores: ReferenceScores,
    info: ReferenceInfo,
    tap: TapResult | None,
    features: Features | None = None,
    *,
    markers: Markers | None = None,
    template: bytes = b"",
) -> TokenRecord:
    """Returns the record that joins what the relay captured, the engine tapped and the reference scored. Raises
    InvalidRecordError if they do not fit each other.

    candidates: of the scored tokens, [T, K]. request: what the reference was asked, of a capture that was decoded.
    features: the tap's, aligned to the scored tokens (`align_features`).
    markers: of the model's thinking; None if it has none, or they are not known.
    template: see `TokenRecord.template`.
    """
    prompt, output = prompt_ids(capture), output_ids(capture)
    tokens = len(request.output)
    position = len(output) - tokens
    unknown = np.full(tokens, np.nan)
    applied = applied_version(capture, tap)
    names = {profile.version for profile in request.profiles} | (set(tap.log_normalizer) if tap else set())
    if capture.adapter is not None:
        # Numbers of profiles, computed from the adapted model's logits, say nothing of the compressed model.
        names.clear()
    shifts = {
        version: Shift(
            expected=_expected(version, request, scores, features),
            log_normalizer=_align(tap.log_normalizer.get(version), position, tokens) if tap else unknown,
            code=request.codes.get(version),
        )
        for version in names
    }
    return validate(
        TokenRecord(
            vocab_size=info.vocab_size,
            prompt_key=prompt_key(prompt),
            output_ids=request.output,
            compressed=candidates,
            reference_at=scores.at,
            reference=scores.top,
            compressed_emitted=emitted_logprobs(capture)[position:],
            reference_emitted=scores.emitted,
            reference_entropy=scores.entropy,
            sampling=Sampling(capture.temperature, capture.top_p, capture.sampling_top_k, capture.min_p),
            # A request whose profile the engine did not apply (it may just have lost it) belongs to neither arm.
            arm=Arm(capture.arm) if applied == capture.requested else Arm.NONE,
            support=None if request.allowed is None else request.allowed.support,
            constraint="" if request.allowed is None else GRAMMAR,
            requested=capture.requested,
            applied=applied,
            shifts=shifts,
            features=features,
            reference_hidden=scores.hidden,
            position=position,
            context_tokens=len(request.prompt),
            thinking=None if markers is None else find_thinking(prompt, output, markers),
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


def _expected(version: str, request: ScoreRequest, scores: ReferenceScores, features: Features | None) -> Floats:
    """Returns E_r[Δz] of a profile, float64 [T]; NaN where it is unknown, as where a code is of unknown features."""
    expected = scores.expected_shift.get(version)
    if expected is None:
        return np.full(len(request.output), np.nan)
    if features is None or version not in request.codes:
        return expected
    return np.where(np.isnan(features.values[:, 0]), np.nan, expected)


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
