"""An adapter's profile as the files of PEFT, which `peft` and vLLM load as LoRA. Bytes only; no PyTorch.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Singles
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles.adapter import adapter_layers
from hemostat_calibration.profiles.profile import CalibrationProfile

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_LENGTH = struct.Struct("<Q")


def peft_files(profile: CalibrationProfile, base_model_name: str) -> dict[str, bytes]:
    """Returns the contents of `adapter_config.json` and `adapter_model.safetensors` (bfloat16) by name.

    The same profile gives the same bytes. Its version is among the metadata of the weights.

    base_model_name: name or folder of the model that the adapter belongs to; `peft` reads it, vLLM does not.
    Every layer's scale (alpha / rank) is 1: where ranks differ, `rank_pattern` and `alpha_pattern` say so. Raises
    InvalidProfileError for a profile without an adapter.

    >>> from hemostat_calibration.adapters.factors import LowRank
    >>> from hemostat_calibration.profiles.adapter import adapter_profile
    >>> layers = {"model.layers.0.mlp.up_proj": LowRank(np.ones((1, 3), np.float32), np.ones((2, 1), np.float32))}
    >>> files = peft_files(adapter_profile(model="m", vocab_size=5, layers=layers), "base")
    >>> sorted(files), json.loads(files["adapter_config.json"])["target_modules"]
    (['adapter_config.json', 'adapter_model.safetensors'], ['model.layers.0.mlp.up_proj'])
    """
    layers = adapter_layers(profile)
    if not layers:
        raise InvalidProfileError(f"profile {profile.version} is of the family {profile.family}, which has no layers")
    rank = max(layer.rank for layer in layers.values())
    # `peft` and vLLM match the names of these patterns as regular expressions.
    pattern = {re.escape(name): layer.rank for name, layer in layers.items() if layer.rank != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors: dict[str, Singles] = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.a
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.b
    return {
        CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode() + b"\n",
        WEIGHTS_FILE: _safetensors(tensors, {"format": "pt", "hemostat_version": profile.version}),
    }


def to_bfloat16(x: Singles) -> npt.NDArray[np.uint16]:
    """Returns the bits of float32 values as bfloat16: its upper 16 bits, rounded to nearest, ties to even. A NaN stays
    one.

    >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, 1.00390625, 1.01171875], np.float32))]
    ['0x3f80', '0x3f80', '0x3f82']
    """
    bits = np.ascontiguousarray(x, dtype="<f4").view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    # The carry could turn a NaN into an infinity or a number.
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype("<u2")


def _safetensors(tensors: dict[str, Singles], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    chunks: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        data = to_bfloat16(tensors[name]).tobytes()
        entries[name] = {
            "dtype": "BF16",
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([_LENGTH.pack(len(header)), header, *chunks])
