"""Distances of two models on the same tokens, from lists of their likeliest ids.

Two figures, float64 [T], both of distributions at temperature 1:

- `sampled_distance` is an estimate of the total variation without bias, however short the lists are. With y ~ p, the
  total variation is Σ (p − q)⁺ = E[(1 − q(y)/p(y))⁺]. Where y is one of the ids S whose values both lists give, its
  term is replaced by the mean over S, Σ_S (p − q)⁺ / p(S): the conditional expectation given y ∈ S, which leaves the
  mean as it is and lowers the variance (Rao–Blackwell). S must not depend on y, so an id that a list names only because
  it was emitted is not in it. Every value is within [0, 1]. It holds only if y was sampled from the whole of p, at
  temperature 1 without top-p, top-k or min-p.
- `distance_gain` compares two models' distances from a third one where the tokens are of neither: the total variation
  over the ids that all lists give and one bucket for the others, the same partition for both. Merging ids cannot
  increase a distance (data processing inequality; Cover & Thomas, 2006, ch. 2.8), so a difference that is only within
  the bucket is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Listed:
    """One model's values of T tokens. The endpoints of the gate make it; `distance` reads it.

    ids: int32 [T, K], the likeliest ids, whatever was emitted; -1 pads. logprobs: float64 [T, K], nats. emitted:
    float64 [T], of the token that is there, nats.
    """

    ids: Ids
    logprobs: Floats
    emitted: Floats

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.logprobs.shape or len(self.ids) != len(self.emitted):
            shapes = f"{self.ids.shape}, {self.logprobs.shape} and {self.emitted.shape}"
            raise InvalidArgumentError(f"the shapes are {shapes}: they must be [T, K], [T, K] and [T]")

    @property
    def tokens(self) -> int:
        return len(self.emitted)

    def at(self, ids: Ids) -> Floats:
        """Returns the log-probabilities of `ids` [T, J], float64, nats; NaN where the list does not name the id."""
        same = (ids[:, :, None] == self.ids[:, None, :]) & (ids[:, :, None] >= 0)
        place = same.argmax(axis=2)
        values = np.take_along_axis(self.logprobs, place, axis=1)
        return np.where(same.any(axis=2), values, np.nan)


def sampled_distance(p: Listed, q: Listed, output: Ids) -> Floats:
    """Returns an unbiased estimate of the total variation of p and q at each token, float64 [T], 0 to 1. output: int32
    [T], the tokens, sampled from p.

    >>> ids = np.array([[0, 1]], np.int32)
    >>> p = Listed(ids, np.log([[0.6, 0.3]]), np.log([0.6]))
    >>> q = Listed(ids, np.log([[0.5, 0.3]]), np.log([0.5]))
    >>> sampled_distance(p, q, np.array([0], np.int32)).round(4).tolist()
    [0.1111]
    """
    _require_alike(p, q, output)
    log_q = q.at(p.ids)
    known = ~np.isnan(log_q) & (p.ids >= 0)
    p_known = np.where(known, np.exp(p.logprobs), 0.0)
    mass = p_known.sum(axis=1)
    above = np.maximum(p_known - np.where(known, np.exp(np.where(known, log_q, 0.0)), 0.0), 0.0).sum(axis=1)
    inside = (known & (p.ids == output[:, None])).any(axis=1)
    within = np.divide(above, mass, out=np.zeros_like(above), where=mass > 0.0)
    alone = np.maximum(1.0 - np.exp(np.minimum(q.emitted - p.emitted, 0.0)), 0.0)
    return np.clip(np.where(inside, within, alone), 0.0, 1.0)


def distance_gain(reference: Listed, candidate: Listed, stable: Listed) -> Floats:
    """Returns by how much the candidate is farther from the reference than the stable model, in total variation over
    the ids that all three lists name and one bucket, float64 [T], -1 to 1.

    >>> ids = np.array([[0, 1]], np.int32)
    >>> r, c, s = (Listed(ids, np.log([[a, 0.2]]), np.log([a])) for a in (0.6, 0.4, 0.5))
    >>> distance_gain(r, c, s).round(4).tolist()
    [0.1]
    """
    log_c, log_r = candidate.at(stable.ids), reference.at(stable.ids)
    known = ~np.isnan(log_c) & ~np.isnan(log_r) & (stable.ids >= 0)
    r, c, s = (np.where(known, np.exp(np.where(known, values, 0.0)), 0.0) for values in (log_r, log_c, stable.logprobs))
    return _bucketed(r, c) - _bucketed(r, s)


def listed_distance(p: Listed, q: Listed) -> Floats:
    """Returns the total variation of p and q over the ids that both lists name and one bucket, float64 [T], 0 to 1:
    whatever the tokens were sampled from. It is never above the total variation.

    >>> ids = np.array([[0, 1]], np.int32)
    >>> p, q = (Listed(ids, np.log([[a, 0.2]]), np.log([a])) for a in (0.6, 0.4))
    >>> listed_distance(p, q).round(4).tolist()
    [0.2]
    """
    log_q = q.at(p.ids)
    known = ~np.isnan(log_q) & (p.ids >= 0)
    listed = (np.where(known, np.exp(np.where(known, values, 0.0)), 0.0) for values in (p.logprobs, log_q))
    return _bucketed(*listed)


def _bucketed(x: Floats, y: Floats) -> Floats:
    """Returns the total variation over the columns and what is left of each, [T]."""
    left = np.abs(x.sum(axis=1) - y.sum(axis=1))
    distance: Floats = 0.5 * (np.abs(x - y).sum(axis=1) + left)
    return np.minimum(distance, 1.0)


def _require_alike(p: Listed, q: Listed, output: Ids) -> None:
    if not p.tokens == q.tokens == len(output):
        raise InvalidArgumentError(
            f"there are values of {p.tokens} and {q.tokens} tokens, and {len(output)} tokens: they must be as many"
        )
