"""Evidence of several replicas, judged by the one that leads."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import replica_kills, valkey
from tests.support import replicas as replicas_module
from tests.support.control import status_json
from tests.support.profile_bench import BIASED, EVEN, JUDGED, LEARNED, harmful, helpful
from tests.support.replicas import MODELS, Replicas, replicas, requests_until_promoted
from tests.support.samples import values
from tests.support.valkey import Valkey
from tests.support.waiting import until
from tests.support.world import World

from hemostat.control.composition import Control
from hemostat.control.evidence import checkpoint as checkpoint_module
from hemostat.control.evidence.units import UNITS, ScoredUnit, SentUnit, packed_distances, unpacked_distances
from hemostat.ipc.messages import REST_KIND, OutcomeReport
from hemostat.store.protocol import StoreFailure
from hemostat_calibration.learning.temperature_bias import TemperatureBiasLearner
from hemostat_calibration.records import ExactDistances

STRONGLY_BIASED = World(bias=1.2)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with valkey.running(tmp_path_factory.mktemp("valkey")) as one:
        yield one


async def test_four_replicas_prove_about_as_fast_as_one_with_all_the_traffic(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took four times as many requests where the leader judged by its own part; `make bench-faults` has more."""
    monkeypatch.setattr(replicas_module, "MIN_TOKENS", 2000)
    alone = await requests_until_promoted("", tmp_path / "one", 1, STRONGLY_BIASED, 0)
    together = await requests_until_promoted(shared_server.url, tmp_path / "four", 4, STRONGLY_BIASED, 0)
    assert alone > 100
    assert together <= 1.15 * alone


def test_kills_at_random_count_nothing_twice_and_promote_no_harm(tmp_path: Path) -> None:
    """A short form of `make bench-faults`: leader, follower and store are each killed."""
    found = replica_kills.run(replica_kills.context(), tmp_path / "run", 0, 4)
    assert {"leader", "follower", "store"} == set(found.killed)
    assert found.holds, found
    assert found.counted > 100


def test_another_replica_leads_where_leader_and_store_die_at_once(tmp_path: Path) -> None:
    """The store comes back with a lease whose holder is gone."""
    found = replica_kills.run(replica_kills.context(), tmp_path / "run", 1, 2, (replica_kills.TOGETHER,))
    assert found.holds, found


async def test_the_leader_learns_from_all(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server.url, tmp_path, 3) as ones:
        for n, key in enumerate(LEARNED[:72]):
            ones.score(n, EVEN.truth(n), key)
        await ones.beat()
        await ones.turn()
        learned = [one.profile_manager.proposals.learned()[0] for one in ones.controls]
        assert learned == [72, 24, 24]


async def test_the_next_leader_goes_on_from_what_the_last_one_had_learned(
    shared_server: Valkey, tmp_path: Path
) -> None:
    async with replicas(shared_server.url, tmp_path, 2) as ones:
        leader, follower = ones.controls
        for n, key in enumerate(LEARNED[:64]):
            ones.score(n, EVEN.truth(n), key)
        await ones.beat()
        await ones.turn()
        await leader.learned.save()
        await leader.writer.drain()
        for n, key in enumerate(LEARNED[64:96]):
            ones.score(2 * n + 1, EVEN.truth(n), key)  # all of them at the follower
        await ones.beat()
        await ones.turn()
        assert leader.profile_manager.proposals.learned()[0] == 96
        await hand_over(ones)
        await ones.turn()
        assert follower.profile_manager.proposals.learned()[0] == 96, "the last 32 were not saved, and come again"


async def hand_over(ones: Replicas) -> None:
    """The leader dies: it writes nothing more, and the second one takes over."""
    leader, other, *_ = ones.controls
    assert leader.replica is not None
    assert other.replica is not None
    assert leader.store.shared is not None
    leader.store.shared.release_lease()
    leader.lease.lose()
    await other.replica.heartbeat()
    assert other.lease.leads
    ones.controls = [other]


async def test_alarms_are_of_all_replicas_and_shown_by_each(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server.url, tmp_path, 3, alarm={"baseline_requests": 30}) as ones:
        for n, key in enumerate(JUDGED[:90]):
            world = EVEN if n < 40 else BIASED
            ones.score(3 * n + 1 + n % 2, world.truth(n), key)  # the leader itself scores nothing
            if n % 10 == 9:
                await ones.turn()
        ones.leader.alarms.save()
        await ones.turn()
        assert [one.alarms.report()["raised"] for one in ones.controls] == [True, True, True]
        events = [event["decision"] for event in ones.controls[0].store.events(100)]
        assert events.count("alarm") == 1, "raised once, and not once by each replica"
        assert [len(one.alarms.events) for one in ones.controls] == [1, 1, 1]
        writing = asyncio.create_task(ones.controls[0].writer.run())
        report = await ones.controls[0].actions.rebase(None)
        writing.cancel()
        assert all(kind["baseline_requests"] == 0 for kind in report["kinds"])


async def test_the_engine_that_differs_is_named_once_by_the_evidence_of_all(
    shared_server: Valkey, tmp_path: Path
) -> None:
    async with replicas(shared_server.url, tmp_path, 3) as ones:
        for n in range(200):
            world = STRONGLY_BIASED if n % 4 == 2 else EVEN
            ones.score(3 * n + 1 + n % 2, world.truth(n), b"%d" % n, engine=f"e{n // 2 % 2}{n % 2}")
            assert not any(one.by_engine.odd for one in ones.controls[1:]) or ones.leader.by_engine.odd
            if n % 10 == 9:
                await ones.turn()
        await ones.turn()
        assert [one.by_engine.odd for one in ones.controls] == [{"e10"}] * 3
        events = [event["why"] for event in ones.controls[0].store.events(100)]
        assert events.count("engine e10 is not like the others") == 1, "not once by each replica"
        assert sum(row["requests"] for row in ones.leader.by_engine.report()) == 200, "the leader itself scored none"
        await hand_over(ones)
        assert ones.leader.by_engine.odd == {"e10"}


async def test_a_conversation_counts_once_whichever_replicas_its_turns_go_to(
    shared_server: Valkey, tmp_path: Path
) -> None:
    async with replicas(shared_server.url, tmp_path, 3, alarm={"baseline_requests": 1000}) as ones:
        for n in range(30):
            ones.score(n, EVEN.truth(n), JUDGED[n // 3], conversation=JUDGED[n // 3])
        await ones.turn()
        assert ones.leader.alarms.report()["workload"]["baseline_requests"] == 10
        assert ones.leader.profile_manager.serving.kinds["chat"].units == 10


async def test_what_a_replica_sent_before_it_led_counts_as_what_it_is(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen these conversations: they are its own, and no repetition. Its noise floor has these in it."""
    async with replicas(shared_server.url, tmp_path, 2, alarm={"baseline_requests": 1000}) as ones:
        follower = ones.controls[1]
        ones.score(0, EVEN.truth(0), JUDGED[20])
        ones.leader.alarms.save()
        await ones.turn()  # the follower knows the kind
        for n, key in enumerate(JUDGED[:10]):
            ones.score(1, EVEN.truth(n), key, conversation=key)
        lane = follower.pipeline._consumers.evidence
        assert lane is not None
        lane.send_noise_floor("compressed", np.ones(3))
        assert follower.evidence is not None
        await follower.evidence.close()
        await hand_over(ones)
        floors: list[str] = []
        monkeypatch.setattr(follower.alarms, "observe_noise_floor", lambda model, _: floors.append(model))
        await ones.turn()
        assert follower.evidence.lanes[0].applied == 11
        assert follower.alarms.report()["workload"]["baseline_requests"] == 11
        assert not floors


async def test_outcomes_of_all_relays_are_compared_by_the_leader(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server.url, tmp_path, 2) as ones:
        leader, follower = ones.controls
        for key in JUDGED[:2]:
            ones.score(0, EVEN.truth(0), key)
        served = leader.profile_manager.operator.import_profile(helpful())
        leader.profile_manager.operator.promote(served)
        await ones.turn()
        for n in range(40):
            bad = {"truncated": False}
            report = OutcomeReport(REST_KIND, served, n % 2 == 0, b"c%d" % (n // 2), b"", bad, 20)
            (leader if n % 2 else follower).link._on_outcome(report)  # type: ignore[attr-defined]
        await ones.turn()
        [kind] = leader.outcomes.report()["kinds"]
        assert kind["units"] == 20, "each conversation once"


async def test_a_leader_writes_before_it_has_counted_more_than_it_may_lose(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_UNSAVED", 10)
    async with replicas(shared_server.url, tmp_path, 2, alarm={"baseline_requests": 1000}) as ones:
        await ones.turn()
        for n, key in enumerate(JUDGED[:25]):
            ones.score(0, EVEN.truth(n), key)
        await ones.leader.writer.drain()
        saved = replica_kills.counted_requests(ones.leader.store.get_state("alarm") or "", 1000)
        assert 25 - saved < 10


@pytest.mark.parametrize("saved", [False, True])
async def test_what_a_leader_counted_while_it_lost_the_lease_is_counted_by_the_next(
    saved: bool, shared_server: Valkey, tmp_path: Path
) -> None:
    """The store did not answer it for longer than the lease. saved: it had written some of it before."""
    async with replicas(shared_server.url, tmp_path, 2, alarm={"baseline_requests": 1000}) as ones:
        old, new = ones.controls
        await ones.turn()
        for n, key in enumerate(JUDGED[:20]):
            ones.score(0, EVEN.truth(n), key)
            if n == 12 and saved:
                old.alarms.save()
                await old.writer.drain()
        assert old.store.shared is not None
        old.store.shared.release_lease()
        assert new.replica is not None
        await new.replica.heartbeat()
        await ones.turn()
        await ones.turn()
        assert [one.lease.leads for one in ones.controls] == [False, True]
        assert new.alarms.report()["workload"]["baseline_requests"] == 20
        assert new.profile_manager.serving.kinds["chat"].units == 20


async def test_a_replica_that_leads_again_counts_what_it_sent_in_between(shared_server: Valkey, tmp_path: Path) -> None:
    """Its numbers begin anew: what it counts at once must not hide what it has sent and comes later."""
    async with replicas(shared_server.url, tmp_path, 2, alarm={"baseline_requests": 1000}) as ones:
        first, second = ones.controls
        assert first.replica is not None
        assert second.replica is not None
        await ones.turn()
        for n, key in enumerate(JUDGED[:5]):
            ones.score(0, EVEN.truth(n), key)
        for old, new in ((first, second), (second, first)):
            assert old.store.shared is not None
            assert new.replica is not None
            old.store.shared.release_lease()
            await new.replica.heartbeat()
            assert old.replica is not None
            await old.replica.heartbeat()
        assert first.lease.leads
        for n, key in enumerate(JUDGED[5:9]):
            ones.score(0, EVEN.truth(n), key)
        await ones.turn()
        assert first.alarms.report()["workload"]["baseline_requests"] == 9
        assert first.evidence is not None
        assert first.evidence.positions.lost == 0


async def test_nothing_is_written_while_nothing_is_counted(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server.url, tmp_path, 2) as ones:
        await ones.turn()
        store = ones.leader.store.shared
        assert store is not None
        revision = store.acquire_lease(10.0).revision
        for counted in (False, True):
            for _ in range(2):  # within the time of the lease
                ones.clock.now += 0.5 * checkpoint_module.SAVE_SECONDS
                await ones.beat()
            if counted:
                ones.score(1, EVEN.truth(0), JUDGED[0])
            await ones.turn()
            assert (store.acquire_lease(10.0).revision > revision) == counted


async def test_states_and_positions_are_written_in_one_step(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server.url, tmp_path, 2) as ones:
        await ones.turn()
        written: set[frozenset[str]] = set()
        store = ones.leader.store
        assert store.shared is not None
        set_states = store.shared.as_leader.set_states

        def note(values: dict[str, str | None]) -> None:
            written.add(frozenset(values))
            set_states(values)

        store.shared.as_leader.set_states = note  # type: ignore[method-assign, assignment]
        version = ones.leader.profile_manager.operator.import_profile(harmful())
        ones.leader.profile_manager.operator.promote(version)
        await ones.leader.writer.drain()
        assert written == {frozenset({"kinds", "tests", "alarm", "engines", "outcomes", "evidence"})}


async def test_a_leader_takes_no_evidence_before_it_knows_its_models(shared_server: Valkey, tmp_path: Path) -> None:
    """Else a new one drops what others send until its reference is there."""
    async with replicas(shared_server.url, tmp_path, 2) as ones:
        leader, follower = ones.controls
        assert leader.evidence is not None
        assert follower.evidence is not None
        leader.learned._models = None
        ones.score(1, EVEN.truth(0), JUDGED[0])
        await follower.evidence.close()
        lane = leader.evidence.lanes[0]
        lane.inbox.lag_seconds = -1.0
        running = asyncio.create_task(lane.inbox.run())
        await until(lambda: lane.inbox.lag_seconds != -1.0)  # it has looked
        assert lane.applied == 0
        leader.learned.set_models(MODELS)
        await until(lambda: lane.applied == 1)
        assert leader.profile_manager.serving.kinds["chat"].units == 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("by", [0, 1], ids=["the leader itself", "a follower"])
async def test_what_is_written_while_a_unit_is_counted_has_all_of_it(
    by: int, shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its position was written before the request was in any state: a new leader had it as counted, and nowhere."""
    monkeypatch.setattr(checkpoint_module, "MAX_UNSAVED", 10)
    async with replicas(shared_server.url, tmp_path, 2, alarm={"baseline_requests": 1000}) as ones:
        leader = ones.leader
        await ones.turn()
        observe, seen = leader.alarms.observe_unit, []

        def saving(*more: Any) -> None:
            leader.alarms.save()  # such as the alarm does once a minute
            observe(*more)
            seen.append(more)

        monkeypatch.setattr(leader.alarms, "observe_unit", saving)
        for n, key in enumerate(JUDGED[:10]):
            ones.score(by, EVEN.truth(n), key)
        if by:
            for one in reversed(ones.controls):
                assert one.evidence is not None
                await one.evidence.lanes[0].outbox.send()
            await leader.evidence.lanes[0].inbox.take()  # type: ignore[union-attr]
        await leader.writer.drain()
        assert len(seen) == 10
        counted = replica_kills.counted_requests(leader.store.get_state("alarm") or "", 1000)
        last = max(json.loads(leader.store.get_state("evidence") or "{}").values())
        assert counted == last == 10


async def test_what_cannot_be_used_is_counted_and_the_rest_is_used(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server.url, tmp_path, 2) as ones:
        leader, follower = ones.controls
        assert leader.evidence is not None
        assert follower.evidence is not None
        lane, judging = follower.evidence.lanes[0], leader.evidence.lanes[0]
        damaged = ScoredUnit("chat", b"u", False, b"", 3, True, False, ("x", "y"), None, None)  # type: ignore[arg-type]
        lane.outbox.add(UNITS.encode(SentUnit("", damaged)))
        await lane.outbox.send()
        await judging.inbox.take()
        assert judging.failed == 1
        ones.score(1, EVEN.truth(0), JUDGED[0])
        await lane.outbox.send()
        await judging.inbox.take()
        assert leader.profile_manager.serving.kinds["chat"].units == 1
        assert values(leader.evidence.samples())["hemostat_evidence_units_total", "evidence", "failed"] == 1.0


async def test_a_leader_whose_evidence_is_refused_hands_over_all_the_same(
    shared_server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse() -> None:
        raise StoreFailure("out of memory")

    async with replicas(shared_server.url, tmp_path, 2) as ones:
        leader = ones.controls[0]
        assert leader.evidence is not None
        assert leader.store.shared is not None
        leader.evidence.close = refuse  # type: ignore[method-assign]
        released: list[None] = []
        monkeypatch.setattr(leader.store.shared, "release_lease", lambda: released.append(None))
    assert released


async def test_every_replica_shows_what_all_have_measured(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server.url, tmp_path, 3) as ones:
        for n, key in enumerate(JUDGED[:12]):
            ones.score(n, BIASED.truth(n), key)
        for _ in range(2):
            for one in ones.controls:
                assert one.deployment is not None
                await one.deployment.exchange()
        shown = [status_json(one)["replica"] for one in ones.controls]
        assert [one["leads"] for one in shown] == [True, False, False]
        for one in shown:
            assert one["deployment"]["tokens_scored"] == 12 * 40
            assert sum(each["leads"] for each in one["deployment"]["replicas"]) == 1
            assert len(one["deployment"]["replicas"]) == 3
        estimates = [one["deployment"]["kl_nats_estimate"]["estimate"] for one in shown]
        alone = [divergence_of(one) for one in ones.controls]
        np.testing.assert_allclose(estimates, np.mean(alone), rtol=1e-9)


def divergence_of(one: Control) -> float:
    found = one.measurements.sequence("kl_nats_estimate").get()
    return found.mean


def test_one_replica_has_nothing_of_it(tmp_path: Path) -> None:
    async def alone() -> dict[str, Any]:
        async with replicas("", tmp_path, 1) as ones:
            assert ones.controls[0].evidence is None
            return status_json(ones.controls[0])["replica"]  # type: ignore[no-any-return]

    assert asyncio.run(alone()) == {
        "leads": True,
        "shared": False,
        "store_reachable": None,
        "deployment": None,
        "evidence": None,
    }


def test_distances_arrive_as_they_were_but_for_rounding() -> None:
    kl, tv = np.array([0.1, np.inf, 0.0]), np.array([0.2, 1.0, 0.0])
    found = unpacked_distances(packed_distances({"identity": ExactDistances(kl, tv, np.array([True, False, True]))}))
    np.testing.assert_allclose(found["identity"].kl, kl, rtol=1e-6)
    np.testing.assert_allclose(found["identity"].tv, tv, rtol=1e-6)


@pytest.mark.parametrize("half_life", [None, 500.0])
def test_a_state_that_has_grown_by_what_others_learned_is_the_same_as_one_that_learned_it_all(
    half_life: float | None,
) -> None:
    """As far as weights and counts go: sums are taken under the parameters of their time."""
    world = World(bias=0.5)
    learner = TemperatureBiasLearner(half_life_tokens=half_life)
    _, whole = world.learn(32, learner=learner)
    _, half = world.learn(16, learner=learner)
    grown = learner.grown(half, learner.growth(half, whole))
    assert (grown.tokens, grown.requests) == (whole.tokens, whole.requests)
    np.testing.assert_allclose(grown.reference_mass, whole.reference_mass, rtol=1e-9, atol=1e-12)
    assert grown.weight == pytest.approx(whole.weight)
    assert grown.information == pytest.approx(whole.information)


@pytest.mark.parametrize("what", ["compressed", "reference", "weights"])
async def test_units_about_a_checkpoint_that_was_replaced_under_the_same_name_are_not_counted(
    what: str, shared_server: Valkey, tmp_path: Path
) -> None:
    async with replicas(shared_server.url, tmp_path, 2) as ones:
        leader = ones.leader
        assert leader.evidence is not None
        ones.score(1, EVEN.truth(0), JUDGED[0])
        for one in ones.controls:
            one.learned.set_models(json.dumps(json.loads(MODELS) | {what: "another"}))
        ones.score(1, EVEN.truth(1), JUDGED[1])
        await ones.turn()
        lane = leader.evidence.lanes[0]
        assert (lane.applied, lane.other_models, lane.failed) == (2, 1, 0)
        assert leader.profile_manager.serving.kinds["chat"].units == 1
        sample = ("hemostat_evidence_units_total", "evidence", "other_models")
        assert values(leader.evidence.samples())[sample] == 1


async def test_units_are_counted_where_one_side_does_not_know_a_digest(shared_server: Valkey, tmp_path: Path) -> None:
    async with replicas(shared_server.url, tmp_path, 2) as ones:
        leader, follower = ones.controls
        follower.learned.set_models(json.dumps(json.loads(MODELS) | {"compressed": ""}))
        ones.score(1, EVEN.truth(0), JUDGED[0])
        await ones.turn()
        assert leader.profile_manager.serving.kinds["chat"].units == 1


async def test_what_a_replica_learned_before_any_led_counts_once(shared_server: Valkey, tmp_path: Path) -> None:
    """The store did not answer when it started: it sent as a follower what it takes as the first leader."""
    async with replicas(shared_server.url, tmp_path, 1) as ones:
        (one,) = ones.controls
        one.lease._until, one.lease.is_last_leader = -math.inf, False
        for n in range(40):
            ones.score(0, EVEN.truth(n), b"%d" % n)
        before = one.profile_manager.proposals.learned()
        assert before[0] > 0
        await ones.beat()
        await ones.turn()
        assert one.evidence is not None
        assert one.evidence.lanes[1].applied > 0
        assert one.profile_manager.proposals.learned() == before
