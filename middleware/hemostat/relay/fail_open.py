"""Fail open: a hook that raises is counted, and ignored for the rest of the request."""

from __future__ import annotations

from collections.abc import Callable

from hemostat.hooks import Comparison, ExchangeHook, Refusal, Rewrite
from hemostat.relay.http.response import ResponseHead
from hemostat_calibration.records import Arm


class FailOpenHook:
    """Calls one request's hook. Owns whether it has failed, and whether it transforms the present response.

    After a failure every method returns what leaves the bytes unchanged.
    """

    __slots__ = ("_failed", "_hook", "_on_error", "_unchanged", "transforming")

    def __init__(self, hook: ExchangeHook, on_error: Callable[[], None]) -> None:
        """on_error: called for every exception."""
        self._hook = hook
        self._on_error = on_error
        self._failed = False
        self._unchanged = False
        """The hook failed before it could change the request."""
        self.transforming = False
        """The response's body passes through the hook."""

    @property
    def arm(self) -> str:
        return Arm.NONE.value if self._unchanged else self._hook.arm

    @property
    def comparison(self) -> Comparison | None:
        try:
            return None if self._unchanged else self._hook.comparison
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return None

    @property
    def body_limit(self) -> int:
        return self._hook.body_limit

    @property
    def draws_engine(self) -> bool:
        return not self._failed and self._hook.draws_engine

    def sent_to(self, engine: str, *, drawn: bool) -> None:
        try:
            self._hook.sent_to(engine, drawn=drawn)
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        """body: None if it is longer than `body_limit`; then it cannot be rewritten."""
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
        return verdict

    def response_head(self, head: ResponseHead) -> bool:
        """True if the hook wants to transform the body."""
        if self._failed:
            return False
        try:
            return self._hook.response_head(head.status, head.content_type, head.content_coding)
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return False

    @property
    def withholds(self) -> bool:
        return not self._failed and self._hook.withholds

    def response_data(self, data: bytes) -> bytes:
        try:
            return self._hook.response_data(data)
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._fail()
            return data

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
            return b""

    def closed(self, *, complete: bool, output_tokens: int | None, engine: str, own_status: int) -> None:
        """Called in every case, also after a failure."""
        try:
            self._hook.closed(complete=complete, output_tokens=output_tokens, engine=engine, own_status=own_status)
        except Exception:  # noqa: BLE001  fail open: a failing hook is ignored
            self._on_error()

    def _fail(self) -> None:
        self._on_error()
        self._failed = True
        self.transforming = False
