"""The verdict on live traffic: the tests of `verdict`, for units that depend on each other and come in no random order.

What is different from the offline gate:

- Units of traffic depend on each other. The evidence of each bet is raised to the power 1/v̂ with the variance
  inflation v̂ of sums (`statistics.dependence`), as in the tests of profiles: the largest one of the v̂ of the kind's
  D in all questions, and of what the caller has noted of the same traffic. A test decides nothing before its own v̂ is
  to be believed.
- Traffic has a cycle, such as day and night. No mean is decided by one part of it: the units of a question over all
  kinds have to span `MIN_CYCLES` cycles for a verdict, and the units of a kind one. An operator may waive that; the
  verdict then holds for traffic like in the hours that were seen, and says so. There, and where the traffic has no
  cycle, units are taken to depend on each other only over times of which many fit in a test, as in `guard`.
- v̂ does not know what has not happened yet. A candidate that fails a few requests in a row, and seldom, has failed none
  for a while, and its v̂ is 1 until then. So in a test of passing v̂ is at least what bad answers in runs of `RUN`
  requests of the traffic would have. Of such a run a mean gets the part that its units are of all: one that has a tenth
  of the units gets 1.9 of them for each that it gets at all.
- Which kinds there will be is not known in advance. A mean of a kind is *required* once it has `MIN_UNITS` units (with
  fewer, v̂ is not known), and stays so. How many units a kind has does not depend on their D. So a wrong pass needs the
  test of the first required mean that is at its margin or above it to reject, whichever that is, and has a probability
  of at most alpha (asymptotically, as far as v̂ is right). Kinds that are not seen enough are named with their share of
  the traffic that was met.
- In the closed test of failing, the weight of the kinds is shared out to as many kinds as are followed at most, in the
  order in which they come: the j-th one has a weight of 1/j relative to the first one, since traffic mostly has few
  kinds. For those that have not come, the evidence is 1 (in logarithms 0).

The evidence as it is now decides, not the largest of the past: v̂ may become larger with more units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hemostat_calibration.elapsed import TimeBreak, elapsed, has_jumped
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.gate.verdict import ALL, MeanTest, Outcome, Question
from hemostat_calibration.guard.closing import least_mean
from hemostat_calibration.guard.guard import MIN_CYCLES
from hemostat_calibration.statistics.dependence import MIN_UNITS, BatchMeans
from hemostat_calibration.statistics.running_mean import RunningMean

RUN = 10
"""The number of requests in a row that may fail together without any sign of it before."""

Noted = Callable[[str, int], float]
"""Returns v̂ of sums of so many units of a kind, as far as it is known apart from the gate; `ALL`: of all kinds."""


@dataclass(slots=True)
class LiveMean:
    """One mean: its tests, its dependence, and the time that its units span.

    last, elapsed: when the last unit was, seconds, and the time that all of them span. shown: for the interval that
    people see; it decides nothing.
    """

    bets: MeanTest
    batches: BatchMeans = field(default_factory=lambda: BatchMeans.of(1))
    last: float = 0.0
    elapsed: float = 0.0
    shown: RunningMean = field(default_factory=lambda: RunningMean(-1.0, 1.0))

    def update(self, excess: float, now: float, longest_gap: float) -> None:
        """Counts a unit. now: its time, seconds. longest_gap: what is counted at most of the time since the last one;
        where the clock has jumped, the time begins anew."""
        self.bets.update(excess)
        self.shown = self.shown.update(excess)
        self.batches = self.batches.update(np.array([excess]))
        if self.last > 0.0:
            jumped = has_jumped(self.last, now)
            self.elapsed = 0.0 if jumped else self.elapsed + elapsed(self.last, now, longest_gap)
        self.last = now

    def after_break(self, time_break: TimeBreak, needed: float) -> None:
        """Notes that the time was set. needed: seconds that the units have to span; if they do not yet, they begin
        again."""
        if self.last > 0.0:
            self.last = time_break.seen(self.last)
        if time_break.anew and self.elapsed < needed:
            self.elapsed = 0.0

    @property
    def is_known(self) -> bool:
        """It is True if there are enough effective units to believe v̂."""
        return bool(self.batches.enough()[0])

    def inflation(self, *, in_cycles: bool) -> float:
        """Returns v̂ of sums as long as the test, 1 or more; infinite before it is known. in_cycles: take the few
        batches into account, too, that are as long as a part of a cycle."""
        own = self.batches.inflation_of_sums(self.bets.units) if in_cycles else self.batches.inflation()
        return float(own[0])


@dataclass(frozen=True, slots=True)
class LiveRules:
    """The rules that are fixed before the first unit.

    cycle: the length of the traffic's cycle, seconds; 0: there is none. kinds: the largest number of kinds. waived:
    True if the verdict does not wait for the cycles.
    """

    questions: tuple[Question, ...]
    alpha: float
    cycle: float
    kinds: int
    waived: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha < 1.0:
            raise InvalidArgumentError(f"alpha is {self.alpha}: it must be between 0 and 1")
        if not self.questions:
            raise InvalidArgumentError("a gate needs a question: give at least one")

    @property
    def in_cycles(self) -> bool:
        """It is True if the verdict is about whole cycles of the traffic."""
        return self.cycle > 0.0 and not self.waived

    def needed_seconds(self, kind: str) -> float:
        """Returns the time that the units of a mean have to span before it decides anything."""
        return self.cycle * (MIN_CYCLES if kind == ALL else 1) if self.in_cycles else 0.0


@dataclass(frozen=True, slots=True)
class LiveFinding:
    """One mean, as people see it. low, high: an interval that is valid at every look, widened by √v̂. inflation: v̂;
    infinite where it is not known. required: a pass needs this mean."""

    question: Question
    kind: str
    units: int
    mean: float
    low: float
    high: float
    margin: float
    inflation: float
    passed: bool
    required: bool


@dataclass(frozen=True, slots=True)
class LiveVerdict:
    """The verdict so far.

    failed: the mean that is above its margin, or would be if the cycles were over. early: True if the outcome would be
    PASS or FAIL if the cycles were over; `outcome` is UNDECIDED then. waiting: what a pass waits for. unseen: the share
    of the traffic that was met of each kind that is not seen enough.
    """

    outcome: Outcome
    failed: LiveFinding | None
    early: Outcome | None
    waiting: tuple[LiveFinding, ...]
    findings: tuple[LiveFinding, ...]
    unseen: Mapping[str, float]
    seconds: float


@dataclass(slots=True)
class LiveState:
    """The evidence, to be stored. means: by question and by kind. met: the number of requests that were met by kind,
    whether they can be compared or not. units: that have counted."""

    rules: LiveRules
    means: dict[str, dict[str, LiveMean]] = field(default_factory=dict)
    met: dict[str, int] = field(default_factory=dict)
    units: int = 0


class LiveGate:
    """Owns the tests of one candidate on live traffic.

    >>> gate = LiveGate(LiveState(LiveRules((Question("near", "farther", 0.05, 0.15),), 0.05, 0.0, 26)))
    >>> for n in range(800):
    ...     gate.update_met("chat")
    ...     gate.update("chat", {"near": 0.01 * (-1) ** n}, now=float(n))
    >>> gate.verdict(lambda kind, units: 1.0).outcome.value
    'pass'
    """

    def __init__(self, state: LiveState) -> None:
        self.state = state
        self._questions = {question.name: question for question in state.rules.questions}
        for name, question in self._questions.items():
            state.means.setdefault(name, {}).setdefault(ALL, LiveMean(MeanTest(question.margin)))

    def update_met(self, kind: str) -> None:
        """Counts a request of the traffic, whether it can be compared or not."""
        self.state.met[kind] = self.state.met.get(kind, 0) + 1

    def update(self, kind: str, excess: Mapping[str, float], now: float) -> None:
        """Counts a unit. excess: D by the name of each question that applies. now: its time, seconds. Raises
        InvalidArgumentError for a kind without a name, a question that is not asked, or a D outside of [-1, 1]."""
        if kind == ALL:
            raise InvalidArgumentError("the kind has no name: give one")
        if not excess or not excess.keys() <= self._questions.keys():
            raise InvalidArgumentError(f"the excess is of {sorted(excess)}: it must be of {sorted(self._questions)}")
        for name, value in excess.items():
            if not -1.0 <= value <= 1.0:
                raise InvalidArgumentError(f"the excess of {name} is {value}: it must be within -1 and 1")
        cycle = self.state.rules.cycle
        gap = cycle / 2.0 if cycle else math.inf
        for name, value in excess.items():
            means = self.state.means[name]
            for counted in (ALL, kind):
                if counted not in means:
                    means[counted] = LiveMean(MeanTest(self._questions[name].allowed(counted)))
                means[counted].update(value, now, gap)
        self.state.units += 1

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set: what has not spanned the cycles that it has to span begins again, or goes on
        without the time that was lost. Evidence stays."""
        for means in self.state.means.values():
            for kind, mean in means.items():
                mean.after_break(time_break, self.state.rules.needed_seconds(kind))

    def verdict(self, noted: Noted) -> LiveVerdict:
        rules, needed = self.state.rules, -math.log(self.state.rules.alpha)
        findings: list[LiveFinding] = []
        own: list[float] = []
        short: set[str] = set()
        inflations = self._inflations()
        for name, means in self.state.means.items():
            for kind, mean in means.items():
                v = max(inflations[kind], noted(kind, mean.bets.units)) if mean.is_known else math.inf
                passed = math.isfinite(v) and mean.bets.passing(max(v, self._unseen_inflation(mean))) >= needed
                own.append(mean.bets.failing(v) if math.isfinite(v) else 0.0)
                if mean.elapsed < rules.needed_seconds(kind) and self._required(kind, mean):
                    short.add(kind)
                findings.append(self._finding(name, kind, mean, v, passed=passed))
        failed = self._above_its_margin(findings, own)
        waiting = tuple(finding for finding in findings if finding.required and not finding.passed)
        outcome = Outcome.FAIL if failed is not None else Outcome.UNDECIDED if waiting else Outcome.PASS
        too_early = failed.kind in short if failed is not None else bool(short)
        return LiveVerdict(
            Outcome.UNDECIDED if too_early else outcome,
            failed,
            outcome if too_early and outcome is not Outcome.UNDECIDED else None,
            waiting,
            tuple(finding for finding in findings if finding.units),
            self._unseen(),
            min(means[ALL].elapsed for means in self.state.means.values()),
        )

    def _inflations(self) -> dict[str, float]:
        """Returns v̂ by kind, the largest one of all questions whose own is known: bad answers that come in runs show
        that only after the first run."""
        result: dict[str, float] = {}
        for means in self.state.means.values():
            for kind, mean in means.items():
                if mean.is_known:
                    own = mean.inflation(in_cycles=self.state.rules.in_cycles)
                    result[kind] = max(result.get(kind, 1.0), own)
        return result

    def _unseen_inflation(self, mean: LiveMean) -> float:
        """Returns v̂ of bad answers in runs of `RUN` requests, of which the mean gets a part."""
        return 1.0 + (RUN - 1.0) * mean.bets.units / max(self.state.units, 1)

    def _required(self, kind: str, mean: LiveMean) -> bool:
        return kind == ALL or mean.bets.units >= MIN_UNITS

    def _finding(self, name: str, kind: str, mean: LiveMean, v: float, *, passed: bool) -> LiveFinding:
        interval = mean.shown.get(self.state.rules.alpha)
        reach = (interval.high - interval.mean) * math.sqrt(v) if math.isfinite(v) else 1.0
        known = mean.bets.units > 0
        return LiveFinding(
            self._questions[name],
            kind,
            mean.bets.units,
            mean.bets.mean,
            max(mean.bets.mean - reach, -1.0) if known else -1.0,
            min(mean.bets.mean + reach, 1.0) if known else 1.0,
            mean.bets.margin,
            v,
            passed,
            self._required(kind, mean),
        )

    def _above_its_margin(self, findings: Sequence[LiveFinding], own: Sequence[float]) -> LiveFinding | None:
        """Returns the mean that the closed test finds above its margin; the one with the most evidence."""
        weights = [self._weight(finding.question, finding.kind) for finding in findings]
        unused = max(1.0 - sum(weights), 0.0)
        best = max(range(len(own)), key=lambda j: own[j])
        rest = ([*own, 0.0], [*weights, unused]) if unused > 0.0 else (own, weights)
        adjusted = own[best] + math.log(least_mean(*rest, best))
        return findings[best] if adjusted >= -math.log(self.state.rules.alpha) else None

    def _weight(self, question: Question, kind: str) -> float:
        """Returns the weight of a mean in the closed test of failing."""
        if kind == ALL:
            return 0.5 / len(self._questions)
        slots = max(self.state.rules.kinds, 1)
        place = list(self.state.means[question.name]).index(kind)  # `ALL` is the first one
        return 0.5 / len(self._questions) / place / sum(1.0 / j for j in range(1, slots + 1))

    def _unseen(self) -> dict[str, float]:
        """Returns the share of the traffic that was met of each kind in which a question is not required."""
        total = sum(self.state.met.values())
        return {
            kind: requests / total
            for kind, requests in self.state.met.items()
            if any(kind not in means or not self._required(kind, means[kind]) for means in self.state.means.values())
        }
