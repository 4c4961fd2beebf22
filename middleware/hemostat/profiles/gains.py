"""Gains of one profile over another: the figure that they are in, and how wide they can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hemostat_calibration.guard.decisions import Figure

TOTAL_VARIATION_WIDTH = 1.0
"""The width of gains in total variation: the total variation of two distributions is between 0 and 1."""


@dataclass(frozen=True, slots=True)
class UnitGain:
    """A unit's mean gain per token of one version over another, between lower and upper.

    kl: where the ends are of the total variation, the gain in KL, nats; -inf where the version gives no distribution at
        a token. None if the ends are in nats.
    """

    lower: float
    upper: float
    kl: float | None = None

    @property
    def figure(self) -> Figure:
        return Figure.NATS if self.kl is None else Figure.TOTAL_VARIATION


class Gains:
    """Says of gains what follows from the profiles alone. A version of None is identity.

    profile_width: (version) -> high minus low of its Δz, nats: no gain over identity is below minus that.
    changes_weights: (version) -> whether it is an adapter, whose gains are of the total variation whatever it is
        compared with.
    """

    def __init__(
        self, profile_width: Callable[[str], float], changes_weights: Callable[[str | None], bool] = lambda _: False
    ) -> None:
        self._profile_width = profile_width
        self.changes_weights = changes_weights

    def figure(self, version: str | None, baseline: str | None) -> Figure:
        """Returns the figure in which gains of a version over another are measured."""
        adapted = self.changes_weights(version) or self.changes_weights(baseline)
        return Figure.TOTAL_VARIATION if adapted else Figure.NATS

    def width(self, version: str, baseline: str | None) -> float:
        """Returns the width of gains: no gain of the version over the other (None: identity) is below minus this."""
        if self.figure(version, baseline) is Figure.TOTAL_VARIATION:
            return TOTAL_VARIATION_WIDTH
        return self._profile_width(version) + (self._profile_width(baseline) if baseline is not None else 0.0)
