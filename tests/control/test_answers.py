"""Answers that the engine's plugin hands out, through `hemostat serve`, and what happens where they get lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.served import AUTHORIZED, Served, hemostat

from hemostat.engines.messages import AnswerMessage
from hemostat.scoring.answer_losses import MAX_LOST

REPORT = {
    **{"boot_id": "boot", "rank": 0, "world_size": 1, "versions": [], "vocab_size": 512},
    **{"counters": {}, "runner": "v1", "vllm": "0.32.0", "answers": True},
}
USER = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"model": "fake", "input": USER, "max_output_tokens": 12},
    "/v1/messages": {"model": "fake", "messages": USER, "max_tokens": 12},
}


@contextlib.asynccontextmanager
async def plugin(served: Served, fake: FakeVllm) -> AsyncIterator[asyncio.Event]:
    """Reports once in a while, and sends the answers that requests asked for; once the event is set they are lost."""
    loses = asyncio.Event()

    async def run() -> None:
        sent = len(fake.handed_out)
        async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED) as client:
            while True:
                (await client.post("/api/v1/engine/report", json=REPORT)).raise_for_status()
                # The list only grows: the fake's thread appends to it meanwhile.
                answers = fake.handed_out[sent:]
                sent += len(answers)
                if loses.is_set():
                    answers = []
                body = msgspec.msgpack.encode(AnswerMessage("api-server", answers, 0))
                (await client.post("/api/v1/engine/answers", content=body)).raise_for_status()
                await asyncio.sleep(0.1)

    task = asyncio.create_task(run())
    try:
        yield loses
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_both_routes_are_scored_from_the_answers(tmp_path: Path) -> None:
    fake = FakeVllm(seed=3, plugin=True)
    with (
        serving(fake) as url,
        serving(FakeVllm(seed=3, noise=0.1)) as reference,
        hemostat(tmp_path, fake, url, reference={"backend": "vllm", "url": reference}) as served,
    ):
        await served.until(lambda status: status["reference"]["state"] == "ready" and status["relays"] > 0)
        async with plugin(served, fake), httpx.AsyncClient(base_url=served.data, timeout=20) as client:
            # Until the relays know that the plugin hands out answers, such a request is skipped.
            sent = 0
            while "hemostat_tap_top" not in (fake.requests[-1:] or [{}])[0].get("vllm_xargs", {}):
                (await client.post("/v1/messages", json=BODIES["/v1/messages"])).raise_for_status()
                sent += 1
                await asyncio.sleep(0.1)
            for path, body in BODIES.items():
                for stream in (False, True):
                    (await client.post(path, json=body | {"stream": stream})).raise_for_status()
            status = await served.until(lambda status: status["requests"]["scored"] == 5)
            assert status["requests"]["skipped"] == ({"no_token_ids": sent - 1} if sent > 1 else {})
            assert {row["route"] for row in status["where"]} == {"/v1/responses", "/v1/messages"}
            kinds = {row["kind"] for row in status["coverage"]["by_kind"]}
            assert kinds == {"responses text sampled brief", "messages text sampled brief"}
            assert await served.metric("hemostat_engine_answers_total", reason="received") == 5


async def test_logprobs_in_the_response_take_over_where_answers_get_lost(tmp_path: Path) -> None:
    fake = FakeVllm(seed=3, plugin=True)

    def by_plugin() -> bool:
        return "hemostat_tap_top" in fake.requests[-1].get("vllm_xargs", {})

    with (
        serving(fake) as url,
        serving(FakeVllm(seed=3, noise=0.1)) as reference,
        hemostat(tmp_path, fake, url, reference={"backend": "vllm", "url": reference}) as served,
    ):
        await served.until(lambda status: status["reference"]["state"] == "ready" and status["relays"] > 0)
        assert (await served.ask("Hello")).status_code == 200
        assert "logprobs" in fake.requests[-1], "no engine reports"
        asked = 1
        async with plugin(served, fake) as loses:
            while not by_plugin():
                assert (await served.ask("Hello")).status_code == 200
                asked += 1
                await asyncio.sleep(0.1)
            assert "logprobs" not in fake.requests[-1]
            await served.until(lambda status: status["requests"]["scored"] == asked)
            loses.set()
            for _ in range(MAX_LOST):
                assert (await served.ask("Hello")).status_code == 200
            assert by_plugin()
            await served.until(lambda status: status["requests"]["skipped"] == {"no_answer": MAX_LOST})
            assert await served.metric("hemostat_engine_answers_paused") == 1
            while by_plugin():  # until the relay has the new policy
                assert (await served.ask("Hello")).status_code == 200
                await asyncio.sleep(0.1)
            await served.until(lambda status: status["requests"]["scored"] == asked + 1)
            # What only the plugin can tell is asked of it all the same.
            assert (await served.ask("Hello", logprobs=True, top_logprobs=3)).status_code == 200
            assert by_plugin()
