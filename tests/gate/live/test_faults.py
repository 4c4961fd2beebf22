"""A candidate that is down, slow or wrong costs nobody anything, and the gate says what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from tests.support.fake_vllm import FakeVllm

from hemostat.gate.live import keeper
from hemostat.gate.live.candidate import Candidate
from hemostat.reference.protocol import FailureReason, ReferenceFailure

Worlds = Callable[..., Any]


async def running(here: Any) -> Any:
    gate = here.process()
    gate.begin(here.candidate, "other", None, None, waive_cycles=False)
    return gate


async def test_a_candidate_that_is_not_there_is_said_and_asked_again(world: Worlds) -> None:
    async with world(FakeVllm(), FakeVllm(noise=0.01)) as here:
        gate = here.process()
        gate.begin("http://127.0.0.1:1", "other", None, None, waive_cycles=False)
        await here.feed(gate, 5)
        report = gate.report()
        assert (report["state"], report["units"]) == ("running", 0)
        assert report["why"].startswith("the candidate does not answer: ")
        assert gate.problem() is not None
        assert sum("does not answer" in event for event in here.events) == 1


async def test_what_a_candidate_had_when_it_died_counts_once_it_is_back(
    world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(*_: object) -> NoReturn:
        raise ReferenceFailure(FailureReason.DOWN, "the connection was reset")

    async with world(FakeVllm(), FakeVllm()) as here:
        gate = await running(here)
        await here.feed(gate, 3)
        with monkeypatch.context() as patch:
            patch.setattr(Candidate, "scores", dies)
            await here.feed(gate, 1)
        assert gate.report()["units"] == 3
        await here.feed(gate, 1)
        report = gate.report()
        assert report["units"] == 5
        assert any("could not be reached any more" in note for note in report["notes"])
        assert "answers again" in here.events[-1]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 500}, "answered 500"),
        ({"returns_token_ids": False}, "sent no token_ids"),
        ({"short_prompt_logprobs": True}, "sent prompt_logprobs of 62 of 63 tokens"),
    ],
)
async def test_a_candidate_that_fails_every_request_fails_with_the_sentence(
    world: Worlds, fault: dict[str, Any], said: str
) -> None:
    candidate = FakeVllm()
    async with world(FakeVllm(), candidate) as here:
        gate = await running(here)
        await here.feed(gate, 3)
        for name, value in fault.items():
            setattr(candidate, name, value)
        await here.feed(gate, 40)
        report = gate.report()
        assert report["state"] == "fail", report
        assert report["why"].startswith("the candidate failed 20 requests in a row: "), report
        assert said in report["why"], report


async def test_a_candidate_that_hangs_has_failed(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "ANSWER_SECONDS", 0.02)
    monkeypatch.setattr("hemostat.reference.server.CONNECT_SECONDS", 0.02)
    candidate = FakeVllm()
    async with world(FakeVllm(), candidate) as here:
        gate = await running(here)
        candidate.hang = True
        await here.feed(gate, keeper.MAX_IN_A_ROW + 2, seconds=100.0)
        report = gate.report()
        assert report["state"] == "fail", report
        assert "the candidate failed 20 requests in a row: " in report["why"]
        assert "no answer in time" in report["why"]


async def test_another_candidate_behind_the_same_address_is_undecided(world: Worlds) -> None:
    candidate = FakeVllm()
    async with world(FakeVllm(), candidate) as here:
        gate = await running(here)
        await here.feed(gate, 3)
        candidate.noise = 2.0
        await here.feed(gate, 1, seconds=400.0)
        report = gate.report()
        assert report["state"] == "undecided"
        assert "another candidate answers behind the same address" in report["why"]
        assert report["units"] == 3


async def test_a_verdict_is_taken_back_if_another_candidate_or_model_is_there_by_now(world: Worlds) -> None:
    """A canary controller would roll the other candidate out on the verdict about the first one."""
    candidate = FakeVllm(noise=0.3)
    async with world(FakeVllm(noise=1.0), candidate) as here:
        gate = await running(here)
        await here.feed(gate, 300)
        await gate.look()
        assert gate.report()["state"] == "pass"
        candidate.status = 503
        await gate.look()
        assert gate.report()["state"] == "pass"
        candidate.status, candidate.noise = None, 2.0
        await gate.look()
        report = gate.report()
        assert report["state"] == "undecided"
        assert "another candidate answers behind the same address" in report["why"]


@pytest.mark.parametrize(("fault", "said"), [({"chat_template": "Be brief."}, "chat template")])
async def test_another_chat_template_fails_at_once(world: Worlds, fault: dict[str, Any], said: str) -> None:
    async with world(FakeVllm(), FakeVllm(**fault)) as here:
        gate = await running(here)
        await here.feed(gate, 1)
        report = gate.report()
        assert report["state"] == "fail"
        assert said in report["why"]


async def test_the_candidate_gets_no_more_tokens_than_its_budget(world: Worlds) -> None:
    candidate = FakeVllm()
    more = {"gate": {"tokens_per_hour": 1_000, "own_answers": 1.0}}
    async with world(FakeVllm(), candidate, settings=more) as here:
        gate = await running(here)
        measured = 0
        for _ in range(8):
            gate.update(await here.scored())
            try:
                async with asyncio.timeout(1.0):
                    await gate.step()
                measured += 1
            except TimeoutError:
                break
        assert 1 <= measured < 8  # a tenth of an hour's tokens is saved up at most
        assert gate.report()["budget"]["tokens"] <= 100 + 40


async def test_a_process_that_does_not_own_the_store_asks_nothing(world: Worlds) -> None:
    candidate = FakeVllm()
    async with world(FakeVllm(), candidate) as here:
        gate = await running(here)
        here.active = False
        await here.feed(gate, 3)
        assert candidate.seen == []


async def test_a_bug_costs_one_record(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(FakeVllm(), FakeVllm()) as here:
        gate = await running(here)
        await here.feed(gate, 1)
        with monkeypatch.context() as patch:
            patch.setattr(keeper.report, "of_verdict", None)
            patch.setattr(keeper.LiveGate, "update", None)
            await here.feed(gate, 1)
        await here.feed(gate, 1)
        report = gate.report()
        assert report["units"] == 2
        assert report["failures"] == {"internal_error": 1}
