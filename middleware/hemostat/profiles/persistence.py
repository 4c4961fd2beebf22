"""What a restart, or another replica, needs: the keys and formats in the store's state, and their writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import msgspec

from hemostat.profiles.serving import ServingState
from hemostat.store.protocol import StoredProfile, StoreWrites
from hemostat_calibration.guard import Role

log = logging.getLogger("hemostat.calibration")

MODES = frozenset({"off", "observe", "auto"})

SERVING_KEY = "serving"
"""`StoredServing` as JSON."""
MODE_KEY = "mode"
"""The configured mode and the one in force, with a space between."""
STATE_KEYS = (SERVING_KEY, MODE_KEY, *(f"tests.{role}" for role in Role))
"""What the store's state holds of profiles; `tests.ROLE`: how many tests of this role were begun."""


class StoredServing(msgspec.Struct, frozen=True):
    """scope: `calibration.scope`. selected: scope -> version and window of what serves."""

    scope: str
    pinned: bool
    selected: dict[str, tuple[str, int]]

    @classmethod
    def decode(cls, text: str | None) -> StoredServing:
        """Nothing serves where `text` is missing or damaged."""
        try:
            return msgspec.json.decode(text or "", type=cls)
        except msgspec.DecodeError as error:
            if text:
                log.error("the stored serving profiles cannot be read, identity serves: %s", error)
            return cls("pooled", False, {})

    def versions(self) -> set[str]:
        return {version for version, _ in self.selected.values()}


def stored_mode(states: Mapping[str, str | None], configured: str) -> str | None:
    """The mode that was set at run time; None where there is none, or the configured one has changed since."""
    before, _, mode = (states.get(MODE_KEY) or "").partition(" ")
    return mode if before == configured and mode in MODES else None


def stored_test_counts(states: Mapping[str, str | None]) -> dict[Role, int]:
    return {role: whole_number(states.get(f"tests.{role}")) for role in Role}


def whole_number(text: str | None) -> int:
    """0 where it is none."""
    return int(text) if text and text.isdecimal() else 0


class StateWriter:
    """Writes to the store what `restoring` reads. configured_mode: `calibration.mode`."""

    def __init__(self, writes: StoreWrites, serving: ServingState, configured_mode: str) -> None:
        self._writes = writes
        self._serving = serving
        self._configured_mode = configured_mode

    def write_serving(self) -> None:
        scopes = self._serving.scopes
        selected = {name: (s.selected, s.window) for name, s in scopes.items() if s.selected is not None}
        stored = StoredServing(scopes.kind, self._serving.pinned, selected)
        self._writes.set_state(SERVING_KEY, msgspec.json.encode(stored).decode())

    def write_mode(self) -> None:
        self._writes.set_state(MODE_KEY, f"{self._configured_mode} {self._serving.mode}")

    def write_tests_begun(self, role: Role, number: int) -> None:
        self._writes.raise_state(f"tests.{role}", number)

    def put_profile(self, profile: StoredProfile) -> None:
        self._writes.put_profile(profile)

    def delete_profile(self, version: str) -> None:
        self._writes.delete_profile(version)
