"""When tests of candidates begin, and in which order."""

from __future__ import annotations

import numpy as np
from tests.support.profile_bench import (
    BIASED,
    JUDGED,
    LEARNED,
    MODEL,
    Bench,
    contextual,
    harmful,
    helpful,
)
from tests.support.world import V

from hemostat.profiles.catalogue import gain_width
from hemostat_calibration import guard
from hemostat_calibration.profiles.profile import temperature_bias


def test_a_test_begins_anew_when_its_baseline_changes() -> None:
    bench = Bench()
    other = harmful()
    bench.profiles.operator.import_profile(other)
    bench.promote()
    assert bench.profiles.trials.tested_versions == [other.version]
    assert bench.status()["candidates"][0]["requests"] == 0


def test_a_test_without_observations_is_not_begun_again() -> None:
    bench = Bench()
    tested, next_ = [bench.profiles.operator.import_profile(helpful(seed)) for seed in range(3)][1:]
    bench.feed(BIASED, JUDGED[:3])
    bench.profiles.operator.promote(bench.profiles.trials.tested_versions[0])
    found = {c["version"]: (c["test"], c["requests"]) for c in bench.status()["candidates"]}
    # The one that moved up has its first test, the other one, which is compared with another now, its second.
    assert found == {tested: (4, 0), next_: (3, 0)}
    assert bench.status()["tests_begun"]["candidate"] == 4


def test_the_gain_width_of_identity_is_above_zero() -> None:
    nothing = temperature_bias(MODEL, V, 1.0, np.zeros(V), 1.0)
    guard.begin_test(guard.init(), nothing.version, guard.Role.CANDIDATE, gain_width(nothing))


def test_a_contextual_candidate_is_tested_before_temperature_and_bias() -> None:
    bench = Bench()
    bench.feed(BIASED, LEARNED[:40])
    bias, both = bench.profiles.trials.tested_versions
    profile = contextual()
    assert bench.profiles.proposals.propose(profile, "", {"tokens": 1000})
    assert bench.profiles.trials.tested_versions == [profile.version, bias]
    status = bench.status()
    assert [waiting["version"] for waiting in status["waiting"]] == [both]
    bench.feed(BIASED, JUDGED, bench.serves)
    assert bench.profiles.trials.tested_versions == []
