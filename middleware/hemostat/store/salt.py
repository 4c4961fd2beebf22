"""The secret with which conversations, clients, arms and the split are hashed: made once, and kept in the store.

Whoever knows the salt can compute which side of the split and which arm a conversation falls on, and so choose what is
learned from and what is judged.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from hemostat.ipc.backoff import Backoff
from hemostat.store.errors import StoreErrorLog
from hemostat.store.protocol import Store, StoreFailure

log = logging.getLogger("hemostat.store")

SALT_KEY = "salt"
"""Of the store's state: `SALT_BYTES` random bytes, in hexadecimal digits."""
SALT_BYTES = 32
RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0)
"""Longest pauses between attempts while the store does not answer."""
CHECK_SECONDS = 60.0
"""Between two looks at the store after that: it may have lost its data, and then gets this salt again."""


class Salt:
    """Lives in the control process's event loop.

    Begins with a random salt of its own. The store gets it where it has none; otherwise the store's replaces it. While
    the store does not answer, the own one is used: conversations that were hashed with it count as new afterwards.

    value: the one in force, `SALT_BYTES` bytes. on_change: called when it was replaced.
    """

    def __init__(
        self, store: Store, errors: StoreErrorLog, on_change: Callable[[], None], value: bytes | None = None
    ) -> None:
        self._store = store
        self._errors = errors
        self._on_change = on_change
        self._in_use = False
        """Relays may have got the value."""
        self.value = secrets.token_bytes(SALT_BYTES) if value is None else value

    async def synchronize(self) -> bool:
        """Agree with the store about the salt; False where it did not answer, which is counted."""
        try:
            held = await asyncio.to_thread(self._store.add_state, SALT_KEY, self.value.hex())
            stored = _decoded(held)
            if stored is None:
                log.error("the stored salt is damaged; a new one replaces it: all conversations count as new")
                await asyncio.to_thread(self._store.set_state, SALT_KEY, self.value.hex())
        except StoreFailure as failure:
            self._errors.record(failure)
            self._in_use = True
            return False
        if stored is not None and stored != self.value:
            if self._in_use:
                log.warning("the store's salt is used from now on: conversations of before count as new")
            self.value = stored
            self._on_change()
        self._in_use = True
        return True

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(RETRY_SECONDS)
        while True:
            if await self.synchronize():
                backoff.reset()
                await asyncio.sleep(CHECK_SECONDS)
            else:
                await asyncio.sleep(backoff.pause())


def _decoded(text: str) -> bytes | None:
    try:
        value = bytes.fromhex(text)
    except ValueError:
        return None
    return value if len(value) == SALT_BYTES else None
