"""Each model against itself: which requests are taken, what the records hold, what a failure costs."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
from tests.support.records import Truth, log_softmax, make_record
from tests.support.world import World

from hemostat.measurement.figures import MODELS
from hemostat.reference.protocol import ReferenceFailure, ReferenceScores, ScoreRequest
from hemostat.scoring.limits import TokenBudget
from hemostat.scoring.noise_floor import MAX_QUEUED_RECORDS, NoiseFloorMeter, self_record
from hemostat_calibration.divergence.per_token import divergence
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import Candidates, TokenRecord

PROMPT = np.array([1, 2], np.int32)


class Again:
    """Says of the tokens what the record's own side said, give or take `noise`; or fails."""

    def __init__(self, record: TokenRecord, model: str, *, fails: Exception | None = None, noise: float = 0.0) -> None:
        self.record = record
        self.model = model
        self.fails = fails
        self.noise = noise
        self.asked: list[bool] = []

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        self.asked.append(request.reshaped)
        if self.fails is not None:
            raise self.fails
        r = self.record
        side, emitted = (
            (r.compressed, r.compressed_emitted) if self.model == "compressed" else (r.reference, r.reference_emitted)
        )
        order = np.argsort(-side.logprobs, axis=1, kind="stable")
        top = Candidates(
            np.take_along_axis(side.ids, order, 1), np.take_along_axis(side.logprobs, order, 1) - self.noise
        )
        at = np.where(side.ids >= 0, side.logprobs - self.noise, np.nan)
        return ReferenceScores(at=at, top=top, emitted=emitted - self.noise)


def record(request_id: str = "r") -> TokenRecord:
    return replace(make_record(World().truth(3), 12), request_id=request_id)


class Bench:
    def __init__(self, given: TokenRecord, fraction: float = 1.0, **fails: Exception) -> None:
        self.found: list[tuple[str, TokenRecord]] = []
        self.by = {model: Again(given, model, fails=fails.get(model)) for model in MODELS}
        self.drawn = itertools.cycle([0.5, 0.01, 0.7, 0.9])
        self.floor = NoiseFloorMeter(
            fraction=fraction,
            draw=lambda: next(self.drawn),
            budget=TokenBudget(0.0, 1.0),
            compressed=self.by["compressed"],
            emit=lambda model, scored: self.found.append((model, scored)),
            clock=lambda: 0.0,
        )

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        return self.floor.outcomes

    async def run(self, *given: TokenRecord) -> None:
        for output in given:
            self.floor.offer(PROMPT, output, self.by["reference"])
        await self.run_until(len(given))

    async def run_until(self, scored: int) -> None:
        """Until so many have been scored again with each model, and nothing else is left to do."""
        task = asyncio.create_task(self.floor.run())
        while sum(self.counts.values()) < len(MODELS) * scored:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_each_model_stands_on_both_sides_of_its_record() -> None:
    bench = Bench(scored := record())
    await bench.run(scored)
    assert [model for model, _ in bench.found] == list(MODELS)
    for _, given in bench.found:
        validate(given)
        np.testing.assert_allclose(divergence(given).kl_rc, 0.0, atol=1e-9)
        np.testing.assert_allclose(divergence(given).tv, 0.0, atol=1e-9)
    assert bench.by["compressed"].asked == [False]
    assert bench.by["reference"].asked == [True]
    np.testing.assert_array_equal(bench.found[1][1].compressed.ids, scored.reference.ids)


async def test_a_token_stands_for_the_tail_where_it_is_known_what_it_was_drawn_from() -> None:
    bench = Bench(scored := record())
    bench.by["compressed"].noise = 0.01
    await bench.run(scored)
    assert all(np.isfinite(divergence(scored).estimate_rc).all() for _, scored in bench.found)
    treated = Bench(scored := replace(scored, applied="a" * 32))
    await treated.run(scored)
    assert all(np.isnan(divergence(scored).estimate_rc).all() for _, scored in treated.found)


def test_the_references_estimate_is_right_on_tokens_that_the_compressed_model_drew() -> None:
    """The exact expectation over every token that could have been emitted, at its probability under c."""
    rng = np.random.default_rng(0)
    z = 1.5 * rng.normal(size=(6, 30))
    r, again, c = (log_softmax(z + scale * rng.normal(size=z.shape)) for scale in (0.0, 0.3, 1.0))
    mean = np.zeros(6)
    for token in range(30):
        emitted = np.full(6, token)
        scored = self_record(make_record(Truth(r, c, emitted), 8), "reference")
        ids = scored.compressed.ids
        at = np.where(ids >= 0, np.take_along_axis(again, np.maximum(ids, 0), 1), np.nan)
        result = validate(
            replace(
                scored,
                reference_at=at,
                reference=make_record(Truth(again, c, emitted), 8).reference,
                reference_emitted=again[:, token],
                reference_entropy=None,
            )
        )
        assert divergence(result).bound == "lower"
        mean += np.exp(c[:, token]) * divergence(result).estimate_cr
    np.testing.assert_allclose(mean, (np.exp(r) * (r - again)).sum(1), rtol=1e-6)


async def test_a_failure_of_one_model_does_not_keep_the_other() -> None:
    bench = Bench(record(), compressed=ReferenceFailure("busy", "no"), reference=RuntimeError("bug"))
    await bench.run(record())
    assert bench.counts == {("compressed", "busy"): 1, ("reference", "internal_error"): 1}
    assert not bench.found


async def test_a_floor_is_failing_while_no_attempt_succeeds() -> None:
    bench = Bench(scored := record(), reference=RuntimeError("bug"))
    await bench.run(scored, scored)
    assert bench.floor.failing == {}, "it may pass"
    bench.floor.outcomes.clear()
    await bench.run(scored)
    assert bench.floor.failing == {"reference": "RuntimeError; see the log"}
    bench.by["reference"].fails = ReferenceFailure("busy", "the server answered 503")
    bench.floor.outcomes.clear()
    await bench.run(scored)
    assert bench.floor.failing == {"reference": "the server answered 503"}
    bench.by["reference"].fails = None
    bench.floor.outcomes.clear()
    await bench.run(scored)
    assert bench.floor.failing == {}


async def test_what_does_not_fit_is_counted_and_a_fraction_is_a_fraction() -> None:
    bench = Bench(record())
    for n in range(MAX_QUEUED_RECORDS + 3):
        bench.floor.offer(PROMPT, record(str(n)), bench.by["reference"])
    assert bench.counts == {(model, "busy"): 3 for model in MODELS}
    never = Bench(record(), fraction=0.0)
    some = Bench(record(), fraction=0.02)
    for _ in range(20):
        never.floor.offer(PROMPT, record("always the same"), some.by["reference"])
        some.floor.offer(PROMPT, record("always the same"), some.by["reference"])
    await never.run_until(0)
    assert not never.counts
    await some.run_until(5)
    assert some.counts == {(model, "scored"): 5 for model in MODELS}, "as drawn, whatever a request is called"
