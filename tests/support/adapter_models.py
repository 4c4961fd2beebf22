"""Tiny random Llama checkpoints, and compressed ones made from them in every supported format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 97
LAYERS = 3
WIDTH = 256
"""Two groups of 128."""


@dataclass(frozen=True)
class TinyCheckpoints:
    """model: the reference, float32. rounded: the same with its weights rounded, dense. packed: W4A16."""

    model: Any
    reference: Path
    rounded: Path
    packed: Path


def tiny_checkpoints(folder: Path) -> TinyCheckpoints:
    model = tiny_model()
    return TinyCheckpoints(
        model,
        save(model, folder / "reference"),
        save(model, folder / "rounded", rounded(model)),
        packed(model, folder / "packed"),
    )


def tiny_model(seed: int = 0, **changed: Any) -> Any:
    """A random model in float32, whose weights are large enough that layers matter."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
            **changed,
        }
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def save(model: Any, folder: Path, state: dict[str, Any] | None = None, quantization: Any = None) -> Path:
    """A checkpoint folder, with other weights and a `quantization_config` where they are given."""
    model.save_pretrained(folder, state_dict=state)
    if quantization is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def packed(
    model: Any, folder: Path, *, symmetric: bool = True, group: int = 128, g_idx: bool = False, bits: int = 4
) -> Path:
    """Round to nearest, packed as llmcompressor packs what GPTQ and AWQ made."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import QuantizationStatus as Status

    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group",
        group_size=group,
        actorder="group" if g_idx else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    for name in linear_names(model):
        weight = state.pop(f"{name}.weight")
        columns = torch.arange(weight.shape[1])
        index = columns // group
        if g_idx:
            index = index[torch.randperm(len(index), generator=generator)]
        high, low = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
        scales, zeros = [], []
        for n in range(weight.shape[1] // group):
            columns_of = weight[:, index == n]
            if symmetric:
                scales.append(columns_of.abs().amax(1) / (high + 0.5))
                zeros.append(torch.zeros(len(weight)))
            else:
                largest, least = columns_of.amax(1).clamp_min(0), columns_of.amin(1).clamp_max(0)
                scales.append((largest - least) / (high - low))
                zeros.append((low - least / scales[-1]).round().clamp(low, high))
        parts = {"weight": weight, "weight_scale": torch.stack(scales, 1)}
        if not symmetric:
            parts["weight_zero_point"] = torch.stack(zeros, 1).to(torch.int8)
        if g_idx:
            parts["weight_g_idx"] = index.to(torch.int32)
        state |= {f"{name}.{key}": value for key, value in compressor.compress(parts, scheme).items()}
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=["lm_head"],
        format="pack-quantized",
        quantization_status=Status.COMPRESSED,
    )
    return save(model, folder, state, config.model_dump(mode="json") | {"quant_method": "compressed-tensors"})


def rounded(model: Any, levels: float = 7.0) -> dict[str, Any]:
    """A state whose linear layers are rounded, by row."""
    state = dict(model.state_dict())
    for name in linear_names(model):
        weight = state[f"{name}.weight"]
        scale = weight.abs().amax(1, keepdim=True) / levels
        state[f"{name}.weight"] = (weight / scale).round() * scale
    return state


def linear_names(model: Any) -> list[str]:
    import torch

    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")]


def random_texts(count: int = 12, seed: int = 0, longest: int = 40) -> list[Any]:
    """`Text`s of different lengths."""
    from hemostat.checkpoints.texts import Text

    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        prompt, output = rng.integers(2, longest // 2), rng.integers(2, longest // 2)
        ids = rng.integers(0, VOCABULARY, prompt + output).astype(np.int32)
        texts.append(Text(ids[:prompt], ids[prompt:]))
    return texts
