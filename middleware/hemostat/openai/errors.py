"""Errors in OpenAI's shape: those that Hemostat answers with, and those that vLLM sends in a body or in a stream."""

from __future__ import annotations

from hemostat.openai import sse
from hemostat.openai.json_splice import MALFORMED, JsonObject, encode


def error_body(message: str, param: str | None = None, code: int = 400) -> bytes:
    """Returns a response body with an error, its members in vLLM's order. `code` is the HTTP status."""
    return encode({"error": {"message": message, "type": "BadRequestError", "param": param, "code": code}})


class LeadingError:
    """Finds out which error an event stream begins with. vLLM's engine refuses a request in this way when the
    response's head has already been sent."""

    def __init__(self) -> None:
        self._events = sse.Parser()

    def feed(self, data: bytes) -> int | None:
        """Takes the next bytes of the stream. Returns the code of the error, 500 if the error has none, and 0 if the
        stream begins with something else; None while that is not known. Nothing is fed after that."""
        events = self._events.feed(data)
        return _error_code(events[0]) if events else None


def _error_code(event: sse.Event) -> int:
    first = event.data
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
