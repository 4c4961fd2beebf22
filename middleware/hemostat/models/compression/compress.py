"""Compressed copies of a checkpoint, made from its weights alone.

The result is a folder that vLLM and transformers load: w4a16 and w8a8 in the compressed-tensors format, the others
dense.
"""

# torch is imported where it is used, so that checking the cache does not load it.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hemostat.models.checkpoint_folders import (
    MANIFEST,
    RECIPE,
    CompressError,
    Progress,
    build_folder,
    cache_folder,
    cache_key,
    folder_digest,
    required_versions,
)
from hemostat.models.compression.rounding import PACKED_FORMAT, SCHEMES, pruned, quantize, rounded
from hemostat.models.quiet import quiet_transformers


def compress(source: Path, destination: Path, scheme: str, progress: Progress = lambda _: None) -> None:
    """Write a compressed copy of the transformers checkpoint `source` to `destination`.

    Does nothing when `destination` already is that copy. Raises CompressError when `scheme` is unknown, when `source`
    is no checkpoint, when `destination` has other content, or when a package is missing.
    """
    if scheme not in SCHEMES:
        raise CompressError(f"scheme {scheme!r} is unknown: use one of {', '.join(SCHEMES)}")
    if not (source / "config.json").is_file():
        raise CompressError(f"{source} is not a transformers checkpoint: it has no config.json")
    versions = required_versions("torch", "transformers", "compressed_tensors")
    made_from = {"recipe": RECIPE, "scheme": scheme, "source": folder_digest(source), **versions}
    build_folder(destination, made_from, lambda folder: _write_compressed(source, folder, scheme, progress), progress)


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


def _write_compressed(source: Path, folder: Path, scheme: str, progress: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    progress(f"{scheme}: loading {source.name}")
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
    if getattr(model.config, "quantization_config", None) is not None:
        raise CompressError(f"{source} is quantized already: start from the original checkpoint")
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    heads = [name for name, m in model.named_modules() if m is head]
    if not linears:
        raise CompressError(f"{source} has no linear layers besides its head: nothing to compress")
    state = dict(model.state_dict())
    quantization: dict[str, Any] | None = None
    if scheme.startswith("prune"):
        for name in linears:
            state[f"{name}.weight"] = pruned(state[f"{name}.weight"], int(scheme.removeprefix("prune")) / 100)
    elif scheme == "int3":
        for name in linears:
            state[f"{name}.weight"] = rounded(name, state[f"{name}.weight"], 3)
    else:
        quantization = quantize(state, linears, heads, scheme, progress)
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=state)
    _copy_all_but_weights(source, folder)
    if quantization is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = quantization
        _write_config(folder, config)


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
    _copy_all_but_weights(source, folder)
    _write_config(folder, config)


def _copy_all_but_weights(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, settings."""
    for path in source.iterdir():
        if path.is_file() and path.name != MANIFEST and not _is_weights(path.name):
            shutil.copyfile(path, folder / path.name)


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json"))
