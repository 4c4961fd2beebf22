"""The learner's statistics in the store: read when a learner starts, written while it learns."""

from __future__ import annotations

import asyncio

from hemostat.store.errors import StoreErrorLog
from hemostat.store.protocol import Store, StoreFailure, StoreWrites

BLOB_KEY = "learner"
PREFIX = b"weights "
"""Of what was learned of weights that are known. No safetensors file begins so: its header would be too long."""


class StoredLearning:
    def __init__(self, store: Store, writes: StoreWrites, errors: StoreErrorLog) -> None:
        self._store = store
        self._writes = writes
        self._errors = errors

    async def load(self) -> tuple[str, bytes]:
        """The weights that it is of, and what was stored last, b"" where there is none or the store fails, which is
        counted."""
        try:
            stored = await asyncio.to_thread(self._store.get_blob, BLOB_KEY)
        except StoreFailure as failure:
            self._errors.record(failure)
            return "", b""
        return split_weights(stored or b"")

    async def save(self, weights: str, parts: list[bytes]) -> None:
        """Queue a write. weights: fingerprint of the compressed model's, "" where it is not known."""
        head = [PREFIX + weights.encode() + b"\n"] if weights else []
        self._writes.put_blob(BLOB_KEY, await asyncio.to_thread(b"".join, [*head, *parts]))


def split_weights(stored: bytes) -> tuple[str, bytes]:
    """A stored blob's weights, "" where it names none, and what was learned of them.

    >>> split_weights(b"weights 1f\\nlearned"), split_weights(b"learned")
    (('1f', b'learned'), ('', b'learned'))
    """
    if not stored.startswith(PREFIX):
        return "", stored
    head, _, learned = stored.partition(b"\n")
    return head.removeprefix(PREFIX).decode(errors="replace"), learned
