"""Whatever goes wrong ends one capture, under its reason, and the loops go on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import pytest
from tests.control.test_link import until

from hemostat import scorer as scorer_module
from hemostat.engines import EngineRegistry, TapMessage, TapRun
from hemostat.messages import Capture
from hemostat.reference.protocol import ReferenceFailure, ReferenceInfo, ReferenceScores
from hemostat.scorer import Scorer
from hemostat.shadow import Breaker, ShadowQueue, TokenBudget
from hemostat_calibration.profile import CalibrationProfile
from hemostat_calibration.records import Arm, Candidates, Ids, TokenRecord

V, K = 30, 4
VERSION, CANDIDATE = "a" * 32, "b" * 32
INFO = ReferenceInfo("ref", "digest", "float32", V, True)


def capture(request_id: str = "r", tokens: int = 3, **more: object) -> Capture:
    """An engine that finds the ids 0, 1, 2 … less and less likely, and emits 0."""
    ids = np.tile(np.arange(K + 1, dtype="<i4"), (tokens, 1))
    ids[:, K] = -1
    logprobs = np.tile(np.log([0.5, 0.2, 0.1, 0.05, 1e-300]).astype("<f4"), (tokens, 1))
    logprobs[:, K] = -np.inf
    made = Capture(
        request_id=request_id,
        route="/v1/completions",
        model="m",
        label="gold",
        arm="none",
        requested=None,
        nonce="",
        stream=False,
        prompt_token_ids=np.arange(5, dtype="<i4").tobytes(),
        output_token_ids=np.zeros(tokens, "<i4").tobytes(),
        top_k=K,
        candidate_ids=ids.tobytes(),
        candidate_logprobs=logprobs.tobytes(),
        emitted_logprobs=logprobs[:, 0].tobytes(),
        temperature=1.0,
        top_p=1.0,
        sampling_top_k=0,
        min_p=0.0,
        finish_reason="stop",
        captured_at=0.0,
    )
    return msgspec.structs.replace(made, **more)


@dataclass
class FakeReference:
    """Says that every id is equally likely; does first what `before` says."""

    before: Callable[[], object] = lambda: None
    hang: bool = False
    asked: list[int] = field(default_factory=list)
    going_on: int = 0
    most: int = 0

    async def start(self) -> ReferenceInfo:
        return INFO

    async def score(
        self, prompt: Ids, output: Ids, ids: Ids, profiles: tuple[CalibrationProfile, ...] = ()
    ) -> ReferenceScores:
        self.asked.append(len(prompt) + len(output))
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
            at=np.where(ids >= 0, flat, np.nan), top=top, emitted=np.full(tokens, flat), entropy=np.full(tokens, -flat)
        )

    async def render(self, messages: list[dict[str, str]]) -> list[int]:
        return []

    async def tokenize(self, text: str) -> list[int]:
        return []

    async def close(self) -> None:
        return


class Bench:
    def __init__(self, *, max_queue: int = 100, rate: float = 0.0, by_request: bool = False) -> None:
        self.now = 0.0
        self.counts: Counter[tuple[str, str]] = Counter()
        self.records: list[TokenRecord] = []
        self.reference = FakeReference()
        self.engines = EngineRegistry()
        self.breaker = Breaker(threshold=2, cooldown=10.0)
        self.info: ReferenceInfo | None = INFO
        self.served = frozenset({"m"})
        self.sinks_fail = False
        self.scorer = Scorer(
            queue=ShadowQueue(max_queue),
            budget=TokenBudget(rate, max(rate, 1.0)),
            breaker=self.breaker,
            reference=self.reference,
            info=lambda: self.info,
            served=lambda: self.served,
            profiles=lambda: (),
            engines=self.engines,
            sink=self._sink,
            count=lambda outcome, reason: self.counts.update([(outcome, reason)]),
            clock=lambda: self.now,
            by_request=by_request,
        )

    def _sink(self, record: TokenRecord, _: Capture) -> None:
        if self.sinks_fail:
            raise RuntimeError("a bug")
        self.records.append(record)

    def tap(self, nonce: str, start: int, tokens: int, applied: str | None, value: float | None = 0.25) -> None:
        run = TapRun(nonce, start, tokens, {VERSION: [value] * tokens}, applied)
        self.engines.tap(TapMessage("boot", [run]), self.now)

    async def ends(self, *captures: Capture) -> Counter[tuple[str, str]]:
        """What these captures came to; every one comes to something."""
        before = self.counts.copy()
        for one in captures:
            self.scorer.offer(one)
        await until(lambda: self.counts.total() - before.total() >= len(captures) and self.scorer.pending == 0)
        return self.counts - before


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "TAP_POLL", 0.002)
    monkeypatch.setattr(scorer_module, "SCORE_WITHIN", 0.4)


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


async def test_a_bug_behind_the_scorer_ends_one_capture(bench: Bench) -> None:
    bench.sinks_fail = True
    assert await bench.ends(capture(), capture()) == Counter({("dropped", "internal_error"): 2})
    await alive(bench)


async def test_a_reference_not_known_yet_is_not_asked(bench: Bench) -> None:
    bench.info = None
    assert await bench.ends(capture()) == Counter({("dropped", "reference_not_ready"): 1})
    assert bench.reference.asked == []


# --- the engine's tap -------------------------------------------------------------------------------------------------


async def test_a_tap_that_comes_late_is_waited_for(bench: Bench) -> None:
    bench.scorer.offer(capture(nonce="n"))
    await until(lambda: bench.reference.asked == [8])
    bench.tap("n", 0, 2, None)
    await asyncio.sleep(0.02)
    assert not bench.records, "the engine has not spoken of the last token"
    bench.tap("n", 2, 1, None)
    await until(lambda: bench.counts["scored", ""] == 1)
    assert not np.isnan(bench.records[0].shifts[VERSION].log_normalizer).any()


async def test_when_time_is_up_the_bounds_have_to_do(bench: Bench) -> None:
    bench.tap("half", 0, 2, None)
    for nonce in ("half", "missing"):
        bench.scorer.offer(capture(nonce, nonce=nonce))
    await until(lambda: len(bench.reference.asked) == 2)
    bench.now = scorer_module.TAP_WITHIN + 0.1
    await until(lambda: bench.counts["scored", ""] == 2)
    records = {record.request_id: record for record in bench.records}
    assert np.isnan(records["half"].shifts[VERSION].log_normalizer).tolist() == [False, False, True]
    assert records["missing"].shifts == {}
    assert bench.engines.tapped("half") == 0, "taken"


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
    bench.now = scorer_module.TAP_WITHIN + 0.1
    silent = capture(nonce="silent", requested=VERSION)
    assert await bench.ends(silent) == Counter({("skipped", "applied_unknown"): 1})
    assert await bench.ends(capture(nonce="", requested=VERSION)) == Counter({("skipped", "applied_unknown"): 1})


async def test_what_the_request_itself_carried_was_applied() -> None:
    bench = Bench(by_request=True)
    async with running(bench):
        assert await bench.ends(capture(requested=VERSION)) == SCORED
        bench.tap("n", 0, 3, None)
        assert await bench.ends(capture(nonce="n", requested=VERSION)) == SCORED
    assert [record.applied for record in bench.records] == [VERSION, VERSION]


# --- brakes -----------------------------------------------------------------------------------------------------------


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


async def test_waiting_for_taps_is_bounded_and_holds_the_reference_up_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scorer_module, "JOINING", 4)
    bench = Bench(max_queue=100)
    async with running(bench, workers=1):
        for n in range(20):
            bench.scorer.offer(capture(str(n), nonce=str(n)))
        # One is joined, four wait, one has been scored and has no room.
        await until(lambda: len(bench.reference.asked) == 6)
        await asyncio.sleep(0.02)
        assert len(bench.reference.asked) == 6
        bench.now = scorer_module.TAP_WITHIN + 0.1
        await until(lambda: bench.counts["scored", ""] == 20)
        assert bench.scorer.pending == 0


def test_a_reference_that_leaves_its_answer_short_is_an_invalid_record() -> None:
    arrays = scorer_module.decode(capture())
    scores = ReferenceScores(
        at=np.zeros((2, K + 1)), top=Candidates(np.zeros((3, 1), np.int32), np.full((3, 1), -1.0)), emitted=np.zeros(3)
    )
    with pytest.raises(scorer_module.InvalidRecordError) as caught:
        scorer_module.build_record(capture(), arrays, scores, replace(INFO, vocab_size=V), None, ())
    assert caught.value.reason == "shape"
