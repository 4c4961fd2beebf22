"""Responses that the upstream compresses though nobody asked it to: read, and compressed again for the client."""

from __future__ import annotations

import zlib

from hemostat.openai.forms.protocol import Stripper
from hemostat.openai.tokens import ResponseFailure, ResponseTokens

_WINDOW_BITS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
CODINGS = frozenset(_WINDOW_BITS)
"""Values of Content-Encoding, lower case, that can be read. No other is known to the standard library."""
_MAX_PIECE = 1024 * 1024
"""Bytes that are decompressed at a time, so that a small response cannot fill the memory at once."""
_LEVEL = 1


class Recompressor:
    """A `forms.protocol.Stripper` of a compressed body: what `stripper` makes of its content, in the same coding."""

    def __init__(self, stripper: Stripper, coding: bytes, tokens: ResponseTokens) -> None:
        self._stripper = stripper
        self._tokens = tokens
        self._read = zlib.decompressobj(_WINDOW_BITS[coding])
        self._write = zlib.compressobj(_LEVEL, wbits=_WINDOW_BITS[coding])
        self._malformed = False

    def feed(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        while data and not self._malformed:
            try:
                content = self._read.decompress(data, _MAX_PIECE)
            except zlib.error:
                # The client could not have read on from here either.
                self._malformed = True
                self._tokens.fail(ResponseFailure.ENCODED)
                break
            data = self._read.unconsumed_tail
            if stripped := self._stripper.feed(content):
                parts.append(self._write.compress(stripped))
        if parts:
            # What a stream has sent so far is for the client now, not when the next block is full.
            parts.append(self._write.flush(zlib.Z_SYNC_FLUSH))
        return b"".join(parts)

    def finish(self) -> bytes:
        rest = self._stripper.finish()
        if self._malformed or not self._read.eof:
            # Ends early, as what came did.
            self._tokens.fail(ResponseFailure.ENCODED)
            return self._write.compress(rest) + self._write.flush(zlib.Z_SYNC_FLUSH)
        return self._write.compress(rest) + self._write.flush()
