"""A client's chat or completions request: what it asks for, whether it can be scored and calibrated, what is added.

Checked against vLLM 0.32 (`entrypoints/openai/{chat_completion,completion}`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from hemostat.openai.json_splice import MALFORMED, NULL, JsonObject, encode
from hemostat.openai.model_name import is_version
from hemostat_calibration.records import Sampling

_elements: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])
_ids: msgspec.json.Decoder[list[int]] = msgspec.json.Decoder(list[int])


class Unscorable(StrEnum):
    """Why the tokens of a request cannot be scored: values of the label `reason` of skipped shadow requests."""

    LORA = "lora"
    """The model is an adapter that the reference does not serve under the same name."""
    NO_REFERENCE = "no_reference"
    """No reference was matched with the model."""
    INVALID = "invalid"
    """A parameter has the wrong type; vLLM reports that to the client."""
    BEAM_SEARCH = "beam_search"
    N = "n"
    """Several choices, or several prompts, in one request."""
    STRUCTURED_OUTPUT = "structured_output"
    """vLLM takes logprobs after the mask of the grammar."""
    FORCED_TOOL = "forced_tool"
    """The same, for a forced tool call."""
    ECHO = "echo"
    """The response would contain the prompt."""
    PROMPT_LOGPROBS = "prompt_logprobs"
    """The client itself asks for logprobs of the prompt."""
    CLIENT_LOGPROBS = "client_logprobs"
    """The client itself asks for logprobs or token ids."""
    HIDDEN_REASONING = "hidden_reasoning"
    """vLLM leaves out the token ids of the reasoning."""
    MULTIMODAL = "multimodal"
    """The prompt has images, audio or embeddings."""


class Uncalibrated(StrEnum):
    """Why no profile may be applied to a request: values of the label `reason` of calibration requests."""

    LORA = Unscorable.LORA
    NO_REFERENCE = Unscorable.NO_REFERENCE
    BEAM_SEARCH = Unscorable.BEAM_SEARCH
    MULTIMODAL = Unscorable.MULTIMODAL
    INVALID = Unscorable.INVALID
    OWN_LOGITS = "own_logits"
    """The client changes logits itself (logit_bias, penalties). A profile was measured on unchanged logits, and engines
    differ in which change they apply first."""
    OWN_XARGS = "own_xargs"
    """The client itself names a profile in `vllm_xargs.hemostat`."""


_NEVER_CALIBRATED = frozenset(reason.value for reason in Uncalibrated)
_STRUCTURED_OUTPUT_KEYS = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
_TOKEN_DETAIL_KEYS = ("top_logprobs", "logprob_token_ids", "return_token_ids", "return_tokens_as_token_ids")
LOGIT_EDITING_KEYS = (
    *("logit_bias", "bad_words", "allowed_token_ids", "min_tokens"),
    *("presence_penalty", "frequency_penalty"),
)
"""With `repetition_penalty`, the parameters for which the engine plugin declines a profile (`xargs.edits_logits`):
neither arm may contain such a request."""
_HEMOSTAT_XARGS = {"hemostat", "hemostat_tap"}


class _Part(msgspec.Struct):
    type: str = ""


class Message(msgspec.Struct):
    """One message of a chat; content: JSON, a string or a list of parts."""

    role: str = ""
    content: msgspec.Raw = msgspec.Raw(NULL)


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


_messages: msgspec.json.Decoder[list[Message]] = msgspec.json.Decoder(list[Message])
_parts: msgspec.json.Decoder[list[_Part]] = msgspec.json.Decoder(list[_Part])
_stream_options: msgspec.json.Decoder[_StreamOptions | None] = msgspec.json.Decoder(_StreamOptions | None)


@dataclass(frozen=True, slots=True)
class Request:
    """The parts of a client's body that Hemostat decides by."""

    chat: bool
    """A chat request; False: a completions request."""
    body: JsonObject
    model: str
    """The served name; "" where that is not known."""
    stream: bool
    usage_requested: bool
    """The client itself asked for usage in the stream."""
    tools: bool
    unscorable: Unscorable | None
    """Why its tokens cannot be scored; None where they can."""
    uncalibrated: Uncalibrated | None
    """Why no profile may be applied to it; None where one may."""
    client_profile: str | None
    """The version of the profile that the client itself named in `vllm_xargs`."""
    client_tap: bool
    """The client itself set `vllm_xargs.hemostat_tap`."""
    conversation_key: bytes | None
    """Equal for every turn of one conversation; of the prompt where no conversation can be recognized; None without a
    prompt."""
    messages: list[Message] | None
    """Of a chat."""
    min_prompt_tokens: int
    """A lower bound on the number of prompt tokens; 0 where only the engine knows it."""


def read_request(
    data: bytes,
    *,
    chat: bool,
    unscorable_models: frozenset[str] = frozenset(),
    scorable_models: frozenset[str] | None = None,
    default_model: str = "",
    adapter_names: bool = False,
) -> Request:
    """Parse a client's body; raises one of MALFORMED where it is not an object with distinct keys.

    unscorable_models: adapters for which the reference has no counterpart.
    scorable_models: names that are compared with a matched reference; None: not known, no name is excluded.
    default_model: the name of the model that answers a request without one.
    adapter_names: a name that is a profile's version is an adapter of Hemostat's.
    """
    body = JsonObject(data)
    model = body.value("model")
    name = model if isinstance(model, str) and model else default_model
    stream_options = _decode_or_none(_stream_options, body.raw("stream_options"))
    messages: list[Message] | None = _decode_or_none(_messages, body.raw("messages")) if chat else None
    if model is not None and not isinstance(model, str):
        unscorable: Unscorable | None = Unscorable.INVALID
    elif adapter_names and is_version(name) and name not in (scorable_models or ()):
        unscorable = Unscorable.LORA
    else:
        unscorable = _unscorable_model(name, unscorable_models, scorable_models) or _unscorable(chat, body, messages)
    xargs = body.value("vllm_xargs") or {}
    if (body.has("stream_options") and stream_options is None) or not isinstance(xargs, dict):
        unscorable, xargs = Unscorable.INVALID, {}
    client_profile = xargs.get("hemostat")
    prompt = None if chat else _decode_or_none(_ids, body.raw("prompt"))
    return Request(
        chat=chat,
        body=body,
        model=name,
        stream=body.value("stream") is True,
        usage_requested=bool(stream_options and stream_options.include_usage),
        tools=body.has("tools"),
        unscorable=unscorable,
        uncalibrated=Uncalibrated.OWN_XARGS if client_profile is not None else _uncalibrated(body, unscorable),
        client_profile=client_profile if isinstance(client_profile, str) else None,
        client_tap="hemostat_tap" in xargs,
        conversation_key=_conversation_key(body, messages),
        messages=messages,
        min_prompt_tokens=len(prompt or ()),
    )


def _decode_or_none(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """None where the value has the wrong type: the request goes on, and vLLM explains the error to the client."""
    try:
        return decoder.decode(raw)
    except MALFORMED:
        return None


def _conversation_key(body: JsonObject, messages: list[Message] | None) -> bytes | None:
    """The model and the messages up to the first one of the user, or else the whole prompt."""
    model = body.raw("model")
    for position, message in enumerate(messages or ()):
        if message.role == "user":
            first = _elements.decode(body.raw("messages"))[: position + 1]
            return b"\x00".join([model, *map(bytes, first)])
    prompt = body.raw("prompt" if messages is None else "messages")
    return None if prompt == NULL else b"\x00".join([model, prompt])


def _unscorable_model(model: str, adapters: frozenset[str], scorable: frozenset[str] | None) -> Unscorable | None:
    if not model:
        return None
    if model in adapters:
        return Unscorable.LORA
    return None if scorable is None or model in scorable else Unscorable.NO_REFERENCE


def _unscorable(chat: bool, body: JsonObject, messages: list[Message] | None) -> Unscorable | None:
    value = body.value
    if value("stream") not in (None, True, False):
        return Unscorable.INVALID
    if value("use_beam_search"):
        return Unscorable.BEAM_SEARCH
    if value("n") not in (None, 1) or value("best_of") not in (None, 1):
        return Unscorable.N
    response_format = value("response_format")
    if response_format is not None and not (
        isinstance(response_format, dict) and response_format.get("type") == "text"
    ):
        return Unscorable.STRUCTURED_OUTPUT
    if any(body.has(key) for key in _STRUCTURED_OUTPUT_KEYS):
        return Unscorable.STRUCTURED_OUTPUT
    if value("tool_choice") not in (None, "none", "auto"):
        return Unscorable.FORCED_TOOL
    if value("echo"):
        return Unscorable.ECHO
    if body.has("prompt_logprobs"):
        return Unscorable.PROMPT_LOGPROBS
    logprobs = value("logprobs")
    if (logprobs is not None and logprobs is not False) or any(value(key) for key in _TOKEN_DETAIL_KEYS):
        return Unscorable.CLIENT_LOGPROBS
    if value("include_reasoning") is False:
        return Unscorable.HIDDEN_REASONING
    return _unscorable_messages(messages) if chat else _unscorable_prompt(body)


def _unscorable_messages(messages: list[Message] | None) -> Unscorable | None:
    if not messages:
        return Unscorable.INVALID
    for message in messages:
        content = bytes(message.content)
        if content.startswith(b"["):
            parts = _decode_or_none(_parts, content) or [_Part()]
            if any(part.type != "text" for part in parts):
                return Unscorable.MULTIMODAL
    return None


def _unscorable_prompt(body: JsonObject) -> Unscorable | None:
    if body.has("prompt_embeds"):
        return Unscorable.MULTIMODAL
    prompt = body.raw("prompt")
    if prompt == NULL:
        return Unscorable.INVALID
    if prompt.startswith(b"[") and _decode_or_none(_ids, prompt) is None:
        # A list of anything but token ids is several prompts, which give several choices.
        return Unscorable.N
    return None


def _uncalibrated(body: JsonObject, unscorable: Unscorable | None) -> Uncalibrated | None:
    if unscorable is not None and unscorable.value in _NEVER_CALIBRATED:
        return Uncalibrated(unscorable)
    return Uncalibrated.OWN_LOGITS if _edits_logits(body) else None


def _edits_logits(body: JsonObject) -> bool:
    return any(body.value(key) for key in LOGIT_EDITING_KEYS) or body.value("repetition_penalty") not in (None, 1)


def merged_xargs(request: Request, xargs: Mapping[str, str]) -> bytes:
    """The JSON of `vllm_xargs`: these, added to the client's own, of which none is replaced."""
    own = request.body.raw("vllm_xargs")
    if own == NULL:
        return encode(dict(xargs))
    members = JsonObject(own)
    return members.edit({key: encode(value) for key, value in xargs.items() if not members.has(key)})


def token_detail_members(request: Request, top_k: int) -> dict[str, bytes]:
    """The members (JSON) that make vLLM return token ids, the `top_k` most likely ids with logprobs, and the usage."""
    changes = {"return_token_ids": b"true", "return_tokens_as_token_ids": b"true"}
    if request.chat:
        changes |= {"logprobs": b"true", "top_logprobs": encode(top_k)}
    else:
        changes["logprobs"] = encode(top_k)
    if request.stream and not request.usage_requested:
        # Not merged with the client's: its other options have no effect without `include_usage`, but would with it.
        changes["stream_options"] = b'{"include_usage":true}'
    return changes


def sampling_parameters(request: Request, changes: Mapping[str, bytes], openai_defaults: bool) -> Sampling:
    """The request's decoding parameters, with these changed members (JSON).

    The temperature is NaN where the distribution that the tokens are drawn from is not known: where other parameters of
    the client change it, and where the client leaves out a parameter, for which vLLM takes the model's
    generation_config before OpenAI's default (no response says which). `openai_defaults`: vLLM takes OpenAI's default.
    A temperature of 0 is greedy, whichever parameters are left out.
    """
    body = request.body
    changed = changes.get("temperature")
    given = body.value("temperature") if changed is None else float(changed)
    temperature = _number(given, 1.0)
    xargs = body.value("vllm_xargs")
    altered = (
        _edits_logits(body)
        or any(body.has(key) for key in ("logits_processors", "thinking_token_budget"))
        or body.value("watermarking")
        or (isinstance(xargs, dict) and not xargs.keys() <= _HEMOSTAT_XARGS)
    )
    complete = given is not None and all(body.has(key) for key in ("top_p", "top_k", "min_p", "repetition_penalty"))
    if altered or not (temperature == 0.0 or openai_defaults or complete):
        temperature = math.nan
    return Sampling(
        temperature=temperature,
        top_p=_number(body.value("top_p"), 1.0),
        top_k=max(0, int(_number(body.value("top_k"), 0.0))),
        min_p=_number(body.value("min_p"), 0.0),
    )


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else default
