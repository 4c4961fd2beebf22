"""Canaries of an endpoint that is known by its OpenAI API alone: log-probabilities of the first token of each answer.

Fixed prompts are asked, each for one token, at temperature 1, and with the log-probabilities of the most likely tokens
(arXiv 2512.03816). Of each prompt the `TRACKED` most likely tokens are compared that every baseline answer has listed.
They take the place of a sequence's tokens in a `CanarySet`, so that the votes, the modes, and the error rate are the
ones of `hemostat_calibration.canaries`: a prompt of an unchanged endpoint is the farthest of R + 1 passes with a
probability of at most 1 / (R + 1). A token that a later answer does not list is less likely than all that it lists. It
counts as its baseline's median, or as the least likely listed token if that is below.

**Vendors.** Three habits limit what can be said, and are named:

- *Answers are repeated*: all answers to each prompt begin with the same token, which tokens that are drawn anew do with
  a probability below ALPHA_PER_YEAR / REPLAYS_PER_YEAR; or all have the same identifier. The endpoint caches answers,
  or draws none. A repeated answer is no further observation.
- *Rounded values*: no log-probability has more than MAX_DIGITS digits. Nothing below the step can be seen.
- *Two versions*: PASSES answers of one moment to the same prompt are in two groups of at least two, whose distance
  exceeds PART_FACTOR times the largest one within a group, and PART_FACTOR times a mode, for at least MIN_SPLIT
  prompts. That noise makes no such groups was not proven, but simulated (`tests/bench/canary_endpoints.py`).

**The statement.** An endpoint has *changed* if one of these holds:

- Both of the first two passes have the votes of a change, and a larger mean distance than any mode.
- The same prompt is far away in all of the first two passes and of PASSES further ones. A few answers of another kind,
  which the baseline has not met by chance, are no change.
- More prompts have two groups now than then: if nothing has changed, a prompt that has them at one of both times has
  them with equal chances then or now, so that their number is binomial.

It is not known if it has where answers are repeated, where two versions answered then or answer now, or where values
are rounded more coarsely than the tolerance, unless the first or the third of these holds. If the baseline's answers
are repeated, its noise is not known, and nothing is stated.

>>> rng = np.random.default_rng(0)
>>> true = np.log(rng.dirichlet(np.ones(12), 20))
>>> def answer(row):
...     top = dict(zip("abcdefghijkl", row + rng.normal(0.0, 0.01, 12), strict=True))
...     return FirstToken(str(rng.choice(list(top), p=np.exp(row))), top)
>>> passes = [[answer(row) for row in true] for _ in range(PASSES)]
>>> taken = take_endpoint(tuple(f"prompt {n}" for n in range(20)), passes, "model")
>>> judge_endpoint(taken, [[answer(row) for row in true] for _ in range(2)]).outcome.value
'equal'
>>> judge_endpoint(taken, [[answer(row[::-1]) for row in true] for _ in range(2)]).outcome.value
'changed'
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from hemostat_calibration import state_codec
from hemostat_calibration.arrays import Floats
from hemostat_calibration.canaries import (
    ALPHA_PER_YEAR,
    MODE_TOLERANCES,
    PART_FACTOR,
    REPLAYS_PER_YEAR,
    TOLERANCE_NATS,
    Canary,
    CanarySet,
    Comparison,
    Origin,
)
from hemostat_calibration.errors import InvalidArgumentError

PASSES = 8
"""The number of passes over all prompts of a baseline, and of a replay in which anything is far away."""
TRACKED = 10
"""The largest number of tokens of a prompt that are compared."""
MIN_TRACKED = 2
LEAST_NATS = -9_000.0
"""Log-probabilities below this stand for minus infinity."""
MAX_DIGITS = 5
"""The largest number of digits of values that count as rounded. A float32 has seven or more."""
MIN_SPLIT = 3
"""The number of prompts with two groups of answers that shows two versions."""
MIN_GROUP = 2
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of an answer. token: as text. top: the log-probabilities of the most likely tokens, nats.
    identifier: of the answer; "" if it has none."""

    token: str
    top: Mapping[str, float]
    identifier: str = ""


Pass = Sequence[FirstToken]
"""An answer to each prompt."""


@dataclass(frozen=True, slots=True)
class Habits:
    """The habits of a vendor that the answers of one moment show.

    repeats: answers are repeated. step: of rounded values, nats; 0 if they are not rounded. digits: how they are
    rounded, in words. split: the prompts with two groups of answers, by number. apart: their median distance, nats.
    """

    repeats: bool = False
    step: float = 0.0
    digits: str = ""
    split: tuple[int, ...] = ()
    apart: float = 0.0

    @property
    def two_versions(self) -> bool:
        return len(self.split) >= MIN_SPLIT


class Outcome(Enum):
    EQUAL = "equal"
    CHANGED = "changed"
    UNKNOWN = "could not tell"


@dataclass(frozen=True, slots=True, eq=False)
class EndpointSet:
    """The prompts, and what an endpoint answered to them.

    tokens: of each prompt the compared tokens, the most likely one first. listed: the number of tokens that were asked
    for. chat: the prompts are sent as messages; False: to the route of completions. taken: the values of these tokens,
    as a set. Raises InvalidArgumentError if they do not fit together.
    """

    prompts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    listed: int
    chat: bool
    taken: CanarySet
    habits: Habits = field(default_factory=Habits)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.tokens) or [canary.scored for canary in self.taken.canaries] != [
            len(tokens) for tokens in self.tokens
        ]:
            raise InvalidArgumentError(f"the {len(self.prompts)} prompts have no tokens each")

    @property
    def median(self) -> Floats:
        """float64 [N], the baseline's median of each compared token, nats."""
        result: Floats = np.median(self.taken.baseline, axis=0)
        return result

    def to_bytes(self) -> bytes:
        return state_codec.encode(self, SCHEMA)

    @classmethod
    def from_bytes(cls, data: bytes) -> EndpointSet:
        """Returns the set that `to_bytes` wrote. Raises InvalidArgumentError, whose text is one line, if it is anything
        else."""
        return state_codec.decode(cls, data, SCHEMA)


@dataclass(frozen=True, slots=True, eq=False)
class EndpointVerdict:
    """The verdict of a replay. comparison: of its second pass. now: the habits that it shows. then: the baseline's."""

    outcome: Outcome
    comparison: Comparison
    then: Habits
    now: Habits

    @property
    def reasons(self) -> list[str]:
        """The facts that limit the statement, a line each."""
        lines = []
        for when, habits in (("the baseline's", self.then), ("these", self.now)):
            if habits.repeats:
                lines.append(
                    f"{when} answers to the same prompt are the same: the endpoint caches answers, or draws none, so "
                    "that a replay may show what was computed earlier"
                )
            if habits.two_versions:
                lines.append(
                    f"{when} answers to {len(habits.split)} of {len(self.comparison.bounds)} prompts are in two "
                    f"groups, {habits.apart:.2f} nats apart: two versions, or two kinds of engines, have one name"
                )
        rounded = max((self.then, self.now), key=lambda habits: habits.step)
        if rounded.step:
            lines.append(
                f"log-probabilities are rounded to {rounded.digits}: changes below {rounded.step:g} nats are not seen"
            )
        return lines


def take_endpoint(
    prompts: tuple[str, ...],
    passes: Sequence[Pass],
    model: str,
    *,
    listed: int = 20,
    chat: bool = True,
    at: float = 0.0,
    tolerance: float = TOLERANCE_NATS,
) -> EndpointSet:
    """Returns the set of the answers of one moment. Raises InvalidArgumentError if they are too few, or if an answer
    lists too few tokens.

    passes: R of them, R ≥ 2. model: its name. at: Unix time. Other arguments: see `EndpointSet`.

    >>> answers = [FirstToken("yes", {"yes": -0.25 + n / 1000, "no": -1.5}) for n in range(2)]
    >>> taken = take_endpoint(("Is it?",) * 16, [[answer] * 16 for answer in answers], "model")
    >>> taken.tokens[0], taken.median[:2].round(4).tolist()
    (('yes', 'no'), [-0.2495, -1.5])
    """
    tokens = tuple(_tracked([answers[n].top for answers in passes]) for n in range(len(prompts)))
    if few := sum(len(each) < MIN_TRACKED for each in tokens):
        raise InvalidArgumentError(f"the answers to {few} of {len(prompts)} prompts list fewer than two common tokens")
    values = np.array([_values(tokens, answers) for answers in passes])
    canaries = tuple(
        Canary("first token", np.array([n], np.int32), np.arange(len(each), dtype=np.int32))
        for n, each in enumerate(tokens)
    )
    taken = CanarySet(canaries, values, Origin(model, at=at))
    return EndpointSet(prompts, tokens, listed, chat, taken, _habits(tokens, passes, None, tolerance))


def is_suspicious(taken: EndpointSet, passes: Sequence[Pass], tolerance: float = TOLERANCE_NATS) -> bool:
    """Returns True if a pass shows anything, so that PASSES further ones are to be made.

    >>> answers = [FirstToken("yes", {"yes": -0.25 + n / 1000, "no": -1.5}) for n in range(3)]
    >>> taken = take_endpoint(("Is it?",) * 16, [[answer] * 16 for answer in answers[:2]], "model")
    >>> is_suspicious(taken, [[answers[2]] * 16])
    False
    >>> is_suspicious(taken, [[FirstToken("no", {"yes": -3.0, "no": -0.05})] * 16])
    True
    """
    return any(comparison.differs or comparison.changed for comparison in compare_passes(taken, passes, tolerance))


def judge_endpoint(taken: EndpointSet, passes: Sequence[Pass], tolerance: float = TOLERANCE_NATS) -> EndpointVerdict:
    """Returns what a replay shows. passes: two, and PASSES further ones if these are suspicious. tolerance: nats.

    >>> same = [[FirstToken("yes", {"yes": -0.1, "no": -2.5})] * 16] * 8
    >>> verdict = judge_endpoint(take_endpoint(("Is it?",) * 16, same, "model"), same[:2])
    >>> verdict.outcome.value, verdict.comparison.mean, len(verdict.reasons)
    ('could not tell', 0.0, 1)
    """
    compared = compare_passes(taken, passes, tolerance)
    first, second = compared[:2]
    then, now = taken.habits, _habits(taken.tokens, passes, taken.median, tolerance)
    by_votes = all(each.differs and each.mean > each.allowed for each in (first, second))
    always_far = set.intersection(*(set(each.parts) for each in compared)) if len(passes) > 2 else set()
    doubtful = now.repeats or then.two_versions or now.two_versions
    if then.repeats:
        outcome = Outcome.UNKNOWN
    elif by_votes or _more_split(then, now) or (always_far and not doubtful):
        outcome = Outcome.CHANGED
    elif doubtful or max(then.step, now.step) > tolerance or any(each.differs for each in (first, second)):
        outcome = Outcome.UNKNOWN
    else:
        outcome = Outcome.EQUAL
    return EndpointVerdict(outcome, second, then, now)


def compare_passes(taken: EndpointSet, passes: Sequence[Pass], tolerance: float = TOLERANCE_NATS) -> list[Comparison]:
    """Returns the comparison of each pass with the baseline. tolerance: nats.

    >>> answers = [FirstToken("yes", {"yes": -0.25 + n / 1000, "no": -1.5}) for n in range(3)]
    >>> taken = take_endpoint(("Is it?",) * 16, [[answer] * 16 for answer in answers[:2]], "model")
    >>> [round(each.mean, 5) for each in compare_passes(taken, [[answer] * 16 for answer in answers])]
    [0.0, 0.0, 0.0005]
    """
    values = (_values(taken.tokens, answers, taken.median) for answers in passes)
    return [taken.taken.compare(each, tolerance) for each in values]


def _more_split(then: Habits, now: Habits) -> bool:
    """Returns True if more prompts have two groups of answers now than then."""
    only_now, only_then = len({*now.split} - {*then.split}), len({*then.split} - {*now.split})
    pairs = only_now + only_then
    chance = sum(math.comb(pairs, k) for k in range(only_now, pairs + 1)) / 2**pairs
    return bool(chance <= ALPHA_PER_YEAR / REPLAYS_PER_YEAR)


def _tracked(tops: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """Returns the tokens that all answers list, the most likely ones in the mean."""
    common = [token for token in tops[0] if all(top.get(token, -math.inf) > LEAST_NATS for top in tops)]
    return tuple(sorted(common, key=lambda token: -sum(top[token] for top in tops))[:TRACKED])


def _values(tokens: Sequence[Sequence[str]], answers: Pass, median: Floats | None = None) -> Floats:
    """Returns the values of all compared tokens of a pass, one prompt after the other. median: of the baseline, which
    counts for a token that is not listed if it is not above the least likely listed one; None if all are listed."""
    values: list[float] = []
    for tracked, answer in zip(tokens, answers, strict=True):
        # Servers also list the token that was drawn, however unlikely it is.
        listed = (value for token, value in answer.top.items() if value > LEAST_NATS and token != answer.token)
        least = min(listed, default=0.0)
        for token in tracked:
            value = answer.top.get(token, -math.inf)
            if value <= LEAST_NATS and median is not None:
                value = min(least, float(median[len(values)]))
            values.append(value)
    return np.array(values)


def _habits(tokens: Sequence[Sequence[str]], passes: Sequence[Pass], median: Floats | None, tolerance: float) -> Habits:
    """Groups are looked for in the last PASSES passes, which were not chosen by what they show."""
    step, digits = _rounded([value for answers in passes for answer in answers for value in answer.top.values()])
    values = np.array([_values(tokens, answers, median) for answers in passes[-PASSES:]])
    ends = np.cumsum([len(tracked) for tracked in tokens]).tolist()
    apart = [
        _groups(values[:, end - len(tracked) : end], MODE_TOLERANCES * tolerance)
        for tracked, end in zip(tokens, ends, strict=True)
    ]
    split = tuple(n for n, distance in enumerate(apart) if distance)
    return Habits(_repeats(passes), step, digits, split, statistics.median(apart[n] for n in split) if split else 0.0)


def _repeats(passes: Sequence[Pass]) -> bool:
    identifiers = [{answers[n].identifier for answers in passes} for n in range(len(passes[0]))]
    if all(len(each) == 1 for each in identifiers) and len(set.union(*identifiers)) == len(identifiers):
        return True
    if any(len({answers[n].token for answers in passes}) > 1 for n in range(len(passes[0]))):
        return False
    nats = 0.0
    for n in range(len(passes[0])):
        p = np.mean([_probabilities(answers[n].top, len(passes)) for answers in passes])
        nats += math.log(max(float(p), 1e-12))
    return nats <= math.log(ALPHA_PER_YEAR / REPLAYS_PER_YEAR)


def _probabilities(top: Mapping[str, float], draws: int) -> float:
    """Returns the probability that so many draws are equal; tokens that are not listed count as one."""
    p = np.exp(np.array(list(top.values())))
    return float((p**draws).sum() + max(1.0 - float(p.sum()), 0.0) ** draws)


def _groups(answers: Floats, mode: float) -> float:
    """Returns the distance of the two groups that the answers to a prompt are in; 0 if there are no such groups.

    answers: float64 [R, K]. mode: the distance that is no other version, nats.

    >>> _groups(np.array([[0.0], [0.01], [1.0], [1.01]]), 0.03), _groups(np.array([[0.0], [0.01], [0.02], [1.0]]), 0.03)
    (0.99, 0.0)
    """
    distances = np.abs(answers[:, np.newaxis] - answers).mean(axis=-1)
    # The longest link of the shortest tree: the two groups that it joins are the farthest apart of all pairs of groups.
    joined, links = [0], []
    while len(joined) < len(answers):
        rest = [n for n in range(len(answers)) if n not in joined]
        block = distances[np.ix_(joined, rest)]
        a, b = np.unravel_index(block.argmin(), block.shape)
        links.append((float(block[a, b]), len(joined)))
        joined.append(rest[int(b)])
    longest, cut = max(links)
    groups = [joined[:cut], joined[cut:]]
    within = max(float(distances[np.ix_(group, group)].max()) for group in groups)
    if min(map(len, groups)) < MIN_GROUP or longest <= PART_FACTOR * max(within, mode):
        return 0.0
    return longest


def _rounded(values: Sequence[float]) -> tuple[float, str]:
    """Returns the step of rounded values, and how they are rounded; 0 and "" if they are not.

    >>> _rounded([-1.2345, -0.01, -12.3456]), _rounded([-1.234, -0.001234, -12.34])
    ((0.0001, '4 decimals'), (0.01, '4 digits'))
    >>> _rounded([-1.23456789, -0.25])
    (0.0, '')
    """
    shown = [np.format_float_positional(-value, trim="-") for value in values if LEAST_NATS < value < 0.0]
    if not shown:
        return 0.0, ""
    decimals = max(len(text.partition(".")[2]) for text in shown)
    if decimals <= MAX_DIGITS:
        return 10.0**-decimals, f"{decimals} decimal{'s' * (decimals != 1)}"
    digits = max(len(text.replace(".", "").strip("0")) for text in shown)
    if digits <= MAX_DIGITS:
        largest = max(len(text.partition(".")[0].lstrip("0")) for text in shown)
        return 10.0 ** (largest - digits), f"{digits} digit{'s' * (digits != 1)}"
    return 0.0, ""
