"""Waiting for a condition, without asserting on elapsed time beyond a generous limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

HANG_SECONDS = 120.0
"""A limit that only a hang exceeds."""


async def until(condition: Callable[[], object], seconds: float = HANG_SECONDS) -> None:
    """Returns once the condition holds; TimeoutError where it does not within a time that only a hang takes."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)
