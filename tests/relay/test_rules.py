"""The rules of HTTP, with h11 and llhttp as oracles: all of them read an accepted request in the same way."""

from __future__ import annotations

import asyncio
import contextlib

import h11
import httptools
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.support.relay import Request, answering, relaying
from tests.support.slow import examples

from hemostat.ipc.origin import parse_origin
from hemostat.relay.http.errors import BadRequest, BadResponse, error_body
from hemostat.relay.http.framing import CHUNKED, ChunkedReader, chunk
from hemostat.relay.http.request import parse_request
from hemostat.relay.http.response import parse_response

START = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
TRAILERS = [
    (b"A: b\r\n", True),
    (b"Server-Timing: a\r\n", True),
    (b"Transfer-Encoding: chunked\r\n", False),
    (b"content-LENGTH:5\r\n", False),
    (b"Set-Cookie: a\r\n", False),
    (b"Proxy-Authenticate: x\r\n", False),
]
"""Each with whether a client gets it."""
SMUGGLED = b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n"

AMBIGUOUS = {
    "length and coding": START + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
    "coding and length": START + b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nG",
    "lengths differ": START + b"Content-Length: 0\r\nContent-Length: 33\r\n\r\n",
    "length twice": START + b"Content-Length: 1\r\ncontent-length: 1\r\n\r\nx",
    "length list": START + b"Content-Length: 1, 1\r\n\r\nx",
    "length plus": START + b"Content-Length: +1\r\n\r\nx",
    "length minus": START + b"Content-Length: -1\r\n\r\n",
    "length hex": START + b"Content-Length: 0x1\r\n\r\nx",
    "length underscore": START + b"Content-Length: 1_0\r\n\r\n0123456789",
    "length empty": START + b"Content-Length:\r\n\r\n",
    "length spaces": START + b"Content-Length: 1 1\r\n\r\n",
    "length huge": START + b"Content-Length: 99999999999999999999\r\n\r\n",
    "length beyond latin digits": START + "Content-Length: ١\r\n\r\n".encode(),
    "space before colon": START + b"Content-Length : 5\r\n\r\nhello",
    "tab before colon": START + b"Transfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n",
    "coding twice": START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding identity": START + b"Transfer-Encoding: identity\r\n\r\n",
    "coding gzip": START + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding chunked chunked": START + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "coding xchunked": START + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "coding quoted": START + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "coding with vertical tab": START + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "coding with trailing nul": START + b"Transfer-Encoding: chunked\x00\r\n\r\n0\r\n\r\n",
    "coding folded": START + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "coding in 1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded": START + b"X: a\r\n b\r\n\r\n",
    "folded by tab": START + b"X: a\r\n\tContent-Length: 3\r\n\r\nabc",
    "bare CR": START + b"X: a\rContent-Length: 3\r\n\r\nabc",
    "bare LF": START + b"X: a\nContent-Length: 3\r\n\r\nabc",
    "CR CR LF": START + b"X: a\r\r\nY: b\r\n\r\n",
    "LF LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "LF CR LF": b"GET / HTTP/1.1\r\nHost: a\n\r\n\r\n",
    "nul in name": START + b"X\x00: a\r\n\r\n",
    "nul in value": START + b"X: a\x00b\r\n\r\n",
    "delete in value": START + b"X: \x7f\r\n\r\n",
    "no colon": START + b"Content-Length 5\r\n\r\n",
    "empty name": START + b": a\r\n\r\n",
    "name not ascii": START + "Größe: 1\r\n\r\n".encode(),
    "name in brackets": START + b"[Content-Length]: 5\r\n\r\n",
    "space first": b"POST / HTTP/1.1\r\n Host: a\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "host list": b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "host with path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "host with user": b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "no version": b"GET /\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tab": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "trailing space": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "target with space": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "target without slash": b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
    "version 1.10": b"GET / HTTP/1.10\r\nHost: a\r\n\r\n",
    "version lower case": b"GET / http/1.1\r\nHost: a\r\n\r\n",
    "method with colon": b"GE:T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "chunk size sign": START + b"Transfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
    "chunk size prefix": START + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "chunk size underscore": START + b"Transfer-Encoding: chunked\r\n\r\n1_0\r\nabc\r\n0\r\n\r\n",
    "chunk size space": START + b"Transfer-Encoding: chunked\r\n\r\n 3\r\nabc\r\n0\r\n\r\n",
    "chunk size empty": START + b"Transfer-Encoding: chunked\r\n\r\n\r\nabc\r\n0\r\n\r\n",
    "chunk size huge": START + b"Transfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n",
    "chunk ends in LF": START + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
    "chunk data ends in LF": START + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\n0\r\n\r\n",
    "chunk longer": START + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
    "bare CR in extension": START + b"Transfer-Encoding: chunked\r\n\r\n3;\rx\r\nabc\r\n0\r\n\r\n",
    "trailers end in LF": START + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\n",
    "trailer ends in LF": START + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: a\n\r\n",
    "trailer folded": START + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: a\r\n b\r\n\r\n",
}
OTHER_STATUS = {
    "http 2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "connect": (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
@pytest.mark.parametrize("in_pieces", [False, True])
async def test_ambiguous_requests_are_refused_and_nothing_after_them_is_read(name: str, in_pieces: bool) -> None:
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        sent = AMBIGUOUS[name] + SMUGGLED
        for piece in [sent[i : i + 7] for i in range(0, len(sent), 7)] if in_pieces else [sent]:
            client.writer.write(piece)
            if in_pieces:
                await asyncio.sleep(0)
        response = await client.response()
        assert response.status == 400
        assert response.get(b"connection") == [b"close"]
        assert b'"type": "invalid_request_error"' in response.body
        assert await client.rest() == b"", "nothing but the refusal"
    assert [request.target for request in seen if request.target != b"/v1/completions"] == []
    assert all(b"/admin" not in request.body for request in seen)


@pytest.mark.parametrize("name", OTHER_STATUS)
async def test_requests_that_are_refused_with_another_status(name: str) -> None:
    async with relaying(answering([])) as (_, _, connect):
        client = await connect()
        await client.send(OTHER_STATUS[name][0])
        assert (await client.response()).status == OTHER_STATUS[name][1]


# Any bytes at all, most of them nearly a request.
ODD_LINES = st.sampled_from(
    [
        b"Host: a",
        b"Host: b:80",
        b"Content-Length: 3",
        b"content-length: 0",
        b"Content-Length: 03",
        b"Content-Length : 3",
        b"Content-Length:3 ",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: Chunked",
        b"transfer-encoding:chunked\t",
        b"Transfer-Encoding: identity",
        b"Connection: close",
        b"Connection: content-length",
        b"Connection: transfer-encoding, x",
        b"Expect: 100-continue",
        b"Upgrade: websocket",
        b"X: y",
        b" folded",
        b"\tfolded",
        b"X:\x80\xff",
        b"X: \x00",
        b"X: a\rb",
        b"X: a\nb",
        b"",
    ]
)
HEADS = st.builds(
    lambda line, lines, end: line + end + end.join(lines) + end + end,
    st.sampled_from(
        [
            b"POST / HTTP/1.1",
            b"GET /a?b HTTP/1.1",
            b"FOO / HTTP/1.0",
            b"GET / HTTP/1.2",
            b"POST  / HTTP/1.1",
            b"G(T / HTTP/1.1",
        ]
    ),
    st.lists(ODD_LINES, max_size=3).map(lambda lines: [b"Host: a", *lines]) | st.lists(ODD_LINES, max_size=6),
    st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n"]),
)
MESSAGES = st.builds(
    lambda head, body: head + body,
    HEADS,
    st.sampled_from([b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"0\r\n\r\n", b"3;x\r\nabc\r\n0\r\nT: u\r\n\r\n"]),
)


class Llhttp:
    """What llhttp makes of a request."""

    def __init__(self, data: bytes) -> None:
        self.body = b""
        self.complete = False
        httptools.HttpRequestParser(self).feed_data(data)

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


def ours(data: bytes) -> tuple[bytes, bytes, bytes, bytes] | None:
    """Method, target, body and what follows; None where the message is refused or incomplete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    try:
        request = parse_request(data[:end], 100)
        rest = data[end + 4 :]
        if request.length != CHUNKED:
            if len(rest) < request.length:
                return None
            return request.method, request.target, rest[: request.length], rest[request.length :]
        out: list[bytes] = []
        used = ChunkedReader().feed(rest, out)
    except (BadRequest, ValueError):
        return None
    return None if used < 0 else (request.method, request.target, b"".join(out), rest[used:])


@settings(max_examples=examples(600), deadline=None)
@given(MESSAGES)
@example(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: content-length\r\nContent-Length: 3\r\n\r\nabc")
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 03\r\n\r\nabc")
@example(b"POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding:chunked\t\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
def test_h11_and_llhttp_agree_on_every_accepted_request(data: bytes) -> None:
    read = ours(data)
    if read is None:
        return
    method, target, body, rest = read
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(data)
    head = oracle.next_event()
    assert isinstance(head, h11.Request)
    assert (head.method, head.target) == (method, target)
    theirs = b""
    while isinstance(event := oracle.next_event(), h11.Data):
        theirs += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert theirs == body
    assert oracle.trailing_data[0] == rest
    if method != b"FOO" and b"websocket" not in data:
        try:
            llhttp = Llhttp(data[: len(data) - len(rest)])
        except httptools.HttpParserError:
            # It takes no tab after `chunked`, which is allowed; what goes upstream is written anew.
            assert b"chunked\t" in data
        else:
            assert (llhttp.body, llhttp.complete) == (body, True)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(MESSAGES, min_size=1, max_size=3), cuts=st.lists(st.integers(1, 60), min_size=1, max_size=8))
@example(data=[b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"] * 3, cuts=[1])
@example(
    data=[b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n"], cuts=[1]
)
async def test_upstream_gets_the_same_requests_however_the_bytes_are_split(data: list[bytes], cuts: list[int]) -> None:
    sent = b"".join(data)
    expected: list[tuple[bytes, bytes, bytes]] = []
    rest = sent
    while (read := ours(rest.removeprefix(b"\r\n"))) is not None:
        expected.append(read[:3])
        if b"close" in rest[: rest.find(b"\r\n\r\n")] or b"HTTP/1.0" in rest[: rest.find(b"\r\n")]:
            break
        rest = read[3]
    seen: list[Request] = []
    async with relaying(answering(seen)) as (_, _, connect):
        client = await connect()
        at = number = 0
        while at < len(sent):
            size = cuts[number % len(cuts)]
            client.writer.write(sent[at : at + size])
            at += size
            number += 1
            if number < 20:
                await asyncio.sleep(0)
        client.writer.write_eof()
        await client.rest()
    got = [(request.method, request.target, request.body) for request in seen]
    assert got[: len(expected)] == expected
    assert len(got) <= len(expected) + 1, "at most one more, cut off by the end of what was sent"


@settings(max_examples=examples(300), deadline=None)
@given(
    payloads=st.lists(st.binary(min_size=1, max_size=50), max_size=5),
    trailers=st.lists(st.sampled_from(TRAILERS), max_size=4),
    rest=st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"\r\n", b"0\r\n\r\n"]),
    cuts=st.lists(st.integers(1, 30), min_size=1, max_size=10),
)
def test_chunks_are_decoded_however_they_are_split(
    payloads: list[bytes], trailers: list[tuple[bytes, bool]], rest: bytes, cuts: list[int]
) -> None:
    chunks = b"".join(map(chunk, payloads)) + b"0\r\n"
    body = chunks + b"".join(line for line, _ in trailers) + b"\r\n"
    data = body + rest
    reader = ChunkedReader()
    out: list[bytes] = []
    forwarded = b""
    at = number = 0
    used = -1
    while used < 0:
        piece = data[at : at + cuts[number % len(cuts)]]
        assert piece, "it ends"
        used = reader.feed(piece, out)
        forwarded += reader.to_forward(piece, used)
        at += len(piece) if used < 0 else used
        number += 1
    assert b"".join(out) == b"".join(payloads)
    assert forwarded == chunks + b"".join(line for line, harmless in trailers if harmless) + b"\r\n"
    assert at == len(body)
    assert reader.between_chunks


@settings(max_examples=examples(300), deadline=None)
@given(
    st.binary(max_size=60)
    | st.lists(st.sampled_from([b"3", b"\r\n", b"abc", b"0", b";", b"\n", b"x: y"])).map(b"".join)
)
def test_chunked_reader_agrees_with_h11(data: bytes) -> None:
    out: list[bytes] = []
    try:
        used = ChunkedReader().feed(data, out)
    except ValueError:
        return
    if used < 0:
        return
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    assert isinstance(oracle.next_event(), h11.Request)
    theirs = b""
    while isinstance(event := oracle.next_event(), h11.Data):
        theirs += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert theirs == b"".join(out)
    assert oracle.trailing_data[0] == data[used:]


@settings(max_examples=examples(500))
@given(st.binary(max_size=200))
def test_parsers_raise_only_their_own_errors(data: bytes) -> None:
    for prefix in (b"", b"GET / HTTP/1.1\r\nHost: a\r\n"):
        with contextlib.suppress(BadRequest):
            parse_request(prefix + data, 100)
    for prefix in (b"", b"HTTP/1.1 200 OK\r\n"):
        with contextlib.suppress(BadResponse):
            parse_response(prefix + data, to_head=False)


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("http://a", b"a"),
        ("http://a:80/", b"a"),
        ("https://a", b"a"),
        ("https://a:80", b"a:80"),
        ("http://[::1]:8000", b"[::1]:8000"),
        ("http://127.0.0.1:8000", b"127.0.0.1:8000"),
    ],
)
def test_origin(url: str, authority: bytes) -> None:
    assert parse_origin(url).authority == authority


def test_error_body_has_openais_shape() -> None:
    assert error_body(502, 'a "b"', "c") == (
        b'{"error": {"message": "a \\"b\\"", "type": "api_error", "param": null, "code": "c"}}'
    )
