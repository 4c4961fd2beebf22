"""Exact distances on copies of both models, and whatever can become of the process that computes them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from tests.support import fake_judge, oracle, tiny_checkpoints
from tests.support.children import children
from tests.support.exact import exact
from tests.support.learner_world import logprobs
from tests.support.samples import values
from tests.support.temperature_bias import temperature_bias
from tests.support.waiting import until

from hemostat.adapters.live import judge as judging
from hemostat.adapters.live import judge_messages, judge_requests
from hemostat.adapters.live.folders import CheckpointFolders
from hemostat.adapters.live.job import linear_shapes
from hemostat.adapters.live.judge import AdapterJudge, JudgeTarget
from hemostat.adapters.live.judge_requests import BACK_OFF, TARGET_SECONDS, AnswerLimit
from hemostat.adapters.serving.probing import CopyUnavailable
from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.checkpoints.output_embedding import load as load_embedding
from hemostat.learner.learner_messages import parts as pieces
from hemostat.metrics import names
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.adapter import adapter_layers, adapter_profile
from hemostat_calibration.profiles.contextual import contextual_profile
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile
from hemostat_calibration.records import Candidates, ExactDistances, TokenRecord
from hemostat_lab.adapters import judge_process

V, D = tiny_checkpoints.VOCAB, tiny_checkpoints.HIDDEN
PROMPT, TOKENS = 5, 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFolders:
    return tiny_checkpoints.make_pair(tmp_path_factory.mktemp("pair"))


def layers(folders: CheckpointFolders, seed: int = 0) -> dict[str, LowRank]:
    rng = np.random.default_rng(seed)
    return {
        name: LowRank(
            rng.normal(0, 0.2, (2, inputs)).astype(np.float32), rng.normal(0, 0.2, (outputs, 2)).astype(np.float32)
        )
        for name, (outputs, inputs) in linear_shapes(folders.reference).items()
        if name.endswith("_proj")
    }


def contextual(seed: int = 1) -> CalibrationProfile:
    rng = np.random.default_rng(seed)
    return contextual_profile(
        model="m",
        anchors=np.arange(8),
        linear=rng.normal(0, 0.3, (3, 8)),
        offset=rng.normal(0, 0.3, 3),
        up=rng.normal(0, 0.5, (V, 3)),
        clamp_nats=1.0,
    )


class Models:
    """Both checkpoints in transformers alone: what the judge must agree with."""

    def __init__(self, folders: CheckpointFolders) -> None:
        self.folders = folders
        self.reference = transformers.AutoModelForCausalLM.from_pretrained(folders.reference)

    def compressed(self, corrections: Mapping[str, LowRank]) -> Any:
        """With the corrections added to its weights."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folders.compressed)
        with torch.no_grad():
            for name, factors in corrections.items():
                model.get_submodule(name).weight += torch.from_numpy(factors.b @ factors.a)
        return model

    def logits(self, profile: CalibrationProfile | None, ids: Any, *, processed: bool = True) -> Any:
        corrections = {} if profile is None or profile.family != "adapter" else adapter_layers(profile)
        with torch.no_grad():
            z = self.compressed(corrections)(torch.tensor(ids)[None]).logits[0].double().numpy()
        given = None if profile is None or profile.family == "adapter" else profile
        return oracle.apply(given, z) if processed and given is not None else z

    def hidden(self, record: TokenRecord, prompt: Any) -> Any:
        ids = torch.tensor(np.concatenate([prompt, record.output_ids[:-1]]))[None]
        with torch.no_grad():
            result = self.reference.model(ids).last_hidden_state[0]
        return result[-record.tokens :].numpy()

    def distances(self, profile: CalibrationProfile | None, record: TokenRecord, prompt: Any) -> dict[str, Any]:
        ids = np.concatenate([prompt, record.output_ids[:-1]])
        with torch.no_grad():
            theirs = self.reference(torch.tensor(ids)[None]).logits[0].double().numpy()
        ours = self.logits(profile, ids)
        return exact(*(logprobs(z[-record.tokens :]) for z in (theirs, ours)))


def record_of(
    seed: int, hidden: Any = None, folders: CheckpointFolders | None = None, apart: float = 0.0
) -> TokenRecord:
    """Only its output, its hidden states and the reference's log-probabilities matter here. folders: of the reference
    that gave those for the hidden states; else all tokens have the same ones. apart: how far they are from those."""
    output = np.random.default_rng(seed).integers(0, V, TOKENS).astype(np.int32)
    emitted = np.full(TOKENS, -np.log(V)) + apart
    if folders is not None:
        weight = load_embedding(folders.reference, V)
        emitted = logprobs(np.nan_to_num(hidden) @ weight.T)[np.arange(TOKENS), output]
    flat = np.full(TOKENS, -np.log(V))
    lists = Candidates(np.tile(np.arange(2, dtype=np.int32), (TOKENS, 1)), np.tile(flat[:, None], (1, 2)))
    return TokenRecord(
        vocab_size=V,
        prompt_key=seed.to_bytes(16, "little"),
        output_ids=output,
        compressed=lists,
        reference_at=lists.logprobs,
        reference=lists,
        compressed_emitted=flat,
        reference_emitted=emitted,
        reference_hidden=hidden,
    )


def prompt_of(seed: int) -> Any:
    return np.random.default_rng(1000 + seed).integers(0, V, PROMPT).astype(np.int32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process loads no models: what this end does with it is the same, and it starts in a tenth of the time."""
    monkeypatch.setattr(judging, "MODULE", fake_judge.MODULE)
    assert fake_judge.VOCAB == V


@asynccontextmanager
async def judge(target: JudgeTarget | None, profiles: Mapping[str, CalibrationProfile]) -> AsyncIterator[AdapterJudge]:
    made = AdapterJudge(profiles.get)
    running = asyncio.create_task(made.run())
    if target is not None:
        made.judge_about(target)
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert pid() is None


def pid() -> int | None:
    """Of the judge's process."""
    return next(iter(children(judging.MODULE)), None)


async def ready(adapter_judge: AdapterJudge) -> None:
    assert pid() is None
    assert adapter_judge.state == "idle"
    adapter_judge.need()
    await until(lambda: adapter_judge.state == "ready")


async def distances(
    adapter_judge: AdapterJudge, record: TokenRecord, prompt: Any, versions: tuple[str, ...]
) -> Mapping[str, ExactDistances]:
    result: asyncio.Future[Mapping[str, ExactDistances]] = asyncio.get_running_loop().create_future()
    assert adapter_judge.offer(record, prompt, versions, result.set_result)
    assert not result.done(), "never inside of the offer"
    return await result


@pytest.mark.parametrize("from_hidden", [False, True])
def test_distances_are_those_of_transformers_with_the_corrections_in_the_weights(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch, from_hidden: bool
) -> None:
    monkeypatch.setattr(judge_process, "CHUNK_ELEMENTS", 4 * V)
    models = Models(folders)
    profiles = [
        adapter_profile(model="m", vocab_size=V, layers=layers(folders)),
        adapter_profile(model="m", vocab_size=V, layers=layers(folders, 1)),
        contextual(),
        temperature_bias("m", V, 1.5, np.random.default_rng(2).normal(0, 0.3, V), 1.0),
    ]
    known = {profile.version: profile for profile in profiles}
    start = judge_messages.Start(str(folders.compressed), str(folders.reference), V, D if from_hidden else 0, "cpu")
    copies = judge_process.Copies(start)
    for version, profile in known.items():
        parts = list(pieces(profile.to_bytes()))
        assert [judge_process.answer(copies, judge_messages.Hold(version, part, last)) for part, last in parts] == [
            None
        ] * len(parts)
    record, prompt = record_of(1), prompt_of(1)
    hidden = models.hidden(record, prompt).astype("<f4").tobytes() if from_hidden else b""
    asked = [IDENTITY, *known, "f" * 32]
    answer = judge_process.answer(
        copies, judge_messages.Judge(7, prompt.tobytes(), record.output_ids.tobytes(), asked, hidden)
    )
    assert isinstance(answer, judge_messages.Judged)
    assert answer.id == 7
    result = judging.decode_distances(answer, TOKENS)
    assert set(result) == {IDENTITY, *known}, "one that it does not hold is left out"
    for version in result:
        expected = models.distances(known.get(version), record, prompt)
        np.testing.assert_allclose(result[version].kl, expected["kl_rc"], rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(result[version].tv, expected["tv"], rtol=2e-3, atol=2e-4)
        assert result[version].top1.dtype == bool
    assert result[IDENTITY].kl.mean() > 0.1
    with torch.no_grad():
        theirs = models.reference(torch.tensor(np.concatenate([prompt, record.output_ids[:-1]]))[None]).logits[0]
    expected_z = logprobs(theirs[-TOKENS:].numpy())[np.arange(TOKENS), record.output_ids]
    np.testing.assert_allclose(np.frombuffer(answer.emitted, "<f4"), expected_z, rtol=2e-3, atol=2e-3)
    ids = np.concatenate([prompt, record.output_ids])
    for version in (IDENTITY, *known):
        scored = judge_process.answer(copies, judge_messages.Logprobs(8, ids.tobytes(), version))
        assert isinstance(scored, judge_messages.Scored)
        # As vLLM's prompt_logprobs, before any logits processor.
        expected_z = logprobs(models.logits(known.get(version), ids[:-1], processed=False))
        values_found = np.frombuffer(scored.logprobs, "<f4")
        np.testing.assert_allclose(values_found, expected_z[np.arange(len(ids) - 1), ids[1:]], rtol=2e-3, atol=2e-3)
    judge_process.answer(copies, judge_messages.Evict(list(known)))
    gone = judge_process.answer(copies, judge_messages.Logprobs(9, ids.tobytes(), profiles[0].version))
    assert isinstance(gone, judge_messages.Failed)
    assert "is not held" in gone.message


def test_a_distribution_that_does_not_exist_is_as_far_away_as_can_be(folders: CheckpointFolders) -> None:
    """Leaving the record out would be a selection by the outcome; a reference without one can judge nothing."""
    huge = {
        name: LowRank(np.float32(1e14) * layer.a, np.float32(1e14) * layer.b) for name, layer in layers(folders).items()
    }
    broken = adapter_profile(model="m", vocab_size=V, layers=huge)
    copies = judge_process.Copies(judge_messages.Start(str(folders.compressed), str(folders.reference), V, D, "cpu"))
    judge_process.answer(copies, judge_messages.Hold(broken.version, broken.to_bytes(), True))
    hidden = np.ones((TOKENS, D), "<f4")
    judge_one = judge_messages.Judge(
        1, prompt_of(1).tobytes(), record_of(1).output_ids.tobytes(), [IDENTITY, broken.version], b""
    )
    answer = judge_process.answer(copies, msgspec.structs.replace(judge_one, hidden=hidden.tobytes()))
    assert isinstance(answer, judge_messages.Judged)
    result = judging.decode_distances(answer, TOKENS)
    assert np.isfinite(result[IDENTITY].kl).all()
    assert np.isposinf(result[broken.version].kl).all()
    assert (result[broken.version].tv == 1.0).all()
    assert not result[broken.version].top1.any()
    hidden[3] = np.nan
    failed = judge_process.answer(copies, msgspec.structs.replace(judge_one, hidden=hidden.tobytes()))
    assert isinstance(failed, judge_messages.Failed)
    assert "reference" in failed.message


def test_checkpoints_that_cannot_be_copied_are_one_line(folders: CheckpointFolders, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_text((folders.compressed / "config.json").read_text())
    (torn / "model.safetensors").write_bytes((folders.compressed / "model.safetensors").read_bytes()[:5000])
    reference, compressed = str(folders.reference), str(folders.compressed)
    for start, says in (
        (judge_messages.Start(compressed, reference, V + 1, 0, "cpu"), "adapter.compressed: .* token ids"),
        (judge_messages.Start(compressed, reference, V, D + 1, "cpu"), "reference.folder: .* columns"),
        (judge_messages.Start(str(torn), reference, V, 0, "cpu"), "torn"),
        (judge_messages.Start(compressed, str(torn), V, D, "cpu"), "torn"),
        (judge_messages.Start(compressed, reference, V, 0, "cuda:99"), "cuda:99"),
    ):
        with pytest.raises(HemostatError, match=says) as raised:
            judge_process.Copies(start)
        assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("fake")
async def test_records_that_wait_go_on_without_distances_where_the_process_is_killed_and_it_is_started_again(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "BACKOFF", (0.01,))
    async with judge(JudgeTarget(folders, V, 0), {}) as live_judge:
        await ready(live_judge)
        order: list[tuple[int, bool]] = []
        running = pid()
        assert running is not None
        os.kill(running, signal.SIGSTOP)
        offers = 0
        while live_judge.offer(
            record_of(offers), prompt_of(offers), (IDENTITY,), lambda judged, n=offers: order.append((n, bool(judged)))
        ):
            offers += 1
        assert offers == judge_requests.MAX_WAITING
        assert live_judge.dropped == {"busy": 1}
        asking = asyncio.create_task(live_judge.logprobs(np.arange(4, dtype=np.int32), None))
        await asyncio.sleep(0.05)
        assert order == []
        os.kill(running, signal.SIGKILL)
        await until(lambda: len(order) == offers)
        assert order == [(n, False) for n in range(offers)], "each once, in the order of the offers"
        with pytest.raises(CopyUnavailable, match="ended"):
            await asking
        assert live_judge.dropped["ended"] == offers
        result = values(live_judge.samples())
        assert result[names.ADAPTER_JUDGED, "ended"] == offers
        assert result[names.ADAPTER_JUDGED, "busy"] == 1
        await until(lambda: live_judge.state == "ready")
        assert pid() != running
        assert set(await distances(live_judge, record_of(1), prompt_of(1), (IDENTITY,))) == {IDENTITY}
        assert live_judge.detail == ""
        # Scored by another reference than the copy.
        assert await distances(live_judge, record_of(1, apart=0.5), prompt_of(1), (IDENTITY,)) == {}
        assert live_judge.dropped["other_reference"] == 1
        assert "reference.folder is not the model that the reference serves" in live_judge.status()["detail"]
        assert "judged" in live_judge.status()
        # One that does not answer is ended.
        monkeypatch.setattr(judge_requests, "MAX_ANSWER_SECONDS", 0.3)
        monkeypatch.setattr(judging, "BACKOFF", (60.0,))
        running = pid()
        assert running is not None
        os.kill(running, signal.SIGSTOP)
        assert await distances(live_judge, record_of(1), prompt_of(1), (IDENTITY,)) == {}
        await until(lambda: live_judge.state == "down" and pid() is None)
        assert "did not answer" in live_judge.detail
        # The next one has to be shorter.
        assert live_judge.status()["max_tokens"] is not None


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[AnswerLimit]:
    """The limits of judges, in the order in which they are made."""
    made: list[AnswerLimit] = []

    def make() -> AnswerLimit:
        made.append(AnswerLimit())
        return made[-1]

    for module in (judging, judge_requests):
        monkeypatch.setattr(module, "AnswerLimit", make)
    return made


@pytest.mark.usefixtures("fake")
async def test_what_is_asked_first_starts_it_and_what_comes_while_it_starts_waits(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "BACKOFF", (60.0,))
    async with judge(JudgeTarget(folders, V, 0), {}) as live_judge:
        order: list[tuple[int, bool]] = []

        def offer(n: int) -> bool:
            done = lambda judged: order.append((n, bool(judged)))  # noqa: E731
            return live_judge.offer(record_of(n), prompt_of(n), (IDENTITY,), done)

        assert live_judge.state == "idle"
        assert offer(0)
        await until(lambda: live_judge.state == "starting")
        assert offer(1)
        await until(lambda: len(order) == 2)
        assert order == [(0, True), (1, True)]
        assert live_judge.judged == 2
        running = pid()
        assert running is not None
        os.kill(running, signal.SIGKILL)
        await until(lambda: live_judge.state == "down")
        assert not offer(2), "it is started again after a minute"
        assert live_judge.dropped == {"not_ready": 1}


@pytest.mark.usefixtures("fake")
async def test_a_record_whose_answer_would_take_too_long_is_counted_and_not_asked_for(
    folders: CheckpointFolders, limits: list[AnswerLimit]
) -> None:
    async with judge(JudgeTarget(folders, V, 0), {}) as live_judge:
        await ready(live_judge)
        assert live_judge.status()["max_tokens"] is None
        scored = record_of(1)
        tokens = 2 * (len(prompt_of(1)) + TOKENS)  # both models are run
        limits[-1].late(tokens, TARGET_SECONDS / 2)
        assert live_judge.status()["max_tokens"] == tokens // 2
        assert not live_judge.offer(scored, prompt_of(1), (IDENTITY,), lambda _: None)
        assert live_judge.dropped["too_long"] == 1
        assert values(live_judge.samples())[names.ADAPTER_JUDGED, "too_long"] == 1
        # A machine that was busy for a while is tried again.
        for _ in range(100):
            if live_judge.offer(scored, prompt_of(1), (IDENTITY,), lambda _: None):
                break
        assert live_judge.dropped["too_long"] > 50
        await until(lambda: live_judge.judged == 1)


def test_the_limit_follows_the_speed_of_answers_and_recovers() -> None:
    limit = AnswerLimit()
    limit.answered(8, 0.01)
    assert limit.max_tokens is None, "so quick an answer says little of the speed of long ones"
    limit.late(1000, 100.0)
    assert limit.max_tokens == 1000 / 100.0 / BACK_OFF * TARGET_SECONDS
    limit.late(50, 100.0)
    assert limit.max_tokens == 50 / 100.0 / BACK_OFF * TARGET_SECONDS
    refused = 0
    while not limit.allows(50):
        refused += 1
    assert 200 < refused < 300
    for _ in range(40):
        limit.answered(50, 2.0)
    assert limit.max_tokens == pytest.approx(25 * TARGET_SECONDS, rel=0.01)
    limit.answered(100, 0.5)
    assert limit.max_tokens == 200 * TARGET_SECONDS


async def test_they_come_back_in_the_order_of_the_offers_and_one_that_fails_keeps_its_place(
    folders: CheckpointFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [adapter_profile(model="m", vocab_size=V, layers=layers(folders, seed)) for seed in range(2)]
    known = {profile.version: profile for profile in adapters}
    digest = checkpoint_digest(str(folders.reference), None)
    async with judge(JudgeTarget(folders, V, D, digest), known) as live_judge:
        await ready(live_judge)
        assert live_judge.wants_hidden_states
        order: list[tuple[int, int]] = []
        hidden = np.random.default_rng(0).normal(0, 1, (TOKENS, D)).astype(np.float32)
        for n in range(6):
            broken = np.where(n == 3, np.nan, hidden).astype(np.float32)
            assert live_judge.offer(
                record_of(n, broken, folders),
                prompt_of(n),
                (IDENTITY, adapters[0].version, "f" * 32)[: 1 + n % 3],
                lambda judged, n=n: order.append((n, len(judged))),
            )
        assert order == [], "never inside of the offer"
        assert not live_judge.offer(record_of(9), prompt_of(9), (IDENTITY,), lambda _: None), "without hidden states"
        await until(lambda: len(order) == 6)
        assert order == [(0, 1), (1, 2), (2, 2), (3, 0), (4, 2), (5, 2)]
        assert live_judge.dropped == {"failed": 1, "no_hidden_states": 1}
        assert live_judge.judged == 5
        assert live_judge.status()["bytes"] > 1000
        # What the process holds is bounded, and sent again where it is needed again.
        monkeypatch.setattr(judge_requests, "MAX_HELD", 1)
        for version in (*known, *known):
            assert len(await live_judge.logprobs(np.arange(4, dtype=np.int32), version)) == 3
            assert list(live_judge._requests._held) == [version]
        with pytest.raises(CopyUnavailable, match="not known"):
            await live_judge.logprobs(np.arange(4, dtype=np.int32), "f" * 32)
        live_judge.stop("calibration is off")
        await until(lambda: pid() is None and live_judge.loaded is None)
        assert live_judge.status()["state"] == "off"
        assert not live_judge.wants_hidden_states
        assert not live_judge.offer(record_of(1), prompt_of(1), (IDENTITY,), lambda _: None)


@pytest.mark.usefixtures("fake")
async def test_another_checkpoint_than_the_one_that_serves_is_refused(folders: CheckpointFolders) -> None:
    async with judge(JudgeTarget(folders, V, 0, "0" * 32), {}) as live_judge:
        with pytest.raises(CopyUnavailable, match="idle"):
            await live_judge.logprobs(np.arange(4, dtype=np.int32), None)
        await until(lambda: live_judge.state == "unavailable")
        assert live_judge.detail.startswith("reference.folder: ")
        assert not live_judge.offer(record_of(1), prompt_of(1), (IDENTITY,), lambda _: None)


async def test_how_fast_one_model_was_says_nothing_of_another(
    folders: CheckpointFolders, limits: list[AnswerLimit]
) -> None:
    adapter_judge = AdapterJudge({}.get)
    adapter_judge.judge_about(JudgeTarget(folders, V, 0))
    limits[-1].late(100, 50.0)
    adapter_judge.judge_about(JudgeTarget(folders, V, 0))
    assert adapter_judge.status()["max_tokens"] is not None, "the same target"
    adapter_judge.judge_about(JudgeTarget(folders, V, D))
    assert adapter_judge.status()["max_tokens"] is None


async def test_without_a_target_nothing_is_started() -> None:
    async with judge(None, {}) as live_judge:
        assert live_judge.state == "off"
        assert not live_judge.wants_hidden_states
        assert not live_judge.offer(record_of(1), prompt_of(1), (IDENTITY,), lambda _: None)
        with pytest.raises(CopyUnavailable):
            await live_judge.logprobs(np.arange(4, dtype=np.int32), None)
