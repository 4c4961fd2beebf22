"""What is added to requests and taken out of answers: its cost, and that no client notices it, whatever goes wrong.

A relay with the interceptor, real sockets, and an upstream that answers a sampled request as each case says.
"""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import httpx
import numpy as np
from tests.bench.faults import Row
from tests.bench.proxy import plugin_cost
from tests.bench.proxy.load import events
from tests.bench.proxy.sampled_cost import LIMIT_MS, Cost, measure_both
from tests.support.captures import sized_capture
from tests.support.fake_vllm import FakeVllm
from tests.support.records import Truth, log_softmax, make_record
from tests.support.relay import Request, UpstreamConnection, relaying
from tests.support.wire import policy

from hemostat.interception.interceptor import Interceptor
from hemostat.metrics.names import REPEATED_REQUESTS, SHADOW_REQUESTS
from hemostat.openai.routes import CHAT
from hemostat.scoring.records_file import RecordsFile
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.errors import InvalidRecordError
from hemostat_calibration.record_checks import validate

NAME = "additions"
TAKES = "half a minute"
REQUESTS = 20
BEFORE_MS = {"JSON": 1.41, "stream": 3.38}
"""Of the revision before, on the same machine in the same minute."""
JSON_TYPE, STREAM_TYPE = b"application/json", b"text/event-stream"
INJECTED = (b"token_id:", b'"token_ids":[', b'_token_ids":[')


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    kind: bytes = JSON_TYPE
    coding: bytes = b""

    def written(self) -> bytes:
        coding = b"content-encoding: %b\r\n" % self.coding if self.coding else b""
        return b"HTTP/1.1 %d x\r\ncontent-type: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
            *(self.status, self.kind, coding),
            len(self.body),
            self.body,
        )


@dataclass
class Outcome:
    answers: list[httpx.Response]
    counts: Counter[tuple[str, ...]]
    upstream_requests: int

    @property
    def errors(self) -> int:
        return sum(answer.status_code >= 400 for answer in self.answers)

    @property
    def leaked(self) -> int:
        """Bytes of answers with anything of what was injected."""
        return sum(len(a.content) for a in self.answers if any(sign in a.content for sign in INJECTED))


async def asked(sampled: Answer, own: Answer, *, stream: bool, requests: int = REQUESTS) -> Outcome:
    """Requests that are all drawn; the upstream answers those that were added to by `sampled`."""
    counts: Counter[tuple[str, ...]] = Counter()
    seen: list[Request] = []

    async def script(connection: UpstreamConnection) -> None:
        while (request := await connection.request()) is not None:
            seen.append(request)
            await connection.send((sampled if b"return_token_ids" in request.body else own).written())

    def count(name: str, labels: tuple[str, ...]) -> None:
        counts[(name, *labels)] += 1

    hook = Interceptor(policy(), lambda capture: True, count)
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "stream": stream}
    answers = []
    async with relaying(script, hook=hook) as (_, _, connect):
        port = (await connect()).writer.get_extra_info("peername")[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            answers = [await client.post(CHAT, json=body) for _ in range(requests)]
    return Outcome(answers, counts, len(seen))


async def fake_answer(*, stream: bool, asked_for: bool) -> bytes:
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": 8}
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "stream": stream}
    if asked_for:
        body |= extra | ({"stream_options": {"include_usage": True}} if stream else {})
    transport = httpx.ASGITransport(FakeVllm(model="fake"))
    async with httpx.AsyncClient(transport=transport, base_url="http://fake") as client:
        return (await client.post(CHAT, json=body)).content


def cost_rows(costs: dict[str, Cost]) -> Iterator[Row]:
    for kind, cost in costs.items():
        case = f"CPU of one sampled answer ({kind}, 49 tokens × 20), relay and control"
        before = f"{BEFORE_MS[kind]:.2f} ms"
        limit = f"<= {LIMIT_MS} ms"
        for stage, spent in (("until it is queued", cost.until_queued), ("with parsing, if scored", cost.total)):
            yield Row(f"{case}, {stage}", before, f"{spent:.3f} ms", limit, spent <= LIMIT_MS)


def plugin_cost_rows(costs: dict[str, plugin_cost.Cost]) -> Iterator[Row]:
    for kind, cost in costs.items():
        case = f"the same ({kind}) where the engine's plugin hands out the tokens, with decoding them"
        spent = f"{cost.total:.3f} ms"
        yield Row(case, f"{BEFORE_MS[kind]:.2f} ms", spent, f"<= {LIMIT_MS} ms", cost.total <= LIMIT_MS)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "JSON that ends early": lambda data: data[: len(data) * 2 // 3],
    "a key twice": lambda data: data.replace(b'"model":"fake"', b'"model":"fake","model":"fake"'),
    "choices twice": lambda data: data.replace(b'"service_tier":null', data[data.index(b'"choices"') : -1]),
    "NaN": lambda data: data.replace(b'"created":', b'"created":NaN,"x":'),
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
}


async def answer_rows() -> list[Row]:
    rows = []
    plain = await fake_answer(stream=False, asked_for=False)
    full = await fake_answer(stream=False, asked_for=True)
    own = Answer(200, plain)
    for status, why in ((500, "NaN among the logprobs"), (413, "a limit of the body's size")):
        result = await asked(Answer(status, b"{}"), own, stream=False)
        measured = f"{result.errors} of {REQUESTS}, {result.upstream_requests - REQUESTS} asked twice"
        rows.append(
            Row(
                f"{status} only because of what was added ({why}): clients with an error",
                f"all {REQUESTS}",
                measured,
                "0",
                result.errors == 0,
            )
        )
    result = await asked(Answer(500, b"{}"), Answer(500, b"{}"), stream=False)
    twice = result.upstream_requests - REQUESTS
    rows.append(Row("500 whatever is asked: requests that are asked twice", "0", float(twice), "<= 1", twice <= 1))
    for name, damage in DAMAGES.items():
        damaged = damage(full)
        assert damaged != full, name
        result = await asked(Answer(200, damaged), own, stream=False)
        rows.append(
            Row(
                f"{name}: bytes that hold what was injected, {REQUESTS} answers",
                f"{REQUESTS * len(damaged)}",
                float(result.leaked),
                "0",
                result.leaked == 0,
            )
        )
    event = events(await fake_answer(stream=True, asked_for=True))[1]
    choice = json.loads(event[6:])
    choice["choices"] *= 2
    two = b"data: " + json.dumps(choice).encode() + b"\n\ndata: [DONE]\n\n"
    result = await asked(Answer(200, two, STREAM_TYPE), own, stream=True)
    rows.append(Row("an event with two choices: the same", "", float(result.leaked), "0", result.leaked == 0))
    result = await asked(Answer(200, gzip.compress(full), coding=b"gzip"), own, stream=False)
    equal = sum(a.content == plain for a in result.answers)
    captured = result.counts[SHADOW_REQUESTS, "shadowed", ""]
    rows.append(
        Row(
            "gzip that nobody asked for: answers as without sampling, and captured",
            f"0 of {REQUESTS}",
            f"{equal}, {captured} of {REQUESTS}",
            f"{REQUESTS}",
            equal == captured == REQUESTS,
        )
    )
    result = await asked(Answer(200, b"\x00\x01", coding=b"br"), own, stream=False)
    equal = sum(a.content == plain for a in result.answers)
    repeated = result.counts[REPEATED_REQUESTS, "encoded"]
    rows.append(
        Row(
            "a coding that cannot be read: answers as without sampling (asked twice until sampling pauses)",
            f"0 of {REQUESTS}",
            f"{equal}, {repeated} asked twice",
            f"{REQUESTS}, <= 3",
            equal == REQUESTS and repeated <= 3,
        )
    )
    return rows


async def pause_row() -> Row:
    """One stray refusal among requests that are answered."""
    full = await fake_answer(stream=False, asked_for=True)
    plain = await fake_answer(stream=False, asked_for=False)
    stray = [True]
    counts: Counter[tuple[str, ...]] = Counter()

    async def script(connection: UpstreamConnection) -> None:
        while (request := await connection.request()) is not None:
            if b"return_token_ids" not in request.body:
                await connection.send(Answer(200, plain).written())
            else:
                await connection.send(Answer(400, b"{}").written() if stray.pop() else Answer(200, full).written())
                stray.append(False)

    def count(name: str, labels: tuple[str, ...]) -> None:
        counts[(name, *labels)] += 1

    body = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}
    async with relaying(script, hook=Interceptor(policy(), lambda capture: True, count)) as (_, _, connect):
        port = (await connect()).writer.get_extra_info("peername")[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for _ in range(REQUESTS):
                await client.post(CHAT, json=body)
    captured = counts[SHADOW_REQUESTS, "shadowed", ""]
    return Row(
        f"one stray 400: captures of the {REQUESTS - 1} requests after it",
        "0",
        float(captured),
        f"{REQUESTS - 1}",
        captured == REQUESTS - 1,
    )


async def head_row() -> Row:
    """Seconds until the head of a stream whose first event takes long."""
    go = asyncio.Event()

    async def script(connection: UpstreamConnection) -> None:
        await connection.request()
        await connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        await go.wait()
        await connection.send(b"0\r\n\r\n")

    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    hook = Interceptor(policy(), lambda capture: True, lambda name, labels: None)
    async with relaying(script, hook=hook) as (_, _, connect):
        client = await connect()
        started = time.monotonic()
        await client.send(
            b"POST %b HTTP/1.1\r\nHost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (CHAT.encode(), len(body), body)
        )
        await client.reader.readuntil(b"\r\n\r\n")
        waited = time.monotonic() - started
        go.set()
    return Row(
        "a first event that takes long: seconds until the head", "3.4 s", f"{waited:.2f} s", "<= 0.5 s", waited <= 0.5
    )


def record_rows() -> Iterator[Row]:
    logits = np.random.default_rng(1).normal(size=(5, 12))
    record = make_record(Truth(log_softmax(logits), log_softmax(logits + 0.3), np.arange(5)), 4)
    figures = divergence(record)
    space = [10**9]
    write = os.write

    def limited(descriptor: int, data: memoryview) -> int:
        if not space[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[: space[0]])
        space[0] -= written
        return written

    now = [0.0]
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "write", limited):
        file = RecordsFile(Path(folder) / "records.jsonl", lambda: now[0])
        for second in range(100):
            now[0] = float(second)
            space[0] = 30 if 10 <= second < 20 else 10**9
            file.write(sized_capture(), record, figures)
        file.close()
        lines = (Path(folder) / "records.jsonl").read_bytes().split(b"\n")[:-1]
    whole = sum(bool(json.loads(line)) for line in lines)
    yield Row(
        "a disk that is full for 10 of 100 records: written, counted as lost, half lines",
        "10, 0, 1",
        f"{file.written}, {file.lost}, {len(lines) - whole}",
        "written + lost = 100, >= 70, 0",
        whole == file.written >= 70 and file.written + file.lost == 100,
    )

    wrong = replace(record, reference_at=np.where(record.compressed.ids >= 0, -1e308, np.nan))
    try:
        validate(wrong)
        refused = "scored"
    except InvalidRecordError as error:
        refused = f"skipped: invalid_{error.reason}"
    yield Row("a reference that answers −1e308", "scored", refused, "skipped by reason", refused != "scored")


def rows() -> Iterator[Row]:
    yield from cost_rows(asyncio.run(measure_both()))
    yield from plugin_cost_rows(asyncio.run(plugin_cost.measure_both()))
    yield from asyncio.run(answer_rows())
    yield asyncio.run(pause_row())
    yield asyncio.run(head_row())
    yield from record_rows()
