"""Engines behind one name: they come and go with its addresses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hemostat.relay.upstreams.group import Upstreams
from hemostat.relay.upstreams.resolver import Resolver


async def test_engines_are_the_addresses_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[list[str] | None] = [["10.0.0.2", "10.0.0.1"], None, ["10.0.0.2", "10.0.0.3"]]

    async def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        assert (host, port) == ("vllm.models.svc", 8000)
        result = answers.pop(0)
        if result is None:
            raise OSError("no answer")
        return [(None, None, None, "", (address, port)) for address in result]

    loop = asyncio.get_running_loop()
    upstreams = Upstreams(loop, [], limit=8, queue_seconds=60.0)
    assert upstreams.choose(None) is None, "no address is known yet"
    resolver = Resolver(upstreams, "dns+http://vllm.models.svc:8000", 5.0)
    monkeypatch.setattr("hemostat.relay.upstreams.resolver.asyncio.get_running_loop", lambda: FakeLoop(getaddrinfo))
    await resolver.resolve()
    assert [engine.name for engine in upstreams.engines] == ["10.0.0.1:8000", "10.0.0.2:8000"]
    second = upstreams.engines[1]
    second.drained = True
    await resolver.resolve()
    assert len(upstreams.engines) == 2, "a look-up that fails changes nothing"
    await resolver.resolve()
    assert [engine.name for engine in upstreams.engines] == ["10.0.0.2:8000", "10.0.0.3:8000"]
    assert upstreams.engines[0] is second, "who stays keeps connections and health"
    assert upstreams.engines[0].origin.authority == b"vllm.models.svc:8000"
    upstreams.sweep(0.0)
    upstreams.close()


class FakeLoop:
    def __init__(self, getaddrinfo: Any) -> None:
        self.getaddrinfo = getaddrinfo
