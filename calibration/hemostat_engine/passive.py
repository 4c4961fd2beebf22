"""Passive mode: decides in vLLM's API server which requests are sampled, where no relay does.

The policy comes from the control process with the answer to each message. It is in force for POLICY_SECONDS after it
was last heard; without one nothing is sampled. If several control processes answer, all of them have to ask for it:
one with relays in front says that these sample. A request that carries Hemostat's own acting keys was sampled by a
relay, and is never sampled here.
"""

from __future__ import annotations

import math
import os
import secrets as random_ids
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hemostat_calibration.engine_keys import KEYS, SHADOW_KEY, TAP_KEY, acts, signed
from hemostat_calibration.passive import PassiveCounts, PassivePolicy, PassiveRequest, route_of
from hemostat_engine import client_headers
from hemostat_engine.retries import Allowance
from hemostat_engine.secrets import Secrets

POLICY_SECONDS = 30.0
"""The time for which a policy is in force after the last message of the control process, as in a relay."""
MAX_PER_SECOND, MAX_AT_ONCE = 50.0, 100.0
"""The limits of sampled requests of one process of the API server."""
MAX_CHOICES = 16
"""The largest number of choices of a sampled request, as in a relay."""
MAX_MODEL_CHARACTERS = 256
_DRAWN_AT_ONCE = 512


class Lost:
    """The reasons that are counted here: values of `hemostat.metrics.reasons.Unscored`."""

    OPTED_OUT = "opted_out"
    ON_NOT_ALLOWED = "on_not_allowed"
    N = "n"
    BEAM_SEARCH = "beam_search"
    GRAMMAR = "grammar"
    CLIENT_LOGPROBS = "client_logprobs"
    MULTIMODAL = "multimodal"
    TOO_LONG = "too_long"
    INCOMPLETE = "incomplete"
    LINK_FULL = "link_full"
    PLUGIN_BUSY = "plugin_busy"
    HOOK_ERROR = "hook_error"


@dataclass(frozen=True, slots=True)
class Sampled:
    """A request that is sampled. xargs: what its parameters have in addition, so that the logits processor taps it."""

    request: PassiveRequest
    nonce: str
    policy: PassivePolicy
    xargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Heard:
    policy: PassivePolicy | None
    nonce_prefix: str
    at: float


def _draws() -> Iterator[float]:
    while True:
        yield from ((bits >> 11) * 2.0**-53 for bits in array("Q", os.urandom(8 * _DRAWN_AT_ONCE)))


class PassiveSampler:
    """Owns the policies and the counts. The sender's thread calls `heard` and `counts`, the event loop the rest.

    has_room: returns False while the queue of answers is half full. draw: a number in [0, 1). clock: monotonic seconds.
    """

    def __init__(
        self,
        secrets: Secrets,
        has_room: Callable[[], bool] = lambda: True,
        draw: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._secrets = secrets
        self._has_room = has_room
        self._draw = draw or _draws().__next__
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._allowance = Allowance(MAX_PER_SECOND, MAX_AT_ONCE, clock())
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._unscored: Counter[str] = Counter()
        self._sampled = 0

    def heard(self, address: str, policy: PassivePolicy | None, nonce_prefix: str) -> None:
        """Notes what the control process at an address has just answered."""
        now = self._clock()
        live = {name: heard for name, heard in self._heard.items() if now - heard.at <= POLICY_SECONDS}
        self._heard = {**live, address: _Heard(policy, nonce_prefix, now)}

    def policy(self) -> tuple[PassivePolicy, str] | None:
        """Returns the policy in force and the beginning of its requests' nonces; None if there is none."""
        now = self._clock()
        live = [heard for heard in self._heard.values() if now - heard.at <= POLICY_SECONDS]
        if not live or live[0].policy is None or any(heard.policy is None for heard in live):
            return None
        return live[0].policy, live[0].nonce_prefix

    def lost(self, reason: str, number: int = 1) -> None:
        """Counts sampled requests that are not scored."""
        with self._lock:
            self._unscored[reason] += number

    def handed_on(self, choices: int) -> None:
        """Counts choices that the control process has accepted."""
        with self._lock:
            self._sampled += choices

    def counts(self) -> PassiveCounts:
        with self._lock:
            return PassiveCounts(
                dict(self._requests), self._sampled, dict(self._unscored), client_headers.ClientHeaders.in_force
            )

    def sample(self, prompt: Any, params: Any, request_id: str, model: str) -> Sampled | None:
        """Returns the request if it is sampled. params: SamplingParams. model: the served name, or the adapter's."""
        in_force = self.policy()
        if in_force is None or not (route := route_of(request_id)):
            return None
        policy, prefix = in_force
        with self._lock:
            self._requests[route] += 1
        drawn = self._draw() < policy.rate
        if not drawn and not policy.allow_on:
            return None
        extra = params.extra_args or {}
        if acts(extra) and self._secrets.signed(extra):
            return None
        options = client_headers.current(policy.client_header, policy.salt)
        if options.shadow is None and extra.get(SHADOW_KEY) is not None:
            options = client_headers.Options(
                "on" if extra[SHADOW_KEY] == "on" else "off", options.label, options.client
            )
        if not drawn and options.shadow != "on":
            return None
        reason = self._why_not(options.shadow, prompt, params, request_id, policy)
        if reason is not None:
            self.lost(reason)
            return None
        label = options.label if options.label in policy.labels else ""
        nonce = f"{prefix}-{random_ids.token_hex(16)}"
        xargs = {}
        if policy.tap and (believed := self._secrets.believed()):
            xargs = signed({TAP_KEY: nonce}, believed[0], "")
        request = _request(route, request_id, model, label, options.client, params)
        return Sampled(request, nonce, policy, xargs)

    def _why_not(
        self, shadow: str | None, prompt: Any, params: Any, request_id: str, policy: PassivePolicy
    ) -> str | None:
        """Returns the reason for which a drawn request is not sampled; None if it is."""
        if shadow == "off":
            return Lost.OPTED_OUT
        if shadow == "on" and not policy.allow_on:
            return Lost.ON_NOT_ALLOWED
        if "-beam-" in request_id:
            return Lost.BEAM_SEARCH
        if int(params.n or 1) > MAX_CHOICES:
            return Lost.N
        if params.structured_outputs is not None and not policy.grammars:
            return Lost.GRAMMAR
        ids = _prompt_ids(prompt)
        if ids is None:
            return Lost.MULTIMODAL
        if ids >= policy.max_tokens:
            return Lost.TOO_LONG
        return None if self._has_room() and self._allowance.take(self._clock()) else Lost.PLUGIN_BUSY


def _prompt_ids(prompt: Any) -> int | None:
    """Returns the number of ids of a rendered prompt; None if it has more than ids."""
    if not isinstance(prompt, dict) or prompt.get("type", "token") != "token":
        return None
    ids = prompt.get("prompt_token_ids")
    return None if ids is None else len(ids)


def _request(route: str, request_id: str, model: str, label: str, client: bytes, params: Any) -> PassiveRequest:
    changes_logits = (
        params.logit_bias
        or params.bad_words
        or params.allowed_token_ids
        or params.min_tokens
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or getattr(params, "thinking_token_budget", None) is not None
        or getattr(params, "watermarking", None)
        or not (params.extra_args or {}).keys() <= KEYS
    )
    return PassiveRequest(
        route=route,
        request_id=request_id[:64],
        model=model[:MAX_MODEL_CHARACTERS],
        label=label,
        client=client,
        stream=params.output_kind.name == "DELTA",
        grammar=params.structured_outputs is not None,
        temperature=math.nan if changes_logits else float(params.temperature),
        top_p=float(params.top_p),
        sampling_top_k=max(0, int(params.top_k or 0)),
        min_p=float(params.min_p),
        max_tokens=int(params.max_tokens or 0),
    )
