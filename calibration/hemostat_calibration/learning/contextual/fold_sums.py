"""Streaming sufficient statistics of the linear map, by fold: constant in size, added up in any order.

With x̃ = [x; 1] the features that the map reads, z the centred logits at all anchors and h_r the reference's hidden
state, Σ x̃ zᵀ and Σ x̃ h_rᵀ are all that a linear regression of h_r − h_c on x̃ needs, as h_c is a linear function of z
(`hidden_states.linear_recovery`) that may be estimated later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hemostat_calibration.arrays import Floats, Singles, frozen, singles_of
from hemostat_calibration.learning.contextual.basis import Basis
from hemostat_calibration.learning.contextual.regression import Moments
from hemostat_calibration.learning.contextual.rows import TokenRows

FLUSH_TOKENS = 1024
"""The number of tokens of a fold that are collected before they are added to its sums: the sums are large, so that
adding is slow."""


@dataclass(frozen=True, slots=True)
class Forgetting:
    """The exponential discount by age. half_life_tokens: age at which a token counts half; None never forgets.

    >>> Forgetting(100.0).weight(200)
    0.25
    >>> Forgetting(None).weight(200)
    1.0
    """

    half_life_tokens: float | None

    def weight(self, age: int) -> float:
        """Returns the weight of a token that is `age` tokens old."""
        return 1.0 if self.half_life_tokens is None else 0.5 ** (age / self.half_life_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class FoldSums:
    """Sums over one fold's rows, discounted to `clock`; arrays are read-only.

    cross: float64 [A + 1, N], Σ x̃ zᵀ. target: float64 [A + 1, d], Σ x̃ h_rᵀ. weight: Σ of the rows' weights.
    clock: number of tokens that the learner had seen. waiting: rows not yet added.
    """

    cross: Floats
    target: Floats
    weight: float = 0.0
    clock: int = 0
    waiting: tuple[TokenRows, ...] = ()


def empty_fold(features: int, anchors: int, width: int) -> FoldSums:
    """Returns the sums before the first row. features: A, anchors: N, width: d.

    >>> empty_fold(2, 3, 4).cross.shape, empty_fold(2, 3, 4).target.shape
    ((3, 3), (3, 4))
    """
    return FoldSums(frozen(np.zeros((features + 1, anchors))), frozen(np.zeros((features + 1, width))))


def inputs_of(z: Singles, features: int) -> Singles:
    """Returns x̃ = [x; 1], float32 [T, A + 1], for centred logits z at the anchors, [T, N].

    >>> inputs_of(np.array([[1.0, 2.0, -3.0]], np.float32), 2).tolist()
    [[1.0, 2.0, 1.0]]
    """
    return np.column_stack([z[:, :features], np.ones(len(z), np.float32)])


def with_rows(fold: FoldSums, rows: TokenRows, clock: int, forgetting: Forgetting) -> FoldSums:
    """Returns `fold` with one more prompt's rows, which must have features and hidden states. clock: tokens seen at
    their end.

    >>> rows = TokenRows(0, 2, 2, np.ones((2, 3), np.float16), np.full((2, 4), 2.0, np.float16))
    >>> len(with_rows(empty_fold(2, 3, 4), rows, 2, Forgetting(None)).waiting)
    1
    """
    fold = replace(fold, waiting=(*fold.waiting, rows))
    return flushed(fold, clock, forgetting) if sum(r.tokens for r in fold.waiting) >= FLUSH_TOKENS else fold


def flushed(fold: FoldSums, clock: int, forgetting: Forgetting) -> FoldSums:
    """Returns the fold with the waiting rows added to the sums, all discounted to `clock`.

    >>> rows = TokenRows(0, 2, 2, np.ones((2, 3), np.float16), np.full((2, 4), 2.0, np.float16))
    >>> fold = with_rows(empty_fold(2, 3, 4), rows, 2, Forgetting(None))
    >>> flushed(fold, 2, Forgetting(None)).target.tolist()
    [[4.0, 4.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0]]
    """
    past = forgetting.weight(clock - fold.clock)
    waiting = [r for r in fold.waiting if r.features is not None and r.hidden is not None]
    if not waiting:
        return FoldSums(frozen(fold.cross * past), frozen(fold.target * past), fold.weight * past, clock)
    z = singles_of([r.features for r in waiting if r.features is not None])
    h = singles_of([r.hidden for r in waiting if r.hidden is not None])
    w = np.concatenate([np.full(r.tokens, forgetting.weight(clock - r.clock)) for r in waiting])
    x = inputs_of(z, len(fold.cross) - 1)
    weighted = (x * w[:, None].astype(np.float32)).T
    # The sums are large: where nothing is forgotten they are read once, and not copied first.
    cross, target = (fold.cross, fold.target) if past == 1.0 else (fold.cross * past, fold.target * past)
    return FoldSums(
        frozen(cross + weighted @ z), frozen(target + weighted @ h), fold.weight * past + float(w.sum()), clock
    )


def moments_in_basis(fold: FoldSums, basis: Basis) -> Moments:
    """Returns Σ s sᵀ and Σ s tᵀ of a flushed fold, of inputs s = `basis.reads` x̃ and targets t = Lᵀ (h_r − E[h_c |
    z])."""
    features = len(fold.cross) - 1
    count = np.append(fold.cross[-1, :features], fold.weight)
    xx = np.column_stack([fold.cross[:, :features], count])
    xy = fold.target @ basis.root - np.outer(count, basis.offset) - fold.cross @ basis.gain.T
    return Moments(basis.reads @ xx @ basis.reads.T, basis.reads @ xy, fold.weight)


def moments_of_rows(x: Singles, target: Singles, weights: Floats) -> Moments:
    """Returns the moments of rows: x [n, A + 1], target [n, d], weights [n].

    >>> x, target = np.array([[1.0, 1.0]], np.float32), np.array([[3.0]], np.float32)
    >>> moments_of_rows(x, target, np.array([2.0])).xy.tolist()
    [[6.0], [6.0]]
    """
    weighted = (x * weights[:, None].astype(np.float32)).T
    return Moments((weighted @ x).astype(np.float64), (weighted @ target).astype(np.float64), float(weights.sum()))
