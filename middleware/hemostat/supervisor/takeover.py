"""The protocol by which a supervisor hands over to its successor, over a Unix socket. Both serve until the successor is
complete.

    predecessor                             successor
    ── {"folder"}, listening sockets ──▶    starts its relays on these sockets, and loads its control process
    ◀── {"step": "release_control"} ──
    stops its control process, which
    closes the store
    ── {"step": "released"} ──▶             starts its control process
    ◀── {"step": "serving"} ──              announces
    lets its relays drain, and ends

Until "serving" either side may end: the successor exits, or the predecessor goes on, with its control process again.
There is never more than one control process. The connection begins in one of two ways: the predecessor got SIGUSR2 and
starts the successor with one end of a socket pair (`FD_VARIABLE`), or the same command is started while another one
listens in the same `run_dir`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path
from typing import Any

from hemostat.config.errors import ConfigError
from hemostat_calibration.errors import HemostatError

FD_VARIABLE = "SUPERVISOR_TAKEOVER_FD"
"""The environment variable with the number of the inherited socket. Its name does not begin as the names of settings
do.
"""
STEP_SECONDS = 120.0
"""The longest time for one step of the other side: it starts processes."""
MAX_MESSAGE_BYTES = 65536
MAX_FDS = 253
"""The largest number of file descriptors in one message, SCM_MAX_FD of Linux."""

RELEASE_CONTROL = "release_control"
RELEASED = "released"
SERVING = "serving"


class TakeoverFailed(HemostatError):
    """The other side ended, did not answer in time, or sent something else."""


class Channel:
    """One end of the connection (SOCK_SEQPACKET: a packet is a message)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def send(self, message: dict[str, Any], sockets: list[socket.socket] | None = None) -> None:
        try:
            socket.send_fds(self._sock, [json.dumps(message).encode()], [sock.fileno() for sock in sockets or []])
        except OSError as error:
            raise TakeoverFailed(f"the other supervisor is gone ({error.strerror})") from error

    async def receive(self) -> tuple[dict[str, Any], list[socket.socket]]:
        """Returns the next message, and the sockets that came with it."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._sock, readable.set)
        try:
            async with asyncio.timeout(STEP_SECONDS):
                await readable.wait()
            data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE_BYTES, MAX_FDS)
            sockets = [socket.socket(fileno=fd) for fd in fds]
            for sock in sockets:
                sock.set_inheritable(False)
            message: dict[str, Any] = json.loads(data) if data else {}
        except TimeoutError:
            raise TakeoverFailed(f"the other supervisor did not answer within {STEP_SECONDS:g} s") from None
        except (OSError, ValueError) as error:
            raise TakeoverFailed(f"the other supervisor sent an invalid message ({error})") from error
        finally:
            loop.remove_reader(self._sock)
        if not data:
            raise TakeoverFailed("the other supervisor is gone")
        return message, sockets

    async def expect(self, step: str) -> dict[str, Any]:
        message, _ = await self.receive()
        if message.get("step") != step:
            raise TakeoverFailed(f"the other supervisor sent {message} in place of {step}")
        return message

    def close(self) -> None:
        self._sock.close()


def pair() -> tuple[Channel, socket.socket]:
    """Returns a channel, and the socket that a successor inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), theirs


def connect_to_predecessor(run_dir: Path | None) -> Channel | None:
    """Returns the connection to the supervisor that is to be replaced, if there is one."""
    inherited = os.environ.pop(FD_VARIABLE, None)
    if inherited is not None:
        return Channel(socket.socket(fileno=int(inherited)))
    if run_dir is None:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(_path(run_dir)))
    except OSError:
        sock.close()  # it has no listener
        return None
    return Channel(sock)


def listen_for_successors(run_dir: Path) -> socket.socket:
    """Returns a socket that successors connect to; only the same user can. It replaces a former one. Raises
    ConfigError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = _path(run_dir)
    mask = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise ConfigError(f"run_dir: cannot bind {path} ({error.strerror}); make the folder writable") from None
    finally:
        os.umask(mask)
    sock.listen(1)
    sock.setblocking(False)
    return sock


def _path(run_dir: Path) -> Path:
    return run_dir / "takeover.sock"
