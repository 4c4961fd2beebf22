"""Standard errors compared with the streaming estimator, with simulation, and with values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.statistics.streaming import RatioEstimate, student_975
from hemostat_lab.doctor.classes import CLASSES, classify
from hemostat_lab.doctor.estimates import Sample


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.integers(0, 2**32 - 1))
def test_mean_equals_the_ratio_estimate(lengths: list[int], seed: int) -> None:
    values = [np.random.default_rng([seed, n]).normal(size=length) for n, length in enumerate(lengths)]
    sample = Sample(np.repeat(np.arange(len(lengths)), lengths), len(lengths))
    result = sample.mean(np.concatenate(values))
    oracle = RatioEstimate()
    for value in values:
        oracle = oracle.update(float(value.sum()), len(value))
    ratio = oracle.get()
    assert result.value == pytest.approx(ratio.mean, abs=1e-12)
    assert result.by_request == pytest.approx((ratio.high - ratio.mean) / student_975(len(lengths) - 1), abs=1e-9)
    every = np.concatenate(values)
    assert result.by_token == pytest.approx(every.std(ddof=1) / math.sqrt(len(every)), abs=1e-12)


def test_standard_error_by_request_equals_the_spread_of_repeated_samples() -> None:
    rng = np.random.default_rng(1)
    ratios, estimates = [], []
    for _ in range(400):
        # Tokens of a request are strongly correlated: the error by token is far too small.
        a = np.repeat(rng.normal(1.0, 0.3, 60), 8) + 0.1 * rng.normal(size=480)
        b = np.repeat(rng.normal(0.5, 0.3, 60), 8) + 0.1 * rng.normal(size=480)
        sample = Sample(np.repeat(np.arange(60), 8), 60)
        ratio = math.exp(a.mean() - b.mean())
        ratios.append(ratio)
        estimates.append(sample.function(lambda means: math.exp(means[0] - means[1]), [ratio, -ratio], a, b))
    spread = float(np.std(ratios))
    assert np.mean([estimate.by_request for estimate in estimates]) == pytest.approx(spread, rel=0.12)
    assert np.mean([estimate.by_token for estimate in estimates]) < 0.5 * spread


def test_too_few_requests_or_tokens_give_nan() -> None:
    estimate = Sample(np.zeros(3, np.int64), 1).mean(np.array([1.0, 2.0, 3.0]))
    assert estimate.value == 2.0
    assert math.isnan(estimate.by_request)
    assert estimate.by_token == pytest.approx(1.0 / math.sqrt(3.0))
    assert math.isnan(Sample(np.zeros(0, np.int64), 0).mean(np.zeros(0)).value)


def test_infinite_value_has_no_standard_error() -> None:
    result = Sample(np.array([0, 1]), 2).mean(np.array([np.inf, 1.0]))
    assert result.value == math.inf
    assert math.isnan(result.by_request)


def test_selection_counts_its_own_requests() -> None:
    sample = Sample(np.array([0, 0, 1, 2, 2]), 3)
    chosen = sample.select(np.array([True, False, False, True, True]))
    assert chosen.requests == 2
    assert chosen.request.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" word", "word start"),
        ("\nword", "word start"),
        ("ing", "word continuation"),
        ("'t", "word continuation"),
        ("你好", "word continuation"),
        ("42", "digits"),
        (" 7", "digits"),
        ("½", "digits"),
        (" ==", "punctuation"),
        ("🙂", "punctuation"),
        (".\n", "punctuation"),
        ("\n\n", "whitespace"),
        (" ", "whitespace"),
        ("\N{REPLACEMENT CHARACTER}", "part of a character"),
        ("", "special"),
    ],
)
def test_classes(text: str, expected: str) -> None:
    assert classify(text, False) == expected
    assert classify(text, True) == "special"


@given(st.text(max_size=8), st.booleans())
def test_every_token_has_a_class(text: str, special: bool) -> None:
    assert classify(text, special) in CLASSES
