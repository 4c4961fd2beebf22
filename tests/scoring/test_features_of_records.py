"""Features, recovered distributions and hidden states: what the scorer hands the reference, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.captures import V, capture
from tests.support.scorer_bench import SCORED, VERSION, Bench, D
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_calibration.records import Features, RecoveredDivergence
from hemostat_calibration.statistics.split import prompt_key

pytestmark = pytest.mark.usefixtures("quick_scorer")


ANCHORS = np.array([3, 1, 4], np.int32)
DIGEST = anchors_digest(ANCHORS)


def contextual(ids: Any = ANCHORS) -> CalibrationProfile:
    return contextual_profile(
        model="m",
        anchors=ids,
        linear=np.array([[1.0, 2.0, -1.0]]),
        offset=np.zeros(1),
        up=np.ones((V, 1)),
        clamp_nats=1.0,
    )


async def test_features_become_codes_that_the_reference_is_asked_with(bench: Bench) -> None:
    mine, bias, foreign = contextual(), temperature_bias("m", V, 1.0, np.ones(V), 1.0), contextual(ANCHORS + 1)
    bench.profiles = (mine, bias, foreign)
    values = np.array([[1, -1, 0], [np.nan] * 3, [2, 0, -2]], np.float32)
    bench.handed("n", Features(DIGEST, values))
    assert await bench.ends(capture(nonce="n")) == SCORED
    (codes,), (record,) = bench.reference.codes, bench.records
    assert set(codes) == {mine.version}, "a bias needs none, another set of anchors cannot be read"
    np.testing.assert_allclose(codes[mine.version], [[-1], [0], [4]])
    assert record.features is not None
    np.testing.assert_array_equal(record.features.values, values)
    np.testing.assert_array_equal(record.shifts[mine.version].expected, [0.125, np.nan, 0.125])
    np.testing.assert_allclose(record.shifts[mine.version].code, [[-1], [0], [4]])  # type: ignore[arg-type]
    np.testing.assert_array_equal(record.shifts[bias.version].expected, 0.125)
    assert not bench.scorer.stages.features.dropped


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (None, "not_sent"),
        (Features("f" * 32, np.zeros((3, 3), np.float32)), "other_anchors"),
        (Features(DIGEST, np.zeros((3, 0), np.float32)), "shape"),
        (Features(DIGEST, np.zeros((3, 2), np.float32)), "shape"),
        (Features(DIGEST, np.zeros(3, np.float32)), "shape"),
        (Features(DIGEST, np.full((3, 3), np.inf, np.float32)), "not_finite"),
        (Features(DIGEST, np.array([[0, 1, np.nan]] * 3, np.float32)), "not_finite"),
        (Features(DIGEST, np.full((3, 3), np.nan, np.float32)), "masked"),
        (Features(DIGEST, np.zeros((0, 3), np.float32)), "masked"),
    ],
)
async def test_features_that_are_of_no_use_are_counted_and_the_rest_is_scored(
    bench: Bench, features: Features | None, reason: str
) -> None:
    bench.profiles = (contextual(),)
    bench.handed("n", features)  # type: ignore[arg-type]
    assert await bench.ends(capture(nonce="n")) == SCORED
    assert bench.scorer.stages.features.dropped == Counter({reason: 1})
    (record,) = bench.records
    assert record.features is None
    assert bench.reference.codes == [{}]
    np.testing.assert_allclose(record.shifts[VERSION].log_normalizer, 0.25)


@pytest.mark.parametrize("width", [0, 2, 3])
async def test_more_anchors_than_a_hidden_state_has_numbers_go_to_the_reference(bench: Bench, width: int) -> None:
    bench.profiles = (contextual(),)
    bench.info = replace(bench.info, hidden_size=width)
    bench.reference.recovered = RecoveredDivergence(*np.full((7, 3), 0.001))
    values = np.array([[1, -1, 0], [np.nan] * 3, [2, 0, -2]], np.float32)
    bench.handed("n", Features(DIGEST, values))
    assert await bench.ends(capture(nonce="n")) == SCORED
    (given,), (record,) = bench.reference.compressed, bench.records
    if width != 2:
        assert given is None
        assert record.recovered is None
        return
    assert given is not None
    np.testing.assert_array_equal(given.anchors, ANCHORS)
    np.testing.assert_array_equal(given.features, values)
    np.testing.assert_array_equal(given.logprobs, record.compressed.logprobs)
    assert record.recovered is bench.reference.recovered


async def test_without_a_tap_there_are_no_features_and_profiles_that_read_none_are_learned(bench: Bench) -> None:
    assert await bench.ends(capture()) == SCORED
    assert not bench.scorer.stages.features.dropped
    bench.profiles = (contextual(),)
    assert await bench.ends(capture()) == SCORED
    assert bench.scorer.stages.features.dropped == Counter({"no_tap": 1})


@pytest.mark.parametrize("rows", [2, 5])
async def test_features_are_fitted_to_the_output(bench: Bench, rows: int) -> None:
    bench.profiles = (contextual(),)
    bench.handed("n", Features(DIGEST, np.ones((rows, 3), np.float32)))
    assert await bench.ends(capture(nonce="n")) == SCORED
    features = bench.records[0].features
    assert features is not None
    assert np.isnan(features.values).any(axis=1).tolist() == [False, False, rows == 2]


async def test_hidden_states_are_asked_for_where_they_are_learned_from(bench: Bench) -> None:
    learned, judged = capture("learned"), capture("judged", prompt_token_ids=np.array([7], "<i4").tobytes())
    bench.learning = prompt_key(np.arange(5))
    await bench.ends(learned, judged)
    hidden = {record.request_id: record.reference_hidden for record in bench.records}
    assert hidden["judged"] is None
    np.testing.assert_array_equal(hidden["learned"], np.ones((3, D), np.float32))
