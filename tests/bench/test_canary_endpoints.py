"""Canaries of simulated endpoints: healthy ones are not accused, and a vendor's habits are named.

The fast version of `canary_endpoints`.
"""

from __future__ import annotations

import numpy as np
import pytest
from tests.bench.canary_endpoints import Vendor, healthy, verdicts

from hemostat_calibration import canary_endpoint
from hemostat_calibration.canary_endpoint import PASSES, EndpointSet, Outcome, judge_endpoint
from hemostat_calibration.errors import InvalidArgumentError


def outcomes(habit: str, nats: float, endpoints: int = 4) -> set[Outcome]:
    return {verdict.outcome for verdict, _ in verdicts(habit, endpoints, nats)}


def test_endpoints_that_do_not_change_are_not_accused_whatever_a_few_answers_are() -> None:
    found = [verdict.outcome for verdict in healthy(9, 20)]
    assert found.count(Outcome.CHANGED) == 0
    assert found.count(Outcome.EQUAL) > 0.8 * len(found)


def test_a_test_that_asks_for_two_passes_only_accuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    accused = 0
    for _ in range(6):
        vendor = Vendor(rng, deviant=0.08)
        taken = vendor.take()
        for _ in range(10):
            first, second = canary_endpoint.compare_passes(taken, vendor.passes(2))
            accused += first.changed and second.confirms(first)
    assert accused >= 2


def test_another_model_is_found_and_a_difference_of_a_modes_size_is_not_stated() -> None:
    assert outcomes("none", 0.1) == {Outcome.CHANGED}
    assert outcomes("none", 0.0) == {Outcome.EQUAL}
    assert Outcome.CHANGED not in outcomes("none", 0.01)


@pytest.mark.parametrize("habit", ["caches for a day", "caches for ever"])
def test_a_vendor_that_caches_is_named_whether_it_has_changed_or_not(habit: str) -> None:
    for nats in (0.0, 0.5):
        for verdict, _ in verdicts(habit, 4, nats):
            assert verdict.outcome is Outcome.UNKNOWN
            assert (verdict.then.repeats, verdict.now.repeats) == (True, True)
            assert "caches answers" in verdict.reasons[0]


def test_a_cache_that_began_after_the_set_was_taken_hides_a_change_only_as_long_as_it_lasts() -> None:
    vendor = Vendor(np.random.default_rng(3))
    taken = vendor.take()
    vendor.cached_hours = 24.0
    assert vendor.judged(taken).outcome is Outcome.UNKNOWN
    vendor.logits, vendor.hour = np.roll(vendor.logits, 1, axis=1), 30.0
    verdict = vendor.judged(taken)
    assert (verdict.outcome, verdict.now.repeats) == (Outcome.CHANGED, True)


def test_a_vendor_that_rounds_is_named_and_what_is_above_the_step_is_found() -> None:
    for nats, outcome in ((0.0, Outcome.EQUAL), (0.1, Outcome.CHANGED)):
        for verdict, _ in verdicts("rounds to 4 decimals", 4, nats):
            assert verdict.outcome is outcome
            assert verdict.reasons == [
                "log-probabilities are rounded to 4 decimals: changes below 0.0001 nats are not seen"
            ]
    assert outcomes("rounds to 1 decimal", 0.0) == {Outcome.UNKNOWN}


@pytest.mark.parametrize("share", ["half", "a tenth"])
def test_a_vendor_with_two_versions_behind_one_name_is_named(share: str) -> None:
    for verdict, _ in verdicts(f"{share} of the answers from another version", 6):
        assert verdict.outcome is Outcome.UNKNOWN
        assert verdict.then.two_versions
        assert "have one name" in verdict.reasons[0]


@pytest.mark.parametrize(("share", "outcome"), [(0.5, Outcome.CHANGED), (0.02, Outcome.EQUAL)])
def test_a_second_version_that_appears_is_a_change_once_enough_prompts_show_it(share: float, outcome: Outcome) -> None:
    for seed in range(4):
        vendor = Vendor(np.random.default_rng(seed))
        taken = vendor.take()
        vendor.share = share
        verdict = vendor.judged(taken)
        assert verdict.outcome is outcome
        assert (verdict.then.two_versions, verdict.now.two_versions) == (False, share == 0.5)


def test_a_prompt_that_always_differs_is_a_change_and_one_that_differs_in_two_passes_is_not() -> None:
    vendor = Vendor(np.random.default_rng(8), noise=0.005)
    taken = vendor.take()
    true = vendor.logits.copy()
    vendor.logits[7] = np.roll(true[7], 3)
    always = vendor.passes(2 + PASSES)
    assert judge_endpoint(taken, always).outcome is Outcome.CHANGED
    vendor.logits = true
    assert judge_endpoint(taken, [*always[:2], *vendor.passes(PASSES)]).outcome is Outcome.EQUAL


def test_answers_with_one_identifier_each_prompt_are_repeated_and_what_lists_too_little_is_refused() -> None:
    vendor = Vendor(np.random.default_rng(1), prompts=16)
    passes = vendor.passes(PASSES)
    named = [
        [canary_endpoint.FirstToken(each.token, each.top, f"id-{n}") for n, each in enumerate(answers)]
        for answers in passes
    ]
    prompts = tuple("abcdefghijklmnop")
    assert canary_endpoint.take_endpoint(prompts, named, "m").habits.repeats
    assert not canary_endpoint.take_endpoint(prompts, passes, "m").habits.repeats
    passes[3][5] = canary_endpoint.FirstToken("t1", {"t1": -0.1, "other": -3.0})
    with pytest.raises(InvalidArgumentError, match="1 of 16 prompts list fewer than two common tokens"):
        canary_endpoint.take_endpoint(prompts, passes, "m")


def test_a_set_is_read_as_it_was_written() -> None:
    taken = Vendor(np.random.default_rng(2), decimals=4, share=0.5).take()
    read = EndpointSet.from_bytes(taken.to_bytes())
    assert (read.prompts, read.tokens, read.habits) == (taken.prompts, taken.tokens, taken.habits)
    assert np.array_equal(read.taken.baseline, taken.taken.baseline)
    with pytest.raises(InvalidArgumentError):
        EndpointSet.from_bytes(taken.taken.to_bytes())
