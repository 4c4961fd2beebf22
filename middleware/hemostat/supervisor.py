"""`hemostat serve`: the supervisor. It starts the relays and the control process, restarts those that end, stops all.

It does nothing else, so that little can fail in it. The relays continue to serve while the control process is down.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hemostat import logs
from hemostat.config.errors import ConfigError
from hemostat.config.schema import Settings
from hemostat.ipc.backoff import Backoff

log = logging.getLogger("hemostat.serve")

START_SECONDS = 30.0
"""Within this time a process must report that it listens."""
RESTART_SECONDS = (1.0, 2.0, 5.0, 10.0)
"""Longest delays before a restart, by the number of failures in a row."""
STABLE_SECONDS = 30.0
"""A process that ran this long is restarted without delay."""
CONTROL_STOP_SECONDS = 10.0
EXIT_CODE_EXPLAINED = 2
"""Exit code of a process that has logged in one line why it cannot start."""


class StartFailure(Exception):
    """A process ended before it listened."""

    def __init__(self, name: str, code: int | None) -> None:
        super().__init__(f"{name} did not start")
        self.explained = code == EXIT_CODE_EXPLAINED
        """It has logged the reason itself."""


class SupervisedProcess:
    """A Python module that runs as a child process and is restarted until `stop`.

    stdin: JSON that the process reads when it starts. `listening`: the JSON that it writes when it listens.
    """

    def __init__(self, name: str, module: str, stdin: dict[str, Any]) -> None:
        self.name = name
        self._module = module
        self._stdin = json.dumps(stdin).encode()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self.listening: dict[str, Any] = {}

    async def start(self) -> None:
        """Start, and wait until it reports that it listens; StartFailure when it does not."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor only, which stops the others in order
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(self._stdin)
            await self._process.stdin.drain()
            self._process.stdin.close()
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), START_SECONDS)
            self.listening = json.loads(line)
        except (TimeoutError, ValueError) as error:
            if isinstance(error, ValueError):  # it is about to end without a report: its exit code has the reason
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), 5.0)
            await self._end(signal.SIGKILL, 5.0)
            raise StartFailure(self.name, self._process.returncode) from error

    async def keep_running(self) -> None:
        """Restart the process whenever it ends, with increasing delays; returns after `stop`."""
        backoff = Backoff(RESTART_SECONDS)
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._process.wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - started > STABLE_SECONDS:
                backoff.reset()
                delay = 0.0
            else:
                delay = backoff.pause()
            log.error("%s ended with code %s; starting it again in %.1f s", self.name, code, delay)
            await asyncio.sleep(delay)
            if self._stopping.is_set():
                return
            try:
                await self.start()
            except StartFailure as failure:
                log.error("%s", failure)

    async def stop(self, sig: signal.Signals, within: float) -> None:
        """Send `sig`, wait `within` seconds, then kill; `keep_running` returns."""
        self._stopping.set()
        await self._end(sig, within)

    async def _end(self, sig: signal.Signals, within: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(sig)
        try:
            await asyncio.wait_for(process.wait(), within)
        except TimeoutError:
            log.warning("%s did not end within %.0f s; killed", self.name, within)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def reserve_port(host: str, port: int) -> tuple[socket.socket, int]:
    """Bind the data port without listening: every relay can share it (SO_REUSEPORT), and no other program can take it.

    With SO_REUSEPORT alone, a second Hemostat of the same user would silently get half of the connections; the first
    bind without it detects that.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            port = probe.getsockname()[1]
        holder = socket.socket(family, socket.SOCK_STREAM)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"listen: cannot bind {host}:{port} ({error.strerror}); free it or set listen.port"
        ) from error
    return holder, port


def relay_config(settings: Settings, worker: int, port: int, control_socket: Path) -> dict[str, Any]:
    """What `hemostat.relay.main` reads on its standard input."""
    upstream = settings.upstream
    return {
        "worker": worker,
        "host": settings.listen.host,
        "port": port,
        "reuse_port": True,
        "upstream": {
            "urls": list(upstream.addresses),
            "api_key": upstream.api_key.get_secret_value() if upstream.api_key else None,
            "ca": str(upstream.ca) if upstream.ca else None,
            "max_connections": upstream.max_connections,
            "queue_seconds": upstream.queue_seconds,
            "health_seconds": upstream.health_seconds,
            "resolve_seconds": upstream.resolve_seconds,
            "affinity": upstream.affinity,
        },
        "allow_adapter_routes": upstream.allow_adapter_routes,
        "control_socket": str(control_socket),
        "shutdown_seconds": settings.shutdown_seconds,
        "limits": settings.limits.model_dump(),
        "log_level": settings.log.level,
        "log_format": settings.log.format,
        "log_requests": settings.log.requests,
        "tracing": settings.tracing.model_dump() if settings.tracing.endpoint else None,
    }


def _print_line(text: str) -> None:
    # Flushed, since output to a pipe (a service manager, a container) would stay in a buffer until the end.
    print(text, flush=True)  # noqa: T201


def main(settings: Settings, announce: Callable[[str], None] = _print_line) -> int:
    """Run until SIGTERM or SIGINT; returns 0 after an orderly stop, 2 when a process cannot start."""
    logs.set_up(settings.log.level, settings.log.format)
    return asyncio.run(_run(settings, announce))


async def _run(settings: Settings, announce: Callable[[str], None]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    folder = Path(tempfile.mkdtemp(prefix="hemostat-"))
    holder, port = reserve_port(settings.listen.host, settings.listen.port)
    control_socket = folder / "control.sock"
    control = SupervisedProcess(
        "control",
        "hemostat.control.process",
        {"settings": settings.plain(), "socket": str(control_socket), "parent": os.getpid(), "data_port": port},
    )
    relays = [
        SupervisedProcess(f"relay {n}", "hemostat.relay.main", relay_config(settings, n, port, control_socket))
        for n in range(settings.workers)
    ]
    keepers: list[asyncio.Task[None]] = []
    code = 0
    try:
        for child in (control, *relays):
            starting = asyncio.create_task(child.start())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if stop.is_set():
                starting.cancel()
                return 0
            await starting
        admin_port = control.listening["admin_port"]
        engines = ", ".join(settings.upstream.addresses)
        announce(f"hemostat: data port http://{_url_host(settings.listen.host)}:{port} -> {engines}")
        announce(f"hemostat: admin port http://{_url_host(settings.admin.host)}:{admin_port} (console, /metrics)")
        keepers = [asyncio.create_task(child.keep_running()) for child in (control, *relays)]
        await stop.wait()
        log.info("stopping: draining for up to %.0f s", settings.shutdown_seconds)
    except StartFailure as failure:
        if not failure.explained:
            log.error("%s", failure)
        code = 2
    finally:
        # Relays first: while they drain, /readyz answers that they are not ready, and their captures are still scored.
        await asyncio.gather(*(r.stop(signal.SIGTERM, settings.shutdown_seconds + 5.0) for r in relays))
        await control.stop(signal.SIGTERM, CONTROL_STOP_SECONDS)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        holder.close()
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
