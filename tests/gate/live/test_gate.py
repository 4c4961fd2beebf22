"""The live gate against fake vLLM servers: the verdicts, and what it says on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.support.fake_vllm import FakeVllm

from hemostat.gate.live import keeper
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import HemostatError

Worlds = Callable[..., Any]
DAY = {"evidence": {"cycle_hours": 24.0}}


async def test_a_candidate_nearer_to_the_reference_passes_and_the_reverse_fails(world: Worlds) -> None:
    far, near = FakeVllm(noise=1.0), FakeVllm(noise=0.3)
    async with world(far, near) as here:
        gate = here.process()
        assert gate.report()["state"] == "none"
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        assert gate.report()["why"] == "no request has been compared yet"
        await here.feed(gate, 300)
        report = gate.report()
        assert report["state"] == "pass", report
        assert {finding["question"] for finding in report["questions"]} == {
            "stable_tokens",
            "own_answers",
            "bad_answers",
        }
        assert report["budget"]["tokens"] > 0
        assert report["identity"]["model"] == "fake"
        assert "pass: after" in here.events[-1]
    async with world(near, far) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        await here.feed(gate, 300)
        report = gate.report()
        assert report["state"] == "fail", report
        assert "farther from the reference than the model that serves" in report["why"]
        assert gate.problem() is not None


async def test_the_same_model_passes_and_another_one_fails(world: Worlds) -> None:
    for noise, state in ((0.0, "pass"), (1.0, "fail")):
        async with world(FakeVllm(), FakeVllm(noise=noise)) as here:
            gate = here.process()
            gate.begin(here.candidate, "same", None, None, waive_cycles=False)
            await here.feed(gate, 400)
            assert gate.report()["state"] == state, gate.report()


async def test_a_verdict_waits_for_two_cycles_or_says_that_they_were_waived(world: Worlds) -> None:
    async with world(FakeVllm(noise=1.0), FakeVllm(noise=0.3), settings=DAY) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        await here.feed(gate, 450, so_far="pass")
        report = gate.report()
        assert (report["state"], report["so_far"], report["waived"]) == ("running", "pass", [])
        assert "waits for whole cycles of the traffic" in report["why"]
        assert report["cycles"]["seconds_needed"] == 48 * 3600.0
        await here.feed(gate, 100, seconds=3600.0)
        assert gate.report()["state"] == "pass"

        gate.end()
        gate.begin(here.candidate, "other", None, None, waive_cycles=True)
        await here.feed(gate, 450)
        report = gate.report()
        assert report["state"] == "pass"
        assert report["waived"]
        assert "Waived: two cycles of the traffic" in report["why"]


async def test_records_are_taken_evenly_over_the_cycles(world: Worlds) -> None:
    async with world(FakeVllm(), FakeVllm(), settings=DAY) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        await here.feed(gate, 20, seconds=1.0)
        assert gate.report()["units"] == 2  # 20,000 of them last for 96 hours


async def test_only_what_both_models_do_by_themselves_is_compared(world: Worlds) -> None:
    async with world(FakeVllm(), FakeVllm()) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        for changed in ({"applied": "0" * 32}, {"adapter": "1" * 32}):
            gate.update(await here.scored(**changed))
        assert gate.waiting == 0
        scored = await here.scored()
        gate.update(replace(scored, fresh=False))
        assert gate.waiting == 0
        gate.update(scored)
        gate.update(scored)
        assert gate.waiting == 1
        assert "control arm" in gate.report()["compared"]


async def test_one_gate_at_a_time_and_the_same_one_goes_on(world: Worlds) -> None:
    async with world(FakeVllm(), FakeVllm()) as here:
        gate = here.process()
        with pytest.raises(HemostatError, match="there is no gate"):
            gate.end()
        with pytest.raises(HemostatError, match="is not an http address"):
            gate.begin("nowhere", "other", None, None, waive_cycles=False)
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        await here.feed(gate, 3)
        gate.begin(f"{here.candidate}/", "other", None, None, waive_cycles=False)
        assert gate.report()["units"] == 3
        with pytest.raises(HemostatError, match="has other margins"):
            gate.begin(here.candidate, "other", 0.2, None, waive_cycles=False)
        with pytest.raises(HemostatError, match="is running; end it first"):
            gate.begin("http://127.0.0.1:1", "other", None, None, waive_cycles=False)
        gate.end()
        assert gate.report()["state"] == "none"


async def test_a_gate_that_does_not_decide_ends_undecided(world: Worlds) -> None:
    async with world(FakeVllm(), FakeVllm()) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        await here.feed(gate, 3)
        gate.after_break(TimeBreak(here.now + 1e7, 1e7, anew=True))  # the clock was set
        here.now += 1e7
        await here.feed(gate, 1)
        assert gate.report()["state"] == "running"
        here.now += keeper.MAX_DAYS * 86_400.0
        await here.feed(gate, 1)
        report = gate.report()
        assert report["state"] == "undecided"
        assert "14 days did not decide it; after 4 requests, not shown to be within the margin yet" in report["why"]


async def test_other_models_end_the_gate(world: Worlds) -> None:
    async with world(FakeVllm(), FakeVllm()) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        gate.forget("the stored evidence is about other models")
        report = gate.report()
        assert report["state"] == "undecided"
        assert "other models" in report["why"]
