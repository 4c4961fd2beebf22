"""Whatever goes wrong ends one capture, under its reason, and the loops go on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from tests.support.captures import INFO, K, V, capture
from tests.support.grammars import no_conditioning
from tests.support.served_models import pair, served_models
from tests.support.waiting import until

from hemostat.engines.messages import AnswerMessage, TapAnswer, TapMessage, TapRun
from hemostat.engines.registry import EngineRegistry
from hemostat.ipc.messages import Capture
from hemostat.measurement.coverage import Coverage
from hemostat.reference.pair import ServedModels
from hemostat.reference.protocol import NO_CODES, CompressedLogits, ReferenceFailure, ReferenceInfo, ReferenceScores
from hemostat.shadow import record_builder
from hemostat.shadow import scorer as scorer_module
from hemostat.shadow.endings import EndingCounts
from hemostat.shadow.limits import Breakers, ShadowQueue, TokenBudget
from hemostat.shadow.scorer import Scorer
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.arrays import Ids
from hemostat_calibration.divergence.places import by_context
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import CalibrationProfile, temperature_bias
from hemostat_calibration.profiles.transform import anchors, anchors_digest
from hemostat_calibration.reasoning import Markers
from hemostat_calibration.records import Arm, Candidates, Features, RecoveredDivergence, TokenRecord
from hemostat_calibration.statistics.split import prompt_key

D = 6
VERSION = "a" * 32


@dataclass
class FakeReference:
    """Says that every id is equally likely; does first what `before` says."""

    before: Callable[[], object] = lambda: None
    hang: bool = False
    asked: list[int] = field(default_factory=list)
    adapters_asked: list[str] = field(default_factory=list)
    codes: list[Mapping[str, Any]] = field(default_factory=list)
    compressed: list[CompressedLogits | None] = field(default_factory=list)
    recovered: RecoveredDivergence | None = None
    going_on: int = 0
    most: int = 0

    async def start(self) -> ReferenceInfo:
        return INFO

    async def score(
        self,
        prompt: Ids,
        output: Ids,
        ids: Ids,
        profiles: tuple[CalibrationProfile, ...] = (),
        codes: Mapping[str, Any] = NO_CODES,
        hidden: bool = False,
        adapter: str = "",
        allowed: AllowedSets | None = None,
        compressed: CompressedLogits | None = None,
    ) -> ReferenceScores:
        self.asked.append(len(prompt) + len(output))
        self.adapters_asked.append(adapter)
        self.codes.append(codes)
        self.compressed.append(compressed)
        self.going_on += 1
        self.most = max(self.most, self.going_on)
        try:
            self.before()
            await asyncio.sleep(3600 if self.hang else 0)
        finally:
            self.going_on -= 1
        tokens = len(output)
        flat = -np.log(V)
        top = Candidates(np.tile(np.arange(3, dtype=np.int32), (tokens, 1)), np.full((tokens, 3), flat))
        return ReferenceScores(
            at=np.where(ids >= 0, flat, np.nan),
            top=top,
            emitted=np.full(tokens, flat),
            entropy=np.full(tokens, -flat),
            expected_shift={p.version: np.full(tokens, 0.125) for p in profiles},
            hidden=np.ones((tokens, D), np.float32) if hidden else None,
            recovered=None if compressed is None else self.recovered,
        )

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        return []

    async def tokenize(self, text: str) -> list[int]:
        return []

    async def close(self) -> None:
        return


class Bench:
    """A scorer whose surroundings a test sets: it implements `ScoringNeeds` and `ServedModelsSource`."""

    def __init__(
        self,
        *,
        max_queue: int = 100,
        rate: float = 0.0,
        burst: float | None = None,
        by_request: bool = False,
        max_scored: int | None = None,
    ) -> None:
        self.now = 0.0
        self.coverage = Coverage(kinds=4)
        self.endings = EndingCounts(self.coverage.ended)
        self.markers: Markers | None = None
        self.records: list[TokenRecord] = []
        self.reference = FakeReference()
        self.engines = EngineRegistry()
        self.breakers = Breakers()
        self.breaker = self.breakers.of("m")
        self.breaker.threshold, self.breaker.cooldown = 2, 10.0
        self.info: ReferenceInfo | None = INFO
        self.sinks_fail = False
        self.profiles: tuple[CalibrationProfile, ...] = ()
        self.learning = b""
        self.maps: dict[str, bool] = {}
        self.conditioning = no_conditioning()
        self.scorer = Scorer(
            self,
            self.engines,
            self,
            queue=ShadowQueue(max_queue),
            budget=TokenBudget(rate, max(rate, 1.0) if burst is None else burst),
            breakers=self.breakers,
            endings=self.endings,
            emit=self._sink,
            clock=lambda: self.now,
            conditioning=self.conditioning,
            profile_in_request=by_request,
            max_scored=max_scored,
            max_tokens=40,
        )

    @property
    def served(self) -> ServedModels:
        return served_models(replace(pair("m", self.reference, self.info, {"sql"}, {"sql"}), markers=self.markers))

    def evaluated_profiles(self) -> tuple[CalibrationProfile, ...]:
        return self.profiles

    def adapter_maps(self) -> dict[str, bool]:
        return self.maps

    def anchor_sets(self) -> dict[str, Ids]:
        return {anchors_digest(i): i for p in self.profiles if (i := anchors(p)) is not None}

    def needs_hidden_states(self, unit: bytes) -> bool:
        return unit == self.learning

    @property
    def counts(self) -> Counter[tuple[str, str]]:
        return Counter({s.labels: int(s.value) for s in self.endings.samples()})  # type: ignore[misc]

    def _sink(self, record: TokenRecord, _: Capture) -> None:
        if self.sinks_fail:
            raise RuntimeError("a bug")
        self.records.append(record)

    def handed(self, nonce: str, features: Features) -> None:
        """As though the engine had handed out these features, and all else of the 3 positions."""
        self.tap(nonce, 0, 3, None)
        take = self.engines.taps.take
        self.engines.taps.take = lambda *n: replace(take(*n), features=features)  # type: ignore[method-assign, type-var]

    def tap(self, nonce: str, start: int, tokens: int, applied: str | None, value: float | None = 0.25) -> None:
        run = TapRun(nonce, start, tokens, {VERSION: [value] * tokens}, applied)
        self.engines.taps.add(TapMessage("boot", [run]), self.now)

    async def ends(self, *captures: Capture) -> Counter[tuple[str, str]]:
        """What these captures came to; every one comes to something."""
        before = self.counts
        for one in captures:
            self.scorer.offer(one)
        await until(lambda: self.counts.total() - before.total() >= len(captures) and self.scorer.pending == 0)
        return self.counts - before


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "TAP_POLL_SECONDS", 0.002)
    monkeypatch.setattr(scorer_module, "MAX_SCORE_SECONDS", 0.4)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    async with running(made):
        yield made


class running:
    def __init__(self, bench: Bench, workers: int = 2) -> None:
        self.bench, self.workers = bench, workers

    async def __aenter__(self) -> Bench:
        self.task = asyncio.create_task(self.bench.scorer.run(self.workers))
        return self.bench

    async def __aexit__(self, *_: object) -> None:
        assert not self.task.done(), "the loops are alive to the end"
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


SCORED = Counter({("scored", ""): 1})


async def alive(bench: Bench) -> None:
    bench.reference.before, bench.reference.hang, bench.sinks_fail, bench.info = lambda: None, False, False, INFO
    assert await bench.ends(capture()) == SCORED


async def test_a_record_holds_what_all_three_said(bench: Bench) -> None:
    more = {"arm": "treated", "requested": VERSION, "nonce": "n", "temperature": 0.7, "min_p": 0.1}
    bench.tap("n", 0, 3, VERSION)
    assert await bench.ends(capture("mine", **more)) == SCORED
    (record,) = bench.records
    assert (record.request_id, record.label, record.model, record.arm) == ("mine", "gold", "m", Arm.TREATED)
    assert (record.requested, record.applied, record.engine_boot) == (VERSION, VERSION, "boot")
    assert (record.reference_model, record.reference_dtype, record.vocab_size) == ("digest", "float32", V)
    assert (record.sampling.temperature, record.sampling.min_p) == (0.7, 0.1)
    np.testing.assert_allclose(record.shifts[VERSION].log_normalizer, 0.25)
    np.testing.assert_allclose(record.compressed_emitted, np.log(0.5), atol=1e-6)
    np.testing.assert_allclose(record.reference_emitted, -np.log(V))
    assert bench.scorer.reference_tokens == 8


async def test_a_full_queue_drops_and_says_so() -> None:
    bench = Bench(max_queue=2)
    for _ in range(5):
        bench.scorer.offer(capture())
    assert bench.counts == Counter({("dropped", "queue_full"): 3})
    assert bench.scorer.pending == 2
    async with running(bench):
        await until(lambda: bench.counts["scored", ""] == 2)


async def test_a_failing_reference_opens_the_breaker_and_one_trial_closes_it(bench: Bench) -> None:
    def down() -> None:
        raise ReferenceFailure("down", "gone")

    bench.reference.before = down
    for _ in range(2):
        assert await bench.ends(capture()) == Counter({("dropped", "reference_down"): 1})
    asked = len(bench.reference.asked)
    assert await bench.ends(capture(), capture()) == Counter({("dropped", "breaker_open"): 2})
    assert len(bench.reference.asked) == asked, "it is left in peace"
    bench.now = 11.0
    assert await bench.ends(capture()) == Counter({("dropped", "reference_down"): 1})
    assert await bench.ends(capture()) == Counter({("dropped", "breaker_open"): 1})
    bench.now = 22.0
    await alive(bench)
    await alive(bench)


async def test_a_trial_that_fails_inside_does_not_keep_the_breaker_half_open(bench: Bench) -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    bench.breaker.failed(0.0)
    bench.breaker.failed(0.0)
    bench.now = 11.0
    bench.reference.before = bug
    assert await bench.ends(capture()) == Counter({("dropped", "internal_error"): 1})
    await alive(bench)


async def test_a_reference_that_hangs_is_a_timeout(bench: Bench) -> None:
    bench.reference.hang = True
    assert await bench.ends(capture()) == Counter({("dropped", "reference_timeout"): 1})
    assert bench.reference.going_on == 0, "what is given up is ended"
    await alive(bench)


async def test_what_is_too_long_for_the_reference_says_nothing_of_its_health(bench: Bench) -> None:
    def too_long() -> None:
        raise ReferenceFailure("too_long", "8 tokens")

    bench.breaker.failed(0.0)
    bench.reference.before = too_long
    assert await bench.ends(*[capture()] * 3) == Counter({("skipped", "reference_too_long"): 3})
    bench.breaker.failed(0.0)
    assert not bench.breaker.allow(0.0), "the failure before still counts"


async def test_an_adapter_is_scored_with_the_adapter_and_one_that_has_gone_is_skipped(bench: Bench) -> None:
    assert await bench.ends(capture(model="sql"), capture()) == Counter({("scored", ""): 2})
    assert sorted(bench.reference.adapters_asked) == ["", "sql"]
    assert sorted(record.model for record in bench.records) == ["m", "sql"]

    def gone() -> None:
        raise ReferenceFailure("no_adapter", "sql does not exist")

    bench.reference.before = gone
    ended = await bench.ends(*[capture(model="sql")] * 3)
    assert ended == Counter({("skipped", "reference_no_adapter"): 3}), "it says nothing of the reference's health"
    await alive(bench)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"candidate_ids": b"123"}, "invalid_shape"),
        ({"emitted_logprobs": b""}, "invalid_shape"),
        ({"output_token_ids": b"", "candidate_ids": b"", "candidate_logprobs": b"", "emitted_logprobs": b""}, "empty"),
        ({"prompt_token_ids": b""}, "invalid_empty"),
        ({"prompt_token_ids": np.array([V], "<i4").tobytes()}, "invalid_ids"),
        ({"output_token_ids": np.array([-1, 0, 0], "<i4").tobytes()}, "invalid_ids"),
        ({"candidate_ids": np.full((3, K + 1), V, "<i4").tobytes()}, "invalid_ids"),
        ({"candidate_logprobs": np.zeros((3, K + 1), "<f4").tobytes()}, "invalid_range"),
        ({"emitted_logprobs": np.full(3, np.nan, "<f4").tobytes()}, "invalid_nan"),
        ({"model": "an-adapter"}, "unknown_model"),
    ],
)
async def test_captures_that_make_no_record_are_skipped(bench: Bench, damage: dict[str, object], reason: str) -> None:
    reason = "invalid_empty" if reason == "empty" else reason
    assert await bench.ends(capture(**damage)) == Counter({("skipped", reason): 1})
    if reason in {"invalid_ids", "unknown_model", "invalid_shape"}:
        assert bench.reference.asked == [], "an id of another vocabulary could end the reference"
    await alive(bench)


def listed(ids: list[int], *values: float) -> dict[str, object]:
    """A capture's list in which the first of the three rows is this."""
    found, logprobs = capture().candidate_ids, capture().candidate_logprobs
    rows = np.frombuffer(found, "<i4").reshape(3, K + 1).copy(), np.frombuffer(logprobs, "<f4").reshape(3, K + 1).copy()
    rows[0][0, : len(ids)], rows[1][0, : len(values)] = ids, values
    return {"candidate_ids": rows[0].tobytes(), "candidate_logprobs": rows[1].tobytes()}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (listed([0, 1, 2, 3], np.log(0.5), np.nan, -3.0, -4.0), "nan"),
        (listed([0, 1, 2, 3], 0.1, -2.0, -3.0, -4.0), "range"),
        (listed([0, 1, 2, 3], np.log(0.5), -4.0, -3.0, -2.0), "order"),
        (listed([0, 1, 0, 3], np.log(0.5), -1.6, -2.3, -3.0), "repeated"),
        (listed([0, 1, 2, 3], np.log(0.5), np.log(0.5), np.log(0.5), -4.0), "mass"),
        (listed([0, -1, -1, -1], np.log(0.5), -np.inf, -np.inf, -np.inf), "short"),
        (listed([0, 1, 2, 3], np.log(0.4), -1.6, -2.3, -3.0), "emitted"),
        ({"top_k": K + 1}, "shape"),
    ],
)
async def test_a_list_that_cannot_be_is_counted_by_reason_and_enters_nothing(
    bench: Bench, damage: dict[str, object], reason: str
) -> None:
    assert await bench.ends(capture(**damage)) == Counter({("skipped", f"invalid_{reason}"): 1})
    assert bench.records == []
    await alive(bench)


async def test_a_bug_behind_the_scorer_ends_one_capture(bench: Bench) -> None:
    bench.sinks_fail = True
    assert await bench.ends(capture(), capture()) == Counter({("dropped", "internal_error"): 2})
    await alive(bench)


async def test_a_reference_not_known_yet_is_not_asked(bench: Bench) -> None:
    bench.info = None
    assert await bench.ends(capture()) == Counter({("dropped", "reference_not_ready"): 1})
    assert bench.reference.asked == []


# --- responses without token ids -------------------------------------------------------------------------------------


def answer_of(nonce: str, choice: int, choices: int, tokens: int) -> TapAnswer:
    """The tokens of `capture()`, as the engine's plugin hands them out."""
    made = capture(tokens=tokens)
    return TapAnswer(
        nonce,
        0,
        choice,
        choices,
        made.prompt_token_ids,
        made.output_token_ids,
        made.top_k,
        made.candidate_ids,
        made.candidate_logprobs,
        made.emitted_logprobs,
        "stop",
    )


def without_ids(nonce: str = "n", **more: Any) -> Capture:
    empty = {"prompt_token_ids": b"", "output_token_ids": b"", "candidate_ids": b"", "candidate_logprobs": b""}
    return capture(nonce=nonce, from_tap=True, emitted_logprobs=b"", **empty, **more)


async def test_every_choice_of_a_response_without_ids_is_scored_when_its_answers_come(bench: Bench) -> None:
    bench.scorer.offer(without_ids(choices=2, generated=5))
    await asyncio.sleep(0.02)
    assert not bench.records
    for choice, tokens in ((0, 3), (1, 2)):
        message = AnswerMessage("boot", [answer_of("n", choice, 2, tokens)], 0)
        bench.engines.add_answers(message, bench.now)
        # The engine's numbers are found by the ids of the choice.
        before = np.array([-1, *[0] * (tokens - 1)], "<i4").tobytes()
        run = TapRun("n", 0, tokens, {VERSION: [float(tokens)] * tokens}, None, child=choice, previous_ids=before)
        bench.engines.taps.add(TapMessage("boot", [run]), bench.now)
    await until(lambda: bench.counts.total() == 2)
    assert bench.counts == Counter({("scored", ""): 2})
    shifts = {len(record.output_ids): record.shifts[VERSION].log_normalizer.tolist() for record in bench.records}
    assert shifts == {3: [3.0] * 3, 2: [2.0] * 2}


async def test_a_response_without_ids_whose_answer_does_not_come_is_skipped(bench: Bench) -> None:
    bench.scorer.offer(without_ids())
    await asyncio.sleep(0.02)
    assert not bench.counts
    bench.now += scorer_module.MAX_TAP_SECONDS + 1
    await until(lambda: bench.counts.total() == 1)
    assert bench.counts == Counter({("skipped", "no_answer"): 1})
    # One that is not whole, and one that is too long.
    bench.now = 0.0
    bench.engines.add_answers(AnswerMessage("boot", [answer_of("m", 0, 1, 3), answer_of("l", 0, 1, 60)], 0), bench.now)
    found = await bench.ends(without_ids("m", generated=4), without_ids("l"))
    assert found == Counter({("skipped", "answer_mismatch"): 1, ("skipped", "too_long"): 1})
    await alive(bench)


# --- the engine's tap -------------------------------------------------------------------------------------------------


async def test_a_tap_that_comes_late_is_waited_for(bench: Bench) -> None:
    bench.scorer.offer(capture(nonce="n"))
    bench.tap("n", 0, 2, None)
    await asyncio.sleep(0.02)
    assert not bench.reference.asked, "the engine has not spoken of the last token"
    assert bench.scorer.pending == 1
    bench.tap("n", 2, 1, None)
    await until(lambda: bench.counts["scored", ""] == 1)
    assert not np.isnan(bench.records[0].shifts[VERSION].log_normalizer).any()


async def test_when_time_is_up_the_bounds_have_to_do(bench: Bench) -> None:
    bench.tap("half", 0, 2, None)
    for nonce in ("half", "missing"):
        bench.scorer.offer(capture(nonce, nonce=nonce))
    bench.now = scorer_module.MAX_TAP_SECONDS + 0.1
    await until(lambda: bench.counts["scored", ""] == 2)
    records = {record.request_id: record for record in bench.records}
    assert np.isnan(records["half"].shifts[VERSION].log_normalizer).tolist() == [False, False, True]
    assert records["missing"].shifts == {}
    assert bench.engines.taps.covered("half") == 0, "taken"


async def test_an_engine_ahead_of_the_output_is_cut_to_it(bench: Bench) -> None:
    bench.tap("n", 0, 5, None)
    await bench.ends(capture(nonce="n"))
    assert len(bench.records[0].shifts[VERSION].log_normalizer) == 3


async def test_a_profile_that_changed_on_the_way_enters_no_comparison(bench: Bench) -> None:
    bench.tap("n", 0, 1, None)
    bench.tap("n", 1, 2, VERSION)
    assert await bench.ends(capture(nonce="n", requested=VERSION)) == Counter({("skipped", "mixed_profile"): 1})


async def test_asked_for_is_not_applied(bench: Bench) -> None:
    bench.tap("n", 0, 3, None)
    assert await bench.ends(capture(nonce="n", requested=VERSION, arm="treated")) == SCORED
    assert (bench.records[0].requested, bench.records[0].applied) == (VERSION, None)
    assert bench.records[0].arm is Arm.NONE, "treated in name only: it enters no comparison"
    bench.now = scorer_module.MAX_TAP_SECONDS + 0.1
    silent = capture(nonce="silent", requested=VERSION)
    assert await bench.ends(silent) == Counter({("skipped", "applied_unknown"): 1})
    assert await bench.ends(capture(nonce="", requested=VERSION)) == Counter({("skipped", "applied_unknown"): 1})


async def test_an_adapter_needs_no_plugin_to_be_known_as_applied_but_its_map_does(bench: Bench) -> None:
    alone, mapped = "a" * 32, "b" * 32
    bench.maps = {alone: False, mapped: True}
    unknown = Counter({("skipped", "applied_unknown"): 1})
    assert await bench.ends(capture(requested=mapped, adapter=mapped, arm="treated")) == unknown
    assert await bench.ends(capture(requested=alone, adapter=alone, arm="treated")) == SCORED
    assert await bench.ends(capture(requested=alone, arm="treated")) == SCORED
    found = [(record.applied, record.adapter, record.arm) for record in bench.records]
    assert found == [(alone, alone, Arm.TREATED), (None, None, Arm.NONE)]


async def test_what_the_request_itself_carried_was_applied() -> None:
    bench = Bench(by_request=True)
    async with running(bench):
        assert await bench.ends(capture(requested=VERSION)) == SCORED
        bench.tap("n", 0, 3, None)
        assert await bench.ends(capture(nonce="n", requested=VERSION)) == SCORED
    assert [record.applied for record in bench.records] == [VERSION, VERSION]


# --- back-pressure ----------------------------------------------------------------------------------------------------


async def test_the_budget_makes_captures_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tokens each at 8 a second, one saved up: the others come a second apart."""
    bench = Bench(rate=8.0)
    asked_at: list[float] = []
    bench.reference.before = lambda: asked_at.append(bench.now)
    sleep = asyncio.sleep

    async def pass_time(seconds: float) -> None:
        bench.now += seconds
        await sleep(0)

    monkeypatch.setattr(scorer_module.asyncio, "sleep", pass_time)
    for _ in range(4):
        bench.scorer.offer(capture())
    task = asyncio.create_task(bench.scorer.run(1))
    while bench.counts["scored", ""] < 4:
        await sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert asked_at[:4] == pytest.approx([0.0, 1.0, 2.0, 3.0])


async def test_no_more_are_scored_at_a_time_than_workers() -> None:
    bench = Bench()
    async with running(bench, workers=3):
        await bench.ends(*[capture(str(n)) for n in range(20)])
    assert bench.reference.most == 3


async def test_what_waits_for_its_tap_holds_nobody_up_and_is_bounded() -> None:
    bench = Bench(max_queue=5)
    async with running(bench, workers=1):
        for n in range(6):
            bench.scorer.offer(capture(f"waits-{n}", nonce=str(n)))
        assert bench.counts == Counter({("dropped", "queue_full"): 1})
        bench.tap("3", 0, 3, None)
        await until(lambda: bench.counts["scored", ""] == 1)
        bench.scorer.offer(capture("at-once"))
        await until(lambda: bench.counts["scored", ""] == 2)
        assert [record.request_id for record in bench.records] == ["waits-3", "at-once"]
        assert bench.scorer.pending == 4
        bench.now = scorer_module.MAX_TAP_SECONDS + 0.1
        await until(lambda: bench.counts["scored", ""] == 6)
        assert bench.scorer.pending == 0


# --- features and hidden states ---------------------------------------------------------------------------------------

ANCHORS = np.array([3, 1, 4], np.int32)
DIGEST = anchors_digest(ANCHORS)


def contextual(ids: Any = ANCHORS) -> CalibrationProfile:
    return contextual_profile(
        model="m",
        anchors=ids,
        linear=np.array([[1.0, 2.0, -1.0]]),
        offset=np.zeros(1),
        up=np.ones((V, 1)),
        clamp_nats=1.0,
    )


async def test_features_become_codes_that_the_reference_is_asked_with(bench: Bench) -> None:
    mine, bias, foreign = contextual(), temperature_bias("m", V, 1.0, np.ones(V), 1.0), contextual(ANCHORS + 1)
    bench.profiles = (mine, bias, foreign)
    values = np.array([[1, -1, 0], [np.nan] * 3, [2, 0, -2]], np.float32)
    bench.handed("n", Features(DIGEST, values))
    assert await bench.ends(capture(nonce="n")) == SCORED
    (codes,), (record,) = bench.reference.codes, bench.records
    assert set(codes) == {mine.version}, "a bias needs none, another set of anchors cannot be read"
    np.testing.assert_allclose(codes[mine.version], [[-1], [0], [4]])
    assert record.features is not None
    np.testing.assert_array_equal(record.features.values, values)
    np.testing.assert_array_equal(record.shifts[mine.version].expected, [0.125, np.nan, 0.125])
    np.testing.assert_allclose(record.shifts[mine.version].code, [[-1], [0], [4]])  # type: ignore[arg-type]
    np.testing.assert_array_equal(record.shifts[bias.version].expected, 0.125)
    assert not bench.scorer.features_dropped


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (None, "not_sent"),
        (Features("f" * 32, np.zeros((3, 3), np.float32)), "other_anchors"),
        (Features(DIGEST, np.zeros((3, 0), np.float32)), "shape"),
        (Features(DIGEST, np.zeros((3, 2), np.float32)), "shape"),
        (Features(DIGEST, np.zeros(3, np.float32)), "shape"),
        (Features(DIGEST, np.full((3, 3), np.inf, np.float32)), "not_finite"),
        (Features(DIGEST, np.array([[0, 1, np.nan]] * 3, np.float32)), "not_finite"),
        (Features(DIGEST, np.full((3, 3), np.nan, np.float32)), "masked"),
        (Features(DIGEST, np.zeros((0, 3), np.float32)), "masked"),
    ],
)
async def test_features_that_are_of_no_use_are_counted_and_the_rest_is_scored(
    bench: Bench, features: Features | None, reason: str
) -> None:
    bench.profiles = (contextual(),)
    bench.handed("n", features)  # type: ignore[arg-type]
    assert await bench.ends(capture(nonce="n")) == SCORED
    assert bench.scorer.features_dropped == Counter({reason: 1})
    (record,) = bench.records
    assert record.features is None
    assert bench.reference.codes == [{}]
    np.testing.assert_allclose(record.shifts[VERSION].log_normalizer, 0.25)


@pytest.mark.parametrize("width", [0, 2, 3])
async def test_more_anchors_than_a_hidden_state_has_numbers_go_to_the_reference(bench: Bench, width: int) -> None:
    bench.profiles = (contextual(),)
    bench.info = replace(bench.info, hidden_size=width)
    bench.reference.recovered = RecoveredDivergence(*np.full((7, 3), 0.001))
    values = np.array([[1, -1, 0], [np.nan] * 3, [2, 0, -2]], np.float32)
    bench.handed("n", Features(DIGEST, values))
    assert await bench.ends(capture(nonce="n")) == SCORED
    (given,), (record,) = bench.reference.compressed, bench.records
    if width != 2:
        assert given is None
        assert record.recovered is None
        return
    assert given is not None
    np.testing.assert_array_equal(given.anchors, ANCHORS)
    np.testing.assert_array_equal(given.features, values)
    np.testing.assert_array_equal(given.logprobs, record.compressed.logprobs)
    assert record.recovered is bench.reference.recovered


async def test_without_a_tap_there_are_no_features_and_nobody_misses_them_who_reads_none(bench: Bench) -> None:
    assert await bench.ends(capture()) == SCORED
    assert not bench.scorer.features_dropped
    bench.profiles = (contextual(),)
    assert await bench.ends(capture()) == SCORED
    assert bench.scorer.features_dropped == Counter({"no_tap": 1})


@pytest.mark.parametrize("rows", [2, 5])
async def test_features_are_fitted_to_the_output(bench: Bench, rows: int) -> None:
    bench.profiles = (contextual(),)
    bench.handed("n", Features(DIGEST, np.ones((rows, 3), np.float32)))
    assert await bench.ends(capture(nonce="n")) == SCORED
    features = bench.records[0].features
    assert features is not None
    assert np.isnan(features.values).any(axis=1).tolist() == [False, False, rows == 2]


async def test_hidden_states_are_asked_for_where_they_are_learned_from(bench: Bench) -> None:
    learned, judged = capture("learned"), capture("judged", prompt_token_ids=np.array([7], "<i4").tobytes())
    bench.learning = prompt_key(np.arange(5))
    await bench.ends(learned, judged)
    hidden = {record.request_id: record.reference_hidden for record in bench.records}
    assert hidden["judged"] is None
    np.testing.assert_array_equal(hidden["learned"], np.ones((3, D), np.float32))


def test_a_reference_that_leaves_its_answer_short_is_an_invalid_record() -> None:
    arrays = record_builder.decode_capture(capture())
    scores = ReferenceScores(
        at=np.zeros((2, K + 1)), top=Candidates(np.zeros((3, 1), np.int32), np.full((3, 1), -1.0)), emitted=np.zeros(3)
    )
    with pytest.raises(record_builder.InvalidRecordError) as caught:
        record_builder.build_record(capture(), arrays, scores, replace(INFO, vocab_size=V), None, ())
    assert caught.value.reason == "shape"


async def test_only_the_last_tokens_of_a_long_output_are_scored_and_the_rest_is_stated() -> None:
    made = Bench(max_scored=4)
    async with running(made):
        assert await made.ends(capture(tokens=10, kind="chat"), capture("s", tokens=3, kind="chat")) == {
            ("scored", ""): 2
        }
    assert made.reference.asked == [15, 8], "the reference reads all of it"
    assert [(record.tokens, record.position) for record in made.records] == [(4, 6), (3, 0)]
    found = made.coverage.report()
    assert found["scored_share"] == {"tokens": 7 / 13, "requests": 1.0}
    assert [(one["reason"], one["tokens"], one["requests"]) for one in found["not_scored"]] == [
        ("outside_suffix", 6, 0.0)
    ]


async def test_a_long_request_may_take_longer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length counts in the time that it may take: a slow reference has not failed."""
    monkeypatch.setattr(scorer_module, "MAX_SCORE_SECONDS", 0.0)
    monkeypatch.setattr(scorer_module, "MIN_TOKENS_PER_SECOND", 1e-3)
    assert await bench.ends(capture(tokens=3)) == {("scored", ""): 1}
    monkeypatch.setattr(scorer_module, "MIN_TOKENS_PER_SECOND", 1e6)
    bench.reference.hang = True
    assert await bench.ends(capture(tokens=3)) == {("dropped", "reference_timeout"): 1}


async def test_every_ending_is_in_the_coverage(bench: Bench) -> None:
    bench.info = None
    await bench.ends(capture(tokens=3, kind="chat"))
    bench.info = INFO
    await bench.ends(capture(tokens=5, kind="chat"), capture(model="unknown", tokens=7, kind="chat"))
    found = bench.coverage.report()
    assert found["by_outcome"]["scored"]["tokens"] == 5
    assert {(one["outcome"], one["reason"], one["tokens"]) for one in found["not_scored"]} == {
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
