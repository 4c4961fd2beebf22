"""What an operator decides: imports, promotions, pins, rollbacks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.profile_bench import (
    ANCHORS,
    BIASED,
    EVEN,
    JUDGED,
    MODEL,
    Bench,
    contextual,
    harmful,
    helpful,
)
from tests.support.records import make_record
from tests.support.world import V

from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.profiles.contextual import probe_profile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import Features


def test_an_import_is_tested_and_stays_beside_new_proposals() -> None:
    bench = Bench()
    profile = helpful()
    assert bench.profiles.operator.import_profile(profile) == profile.version
    assert bench.profiles.operator.import_profile(profile) == profile.version
    assert bench.decisions() == ["import"]
    assert bench.profiles.serving.version is None
    learned = bench.learn(seed=1)
    assert bench.profiles.trials.tested_versions == [profile.version, learned]
    bench.feed(BIASED, JUDGED, bench.serves)
    assert bench.profiles.serving.version == profile.version


def test_the_event_of_an_import_says_that_it_reads_other_anchors_than_the_learner() -> None:
    bench = Bench()
    bench.profiles.proposals.set_probe(probe_profile(MODEL, V, ANCHORS, 1.0))
    bench.profiles.operator.import_profile(contextual())
    assert bench.last("import")["why"] == "imported by the operator"
    other = contextual(anchors=ANCHORS + 1)
    bench.profiles.operator.import_profile(other)
    assert "other anchors" in bench.last("import")["why"]
    # It is tested, by what is known of it: on records that brought the learner's anchors, nothing.
    record = make_record(BIASED.truth(0), 20, key=JUDGED[0])
    values = np.zeros((record.tokens, len(ANCHORS)), np.float32)
    bench.observe(replace(record, features=Features(anchors_digest(ANCHORS), values), engine_boot="boot"))
    judged = {c["version"]: c["requests"] for c in bench.status()["candidates"]}
    assert judged[other.version] == 0


def test_a_profile_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidProfileError, match="vocabulary of 61 ids, the model has 60"):
        Bench().profiles.operator.import_profile(harmful(V + 1))


def test_rolling_back_identity_is_an_error() -> None:
    with pytest.raises(HemostatError, match="identity serves"):
        Bench().profiles.operator.roll_back("asked for")


def test_a_promotion_by_the_operator_is_recorded_and_watched() -> None:
    bench = Bench()
    bad = bench.profiles.operator.import_profile(harmful())
    bench.feed(EVEN, JUDGED[:5])
    bench.profiles.operator.promote(bad)
    assert bench.profiles.serving.version == bad
    event = bench.last("promote")
    assert (event["reason"], event["evidence"]["units"]) == ("operator", 5)
    assert bench.profiles.events.counts["promote", "operator"] == 1
    with pytest.raises(HemostatError, match="serves there already"):
        bench.profiles.operator.promote(bad)
    bench.feed(EVEN, JUDGED, lambda: not bench.serves())
    assert bench.last("roll_back")["reason"] == "harm"


def test_a_pinned_profile_serves_until_it_is_unpinned() -> None:
    bench = Bench()
    bad, good = bench.profiles.operator.import_profile(harmful()), bench.profiles.operator.import_profile(helpful())
    bench.profiles.operator.pin(bad)
    bench.feed(BIASED, JUDGED[:300])
    assert bench.profiles.serving.version == bad
    status = bench.status()
    assert status["pinned"]
    [kind] = status["kinds"]
    assert kind["watch"]["log_e"] > kind["watch"]["needed"]
    [candidate] = kind["candidates"]
    assert candidate["log_e_adjusted"] > candidate["needed"]
    assert candidate["summary"] == "proven better than the pinned profile"
    with pytest.raises(HemostatError, match="unpin"):
        bench.profiles.operator.promote(good)
    again = bench.restart()
    again.profiles.set_model_pair(MODEL, V)
    assert (again.profiles.serving.version, again.profiles.serving.pinned) == (bad, True)
    bench.profiles.operator.unpin()
    bench.feed(BIASED, JUDGED[300:], lambda: bench.profiles.serving.selected == good)
    assert bench.profiles.serving.version == good
    assert [d for d in bench.decisions() if "pin" in d] == ["pin", "unpin"]
    with pytest.raises(HemostatError, match="nothing is pinned"):
        bench.profiles.operator.unpin()
    bench.profiles.operator.pin(good)
    bench.profiles.operator.roll_back("asked for")
    assert (bench.profiles.serving.version, bench.profiles.serving.pinned) == (None, False)


def test_an_unknown_version_cannot_serve() -> None:
    bench = Bench()
    for act in (bench.profiles.operator.promote, bench.profiles.operator.pin):
        with pytest.raises(HemostatError, match="no profile"):
            act("0" * 32)
    assert not bench.profiles.serving.pinned
