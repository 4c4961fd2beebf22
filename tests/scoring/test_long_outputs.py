"""Long requests in the scorer: what is scored of them, how long that may take, and what is stated of the rest."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from tests.support.captures import INFO, capture
from tests.support.scorer_bench import Bench, running

from hemostat.scoring import reference_call
from hemostat_calibration.divergence.places import by_context

pytestmark = pytest.mark.usefixtures("quick_scorer")


async def test_only_the_last_tokens_of_a_long_output_are_scored_and_the_rest_is_stated() -> None:
    made = Bench(max_scored=4)
    async with running(made):
        assert await made.ends(capture(tokens=10, kind="chat"), capture("s", tokens=3, kind="chat")) == {
            ("scored", ""): 2
        }
    assert made.reference.asked == [15, 8], "the reference reads all of it"
    assert [(record.tokens, record.position) for record in made.records] == [(4, 6), (3, 0)]
    result = made.coverage.report()
    assert result["scored_share"] == {"tokens": 7 / 13, "requests": 1.0}
    assert [(row["reason"], row["tokens"], row["requests"]) for row in result["not_scored"]] == [
        ("outside_suffix", 6, 0.0)
    ]


async def test_a_long_request_may_take_longer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length counts in the time that it may take: a slow reference has not failed."""
    monkeypatch.setattr(reference_call, "MAX_SCORE_SECONDS", 0.0)
    monkeypatch.setattr(reference_call, "MIN_TOKENS_PER_SECOND", 1e-3)
    assert await bench.ends(capture(tokens=3)) == {("scored", ""): 1}
    monkeypatch.setattr(reference_call, "MIN_TOKENS_PER_SECOND", 1e6)
    bench.reference.hang = True
    assert await bench.ends(capture(tokens=3)) == {("dropped", "reference_timeout"): 1}


async def test_every_ending_is_in_the_coverage(bench: Bench) -> None:
    bench.info = None
    await bench.ends(capture(tokens=3, kind="chat"))
    bench.info = INFO
    await bench.ends(capture(tokens=5, kind="chat"), capture(model="unknown", tokens=7, kind="chat"))
    result = bench.coverage.report()
    assert result["by_outcome"]["scored"]["tokens"] == 5
    assert {(row["outcome"], row["reason"], row["tokens"]) for row in result["not_scored"]} == {
        ("dropped", "reference_not_ready", 3),
        ("skipped", "unknown_model", 7),
    }


async def test_a_prompt_of_40_000_tokens_is_scored_within_a_budget_of_a_tenth_of_it() -> None:
    made = Bench(rate=400_000.0, burst=4_000.0, max_scored=64)
    prompt = np.zeros(40_000, "<i4")
    async with running(made):
        endings = asyncio.create_task(
            made.ends(
                capture("long", tokens=300, prompt_token_ids=prompt.tobytes(), kind="chat"),
                *(capture(f"short {n}", tokens=3, kind="chat") for n in range(20)),
            )
        )
        # The debt of the long one is paid before the others go on: time has to pass for them.
        while not endings.done():
            await asyncio.sleep(0.002)
            made.now += 0.01
        assert await endings == {("scored", ""): 21}
    assert made.reference.asked[0] == 40_300
    [long] = [record for record in made.records if record.context_tokens > 1_000]
    assert (long.tokens, long.position, long.context_tokens) == (64, 236, 40_236)
    assert list(by_context(long)) == ["32768-131071"]
    assert made.now >= (40_300 - 4_000) / 400_000
