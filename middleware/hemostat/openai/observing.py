"""Responses that are passed on as they are: what they say of themselves is read, and the tokens come from elsewhere."""

from __future__ import annotations

from typing import Protocol

from hemostat.metrics.reasons import Unscored
from hemostat.openai import sse
from hemostat.openai.json_splice import MALFORMED, JsonObject
from hemostat.openai.requests import Request
from hemostat.openai.stripping import ResponseBody
from hemostat.openai.tokens import ResponseTokens, error_reason


class EndingForm(Protocol):
    """How a form says how its response ended."""

    def record_ending(self, data: JsonObject, tokens: ResponseTokens) -> None:
        """Record the model, the finish reason and the usage, where this event or response has them.

        May raise one of MALFORMED.
        """

    def goes_on(self, events: bytes) -> bool:
        """Whether these events of a stream are certain, before they are parsed, to have none of that but the model."""


class EndingObserver(ResponseBody):
    """A `forms.protocol.Stripper` that changes nothing."""

    def __init__(self, form: EndingForm, request: Request, tokens: ResponseTokens, *, stream: bool) -> None:
        super().__init__(request, tokens, stream=stream)
        self._form = form

    def feed(self, data: bytes) -> bytes:
        events = self._events
        whole = events is not None and events.between_events and data.endswith(b"\n\n")
        if whole and self._tokens.model and self._form.goes_on(data):
            return data  # the usual case: pieces of text
        return super().feed(data)

    def _on_body(self, data: bytes) -> bytes:
        self._read(data)
        return data

    def _on_event(self, event: sse.Event) -> bytes:
        if event.data is not None and event.data != b"[DONE]":
            self._read(event.data)
        return event.raw

    def _read(self, data: bytes) -> None:
        tokens = self._tokens
        try:
            body = JsonObject(data)
            if body.has("error"):
                tokens.fail(error_reason(data))
            elif tokens.failure is None:
                self._form.record_ending(body, tokens)
        except MALFORMED:
            tokens.fail(Unscored.UNREADABLE)

    def _check(self) -> None:
        self._tokens.check_finished()
