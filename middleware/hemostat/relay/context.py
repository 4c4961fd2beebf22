"""The parts that all connections of one relay share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hemostat.hooks import Hook
from hemostat.ipc.messages import OutcomeReport
from hemostat.relay.access_log import AccessLog
from hemostat.relay.client_limits import ClientLimits
from hemostat.relay.counters import Counters
from hemostat.relay.limits import Limits
from hemostat.relay.request_budget import RequestBudget
from hemostat.relay.turns import Turns
from hemostat.relay.upstreams.group import Upstreams

if TYPE_CHECKING:
    from hemostat.tracing import Tracing  # an extra; imported only where it is used


@dataclass(slots=True)
class RelayContext:
    """Composed by the relay; its connections and exchanges read it."""

    loop: asyncio.AbstractEventLoop
    upstreams: Upstreams
    limits: Limits
    budget: RequestBudget
    turns: Turns
    counters: Counters
    authorization: bytes | None
    """The field line that is sent upstream where the client sends no Authorization of its own."""
    tracing: Tracing | None
    log_requests: bool
    report_outcome: Callable[[OutcomeReport], bool] | None = None
    """The function that takes what the client of a treated or a control request got; it returns False if that is
    dropped.
    """
    hook: Hook | None = None
    """The hook, which may be replaced at any time; a request keeps the one that it began with."""
    draining: bool = False
    """It is True if the response to the request in progress, or to one more, closes each connection."""
    draining_since: float = 0.0
    """The event-loop time at which the relay began to drain."""
    idle_drain_seconds: float = 0.0
    """The time from then on, or from the end of a later request, after which a connection without a request is closed,
    see `Relay.drain`."""
    access_log: AccessLog | None = None
    client_limits: ClientLimits | None = None
    """The limits of what one client may send; None if no limit is set."""
