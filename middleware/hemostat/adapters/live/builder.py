"""Runs the process that makes an adapter: low priority, bounded memory, started again where it was killed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from hemostat.adapters.live.job import InvalidResult, Job, JobFolder, Result, read_result
from hemostat_calibration.messages import in_words

COMMAND = (sys.executable, "-m", "hemostat.adapters.building.build_process")
"""The process; the job's folder and this process's id follow."""
CHILD_ENVIRONMENT = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""One core, however many there are: serving comes first."""
MEMORY_POLL_SECONDS = 0.25
STALLED_SECONDS = 3600.0
"""Without a line of progress for so long, the process is ended."""
MAX_LINE_BYTES = 1 << 16
MAX_STDERR_BYTES = 4096
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BuildFailure(StrEnum):
    """Why no adapter came of a build; also values of the label `outcome` of `hemostat_adapter_builds_total`."""

    ENDED = "ended"
    """The process was killed, or crashed."""
    STALLED = "stalled"
    """The process made no progress."""
    MEMORY = "memory"
    """The process took more than `adapter.memory_mib`."""
    DISK = "disk"
    """The job's folder could not be written."""
    REFUSED = "refused"
    """The process cannot make an adapter of these checkpoints or texts."""
    INVALID = "invalid"
    """What it wrote is damaged, or is not about the checkpoints that serve."""

    @property
    def may_pass(self) -> bool:
        """Worth another attempt from the same texts."""
        return self in {BuildFailure.ENDED, BuildFailure.STALLED, BuildFailure.DISK}


class BuildFailed(Exception):
    """The text is one line."""

    def __init__(self, reason: BuildFailure, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class _Line(msgspec.Struct, frozen=True):
    stage: str = ""
    done: Any = 0
    total: int = 0
    error: str = ""


class Build:
    """One job, until `close`: several attempts go on from each other's work.

    progress: called with one short line. memory_mib: of the process.
    """

    def __init__(
        self, job: Job, memory_mib: int, progress: Callable[[str], None], command: Sequence[str] = COMMAND
    ) -> None:
        self._job = job
        self._memory_bytes = memory_mib << 20
        self._progress = progress
        self._command = tuple(command)
        self._folder: JobFolder | None = None
        self.pid: int | None = None
        """Of the process, while it runs."""
        self.peak_bytes = 0

    async def attempt(self) -> Result:
        """BuildFailed. The process has ended when this returns, also where it is cancelled."""
        try:
            if self._folder is None:
                self._folder = await asyncio.to_thread(JobFolder, self._job)
        except OSError as error:
            raise BuildFailed(BuildFailure.DISK, f"the job's folder cannot be written: {error.strerror}") from None
        await self._run(self._folder.path)
        try:
            return await asyncio.to_thread(read_result, self._folder.path, self._job)
        except InvalidResult as error:
            await self.close()  # the next attempt begins anew
            raise BuildFailed(BuildFailure.INVALID, f"its result is not used: {error}") from None

    async def close(self) -> None:
        """Delete the texts."""
        folder, self._folder = self._folder, None
        if folder is not None:
            await _completed(asyncio.to_thread(folder.delete))

    async def _run(self, folder: Path) -> None:
        command = [*self._command, str(folder), str(os.getpid())]
        if shutil.which("ionice"):
            command = ["ionice", "-c", "3", *command]
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | CHILD_ENVIRONMENT,
                limit=MAX_LINE_BYTES,
                start_new_session=True,  # so that Ctrl-C in a terminal does not reach it
            )
        except OSError as error:
            raise BuildFailed(BuildFailure.ENDED, f"it cannot be started: {in_words(error)}") from None
        self.pid = process.pid
        too_large = asyncio.create_task(self._watch_memory(process), name="builder's memory")
        stderr = asyncio.create_task(_tail(process), name="builder's stderr")
        refusal, stalled = "", False
        try:
            refusal = await self._read(process)
            await process.wait()
        except TimeoutError:
            stalled = True
        finally:
            killed_for_memory = too_large.done()
            too_large.cancel()
            await _end(process)
            self.pid = None
            last = await stderr
        if killed_for_memory:
            limit = self._memory_bytes >> 20
            raise BuildFailed(BuildFailure.MEMORY, f"it needs more than adapter.memory_mib, {limit} MiB: raise it")
        if stalled:
            raise BuildFailed(BuildFailure.STALLED, f"no progress for {STALLED_SECONDS:.0f} s")
        if refusal:
            full = any(os.strerror(code) in refusal for code in DISK_ERRORS)
            raise BuildFailed(BuildFailure.DISK if full else BuildFailure.REFUSED, refusal)
        if process.returncode != 0:
            detail = f"code {process.returncode}" + (f"; last output: {last}" if last else "")
            raise BuildFailed(BuildFailure.ENDED, f"its process ended ({detail})")

    async def _read(self, process: asyncio.subprocess.Process) -> str:
        """What the process says was wrong, or "". TimeoutError."""
        assert process.stdout is not None
        error = ""
        while True:
            try:
                async with asyncio.timeout(STALLED_SECONDS):
                    data = await process.stdout.readline()
            except ValueError:
                continue  # a line that is too long
            if not data:
                return error
            try:
                line = msgspec.json.decode(data, type=_Line)
            except msgspec.DecodeError:
                continue  # what a library prints
            error = line.error or error
            if line.stage:
                self._progress(f"{line.stage} {line.done}/{line.total}" if line.total else line.stage)

    async def _watch_memory(self, process: asyncio.subprocess.Process) -> None:
        """Kills the process, and returns, once it takes too much. Never returns where that is not known."""
        while True:
            self.peak_bytes = max(self.peak_bytes, found := memory_of(process.pid))
            if found > self._memory_bytes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                return
            await asyncio.sleep(MEMORY_POLL_SECONDS)


def memory_of(pid: int) -> int:
    """Bytes of memory that only this process uses, swapped ones included; files that it has mapped (the checkpoints)
    are not among them. 0 where it is not known: the process has ended, or the system is not Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return sum(int(found[name][0]) << 10 for name in ("RssAnon", "VmSwap") if found.get(name))


async def _end(process: asyncio.subprocess.Process) -> None:
    """It has ended when this returns, also where it is cancelled."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await _completed(process.wait())


async def _completed(work: Awaitable[object]) -> None:
    """Wait for it, also where this is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def _tail(process: asyncio.subprocess.Process) -> str:
    """The last line of its standard error."""
    assert process.stderr is not None
    text = b""
    while data := await process.stderr.read(MAX_STDERR_BYTES):
        text = (text + data)[-MAX_STDERR_BYTES:]
    lines = [line.strip() for line in text.decode(errors="replace").split("\n") if line.strip()]
    return lines[-1] if lines else ""
