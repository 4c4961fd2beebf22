"""Messages as msgpack: one codec for each union of message types."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

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
        """msgspec.DecodeError when the body is not such a message."""
        return self._decoder.decode(body)
