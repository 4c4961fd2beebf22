"""Requests and responses that are generated, and what is changed in them. All of it follows from a `Random`.

Every request has a token, a word that occurs nowhere else. It is in its target, in a field and all over its body, and
in the response to it; so whatever arrives at a wrong place tells where it comes from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from random import Random

from tests.bench.faults.fuzzing.reading import h11_response

TOKEN = re.compile(rb"t[0-9a-f]{16}")
PATHS = (b"/v1/chat/completions", b"/v1/completions", b"/v1/models", b"/v1/embeddings", b"/other")
METHODS = (b"POST", b"POST", b"POST", b"GET", b"PUT", b"DELETE", b"OPTIONS", b"HEAD")
FIELDS = (
    b"X-Hemostat-Shadow: off",
    b"Accept-Encoding: gzip, br",
    b"Authorization: Bearer abc",
    b"Connection: keep-alive",
    b"Connection: x-dropped\r\nX-Dropped: 1",
    b"Keep-Alive: 5",
    b"TE: trailers",
    b"X-A: 1\r\nX-A: 2",
    b"X-Empty:",
    b"User-Agent: \xe4\xb8\xad",
)
"""Of valid messages."""
LINES = (
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding:\tchunked",
    b"Transfer-Encoding : chunked",
    b"Transfer-Encoding:\r\n chunked",
    b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
    b"Content-Length: 0",
    b"Content-Length: 5",
    b"Content-Length: 300",
    b"Content-Length: +5",
    b"Content-Length: 5, 5",
    b"Content-Length: 99999999999999999999",
    b"Content-Length:5\r\nContent-Length:6",
    b"Host: b",
    b"Connection: close",
    b"Connection: content-length, transfer-encoding, host",
    b"Upgrade: websocket\r\nConnection: upgrade",
    b"Expect: 100-continue",
    b"Expect: x",
    b" folded",
    b"no colon",
    b"X\x00: a",
    b"X: a\x00b",
    b"X: a\rContent-Length: 3",
    b"X: a\nContent-Length: 3",
    b"\r\n",
    b"X: " + b"a" * 70_000,
    b"\r\n".join(b"X-%d: a" % n for n in range(140)),
)
"""That are put into a head."""
PIECES = (b"\r\n", b"\n", b"\r", b"\x00", b" ", b":", b"0\r\n\r\n", b"0", b"f", b"-1", b";", b"\r\n\r\n", b"HTTP/1.1")
"""That are put anywhere."""
CHUNK_SIZES = (
    b"-1",
    b"0x5",
    b"",
    b"g",
    b"5 ",
    b" 5",
    b"5\n",
    b"ffffffffffffffffffff",
    b"7fffffffffffffff",
    b"5;a=b;c",
    b"00005",
)
TRAILERS = (
    b"X-T: 1\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Host: b\r\n",
    b"Set-Cookie: a\r\n",
)


@dataclass(slots=True)
class Request:
    token: bytes
    method: bytes
    target: bytes
    body: bytes
    raw: bytes
    closes: bool
    """The client's connection ends with its response."""


@dataclass(slots=True)
class Conversation:
    """What one client sends on one connection."""

    requests: list[Request]
    data: bytes
    cuts: list[int]
    changed_from: int
    """The first request that was changed, or that follows one that was; the number of requests: none."""
    resets: bool
    """The client resets the connection after the last byte."""
    forwarded: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    """Method, target and body that the upstream got."""


@dataclass(slots=True)
class Answer:
    """The upstream's to one request."""

    data: bytes
    shown: tuple[int, bytes] | None
    """Status and body, by h11 where the response was changed; None: it is no response."""
    changed: bool
    """The client may get 502, or its connection may be cut, instead."""
    closes: bool
    cuts: list[int]
    end: int
    """How many bytes of `data` are the response; those beyond belong to none."""


def _body(random: Random, token: bytes) -> bytes:
    kind = random.random()
    if kind < 0.4:
        return b'{"model":"m","messages":[{"role":"user","content":"%b"}],"max_tokens":4}' % token
    inner = b"GET /smuggled?" + token + b" HTTP/1.1\r\nHost: a\r\n\r\n"
    filling = random.choice((b"<" + token + b">", inner, b"\r\n0\r\n\r\n" + token, b"\x00\xff" + token))
    return filling * (random.randrange(1, 400) if kind > 0.98 else random.randrange(1, 6))


def _chunked(random: Random, body: bytes, *, odd: bool = False) -> bytes:
    """odd: one size, or one trailer, is not valid."""
    out, at = [], 0
    while at < len(body):
        size = random.randrange(1, len(body) - at + 1)
        name = b"%0*x" % (random.choice((1, 1, 4)), size) + random.choice((b"", b"", b";x=1"))
        if odd and random.random() < 0.5:
            name, odd = random.choice(CHUNK_SIZES), False
        out.append(name + b"\r\n" + body[at : at + size] + b"\r\n")
        at += size
    out.append(b"0\r\n")
    if random.random() < 0.2:
        out += random.sample(TRAILERS, random.randrange(1, 3))
    out.append(b"\r\n")
    return b"".join(out)


def _cuts(random: Random, size: int) -> list[int]:
    """Where the bytes are cut into pieces."""
    if random.random() < 0.5:
        return []
    return sorted(random.randrange(size + 1) for _ in range(random.randrange(1, 6)))


def _change(random: Random, data: bytes) -> bytes:
    """One change to one message."""
    head = data.find(b"\r\n\r\n")
    kind = random.randrange(8)
    at = random.randrange(len(data))
    if kind <= 2 and head > 0:
        breaks = [m.start() for m in re.finditer(rb"\r\n", data[: head + 2])]
        at = random.choice(breaks)
        return data[:at] + b"\r\n" + random.choice(LINES) + data[at:]
    if kind == 3:
        return data[:at] + random.choice(PIECES) + data[at:]
    if kind == 4:
        return data[:at] + bytes((random.randrange(256),)) + data[at + 1 :]
    if kind == 5:
        return data[:at] + data[at + random.randrange(1, 9) :]
    if kind == 6:
        upto = min(len(data), at + random.randrange(1, 60))
        return data[:at] + data[at:upto] * 2 + data[upto:]
    return data[:at]


def request(random: Random, methods: tuple[bytes, ...] = METHODS) -> Request:
    token = b"t%016x" % random.getrandbits(64)
    method = random.choice(methods)
    body = b"" if method in {b"GET", b"HEAD"} or random.random() < 0.1 else _body(random, token)
    target = random.choice(PATHS) + b"?" + token
    minor = 0 if random.random() < 0.05 else 1
    lines = [b"Host: a", b"X-Token: " + token, *random.sample(FIELDS, random.randrange(3))]
    closes = minor == 0
    if random.random() < 0.05:
        lines.append(b"Connection: close")
        closes = True
    elif b"Connection: keep-alive" in lines:
        closes = False
    payload = body
    if body and minor and random.random() < 0.4:
        lines.append(b"Transfer-Encoding: chunked")
        payload = _chunked(random, body)
    elif body or random.random() < 0.1:
        lines.append(b"Content-Length: %d" % len(body))
    if body and minor and random.random() < 0.05:
        lines.append(b"Expect: 100-continue")
    random.shuffle(lines)
    shown = b"http://a" + target if random.random() < 0.05 else target
    raw = b"%b %b HTTP/1.%d\r\n" % (method, shown, minor) + b"\r\n".join((*lines, b"", payload))
    return Request(token, method, target, body, raw, closes)


def conversation(random: Random) -> Conversation:
    changes = random.random() < 0.6
    # Where a response is to HEAD cannot be told once the requests before it are changed.
    methods = METHODS[:-1] if changes else METHODS
    requests = [request(random, methods) for _ in range(random.randrange(1, 7))]
    for number, sent in enumerate(requests):
        if sent.closes:
            del requests[number + 1 :]
            break
    raws = [sent.raw for sent in requests]
    changed = len(requests)
    if changes:
        changed = random.randrange(len(requests))
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            raws[changed] = _change(random, raws[changed]) or b"\r\n"
    data = b"".join(raws)
    return Conversation(requests, data, _cuts(random, len(data)), changed, random.random() < 0.02)


def answer(random: Random, token: bytes, method: bytes) -> Answer:
    """The response to the request with this token."""
    status = random.choice((200, 200, 200, 200, 201, 204, 304, 400, 404, 500))
    bodyless = method == b"HEAD" or status in {204, 304}
    body = b"" if bodyless else _body(random, token)
    lines = [b"X-Token: " + token, b"Server: u", *random.sample((b"Set-Cookie: a", b"Keep-Alive: 5", b"X-B:  2 "), 1)]
    closes = odd = False
    framing = random.random()
    payload = body
    minor = 1
    if bodyless:
        if method == b"HEAD" and status not in {204, 304}:
            lines.append(b"Content-Length: 5")
    elif framing < 0.45:
        lines.append(b"Content-Length: %d" % len(body))
    elif framing < 0.9:
        lines.append(b"Transfer-Encoding: chunked")
        odd = random.random() < 0.1
        payload = _chunked(random, body, odd=odd)
    else:
        closes, minor = True, random.randrange(2)
    if random.random() < 0.05:
        lines.append(b"Connection: close")
        closes = True
    interim = random.choice(
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n", b"", b"", b"")
    )
    random.shuffle(lines)
    data = interim + b"HTTP/1.%d %d Some Reason\r\n" % (minor, status) + b"\r\n".join((*lines, b"", payload))
    if not odd and random.random() < 0.7:
        return Answer(data, (status, body), False, closes, _cuts(random, len(data)), len(data))
    for _ in range(random.choice((1, 1, 2)) if not odd else 0):
        data = _change(random, data) or b"\r\n"
    result = h11_response(data, method)
    shown, end = (None, len(data)) if result is None else (result[:2], result[2])
    return Answer(data, shown, True, True, _cuts(random, len(data)), end)
