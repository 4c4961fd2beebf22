"""Reading piece by piece, and generation, for models with a KV cache and with a recurrent state."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support.tiny_models import CONFIGS, RECURRENT, VOCAB, WINDOW, tiny_model  # noqa: E402

from hemostat.checkpoints.architectures import is_recurrent  # noqa: E402
from hemostat.checkpoints.piecewise import STATE_NAMES, PiecewiseReader, StatelessModelError  # noqa: E402
from hemostat_lab.models.generation import generate  # noqa: E402

LENGTH = 3 * WINDOW


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def ids(rows: int, length: int, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).integers(2, VOCAB, (rows, length)))


def test_which_models_are_recurrent() -> None:
    assert {name for name in CONFIGS if is_recurrent(tiny_model(name))} == set(RECURRENT)


@pytest.mark.parametrize("cuts", [[1], [LENGTH // 2], [5, 6, 17], [LENGTH - 1]])
def test_pieces_equal_the_whole(model: Any, cuts: list[int]) -> None:
    """Also where the pieces are longer than a sliding window."""
    text = ids(2, LENGTH)
    with torch.inference_mode():
        whole = model(input_ids=text).logits
        reader = PiecewiseReader(model)
        pieces = [reader.read(piece) for piece in text.tensor_split(cuts, dim=1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("keep", [1, 3])
def test_last_positions_of_a_piece(model: Any, keep: int) -> None:
    text = ids(1, LENGTH)
    with torch.inference_mode():
        whole = model(input_ids=text).logits
        reader = PiecewiseReader(model)
        for begin, end in ((0, 10), (10, LENGTH)):
            logits = reader.read(text[:, begin:end], keep=keep)
            assert logits.shape == (1, keep, VOCAB)
            assert (logits - whole[:, end - keep : end]).abs().max() < 1e-4 * whole.abs().max()


def test_transformers_mamba_would_start_a_second_piece_from_an_empty_state() -> None:
    """Why a recurrent model reads it token by token. If this fails, transformers has corrected it."""
    model, text = tiny_model("mamba"), ids(1, LENGTH)
    with torch.inference_mode():
        whole = model(input_ids=text).logits
        first = model(input_ids=text[:, :10], use_cache=True)
        name = next(name for name in STATE_NAMES if name in first)
        second = model(input_ids=text[:, 10:], use_cache=True, **{name: first[name]}).logits
    assert (second - whole[:, 10:]).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.parametrize("greedy", [True, False])
def test_generated_text_is_that_of_one_prompt_at_a_time(model: Any, greedy: bool) -> None:
    """Of unequal lengths, and with more than one of a length; each text also equals generation without any state."""
    lengths = [4, 11, 4, 9, 1]
    prompts = [ids(1, length, seed)[0].numpy().astype(np.int32) for seed, length in enumerate(lengths)]
    limits = [12, 5, 12, 1, 8]
    uniforms = None if greedy else [np.random.default_rng(n).random(12) for n in range(len(prompts))]
    with torch.inference_mode():
        in_one_batch = generate(model, prompts, limits, uniforms, frozenset())
        for n, text in enumerate(in_one_batch):
            own = None if uniforms is None else [uniforms[n]]
            alone = generate(model, [prompts[n]], [limits[n]], own, frozenset())[0]
            assert text.tolist() == alone.tolist()
            assert text.tolist() == without_state(model, prompts[n], limits[n], None if own is None else own[0])


def without_state(model: Any, prompt: Any, limit: int, uniforms: Any) -> list[int]:
    text = prompt.tolist()
    for n in range(limit):
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        if uniforms is None:
            text.append(int(logits.argmax()))
        else:
            total = torch.softmax(logits, -1).cumsum(0, dtype=torch.float64).numpy()
            text.append(int(np.searchsorted(total, uniforms[n] * total[-1], side="right")))
    return text[len(prompt) :]


class Renamed(torch.nn.Module):
    """A Llama that takes its state and returns it under another name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = tiny_model("llama")
        own = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

        def forward(input_ids: Any, use_cache: bool, **state: Any) -> Any:
            answer = self.model(input_ids=input_ids, use_cache=use_cache, **{own: state.get(name)})
            return SimpleNamespace(logits=answer.logits, **{name: getattr(answer, own, None)})

        parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("input_ids", "use_cache", name)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


@pytest.mark.parametrize("name", ["past_key_values", "cache_params", "cache"])
def test_every_name_of_the_state_is_known(name: str) -> None:
    """Whatever the installed transformers calls it."""
    model, text = Renamed(name), ids(1, LENGTH)
    with torch.inference_mode():
        whole = model(input_ids=text, use_cache=False).logits
        reader = PiecewiseReader(model)
        pieces = [reader.read(piece) for piece in text.tensor_split([10], dim=1)]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4 * whole.abs().max()


def test_a_model_without_a_state_cannot_continue() -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = transformers.OpenAIGPTLMHeadModel(config).eval()
    with torch.inference_mode(), pytest.raises(StatelessModelError, match="OpenAIGPTLMHeadModel keeps no state"):
        generate(model, [np.array([1, 2], np.int32)], [4], None, frozenset())
    with torch.inference_mode():
        assert PiecewiseReader(model, keep_state=False).read(ids(1, 5)).shape == (1, 5, VOCAB)
