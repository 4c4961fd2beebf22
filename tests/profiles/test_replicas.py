"""What a replica does with profiles while it leads, and while it does not."""

from __future__ import annotations

from tests.support.profile_bench import BIASED, JUDGED, LEARNED, Bench, harmful, helpful

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
    clock.now = 11.0
    assert not lease.leads
    spent = bench.status()["tests_begun"]["candidate"]
    bench.feed(BIASED, JUDGED, lambda: not bench.serves())
    assert bench.last("roll_back")["version"] == bad
    assert bench.profiles.serving.selected is None
    tested = {c["version"]: c["requests"] for c in bench.status()["candidates"]}
    assert tested == {good: 0}
    assert bench.status()["tests_begun"]["candidate"] == spent + 1, "begun anew, and not looked at"


def test_every_test_has_an_alpha_of_its_own_whichever_replica_begins_it() -> None:
    store, clock = MemoryStore(), Clock()
    leases = [Lease(shared=True, clock=clock) for _ in range(2)]
    benches = [Bench(store, lease=lease) for lease in leases]
    numbers: list[int] = []
    for turn in range(6):
        bench = benches[turn % 2]
        leases[(turn + 1) % 2].lose()
        states = {name: store.get_state(name) for name in STATE_KEYS}
        bench.profiles.restoring.reload(store.profiles(), states, store.events(MAX_EVENTS))
        leases[turn % 2].grant(1e9)
        bench.profiles.restoring.write_all([])
        bench.profiles.operator.import_profile(helpful(seed=turn))
        numbers += [c["test"] for c in bench.status()["candidates"]]
    assert numbers == [1, 2, 3, 4, 5, 6]
