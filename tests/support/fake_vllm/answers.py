"""What every route of the fake vLLM needs of HTTP: JSON as vLLM writes it, errors, answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
DONE = b"data: [DONE]\n\n"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def error_event(body: dict[str, Any]) -> bytes:
    """With json.dumps's own separators, as vLLM writes it."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class RefusedError(Exception):
    def __init__(self, message: str, param: str | None, kind: str = "BadRequestError", code: int = 400) -> None:
        super().__init__(message)
        self.status = code
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def answer(send: Send, status: int, value: Any, replaced: bytes | None = None) -> None:
    """replaced: the body, instead of `value`."""
    data = b"" if value is None else value.encode() if isinstance(value, str) else dumps(value)
    data = data if replaced is None else replaced
    headers = [(b"content-length", str(len(data)).encode())]
    if value is not None:
        headers.append((b"content-type", b"application/json"))
    await start(send, status, headers)
    await send({"type": "http.response.body", "body": data})
