"""The form in which a client asked for an answer (JSON, tool calls), and whether an answer has it.

Everything is bounded, since it runs on the relay's event loop with what a client sent: see MAX_* here and in
`schema_check`. What is beyond a limit is judged by less: that it parses.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any, Final, NoReturn

import msgspec

from hemostat.relay.schema_check import MAX_SCHEMA_BYTES, Schema, Steps

MAX_ANSWER_BYTES: Final = 64 * 1024
"""A longer answer is judged only by whether the whole of it parses."""
MAX_CALLS: Final = 16
"""The largest number of tool calls of one answer that are judged."""
_MAX_STARTS: Final = 4
"""The largest number of places in a text at which JSON may begin."""
_MAX_READ_AGAIN: Final = 8 * 1024
"""The largest number of characters that may be read before a further such place is tried."""


class _Function(msgspec.Struct):
    name: str = ""
    parameters: msgspec.Raw = msgspec.Raw(b"")


class _Tool(msgspec.Struct):
    """A tool that a request offers: in a chat within `function`, in `/v1/responses` and `/v1/messages` without it."""

    function: _Function | None = None
    name: str = ""
    parameters: msgspec.Raw = msgspec.Raw(b"")
    input_schema: msgspec.Raw = msgspec.Raw(b"")

    @property
    def offered(self) -> tuple[str, bytes] | None:
        """Its name, and the JSON schema of its parameters (empty: any)."""
        if self.function is not None:
            return self.function.name, _given(self.function.parameters)
        return (self.name, _given(self.parameters) or _given(self.input_schema)) if self.name else None


class _JsonSchema(msgspec.Struct):
    schema: msgspec.Raw = msgspec.Raw(b"")


class _ResponseFormat(msgspec.Struct):
    """The `response_format` of a request. In `/v1/responses` and `/v1/messages` it has `schema` instead of
    `json_schema`.
    """

    type: str = ""
    json_schema: _JsonSchema | None = None
    schema: msgspec.Raw = msgspec.Raw(b"")


class _Output(msgspec.Struct):
    format: _ResponseFormat | None = None


class _StructuredOutputs(msgspec.Struct):
    json: msgspec.Raw = msgspec.Raw(b"")
    json_object: bool | None = None


class _Body(msgspec.Struct):
    response_format: _ResponseFormat | None = None
    structured_outputs: _StructuredOutputs | None = None
    guided_json: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")
    text: _Output | None = None
    """The form of the answer in `/v1/responses`."""
    output_config: _Output | None = None
    """The form of the answer in `/v1/messages`."""


_body: Final[msgspec.json.Decoder[_Body]] = msgspec.json.Decoder(_Body)
_tools: Final[msgspec.json.Decoder[list[_Tool]]] = msgspec.json.Decoder(list[_Tool])
_any: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder()
_ERRORS: Final = (msgspec.MsgspecError, UnicodeError, RecursionError)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_prefix: Final = json.JSONDecoder(parse_constant=_refuse)


class AnswerFormat:
    """The form that a request asks its answer to have.

    json: the answer is to be JSON, by a parameter or (in_words) by the prompt. tools: the request offers tools.
    """

    __slots__ = ("_offered", "_schema", "in_words", "json", "tools")

    def __init__(self, *, in_words: bool = False, schema: bytes | None = None, offered: bytes = b"") -> None:
        """schema: JSON, b"" for JSON of any schema, None for no JSON in a parameter. offered: JSON of `tools`."""
        self.in_words = in_words
        self.json = in_words or schema is not None
        self.tools = bool(offered)
        self._schema = schema or b""
        self._offered = offered

    @classmethod
    def read(cls, body: bytes, *, in_words: bool) -> AnswerFormat:
        """Returns the form that a request's body asks for. What is malformed counts as absent: vLLM explains it to the
        client."""
        try:
            read = _body.decode(body)
        except _ERRORS:
            return cls(in_words=in_words)
        schema: bytes | None = None
        asked, outputs = read.response_format, read.structured_outputs
        for other in (read.text, read.output_config):
            asked = asked or (None if other is None else other.format)
        if asked is not None and asked.type == "json_object":
            schema = b""
        elif asked is not None and asked.type == "json_schema":
            schema = bytes(asked.schema) if asked.json_schema is None else bytes(asked.json_schema.schema)
        elif outputs is not None and (outputs.json_object or _given(outputs.json)):
            schema = _given(outputs.json)
        elif _given(read.guided_json):
            schema = _given(read.guided_json)
        # Copies: a piece of the body would keep the whole of it in memory.
        offered = _given(read.tools)
        if len(offered) > MAX_SCHEMA_BYTES:
            offered = b"[]"
        if schema is not None and len(schema) > MAX_SCHEMA_BYTES:
            schema = b""
        return cls(in_words=in_words and schema is None, schema=schema, offered=offered)

    def is_json(self, text: str) -> bool:
        """Returns True if the text is the JSON that was asked for. If JSON was asked for in words, it is enough that
        the text contains it.
        """
        value = _find(text) if self.in_words else _decode(text)
        if value is _NOTHING:
            return False
        if not self._schema or len(text) > MAX_ANSWER_BYTES:
            return True
        return Schema(self._schema).fits(value, Steps()) is not False

    def calls_fit(self, calls: Iterable[tuple[str, str]]) -> bool:
        """Returns True if all tool calls (name, arguments) parse, and fit the parameters of a tool that was offered."""
        offered = self._tools_by_name()
        schemas: dict[str, Schema] = {}
        steps, size = Steps(), 0
        for name, arguments in itertools.islice(calls, MAX_CALLS):
            value = _decode(arguments)
            if value is _NOTHING or (offered and name not in offered):
                return False
            size += len(arguments)
            if not offered or size > MAX_ANSWER_BYTES:
                continue
            if name not in schemas:
                schemas[name] = Schema(offered[name])
            if schemas[name].fits(value, steps) is False:
                return False
        return True

    def _tools_by_name(self) -> dict[str, bytes]:
        """Returns the tools' parameters; empty where they are too long or malformed, so that any tool may be called."""
        try:
            tools = _tools.decode(self._offered)
        except _ERRORS:
            return {}
        return {name: schema or b"true" for name, schema in filter(None, (tool.offered for tool in tools))}


_NOTHING: Final = object()


def _given(raw: msgspec.Raw) -> bytes:
    value = bytes(raw)
    return b"" if value == b"null" else value


def _decode(text: str) -> Any:
    try:
        return _any.decode(text)
    except msgspec.ValidationError:
        pass  # JSON, with a number of more than 64 bits
    except _ERRORS:
        return _NOTHING
    try:
        return _prefix.decode(text)
    except (ValueError, RecursionError):
        return _NOTHING


def _find(text: str) -> Any:
    """Returns the decoded JSON of an answer: of the whole text, of a fenced block, or of what begins at one of the
    first braces or brackets.
    """
    whole = _decode(text)
    if whole is not _NOTHING or len(text) > MAX_ANSWER_BYTES:
        return whole
    _, fence, rest = text.partition("```")
    if fence:
        block = rest.partition("```")[0]
        # The first line may name the language.
        for candidate in (block, block.partition("\n")[2]):
            result = _decode(candidate)
            if result is not _NOTHING:
                return result
    at, read = -1, 0
    for _ in range(_MAX_STARTS):
        at = min((p for p in (text.find("{", at + 1), text.find("[", at + 1)) if p >= 0), default=-1)
        if at < 0 or read > _MAX_READ_AGAIN:
            break
        try:
            return _prefix.raw_decode(text, at)[0]
        except json.JSONDecodeError as error:
            read += error.pos - at
        except (ValueError, RecursionError):
            break
    return _NOTHING
