"""Tokens as the contextual learner keeps them: features, hidden states or lists, and the fold of their prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Bools, Floats, Halves, Ids, Singles
from hemostat_calibration.records import TokenRecord

FOLDS = 4
"""The number of parts of the learning prompts, for cross-validation."""
MAX_HALF = 60000.0
"""The limit to which values are clipped: it is within the range of float16."""


class TokenSource(StrEnum):
    """The content of a token's record, by which tokens are counted."""

    HIDDEN = "hidden"
    """The record has features of the engine and the reference's hidden state: it is exact."""
    HIDDEN_FROM_LIST = "hidden_from_list"
    """The record has the hidden state, but no features. The reference's own logits at the anchors take the place of the
    compressed model's, and the difference is known at the compressed model's candidates only. Less is learned, and the
    gain is not measured, as that requires features."""
    LIST = "list"
    """The record has features, but of the reference only its likeliest ids."""
    UNUSABLE = "unusable"
    """The record has neither features nor a hidden state; or the token is one of the rows of a record for which the
    engine gave no features.
    """


@dataclass(frozen=True, slots=True, eq=False)
class ListedTokens:
    """Tokens that are known by lists of ids.

    ids: int32 [T, J], the ids whose log-probabilities are known; -1 pads.
    reference: float64 [T, J], the reference's log-probabilities of them, nats.
    compressed: float64 [T, J], the compressed model's; None if it gave none for these ids.
    likeliest: the compressed model's likeliest id, [T], and its log-probability, [T].
    """

    ids: Ids
    reference: Floats
    compressed: Floats | None
    likeliest: tuple[Ids, Floats]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Tokens of one prompt; arrays are read-only.

    fold: of the prompt. clock: number of tokens that the learner had seen at their end. tokens: T.
    features: float16 [T, N], centred logits at the anchors; None if the engine gave none.
    hidden: float16 [T, d], the reference's hidden states; None if it gave none.
    listed: set only where features or hidden is missing.
    """

    fold: int
    clock: int
    tokens: int
    features: Halves | None
    hidden: Halves | None
    listed: ListedTokens | None = None


def fold_of(unit: bytes) -> int:
    """Returns the fold of an evidence unit, 0 to `FOLDS` − 1: a function of its digest alone, so that a conversation's
    turns are in one fold.

    >>> fold_of(b"a conversation") == fold_of(b"a conversation")
    True
    """
    return hashlib.blake2b(unit, digest_size=8, person=b"hemostat.folds").digest()[0] % FOLDS


def rows_of(record: TokenRecord, anchors: str, clock: int) -> tuple[TokenSource, TokenRows | None]:
    """Returns the usable tokens of a validated record, with their source; None if there are none.

    anchors: digest of the anchors; features of other anchors are not used. clock: tokens seen before this record.
    """
    features = record.features
    usable = features is not None and features.anchors == anchors
    if features is not None and usable:
        kept = ~np.isnan(features.values[:, 0])
        usable = bool(kept.any())
    if not usable:
        features, kept = None, np.ones(record.tokens, dtype=np.bool_)
    if features is None and record.reference_hidden is None:
        return TokenSource.UNUSABLE, None
    if features is None:
        source = TokenSource.HIDDEN_FROM_LIST
    else:
        source = TokenSource.LIST if record.reference_hidden is None else TokenSource.HIDDEN
    tokens = int(kept.sum())
    return source, TokenRows(
        fold=fold_of(record.unit),
        clock=clock + tokens,
        tokens=tokens,
        features=None if features is None else _halves(features.values, kept),
        hidden=None if record.reference_hidden is None else _halves(record.reference_hidden, kept),
        listed=_listed(record, kept, source),
    )


def newest(rows: Sequence[TokenRows], max_tokens: int) -> tuple[TokenRows, ...]:
    """Returns the last rows, oldest first, of at most `max_tokens` tokens; at least the very last one.

    >>> rows = [TokenRows(0, clock, 10, None, None) for clock in (10, 20, 30)]
    >>> [r.clock for r in newest(rows, 20)]
    [20, 30]
    """
    total = sum(r.tokens for r in rows)
    first = 0
    while total > max_tokens and first < len(rows) - 1:
        total -= rows[first].tokens
        first += 1
    return tuple(rows[first:])


def batched(rows: Sequence[TokenRows], tokens: int) -> Iterator[list[TokenRows]]:
    """Yields rows in order, about `tokens` tokens at a time.

    >>> rows = [TokenRows(0, clock, 10, None, None) for clock in (10, 20, 30)]
    >>> [len(batch) for batch in batched(rows, 20)]
    [2, 1]
    """
    batch: list[TokenRows] = []
    for row in rows:
        batch.append(row)
        if sum(r.tokens for r in batch) >= tokens:
            yield batch
            batch = []
    if batch:
        yield batch


def folds_and_prompts(rows: Sequence[TokenRows]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the fold of every token, and the number of its prompt within `rows`, both int [n].

    >>> rows = [TokenRows(fold, 0, 2, None, None) for fold in (3, 1)]
    >>> fold, prompt = folds_and_prompts(rows)
    >>> fold.tolist(), prompt.tolist()
    ([3, 3, 1, 1], [0, 0, 1, 1])
    """
    tokens = [r.tokens for r in rows]
    return np.repeat([r.fold for r in rows], tokens), np.repeat(np.arange(len(rows)), tokens)


def _listed(record: TokenRecord, kept: Bools, source: TokenSource) -> ListedTokens | None:
    if source is TokenSource.HIDDEN:
        return None
    compressed, reference = record.compressed, record.reference
    likeliest = compressed.ids[kept, 0], compressed.logprobs[kept, 0]
    if source is TokenSource.LIST:
        return ListedTokens(reference.ids[kept], reference.logprobs[kept], None, likeliest)
    ids = np.where(np.isnan(record.reference_at), -1, compressed.ids).astype(np.int32)
    return ListedTokens(ids[kept], record.reference_at[kept], compressed.logprobs[kept], likeliest)


def _halves(values: Singles | Halves, kept: Bools) -> Halves:
    """Returns the kept rows. Values that are halves already are not changed, and not copied where all are kept."""
    rows = values if kept.all() else values[kept]
    if rows.dtype == np.float16:
        result: Halves = rows.view(np.float16)
    else:
        result = np.clip(rows, -MAX_HALF, MAX_HALF).astype(np.float16)
    result.flags.writeable = False
    return result
