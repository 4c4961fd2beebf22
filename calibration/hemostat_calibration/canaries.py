"""Scores the same token sequences again, to find out if an engine still computes what it computed when the set was
taken.

A `CanarySet` has sequences of token ids, and of each token the log-probability in several replays of the engine as it
was then: R baseline replays, one alone and the others together with other requests, so that they differ by what batch
shapes and chunks of a prefill do. The distance between two replays of a sequence is the mean over its tokens of
|difference of log-probabilities|, in nats.

**The test.** Of the present replay of a sequence and its R baseline replays, each one has a distance from the mean of
the other R. The sequence votes "changed" if the present one's exceeds all others', and the tolerance. An engine has
changed if at least `votes_needed` sequences vote so.

Of an unchanged engine all R + 1 replays of a sequence are exchangeable, and the present one is the farthest of them
with a probability of 1 / (R + 1), whatever the distribution of the noise. Sequences are replayed one at a time, each in
a batch of its own, so that votes are independent; then their number is binomial, and `votes_needed` is the smallest
number that is reached with a probability of at most ALPHA_PER_YEAR / REPLAYS_PER_YEAR. What an engine has in common for
a whole replay (such as a load that the baseline has not seen) is no part of that: so a replay that exceeds is repeated,
and only two in a row are a statement; the probability above belongs to the first one alone. A vote counts once however
far the sequence is away, so that no single one decides.

Engine against engine, a sequence votes if the distance of two engines exceeds the distance of each two baseline
replays. Of R + 2 exchangeable replays no two disjoint pairs can both exceed what is disjoint from them, so that at most
R + 1 of the (R + 2) (R + 1) / 2 pairs do, and a vote has a probability of at most 2 / (R + 2): more votes are needed
there. This is proven for two and three engines. Of more engines the median of the distances counts; its votes were no
more frequent in simulation, with noise of several shapes, and no bound below 4 / (R + 2) is known. All engines are
compared again after the replay of each, so each comparison has its part of ALPHA_PER_YEAR.

**The error rate.** Each replay of an engine may exceed by chance, independently of how many there were before: the
votes that it needs do not follow from a number of tests, and no alpha is spent over the lives of the process that could
be spent twice. So the number of replays bounds the error. At most `REPLAYS_PER_YEAR` of them, two an hour, call an
unchanged engine changed with a probability of at most ALPHA_PER_YEAR: for each engine, each model that it serves (the
base model and each adapter), and each of what they are compared with (the baseline, the other engines). It adds up over
these, and over the years. Replays that a start of the engine or of the control process asks for count, and so do
repetitions; a budget of tokens, which is stored before it is spent, allows two replays of a set of `MAX_TOKENS` an hour
in all lives together. Of a smaller set it allows more, and each replay beyond two an hour adds ALPHA_PER_YEAR /
REPLAYS_PER_YEAR: an engine that starts again and again could be asked that often.

>>> rng = np.random.default_rng(0)
>>> canaries = tuple(Canary("chat", np.arange(8, dtype=np.int32), np.arange(32, dtype=np.int32)) for _ in range(20))
>>> true = rng.normal(-2.0, 1.0, sum(canary.scored for canary in canaries))
>>> replays = true + rng.normal(0.0, 0.02, (4, len(true)))
>>> taken = CanarySet(canaries, replays, Origin("smollm2"))
>>> taken.compare(true + rng.normal(0.0, 0.02, len(true))).changed
False
>>> comparison = taken.compare(true + rng.normal(0.0, 0.05, len(true)))
>>> comparison.changed, comparison.votes, comparison.needed
(True, 20, 15)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from hemostat_calibration import state_codec
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.canary_cause import CauseBaseline
from hemostat_calibration.errors import InvalidArgumentError

REPLAYS = 4
"""The number of baseline replays: a sequence of an unchanged engine votes with a probability of 1 / 5."""
REPLAYS_PER_YEAR = 2 * 24 * 365
"""The number of replays in a year, two an hour: one that is due, and one that a start of the engine or a replay that
was too far away asks for.
"""
ALPHA_PER_YEAR = 0.01
"""The probability that an unchanged engine is ever called changed in a year with so many replays."""
MIN_SEQUENCES = 16
MAX_SEQUENCES = 100
MAX_TOKENS = 5_000
"""The largest number of tokens in all sequences of a set: a replay and its repetition are 10,000 tokens."""
TOLERANCE_NATS = 0.01
"""The mean distance of a sequence that is never a change: what another build or another GPU of the same kind may
compute differently, far less than another quantization does."""
ADAPTER_SEQUENCES = 20
"""The number of sequences of an adapter. They are the shortest ones, so that the sequences of several adapters fit next
to the base model's.
"""
SCHEMA = 2


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """One token sequence. kind: the kind of text, for readers. prompt: int32 [P], P ≥ 1. answer: int32 [A], A ≥ 1,
    which the model wrote.
    """

    kind: str
    prompt: Ids
    answer: Ids

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.tolist(), *self.answer.tolist()]

    @property
    def scored(self) -> int:
        """The number of log-probabilities, P + A − 1: each token but the first has one."""
        return len(self.prompt) + len(self.answer) - 1

    @property
    def tokens(self) -> int:
        """The number of tokens that a replay costs the engine, with the one that it generates."""
        return len(self.prompt) + len(self.answer) + 1


_SERVED = {
    "model": "model",
    "root": "path",
    "version": "vLLM",
    "max_model_len": "max_model_len",
    "weights": "fingerprint of the weights",
    "tokenizer": "tokenizer",
}
"""The fields of an origin that say what is served, and their names in texts."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The engine and the model that a set was taken from; a field is "" or 0 if it is not known.

    model: served name. root: the path that the server names. version: vLLM's. weights: the plugin's fingerprint.
    tokenizer: digest of a text's token ids. engine: its address. prompts: digest of the prompts. at: Unix time.

    >>> Origin("m", "/models/a", "0.31.0").changes(Origin("m", "/models/a", "0.32.0"))
    ['vLLM: 0.31.0, now 0.32.0']
    """

    model: str
    root: str = ""
    version: str = ""
    max_model_len: int = 0
    weights: str = ""
    tokenizer: str = ""
    engine: str = ""
    prompts: str = ""
    at: float = 0.0

    def changes(self, now: Origin) -> list[str]:
        """Returns as text what is known for both and is different."""
        pairs = [(name, getattr(self, field), getattr(now, field)) for field, name in _SERVED.items()]
        return [f"{name}: {then}, now {value}" for name, then, value in pairs if then and value and then != value]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The comparison of one replay of S sequences with the set.

    distances, bounds: float64 [S], nats; a sequence votes if its distance is above its bound. needed: the number of
    votes for a change.
    """

    distances: Floats
    bounds: Floats
    needed: int

    @property
    def votes(self) -> int:
        return int((self.distances > self.bounds).sum())

    @property
    def changed(self) -> bool:
        return self.votes >= self.needed

    @property
    def nats(self) -> float:
        """The median distance of the sequences."""
        return float(np.median(self.distances))

    @property
    def summary(self) -> str:
        """One line, without a verdict."""
        return (
            f"{self.votes} of {len(self.distances)} sequences differ by more than an unchanged engine's "
            f"({self.needed} are a change); median distance {self.nats:.4f} nats, bound {np.median(self.bounds):.4f}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class CanarySet:
    """S sequences, and what one served model, a base model or an adapter, scored them.

    baseline: float64 [R, N], log-probabilities in nats of all scored tokens of all sequences, one after the other,
    N = Σ (P + A − 1), of R replays. reference: float64 [N], of the reference; empty where there is none. cause: what
    the cause of a change is found by; None of an adapter, and where the model's context is too short. Raises
    InvalidArgumentError if they do not fit together.
    """

    canaries: tuple[Canary, ...]
    baseline: Floats
    origin: Origin
    reference: Floats = field(default_factory=lambda: np.empty(0))
    cause: CauseBaseline | None = None

    def __post_init__(self) -> None:
        require_sequences(self.canaries)
        values, scored = self.baseline, self.scored
        if values.ndim != 2 or len(values) < 2 or values.shape[1] != scored or not np.isfinite(values).all():
            raise InvalidArgumentError(f"the canaries' baseline is no table of {scored} log-probabilities a replay")
        if len(self.reference) not in {0, scored}:
            raise InvalidArgumentError(f"the canaries have {len(self.reference)} scores of the reference, not {scored}")

    @property
    def tokens(self) -> int:
        """The number of tokens of one replay, with the tokens that the engine generates."""
        return sum(canary.tokens for canary in self.canaries)

    @property
    def scored(self) -> int:
        """The number of log-probabilities of one replay, N."""
        return sum(canary.scored for canary in self.canaries)

    @property
    def needed(self) -> int:
        return votes_needed(len(self.canaries), len(self.baseline))

    def compare(self, now: Floats, tolerance: float = TOLERANCE_NATS) -> Comparison:
        """Returns the comparison of a replay with the baseline. now: float64 [N], one replay. tolerance: nats."""
        replays = np.vstack([self.baseline, now])
        total = replays.sum(axis=0)
        *then, distances = [self._distances(replay, (total - replay) / len(self.baseline)) for replay in replays]
        return Comparison(distances, np.maximum(np.max(then, axis=0), tolerance), self.needed)

    def compare_engines(self, now: Mapping[str, Floats], tolerance: float = TOLERANCE_NATS) -> dict[str, Comparison]:
        """Returns by name the comparison of each engine with the other engines: for each sequence it takes the median
        of an engine's distances from the others, the lower one of two. So one that is like most others is not far away,
        whatever the rest does; of two engines both differ. Which requests an engine gets has no influence: all were
        asked the same.

        now: each engine's replay by its name, float64 [N]. For a single engine the result is empty.

        A bound is the largest distance between two baseline replays.
        """
        replays = self.baseline
        pairs = [self._distances(replays[a], replays[b]) for a in range(len(replays)) for b in range(a)]
        bounds = np.maximum(np.max(pairs, axis=0), tolerance)
        needed = self._needed_of_engines(len(now))
        result = {}
        for engine, values in now.items():
            others = np.array([self._distances(values, replay) for name, replay in now.items() if name != engine])
            if len(others):
                result[engine] = Comparison(np.sort(others, axis=0)[(len(others) - 1) // 2], bounds, needed)
        return result

    def _needed_of_engines(self, engines: int) -> int:
        """Returns the votes that are needed where so many engines are compared after the replay of each; more than
        there are sequences if all of them would not be enough."""
        alpha = ALPHA_PER_YEAR / REPLAYS_PER_YEAR / max(engines, 1)
        try:
            return votes_needed(len(self.canaries), len(self.baseline) // 2, alpha)
        except InvalidArgumentError:
            return len(self.canaries) + 1

    def from_reference(self, now: Floats) -> tuple[float, float] | None:
        """Returns the distance from the reference, the mean over all scored tokens, then and now; None without a
        reference."""
        if not len(self.reference):
            return None
        then = np.abs(self.baseline.mean(axis=0) - self.reference)
        return float(then.mean()), float(np.abs(now - self.reference).mean())

    def _distances(self, a: Floats, b: Floats) -> Floats:
        """Returns the distance of each sequence between two replays, float64 [S]."""
        scored = np.array([canary.scored for canary in self.canaries])
        sums: Floats = np.add.reduceat(np.abs(a - b), np.cumsum(scored) - scored)
        distances: Floats = sums / scored
        return distances

    def to_bytes(self) -> bytes:
        return state_codec.encode(self, SCHEMA)

    @classmethod
    def from_bytes(cls, data: bytes) -> CanarySet:
        """Returns the set that `to_bytes` wrote. Raises InvalidArgumentError, whose text is one line, if it is anything
        else."""
        return state_codec.decode(cls, data, SCHEMA)


def require_sequences(canaries: Sequence[Canary]) -> None:
    """Raises InvalidArgumentError if they make no set: too few, too many, or too long ones.

    >>> require_sequences([Canary("text", np.ones(3, np.int32), np.ones(2, np.int32))] * MIN_SEQUENCES)
    """
    if not MIN_SEQUENCES <= len(canaries) <= MAX_SEQUENCES:
        raise InvalidArgumentError(f"{len(canaries)} canaries: {MIN_SEQUENCES} to {MAX_SEQUENCES} are needed")
    if any(not len(canary.prompt) or not len(canary.answer) for canary in canaries):
        raise InvalidArgumentError("a canary has an empty prompt or an empty answer")
    if (tokens := sum(canary.tokens for canary in canaries)) > MAX_TOKENS:
        raise InvalidArgumentError(f"the canaries have {tokens} tokens, more than {MAX_TOKENS}: give shorter prompts")


def shortest(canaries: Sequence[Canary]) -> tuple[Canary, ...]:
    """Returns the sequences that an adapter is asked.

    >>> canaries = [Canary("text", np.ones(n, np.int32), np.ones(2, np.int32)) for n in (9, 3)]
    >>> [canary.tokens for canary in shortest(canaries)]
    [6, 12]
    """
    return tuple(sorted(canaries, key=lambda canary: canary.tokens)[:ADAPTER_SEQUENCES])


@cache
def votes_needed(sequences: int, replays: int, alpha: float = ALPHA_PER_YEAR / REPLAYS_PER_YEAR) -> int:
    """Returns the smallest k with P(Binomial(sequences, 1 / (replays + 1)) ≥ k) ≤ alpha. Raises InvalidArgumentError if
    even all votes are no evidence.

    >>> votes_needed(50, 4), votes_needed(16, 4), votes_needed(50, 2)
    (26, 13, 35)
    """
    chance = 1.0 / (replays + 1)
    tail = 0.0
    for votes in range(sequences, -1, -1):
        tail += math.comb(sequences, votes) * chance**votes * (1.0 - chance) ** (sequences - votes)
        if tail > alpha:
            if votes == sequences:
                break
            return votes + 1
    raise InvalidArgumentError(f"{sequences} sequences with {replays} replays are too few for a statement")
