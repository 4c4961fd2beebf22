"""The life of adapters: judged by exact total variation, apart from what is known of the compressed model's logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from tests.support.adapter_bench import WORLD, Judging
from tests.support.adapters import adapted_record, adapter
from tests.support.evidence import evidence
from tests.support.profile_bench import BIASED, JUDGED, LEARNED, Bench, contextual, helpful
from tests.support.world import V

from hemostat.config.schema import Adapter
from hemostat.ipc.messages import REST_KIND
from hemostat.metrics import names
from hemostat.profiles import lifecycle
from hemostat.profiles.guard_keys import WATCH
from hemostat.profiles.judging import distance_gain
from hemostat_calibration.errors import HemostatError, InvalidArgumentError, InvalidProfileError
from hemostat_calibration.guard.decisions import Figure
from hemostat_calibration.profiles.adapter import ADAPTER
from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.records import ExactDistances, Features

FEATURES = Features("anchors", np.zeros((1, 2), np.float32))
TOKENS = Adapter().min_tokens


def serving(share: float = 0.7) -> tuple[Judging, str]:
    """An adapter that was proven."""
    judging = Judging({})
    version = judging.propose(1, TOKENS, share)
    judging.feed(200)
    assert judging.profiles.serving.version == version
    return judging, version


# --- evidence --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_helps_is_promoted_on_total_variation() -> None:
    judging, version = serving()
    assert judging.asked[0] == (), "before the first unit nothing is tested"
    assert judging.asked[2] == (IDENTITY, version)
    proof = judging.bench.last("promote")["evidence"]
    assert proof["figure"] == "total_variation"
    assert 0.05 < proof["mean_gain"] < 1.0
    assert proof["mean_kl_gain"] > 0.0
    watch = judging.profiles.trials.serving_evidence(REST_KIND)
    assert watch is not None
    assert watch.figure is Figure.TOTAL_VARIATION


def test_of_two_that_are_proven_at_once_the_one_with_the_larger_gain_in_kl_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One is judged in nats, the other by total variation: 0.2 of the one is not more than 0.1 of the other."""
    judging = Judging({})
    version, other = judging.propose(1, TOKENS, 0.9), helpful()
    judging.profiles.operator.import_profile(other)
    judging.feed(5)
    result = {candidate.version: judging.evidence(candidate.version) for candidate in judging.profiles.trials.tested}
    assert result[other.version].mean_gain > result[version].mean_gain
    assert result[other.version].gain_nats < result[version].gain_nats
    monkeypatch.setattr(judging.profiles.trials, "promotes", lambda candidate, kind: True)
    judging.feed(1)
    assert judging.profiles.serving.version == version


@pytest.mark.parametrize("share", [-0.3, 0.0])
def test_one_that_harms_or_does_nothing_is_not(share: float) -> None:
    judging = Judging({})
    version = judging.propose(1, TOKENS, share)
    assert judging.feed(120) == 120
    assert judging.profiles.serving.version is None
    assert judging.evidence(version).units > 100


def test_a_record_whose_distances_were_lost_does_not_count() -> None:
    judging = Judging({})
    version = judging.propose(1, TOKENS, 0.7)
    judging.feed(60, lost=True)
    assert judging.profiles.serving.version is None
    assert judging.evidence(version).units == 0


def test_a_unit_that_has_counted_is_not_asked_about_again() -> None:
    judging = Judging({})
    judging.propose(1, TOKENS, 0.1)
    judging.feed(5)
    again = judging.record(3, JUDGED[3])
    assert again.distances == {}
    assert judging.profiles.distance_versions(judging.bench.record(WORLD.truth(99), LEARNED[0])) == ()


def test_what_serves_is_watched_on_records_of_both_arms() -> None:
    """An adapter's own lists and the compressed model's count alike: both bring distances on the same tokens."""
    judging, version = serving()
    before = judging.profiles.trials.serving_evidence(REST_KIND)
    judging.feed(10, treated=True)
    judging.feed(10)
    after = judging.profiles.trials.serving_evidence(REST_KIND)
    assert before is not None
    assert after is not None
    assert after.units == before.units + 20
    judging.shares[version] = -0.5
    judging.feed(300, treated=True)
    assert judging.profiles.serving.version is None
    assert judging.bench.last("roll_back")["reason"] == "harm"


def test_another_family_is_judged_by_its_distances_while_an_adapter_serves() -> None:
    judging, version = serving(0.4)
    better = contextual(1.0)
    judging.profiles.operator.import_profile(better)
    assert judging.feed(20) == 20, "its distances are not computed"
    assert judging.evidence(better.version).units == 0
    assert judging.evidence(better.version).figure is Figure.TOTAL_VARIATION
    judging.shares[better.version] = 0.95
    judging.feed(300)
    assert judging.profiles.serving.version == better.version
    assert (IDENTITY, version, better.version) in judging.asked
    watch = judging.profiles.trials.serving_evidence(REST_KIND)
    assert watch is not None
    assert watch.figure is Figure.NATS, "from now on no adapter is part of it"


def test_the_figure_changes_with_what_serves_and_no_evidence_is_carried_over() -> None:
    judging, version = serving(0.4)
    other = contextual(1.0)
    judging.profiles.operator.import_profile(other)
    judging.shares[other.version] = 0.5
    judging.feed(15)
    before = judging.evidence(other.version)
    assert (before.units, before.figure) == (15, Figure.TOTAL_VARIATION)
    judging.profiles.operator.roll_back("the operator's wish")
    after = judging.evidence(other.version)
    assert (after.units, after.figure) == (0, Figure.NATS)
    assert after.test > before.test, "a test of its own"
    assert judging.profiles.serving.version is None
    assert version in judging.profiles.serving.kinds[REST_KIND].tried


def test_a_record_of_an_adapter_is_no_evidence_for_what_changes_logits() -> None:
    """As when the adapter was rolled back while its answers were under way. Its lists are almost the reference's, so
    that a profile that helps the compressed model would seem to harm, and the other way round."""
    bench = Bench()
    profile, version = helpful(), adapter(1).version
    bench.profiles.operator.import_profile(profile)
    for number, key in enumerate(JUDGED[:100]):
        bench.observe(adapted_record(BIASED.truth(number), version, 0.95, prompt_key=key))
    (shown,) = bench.status()["candidates"]
    assert shown["requests"] == 0
    assert bench.profiles.serving.selected is None
    bench.feed(BIASED, JUDGED[100:400], bench.serves)
    assert bench.profiles.serving.selected == profile.version


def test_a_gain_is_that_of_the_whole_distributions() -> None:
    kl, tv, top1 = np.array([0.5, 0.1]), np.array([0.4, 0.2]), np.array([True, False])
    lost = ExactDistances(np.array([0.2, np.inf]), np.array([0.1, 1.0]), top1)
    result = distance_gain(ExactDistances(kl, tv, top1), lost)
    assert result.lower == result.upper == pytest.approx(-0.25)
    assert result.kl == -np.inf
    assert distance_gain(lost, ExactDistances(kl, tv, top1)).kl == pytest.approx(-0.15), "nothing gained where it was"


# --- learning --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_proposed_at_its_own_number_of_tokens_and_at_each_doubling() -> None:
    judging = Judging({})
    proposals = judging.profiles.proposals
    assert not proposals.accepts(ADAPTER, TOKENS - 1)
    first = judging.propose(1, TOKENS, 0.0)
    assert not proposals.accepts(ADAPTER, 3 * TOKENS), "the first one's test goes on"
    second = judging.propose(2, 4 * TOKENS, 0.7)
    assert judging.profiles.trials.tested_versions == [second]
    assert first not in judging.profiles.catalogue
    assert [event["version"] for event in judging.profiles.events.newest_first(first)] == [first] * 2
    judging.feed(300)
    assert judging.profiles.serving.version == second
    assert not proposals.accepts(ADAPTER, 7 * TOKENS)
    assert proposals.accepts(ADAPTER, 8 * TOKENS)
    with pytest.raises(InvalidProfileError, match="vocabulary"):
        proposals.propose(adapter(3, vocabulary=V + 1), "", {"tokens": 8 * TOKENS})


def test_an_adapter_is_tested_before_all_others() -> None:
    bench = Bench()
    bench.learn()
    assert bench.profiles.proposals.propose(contextual(), "", {"tokens": 1000})
    made = adapter(1)
    assert bench.profiles.proposals.propose(made, "", {"tokens": TOKENS})
    assert bench.profiles.trials.tested_versions[0] == made.version


def test_nothing_that_changes_logits_is_learned_from_records_of_an_adapter() -> None:
    judging, version = serving()
    record = adapted_record(WORLD.truth(0), version, prompt_key=LEARNED[0], features=FEATURES)
    assert not judging.profiles.learns_from(record)
    assert judging.profiles.learns_from(judging.bench.record(WORLD.truth(0), LEARNED[0]))


# --- what engines, the reference and relays are told -----------------------------------------------------------------


def test_engines_hold_adapters_last_and_they_are_not_evaluated_on_lists() -> None:
    judging, version = serving()
    other = contextual()
    judging.profiles.operator.import_profile(other)
    newer = judging.propose(5, 10 * TOKENS, 0.9)
    assert judging.profiles.engine_versions() == [other.version, version, newer]
    assert judging.profiles.lifecycle.adapter_versions() == [version, newer]
    assert [profile.version for profile in judging.profiles.evaluated_profiles()] == [other.version]
    assert judging.profiles.may_need_distances(JUDGED[0])
    assert not judging.profiles.may_need_distances(LEARNED[0])
    assert not Bench().profiles.may_need_distances(JUDGED[0])
    catalogue = judging.profiles.catalogue
    assert catalogue.adapters == {version, newer}
    assert (catalogue.changes_weights(other.version), catalogue.changes_weights(None)) == (False, False)
    catalogue.remove(newer)
    assert not catalogue.changes_weights(newer)


def test_no_more_adapters_serve_than_engines_have_slots_for() -> None:
    judging = Judging({})
    judging.profiles.serving.max_adapters = 0
    version = judging.propose(1, TOKENS, 0.7)
    assert judging.feed(100) == 100
    (kind,) = judging.bench.status()["kinds"]
    assert kind["candidates"][0]["summary"] == "proven, but no engine can load an adapter now"
    with pytest.raises(HemostatError, match="no engine can load an adapter now"):
        judging.profiles.operator.promote(version)
    judging.profiles.serving.max_adapters = 1
    assert judging.feed(1) == 1
    assert judging.profiles.serving.version == version
    judging.profiles.kinds.update("chat text greedy")
    other = adapter(2)
    judging.profiles.operator.import_profile(other)
    with pytest.raises(HemostatError, match="1 other adapters serve"):
        judging.profiles.operator.promote(other.version, "chat text greedy")
    judging.profiles.operator.promote(version, "chat text greedy")
    observing = Judging({}, mode="observe")
    observing.profiles.serving.max_adapters = 0
    would = observing.propose(1, TOKENS, 0.7)
    observing.feed(200)
    assert observing.profiles.serving.selected == would, "in observe nothing is loaded"


def test_a_profile_that_is_too_large_to_be_kept_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "MAX_ONE_PROFILE_BYTES", 10)
    bench = Bench()
    with pytest.raises(InvalidProfileError, match="above 0: choose a smaller rank"):
        bench.profiles.operator.import_profile(adapter(1))
    with pytest.raises(InvalidProfileError, match="choose a smaller rank"):
        bench.profiles.proposals.propose(adapter(1), "", {"tokens": TOKENS})
    assert list(bench.profiles.catalogue) == []


def two_kinds(shares: Mapping[str, float]) -> tuple[Judging, str, str]:
    """An adapter serves two kinds, the first of which has this share of the traffic, and the engine has one slot."""
    judging = Judging({})
    judging.profiles.serving.max_adapters = 1
    first = judging.propose(1, TOKENS, 0.3)
    for _ in range(400):
        kind = min(shares, key=lambda name: judging.profiles.kinds.table.seen(name) / shares[name])
        judging.feed(1, kind=kind)
        if set(judging.profiles.serving.selected_by_kind) >= set(shares):
            break
    assert set(judging.profiles.serving.versions) == {first}
    return judging, first, judging.propose(2, 4 * TOKENS, 0.9)


@pytest.mark.parametrize(("share", "taken"), [(0.7, True), (0.2, False)])
def test_a_better_adapter_takes_the_slot_where_it_is_proven_in_most_of_the_others_traffic(
    share: float, taken: bool
) -> None:
    one, two = "chat text greedy", "chat text sampled"
    judging, first, second = two_kinds({one: share, two: 1.0 - share})
    if not taken:
        summary = ""
        for _ in range(60):
            judging.feed(1, kind=one)
            kinds = {kind["kind"]: kind for kind in judging.bench.status()["kinds"]}
            summary = kinds[one]["candidates"][0]["summary"]
            if summary.startswith("proven"):
                break
        assert summary == "proven, but 1 other adapters serve, as many as engines have slots for"
        assert judging.profiles.serving.selected_by_kind == {one: first, two: first}
        return
    judging.feed(150, kind=one)
    assert judging.profiles.serving.selected_by_kind == {one: second}
    lost = judging.bench.last("roll_back")
    assert (lost["reason"], lost["kind"], lost["version"]) == ("slot", two, first)
    assert judging.evidence(second, two).units == 0
    judging.feed(150, kind=two)
    assert judging.profiles.serving.selected_by_kind == {one: second, two: second}


def test_no_slot_is_taken_from_an_adapter_that_an_operator_chose() -> None:
    one, two = "chat text greedy", "chat text sampled"
    judging, first, _ = two_kinds({one: 0.7, two: 0.3})
    judging.profiles.operator.pin(first, two)
    judging.feed(150, kind=one)
    assert judging.profiles.serving.selected_by_kind == {one: first, two: first}


# --- operators, restarts, what is shown ------------------------------------------------------------------------------


def test_operators_import_promote_pin_and_roll_back_adapters() -> None:
    judging = Judging({})
    made = adapter(4)
    operator, profiles = judging.profiles.operator, judging.profiles
    assert operator.import_profile(made) == made.version
    assert profiles.report.profile_bytes(made.version) == made.to_bytes()
    operator.promote(made.version)
    assert profiles.serving.version == made.version
    operator.pin(made.version)
    judging.shares[made.version] = -0.5
    judging.feed(100)
    assert profiles.serving.version == made.version, "pinned"
    operator.unpin()
    judging.feed(300)
    assert profiles.serving.version is None


def test_a_restart_continues_with_tests_of_the_same_figure() -> None:
    judging, version = serving(0.4)
    other = contextual(1.0)
    judging.profiles.operator.import_profile(other)
    judging.shares[other.version] = 0.5
    judging.feed(12)
    before = judging.evidence(other.version)
    again = Judging(judging.shares, judging.bench.restart())
    again.profiles.set_model_pair("m", V)
    assert again.profiles.serving.version == version
    assert again.evidence(other.version) == before
    watch = again.profiles.trials.serving_evidence(REST_KIND)
    assert watch is not None
    assert watch.units > 0


def test_evidence_of_another_figure_is_dropped_where_what_served_was_lost() -> None:
    """The adapter that served is lost, so identity serves: its candidate's total variations say nothing
    of nats."""
    judging, version = serving(0.4)
    other = contextual(1.0)
    judging.profiles.operator.import_profile(other)
    judging.shares[other.version] = 0.5
    judging.feed(12)
    begun = judging.profiles.trials.tests_begun
    judging.profiles.writer.save()
    judging.bench.store.delete_profile(version)
    again = Judging(judging.shares, judging.bench.restart(crash=True))
    again.profiles.set_model_pair("m", V)
    assert again.profiles.serving.version is None
    result = again.evidence(other.version)
    assert (result.units, result.figure) == (0, Figure.NATS)
    assert result.test > begun
    assert not again.profiles.trials.is_watched(REST_KIND)
    assert again.profiles.trials.guard.figure(WATCH, REST_KIND) is None


def test_what_is_shown_names_the_figure() -> None:
    judging, version = serving()
    judging.feed(10)
    (kind,) = judging.bench.status()["kinds"]
    assert kind["watch"]["figure"] == "total_variation"
    assert kind["watch"]["mean_kl_gain"] > kind["watch"]["mean_gain"]
    described = judging.profiles.report.describe(version)
    assert described is not None
    assert described["family"] == ADAPTER
    assert described["adapter"] == {"rank": 1, "layers": 1, "bytes": described["bytes"]}
    assert described["clamp_nats"] is None
    result = {sample.name: sample for sample in judging.profiles.samples() if sample.labels[-1:] == ("request",)}
    gains = names.PROFILE_KIND_TOTAL_VARIATION_GAIN, names.PROFILE_KIND_GAIN_NATS
    assert result[gains[0]].value == pytest.approx(kind["watch"]["mean_gain"])
    assert result[gains[1]].value == pytest.approx(kind["watch"]["mean_kl_gain"])


def test_a_record_is_judged_with_the_gains_that_are_handed_over() -> None:
    """No gain of an adapter is ever computed from lists, where it changes nothing, nor one of others from its lists."""
    judging, version = serving()
    record = judging.record(500, JUDGED[500])
    scored = evidence(record)
    judging.profiles.update(scored)
    with pytest.raises(InvalidArgumentError, match="does not follow"):
        scored.gain(judging.profiles.catalogue[version])
    with pytest.raises(InvalidArgumentError, match="does not follow"):
        evidence(replace(record, adapter=version)).gain(contextual())
