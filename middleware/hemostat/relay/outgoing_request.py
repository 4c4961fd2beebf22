"""One request on its way upstream: its head, what has been read of it and not been sent, and what is kept of it."""

from __future__ import annotations

from hemostat.hooks import Rewrite
from hemostat.relay.context import RelayContext
from hemostat.relay.forwarding import upstream_head
from hemostat.relay.http.framing import CHUNKED, LAST_CHUNK, chunk, set_length
from hemostat.relay.http.request import RequestHead


class OutgoingRequest:
    """Owns the bytes of one request: those that wait to be sent, and those that are kept to send it once more."""

    __slots__ = ("_context", "_original", "_unsent", "_whole", "head", "unsent_bytes")

    def __init__(self, context: RelayContext, head: RequestHead) -> None:
        self.head = head
        self.unsent_bytes = 0
        self._context = context
        self._unsent: list[bytes] = []
        """While the body is collected: its pieces. While the exchange waits for a connection: what is sent first."""
        self._whole: bytes | None = None
        """The request as it went upstream, if it is whole."""
        self._original: tuple[list[bytes], int, bytes] | None = None
        """Header lines, framing index and body as the client sent them, if a hook has rewritten the request."""

    def hold(self, data: bytes) -> None:
        """Keep bytes that cannot be sent yet."""
        self._unsent.append(data)
        self.unsent_bytes += len(data)

    def take(self) -> bytes:
        """The bytes that were held, which are no longer kept."""
        data = b"".join(self._unsent)
        self._unsent = []
        self.unsent_bytes = 0
        return data

    def encode(self, body: bytes, *, complete: bool) -> bytes:
        """The head and the body's beginning as they go upstream. complete: it is the whole body."""
        if self.head.length == CHUNKED:
            body = chunk(body) + (LAST_CHUNK if complete else b"")
        payload = upstream_head(self.head, self._context.origin, self._context.authorization) + body
        if complete:
            self._whole = payload
        return payload

    def encode_more(self, pieces: list[bytes], *, complete: bool) -> bytes:
        """More of a body whose beginning was encoded. complete: its end is among it."""
        if self.head.length == CHUNKED:
            pieces = [chunk(piece) for piece in pieces]
            if complete:
                pieces.append(LAST_CHUNK)
        return b"".join(pieces)

    def rewrite(self, body: bytes, verdict: Rewrite) -> bytes:
        """The request as the hook wants it to go upstream. body: the client's own, whole."""
        head = self.head
        self._original = (list(head.lines), head.framing, body)
        if verdict.drop_headers:
            head.drop(verdict.drop_headers)
        if verdict.body or head.framing >= 0:
            head.framing = set_length(head.lines, head.framing, len(verdict.body))
        self._whole = payload = upstream_head(head, self._context.origin, self._context.authorization) + verdict.body
        return payload

    @property
    def rewritten(self) -> bool:
        """It was rewritten, and what the client sent can still be sent in its place."""
        return self._original is not None

    def keep_rewritten(self) -> None:
        """From here on the client's own request cannot be sent any more."""
        self._original = None

    def restore(self) -> bytes:
        """The client's own request, of one that was rewritten."""
        assert self._original is not None
        self.head.lines, self.head.framing, body = self._original
        self._original = None
        return self.encode(body, complete=True)

    def repeat(self) -> bytes | None:
        """The whole request to be sent once more; None where it is not here, or was repeated before."""
        payload, self._whole = self._whole, None
        return payload
