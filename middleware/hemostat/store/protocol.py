"""What every store can do, and how it fails.

    StoreFailure            a read or write failed
    ├── StoreUnreachable    the server does not answer; a later attempt may succeed
    ├── StoreAccessDenied   wrong user or password; retrying does not help
    ├── StoreIncompatible   another version of hemostat wrote it; retrying does not help
    ├── ExclusionLost       another process may own the store by now; nothing was written, or it is not known
    └── StoreConflict       somebody else has written, or the file was replaced; nothing was written

A store raises StoreFailure and nothing else. The control process counts the failure and continues with what it holds in
memory: the store is never needed to serve a request.

Two middlewares may share one SQLite file, but they do not coordinate. Profiles (named by their digest) and events of
both are kept. For the states (what serves, the mode) the last write wins, and the next process that starts reads it.
Each middleware tests profiles on its own, with an alpha of its own; after a restart the larger number of tests counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from hemostat_calibration.errors import HemostatError

MAX_EVENTS = 10_000
"""Events that a store keeps; older ones are deleted."""
MAX_BLOB_BYTES = 512 * 1024 * 1024
VERIFY_SECONDS = 2.0
"""Between two looks of the owner whether it still owns the store."""
SCHEMA = 1
"""The version of what a store holds, written with every commit."""


class StoreFailure(HemostatError):
    """The store could not be read or written."""


class NotKeptError(HemostatError):
    """What an operator did applies now, and the store has not kept it."""


def require_schema(stored: int, store: str) -> None:
    """StoreIncompatible where this version cannot use what another one has stored. store: how messages name it."""
    if stored != SCHEMA:
        age = "a newer" if stored > SCHEMA else "an older"
        raise StoreIncompatible(
            f"store {store}: it has schema {stored}, written by {age} hemostat; this one knows schema {SCHEMA}: "
            "install the version that wrote it, or name another store in store.url"
        )


class StoreUnreachable(StoreFailure):
    """The server does not answer; a later attempt may succeed."""


class StoreAccessDenied(StoreFailure):
    """The server refuses the user or the password: the configuration is wrong, and retrying does not help."""


class StoreIncompatible(StoreFailure):
    """Another version of hemostat wrote the store: this one neither reads nor changes it."""


class ExclusionLost(StoreFailure):
    """Whether this process still owns the store is not known: its session with the server has ended, for example.
    `acquire` has to succeed again, and the head has to be its own, before it goes on."""


class StoreConflict(StoreFailure):
    """Somebody else has written, or the file was replaced; nothing was written. What this process holds in memory may
    not be what is stored."""


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """One profile as a store keeps it."""

    version: str
    data: bytes
    """safetensors"""
    created: float
    """When it was first stored, Unix seconds."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last commit of a store. A store in which nothing was ever written has revision 0, and no commit."""

    revision: int = 0
    commit_id: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a store holds, as one transaction has read it: what is not in here is not stored."""

    head: Head = Head()
    states: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[dict[str, Any]] = field(default_factory=list)
    """Newest first."""
    profiles: Sequence[StoredProfile] = field(default_factory=list)
    """Newest first."""
    blobs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PutProfile:
    profile: StoredProfile


@dataclass(frozen=True, slots=True)
class DeleteProfile:
    version: str


@dataclass(frozen=True, slots=True)
class AppendEvent:
    """Beyond `MAX_EVENTS` the oldest events are deleted."""

    event: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SetState:
    key: str
    value: str | None
    """None deletes it."""


@dataclass(frozen=True, slots=True)
class PutBlob:
    key: str
    data: bytes


Write: TypeAlias = PutProfile | DeleteProfile | AppendEvent | SetState | PutBlob


class ExclusiveStore(Protocol):
    """What one process owns, reads once as a whole, and then only writes. Synchronous: call it in a thread, never on
    the event loop; one call at a time. Every method but `close` may raise StoreFailure.
    """

    def acquire(self) -> bool:
        """Own the store until the process ends, unless another process does: False. Once more: nothing changes, or,
        after ExclusionLost, it is owned again."""

    def verify(self) -> None:
        """Called every `VERIFY_SECONDS` by the owner. ExclusionLost, StoreConflict where the file was replaced."""

    def read(self) -> Snapshot:
        """Also without owning it. StoreIncompatible where another version has written it."""

    def head(self) -> Head:
        """As `read`."""

    def commit(self, writes: Sequence[Write], expected: int, commit_id: str) -> int:
        """Execute all writes in one transaction, as revision `expected` + 1, which is returned.

        Where that revision is stored under this `commit_id`, it has happened before, and nothing is written: so a
        commit whose outcome is not known is repeated until its outcome is known. Any other revision: StoreConflict.
        Not the owner: ExclusionLost. The schema is written with it, which `read` requires.
        """

    def close(self) -> None:
        """Another process can own it now."""


class StoreWrites(Protocol):
    """What may be written. A `Store` writes at once; `StoreWriter` queues the write."""

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
