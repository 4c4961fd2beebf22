"""Canaries spend no alpha over the lives of the control process: each replay errs by itself, in a stored budget."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.canary_world import SEQUENCES, control_process, world
from tests.support.fake_vllm import FakeVllm
from tests.support.stores import DirectWrites
from tests.support.waiting import until

from hemostat.canaries.engine import BASELINE, Reading
from hemostat.canaries.pace import BUDGET_TOKENS, HOUR_SECONDS
from hemostat.canaries.replay import FIRST_SECONDS
from hemostat_calibration.canaries import MAX_TOKENS, REPLAYS_PER_YEAR, Comparison

FAR, NEAR = (Comparison(np.full(16, nats), np.full(16, 0.1), 13) for nats in (0.5, 0.01))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_a_process_that_ends_states_what_one_that_goes_on_states(replays: list[tuple[bool, bool]]) -> None:
    """Each replay: it is too far by chance; the process ends after it. A restart neither makes a statement likelier
    nor forgets that a replay was too far: no number of tests is lost or given twice."""
    goes_on, ends, number = Reading(), Reading(), 0
    for at, (far, restarts) in enumerate(replays):
        number += 1
        goes_on.number, ends.number = at + 1, number
        for reading in (goes_on, ends):
            reading.judge(BASELINE, FAR if far else NEAR, [reading.number], float(at))
        assert ends.since == goes_on.since
        assert (not ends.since) or replays[at - 1][0], "two in a row"
        if restarts:
            ends, number = ends.to_store() if ends.suspected else Reading(), 0


def test_the_budget_allows_two_replays_of_the_largest_set_an_hour() -> None:
    """The error rate of a year is of so many replays."""
    assert BUDGET_TOKENS // MAX_TOKENS * 24 * 365 == REPLAYS_PER_YEAR


@pytest.mark.usefixtures("without_variants", "quick")
async def test_nothing_is_asked_before_what_it_costs_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed meanwhile, again and again, asks no more than the budget."""
    async with world(tmp_path, FakeVllm()) as first:
        await first.settle(FIRST_SECONDS)
        first.asked()
        assert first.canaries.sets.base is not None
        for module in ("pace", "replay"):
            monkeypatch.setattr(f"hemostat.canaries.{module}.BUDGET_TOKENS", first.canaries.sets.base.tokens)
        first.now += HOUR_SECONDS
        with monkeypatch.context() as away:
            away.setattr(DirectWrites, "has_written", lambda *_: False)
            first.canaries.step()
            await until(lambda: first.canaries.states.current[first.names[0]].pace.left() == 0)
            await asyncio.sleep(0.1)
            assert first.asked() == [0], "the store is away"
            killed = first.again()
            for engine in first.canaries.states.current.values():
                assert engine.task is not None
                engine.task.cancel()
        async with control_process(killed, first.now + 60.0) as bench:
            await bench.settle()
            assert bench.asked() == [0], "what may have been asked counts"
            await bench.settle(HOUR_SECONDS)
            assert bench.asked() == [SEQUENCES]
