"""The common parts of the requests of chat and completions, and the members that are injected into them."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.json_splice import MALFORMED, JsonObject
from hemostat.openai.requests import MAX_CHOICES, Request, StreamOptions

_GUIDED_KEYS: Final = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_stream_options: Final[msgspec.json.Decoder[StreamOptions | None]] = msgspec.json.Decoder(StreamOptions | None)


def decode_or_none(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """Returns the decoded value; None if the value has the wrong type: the request goes on, and vLLM explains the error
    to the client."""
    try:
        return decoder.decode(raw)
    except MALFORMED:
        return None


def usage_requested(body: JsonObject) -> bool | None:
    """Returns True if the client asks for usage in a stream; None: `stream_options` has the wrong type."""
    options: StreamOptions | None = decode_or_none(_stream_options, body.raw("stream_options"))
    if options is None:
        return None if body.has("stream_options") else False
    return bool(options.include_usage)


def choices_per_prompt(body: JsonObject) -> int | None:
    """Returns the value of `n`, 1 without one; None if vLLM refuses it. vLLM 0.32 ignores `best_of`."""
    n = body.value("n")
    if n is None:
        return 1
    return n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else None


def unscorable_parameters(
    body: JsonObject, *, choices: int | None, usage: bool | None, prompt: Unscored | None
) -> Unscored | None:
    """Returns why the request's parameters make it unscorable; None if they do not. Reasons that not even the engine's
    plugin helps against come before the reasons in FROM_TAP.

    choices: the number of choices of all prompts together; None: invalid. usage: `usage_requested`. prompt: why the
    prompt cannot be scored.
    """
    value = body.value
    if value("stream") not in (None, True, False) or choices is None or usage is None:
        return Unscored.INVALID
    if value("use_beam_search"):
        return Unscored.BEAM_SEARCH
    if prompt is not None:
        return prompt
    if any(body.has(key) for key in _GUIDED_KEYS):
        return Unscored.GRAMMAR
    if choices > MAX_CHOICES or (choices > 1 and value("stream") and body.has("tools") and not usage):
        return Unscored.N
    return Unscored.ECHO if value("echo") else None


def injected_members(request: Request, logprobs: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the members that are injected into a request. logprobs: what asks for them in this form; empty for ids
    only.
    """
    changes = {"return_token_ids": b"true"}
    if logprobs:
        changes |= {"return_tokens_as_token_ids": b"true", **logprobs}
    if request.stream and not request.usage_requested and request.choices == 1:
        # Not merged with the client's: its other options have no effect without `include_usage`, but would with it.
        # Of several choices, each finishing event would lose its fingerprint until the last one has finished.
        changes["stream_options"] = b'{"include_usage":true}'
    return changes
