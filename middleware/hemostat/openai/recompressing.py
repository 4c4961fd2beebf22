"""Responses that the upstream compresses without being asked to: read, and compressed again for the client."""

from __future__ import annotations

import zlib

from hemostat.metrics.reasons import Unscored
from hemostat.openai.forms.protocol import Stripper
from hemostat.openai.tokens import ResponseTokens

CODINGS = frozenset((b"gzip", b"x-gzip"))
"""The values of Content-Encoding, lower case, that can be read. `deflate` is not one of them: some servers send it
without its header, and clients differ in which of the two they read."""
_WINDOW_BITS = 31
"""The parameter of zlib for a gzip header, and the largest window."""
_MAX_PIECE = 1024 * 1024
"""The largest number of bytes that are decompressed at a time, so that a small response cannot fill the memory at
once."""
_LEVEL = 1
_FIRST_BYTE = b"\x1f"
"""The first byte of every member."""


class Recompressor:
    """A `forms.protocol.Stripper` of a body in gzip: what `stripper` makes of its content, compressed again.

    The body may be several members, one after the other (RFC 1952, 2.2); what goes out is one.
    """

    def __init__(self, stripper: Stripper, tokens: ResponseTokens) -> None:
        self._stripper = stripper
        self._tokens = tokens
        self._read = zlib.decompressobj(_WINDOW_BITS)
        self._write = zlib.compressobj(_LEVEL, wbits=_WINDOW_BITS)
        self._malformed = False
        self._ended = False
        """It is True once something follows a member that is not another one: it is ignored, as clients do."""

    def feed(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        while data and not self._malformed and not self._ended:
            if self._read.eof:
                if not data.startswith(_FIRST_BYTE):
                    self._ended = True
                    break
                self._read = zlib.decompressobj(_WINDOW_BITS)
            try:
                content = self._read.decompress(data, _MAX_PIECE)
            except zlib.error:
                # The client could not have read on from here either.
                self._malformed = True
                self._tokens.fail(Unscored.ENCODED)
                break
            data = self._read.unused_data if self._read.eof else self._read.unconsumed_tail
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
            self._tokens.fail(Unscored.ENCODED)
            return self._write.compress(rest) + self._write.flush(zlib.Z_SYNC_FLUSH)
        return self._write.compress(rest) + self._write.flush()
