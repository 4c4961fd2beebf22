"""Invariants of a profile's life after any sequence of actions."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.profile_bench import ANCHORS, BIASED, JUDGED, LEARNED, MODEL, Bench, contextual
from tests.support.world import V

from hemostat.engines.registry import MAX_HELD_VERSIONS
from hemostat.profiles.scopes import MAX_SCOPE_PROFILES
from hemostat.profiles.trials import MAX_QUEUED_CANDIDATES
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.contextual import probe_profile

ACTIONS = ("import", "propose", "promote", "pin", "unpin", "roll_back", "feed", "mode", "model", "restart", "probe")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_after_any_sequence_of_actions_the_invariants_hold(data: st.DataObject) -> None:
    bench = Bench(scope="label", min_tokens=100)
    made = [contextual(0.1 * n - 0.3) for n in range(12)]
    scopes = st.sampled_from(["", "a", "b", "c"])
    for n in range(data.draw(st.integers(1, 30))):
        profiles = bench.profiles
        profile, scope = made[data.draw(st.integers(0, 11))], data.draw(scopes)
        try:
            match data.draw(st.sampled_from(ACTIONS)):
                case "import":
                    profiles.operator.import_profile(profile, scope)
                case "propose":
                    profiles.proposals.propose(profile, "", {"tokens": 10**n}, scope)
                case "promote":
                    profiles.operator.promote(profile.version, scope)
                case "pin":
                    profiles.operator.pin(profile.version)
                case "unpin":
                    profiles.operator.unpin()
                case "roll_back":
                    profiles.operator.roll_back("", data.draw(st.sampled_from([None, scope])))
                case "feed":
                    keys = LEARNED if data.draw(st.booleans()) else JUDGED
                    bench.feed(BIASED, keys[10 * n : 10 * n + 10], label=scope)
                case "mode":
                    profiles.operator.set_mode(data.draw(st.sampled_from(["off", "observe", "auto"])))
                case "model":
                    profiles.set_model_pair(data.draw(st.sampled_from([MODEL, "other"])), V)
                case "restart":
                    bench = bench.restart(scope="label")
                    bench.profiles.set_model_pair(MODEL, V)
                case "probe":
                    profiles.proposals.set_probe(probe_profile(MODEL, V, ANCHORS[: 1 + n % 6], 1.0))
        except HemostatError:
            pass
        profiles = bench.profiles
        assert len(profiles.engine_versions()) <= MAX_HELD_VERSIONS
        assert all(version in profiles.catalogue for version in profiles.engine_versions())
        trials = profiles.trials
        serving = [scope for scope, state in profiles.serving.scopes.items() if state.selected]
        assert trials.running_tests == len(trials.tested) + len(serving)
        assert len(trials.queue) <= MAX_QUEUED_CANDIDATES + MAX_SCOPE_PROFILES
        assert len(set(trials.queue)) == len(trials.queue)
        for served in serving:
            trials.decide_serving(served)
        shown = [profiles.report.status(), profiles.report.listing()]
        assert json.loads(json.dumps(shown, allow_nan=False)) == shown
        assert profiles.serving.version_by_scope.keys() <= {"a", "b", "c"}
