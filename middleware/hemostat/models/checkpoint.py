"""A checkpoint folder in safetensors, read tensor by tensor, with dequantized weights."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hemostat.models import packages
from hemostat.models.checkpoint_digest import checkpoint_digest
from hemostat.models.errors import AdaptError
from hemostat.models.quiet import quiet_transformers
from hemostat.models.skeleton import InputRounding

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
"""Of compressed-tensors. A checkpoint of `mixed-precision` names one for each group of layers."""
INDEX = "model.safetensors.index.json"
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16}
"""Of safetensors' types; of the others 8."""
_QUANTIZED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


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
        quantization = self.config.__dict__.pop("quantization_config", None)
        self._schemes = _schemes(quantization, folder, label)
        self.quantized_kv_cache = bool(quantization and quantization.get("kv_cache_scheme"))
        self._files = _index(folder, label)
        self._parts: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self._files:
            module, _, part = name.rpartition(".")
            self._parts[module][part] = name

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
            raise AdaptError(f"{self.label}: {path} cannot be read ({_one_line(error)}); copy it again") from None
        return tensor

    @property
    def quantized(self) -> frozenset[str]:
        """The modules whose weights are stored quantized."""
        return frozenset(module for module in self._parts if self.is_quantized(module))

    def is_quantized(self, module: str) -> bool:
        return "weight_scale" in self._parts.get(module, {})

    def stored_bytes(self, module: str) -> int:
        """Of the weight of a module, scales included."""
        total = 0
        for part, name in self._parts.get(module, {}).items():
            if part == "weight" or (part in _QUANTIZED and part != "weight_shape"):
                with safe_open(self._files[name], "pt") as file:
                    found = file.get_slice(name)
                    total += math.prod(found.get_shape()) * _BITS.get(found.get_dtype(), 8) // 8
        return total

    def weight(self, module: str) -> torch.Tensor:
        """The weight of a module: [outputs, inputs] for a linear layer. Float32 where it was quantized: the exact
        products of integers, or E4M3 numbers, and scales; otherwise as it is stored. AdaptError."""
        if not self.is_quantized(module):
            return self.tensor(f"{module}.weight")
        from compressed_tensors.compressors import BaseCompressor  # noqa: PLC0415  slow, and not always needed

        scheme = self._scheme(module)
        parts = {
            part: self.tensor(name)
            for part, name in self._parts[module].items()
            if part == "weight" or part in _QUANTIZED
        }
        parts["weight_scale"] = parts["weight_scale"].float()
        try:
            compressor = BaseCompressor.get_value_from_registry(scheme.format)
            weight: torch.Tensor = compressor.decompress(parts, scheme)["weight"]
        except (KeyError, ValueError, RuntimeError, AssertionError, TypeError) as error:
            raise AdaptError(
                f"{self.label}: layer {module} of {self.folder} cannot be dequantized ({_one_line(error)}); its stored "
                f"parts are {', '.join(sorted(parts))}"
            ) from None
        return weight.float().contiguous()

    def input_rounding(self, module: str) -> InputRounding:
        """Of the layer's inputs at the engine."""
        inputs = self._scheme(module).input_activations if self.is_quantized(module) else None
        if inputs is None:
            return "exact"
        return "int8" if inputs.type == "int" else "fp8"

    def _scheme(self, module: str) -> Any:
        from compressed_tensors.utils.match import match_name  # noqa: PLC0415

        # A name is more specific than a class of modules, such as Linear.
        for scheme in self._schemes:
            if any(match_name(module, target) for target in scheme.targets):
                return scheme
        by_class = [scheme for scheme in self._schemes if "Linear" in scheme.targets]
        if len(by_class) != 1:
            raise AdaptError(
                f"{self.label}: quantization_config of {self.folder}/config.json does not say how layer {module} is "
                "quantized"
            )
        return by_class[0]


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
        raise AdaptError(f"{label}: {folder}/config.json cannot be used: {_one_line(error)}") from None
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        config.quantization_config = quantization.to_dict()
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
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("adapter_"):
            continue
        try:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise AdaptError(f"{label}: {path} cannot be read ({_one_line(error)}); copy it again") from None
    if not found:
        kinds = [name for name in ("bin", "pt", "pth", "gguf") if any(folder.glob(f"*.{name}"))]
        detail = f"only .{', .'.join(kinds)} files; save it with save_pretrained" if kinds else "copy it again"
        raise AdaptError(f"{label}: {folder} has no .safetensors file: {detail}")
    return found


def _schemes(quantization: dict[str, Any] | None, folder: Path, label: str) -> list[Any]:
    """The `QuantizationScheme`s of the groups of layers, each with a format of FORMATS. AdaptError for others."""
    if quantization is None:
        return []
    where = f"{label}: quantization_config of {folder}/config.json"
    supported = f"supported are compressed-tensors with {', '.join(FORMATS)}, and dense checkpoints"
    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise AdaptError(f"{where} has the method {method}, which is not supported: {supported}")
    if quantization.get("transform_config"):
        raise AdaptError(f"{where} has a transform_config (rotated weights), which is not supported: {supported}")
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise AdaptError(f"{where} has the sparse format {quantization['sparsity_config']['format']}: {supported}")
    if problem := packages.missing("adapters"):
        raise AdaptError(f"{label}: {folder} is quantized; {problem}")
    from compressed_tensors.quantization import QuantizationConfig  # noqa: PLC0415

    try:
        known = {key: quantization[key] for key in QuantizationConfig.model_fields if key in quantization}
        parsed = QuantizationConfig.model_validate(known)
    except ValueError as error:
        raise AdaptError(f"{where} cannot be read: {_one_line(error)}") from None
    schemes = list(parsed.config_groups.values())
    for scheme in schemes:
        written = getattr(scheme.format, "value", scheme.format) or parsed.format
        if written not in FORMATS:
            raise AdaptError(f"{where} has the format {written}, which is not supported: {supported}")
        scheme.format = written
        weights, inputs = scheme.weights, scheme.input_activations
        if weights is None or (weights.type == "float" and weights.num_bits != 8):
            kind = "no" if weights is None else f"{weights.num_bits}-bit float"
            raise AdaptError(f"{where} has {kind} weights in {written}, which is not supported: {supported}")
        if inputs is not None and not _by_token(inputs):
            raise AdaptError(
                f"{where} rounds inputs in another way than to int8 or FP8 by token at run time, which is not supported"
            )
        if scheme.output_activations is not None:
            raise AdaptError(f"{where} rounds outputs, which is not supported: {supported}")
    return schemes


def _by_token(inputs: Any) -> bool:
    """8 bits, by token, at run time."""
    return bool(inputs.num_bits == 8 and inputs.strategy == "token" and inputs.symmetric and inputs.dynamic is True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
