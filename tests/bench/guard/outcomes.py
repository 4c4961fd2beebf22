"""Whether a profile that makes answers worse in a kind is found there, and a harmless one is left in peace.

Valid JSON as in the published case: 37.5 % without the profile, 10 % with it. Sixteen clients alike, or one that
tries to have a good profile taken back. Looked at every 10 units. A profile whose answers do not end: clients give most
of these up, so that only answers that are given up show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.bench.guard import Row, count_row, median

from hemostat_calibration.outcomes import GROUPS, LENGTH, Outcome, Settings, Trial, Unit
from hemostat_calibration.statistics.two_arms import log_e_value

NAME = "outcomes"
TAKES = "2 minutes on one core"
TEST_LIVES = 20

UNITS = 2000
BAD, HARMED = 0.625, 0.9
MAX_MEDIAN_UNITS = {0.1: 1300, 0.5: 450}
SETTINGS = Settings()
_STEPS = np.repeat([0.0, 0.9, 0.1, 0.8, 0.3], UNITS // 5)

Rate = float | npt.NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """Rates of bad answers, constant or by unit; dropped: share of the reports that are lost."""

    treated: Rate
    control: Rate
    control_fraction: float
    dropped: float = 0.0


def harmed_after(world: World, lives: int, rng: np.random.Generator, alpha: float) -> npt.NDArray[np.float64]:
    """Units of each life until harm is proven by all clients, and without any group of them; inf where it never is.

    The same decision as `Trial.harm`, of many lives at once; `agreement` compares them.
    """
    treated = rng.random((lives, UNITS)) >= world.control_fraction
    bad = rng.random((lives, UNITS)) < np.where(treated, world.treated, world.control)
    group = rng.integers(0, GROUPS, (lives, UNITS))
    sent = rng.random((lives, UNITS)) >= world.dropped
    return decided(treated, bad, group, sent, alpha)


def decided(
    treated: npt.NDArray[np.bool_],
    bad: npt.NDArray[np.bool_],
    group: npt.NDArray[np.int64],
    sent: npt.NDArray[np.bool_],
    alpha: float,
) -> npt.NDArray[np.float64]:
    looks = np.arange(9, treated.shape[1], 10)

    def counts(of: npt.NDArray[np.bool_]) -> list[Any]:
        parts = (treated & bad, treated, ~treated & bad, ~treated)
        return [np.cumsum(part & of & sent, axis=1)[:, looks] for part in parts]

    total = counts(np.ones_like(treated))
    needed = -math.log(alpha)
    proven = log_e_value(*total, SETTINGS.margin) >= needed
    suspects = np.flatnonzero(proven.any(axis=1))
    if len(suspects):
        # Only where all units prove it, the groups have to be looked at.
        for number in range(GROUPS):
            part = counts(group == number)
            without = [(whole - own)[suspects] for whole, own in zip(total, part, strict=True)]
            proven[suspects] &= log_e_value(*without, SETTINGS.margin) >= needed
    return np.where(proven.any(axis=1), looks[proven.argmax(axis=1)] + 1.0, np.inf)


def rows(lives: int, seed: int) -> Iterator[Row]:
    # The whole of alpha is spent on one test: what is shared out between six and between versions only adds to it.
    whole = SETTINGS.alpha
    nulls = {
        "at the margin, 10 % control": World(BAD + SETTINGS.margin, BAD, 0.1),
        "at the margin, 50 % control": World(BAD + SETTINGS.margin, BAD, 0.5),
        "at the margin, rare outcome": World(0.06, 0.01, 0.1),
        "at the margin, both arms drift from 0 to 0.9": World(
            np.linspace(0.05, 0.95, UNITS), np.linspace(0.0, 0.9, UNITS), 0.1
        ),
        "at the margin, both arms jump, 10 % control": World(_STEPS + 0.05, _STEPS, 0.1),
        "at the margin, both arms jump, 50 % control": World(_STEPS + 0.05, _STEPS, 0.5),
        "at the margin, half of the reports dropped": World(BAD + SETTINGS.margin, BAD, 0.5, dropped=0.5),
    }
    for number, (case, world) in enumerate(nulls.items()):
        result = harmed_after(world, lives, np.random.default_rng([seed, 1, number]), whole)
        yield count_row(f"harmless, {case}: taken back", int(np.isfinite(result).sum()), lives, 0.05)
    first = Trial(SETTINGS, "v", 1).alpha
    for fraction, limit in MAX_MEDIAN_UNITS.items():
        rng = np.random.default_rng([seed, 2, round(10 * fraction)])
        needed = median(harmed_after(World(HARMED, BAD, fraction), lives, rng, first).tolist())
        case = f"valid JSON 37.5 % -> 10 %, {fraction:.0%} control: median units until it is found"
        yield Row(case, needed, f"<= {limit}", needed <= limit)
    rng = np.random.default_rng([seed, 3])
    lost = median(harmed_after(World(HARMED, BAD, 0.5, dropped=0.5), lives, rng, first).tolist())
    limit = 2.3 * MAX_MEDIAN_UNITS[0.5]
    yield Row("the same, 50 % control, half of the reports dropped", lost, f"<= {limit:.0f}", lost <= limit)
    yield attacked(lives, np.random.default_rng([seed, 4]))
    yield from given_up(lives, seed)
    yield from lengths(max(lives // 5, 10), np.random.default_rng([seed, 5]))
    yield agreement(max(lives // 50, 5), np.random.default_rng([seed, 6]))


ENDLESS, GIVEN_UP_OF_ENDLESS = 0.6, 0.95
"""Share of the treated answers that do not end, and of these, the share that clients give up; the length limit ends the
others."""
GIVEN_UP_ANYWAY = 0.05
"""Share of the answers that clients give up for reasons of their own, in both arms."""
MAX_GIVEN_UP_UNITS = {0.1: 261, 0.5: 101}
"""Limits on the median number of conversations until the profile is found."""
MAX_OTHER_UNITS = 200
"""The same for a profile of which 40 % of the answers end in loops, where nothing changes in what is given up."""


def given_up(lives: int, seed: int) -> Iterator[Row]:
    first = Trial(SETTINGS, "v", 1).alpha
    for fraction, limit in MAX_GIVEN_UP_UNITS.items():
        rng = np.random.default_rng([seed, 7, round(10 * fraction)])
        treated, cut, gone, group = _endless(fraction, lives, rng)
        needed = median(decided(treated, gone, group, np.ones_like(treated), first).tolist())
        case = f"60 % endless answers, 95 % of them given up, {fraction:.0%} control: median units until it is found"
        yield Row(case, needed, f"<= {limit}", needed <= limit)
        blind = decided(treated, cut, group, ~gone, first)
        found = int(np.isfinite(blind).sum())
        case = f"the same, complete answers alone (wrong): taken back within {UNITS:,} conversations"
        yield Row(case, f"{found} of {lives}", f"<= {lives // 10}", found <= lives // 10)
    rng = np.random.default_rng([seed, 8])
    for rate in (GIVEN_UP_ANYWAY, 0.4):
        result = harmed_after(World(rate, rate, 0.5), lives, rng, SETTINGS.alpha)
        case = f"harmless, {rate:.0%} of the answers given up in both arms: taken back"
        yield count_row(case, int(np.isfinite(result).sum()), lives, 0.05)
    loops = median(harmed_after(World(0.4, 0.02, 0.5), lives, np.random.default_rng([seed, 9]), first).tolist())
    case = "loops 2 % -> 40 %, 50 % control: median units until it is found"
    yield Row(case, loops, f"<= {MAX_OTHER_UNITS}", loops <= MAX_OTHER_UNITS)


def _endless(fraction: float, lives: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], ...]:
    """Returns for each unit if it is treated, its answer is cut at the length limit, or given up, and its group of
    clients."""
    shape = lives, UNITS
    treated = rng.random(shape) >= fraction
    endless = treated & (rng.random(shape) < ENDLESS)
    gone = np.where(endless, rng.random(shape) < GIVEN_UP_OF_ENDLESS, rng.random(shape) < GIVEN_UP_ANYWAY)
    return treated, endless & ~gone, gone, rng.integers(0, GROUPS, shape)


def attacked(lives: int, rng: np.random.Generator) -> Row:
    """One client with the largest admitted share: its treated answers are all bad, its control answers all good."""
    shape = lives, UNITS
    treated = rng.random(shape) < 0.5
    attacker = rng.random(shape) < SETTINGS.client_share
    bad = np.where(attacker, treated, rng.random(shape) < BAD)
    group = np.where(attacker, 0, rng.integers(1, GROUPS, shape))
    result = decided(treated, bad, group, np.ones(shape, bool), SETTINGS.alpha)
    return count_row(
        "harmless, one client with 25 % against it: taken back", int(np.isfinite(result).sum()), lives, 0.05
    )


def lengths(lives: int, rng: np.random.Generator) -> Iterator[Row]:
    """Gamma distributed lengths, whose spread is 0.7 of their mean; 50 % control."""
    for change, harmful in ((1.5, False), (2.5, True)):
        result: list[float] = []
        for _ in range(lives):
            trial = Trial(SETTINGS, "v", 1)
            after = math.inf
            treated = rng.random(UNITS) < 0.5
            tokens = rng.gamma(2.0, 50.0, UNITS) * np.where(treated, change, 1.0)
            for n in range(UNITS):
                trial.update(Unit(bytes([n % 20]), bool(treated[n]), {}, float(tokens[n])))
                harm = trial.harm() if n % 20 == 19 else None
                if harm is not None and harm.outcome == LENGTH:
                    after = n + 1.0
                    break
            result.append(after)
        case = f"mean length x {change}"
        if harmful:
            yield Row(f"{case}: median units until it is found", median(result), "<= 1100", median(result) <= 1100)
        else:
            yield count_row(f"harmless, {case}: taken back", sum(map(math.isfinite, result)), lives, 0.05)


def agreement(lives: int, rng: np.random.Generator) -> Row:
    """`harmed_after` and `Trial` decide alike."""
    different = 0
    for _ in range(lives):
        treated = rng.random((1, 600)) < 0.5
        bad = rng.random((1, 600)) < np.where(treated, HARMED, BAD)
        group = rng.integers(0, GROUPS, (1, 600))
        alpha = Trial(SETTINGS, "v", 1).alpha
        expected = decided(treated, bad, group, np.ones((1, 600), bool), alpha)[0]
        # No unit is refused here: `decided` knows no shares of clients.
        trial, after = Trial(Settings(client_share=1.0), "v", 1), math.inf
        for n in range(600):
            trial.update(Unit(bytes([int(group[0, n])]), bool(treated[0, n]), {Outcome.JSON: bool(bad[0, n])}))
            if n % 10 == 9 and trial.harm() is not None:
                after = n + 1.0
                break
        different += after != expected
    return Row(
        "lives in which one trial and many lives at once decide differently", float(different), "0", not different
    )
