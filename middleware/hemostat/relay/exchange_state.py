"""The states of an exchange: one request and its response.

                 ┌─────────────────── the hook refuses ──────────────────┐
    STARTING ────┤                                                       ▼
                 ├─► COLLECTING ─┬─► QUEUED ─► FORWARDED ─► HEAD_HELD ─► STREAMING ─► DONE
                 └───────────────┘   ▲  ▲          │  │         │
                                     │  └─ retry ──┘  └─► TUNNEL ─► DONE
                                     └────── replay ────────────┘

QUEUED is left out where the pool has an idle connection. Every state can end in DONE: an end that fails or leaves.

Invariants:
- The exchange is in the pool's queue exactly while it is QUEUED.
- It has an upstream connection exactly while it is FORWARDED, HEAD_HELD, STREAMING or in a TUNNEL. (In HEAD_HELD and
  STREAMING the connection is given back as soon as the response is complete, immediately before the next transition.)
- Before STREAMING no byte of a final response has gone to the client: until then, the relay can still answer with an
  error of its own, send the request again (retry) or replace the response (replay).
- `Exchange.request_complete` (the request's body has been read to its end) is independent of the state: an upstream may
  respond before it has read the whole request.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Final


class ExchangeState(IntEnum):
    """The state of an exchange. It is an IntEnum: members are hashed for every transition, and the hash of Enum is
    slow.
    """

    STARTING = auto()
    """The head of the request has been read; nothing has been done with it."""
    COLLECTING = auto()
    """The request's body is collected, because the hook wants to see it whole."""
    QUEUED = auto()
    """The request waits for a connection to the upstream; what has been read of the request is kept until then."""
    FORWARDED = auto()
    """The upstream has the request, as far as it has been read; its final response head is outstanding."""
    HEAD_HELD = auto()
    """The final response head has arrived, and is held back: until the first bytes of the body, until the hook releases
    some, or (`BodyMode.COLLECTED`) until the body is complete."""
    STREAMING = auto()
    """The response's head has been sent to the client; its body follows."""
    TUNNEL = auto()
    """The protocol has been switched (WebSocket): bytes are passed in both directions."""
    DONE = auto()
    """The exchange is counted and closed; nothing more happens."""


# The states as module globals: before Python 3.12, looking up a member of an Enum class takes about 0.2 µs.
STARTING: Final = ExchangeState.STARTING
COLLECTING: Final = ExchangeState.COLLECTING
QUEUED: Final = ExchangeState.QUEUED
FORWARDED: Final = ExchangeState.FORWARDED
HEAD_HELD: Final = ExchangeState.HEAD_HELD
STREAMING: Final = ExchangeState.STREAMING
TUNNEL: Final = ExchangeState.TUNNEL
DONE: Final = ExchangeState.DONE

TRANSITIONS: Final[dict[ExchangeState, frozenset[ExchangeState]]] = {
    STARTING: frozenset({COLLECTING, QUEUED, FORWARDED, DONE}),
    COLLECTING: frozenset({QUEUED, FORWARDED, DONE}),
    QUEUED: frozenset({FORWARDED, DONE}),
    FORWARDED: frozenset({QUEUED, HEAD_HELD, TUNNEL, DONE}),
    HEAD_HELD: frozenset({QUEUED, FORWARDED, STREAMING, DONE}),
    STREAMING: frozenset({DONE}),
    TUNNEL: frozenset({DONE}),
    DONE: frozenset(),
}
"""The states that may follow each state."""
