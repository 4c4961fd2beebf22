"""A model that is computed layer by layer is the same model, and what is measured is what autograd gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import LAYERS, VOCABULARY, TinyCheckpoints, linear_names, random_texts, tiny_model

from hemostat_calibration.adapters.gram import Metric

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def opened(reference: Path, compressed: Path) -> Any:
    from hemostat_lab.adapters.pair import CheckpointPair

    return CheckpointPair.open(reference, compressed)


def test_batches_hold_every_text_once_and_little_padding() -> None:
    from hemostat_lab.models.activations import MAX_BATCH_POSITIONS, make_batches

    texts = [text.ids for text in random_texts(60)] + [np.arange(MAX_BATCH_POSITIONS + 5, dtype=np.int32)]
    batches = make_batches(texts, torch.device("cpu"))
    assert sorted(n for batch in batches for n in batch.texts) == list(range(61))
    for batch in batches:
        assert batch.ids.numel() <= MAX_BATCH_POSITIONS or len(batch.texts) == 1
        for row, n in enumerate(batch.texts):
            np.testing.assert_array_equal(batch.ids[row][batch.valid[row]].numpy(), texts[n])


def layerwise_logits(pair: Any, texts: list[Any]) -> list[Any]:
    from hemostat_lab.models.activations import embed, logits, make_batches, run_layer

    skeleton, source = pair.skeleton, pair.sources[0]
    batches = make_batches([text.ids for text in texts], skeleton.device)
    hidden, calls = embed(skeleton, source, batches)
    result: list[Any] = [None] * len(texts)
    with torch.no_grad():
        for n, layer in enumerate(skeleton.layers):
            with skeleton.loaded(skeleton.parameters_of(layer), source):
                hidden = [run_layer(skeleton, n, h, c) for h, c in zip(hidden, calls, strict=True)]
        with skeleton.loaded(skeleton.ends(), source):
            for batch, states in zip(batches, hidden, strict=True):
                rows = torch.cat([part for part, _ in logits(skeleton, batch, states, batch.valid)])
                for n, part in zip(batch.texts, rows.split(batch.valid.sum(1).tolist()), strict=True):
                    result[n] = part
    return result


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "phi"])
def test_layer_by_layer_is_the_whole_model(kind: str, tiny: TinyCheckpoints, tmp_path: Path) -> None:
    """Gemma's layers see different parts of the text, Gemma 2 caps logits; Phi has biases and LayerNorm."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    match kind:
        case "llama":
            model = tiny.model
        case "qwen3":
            config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8)
            model = transformers.Qwen3ForCausalLM(config)
        case "gemma2":
            config = transformers.Gemma2Config(
                **sizes, num_key_value_heads=1, head_dim=8, sliding_window=5, final_logit_softcapping=2.0,
                attn_logit_softcapping=1.0,
            )  # fmt: skip
            model = transformers.Gemma2ForCausalLM(config)
        case "gemma3":
            config = transformers.Gemma3TextConfig(
                **sizes, num_key_value_heads=1, head_dim=8, sliding_window=5, layer_types=["sliding_attention"] * 3
                + ["full_attention"],
            )  # fmt: skip
            model = transformers.Gemma3ForCausalLM(config)
        case _:
            model = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes))
    model = model.eval()
    folder = tiny.reference
    if kind != "llama":
        folder = tmp_path / "model"
        model.save_pretrained(folder)
    pair = opened(folder, folder)
    assert len(pair.skeleton.layers) == (LAYERS if kind == "llama" else 4)
    texts = random_texts()
    assert len({len(text) for text in texts}) > 3, "of different lengths"
    for text, logits in zip(texts, layerwise_logits(pair, texts), strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(text.ids.astype(np.int64))[None]).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert pair.skeleton.most_loaded == 1
    assert all(parameter.is_meta for parameter in pair.skeleton.model.parameters())


def test_statistics_are_those_of_autograd_on_the_whole_model(tiny: TinyCheckpoints) -> None:
    """Second moments of every layer's inputs and output gradients, with several batches of padded texts."""
    from hemostat_lab.models.activations import (
        Moments,
        embed,
        make_batches,
        measured,
        output_gradients,
        output_key,
        run_layer,
    )

    pair = opened(tiny.reference, tiny.rounded)
    skeleton, source = pair.skeleton, pair.sources[0]
    texts = random_texts()
    batches = make_batches([text.ids for text in texts], skeleton.device, max_positions=120)
    assert len(batches) > 2
    assert not all(bool(batch.valid.all()) for batch in batches)
    states = [embed(skeleton, source, batches)[0]]
    calls = embed(skeleton, source, batches)[1]
    for n, layer in enumerate(skeleton.layers):
        with torch.no_grad(), skeleton.loaded(skeleton.parameters_of(layer), source):
            states.append([run_layer(skeleton, n, h, c) for h, c in zip(states[-1], calls, strict=True)])
    gradients = output_gradients(skeleton, source, batches, states[-1], seed=3)

    # The same tokens are drawn on the whole model.
    model = tiny.model
    inputs: dict[str, list[Any]] = {name: [] for name in linear_names(model)}
    outputs: dict[str, list[Any]] = {name: [] for name in linear_names(model)}

    def hook(name: str) -> Any:
        def see(module: Any, arguments: Any, output: Any) -> None:
            inputs[name].append(arguments[0].detach()[0])
            output.register_hook(lambda gradient: outputs[name].append(gradient[0]))

        return see

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in inputs]
    for number, batch in enumerate(batches):
        uniforms = np.random.default_rng([3, number]).random(batch.valid.numel()).reshape(batch.valid.shape)
        for row, n in enumerate(batch.texts):
            predicted = model(torch.from_numpy(texts[n].ids.astype(np.int64))[None]).logits[0]
            total = torch.softmax(predicted.detach(), -1).cumsum(-1, dtype=torch.float64)
            at = torch.from_numpy(uniforms[row, : len(predicted)])[:, None] * total[:, -1:]
            drawn = torch.searchsorted(total, at, right=True)
            (-torch.log_softmax(predicted, -1).gather(1, drawn).sum()).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()

    for n, layer in list(enumerate(skeleton.layers))[::-1]:
        moments = Moments()
        linears = list(skeleton.linears_of(layer))
        metrics = dict.fromkeys(linears, Metric.FULL) | {output_key(name): Metric.FULL for name in linears}
        metrics[linears[-1]] = metrics[output_key(linears[-1])] = Metric.DIAGONAL
        before = []
        with skeleton.loaded(skeleton.parameters_of(layer), source):
            for batch, hidden, call, gradient in zip(batches, states[n], calls, gradients, strict=True):
                leaf = hidden.clone().requires_grad_(True)
                with measured(skeleton, layer, batch.valid, moments, metrics, gradients=True):
                    torch.autograd.backward(run_layer(skeleton, n, leaf, call), gradient)
                before.append(leaf.grad)
        gradients = before
        shared = {name: moments.groups[name].rpartition(".")[2] for name in linears}
        assert {name.rpartition(".")[2]: group for name, group in shared.items()} == {
            "q_proj": "q_proj",
            "k_proj": "q_proj",
            "v_proj": "q_proj",
            "o_proj": "o_proj",
            "gate_proj": "gate_proj",
            "up_proj": "gate_proj",
            "down_proj": "down_proj",
        }
        for name in linears:
            for gram, rows in ((moments.inputs(name), inputs[name]), (moments.outputs(name), outputs[name])):
                exact = torch.cat(rows).double()
                assert gram is not None
                assert gram.count == len(exact) == sum(map(len, texts))
                product = (exact.T @ exact).numpy()
                expected = np.diag(product) if name == linears[-1] else product
                np.testing.assert_allclose(gram.total, expected, rtol=1e-3, atol=1e-3 * np.abs(product).max())


def test_labels_are_drawn_from_the_models_own_prediction(tmp_path: Path) -> None:
    """The mean gradient of −log p(y) over y ~ p is 0: the empirical one, with the text's own tokens, is not."""
    from hemostat_lab.models.activations import embed, make_batches, output_gradients

    model = tiny_model(7, num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    model.save_pretrained(tmp_path)
    pair = opened(tmp_path, tmp_path)
    texts = random_texts(1)
    batches = make_batches([texts[0].ids], torch.device("cpu"))
    hidden, _ = embed(pair.skeleton, pair.sources[0], batches)
    drawn = torch.stack(
        [output_gradients(pair.skeleton, pair.sources[0], batches, hidden, seed)[0] for seed in range(300)]
    )
    error = drawn.std(0) / 300**0.5
    assert float((drawn.mean(0) / error.clamp_min(1e-9)).abs().mean()) < 1.2
    assert float(drawn.std(0).mean()) > 1e-3
