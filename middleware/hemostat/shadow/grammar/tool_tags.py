"""Structural tags of tool calls in the models' own syntaxes. Needs xgrammar.

Follows `tool_parsers/structural_tag_registry.py` of vLLM 0.32: tags that vLLM has itself (hermes, longcat) are made
here, all others by xgrammar.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from xgrammar import StructuralTag, get_model_structural_tag
from xgrammar.structural_tag import (
    JSONSchemaFormat,
    TagFormat,
    TagsWithSeparatorFormat,
    TokenTriggeredTagsFormat,
    TriggeredTagsFormat,
)

from hemostat.shadow.grammar.constraints import ToolCalls
from hemostat.shadow.grammar.reasons import GrammarFailure, GrammarReason

_MARKERS = {"hermes": "tool_call", "longcat": "longcat_tool_call"}
_CALL_LISTS = (TriggeredTagsFormat, TokenTriggeredTagsFormat, TagsWithSeparatorFormat)


def make_tag(calls: ToolCalls) -> str:
    """The structural tag's JSON. GrammarFailure where xgrammar does not know the format or refuses the tools."""
    marker = _MARKERS.get(calls.format)
    try:
        if marker is not None:
            tag = _hermes_style(calls, f"<{marker}>", f"</{marker}>")
        else:
            tag = get_model_structural_tag(
                model=calls.format, tools=calls.tools, tool_choice=calls.choice, reasoning=False
            )
    except ValueError as error:
        raise GrammarFailure(GrammarReason.INVALID, f"tools: {' '.join(str(error).split())[:200]}") from error
    if calls.single:
        _stop_after_first(tag.format)
    return json.dumps(tag.model_dump())


def _hermes_style(calls: ToolCalls, start: str, end: str) -> StructuralTag:
    functions = [tool["function"] for tool in calls.tools]
    if isinstance(calls.choice, dict):
        name = calls.choice["function"]["name"]
        functions = [function for function in functions if function["name"] == name]
    tags = [
        TagFormat(
            begin=f'{opening}{function["name"]}", "arguments": ',
            content=JSONSchemaFormat(json_schema=_parameters(function)),
            end=closing,
        )
        for function in functions
        for opening, closing in ((start + '\n{"name": "', "}\n" + end), (start + '{"name": "', "}" + end))
    ]
    if not tags:
        raise ValueError("no tool can be called")
    if calls.choice == "auto":
        return StructuralTag(format=TriggeredTagsFormat(triggers=[start], tags=tags))
    forced = isinstance(calls.choice, dict)
    return StructuralTag(
        format=TagsWithSeparatorFormat(tags=tags, separator="", at_least_one=True, stop_after_first=forced)
    )


def _parameters(function: dict[str, Any]) -> dict[str, Any] | bool:
    parameters = function.get("parameters")
    return True if function["strict"] is False or parameters is None else parameters


def _stop_after_first(node: Any) -> None:
    """Lists of calls stop after the first call."""
    if isinstance(node, BaseModel):
        if isinstance(node, _CALL_LISTS):
            node.stop_after_first = True
        parts: Iterable[Any] = [getattr(node, name) for name in type(node).model_fields]
    else:
        parts = node if isinstance(node, list | tuple) else ()
    for part in parts:
        _stop_after_first(part)
