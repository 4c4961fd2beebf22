"""The HTTP server of the admin port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator

import uvicorn
from fastapi import FastAPI

from hemostat.admin.hardening import server_settings


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
        """Ends the streams, and `run` soon after."""
        self._closing.set()
        self._server.should_exit = True
