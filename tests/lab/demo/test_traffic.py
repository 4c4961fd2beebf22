"""The demo's clients against a server that speaks vLLM's wire format."""

from __future__ import annotations

import asyncio
from itertools import islice

import pytest
from tests.support.fake_vllm import FakeVllm, serving

from hemostat_lab.demo.prompts import Message, Prompt, plan
from hemostat_lab.demo.traffic import CONCURRENCY, Traffic, drive

PROMPTS = [Prompt([Message("user", f"say: answer {n}")], 24) for n in range(10)]


async def test_every_request_is_sent_once_and_its_text_read() -> None:
    fake, traffic = FakeVllm(), Traffic()
    with serving(fake) as url:
        await drive(url, plan(PROMPTS, "fake", 0), 30, traffic)
    assert (traffic.sent, traffic.ok, traffic.failed) == (30, 30, 0), traffic.last_failure
    assert traffic.last_text.startswith("answer ")
    wanted = [body for _, body in islice(plan(PROMPTS, "fake", 0), 30)]
    assert sorted(map(str, fake.requests)) == sorted(map(str, wanted))
    assert {b["stream"] for b in fake.requests} == {True, False}
    assert len({headers[b"x-request-id"] for headers in fake.headers}) == 30


@pytest.mark.parametrize("fault", ["status", "die_after", "error_after"])
async def test_failures_are_counted_with_a_reason(fault: str) -> None:
    fake, traffic = FakeVllm(**{fault: 503 if fault == "status" else 2}), Traffic()
    with serving(fake) as url:
        await drive(url, plan(PROMPTS, "fake", 0), 4, traffic)
    assert traffic.sent == 4
    assert traffic.ok + traffic.failed == 4
    assert traffic.failed >= 1
    assert traffic.last_failure.startswith("demo-0-")


async def test_a_refused_connection_is_a_failure() -> None:
    with serving(FakeVllm()) as url:
        pass
    traffic = Traffic()
    await drive(url, plan(PROMPTS, "fake", 0), 2, traffic)
    assert (traffic.ok, traffic.failed) == (0, 2)


async def test_clients_pause_while_the_reference_is_behind() -> None:
    fake, traffic = FakeVllm(), Traffic()
    open_ = False
    with serving(fake) as url:
        driving = asyncio.create_task(drive(url, plan(PROMPTS, "fake", 0), 6, traffic, lambda: open_))
        await asyncio.sleep(0.5)
        assert traffic.sent == 0
        open_ = True
        await driving
    assert traffic.ok == 6


async def test_without_a_limit_requests_end_when_enough_were_sent() -> None:
    fake, traffic = FakeVllm(), Traffic()
    with serving(fake) as url:
        await drive(url, plan(PROMPTS, "fake", 0), None, traffic, finished=lambda: traffic.sent >= 12)
    assert traffic.ok == traffic.sent == 12


async def test_without_a_limit_requests_continue_until_cancelled() -> None:
    fake, traffic = FakeVllm(token_delay=0.001), Traffic()
    with serving(fake) as url:
        driving = asyncio.create_task(drive(url, plan(PROMPTS, "fake", 0), None, traffic))
        while traffic.ok < 15:
            await asyncio.sleep(0.02)
        driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving
    assert traffic.sent - traffic.ok - traffic.failed <= CONCURRENCY
