"""Which of several engines is not like the others: one with a wrong scale, a stale checkpoint, another quantization.

The unit is a scored request that is one of the independent units (the first of its conversation), its figure is any
number that says how far its engine was from the reference, such as the mean KL divergence of its tokens. Units are
compared within a *stratum*, a kind of traffic under one profile: engines may get different mixes of kinds.

For each engine, every unit is a bet on its label, "own" or "another's", from the gap that its figure falls into among
the sorted figures of the stratum before it. A strategy gives the probability q of "own" for each of the m gaps, and
their mean over the gaps is p, a forecast that does not know the figure. Within a window of successive units

    E = Π q(label) / max(Π p(label), max_θ Π θ(label)),        θ: any constant probability of "own"

and the wealth is the product of E over windows. It reaches 1/α with a probability of at most α, however often one looks
(Ville), if either

- figures are exchangeable within a stratum, given which engine got which unit: any routing, traffic that stays the
  same. All m gaps are equally likely then, so that Π q / Π p is a martingale; or
- labels are independent with a constant probability over a window, given the figures: routing by a hash of the
  conversation, traffic that drifts as it likes. Π q / Π θ is a martingale then, for the true θ. (The maximum in the
  denominator is that of universal inference: Wasserman, Ramdas & Balakrishnan, arXiv 1912.11436.)

Only ranks count, so that heavy tails and unequal lengths change nothing. Strategies: own figures lie below (or above) a
threshold, which is learned from the labels before; or the log-odds of "own" grow with the rank. As in an e-detector
(Shin, Ramdas & Rinaldo, arXiv 2203.03532), each window funds the strategies anew, for changes that come late.

`alpha` is spent over all tests that are ever begun: FIRST_COHORT of it by the first COHORT tests equally, of the rest r
the g-th COHORT after them shares r / (g(g+1)). With two engines, both differ from "the others": which of the two is at
fault is not known then.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.alarm.betting import Crossing, WealthState, fund, initial_wealth, log_sum_exp, multiply
from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError

WINDOW_UNITS_PER_ENGINE = 12
"""Of a window, on average. Shorter ones fund late changes sooner and pay for the denominator more often."""
MAX_STRATUM_UNITS = 64
"""Figures that a unit is compared with; then the stratum begins anew, so that gaps stay equally likely."""
ACTIVE_SECONDS = 3600.0
"""An engine without a unit for so long is neither tested nor counted for the length of windows."""
COHORT = 4
FIRST_COHORT = 0.9
FIRST_WINDOW = 0.7
"""Part of the wealth that the first window gets; of the rest r, the k-th gets r / (k(k-1))."""
SHARE_UNITS = 4.0
"""Equal shares count in an engine's share so far like so many units of each engine."""
FORECAST_UNITS = 40.0
"""An engine's share so far counts in its forecast like so many units of the window."""
MIN_RECOVERY_UNITS = 5
"""After an alarm, a window with so many units of its own and of others, in which freshly funded bets have lost wealth,
ends it."""
MAX_ENGINES = 64
MAX_STRATA = 256

NOISES = (0.02, 0.15)
"""Probabilities of a label on the wrong side of the threshold, of the strategies that learn one."""
TILTS = np.array([-3.0, -8.0, 3.0, 8.0])
"""Of the other strategies: the log-odds of "own" grow by so much from the lowest to the highest rank."""
FARTHER = np.array([False, False, True, True, False, False, True, True])
"""Strategies that bet that the engine's figures are higher: thresholds by noise, lower and higher; then TILTS."""
LOG_WEIGHTS = np.log(np.array([0.4, 0.07, 0.4, 0.07, 0.015, 0.015, 0.015, 0.015]))
"""ln of the parts of what is funded."""
MEAN_ERROR = 1e-9
"""Of a strategy's mean over the gaps: 10^-6 of the smallest forecast, in a window of 10^3 units."""
_TIE_STEP = (math.sqrt(5.0) - 1.0) / 2.0
"""Ties are broken by the fractional parts of its multiples, which know neither figures nor labels."""


@dataclass(frozen=True, slots=True)
class Unit:
    """figure: nats, or any other number; tokens: that it is of."""

    engine: str
    figure: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Window:
    """Successive units that share one denominator. units: of all engines that are compared; own: of the one that is
    tested. log_forecast: ln of Π p(label)."""

    units: int = 0
    own: int = 0
    log_forecast: float = 0.0

    @property
    def log_denominator(self) -> float:
        """ln of the larger of Π p(label) and the largest likelihood of the labels under a constant probability.

        >>> round(Window(4, 1, -3.0).log_denominator, 3), round(4 * math.log(4) - 3 * math.log(3), 3)
        (-2.249, 2.249)
        """
        shares = (count / self.units for count in (self.own, self.units - self.own) if count)
        return max(self.log_forecast, self.units * sum(share * math.log(share) for share in shares))


@dataclass(frozen=True, slots=True, eq=False)
class EngineTest:
    """Of one engine. number: among all tests that were begun, from 0. windows: begun so far. units: its own, all
    together. before: of all engines, before its first one. last: time of its last unit. recovery: float64 [S]; after a
    crossing, ln of what each strategy made of 1 in this window."""

    alpha: float
    number: int
    wealth: WealthState = field(default_factory=lambda: initial_wealth(len(LOG_WEIGHTS)))
    window: Window = field(default_factory=Window)
    windows: int = 0
    crossing: Crossing | None = None
    units: int = 0
    before: int = 0
    last: float = 0.0
    recovery: Floats | None = None

    @property
    def log_evidence(self) -> float:
        """ln of the whole wealth, what is held back included."""
        if not self.windows:
            return 0.0
        held_back = math.log((1.0 - FIRST_WINDOW) / self.windows)
        return float(np.logaddexp(log_sum_exp(self.wealth.log_wealth[:, None])[0], held_back))


@dataclass(frozen=True, slots=True, eq=False)
class Stratum:
    """Units since it began anew, by figure. last: time of its last unit."""

    figures: tuple[float, ...] = ()
    engines: tuple[str, ...] = ()
    last: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class OddEngines:
    """alpha: probability of any false alarm, over all engines and the whole run. begun: tests so far. units: so far."""

    alpha: float
    begun: int = 0
    units: int = 0
    tests: Mapping[str, EngineTest] = field(default_factory=dict)
    strata: Mapping[str, Stratum] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineReading:
    """State of one engine's test.

    raised: the evidence of the alarm, `requests` in it are units of all engines; None where there is none. farther: its
    figures are higher than the others'; lower otherwise. log_evidence: ln of the wealth; it alarms at ln(1/alpha).
    """

    engine: str
    raised: Crossing | None
    farther: bool
    log_evidence: float
    alpha: float
    units: int
    tokens: int


def init(alpha: float, begun: int = 0) -> OddEngines:
    """begun: tests of earlier parts of the run, whose alpha is not spent again. InvalidArgumentError on a bad alpha.

    >>> readings(init(0.01))
    []
    """
    if not 0.0 < alpha < 1.0:
        raise InvalidArgumentError(f"alpha is {alpha}: it must be between 0 and 1")
    return OddEngines(alpha, begun)


def update(state: OddEngines, stratum: str, unit: Unit, now: float = 0.0) -> OddEngines:
    """Add one unit. now: seconds, of a clock that does not go back.

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
    return replace(state, units=state.units + 1, strata=_with_unit(state.strata, stratum, before, place, unit, now))


def _with_unit(
    strata: Mapping[str, Stratum], name: str, before: Stratum, place: int, unit: Unit, now: float
) -> Mapping[str, Stratum]:
    others = {other: one for other, one in strata.items() if other != name}
    while len(others) >= MAX_STRATA:
        del others[min(others, key=lambda other: others[other].last)]
    if len(before.figures) + 1 >= MAX_STRATUM_UNITS:
        return others
    figures = (*before.figures[:place], unit.figure, *before.figures[place:])
    engines = (*before.engines[:place], unit.engine, *before.engines[place:])
    return {**others, name: Stratum(figures, engines, now)}


def _with_test(state: OddEngines, unit: Unit, now: float) -> OddEngines:
    tests = dict(state.tests)
    test = tests.pop(unit.engine, None)
    begun = state.begun
    if test is None:
        while len(tests) >= MAX_ENGINES:
            del tests[min(tests, key=lambda name: tests[name].last)]
        test, begun = _begin(state.alpha, begun)
        test = replace(test, before=state.units)
    tests[unit.engine] = replace(test, units=test.units + 1, last=now)
    return replace(state, begun=begun, tests=tests)


def _begin(alpha: float, begun: int) -> tuple[EngineTest, int]:
    cohort = begun // COHORT
    part = (1.0 - FIRST_COHORT) / (cohort * (cohort + 1)) if cohort else FIRST_COHORT
    return EngineTest(alpha * part / COHORT, begun), begun + 1


def _bet(state: OddEngines, active: set[str], stratum: Stratum, place: int, unit: Unit, now: float) -> OddEngines:
    """Bet on the unit in the test of every engine that was active before it. An engine that is known to differ is not
    among "the others", unless there are no others: of two engines both differ."""
    tests, begun = dict(state.tests), state.begun
    known = {name for name in active if tests[name].crossing is not None}
    groups: dict[frozenset[str], list[str]] = {}
    for name in sorted(active):
        left_out = frozenset(known - {name} if active - known - {name} else ())
        if unit.engine not in left_out:
            groups.setdefault(left_out, []).append(name)
            tests[name] = _begin_window(tests[name], now) if not tests[name].window.units else tests[name]
    for left_out, names in groups.items():
        compared = [engine for engine in stratum.engines if engine not in left_out]
        gap = sum(engine not in left_out for engine in stratum.engines[:place])
        labels = np.array([[engine == name for engine in compared] for name in names], bool)
        forecasts = np.array([_forecast(tests[name], name, unit, state.units, len(active)) for name in names])
        for name, own, forecast in zip(names, probabilities(labels, forecasts)[:, :, gap], forecasts, strict=True):
            tests[name] = _bet_once(tests[name], own, float(forecast), unit, name, now)
    for name in (name for names in groups.values() for name in names):
        if tests[name].window.units >= WINDOW_UNITS_PER_ENGINE * max(len(active), 2):
            test = tests[name]
            if _recovered(test):
                fresh, begun = _begin(state.alpha, begun)
                test = replace(fresh, units=test.units, before=test.before, last=test.last)
            tests[name] = replace(test, window=Window(), recovery=None)
    return replace(state, tests=tests, begun=begun)


def _forecast(test: EngineTest, name: str, unit: Unit, units: int, active: int) -> float:
    """The probability that the next unit is the engine's own, from the labels before it alone."""
    others = SHARE_UNITS * (max(active, 2) - 1)
    share = (test.units - (unit.engine == name) + SHARE_UNITS) / (units - test.before + SHARE_UNITS + others)
    return (test.window.own + FORECAST_UNITS * share) / (test.window.units + FORECAST_UNITS)


def _begin_window(test: EngineTest, now: float) -> EngineTest:
    k = test.windows + 1
    if test.crossing is not None:
        return replace(test, recovery=LOG_WEIGHTS)
    part = (1.0 - FIRST_WINDOW) / (k * (k - 1)) if k > 1 else FIRST_WINDOW
    return replace(test, windows=k, wealth=fund(test.wealth, LOG_WEIGHTS + math.log(part), now))


def _bet_once(test: EngineTest, own: Floats, forecast: float, unit: Unit, name: str, now: float) -> EngineTest:
    """own: float64 [S], each strategy's probability that the unit is the engine's own."""
    is_own = unit.engine == name
    chance = forecast if is_own else 1.0 - forecast
    window = Window(test.window.units + 1, test.window.own + is_own, test.window.log_forecast + math.log(chance))
    before = test.window.log_denominator if test.window.units else 0.0
    factors = np.log(own) if is_own else np.log1p(-own)
    factors = factors - (window.log_denominator - before)
    if test.crossing is not None:
        return replace(test, window=window, recovery=None if test.recovery is None else test.recovery + factors)
    test = replace(test, window=window, wealth=multiply(test.wealth, factors, unit.tokens if is_own else 0))
    if test.log_evidence < -math.log(test.alpha):
        return test
    return replace(test, crossing=test.wealth.crossing(now, test.log_evidence), recovery=None)


def probabilities(labels: npt.NDArray[np.bool_], forecasts: Floats) -> Floats:
    """Each strategy's probability that the next unit is an engine's own, by the gap that its figure falls into:
    float64 [E, S, n + 1], of mean `forecasts` over the gaps.

    labels: bool [E, n], whether the units before it are the engine's own, by figure. forecasts: float64 [E].

    >>> probabilities(np.array([[True, False, False, False]]), np.array([0.25]))[0, 0].round(2).tolist()
    [0.93, 0.29, 0.01, 0.01, 0.01]
    """
    engines, gaps = len(labels), labels.shape[1] + 1
    ranks = (np.arange(gaps) + 0.5) / gaps
    tilted = np.broadcast_to(TILTS[:, None] * ranks, (engines, len(TILTS), gaps))
    return _with_mean(
        np.concatenate([_thresholds(labels), _thresholds(labels[:, ::-1])[:, :, ::-1], tilted], axis=1), forecasts
    )


def _thresholds(labels: npt.NDArray[np.bool_]) -> Floats:
    """ln of the odds of "own" by gap, float64 [E, len(NOISES), n + 1], where own figures lie below a threshold, which
    is in any of the gaps with the same probability before the labels are known."""
    noise = np.array(NOISES)[:, None]
    low, high = np.log(noise), np.log1p(-noise)
    none = np.zeros((len(labels), len(NOISES), 1))
    by_unit = labels[:, None, :]
    below = np.concatenate([none, np.cumsum(np.where(by_unit, high, low), axis=2)], axis=2)
    above = np.concatenate([none, np.cumsum(np.where(by_unit, low, high)[:, :, ::-1], axis=2)], axis=2)[:, :, ::-1]
    weights = np.exp(below + above - (below + above).max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    # In the threshold's own gap, the figure lies on either side of it with the same probability.
    is_below = 1.0 - np.cumsum(weights, axis=2) + 0.5 * weights
    own = is_below * (1.0 - noise) + (1.0 - is_below) * noise
    odds: Floats = np.log(own) - np.log1p(-own)
    return odds


def _with_mean(log_odds: Floats, means: Floats) -> Floats:
    """Probabilities whose ln of the odds are `log_odds` [E, S, G] plus a constant for each row, and whose mean over the
    row is the engine's of `means` [E]: Newton's steps, or halvings where these leave what is known of the constant."""
    wanted = means[:, None]
    target = np.log(wanted) - np.log1p(-wanted)
    lowest, highest = target - log_odds.max(axis=2), target - log_odds.min(axis=2)
    shift = target - log_odds.mean(axis=2)
    while True:
        found: Floats = 1.0 / (1.0 + np.exp(-(log_odds + shift[:, :, None])))
        error = found.mean(axis=2) - wanted
        if np.abs(error).max() < MEAN_ERROR:
            return found
        lowest, highest = np.where(error < 0.0, shift, lowest), np.where(error < 0.0, highest, shift)
        step = shift - error / np.maximum((found - found * found).mean(axis=2), 1e-300)
        shift = np.where((step > lowest) & (step < highest), step, (lowest + highest) / 2.0)


def _recovered(test: EngineTest) -> bool:
    """Freshly funded bets have lost wealth in the window that is complete."""
    window = test.window
    if test.recovery is None or min(window.own, window.units - window.own) < MIN_RECOVERY_UNITS:
        return False
    return float(log_sum_exp(test.recovery[:, None])[0]) <= 0.0


def readings(state: OddEngines) -> list[EngineReading]:
    """Of every engine that has been seen, by name.

    >>> readings(init(0.01))
    []
    """
    return [
        EngineReading(
            engine=name,
            raised=test.crossing,
            farther=bool(FARTHER[int(np.argmax(test.wealth.log_wealth))]),
            log_evidence=test.log_evidence,
            alpha=test.alpha,
            units=test.units,
            tokens=test.wealth.tokens,
        )
        for name, test in sorted(state.tests.items())
    ]
