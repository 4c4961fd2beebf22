"""Protocol errors, by whose fault they are, and the error responses that the relay itself sends.

BadRequest   the client's fault: it gets an error response, and its connection is closed
BadResponse  the upstream's fault: the client gets a 502
"""

from __future__ import annotations

import json
from typing import Final


class BadRequest(Exception):
    """The client's fault: answer with `status`, and close the connection."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


class BadResponse(Exception):
    """A protocol error that is the upstream's fault."""


RETRY_AFTER_SECONDS: Final = 1
"""The time after which a client may try again that was refused because a limit of the relay is reached, or because the
upstream failed."""


_REASONS: Final = {
    400: b"Bad Request",
    403: b"Forbidden",
    408: b"Request Timeout",
    413: b"Content Too Large",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    505: b"HTTP Version Not Supported",
}


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """Returns JSON in OpenAI's error shape."""
    kind = "invalid_request_error" if status < 500 else "api_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def error_response(status: int, body: bytes, *, fields: bytes = b"", bodyless: bool = False) -> bytes:
    """Returns a response of the relay's own.

    fields: whole field lines, each with its CRLF, or b"". bodyless: it answers a HEAD request. A 502 or
    503 says when to try again.
    """
    if status in {502, 503}:
        fields += b"Retry-After: %d\r\n" % RETRY_AFTER_SECONDS
    head = b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n" % (
        status,
        _REASONS.get(status, b"Error"),
        len(body),
        fields,
    )
    return head if bodyless else head + body
