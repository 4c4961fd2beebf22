"""The files that `peft` and vLLM load: the same product as the profile's factors."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.support.temperature_bias import temperature_bias

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.adapter import adapter_layers, adapter_profile
from hemostat_calibration.profiles.peft import CONFIG_FILE, WEIGHTS_FILE, peft_files, to_bfloat16
from hemostat_calibration.profiles.profile import CalibrationProfile


@given(arrays.arrays(np.uint32, 50, elements=st.integers(0, 2**32 - 1)))
def test_bfloat16_is_that_of_torch(bits: np.ndarray) -> None:
    x = bits.view(np.float32)
    ours = torch.from_numpy(to_bfloat16(x).view(np.int16)).view(torch.bfloat16).float()
    theirs = torch.from_numpy(x).bfloat16().float()
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def llama() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=11,  # "layers.1" is a part of the name of "layers.10"
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def make(model: torch.nn.Module, ranks: tuple[int, ...]) -> CalibrationProfile:
    rng = np.random.default_rng(0)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    layers = {}
    for i, name in enumerate(names):
        outputs, inputs = model.get_submodule(name).weight.shape
        rank = ranks[i % len(ranks)]
        layers[name] = LowRank(
            rng.normal(size=(rank, inputs)).astype(np.float32), rng.normal(size=(outputs, rank)).astype(np.float32)
        )
    return adapter_profile(model="m", vocab_size=32, layers=layers)


@pytest.mark.parametrize("ranks", [(2,), (3, 0, 1, 2)], ids=["uniform", "shared out"])
def test_peft_loads_it(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    profile = make(model, ranks)
    before = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")
    }
    for name, data in peft_files(profile, "base").items():
        (tmp_path / name).write_bytes(data)
    merged = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    layers = adapter_layers(profile)
    for name, weight in before.items():
        change = (merged.get_submodule(name).weight.detach() - weight).numpy()
        if name not in layers:
            assert not change.any()
            continue
        a, b = (torch.from_numpy(x).bfloat16().float().numpy() for x in (layers[name].a, layers[name].b))
        np.testing.assert_allclose(change, b @ a, atol=1e-5)


def test_the_files() -> None:
    profile = make(llama(), (3, 0, 1, 2))
    files = peft_files(profile, "base")
    assert files == peft_files(CalibrationProfile.from_bytes(profile.to_bytes()), "base")
    assert set(files) == {CONFIG_FILE, WEIGHTS_FILE}
    config = json.loads(files[CONFIG_FILE])
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 3, "base")
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == {1, 2}
    tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert set(tensors) == {
        f"base_model.model.{name}.lora_{factor}.weight" for name in adapter_layers(profile) for factor in "AB"
    }
    header = json.loads(files[WEIGHTS_FILE][8 : 8 + int.from_bytes(files[WEIGHTS_FILE][:8], "little")])
    assert header["__metadata__"] == {"format": "pt", "hemostat_version": profile.version}


def test_vllm_reads_the_ranks() -> None:
    """Its own reader of the configuration: every layer's scale is 1, and the ranks are those of the factors."""
    helper = pytest.importorskip("vllm.lora.peft_helper")
    profile = make(llama(), (3, 0, 1, 2))
    read = helper.PEFTHelper.from_dict(json.loads(peft_files(profile, "base")[CONFIG_FILE]))
    for name, layer in adapter_layers(profile).items():
        assert read.get_rank_and_scaling(name) == (layer.rank, 1.0)


def test_another_family() -> None:
    with pytest.raises(InvalidProfileError, match="temperature_bias, which has no layers"):
        peft_files(temperature_bias("m", 3, 2.0, np.zeros(3), clamp_nats=1.0), "base")
