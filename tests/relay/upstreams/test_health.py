"""When an engine is ejected, and when it returns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hemostat.relay.upstreams.health import (
    FAILED_CHECKS,
    FAILURES,
    HOLD_SECONDS,
    STABLE_SECONDS,
    Health,
    HealthState,
)


def ejected(*, checked: bool = False, now: float = 0.0) -> Health:
    health = Health(checked=checked)
    for _ in range(FAILURES):
        health.request_failed(now)
    assert health.state is HealthState.EJECTED
    return health


def test_failures_eject_only_in_a_row() -> None:
    health = Health(checked=False)
    for _ in range(10):
        for _ in range(FAILURES - 1):
            health.request_failed(0.0)
        health.request_succeeded()
    assert health.state is HealthState.UP


def test_failed_checks_eject_and_a_passed_one_returns_it() -> None:
    health = Health(checked=True)
    for _ in range(FAILED_CHECKS):
        health.check_failed(0.0)
    assert health.state is HealthState.EJECTED
    health.advance(1000.0)
    assert health.state is HealthState.EJECTED, "the last check failed"
    health.check_passed(1000.0)
    assert health.state is HealthState.UP


def test_an_engine_without_checks_counts_as_up_only_once_a_request_succeeds() -> None:
    health = ejected(checked=False)
    health.advance(1000.0)
    assert (health.up, health.state) == (True, HealthState.RETURNING)
    health.request_succeeded()
    assert health.state is HealthState.UP


def test_an_engine_that_failed_requests_returns_only_after_a_later_check() -> None:
    health = ejected(checked=True)
    health.advance(HOLD_SECONDS[0])
    assert health.state is HealthState.EJECTED
    health.check_passed(HOLD_SECONDS[0])
    assert health.state is HealthState.UP


def test_after_the_return_one_failure_ejects_again_and_for_longer() -> None:
    health, now, holds = ejected(), 0.0, []
    for _ in range(10):
        began = now
        while not health.up:
            now += 0.5
            health.advance(now)
        holds.append(now - began)
        health.request_failed(now)
    assert holds == [*HOLD_SECONDS, *[HOLD_SECONDS[-1]] * (10 - len(HOLD_SECONDS))]


def test_an_engine_that_was_stable_is_held_briefly_again() -> None:
    health = ejected()
    health.advance(HOLD_SECONDS[0])
    health.request_succeeded()
    now = HOLD_SECONDS[0] + STABLE_SECONDS + 1.0
    for _ in range(FAILURES):
        health.request_failed(now)
    health.advance(now + HOLD_SECONDS[0])
    assert health.up


EVENTS = st.sampled_from(["request_failed", "request_succeeded", "check_failed", "check_passed", "advance"])


@given(st.booleans(), st.lists(st.tuples(EVENTS, st.floats(0.0, 100.0)), max_size=60))
def test_whatever_happens_an_engine_that_recovers_returns(checked: bool, events: list[tuple[str, float]]) -> None:
    health, now = Health(checked=checked), 0.0
    for event, seconds in events:
        now += seconds
        if event == "request_succeeded":
            health.request_succeeded()
        else:
            getattr(health, event)(now)
    now += HOLD_SECONDS[-1]
    health.check_passed(now)
    assert health.state is HealthState.UP
