"""Which form of answer a request asks for, and whether an answer has it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.relay.answer_format import MAX_ANSWER_BYTES, AnswerFormat

PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": PERSON}},
    {"type": "function", "function": {"name": "stop"}},
]


def read(in_words=False, **body):
    return AnswerFormat.read(json.dumps({"messages": [], **body}).encode(), in_words=in_words)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": 1}', True),
        ("[1, 2]", True),
        ('Here it is:\n```json\n{"a": 1}\n```\nDone.', True),
        ("```\n[1]\n```", True),
        ('The answer is {"a": [1, {"b": 2}]} as asked.', True),
        ('Set {x} is {"a": 1}', True),
        ('{"a": 1', False),
        ("```json\n{'a': 1}\n```", False),
        ('{"a": NaN}', False),
        ("no JSON here", False),
        ("", False),
        ("[" * 60_000, False),
        ("x " + '{"a":[' * 5_000, False),
        ('{"a": ' + "1" * 40 + "}", True),
        ("{x} " * 10 + '{"a": 1}', False),
    ],
)
def test_json_asked_for_in_words(text, valid):
    assert AnswerFormat(in_words=True).is_json(text) is valid


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
        {"guided_json": PERSON},
        {"guided_json": json.dumps(PERSON)},
        {"structured_outputs": {"json": PERSON}},
    ],
)
def test_a_schema_in_the_request(body):
    asked = read(**body)
    assert asked.json
    assert asked.is_json('{"age": 3}')
    assert not asked.is_json('{"age": "3"}')
    assert not asked.is_json('Here: {"age": 3}')


def test_json_without_a_schema():
    for body in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        asked = read(**body)
        assert asked.json
        assert asked.is_json('{"age": "3"}')
        assert not asked.is_json("{age}")


def test_nothing_asked_for():
    for body in ({}, {"response_format": {"type": "text"}}, {"guided_json": None}, {"response_format": 3}):
        asked = read(**body)
        assert not asked.json
        assert not asked.tools
    assert not AnswerFormat.read(b"{", in_words=False).json
    assert AnswerFormat.read(b"{", in_words=True).json


@pytest.mark.parametrize(
    ("calls", "fit"),
    [
        ([("find", '{"age": 3}')], True),
        ([("stop", "{}"), ("find", '{"age": 3}')], True),
        ([("find", '{"age": "3"}')], False),
        ([("find", '{"age": 3')], False),
        ([("stop", "{}"), ("search", "{}")], False),
        ([], True),
    ],
)
def test_tool_calls(calls, fit):
    asked = read(tools=TOOLS)
    assert asked.tools
    assert asked.calls_fit(calls) is fit


def test_beyond_the_limits_only_parsing_counts():
    long = json.dumps({"age": "3" * MAX_ANSWER_BYTES})
    assert read(guided_json=PERSON).is_json(long)
    assert not read(guided_json=PERSON).is_json(long[:-1])
    assert read(guided_json={**PERSON, "description": "x" * 70_000}).is_json('{"age": "3"}')
    many = [{"type": "function", "function": {"name": f"f{i}", "description": "x" * 1000}} for i in range(80)]
    assert read(tools=many).calls_fit([("other", "{}")])


@given(st.text('[]{}"`1,:a\n', max_size=60), st.booleans())
def test_it_never_raises(text, in_words):
    asked = AnswerFormat(in_words=in_words, schema=None if in_words else json.dumps(PERSON).encode(), offered=b"[{}]")
    assert isinstance(asked.is_json(text), bool)
    assert isinstance(asked.calls_fit([(text, text)]), bool)
