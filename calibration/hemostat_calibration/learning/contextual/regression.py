"""Reduced-rank ridge regression from sums alone, its penalty and rank chosen by cross-validation over folds.

Rows are pairs of inputs x̃ = [x; 1], [A + 1], and targets t, [d], in a basis in which half a squared length is in nats
(`objective`). B, [d, A + 1], is fitted to minimize ½ Σ |t − B x̃|². Up to a constant that is ½ tr(B XX Bᵀ) −
tr(B XY), so that XX = Σ x̃ x̃ᵀ and XY = Σ x̃ tᵀ suffice, for the rows learned from and for those held out.

A penalty λ |B|² in inputs of one common scale (the constant included, so that a large penalty gives B = 0) gives
B(λ)ᵀ = (XX + λ)⁻¹ XY. Of rank r, the best keeps the r largest singular values of (XX + λ)^½ B(λ)ᵀ (reduced-rank
regression: Izenman 1975; with ridge: Mukherjee & Zhu 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats

PENALTIES = tuple(10.0**e for e in (2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0, -3.5, -4.0))
"""The values of λ that are tried, as parts of the rows' weight, strongest first."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The sums over rows. xx: float64 [A + 1, A + 1], xy: [A + 1, d], weight: of the rows."""

    xx: Floats
    xy: Floats
    weight: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.xx + other.xx, self.xy + other.xy, self.weight + other.weight)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.xx - other.xx, self.xy - other.xy, self.weight - other.weight)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A map of low rank, B = V Y with Vᵀ V = 1. up: V, [d, r]. read: Y, [r, A + 1], the last column the constant's.

    penalty: λ / weight of the rows. gain: mean over the held-out rows of each fold in turn, nats, of the penalty and
    rank chosen; error: its standard error over the folds.
    """

    up: Floats
    read: Floats
    penalty: float
    gain: float
    error: float


def standardiser(moments: Moments) -> Floats:
    """Returns S, [A + 1, A + 1]: S x̃ has mean 0 and a variance that is 1 on average, but for the constant, which stays
    1.

    One scale for all inputs: those that vary more are to weigh more.

    >>> x, t = np.column_stack([np.arange(8.0), np.ones(8)]), 2.0 * np.arange(8.0)[:, None] + 1.0
    >>> def moments(rows):
    ...     return Moments(x[rows].T @ x[rows], x[rows].T @ t[rows], float(len(x[rows])))
    >>> s = standardiser(moments(slice(None)))
    >>> np.abs((x @ s.T).mean(axis=0)).round(6).tolist()
    [0.0, 1.0]
    """
    mean = moments.xx[-1, :-1] / moments.weight
    variance = float((np.diagonal(moments.xx)[:-1] / moments.weight - mean**2).mean())
    scale = np.full(len(mean), 1.0 / math.sqrt(variance) if variance > 1e-9 * (1.0 + float(mean @ mean)) else 1.0)
    s = np.diag(np.append(scale, 1.0))
    s[:-1, -1] = -scale * mean
    return s


def choose(folds: Sequence[Moments], ranks: Sequence[int]) -> LowRank | None:
    """Returns the map whose penalty and rank did best on each fold when learned from the others; learned from all of
    them.

    None if no map would gain, or a fold is empty. ranks: allowed ones.

    >>> x, t = np.column_stack([np.arange(8.0), np.ones(8)]), 2.0 * np.arange(8.0)[:, None] + 1.0
    >>> def moments(rows):
    ...     return Moments(x[rows].T @ x[rows], x[rows].T @ t[rows], float(len(x[rows])))
    >>> solution = choose([moments(slice(0, None, 2)), moments(slice(1, None, 2))], ranks=[1])
    >>> (solution.up @ solution.read).round(2).tolist()
    [[2.0, 1.0]]
    """
    if min(fold.weight for fold in folds) <= 0.0:
        return None
    whole = total(folds)
    s = standardiser(whole)
    held = [_standardised(fold, s) for fold in folds]
    fits = [_Fit(_standardised(whole - fold, s)) for fold in folds]
    weights = np.array([fold.weight for fold in folds])
    gains = np.stack([fit.gains(fold, PENALTIES) for fit, fold in zip(fits, held, strict=True)])
    penalty = PENALTIES[int(np.argmax(weights @ gains))]
    curves = [fit.gains_by_rank(fold, penalty) for fit, fold in zip(fits, held, strict=True)]
    most = min(map(len, curves))
    allowed = [rank for rank in ranks if rank <= most] or [most]
    by_rank = np.stack([curve[[rank - 1 for rank in allowed]] for curve in curves])
    best = int(np.argmax(weights @ by_rank))
    mean = float(weights @ by_rank[:, best] / weights.sum())
    if mean <= 0.0:
        return None
    up, read = _Fit(_standardised(whole, s)).low_rank(penalty, allowed[best])
    spread = weights**2 @ (by_rank[:, best] - mean) ** 2 / weights.sum() ** 2
    error = math.sqrt(float(spread) * len(folds) / (len(folds) - 1))
    return LowRank(up=up, read=read @ s, penalty=penalty, gain=mean, error=error)


def fitted(moments: Moments, penalties: Sequence[float], rank: int) -> list[LowRank]:
    """Returns the map of each penalty, of that rank; their gains are not known (NaN).

    >>> x, t = np.column_stack([np.arange(8.0), np.ones(8)]), 2.0 * np.arange(8.0)[:, None] + 1.0
    >>> def moments(rows):
    ...     return Moments(x[rows].T @ x[rows], x[rows].T @ t[rows], float(len(x[rows])))
    >>> [(found.up @ found.read).round(2).tolist() for found in fitted(moments(slice(None)), [1e-6, 1.0], rank=1)]
    [[[2.0, 1.0]], [[1.0, 0.5]]]
    """
    s = standardiser(moments)
    fit = _Fit(_standardised(moments, s))
    result = []
    for penalty in penalties:
        up, read = fit.low_rank(penalty, rank)
        result.append(LowRank(up=up, read=read @ s, penalty=penalty, gain=math.nan, error=math.nan))
    return result


def full_rank(moments: Moments, penalty: float) -> Floats:
    """Returns the ridge regression of full rank, Bᵀ, [A + 1, d]. penalty: λ / weight.

    >>> x, t = np.column_stack([np.arange(8.0), np.ones(8)]), 2.0 * np.arange(8.0)[:, None] + 1.0
    >>> def moments(rows):
    ...     return Moments(x[rows].T @ x[rows], x[rows].T @ t[rows], float(len(x[rows])))
    >>> full_rank(moments(slice(None)), 1e-9).round(4).tolist()
    [[2.0], [1.0]]
    """
    s = standardiser(moments)
    standard = _standardised(moments, s)
    ridge = standard.xx + penalty * standard.weight * np.eye(len(s))
    coefficients: Floats = s.T @ np.linalg.solve(ridge, standard.xy)
    return coefficients


def total(parts: Sequence[Moments]) -> Moments:
    """Returns the sum of moments.

    >>> x, t = np.column_stack([np.arange(8.0), np.ones(8)]), 2.0 * np.arange(8.0)[:, None] + 1.0
    >>> def moments(rows):
    ...     return Moments(x[rows].T @ x[rows], x[rows].T @ t[rows], float(len(x[rows])))
    >>> total([moments(slice(0, 3)), moments(slice(3, None))]).weight
    8.0
    """
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def _standardised(moments: Moments, s: Floats) -> Moments:
    return Moments(s @ moments.xx @ s.T, s @ moments.xy, moments.weight)


class _Fit:
    """Ridge at every penalty, in the basis of XX's eigenvectors Q.

    Bᵀ there is D Qᵀ XY, with D = (XX + λ)⁻¹ diagonal.
    """

    def __init__(self, moments: Moments) -> None:
        values, self._q = np.linalg.eigh(moments.xx)
        self._values = np.maximum(values, 0.0)
        self._weight = moments.weight
        self._xy = self._q.T @ moments.xy

    def _of(self, held: Moments) -> tuple[Floats, Floats]:
        return self._q.T @ held.xx @ self._q, self._q.T @ held.xy

    def _ridge(self, penalty: float) -> Floats:
        ridge: Floats = self._values + penalty * self._weight
        return ridge

    def gains(self, held: Moments, penalties: Sequence[float]) -> Floats:
        """Returns the gains of the maps of every rank, on other rows: tr(PᵀE) − ½ tr(Pᵀ XX P) with P = D Qᵀ XY."""
        xx, images = self._of(held)
        linear = (self._xy * images).sum(axis=1)
        quadratic = xx * (self._xy @ self._xy.T)
        shrinks = [1.0 / self._ridge(penalty) for penalty in penalties]
        result = [d @ linear - 0.5 * d @ quadratic @ d for d in shrinks]
        return np.array(result, dtype=np.float64) / max(held.weight, 1e-12)

    def _components(self, penalty: float) -> tuple[Floats, Floats, Floats, Floats]:
        """Returns P, (XX + λ)^½, and of (XX + λ)^½ P = U S Vᵀ: U and S, largest first."""
        ridge = self._ridge(penalty)
        map_ = self._xy / ridge[:, None]
        half = np.sqrt(ridge)
        scaled = half[:, None] * map_
        squares, left = np.linalg.eigh(scaled @ scaled.T)
        kept = max(int((squares > 1e-10 * squares[-1]).sum()), 1)
        order = np.arange(len(squares))[::-1][:kept]
        return map_, half, left[:, order], np.sqrt(np.maximum(squares[order], 1e-300))

    def gains_by_rank(self, held: Moments, penalty: float) -> Floats:
        """Returns the gains of the maps of rank 1, 2, … on other rows: components add up, as their outputs are
        orthogonal.
        """
        xx, images = self._of(held)
        map_, half, left, sizes = self._components(penalty)
        inputs = left * (sizes / half[:, None])
        outputs = (left * half[:, None]).T @ map_ / sizes[:, None]
        gains = (inputs * (images @ outputs.T)).sum(axis=0) - 0.5 * (inputs * (xx @ inputs)).sum(axis=0)
        return np.asarray(np.cumsum(gains) / max(held.weight, 1e-12))

    def low_rank(self, penalty: float, rank: int) -> tuple[Floats, Floats]:
        """Returns V [d, r] and Y [r, A + 1]."""
        map_, half, left, sizes = self._components(penalty)
        left, sizes = left[:, :rank], sizes[:rank]
        up = map_.T @ (left * half[:, None]) / sizes
        read = (self._q @ (left * (sizes / half[:, None]))).T
        return up, read
