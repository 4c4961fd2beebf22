"""Responses with `choices` on their way to the client: what was injected into them is recorded and taken out.

Checked against vLLM 0.32 (`entrypoints/openai/{chat_completion,completion}`):
- the members that the injection fills (`logprobs`, `token_ids`, `prompt_token_ids`) are null without it, not absent;
- only because of the injection, a chat stream gets an event with an empty delta for each step that vLLM's parser holds
  back;
- with `include_usage`, `system_fingerprint` moves from the finishing event to the usage event. So usage is not injected
  where there are several choices: their finishing events could not go out before the last one;
- an event has one choice.
"""

from __future__ import annotations

import contextlib
import re
from typing import Final, Protocol

import msgspec

from hemostat.metrics.reasons import Unscored
from hemostat.openai import sse
from hemostat.openai.json_splice import MALFORMED, NULL, JsonObject
from hemostat.openai.logprobs.cutting import EventCutter, cut_logprobs
from hemostat.openai.logprobs.scrubbing import Scrubber, scrub
from hemostat.openai.requests import NO_LOGPROBS, Request, RequestedLogprobs
from hemostat.openai.tokens import ResponseTokens, error_reason, usage_decoder

MAX_BODY: Final = 128 * 1024 * 1024
"""The largest number of bytes of one response (not a stream) that are buffered until it is complete."""

_REASONING: Final = re.compile(rb'"reasoning(?:_content)?":"')
"""The pattern of a reasoning text's beginning. It matches no text itself: quotes are escaped there."""

_ids: Final[msgspec.json.Decoder[list[int]]] = msgspec.json.Decoder(list[int])
_elements: Final[msgspec.json.Decoder[list[msgspec.Raw]]] = msgspec.json.Decoder(list[msgspec.Raw])


class LogprobForm(Protocol):
    """A form with `choices` that writes the details of tokens."""

    prompt_in_choice: bool
    """It is True if a choice has the ids of its prompt; else the response has the ids of the one prompt."""

    def is_held_back(self, choice: JsonObject) -> bool:
        """Returns True if the stream's event has nothing for the client."""

    def restore(self, logprobs: bytes, requested: RequestedLogprobs) -> bytes:
        """Returns the JSON of `logprobs` as the client asked for it. Raises one of MALFORMED if that is not
        possible.
        """


class _Parsed:
    """The JSON of a response or of a stream's event: its body and its choices."""

    __slots__ = ("body", "choices")

    def __init__(self, body: JsonObject) -> None:
        self.body = body
        raw = self.body.raw("choices") if self.body.has("choices") else b"[]"
        self.choices = [JsonObject(bytes(choice)) for choice in _elements.decode(raw)]


class ResponseBody:
    """One response, its events or its whole body; what is done with them is decided by the subclass."""

    def __init__(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> None:
        self._tokens = tokens
        self._tools = request.tools
        self._events = sse.Parser() if stream else None
        self._pieces: list[bytes] = []
        """The pieces of a body that is not a stream."""
        self._size = 0
        """The number of bytes of these pieces."""
        self._pass_through = False
        """It is True if the body is larger than MAX_BODY and is passed on as it arrives."""

    def feed(self, data: bytes) -> bytes:
        """Takes the next bytes of the body; returns what the client gets now."""
        if self._events is not None:
            return b"".join([self._on_event(event) for event in self._events.feed(data)])
        if self._pass_through:
            return self._unparsed(data)
        self._pieces.append(data)
        self._size += len(data)
        if self._size <= MAX_BODY:
            return b""
        self._pass_through = True
        self._tokens.fail(Unscored.RESPONSE_TOO_LARGE)
        return self._unparsed(self._take_body())

    def _take_body(self) -> bytes:
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body

    def finish(self) -> bytes:
        """Is called when the response is complete, and returns the rest of what the client gets."""
        if self._events is not None:
            remainder = self._events.flush()
            rest = (self._on_event(sse.parse(remainder)) if remainder else b"") + self._on_end()
        elif self._pass_through:
            rest = self._on_end()
        else:
            rest = self._on_body(self._take_body())
        self._check()
        return rest

    def _on_event(self, event: sse.Event) -> bytes:
        raise NotImplementedError

    def _on_body(self, data: bytes) -> bytes:
        raise NotImplementedError

    def _on_end(self) -> bytes:
        return b""

    def _unparsed(self, data: bytes) -> bytes:
        """Returns what the client gets of a part of a body, or of an event, that is too large to be parsed."""
        return data

    def _check(self) -> None:
        self._tokens.check_complete(self._tools)


class ChoiceStripper(ResponseBody):
    """A `forms.protocol.Stripper` of a response to a request with the injected members."""

    def __init__(self, form: LogprobForm, request: Request, tokens: ResponseTokens, *, stream: bool) -> None:
        super().__init__(request, tokens, stream=stream)
        self._form = form
        self._requested = request.requested
        self._all_events = request.requested.logprobs or request.requested.token_ids
        """The client itself asked for what makes vLLM send an event for each step."""
        self._keep_usage = request.usage_requested or request.choices > 1
        tokens.usage_expected = not stream or request.usage_requested or request.choices == 1
        self._finishing: tuple[sse.Event, bytes] | None = None
        """The finishing event and its stripped data, held until the usage event brings the fingerprint."""
        self._cutter = EventCutter() if stream and request.requested == NO_LOGPROBS and request.choices == 1 else None
        self._scrubber = Scrubber(stream=stream)
        """The scrubber of what cannot be parsed because it is too large."""

    def feed(self, data: bytes) -> bytes:
        if self._cutter is not None and self._events is not None and self._events.between_events:
            # The usual case: one whole event.
            try:
                cut = self._cutter.cut(data)
            except MALFORMED:
                cut = None  # it is parsed, or scrubbed
            if cut is not None and self._finishing is None and self._tokens.failure is None:
                try:
                    self._tokens.add(0, cut.token_ids, cut.logprobs)
                except MALFORMED:
                    self._tokens.fail(Unscored.NO_LOGPROBS)
                if cut.reasoning and self._tokens.choices:
                    self._tokens.choices[0].reasoning = True
                return cut.event
        return super().feed(data)

    def _on_body(self, data: bytes) -> bytes:
        cut = cut_logprobs(data) if self._requested == NO_LOGPROBS else None
        if cut is not None:
            rest, logprobs = cut
            with contextlib.suppress(*MALFORMED):
                return self._strip_body(rest, logprobs)
        try:
            return self._strip_body(data)
        except MALFORMED:
            self._tokens.fail(Unscored.UNREADABLE)
            return scrub(data, stream=False)

    def _strip_body(self, data: bytes, cut: bytes | None = None) -> bytes:
        """Returns a body as the client gets it. cut: the value of the one `logprobs`, of which there is only `null` in
        `data`. May raise one of MALFORMED."""
        parsed = _Parsed(JsonObject(data))
        stripped = self._strip(parsed)
        self._record(parsed, cut)
        return stripped

    def _unparsed(self, data: bytes) -> bytes:
        return self._scrubber.feed(data)

    def _on_event(self, event: sse.Event) -> bytes:
        if event.data is None:
            return self._unparsed(event.raw)
        if event.data == b"[DONE]":
            return self._take_finishing() + event.raw
        try:
            parsed = _Parsed(JsonObject(event.data))
            stripped = self._strip(parsed)
        except MALFORMED:
            self._tokens.fail(Unscored.UNREADABLE)
            return self._take_finishing() + scrub(event.raw, stream=True)
        self._record(parsed)
        if self._cutter is not None and parsed.choices:
            self._cutter.update(event.data, parsed.body.start_of("choices"))
        usage = parsed.body.has("usage")
        if not parsed.choices:
            if parsed.body.has("error"):
                self._tokens.fail(error_reason(event.data))
            elif usage and not self._keep_usage:
                return self._take_finishing(parsed.body.raw("system_fingerprint"))
            return self._take_finishing() + event.raw
        choice = parsed.choices[0]
        if usage:
            # This server sends usage with every event, so it would have sent the usage event without the injection too.
            self._keep_usage = True
        finishing = choice.has("finish_reason")
        if not finishing and not self._all_events and self._form.is_held_back(choice):
            # A step that vLLM's parser held back: without the injection vLLM sends no event for it.
            return self._take_finishing()
        before = self._take_finishing()
        if finishing and not self._keep_usage:
            self._finishing = (event, stripped)
            return before
        return before + (event.raw if stripped is event.data else event.replace(stripped))

    def _on_end(self) -> bytes:
        return self._take_finishing() + self._scrubber.finish()

    def _take_finishing(self, fingerprint: bytes = NULL) -> bytes:
        """Returns the bytes of the held finishing event, with the fingerprint that it has where no usage event
        follows."""
        if self._finishing is None:
            return b""
        event, data = self._finishing
        self._finishing = None
        if fingerprint != NULL:
            data = JsonObject(data).edit({"system_fingerprint": fingerprint})
        return event.replace(data)

    def _strip(self, parsed: _Parsed) -> bytes:
        """Returns the bytes of a response or an event as the client gets them; the same object where nothing
        changes."""
        changes: dict[str, bytes] = {}
        edits = [self._changes(choice) for choice in parsed.choices]
        if any(edits):
            stripped = [choice.edit(edit) for choice, edit in zip(parsed.choices, edits, strict=True)]
            changes["choices"] = b"[" + b",".join(stripped) + b"]"
        if not self._requested.token_ids and parsed.body.has("prompt_token_ids"):
            changes["prompt_token_ids"] = NULL
        return parsed.body.edit(changes) if changes else parsed.body.data

    def _changes(self, choice: JsonObject) -> dict[str, bytes]:
        changes = {}
        requested = self._requested
        if choice.has("logprobs") and requested.restorable:
            changes["logprobs"] = self._form.restore(choice.raw("logprobs"), requested) if requested.logprobs else NULL
        if not requested.token_ids:
            changes |= {key: NULL for key in ("token_ids", "prompt_token_ids") if choice.has(key)}
        return changes

    def _record(self, parsed: _Parsed, cut: bytes | None = None) -> None:
        """Records what a choice has. cut: see `_strip_body`."""
        tokens = self._tokens
        try:
            _record_ending(tokens, parsed)
            if tokens.failure is not None:
                return
            if parsed.body.has("prompt_token_ids") and not self._form.prompt_in_choice:
                tokens.add_prompt(0, parsed.body.raw("prompt_token_ids"))
            for choice in parsed.choices:
                index = choice.value("index")
                if choice.has("prompt_token_ids"):
                    tokens.add_prompt(index, choice.raw("prompt_token_ids"))
                output = _ids.decode(choice.raw("token_ids")) if choice.has("token_ids") else []
                if output and not tokens.top_k:
                    tokens.add(index, output)
                elif output and cut is None and not choice.has("logprobs"):
                    raise ValueError("token ids without logprobs")
                elif output:
                    tokens.add(index, output, cut or choice.raw("logprobs"))
        except MALFORMED:
            tokens.fail(Unscored.NO_LOGPROBS)


def record_ending(body: JsonObject, tokens: ResponseTokens) -> None:
    """See `observing.EndingForm`."""
    _record_ending(tokens, _Parsed(body))


def choices_go_on(events: bytes) -> bool:
    """See `observing.EndingForm`.

    In JSON a quote inside a string is escaped, so none of these bytes are part of a text. Where they have another style
    the events have to be parsed.

    >>> choices_go_on(b'data: {"choices":[{"delta":{"content":"\\\\"usage\\\\":{"},"finish_reason":null}]}\\n\\n')
    True
    >>> choices_go_on(b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\\n\\n')
    False
    """
    return (
        b'"finish_reason":null' in events
        and b'"finish_reason":"' not in events
        and b'"usage":{' not in events
        and b'"error"' not in events
        and b'"reasoning' not in events
    )


def _record_ending(tokens: ResponseTokens, parsed: _Parsed) -> None:
    """Records the model, and what says that the response is complete. May raise one of MALFORMED."""
    body = parsed.body
    if body.has("usage"):
        tokens.usage = usage_decoder.decode(body.raw("usage"))
    if tokens.failure is not None:
        return
    if not tokens.model:
        tokens.model = str(body.value("model") or "")
    for choice in parsed.choices:
        recorded = tokens.choice(choice.value("index"))
        if choice.has("finish_reason"):
            recorded.finish_reason = str(choice.value("finish_reason"))
        if not recorded.reasoning and _REASONING.search(choice.data):
            recorded.reasoning = True
