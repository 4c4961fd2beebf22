"""Short canaries of the control process, against fake engines: a fault is stated within a minute."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tests.support.canary_world import World, control_process, world
from tests.support.fake_vllm import FakeVllm

from hemostat.canaries import client, short, texts
from hemostat.canaries.engine import STATES_KEY
from hemostat.canaries.replay import FIRST_SECONDS
from hemostat.canaries.short import FAILED_SECONDS, SHORT_SECONDS, ShortCanaries
from hemostat.canaries.states import BLOB_KEY
from hemostat.metrics import names
from hemostat_calibration.canaries import MIN_SEQUENCES, REPLAYS, SCHEMA
from hemostat_calibration.canary_short import HOUR_SECONDS, SHORT_ROUNDS, WHOLE_REPLAYS, ShortState

pytestmark = pytest.mark.usefixtures("without_variants")

PROMPTS = "".join(f"the prompt with the number {n} of all\n" for n in range(MIN_SEQUENCES))


@pytest.fixture(autouse=True)
def without_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they are asked for; the hourly replays are not."""
    monkeypatch.setattr(client, "ANSWER_TOKENS", 10)
    monkeypatch.setattr(texts, "FREE_TEXTS", 0)
    monkeypatch.setattr("hemostat.canaries.keeper.TICK_SECONDS", 3600.0)


async def begun(bench: World) -> None:
    """Takes both sets."""
    await bench.settle(FIRST_SECONDS)
    await bench.settle(SHORT_SECONDS)
    taken = bench.canaries.sets.short
    assert taken is not None
    assert len(taken.baseline) == SHORT_ROUNDS * REPLAYS
    bench.asked()


def changed(bench: World) -> dict[tuple[str, ...], float]:
    return {key: value for key, value in bench.sample(names.CANARY_CHANGED).items() if key[2] == "short"}


async def test_one_short_sequence_is_asked_for_every_ten_seconds_whatever_the_load(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:
        await begun(bench)
        bench.outstanding[bench.names[0]] = 500
        lengths = []
        for _ in range(MIN_SEQUENCES):
            await bench.settle(SHORT_SECONDS)
            (body,) = [body for body in fake.requests if "prompt_logprobs" in body]
            lengths.append(len(body["prompt"]) + body["max_tokens"])
            assert bench.asked() == [1]
        assert max(lengths) <= 20
        assert bench.statements() == []
        assert bench.canaries.report()["short"][bench.names[0]]["detail"] == "no sequence was suspicious"
        assert set(changed(bench).values()) == {0.0}


async def test_a_fault_is_stated_at_once_and_until_a_pass_shows_that_it_is_over(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:
        await begun(bench)
        fake.noise = 0.3
        await bench.settle(SHORT_SECONDS)
        (text, *_) = (text for text in bench.statements() if "short sequences" in text)
        assert f"{MIN_SEQUENCES} of {MIN_SEQUENCES} sequences differ" in text
        assert set(changed(bench).values()) == {1.0}
        # The sequence, again, all of them; then the whole set, which the statement makes due.
        assert bench.asked()[0] >= 2 + 2 * MIN_SEQUENCES
        fake.noise = 0.0
        for _ in range(2 * MIN_SEQUENCES):
            await bench.settle(SHORT_SECONDS)
        assert [text for text in bench.statements() if "short sequences" in text] == []
        assert any("is as it was, in short sequences" in event["why"] for event in bench.written.events(9))


async def test_whole_replays_are_limited_by_the_hour_also_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:
        await begun(bench)
        # Each sequence is suspicious, and no whole replay shows anything.
        monkeypatch.setattr(short.ShortWatch, "suspects", lambda *_: True)
        for _ in range(WHOLE_REPLAYS):
            await bench.settle(SHORT_SECONDS)
            assert bench.asked() == [2 + MIN_SEQUENCES]
        await bench.settle(SHORT_SECONDS)
        assert bench.asked() == [2]
        async with control_process(bench.again(), bench.now) as again:
            await again.settle()  # the whole set, once
            again.asked()
            for _ in range(3):
                await again.settle(SHORT_SECONDS)
                assert again.asked() == [2]
            await again.settle(HOUR_SECONDS)
            await again.settle(SHORT_SECONDS)
            assert again.asked()[0] >= 2 + MIN_SEQUENCES
            assert again.statements() == []


async def test_the_baseline_grows_by_a_pass_an_hour_while_nothing_is_wrong(tmp_path: Path) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:
        await begun(bench)
        for wait in (0.0, HOUR_SECONDS, 0.0):
            await bench.settle(wait)
            for _ in range(MIN_SEQUENCES):
                await bench.settle(SHORT_SECONDS)
        taken = bench.canaries.sets.short
        assert taken is not None
        assert len(taken.baseline) == SHORT_ROUNDS * REPLAYS + 1
        # The rows are of an engine that computes the same: a pass is put together in the order of the sequences.
        np.testing.assert_allclose(taken.baseline[-1], taken.baseline[0])


async def test_an_engine_that_fails_is_left_alone_for_a_while(tmp_path: Path) -> None:
    fake = FakeVllm(plugin=True)
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:

        async def settle(seconds: float) -> None:
            bench.now += seconds
            fake.secret = bench.registry.secrets.current(bench.now)
            await bench.settle()

        await settle(FIRST_SECONDS)
        await settle(SHORT_SECONDS)
        taken = bench.canaries.sets.short
        assert taken is not None
        assert taken.decoded
        bench.asked()
        fake.status = 500
        await settle(SHORT_SECONDS)
        fake.status = None
        bench.asked()
        await settle(SHORT_SECONDS)
        assert bench.asked() == [0]
        await settle(FAILED_SECONDS)
        assert bench.asked() == [1]
        assert bench.statements() == []


async def test_what_an_earlier_version_stored_is_read(tmp_path: Path) -> None:
    async with world(tmp_path, FakeVllm(), prompts=PROMPTS) as bench:
        await begun(bench)
        stored = {key: json.loads(bench.written.get_blob(key) or b"") for key in (BLOB_KEY, STATES_KEY)}
        assert stored[BLOB_KEY]["state"].pop("short")
        assert [state.pop("short") for state in stored[STATES_KEY]["state"]["engines"].values()]
        for key, each in stored.items():
            bench.written.put_blob(key, json.dumps(each | {"schema": SCHEMA - 1}).encode())
        again = bench.again()
        assert again.canaries.sets.base is not None
        assert again.canaries.sets.short is None
        assert again.canaries.states.stored_state(bench.names[0]).short == ShortState()


async def test_no_baseline_is_taken_of_an_engine_that_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVllm()
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:
        with monkeypatch.context() as earlier:  # a version that had none
            earlier.setattr(short, "SHORT_SECONDS", math.inf)
            await bench.engines.end_parts(ShortCanaries)
            await bench.settle(FIRST_SECONDS)
        assert bench.canaries.sets.base is not None
        fake.noise = 0.3
        async with control_process(bench.again(), bench.now) as again:
            for _ in range(3):
                await again.settle(SHORT_SECONDS)
            assert again.canaries.sets.short is None
            fake.noise = 0.0
            await again.settle(HOUR_SECONDS)
            await again.settle(SHORT_SECONDS)
            assert again.canaries.sets.short is not None
