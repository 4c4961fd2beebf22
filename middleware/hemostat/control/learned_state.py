"""What temperature and bias have learned, over restarts: read at the start, written by the replica that leads."""

from __future__ import annotations

import asyncio
import logging

from hemostat.profiles.proposals import Proposals
from hemostat.store.errors import StoreErrorLog
from hemostat.store.lease import Lease
from hemostat.store.protocol import Store, StoreFailure, StoreWrites
from hemostat_calibration.errors import InvalidArgumentError

log = logging.getLogger("hemostat.calibration")

BLOB_KEY = "temperature_bias"
SAVE_SECONDS = 300.0
"""Between two writes, while something is learned."""


class LearnedState:
    """Lives in the control process's event loop. writes: of the leader."""

    def __init__(
        self, proposals: Proposals, store: Store, writes: StoreWrites, errors: StoreErrorLog, lease: Lease
    ) -> None:
        self._proposals = proposals
        self._store = store
        self._writes = writes
        self._errors = errors
        self._lease = lease
        self._stored: bytes | None = None
        """Read at the start, and not used yet."""
        self._models: str | None = None
        self._saved_requests = 0

    async def read(self) -> None:
        """At the start. A store that fails is counted."""
        try:
            self._stored = await asyncio.to_thread(self._store.get_blob, BLOB_KEY)
        except StoreFailure as failure:
            self._errors.record(failure)

    def set_models(self, models: str) -> None:
        """Both models are known (`stored_state.model_identity`): go on from what was learned of them."""
        self._models = models
        stored, self._stored = self._stored, None
        if stored is None:
            return
        try:
            self._proposals.restore(stored, models)
        except InvalidArgumentError as error:
            log.warning("temperature and bias are learned anew: %s", error)
        self._saved_requests = self._proposals.learned()[0]

    async def save(self) -> None:
        """Queue a write, where something was learned since the last one."""
        requests = self._proposals.learned()[0]
        if self._models is None or requests == self._saved_requests or not self._lease.leads:
            return
        self._saved_requests = requests
        self._writes.put_blob(BLOB_KEY, await asyncio.to_thread(self._proposals.export(self._models)))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await self.save()
