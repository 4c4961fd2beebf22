"""Responses that are passed on as they are: what they say of themselves is read, and the tokens come from elsewhere; or
all that was added is the tokens' ids."""

from __future__ import annotations

from typing import Protocol

from hemostat.metrics.reasons import Unscored
from hemostat.openai import sse
from hemostat.openai.json_splice import MALFORMED, JsonObject
from hemostat.openai.logprobs.scrubbing import Scrubber, scrub
from hemostat.openai.requests import Request
from hemostat.openai.stripping import ResponseBody
from hemostat.openai.tokens import ResponseTokens, error_reason


class EndingForm(Protocol):
    """A form that says how its response ended."""

    def record_ending(self, data: JsonObject, tokens: ResponseTokens) -> None:
        """Records the model, the finish reason and the usage, if this event or response has them.

        May raise one of MALFORMED.
        """

    def goes_on(self, events: bytes) -> bool:
        """Returns True if these events of a stream are certain, before they are parsed, to have none of that but the
        model.
        """


class IdsForm(EndingForm, Protocol):
    """A form that names the ids of the prompt and of the output."""

    def take_ids(self, data: bytes, tokens: ResponseTokens) -> bytes:
        """Records the ids, if this event or response has them, and returns it without them. If it has none, the same
        object is returned.

        May raise one of MALFORMED.
        """


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


class IdsStripper(EndingObserver):
    """A `forms.protocol.Stripper` that takes out the ids. keep: the client itself asked for them."""

    def __init__(self, form: IdsForm, request: Request, tokens: ResponseTokens, *, stream: bool, keep: bool) -> None:
        super().__init__(form, request, tokens, stream=stream)
        self._ids_form = form
        self._keep = keep
        self._scrubber = Scrubber(stream=stream)

    def _on_body(self, data: bytes) -> bytes:
        self._read(data)
        return self._without_ids(data)

    def _on_event(self, event: sse.Event) -> bytes:
        if event.data is None:
            return self._unparsed(event.raw)
        if event.data == b"[DONE]":
            return event.raw
        self._read(event.data)
        stripped = self._without_ids(event.data)
        return event.raw if stripped is event.data else event.replace(stripped)

    def _without_ids(self, data: bytes) -> bytes:
        try:
            stripped = self._ids_form.take_ids(data, self._tokens)
        except MALFORMED:
            self._tokens.fail(Unscored.UNREADABLE)
            stripped = scrub(data, stream=self._events is not None)
        return data if self._keep else stripped

    def _unparsed(self, data: bytes) -> bytes:
        return data if self._keep else self._scrubber.feed(data)

    def _on_end(self) -> bytes:
        return self._scrubber.finish()

    def _check(self) -> None:
        tokens = self._tokens
        if tokens.failure is None and tokens.choices[0].finish_reason and not tokens.choices[0].prompt_ids:
            tokens.fail(Unscored.NO_TOKEN_IDS)
        tokens.check_complete(self._tools)
