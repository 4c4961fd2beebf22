"""The hook of the relay: decides by a request's head whether the request is sampled or calibrated."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

from hemostat.hooks import ExchangeHook, Headers, Refusal
from hemostat.interception import assignment
from hemostat.interception.client_headers import (
    ClientOptions,
    first_value,
    hemostat_headers,
    read_options,
    skipped_by_headers,
)
from hemostat.interception.intercepted_exchange import InterceptedExchange
from hemostat.interception.model_list import ModelList
from hemostat.interception.profile_choice import calibrates
from hemostat.interception.reports import Reports, SampledCounter, uncounted
from hemostat.ipc.messages import Capture, Policy
from hemostat.metrics.reasons import Unscored
from hemostat.openai.routes import MODELS, SUPPORT, Support
from hemostat_calibration.records import Arm


class Interceptor:
    """A `hooks.Hook`. Assign `policy` at any time: a request keeps the policy that it began with.

    The relay removes X-Hemostat headers from every request, including those that this hook does not intercept. A
    profile that the client itself names in `vllm_xargs.hemostat` is left as it is, also with `calibration.mode: off`,
    and such a request is in no arm.

    A request that was rewritten here and is refused by the engine's validation, or ends in an error that the rewriting
    may have caused, is sent again as the client wrote it (`replay`). If that is accepted, the rewriting was the cause,
    which counts as `logprobs_refused`; after several in a row, sampling pauses (`refusals.SamplingPause`).

    draw: decides what is sampled, see `assignment.draw`. emit, count, sampled, clock, nonce: see `Reports`.
    """

    def __init__(
        self,
        policy: Policy,
        emit: Callable[[Capture], bool],
        count: Callable[[str, tuple[str, ...]], None],
        *,
        sampled: SampledCounter = uncounted,
        draw: Callable[[], float] = assignment.draw,
        clock: Callable[[], float] = time.monotonic,
        nonce: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self.policy = policy
        self._draw = draw
        self._reports = Reports(emit, count, sampled, clock, nonce)

    def begin(
        self, method: str, target: bytes, headers: Headers, request_id: str, *, marked: bool = True
    ) -> ExchangeHook | Refusal | None:
        policy = self.policy
        own_fields = hemostat_headers(headers) if marked else ()
        path = target.partition(b"?")[0]
        support = SUPPORT.get(path, Support.RELAYED) if method == "POST" else Support.RELAYED
        options = _NO_OPTIONS
        if own_fields:
            read = read_options(own_fields, policy)
            if isinstance(read, Refusal):
                return read
            options = read
        elif support is Support.SCORED and not policy.scoring and not calibrates(policy, options):
            return None
        if support is Support.RELAYED:
            return ModelList() if policy.adapter_names and method == "GET" and path == MODELS.encode() else None
        shadow = policy.scoring and self._draw() < policy.shadow_rate
        if support is Support.NOT_SCORED:
            if shadow:
                self._reports.skipped(Unscored.ROUTE)
            return None
        unjudged = skipped_by_headers(options, policy)
        if unjudged is not None and shadow:
            self._reports.skipped(unjudged)
        elif unjudged is Unscored.ON_NOT_ALLOWED:
            self._reports.not_sampled(unjudged)
        shadow = (shadow or bool(options.shadow and policy.scoring)) and unjudged is None
        if shadow and self._reports.pause.active(policy.shadow_top_k):
            self._reports.skipped(Unscored.LOGPROBS_REFUSED)
            shadow = False
        calibrated = calibrates(policy, options)
        if not shadow and not calibrated:
            return None
        fields = [(name.lower(), value) for name, value in headers]
        if any(name == b"content-encoding" for name, _ in fields):
            if shadow:
                self._reports.skipped(Unscored.ENCODED)
            if calibrated:
                self._reports.calibrated(_NO_ARM, unjudged or Unscored.ENCODED)
            return None
        client = first_value(fields, policy.client_header.encode("latin-1"))
        return InterceptedExchange(
            self._reports,
            policy,
            path.decode("ascii"),
            request_id,
            options,
            sampled=shadow,
            client=assignment.client_digest(client, policy.salt),
            traceparent=first_value(fields, b"traceparent").decode("latin-1"),
        )


_NO_OPTIONS: Final = ClientOptions()
_NO_ARM: Final = Arm.NONE.value
