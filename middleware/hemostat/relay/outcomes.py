"""Cheap outcomes of every generation that passes by, sampled or not: how it ended, how long it is, whether it runs in
circles, whether the JSON or the tool call that was asked for parses.

Distance is not quality (arXiv 2606.19558): these figures say something of quality, by arm, at next to no cost. Nothing
is kept: the last bytes of a response (all, up to KEPT bytes, where structure was asked for) are held until it ends
and are judged; only counters remain.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

FINISHED = "hemostat_responses_finished_total"
"""Labels arm, reason. One a choice, by vLLM's finish_reason."""
OUTPUT_TOKENS = "hemostat_output_tokens_total"
"""Label arm. By `usage` where the response holds it, else the number of the stream's events."""
LOOPS = "hemostat_repetition_loops_total"
"""Label arm. Responses that end in one block of text over and over."""
STRUCTURED = "hemostat_structured_outputs_total"
"""Labels arm, kind (json, tool_call), outcome (valid, invalid, cut: it ended at the length limit)."""

UNTRACED = "hemostat_tracing_errors_total"
"""No labels. Exchanges that could not be traced or logged: a bug."""
UNJUDGED = "hemostat_outcome_errors_total"
"""No labels. Responses over which the judging itself failed: a bug."""

REASONS = frozenset({"stop", "length", "tool_calls", "function_call", "content_filter", "abort", "error", "repetition"})
"""Values of finish_reason that are a label of their own; others are `other`."""

KEPT = 256 * 1024
"""Bytes of one response that are held; of a longer one only the end is judged."""
PIECES = 64
PIECE = 4096
"""Of a stream in which nothing structured was asked for, the last so many reads, the last so many bytes of each."""

COPIES = 4
SPAN = 48
"""A loop is COPIES of one block, SPAN characters or more in all, at the very end. (A ruler, `-----`, is none.)"""

_FINISH = re.compile(rb'"finish_reason":\s*"([a-z_]{1,32})"')
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d{1,9})')
_TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content)":\s*"((?:[^"\\]|\\.)*)"')
_JSON_ASKED = re.compile(rb'"(?:json_object|json_schema|guided_json)"|"json":')
_TOOLS_ASKED = re.compile(rb'"tools":\s*\[')

_MODEL = re.compile(rb'"model":\s*"((?:[^"\\]|\\.){1,200})"')

Add = Callable[[str, tuple[str, ...], float], None]
"""(metric, label values, by how much)"""


@dataclass(frozen=True, slots=True)
class Ended:
    """What is known of a response when it is over; `output_tokens` None: nothing."""

    finish_reasons: tuple[str, ...] = ()
    output_tokens: int | None = None


class _Function(msgspec.Struct):
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    message: _Message | None = None
    delta: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Response(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_response = msgspec.json.Decoder(_Response)
_any: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


@dataclass(slots=True)
class Ear:
    """Listens to one exchange. `asks` gets the request's bytes, `hears` the response's as the client gets them (HTTP's
    chunk sizes may stand between them)."""

    json: bool = False
    tools: bool = False
    body: bytes = b""
    """The request's first bytes, for `model`."""
    events: int = 0
    stream: bool = False
    deaf: bool = False
    """The response is an error, or cannot be read: there is nothing to judge."""
    _pieces: deque[bytes] = field(default_factory=deque)
    _size: int = 0
    _whole: bool = True

    def asks(self, body: bytes) -> None:
        """In a JSON string a quote has a backslash before it, so that what users write does not look like a member."""
        self.body = self.body or body
        self.json = self.json or _JSON_ASKED.search(body) is not None
        self.tools = self.tools or _TOOLS_ASKED.search(body) is not None

    @property
    def model(self) -> str | None:
        """What the request names, where that stands in the body's first bytes."""
        found = _MODEL.search(self.body)
        return None if found is None else found[1].decode("utf-8", "replace")

    def begins(self, *, stream: bool) -> None:
        self.stream = stream
        if stream and not (self.json or self.tools):
            self._only_the_end()

    def hears(self, data: bytes) -> None:
        if self.deaf:
            return
        if self.stream:
            self.events += data.count(b"data: {")
        if not self._whole:
            self._pieces.append(data if len(data) <= PIECE else data[-PIECE:])
            return
        self._pieces.append(data)
        self._size += len(data)
        if self._size > KEPT:
            self._only_the_end()

    def _only_the_end(self) -> None:
        self._whole = False
        self._pieces = deque((piece[-PIECE:] for piece in self._pieces), PIECES)

    def ended(self, arm: str, add: Add) -> Ended:
        """Judge and count; `arm` is the request's."""
        if self.deaf:
            return Ended()
        data = b"".join(self._pieces)
        self._pieces.clear()
        response = self._read(data) if self._whole else None
        if response is None:
            reasons = [found.decode() for found in _FINISH.findall(data)]
            counted = _TOKENS.findall(data)
            tokens = int(counted[-1]) if counted else self.events
            texts = [b"".join(_TEXT.findall(data)).decode("utf-8", "replace")]
        else:
            reasons = [c.finish_reason for c in response.choices if c.finish_reason]
            tokens = response.usage.completion_tokens if response.usage else self.events
            texts = [_text(choice) for choice in response.choices]
            self._judge_structure(response, arm, add)
        for reason in reasons:
            add(FINISHED, (arm, reason if reason in REASONS else "other"), 1.0)
        if tokens:
            add(OUTPUT_TOKENS, (arm,), float(tokens))
        if any(loops(text) for text in texts):
            add(LOOPS, (arm,), 1.0)
        return Ended(tuple(reasons), tokens or None)

    def _judge_structure(self, response: _Response, arm: str, add: Add) -> None:
        for choice in response.choices:
            message = choice.message
            cut = choice.finish_reason == "length"
            calls = message.tool_calls if message is not None and message.tool_calls else []
            for call in calls:
                arguments = (call.function.arguments if call.function else None) or ""
                add(STRUCTURED, (arm, "tool_call", _outcome(arguments, cut)), 1.0)
            if self.json and not calls:
                add(STRUCTURED, (arm, "json", _outcome(_text(choice), cut)), 1.0)

    def _read(self, data: bytes) -> _Response | None:
        """None where it cannot be read: then only the patterns speak."""
        try:
            return _assembled(data) if self.stream else _response.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None


def _assembled(data: bytes) -> _Response:
    """A stream's events as though they had been one response."""
    choices: dict[int, _Choice] = {}
    usage: _Usage | None = None
    for line in data.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        event = _response.decode(line[6:])
        usage = event.usage or usage
        for part in event.choices:
            whole = choices.setdefault(part.index, _Choice(index=part.index, message=_Message("", [])))
            whole.finish_reason = part.finish_reason or whole.finish_reason
            message, delta = whole.message, part.delta
            assert message is not None
            message.content = (message.content or "") + ((delta.content if delta else part.text) or "")
            for call in (delta.tool_calls if delta else None) or []:
                _join(message, call)
    return _Response(list(choices.values()), usage)


def _join(message: _Message, part: _ToolCall) -> None:
    calls = message.tool_calls
    assert calls is not None
    call = next((c for c in calls if c.index == part.index), None)
    if call is None:
        call = _ToolCall(part.index, _Function(""))
        calls.append(call)
    assert call.function is not None
    call.function.arguments = (call.function.arguments or "") + ((part.function and part.function.arguments) or "")


def _text(choice: _Choice) -> str:
    return (choice.message.content if choice.message else choice.text) or ""


def _outcome(text: str, cut: bool) -> str:
    try:
        _any.decode(text)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return "cut" if cut else "invalid"
    return "valid"


def loops(text: str) -> bool:
    """Whether it ends in COPIES of one block, more than one character and SPAN in all."""
    end = text[-SPAN // COPIES :]
    if len(text) < SPAN or len(set(end)) < 2:
        return False
    # A loop's end stands one period earlier, too: the nearest place is the only candidate.
    before = text.rfind(end, 0, len(text) - 1)
    if before < 0:
        return False
    period = len(text) - len(end) - before
    whole = max(COPIES * period, SPAN)
    return len(text) >= whole and text[-whole:-period] == text[-whole + period :]
