"""From the members of a request to the one constraint that vLLM 0.32 enforces, as text.

Follows `entrypoints/generate/base/protocol.py` (`structured_outputs_from_response_format`), `sampling_params.py`
(`StructuredOutputsParams`), `tool_parsers/utils.py` (`get_json_schema_from_tools`) and `parser/abstract_parser.py`
(`_apply_structural_tag`). The texts are the same byte for byte, so that xgrammar makes the same grammar of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hemostat.openai.grammar_spec import GrammarOrigin, GrammarSpec
from hemostat.openai.tool_parsers import JSON_SCHEMA, TOOL_FORMATS
from hemostat.shadow.grammar.json_features import needs_other_backend
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason


class ConstraintType(StrEnum):
    JSON = "json"
    REGEX = "regex"
    GRAMMAR = "grammar"
    STRUCTURAL_TAG = "structural_tag"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the output has to match; `text` as vLLM hands it to xgrammar."""

    type: ConstraintType
    text: str


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """What a structural tag of tool calls is made of.

    tools: as the request has them, each with an explicit `strict`. choice: "auto", "required", or the named function.
    single: at most one call.
    """

    format: str
    tools: list[dict[str, Any]]
    choice: str | dict[str, Any]
    single: bool


@dataclass(frozen=True, slots=True)
class ServerRules:
    """How the server makes grammars. parser: its `--tool-call-parser`; "" where that is not known. strict_level: its
    `--tool-strict-level`."""

    parser: str = ""
    strict_level: str = "auto"


_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_LEVELS = ("auto", "function", "parameter")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}

TagMaker = Callable[[ToolCalls], str]
"""Makes a structural tag's JSON; of `hemostat.shadow.grammar.tool_tags`."""


def constraint_of(spec: GrammarSpec, rules: ServerRules, make_tag: TagMaker) -> Constraint:
    """The constraint of a request. GrammarFailure where it cannot be rebuilt, RecursionError where it is nested too
    deeply."""
    members = {name: _decoded(raw) for name, raw in spec.members.items()}
    if spec.origin is GrammarOrigin.STRUCTURED_OUTPUT:
        if "tools" in members and rules_may_tag(rules):
            raise GrammarFailure(GrammarReason.COMBINED)
        return _structured_output(members)
    found = _tools(members, rules, make_tag)
    if found is None:
        raise GrammarFailure(GrammarReason.TOOL_PARSER, f"{rules.parser} does not restrict such calls")
    return found


def rules_may_tag(rules: ServerRules) -> bool:
    """Whether the server may apply structural tags."""
    return TOOL_FORMATS.get(rules.parser) != JSON_SCHEMA


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise GrammarFailure(GrammarReason.INVALID, str(error)) from error


def _structured_output(members: Mapping[str, Any]) -> Constraint:
    given = dict(_mapping(members.get("structured_outputs") or {}, "structured_outputs"))
    form = members.get("response_format")
    if form is not None and (kind := _mapping(form, "response_format").get("type")) != "text":
        if kind == "json_object":
            given["json_object"] = True
        elif kind == "json_schema":
            given["json"] = _mapping(form.get("json_schema"), "response_format.json_schema").get("schema")
        elif kind == "structural_tag":
            given["structural_tag"] = json.dumps(_structural_tag(form))
        else:
            raise GrammarFailure(GrammarReason.INVALID, f"response_format.type {kind!r}")
    chosen = [name for name in _KINDS if given.get(name) is not None]
    if len(chosen) != 1:
        raise GrammarFailure(GrammarReason.INVALID, f"structured_outputs has {len(chosen)} constraints")
    value = given[chosen[0]]
    match chosen[0]:
        case "json":
            return _json_schema(value)
        case "json_object":
            return Constraint(ConstraintType.JSON, '{"type": "object"}')
        case "choice":
            if not (isinstance(value, list) and value and all(isinstance(one, str) for one in value)):
                raise GrammarFailure(GrammarReason.INVALID, "structured_outputs.choice is no list of texts")
            return Constraint(ConstraintType.GRAMMAR, choice_grammar(value))
        case name:
            if not isinstance(value, str):
                raise GrammarFailure(GrammarReason.INVALID, f"structured_outputs.{name} is no text")
            return Constraint(ConstraintType(name), value)


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GrammarFailure(GrammarReason.INVALID, f"{name} is no object")
    return value


def _structural_tag(form: dict[str, Any]) -> dict[str, Any]:
    """As vLLM's pydantic model of it is dumped: known members, in the model's order."""
    if "structures" not in form:
        return {"type": "structural_tag", "format": form.get("format")}
    try:
        structures = [{"begin": s["begin"], "schema": s.get("schema"), "end": s["end"]} for s in form["structures"]]
        return {"type": "structural_tag", "structures": structures, "triggers": form["triggers"]}
    except (KeyError, TypeError) as error:
        raise GrammarFailure(GrammarReason.INVALID, "response_format.structures") from error


def _json_schema(schema: Any) -> Constraint:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    if needs_other_backend(_decoded(text.encode()) if isinstance(schema, str) else schema):
        raise GrammarFailure(GrammarReason.OTHER_BACKEND)
    return Constraint(ConstraintType.JSON, text)


def choice_grammar(choices: list[str]) -> str:
    r"""The EBNF grammar of a list of texts (`v1/structured_output/utils.py`, `choice_as_grammar`).

    >>> choice_grammar(["a", 'say "b"\n'])
    'root ::= "a" | "say \\"b\\"\\n"'
    """
    escapes = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"}

    def escaped(character: str) -> str:
        if character in escapes:
            return escapes[character]
        code = ord(character)
        return f"\\u{code:04x}" if code < 0x20 or code == 0x7F else character

    return "root ::= " + " | ".join(f'"{"".join(map(escaped, text))}"' for text in choices)


def _tools(members: Mapping[str, Any], rules: ServerRules, make_tag: TagMaker) -> Constraint | None:
    """None: calls are not restricted."""
    form = TOOL_FORMATS.get(rules.parser)
    if form is None:
        raise GrammarFailure(GrammarReason.TOOL_PARSER, f"grammar.tool_call_parser is {rules.parser!r}")
    tools, choice = members.get("tools"), members.get("tool_choice", "auto")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise GrammarFailure(GrammarReason.INVALID, "tools is no list of objects")
    functions = [_mapping(tool.get("function"), "tools.function") for tool in tools]
    if not all(isinstance(function.get("name"), str) for function in functions):
        raise GrammarFailure(GrammarReason.INVALID, "tools.function.name is no text")
    named = _mapping(choice.get("function"), "tool_choice.function").get("name") if isinstance(choice, dict) else None
    if form == JSON_SCHEMA:
        if choice == "auto":
            return None
        if _mapping(members.get("structured_outputs") or {}, "structured_outputs").get("structural_tag") is not None:
            raise GrammarFailure(GrammarReason.COMBINED)
        schema = _named_schema(functions, named) if named is not None else _required_schema(functions, members)
        return _json_schema(schema)
    single = members.get("parallel_tool_calls") is False
    level = max(_LEVELS.index(rules.strict_level), 1 if single else 0)
    if choice == "auto" and level == 0 and not any(function.get("strict") is True for function in functions):
        return None
    if choice == "auto" and any(name in members for name in ("response_format", "structured_outputs")):
        raise GrammarFailure(GrammarReason.COMBINED)
    pinned = [
        {"type": "function", "function": function | {"strict": level > 1 or function.get("strict") is True}}
        for function in functions
    ]
    return Constraint(ConstraintType.STRUCTURAL_TAG, make_tag(ToolCalls(form, pinned, choice, single)))


def _named_schema(functions: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = {function["name"]: function for function in functions}.get(name)
    if found is None:
        raise GrammarFailure(GrammarReason.INVALID, "tool_choice names no tool")
    return _mapping(found.get("parameters") or _NO_PARAMETERS, "tools.function.parameters")


def _required_schema(functions: list[dict[str, Any]], members: Mapping[str, Any]) -> dict[str, Any]:
    if not functions:
        raise GrammarFailure(GrammarReason.INVALID, "tools is empty")
    definitions: dict[str, Any] = {}
    items = []
    for function in functions:
        parameters = _mapping(function.get("parameters") or _NO_PARAMETERS, "tools.function.parameters")
        own = _mapping(parameters.get("$defs") or {}, "$defs")
        if any(definitions.get(name, schema) != schema for name, schema in own.items()):
            raise GrammarFailure(GrammarReason.INVALID, "a definition of tools has several schemas")
        definitions |= own
        items.append(
            {
                "properties": {
                    "name": {"type": "string", "enum": [function["name"]]},
                    "parameters": {name: value for name, value in parameters.items() if name != "$defs"},
                },
                "required": ["name", "parameters"],
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": items}}
    if members.get("parallel_tool_calls") is False:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema
