"""OpenAI's chat and completions as vLLM speaks them, sans-IO: what to ask for, what comes back, how it is taken out.

Bodies are changed by splicing: an object is parsed for the spans of its members, and only the members in question get
new bytes. Everything else stays as the client, or vLLM, wrote it.

Checked against vLLM 0.32 (`entrypoints/openai/{chat_completion,completion}`):
- members that the injection fills (`logprobs`, `token_ids`, `prompt_token_ids`) are there without it too, as null;
- chat streams get an event with an empty delta for every step that the parser holds back, only because of it;
- with `include_usage`, `system_fingerprint` moves from the finishing event to the usage event.
"""

from __future__ import annotations

import math
import re
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hemostat.openai import sse
from hemostat_calibration.records import Sampling

_members: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])
_elements: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])
_any: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_ids: msgspec.json.Decoder[list[int]] = msgspec.json.Decoder(list[int])

_BEFORE_VALUE = re.compile(rb'[{,\s]*"(?:[^"\\]|\\.)*"\s*:\s*', re.DOTALL)
_ID_PREFIX = len("token_id:")
_NULL = b"null"

MALFORMED = (ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
"""What parsing somebody else's bytes can raise."""

MAX_BODY = 128 * 1024 * 1024
"""Bytes of one response (not a stream) that are held to be stripped."""


class JsonObject:
    """A JSON object's bytes with the spans of its members' values.

    Raises one of MALFORMED where the bytes are not an object, or where a key stands twice (parsers differ on which
    of the values counts).
    """

    __slots__ = ("_end", "_spans", "_values", "data")

    def __init__(self, data: bytes) -> None:
        values = _members.decode(data)
        position = data.index(b"{")
        spans: dict[str, tuple[int, int]] = {}
        for key, value in values.items():
            match = _BEFORE_VALUE.match(data, position)
            if match is None or not data.startswith(bytes(value), match.end()):
                raise ValueError(f"the key {key!r} stands twice")
            position = match.end() + len(memoryview(value))
            spans[key] = (match.end(), position)
        end = data.rindex(b"}")
        if data[position + (0 if spans else 1) : end].strip():
            raise ValueError("a key stands twice")
        self.data = data
        self._spans = spans
        self._values = values
        self._end = end

    def raw(self, key: str) -> bytes:
        """The value's bytes; `null` where the key is absent."""
        span = self._spans.get(key)
        return _NULL if span is None else self.data[span[0] : span[1]]

    def value(self, key: str) -> Any:
        """The decoded value; None where the key is absent."""
        raw = self._values.get(key)
        return None if raw is None else _any.decode(raw)

    def has(self, key: str) -> bool:
        """True where the key is there and not null."""
        span = self._spans.get(key)
        return span is not None and not self.data.startswith(_NULL, span[0])

    def edit(self, changes: Mapping[str, bytes]) -> bytes:
        """The object's bytes with these values: in place where the key is there, at the end where it is not."""
        parts: list[bytes] = []
        position = 0
        for key, (start, end) in self._spans.items():
            if key in changes:
                parts += (self.data[position:start], changes[key])
                position = end
        added = [encode(key) + b":" + value for key, value in changes.items() if key not in self._spans]
        if added:
            last = next(reversed(self._spans.values()))[1] if self._spans else self._end
            parts += (self.data[position:last], b"," if self._spans else b"", b",".join(added))
            position = last
        parts.append(self.data[position:])
        return b"".join(parts)


def error_reason(data: bytes) -> str:
    """What an error, as vLLM words it in a body or in a stream's event, is counted as."""
    return "logprobs_refused" if b"sample logprobs" in data else "upstream_error"


def stream_error(data: bytes) -> int | None:
    """The code of the error that a stream begins with (500 where it names none); 0 where it begins with something else,
    None while that cannot be told. vLLM's engine refuses a request so, after the head has gone out."""
    events = sse.Parser().feed(data)
    if not events:
        return None
    first = events[0].data
    if first is None or b'"error"' not in first:
        return 0
    try:
        body = JsonObject(first)
        if not body.has("error"):
            return 0
        code = body.value("error")["code"]
    except (*MALFORMED, LookupError, TypeError):
        return 500
    return code if isinstance(code, int) and code > 0 else 500


def encode(value: Any) -> bytes:
    """Compact JSON."""
    return msgspec.json.encode(value)


def error(message: str, param: str | None = None, code: int = 400) -> bytes:
    """A body in OpenAI's error shape, with vLLM's member order."""
    return encode({"error": {"message": message, "type": "BadRequestError", "param": param, "code": code}})


# --- requests ---------------------------------------------------------------------------------------------------------


class _Part(msgspec.Struct):
    type: str = ""


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(_NULL)


_messages: msgspec.json.Decoder[list[_Message]] = msgspec.json.Decoder(list[_Message])
_parts: msgspec.json.Decoder[list[_Part]] = msgspec.json.Decoder(list[_Part])


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


_stream_options: msgspec.json.Decoder[_StreamOptions | None] = msgspec.json.Decoder(_StreamOptions | None)

_STRUCTURED = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
_OWN_DETAILS = ("top_logprobs", "logprob_token_ids", "return_token_ids", "return_tokens_as_token_ids")
_SHIFTED = ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "presence_penalty", "frequency_penalty")
"""With `repetition_penalty`, what the engine plugin declines a profile for (its `xargs.edits_logits`): neither arm may
hold such a request."""
_OUR_XARGS = {"hemostat", "hemostat_tap"}


@dataclass(frozen=True, slots=True)
class Request:
    """What a client's body says."""

    chat: bool
    body: JsonObject
    model: str
    stream: bool
    usage_asked: bool
    """The client itself asked for usage in the stream."""
    tools: bool
    unscorable: str | None
    """Why its tokens cannot be scored: a short word for counting."""
    uncalibrated: str | None
    """Why no profile may be put on it."""
    own_profile: str | None
    """The profile that the client itself put among its xargs."""
    own_tap: bool
    conversation: bytes | None
    """The same for every turn of one conversation; None where none can be recognised."""
    prompt_tokens: int
    """At least so many; 0 where only the engine knows."""


def read(chat: bool, data: bytes, unscorable_models: frozenset[str] = frozenset()) -> Request:
    """Parse a client's body; raises one of MALFORMED where it is not an object with distinct keys."""
    body = JsonObject(data)
    model = body.value("model")
    stream_options = _lenient(_stream_options, body.raw("stream_options"))
    conversation = None
    messages: list[_Message] | None = None
    if chat:
        messages = _lenient(_messages, body.raw("messages"))
        if messages:
            conversation = _conversation(body, messages)
    unscorable = _unscorable(chat, body, messages, unscorable_models)
    xargs = body.value("vllm_xargs") or {}
    if (body.has("stream_options") and stream_options is None) or not isinstance(xargs, dict):
        unscorable, xargs = "invalid", {}
    own_profile = xargs.get("hemostat")
    prompt = None if chat else _lenient(_ids, body.raw("prompt"))
    return Request(
        chat=chat,
        body=body,
        model=model if isinstance(model, str) else "",
        stream=body.value("stream") is True,
        usage_asked=bool(stream_options and stream_options.include_usage),
        tools=body.has("tools"),
        unscorable=unscorable,
        uncalibrated="own_xargs" if own_profile is not None else _uncalibrated(body, unscorable),
        own_profile=own_profile if isinstance(own_profile, str) else None,
        own_tap="hemostat_tap" in xargs,
        conversation=conversation,
        prompt_tokens=len(prompt or ()),
    )


def _lenient(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """None where the value is not what it should be: vLLM says so better than we could."""
    try:
        return decoder.decode(raw)
    except MALFORMED:
        return None


def _conversation(body: JsonObject, messages: list[_Message]) -> bytes | None:
    for position, message in enumerate(messages):
        if message.role == "user":
            first = _elements.decode(body.raw("messages"))[: position + 1]
            return b"\x00".join([body.raw("model"), *map(bytes, first)])
    return None


def _unscorable(
    chat: bool, body: JsonObject, messages: list[_Message] | None, unscorable_models: frozenset[str]
) -> str | None:
    value = body.value
    if value("model") in unscorable_models:
        return "lora"
    if value("stream") not in (None, True, False):
        return "invalid"
    if value("use_beam_search"):
        return "beam_search"
    if value("n") not in (None, 1) or value("best_of") not in (None, 1):
        return "n"
    response_format = value("response_format")
    if response_format is not None and not (
        isinstance(response_format, dict) and response_format.get("type") == "text"
    ):
        return "structured_output"
    if any(body.has(key) for key in _STRUCTURED):
        return "structured_output"
    if value("tool_choice") not in (None, "none", "auto"):
        return "forced_tool"
    if value("echo"):
        return "echo"
    if body.has("prompt_logprobs"):
        return "prompt_logprobs"
    logprobs = value("logprobs")
    if (logprobs is not None and logprobs is not False) or any(value(key) for key in _OWN_DETAILS):
        return "client_logprobs"
    if value("include_reasoning") is False:
        # vLLM then hides the token ids of the reasoning.
        return "hidden_reasoning"
    if chat:
        if not messages:
            return "invalid"
        for message in messages:
            content = bytes(message.content)
            if content.startswith(b"[") and any(part.type != "text" for part in _lenient(_parts, content) or [_Part()]):
                return "multimodal"
        return None
    if body.has("prompt_embeds"):
        return "multimodal"
    prompt = body.raw("prompt")
    if prompt == _NULL:
        return "invalid"
    if prompt.startswith(b"[") and _lenient(_ids, prompt) is None:
        # Several prompts give several choices.
        return "n"
    return None


def _uncalibrated(body: JsonObject, unscorable: str | None) -> str | None:
    if unscorable in ("lora", "beam_search", "multimodal", "invalid"):
        return unscorable
    if _shifted(body):
        # The profile was measured on unshifted logits, and engines differ in what they apply first.
        return "own_logits"
    return None


def _shifted(body: JsonObject) -> bool:
    return any(body.value(key) for key in _SHIFTED) or body.value("repetition_penalty") not in (None, 1)


def with_xargs(request: Request, xargs: Mapping[str, str]) -> bytes:
    """The value of `vllm_xargs`: these added to the client's own, of which none is replaced."""
    own = request.body.raw("vllm_xargs")
    if own == _NULL:
        return encode(dict(xargs))
    members = JsonObject(own)
    return members.edit({key: encode(value) for key, value in xargs.items() if not members.has(key)})


def ask_for_tokens(request: Request, top_k: int) -> dict[str, bytes]:
    """The members that make vLLM return token ids, the `top_k` most likely ids and the usage."""
    changes = {"return_token_ids": b"true", "return_tokens_as_token_ids": b"true"}
    if request.chat:
        changes |= {"logprobs": b"true", "top_logprobs": encode(top_k)}
    else:
        changes["logprobs"] = encode(top_k)
    if request.stream and not request.usage_asked:
        # Not merged: without `include_usage` the client's other options have no effect, with it they would.
        changes["stream_options"] = b'{"include_usage":true}'
    return changes


def sampling_parameters(request: Request, changes: Mapping[str, bytes], openai_defaults: bool) -> Sampling:
    """The request's decoding parameters, with these changes.

    The temperature is NaN where what the tokens are drawn from is not known: where the client's other parameters shift
    it, and where it leaves a parameter out, for which vLLM takes the model's generation_config before OpenAI's default
    (no response tells). `openai_defaults`: it takes OpenAI's. A temperature of 0 is greedy whatever else is left out.
    """
    body = request.body
    changed = changes.get("temperature")
    given = body.value("temperature") if changed is None else float(changed)
    temperature = _number(given, 1.0)
    xargs = body.value("vllm_xargs")
    shifted = (
        _shifted(body)
        or any(body.has(key) for key in ("logits_processors", "thinking_token_budget"))
        or body.value("watermarking")
        or (isinstance(xargs, dict) and not xargs.keys() <= _OUR_XARGS)
    )
    complete = given is not None and all(body.has(key) for key in ("top_p", "top_k", "min_p", "repetition_penalty"))
    if shifted or not (temperature == 0.0 or openai_defaults or complete):
        temperature = math.nan
    return Sampling(
        temperature=temperature,
        top_p=_number(body.value("top_p"), 1.0),
        top_k=max(0, int(_number(body.value("top_k"), 0.0))),
        min_p=_number(body.value("min_p"), 0.0),
    )


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e9 else default


# --- responses --------------------------------------------------------------------------------------------------------


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
class Tokens:
    """What one response says about its tokens. Holds at most `limit` positions; then it gives up and empties itself."""

    top_k: int
    limit: int
    """Most prompt and output tokens together."""
    failure: str | None = None
    """The first thing that went wrong: a short word for counting."""
    prompt_ids: array[int] = field(default_factory=lambda: array("i"))
    output_ids: array[int] = field(default_factory=lambda: array("i"))
    candidate_ids: array[int] = field(default_factory=lambda: array("i"))
    """[T, top_k + 1], most likely first, -1 pads; the emitted token is among them."""
    candidate_logprobs: array[float] = field(default_factory=lambda: array("f"))
    """[T, top_k + 1], nats, -inf pads."""
    emitted_logprobs: array[float] = field(default_factory=lambda: array("f"))
    finish_reason: str = ""
    model: str = ""
    usage: _Usage | None = None

    def fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            for values in (self.prompt_ids, self.output_ids, self.candidate_ids):
                del values[:]
            for floats in (self.candidate_logprobs, self.emitted_logprobs):
                del floats[:]

    def add_prompt(self, raw: bytes) -> None:
        self.prompt_ids.extend(_ids.decode(raw))
        self._check_length()

    def add(self, ids: bytes, logprobs: bytes, chat: bool) -> None:
        """Positions of one event or response: JSON of the ids, and of the logprobs in the route's form."""
        output = _ids.decode(ids)
        if not output:
            return
        if logprobs == _NULL:
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
            raise ValueError(f"the token {emitted} is called {token!r} among the logprobs")
        ids = [int(name[_ID_PREFIX:]) for name in names]
        if emitted not in ids:
            ids.append(emitted)
            values.append(logprob)
        # The emitted token comes first, whatever its rank.
        if values != sorted(values, reverse=True):
            order = sorted(range(len(ids)), key=values.__getitem__, reverse=True)
            ids = [ids[i] for i in order]
            values = [values[i] for i in order]
        pad = self.top_k + 1 - len(ids)
        if pad < 0 or len(set(ids)) < len(ids):
            raise ValueError(f"not {self.top_k} different candidates: {ids}")
        self.candidate_ids.extend(ids)
        self.candidate_logprobs.extend(values)
        if pad:
            self.candidate_ids.extend(pad * (-1,))
            self.candidate_logprobs.extend(pad * (float("-inf"),))
        self.emitted_logprobs.append(logprob)

    def _check_length(self) -> None:
        if len(self.prompt_ids) + len(self.output_ids) > self.limit:
            self.fail("too_long")

    def conclude(self, tools: bool) -> None:
        """Check the counts against the engine's own; after this `failure` is final."""
        if self.failure is not None:
            return
        usage = self.usage
        if usage is None or not self.finish_reason:
            self.fail("incomplete")
        elif usage.completion_tokens != len(self.output_ids):
            self.fail("tool_tokens_lost" if tools else "token_count_mismatch")
        elif usage.prompt_tokens != len(self.prompt_ids):
            self.fail("token_count_mismatch")
        elif not self.output_ids:
            self.fail("empty")


class Stripper:
    """One sampled response on its way to the client: takes out what was injected, and notes it in `tokens`.

    Never raises: what it does not understand goes on as it came, and the tokens are given up by reason. `stream` is
    what the response is, by its content type, whatever was asked for.
    """

    def __init__(self, request: Request, tokens: Tokens, *, stream: bool) -> None:
        self._chat = request.chat
        self._tokens = tokens
        self._tools = request.tools
        self._keep_usage = request.usage_asked
        self._events = sse.Parser() if stream else None
        self._body = bytearray()
        self._opaque = False
        """The body outgrew MAX_BODY and goes through as it comes."""
        self._finishing: tuple[sse.Event, bytes] | None = None
        """The finishing event and its stripped data: the usage event that follows has its fingerprint."""

    def feed(self, data: bytes) -> bytes:
        """Body bytes as they come; returns what the client gets now."""
        if self._events is not None:
            return b"".join([self._event(event) for event in self._events.feed(data)])
        if self._opaque:
            return data
        self._body += data
        if len(self._body) <= MAX_BODY:
            return b""
        self._opaque = True
        self._tokens.fail("response_too_large")
        held = bytes(self._body)
        self._body.clear()
        return held

    def finish(self) -> bytes:
        """The response is complete; returns what is still owed."""
        if self._events is not None:
            rest = self._events.flush()
            owed = (self._event(sse.parse(rest)) if rest else b"") + self._release()
        elif self._opaque:
            owed = b""
        else:
            data = bytes(self._body)
            try:
                response = _Response(data)
                self._note(response)
                owed = response.stripped
            except MALFORMED:
                self._tokens.fail("unreadable")
                owed = data
        self._tokens.conclude(self._tools)
        return owed

    def _event(self, event: sse.Event) -> bytes:
        if event.data is None:
            return event.raw
        if event.data == b"[DONE]":
            return self._release() + event.raw
        try:
            response = _Response(event.data)
            self._note(response)
        except MALFORMED:
            self._tokens.fail("unreadable")
            return self._release() + event.raw
        choice, usage = response.choice, response.body.has("usage")
        if choice is None:
            if response.body.has("error"):
                self._tokens.fail(error_reason(event.data))
            elif usage and not self._keep_usage:
                return self._release(response.body.raw("system_fingerprint"))
            return self._release() + event.raw
        if usage:
            # A server that always sends usage would have sent the last event, too.
            self._keep_usage = True
        finishing = choice.has("finish_reason")
        if self._chat and not finishing and choice.raw("delta") == b"{}":
            # A step that the parser held back: without the injection vLLM sends nothing.
            return self._release()
        before = self._release()
        if finishing and not self._keep_usage:
            self._finishing = (event, response.stripped)
            return before
        return before + (event.raw if response.stripped is event.data else event.replace(response.stripped))

    def _release(self, fingerprint: bytes = _NULL) -> bytes:
        """The finishing event, with the fingerprint that it has when no usage event follows."""
        if self._finishing is None:
            return b""
        event, data = self._finishing
        self._finishing = None
        if fingerprint != _NULL:
            data = JsonObject(data).edit({"system_fingerprint": fingerprint})
        return event.replace(data)

    def _note(self, response: _Response) -> None:
        tokens = self._tokens
        if tokens.failure is not None:
            return
        try:
            if response.body.has("usage"):
                tokens.usage = _usage.decode(response.body.raw("usage"))
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
            tokens.fail("no_logprobs")


_INJECTED = ("logprobs", "token_ids", "prompt_token_ids")


class _Response:
    """A response's JSON, or a stream event's: as it came, its one choice, and its bytes without what was injected."""

    __slots__ = ("body", "choice", "stripped")

    def __init__(self, data: bytes) -> None:
        self.body = JsonObject(data)
        self.choice: JsonObject | None = None
        changes: dict[str, bytes] = {}
        choices = self.body.raw("choices")[1:-1]
        if self.body.has("choices") and choices.strip():
            # Malformed where there are several: only one is ever asked for.
            self.choice = choice = JsonObject(choices)
            inner = {key: _NULL for key in _INJECTED if choice.has(key)}
            if inner:
                changes["choices"] = b"[" + choice.edit(inner) + b"]"
        if self.body.has("prompt_token_ids"):
            changes["prompt_token_ids"] = _NULL
        self.stripped = self.body.edit(changes) if changes else data
