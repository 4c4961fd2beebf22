"""Every supported format is dequantized as transformers does it, and others are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import VOCABULARY, TinyCheckpoints, linear_names, packed, tiny_model

from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.compression.checkpoint_writer import compress

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

IDS = np.random.default_rng(5).integers(0, VOCABULARY, 30)


def by_transformers(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0].float().numpy()


def made(kind: str, tiny: TinyCheckpoints, folder: Path) -> Path:
    match kind:
        case "dense":
            return tiny.rounded
        case "symmetric":
            return tiny.packed
        case "asymmetric":
            return packed(tiny.model, folder, symmetric=False)
        case "g_idx":
            return packed(tiny.model, folder, g_idx=True)
        case "asymmetric with g_idx":
            return packed(tiny.model, folder, symmetric=False, g_idx=True)
        case _:
            compress(tiny.reference, folder, kind)
            return folder


@pytest.mark.parametrize(
    "kind", ["dense", "symmetric", "asymmetric", "g_idx", "asymmetric with g_idx", "w4a16", "int3", "prune50"]
)
def test_weights_are_those_that_transformers_computes_with(kind: str, tiny: TinyCheckpoints, tmp_path: Path) -> None:
    from hemostat_lab.models.checkpoint import Checkpoint
    from hemostat_lab.models.copies import Copy

    folder = made(kind, tiny, tmp_path / "made")
    try:
        model = by_transformers(folder)
    except RuntimeError as error:
        if "asymmetric" not in kind or "mismatched" not in str(error):
            raise
        pytest.skip("this version of transformers does not load packed zero points")
    expected = logits_of(model)
    checkpoint = Checkpoint(folder, "COMPRESSED")
    for name in linear_names(tiny.model):
        theirs = model.get_submodule(name).weight
        torch.testing.assert_close(checkpoint.weight(name), theirs.float(), rtol=1e-6, atol=1e-7)
        original = tiny.model.get_submodule(name).weight
        error = float((checkpoint.weight(name) - original).norm() / original.norm())
        assert 0.0 < error < 0.5, name
    copy = Copy.load(folder, dtype="float32")
    np.testing.assert_allclose(copy.logits(IDS), expected, atol=2e-4)


def test_w8a8_rounds_the_inputs_as_the_engine_does(tiny: TinyCheckpoints, tmp_path: Path) -> None:
    from hemostat_lab.models.checkpoint import Checkpoint
    from hemostat_lab.models.copies import Copy

    compress(tiny.reference, tmp_path / "w8a8", "w8a8")
    checkpoint = Checkpoint(tmp_path / "w8a8", "COMPRESSED")
    name = linear_names(tiny.model)[0]
    assert checkpoint.is_quantized(name)
    assert checkpoint.inputs(name).rounding == "int8"
    stored = checkpoint.tensor(f"{name}.weight")
    assert stored.dtype == torch.int8
    scale = checkpoint.tensor(f"{name}.weight_scale").float()
    torch.testing.assert_close(checkpoint.weight(name), stored.float() * scale)
    assert (
        checkpoint.stored_bytes(name)
        == stored.numel() + scale.numel() * checkpoint.tensor(f"{name}.weight_scale").element_size()
    )
    layer = Copy.load(tmp_path / "w8a8", dtype="float32").linears[name]
    inputs = torch.randn(1, 5, layer.in_features)
    steps = inputs.abs().amax(-1, keepdim=True) / 127
    expected = ((inputs / steps).round() @ stored.float().T) * steps * scale.T
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)


def e4m3(data: Any) -> Any:
    """The numbers that bytes are in E4M3 (https://arxiv.org/abs/2209.05433, table 1), float64."""
    sign, exponent, fraction = (data >> 7) & 1, (data >> 3) & 15, data & 7
    values = np.where(exponent > 0, 2.0 ** (exponent - 7.0) * (1 + fraction / 8), 2.0**-6 * fraction / 8)
    return np.where(sign, -values, values)


def test_fp8_is_read_as_the_engine_reads_it(tiny: TinyCheckpoints, tmp_path: Path) -> None:
    from hemostat_lab.compression.checkpoint_writer import compress_with
    from hemostat_lab.compression.formats import WeightFormat
    from hemostat_lab.compression.methods import without_texts
    from hemostat_lab.models.checkpoint import Checkpoint
    from hemostat_lab.models.copies import Copy

    method = without_texts(WeightFormat(8, None, "float", "fp8"))
    report = compress_with(tiny.reference, tmp_path / "fp8", method)
    checkpoint = Checkpoint(tmp_path / "fp8", "COMPRESSED")
    names = linear_names(tiny.model)
    assert checkpoint.quantized == set(names)
    for name in names:
        stored, scale = (checkpoint.tensor(f"{name}.{part}") for part in ("weight", "weight_scale"))
        assert stored.dtype == torch.float8_e4m3fn
        expected = e4m3(stored.view(torch.uint8).numpy().astype(np.int64)) * scale.double().numpy()
        np.testing.assert_array_equal(checkpoint.weight(name).numpy(), expected.astype(np.float32))
        assert checkpoint.inputs(name).rounding == "fp8"
        assert checkpoint.stored_bytes(name) == stored.numel() + len(stored) * scale.element_size()
    dense = sum(tensor.numel() * 4 for name, tensor in tiny.model.named_parameters() if name[:-7] not in names)
    assert report["bytes"] == sum(map(checkpoint.stored_bytes, names)) + dense
    layer = Copy.load(tmp_path / "fp8", dtype="float32").linears[names[0]]
    inputs = torch.randn(1, 5, layer.in_features)
    inputs[0, 4] *= 1e-6  # has the scale of a largest input of 1/512
    scale = inputs.abs().amax(-1, keepdim=True).clamp_min(1 / 512) / 448
    rounded = (inputs / scale).to(torch.float8_e4m3fn)
    steps = torch.from_numpy(e4m3(rounded.view(torch.uint8).numpy().astype(np.int64))).float() * scale
    torch.testing.assert_close(layer(inputs), steps @ layer.weight.T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(inputs), inputs @ layer.weight.T, rtol=1e-3)


def test_head_logits_have_the_models_soft_cap(tmp_path: Path) -> None:
    from tests.support.tiny_models import tiny_model as tiny_of

    from hemostat_lab.models.copies import Copy

    tiny_of("gemma2").save_pretrained(tmp_path / "gemma2")
    copy = Copy.load(tmp_path / "gemma2")
    plain = copy.logits(IDS)
    assert 4.0 < np.abs(plain).max() < 5.0, "the cap is 5"
    np.testing.assert_allclose(copy.head_logits(copy.hidden(IDS)), plain, atol=1e-5)


def test_copy_has_what_the_judge_needs(tiny: TinyCheckpoints) -> None:
    from hemostat_calibration.adapters.factors import LowRank
    from hemostat_lab.models.copies import Copy

    copy = Copy.load(tiny.packed)
    assert copy.vocab_size == VOCABULARY
    assert copy.skeleton.dtype == torch.float32, "the checkpoint's own"
    plain = copy.logits(IDS)
    assert plain.dtype == np.float32
    logprobs = torch.log_softmax(torch.from_numpy(plain), -1)[:-1].gather(1, torch.from_numpy(IDS)[1:, None])[:, 0]
    np.testing.assert_allclose(copy.logprobs(IDS), logprobs.numpy(), atol=1e-5)
    np.testing.assert_allclose(copy.head_logits(copy.hidden(IDS)), plain, atol=1e-5)
    name = "model.layers.1.mlp.up_proj"
    rng = np.random.default_rng(0)
    adapters = [
        {name: LowRank(*(rng.normal(0, 0.1, shape).astype(np.float32) for shape in ((2, 256), (384, 2))))}
        for _ in range(6)
    ]
    merged = []
    for adapter in adapters:
        weight = copy.linears[name].weight
        original = weight.data.clone()
        weight.data += torch.from_numpy(adapter[name].b @ adapter[name].a)
        merged.append(copy.logits(IDS))
        weight.data = original
    # More adapters than are kept as tensors, in turns.
    for _ in range(2):
        for adapter, expected in zip(adapters, merged, strict=True):
            logits = copy.logits(IDS, adapter)
            np.testing.assert_allclose(logits, expected, atol=1e-4)
            assert np.abs(logits - plain).max() > 1e-3
    np.testing.assert_array_equal(copy.logits(IDS), plain)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [("model.layers.9.mlp.up_proj", (384, 256), "does not have"), ("model.layers.0.mlp.up_proj", (256, 384), "inputs")],
)
def test_adapter_of_another_model_is_refused(
    layer: str, shape: tuple[int, int], message: str, tiny: TinyCheckpoints
) -> None:
    from hemostat_calibration.adapters.factors import LowRank
    from hemostat_lab.models.copies import Copy

    factors = LowRank(np.ones((1, shape[1]), np.float32), np.ones((shape[0], 1), np.float32))
    with pytest.raises(AdaptError, match=message):
        Copy.load(tiny.rounded).logits(IDS, {layer: factors})


def test_untied_head_and_biases_are_loaded(tmp_path: Path) -> None:
    from hemostat_lab.models.copies import Copy

    model = tiny_model(3, tie_word_embeddings=False, attention_bias=True, num_key_value_heads=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    np.testing.assert_allclose(Copy.load(tmp_path).logits(IDS), logits_of(model), atol=1e-4)


def config(folder: Path, **quantization: Any) -> None:
    path = folder / "config.json"
    known = json.loads(path.read_text())
    known["quantization_config"] = known["quantization_config"] | quantization
    path.write_text(json.dumps(known))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method aqlm, which is not supported"),
        ({"quant_method": "gptq"}, "the checkpoint_format pack-quantized"),
        ({"transform_config": {"a": {}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "format": "nvfp4-pack-quantized"}}},
            "no weights in nvfp4-pack",
        ),
        ({"config_groups": {"g": {"targets": ["Linear"], "format": "marlin-24"}}}, "format marlin-24|cannot be read"),
        (
            {
                "format": "naive-quantized",
                "config_groups": {
                    "g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "strategy": "channel"}}
                },
            },
            "4-bit float weights in naive-quantized",
        ),
        (
            {
                "config_groups": {
                    "g": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
                        "input_activations": {
                            "num_bits": 8,
                            "type": "int",
                            "symmetric": False,
                            "strategy": "token",
                            "dynamic": True,
                        },
                    }
                },
            },
            "int8 or FP8 by token",
        ),
        ({"config_groups": {"g": {"targets": 3}}}, "cannot be read"),
    ],
)
def test_unsupported_format_is_one_line_that_names_it(
    change: dict[str, Any], message: str, tiny: TinyCheckpoints, tmp_path: Path
) -> None:
    from hemostat_lab.models.checkpoint import Checkpoint

    shutil.copytree(tiny.packed, tmp_path / "other")
    config(tmp_path / "other", **change)
    with pytest.raises(AdaptError, match=message) as refused:
        Checkpoint(tmp_path / "other", "COMPRESSED")
    assert "\n" not in str(refused.value)
    assert str(tmp_path / "other") in str(refused.value)


def test_folder_that_is_no_checkpoint_is_one_line(tiny: TinyCheckpoints, tmp_path: Path) -> None:
    from hemostat_lab.models.checkpoint import Checkpoint

    def message(folder: Path) -> str:
        with pytest.raises(AdaptError) as refused:
            Checkpoint(folder, "COMPRESSED").weight("model.layers.0.mlp.up_proj")
        return str(refused.value)

    assert "there is no folder" in message(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in message(tmp_path / "empty")
    (tmp_path / "empty" / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "GGUF" in message(tmp_path / "empty")
    assert "GGUF" in message(tmp_path / "model.gguf")
    shutil.copytree(tiny.packed, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096])
    assert "cannot be read" in message(tmp_path / "cut")
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "only .bin files" in message(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    assert "config.json" in message(tmp_path / "cut")
