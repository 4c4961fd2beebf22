"""Invariants of a profile's life after any sequence of actions."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.profile_bench import ANCHORS, BIASED, JUDGED, LEARNED, MODEL, Bench, contextual, helpful
from tests.support.slow import examples
from tests.support.world import V

from hemostat.config.schema import Evidence
from hemostat.engines.reports import MAX_HELD_VERSIONS
from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.decisions import Reason
from hemostat.profiles.serving import MAX_SERVING_VERSIONS
from hemostat.profiles.trials import MAX_QUEUED_CANDIDATES, MAX_TESTED
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.contextual import probe_profile

ACTIONS = (
    *("import", "propose", "promote", "pin", "unpin", "roll_back", "harm", "release"),
    *("feed", "flood", "mode", "model", "restart", "probe"),
)
EVIDENCE = Evidence(kinds=2)


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_after_any_sequence_of_actions_the_invariants_hold(data: st.DataObject) -> None:
    bench = Bench(min_tokens=100, evidence=EVIDENCE)
    made = [*(contextual(0.1 * n - 0.3) for n in range(8)), *map(helpful, range(4))]
    labels, kinds = st.sampled_from(["", "a", "b"]), st.sampled_from(["", "x", "y", "z"])
    spent = 0
    for n in range(data.draw(st.integers(1, 30))):
        profiles = bench.profiles
        profile, label = made[data.draw(st.integers(0, 11))], data.draw(labels)
        kind = data.draw(st.sampled_from([None, REST_KIND, "x", "y", "z"]))
        try:
            match data.draw(st.sampled_from(ACTIONS)):
                case "import":
                    profiles.operator.import_profile(profile)
                case "propose":
                    profiles.proposals.propose(profile, "", {"tokens": 10**n})
                case "promote":
                    profiles.operator.promote(profile.version, kind)
                case "pin":
                    profiles.operator.pin(profile.version, kind)
                case "unpin":
                    profiles.operator.unpin(kind)
                case "roll_back":
                    profiles.operator.roll_back("", kind)
                case "harm":
                    profiles.lifecycle.roll_back(kind or "x", Reason.OUTCOMES, "harm", {})
                case "release":
                    profiles.operator.release(kind)
                case "feed":
                    keys = LEARNED if data.draw(st.booleans()) else JUDGED
                    bench.feed(BIASED, keys[10 * n : 10 * n + 10], label=label, kind=data.draw(kinds))
                case "flood":
                    bench.feed(BIASED, LEARNED[:60], label=label, kind=data.draw(kinds))
                case "mode":
                    profiles.operator.set_mode(data.draw(st.sampled_from(["off", "observe", "auto"])))
                case "model":
                    profiles.set_model_pair(data.draw(st.sampled_from([MODEL, "other"])), V)
                case "restart":
                    before = profiles.serving.selected_by_kind
                    bench = bench.restart(crash=data.draw(st.booleans()), evidence=EVIDENCE)
                    assert bench.profiles.serving.selected_by_kind.items() <= before.items()
                    bench.profiles.set_model_pair(MODEL, V)
                case "probe":
                    profiles.proposals.set_probe(probe_profile(MODEL, V, ANCHORS[: 1 + n % 6], 1.0))
        except HemostatError:
            pass
        check(bench)
        assert bench.profiles.trials.tests_begun >= spent, "alpha that was spent stays spent"
        spent = bench.profiles.trials.tests_begun


def check(bench: Bench) -> None:
    profiles, trials, serving = bench.profiles, bench.profiles.trials, bench.profiles.serving
    assert len(profiles.engine_versions()) <= MAX_HELD_VERSIONS
    assert all(version in profiles.catalogue for version in profiles.engine_versions())
    assert len(serving.versions) <= MAX_SERVING_VERSIONS
    assert set(serving.kinds) == {REST_KIND, *profiles.kinds.followed}
    assert len(trials.queue) <= MAX_QUEUED_CANDIDATES
    assert len(set(trials.queue)) == len(trials.queue)
    for kind, state in serving.kinds.items():
        assert trials.is_watched(kind) is (state.version is not None)
        assert state.version is not None or not (state.pinned or state.chosen)
        assert not (state.held and state.version is not None), "a kind that is held is served by identity"
        assert all(c.version != state.version for c in trials.queue if kind in trials.running_kinds(c))
        assert not (state.held and any(kind in trials.running_kinds(c) for c in trials.queue))
    assert len(trials.tested) <= MAX_TESTED
    begun = [candidate.test for candidate in trials.queue if trials.has_begun(candidate)]
    assert len(begun) == len(set(begun))
    for candidate in trials.waiting:
        assert not trials.has_begun(candidate) or len(trials.tested) == MAX_TESTED, "it goes on where a place is free"
    assert serving.version_by_kind.keys() <= serving.kinds.keys()
    shown = [profiles.report.status(), profiles.report.listing()]
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
