"""Hands what an earlier run has stored to its owners."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hemostat.control.model_identity import DAMAGED, ModelIdentity
from hemostat.engines.registry import EngineRegistry
from hemostat.measurement.measured import Measured
from hemostat.profiles.manager import ProfileManager
from hemostat.store.protocol import Snapshot, StateKey, StoreWrites
from hemostat.store.states import read_state, write_state

log = logging.getLogger("hemostat.store")

MODELS_KEY = StateKey("models")
"""The key of the `ModelIdentity` that the stored evidence is about."""
SALT_KEY = StateKey("salt")
"""The key of the salt."""
SCHEMA = 1
"""The schema of both."""
SALT_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Salt:
    """The salt as it is stored: `SALT_BYTES` random bytes in hexadecimal digits."""

    salt: str


class StoredState:
    """Owns the salt, and which models the stored evidence is about.

    The salt is the secret with which conversations, clients, arms and the split are hashed; it is made once. Whoever
    knows it can compute which side of the split and which arm a conversation falls on, and so choose what is learned
    from and what is judged.
    """

    def __init__(
        self,
        writes: StoreWrites,
        profiles: ProfileManager,
        measured: Measured,
        engines: EngineRegistry,
    ) -> None:
        self._writes = writes
        self._profiles = profiles
        self._measured = measured
        self._engines = engines
        self.salt = secrets.token_bytes(SALT_BYTES)
        self.on_other_models: Callable[[str], None] = lambda why: None
        """A function that is called with the reason when stored evidence is about other models than those that serve or
        are compared now."""
        self._models: ModelIdentity | None = None
        """The models of this process; None until both are known."""
        self._stored_models: ModelIdentity | None = None

    def restore(self, snapshot: Snapshot) -> None:
        """Restores all that is stored; it is called at the start."""
        states = snapshot.states
        events = [event for event in snapshot.events if event.get("decision") != "alarm"]
        self._profiles.restoring.restore(snapshot.profiles, states, events)
        self._measured.restore(snapshot)
        report = self._measured.alarms.record_event
        self._engines.restore(states, report)
        self._stored_models = read_state(states, MODELS_KEY, ModelIdentity, SCHEMA, report)
        if self._stored_models is None and MODELS_KEY in states:
            self._stored_models = DAMAGED
        self._restore_salt(states, report)
        self._settle()

    def _restore_salt(self, states: Mapping[StateKey, str], report: Callable[[str], None]) -> None:
        stored = read_state(states, SALT_KEY, _Salt, SCHEMA, report)
        try:
            salt = bytes.fromhex(stored.salt if stored is not None else "")
        except ValueError:
            salt = b""
        if len(salt) == SALT_BYTES:
            self.salt = salt
            return
        if SALT_KEY in states:
            log.error("the stored salt is damaged; a new one replaces it: all conversations count as new")
        write_state(self._writes, SALT_KEY, _Salt(self.salt.hex()), SCHEMA)

    def set_models(self, models: ModelIdentity) -> None:
        """Takes the models once both are known, or more of them. Stored evidence about others is forgotten, and
        identity serves."""
        self._models = models
        self._settle()

    @property
    def models(self) -> ModelIdentity:
        """The models as they were set, with what the store knows of the same ones beyond that: the weights of engines
        that have not reported yet."""
        return self.models_with(self._models or ModelIdentity())

    def models_with(self, models: ModelIdentity) -> ModelIdentity:
        """Returns the models as they would be known if these were set."""
        stored = self._stored_models
        return models.completed_by(stored) if stored is not None and stored.agrees_with(models) else models

    def _settle(self) -> None:
        """Compares the models with the models of the stored state, once both are known."""
        if self._models is None:
            return
        if self._stored_models is not None and not self._stored_models.agrees_with(self._models):
            why = "the stored evidence is about other models"
            if replace(self._models, probe=()).agrees_with(self._stored_models):
                why = "the reference has loaded other weights under the same name"
            log.warning(
                "%s (%s) than those served now (%s): it is forgotten, and identity serves. To keep evidence of several "
                "models, name a store for each in store.url",
                why,
                self._stored_models.to_json(),
                self._models.to_json(),
            )
            self._profiles.forget_evidence(why)
            self._measured.forget()
            self.on_other_models(why)
            self._measured.alarms.record_event(f"{why}: what was measured with the others is forgotten")
            self._stored_models = None
        # What is not known (yet), such as the weights of engines that have not reported, stays as it is stored.
        models = self._models.completed_by(self._stored_models)
        if self._stored_models != models:
            self._stored_models = models
            write_state(self._writes, MODELS_KEY, models, SCHEMA)
