"""What a replica has learned, for the one that leads: rows with the sums of its tokens, which are no tokens.

The sums that a linear map is learned from (`statistics.FoldSums`) are Σ x̃ zᵀ and Σ x̃ h_rᵀ, with x the first A of z.
With the values of n tokens as X [n, A + 1] and the other ones, of z and h_r, as Y [n, N − A + d], let XᵀX = V Λ Vᵀ. The
rows of [Λ^½ Vᵀ, Λ^-½ Vᵀ XᵀY] have the same sums, and so have those of any rotation of them. There are at most A + 1,
however many tokens they stand for. They follow from the sums alone, so that they tell nothing that the sums do not: no
token, no order. Unlike parts of the sums, any of them can be added by itself: half of them is, about, half of the
tokens, as a fixed rotation spreads all directions over them.

Rows are shared once they stand for more tokens than the map reads numbers, A + 1, and for `MIN_CONVERSATIONS`
conversations: of fewer tokens the rows would span what the tokens themselves span, and so they would of one request
that is repeated. Whoever has both models and a text can still find out whether that text is among them, as from any
sums over so few tokens: a member is fitted better by their regression.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hemostat_calibration.arrays import Singles, frozen
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.learning.contextual.learner import ContextualLearner, ContextualState
from hemostat_calibration.learning.contextual.rows import FOLDS, TokenRows, TokenSource, rows_of
from hemostat_calibration.learning.contextual.seeded_numbers import normal
from hemostat_calibration.learning.contextual.statistics import FoldSums, flushed, inputs_of
from hemostat_calibration.records import TokenRecord

MIN_CONVERSATIONS = 8
"""That shared rows stand for at least. Requests are not counted: all of them may be turns of one conversation, which is
in one fold, or the same one again."""
GROWTH = 1 / 16
"""Of what was shared of a fold before, what has to come before more is shared: the bytes that are sent grow with the
logarithm of the tokens."""
_LEAST_EIGENVALUE = 1e-13
"""Of the largest one; below it is rounding."""
ROUNDING = 1e-3
"""Of the weight of shared rows, at most: they are float32."""
_MAX_VALUE = 1e12
"""Of shared rows: sums of their products fit float32, in which they are stored."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedRows:
    """rows: float32 [m, 1 + N + d], for each x̃, the rest of z, and h_r. tokens, requests: that they stand for."""

    fold: int
    tokens: int
    requests: int
    rows: Singles

    def parts(self, max_bytes: int, ones: int) -> Iterator[SharedRows]:
        """Each with rows of at most `max_bytes`, or one row. ones: the column of x̃'s 1, of which the squares are the
        tokens: each part has its own share of them, so that tokens and sums agree where parts are lost.

        >>> parts = SharedRows(3, 100, 8, np.full((5, 4), 20**0.5, np.float32)).parts(max_bytes=40, ones=0)
        >>> [(part.fold, part.tokens, part.requests, len(part.rows)) for part in parts]
        [(3, 40, 4, 2), (3, 40, 3, 2), (3, 20, 1, 1)]
        """
        step = max(1, max_bytes // (4 * self.rows.shape[1]))
        until = np.cumsum(np.square(self.rows[:, ones], dtype=np.float64))
        tokens = requests = 0
        for first in range(0, len(self.rows), step):
            rows = self.rows[first : first + step]
            share = float(until[first + len(rows) - 1] / until[-1]) if until[-1] > 0.0 else 1.0
            to_tokens, to_requests = (math.ceil(round(share * n, 6)) for n in (self.tokens, self.requests))
            yield replace(self, rows=rows, tokens=to_tokens - tokens, requests=to_requests - requests)
            tokens, requests = to_tokens, to_requests


@dataclass(frozen=True, slots=True, eq=False)
class Unshared:
    """Of one fold, what was learned from and not shared yet.

    rows: float32 [m, 1 + N + d], of tokens or of what stands for them. tokens, requests: that they stand for.
    shared: tokens that were shared before. units: digests of the conversations, `MIN_CONVERSATIONS` at most.
    """

    rows: Singles
    tokens: int = 0
    requests: int = 0
    shared: int = 0
    units: frozenset[bytes] = frozenset()


class Sharing:
    """Pure: takes and gives values. learner: its anchors and its output embedding; the same at all replicas.

    >>> learner = ContextualLearner(np.eye(3), np.arange(3))
    >>> [len(found.rows) for found in Sharing(learner).init()]
    [0, 0, 0, 0]
    """

    def __init__(self, learner: ContextualLearner) -> None:
        self._learner = learner
        self._features = learner.features
        self._width = 1 + len(learner.anchors) + learner.weight.shape[1]

    def init(self) -> tuple[Unshared, ...]:
        """By fold, before the first record."""
        return (Unshared(np.zeros((0, self._width), np.float32)),) * FOLDS

    def with_record(self, unshared: Sequence[Unshared], record: TokenRecord) -> tuple[Unshared, ...]:
        """And one more record that the learner has learned from (`ContextualLearner.update`). Tokens without features
        or without hidden states have no sums."""
        source, rows = rows_of(record, self._learner.digest, 0)
        if rows is None or source is not TokenSource.HIDDEN:
            return tuple(unshared)
        unit = record.unit
        return tuple(self._with_rows(one, rows, unit) if k == rows.fold else one for k, one in enumerate(unshared))

    def _with_rows(self, unshared: Unshared, rows: TokenRows, unit: bytes) -> Unshared:
        """At most 3 (A + 1) rows and those of one record are kept."""
        if rows.features is None or rows.hidden is None:
            return unshared
        z = rows.features.astype(np.float32)
        new = np.column_stack([inputs_of(z, self._features), z[:, self._features :], rows.hidden.astype(np.float32)])
        held = np.concatenate([unshared.rows, new])
        if len(held) > 3 * (self._features + 1):
            held = condensed(held, self._features + 1)
        units = unshared.units if len(unshared.units) >= MIN_CONVERSATIONS else unshared.units | {unit}
        tokens, requests = unshared.tokens + rows.tokens, unshared.requests + 1
        return replace(unshared, rows=held, tokens=tokens, requests=requests, units=units)

    def take_due(self, unshared: Sequence[Unshared]) -> tuple[tuple[Unshared, ...], list[SharedRows]]:
        """What is left, and what is to be shared now."""
        left, due = [], []
        for fold, one in enumerate(unshared):
            if not self.is_due(one):
                left.append(one)
                continue
            rows = spread(condensed(one.rows, self._features + 1))
            due.append(SharedRows(fold, one.tokens, one.requests, rows))
            left.append(Unshared(one.rows[:0], shared=one.shared + one.tokens))
        return tuple(left), due

    def is_due(self, one: Unshared) -> bool:
        """Whether it may be shared, and is worth it."""
        half_life = self._learner.forgetting.half_life_tokens
        before = one.shared if half_life is None else min(one.shared, half_life)
        enough = one.tokens > self._features + 1 and len(one.units) >= MIN_CONVERSATIONS
        return enough and one.tokens >= GROWTH * before

    def parts(self, shared: SharedRows, max_bytes: int) -> Iterator[SharedRows]:
        """See `SharedRows.parts`."""
        return shared.parts(max_bytes, self._features)

    def add(self, state: ContextualState, shared: SharedRows) -> ContextualState:
        """As the leader: what another replica has shared, as tokens that come now. They are not among the recent rows,
        nor in `tokens_by_source`. InvalidArgumentError where they are of another learner, or damaged."""
        rows, features = shared.rows, self._features
        if rows.ndim != 2 or rows.shape[1] != self._width or not (np.abs(rows) <= _MAX_VALUE).all():
            raise InvalidArgumentError(f"shared rows have shape {rows.shape}, or are not finite: [m, {self._width}]")
        if not (0 <= shared.fold < FOLDS and shared.tokens >= 0 and shared.requests >= 0):
            raise InvalidArgumentError(f"shared rows are of fold {shared.fold}, {shared.tokens} tokens")
        weight = float(np.square(rows[:, features], dtype=np.float64).sum())
        if abs(shared.tokens - weight) > 1.0 + ROUNDING * weight or shared.requests > shared.tokens + 2:
            raise InvalidArgumentError(
                f"shared rows have the weight of {weight:.0f} tokens, not {shared.tokens} of {shared.requests} requests"
            )
        tokens = state.tokens + shared.tokens
        fold = flushed(state.folds[shared.fold], tokens, self._learner.forgetting)
        values = rows.astype(np.float64)
        x = values[:, : features + 1]
        z = np.column_stack([x[:, :-1], values[:, features + 1 : 1 + len(self._learner.anchors)]])
        h = values[:, 1 + len(self._learner.anchors) :]
        added = FoldSums(
            frozen(fold.cross + x.T @ z),
            frozen(fold.target + x.T @ h),
            fold.weight + weight,
            tokens,
        )
        folds = tuple(added if k == shared.fold else one for k, one in enumerate(state.folds))
        return replace(state, folds=folds, tokens=tokens, requests=state.requests + shared.requests)


def condensed(rows: Singles, inputs: int) -> Singles:
    """At most `inputs` rows, float32, with the same sums of products of the first `inputs` columns with all columns;
    those of the other columns with each other are not kept.

    >>> rows = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    >>> found = condensed(rows, 2)
    >>> found.shape, bool(np.allclose(found[:, :2].T @ found, rows[:, :2].T @ rows, atol=1e-5))
    ((2, 5), True)
    """
    x = rows[:, :inputs].astype(np.float64)
    products = x.T @ rows.astype(np.float64)
    values, vectors = np.linalg.eigh(products[:, :inputs])
    kept = values > _LEAST_EIGENVALUE * max(float(values[-1]), 1e-300)
    roots = np.sqrt(values[kept])
    turned = vectors[:, kept].T
    found: Singles = np.column_stack(
        [roots[:, None] * turned, (turned @ products[:, inputs:]) / roots[:, None]]
    ).astype(np.float32)
    return found


def spread(rows: Singles) -> Singles:
    """The same rows rotated, so that each of them has a part of all: the sums stay.

    >>> rows = np.diag([4.0, 2.0, 1.0]).astype(np.float32)
    >>> found = spread(rows)
    >>> bool(np.allclose(found.T @ found, rows.T @ rows, atol=1e-5)), bool((np.abs(found) < np.diag(rows)).all())
    (True, True)
    """
    if not len(rows):
        return rows
    rotation, _ = np.linalg.qr(normal(len(rows), len(rows) ** 2).reshape(len(rows), -1).astype(np.float64))
    found: Singles = (rotation @ rows).astype(np.float32)
    return found
