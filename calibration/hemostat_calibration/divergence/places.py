"""A request's figures by where its tokens stand: position in the output, length of the context, thinking or answer.

Errors of a compressed model may grow with the length of what it has read: rounding of a quantized KV cache adds up over
the context. Buckets have fixed edges, so that their number is bounded, and the buckets of several Hemostats can be
summed.
"""

from __future__ import annotations

import numpy as np

from hemostat_calibration.arrays import Bools, Ids
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.reasoning import thinking_mask
from hemostat_calibration.records import TokenRecord

POSITION_EDGES = (16, 64, 256, 1024, 4096)
"""The edges of the buckets of positions in the output, counted from 0."""
CONTEXT_EDGES = (512, 2048, 8192, 32768, 131072)
"""The edges of the buckets of the number of tokens before a position."""
THINKING, ANSWER = PHASES = ("thinking", "answer")


def bucket_labels(edges: tuple[int, ...]) -> tuple[str, ...]:
    """Returns the names of the buckets that the edges make, one more than there are edges.

    >>> bucket_labels((16, 64))
    ('0-15', '16-63', '64+')
    """
    lows = (0, *edges)
    return (*(f"{low}-{high - 1}" for low, high in zip(lows, edges, strict=False)), f"{edges[-1]}+")


def buckets(first: int, tokens: int, edges: tuple[int, ...]) -> Ids:
    """Returns the bucket of each of the values first, first + 1, … (`tokens` of them): int32 [tokens], 0 to len(edges).
    Raises InvalidArgumentError if first or tokens is below 0.

    >>> buckets(14, 4, (16, 64)).tolist()
    [0, 0, 1, 1]
    """
    if first < 0 or tokens < 0:
        raise InvalidArgumentError(f"first is {first}, tokens is {tokens}: neither may be below 0")
    return np.searchsorted(np.asarray(edges), np.arange(first, first + tokens), side="right").astype(np.int32)


def by_position(record: TokenRecord) -> dict[str, Bools]:
    """Returns by bucket of the position in the output its tokens in the record, bool [T]; buckets without a token are
    absent.

    >>> from hemostat_calibration.records import Candidates
    >>> ids, logs = np.array([[0, 1]] * 3, np.int32), np.log([[0.7, 0.3]] * 3)
    >>> record = TokenRecord(
    ...     2, b"", ids[:, 0], Candidates(ids, logs), logs, Candidates(ids, logs), logs[:, 0], logs[:, 0], position=15
    ... )
    >>> {name: at.tolist() for name, at in by_position(record).items()}
    {'0-15': [True, False, False], '16-63': [False, True, True]}
    """
    return _masks(record.position, record.tokens, POSITION_EDGES)


def by_context(record: TokenRecord) -> dict[str, Bools]:
    """Returns by bucket of the number of tokens before a token the record's tokens, bool [T]; empty where that is not
    known.

    >>> from dataclasses import replace
    >>> from hemostat_calibration.records import Candidates
    >>> ids, logs = np.array([[0, 1]] * 2, np.int32), np.log([[0.7, 0.3]] * 2)
    >>> record = TokenRecord(
    ...     2, b"", ids[:, 0], Candidates(ids, logs), logs, Candidates(ids, logs), logs[:, 0], logs[:, 0]
    ... )
    >>> by_context(record), list(by_context(replace(record, context_tokens=40_000)))
    ({}, ['32768-131071'])
    """
    return _masks(record.context_tokens, record.tokens, CONTEXT_EDGES) if record.context_tokens else {}


def by_phase(record: TokenRecord) -> dict[str, Bools]:
    """Returns by phase the record's tokens, bool [T]; empty where no thinking was found.

    >>> from dataclasses import replace
    >>> from hemostat_calibration.reasoning import Thinking
    >>> from hemostat_calibration.records import Candidates
    >>> ids, logs = np.array([[0, 1]] * 2, np.int32), np.log([[0.7, 0.3]] * 2)
    >>> record = TokenRecord(
    ...     2, b"", ids[:, 0], Candidates(ids, logs), logs, Candidates(ids, logs), logs[:, 0], logs[:, 0]
    ... )
    >>> phases = by_phase(replace(record, thinking=Thinking(0, 1, ended=True)))
    >>> {name: at.tolist() for name, at in phases.items()}
    {'thinking': [True, False], 'answer': [False, True]}
    """
    if record.thinking is None:
        return {}
    thinking = thinking_mask(record.thinking, record.position, record.tokens)
    return {name: at for name, at in ((THINKING, thinking), (ANSWER, ~thinking)) if at.any()}


def _masks(first: int, tokens: int, edges: tuple[int, ...]) -> dict[str, Bools]:
    numbers, names = buckets(first, tokens, edges), bucket_labels(edges)
    return {names[n]: numbers == n for n in np.unique(numbers).tolist()}
