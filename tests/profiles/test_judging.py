"""What counts as evidence for a profile."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.evidence import evidence
from tests.support.profile_bench import (
    ANCHORS,
    BIASED,
    EVEN,
    JUDGED,
    LEARNED,
    MODEL,
    Bench,
    contextual,
    harmful,
    helpful,
)
from tests.support.records import make_record, profiles, truths
from tests.support.slow import examples

from hemostat import scored_record
from hemostat.ipc.messages import REST_KIND
from hemostat.measurement.measurements import Measurements
from hemostat.profiles import futility
from hemostat.profiles.judging import gain_interval
from hemostat.profiles.trials import Trials
from hemostat_calibration.divergence.gain import Gain, gain
from hemostat_calibration.guard import kind_test
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import Features, Shift, TokenRecord
from hemostat_calibration.statistics import dependence


def interval(record: TokenRecord, profile: CalibrationProfile) -> tuple[float, float] | None:
    return gain_interval(record, profile, gain(record, profile))


def in_context(vocabulary: int, seed: int) -> CalibrationProfile:
    random = np.random.default_rng(seed)
    ids = random.permutation(vocabulary)[:5]
    return contextual_profile(
        model="",
        anchors=ids,
        linear=random.normal(size=(3, len(ids))),
        offset=random.normal(size=3),
        up=random.normal(size=(vocabulary, 3)),
        clamp_nats=1.5,
    )


def test_bounds_alone_promote_nothing() -> None:
    """Without the engine's and the reference's exact terms the tail may hold anything."""
    bench = Bench()
    bench.learn()
    for n, key in enumerate(JUDGED[:60]):
        truth = BIASED.truth(n)
        bench.observe(make_record(truth, 2, reference_k=2, key=key))
    assert bench.profiles.serving.selected is None
    assert [c["requests"] for c in bench.status()["candidates"]] == [60]


def test_what_a_client_sends_beyond_its_share_is_noted_against_a_promotion(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    trials = bench.profiles.trials
    bench.profiles.operator.import_profile(harmful())
    noted: list[float] = []
    monkeypatch.setattr(trials, "oppose", lambda name, record, gain: noted.append(gain.lower))
    for n, key in enumerate(JUDGED[:60]):
        client = b"most" if n % 10 < 6 else b"%d" % (n % 14)
        bench.observe(bench.record(BIASED.truth(n), key, client=client))
    (evidence,) = trials.evidence_by_kind(trials.tested[0]).values()
    assert len(noted) == evidence.refused == 60 - evidence.units > 10
    assert np.mean(noted) < 0.0


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_every_gain_is_within_the_width_given_to_the_guard(data: st.DataObject) -> None:
    """For any two models, and however little of them is known. (The guard raises on a gain outside of the width.)"""
    truth = data.draw(truths(rows=3))
    vocabulary = truth.compressed.shape[1]
    candidate, serving = (
        data.draw(profiles(vocabulary)) if data.draw(st.booleans()) else in_context(vocabulary, seed) for seed in (0, 1)
    )
    bench = Bench(known=False, clamp_nats=2.0)
    bench.profiles.set_model_pair(MODEL, vocabulary)
    bench.profiles.operator.import_profile(replace(serving, model=MODEL))
    bench.profiles.operator.promote(bench.profiles.trials.tested_versions[0])
    bench.profiles.operator.import_profile(replace(candidate, model=MODEL))
    whole = bench.record(truth, JUDGED[0])
    known = data.draw(st.booleans())
    k = data.draw(st.integers(2, vocabulary))
    reference_k = data.draw(st.one_of(st.none(), st.integers(1, vocabulary)))
    record = make_record(truth, k, reference_k=reference_k, key=JUDGED[0])
    before = bench.profiles.events.newest_first()
    ids = in_context(vocabulary, 0).parameters["anchors"]
    values = np.where(np.isfinite(truth.compressed[:, ids]), truth.compressed[:, ids], np.nan).astype(np.float32)
    if data.draw(st.booleans()):
        record = replace(record, features=Features(anchors_digest(ids), values))
    bench.observe(replace(record, shifts=whole.shifts if known else {}))
    assert len(bench.profiles.events.newest_first()) >= len(before)


def test_a_prompt_counts_once_in_a_test() -> None:
    """Ten recurring prompts are ten observations: repetition proves nothing."""
    bench = Bench()
    bench.learn()
    bench.feed(BIASED, JUDGED[:10] * 60)
    assert bench.profiles.serving.selected is None
    assert {candidate["requests"] for candidate in bench.status()["candidates"]} == {10}
    assert bench.feed(BIASED, JUDGED[10:], bench.serves) < len(JUDGED) - 10


def test_an_unproven_candidate_is_dropped_where_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futility, "MAX_UNPROVEN_UNITS", 30)
    bench = Bench()
    first, second, third = (bench.profiles.operator.import_profile(harmful(seed=seed)) for seed in range(3))
    bench.feed(EVEN, JUDGED[:29])
    assert bench.profiles.trials.tested_versions == [first, second]
    bench.feed(EVEN, JUDGED[29:31])
    assert bench.profiles.trials.tested_versions == [second, third]
    event = bench.last("drop")
    assert (event["version"], event["reason"], event["evidence"]["units"]) == (first, "unproven", 30)
    bench.feed(EVEN, JUDGED[31:80])
    assert bench.profiles.trials.tested_versions == [second, third], "no candidate waits any more"
    learned = bench.learn()
    monkeypatch.setattr(futility, "MAX_UNPROVEN_UNITS_BEFORE_LOWER", 110)
    bench.feed(EVEN, JUDGED[80:109])
    assert bench.profiles.trials.tested_versions == [second, third], "a family that is tested last waits longer"
    bench.feed(EVEN, JUDGED[109:112])
    assert bench.profiles.trials.tested_versions == [third, learned]


def test_no_candidate_gives_way_before_a_cycle_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futility, "MAX_UNPROVEN_UNITS", 30)
    monkeypatch.setattr(Trials, "has_seen_cycles", False)
    bench = Bench()
    first, second, third = (bench.profiles.operator.import_profile(harmful(seed=seed)) for seed in range(3))
    bench.feed(EVEN, JUDGED[:60])
    assert bench.profiles.trials.tested_versions == [first, second]
    monkeypatch.setattr(Trials, "has_seen_cycles", True)
    bench.feed(EVEN, JUDGED[60:61])
    assert bench.profiles.trials.tested_versions == [second, third]


def test_no_candidate_gives_way_before_its_own_gains_span_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futility, "MAX_UNPROVEN_UNITS", 30)
    monkeypatch.setattr(Trials, "spans_cycle", lambda *_: False)
    bench = Bench()
    first, second, third = (bench.profiles.operator.import_profile(harmful(seed=seed)) for seed in range(3))
    bench.feed(EVEN, JUDGED[:60])
    assert bench.profiles.trials.tested_versions == [first, second]
    monkeypatch.setattr(Trials, "spans_cycle", lambda *_: True)
    bench.feed(EVEN, JUDGED[60:61])
    assert bench.profiles.trials.tested_versions == [second, third]


def test_what_lacks_a_cycle_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trials, "spans_cycle", lambda *_: False)
    monkeypatch.setattr(Trials, "promotes", lambda *_: False)
    bench = Bench()
    bench.profiles.operator.import_profile(helpful())
    bench.feed(BIASED, JUDGED[:300])
    [kind] = bench.status()["kinds"]
    said = "enough evidence; its gains do not span a cycle of the traffic yet (evidence.cycle_hours)"
    assert kind["candidates"][0]["summary"] == said


def test_a_full_test_goes_on_noting_how_much_gains_depend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind_test, "MAX_UNITS", 20)
    bench = Bench()
    bench.profiles.operator.import_profile(harmful())
    noted: list[float] = []
    monkeypatch.setattr(bench.profiles.trials, "update_gain", lambda name, unit, gain, now: noted.append(now))
    bench.feed(BIASED, JUDGED[:30])
    assert bench.status()["candidates"][0]["requests"] == 20
    assert noted == [float(n) for n in range(21, 31)]


def test_a_candidate_that_is_tested_in_rare_kinds_only_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futility, "MAX_SEEN_UNITS", 50)
    bench = Bench()
    for kind in ("often", "rare"):
        bench.feed(BIASED, JUDGED[:1], kind=kind)
    first = bench.profiles.operator.import_profile(helpful())
    bench.feed(BIASED, JUDGED[1:], bench.serves, kind="often")
    assert bench.profiles.trials.tested_versions == [first], "it goes on being tested in the rare kind"
    bench.feed(BIASED, JUDGED[400:500], kind="often")
    assert bench.profiles.trials.tested_versions == [first], "nobody waits"
    others = [bench.profiles.operator.import_profile(harmful(seed=seed)) for seed in range(2)]
    bench.feed(BIASED, JUDGED[500:501], kind="often")
    assert bench.profiles.trials.tested_versions == others
    assert bench.profiles.serving.kinds["often"].version == first
    assert bench.last("drop")["why"].startswith("not proven in another kind during")


def test_a_record_is_no_evidence_for_a_profile_that_the_engine_did_not_report() -> None:
    bench = Bench()
    profile = contextual()
    bench.profiles.proposals.propose(profile, "", {"tokens": 1})
    for n, key in enumerate(JUDGED[:9]):
        record = bench.record(BIASED.truth(n), key)
        shift = record.shifts[profile.version]
        unreported = replace(shift, log_normalizer=np.full(record.tokens, np.nan))
        bench.observe(replace(record, engine_boot="b", shifts={}))
        bench.observe(replace(record, engine_boot="b", shifts={profile.version: unreported}))
        bench.observe(replace(record, shifts={}))
    assert bench.status()["candidates"][0]["requests"] == 0
    bench.feed(BIASED, JUDGED[:9], engine_boot="b")
    assert bench.status()["candidates"][0]["requests"] == 9


def test_tokens_with_lost_features_are_left_out_and_masked_ones_have_gain_zero() -> None:
    bench = Bench()
    profile = contextual()
    bench.profiles.proposals.propose(profile, "", {"tokens": 1})
    whole = bench.record(BIASED.truth(0), JUDGED[0])
    exact = gain(whole, profile).lower
    shift = whole.shifts[profile.version]
    values = np.zeros((whole.tokens, len(ANCHORS)), np.float32)
    values[:10] = np.nan
    expected, normalizer = shift.expected.copy(), shift.log_normalizer.copy()
    expected[:10], normalizer[:4], normalizer[4:10] = np.nan, np.nan, 1e-6
    record = replace(
        whole,
        features=Features(anchors_digest(ANCHORS), values),
        shifts={profile.version: Shift(expected, normalizer)},
        engine_boot="b",
    )
    assert interval(whole, profile) == (pytest.approx(exact.mean()), pytest.approx(exact.mean()))
    mean = pytest.approx(exact[10:].sum() / (whole.tokens - 4))
    assert interval(record, profile) == (mean, mean)
    lost = replace(record, shifts={profile.version: Shift(np.full_like(expected, np.nan), normalizer)})
    bounds = interval(lost, profile)
    assert bounds is not None
    assert bounds[0] < exact[10:].mean() < bounds[1], "where only one of the terms is known, its bounds count"


def test_a_gain_is_computed_once_for_measurement_and_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    served = bench.profiles.operator.import_profile(harmful())
    tested = bench.profiles.operator.import_profile(harmful(seed=6))
    bench.profiles.operator.promote(served)
    computed: list[str] = []

    def counted(record: TokenRecord, profile: CalibrationProfile) -> Gain:
        computed.append(profile.version)
        return gain(record, profile)

    monkeypatch.setattr(scored_record, "gain", counted)
    record = bench.record(EVEN.truth(0), JUDGED[0], kind=REST_KIND)
    scored = evidence(record)
    profile = bench.profiles.calibrated_profile(record)
    Measurements().update(record, profile, None, held_out=bench.profiles.is_held_out(record), gain_of=scored.gain)
    bench.profiles.update(scored)
    assert sorted(computed) == sorted([served, tested])
    computed.clear()
    learned = bench.record(EVEN.truth(0), LEARNED[0])
    Measurements().update(learned, profile, None, held_out=bench.profiles.is_held_out(learned))
    assert not computed, "a gain counts on held-out records only"


@pytest.mark.parametrize("most", [390, kind_test.MAX_UNITS])
def test_nothing_is_promoted_in_a_kind_before_it_is_known_how_much_its_requests_depend_on_each_other(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Of all requests, whether they are learned from or judged by; a restart keeps it, other models begin anew. A test
    that is full by then (most: its units) is decided all the same."""
    monkeypatch.setattr(kind_test, "MAX_UNITS", most)
    monkeypatch.setattr(dependence, "MIN_HISTORY", 500)
    bench, rng = Bench(), np.random.default_rng(0)

    def feed(keys: list[bytes]) -> None:
        for n, key in enumerate(keys):
            record = bench.record(BIASED.truth(n), key)
            divergences = np.append(rng.gamma(2.0, 0.1, record.tokens), np.inf)
            bench.profiles.update(evidence(replace(record, kind=REST_KIND), divergences=divergences))

    feed(LEARNED[:1] + JUDGED[:1])
    version = bench.profiles.operator.import_profile(helpful())
    feed(JUDGED[1:400])
    candidate = bench.status()["kinds"][0]["candidates"][0]
    assert candidate["log_e"] > 1.1 * candidate["needed"]
    assert candidate["summary"].startswith("enough evidence; how much")
    assert candidate["effective_units"] == pytest.approx(candidate["units"] / candidate["inflation"])
    assert not bench.serves()
    again = bench.restart()
    assert again.profiles.trials.guard.noted_inflation(REST_KIND, 10) > 1.0
    feed(LEARNED[1:100])
    feed(JUDGED[400:401])
    assert bench.profiles.serving.selected == version
    bench.profiles.forget_evidence("other models")
    assert bench.profiles.trials.guard.noted_inflation(REST_KIND, 10) == 1.0
