"""The interface of every store, and how it fails.

A store is owned by one control process at a time. It is read once, as a whole, when a process becomes its owner, and is
only written from then on: every commit is one transaction, and names the one that it follows.

    StoreFailure            whether the call was executed is not known, unless it is one of these
    ├── StoreUnreachable    the server does not answer; a later attempt may succeed
    ├── StoreAccessDenied   wrong user or password; retrying does not help
    ├── StoreIncompatible   another version of hemostat wrote it; retrying does not help
    ├── ExclusionLost       another process may own the store by now
    └── StoreConflict       another process has written, or the file was replaced; nothing was written

A store raises StoreFailure and nothing else. A read that fails says nothing about what is stored. The store is never
needed to serve a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType, Protocol, TypeAlias

from hemostat_calibration.errors import HemostatError

StateKey = NewType("StateKey", str)
"""The key of a state: a text of some 100 kB at most, such as `state_codec` writes. Each is declared once, by its owner.
"""
BlobKey = NewType("BlobKey", str)
"""The key of a blob: bytes, which may be as many as `MAX_BLOB_BYTES`. Each is declared once, by its owner."""
MAX_EVENTS = 10_000
"""The largest number of events that a store keeps; older ones are deleted."""
MAX_BLOB_BYTES = 512 * 1024 * 1024
VERIFY_SECONDS = 2.0
"""The time between two checks of the owner that it still owns the store."""
SCHEMA = 2
"""The version of what a store holds, written with every commit."""
OLDEST_SCHEMA = 1
"""The oldest schema that is read; it is taken along by `schema_1`."""


class StoreFailure(HemostatError):
    """The store could not be read or written, or it is not known whether it was written."""


def has_happened(head: Head, expected: int, commit_id: str, store: str) -> bool:
    """Returns True if the commit is stored already, as `Store.commit` says. Raises StoreConflict if another process has
    written.
    """
    if head == Head(expected + 1, commit_id):
        return True
    if head.revision != expected:
        raise StoreConflict(f"store {store}: revision {head.revision}, not {expected}: it was changed")
    return False


class StoreUnreachable(StoreFailure):
    """The server does not answer; a later attempt may succeed."""


class StoreAccessDenied(StoreFailure):
    """The server refuses the user or the password: the configuration is wrong, and retrying does not help."""


class StoreIncompatible(StoreFailure):
    """Another version of hemostat wrote the store: this one neither reads nor changes it."""


class ExclusionLost(StoreFailure):
    """It is not known if this process still owns the store: its session with the server has ended, for example. Before
    it goes on, `acquire` has to succeed again, and the head has to be its own.
    """


class StoreConflict(StoreFailure):
    """Another process has written, or the file was replaced; nothing was written. What this process holds in memory may
    not be what is stored."""


class NotActiveError(HemostatError):
    """Another control process owns the store, or this one does not know yet what it holds; that one is to be asked."""


class NotKeptError(HemostatError):
    """The action of an operator applies now, and the store has not kept it."""


def require_schema(stored: int, store: str) -> None:
    """Raises StoreIncompatible if this version cannot use what another one has stored. store: how messages name it."""
    if not OLDEST_SCHEMA <= stored <= SCHEMA:
        age = "a newer" if stored > SCHEMA else "an older"
        raise StoreIncompatible(
            f"store {store}: it has schema {stored}, written by {age} hemostat; this one knows schema {SCHEMA}: "
            "install the version that wrote it, or name another store in store.url"
        )


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """One profile as a store keeps it."""

    version: str
    data: bytes
    """The profile as safetensors."""
    created: float
    """The time at which it was first stored, Unix seconds."""


@dataclass(frozen=True, slots=True)
class Head:
    """The last commit of a store. A store in which nothing was ever written has revision 0, and no commit."""

    revision: int = 0
    commit_id: str = ""
    schema: int = field(default=SCHEMA, compare=False)
    """The schema in which that commit has left the store."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a store holds, as one transaction has read it: what is not in here is not stored."""

    head: Head = Head()
    states: Mapping[StateKey, str] = field(default_factory=dict)
    events: Sequence[dict[str, Any]] = field(default_factory=list)
    """All events, newest first."""
    profiles: Sequence[StoredProfile] = field(default_factory=list)
    """All profiles, newest first."""
    blobs: Mapping[BlobKey, bytes] = field(default_factory=dict)


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
    key: StateKey
    value: str | None
    """The value; None deletes it."""


@dataclass(frozen=True, slots=True)
class PutBlob:
    key: BlobKey
    data: bytes


Write: TypeAlias = PutProfile | DeleteProfile | AppendEvent | SetState | PutBlob


class Store(Protocol):
    """The interface of a store. Its methods are small and synchronous: call them in a thread, never on the event loop.
    Every method but `close` may raise StoreFailure.
    """

    @property
    def owned_until(self) -> float:
        """The time (`time.monotonic`) until which no other process owns the store, without another call; math.inf: as
        long as this process lives. It never blocks, and may be read on the event loop."""

    def acquire(self) -> bool:
        """Owns the store from now until the process ends. Returns False if another process owns it. If it is called
        once more, nothing changes, or, after ExclusionLost, the store is owned again."""

    def verify(self) -> None:
        """Verifies that this process still owns the store; the owner calls it every `VERIFY_SECONDS`. Raises
        ExclusionLost, or StoreConflict if the file was replaced.
        """

    def read(self) -> Snapshot:
        """Returns all that is stored; this does not need ownership. Raises StoreIncompatible if another version has
        written it.
        """

    def head(self) -> Head:
        """Returns the head; this does not need ownership, as for `read`."""

    def commit(self, writes: Sequence[Write], expected: int, commit_id: str) -> int:
        """Executes all writes in one transaction, as revision `expected` + 1, which is returned.

        If that revision is stored under this `commit_id`, it has happened before, and nothing is written: so a
        commit whose outcome is not known is repeated until it is known. Raises StoreConflict at any other revision, and
        ExclusionLost if this process is not the owner. The schema is written with it, which `read` requires.
        """

    def close(self) -> None:
        """Closes the store: another process can own it now."""


def alarm_event(at: float, why: str, evidence: dict[str, Any]) -> dict[str, Any]:
    """Returns the stored form of an event of an alarm. at: Unix time."""
    return {"at": at, "decision": "alarm", "version": "", "why": why, "evidence": evidence}


class StoreWrites(Protocol):
    """The writes to the store: each call queues one. `StoreWriter` implements it."""

    def put_profile(self, profile: StoredProfile) -> None: ...

    def delete_profile(self, version: str) -> None: ...

    def append_event(self, event: dict[str, Any]) -> None: ...

    def set_state(self, key: StateKey, value: str | None) -> None:
        """Sets a state; None deletes it."""

    def put_blob(self, key: BlobKey, data: bytes) -> None:
        """Keeps up to `MAX_BLOB_BYTES` under a name, in place of what it held."""

    def queued(self) -> int:
        """Returns the number of the write that was queued last."""

    def has_written(self, write: int) -> bool:
        """Returns True if the write with this number, and all before it, are stored: a restart finds them."""
