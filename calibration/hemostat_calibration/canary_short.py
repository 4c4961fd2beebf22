"""Short canaries: one sequence of at most 20 tokens at a time, so often that a fault which many sequences show is
stated within a minute.

Up to SHORT_SEQUENCES sequences, each the end of a canary's prompt and the beginning of its answer, have a baseline of
their own. They are asked for one at a time, in a random order without repetition. A sequence is *suspicious* if its
distance from the nearest baseline replay of this sequence exceeds its bound, the largest one that a baseline replay has
from its nearest, by more than a mode of the engine's kernels may. Then it is asked for again at once, and if it is
suspicious again, all sequences are replayed at once.

**The statement** follows from this whole replay alone, by the test of `hemostat_calibration.canaries`, or as a sequence
is beyond PART_FACTOR times its bound for the third time in a row. The votes of a whole replay are bounded by
ALPHA_PER_YEAR if there are at most REPLAYS_PER_YEAR of them, two an hour, so `ShortWatch` allows no more. Suspicions
only choose when one is made: what they have seen is no part of it, and noise that is independent between replays does
not know of it. A mode that lasts does know, and is why the mean distance has to exceed the largest one of a mode, too.
What modes do was simulated (`tests/bench/canary_modes.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import (
    MODE_TOLERANCES,
    PART_FACTOR,
    TOLERANCE_NATS,
    Canary,
    CanarySet,
    Comparison,
)

SHORT_SEQUENCES = 30
SHORT_PROMPT, SHORT_ANSWER = 9, 10
"""The largest numbers of tokens of a sequence's prompt and of its answer; with the one that is generated, 20."""
SHORT_ROUNDS = 2
"""The number of times that the baseline replays of a set are made: eight replays, of one moment."""
WHOLE_REPLAYS = 2
"""The largest number of whole replays in an hour."""
HOUR_SECONDS = 3600.0


def short_sequences(canaries: Sequence[Canary]) -> tuple[Canary, ...]:
    """Returns the short sequences of a set.

    >>> canaries = [Canary("chat", np.arange(30, dtype=np.int32), np.arange(40, dtype=np.int32))] * 50
    >>> short = short_sequences(canaries)
    >>> len(short), short[0].tokens, sum(canary.tokens for canary in short)
    (30, 20, 600)
    """
    chosen = np.unique(np.linspace(0, len(canaries) - 1, min(len(canaries), SHORT_SEQUENCES)).round().astype(int))
    return tuple(
        Canary(canary.kind, canary.prompt[-SHORT_PROMPT:], canary.answer[:SHORT_ANSWER])
        for canary in (canaries[n] for n in chosen.tolist())
    )


@lru_cache(maxsize=8 * SHORT_SEQUENCES)
def _bound(taken: CanarySet, sequence: int) -> tuple[Floats, float]:
    """Returns the baseline of one sequence, float64 [R, T], and the largest distance of one of its replays from the one
    nearest to it."""
    begin = sum(canary.scored for canary in taken.canaries[:sequence])
    replays = taken.baseline[:, begin : begin + taken.canaries[sequence].scored]
    distances = np.abs(replays[:, np.newaxis] - replays).mean(axis=-1)
    np.fill_diagonal(distances, np.inf)
    return replays, float(distances.min(axis=1).max())


def excesses(taken: CanarySet, sequence: int, values: Floats, tolerance: float = TOLERANCE_NATS) -> Floats:
    """Returns by how much replays of a sequence are farther from the baseline than its bound and a mode together, in
    nats; one above zero is suspicious.

    values: float64 [..., T], the log-probabilities of its scored tokens.

    >>> from hemostat_calibration.canaries import Origin
    >>> canaries = tuple(Canary("chat", np.arange(9, dtype=np.int32), np.arange(10, dtype=np.int32)) for _ in range(20))
    >>> taken = CanarySet(canaries, np.zeros((4, 20 * 18)), Origin("smollm2"))
    >>> (excesses(taken, 3, np.array([[0.02] * 18, [0.2] * 18])) > 0.0).tolist()
    [False, True]
    """
    replays, bound = _bound(taken, sequence)
    nearest = np.abs(values[..., np.newaxis, :] - replays).mean(axis=-1).min(axis=-1)
    found: Floats = nearest - bound - MODE_TOLERANCES * tolerance
    return found


def is_far(taken: CanarySet, sequence: int, values: Floats, tolerance: float = TOLERANCE_NATS) -> bool:
    """Returns True if a sequence is beyond PART_FACTOR times its bound. values: float64 [T].

    >>> from hemostat_calibration.canaries import Origin
    >>> canaries = tuple(Canary("chat", np.arange(9, dtype=np.int32), np.arange(10, dtype=np.int32)) for _ in range(20))
    >>> taken = CanarySet(canaries, np.zeros((4, 20 * 18)), Origin("smollm2"))
    >>> is_far(taken, 3, np.full(18, 0.1)), is_far(taken, 3, np.full(18, 0.2))
    (False, True)
    """
    mode = MODE_TOLERANCES * tolerance
    _, bound = _bound(taken, sequence)
    return bool(excesses(taken, sequence, values, tolerance) + bound + mode > PART_FACTOR * max(bound, mode))


@dataclass(frozen=True, slots=True)
class ShortState:
    """The state that outlasts the control process. since: of a statement, Unix time. wholes: the times of the last
    whole replays, Unix times. found: the last one."""

    since: float | None = None
    wholes: tuple[float, ...] = ()
    found: Comparison | None = None


class ShortWatch:
    """Owns what is suspected of one engine, and what is stated. Times are Unix times.

    The caller asks for a sequence, hands its values to `suspects`, and asks again or for all as that says.
    """

    def __init__(self, tolerance: float = TOLERANCE_NATS, state: ShortState | None = None) -> None:
        self._tolerance = tolerance
        self.state = state or ShortState()
        self._far: set[int] = set()
        """The sequences that were far away in both replays before a whole one."""

    def suspects(self, taken: CanarySet, sequence: int, values: Floats) -> bool:
        """Returns True if a replay of a sequence is suspicious: it is to be asked for again at once."""
        return bool(excesses(taken, sequence, values, self._tolerance) > 0.0)

    def confirmed(self, taken: CanarySet, sequence: int, first: Floats, second: Floats, now: float) -> bool:
        """Takes both replays of a sequence whose first one was suspicious. Returns True if all sequences are to be
        replayed now, and counts this replay."""
        if not self.suspects(taken, sequence, second) or self.state.since is not None:
            return False
        recent = tuple(at for at in self.state.wholes if now - at < HOUR_SECONDS)
        if len(recent) >= WHOLE_REPLAYS:
            return False
        far = all(is_far(taken, sequence, values, self._tolerance) for values in (first, second))
        self._far = {sequence} if far else set()
        self.state = ShortState(None, (*recent, now), self.state.found)
        return True

    def whole(self, taken: CanarySet, values: Floats, now: float) -> bool:
        """Takes the replay of all sequences. values: float64 [N]. Returns True if it is stated that the engine has
        changed."""
        found = taken.compare(values, self._tolerance)
        by_votes = found.differs and found.mean > found.allowed
        stated = by_votes or any(n in found.parts for n in self._far)
        self.state = ShortState(now if stated else None, self.state.wholes, found)
        return stated

    def passed(self, taken: CanarySet, values: Floats) -> bool:
        """Takes the replays of all sequences, one after the other, in which none had to be asked for again or something
        is stated. values: float64 [N]. Returns True if nothing is stated any more that was."""
        found = taken.compare(values, self._tolerance)
        if self.state.since is None or found.changed or found.differs:
            return False
        self.state = ShortState(None, self.state.wholes, found)
        return True
