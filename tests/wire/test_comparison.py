"""Which requests are units of a comparison of arms, and of which one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.support.wire import OTHER_VERSION, VERSION, policy

from hemostat.hooks import Comparison, ExchangeHook
from hemostat.interception.intercepted_exchange import InterceptedExchange
from hemostat.interception.interceptor import Interceptor
from hemostat.ipc.messages import REST_KIND, Policy
from hemostat.openai.kinds import asks_json_in_words

KIND = "chat json greedy"
SERVED = policy(
    mode="auto",
    serving_by_kind={KIND: VERSION, REST_KIND: OTHER_VERSION},
    kinds=frozenset({KIND}),
    acknowledged=frozenset({VERSION, OTHER_VERSION}),
    salt=b"s" * 32,
    control_fraction=0.5,
)


def compared(
    text: str, applied: Policy = SERVED, headers: dict[str, str] | None = None, **more: Any
) -> Comparison | None:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0} | more
    head = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    interceptor = Interceptor(applied, lambda capture: True, lambda metric, labels: None)
    exchange = interceptor.begin("POST", b"/v1/chat/completions", head, "r")
    if exchange is None:
        return None
    assert not hasattr(exchange, "status")
    hook: ExchangeHook = exchange  # type: ignore[assignment]
    hook.request(msgspec.json.encode(body))
    return hook.comparison


def test_both_arms_are_of_the_version_that_the_treated_one_gets() -> None:
    result = [compared(f"Answer {n} in JSON.") for n in range(40)]
    assert {(c.kind, c.version, c.json_in_words) for c in result if c is not None} == {(KIND, VERSION, True)}
    assert 8 <= sum(c.treated for c in result if c is not None) <= 32
    assert len({c.conversation for c in result if c is not None}) == 40


def test_a_kind_that_is_not_followed_belongs_to_the_rest() -> None:
    result = compared("Hello")
    assert result is not None
    assert (result.kind, result.version, result.json_in_words) == (REST_KIND, OTHER_VERSION, False)


def test_the_client_is_named_by_a_digest() -> None:
    comparison = compared("Hello", headers={"authorization": "Bearer one"})
    other = compared("Hello", headers={"authorization": "Bearer other"})
    assert comparison is not None
    assert other is not None
    assert comparison.client != other.client
    assert comparison.conversation == other.conversation
    assert len(comparison.client) == 8


@pytest.mark.parametrize("scoring", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_it_is_known_if_the_client_asked_for_a_stream(stream: bool, scoring: bool) -> None:
    """It says so also of a request that is not sampled, as most are not."""
    result = compared("Hello", msgspec.structs.replace(SERVED, scoring=scoring), stream=stream)
    assert result is not None
    assert result.streamed is stream


@pytest.mark.parametrize(
    ("changes", "request_"),
    [
        ({"mode": "observe"}, {}),
        ({"serving_by_kind": {}}, {}),
        ({"acknowledged": frozenset()}, {}),
        ({}, {"headers": {"x-hemostat-calibration": "off"}}),
        ({}, {"headers": {"x-hemostat-calibration": VERSION}}),
        ({}, {"response_format": {"type": "json_object"}}),
    ],
)
def test_a_request_in_no_arm_is_in_no_comparison(changes: dict[str, Any], request_: dict[str, Any]) -> None:
    assert compared("Hello", msgspec.structs.replace(SERVED, **changes), **request_) is None


def test_json_asked_for_in_words_is_a_part_of_the_name() -> None:
    assert asks_json_in_words("chat model json label text json sampled reply")
    assert not asks_json_in_words("chat model text label json text sampled")
    assert not asks_json_in_words(REST_KIND)


def test_a_part_of_the_conversations_is_reported_in_every_turn_and_in_both_arms_alike() -> None:
    def reported(text: str, fraction: float, *later: str) -> Comparison | None:
        turns = [{"role": ("user", "assistant")[n % 2], "content": said} for n, said in enumerate((text, *later))]
        return compared(text, msgspec.structs.replace(SERVED, outcome_fraction=fraction), messages=turns)

    talks = [f"talk {number}" for number in range(1200)]
    drawn = {talk: result for talk in talks if (result := reported(talk, 0.25))}
    assert abs(len(drawn) - 300) < 5 * (1200 * 0.25 * 0.75) ** 0.5
    treated = sum(comparison.treated for comparison in drawn.values())
    assert abs(treated - len(drawn) / 2) < 5 * (len(drawn) / 4) ** 0.5
    for talk in talks[:60]:
        later = reported(talk, 0.25, "Yes?", "And then?")
        assert (later is None) == (talk not in drawn)
        whole = reported(talk, 1.0, "Yes?", "And then?")
        assert whole is not None
        assert (whole.drawn < 0.25) == (talk in drawn)


def test_whether_an_outcome_is_reported_is_decided_when_the_request_begins() -> None:
    """Else long answers would be lost when the part becomes smaller meanwhile, and more of these may be treated."""
    interceptor = Interceptor(SERVED, lambda capture: True, lambda metric, labels: None)
    exchange = interceptor.begin("POST", b"/v1/chat/completions", [], "r")
    assert isinstance(exchange, InterceptedExchange)
    exchange.request(b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}')
    interceptor.policy = msgspec.structs.replace(SERVED, outcome_fraction=0.0)
    assert exchange.comparison is not None
