"""Compares canaries that were asked for through a public address: each sequence may be answered by another engine.

A request is one sequence, whose distance is the one from the baseline replay that is nearest to this sequence. It votes
"changed" if that exceeds each baseline replay's distance from the one nearest to it, and the tolerance. If nothing has
changed, the R + 1 replays of a sequence are exchangeable, so that it does so with a probability of at most 1 / (R + 1),
whichever engine answers and in whichever mode. An engine's votes, one for each of its sequences, are therefore bounded
like the votes of a whole replay (`hemostat_calibration.canaries`). Two requests with a part far beyond its bound are a
change, too. Where it is not known which engine has answered, all requests count as one engine's: then few of many
requests show a change only by such parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import (
    MAX_SEQUENCES,
    MODE_TOLERANCES,
    PART_FACTOR,
    TOLERANCE_NATS,
    CanarySet,
    Comparison,
    parts_of,
    votes_needed,
)
from hemostat_calibration.errors import InvalidArgumentError

FAR_REQUESTS = 2
"""The number of an engine's requests with a part far beyond its bound that are a change."""


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """An answer. sequence: its number in the set. engine: which has answered; "" if that is not known. values: float64,
    the log-probabilities of its scored tokens, nats."""

    sequence: int
    engine: str
    values: Floats


@dataclass(frozen=True, slots=True, eq=False)
class _Bounds:
    """One sequence of the baseline. replays: float64 [R, T]. nearest: float64 [R], each replay's distance from the one
    nearest to it. parts: float64 [P], the largest ones of these in each part."""

    replays: Floats
    nearest: Floats
    parts: Floats
    pieces: Sequence[range]


@lru_cache(maxsize=2 * MAX_SEQUENCES)
def _bounds(taken: CanarySet, sequence: int) -> _Bounds:
    begin = sum(canary.scored for canary in taken.canaries[:sequence])
    canary = taken.canaries[sequence]
    replays = taken.baseline[:, begin : begin + canary.scored]
    pieces = parts_of(canary.scored, canary.answer_at)
    nearest, parts = [], []
    for n, replay in enumerate(replays):
        differences = np.abs(np.delete(replays, n, axis=0) - replay)
        closest = differences[differences.mean(axis=1).argmin()]
        nearest.append(closest.mean())
        parts.append([closest[piece].mean() for piece in pieces])
    return _Bounds(replays, np.array(nearest), np.array(parts).max(axis=0), pieces)


def _difference(bounds: _Bounds, values: Floats) -> Floats:
    """Returns |difference| of each token from the nearest baseline replay."""
    differences: Floats = np.abs(bounds.replays - values)
    nearest: Floats = differences[differences.mean(axis=1).argmin()]
    return nearest


def far_parts(taken: CanarySet, answer: Routed, tolerance: float = TOLERANCE_NATS) -> bool:
    """Returns True if a part of the sequence is farther than PART_FACTOR times its bound.

    >>> from hemostat_calibration.canaries import Canary, Origin
    >>> canaries = tuple(Canary("chat", np.arange(8, dtype=np.int32), np.arange(32, dtype=np.int32)) for _ in range(20))
    >>> taken = CanarySet(canaries, np.zeros((4, 20 * 39)), Origin("smollm2"))
    >>> [far_parts(taken, Routed(0, "a", np.full(39, shift))) for shift in (0.1, 1.0)]
    [False, True]
    """
    bounds = _bounds(taken, answer.sequence)
    difference = _difference(bounds, answer.values)
    found = np.array([difference[piece].mean() for piece in bounds.pieces])
    return bool((found > PART_FACTOR * np.maximum(bounds.parts, MODE_TOLERANCES * tolerance)).any())


def compare_routed(
    taken: CanarySet, answers: Iterable[Routed], tolerance: float = TOLERANCE_NATS
) -> dict[str, Comparison]:
    """Returns by engine the comparison of its answers with the baseline. Of several answers to one sequence the first
    one votes; `parts` are the numbers of all that are far away, if there are FAR_REQUESTS of them.

    >>> from hemostat_calibration.canaries import Canary, Origin
    >>> rng = np.random.default_rng(0)
    >>> canaries = tuple(Canary("chat", np.arange(8, dtype=np.int32), np.arange(32, dtype=np.int32)) for _ in range(20))
    >>> true = rng.normal(-2.0, 1.0, (20, 39))
    >>> taken = CanarySet(canaries, true.ravel() + rng.normal(0.0, 0.02, (4, true.size)), Origin("smollm2"))
    >>> answers = [Routed(n, "ab"[n % 2], true[n] + (n % 2) * rng.normal(0.0, 0.2, 39)) for n in range(20)]
    >>> {engine: found.changed for engine, found in compare_routed(taken, answers).items()}
    {'a': False, 'b': True}
    """
    by_engine: dict[str, list[Routed]] = {}
    for answer in answers:
        by_engine.setdefault(answer.engine, []).append(answer)
    return {engine: _comparison(taken, each, tolerance) for engine, each in by_engine.items()}


def _comparison(taken: CanarySet, answers: Sequence[Routed], tolerance: float) -> Comparison:
    first: dict[int, Routed] = {}
    for answer in answers:
        first.setdefault(answer.sequence, answer)
    bounds = [_bounds(taken, sequence) for sequence in first]
    distances = [
        float(_difference(its, answer.values).mean()) for its, answer in zip(bounds, first.values(), strict=True)
    ]
    weights = np.array([taken.canaries[sequence].scored for sequence in first], np.float64)
    then = np.average([its.nearest for its in bounds], axis=0, weights=weights)
    far = tuple(n for n, answer in enumerate(answers) if far_parts(taken, answer, tolerance))
    try:
        needed = votes_needed(len(first), len(taken.baseline))
    except InvalidArgumentError:
        needed = len(first) + 1  # too few sequences: only parts tell
    return Comparison(
        np.array(distances),
        np.maximum([its.nearest.max() for its in bounds], tolerance),
        needed,
        float(np.average(distances, weights=weights)),
        float(then.max()) + MODE_TOLERANCES * tolerance,
        far if len(far) >= FAR_REQUESTS else (),
    )


def missed(requests: int, share: float) -> float:
    """Returns the probability that an engine was never asked that each request reaches with a probability of `share`.

    >>> f"{missed(50, 0.1):.1%}"
    '0.5%'
    """
    return float((1.0 - share) ** requests)
