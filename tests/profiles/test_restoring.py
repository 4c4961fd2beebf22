"""What a restart reads back from the store."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tests.support.profile_bench import BIASED, EVEN, JUDGED, MODEL, Bench, contextual, harmful, helpful
from tests.support.samples import values
from tests.support.stores import DirectWrites
from tests.support.temperature_bias import temperature_bias
from tests.support.world import V

from hemostat.config.schema import Evidence
from hemostat.ipc.messages import REST_KIND
from hemostat.metrics import names
from hemostat.profiles.catalogue import MAX_PROFILES
from hemostat.profiles.decisions import Reason
from hemostat.profiles.persistence import (
    SCHEMA,
    SERVING_KEY,
    STATE_KEYS,
    TESTS_KEY,
    StoredKind,
    StoredServing,
    stored_serving,
)
from hemostat.store.protocol import StoredProfile
from hemostat.store.schema_1 import PROPOSED_BLOB, upgraded
from hemostat.store.states import write_state
from hemostat_calibration.profiles.adapter import ADAPTER
from hemostat_calibration.profiles.contextual import CONTEXTUAL
from hemostat_calibration.profiles.profile import IDENTITY


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
    assert [e["decision"] for e in again.profiles.events.newest_first()] == ["promote", "propose"]
    again.feed(BIASED, JUDGED[-3:])
    assert again.status()["selected"]["requests"] == 3
    again.profiles.operator.roll_back("asked for")
    assert bench.restart().profiles.serving.selected is None


@pytest.mark.parametrize("data", [b"junk", None], ids=["damaged", "missing"])
def test_what_served_and_cannot_be_read_any_more_is_withdrawn_with_the_reason_once(
    data: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    version = bench.promote()
    bench.profiles.operator.pin(version)
    bench.store.delete_profile(version)
    if data is not None:
        bench.store.put_profile(StoredProfile(version, data, 0.0))
    caplog.set_level("INFO")
    caplog.clear()
    again = bench.restart()
    assert len([record for record in caplog.records if version in record.getMessage()]) == 1
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.version is None
    event = again.last("roll_back")
    assert (event["version"], event["kind"], event["reason"]) == (version, REST_KIND, "lost")
    assert ("cannot be read" in event["why"]) == (data is not None)
    assert not again.profiles.serving.pinned
    assert values(again.profiles.samples())[names.PROFILE_DECISIONS, "roll_back", "lost"] == 1
    assert again.restart(crash=True).decisions() == again.decisions()
    again.feed(BIASED, JUDGED[:5])


def test_a_candidate_that_cannot_be_read_any_more_is_dropped_with_the_reason() -> None:
    bench = Bench()
    bench.feed(BIASED, JUDGED[:2])
    versions = [bench.profiles.operator.import_profile(harmful(seed=seed)) for seed in range(3)]
    bench.store.put_profile(StoredProfile(versions[1], b"junk", 0.0))
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert [candidate.version for candidate in again.profiles.trials.queue] == [versions[0], versions[2]]
    event = again.last("drop")
    assert (event["version"], event["reason"]) == (versions[1], "lost")
    assert again.restart(crash=True).decisions() == again.decisions()


def test_more_profiles_than_may_serve_are_withdrawn_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    for kind in ("a", "b"):
        bench.profiles.kinds.update(kind)
    versions = [bench.profiles.operator.import_profile(made) for made in (helpful(0), helpful(1), contextual())]
    for kind, version in zip((REST_KIND, "a", "b"), versions, strict=True):
        bench.profiles.operator.promote(version, kind)
    monkeypatch.setattr("hemostat.profiles.serving.MAX_SERVING_VERSIONS", 1)
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.version_by_kind == {REST_KIND: versions[0]}
    events = [event for event in again.profiles.events.newest_first() if event["reason"] == "settings"]
    assert {(event["decision"], event["kind"], event["version"]) for event in events} == {
        ("roll_back", "a", versions[1]),
        ("roll_back", "b", versions[2]),
    }
    assert all(event["why"] == "1 other profiles serve, as many as may at a time" for event in events)


def test_candidates_that_an_earlier_version_learned_from_a_part_of_the_traffic_are_dropped_with_the_reason() -> None:
    """A profile that such a version has proven in a kind serves on there, and its other candidates are tested on."""
    bench = Bench()
    bench.feed(BIASED, JUDGED[:2])
    own, served = bench.profiles.operator.import_profile(harmful()), bench.profiles.operator.import_profile(helpful())
    apart = contextual().version
    bench.profiles.operator.promote(served)
    bench.profiles.writer.save()
    now = json.loads(bench.store.get_state(SERVING_KEY) or "")
    now["state"]["queue"].append([apart, "gold", "contextual"])
    bench.store.set_state(SERVING_KEY, json.dumps(now))
    again = bench.restart(crash=True)
    assert own in [candidate.version for candidate in again.profiles.trials.queue]
    assert again.profiles.serving.selected_by_kind == {REST_KIND: served}
    (event,) = [event for event in again.profiles.events.newest_first() if event["decision"] == "drop"]
    assert (event["version"], event["reason"]) == (apart, "settings")
    assert event["why"].startswith("it was learned from the requests of gold alone")
    assert again.restart(crash=True).decisions() == again.decisions(), "it is said once"


def test_kinds_that_are_not_followed_any_more_lose_what_served_them_with_the_reason() -> None:
    bench = Bench()
    for kind in ("often", "rare", "often"):
        bench.profiles.kinds.update(kind)
    version = bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.promote(version)
    again = bench.restart(evidence=Evidence(kinds=1))
    again.profiles.set_model_pair(MODEL, V)
    assert set(again.profiles.serving.version_by_kind) == {REST_KIND, "often"}
    event = again.last("roll_back")
    assert (event["version"], event["kind"], event["reason"]) == (version, "rare", "evicted")


def test_kinds_keep_what_serves_them_where_the_table_of_kinds_cannot_be_read() -> None:
    bench = Bench()
    for kind in ("often", "rare", "often"):
        bench.profiles.kinds.update(kind)
    bench.profiles.operator.promote(bench.profiles.operator.import_profile(helpful()))
    bench.profiles.writer.save()
    stored = stored_serving(bench.store.read().states, pytest.fail)
    write_state(bench.store, SERVING_KEY, replace(stored, table='{"counts": {}, "followed": []}'), SCHEMA)
    again = bench.restart(crash=True)
    again.profiles.set_model_pair(MODEL, V)
    assert set(again.profiles.serving.version_by_kind) == {REST_KIND, "often", "rare"}
    assert "roll_back" not in again.decisions()


def test_windows_that_were_begun_stay_spent_where_tests_cannot_be_read() -> None:
    bench = Bench()
    bench.promote()
    bench.profiles.writer.save()
    begun = bench.profiles.trials.guard.windows[REST_KIND]
    bench.store.set_state(TESTS_KEY, "{")
    again = bench.restart(crash=True)
    assert again.profiles.trials.guard.windows[REST_KIND] == begun + 1


@pytest.mark.parametrize("stored", ['{"schema": 1}', '{"schema": 99, "tests": []}', "not JSON"])
def test_numbers_of_tests_and_windows_are_recovered_where_nothing_else_can_be_read(stored: str) -> None:
    bench = Bench()
    version = bench.promote()
    before = bench.profiles.trials.tests_begun, dict(bench.profiles.trials.guard.windows)
    assert before[0] > 0
    assert before[1] == {REST_KIND: 1}
    for key in (TESTS_KEY, SERVING_KEY):
        bench.store.set_state(key, stored)
    again = bench.restart(crash=True)
    again.profiles.set_model_pair(MODEL, V)
    assert (again.profiles.trials.tests_begun, dict(again.profiles.trials.guard.windows)) == before
    again.profiles.operator.promote(version)
    assert again.profiles.trials.guard.windows == {REST_KIND: 2}


def test_nothing_is_decided_before_the_number_of_the_test_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    with monkeypatch.context() as away:
        away.setattr(DirectWrites, "has_written", lambda *_: False)
        version = bench.profiles.operator.import_profile(helpful())
        bench.feed(BIASED, JUDGED[:-3])
        assert bench.profiles.trials.tested_versions == [version]
        assert bench.profiles.serving.selected is None
    bench.feed(BIASED, JUDGED[-3:])
    assert bench.profiles.serving.selected == version


def test_a_restart_deletes_the_oldest_profiles_of_a_store_that_grew_too_large() -> None:
    bench = Bench()
    for seed in range(MAX_PROFILES + 5):
        profile = harmful(seed=seed)
        bench.store.put_profile(StoredProfile(profile.version, profile.to_bytes(), float(seed)))
    oldest = bench.store.profiles()[-1].version
    kind = StoredKind(oldest, 300, False, False, "", 5, [], 0)
    served = StoredServing("", {REST_KIND: kind}, [])
    write_state(bench.store, SERVING_KEY, served, SCHEMA)
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.version == oldest
    assert again.status()["selected"]["window"] == 300
    assert len(bench.store.profiles()) == MAX_PROFILES + 1


def test_tests_and_windows_go_on_after_a_restart() -> None:
    bench = Bench()
    bench.profiles.operator.import_profile(harmful())
    bench.promote()
    bench.feed(BIASED, JUDGED[:40])
    before = bench.status()
    assert before["tests_begun"]["candidate"] >= 3
    [kind] = before["kinds"]
    assert kind["candidates"][0]["units"] > 0
    assert kind["watch"]["units"] > 0
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.status()["kinds"] == before["kinds"]
    assert again.status()["tests_begun"] == before["tests_begun"]
    again.feed(BIASED, JUDGED[:40])
    units = again.status()["kinds"][0]["watch"]["units"]
    assert units == kind["watch"]["units"], "units that counted are remembered"


def test_spent_alpha_stays_spent_after_a_crash() -> None:
    """Where the process ended before it had written its tests, they begin anew, with the alpha that is left."""
    bench = Bench()
    bench.promote()
    bench.profiles.operator.import_profile(harmful())
    before = bench.status()["tests_begun"]["candidate"]
    again = bench.restart(crash=True)
    again.profiles.set_model_pair(MODEL, V)
    [candidate] = again.status()["kinds"][0]["candidates"]
    assert candidate["test"] == before + 1
    assert candidate["alpha"] == pytest.approx(0.05 / (candidate["test"] * (candidate["test"] + 1)))


def test_a_useless_profile_does_not_outlast_its_window_by_restarts() -> None:
    """Restarted every 90 held-out requests, a window of 200 ends all the same."""
    bench = Bench()
    bench.feed(BIASED, JUDGED[:1])
    useless = temperature_bias(MODEL, V, 1.0, np.zeros(V), 1.0)
    bench.profiles.operator.promote(bench.profiles.operator.import_profile(useless))
    bench.profiles.serving.kinds[REST_KIND].window = 200
    bench.profiles.trials.watch(REST_KIND)
    fed = 0
    while bench.serves() and fed < 1000:
        fed += bench.feed(EVEN, JUDGED[fed : fed + 90], lambda bench=bench: not bench.serves())  # type: ignore[misc]
        bench = bench.restart()
        bench.profiles.set_model_pair(MODEL, V)
    assert fed == 200
    assert bench.last("roll_back")["reason"] == "unsupported"


@pytest.mark.parametrize("key", STATE_KEYS)
def test_a_damaged_state_ends_nothing(key: str) -> None:
    bench = Bench()
    bench.promote()
    bench.profiles.writer.save()
    bench.store.set_state(key, "{")
    again = bench.restart(crash=True)
    again.profiles.set_model_pair(MODEL, V)
    again.feed(BIASED, JUDGED[:5])
    assert again.serves() is (key != SERVING_KEY)
    if key == SERVING_KEY:
        event = again.last("roll_back")
        assert (event["reason"], event["version"]) == ("lost", IDENTITY)
        assert again.restart(crash=True).decisions().count("roll_back") == 1


EARLIER_BLOB = (
    b'\xc8\x02\0\0\0\0\0\0{"__metadata__":{"learned":"{\\"format\\": \\"hemostat.temperature_bias.1\\", '
    b'\\"about\\": \\"{\\\\\\"compressed\\\\\\": \\\\\\"m\\\\\\"}\\", \\"learner\\": \\"TemperatureBiasLearner('
    b"clamp_nats=1.0, pseudo_mass=3.0, pseudo_information=200.0, min_requests=32, min_tokens=2000, "
    b'half_life_tokens=None)\\", \\"states\\": [{\\"name\\": \\"\\", \\"model\\": \\"m\\", \\"vocab_size\\": 4, '
    b'\\"information\\": 0.0, \\"moment\\": 0.0, \\"depth\\": 0.0, \\"deep_tokens\\": 0.0, \\"weight\\": 0.0, '
    b'\\"tokens\\": 0, \\"requests\\": 0}], \\"notes\\": \\"{\\\\\\"proposed_at\\\\\\": {\\\\\\"\\\\\\": '
    b'{\\\\\\"contextual\\\\\\": 100000, \\\\\\"adapter\\\\\\": 40000, \\\\\\"temperature_bias\\\\\\": 2000}}, '
    b'\\\\\\"weights\\\\\\": \\\\\\"abc\\\\\\"}\\"}"},"0.masses":{"dtype":"F32","shape":[2,4],'
    b'"data_offsets":[0,32]}}       ' + 32 * b"\0"
)
"""A blob that a store with schema 1 may have in place of the state `proposed`: proposals after 100,000 and 40,000
tokens."""


def after_upgrade(blob: bytes | None) -> Bench:
    """A bench after a restart on the store of an earlier version, with that version's blob."""
    bench = Bench(known=False)
    for key, text in upgraded(bench.store.read().states, {} if blob is None else {PROPOSED_BLOB: blob}).items():
        bench.store.set_state(key, text)
    result = bench.store.read()
    bench.profiles.restoring.restore(result.profiles, result.states, result.events)
    bench.profiles.set_model_pair(MODEL, V)
    return bench


def test_an_upgrade_keeps_from_how_many_tokens_each_family_was_last_proposed() -> None:
    bench = after_upgrade(EARLIER_BLOB)
    for each in (bench, bench.restart()):
        each.profiles.set_model_pair(MODEL, V)
        proposals = each.profiles.proposals
        assert [proposals.accepts(CONTEXTUAL, 199_999), proposals.accepts(CONTEXTUAL, 200_000)] == [False, True]
        assert [proposals.accepts(ADAPTER, 79_999), proposals.accepts(ADAPTER, 80_000)] == [False, True]


@pytest.mark.parametrize(
    "blob", [None, b"", b"damaged", EARLIER_BLOB[:200], EARLIER_BLOB.replace(b"100000", b"'00000")]
)
def test_a_damaged_store_of_an_earlier_version_ends_nothing(blob: bytes | None) -> None:
    assert after_upgrade(blob).profiles.proposals.accepts(CONTEXTUAL, 1_000)


def test_a_proposal_is_remembered_over_a_restart_until_the_model_is_another() -> None:
    bench = Bench()
    bench.profiles.proposals.propose(contextual(), "", {"tokens": 100_000})
    bench.profiles.lifecycle.drop(bench.profiles.trials.tested[0], Reason.UNPROVEN, "")
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert not again.profiles.proposals.accepts(CONTEXTUAL, 199_999)
    assert again.profiles.proposals.accepts(CONTEXTUAL, 200_000)
    again.profiles.set_model_pair("another", V)
    last = again.restart()
    last.profiles.set_model_pair("another", V)
    assert last.profiles.proposals.accepts(CONTEXTUAL, 1_000)
