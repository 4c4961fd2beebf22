"""The contract of fitters, one for each family of maps, and what they give.

A *map* takes the logits at the anchors to a change of the compressed model's hidden state (`mlp.Network`). A fitter
is given examples and makes one candidate: the best map of its family, with what it gains on held-out prompts that it
was not fitted on. `choose.best_candidate` then compares candidates, and the chosen one is fitted again on all examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeVar

from hemostat_calibration.learning.contextual.mlp import Network
from hemostat_calibration.profiles.profile import CalibrationProfile

Progress = Callable[[str, float], None]
"""Called now and then with the name of the stage and the part of it that is done, 0 to 1."""

Examples_contra = TypeVar("Examples_contra", contravariant=True)


class Variant(StrEnum):
    """Family of a map, and how it was learned."""

    LINEAR = "linear"
    NETWORK = "mlp"
    """A network learned by squared error."""
    NETWORK_KL = "mlp_kl"
    """The same, and then by KL itself, for as many stages as did best."""
    LIST = "list"
    """Learned from the reference's likeliest ids."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """The best map of one family, not yet fitted on all examples.

    penalty: of the ridge regression that it began as, a part of the rows' weight.
    gain: KL gained on held-out prompts, nats per token, when fitted without them. error: its standard error.
    refit: the same map fitted on all examples, at the scale that did best on the held-out ones.
    """

    variant: Variant
    penalty: float
    gain: float
    error: float
    refit: Callable[[], Network]


class Fitter(Protocol[Examples_contra]):
    """One family of maps. Pure: what is random follows from a seed in its settings."""

    def fit(self, examples: Examples_contra, progress: Progress) -> Candidate | None:
        """The best map of the family; None where none gains anything, or there is too little to learn from."""


@dataclass(frozen=True, slots=True)
class Report:
    """How a proposal came about.

    rank: of the map. penalty, gain, error: as in `Candidate`. tokens, requests: that were learned from.
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
    """A `Progress` that does nothing."""
