"""Both ends of a child process: messages over its standard input and output. The child is killed when its parent ends,
or when it has been stopped for `liveness.SILENT_SECONDS`.

`Child` is any process that says something on its standard output, `FramedChild` one that is sent frames and answers in
frames. `supervisor` keeps a process running.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Self

from hemostat.ipc import liveness
from hemostat.ipc.framing import frame, header_of, read_frame, read_frames
from hemostat.ipc.supervised import die_with_parent
from hemostat_calibration.messages import in_words

CLOSE_SECONDS = 2.0
"""The time between the end of its input, or of its output, and the kill."""
MAX_STDERR_BYTES = 4096
"""The number of last bytes of the child's standard error that are kept, for the message about its end."""
STDERR_SECONDS = 1.0
"""The time for which the rest of its standard error is read after its end."""
ONE_CORE: Mapping[str, str] = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""The environment of a child that takes one core, however many there are: serving comes first."""

ReadMessage = Callable[[asyncio.StreamReader], Awaitable[bytes]]
"""The next message; asyncio.IncompleteReadError at the end."""


def connect_to_parent(parent: int, niceness: int) -> tuple[Iterator[bytes], Callable[[bytes], None]]:
    """The child's first step. Returns the bodies of the frames from its parent, and a function that sends one.

    What this process prints goes to standard error from now on, so that a library's output is not among the frames.
    """
    die_with_parent(parent, signal.SIGKILL)
    os.nice(niceness)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(body: bytes) -> None:
        output.write(frame(body))
        output.flush()

    return read_frames(sys.stdin.buffer), send


class ChildExited(Exception):
    """The process is not running; the text is its `exit_summary`."""


async def completed(work: Awaitable[object]) -> None:
    """Waits for it, also where the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def read_line(stream: asyncio.StreamReader) -> bytes:
    """Returns the next line; it is a `ReadMessage`. Lines above asyncio's limit of 64 KiB are left out."""
    while True:
        with contextlib.suppress(ValueError):
            if line := await stream.readline():
                return line
            raise asyncio.IncompleteReadError(b"", None)


class Child:
    """The parent's end of a child process.

    receive: called with every message of `read`; when it raises, the child is killed.
    exited: set once the process has ended and its output is read.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, receive: Callable[[bytes], None], read: ReadMessage
    ) -> None:
        self._process = process
        self._receive = receive
        self._read_message = read
        self._stderr = b""
        self._killed = ""
        """The reason for its kill, with "; " at the end. It is empty if this end has not killed it."""
        self.pid = process.pid
        self.exited = asyncio.Event()
        self._reading_stderr = asyncio.create_task(self._read_stderr(), name="child's stderr")
        self._reading = asyncio.create_task(self._read(), name="child's frames")
        self._watching = asyncio.create_task(self._watch_stops(), name="looks if the child is stopped")

    @classmethod
    async def start_command(
        cls,
        command: Sequence[str],
        receive: Callable[[bytes], None],
        environment: Mapping[str, str] | None = None,
        read: ReadMessage = read_line,
    ) -> Self:
        """Starts a command. Raises ChildExited if it cannot be started. environment: variables in addition to the ones
        of this process.
        """
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | dict(environment or {}),
                start_new_session=True,  # so that Ctrl-C in a terminal does not reach it
            )
        )
        try:
            return cls(await asyncio.shield(starting), receive, read)
        except OSError as error:
            raise ChildExited(f"it cannot be started: {in_words(error)}") from error
        except asyncio.CancelledError:
            # The process may have been started already: end it.
            with contextlib.suppress(OSError):
                await cls(await starting, receive, read).close()
            raise

    async def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        try:
            while True:
                self._receive(await self._read_message(stream))
        except (asyncio.IncompleteReadError, ConnectionError):
            # It is about to end by itself. To kill it now would lose its exit code: `kill` reaps it unseen.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._process.wait()
        except Exception as error:  # noqa: BLE001  a frame that the receiver rejects makes the child useless
            self._killed = f"it sent an invalid message ({error}); "
        finally:
            self._kill()
            await self._process.wait()
            await asyncio.wait({self._reading_stderr}, timeout=STDERR_SECONDS)
            self.exited.set()

    async def _watch_stops(self) -> None:
        """Kills it if it has been stopped for too long. One that computes may be silent for hours, and is left
        alone."""
        silence = liveness.Silence(time.monotonic())
        while not self.exited.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(liveness.LOOK_SECONDS):
                    await self.exited.wait()
            seconds = silence.look(time.monotonic())
            if not liveness.is_stopped(self.pid):
                silence.broken()
            elif seconds >= liveness.SILENT_SECONDS:
                self._killed = f"it had been stopped (SIGSTOP) for {liveness.SILENT_SECONDS:.0f} s; "
                self._kill()
                return

    async def _read_stderr(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        while data := await stream.read(MAX_STDERR_BYTES):
            self._stderr = (self._stderr + data)[-MAX_STDERR_BYTES:]

    def exit_summary(self) -> str:
        """Returns its exit code, and the last line of its standard error."""
        lines = self._stderr.decode(errors="replace").split("\n")
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
        code = f"{self._killed}code {self._process.returncode}"
        return f"{code}; last output: {last_line}" if last_line else code

    @property
    def returncode(self) -> int | None:
        """The process's exit status, as `asyncio` gives it; None while it runs."""
        return self._process.returncode

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self, grace_seconds: float = CLOSE_SECONDS) -> None:
        """Closes its input, waits, then kills it. It completes even when the caller is cancelled meanwhile."""
        await completed(self._close(grace_seconds))

    async def _close(self, grace_seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self.exited.wait()
        if not self.exited.is_set():
            self._kill()
        await asyncio.gather(self._reading, self._reading_stderr, self._watching, return_exceptions=True)


class FramedChild(Child):
    """One that is sent frames, and whose messages are frames."""

    @classmethod
    async def start(
        cls, module: str, receive: Callable[[bytes], None], environment: Mapping[str, str] | None = None
    ) -> FramedChild:
        """Starts `python -m module PARENT_PID`, and returns it. Raises ChildExited if it cannot be started."""
        command = (sys.executable, "-m", module, str(os.getpid()))
        return await cls.start_command(command, receive, environment, read_frame)

    def send(self, body: bytes) -> None:
        """Queues a frame. There is no back-pressure: callers wait for an answer before they send the next."""
        assert self._process.stdin is not None
        if self.exited.is_set():
            raise ChildExited(self.exit_summary())
        # A body may be large: it is not copied behind its header first.
        self._process.stdin.write(header_of(body))
        self._process.stdin.write(body)

    async def drain(self) -> None:
        """Returns once little of what was sent waits. Raises ChildExited if it ended meanwhile."""
        assert self._process.stdin is not None
        try:
            await self._process.stdin.drain()
        except ConnectionError:
            await self.exited.wait()
            raise ChildExited(self.exit_summary()) from None
