"""The vLLM backend and the vocabulary check: against a server made here, and against a real one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from tests.support.fake_vllm import FakeVllm, running

from hemostat.config.models import Upstream
from hemostat.reference import vllm as vllm_module
from hemostat.reference.hidden.pooling import find_offer
from hemostat.reference.match import compare, same_weights
from hemostat.reference.protocol import FailureReason, Offer, ReferenceFailure, ScoreRequest
from hemostat.reference.server import VllmServer
from hemostat.reference.transformers import TransformersReference
from hemostat.reference.vllm import VllmReference
from hemostat_lab.demo import vllm_server as vllm_process


def request_of(seed: int, fake: FakeVllm, prompt: int, output: int, width: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(fake.vocab_size)[:width] for _ in range(output)]).astype(np.int32)
    tokens = rng.integers(0, fake.vocab_size, prompt + output).astype(np.int32)
    return tokens[:prompt], tokens[prompt:], ids


@pytest.mark.parametrize("top_k", [1, 5, 20])
async def test_scores_are_those_of_the_servers_model(top_k: int) -> None:
    async with running(FakeVllm()) as fake:
        reference = VllmReference(fake.url, top_k=top_k)
        info = await reference.start()
        assert (info.model, info.vocab_size, info.full_vocabulary) == ("fake", 512, False)
        prompt, output, ids = request_of(top_k, fake, 7, 12, 30)
        ids[0, 0], ids[1, 0] = -1, output[1]
        scores = await reference.score(ScoreRequest(prompt, output, ids))
        tokens = [*prompt.tolist(), *output.tolist()]
        rows = np.stack([fake.logprobs(tokens[:end]) for end in range(len(prompt), len(tokens))])
        np.testing.assert_allclose(scores.emitted, rows[np.arange(12), output])
        np.testing.assert_array_equal(scores.top.ids, (-rows).argsort(1)[:, :top_k])
        np.testing.assert_allclose(scores.top.logprobs, -np.sort(-rows, 1)[:, :top_k])
        given = np.array([[i in (*scores.top.ids[t], output[t]) for i in ids[t]] for t in range(12)])
        assert given.any()
        np.testing.assert_allclose(
            scores.at, np.where(given, np.take_along_axis(rows, np.maximum(ids, 0).astype(int), 1), np.nan)
        )
        assert scores.entropy is None
        assert scores.expected_shift == {}
        path, body = fake.seen[-1]
        assert path == "/v1/completions"
        assert body["prompt"] == tokens
        assert (body["max_tokens"], body["temperature"], body["prompt_logprobs"]) == (1, 0.0, top_k)
        await reference.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": 500}, "http_error"),
        ({"status": 503}, "busy"),
        ({"status": 429}, "busy"),
        ({"status": 400}, "refused"),
        ({"max_logprobs": 4}, "refused"),
        ({"api_key": "other"}, "unauthorized"),
        ({"short_prompt_logprobs": True}, "short_answer"),
        ({"replace_body": '{"choices": []}'}, "short_answer"),
        ({"replace_body": '{"choices": [{}]}'}, "short_answer"),
        ({"replace_body": '{"choices": [{"prompt_logprobs": [null, {}, {}, {}, {}]}]}'}, "short_answer"),
        ({"replace_body": '{"choices": [{"prompt_logprobs": [1, 2, 3, 4, "x"]}]}'}, "bad_answer"),
        ({"replace_body": "<html>"}, "bad_answer"),
        ({"hang": True}, "timeout"),
    ],
)
async def test_failures_have_names(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(FakeVllm(api_key="k")) as fake:
        reference = VllmReference(fake.url, SecretStr("k"), top_k=5)
        await reference.start()
        impatient = VllmServer(fake.url, SecretStr("k"), timeout=0.5)
        reference.set_server(impatient)
        for name, value in change.items():
            setattr(fake, name, value)
        prompt, output, ids = request_of(0, fake, 2, 3, 2)
        with pytest.raises(ReferenceFailure) as failure:
            await reference.score(ScoreRequest(prompt, output, ids))
        assert failure.value.reason == reason
        assert "\n" not in str(failure.value)
        await impatient.close()
        await reference.close()


async def test_adapters_are_scored_with_while_they_are_there() -> None:
    async with running(FakeVllm(adapters=("sql", "chat"))) as fake:
        reference = VllmReference(fake.url, top_k=5)
        assert (await reference.start()).model == "fake"
        assert await reference.adapters() == {"sql", "chat"}
        asked = request_of(0, fake, 2, 3, 2)
        await reference.score(ScoreRequest(*asked, adapter="sql"))
        await reference.score(ScoreRequest(*asked))
        assert [body["model"] for path, body in fake.seen[-2:]] == ["sql", "fake"]
        fake.adapters = ("chat",)
        with pytest.raises(ReferenceFailure, match="sql") as failure:
            await reference.score(ScoreRequest(*asked, adapter="sql"))
        assert failure.value.reason == "no_adapter"
        assert await reference.adapters() == {"chat"}
        fake.status = 404
        with pytest.raises(ReferenceFailure) as failure:
            await reference.score(ScoreRequest(*asked))
        assert failure.value.reason == "http_error", "that the model itself has gone says something of its health"
        await reference.close()


async def test_logits_in_place_of_logprobs_are_refused() -> None:
    async with running(FakeVllm()) as fake:
        reference = VllmReference(fake.url, top_k=1)
        await reference.start()
        fake.replace_body = '{"choices": [{"prompt_logprobs": [null, {"3": {"logprob": 12.5, "rank": 1}}]}]}'
        ids = np.array([3], np.int32)
        with pytest.raises(ReferenceFailure, match="raw_logprobs"):
            await reference.score(ScoreRequest(ids, ids, ids[:, None]))
        await reference.close()


async def test_too_long_never_reaches_the_server() -> None:
    async with running(FakeVllm(max_model_len=10)) as fake:
        reference = VllmReference(fake.url, top_k=2)
        await reference.start()
        asked = len(fake.seen)
        with pytest.raises(ReferenceFailure) as failure:
            await reference.score(ScoreRequest(*request_of(0, fake, 5, 5, 2)))
        assert failure.value.reason == "too_long"
        assert len(fake.seen) == asked
        await reference.score(ScoreRequest(*request_of(0, fake, 5, 4, 2)))
        await reference.close()


async def test_a_server_that_is_not_there_is_down() -> None:
    async with running(FakeVllm()) as fake:
        pass
    reference = VllmReference(fake.url)
    with pytest.raises(ReferenceFailure) as failure:
        await reference.start()
    assert failure.value.reason == "down"
    assert str(failure.value) == f"{fake.url}/v1/models: Connection refused"
    await reference.close()


async def test_wrong_names_and_older_servers_are_reported() -> None:
    async with running(FakeVllm(adapters=("adapter",))) as fake:
        reference = VllmReference(fake.url, model="nope")
        with pytest.raises(ReferenceFailure, match="serves fake, adapter, not nope"):
            await reference.start()
        await reference.close()
        fake.names_vocab_size = False
        reference = VllmReference(fake.url)
        with pytest.raises(ReferenceFailure, match="vocabulary"):
            await reference.start()
        await reference.close()


@pytest.mark.parametrize(
    ("theirs", "ok", "words"),
    [
        ({}, True, "512 tokens, same ids of a probe text and of a rendered chat"),
        ({"seed": 5}, True, "same ids"),
        ({"vocab_size": 513}, False, "vocabulary: fake has 512 tokens, the reference fake has 513"),
        ({"chat_template": "hello {}"}, False, "rendered chat: fake and the reference fake differ from token 0 on"),
        ({"chat_template": None}, True, "no chat template"),
    ],
)
async def test_compare(theirs: dict[str, Any], ok: bool, words: str) -> None:
    async with running(FakeVllm()) as upstream, running(FakeVllm(**theirs)) as other:
        reference = VllmReference(other.url)
        match = await compare(Upstream(url=upstream.url), reference)
        assert (match.ok, match.compared) == (ok, True)
        assert words in match.detail
        await reference.close()


async def test_ids_of_a_text_can_differ_at_one_vocabulary_size(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(FakeVllm()) as upstream, running(FakeVllm()) as other:
        monkeypatch.setattr(other, "encode", lambda text: upstream.encode(text)[:-1])
        reference = VllmReference(other.url)
        match = await compare(Upstream(url=upstream.url), reference)
        assert (match.ok, match.compared) == (False, True)
        assert "probe text" in match.detail
        assert "against nothing" in match.detail
        await reference.close()


async def test_an_upstream_that_is_away_is_no_mismatch() -> None:
    async with running(FakeVllm()) as other:
        async with running(FakeVllm()) as upstream:
            pass
        reference = VllmReference(other.url)
        match = await compare(Upstream(url=upstream.url), reference)
        assert (match.ok, match.compared) == (False, False)
        await reference.close()
        reference = VllmReference(upstream.url)
        with pytest.raises(ReferenceFailure):
            await compare(Upstream(url=other.url), reference)
        await reference.close()


@pytest.mark.vllm
async def test_a_real_server_against_the_same_checkpoint_in_transformers(vllm_server: Any, checkpoints: Any) -> None:
    """Both run the compressed checkpoint; they agree within what the two kernels leave.

    That is 0.07 nats on average where vLLM multiplies in bfloat16, and 0.25 where it takes its int8 kernel (AMX, unless
    VLLM_CPU_INT4_W4A8=0). A position off by one would be above 1.
    """
    served = VllmReference(vllm_server.url, top_k=20)
    local = TransformersReference(str(checkpoints.compressed), vllm_process.dtype())
    try:
        assert (await served.start()).vocab_size == (await local.start()).vocab_size == 49152
        chat = [{"role": "user", "content": "Name three rivers of Europe."}]
        prompt = np.array(await served.render(chat), np.int32)
        output = np.array(
            await served.tokenize("Three rivers of Europe are the Danube, the Rhine and the Volga."), np.int32
        )
        width = np.zeros((len(output), 10), np.int32)
        ids = (await local.score(ScoreRequest(prompt, output, width))).top.ids  # what the model itself finds likely
        asked = ScoreRequest(prompt, output, ids)
        theirs, ours = await served.score(asked), await local.score(asked)
        assert np.abs(theirs.emitted - ours.emitted).mean() < 0.5
        known = ~np.isnan(theirs.at)
        assert known.mean() > 0.9
        difference = np.abs(theirs.at - ours.at)[known]
        assert difference.mean() < 0.5
        assert (theirs.top.ids[:, 0] == ours.top.ids[:, 0]).mean() > 0.7
        assert np.abs(theirs.emitted[1:] - ours.emitted[:-1]).mean() > 1.0
    finally:
        await served.close()
        await local.close()


@pytest.mark.vllm
async def test_a_real_server_that_generates_is_recognized(vllm_server: Any) -> None:
    server = VllmServer(vllm_server.url)
    try:
        result = await find_offer(server, vllm_server.model, [1, 2, 3])
        assert (result.offer, result.states) == (Offer.LISTS, None)
    finally:
        await server.close()


@pytest.mark.vllm
async def test_a_real_server_refuses_more_logprobs_than_it_allows_by_a_failure(vllm_server: Any) -> None:
    """tests/config/test_real_check.py shows that a real pair of models matches."""
    refusing = VllmServer(vllm_server.url)
    try:
        with pytest.raises(ReferenceFailure, match="max allowed: 64"):
            await refusing.post(
                "/v1/completions", {"model": "smollm2", "prompt": [1, 2], "max_tokens": 1, "prompt_logprobs": 65}, dict
            )
    finally:
        await refusing.close()


SOME_TOKENS = ScoreRequest(np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32), np.full((2, 1), -1, np.int32))


async def test_other_weights_under_the_same_name_are_noticed_and_taken_over_by_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_module, "PROBE_SECONDS", 0.0)
    async with running(FakeVllm()) as fake:
        reference = VllmReference(fake.url, top_k=5, probes=True)
        before = await reference.start()
        await reference.score(SOME_TOKENS)
        assert (await reference.start()) == before
        fake.seed = 1
        with pytest.raises(ReferenceFailure, match="it has loaded other weights") as raised:
            await reference.score(SOME_TOKENS)
        assert raised.value.reason is FailureReason.REVISION
        after = await reference.start()
        assert after.digest == before.digest, "the server does not say so"
        assert not same_weights(before.probe, after.probe)
        await reference.score(SOME_TOKENS)
        await reference.close()


async def test_between_two_probes_only_the_request_is_scored() -> None:
    async with running(FakeVllm()) as fake:
        reference = VllmReference(fake.url, top_k=5, probes=True)
        await reference.start()
        asked = len(fake.seen)
        await reference.score(SOME_TOKENS)
        assert len(fake.seen) == asked + 1
        await reference.close()


async def test_the_noise_of_a_server_is_no_change_and_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_module, "PROBE_SECONDS", 0.0)
    async with running(FakeVllm()) as fake:
        reference = VllmReference(fake.url, top_k=5, probes=True)
        first = await reference.start()
        fake.noise = 0.02
        await reference.score(SOME_TOKENS)
        assert (await reference.start()).probe == first.probe, "the first one stays"
        fake.noise = 0.2
        with pytest.raises(ReferenceFailure, match="it has loaded other weights"):
            await reference.score(SOME_TOKENS)
        await reference.close()
