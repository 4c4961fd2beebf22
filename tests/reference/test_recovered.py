"""The reference against the compressed model's recovered distribution, through the worker, and torch against numpy."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.exact import exact
from tests.support.records import log_softmax, top
from tests.support.state_recovery import compare, variances

from hemostat.reference.protocol import CompressedLogits, ReferenceFailure, ScoreRequest
from hemostat.reference.transformers import TransformersReference
from hemostat_calibration.allowed_sets import AllowedSets
from hemostat_calibration.state_recovery import recover_states

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB, D, TOKENS, ANCHORS = 512, 32, 12, 48


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


class Compressed:
    """A model with the checkpoint's output embedding and hidden states a little off, as an engine reports it."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        self.prompt = rng.integers(0, VOCAB, 9).astype(np.int32)
        self.output = rng.integers(0, VOCAB, TOKENS).astype(np.int32)
        self.weight = model.lm_head.weight.detach().float().numpy()
        caught: list[Any] = []
        model.lm_head.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
        with torch.inference_mode():
            logits = model(torch.tensor([[*self.prompt.tolist(), *self.output.tolist()]])).logits[0]
        self.reference = log_softmax(logits[8:-1].double().numpy())
        states = caught[0][0, 8:-1].float().numpy()
        self.logits = (states + 0.1 * rng.normal(size=states.shape)) @ self.weight.T
        self.truth = log_softmax(self.logits)
        self.listed = top(self.truth, 20, self.output)
        self.anchors = rng.permutation(VOCAB)[:ANCHORS].astype(np.int32)
        z = self.logits[:, self.anchors]
        self.features = (z - z.mean(1, keepdims=True)).astype(np.float16).astype(np.float32)

    @property
    def given(self) -> CompressedLogits:
        return CompressedLogits(self.anchors, self.features, self.listed.logprobs)


@pytest.fixture(scope="session")
def compressed(tiny: Path) -> Compressed:
    return Compressed(tiny)


async def test_the_worker_compares_with_the_whole_distribution(tiny: Path, compressed: Compressed) -> None:
    reference = TransformersReference(str(tiny), threads=1)
    await reference.start()
    plain = ScoreRequest(compressed.prompt, compressed.output, compressed.listed.ids)
    request = replace(plain, compressed=compressed.given)
    unknown = replace(compressed.given, anchors=compressed.anchors + VOCAB)
    try:
        features = compressed.features.copy()
        features[5] = np.nan
        scores = await reference.score(replace(plain, compressed=replace(compressed.given, features=features)))
        again = await reference.score(request)
        without = await reference.score(plain)
        sets = AllowedSets(VOCAB, np.full((1, VOCAB // 32), 0xFFFFFFFF, np.uint32), np.zeros(TOKENS, np.int32))
        conditional = await reference.score(replace(request, allowed=sets))
        with pytest.raises(ReferenceFailure, match="not all in the reference's vocabulary"):
            await reference.score(replace(plain, compressed=unknown))
        assert (await reference.score(request)).recovered is not None
    finally:
        await reference.close()
    recovered, known = scores.recovered, np.arange(TOKENS) != 5
    assert recovered is not None
    assert without.recovered is None
    assert conditional.recovered is None
    np.testing.assert_array_equal(scores.entropy, without.entropy)
    np.testing.assert_array_equal(recovered.usable, known)
    for name, value in exact(compressed.reference, compressed.truth).items():
        np.testing.assert_allclose(getattr(recovered, name)[known], value[known], rtol=0.05, atol=0.01, err_msg=name)
    assert again.recovered is not None
    for figure, other in zip(astuple(recovered), astuple(again.recovered), strict=True):
        assert np.isnan(figure[5])
        np.testing.assert_allclose(figure[known], other[known], rtol=1e-6, atol=1e-9)


def test_torch_and_numpy_say_the_same(compressed: Compressed) -> None:
    from hemostat.reference.recovered import CompressedSide

    side = CompressedSide(torch.from_numpy(compressed.weight), compressed.anchors)
    comparison = side.of(compressed.features, compressed.listed.ids, compressed.listed.logprobs)
    log_r = compressed.reference.copy()
    log_r[0, 7] = -np.inf  # 0 under the reference: infinitely far in one direction, so not known as a whole
    log_r[1, compressed.listed.ids[1, 0]] = -200.0  # underflows in float32, and is finite in its logarithm
    log_r = log_softmax(log_r)
    for rows in (slice(0, 5), slice(5, TOKENS)):
        comparison.update(rows, torch.from_numpy(log_r[rows]).float())
    result = comparison.result()
    recovery = recover_states(compressed.weight[compressed.anchors])
    expected = compare(
        log_r,
        log_softmax(recovery.states(compressed.features).astype(np.float64) @ compressed.weight.T),
        variances(recovery, compressed.weight, compressed.weight.mean(0)),
        compressed.listed.ids,
        compressed.listed.logprobs,
    )
    assert np.isinf(expected.kl_cr[0])
    for figure, other in zip(astuple(result), astuple(expected), strict=True):
        assert np.isnan(figure[0])
        np.testing.assert_allclose(figure[1:], other[1:], rtol=1e-4, atol=1e-5)
