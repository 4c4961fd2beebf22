"""The interface by which the relay lets another layer inspect and change requests and responses.

A hook does no input or output: the relay calls it with bytes and it returns bytes, so that relay and hook are tested
separately. The relay fails open: a hook that raises is counted and then ignored for the rest of that request. If the
hook has not changed the request, the bytes pass unchanged, those first that the hook held back. Otherwise the client's
own request is sent, or, where the client has got a part of the response already, its connection is closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

Headers = Sequence[tuple[bytes, bytes]]
"""The header fields in order, with names in their original case."""


class Refusal(msgspec.Struct, frozen=True):
    """A verdict of the hook: the client is answered at once, and nothing is sent upstream."""

    status: int
    body: bytes
    """The body, which is JSON in OpenAI's error shape."""


class Rewrite(msgspec.Struct, frozen=True):
    """A verdict of the hook: this body is sent upstream instead of the client's (an empty one for a request without a
    body).

    While `response_data` returns nothing, the relay holds back the response's head too (for
    `relay.client_response.MAX_HEAD_HOLD_SECONDS` at most), so that `replay` can still return True.
    """

    body: bytes
    drop_headers: frozenset[bytes] = frozenset()
    """The lower-case names of fields that must not go upstream (`accept-encoding`, where the response has to be
    read)."""


class Comparison(msgspec.Struct, frozen=True):
    """The comparison that a request is a unit of: the arms of a profile in one kind of traffic."""

    kind: str
    version: str
    """The version of the profile that the treated arm gets."""
    treated: bool
    """If it is False, the request is in the control arm."""
    conversation: bytes
    """The digest of the conversation; b"" if none is recognized."""
    client: bytes
    """The digest of the client's name; b"" if none is named."""
    json_in_words: bool
    """It is True if the prompt asks for JSON."""
    streamed: bool
    """It is True if the client has asked for a stream. An answer that is no stream is sent when it is complete, so a
    client that gives it up has seen no token of it.
    """
    drawn: float
    """A random number in [0, 1) that belongs to the conversation. If only a part of the comparison is counted, it is
    the part with small numbers.
    """


class ExchangeHook(Protocol):
    """A hook's view of one request and its response."""

    body_limit: int
    """The relay buffers the request's body up to this many bytes; a longer one is streamed on unchanged."""

    @property
    def arm(self) -> str:
        """The randomised group of the request, as far as it is known; read when the exchange has ended."""

    @property
    def comparison(self) -> Comparison | None:
        """The comparison that the request belongs to; None for a request in no arm. It is read after `request`, and
        again when the exchange has ended.
        """

    @property
    def draws_engine(self) -> bool:
        """It is True if the request's engine is to be drawn at random, provided that requests need not go to a certain
        one.
        """

    def sent_to(self, engine: str, *, drawn: bool) -> None:
        """Is told that the request goes to this engine, host:port. It is called before `request`, and again where an
        engine that failed is replaced by another; never for another reason than the engines' health and load.

        drawn: at random among the engines that get requests, whatever the request and their load are.
        """

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        """Is called with the whole body, or with None if it is longer than `body_limit`. Returns None if the body is to
        be sent unchanged."""

    def response_head(self, status: int, content_type: bytes, content_coding: bytes) -> bool:
        """Looks at the response's head. Returns True if the body is to pass through `response_data`, and to be framed
        anew. It is not called for 1xx responses.

        content_type, content_coding: the values of the response's last field with this name; b"" and b"identity"
        without one.
        """

    @property
    def withholds(self) -> bool:
        """It is True if nothing of the present response may go to the client, however long it takes: `replay` will
        replace it."""

    def response_data(self, data: bytes) -> bytes:
        """Takes body bytes without their framing, as they arrive, and returns what the client gets now (may be
        empty)."""

    def replay(self) -> bool:
        """Is called when the response to a rewritten request is complete and no byte of it has gone to the client.

        Returns True if that response is to be discarded, and the client's own request to be sent upstream.
        `response_head` and what follows it are then called for the second response; `replay` is not called again. After
        False, `response_end` is called next.

        It returns True only if sending a second request has no side effect but its cost: the response shows that the
        upstream did nothing (it failed validation), or the upstream keeps nothing of what it did.
        """

    def response_end(self) -> bytes:
        """Is told that the upstream's body is complete, and returns the rest of what the client gets."""

    def closed(
        self, *, complete: bool, output_tokens: int | None = None, engine: str = "", own_status: int = 0
    ) -> None:
        """Called exactly once, last, in every case.

        complete: the whole response was sent to the client. output_tokens: what was generated, of all choices, by the
        response's usage; None: not known. engine: address of the one that answered. own_status: of the relay's own
        answer, such as 502 where the upstream cannot be reached; 0 where the upstream answered.
        """


class Hook(Protocol):
    """Chooses, from a request's head, the requests that it wants to see. Called for each request: must be cheap."""

    def begin(
        self, method: str, target: bytes, headers: Headers, request_id: str, *, marked: bool = True
    ) -> ExchangeHook | Refusal | None:
        """Returns what is to see the request and its response, or the refusal to answer with. Returns None if the
        request is to be relayed without a hook. marked: True if the name of a field may begin with X-Hemostat-.
        """
