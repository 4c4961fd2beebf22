"""The figures of several requests, computed together.

Each figure is of one position, so positions of several requests may stand in one array. A call has a fixed cost of some
hundred array operations, which is most of the cost of a short request: together, requests share it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields

import numpy as np

from hemostat_calibration.divergence.bounds import MIN_RATIO, Bounds, Interval
from hemostat_calibration.divergence.per_token import TokenDivergence, divergence
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Candidates, Features, RecoveredDivergence, Shift, TokenRecord

MAX_TOKENS = 1024
"""The largest number of tokens that are computed together, unless one request has more: larger arrays gain nothing, and
leave the processor's cache."""
_ARRAYS = tuple(each.name for each in fields(TokenDivergence) if each.name not in ("bound", "bounds"))


def divergences(
    records: Sequence[TokenRecord],
    served: Sequence[CalibrationProfile | None] | None = None,
    min_ratio: float = MIN_RATIO,
) -> list[TokenDivergence]:
    """Returns `divergence(record, served, min_ratio)` of each validated record, the same but for rounding.

    served: the profile of each record; None: no record has one. Figures of requests that were computed together are
    views of the same arrays.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, log_c, log_r = np.array([[0, 1]], np.int32), np.log([[0.7, 0.2]]), np.log([[0.5, 0.4]])
    >>> record = TokenRecord(
    ...     9, b"", ids[0, :1], Candidates(ids, log_c), log_r, Candidates(ids, log_r), log_c[:, 0], log_r[:, 0]
    ... )
    >>> [figures.tv.round(6).tolist() for figures in divergences([record, record])]
    [[0.2], [0.2]]
    """
    profiles = [None] * len(records) if served is None else served
    result: dict[int, TokenDivergence] = {}
    groups: dict[Hashable, list[int]] = {}
    for number, (record, profile) in enumerate(zip(records, profiles, strict=True)):
        groups.setdefault(_alike(record, profile, number), []).append(number)
    for members in groups.values():
        for part in _parts(members, records):
            if len(part) == 1:
                result[part[0]] = divergence(records[part[0]], profiles[part[0]], min_ratio)
                continue
            profile = profiles[part[0]]
            whole = divergence(_joined([records[n] for n in part], profile), profile, min_ratio)
            begin = 0
            for number in part:
                end = begin + records[number].tokens
                result[number] = _rows(whole, slice(begin, end))
                begin = end
    return [result[number] for number in range(len(records))]


def _parts(members: Sequence[int], records: Sequence[TokenRecord]) -> Iterator[list[int]]:
    """Yields the members in parts of at most `MAX_TOKENS` tokens, unless one record has more."""
    part: list[int] = []
    tokens = 0
    for number in members:
        if part and tokens + records[number].tokens > MAX_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(number)
        tokens += records[number].tokens
    yield part


def _alike(record: TokenRecord, served: CalibrationProfile | None, number: int) -> Hashable:
    """Returns what two records have in common whose positions can stand in one array: all that `divergence` reads of a
    request as a whole. A record that may hold the whole vocabulary is alike to none."""
    listed = record.compressed.ids
    least = record.vocab_size if record.support is None else record.support.min()
    if least <= listed.shape[1] + 1:
        return number
    named = (listed == record.output_ids[:, None]).any(axis=1).all()
    shift = None if served is None else record.shifts.get(served.version)
    return (
        record.vocab_size,
        listed.shape[1],
        record.reference.ids.shape[1],
        bool(named),  # else the view has a column more
        record.reference_entropy is None,
        record.support is None,
        record.drawn_emitted is None,
        record.recovered is None,
        record.sampling,
        record.applied,
        None if served is None else served.version,
        (shift is None, shift is None or shift.code is None),
        None if record.features is None else (record.features.anchors, record.features.values.shape[1]),
    )


def _joined(records: Sequence[TokenRecord], served: CalibrationProfile | None) -> TokenRecord:
    """Returns alike records as one, with what `divergence` reads of it."""
    first = records[0]
    shifts = {}
    if served is not None and served.version in first.shifts:
        parts = [record.shifts[served.version] for record in records]
        codes = [part.code for part in parts if part.code is not None]
        shifts[served.version] = Shift(
            np.concatenate([part.expected for part in parts]),
            np.concatenate([part.log_normalizer for part in parts]),
            np.concatenate(codes) if codes else None,
        )
    features = [record.features.values.astype(np.float32, copy=False) for record in records if record.features]
    entropies = [record.reference_entropy for record in records if record.reference_entropy is not None]
    supports = [record.support for record in records if record.support is not None]
    drawn = [record.drawn_emitted for record in records if record.drawn_emitted is not None]
    recovered = [record.recovered for record in records if record.recovered is not None]
    return TokenRecord(
        vocab_size=first.vocab_size,
        prompt_key=b"",
        output_ids=np.concatenate([record.output_ids for record in records]),
        compressed=_candidates([record.compressed for record in records]),
        reference_at=np.concatenate([record.reference_at for record in records]),
        reference=_candidates([record.reference for record in records]),
        compressed_emitted=np.concatenate([record.compressed_emitted for record in records]),
        reference_emitted=np.concatenate([record.reference_emitted for record in records]),
        reference_entropy=np.concatenate(entropies) if entropies else None,
        support=np.concatenate(supports) if supports else None,
        constraint=first.constraint,
        sampling=first.sampling,
        applied=first.applied,
        drawn_emitted=np.concatenate(drawn) if drawn else None,
        shifts=shifts,
        features=None if first.features is None else Features(first.features.anchors, np.concatenate(features)),
        recovered=_recovered(recovered) if recovered else None,
    )


def _candidates(parts: Sequence[Candidates]) -> Candidates:
    return Candidates(np.concatenate([part.ids for part in parts]), np.concatenate([part.logprobs for part in parts]))


def _recovered(parts: Sequence[RecoveredDivergence]) -> RecoveredDivergence:
    names = [each.name for each in fields(RecoveredDivergence)]
    return RecoveredDivergence(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _rows(figures: TokenDivergence, rows: slice) -> TokenDivergence:
    """Returns the figures of one request."""

    def at(interval: Interval) -> Interval:
        return Interval(interval.lower[rows], interval.upper[rows])

    ends = figures.bounds
    return TokenDivergence(
        bound=figures.bound,
        bounds=Bounds(at(ends.kl_rc), at(ends.kl_cr), at(ends.js), at(ends.tv), ends.min_ratio),
        **{name: getattr(figures, name)[rows] for name in _ARRAYS},
    )
