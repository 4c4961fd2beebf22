"""Decides which reference scores a capture: the first stage of `hemostat.scoring.stages`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from hemostat.engines.taps import TapResult
from hemostat.ipc.messages import Capture
from hemostat.metrics.reasons import Unscored
from hemostat.reference.pair import ModelPair, ServedModelsSource
from hemostat.reference.protocol import (
    Reference,
    ReferenceInfo,
)
from hemostat.scoring.endings import NotScored
from hemostat.scoring.limits import Breaker, Breakers, BreakerState
from hemostat_calibration.arrays import Ids
from hemostat_calibration.profiles.profile import CalibrationProfile


class ScoringNeeds(Protocol):
    """The needs of the parts that use the records: what is to be computed."""

    def evaluated_profiles(self) -> tuple[CalibrationProfile, ...]:
        """Returns the profiles whose effect on the distributions the reference computes."""

    def adapters(self) -> Collection[str]:
        """Returns the known versions of the family `adapter`."""

    def anchor_sets(self) -> Mapping[str, Ids]:
        """Returns the sets of anchors whose features are of use: digest -> the ids. If there are none, no features are
        read."""

    def needs_hidden_states(self, unit: bytes) -> bool:
        """Returns True if the reference's hidden states of this prompt's answer are of use."""


@dataclass(frozen=True, slots=True)
class Route:
    """The reference that scores a capture. `Router` makes it, and all later stages read it.

    tap: what the engine reported of the capture; None if it reported nothing.
    calibrated: True if profiles are for this model. For the others, the distributions alone are of use.
    """

    tap: TapResult | None
    pair: ModelPair
    reference: Reference
    info: ReferenceInfo
    breaker: Breaker
    calibrated: bool


class Router:
    """Decides which reference scores a capture. It takes the capture from `Scorer`, and gives the `Route`.

    clock: monotonic seconds.
    """

    def __init__(
        self,
        models: ServedModelsSource,
        needs: ScoringNeeds,
        breakers: Breakers,
        clock: Callable[[], float],
    ) -> None:
        self._models = models
        self._needs = needs
        self._breakers = breakers
        self._clock = clock

    def route(self, capture: Capture, tap: TapResult | None) -> Route:
        """Returns the capture's route. Raises NotScored if no reference can score the capture now, or if it cannot be
        known what its tokens were sampled from.
        """
        served = self._models.served
        pair = served.of(capture.model)
        if (unusable := self._unusable(capture, pair, tap)) is not None:
            raise NotScored(unusable)
        if pair is None or pair.scorer is None or pair.reference is None:
            raise NotScored(Unscored.REFERENCE_NOT_READY)
        breaker = self._breakers.of(pair.name)
        if breaker.state(self._clock()) is BreakerState.OPEN:
            raise NotScored(Unscored.BREAKER_OPEN)
        return Route(tap, pair, pair.scorer, pair.reference, breaker, pair.name == served.calibrated_name)

    def _unusable(self, capture: Capture, pair: ModelPair | None, tap: TapResult | None) -> Unscored | None:
        if pair is None:
            # Nothing is known of the server's models before it was first asked.
            return Unscored.UNKNOWN_MODEL if self._models.served.pairs else None
        if pair.compared and capture.model not in pair.scorable:
            known = pair.reference is not None  # then it is an adapter that the reference does not have
            return Unscored.UNKNOWN_MODEL if known else Unscored.NO_REFERENCE
        if tap is not None and tap.mixed:
            return Unscored.MIXED_PROFILE
        if tap is None and self._plugin_applies(capture):
            return Unscored.APPLIED_UNKNOWN
        return None

    def _plugin_applies(self, capture: Capture) -> bool:
        """Returns True if only the engine's plugin knows whether what was requested was applied. For an adapter the
        answer says so.
        """
        return capture.requested is not None and capture.requested not in self._needs.adapters()
