"""The dependence of units on each other: the variance inflation of their sums, by batch means.

    v = lim Var(X₁ + … + X_ℓ) / (ℓ Var X)        n / v: *effective* units

v is 1 for independent units, m for runs of m equal ones, (1 + ρ)/(1 − ρ) for an autoregression. It is estimated by
non-overlapping batch means: with v(ℓ) that ratio for batches of ℓ successive units,

    v̂ = max over ℓ = 2, 4, …, L of  (v(ℓ) + max(v(ℓ) − v(ℓ/2), 0)) (b − 1)/χ²_0.2(b − 1),      at least 1

- The second term is the lugsail correction (Vats & Flegal, "Lugsail lag windows for estimating time-average covariance
  matrices", Biometrika 2022): v(ℓ) misses about as much of v as v(ℓ/2) misses more of it.
- b is the number of batches: the factor makes it an upper limit of 80 % confidence where b is small.
- L grows with the number n of units: there are at least `MIN_BATCHES`. It is longer than what is best for the mean
  squared error, about √n (Flegal & Jones, "Batch means and spectral variance estimators in Markov chain Monte Carlo",
  Annals of Statistics 2010): to take v for too small costs errors, for too large only units.

Where units depend over more than L of them, v̂ is about 2 L, and the number of effective units stays at about
`MIN_BATCHES` / 2 however many there are: `MIN_EFFECTIVE` of them are needed before v̂ is believed. So what is asked for
is that there are enough units to see over how many of them they depend.

**Asymptotic**: v̂ is consistent as n grows, for units whose dependence dies out. What it cannot know is what has not
happened yet: a cycle that is longer than the units that it was estimated from (weekends after some days), and
dependence that begins later. Of hours of the day it knows after one day: so it is believed only of units that span a
*cycle*, which the caller sets.

The evidence of a bet that multiplies its wealth by factors 1 + f x grows, under dependence, as if each unit counted v
times. For one bet, and sums that behave like a Brownian motion, the probability that it ever reaches 1/α is α^(1/v) in
place of α. Its power 1/v restores α; it must be taken of each bet before bets, clients or kinds are mixed: a mixture
chooses the bet that suits the run, and dividing the logarithm of the mixture leaves what the choice gained.

**For bets, v̂ is 1 until the units refute it** (`BatchMeans.inflation_of_bets`). An upper limit of v is 1.4 or so for
independent units, and the maximum over several lengths is more: it would cost a third of all units where nothing
depends on anything. So v̂ of a bet is 1 as long as no v(ℓ) is more than `REFUTES` standard errors √(2/(b − 1)) above 1.
As soon as one is, the upper limits of all lengths count, with `LUGSAIL` times the correction: what is known to depend
may be corrected generously, since independent units do not pay for it. What is not noticed is a v only a little above
1, of which the error is α^(1/v): it stays below α in simulations, where v̂ is 1 or more and rises with every unit that
is seen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats
from hemostat_calibration.elapsed import TimeBreak, span_begins
from hemostat_calibration.errors import InvalidArgumentError

MIN_BATCHES = 24
"""The least number of batches of one length: fewer say little of a variance."""
MIN_UNITS = 48
"""The least number of units: with fewer, there is no batch length from which to estimate."""
FEW_BATCHES = 3
"""The least number of batches: with fewer, nothing is told of a batch length at all; see
`BatchMeans.inflation_of_sums`."""
MIN_EFFECTIVE = 20.0
"""The number of effective units with fewer of which v̂ is not believed."""
LEVELS = 15
"""The number of batch lengths: 1, 2, 4, …, 2¹⁴ units."""
REFUTES = 1.5
"""The number of standard errors by which v(ℓ) has to be above 1 to refute that units are independent: about one of
fifteen independent series is so far above at a given length."""
LUGSAIL = 2.0
"""The weight of the lugsail correction in the v̂ of bets, where independence is refuted: what comes in runs that are
longer than the batches so far is taken for twice as much."""
MIN_BATCHES_OF_BETS = 8
"""The least number of batches of one length in the v̂ of bets on the same units: two batches of 8 units tell something
of a test of 16."""
_QUANTILE = -0.8416212335729143
"""The 20 % quantile of the normal distribution."""
_XX = 2
"""The first of the sums of products."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchMeans:
    """Sums of batches of S series at a time, in memory that does not grow.

    A unit adds (x, n): the sum of a figure over its tokens, and their number; what is estimated is the inflation of
    Σ(x − m n), with m = Σx/Σn. n = 1 gives plain sums; n = 0 if a unit says nothing of a series.

    units: the number of units so far. open: float64 [`LEVELS`, 2, S], x and n of the batch of each length that is not
    complete. sums: float64 [`LEVELS`, 5, S], Σ of x, n, x², xn, n² over complete batches.

    >>> means = BatchMeans.of(1)
    >>> for unit in range(960):
    ...     means = means.update(np.array([np.sin(1e6 * (unit // 4) ** 2)]))
    >>> bool(3.0 < means.inflation()[0] < 7.0), bool(means.enough()[0])
    (True, True)
    """

    units: int
    open: Floats
    sums: Floats

    @classmethod
    def of(cls, series: int) -> BatchMeans:
        """Returns the state before the first unit."""
        return cls(0, np.zeros((LEVELS, 2, series)), np.zeros((LEVELS, 5, series)))

    def update(self, x: Floats, n: Floats | float = 1.0) -> BatchMeans:
        """Returns the state with one more unit: x, n float64 [S], finite. Raises InvalidArgumentError for another
        shape."""
        if np.shape(x) != self.sums.shape[2:]:
            raise InvalidArgumentError(f"x has shape {np.shape(x)}: it must be {self.sums.shape[2:]}")
        opened, sums = self.open.copy(), self.sums.copy()
        batch = np.empty((2, sums.shape[2]))
        batch[0], batch[1] = x, n
        products = np.empty((3, sums.shape[2]))
        for level in range(LEVELS):
            np.multiply(batch[0], batch, out=products[:2])
            np.multiply(batch[1], batch[1], out=products[2])
            sums[level, :_XX] += batch
            sums[level, _XX:] += products
            if not self.units >> level & 1:
                opened[level] = batch
                break
            batch = opened[level] + batch
        return BatchMeans(self.units + 1, opened, sums)

    def ratios(self, least: int = MIN_BATCHES) -> Floats:
        """Returns v(ℓ) of every batch length that has at least `least` batches: float64 [J, S]. The first row, of
        single units, is 1. It is NaN if units did not differ.
        """
        batches = np.array([self.units >> level for level in range(LEVELS)])
        usable = [level for level in range(LEVELS) if batches[level] >= least]
        x, n, xx, xn, nn = np.moveaxis(self.sums[usable], 1, 0)
        total_n = np.where(n[:1] > 0.0, n[:1], 1.0)
        mean = x[:1] / total_n
        squares = np.maximum(xx - 2.0 * mean * xn + mean * mean * nn, 0.0)
        count = batches[usable][:, None]
        # Of a unit, and without what the mean's own estimate takes away.
        each = squares / ((count - 1.0) * 2.0 ** np.array(usable)[:, None])
        scale = np.where(squares[:1] > 1e-18 * np.maximum(xx[:1], 1e-300), each[:1], np.nan)
        result: Floats = each / scale
        return result

    @property
    def variance(self) -> Floats:
        """The variance of single units, float64 [S], for series of plain sums; 0 before the second unit."""
        x, _, xx, _, _ = self.sums[0]
        units = max(self.units, 2)
        result: Floats = np.maximum(xx - x * x / units, 0.0) / (units - 1.0)
        return result

    def inflation(self) -> Floats:
        """Returns the variance inflation v̂ of each series, float64 [S]. It is infinite before `MIN_UNITS` units, and 1
        if units did not differ.
        """
        series = self.sums.shape[2]
        if self.units < MIN_UNITS:
            return np.full(series, np.inf)
        ratios = self.ratios()
        result = np.ones(series)
        for level in range(1, len(ratios)):
            corrected = ratios[level] + np.maximum(ratios[level] - ratios[level - 1], 0.0)
            result = np.fmax(result, corrected * float(upper_factor(self.units >> level)))
        return result

    def inflation_of_sums(self, units: int) -> Floats:
        """Returns the variance inflation v̂ of sums of up to so many further units, float64 [S]: never less than
        `inflation`.

        Batch lengths ℓ with `FEW_BATCHES` count, too, with the larger factor of their upper limit: what units of a day
        have in common is seen in the few days that there were. A sum of fewer units than ℓ has as large a part of what
        v(ℓ) is above 1.

        >>> means = BatchMeans.of(1)
        >>> for unit in range(1200):
        ...     means = means.update(np.array([np.sin(1e6 * unit * unit) + np.sin(9.0 * (unit // 300) ** 2)]))
        >>> bool(means.inflation_of_sums(100)[0] > 2.0 * means.inflation()[0])
        True
        """
        result = self.inflation()
        if self.units < MIN_UNITS:
            return result
        for level, ratio in enumerate(self.ratios(FEW_BATCHES)):
            if (batches := self.units >> level) < MIN_BATCHES:
                excess = ratio * float(upper_factor(batches)) - 1.0
                result = np.fmax(result, 1.0 + excess * min(units / 2.0**level, 1.0))
        return result

    def inflation_of_bets(self, least: int = MIN_BATCHES, units: int = 0) -> Floats:
        """Returns the variance inflation v̂ for bets, float64 [S]: 1 where no batch length refutes that units are
        independent, and otherwise the largest upper limit, with a larger correction than `inflation` has.

        least: the least number of batches of a length. units: where it is above 0, lengths with `FEW_BATCHES` count,
        too, for sums of up to so many further units; see `inflation_of_sums`.

        >>> alone, in_runs = BatchMeans.of(1), BatchMeans.of(1)
        >>> for unit in range(96):
        ...     alone = alone.update(np.array([np.sin(1e6 * unit * unit)]))
        ...     in_runs = in_runs.update(np.array([np.sin(1e6 * (unit // 3) ** 2)]))
        >>> float(alone.inflation_of_bets()[0]), bool(in_runs.inflation_of_bets()[0] > 3.0)
        (1.0, True)
        """
        series = self.sums.shape[2]
        result, refuted = np.ones(series), np.zeros(series, np.bool_)
        ratios = self.ratios(FEW_BATCHES if units else least)
        for level in range(1, len(ratios)):
            batches, ratio = self.units >> level, ratios[level]
            many = batches >= least
            refuted |= ratio > 1.0 + REFUTES * math.sqrt(2.0 / (batches - 1.0))
            upper = float(upper_factor(batches))
            if many:
                limit = (ratio + LUGSAIL * np.maximum(ratio - ratios[level - 1], 0.0)) * upper
            else:
                limit = 1.0 + (ratio * upper - 1.0) * min(units / 2.0**level, 1.0)
            result = np.fmax(result, limit)
        return np.where(refuted, result, 1.0)

    def effective(self) -> Floats:
        """Returns the number of effective units, n / v̂, of each series, float64 [S]; 0 before `MIN_UNITS` units."""
        result: Floats = self.units / self.inflation()
        return result

    def enough(self) -> npt.NDArray[np.bool_]:
        """Returns for each series if there are enough effective units to believe v̂, bool [S]."""
        return self.effective() >= MIN_EFFECTIVE


RECENT_LAG = 64
"""The number of the latest units that `RecentInflation` leaves out."""
RECENT_UNITS = 512
"""The most units that it estimates from; at least half as many, once there were so many."""
RECENT_EVERY = 8
"""The number of units between two of its estimates."""


@dataclass(frozen=True, slots=True, eq=False)
class RecentInflation:
    """The v̂ of the recent units of one series, for bets that go on after v̂ was first estimated: dependence may begin
    later.

    A change of the units' level looks like dependence, and would hide itself in v̂. So the latest `RECENT_LAG` units are
    left out, within which a large change of independent units is found; and there are at most `RECENT_UNITS` others, so
    that no batch is longer than about 1/`MIN_BATCHES` of these, and v̂ stays below some 40 whatever happens.

    waiting: float64 [W], the latest units, at most `RECENT_LAG`. older, newer: batch means of the units before them;
    the newer ones begin with the second half of the older ones, and take their place. value: v̂ of the older ones; 1
    before there are `MIN_UNITS`.

    >>> recent = RecentInflation()
    >>> for unit in range(600):
    ...     recent = recent.update(float(np.sin(1e6 * (unit // (1 if unit < 300 else 10)) ** 2)))
    ...     if unit == 299:
    ...         before = recent.value
    >>> before < 2.5, recent.value > 5.0
    (True, True)
    """

    waiting: Floats = field(default_factory=lambda: np.zeros(0))
    older: BatchMeans = field(default_factory=lambda: BatchMeans.of(1))
    newer: BatchMeans = field(default_factory=lambda: BatchMeans.of(1))
    value: float = 1.0

    def update(self, x: float) -> RecentInflation:
        """Returns the state with one more unit. x: its figure, finite."""
        waiting = np.append(self.waiting, x)
        if len(waiting) <= RECENT_LAG:
            return RecentInflation(waiting, self.older, self.newer, self.value)
        unit, older, newer, value = waiting[:1], self.older, self.newer, self.value
        older = older.update(unit)
        if older.units > RECENT_UNITS // 2:
            newer = newer.update(unit)
        if older.units >= RECENT_UNITS:
            older, newer = newer, BatchMeans.of(1)
        if older.units >= MIN_UNITS and older.units % RECENT_EVERY == 0:
            value = float(older.inflation()[0])
        return RecentInflation(waiting[1:], older, newer, value)


AVERAGED_DIFFERENCES = 8
"""About so many of the latest differences make up the average of `SuccessiveDifferences`."""
MAX_DIFFERENCE = 2.0
"""The largest difference that counts, in standard deviations of a difference: one odd unit must not hide a run."""
MAX_BY_DIFFERENCES = 16.0
"""The largest v̂ by differences, so that a change to units that hardly differ is still found."""


@dataclass(frozen=True, slots=True)
class SuccessiveDifferences:
    """v̂ of the latest few units of one series, from how little each differs from the unit before: it notices a run of
    alike units within the run, before `RecentInflation` has enough units.

    Half the mean square of the differences of successive units is the variance if they are independent, and 1/m of the
    variance in runs of m equal ones: their ratio (von Neumann, "Distribution of the ratio of the mean square successive
    difference to the variance", Annals of Mathematical Statistics 1941) is an estimate of 1/v. A change of the level is
    one large difference and no more, so it does not hide itself in v̂.

    units: so far. last: the latest one. ratio: the average, with weights that fall by 1/`AVERAGED_DIFFERENCES` with
    each unit; 1 at the beginning.

    >>> differences = SuccessiveDifferences()
    >>> for unit in range(60):
    ...     differences = differences.update(float(1.4 * np.sin(1e6 * (unit // (1 if unit < 30 else 15)) ** 2)))
    ...     if unit == 29:
    ...         before = differences.value
    >>> before < 2.0, differences.value > 4.0
    (True, True)
    """

    units: int = 0
    last: float = 0.0
    ratio: float = 1.0

    def update(self, score: float) -> SuccessiveDifferences:
        """Add one unit: its figure in standard deviations of independent units, finite."""
        if not self.units:
            return SuccessiveDifferences(1, score, self.ratio)
        square = min(0.5 * (score - self.last) ** 2, MAX_DIFFERENCE**2)
        ratio = self.ratio + (square - self.ratio) / AVERAGED_DIFFERENCES
        return SuccessiveDifferences(self.units + 1, score, ratio)

    @property
    def value(self) -> float:
        """Returns v̂, between 1 and `MAX_BY_DIFFERENCES`."""
        return min(max(1.0 / max(self.ratio, 1e-9), 1.0), MAX_BY_DIFFERENCES)


MIN_HISTORY = 96
"""The least number of units of a kind before which its v̂ is not known: over more than a handful of units nothing could
be seen."""
MAX_CLIENTS = 64
"""The number of clients that are told from each other; further ones share their rows."""
CLIENT_LEVELS = 6
"""The number of batch lengths: 1, 2, …, 32 successive units of one client."""
MIN_CLIENT_BATCHES = 48
"""The least number of batches of one length, over all clients."""
MIN_CLIENT_BATCHES_OF_BETS = 12
"""The same in the v̂ of bets: what a client sends in runs is seen there first."""


@dataclass(frozen=True, slots=True, eq=False)
class ClientBatches:
    """Batches of successive units of one client each, of S series at a time: what units of a client that come in runs
    have in common is seen sooner than in batches of all clients' units, between which the others' stand.

    Sums of batches are taken about the client's own mean so far, so that clients that differ for good are no
    dependence.

    count, total: float64 [C, S], units and their sum by client. open: float64 [`CLIENT_LEVELS`, C, S], sums of the
    batches that are not complete. batches, squares: float64 [`CLIENT_LEVELS`, S], of complete ones.

    >>> clients = ClientBatches.of(2, 1)
    >>> for unit in range(1600):
    ...     clients = clients.update(np.array([unit % 2]), np.array([np.sin(1e6 * (unit // 8) ** 2)]))
    >>> bool(2.5 < clients.inflation(np.array([0.5]))[0] < 8.0)
    True
    """

    count: Floats
    total: Floats
    open: Floats
    batches: Floats
    squares: Floats

    @classmethod
    def of(cls, clients: int, series: int) -> ClientBatches:
        """Returns the state before the first unit, for so many clients."""
        by_client, by_level = np.zeros((clients, series)), np.zeros((CLIENT_LEVELS, series))
        return cls(by_client, by_client, np.zeros((CLIENT_LEVELS, clients, series)), by_level, by_level)

    def update(self, client: npt.NDArray[np.int64], x: Floats) -> ClientBatches:
        """Returns the state with one more unit: its client's row and its figure, [S] each."""
        at = client, np.arange(len(x))
        count, total, opened = self.count.copy(), self.total.copy(), self.open.copy()
        batches, squares = self.batches.copy(), self.squares.copy()
        count[at] += 1.0
        total[at] += x
        units, mean = count[at], total[at] / count[at]
        batch, complete = x, np.ones(len(x), np.bool_)
        for level in range(CLIENT_LEVELS):
            size = 2.0**level
            number = units / size
            known = complete & (number >= 2.0)
            centred = (batch - size * mean) ** 2 * number / np.maximum(number - 1.0, 1.0)
            batches[level] += known
            squares[level] += np.where(known, centred, 0.0)
            before = opened[level][at]
            second = complete & (units % (2.0 * size) == 0.0)
            opened[level][at] = np.where(complete & ~second, batch, before)
            batch, complete = np.where(second, before + batch, 0.0), second
            if not complete.any():
                break
        return ClientBatches(count, total, opened, batches, squares)

    def inflation(self, variance: Floats) -> Floats:
        """Returns v̂ of each series as `BatchMeans.inflation` does, from the batch lengths with `MIN_CLIENT_BATCHES`:
        float64 [S], 1 if there are none. variance: float64 [S], of single units of all clients.
        """
        ratios = self._ratios(variance)
        corrected = ratios[1:] + np.maximum(ratios[1:] - ratios[:-1], 0.0)
        usable = self.batches[1:] >= MIN_CLIENT_BATCHES
        limits = np.where(usable, corrected * upper_factor(np.maximum(self.batches[1:], MIN_CLIENT_BATCHES)), 1.0)
        result: Floats = np.maximum(limits.max(axis=0), 1.0)
        return result

    def inflation_of_bets(self, variance: Floats) -> Floats:
        """Returns v̂ of each series as `BatchMeans.inflation_of_bets` does, from the batch lengths with
        `MIN_CLIENT_BATCHES_OF_BETS`: float64 [S]. variance: see `inflation`."""
        ratios, batches = self._ratios(variance), np.maximum(self.batches[1:], MIN_CLIENT_BATCHES_OF_BETS)
        usable = self.batches[1:] >= MIN_CLIENT_BATCHES_OF_BETS
        refuted = usable & (ratios[1:] > 1.0 + REFUTES * np.sqrt(2.0 / (batches - 1.0)))
        corrected = ratios[1:] + LUGSAIL * np.maximum(ratios[1:] - ratios[:-1], 0.0)
        limits = np.where(usable, corrected * upper_factor(batches), 1.0)
        return np.where(refuted.any(axis=0), np.maximum(limits.max(axis=0), 1.0), 1.0)

    def _ratios(self, variance: Floats) -> Floats:
        """Returns v(ℓ) of each length and series: float64 [`CLIENT_LEVELS`, S]."""
        sizes = 2.0 ** np.arange(CLIENT_LEVELS)[:, None]
        scale = np.where(variance > 0.0, variance, np.inf)
        ratios: Floats = self.squares / (np.maximum(self.batches, 1.0) * sizes * scale)
        return ratios


def upper_factor(batches: npt.ArrayLike) -> Floats:
    """Returns the factor that turns a variance of so many batches into its upper limit of 80 % confidence: (b −
    1)/χ²_0.2(b − 1), by the approximation of Wilson and Hilferty (PNAS 1931).

    >>> upper_factor([24, 100]).round(2).tolist()
    [1.34, 1.14]
    """
    spread = 2.0 / (9.0 * (np.asarray(batches, np.float64) - 1.0))
    factor: Floats = (1.0 - spread + _QUANTILE * np.sqrt(spread)) ** -3.0
    return factor


def client_row(places: dict[bytes, int], client: bytes) -> int:
    """Returns the row of a client, which gets the next one where it is new; beyond `MAX_CLIENTS` they share rows.

    >>> places = {}
    >>> client_row(places, b"a"), client_row(places, b"b"), client_row(places, b"a")
    (0, 1, 0)
    """
    row = known_row(places, client)
    return places.setdefault(client, len(places)) if row is None else row


def known_row(places: Mapping[bytes, int], client: bytes) -> int | None:
    """Returns the row of a client without changing anything; None for a client that would get the next row.

    >>> known_row({b"a": 0}, b"a"), known_row({b"a": 0}, b"b")
    (0, None)
    """
    row = places.get(client)
    if row is None and len(places) >= MAX_CLIENTS:
        return int.from_bytes(hashlib.blake2b(client, digest_size=4).digest(), "big") % MAX_CLIENTS
    return row


@dataclass(frozen=True, slots=True, eq=False)
class KindDependence:
    """The dependence of the units of a kind in one figure: the larger v̂ of two, by batches in time and by client.

    clients: digest -> row. first, last: the times of the first and of the last unit, in seconds.

    >>> kind = KindDependence()
    >>> for unit in range(200):
    ...     kind = kind.update(b"client %d" % (unit % 7), float(np.sin(1e6 * unit * unit)))
    >>> kind.units, kind.known_for(0.0), kind.known_for(60.0), 1.0 <= kind.inflation < 4.0
    (200, True, False, True)
    """

    in_time: BatchMeans = field(default_factory=lambda: BatchMeans.of(1))
    by_client: ClientBatches = field(default_factory=lambda: ClientBatches.of(MAX_CLIENTS, 1))
    clients: Mapping[bytes, int] = field(default_factory=dict)
    first: float = 0.0
    last: float = 0.0

    @property
    def units(self) -> int:
        return self.in_time.units

    @property
    def mean(self) -> float:
        """The mean of the figure; 0 before the first unit."""
        return float(self.in_time.sums[0, 0, 0]) / max(self.units, 1)

    def update(self, client: bytes, x: float, now: float = 0.0) -> KindDependence:
        """Returns the state with one more unit: its client's digest and its figure, finite. now: its time, seconds."""
        clients = dict(self.clients)
        row, value = client_row(clients, client), np.array([x])
        by_client = self.by_client.update(np.array([row]), value)
        first = span_begins(self.first, self.last, now) if self.units else now
        return KindDependence(self.in_time.update(value), by_client, clients, first, max(now, first))

    def after_break(self, time_break: TimeBreak, needed: float) -> KindDependence:
        """Returns the same after the time was set. needed: seconds that the units have to span; if they do, the span
        is kept, and otherwise the break says from when on it counts."""
        first = time_break.begins(self.first, ended=self.spans(needed))
        return replace(self, first=first, last=max(time_break.seen(self.last), first))

    @property
    def inflation(self) -> float:
        """The v̂ of the units so far; 1 before there is anything to estimate it from."""
        if self.units < MIN_UNITS:
            return 1.0
        return float(np.maximum(self.in_time.inflation(), self.by_client.inflation(self.in_time.variance))[0])

    def inflation_of_sums(self, units: int) -> float:
        """Returns v̂ of sums of up to so many further units; see `BatchMeans.inflation_of_sums`."""
        if self.units < MIN_UNITS:
            return 1.0
        return max(self.inflation, float(self.in_time.inflation_of_sums(units)[0]))

    def inflation_of_bets(self, units: int = 0) -> float:
        """Returns v̂ for bets, 1 until independence is refuted. units: see `BatchMeans.inflation_of_bets`."""
        by_client = self.by_client.inflation_of_bets(self.in_time.variance)
        return float(np.maximum(self.in_time.inflation_of_bets(units=units), by_client)[0])

    def spans(self, seconds: float) -> bool:
        """Returns True if the units, from the first one to the last, span so many seconds."""
        return self.last - self.first >= seconds

    def known_for(self, seconds: float) -> bool:
        """Returns True if v̂ is to be believed: there are `MIN_HISTORY` units that span so many seconds, and
        `MIN_EFFECTIVE` effective ones.
        """
        return self.units >= MIN_HISTORY and not self.too_dependent and self.spans(seconds)

    @property
    def too_dependent(self) -> bool:
        """It is True if there are `MIN_HISTORY` units or more, but fewer than `MIN_EFFECTIVE` effective ones."""
        return self.units >= MIN_HISTORY and self.units / self.inflation < MIN_EFFECTIVE
