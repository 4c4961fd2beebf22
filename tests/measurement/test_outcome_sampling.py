"""How much of the conversations is reported and counted, as the traffic changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.measurement.outcome_sampling import MAX_REPORTS_PER_SECOND, WAIT_SECONDS, OutcomeSampling
from hemostat.measurement.rates import SMOOTHED_SECONDS, SmoothedRate


def test_with_little_traffic_everything_counts() -> None:
    sampling = OutcomeSampling()
    assert not sampling.update(MAX_REPORTS_PER_SECOND, 0.0)
    assert (sampling.reported, sampling.counted) == (1.0, 1.0)


@given(st.lists(st.tuples(st.floats(0.0, 1e7), st.floats(0.1, 3000.0)), max_size=60))
def test_the_limit_holds_after_each_look_and_what_counts_rises_late(looks: list[tuple[float, float]]) -> None:
    sampling, now = OutcomeSampling(), 0.0
    reported = [(0.0, 1.0)]
    """When it was set, and to what."""
    for rate, seconds in looks:
        now += seconds
        sampling.update(rate, now)
        reported.append((now, sampling.reported))
        assert rate * sampling.reported <= MAX_REPORTS_PER_SECOND
        last = [value for at, value in reported if at > now - WAIT_SECONDS]
        assert sampling.counted <= min(last), "what counts has been reported for all of the time"


def test_what_is_reported_comes_back_in_steps() -> None:
    sampling = OutcomeSampling()
    sampling.update(1000.0, 0.0)
    assert sampling.reported == 1 / 32
    seen = []
    for step in range(12):
        sampling.update(30.0, (step + 1) * WAIT_SECONDS)
        seen.append((sampling.reported, sampling.counted))
    assert seen[:3] == [(1 / 16, 1 / 32), (1 / 8, 1 / 16), (1 / 4, 1 / 8)]
    assert seen[-1] == (0.5, 0.5), "a margin of 2 is left"
    assert not sampling.update(49.0, 20 * WAIT_SECONDS), "so that this changes nothing"


@pytest.mark.parametrize("stored", [(0.5, 1.0), (2.0, 1.0), (1.0, 0.0), (float("nan"), 0.5)])
def test_what_cannot_have_been_stored(stored: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        OutcomeSampling().restore(*stored)


def test_a_rate_is_an_average_of_the_last_half_minute_or_so() -> None:
    rate = SmoothedRate()
    rate.update(1e9, 0.0)
    assert rate.per_second == 0.0, "what was counted before is not known to be recent"
    rate.update(1e9 + 30.0, 0.5)
    assert rate.per_second == pytest.approx(30.0 / SMOOTHED_SECONDS, rel=0.02)
    rate.update(1e9 + 30.0, 0.5)
    for second in range(200):
        rate.update(1e9 + 30.0 + 7.0 * second, 1.0 + second)
    assert rate.per_second == pytest.approx(7.0, rel=0.02)
