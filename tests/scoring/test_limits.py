"""Back-pressure of the shadow path: bounds hold, time is an argument."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.support.captures import sized_capture

from hemostat.scoring.limits import Breaker, BreakerState, ShadowQueue, TokenBudget


def test_queue_keeps_order_and_refuses_what_does_not_fit() -> None:
    queue = ShadowQueue(limit=2)
    assert [queue.offer(sized_capture(str(n), captured_at=n)) for n in range(3)] == [True, True, False]
    assert queue.lag_seconds(3.0) == 3.0
    assert [c.request_id for c in (queue.take(), queue.take()) if c] == ["0", "1"]
    assert queue.take() is None
    assert queue.lag_seconds(3.0) == 0.0


def test_queue_is_bounded_in_bytes_and_gives_them_back() -> None:
    queue = ShadowQueue(limit=100, limit_bytes=10)
    assert queue.offer(sized_capture(size=8))
    assert not queue.offer(sized_capture(size=8))
    queue.take()
    assert queue.offer(sized_capture(size=8))


def test_captures_that_may_pass_come_every_second_time_and_only_if_they_are_ready() -> None:
    queue = ShadowQueue(limit=10)
    for n in range(8):
        assert queue.offer(sized_capture(str(n)))
    order = []
    while capture := queue.take(lambda c: c.request_id != "4" or len(queue) == 1, lambda c: c.request_id in "4567"):
        order.append(capture.request_id)
    assert order == ["5", "0", "6", "1", "7", "2", "3", "4"]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_no_capture_waits_for_more_than_twice_those_before_it(traffic: list[tuple[bool, bool]]) -> None:
    """traffic: whether a capture may pass, and whether one is taken after it came."""
    queue, before, taken = ShadowQueue(limit=100), dict[str, int](), list[str]()
    came = dict[str, int]()
    passing = {str(n) for n, (may_pass, _) in enumerate(traffic) if may_pass}
    for n, (_, take) in enumerate(traffic):
        before[str(n)], came[str(n)] = len(queue), len(taken)
        assert queue.offer(sized_capture(str(n)))
        if take and (capture := queue.take(may_pass=lambda c: c.request_id in passing)):
            taken.append(capture.request_id)
    while capture := queue.take(may_pass=lambda c: c.request_id in passing):
        taken.append(capture.request_id)
    assert sorted(taken) == sorted(before)
    for at, name in enumerate(taken):
        assert at - came[name] <= 2 * before[name] + 1


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_budget_never_spends_more_than_rate_allows(requests: list[int]) -> None:
    budget = TokenBudget(rate=1000.0, burst=2000.0)
    now, spent = 0.0, 0
    for tokens in requests:
        now += budget.delay(tokens, now)
        budget.spend(tokens, now)
        spent += tokens
        # Debt is allowed for one request larger than the burst; it is paid before the next.
        assert spent - max(requests) <= 2000.0 + 1000.0 * now + 1e-6


def test_budget_of_zero_is_no_limit() -> None:
    budget = TokenBudget(rate=0.0, burst=1.0)
    budget.spend(10**9, 0.0)
    assert budget.delay(10**9, 0.0) == 0.0


def test_breaker_opens_after_failures_in_a_row_and_one_trial_decides() -> None:
    breaker = Breaker(threshold=2, cooldown=10.0)
    breaker.failed(0.0)
    breaker.succeeded()
    breaker.failed(1.0)
    assert breaker.allow(1.0)
    breaker.failed(2.0)
    assert breaker.state(2.0) is BreakerState.OPEN
    assert not breaker.allow(5.0)
    assert breaker.allow(12.0)
    assert not breaker.allow(12.0), "only one trial at a time"
    breaker.failed(12.5)
    assert not breaker.allow(13.0), "a failed trial opens it for another cooldown"
    assert breaker.allow(22.5)
    breaker.succeeded()
    assert breaker.state(23.0) is BreakerState.CLOSED
