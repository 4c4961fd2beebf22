"""The fuzzer finds nothing in a relay, and does find what a proxy does that hands on bytes."""

from __future__ import annotations

import asyncio

import pytest
from tests.bench.faults.fuzz import fuzz
from tests.bench.faults.fuzzing import running
from tests.bench.faults.fuzzing.running import Findings, Upstream, World, run


async def test_nothing_is_found_in_a_relay() -> None:
    findings = await fuzz(400, 7)
    assert not findings.found, findings.shown
    assert findings.counts["requests that were changed"] > 50
    assert findings.counts["responses that were changed"] > 50


async def test_a_proxy_that_hands_on_bytes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "HANG_SECONDS", 0.5)
    findings = Findings()
    world = World(findings, 7, stray=True)
    loop = asyncio.get_running_loop()
    upstream = await loop.create_server(lambda: Upstream(world), "127.0.0.1", 0)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        except ConnectionError:
            pass
        writer.close()

    async def splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine = await asyncio.open_connection(*upstream.sockets[0].getsockname()[:2])
        try:
            await asyncio.gather(pass_on(reader, engine[1]), pass_on(engine[0], writer))
        finally:
            for end in (engine[1], writer):
                end.transport.abort()

    proxy = await asyncio.start_server(splice, "127.0.0.1", 0)
    await run(proxy.sockets[0].getsockname()[1], world, clients=8, enough=lambda: findings.counts["requests"] >= 200)
    assert {"a malformed request reached the upstream", "a malformed response reached a client"} <= set(findings.found)
    for server in (proxy, upstream):
        server.close()
