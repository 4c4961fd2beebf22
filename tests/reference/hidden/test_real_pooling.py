"""The reference on a real vLLM pooling server beside the same checkpoint in transformers; how a real server answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hemostat.reference.hidden.pooling import POOLING_ARGUMENTS, find_offer, hidden_states
from hemostat.reference.hidden.probe import MAX_SAME_DISTANCE, TEXT, distance
from hemostat.reference.on_server import ServerReference
from hemostat.reference.protocol import Offer, ReferenceFailure, ScoreRequest
from hemostat.reference.server import Refused, VllmServer
from hemostat.reference.transformers import TransformersReference
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.vllm_server import VllmServer as VllmProcess

pytestmark = [pytest.mark.vllm, pytest.mark.slow]  # a server of its own

MAX_LENGTH = 1024
CHUNK = 256
"""Tokens of one step of the engine: longer prompts are prefilled in chunks."""


@pytest.fixture(scope="module")
def pooling_url(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("pooling") / "vllm.log"
    arguments = [
        *("--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", str(MAX_LENGTH)),
        *("--enable-chunked-prefill", "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "8"),
        *POOLING_ARGUMENTS,
    ]
    server = VllmProcess(checkpoints.reference, "reference", log, arguments)
    try:
        server.start()
        server.wait_ready(600.0, progress=print)
        yield server.url
    finally:
        server.stop()


def prompt_and_output(texts: list[int], prompt: int, output: int) -> tuple[Any, Any]:
    tokens = np.array((texts * 20)[: prompt + output], np.int32)
    return tokens[:prompt], tokens[prompt:]


async def test_figures_are_those_of_the_model_in_process(pooling_url: str, checkpoints: Any) -> None:
    """Also of prompts that are longer than a chunk of the prefill. What differs is the noise between two
    implementations: 0.003 nats of KL. A position off by one would be above 1."""
    served = ServerReference(pooling_url, top_k=20, folder=checkpoints.reference)
    local = TransformersReference(str(checkpoints.reference), vllm_process.dtype())
    try:
        info, there = await served.start(), await local.start()
        assert (info.offer, info.full_vocabulary) == (Offer.STATES, True)
        assert (info.vocab_size, info.hidden_size) == (there.vocab_size, there.hidden_size) == (49152, 576)
        assert info.digest == there.digest, "what was learned from the one is of use with the other"
        text = await served.tokenize(TEXT)
        assert text == await local.tokenize(TEXT)
        for prompt, output in (prompt_and_output(text, 12, 40), prompt_and_output(text, 500, 100)):
            width = np.zeros((len(output), 20), np.int32)
            ids = (await local.score(ScoreRequest(prompt, output, width))).top.ids
            ours = await served.score(ScoreRequest(prompt, output, ids, hidden=True))
            theirs = await local.score(ScoreRequest(prompt, output, ids, hidden=True))
            assert ours.entropy is not None
            assert theirs.entropy is not None
            assert np.abs(ours.emitted - theirs.emitted).mean() < 0.15
            assert np.abs(ours.entropy - theirs.entropy).mean() < 0.15
            gap = (np.exp(theirs.at) * (theirs.at - ours.at)).sum(1)
            assert abs(gap.mean()) < 0.03
            assert (ours.top.ids[:, 0] == theirs.top.ids[:, 0]).mean() > 0.85
            assert ours.hidden is not None
            assert theirs.hidden is not None
            far = np.linalg.norm(ours.hidden - theirs.hidden, axis=1) / np.linalg.norm(theirs.hidden, axis=1)
            assert far.mean() < 0.1
            again = await served.score(ScoreRequest(prompt, output, ids, reshaped=True))
            assert np.abs(again.emitted - ours.emitted).mean() < 0.1
        chat = [{"role": "user", "content": "Hello"}]
        assert await served.render(chat) == await local.render(chat)
        assert await served.adapters() == frozenset()
        with pytest.raises(ReferenceFailure) as failure:
            await served.score(ScoreRequest(*prompt_and_output(text, MAX_LENGTH, 2), np.zeros((2, 1), np.int32)))
        assert failure.value.reason == "too_long"
        longest = prompt_and_output(text, MAX_LENGTH - 3, 4)
        assert len((await served.score(ScoreRequest(*longest, np.zeros((4, 1), np.int32)))).emitted) == 4
    finally:
        await served.close()
        await local.close()


async def test_a_pooling_server_is_recognized_and_does_not_generate(pooling_url: str) -> None:
    server = VllmServer(pooling_url)
    try:
        ids = await server.tokenize("reference", TEXT)
        result = await find_offer(server, "reference", ids)
        assert result.offer is Offer.STATES
        again = await hidden_states(server, "reference", ids, 576)
        assert result.states is not None
        assert distance(again, result.states) < MAX_SAME_DISTANCE / 4
        beside = await hidden_states(server, "reference", ids, 576, first=7, reshaped=True)
        assert distance(beside, result.states[7:]) < MAX_SAME_DISTANCE / 2
        with pytest.raises(Refused) as refused:
            await server.post("/v1/completions", {"model": "reference", "prompt": [1, 2], "max_tokens": 1}, dict)
        assert refused.value.status in {400, 404}
        with pytest.raises(Refused):
            await hidden_states(server, "reference", [1] * (MAX_LENGTH + 1), 576)
        with pytest.raises(Refused):
            await hidden_states(server, "nobody", ids, 576)
        with pytest.raises(ReferenceFailure, match="neither generates nor returns"):
            await find_offer(server, "reference", [49152, 49153])
    finally:
        await server.close()


async def test_another_model_than_the_checkpoint_is_found(pooling_url: str, checkpoints: Any, tmp_path: Path) -> None:
    """The same model's embedding with its columns in another order: the head of nothing."""
    served = ServerReference(pooling_url, folder=with_columns_reversed(checkpoints.reference, tmp_path))
    try:
        with pytest.raises(ReferenceFailure, match="does not fit the server's hidden states") as failure:
            await served.start()
        assert failure.value.reason == "head"
    finally:
        await served.close()


def with_columns_reversed(source: Path, folder: Path) -> Path:
    import shutil

    from hemostat.checkpoints.output_embedding import find

    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    stored = find(folder, 49152).weight
    weight: npt.NDArray[np.uint16] = np.memmap(stored.file, "<u2", "r+", stored.start, stored.shape)
    weight[:] = weight[:, ::-1].copy()
    weight.flush()  # type: ignore[attr-defined]
    return folder
