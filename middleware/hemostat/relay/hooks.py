"""Where the relay lets somebody look at an exchange: sans-IO, so that the relay and the OpenAI layer are tested apart.

The relay calls; the hook answers with bytes. A hook that raises has lost its say: the relay counts it and passes the
bytes on as they came (rule 1: fail open).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

Headers = Sequence[tuple[bytes, bytes]]
"""Header fields in order, names in their original case."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Answer the client at once and send nothing upstream."""

    status: int
    body: bytes
    """JSON in OpenAI's error shape."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Send this body upstream instead of the client's.

    While `response_data` returns nothing, the response's head is held back too (for HEAD_SECONDS at most), so that
    `replay` can be answered with yes.
    """

    body: bytes
    drop_headers: frozenset[bytes] = frozenset()
    """Lower-case names that must not go upstream (`accept-encoding`, where the response has to be read)."""


class Exchange(Protocol):
    """One request that the hook wants to see."""

    body_limit: int
    """The relay buffers the request's body up to this many bytes; a longer one is streamed on untouched."""

    @property
    def arm(self) -> str:
        """The randomised group that the request stands in, once it has been sent."""

    def request(self, body: bytes | None) -> Rewrite | Refusal | None:
        """The whole body, or None when it passed the limit. None back: send what the client sent."""

    def response_head(self, status: int, headers: Headers) -> bool:
        """True: every body byte goes through `response_data`, framing is made anew. Not called for 1xx."""

    def response_data(self, data: bytes) -> bytes:
        """De-framed body bytes as they arrive; returns what the client gets now (may be empty)."""

    def replay(self) -> bool:
        """Asked when the response to a rewritten request is complete and no byte of it has gone to the client. True:
        forget it and send upstream what the client sent, as it came. `response_head` and what follows it are then
        called for that response, and this is not asked again; without it, `response_end` comes next.

        Only for a response that says that nothing was done (a refusal at validation): then sending twice asks for
        nothing twice.
        """

    def response_end(self) -> bytes:
        """The upstream body is complete; returns what is still owed."""

    def closed(self, *, complete: bool) -> None:
        """Called exactly once, last, whatever happened."""


class Hook(Protocol):
    """Decides by the head alone which exchanges it wants to see. Called once a request: must be cheap."""

    def begin(self, method: str, target: bytes, headers: Headers, request_id: str) -> Exchange | Refusal | None:
        """None: relay it untouched, at full speed."""
