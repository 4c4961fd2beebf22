"""Several replicas learn contextual profiles together: real learner processes, and a real Valkey between them."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tests.support.learner_world import children
from tests.support.learning_replicas import (
    MIN_TOKENS,
    SHORTER,
    TOKENS,
    UNSHARED,
    Deployment,
    One,
    deployment,
    requests_until_min_tokens,
)
from tests.support.valkey import Valkey
from tests.support.waiting import until

from hemostat.control.evidence import inbox
from hemostat.learner import wire
from hemostat.learner.process import ScopedLearner
from hemostat.learner.stored import BLOB_KEY, split_weights
from hemostat.store.protocol import StoreFailure, StoreUnreachable
from hemostat_calibration.learning.contextual import storage
from hemostat_calibration.learning.contextual.learner import ContextualState
from hemostat_calibration.learning.contextual.sharing import MIN_CONVERSATIONS
from hemostat_calibration.learning.contextual.statistics import flushed


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in SHORTER:
        monkeypatch.setattr(module, name, value)


async def test_four_replicas_learn_about_as_fast_as_one(server: Valkey, tmp_path: Path) -> None:
    """The first proposal is due after `min_tokens`. From its own part alone, the leader needs four times as many."""
    one = await requests_until_min_tokens(server.url, tmp_path / "1", 1)
    four = await requests_until_min_tokens(server.url, tmp_path / "4", 4)
    assert one * TOKENS == pytest.approx(MIN_TOKENS, abs=200)
    assert four <= 1.3 * one


def learner_of(made: Deployment) -> ScopedLearner:
    """As in the processes."""
    start = made.leader.control.learner._start_message(made.leader.target, restores=True)
    found = wire.REQUESTS.decode(wire.REQUESTS.encode(start))
    assert isinstance(found, wire.Start)
    return ScopedLearner(found)


def stored_state(made: Deployment) -> ContextualState:
    learner = learner_of(made)
    weights, data = split_weights(made.leader.control.store.get_blob(BLOB_KEY) or b"")
    assert weights == ""
    return storage.load(data, learner._family, learner._about)[""] if data else learner._new()


def stored(made: Deployment) -> tuple[int, float]:
    """Tokens that the store has, and the weight of their sums, of which none is forgotten yet."""
    state = stored_state(made)
    return state.tokens, sum(fold.weight for fold in state.folds)


async def all_stored(made: Deployment) -> None:
    """What the leader has learned. It looks whether an export is due when something comes."""

    def done() -> bool:
        made.leader.control.learner._process.wake()
        try:
            return 0 < made.leader.tokens == stored(made)[0]
        except StoreFailure:  # it was written meanwhile
            return False

    await until(done, 30)


async def test_nothing_counts_twice_where_a_follower_dies_and_another_one_comes(server: Valkey, tmp_path: Path) -> None:
    async with deployment(server.url, tmp_path, 2) as made:
        await made.teach(made.all, range(200))
        before = made.leader.tokens
        for pid in children():
            os.kill(pid, signal.SIGKILL)  # all learners: what was not stored is lost, and read again from nowhere
        await until(lambda: all(one.control.learner.state == "down" for one in made.all))
        await until(lambda: all(one.control.learner.state == "learning" for one in made.all), 30)
        assert made.leader.tokens <= before
        _, follower = made.all
        await follower.die()
        third = await made.add()
        await made.teach([made.leader, third], range(200, 400))
        await all_stored(made)
        tokens, weight = stored(made)
        assert weight == pytest.approx(tokens, rel=0.01)
        # Lost: what the follower and its successor had not shared, and what was not stored when learners were killed.
        assert made.offered - 3 * UNSHARED - 3200 <= tokens <= made.offered


async def test_a_new_leader_goes_on_from_what_the_last_one_stored(
    server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "REMOVE_SECONDS", 1000.0)  # all that the first one has counted is in the stream still
    async with deployment(server.url, tmp_path, 3) as made:
        first, *others = made.all
        await made.teach(made.all, range(300))
        await all_stored(made)
        known = first.tokens
        await first.die()
        # What others send meanwhile waits in the stream.
        for n, seed in enumerate(range(300, 400)):
            others[n % 2].teach(seed)
            made.offered += TOKENS
        await until(lambda: any(one.leads for one in others), 30)
        leader = made.leader
        await until(lambda: leader.control.learner.accepts_others and leader.lane.applied > 0, 30)
        await asyncio.sleep(0.5)
        await leader.settle()
        assert leader.control.lease.term > 0
        assert known < leader.tokens <= made.offered
        assert leader.tokens >= known + 100 * TOKENS - 3 * UNSHARED
        await all_stored(made)
        tokens, weight = stored(made)
        assert weight == pytest.approx(tokens, rel=0.01)


async def test_what_a_replica_learned_before_any_led_counts_once(server: Valkey, tmp_path: Path) -> None:
    """The store did not answer when it started: it sent as a follower what it takes as the first leader."""
    async with deployment(server.url, tmp_path, 1) as made:
        (one,) = made.all
        lease = one.control.lease
        beat, one.control.replica.heartbeat = one.control.replica.heartbeat, nothing  # type: ignore[union-attr, method-assign]
        await asyncio.sleep(0.2)
        lease._until, lease.is_last_leader = -math.inf, False
        for seed in range(80):
            one.teach(seed)
        await one.settle()
        await until(lambda: one.lane.outbox.sent > 0)
        one.control.replica.heartbeat = beat  # type: ignore[union-attr, method-assign]
        await until(lambda: one.leads and one.lane.applied == one.lane.outbox.sent, 30)
        await one.settle()
        assert lease.term == 0
        assert one.tokens == 80 * TOKENS


async def nothing() -> None:
    """Instead of a heartbeat."""


async def test_what_is_of_another_learner_is_not_used(server: Valkey, tmp_path: Path) -> None:
    """Such as one that forgets, while the configuration of replicas is replaced."""
    async with deployment(server.url, tmp_path, 1) as made:
        made.made = made.made.model_copy(
            update={"calibration": made.made.calibration.model_copy(update={"half_life_tokens": 500.0})}
        )
        other = await made.add()
        await made.teach([other], range(80))
        leader = made.leader.control.learner
        await until(lambda: leader.failed_records() > 0, 30)
        assert made.leader.tokens == 0


async def test_the_sums_are_those_of_all_tokens(server: Valkey, tmp_path: Path) -> None:
    """In a fixed order, over the store: as one replica that has all the tokens which were shared."""
    async with deployment(server.url, tmp_path, 2) as made:
        _, follower = made.all
        seeds = range(40 * MIN_CONVERSATIONS)
        await made.teach([follower], seeds)
        await all_stored(made)
        one, shared = learner_of(made), stored_state(made)
        records = [follower.world.record(seed, one._family.anchors, one._family.digest, TOKENS) for seed in seeds]
        # They were learned in one batch, after which each fold has enough requests.
        whole = one._family.update(one._new(), records)
        assert (whole.tokens, whole.requests) == (shared.tokens, shared.requests)
        for a, b in zip(shared.folds, whole.folds, strict=True):
            flat = flushed(b, whole.tokens, one._family.forgetting)
            np.testing.assert_allclose(a.cross, flat.cross, atol=1e-3 * float(np.abs(flat.cross).max()))
            np.testing.assert_allclose(a.target, flat.target, atol=1e-3 * float(np.abs(flat.target).max()))


async def test_where_nothing_is_stored_a_new_leader_goes_on_from_its_own(server: Valkey, tmp_path: Path) -> None:
    async with deployment(server.url, tmp_path, 2, stored_learner_mib=0) as made:
        first, other = made.all
        await made.teach(made.all, range(200))
        assert other.tokens == 100 * TOKENS
        await first.die()
        for seed in range(200, 300):  # sent as a follower, and taken as the leader
            other.teach(seed)
        await until(lambda: other.leads and other.lane.applied > 0, 30)
        await other.settle()
        assert other.tokens == 200 * TOKENS


async def taken_over(one: One) -> None:
    inbox, learner = one.lane.inbox, one.control.learner
    await until(lambda: one.leads and inbox._prepared_in == one.control.lease.term > 0, 30)
    await until(lambda: learner.accepts_others, 30)


async def test_where_the_last_leader_could_not_store_anything_a_new_one_goes_on_from_its_own(
    server: Valkey, tmp_path: Path
) -> None:
    """Its sums need more than `stored_learner_mib`: with hidden states of 8,192, more than the default."""
    async with deployment(server.url, tmp_path, 2) as made:
        first, other = made.all
        first.control.writer.as_leader.put_blob = lambda *_: None  # type: ignore[method-assign]
        await made.teach(made.all, range(200))
        await first.die()
        await taken_over(other)
        for seed in range(200, 300):
            other.teach(seed)
        await other.settle()
        assert other.tokens == 200 * TOKENS


async def test_a_new_leader_waits_for_a_store_that_does_not_answer(
    server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would begin with nothing, and store that."""
    async with deployment(server.url, tmp_path, 2) as made:
        first, other = made.all
        await made.teach(made.all, range(200))
        await all_stored(made)
        known = first.tokens
        store, asked = other.control.store, 0
        get_blob = store.get_blob

        def sometimes(key: str) -> bytes | None:
            nonlocal asked
            asked += key == BLOB_KEY
            if key == BLOB_KEY and asked in {2, 3}:  # the first time it looks whether there is anything
                raise StoreUnreachable("no answer")
            return get_blob(key)

        monkeypatch.setattr(store, "get_blob", sometimes)
        await first.die()
        await taken_over(other)
        assert asked == 4
        assert other.tokens >= known
