"""One engine: where it is, the connections to it, and whether it gets requests."""

from __future__ import annotations

from hemostat.ipc.origin import Origin
from hemostat.relay.upstreams.health import Health
from hemostat.relay.upstreams.pool import Pool


class Engine:
    """One engine. It is composed by `Upstreams`; exchanges report to it how their requests ended."""

    __slots__ = ("drained", "failing", "health", "name", "origin", "outstanding", "pool", "requests", "resent")

    def __init__(self, origin: Origin, pool: Pool, health: Health) -> None:
        self.name = origin.name
        self.origin = origin
        self.pool = pool
        self.health = health
        self.drained = False
        """It is True if the engine gets no new requests, because an operator drains it."""
        self.outstanding = 0
        """The number of requests in progress, with the ones that wait for a connection."""
        self.failing = False
        """It is True if the engine has failed a request since the last sweep."""
        self.requests = 0
        """The number of requests that were sent to it since the start."""
        self.resent = 0
        """The number of these requests that were then sent once more, or to another engine."""
