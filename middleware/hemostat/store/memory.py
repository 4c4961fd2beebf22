"""A store in memory, which ends with its process."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from hemostat.store.protocol import (
    MAX_EVENTS,
    AppendEvent,
    BlobKey,
    DeleteProfile,
    Head,
    PutBlob,
    PutProfile,
    SetState,
    Snapshot,
    StateKey,
    StoredProfile,
    Write,
    has_happened,
)


class MemoryStore:
    """Implements `protocol.Store`; no other process can own it."""

    def __init__(self) -> None:
        self._head = Head()
        self._states: dict[StateKey, str] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._profiles: dict[str, StoredProfile] = {}
        self._blobs: dict[BlobKey, bytes] = {}

    @property
    def owned_until(self) -> float:
        return math.inf

    def acquire(self) -> bool:
        return True

    def verify(self) -> None:
        return

    def head(self) -> Head:
        return self._head

    def read(self) -> Snapshot:
        profiles = sorted(self._profiles.values(), key=lambda profile: profile.created, reverse=True)
        return Snapshot(self._head, dict(self._states), list(reversed(self._events)), profiles, dict(self._blobs))

    def commit(self, writes: Sequence[Write], expected: int, commit_id: str) -> int:
        if not has_happened(self._head, expected, commit_id, "in memory"):
            for write in writes:
                self._execute(write)
            self._head = Head(expected + 1, commit_id)
        return expected + 1

    def _execute(self, write: Write) -> None:
        match write:
            case PutProfile(profile):
                self._profiles[profile.version] = profile
            case DeleteProfile(version):
                self._profiles.pop(version, None)
            case AppendEvent(event):
                self._events.append(event)
            case SetState(key, value):
                self._states.pop(key, None)
                if value is not None:
                    self._states[key] = value
            case PutBlob(key, data):
                self._blobs[key] = data

    def close(self) -> None:
        return
