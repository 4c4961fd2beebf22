"""Frames on a stream of bytes: 4 bytes of length, big-endian, then that many bytes. What is in them is the caller's."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec

MAX_FRAME_BYTES = 1 << 30
READ_SIZE = 256 * 1024
"""The number of bytes that are read at a time. Twice as much of a connection waits in memory at most."""
_HEADER = struct.Struct(">I")


def frame(body: bytes) -> bytes:
    """Returns one frame. Raises ValueError if the body is longer than MAX_FRAME_BYTES.

    >>> frame(b"ab")
    b'\\x00\\x00\\x00\\x02ab'
    """
    return header_of(body) + body


def header_of(body: bytes) -> bytes:
    """Returns the bytes that stand before a body in its frame. Raises ValueError as `frame`.

    >>> header_of(b"ab")
    b'\\x00\\x00\\x00\\x02'
    """
    _check(len(body), MAX_FRAME_BYTES)
    return _HEADER.pack(len(body))


def read_frames(stream: BinaryIO) -> Iterator[bytes]:
    """Yields the bodies of the frames of a blocking stream, until it ends; an incomplete last frame is dropped."""
    while len(header := stream.read(_HEADER.size)) == _HEADER.size:
        length = _body_length(header)
        body = stream.read(length)
        if len(body) < length:
            return
        yield body


async def read_frame(stream: asyncio.StreamReader, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Returns the body of the next frame. Raises IncompleteReadError at the end of the stream, and ValueError if the
    frame is too long.
    """
    length = _body_length(await stream.readexactly(_HEADER.size), max_bytes)
    return await stream.readexactly(length)


class FrameReader:
    """Turns the bytes of a stream, in pieces of any size, into the bodies of the complete frames."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    @property
    def missing(self) -> int:
        """The number of missing bytes of the frame that has begun, as far as its length is known."""
        if len(self._buffer) < _HEADER.size:
            return 0
        return int(_HEADER.unpack_from(self._buffer)[0]) + _HEADER.size - len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Returns the frames that are complete with these bytes. Raises ValueError on a frame longer than
        `max_bytes`.
        """
        # The usual case is whole frames, which are not copied into the buffer first.
        source: bytes | bytearray = data
        if self._buffer:
            self._buffer += data
            source = self._buffer
        bodies: list[bytes] = []
        start = 0
        while len(source) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(source, start)
            _check(length, self._max_bytes)
            end = start + _HEADER.size + length
            if len(source) < end:
                break
            bodies.append(bytes(memoryview(source)[start + _HEADER.size : end]))
            start = end
        if source is self._buffer:
            del self._buffer[:start]
        else:
            self._buffer += memoryview(data)[start:]
        return bodies


def _body_length(header: bytes, max_bytes: int = MAX_FRAME_BYTES) -> int:
    (length,) = _HEADER.unpack(header)
    _check(length, max_bytes)
    return int(length)


def _check(length: int, max_bytes: int) -> None:
    if length > max_bytes:
        raise ValueError(f"frame of {length} bytes: at most {max_bytes} are allowed")


T = TypeVar("T")


class MessageCodec(Generic[T]):
    """Encodes and decodes messages of the union `T` of tagged structs.

    message_type: that union once more, as a value; annotate the codec with `T`.
    """

    def __init__(self, message_type: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)

    def encode(self, message: T) -> bytes:
        return self._encoder.encode(message)

    def decode(self, body: bytes) -> T:
        """Returns the decoded message. Raises msgspec.DecodeError if the body is not such a message."""
        return self._decoder.decode(body)
