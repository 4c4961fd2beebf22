"""vLLM's own code, without a server: it makes the same text of a request's grammar, byte for byte."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.tiny_tokenizer import write_tokenizer

from hemostat.models import vllm_server
from hemostat.openai.form import Form
from hemostat.openai.forms.table import FORMATS
from hemostat.openai.json_splice import JsonObject
from hemostat.openai.tool_parsers import JSON_SCHEMA, RESTRICTING_PARSERS, TOOL_FORMATS, restricted_free_calls
from hemostat.shadow.grammar.constraints import Constraint, ConstraintType, ServerRules, constraint_of
from hemostat.shadow.grammar.json_features import needs_other_backend
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason
from hemostat.shadow.grammar.walking import is_lark

pytestmark = [
    pytest.mark.skipif(not vllm_server.installed(), reason="vLLM is not installed here: `make setup` installs it"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
]

MESSAGES = [{"role": "user", "content": "x"}]
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


TOOLS = [function("weather", description="d", parameters=CITY), function("time")]
STRICT = [function("weather", parameters=CITY, strict=True), function("time", strict=False)]
DEFINED = [
    function(name, parameters={"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": CITY}})
    for name in ("f", "g")
]
NAMED = {"type": "function", "function": {"name": "weather"}}
TAG = {"begin": "<f>", "schema": CITY, "end": "</f>"}

OUTPUTS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY, "strict": True}}},
    {"response_format": {"type": "structural_tag", "structures": [TAG], "triggers": ["<f>"]}},
    {"response_format": {"type": "structural_tag", "format": {"type": "const_string", "value": "é"}}},
    {"structured_outputs": {"json": CITY}},
    {"structured_outputs": {"json": json.dumps(CITY), "whitespace_pattern": " "}},
    {"structured_outputs": {"json_object": True}},
    {"structured_outputs": {"regex": "[0-9]{3}é"}},
    {"structured_outputs": {"choice": ["a", 'b "c"', "d\n\t\\é\x01\x7f"]}},
    {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
    {"structured_outputs": {"structural_tag": json.dumps({"structures": [TAG], "triggers": ["<f>"]})}},
]
TOOL_CALLS: list[dict[str, Any]] = [
    {"tools": tools, **more}
    for tools in (TOOLS, STRICT, DEFINED)
    for more in (
        {"tool_choice": "required"},
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"parallel_tool_calls": False},
        {"tool_choice": "auto"},
        {},
        {"tool_choice": "none"},
        {"tool_choice": None},
    )
] + [{"tools": tools, "tool_choice": NAMED} for tools in (TOOLS, STRICT)]
MIXED = [
    {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
    {"tools": TOOLS, "tool_choice": NAMED, "response_format": {"type": "json_object"}},
    {"tools": TOOLS, "response_format": {"type": "json_object"}},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(str(folder))


def request_of_vllm(body: dict[str, Any], form: Form) -> Any:
    """What it makes the grammar of."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    body = json.loads(json.dumps({"model": "m", **body}))
    if form is Form.RESPONSES:
        return ResponsesRequest(**{"input": "x", **body})
    if form is Form.MESSAGES:
        given = AnthropicMessagesRequest(**{"messages": MESSAGES, "max_tokens": 9, **body})
        return AnthropicServingMessages.to_chat_completion_request(given)
    return ChatCompletionRequest(**{"messages": MESSAGES, **body})


def of_vllm(
    body: dict[str, Any], parser: str, tokenizer: Any, level: str = "auto", form: Form = Form.CHAT
) -> Constraint | None:
    """What vLLM enforces, as it hands it to xgrammar."""
    from vllm.parser import ParserManager
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar
    from vllm.v1.structured_output.request import get_structured_output_key

    request = request_of_vllm(body, form)
    made = ParserManager.get_parser(tool_parser_name=parser, enable_auto_tools=True, tool_strict_level=level)
    assert made is not None
    if request.tool_choice != "none":
        # Not every parser can be made for every tokenizer; the part that restricts needs none.
        with contextlib.suppress(TypeError):
            request = made(tokenizer, request.tools).adjust_request(request)
    found = request.extract_structured_outputs()
    if found is None:
        return None
    params = SamplingParams(structured_outputs=found)
    validate_xgrammar_grammar(params)
    kind, text = get_structured_output_key(params.structured_outputs)
    return {
        StructuredOutputOptions.JSON: lambda: Constraint(ConstraintType.JSON, text),
        StructuredOutputOptions.JSON_OBJECT: lambda: Constraint(ConstraintType.JSON, '{"type": "object"}'),
        StructuredOutputOptions.REGEX: lambda: Constraint(ConstraintType.REGEX, text),
        StructuredOutputOptions.GRAMMAR: lambda: Constraint(ConstraintType.GRAMMAR, text),
        StructuredOutputOptions.STRUCTURAL_TAG: lambda: Constraint(ConstraintType.STRUCTURAL_TAG, text),
    }[kind]()


def of_ours(body: dict[str, Any], parser: str, level: str = "auto", form: Form = Form.CHAT) -> Constraint | None:
    from hemostat.shadow.grammar.tool_tags import make_tag

    free = restricted_free_calls(parser, level)
    spec = FORMATS[form].grammar(JsonObject(json.dumps(body).encode()), free)
    return None if spec is None else constraint_of(spec, ServerRules(parser, level), make_tag)


@pytest.mark.parametrize("parser", ["hermes", "pythonic"])
@pytest.mark.parametrize("body", [*OUTPUTS, *TOOL_CALLS, *MIXED], ids=lambda body: json.dumps(body)[:60])
def test_the_same_text_is_compiled(body: dict[str, Any], parser: str, tokenizer: Any) -> None:
    assert of_ours(body, parser) == of_vllm(body, parser, tokenizer)


@pytest.mark.parametrize("level", ["function", "parameter"])
@pytest.mark.parametrize("body", TOOL_CALLS, ids=lambda body: json.dumps(body)[:60])
def test_and_at_the_servers_other_levels(body: dict[str, Any], level: str, tokenizer: Any) -> None:
    assert of_ours(body, "hermes", level) == of_vllm(body, "hermes", tokenizer, level)


def flat(tool: dict[str, Any]) -> dict[str, Any]:
    """As `/v1/responses` has it."""
    return {"type": "function", **tool["function"]}


def of_anthropic(tool: dict[str, Any]) -> dict[str, Any]:
    function = dict(tool["function"])
    return {"input_schema": function.pop("parameters", {}), **function}


NAMESPACE = {
    "type": "namespace",
    "name": "city",
    "description": "d",
    "tools": [flat(TOOLS[0]) | {"name": name} for name in ("weather", "time")],
}
CUSTOM = {"type": "custom", "name": "script", "description": "d"}
SEARCH = {"type": "web_search_preview"}
OTHER_TOOLS = [[flat(TOOLS[1]), CUSTOM, SEARCH], [NAMESPACE, flat(STRICT[0])]]
RESPONSES_BODIES: list[dict[str, Any]] = [
    *({"text": {"format": form}} for form in (None, {"type": "text"}, {"type": "json_object"})),
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": CITY, "strict": True}}},
    {"structured_outputs": {"regex": "[0-9]{3}é"}},
    {"structured_outputs": {"choice": ["a", 'b "c"']}, "stop_token_ids": [3]},
    *(
        {"tools": tools, **more}
        for tools in ([flat(one) for one in TOOLS], [flat(one) for one in STRICT], [flat(one) for one in DEFINED])
        for more in (
            {},
            {"tool_choice": "auto"},
            {"tool_choice": "none"},
            {"tool_choice": "required"},
            {"tool_choice": "required", "parallel_tool_calls": False},
            {"parallel_tool_calls": False},
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "f"}],
                }
            },
        )
    ),
    {"tools": [flat(one) for one in STRICT], "tool_choice": {"type": "function", "name": "time"}},
    {"tools": [SEARCH], "parallel_tool_calls": False},
    {"tools": [SEARCH], "tool_choice": SEARCH},
    {"tools": []},
    *({"tools": tools, "tool_choice": "required"} for tools in OTHER_TOOLS),
    {"tools": OTHER_TOOLS[0], "tool_choice": {"type": "custom", "name": "script"}},
    {"tools": OTHER_TOOLS[1], "tool_choice": {"type": "function", "name": "time"}},
    {"tools": OTHER_TOOLS[1], "tool_choice": {"type": "function", "name": "city__time"}},
    {"tools": OTHER_TOOLS[1]},
]
MESSAGES_BODIES: list[dict[str, Any]] = [
    {"output_config": {"effort": "low"}},
    {"output_config": {"format": None}},
    {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
    {"output_config": {"format": {"type": "json_schema", "schema": CITY}}},
    {"tools": [], "tool_choice": {"type": "any"}},
    *(
        {"tools": [of_anthropic(one) for one in tools], **more}
        for tools in (TOOLS, STRICT, DEFINED)
        for more in (
            {},
            {"tool_choice": None},
            *({"tool_choice": {"type": kind}} for kind in ("auto", "any", "none")),
            {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"tool_choice": {"type": "tool", "name": tools[0]["function"]["name"]}},
        )
    ),
]
OTHER_FORMS = [(Form.RESPONSES, body) for body in RESPONSES_BODIES] + [(Form.MESSAGES, b) for b in MESSAGES_BODIES]


@pytest.mark.parametrize(("parser", "level"), [("hermes", "auto"), ("pythonic", "auto")])
@pytest.mark.parametrize(("form", "body"), OTHER_FORMS, ids=lambda value: json.dumps(value)[:70])
def test_the_other_forms_are_read_as_chats(
    form: Form, body: dict[str, Any], parser: str, level: str, tokenizer: Any
) -> None:
    assert of_ours(body, parser, level, form) == of_vllm(body, parser, tokenizer, level, form)


def test_an_output_of_responses_beside_free_tools(tokenizer: Any) -> None:
    body = {"tools": [flat(one) for one in TOOLS], "text": {"format": {"type": "json_object"}}}
    found = of_ours(body, "hermes", form=Form.RESPONSES)
    assert (
        found
        == of_vllm(body, "hermes", tokenizer, form=Form.RESPONSES)
        == Constraint(ConstraintType.JSON, '{"type": "object"}')
    )


def test_a_structured_output_with_strict_tools_is_not_rebuilt(tokenizer: Any) -> None:
    body = {"tools": STRICT, "response_format": {"type": "json_object"}}
    assert "or" in str(of_vllm(body, "hermes", tokenizer))
    with pytest.raises(GrammarFailure) as failure:
        of_ours(body, "hermes")
    assert failure.value.reason is GrammarReason.COMBINED


@pytest.mark.parametrize("parser", sorted(TOOL_FORMATS))
def test_the_table_of_parsers_is_vllms(parser: str) -> None:
    from vllm.tool_parsers import ToolParserManager

    made = ToolParserManager.get_tool_parser(parser)
    assert (made.structural_tag_model or JSON_SCHEMA) == TOOL_FORMATS[parser]
    # Those by a schema are forced by it; those with a tag never are.
    assert made.supports_required_and_named is (made.structural_tag_model is None)


def test_the_parsers_that_restrict_every_call_are_vllms() -> None:
    from vllm.tool_parsers import ToolParserManager
    from vllm.tool_parsers.tool_strict_level import ToolStrictLevel

    found: dict[str, str] = {}
    for parser in ToolParserManager.list_registered():
        made = ToolParserManager.get_tool_parser(parser)
        level = made.default_tool_strict_level or ToolStrictLevel.AUTO
        if TOOL_FORMATS.get(parser) == JSON_SCHEMA:
            assert level is ToolStrictLevel.AUTO
            continue
        found[parser] = "strict" if level is ToolStrictLevel.AUTO else "always"
    assert {parser: restricted_free_calls(parser, "auto") for parser in found} == found
    assert {parser for parser, calls in found.items() if calls == "always"} == RESTRICTING_PARSERS


_KEYS = st.sampled_from(
    [
        *("type", "multipleOf", "uniqueItems", "contains", "format", "pattern", "minLength", "propertyNames"),
        *("patternProperties", "properties", "unevaluatedProperties", "allOf", "anyOf", "items"),
    ]
)
_LEAVES = st.sampled_from([None, True, 1, "string", "object", "array", "number", "email", "other", {}, []])
_SCHEMAS = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=5), max_leaves=20
)


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_KEYS, _SCHEMAS, max_size=6))
def test_the_same_schemas_go_to_another_backend(schema: dict[str, Any]) -> None:
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    try:
        expected = has_xgrammar_unsupported_json_features(schema)
    except TypeError:  # an unhashable format: vLLM answers 500
        return
    assert needs_other_backend(schema) is expected


@settings(max_examples=300)
@given(st.text(alphabet="ab:= #/\n\"'", max_size=30))
def test_the_same_grammars_are_larks(grammar: str) -> None:
    from vllm.v1.structured_output.utils import grammar_is_likely_lark

    assert is_lark(grammar) is grammar_is_likely_lark(grammar)
