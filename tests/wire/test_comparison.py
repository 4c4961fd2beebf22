"""Which requests are units of a comparison of arms, and of which one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from tests.support.wire import OTHER_VERSION, VERSION, policy

from hemostat.hooks import Comparison, ExchangeHook
from hemostat.ipc.messages import REST_KIND, Policy
from hemostat.openai.kinds import asks_json_in_words
from hemostat.shadow.interceptor import Interceptor

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
    found = [compared(f"Answer {n} in JSON.") for n in range(40)]
    assert {(c.kind, c.version, c.json_in_words) for c in found if c is not None} == {(KIND, VERSION, True)}
    assert 8 <= sum(c.treated for c in found if c is not None) <= 32
    assert len({c.conversation for c in found if c is not None}) == 40


def test_a_kind_that_is_not_followed_belongs_to_the_rest() -> None:
    found = compared("Hello")
    assert found is not None
    assert (found.kind, found.version, found.json_in_words) == (REST_KIND, OTHER_VERSION, False)


def test_the_client_is_named_by_a_digest() -> None:
    one = compared("Hello", headers={"authorization": "Bearer one"})
    other = compared("Hello", headers={"authorization": "Bearer other"})
    assert one is not None
    assert other is not None
    assert one.client != other.client
    assert one.conversation == other.conversation
    assert len(one.client) == 8


@pytest.mark.parametrize(
    ("changes", "request_"),
    [
        ({"mode": "observe"}, {}),
        ({"serving_by_kind": {}}, {}),
        ({"acknowledged": frozenset()}, {}),
        ({}, {"headers": {"x-hemostat-calibration": "off"}}),
        ({}, {"headers": {"x-hemostat-calibration": VERSION}}),
        ({}, {"response_format": {"type": "json_object"}}),
        ({"forced": VERSION}, {}),
    ],
)
def test_a_request_in_no_arm_is_in_no_comparison(changes: dict[str, Any], request_: dict[str, Any]) -> None:
    assert compared("Hello", msgspec.structs.replace(SERVED, **changes), **request_) is None


def test_json_asked_for_in_words_is_a_part_of_the_name() -> None:
    assert asks_json_in_words("chat model json label text json sampled reply")
    assert not asks_json_in_words("chat model text label json text sampled")
    assert not asks_json_in_words(REST_KIND)
