"""Errors in OpenAI's shape: those that Hemostat answers with, and those that vLLM sends in a body or in a stream."""

from __future__ import annotations

from hemostat.openai import sse
from hemostat.openai.json_splice import MALFORMED, JsonObject, encode


def error_body(message: str, param: str | None = None, code: int = 400) -> bytes:
    """A response body with an error, its members in vLLM's order. `code` is the HTTP status."""
    return encode({"error": {"message": message, "type": "BadRequestError", "param": param, "code": code}})


def leading_error_code(data: bytes) -> int | None:
    """The code of the error that an event stream begins with (500 where the error has no code).

    0: it begins with something else. None: `data`, the beginning of the stream, is too short to decide. vLLM's engine
    refuses a request in this way when the response's head has already been sent.
    """
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
        code = JsonObject(body.raw("error")).value("code")
    except MALFORMED:
        return 500
    return code if isinstance(code, int) and code > 0 else 500
