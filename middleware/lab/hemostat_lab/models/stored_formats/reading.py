"""The table of formats, and what a checkpoint's configuration says about its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.models.stored_formats.awq import Awq
from hemostat_lab.models.stored_formats.compressed_tensors import CompressedTensors
from hemostat_lab.models.stored_formats.fp8 import Fp8
from hemostat_lab.models.stored_formats.gptq import Gptq
from hemostat_lab.models.stored_formats.modelopt import ModelOpt
from hemostat_lab.models.stored_formats.stored_layer import StoredFormat

_AUTO_ROUND_GPTQ = {"auto_round:auto_gptq": "gptq", "auto_round": "gptq_v2"}
"""`packing_format` -> `checkpoint_format`."""


def _auto_round(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """AutoRound's own names for GPTQ's format, AWQ's, and E4M3; layers that differ are in `extra_config`."""
    packing = str(quantization.get("packing_format") or "auto_round:auto_gptq")
    if packing == "auto_round:auto_awq":
        return Awq.of(quantization, where)
    if packing == "auto_round:fp8":
        return Fp8.of(quantization, where)
    if packing not in _AUTO_ROUND_GPTQ:
        supported = ", ".join((*_AUTO_ROUND_GPTQ, "auto_round:auto_awq", "auto_round:fp8"))
        raise AdaptError(f"{where} has the packing_format {packing}, which is not supported: use {supported}")
    # A layer's members are those that differ, and one of 16 bits is dense.
    layers = (quantization.get("extra_config") or {}).items()
    kept = {name: values for name, values in layers if str(values.get("bits")) not in ("16", "32")}
    return Gptq.of({**quantization, "format": _AUTO_ROUND_GPTQ[packing], "dynamic": kept}, where)


FORMATS: Mapping[str, Callable[[Mapping[str, Any], str], StoredFormat]] = {
    "compressed-tensors": CompressedTensors.of,
    "gptq": Gptq.of,
    "awq": Awq.of,
    "auto-round": _auto_round,
    "fp8": Fp8.of,
    "fbgemm_fp8": Fp8.of,
    "modelopt": ModelOpt.of,
    "modelopt_fp4": ModelOpt.of,
}
"""By `quant_method`. Of both the arguments are the `quantization_config`, and how errors name it."""
FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where a tool wrote it beside config.json, which then does not say it; and the `quant_method` that it stands for."""
_MARKS = {
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_global_scale": "compressed-tensors",
    "weight_scale": "FP8, ModelOpt or compressed-tensors",
    "weight_scale_inv": "FP8 in blocks",
    "weight_scale_2": "ModelOpt's NVFP4",
}
"""Last parts of names of tensors that only quantized layers have, and of which formats they are."""


def quantization_of(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], str] | None:
    """The `quantization_config` of a checkpoint, with its `quant_method`, and the file that it is in; None: dense.

    config: content of config.json. AdaptError where it cannot be read.
    """
    quantization = config.get("quantization_config")
    if quantization:
        if not isinstance(quantization, dict):
            raise AdaptError(f"quantization_config of {folder}/config.json is no object; copy the checkpoint again")
        return dict(quantization), "config.json"
    for name, method in FILES.items():
        if (folder / name).is_file():
            try:
                values = json.loads((folder / name).read_text(encoding="utf-8"))
                return {"quant_method": method, **values}, name
            except (OSError, ValueError, TypeError):
                raise AdaptError(f"{folder / name} is not JSON; copy the checkpoint again") from None
    return None


def has_quantized_kv_cache(quantization: Mapping[str, Any]) -> bool:
    inner = quantization.get("quantization")
    values = {**quantization, **(inner if isinstance(inner, dict) else {})}
    return bool(values.get("kv_cache_scheme") or values.get("kv_cache_quant_algo"))


def stored_format(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """Raises AdaptError for what is not supported. where: how errors name the `quantization_config`."""
    method = str(quantization.get("quant_method"))
    read = FORMATS.get(method)
    if read is None:
        raise AdaptError(
            f"{where} has the quant_method {method}, which is not supported: use {', '.join(FORMATS)}, or a dense copy"
        )
    return read(quantization, where)


def check_names(modules: Mapping[str, Iterable[str]], known: StoredFormat | None, where: str) -> None:
    """AdaptError where tensors are of another format than the configuration says. modules: name -> last parts of its
    tensors' names. known: None: dense."""
    parts = frozenset() if known is None else known.parts
    for module in sorted(modules):
        for part in sorted(set(modules[module]) & _MARKS.keys() - parts):
            says = "has no quantization_config" if known is None else "says another format"
            raise AdaptError(
                f"{where}: {module}.{part} is of {_MARKS[part]}, and its configuration {says}: copy the configuration "
                "that belongs to these weights, or the whole checkpoint"
            )
