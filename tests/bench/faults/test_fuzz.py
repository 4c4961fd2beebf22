"""The fuzzer finds nothing in a relay, and does find what a proxy does that hands on bytes."""

from __future__ import annotations

import asyncio

import pytest
from tests.bench.faults import fuzz as bench
from tests.bench.faults.fuzz import Piece, fuzz, pieces
from tests.bench.faults.fuzzing import running
from tests.bench.faults.fuzzing.running import Findings, Upstream, World, run


@pytest.mark.parametrize("treatment", bench.TREATMENTS)
async def test_nothing_is_found_in_a_relay(treatment: str) -> None:
    findings = await fuzz(400, 7, treatment)
    assert not findings.found, findings.shown
    # How many are depends on which of them come first: some ten of 400.
    assert (findings.counts["requests that were treated"] > 0) == (treatment != "none")
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


def test_a_run_goes_on_behind_its_last_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PIECE_MESSAGES", 60)
    begun = next(iter(pieces(140, 7, [])))
    rest = list(pieces(140, 7, [begun]))
    assert [(piece.seed, piece.messages, piece.treatment) for piece in (begun, *rest)] == [
        (7, 60, "none"),
        (9, 60, "profile"),
        (11, 20, "adapter"),
    ]
    assert all(piece.counts["requests"] >= piece.messages for piece in rest)


def test_pieces_of_another_run_are_not_gone_on_with() -> None:
    other = Piece(bench.build(), 8, bench.PIECE_MESSAGES, "none", {}, {}, [], 1.0)
    with pytest.raises(SystemExit, match="another run"):
        next(pieces(2 * bench.PIECE_MESSAGES, 7, [other]))
