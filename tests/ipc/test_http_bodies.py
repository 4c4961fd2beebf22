"""Answers of HTTP servers are read with a bound, whatever they send: memory and time stay bounded."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hemostat.cli import main
from hemostat.ipc.http_bodies import AnswerBody, AnswerTooLarge
from hemostat.reference import server as server_module
from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.server import MAX_ANSWER_BYTES, VllmServer

MIB = 1 << 20
PIECE = bytes(MIB)


@asynccontextmanager
async def answering(head: str, pieces: int, piece: bytes = PIECE, pause: float = 0.0) -> AsyncIterator[tuple[str, Any]]:
    """A server that sends `piece` so many times to whoever asks. Yields its address and how many it has sent."""
    sent: dict[str, int] = {"pieces": 0}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 {head}\r\nconnection: close\r\n\r\n".encode())
            for _ in range(pieces):
                writer.write(piece)
                await writer.drain()
                sent["pieces"] += 1
                await asyncio.sleep(pause)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", sent


GIGABYTE = 1024
LENGTH = f"content-length: {GIGABYTE * MIB}"
JSON = "content-type: application/json"


@pytest.mark.parametrize(
    ("head", "pieces", "reason"),
    [
        (f"200 OK\r\n{JSON}\r\n{LENGTH}", GIGABYTE, "too_large"),
        (f"200 OK\r\n{JSON}", GIGABYTE, "too_large"),
        (f"500 Oops\r\n{JSON}", GIGABYTE, "http_error"),
        (f"500 Oops\r\n{JSON}\r\n{LENGTH}", GIGABYTE, "http_error"),
    ],
)
async def test_a_gigabyte_is_not_read(head: str, pieces: int, reason: str) -> None:
    async with answering(head, pieces) as (url, sent):
        server = VllmServer(url)
        tracemalloc.start()
        try:
            for ask in (server.models(), server.tokenize("m", "x"), server.vocab_size("m")):
                with pytest.raises(ReferenceFailure) as failure:
                    await ask
                assert failure.value.reason == reason
                assert "\n" not in str(failure.value)
                assert len(str(failure.value)) < 500
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            await server.close()
        assert peak < 5 * MAX_ANSWER_BYTES
        assert sent["pieces"] < 100


async def test_a_compressed_answer_is_not_decompressed() -> None:
    bomb = gzip.compress(bytes(64 * MIB))
    assert len(bomb) < 100_000
    async with answering(f"200 OK\r\ncontent-encoding: gzip\r\n{JSON}", 1, bomb) as (url, _):
        server = VllmServer(url)
        tracemalloc.start()
        try:
            with pytest.raises(ReferenceFailure, match="gzip") as failure:
                await server.models()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            await server.close()
        assert failure.value.reason == "bad_answer"
        assert peak < 8 * MIB


async def test_an_answer_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then satisfies every time-out of a single read."""
    monkeypatch.setattr(server_module, "CONNECT_SECONDS", 0.5)
    async with answering(f"200 OK\r\n{JSON}", 10_000, b" ", pause=0.01) as (url, _):
        server = VllmServer(url, timeout=0.5)
        with pytest.raises(ReferenceFailure) as failure:
            await server.models()
        assert failure.value.reason == "timeout"
        await server.close()


async def test_the_command_line_reads_the_admin_port_with_the_same_bound(capsys: pytest.CaptureFixture[str]) -> None:
    bomb = gzip.compress(bytes(8 * MIB))
    for head, pieces, piece, words in (
        (f"200 OK\r\n{JSON}\r\n{LENGTH}", GIGABYTE, PIECE, "an answer of more than"),
        (f"200 OK\r\n{JSON}\r\ncontent-encoding: gzip", 1, bomb, "'gzip'"),
    ):
        async with answering(head, pieces, piece) as (url, sent):
            assert await asyncio.to_thread(main, ["profile", "list", "--admin", url]) == 2
            said = capsys.readouterr().err
            assert words in said
            assert "Traceback" not in said
            assert sent["pieces"] < 100


@given(st.lists(st.binary(max_size=9), max_size=9), st.integers(0, 60), st.integers(0, 30))
def test_pieces_of_any_size_give_the_same_body(pieces: list[bytes], limit: int, skip: int) -> None:
    whole = b"".join(pieces)
    body = AnswerBody(httpx.Headers(), limit, skip)
    if len(whole) > limit:
        with pytest.raises(AnswerTooLarge):
            _ = [body.feed(piece) for piece in pieces]
        assert body.bytes == b""
        return
    for piece in pieces:
        body.feed(piece)
    assert (body.bytes, body.length) == (whole[skip:], len(whole))


def test_what_the_server_announces_is_used_only_where_it_is_too_much() -> None:
    for announced in ("7", "9" * 30):
        with pytest.raises(AnswerTooLarge):
            AnswerBody(httpx.Headers({"content-length": announced}), 6)
    for announced in ("6", "x", "-1", ""):
        AnswerBody(httpx.Headers({"content-length": announced}), 6)
