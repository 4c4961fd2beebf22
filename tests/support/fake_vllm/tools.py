"""The tool parser of the fake vLLM, in Hermes's format."""

from __future__ import annotations

import json
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def tool_call(text: str) -> tuple[str, str, str] | None:
    """Text before the call, name and arguments, in Hermes's format."""
    before, opened, rest = text.partition(_OPEN)
    if not opened:
        return None
    call = json.loads(rest.partition(_CLOSE)[0])
    return before, call["name"], json.dumps(call["arguments"], ensure_ascii=False)


class ToolStream:
    """Text in, deltas out; None where the parser has nothing to say yet."""

    def __init__(self, tool_id: str) -> None:
        self.called = False
        self._tool_id = tool_id
        self._text = ""
        self._sent = 0
        self._closed = False

    def feed(self, text: str, finished: bool) -> dict[str, Any] | None:
        self._text += text
        opened = self._text.find(_OPEN)
        if opened < 0:
            held = 0 if finished else next((n for n in range(10, 0, -1) if self._text.endswith(_OPEN[:n])), 0)
            end = len(self._text) - held
            content, self._sent = self._text[self._sent : end], end
            return {"content": content} if content else None
        if self._closed:
            return None
        if not self.called and '"arguments"' in self._text:
            self.called = True
            name = self._text.partition('"name": "')[2].partition('"')[0]
            function = {"name": name}
            return self._delta({"id": self._tool_id, "type": "function", "index": 0, "function": function})
        if _CLOSE in self._text and (call := tool_call(self._text)) is not None:
            self._closed = True
            return self._delta({"index": 0, "function": {"arguments": call[2]}})
        return None

    @staticmethod
    def _delta(call: dict[str, Any]) -> dict[str, Any]:
        return {"content": None, "tool_calls": [call]}
