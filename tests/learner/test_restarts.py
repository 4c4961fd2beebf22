"""What the contextual learner knows outlives its process, and the control process; real child processes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import oracle
from tests.support.constants import with_constants
from tests.support.learner_world import D, V, World, kl, learners, logprobs, make, save
from tests.support.stores import DirectWrites
from tests.support.waiting import until

from hemostat.config.schema import Calibration
from hemostat.learner import client, learner_messages
from hemostat.learner.client import Learner, LearningTarget
from hemostat.learner.stored import BLOB_KEY, StoredLearning
from hemostat_calibration.profiles import transform
from hemostat_calibration.profiles.profile import CalibrationProfile

SETTINGS: dict[str, Any] = {"anchors": 32, "min_tokens": 600, "clamp_nats": 5.0}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.05, 0.1))
    monkeypatch.setattr(learner_messages, "PART_BYTES", 10_000)


class Receiver:
    """Accepts proposals once `open`."""

    def __init__(self) -> None:
        self.open = False
        self.restored: bool | None = None
        self.probe: CalibrationProfile | None = None
        self.proposed: list[CalibrationProfile] = []

    def accepts(self, family: str, tokens: int) -> bool:
        return self.open and not self.proposed

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any]) -> bool:
        self.proposed.append(profile)
        return True

    def set_probe(self, profile: CalibrationProfile, *, restored: bool) -> None:
        self.probe, self.restored = profile, restored


class Life:
    """From one start of the control process to its end. now: of the clock that exports go by."""

    def __init__(self, store: DirectWrites, folder: Path, **constants: Any) -> None:
        self.world: World = make()
        self.receiver, self.now = Receiver(), 0.0
        stored = StoredLearning(store)
        stored.restore(store.get_blob(BLOB_KEY))
        given = with_constants(Calibration, **{"rank": 8, "clamp_kl_nats": 20.0} | constants)(**SETTINGS)
        self.learner = Learner(given, self.receiver, storage=stored, clock=lambda: self.now)
        self.target = LearningTarget("m", V, folder, D, "digest")

    def teach(self, seeds: range) -> None:
        assert self.receiver.probe is not None
        anchors = transform.anchors(self.receiver.probe)
        assert anchors is not None
        for seed in seeds:
            self.learner.update(self.world.record(seed, anchors, transform.anchors_digest(anchors)))

    @property
    def tokens(self) -> int:
        return int(self.learner.status()["tokens"])

    async def taught(self, tokens: int) -> None:
        await until(lambda: self.tokens == tokens)

    async def propose(self) -> CalibrationProfile:
        self.receiver.open = True
        self.learner._process.wake()
        await until(lambda: bool(self.receiver.proposed))
        return self.receiver.proposed[0]


@asynccontextmanager
async def life(store: DirectWrites, tmp_path: Path, weights: str = "", **settings: Any) -> AsyncIterator[Life]:
    current = Life(store, save(make(), tmp_path / "checkpoint"), **settings)
    current.learner.set_weights(weights)
    running = asyncio.create_task(current.learner.run())
    current.learner.set_target(current.target)
    await until(lambda: current.learner.state == "learning")
    try:
        yield current
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert learners() == []


def won(profile: CalibrationProfile) -> float:
    """Divergence left on texts that were not learned from, nats."""
    world = make()
    h_r, h_c = world.hidden(10_000, 500)
    z = h_c @ world.weight.T
    return kl(logprobs(h_r @ world.weight.T), logprobs(oracle.apply(profile, z.astype(np.float64))))


async def test_after_restarts_the_proposal_is_the_one_without(tmp_path: Path) -> None:
    async with life(DirectWrites(), tmp_path) as current:
        current.teach(range(60))
        await current.taught(960)
        without = await current.propose()
    store = DirectWrites()
    for n in range(3):
        async with life(store, tmp_path) as current:
            assert current.receiver.restored is (n > 0)
            assert current.tokens == n * 320
            assert current.learner.tokens_by_source().get("hidden", 0) == 0, "counters are of this process"
            current.teach(range(20 * n, 20 * n + 20))
            await current.taught(320 * n + 320)
            if n == 2:
                after = await current.propose()
                assert current.learner.tokens_by_source()["hidden"] == 320
    assert won(after) == pytest.approx(won(without), rel=0.02)
    assert after.metadata["tokens"] == without.metadata["tokens"]


async def test_a_killed_process_loses_what_came_after_the_last_export(tmp_path: Path) -> None:
    store = DirectWrites()
    async with life(store, tmp_path) as current:
        current.teach(range(20))
        await current.taught(320)
        assert store.get_blob(BLOB_KEY) is None
        current.now = client.EXPORT_SECONDS
        current.teach(range(20, 21))
        await until(lambda: store.get_blob(BLOB_KEY) is not None)
        current.teach(range(30, 40))
        await current.taught(496)
        (pid,) = learners()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: current.learner.state == "down")
        assert "since it was stored is lost" in current.learner.detail
        await until(lambda: current.learner.state == "learning")
        stored = current.tokens
        assert stored in (320, 336), "the last record may have come after the export"
        assert current.learner.tokens_by_source()["hidden"] == 496, "counters do not decrease"
        current.teach(range(50, 51))
        await current.taught(stored + 16)
        assert current.learner.tokens_by_source()["hidden"] == 512


async def test_what_is_about_another_reference_or_damaged_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = DirectWrites()
    async with life(store, tmp_path) as current:
        current.teach(range(5))
        await current.taught(80)
    whole = store.get_blob(BLOB_KEY)
    assert whole is not None
    for changes, damaged in (({"half_life_tokens": 77.0}, whole), ({}, whole[:-1]), ({}, b"x"), ({}, b"")):
        store.put_blob(BLOB_KEY, damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            async with life(store, tmp_path, **changes) as current:
                assert current.tokens == 0
                assert current.receiver.restored is False
        assert ("learning begins anew" in caplog.text) is bool(damaged)


async def test_the_limit_of_what_is_stored_holds(tmp_path: Path) -> None:
    store = DirectWrites()
    async with life(store, tmp_path, stored_learner_mib=1) as current:
        current.teach(range(500))
        await current.taught(500 * 16)
    data = store.get_blob(BLOB_KEY)
    assert data is not None
    assert len(data) <= 1 << 20
    async with life(store, tmp_path, stored_learner_mib=1) as current:
        assert current.tokens == 500 * 16


async def test_what_is_of_other_weights_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DirectWrites()
    async with life(store, tmp_path) as current:
        current.learner.set_weights("old")
        current.teach(range(5))
        await current.taught(80)
    async with life(store, tmp_path) as current:
        assert current.tokens == 80
        current.learner.set_weights("")
        current.learner.set_weights("old")
        current.teach(range(5, 7))
        await current.taught(112)
        (before,) = learners()
        # What the process has learned is exported at its end, and is not to be stored as of the new weights.
        current.learner.set_weights("new")
        await until(lambda: learners() not in ([], [before]) and current.learner.state == "learning")
        assert current.tokens == 0
        current.teach(range(10, 11))
        await current.taught(16)
    assert "the engines have loaded other weights" in caplog.text
    async with life(store, tmp_path) as current:
        assert current.tokens == 16
        current.learner.set_weights("new")
        await asyncio.sleep(0.1)
        assert current.tokens == 16


async def test_what_was_stored_of_other_weights_is_not_read(tmp_path: Path) -> None:
    """They are known before the process starts."""
    store = DirectWrites()
    async with life(store, tmp_path) as current:
        current.learner.set_weights("old")
        current.teach(range(5))
        await current.taught(80)
    for weights, tokens in (("new", 0), ("old", 80)):
        async with life(store, tmp_path, weights=weights) as current:
            assert current.tokens == tokens
