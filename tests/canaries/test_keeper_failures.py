"""The canaries of the control process: engines and a reference that fail, what is stored and cannot be used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.canary_world import SEQUENCES, world
from tests.support.fake_vllm import FakeVllm
from tests.support.stores import DirectWrites

from hemostat.canaries import client
from hemostat.canaries.engine import STATES_KEY
from hemostat.canaries.pace import BUDGET_TOKENS, HOUR_SECONDS
from hemostat.canaries.replay import FIRST_SECONDS
from hemostat.canaries.schedule import RETRY_SECONDS
from hemostat.canaries.states import BLOB_KEY
from hemostat.engines.messages import RankReport
from hemostat.metrics import names
from hemostat.reference.pair import ReferenceState
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ScoreRequest
from hemostat_calibration.canaries import Canary, CanarySet, Origin
from hemostat_calibration.errors import HemostatError

pytestmark = pytest.mark.usefixtures("without_variants", "quick")


async def test_a_replay_that_fails_costs_what_was_sent(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        pace, base = bench.canaries.states.current[bench.names[0]].pace, bench.canaries.sets.base
        assert base is not None
        bench.now += HOUR_SECONDS
        assert pace.left() == BUDGET_TOKENS
        fake.status = 500
        await bench.settle()
        assert BUDGET_TOKENS - pace.left() == base.canaries[0].tokens


@pytest.mark.parametrize("what", ["root", "weights"])
async def test_a_baseline_of_two_models_is_dropped(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake, plain, replaced = FakeVllm(root="/models/a"), client.CanaryClient._replay_beside, []
    async with world(tmp_path, fake) as bench:

        def report(boot: str) -> None:
            bench.now += 60  # the former process is silent
            bench.registry.update(RankReport(boot, 0, 1, [], 512, {}, "v1", "0.32.0", weights=boot * 32), bench.now)

        async def replace_after(self: client.CanaryClient, *canaries: Any, decoded: bool) -> Any:
            values = await plain(self, *canaries, decoded=decoded)
            if not replaced:
                replaced.append(what)
                if what == "root":
                    fake.root = "/models/b"
                else:
                    report("2")
            return values

        monkeypatch.setattr(client.CanaryClient, "_replay_beside", replace_after)
        bench.now += FIRST_SECONDS
        report("1")
        await bench.settle()
        (text,) = (message for message in caplog.messages if "was changed while the canaries were taken" in message)
        assert {"root": "path: /models/a, now /models/b", "weights": f"{'1' * 32}, now {'2' * 32}"}[what] in text
        assert bench.sample(names.CANARY_REPLAYS)["failed",] == 1.0
        await bench.settle(RETRY_SECONDS)
        taken = bench.canaries.report()["set"]
        assert (taken["root"], taken["weights"]) == (fake.root, "2" * 32 if what == "weights" else "")


async def test_an_engine_that_cannot_be_asked_is_counted_and_asked_again_later_and_no_other_waits(
    tmp_path: Path,
) -> None:
    faults: dict[str, tuple[Any, str]] = {
        "status": (500, "answered 500"),
        "max_logprobs": (-1, "greater than max"),
        "last_prompt_logprob": (math.nan, "sent an invalid answer"),
        "short_prompt_logprobs": (True, "sent prompt_logprobs of"),
        "hang": (True, "no answer in time"),
    }
    fakes = [FakeVllm(), FakeVllm()]
    async with world(tmp_path, *fakes) as bench:
        await bench.settle(FIRST_SECONDS)
        for number, (name, (value, text)) in enumerate(faults.items(), 1):
            bench.asked()
            http = bench.canaries.states.current[bench.names[0]]._server._client
            if name == "hang":
                http.timeout = 0.2  # type: ignore[assignment]
            setattr(fakes[0], name, value)
            await bench.settle(HOUR_SECONDS)
            assert text in bench.canaries.report()["failures"][bench.names[0]]
            assert bench.sample(names.CANARY_REPLAYS)["failed",] == number
            assert bench.asked()[1] == SEQUENCES
            assert bench.statements() == []
            setattr(fakes[0], name, getattr(FakeVllm(), name))
            http.timeout = 60.0  # type: ignore[assignment]
            await bench.settle(RETRY_SECONDS)
            assert bench.canaries.report()["failures"] == {}
            assert bench.asked()[0] == SEQUENCES


async def test_no_answers_are_generated_by_an_engine_that_does_not_score(tmp_path: Path) -> None:
    fake = FakeVllm(max_logprobs=-1)
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        await bench.settle(RETRY_SECONDS)
        assert "greater than max" in bench.canaries.report()["failures"][bench.names[0]]
        assert bench.sample(names.CANARY_REPLAYS)["failed",] == 2.0
        assert fake.requests == []  # of those that were answered


async def test_a_fault_of_our_own_is_counted_and_not_repeated_each_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, FakeVllm()) as bench:
        await bench.settle(FIRST_SECONDS)
        bench.asked()

        def fails(*_: Any) -> None:
            raise RuntimeError("no such thing")

        monkeypatch.setattr(CanarySet, "compare", fails)
        await bench.settle(HOUR_SECONDS)
        await bench.settle(1)
        assert bench.asked() == [SEQUENCES]
        assert bench.canaries.report()["failures"] == {bench.names[0]: "no such thing"}
        assert bench.sample(names.CANARY_REPLAYS)["failed",] == 1.0


async def test_a_reference_that_does_not_score_stops_no_replay_and_is_asked_again_in_an_hour(tmp_path: Path) -> None:
    async with world(tmp_path, FakeVllm()) as bench:
        asked = []

        async def score(request: ScoreRequest) -> None:
            asked.append(request)
            raise ReferenceFailure(FailureReason.REFUSED, "too long")

        pair = SimpleNamespace(scorer=SimpleNamespace(score=score), state=ReferenceState.READY)
        bench.canaries.replays._monitor = SimpleNamespace(served=SimpleNamespace(calibrated=pair))  # type: ignore[assignment]
        await bench.settle(FIRST_SECONDS)
        bench.asked()
        await bench.settle(HOUR_SECONDS)
        assert bench.asked() == [SEQUENCES]
        assert len(asked) == 2
        assert bench.canaries.report()["failures"] == {}


async def test_a_set_that_is_forgotten_while_an_adapters_is_taken_is_not_replaced_by_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, FakeVllm(adapters=("a",))) as bench:
        plain, accepted = client.CanaryClient.baseline, []

        async def accept_meanwhile(
            self: client.CanaryClient, canaries: Sequence[Canary], origin: Origin, *, decoded: bool
        ) -> CanarySet:
            taken = await plain(self, canaries, origin, decoded=decoded)
            if self.model == "a" and not accepted:
                bench.canaries.accept()
                accepted.append(taken)
            return taken

        monkeypatch.setattr(client.CanaryClient, "baseline", accept_meanwhile)
        await bench.settle(FIRST_SECONDS)
        await bench.settle(HOUR_SECONDS)
        assert accepted
        assert bench.canaries.report()["set"]["model"] == "fake"
        assert len([event for event in bench.written.events(9) if "new set" in event["why"]]) == 1


async def test_what_cannot_be_used_is_one_line_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hemostat.canaries")
    async with world(tmp_path, FakeVllm()):
        assert caplog.messages == ["canaries: the store has no set; one is taken in 10 minutes"]
    damaged = DirectWrites()
    damaged.put_blob(BLOB_KEY, b"{")
    async with world(tmp_path, FakeVllm(), stored=damaged) as bench:
        assert bench.sample(names.CANARY_REPLAYS)["failed",] == 1.0
        await bench.settle(FIRST_SECONDS)
        assert bench.canaries.report()["set"] is not None
    damaged.put_blob(STATES_KEY, b"{")
    async with world(tmp_path, FakeVllm(), stored=damaged) as bench:
        assert bench.sample(names.CANARY_REPLAYS)["failed",] == 1.0
        assert bench.canaries.report()["set"] is not None
    async with world(tmp_path, FakeVllm(), prompts="too few") as bench:
        assert "1 prompts; give 16 to 100" in bench.canaries.problem
        with pytest.raises(HemostatError, match="there are no canaries"):
            bench.canaries.accept()
    assert all("\n" not in record.getMessage() for record in caplog.records)
