"""Scores the same token sequences again, to find out if an engine still computes what it computed when the set was
taken.

A `CanarySet` has sequences of token ids, and of each token the log-probability in several replays of the engine as it
was then: R baseline replays. The first ones are of one moment: one alone, and the others together with other requests,
so that they differ by what batch shapes and chunks of a prefill do. The replays of the first day are added, so that the
baseline is of all loads of a day. The distance between two replays of a sequence is the mean over its tokens of
|difference of log-probabilities|, in nats.

**Modes.** Kernels and batch shapes may switch: then a replay as a whole has another offset at each token than the
replay an hour before (0.01 to 0.03 nats a token), and the sequences of a replay are not independent. So each of the R +
1 replays, the present one and the R of the baseline, is compared with the one of the others that is nearest to it as a
whole. A mode that the baseline has seen is near. A mode that it has not seen is assumed to be at most MODE_TOLERANCES
tolerances away, in the mean over all tokens.

**The test.** A sequence votes "changed" if the present replay's distance exceeds the distance of each baseline
replay, and the tolerance. An engine has changed *at once*, if two replays in a row show one of these:

- At least `votes_needed` sequences vote so, and the mean distance of all tokens exceeds the largest one of the baseline
  by more than a mode may.
- A part of a sequence (its answer, or the tokens of its prompt with a context of fewer than 128 tokens, of fewer than
  512, or of more) has a distance of more than PART_FACTOR times its bound, and it is the same part twice. This finds
  what few sequences show, what only long contexts show, or what only tokens show that were decoded.

If at least `votes_needed` sequences vote, and no more than a mode may, the engine has changed only if this lasts:
in LASTING_REPLAYS replays in a row, an hour apart. A mode comes and goes within a week; a change stays.

**The null.** Of an unchanged engine without modes all R + 1 replays of a sequence are exchangeable. Of their distances
from the one that is nearest as a whole, the present one's is the only largest with a probability of 1 / (R + 1),
whatever the distribution of the noise. Sequences are replayed one at a time, each in a batch of its own, so that their
votes are independent; then their number is binomial, and `votes_needed` is the smallest number that is reached with a
probability of at most ALPHA_PER_YEAR / REPLAYS_PER_YEAR. Of an unchanged engine with modes the mean distance is at most
the one of the noise, and the size of a mode (the triangle inequality), so that it needs a mode that is larger than
assumed, or one that the day of the baseline has not seen and that lasts for a week. A day was not enough: of 240
simulated engine-years 36 had a mode that was first seen later and then lasted for a day. That a part is beyond
PART_FACTOR times its bound twice was not proven, but simulated (`tests/bench/canary_modes.py`): noise with heavy tails,
and engines with and without modes.

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
>>> comparison = taken.compare(true + rng.normal(0.0, 0.1, len(true)))
>>> comparison.changed, comparison.votes, comparison.needed
(True, 20, 15)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import numpy as np

from hemostat_calibration import state_codec
from hemostat_calibration.arrays import Floats, Ids, Indices
from hemostat_calibration.canary_cause import CauseBaseline
from hemostat_calibration.canary_texts import TextBaseline
from hemostat_calibration.errors import InvalidArgumentError

REPLAYS = 4
"""The number of baseline replays of a new set: a sequence of an unchanged engine votes with a probability of 1 / 5."""
DAY_REPLAYS = 24
"""The number of baseline replays that are added to a set, an hour apart."""
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
MODE_TOLERANCES = 3.0
"""The largest distance of two modes of an unchanged engine, in tolerances, in the mean over all tokens."""
LASTING_REPLAYS = 7 * 24
"""The number of replays in a row, an hour apart, after which a difference that is no larger than a mode's is a change.
"""
PART_FACTOR = 5.0
DEPTHS = (128, 512)
"""The numbers of tokens of context where a sequence is divided into parts."""
MIN_PART = 16
"""The least number of tokens of a part."""
ADAPTER_SEQUENCES = 20
"""The number of sequences of an adapter. They are the shortest ones, so that the sequences of several adapters fit next
to the base model's.
"""
SCHEMA = 7
OLDER_SCHEMAS = (2, 3, 4, 5, 6)


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """One token sequence. kind: the kind of text, for readers. prompt: int32 [P], P ≥ 1. answer: int32 [A], A ≥ 1,
    which the model wrote. cached: the number of the prompt's first tokens that are in the prefix cache before; if there
    are any, the answer alone is scored.
    """

    kind: str
    prompt: Ids
    answer: Ids
    cached: int = 0

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.tolist(), *self.answer.tolist()]

    @property
    def scored(self) -> int:
        """The number of log-probabilities, P + A − 1: each token but the first has one; A behind a cached prefix."""
        return self.answer_at + len(self.answer)

    @property
    def answer_at(self) -> int:
        """The number of the answer's first log-probability."""
        return 0 if self.cached else len(self.prompt) - 1

    @property
    def tokens(self) -> int:
        """The number of tokens that a replay costs the engine, with the one that it generates."""
        return len(self.prompt) - self.cached + len(self.answer) + 1


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


@dataclass(frozen=True, slots=True)
class Condition:
    """The conditions of a replay. at: Unix time. together: the number of sequences that were asked for at once. load:
    the number of clients' requests in progress at the engine."""

    at: float
    together: int = 1
    load: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The comparison of one replay of S sequences with the set.

    distances, bounds: float64 [S], nats; a sequence votes if its distance is above its bound. needed: the number of
    votes for a change. mean: the mean distance of all tokens, nats. allowed: the largest one of an unchanged engine in
    any mode. parts: the parts of sequences that are farther than PART_FACTOR times their bounds, by their numbers in
    `parts_of`.
    """

    distances: Floats
    bounds: Floats
    needed: int
    mean: float = math.inf
    allowed: float = 0.0
    parts: tuple[int, ...] = ()

    @property
    def votes(self) -> int:
        return int((self.distances > self.bounds).sum())

    @property
    def differs(self) -> bool:
        """True if the replay differs from the baseline's: in another mode, or as the engine has changed."""
        return self.votes >= self.needed

    @property
    def changed(self) -> bool:
        """True if the replay differs by more than any mode does."""
        return (self.differs and self.mean > self.allowed) or bool(self.parts)

    @property
    def nats(self) -> float:
        """The median distance of the sequences."""
        return float(np.median(self.distances))

    def confirms(self, first: Comparison) -> bool:
        """Returns True if both replays show a change in the same way: most sequences, or the same part of one."""
        by_votes = all(each.differs and each.mean > each.allowed for each in (first, self))
        return by_votes or not set(self.parts).isdisjoint(first.parts)

    @property
    def summary(self) -> str:
        """One line, without a verdict."""
        text = (
            f"{self.votes} of {len(self.distances)} sequences differ by more than an unchanged engine's "
            f"({self.needed} are a change); median distance {self.nats:.4f} nats, bound {np.median(self.bounds):.4f}"
        )
        if self.parts:
            text += f"; parts of sequences beyond {PART_FACTOR:.0f} times their bounds: {len(self.parts)}"
        elif self.differs and not self.changed:
            text += (
                f"; an unchanged engine's kernels may differ by the mean of {self.mean:.4f} nats (up to "
                f"{self.allowed:.4f}): this is a change only if it lasts for {LASTING_REPLAYS // 24} days"
            )
        return text


@dataclass(frozen=True, slots=True, eq=False)
class CanarySet:
    """S sequences, and what one served model, a base model or an adapter, scored them.

    baseline: float64 [R, N], log-probabilities in nats of all scored tokens of all sequences, one after the other,
    N = Σ (P + A − 1), of R replays. reference: float64 [N], of the reference; empty where there is none. cause: what
    the cause of a change is found by; None of an adapter, and where the model's context is too short. conditions: of
    each baseline replay; empty for a set that was stored without. decoded: the engine decodes the answers, token by
    token, as its plugin is given them; False: all tokens are scored by a prefill. texts: what the server made of the
    prompts as clients send them; None of an adapter. Raises InvalidArgumentError if they do not fit together.
    """

    canaries: tuple[Canary, ...]
    baseline: Floats
    origin: Origin
    reference: Floats = field(default_factory=lambda: np.empty(0))
    cause: CauseBaseline | None = None
    conditions: tuple[Condition, ...] = ()
    decoded: bool = False
    texts: TextBaseline | None = None

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
        now_from, near = self.distances(self.baseline, now), _nearest(self)
        nearest = now_from.mean.argmin()
        found = Distances(now_from.sequences[nearest], now_from.parts[nearest], now_from.mean[nearest])
        # Where the present replay is nearer to a baseline replay than the other ones are, it is the nearest one.
        nearer = (now_from.mean < near.mean)[:, np.newaxis]
        then = np.where(nearer, now_from.sequences, near.sequences)
        bounds = Distances(then.max(axis=0), near.parts.max(axis=0), near.mean.max())
        return self._comparison(found, bounds, self.needed, tolerance)

    def compare_engines(self, now: Mapping[str, Floats], tolerance: float = TOLERANCE_NATS) -> dict[str, Comparison]:
        """Returns by name the comparison of each engine with the other engines: for each sequence it takes the median
        of an engine's distances from the others, the lower one of two. So one that is like most others is not far away,
        whatever the rest does; of two engines both differ. Which requests an engine gets has no influence: all were
        asked the same.

        now: each engine's replay by its name, float64 [N]. For a single engine the result is empty.

        A bound is the largest distance between two baseline replays.
        """
        bounds = _largest_of_pairs(self)
        needed = self._needed_of_engines(len(now))
        result = {}
        for engine, values in now.items():
            if others := [replay for name, replay in now.items() if name != engine]:
                each = self.distances(np.array(others), values)
                middle = (len(others) - 1) // 2
                found = each.combined(lambda over_engines: np.sort(over_engines, axis=0)[middle])  # noqa: B023
                result[engine] = self._comparison(found, bounds, needed, tolerance)
        return result

    def _comparison(self, found: Distances, bounds: Distances, needed: int, tolerance: float) -> Comparison:
        mode = MODE_TOLERANCES * tolerance
        parts = np.flatnonzero(found.parts > PART_FACTOR * np.maximum(bounds.parts, mode))
        return Comparison(
            found.sequences,
            np.maximum(bounds.sequences, tolerance),
            needed,
            float(found.mean),
            float(bounds.mean) + mode,
            tuple(parts.tolist()),
        )

    def with_replay(self, replay: Floats, condition: Condition) -> CanarySet:
        """Returns the set with one more baseline replay. replay: float64 [N]."""
        then = self.conditions or (Condition(self.origin.at),) * len(self.baseline)
        return replace(self, baseline=np.vstack([self.baseline, replay]), conditions=(*then, condition))

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

    def distances(self, a: Floats, b: Floats) -> Distances:
        """Returns the distances between replays. a: float64 [..., N]. b: float64 [N]."""
        difference = np.abs(a - b)
        scored, parts = _lengths(self.canaries)
        return Distances(_means(difference, scored), _means(difference, parts), difference.mean(axis=-1))

    def to_bytes(self) -> bytes:
        return state_codec.encode(self, SCHEMA)

    @classmethod
    def from_bytes(cls, data: bytes) -> CanarySet:
        """Returns the set that `to_bytes` wrote. Raises InvalidArgumentError, whose text is one line, if it is anything
        else."""
        return state_codec.decode(cls, data, SCHEMA, OLDER_SCHEMAS)


@dataclass(frozen=True, slots=True, eq=False)
class Distances:
    """Distances between replays, nats. sequences: float64 [..., S]. parts: float64 [..., P], of all parts. mean:
    float64 [...], of all tokens."""

    sequences: Floats
    parts: Floats
    mean: Floats

    def combined(self, combine: Callable[[Floats], Floats]) -> Distances:
        """Returns distances that are combined over the first axis."""
        return Distances(combine(self.sequences), combine(self.parts), combine(self.mean))


def _means(values: Floats, lengths: Indices) -> Floats:
    sums: Floats = np.add.reduceat(values, np.cumsum(lengths) - lengths, axis=-1)
    means: Floats = sums / lengths
    return means


@lru_cache(maxsize=64)
def _lengths(canaries: tuple[Canary, ...]) -> tuple[Indices, Indices]:
    """Returns the numbers of scored tokens of all sequences, and of all parts."""
    parts = [len(part) for canary in canaries for part in parts_of(canary.scored, canary.answer_at)]
    return np.array([canary.scored for canary in canaries]), np.array(parts)


@lru_cache(maxsize=64)
def _nearest(taken: CanarySet) -> Distances:
    """Returns the distances of each baseline replay from the other one that is nearest to it as a whole: R rows."""
    rows = []
    for n, replay in enumerate(taken.baseline):
        others = np.delete(taken.baseline, n, axis=0)
        rows.append(taken.distances(others[np.abs(others - replay).mean(axis=1).argmin()], replay))
    return _stacked(rows)


@lru_cache(maxsize=64)
def _largest_of_pairs(taken: CanarySet) -> Distances:
    """Returns the largest distances of two baseline replays."""
    replays = taken.baseline
    pairs = [taken.distances(replays[a], replays[b]) for a in range(len(replays)) for b in range(a)]
    return _stacked(pairs).combined(lambda over_pairs: over_pairs.max(axis=0))


def _stacked(rows: Sequence[Distances]) -> Distances:
    return Distances(*(np.array([getattr(row, name) for row in rows]) for name in ("sequences", "parts", "mean")))


def parts_of(scored: int, answer: int = 0) -> list[range]:
    """Returns the parts of a sequence's scored tokens: its answer, and the tokens of its prompt by the length of their
    context. A part that would be shorter than MIN_PART belongs to the one before. answer: the first scored token of the
    answer.

    >>> parts_of(80), parts_of(520), parts_of(80, 40)
    ([range(0, 80)], [range(0, 128), range(128, 520)], [range(0, 40), range(40, 80)])
    >>> parts_of(900, 860)
    [range(0, 128), range(128, 512), range(512, 860), range(860, 900)]
    """
    begins = [0]
    for begin in sorted({*(depth for depth in DEPTHS if depth < answer or not answer), answer}):
        if begin - begins[-1] >= MIN_PART and scored - begin >= MIN_PART:
            begins.append(begin)
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], scored], strict=True)]


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
