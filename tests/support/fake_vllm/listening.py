"""Runs the fake vLLM on a port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from tests.support.fake_vllm.answers import Receive, Scope, Send
from tests.support.fake_vllm.server import FakeVllm

Application = Callable[[Scope, Receive, Send], Awaitable[None]]
"""A `FakeVllm`, or another ASGI application, such as a router in front of some."""


class _Server(uvicorn.Server):
    """Ends at once; uvicorn's own takes up to a fifth of a second, and hundreds of tests start one."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stop: Future[None] = Future()

    async def main_loop(self) -> None:
        await self.on_tick(0)  # makes the field `date`
        await asyncio.wrap_future(self.stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(0)  # the transports close


@contextmanager
def serving(fake: Application, port: int = 0) -> Iterator[str]:
    """Serve it on a thread of its own; yields the base URL."""
    config = uvicorn.Config(
        fake, host="127.0.0.1", port=port, log_level="critical", lifespan="off", ws="none", access_log=False
    )
    server = _Server(config)
    listener = config.bind_socket()
    listener.listen(128)  # now, so that whoever gets the address may connect at once: the thread may take its time
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.stop.set_result(None)
        thread.join(10)
        listener.close()


@asynccontextmanager
async def running(fake: FakeVllm) -> AsyncIterator[FakeVllm]:
    """The same for asynchronous tests; `fake.url` is its base URL."""
    with serving(fake) as fake.url:
        yield fake
