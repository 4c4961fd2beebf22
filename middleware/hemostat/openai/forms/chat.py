"""The form of `/v1/chat/completions`, checked against vLLM 0.32 (`entrypoints/openai/chat_completion`).

vLLM names the emitted token first among a position's `top_logprobs`, whatever its rank, and cuts them to the number
that was asked for. With `return_tokens_as_token_ids` every `token` is an id, and so is the text in the `bytes` of an
alternative; the `bytes` of the emitted token remain the bytes of its text. So the client's own logprobs can be given
back where it asks for at most one alternative, which is the emitted token. Further ones cannot: which of equally likely
tokens vLLM names, and in which order, depends on how many it is asked for. Such a response is asked for ids only, and
keeps its logprobs.
"""

from __future__ import annotations

from typing import Final

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.complexity import check_messages
from hemostat.openai.forms.protocol import Details, Stripper
from hemostat.openai.forms.shared import (
    choices_per_prompt,
    decode_or_none,
    injected_members,
    unscorable_parameters,
    usage_requested,
)
from hemostat.openai.json_splice import JsonObject, encode
from hemostat.openai.observing import EndingObserver
from hemostat.openai.requests import NO_LOGPROBS, Message, Part, Request, RequestedLogprobs
from hemostat.openai.restrictions import restricts_chat
from hemostat.openai.stripping import ChoiceStripper, choices_go_on, record_ending
from hemostat.openai.tokens import ResponseTokens

MAX_ALTERNATIVES: Final = 1
"""The largest number of alternatives of the client's own that a response with more of them can be turned back into."""


_elements: Final[msgspec.json.Decoder[list[msgspec.Raw]]] = msgspec.json.Decoder(list[msgspec.Raw])
_byte_values: Final[msgspec.json.Decoder[list[int]]] = msgspec.json.Decoder(list[int])
_messages: Final[msgspec.json.Decoder[list[Message]]] = msgspec.json.Decoder(list[Message])
_parts: Final[msgspec.json.Decoder[list[Part]]] = msgspec.json.Decoder(list[Part])


class Chat:
    """A `protocol.Format`, and the `stripping.LogprobForm` of its responses."""

    prompt_in_choice = False

    def read(self, body: JsonObject) -> Details:
        messages: list[Message] | None = decode_or_none(_messages, body.raw("messages"))
        check_messages(len(messages or ()))
        usage, choices = usage_requested(body), choices_per_prompt(body)
        requested = _requested(body)
        unscorable = (
            unscorable_parameters(body, choices=choices, usage=usage, prompt=_unscorable_messages(messages))
            or (Unscored.HIDDEN_REASONING if body.value("include_reasoning") is False else None)
            or (Unscored.CLIENT_LOGPROBS if requested is None or not requested.restorable else None)
        )
        return Details(
            unscorable=unscorable,
            messages=messages,
            conversation=_conversation(body, messages),
            usage_requested=bool(usage),
            choices=choices or 1,
            requested=requested or NO_LOGPROBS,
            ids_only=unscorable is Unscored.CLIENT_LOGPROBS and requested is not None,
        )

    def restricts_tokens(self, body: JsonObject) -> bool:
        return restricts_chat(body)

    def injected_members(self, request: Request, top_k: int) -> dict[str, bytes]:
        return injected_members(request, {"logprobs": b"true", "top_logprobs": encode(top_k)} if top_k else {})

    def stripper(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        return ChoiceStripper(self, request, tokens, stream=stream)

    def observer(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        return EndingObserver(self, request, tokens, stream=stream)

    def record_ending(self, data: JsonObject, tokens: ResponseTokens) -> None:
        record_ending(data, tokens)

    def goes_on(self, events: bytes) -> bool:
        return choices_go_on(events)

    def is_held_back(self, choice: JsonObject) -> bool:
        return choice.raw("delta") == b"{}"

    def restore(self, logprobs: bytes, requested: RequestedLogprobs) -> bytes:
        body = JsonObject(logprobs)
        entries = [
            _restore_entry(JsonObject(bytes(entry)), requested) for entry in _elements.decode(body.raw("content"))
        ]
        return body.edit({"content": b"[" + b",".join(entries) + b"]"})


def _requested(body: JsonObject) -> RequestedLogprobs | None:
    """Returns what the client asks for; None if that is not known."""
    logprobs, top = body.value("logprobs"), body.value("top_logprobs")
    as_ids, token_ids = body.value("return_tokens_as_token_ids"), body.value("return_token_ids")
    if not all(value in (None, True, False) for value in (logprobs, as_ids, token_ids)):
        return None
    chosen = body.value("logprob_token_ids")
    if not logprobs:
        return None if top or chosen else RequestedLogprobs(token_ids=bool(token_ids))
    if top is None and "top_logprobs" in body:
        return None
    top = 0 if top is None else top
    if chosen or not isinstance(top, int) or isinstance(top, bool) or not 0 <= top <= MAX_ALTERNATIVES:
        return RequestedLogprobs(bool(token_ids), logprobs=True, restorable=False)
    return RequestedLogprobs(bool(token_ids), logprobs=True, top=top, as_ids=bool(as_ids))


def _conversation(body: JsonObject, messages: list[Message] | None) -> bytes | None:
    """Returns the messages up to the first one of the user, or else all of them."""
    if not body.has("messages"):
        return None
    for position, message in enumerate(messages or ()):
        if message.role == "user":
            return b"\x00".join(_elements.decode(body.raw("messages"))[: position + 1])
    return body.raw("messages")


def _unscorable_messages(messages: list[Message] | None) -> Unscored | None:
    if not messages:
        return Unscored.INVALID
    parts: list[Part] = []
    for message in messages:
        content = bytes(message.content)
        if content.startswith(b"["):
            parts += decode_or_none(_parts, content) or [Part()]
            check_messages(len(parts))
    return Unscored.MULTIMODAL if any(part.type != "text" for part in parts) else None


def _restore_entry(entry: JsonObject, requested: RequestedLogprobs) -> bytes:
    """Returns one position as the client asked for it."""
    top = [bytes(item) for item in _elements.decode(entry.raw("top_logprobs"))][: requested.top]
    changes = {}
    if not requested.as_ids:
        text = bytes(_byte_values.decode(entry.raw("bytes"))).decode()
        changes["token"] = encode(text)
        for item in map(JsonObject, top):
            if item.raw("token") != entry.raw("token"):
                raise ValueError("the first alternative is not the emitted token")
            top = [item.edit({"token": changes["token"], "bytes": entry.raw("bytes")})]
    return entry.edit(changes | {"top_logprobs": b"[" + b",".join(top) + b"]"})
