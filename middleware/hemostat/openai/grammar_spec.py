"""What restricts the tokens of a request: the members of its body that vLLM makes a grammar of, as they are.

vLLM 0.32 takes `response_format` and `structured_outputs`, and makes a grammar of `tools` where a call is forced, or
where a tool is strict or calls are limited to one (`hemostat.openai.tool_parsers`). It ignores the older members
`guided_…`, which earlier versions enforced.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from hemostat.openai.json_splice import MALFORMED, NULL, JsonObject

MAX_GRAMMAR_BYTES = 64 * 1024
"""Of all members together; a request with more is not scored."""
MAX_TOOL_OBJECTS = 1_500
"""JSON objects in `tools`, schemas among them, of a request whose tools are read."""

_OUTPUT = ("response_format", "structured_outputs")
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_OTHER = ("stop_token_ids", "include_reasoning")


class GrammarOrigin(StrEnum):
    """Why vLLM enforces a grammar."""

    STRUCTURED_OUTPUT = "structured_output"
    FORCED_TOOL = "forced_tool"
    STRICT_TOOLS = "strict_tools"
    """The model may call tools, and a strict tool, or a limit of one call, restricts how."""


class GrammarSpec(msgspec.Struct, frozen=True):
    """The members of one request that determine its grammar."""

    origin: GrammarOrigin
    members: dict[str, bytes]
    """Name -> JSON, of those that are given and not null; at most MAX_GRAMMAR_BYTES."""


class _Function(msgspec.Struct, frozen=True):
    strict: msgspec.Raw = msgspec.Raw(NULL)


_NO_FUNCTION = _Function()


class _Tool(msgspec.Struct):
    function: _Function = _NO_FUNCTION


_tools: msgspec.json.Decoder[list[_Tool]] = msgspec.json.Decoder(list[_Tool])


class GrammarTooLarge(Exception):
    """The members have more than MAX_GRAMMAR_BYTES bytes, or more than MAX_TOOL_OBJECTS."""


def raw_tools(body: JsonObject) -> bytes:
    """The member `tools`, of a size that is decoded in little time, whatever is in it. GrammarTooLarge."""
    raw = body.raw("tools")
    if len(raw) > MAX_GRAMMAR_BYTES or raw.count(b"{") > MAX_TOOL_OBJECTS:
        raise GrammarTooLarge
    return raw


def read_grammar(body: JsonObject, *, tools: bool = True, free_calls: str = "strict") -> GrammarSpec | None:
    """What a chat's or completion's body enforces; None where every token is allowed. GrammarTooLarge, and one of
    MALFORMED. The other forms are read as chats: `forms.as_chat`.

    tools: whether requests of this form can have tools.
    free_calls: which calls that the model is free to make are restricted: "never", "always", or "strict", where a tool
        is strict or at most one call is allowed.

    >>> read_grammar(JsonObject(b'{"response_format": {"type": "json_object"}}')).origin.value
    'structured_output'
    """
    format_type = body.type_of("response_format")
    origin = None
    if (format_type is not None and format_type != "text") or body.has("structured_outputs"):
        origin = GrammarOrigin.STRUCTURED_OUTPUT
    limited = False
    if tools and body.has("tools"):
        choice = body.value("tool_choice") if "tool_choice" in body else "auto"
        if choice == "auto":
            limited = free_calls == "always" or (free_calls == "strict" and _limits_calls(body))
        elif choice not in (None, "none"):
            origin = GrammarOrigin.FORCED_TOOL
    if origin is None and not limited:
        return None
    names = (*_OUTPUT, *_TOOLS, *_OTHER) if limited or origin is GrammarOrigin.FORCED_TOOL else (*_OUTPUT, *_OTHER)
    members = {name: body.raw(name) for name in names if body.has(name)}
    if sum(map(len, members.values())) > MAX_GRAMMAR_BYTES:
        raise GrammarTooLarge
    return GrammarSpec(origin or GrammarOrigin.STRICT_TOOLS, members)


def _limits_calls(body: JsonObject) -> bool:
    """Whether a tool is strict, or at most one call is allowed."""
    if body.value("parallel_tool_calls") is False:
        return True
    if b'"strict"' not in body.raw("tools"):
        return False
    raw = raw_tools(body)
    try:
        return any(bytes(tool.function.strict) == b"true" for tool in _tools.decode(raw))
    except MALFORMED:
        return False
