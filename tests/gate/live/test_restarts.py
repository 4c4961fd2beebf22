"""The evidence outlasts the control process: nothing of it is lost, and no unit counts twice."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.gate_writes import OwnersWrites

from hemostat.gate.live import keeper
from hemostat.gate.live.stored import BLOB_KEY
from hemostat_calibration.gate import live

Worlds = Callable[..., Any]


def shown(gate: Any) -> dict[str, Any]:
    """All that a restart keeps."""
    return {name: value for name, value in gate.report().items() if name != "why"}


async def test_killed_at_random_moments_the_evidence_is_what_it_would_have_been(world: Worlds) -> None:
    """A process is killed before or after a record, or while it is measured. All records are offered to each successor
    again."""
    draw = random.Random(4)
    async with world(FakeVllm(noise=1.0), FakeVllm(noise=0.3)) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", 0.01, 0.02, waive_cycles=False)
        records = [await here.scored() for _ in range(40)]
        for number, scored in enumerate(records):
            here.now += 60.0
            gate.update(scored)
            moment = draw.random()
            if moment < 0.3:  # it waits, or is being measured
                gate = here.process()
                gate.update(scored)
            while gate.waiting:
                await gate.step()
            if moment > 0.7:
                before = shown(gate)
                gate = here.process()
                assert shown(gate) == before
            for earlier in records[: number + 1]:
                gate.update(earlier)
            assert gate.waiting == 0
            assert gate.report()["units"] == number + 1
        killed = gate.report()["questions"]
    async with world(FakeVllm(noise=1.0), FakeVllm(noise=0.3)) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", 0.01, 0.02, waive_cycles=False)
        for _ in range(40):
            here.now += 60.0
            gate.update(await here.scored())
            await gate.step()
        assert gate.report()["questions"] == killed


async def test_a_hundred_faults_lose_nothing_and_count_nothing_twice(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While each of 100 records is measured, something happens at a random moment: the process is killed, another one
    takes over while the first one goes on, the store is read-only for a while, or the candidate is killed. All records
    are offered to whoever goes on again."""
    draw = random.Random(8)
    candidate = FakeVllm(noise=0.3)
    happened: Counter[str] = Counter()
    monkeypatch.setattr(keeper, "RETRY_SECONDS", (0.0,))
    monkeypatch.setattr(live, "RUN", 1000)  # it does not decide
    async with world(FakeVllm(noise=1.0), candidate) as here:
        writes = OwnersWrites(store=here.writes)
        gate = here.process(writes)
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        records: list[Any] = []
        for number in range(100):
            here.now += 60.0
            here.ticks += 60.0
            records.append(await here.scored())
            gate.update(records[-1])
            measuring = asyncio.create_task(gate.step())
            fault = draw.choice(("killed", "failover", "read-only store", "candidate killed"))
            happened[fault] += 1
            here.writes.away = fault == "read-only store"
            await asyncio.sleep(0.02 * draw.random())
            if fault == "killed":
                measuring.cancel()
                await asyncio.gather(measuring, return_exceptions=True)
            elif fault == "candidate killed":
                candidate.status = 503
            if fault in ("killed", "failover"):
                writes.owns = False
                writes = OwnersWrites(store=here.writes)
                before, gate = gate, here.process(writes)
                if fault == "failover":
                    await measuring
                    before.save()
            else:
                await measuring
            here.writes.away, candidate.status = False, None
            gate.save()
            for scored in records:
                gate.update(scored)
                while gate.waiting:
                    await gate.step()
            assert gate.report()["units"] == number + 1, fault
        assert min(happened.values()) > 10
        assert here.process().report() == gate.report()
        assert gate.report()["state"] == "running"


async def test_a_verdict_is_shown_once_the_store_has_it(world: Worlds) -> None:
    async with world(FakeVllm(noise=1.0), FakeVllm(noise=0.3)) as here:
        gate = here.process()
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        here.writes.away = True
        for _ in range(200):
            here.now += 60.0
            gate.update(await here.scored())
            if not gate.waiting:
                break
            await gate.step()
        report = gate.report()
        assert report["state"] == "running"
        assert report["why"] == "the verdict is there, and waits for the store"
        assert here.process().report()["units"] == 0  # a successor knows what is stored
        here.writes.away = False
        gate.save()
        assert gate.report()["state"] == "pass"
        successor = here.process()
        assert successor.report() == gate.report()


async def test_an_upgrade_keeps_the_evidence(world: Worlds) -> None:
    """`stored_1.json` is a gate after five requests, as a version with `SCHEMA` 1 stored it. CANDIDATE is in the place
    of the candidate's address."""
    async with world(FakeVllm(noise=1.0), FakeVllm(noise=0.3)) as here:
        written = Path(__file__).with_name("stored_1.json").read_text()
        here.writes.blobs[BLOB_KEY] = written.replace("CANDIDATE", here.candidate).encode()
        here.now += 300.0
        gate = here.process()
        report = gate.report()
        assert (report["state"], report["units"], report["budget"]["tokens"]) == ("running", 5, 180)
        means = {question["question"]: question["mean"] for question in report["questions"]}
        expected = {"stable_tokens": -0.1967, "own_answers": -0.2016, "bad_answers": 0.0}
        assert means == pytest.approx(expected, abs=1e-4)
        for _ in range(5):
            gate.update(await here.scored())  # the same prompts as then
        assert gate.waiting == 0
        await here.feed(gate, 2)
        assert gate.report()["units"] == 7
        assert here.process().report() == gate.report()


async def test_what_cannot_be_read_is_lost_and_said(world: Worlds, caplog: Any) -> None:
    async with world(FakeVllm(), FakeVllm()) as here:
        here.writes.blobs[BLOB_KEY] = b"{"
        assert here.process().report()["state"] == "none"
        assert "the stored gate cannot be read" in caplog.text


async def test_only_a_candidate_that_the_settings_name_gets_the_key(world: Worlds) -> None:
    """Whoever has the admin token could have it sent to an address of their own."""
    candidate = FakeVllm(api_key="k")
    async with world(FakeVllm(), candidate) as here:
        upstream = {"url": here.stable, "api_key": "k"}
        gate = here.process(upstream=upstream)
        gate.begin(here.candidate, "other", None, None, waive_cycles=False)
        await here.feed(gate, 1)
        assert "401" in gate.report()["why"]
        gate.end()
        named = {"candidate": here.candidate, "own_answers": 1.0}
        gate = here.process(upstream=upstream, gate=named)
        await here.feed(gate, 2)
        assert gate.report()["units"] == 2


async def test_the_settings_begin_a_gate_once(world: Worlds) -> None:
    async with world(FakeVllm(), FakeVllm()) as here:
        named = {"gate": {"candidate": here.candidate, "own_answers": 1.0}}
        gate = here.process(**named)
        await here.feed(gate, 3)
        gate = here.process(**named)
        assert gate.report()["units"] == 3
        gate.end()
        assert here.process(**named).report()["state"] == "none"  # what the operator has ended stays ended
        other = {"gate": {"candidate": f"{here.candidate}#fake", "own_answers": 1.0}}
        assert here.process(**other).report()["state"] == "running"
        gate = here.process()
        assert gate.report()["state"] == "none"
        assert "name no candidate any more" in gate.report()["why"]
