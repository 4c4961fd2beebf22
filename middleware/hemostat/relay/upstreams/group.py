"""The engines of one relay: each with its address, its pool of connections and its health, and all together."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Collection, Sequence
from typing import Final

from hemostat.ipc.messages import EngineHealth
from hemostat.ipc.origin import Origin
from hemostat.relay.upstreams.balancer import UNAVAILABLE, Balancer
from hemostat.relay.upstreams.comparison import FailureComparison
from hemostat.relay.upstreams.health import Health
from hemostat.relay.upstreams.pool import Pool

RETRY_RATIO: Final = 0.1
"""The share of the requests that may be sent once more: engines that all fail because they have too much to do get 1.1
times as much, not four times.
"""
RETRY_BURST: Final = 20.0
"""The number of retries that are allowed before any request has earned one: when an engine ends, other engines can
answer its first failed requests. Of two engines, one that fails its requests is ejected after some twenty of them
(`comparison.MAX_CHANCE`): no client sees an error until then.
"""


MAX_ENGINES: Final = 64
UNAVAILABLE_STATUSES: Final = frozenset({502, 503})
"""The statuses of a router before the engine, or of an engine that can answer nothing now. A 500 is not among them: it
can be about one request alone.
"""


class RetryBudget:
    """A token bucket that requests fill.

    >>> budget = RetryBudget()
    >>> sum(budget.take(100) for _ in range(50)), sum(budget.take(130) for _ in range(50))
    (20, 3)
    """

    def __init__(self) -> None:
        self._tokens = RETRY_BURST
        self._requests = 0

    def take(self, requests: int) -> bool:
        """Returns True if one more retry is allowed, and takes it. requests: of clients, so far."""
        self._tokens = min(RETRY_BURST, self._tokens + RETRY_RATIO * max(0, requests - self._requests))
        self._requests = requests
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


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


class Upstreams:
    """Owns the engines, and which of them are drained.

    limit: connections to each engine. queue_seconds: longest wait for one. context: for TLS. checked: a
    `HealthChecker` asks the engines. affinity: requests of a conversation go to one engine.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        origins: Sequence[Origin],
        *,
        limit: int,
        queue_seconds: float,
        context: ssl.SSLContext | None = None,
        checked: bool = False,
        affinity: bool = True,
    ) -> None:
        self._loop = loop
        self._limit = limit
        self._queue_seconds = queue_seconds
        self._context = context
        self._checked = checked
        self.affinity = affinity
        self._drained: frozenset[str] = frozenset()
        self._retired: list[Engine] = []
        """The engines that are not among the origins any more; their last responses are still read."""
        self.engines: list[Engine] = []
        self.only: Engine | None = None
        """The engine, where there is one alone: it gets every request, whatever is known of its health."""
        self._balancer = Balancer([])
        self.comparison = FailureComparison([], 0.0)
        self.retries = RetryBudget()
        self._failing = False
        """It is True if some engine is failing."""
        self.set_origins(origins)

    def set_origins(self, origins: Sequence[Origin]) -> None:
        """Sets the engines from now on, at most MAX_ENGINES; those that stay keep their connections and their
        health."""
        known = {engine.name: engine for engine in self.engines}
        engines = []
        for origin in origins[:MAX_ENGINES]:
            engine = known.pop(origin.name, None)
            if engine is None:
                pool = Pool(self._loop, origin, self._limit, self._context, self._queue_seconds)
                engine = Engine(origin, pool, Health(checked=self._checked))
                engine.drained = engine.name in self._drained
            engines.append(engine)
        self._retired += known.values()
        self.engines = engines
        self.only = engines[0] if len(engines) == 1 else None
        self._balancer = Balancer([engine.name for engine in engines])
        self.comparison = FailureComparison([engine.requests for engine in engines], time.perf_counter())

    def set_drained(self, names: Collection[str]) -> None:
        """Drains these engines, which get no new requests; all others do."""
        self._drained = frozenset(names)
        for engine in self.engines:
            engine.drained = engine.name in self._drained

    def draw(self, number: float) -> Engine | None:
        """Returns one of the engines that get requests, each with the same probability, whatever their load; None if
        there is none, or one has no free connection: no request waits for one because it is sampled. number: in [0,
        1)."""
        engines = [engine for engine in self.engines if engine.health.up and not engine.drained]
        if not engines or any(engine.outstanding >= self._limit for engine in engines):
            return None
        return engines[int(number * len(engines))]

    def choose(self, key: int | None, tried: Collection[Engine] = ()) -> Engine | None:
        """Returns the engine for a request; None if there is none but those that were tried.

        An ejection is a guess, a refusal of ours is certain: where no engine is available, requests go to those that
        can be reached and are not drained, without such to all that are not drained, and where all are drained, to all.
        """
        engines = self.engines
        loads = [engine.outstanding if engine.health.up and not engine.drained else UNAVAILABLE for engine in engines]
        if self._failing:
            self._raise_loads(loads)
        if tried:
            loads = [UNAVAILABLE if engine in tried else load for engine, load in zip(engines, loads, strict=True)]
        index = self._balancer.choose(loads, key)
        if index < 0:
            left = [engine for engine in engines if engine not in tried]
            left = [engine for engine in left if not engine.drained] or left
            left = [engine for engine in left if engine.health.reachable] or left
            loads = [engine.outstanding if engine in left else UNAVAILABLE for engine in engines]
            index = self._balancer.choose(loads, key)
        return engines[index] if index >= 0 else None

    def _raise_loads(self, loads: list[int]) -> None:
        """Raises the loads of failing engines: an engine that fails its requests at once has few in progress: it counts
        as loaded as the others are, so that it does not get most of the requests."""
        total = others = 0
        for index, engine in enumerate(self.engines):
            if loads[index] != UNAVAILABLE and not engine.failing:
                total += loads[index]
                others += 1
        if not others:
            return
        mean = total // others
        for index, engine in enumerate(self.engines):
            if engine.failing and UNAVAILABLE < loads[index] < mean:
                loads[index] = mean

    def take_retry(self) -> bool:
        """Returns True if one more request may be sent to another engine after one has failed it."""
        engines = (*self.engines, *self._retired)
        return self.retries.take(sum(engine.requests - engine.resent for engine in engines))

    def request_failed(
        self,
        client: bytes,
        network: bytes,
        failed: Sequence[tuple[Engine, int]],
        started: float,
        now: float,
        *,
        answered: bool,
    ) -> None:
        """Notes that a request had no usable answer. client, network: who sent it, see `client_identity`.

        failed: from these engines, each with its status; 0: the connection closed too early, or the response is
        invalid. started, now: perf_counter; when the relay had read its head. answered: by another engine in the end.
        """
        loop_time = self._loop.time()
        self._failing = True
        for engine, _ in failed:
            engine.failing = True
        if self.only is not None:
            engine, status = failed[0]
            if status != 500:
                engine.health.request_failed(loop_time)
            return
        if not answered and len(failed) > 1:
            self.comparison.put_down(client, now)
            return
        for engine, status in failed:
            health = engine.health
            if not health.up or engine not in self.engines:
                continue
            index, requests = self.engines.index(engine), [other.requests for other in self.engines]
            available = sum(candidate.health.up and not candidate.drained for candidate in self.engines)
            accused = self.comparison.failed(
                client, network, index, requests, available, started=started, now=now, proven=answered
            )
            if self.comparison.odd(client, index, requests, available):
                health.eject(loop_time)
                self.comparison.clear(requests, now)
            elif (answered and status in UNAVAILABLE_STATUSES) or (accused and health.on_probation):
                health.request_failed(loop_time)

    def sweep(self, now: float) -> None:
        """Does what is due once a second. now: event-loop time."""
        self._failing = False
        self.comparison.advance([engine.requests for engine in self.engines], time.perf_counter())
        for engine in self.engines:
            engine.health.advance(now)
            engine.failing = False
            engine.pool.sweep(now)
        for engine in tuple(self._retired):
            engine.pool.close_idle()
            engine.pool.sweep(now)
            if not engine.outstanding:
                engine.pool.close()
                self._retired.remove(engine)

    def report(self) -> list[EngineHealth]:
        return [
            EngineHealth(
                engine=engine.name,
                state=engine.health.state.value,
                drained=engine.drained,
                outstanding=engine.outstanding,
                requests=engine.requests,
                resent=engine.resent,
                ejections=engine.health.ejections,
            )
            for engine in self.engines
        ]

    def close(self) -> None:
        """Closes all connections at once."""
        for engine in (*self.engines, *self._retired):
            engine.pool.close()
