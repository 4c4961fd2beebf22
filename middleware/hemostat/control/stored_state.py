"""Reads what the store holds: at the start from an earlier run, later from what the leading replica has written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from hemostat.control.learning import LearningSubject
from hemostat.control.operator_actions import ModeOverride
from hemostat.measurement.alarms import STATE_KEY as ALARM_STATE
from hemostat.measurement.alarms import Alarms
from hemostat.profiles.decisions import MAX_EVENTS
from hemostat.profiles.manager import ProfileManager
from hemostat.profiles.persistence import STATE_KEYS as PROFILE_STATE_KEYS
from hemostat.store.errors import StoreErrorLog
from hemostat.store.protocol import Store, StoreAccessDenied, StoredProfile, StoreFailure
from hemostat.store.replica import Replica
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.profiles.profile import CalibrationProfile

STATE_KEYS = (*PROFILE_STATE_KEYS, ALARM_STATE)
"""Of the store, all that this process reads."""


class StoredState:
    """Hands what the store holds to the profiles and the alarms.

    clock: monotonic seconds. on_change: called after another replica's changes were read.
    """

    def __init__(
        self,
        store: Store,
        errors: StoreErrorLog,
        profiles: ProfileManager,
        alarms: Alarms,
        subject: LearningSubject,
        override: ModeOverride,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._store = store
        self._errors = errors
        self._profiles = profiles
        self._alarms = alarms
        self._subject = subject
        self._override = override
        self._clock = clock
        self._on_change = on_change
        self._started = False

    async def restore(self, forced: Path | None, replica: Replica | None) -> None:
        """At the start. A store that fails is counted, except for a wrong password: that the operator has to correct.

        forced: file of a profile to put on every request, `calibration.force`; HemostatError where it is none.
        """
        if forced is not None:
            try:
                data = await asyncio.to_thread(forced.read_bytes)
                self._profiles.operator.force(CalibrationProfile.from_bytes(data))
            except (OSError, InvalidProfileError) as error:
                raise HemostatError(f"calibration.force: {forced}: {error}") from error
        try:
            if replica is not None:
                await replica.heartbeat()
                return
            profiles = await asyncio.to_thread(self._store.profiles)
            states = {key: await asyncio.to_thread(self._store.get_state, key) for key in STATE_KEYS}
            events = await asyncio.to_thread(self._store.events, MAX_EVENTS)
        except StoreAccessDenied:
            raise  # relays, if any run, go on meanwhile
        except StoreFailure as failure:
            self._errors.record(failure)
            return
        finally:
            self._started = True
        self._profiles.restoring.restore(profiles, states, _events(events, alarm=False))
        self._alarms.restore(states[ALARM_STATE], _events(events, alarm=True))

    def reload(
        self, profiles: list[StoredProfile], states: dict[str, str | None], events: list[dict[str, Any]]
    ) -> None:
        """Another replica has written to the store. profiles, events: newest first."""
        self._override.apply(states, self._clock())
        self._profiles.restoring.reload(profiles, states, _events(events, alarm=False))
        if not self._started:
            # Afterwards this replica's own alarms have seen more than what was stored.
            self._alarms.restore(states[ALARM_STATE], _events(events, alarm=True))
        self._subject.update()
        self._on_change()

    def write_all(self, stored: Collection[str]) -> None:
        """This replica leads now: write all that a restart needs. stored: versions of the profiles in the store."""
        self._errors.clear()
        self._profiles.restoring.write_all(stored)
        self._alarms.save()


def _events(events: list[dict[str, Any]], *, alarm: bool) -> list[dict[str, Any]]:
    """Those of the alarms, or those of the profiles."""
    return [event for event in events if (event.get("decision") == "alarm") is alarm]
