"""From captures under a grammar to conditional figures, in a world whose distributions are known whole."""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support.allowed import restricted_run
from tests.support.captures import INFO, K, V, capture
from tests.support.pipelines import record_pipeline
from tests.support.records import condition, log_softmax, top
from tests.support.samples import values
from tests.support.served_models import pair, served_models

from hemostat.engines.messages import FREE, UNKNOWN, TapMessage, TapRun
from hemostat.engines.reports import PluginReports
from hemostat.ipc.messages import Capture
from hemostat.measurement.measurements import Measurements
from hemostat.metrics import names
from hemostat.metrics.reasons import Outcome
from hemostat.reference.protocol import FailureReason, ReferenceFailure, ReferenceInfo, ReferenceScores, ScoreRequest
from hemostat.scoring.answer_losses import AnswerLosses
from hemostat.scoring.conditioning import ConditioningFailure, allowed_sets
from hemostat.scoring.consumers import NoiseFloorOffers
from hemostat.scoring.endings import EndingCounts
from hemostat.scoring.intake import CaptureIntake
from hemostat.scoring.limits import Breakers, ShadowQueue, TokenBudget
from hemostat.scoring.reference_call import ReferenceCall
from hemostat.scoring.routing import Router
from hemostat.scoring.scorer import Scorer
from hemostat.scoring.stages import CandidateCompletion, EngineFeatures, ScoringStages
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.records import TokenRecord

NONCE = "nonce"
MASKED = -9999.0
"""What vLLM writes for the log-probability of a masked id."""
KIND = "chat grammar greedy"


class Request:
    """T tokens that the compressed model drew under a grammar."""

    def __init__(self, seed: int, tokens: int = 12, allowed: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        z = 2.0 * rng.normal(size=(tokens, V))
        self.reference, self.compressed = log_softmax(z), log_softmax(z + 0.5 * rng.normal(size=z.shape))
        self.mask = rng.random(z.shape) < allowed
        self.mask[:, :2] = True
        self.mask[0] = True  # before the grammar begins
        self.mask[1] = np.arange(V) == 7  # only one way on
        drawn = np.exp(condition(self.compressed, self.mask))
        self.output = np.array([rng.choice(V, p=row / row.sum()) for row in drawn], np.int32)

    def capture(self, **more: Any) -> Capture:
        """As vLLM answers: the likeliest K after the mask, and the emitted one behind them."""
        masked = condition(self.compressed, self.mask)
        result = top(masked, K, self.output)
        logprobs = np.where((result.ids >= 0) & np.isneginf(result.logprobs), MASKED, result.logprobs)
        made = capture(
            tokens=len(self.output),
            output_token_ids=self.output.astype("<i4").tobytes(),
            candidate_ids=result.ids.astype("<i4").tobytes(),
            candidate_logprobs=logprobs.astype("<f4").tobytes(),
            emitted_logprobs=masked[np.arange(len(self.output)), self.output].astype("<f4").tobytes(),
            kind=KIND,
            grammar=True,
            nonce=NONCE,
        )
        return msgspec.structs.replace(made, **more)

    @property
    def kl(self) -> np.ndarray:
        """KL(r‖c) given the set, by the definition."""
        log_r, log_c = condition(self.reference, self.mask), condition(self.compressed, self.mask)
        with np.errstate(invalid="ignore"):
            return np.where(self.mask, np.exp(log_r) * (log_r - log_c), 0.0).sum(1)


class WorldReference:
    """Knows the reference's distribution. whole: False, it gives only its top ids, and cannot condition them."""

    def __init__(self, request: Request, *, whole: bool = True) -> None:
        self.request = request
        self.whole = whole
        self.asked: list[AllowedSets | None] = []

    async def score(self, request: ScoreRequest) -> ReferenceScores:
        output, ids, allowed = request.output, request.ids, request.allowed
        self.asked.append(allowed)
        if allowed is not None and not self.whole:
            raise ReferenceFailure(FailureReason.GRAMMAR_NEEDS_FULL_VOCABULARY, "lists")
        mask = np.ones((len(output), V), np.bool_) if allowed is None else allowed.mask(slice(0, len(output)))
        log_r = condition(self.request.reference, mask)
        r = np.exp(log_r)
        result = top(log_r, K + 1)
        return ReferenceScores(
            at=np.where(ids >= 0, np.take_along_axis(log_r, np.maximum(ids, 0), 1), np.nan),
            top=replace(result, ids=np.where(np.isneginf(result.logprobs), -1, result.ids)),
            emitted=log_r[np.arange(len(output)), output],
            entropy=-np.where(r > 0, r * np.where(r > 0, log_r, 0.0), 0.0).sum(1),
        )


class Bench:
    """A scorer and a pipeline around it, whose other parts note what they are handed."""

    def __init__(self, request: Request, info: ReferenceInfo = INFO, runs: list[TapRun] | None = None) -> None:
        """runs: what the engine's plugin hands out; default: the masks of the request."""
        self.runs = [restricted_run(NONCE, request.mask)] if runs is None else runs
        self.reference = WorldReference(request, whole=info.full_vocabulary)
        self.measured = Measurements()
        self.noted: dict[str, list[TokenRecord]] = {"alarms": [], "judged": [], "learned": [], "floor": []}
        self.endings = EndingCounts()
        self.served = served_models(pair("m", self.reference, info))
        profiles = SimpleNamespace(
            kinds=SimpleNamespace(update=lambda kind: kind),
            calibrated_profile=lambda _: None,
            catalogue=SimpleNamespace(get=lambda _: None),
            is_held_out=lambda _: True,
            distance_versions=lambda _: (),
            update=lambda scored: self.noted["judged"].append(scored.record),
            learns_from=lambda record: not record.constraint,
            serving=SimpleNamespace(uses=lambda _: True, reported=None),
        )
        consumers: Any = SimpleNamespace(
            measurements=self.measured,
            alarms=SimpleNamespace(update=lambda record, figures: self.noted["alarms"].append(record)),
            engines=None,
            profiles=profiles,
            learner=SimpleNamespace(update=self.noted["learned"].append),
            records=None,
            texts=None,
            evidence=None,
            tracing=None,
        )
        monitor: Any = SimpleNamespace(served=self.served)
        self.known: Any = SimpleNamespace(served=self.served)
        """The served models, as records are read."""
        self.pipeline = record_pipeline(consumers, self.served, monitor=self.known)
        floor: Any = SimpleNamespace(
            samples=list, offer=lambda prompt, record, reference: self.noted["floor"].append(record)
        )
        self.pipeline.users.consumers.append(NoiseFloorOffers(floor))
        self.records: list[TokenRecord] = []
        needs: Any = SimpleNamespace(
            evaluated_profiles=tuple,
            adapters=frozenset,
            anchor_sets=dict,
            needs_hidden_states=lambda unit: True,
        )
        self.engines = PluginReports()
        self.now = 0.0

        def clock() -> float:
            return self.now

        budget = TokenBudget(0.0, 1.0)
        stages = ScoringStages(
            Router(monitor, needs, Breakers(), clock),
            CandidateCompletion(None, budget, clock),
            budget,
            EngineFeatures(needs),
            ReferenceCall(needs, clock),
            lambda prompt, conversation: b"",
            clock,
        )
        intake = CaptureIntake(ShadowQueue(10), self.engines, self.endings, AnswerLosses(), max_tokens=0, clock=clock)
        self.scorer = Scorer(intake, stages, self.endings, emit=self._use, clock=clock)

    def _use(self, record: TokenRecord, capture: Capture) -> None:
        self.records.append(record)
        self.pipeline.update(record, capture)

    async def score(self, *captures: Capture) -> None:
        self.engines.taps.update(TapMessage("boot", self.runs), 0.0)
        task = asyncio.create_task(self.scorer.run(1))
        for item in captures:
            self.scorer.offer(item)
        while self.scorer.pending:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    @property
    def skipped(self) -> dict[str, int]:
        return self.endings.by_reason(Outcome.SKIPPED)


async def test_the_figures_are_the_conditional_ones_and_apart_from_all_others() -> None:
    request = Request(1, tokens=40, allowed=0.06)
    bench = Bench(request)
    await bench.score(request.capture())
    [record] = bench.records
    np.testing.assert_array_equal(record.support, request.mask.sum(1))
    assert record.constraint == "grammar"
    result = bench.measured.conditional.report()
    raw = result["raw"]
    assert raw["kl_nats"]["bound"] == "lower", "one position allows everything"
    # What the lists prove contains the truth; where the whole set is listed both ends are the truth.
    from hemostat_calibration.divergence.per_token import divergence

    bounds = divergence(record, min_ratio=0.0).bounds.kl_rc
    whole = request.mask.sum(1) <= K
    assert (bounds.lower <= request.kl + 1e-5).all()
    assert whole.sum() > 1
    np.testing.assert_allclose(bounds.lower[whole], request.kl[whole], atol=1e-5)
    np.testing.assert_allclose(bounds.upper[whole], request.kl[whole], atol=1e-5)
    assert result["exact_tokens_share"] == pytest.approx(whole.mean())
    [kind] = result["kinds"]
    assert kind["kind"] == KIND
    # Nothing else has seen it but the judge.
    assert {name: len(records) for name, records in bench.noted.items()} == {
        "alarms": 0,
        "judged": 1,
        "learned": 0,
        "floor": 0,
    }
    assert bench.measured.tokens == 0
    assert bench.measured.summary(None)["requests"] == 0
    assert bench.measured.by_kind.report() == []
    series = values(bench.measured.samples())
    assert sum(value for (name, *_), value in series.items() if name == names.KL_TOKENS) == 0


async def test_where_every_allowed_id_is_listed_the_figure_is_the_conditional_kl() -> None:
    """And what ignores the grammar on the reference's side gives another one, by far."""
    request = Request(2, tokens=60, allowed=0.0)
    request.mask[0] = request.mask[2]
    request.output[0] = request.output[2]
    bench = Bench(request)
    await bench.score(request.capture())
    raw = bench.measured.conditional.report()["raw"]["kl_nats"]
    assert raw["bound"] == "exact"
    assert raw["estimate"] == pytest.approx(request.kl.mean(), abs=1e-5)
    ignoring = Bench(request, runs=[restricted_run(NONCE, np.ones_like(request.mask))])
    await ignoring.score(request.capture())
    assert ignoring.records == []
    assert ignoring.skipped == {"grammar_mismatch": 1}


def changed(request: Request, t: int, token: int) -> np.ndarray:
    """The masks, of which one allows an id that it does not, or does not one that it does."""
    mask = request.mask.copy()
    mask[t, token] ^= True
    return mask


async def test_a_set_that_the_answer_contradicts_is_a_mismatch() -> None:
    request = Request(3)
    result = request.capture()
    ids = np.frombuffer(result.candidate_ids, "<i4").reshape(-1, K + 1)
    logprobs = np.frombuffer(result.candidate_logprobs, "<f4").reshape(-1, K + 1)
    listed = next(
        (t, ids[t, j])
        for t in range(2, 12)
        for j in range(K)
        if ids[t, j] != request.output[t] and logprobs[t, j] > MASKED
    )
    impossible = (1, next(int(i) for i, value in zip(ids[1], logprobs[1], strict=True) if i >= 0 and value == MASKED))
    wrong = {
        "an emitted id": changed(request, 4, int(request.output[4])),
        "a listed id": changed(request, *map(int, listed)),
        "a listed id without a probability": changed(request, *impossible),
        # Not even in the list: but then the list would have named it, as it names fewer than K possible ones.
        "an id that is not listed": changed(request, 1, next(i for i in range(V) if i not in ids[1])),
    }
    for what, mask in wrong.items():
        bench = Bench(request, runs=[restricted_run(NONCE, mask)])
        await bench.score(result)
        assert bench.skipped == {"grammar_mismatch": 1}, what
        assert bench.reference.asked == [], what


async def test_what_shows_a_mask_that_nothing_asked_for_is_not_scored() -> None:
    request = Request(4)
    bench = Bench(request)
    await bench.score(request.capture(grammar=False, kind="chat text greedy"))
    assert bench.skipped == {"grammar_unknown": 1}


async def test_nor_where_only_the_plugin_reports_it() -> None:
    """The mask may leave out ids only that the response does not list."""
    result = capture(kind="chat text greedy", nonce=NONCE)
    request = Request(4, tokens=3)
    request.mask[:] = np.arange(V) < V - 1
    bench = Bench(request)
    await bench.score(result)
    assert bench.skipped == {"grammar_unknown": 1}
    free = Bench(request, runs=[TapRun(NONCE, 0, 3, {}, None)])
    await free.score(result)
    assert (free.skipped, free.reference.asked) == ({}, [None])


async def test_a_grammar_that_allows_every_id_restricts_nothing() -> None:
    request = Request(9, tokens=5)
    request.mask[:] = True
    for run in (
        TapRun(NONCE, 0, 5, {}, None),  # vLLM applied no mask
        restricted_run(NONCE, np.ones((5, V), np.bool_)),
        TapRun(NONCE, 0, 5, {}, None, set_rows=np.full(5, FREE, "<i4").tobytes()),
    ):
        bench = Bench(request, runs=[run])
        await bench.score(request.capture())
        [record] = bench.records
        assert record.constraint == "grammar"
        assert record.support is not None
        assert record.support.tolist() == [V] * 5


def test_sets_are_those_of_the_runs_whichever_they_come_in() -> None:
    request = Request(10, tokens=9)
    first, second = restricted_run(NONCE, request.mask[:4]), restricted_run(NONCE, request.mask[4:], 4)
    for runs in (
        [first, second],
        [second, first],
        [restricted_run(NONCE, np.roll(request.mask, 1, axis=1)), first, second],
    ):
        result = allowed_sets(runs, slice(0, 9), V)
        np.testing.assert_array_equal(result.mask(slice(0, 9)), request.mask)
    # The engine may be ahead of the output's end, and only the end may be scored.
    np.testing.assert_array_equal(allowed_sets(runs, slice(3, 7), V).mask(slice(0, 4)), request.mask[3:7])
    same = restricted_run(NONCE, np.repeat(request.mask[2:3], 4, axis=0))
    assert len(allowed_sets([same, first], slice(0, 4), V).table) <= 5


def rows(*places: int) -> bytes:
    return np.array(places, "<i4").tobytes()


ALL = np.ones((3, V), np.bool_)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (restricted_run(NONCE, ALL[:2]), "grammar_not_reported"),
        (TapRun(NONCE, 0, 3, {}, None, set_rows=rows(FREE, UNKNOWN, FREE)), "grammar_not_reported"),
        (restricted_run(NONCE, ALL, set_rows=rows(0, -3, 0), sets=zlib.compress(bytes(4))), "grammar_not_reported"),
        (restricted_run(NONCE, np.ones((3, 40), np.bool_)), "grammar_mismatch"),
        (restricted_run(NONCE, np.zeros((3, V), np.bool_)), "grammar_mismatch"),
        (restricted_run(NONCE, ALL, sets=b"garbage"), "grammar_mismatch"),
        (restricted_run(NONCE, ALL, sets=zlib.compress(bytes(64 << 20))), "grammar_mismatch"),
        (restricted_run(NONCE, ALL, set_rows=rows(0, 1 << 30, 0)), "grammar_too_large"),
    ],
)
def test_what_a_run_cannot_say_is_refused(run: TapRun, reason: str) -> None:
    with pytest.raises(ConditioningFailure) as failure:
        allowed_sets([run], slice(0, 3), V)
    assert failure.value.reason == reason


async def test_a_reference_that_knows_lists_only_or_an_engine_without_the_plugin_skips_with_the_reason() -> None:
    request = Request(5)
    lists = Bench(request, info=replace(INFO, full_vocabulary=False))
    await lists.score(request.capture())
    assert lists.skipped == {"grammar_needs_full_vocabulary": 1}
    without = Bench(request, runs=[])
    await without.score(request.capture(nonce=""))
    lost = Bench(request, runs=[restricted_run(NONCE, request.mask[1:], 1)])
    lost.now = 5.0
    await lost.score(request.capture())
    assert without.skipped == lost.skipped == {"grammar_not_reported": 1}


async def test_one_of_another_model_is_measured_by_itself_and_not_judged() -> None:
    request = Request(7)
    bench = Bench(request)
    [first] = bench.served.pairs
    bench.known.served = served_models(pair("other", bench.reference, INFO), first)
    await bench.score(request.capture())
    assert bench.noted == {"alarms": [], "judged": [], "learned": [], "floor": []}
    assert bench.measured.conditional.tokens == 0, "the figures are of the calibrated model"
    result = bench.pipeline.users.other_models.report("m")
    assert result["raw"]["requests"] == 0
    assert result["conditional"]["raw"]["requests"] == 1
    assert [kind["kind"] for kind in result["conditional"]["kinds"]] == [KIND]
    assert bench.pipeline.users.other_models.report("other")["conditional"]["raw"]["requests"] == 0


@pytest.mark.parametrize("of_another", [False, True])
async def test_a_part_of_an_output_counts_in_no_conditional_mean(of_another: bool) -> None:
    request = Request(8)
    bench = Bench(request)
    await bench.score(request.capture())
    [record] = bench.records
    part = replace(record, position=100, context_tokens=105, conversation=b"part")
    if of_another:
        [first] = bench.served.pairs
        bench.known.served = served_models(pair("other", bench.reference, INFO), first)
    bench.pipeline.update(part, request.capture())
    result = bench.measured.conditional
    assert result.report()["raw"]["requests"] == 1
    assert result.tokens == record.tokens * (1 if of_another else 2)
    assert len(bench.noted["judged"]) == 1
    assert bench.measured.by_place.report() == Measurements().by_place.report()
    assert bench.pipeline.users.other_models.report("m")["conditional"]["raw"]["requests"] == 0
    # Its conversation has no observation yet.
    bench.pipeline.update(replace(part, position=0), request.capture())
    now = bench.pipeline.users.other_models.report("m")["conditional"] if of_another else result.report()
    assert now["raw"]["requests"] == (1 if of_another else 2)
