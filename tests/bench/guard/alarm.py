"""The alarm's false-alarm probability, workload shifts, and how soon a change is found.

Each life has `LEARNED` requests of each kind, more than a baseline takes, then `REQUESTS` requests that may differ; it
counts when an alarm is raised in them. Simulated requests: the logarithm of a token's spread has a standard deviation
of 0.3, neighbouring tokens are correlated, and the whole request is off by a normal effect (log-sd of its *spread*; a
divergence is about the square of a spread, so its log-sd is twice as large). Real requests: `alarm_levels.csv`, what
`make bench-alarm` collected from a real vLLM, drawn with replacement.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hemostat.measurement.alarms import FloorLimit
from hemostat.measurement.dependence import NO_CYCLE
from hemostat.measurement.figures import MODELS
from hemostat_calibration.alarm import BudgetTest, Settings, Workload, fit_baseline
from hemostat_calibration.alarm.alarm import CHECK_EVERY, baseline_inflation
from hemostat_calibration.alarm.baseline import LEVEL_WEIGHTS, MIN_SCALE, Baseline
from hemostat_calibration.alarm.betting import BET_FRACTIONS, amount, equal_weights, log_sum_exp
from hemostat_calibration.statistics.confidence import MeanSequence
from hemostat_calibration.statistics.dependence import (
    LEVELS,
    MIN_BATCHES,
    MIN_UNITS,
    RECENT_EVERY,
    RECENT_LAG,
    RECENT_UNITS,
    BatchMeans,
    SuccessiveDifferences,
    upper_factor,
)

from . import Row, count_row

NAME = "alarm"
TAKES = "5 minutes on one core"

SETTINGS = Settings()
LEARNED = 2 * SETTINGS.baseline_requests
REQUESTS = 500
SECONDS = 180.0
"""From one request to the next."""
FEW_FLOORS = 40
EFFECTS = (0.05, 0.1, 0.15, 0.2, 0.3)
SHORT, LONG = (40, 200), (300, 900)
SHIFTS = (1.03, 1.1, 1.2)
CHANGES = {"w4a16": 20, "w8a8": 20, "prune10": None, "kv_fp8": None}
"""Served instead of the reference -> requests until the alarm, median, that are allowed."""
LEVELS_FILE = Path(__file__).parent / "alarm_levels.csv"

Array = npt.NDArray[np.float64]


# --- requests as rows: level, tokens, contrast ---------------------------------------------------------------------


def simulated(
    rng: np.random.Generator, count: int, effects: Array, lengths: tuple[int, int], factor: float = 1.0
) -> Array:
    """float64 [count, 3] of requests with these effects; lengths: fewest and most tokens. factor: of the spread."""
    tokens = rng.integers(lengths[0], lengths[1] + 1, count)
    halves = tokens // 2
    # Of x_t = 0.95 z_t + 0.3 z_(t−1) with normal z: sums over both halves, drawn by their exact joint distribution.
    new, old = 0.95, 0.3
    first, second = ((size - 1) * (new + old) ** 2 + new**2 + old**2 for size in (halves, tokens - halves))
    shared = new * old
    u, v = rng.standard_normal((2, count))
    sums = 0.3 * np.sqrt(first) * u, 0.3 * (shared / np.sqrt(first) * u + np.sqrt(second - shared**2 / first) * v)
    levels = (sums[0] + sums[1]) / tokens + math.log(0.07 * factor) + effects
    contrasts = sums[0] / halves - sums[1] / (tokens - halves)
    return np.stack([levels, tokens.astype(np.float64), contrasts], axis=1)


def normal_effects(rng: np.random.Generator, count: int, size: float) -> Array:
    return size * rng.standard_normal(count)


def heavy_effects(rng: np.random.Generator, count: int, size: float) -> Array:
    """Student's t with two degrees of freedom: of 500 requests about ten are off by more than seven times `size`."""
    return size * rng.standard_t(2, count)


def real(path: Path = LEVELS_FILE) -> dict[str, dict[str, Array]]:
    """Change -> form of the answer -> float64 [R, 3]."""
    by_change: dict[str, dict[str, list[list[float]]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = [float(row["level"]), float(row["tokens"]), float(row["contrast"])]
            by_change.setdefault(row["change"], {}).setdefault(row["form"], []).append(values)
    return {
        change: {form: np.array(values) for form, values in sorted(forms.items())}
        for change, forms in by_change.items()
    }


# --- a life of the change test -------------------------------------------------------------------------------------


def log_evidence(factors: Array, inflation: float | Array = 1.0, log_weights: Array = LEVEL_WEIGHTS) -> Array:
    """What `ChangeTest` has after each request: factors [R, J, S] or [R, S], ln -> [R]. The same as one `bet` after the
    other, each `SECONDS` after the one before.

    inflation: v̂ of each request's kind. log_weights: [J, S] or [S], of the strategies.
    """
    before = np.concatenate([np.zeros((1, *factors.shape[1:])), factors.cumsum(axis=0)])
    amounts, effective, funded, last = np.full(len(factors), -np.inf), 0.0, 0, 0
    for at, part in enumerate((1.0 / np.broadcast_to(inflation, len(factors))).tolist()):
        if effective >= funded:
            funded += 1
            amounts[at] = math.log(amount(funded, SECONDS * (at - last) if funded > 1 else 0.0))
            last = at
        effective += part
    given = log_weights + amounts.reshape(-1, *[1] * log_weights.ndim)
    wealth = np.logaddexp.accumulate(given - before[:-1], axis=0) + before[1:]
    least = wealth.min(axis=1) if log_weights.ndim > 1 else wealth
    return log_sum_exp(least.T)


def batch_means(levels: Array) -> BatchMeans:
    """The same as one `BatchMeans.update` after the other, of one series."""
    means = BatchMeans.of(1)
    for level in range(LEVELS):
        count = len(levels) >> level
        sums = levels[: count << level].reshape(count, 1 << level).sum(axis=1)
        size = float(1 << level)
        means.sums[level, :, 0] = sums.sum(), count * size, (sums**2).sum(), size * sums.sum(), count * size * size
    return BatchMeans(len(levels), means.open, means.sums)


def baselines(
    kinds: npt.NDArray[np.int64], rows: Array, settings: Settings
) -> list[tuple[int, npt.NDArray[np.int64], float]]:
    """Of each kind whose baseline is complete, in the order in which they are: its number, where its requests are that
    come after the baseline, and v̂."""
    learning, result = {kind: np.flatnonzero(kinds == kind) for kind in range(int(kinds.max()) + 1)}, []
    relative = np.empty(len(rows))
    for at in learning.values():
        relative[at] = rows[at, 0] - rows[at, 0].cumsum() / np.arange(1.0, len(at) + 1.0)
    is_learned = np.ones(len(rows), np.bool_)
    looks = range(settings.baseline_requests, len(rows) + 1, CHECK_EVERY)
    for position, kind, count in sorted(
        (at[n - 1], kind, n) for kind, at in learning.items() for n in looks if n <= len(at)
    ):
        if kind not in learning:
            continue
        own = batch_means(rows[learning[kind][:count], 0])
        everything = batch_means(relative[: position + 1][is_learned[: position + 1]])
        v = baseline_inflation(own, everything, settings.baseline_requests)
        if math.isfinite(v):
            later = learning.pop(kind)[count:]
            is_learned[later] = False
            result.append((kind, later, v))
        if not learning:
            break
    return result


def inflations(levels: Array, looks: npt.NDArray[np.int64]) -> Array:
    """`BatchMeans.inflation` after each of so many requests: levels [R], looks [L] -> [L]."""
    levels = levels - levels[:1]  # sums of squares then lose nothing to a level that all units share
    ratios, before, single = np.ones(len(looks)), np.ones(len(looks)), np.ones(len(looks))
    for level in range(LEVELS):
        size, count = float(1 << level), looks >> level
        usable = count >= MIN_BATCHES
        if not usable.any():
            break
        sums = levels[: len(levels) >> level << level].reshape(-1, 1 << level).sum(axis=1)
        total, squares = (np.concatenate([[0.0], part.cumsum()])[count] for part in (sums, sums * sums))
        mean = levels.cumsum()[looks - 1] / looks
        each = squares - 2.0 * mean * size * total + (mean * size) ** 2 * count
        differ = each > 1e-18 * np.maximum(squares, 1e-300)
        each /= np.maximum(count - 1.0, 1.0) * size
        single = single if level else np.where(differ, each, np.nan)
        ratio = each / single
        corrected = (ratio + np.maximum(ratio - before, 0.0)) * upper_factor(np.maximum(count, MIN_BATCHES))
        ratios, before = np.where(usable & (level > 0), np.fmax(ratios, corrected), ratios), ratio
    return ratios


def recent_inflations(levels: Array) -> Array:
    """Returns what `RecentInflation` says after each level: [R] -> [R]."""
    result, half = np.ones(len(levels)), RECENT_UNITS // 2
    ends = np.arange(1, len(levels) + 1) - RECENT_LAG  # of the units that count, after each level
    firsts = np.maximum(ends // half - 1, 0) * half
    for first in range(0, max(len(levels) - RECENT_LAG, 0) + 1, half):
        at = np.flatnonzero((firsts == first) & (ends - first >= MIN_UNITS) & ((ends - first) % RECENT_EVERY == 0))
        if len(at):
            result[at] = inflations(levels[first : ends[at[-1]]], ends[at] - first)
    looked = (ends - firsts >= MIN_UNITS) & ((ends - firsts) % RECENT_EVERY == 0)
    latest = np.maximum.accumulate(np.where(looked, np.arange(len(levels)), -1))
    return np.where(latest >= 0, result[latest], 1.0)


def difference_inflations(baseline: Baseline, rows: Array) -> Array:
    """Returns what `SuccessiveDifferences` says before each request: rows [R, 3] -> [R]. 1 with the least scale."""
    result, differences = np.ones(len(rows)), SuccessiveDifferences()
    if baseline.scale <= MIN_SCALE:
        return result
    for at, score in enumerate(baseline.scores(rows[:, 0], rows[:, 1]).tolist()):
        result[at] = differences.value
        differences = differences.update(score)
    return result


def crossing(kinds: npt.NDArray[np.int64], rows: Array, settings: Settings = SETTINGS) -> int | None:
    """Position of the request with which the first change test alarms; kinds [R], rows [R, 3] in order of arrival."""
    factors, inflation = np.full((len(rows), *LEVEL_WEIGHTS.shape), np.nan), np.ones(len(rows))
    relative = np.zeros(len(rows))
    for count, (kind, later, v) in enumerate(baselines(kinds, rows, settings), 1):
        learned = np.setdiff1d(np.flatnonzero(kinds == kind), later)
        baseline = fit_baseline(rows[learned], 1.0 / (count * (count + 1)), v)
        factors[later] = baseline.log_factors(rows[later, 0], rows[later, 1], settings.tolerance) * v
        relative[later] = rows[later, 0] - baseline.level
        recent = np.maximum(recent_inflations(relative[later]), difference_inflations(baseline, rows[later]))
        inflation[later] = np.maximum(v, recent)
    bets = np.flatnonzero(~np.isnan(factors[:, 0, 0]))
    if not len(bets):
        return None
    inflation[bets] = np.maximum(inflation[bets], recent_inflations(relative[bets]))
    factors /= inflation[:, None, None]
    over = np.flatnonzero(log_evidence(factors[bets], inflation[bets]) >= -math.log(settings.change_alpha))
    return int(bets[over[0]]) if len(over) else None


def alarms(
    lives: int,
    seed: int,
    life: Callable[[np.random.Generator], tuple[npt.NDArray[np.int64], Array]],
    settings: Settings = SETTINGS,
) -> int:
    """How many lives raise an alarm."""
    drawn = (life(np.random.default_rng((seed, number))) for number in range(lives))
    return sum(crossing(kinds, requests, settings) is not None for kinds, requests in drawn)


def one_kind(*parts: Array) -> tuple[npt.NDArray[np.int64], Array]:
    rows = np.concatenate(parts)
    return np.zeros(len(rows), np.int64), rows


def false_alarms(case: str, lives: int, count: int) -> Row:
    return count_row(case, count, lives, SETTINGS.alpha)


def rows(lives: int, seed: int) -> Iterator[Row]:
    baseline = LEARNED
    for lengths in (SHORT, LONG):
        for effect in EFFECTS:

            def null(
                rng: np.random.Generator, effect: float = effect, lengths: tuple[int, int] = lengths
            ) -> tuple[npt.NDArray[np.int64], Array]:
                count = baseline + REQUESTS
                return one_kind(simulated(rng, count, normal_effects(rng, count, effect), lengths))

            name = f"no change, request effects {effect}, {lengths[0]} to {lengths[1]} tokens"
            yield false_alarms(name, lives, alarms(lives, seed, null))
    for factor in SHIFTS:

        def shifted(rng: np.random.Generator, factor: float = factor) -> tuple[npt.NDArray[np.int64], Array]:
            effects = normal_effects(rng, baseline + REQUESTS, 0.15)
            return one_kind(
                simulated(rng, baseline, effects[:baseline], SHORT),
                simulated(rng, REQUESTS, effects[baseline:], SHORT, factor),
            )

        yield false_alarms(f"workload shift, spread ×{factor}", lives, alarms(lives, seed, shifted))

    def heavy(rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], Array]:
        count = baseline + REQUESTS
        return one_kind(simulated(rng, count, heavy_effects(rng, count, 0.1), SHORT))

    yield false_alarms("no change, heavy-tailed requests", lives, alarms(lives, seed, heavy))
    for before, after in ((SHORT, (8, 40)), (SHORT, LONG)):

        def longer(
            rng: np.random.Generator, before: tuple[int, int] = before, after: tuple[int, int] = after
        ) -> tuple[npt.NDArray[np.int64], Array]:
            effects = normal_effects(rng, baseline + REQUESTS, 0.1)
            return one_kind(
                simulated(rng, baseline, effects[:baseline], before),
                simulated(rng, REQUESTS, effects[baseline:], after),
            )

        name = f"workload shift, answers of {before[0]} to {before[1]} tokens become {after[0]} to {after[1]}"
        yield false_alarms(name, lives, alarms(lives, seed, longer))
    yield from real_shifts(lives, seed)
    yield from delays(lives, seed)
    yield from simulated_delays(lives, seed)
    yield from mix_rows(lives, seed)
    yield budget_row(lives, seed)
    yield from floor_rows(lives, seed)


def real_shifts(lives: int, seed: int) -> Iterator[Row]:
    """W4A16 is served all the time; from request to request the traffic turns from one form of answers into another."""
    pools = real()["w4a16"]
    for first, other in (("prose", "code"), ("code", "json"), ("json", "prose")):
        for apart in (True, False):

            def turning(
                rng: np.random.Generator, first: str = first, other: str = other, apart: bool = apart
            ) -> tuple[npt.NDArray[np.int64], Array]:
                # Kinds that the relay knows apart have baselines of their own; then the mix turns.
                begin = LEARNED
                later = rng.random(REQUESTS) < np.linspace(0.0, 1.0, REQUESTS)
                forms = np.concatenate([np.repeat([0, 1], [begin, begin if apart else 0]), later.astype(np.int64)])
                values = mixed(rng, [pools[first], pools[other]], forms)
                return (forms if apart else np.zeros(len(forms), np.int64)), values

            alarmed = alarms(lives, seed, turning)
            name = f"real W4A16, {first} turns into {other}" + ("" if apart else ", both in one kind")
            yield false_alarms(name, lives, alarmed)


def delays(lives: int, seed: int) -> Iterator[Row]:
    """The reference is served, then something else in its place; 300 requests of each form, 20 or 500 more, then the
    change."""
    pools = real()
    forms = list(pools["null"])
    begin = len(forms) * LEARNED
    for change, most in CHANGES.items():
        for before in (20, 500):
            waits: list[tuple[float, float]] = []
            for number in range(max(lives // 2, 20)):
                rng = np.random.default_rng((seed, number))
                kinds = np.concatenate([np.arange(begin) % len(forms), rng.integers(len(forms), size=before + 150)])
                requests = mixed(rng, [pools["null"][form] for form in forms], kinds)
                later = begin + before
                requests[later:] = mixed(rng, [pools[change][form] for form in forms], kinds[later:])
                at = crossing(kinds, requests)
                if at is None:
                    waits.append((math.inf, math.inf))
                elif at >= later:
                    waits.append((at + 1 - later, requests[later : at + 1, 1].sum()))
            middle, tokens = np.quantile(waits, 0.5, axis=0, method="higher")
            late, _ = np.quantile(waits, 0.95, axis=0, method="higher")
            limited = most is not None and before == 20
            yield Row(
                f"{change} instead of the reference, after {before} tested requests",
                f"median {middle:.0f} requests (95 %: {late:.0f}), {tokens:.0f} tokens",
                f"median <= {most} requests" if limited else "reported",
                most is None or not limited or bool(middle <= most),
            )


def simulated_delays(lives: int, seed: int) -> Iterator[Row]:
    """Changes of the spread above the tolerance, of all requests or of a quarter, after 320 requests."""
    begin = LEARNED + 20
    for factor, share in ((1.5, 1.0), (2.0, 1.0), (4.0, 1.0), (4.0, 0.25)):
        waits = []
        for number in range(max(lives // 2, 20)):
            rng = np.random.default_rng((seed, number))
            effects = normal_effects(rng, begin + REQUESTS, 0.15)
            kinds, requests = one_kind(simulated(rng, begin + REQUESTS, effects, SHORT))
            changed = rng.random(REQUESTS) < share
            requests[begin:, 0] += math.log(factor) * changed
            at = crossing(kinds, requests)
            if at is None or at >= begin:
                waits.append(math.inf if at is None else at + 1.0 - begin)
        middle, late = np.quantile(waits, [0.5, 0.95], method="higher")
        told = f"median {middle:.0f} requests (95 %: {late:.0f})"
        of = "" if share == 1.0 else f" of {share:.0%} of the requests"
        yield Row(f"a change of the spread ×{factor}{of}, request effects 0.15", told, "reported", True)


def mixed(rng: np.random.Generator, pools: list[Array], kinds: npt.NDArray[np.int64]) -> Array:
    """A request of the pool of each kind, drawn with replacement."""
    sizes = np.array([len(pool) for pool in pools])
    starts = np.concatenate([[0], sizes.cumsum()[:-1]])
    at = (rng.random(len(kinds)) * sizes[kinds]).astype(np.int64)
    rows: Array = np.concatenate(pools)[starts[kinds] + at]
    return rows


def mix_rows(lives: int, seed: int) -> Iterator[Row]:
    """Whether a mix of five kinds that stays, or that is another one at night, is called another one."""
    day, night = np.array([0.5, 0.3, 0.15, 0.04, 0.01]), np.array([0.1, 0.1, 0.3, 0.4, 0.1])
    steady = changes_of_mix(lives, seed, np.tile(day, (SETTINGS.baseline_requests + REQUESTS, 1)), 0.0)
    yield false_alarms("workload: the mix of kinds stays", lives, steady)
    lives = max(lives // 4, 10)
    hours = (np.arange(8 * 480) % 480)[:, None]
    by_hour = np.where(hours < 240, day, night)
    yield false_alarms(
        "workload: another mix at night, 20 requests an hour, a week after a cycle of a day",
        lives,
        changes_of_mix(lives, seed, by_hour, 86_400.0),
    )
    alarmed = changes_of_mix(lives, seed, by_hour, 0.0)
    told = f"{alarmed} of {lives}"
    yield Row("the same, no cycle is set", told, "for comparison: nights are compared with a day", True)


def changes_of_mix(lives: int, seed: int, chances: Array, cycle: float) -> int:
    """Lives in which the mix is ever called another one. chances: [R, K], of a request's kinds, one every 180 s."""
    count = 0
    for number in range(lives):
        draws = np.random.default_rng((seed, number)).random((len(chances), 1))
        kinds = (draws > chances.cumsum(axis=1)[:, :-1]).sum(axis=1)
        mix, wrong = Workload(SETTINGS.baseline_requests, cycle), False
        for at, kind in enumerate(kinds.tolist()):
            windows, mix = mix.windows, mix.update(str(kind), 180.0 * at)
            wrong = wrong or (mix.windows > windows and mix.changed(SETTINGS.alpha))
        count += wrong
    return count


def budget_row(lives: int, seed: int) -> Row:
    """The mean is exactly what is allowed; long requests are the good ones; a heavy tail."""
    count = 0
    for number in range(lives):
        rng = np.random.default_rng((seed, number))
        test = BudgetTest(budget=0.2, cap=5.0, max_tokens=64, alpha=SETTINGS.alpha / 2)
        for _ in range(100):
            level = rng.choice([0.1, 0.4])
            size = 48 if level == 0.1 else 24
            test = test.update(level * rng.lognormal(-0.5, 1.0) * rng.exponential(1.0, size), noise_floor=0.0)
        count += test.crossing is not None
    return false_alarms("budget: the divergence is exactly what is allowed", lives, count)


def floor_rows(lives: int, seed: int) -> Iterator[Row]:
    """The divergence is the budget of 0.02 nats and noise, which is also what both floors are: log-normal, equal in
    runs of 20 requests; or bursts, 1 % of the requests, of 5 nats at every token. Budget tests know v."""
    lives = max(lives // 10, 4)

    def runs(rng: np.random.Generator, count: int) -> Array:
        return np.repeat(0.05 * np.exp(rng.normal(-0.32, 0.8, count // 20 + 1)), 20)[:count]

    def bursts(rng: np.random.Generator, count: int) -> Array:
        return np.where(rng.random(count) < 0.01, 5.0, rng.exponential(0.002, count))

    case = "budget: exactly met, noise in runs of 20 requests"
    results = [over_budget(np.random.default_rng((seed, 18, life)), runs, 20.0) for life in range(lives)]
    yield count_row(case, sum(with_v for with_v, _ in results), lives, SETTINGS.alpha)
    told = f"{sum(without for _, without in results)} of {lives}"
    yield Row(f"the same, {FEW_FLOORS} requests of the floor taken for independent", told, "for comparison", True)
    results = [over_budget(np.random.default_rng((seed, 17, life)), bursts, 1.0) for life in range(lives)]
    yield Row(
        "budget: exactly met, bursts of noise, 1 % of the requests of 5 nats",
        f"{sum(with_v for with_v, _ in results)} of {lives}",
        "for comparison: bursts that the floor's requests have not met are not covered",
        True,
    )


def over_budget(
    rng: np.random.Generator, noise: Callable[[np.random.Generator, int], Array], v: float
) -> tuple[bool, bool]:
    """Whether a budget test alarms that begins when the floor's limit is known, and one that takes the first requests
    of the floor for independent. v: of the requests that are tested."""
    settings, weights = Settings(budget=0.02), equal_weights(len(BET_FRACTIONS))
    floors, limits = [FloorLimit(settings.cap, NO_CYCLE) for _ in MODELS], []
    part, streams = settings.half_share / len(MODELS), [noise(rng, 2000) for _ in MODELS]
    for count, values in enumerate(zip(*streams, strict=True)):
        for floor, value in zip(floors, values, strict=True):
            floor.update(np.array([value]), b"")
        limits = [floor.limit(part) for floor in floors] if count % CHECK_EVERY == 0 else limits
        if limits and math.isfinite(sum(limits)):
            break
    few = [MeanSequence() for _ in MODELS]
    for values in zip(*(stream[:FEW_FLOORS] for stream in streams), strict=True):
        few = [mean.update(value, 1.0) for mean, value in zip(few, values, strict=True)]
    figures, alarms = settings.budget + noise(rng, 4 * REQUESTS), []
    for highs in (limits, [mean.get(0.0, settings.cap, part).high for mean in few]):
        test = BudgetTest(settings.budget, settings.cap, 1, settings.half_share / 2.0, v)
        factors = np.stack([test.log_factors(np.array([figure]), 0.5 * sum(highs)) for figure in figures])
        alarms.append(bool((log_evidence(factors, v, weights) >= -math.log(test.alpha)).any()))
    return alarms[0], alarms[1]
