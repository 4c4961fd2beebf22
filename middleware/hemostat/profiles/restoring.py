"""Reads the store back after a restart."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles import catalogue as limits
from hemostat.profiles.candidates import Candidate
from hemostat.profiles.catalogue import Catalogue, parameter_bytes
from hemostat.profiles.decisions import Decision, EventLog, Reason
from hemostat.profiles.followed_kinds import FollowedKinds
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.persistence import (
    TESTS_KEY,
    StateWriter,
    StoredKind,
    StoredServing,
    candidates,
    stored_mode,
    stored_serving,
)
from hemostat.profiles.proposals import Proposals
from hemostat.profiles.serving import KindState, ServingState
from hemostat.profiles.trials import Trials
from hemostat.store.protocol import StateKey, StoredProfile
from hemostat_calibration.errors import InvalidArgumentError, InvalidProfileError
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile

log = logging.getLogger("hemostat.calibration")

Cause = tuple[Reason, str]
"""The reason why something cannot go on, with a text for people."""


class Restoring:
    """Restores the parts of a profile's life."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        kinds: FollowedKinds,
        trials: Trials,
        events: EventLog,
        lifecycle: Lifecycle,
        proposals: Proposals,
        writer: StateWriter,
    ) -> None:
        self._catalogue = catalogue
        self._serving = serving
        self._kinds = kinds
        self._trials = trials
        self._events = events
        self._lifecycle = lifecycle
        self._proposals = proposals
        self._writer = writer

    def restore(
        self,
        stored: Iterable[StoredProfile],
        states: Mapping[StateKey, str],
        events: Sequence[dict[str, Any]],
    ) -> None:
        """Goes on from what an earlier run wrote: what served serves again, and tests and windows go on. What cannot go
        on is withdrawn, which is an event with its reason.

        stored, events: newest first. states: by name, for the names in `STATE_KEYS`.
        """
        self._events.restore(reversed(events))
        self._proposals.restore_proposed(states)
        served, damage = _served(states)
        kinds, queue = self._apply(stored, states, served)
        evicted = [name for name in served.kinds if name not in self._serving.kinds]  # `evidence.kinds` is lower now
        apart = [(version, scope) for version, scope, _ in served.queue if scope]
        if not (damage or kinds or queue or evicted or apart):
            return
        # Only now that everything was read. The events first: what is withdrawn is not in the state any more.
        with self._writer.one_commit():
            if damage:
                self._events.record(Decision.ROLL_BACK, Reason.LOST, IDENTITY, damage, {})
            for name, cause in kinds.items():
                state, kind = self._serving.kinds[name], served.kinds[name]
                state.version = kind.version
                self._lifecycle.roll_back(name, *cause, {})
            for candidate, cause in queue.items():
                self._lifecycle.drop(candidate, *cause)
            for version, scope in apart:
                why = f"it was learned from the requests of {scope} alone: profiles are learned from all traffic now"
                self._events.record(Decision.DROP, Reason.SETTINGS, version, why, {})
            for name in evicted:
                self._serving.kinds[name] = _state(served.kinds[name], serves=True)
                self._lifecycle.kind_evicted(name)

    def _apply(
        self, stored: Iterable[StoredProfile], states: Mapping[StateKey, str | None], served: StoredServing
    ) -> tuple[dict[str, Cause], dict[Candidate, Cause]]:
        """Returns the kinds that something served which cannot any more, and the candidates that are not tested."""
        self._serving.mode = stored_mode(states, self._writer.configured_mode) or self._serving.mode
        unread = self._restore_profiles(stored, served.versions())
        self._kinds.table = served.kind_table(self._kinds.limit)
        former = served.former.items()
        self._serving.former = {name: KindState(tried=tried, held=held) for name, (tried, held) in former}
        withdrawn: dict[str, Cause] = {}
        for name in (REST_KIND, *self._kinds.table.followed):
            kind = served.kinds.get(name)
            if kind is None:
                self._serving.kinds[name] = KindState()
                continue
            cause = None if kind.version is None else self._why_not_served(kind.version, name, unread)
            self._serving.kinds[name] = _state(kind, serves=cause is None)
            if cause is not None:
                withdrawn[name] = cause
        dropped = self._resume_tests(states, served, unread)
        for name, state in self._serving.kinds.items():
            evidence = self._trials.serving_evidence(name)
            kind = served.kinds.get(name)
            if state.version is None:
                self._trials.unwatch(name)
            elif evidence is None or kind is None or evidence.test < kind.watch:
                self._trials.watch(name)
        return withdrawn, dropped

    def _why_not_served(self, version: str, kind: str, unread: Mapping[str, str]) -> Cause | None:
        """Returns why a version cannot serve any more. Slots are not asked for: how many engines have is not known yet.
        What served keeps its place until then."""
        full = self._serving.why_no_place(version, {kind})
        return self._why_not_held(version, unread) or (None if full is None else (Reason.SETTINGS, full))

    def _why_not_held(self, version: str, unread: Mapping[str, str]) -> Cause | None:
        profile = self._catalogue.get(version)
        if profile is None:
            return Reason.LOST, unread.get(version, "the store does not hold it any more")
        try:
            self._lifecycle.require_fit(profile)
        except InvalidProfileError as error:
            return Reason.SETTINGS, str(error)
        return None

    def _resume_tests(
        self, states: Mapping[StateKey, str | None], served: StoredServing, unread: Mapping[str, str]
    ) -> dict[Candidate, Cause]:
        """Resumes the tests of candidates whose profile is there. Returns the other candidates."""
        causes = {candidate: self._why_not_held(candidate.version, unread) for candidate in candidates(served)}
        queue = [candidate for candidate, cause in causes.items() if cause is None]
        tests, (begun, windows) = states.get(TESTS_KEY), self._trials.numbers.restore(states)
        # Versions before WINDOWS_BEGUN_KEY stored the numbers of windows with what serves.
        served_windows = {name: kind.watch for name, kind in served.kinds.items() if kind.watch}
        watched = {**windows, **{name: max(n, windows.get(name, 0)) for name, n in served_windows.items()}}
        try:
            self._trials.resume(tests.encode() if tests else None, begun, queue, watched)
        except InvalidArgumentError as error:
            log.error("the stored tests cannot be read, they begin anew: %s", error)
            self._trials.resume(None, begun, queue, watched)
        self._trials.spend()
        return {candidate: cause for candidate, cause in causes.items() if cause is not None}

    def _restore_profiles(self, stored: Iterable[StoredProfile], used: set[str]) -> dict[str, str]:
        """Holds the newest profiles, as many as fit, and those that are used; deletes the others from the store.

        Returns the versions that cannot be read -> why.
        """
        total, unread = 0, {}
        for n, item in enumerate(stored):
            held = self._catalogue.get(item.version)
            total += len(item.data) if held is None else parameter_bytes(held)
            too_many = n >= limits.MAX_PROFILES or total > limits.MAX_PROFILE_BYTES
            if too_many and item.version not in used:
                self._writer.delete_profile(item.version)
                continue
            try:
                profile = held or CalibrationProfile.from_bytes(item.data, item.version)
            except InvalidProfileError as error:
                unread[item.version] = f"its stored data cannot be read: {error}"
                if item.version not in used:  # else that it is withdrawn is logged
                    log.error("profile %s: %s", item.version, unread[item.version])
                continue
            self._catalogue.restore(profile, item.created)
        return unread


def _served(states: Mapping[StateKey, str | None]) -> tuple[StoredServing, str]:
    """Returns what served, and what is wrong with the record of it, in one line; "" if nothing is wrong."""
    damage: list[str] = []
    served = stored_serving(states, damage.append)
    return served, "".join(f"{line}; identity serves" for line in damage)


def _state(kind: StoredKind, *, serves: bool) -> KindState:
    """Returns the state of a stored kind. serves: its profile serves; else identity does."""
    state = KindState(window=max(1, kind.window), held=kind.held, units=kind.units, tried=kind.tried)
    if serves and kind.version is not None:
        state.version = kind.version
        state.chosen, state.pinned = kind.chosen, kind.pinned
    return state
