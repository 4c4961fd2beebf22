"""The worker's scores against the same model called directly, and what happens when the worker dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from tests.support.children import children
from tests.support.constant_profile import constant_profile
from tests.support.minutes import starting
from tests.support.records import condition
from tests.support.waiting import HANG_SECONDS

from hemostat.checkpoints.output_embedding import load as load_embedding
from hemostat.config.schema import Settings
from hemostat.reference.protocol import ReferenceFailure, ReferenceScores, ScoreRequest
from hemostat.reference.references import make_references
from hemostat.reference.transformers import TransformersReference
from hemostat.reference.worker import NICENESS
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.profiles.profile import CalibrationProfile

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 512
POSITIONS = 256


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a vocabulary of 512 and sharp enough logits to tell ids apart."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.4,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


shared = pytest.mark.asyncio(loop_scope="module")
"""Of a test that asks `reference`: in one event loop, since a worker belongs to one."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reference(tiny: Path) -> AsyncIterator[TransformersReference]:
    """One worker, since to start one takes longer than what each test asks of it."""
    reference = TransformersReference(str(tiny), threads=1)
    with starting("reference worker"):
        await reference.start()
    yield reference
    await reference.close()


def request_of(seed: int, prompt: int, output: int, width: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(VOCAB)[:width] for _ in range(output)]).astype(np.int32)
    return (
        rng.integers(0, VOCAB, prompt).astype(np.int32),
        rng.integers(0, VOCAB, output).astype(np.int32),
        ids,
    )


def direct(folder: Path, prompt: Any, output: Any) -> Any:
    """float64 [T, V] log-probabilities, from the whole sequence in one plain call."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    sequence = torch.tensor([[*prompt.tolist(), *output.tolist()]])
    with torch.inference_mode():
        logits = model(input_ids=sequence).logits[0]
    start = len(prompt) - 1
    return torch.log_softmax(logits[start : start + len(output)].double(), -1).numpy()


async def test_models_have_processes_of_their_own_from_when_they_are_needed_until_they_are_closed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is a name on the hub, read from the cache; the folder of the second is empty at first."""
    before = workers()
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    other = tmp_path / "other"
    models = {"a": "somebody/tiny", "b": str(other), "a-int8": "somebody/tiny"}
    reference = {"backend": "transformers", "models": models, "threads": 1}
    references = make_references(Settings.model_validate({"upstream": {"url": "http://a"}, "reference": reference}))
    assert references is not None
    other.mkdir()
    try:
        result = {name: references.of(name, is_first=name == "a") for name in (*models, "c")}
        assert result["c"] is None
        assert result["a"] is result["a-int8"]
        assert workers() == before
        a, b = result["a"], result["b"]
        assert isinstance(a, TransformersReference)
        assert isinstance(b, TransformersReference)

        with pytest.raises(ReferenceFailure, match="does not load") as failure:
            await b.start()
        assert str(other) in str(failure.value)
        assert "\n" not in str(failure.value)
        torch.manual_seed(1)
        config = transformers.AutoConfig.from_pretrained(tiny)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(other)

        infos = [await a.start(), await b.start()]
        assert len(workers()) == len(before) + 2
        asked = request_of(3, 6, 4, 3)
        for made, folder, info in ((a, tiny, infos[0]), (b, other, infos[1])):
            assert await made.start() == info
            assert (info.vocab_size, info.full_vocabulary, info.dtype) == (VOCAB, True, "bfloat16")
            check(await made.score(ScoreRequest(*asked)), direct(folder, *asked[:2]), asked[1], asked[2], 0.05)
        assert [info.folder for info in infos] == [repository / "snapshots" / commit, other]
        np.testing.assert_array_equal(load_embedding(infos[0].folder, VOCAB), output_embedding(tiny))
    finally:
        await references.close()
    assert workers() == before
    for made in (a, b):
        with pytest.raises(ReferenceFailure):
            await made.score(ScoreRequest(*asked))
        with pytest.raises(ReferenceFailure):
            await made.start()
    assert workers() == before


def check(scores: ReferenceScores, logprobs: Any, output: Any, ids: Any, atol: float) -> None:
    rows = np.arange(len(output))
    wanted = np.where(ids >= 0, np.take_along_axis(logprobs, np.maximum(ids, 0).astype(int), 1), np.nan)
    np.testing.assert_allclose(scores.at, wanted, atol=atol)
    np.testing.assert_allclose(scores.emitted, logprobs[rows, output], atol=atol)
    np.testing.assert_allclose(scores.entropy, -(np.exp(logprobs) * logprobs).sum(1), atol=atol)
    np.testing.assert_allclose(scores.top.logprobs, -np.sort(-logprobs, 1)[:, : ids.shape[1]], atol=atol)
    np.testing.assert_allclose(
        np.take_along_axis(logprobs, scores.top.ids.astype(int), 1), scores.top.logprobs, atol=atol
    )


@pytest.mark.parametrize(("prompt", "output", "width"), [(1, 1, 1), (5, 9, 21), (40, 100, 6), (156, 101, 3)])
@shared
async def test_scores_are_those_of_the_model(
    tiny: Path, reference: TransformersReference, prompt: int, output: int, width: int
) -> None:
    tokens, emitted, ids = request_of(prompt, prompt, output, width)
    ids[0, -1] = -1
    scores = await reference.score(ScoreRequest(tokens, emitted, ids))
    check(scores, direct(tiny, tokens, emitted), emitted, ids, 1e-5)


@pytest.mark.parametrize("chunk", [1 << 24, 7 * VOCAB])
@shared
async def test_given_a_set_of_ids_everything_is_conditional_on_it(
    tiny: Path, reference: TransformersReference, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the worker, and in pieces of the positions."""
    from hemostat.reference import exact, full_scores

    tokens, emitted, ids = request_of(8, 12, 40, 21)
    rng = np.random.default_rng(8)
    masks = rng.random((40, VOCAB)) < 0.1
    masks[0] = np.arange(VOCAB) == emitted[0]
    masks[1] = True
    masks[np.arange(40), emitted] = True
    allowed = AllowedSets(
        VOCAB, np.packbits(masks, axis=1, bitorder="little").view(np.uint32), np.arange(40, dtype=np.int32)
    )
    profile = constant_profile("tiny", rng.normal(size=VOCAB), clamp_nats=1.0)
    up, codes = profile.parameters["up"], np.ones((40, 1), np.float32)
    bias = np.clip(up[:, 0].astype(np.float64), -1.0, 1.0)
    logprobs = condition(direct(tiny, tokens, emitted), masks)
    if chunk < 1 << 24:
        monkeypatch.setattr(full_scores, "CHUNK_ELEMENTS", chunk)
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="auto").eval()
        basis = full_scores.Basis(torch.tensor(up), 1.0)
        inside = exact.score(model, tokens, emitted, ids, {"b": basis}, {"b": codes}, allowed=allowed)
        at, top_ids, top, entropy, expected = (
            inside.at,
            inside.top_ids,
            inside.top_logprobs,
            inside.entropy,
            inside.expected["b"],
        )
    else:
        scores = await reference.score(
            ScoreRequest(tokens, emitted, ids, (profile,), {profile.version: codes}, allowed=allowed)
        )
        at, top_ids, top = scores.at, scores.top.ids, scores.top.logprobs
        assert scores.entropy is not None
        entropy, expected = scores.entropy, scores.expected_shift[profile.version]
        np.testing.assert_allclose(scores.emitted, logprobs[np.arange(40), emitted], atol=1e-5)
    p = np.exp(logprobs)
    np.testing.assert_allclose(at, np.take_along_axis(logprobs, ids.astype(int), 1), atol=1e-5)
    np.testing.assert_allclose(entropy, -np.where(p > 0, p * np.where(p > 0, logprobs, 0.0), 0.0).sum(1), atol=1e-5)
    np.testing.assert_allclose(expected, (p * bias).sum(1), atol=1e-5)
    assert ((top_ids >= 0).sum(1) == np.minimum(21, masks.sum(1))).all()
    np.testing.assert_allclose(top, -np.sort(-logprobs, 1)[:, :21], atol=1e-5)
    # The next request has no set.
    check(await reference.score(ScoreRequest(tokens, emitted, ids)), direct(tiny, tokens, emitted), emitted, ids, 1e-5)
    with pytest.raises(ReferenceFailure) as refused:
        await reference.score(ScoreRequest(tokens, emitted[:9], ids[:9], allowed=allowed))
    assert refused.value.reason == "vocabulary"


async def test_chunks_join_without_a_seam(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hemostat.reference import exact, full_scores

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="auto").eval()
    tokens, emitted, ids = request_of(3, 10, 50, 4)
    bases = {"b": full_scores.Basis(torch.linspace(-1, 1, VOCAB)[:, None].half(), 1.0)}
    codes = {"b": np.ones((50, 1), np.float32)}
    whole = exact.score(model, tokens, emitted, ids, bases, codes)
    monkeypatch.setattr(full_scores, "CHUNK_ELEMENTS", 7 * VOCAB)
    parts = exact.score(model, tokens, emitted, ids, bases, codes)
    for name in ("at", "top_logprobs", "emitted", "entropy"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-6)
    np.testing.assert_allclose(parts.expected["b"], whole.expected["b"], atol=1e-6)
    np.testing.assert_array_equal(parts.top_ids, whole.top_ids)


def output_embedding(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.get_output_embeddings().weight.detach().float().numpy()


def contextual(seed: int, rank: int, clamp: float, vocab_size: int = VOCAB) -> CalibrationProfile:
    rng = np.random.default_rng(seed)
    return CalibrationProfile(
        family="contextual",
        model="",
        vocab_size=vocab_size,
        parameters={
            "anchors": np.arange(6, dtype=np.int32),
            "linear": rng.normal(0, 1, (rank, 6)).astype(np.float32),
            "offset": rng.normal(0, 1, rank).astype(np.float32),
            "fisher": np.eye(rank, dtype=np.float32),
            "kl_limit": np.float32(1e30),
            "up": rng.normal(0, 0.5, (vocab_size, rank)).astype(np.float16),
        },
        clamp_nats=clamp,
        metadata={},
    )


@shared
async def test_expected_shift_of_a_contextual_profile_is_exact_where_its_code_is_known(
    tiny: Path, reference: TransformersReference
) -> None:
    tokens, emitted, ids = request_of(1, 7, 20, 3)
    probabilities = np.exp(direct(tiny, tokens, emitted))
    first, second, uncoded = contextual(1, 3, 0.7), contextual(2, 5, 2.0), contextual(4, 2, 1.0)
    codes = {
        p.version: np.random.default_rng(n).normal(0, 1, (20, p.parameters["up"].shape[1])).astype(np.float32)
        for n, p in enumerate((first, second))
    }
    # The worker holds what the last call named: the order makes it keep, forget and take in again.
    for asked in ((first, uncoded), (second, first), (), (second,), (first,)):
        scores = await reference.score(ScoreRequest(tokens, emitted, ids, asked, codes))
        assert set(scores.expected_shift) == {p.version for p in asked}
        for p in set(asked) - {uncoded}:
            shift = codes[p.version].astype(float) @ p.parameters["up"].T.astype(float)
            assert (np.abs(shift) > p.clamp_nats).any(), "the clamp binds somewhere"
            wanted = (probabilities * np.clip(shift, -p.clamp_nats, p.clamp_nats)).sum(1)
            np.testing.assert_allclose(scores.expected_shift[p.version], wanted, atol=1e-5)
    unknown = await reference.score(ScoreRequest(tokens, emitted, ids, (first,)))
    assert np.isnan(unknown.expected_shift[first.version]).all(), "no features, no code"
    foreign = contextual(3, 3, 1.0, VOCAB + 1)
    foreign_codes = {foreign.version: codes[first.version]}
    unknown = await reference.score(ScoreRequest(tokens, emitted, ids, (foreign,), foreign_codes))
    assert np.isnan(unknown.expected_shift[foreign.version]).all()
    for bad in (codes[first.version][:-1], codes[first.version][:, :2]):
        with pytest.raises(ReferenceFailure, match=r"\(20, 3\)") as failure:
            await reference.score(ScoreRequest(tokens, emitted, ids, (first,), {first.version: bad}))
        assert failure.value.reason == "code"


@shared
async def test_hidden_states_are_what_the_logits_are_made_of(tiny: Path, reference: TransformersReference) -> None:
    info = await reference.start()
    assert (info.hidden_size, info.hidden_detail, info.folder) == (32, "", tiny)
    tokens, emitted, ids = request_of(5, 9, 12, 3)
    assert (await reference.score(ScoreRequest(tokens, emitted, ids))).hidden is None
    scores = await reference.score(ScoreRequest(tokens, emitted, ids, hidden=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="auto").eval()
    with torch.inference_mode():
        states = model.model(input_ids=torch.tensor([[*tokens, *emitted]])).last_hidden_state[0].float().numpy()
    assert scores.hidden is not None
    assert scores.hidden.dtype == np.float32
    np.testing.assert_allclose(scores.hidden, states[8:20], atol=0.02, rtol=0.02)
    logits = scores.hidden @ model.lm_head.weight.detach().float().numpy().T
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    check(scores, direct(tiny, tokens, emitted), emitted, ids, 1e-5)
    np.testing.assert_allclose(logprobs[np.arange(12), emitted], scores.emitted, atol=0.05)


@shared
async def test_another_shape_gives_nearly_the_same_and_forgets_nothing(
    tiny: Path, reference: TransformersReference
) -> None:
    prompt, output, ids = request_of(3, prompt=7, output=12, width=6)
    bias = constant_profile("m", np.linspace(-0.5, 0.5, VOCAB), 1.0)
    codes = {bias.version: np.ones((12, 1), np.float32)}
    before = await reference.score(ScoreRequest(prompt, output, ids, (bias,), codes))
    again = await reference.score(ScoreRequest(prompt, output, ids, reshaped=True))
    check(again, direct(tiny, prompt, output), output, ids, atol=0.05)
    assert np.abs(again.at - before.at).max() < 0.05
    assert again.expected_shift == {}
    after = await reference.score(ScoreRequest(prompt, output, ids, (bias,), codes))
    np.testing.assert_array_equal(after.expected_shift[bias.version], before.expected_shift[bias.version])
    # One token after one: there is nothing to cut in two.
    scores = await reference.score(ScoreRequest(prompt[:1], output[:1], ids[:1], reshaped=True))
    check(scores, direct(tiny, prompt[:1], output[:1]), output[:1], ids[:1], atol=0.05)


def test_logits_that_are_no_linear_map_are_found_out(tiny: Path) -> None:
    from hemostat.reference.exact import nonlinearity

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="auto").eval()
    assert nonlinearity(model) == ""
    plain = model.lm_head.forward
    for name, behind in {"capped": lambda z: 5 * torch.tanh(z / 5), "scaled": lambda z: z / 8}.items():
        model.lm_head.forward = lambda h, behind=behind: behind(plain(h))
        assert "scaled or capped" in nonlinearity(model), name
    model.lm_head.forward = plain
    model.lm_head.bias = torch.nn.Parameter(torch.ones(VOCAB))
    assert "bias" in nonlinearity(model)
    model.get_output_embeddings = lambda: None
    assert "no output embedding" in nonlinearity(model)


@shared
async def test_what_cannot_be_scored_is_refused_by_name_and_the_worker_continues(
    reference: TransformersReference,
) -> None:
    nothing = np.zeros(0, np.int32)
    tokens, emitted, ids = request_of(0, POSITIONS, 2, 2)
    for prompt, output, reason in [
        (tokens, emitted, "too_long"),
        (nothing, emitted, "empty"),
        (tokens, nothing, "empty"),
    ]:
        with pytest.raises(ReferenceFailure) as failure:
            await reference.score(ScoreRequest(prompt, output, ids[: len(output)]))
        assert failure.value.reason == reason
    assert await reference.adapters() == frozenset()
    tokens, emitted, ids = request_of(0, POSITIONS, 1, 2)
    with pytest.raises(ReferenceFailure) as failure:
        await reference.score(ScoreRequest(tokens, emitted, ids, adapter="sql"))
    assert failure.value.reason == "no_adapter"
    assert (await reference.score(ScoreRequest(tokens, emitted, ids))).emitted.shape == (1,)
    ids[0, 0] = VOCAB
    with pytest.raises(ReferenceFailure, match="vocabulary of 512") as failure:
        await reference.score(ScoreRequest(tokens, emitted, ids))
    assert failure.value.reason == "vocabulary"
    with pytest.raises(ReferenceFailure):  # the tiny checkpoint has no tokenizer
        await reference.tokenize("x")
    ids[0, 0] = 0
    await reference.score(ScoreRequest(tokens, emitted, ids))


@shared
async def test_a_prompt_id_outside_of_the_vocabulary_is_a_failure_not_a_crash(reference: TransformersReference) -> None:
    tokens, emitted, ids = request_of(0, 4, 2, 2)
    tokens[1] = VOCAB + 5
    with pytest.raises(ReferenceFailure):
        await reference.score(ScoreRequest(tokens, emitted, ids))
    tokens[1] = 0
    await reference.score(ScoreRequest(tokens, emitted, ids))


def workers(parent: int | None = None) -> list[int]:
    return children("hemostat.reference.worker", parent)


@shared
async def test_a_killed_worker_fails_what_is_under_way_and_comes_back(reference: TransformersReference) -> None:
    tokens, emitted, ids = request_of(0, 5, 5, 2)
    (pid,) = workers()
    os.kill(pid, signal.SIGSTOP)  # so that the requests are certainly under way
    try:
        scoring = [asyncio.create_task(reference.score(ScoreRequest(tokens, emitted, ids))) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in scoring)
    finally:
        os.kill(pid, signal.SIGKILL)
    for outcome in await asyncio.wait_for(asyncio.gather(*scoring, return_exceptions=True), 60):
        assert isinstance(outcome, ReferenceFailure)
        assert outcome.reason == "down"
    with pytest.raises(ReferenceFailure):
        await reference.score(ScoreRequest(tokens, emitted, ids))
    async with asyncio.timeout(60):
        while True:
            try:
                assert (await reference.score(ScoreRequest(tokens, emitted, ids))).emitted.shape == (5,)
                break
            except ReferenceFailure:
                await asyncio.sleep(0.1)
    assert workers() != [pid]


@shared
async def test_a_caller_that_gives_up_affects_no_other(tiny: Path, reference: TransformersReference) -> None:
    tokens, emitted, ids = request_of(0, 50, 50, 2)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reference.score(ScoreRequest(tokens, emitted, ids)), 0.0001)
    tokens, emitted, ids = request_of(9, 6, 7, 2)
    check(await reference.score(ScoreRequest(tokens, emitted, ids)), direct(tiny, tokens, emitted), emitted, ids, 1e-5)


def test_the_digest_follows_the_weights(tiny: Path, tmp_path: Path) -> None:
    from hemostat.checkpoints.checkpoint_digest import checkpoint_digest

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert checkpoint_digest(str(copy), None) == checkpoint_digest(str(tiny), None)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert checkpoint_digest(str(copy), None) != checkpoint_digest(str(tiny), None)


def test_the_worker_ends_with_its_parent(tiny: Path) -> None:
    """Kill the parent with SIGKILL: nobody is left to tell the worker."""
    script = (
        "import asyncio\n"
        "from hemostat.reference.transformers import TransformersReference\n"
        f"asyncio.run(TransformersReference({str(tiny)!r}, threads=1).start())\n"
    )
    deadline = time.monotonic() + HANG_SECONDS
    niceness = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        # Its niceness is the last thing that a child sets of itself, before it loads anything.
        while not (found := workers(parent.pid)) or os.getpriority(os.PRIO_PROCESS, found[0]) != niceness:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (worker,) = found
        os.kill(worker, signal.SIGSTOP)  # so that it cannot end by itself, at the end of its input
        parent.kill()
    while Path(f"/proc/{worker}").exists() and " Z " not in Path(f"/proc/{worker}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow  # the demo's figures are those of a real model, too
@pytest.mark.vllm
async def test_a_real_model(checkpoints: Any) -> None:
    reference = TransformersReference(str(checkpoints.reference), threads=2)
    try:
        info = await reference.start()
        assert info.vocab_size == 49152
        prompt = np.array(
            await reference.render([{"role": "user", "content": "What is the capital of France?"}]), np.int32
        )
        output = np.array(await reference.tokenize("The capital of France is Paris."), np.int32)
        ids = np.random.default_rng(0).integers(0, info.vocab_size, (len(output), 5)).astype(np.int32)
        scores = await reference.score(ScoreRequest(prompt, output, ids, hidden=True))
        exact = direct(checkpoints.reference, prompt, output)
        check(scores, exact, output, ids, 1e-4)
        assert scores.hidden is not None
        assert scores.hidden.shape == (len(output), info.hidden_size) == (len(output), 576)
        weight = output_embedding(checkpoints.reference)
        logits = scores.hidden.astype(np.float64) @ weight.T
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        # The model rounds its logits to bfloat16, 8 bits.
        np.testing.assert_allclose(logprobs, exact, atol=0.2)
        assert np.abs(logprobs - exact).mean() < 0.05
        assert scores.emitted[-2] > np.log(0.5)  # " Paris"
    finally:
        await reference.close()
