"""The canaries of the control process, against fake engines: when they are asked, what is said, who accepts it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.canary_world import SEQUENCES, control_process, world
from tests.support.fake_vllm import FakeVllm
from tests.support.stores import DirectWrites

from hemostat.canaries import client, variants
from hemostat.canaries.engine import STATES_KEY
from hemostat.canaries.pace import BUDGET_TOKENS, HOUR_SECONDS
from hemostat.canaries.replay import FIRST_SECONDS
from hemostat.canaries.states import MAX_SETS, Sets
from hemostat.engines.messages import RankReport
from hemostat.metrics import names
from hemostat_calibration import canary_cause
from hemostat_calibration.canaries import DAY_REPLAYS, MIN_SEQUENCES, REPLAYS, Canary, CanarySet, Origin

pytestmark = pytest.mark.usefixtures("without_variants", "quick")


async def test_a_set_is_taken_when_engines_have_served_a_while_and_replayed_every_hour(tmp_path: Path) -> None:
    async with world(tmp_path, FakeVllm()) as bench:
        await bench.settle()
        assert bench.asked() == [0]
        assert bench.canaries.report()["detail"] == "no set was taken yet"
        await bench.settle(FIRST_SECONDS)
        assert bench.asked() == [
            2 + SEQUENCES * 5
        ]  # two before the answers, four replays of the baseline, the first one
        await bench.settle(HOUR_SECONDS - 1)
        assert bench.asked() == [0]
        await bench.settle(1)
        assert bench.asked() == [SEQUENCES]
        assert bench.statements() == []
        report = bench.canaries.report()
        assert (report["detail"], report["set"]["sequences"], report["failures"]) == ("", SEQUENCES, {})
        labels = [(bench.names[0], "fake", against, "") for against in ("baseline", "texts")]
        assert bench.sample(names.CANARY_CHANGED) == dict.fromkeys(labels, 0.0)


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
        labels = [(bench.names[0], "fake", against, "") for against in ("baseline", "texts")]
        assert bench.sample(names.CANARY_CHANGED) == dict(zip(labels, (1.0, 0.0), strict=True))
        assert bench.written.events(1)[0]["why"] == text
        fake.noise = 0.0
        await bench.settle(HOUR_SECONDS)
        assert bench.statements() == []
        assert "is as it was" in bench.written.events(1)[0]["why"]


async def test_engines_with_the_plugin_decode_what_the_control_process_has_signed(tmp_path: Path) -> None:
    fake = FakeVllm(plugin=True)
    async with world(tmp_path, fake, prompts="".join(f"prompt {n}\n" for n in range(SEQUENCES))) as bench:

        async def settle(seconds: float) -> None:
            bench.now += seconds
            fake.secret = bench.registry.secrets.current(bench.now)
            await bench.settle()

        await settle(FIRST_SECONDS)
        assert bench.canaries.report()["set"]["decoded"]
        assert bench.statements() == []
        fake.fault = "decoding"
        await settle(HOUR_SECONDS)
        (text,) = bench.statements()
        assert f"{SEQUENCES} of {SEQUENCES} sequences differ" in text
        fake.secret, fake.fault = "0" * 32, ""
        await bench.settle(HOUR_SECONDS)
        (failure,) = bench.canaries.report()["failures"].values()
        assert "does not decode the tokens that it is given" in failure


async def test_texts_as_clients_send_them_are_stated_after_two_replays_at_once_and_until_they_are_as_before(
    tmp_path: Path,
) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake) as bench:
        await bench.settle(FIRST_SECONDS)
        assert bench.sample(names.CANARY_CHANGED)[bench.names[0], "fake", "texts", ""] == 0.0
        fake.chat_template = "Another template."
        await bench.settle(HOUR_SECONDS)
        (text,) = bench.statements()
        assert f"Canaries: {bench.names[0]} (fake) treats clients' texts otherwise, since" in text
        assert f"{SEQUENCES} of {SEQUENCES} texts have other token ids" in text
        assert bench.sample(names.CANARY_CHANGED)[bench.names[0], "fake", "texts", ""] == 1.0
        assert bench.sample(names.CANARY_CHANGED)[bench.names[0], "fake", "baseline", ""] == 0.0
        assert bench.written.events(1)[0]["why"] == text
        async with control_process(bench.again(), bench.now) as later:
            await later.settle()
            assert later.statements() == [text]
            fake.chat_template = ""
            await later.settle(HOUR_SECONDS)
            assert later.statements() == []
            assert "treats clients' texts as it did" in later.written.events(1)[0]["why"]
            assert later.canaries.report()["texts"][bench.names[0]]["since"] is None


async def test_the_baseline_grows_for_a_day_and_not_by_what_is_suspected(tmp_path: Path) -> None:
    fakes = [FakeVllm(), FakeVllm()]
    async with world(tmp_path, *fakes) as bench:
        await bench.settle(FIRST_SECONDS)
        fakes[0].noise = 0.3
        await bench.settle(HOUR_SECONDS)
        fakes[0].noise = 0.0
        assert bench.canaries.report()["set"]["replays"] <= REPLAYS + 2
        for _ in range(DAY_REPLAYS + 2):
            await bench.settle(HOUR_SECONDS)
        assert bench.canaries.report()["set"]["replays"] == REPLAYS + DAY_REPLAYS
        assert bench.statements() == []


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
            bench.registry.update(RankReport(boot, 0, 1, [], 512, {}, "v1", "0.32.0", weights=weights), bench.now)

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
        bench.canaries.states.current[bench.names[0]].pace.update(0)
        bench.canaries.step()
        engine = bench.canaries.states.current[bench.names[0]]
        await asyncio.sleep(0.1)
        assert not engine.idle
        assert bench.asked() == [0]
        bench.outstanding[bench.names[0]] = 0
        await bench.settle()
        assert bench.asked() == [SEQUENCES]

        assert engine.base is not None
        engine.pace.spend(BUDGET_TOKENS)
        engine.base.due = 0.0
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

        def wrong(context: list[int], body: dict[str, Any], **more: bool) -> Any:
            of_adapter = body.get("model") == "summaries"
            return FakeVllm(seed=3).logprobs(context) if of_adapter else plain(context, body, **more)

        fake.row_logprobs = wrong  # type: ignore[method-assign]
        bench.up[bench.names[0]] = False
        await bench.settle(1)
        bench.up[bench.names[0]] = True
        await bench.settle(1)
        (text,) = bench.statements()
        assert "(summaries) has changed" in text


async def test_every_adapter_has_its_turn_where_the_budget_is_not_enough_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = "".join(f"p{n}\n" for n in range(MIN_SEQUENCES))
    async with world(tmp_path, FakeVllm(adapters=("a", "b")), prompts=prompts) as bench:
        await bench.settle(FIRST_SECONDS)
        assert bench.canaries.sets.base is not None
        enough = 5 * bench.canaries.sets.base.tokens  # of the base model's replay and one adapter's baseline
        for budget, asked in ((enough - 1, {"fake"}), (enough, {"fake", "a", "b"})):
            for module in ("pace", "replay"):
                monkeypatch.setattr(f"hemostat.canaries.{module}.BUDGET_TOKENS", budget)
            bench.canaries.accept()
            for _ in range(3):
                await bench.settle(HOUR_SECONDS)
            rows = {row["model"]: row["at"] for row in bench.canaries.report()["engines"]}
            assert rows.keys() == asked
            assert rows["fake"] == bench.now


async def test_a_drained_engine_does_not_keep_the_others_from_another_path(tmp_path: Path) -> None:
    fakes = [FakeVllm(root="/models/a"), FakeVllm(root="/models/a")]
    async with world(tmp_path, *fakes) as bench:
        await bench.settle(FIRST_SECONDS)
        bench.engines.drain(bench.names[0], ends=False)
        fakes[1].root = "/models/b"
        await bench.settle(HOUR_SECONDS)
        await bench.settle(1)
        assert bench.canaries.report()["set"]["root"] == "/models/b"


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
        pace = bench.canaries.states.current[bench.names[1]].pace
        needed = 2 * bench.canaries.sets.base.tokens  # type: ignore[union-attr]
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
        what = f"cause: one engine of several: {bench.names[1]} differs from then, 1 other does not; there weights or "
        assert all(what in text for text in bench.statements())
        assert what in bench.written.events(1)[0]["why"]
        assert {labels for labels, value in bench.sample(names.CANARY_CHANGED).items() if value} == {
            (bench.names[0], "fake", "engines", "one_engine"),
            (bench.names[1], "fake", "baseline", "one_engine"),
            (bench.names[1], "fake", "engines", "one_engine"),
        }
        kept = bench.written.get_blob(STATES_KEY)  # it outlasts the process
        assert b"weights or kernels: all variants" in (kept or b"")
        fakes[1].noise = 0.0
        await bench.settle(HOUR_SECONDS)
        assert bench.statements() == []
        assert all(row["cause"] is None for row in bench.canaries.report()["engines"])
