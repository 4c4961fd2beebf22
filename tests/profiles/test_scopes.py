"""Profiles of single labels, routes and models beside the pooled one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.profile_bench import BIASED, JUDGED, LEARNED, MODEL, Bench, contextual, harmful, helpful
from tests.support.world import V, World

from hemostat.profiles.scopes import MAX_SCOPE_PROFILES, MAX_SCOPES
from hemostat_calibration.errors import HemostatError


def test_a_label_gets_a_profile_of_its_own_where_it_is_proven_better_there() -> None:
    """Two labels whose models are off in opposite directions: nothing helps both."""
    bench = Bench(scope="label")
    opposite = World()
    opposite.bias = -BIASED.bias
    for n in range(60):
        bench.feed(BIASED, LEARNED[2 * n : 2 * n + 1], label="a")
        bench.feed(opposite, LEARNED[2 * n + 1 : 2 * n + 2], label="b")
    found = {(c["scope"], c["source"]) for c in [*bench.status()["candidates"]]}
    found |= {(c["scope"], c["source"]) for c in bench.status()["waiting"]}
    assert ("a", "temperature_bias") in found

    def served() -> bool:
        return "a" in bench.profiles.serving.version_by_scope

    for n, key in enumerate(JUDGED):
        if served():
            break
        bench.feed(BIASED if n % 2 else opposite, [key], label="a" if n % 2 else "b")
    assert served()
    own = bench.profiles.serving.version_by_scope["a"]
    assert bench.profiles.serving.version != own
    event = bench.last("promote")
    assert (event["scope"], event["version"]) == ("a", own)
    record = bench.record(BIASED.truth(0), JUDGED[0])
    pooled = bench.profiles.serving.version
    for label, expected in (("a", own), ("b", bench.profiles.serving.version_by_scope.get("b", pooled)), ("", pooled)):
        stage = bench.profiles.calibrated_profile(replace(record, label=label))
        assert (stage.version if stage else None) == expected
    status = bench.status()
    assert status["scopes"]["a"]["version"] == own
    assert own in bench.profiles.engine_versions()
    again = bench.restart(scope="label")
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.version_by_scope == bench.profiles.serving.version_by_scope
    for_all = bench.restart()
    for_all.profiles.set_model_pair(MODEL, V)
    assert for_all.profiles.serving.version_by_scope == {}, "all is pooled now"
    bench.feed(opposite, JUDGED[500:], lambda: not served(), label="a")
    assert bench.last("roll_back")["scope"] == "a"
    assert bench.store.get_state("serving") is not None


def test_the_evidence_for_a_label_is_of_its_requests_and_over_what_serves_there() -> None:
    bench = Bench(scope="label")
    bench.feed(BIASED, JUDGED[:1], label="a")
    version = bench.profiles.operator.import_profile(helpful(), "a")
    bench.feed(BIASED, JUDGED[1:4], label="a")
    bench.feed(BIASED, JUDGED[4:9], label="b")
    [candidate] = bench.status()["candidates"]
    assert (candidate["scope"], candidate["requests"]) == ("a", 3)
    other = bench.profiles.operator.import_profile(contextual(0.3))
    bench.profiles.operator.promote(other)
    [candidate] = bench.status()["candidates"]
    assert candidate["requests"] == 0, "what it has to be better than is another now"
    bench.feed(BIASED, JUDGED[10:], lambda: "a" in bench.profiles.serving.version_by_scope, label="a")
    assert bench.profiles.serving.version_by_scope == {"a": version}
    assert bench.profiles.serving.version == other


def test_the_pooled_profile_is_tested_against_a_labels_own() -> None:
    bench = Bench(scope="label")
    bench.feed(BIASED, JUDGED[:1], label="a")
    weak = bench.profiles.operator.import_profile(contextual(0.1), "a")
    bench.profiles.operator.promote(weak, "a")
    strong = bench.profiles.operator.import_profile(contextual(1.0))
    bench.profiles.operator.promote(strong)
    assert [(c["scope"], c["source"]) for c in bench.status()["candidates"]] == [("a", "pooled")]
    bench.feed(BIASED, JUDGED[1:], lambda: not bench.profiles.serving.version_by_scope, label="a")
    assert bench.profiles.serving.version_by_scope == {}
    assert bench.last("promote")["version"] == strong
    bench.profiles.operator.promote(weak, "a")
    bench.profiles.operator.roll_back("asked for", "a")
    assert (bench.profiles.serving.version, bench.profiles.serving.version_by_scope) == (strong, {})
    assert bench.profiles.trials.tested_versions == []
    bench.profiles.operator.promote(weak, "a")
    bench.profiles.operator.pin(weak)
    assert (bench.profiles.serving.version, bench.profiles.serving.version_by_scope) == (weak, {}), "pinned for all"
    bench.profiles.operator.unpin()
    assert bench.profiles.serving.version_by_scope == {"a": weak}
    bench.profiles.operator.roll_back("asked for")
    assert (bench.profiles.serving.version, bench.profiles.serving.version_by_scope) == (None, {})


@pytest.mark.parametrize("how", ["unpin", "rollback"])
def test_evidence_over_a_pinned_profile_does_not_count_over_a_labels_own(how: str) -> None:
    bench = Bench(scope="label")
    bench.feed(BIASED, JUDGED[:1], label="a")
    own = bench.profiles.operator.import_profile(helpful(), "a")
    bench.profiles.operator.promote(own, "a")
    version = bench.profiles.operator.import_profile(contextual(0.3), "a")
    bench.profiles.operator.pin(bench.profiles.operator.import_profile(harmful()))
    bench.feed(BIASED, JUDGED[1:400], label="a")
    [candidate] = [c for c in bench.status()["candidates"] if c["version"] == version]
    assert candidate["requests"] > 0
    assert candidate["lower"] > 0, "better than the pinned one"
    if how == "unpin":
        bench.profiles.operator.unpin()
    else:
        bench.profiles.operator.roll_back("asked for", "")
    assert bench.profiles.serving.version_by_scope == {"a": own}
    [candidate] = [c for c in bench.status()["candidates"] if c["version"] == version]
    assert candidate["requests"] == 0
    bench.feed(BIASED, JUDGED[400:420], label="a")
    assert bench.profiles.serving.version_by_scope == {"a": own}, "it is weaker"


def test_scopes_are_bounded_and_must_have_been_seen() -> None:
    bench = Bench(scope="label")
    for n in range(MAX_SCOPES + 5):
        bench.feed(BIASED, JUDGED[:1], label=f"l{n}")
    assert len(bench.status()["scopes"]) == MAX_SCOPES
    profiles = [bench.profiles.operator.import_profile(contextual(0.1 * n)) for n in range(1, MAX_SCOPE_PROFILES + 2)]
    for n, version in enumerate(profiles[:-1]):
        bench.profiles.operator.promote(version, f"l{n}")
    with pytest.raises(HemostatError, match="as many as engines hold"):
        bench.profiles.operator.promote(profiles[-1], f"l{MAX_SCOPE_PROFILES}")
    assert not bench.profiles.proposals.accepts(10**6, f"l{MAX_SCOPE_PROFILES}")
    assert bench.profiles.proposals.accepts(10**6, "l0")
    bench.profiles.operator.promote(profiles[-1], "l0")
    with pytest.raises(HemostatError, match="no scored request was of the label 'x'; seen: l0"):
        bench.profiles.operator.promote(profiles[-1], "x")
    with pytest.raises(HemostatError, match=r"calibration\.scope is pooled"):
        Bench().profiles.operator.import_profile(helpful(), "x")
    assert not Bench().profiles.proposals.accepts(1, "x")


@pytest.mark.parametrize(("kind", "place"), [("route", "/v1/completions"), ("model", "m"), ("label", "chat")])
def test_the_scope_is_read_from_the_record(kind: str, place: str) -> None:
    bench = Bench(scope=kind)
    bench.feed(BIASED, LEARNED[:1], route="/v1/completions", model="m", label="chat")
    assert list(bench.status()["scopes"]) == [place]
