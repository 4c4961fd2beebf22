"""A running `hemostat serve`, with requests to its data port and reads of its admin port."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.support.fake_vllm import FakeVllm
from tests.support.minutes import starting
from tests.support.waiting import HANG_SECONDS

from hemostat_lab.demo.vllm_server import free_port

TOKEN = "secret"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
CHAT = "/v1/chat/completions"


RELAY = "hemostat.relay.main"


def is_spare(pid: int) -> bool:
    """Whether a relay process still waits for its settings: it has no event loop yet."""
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(file) == "anon_inode:[eventpoll]":
                return False
    return True


class Served:
    """A running `hemostat serve`, its upstream and its reference."""

    def __init__(self, process: subprocess.Popen[bytes], admin: str, upstream: FakeVllm, log: Path) -> None:
        self.process, self.admin, self.upstream, self.log = process, admin, upstream, log
        # A line for people, or one of the log where that is JSON.
        with starting("hemostat serve"):
            while not (match := re.search(r"data port (http://[\w.:]+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
        self.data = match[1]

    def pids(self, module: str) -> set[int]:
        """The process ids of the children that run this module, without the spare relay."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        result = set()
        for pid in children:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if module.encode() in command and not (module == RELAY and is_spare(int(pid))):
                    result.add(int(pid))
            except OSError:
                continue
        return result

    def children(self) -> set[int]:
        """The process ids of all children."""
        return set(map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()))

    def spare(self) -> int:
        """The process id of the spare relay; 0 while it is not loaded."""
        pid = int((re.findall(r"a spare relay waits \(pid (\d+)\)", self.log.read_text()) or [0])[-1])
        return pid if Path(f"/proc/{pid}/fd").exists() and is_spare(pid) else 0

    async def ask(self, text: str, **more: Any) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 4} | more
        async with httpx.AsyncClient(base_url=self.data, timeout=20) as client:
            return await client.post(CHAT, json=body)

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.admin, timeout=20) as client:
            return await client.get(path)

    async def status(self) -> dict[str, Any]:
        return (await self.get("/api/v1/status")).json()  # type: ignore[no-any-return]

    async def metric(self, name: str, **labels: str) -> float:
        """Sum over the series with these labels."""
        return (await self.metrics(name, **labels))[0]

    async def metrics(self, *names: str, **labels: str) -> list[float]:
        """Sums of several, at one time."""
        families = text_string_to_metric_families((await self.get("/metrics")).text)
        samples = [s for family in families for s in family.samples if labels.items() <= s.labels.items()]
        return [sum(s.value for s in samples if s.name == name) for name in names]

    async def until(self, condition: Callable[[dict[str, Any]], bool], seconds: float = HANG_SECONDS) -> dict[str, Any]:
        """Wait for a status that fulfils the condition; an admin port that does not answer is retried."""
        end, status = time.monotonic() + seconds, {}
        while time.monotonic() < end:
            try:
                status = await self.status()
                if condition(status):
                    return status
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)
        pytest.fail(f"{status}\n{self.log.read_text()}")


@contextmanager
def hemostat(folder: Path, upstream: FakeVllm, url: str, **more: Any) -> Iterator[Served]:
    """Start `hemostat serve` in front of `url`, with these further settings; stop it at the end."""
    admin = free_port()
    settings = {
        "listen": {"host": "127.0.0.1", "port": 0},
        "admin": {"port": admin, "token": TOKEN},
        "upstream": {"url": url},
        "shadow": {"rate": 1.0, "top_k": 8},
        "shutdown_seconds": 10,
    }
    config = folder / "hemostat.yaml"
    config.write_text(yaml.safe_dump(settings | more))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hemostat", "serve", "--config", str(config)],
            stdout=log,
            stderr=log,
            env={name: value for name, value in os.environ.items() if not name.startswith("HEMOSTAT_")},
        )
        try:
            yield Served(process, f"http://127.0.0.1:{admin}", upstream, folder / "log")
        finally:
            process.terminate()
            try:
                process.wait(HANG_SECONDS)
            finally:
                process.kill()
                process.wait()
