"""The interceptor behind the relay and in front of an engine, with clients that time out and disconnect."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai as openai_sdk
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.wire import VERSION, policy

from hemostat.interception.assignment import client_digest
from hemostat.interception.interceptor import Interceptor
from hemostat.ipc.messages import Capture, SampledCount
from hemostat.ipc.sampled import SampledTally
from hemostat.metrics.names import CALIBRATION_REQUESTS, REPEATED_REQUESTS, RESPONSES_FINISHED, SHADOW_REQUESTS
from hemostat.openai.routes import CHAT
from hemostat.relay.relay import Relay


class Bench:
    """A fake engine and a relay with an interceptor, and the captures and counts of that."""

    def __init__(self, fake: FakeVllm, relay: Relay, url: str) -> None:
        self.fake, self.relay, self.url = fake, relay, url
        self.captures: list[Capture] = []
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.tally = SampledTally()
        self.interceptor = Interceptor(policy(), self._emit, self._count, sampled=self.tally.update)
        relay.hook = self.interceptor

    def _emit(self, capture: Capture) -> bool:
        self.captures.append(capture)
        return True

    def _count(self, metric: str, labels: tuple[str, ...]) -> None:
        self.counts[(metric, *labels)] += 1


@asynccontextmanager
async def in_front_of(fake: FakeVllm, url: str) -> AsyncIterator[Bench]:
    relay = Relay(url)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await relay.serve(sock)
    yield Bench(fake, relay, f"http://127.0.0.1:{sock.getsockname()[1]}")
    await relay.close()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    fake = FakeVllm(seed=2)
    with serving(fake) as url:
        async with in_front_of(fake, url) as made:
            yield made


def body(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": "fake", "messages": messages, "max_tokens": 20, "temperature": 0} | more


@pytest.mark.parametrize("stream", [False, True])
async def test_sampling_changes_neither_head_nor_body(bench: Bench, stream: bool) -> None:
    answers = []
    async with httpx.AsyncClient(base_url=bench.url) as client:
        for rate in (0.0, 1.0):
            bench.interceptor.policy = policy(shadow_rate=rate)
            answer = await client.post(CHAT, json=body(stream=stream), headers={"X-Request-Id": "same"})
            head = [(name, value) for name, value in answer.headers.raw if name.lower() != b"date"]
            answers.append((answer.status_code, head, answer.content))
    assert answers[0] == answers[1]
    assert len(bench.captures) == 1
    assert bench.captures[0].request_id == "same"


async def test_hemostat_headers_are_not_sent_upstream_and_invalid_ones_are_refused(bench: Bench) -> None:
    async with httpx.AsyncClient(base_url=bench.url) as client:
        await client.post(CHAT, json=body(), headers={"X-Hemostat-Shadow": "off"})
        assert not any(name.startswith(b"x-hemostat") for name in bench.fake.headers[-1])
        answer = await client.post(CHAT, json=body(), headers={"X-Hemostat-Calibration": "latest"})
    assert answer.status_code == 400
    assert "X-Hemostat-Calibration" in answer.json()["error"]["message"]
    assert len(bench.fake.requests) == 1


async def test_a_treated_stream_reaches_the_openai_client(bench: Bench) -> None:
    bench.interceptor.policy = policy(served=VERSION, control_fraction=0.0)
    async with openai_sdk.AsyncOpenAI(base_url=bench.url + "/v1", api_key="x", max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "say: Grüße 🎉"}]
        stream = await client.chat.completions.create(model="fake", messages=messages, stream=True)
        text = "".join([part.choices[0].delta.content or "" async for part in stream])
    assert text == "Grüße 🎉"
    assert bench.fake.requests[-1]["vllm_xargs"] == {"hemostat": VERSION}
    [capture] = bench.captures
    assert (capture.arm, capture.requested) == ("treated", VERSION)
    assert (capture.kind, capture.client) == ("chat text sampled", client_digest(b"Bearer x", b""))


@pytest.mark.parametrize("stream", [False, True])
async def test_outcomes_of_a_request_that_was_sent_again_unchanged_are_in_no_arm(bench: Bench, stream: bool) -> None:
    bench.interceptor.policy = policy(served=VERSION, control_fraction=0.0)
    async with httpx.AsyncClient(base_url=bench.url) as client:
        await client.post(CHAT, json=body(stream=stream))
        bench.fake.max_logprobs = 5
        await client.post(CHAT, json=body(stream=stream))
    assert bench.relay.counters.other[RESPONSES_FINISHED] == {("treated", "length"): 1.0, ("none", "length"): 1.0}
    assert bench.counts[CALIBRATION_REQUESTS, "treated", "assigned"] == 1
    assert bench.counts[CALIBRATION_REQUESTS, "none", "refused"] == 1


async def test_outcomes_of_what_cannot_be_scored_are_in_no_arm(bench: Bench) -> None:
    bench.interceptor.policy = policy(served=VERSION, control_fraction=0.0)
    async with httpx.AsyncClient(base_url=bench.url) as client:
        await client.post(CHAT, json=body(response_format={"type": "json_object"}))
    assert "vllm_xargs" not in bench.fake.requests[-1]
    assert bench.relay.counters.other[RESPONSES_FINISHED] == {("none", "length"): 1.0}


async def test_a_disconnected_client_of_a_sampled_stream_stops_the_engine(bench: Bench) -> None:
    bench.fake.token_delay = 0.05
    async with (
        httpx.AsyncClient(base_url=bench.url) as client,
        client.stream("POST", CHAT, json=body(stream=True)) as r,
    ):
        async for _ in r.aiter_raw():
            break
    for _ in range(100):
        if bench.fake.aborted and bench.counts:
            break
        await asyncio.sleep(0.02)
    assert bench.fake.aborted == 1
    assert bench.counts == {(SHADOW_REQUESTS, "skipped", "incomplete"): 1}
    assert not bench.captures


async def test_an_engine_failure_in_a_sampled_stream_is_counted_as_incomplete(bench: Bench) -> None:
    bench.fake.die_after = 5
    async with httpx.AsyncClient(base_url=bench.url) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(CHAT, json=body(stream=True))
    assert bench.counts == {(SHADOW_REQUESTS, "skipped", "incomplete"): 1}


async def test_a_502_of_the_relay_is_counted_once_as_an_error_and_not_as_a_broken_answer() -> None:
    async with in_front_of(FakeVllm(), "http://127.0.0.1:1") as bench, httpx.AsyncClient(base_url=bench.url) as client:
        answers = [await client.post(CHAT, json=body(stream=stream)) for stream in (False, True)]
        malformed = await client.post(CHAT, content=b"{")
    assert [answer.status_code for answer in (*answers, malformed)] == [502, 502, 502]
    assert bench.counts == {
        (SHADOW_REQUESTS, "skipped", "upstream_error"): 2,
        (SHADOW_REQUESTS, "skipped", "bad_json"): 1,
    }
    assert not bench.captures


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_injected_members_never_reaches_the_client(bench: Bench, stream: bool) -> None:
    answers = []
    async with httpx.AsyncClient(base_url=bench.url) as client:
        for rate, max_logprobs in ((0.0, 64), (1.0, 5)):
            bench.interceptor.policy = policy(shadow_rate=rate)
            bench.fake.max_logprobs = max_logprobs
            answer = await client.post(CHAT, json=body(stream=stream), headers={"X-Request-Id": "same"})
            head = [(name, value) for name, value in answer.headers.raw if name.lower() != b"date"]
            answers.append((answer.status_code, head, answer.content))
    assert answers[0] == answers[1]
    assert answers[0][0] == 200
    assert bench.counts == {(SHADOW_REQUESTS, "skipped", "logprobs_refused"): 1, (REPEATED_REQUESTS, "refused"): 1}
    direct, refused, replayed = bench.fake.requests
    assert direct == replayed != refused
    assert bench.fake.headers[0].keys() == bench.fake.headers[2].keys()
    assert bench.relay.upstreams.engines[0].pool.size == 1 or stream


async def sampled(bench: Bench) -> SampledCount:
    """What the only sampled request so far counts as, at its end."""
    for _ in range(100):
        if (counts := bench.tally.take()) is not None:
            [count] = counts.counts
            return count
        await asyncio.sleep(0.02)
    pytest.fail("nothing was counted")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_tokens_of_a_skipped_request_are_counted_at_its_end_where_they_are_known(
    bench: Bench, stream: bool
) -> None:
    async with httpx.AsyncClient(base_url=bench.url) as client:
        await client.post(CHAT, json=body(use_beam_search=True, stream=stream))
        kind = "chat text greedy brief"
        expected = SampledCount(kind, "skipped", "beam_search", 1.0, float(stream), 0 if stream else 20)
        assert await sampled(bench) == expected
        if stream:
            usage = {"stream_options": {"include_usage": True}}
            await client.post(CHAT, json=body(use_beam_search=True, stream=True, **usage))
            assert await sampled(bench) == SampledCount(kind, "skipped", "beam_search", 1.0, 0.0, 20)
        # Too long to be scored: the usage that Hemostat asked for is known, though the client does not get it.
        bench.interceptor.policy = policy(shadow_max_tokens=8)
        await client.post(CHAT, json=body(stream=stream))
        assert await sampled(bench) == SampledCount(kind, "skipped", "too_long", 1.0, 0.0, 20)


async def test_what_is_not_read_or_ends_early_has_unknown_tokens(bench: Bench) -> None:
    async with httpx.AsyncClient(base_url=bench.url) as client:
        await client.post("/v1/embeddings", json={"model": "fake", "input": "x"})
        assert await sampled(bench) == SampledCount("", "skipped", "route", 1.0, 1.0, 0)
        await client.post(CHAT, content=b"[]")
        assert await sampled(bench) == SampledCount("", "skipped", "bad_json", 1.0, 1.0, 0)
        bench.fake.die_after = 5
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(CHAT, json=body(stream=True))
        assert await sampled(bench) == SampledCount("chat text greedy brief", "skipped", "incomplete", 1.0, 1.0, 0)
