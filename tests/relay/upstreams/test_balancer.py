"""Which engine gets a request."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.openai.conversation_key import conversation_key
from hemostat.relay.upstreams.balancer import BOUND, MIN_CAPACITY, UNAVAILABLE, Balancer

NAMES = [f"10.0.0.{n}:8000" for n in range(64)]
loads_of_engines = st.lists(st.one_of(st.just(UNAVAILABLE), st.integers(0, 500)), min_size=1, max_size=64)
keys = st.integers(0, 2**32 - 1)


@given(loads_of_engines, st.one_of(st.none(), keys))
def test_an_available_engine_is_chosen_wherever_there_is_one(loads: list[int], key: int | None) -> None:
    chosen = Balancer(NAMES[: len(loads)]).choose(loads, key)
    assert (chosen >= 0) == any(load != UNAVAILABLE for load in loads)
    assert chosen < 0 or loads[chosen] != UNAVAILABLE


@given(loads_of_engines)
def test_without_a_conversation_the_least_loaded_engine_is_chosen(loads: list[int]) -> None:
    chosen = Balancer(NAMES[: len(loads)]).choose(loads, None)
    available = [load for load in loads if load != UNAVAILABLE]
    assert not available or loads[chosen] == min(available)


@given(loads_of_engines, keys)
def test_no_engine_gets_more_than_its_bound(loads: list[int], key: int) -> None:
    chosen = Balancer(NAMES[: len(loads)]).choose(loads, key)
    available = [load for load in loads if load != UNAVAILABLE]
    if available:
        assert loads[chosen] < max(BOUND * (sum(available) + 1) / len(available), MIN_CAPACITY)


@given(st.integers(2, 16), st.integers(0, 15), keys)
def test_when_an_engine_leaves_only_its_own_conversations_move(count: int, gone: int, key: int) -> None:
    balancer = Balancer(NAMES[:count])
    before = balancer.choose([0] * count, key)
    without = [UNAVAILABLE if index == gone % count else 0 for index in range(count)]
    assert before == gone % count or balancer.choose(without, key) == before
    assert Balancer(NAMES[:count]).choose([0] * count, key) == before, "every relay has the same ring"


def test_conversations_are_spread_evenly() -> None:
    balancer = Balancer(NAMES[:4])
    spread = Counter(balancer.choose([0, 0, 0, 0], key * 2**32 // 10_000) for key in range(10_000))
    assert min(spread.values()) > 1_700


@pytest.mark.parametrize("text", [b"Summarize file %d.", b"page_%06d.txt"])
def test_conversations_that_differ_in_a_digit_are_spread_as_random_keys_are(text: bytes) -> None:
    balancer = Balancer(NAMES[:16])
    idle = [0] * 16
    shares = Counter(balancer.choose(idle, key << 14) for key in range(2**18))
    form = b'{"messages": [{"role": "user", "content": "' + text + b'"}]}'
    spread = Counter(balancer.choose(idle, conversation_key(form % n)) for n in range(10_000))
    expected = {engine: shares[engine] / 2**18 * 10_000 for engine in range(16)}
    chi_squared = sum((spread[engine] - wanted) ** 2 / wanted for engine, wanted in expected.items())
    assert chi_squared < 44.3, "random keys exceed it once in 10,000 times, at 15 degrees of freedom"


def test_idle_engines_take_turns() -> None:
    balancer = Balancer(NAMES[:4])
    assert {balancer.choose([0, 0, 0, 0], None) for _ in range(4)} == {0, 1, 2, 3}
