"""The form of `/v1/completions`, checked against vLLM 0.32 (`entrypoints/openai/completion`).

The choices of the first prompt come first, then the choices of the second, and so on. A position's `top_logprobs` name
the emitted token first and have one member more than was asked for where that token is not among the most likely ones.
With `return_tokens_as_token_ids` no text is left in `logprobs`, so the client's own logprobs can be given back only
where it asks for ids itself, and for the emitted token's alone (`logprobs: 0`). Any other response is asked for ids
only, and keeps its logprobs: see `chat` for why.
"""

from __future__ import annotations

from typing import Final

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.complexity import check_prompts
from hemostat.openai.forms.protocol import Details, Stripper
from hemostat.openai.forms.shared import (
    choices_per_prompt,
    decode_or_none,
    injected_members,
    unscorable_parameters,
    usage_requested,
)
from hemostat.openai.json_splice import NULL, JsonObject, encode
from hemostat.openai.observing import EndingObserver
from hemostat.openai.requests import NO_LOGPROBS, Request, RequestedLogprobs
from hemostat.openai.restrictions import restricts_chat
from hemostat.openai.stripping import ChoiceStripper, choices_go_on, record_ending
from hemostat.openai.tokens import ResponseTokens

_text: Final[msgspec.json.Decoder[str]] = msgspec.json.Decoder(str)
_texts: Final[msgspec.json.Decoder[list[str]]] = msgspec.json.Decoder(list[str])
_lists: Final[msgspec.json.Decoder[list[list[int]]]] = msgspec.json.Decoder(list[list[int]])
_ids: Final[msgspec.json.Decoder[list[int]]] = msgspec.json.Decoder(list[int])
_rows: Final[msgspec.json.Decoder[list[dict[str, msgspec.Raw] | None]]] = msgspec.json.Decoder(
    list[dict[str, msgspec.Raw] | None]
)


class Completions:
    """A `protocol.Format`, and the `stripping.LogprobForm` of its responses."""

    prompt_in_choice = True

    def read(self, body: JsonObject) -> Details:
        prompts = _prompts(body)
        usage, each = usage_requested(body), choices_per_prompt(body)
        choices = None if each is None else each * max(1, len(prompts or ()))
        requested = _requested(body)
        raw = body.raw("prompt")
        unscorable = unscorable_parameters(
            body, choices=choices, usage=usage, prompt=_unscorable_prompts(body, prompts)
        ) or (Unscored.CLIENT_LOGPROBS if requested is None or not requested.restorable else None)
        return Details(
            unscorable=unscorable,
            messages=None,
            conversation=None if raw == NULL else raw,
            usage_requested=bool(usage),
            choices=choices or 1,
            prompts=max(1, len(prompts or ())),
            min_prompt_tokens=max((len(prompt) for prompt in prompts or () if isinstance(prompt, list)), default=0),
            requested=requested or NO_LOGPROBS,
            ids_only=unscorable is Unscored.CLIENT_LOGPROBS and requested is not None,
        )

    def restricts_tokens(self, body: JsonObject) -> bool:
        return restricts_chat(body, tools=False)

    def injected_members(self, request: Request, top_k: int) -> dict[str, bytes]:
        return injected_members(request, {"logprobs": encode(top_k)} if top_k else {})

    def stripper(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        return ChoiceStripper(self, request, tokens, stream=stream)

    def observer(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> Stripper:
        return EndingObserver(self, request, tokens, stream=stream)

    def record_ending(self, data: JsonObject, tokens: ResponseTokens) -> None:
        record_ending(data, tokens)

    def goes_on(self, events: bytes) -> bool:
        return choices_go_on(events)

    def is_held_back(self, choice: JsonObject) -> bool:
        return False

    def restore(self, logprobs: bytes, requested: RequestedLogprobs) -> bytes:
        body = JsonObject(logprobs)
        rows = [_restore_row(row) for row in _rows.decode(body.raw("top_logprobs"))]
        return body.edit({"top_logprobs": b"[" + b",".join(rows) + b"]"})


def _prompts(body: JsonObject) -> list[str | list[int]] | None:
    """Returns the prompts; None if they have the wrong type, or there is none."""
    raw = body.raw("prompt")
    if (text := decode_or_none(_text, raw)) is not None:
        return [text]
    if ids := decode_or_none(_ids, raw):
        return [ids]
    check_prompts(raw)
    return decode_or_none(_texts, raw) or decode_or_none(_lists, raw) or None


def _unscorable_prompts(body: JsonObject, prompts: list[str | list[int]] | None) -> Unscored | None:
    if body.has("prompt_embeds"):
        return Unscored.MULTIMODAL
    return None if prompts else Unscored.INVALID


def _requested(body: JsonObject) -> RequestedLogprobs | None:
    """Returns what the client asks for; None if that is not known."""
    top = body.value("logprobs")
    as_ids, token_ids = body.value("return_tokens_as_token_ids"), body.value("return_token_ids")
    if not all(value in (None, True, False) for value in (as_ids, token_ids)):
        return None
    chosen = body.value("logprob_token_ids")
    if top is None:
        return None if chosen else RequestedLogprobs(token_ids=bool(token_ids))
    if chosen or not as_ids or isinstance(top, bool) or top != 0:
        return RequestedLogprobs(bool(token_ids), logprobs=True, restorable=False)
    return RequestedLogprobs(bool(token_ids), logprobs=True, as_ids=True)


def _restore_row(row: dict[str, msgspec.Raw] | None) -> bytes:
    """Returns one position with the emitted token alone."""
    if row is None:
        return NULL
    name, value = next(iter(row.items()))
    return b"{" + encode(name) + b":" + bytes(value) + b"}"
