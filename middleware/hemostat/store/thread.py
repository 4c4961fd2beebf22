"""The thread in which the event loop has a store's calls executed, one after the other.

The threads that asyncio has by default also look up names and read checkpoints. Where these block, a store's call would
wait for them, and a process could not find out in time that its store is another process's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class StoreThread:
    """Owns the thread. It begins with the first call."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Returns the function's result, once all earlier calls have ended."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def close(self) -> None:
        """Takes no further calls. Those that go on are not waited for here."""
        self._executor.shutdown(wait=False, cancel_futures=True)
