"""The parameters of a request, whatever its form: whether a profile may be applied to it, its sampling, and what is
added to `vllm_xargs`.

Checked against vLLM 0.32 (`entrypoints/openai`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai.json_splice import JsonObject, encode
from hemostat.openai.requests import Request, Uncalibrated
from hemostat_calibration.engine_keys import KEYS, acts, signed, without_acting
from hemostat_calibration.records import Sampling

_NEVER_CALIBRATED: Final = frozenset(
    {
        Unscored.LORA,
        Unscored.NO_REFERENCE,
        Unscored.BEAM_SEARCH,
        Unscored.MULTIMODAL,
        Unscored.INVALID,
    }
)
LOGIT_EDITING_KEYS: Final = (
    *("logit_bias", "bad_words", "allowed_token_ids", "min_tokens"),
    *("presence_penalty", "frequency_penalty"),
)
"""The parameters, in addition to `repetition_penalty`, for which the engine plugin declines a profile
(`xargs.edits_logits`): neither arm may contain such a request."""
_LOGIT_KEYS: Final = frozenset({*LOGIT_EDITING_KEYS, "repetition_penalty"})
_SAMPLING_KEYS: Final = frozenset({"repetition_penalty", "temperature", "top_p", "top_k", "min_p", "thinking"})
"""The keys that `sampling_parameters` decodes."""
_GIVEN_KEYS: Final = frozenset({*LOGIT_EDITING_KEYS, "watermarking"})
"""The keys for which it only asks if they are given."""
DECODING_KEYS: Final = frozenset(
    _LOGIT_KEYS
    | {"temperature", "top_p", "top_k", "min_p", "ignore_eos", "stop", "stop_token_ids", "stop_sequences"}
    | {"max_tokens", "max_completion_tokens", "max_output_tokens"}
)
"""The parameters that decide which tokens follow, and how many, in any form."""
MAX_DECODING_BYTES: Final = 4096
"""The largest size of their values: a long `logit_bias` is not worth its copy."""
_MAX_NUMBER: Final = 10**9
"""Numbers of a request that are as large are read as if they were not given."""
_raw_members: Final[msgspec.json.Decoder[dict[str, msgspec.Raw]]] = msgspec.json.Decoder(dict[str, msgspec.Raw])


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
    if secret and acts(xargs):
        # The name of the tap is used once, and is signed: no other salt is needed.
        xargs = signed(xargs, secret, "")
    if not request.body.has("vllm_xargs"):
        return encode(xargs)
    own = without_acting(_raw_members.decode(request.body.raw("vllm_xargs")))
    return encode(own | {key: msgspec.Raw(encode(value)) for key, value in xargs.items()})


def check_sampling(body: JsonObject) -> None:
    """Raises one of MALFORMED if a number that `sampling_parameters` reads is JSON, but none that a computer can
    hold."""
    for key in body.names:
        if key in _SAMPLING_KEYS:
            body.value(key)
        elif key in _GIVEN_KEYS:
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
    if isinstance(value, int):  # of its own: compiled, `abs` of either would make a float of it, which may be too large
        return float(value) if -_MAX_NUMBER < value < _MAX_NUMBER else default
    return value if isinstance(value, float) and abs(value) < _MAX_NUMBER else default
