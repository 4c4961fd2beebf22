"""Keeps what temperature and bias have learned over restarts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from hemostat.control.model_identity import ModelIdentity
from hemostat.profiles.proposals import Proposals
from hemostat.store.protocol import BlobKey, StoreWrites
from hemostat_calibration.errors import InvalidArgumentError

log = logging.getLogger("hemostat.calibration")

BLOB_KEY = BlobKey("temperature_bias")
SAVE_SECONDS = 300.0
"""The time between two writes, while something is learned."""
MAX_UNSAVED_REQUESTS = 1000
"""The largest number of learning requests between two writes: so many are lost if the process dies."""
LOOK_SECONDS = 1.0
"""The time between two checks if a write is due."""


class LearnedState:
    """Lives in the control process's event loop. clock: monotonic seconds."""

    def __init__(
        self,
        proposals: Proposals,
        writes: StoreWrites,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proposals = proposals
        self._writes = writes
        self._clock = clock
        self._stored: bytes | None = None
        """The state that was restored, and is not used yet."""
        self._models: ModelIdentity | None = None
        self._about: ModelIdentity | None = None
        """The models that it was learned of, as far as they are known."""
        self._saved_at = clock()
        self._saved_requests = 0
        self._saved_proposed = 0

    @property
    def models(self) -> ModelIdentity | None:
        """None while they are not known."""
        return self._models

    def restore(self, stored: bytes | None) -> None:
        """Takes what an earlier run stored; it is used once the models are known."""
        self._stored = stored

    def set_models(self, models: ModelIdentity) -> None:
        """Takes the models once both are known, or more of them: learning goes on from what was learned of them, and
        what was learned of others is forgotten."""
        self._models = models
        self._note_models(models)
        self._use_stored()

    def _note_models(self, models: ModelIdentity) -> None:
        """Notes that what was learned is about these models. If they are others than before, it is forgotten."""
        if self._about is None or self._about.agrees_with(models):
            self._about = models.completed_by(self._about)
            return
        log.warning("temperature and bias are learned anew: the models have changed")
        self._proposals.forget_learned()
        self._about = models

    def _use_stored(self) -> None:
        stored, models = self._stored, self._models
        if models is None:
            return
        self._stored = None
        if stored is not None:
            try:
                weights = self._proposals.restore(stored, models.without_weights.to_json())
            except InvalidArgumentError as error:
                log.warning("temperature and bias are learned anew: %s", error)
            else:
                self._about = replace(models, weights=weights or models.weights)
                self._note_models(models)
        self._saved_requests, self._saved_proposed = self._proposals.learned()[0], self._proposals.proposed

    async def save(self) -> None:
        """Queues a write if something was learned since the last one."""
        requests = self._proposals.learned()[0]
        if self._models is None or requests == self._saved_requests:
            return
        self._saved_requests, self._saved_proposed = requests, self._proposals.proposed
        self._saved_at = self._clock()
        about = self._about or self._models
        data = await asyncio.to_thread(self._proposals.export(about.without_weights.to_json(), about.weights))
        self._writes.put_blob(BLOB_KEY, data)

    async def save_if_due(self) -> None:
        """Saves what was learned if that is due, soon after a proposal, too: the next process must not make it
        again."""
        unsaved = self._proposals.learned()[0] - self._saved_requests
        proposed = self._proposals.proposed != self._saved_proposed
        if proposed or unsaved >= MAX_UNSAVED_REQUESTS or self._clock() - self._saved_at >= SAVE_SECONDS:
            await self.save()

    async def run(self) -> None:
        """Writes whenever it is due, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.save_if_due()
