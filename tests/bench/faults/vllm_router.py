"""The real `vllm-router` (PyPI; installed under build/ once) behind Hemostat, and before it.

behind  Hemostat's only upstream is the router, which has four engines.
before  the router's workers are two Hemostats, each with two engines.

Engines are processes of the tests' fake vLLM. In both, every stream is complete and all engines are asked.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
from tests.bench.proxy.load import free_port
from tests.bench.proxy.proxies import install_vllm_router
from tests.support.stack import Stack, wait_for

from . import Row
from .four_engines import ENGINES, Fleet, Streams

NAME = "vllm_router"
TAKES = "about a minute"

SECONDS = 8.0


def router(stack: ExitStack, workers: Sequence[str]) -> str:
    """The address of a router that has started."""
    port = free_port()
    command = [str(install_vllm_router()), "--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    command += ["--prometheus-port", str(free_port()), "--log-level", "error", "--worker-urls", *workers]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/v1/models", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    wait_for("the router answers", answers, 60.0)
    return url


def served(stack: ExitStack, folder: Path, urls: Sequence[str]) -> Stack:
    made = Stack({"upstream": {"urls": list(urls)}}, folder)
    stack.callback(made.stop)
    return made


async def load(url: str) -> Streams:
    streams = Streams(url)
    asking = asyncio.create_task(streams.run())
    await asyncio.sleep(SECONDS)
    streams.ended = True
    await asking
    return streams


def row(case: str, url: str, fleet: Fleet) -> Row:
    streams = asyncio.run(load(url))
    total = len(streams.broken) + streams.complete
    asked = len(streams.engines)
    text = f"{len(streams.broken)} of {total} streams broken, {asked} engines asked"
    holds = bool(total) and not streams.broken and asked == len(fleet.ports)
    return Row(case, "", text, f"0, all {ENGINES} engines", holds)


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        fleet = Fleet()
        stack.callback(fleet.close)
        for engine in range(ENGINES):
            fleet.start(engine)
        engines = [f"http://127.0.0.1:{port}" for port in fleet.ports]
        with ExitStack() as behind:
            hemostat = served(behind, Path(folder) / "before", [router(behind, engines)])
            yield row("vllm-router behind Hemostat", hemostat.url, fleet)
        with ExitStack() as before:
            halves = engines[: ENGINES // 2], engines[ENGINES // 2 :]
            workers = [served(before, Path(folder) / f"half-{n}", half).url for n, half in enumerate(halves)]
            yield row("vllm-router before two Hemostats", router(before, workers), fleet)
