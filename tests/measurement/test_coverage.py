"""Coverage: what was sampled is counted once, by kind, with the tokens that are known."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from tests.support.captures import capture

from hemostat.ipc.messages import REST_KIND, SampledCount
from hemostat.ipc.sampled import SampledTally
from hemostat.measurement.coverage import DROPPED, MAX_KINDS, SCORED, SKIPPED, UNREAD_KIND, Coverage
from hemostat.metrics import names
from hemostat.metrics.reasons import Unscored


def no_time() -> float:
    return 0.0


def test_the_share_is_of_known_tokens_and_unknown_ones_are_stated() -> None:
    coverage = Coverage(kinds=4, clock=no_time)
    coverage.update(capture(tokens=30, kind="chat text greedy"), SCORED, "")
    coverage.update_relayed(SampledCount("chat structured greedy", SKIPPED, "structured_output", 2.0, 1.0, 10))
    coverage.update_relayed(SampledCount("", SKIPPED, "route", 1.0, 1.0, 0))
    report = coverage.report()
    assert report["scored_share"] == {"tokens": 30 / 40, "requests": 1 / 4}
    assert (report["requests"], report["tokens"], report["requests_of_unknown_tokens"]) == (4.0, 40, 2.0)
    by_kind = {row["kind"]: row for row in report["by_kind"]}
    assert by_kind["chat text greedy"]["scored_share"] == {"tokens": 1.0, "requests": 1.0}
    assert by_kind["chat structured greedy"]["scored_share"] == {"tokens": 0.0, "requests": 0.0}
    assert by_kind[UNREAD_KIND]["scored_share"] == {"tokens": None, "requests": 0.0}
    assert report["not_scored"][0] == {
        **{"outcome": SKIPPED, "reason": "structured_output"},
        **{"requests": 2.0, "requests_of_unknown_tokens": 1.0, "tokens": 10},
    }


def test_nothing_sampled_has_no_share() -> None:
    assert Coverage(kinds=4, clock=no_time).report()["scored_share"] == {"tokens": None, "requests": None}


def test_the_choices_of_one_request_are_one_request() -> None:
    coverage = Coverage(kinds=4, clock=no_time)
    for _ in range(2):
        coverage.update(capture(tokens=6, kind="chat", choices=3), SCORED, "")
    coverage.update_relayed(SampledCount("chat", SKIPPED, "token_count_mismatch", 1 / 3, 1 / 3, 0))
    report = coverage.report()
    assert report["requests"] == 1.0
    assert round(report["scored_share"]["requests"], 6) == round(2 / 3, 6)


def test_positions_outside_the_scored_suffix_are_not_covered() -> None:
    coverage = Coverage(kinds=4, clock=no_time)
    coverage.update(capture(tokens=100, kind="chat"), SCORED, "", left_out=60)
    report = coverage.report()
    assert report["scored_share"] == {"tokens": 0.4, "requests": 1.0}
    assert report["not_scored"] == [
        {
            "outcome": SKIPPED,
            "reason": Unscored.OUTSIDE_SUFFIX,
            "requests": 0.0,
            "requests_of_unknown_tokens": 0.0,
            "tokens": 60,
        }
    ]


def test_kinds_are_bounded_and_totals_stay_right() -> None:
    coverage = Coverage(kinds=3, clock=no_time)
    for n in range(5_000):
        coverage.update_relayed(SampledCount(f"kind {n % 400}", SKIPPED, "n", 1.0, 0.0, 2))
    kinds = {sample.labels[0] for sample in coverage.samples() if sample.name == names.KIND_SAMPLED_TOKENS}
    assert REST_KIND in kinds
    assert len(kinds) <= MAX_KINDS
    assert coverage.report()["tokens"] == 10_000


def test_a_new_kind_gets_a_place_within_two_days_after_three_months_of_others() -> None:
    now = 0.0
    coverage = Coverage(kinds=2, clock=lambda: now)

    def hour(*kinds: str) -> None:
        nonlocal now
        now += 3600.0
        for kind in kinds:
            coverage.update(capture(tokens=1, kind=kind), SCORED, "")

    for _ in range(90 * 24):
        hour("chat", "code")
    for _ in range(48):
        hour("chat", *["json"] * 4)
    assert "json" in {row["kind"] for row in coverage.report()["by_kind"]}


def test_an_outcome_of_another_version_neither_raises_nor_grows() -> None:
    coverage = Coverage(kinds=3, clock=no_time)
    for n in range(5_000):
        coverage.update_relayed(SampledCount("chat", "odd", f"reason {n}", 1.0, 0.0, 2))
    assert len(list(coverage.samples())) < 2_000
    assert coverage.report()["requests"] == 0.0


ENDINGS = st.tuples(
    st.sampled_from(["", "a", "b", "c", "d", "e"]),
    st.sampled_from([SKIPPED, DROPPED]),
    st.sampled_from(["n", "route", "link_full"]),
    st.one_of(st.none(), st.integers(0, 1000)),
    st.sampled_from([1.0, 0.5, 0.25]),
)


@given(st.lists(ENDINGS, max_size=60), st.integers(1, 12), st.randoms(use_true_random=False))
def test_what_relays_count_arrives_whole(endings: list[tuple], limit: int, chance: random.Random) -> None:
    """Whatever the bound on combinations, and whenever the control process is told."""
    tally, coverage = SampledTally(limit), Coverage(kinds=2, clock=no_time)

    def tell() -> None:
        if (counts := tally.take()) is not None:
            assert len(counts.counts) <= limit + len({SKIPPED, DROPPED}) * 3
            for count in counts.counts:
                coverage.update_relayed(count)

    for kind, outcome, reason, tokens, requests in endings:
        tally.update(kind, outcome, reason, tokens, requests)
        if chance.random() < 0.2:
            tell()
    tell()
    report = coverage.report()
    assert report["requests"] == sum(requests for *_, requests in endings)
    assert report["tokens"] == sum(tokens or 0 for *_, tokens, _ in endings)
    assert report["requests_of_unknown_tokens"] == sum(r for *_, tokens, r in endings if tokens is None)
    by_reason = {(row["outcome"], row["reason"]): row["tokens"] for row in report["not_scored"]}
    for ending, counted in by_reason.items():
        assert counted == sum(tokens or 0 for _, outcome, reason, tokens, _ in endings if (outcome, reason) == ending)
