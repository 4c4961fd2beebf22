"""Several replicas that learn contextual profiles together: real learner processes, and a Valkey between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.control import settings
from tests.support.learner_world import D, V, children, make, save
from tests.support.replicas import MODELS, store_url
from tests.support.waiting import until

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.control.evidence import inbox, outbox
from hemostat.control.evidence.lane import Lane
from hemostat.learner import client
from hemostat.learner.client import LearningTarget
from hemostat.store import replica as replica_module
from hemostat.store import writer
from hemostat_calibration.learning.contextual.rows import FOLDS
from hemostat_calibration.learning.contextual.sharing import MIN_CONVERSATIONS
from hemostat_calibration.profiles import transform

TOKENS = 16
"""Of a request."""
MIN_TOKENS = 6000
UNSHARED = FOLDS * MIN_CONVERSATIONS * TOKENS
"""Tokens that a follower keeps at most, until 16 times as many were shared of each fold."""

SHORTER = (
    (replica_module, "LEASE_SECONDS", 2.0),
    (replica_module, "HEARTBEAT_SECONDS", 0.05),
    *((module, "RETRY_SECONDS", (0.05,)) for module in (replica_module, inbox, outbox, writer)),
    (outbox, "SEND_SECONDS", 0.05),
    (inbox, "TAKE_SECONDS", 0.05),
    (inbox, "REMOVE_SECONDS", 0.2),
    (client, "BACKOFF", (0.05, 0.1)),
    (client, "EXPORT_SECONDS", 0.5),
)
"""Shorter times than in production, so that a run takes seconds: module, name, value."""


class One:
    """A replica. Of its control process it has all that learning needs."""

    def __init__(self, made: Settings, folder: Path, checkpoint: Path) -> None:
        folder.mkdir(parents=True)
        self.control = Control(made, folder / "socket", 1234)
        self.target = LearningTarget("m", V, checkpoint, D, "digest")
        self.world = make()
        self.tasks: list[asyncio.Task[Any]] = []

    async def start(self) -> None:
        one = self.control
        assert one.replica is not None
        assert one.evidence is not None
        await one.start(None)
        one.profile_manager.set_model_pair("m", V)
        one.learned.set_models(MODELS)
        one.subject.update = lambda: None  # type: ignore[method-assign] # there is no reference
        one.learner.learn_about(self.target)
        running = [one.learner.run(), one.writer.run(), one.replica.run(), *one.evidence.loops()]
        self.tasks = [asyncio.create_task(loop) for loop in running]
        await until(lambda: one.learner.state == "learning", 30)

    def teach(self, seed: int) -> None:
        anchors = next(iter(self.control.learner.anchor_sets.values()))
        self.control.learner.offer(self.world.record(seed, anchors, transform.anchors_digest(anchors), TOKENS))

    @property
    def lane(self) -> Lane:
        assert self.control.evidence is not None
        return self.control.evidence.lanes[2]

    @property
    def tokens(self) -> int:
        return int(self.control.learner.status()["tokens"])

    @property
    def leads(self) -> bool:
        return self.control.lease.leads

    async def settle(self) -> None:
        """What was offered is learned, and what may be shared is in the store."""
        learner = self.control.learner
        await until(lambda: not learner._records and not learner._batch_pending and not learner._others, 30)
        await until(lambda: self.lane.outbox.waiting == 0, 30)

    async def die(self) -> None:
        """Nothing is sent or stored any more."""
        self.control.learner._storage = None
        self.control.writer.as_leader.put_blob = lambda *_: None  # type: ignore[method-assign]
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks = []

    async def close(self) -> None:
        if self.tasks:
            await self.die()
        await self.control.link.close()
        self.control.store.close()


class Deployment:
    def __init__(self, url: str, folder: Path, **calibration: Any) -> None:
        self.url, self.folder = url, folder
        self.checkpoint = save(make(), folder / "checkpoint")
        given: dict[str, Any] = {
            "mode": "observe",
            "anchors": 32,
            "rank": 8,
            "min_tokens": MIN_TOKENS,
            "clamp_nats": 5.0,
        }
        self.made = settings(store={"url": store_url(url, f"{folder}:")}, calibration=given | calibration)
        self.all: list[One] = []
        self.offered = 0
        """Tokens."""

    async def add(self) -> One:
        one = One(self.made, self.folder / f"replica-{len(self.all)}", self.checkpoint)
        self.all.append(one)
        await one.start()
        return one

    @property
    def leader(self) -> One:
        return next(one for one in self.all if one.leads and one.tasks)

    async def teach(self, ones: list[One], seeds: range) -> None:
        """In turns."""
        for n, seed in enumerate(seeds):
            ones[n % len(ones)].teach(seed)
            self.offered += TOKENS
        for one in ones:
            await one.settle()
        leader, sent = self.leader, sum(one.lane.outbox.sent for one in self.all)
        if leader.control.lease.term == 0:
            await until(lambda: leader.lane.applied == sent, 30)
        await leader.settle()


@asynccontextmanager
async def deployment(url: str, folder: Path, number: int, **calibration: Any) -> AsyncIterator[Deployment]:
    made = Deployment(url, folder, **calibration)
    try:
        for _ in range(number):
            await made.add()
        yield made
    finally:
        for one in made.all:
            await one.close()
        assert children() == []


async def requests_until_min_tokens(url: str, folder: Path, number: int) -> int:
    async with deployment(url, folder, number) as made:
        assert [one.leads for one in made.all] == [True, *[False] * (number - 1)]
        step = 10 * number
        for first in range(0, 10_000, step):
            await made.teach(made.all, range(first, first + step))
            assert made.offered - UNSHARED * (number - 1) <= made.leader.tokens <= made.offered
            assert made.leader.lane.outbox.sent == 0, "the leader has what it learns itself"
            if made.leader.tokens >= MIN_TOKENS:
                return made.offered // TOKENS
        raise AssertionError
