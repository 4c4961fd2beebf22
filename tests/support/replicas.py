"""Several `Control`s of one deployment on a real Valkey, driven by hand on a simulated clock: no loop runs, so that a
run is the same every time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tests.support.captures import capture
from tests.support.control import settings
from tests.support.oracle import shift
from tests.support.profile_bench import MODEL
from tests.support.records import Truth, make_record
from tests.support.world import V, World

from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat_calibration.records import Shift, TokenRecord

STEP_SECONDS = 0.25
"""Between two scored requests of the deployment."""
MIN_TOKENS = 4000
"""Before the first proposal: fewer than in production (20,000), where a proof takes longer."""
MAX_REQUESTS = 5000
"""Within which a profile is promoted."""


class Clock:
    """Monotonic seconds and Unix time."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def store_url(url: str, prefix: str) -> str:
    return f"{url}?prefix={quote(prefix)}"


def deployment(url: str, prefix: str, **more: Any) -> Settings:
    """url: of a Valkey; "" for a store in memory, which one replica has for itself."""
    store = {"url": store_url(url, prefix)} if url else {}
    calibration = {"mode": "auto", "min_tokens": MIN_TOKENS, "clamp_nats": 1.0, "held_out_fraction": 0.3}
    return settings(store=store, calibration=calibration, **more)


class Replicas:
    """controls: in the order in which they take their turns. The first one leads from the start."""

    def __init__(self, controls: list[Control], clock: Clock) -> None:
        self.controls = controls
        self.clock = clock
        self.scored = 0

    @property
    def leader(self) -> Control:
        return next(one for one in self.controls if one.lease.leads)

    @property
    def promoted(self) -> bool:
        return any(one.profile_manager.serving.selected is not None for one in self.controls if one.lease.leads)

    def score(self, n: int, truth: Truth, key: bytes, **more: Any) -> None:
        """The n-th replica has scored a request."""
        self.scored += 1
        self.clock.now += STEP_SECONDS
        one = self.controls[n % len(self.controls)]
        record = replace(scored(one, truth, key), **more)
        one.pipeline.use_record(record, capture(kind=record.kind))

    async def turn(self) -> None:
        """What the loops of all replicas do within about a second: send, count, write, follow."""
        for one in self.controls:
            if one.evidence is not None:
                await one.evidence.close()
        for one in self.controls:
            one.profile_manager.writer.save_if_due()
            if one.evidence is not None and one.lease.leads:
                for lane in one.evidence.lanes:
                    await lane.inbox.take()
                one.evidence.checkpoint.save_if_due()
            await one.writer.drain()
        await self.beat()

    async def beat(self) -> None:
        """All look at the store: the leader stays one, and the others read what it has written."""
        for one in self.controls:
            if one.replica is not None:
                await one.replica.heartbeat()


def scored(one: Control, truth: Truth, key: bytes) -> TokenRecord:
    """With the exact effect of every profile that this replica evaluates, as reference and engine give it."""
    shifts = {}
    for profile in one.profile_manager.evaluated_profiles():
        delta = shift(profile, truth.compressed)
        expected = (np.exp(truth.reference) * delta).sum(-1)
        shifts[profile.version] = Shift(expected, np.log((np.exp(truth.compressed + delta)).sum(-1)))
    return replace(make_record(truth, 20, key=key), shifts=shifts, client=b"client %d" % (key[-1] % 12), kind="chat")


MODELS = '{"compressed": "/models/w4a16", "model": "m", "reference": "r", "weights": "w"}'
"""`model_identity` of what all replicas serve."""


@asynccontextmanager
async def replicas(url: str, folder: Path, number: int, **more: Any) -> AsyncIterator[Replicas]:
    clock = Clock()
    controls = []
    for n in range(number):
        (folder / f"replica-{n}").mkdir(parents=True)
        made = deployment(url, f"{folder}:", **more)
        one = Control(made, folder / f"replica-{n}" / "socket", 1234, clock=clock, wall=clock)
        controls.append(one)
        await one.start(None)
        one.profile_manager.set_model_pair(MODEL, V)
        one.learned.set_models(MODELS)
    try:
        yield Replicas(controls, clock)
    finally:
        for one in controls:
            await asyncio.wait_for(one.close(), 60)


async def requests_until_promoted(url: str, folder: Path, number: int, world: World, seed: int) -> int:
    """Scored requests of the whole deployment until a profile that it has learned serves."""
    async with replicas(url, folder, number) as ones:
        for n in range(MAX_REQUESTS):
            ones.score(n, world.truth(MAX_REQUESTS * seed + n), b"%d" % (MAX_REQUESTS * seed + n))
            if n % number == number - 1:
                await ones.turn()
            if ones.promoted:
                break
        return ones.scored
