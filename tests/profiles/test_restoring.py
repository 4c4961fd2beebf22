"""What a restart, or another replica, reads back from the store."""

from __future__ import annotations

import pytest
from tests.support.profile_bench import BIASED, JUDGED, MODEL, Bench, harmful
from tests.support.world import V

from hemostat.profiles.catalogue import MAX_PROFILES
from hemostat.profiles.persistence import STATE_KEYS
from hemostat.store.memory import MemoryStore
from hemostat.store.protocol import StoredProfile


def test_the_operators_mode_is_kept_over_restarts_until_the_configuration_changes() -> None:
    bench = Bench()
    bench.profiles.operator.set_mode("off")
    assert bench.restart(mode="auto").profiles.serving.mode == "off"
    assert bench.restart(mode="observe").profiles.serving.mode == "observe", "a changed configuration wins"
    bench.profiles.operator.set_mode("auto")
    assert bench.restart(mode="auto").profiles.serving.mode == "auto"


def test_after_a_restart_the_same_profile_serves_and_is_judged() -> None:
    bench = Bench()
    version = bench.promote()
    again = bench.restart()
    assert again.profiles.serving.version is None, "not before it is known that the model is the same"
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.version == version
    assert [e["decision"] for e in again.profiles.events.newest_first()] == ["promote", "propose", "propose"]
    again.feed(BIASED, JUDGED[:3])
    assert again.status()["selected"]["requests"] == 3
    again.profiles.operator.roll_back("asked for")
    assert bench.restart().profiles.serving.selected is None


def test_a_damaged_stored_profile_does_not_serve() -> None:
    bench = Bench()
    version = bench.promote()
    bench.store.put_profile(StoredProfile(version, b"junk", 0.0))
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.version is None


def test_a_restart_deletes_the_oldest_profiles_of_a_store_that_grew_too_large() -> None:
    bench = Bench()
    for seed in range(MAX_PROFILES + 5):
        profile = harmful(seed=seed)
        bench.store.put_profile(StoredProfile(profile.version, profile.to_bytes(), float(seed)))
    oldest = bench.store.profiles()[-1].version
    bench.store.set_state("serving", f'{{"scope": "pooled", "pinned": false, "selected": {{"": ["{oldest}", 300]}}}}')
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.version == oldest
    assert again.status()["selected"]["window"] == 300
    assert len(bench.store.profiles()) == MAX_PROFILES + 1


def test_spent_alpha_stays_spent_after_a_restart() -> None:
    bench = Bench()
    bench.profiles.operator.import_profile(harmful())
    bench.promote()
    before = bench.status()["tests_begun"]
    assert before["candidate"] >= 3
    assert before["serving"] == 1
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.status()["tests_begun"] == {"candidate": before["candidate"], "serving": 2}
    again.profiles.operator.import_profile(harmful(seed=9))
    found = again.status()["candidates"][0]
    assert found["test"] == before["candidate"] + 1
    assert found["alpha"] == pytest.approx(0.05 / (found["test"] * (found["test"] + 1)))
    damaged = MemoryStore()
    damaged.set_state("tests.candidate", "many")
    damaged.set_state("serving", "{")
    Bench(damaged).restart().profiles.set_model_pair(MODEL, V)


def test_a_reload_never_lowers_the_count_of_tests_begun() -> None:
    bench = Bench()
    bench.promote()
    before = bench.status()["tests_begun"]
    states = {name: bench.store.get_state(name) for name in STATE_KEYS} | {"tests.candidate": "1"}
    bench.profiles.restoring.reload(bench.store.profiles(), states, [])
    assert bench.status()["tests_begun"]["candidate"] == before["candidate"]
