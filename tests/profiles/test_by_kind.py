"""A profile serves a kind of traffic only on evidence of this kind, and leaves it by itself."""

from __future__ import annotations

import json

import pytest
from tests.support.profile_bench import BIASED, EVEN, JUDGED, LEARNED, MODEL, Bench, contextual, harmful, helpful
from tests.support.world import V, World

from hemostat.config.schema import Evidence
from hemostat.engines.reports import MAX_HELD_VERSIONS
from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.decisions import Reason
from hemostat.profiles.serving import MAX_SERVING_VERSIONS
from hemostat.report.formats import duration
from hemostat_calibration.errors import HemostatError

OPPOSITE = World()
OPPOSITE.bias = -BIASED.bias


class Mix:
    """Two kinds: what removes the bias of A harms B, which is one request in ten."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.fed = 0

    def feed(self, requests: int) -> None:
        for _ in range(requests):
            b = self.fed % 10 == 9
            self.bench.feed(OPPOSITE if b else BIASED, [JUDGED[self.fed]], kind="B" if b else "A")
            self.fed += 1


def kind(bench: Bench, name: str) -> dict[str, object]:
    [result] = [each for each in bench.status()["kinds"] if each["kind"] == name]
    return result  # type: ignore[no-any-return]


def test_a_profile_that_helps_one_kind_and_harms_another_serves_only_the_first() -> None:
    bench = Bench()
    mix = Mix(bench)
    mix.feed(20)
    version = bench.profiles.operator.import_profile(helpful())
    mix.feed(1000)
    assert bench.profiles.serving.version_by_kind == {"A": version}
    event = bench.last("promote")
    assert (event["kind"], event["evidence"]["kind"]) == ("A", "A")
    assert bench.profiles.trials.running_kinds(bench.profiles.trials.tested[0]) == ["B"], "it goes on being tested"
    assert str(kind(bench, "A")["summary"]).startswith(f"{version[:8]} serves")
    assert "its gain is not above 0 so far" in str(kind(bench, "B")["summary"])
    bench.profiles.lifecycle.drop(bench.profiles.trials.tested[0], Reason.NEWER, "replaced")
    assert bench.last("drop")["why"] == "replaced; it serves on where it was proven"
    assert bench.profiles.serving.version_by_kind == {"A": version}


def test_a_kind_that_is_harmed_returns_to_identity_while_the_others_keep_their_profile() -> None:
    bench = Bench()
    mix = Mix(bench)
    mix.feed(20)
    version = bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.promote(version)
    began = bench.profiles.serving.kinds["B"].units
    while bench.profiles.serving.kinds["B"].version is not None and mix.fed < 2000:
        mix.feed(10)
    assert bench.profiles.serving.kinds["B"].units - began <= 60
    event = bench.last("roll_back")
    assert (event["kind"], event["reason"], event["version"]) == ("B", "harm", version)
    mix.feed(200)
    assert bench.profiles.serving.version_by_kind == {"A": version, REST_KIND: version}
    assert [c for c in bench.profiles.trials.tested if "B" in bench.profiles.trials.running_kinds(c)] == []
    bench.profiles.operator.roll_back("asked for", "A")
    assert bench.profiles.serving.version_by_kind == {REST_KIND: version}


def test_what_serves_is_tested_in_a_kind_that_appears_later() -> None:
    bench = Bench()
    bench.feed(BIASED, JUDGED[:2], kind="A")
    version = bench.profiles.operator.import_profile(helpful())
    bench.feed(BIASED, JUDGED[2:], lambda: bool(bench.profiles.serving.version_by_kind), kind="A")
    assert bench.profiles.trials.tested == [], "it serves all kinds there are"
    fed = bench.feed(BIASED, JUDGED, lambda: len(bench.profiles.serving.version_by_kind) > 1, kind="C")
    assert fed > 5, "on evidence of its own"
    assert bench.profiles.serving.version_by_kind == {"A": version, "C": version}
    assert bench.last("promote")["evidence"]["test"] == 2


def test_all_kinds_of_a_candidate_are_one_test() -> None:
    bench = Bench()
    for name in "ABC":
        bench.feed(BIASED, JUDGED[:4], kind=name)
    bench.profiles.operator.import_profile(helpful())
    assert bench.status()["tests_begun"]["candidate"] == 1
    assert len(bench.profiles.trials.running_kinds(bench.profiles.trials.tested[0])) == 3


def test_twenty_kinds_are_bounded_and_all_others_are_the_rest() -> None:
    bench = Bench(evidence=Evidence(kinds=20))
    for n in range(60):
        bench.feed(BIASED, JUDGED[n : n + 1], kind=f"k{n}")
    assert len(bench.profiles.serving.kinds) == 21
    assert bench.profiles.serving.kinds[REST_KIND].units == 40
    assert len(bench.status()["kinds"]) == 21
    metrics = [sample for sample in bench.profiles.samples() if sample.name == "hemostat_profile_kind_info"]
    assert len(metrics) == 21
    bench.profiles.operator.import_profile(helpful())
    for n, key in enumerate(JUDGED[60:400]):
        bench.feed(BIASED, [key], kind=f"other{n}")
    assert bench.profiles.serving.version_by_kind.keys() == {REST_KIND}


def test_a_kind_that_loses_its_place_loses_what_served_it() -> None:
    bench = Bench(evidence=Evidence(kinds=1))
    bench.feed(BIASED, JUDGED[:2], kind="A")
    version = bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.promote(version, "A")
    bench.feed(EVEN, LEARNED[:60], kind="B")
    event = bench.last("roll_back")
    assert (event["kind"], event["reason"]) == ("A", "evicted")
    assert bench.profiles.serving.version_by_kind == {}
    assert bench.profiles.serving.kinds.keys() == {"B", REST_KIND}
    bench.feed(BIASED, JUDGED[2:6], kind="A")
    assert bench.profiles.serving.kinds[REST_KIND].units == 4, "its requests belong to the rest"


def test_what_was_rolled_back_is_remembered_for_a_kind_that_comes_back() -> None:
    bench = Bench(evidence=Evidence(kinds=1))
    bench.feed(BIASED, JUDGED[:2], kind="A")
    version = bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.promote(version, "A")
    bench.profiles.operator.roll_back("it did not help", "A")
    bench.feed(EVEN, LEARNED[:60], kind="B")
    assert bench.profiles.serving.kinds.keys() == {"B", REST_KIND}
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    again.feed(EVEN, LEARNED[60:360], kind="A")
    assert again.profiles.serving.kinds["A"].tried == [version]
    again.feed(BIASED, JUDGED[2:4], kind="A")
    trials = again.profiles.trials
    assert not any(c.version == version and "A" in trials.evidence_by_kind(c) for c in trials.queue)
    again.profiles.operator.import_profile(helpful())
    assert again.profiles.serving.kinds["A"].tried == [], "an operator may try it again"
    assert not again.profiles.serving.former


def test_a_kind_that_comes_out_of_the_rest_keeps_what_an_operator_chose() -> None:
    bench = Bench()
    version = bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.promote(version)
    bench.feed(EVEN, LEARNED[:1], kind="A")
    assert bench.profiles.serving.version_by_kind == {REST_KIND: version, "A": version}
    assert kind(bench, "A")["watch"] is not None, "it is watched"


def test_a_kind_that_comes_out_of_the_rest_has_no_evidence_of_its_own() -> None:
    bench = Bench()
    bench.promote()
    bench.feed(BIASED, LEARNED[:1], kind="A")
    assert bench.profiles.serving.version_by_kind.keys() == {REST_KIND}


def test_harm_to_an_outcome_holds_the_kind_at_identity_until_it_is_released() -> None:
    bench = Bench(evidence=Evidence(kinds=1))
    bench.feed(BIASED, JUDGED[:2], kind="A")
    version = bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.promote(version)
    bench.profiles.lifecycle.roll_back("A", Reason.OUTCOMES, "valid JSON fell from 38 to 10 %", {"control": [38, 100]})
    event = bench.last("roll_back")
    assert (event["kind"], event["reason"], event["evidence"]) == ("A", "outcomes", {"control": [38, 100]})
    other = bench.profiles.operator.import_profile(helpful(1))
    bench.feed(BIASED, JUDGED[2:300], kind="A")
    assert bench.profiles.serving.kinds["A"].version is None, "whatever the divergence says"
    assert "held at identity until an operator releases it: valid JSON fell" in str(kind(bench, "A")["summary"])
    bench.feed(EVEN, LEARNED[:200], kind="B")
    assert "A" in bench.profiles.serving.kinds, "it cannot lose its place, and with it the hold"
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.held == {"A"}
    again.profiles.operator.release("A")
    assert again.last("release")["kind"] == "A"
    with pytest.raises(HemostatError, match="nothing is held"):
        again.profiles.operator.release()
    again.feed(BIASED, JUDGED[300:], lambda: again.profiles.serving.kinds["A"].version is not None, kind="A")
    assert again.profiles.serving.kinds["A"].version == other


def test_what_is_under_test_where_an_outcome_was_harmed_does_not_go_on_there() -> None:
    """Its gains until then were over what served, and nothing may be promoted while the kind is held."""
    bench = Bench()
    bench.feed(BIASED, JUDGED[:1])
    bench.profiles.operator.promote(bench.profiles.operator.import_profile(helpful()))
    bench.profiles.operator.import_profile(helpful(1))
    bench.feed(BIASED, JUDGED[1:20])
    assert kind(bench, REST_KIND)["candidates"]
    bench.profiles.lifecycle.roll_back(REST_KIND, Reason.OUTCOMES, "harm", {})
    assert kind(bench, REST_KIND)["candidates"] == []


def test_a_promotion_by_the_operator_ends_a_hold() -> None:
    bench = Bench()
    version = bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.promote(version)
    bench.profiles.lifecycle.roll_back(REST_KIND, Reason.OUTCOMES, "why", {})
    bench.profiles.lifecycle.roll_back("not followed", Reason.OUTCOMES, "why", {})
    assert bench.profiles.serving.held == {REST_KIND}
    bench.profiles.operator.promote(version, REST_KIND)
    assert bench.profiles.serving.held == set()


def test_pins_are_by_kind() -> None:
    bench = Bench()
    bench.feed(BIASED, JUDGED[:1], kind="A")
    bad = bench.profiles.operator.import_profile(harmful())
    bench.profiles.operator.pin(bad, "A")
    assert bench.profiles.serving.version_by_kind == {"A": bad}
    bench.feed(BIASED, JUDGED[1:200], kind="A")
    assert bench.profiles.serving.version_by_kind == {"A": bad}
    with pytest.raises(HemostatError, match="nothing is pinned"):
        bench.profiles.operator.unpin(REST_KIND)
    bench.profiles.operator.unpin("A")
    bench.feed(BIASED, JUDGED[200:500], kind="A")
    assert bench.last("roll_back")["kind"] == "A"


def test_the_number_of_profiles_that_serve_is_bounded_and_engines_hold_them_all() -> None:
    bench = Bench()
    made = [contextual(0.1 * n) for n in range(1, MAX_SERVING_VERSIONS + 4)]
    for n, profile in enumerate(made):
        bench.feed(BIASED, JUDGED[:1], kind=f"k{n}")
        bench.profiles.operator.import_profile(profile)
    for n, profile in enumerate(made[:MAX_SERVING_VERSIONS]):
        bench.profiles.operator.promote(profile.version, f"k{n}")
    with pytest.raises(HemostatError, match="4 other profiles serve, as many as may"):
        bench.profiles.operator.promote(made[-1].version, f"k{MAX_SERVING_VERSIONS}")
    bench.profiles.operator.promote(made[-1].version, "k0")
    assert len(bench.profiles.engine_versions()) <= MAX_HELD_VERSIONS
    assert set(bench.profiles.serving.versions) <= set(bench.profiles.engine_versions())


def test_a_candidate_that_is_proven_waits_where_too_many_profiles_serve() -> None:
    bench = Bench()
    for n in range(MAX_SERVING_VERSIONS):
        bench.feed(BIASED, JUDGED[:1], kind=f"k{n}")
        bench.profiles.operator.promote(bench.profiles.operator.import_profile(contextual(0.1 * n + 0.1)), f"k{n}")
    bench.profiles.trials.remove(lambda _: True)
    version = bench.profiles.operator.import_profile(helpful())
    bench.feed(BIASED, JUDGED[:400], kind="new")
    assert bench.profiles.serving.kinds["new"].version is None
    result = kind(bench, "new")["candidates"]
    assert isinstance(result, list)
    [summary] = [c["summary"] for c in result if c["version"] == version]
    assert summary == "proven, but 4 other profiles serve, as many as may at a time"
    bench.profiles.operator.roll_back("asked for", "k0")
    bench.feed(BIASED, JUDGED[400:401], kind="new")
    assert bench.profiles.serving.kinds["new"].version is not None


def test_the_status_says_in_words_what_a_kind_lacks() -> None:
    bench = Bench()
    bench.feed(EVEN, LEARNED[:1], kind="A")
    assert kind(bench, "A")["summary"] == "identity; no held-out conversation yet"
    bench.feed(BIASED, JUDGED[:1], kind="A")
    assert kind(bench, "A")["summary"] == "identity; no profile is under test here"
    assert bench.status()["next_decision"] == ""
    version = bench.profiles.operator.import_profile(contextual(0.3))
    assert str(kind(bench, "A")["summary"]).endswith("no held-out conversation of this kind yet")
    assert bench.status()["next_decision"] == f"profile {version[:8]}: waits for its first held-out conversation"
    while True:
        bench.feed(BIASED, JUDGED[int(bench.time) : int(bench.time) + 1], kind="A")
        result = kind(bench, "A")["candidates"]
        assert isinstance(result, list)
        if not result or result[0]["units_needed"] is not None:
            break
    assert result, "it is not yet proven"
    needed = result[0]["units_needed"]
    assert f"needs about {needed} more with gains like these" in result[0]["summary"]
    units = result[0]["units"]
    said = (
        f"profile {version[:8]}: {units} of about {units + needed} conversations of A, {duration(float(needed))} left"
    )
    assert bench.status()["next_decision"] == said, "a conversation came in each second"
    more = bench.feed(BIASED, JUDGED[500:], lambda: bench.profiles.serving.kinds["A"].version == version, kind="A")
    assert 0.2 * needed < more < 5 * needed
    assert json.loads(json.dumps(bench.status(), allow_nan=False)) == bench.status()


def test_a_client_contributes_a_limited_part_of_a_test() -> None:
    bench = Bench()
    bench.feed(BIASED, JUDGED[:1], kind="A")
    bench.profiles.operator.import_profile(contextual(0.2))
    for n, key in enumerate(JUDGED[1:81]):
        bench.feed(BIASED, [key], kind="A", client=b"one" if n % 2 else b"client %d" % (n % 10))
    result = kind(bench, "A")["candidates"]
    assert isinstance(result, list)
    [candidate] = result
    assert candidate["client_share_active"]
    assert kind(bench, "A")["client_share"] == f"active: 6 clients, at most 25% each, {candidate['refused']} refused"
    assert candidate["refused"] > 10
    assert candidate["units"] < 70
