"""The reference in process on tiny random models of other architectures than Llama's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.support.tiny_models import CONFIGS, VOCAB, WINDOW, tiny_model  # noqa: E402

from hemostat.reference.exact import nonlinearity, score  # noqa: E402

PROMPT, OUTPUT = WINDOW, 2 * WINDOW
TOP = 5


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return tiny_model(name)


@pytest.mark.parametrize("reshaped", [False, True])
def test_scores_are_those_of_one_plain_call(model: Any, reshaped: bool) -> None:
    """Also where the noise floor's second shape reads the text in two pieces, longer than a sliding window."""
    ids = np.random.default_rng(1).integers(2, VOCAB, PROMPT + OUTPUT).astype(np.int32)
    prompt, output = ids[:PROMPT], ids[PROMPT:]
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, PROMPT - 1 : -1]
    logprobs = torch.log_softmax(logits.double(), -1).numpy()
    at = np.random.default_rng(2).integers(0, VOCAB, (OUTPUT, TOP)).astype(np.int32)
    result = score(model, prompt, output, at, {}, reshaped=reshaped)
    np.testing.assert_allclose(result.at, np.take_along_axis(logprobs, at.astype(np.int64), 1), atol=1e-3)
    np.testing.assert_allclose(result.emitted, logprobs[np.arange(OUTPUT), output], atol=1e-3)
    np.testing.assert_allclose(result.entropy, -(np.exp(logprobs) * logprobs).sum(1), atol=1e-3)
    np.testing.assert_allclose(result.top_logprobs, -np.sort(-logprobs, 1)[:, :TOP], atol=1e-3)


def test_hidden_states_give_the_logits_unless_these_are_capped(name: str, model: Any) -> None:
    problem = nonlinearity(model)
    if name == "gemma2":
        assert problem == "its logits are scaled or capped after the output embedding"
        return
    assert problem == ""
    ids = np.arange(2, 14, dtype=np.int32)
    result = score(model, ids[:4], ids[4:], np.zeros((8, 1), np.int32), {}, hidden=True)
    weight = model.get_output_embeddings().weight.detach().numpy()
    assert result.hidden is not None
    logits = torch.from_numpy(result.hidden @ weight.T).double()
    emitted = torch.log_softmax(logits, -1).numpy()[np.arange(8), ids[4:]]
    np.testing.assert_allclose(result.emitted, emitted, atol=1e-3)
