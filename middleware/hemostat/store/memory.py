"""A store in memory, which ends with its process."""

from __future__ import annotations

from collections import deque
from typing import Any

from hemostat.store.protocol import MAX_EVENTS, StoredProfile


class MemoryStore:
    """Implements `protocol.Store`."""

    def __init__(self) -> None:
        self._profiles: dict[str, StoredProfile] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._state: dict[str, str] = {}
        self._blobs: dict[str, bytes] = {}

    def put_profile(self, profile: StoredProfile) -> None:
        self._profiles[profile.version] = profile

    def get_profile(self, version: str) -> StoredProfile | None:
        return self._profiles.get(version)

    def profiles(self) -> list[StoredProfile]:
        return sorted(self._profiles.values(), key=lambda p: p.created, reverse=True)

    def delete_profile(self, version: str) -> None:
        if not any(version in value for value in self._state.values()):
            self._profiles.pop(version, None)

    def append_event(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def events(self, limit: int) -> list[dict[str, Any]]:
        return list(self._events)[: -limit - 1 : -1]

    def set_state(self, key: str, value: str | None) -> None:
        if value is None:
            self._state.pop(key, None)
        else:
            self._state[key] = value

    def raise_state(self, key: str, value: int) -> None:
        self._state[key] = str(max(value, int(self._state.get(key, 0))))

    def put_blob(self, key: str, data: bytes) -> None:
        self._blobs[key] = data

    def get_blob(self, key: str) -> bytes | None:
        return self._blobs.get(key)

    def get_state(self, key: str) -> str | None:
        return self._state.get(key)

    def add_state(self, key: str, value: str) -> str:
        return self._state.setdefault(key, value)

    def close(self) -> None:
        return
