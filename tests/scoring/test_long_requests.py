"""Long requests: within the token budget, scored at their last tokens, and with their thinking found."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.captures import K, V, capture, record_of

from hemostat.engines.taps import TapResult
from hemostat.scoring.limits import TokenBudget
from hemostat.scoring.record_builder import align_features
from hemostat_calibration.reasoning import Markers, Thinking
from hemostat_calibration.records import Features, TokenRecord
from hemostat_calibration.statistics.split import prompt_key

VERSION = "a" * 32
SEPARATE = Markers(start=((20,),), end=((21,),))


def built(output: list[int], max_scored: int | None, markers: Markers | None = None) -> TokenRecord:
    """The record of an output with these ids, after a prompt of five tokens."""
    ids = np.tile(np.arange(K + 1, dtype="<i4"), (len(output), 1))
    logprobs = np.tile(np.log([0.5, 0.2, 0.1, 0.05, 0.01]).astype("<f4"), (len(output), 1))
    ids[:, K] = [token if token >= K else -1 for token in output]
    logprobs[ids < 0] = -np.inf
    emitted = [logprobs[n, list(row).index(token)] for n, (row, token) in enumerate(zip(ids, output, strict=True))]
    made = capture(
        tokens=len(output),
        output_token_ids=np.array(output, "<i4").tobytes(),
        candidate_ids=ids.tobytes(),
        candidate_logprobs=logprobs.tobytes(),
        emitted_logprobs=np.array(emitted, "<f4").tobytes(),
    )
    return record_of(made, max_scored=max_scored, markers=markers)


@given(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 80)))
def test_of_a_long_output_the_last_tokens_are_scored_behind_all_that_is_before_them(
    tokens: int, max_scored: int | None
) -> None:
    output = np.arange(tokens, dtype="<i4") % V
    record = built(output.tolist(), max_scored)
    scored = tokens if max_scored is None else min(tokens, max_scored)
    assert (record.tokens, record.position, record.context_tokens) == (scored, tokens - scored, 5 + tokens - scored)
    assert record.output_ids.tolist() == output[tokens - scored :].tolist()
    assert len(record.compressed.ids) == len(record.compressed.logprobs) == len(record.compressed_emitted) == scored


def test_a_record_says_what_was_left_out() -> None:
    record = built([0] * 10, max_scored=4)
    assert (record.tokens, record.position, record.context_tokens, record.partial) == (4, 6, 11, True)
    assert record.prompt_key == prompt_key(np.arange(5, dtype=np.int32)), "the unit is the same as of the whole"
    whole = built([0] * 10, max_scored=None)
    assert (whole.tokens, whole.position, whole.context_tokens, whole.partial) == (10, 0, 5, False)


def test_the_engines_numbers_are_those_of_the_scored_positions() -> None:
    features = Features("0" * 32, np.arange(20, dtype=np.float32).reshape(10, 2))
    result = align_features(features, 6, 4, {"0" * 32: np.array([1, 2])})
    assert result.values.tolist() == features.values[6:].tolist()
    assert np.isnan(align_features(features, 8, 4, {"0" * 32: np.array([1, 2])}).values[2:]).all(), (
        "those that are missing"
    )
    tap = TapResult("boot", None, False, {VERSION: np.arange(10.0)})
    record = record_of(capture(tokens=10), tap, max_scored=4)
    assert record.shifts[VERSION].log_normalizer.tolist() == [6.0, 7.0, 8.0, 9.0]


@pytest.mark.parametrize(
    ("output", "thinking"),
    [
        ([20, 1, 2, 21, 3, 0], Thinking(0, 4, True)),
        ([20, 1, 2, 3, 0, 0], Thinking(0, 6, False)),
        ([1, 2, 3, 0, 0, 0], None),
    ],
)
@pytest.mark.parametrize("max_scored", [None, 3, 1])
def test_thinking_is_found_in_the_whole_output_however_little_of_it_is_scored(
    output: list[int], thinking: Thinking | None, max_scored: int | None
) -> None:
    assert built(output, max_scored, SEPARATE).thinking == thinking
    assert built(output, max_scored).thinking is None, "the markers are not known"


async def test_a_request_larger_than_the_budgets_burst_is_not_passed_by_small_ones_for_ever() -> None:
    """Small requests that keep coming would keep the bucket from filling up."""
    budget = TokenBudget(rate=100_000.0, burst=1000.0)
    loop = asyncio.get_running_loop()
    order: list[str] = []

    async def ask(name: str, tokens: int) -> None:
        await budget.take(tokens, loop.time)
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(ask("first", 900))
        group.create_task(ask("large", 32_000))
        for n in range(50):
            group.create_task(ask(f"small {n}", 50))
    assert order == ["first", "large", *(f"small {n}" for n in range(50))]


async def test_who_gives_up_waiting_for_the_budget_lets_the_next_one_go_on() -> None:
    budget = TokenBudget(rate=1000.0, burst=10.0)
    loop = asyncio.get_running_loop()
    await budget.take(10, loop.time)
    waiting = asyncio.create_task(budget.take(10_000, loop.time))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.wait_for(budget.take(1, loop.time), 30)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=20), st.floats(1.0, 1e5))
def test_no_request_waits_for_ever(requests: list[int], rate: float) -> None:
    """The wait is bounded by what was spent before: also for a request that is larger than the burst."""
    budget = TokenBudget(rate=rate, burst=max(rate * 10.0, 1.0))
    now, before = 0.0, 0
    for tokens in requests:
        delay = budget.delay(tokens, now)
        assert delay <= before / rate + 1e-6
        now += delay
        budget.spend(tokens, now)
        before += tokens
