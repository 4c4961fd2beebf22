"""What a request of `/v1/responses` or `/v1/messages` says of its grammar, as the members of a chat request.

vLLM 0.32 makes a chat request of a message (`entrypoints/anthropic/serving.py`), and of a response's request the same
grammar as of a chat (`entrypoints/openai/responses/protocol.py`, `tool_parsers/utils.py`). Schemas keep their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hemostat.openai.forms.shared import decode_or_none
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


_tools: msgspec.json.Decoder[list[_Tool]] = msgspec.json.Decoder(list[_Tool])


def chat_of_response(body: JsonObject, free_calls: str) -> JsonObject:
    """Of a body of `/v1/responses`. free_calls: see `read_grammar`. May raise one of MALFORMED."""
    members = {name: body.raw(name) for name in ("structured_outputs", "stop_token_ids") if body.has(name)}
    form = _object(_object(body, "text"), "format")
    if form is not None:
        kind = form.value("type")
        if kind == "json_object":
            members["response_format"] = b'{"type":"json_object"}'
        elif kind == "json_schema" and form.has("schema"):
            members["response_format"] = _json_schema(form.raw("schema"))
    choice = _object(body, "tool_choice")
    named = choice is not None and choice.value("type") in ("function", "custom")
    # A list of allowed tools, and a tool of the server's own, force no call by a grammar.
    mode = "named" if named else "none" if choice is not None else _mode(body)
    single = body.raw("parallel_tool_calls") == b"false"
    if _all_are_free(body, mode, free_calls, single=single):
        return _joined(members)
    functions = list(_functions(decode_or_none(_tools, body.raw("tools")) or ()))
    if not functions:
        return _joined(members)
    name = _full_name(str(choice.value("name")), functions) if named and choice is not None else None
    shown = [_function(full, tool.parameters, tool.strict) for full, tool in functions]
    return _joined(members | _calls(shown, mode, name, single=single))


def chat_of_message(body: JsonObject, free_calls: str) -> JsonObject:
    """Of a body of `/v1/messages`. free_calls: see `read_grammar`. May raise one of MALFORMED."""
    members: dict[str, bytes] = {}
    form = _object(_object(body, "output_config"), "format")
    if form is not None and form.has("schema") and form.value("schema"):
        members["response_format"] = _json_schema(form.raw("schema"))
    choice = _object(body, "tool_choice")
    kind = "auto" if choice is None else str(choice.value("type"))
    mode = {"any": "required", "tool": "named"}.get(kind, kind)
    single = choice is not None and choice.value("disable_parallel_tool_use") is True
    if _all_are_free(body, mode, free_calls, single=single):
        return _joined(members)
    tools = decode_or_none(_tools, body.raw("tools"))
    if not tools:
        return _joined(members)
    name = str(choice.value("name")) if mode == "named" and choice is not None else None
    shown = [_function(tool.name, _of_an_object(tool.input_schema), tool.strict) for tool in tools]
    return _joined(members | _calls(shown, mode, name, single=single))


def _mode(body: JsonObject) -> str:
    return str(body.value("tool_choice")) if "tool_choice" in body else "auto"


def _all_are_free(body: JsonObject, mode: str, free_calls: str, *, single: bool) -> bool:
    """Nothing restricts calls of tools, as far as that shows without reading the tools, which may be many."""
    if not body.has("tools") or mode == "none":
        return True
    if mode != "auto" or free_calls == "always":
        return False
    return free_calls == "never" or not (single or b'"strict"' in body.raw("tools"))


def _calls(tools: list[bytes], mode: str, name: str | None, *, single: bool) -> dict[str, bytes]:
    """name: of the tool that has to be called; None: `mode` says which may be."""
    choice = mode if name is None else {"type": "function", "function": {"name": name}}
    members = {"tools": b"[" + b",".join(tools) + b"]", "tool_choice": encode(choice)}
    return members | ({"parallel_tool_calls": b"false"} if single else {})


def _object(body: JsonObject | None, name: str) -> JsonObject | None:
    """The member, where it is an object."""
    raw = NULL if body is None else body.raw(name)
    return JsonObject(raw) if raw.startswith(b"{") else None


def _json_schema(schema: bytes) -> bytes:
    return b'{"type":"json_schema","json_schema":{"schema":' + schema + b"}}"


def _functions(tools: list[_Tool] | tuple[()]) -> Iterator[tuple[str, _Tool]]:
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
    if not bytes(schema).startswith(b"{"):
        return schema
    given = JsonObject(bytes(schema))
    return schema if "type" in given else msgspec.Raw(given.edit({"type": b'"object"'}))


def _function(name: str, parameters: msgspec.Raw, strict: msgspec.Raw) -> bytes:
    members = {"name": encode(name)}
    members |= {key: bytes(raw) for key, raw in (("parameters", parameters), ("strict", strict)) if bytes(raw) != NULL}
    return b'{"type":"function","function":' + _joined(members).data + b"}"


def _joined(members: dict[str, bytes]) -> JsonObject:
    return JsonObject(b"{" + b",".join(encode(name) + b":" + value for name, value in members.items()) + b"}")
