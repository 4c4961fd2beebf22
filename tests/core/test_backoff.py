"""Pauses between attempts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat_calibration.backoff import Backoff

PAUSES = st.lists(st.floats(0.0, 1e3), min_size=1, max_size=8)
DRAWN = st.floats(0.0, 1.0, exclude_max=True)


@given(PAUSES, st.lists(st.booleans(), max_size=30), DRAWN)
def test_each_failure_in_a_row_has_its_pause_and_a_success_begins_anew(
    seconds: list[float], successes: list[bool], drawn: float
) -> None:
    exact, drawing = Backoff(seconds), Backoff(seconds, uniform=lambda: drawn)
    in_a_row = 0
    for success in successes:
        if success:
            exact.reset()
            drawing.reset()
            in_a_row = 0
        else:
            longest = seconds[min(in_a_row, len(seconds) - 1)]
            assert exact.pause() == longest
            assert 0.5 * longest <= drawing.pause() <= longest
            in_a_row += 1
        assert exact.failures == drawing.failures == in_a_row


@given(PAUSES, st.lists(st.floats(0.0, 2e3), max_size=30), st.floats(-1e6, 1e6))
def test_an_attempt_waits_for_the_pause_of_the_last_failure_and_for_no_other(
    seconds: list[float], steps: list[float], now: float
) -> None:
    backoff, allowed_from = Backoff(seconds), float("-inf")
    for n, step in enumerate(steps):
        now += step
        assert backoff.may_try(now) == (now >= allowed_from)
        if n % 7 == 6:
            backoff.reset()
            allowed_from = float("-inf")
            assert backoff.may_try(now), "after a success nothing is waited for"
        else:
            allowed_from = now + seconds[min(backoff.failures, len(seconds) - 1)]
            backoff.failed(now)


@pytest.mark.parametrize("now", [-5.0, 0.0, 1e12])
def test_the_first_attempt_waits_for_nothing(now: float) -> None:
    assert Backoff((1.0,)).may_try(now)


def test_two_processes_do_not_retry_at_once() -> None:
    assert len({Backoff((1.0,), random.random).pause() for _ in range(20)}) > 10
