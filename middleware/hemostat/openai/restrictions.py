"""Finds out if a grammar restricts the tokens of a request, as far as its body shows.

vLLM 0.32 makes a grammar of a structured output, and of `tools` where a call is forced, where a tool is strict, or
where at most one call is allowed (of the last two only some tool parsers). Which ids it then allows, the engine's
plugin says, also where that is all of them. vLLM ignores the older members `guided_…`.
"""

from __future__ import annotations

import re
from typing import Any, Final

from hemostat.openai.json_splice import NULL, JsonObject

_STRICT: Final = re.compile(rb'"strict"\s*:\s*true')


def restricts_chat(body: JsonObject, *, tools: bool = True) -> bool:
    """Returns True if a grammar restricts the tokens of a chat or a completion. May raise one of MALFORMED.

    tools: requests of this form can have tools.

    >>> restricts_chat(JsonObject(b'{"response_format": {"type": "json_object"}}'))
    True
    """
    if body.has("structured_outputs") or body.type_of("response_format") not in (None, "text"):
        return True
    return tools and _restricts_calls(body, body.value("tool_choice"), single=_is_false(body, "parallel_tool_calls"))


def restricts_response(body: JsonObject) -> bool:
    """Returns True if a grammar restricts the tokens of a request to `/v1/responses`. May raise one of MALFORMED."""
    form = _object(_object(body, "text"), "format")
    if body.has("structured_outputs") or (form is not None and form.value("type") in ("json_object", "json_schema")):
        return True
    choice = _object(body, "tool_choice")
    # A list of allowed tools, and a tool of the server's own, force no call by a grammar.
    forced = "required" if choice is not None and choice.value("type") in ("function", "custom") else "none"
    mode = body.value("tool_choice") if choice is None else forced
    return _restricts_calls(body, mode, single=_is_false(body, "parallel_tool_calls"))


def restricts_message(body: JsonObject) -> bool:
    """Returns True if a grammar restricts the tokens of a request to `/v1/messages`. May raise one of MALFORMED."""
    form = _object(_object(body, "output_config"), "format")
    if form is not None and form.given("schema"):
        return True
    choice = _object(body, "tool_choice")
    if choice is None:
        return _restricts_calls(body, None, single=False)
    return _restricts_calls(body, choice.value("type"), single=choice.value("disable_parallel_tool_use") is True)


def _restricts_calls(body: JsonObject, choice: Any, *, single: bool) -> bool:
    """Returns True if a grammar restricts the calls. choice: "none", "auto" (also None), or what forces a call. single:
    at most one call is allowed."""
    if choice == "none" or not body.has("tools"):
        return False
    return choice not in (None, "auto") or single or _STRICT.search(body.raw("tools")) is not None


def _is_false(body: JsonObject, name: str) -> bool:
    return body.raw(name) == b"false"


def _object(body: JsonObject | None, name: str) -> JsonObject | None:
    """Returns the member, where it is an object."""
    raw = NULL if body is None else body.raw(name)
    return JsonObject(raw) if raw.startswith(b"{") else None
