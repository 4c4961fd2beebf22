"""The request parameters in `vllm_xargs`. They are checked in vLLM's frontend, so nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hemostat_calibration import plugin_version
from hemostat_calibration.engine_keys import FORCE_KEY, KEYS, PRECISION_KEY, PROFILE_KEY, TAP_KEY, TAP_TOP_KEY, acts
from hemostat_calibration.profiles.profile import VERSION_PATTERN

NONCE_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGITS = re.compile(r"[0-9]{1,3}")
MAX_TOP = 128
"""The largest number of ids at each position of an answer that is handed out."""
MAX_FORCED = 4_096
"""The largest number of forced tokens."""


@dataclass(frozen=True, slots=True)
class RequestParameters:
    """The parameters of Hemostat in one request.

    version: the profile to apply; None: identity. nonce: the name under which values of the request's rows are sent to
    the admin port; None: it is not tapped. top: the number of most likely ids at each position of the answer that is
    sent there too (`answer_tap`); None: no answer is sent. edited: the request changes the logits itself
    (`edits_logits`).
    """

    version: str | None
    nonce: str | None
    top: int | None = None
    edited: bool = False
    forced: tuple[int, ...] = ()
    precision: bool = False


NO_PARAMETERS = RequestParameters(None, None)


def parse(extra_args: Mapping[str, Any] | None, *, signed: bool) -> RequestParameters:
    """Returns the parameters in a request's xargs. Raises ValueError, with a text for the client, on an invalid value.

    signed: the acting keys are the control process's (`Secrets.signed`); otherwise they are as if absent, so that
    nothing is said about them.
    """
    if not extra_args:
        return NO_PARAMETERS
    version = extra_args.get(PROFILE_KEY)
    if not signed:
        extra_args = {}
    nonce = extra_args.get(TAP_KEY)
    forced = _forced(extra_args.get(FORCE_KEY))
    precision = extra_args.get(PRECISION_KEY) is not None
    if version is None and nonce is None and not forced and not precision:
        return NO_PARAMETERS
    if version is not None and not (isinstance(version, str) and VERSION_PATTERN.fullmatch(version)):
        raise ValueError(
            f"vllm_xargs.{PROFILE_KEY} must be a profile version (32 lowercase hex digits), not {_shorten(version)} "
            f"({plugin_version.signature()})"
        )
    if nonce is not None and not is_nonce(nonce):
        raise ValueError(f"vllm_xargs.{TAP_KEY} must be 1 to 64 letters, digits, '_' or '-', not {_shorten(nonce)}")
    top = None if nonce is None else _top(extra_args.get(TAP_TOP_KEY))
    return RequestParameters(version, nonce, top, forced=forced, precision=precision)


def is_nonce(value: object) -> bool:
    return isinstance(value, str) and NONCE_PATTERN.fullmatch(value) is not None


def _forced(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) and 1 <= len(value) <= MAX_FORCED else [None]
    if any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in ids):
        raise ValueError(f"vllm_xargs.{FORCE_KEY} must be 1 to {MAX_FORCED} token ids, not {_shorten(value)}")
    return tuple(ids)


def _top(value: object) -> int | None:
    if value is None:
        return None
    number = int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MAX_TOP:
        raise ValueError(f"vllm_xargs.{TAP_TOP_KEY} must be an integer from 1 to {MAX_TOP}, not {_shorten(value)}")
    return number


def has_parameters(extra_args: Mapping[str, Any] | None) -> bool:
    """Returns True if a parameter of Hemostat is present, valid or not."""
    return extra_args is not None and not extra_args.keys().isdisjoint(KEYS)


def asks_to_act(params: Any) -> bool:
    """Returns True if a request has keys that the plugin acts on only where they are signed. params: SamplingParams."""
    return bool(params.extra_args) and acts(params.extra_args)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def edits_logits(params: Any, after_penalties: bool) -> bool:
    """Returns True if a parameter of the request changes the logits before the processor reads features from them.

    `params` is vLLM's SamplingParams. Both runners call a processor after logit_bias, bad words, allowed ids and the
    mask of min_tokens; V2 also after the penalties, V1 before them.
    """
    edits = params.logit_bias or params.bad_words or params.allowed_token_ids or params.min_tokens
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    return bool(edits or (after_penalties and penalties))
