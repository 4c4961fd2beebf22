"""Which of several engines is not like the others: one with a wrong scale, a stale checkpoint, another quantization.

The unit is a scored request that is one of the independent units (the first of its conversation), its figure is any
number that says how far its engine was from the reference, such as the mean KL divergence of its tokens. Units are
compared within a *stratum*, a kind of traffic under one profile: engines may get different mixes of kinds.

Successive units of a stratum form blocks. In a block of N units, of which k are the engine's own, the ranks of the
figures are known, and so are the labels (own or another's). Under the null hypothesis all C(N, k) ways to place the
labels are equally likely, given the ranks. A strategy with weights w, one for each rank, has the e-value

    E = C(N, k) · Π_own w(rank) / e_k(w),        e_k: the elementary symmetric polynomial

whose mean over all placements is exactly 1. So the wealth of the bets (`betting`) reaches 1/α with a probability of at
most α, however often one looks (Ville). It is a permutation test by betting; ranks alone count, so that tails as heavy
as any, and requests of unequal lengths, change nothing.

The null hypothesis holds for each block if either
- figures are exchangeable, given which engine got which unit: any routing, traffic that stays the same over a block; or
- labels are exchangeable, given the figures: routing by a hash of the conversation, traffic that drifts as it likes.

`alpha` is spent over all tests that are ever begun: the g-th COHORT of them shares alpha / (g(g+1)) equally. With two
engines, both differ from "the others": which of the two is at fault is not known then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.alarm.betting import Crossing, WealthState, bet, initial_wealth, log_sum_exp
from hemostat_calibration.arrays import Floats
from hemostat_calibration.errors import InvalidArgumentError

UNITS_PER_ENGINE = 2
"""Of a block, on average. With more of them blocks take longer, in each stratum; with fewer a block says less, since
log C(N, k) / k grows with k."""
ACTIVE_SECONDS = 3600.0
"""An engine without a unit for so long is not counted for the size of blocks."""
COHORT = 4
CLEAR_BLOCKS = 10
"""After an alarm, so many blocks on which freshly funded bets lost wealth end it."""
MAX_ENGINES = 64
MAX_STRATA = 256

_TILTS = np.array([3.0, 10.0, 30.0])
TILTS = np.concatenate([-_TILTS, _TILTS])
"""A strategy's weight of a rank r of N is exp(tilt · r/N): it bets that the engine's figures are lower (negative) or
higher than the others'."""
LOG_WEIGHTS = np.log(np.array([0.1, 0.3, 0.1, 0.1, 0.3, 0.1]))
"""ln of the parts of what is funded."""


@dataclass(frozen=True, slots=True)
class Unit:
    """figure: nats, or any other number; tokens: that it is of."""

    engine: str
    figure: float
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class EngineTest:
    """Of one engine. number: among all tests that were begun, from 0. units: its own, all together. last: time of its
    last unit. recovery_log_wealth: float64 [S]; after a crossing, ln of what each strategy made of 1 in
    recovery_blocks."""

    alpha: float
    number: int
    wealth: WealthState = field(default_factory=lambda: initial_wealth(len(TILTS)))
    crossing: Crossing | None = None
    units: int = 0
    last: float = 0.0
    recovery_log_wealth: Floats | None = None
    recovery_blocks: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Of one stratum, in progress. size: at which it is complete. last: time of its last unit."""

    size: int
    units: tuple[Unit, ...]
    last: float


@dataclass(frozen=True, slots=True, eq=False)
class OddEngines:
    """alpha: probability of any false alarm, over all engines and the whole run. begun: tests so far."""

    alpha: float
    begun: int = 0
    tests: Mapping[str, EngineTest] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineReading:
    """State of one engine's test.

    raised: the evidence of the alarm, `requests` in it are blocks; None where there is none. farther: its figures are
    higher than the others'; lower otherwise. log_evidence: ln of the wealth; it alarms at ln(1/alpha).
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
    state = _with_test(state, unit, now)
    block = state.blocks.get(stratum)
    if block is None:
        active = sum(now - test.last < ACTIVE_SECONDS for test in state.tests.values())
        block = Block(UNITS_PER_ENGINE * max(active, 2), (), now)
    block = replace(block, units=(*block.units, unit), last=now)
    blocks = {name: other for name, other in state.blocks.items() if name != stratum}
    if len(block.units) < block.size:
        while len(blocks) >= MAX_STRATA:
            del blocks[min(blocks, key=lambda name: blocks[name].last)]
        return replace(state, blocks={**blocks, stratum: block})
    return _use(replace(state, blocks=blocks), block, now)


def _with_test(state: OddEngines, unit: Unit, now: float) -> OddEngines:
    tests = dict(state.tests)
    test = tests.pop(unit.engine, None)
    begun = state.begun
    if test is None:
        while len(tests) >= MAX_ENGINES:
            del tests[min(tests, key=lambda name: tests[name].last)]
        test, begun = _begin(state.alpha, begun)
    tests[unit.engine] = replace(test, units=test.units + 1, last=now)
    return replace(state, begun=begun, tests=tests)


def _begin(alpha: float, begun: int) -> tuple[EngineTest, int]:
    cohort = begun // COHORT + 1
    return EngineTest(alpha / (COHORT * cohort * (cohort + 1)), begun), begun + 1


def _use(state: OddEngines, block: Block, now: float) -> OddEngines:
    """Test every engine on a complete block. An engine that is known to differ is not among "the others", unless the
    block has no others: of two engines both differ."""
    tests, begun = dict(state.tests), state.begun
    known = {name for name, test in state.tests.items() if test.crossing is not None}
    present = {unit.engine for unit in block.units}
    for name in sorted(present & tests.keys()):
        left_out = known - {name} if present - known - {name} else frozenset()
        units = [unit for unit in block.units if unit.engine not in left_out]
        own = np.array([unit.engine == name for unit in units])
        if own.all():
            continue  # nothing to compare with: neither evidence nor recovery
        factors = log_e_values(np.array([unit.figure for unit in units]), own)
        test = tests[name]
        if test.crossing is None:
            tokens = sum(unit.tokens for unit in units if unit.engine == name)
            wealth, crossing = bet(test.wealth, factors, LOG_WEIGHTS, tokens, now, -math.log(test.alpha))
            tests[name] = replace(test, wealth=wealth, crossing=crossing)
            continue
        test = _observe_recovery(test, factors)
        if _recovered(test):
            fresh, begun = _begin(state.alpha, begun)
            test = replace(fresh, units=test.units, last=test.last)
        tests[name] = test
    return replace(state, tests=tests, begun=begun)


def log_e_values(figures: Floats, own: npt.NDArray[np.bool_]) -> Floats:
    """ln of each strategy's e-value for one block: figures float64 [N], own bool [N] -> float64 [len(TILTS)].

    Equal figures have the mean of their ranks.

    >>> log_e_values(np.array([0.1, 0.5, 0.6, 0.7]), np.array([True, False, False, False])).round(2).tolist()
    [0.8, 1.3, 1.39, -1.45, -6.2, -21.11]
    """
    count, chosen = len(figures), int(own.sum())
    if not 0 < chosen < count:
        return np.zeros(len(TILTS))
    ordered = np.sort(figures)
    below, up_to = np.searchsorted(ordered, figures, "left"), np.searchsorted(ordered, figures, "right")
    log_weights = np.outer((below + up_to) / (2.0 * count), TILTS)
    sums = np.full((chosen + 1, len(TILTS)), -np.inf)
    sums[0] = 0.0
    for row in log_weights:
        sums[1:] = np.logaddexp(sums[1:], sums[:-1] + row)
    placements = math.lgamma(count + 1) - math.lgamma(chosen + 1) - math.lgamma(count - chosen + 1)
    result: Floats = placements + log_weights[own].sum(axis=0) - sums[chosen]
    return result


def _observe_recovery(test: EngineTest, factors: Floats) -> EngineTest:
    """Add one block after a crossing. A window that did not lose wealth is followed by the next."""
    begun = test.recovery_log_wealth is None or test.recovery_blocks >= CLEAR_BLOCKS
    before = np.zeros(len(factors)) if begun or test.recovery_log_wealth is None else test.recovery_log_wealth
    blocks = 1 if begun else test.recovery_blocks + 1
    return replace(test, recovery_log_wealth=before + factors, recovery_blocks=blocks)


def _recovered(test: EngineTest) -> bool:
    wealth = test.recovery_log_wealth
    if wealth is None or test.recovery_blocks < CLEAR_BLOCKS:
        return False
    return float(log_sum_exp((wealth + LOG_WEIGHTS)[:, None])[0]) <= 0.0


def readings(state: OddEngines) -> list[EngineReading]:
    """Of every engine that has been seen, by name.

    >>> readings(init(0.01))
    []
    """
    return [
        EngineReading(
            engine=name,
            raised=test.crossing,
            farther=bool(TILTS[int(np.argmax(test.wealth.log_wealth))] > 0.0),
            log_evidence=test.wealth.log_evidence,
            alpha=test.alpha,
            units=test.units,
            tokens=test.wealth.tokens,
        )
        for name, test in sorted(state.tests.items())
    ]
