"""Statements about thresholds and order, tested: confirmed, not confirmed (the opposite is established), undecided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hemostat_calibration.thresholds.breaks import Break, Existence
from hemostat_calibration.thresholds.curve import ALPHA, Curve


class Verdict(StrEnum):
    CONFIRMED = "confirmed"
    NOT_CONFIRMED = "not confirmed"
    UNDECIDED = "undecided"


def breaks_within(estimate: Break, low: float, high: float) -> Verdict:
    """Returns if the break lies between `low` and `high`: it is confirmed if the whole interval does, and not confirmed
    if no part of it does.

    >>> breaks_within(Break(Existence.FOUND, 0.45, 0.4, 0.5), 0.4, 0.6).value
    'confirmed'
    """
    if estimate.existence is Existence.UNDECIDED:
        return Verdict.UNDECIDED
    if estimate.existence is Existence.NONE or estimate.high <= low or estimate.low >= high:
        return Verdict.NOT_CONFIRMED
    return Verdict.CONFIRMED if low <= estimate.low and estimate.high <= high else Verdict.UNDECIDED


@dataclass(frozen=True, slots=True)
class Difference:
    """The figure of the setting that is said to be worse minus the figure of the better one, paired by request, with a
    95 % interval.
    """

    value: float
    low: float
    high: float


def difference(better: Curve, worse: Curve, alpha: float = ALPHA) -> Difference:
    """Returns the difference of two curves. Each curve has one setting, on the same requests; only requests that both
    have scored count.

    >>> setting = np.array([0.0])
    >>> better, worse = (Curve(setting, np.array([x]), np.ones(3)) for x in ([0.1, 0.2, 0.3], [1.1, 1.2, 1.3]))
    >>> round(difference(better, worse).value, 6)
    1.0
    """
    both = (better.measured & worse.measured)[0]
    sums = np.concatenate([better.sums, worse.sums])[:, both]
    pair = Curve(np.array([0.0, 1.0]), sums, better.tokens[both])
    return Difference(*pair.contrast(np.array([-1.0, 1.0]), alpha))


def always_better(pairs: Sequence[tuple[Curve, Curve]], looks: int = 1) -> Verdict:
    """Returns if the first of each pair has the lower figure.

    looks: how often this may be asked, with more requests each time, until it is decided: the level is shared out.

    It is confirmed if every difference is established. Each is tested at the look's whole level, since all have to hold
    (intersection–union test; Berger 1982). It is not confirmed if the opposite is established for any pair, with
    Bonferroni's correction.

    >>> setting = np.array([0.0])
    >>> better, worse = (Curve(setting, np.array([x]), np.ones(3)) for x in ([0.1, 0.2, 0.3], [1.1, 1.2, 1.3]))
    >>> always_better([(better, worse)]).value
    'confirmed'
    """
    if not pairs:
        return Verdict.UNDECIDED
    alpha = ALPHA / looks
    if all(difference(*pair, alpha).low > 0.0 for pair in pairs):
        return Verdict.CONFIRMED
    if any(difference(*pair, alpha / len(pairs)).high < 0.0 for pair in pairs):
        return Verdict.NOT_CONFIRMED
    return Verdict.UNDECIDED
