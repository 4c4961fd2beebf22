"""The rows of `make bench-spool`, small: what is scored later costs a part of what the live path costs, and so on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.bench import bench_spool


async def test_an_outage_of_the_reference_loses_nothing(tmp_path: Path) -> None:
    came, kept, grown = await bench_spool.keep(tmp_path, seconds=300, per_second=20, tokens=2)
    assert kept == came == 6_000
    assert grown <= bench_spool.MAX_GROWN_MIB


def test_captures_are_scored_later_at_five_times_the_rate_of_the_live_path() -> None:
    """Both rates are per second of CPU time of one process, so that other processes do not change the ratio."""
    later, live = asyncio.run(bench_spool.later_rate(256)), asyncio.run(bench_spool.live_rate(128))
    assert later >= bench_spool.MIN_RATIO * live


@pytest.mark.slow
def test_what_is_appended_is_small() -> None:
    rows = {row.case: row for row in bench_spool.append(1_000)}
    assert all(row.holds for row in rows.values()), rows
