"""Keeps a child process running for what its owner works on: started when it is wanted, and again after it ended.

The owner queues work, says what is sent, and reads the answers; it never waits for the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from hemostat.ipc.child_process import ONE_CORE, ChildExited, FramedChild
from hemostat_calibration.backoff import Backoff

Target = TypeVar("Target")
Ready = TypeVar("Ready")
Target_contra = TypeVar("Target_contra", contravariant=True)
Ready_contra = TypeVar("Ready_contra", contravariant=True)


class ChildRefused(Exception):
    """The process cannot do its work; the text says how to fix it."""


class ChildOwner(Protocol[Target_contra, Ready_contra]):
    """The interface that a supervisor needs of its owner. All but `begin`, `exchange` and `closed` return at once."""

    def wants_child(self) -> bool:
        """Returns True if there is work for a process, or soon will be."""
        ...

    def receive(self, body: bytes) -> None:
        """Takes one frame from the process. The first answer is handed to `Supervisor.ready` or `refused`."""
        ...

    def starting(self, target: Target_contra) -> None: ...

    async def begin(self, child: FramedChild, target: Target_contra) -> None:
        """Sends what comes before the first answer."""
        ...

    def began(self, ready: Ready_contra, target: Target_contra) -> None:
        """Is told that the first answer has come. Raises ChildRefused if the process is of no use."""
        ...

    async def exchange(self, child: FramedChild) -> bool:
        """Sends what is due. Returns whether there may be more to do at once; else it is called after the next
        `wake`."""
        ...

    def exited(self, why: ChildExited) -> None:
        """Is told that the process has just ended: answers that are waited for will not come."""
        ...

    async def closed(self) -> None:
        """Is told that all that the process has sent was received."""
        ...

    def failed(self, why: ChildExited | ChildRefused) -> None:
        """Is told that the process ended by itself, or refused. It is started again after a pause."""
        ...

    def reset(self) -> None:
        """Is told that there is no process any more."""
        ...


class Supervisor(Generic[Target, Ready]):
    """Owns the target and the process. backoff: seconds before a process that failed is started again, by how often in
    a row it failed before its first answer. environment: variables in addition to the ones of this process.
    """

    def __init__(
        self,
        module: str,
        owner: ChildOwner[Target, Ready],
        backoff: Sequence[float],
        environment: Mapping[str, str] = ONE_CORE,
    ) -> None:
        self._module = module
        self._owner = owner
        self._backoff = Backoff(backoff, random.random)
        self._environment = environment
        self._target: Target | None = None
        self._wake = asyncio.Event()
        self._first: asyncio.Future[Ready] | None = None
        """The first answer of the process."""

    @property
    def target(self) -> Target | None:
        return self._target

    def set_target(self, target: Target | None) -> None:
        """Sets what to work on from now on; None: nothing. If it changes, the process ends, and the next one begins."""
        if target != self._target:
            self._target = target
            self._backoff.reset()
            self.wake()

    def wake(self) -> None:
        """Wakes the supervisor: there is something to send, or the process is wanted now."""
        self._wake.set()

    def ready(self, answer: Ready) -> None:
        """Notes that the process can do its work."""
        if self._first is not None and not self._first.done():
            self._first.set_result(answer)

    def refused(self, why: str) -> None:
        """Notes that the process said that it cannot do its work."""
        if self._first is not None and not self._first.done():
            self._first.set_exception(ChildRefused(why))
            self._first.exception()  # it may have no waiter

    async def run(self) -> None:
        """Keeps a process running for the target while it is wanted, until cancelled."""
        while True:
            target = self._target
            self._wake.clear()
            if target is None or not self._owner.wants_child():
                await self._wake.wait()
                continue
            try:
                await self._run_process(target)
                continue
            except (ChildExited, ChildRefused) as why:
                self._owner.failed(why)
            finally:
                self._first = None
                self._owner.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._backoff.pause()):
                    await self._target_changes(target)

    async def _target_changes(self, target: Target) -> None:
        while self._target == target:
            await self._wake.wait()
            self._wake.clear()

    async def _run_process(self, target: Target) -> None:
        """Returns when the target changes; raises ChildExited, ChildRefused."""
        self._owner.starting(target)
        self._first = asyncio.get_running_loop().create_future()
        child = await FramedChild.start(self._module, self._owner.receive, self._environment)
        watching = asyncio.create_task(self._watch(child), name=f"end of {self._module}")
        try:
            await self._owner.begin(child, target)
            answer = await self._first
            self._owner.began(answer, target)
            self._backoff.reset()
            while self._target == target:
                self._wake.clear()
                if child.exited.is_set():
                    raise ChildExited(child.exit_summary())
                if not await self._owner.exchange(child):
                    await self._wake.wait()
        finally:
            watching.cancel()
            await child.close()
            await asyncio.gather(watching, return_exceptions=True)
            await self._owner.closed()

    async def _watch(self, child: FramedChild) -> None:
        await child.exited.wait()
        why = ChildExited(child.exit_summary())
        if self._first is not None and not self._first.done():
            self._first.set_exception(why)
            self._first.exception()  # it may have no waiter
        self._owner.exited(why)
        self.wake()
