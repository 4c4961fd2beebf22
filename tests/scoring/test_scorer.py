"""Whatever goes wrong ends one capture, under its reason, and the loops go on."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support.captures import K, V, candidates_of, capture, record_of
from tests.support.scorer_bench import SCORED, VERSION, Bench, alive, running
from tests.support.taps import sent
from tests.support.waiting import HANG_SECONDS, until

from hemostat.engines.answer_buffer import ANSWER_SECONDS
from hemostat.engines.messages import AnswerMessage, TapAnswer, TapMessage, TapRun
from hemostat.ipc.messages import Capture
from hemostat.reference.protocol import ReferenceFailure, ReferenceScores
from hemostat.scoring import intake, record_builder
from hemostat.scoring.answer_losses import MAX_LOST
from hemostat_calibration.arrays import Ids
from hemostat_calibration.records import Arm, Candidates

pytestmark = pytest.mark.usefixtures("quick_scorer")


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
    assert bench.scorer.stages.call.tokens == 8


async def test_a_full_queue_drops_and_counts_it() -> None:
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


async def test_a_trial_that_fails_before_the_reference_is_asked_does_not_keep_the_breaker_half_open(
    bench: Bench,
) -> None:
    def bug(prompt: Ids, conversation: bytes) -> bytes:
        raise RuntimeError("a bug")

    bench.breaker.failed(0.0)
    bench.breaker.failed(0.0)
    bench.now = 11.0
    without_templates, bench.template_of = bench.template_of, bug
    assert await bench.ends(capture()) == Counter({("dropped", "internal_error"): 1})
    assert not bench.reference.asked
    bench.template_of = without_templates
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


def unparsed(emitted: int = 0) -> dict[str, object]:
    """The candidates of `capture()` as the JSON of a chat's logprobs."""
    given = candidates_of(capture())
    content = []
    for ids, values in zip(given.ids.tolist(), given.logprobs.tolist(), strict=True):
        tops = [
            {"token": f"token_id:{i}", "logprob": v, "bytes": [48]} for i, v in zip(ids, values, strict=True) if i >= 0
        ]
        content.append(tops[0] | {"token": f"token_id:{emitted}", "top_logprobs": tops})
    empty = {"candidate_ids": b"", "candidate_logprobs": b"", "emitted_logprobs": b""}
    return empty | {"route": "/v1/chat/completions", "logprobs": [msgspec.json.encode({"content": content})]}


async def test_logprobs_are_parsed_where_they_are_scored(bench: Bench) -> None:
    assert await bench.ends(capture(), capture(**unparsed())) == Counter({("scored", ""): 2})
    first, second = bench.records
    assert (first.compressed.ids == second.compressed.ids).all()
    assert (first.compressed.logprobs == second.compressed.logprobs).all()
    assert (first.compressed_emitted == second.compressed_emitted).all()


@pytest.mark.parametrize("damage", [unparsed(emitted=1), unparsed() | {"logprobs": [b"{"]}, {"logprobs": [b"null"]}])
async def test_logprobs_that_are_not_of_the_answers_tokens_are_skipped(bench: Bench, damage: dict[str, object]) -> None:
    assert await bench.ends(capture(**damage)) == Counter({("skipped", "no_logprobs"): 1})
    await alive(bench)


def listed(ids: list[int], *values: float) -> dict[str, object]:
    """A capture's list in which the first of the three rows is this."""
    raw_ids, logprobs = capture().candidate_ids, capture().candidate_logprobs
    rows = (
        np.frombuffer(raw_ids, "<i4").reshape(3, K + 1).copy(),
        np.frombuffer(logprobs, "<f4").reshape(3, K + 1).copy(),
    )
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
        bench.engines.update_answers(message, bench.now)
        # The engine's numbers are found by the ids of the choice.
        before = np.array([-1, *[0] * (tokens - 1)], "<i4").tobytes()
        run = TapRun("n", 0, tokens, {VERSION: sent([float(tokens)] * tokens)}, None, child=choice, previous_ids=before)
        bench.engines.taps.update(TapMessage("boot", [run]), bench.now)
    await until(lambda: bench.counts.total() == 2)
    assert bench.counts == Counter({("scored", ""): 2})
    shifts = {len(record.output_ids): record.shifts[VERSION].log_normalizer.tolist() for record in bench.records}
    assert shifts == {3: [3.0] * 3, 2: [2.0] * 2}


async def test_a_response_without_ids_whose_answer_does_not_come_is_skipped(bench: Bench) -> None:
    bench.scorer.offer(without_ids())
    await asyncio.sleep(0.02)
    assert not bench.counts
    bench.now += intake.MAX_TAP_SECONDS + 1
    await until(lambda: bench.counts.total() == 1)
    assert bench.counts == Counter({("skipped", "no_answer"): 1})
    # One that is not whole, and one that is too long.
    bench.now = 0.0
    bench.engines.update_answers(
        AnswerMessage("boot", [answer_of("m", 0, 1, 3), answer_of("l", 0, 1, 60)], 0), bench.now
    )
    result = await bench.ends(without_ids("m", generated=4), without_ids("l"))
    assert result == Counter({("skipped", "answer_mismatch"): 1, ("skipped", "too_long"): 1})
    await alive(bench)


async def test_answers_that_get_lost_are_counted_where_the_response_could_have_the_tokens(bench: Bench) -> None:
    bench.now = intake.MAX_TAP_SECONDS + 1
    lost = Counter({("skipped", "no_answer"): 1})
    for n in range(MAX_LOST):
        assert await bench.ends(without_ids(str(n), engine="a")) == lost
        assert not bench.answer_losses.paused(bench.now), "nothing else could tell these tokens"
    for n in range(MAX_LOST):
        assert not bench.answer_losses.paused(bench.now)
        if n % 2:
            bench.engines.update_answers(AnswerMessage("boot", [answer_of(str(n), 0, 1, 3)], 0), bench.now)
        kept = without_ids(str(n), engine="a", also_in_response=True, generated=4)
        assert (await bench.ends(kept)).total() == 1
    assert bench.counts["skipped", "answer_mismatch"] == MAX_LOST / 2
    assert bench.answer_losses.paused(bench.now)


async def test_an_answer_that_is_too_long_was_not_lost(bench: Bench) -> None:
    for n in range(2 * MAX_LOST):
        bench.engines.update_answers(AnswerMessage("boot", [answer_of(str(n), 0, 1, 60)], 0), bench.now)
        result = await bench.ends(without_ids(str(n), also_in_response=True))
        assert result == Counter({("skipped", "too_long"): 1})
    assert not bench.answer_losses.paused(bench.now)


async def test_a_reference_that_is_behind_loses_no_answer() -> None:
    """Captures wait for longer in the queue than answers are kept."""
    bench = Bench()
    bench.reference.hang = True
    async with running(bench, workers=1):
        bench.scorer.offer(capture("slow"))
        await until(lambda: bool(bench.reference.asked))
        bench.engines.update_answers(AnswerMessage("boot", [answer_of("n", 0, 1, 3)], 0), bench.now)
        bench.scorer.offer(without_ids("n"))
        await until(lambda: len(bench.queue) == 1)
        bench.now += 10 * ANSWER_SECONDS
        bench.engines.answers.expire(bench.now)
        bench.reference.hang = False
        await until(lambda: bench.counts["scored", ""] == 1)
    assert [record.request_id for record in bench.records] == ["r"]


async def test_what_waits_for_its_answer_is_bounded() -> None:
    bench = Bench(max_queue=2)
    for n in range(3):
        bench.scorer.offer(without_ids(str(n)))
    assert bench.counts == Counter({("dropped", "queue_full"): 1})
    assert bench.scorer.pending == 2


async def test_a_fault_in_answers_ends_one_capture(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> list[Capture]:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(intake, "captures_from_tap", fail)
        bench.engines.update_answers(AnswerMessage("boot", [answer_of("n", 0, 1, 3)], 0), bench.now)
        assert await bench.ends(without_ids()) == Counter({("dropped", "internal_error"): 1})
    bench.engines.update_answers(AnswerMessage("boot", [answer_of("m", 0, 1, 3)], 0), bench.now)
    bench.now = intake.MAX_TAP_SECONDS + 1  # its numbers are not waited for
    assert await bench.ends(without_ids("m")) == SCORED


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
    bench.now = intake.MAX_TAP_SECONDS + 0.1
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
    bench.now = intake.MAX_TAP_SECONDS + 0.1
    silent = capture(nonce="silent", requested=VERSION)
    assert await bench.ends(silent) == Counter({("skipped", "applied_unknown"): 1})
    assert await bench.ends(capture(nonce="", requested=VERSION)) == Counter({("skipped", "applied_unknown"): 1})


async def test_an_adapter_needs_no_plugin_to_be_known_as_applied(bench: Bench) -> None:
    version = "a" * 32
    bench.known_adapters = frozenset({version})
    assert await bench.ends(capture(requested=version, adapter=version, arm="treated")) == SCORED
    assert await bench.ends(capture(requested=version, arm="treated")) == SCORED
    result = [(record.applied, record.adapter, record.arm) for record in bench.records]
    assert result == [(version, version, Arm.TREATED), (None, None, Arm.NONE)]


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

    monkeypatch.setattr(intake.asyncio, "sleep", pass_time)
    for _ in range(4):
        bench.scorer.offer(capture())
    task = asyncio.create_task(bench.scorer.run(1))
    while bench.counts["scored", ""] < 4:
        await sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert asked_at[:4] == pytest.approx([0.0, 1.0, 2.0, 3.0])


async def test_a_score_that_comes_when_the_process_stops_does_not_keep_it() -> None:
    """`asyncio.wait_for` of Python 3.11 loses a cancellation then, and the worker would go on for ever."""
    bench = Bench()
    task = asyncio.create_task(bench.scorer.run(1))
    bench.reference.before = lambda: asyncio.get_running_loop().call_soon(task.cancel)
    bench.scorer.offer(capture())
    done, _ = await asyncio.wait({task}, timeout=HANG_SECONDS)
    assert done


async def test_no_more_are_scored_at_a_time_than_workers() -> None:
    bench = Bench()
    async with running(bench, workers=3):
        await bench.ends(*[capture(str(n)) for n in range(20)])
    assert bench.reference.most == 3


async def test_what_waits_for_its_tap_delays_no_other_and_is_bounded() -> None:
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
        bench.now = intake.MAX_TAP_SECONDS + 0.1
        await until(lambda: bench.counts["scored", ""] == 6)
        assert bench.scorer.pending == 0


def test_a_reference_that_leaves_its_answer_short_is_an_invalid_record() -> None:
    scores = ReferenceScores(
        at=np.zeros((2, K + 1)), top=Candidates(np.zeros((3, 1), np.int32), np.full((3, 1), -1.0)), emitted=np.zeros(3)
    )
    with pytest.raises(record_builder.InvalidRecordError) as caught:
        record_of(capture(), scores=scores)
    assert caught.value.reason == "shape"


@pytest.mark.parametrize("steps", range(6))
async def test_a_scorer_that_is_cancelled_as_a_capture_comes_ends(bench: Bench, steps: int) -> None:
    """Whichever step of the loop the cancellation meets: a task that loses it would keep its process from stopping."""
    running_scorer = asyncio.create_task(bench.scorer.run(2))
    bench.scorer.offer(capture(nonce="waits for its tap"))
    await asyncio.sleep(0.01)  # both workers poll now
    bench.scorer.offer(capture(nonce="another"))
    for _ in range(steps):
        await asyncio.sleep(0)
    running_scorer.cancel()
    done, _ = await asyncio.wait({running_scorer}, timeout=HANG_SECONDS)
    assert done, "it has lost its cancellation"
