"""The content of a response, whatever its form: its texts, tool calls, finish reasons and usage, in the structure of
chat.

`parse` reads a whole response; of a stream that is not kept whole, the patterns of `tail_of` find what its last bytes
say. A message of `/v1/messages` and a response of `/v1/responses` are one choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from hemostat.openai.forms import messages, responses
from hemostat.openai.routes import Form
from hemostat.openai.tokens import TokenCount

# Module globals: before Python 3.12, looking up a member of an Enum class takes about 0.2 µs.
_CHAT: Final = Form.CHAT
_COMPLETIONS: Final = Form.COMPLETIONS
_MESSAGES: Final = Form.MESSAGES

_CHAT_FINISH: Final = re.compile(rb'"finish_reason":\s*"([a-z_]{1,32})"')
_MESSAGE_FINISH: Final = re.compile(rb'"stop_reason":\s*"([a-z_]{1,32})"')
_RESPONSE_FINISH: Final = re.compile(rb'"status":\s*"(completed|incomplete)"')
_CHAT_TEXT: Final = re.compile(rb'"(?:content|text|reasoning|reasoning_content)":\s*"((?:[^"\\]|\\.)*)"')
_MESSAGE_TEXT: Final = re.compile(rb'"(?:text|thinking)":\s*"((?:[^"\\]|\\.)*)"')
# The events that end a part, and the last one, repeat the whole text.
_RESPONSE_TEXT: Final = re.compile(rb'"delta":\s*"((?:[^"\\]|\\.)*)"')


class Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct):
    index: int = 0
    function: Function | None = None


class Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Choice(msgspec.Struct):
    index: int = 0
    message: Message | None = None
    delta: Message | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def calls(self) -> list[ToolCall]:
        return (self.message.tool_calls if self.message is not None else None) or []

    @property
    def whole_text(self) -> str:
        return (self.message.content if self.message else self.text) or ""


class Usage(msgspec.Struct):
    completion_tokens: TokenCount = 0


class Response(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None


class _OutputUsage(msgspec.Struct):
    output_tokens: TokenCount = 0


class _Block(msgspec.Struct):
    """A block of a message's content."""

    type: str = ""
    text: str = ""
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw(b"{}")


class _Delta(msgspec.Struct):
    text: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _MessageEvent(msgspec.Struct):
    """An event of a stream of `/v1/messages`, or the whole message."""

    type: str = ""
    index: int = 0
    content_block: _Block | None = None
    delta: _Delta | None = None
    content: list[_Block] = []
    stop_reason: str | None = None
    usage: _OutputUsage | None = None


class _Part(msgspec.Struct):
    type: str = ""
    text: str = ""


class _Item(msgspec.Struct):
    """An item of a response's output."""

    type: str = ""
    content: list[_Part] | None = None
    name: str | None = None
    arguments: str | None = None


class _ItemResponse(msgspec.Struct):
    """A response of `/v1/responses`."""

    status: str = ""
    output: list[_Item] = []
    usage: _OutputUsage | None = None


class _ItemEvent(msgspec.Struct):
    type: str = ""
    response: _ItemResponse | None = None


_response: Final[msgspec.json.Decoder[Response]] = msgspec.json.Decoder(Response)
_message_event: Final[msgspec.json.Decoder[_MessageEvent]] = msgspec.json.Decoder(_MessageEvent)
_item_response: Final[msgspec.json.Decoder[_ItemResponse]] = msgspec.json.Decoder(_ItemResponse)
_item_event: Final[msgspec.json.Decoder[_ItemEvent]] = msgspec.json.Decoder(_ItemEvent)


def parse(data: bytes, form: Form, *, stream: bool) -> Response | None:
    """Returns the response; None if it is malformed, so that only the patterns are applied."""
    try:
        if form is _CHAT or form is _COMPLETIONS:
            return _merge_events(data) if stream else _response.decode(data)
        if form is _MESSAGES:
            return _message([_message_event.decode(event) for event in (_events(data) if stream else (data,))])
        return _items(_last_response(data) if stream else _item_response.decode(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def tail_of(data: bytes, form: Form) -> tuple[list[str], str]:
    """Returns the finish reasons and the text in the last bytes of a stream."""
    if form is Form.MESSAGES:
        result = _MESSAGE_FINISH.findall(data)[-1:]
        reasons = [messages.FINISH_REASONS.get(reason.decode(), reason.decode()) for reason in result]
        pattern = _MESSAGE_TEXT
    elif form is Form.RESPONSES:
        reasons = [responses.FINISH_REASONS[reason.decode()] for reason in _RESPONSE_FINISH.findall(data)[-1:]]
        pattern = _RESPONSE_TEXT
    else:
        reasons = [reason.decode() for reason in _CHAT_FINISH.findall(data)]
        pattern = _CHAT_TEXT
    return reasons, b"".join(pattern.findall(data)).decode("utf-8", "replace")


def _events(data: bytes) -> Iterator[bytes]:
    """Yields the JSON of each event."""
    return (line[6:] for line in data.split(b"\n") if line.startswith(b"data: {"))


def _merge_events(data: bytes) -> Response:
    """Returns the events of a chat's or completion's stream, merged into one response."""
    choices: dict[int, Choice] = {}
    usage: Usage | None = None
    for line in _events(data):
        event = _response.decode(line)
        usage = event.usage or usage
        for part in event.choices:
            whole = choices.setdefault(part.index, Choice(index=part.index, message=Message("", [])))
            whole.finish_reason = part.finish_reason or whole.finish_reason
            message, delta = whole.message, part.delta
            assert message is not None
            message.content = (message.content or "") + ((delta.content if delta else part.text) or "")
            for call in (delta.tool_calls if delta else None) or []:
                _append_tool_call(message, call)
    return Response(list(choices.values()), usage)


def _append_tool_call(message: Message, part: ToolCall) -> None:
    """Appends a part's arguments to the tool call with the same index."""
    calls = message.tool_calls
    assert calls is not None
    call = next((c for c in calls if c.index == part.index), None)
    if call is None:
        call = ToolCall(part.index, Function())
        calls.append(call)
    assert call.function is not None
    if part.function is not None:
        call.function.name = call.function.name or part.function.name
        call.function.arguments = (call.function.arguments or "") + (part.function.arguments or "")


def _message(events: list[_MessageEvent]) -> Response:
    texts: list[str] = []
    calls: dict[int, Function] = {}
    reason, usage = None, None
    for event in events:
        blocks = [(event.index, event.content_block)] if event.content_block else [*enumerate(event.content)]
        for index, block in blocks:
            if block.type == "text":
                texts.append(block.text)
            elif block.type == "tool_use":
                # In a stream the arguments follow.
                calls[index] = Function(block.name, "" if event.content_block else bytes(block.input).decode())
        if event.delta is not None:
            texts.append(event.delta.text)
            if event.delta.partial_json and event.index in calls:
                call = calls[event.index]
                call.arguments = (call.arguments or "") + event.delta.partial_json
            reason = event.delta.stop_reason or reason
        reason = event.stop_reason or reason
        usage = event.usage or usage
    return _one_choice("".join(texts), list(calls.values()), messages.FINISH_REASONS.get(reason or "", reason), usage)


def _last_response(data: bytes) -> _ItemResponse:
    """Returns the response that the last event of a stream repeats."""
    last = _ItemResponse()
    for line in _events(data):
        event = _item_event.decode(line)
        last = event.response or last
    return last


def _items(response: _ItemResponse) -> Response:
    parts = [part for item in response.output if item.type == "message" for part in item.content or []]
    calls = [Function(item.name, item.arguments) for item in response.output if item.type == "function_call"]
    return _one_choice(
        "".join(part.text for part in parts), calls, responses.FINISH_REASONS.get(response.status), response.usage
    )


def _one_choice(text: str, calls: list[Function], finish: str | None, usage: _OutputUsage | None) -> Response:
    message = Message(text, [ToolCall(index, call) for index, call in enumerate(calls)])
    return Response(
        [Choice(message=message, finish_reason=finish)], Usage(usage.output_tokens) if usage is not None else None
    )
