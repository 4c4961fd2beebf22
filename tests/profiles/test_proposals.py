"""Tests of when contextual profiles are proposed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.profile_bench import ANCHORS, BIASED, EVEN, JUDGED, LEARNED, MODEL, Bench, contextual
from tests.support.records import Truth, log_softmax, make_record
from tests.support.world import V

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles import futility
from hemostat.profiles.decisions import Reason
from hemostat.profiles.proposals import (
    MAX_TOKENS_BETWEEN_PROPOSALS,
    MIN_TOKEN_GROWTH,
    MIN_TOKEN_GROWTH_UNDER_TEST,
)
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.profiles.contextual import CONTEXTUAL, probe_profile


def test_records_of_another_vocabulary_are_ignored() -> None:
    bench = Bench()
    ours, foreign = (
        make_record(Truth(*(log_softmax(np.zeros((3, size))),) * 2, np.zeros(3, int)), 4, key=LEARNED[0])
        for size in (V, 9)
    )
    assert bench.profiles.learns_from(ours)
    assert not bench.profiles.learns_from(foreign)


def test_a_contextual_proposal_is_tested_and_promoted() -> None:
    bench = Bench()
    profile = contextual()
    report = {"tokens": 15_000, "rank": 8, "won_back": 0.3}
    assert bench.profiles.proposals.propose(profile, "ridge, rank 8", report)
    event = bench.last("propose")
    assert (event["version"], event["why"], event["evidence"]) == (profile.version, "ridge, rank 8", report)
    bench.feed(BIASED, JUDGED, bench.serves)
    assert bench.profiles.serving.version == profile.version
    shown = bench.profiles.report.describe(profile.version)
    assert shown is not None
    assert (shown["family"], shown["state"], shown["kinds"]) == ("contextual", "selected", [REST_KIND])
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.serving.version == profile.version


def test_a_proposal_must_be_learned_from_more_tokens_and_still_more_while_one_is_tested() -> None:
    bench = Bench()
    first, second, third = contextual(1.0), contextual(0.9), contextual(0.8)
    assert bench.profiles.proposals.accepts(CONTEXTUAL, 1)
    assert bench.profiles.proposals.propose(first, "", {"tokens": 10_000})
    assert not bench.profiles.proposals.propose(second, "", {"tokens": MIN_TOKEN_GROWTH_UNDER_TEST * 10_000 - 1})
    assert bench.profiles.trials.tested_versions == [first.version]
    bench.feed(BIASED, JUDGED[:3])
    learned = MIN_TOKEN_GROWTH_UNDER_TEST * 10_000
    assert bench.profiles.proposals.propose(second, "", {"tokens": learned})
    assert bench.profiles.trials.tested_versions == [first.version], "its test is finished first"
    bench.feed(BIASED, JUDGED[3:], bench.serves)
    assert bench.profiles.serving.selected == first.version
    assert bench.profiles.trials.tested_versions == [second.version], "it is compared with what serves now"
    bench.profiles.lifecycle.drop(bench.profiles.trials.tested[0], Reason.UNPROVEN, "")
    assert not bench.profiles.proposals.accepts(CONTEXTUAL, MIN_TOKEN_GROWTH * learned - 1)
    assert bench.profiles.proposals.accepts(CONTEXTUAL, MIN_TOKEN_GROWTH * learned)
    assert not bench.profiles.proposals.propose(first, "", {"tokens": MIN_TOKEN_GROWTH * learned}), "it serves"
    assert bench.profiles.proposals.propose(
        third, "", {"tokens": MAX_TOKENS_BETWEEN_PROPOSALS + MIN_TOKEN_GROWTH * learned}
    )
    bench.profiles.operator.roll_back("asked for")
    assert not bench.profiles.proposals.accepts(
        CONTEXTUAL, MAX_TOKENS_BETWEEN_PROPOSALS + MIN_TOKEN_GROWTH * learned + 1
    ), "one is under test"


def waiting(bench: Bench) -> list[str]:
    return [candidate["version"] for candidate in bench.status()["waiting"]]


def test_of_the_newer_proposals_that_wait_the_last_one_is_tested() -> None:
    bench = Bench()
    first, *later = (contextual(1.0 - 0.1 * n) for n in range(4))
    bench.feed(EVEN, JUDGED[:1])
    assert bench.profiles.proposals.propose(first, "", {"tokens": 1_000})
    for n, profile in enumerate(later, start=1):
        bench.feed(BIASED, JUDGED[2 * n : 2 * n + 2])
        assert bench.profiles.proposals.propose(profile, "", {"tokens": 1_000 * MIN_TOKEN_GROWTH_UNDER_TEST**n})
        assert bench.profiles.trials.tested_versions == [first.version]
        assert waiting(bench) == [profile.version]
    dropped = bench.last("drop")
    assert (dropped["version"], dropped["reason"], dropped["evidence"]) == (later[1].version, "newer", {})
    assert later[1].version not in bench.profiles.catalogue
    [kind] = bench.status()["kinds"]
    assert kind["candidates"][0]["summary"].endswith("; a newer build waits for the end of this test")
    [shown] = bench.status()["waiting"]
    assert shown["summary"] == f"waits until the test of {first.version[:8]}, an earlier build, has ended"
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert again.profiles.trials.tested_versions == [first.version]
    assert waiting(again) == [later[2].version]
    again.feed(BIASED, JUDGED[8:], again.serves)
    assert again.profiles.serving.selected == first.version
    assert again.profiles.trials.tested_versions == [later[2].version]


def test_a_restart_does_not_let_a_build_from_fewer_tokens_replace_the_one_that_waits() -> None:
    bench = Bench()
    bench.feed(EVEN, JUDGED[:1])
    bench.profiles.proposals.propose(contextual(tokens=1_000), "", {"tokens": 1_000})
    bench.profiles.proposals.propose(contextual(0.9, tokens=10_000), "", {"tokens": 10_000})
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert not again.profiles.proposals.accepts(CONTEXTUAL, 9_000)


def test_a_hopeless_test_gives_way_to_the_newer_build() -> None:
    """It gives way without any evidence of a gain in 96 units; one that may still be proven is finished."""
    bench = Bench()
    bench.feed(EVEN, JUDGED[:1])
    useless, newer = contextual(-0.3), contextual(0.9)
    bench.profiles.proposals.propose(useless, "", {"tokens": 1_000})
    bench.profiles.proposals.propose(newer, "", {"tokens": 10_000})
    bench.feed(BIASED, JUDGED[1 : futility.MIN_FUTILE_UNITS])
    assert bench.profiles.trials.tested_versions == [useless.version]
    bench.feed(BIASED, JUDGED[futility.MIN_FUTILE_UNITS : futility.MIN_FUTILE_UNITS + 1])
    assert bench.profiles.trials.tested_versions == [newer.version]
    dropped = bench.last("drop")
    assert (dropped["version"], dropped["reason"]) == (useless.version, "unproven")
    assert dropped["why"] == "no evidence of a gain in 96 held-out requests of its most frequent kind, and others wait"


def test_a_candidate_is_not_hopeless_while_one_of_its_kinds_can_decide() -> None:
    bench = Bench()
    kinds = [bench.profiles.kinds.update(kind) for kind in ("often", "rare")]
    for kind in kinds:
        bench.feed(EVEN, JUDGED[:1], kind=kind)
    useless, newer = contextual(-0.3), contextual(0.9)
    bench.profiles.proposals.propose(useless, "", {"tokens": 1_000})
    bench.profiles.proposals.propose(newer, "", {"tokens": 10_000})
    bench.feed(BIASED, JUDGED[1:800], kind="often")
    assert bench.profiles.trials.tested_versions == [useless.version]
    bench.feed(BIASED, JUDGED[800 : 800 + futility.MIN_FUTILE_UNITS], kind="rare")
    assert bench.profiles.trials.tested_versions == [newer.version]


def test_after_a_rollback_a_new_proposal_is_accepted_soon() -> None:
    bench = Bench()
    bench.profiles.proposals.propose(contextual(), "", {"tokens": 100_000})
    bench.feed(BIASED, JUDGED, bench.serves)
    bench.profiles.operator.roll_back("asked for")
    assert not bench.profiles.proposals.accepts(CONTEXTUAL, 100_000)
    assert bench.profiles.proposals.accepts(CONTEXTUAL, 100_000 + bench.settings.min_tokens)


def test_after_a_learner_restart_only_what_serves_must_be_surpassed(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    profile = replace(contextual(), metadata={"tokens": "100000"})
    bench.profiles.proposals.propose(profile, "", {"tokens": 100_000})
    bench.profiles.proposals.set_probe(probe_profile(MODEL, V, ANCHORS, 1.0))
    assert not bench.profiles.proposals.accepts(CONTEXTUAL, 150_000), "it is under test"
    bench.feed(BIASED, JUDGED, bench.serves)
    for each in (bench, bench.restart()):
        each.profiles.set_model_pair(MODEL, V)
        each.profiles.proposals.set_probe(probe_profile(MODEL, V, ANCHORS, 1.0))
        assert each.profiles.serving.selected == profile.version
        assert not each.profiles.proposals.accepts(CONTEXTUAL, 150_000)
        assert each.profiles.proposals.accepts(CONTEXTUAL, 10**6)
    assert "other anchors" not in caplog.text
    bench.profiles.proposals.set_probe(probe_profile(MODEL, V, ANCHORS[:4], 1.0))
    assert "other anchors" in caplog.text
    bench.profiles.operator.roll_back("asked for")
    assert not bench.profiles.proposals.accepts(CONTEXTUAL, 1_000)
    bench.profiles.proposals.set_probe(probe_profile(MODEL, V, ANCHORS, 1.0))
    assert bench.profiles.proposals.accepts(CONTEXTUAL, 1_000)


@pytest.mark.parametrize("made", [{"mode": "off"}, {"known": False}], ids=["off", "not known"])
def test_a_proposal_that_could_not_be_tested_is_not_accepted(made: dict[str, Any]) -> None:
    bench = Bench(**made)
    assert not bench.profiles.proposals.accepts(CONTEXTUAL, 10**9)
    assert not bench.profiles.proposals.propose(contextual(), "", {"tokens": 10**9})


def test_a_proposal_for_another_model_is_refused() -> None:
    bench = Bench()
    with pytest.raises(InvalidProfileError, match="the model another, not for m"):
        bench.profiles.proposals.propose(replace(contextual(), model="another"), "", {"tokens": 1})
    bench.profiles.set_model_pair(MODEL, V + 1)
    with pytest.raises(InvalidProfileError, match="vocabulary of 60 ids"):
        bench.profiles.proposals.propose(contextual(), "", {"tokens": 1})


def test_the_probe_is_held_and_neither_tested_nor_served() -> None:
    bench = Bench()
    asked = probe_profile(MODEL, V, ANCHORS, 1.0)
    bench.profiles.proposals.set_probe(asked)
    profiles = bench.profiles
    assert profiles.engine_versions() == [asked.version]
    assert profiles.evaluated_profiles() == ()
    assert profiles.catalogue.get(asked.version) is asked
    shown = profiles.report.describe(asked.version)
    assert shown is not None
    assert shown["state"] == "probe"
    assert bench.store.profiles() == []
    with pytest.raises(HemostatError, match="no profile"):
        profiles.operator.promote(asked.version)
    assert profiles.operator.import_profile(asked) == asked.version
    bench.feed(BIASED, JUDGED[:20])
    assert profiles.trials.tested_versions == []
    other = contextual(anchors=ANCHORS[::-1])
    profiles.proposals.propose(other, "", {"tokens": 1})
    assert profiles.engine_versions() == [other.version, asked.version]
    profiles.lifecycle.drop(profiles.trials.tested[0], Reason.UNPROVEN, "")
    profiles.proposals.propose(contextual(), "", {"tokens": 10})
    assert asked.version not in profiles.engine_versions(), "another one that is held has these anchors"
    profiles.operator.set_mode("off")
    assert asked.version not in profiles.engine_versions()
    profiles.operator.set_mode("auto")
    newer = probe_profile(MODEL, V, ANCHORS[:3], 1.0)
    profiles.proposals.set_probe(newer)
    assert profiles.catalogue.get(asked.version) is None
    assert profiles.engine_versions()[-1] == newer.version
    profiles.set_model_pair(MODEL, V + 1)
    assert profiles.engine_versions() == []
