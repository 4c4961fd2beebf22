"""Runs the fake vLLM on a port."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from tests.support.fake_vllm.server import FakeVllm


@contextmanager
def serving(fake: FakeVllm, port: int = 0) -> Iterator[str]:
    """Serve it on a thread of its own; yields the base URL."""
    config = uvicorn.Config(
        fake, host="127.0.0.1", port=port, log_level="critical", lifespan="off", ws="none", access_log=False
    )
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen(128)  # now, so that whoever gets the address may connect at once: the thread may take its time
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
        socket.close()


@asynccontextmanager
async def running(fake: FakeVllm) -> AsyncIterator[FakeVllm]:
    """The same for asynchronous tests; `fake.url` is its base URL."""
    with serving(fake) as fake.url:
        yield fake
