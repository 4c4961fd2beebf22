"""Compares what people notice of answers between the arms of one profile in one kind of traffic.

A `Trial` belongs to one version of a profile in one kind. A unit is a conversation: its first answer in the kind, also
one that did not become complete. For each of `Outcome` a unit is bad or not; the test of `statistics.two_arms` says
whether the treated units are bad more often than the control units, by more than `Settings.margin`. Mean lengths of the
answers are compared by the intervals of `statistics.running_mean`.

**Guarantee.** A profile that raises no outcome's rate by more than the margin, and changes the mean length by no more
than the length margin, is found harmful in a kind with a probability of at most `Settings.alpha`, over all looks, all
outcomes and all versions that ever serve in the kind: version number k spends alpha/(k(k+1)), in equal parts for each
outcome and for the length. **Assumptions:** arms are assigned by conversation at random with a constant probability;
rates are constant, or change alike in both arms (`two_arms`); whether a unit is counted does not depend on its outcome.

**Answers that end early** are units for that reason. If only complete answers counted, a profile whose answers do not
end would lose its bad units: clients give them up. Why a client gave up is not known, and some do for reasons of their
own. Such reasons are alike in both arms, because these are randomized, so the difference of the arms is the profile's.
All rates are shares of all conversations of an arm. If the other rates were shares of the complete answers, a profile
that changes how many answers are given up would change which answers are judged.

**No decision hangs on one client.** Clients are divided into GROUPS by their digest (salted, so a client cannot choose
its group). Harm must be proven by all units and by the units without any one group: for a client that sends requests in
order to take a good profile back, the test without its group is a test of everybody else's units, and keeps its level.
Also, before its outcome is looked at, a unit is admitted only while its client has at most `Settings.client_share` of
the trial's units. Both hold from MIN_CLIENTS on; with fewer clients, nothing is decided before MIN_UNITS_OF_FEW_CLIENTS
units, so that a burst of one client at the beginning of a trial decides nothing if others send requests, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hemostat_calibration.described_enum import DescribedEnum
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.kind_test import MIN_UNITS_OF_FEW_CLIENTS
from hemostat_calibration.statistics.confidence import ConfidenceInterval
from hemostat_calibration.statistics.running_mean import RunningMean
from hemostat_calibration.statistics.two_arms import TwoArms

GROUPS = 16
"""The number of groups of clients. Harm is proven without any one of them, so a proof takes about 1/GROUPS more
units.
"""
MAX_CLIENTS = 256
"""The largest number of clients whose units are counted one by one; further ones are counted together, and not
limited."""
MIN_CLIENTS = 4
"""The least number of clients for which a client's share is limited: with fewer, all units together decide."""
CAP_UNITS = 20
"""The number of first units whose mean length times CAP_FACTOR is the cap of all later lengths. They do not count
themselves."""
CAP_FACTOR = 4.0
MIN_CAP = 16.0
"""The least cap of an answer's length, in tokens."""


class Outcome(DescribedEnum):
    """The ways in which an answer can be bad, each with its text for people."""

    JSON = "json", "JSON was asked for in words or by a schema, and the answer has none, or does not fit the schema"
    TOOL_CALL = "tool_call", "tools were offered, and a call does not parse or fits none of them"
    LOOP = "loop", "the answer ends in a repetition"
    CUT = "cut", "the answer ended at the length limit"
    EMPTY = "empty", "the answer has no text and no tool call"
    GIVEN_UP = "given_up", "the client closed its connection before the answer was complete, as at a time limit"
    BROKEN_OFF = "broken_off", "the answer ended without a finish reason: the engine or its connection failed meanwhile"


LENGTH = "length"
"""The name of the mean number of output tokens, which is compared in addition to the outcomes."""
TESTS = len(Outcome) + 1


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a trial. Raises InvalidArgumentError if one is out of range.

    alpha: the probability of a false alarm in one kind. margin: the harmless difference between the shares of bad
    units. length_margin: the harmless relative change of the mean length. client_share: the largest part of a trial's
    units that may be from one client.
    """

    alpha: float = 0.05
    margin: float = 0.05
    length_margin: float = 0.5
    client_share: float = 0.25

    def __post_init__(self) -> None:
        if not (0.0 < self.alpha < 1.0 and 0.0 <= self.margin < 1.0):
            raise InvalidArgumentError(f"alpha {self.alpha} must be between 0 and 1, the margin {self.margin} below 1")
        if not (self.length_margin > 0.0 and 0.0 < self.client_share <= 1.0):
            raise InvalidArgumentError(
                f"length margin {self.length_margin} must be above 0, client share {self.client_share} in (0, 1]"
            )


@dataclass(frozen=True, slots=True)
class Unit:
    """One conversation's answer. client: digest, b"" if none is named. bad: of the outcomes that apply to the
    request. tokens: of the output, as far as the client got it; None if it is not known."""

    client: bytes
    treated: bool
    bad: Mapping[Outcome, bool]
    tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of one outcome in the trial, or of the length.

    treated_units, control_units: the numbers of units with a known outcome. treated, control: the share of bad units,
    or the mean length in tokens (clipped at the cap); NaN without a unit. difference: treated − control with its
    interval, valid at every look at the trial's nominal level; for the length it is relative to the control mean.
    evidence: log e over log 1/alpha, the least one of the test with all units and the tests without one group; harm is
    proven from 1 on. It is 0 or 1 for the length.
    """

    outcome: str
    treated_units: int
    control_units: int
    treated: float
    control: float
    difference: ConfidenceInterval
    evidence: float

    @property
    def harm(self) -> bool:
        return self.evidence >= 1.0


@dataclass(frozen=True, slots=True)
class _Lengths:
    """The sums of one group in one arm. squares: as in `RunningMean`, about the arm's mean before each unit."""

    units: int = 0
    total: float = 0.0
    squares: float = 0.0

    def update(self, tokens: float, centre: float, cap: float) -> _Lengths:
        return _Lengths(self.units + 1, self.total + tokens, self.squares + ((tokens - centre) / cap) ** 2)


def _running_mean(groups: list[_Lengths], cap: float, leave_out: int = -1) -> RunningMean:
    kept = [lengths for group, lengths in enumerate(groups) if group != leave_out]
    units, squares = sum(part.units for part in kept), sum(part.squares for part in kept)
    return RunningMean(0.0, cap, units, sum(part.total for part in kept), squares)


class Trial:
    """Counts of one version in one kind. number: 1 for the kind's first version, and so on."""

    def __init__(self, settings: Settings, version: str, number: int) -> None:
        if number < 1:
            raise InvalidArgumentError(f"the number of a trial is {number}: it must be at least 1")
        self.settings = settings
        self.version = version
        self.number = number
        self.refused = 0
        """The number of units that were not admitted, because their client had too many."""
        self._units = 0
        self._clients: dict[bytes, int] = {}
        self._counts: dict[Outcome, list[TwoArms]] = {}
        """The counts by outcome, for each group."""
        self._first: list[float] = []
        """The lengths of the first units, while the cap is not known."""
        self._cap: float | None = None
        self._lengths: dict[bool, list[_Lengths]] = {arm: [_Lengths()] * GROUPS for arm in (False, True)}
        """The sums of lengths by arm, treated or not, for each group."""

    @property
    def alpha(self) -> float:
        """The probability of a false alarm that each outcome's test has."""
        return self.settings.alpha / (self.number * (self.number + 1) * TESTS)

    @property
    def units(self) -> int:
        return self._units

    @property
    def limits_clients(self) -> bool:
        """It is True if a client's share is limited."""
        return len(self._clients) >= MIN_CLIENTS

    @property
    def decides(self) -> bool:
        """It is True if harm can be proven by now."""
        return self.limits_clients or self._units >= MIN_UNITS_OF_FEW_CLIENTS

    @property
    def cap(self) -> float | None:
        """The number of tokens at which lengths are clipped; None before it is known."""
        return self._cap

    def update(self, unit: Unit) -> bool:
        """Counts one unit. Returns False, and counts nothing, if its client has too many already."""
        known = unit.client in self._clients
        share = self.settings.client_share
        if known and self.limits_clients and self._clients[unit.client] > share * self._units:
            self.refused += 1
            return False
        self._units += 1
        if known or len(self._clients) < MAX_CLIENTS:
            self._clients[unit.client] = self._clients.get(unit.client, 0) + 1
        group = _group(unit.client)
        for outcome, bad in unit.bad.items():
            counts = self._counts.setdefault(outcome, [TwoArms()] * GROUPS)
            counts[group] = counts[group].update(treated=unit.treated, bad=bad)
        if unit.tokens is not None:
            self._update_length(unit.treated, group, unit.tokens)
        return True

    def _update_length(self, treated: bool, group: int, tokens: float) -> None:
        if self._cap is None:
            self._first.append(tokens)
            if len(self._first) == CAP_UNITS:
                self._cap = max(CAP_FACTOR * sum(self._first) / CAP_UNITS, MIN_CAP)
            return
        groups = self._lengths[treated]
        units = sum(lengths.units for lengths in groups)
        # Any value that is known before may be the centre: the same one for all groups makes their squares add up.
        centre = sum(lengths.total for lengths in groups) / units if units else 0.0
        groups[group] = groups[group].update(min(tokens, self._cap), centre, self._cap)

    def readings(self) -> list[Reading]:
        """Returns the readings of the outcomes that applied to any unit, and of the length once it is compared.
        Evidence is 0 while the trial does not decide.
        """
        result = [self._binary(outcome, counts) for outcome, counts in sorted(self._counts.items())]
        if self._cap is not None:
            result.append(self._length(self._cap))
        return result

    def harm(self) -> Reading | None:
        """Returns the first reading that proves harm. Much cheaper than `readings` where there is none."""
        if not self.decides:
            return None
        margin = self.settings.margin
        for outcome, counts in sorted(self._counts.items()):
            # Only a difference beyond the margin can refute that it is within.
            total = _total(counts)
            suspect = total.treated and total.control and _difference(total) > margin
            if suspect and self._evidence(counts) >= 1.0:
                return self._binary(outcome, counts)
        if self._cap is not None:
            treated, control = (_running_mean(self._lengths[arm], self._cap).mean for arm in (True, False))
            if abs(treated - control) > self.settings.length_margin * control:
                length = self._length(self._cap)
                return length if length.harm else None
        return None

    def _evidence(self, counts: list[TwoArms]) -> float:
        """Returns log e over log 1/alpha, for the strictest one of all units and all units without a group."""
        if not self.decides:
            return 0.0
        margin, needed = self.settings.margin, -math.log(self.alpha)
        total = _total(counts)
        evidence = total.log_e(margin) / needed
        if evidence < 1.0 or not self.limits_clients:
            return evidence
        return min(evidence, *(total.without(part).log_e(margin) / needed for part in counts if part != TwoArms()))

    def _binary(self, outcome: Outcome, counts: list[TwoArms]) -> Reading:
        total = _total(counts)
        return Reading(
            outcome=outcome.value,
            treated_units=total.treated,
            control_units=total.control,
            treated=_share(total.treated_bad, total.treated),
            control=_share(total.control_bad, total.control),
            difference=total.get(self.alpha),
            evidence=self._evidence(counts),
        )

    def _length(self, cap: float) -> Reading:
        treated, control = (_running_mean(self._lengths[arm], cap) for arm in (True, False))
        change = self._change(treated, control)
        harm = self.decides and self._is_harm(change)
        if harm and self.limits_clients:
            for group in range(GROUPS):
                without = (_running_mean(self._lengths[arm], cap, leave_out=group) for arm in (True, False))
                harm = harm and self._is_harm(self._change(*without))
        return Reading(
            outcome=LENGTH,
            treated_units=treated.observations,
            control_units=control.observations,
            treated=treated.mean,
            control=control.mean,
            difference=change,
            evidence=float(harm),
        )

    def _is_harm(self, change: ConfidenceInterval) -> bool:
        return change.low > self.settings.length_margin or change.high < -self.settings.length_margin

    def _change(self, treated: RunningMean, control: RunningMean) -> ConfidenceInterval:
        """Returns the change relative to the control mean, as an interval. Each arm's interval has half of alpha, so
        both hold at once."""
        a, b = treated.get(0.5 * self.alpha), control.get(0.5 * self.alpha)
        mean = a.mean / b.mean - 1.0 if b.mean > 0.0 else math.nan
        low = a.low / b.high - 1.0
        return ConfidenceInterval(mean, low, a.high / b.low - 1.0 if b.low > 0.0 else math.inf)

    # --- restarts --------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Returns the trial, JSON-ready, at most about 15 kB."""
        return {
            "version": self.version,
            "number": self.number,
            "refused": self.refused,
            "units": self._units,
            "clients": {client.hex(): units for client, units in self._clients.items()},
            "counts": {
                outcome.value: [[c.treated_bad, c.treated, c.control_bad, c.control] for c in counts]
                for outcome, counts in self._counts.items()
            },
            "first": self._first,
            "cap": self._cap,
            "lengths": {
                str(arm): [[part.units, part.total, part.squares] for part in groups]
                for arm, groups in self._lengths.items()
            },
        }

    @classmethod
    def load(cls, saved: Mapping[str, Any], settings: Settings) -> Trial:
        """Returns the trial that `save` stored. Raises InvalidArgumentError if `saved` is anything else."""
        try:
            trial = cls(settings, str(saved["version"]), int(saved["number"]))
            trial.refused, trial._units = int(saved["refused"]), int(saved["units"])
            trial._clients = {bytes.fromhex(client): int(units) for client, units in saved["clients"].items()}
            trial._counts = {
                Outcome(outcome): [TwoArms(*(int(n) for n in counts)) for counts in groups]
                for outcome, groups in saved["counts"].items()
            }
            trial._first = [float(tokens) for tokens in saved["first"]]
            trial._cap = None if saved["cap"] is None else float(saved["cap"])
            trial._lengths = {
                arm: [
                    _Lengths(int(n), float(total), float(squares)) for n, total, squares in saved["lengths"][str(arm)]
                ]
                for arm in (False, True)
            }
            sizes = {len(parts) for parts in trial._counts.values()} | {len(parts) for parts in trial._lengths.values()}
            if len(trial._clients) > MAX_CLIENTS or sizes != {GROUPS}:
                raise ValueError("a list has the wrong length")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgumentError(f"not a saved trial: {error}") from error
        return trial


def _group(client: bytes) -> int:
    return client[0] % GROUPS if client else 0


def _total(counts: list[TwoArms]) -> TwoArms:
    return TwoArms(
        sum(c.treated_bad for c in counts),
        sum(c.treated for c in counts),
        sum(c.control_bad for c in counts),
        sum(c.control for c in counts),
    )


def _difference(total: TwoArms) -> float:
    return total.treated_bad / total.treated - total.control_bad / total.control


def _share(bad: int, units: int) -> float:
    return bad / units if units else math.nan
