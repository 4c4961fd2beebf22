"""The sets along an output, against the definition: an id is allowed where the grammar can go on with it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import write_tokenizer

from hemostat.openai.grammar_spec import MAX_GRAMMAR_BYTES, GrammarOrigin, GrammarSpec, GrammarTooLarge, read_grammar
from hemostat.openai.json_splice import JsonObject
from hemostat.openai.tool_parsers import TOOL_FORMATS
from hemostat.shadow.grammar import wire
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason
from hemostat.shadow.grammar.worker import Worker
from hemostat_calibration.allowed_sets import AllowedSets, words

pytest.importorskip("xgrammar")

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        },
    },
    {"type": "function", "function": {"name": "time"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}

Walk = Callable[..., AllowedSets]


class World:
    """The worker's grammars of one tokenizer, in this process."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.size = write_tokenizer(folder)
        self.folder = folder
        self.worker = Worker()
        self.vocab_size = self.size + 7  # a padded vocabulary
        self.worker._prepare(wire.Prepare(1, str(folder), self.vocab_size, 4096))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        self.end: int = self.tokenizer.eos_token_id
        self.texts = [self.tokenizer.decode([i]) for i in range(self.size)]

    def ids(self, text: str, *, end: bool = True) -> np.ndarray:
        found = self.tokenizer.encode(text, add_special_tokens=False)
        return np.array([*found, self.end] if end else found, np.int32)

    def spec(self, body: dict[str, Any], free_calls: str = "strict") -> GrammarSpec:
        found = read_grammar(JsonObject(json.dumps(body).encode()), free_calls=free_calls)
        assert found is not None
        return found

    def walk(self, body: dict[str, Any] | GrammarSpec, output: Any, **how: Any) -> AllowedSets:
        spec = body if isinstance(body, GrammarSpec) else self.spec(body)
        output = self.ids(output) if isinstance(output, str) else output
        asked = {"start": 0, "parser": "", "strict_level": "auto", "any_whitespace": True, "stop_token_ids": []} | how
        answer = self.worker._walk(
            wire.Walk(2, str(self.folder), self.vocab_size, spec, output.astype("<i4").tobytes(), **asked)
        )
        table = np.frombuffer(answer.table, "<u4").reshape(-1, words(self.vocab_size))
        return AllowedSets(self.vocab_size, table, np.frombuffer(answer.rows, "<i4"))

    def fails(self, body: dict[str, Any] | GrammarSpec, output: Any = "x", **how: Any) -> GrammarReason:
        with pytest.raises(GrammarFailure) as failure:
            self.walk(body, output, **how)
        assert "\n" not in str(failure.value)
        return failure.value.reason


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        return World(tmp_path_factory.mktemp("tokenizer"))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)  # the limit is for the worker's own process


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def test_a_choice_allows_the_ids_that_go_on_with_one_of_it(world: World) -> None:
    choices = ["yes", "no", "nobody", "é\n"]
    body = {"structured_outputs": {"choice": choices}}
    for chosen in choices:
        output = world.ids(chosen)
        mask = world.walk(body, output).mask(slice(0, len(output)))
        for t in range(len(output)):
            before = b"".join(_bytes(world, i) for i in output[:t])
            for token in range(world.vocab_size):
                if token == world.end:
                    possible = before in {c.encode() for c in choices}
                else:
                    text = _bytes(world, token) if token < world.size else b""
                    possible = bool(text) and any(c.encode().startswith(before + text) for c in choices)
                assert mask[t, token] == possible, (chosen, t, token)


def _bytes(world: World, token: int) -> bytes:
    if token == world.end or token >= world.size or world.texts[token] == "</think>":
        return b""
    piece = world.tokenizer.convert_ids_to_tokens(int(token))
    return bytes(_BYTES[c] for c in piece)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet of bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTES = _byte_of_character()


@pytest.mark.parametrize(
    ("body", "output"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": [1, {"b": null}]}'),
        (schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}), '{"a": 12}'),
        ({"structured_outputs": {"json": json.dumps({"type": "boolean"})}}, "true"),
        ({"structured_outputs": {"json_object": True}}, "{}"),
        ({"structured_outputs": {"regex": "[a-c]{2}[0-9]+"}}, "ab42"),
        ({"structured_outputs": {"grammar": 'root ::= "a" root | "b"'}}, "aaab"),
        ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, "aab"),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}],
                    "triggers": ["<f>"],
                }
            },
            "text <f>12</f> more",
        ),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "no"}}},
            "no",
        ),
    ],
)
def test_an_output_of_the_grammar_is_allowed_and_another_is_not(
    world: World, body: dict[str, Any], output: str
) -> None:
    ids = world.ids(output)
    sets = world.walk(body, ids)
    assert sets.contains(ids[:, None]).all()
    assert (sets.support < world.vocab_size).any()
    # A part of it may not end.
    cut = np.array([*ids[: (len(ids) - 1) // 2], world.end], np.int32)
    assert world.fails(body, cut) is GrammarReason.MISMATCH


def test_after_the_end_and_before_the_start_every_id_is_allowed(world: World) -> None:
    """`ignore_eos` goes on after the end; before the end of the reasoning, nothing is restricted."""
    body = {"structured_outputs": {"choice": ["yes"]}}
    output = np.concatenate([world.ids("thought", end=False), world.ids("yes"), world.ids("more", end=False)])
    start = len(world.ids("thought", end=False))
    support = world.walk(body, output, start=start).support
    assert (support[:start] == world.vocab_size).all()
    assert (support[start : start + 2] < world.vocab_size).all()
    assert (support[start + 2 :] == world.vocab_size).all()


def test_whitespace_and_stop_ids_are_as_the_server_is_set(world: World) -> None:
    body = {"response_format": {"type": "json_object"}}
    spaced = '{"a":\n   1}'
    world.walk(body, spaced)
    assert world.fails(body, spaced, any_whitespace=False) is GrammarReason.MISMATCH
    world.walk(body, '{"a":1}', any_whitespace=False)
    other = int(world.ids("x", end=False)[0])
    output = np.append(world.ids("yes", end=False), other).astype(np.int32)
    assert world.fails({"structured_outputs": {"choice": ["yes"]}}, output) is GrammarReason.MISMATCH
    for how in ({"stop_token_ids": [other]}, {}):
        own = {"structured_outputs": {"choice": ["yes"]}, "stop_token_ids": [] if how else [other]}
        assert world.walk(own, output, **how).support[-1] == 2  # both ends


def test_tools_by_each_kind_of_parser(world: World) -> None:
    required, named = {"tools": TOOLS, "tool_choice": "required"}, {"tools": TOOLS, "tool_choice": NAMED}
    call = '<tool_call>\n{"name": "weather", "arguments": {"a": "b"}}\n</tool_call>'
    free = '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'
    world.walk(required, call + call, parser="hermes")
    world.walk(required, free, parser="hermes")
    strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    assert world.fails({**required, "tools": strict}, free, parser="hermes") is GrammarReason.MISMATCH
    assert world.fails(required, free, parser="hermes", strict_level="parameter") is GrammarReason.MISMATCH
    assert world.fails(named, call + call, parser="hermes") is GrammarReason.MISMATCH
    single = {**required, "parallel_tool_calls": False}
    assert world.fails(single, call + call, parser="hermes") is GrammarReason.MISMATCH
    world.walk(single, call, parser="hermes")
    # Calls that the model is free to make.
    auto = {"tools": strict}
    world.walk(auto, "no call", parser="hermes")
    world.walk(auto, "text " + call, parser="hermes")
    assert world.fails(auto, free, parser="hermes") is GrammarReason.MISMATCH
    world.walk(required, call.replace("tool_call", "longcat_tool_call"), parser="longcat")
    # By a schema of the tools.
    world.walk(required, '[{"name": "weather", "parameters": {"a": "b"}}]', parser="pythonic")
    world.walk(named, '{"a": "b"}', parser="pythonic")
    two = '[{"name": "time", "parameters": {}}, {"name": "time", "parameters": {}}]'
    world.walk(required, two, parser="pythonic")
    assert world.fails(single, two, parser="pythonic") is GrammarReason.MISMATCH
    assert world.fails(auto, "x", parser="pythonic") is GrammarReason.TOOL_PARSER
    for unknown in ("", "glm45", "no such parser"):
        assert world.fails(required, call, parser=unknown) is GrammarReason.TOOL_PARSER


@pytest.mark.parametrize("parser", sorted(set(TOOL_FORMATS) - {"hermes"}))
def test_every_parser_of_the_table_makes_a_grammar(world: World, parser: str) -> None:
    """That it refuses an answer which is no call shows that there is one."""
    for choice in ("required", NAMED):
        body = {"tools": TOOLS, "tool_choice": choice}
        assert world.fails(body, "\x00 no call", parser=parser) is GrammarReason.MISMATCH


def test_definitions_of_tools_are_shared(world: World) -> None:
    def tool(name: str, definition: dict[str, Any]) -> dict[str, Any]:
        parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/d"}}, "required": ["x"]}
        return {"type": "function", "function": {"name": name, "parameters": parameters | {"$defs": {"d": definition}}}}

    body = {"tools": [tool("f", {"type": "integer"}), tool("g", {"type": "integer"})], "tool_choice": "required"}
    world.walk(body, '[{"name": "g", "parameters": {"x": 1}}]', parser="pythonic")
    other = {**body, "tools": [tool("f", {"type": "integer"}), tool("g", {"type": "string"})]}
    assert world.fails(other, parser="pythonic") is GrammarReason.INVALID


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"structured_outputs": {"regex": "(?<!a)b"}}, GrammarReason.REFUSED),
        ({"structured_outputs": {"regex": "("}}, GrammarReason.REFUSED),
        ({"structured_outputs": {"grammar": "root ::= nothing"}}, GrammarReason.REFUSED),
        ({"structured_outputs": {"structural_tag": "{}"}}, GrammarReason.REFUSED),
        ({"structured_outputs": {"structural_tag": "["}}, GrammarReason.REFUSED),
        ({"structured_outputs": {"json": "{"}}, GrammarReason.INVALID),
        ({"structured_outputs": {"json": {"type": "number", "multipleOf": 3}}}, GrammarReason.OTHER_BACKEND),
        ({"structured_outputs": {"choice": []}}, GrammarReason.INVALID),
        ({"structured_outputs": {"choice": "yes"}}, GrammarReason.INVALID),
        ({"structured_outputs": {"regex": 4}}, GrammarReason.INVALID),
        ({"structured_outputs": {}}, GrammarReason.INVALID),
        ({"structured_outputs": []}, GrammarReason.INVALID),
        ({"structured_outputs": {"regex": "a", "json": {}}}, GrammarReason.INVALID),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, GrammarReason.INVALID),
        ({"response_format": {"type": "mood"}}, GrammarReason.INVALID),
        ({"response_format": {"type": "json_schema"}}, GrammarReason.INVALID),
        ({"response_format": "json"}, GrammarReason.INVALID),
        ({"response_format": {"type": "structural_tag", "structures": [{}]}}, GrammarReason.INVALID),
        ({"structured_outputs": {"regex": "a"}, "stop_token_ids": "no"}, GrammarReason.INVALID),
        ({"tools": "no", "tool_choice": "required"}, GrammarReason.INVALID),
        ({"tools": [{}], "tool_choice": "required"}, GrammarReason.INVALID),
        ({"tools": [{"function": {}}], "tool_choice": "required"}, GrammarReason.INVALID),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "other"}}}, GrammarReason.INVALID),
        ({"tools": TOOLS, "tool_choice": {"function": 4}}, GrammarReason.INVALID),
        (
            {"tools": TOOLS, "parallel_tool_calls": False, "response_format": {"type": "json_object"}},
            GrammarReason.COMBINED,
        ),
    ],
)
def test_what_cannot_be_rebuilt_has_a_reason(world: World, body: dict[str, Any], reason: GrammarReason) -> None:
    assert world.fails(body, parser="hermes") is reason


def test_recursion_is_a_grammar_or_is_refused(world: World) -> None:
    tree = {
        "$defs": {"t": {"type": "object", "properties": {"a": {"$ref": "#/$defs/t"}}}},
        "$ref": "#/$defs/t",
    }
    world.walk(schema(tree), '{"a": {"a": {"a": {}}}}')
    deep = b'{"json": {"enum": ' + json.dumps(1).encode() + b', "allOf": ' + b"[" * 5_000 + b"]" * 5_000 + b"}}"
    spec = GrammarSpec(GrammarOrigin.STRUCTURED_OUTPUT, {"structured_outputs": deep})
    with pytest.raises((GrammarFailure, RecursionError)):
        world.walk(spec, "1")


_NAMES = st.sampled_from(["type", "properties", "items", "enum", "$ref", "anyOf", "allOf", "required", "pattern", "x"])
_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=5), st.sampled_from(["object", "string", "#"])
)
_SCHEMAS = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4), max_leaves=12
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(_SCHEMAS, st.sampled_from(["json", "regex", "grammar", "structural_tag", "choice"]), st.text(max_size=6))
@example({"type": "object", "properties": {"a": {"$ref": "#"}}}, "json", "{}")
@example("(((((a*)*)*)*)*)*", "regex", "a")
def test_any_request_gives_sets_or_a_reason(world: World, value: Any, member: str, output: str) -> None:
    body = {"structured_outputs": {member: value}}
    with contextlib.suppress(GrammarFailure):
        assert world.walk(body, output).contains(world.ids(output)[:, None]).all()


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(["tools", "tool_choice", "response_format", "parallel_tool_calls"]), _SCHEMAS))
def test_reading_a_request_never_fails_otherwise(world: World, body: dict[str, Any]) -> None:
    spec = read_grammar(JsonObject(json.dumps(body).encode()))
    if spec is not None:
        with contextlib.suppress(GrammarFailure, RecursionError):
            world.walk(spec, "x", parser="hermes")


def test_a_large_request_is_refused_where_it_is_read() -> None:
    large = [{"type": "function", "function": {"name": "f", "description": "x" * 1_000_000}}]
    for more in ({"tool_choice": "required"}, {"parallel_tool_calls": False}):
        with pytest.raises(GrammarTooLarge):
            read_grammar(JsonObject(json.dumps({"tools": large, **more}).encode()))
    strict = [{"type": "function", "function": {"name": "f", "strict": True, "description": "x" * 1_000_000}}]
    with pytest.raises(GrammarTooLarge):
        read_grammar(JsonObject(json.dumps({"tools": strict}).encode()))
    assert read_grammar(JsonObject(json.dumps({"tools": large}).encode())) is None
    fitting = {"structured_outputs": {"regex": "x" * (MAX_GRAMMAR_BYTES - 50)}}
    assert read_grammar(JsonObject(json.dumps(fitting).encode())) is not None


@pytest.mark.parametrize(
    ("body", "origin"),
    [
        ({}, None),
        ({"response_format": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, GrammarOrigin.STRUCTURED_OUTPUT),
        ({"structured_outputs": {"regex": "a"}}, GrammarOrigin.STRUCTURED_OUTPUT),
        ({"guided_json": {}}, None),
        ({"tools": TOOLS}, None),
        ({"tools": TOOLS, "tool_choice": None}, None),
        ({"tools": TOOLS, "tool_choice": "none"}, None),
        ({"tools": TOOLS, "tool_choice": "required"}, GrammarOrigin.FORCED_TOOL),
        ({"tools": TOOLS, "tool_choice": NAMED}, GrammarOrigin.FORCED_TOOL),
        ({"tool_choice": "required"}, None),
        ({"tools": TOOLS, "parallel_tool_calls": False}, GrammarOrigin.STRICT_TOOLS),
        ({"tools": [{"function": {"name": "f", "strict": True}}]}, GrammarOrigin.STRICT_TOOLS),
        ({"tools": [{"function": {"name": "f", "strict": False}}]}, None),
        ({"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False}, None),
    ],
)
def test_what_restricts_a_request(body: dict[str, Any], origin: GrammarOrigin | None) -> None:
    found = read_grammar(JsonObject(json.dumps(body).encode()))
    assert (found and found.origin) == origin


def test_free_calls_by_the_servers_settings() -> None:
    plain, strict = ({"tools": TOOLS, **more} for more in ({}, {"parallel_tool_calls": False}))
    for body, expected in ((plain, [False, False, True]), (strict, [False, True, True])):
        data = JsonObject(json.dumps(body).encode())
        found = [read_grammar(data, free_calls=how) is not None for how in ("never", "strict", "always")]
        assert found == expected
