"""What every store can do, and how it fails.

    StoreFailure            a read or write failed
    ├── StoreUnreachable    the server does not answer; a later attempt may succeed
    ├── StoreAccessDenied   wrong user or password; retrying does not help
    ├── StoreIncompatible   a newer version of hemostat wrote it; retrying does not help
    └── LeaseLost           a write as the leader was refused, because another replica has led since

A store raises StoreFailure and nothing else. The control process counts the failure and continues with what it holds in
memory: the store is never needed to serve a request.

Two middlewares may share one SQLite file, but they do not coordinate. Profiles (named by their digest) and events of
both are kept. For the states (what serves, the mode) the last write wins, and the next process that starts reads it.
Each middleware tests profiles on its own, with an alpha of its own; after a restart the larger number of tests counts.
Replicas that do coordinate share a Valkey server, see `replica`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile

MAX_EVENTS = 10_000
"""Events that a store keeps; older ones are deleted."""
MAX_BLOB_BYTES = 512 * 1024 * 1024


class StoreFailure(HemostatError):
    """The store could not be read or written."""


class StoreUnreachable(StoreFailure):
    """The server does not answer; a later attempt may succeed."""


class StoreAccessDenied(StoreFailure):
    """The server refuses the user or the password: the configuration is wrong, and retrying does not help."""


class StoreIncompatible(StoreFailure):
    """A newer version of hemostat wrote the store: this one neither reads nor changes it."""


class LeaseLost(StoreFailure):
    """A write as the leader was refused, because another replica has led since; nothing was written."""


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """One profile as a store keeps it."""

    version: str
    data: bytes
    """safetensors"""
    created: float
    """When it was first stored, Unix seconds."""
    read: CalibrationProfile | None = None
    """What `data` holds, where it was decoded already."""


class StoreWrites(Protocol):
    """What may be written. A `Store` writes at once; the views of `StoreWriter` queue the write."""

    def put_profile(self, profile: StoredProfile) -> None: ...

    def delete_profile(self, version: str) -> None:
        """Does nothing while any state names the version: it serves, here or in another process with the same store."""

    def append_event(self, event: dict[str, Any]) -> None: ...

    def set_state(self, key: str, value: str | None) -> None:
        """None deletes it."""

    def raise_state(self, key: str, value: int) -> None:
        """Set a number that only grows: a larger one that another process has stored stays."""

    def put_blob(self, key: str, data: bytes) -> None:
        """Keep up to `MAX_BLOB_BYTES` under a name, in place of what it held. Interrupted, it leaves the old ones."""


class Store(StoreWrites, Protocol):
    """Small and synchronous: call it in a thread, never on the event loop. Every method may raise StoreFailure."""

    def get_profile(self, version: str) -> StoredProfile | None: ...

    def profiles(self) -> list[StoredProfile]:
        """Newest first."""

    def events(self, limit: int) -> list[dict[str, Any]]:
        """Newest first."""

    def get_state(self, key: str) -> str | None: ...

    def get_blob(self, key: str) -> bytes | None:
        """None where there is none."""

    def add_state(self, key: str, value: str) -> str:
        """Set a state unless it has a value, in one step. Returns the value that it has now, whoever set it."""

    def close(self) -> None: ...
