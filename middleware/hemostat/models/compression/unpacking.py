"""Packed checkpoints, and dense copies of them for engines without kernels for packed weights."""

# torch is imported where it is used, so that checking the cache does not load it.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hemostat.models.checkpoint_folders import (
    RECIPE,
    CompressError,
    Progress,
    build_folder,
    cache_folder,
    cache_key,
    folder_digest,
    required_versions,
)
from hemostat.models.compression.other_files import copy_all_but_weights, write_config

PACKED_FORMAT = "pack-quantized"


def is_packed(checkpoint: Path) -> bool:
    """True for a checkpoint whose weights are packed integers, like w4a16: an engine needs special kernels for it."""
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["format"] == PACKED_FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unpacked_copy(checkpoint: Path, progress: Progress = lambda _: None) -> Path:
    """A dense copy, in the user's cache folder, of a packed checkpoint (`is_packed`): another size, the same model.

    For engines without kernels for packed weights. Raises CompressError as `compress` does.
    """
    versions = required_versions("torch", "compressed_tensors")
    made_from = {"recipe": RECIPE, "scheme": "unpacked", "source": folder_digest(checkpoint), **versions}
    destination = cache_folder() / "unpacked" / cache_key(made_from)
    build_folder(destination, made_from, lambda folder: _write_unpacked(checkpoint, folder, progress), progress)
    return destination


def _write_unpacked(source: Path, folder: Path, progress: Progress) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open
    from safetensors.torch import save_file

    progress(f"{source.name}: written as a dense copy")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    quantization = config.pop("quantization_config")
    quantization.pop("version", None)
    found = QuantizationConfig.model_validate(quantization)
    if len(found.config_groups) != 1 or found.kv_cache_scheme is not None:
        raise CompressError(
            f"{source} is packed in more than one way: only checkpoints of `hemostat compress` can be unpacked"
        )
    (recipe,) = found.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(PACKED_FORMAT)
    state: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                layer, _, part = key.rpartition(".")
                if part.startswith("weight_"):
                    layers.setdefault(layer, {})[part] = file.get_tensor(key)
                else:
                    state[key] = file.get_tensor(key)
    while layers:
        layer, parts = layers.popitem()
        # In float32, which represents every product of an integer and a scale exactly.
        parts["weight_scale"] = parts["weight_scale"].float()
        state[f"{layer}.weight"] = compressor.decompress(parts, recipe)["weight"].contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    copy_all_but_weights(source, folder)
    write_config(folder, config)
