"""Caches of the head parsers: they are bounded, do not change what is read, and hold no secret."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.relay.http import fields, request, response
from hemostat.relay.http.errors import BadRequest, BadResponse
from hemostat.relay.http.request import RequestHead, parse_request
from hemostat.relay.http.response import ResponseHead, parse_response

CACHES: list[Any] = [
    value
    for module in (fields, request, response)
    for name, value in vars(module).items()
    if isinstance(value, dict) and not name.startswith("__")
]
"""The caches of field names, field lines, request lines, hosts and status lines."""
assert len(CACHES) == 5

LINES = st.sampled_from(
    [
        b"Host: a",
        b"Host: a/b",
        b"Host:\ta ",
        b"Host : a",
        b"Connection: keep-alive",
        b"Connection:keep-alive",
        b"Connection: Keep-Alive, Accept",
        b"Connection : close",
        b"connection: close\t",
        b"Accept: a:b",
        b"Accept",
        b" Accept: x",
        b"Content-Type:",
        b"Server: x",
        b"Content-Length: 1",
        b"Transfer-Encoding: chunked",
    ]
)
FIRST_LINES = st.sampled_from(
    [
        *(b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"GET  / HTTP/1.1", b"get http://b/ HTTP/1.1", b"GET / HTTP/2.0"),
        *(b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 204", b"HTTP/1.1  200 OK"),
    ]
)


def clear() -> None:
    for cache in CACHES:
        cache.clear()


def parsed(head: bytes) -> list[Any]:
    """What each of the two parsers reads, or the message with which it refuses the head."""
    seen: list[Any] = []
    for parse, error in (
        (lambda: parse_request(head, 100), BadRequest),
        (lambda: parse_response(head, to_head=False), BadResponse),
    ):
        try:
            result: RequestHead | ResponseHead = parse()
        except error as refused:
            seen.append(str(refused))
        else:
            # Not by `__slots__`, which a compiled class does not have.
            attributes = [name for name, kind in vars(type(result)).items() if inspect.isdatadescriptor(kind)]
            assert {"lines", "length"} <= set(attributes)
            seen.append([getattr(result, name) for name in attributes])
    return seen


@given(st.lists(st.tuples(FIRST_LINES, st.lists(LINES, max_size=5)), min_size=1, max_size=4))
def test_a_head_is_read_as_if_it_were_the_first(heads: list[tuple[bytes, list[bytes]]]) -> None:
    joined = [b"\r\n".join([first, *lines]) for first, lines in heads]
    fresh = []
    for head in joined:
        clear()
        fresh.append(parsed(head))
    clear()
    for _ in range(2):
        assert [parsed(head) for head in joined] == fresh


def test_a_client_cannot_fill_the_caches_for_good() -> None:
    clear()
    for n in range(3000):
        parse_request(b"GET /%d HTTP/1.1\r\nHost: h%d\r\nX-%d: 1" % (n, n, n), 100)
        parse_response(b"HTTP/1.1 200 %d\r\nServer: %d" % (n, n), to_head=False)
    assert max(map(len, CACHES)) <= 1024
    parse_request(b"GET /later HTTP/1.1\r\nHost: later\r\nLater: 1", 100)
    parse_response(b"HTTP/1.1 200 Later", to_head=False)
    keys = (b"Later", b"Host: later", b"GET /later HTTP/1.1", b"later", b"HTTP/1.1 200 Later")
    assert all(key in cache for key, cache in zip(keys, CACHES, strict=True))


@pytest.mark.parametrize(
    "head",
    [
        b"GET http://user:secret@a/ HTTP/1.1\r\nHost: a",
        b"GET /?key=secret HTTP/1.1\r\nHost: a",
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: secret",
        b"GET / HTTP/1.1\r\nHost: a\r\nCookie: secret",
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: secret",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"secret" * 100 + b": 1",
    ],
)
def test_secrets_and_long_names_are_not_kept(head: bytes) -> None:
    clear()
    parsed(head)
    assert b"secret" not in repr([list(cache) for cache in CACHES]).encode()
