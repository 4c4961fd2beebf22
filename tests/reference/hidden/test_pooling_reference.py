"""The vLLM backend on a pooling server made here: exact scores, what the server offers, and each of its failures."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from tests.support.children import children
from tests.support.constant_profile import constant_profile
from tests.support.fake_vllm import FakeVllm, running
from tests.support.fake_vllm.pooling import FakePooling, as_float
from tests.support.waiting import HANG_SECONDS

from hemostat.reference.hidden import reference as hidden_reference
from hemostat.reference.hidden.probe import TEXT
from hemostat.reference.on_server import ServerReference
from hemostat.reference.protocol import FailureReason, Offer, ReferenceFailure, ScoreRequest
from hemostat.reference.server import VllmServer
from hemostat_calibration.allowed_sets import AllowedSets

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FakePooling(TEXT).save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The worker's products by numpy, as without torch: its import takes seconds. Those by torch: test_head.py."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "import importlib.util as u\n_find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else _find(name, *rest)\n"
    )

    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")


@asynccontextmanager
async def reference_on(server: FakeVllm, folder: Path | None, **change: Any) -> AsyncIterator[ServerReference]:
    reference = ServerReference(server.url, top_k=5, folder=folder, threads=1, **change)
    try:
        yield reference
    finally:
        await reference.close()


@asynccontextmanager
async def started(
    folder: Path | None, fake: FakeVllm, **change: Any
) -> AsyncIterator[tuple[FakeVllm, ServerReference]]:
    async with running(fake) as server, reference_on(server, folder, **change) as reference:
        yield server, reference


def point(link: Path, folder: Path) -> Path:
    """Has the link name another folder, as whoever corrects reference.folder does. Returns the link."""
    link.unlink(missing_ok=True)
    link.symlink_to(folder)
    return link


def pooling_server(**change: Any) -> FakeVllm:
    return FakeVllm(model="reference", pooling=FakePooling(TEXT, **change))


def request_of(seed: int, prompt: int, output: int, width: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 512, prompt + output).astype(np.int32)
    ids = rng.integers(-1, 512, (output, width)).astype(np.int32)
    return tokens[:prompt], tokens[prompt:], ids


async def test_scores_are_the_full_distribution(folder: Path) -> None:
    async with started(folder, pooling_server()) as (fake, reference):
        info = await reference.start()
        assert (info.model, info.vocab_size, info.hidden_size) == ("reference", 512, 512)
        assert (info.full_vocabulary, info.offer, info.folder) == (True, Offer.STATES, folder)
        assert info.figures_follow.startswith("exact")
        prompt, output, ids = request_of(1, 9, 14, 6)
        profile = constant_profile("fake", np.linspace(-1, 1, 512), 1.0)
        codes = {profile.version: np.ones((14, 1), np.float32)}
        scores = await reference.score(ScoreRequest(prompt, output, ids, (profile,), codes, hidden=True))
        tokens = [*prompt.tolist(), *output[:-1].tolist()]
        rows = fake.pooling.logprobs(tokens)[8:]
        np.testing.assert_allclose(scores.emitted, rows[np.arange(14), output], atol=1e-4)
        wanted = np.where(ids < 0, np.nan, np.take_along_axis(rows, np.maximum(ids, 0), 1))
        np.testing.assert_allclose(scores.at, wanted, atol=1e-4)
        np.testing.assert_allclose(scores.top.logprobs, -np.sort(-rows, 1)[:, :6], atol=1e-4)
        np.testing.assert_allclose(scores.entropy, -(np.exp(rows) * rows).sum(1), atol=1e-4)
        expected = np.exp(rows) @ np.linspace(-1, 1, 512).astype(np.float16).astype(np.float64)
        np.testing.assert_allclose(scores.expected_shift[profile.version], expected, atol=1e-4)
        np.testing.assert_array_equal(scores.hidden, as_float(fake.pooling.states(tokens))[8:])
        body = fake.seen[-1][1]
        assert (body["input"], body["task"], body["embed_dtype"]) == (tokens, "token_embed", "bfloat16")
        again = await reference.score(ScoreRequest(prompt, output, ids, reshaped=True))
        np.testing.assert_allclose(again.emitted, scores.emitted, atol=1e-6)
        assert [len(part) for part in fake.seen[-1][1]["input"]] == [22, 11], "in another shape, for the noise floor"
        assert again.expected_shift == {}


async def test_a_grammars_ids_condition_everything(folder: Path) -> None:
    async with started(folder, pooling_server()) as (fake, reference):
        await reference.start()
        prompt, output, ids = request_of(2, 4, 3, 2)
        table = np.zeros((1, 16), np.uint32)
        for token in (*output.tolist(), 7):
            table[0, token // 32] |= np.uint32(1) << np.uint32(token % 32)
        allowed = AllowedSets(512, table, np.zeros(3, np.int32))
        scores = await reference.score(ScoreRequest(prompt, output, ids, allowed=allowed))
        rows = np.exp(fake.pooling.logprobs([*prompt.tolist(), *output[:-1].tolist()])[3:])
        rows = np.where(allowed.mask(slice(None)), rows, 0)
        rows /= rows.sum(1, keepdims=True)
        np.testing.assert_allclose(np.exp(scores.emitted), rows[np.arange(3), output], atol=1e-4)


async def test_a_bias_or_a_soft_cap_leaves_no_hidden_states_to_learn_from(tmp_path: Path) -> None:
    fake = pooling_server(soft_cap=30.0, scale=2.0)
    async with started(fake.pooling.save(tmp_path), fake) as (_, reference):
        info = await reference.start()
        assert (info.full_vocabulary, info.hidden_size) == (True, 0)
        assert "soft cap 30" in info.hidden_detail
        prompt, output, ids = request_of(3, 3, 4, 2)
        scores = await reference.score(ScoreRequest(prompt, output, ids, hidden=True))
        assert scores.hidden is None
        rows = fake.pooling.logprobs([*prompt.tolist(), *output[:-1].tolist()])[2:]
        np.testing.assert_allclose(scores.emitted, rows[np.arange(4), output], atol=2e-4)


async def test_a_logit_scale_is_part_of_the_hidden_states(tmp_path: Path) -> None:
    fake = pooling_server(scale=0.25)
    async with started(fake.pooling.save(tmp_path), fake) as (_, reference):
        info = await reference.start()
        assert info.hidden_size == 512
        prompt, output, ids = request_of(4, 3, 4, 2)
        scores = await reference.score(ScoreRequest(prompt, output, ids, hidden=True))
        assert scores.hidden is not None
        z = scores.hidden @ fake.pooling.weight.T
        z -= np.log(np.exp(z).sum(1, keepdims=True))
        np.testing.assert_allclose(z[np.arange(4), output], scores.emitted, atol=1e-3)


async def test_a_generating_server_gives_lists(folder: Path) -> None:
    async with started(folder, FakeVllm(model="reference")) as (_, reference):
        info = await reference.start()
        assert (info.full_vocabulary, info.offer, info.vocab_size) == (False, Offer.LISTS, 512)
        assert info.figures_follow.startswith("bounds")
        assert "generates" in info.figures_follow
        assert info.folder == folder, "contextual profiles read the embedding there"
        scores = await reference.score(ScoreRequest(*request_of(0, 3, 4, 2)))
        assert scores.entropy is None


async def test_what_a_server_offers_may_change_with_a_restart(folder: Path) -> None:
    async with started(folder, pooling_server()) as (fake, reference):
        assert (await reference.start()).offer is Offer.STATES
        fake.pooling, kept = None, fake.pooling
        assert (await reference.start()).offer is Offer.LISTS
        assert (await reference.score(ScoreRequest(*request_of(0, 3, 4, 2)))).entropy is None
        fake.pooling = kept
        assert (await reference.start()).offer is Offer.STATES
        assert (await reference.score(ScoreRequest(*request_of(0, 3, 4, 2)))).entropy is not None


async def test_the_folder_that_the_server_names_is_used_where_it_is_here(folder: Path) -> None:
    async with started(None, pooling_server()) as (fake, reference):
        with pytest.raises(ReferenceFailure, match=r"reference\.folder") as failure:
            await reference.start()
        assert failure.value.reason == "head"
        fake.root = str(folder)
        assert (await reference.start()).folder == folder


async def test_a_hub_cache_is_enough(folder: Path, tmp_path: Path) -> None:
    """As in Compose: the server downloads the model into a cache that Hemostat reads, too."""
    async with started(tmp_path, pooling_server()) as (fake, reference):
        fake.root = "org/model"
        with pytest.raises(ReferenceFailure, match="nor is it a hub cache that has org/model"):
            await reference.start()
        model = tmp_path / "models--org--model"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("abc")
        (model / "snapshots").mkdir()
        (model / "snapshots" / "abc").symlink_to(folder)
        assert (await reference.start()).folder == model / "snapshots" / "abc"
        async with reference_on(fake, model) as of_the_model:
            assert (await of_the_model.start()).folder == model / "snapshots" / "abc"
        async with reference_on(fake, tmp_path / "gone") as without:
            with pytest.raises(ReferenceFailure, match="gone is no folder"):
                await without.start()


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"normalized": True}, "bad_answer", "use_activation"),
        ({"task": "embed"}, "refused", "token_embed"),
        ({"short": True}, "short_answer", "positions"),
        ({"not_finite": True}, "bad_answer", "NaN"),
        ({"status": 503}, "busy", "503"),
        ({"endless": 1024 * MIB}, "too_large", "more than"),
        ({"endless": 256 * MIB, "bomb": True}, "bad_answer", "gzip"),
    ],
)
async def test_servers_that_cannot_be_used_are_refused_at_the_start(
    change: dict[str, Any], reason: str, words: str, folder: Path
) -> None:
    async with started(folder, pooling_server(**change)) as (_, reference):
        with pytest.raises(ReferenceFailure, match=words) as failure:
            await reference.start()
        assert failure.value.reason == reason
        assert "\n" not in str(failure.value)


async def test_another_checkpoint_is_refused_at_the_start(tmp_path: Path, folder: Path) -> None:
    other = FakePooling(TEXT)
    other.weight = np.ascontiguousarray(other.weight[:, ::-1])
    narrow = FakePooling(TEXT)
    narrow.weight = np.ascontiguousarray(narrow.weight[:, :256])
    few = FakePooling(TEXT)
    few.weight = np.ascontiguousarray(few.weight[:116])
    folders = {
        "another model": other.save(tmp_path / "other"),
        "256 columns": narrow.save(tmp_path / "narrow"),
        "116 rows": few.save(tmp_path / "few", vocab_size=116),
        "is not modelled": FakePooling(TEXT).save(tmp_path / "new", logits_temper=2.0),
        "no .safetensors": tmp_path / "empty",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"vocab_size": 512}')
    link = tmp_path / "link"
    async with started(link, pooling_server()) as (_, reference):
        for words, wrong in folders.items():
            point(link, wrong)
            with pytest.raises(ReferenceFailure, match=words) as failure:
                await reference.start()
            assert failure.value.reason == "head"
            assert "\n" not in str(failure.value)
            with pytest.raises(ReferenceFailure, match="not been started"):
                await reference.score(ScoreRequest(*request_of(0, 3, 4, 2)))
        point(link, folder)
        assert (await reference.start()).offer is Offer.STATES


async def test_without_the_head_lists_are_used_where_the_address_generates_too(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a router, that is: a vLLM server that pools does not generate."""
    other = FakePooling(TEXT)
    other.weight = np.ascontiguousarray(other.weight[:, ::-1])
    wrong = other.save(tmp_path / "other")
    link = point(tmp_path / "link", wrong)
    async with started(link, pooling_server()) as (fake, reference):
        with pytest.raises(ReferenceFailure, match=r"another model.*only pools gives no lists") as failure:
            await reference.start()
        assert failure.value.reason == "head"
        assert "\n" not in str(failure.value)
        fake.routed = True
        for _ in range(2):
            info = await reference.start()
            assert (info.offer, info.full_vocabulary, info.exact_with) == (
                Offer.LISTS,
                False,
                "correct reference.folder",
            )
            assert info.figures_follow.startswith("bounds: top ids only (its hidden states are not used: the output")
        assert [r.levelname for r in caplog.records if "hidden states are not used" in r.message] == ["WARNING"]
        assert (await reference.score(ScoreRequest(*request_of(0, 3, 4, 2)))).entropy is None
        fake.pooling.status = 503
        with pytest.raises(ReferenceFailure) as failure:
            await reference.start()
        assert failure.value.reason == "busy", "a server that is busy has not lost its hidden states"
        fake.pooling.status = None
        point(link, folder)
        info = await reference.start()
        assert (info.offer, info.exact_with) == (Offer.STATES, "")


async def test_another_revision_is_no_reason_for_lists(folder: Path) -> None:
    async with started(folder, pooling_server()) as (fake, reference):
        await reference.start()
        fake.routed, fake.pooling.revision = True, 1
        with pytest.raises(ReferenceFailure) as failure:
            await reference.start()
        assert failure.value.reason == "revision"


async def test_another_revision_behind_the_same_name_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(folder, pooling_server(noise=0.01)) as (fake, reference):
        await reference.start()
        await reference.start()  # the same model, but for its noise
        asked = request_of(0, 3, 4, 2)
        await reference.score(ScoreRequest(*asked))
        fake.pooling.revision = 1
        await reference.score(ScoreRequest(*asked))  # it is looked at now and then only
        monkeypatch.setattr(hidden_reference, "PROBE_SECONDS", 0.0)
        again = ScoreRequest(*asked)
        for attempt in (reference.score(again), reference.score(again), reference.start()):
            with pytest.raises(ReferenceFailure, match="another model or revision") as failure:
                await attempt
            assert failure.value.reason == "revision"
        fake.pooling.revision = 0
        await reference.start()
        await reference.score(ScoreRequest(*asked))


async def test_a_model_whose_tokenizer_gives_other_ids_is_checked_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(folder, pooling_server()) as (fake, reference):
        await reference.start()
        before = VllmServer.tokenize

        async def fewer(server: VllmServer, model: str, text: str) -> list[int]:
            return (await before(server, model, text))[:-1]

        monkeypatch.setattr(VllmServer, "tokenize", fewer)
        assert (await reference.start()).offer is Offer.STATES
        monkeypatch.setattr(VllmServer, "tokenize", before)
        states = fake.pooling.states
        monkeypatch.setattr(fake.pooling, "states", lambda ids: np.ascontiguousarray(states(ids)[:, ::-1]))
        with pytest.raises(ReferenceFailure, match="another model") as failure:
            await reference.start()
        assert failure.value.reason == "head"


async def test_a_checkpoint_that_was_replaced_together_with_the_model_is_read_again(tmp_path: Path) -> None:
    fake = pooling_server()
    async with started(fake.pooling.save(tmp_path), fake) as (_, reference):
        first = await reference.start()
        fake.pooling = FakePooling(TEXT, scale=0.5)
        fake.pooling.save(tmp_path)
        second = await reference.start()
        assert first.digest != second.digest
        prompt, output, ids = request_of(5, 3, 4, 2)
        scores = await reference.score(ScoreRequest(prompt, output, ids))
        rows = fake.pooling.logprobs([*prompt.tolist(), *output[:-1].tolist()])[2:]
        np.testing.assert_allclose(scores.emitted, rows[np.arange(4), output], atol=2e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": 500}, "http_error"),
        ({"status": 429}, "busy"),
        ({"status": 400}, "refused"),
        ({"short": True}, "short_answer"),
        ({"not_finite": True}, "bad_answer"),
        ({"hang": True}, "timeout"),
        ({"slow": 0.01}, "timeout"),
        ({"endless": 1024 * MIB}, "too_large"),
        ({"endless": 256 * MIB, "bomb": True}, "bad_answer"),
    ],
)
async def test_failures_of_scores_have_names(change: dict[str, Any], reason: str, folder: Path) -> None:
    async with started(folder, pooling_server()) as (fake, reference):
        await reference.start()
        reference._server._seconds = 0.5 if reason == "timeout" else 30.0
        for name, value in change.items():
            setattr(fake.pooling, name, value)
        asked = request_of(0, 2, 3, 2)
        with pytest.raises(ReferenceFailure) as failure:
            await reference.score(ScoreRequest(*asked))
        assert failure.value.reason == reason
        assert "\n" not in str(failure.value)
        assert fake.pooling.sent < 32 * MIB, "it is not read to its end"
        for name in change:
            setattr(fake.pooling, name, getattr(FakePooling, name))
        await reference.score(ScoreRequest(*asked))


async def test_what_no_server_could_score_is_refused_before_it_is_asked(folder: Path) -> None:
    async with started(folder, pooling_server()) as (fake, reference):
        await reference.start()
        fake.pooling.answered = 0
        for prompt, output, reason in ((0, 3, "empty"), (3, 0, "empty"), (2000, 50, "too_long")):
            with pytest.raises(ReferenceFailure) as failure:
                await reference.score(ScoreRequest(*request_of(0, prompt, output, 2)))
            assert failure.value.reason == reason
        assert fake.pooling.answered == 0
        await reference.score(ScoreRequest(*request_of(0, 2000, 49, 2)))  # the last token is no input


async def test_adapters_are_scored_with_while_they_are_there(folder: Path) -> None:
    fake = pooling_server()
    fake.adapters = ("sql",)
    async with started(folder, fake) as (_, reference):
        await reference.start()
        assert await reference.adapters() == {"sql"}
        await reference.score(ScoreRequest(*request_of(0, 2, 3, 2), adapter="sql"))
        assert fake.seen[-1][1]["model"] == "sql"
        fake.adapters = ()
        with pytest.raises(ReferenceFailure) as failure:
            await reference.score(ScoreRequest(*request_of(0, 2, 3, 2), adapter="sql"))
        assert failure.value.reason is FailureReason.NO_ADAPTER


async def test_a_worker_that_ends_is_started_again(folder: Path) -> None:
    async with started(folder, pooling_server()) as (_, reference):
        await reference.start()
        (pid,) = children("hemostat.reference.worker")
        os.kill(pid, signal.SIGKILL)
        reasons = set()
        async with asyncio.timeout(HANG_SECONDS):
            while True:
                try:
                    await reference.start()
                    await reference.score(ScoreRequest(*request_of(0, 2, 3, 2)))
                except ReferenceFailure as failure:
                    reasons.add(failure.reason)
                    await asyncio.sleep(0.01)
                else:
                    if reasons:
                        break
        assert reasons == {"down"}
        assert children("hemostat.reference.worker") != [pid]


async def test_requests_at_once_get_their_own_answers(folder: Path) -> None:
    async with started(folder, pooling_server()) as (fake, reference):
        await reference.start()
        asked = [request_of(n, 3 + n, 4 + n, 2) for n in range(6)]
        result = await asyncio.gather(*(reference.score(ScoreRequest(*arguments)) for arguments in asked))
        for (prompt, output, _), scores in zip(asked, result, strict=True):
            rows = fake.pooling.logprobs([*prompt.tolist(), *output[:-1].tolist()])[len(prompt) - 1 :]
            np.testing.assert_allclose(scores.emitted, rows[np.arange(len(output)), output], atol=1e-4)


async def test_the_key_is_sent(folder: Path) -> None:
    fake = pooling_server()
    fake.api_key = "k"
    async with started(folder, fake) as (_, reference):
        with pytest.raises(ReferenceFailure) as failure:
            await reference.start()
        assert failure.value.reason == "unauthorized"
    async with started(folder, fake, api_key=SecretStr("k")) as (_, reference):
        assert (await reference.start()).offer is Offer.STATES
