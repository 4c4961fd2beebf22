"""The benchmark's control process takes what its relays send."""

from __future__ import annotations

import asyncio

from tests.bench.bench_load import control_process, reported, scored
from tests.bench.load.relays import connected


async def test_captures_are_scored_and_reports_are_taken() -> None:
    async with control_process() as control, connected(control.socket, 2, control.version) as relays:
        while (await control.ask())["relays"] < 2:
            await asyncio.sleep(0.02)
        await control.ask(b"score")
        captures, tokens = await scored(control, relays, 10)
        assert 0.0 < captures < tokens
        assert await reported(control, relays, 256) > 0.0
        counts = await control.ask()
    assert counts["scored"] >= 10
    assert counts["dropped"] == 0
    assert counts["reports"] >= 256
