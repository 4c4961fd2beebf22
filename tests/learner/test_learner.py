"""The control process's end of the learner with a real child process, on a small synthetic world."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import oracle
from tests.support.constants import with_constants
from tests.support.learner_world import D, V, World, kl, learners, logprobs, make, save
from tests.support.waiting import until

from hemostat.checkpoints.output_embedding import load
from hemostat.config.schema import Calibration
from hemostat.ipc.turns import Turns
from hemostat.learner import client, learner_messages, record_queue
from hemostat.learner.client import Learner, LearningTarget
from hemostat.learner.learner_process import ProcessLearner, RequestLoop
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.learning.contextual import storage
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.learner import ContextualLearner
from hemostat_calibration.profiles import transform
from hemostat_calibration.profiles.contextual import CONTEXTUAL
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.records import Features, TokenRecord

SETTINGS = with_constants(Calibration, rank=8, clamp_kl_nats=20.0)(anchors=32, min_tokens=600, clamp_nats=5.0)


class Receiver:
    """Accepts a proposal from each `again` times as many tokens."""

    def __init__(self, again: float = 4.0) -> None:
        self.again = again
        self.at = 0
        self.probes: list[CalibrationProfile] = []
        self.proposed: list[tuple[CalibrationProfile, Mapping[str, Any]]] = []
        self.refuses = False

    def accepts(self, family: str, tokens: int) -> bool:
        return tokens >= self.again * self.at

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any]) -> bool:
        if self.refuses:
            raise InvalidProfileError("another vocabulary")
        assert "learned from" in why
        self.at = report["tokens"]
        self.proposed.append((profile, report))
        return True

    def set_probe(self, profile: CalibrationProfile, *, restored: bool) -> None:
        self.restored = restored
        self.probes.append(profile)

    @property
    def anchors(self) -> Any:
        return transform.anchors(self.probes[-1])


class Bench:
    def __init__(self, folder: Path) -> None:
        self.world: World = make()
        self.receiver = Receiver()
        self.changes = 0
        self.turns = Turns(cores=2)
        self.learner = Learner(SETTINGS, self.receiver, self._changed, turns=self.turns)
        self.target = LearningTarget("m", V, save(self.world, folder), D)
        self.task = asyncio.create_task(self.learner.run())

    def _changed(self) -> None:
        self.changes += 1

    @property
    def digest(self) -> str:
        return transform.anchors_digest(self.receiver.anchors)

    async def ready(self) -> None:
        self.learner.set_target(self.target)
        await until(lambda: self.learner.state == "learning")

    def teach(self, seeds: range) -> None:
        for seed in seeds:
            self.learner.update(self.world.record(seed, self.receiver.anchors, self.digest))

    async def taught(self, tokens: int) -> None:
        await until(lambda: self.learner.status()["tokens"] == tokens)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", (0.05, 0.1))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "checkpoint")
    yield made
    assert not made.task.done()
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)
    assert learners() == [], "no process is left"


async def test_a_proposal_improves_texts_that_it_was_not_learned_from(bench: Bench) -> None:
    await bench.ready()
    (probe,) = bench.receiver.probes
    assert bench.changes == 1
    assert (probe.model, probe.vocab_size, probe.clamp_nats) == ("m", V, 5.0)
    assert len(bench.receiver.anchors) == 32
    assert bench.learner.wants_hidden_states
    bench.teach(range(30))
    await bench.taught(480)
    await asyncio.sleep(0.1)
    assert not bench.receiver.proposed, "too few yet"
    bench.teach(range(30, 60))
    await until(lambda: bool(bench.receiver.proposed))
    ((profile, report),) = bench.receiver.proposed
    assert 600 <= report["tokens"] <= 960
    assert report["gain"] > 0
    np.testing.assert_array_equal(transform.anchors(profile), bench.receiver.anchors)
    h_r, h_c = bench.world.hidden(10_000, 500)
    log_r, z = logprobs(h_r @ bench.world.weight.T), h_c @ bench.world.weight.T
    before, after = kl(log_r, logprobs(z)), kl(log_r, logprobs(oracle.apply(profile, z.astype(np.float64))))
    assert after < 0.5 * before
    status = bench.learner.status()
    assert status["sources"]["hidden"] == status["tokens"] == 960
    assert (status["anchors"], status["d"], status["failed"]) == (32, D, {})
    assert status["last_proposal"]["version"] == profile.version
    assert status["last_proposal"]["accepted"]
    assert bench.changes == 2
    bench.teach(range(100, 300))
    await until(lambda: len(bench.receiver.proposed) == 2)
    assert bench.receiver.proposed[1][1]["tokens"] >= 4 * report["tokens"]


async def test_records_with_missing_parts_are_learned_from_for_the_others(bench: Bench) -> None:
    await bench.ready()
    record = bench.world.record(1, bench.receiver.anchors, bench.digest)
    assert record.features is not None
    values = record.features.values.copy()
    values[:6] = np.nan
    bench.learner.update(replace(record, features=Features(bench.digest, values)))
    bench.learner.update(replace(record, features=Features("f" * 32, values)))
    bench.learner.update(replace(record, features=None))
    bench.learner.update(replace(record, reference_hidden=None))
    bench.learner.update(replace(record, features=None, reference_hidden=None))
    await until(lambda: bench.learner.status()["sources"].get("list") == 16)
    sources = bench.learner.status()["sources"]
    # Of the masked ones nothing is learned; other anchors are none.
    assert bench.learner.status()["tokens"] == 10 + 16 + 16 + 16
    assert sources["hidden_from_list"] == 32
    assert bench.learner.dropped == {"nothing_to_learn": 1}


async def test_a_record_that_does_not_fit_is_counted_as_failed(bench: Bench) -> None:
    await bench.ready()
    record = bench.world.record(1, bench.receiver.anchors, bench.digest)
    bench.learner.update(replace(record, reference_hidden=np.zeros((16, D + 1), np.float32)))
    bench.learner.update(replace(record, features=Features(bench.digest, np.zeros((16, 31), np.float32))))
    bench.teach(range(5))
    await bench.taught(80)
    assert sum(bench.learner.status()["failed"].values()) == 2


async def test_without_a_store_a_killed_learner_begins_anew(bench: Bench) -> None:
    await bench.ready()
    bench.teach(range(10))
    await bench.taught(160)
    (pid,) = learners()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: bench.learner.state == "down")
    assert "lost" in bench.learner.detail
    assert not bench.learner.wants_hidden_states
    bench.teach(range(1))
    assert bench.learner.dropped == {"not_ready": 1}
    await until(lambda: bench.learner.state == "learning")
    assert learners() != [pid]
    assert bench.learner.status()["tokens"] == 0
    bench.teach(range(5))
    await bench.taught(80)
    assert bench.learner.tokens_by_source()["hidden"] == 240, "counters do not decrease"


async def test_a_learner_that_hangs_costs_bounded_memory_and_no_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.ready()
    (pid,) = learners()
    monkeypatch.setattr(record_queue, "MAX_QUEUED_BYTES", 100_000)
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            bench.teach(range(200))
            await asyncio.sleep(0.05)  # the first batch is under way: the next ones wait for its answer
        assert bench.learner.dropped["busy"] > 100
        assert not bench.learner.wants_hidden_states
    finally:
        os.kill(pid, signal.SIGCONT)
    await until(lambda: bench.learner.status()["tokens"] > 0 and bench.learner.wants_hidden_states)


async def test_a_learner_that_cannot_start_says_why_and_starts_once_it_can(bench: Bench, tmp_path: Path) -> None:
    for target, words in [
        (LearningTarget("m", V, tmp_path / "nothing", D), "no .safetensors file"),
        (LearningTarget("m", V + 1, bench.target.folder, D), f"the model has {V + 1} ids"),
        (LearningTarget("m", V, bench.target.folder, D + 1), "must be the reference's own checkpoint"),
    ]:
        bench.learner.set_target(target)
        await until(lambda words=words: bench.learner.state == "unavailable" and words in bench.learner.detail)  # type: ignore[misc]
        assert not bench.receiver.probes
    late = tmp_path / "late"
    bench.learner.set_target(LearningTarget("m", V, late, D))
    await until(lambda: "late" in bench.learner.detail and bench.learner.state == "unavailable")
    save(bench.world, late)
    await until(lambda: bench.learner.state == "learning")


async def test_another_model_restarts_the_learner_and_stop_ends_it(bench: Bench) -> None:
    await bench.ready()
    bench.teach(range(3))
    await bench.taught(48)
    bench.learner.set_target(replace(bench.target, model="other"))
    await until(lambda: len(bench.receiver.probes) == 2)
    assert bench.receiver.probes[1].model == "other"
    assert bench.learner.status()["tokens"] == 0
    bench.learner.stop("calibration is off")
    await until(lambda: not learners())
    assert (bench.learner.state, bench.learner.detail) == ("off", "calibration is off")
    bench.teach(range(3))
    assert not bench.learner.dropped, "records are ignored while there is no target"


async def test_after_a_refused_proposal_learning_continues(bench: Bench) -> None:
    await bench.ready()
    bench.receiver.refuses = True
    bench.teach(range(60))
    await until(lambda: bench.learner.status()["last_proposal"] is not None)
    await asyncio.sleep(0.1)
    assert bench.learner.state == "learning"
    assert not bench.learner.status()["last_proposal"]["accepted"]
    assert bench.learner.status()["tokens"] == 960, "nothing is lost"


def test_records_that_come_while_a_proposal_is_made_are_learned_from() -> None:
    said: list[learner_messages.Answer] = []
    inbox: queue.Queue[learner_messages.Request | None] = queue.Queue()

    class Slow:
        """Its first proposal sees two batches come."""

        def __init__(self) -> None:
            self.proposals = 0

        def update(self, request: learner_messages.Learn) -> learner_messages.Learned:
            return learner_messages.Learned(len(request.rows), {}, {})

        def propose(self, progress: Callable[[str, float], None]) -> learner_messages.Proposed:
            self.proposals += 1
            if self.proposals == 1:
                inbox.put(learner_messages.Learn([]))
                inbox.put(learner_messages.Propose())
                inbox.put(learner_messages.Learn([]))
            progress("linear", 0.5)
            if self.proposals == 2:
                inbox.put(None)
            return learner_messages.Proposed(self.proposals, b"", {})

    inbox.put(learner_messages.Propose())
    RequestLoop(Slow(), inbox, said.append).run()  # type: ignore[arg-type]
    told = [(type(s).__name__, s.tokens if isinstance(s, learner_messages.Proposed) else 0) for s in said]
    first = [("Training", 0), ("Learned", 0), ("Learned", 0), ("Proposed", 1)]
    assert told == [*first, ("Training", 0), ("Proposed", 2)]


def test_what_an_earlier_version_learned_from_parts_of_the_traffic_is_left_out(tmp_path: Path) -> None:
    world = make()
    start = learner_messages.Start(
        *("m", V, str(save(world, tmp_path / "checkpoint")), D, 32, 8, 5.0, 20.0, None, 10_000, 600),
        stored_bytes=1 << 24,
    )
    before = ProcessLearner(start)
    anchors = np.frombuffer(before.ready.anchors, "<i4")
    digest = transform.anchors_digest(anchors)
    rows = [learner_messages.to_row(world.record(seed, anchors, digest)) for seed in range(5)]
    assert before.update(learner_messages.Learn(rows)).tokens == 80
    family = ContextualLearner(
        load(Path(start.folder), V),
        anchors,
        limits=ProfileLimits(start.rank, start.clamp_nats, start.kl_limit),
        half_life_tokens=start.half_life_tokens,
        recent_tokens=start.recent_tokens,
        min_tokens=start.min_tokens,
    )
    about = json.dumps([start.model, V, D, start.reference])
    states = storage.load(b"".join(exported.part for exported in before.export()), family, about)
    part = family.update(states[""], [world.record(5, anchors, digest)])
    stored = storage.save({**states, "gold": part}, family, about, 1 << 24)
    assert ProcessLearner(start, stored).ready.learned.tokens == 80
    only_a_part = storage.save({"gold": part}, family, about, 1 << 24)
    assert ProcessLearner(start, only_a_part).ready.learned.tokens == 0


def test_a_proposal_is_abandoned_when_the_input_ends() -> None:
    class Endless:
        def propose(self, progress: Callable[[str, float], None]) -> learner_messages.Proposed:
            while True:
                progress("linear", 0.5)

    inbox: queue.Queue[learner_messages.Request | None] = queue.Queue()
    inbox.put(learner_messages.Propose())
    inbox.put(None)
    with pytest.raises(SystemExit):
        RequestLoop(Endless(), inbox, lambda _: None).run()  # type: ignore[arg-type]


def test_a_row_holds_what_is_learned_from_a_record() -> None:
    world = make(1)
    record = world.record(3, np.arange(20, dtype=np.int32), "a" * 32)
    again = learner_messages.from_row(learner_messages.to_row(record), V)
    np.testing.assert_array_equal(again.compressed.ids, record.compressed.ids)
    np.testing.assert_allclose(again.reference_at, record.reference_at, rtol=1e-6)
    assert record.features is not None
    assert again.features is not None
    np.testing.assert_allclose(again.features.values, record.features.values, rtol=2e-3, atol=1e-3)
    assert record.reference_hidden is not None
    np.testing.assert_allclose(again.reference_hidden, record.reference_hidden, rtol=2e-3, atol=1e-3)  # type: ignore[arg-type]
    bare = learner_messages.from_row(learner_messages.to_row(replace(record, features=None, reference_hidden=None)), V)
    assert bare.features is None
    assert bare.reference_hidden is None


def test_what_is_learned_from_messages_is_what_is_learned_from_records(tmp_path: Path) -> None:
    world = make()
    anchors = np.arange(32, dtype=np.int32)
    learner = ContextualLearner(world.weight, anchors, features=16)
    records = []
    for seed in range(80):
        record = world.record(seed, anchors, learner.digest, tokens=64)
        assert record.features is not None
        assert record.reference_hidden is not None
        values, hidden = record.features.values.copy(), record.reference_hidden.copy()
        values[3], hidden[5, 0], hidden[6, 1] = np.nan, 1e6, -70_000.0
        records.append(replace(record, features=Features(learner.digest, values), reference_hidden=hidden))
    request = learner_messages.REQUESTS.decode(learner_messages.learn_body(records))
    assert isinstance(request, learner_messages.Learn)
    own, sent = learner.init("m", V), learner.init("m", V)
    for record, row in zip(records, request.rows, strict=True):
        own = learner.update(own, [record])
        sent = learner.update(sent, [learner_messages.from_row(row, V)])
    assert own.tokens == sent.tokens == 80 * 63
    for ours, theirs in zip(own.folds, sent.folds, strict=True):
        np.testing.assert_array_equal(ours.cross, theirs.cross)
        np.testing.assert_array_equal(ours.target, theirs.target)
        assert ours.weight == theirs.weight
    assert any(fold.weight for fold in sent.folds), "some rows are in the sums"
    for mine, other in zip(own.recent, sent.recent, strict=True):
        np.testing.assert_array_equal(mine.features, other.features)  # type: ignore[arg-type]
        np.testing.assert_array_equal(mine.hidden, other.hidden)  # type: ignore[arg-type]


async def test_records_become_messages_away_from_the_event_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    made = learner_messages.learn_body

    def noted(records: Sequence[TokenRecord]) -> bytes:
        threads.add(threading.current_thread())
        return made(records)

    await bench.ready()
    monkeypatch.setattr(learner_messages, "learn_body", noted)
    bench.teach(range(5))
    await bench.taught(80)
    assert threads
    assert threading.main_thread() not in threads


async def test_no_profile_is_fitted_while_another_heavy_job_has_its_turn(bench: Bench) -> None:
    await bench.ready()
    assert bench.turns.take("another job")
    bench.teach(range(60))
    await bench.taught(960)
    await asyncio.sleep(0.1)
    assert not bench.receiver.proposed
    bench.turns.give_back("another job")
    bench.teach(range(60, 61))
    await until(lambda: bool(bench.receiver.proposed))
    await until(lambda: bench.turns.take("another job"))


async def test_a_learner_that_ends_gives_its_turn_back(bench: Bench) -> None:
    await bench.ready()
    assert bench.turns.take(CONTEXTUAL), "as if a profile was being fitted"
    [process] = learners()
    os.kill(process, signal.SIGKILL)
    await until(lambda: bench.turns.take("another job"))
