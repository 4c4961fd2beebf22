"""The time that each figure and decision takes at the earliest, by the settings.

`hemostat serve` prints it. The status has it with what is there already, and docs/quickstart.md has it for the
defaults.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from hemostat.config.schema import Settings

Step = Literal["figure", "interval", "cycle", "canaries", "alarm", "promotion"]
INTERVAL_REQUESTS = 50
"""The number of scored requests, about, that the first interval takes if they depend on each other as little as is
usual, and no few of them have most of the tokens.
"""
BUDGET_REQUESTS = 96
PROMOTION_CONVERSATIONS = 96
"""The number of scored conversations of a kind before which nothing is promoted there."""


class WaitingTime(NamedTuple):
    """The earliest time at which one figure or decision is there.

    what: the figure or decision. when: the time in words.
    """

    step: Step
    what: str
    when: str

    def line(self) -> str:
        return f"{self.what}: {self.when}"


def waiting_times(settings: Settings) -> list[WaitingTime]:
    """Returns what these settings lead to, the earliest first; nothing without a reference."""
    if settings.reference.backend == "none":
        return []
    cycle, mode, alarm = settings.evidence.cycle_hours, settings.calibration.mode, settings.alarm
    span = f" over at least {lasting(cycle)}" if cycle else ""
    result = [
        WaitingTime("figure", "first figures", "with the first scored request"),
        WaitingTime(
            "interval",
            f"first interval{', for the hours measured so far' if cycle else ''}",
            f"after about {INTERVAL_REQUESTS} scored requests",
        ),
    ]
    if settings.canaries.enabled:
        when = "a set is taken ten minutes after the first start and compared each hour"
        result.append(WaitingTime("canaries", "canaries", when))
    if cycle:
        result.append(WaitingTime("cycle", "interval for the whole cycle of the traffic", f"after {lasting(cycle)}"))
    if alarm.baseline_requests is not None or alarm.budget_nats is not None:
        needed = BUDGET_REQUESTS if alarm.baseline_requests is None else alarm.baseline_requests
        when = f"after {needed} scored requests of a kind{span}"
        result.append(WaitingTime("alarm", "alarm, in each kind of traffic", when))
    if mode != "off":
        span = f" over at least {lasting(2.0 * cycle)}" if cycle else ""
        when = f"after {PROMOTION_CONVERSATIONS} scored conversations of a kind{span}, and only with proof"
        what = "promotion of a profile" if mode == "auto" else "proof of a profile, which mode observe only reports"
        result.append(WaitingTime("promotion", what, when))
    return result


def lasting(hours: float) -> str:
    """Returns a duration in words.

    >>> lasting(24.0), lasting(48.0), lasting(1.0), lasting(36.0)
    ('a day', '2 days', 'an hour', '36 hours')
    """
    if hours % 24.0 == 0.0:
        return "a day" if hours == 24.0 else f"{hours / 24.0:g} days"
    return "an hour" if hours == 1.0 else f"{hours:g} hours"
