"""When tests of candidates begin, and in which order."""

from __future__ import annotations

import numpy as np
from tests.support.profile_bench import BIASED, JUDGED, LEARNED, MODEL, Bench, contextual, harmful, helpful
from tests.support.world import V

from hemostat.profiles.catalogue import gain_width
from hemostat.profiles.trials import IMPORT, MAX_TESTED, POOLED, Candidate, Trials
from hemostat_calibration import guard
from hemostat_calibration.guard import Role
from hemostat_calibration.profiles.families import CONTEXTUAL, TEMPERATURE_BIAS
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


class Begun:
    """Counts of tests begun, as they are reported."""

    def __init__(self) -> None:
        self.reported: list[tuple[Role, int]] = []

    def __call__(self, role: Role, number: int) -> None:
        self.reported.append((role, number))


def made(begun: Begun | None = None) -> Trials:
    return Trials(0.05, gain_width=lambda _: 1.0, baseline=lambda _: None, on_test_begun=begun or Begun())


def test_the_queue_is_ordered_by_priority_and_then_by_age() -> None:
    trials = made()
    for version, source in (("a", TEMPERATURE_BIAS), ("b", IMPORT), ("c", CONTEXTUAL), ("d", POOLED)):
        trials.add(Candidate(version, "", source))
    assert [candidate.version for candidate in trials.queue] == ["b", "c", "d", "a"]
    assert trials.tested_versions == ["b", "c"]
    assert trials.running_tests == MAX_TESTED
    assert trials.has_waiting_equal(trials.tested[0])
    trials.remove(lambda candidate: candidate.version == "d")
    assert not trials.has_waiting_equal(trials.tested[0]), "only one of a lower priority waits"


def test_only_candidates_that_are_tested_spend_alpha() -> None:
    begun = Begun()
    trials = made(begun)
    for version in "abc":
        trials.add(Candidate(version, "", IMPORT))
    assert begun.reported == [(Role.CANDIDATE, 1), (Role.CANDIDATE, 2)]
    trials.remove(lambda candidate: candidate.version == "a")
    assert begun.reported[-1] == (Role.CANDIDATE, 3), "the one that waited is tested now"
    trials.watch_serving("a", "", 200)
    assert begun.reported[-1] == (Role.SERVING, 1)
    assert trials.tests_begun == {Role.CANDIDATE: 3, Role.SERVING: 1}


def test_a_unit_counts_once_in_each_test() -> None:
    trials = made()
    candidate = Candidate("a", "", IMPORT)
    trials.add(candidate)
    assert trials.observe_candidate(candidate, b"prompt", (0.1, 0.1), 5) is not None
    assert trials.observe_candidate(candidate, b"prompt", (0.1, 0.1), 5) is None
    assert trials.decide_candidate(candidate).evidence.requests == 1
    trials.restart(lambda _: True)
    assert trials.observe_candidate(candidate, b"prompt", (0.1, 0.1), 5) is not None, "another test"


def test_a_larger_count_of_tests_begun_stays() -> None:
    trials = made()
    trials.add(Candidate("a", "", IMPORT))
    trials.resume({Role.CANDIDATE: 7, Role.SERVING: 0})
    assert trials.tests_begun[Role.CANDIDATE] == 7
    trials.resume({Role.CANDIDATE: 2, Role.SERVING: 0})
    assert trials.tests_begun[Role.CANDIDATE] == 7
