"""What a replica does with profiles while it leads, and while it does not."""

from __future__ import annotations

from tests.support.profile_bench import BIASED, EVEN, JUDGED, LEARNED, Bench, harmful, helpful

from hemostat.profiles.decisions import MAX_EVENTS
from hemostat.profiles.persistence import STATE_KEYS
from hemostat.store.lease import Lease
from hemostat.store.memory import MemoryStore


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_follower_learns_but_neither_proposes_nor_judges() -> None:
    clock = Clock()
    lease = Lease(shared=True, clock=clock)
    bench = Bench(lease=lease)
    bench.feed(BIASED, LEARNED[:40])
    assert bench.status()["learned_requests"] == 40
    assert bench.decisions() == []
    assert not bench.profiles.proposals.accepts(10**6)
    lease.grant(10.0)
    bench.feed(BIASED, LEARNED[40:56])
    assert bench.decisions() == ["propose", "propose"], "what the follower had learned is used at once"
    assert bench.profiles.proposals.accepts(10**6)
    lease.lose()
    bench.feed(BIASED, JUDGED[:30])
    assert [c["requests"] for c in bench.status()["candidates"]] == [0, 0]


def test_the_last_leader_goes_on_watching_what_serves_and_promotes_nothing() -> None:
    clock = Clock()
    lease = Lease(shared=True, clock=clock)
    bench = Bench(lease=lease)
    lease.grant(10.0)
    bad, good = (
        bench.profiles.operator.import_profile(harmful()),
        bench.profiles.operator.import_profile(helpful()),
    )
    bench.profiles.operator.promote(bad)
    bench.feed(BIASED, JUDGED[:1])
    clock.now = 11.0
    assert not lease.leads
    spent = bench.status()["tests_begun"]["candidate"]
    bench.feed(BIASED, JUDGED[1:], lambda: not bench.serves())
    assert bench.last("roll_back")["version"] == bad
    assert bench.profiles.serving.selected is None
    tested = {c["version"]: c["requests"] for c in bench.status()["candidates"]}
    assert tested == {good: 0}
    assert bench.status()["tests_begun"]["candidate"] == spent + 1, "begun anew, and not looked at"


def test_every_test_has_an_alpha_of_its_own_whichever_replica_begins_it() -> None:
    store, clock = MemoryStore(), Clock()
    leases = [Lease(shared=True, clock=clock) for _ in range(2)]
    benches = [Bench(store, lease=lease) for lease in leases]
    tested: dict[int, str] = {}
    begun = 0
    for turn in range(6):
        bench = benches[turn % 2]
        leases[(turn + 1) % 2].lose()
        states = {name: store.get_state(name) for name in STATE_KEYS}
        bench.profiles.restoring.reload(store.profiles(), states, store.events(MAX_EVENTS))
        leases[turn % 2].grant(1e9)
        bench.profiles.restoring.write_all([])
        version = bench.profiles.operator.import_profile(helpful(seed=turn))
        bench.feed(EVEN, JUDGED[turn : turn + 1])
        for candidate in bench.status()["kinds"][0]["candidates"]:
            assert tested.setdefault(candidate["test"], candidate["version"]) == candidate["version"]
        assert bench.status()["tests_begun"]["candidate"] > begun
        begun = bench.status()["tests_begun"]["candidate"]
        bench.profiles.trials.remove(lambda c, version=version: c.version == version)  # type: ignore[misc]
    assert set(tested) == set(range(1, begun + 1))


def test_a_follower_takes_over_kinds_tests_and_windows() -> None:
    store, clock = MemoryStore(), Clock()
    leader, follower = (Bench(store, lease=Lease(shared=True, clock=clock)) for _ in range(2))
    leader.lease.grant(1e9)
    leader.feed(BIASED, JUDGED[:50], kind="chat")
    served = leader.profiles.operator.import_profile(helpful())
    leader.profiles.operator.promote(served, "chat")
    tested = leader.profiles.operator.import_profile(harmful())
    leader.feed(BIASED, JUDGED[50:60], kind="chat")
    leader.profiles.writer.save()
    states = {name: store.get_state(name) for name in STATE_KEYS}
    follower.feed(BIASED, JUDGED[:3], kind="code")
    assert follower.profiles.kinds.followed == set(), "only the leader decides which kinds are followed"
    follower.profiles.restoring.reload(store.profiles(), states, store.events(MAX_EVENTS))
    assert follower.profiles.kinds.followed == {"chat"}
    assert follower.profiles.serving.version_by_kind == {"chat": served}
    assert follower.profiles.trials.tested_versions == [tested]
    assert follower.status()["kinds"] == leader.status()["kinds"]
    follower.feed(BIASED, JUDGED[60:70], kind="chat")
    assert follower.status()["kinds"] == leader.status()["kinds"], "it does not judge"
    leader.lease.lose()
    follower.lease.grant(1e9)
    follower.feed(BIASED, JUDGED[50:70], kind="chat")
    [kind] = [kind for kind in follower.status()["kinds"] if kind["kind"] == "chat"]
    assert kind["watch"]["units"] == 20, "those that the leader counted are not counted again"
