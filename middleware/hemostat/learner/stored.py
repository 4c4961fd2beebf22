"""The learner's statistics in the store: used when a learner starts, written while it learns."""

from __future__ import annotations

import asyncio

from hemostat.store.protocol import BlobKey, StoreWrites

BLOB_KEY = BlobKey("learner")
PREFIX = b"weights "
"""The beginning of what was learned from weights that are known. No safetensors file begins so: its header would be too
long.
"""


class StoredLearning:
    """Owns what was stored last, from which the next learner process goes on."""

    def __init__(self, writes: StoreWrites) -> None:
        self._writes = writes
        self._stored = b""

    def restore(self, stored: bytes | None) -> None:
        """Takes what an earlier run stored."""
        self._stored = stored or b""

    def load(self) -> tuple[str, bytes]:
        """Returns the weights that the stored state was learned from, and the state that was stored last, b"" if there
        is none."""
        return split_weights(self._stored)

    async def save(self, weights: str, parts: list[bytes]) -> None:
        """Queues a write. weights: fingerprint of the compressed model's, "" if it is not known."""
        head = [PREFIX + weights.encode() + b"\n"] if weights else []
        self._stored = await asyncio.to_thread(b"".join, [*head, *parts])
        self._writes.put_blob(BLOB_KEY, self._stored)


def split_weights(stored: bytes) -> tuple[str, bytes]:
    """Returns a stored blob's weights, "" where it names none, and what was learned of them.

    >>> split_weights(b"weights 1f\\nlearned"), split_weights(b"learned")
    (('1f', b'learned'), ('', b'learned'))
    """
    if not stored.startswith(PREFIX):
        return "", stored
    head, _, learned = stored.partition(b"\n")
    return head.removeprefix(PREFIX).decode(errors="replace"), learned
