"""The checks of a token record, where it enters the core: `validate`, and `with_distances` for what comes later."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.records import (
    CONSTRAINTS,
    SCHEMA_VERSION,
    Candidates,
    ExactDistances,
    Features,
    RecoveredDivergence,
    TokenRecord,
)


class InvalidReason(StrEnum):
    """The reason for which `validate` refuses a record, for counting."""

    SCHEMA = "schema"
    EMPTY = "empty"
    DTYPE = "dtype"
    SHAPE = "shape"
    IDS = "ids"
    REPEATED = "repeated"
    SHORT = "short"
    NAN = "nan"
    RANGE = "range"
    ORDER = "order"
    MASS = "mass"
    EMITTED = "emitted"
    SUPPORT = "support"


LOGPROB_TOLERANCE = 1e-3
"""The amount by which a log-probability may be above 0, or the sum of a row above 1: models compute in float32 or
less.
"""
MIN_LOGPROB = -1e4
"""The smallest log-probability that is a number, nats: a model's logits do not differ by more, and vLLM writes −9999
for an id that is masked. A smaller one is made up, and would outweigh all others in a mean."""
_ORDER_TOLERANCE = 1e-4
_DIGEST = re.compile(r"[0-9a-f]{32}")


def validate(record: TokenRecord) -> TokenRecord:
    """Returns `record`, or raises InvalidRecordError naming the field and an `InvalidReason`.

    This is checked once, where records enter the core: shapes, ids within the vocabulary and not repeated in a row, no
    NaN (but in `reference_at`, `shifts` and whole rows of `features`, where it means unknown), log-probabilities not
    above 0 and either -inf or not below MIN_LOGPROB, rows that sum to at most 1 within rounding (so does all that the
    reference gave of a position, of which the most likely id is at least as likely as the mean of all), rows ordered
    from the most to the least likely with the padding last. No row of `compressed` has a single id (a server that lists
    the emitted token in any case fills it by what was sampled, and estimates would be biased), none is shorter than K −
    1 (the last place is for an emitted token that is not one of the most likely), a reference that gave its entropy
    gave all of `reference_at`, and the emitted token's log-probability is the same in its row and in its own field.

    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> validate(record).tokens
    1
    """
    if record.schema != SCHEMA_VERSION:
        raise InvalidRecordError(
            InvalidReason.SCHEMA, f"schema is {record.schema}: this version reads {SCHEMA_VERSION}"
        )
    _array("output_ids", record.output_ids, np.int32, 1)
    tokens, vocabulary = record.tokens, record.vocab_size
    if tokens == 0 or vocabulary < 1:
        raise InvalidRecordError(
            InvalidReason.EMPTY,
            f"output_ids holds {tokens} tokens, vocab_size is {vocabulary}: each must be at least 1",
        )
    if record.output_ids.min() < 0 or record.output_ids.max() >= vocabulary:
        raise InvalidRecordError(InvalidReason.IDS, f"output_ids holds an id outside the vocabulary of {vocabulary}")
    _check_support(record)
    for name, candidates in (("compressed", record.compressed), ("reference", record.reference)):
        _check_candidates(name, candidates, tokens, vocabulary)
    domain, given = record.domain, record.compressed.ids >= 0
    if (given.sum(axis=1) > domain).any() or ((record.reference.ids >= 0).sum(axis=1) > domain).any():
        raise InvalidRecordError(InvalidReason.SUPPORT, "a row holds more ids than its support")
    if (given.sum(axis=1) < np.minimum(2, domain)).any():
        raise InvalidRecordError(
            InvalidReason.SHORT,
            "compressed.ids has a row of one id: at least 2 are needed, or which one it is depends on what was sampled",
        )
    _array("reference_at", record.reference_at, np.float64, 2)
    _same_shape("reference_at", record.reference_at, record.compressed.ids.shape)
    if (given.sum(axis=1) < np.minimum(record.top_k - 1, domain)).any():
        raise InvalidRecordError(
            InvalidReason.SHORT, f"compressed.ids has a row of fewer than the {record.top_k - 1} ids asked for"
        )
    known = given & ~np.isnan(record.reference_at)
    if record.reference_entropy is not None and (known != given).any():
        raise InvalidRecordError(
            InvalidReason.NAN, "reference_at holds NaN though the reference knows its whole vocabulary"
        )
    reference_at = np.where(known, record.reference_at, -np.inf)
    _check_logprobs("reference_at", reference_at)
    _check_reference_mass(record, reference_at)
    for name, values in (
        ("compressed_emitted", record.compressed_emitted),
        ("reference_emitted", record.reference_emitted),
        ("reference_entropy", record.reference_entropy),
        ("drawn_emitted", record.drawn_emitted),
    ):
        if values is None:
            continue
        _array(name, values, np.float64, 1)
        _same_shape(name, values, (tokens,))
        if np.isnan(values).any():
            raise InvalidRecordError(InvalidReason.NAN, f"{name} holds NaN")
    drawn = record.compressed_emitted if record.drawn_emitted is None else record.drawn_emitted
    for name, values in (("compressed_emitted", record.compressed_emitted), ("drawn_emitted", drawn)):
        if not np.isfinite(values).all():
            raise InvalidRecordError(
                InvalidReason.RANGE, f"{name} is infinite: an emitted token had a probability above 0"
            )
    for name, values in (
        ("compressed_emitted", record.compressed_emitted),
        ("reference_emitted", record.reference_emitted),
        ("drawn_emitted", drawn),
    ):
        if values.max() > LOGPROB_TOLERANCE:
            raise InvalidRecordError(InvalidReason.RANGE, f"{name} holds a log-probability above 0")
        _check_least(name, values)
    emitted = given & (record.compressed.ids == record.output_ids[:, None])
    _check_emitted("compressed", record.compressed.logprobs, record.compressed_emitted, emitted)
    _check_emitted("reference_at", record.reference_at, record.reference_emitted, emitted & known)
    if record.reference_entropy is not None and not (
        record.reference_entropy.min() >= -LOGPROB_TOLERANCE
        and (record.reference_entropy <= np.log(domain) + LOGPROB_TOLERANCE).all()
    ):
        raise InvalidRecordError(
            InvalidReason.RANGE, "reference_entropy is below 0 or above log(vocab_size), or log(support)"
        )
    for version, shift in record.shifts.items():
        for name, values in (("expected", shift.expected), ("log_normalizer", shift.log_normalizer)):
            field_name = f"shifts[{version[:32]}].{name}"
            _array(field_name, values, np.float64, 1)
            _same_shape(field_name, values, (tokens,))
            if np.isinf(values).any():
                raise InvalidRecordError(InvalidReason.RANGE, f"{field_name} is infinite")
        if shift.code is not None:
            field_name = f"shifts[{version[:32]}].code"
            _array(field_name, shift.code, np.float64, 2)
            _same_shape(field_name, shift.code[:, :1], (tokens, 1))
            if not np.isfinite(shift.code).all():
                raise InvalidRecordError(InvalidReason.RANGE, f"{field_name} is not finite")
    if record.position < 0 or record.context_tokens < 0:
        raise InvalidRecordError(InvalidReason.RANGE, "position or context_tokens is below 0")
    if record.thinking is not None and not (
        0 <= record.thinking.begin <= record.thinking.answer_start <= record.position + tokens
    ):
        raise InvalidRecordError(InvalidReason.RANGE, "thinking lies outside of the output")
    for version, distance in record.distances.items():
        _check_distances(f"distances[{version[:32]}]", distance, tokens)
    if record.recovered is not None:
        _check_recovered(record.recovered, tokens)
    if record.features is not None:
        _check_features(record.features, tokens)
    if record.reference_hidden is not None:
        _check_rows("reference_hidden", record.reference_hidden, tokens)
        if np.isnan(record.reference_hidden).any():
            raise InvalidRecordError(InvalidReason.NAN, "reference_hidden holds NaN")
    return record


def with_distances(record: TokenRecord, distances: Mapping[str, ExactDistances]) -> TokenRecord:
    """Returns a validated record with these distances in place of its own. Raises InvalidRecordError if they do not fit
    it.

    >>> ids, log_c, log_r = np.array([[0, 1, 2]], np.int32), np.log([[0.7, 0.2, 0.1]]), np.log([[0.5, 0.4, 0.1]])
    >>> record = TokenRecord(
    ...     3, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> distances = ExactDistances(kl=np.array([0.11]), tv=np.array([0.2]), top1=np.array([True]))
    >>> with_distances(record, {"identity": distances}).distances["identity"].tv.tolist()
    [0.2]
    """
    for version, distance in distances.items():
        _check_distances(f"distances[{version[:32]}]", distance, record.tokens)
    return replace(record, distances=dict(distances))


def _check_support(record: TokenRecord) -> None:
    if record.constraint and record.constraint not in CONSTRAINTS:
        raise InvalidRecordError(InvalidReason.SUPPORT, f"constraint is {record.constraint[:32]!r}: it must be known")
    if (record.support is None) != (not record.constraint):
        raise InvalidRecordError(InvalidReason.SUPPORT, "support and constraint must be given together")
    if record.support is None:
        return
    _array("support", record.support, np.int32, 1)
    _same_shape("support", record.support, (record.tokens,))
    if record.support.min() < 1 or record.support.max() > record.vocab_size:
        raise InvalidRecordError(
            InvalidReason.SUPPORT, f"support must be at least 1 and at most the vocabulary of {record.vocab_size}"
        )


def _check_distances(name: str, distances: ExactDistances, tokens: int) -> None:
    """Checks exact distances. Rounding may carry a KL a little below 0; a total variation is clipped by whoever
    computes it."""
    for part, values in (("kl", distances.kl), ("tv", distances.tv)):
        _array(f"{name}.{part}", values, np.float64, 1)
        _same_shape(f"{name}.{part}", values, (tokens,))
        if np.isnan(values).any():
            raise InvalidRecordError(InvalidReason.NAN, f"{name}.{part} holds NaN")
    _array(f"{name}.top1", distances.top1, np.bool_, 1)
    _same_shape(f"{name}.top1", distances.top1, (tokens,))
    if distances.kl.min() < -LOGPROB_TOLERANCE:
        raise InvalidRecordError(InvalidReason.RANGE, f"{name}.kl holds a divergence below 0")
    if distances.tv.min() < 0.0 or distances.tv.max() > 1.0:
        raise InvalidRecordError(InvalidReason.RANGE, f"{name}.tv holds a value outside of 0 to 1")


def _check_recovered(divergence: RecoveredDivergence, tokens: int) -> None:
    unknown = np.isnan(divergence.kl_rc)
    for name in ("kl_rc", "kl_cr", "js", "tv", "entropy", "predicted", "observed"):
        values = getattr(divergence, name)
        _array(f"recovered.{name}", values, np.float64, 1)
        _same_shape(f"recovered.{name}", values, (tokens,))
        if (np.isnan(values) != unknown).any():
            raise InvalidRecordError(
                InvalidReason.NAN, f"recovered.{name} is NaN at other positions than recovered.kl_rc"
            )
        if np.isinf(values).any() or (values < -LOGPROB_TOLERANCE).any():
            raise InvalidRecordError(InvalidReason.RANGE, f"recovered.{name} is infinite or below 0")


def _check_features(features: Features, tokens: int) -> None:
    if not _DIGEST.fullmatch(features.anchors):
        raise InvalidRecordError(InvalidReason.IDS, "features.anchors is not a digest of 32 hex digits")
    _check_rows("features.values", features.values, tokens)
    unknown = np.isnan(features.values)
    if (unknown.any(axis=1) != unknown.all(axis=1)).any():
        raise InvalidRecordError(
            InvalidReason.NAN,
            "features.values has a row that is NaN in part: a row must be NaN as a whole or not at all",
        )


def _check_rows(name: str, values: npt.NDArray[np.floating], tokens: int) -> None:
    _array(name, values, np.float32, 2)
    if values.shape[0] != tokens or not values.shape[1]:
        raise InvalidRecordError(
            InvalidReason.SHAPE, f"{name} has shape {values.shape}: it must have {tokens} rows, 1 column"
        )
    if np.isinf(values).any():
        raise InvalidRecordError(InvalidReason.RANGE, f"{name} holds an infinity")


def _array(name: str, values: npt.NDArray[np.generic], dtype: type[np.generic], dimensions: int) -> None:
    if values.dtype != dtype:
        raise InvalidRecordError(InvalidReason.DTYPE, f"{name} is {values.dtype}: it must be {np.dtype(dtype)}")
    if values.ndim != dimensions:
        raise InvalidRecordError(InvalidReason.SHAPE, f"{name} has {values.ndim} dimensions: it must have {dimensions}")


def _same_shape(name: str, values: npt.NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise InvalidRecordError(InvalidReason.SHAPE, f"{name} has shape {values.shape}: it must be {shape}")


def _check_logprobs(name: str, logprobs: Floats) -> None:
    if logprobs.max() > LOGPROB_TOLERANCE:
        raise InvalidRecordError(InvalidReason.RANGE, f"{name} holds a log-probability above 0")
    _check_least(name, logprobs)
    if np.exp(logprobs).sum(axis=1).max() > 1.0 + LOGPROB_TOLERANCE:
        raise InvalidRecordError(InvalidReason.MASS, f"{name} has a row that sums to more than 1")


def _check_emitted(name: str, logprobs: Floats, beside: Floats, at: npt.NDArray[np.bool_]) -> None:
    rows = np.nonzero(at)[0]
    if not np.isclose(logprobs[at], beside[rows], rtol=LOGPROB_TOLERANCE, atol=LOGPROB_TOLERANCE).all():
        raise InvalidRecordError(InvalidReason.EMITTED, f"{name} and the emitted token's own log-probability differ")


def _check_reference_mass(record: TokenRecord, reference_at: Floats) -> None:
    """Checks that all that the reference gave of a position is one distribution: its own most likely ids, and the
    compressed model's. Its most likely id has at least the mean probability of all."""
    own, domain = record.reference, record.domain
    both = (record.compressed.ids[:, :, None] == own.ids[:, None, :]).any(axis=2)
    mass = np.exp(own.logprobs).sum(axis=1) + np.exp(np.where(both, -np.inf, reference_at)).sum(axis=1)
    if mass.max() > 1.0 + LOGPROB_TOLERANCE:
        raise InvalidRecordError(InvalidReason.MASS, "the reference's probabilities at a position sum to more than 1")
    if (own.logprobs[:, 0] < -np.log(domain) - LOGPROB_TOLERANCE).any():
        raise InvalidRecordError(
            InvalidReason.MASS, "the reference's most likely id has less than the mean probability of all ids"
        )


def _check_least(name: str, logprobs: Floats) -> None:
    if ((logprobs < MIN_LOGPROB) & (logprobs > -np.inf)).any():
        raise InvalidRecordError(
            InvalidReason.RANGE, f"{name} holds a log-probability below {MIN_LOGPROB:g} that is not -inf"
        )


def _check_candidates(name: str, candidates: Candidates, tokens: int, vocabulary: int) -> None:
    ids, logprobs = candidates.ids, candidates.logprobs
    _array(f"{name}.ids", ids, np.int32, 2)
    _array(f"{name}.logprobs", logprobs, np.float64, 2)
    _same_shape(f"{name}.logprobs", logprobs, ids.shape)
    if ids.shape[0] != tokens or ids.shape[1] == 0:
        raise InvalidRecordError(
            InvalidReason.SHAPE, f"{name}.ids has shape {ids.shape}: it must have {tokens} rows, 1 column"
        )
    if ids.min() < -1 or ids.max() >= vocabulary:
        raise InvalidRecordError(InvalidReason.IDS, f"{name}.ids holds an id outside the vocabulary of {vocabulary}")
    if (ids[:, 0] < 0).any():
        raise InvalidRecordError(InvalidReason.EMPTY, f"{name}.ids has a row without a candidate")
    ordered = np.sort(ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise InvalidRecordError(InvalidReason.REPEATED, f"{name}.ids has a row with a duplicate id")
    if np.isnan(logprobs).any():
        raise InvalidRecordError(InvalidReason.NAN, f"{name}.logprobs holds NaN")
    if (logprobs[ids < 0] != -np.inf).any():
        raise InvalidRecordError(InvalidReason.RANGE, f"{name}.logprobs must be -inf where ids is -1")
    if (logprobs[:, 1:] > logprobs[:, :-1] + _ORDER_TOLERANCE).any() or ((ids[:, 1:] >= 0) & (ids[:, :-1] < 0)).any():
        raise InvalidRecordError(
            InvalidReason.ORDER, f"{name} must be ordered from the most to the least likely, padding last"
        )
    _check_logprobs(f"{name}.logprobs", logprobs)
