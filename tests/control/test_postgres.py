"""`hemostat serve` with its store in PostgreSQL, which is killed, stopped and replaced while clients stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support import postgres
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.postgres import Postgres
from tests.support.served import AUTHORIZED, Served, hemostat
from tests.support.streaming_load import streaming_load
from tests.support.waiting import HANG_SECONDS

CONTROL = "hemostat.control.process"


@pytest.fixture
def server() -> Iterator[Postgres]:
    database = postgres.shared()
    yield database
    database.kill()
    database.start()


async def until(served: Served, state: str, mode: str) -> dict[str, Any]:
    def reached(status: dict[str, Any]) -> bool:
        return bool(status["control"]["state"] == state and status["calibration"]["mode"] == mode)

    return await served.until(reached)


async def set_mode(served: Served, mode: str) -> int:
    async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED, timeout=HANG_SECONDS) as client:
        return (await client.post("/api/v1/calibration", json={"mode": mode})).status_code


async def test_the_control_process_follows_its_server(server: Postgres, tmp_path: Path) -> None:
    url = server.url(server.new_database())
    upstream = FakeVllm(token_delay=0.05)
    with serving(upstream) as engine, hemostat(tmp_path, upstream, engine, store={"url": url}) as served:
        async with streaming_load(served.data, 2) as load:
            await until(served, "active", "observe")
            assert await set_mode(served, "auto") == 200
            # It goes on with what it has, and decides nothing meanwhile.
            server.kill()
            await until(served, "suspended", "auto")
            assert await set_mode(served, "off") == 507, "it applies at once, and is not stored yet"
            await asyncio.to_thread(server.start)
            await until(served, "active", "off")
            assert await set_mode(served, "off") == 200, "it is stored now, which `active` alone does not say"
            # A replica that lacks the last commits takes the server's place.
            await asyncio.to_thread(server.save)
            await until(served, "active", "off")
            assert await set_mode(served, "observe") == 200
            former = served.pids(CONTROL)
            await asyncio.to_thread(server.fail_over)
            await until(served, "active", "off")
            assert not served.pids(CONTROL) & former, "it began anew"
        assert load.complete > 0
        assert (load.refused, load.cut, load.failed) == (0, 0, 0), load.failures
        assert postgres.PASSWORD not in served.log.read_text()
        assert postgres.ESCAPED not in served.log.read_text()
