"""The form of `/v1/responses`, checked against vLLM 0.32 (`entrypoints/openai/responses`).

Such a response can name the ids of the prompt and of the output (`enable_response_messages`: one message each; gpt-oss
has messages of another kind, without ids), but other candidates only by their texts, which do not identify ids. So it
is scored from what the engine's plugin reports, and passed on as it is; or it is asked for the ids. They are in its
last event, in members that are null otherwise. vLLM keeps them with a response that can be fetched later.
"""

from __future__ import annotations

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.complexity import check_messages
from hemostat.openai.forms.protocol import Details, Stripper
from hemostat.openai.forms.shared import decode_or_none
from hemostat.openai.forms.tapped import TappedForm
from hemostat.openai.json_splice import MALFORMED, NULL, JsonObject
from hemostat.openai.observing import IdsStripper
from hemostat.openai.requests import Message, Part, Request
from hemostat.openai.restrictions import restricts_response
from hemostat.openai.tokens import ResponseTokens, TokenCount, Usage


class _Item(msgspec.Struct):
    """One item of the input; a message needs no type."""

    type: str = "message"
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(NULL)
    output: msgspec.Raw = msgspec.Raw(NULL)


class _Usage(msgspec.Struct):
    input_tokens: TokenCount
    output_tokens: TokenCount


class _OutputItem(msgspec.Struct):
    type: str = ""


class _TokenMessage(msgspec.Struct):
    """A message with the tokens that went into the model, or came out of it."""

    tokens: msgspec.Raw


_elements: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])
_items: msgspec.json.Decoder[list[_Item]] = msgspec.json.Decoder(list[_Item])
_parts: msgspec.json.Decoder[list[Part]] = msgspec.json.Decoder(list[Part])
_usage: msgspec.json.Decoder[_Usage] = msgspec.json.Decoder(_Usage)
_output: msgspec.json.Decoder[list[_OutputItem]] = msgspec.json.Decoder(list[_OutputItem])
_token_messages: msgspec.json.Decoder[list[_TokenMessage]] = msgspec.json.Decoder(list[_TokenMessage])
_ids: msgspec.json.Decoder[list[int]] = msgspec.json.Decoder(list[int])

_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"})
_OF_THE_MODEL = frozenset({"function_call", "reasoning", "custom_tool_call"})
FINISH_REASONS = {"completed": "stop", "incomplete": "length"}
"""A response's status -> what chat calls it."""
ASKS_FOR_IDS = "enable_response_messages"
INPUT, OUTPUT = "input_messages", "output_messages"


class Responses(TappedForm):
    """The `protocol.Format` of `/v1/responses`."""

    def read(self, body: JsonObject) -> Details:
        raw = body.raw("input")
        items: list[_Item] | None = None
        if raw.startswith(b'"'):
            messages: list[Message] | None = [Message("user", msgspec.Raw(raw))]
        else:
            items = decode_or_none(_items, raw)
            check_messages(len(items or ()))
            messages = None if items is None else [_message(item) for item in items]
        if messages is not None and body.has("instructions"):
            messages.insert(0, Message("system", msgspec.Raw(body.raw("instructions"))))
        unscorable = _unscorable(body, items, messages)
        own = body.raw(ASKS_FOR_IDS)
        return Details(
            unscorable=unscorable,
            messages=messages or [],
            conversation=_conversation(body, raw, items),
            ids_only=unscorable is Unscored.NO_TOKEN_IDS and own in (NULL, b"false", b"true"),
        )

    def restricts_tokens(self, body: JsonObject) -> bool:
        return restricts_response(body)

    def injected_members(self, request: Request, top_k: int) -> dict[str, bytes]:
        """Returns the members that ask for the ids, which are all that can be asked for."""
        return {ASKS_FOR_IDS: b"true"}

    def stripper(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        return IdsStripper(self, request, tokens, stream=stream, keep=request.body.value(ASKS_FOR_IDS) is True)

    def take_ids(self, data: bytes, tokens: ResponseTokens) -> bytes:
        """See `observing.IdsForm`."""
        if b'_messages"' not in data:
            return data
        body = JsonObject(data)
        inner = body.raw("response")
        response = body if inner == NULL else JsonObject(inner)
        if not response.has(INPUT) and not response.has(OUTPUT):
            return data
        if tokens.failure is None:
            _record_ids(response, tokens)
        stripped = response.edit({INPUT: NULL, OUTPUT: NULL})
        return stripped if response is body else body.edit({"response": stripped})

    def record_ending(self, data: JsonObject, tokens: ResponseTokens) -> None:
        """Records the ending from an event (`response.created`, `response.completed`, …) or a whole response."""
        inner = data.raw("response")
        response = data if inner == NULL else JsonObject(inner)
        if not response.has("status") or not response.has("model"):
            return
        if not tokens.model:
            tokens.model = str(response.value("model"))
        status = response.value("status")
        if status in ("failed", "cancelled"):
            tokens.fail(Unscored.UPSTREAM_ERROR)
        elif status in FINISH_REASONS:
            choice = tokens.choice(0)
            choice.finish_reason = FINISH_REASONS[status]
            choice.reasoning = any(item.type == "reasoning" for item in _output.decode(response.raw("output")))
            if response.has("usage"):
                usage = _usage.decode(response.raw("usage"))
                tokens.usage = Usage(usage.input_tokens, usage.output_tokens)


def _record_ids(response: JsonObject, tokens: ResponseTokens) -> None:
    try:
        prompts = _token_messages.decode(response.raw(INPUT))
        outputs = _token_messages.decode(response.raw(OUTPUT))
    except MALFORMED:
        tokens.fail(Unscored.NO_TOKEN_IDS)
        return
    if len(prompts) != 1 or len(outputs) != 1:
        # The server calls its own tools, and generates several times; or it has generated nothing.
        tokens.fail(Unscored.TOKEN_COUNT_MISMATCH if outputs else Unscored.EMPTY)
        return
    tokens.add_prompt(0, bytes(prompts[0].tokens))
    if tokens.failure is None:
        tokens.add(0, _ids.decode(outputs[0].tokens))


def _message(item: _Item) -> Message:
    role = item.role or ("assistant" if item.type in _OF_THE_MODEL else "tool")
    return Message(role, item.content if item.content != NULL else item.output)


def _conversation(body: JsonObject, raw: bytes, items: list[_Item] | None) -> bytes | None:
    """Returns the instructions and the items up to the user's first message, or else all of them."""
    if raw == NULL:
        return None
    instructions = body.raw("instructions")
    for position, item in enumerate(items or ()):
        if item.role == "user":
            return b"\x00".join([instructions, *map(bytes, _elements.decode(raw)[: position + 1])])
    return b"\x00".join([instructions, raw])


def _unscorable(body: JsonObject, items: list[_Item] | None, messages: list[Message] | None) -> Unscored:
    value = body.value
    if value("stream") not in (None, True, False) or not messages:
        return Unscored.INVALID
    if value("background"):
        return Unscored.BACKGROUND
    if body.has("previous_response_id") or body.has("previous_input_messages"):
        return Unscored.SERVER_STATE
    if _has_media(items or []):
        return Unscored.MULTIMODAL
    return Unscored.NO_TOKEN_IDS


def _has_media(items: list[_Item]) -> bool:
    parts: list[Part] = []
    for item in items:
        for content in (bytes(item.content), bytes(item.output)):
            if content.startswith(b"["):
                parts += decode_or_none(_parts, content) or [Part()]
                check_messages(len(parts))
    return any(part.type not in _TEXT_PARTS for part in parts)
