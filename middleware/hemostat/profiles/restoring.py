"""Reading the store back: after a restart, and from what another replica has written."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles import catalogue as limits
from hemostat.profiles.catalogue import Catalogue, parameter_bytes
from hemostat.profiles.decisions import EventLog
from hemostat.profiles.kinds import Kinds
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.persistence import (
    SERVING_KEY,
    TESTS_BEGUN_KEY,
    TESTS_KEY,
    StateWriter,
    StoredKind,
    StoredServing,
    candidates,
    stored_mode,
    whole_number,
)
from hemostat.profiles.proposals import Proposals
from hemostat.profiles.scopes import ALL
from hemostat.profiles.serving import KindState, ServingState
from hemostat.profiles.trials import Trials
from hemostat.store.protocol import StoredProfile
from hemostat.store.schema import OFFERED_KEY
from hemostat_calibration.errors import InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile

log = logging.getLogger("hemostat.calibration")


class Restoring:
    """configured_mode: `calibration.mode`."""

    def __init__(
        self,
        configured_mode: str,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        kinds: Kinds,
        trials: Trials,
        events: EventLog,
        lifecycle: Lifecycle,
        proposals: Proposals,
        writer: StateWriter,
    ) -> None:
        self._configured_mode = configured_mode
        self._catalogue = catalogue
        self._serving = serving
        self._kinds = kinds
        self._trials = trials
        self._events = events
        self._lifecycle = lifecycle
        self._proposals = proposals
        self._writer = writer

    def restore(
        self, stored: Iterable[StoredProfile], states: Mapping[str, str | None], events: list[dict[str, Any]]
    ) -> None:
        """Go on from what an earlier run wrote: what served serves again, and tests and windows go on.

        stored, events: newest first. states: by name, those of `STATE_KEYS`.
        """
        self._events.restore(reversed(events))
        self._serving.mode = stored_mode(states, self._configured_mode) or self._serving.mode
        served = StoredServing.decode(states.get(SERVING_KEY))
        self._restore_profiles(stored, served.versions())
        self._kinds.table = served.kind_table(self._kinds.limit)
        same_scopes = served.scope == self._serving.scopes.kind
        for name in (REST_KIND, *self._kinds.table.followed):
            kind = served.kinds.get(name)
            self._serving.kinds[name] = KindState() if kind is None else self._restored(name, kind)
        self._serving.kinds[REST_KIND].scope = ALL
        self._resume_tests(states, served if same_scopes else StoredServing())
        for name, state in self._serving.kinds.items():
            evidence = self._trials.serving_evidence(name)
            kind = served.kinds.get(name)
            if state.version is None:
                self._trials.unwatch(name)
            elif evidence is None or kind is None or evidence.test < kind.watch:
                self._trials.watch(name)

    def _restored(self, name: str, kind: StoredKind) -> KindState:
        state = KindState(
            window=max(1, kind.window), held=kind.held, units=kind.units, scope=kind.scope, tried=kind.tried
        )
        version = kind.version
        if version is not None and version in self._catalogue and self._serving.has_room(version, {name}):
            state.version, state.learned_of = version, kind.learned_of
            state.chosen, state.pinned = kind.chosen, kind.pinned
        return state

    def _resume_tests(self, states: Mapping[str, str | None], served: StoredServing) -> None:
        """Those of candidates whose profile is there; all of them where what is learned apart is the same as before."""
        queue = [candidate for candidate in candidates(served) if candidate.version in self._catalogue]
        for candidate in queue:
            self._serving.scopes.follow(candidate.scope)
        tests, begun = states.get(TESTS_KEY), whole_number(states.get(TESTS_BEGUN_KEY))
        try:
            self._trials.resume(tests.encode() if tests else None, begun, queue)
        except InvalidArgumentError as error:
            log.error("the stored tests cannot be read, they begin anew: %s", error)
            self._trials.resume(None, begun, queue)

    def reload(
        self, stored: Iterable[StoredProfile], states: Mapping[str, str | None], events: list[dict[str, Any]]
    ) -> None:
        """Go on from what another replica has written, as `restore` does from an earlier run's.

        stored: without data where the profile is held. Where the store has no record of what serves, nothing changes.
        """
        if states.get(SERVING_KEY) is None and states.get(OFFERED_KEY) is None:
            return
        stored = list(stored)
        self._serving.kinds = {REST_KIND: KindState(scope=ALL)}
        known = {item.version for item in stored} | StoredServing.decode(states.get(SERVING_KEY)).versions()
        for version in list(self._catalogue):
            if version not in known and version not in (self._serving.forced, self._catalogue.probe):
                self._catalogue.remove(version)
        self._events.clear()
        self._serving.mode = self._configured_mode
        self.restore(stored, states, events)
        if self._serving.model is not None:
            self._reject_unfit()
            self._proposals.count_serving()

    def write_all(self, stored: Collection[str]) -> None:
        """Write all that a restart needs: the store may have lost it. stored: versions of the profiles that it has."""
        used = {candidate.version for candidate in self._trials.queue} | set(self._serving.versions)
        for version in used.difference(stored):
            self._writer.put_profile(self._catalogue.stored(version))
        self._writer.write_serving()
        self._writer.write_tests()
        self._writer.write_mode()
        self._writer.write_tests_begun()

    def _restore_profiles(self, stored: Iterable[StoredProfile], used: set[str]) -> None:
        """Hold the newest profiles, as many as fit, and those that are used; delete the others from the store."""
        total = 0
        for n, item in enumerate(stored):
            held = self._catalogue.get(item.version)
            total += len(item.data) if held is None else parameter_bytes(held)
            too_many = n >= limits.MAX_PROFILES or total > limits.MAX_PROFILE_BYTES
            if too_many and item.version not in used:
                self._writer.delete_profile(item.version)
                continue
            try:
                profile = held or item.read or CalibrationProfile.from_bytes(item.data, item.version)
            except InvalidProfileError as error:
                log.error("stored profile %s: %s", item.version, error)
                continue
            self._catalogue.restore(profile, item.created)

    def _reject_unfit(self) -> None:
        """Let nothing serve here that does not fit this replica's model or settings."""
        for name, state in self._serving.kinds.items():
            selected = self._catalogue.get(state.version)
            if selected is None:
                continue
            try:
                self._lifecycle.require_fit(selected)
            except InvalidProfileError as error:
                log.error("a profile that another replica promoted cannot serve here: %s", error)
                self._trials.unwatch(name)
                state.version, state.pinned, state.chosen = None, False, False
