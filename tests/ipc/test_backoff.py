"""Pauses between attempts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hemostat.ipc.backoff import Backoff


def test_pauses_grow_to_the_last_one_and_start_again_after_a_success() -> None:
    backoff = Backoff((1.0, 2.0, 4.0), uniform=lambda: 1.0)
    assert [backoff.pause() for _ in range(5)] == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert backoff.failures == 5
    backoff.reset()
    assert backoff.pause() == 1.0


@given(st.floats(0.0, 1.0, exclude_max=True))
def test_a_pause_is_in_the_upper_half_of_its_range(drawn: float) -> None:
    assert 0.5 <= Backoff((1.0,), uniform=lambda: drawn).pause() <= 1.0


def test_two_processes_do_not_retry_at_once() -> None:
    assert len({Backoff((1.0,)).pause() for _ in range(20)}) > 10
