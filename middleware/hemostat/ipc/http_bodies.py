"""Bodies of HTTP answers, read with a bound: one piece for every client of ours.

A server that is wrong, or another one behind the same address, may send gigabytes, or a few kilobytes that decompress
to them. So clients ask for answers that are not compressed, and refuse one that is: then the bytes that come are the
bytes that are kept.
"""

from __future__ import annotations

import httpx

IDENTITY = {"accept-encoding": "identity"}
"""The headers of every request whose answer is read here."""


class AnswerRefused(Exception):
    """The answer was not read to its end; the text says why."""


class AnswerTooLarge(AnswerRefused):
    """It is longer than its bound."""


class AnswerBody:
    """Collects a body of at most `limit` bytes, without its first `skip` bytes.

    Raises AnswerTooLarge as soon as it is known to be longer, and AnswerRefused if it is compressed.

    >>> body = AnswerBody(httpx.Headers(), limit=6, skip=2)
    >>> body.feed(b"abc"), body.feed(b"def"), body.bytes
    (None, None, b'cdef')
    >>> body.feed(b"g")
    Traceback (most recent call last):
        ...
    hemostat.ipc.http_bodies.AnswerTooLarge: an answer of more than 6 bytes
    """

    def __init__(self, headers: httpx.Headers, limit: int, skip: int = 0) -> None:
        self._limit = limit
        self._skip = skip
        self._kept = bytearray()
        self.length = 0
        """The number of bytes so far, with those that are skipped."""
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            raise AnswerRefused(f"an answer in the encoding {encoding[:40]!r}, which was not asked for")
        announced = headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise self._too_large()

    def feed(self, data: bytes) -> None:
        before = self.length
        self.length += len(data)
        if self.length > self._limit:
            self._kept.clear()
            raise self._too_large()
        self._kept += memoryview(data)[max(0, self._skip - before) :] if before < self._skip else data

    @property
    def bytes(self) -> bytes:
        return bytes(self._kept)

    def _too_large(self) -> AnswerTooLarge:
        return AnswerTooLarge(f"an answer of more than {self._limit} bytes")


async def read_answer(response: httpx.Response, limit: int, skip: int = 0) -> bytes:
    """Returns the body of a response of `AsyncClient.stream`, as `AnswerBody` reads it."""
    body = AnswerBody(response.headers, limit, skip)
    async for data in response.aiter_raw():
        body.feed(data)
    return body.bytes


def read_answer_now(response: httpx.Response, limit: int) -> bytes:
    """Returns the body of a response of `Client.stream`, as `AnswerBody` reads it."""
    body = AnswerBody(response.headers, limit)
    for data in response.iter_raw():
        body.feed(data)
    return body.bytes
