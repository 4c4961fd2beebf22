"""The control process's listening sockets: relays say hello here, and are admitted or refused.

Whoever can reach the port can connect. Without the token a peer costs one connection out of MAX_HANDSHAKES, for at most
HANDSHAKE_SECONDS, a frame of at most MAX_HELLO_BYTES, and a share of the processor that PAUSE_SECONDS bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hemostat.ipc.framing import READ_SIZE, read_frame
from hemostat.ipc.messages import MAX_HELLO_BYTES, NOT_ACTIVE, PROTOCOL, Hello, Refused, encode
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.messages import in_words

log = logging.getLogger("hemostat.control")

HANDSHAKE_SECONDS = 5.0
"""The longest time from the connection to the whole hello."""
MAX_HANDSHAKES = 64
"""The number of handshakes at a time; beyond it the one that has waited longest is closed for a new one. A relay's
takes milliseconds.
"""
PAUSE_SECONDS = 0.02
"""The pause without a new connection for each handshake that failed: a TLS handshake takes a tenth of it."""
MAX_PAUSE_SECONDS = 1.0
LOG_SECONDS = 60.0
"""The time between two lines of the log about the same kind of refusal."""
CLOSE_SECONDS = 1.0
BACKLOG = 128


class _Spoken(msgspec.Struct, tag="hello", frozen=True):
    """The part that the hello of every version has."""

    protocol: int = 0


_SPOKEN = msgspec.msgpack.Decoder(_Spoken)
_HELLO = msgspec.msgpack.Decoder(Hello)

Admit = Callable[[Hello, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Security:
    """The security of relays that connect by TCP. context: None only on loopback. upstreams: the engines that relays
    may name.
    """

    token: str
    context: ssl.SSLContext | None
    upstreams: Collection[str]


class RelayListener:
    """Owns listening sockets, and the connections that have not said hello yet.

    security: of TCP sockets; may be replaced, for new connections. Unix sockets need neither token nor TLS, as only
    this user can open them. admit: takes a relay until its connection ends; while it is None, relays are refused.
    """

    def __init__(self, sockets: Iterable[socket.socket], security: Security | None = None) -> None:
        self._sockets = list(sockets)
        self.security = security
        self.admit: Admit | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._handshakes: dict[asyncio.Task[None], None] = {}
        """The connections without a hello, the oldest first."""
        self._admitted: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._pause = 0.0
        self._said: dict[str, float] = {}

    def start(self) -> None:
        for sock in self._sockets:
            sock.setblocking(False)
            self._keep(self._accept(sock))

    def dismiss(self) -> None:
        """Refuses relays from now on, those that were admitted, too: they look for another control process."""
        self.admit = None
        for task, writer in self._admitted.items():
            writer.write(encode(NOT_ACTIVE))
            task.cancel()

    async def close(self) -> None:
        """Takes no more relays, and ends all connections."""
        connections = tuple(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        for sock in self._sockets:
            sock.close()

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="relays' connections")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:  # no file descriptor is free, or the peer is gone
                self._say("accept", f"cannot accept a relay: {error.strerror or error}")
                await asyncio.sleep(MAX_PAUSE_SECONDS)
                continue
            if len(self._handshakes) >= MAX_HANDSHAKES:
                oldest = next(iter(self._handshakes))
                del self._handshakes[oldest]
                oldest.cancel()
            self._handshakes[self._keep(self._serve(connection))] = None
            await asyncio.sleep(0)  # it begins, so that it closes the connection where it is cancelled
            if connection.family != socket.AF_UNIX and self._pause:
                pause, self._pause = min(self._pause, MAX_PAUSE_SECONDS), 0.0
                await asyncio.sleep(pause)

    async def _serve(self, connection: socket.socket) -> None:
        """Serves one connection until it ends."""
        task = asyncio.current_task()
        assert task is not None
        local, peer, writer = connection.family == socket.AF_UNIX, _peer(connection), None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                reader, writer = await self._streams(connection, local=local)
                body = await read_frame(reader, MAX_HELLO_BYTES)
            self._handshakes.pop(task, None)
            hello = self._greeted(body, local=local)
            if isinstance(hello, Refused):
                self._failed("refused", f"a relay from {peer} is refused: {hello.why}", fault=hello.fault)
                writer.write(encode(hello))
                await self._flush(writer)
            elif (admit := self.admit) is not None:
                self._admitted[task] = writer
                await admit(hello, reader, writer)
        except (TimeoutError, OSError, EOFError, ValueError) as error:
            self._failed("handshake", f"a connection from {peer} is not a relay's: {_in_words(error)}")
        finally:
            self._handshakes.pop(task, None)
            self._admitted.pop(task, None)
            if writer is not None:
                writer.close()

    async def _streams(
        self, connection: socket.socket, *, local: bool
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=READ_SIZE)
        protocol = asyncio.StreamReaderProtocol(reader)
        context = None if local or self.security is None else self.security.context
        limits = {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": CLOSE_SECONDS} if context else {}
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=context, **limits)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def _greeted(self, body: bytes, *, local: bool) -> Hello | Refused:
        """Returns the hello of a connection, or the refusal of it. Raises ValueError if it is no hello
        (msgspec.DecodeError is one).
        """
        spoken = _SPOKEN.decode(body).protocol
        if spoken != PROTOCOL:
            return Refused(
                f"the relay speaks protocol {spoken}, the control process {PROTOCOL}; run the same version of Hemostat"
            )
        hello = _HELLO.decode(body)
        if not local:
            security = self.security
            if security is None or not hmac.compare_digest(hello.token.encode(), security.token.encode()):
                return Refused("wrong token; control.token has to be the same on both sides")
            if unknown := sorted(set(hello.upstreams) - set(security.upstreams)):
                return Refused(
                    f"the relay's upstream {unknown[0]} is not one of the control process; name the same in both files"
                )
        return hello if self.admit is not None else NOT_ACTIVE

    async def _flush(self, writer: asyncio.StreamWriter) -> None:
        writer.close()
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await writer.wait_closed()

    def _failed(self, kind: str, line: str, *, fault: bool = True) -> None:
        if fault:
            self._pause += PAUSE_SECONDS
            self._say(kind, line)

    def _say(self, kind: str, line: str) -> None:
        now = time.monotonic()
        if now - self._said.get(kind, -LOG_SECONDS) >= LOG_SECONDS:
            self._said[kind] = now
            log.warning("%s", line)


def listen_locally(path: Path) -> socket.socket:
    """Returns a Unix socket that only this user can connect to; a former one at this path is replaced. Raises
    HemostatError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        advice = "name a folder with a shorter path that this user can write to"
        raise HemostatError(f"run_dir: cannot bind {path} ({in_words(error)}); {advice}") from None
    finally:
        os.umask(mask)
    return sock


def _peer(connection: socket.socket) -> str:
    try:
        return "this machine" if connection.family == socket.AF_UNIX else str(connection.getpeername()[0])
    except OSError:
        return "an address that is gone"


def _in_words(error: Exception) -> str:
    """Returns one line that shows nothing of what a peer sent."""
    match error:
        case ssl.SSLError():
            return f"TLS failed ({error.reason or 'the peer closed it'})"
        case TimeoutError():
            return f"no hello within {HANDSHAKE_SECONDS:g} s"
        case OSError():
            return error.strerror or "the connection broke"
        case EOFError():
            return "it ended before its hello"
    return "what it sent is no hello"
