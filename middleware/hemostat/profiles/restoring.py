"""Reading the store back: after a restart, and from what another replica has written."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hemostat.profiles import catalogue as limits
from hemostat.profiles.catalogue import Catalogue, parameter_bytes
from hemostat.profiles.decisions import EventLog
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.persistence import (
    SERVING_KEY,
    StateWriter,
    StoredServing,
    stored_mode,
    stored_test_counts,
)
from hemostat.profiles.proposals import Proposals
from hemostat.profiles.scopes import ALL
from hemostat.profiles.serving import ServingState
from hemostat.profiles.trials import Trials
from hemostat.store.protocol import StoredProfile
from hemostat.store.schema import OFFERED_KEY
from hemostat_calibration.errors import InvalidProfileError
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
        trials: Trials,
        events: EventLog,
        lifecycle: Lifecycle,
        proposals: Proposals,
        writer: StateWriter,
    ) -> None:
        self._configured_mode = configured_mode
        self._catalogue = catalogue
        self._serving = serving
        self._scopes = serving.scopes
        self._trials = trials
        self._events = events
        self._lifecycle = lifecycle
        self._proposals = proposals
        self._writer = writer

    def restore(
        self, stored: Iterable[StoredProfile], states: Mapping[str, str | None], events: list[dict[str, Any]]
    ) -> None:
        """Go on from what an earlier run wrote: what served serves again, and goes on being judged.

        stored, events: newest first. states: by name, those of `STATE_KEYS`.
        """
        self._events.restore(reversed(events))
        self._serving.mode = stored_mode(states, self._configured_mode) or self._serving.mode
        self._trials.resume(stored_test_counts(states))
        served = StoredServing.decode(states.get(SERVING_KEY))
        self._restore_profiles(stored, served.versions())
        for scope, (version, window) in served.selected.items():
            state = self._scopes.follow(scope) if scope == ALL or served.scope == self._scopes.kind else None
            if state is not None and version in self._catalogue and self._serving.has_room(scope):
                state.selected, state.window = version, max(1, window)
                self._trials.watch_serving(version, scope, state.window)
        self._serving.pinned = served.pinned and self._serving.selected is not None

    def reload(
        self, stored: Iterable[StoredProfile], states: Mapping[str, str | None], events: list[dict[str, Any]]
    ) -> None:
        """Go on from what another replica has written, as `restore` does from an earlier run's.

        stored: without data where the profile is held. Where the store has no record of what serves, nothing changes.
        """
        if states.get(SERVING_KEY) is None and states.get(OFFERED_KEY) is None:
            return
        stored = list(stored)
        self._trials.remove(lambda _: True)
        for scope, state in self._scopes.items():
            self._trials.unwatch_serving(scope)
            state.selected = None
        known = {item.version for item in stored} | StoredServing.decode(states.get(SERVING_KEY)).versions()
        for version in list(self._catalogue):
            if version not in known and version not in (self._serving.forced, self._catalogue.probe):
                self._lifecycle.forget(version)
        self._events.clear()
        self._serving.mode = self._configured_mode
        self.restore(stored, states, events)
        if self._serving.model is not None:
            self._reject_unfit()
            self._proposals.count_serving()

    def write_all(self, stored: Collection[str]) -> None:
        """Write all that a restart needs: the store may have lost it. stored: versions of the profiles that it has."""
        for version in self._scopes.selected().difference(stored):
            self._writer.put_profile(self._catalogue.stored(version))
        self._writer.write_serving()
        self._writer.write_mode()
        for role, number in self._trials.tests_begun.items():
            self._writer.write_tests_begun(role, number)

    def _restore_profiles(self, stored: Iterable[StoredProfile], serving: set[str]) -> None:
        """Hold the newest profiles, as many as fit, and those that serve; delete the others from the store."""
        total = 0
        for n, item in enumerate(stored):
            held = self._catalogue.get(item.version)
            total += len(item.data) if held is None else parameter_bytes(held)
            too_many = n >= limits.MAX_PROFILES or total > limits.MAX_PROFILE_BYTES
            if too_many and item.version not in serving:
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
        for scope, state in self._scopes.items():
            selected = self._catalogue.get(state.selected)
            if selected is None:
                continue
            try:
                self._lifecycle.require_fit(selected)
            except InvalidProfileError as error:
                log.error("a profile that another replica promoted cannot serve here: %s", error)
                self._trials.unwatch_serving(scope)
                state.selected = None
                self._serving.pinned = self._serving.pinned and scope != ALL
