"""The limits of one client at this relay process: requests per second, and requests in progress.

`client_identity` says who a client is. Each relay process counts for itself: with N of them, a client
whose connections reach all may ask for N times as much.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from hemostat.relay.client_identity import client_key
from hemostat.relay.http.errors import error_body
from hemostat.relay.http.request import RequestHead

MAX_CLIENTS = 65_536
"""The largest number of clients that are remembered; beyond it those without a request for the longest time are
forgotten."""
UNLIMITED_METHODS = frozenset((b"GET", b"HEAD"))

RATE, CONCURRENT = "rate", "concurrent"


@dataclass(slots=True)
class _Client:
    due: float = 0.0
    """The time at which a request would come that keeps exactly to the rate (GCRA's theoretical arrival time),
    monotonic seconds."""
    in_progress: int = 0


@dataclass(frozen=True, slots=True)
class Exceeded:
    """The limit that a client has exceeded. limit: RATE or CONCURRENT. retry_after: whole seconds."""

    limit: str
    retry_after: int

    def body(self) -> bytes:
        what = "requests per second" if self.limit == RATE else "requests at a time"
        message = f"too many {what} from this client; retry after {self.retry_after} s"
        return error_body(429, message, "rate_limit_exceeded")

    def field_line(self) -> bytes:
        return b"Retry-After: %d\r\n" % self.retry_after


class ClientLimits:
    """Owns what is known of the clients that have been here lately.

    requests_per_second, burst: the rate at which a client may send, and the number of requests that it may send at
    once; they are judged by the generic cell rate algorithm (ITU-T I.371, also known as a leaky bucket as a meter).
    concurrent: the number of a client's requests that may be in progress. A limit of None is no limit.

    >>> limits = ClientLimits(requests_per_second=2.0, burst=2)
    >>> [limits.begin(b"a", now) for now in (10.0, 10.0, 10.0)]
    [None, None, Exceeded(limit='rate', retry_after=1)]
    >>> limits.begin(b"b", 10.0), limits.begin(b"a", 10.5)
    (None, None)
    """

    def __init__(
        self,
        key: Literal["authorization", "address"] = "authorization",
        requests_per_second: float | None = None,
        burst: int = 10,
        concurrent: int | None = None,
    ) -> None:
        self._by_address = key == "address"
        self._interval = 0.0 if requests_per_second is None else 1.0 / requests_per_second
        self._tolerance = self._interval * (burst - 1)
        self._concurrent = math.inf if concurrent is None else concurrent
        self._clients: OrderedDict[bytes, _Client] = OrderedDict()

    @property
    def enabled(self) -> bool:
        return self._interval > 0.0 or self._concurrent < math.inf

    def key(self, request: RequestHead, network: bytes) -> bytes | None:
        """Returns the key of the client. It is None if the request does not count: a GET or HEAD that does not open a
        WebSocket.
        """
        if request.method in UNLIMITED_METHODS and not request.upgrade:
            return None
        return network if self._by_address else client_key(request, network)

    def begin(self, key: bytes, now: float) -> Exceeded | None:
        """Admits a request, or returns the limit that it exceeds. None means that it is admitted, and that `end` is to
        be called when it has ended."""
        client = self._clients.get(key)
        if client is None:
            self._make_room()
            client = self._clients[key] = _Client()
        else:
            self._clients.move_to_end(key)
        if client.in_progress >= self._concurrent:
            return Exceeded(CONCURRENT, 1)
        wait = client.due - now - self._tolerance
        if wait > 1e-9:
            return Exceeded(RATE, max(1, math.ceil(wait)))
        client.due = max(client.due, now) + self._interval
        client.in_progress += 1
        return None

    def end(self, key: bytes) -> None:
        client = self._clients.get(key)
        if client is not None and client.in_progress > 0:
            client.in_progress -= 1

    def _make_room(self) -> None:
        """Forgets clients without a request in progress; those with one are fewer than the relay's connections."""
        for _ in range(min(len(self._clients), 8)):
            if len(self._clients) < MAX_CLIENTS:
                return
            key, client = self._clients.popitem(last=False)
            if client.in_progress:
                self._clients[key] = client
