"""A checkpoint folder in safetensors, read tensor by tensor, with dequantized weights."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.checkpoints.errors import AdaptError
from hemostat_calibration.messages import one_line
from hemostat_lab.models.quiet import quiet_transformers
from hemostat_lab.models.skeleton import EXACT, Inputs
from hemostat_lab.models.stored_formats.reading import (
    check_names,
    has_quantized_kv_cache,
    quantization_of,
    stored_format,
)
from hemostat_lab.models.stored_formats.stored_layer import StoredFormat, StoredLayer

INDEX = "model.safetensors.index.json"
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}
"""Of safetensors' types; of the others 8."""
NOT_COUNTED = ("weight_shape",)
"""Of the parts of a weight: it is no number that an engine reads."""


class Checkpoint:
    """What is read is copied: no file stays open or mapped.

    label: how errors name it, such as REFERENCE. config: of transformers, without its `quantization_config`.
    quantized_bytes: stored size of the quantized layers; of a dense checkpoint 0.
    """

    def __init__(self, folder: Path, label: str) -> None:
        """Raises AdaptError unless `folder` is a checkpoint of a known format."""
        self.folder = folder
        self.label = label
        self._digest = ""
        self.config = _read_config(folder, label)
        self.config.__dict__.pop("quantization_config", None)
        self._format: StoredFormat | None = None
        self.quantized_kv_cache = False
        try:
            described = quantization_of(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except AdaptError as error:
            raise AdaptError(f"{label}: {error}") from None
        if described is not None:
            quantization, file = described
            self._format = stored_format(quantization, f"{label}: quantization_config of {folder}/{file}")
            self.quantized_kv_cache = has_quantized_kv_cache(quantization)
        self._files = _index(folder, label)
        self._parts: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self._files:
            module, _, part = name.rpartition(".")
            self._parts[module][part] = name
        check_names(self._parts, self._format, f"{label}: {folder}")

    @property
    def names(self) -> frozenset[str]:
        """Of all stored tensors."""
        return frozenset(self._files)

    def digest(self) -> str:
        """32 hex digits that identify the folder's content; reads the folder, once."""
        if not self._digest:
            self._digest = checkpoint_digest(str(self.folder), None)
        return self._digest

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor as it is; AdaptError if there is none of this name, or the file is damaged."""
        if name not in self._files:
            raise AdaptError(f"{self.label}: {self.folder} has no tensor {name}: it is incomplete, or of another model")
        path = self._files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: torch.Tensor = file.get_tensor(name).clone()
        except (OSError, SafetensorError) as error:
            raise AdaptError(
                f"{self.label}: {path}, with {name}, cannot be read ({one_line(error)}); copy it again"
            ) from None
        return tensor

    @property
    def quantized(self) -> frozenset[str]:
        """The modules whose weights are stored quantized."""
        return frozenset(module for module in self._parts if self.is_quantized(module))

    def is_quantized(self, module: str) -> bool:
        known = self._format
        return known is not None and not known.marks.isdisjoint(self._parts.get(module, {}))

    def is_part_of_weight(self, name: str) -> bool:
        """Whether a stored tensor is what the weight of a quantized layer is made of, or a scale of its inputs."""
        module, _, part = name.rpartition(".")
        return self._format is not None and self.is_quantized(module) and part in self._format.parts

    def stored_bytes(self, module: str) -> int:
        """Of the weight of a module, scales included."""
        total = 0
        for part, name in self._parts.get(module, {}).items():
            if (part == "weight" or self.is_part_of_weight(name)) and part not in NOT_COUNTED:
                with safe_open(self._files[name], "pt") as file:
                    stored = file.get_slice(name)
                    total += math.prod(stored.get_shape()) * _BITS.get(stored.get_dtype(), 8) // 8
        return total

    def weight(self, module: str) -> torch.Tensor:
        """The weight of a module: [outputs, inputs] for a linear layer. Float32 where it was quantized: the products of
        what is stored and its scales; otherwise as it is stored. AdaptError."""
        if self._format is not None and self.is_quantized(module):
            return self._format.weight(self._layer(module))
        weight = self.tensor(f"{module}.weight")
        if weight.element_size() < 2:
            kind = str(weight.dtype).removeprefix("torch.")
            raise AdaptError(
                f"{self.label}: {self.folder}: {module}.weight is stored as {kind} and has no scale beside it: the "
                "checkpoint is incomplete; copy it again"
            )
        return weight

    def inputs(self, module: str) -> Inputs:
        """What the engine does with the layer's inputs."""
        if self._format is None or not self.is_quantized(module):
            return EXACT
        return self._format.inputs(self._layer(module))

    def _layer(self, module: str) -> StoredLayer:
        names = self._parts[module]
        return StoredLayer(module, names, lambda part: self.tensor(names[part]), f"{self.label}: {self.folder}")


def _read_config(folder: Path, label: str) -> Any:
    from transformers import AutoConfig  # noqa: PLC0415

    if folder.suffix == ".gguf" or (folder.is_dir() and not (folder / "config.json").is_file() and _ggufs(folder)):
        raise AdaptError(f"{label}: {folder} is GGUF, which vLLM's LoRA does not serve: name a safetensors checkpoint")
    if not folder.is_dir():
        raise AdaptError(f"{label}: there is no folder {folder}; download the checkpoint and name its folder")
    if not (folder / "config.json").is_file():
        raise AdaptError(f"{label}: {folder} is not a transformers checkpoint: it has no config.json")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  any content of the file, and code of any architecture
        raise AdaptError(f"{label}: {folder}/config.json cannot be used: {one_line(error)}") from None
    return config


def _ggufs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


def _index(folder: Path, label: str) -> dict[str, Path]:
    """Tensor -> file."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): folder / str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise AdaptError(f"{label}: {index} is not a safetensors index; copy the checkpoint again") from None
        missing = sorted({path.name for path in files.values() if not path.is_file()})
        if missing:
            raise AdaptError(f"{label}: {folder} is incomplete: {', '.join(missing)} missing; copy it again")
        return files
    paths: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("adapter_"):
            continue
        try:
            with safe_open(path, "pt") as file:
                paths |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise AdaptError(f"{label}: {path} cannot be read ({one_line(error)}); copy it again") from None
    if not paths:
        kinds = [name for name in ("bin", "pt", "pth", "gguf") if any(folder.glob(f"*.{name}"))]
        detail = f"only .{', .'.join(kinds)} files; save it with save_pretrained" if kinds else "copy it again"
        raise AdaptError(f"{label}: {folder} has no .safetensors file: {detail}")
    return paths
