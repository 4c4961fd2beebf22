"""Canaries behind a prefix that is in the engine's prefix cache, in the control process and against fake engines."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from tests.support.canary_world import World, world
from tests.support.fake_vllm import FakeVllm

from hemostat.canaries import client, texts
from hemostat.canaries.engine import STATES_KEY, Reading
from hemostat.canaries.pace import BUDGET_TOKENS, HOUR_SECONDS
from hemostat.canaries.replay import FIRST_SECONDS
from hemostat.canaries.states import BLOB_KEY
from hemostat.metrics import names
from hemostat.scored_record import ScoredRecord
from hemostat_calibration.canaries import MAX_TOKENS, MIN_SEQUENCES, REPLAYS, SCHEMA, Canary
from hemostat_calibration.canary_prefix import (
    ANSWER,
    BLOCK,
    MAX_LENGTHS,
    MAX_PREFIX,
    MIN_PREFIX,
    PromptLengths,
    cost,
    prefix_sequences,
)

pytestmark = pytest.mark.usefixtures("without_variants")

PROMPTS = "".join(f"{n} the prompt with the number {n} of all, {'abc' * 12}\n" for n in range(MIN_SEQUENCES))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_TOKENS", 20)
    monkeypatch.setattr(texts, "FREE_TEXTS", 0)
    monkeypatch.setattr("hemostat.canaries.keeper.TICK_SECONDS", 3600.0)


def engine(**more: object) -> FakeVllm:
    fake = FakeVllm(plugin=True, prefix_caching=True)
    for name, value in more.items():
        setattr(fake, name, value)
    return fake


async def begun(bench: World) -> None:
    """Takes all sets, and replays them once."""
    await bench.settle(FIRST_SECONDS)
    await bench.settle(HOUR_SECONDS)


def changed(bench: World) -> list[float]:
    return [value for key, value in bench.sample(names.CANARY_CHANGED).items() if key[2] == "prefix"]


async def test_answers_are_decoded_behind_a_prefix_that_one_request_has_computed(tmp_path: Path) -> None:
    fake = engine()
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:
        await begun(bench)
        taken = bench.canaries.sets.prefix
        assert taken is not None
        assert taken.baseline.shape[1] == MIN_SEQUENCES * ANSWER
        fake.requests.clear()
        await bench.settle(HOUR_SECONDS)
        behind = [body for body in fake.requests if len(body["prompt"]) >= MIN_PREFIX]
        first, *others = behind
        assert (len(first["prompt"]), first["max_tokens"]) == (taken.canaries[0].cached, 1)
        assert {tuple(body["prompt"][: len(first["prompt"])]) for body in others} == {tuple(first["prompt"])}
        assert {body["cache_salt"] for body in behind} == {first["cache_salt"]}
        assert [body["vllm_xargs"]["hemostat_force"] for body in others] == [
            canary.answer.tolist() for canary in taken.canaries
        ]
        assert not any("prompt_logprobs" in body for body in behind), "they would not read the cache"
        assert bench.statements() == []
        assert changed(bench) == [0.0]
        report = bench.canaries.report()["prefix"][bench.names[0]]
        assert (report["since"], report["tokens"]) == (None, len(first["prompt"]))
        assert report["detail"].startswith("0 of 16 sequences differ")


async def test_a_fault_of_the_prefix_cache_alone_is_stated_and_ends(tmp_path: Path) -> None:
    fake = engine()
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:
        await begun(bench)
        fake.fault = "prefix"
        await bench.settle(HOUR_SECONDS)
        (statement,) = bench.statements()
        assert "has changed behind a prefix that is in its prefix cache, since" in statement
        assert "16 of 16 sequences differ" in statement
        assert changed(bench) == [1.0]
        again = bench.again()
        stored = again.canaries.states.stored_state(bench.names[0]).prefix
        assert stored.since
        fake.fault = ""
        await bench.settle(HOUR_SECONDS)
        assert bench.statements() == []


async def test_the_baseline_grows_for_a_day_and_a_replay_waits_for_the_budget(tmp_path: Path) -> None:
    fake = engine()
    async with world(tmp_path, fake, prompts=PROMPTS) as bench:
        await begun(bench)
        await bench.settle(HOUR_SECONDS)
        taken = bench.canaries.sets.prefix
        assert taken is not None
        assert len(taken.baseline) > REPLAYS
        its = bench.canaries.states.current[bench.names[0]]
        base = bench.canaries.sets.base
        assert base is not None
        bench.now += HOUR_SECONDS
        its.pace.spend(its.pace.left() - base.tokens - cost(taken.canaries) + 1)
        number = its.prefix.number
        await bench.settle()
        assert its.prefix.number == number


@pytest.mark.parametrize("more", [{"plugin": False}, {"prefix_caching": False}, {"max_model_len": 130}])
async def test_an_engine_without_the_plugin_or_a_cache_or_room_has_none(
    tmp_path: Path, more: dict[str, object]
) -> None:
    async with world(tmp_path, engine(**more), prompts=PROMPTS) as bench:
        await begun(bench)
        assert bench.canaries.sets.base is not None
        assert bench.canaries.sets.prefix is None
        assert bench.canaries.report()["prefix"] == {}
        assert changed(bench) == []


async def test_the_prefix_is_as_long_as_long_prompts_of_the_traffic(tmp_path: Path) -> None:
    async with world(tmp_path, engine(), prompts=PROMPTS) as bench:
        for length in [10] * 89 + [700] * 11:
            scored = SimpleNamespace(capture=SimpleNamespace(prompt_token_ids=[0] * length))
            bench.canaries.update(cast(ScoredRecord, scored))
        await begun(bench)
        taken = bench.canaries.sets.prefix
        assert taken is not None
        assert taken.canaries[0].cached == 768


async def test_what_an_earlier_version_stored_is_read(tmp_path: Path) -> None:
    async with world(tmp_path, engine(), prompts=PROMPTS) as bench:
        await begun(bench)
        stored = {key: json.loads(bench.written.get_blob(key) or b"") for key in (BLOB_KEY, STATES_KEY)}
        assert stored[BLOB_KEY]["state"].pop("prefix")
        assert [state.pop("prefix") for state in stored[STATES_KEY]["state"]["engines"].values()]
        for key, each in stored.items():
            bench.written.put_blob(key, json.dumps(each | {"schema": SCHEMA - 1}).encode())
        again = bench.again()
        assert again.canaries.sets.base is not None
        assert again.canaries.sets.prefix is None
        assert again.canaries.states.stored_state(bench.names[0]).prefix == Reading()


def canaries(tokens: int) -> list[Canary]:
    return [Canary("chat", np.arange(tokens, dtype=np.int32), np.arange(40, dtype=np.int32))] * 50


@pytest.mark.parametrize(
    ("length", "max_model_len", "cached"),
    [
        (0, 0, MIN_PREFIX),
        (513, 0, MIN_PREFIX + BLOCK),
        (9999, 0, MAX_PREFIX),
        (9999, 1000, 896),
        (0, 158, BLOCK),
        (0, 157, None),
    ],
)
def test_the_prefix_has_whole_blocks_within_its_bounds(length: int, max_model_len: int, cached: int | None) -> None:
    made = prefix_sequences(canaries(30), length, max_model_len)
    assert (made[0].cached if made else None) == cached
    assert all(len(canary.prompt) + len(canary.answer) < (max_model_len or 9999) for canary in made)


def test_two_replays_of_the_longest_and_one_of_the_largest_set_are_within_the_budget() -> None:
    assert 2 * cost(prefix_sequences(canaries(30), MAX_PREFIX)) + MAX_TOKENS <= BUDGET_TOKENS


def test_lengths_are_those_of_the_last_prompts() -> None:
    lengths = PromptLengths()
    assert lengths.get() == 0
    for length in [5000] * 200 + [100] * MAX_LENGTHS:
        lengths.update(length)
    assert lengths.get() == 100
