"""Runs the process that makes an adapter: low priority, bounded memory, started again where it was killed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from hemostat.adapters.live.folders import CheckpointFolders
from hemostat.adapters.live.job import InvalidResult, Job, JobFolder, Result, read_result
from hemostat.ipc.child_process import ONE_CORE, Child, ChildExited, completed

COMMAND = (sys.executable, "-m", "hemostat_lab.adapters.build_process")
"""The laboratory's process; the job's folder and this process's id follow."""
POLL_SECONDS = 0.25
"""The seconds between two looks at the memory of the process."""
CHECK_SECONDS = 300.0
"""The process that checks a pair of checkpoints imports torch and reads both; a slow disk may take minutes."""
STALLED_SECONDS = 3600.0
"""Without a line of progress for so long, the process is ended."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BuildFailure(StrEnum):
    """The reason why a build made no adapter; also a value of the label `outcome` of
    `hemostat_adapter_builds_total`."""

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
    """The process's result is damaged, or is not about the checkpoints that serve."""

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
    notes: list[str] = []


async def check_pair(folders: CheckpointFolders, device: str) -> list[str]:
    """Returns what an adapter of both checkpoints would not correct; BuildFailed if none can be made of them.

    The laboratory's process opens the checkpoints, so that this one does not load torch.
    """
    said = _Line()

    def read(data: bytes) -> None:
        nonlocal said
        with contextlib.suppress(msgspec.DecodeError):  # what a library prints
            said = msgspec.json.decode(data, type=_Line)

    parts = ["--check", str(folders.reference), str(folders.compressed), device, str(os.getpid())]
    try:
        child = await Child.start_command([*COMMAND, *parts], read, ONE_CORE)
    except ChildExited as why:
        raise BuildFailed(BuildFailure.ENDED, str(why)) from None
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await child.exited.wait()
    except TimeoutError:
        raise BuildFailed(BuildFailure.STALLED, f"no answer within {CHECK_SECONDS:.0f} s") from None
    finally:
        await child.close(grace_seconds=0.0)
    if said.error:
        raise BuildFailed(BuildFailure.REFUSED, said.error)
    if child.returncode != 0:
        raise BuildFailed(BuildFailure.ENDED, f"its process ended ({child.exit_summary()})")
    return said.notes


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
        self.peak_bytes = 0
        self._refusal = ""
        """The process's own words about what is wrong; "" while it has said nothing."""
        self._heard_at = 0.0
        """When its last line came, monotonic seconds."""

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
            await completed(asyncio.to_thread(folder.delete))

    async def _run(self, folder: Path) -> None:
        command = [*self._command, str(folder), str(os.getpid())]
        if shutil.which("ionice"):
            command = ["ionice", "-c", "3", *command]
        self._refusal, self._heard_at = "", time.monotonic()
        try:
            child = await Child.start_command(command, self._read_line, ONE_CORE)
        except ChildExited as why:
            raise BuildFailed(BuildFailure.ENDED, str(why)) from None
        try:
            await self._watch(child)
        finally:
            await child.close(grace_seconds=0.0)
        if self._refusal:
            full = any(os.strerror(code) in self._refusal for code in DISK_ERRORS)
            raise BuildFailed(BuildFailure.DISK if full else BuildFailure.REFUSED, self._refusal)
        if child.returncode != 0:
            raise BuildFailed(BuildFailure.ENDED, f"its process ended ({child.exit_summary()})")

    def _read_line(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        try:
            line = msgspec.json.decode(data, type=_Line)
        except msgspec.DecodeError:
            return  # what a library prints
        self._refusal = line.error or self._refusal
        if line.stage:
            self._progress(f"{line.stage} {line.done}/{line.total}" if line.total else line.stage)

    async def _watch(self, child: Child) -> None:
        """Waits until the process has ended. Raises BuildFailed as soon as it takes too much memory, or makes no
        progress."""
        while not child.exited.is_set():
            self.peak_bytes = max(self.peak_bytes, result := memory_of(child.pid))
            if result > self._memory_bytes:
                limit = self._memory_bytes >> 20
                raise BuildFailed(BuildFailure.MEMORY, f"it needs more than adapter.memory_mib, {limit} MiB: raise it")
            if time.monotonic() - self._heard_at > STALLED_SECONDS:
                raise BuildFailed(BuildFailure.STALLED, f"no progress for {STALLED_SECONDS:.0f} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await child.exited.wait()


def memory_of(pid: int) -> int:
    """Bytes of memory that only this process uses, swapped ones included; files that it has mapped (the checkpoints)
    are not among them. 0 where it is not known: the process has ended, or the system is not Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    result = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return sum(int(result[name][0]) << 10 for name in ("RssAnon", "VmSwap") if result.get(name))
