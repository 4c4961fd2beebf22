"""The admin port's listening socket and its server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

from hemostat.admin.hardening import server_settings
from hemostat_calibration.errors import HemostatError


def bind(host: str, port: int) -> socket.socket:
    """HemostatError that names the setting where the port is taken."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise HemostatError(
            f"admin: cannot bind {host}:{port} ({os.strerror(error.errno or 0)}); free it or set admin.port"
        ) from error


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the supervisor decides when this process stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class AdminServer:
    """Serves the app until `stop`."""

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        self._closing: asyncio.Event = app.state.closing
        self._listener = listener
        self._server = _Server(uvicorn.Config(app, **server_settings()))

    async def run(self) -> None:
        await self._server.serve(sockets=[self._listener])

    def stop(self) -> None:
        """End the streams, and `run` soon after."""
        self._closing.set()
        self._server.should_exit = True
