"""When tests of candidates begin and end, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.profile_bench import BIASED, JUDGED, Bench, contextual, harmful
from tests.support.records import make_record
from tests.support.stores import DirectWrites
from tests.support.temperature_bias import TEMPERATURE_BIAS
from tests.support.world import World

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.begun_tests import BegunTests
from hemostat.profiles.candidates import Candidate, Origin, Proposed
from hemostat.profiles.gains import Gains, UnitGain
from hemostat.profiles.serving import MAX_TRIED_VERSIONS, KindState, ServingState
from hemostat.profiles.trials import MAX_TESTED, Trials
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.guard.decisions import Admission
from hemostat_calibration.profiles.adapter import ADAPTER
from hemostat_calibration.profiles.contextual import CONTEXTUAL


def test_a_test_begins_anew_when_its_baseline_changes() -> None:
    bench = Bench()
    other = harmful()
    bench.profiles.operator.import_profile(other)
    bench.promote()
    assert bench.profiles.trials.tested_versions == [other.version]
    assert bench.status()["candidates"][0]["requests"] == 0


def test_a_contextual_candidate_is_tested_before_a_family_that_goes_last() -> None:
    bench = Bench()
    last = bench.learn()
    bench.feed(BIASED, JUDGED[:1])
    later = bench.learn(seed=1, tokens=10_000)
    profile = contextual()
    assert bench.profiles.proposals.propose(profile, "", {"tokens": 1000})
    assert bench.profiles.trials.tested_versions == [profile.version, last]
    status = bench.status()
    assert [waiting["version"] for waiting in status["waiting"]] == [later]
    bench.feed(BIASED, JUDGED, bench.serves)
    assert bench.profiles.serving.selected in (profile.version, last)


RECORD = make_record(World().truth(0), 20)


class Made:
    """Trials of profiles of width 1."""

    def __init__(self, kinds: tuple[str, ...] = (REST_KIND,)) -> None:
        self.serving = ServingState("auto")
        for kind in kinds:
            self.serving.kinds[kind] = KindState(units=10)
        self.trials = Trials(0.05, 0.25, Gains(lambda _: 1.0), self.serving, BegunTests(DirectWrites()))

    def feed(self, candidate: Candidate, kind: str, units: range, gain: float = 0.2) -> int:
        """Units that counted."""
        counted = 0
        for n in units:
            unit = replace(RECORD, kind=kind, prompt_key=b"%d" % n)
            if self.trials.admit(candidate.test, unit) is Admission.ADMITTED:
                self.trials.update(candidate.test, unit, UnitGain(gain, gain), 0.0)
                counted += 1
        return counted


def test_the_queue_is_ordered_by_priority_and_then_by_age() -> None:
    trials = Made().trials
    for version, source in (
        ("a", Proposed(TEMPERATURE_BIAS)),
        ("b", Origin.IMPORT),
        ("c", Proposed(CONTEXTUAL)),
        ("d", Origin.SERVING),
    ):
        trials.enqueue(Candidate(version, source))
    assert [candidate.version for candidate in trials.queue] == ["b", "c", "d", "a"]
    assert trials.tested_versions == ["b", "c"]
    assert [candidate.version for candidate in trials.successors(trials.tested[0])] == ["d", "a"]


def test_a_newer_proposal_waits_for_the_earlier_one_of_its_family_alone() -> None:
    trials = Made().trials
    earlier = [Candidate(version, Proposed(CONTEXTUAL), 1) for version in ("a", "variant")]
    for candidate in earlier:
        trials.enqueue(candidate)
    assert trials.tested == earlier, "variants of one proposal are tested together"
    newer, imported = Candidate("b", Proposed(CONTEXTUAL), 2), Candidate("c", Origin.IMPORT, 3)
    trials.enqueue(newer)
    trials.enqueue(imported)
    trials.remove(lambda candidate: candidate == earlier[0])
    assert trials.tested == [earlier[1], imported], "the place is free, and not for the newer one"
    assert trials.waiting == [newer]
    assert trials.behind(newer) == ["variant"]
    assert trials.successors(earlier[1]) == [newer]
    assert trials.successors(imported) == [], "it would not help"
    trials.remove(lambda candidate: candidate == earlier[1])
    assert trials.tested == [newer, imported]


def test_a_test_that_another_family_displaces_goes_on_with_its_evidence() -> None:
    made = Made()
    first, second = (Candidate(version, Proposed(TEMPERATURE_BIAS), 1) for version in "vw")
    for candidate in (first, second):
        made.trials.enqueue(candidate)
    made.feed(second, REST_KIND, range(7))
    contextual_one = Candidate("c", Proposed(CONTEXTUAL), 2)
    made.trials.enqueue(contextual_one)
    assert made.trials.tested == [contextual_one, first]
    begun = made.trials.tests_begun
    made.trials.resume(made.trials.guard.save(), begun, made.trials.queue)
    made.trials.remove(lambda candidate: candidate == contextual_one)
    assert made.trials.tested == [first, second]
    assert made.trials.evidence(second, REST_KIND).units == 7
    assert made.trials.tests_begun == begun, "it spends no further alpha"


def test_a_test_that_is_displaced_begins_anew_where_what_serves_changes() -> None:
    made = Made()
    imports = [Candidate(version, Origin.IMPORT) for version in "vw"]
    for candidate in imports:
        made.trials.enqueue(candidate)
        made.feed(candidate, REST_KIND, range(7))
    adapter = Candidate("a", Proposed(ADAPTER), 1)
    made.trials.enqueue(adapter)
    assert made.trials.waiting == imports[1:]
    made.serving.kinds[REST_KIND].version = "a"
    made.trials.begin_in(REST_KIND)
    made.trials.remove(lambda candidate: candidate == adapter)
    assert made.trials.evidence(imports[1], REST_KIND).units == 0


def test_only_candidates_that_are_tested_spend_alpha() -> None:
    made = Made()
    for version in "abc":
        made.trials.enqueue(Candidate(version, Origin.IMPORT))
    assert made.trials.begun == made.trials.tests_begun == MAX_TESTED
    made.trials.remove(lambda candidate: candidate.version == "a")
    assert made.trials.tests_begun == 3, "the one that waited is tested now"


def test_a_unit_counts_once_in_each_test_and_kind() -> None:
    made = Made((REST_KIND, "chat"))
    candidate = Candidate("a", Origin.IMPORT)
    made.trials.enqueue(candidate)
    assert made.feed(candidate, "chat", range(3)) == 3
    assert made.feed(candidate, "chat", range(4)) == 1
    assert made.feed(candidate, REST_KIND, range(4)) == 4
    made.trials.restart()
    assert made.feed(candidate, "chat", range(4)) == 4, "another test"


def test_a_candidate_is_tested_in_the_kinds_that_were_seen() -> None:
    made = Made((REST_KIND, "a", "b"))
    made.serving.kinds["b"].held = "why"
    made.serving.kinds["new"] = KindState()
    candidate = Candidate("v", Origin.IMPORT)
    made.trials.enqueue(candidate)
    assert made.trials.running_kinds(candidate) == [REST_KIND, "a"]
    made.serving.kinds["new"].units = 1
    made.trials.begin_in("new")
    assert made.trials.running_kinds(candidate) == [REST_KIND, "a", "new"]
    numbers = {kind: e.test for kind, e in made.trials.evidence_by_kind(candidate).items()}
    assert numbers == {REST_KIND: 1, "a": 1, "new": 2}, "all at once; the one that came later has a test of its own"


def test_a_candidate_waits_for_the_first_kind_that_is_seen() -> None:
    made = Made(())
    made.serving.kinds[REST_KIND] = KindState()
    candidate = Candidate("v", Origin.IMPORT)
    made.trials.enqueue(candidate)
    assert (made.trials.tests_begun, made.trials.tested_versions) == (0, ["v"])
    made.serving.kinds["a"] = KindState(units=1)
    made.trials.begin_in("a")
    assert made.trials.running_kinds(candidate) == ["a"]


def test_a_candidate_leaves_the_queue_when_its_last_test_ends() -> None:
    made = Made((REST_KIND, "a"))
    for version in "vw":
        made.trials.enqueue(Candidate(version, Proposed(CONTEXTUAL)))
    made.trials.begin_in("a", lambda c: c.version == "v")
    assert made.trials.tested_versions == ["v", "w"]
    made.trials.begin_in(REST_KIND, lambda c: c.version == "v")
    assert made.trials.tested_versions == ["w"]
    assert made.serving.kinds["a"].tried == ["v"]
    made.trials.enqueue(Candidate("v", Origin.SERVING))
    assert made.trials.tested_versions == ["w"], "it is not tested again where it was"


def test_the_versions_that_a_kind_remembers_are_bounded() -> None:
    state = KindState()
    for n in range(2 * MAX_TRIED_VERSIONS):
        state.update_tried(f"v{n}")
    state.update_tried("v20")
    assert len(state.tried) == MAX_TRIED_VERSIONS
    assert state.tried[-1] == "v20"


def test_a_larger_count_of_tests_begun_stays() -> None:
    trials = Made().trials
    trials.enqueue(Candidate("a", Origin.IMPORT))
    trials.resume(None, 7, [])
    assert trials.tests_begun == 7
    trials.resume(None, 2, [])
    assert trials.tests_begun == 7


def test_stored_tests_go_on_and_those_of_unknown_candidates_do_not() -> None:
    made = Made()
    kept, gone = Candidate("a", Origin.IMPORT), Candidate("b", Origin.IMPORT)
    for candidate in (kept, gone):
        made.trials.enqueue(candidate)
        made.feed(candidate, REST_KIND, range(5))
    other = Made()
    other.trials.resume(made.trials.guard.save(), 0, [kept])
    assert other.trials.evidence(kept, REST_KIND) == made.trials.evidence(kept, REST_KIND)
    assert other.trials.guard.names == (kept.test,)
    assert other.feed(kept, REST_KIND, range(6)) == 1
    with pytest.raises(InvalidArgumentError):
        other.trials.resume(b"junk", 0, [])
    assert other.trials.tested == [kept]
