"""A client's request, whatever its form: what it asks for, whether it can be scored and calibrated, its sampling.

Checked against vLLM 0.32 (`entrypoints/openai`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.json_splice import NULL, JsonObject, encode
from hemostat.openai.routes import Form
from hemostat_calibration.engine_keys import KEYS, acts, signed, without_acting
from hemostat_calibration.records import Sampling


class Uncalibrated(StrEnum):
    """The reason why no profile may be applied to a request that can be scored: values of the label `reason` of
    calibration requests.
    """

    OWN_LOGITS = "own_logits"
    """The client changes logits itself (logit_bias, penalties). A profile was measured on unchanged logits, and engines
    differ in which change they apply first."""
    OWN_XARGS = "own_xargs"
    """The client itself names a profile in `vllm_xargs.hemostat`."""


_NEVER_CALIBRATED = frozenset(
    {
        Unscored.LORA,
        Unscored.NO_REFERENCE,
        Unscored.BEAM_SEARCH,
        Unscored.MULTIMODAL,
        Unscored.INVALID,
    }
)
FROM_TAP = frozenset(
    {
        Unscored.N,
        Unscored.ECHO,
        Unscored.CLIENT_LOGPROBS,
        Unscored.HIDDEN_REASONING,
        Unscored.NO_TOKEN_IDS,
    }
)
"""The requests whose response has to stay as it is, and that can be scored from what the engine's plugin reports."""
MAX_CHOICES = 16
"""The largest number of choices of one request that are recorded."""
LOGIT_EDITING_KEYS = (
    *("logit_bias", "bad_words", "allowed_token_ids", "min_tokens"),
    *("presence_penalty", "frequency_penalty"),
)
"""The parameters, in addition to `repetition_penalty`, for which the engine plugin declines a profile
(`xargs.edits_logits`): neither arm may contain such a request."""
_LOGIT_KEYS = frozenset({*LOGIT_EDITING_KEYS, "repetition_penalty"})
_SAMPLING_KEYS = frozenset({"repetition_penalty", "temperature", "top_p", "top_k", "min_p", "thinking"})
"""The keys that `sampling_parameters` decodes."""
_GIVEN_KEYS = frozenset({*LOGIT_EDITING_KEYS, "watermarking"})
"""The keys for which it only asks if they are given."""
DECODING_KEYS = frozenset(
    _LOGIT_KEYS
    | {"temperature", "top_p", "top_k", "min_p", "ignore_eos", "stop", "stop_token_ids", "stop_sequences"}
    | {"max_tokens", "max_completion_tokens", "max_output_tokens"}
)
"""The parameters that decide which tokens follow, and how many, in any form."""
MAX_DECODING_BYTES = 4096
"""The largest size of their values: a long `logit_bias` is not worth its copy."""
_raw_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Message(msgspec.Struct):
    """One message of a chat; content: JSON, a string or a list of parts."""

    role: str = ""
    content: msgspec.Raw = msgspec.Raw(NULL)


@dataclass(frozen=True, slots=True)
class RequestedLogprobs:
    """The details of tokens that the client itself asks for. It gets exactly these."""

    token_ids: bool = False
    logprobs: bool = False
    top: int = 0
    """The number of alternatives at each position: 0, or 1, which is the emitted token."""
    as_ids: bool = False
    """It is True if tokens are named by their ids (`token_id:5`), not by their texts."""
    restorable: bool = True
    """If it is False, a response with other logprobs cannot be turned back into that."""


NO_LOGPROBS = RequestedLogprobs()
"""The client asks for no logprobs and no ids."""


@dataclass(frozen=True, slots=True)
class Request:
    """The parts of a client's body that Hemostat decides by."""

    form: Form
    body: JsonObject
    model: str
    """The served name; "" if that is not known."""
    stream: bool
    usage_requested: bool
    """It is True if the client itself asked for usage in the stream."""
    tools: bool
    unscorable: Unscored | None
    """The reason why its tokens cannot be scored; None if they can."""
    uncalibrated: Uncalibrated | Unscored | None
    """The reason why no profile may be applied to it; None if one may."""
    client_profile: str | None
    """The version of the profile that the client itself named in `vllm_xargs`."""
    client_acts: bool
    """It is True if the client itself set a key of `vllm_xargs` that only Hemostat may use: it is removed."""
    conversation_key: bytes | None
    """A key that is equal for every turn of one conversation; it is the prompt's if no conversation can be recognized;
    None without a prompt."""
    messages: list[Message] | None
    """The messages of a chat."""
    min_prompt_tokens: int
    """A lower bound on the number of tokens of the longest prompt; 0 where only the engine knows it."""
    choices: int = 1
    """The number of choices of all prompts together."""
    prompts: int = 1
    requested: RequestedLogprobs = NO_LOGPROBS
    grammar: bool = False
    """It is True if a grammar restricts the tokens."""
    ids_only: bool = False
    """It is True if the request cannot be scored from its response alone, but the response can name the ids of its
    tokens: the engine then computes their log-probabilities again.
    """

    @property
    def from_tap(self) -> bool:
        """It is True if the request cannot be scored from its response, but can be from what the engine's plugin
        reports of it.
        """
        return self.unscorable in FROM_TAP and self.choices <= MAX_CHOICES


def uncalibrated(body: JsonObject, unscorable: Unscored | None) -> Uncalibrated | Unscored | None:
    if unscorable in _NEVER_CALIBRATED:
        return unscorable
    return Uncalibrated.OWN_LOGITS if _edits_logits(body) else None


def _edits_logits(body: JsonObject) -> bool:
    if _LOGIT_KEYS.isdisjoint(body.names):
        return False
    return any(body.given(key) for key in LOGIT_EDITING_KEYS) or body.value("repetition_penalty") not in (None, 1)


def merged_xargs(request: Request, xargs: Mapping[str, str], secret: str = "") -> bytes:
    """Returns the JSON of `vllm_xargs`: the client's own members and these, which win.

    secret: what the plugin's acting keys among these are signed with; "": they are not. The client's own keys are left
    out, as the plugin acts on signed ones alone, and these would be signed with Hemostat's.
    """
    own = _raw_members.decode(request.body.raw("vllm_xargs")) if request.body.has("vllm_xargs") else {}
    own = without_acting(own)
    if secret and acts(xargs):
        # The name of the tap is used once, and is signed: no other salt is needed.
        xargs = signed(xargs, secret, "")
    return encode(own | {key: msgspec.Raw(encode(value)) for key, value in xargs.items()})


def check_sampling(body: JsonObject) -> None:
    """Raises one of MALFORMED if a number that `sampling_parameters` reads is JSON, but none that a computer can
    hold."""
    for key in body.names & _SAMPLING_KEYS:
        body.value(key)
    for key in body.names & _GIVEN_KEYS:
        body.given(key)


def sampling_parameters(request: Request, changes: Mapping[str, bytes], openai_defaults: bool) -> Sampling:
    """Returns the request's decoding parameters, with these changed members (JSON).

    The temperature is NaN where the distribution that the tokens are drawn from is not known: where other parameters of
    the client change it, and where the client leaves out a parameter, for which vLLM takes the model's
    generation_config before OpenAI's default (no response says which). `openai_defaults`: vLLM takes OpenAI's default.
    A temperature of 0 is greedy, whichever parameters are left out.
    """
    body = request.body
    changed = changes.get("temperature")
    given = body.value("temperature") if changed is None else float(changed)
    temperature = _number(given, 1.0)
    xargs, thinking = body.value("vllm_xargs"), body.value("thinking")
    altered = (
        _edits_logits(body)
        or any(body.has(key) for key in ("logits_processors", "thinking_token_budget"))
        or body.given("watermarking")
        or (isinstance(thinking, dict) and thinking.get("type") == "enabled")  # of /v1/messages, with a budget
        or (isinstance(xargs, dict) and not xargs.keys() <= KEYS)
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


def decoding_members(request: Request) -> bytes:
    """Returns the client's own decoding parameters as a JSON object, so that another model can be asked the same; b""
    if they are longer than `MAX_DECODING_BYTES`."""
    body = request.body
    members = {key: msgspec.Raw(body.raw(key)) for key in sorted(body.names & DECODING_KEYS) if body.has(key)}
    encoded = encode(members)
    return encoded if len(encoded) <= MAX_DECODING_BYTES else b""


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else default
