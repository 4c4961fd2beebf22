"""Checks a request's client limits when it begins, and writes the access log when it ends."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import cast

from hemostat.metrics import names
from hemostat.relay.client_limits import Exceeded
from hemostat.relay.client_side import ClientSide
from hemostat.relay.context import RelayContext
from hemostat.relay.http.request import RequestHead


class RequestWatch:
    """The watch of one request; it is made only if there are limits or an access log. It stands in for the transport
    that the response is written to, to count its bytes.
    """

    __slots__ = (
        "_address",
        "_answered",
        "_context",
        "_key",
        "_request",
        "_request_id",
        "_route",
        "_sent",
        "_started",
        "_transport",
        "_written",
        "exceeded",
    )

    def __init__(
        self,
        context: RelayContext,
        request: RequestHead,
        route: str,
        request_id: str,
        client: ClientSide,
        started: float,
    ) -> None:
        """started: when the request's head had been received (perf_counter)."""
        self._context = context
        self._request = request
        self._route = route
        self._request_id = request_id
        self._transport = client.transport
        self._address = client.address
        self._started = started
        self._sent = 0.0
        self._answered = 0.0
        self._written = 0
        self._key: bytes | None = None
        """The key of the client among whose requests in progress this one counts."""
        self.exceeded: Exceeded | None = None
        """The limit that refuses the request."""
        limits = context.client_limits
        key = None if limits is None else limits.key(request, client.holding.network)
        if limits is not None and key is not None:
            self.exceeded = limits.begin(key, started)
            if self.exceeded is None:
                self._key = key
            else:
                context.counters.add(names.CLIENT_LIMITED_REQUESTS, (self.exceeded.limit,))

    @property
    def transport(self) -> asyncio.Transport:
        return self._transport if self._context.access_log is None else cast("asyncio.Transport", self)

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> object:
        """Returns the transport's own attribute: everything else is left to it."""
        return getattr(self._transport, name)

    def sent(self) -> None:
        """Notes that the request goes to an engine; it may be sent again."""
        self._sent, self._answered = perf_counter(), 0.0

    def answered(self, received: float) -> None:
        """Notes when the response's head was received (perf_counter)."""
        self._answered = received

    def finish(self, status: int, outcome: str, arm: str) -> None:
        """Ends the watch, and writes the line of the access log. status: the one that the client got; 0: none."""
        context = self._context
        if self._key is not None and context.client_limits is not None:
            context.client_limits.end(self._key)
        if context.access_log is not None:
            context.access_log.request(
                self._request.method.decode("ascii"),
                self._route,
                status,
                outcome,
                self._written,
                perf_counter() - self._started,
                self._answered - self._sent if self._answered else None,
                arm,
                self._request_id,
                self._address,
            )
