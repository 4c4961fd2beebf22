"""The clusters of alike prompts (`hemostat_calibration.statistics.templates`), over restarts.

What is stored are keyed hashes, whose key is the store's salt; no token ids.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from hemostat.store.protocol import BlobKey, StoreWrites
from hemostat_calibration.arrays import Ids
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.templates import TemplateTable

log = logging.getLogger("hemostat.calibration")

BLOB_KEY = BlobKey("templates")
SAVE_SECONDS = 300.0
"""The time between two writes, while requests are scored."""


class PromptTemplates:
    """The clusters of alike prompts, over restarts. They live in the control process's event loop. clock: monotonic
    seconds."""

    def __init__(self, writes: StoreWrites, clock: Callable[[], float]) -> None:
        self._table = TemplateTable(secrets.token_bytes(32))
        self._writes = writes
        self._clock = clock
        self._saved_at = clock()
        self._changed = False

    def assign(self, prompt: Ids, conversation: bytes) -> bytes:
        """See `TemplateTable.assign`."""
        self._changed = True
        return self._table.assign(prompt, conversation)

    def restore(self, stored: bytes | None, salt: bytes) -> None:
        """Goes on from what an earlier run stored under this salt."""
        self._table = TemplateTable(salt)
        if stored is None:
            return
        try:
            self._table = TemplateTable.load(stored, salt)
        except InvalidArgumentError as error:
            log.error("stored templates of prompts: %s; they are found anew", error)

    def save(self) -> None:
        """Queues a write if something has changed."""
        if self._changed:
            self._changed, self._saved_at = False, self._clock()
            self._writes.put_blob(BLOB_KEY, self._table.save())

    def save_if_due(self) -> None:
        if self._clock() - self._saved_at >= SAVE_SECONDS:
            self.save()
