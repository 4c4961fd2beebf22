"""Reads what an earlier run has stored."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from hemostat.control.model_identity import UNKNOWN, same_models, together
from hemostat.engines.upstreams import STATE_KEY as UPSTREAMS_STATE
from hemostat.engines.upstreams import UpstreamEngines
from hemostat.measurement.alarms import STATE_KEY as ALARM_STATE
from hemostat.measurement.alarms import Alarms
from hemostat.measurement.by_engine import STATE_KEY as ENGINES_STATE
from hemostat.measurement.by_engine import ByEngine
from hemostat.measurement.outcomes import STATE_KEY as OUTCOMES_STATE
from hemostat.measurement.outcomes import Outcomes
from hemostat.profiles.decisions import MAX_EVENTS
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.persistence import STATE_KEYS as PROFILE_STATE_KEYS
from hemostat.profiles.persistence import whole_number
from hemostat.profiles.scopes import ALL
from hemostat.store import schema
from hemostat.store.errors import StoreErrorLog
from hemostat.store.protocol import (
    Store,
    StoreAccessDenied,
    StoreFailure,
    StoreIncompatible,
    StoreWrites,
)
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.messages import in_words
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.store")

MODELS_KEY = "models"
"""`model_identity` of the models that the stored evidence is about."""
STATE_KEYS = (
    *PROFILE_STATE_KEYS,
    ALARM_STATE,
    ENGINES_STATE,
    UPSTREAMS_STATE,
    OUTCOMES_STATE,
    schema.ALARM_TESTS_KEY,
    schema.OFFERED_KEY,
    MODELS_KEY,
)
"""Of the store, all that this process reads, but for the salt and the schema."""


class StoredState:
    """Hands what the store holds to its owners, where it is of the models compared now."""

    def __init__(
        self,
        store: Store,
        errors: StoreErrorLog,
        writes: StoreWrites,
        profiles: ProfileManager,
        alarms: Alarms,
        by_engine: ByEngine,
        upstreams: UpstreamEngines,
        outcomes: Outcomes,
    ) -> None:
        self._store = store
        self._errors = errors
        self._writes = writes
        self._profiles = profiles
        self._alarms = alarms
        self._by_engine = by_engine
        self._upstreams = upstreams
        self._outcomes = outcomes
        self._models: str | None = None
        """Of this process; None until both are known."""
        self._stored_models: str | None = None
        self._offered: str | None = None

    async def restore(self, forced: Path | None) -> None:
        """At the start. A store that fails is counted, except for a wrong password or a store of a newer version:
        those the operator has to correct.

        forced: file of a profile to put on every request, `calibration.force`; HemostatError where it is none.
        """
        if forced is not None:
            try:
                data = await asyncio.to_thread(forced.read_bytes)
                self._profiles.operator.force(CalibrationProfile.from_bytes(data))
            except (OSError, InvalidProfileError) as error:
                raise HemostatError(f"calibration.force: {forced}: {in_words(error)}") from error
        try:
            await asyncio.to_thread(schema.migrate, self._store, self._store)
            profiles = await asyncio.to_thread(self._store.profiles)
            states = {key: await asyncio.to_thread(self._store.get_state, key) for key in STATE_KEYS}
            events = await asyncio.to_thread(self._store.events, MAX_EVENTS)
        except (StoreAccessDenied, StoreIncompatible):
            raise  # relays, if any run, go on meanwhile
        except StoreFailure as failure:
            self._errors.record(failure)
            return
        self._profiles.restoring.restore(profiles, states, _events(events, alarm=False))
        self._by_engine.restore(states[ENGINES_STATE])
        tests = whole_number(states[schema.ALARM_TESTS_KEY])
        self._alarms.restore(states[ALARM_STATE], _events(events, alarm=True), tests)
        self._outcomes.restore(states[OUTCOMES_STATE])
        self._upstreams.restore(states[UPSTREAMS_STATE])
        self._stored_models, self._offered = states[MODELS_KEY], states[schema.OFFERED_KEY]
        self._settle()

    def set_models(self, models: str) -> None:
        """Both models are known, or more of them (`model_identity.model_identity`). Stored evidence about others is
        forgotten, and identity serves."""
        self._models = models
        self._settle()

    @property
    def models(self) -> str:
        """As they were set, and what the store knows of the same ones beyond that: the weights of engines that have not
        reported yet."""
        return self.models_with(self._models or UNKNOWN)

    def models_with(self, models: str) -> str:
        """The same if these were set."""
        stored = self._stored_models
        return together(stored if stored is not None and same_models(stored, models) else None, models)

    def _settle(self) -> None:
        """Compare the models with those of the stored state, once both are known."""
        if self._models is None:
            return
        if self._stored_models is not None and not same_models(self._stored_models, self._models):
            why = "the stored evidence is about other models"
            log.warning("%s (%s) than those served now (%s): it is not used", why, self._stored_models, self._models)
            self._profiles.forget_evidence(why)
            self._alarms.forget()
            self._by_engine.forget()
            self._outcomes.forget()
            self._stored_models = None
        # What is not known (yet), such as the weights of engines that have not reported, stays as it is stored.
        models = together(self._stored_models, self._models)
        if self._stored_models != models:
            self._stored_models = models
            self._writes.set_state(MODELS_KEY, models)
        if self._offered is not None:
            self._offer(self._offered)
            self._offered = None
            self._writes.set_state(schema.OFFERED_KEY, None)

    def _offer(self, text: str) -> None:
        """Test what served under an older version of the store."""
        try:
            stored = json.loads(text)
            offered = [(str(version), str(scope)) for version, scope in stored["profiles"]]
        except (ValueError, KeyError, TypeError) as error:
            log.error("the profiles to be tested again cannot be read from the store: %s", error)
            return
        for version, scope in offered:
            profile = self._profiles.catalogue.get(version)
            if profile is None:
                log.error("profile %s served under an older version of the store, which does not hold it", version)
                continue
            same_scopes = stored.get("scope") == self._profiles.serving.scopes.kind
            why = "it served under an older version of the store, without evidence by kind of traffic"
            try:
                self._profiles.operator.import_profile(profile, scope if same_scopes else ALL, why)
            except HemostatError as error:
                log.error("profile %s, which served before, cannot be tested: %s", version, error)


def _events(events: list[dict[str, Any]], *, alarm: bool) -> list[dict[str, Any]]:
    """Those of the alarms, or those of the profiles."""
    return [event for event in events if (event.get("decision") == "alarm") is alarm]
