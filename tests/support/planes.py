"""Running `hemostat control` and `hemostat relay`, as on several machines: TCP with TLS, a token, one store."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.support.certificates import certificate
from tests.support.minutes import starting
from tests.support.served import AUTHORIZED, CHAT, TOKEN
from tests.support.waiting import HANG_SECONDS

from hemostat_calibration import __version__
from hemostat_lab.demo.vllm_server import free_port

CONTROL, RELAY = "hemostat.control.process", "hemostat.relay.main"


class Instance:
    """One running command, `control` or `relay`. admin: the address of its admin port."""

    def __init__(self, command: str, folder: Path, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = folder.name
        self.port = free_port()
        self.admin = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self._config = folder / "hemostat.yaml"
        self._config.write_text(yaml.safe_dump({"admin": {"port": self.port, "token": TOKEN}} | dict(settings)))
        self._command = [sys.executable, "-m", "hemostat", command, "--config", str(self._config)]
        self.start()

    def start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEMOSTAT_")}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    def pids(self) -> dict[int, str]:
        """Its processes -> their command lines, the supervisor first."""
        result = {self.process.pid: "supervisor"}
        with suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for pid in map(int, children):
                with suppress(OSError):
                    result[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return result

    def children(self, module: str) -> list[int]:
        return [pid for pid, command in self.pids().items() if module in command]

    def signal(self, sig: signal.Signals) -> None:
        """To all of its processes."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, sig)

    def kill(self) -> None:
        """As a machine that loses its power: nothing ends in order, nothing is started again."""
        self.signal(signal.SIGSTOP)  # so that no process starts another one meanwhile
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(HANG_SECONDS)
        finally:
            self.process.kill()
            self.process.wait()

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.admin, timeout=20) as client:
            return await client.get(path)

    async def status(self) -> dict[str, Any]:
        """Empty while it does not answer."""
        try:
            return (await self.get("/api/v1/status")).json()  # type: ignore[no-any-return]
        except (httpx.TransportError, ValueError):
            return {}

    async def post(self, path: str, **body: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.admin, headers=AUTHORIZED, timeout=20) as client:
            return await client.post(path, **body)


class Relay(Instance):
    """data: the address of its data port."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        data = free_port()
        self.data = f"http://127.0.0.1:{data}"
        super().__init__("relay", folder, {"listen": {"host": "127.0.0.1", "port": data}} | dict(settings))

    async def ask(self, text: str, **more: Any) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": text}], "max_tokens": 2} | more
        async with httpx.AsyncClient(base_url=self.data, timeout=30) as client:
            return await client.post(CHAT, json=body)


class Planes:
    """Control processes with one store, and relays that know the addresses of all of them."""

    def __init__(
        self, folder: Path, upstream: str, controls: int, relays: int, shared: Mapping[str, Any], store: str
    ) -> None:
        made = certificate(folder / "certificates")
        ports = [free_port() for _ in range(controls)]
        addresses = [f"localhost:{port}" for port in ports]
        base = {"upstream": {"url": upstream}, "shutdown_seconds": 10, **shared}
        token = folder / "token"
        token.write_text("a-relay-token\n")
        trust = {"token_file": str(token)}
        self.controls = [
            Instance(
                "control",
                folder / f"control-{n}",
                base
                | {
                    "store": {"url": store},
                    "control": trust | {"listen": f"0.0.0.0:{port}", "cert": str(made.cert), "key": str(made.key)},
                },
            )
            for n, port in enumerate(ports)
        ]
        self.relays = [
            Relay(folder / f"relay-{n}", base | {"control": trust | {"addresses": addresses, "ca": str(made.cert)}})
            for n in range(relays)
        ]

    @property
    def instances(self) -> list[Instance]:
        return [*self.controls, *self.relays]

    async def until(
        self, instance: Instance, condition: Callable[[dict[str, Any]], bool], seconds: float = HANG_SECONDS
    ) -> dict[str, Any]:
        """Wait for a status of this one that fulfils the condition."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (status := await instance.status()) and condition(status):
                return status
            await asyncio.sleep(0.05)
        raise AssertionError(f"{await instance.status()}\n{self._logs()}")

    async def active(self, *, but: Instance | None = None, with_relays: bool = True) -> Instance:
        """The control process that is active, once one is. with_relays: and all relays are connected to it."""

        async def is_active(instance: Instance) -> Instance:
            while True:
                status = await instance.status()
                connected = not with_relays or status.get("relays") == len(self.relays)
                if connected and status.get("control", {}).get("state") == "active":
                    return instance
                await asyncio.sleep(0.05)

        looks = [asyncio.create_task(is_active(control)) for control in self.controls if control is not but]
        done, _ = await asyncio.wait(looks, timeout=HANG_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
        if not done:
            raise AssertionError(f"none is active, with {len(self.relays)} relays\n{self._logs()}")
        return done.pop().result()

    def _logs(self) -> str:
        return "\n".join(f"--- {each.name}\n{each.log.read_text()[-5000:]}" for each in self.instances)


@asynccontextmanager
async def planes(
    folder: Path, upstream: str, *, controls: int = 2, relays: int = 2, store: str | None = None, **shared: Any
) -> AsyncIterator[Planes]:
    """store: the address; None: one SQLite file."""
    created = Planes(folder, upstream, controls, relays, shared, store or f"sqlite:///{folder / 'store.db'}")
    try:
        with starting("hemostat control and relay"):
            for relay in created.relays:
                await ready(relay)
        yield created
    finally:
        for each in created.instances:
            each.stop()


async def ready(instance: Instance) -> None:
    """Wait until it says that it is."""
    end = time.monotonic() + HANG_SECONDS
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if (await instance.get("/readyz")).status_code == 200:
                return
        assert instance.process.poll() is None, instance.log.read_text()
        await asyncio.sleep(0.05)
    raise AssertionError(instance.log.read_text())


@asynccontextmanager
async def engine(controls: list[Instance], versions: list[str], vocabulary: int) -> AsyncIterator[None]:
    """Acts as the plugin of an engine, which reports to every control process. versions: may be added to."""

    async def report(control: Instance) -> None:
        who = {"boot_id": "boot", "rank": 0, "world_size": 1, "runner": "v1", "vllm": "0", "plugin": __version__}
        while True:
            body = who | {"versions": versions, "vocab_size": vocabulary, "counters": {}}
            with suppress(httpx.TransportError):
                await control.post("/api/v1/engine/report", json=body)
            await asyncio.sleep(0.3)

    tasks = [asyncio.create_task(report(process)) for process in controls]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
