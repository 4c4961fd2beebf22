"""The states that evidence goes into, written in one step with the positions up to which it was counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hemostat.control.evidence.positions import Positions
from hemostat.store.protocol import StoredProfile, StoreWrites

POSITIONS_KEY = "evidence"
"""Of the state in the store."""
MAX_UNSAVED = 100
"""Scored requests of its own that a leader counts before it writes: what is lost of them if it dies."""
MAX_UNSAVED_OUTCOMES = 1000
"""The same of outcomes of answers, which are small and many."""
SAVE_SECONDS = 10.0
"""Between two writes while evidence comes; what followers show is about as old."""


class Checkpoint:
    """Implements `protocol.StoreWrites`, for the owners of the states in `keys`: whichever of them is written, all are,
    as they are now, with the positions. Other writes pass through.

    writes: as the leader. clock: monotonic seconds.
    """

    def __init__(
        self, writes: StoreWrites, positions: Positions, keys: frozenset[str], clock: Callable[[], float]
    ) -> None:
        self._writes = writes
        self._positions = positions
        self._keys = keys
        self._clock = clock
        self._owners: tuple[Callable[[], None], ...] = ()
        self._collected: dict[str, str | None] | None = None
        """While owners write their states."""
        self._saved_at = clock()
        self._unsaved = 0.0
        """Of `MAX_UNSAVED`, the part that has been counted since the last write."""
        self._changed = False
        """Something has been counted since then."""
        self._in_unit = self._due = False
        """A unit is being counted; then, a write is due after it."""

    def set_owners(self, *owners: Callable[[], None]) -> None:
        """Each writes its states, as they are now."""
        self._owners = owners

    @contextmanager
    def unit(self) -> Iterator[None]:
        """Around all that counts one unit, its position too: what is to be written meanwhile is written afterwards,
        when every state has the unit."""
        self._in_unit = True
        try:
            yield
        finally:
            self._in_unit = False
            if self._due:
                self.save()

    def note_own(self) -> None:
        """The leader has counted a request that it scored itself."""
        self._note(1.0 / MAX_UNSAVED)

    def note_own_outcome(self) -> None:
        self._note(1.0 / MAX_UNSAVED_OUTCOMES)

    def note_others(self) -> None:
        """The leader has counted units of another replica: if it dies, the next one finds them in the stream."""
        self._changed = True

    def _note(self, part: float) -> None:
        self._changed = True
        self._unsaved += part
        if self._unsaved >= 1.0:
            self.save()

    def save_if_due(self) -> None:
        if self._changed and self._clock() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Queue a write of everything; within a unit, after it."""
        self._due = self._in_unit
        if self._in_unit:
            return
        collected = self._collected = {}
        try:
            for write in self._owners:
                write()
        finally:
            self._collected = None
        self._saved_at, self._unsaved, self._changed = self._clock(), 0.0, False
        self._writes.set_states({**collected, POSITIONS_KEY: self._positions.save()})

    # --- protocol.StoreWrites --------------------------------------------------------------------------------------

    def set_state(self, key: str, value: str | None) -> None:
        if key not in self._keys:
            self._writes.set_state(key, value)
        elif self._collected is not None:
            self._collected[key] = value
        else:
            self.save()

    def set_states(self, values: Mapping[str, str | None]) -> None:
        for key, value in values.items():
            self.set_state(key, value)

    def put_profile(self, profile: StoredProfile) -> None:
        self._writes.put_profile(profile)

    def delete_profile(self, version: str) -> None:
        self._writes.delete_profile(version)

    def append_event(self, event: dict[str, Any]) -> None:
        self._writes.append_event(event)

    def raise_state(self, key: str, value: int) -> None:
        self._writes.raise_state(key, value)

    def put_blob(self, key: str, data: bytes) -> None:
        self._writes.put_blob(key, data)
