"""The form of `/v1/messages`, which is Anthropic's, checked against vLLM 0.32 (`entrypoints/anthropic`).

Such a response names neither ids nor log-probabilities. So it is scored from what the engine's plugin hands out, and is
passed on as it is.
"""

from __future__ import annotations

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.complexity import check_messages
from hemostat.openai.forms.protocol import Details
from hemostat.openai.forms.shared import decode_or_none
from hemostat.openai.forms.tapped import TappedForm
from hemostat.openai.json_splice import NULL, JsonObject
from hemostat.openai.requests import Message
from hemostat.openai.restrictions import restricts_message
from hemostat.openai.tokens import ResponseTokens, TokenCount, Usage


class _Block(msgspec.Struct):
    type: str = ""
    content: msgspec.Raw = msgspec.Raw(NULL)
    """The content of a tool's result."""


class _Usage(msgspec.Struct):
    output_tokens: TokenCount
    input_tokens: TokenCount = 0
    cache_read_input_tokens: TokenCount | None = None
    cache_creation_input_tokens: TokenCount | None = None


_elements: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])
_messages: msgspec.json.Decoder[list[Message]] = msgspec.json.Decoder(list[Message])
_blocks: msgspec.json.Decoder[list[_Block]] = msgspec.json.Decoder(list[_Block])
_usage: msgspec.json.Decoder[_Usage] = msgspec.json.Decoder(_Usage)
_MEDIA = frozenset({"image", "document"})
FINISH_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}
"""The finish reason in chat by Anthropic's `stop_reason`."""


class Messages(TappedForm):
    """The `protocol.Format` of `/v1/messages`."""

    def read(self, body: JsonObject) -> Details:
        messages: list[Message] | None = decode_or_none(_messages, body.raw("messages"))
        check_messages(len(messages or ()))
        conversation = _conversation(body, messages)
        if messages and body.has("system"):
            messages.insert(0, Message("system", msgspec.Raw(body.raw("system"))))
        return Details(
            unscorable=_unscorable(body, messages),
            messages=messages or [],
            conversation=conversation,
        )

    def restricts_tokens(self, body: JsonObject) -> bool:
        # A message may change the tools, which may then restrict calls.
        raw = body.raw("messages")
        return restricts_message(body) or b'"tool_addition"' in raw or b'"tool_removal"' in raw

    def record_ending(self, data: JsonObject, tokens: ResponseTokens) -> None:
        """Records the ending from an event (`message_start`, `message_delta`, …) or a whole response."""
        message = JsonObject(data.raw("message")) if data.has("message") else data
        if message.has("model") and not tokens.model:
            tokens.model = str(message.value("model"))
        # A stream's event has the reason in its delta.
        holder = JsonObject(data.raw("delta")) if data.has("delta") else message
        if holder.has("stop_reason"):
            reason = str(holder.value("stop_reason"))
            tokens.choice(0).finish_reason = FINISH_REASONS.get(reason, reason)
            if data.has("usage"):
                usage = _usage.decode(data.raw("usage"))
                cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
                tokens.usage = Usage(usage.input_tokens + cached, usage.output_tokens)
        if data.has("content_block"):
            tokens.choice(0).reasoning |= JsonObject(data.raw("content_block")).value("type") == "thinking"
        elif data.has("content") and data.raw("content").startswith(b"["):
            blocks = _blocks.decode(data.raw("content"))
            tokens.choice(0).reasoning = any(block.type == "thinking" for block in blocks)


def _conversation(body: JsonObject, messages: list[Message] | None) -> bytes | None:
    """Returns the system prompt and the messages up to the first one of the user, or else all of them."""
    raw = body.raw("messages")
    if raw == NULL:
        return None
    system = body.raw("system")
    for position, message in enumerate(messages or ()):
        if message.role == "user":
            return b"\x00".join([system, *map(bytes, _elements.decode(raw)[: position + 1])])
    return b"\x00".join([system, raw])


def _unscorable(body: JsonObject, messages: list[Message] | None) -> Unscored:
    value = body.value
    if value("stream") not in (None, True, False) or not messages:
        return Unscored.INVALID
    if _has_media(messages):
        return Unscored.MULTIMODAL
    return Unscored.NO_TOKEN_IDS


def _has_media(messages: list[Message]) -> bool:
    contents = [message.content for message in messages]
    for _ in range(2):  # what is in messages, then what is in the tools' results among that, which have no others
        blocks: list[_Block] = []
        for content in map(bytes, contents):
            if content.startswith(b"["):
                blocks += decode_or_none(_blocks, content) or [_Block("image")]
                check_messages(len(blocks))
        if any(block.type in _MEDIA for block in blocks):
            return True
        contents = [block.content for block in blocks]
    return False
