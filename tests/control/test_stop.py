"""The admin port answers whoever asks when its process stops meanwhile."""

from __future__ import annotations

import asyncio
import socket

import httpx
from fastapi import FastAPI

from hemostat.admin.hardening import Harden
from hemostat.admin.server import AdminServer


async def test_a_request_that_the_stop_cuts_off_is_answered_with_what_to_do() -> None:
    app = FastAPI()
    app.state.closing = asyncio.Event()
    app.add_middleware(Harden, names=None, closing=app.state.closing)

    @app.get("/long")
    async def long() -> None:
        await asyncio.sleep(3600)

    listener = socket.create_server(("127.0.0.1", 0))
    server = AdminServer(app, listener)
    serving = asyncio.create_task(server.run())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
        asking = asyncio.create_task(client.get("/long"))
        await asyncio.sleep(0.3)
        server.stop()
        answer = await asking
    await serving
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert "ask again" in answer.json()["detail"]
