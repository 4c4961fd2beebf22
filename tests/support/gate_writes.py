"""The writes of a live gate to a store in memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from hemostat.store.protocol import BlobKey


@dataclass
class Writes:
    """The writes to a store. away: the store does not answer."""

    blobs: dict[BlobKey, bytes] = field(default_factory=dict)
    away: bool = False
    number: int = 0
    written: int = 0

    def put_blob(self, key: BlobKey, data: bytes) -> None:
        self.number += 1
        if not self.away:
            self.blobs[key] = data
            self.written = self.number

    def queued(self) -> int:
        return self.number

    def has_written(self, write: int) -> bool:
        return self.written >= write


@dataclass
class OwnersWrites(Writes):
    """The writes of one process to a store that takes its owner's writes only. store: the writes of all processes."""

    store: Writes = field(default_factory=Writes)
    owns: bool = True

    def put_blob(self, key: BlobKey, data: bytes) -> None:
        self.away = self.store.away or not self.owns
        super().put_blob(key, data)
        if not self.away:
            self.store.blobs[key] = data
