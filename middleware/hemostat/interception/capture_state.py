"""The states of an intercepted exchange: what becomes of the capture of its tokens.

    SAMPLED ─┬─► ASKED ─┬─► CAPTURED
             └──────────┴─► SKIPPED

    UNSAMPLED

An exchange begins SAMPLED or UNSAMPLED, by its request's head. In which arm it is, and what its client gets of the
response (`response_state`), does not depend on the state.

Invariants:
- The tokens of the response are wanted from ASKED on, and were never wanted in UNSAMPLED.
- The engine of the request may be drawn (`ExchangeHook.draws_engine`) exactly while it is SAMPLED or ASKED.
- A sampled exchange is counted once, when it is closed: it is CAPTURED or SKIPPED then. One that is SKIPPED earlier is
  counted then, too, because the number of its tokens is not known before.
"""

from __future__ import annotations

from enum import IntEnum, auto
from typing import Final


class CaptureState(IntEnum):
    """The state of an exchange. It is an IntEnum for the reason that `relay.exchange_state` gives."""

    UNSAMPLED = auto()
    """It was not sampled: nothing of it is captured, and it is not counted as sampled."""
    SAMPLED = auto()
    """It is sampled. Its request has not been read."""
    ASKED = auto()
    """Its tokens have been asked for, of the engine or of its plugin."""
    SKIPPED = auto()
    """It is sampled, and is not captured, for a reason that is counted."""
    CAPTURED = auto()
    """Its captures have been handed on."""


UNSAMPLED: Final = CaptureState.UNSAMPLED
SAMPLED: Final = CaptureState.SAMPLED
ASKED: Final = CaptureState.ASKED
SKIPPED: Final = CaptureState.SKIPPED
CAPTURED: Final = CaptureState.CAPTURED

TRANSITIONS: Final[dict[CaptureState, frozenset[CaptureState]]] = {
    UNSAMPLED: frozenset(),
    SAMPLED: frozenset({ASKED, SKIPPED}),
    ASKED: frozenset({SKIPPED, CAPTURED}),
    SKIPPED: frozenset(),
    CAPTURED: frozenset(),
}
"""The states that may follow each state."""
