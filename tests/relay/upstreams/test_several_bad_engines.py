"""Several of a relay's engines fail their requests at once: simulated requests, in simulated time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter
from typing import cast

import pytest

from hemostat.ipc.origin import parse_origin
from hemostat.relay.upstreams.group import Engine, Upstreams

RATE = 100
"""Requests per second."""


class SimulatedTime:
    """Stands in for the event loop, of which only the time is used."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


@dataclass(order=True)
class Asked:
    """A request at an engine, which answers it at `ends`."""

    ends: float
    number: int
    engine: Engine = field(compare=False)
    failed: tuple[tuple[Engine, int], ...] = field(compare=False, default=())


@pytest.mark.parametrize("affinity", [True, False])
@pytest.mark.parametrize("clients", [1, 100])
def test_two_engines_of_four_that_answer_500_at_once_are_ejected(affinity: bool, clients: int) -> None:
    """They pass their checks, fail within 2 ms and so have the fewest requests in progress; the others take 0.5 s. A
    request that both fail says nothing about them."""
    assert fmean(failed_share(affinity=affinity, clients=clients, seed=seed) for seed in range(20)) <= 0.05


def failed_share(*, affinity: bool, clients: int, seed: int) -> float:
    """Returns the share of the answers that are errors, once the engines have been found."""
    draw, loop, began = random.Random(seed), SimulatedTime(), perf_counter()
    origins = [parse_origin(f"http://engine-{number}:80") for number in range(4)]
    upstreams = Upstreams(
        cast("asyncio.AbstractEventLoop", loop), origins, limit=512, queue_seconds=60.0, checked=True, affinity=affinity
    )
    bad = upstreams.engines[:2]
    asked: list[Asked] = []
    failures = answers = 0

    def ask(number: int, failed: tuple[tuple[Engine, int], ...], key: int | None) -> None:
        engine = upstreams.choose(key, [tried for tried, _ in failed])
        assert engine is not None
        engine.requests += 1
        engine.outstanding += 1
        takes = 0.002 if engine in bad else draw.uniform(0.25, 0.75)
        heapq.heappush(asked, Asked(loop.now + takes, number, engine, failed))

    for number in itertools.count():
        while asked and asked[0].ends <= number / RATE:
            request = heapq.heappop(asked)
            loop.now, engine, failed, good = request.ends, request.engine, request.failed, request.engine not in bad
            engine.outstanding -= 1
            if not good:
                failed = (*failed, (engine, 500))
                if len(failed) == 1 and upstreams.take_retry():
                    engine.resent += 1
                    ask(request.number, failed, None)
                    continue
            if failed:
                client = b"%d" % (request.number % clients)
                now = began + loop.now
                upstreams.request_failed(client, client, failed, now - 0.002, now, answered=good)
            if request.number > 5 * RATE:
                answers += 1
                failures += not good
        if number > 10 * RATE:
            break
        loop.now = number / RATE
        if number % RATE == 0:
            for engine in upstreams.engines:
                engine.health.check_passed(loop.now)
            upstreams.sweep(loop.now)
        ask(number, (), draw.getrandbits(32) if affinity else None)
    assert all(engine.health.ejections for engine in bad)
    assert not any(engine.health.ejections for engine in upstreams.engines[2:])
    return failures / answers
