"""Evidence that a serving profile harms: a sum that is funded anew every `STEP` units.

A *run* is the evidence of `wealth.log_evidence` of the units since it began. Wealth that a run lost while the profile
helped would delay the alarm once it harms, so every `STEP` units a run begins with nothing lost. Run r has the fixed
part w(r) of the whole, which is 1: a quarter for the first, of the rest 1/(r (r + 1)) about; a run that has not begun
counts as its part. So the sum is an e-process, and ever reaches 1/alpha with a probability of at most alpha, for as
long as the profile serves. (A CUSUM restarts its one sum where it is lowest, and bounds how often it alarms; this
mixture over restarts bounds whether it ever does. Shin, Ramdas & Rinaldo, "E-detectors", New England Journal of
Statistics in Data Science 2024.)

At most `MAX_RUNS` are kept: which one is dropped follows from when they began, old ones more often, and not from what
they have seen. What a dropped run had counts as nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from hemostat_calibration.guard.wealth import (
    FRACTIONS,
    Floats,
    log_evidence,
    log_factors,
)
from hemostat_calibration.statistics.dependence import MAX_CLIENTS, client_row

STEP = 50
"""The number of units from one restart to the next."""
MAX_RUNS = 8
_FIRST = 0.25
"""The part of the first run."""
_SLOW = 8
"""The place of the bend in how alpha is shared among runs: the first about 8 runs get parts that fall slowly, and later
runs get parts that fall about as 1/r².
"""
BY_UNIT, BY_TOKEN = range(2)


@dataclass(slots=True)
class Run:
    """One run of the harm sum.

    number: r, from 0. begun: the number of units before the run. mark: float64 [2, MAX_CLIENTS, F], `HarmSum.wealth`
    when the run began.
    """

    number: int
    begun: int
    mark: Floats


@dataclass(slots=True)
class HarmSum:
    """The evidence of harm by one profile in one kind, over all of its windows.

    number: the number of the sum, which spends alpha/(number (number + 1)). wealth: float64 [2, MAX_CLIENTS, F], sums
    of log factors of the bets that the gain is below 0, by unit and by token. places: client -> row.
    """

    number: int
    units: int = 0
    places: dict[bytes, int] = field(default_factory=dict)
    wealth: Floats = field(default_factory=lambda: np.zeros((2, MAX_CLIENTS, len(FRACTIONS))))
    runs: list[Run] = field(default_factory=list)
    known: tuple[float, float] = (0.0, math.inf)
    """A pair: v̂, and the largest evidence with it. One unit multiplies no part of the evidence by more than its own
    factor, or 1.
    """

    @property
    def clients(self) -> int:
        return len(self.places)

    def update(self, client: bytes, by_unit: float, by_token: float) -> None:
        """Counts one unit: what it lost, divided by the width, −1 to 1."""
        if self.units % STEP == 0:
            self._begin()
        row = client_row(self.places, client)
        self.wealth[BY_UNIT, row] += log_factors(by_unit)
        self.wealth[BY_TOKEN, row] += log_factors(by_token)
        self.units += 1
        self.known = self.known[0], self.known[1] + math.log1p(max(by_unit, by_token, 0.0)) + 1e-9

    def log_e(self, inflation: float) -> float:
        """Returns the logarithm of the evidence: by unit and by token the same, the mean of both."""
        begun = self.units // STEP + bool(self.units % STEP)
        terms = [math.log(_unspent(begun))]
        for run in self.runs:
            both = (log_evidence(by_client, self.clients, inflation) for by_client in self._since(run))
            terms += [math.log(0.5 * _part(run.number)) + term for term in both]
        result = float(np.logaddexp.reduce(terms))
        self.known = inflation, result
        return result

    def reaches(self, needed: float, inflation: float) -> bool:
        """Returns True if the log evidence is `needed` or more. Most units need no evaluation of it."""
        not_enough = self.known[0] == inflation and self.known[1] < needed
        return not not_enough and self.log_e(inflation) >= needed

    def _since(self, run: Run) -> Floats:
        result: Floats = (self.wealth - run.mark)[:, : self.clients]
        return result

    def _begin(self) -> None:
        self.runs.append(Run(self.units // STEP, self.units, self.wealth.copy()))
        if len(self.runs) > MAX_RUNS:
            del self.runs[self._crowded()]

    def _crowded(self) -> int:
        """Returns the run, neither the oldest nor the newest, whose neighbours are closest to each other for their
        age."""
        begun = [run.begun for run in self.runs]

        def room(at: int) -> float:
            return (begun[at + 1] - begun[at - 1]) / (self.units + STEP - begun[at])

        return min(range(1, len(begun) - 1), key=room)


def _part(number: int) -> float:
    """Returns the part of the whole that run `number` has.

    >>> round(sum(_part(number) for number in range(100)) + _unspent(100), 12)
    1.0
    """
    return _FIRST if number == 0 else (1.0 - _FIRST) * _SLOW / ((number + _SLOW - 1.0) * (number + _SLOW))


def _unspent(begun: int) -> float:
    """Returns the part of the whole that runs have which have not begun after `begun` runs."""
    return 1.0 if begun == 0 else (1.0 - _FIRST) * _SLOW / (begun + _SLOW - 1.0)
