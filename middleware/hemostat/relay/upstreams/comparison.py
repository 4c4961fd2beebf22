"""Finds the engine that fails more requests than the others do. It is pure: times are passed in (`perf_counter`
seconds).

A request that fails may be the engine's fault or the request's own, and which it is shows in what other engines did:

- Another engine has answered the same request: the failure is *proven* to be the first engine's.
- Two engines have failed it: it is put down to the request, and counts for no engine (`put_down`).
- It was not sent to another one: a client whose requests fail at every engine says nothing about one of them, a client
  whose requests fail at one engine alone says all.

So failures are compared within each client. If all engines were alike, each of the client's n failures would be at
engine e with the probability p of its share of the requests, so that a share q or more of them has a probability of at
most exp(-n KL(q||p)) (Chernoff's bound). An engine is odd where that is too improbable, and the odds are more than
TOLERANCE times the odds of p. The same holds for the first MAX_POOLED failures of all clients together: many clients
with few requests each are enough, and none of them decides it alone, nor one network with many credentials.

Where the conversation decides which engine a request goes to, a client whose requests are bad could be seen at one
engine alone, by chance or on purpose. So a client whose failures begin to stand out at one of them is *spread*: for a
while its requests go to engines at random, and what was counted before is forgotten. Of its requests in progress at a
time only the first failure counts, unless it is proven.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import log
from typing import Final

TOLERANCE: Final = 2.0
MAX_CHANCE: Final = 1e-6
"""The largest probability that failures stand out at an engine by chance. With four engines of equal shares it takes
ten failures at one of them alone, and with two engines twenty.
"""
MIN_FAILURES: Final = 5
"""The least number of failures that stand out: with many engines, MAX_CHANCE would be satisfied by fewer."""
MAX_POOLED: Final = 5
"""The largest number of failures of one client that count in the pool of all clients, in a window. Failures that are
not proven count for the client's network, up to the same number: it can invent credentials for any number of clients.
"""
MIN_FAILED_RATIO: Final = 0.05
"""The least share of an engine's requests that have to fail: few failures cost clients less than an engine that gets no
requests.
"""
WINDOW_SECONDS: Final = 20.0
MIN_WINDOW_REQUESTS: Final = 500
"""The number of requests after which, and after WINDOW_SECONDS, counts begin anew, so that an engine that turns bad is
soon seen.
"""
MAX_CLIENTS: Final = 1024
"""The largest number of clients with failures. Beyond it, the client without a failure for the longest time is
forgotten.
"""
SPREAD_FAILURES: Final = 2
SPREAD_SECONDS: Final = 10.0
NO_RETRY_SECONDS: Final = 1.0
"""A client whose request failed at two engines does not spend the other clients' retries for so long."""


class _Client:
    __slots__ = ("counted_at", "failures", "no_retry_until", "pooled", "spread_until")

    def __init__(self, engines: int) -> None:
        self.failures = [0] * engines
        """The number of failures at each engine."""
        self.pooled = 0
        self.counted_at = float("-inf")
        self.spread_until = float("-inf")
        self.no_retry_until = float("-inf")


class FailureComparison:
    """Owns which clients' requests have failed at which engine in the present window.

    requests, everywhere: sent to each engine so far. available: engines that get requests.
    """

    def __init__(self, requests: Sequence[int], now: float) -> None:
        self._clients: OrderedDict[bytes, _Client] = OrderedDict()
        self._spread_until = float("-inf")
        self.spreading = False
        """It is True if `spreads` may be True."""
        self.clear(requests, now)

    def clear(self, requests: Sequence[int], now: float) -> None:
        """Begins a window."""
        self._began = now
        self._before = list(requests)
        self._failed = [0] * len(requests)
        """The number of requests that failed at each engine."""
        self._pooled = [0] * len(requests)
        """The number of these failures at each engine that are among the first ones of a client."""
        for key, client in tuple(self._clients.items()):
            if now < client.spread_until or now < client.no_retry_until:
                client.failures = [0] * len(requests)
                client.pooled = 0
            else:
                del self._clients[key]

    def advance(self, requests: Sequence[int], now: float) -> None:
        """Goes on to the next window, if it is time; it is called about once a second."""
        self.spreading = now < self._spread_until
        if now - self._began > WINDOW_SECONDS and sum(requests) - sum(self._before) >= MIN_WINDOW_REQUESTS:
            self.clear(requests, now)

    def failed(
        self,
        key: bytes,
        network: bytes,
        engine: int,
        requests: Sequence[int],
        available: int,
        *,
        started: float,
        now: float,
        proven: bool,
    ) -> bool:
        """Counts a client's request that failed at this engine. Returns True if this client's failures stand out at
        this engine. key, network: who the client is, see `client_identity`. started: when the relay had read the
        request's head. proven: True if another engine has answered the request."""
        client = self._client(key)
        self._failed[engine] += 1
        if proven or started >= client.counted_at:
            client.counted_at = now
            client.failures[engine] += 1
            pooled = client if proven else self._client(network)
            if pooled.pooled < MAX_POOLED:
                pooled.pooled += 1
                self._pooled[engine] += 1
        most = max(client.failures)
        if client.failures[engine] < most or client.failures.count(most) > 1:
            return False
        if not _stand_out(client.failures, engine, self._share(engine, requests, available)):
            return False
        if not proven and most >= SPREAD_FAILURES:
            if now >= client.spread_until:
                client.failures = [0] * len(requests)
            client.spread_until = self._spread_until = now + SPREAD_SECONDS
            self.spreading = True
        return True

    def odd(self, key: bytes, engine: int, requests: Sequence[int], available: int) -> bool:
        """Returns True if the engine fails more than the others, after a failure of this client there."""
        sent = requests[engine] - self._before[engine]
        if self._failed[engine] < MIN_FAILED_RATIO * sent:
            return False
        share, enough = self._share(engine, requests, available), -log(MAX_CHANCE)
        within = _evidence(self._client(key).failures, engine, share)
        return within >= enough + log(len(self._clients)) or _evidence(self._pooled, engine, share) >= enough

    def put_down(self, key: bytes, now: float) -> None:
        """Puts a failure down to the request: it failed at two engines, and no other answered it."""
        self._client(key).no_retry_until = now + NO_RETRY_SECONDS

    def may_retry(self, key: bytes, now: float) -> bool:
        client = self._clients.get(key)
        return client is None or now >= client.no_retry_until

    def spreads(self, key: bytes, now: float) -> bool:
        """Returns True if the client's requests go to engines at random."""
        client = self._clients.get(key)
        return client is not None and now < client.spread_until

    def _client(self, key: bytes) -> _Client:
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = _Client(len(self._before))
            if len(self._clients) > MAX_CLIENTS:
                self._clients.popitem(last=False)
        else:
            self._clients.move_to_end(key)
        return client

    def _share(self, engine: int, requests: Sequence[int], available: int) -> float:
        """Returns the engine's share of the requests, at least an equal one: an engine that is slow gets few, and these
        may be one client's.
        """
        total = sum(requests) - sum(self._before)
        share = (requests[engine] - self._before[engine]) / total if total > 0 else 0.0
        return min(max(share, 1.0 / max(available, 1)), 1.0)


def _stand_out(counts: Sequence[int], engine: int, share: float) -> bool:
    """Returns True if the odds of a failure at this engine are more than TOLERANCE times the odds of its share."""
    elsewhere = sum(counts) - counts[engine]
    return not elsewhere or counts[engine] * (1.0 - share) > TOLERANCE * elsewhere * share


def _evidence(counts: Sequence[int], engine: int, share: float) -> float:
    """Returns -log of a bound on the probability of so large a part at this engine, in nats; 0 where it does not stand
    out, or is of a few.

    >>> round(_evidence([10, 0, 0, 0], 0, 0.25), 1), _evidence([5, 3, 3, 3], 0, 0.25)
    (13.9, 0.0)
    """
    if counts[engine] < MIN_FAILURES or not _stand_out(counts, engine, share):
        return 0.0
    total = sum(counts)
    part = counts[engine] / total
    rest = (1.0 - part) * log((1.0 - part) / (1.0 - share)) if part < 1.0 else 0.0
    return total * (part * log(part / share) + rest)
