"""A Python module that runs as a child process and is restarted when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hemostat.ipc import liveness
from hemostat.ipc.liveness import BEAT, Silence
from hemostat_calibration.backoff import Backoff

log = logging.getLogger("hemostat.serve")

START_SECONDS = 60.0
"""The time within which a process must report that it is loaded, and again that it listens."""
RESTART_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0)
"""The longest delays before a restart, by the number of failures in a row."""
STABLE_SECONDS = 30.0
"""A process that ran this long is restarted without delay."""
EXIT_CODE_EXPLAINED = 2
"""The exit code of a process that has logged in one line why it cannot start."""


class StartFailure(Exception):
    """A process ended before it listened."""

    def __init__(self, name: str, code: int | None) -> None:
        super().__init__(f"{name} did not start")
        self.explained = code == EXIT_CODE_EXPLAINED
        """It has logged the reason itself."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The arguments that a process is started with.

    settings: JSON that it reads from the first line of its standard input. fds: inherited file descriptors, which
    `settings` names by their numbers.
    """

    settings: dict[str, Any]
    fds: tuple[int, ...] = field(default=())


class Child:
    """Owns one process: loaded (its modules are imported), started (it listens), restarted until `stop`.

    A process writes a line when it is loaded and another, the JSON `listening`, when it listens. From then on it writes
    BEAT while its event loop runs. A kept process that has been silent for too long is killed and started again: what
    it holds (the store's lock, its clients) is of use to nobody. One that has never written BEAT is left alone: a
    version that does not know it may have been installed meanwhile.
    """

    def __init__(
        self,
        name: str,
        module: str,
        launch: Launch,
        take_spare: Callable[[], Child | None] = lambda: None,
        silent_seconds: float = liveness.SILENT_SECONDS,
    ) -> None:
        """take_spare: gives a loaded process of the same module for a restart, which inherits this one's file
        descriptors and possibly more; None: there is none. silent_seconds: after so long without a word it is killed.
        """
        self.name = name
        self.launch = launch
        """The arguments of the next start or restart."""
        self._module = module
        self._take_spare = take_spare
        self._silent_seconds = silent_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self.listening: dict[str, Any] = {}
        self._silence: Silence | None = None
        """The silence of the present process; None until it has written BEAT."""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The process's id; 0 before it is started."""
        return 0 if self._process is None else self._process.pid

    async def load(self) -> None:
        """Starts the process; returns when it has imported its modules and waits for its settings. Raises
        StartFailure."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor only, which stops all in order
                pass_fds=self.launch.fds,
            )
        except OSError as error:  # no memory, process or file descriptor is free
            log.error("%s: cannot start a process (%s)", self.name, error.strerror or error)
            raise StartFailure(self.name, None) from error
        await self._line()

    async def begin(self) -> None:
        """Sends its settings to a loaded process; returns when it listens. Raises StartFailure."""
        self.send(self.launch.settings)
        self.listening = await self._line()

    async def start(self) -> None:
        await self.load()
        await self.begin()

    def send(self, message: dict[str, Any]) -> None:
        """Sends one more line to its standard input; the line is dropped if it is not running."""
        if self._process is not None and self._process.stdin is not None and self.running:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _line(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                line = await self._process.stdout.readline()
            answer: dict[str, Any] = json.loads(line)
        except (TimeoutError, ValueError) as error:
            if isinstance(error, ValueError):  # it is about to end without a report: its exit code has the reason
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5.0):
                        await self._process.wait()
            await self._end(signal.SIGKILL, 5.0)
            raise StartFailure(self.name, self._process.returncode) from error
        return answer

    def keep(self) -> None:
        """Restarts the process from now on whenever it ends, with increasing delays, until `stop`."""
        self._keeping = asyncio.create_task(self._keep(), name=f"keeps {self.name}")

    async def _keep(self) -> None:
        backoff = Backoff(RESTART_SECONDS, random.random)
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._end_of(self._process)
            if time.monotonic() - started > STABLE_SECONDS:
                backoff.reset()
                delay = 0.0
            else:
                delay = backoff.pause()
            log.error("%s ended with code %s; starting it again in %.1f s", self.name, code, delay)
            await asyncio.sleep(delay)
            try:
                await self._restart()
            except StartFailure as failure:
                log.error("%s", failure)

    async def _end_of(self, process: asyncio.subprocess.Process) -> int:
        """Waits for its end, and kills it if it is silent for too long. Returns its exit code."""
        self._silence = None
        ending = asyncio.create_task(process.wait(), name=f"end of {self.name}")
        hearing = asyncio.create_task(self._hear(process), name=f"hears {self.name}")
        try:
            while not ending.done():
                await asyncio.wait({ending}, timeout=liveness.LOOK_SECONDS)
                if self._is_silent and not ending.done():
                    what = "is stopped" if liveness.is_stopped(process.pid) else "does nothing"
                    log.error("%s %s, and has been silent for %.0f s; killed", self.name, what, self._silent_seconds)
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await ending
            return ending.result()
        finally:
            for task in (ending, hearing):
                task.cancel()
            await asyncio.gather(ending, hearing, return_exceptions=True)

    @property
    def _is_silent(self) -> bool:
        return self._silence is not None and self._silence.look(time.monotonic()) >= self._silent_seconds

    async def _hear(self, process: asyncio.subprocess.Process) -> None:
        """Reads what it writes, until the end of its output."""
        assert process.stdout is not None
        while data := await process.stdout.read(4096):
            if BEAT not in data:
                continue
            if self._silence is None:
                self._silence = Silence(time.monotonic())
            self._silence.broken()

    async def _restart(self) -> None:
        """Starts a process in place of the one that has ended. Raises StartFailure."""
        spare = self._take_spare()
        if spare is None:
            await self.start()
            return
        self._process, spare._process = spare._process, None
        others = set(spare.launch.fds) - set(self.launch.fds)
        self.send(self.launch.settings | {"other_fds": sorted(others)})
        self.listening = await self._line()

    async def stop(self, sig: signal.Signals, within: float) -> None:
        """Stops it and restarts it no more: sends `sig`, waits `within` seconds for its end, then kills it. May be
        called again."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self._end(sig, within)

    async def _end(self, sig: signal.Signals, within: float) -> None:
        process = self._process
        if process is None or not self.running:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(sig)
        try:
            async with asyncio.timeout(within):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not end within %.0f s; killed", self.name, within)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
