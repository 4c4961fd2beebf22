"""The hook behind the relay: which requests are sampled or calibrated, what they ask for, what they bring back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from hemostat.ipc.messages import Capture, Policy
from hemostat.openai import requests as openai
from hemostat.openai import routes
from hemostat.openai.routes import Support
from hemostat.relay.hooks import ExchangeHook, Headers, Refusal, Rewrite
from hemostat.shadow import assignment as sampling
from hemostat_calibration.profiles.profile import VERSION_PATTERN
from hemostat_calibration.records import Arm, Sampling

SHADOW_REQUESTS = "hemostat_shadow_requests_total"
"""Labels outcome, reason. Every sampled request counts once: `shadowed` (captured and handed on), `skipped` (it cannot
be scored, by reason), `dropped` (it could have been, but there was no room)."""

CALIBRATION_REQUESTS = "hemostat_calibration_requests_total"
"""Labels arm, reason. Every request for which a profile was in question, once it is over: why it stands in its arm."""

_PREFIX = b"x-hemostat-"
_SHADOW = b"x-hemostat-shadow"
_CALIBRATION = b"x-hemostat-calibration"
_LABEL = b"x-hemostat-label"
MAX_TRACEPARENT = 64
MAX_REQUEST_ID = 200
"""Characters of a client's X-Request-Id that go beyond the relay, into records and logs."""
_READABLE = frozenset({b"accept-encoding"})
"""Dropped where the response has to be read."""
_REFUSALS = (400, 422)
"""What vLLM answers to a request that does not pass its validation: nothing was computed."""
_HELD_BYTES = 64 * 1024
"""Of a response that may be a refusal."""


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What the client's own X-Hemostat headers ask for."""

    shadow: bool | None = None
    calibration: str | None = None
    """A version, `off`, or None for no wish."""
    label: str = ""


class Interceptor:
    """A `relay.hooks.Hook`. Assign `policy` at any time: requests that have begun keep the one they began with.

    That X-Hemostat headers do not go upstream is the relay's doing, also where this looks away. A profile that a client
    itself asks for in `vllm_xargs.hemostat` is the client's business: it is left as it is, also with
    `calibration.mode: off`, and the request stands in no arm.

    A request that was changed here and refused by the engine's validation is sent once more as the client wrote it
    (`replay`). If that is not refused, the refusal was our doing: it counts as `logprobs_refused`.

    emit: hands a capture on; False when there is no room for it.
    count: adds one to a metric, by its name and label values.
    clock: monotonic seconds. nonce: names a request among the engine's taps, unguessably.
    """

    def __init__(
        self,
        policy: Policy,
        emit: Callable[[Capture], bool],
        count: Callable[[str, tuple[str, ...]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        nonce: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self.policy = policy
        self.emit = emit
        self.count = count
        self.clock = clock
        self.nonce = nonce
        self.refused_generation: int | None = None
        """The policy under which the engine refused to give logprobs: nothing more is sampled until the next one."""

    def tap(self, policy: Policy) -> str:
        """The name of one request among the engine's taps."""
        return f"{policy.replica}-{self.nonce()}" if policy.replica else self.nonce()

    def begin(self, method: str, target: bytes, headers: Headers, request_id: str) -> ExchangeHook | Refusal | None:
        policy = self.policy
        own = [(name.lower(), value) for name, value in headers if name[:11].lower() == _PREFIX]
        path = target.partition(b"?")[0]
        support = routes.SUPPORT.get(path, Support.RELAYED) if method == "POST" else Support.RELAYED
        wishes = _Wishes()
        if own:
            read = _read_wishes(own, policy)
            if isinstance(read, Refusal):
                return read
            wishes = read
        elif support is Support.SCORED and not policy.scoring and not _calibrates(policy):
            return None
        shadow = policy.scoring and sampling.sampled(request_id, policy.shadow_rate, policy.shadow_seed)
        if support is not Support.SCORED:
            if shadow and support is Support.NOT_SCORED:
                self.skip("route")
            return None
        if wishes.shadow is False and shadow:
            self.skip("opted_out")
            shadow = False
        elif wishes.shadow and not shadow:
            if not policy.shadow_allow_on:
                self.skip("on_not_allowed")
            shadow = policy.scoring and policy.shadow_allow_on
        if shadow and self.refused_generation == policy.generation:
            self.skip("logprobs_refused")
            shadow = False
        calibrated = _calibrates(policy) or wishes.calibration is not None
        if not shadow and not calibrated:
            return None
        if any(name.lower() == b"content-encoding" for name, _ in headers):
            if shadow:
                self.skip("encoded")
            return None
        traced = next((value for name, value in headers if name.lower() == b"traceparent"), b"")
        route = path.decode("ascii")
        return _Intercepted(self, policy, route, request_id, wishes, shadow, calibrated, traced.decode("latin-1"))

    def skip(self, reason: str) -> None:
        self.count(SHADOW_REQUESTS, ("skipped", reason))


def _calibrates(policy: Policy) -> bool:
    """Whether a request without headers of ours can get a profile: `off` is the one switch that ends it all."""
    if policy.mode == "off":
        return False
    return policy.forced is not None or (policy.mode == "auto" and (policy.serving is not None or bool(policy.scoped)))


def _read_wishes(own: list[tuple[bytes, bytes]], policy: Policy) -> _Wishes | Refusal:
    shadow: bool | None = None
    calibration: str | None = None
    label = ""
    for name, raw in own:
        value = raw.decode("latin-1").strip()
        if name == _SHADOW:
            if value not in ("on", "off"):
                return _refuse("X-Hemostat-Shadow", "must be `on` or `off`.")
            shadow = value == "on"
        elif name == _CALIBRATION:
            if value != "off" and not VERSION_PATTERN.fullmatch(value):
                return _refuse("X-Hemostat-Calibration", "must be `off` or a profile version (32 hexadecimal digits).")
            calibration = value
        elif name == _LABEL and policy.labels:
            if value not in policy.labels:
                return _refuse("X-Hemostat-Label", f"must be one of: {', '.join(sorted(policy.labels))}.")
            label = value
    return _Wishes(shadow, calibration, label)


def _refuse(header: str, problem: str) -> Refusal:
    return Refusal(400, openai.error(f"The header {header} {problem}", header))


class _Intercepted:
    """A chat or completions request that is sampled, calibrated, or both."""

    def __init__(
        self,
        owner: Interceptor,
        policy: Policy,
        route: str,
        request_id: str,
        wishes: _Wishes,
        shadow: bool,
        calibrated: bool,
        traceparent: str,
    ) -> None:
        self.body_limit = policy.body_limit
        self._owner = owner
        self._policy = policy
        self._chat = route == routes.CHAT
        self._route = route
        self._request_id = request_id
        self._wishes = wishes
        self._shadow = shadow
        """Sampled, and not yet counted as skipped."""
        self._calibrated = calibrated
        self._traceparent = traceparent[:MAX_TRACEPARENT]
        self._standing: tuple[Arm, str] | None = None
        """To be counted: the arm and why."""
        self._applied = False
        """The engine is asked for a profile by us."""
        self._arm = Arm.NONE
        self._version: str | None = None
        self._nonce = ""
        self._sampling = Sampling()
        self._request: openai.Request | None = None
        self._tokens: openai.Tokens | None = None
        self._stripper: openai.Stripper | None = None
        self._rewritten = False
        self._beginning: bytearray | None = None
        """The response's beginning, while it is or may be a refusal."""
        self._refused: bool | None = None
        """It is one; None while that cannot be told."""
        self._replayed = False
        self._ended = False

    @property
    def arm(self) -> str:
        return self._arm.value

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        policy = self._policy
        if body is None:
            self._pass("body_too_large")
            return None
        try:
            request = openai.read(self._chat, body, policy.unscorable_models)
        except openai.MALFORMED:
            self._pass("bad_json")
            return None
        changes: dict[str, bytes] = {}
        xargs: dict[str, str] = {}
        self._version = request.own_profile
        if self._calibrated:
            self._calibrate(request, changes, xargs)
        if self._shadow:
            too_long = request.prompt_tokens > policy.shadow_max_tokens
            if reason := request.unscorable or ("too_long" if too_long else None):
                self._skip(reason)
            else:
                self._request = request
                self._tokens = openai.Tokens(policy.shadow_top_k, policy.shadow_max_tokens)
                changes |= openai.ask_for_tokens(request, policy.shadow_top_k)
                if policy.tap and not request.own_tap:
                    self._nonce = xargs["hemostat_tap"] = self._owner.tap(policy)
        if xargs:
            changes["vllm_xargs"] = openai.with_xargs(request, xargs)
        self._sampling = openai.sampling_parameters(request, changes, policy.openai_sampling_defaults)
        if not changes:
            return None
        self._rewritten = True
        return Rewrite(request.body.edit(changes), _READABLE if self._tokens is not None else frozenset())

    def _calibrate(self, request: openai.Request, changes: dict[str, bytes], xargs: dict[str, str]) -> None:
        """Choose the arm and the profile, and ask the engine for it."""
        policy = self._policy
        version, arm, reason = self._choose(request)
        self._standing = arm, reason
        self._arm = arm
        if version is None:
            return
        self._version = version
        self._applied = True
        if policy.apply == "engine":
            xargs["hemostat"] = version
            return
        if policy.request_temperature is not None:
            changes["temperature"] = openai.encode(policy.request_temperature)
        if policy.request_logit_bias:
            changes["logit_bias"] = openai.encode(policy.request_logit_bias)

    def _choose(self, request: openai.Request) -> tuple[str | None, Arm, str]:
        """Version, arm and reason. What is left out is left out of both arms alike: by what the client sent."""
        policy, wish = self._policy, self._wishes.calibration
        if policy.mode == "off":
            return None, Arm.NONE, "off"
        if request.uncalibrated is not None:
            return None, Arm.NONE, request.uncalibrated
        if policy.apply == "request" and (request.body.has("temperature") or request.body.has("logit_bias")):
            return None, Arm.NONE, "own_parameters"
        if policy.forced is not None:
            return self._held(policy.forced, Arm.NONE, "forced")
        if wish == "off":
            return None, Arm.NONE, "opted_out"
        if wish is not None:
            return self._held(wish, Arm.NONE, "pinned")
        version = self._serving(request)
        if version is None:
            return None, Arm.NONE, "no_profile"
        serving = self._held(version, Arm.TREATED, "assigned")
        key = request.conversation or self._request_id.encode("utf-8", "surrogateescape")
        if serving[0] is not None and sampling.controlled(key, policy.control_fraction, policy.shadow_seed):
            return None, Arm.CONTROL, "assigned"
        return serving

    def _serving(self, request: openai.Request) -> str | None:
        """The version of the request's scope while the engine holds it, else the one for all."""
        policy = self._policy
        scopes = {"label": self._wishes.label, "route": self._route, "model": request.model}
        own = policy.scoped.get(scopes.get(policy.scope, ""))
        return own if own in policy.acknowledged else policy.serving

    def _held(self, version: str, arm: Arm, reason: str) -> tuple[str | None, Arm, str]:
        """Only what the engine says it holds is asked for: the rest would be identity without anybody knowing."""
        policy = self._policy
        held = policy.acknowledged if policy.apply == "engine" else {policy.serving, policy.forced}
        return (version, arm, reason) if version in held else (None, Arm.NONE, "unknown")

    def _pass(self, reason: str) -> None:
        """The body cannot be read and goes on as it came."""
        self._skip(reason)
        if self._calibrated:
            self._standing = Arm.NONE, reason

    def _skip(self, reason: str) -> None:
        if self._shadow:
            self._shadow = False
            self._owner.skip(reason)

    def response_head(self, status: int, headers: Headers) -> bool:
        if not self._rewritten:
            return False
        fields = {name.lower(): value for name, value in headers}
        content_type = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
        plain = fields.get(b"content-encoding", b"identity").lower() == b"identity"
        stream = plain and status == 200 and content_type == b"text/event-stream"
        if self._replayed:
            if stream:
                self._beginning = bytearray()
            else:
                self._blame(ours=status < 400)
            return stream
        if status in _REFUSALS:
            self._beginning = bytearray()
            self._refused = True
            return True
        if stream:
            self._beginning = bytearray()
        if self._request is not None and self._tokens is not None:
            if status != 200:
                self._tokens.fail("upstream_error")
            elif not plain:
                self._tokens.fail("encoded")
            elif not stream and content_type != b"application/json":
                self._tokens.fail("unreadable")
            else:
                self._stripper = openai.Stripper(self._request, self._tokens, stream=stream)
        return stream or self._stripper is not None

    def response_data(self, data: bytes) -> bytes:
        if self._beginning is None:
            return data if self._stripper is None else self._stripper.feed(data)
        self._beginning += data
        if self._refused is None:
            code = openai.stream_error(bytes(self._beginning))
            if code is not None:
                self._refused = code in _REFUSALS
                if self._replayed:
                    self._blame(ours=code == 0)
        if self._replayed:
            # Looked at, not held back.
            if self._refused is not None or len(self._beginning) > _HELD_BYTES:
                self._beginning = None
            return data
        if self._refused is not False and len(self._beginning) <= _HELD_BYTES:
            return b""
        return self._release()

    def _release(self) -> bytes:
        """What the client gets of what was held back."""
        held, self._beginning = bytes(self._beginning or b""), None
        return held if self._stripper is None else self._stripper.feed(held)

    def replay(self) -> bool:
        if self._beginning is None or not self._refused:
            return False
        self._replayed = True
        self._beginning = self._refused = self._stripper = None
        if self._applied:
            self._standing = Arm.NONE, "refused"
        return True

    def _blame(self, *, ours: bool) -> None:
        """The engine refused what we made of the request. Ours: it does not refuse what the client sent."""
        if self._tokens is not None:
            self._tokens.fail("logprobs_refused" if ours else "upstream_error")
            self._stop_if_refused()

    def _stop_if_refused(self) -> None:
        if self._tokens is not None and self._tokens.failure == "logprobs_refused":
            # The engine's --max-logprobs, say, is lower than what was asked for.
            self._owner.refused_generation = self._policy.generation

    def response_end(self) -> bytes:
        self._ended = True
        if self._replayed:
            return b""
        owed = b"" if self._beginning is None else self._release()
        if self._stripper is not None:
            owed += self._stripper.finish()
        elif self._tokens is not None:
            self._tokens.fail(openai.error_reason(owed))
        self._stop_if_refused()
        return owed

    def closed(self, *, complete: bool) -> None:
        if self._standing is not None:
            arm, reason = self._standing
            self._owner.count(CALIBRATION_REQUESTS, (arm.value, reason))
        if not self._shadow:
            return
        request, tokens = self._request, self._tokens
        if request is None or tokens is None:
            self._skip("incomplete")
        elif tokens.failure is not None:
            self._skip(tokens.failure)
        elif self._replayed or not (complete and self._ended):
            self._skip("incomplete")
        else:
            self._shadow = False
            emitted = self._owner.emit(self._capture(request, tokens))
            self._owner.count(SHADOW_REQUESTS, ("shadowed", "") if emitted else ("dropped", "link_full"))

    def _capture(self, request: openai.Request, tokens: openai.Tokens) -> Capture:
        return Capture(
            request_id=self._request_id[:MAX_REQUEST_ID],
            route=self._route,
            model=tokens.model,
            label=self._wishes.label,
            arm=self._arm.value,
            requested=self._version,
            nonce=self._nonce,
            stream=request.stream,
            prompt_token_ids=openai.little_endian(tokens.prompt_ids),
            output_token_ids=openai.little_endian(tokens.output_ids),
            top_k=tokens.top_k,
            candidate_ids=openai.little_endian(tokens.candidate_ids),
            candidate_logprobs=openai.little_endian(tokens.candidate_logprobs),
            emitted_logprobs=openai.little_endian(tokens.emitted_logprobs),
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            sampling_top_k=self._sampling.top_k,
            min_p=self._sampling.min_p,
            finish_reason=tokens.finish_reason,
            captured_at=self._owner.clock(),
            traceparent=self._traceparent,
        )
