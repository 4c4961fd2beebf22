"""One request that the relay intercepts: how it is rewritten, and how its tokens are captured."""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Final

from hemostat.hooks import Comparison, Refusal, Rewrite
from hemostat.interception.assignment import conversation_digest, outcome_number
from hemostat.interception.capture_state import (
    ASKED,
    CAPTURED,
    SAMPLED,
    SKIPPED,
    TRANSITIONS,
    UNSAMPLED,
    CaptureState,
)
from hemostat.interception.client_headers import ClientOptions, skipped_by_headers
from hemostat.interception.intercepted_response import InterceptedResponse
from hemostat.interception.profile_choice import (
    ArmReason,
    Choice,
    calibrates,
    choose_profile,
    is_available,
    served_kind,
)
from hemostat.interception.reports import Reports
from hemostat.interception.response_state import ENDED, WITHHELD
from hemostat.ipc.messages import MAX_TOP, Capture, Policy
from hemostat.metrics.reasons import Unscored
from hemostat.openai import parameters
from hemostat.openai.complexity import TooComplex
from hemostat.openai.forms.table import FORMATS
from hemostat.openai.json_splice import MALFORMED, encode
from hemostat.openai.kinds import asks_json_in_words, kind_name
from hemostat.openai.reading import read_request
from hemostat.openai.requests import Request
from hemostat.openai.routes import FORMS
from hemostat.openai.tokens import ChoiceTokens, ResponseTokens, status_failure
from hemostat_calibration.arrays import little_endian
from hemostat_calibration.engine_keys import PROFILE_KEY, TAP_KEY, TAP_TOP_KEY
from hemostat_calibration.records import Arm, Sampling

MAX_TRACEPARENT: Final = 64
"""The largest number of characters of a client's traceparent that are kept."""
_ARMS: Final = {arm: arm.value for arm in Arm}
"""The names of arms: Python computes the value of an enumeration's member anew each time."""
_TREATED: Final = Arm.TREATED.value
_DROPPED_HEADERS: Final = frozenset({b"accept-encoding"})
"""The headers that are not sent upstream if the response has to be read."""


class TokenSource(IntEnum):
    """The place that the tokens of a request are taken from. It is an IntEnum for the reason that
    `relay.exchange_state` gives.
    """

    RESPONSE = auto()
    """The response, which is asked for their log-probabilities."""
    IDS = auto()
    """The response, which is asked for their ids only: the engine computes their log-probabilities again."""
    PLUGIN = auto()
    """The engine's plugin, which reports them: the response stays as it is."""


RESPONSE: Final = TokenSource.RESPONSE
IDS: Final = TokenSource.IDS
PLUGIN: Final = TokenSource.PLUGIN


class InterceptedExchange:
    """A `hooks.ExchangeHook`: a request that is sampled, calibrated, or both. Owns its `capture_state`."""

    def __init__(
        self,
        reports: Reports,
        policy: Policy,
        route: str,
        request_id: str,
        options: ClientOptions,
        *,
        sampled: bool,
        client: bytes,
        traceparent: str,
    ) -> None:
        """client: digest."""
        self.state = SAMPLED if sampled else UNSAMPLED
        self.body_limit = policy.body_limit
        self._reports = reports
        self._policy = policy
        self._route = route
        self._request_id = request_id
        self._options = options
        self._skipped: Unscored | None = None
        """The reason why the exchange is SKIPPED."""
        self._unjudged = skipped_by_headers(options, policy)
        """The reason why the request is never scored, as far as that is known before it goes upstream."""
        self._client = client
        self._traceparent = traceparent[:MAX_TRACEPARENT]
        self._engine = ""
        self._engine_drawn = False
        self._kind = ""
        self._conversation = b""
        self._streamed = False
        """It is True if the client has asked for a stream."""
        self._choice: Choice | None = None
        """The profile that is asked for, and the arm and the reason that are counted; None for a request that is not
        calibrated."""
        self._drawn = 0.0
        """See `Comparison`."""
        self._comparison: Comparison | None = None
        """The comparison, once it was asked for: a request may leave it, and never changes to another."""
        self._version: str | None = None
        """The version that is asked for, by Hemostat or by the client itself."""
        self._adapter: str | None = None
        """The version that Hemostat asks for as the request's model."""
        self._nonce = ""
        self._sampling = Sampling()
        """The decoding parameters of the request whose tokens are ASKED for."""
        self._source = RESPONSE
        self._request: Request | None = None
        """The request whose tokens are ASKED for."""
        self._tokens: ResponseTokens | None = None
        """The tokens of `_request`."""
        self._response: InterceptedResponse | None = None
        """None while the request goes upstream as the client wrote it."""

    def _enter(self, state: CaptureState) -> None:
        assert state in TRANSITIONS[self.state], f"no transition from {self.state!r} to {state!r}"
        self.state = state

    @property
    def _compared(self) -> str | None:
        """The version that the treated arm gets, of a request in an arm."""
        return None if self._choice is None or self._choice.arm is Arm.NONE else self._choice.compared

    @property
    def arm(self) -> str:
        return _ARMS[Arm.NONE if self._choice is None else self._choice.arm]

    @property
    def comparison(self) -> Comparison | None:
        compared = self._compared
        if compared is None or self._drawn >= self._policy.outcome_fraction:
            return None
        if self._comparison is None:
            self._comparison = self._compare(compared)
        return self._comparison

    def _compare(self, compared: str) -> Comparison:
        return Comparison(
            kind=served_kind(self._policy, self._kind),
            version=compared,
            treated=self.arm == _TREATED,
            conversation=self._conversation,
            client=self._client,
            json_in_words=asks_json_in_words(self._kind),
            streamed=self._streamed,
            drawn=self._drawn,
        )

    @property
    def draws_engine(self) -> bool:
        """It is True for sampled requests: by them it is tested which engine is an outlier."""
        return self.state is SAMPLED or self.state is ASKED

    def sent_to(self, engine: str, *, drawn: bool) -> None:
        self._engine, self._engine_drawn = engine, drawn
        compared = self._compared
        if compared is not None and not is_available(self._policy, engine, compared):
            # In either arm: a treated request gets identity there, and a control one has nothing to be compared with.
            self._leave_arm(ArmReason.UNKNOWN)

    def _leave_arm(self, reason: ArmReason) -> None:
        choice = self._choice
        if choice is not None:
            self._choice = Choice(choice.version, Arm.NONE, reason, choice.compared)

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        policy = self._policy
        request = self._read(body)
        if isinstance(request, Unscored):
            self._pass_unread(request)
            return None
        several = policy.scorable_models is not None and len(policy.scorable_models) > 1
        self._kind = kind_name(request, self._options.label, several_models=several)
        self._conversation = conversation_digest(request.conversation_key, policy.salt)
        self._streamed = request.stream
        self._source = self._choose_source(request)
        if self._source is RESPONSE:
            self._unjudged = self._unjudged or request.unscorable
        if self._unjudged is None and request.min_prompt_tokens > policy.shadow_max_tokens:
            self._unjudged = Unscored.TOO_LONG
        changes: dict[str, bytes] = {}
        xargs: dict[str, str] = {}
        self._version = request.client_profile
        if calibrates(policy, self._options):
            self._add_profile(request, changes, xargs)
        if self.state is SAMPLED:
            self._ask_for_tokens(request, changes, xargs)
        if xargs or request.client_acts:
            changes["vllm_xargs"] = parameters.merged_xargs(request, xargs, policy.secret)
        if self.state is ASKED:
            self._sampling = parameters.sampling_parameters(request, changes, policy.openai_sampling_defaults)
        if not changes:
            return None
        self._response = InterceptedResponse(
            self._reports,
            policy,
            self._route,
            self._request,
            self._tokens,
            from_tap=self._source is PLUGIN,
            adapter=self._adapter,
        )
        is_read = self._tokens is not None or self._adapter is not None
        return Rewrite(request.body.edit(changes), _DROPPED_HEADERS if is_read else frozenset())

    def _read(self, body: bytes | None) -> Request | Unscored:
        """Returns the request in a body, or the reason why the body cannot be read."""
        policy = self._policy
        if body is None:
            return Unscored.BODY_TOO_LARGE
        try:
            return read_request(
                body,
                form=FORMS[self._route],
                unscorable_models=policy.unscorable_models,
                scorable_models=policy.scorable_models,
                default_model=policy.default_model,
                adapter_names=policy.adapter_names,
                grammars=policy.grammars,
            )
        except TooComplex:
            return Unscored.TOO_COMPLEX
        except MALFORMED:
            return Unscored.BAD_JSON

    def _choose_source(self, request: Request) -> TokenSource:
        policy = self._policy
        if policy.tap and policy.tap_tokens:
            in_response = request.unscorable is None
            if request.from_tap or (in_response and self._prefers_plugin(request)):
                return PLUGIN
        return IDS if request.ids_only and request.form in policy.scored_again else RESPONSE

    def _prefers_plugin(self, request: Request) -> bool:
        """Returns True if the engine's plugin is asked for tokens that the response could contain."""
        policy = self._policy
        if policy.prefer_plugin:
            return policy.shadow_top_k <= MAX_TOP
        return request.tools and request.stream and self._reports.loses_tool_tokens(policy)

    def _add_profile(self, request: Request, changes: dict[str, bytes], xargs: dict[str, str]) -> None:
        """Chooses the arm and the profile, and adds what requests the profile."""
        policy = self._policy
        choice = self._choose_profile(request)
        if choice.compared is not None and self._unjudged is None and self._unreported(request, choice.compared):
            # Of the two arms, only the control one could be scored.
            self._unjudged = Unscored.N
            choice = self._choose_profile(request)
        self._choice = choice
        if choice.compared is not None:
            self._drawn = outcome_number(self._conversation, policy.salt)
        if choice.version is None:
            return
        self._version = choice.version
        if choice.version in policy.adapters:
            self._adapter = choice.version
            changes["model"] = encode(choice.version)
            return
        xargs[PROFILE_KEY] = choice.version

    def _choose_profile(self, request: Request) -> Choice:
        return choose_profile(
            self._policy, request, self._options, self._unjudged, self._kind, self._conversation, self._engine
        )

    def _unreported(self, request: Request, version: str) -> bool:
        """Returns True if only the engine's plugin could report that the version was applied, and will not: a plugin
        that reports no ids cannot distinguish the choices of one request. For an adapter the answer shows it.
        """
        policy = self._policy
        by_plugin = version not in policy.adapters
        return by_plugin and policy.tap and not policy.tap_tokens and request.choices > 1

    def _ask_for_tokens(self, request: Request, changes: dict[str, bytes], xargs: dict[str, str]) -> None:
        """Adds what makes vLLM return the tokens' details, or skips a request that cannot be scored."""
        policy = self._policy
        if self._unjudged is not None:
            self._skip(self._unjudged)
            return
        self._enter(ASKED)
        self._request = request
        top_k = 0 if self._source is IDS else policy.shadow_top_k
        self._tokens = ResponseTokens(top_k, policy.shadow_max_tokens, request.choices, request.prompts, request.form)
        if self._source is not PLUGIN:
            changes |= FORMATS[request.form].injected_members(request, top_k)
        # For several choices see `_unreported`.
        if policy.tap and (request.choices == 1 or policy.tap_tokens):
            self._nonce = xargs[TAP_KEY] = self._reports.tap_name(policy)
            if self._source is PLUGIN:
                xargs[TAP_TOP_KEY] = str(min(policy.shadow_top_k, MAX_TOP))

    def _pass_unread(self, reason: Unscored) -> None:
        """Passes the body on unchanged, since it cannot be read."""
        if self.state is SAMPLED:
            self._skip(reason)
        if calibrates(self._policy, self._options):
            self._choice = Choice(None, Arm.NONE, self._unjudged or reason)

    def _skip(self, reason: Unscored) -> None:
        self._enter(SKIPPED)
        self._skipped = reason

    @property
    def withholds(self) -> bool:
        return self._response is not None and self._response.state is WITHHELD

    def response_head(self, status: int, content_type: bytes, content_coding: bytes) -> bool:
        return self._response is not None and self._response.begin(status, content_type, content_coding)

    def response_data(self, data: bytes) -> bytes:
        return data if self._response is None else self._response.feed(data)

    def replay(self) -> bool:
        reason = None if self._response is None else self._response.repeat()
        if reason is None:
            return False
        choice = self._choice
        if choice is not None and (choice.version is not None or choice.arm is not Arm.NONE):
            # The control arm leaves out what the treated one does.
            self._leave_arm(ArmReason.REFUSED)
        self._reports.repeated(reason)
        return True

    def response_end(self) -> bytes:
        response = self._response
        if response is None:
            return b""
        rest = response.end()
        if response.other_answered:
            # The client did not get what its arm is compared by.
            self._leave_arm(ArmReason.NOT_APPLIED)
        return rest

    def closed(
        self, *, complete: bool, output_tokens: int | None = None, engine: str = "", own_status: int = 0
    ) -> None:
        if self._choice is not None:
            self._reports.calibrated(self.arm, self._choice.reason)
        tokens = self._tokens
        if self.state is SAMPLED or self.state is ASKED:
            failure = self._failure(complete=complete, own_status=own_status)
            if failure is None:
                self._hand_on(engine)
            else:
                self._skip(failure)
            if failure is Unscored.TOOL_TOKENS_LOST:
                self._reports.tool_tokens_lost(self._policy)
        if self._skipped is not None:
            if output_tokens is None and complete and tokens is not None and tokens.usage is not None:
                # The client did not ask for the usage, and does not get it.
                output_tokens = tokens.usage.completion_tokens
            self._reports.skipped(self._skipped, self._kind, output_tokens)

    def _failure(self, *, complete: bool, own_status: int) -> Unscored | None:
        """Returns why a sampled exchange that has ended cannot be captured; None if it can be."""
        failure = None if self._tokens is None else self._tokens.failure
        if failure is None and (not complete or self._response is None or self._response.state is not ENDED):
            failure = status_failure(own_status) if own_status else Unscored.INCOMPLETE
        return failure

    def _hand_on(self, engine: str) -> None:
        """Hands on the captures of an exchange whose tokens are complete. engine: that answered."""
        self._enter(CAPTURED)
        request, tokens = self._request, self._tokens
        assert request is not None
        assert tokens is not None
        self._reports.pause.accepted(self._policy.shadow_top_k)
        # Of an answer that the plugin reports, one capture stands for all choices.
        choices = tokens.choices[:1] if self._source is PLUGIN else tokens.choices
        for number, choice in enumerate(choices):
            self._reports.captured(self._capture(request, tokens, number, choice, engine))

    def _capture(
        self, request: Request, tokens: ResponseTokens, number: int, choice: ChoiceTokens, engine: str
    ) -> Capture:
        adapter = self._adapter if tokens.model == self._adapter else None
        return Capture(
            request_id=self._request_id,
            route=self._route,
            model=tokens.model if adapter is None else self._policy.answered_name,
            label=self._options.label,
            arm=self.arm,
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
            from_tap=self._source is PLUGIN,
            also_in_response=self._source is PLUGIN and request.unscorable is None,
            ids_only=self._source is IDS,
            grammar=request.grammar,
            engine=engine,
            engine_drawn=self._engine_drawn and engine == self._engine,
            generated=-1 if tokens.usage is None else tokens.usage.completion_tokens,
            decoding=parameters.decoding_members(request),
        )
