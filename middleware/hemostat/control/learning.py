"""The parts between the profiles and others: they tell the learner what to learn about, decide what records must
contain for it and for the profiles under test, and show the profiles to the comparison of outcomes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hemostat.adapters.live.assembly import Adapters
from hemostat.config.schema import Calibration
from hemostat.learner.client import Learner, LearningTarget
from hemostat.profiles.decisions import Reason
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat_calibration.arrays import Ids
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, anchors_digest
from hemostat_calibration.statistics.split import held_out


class LearningSubject:
    """Decides what the learner learns about, or why about nothing; what is learned for adapters follows it."""

    def __init__(
        self,
        profiles: ProfileManager,
        monitor: ReferenceMonitor,
        learner: Learner,
        adapters: Adapters,
    ) -> None:
        self._adapters = adapters
        self._profiles = profiles
        self._monitor = monitor
        self._learner = learner

    def update(self) -> None:
        """Tells the learner what is to be learned now. Call after any change of the mode or the models."""
        self._adapters.update()
        pair, serving = self._monitor.served.calibrated, self._profiles.serving
        info = pair.reference if pair is not None else None
        if serving.mode == "off":
            self._learner.stop("calibration is off")
        elif info is None or serving.model is None:
            self._learner.stop("the reference is not ready")
        elif info.full_vocabulary and not info.hidden_size:
            self._learner.stop(f"of the reference {info.model}: {info.hidden_detail}", unavailable=True)
        elif info.folder is None:
            fix = "name the reference's checkpoint in reference.folder"
            self._learner.stop(f"{info.hidden_detail}; {fix}", unavailable=True)
        else:
            model = serving.model
            self._learner.set_target(
                LearningTarget(model.name, model.vocab_size, info.folder, info.hidden_size, info.digest)
            )


class CalibrationNeeds:
    """Implements `hemostat.scoring.routing.ScoringNeeds` for the profiles under test and the learners."""

    def __init__(self, settings: Calibration, profiles: ProfileManager, learner: Learner, adapters: Adapters) -> None:
        self._adapters = adapters
        self._held_out_fraction = settings.held_out_fraction
        self._profiles = profiles
        self._learner = learner

    def evaluated_profiles(self) -> tuple[CalibrationProfile, ...]:
        return self._profiles.evaluated_profiles()

    def adapters(self) -> Collection[str]:
        return self._profiles.catalogue.adapters

    def anchor_sets(self) -> Mapping[str, Ids]:
        evaluated = (anchors(profile) for profile in self._profiles.evaluated_profiles())
        return {anchors_digest(ids): ids for ids in evaluated if ids is not None} | self._learner.anchor_sets

    def needs_hidden_states(self, unit: bytes) -> bool:
        """Returns True if the unit's hidden states are needed. Held-out units are never learned from; adapters are
        judged by them."""
        if held_out(unit, self._held_out_fraction):
            return self._adapters.needs_hidden_states(unit)
        return self._learner.wants_hidden_states


class ServedKinds:
    """The `measurement.outcomes.ServedKinds` that the profile manager stands behind."""

    def __init__(self, profiles: ProfileManager) -> None:
        self._profiles = profiles

    def kinds(self) -> Collection[str]:
        return self._profiles.serving.kinds.keys()

    def version(self, kind: str) -> str | None:
        return self._profiles.serving.version_by_kind.get(kind)

    def is_operators(self, kind: str) -> bool:
        state = self._profiles.serving.kinds.get(kind)
        return state is not None and (bool(state.held) or state.pinned)

    def leave(self, kind: str, why: str, evidence: dict[str, Any]) -> None:
        if not self._profiles.serving.kinds[kind].pinned:
            self._profiles.lifecycle.roll_back(kind, Reason.OUTCOMES, why, evidence)
