"""The decisions of the guard, and the evidence that it shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    WAIT = "wait"
    """The action for a candidate without enough evidence yet."""
    PROMOTE = "promote"
    HOLD = "hold"
    """The action for a serving profile that no evidence is against."""
    ROLL_BACK = "roll_back"


class Reason(StrEnum):
    """The reason for which a serving profile is rolled back."""

    HARM = "harm"
    UNSUPPORTED = "unsupported"


class Role(StrEnum):
    CANDIDATE = "candidate"
    SERVING = "serving"


class Figure(StrEnum):
    """The figure in which a test's gains are given; one test never adds up gains of both.

    Total variation is used as soon as one side of the comparison is an adapter, which changes the weights. A change of
    the logits moves each by at most its clamp, so that its gain in KL has a lower bound, which the e-values need. The
    gain of an adapter in KL has none: it may put any token's probability anywhere near 0. The total variation of two
    distributions is between 0 and 1, so that a gain in it is between −1 and 1, without clipping anything, and so is the
    mean of a unit's tokens.
    """

    NATS = "nats"
    """The gain is KL(reference‖served without the profile) − KL(reference‖served with it), in nats."""
    TOTAL_VARIATION = "total_variation"
    """The gain is the same difference of total variations; its width is 1."""


class Admission(StrEnum):
    """The answer to the question if a unit may count in a test; it is given before the unit's gain is looked at."""

    ADMITTED = "admitted"
    COUNTED = "counted"
    """The unit has counted in this test already, or was refused."""
    CLIENT_SHARE = "client_share"
    """The unit's client has its share of the test's units already."""
    FULL = "full"
    """The test has met `kind_test.MAX_UNITS` units."""
    FROZEN = "frozen"
    """The profile was promoted in this kind: the test is over."""
    UNKNOWN = "unknown"
    """The kind is not under this test."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The action that the evidence of one test allows. reason: why a profile is rolled back; None with any other
    action.
    """

    action: Action
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence of one test: of one profile in one kind. Gains are per token, in nats or of the total variation
    (`figure`); a unit's gain is the mean over its tokens.

    units, tokens: the numbers of held-out ones that counted (for a serving profile: in this window).

    mean_gain, mean_gain_by_token: the mean over units, and over tokens, at the end that counts against the action (the
    lower end for a candidate, the upper one for a serving profile). NaN before the first unit.

    low, high: the ends of an interval of mean_gain at 95 %, which is valid at every look; it is for people. It is wider
    than what the decisions follow from, since it holds on both sides and under drift (`statistics.running_mean`).

    log_e: the evidence for the action, as the log of an e-value: that a candidate's gain is above 0; that a serving
    profile harms (the mean of the e-values by unit and by token). It needs no single client.

    log_e_adjusted: a candidate's log_e after accounting for the other kinds of its test; else log_e itself.

    needed: log(1/alpha); the action is taken as soon as log_e_adjusted reaches it.

    clients: the number of clients that the test has seen. refused: the number of units that were not counted because of
    their client's share.

    client_share_active: False below `wealth.MIN_CLIENTS` clients: then nothing limits what one client contributes.

    alpha: the part of alpha spent on this test. test: the test's number: a candidate's among all candidates' tests, a
    serving profile's among the windows of this kind.

    window: the window's length in units; 0 for a candidate. supported: True if in this window the evidence that the
    gain is above 0 has reached 1/(the whole alpha). frozen: True if the profile was promoted in this kind, so that
    nothing more is counted.

    mean_kl_gain, mean_kl_gain_by_token: the gain in KL of the same units, in nats, where `figure` is the total
    variation: estimates without an interval, since such a gain has no lower bound; -inf if the profile gives no
    distribution at a token. None if gains are in nats.

    inflation: the variance inflation v̂, by whose inverse the evidence was raised to a power; see
    `statistics.dependence`.
    """

    kind: str
    role: Role
    units: int
    tokens: int
    mean_gain: float
    mean_gain_by_token: float
    low: float
    high: float
    log_e: float
    log_e_adjusted: float
    needed: float
    clients: int
    refused: int
    client_share_active: bool
    test: int
    alpha: float
    window: int = 0
    supported: bool = False
    frozen: bool = False
    figure: Figure = Figure.NATS
    mean_kl_gain: float | None = None
    mean_kl_gain_by_token: float | None = None
    inflation: float = 1.0

    @property
    def effective_units(self) -> float:
        """The number of independent units that would say as much as these."""
        return self.units / self.inflation

    @property
    def gain_nats(self) -> float:
        """By unit, whatever the figure; -inf where nothing is known of the gain in KL."""
        if self.figure is Figure.NATS:
            return self.mean_gain
        return -math.inf if self.mean_kl_gain is None else self.mean_kl_gain

    @property
    def progress(self) -> float:
        """The evidence as a part of what is needed, 0 to 1."""
        return min(max(self.log_e_adjusted / self.needed, 0.0), 1.0)
