"""The access log: one line for each request on the data port, refused ones too. It has nothing that a client or a model
has written but the request's id.

Lines are buffered and written by a thread, so that a slow disk or a pipe without a reader delays no request; what does
not fit into the buffer, or cannot be written, is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import stat
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Literal

import msgspec

from hemostat.ipc.ends import REFUSED
from hemostat.openai import routes

FLUSH_BYTES = 64 * 1024
"""The number of buffered bytes from which on they are written at once. Fewer bytes are written about once a second."""
MAX_BUFFERED_BYTES = 4 * 1024 * 1024
MAX_ID_CHARACTERS = 128
"""The largest number of characters of a request's id that are written; the client may choose the id."""

_plain = re.compile(r"[!#-~]+").fullmatch
"""A value that needs no quotes in a text line."""


class Line(msgspec.Struct, omit_defaults=True):
    """One request, as JSON; a text line has the same fields as name=value, `-` where a value is not known."""

    time: str
    """The time at which the response ended: UTC, ISO 8601."""
    method: str
    route: str
    """The label of the route, as in the metrics: `other` for unknown ones."""
    status: int
    """The status that the client got; 0: none."""
    outcome: str
    """The outcome as in `hemostat_requests_total`."""
    bytes: int
    """The number of bytes that were sent to the client, with heads and framing."""
    seconds: float
    """The time from the request's head to the end of its response."""
    upstream_seconds: float | None
    """The time from sending the request to the first bytes of the response; null if there was none."""
    arm: str
    request_id: str
    client: str = ""
    """The client's address if `log.access_clients` is set."""


class AccessLog:
    """Owns the lines that wait. Create it inside a running event loop.

    descriptor: a file that is open for appending, or a pipe. clients: lines have the clients' addresses.
    dropped: called with the number of lines that were dropped.
    """

    def __init__(
        self, descriptor: int, form: Literal["text", "json"], dropped: Callable[[int], None], *, clients: bool = False
    ) -> None:
        self._clients = clients
        self._descriptor = descriptor
        self._encode = _json_line if form == "json" else _text_line
        self._dropped = dropped
        self._loop = asyncio.get_running_loop()
        self._waiting: list[bytes] = []
        self._bytes = 0
        """The number of bytes in `_waiting`."""
        self._handed_over: SimpleQueue[bytes | None] = SimpleQueue()
        """The lines that were handed over to the thread; None: it ends."""
        self._writing: asyncio.Future[None] | None = None
        self._piece = MAX_BUFFERED_BYTES if stat.S_ISREG(os.fstat(descriptor).st_mode) else select.PIPE_BUF
        """The largest number of bytes of one write. Relays share the descriptor: a longer write to a pipe may be mixed
        with another's."""
        self._torn = False
        """It is True if the last line in the file lacks its end."""
        # A daemon, unlike the threads of an executor: a pipe without a reader must not keep the process from ending.
        threading.Thread(target=self._run, name="access-log", daemon=True).start()

    def request(
        self,
        method: str,
        route: str,
        status: int,
        outcome: str,
        sent: int,
        seconds: float,
        upstream_seconds: float | None,
        arm: str,
        request_id: str,
        address: str,
    ) -> None:
        """Adds the line of a request that has ended; see `Line`."""
        waited = None if upstream_seconds is None else round(upstream_seconds, 6)
        cut = request_id[:MAX_ID_CHARACTERS]
        client = address if self._clients else ""
        self.add(Line(_now(), method, route, status, outcome, sent, round(seconds, 6), waited, arm, cut, client))

    def add(self, line: Line) -> None:
        """Adds a line to the buffer, and returns at once. A full buffer drops the line, which is counted."""
        if self._bytes > MAX_BUFFERED_BYTES:
            self._dropped(1)
            return
        encoded = self._encode(line)
        self._waiting.append(encoded)
        self._bytes += len(encoded)
        if self._bytes > FLUSH_BYTES:
            self.flush()

    def refused(self, status: int, address: str) -> None:
        """Adds a line for a request that could not be parsed, or for a connection that was not accepted."""
        self.request("", routes.OTHER, status, REFUSED, 0, 0.0, None, "none", "", address)

    def flush(self) -> None:
        """Begins to write what waits, if nothing is being written."""
        if self._waiting and self._writing is None:
            data = b"".join(self._waiting)
            self._waiting = []
            self._bytes = 0
            self._writing = self._loop.create_future()
            self._handed_over.put(data)

    def _written(self, lost: int) -> None:
        assert self._writing is not None
        self._writing.set_result(None)
        self._writing = None
        if lost:
            self._dropped(lost)

    def _run(self) -> None:
        """Writes lines until the end; it runs in the thread."""
        while (data := self._handed_over.get()) is not None:
            lost = self._write(data)
            with contextlib.suppress(RuntimeError):  # the loop is closed: there is no waiter any more
                self._loop.call_soon_threadsafe(self._written, lost)

    def _write(self, data: bytes) -> int:
        """Writes the lines, in the thread, and returns the number of lines that could not be written."""
        rest = memoryview(b"\n" + data if self._torn else data)
        try:
            while rest:
                piece = rest[: self._piece]
                if len(piece) < len(rest) and (end := bytes(piece).rfind(b"\n") + 1):
                    piece = piece[:end]
                written = os.write(self._descriptor, piece)
                self._torn = rest[written - 1] != ord("\n")
                rest = rest[written:]
        except OSError:
            return bytes(rest).count(b"\n")
        return 0

    async def close(self, timeout: float = 1.0) -> None:  # noqa: ASYNC109  a limit, not a cancellation
        """Writes what waits, as far as it is possible in this time."""
        for _ in range(2):  # what is being written, then what has waited meanwhile
            self.flush()
            if self._writing is not None:
                await asyncio.wait((self._writing,), timeout=timeout)
        self._handed_over.put(None)


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")


def _json_line(line: Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def _text_line(line: Line) -> bytes:
    waited = "-" if line.upstream_seconds is None else line.upstream_seconds
    client = f" client={line.client}" if line.client else ""
    return (
        f"time={line.time} method={line.method or '-'} route={line.route} status={line.status} outcome={line.outcome} "
        f"bytes={line.bytes} seconds={line.seconds} upstream_seconds={waited} arm={line.arm} "
        f"request_id={_shown(line.request_id)}{client}\n"
    ).encode()


def _shown(text: str) -> str:
    """Returns a value that the client may have chosen: quoted where it could be taken for more than one."""
    if not text:
        return "-"
    return text if _plain(text) and text != "-" else json.dumps(text)
