"""A store whose calls fail as those of a real one can: not executed, executed without an answer, late, or twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TypeVar

from hemostat.store.protocol import ExclusionLost, Head, Snapshot, Store, StoreFailure, Write

T = TypeVar("T")


class Fault(StrEnum):
    NONE = "none"
    BEFORE = "it is not executed, and fails"
    AFTER = "it is executed, and the answer is lost"
    TWICE = "it is executed twice"
    LATE = "it fails, and is executed later"
    LOST = "it is not executed, and the session is lost"


class FaultyStore:
    """Implements `protocol.Store` over a real one. faults: of the next calls; without one a call succeeds."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.faults: list[Fault] = []
        self.late: list[tuple[str, Callable[[], object]]] = []
        """Calls that were made, with their names, and are executed by `execute_late`."""
        self.calls: list[str] = []

    def _call(self, name: str, call: Callable[[], T]) -> T:
        self.calls.append(name)
        fault = self.faults.pop(0) if self.faults else Fault.NONE
        match fault:
            case Fault.BEFORE:
                raise StoreFailure("store: it does not answer")
            case Fault.AFTER:
                call()
                raise StoreFailure("store: the answer was lost")
            case Fault.TWICE:
                call()
            case Fault.LATE:
                self.late.append((name, call))
                raise StoreFailure("store: it did not answer in time")
            case Fault.LOST:
                raise ExclusionLost("store: the session has ended")
            case _:
                pass
        return call()

    def execute_late(self) -> None:
        """What a call says that nobody waits for any more is lost."""
        late, self.late = self.late, []
        for _, call in late:
            try:
                call()
            except StoreFailure:
                continue

    @property
    def owned_until(self) -> float:
        return self.store.owned_until

    def acquire(self) -> bool:
        return self._call("acquire", self.store.acquire)

    def verify(self) -> None:
        self._call("verify", self.store.verify)

    def read(self) -> Snapshot:
        return self._call("read", self.store.read)

    def head(self) -> Head:
        return self._call("head", self.store.head)

    def commit(self, writes: Sequence[Write], expected: int, commit_id: str) -> int:
        return self._call("commit", lambda: self.store.commit(writes, expected, commit_id))

    def close(self) -> None:
        """Also what its process or session has not acquired yet, it never will."""
        self.late = [(name, call) for name, call in self.late if name == "commit"]
        self.store.close()
