"""What all replicas of a deployment have measured, by each of them and together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from hemostat.ipc.backoff import Backoff
from hemostat.measurement.figures import KL_CAP
from hemostat.measurement.gains import interval
from hemostat.store.protocol import SharedStore, StoreFailure
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.confidence import MeanSequence

PUBLISH_SECONDS = 2.0
EXPIRE_SECONDS = 15.0
"""After this time a replica that says nothing is not shown any more."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)


class ReplicaReport(msgspec.Struct, frozen=True):
    """What a replica says of itself.

    at: Unix time, seconds. scored, tokens: requests and tokens since it started. kl: `kl_nats_estimate` of them.
    """

    at: float
    leads: bool
    scored: int
    tokens: int
    kl: MeanSequence


class Deployment:
    """Lives in the control process's event loop.

    own: of this replica, now. on_failure: called with every failure of the store. wall: Unix time.
    """

    def __init__(
        self,
        store: SharedStore,
        own: Callable[[], ReplicaReport],
        on_failure: Callable[[StoreFailure], None],
        wall: Callable[[], float],
    ) -> None:
        self._store = store
        self._own = own
        self._on_failure = on_failure
        self._wall = wall
        self._reports: dict[str, ReplicaReport] = {}
        """Of the others."""

    async def run(self) -> None:
        """Until cancelled."""
        backoff = Backoff(RETRY_SECONDS)
        while True:
            pause = PUBLISH_SECONDS
            try:
                await self.exchange()
                backoff.reset()
            except StoreFailure as failure:
                self._on_failure(failure)
                pause = backoff.pause()
            await asyncio.sleep(pause)

    async def exchange(self) -> None:
        """Say what this replica has measured, and read what the others say. StoreFailure."""
        own = msgspec.json.encode(self._own()).decode()
        await asyncio.to_thread(self._store.publish, own, EXPIRE_SECONDS)
        found = await asyncio.to_thread(self._store.published)
        read = {name: _decoded(text) for name, text in found.items() if name != self._store.replica}
        self._reports = {name: report for name, report in read.items() if report is not None}

    def status(self) -> dict[str, Any]:
        """JSON-ready."""
        now = self._wall()
        recent = {n: report for n, report in self._reports.items() if now - report.at < 2.0 * EXPIRE_SECONDS}
        reports = {self._store.replica: self._own(), **recent}
        total = MeanSequence()
        for report in reports.values():
            total = total.merge(report.kl)
        return {
            "scored": sum(report.scored for report in reports.values()),
            "tokens_scored": sum(report.tokens for report in reports.values()),
            "kl_nats_estimate": interval(total, 0.0, KL_CAP),
            "replicas": [
                {
                    "replica": name,
                    "leads": report.leads,
                    "age_seconds": max(0.0, now - report.at),
                    "scored": report.scored,
                    "tokens_scored": report.tokens,
                    "kl_nats_estimate": interval(report.kl, 0.0, KL_CAP),
                }
                for name, report in sorted(reports.items())
            ],
        }


def _decoded(text: str) -> ReplicaReport | None:
    """None where another version of Hemostat wrote it."""
    try:
        return msgspec.json.decode(text, type=ReplicaReport)
    except (msgspec.DecodeError, InvalidArgumentError):
        return None
