"""What a request of `/v1/responses` or `/v1/messages` says of its grammar, as the members of a chat request.

vLLM 0.32 makes a chat request of a message (`entrypoints/anthropic/serving.py`), and of a response's request the same
grammar as of a chat (`entrypoints/openai/responses/protocol.py`, `tool_parsers/utils.py`). Schemas keep their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from hemostat.openai.forms.shared import decode_or_none
from hemostat.openai.grammar_spec import raw_tools
from hemostat.openai.json_splice import NULL, JsonObject, encode

_ABSENT = msgspec.Raw(NULL)
_TEXT_PARAMETERS = encode(
    {
        "type": "object",
        "properties": {"input": {"type": "string", "description": "The freeform text payload for this tool."}},
        "required": ["input"],
        "additionalProperties": False,
    }
)
"""Of a custom tool, which the model is shown as a function of one text."""


class _Tool(msgspec.Struct):
    """Of either form; of `/v1/messages` all are functions."""

    name: str = ""
    type: str = "function"
    parameters: msgspec.Raw = _ABSENT
    input_schema: msgspec.Raw = _ABSENT
    strict: msgspec.Raw = _ABSENT
    tools: list[_Tool] = []
    """Of a namespace."""


class _Schema(msgspec.Struct):
    type: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_typed: msgspec.json.Decoder[_Schema] = msgspec.json.Decoder(_Schema)
_tools: msgspec.json.Decoder[list[_Tool]] = msgspec.json.Decoder(list[_Tool])


@dataclass(frozen=True, slots=True)
class _Calls:
    """Which calls of tools are allowed. mode: a chat's `tool_choice`. name: of the one tool that has to be called, in
    place of it. single: at most one call."""

    mode: str
    name: str | None = None
    single: bool = False

    def are_free(self, body: JsonObject, free_calls: str) -> bool:
        """Nothing restricts them, as far as that shows without reading the tools, which may be many."""
        if not body.has("tools") or (self.name is None and self.mode == "none"):
            return True
        if self.name is not None or self.mode != "auto" or free_calls == "always":
            return False
        return free_calls == "never" or not (self.single or b'"strict"' in body.raw("tools"))

    def members(self, tools: list[bytes]) -> dict[str, bytes]:
        choice = self.mode if self.name is None else {"type": "function", "function": {"name": self.name}}
        found = {"tools": b"[" + b",".join(tools) + b"]", "tool_choice": encode(choice)}
        return found | ({"parallel_tool_calls": b"false"} if self.single else {})


def chat_of_response(body: JsonObject, free_calls: str) -> JsonObject:
    """Of a body of `/v1/responses`. free_calls: see `read_grammar`. GrammarTooLarge, and one of MALFORMED."""
    members = {name: body.raw(name) for name in ("structured_outputs", "stop_token_ids") if body.has(name)}
    form = _object(_object(body, "text"), "format")
    if form is not None:
        kind = form.value("type")
        if kind == "json_object":
            members["response_format"] = b'{"type":"json_object"}'
        elif kind == "json_schema" and form.has("schema"):
            members["response_format"] = _json_schema(form.raw("schema"))
    calls = _calls_of_response(body)
    if calls.are_free(body, free_calls):
        return _joined(members)
    functions = list(_functions(_tools_of(body)))
    if not functions:
        return _joined(members)
    if calls.name is not None:
        calls = replace(calls, name=_full_name(calls.name, functions))
    return _joined(members | calls.members([_function(name, one.parameters, one.strict) for name, one in functions]))


def _calls_of_response(body: JsonObject) -> _Calls:
    single = body.raw("parallel_tool_calls") == b"false"
    choice = _object(body, "tool_choice")
    if choice is None:
        return _Calls(str(body.value("tool_choice")) if "tool_choice" in body else "auto", single=single)
    if choice.value("type") in ("function", "custom"):
        return _Calls("named", str(choice.value("name")), single)
    # A list of allowed tools, and a tool of the server's own, force no call by a grammar.
    return _Calls("none")


def chat_of_message(body: JsonObject, free_calls: str) -> JsonObject:
    """Of a body of `/v1/messages`. free_calls: see `read_grammar`. GrammarTooLarge, and one of MALFORMED."""
    members: dict[str, bytes] = {}
    form = _object(_object(body, "output_config"), "format")
    if form is not None and form.given("schema"):
        members["response_format"] = _json_schema(form.raw("schema"))
    calls = _calls_of_message(body)
    if calls.are_free(body, free_calls):
        return _joined(members)
    tools = _tools_of(body)
    if not tools:
        return _joined(members)
    shown = [_function(tool.name, _of_an_object(tool.input_schema), tool.strict) for tool in tools]
    return _joined(members | calls.members(shown))


def _calls_of_message(body: JsonObject) -> _Calls:
    choice = _object(body, "tool_choice")
    if choice is None:
        return _Calls("auto")
    kind, single = str(choice.value("type")), choice.value("disable_parallel_tool_use") is True
    if kind == "tool":
        return _Calls("named", str(choice.value("name")), single)
    return _Calls("required" if kind == "any" else kind, single=single)


def _tools_of(body: JsonObject) -> list[_Tool]:
    """GrammarTooLarge as of a chat."""
    return decode_or_none(_tools, raw_tools(body)) or []


def _object(body: JsonObject | None, name: str) -> JsonObject | None:
    """The member, where it is an object."""
    raw = NULL if body is None else body.raw(name)
    return JsonObject(raw) if raw.startswith(b"{") else None


def _json_schema(schema: bytes) -> bytes:
    return b'{"type":"json_schema","json_schema":{"schema":' + schema + b"}}"


def _functions(tools: list[_Tool]) -> Iterator[tuple[str, _Tool]]:
    """The tools that a model is shown as functions, with the names that it is shown."""
    for tool in tools:
        match tool.type:
            case "function":
                yield tool.name, tool
            case "custom":
                yield tool.name, _Tool(tool.name, parameters=msgspec.Raw(_TEXT_PARAMETERS))
            case "namespace":
                yield from ((f"{tool.name}__{one.name}", one) for one in tool.tools if one.type == "function")


def _full_name(name: str, functions: list[tuple[str, _Tool]]) -> str:
    """A name may leave out its namespace where only one tool has it."""
    if any(name == full for full, _ in functions):
        return name
    found = [full for full, tool in functions if tool.name == name]
    return found[0] if len(found) == 1 else name


def _of_an_object(schema: msgspec.Raw) -> msgspec.Raw:
    """Without a type, it is an object's."""
    raw = bytes(schema)
    if not raw.startswith(b"{") or _typed.decode(raw).type is not msgspec.UNSET:
        return schema
    members = raw[:-1].rstrip()
    return msgspec.Raw(members + (b"" if members == b"{" else b",") + b'"type":"object"' + raw[len(members) :])


def _function(name: str, parameters: msgspec.Raw, strict: msgspec.Raw) -> bytes:
    members = {"name": encode(name)}
    members |= {key: bytes(raw) for key, raw in (("parameters", parameters), ("strict", strict)) if bytes(raw) != NULL}
    return b'{"type":"function","function":' + _encoded(members) + b"}"


def _joined(members: dict[str, bytes]) -> JsonObject:
    return JsonObject(_encoded(members))


def _encoded(members: dict[str, bytes]) -> bytes:
    """The JSON of an object. Names: without what JSON escapes."""
    return b"{" + b",".join([b'"%b":%b' % (name.encode(), value) for name, value in members.items()]) + b"}"
