"""The ending of each generation: finish reason, length, repetition loops, and whether requested JSON or tool calls
parse.

It is observed for every generation, sampled or not, and counted by arm. A divergence between two models does not say
which text is better (arXiv 2606.19558); these counters are a cheap indication of quality.

For a request in an arm of a comparison more is judged (`ResponseOutcome.bad`): whether JSON that was asked for in
words, or by a schema, and tool calls are what was asked for. An answer that ends early, because the client gives it up
or the engine fails, is an outcome of its arm, too.

Memory is bounded: while a response passes, only its last bytes are kept (the whole of it, up to MAX_WHOLE_BYTES, where
structured output was requested). They are evaluated when the response ends, and then discarded.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

import msgspec

from hemostat.ipc import ends
from hemostat.metrics import names
from hemostat.openai.repetition import ends_in_loop
from hemostat.openai.routes import Form
from hemostat.relay.answer_format import AnswerFormat
from hemostat.relay.answers import Choice, Response, parse, tail_of
from hemostat_calibration.outcomes import Outcome

FINISH_REASONS: Final = frozenset(
    {"stop", "length", "tool_calls", "function_call", "content_filter", "abort", "error", "repetition"}
)
"""The values of finish_reason with a label value of their own; all others are counted as `other`."""

MAX_WHOLE_BYTES: Final = 256 * 1024
"""A response up to this size is kept whole; of a longer one only the tail is kept."""
MAX_TAIL_PIECES: Final = 64
MAX_PIECE_BYTES: Final = 4096
"""The tail: the last MAX_TAIL_PIECES pieces as they arrived, the last MAX_PIECE_BYTES bytes of each."""

MAX_JSON_WORDS: Final = 4000
"""The largest number of places with the word json in a request's body at which a parameter that asks for JSON is looked
for.
"""

_TOKENS: Final = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,9})(?!\d)')
# Inside a JSON string a quote is preceded by a backslash, so text written by a user does not match these.
# Both patterns begin with letters: the search for a quotation mark would stop at each one in the body.
_JSON_REQUESTED: Final = re.compile(rb'json((?<="json)(?:_object"|_schema"|":)|(?<="guided_json)")?')
"""The pattern of the word json. Group 1 is there if the word is the name, or the value, that asks for JSON."""
_TOOLS_REQUESTED: Final = re.compile(rb'tools"(?<="tools"):\s*\[')
_CALLS: Final = re.compile(rb'"(?:tool_calls|function_call)":\s*[\[{]\s*[{"]|"type":\s*"(?:tool_use|function_call)"')
_MODEL: Final = re.compile(rb'"model":\s*"((?:[^"\\]|\\.){1,200})"')

EARLY_ENDS: Final = {ends.CLIENT_GONE: Outcome.GIVEN_UP, ends.UPSTREAM_FAILED: Outcome.BROKEN_OFF}
"""The ends of an exchange before its response is complete, of which the arms are compared. The others are answers of
the relay's own, which it gives for reasons that do not depend on the arm."""
_OF_ANY_ANSWER: Final = (Outcome.LOOP, Outcome.CUT, Outcome.EMPTY, Outcome.GIVEN_UP, Outcome.BROKEN_OFF)
"""The outcomes that apply to the answer of any request."""
# Module globals, since Python computes the value of an enumeration's member anew each time.
_NOT_BAD: Final = {outcome.value: False for outcome in _OF_ANY_ANSWER}
_LOOP: Final = Outcome.LOOP.value
_CUT: Final = Outcome.CUT.value
_EMPTY: Final = Outcome.EMPTY.value
_BROKEN_OFF: Final = Outcome.BROKEN_OFF.value
_JSON: Final = Outcome.JSON.value
_TOOL_CALL: Final = Outcome.TOOL_CALL.value

Count = Callable[[str, tuple[str, ...], float], None]
"""An increment of a counter: (metric, label values, increment)."""


class ResponseOutcome:
    """The outcome of a response: how it ended."""

    __slots__ = ("bad", "finish_reasons", "output_tokens", "usage_tokens")

    def __init__(
        self,
        finish_reasons: tuple[str, ...],
        output_tokens: int | None,
        usage_tokens: int | None,
        bad: dict[str, bool] | None,
    ) -> None:
        self.finish_reasons = finish_reasons
        self.output_tokens = output_tokens
        """The number of tokens by the response's usage, or else by the stream's events; None: unknown."""
        self.usage_tokens = usage_tokens
        """The number of tokens by the response's usage alone; None: the response gives none."""
        self.bad = bad
        """The answer to "is it bad?" by outcome (`hemostat_calibration.outcomes.Outcome`), as far as an outcome applies
        to the request and is known. None if the request is in no arm.
        """


NO_OUTCOME: Final = ResponseOutcome((), None, None, None)
_any: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder()


class OutcomeObserver:
    """Observes one request and its response.

    Call `feed_request` with the request's body, `begin_response`, `feed_response` with the response's body as the
    client gets it (HTTP chunk sizes may stand between the bytes), then `finish` once.
    """

    __slots__ = (
        "_form",
        "_format",
        "_pieces",
        "_size",
        "_whole",
        "body",
        "disabled",
        "events",
        "json",
        "stream",
        "tools",
    )

    def __init__(self, form: Form) -> None:
        """form: of the request and the response."""
        self._form = form
        self.json = False
        """It is True if JSON output was requested."""
        self.tools = False
        """It is True if the request offers tools."""
        self.body = b""
        """The first piece of the request's body, in which `model` is looked for."""
        self.events = 0
        """The number of server-sent events with data so far."""
        self.stream = False
        self.disabled = False
        """It is True if the response is an error, or is compressed: there is nothing to evaluate."""
        self._format: AnswerFormat | None = None
        """The form of the answer that a request in an arm asks for."""
        self._pieces: deque[bytes] = deque()
        self._size = 0
        """The number of bytes in `_pieces`, while `_whole`."""
        self._whole = True
        """It is True while `_pieces` holds the whole response, not only its tail."""

    def feed_request(self, body: bytes) -> None:
        self.body = self.body or body
        # `find`, since `in` makes an exception each time (see `openai.kinds`).
        self.json = self.json or (body.find(b"json") >= 0 and _requests_json(body))
        self.tools = self.tools or (body.find(b'tools"') >= 0 and _TOOLS_REQUESTED.search(body) is not None)

    def compare(self, body: bytes, *, json_in_words: bool) -> None:
        """Notes that the request is in an arm. body: the whole of it."""
        if self.json or self.tools or json_in_words:
            self._format = AnswerFormat.read(body, in_words=json_in_words)
        else:
            self._format = AnswerFormat()

    @property
    def model(self) -> str | None:
        """The request's model, if the first piece of the body names it."""
        match = _MODEL.search(self.body)
        return None if match is None else match[1].decode("utf-8", "replace")

    def begin_response(self, *, stream: bool) -> None:
        """Prepares for the response's bytes. stream: the response consists of server-sent events."""
        self.stream = stream
        if stream and not (self.json or self.tools or (self._format is not None and self._format.json)):
            self._keep_tail_only()

    def feed_response(self, data: bytes) -> None:
        if self.disabled:
            return
        if self.stream:
            self.events += data.count(b"data: {")
        if not self._whole:
            self._pieces.append(data if len(data) <= MAX_PIECE_BYTES else data[-MAX_PIECE_BYTES:])
            return
        self._pieces.append(data)
        self._size += len(data)
        if self._size > MAX_WHOLE_BYTES:
            self._keep_tail_only()

    def _keep_tail_only(self) -> None:
        self._whole = False
        self._pieces = deque((piece[-MAX_PIECE_BYTES:] for piece in self._pieces), MAX_TAIL_PIECES)

    def finish(self, arm: str, count: Count) -> ResponseOutcome:
        """Evaluates the response that has ended, counts it under the request's arm, and returns its outcome."""
        if self.disabled:
            return NO_OUTCOME
        data = b"".join(self._pieces)
        self._pieces.clear()
        return self._judge(data, arm, count)

    def end_early(self, ended: Outcome, *, streamed: bool, arm: str, count: Count) -> ResponseOutcome:
        """Evaluates, and returns, the outcome of a request in an arm whose exchange has ended before the response was
        complete.

        ended: GIVEN_UP or BROKEN_OFF. streamed: the request asked for a stream; then nothing is known of the answer
        before its first token. A client may close its connection at the answer's last event: the answer is complete.
        """
        if self.disabled or self._format is None or (streamed and not self.events):
            return NO_OUTCOME
        data = b"".join(self._pieces)
        self._pieces.clear()
        reasons, text = tail_of(data, self._form)
        if reasons:
            return self._judge(data, arm, count)
        bad = dict(_NOT_BAD)
        bad[ended.value] = True
        bad[_LOOP] = ends_in_loop(text)
        if self._format.json:
            bad[_JSON] = False
        if self._format.tools:
            bad[_TOOL_CALL] = False
        return ResponseOutcome((), self.events or None, None, bad)

    def _judge(self, data: bytes, arm: str, count: Count) -> ResponseOutcome:
        """Returns the outcome of a complete answer. data: the response, or its tail."""
        response = parse(data, self._form, stream=self.stream) if self._whole else None
        if response is None:
            reasons, text = tail_of(data, self._form)
            counted = _TOKENS.findall(data)
            used = int(counted[-1]) if counted else None
            texts = [text]
        else:
            reasons = [c.finish_reason for c in response.choices if c.finish_reason]
            used = response.usage.completion_tokens if response.usage else None
            texts = [choice.whole_text for choice in response.choices]
            self._count_structured(response, arm, count)
        tokens = self.events if used is None else used
        for reason in reasons:
            count(names.RESPONSES_FINISHED, (arm, reason if reason in FINISH_REASONS else "other"), 1.0)
        if tokens:
            count(names.OUTPUT_TOKENS, (arm,), float(tokens))
        loop = any(map(ends_in_loop, texts))
        if loop:
            count(names.REPETITION_LOOPS, (arm,), 1.0)
        bad = None if self._format is None else self._bad(self._format, response, data, texts, reasons, loop=loop)
        return ResponseOutcome(tuple(reasons), tokens or None, used, bad)

    def _bad(
        self,
        asked: AnswerFormat,
        response: Response | None,
        data: bytes,
        texts: list[str],
        reasons: list[str],
        *,
        loop: bool,
    ) -> dict[str, bool]:
        """Returns which outcomes are bad. Only the first of several choices is judged. response: None if only the tail
        `data` of it is known.
        """
        bad = dict(_NOT_BAD)
        bad[_LOOP], bad[_CUT] = loop, "length" in reasons
        bad[_BROKEN_OFF] = not reasons
        if response is None:
            blank = all(text.isspace() or not text.replace("\\n", "").strip() for text in texts)
            bad[_EMPTY] = blank and _CALLS.search(data) is None
            if asked.json and (loop or "length" in reasons):
                bad[_JSON] = True  # too long to be parsed here, and not ended
            return bad
        choice = response.choices[0] if response.choices else Choice()
        calls = choice.calls
        bad[_EMPTY] = not calls and not choice.whole_text.strip()
        if asked.json:
            bad[_JSON] = not calls and not asked.is_json(choice.whole_text)
        if asked.tools:
            named = ((call.function.name or "", call.function.arguments or "") for call in calls if call.function)
            bad[_TOOL_CALL] = not asked.calls_fit(named)
        return bad

    def _count_structured(self, response: Response, arm: str, count: Count) -> None:
        for choice in response.choices:
            truncated = choice.finish_reason == "length"
            calls = choice.calls
            for call in calls:
                arguments = (call.function.arguments if call.function else None) or ""
                count(names.STRUCTURED_OUTPUTS, (arm, "tool_call", _json_outcome(arguments, truncated)), 1.0)
            if self.json and not calls:
                count(names.STRUCTURED_OUTPUTS, (arm, "json", _json_outcome(choice.whole_text, truncated)), 1.0)


def _requests_json(body: bytes) -> bool:
    return any(word[1] for word in islice(_JSON_REQUESTED.finditer(body), MAX_JSON_WORDS))


def _json_outcome(text: str, truncated: bool) -> str:
    try:
        _any.decode(text)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError):
        return "cut" if truncated else "invalid"
    return "valid"
