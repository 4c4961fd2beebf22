"""The states of the response to a request that was rewritten.

    AWAITED ─┬─────────────────► READ ─► ENDED
             ├─► UNDECIDED ─┬──► READ
             │              └──► REPEATED
             └─► WITHHELD ─┬───► REPEATED
                           └───► ENDED

A request that goes upstream as the client wrote it has no such state: nothing of its response is read.

Invariants:
- The tokens of the response are captured only where it is ENDED.
- No byte of it has gone to the client while it is AWAITED, UNDECIDED or WITHHELD (but after
  `relay.client_response.MAX_HEAD_HOLD_SECONDS` its head); only then can it become REPEATED.
- In REPEATED the client's own request was sent: what comes then passes unchanged.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Final


class ResponseState(IntEnum):
    """The state of a response. It is an IntEnum for the reason that `relay.exchange_state` gives."""

    AWAITED = auto()
    """Its head is outstanding."""
    UNDECIDED = auto()
    """Its first bytes are held back, until they show whether it is a refusal."""
    READ = auto()
    """It goes to the client, without what was added for Hemostat."""
    WITHHELD = auto()
    """It cannot be read: nothing of it goes to the client."""
    REPEATED = auto()
    """It was discarded, and the client's own request was sent."""
    ENDED = auto()
    """It is complete."""


AWAITED: Final = ResponseState.AWAITED
UNDECIDED: Final = ResponseState.UNDECIDED
READ: Final = ResponseState.READ
WITHHELD: Final = ResponseState.WITHHELD
REPEATED: Final = ResponseState.REPEATED
ENDED: Final = ResponseState.ENDED

TRANSITIONS: Final[dict[ResponseState, frozenset[ResponseState]]] = {
    AWAITED: frozenset({UNDECIDED, READ, WITHHELD}),
    UNDECIDED: frozenset({READ, REPEATED}),
    READ: frozenset({ENDED}),
    WITHHELD: frozenset({REPEATED, ENDED}),
    REPEATED: frozenset(),
    ENDED: frozenset(),
}
"""The states that may follow each state."""
