"""No body costs the event loop's thread more than a few milliseconds, whatever a client writes into it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.support import costly_search
from tests.support.costly_bodies import BEYOND, LIMIT, WITHIN, body, cpu_seconds, listed, members

from hemostat.openai.complexity import MAX_ESCAPES, MAX_MESSAGES, MAX_STRINGS, TooComplex, check_complexity
from hemostat.openai.json_splice import MAX_KEY_CHARACTERS, MAX_MEMBERS, MAX_VALUE_BYTES, JsonObject
from hemostat.openai.reading import read_request
from hemostat.openai.routes import Form

SECONDS = 0.02
"""CPU time. The limit is 5 ms, which `make bench-faults` checks; here the machine is shared, and its caches are too."""


@pytest.mark.parametrize("form", list(Form))
def test_the_most_that_is_read_is_read_quickly(form: Form) -> None:
    assert max(map(len, WITHIN.values())) <= LIMIT
    costs = {name: cpu_seconds(data, form, SECONDS) for name, data in WITHIN.items()}
    assert {name: cost for name, cost in costs.items() if cost > SECONDS} == {}


def test_too_many_prompts() -> None:
    for prompts in (listed(b'""', MAX_MESSAGES + 1), listed(b"[1]", MAX_MESSAGES + 1)):
        with pytest.raises(TooComplex):
            read_request(body(prompt=prompts), form=Form.COMPLETIONS)
    assert read_request(body(prompt=listed(b"[1]", MAX_MESSAGES)), form=Form.COMPLETIONS).prompts == MAX_MESSAGES


@pytest.mark.parametrize("form", list(Form))
def test_what_is_beyond_is_left_unread_as_quickly(form: Form) -> None:
    costs = {name: cpu_seconds(data, form, SECONDS) for name, data in BEYOND.items()}
    assert {name: cost for name, cost in costs.items() if cost > SECONDS} == {}


@pytest.mark.parametrize("seed", range(3))
def test_no_random_body_is_read_for_long(seed: int) -> None:
    assert costly_search.worst(30, seed, SECONDS) <= SECONDS


def test_what_agents_send_is_read() -> None:
    tool = {"type": "function", "function": {"name": "edit", "parameters": {"type": "object", "properties": {
        name: {"type": "string", "description": "the file's new text"} for name in ("path", "old", "new", "why")
    }}}}  # fmt: skip
    source = 'def f(x: dict[str, int]) -> str:\n    return json.dumps({"a": [x, 1]}, indent=2)\n' * 20
    messages: list[dict[str, Any]] = [{"role": "system", "content": source}]
    for turn in range(90):
        call = {
            "id": f"call_{turn}",
            "type": "function",
            "function": {"name": "edit", "arguments": json.dumps({"new": source})},
        }
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{turn}", "content": source},
        ]
    data = json.dumps({"model": "m", "messages": messages, "tools": [tool] * 60, "temperature": 0.2}).encode()
    assert LIMIT // 2 < len(data) < LIMIT
    assert read_request(data, form=Form.CHAT).unscorable is None


@pytest.mark.parametrize(
    "data",
    [
        b"{%b}" % members(MAX_MEMBERS + 1),
        body(**{"k" * (MAX_KEY_CHARACTERS + 1): b"1"}),
        body(temperature=b'"%b"' % (b"x" * MAX_VALUE_BYTES)),
        body(messages=listed(b'{"role":"user"}', MAX_MESSAGES + 1)),
        body(prompt=listed(b'""', MAX_STRINGS + 1)),
        body(stop=b'"%b"' % (b"\\n" * (MAX_ESCAPES + 1))),
    ],
)  # fmt: skip
def test_the_limits(data: bytes) -> None:
    with pytest.raises(TooComplex):
        read_request(data, form=Form.CHAT)


def test_escaped_quotes_in_texts_are_no_strings() -> None:
    check_complexity(body(messages=b'[{"content":"%b"}]' % (b'\\"' * 100_000)))


def test_long_values_are_given_but_not_decoded() -> None:
    data = JsonObject(b'{"long":%b,"empty":{},"text":{"type":"a"},"name":"b"}' % listed(b"1", MAX_VALUE_BYTES))
    assert [data.given(name) for name in ("long", "empty", "none")] == [True, False, False]
    with pytest.raises(TooComplex):
        data.value("long")
    assert [data.type_of(name) for name in ("text", "empty", "name", "none")] == ["a", None, "b", None]
