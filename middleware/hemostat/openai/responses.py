"""A sampled response on its way to the client: what was injected into it is recorded and taken out.

Checked against vLLM 0.32 (`entrypoints/openai/{chat_completion,completion}`):
- the members that the injection fills (`logprobs`, `token_ids`, `prompt_token_ids`) are null without it, not absent;
- only because of the injection, a chat stream gets an event with an empty delta for each step that vLLM's parser holds
  back;
- with `include_usage`, `system_fingerprint` moves from the finishing event to the usage event.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from hemostat.openai import sse
from hemostat.openai.json_splice import MALFORMED, NULL, JsonObject
from hemostat.openai.requests import Request

MAX_BODY = 128 * 1024 * 1024
"""Bytes of one response (not a stream) that are buffered until it is complete."""

_ID_PREFIX = len("token_id:")
_INJECTED = ("logprobs", "token_ids", "prompt_token_ids")


class ResponseFailure(StrEnum):
    """Why the tokens of a response were not captured: values of the label `reason` of skipped shadow requests."""

    UPSTREAM_ERROR = "upstream_error"
    """The response is an error."""
    LOGPROBS_REFUSED = "logprobs_refused"
    """vLLM refused the injected members, and would not have refused the client's own request."""
    ADAPTER_REFUSED = "adapter_refused"
    """vLLM does not have the adapter that Hemostat asked for, or cannot load it."""
    ENCODED = "encoded"
    """The body is compressed."""
    UNREADABLE = "unreadable"
    """The body is not what vLLM sends."""
    NO_LOGPROBS = "no_logprobs"
    """The response lacks what was asked for, or it is malformed."""
    TOO_LONG = "too_long"
    """More tokens than `shadow.max_tokens`."""
    RESPONSE_TOO_LARGE = "response_too_large"
    """More than MAX_BODY bytes."""
    INCOMPLETE = "incomplete"
    """The response ended early."""
    TOOL_TOKENS_LOST = "tool_tokens_lost"
    """vLLM's tool parser left out token ids."""
    TOKEN_COUNT_MISMATCH = "token_count_mismatch"  # noqa: S105 - not a password
    """There are fewer or more ids than tokens that vLLM counted."""
    EMPTY = "empty"
    """The response has no token."""


def error_reason(data: bytes) -> ResponseFailure:
    """The reason that an error counts as, by its text in a body or in a stream's event."""
    return ResponseFailure.LOGPROBS_REFUSED if b"sample logprobs" in data else ResponseFailure.UPSTREAM_ERROR


class _Top(msgspec.Struct, gc=False):
    token: str
    logprob: float


class _Entry(msgspec.Struct, gc=False):
    token: str
    logprob: float
    top_logprobs: list[_Top]


class _ChatLogprobs(msgspec.Struct, gc=False):
    content: list[_Entry]


class _CompletionLogprobs(msgspec.Struct, gc=False):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


_ids: msgspec.json.Decoder[list[int]] = msgspec.json.Decoder(list[int])
_chat_logprobs: msgspec.json.Decoder[_ChatLogprobs] = msgspec.json.Decoder(_ChatLogprobs)
_completion_logprobs: msgspec.json.Decoder[_CompletionLogprobs] = msgspec.json.Decoder(_CompletionLogprobs)
_usage: msgspec.json.Decoder[_Usage] = msgspec.json.Decoder(_Usage)


def little_endian(values: array[Any]) -> bytes:
    """The values' bytes as `messages.Capture` carries them."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


@dataclass(slots=True)
class ResponseTokens:
    """The tokens of one response, with T output positions. Empty after a failure (more than `limit` tokens is one)."""

    top_k: int
    limit: int
    """The largest number of prompt and output tokens together."""
    failure: ResponseFailure | None = None
    """The first failure, if any."""
    prompt_ids: array[int] = field(default_factory=lambda: array("i"))
    output_ids: array[int] = field(default_factory=lambda: array("i"))
    """[T]."""
    candidate_ids: array[int] = field(default_factory=lambda: array("i"))
    """[T, top_k + 1], most likely first, padded with -1; the emitted token is among them."""
    candidate_logprobs: array[float] = field(default_factory=lambda: array("f"))
    """[T, top_k + 1], natural logarithms, padded with -inf."""
    emitted_logprobs: array[float] = field(default_factory=lambda: array("f"))
    """[T], natural logarithms."""
    finish_reason: str = ""
    model: str = ""
    usage: _Usage | None = None

    def fail(self, reason: ResponseFailure) -> None:
        """Drop the tokens and keep the reason, unless an earlier failure did so."""
        if self.failure is None:
            self.failure = reason
            for values in (self.prompt_ids, self.output_ids, self.candidate_ids):
                del values[:]
            for floats in (self.candidate_logprobs, self.emitted_logprobs):
                del floats[:]

    def add_prompt(self, raw: bytes) -> None:
        """Append the prompt's ids (JSON)."""
        self.prompt_ids.extend(_ids.decode(raw))
        self._check_length()

    def add(self, ids: bytes, logprobs: bytes, chat: bool) -> None:
        """Append the positions of one event or response: JSON of the ids, and of the logprobs in the route's form.

        Raises one of MALFORMED where they do not fit each other.
        """
        output = _ids.decode(ids)
        if not output:
            return
        if logprobs == NULL:
            raise ValueError("tokens without logprobs")
        if chat:
            entries = _chat_logprobs.decode(logprobs).content
            for emitted, entry in zip(output, entries, strict=True):
                top = entry.top_logprobs
                self._add_row(emitted, entry.token, entry.logprob, [t.token for t in top], [t.logprob for t in top])
        else:
            given = _completion_logprobs.decode(logprobs)
            columns = (output, given.tokens, given.token_logprobs, given.top_logprobs)
            for emitted, token, logprob, row in zip(*columns, strict=True):
                self._add_row(emitted, token, logprob, list(row), list(row.values()))
        self.output_ids.extend(output)
        self._check_length()

    def _add_row(self, emitted: int, token: str, logprob: float, names: list[str], values: list[float]) -> None:
        if token != f"token_id:{emitted}":
            raise ValueError(f"the logprobs name the token {emitted} as {token!r}")
        ids = [int(name[_ID_PREFIX:]) for name in names]
        if emitted not in ids:
            ids.append(emitted)
            values.append(logprob)
        # vLLM lists the emitted token first, whatever its rank.
        if values != sorted(values, reverse=True):
            order = sorted(range(len(ids)), key=values.__getitem__, reverse=True)
            ids = [ids[i] for i in order]
            values = [values[i] for i in order]
        pad = self.top_k + 1 - len(ids)
        if pad < 0 or len(set(ids)) < len(ids):
            raise ValueError(f"more than {self.top_k} candidates, or duplicates among them: {ids}")
        self.candidate_ids.extend(ids)
        self.candidate_logprobs.extend(values)
        if pad:
            self.candidate_ids.extend(pad * (-1,))
            self.candidate_logprobs.extend(pad * (float("-inf"),))
        self.emitted_logprobs.append(logprob)

    def _check_length(self) -> None:
        if len(self.prompt_ids) + len(self.output_ids) > self.limit:
            self.fail(ResponseFailure.TOO_LONG)

    def check_complete(self, tools: bool) -> None:
        """Compare the counts with the engine's own; `failure` is final then. `tools`: the request offered tools."""
        if self.failure is not None:
            return
        usage = self.usage
        if usage is None or not self.finish_reason:
            self.fail(ResponseFailure.INCOMPLETE)
        elif usage.completion_tokens != len(self.output_ids):
            self.fail(ResponseFailure.TOOL_TOKENS_LOST if tools else ResponseFailure.TOKEN_COUNT_MISMATCH)
        elif usage.prompt_tokens != len(self.prompt_ids):
            self.fail(ResponseFailure.TOKEN_COUNT_MISMATCH)
        elif not self.output_ids:
            self.fail(ResponseFailure.EMPTY)


class _Response:
    """The JSON of a response or of a stream's event: its body, its one choice, and its bytes without the injection."""

    __slots__ = ("body", "choice", "stripped")

    def __init__(self, data: bytes) -> None:
        self.body = JsonObject(data)
        self.choice: JsonObject | None = None
        changes: dict[str, bytes] = {}
        choices = self.body.raw("choices")[1:-1]
        if self.body.has("choices") and choices.strip():
            # Several choices are malformed here: requests with several are not sampled.
            self.choice = choice = JsonObject(choices)
            inner = {key: NULL for key in _INJECTED if choice.has(key)}
            if inner:
                changes["choices"] = b"[" + choice.edit(inner) + b"]"
        if self.body.has("prompt_token_ids"):
            changes["prompt_token_ids"] = NULL
        self.stripped = self.body.edit(changes) if changes else data


class Stripper:
    """Takes out of one sampled response what was injected, and records it in `tokens`.

    Never raises: what it cannot parse is passed on unchanged, and `tokens` fails with a reason. `stream`: whether the
    response is an event stream by its content type, whatever was asked for.
    """

    def __init__(self, request: Request, tokens: ResponseTokens, *, stream: bool) -> None:
        self._chat = request.chat
        self._tokens = tokens
        self._tools = request.tools
        self._keep_usage = request.usage_requested
        self._events = sse.Parser() if stream else None
        self._body = bytearray()
        self._pass_through = False
        """The body is larger than MAX_BODY and is passed on as it arrives."""
        self._finishing: tuple[sse.Event, bytes] | None = None
        """The finishing event and its stripped data, held until the usage event brings the fingerprint."""

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the body; returns what the client gets now."""
        if self._events is not None:
            return b"".join([self._strip_event(event) for event in self._events.feed(data)])
        if self._pass_through:
            return data
        self._body += data
        if len(self._body) <= MAX_BODY:
            return b""
        self._pass_through = True
        self._tokens.fail(ResponseFailure.RESPONSE_TOO_LARGE)
        buffered = bytes(self._body)
        self._body.clear()
        return buffered

    def finish(self) -> bytes:
        """The response is complete: returns the rest of what the client gets."""
        if self._events is not None:
            remainder = self._events.flush()
            rest = (self._strip_event(sse.parse(remainder)) if remainder else b"") + self._take_finishing()
        elif self._pass_through:
            rest = b""
        else:
            data = bytes(self._body)
            try:
                response = _Response(data)
                self._record(response)
                rest = response.stripped
            except MALFORMED:
                self._tokens.fail(ResponseFailure.UNREADABLE)
                rest = data
        self._tokens.check_complete(self._tools)
        return rest

    def _strip_event(self, event: sse.Event) -> bytes:
        if event.data is None:
            return event.raw
        if event.data == b"[DONE]":
            return self._take_finishing() + event.raw
        try:
            response = _Response(event.data)
            self._record(response)
        except MALFORMED:
            self._tokens.fail(ResponseFailure.UNREADABLE)
            return self._take_finishing() + event.raw
        choice, usage = response.choice, response.body.has("usage")
        if choice is None:
            if response.body.has("error"):
                self._tokens.fail(error_reason(event.data))
            elif usage and not self._keep_usage:
                return self._take_finishing(response.body.raw("system_fingerprint"))
            return self._take_finishing() + event.raw
        if usage:
            # This server sends usage with every event, so it would have sent the usage event without the injection too.
            self._keep_usage = True
        finishing = choice.has("finish_reason")
        if self._chat and not finishing and choice.raw("delta") == b"{}":
            # A step that vLLM's parser held back: without the injection vLLM sends no event for it.
            return self._take_finishing()
        before = self._take_finishing()
        if finishing and not self._keep_usage:
            self._finishing = (event, response.stripped)
            return before
        return before + (event.raw if response.stripped is event.data else event.replace(response.stripped))

    def _take_finishing(self, fingerprint: bytes = NULL) -> bytes:
        """The bytes of the held finishing event, with the fingerprint that it has where no usage event follows."""
        if self._finishing is None:
            return b""
        event, data = self._finishing
        self._finishing = None
        if fingerprint != NULL:
            data = JsonObject(data).edit({"system_fingerprint": fingerprint})
        return event.replace(data)

    def _record(self, response: _Response) -> None:
        tokens = self._tokens
        try:
            if response.body.has("usage"):
                tokens.usage = _usage.decode(response.body.raw("usage"))
            if tokens.failure is not None:
                return
            if not tokens.model:
                tokens.model = str(response.body.value("model") or "")
            choice = response.choice
            holder = response.body if self._chat else choice
            if holder is not None and holder.has("prompt_token_ids"):
                tokens.add_prompt(holder.raw("prompt_token_ids"))
            if choice is not None and choice.has("token_ids"):
                tokens.add(choice.raw("token_ids"), choice.raw("logprobs"), self._chat)
            if choice is not None and choice.has("finish_reason"):
                tokens.finish_reason = str(choice.value("finish_reason"))
        except MALFORMED:
            tokens.fail(ResponseFailure.NO_LOGPROBS)
