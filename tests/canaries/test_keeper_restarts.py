"""What outlasts the control process of its canaries: sets, statements, load and budget."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.canary_world import SEQUENCES, control_process, world
from tests.support.fake_vllm import FakeVllm

from hemostat.canaries.pace import HOUR_SECONDS
from hemostat.canaries.replay import FIRST_SECONDS

pytestmark = pytest.mark.usefixtures("without_variants", "quick")


async def test_a_set_outlasts_the_process_and_other_prompts_replace_it(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        written = bench.written
    fake.noise = 0.3
    async with world(tmp_path, fake, stored=written) as bench:
        await bench.settle()
        assert len(bench.statements()) == 1
    async with world(tmp_path, fake, stored=written, prompts="".join(f"q{n}\n" for n in range(SEQUENCES))) as bench:
        await bench.settle()
        await bench.settle(HOUR_SECONDS)
        assert bench.statements() == []


async def test_a_restart_loop_of_the_control_process_replays_no_more_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, FakeVllm()) as first:
        await first.settle(FIRST_SECONDS)
        first.asked()
        assert first.canaries.sets.base is not None
        for module in ("pace", "replay"):
            monkeypatch.setattr(f"hemostat.canaries.{module}.BUDGET_TOKENS", 2 * first.canaries.sets.base.tokens)
        asked = []
        for minute in (1, 2, 3, 61):
            async with control_process(first.again(), first.now + 60 * minute) as bench:
                await bench.settle()
                asked += bench.asked()
        # Beside the one before, which is an hour ago at last.
        assert asked == [SEQUENCES, 0, 0, SEQUENCES]


async def test_a_restart_of_the_control_process_neither_ends_a_statement_nor_forgets_the_load(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as first:
        await first.settle(FIRST_SECONDS)
        fake.noise = 0.3
        await first.settle(HOUR_SECONDS)
        (before,) = first.statements()
        first.asked()
        second = first.again()
        second.outstanding[second.names[0]] = 40
        async with control_process(second, first.now + 1) as bench:
            assert bench.statements() == [before]
            await asyncio.sleep(0.1)
            assert bench.asked() == [0]  # until the load is low again
            fake.noise, bench.outstanding[bench.names[0]] = 0.0, 0
            await bench.settle()
            assert bench.asked() == [SEQUENCES]
            assert bench.statements() == []
