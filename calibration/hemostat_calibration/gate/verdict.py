"""Pass, fail or undecided: tests of the mean excess of a candidate, by question and by kind of traffic.

Evidence is one number D for each unit and question, within [-1, 1]: how much worse the candidate is than the stable
model, such as the difference of their distances from the reference. Each question has a margin m for all units
together, and one for each kind. A question may apply to some units only, such as whether JSON is valid to those that
ask for JSON. Two tests look at each mean:

- for passing, of "the mean of D is at least m": a bet on m − D, which is at least −(1 − m);
- for failing, of "the mean of D is at most m": a bet on D − m, which is at least −(1 + m).

Both are bets as in `guard.wealth` (Waudby-Smith & Ramdas, JRSS-B 2024): for a fraction f, Π (1 + f X/width) is a
non-negative supermartingale under the hypothesis, and so is their mixture; by Ville's inequality it ever reaches
1/alpha with a probability of at most alpha. So one may look after every unit, and stop at the verdict.

**Pass** needs every test of passing that has to pass to reach 1/alpha: all questions, over all units and in each kind
that is *required*. Which means are required is fixed before the first unit: a mean is if at least `Question.min_units`
units of it will be asked, or if it is over all units and its question applies to each. A wrong pass means that at least
one of the hypotheses is true and its test has rejected it, so its probability is at most alpha without a correction
(intersection–union test; Berger, Technometrics 1982).

**Fail** needs the closed test (`guard.closing`) over the tests of failing to reach 1/alpha for one of them: half of the
weight is of the questions over all units, half of the kinds; how it is shared out there among the questions is up to
the caller. A wrong fail has a probability of at most alpha, however many kinds there are and however they depend on
each other, as long as each unit's D has a conditional mean of at most the margin. In the closed test the product of
several questions' e-values is not used, because the same unit changes all of them; the weighted mean alone is an
e-value whatever the dependence (Vovk & Wang, Annals of Statistics 2021).

**Assumption.** Units are independent draws: offline, prompts come in random order, and a template counts once. The
promise is about the traffic that the prompts were drawn from. It is for one candidate: of twenty bad ones, one may
pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.closing import least_mean
from hemostat_calibration.guard.wealth import Floats

FRACTIONS = np.array([0.99, 0.6, 0.35, 0.2, 0.12, 0.07])
"""The fractions f that are bet. The small ones are for outcomes, which spread over the whole range: there the guard's
fractions take 1.6 to 1.9 times the units of a bet that knows the distribution, and these 1.4 times (`make
bench-gate`)."""
PRIOR = np.array([0.4, 0.12, 0.12, 0.12, 0.12, 0.12])
MIN_KNOWN = 10
"""The number of units from which `MeanTest.more` takes the growth of the evidence from what was seen."""

ALL = ""
"""The kind of all units together."""
MIN_UNITS = 30
"""The least number of planned units of a kind that is required: with a margin of 0.15, equal candidates pass after 25
without noise."""
NO_QUESTIONS: Mapping[str, Mapping[str, int]] = MappingProxyType({})
"""The questions that do not apply to all units, where each does."""
NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})
"""The weights of the questions, where all are equal."""


class Outcome(StrEnum):
    """The verdict on a candidate; the values are the names in JSON."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Question:
    """One thing that is asked of a candidate.

    name: in JSON. text: what a positive D means, for people, as the end of "the candidate is …". margin, kind_margin:
    the largest mean of D that is allowed over all units, and in a kind. min_units: the least number of planned units of
    a kind in which the question has to pass.
    """

    name: str
    text: str
    margin: float
    kind_margin: float
    min_units: int = MIN_UNITS

    def __post_init__(self) -> None:
        for margin in (self.margin, self.kind_margin):
            if not 0.0 < margin < 1.0:
                raise InvalidArgumentError(f"the margin of {self.name} is {margin}: it must be between 0 and 1")

    def allowed(self, kind: str) -> float:
        return self.margin if kind == ALL else self.kind_margin


@dataclass(slots=True)
class MeanTest:
    """The two tests of one mean, and what is shown of it.

    log_pass: the largest log evidence so far, since a hypothesis that was once rejected stays so. log_fail: the log
    evidence now, which the closed test combines with others: a largest value of the past is no e-value.
    """

    margin: float
    units: int = 0
    total: float = 0.0
    log_pass: float = 0.0
    log_fail: float = 0.0
    _passing: Floats = field(default_factory=lambda: np.zeros(len(PRIOR)))
    _failing: Floats = field(default_factory=lambda: np.zeros(len(PRIOR)))

    def update(self, excess: float) -> None:
        """Counts a unit. excess: D."""
        self.units += 1
        self.total += excess
        self._passing += _log_factors((self.margin - excess) / (1.0 - self.margin))
        self._failing += _log_factors((excess - self.margin) / (1.0 + self.margin))
        self.log_pass = max(self.log_pass, self.passing())
        self.log_fail = self.failing()

    def passing(self, inflation: float = 1.0) -> float:
        """Returns the log evidence now that the mean is below the margin. inflation: v̂ of units that depend on each
        other, 1 or more; the power is taken of each bet, before they are mixed (`statistics.dependence`)."""
        return _mixed(self._passing / inflation)

    def failing(self, inflation: float = 1.0) -> float:
        """Returns the log evidence now that the mean is above the margin. inflation: as for `passing`."""
        return _mixed(self._failing / inflation)

    @property
    def mean(self) -> float:
        """The mean of D; NaN without a unit."""
        return self.total / self.units if self.units else math.nan

    def more(self, needed: float) -> int | None:
        """Returns about how many more units the test of passing takes if they are like those so far; None if it cannot
        pass there. needed: log evidence."""
        growth = self._passing / self.units if self.units >= MIN_KNOWN else self._growth_at_the_mean()
        missing = needed - np.log(PRIOR) - self._passing
        each = [float(part / rate) for part, rate in zip(missing, growth, strict=True) if rate > 0.0]
        return max(1, math.ceil(min(each))) if each else None

    def _growth_at_the_mean(self) -> Floats:
        """Returns the growth of the evidence by unit if all D were the mean so far; 0 before the first."""
        return _log_factors((self.margin - (self.mean if self.units else 0.0)) / (1.0 - self.margin))


@dataclass(frozen=True, slots=True)
class Finding:
    """One mean, as people see it. required: a pass needs it."""

    question: Question
    kind: str
    units: int
    mean: float
    margin: float
    passed: bool
    required: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on the candidate, and the means that led to it.

    failed: the mean that is above its margin, if the outcome is FAIL. findings: all means. more: about how many more
    units a pass takes at the means so far; None if none is needed, or no number would do. unseen: the share of the
    planned units in each kind that is not required.
    """

    outcome: Outcome
    failed: Finding | None
    findings: tuple[Finding, ...]
    more: int | None
    unseen: Mapping[str, float]


class Gate:
    """Owns the tests of one candidate.

    questions: what is asked. planned: how many units of each kind will be asked at most. alpha: the probability of a
    wrong pass, and of a wrong fail. applying: the same as `planned` by question, for each question that does not apply
    to all units. kind_weights: the weights of questions in the test of failing in a kind; 1 for those that it leaves
    out.

    >>> gate = Gate([Question("near", "farther from the reference", 0.05, 0.15)], {"chat": 100}, alpha=0.05)
    >>> for _ in range(80):
    ...     gate.update("chat", {"near": 0.0})
    >>> gate.verdict().outcome.value
    'pass'
    """

    def __init__(
        self,
        questions: Sequence[Question],
        planned: Mapping[str, int],
        alpha: float = 0.05,
        applying: Mapping[str, Mapping[str, int]] = NO_QUESTIONS,
        kind_weights: Mapping[str, float] = NO_WEIGHTS,
    ) -> None:
        if not 0.0 < alpha < 1.0:
            raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
        if not questions or not planned:
            raise InvalidArgumentError("a gate needs a question and a kind: give at least one of each")
        self._needed = -math.log(alpha)
        self._questions = {question.name: question for question in questions}
        total, weight = sum(planned.values()), sum(kind_weights.get(name, 1.0) for name in self._questions)
        self._unseen = {kind: units / total for kind, units in planned.items() if units < MIN_UNITS}
        self._always = {question.name for question in questions if question.name not in applying}
        self._tests: dict[tuple[str, str], MeanTest] = {}
        self._required: set[tuple[str, str]] = set()
        """The means of which a pass needs each."""
        self._weights: list[float] = []
        """The weights of the closed test, in the order of `_tests`."""
        for question in questions:
            kinds = {kind: units for kind, units in applying.get(question.name, planned).items() if units}
            for kind, units in {ALL: sum(kinds.values()), **kinds}.items():
                self._tests[question.name, kind] = MeanTest(question.allowed(kind))
                if units >= question.min_units or (kind == ALL and question.name in self._always):
                    self._required.add((question.name, kind))
                in_kind = 0.5 * kind_weights.get(question.name, 1.0) / weight / max(len(kinds), 1)
                self._weights.append(0.5 / len(questions) if kind == ALL else in_kind)
        self.units = 0
        """The number of units that have counted."""
        self._failed: tuple[str, str] | None = None
        """The question and the kind whose mean was found above its margin."""

    def update(self, kind: str, excess: Mapping[str, float]) -> None:
        """Counts a unit. excess: D by the name of each question that applies. Raises InvalidArgumentError for a kind or
        a question that was not planned, or a D outside of [-1, 1]."""
        if not self._always <= set(excess) <= set(self._questions):
            raise InvalidArgumentError(
                f"the excess is of {sorted(excess)}: it must be of {sorted(self._always)}, and may be of "
                f"{sorted(set(self._questions) - self._always)}"
            )
        for name, value in excess.items():
            if not -1.0 <= value <= 1.0:
                raise InvalidArgumentError(f"the excess of {name} is {value}: it must be within -1 and 1")
            if (name, kind) not in self._tests:
                raise InvalidArgumentError(f"the kind is {kind!r}: it must be one of those that were planned")
        self.units += 1
        for name, value in excess.items():
            for counted in (ALL, kind):
                self._tests[name, counted].update(value)
        if self._failed is None:
            self._failed = self._above_its_margin()

    def verdict(self) -> Verdict:
        findings = {
            key: Finding(
                self._questions[key[0]],
                key[1],
                test.units,
                test.mean,
                test.margin,
                test.log_pass >= self._needed,
                key in self._required,
            )
            for key, test in self._tests.items()
        }
        failed = self._failed
        waiting = [key for key in self._required if not findings[key].passed]
        more: int | None = None
        if failed is not None:
            outcome = Outcome.FAIL
        elif not waiting:
            outcome = Outcome.PASS
        else:
            outcome = Outcome.UNDECIDED
            more = self._more()
        return Verdict(
            outcome,
            None if failed is None else findings[failed],
            tuple(finding for finding in findings.values() if finding.units),
            more,
            self._unseen,
        )

    def _more(self) -> int | None:
        """Returns about how many more units a pass takes, of all kinds together."""
        most = 0
        for key in self._required:
            test = self._tests[key]
            if test.log_pass >= self._needed:
                continue
            more = test.more(self._needed)
            if more is None:
                return None
            share = max(test.units, 1) / self.units if self.units else 1.0
            most = max(most, math.ceil(more / share))
        return most

    def _above_its_margin(self) -> tuple[str, str] | None:
        """Returns the name and the kind of the mean that the closed test finds above its margin; the one with the most
        evidence."""
        keys = list(self._tests)
        own = [self._tests[key].log_fail for key in keys]
        best = max(range(len(keys)), key=lambda j: own[j])
        return keys[best] if own[best] + math.log(least_mean(own, self._weights, best)) >= self._needed else None


def _mixed(log_k: Floats) -> float:
    """Returns the logarithm of the mixture over the fractions."""
    top = float(log_k.max())
    return top + math.log(float(np.exp(log_k - top) @ PRIOR))


def _log_factors(x: float) -> Floats:
    """Returns log(1 + f x) for each fraction f, float64 [F]. x: the excess divided by its range, −1 or more."""
    factors: Floats = np.log1p(FRACTIONS * x)
    return factors
