"""One request that the relay intercepts: how it is rewritten, and how its tokens are captured."""

from __future__ import annotations

from typing import Final

from hemostat.hooks import Comparison, Refusal, Rewrite
from hemostat.interception.assignment import conversation_digest, outcome_number
from hemostat.interception.client_headers import ClientOptions
from hemostat.interception.profile_choice import (
    ArmReason,
    Choice,
    Reason,
    choose_profile,
    is_available,
    served_kind,
)
from hemostat.interception.reports import Reports
from hemostat.ipc.messages import MAX_TOP, Capture, Policy
from hemostat.metrics.reasons import RepeatReason, Unscored
from hemostat.openai import requests
from hemostat.openai.complexity import TooComplex
from hemostat.openai.errors import leading_error_code
from hemostat.openai.forms.protocol import Stripper
from hemostat.openai.forms.table import FORMATS
from hemostat.openai.json_splice import MALFORMED, encode
from hemostat.openai.kinds import asks_json_in_words, kind_name
from hemostat.openai.logprobs.scrubbing import Scrubber
from hemostat.openai.model_name import ModelName
from hemostat.openai.reading import read_request
from hemostat.openai.recompressing import CODINGS, Recompressor
from hemostat.openai.requests import Request
from hemostat.openai.routes import CHAT, COMPLETIONS, FORMS
from hemostat.openai.tokens import ChoiceTokens, ResponseTokens, error_reason, little_endian, status_failure
from hemostat_calibration.records import Arm, Sampling

MAX_TRACEPARENT: Final = 64
"""Characters of a client's traceparent that are kept."""
MAX_UNDECIDED_BYTES: Final = 64 * 1024
"""Of a response, while it may still turn out to be a refusal."""
_REFUSALS: Final = frozenset({Unscored.LOGPROBS_REFUSED, Unscored.ENCODED})
"""Failures that asking for logprobs has caused, and would cause again."""
_DROPPED_HEADERS: Final = frozenset({b"accept-encoding"})
"""Not sent upstream where the response has to be read."""
_REFUSAL_CODES: Final = (400, 422)
"""vLLM's codes for a request that does not pass its validation: nothing was computed."""
_ADAPTER_REFUSAL_CODE: Final = 404
"""vLLM's for a request for an adapter that it does not know (any more)."""
_TOO_LARGE_CODE: Final = 413
"""Of a server that limits the size of bodies: what was added may have been too much."""
_SERVER_ERROR_CODE: Final = 500
"""vLLM's for a response that it cannot write as JSON: one with NaN as a log-probability, which only sampling asks for.
Every other code of a server error says that the upstream is overloaded or gone, whatever was asked for."""
_REPEATABLE_ROUTES: Final = frozenset({CHAT, COMPLETIONS})
"""Of whose answers the engine keeps nothing, so that generating one twice has no effect but its cost."""


class _ResponseStart:
    """The first bytes of a response, kept until they show whether the response is a refusal by vLLM's validation.

    codes: those of a refusal. error_code: the code of the error that the response is, 0 for none, None while that is
    not known.
    """

    __slots__ = ("_codes", "data", "error_code")

    def __init__(self, codes: tuple[int, ...], error_code: int | None = None) -> None:
        self._codes = codes
        self.data = bytearray()
        self.error_code = error_code

    def feed(self, data: bytes) -> None:
        self.data += data
        if self.error_code is None:
            self.error_code = leading_error_code(bytes(self.data))

    @property
    def is_refusal(self) -> bool:
        return self.error_code in self._codes

    @property
    def undecided(self) -> bool:
        return self.error_code is None

    @property
    def too_long(self) -> bool:
        return len(self.data) > MAX_UNDECIDED_BYTES


class InterceptedExchange:
    """A `hooks.ExchangeHook`: a request that is sampled (`shadow`), calibrated, or both."""

    def __init__(
        self,
        reports: Reports,
        policy: Policy,
        route: str,
        request_id: str,
        options: ClientOptions,
        *,
        unjudged: Unscored | None,
        shadow: bool,
        calibrated: bool,
        client: bytes,
        traceparent: str,
    ) -> None:
        """unjudged: why the request is not scored, by its headers. client: digest."""
        self.body_limit = policy.body_limit
        self._reports = reports
        self._policy = policy
        self._route = route
        self._request_id = request_id
        self._options = options
        self._shadow = shadow
        """Sampled, and not yet known to be skipped."""
        self._skipped: Unscored | None = None
        """Why a sampled request is skipped; counted at its end, when its tokens are known."""
        self._unjudged: Unscored | None = unjudged
        """Why the request is never scored, as far as that is known before it goes upstream."""
        self._calibrated = calibrated
        self._client = client
        self._traceparent = traceparent[:MAX_TRACEPARENT]
        self._engine = ""
        self._engine_drawn = False
        self._kind = ""
        self._conversation = b""
        self._arm = Arm.NONE
        self._compared: str | None = None
        """The version that the treated arm gets."""
        self._drawn = 0.0
        """See `Comparison`."""
        self._counted_as: tuple[Arm, Reason] | None = None
        """The arm and the reason that are counted at the end; None for a request that is not calibrated."""
        self._profile_added = False
        """Hemostat asks the engine for a profile, or has set the profile's parameters."""
        self._version: str | None = None
        """The version that is asked for, by Hemostat or by the client itself."""
        self._adapter: str | None = None
        """The version that Hemostat asks for as the request's model."""
        self._name: ModelName | None = None
        """Restores the base model's name in the response."""
        self._nonce = ""
        self._sampling = Sampling()
        self._from_tap = False
        """The response stays as it is: the tokens are what the engine's plugin reports."""
        self._request: Request | None = None
        self._tokens: ResponseTokens | None = None
        self._stripper: Stripper | None = None
        self._rewritten = False
        self._start: _ResponseStart | None = None
        """The response's first bytes, while they are read for a refusal."""
        self._withheld = False
        """The response cannot be read: nothing of it goes to the client, and the request is sent again."""
        self._replayed = False
        self._after_server_error = False
        """It was sent again because of a server error."""
        self._adapter_refused = False
        """The engine refused the rewritten request because of the adapter."""
        self._ended = False

    @property
    def arm(self) -> str:
        return self._arm.value

    @property
    def comparison(self) -> Comparison | None:
        if self._compared is None or self._arm is Arm.NONE or self._drawn >= self._policy.outcome_fraction:
            return None
        return Comparison(
            kind=served_kind(self._policy, self._kind),
            version=self._compared,
            treated=self._arm is Arm.TREATED,
            conversation=self._conversation,
            client=self._client,
            json_in_words=asks_json_in_words(self._kind),
            drawn=self._drawn,
        )

    @property
    def draws_engine(self) -> bool:
        """Of sampled requests: which engine is not like the others is judged by them."""
        return self._shadow

    def sent_to(self, engine: str, *, drawn: bool) -> None:
        self._engine, self._engine_drawn = engine, drawn
        compared = self._compared if self._arm is not Arm.NONE else None
        if compared is not None and not is_available(self._policy, engine, compared):
            # In either arm: a treated request gets identity there, and a control one has nothing to be compared with.
            self._leave_arm(ArmReason.UNKNOWN)

    def _leave_arm(self, reason: ArmReason) -> None:
        self._arm = Arm.NONE
        self._counted_as = Arm.NONE, reason

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        policy = self._policy
        if body is None:
            self._pass_unread(Unscored.BODY_TOO_LARGE)
            return None
        try:
            request = read_request(
                body,
                form=FORMS[self._route],
                unscorable_models=policy.unscorable_models,
                scorable_models=policy.scorable_models,
                default_model=policy.default_model,
                adapter_names=policy.adapter_names,
                grammars=policy.grammars,
            )
        except TooComplex:
            self._pass_unread(Unscored.TOO_COMPLEX)
            return None
        except MALFORMED:
            self._pass_unread(Unscored.BAD_JSON)
            return None
        several = policy.scorable_models is not None and len(policy.scorable_models) > 1
        self._kind = kind_name(request, self._options.label, several_models=several)
        self._conversation = conversation_digest(request.conversation_key, policy.salt)
        by_plugin = policy.tap and policy.tap_tokens and not request.client_tap
        in_response = request.unscorable is None
        self._from_tap = by_plugin and (request.from_tap or (in_response and self._prefers_plugin(request)))
        self._unjudged = self._unjudged or (None if self._from_tap else request.unscorable)
        if self._unjudged is None and request.min_prompt_tokens > policy.shadow_max_tokens:
            self._unjudged = Unscored.TOO_LONG
        changes: dict[str, bytes] = {}
        xargs: dict[str, str] = {}
        self._version = request.client_profile
        if self._calibrated:
            self._add_profile(request, changes, xargs)
        if self._shadow:
            self._add_token_details(request, changes, xargs)
        if xargs:
            changes["vllm_xargs"] = requests.merged_xargs(request, xargs)
        self._sampling = requests.sampling_parameters(request, changes, policy.openai_sampling_defaults)
        if not changes:
            return None
        self._rewritten = True
        is_read = self._tokens is not None or self._adapter is not None
        return Rewrite(request.body.edit(changes), _DROPPED_HEADERS if is_read else frozenset())

    def _prefers_plugin(self, request: Request) -> bool:
        """Whether the engine's plugin is asked for tokens that the response could tell."""
        policy = self._policy
        if policy.prefer_plugin:
            return policy.shadow_top_k <= MAX_TOP
        return request.tools and request.stream and self._reports.loses_tool_tokens(policy)

    def _add_profile(self, request: Request, changes: dict[str, bytes], xargs: dict[str, str]) -> None:
        """Choose the arm and the profile, and add what requests the profile."""
        policy = self._policy
        choice = self._choose_profile(request)
        if choice.compared is not None and self._unjudged is None and self._unreported(request, choice.compared):
            # Of the two arms, only the control one could be scored.
            self._unjudged = Unscored.N
            choice = self._choose_profile(request)
        self._counted_as = choice.arm, choice.reason
        self._arm, self._compared = choice.arm, choice.compared
        if choice.compared is not None:
            self._drawn = outcome_number(self._conversation, policy.salt)
        if choice.version is None:
            return
        self._version = choice.version
        self._profile_added = True
        has_map = policy.adapters.get(choice.version)
        if has_map is not None:
            self._adapter = choice.version
            changes["model"] = encode(choice.version)
            if not has_map:
                return
        if has_map or policy.apply == "engine":
            xargs[requests.PROFILE_XARG] = choice.version
            return
        if policy.request_temperature is not None:
            changes["temperature"] = encode(policy.request_temperature)
        if policy.request_logit_bias:
            changes["logit_bias"] = encode(policy.request_logit_bias)

    def _choose_profile(self, request: Request) -> Choice:
        return choose_profile(
            self._policy, request, self._options, self._unjudged, self._kind, self._conversation, self._engine
        )

    def _unreported(self, request: Request, version: str) -> bool:
        """Whether only the engine's plugin could tell that the version was applied, and will not: one that reports no
        ids cannot tell apart the choices of one request. Of an adapter without a map the answer tells."""
        policy = self._policy
        by_plugin = policy.apply == "engine" and policy.adapters.get(version, True)
        return by_plugin and policy.tap and not policy.tap_tokens and request.choices > 1

    def _add_token_details(self, request: Request, changes: dict[str, bytes], xargs: dict[str, str]) -> None:
        """Add what makes vLLM return the tokens' details, or skip a request that cannot be scored."""
        policy = self._policy
        if self._unjudged is not None:
            self._skip(self._unjudged)
            return
        self._request = request
        self._tokens = ResponseTokens(
            policy.shadow_top_k, policy.shadow_max_tokens, request.choices, request.prompts, request.form
        )
        if not self._from_tap:
            changes |= FORMATS[request.form].injected_members(request, policy.shadow_top_k)
        # For several choices see `_unreported`.
        if policy.tap and not request.client_tap and (request.choices == 1 or policy.tap_tokens):
            self._nonce = xargs[requests.TAP_XARG] = self._reports.tap_name(policy)
            if self._from_tap:
                xargs[requests.TAP_TOP_XARG] = str(min(policy.shadow_top_k, MAX_TOP))

    def _pass_unread(self, reason: Unscored) -> None:
        """The body cannot be read and is passed on unchanged."""
        self._skip(reason)
        if self._calibrated:
            self._counted_as = Arm.NONE, self._unjudged or reason

    def _skip(self, reason: Unscored) -> None:
        if self._shadow:
            self._shadow = False
            self._skipped = reason

    @property
    def withholds(self) -> bool:
        return self._withheld

    def response_head(self, status: int, content_type: bytes, content_coding: bytes) -> bool:
        if not self._rewritten:
            return False
        content_type = content_type.partition(b";")[0].strip().lower()
        coding = content_coding.strip().lower()
        plain = coding == b"identity"
        event_stream = status == 200 and content_type == b"text/event-stream"
        stream = plain and event_stream
        codes = self._refusal_codes()
        if self._replayed:
            if stream:
                self._start = _ResponseStart(codes)
            else:
                self._fail_after_replay(status)
            return stream
        if self._adapter is not None and plain:
            self._name = ModelName(self._adapter, self._policy.answered_name, stream=stream, error=status != 200)
        if status in codes:
            self._start = _ResponseStart(codes, status)
            return True
        if stream:
            self._start = _ResponseStart(codes)
        if self._request is not None and self._tokens is not None:
            if status != 200:
                self._tokens.fail(status_failure(status))
            else:
                self._read_response(self._request, self._tokens, content_type, coding, stream=event_stream)
        return stream or self._withheld or self._stripper is not None or self._name is not None

    def _refusal_codes(self) -> tuple[int, ...]:
        """After which the client's own request is sent."""
        codes = [*_REFUSAL_CODES, _TOO_LARGE_CODE]
        if self._adapter is not None:
            codes.append(_ADAPTER_REFUSAL_CODE)
        if self._route in _REPEATABLE_ROUTES and self._reports.server_errors.allowed:
            codes.append(_SERVER_ERROR_CODE)
        return tuple(codes)

    def _read_response(
        self, request: Request, tokens: ResponseTokens, content_type: bytes, coding: bytes, *, stream: bool
    ) -> None:
        """Choose what takes out of the answer what was injected, or withhold the answer."""
        form = FORMATS[request.form]
        plain, known = coding == b"identity", stream or content_type == b"application/json"
        if self._from_tap:
            if plain and known:
                self._stripper = form.observer(request, tokens, stream=stream)
            else:
                tokens.fail(Unscored.UNREADABLE if plain else Unscored.ENCODED)
            return
        if not plain and coding not in CODINGS:
            tokens.fail(Unscored.ENCODED)
            self._withheld = True
            return
        if known:
            self._stripper = form.stripper(request, tokens, stream=stream)
        else:
            tokens.fail(Unscored.UNREADABLE)
            self._stripper = Scrubber(stream=False)
        if not plain:
            self._stripper = Recompressor(self._stripper, tokens)

    def response_data(self, data: bytes) -> bytes:
        start = self._start
        if self._withheld:
            return b""
        if start is None:
            return self._for_client(data)
        start.feed(data)
        if self._replayed:
            # The second response is read, but not held back.
            if start.error_code is not None:
                self._fail_after_replay(start.error_code)
            if start.error_code is not None or start.too_long:
                self._start = None
            return data
        if (start.undecided or start.is_refusal) and not start.too_long:
            return b""
        return self._release_start()

    def _release_start(self) -> bytes:
        """What the client gets of the bytes that were held back."""
        held = b"" if self._start is None else bytes(self._start.data)
        self._start = None
        return self._for_client(held)

    def _for_client(self, data: bytes) -> bytes:
        """What the client gets now of these bytes of the body."""
        if self._stripper is not None:
            data = self._stripper.feed(data)
        return data if self._name is None else self._name.feed(data)

    def replay(self) -> bool:
        reason = self._repeat_reason()
        if reason is None:
            return False
        self._replayed = True
        self._withheld = False
        self._after_server_error = reason is RepeatReason.SERVER_ERROR
        adapter, start = self._adapter, self._start
        if adapter is not None and start is not None:
            self._adapter_refused = start.error_code == _ADAPTER_REFUSAL_CODE or adapter.encode() in start.data
        self._start = self._stripper = self._name = self._adapter = None
        if self._profile_added or self._arm is not Arm.NONE:
            # The control arm leaves out what the treated one does.
            self._leave_arm(ArmReason.REFUSED)
        self._reports.repeated(reason)
        return True

    def _repeat_reason(self) -> RepeatReason | None:
        """Why the client's own request is sent now; None: it is not."""
        if self._withheld:
            return RepeatReason.ENCODED
        if self._start is None or not self._start.is_refusal:
            return None
        special = {_TOO_LARGE_CODE: RepeatReason.TOO_LARGE, _SERVER_ERROR_CODE: RepeatReason.SERVER_ERROR}
        return special.get(self._start.error_code or 0, RepeatReason.REFUSED)

    def _fail_after_replay(self, code: int) -> None:
        """The rewritten request was refused. If the client's own is accepted, the rewriting was the cause.

        code: of the second response's status, or of the error that it begins with; 0: it is a stream of something else.
        """
        accepted = code < 400
        if self._after_server_error and not accepted:
            self._reports.server_errors.in_vain()
        if self._tokens is not None:
            cause = Unscored.ADAPTER_REFUSED if self._adapter_refused else Unscored.LOGPROBS_REFUSED
            self._tokens.fail(cause if accepted else status_failure(code))
            self._note_refusal()

    def _note_refusal(self) -> None:
        """For example, the engine's --max-logprobs is lower than `shadow.top_k`. An answer that begins and then ends in
        an error counts, too: it cannot be sent again to find out whether what was added is the cause."""
        failure = None if self._tokens is None else self._tokens.failure
        if failure in _REFUSALS or (failure is Unscored.UPSTREAM_ERROR and self._stripper is not None):
            self._reports.pause.refused(self._policy.shadow_top_k)

    def response_end(self) -> bytes:
        self._ended = True
        if self._replayed:
            return b""
        rest = b"" if self._start is None else self._release_start()
        if self._stripper is not None:
            last = self._stripper.finish()
            rest += last if self._name is None else self._name.feed(last)
        elif self._tokens is not None:
            self._tokens.fail(error_reason(rest))
        self._note_refusal()
        if self._name is None:
            return rest
        rest += self._name.finish()
        if self._name.other_answered:
            # The client did not get what its arm is compared by.
            self._leave_arm(ArmReason.NOT_APPLIED)
        return rest

    def closed(self, *, complete: bool, output_tokens: int | None = None, engine: str = "") -> None:
        if self._counted_as is not None:
            self._reports.calibrated(*self._counted_as)
        request, tokens = self._request, self._tokens
        if request is None or tokens is None:
            self._skip(Unscored.INCOMPLETE)
        elif tokens.failure is not None:
            self._skip(tokens.failure)
            if tokens.failure is Unscored.TOOL_TOKENS_LOST:
                self._reports.tool_tokens_lost(self._policy)
        elif self._replayed or not (complete and self._ended):
            self._skip(Unscored.INCOMPLETE)
        elif self._shadow:
            self._shadow = False
            self._reports.pause.accepted(self._policy.shadow_top_k)
            # Of an answer that the plugin reports, one capture stands for all choices.
            choices = tokens.choices[:1] if self._from_tap else tokens.choices
            for number, choice in enumerate(choices):
                self._reports.captured(self._capture(request, tokens, number, choice, engine))
        if self._skipped is not None:
            if output_tokens is None and complete and tokens is not None and tokens.usage is not None:
                # The client did not ask for the usage, and does not get it.
                output_tokens = tokens.usage.completion_tokens
            self._reports.skipped(self._skipped, self._kind, output_tokens)

    def _capture(
        self, request: Request, tokens: ResponseTokens, number: int, choice: ChoiceTokens, engine: str
    ) -> Capture:
        adapter = self._adapter if tokens.model == self._adapter else None
        return Capture(
            request_id=self._request_id,
            route=self._route,
            model=tokens.model if adapter is None else self._policy.answered_name,
            label=self._options.label,
            arm=self._arm.value,
            requested=self._version,
            nonce=self._nonce,
            stream=request.stream,
            prompt_token_ids=little_endian(choice.prompt_ids),
            output_token_ids=little_endian(choice.output_ids),
            top_k=tokens.top_k,
            candidate_ids=b"".join(rows.ids.astype("<i4").tobytes() for rows in choice.parsed),
            candidate_logprobs=b"".join(rows.logprobs.astype("<f4").tobytes() for rows in choice.parsed),
            emitted_logprobs=b"".join(rows.emitted.astype("<f4").tobytes() for rows in choice.parsed),
            logprobs=choice.logprobs,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            sampling_top_k=self._sampling.top_k,
            min_p=self._sampling.min_p,
            finish_reason=choice.finish_reason,
            captured_at=0.0,
            traceparent=self._traceparent,
            kind=self._kind,
            conversation=self._conversation,
            client=self._client,
            adapter=adapter,
            choice=number,
            choices=request.choices,
            tools=request.tools,
            reasoning=choice.reasoning,
            from_tap=self._from_tap,
            also_in_response=self._from_tap and request.unscorable is None,
            grammar=request.grammar,
            engine=engine,
            engine_drawn=self._engine_drawn and engine == self._engine,
            generated=-1 if tokens.usage is None else tokens.usage.completion_tokens,
        )
