"""Messages as a strict reader, h11 and llhttp find them in bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import h11
import httptools

_REQUEST = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [\x21-\x7e\x80-\xff]+ HTTP/1\.[01]").fullmatch
_RESPONSE = re.compile(rb"HTTP/1\.1 [1-9][0-9][0-9](?: [^\r\n\x00]*)?").fullmatch
_AUTHORITY = re.compile(rb"^https?://[^/?#]+", re.IGNORECASE)
_TRAILERS = re.compile(rb"(\r\n0+\r\n)(?:[!-9;-~]+:[^\r\n]*\r\n)+(?=\r\n)")
"""h11 refuses some that Hemostat leaves out. In a body that is not chunked they are what they look like."""
_BLANKS = re.compile(rb"[ \t]+(?=;x=1)")
"""Before a chunk's extension: h11 refuses it, RFC 9112 (7.1.1) does not."""
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\r\n\x00]*)").fullmatch
_EXTENSION = re.compile(rb"(?:;x=1)?").fullmatch
"""The only one that is generated; llhttp takes fewer characters in extensions than Hemostat, which forwards them."""
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,16})((?:[ \t]*;[^\r\n\x00]*)?)").fullmatch


LATIN = bytes(range(128)) + b"~" * 128
"""h11 and llhttp take no byte above 127 in a target, where Hemostat passes it on: they are shown another one."""


class Malformed(Exception):
    """No strict reader would take it for a message."""


@dataclass(slots=True)
class Message:
    start: list[bytes]
    """The three parts of its first line."""
    fields: list[tuple[bytes, bytes]]
    """Names in lower case."""
    body: bytes
    raw: bytes
    odd: bool = False
    """A chunk's extension was changed."""

    def get(self, name: bytes) -> bytes:
        """The last value; b"" without the field."""
        return next((value for key, value in reversed(self.fields) if key == name), b"")

    @property
    def status(self) -> int:
        return int(self.start[1])


def read(
    data: bytes, *, response: bool, bodyless: Callable[[Message], bool] = lambda _: False, ended: bool = False
) -> Message | None:
    """The message that `data` begins with; None while it is incomplete. ended: nothing follows. Malformed."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    lines = data[:end].split(b"\r\n")
    if not (_RESPONSE if response else _REQUEST)(lines[0]):
        raise Malformed(f"first line {lines[0]!r}")
    fields = []
    for line in lines[1:]:
        match = _FIELD(line)
        if match is None:
            raise Malformed(f"field {line!r}")
        fields.append((match[1].lower(), match[2].strip(b" \t")))
    message = Message(lines[0].split(b" ", 2), fields, b"", b"")
    lengths = [value for name, value in fields if name == b"content-length"]
    codings = [value for name, value in fields if name == b"transfer-encoding"]
    if len(lengths) + len(codings) > 1 or codings not in ([], [b"chunked"]) or not all(map(bytes.isdigit, lengths)):
        raise Malformed(f"framing {lengths} {codings}")
    at = end + 4
    if response and (bodyless(message) or message.status < 200 or message.status in {204, 304}):
        pass
    elif codings:
        result = _chunks(data, at)
        if result is None:
            return None
        message.body, at, message.odd = result
    elif lengths:
        size = int(lengths[0])
        if len(data) < at + size:
            return None
        message.body, at = data[at : at + size], at + size
    elif response:
        if not ended:
            return None
        message.body, at = data[at:], len(data)
    message.raw = data[:at]
    return message


def _chunks(data: bytes, at: int) -> tuple[bytes, int, bool] | None:
    """The payload from `at` on, where the body ends, and `Message.odd`; trailers must be harmless."""
    payload = []
    odd = False
    while True:
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        match = _CHUNK(data[at:end])
        if match is None:
            raise Malformed(f"chunk size {data[at:end]!r}")
        size = int(match[1], 16)
        odd = odd or _EXTENSION(match[2]) is None
        at = end + 2
        if not size:
            break
        if len(data) < at + size + 2:
            return None
        if data[at + size : at + size + 2] != b"\r\n":
            raise Malformed("a chunk is longer than it says")
        payload.append(data[at : at + size])
        at += size + 2
    while (end := data.find(b"\r\n", at)) >= 0:
        line = data[at:end]
        at = end + 2
        if not line:
            return b"".join(payload), at, odd
        match = _FIELD(line)
        if match is None or match[1].lower() in {b"transfer-encoding", b"content-length", b"host", b"set-cookie"}:
            raise Malformed(f"trailer {line!r}")
    return None


class _Found:
    """What llhttp calls back."""

    def __init__(self) -> None:
        self.url = self.body = b""
        self.complete = 0

    def on_url(self, data: bytes) -> None:
        self.url += data

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete += 1


def llhttp_agrees(message: Message, *, response: bool) -> bool:
    """Whether llhttp finds exactly this message, which has a framing, in its bytes."""
    result = _Found()
    raw = message.raw.translate(LATIN)
    if message.odd or message.get(b"upgrade"):
        return True  # llhttp does not know what follows a switch of protocols
    if response:
        parser = httptools.HttpResponseParser(result)
    else:
        parser = httptools.HttpRequestParser(result)
        raw = b"POST" + raw[len(message.start[0]) :]  # it knows only some methods
    try:
        parser.feed_data(raw)
    except (httptools.HttpParserUpgrade, httptools.HttpParserError):
        return False
    return result.body == message.body.translate(LATIN) and result.complete == 1


def origin_form(target: bytes) -> bytes:
    """Of a target that may have an authority."""
    rest = _AUTHORITY.sub(b"", target)
    return rest if rest[:1] in {b"/", b"*"} else b"/" + rest


def h11_requests(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Method, origin form of the target and body of the requests that h11 finds, as LATIN: those up to the first
    incomplete or malformed one, then the same without trailers and without white space before extensions of chunks."""
    data = data.translate(LATIN)
    return _h11_requests(data) + _h11_requests(_plain(data))


def _plain(data: bytes) -> bytes:
    return _BLANKS.sub(b"", _TRAILERS.sub(rb"\1", data))


def _h11_requests(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    result: list[tuple[bytes, bytes, bytes]] = []
    while data:
        while data.startswith(b"\r\n"):  # h11 ignores no empty line, Hemostat all of them
            data = data[2:]
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        parser.receive_data(data)
        body = []
        head = None
        try:
            while not isinstance(event := parser.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    body.append(bytes(event.data))
                else:
                    return result
        except h11.RemoteProtocolError:
            return result
        assert head is not None
        result.append((head.method, origin_form(head.target), b"".join(body)))
        data = parser.trailing_data[0]
    return result


def h11_response(data: bytes, method: bytes) -> tuple[int, bytes, int] | None:
    """Status and body of the response that h11 finds, and its bytes; None: it is malformed or incomplete.

    It is shown the response without trailers and without white space before extensions where it refuses the whole.
    """
    result = _h11_response(data, method)
    if result is None and (shorter := _plain(data)) != data:
        result = _h11_response(shorter, method)
        return None if result is None else (*result[:2], len(data))
    return result


def _h11_response(data: bytes, method: bytes) -> tuple[int, bytes, int] | None:
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    parser.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    parser.send(h11.EndOfMessage())
    parser.receive_data(data)
    parser.receive_data(b"")
    status, body = 0, []
    try:
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body.append(bytes(event.data))
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None
    return status, b"".join(body), len(data) - len(parser.trailing_data[0])
