"""One request on its way upstream: its head, what has been read of it and not been sent, and what is kept of it."""

from __future__ import annotations

from hemostat.hooks import Rewrite
from hemostat.relay.context import RelayContext
from hemostat.relay.forwarding import upstream_head
from hemostat.relay.http.framing import CHUNKED, LAST_CHUNK, chunk, set_length
from hemostat.relay.http.request import RequestHead


class OutgoingRequest:
    """Owns the bytes of one request: those that wait to be sent, and those that are kept to send it once more.

    All of them count in the relay's budget until `forget`.
    """

    __slots__ = ("_budget", "_context", "_counted", "_original", "_unsent", "_whole", "head")

    def __init__(self, context: RelayContext, head: RequestHead) -> None:
        self.head = head
        self._context = context
        self._budget = context.budget
        self._counted = 0
        """Bytes in the budget."""
        self._unsent: bytes | bytearray = b""
        """While the body is collected: its beginning. While the exchange waits for a connection: what is sent first."""
        self._whole: bytes | None = None
        """The request as it went upstream, if it was whole and is kept."""
        self._original: tuple[list[bytes], int, bytes] | None = None
        """Header lines, framing index and body as the client sent them, if a hook has rewritten the request."""

    @property
    def unsent_bytes(self) -> int:
        return len(self._unsent)

    def hold(self, data: bytes) -> None:
        """Keep bytes that cannot be sent yet."""
        if not self._unsent:
            self._unsent = data
        else:
            # One buffer, not a list: a client can send each byte in a packet of its own.
            if isinstance(self._unsent, bytes):
                self._unsent = bytearray(self._unsent)
            self._unsent += data
        self._count(len(data))

    def take(self) -> bytes:
        """The bytes that were held, which are no longer kept."""
        data = bytes(self._unsent)
        self._unsent = b""
        self._count(-len(data))
        return data

    def encode(self, body: bytes, *, complete: bool) -> bytes:
        """The head and the body's beginning as they go upstream. complete: it is the whole body."""
        if self.head.length == CHUNKED:
            body = chunk(body) + (LAST_CHUNK if complete else b"")
        return upstream_head(self.head, self._context.origin, self._context.authorization) + body

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
        self._count(len(body))
        if verdict.drop_headers:
            head.drop(verdict.drop_headers)
        if verdict.body or head.framing >= 0:
            head.framing = set_length(head.lines, head.framing, len(verdict.body))
        return upstream_head(head, self._context.origin, self._context.authorization) + verdict.body

    def restore(self) -> bytes:
        """The client's own request, of one that was rewritten."""
        assert self._original is not None
        self.head.lines, self.head.framing, body = self._original
        self.forget()
        return self.encode(body, complete=True)

    @property
    def rewritten(self) -> bool:
        """It was rewritten, and what the client sent can still be sent in its place."""
        return self._original is not None

    def sent(self, payload: bytes) -> None:
        """The whole request goes upstream at once: keep it, unless memory is scarce."""
        if not self._budget.scarce:
            self._whole = payload
            self._count(len(payload))

    def repeat(self) -> bytes | None:
        """The whole request to be sent once more; None where it is not kept."""
        payload, self._whole = self._whole, None
        if payload is not None:
            self._count(-len(payload))
        return payload

    def forget(self) -> None:
        """Nothing of the request is needed any more."""
        self._unsent, self._whole, self._original = b"", None, None
        self._count(-self._counted)

    def _count(self, size: int) -> None:
        self._counted += size
        self._budget.held_bytes += size
