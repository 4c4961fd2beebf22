"""Both ends of a child process of ours: frames over its standard input and output, its life tied to its parent's.

A frame is 4 bytes of length, big-endian, then that many bytes; what is in them is the caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from hemostat.ipc.process import die_with_parent

MAX_FRAME = 1 << 30
_LENGTH = struct.Struct(">I")
HEADER_SIZE = _LENGTH.size

CLOSES_WITHIN = 2.0
STDERR_KEPT = 4096
"""Last bytes of the child's standard error, for the message about its end."""
LAST_WORDS_WITHIN = 1.0


def pack(body: bytes) -> bytes:
    """One frame; ValueError when it would be longer than MAX_FRAME."""
    if len(body) > MAX_FRAME:
        raise ValueError(f"a frame of {len(body)} bytes: at most {MAX_FRAME} are allowed")
    return _LENGTH.pack(len(body)) + body


def body_length(header: bytes) -> int:
    """Length that the 4 header bytes announce; ValueError above MAX_FRAME."""
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes: at most {MAX_FRAME} are allowed")
    return int(length)


def begin(parent: int, niceness: int) -> tuple[Iterator[bytes], Callable[[bytes], None]]:
    """The child's first step: bodies of the frames that come, until there are no more; and how to send one.

    Libraries print: what this process prints goes to standard error from now on, not among the frames.
    """
    die_with_parent(parent, signal.SIGKILL)
    os.nice(niceness)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(body: bytes) -> None:
        output.write(pack(body))
        output.flush()

    return _bodies(sys.stdin.buffer), send


def _bodies(stream: BinaryIO) -> Iterator[bytes]:
    while len(header := stream.read(HEADER_SIZE)) == HEADER_SIZE:
        length = body_length(header)
        body = stream.read(length)
        if len(body) < length:
            return
        yield body


class ChildGone(Exception):
    """The process is not running; the text says how it ended."""


class Child:
    """The parent's end. `receive` gets the body of every frame; what it raises ends the child.

    `dead` is set once the process is gone, its output read to the end.
    """

    def __init__(self, process: asyncio.subprocess.Process, receive: Callable[[bytes], None]) -> None:
        self._process = process
        self._receive = receive
        self._stderr = b""
        self._complaint = ""
        self.dead = asyncio.Event()
        self._listening = asyncio.create_task(self._listen(), name="child's stderr")
        self._reading = asyncio.create_task(self._read(), name="child's frames")

    @classmethod
    async def start(
        cls, module: str, receive: Callable[[bytes], None], environment: Mapping[str, str] | None = None
    ) -> Child:
        """`python -m module PARENT_PID`; ChildGone when it cannot be started."""
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, str(os.getpid())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | dict(environment or {}),
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
        )
        try:
            return cls(await asyncio.shield(starting), receive)
        except OSError as error:
            raise ChildGone(f"it cannot be started: {error}") from error
        except asyncio.CancelledError:
            # What has been started is ended by whoever started it.
            with contextlib.suppress(OSError):
                await cls(await starting, receive).close()
            raise

    def send(self, body: bytes) -> None:
        """Queue a frame. Not drained: whoever sends awaits an answer before the next."""
        assert self._process.stdin is not None
        if self.dead.is_set():
            raise ChildGone(self.epitaph())
        self._process.stdin.write(pack(body))

    async def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        try:
            while True:
                length = body_length(await stream.readexactly(HEADER_SIZE))
                self._receive(await stream.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception as error:  # noqa: BLE001  whatever the receiver says of a frame: the child is of no use then
            self._complaint = f"it sent nonsense ({error}); "
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            await asyncio.wait({self._listening}, timeout=LAST_WORDS_WITHIN)
            self.dead.set()

    async def _listen(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        while data := await stream.read(STDERR_KEPT):
            self._stderr = (self._stderr + data)[-STDERR_KEPT:]

    def epitaph(self) -> str:
        """How it ended, and the last that it said."""
        lines = self._stderr.decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        code = f"{self._complaint}code {self._process.returncode}"
        return f"{code}; it said: {said}" if said else code

    async def close(self) -> None:
        """End it: its input ends, and soon it is killed. Whoever is cancelled meanwhile still sees it through."""
        ending = asyncio.ensure_future(self._close())
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise

    async def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.dead.wait(), CLOSES_WITHIN)
        if not self.dead.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await asyncio.gather(self._reading, self._listening, return_exceptions=True)
