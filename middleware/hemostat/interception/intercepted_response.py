"""The response to a rewritten request: its tokens are taken out of it, or the client's own request is sent instead."""

from __future__ import annotations

from typing import Final

from hemostat.interception.reports import Reports
from hemostat.interception.response_state import (
    AWAITED,
    ENDED,
    READ,
    REPEATED,
    TRANSITIONS,
    UNDECIDED,
    WITHHELD,
    ResponseState,
)
from hemostat.ipc.messages import Policy
from hemostat.metrics.reasons import RepeatReason, Unscored
from hemostat.openai.errors import LeadingError
from hemostat.openai.forms.protocol import Stripper
from hemostat.openai.forms.table import FORMATS
from hemostat.openai.logprobs.scrubbing import Scrubber
from hemostat.openai.model_name import ModelName
from hemostat.openai.recompressing import CODINGS, Recompressor
from hemostat.openai.requests import Request
from hemostat.openai.routes import CHAT, COMPLETIONS
from hemostat.openai.tokens import ResponseTokens, error_reason, status_failure

MAX_UNDECIDED_BYTES: Final = 64 * 1024
"""The largest number of bytes of a response that are held back while it may still turn out to be a refusal."""
_REFUSALS: Final = frozenset({Unscored.LOGPROBS_REFUSED, Unscored.ENCODED})
"""The failures that asking for logprobs has caused, and would cause again."""
_REFUSAL_CODES: Final = (400, 422)
"""The codes of vLLM for a request that does not pass its validation: nothing was computed."""
_ADAPTER_REFUSAL_CODE: Final = 404
"""The code of vLLM for a request for an adapter that it does not know (any more)."""
_TOO_LARGE_CODE: Final = 413
"""The status of a server that limits the size of bodies: what was added may have been too much."""
_SERVER_ERROR_CODE: Final = 500
"""The code of vLLM for a response that it cannot write as JSON: one with NaN as a log-probability, which only sampling
asks for. Every other code of a server error says that the upstream is overloaded or gone, whatever was asked for."""
_REPEATABLE_ROUTES: Final = frozenset({CHAT, COMPLETIONS})
"""The routes of whose answers the engine keeps nothing, so that generating one twice has no effect but its cost."""


class _ResponseStart:
    """The first bytes of a response, kept until they show whether the response is a refusal by vLLM's validation.

    codes: the codes of a refusal. error_code: the code of the error that the response is, 0 for none, None while that
    is not known.
    """

    __slots__ = ("_codes", "_error", "data", "error_code")

    def __init__(self, codes: tuple[int, ...], error_code: int | None = None) -> None:
        self._codes = codes
        self._error = LeadingError()
        self.data = bytearray()
        self.error_code = error_code

    def feed(self, data: bytes) -> None:
        self.data += data
        if self.error_code is None:
            self.error_code = self._error.feed(data)

    @property
    def is_refusal(self) -> bool:
        return self.error_code in self._codes

    @property
    def undecided(self) -> bool:
        return self.error_code is None

    @property
    def too_long(self) -> bool:
        return len(self.data) > MAX_UNDECIDED_BYTES


class InterceptedResponse:
    """Owns the state of the response (`response_state`), and what is held back of it.

    request, tokens: None if its tokens are not wanted. from_tap: it stays as it is, the engine's plugin reports the
    tokens. adapter: the version that Hemostat asked for as the request's model.
    """

    __slots__ = (
        "_adapter",
        "_adapter_refused",
        "_after_server_error",
        "_from_tap",
        "_name",
        "_policy",
        "_reports",
        "_request",
        "_route",
        "_start",
        "_stripper",
        "_tokens",
        "state",
    )

    def __init__(
        self,
        reports: Reports,
        policy: Policy,
        route: str,
        request: Request | None,
        tokens: ResponseTokens | None,
        *,
        from_tap: bool,
        adapter: str | None,
    ) -> None:
        self.state = AWAITED
        self._reports = reports
        self._policy = policy
        self._route = route
        self._request = request
        self._tokens = tokens
        self._from_tap = from_tap
        self._adapter = adapter
        self._start: _ResponseStart | None = None
        """The first bytes in UNDECIDED and REPEATED, while they are read for a refusal."""
        self._stripper: Stripper | None = None
        self._name: ModelName | None = None
        """The part that restores the base model's name."""
        self._after_server_error = False
        """It is True in REPEATED if the request was repeated because of a server error."""
        self._adapter_refused = False
        """It is True in REPEATED if the engine refused the rewritten request because of the adapter."""

    def _enter(self, state: ResponseState) -> None:
        assert state in TRANSITIONS[self.state], f"no transition from {self.state!r} to {state!r}"
        self.state = state

    @property
    def other_answered(self) -> bool:
        """It is True if another model has answered than the adapter that was asked for."""
        return self._name is not None and self._name.other_answered

    def begin(self, status: int, content_type: bytes, content_coding: bytes) -> bool:
        """Implements `hooks.ExchangeHook.response_head`."""
        content_type = content_type.partition(b";")[0].strip().lower()
        coding = content_coding.strip().lower()
        plain = coding == b"identity"
        event_stream = status == 200 and content_type == b"text/event-stream"
        stream = plain and event_stream
        codes = self._refusal_codes()
        if self.state is REPEATED:
            if stream:
                self._start = _ResponseStart(codes)
            else:
                self._fail_after_repeat(status)
            return stream
        if self._adapter is not None and plain:
            self._name = ModelName(self._adapter, self._policy.answered_name, stream=stream, error=status != 200)
        if status in codes:
            self._start = _ResponseStart(codes, status)
            self._enter(UNDECIDED)
            return True
        readable = True
        if self._request is not None and self._tokens is not None:
            if status != 200:
                self._tokens.fail(status_failure(status))
            else:
                readable = self._read(self._request, self._tokens, content_type, coding, stream=event_stream)
        if not readable:
            self._enter(WITHHELD)
            return True
        if stream:
            self._start = _ResponseStart(codes)
        self._enter(UNDECIDED if stream else READ)
        return stream or self._stripper is not None or self._name is not None

    def _refusal_codes(self) -> tuple[int, ...]:
        """Returns the codes after which the client's own request is sent."""
        codes = [*_REFUSAL_CODES, _TOO_LARGE_CODE]
        if self._adapter is not None:
            codes.append(_ADAPTER_REFUSAL_CODE)
        if self._route in _REPEATABLE_ROUTES and self._reports.server_errors.allowed:
            codes.append(_SERVER_ERROR_CODE)
        return tuple(codes)

    def _read(
        self, request: Request, tokens: ResponseTokens, content_type: bytes, coding: bytes, *, stream: bool
    ) -> bool:
        """Chooses what takes out of the answer what was injected. Returns False if nothing can, and the answer is not
        for the client."""
        form = FORMATS[request.form]
        plain, known = coding == b"identity", stream or content_type == b"application/json"
        if self._from_tap:
            if plain and known:
                self._stripper = form.observer(request, tokens, stream=stream)
            else:
                tokens.fail(Unscored.UNREADABLE if plain else Unscored.ENCODED)
            return True
        if not plain and coding not in CODINGS:
            tokens.fail(Unscored.ENCODED)
            return False
        if known:
            self._stripper = form.stripper(request, tokens, stream=stream)
        else:
            tokens.fail(Unscored.UNREADABLE)
            self._stripper = Scrubber(stream=False)
        if not plain:
            self._stripper = Recompressor(self._stripper, tokens)
        return True

    def feed(self, data: bytes) -> bytes:
        """Implements `hooks.ExchangeHook.response_data`."""
        start = self._start
        if self.state is WITHHELD:
            return b""
        if start is None:
            return self._for_client(data)
        start.feed(data)
        if self.state is REPEATED:
            # The second response is read, but not held back.
            if start.error_code is not None:
                self._fail_after_repeat(start.error_code)
            if start.error_code is not None or start.too_long:
                self._start = None
            return data
        if (start.undecided or start.is_refusal) and not start.too_long:
            return b""
        return self._release_start()

    def _release_start(self) -> bytes:
        """Returns what the client gets of the bytes that were held back."""
        held = b"" if self._start is None else bytes(self._start.data)
        self._start = None
        self._enter(READ)
        return self._for_client(held)

    def _for_client(self, data: bytes) -> bytes:
        """Returns what the client gets now of these bytes of the body."""
        if self._stripper is not None:
            data = self._stripper.feed(data)
        return data if self._name is None else self._name.feed(data)

    def repeat(self) -> RepeatReason | None:
        """Returns why the client's own request is sent now that the response is complete; None: it is not sent."""
        reason, start = self._repeat_reason(), self._start
        if reason is None:
            return None
        self._enter(REPEATED)
        self._after_server_error = reason is RepeatReason.SERVER_ERROR
        if self._adapter is not None and start is not None:
            named = self._adapter.encode() in start.data
            self._adapter_refused = start.error_code == _ADAPTER_REFUSAL_CODE or named
        self._start = self._stripper = self._name = None
        return reason

    def _repeat_reason(self) -> RepeatReason | None:
        if self.state is WITHHELD:
            return RepeatReason.ENCODED
        if self._start is None or not self._start.is_refusal:
            return None
        special = {_TOO_LARGE_CODE: RepeatReason.TOO_LARGE, _SERVER_ERROR_CODE: RepeatReason.SERVER_ERROR}
        return special.get(self._start.error_code or 0, RepeatReason.REFUSED)

    def _fail_after_repeat(self, code: int) -> None:
        """Handles the second response after the rewritten request was refused. If the client's own is accepted, the
        rewriting was the cause.

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
        """Notes if the engine refused what was added, for example because its --max-logprobs is lower than
        `shadow.top_k`. An answer that begins and then ends in an error counts, too: it cannot be sent again to find out
        whether what was added is the cause."""
        failure = None if self._tokens is None else self._tokens.failure
        if failure in _REFUSALS or (failure is Unscored.UPSTREAM_ERROR and self._stripper is not None):
            self._reports.pause.refused(self._policy.shadow_top_k)

    def end(self) -> bytes:
        """Implements `hooks.ExchangeHook.response_end`."""
        if self.state is REPEATED:
            return b""
        rest = self._release_start() if self.state is UNDECIDED else b""
        self._enter(ENDED)
        if self._stripper is not None:
            last = self._stripper.finish()
            rest += last if self._name is None else self._name.feed(last)
        elif self._tokens is not None:
            self._tokens.fail(error_reason(rest))
        self._note_refusal()
        return rest if self._name is None else rest + self._name.finish()
