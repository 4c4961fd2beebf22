"""The result of a fitter: the best map of its family, with its gain on held-out prompts that it was not fitted on.

A *map* takes the logits at the anchors to a change of the compressed model's hidden state (`maps.LinearMap`). A
candidate that gains enough is fitted again on all examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from hemostat_calibration.learning.contextual.maps import LinearMap
from hemostat_calibration.profiles.profile import CalibrationProfile

Progress = Callable[[str, float], None]
"""A function that is called now and then with the name of the stage and the part of it that is done, 0 to 1."""


class Variant(StrEnum):
    """The kind of examples that a map was learned from."""

    LINEAR = "linear"
    """It was learned from hidden states of both models."""
    LIST = "list"
    """It was learned from the reference's likeliest ids."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """The best map of one fitter, not yet fitted on all examples.

    penalty: of the ridge regression that it began as, a part of the rows' weight.
    gain: KL gained on held-out prompts, nats per token, when fitted without them. error: its standard error.
    refit: the same map fitted on all examples, at the scale that did best on the held-out ones.
    """

    variant: Variant
    penalty: float
    gain: float
    error: float
    refit: Callable[[], LinearMap]


@dataclass(frozen=True, slots=True)
class Report:
    """The report of how a proposal came about.

    rank: the rank of the map. penalty, gain, error: as in `Candidate`. tokens, requests: the numbers that were learned
    from.
    """

    variant: Variant
    rank: int
    penalty: float
    gain: float
    error: float
    tokens: int
    requests: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """A profile to try, and how it came about."""

    profile: CalibrationProfile
    report: Report


def no_progress(stage: str, done: float) -> None:
    """Does nothing: it is a `Progress`."""
