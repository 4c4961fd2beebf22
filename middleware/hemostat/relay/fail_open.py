"""Fail open: a hook that raises is counted, and ignored for the rest of the request.

A client never gets a part of a response without a sign that the rest is missing. If the request went upstream as the
client sent it, what the hook held back goes to the client as it came. If that is not possible, because the request was
rewritten or the hook changed what it gave back, the response is lost (`FailOpenHook.lost`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hemostat.hooks import Comparison, ExchangeHook, Hook, Refusal, Rewrite
from hemostat.relay.http.fields import Fields
from hemostat.relay.http.request import RequestHead
from hemostat.relay.http.response import ResponseHead
from hemostat_calibration.records import Arm

_NO_ARM: Final = Arm.NONE.value


class FailOpenHook:
    """Calls one request's hook. Owns whether it has failed, whether it transforms the present response, and what it
    holds back of that.

    After a failure every method returns what leaves the bytes unchanged.
    """

    __slots__ = ("_altered", "_failed", "_held", "_hook", "_on_error", "_unchanged", "rewrote", "transforming")

    def __init__(self, hook: ExchangeHook, on_error: Callable[[], None]) -> None:
        """on_error: called for every exception."""
        self._hook = hook
        self._on_error = on_error
        self._failed = False
        self._unchanged = False
        """It is True if the hook failed before it could change the request."""
        self.rewrote = False
        """It is True if the response belongs to a request that the hook has changed: without the hook it is not for the
        client.
        """
        self._held: list[bytes] = []
        """The bytes of the response that the hook has got and not given back. Not kept if it would not help: see
        `lost`."""
        self._altered = False
        """True if the hook has given back other bytes than it got."""
        self.transforming = False
        """It is True if the response's body passes through the hook."""

    @property
    def arm(self) -> str:
        return _NO_ARM if self._unchanged else self._hook.arm

    @property
    def comparison(self) -> Comparison | None:
        try:
            return None if self._unchanged else self._hook.comparison
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return None

    @property
    def lost(self) -> bool:
        """It is True if the hook has failed, and the present response cannot go on without it."""
        return self._failed and (self.rewrote or self._altered)

    @property
    def body_limit(self) -> int:
        return self._hook.body_limit

    @property
    def draws_engine(self) -> bool:
        try:
            return not self._failed and self._hook.draws_engine
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return False

    def sent_to(self, engine: str, *, drawn: bool) -> None:
        try:
            self._hook.sent_to(engine, drawn=drawn)
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        """Returns the hook's answer about a request. body: None if it is longer than `body_limit`; then it cannot be
        rewritten."""
        if self._failed:
            self._unchanged = True
            return None
        try:
            verdict = self._hook.request(body)
            if isinstance(verdict, Rewrite) and body is None:
                raise ValueError("a body that the hook has not seen cannot be rewritten")
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            self._unchanged = True
            return None
        self.rewrote = isinstance(verdict, Rewrite)
        return verdict

    def restored(self) -> None:
        """Is told that the client's own request is sent, and that another response will come."""
        self.transforming = False
        self.rewrote = self._altered = False
        self._held.clear()

    def response_head(self, head: ResponseHead) -> bool:
        """Returns True if the hook wants to transform the body."""
        if self._failed:
            return False
        try:
            return self._hook.response_head(head.status, head.content_type, head.content_coding)
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return False

    @property
    def withholds(self) -> bool:
        try:
            return not self._failed and self._hook.withholds
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return False

    def response_data(self, data: bytes) -> bytes:
        try:
            given = self._hook.response_data(data)
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return self._as_it_came(data)
        if (given is not data or self._held) and not self.rewrote and not self._altered:
            self._note(data, given)
        return given

    def replay(self) -> bool:
        try:
            return self._hook.replay()
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return False

    def response_end(self) -> bytes:
        try:
            return self._hook.response_end()
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return self._as_it_came(b"")

    def closed(self, *, complete: bool, output_tokens: int | None, engine: str, own_status: int) -> None:
        """Tells the hook that the exchange is closed; it is called in every case, also after a failure."""
        try:
            self._hook.closed(complete=complete, output_tokens=output_tokens, engine=engine, own_status=own_status)
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._on_error()

    def _note(self, data: bytes, given: bytes) -> None:
        """Notes what the hook still holds, after it got `data` and has given back `given`."""
        self._held.append(data)
        if not given:
            return
        held = b"".join(self._held)
        self._held.clear()
        if not held.startswith(given):
            self._altered = True
        elif len(given) < len(held):
            self._held.append(held[len(given) :])

    def _as_it_came(self, data: bytes) -> bytes:
        """Returns what was held back, and `data`; nothing if the response is lost."""
        held = b"" if self.lost else b"".join((*self._held, data))
        self._held.clear()
        return held

    def _fail(self) -> None:
        self._on_error()
        self._failed = True
        self.transforming = False


def ask_hook(
    hook: Hook, request: RequestHead, request_id: str, on_error: Callable[[], None]
) -> FailOpenHook | Refusal | None:
    """Asks whether the hook wants to see a request. Returns None if it does not, or if it has failed. on_error: called
    for every exception."""
    try:
        method, fields = request.method.decode("ascii"), Fields(request.received)
        answer = hook.begin(method, request.target, fields, request_id, marked=request.marked)
    except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
        on_error()
        return None
    return FailOpenHook(answer, on_error) if answer is not None and not isinstance(answer, Refusal) else answer
