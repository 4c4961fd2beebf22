"""The models that are compared now: who is told when they change, and what is forgotten then.

Profiles are for one model of the upstream (`CalibratedModel`). The others are only measured (`OtherModels`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hemostat.control.learning import LearningSubject
from hemostat.control.model_identity import ModelIdentity, model_identity
from hemostat.control.stored_state import StoredState
from hemostat.engines.reports import ServedWeights
from hemostat.learner.client import Learner
from hemostat.measurement.by_model import MAX_MODELS
from hemostat.profiles.manager import ProfileManager
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ModelPair

log = logging.getLogger("hemostat.control")


class CalibratedModel:
    """Tells whoever learns, judges or stores which model profiles are for, and which weights it has. clock: monotonic
    seconds."""

    def __init__(
        self,
        monitor: ReferenceMonitor,
        weights: ServedWeights,
        profiles: ProfileManager,
        stored_state: StoredState,
        learner: Learner,
        subject: LearningSubject,
        clock: Callable[[], float],
    ) -> None:
        self._monitor = monitor
        self._weights = weights
        self._profiles = profiles
        self._stored_state = stored_state
        self._learner = learner
        self._subject = subject
        self._clock = clock
        self._models: ModelIdentity | None = None
        """The models as they were passed on last; None while they are not known."""

    def update(self) -> None:
        """Passes the model on, once its reference is known. Call it after any change of the models."""
        pair = self._monitor.served.calibrated
        if pair is None or pair.reference is None:
            return
        self._profiles.set_model_pair(pair.name, pair.reference.vocab_size, pair.scorable)
        self._stored_state.set_models(self._identity(pair))
        self._models = self._stored_state.models
        self._learner.set_weights(self._models.weights)
        self._subject.update()

    def look_at_weights(self) -> bool:
        """Looks at the weights: engines may have loaded other weights under the same name and path. Returns True if
        they have."""
        pair = self._monitor.served.calibrated
        if pair is None or pair.reference is None or self._models is None:
            return False
        return self._stored_state.models_with(self._identity(pair)) != self._models

    def _identity(self, pair: ModelPair) -> ModelIdentity:
        return model_identity(pair, self._weights.of(pair.name, pair.names, self._clock()))


class OtherModels:
    """Owns what the other models were when they were compared last. forget: called with the name of a model whose
    figures are of other weights, or of another reference, than it has now."""

    def __init__(self, monitor: ReferenceMonitor, forget: Callable[[str], None]) -> None:
        self._monitor = monitor
        self._forget = forget
        self._compared: dict[str, ModelIdentity] = {}

    def update(self) -> None:
        """Forgets what was measured of a model if its path or its reference has changed. Call it after any change of
        the models."""
        served = self._monitor.served
        for pair in served.pairs:
            if pair.reference is None or pair is served.calibrated:
                continue
            now, before = model_identity(pair), self._compared.pop(pair.name, None)
            if before is not None and not before.agrees_with(now):
                log.warning("%s: it, or its reference, is another one now: its figures begin anew", pair.name)
                self._forget(pair.name)
                before = None
            self._compared[pair.name] = now.completed_by(before)
            if len(self._compared) > MAX_MODELS:
                del self._compared[next(iter(self._compared))]
