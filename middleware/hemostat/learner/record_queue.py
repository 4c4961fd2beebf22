"""Records that wait to be sent to the learner process, bounded by their bytes."""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from hemostat.learner import learner_messages
from hemostat_calibration.records import TokenRecord

MAX_QUEUED_BYTES = 64 * 1024 * 1024
"""The largest size of the records that wait; further records are dropped."""
MAX_BATCH_BYTES = 8 * 1024 * 1024


class DropReason(StrEnum):
    """The reason why a record was not sent to the learner: keys of `dropped` in its status."""

    NOT_READY = "not_ready"
    """It is starting, or has ended."""
    NOTHING_TO_LEARN = "nothing_to_learn"
    """The record has neither features nor hidden states."""
    BUSY = "busy"
    """The queue is full."""


class RecordQueue:
    def __init__(self) -> None:
        self._rows: deque[learner_messages.Row] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def less_than_half_full(self) -> bool:
        return self._bytes < MAX_QUEUED_BYTES // 2

    def offer(self, record: TokenRecord) -> DropReason | None:
        """Queues a record; returns the reason if it was dropped instead."""
        if record.features is None and record.reference_hidden is None:
            return DropReason.NOTHING_TO_LEARN
        if self._bytes > MAX_QUEUED_BYTES:
            return DropReason.BUSY
        row = learner_messages.to_row(record)
        self._rows.append(row)
        self._bytes += learner_messages.row_bytes([row])
        return None

    def take_batch(self) -> list[learner_messages.Row]:
        """Removes and returns the oldest rows, about `MAX_BATCH_BYTES` of them."""
        rows: list[learner_messages.Row] = []
        while self._rows and learner_messages.row_bytes(rows) < MAX_BATCH_BYTES:
            rows.append(self._rows.popleft())
        self._bytes -= learner_messages.row_bytes(rows)
        return rows

    def clear(self) -> None:
        self._rows.clear()
        self._bytes = 0
