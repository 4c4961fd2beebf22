"""The life of profiles on synthetic worlds: nothing serves unproven, and no record that was learned from is proof."""

from __future__ import annotations

import json

import pytest
from tests.support.profile_bench import BIASED, EVEN, JUDGED, LEARNED, MODEL, Bench, contextual, harmful
from tests.support.temperature_bias import TEMPERATURE_BIAS
from tests.support.world import V, World

from hemostat.ipc.messages import REST_KIND
from hemostat_calibration.profiles.profile import CalibrationProfile


def halved() -> World:
    """Here a profile that removes the whole bias of the biased world does as much harm as good."""
    world = World()
    world.bias = 0.5 * BIASED.bias
    return world


def test_a_record_is_learned_from_or_judged_by_never_both() -> None:
    bench = Bench()
    bench.learn()
    for learned in LEARNED[:5]:
        record = bench.record(BIASED.truth(0), learned)
        assert bench.profiles.learns_from(record)
        bench.observe(record)
    assert [c["requests"] for c in bench.status()["candidates"]] == [0], "what is learned from is no evidence"
    assert not any(bench.profiles.learns_from(bench.record(BIASED.truth(0), judged)) for judged in JUDGED[:5])
    bench.feed(BIASED, JUDGED[:5])
    assert [c["requests"] for c in bench.status()["candidates"]] == [5]


def test_a_helpful_candidate_is_promoted_with_its_evidence_and_stored() -> None:
    bench = Bench()
    version = bench.promote()
    profiles = bench.profiles
    assert profiles.serving.version == version
    assert bench.decisions() == ["propose", "promote"]
    event = bench.last("promote")
    assert event["version"] == version
    assert event["at"] == bench.time
    evidence = event["evidence"]
    assert evidence["log_e_adjusted"] >= evidence["needed"] > 0.0
    assert evidence["mean_gain"] > 0.0
    assert evidence["mean_gain_by_token"] > 0.0
    assert evidence["units"] >= 5
    assert event["kind"] == REST_KIND
    assert json.loads(json.dumps(event, allow_nan=False)) == event
    assert version in (bench.store.get_state("kinds") or "")
    kept = bench.store.get_profile(version)
    assert kept is not None
    assert CalibrationProfile.from_bytes(kept.data, version).version == version
    assert sorted(p["state"] for p in profiles.report.listing()["profiles"]) == ["selected"]


def test_in_observe_nothing_serves() -> None:
    bench = Bench(mode="observe")
    version = bench.promote()
    assert bench.profiles.serving.version is None
    assert bench.profiles.serving.reported == version, "what it would win back is reported"
    bench.profiles.operator.set_mode("auto")
    assert bench.profiles.serving.version == version


def test_a_useless_or_harmful_profile_is_not_promoted() -> None:
    bench = Bench()
    bench.profiles.operator.import_profile(harmful())
    bench.feed(EVEN, JUDGED[:250])
    assert bench.profiles.serving.selected is None
    assert "promote" not in bench.decisions()
    candidates = bench.status()["candidates"]
    assert candidates[0]["mean_gain"] < -0.05
    assert candidates[0]["requests"] == 250


def test_a_profile_that_becomes_harmful_is_rolled_back() -> None:
    bench = Bench()
    version = bench.promote()
    opposite = World()
    opposite.bias = -BIASED.bias
    fed = bench.feed(opposite, JUDGED, lambda: not bench.serves())
    assert fed < 300
    assert bench.profiles.serving.version is None
    event = bench.last("roll_back")
    assert event["version"] == version
    assert event["evidence"]["mean_gain"] < 0
    assert event["evidence"]["log_e"] >= event["evidence"]["needed"]
    assert bench.decisions().count("roll_back") == 1
    assert bench.restart().profiles.serving.selected is None


def test_a_profile_that_no_longer_helps_is_rolled_back_as_unsupported() -> None:
    bench = Bench()
    bench.profiles.proposals.propose(contextual(), "", {"tokens": 1})
    bench.feed(BIASED, JUDGED, bench.serves)
    window = bench.status()["selected"]["window"]
    bench.feed(BIASED, JUDGED[:window])
    assert bench.status()["selected"]["supported"]
    fed = bench.feed(halved(), JUDGED[window:], lambda: not bench.serves())
    assert fed == window
    event = bench.last("roll_back")
    assert event["reason"] == "unsupported"
    assert event["evidence"]["units"] == window
    assert event["evidence"]["log_e"] < event["evidence"]["needed"], "no proof of harm"
    assert bench.profiles.events.counts["roll_back", "unsupported"] == 1


def test_off_ends_serving_learning_and_judging_at_once() -> None:
    bench = Bench()
    bench.promote()
    judged = bench.status()["selected"]["requests"]
    bench.profiles.operator.set_mode("off")
    assert bench.profiles.serving.version is None
    assert bench.profiles.serving.reported is None
    assert bench.profiles.evaluated_profiles() == ()
    bench.feed(BIASED, JUDGED[:20])
    assert not bench.profiles.learns_from(bench.record(BIASED.truth(0), LEARNED[0]))
    assert bench.status()["selected"]["requests"] == judged
    assert bench.last("mode")["why"] == "set to off by the operator"


def test_another_model_restarts_proposals() -> None:
    bench = Bench()
    bench.learn(tokens=10_000)
    assert not bench.profiles.proposals.accepts(TEMPERATURE_BIAS, 1_000)
    bench.profiles.set_model_pair("another", V)
    assert bench.profiles.trials.tested_versions == []
    assert bench.profiles.proposals.accepts(TEMPERATURE_BIAS, 1_000)


@pytest.mark.parametrize(("model", "vocabulary"), [("another", V), (MODEL, V + 1)])
def test_another_model_rolls_back_what_served(model: str, vocabulary: int) -> None:
    bench = Bench()
    bench.promote()
    again = bench.restart()
    again.profiles.set_model_pair(model, vocabulary)
    assert again.profiles.serving.selected is None
    assert again.decisions()[-1] == "roll_back"
    assert again.profiles.engine_versions() == []


def test_another_model_ends_a_pin() -> None:
    bench = Bench()
    bench.profiles.operator.pin(bench.profiles.operator.import_profile(harmful()))
    bench.profiles.set_model_pair("another", V)
    assert (bench.profiles.serving.selected, bench.profiles.serving.pinned) == (None, False)
    assert bench.restart().profiles.serving.pinned is False


def test_what_the_engine_does_not_apply_as_it_should_is_neither_tested_nor_serves_unless_it_is_pinned() -> None:
    bench = Bench()
    version = bench.promote()
    bench.profiles.lifecycle.reject(version, "another model")
    assert bench.profiles.serving.version is None
    assert (bench.last("roll_back")["reason"], bench.last("roll_back")["why"]) == ("probe", "another model")
    bench = Bench()
    bench.learn()
    bench.profiles.operator.import_profile(harmful())
    tested = [candidate.version for candidate in bench.profiles.trials.queue]
    bench.profiles.lifecycle.reject(tested[0], "another model")
    assert [candidate.version for candidate in bench.profiles.trials.queue] == tested[1:]
    assert bench.last("drop")["reason"] == "probe"
    bench = Bench()
    version = bench.promote()
    for state in bench.profiles.serving.kinds.values():
        state.pinned = True
    bench.profiles.lifecycle.reject(version, "another model")
    assert bench.profiles.serving.version == version
