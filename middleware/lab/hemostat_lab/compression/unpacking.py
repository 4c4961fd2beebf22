"""Packed checkpoints, and dense copies of them for engines without kernels for packed weights."""

# torch is imported where it is used, so that checking the cache does not load it.
# ruff: noqa: PLC0415

from __future__ import annotations

import json
from pathlib import Path

from hemostat_lab.models.checkpoint_folders import (
    RECIPE,
    CompressError,
    Progress,
    build_folder,
    cache_folder,
    cache_key,
    copy_all_but_weights,
    folder_digest,
    required_versions,
    write_config,
)

PACKED_FORMAT = "pack-quantized"


def is_packed(checkpoint: Path) -> bool:
    """True for a checkpoint whose weights are packed integers, like w4a16: an engine needs special kernels for it."""
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["format"] == PACKED_FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unpacked_copy(checkpoint: Path, progress: Progress = lambda _: None) -> Path:
    """A dense copy, in the user's cache folder, of a quantized checkpoint: another size, the same weights.

    For engines without kernels for packed weights (`is_packed`). Where the checkpoint's inputs are rounded at run time
    (W8A8, FP8), the copy is not the same model, which `progress` is told: its inputs are exact. Raises HemostatError.
    """
    versions = required_versions("torch", "compressed_tensors")
    made_from = {"recipe": RECIPE, "scheme": "unpacked", "source": folder_digest(checkpoint), **versions}
    destination = cache_folder() / "unpacked" / cache_key(made_from)
    build_folder(
        destination, made_from, lambda folder: _write_unpacked(checkpoint, folder, progress), progress, overwrite=True
    )
    return destination


def _write_unpacked(source: Path, folder: Path, progress: Progress) -> None:
    from hemostat_lab.compression.tensor_files import TensorFiles
    from hemostat_lab.models.checkpoint import Checkpoint
    from hemostat_lab.models.skeleton import EXACT

    progress(f"{source.name}: written as a dense copy")
    checkpoint = Checkpoint(source, "checkpoint")
    if checkpoint.quantized_kv_cache:
        raise CompressError(f"{source} has a quantized KV cache, which a dense copy would not have: serve it as it is")
    files = TensorFiles(folder)
    quantized = checkpoint.quantized
    for name in sorted(checkpoint.names):
        if not checkpoint.is_part_of_weight(name):
            files.add(name, checkpoint.tensor(name))
    for module in sorted(quantized):
        # In float32, which represents every product of an integer and a scale exactly.
        files.add(f"{module}.weight", checkpoint.weight(module))
    files.close()
    rounded = sum(checkpoint.inputs(module) != EXACT for module in quantized)
    if rounded:
        progress(f"{source.name}: {rounded} layers round their inputs at run time; the dense copy does not")
    copy_all_but_weights(source, folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    write_config(folder, config)
