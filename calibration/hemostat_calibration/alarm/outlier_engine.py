"""The test that names an outlier among several engines: one with a wrong scale, a stale checkpoint, another
quantization.

The unit is a scored request that is one of the independent units (the first of its conversation), its figure is any
number that says how far its engine was from the reference, such as the mean KL divergence of its tokens. Units are
compared within a *stratum*, a kind of traffic under one profile: engines may get different mixes of kinds.

For each engine, every unit is two bets, on the gap that its figure falls into among the n sorted figures of the stratum
before it, and on its label, "own" or "another's". A strategy has probabilities f(gap | label) (`placement`), and q(own)
is what they make of the engine's share of the units so far, by Bayes' rule.

    A = Π (n + 1) f(gap | label)             B = Π q(label | gap) / max_θ Π θ(label)

θ is any constant probability of "own"; its maximum is taken over a window of successive units, and B is the product
over windows. The evidence is the smaller one of both wealths. It reaches 1/α with a probability of at most α, however
often one looks (Ville's inequality), if either

- figures are exchangeable within a stratum, given which engine got which unit: any routing, traffic that stays the
  same. All gaps are equally likely then, whatever the order and the labels before, so that A is a martingale; or
- labels are independent with a constant probability over a window, given the figures: routing by a hash of the
  conversation, traffic that drifts as it likes. Π q / Π θ is a martingale then, for the true θ, and B is at most that.
  (The maximum is taken as in universal inference: Wasserman, Ramdas & Balakrishnan, arXiv 1912.11436.)

Only ranks count, so that heavy tails and unequal lengths change nothing.

An engine that changes late has figures like the others' until then. So there are several *runs* of bets: the first uses
all labels; of the others one begins anew every RESTART_UNITS_PER_ENGINE, and takes what was before for another's. Run
by run, A and B are as above: what a label is taken for is known before the bet, and all runs look at the same gaps. The
wealth is the sum over runs and strategies. A run keeps its wealth when it begins anew, and is funded with a part of 1
that is fixed in advance; all parts add up to 1, so that the sum is below a martingale that begins at 1, for the whole
life. (A mixture over times of the change as in e-detectors, Shin, Ramdas & Rinaldo, arXiv 2203.03532, whose weights add
up to 1 here: these bound the number of false alarms over time, this the probability of any.) The k-th part is about
1 / (k ln² k), which costs ln k + 2 ln ln k of evidence.

`alpha` is spent over all tests that are ever begun: FIRST_COHORT of it by the first COHORT tests equally, of the rest r
the g-th COHORT after them shares r / (g(g+1)). The bound is on any alarm where no engine differs; one that does is
compared with until it is named. With two engines, both differ from "the others": which of the two is at fault is not
known then.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.alarm.betting import Crossing, WealthState, fund, initial_wealth, multiply
from hemostat_calibration.alarm.placement import FARTHER, LOG_WEIGHTS, placements
from hemostat_calibration.arrays import Floats
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import InvalidArgumentError

RESTARTS = 3
"""The number of runs that begin anew, one after the other."""
RESTART_UNITS_PER_ENGINE = 4
"""The number of units of an engine between two restarts, on average. More often finds late changes sooner, and costs
more parts; a window is as long as RESTARTS of them, and shorter ones pay for their maximum more often."""
MAX_STRATUM_UNITS = 128
"""The largest number of figures that a unit is compared with; then the stratum begins anew. All of them are forgotten
at once: after a part of the order was forgotten, gaps would not be equally likely, given what was seen.
"""
ACTIVE_SECONDS = 3600.0
"""An engine without a unit for so long is neither tested nor counted for the length of windows."""
COHORT = 4
FIRST_COHORT = 0.9
FIRST_PART = 0.5
"""The part of the wealth for the run that uses all labels."""
SHARE_UNITS = 4.0
"""The number of units of each engine as which equal shares count in an engine's share so far."""
FORECAST_UNITS = 40.0
"""An engine's share so far counts in its forecast like so many units of the window."""
MIN_RECOVERY_UNITS = 5
"""The number of units that a window needs to end an alarm, of its own and of others: it ends the alarm if freshly
funded bets have lost wealth in it."""
MAX_ENGINES = 64
MAX_STRATA = 256

_TIE_STEP = (math.sqrt(5.0) - 1.0) / 2.0
"""The step by whose multiples ties are broken: their fractional parts know neither figures nor labels."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of an engine. figure: nats, or any other number. tokens: the number of tokens that it is from."""

    engine: str
    figure: float
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class EngineTest:
    """The test of one engine.

    number: its place among all tests that were begun, from 0. units: the number of the engine's own units. before: the
    number of units of all engines before its first one. last: the time of its last unit. wealth: of 2 × runs ×
    strategies, first the strategies of A, then those for B. restarts: the number of restarts so far. since_restart: the
    number of units since the last one. begun: int64 [runs], the number of the unit with which each run began. windows:
    int64 [runs, 2], the engine's own units and others' in the window. recovery: float64 [2 × strategies]; after a
    crossing, ln of what the first run made of 1 in its window.
    """

    alpha: float
    number: int
    wealth: WealthState
    begun: npt.NDArray[np.int64]
    windows: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((1 + RESTARTS, 2), np.int64))
    restarts: int = 0
    since_restart: int = 0
    crossing: Crossing | None = None
    units: int = 0
    before: int = 0
    last: float = 0.0
    recovery: Floats | None = None

    @property
    def log_evidence(self) -> float:
        """The natural logarithm of the smaller one of both wealths, with what is held back."""
        held_back = math.log((1.0 - FIRST_PART) * _held_back(self.restarts))
        return float(np.logaddexp(_smaller(self.wealth.log_wealth), held_back))


@dataclass(frozen=True, slots=True, eq=False)
class Stratum:
    """Units since it began anew, by figure. numbers: of the units, among all. last: time of its last unit."""

    figures: tuple[float, ...] = ()
    engines: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    last: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class OutlierTest:
    """The tests of all engines. alpha: the probability of any false alarm, over all engines and the whole run. begun:
    the number of tests so far. units: the number of units so far.
    """

    alpha: float
    begun: int = 0
    units: int = 0
    tests: Mapping[str, EngineTest] = field(default_factory=dict)
    strata: Mapping[str, Stratum] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineReading:
    """The state of one engine's test.

    raised: the evidence of the alarm, `requests` in it are units of all engines; None if there is none. farther: its
    figures are higher than the others'; lower otherwise. log_evidence: ln of the wealth; it alarms at ln(1/alpha).
    """

    engine: str
    raised: Crossing | None
    farther: bool
    log_evidence: float
    alpha: float
    units: int
    tokens: int


def init(alpha: float, begun: int = 0) -> OutlierTest:
    """Returns the state before the first unit. begun: the number of tests in earlier parts of the run, whose alpha is
    not spent again. Raises InvalidArgumentError on a bad alpha.

    >>> readings(init(0.01))
    []
    """
    if not 0.0 < alpha < 1.0:
        raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
    return OutlierTest(alpha, begun)


def update(state: OutlierTest, stratum: str, unit: Unit, now: float = 0.0) -> OutlierTest:
    """Returns the test with one more unit. now: seconds, of a clock that does not go back.

    >>> state = init(0.01)
    >>> for n in range(80):
    ...     state = update(state, "chat", Unit(f"engine {n % 4}", 0.03 if n % 4 == 2 else 0.6 + 0.01 * (n % 7), 49))
    >>> [(reading.engine, reading.farther) for reading in readings(state) if reading.raised]
    [('engine 2', False)]
    """
    if not math.isfinite(unit.figure):
        return state
    active = {name for name, test in state.tests.items() if now - test.last < ACTIVE_SECONDS}
    state = _with_test(state, unit, now)
    before = state.strata.get(stratum, Stratum())
    lowest, highest = bisect_left(before.figures, unit.figure), bisect_right(before.figures, unit.figure)
    place = lowest + int((state.units + 1) * _TIE_STEP % 1.0 * (highest - lowest + 1))
    state = _bet(state, active & state.tests.keys(), before, place, unit, now)
    return replace(state, units=state.units + 1, strata=_with_unit(state, stratum, before, place, unit, now))


def after_break(state: OutlierTest, time_break: TimeBreak) -> OutlierTest:
    """Returns the same after the time was set: every engine was last seen as long ago as before.

    >>> state = update(init(0.01), "chat", Unit("engine 1", 0.6, 49), now=100.0)
    >>> after_break(state, TimeBreak(now=1.7e9, lost=1.7e9 - 110.0, anew=True)).tests["engine 1"].last
    1699999990.0
    """
    tests = {name: replace(test, last=time_break.seen(test.last)) for name, test in state.tests.items()}
    strata = {name: replace(stratum, last=time_break.seen(stratum.last)) for name, stratum in state.strata.items()}
    return replace(state, tests=tests, strata=strata)


def _with_unit(
    state: OutlierTest, name: str, before: Stratum, place: int, unit: Unit, now: float
) -> Mapping[str, Stratum]:
    others = {other: stratum for other, stratum in state.strata.items() if other != name}
    while len(others) >= MAX_STRATA:
        del others[min(others, key=lambda other: others[other].last)]
    if len(before.figures) + 1 >= MAX_STRATUM_UNITS:
        return others
    figures = (*before.figures[:place], unit.figure, *before.figures[place:])
    engines = (*before.engines[:place], unit.engine, *before.engines[place:])
    numbers = (*before.numbers[:place], state.units, *before.numbers[place:])
    return {**others, name: Stratum(figures, engines, numbers, now)}


def _with_test(state: OutlierTest, unit: Unit, now: float) -> OutlierTest:
    tests = dict(state.tests)
    test = tests.pop(unit.engine, None)
    begun = state.begun
    if test is None:
        while len(tests) >= MAX_ENGINES:
            del tests[min(tests, key=lambda name: tests[name].last)]
        test, begun = _begin(state.alpha, begun, 0, now), begun + 1
        test = replace(test, before=state.units)
    tests[unit.engine] = replace(test, units=test.units + 1, last=now)
    return replace(state, begun=begun, tests=tests)


def _begin(alpha: float, number: int, first: int, now: float) -> EngineTest:
    """Returns the test of an engine at its beginning. first: number of the unit from which on labels are used."""
    cohort = number // COHORT
    part = (1.0 - FIRST_COHORT) / (cohort * (cohort + 1)) if cohort else FIRST_COHORT
    begun = np.full(1 + RESTARTS, first, np.int64)
    wealth = initial_wealth(2 * (1 + RESTARTS) * len(LOG_WEIGHTS))
    return EngineTest(alpha * part / COHORT, number, fund(wealth, _parts(0, FIRST_PART), now), begun)


def _parts(run: int, part: float) -> Floats:
    """Returns ln of what every strategy of one run gets: float64 [2 × runs × strategies]."""
    parts = np.full((2, 1 + RESTARTS, len(LOG_WEIGHTS)), -np.inf)
    parts[:, run] = LOG_WEIGHTS + math.log(part)
    return parts.ravel()


def _held_back(restarts: int) -> float:
    """Returns the part of the wealth for restarts that is left after so many restarts.

    >>> [round(_held_back(restarts), 3) for restarts in (0, 1, 100)]
    [1.0, 0.591, 0.178]
    """
    return 1.0 / (1.0 + math.log(restarts + 1.0))


def _smaller(log_wealth: Floats) -> float:
    """Returns ln of the smaller sum of both halves."""
    return float(np.logaddexp.reduce(log_wealth.reshape(2, -1), axis=1).min())


def _bet(state: OutlierTest, active: set[str], stratum: Stratum, place: int, unit: Unit, now: float) -> OutlierTest:
    """Returns the test after bets on the unit in the test of every engine that was active before it. An engine that is
    known to differ is not among "the others", unless there are no others: of two engines both differ."""
    tests, begun = dict(state.tests), state.begun
    known = {name for name in active if tests[name].crossing is not None}
    groups: dict[frozenset[str], list[str]] = {}
    for name in sorted(active):
        left_out = frozenset(known - {name} if active - known - {name} else ())
        if unit.engine not in left_out:
            groups.setdefault(left_out, []).append(name)
    length = RESTART_UNITS_PER_ENGINE * max(len(active), 2)
    for left_out, names in groups.items():
        compared = [index for index, engine in enumerate(stratum.engines) if engine not in left_out]
        engines = [stratum.engines[index] for index in compared]
        numbers = np.array([stratum.numbers[index] for index in compared], np.int64)
        gap = bisect_left(compared, place)
        labels = np.array([[engine == name for engine in engines] for name in names], bool)
        begun_runs = np.stack([tests[name].begun for name in names])
        placed = placements(labels[:, None, :] & (numbers >= begun_runs[:, :, None]), gap)
        windows = np.stack([tests[name].windows for name in names])
        shares = np.array([_share(tests[name], name, unit, state.units, len(active)) for name in names])
        is_own = np.array([name == unit.engine for name in names])
        after, factors = _log_factors(windows, shares, is_own, *placed, gaps=len(compared) + 1)
        for index, name in enumerate(names):
            test = _bet_once(tests[name], after[index], factors[index], unit.tokens if is_own[index] else 0, now)
            if test.since_restart >= length:
                if _recovered(test):
                    fresh = _begin(state.alpha, begun, state.units + 1, now)
                    test, begun = replace(fresh, units=test.units, before=test.before, last=test.last), begun + 1
                else:
                    test = _restart(test, state.units + 1, now)
            tests[name] = test
    return replace(state, tests=tests, begun=begun)


def _share(test: EngineTest, name: str, unit: Unit, units: int, active: int) -> float:
    """Returns the share of the units before this one that are the engine's own: a forecast for the next unit."""
    others = SHARE_UNITS * (max(active, 2) - 1)
    return (test.units - (unit.engine == name) + SHARE_UNITS) / (units - test.before + SHARE_UNITS + others)


def _log_factors(
    windows: npt.NDArray[np.int64],
    shares: Floats,
    is_own: npt.NDArray[np.bool_],
    own: Floats,
    other: Floats,
    gaps: int,
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Returns, for the tests of E engines and one unit, the windows after it, and ln of what A and B grow by, [E, 2,
    runs, strategies].

    windows: int64 [E, runs, 2]. shares: float64 [E], forecasts. is_own: bool [E]. own, other: float64 [E, runs,
    strategies], probabilities of the gap that the figure fell into, by its label. gaps: the number of gaps.
    """
    label = is_own[:, None, None]
    after = windows + np.stack([is_own, ~is_own], axis=1)[:, None, :]
    units = windows.sum(axis=2, keepdims=True)
    forecast = (windows[:, :, :1] + FORECAST_UNITS * shares[:, None, None]) / (units + FORECAST_UNITS)
    by_label = np.where(label, own, other)
    chance = np.where(label, forecast, 1.0 - forecast) * by_label / (forecast * own + (1.0 - forecast) * other)
    growth = max_log_likelihood(after) - max_log_likelihood(windows)
    return after, np.stack([np.log(gaps * by_label), np.log(chance) - growth[:, :, None]], axis=1)


def _bet_once(test: EngineTest, windows: npt.NDArray[np.int64], factors: Floats, tokens: int, now: float) -> EngineTest:
    """Returns the test after one bet. factors: float64 [2, runs, strategies], see `_log_factors`. tokens: of the
    engine's own."""
    since_restart = test.since_restart + 1
    if test.crossing is not None:
        recovery = None if test.recovery is None else test.recovery + factors[:, 0].ravel()
        return replace(test, windows=windows, since_restart=since_restart, recovery=recovery)
    wealth = multiply(test.wealth, factors.ravel(), tokens)
    test = replace(test, windows=windows, since_restart=since_restart, wealth=wealth)
    if test.log_evidence < -math.log(test.alpha):
        return test
    return replace(test, crossing=wealth.crossing(now, test.log_evidence))


def max_log_likelihood(counts: npt.NDArray[np.int64]) -> Floats:
    """Returns ln of the largest likelihood of labels under a constant probability, for counts of both: [..., 2] ->
    [...].

    >>> max_log_likelihood(np.array([[1, 3], [5, 0], [0, 0]])).round(3).tolist()
    [-2.249, 0.0, 0.0]
    """
    shares = np.maximum(counts, 1) / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    result: Floats = (counts * np.log(shares)).sum(axis=-1)
    return result


def _restart(test: EngineTest, first: int, now: float) -> EngineTest:
    """Returns the test with its next run begun anew. Whenever this is the last one, the window of the first run begins
    anew, too. first: the number of the next unit.
    """
    run = 1 + test.restarts % RESTARTS
    begun, windows, recovery = test.begun.copy(), test.windows.copy(), test.recovery
    begun[run] = first
    windows[run] = 0
    if run == RESTARTS:
        windows[0] = 0
        recovery = None if test.crossing is None else np.tile(LOG_WEIGHTS, 2)
    test = replace(test, begun=begun, windows=windows, recovery=recovery, since_restart=0, restarts=test.restarts + 1)
    if test.crossing is not None:
        return test
    part = (1.0 - FIRST_PART) * (_held_back(test.restarts - 1) - _held_back(test.restarts))
    return replace(test, wealth=fund(test.wealth, _parts(run, part), now))


def _recovered(test: EngineTest) -> bool:
    """Returns True if freshly funded bets have lost wealth in the first run's window, which is complete."""
    complete = test.restarts % RESTARTS == RESTARTS - 1
    if test.recovery is None or not complete or test.windows[0].min() < MIN_RECOVERY_UNITS:
        return False
    return _smaller(test.recovery) <= 0.0


def readings(state: OutlierTest) -> list[EngineReading]:
    """Returns the reading of every engine that has been seen, sorted by name.

    >>> readings(init(0.01))
    []
    """
    return [
        EngineReading(
            engine=name,
            raised=test.crossing,
            farther=bool(FARTHER[int(np.argmax(test.wealth.log_wealth)) % len(FARTHER)]),
            log_evidence=test.log_evidence,
            alpha=test.alpha,
            units=test.units,
            tokens=test.wealth.tokens,
        )
        for name, test in sorted(state.tests.items())
    ]
