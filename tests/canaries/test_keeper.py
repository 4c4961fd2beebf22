"""The canaries of the control process, against fake engines: when they are asked, what is said, who accepts it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support.control import settings
from tests.support.fake_vllm import FakeVllm, running
from tests.support.stores import DirectWrites
from tests.support.waiting import until

from hemostat.canaries import client, variants
from hemostat.canaries.engine import STATES_KEY
from hemostat.canaries.keeper import FIRST_SECONDS, RETRY_SECONDS, Canaries
from hemostat.canaries.pace import BUDGET_TOKENS, HOUR_SECONDS
from hemostat.canaries.sets import BLOB_KEY, MAX_SETS, Sets
from hemostat.engines.addresses import EngineAddresses
from hemostat.engines.messages import EngineReport
from hemostat.engines.registry import EngineRegistry
from hemostat.engines.upstreams import UpstreamEngines
from hemostat.ipc.messages import EngineHealth
from hemostat.metrics import names
from hemostat.reference.monitor import ReferenceMonitor
from hemostat.reference.pair import ReferenceState
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ScoreRequest
from hemostat_calibration import canary_cause
from hemostat_calibration.canaries import MIN_SEQUENCES, Canary, CanarySet, Origin
from hemostat_calibration.errors import HemostatError

SEQUENCES = MIN_SEQUENCES


@pytest.fixture(autouse=True)
def without_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set whose text is too short for them: they are many requests."""
    monkeypatch.setattr(canary_cause, "MIN_TEXT", 10_000)


class World:
    """Engines that relays report, and the canaries that are kept of them."""

    def __init__(
        self, fakes: Sequence[FakeVllm], folder: Path, more: dict[str, Any], stored: DirectWrites | None
    ) -> None:
        self.fakes, self._folder, self._more = fakes, folder, more
        self.now = 1000.0
        self.names = [fake.url.removeprefix("http://") for fake in fakes]
        self.up = dict.fromkeys(self.names, True)
        self.outstanding = dict.fromkeys(self.names, 0)
        self.written = stored or DirectWrites()
        made = settings(canaries={"file": folder / "prompts.txt"} | more, upstream={"urls": [f.url for f in fakes]})
        self.upstreams = UpstreamEngines(lambda: [self._health()], self.written)
        self.registry = EngineRegistry()
        self.canaries = Canaries(
            made,
            EngineAddresses(made.upstream, self.registry, lambda: self.names, self.clock, lambda: None),
            self.registry,
            self.upstreams,
            ReferenceMonitor(
                None,
                made,
                compressed_scorer=None,
                scores_fail=lambda _: False,
                refused=lambda: 0.0,
                on_change=lambda: None,
            ),
            self.written,
            active=lambda: True,
            clock=self.clock,
            wall=self.clock,
        )
        blobs = {key: data for key in (BLOB_KEY, STATES_KEY) if (data := self.written.get_blob(key)) is not None}
        self.canaries.restore(blobs)

    def again(self) -> World:
        """The control process after a restart."""
        return World(self.fakes, self._folder, self._more, self.written)

    def clock(self) -> float:
        return self.now

    def _health(self) -> list[EngineHealth]:
        return [
            EngineHealth(name, "up" if self.up[name] else "ejected", False, self.outstanding[name], 0, 0, 0)
            for name in self.names
        ]

    async def settle(self, seconds: float = 0.0) -> None:
        """Time passes, and all that is due then is done."""
        self.now += seconds
        for _ in range(4):  # what is due, what follows at once, and twice more
            await self.canaries.step()
            await until(lambda: all(engine.idle for engine in self.canaries._engines.values()))

    def asked(self) -> list[int]:
        """Replayed sequences by engine, since the last time."""
        counts = [sum("prompt_logprobs" in body for body in fake.requests) for fake in self.fakes]
        for fake in self.fakes:
            fake.requests.clear()
        return counts

    def statements(self) -> list[str]:
        return [text for text, _ in self.canaries.statements()]

    def sample(self, name: str) -> dict[tuple[str, ...], float]:
        return {tuple(exported.labels): exported.value for exported in self.canaries.samples() if exported.name == name}


@asynccontextmanager
async def world(
    folder: Path, *fakes: FakeVllm, stored: DirectWrites | None = None, prompts: str = "", **more: Any
) -> AsyncIterator[World]:
    (folder / "prompts.txt").write_text(prompts or "".join(f"p{n}\n" for n in range(SEQUENCES)))
    async with AsyncExitStack() as stack:
        for fake in fakes:
            await stack.enter_async_context(running(fake))
        async with control_process(World(fakes, folder, more, stored)) as bench:
            yield bench


@asynccontextmanager
async def control_process(bench: World, now: float = 1000.0) -> AsyncIterator[World]:
    bench.now = now
    task = asyncio.create_task(bench.canaries.run())  # reads the prompts; looks at the engines once
    await until(lambda: bench.canaries._prompts is not None or task.done())
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_TOKENS", 4)
    monkeypatch.setattr("hemostat.canaries.keeper.TICK_SECONDS", 3600.0)


async def test_a_set_is_taken_when_engines_have_served_a_while_and_replayed_every_hour(tmp_path: Path) -> None:
    async with world(tmp_path, FakeVllm()) as bench:
        await bench.settle()
        assert bench.asked() == [0]
        assert bench.canaries.report()["detail"] == "no set was taken yet"
        await bench.settle(FIRST_SECONDS)
        assert bench.asked() == [
            1 + SEQUENCES * 5
        ]  # one before the answers, four replays of the baseline, the first one
        await bench.settle(HOUR_SECONDS - 1)
        assert bench.asked() == [0]
        await bench.settle(1)
        assert bench.asked() == [SEQUENCES]
        assert bench.statements() == []
        report = bench.canaries.report()
        assert (report["detail"], report["set"]["sequences"], report["failures"]) == ("", SEQUENCES, {})
        assert bench.sample(names.CANARY_CHANGED) == {(bench.names[0], "fake", "baseline", ""): 0.0}


async def test_another_model_under_the_same_name_is_stated_after_two_replays_and_until_it_is_back(
    tmp_path: Path,
) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        bench.asked()
        fake.noise = 0.3
        await bench.settle(HOUR_SECONDS)
        assert bench.asked() == [2 * SEQUENCES]
        (text,) = bench.statements()
        assert f"Canaries: {bench.names[0]} (fake) has changed, since" in text
        assert f"{SEQUENCES} of {SEQUENCES} sequences differ" in text
        assert bench.sample(names.CANARY_CHANGED) == {(bench.names[0], "fake", "baseline", ""): 1.0}
        assert bench.written.events(1)[0]["why"] == text
        fake.noise = 0.0
        await bench.settle(HOUR_SECONDS)
        assert bench.statements() == []
        assert "is as it was" in bench.written.events(1)[0]["why"]


async def test_one_replay_that_is_far_away_is_no_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        bench.asked()
        fake.noise, seen = 0.3, []
        plain = client.CanaryClient.replay

        async def heal_after(self: client.CanaryClient, canaries: Any) -> Any:
            values = await plain(self, canaries)
            seen.append(values)
            fake.noise = 0.0
            return values

        monkeypatch.setattr(client.CanaryClient, "replay", heal_after)
        await bench.settle(HOUR_SECONDS)
        assert len(seen) == 2
        assert bench.statements() == []
        assert bench.sample(names.CANARY_REPLAYS) == {("equal",): 2.0, ("exceeded",): 1.0, ("failed",): 0.0}


async def test_an_engine_that_comes_back_or_is_started_again_is_asked_at_once(tmp_path: Path) -> None:
    async with world(tmp_path, FakeVllm()) as bench:
        await bench.settle(FIRST_SECONDS)
        bench.asked()
        bench.up[bench.names[0]] = False
        await bench.settle(1)
        assert bench.asked() == [0]
        bench.up[bench.names[0]] = True
        await bench.settle(1)
        assert bench.asked() == [SEQUENCES]

        def report(boot: str, weights: str) -> None:
            bench.registry.report(EngineReport(boot, 0, 1, [], 512, {}, "v1", "0.32.0", weights=weights), bench.now)

        report("a", "1" * 32)
        await bench.settle(1)
        assert bench.asked() == [0]
        bench.now += 60  # the former process is silent
        report("b", "2" * 32)
        await bench.settle()
        assert bench.asked() == [SEQUENCES]


async def test_a_replay_waits_for_low_load_and_for_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path, FakeVllm()) as bench:
        await bench.settle(FIRST_SECONDS)
        bench.asked()
        bench.now += HOUR_SECONDS
        bench.outstanding[bench.names[0]] = 40
        # The average of an hour, in which there was nothing until now, is taken as it was before.
        bench.canaries._engines[bench.names[0]].canaries.pace.look(0)
        await bench.canaries.step()
        engine = bench.canaries._engines[bench.names[0]]
        await asyncio.sleep(0.1)
        assert not engine.idle
        assert bench.asked() == [0]
        bench.outstanding[bench.names[0]] = 0
        await bench.settle()
        assert bench.asked() == [SEQUENCES]

        assert engine.canaries.base is not None
        spent = engine.canaries.pace._spent
        spent.append((bench.now, BUDGET_TOKENS))
        engine.canaries.base.due = 0.0
        await bench.settle()
        assert bench.asked() == [0]
        await bench.settle(HOUR_SECONDS)
        assert bench.asked() == [SEQUENCES]


async def test_the_outlier_engine_is_named_at_its_first_replay_whoever_gets_which_requests(tmp_path: Path) -> None:
    fakes = [FakeVllm(), FakeVllm(), FakeVllm()]
    async with world(tmp_path, *fakes) as bench:
        await bench.settle(FIRST_SECONDS)
        for fake in fakes:
            fake.seed = 7  # all run another model than then
        fakes[1].noise = 0.3
        await bench.settle(HOUR_SECONDS)
        changed = {labels[:3]: value for labels, value in bench.sample(names.CANARY_CHANGED).items() if value}
        assert {(name, "fake", "baseline") for name in bench.names} | {(bench.names[1], "fake", "engines")} == set(
            changed
        )


async def test_what_an_operator_accepts_is_the_new_set(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        fake.noise = 0.3
        await bench.settle(HOUR_SECONDS)
        assert bench.statements()
        bench.canaries.accept()
        assert bench.statements() == []
        await bench.settle()
        await bench.settle(HOUR_SECONDS)
        assert bench.statements() == []
        assert any("accepted by the operator" in event["why"] for event in bench.written.events(9))


async def test_a_path_that_all_engines_announce_makes_a_new_set_and_one_of_a_rolling_update_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fakes = [FakeVllm(root="/models/a"), FakeVllm(root="/models/a")]
    async with world(tmp_path, *fakes) as bench:
        await bench.settle(FIRST_SECONDS)
        fakes[0].root, fakes[0].noise = "/models/b", 0.3
        await bench.settle(HOUR_SECONDS)
        assert bench.canaries.report()["set"]["root"] == "/models/a"
        text = "serves fake from /models/b, the set is of fake from /models/a"
        assert bench.canaries.report()["failures"] == {bench.names[0]: text}
        assert [message for message in caplog.messages if text in message] == [
            f"canaries: {bench.names[0]} {text}: it is not compared until all engines serve the same"
        ]
        fakes[1].root, fakes[1].noise = "/models/b", 0.3
        await bench.settle(HOUR_SECONDS)
        await bench.settle(HOUR_SECONDS)
        assert bench.canaries.report()["set"]["root"] == "/models/b"
        assert bench.statements() == []
        assert bench.canaries.report()["failures"] == {}


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
        assert first.canaries._sets.base is not None
        for module in ("pace", "keeper"):
            monkeypatch.setattr(f"hemostat.canaries.{module}.BUDGET_TOKENS", 2 * first.canaries._sets.base.tokens)
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


async def test_a_replay_that_fails_costs_what_was_sent(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        pace, base = bench.canaries._engines[bench.names[0]].canaries.pace, bench.canaries._sets.base
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
    fake, plain, replaced = FakeVllm(root="/models/a"), client.CanaryClient.replay, []
    async with world(tmp_path, fake) as bench:

        def report(boot: str) -> None:
            bench.now += 60  # the former process is silent
            bench.registry.report(EngineReport(boot, 0, 1, [], 512, {}, "v1", "0.32.0", weights=boot * 32), bench.now)

        async def replace_after(self: client.CanaryClient, canaries: Any) -> Any:
            values = await plain(self, canaries)
            if not replaced:
                replaced.append(what)
                if what == "root":
                    fake.root = "/models/b"
                else:
                    report("2")
            return values

        monkeypatch.setattr(client.CanaryClient, "replay", replace_after)
        bench.now += FIRST_SECONDS
        report("1")
        await bench.settle()
        (text,) = (message for message in caplog.messages if "was changed while the canaries were taken" in message)
        assert {"root": "path: /models/a, now /models/b", "weights": f"{'1' * 32}, now {'2' * 32}"}[what] in text
        assert bench.sample(names.CANARY_REPLAYS)["failed",] == 1.0
        await bench.settle(RETRY_SECONDS)
        taken = bench.canaries.report()["set"]
        assert (taken["root"], taken["weights"]) == (fake.root, "2" * 32 if what == "weights" else "")


async def test_an_adapter_has_a_baseline_of_its_own_so_that_a_wrong_one_after_a_restart_is_seen(
    tmp_path: Path,
) -> None:
    fake = FakeVllm(adapters=("summaries",))
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        await bench.settle(HOUR_SECONDS)
        assert bench.statements() == []
        assert {row["model"] for row in bench.canaries.report()["engines"]} == {"fake", "summaries"}
        plain = fake.row_logprobs

        def wrong(context: list[int], body: dict[str, Any]) -> Any:
            return FakeVllm(seed=3).logprobs(context) if body.get("model") == "summaries" else plain(context, body)

        fake.row_logprobs = wrong  # type: ignore[method-assign]
        bench.up[bench.names[0]] = False
        await bench.settle(1)
        bench.up[bench.names[0]] = True
        await bench.settle(1)
        (text,) = bench.statements()
        assert "(summaries) has changed" in text


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
            http = bench.canaries._engines[bench.names[0]].canaries._server._client
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
        bench.canaries._monitor = SimpleNamespace(served=SimpleNamespace(calibrated=pair))  # type: ignore[assignment]
        await bench.settle(FIRST_SECONDS)
        bench.asked()
        await bench.settle(HOUR_SECONDS)
        assert bench.asked() == [SEQUENCES]
        assert len(asked) == 2
        assert bench.canaries.report()["failures"] == {}


async def test_every_adapter_has_its_turn_where_the_budget_is_not_enough_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = "".join(f"p{n}\n" for n in range(MIN_SEQUENCES))
    async with world(tmp_path, FakeVllm(adapters=("a", "b")), prompts=prompts) as bench:
        await bench.settle(FIRST_SECONDS)
        assert bench.canaries._sets.base is not None
        enough = 5 * bench.canaries._sets.base.tokens  # of the base model's replay and one adapter's baseline
        for budget, asked in ((enough - 1, {"fake"}), (enough, {"fake", "a", "b"})):
            for module in ("pace", "keeper"):
                monkeypatch.setattr(f"hemostat.canaries.{module}.BUDGET_TOKENS", budget)
            bench.canaries.accept()
            for _ in range(3):
                await bench.settle(HOUR_SECONDS)
            rows = {row["model"]: row["at"] for row in bench.canaries.report()["engines"]}
            assert rows.keys() == asked
            assert rows["fake"] == bench.now


async def test_a_set_that_is_forgotten_while_an_adapters_is_taken_is_not_replaced_by_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, FakeVllm(adapters=("a",))) as bench:
        plain, accepted = client.CanaryClient.baseline, []

        async def accept_meanwhile(self: client.CanaryClient, canaries: Sequence[Canary], origin: Origin) -> CanarySet:
            taken = await plain(self, canaries, origin)
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


async def test_a_drained_engine_does_not_keep_the_others_from_another_path(tmp_path: Path) -> None:
    fakes = [FakeVllm(root="/models/a"), FakeVllm(root="/models/a")]
    async with world(tmp_path, *fakes) as bench:
        await bench.settle(FIRST_SECONDS)
        bench.upstreams.drain(bench.names[0], ends=False)
        fakes[1].root = "/models/b"
        await bench.settle(HOUR_SECONDS)
        await bench.settle(1)
        assert bench.canaries.report()["set"]["root"] == "/models/b"


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


def test_sets_of_adapters_that_come_and_go_are_bounded_and_the_base_models_stays() -> None:
    sequences = tuple(Canary("", np.zeros(2, np.int32), np.zeros(2, np.int32)) for _ in range(16))
    sets = Sets(DirectWrites())
    for n in range(MAX_SETS + 10):
        sets.put(CanarySet(sequences, np.zeros((2, 48)), Origin(f"m{n}")))
    assert sets.base is sets.of("m0")
    kept = [n for n in range(MAX_SETS + 10) if sets.of(f"m{n}") is not None]
    assert kept == [0, *range(11, MAX_SETS + 10)]


async def test_without_canaries_nothing_is_asked(tmp_path: Path) -> None:
    async with world(tmp_path, FakeVllm(), enabled=False) as bench:
        await bench.canaries.run()  # returns at once
        assert bench.fakes[0].seen == []
        assert bench.canaries.report()["detail"] == "canaries.enabled is false"


async def test_the_cause_is_looked_for_once_within_the_budget_and_is_in_the_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary_cause, "MIN_TEXT", 256)
    monkeypatch.setattr(canary_cause, "MAX_TEXT", 256)
    fakes = [FakeVllm(plugin=True, hold_after=variants.COMPANION_TOKENS // 2) for _ in range(2)]

    def looked_for() -> list[int]:
        counts = [sum("hemostat_kv_precision" in (body.get("vllm_xargs") or {}) for body in f.requests) for f in fakes]
        bench.asked()
        return counts

    prompts = "".join(f"a prompt, number {n}\n" for n in range(SEQUENCES))
    async with world(tmp_path, *fakes, prompts=prompts) as bench:
        await bench.settle(FIRST_SECONDS)
        assert sorted(looked_for()) == [0, canary_cause.REPLAYS]
        pace = bench.canaries._engines[bench.names[1]].canaries.pace
        needed = 2 * bench.canaries._sets.base.tokens  # type: ignore[union-attr]
        fakes[1].noise = 0.3
        bench.now += HOUR_SECONDS
        pace.spend(BUDGET_TOKENS - needed)
        await bench.settle()
        assert looked_for() == [1, 0]  # of two engines each differs from the other; at one, replays have spent the rest
        texts = bench.statements()
        assert ["cause: nothing" in texts[0], "cause:" in texts[1]] == [True, False]
        row = bench.canaries.report()["engines"][1]
        assert (row["changed"], row["cause"]) == (True, None)
        await bench.settle(HOUR_SECONDS)
        await bench.settle(HOUR_SECONDS)
        assert looked_for() == [0, 1]
        what = f"cause: one engine of several: {bench.names[1]} differs from then, 1 other does not; there weights: all"
        assert all(what in text for text in bench.statements())
        assert what in bench.written.events(1)[0]["why"]
        assert {labels for labels, value in bench.sample(names.CANARY_CHANGED).items() if value} == {
            (bench.names[0], "fake", "engines", "one_engine"),
            (bench.names[1], "fake", "baseline", "one_engine"),
            (bench.names[1], "fake", "engines", "one_engine"),
        }
        assert b"weights: all variants" in (bench.written.get_blob(STATES_KEY) or b"")  # it outlasts the process
        fakes[1].noise = 0.0
        await bench.settle(HOUR_SECONDS)
        assert bench.statements() == []
        assert all(row["cause"] is None for row in bench.canaries.report()["engines"])
