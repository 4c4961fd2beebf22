"""The access log: a line for every request, whatever came of it, and none of its content."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.relay import GET, OK, Request, UpstreamConnection, answering, post, relaying
from tests.support.waiting import until

from hemostat.relay.access_log import MAX_BUFFERED_BYTES, MAX_ID_CHARACTERS, AccessLog, Line, _text_line

SECRET = b"a text that nobody may log"
LINE = Line("2026-01-01T00:00:00.000+00:00", "GET", "other", 200, "ok", 1, 0.5, None, "none", "id")


class File:
    """A log's file, and how many lines were dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.dropped = 0

    def drop(self, lines: int) -> None:
        self.dropped += lines

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(tmp_path / "access.log")
    yield file
    os.close(file.descriptor)


async def test_every_request_has_a_line_without_its_content(file: File) -> None:
    def answer(request: Request) -> bytes:
        status = b"404 Not Found" if request.target.startswith(b"/v1/models/x") else b"200 OK"
        return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(SECRET), SECRET)

    log = AccessLog(file.descriptor, "json", file.drop, clients=True)
    async with relaying(answering([], answer), access_log=log) as (_, upstream, connect):
        client = await connect()
        await client.send(post(SECRET, b"X-Request-Id: own-id", b"Authorization: Bearer " + SECRET.replace(b" ", b"")))
        sent = await client.response("POST")
        await client.send(b"GET /v1/models/x?query=" + SECRET.replace(b" ", b"_") + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.response()
        await client.send(b"POST /v1/load_lora_adapter HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
        await client.response("POST")
        await client.send(b"no request\r\n\r\n")
        await client.rest()
        await upstream.stop()
        client = await connect()
        await client.send(GET)
        await client.response()
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.lines()]
    assert [(line["method"], line["route"], line["status"], line["outcome"]) for line in lines] == [
        ("POST", "/v1/completions", 200, "ok"),
        ("GET", "other", 404, "client_error"),
        ("POST", "other", 403, "refused"),
        ("", "other", 400, "refused"),
        ("GET", "/v1/models", 502, "upstream_failed"),
    ]
    assert lines[0]["request_id"] == "own-id"
    assert lines[0]["bytes"] > len(sent.body)
    assert 0.0 < lines[0]["upstream_seconds"] < lines[0]["seconds"]
    assert lines[2]["upstream_seconds"] is None
    assert {line["client"] for line in lines} == {"127.0.0.1"}
    text = file.path.read_text()
    assert "nobody" not in text
    assert "query" not in text
    assert file.dropped == 0


async def test_a_client_that_is_gone_has_a_line_and_a_long_id_is_cut(file: File) -> None:
    asked = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        asked.set()
        await asyncio.Event().wait()

    log = AccessLog(file.descriptor, "text", file.drop)
    async with relaying(script, access_log=log) as (relay, _, connect):
        client = await connect()
        await client.send(GET[:-2] + b'X-Request-Id: "%b\r\n\r\n' % (b"x" * 5000))
        await until(asked.is_set)
        await client.close()
        await until(lambda: len(relay.clients) == 0)
    (line,) = file.lines()
    assert " method=GET route=/v1/models status=0 outcome=client_gone " in line
    assert line.endswith(f' arm=none request_id="\\"{"x" * 127}"')


async def test_streams_count_bytes_and_pipelined_requests_have_a_line_each(file: File) -> None:
    log = AccessLog(file.descriptor, "json", file.drop)
    async with relaying(answering([]), access_log=log) as (_, _, connect):
        client = await connect()
        await client.send(GET * 3)
        for _ in range(3):
            await client.response()
    lines = [json.loads(line) for line in file.lines()]
    assert [line["bytes"] for line in lines] == [len(OK)] * 3
    assert "client" not in lines[0]


@given(request_id=st.text(max_size=MAX_ID_CHARACTERS))
def test_no_request_id_can_make_another_field_or_line(request_id: str) -> None:
    line = _text_line(msgspec.structs.replace(LINE, request_id=request_id)).decode()
    assert line.isascii()
    assert line.count("\n") == 1
    fields, _, shown = line.rstrip("\n").partition(" request_id=")
    assert [field.partition("=")[0] for field in fields.split(" ")] == list(Line.__struct_fields__[:-2])
    assert shown == request_id or request_id == ("" if shown == "-" else json.loads(shown))


async def test_what_cannot_be_written_is_dropped_and_counted(file: File) -> None:
    """A pipe that nobody reads: requests go on, and memory is bounded."""
    reading, writing = os.pipe()
    log = AccessLog(writing, "json", file.drop)
    size = 0
    while file.dropped == 0:
        log.add(LINE)
        size += 100
        assert size < 3 * MAX_BUFFERED_BYTES, "it is bounded"
        await asyncio.sleep(0)
    before = file.dropped
    os.close(reading)
    await log.close(timeout=30.0)
    assert file.dropped > before, "the pipe is broken"
    os.close(writing)


async def test_a_torn_line_is_ended_before_the_next_one(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    write, free = os.write, [30]

    def full_disk(descriptor: int, data: bytes) -> int:
        if free[0] <= 0:
            raise OSError(28, "No space left on device")
        written = write(descriptor, data[: free[0]])
        free[0] -= written
        return written

    log = AccessLog(file.descriptor, "json", file.drop)
    monkeypatch.setattr(os, "write", full_disk)
    log.add(LINE)
    log.flush()
    await until(lambda: file.dropped == 1)
    free[0] = 10_000
    log.add(LINE)
    await log.close(timeout=30.0)
    torn, whole = file.lines()
    assert len(torn) == 30
    assert json.loads(whole)["request_id"] == "id"


async def test_a_write_to_a_pipe_ends_with_a_line_and_is_not_mixed_with_another_relays(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel keeps writes of up to PIPE_BUF bytes together."""
    reading, writing = os.pipe()
    log = AccessLog(writing, "json", file.drop)
    write, written = os.write, list[bytes]()
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(bytes(data)) or write(descriptor, data))
    for _ in range(100):
        log.add(LINE)
    await log.close(timeout=30.0)
    assert b"".join(written).count(b"\n") == 100
    assert all(len(data) <= select.PIPE_BUF and data.endswith(b"\n") for data in written)
    assert len(written) < 10
    os.close(reading)
    os.close(writing)


BLOCKED = """
import asyncio, os
from hemostat.relay.access_log import AccessLog, Line

async def run() -> None:
    log = AccessLog(os.pipe()[1], "json", lambda lines: None)
    for _ in range(1000):
        log.add(Line("", "GET", "other", 200, "ok", 1, 0.5, None, "none", "id" * 60))
    await log.close(timeout=0.1)

asyncio.run(run())
"""


def test_a_pipe_without_a_reader_does_not_keep_the_process_from_its_end() -> None:
    assert subprocess.run([sys.executable, "-c", BLOCKED], timeout=60, check=False).returncode == 0
