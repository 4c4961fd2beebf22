"""The learner's statistics in the store: read when a learner starts, written by the replica that leads."""

from __future__ import annotations

import asyncio

from hemostat.store.errors import StoreErrorLog
from hemostat.store.lease import Lease
from hemostat.store.protocol import Store, StoreFailure, StoreWrites

BLOB_KEY = "learner"


class StoredLearning:
    """writes: of the leader."""

    def __init__(self, store: Store, writes: StoreWrites, errors: StoreErrorLog, lease: Lease) -> None:
        self._store = store
        self._writes = writes
        self._errors = errors
        self._lease = lease

    @property
    def wanted(self) -> bool:
        """This replica would write now."""
        return self._lease.leads

    async def load(self) -> bytes:
        """What was stored last; b"" where there is none, or the store does not answer, which is counted."""
        try:
            return await asyncio.to_thread(self._store.get_blob, BLOB_KEY) or b""
        except StoreFailure as failure:
            self._errors.record(failure)
            return b""

    async def save(self, parts: list[bytes]) -> None:
        """Queue a write."""
        self._writes.put_blob(BLOB_KEY, await asyncio.to_thread(b"".join, parts))
