"""Which checkpoints are a pair, and scales that were moved between layers before quantizing (AWQ)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import (
    LAYERS,
    VOCABULARY,
    TinyCheckpoints,
    linear_names,
    packed,
    rounded,
    save,
    tiny_model,
)

from hemostat.checkpoints.errors import AdaptError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def opened(reference: Path, compressed: Path) -> Any:
    from hemostat_lab.adapters.pair import CheckpointPair

    return CheckpointPair.open(reference, compressed)


def moved_reference(pair: Any, name: str) -> Any:
    """Returns a float32 parameter of the reference with the scales moved as in the compressed model: the same
    function."""
    layer = next((layer for layer in pair.skeleton.layers if name.startswith(f"{layer}.")), None)
    if layer is None:
        return pair.reference.tensor(name)
    scales = pair.scales(layer)
    module, _, part = name.rpartition(".")
    tensor = pair.reference.tensor(name).float()
    if module not in pair.skeleton.linears:
        return pair.compressed.tensor(name).float() if name in scales.norms else tensor
    if part == "bias":
        return tensor / scales.outputs[module] if module in scales.outputs else tensor
    if module in scales.inputs:
        tensor = tensor * scales.inputs[module]
    return tensor / scales.outputs[module][:, None] if module in scales.outputs else tensor


def scaled(model: Any, seed: int = 0, mean: float = 1.0) -> Any:
    """The same function, with scales moved as AWQ moves them. mean: about which they are spread."""
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    other.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in other.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                scale = mean * torch.exp(0.4 * torch.randn(len(norm.weight), generator=generator))
                norm.weight /= scale
                for reader in readers:
                    reader.weight *= scale
            for before, after in ((attention.v_proj, attention.o_proj), (mlp.up_proj, mlp.down_proj)):
                if before.out_features == after.in_features:
                    scale = mean * torch.exp(0.4 * torch.randn(after.in_features, generator=generator))
                    before.weight /= scale[:, None]
                    after.weight *= scale
    return other.eval()


IDS = np.random.default_rng(5).integers(0, VOCABULARY, 30)


def logits_of(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0]


@pytest.mark.parametrize(("heads", "mean"), [(4, 1.0), (2, 1.0), (2, 0.4)])
def test_moved_scales_are_found_and_the_moved_reference_is_the_same_function(
    heads: int, mean: float, tmp_path: Path
) -> None:
    """Also with grouped heads, where o_proj's inputs cannot be scaled; and where the scales of up_proj's inputs and of
    its outputs nearly cancel, as in two layers of a real checkpoint."""
    model = tiny_model(1, num_key_value_heads=heads)
    reference = save(model, tmp_path / "reference")
    quantized = packed(scaled(model, mean=mean), tmp_path / "awq", bits=4)
    pair = opened(reference, quantized)
    state = {name: moved_reference(pair, name) for name in pair.skeleton.places}
    assert pair.notes == []
    moved = type(model)(model.config)
    moved.load_state_dict(state, strict=False)
    moved.tie_weights()
    torch.testing.assert_close(logits_of(moved.eval()), logits_of(model), rtol=1e-3, atol=1e-3)
    for layer in pair.skeleton.layers:
        norm = f"{layer}.input_layernorm.weight"
        torch.testing.assert_close(state[norm], pair.compressed.tensor(norm))
        scales = pair.scales(layer)
        assert (f"{layer}.self_attn.v_proj" in scales.outputs) == (heads == 4)
        assert f"{layer}.mlp.up_proj" in scales.outputs
    # What is left is the rounding, nearly as small as without any scales.
    plain = opened(reference, packed(model, tmp_path / "rtn"))
    for name in linear_names(model):
        layer = name.rpartition(".")[0].rpartition(".")[0]
        errors = [
            float(np.linalg.norm(p.delta(name, p.scales(layer))) / p.compressed.weight(name).norm())
            for p in (pair, plain)
        ]
        assert errors[0] < 1.7 * errors[1] < 0.25, (name, errors)
        if name in pair.scales(layer).inputs:
            weights = pair.reference.weight(name), pair.compressed.weight(name)
            assert float((weights[0] - weights[1]).norm() / weights[1].norm()) > 0.3
    assert all(not plain.scales(layer).inputs and not plain.scales(layer).outputs for layer in plain.skeleton.layers)


def test_statistics_follow_the_moved_scales(tiny: TinyCheckpoints, tmp_path: Path) -> None:
    """A correction of full rank makes the scaled checkpoint the reference again, whatever its scales."""
    from tests.support.adapter_models import random_texts

    from hemostat_lab.adapters.build import BuildOptions, build, judged

    pair = opened(tiny.reference, packed(scaled(tiny.model), tmp_path / "awq"))
    built = build(pair, random_texts(16), BuildOptions(rank=256, metric="auto"))
    summary = judged(pair, built, random_texts(4, seed=9))[0].report["held_out"]
    assert summary["kl_after"] < 0.02 * summary["kl_before"]


def test_other_norms_are_noted_and_not_taken_for_scales(tiny: TinyCheckpoints, tmp_path: Path) -> None:
    state = rounded(tiny.model)
    state["model.layers.1.input_layernorm.weight"] = state["model.layers.1.input_layernorm.weight"] * 1.3
    state["model.norm.weight"] = state["model.norm.weight"] * 0.9
    pair = opened(tiny.reference, save(tiny.model, tmp_path / "other", state))
    scales = [pair.scales(layer) for layer in pair.skeleton.layers]
    assert not any(scale.inputs or scale.outputs for scale in scales)
    assert len(pair.notes) == 2
    assert pair.notes[0].startswith("model.norm.weight differs")
    assert "model.layers.1.input_layernorm.weight differs between the checkpoints, not by scales" in pair.notes[1]
    assert not pair.same_ends


def test_what_was_noted_of_a_layer_is_kept_with_its_finished_part(tiny: TinyCheckpoints, tmp_path: Path) -> None:
    from tests.support.adapter_models import random_texts

    from hemostat_lab.adapters.build import BuildOptions, build
    from hemostat_lab.models.parts import Parts

    state = rounded(tiny.model)
    state["model.layers.1.input_layernorm.weight"] = state["model.layers.1.input_layernorm.weight"] * 1.3
    other, parts = save(tiny.model, tmp_path / "other", state), Parts(None)
    options, texts = BuildOptions(rank=2), random_texts(4)
    notes = [build(opened(tiny.reference, other), texts, options, parts).report["notes"] for _ in range(2)]
    assert len(notes[0]) == 1
    assert "model.layers.1.input_layernorm.weight differs" in notes[0][0]
    assert notes[1] == notes[0], "of a build whose layers were all finished before"


def test_gemma_norms_multiply_by_one_plus_their_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
    )
    model = transformers.Gemma3ForCausalLM(config).eval()
    reference = save(model, tmp_path / "reference")
    layer = model.model.layers[0]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale = torch.exp(torch.randn(128))
    norm = "model.layers.0.pre_feedforward_layernorm.weight"
    state[norm] = (1 + layer.pre_feedforward_layernorm.weight.detach()) / scale - 1
    for name in ("gate_proj", "up_proj"):
        state[f"model.layers.0.mlp.{name}.weight"] = state[f"model.layers.0.mlp.{name}.weight"] * scale
    pair = opened(reference, save(model, tmp_path / "scaled", state))
    moved = type(model)(config)
    moved.load_state_dict({name: moved_reference(pair, name) for name in pair.skeleton.places}, strict=False)
    moved.tie_weights()
    torch.testing.assert_close(logits_of(moved.eval()), logits_of(model), rtol=1e-4, atol=1e-4)
    assert np.abs(pair.delta("model.layers.0.mlp.up_proj", pair.scales("model.layers.0"))).max() < 1e-5
    assert pair.notes == []


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_models_without_attention_are_refused(name: str, tmp_path: Path) -> None:
    from tests.support.tiny_models import tiny_model as tiny_of

    tiny_of(name).save_pretrained(tmp_path / name)
    message = r"^REFERENCE: mamba2? has no attention layers, and vLLM serves no LoRA adapters of such models$"
    with pytest.raises(AdaptError, match=message):
        opened(tmp_path / name, tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": LAYERS + 1}, f"num_hidden_layers: REFERENCE has {LAYERS}, COMPRESSED has {LAYERS + 1}"),
        ({"vocab_size": VOCABULARY + 1}, "vocabulary: REFERENCE has 97 tokens, COMPRESSED has 98"),
        ({"architectures": ["MistralForCausalLM"]}, "architectures: REFERENCE is LlamaForCausalLM"),
        ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    ],
)
def test_checkpoints_that_are_no_pair_are_one_line(
    change: dict[str, Any], message: str, tiny: TinyCheckpoints, tmp_path: Path
) -> None:
    shutil.copytree(tiny.packed, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    reference = tiny.reference
    if "tie_word_embeddings" in change:
        reference = save(tiny_model(0, tie_word_embeddings=False), tmp_path / "untied")
        (tmp_path / "untied" / "model.safetensors").write_bytes((tiny.reference / "model.safetensors").read_bytes())
    with pytest.raises(AdaptError, match=message) as refused:
        opened(reference, tmp_path / "other")
    assert "\n" not in str(refused.value)


def test_unrelated_weights_and_damaged_ones_are_refused(tiny: TinyCheckpoints, tmp_path: Path) -> None:
    other = opened(tiny.reference, save(tiny_model(5), tmp_path / "other"))
    layer = "model.layers.0"
    with pytest.raises(AdaptError, match=r"must be the model that COMPRESSED was made from"):
        other.delta(f"{layer}.mlp.up_proj", other.scales(layer))
    state = rounded(tiny.model)
    state[f"{layer}.mlp.up_proj.weight"][0, 0] = torch.nan
    damaged = opened(tiny.reference, save(tiny.model, tmp_path / "damaged", state))
    with pytest.raises(AdaptError, match="not finite"):
        damaged.delta(f"{layer}.mlp.up_proj", damaged.scales(layer))
    with pytest.raises(AdaptError, match=r"REFERENCE: .* is quantized"):
        opened(tiny.packed, tiny.reference)
