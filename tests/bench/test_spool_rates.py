"""The rows of `make bench-spool`, small: what is scored later costs a part of what the live path costs, and so on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from tests.bench import bench_spool


async def test_an_outage_of_the_reference_loses_nothing(tmp_path: Path) -> None:
    came, kept, grown = await bench_spool.keep(tmp_path, seconds=300, per_second=20, tokens=2)
    assert kept == came == 6_000
    assert grown <= bench_spool.MAX_GROWN_MIB


def test_captures_are_scored_later_at_several_times_the_rate_of_the_live_path() -> None:
    """Both rates are per second of CPU time of one process. Other processes change the ratio all the same, by the
    caches that they share: `make bench-spool` measures the whole ratio, on a quiet machine."""
    rates = [(asyncio.run(bench_spool.later_rate(256)), asyncio.run(bench_spool.live_rate(128))) for _ in range(3)]
    later, live = np.max(rates, axis=0)
    assert later >= bench_spool.MIN_RATIO / 2 * live


@pytest.mark.slow
def test_what_is_appended_is_small() -> None:
    rows = {row.case: row for row in bench_spool.append(1_000)}
    assert all(row.holds for row in rows.values()), rows
