"""The waiting times of the settings, and which of them have passed: what is known now, and what comes when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hemostat.config.schema import Settings
from hemostat.config.waiting_times import Step, waiting_times


class StepStatus(msgspec.Struct, frozen=True):
    """One figure or decision that takes time."""

    step: Step
    what: str
    when: str
    """The earliest moment, in words."""
    known: bool
    """It is True if the figure or decision is there."""


def progress(
    settings: Settings,
    *,
    scored: int,
    kl: Mapping[str, Any],
    alarm: Mapping[str, Any],
    canaries: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> list[StepStatus]:
    """Returns the waiting times of the settings, each with whether it has passed.

    kl: `raw.kl_nats` of the status. The other arguments are the parts of the status with the same names.
    """
    known: dict[Step, bool] = {
        "figure": scored > 0,
        "interval": _has_interval(kl, "ci95_seen") or _has_interval(kl, "ci95"),
        "cycle": _has_interval(kl, "ci95"),
        "canaries": canaries["set"] is not None,
        "alarm": any(test["begun"] for test in alarm["tests"]),
        "promotion": any(kind["version"] for kind in calibration["kinds"]),
    }
    return [StepStatus(time.step, time.what, time.when, known[time.step]) for time in waiting_times(settings)]


def _has_interval(kl: Mapping[str, Any], name: str) -> bool:
    """Returns True if the figure has an interval. An interval that goes up to all that the figure can be says
    nothing."""
    high = kl.get(name, [None, None])[1]
    return high is not None and high < kl["cap"]
