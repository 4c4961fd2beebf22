"""Records that wait to be sent to the learner process, bounded by their bytes."""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from hemostat_calibration.records import TokenRecord

MAX_QUEUED_BYTES = 128 * 1024 * 1024
"""The largest size of the records that wait; further records are dropped."""
MAX_BATCH_BYTES = 16 * 1024 * 1024
"""The size of the records that are sent at a time, about; as messages they have half of it."""


class DropReason(StrEnum):
    """The reason why a record was not sent to the learner: keys of `dropped` in its status."""

    NOT_READY = "not_ready"
    """It is starting, or has ended."""
    NOTHING_TO_LEARN = "nothing_to_learn"
    """The record has neither features nor hidden states."""
    BUSY = "busy"
    """The queue is full."""


class RecordQueue:
    """Owns the records that wait. They become messages when they are sent, away from the event loop."""

    def __init__(self) -> None:
        self._records: deque[TokenRecord] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._records)

    @property
    def less_than_half_full(self) -> bool:
        return self._bytes < MAX_QUEUED_BYTES // 2

    def offer(self, record: TokenRecord) -> DropReason | None:
        """Queues a record; returns the reason if it was dropped instead."""
        if record.features is None and record.reference_hidden is None:
            return DropReason.NOTHING_TO_LEARN
        if self._bytes > MAX_QUEUED_BYTES:
            return DropReason.BUSY
        self._records.append(record)
        self._bytes += _held_bytes(record)
        return None

    def take_batch(self) -> list[TokenRecord]:
        """Removes and returns the oldest records, about `MAX_BATCH_BYTES` of them."""
        batch: list[TokenRecord] = []
        size = 0
        while self._records and size < MAX_BATCH_BYTES:
            batch.append(self._records.popleft())
            size += _held_bytes(batch[-1])
        self._bytes -= size
        return batch

    def clear(self) -> None:
        self._records.clear()
        self._bytes = 0


def _held_bytes(record: TokenRecord) -> int:
    """Returns the size of those arrays of a record that the learner is sent, which are nearly all of it."""
    lists = record.compressed, record.reference
    size = record.reference_at.nbytes + sum(each.ids.nbytes + each.logprobs.nbytes for each in lists)
    if record.features is not None:
        size += record.features.values.nbytes
    if record.reference_hidden is not None:
        size += record.reference_hidden.nbytes
    return size
