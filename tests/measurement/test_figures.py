"""The sums of one request's figures, which all of its groups add."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.records import Truth, make_record
from tests.support.world import World

from hemostat.measurement.figures import FIGURES, RequestFigures, StageFigures, TokenSums
from hemostat_calibration.divergence.per_token import TokenDivergence, divergence
from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics.confidence import ClippedMean
from hemostat_calibration.statistics.running_mean import RunningMean

RECORD = make_record(World(noise=0.3).truth(1), 8)
"""Forty tokens."""
NAMES = tuple(FIGURES)


def odd(seed: int) -> TokenDivergence:
    """Figures with values that are not available, infinite, or outside of their ranges."""
    random = np.random.default_rng(seed)
    figures = divergence(make_record(World(noise=0.4).truth(seed % 50), 8))

    def changed(values: np.ndarray, *others: float) -> np.ndarray:
        at = random.random(len(values)) < 0.3
        return np.where(at, random.choice(others, len(values)), values)

    return replace(
        figures,
        kl_rc=changed(figures.kl_rc, np.inf, 25.0),
        estimate_rc=changed(figures.estimate_rc, np.nan),
        estimate_cr=np.full(len(figures.kl_rc), np.nan),
        delta_log_likelihood=changed(figures.delta_log_likelihood, -40.0, 40.0, np.nan, -np.inf),
    )


def none_as_nan(value: float | None) -> float:
    return np.nan if value is None else value


@given(st.integers(0, 2**32 - 1))
def test_sums_at_chosen_tokens_are_those_of_a_record_of_these_tokens(seed: int) -> None:
    at = np.random.default_rng(seed).random(RECORD.tokens) < 0.4
    if not at.any():
        return
    truth = World(noise=0.3).truth(1)
    part = make_record(Truth(truth.reference[at], truth.compressed[at], truth.emitted[at]), 8)
    chosen, direct = RequestFigures(divergence(RECORD)).sums_at(at), RequestFigures(divergence(part)).sums
    for field in fields(TokenSums):
        np.testing.assert_allclose(getattr(chosen, field.name), getattr(direct, field.name), rtol=1e-12)


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 2.5])), min_size=1, max_size=6))
def test_a_group_has_the_means_of_each_figure_alone(requests: list[tuple[int, float]]) -> None:
    group = StageFigures()
    means = {name: ClippedMean(figure.lo, figure.cap) for name, figure in FIGURES.items()}
    by_request = {name: RunningMean(figure.lo, figure.cap) for name, figure in FIGURES.items()}
    below = dict.fromkeys(NAMES, 0)
    for seed, weight in requests:
        figures = odd(seed)
        group.update(figures, weight=weight)
        for name, figure in FIGURES.items():
            values = np.asarray(figure.values(figures), np.float64)
            below[name] += round(weight * int((values < figure.lo).sum()))
            values = np.maximum(values, figure.lo)
            means[name] = means[name].update(values, weight)
            if (known := values[~np.isnan(values)]).size:
                by_request[name] = by_request[name].update(float(np.minimum(known, figure.cap).mean()))
    for name, mean in means.items():
        told = group.figure(name)
        assert none_as_nan(told["estimate"]) == pytest.approx(mean.get().mean, rel=1e-12, nan_ok=True)
        assert told["clipped_share"] == ((mean.clipped + below[name]) / mean.tokens if mean.tokens else 0.0)
        assert group.sequence(name).moments.requests == mean.requests
        if "by_request" in told:
            estimate = none_as_nan(told["by_request"]["estimate"])
            assert estimate == pytest.approx(by_request[name].mean, rel=1e-12, nan_ok=True)


def test_a_value_below_a_range_that_has_none_is_refused_and_nothing_is_added() -> None:
    figures = divergence(RECORD)
    group = StageFigures()
    with pytest.raises(InvalidArgumentError, match="total_variation"):
        group.update(replace(figures, tv=figures.tv - 2.0))
    assert (group.requests, group.tokens, group.mean("kl_nats")) == (0, 0, None)
